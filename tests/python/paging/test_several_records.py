"""Stops with a record for each format, trained in two dtypes or frozen in part, have the bits of stock training."""

import copy
import os
from dataclasses import replace
from functools import lru_cache
from itertools import islice

import pytest
import torch
from torch import nn

from device_plans import GATHERED, LEAST, plan
from megatrain_io.errors import MegatrainIoError
from megatrain_io.generate import Pick, next_tokens
from megatrain_io.paging.activations import ActivationBudget
from megatrain_io.paging.device.simulated import SimulatedDevice
from megatrain_io.planning.dry_run import dry_run
from megatrain_io.store.schedule import traffic
from paged import DEVICE, PLANES, Case, all_planes, make_store, opened, to_micro_batch, train
from reference.reference import accumulate, round_half_away, untie

FP32, BF16 = torch.float32, torch.bfloat16


def bf16_norms(name):
    """An fp32 model whose norms are bf16: torch multiplies them with the fp32 hidden state in fp32."""
    return "bf16" if "norm" in name else "f32"


def frozen_mlp(name):
    return "raw16" if ".mlp." in name else "bf16"


def frozen_base(name):
    """What adapters find: of each block little is trained, and of the embedding nothing."""
    return "bf16" if ".layers." in name and "norm" in name else "raw16"


def three_formats(name):
    return "raw32" if ".mlp.up" in name or "embed" in name else bf16_norms(name)


def trained_embedding(name):
    """No block is trained, and the last one's weights stay across the turn all the same."""
    return "bf16" if "embed" in name or "lm_head" in name else "raw16"


def dtype_of(state_format):
    return BF16 if state_format in {"bf16", "raw16"} else FP32


@lru_cache(maxsize=16)
def in_memory(case):
    """The reference's training, where each parameter has a dtype of its own, and frozen ones have no gradient."""
    model = copy.deepcopy(case.model)
    formats = {name: case.format_of(name) for name, _ in model.named_parameters()}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not formats[name].startswith("raw"))
    leaves = untie(model)
    masters = {name: nn.Parameter(own[0].detach().clone()) for name, own in leaves.items()}

    def write():
        for name, own in leaves.items():
            is_bf16 = dtype_of(formats[name]) == BF16
            is_trained = own[0].requires_grad
            for leaf in own:
                value = masters[name].detach()
                rounded = round_half_away(value) if is_trained else value.to(BF16)
                leaf.data = rounded if is_bf16 else value.clone()

    write()
    trained = {name: master for name, master in masters.items() if leaves[name][0].requires_grad}
    how = case.hyperparameters
    groups = [
        {"params": [m for m in trained.values() if (m.ndim >= 2) == decays], "weight_decay": decay}
        for decays, decay in ((True, how.weight_decay), (False, 0.0))
    ]
    optimizer = torch.optim.AdamW(groups, betas=(how.beta1, how.beta2), eps=how.eps, fused=True)
    losses = []
    for step, lr in zip(case.steps, how.lr, strict=True):
        loss, gradients = accumulate(model, leaves, step)
        losses.append(loss)
        for name, master in trained.items():
            master.grad = gradients[name]
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        write()
    planes = {}
    for name, own in leaves.items():
        planes[name, "weight"] = own[0].detach()
        if name in trained:
            planes[name, "master"] = trained[name].detach()
            planes |= {(name, plane): optimizer.state[trained[name]][plane] for plane in PLANES[2:]}
    return losses, planes


def check(path, case, new_device=lambda: None, **how):
    """Two steps, and the others after the store was opened again: losses and planes, and the layout."""
    losses, planes = in_memory(case)
    make_store(path, case, 4096)
    with opened(path, case, device=new_device(), **how) as model:
        train(model, case, stop=2)
    with opened(path, case, device=new_device(), **how) as model:
        assert train(model, case) == losses
        model.flush()
        found = all_planes(model.state)
        assert found.keys() == planes.keys()
        assert [key for key, value in found.items() if not torch.equal(value, planes[key])] == []
        return model.state.layout


CASES = {
    "two dtypes": Case(counts=(2, 1, 2), format_of=bf16_norms),
    "two dtypes, tied": Case("qwen3", True, counts=(2, 1, 2), format_of=bf16_norms),
    "frozen mlp": Case(dtype=BF16, counts=(2, 1, 2), format_of=frozen_mlp),
    "frozen base, tied": Case("qwen3", True, BF16, (2, 1, 2), format_of=frozen_base),
    "three formats": Case(counts=(2, 1, 2), format_of=three_formats),
    "trained embedding, tied": Case("llama", True, BF16, (2, 1, 2), format_of=trained_embedding),
}


@pytest.mark.parametrize("name", CASES)
def test_training_has_the_bits_of_stock_training(tmp_path, name):
    layout = check(tmp_path / "store", CASES[name])
    several = {"three formats": 3, "trained embedding, tied": 1}
    assert max(map(len, layout.stops)) == several.get(name, 2)


@pytest.mark.parametrize(
    "how",
    [
        {"small_pool": True},
        {"small_pool": True, "resident_share": 0.5},
        {"resident_share": 1.0},
        {"activations": 1},
        {"engine": "threads"},
        {"max_grad_norm": 1e9, "policy": "deferred", "kept_in_ram": 0.5, "small_pool": True},
        {"max_grad_norm": 1e9, "policy": "speculative", "kept_in_ram": 0.0},
        {"max_grad_norm": 1e9, "policy": "deferred", "resident_share": 0.7},
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["two dtypes, tied", "frozen base, tied", "three formats"])
def test_how_bytes_move_changes_no_bit(tmp_path, name, how):
    how = dict(how)
    if "activations" in how:
        how["activations"] = ActivationBudget(2 << 20, [tmp_path / "inputs"])
    check(tmp_path / "store", CASES[name], **how)


SOAKS = "MEGATRAIN_SOAK_SEEDS" in os.environ
DEVICES = {
    "ample": {},
    "least": LEAST,
    "one gradient of each format": LEAST | {"block_gradients": 0},
    "gradients gather in RAM": GATHERED,
}


@pytest.mark.slow
@pytest.mark.parametrize("buffers", DEVICES)
@pytest.mark.parametrize("name", CASES if SOAKS else ["three formats", "frozen base, tied"])
def test_on_a_device_the_bits_are_the_same(tmp_path, name, buffers):
    case, devices = CASES[name], []
    if case.tied and DEVICES[buffers].get("block_gradients") == 0:
        pytest.skip("a tied table's gradient has a buffer of its own")

    def new_device():
        devices.append(SimulatedDevice(len(devices), delay=0.001))
        return devices[-1]

    vram = plan(case, chunk_parameters=4096, **DEVICES[buffers])
    how = {"vram": vram, "small_pool": buffers != "ample", "resident_share": 0.3}
    check(tmp_path / "store", case, new_device, **how)
    assert devices[0].accounts.peak_nbytes == vram.allocated


@pytest.mark.skipif(DEVICE != "cpu", reason="counts what the store moves for the CPU")
@pytest.mark.parametrize("name", CASES)
def test_a_step_moves_what_its_schedule_says(tmp_path, name):
    case = CASES[name]
    make_store(tmp_path / "store", case, 4096)
    with opened(tmp_path / "store", case) as model:
        train(model, case, stop=2)
        before = model.state.io_bytes()
        train(model, case, stop=3)
        read, written = (now - then for now, then in zip(model.state.io_bytes(), before, strict=True))
        expected = traffic(model.training_schedule, model.state.layout)
    assert read == expected[0]
    # And table, blob and superblocks.
    assert expected[1] < written < expected[1] + (1 << 20)


@pytest.mark.skipif(DEVICE != "cpu", reason="measures the RAM of compute")
@pytest.mark.parametrize("name", ["two dtypes", "frozen base, tied", "three formats"])
def test_a_dry_run_needs_what_a_real_step_does(tmp_path, name):
    sizes = {"hidden_size": 256, "intermediate_size": 688, "vocab_size": 2053, "head_dim": 64}
    case = replace(CASES[name], counts=(3,), overrides=sizes)
    make_store(tmp_path / "store", case)
    (step,) = case.steps
    with opened(tmp_path / "store", case) as model:
        batches = [to_micro_batch(batch) for batch in step]
        expected = dry_run(model.partition, model.state.layout, batches, slice_tokens=model.slice_tokens)
        train(model, case)
        measured = model.state.ledger.balances()["compute"][1]
    assert expected == pytest.approx(measured, rel=0.01)


def test_frozen_records_beside_trained_ones_are_trained_and_not_passed_through(tmp_path):
    case = replace(CASES["frozen base, tied"], counts=(1,))
    make_store(tmp_path / "store", case)
    with opened(tmp_path / "store", case) as model:
        batches = [to_micro_batch(batch) for batch in case.steps[0]]
        with pytest.raises(MegatrainIoError, match="makes their gradients, too"):
            model.pass_gradients(batches)
        loss = model.evaluate(batches).loss
        assert train(model, case) == [loss]


@pytest.mark.parametrize("name", ["two dtypes", "frozen base, tied"])
def test_generated_tokens_are_those_of_the_stock_model(tmp_path, name):
    case = CASES[name]
    stock = copy.deepcopy(case.model)
    for parameter_name, parameter in stock.named_parameters():
        parameter.data = parameter.data.to(dtype_of(case.format_of(parameter_name)))
    prompt = case.steps[0][0]["input_ids"]
    how = {"do_sample": False, "max_new_tokens": 8, "pad_token_id": 0, "eos_token_id": None}
    expected = stock.generate(prompt, attention_mask=torch.ones_like(prompt), **how)
    make_store(tmp_path / "store", case, 4096)
    with opened(tmp_path / "store", case) as model:
        tokens = list(islice(next_tokens(model, prompt, Pick(), frozenset()), 8))
    assert tokens == expected[0, prompt.shape[1] :].tolist()
