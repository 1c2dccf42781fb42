"""Clipping is exact: torch's norm, and the bits of training in memory with the same coefficient, however it is done."""

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from megatrain_io.errors import CorruptionError, MegatrainIoError
from megatrain_io.paging.clipping import Speculation, clip_coefficient
from megatrain_io.store.paged_store import AdamWStep
from paged import (
    Case,
    all_planes,
    differing,
    expected_planes,
    files,
    in_memory,
    make_store,
    opened,
    progress_of,
    to_micro_batch,
    train,
)

FP32, BF16 = torch.float32, torch.bfloat16


def paged(path, case, max_grad_norm, *, commit_every=1, chunk_parameters=None, engine="auto", **how):
    """What each step came to, and all planes at the end."""
    make_store(path, case, chunk_parameters, engine)
    with opened(path, case, max_grad_norm=max_grad_norm, engine=engine, **how) as model:
        made = []
        for number, batches in enumerate(case.steps, 1):
            h = case.hyperparameters
            adamw = AdamWStep(number, h.lr[number - 1], h.beta1, h.beta2, h.eps)
            commits = number % commit_every == 0 or number == len(case.steps)
            blob = (lambda _loss: b"%d" % number) if commits else None  # noqa: B023
            made.append(model.train_step([*map(to_micro_batch, batches)], adamw, blob))
        model.wait_durable()
        assert model.state.blob == b"%d" % len(case.steps)
        planes = all_planes(model.state)
    assert sorted(path.parent.iterdir()) == sorted(files(path)), "nothing is left beside the store"
    return made, planes


def limit_of(case):
    """Some steps are clipped, others are not."""
    return sorted(in_memory(case).grad_norms)[len(case.counts) // 2]


def check(tmp_path, case, max_grad_norm, **how):
    (tmp_path / "run").mkdir()
    made, planes = paged(tmp_path / "run" / "store", case, max_grad_norm, **how)
    coefficients = [step.clip_coefficient for step in made]
    expected = in_memory(case, tuple(coefficients))
    assert [step.loss for step in made] == expected.losses
    assert differing(planes, expected_planes(expected)) == []
    assert [step.grad_norm for step in made] == pytest.approx(expected.grad_norms, rel=1e-6)
    assert coefficients == [clip_coefficient(step.grad_norm, max_grad_norm) for step in made]
    return made


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["deferred", "speculative"])
@pytest.mark.parametrize("micro_batches", [1, 4])
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_clipped_training_equals_stock_training(tmp_path, family, tied, dtype, micro_batches, policy):
    case = Case(family, tied, dtype, (micro_batches,) * 8)
    made = check(tmp_path, case, limit_of(case), policy=policy)
    clipped = [step.clip_coefficient < 1 for step in made]
    assert {True, False} == set(clipped)


PLACES = [
    {"chunk_parameters": 4096},
    {"chunk_parameters": 1 << 21},
    {"engine": "threads", "threads": 1},
    {"engine": "uring", "threads": 2},
    {"kept_in_ram": 0.0},
    {"kept_in_ram": 0.0, "small_pool": True, "chunk_parameters": 4096},
    {"kept_in_ram": 0.5, "resident_share": 0.5},
    {"resident_share": 1.0},
    {"resident_share": 0.4, "kept_in_ram": 0.0},
]


@pytest.mark.parametrize(
    "how", [*PLACES, {"commit_every": 3}, {"commit_every": 2, "resident_share": 0.5}], ids=str
)
@pytest.mark.parametrize("policy", ["deferred", "speculative"])
def test_how_it_is_done_changes_no_bit(tmp_path, policy, how):
    case = Case(tied=True, dtype=BF16, counts=(1, 4, 2, 1, 1, 2))
    check(tmp_path, case, limit_of(case), policy=policy, **how)


@pytest.mark.slow
def test_the_norm_is_that_of_torch_and_its_bits_do_not_depend_on_the_place(tmp_path):
    case = Case(tied=True, dtype=BF16, counts=(1, 2))
    norms = set()
    for number, how in enumerate(PLACES):
        (tmp_path / str(number)).mkdir()
        made, _ = paged(tmp_path / str(number) / "store", case, 1e-3, policy="deferred", **how)
        norms.add(tuple(step.grad_norm for step in made))
    assert len(norms) == 1


def test_a_step_that_is_refused_before_it_begins_leaves_what_waits(tmp_path):
    case = Case(dtype=BF16, counts=(1, 1))
    make_store(tmp_path / "store", case)
    with opened(tmp_path / "store", case, max_grad_norm=1e9, policy="deferred") as model:
        train(model, case, stop=1)
        batch = to_micro_batch(case.steps[1][0])
        model.train_step([batch], AdamWStep(2, 1e-3), lambda _loss: b"2")
        nothing = replace(batch, shift_labels=torch.full_like(batch.shift_labels, -100))
        with pytest.raises(MegatrainIoError, match="nothing to train"):
            model.train_step([nothing], AdamWStep(3, 1e-3), lambda _loss: b"3")
        with pytest.raises(MegatrainIoError, match="gradients wait"):
            model.state.wait_durable()
        model.wait_durable()
        assert model.state.blob == b"2"


@pytest.mark.timeout(60)
def test_a_flipped_bit_of_a_gradient_that_waits_is_found_and_costs_its_step(tmp_path):
    case, store = Case(dtype=BF16, counts=(1,) * 4), tmp_path / "store"
    how = {"max_grad_norm": limit_of(case), "policy": "deferred", "kept_in_ram": 0.0}
    make_store(tmp_path / "whole", case)
    with opened(tmp_path / "whole", case, **how) as model:
        losses = train(model, case)
        planes = all_planes(model.state)
    make_store(store, case)
    with opened(store, case, **how) as model:
        train(model, case, stop=2)
        written, layout = model.state.io_bytes()[1], model.state.layout
        model.train_step([to_micro_batch(case.steps[2][0])], AdamWStep(3, 1e-3), lambda _loss: b"3")
        while model.state.io_bytes()[1] < written + sum(map(layout.gradient_extent_bytes, layout.chunks)):
            pass
        flip(store)
        with pytest.raises(
            CorruptionError, match=r"gradient of prologue .*store\.gradients.* committed step is whole"
        ):
            model.train_step([to_micro_batch(case.steps[3][0])], AdamWStep(4, 1e-3), lambda _loss: b"4")
        assert progress_of(model.state)[0] == 2
        assert train(model, case) == losses
        assert differing(all_planes(model.state), planes) == []


def flip(store):
    """One bit of every page of the files in which gradients wait."""
    flipped = 0
    for descriptor in Path("/proc/self/fd").iterdir():
        target = str(descriptor.readlink()) if descriptor.is_symlink() else ""
        if target.startswith(str(store)) and target.endswith(".gradients (deleted)"):
            with descriptor.open("r+b", buffering=0) as file:
                for place in range(0, file.seek(0, os.SEEK_END), 4096):
                    byte = os.pread(file.fileno(), 1, place + 9)
                    os.pwrite(file.fileno(), bytes([byte[0] ^ 4]), place + 9)
                os.fsync(file.fileno())
            flipped += 1
    assert flipped


def test_coefficients_are_those_of_torch():
    for norm, limit in [(0.5, 1.0), (1.0, 1.0), (3.0, 1.0), (1e-9, 1e-3), (7.5, 0.3)]:
        weight = torch.nn.Parameter(torch.zeros(1))
        weight.grad = torch.tensor([norm])
        torch.nn.utils.clip_grad_norm_([weight], limit)
        assert clip_coefficient(norm, limit) == pytest.approx(weight.grad.item() / norm, rel=1e-6)
        assert clip_coefficient(norm, limit) == float(np.float32(clip_coefficient(norm, limit)))


def test_speculation_ends_when_it_is_wrong_too_often_and_comes_back():
    speculation = Speculation()
    assert speculation.is_worth_it
    for _ in range(10):
        speculation.learn(is_clipped=True)
    assert not speculation.is_worth_it
    for _ in range(30):
        speculation.learn(is_clipped=False)
    assert speculation.is_worth_it
