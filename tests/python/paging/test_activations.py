"""Activation checkpoints beyond their RAM: the same bits, the bytes of the plan, and nothing left on the drive."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatrain_io.errors import ConfigError, CorruptionError, NoSpaceError, TrainingDivergedError
from megatrain_io.paging import activation_file
from megatrain_io.paging.activation_file import ActivationFile
from megatrain_io.paging.activations import (
    ActivationBudget,
    SavedActivations,
    activation_nbytes,
    activation_plan,
)
from megatrain_io.runs.folder import activations_file
from megatrain_io.store.paged_store import AdamWStep, Ledger
from paged import (
    DEVICE,
    DRIVES,
    PROFILE,
    Case,
    all_planes,
    blob,
    differing,
    files,
    make_store,
    opened,
    to_micro_batch,
    train,
)

pytestmark = pytest.mark.skipif(
    DEVICE != "cpu", reason="there activation checkpoints stay on the device: test_device.py"
)

ENGINE = "threads"  # stopping a ring takes a second; one test uses it
BLOCKS = 6
PAGE = 4096
SHAPE = {"num_hidden_layers": BLOCKS}
CASE = Case(tied=True, dtype=torch.bfloat16, counts=(3, 1, 3), overrides=SHAPE)


def budget(store, ram_bytes):
    scratch = [activations_file(path) for path in files(store)]
    return ActivationBudget(ram_bytes, scratch, transfer_nbytes=PAGE)


def plans(case, ram_bytes):
    """What each step is to move."""
    width = case.config.hidden_size * case.dtype.itemsize
    nbytes = [activation_nbytes([each["input_ids"].numel() * width for each in step]) for step in case.steps]
    return [activation_plan(BLOCKS, each, ram_bytes, PAGE) for each in nbytes]


def largest_slot(case):
    return max(plan.slot_nbytes for plan in plans(case, 1 << 40))


def step_of(model, case, number):
    batches = [to_micro_batch(batch) for batch in case.steps[number - 1]]
    return model.train_step(batches, AdamWStep(number, 1e-3), lambda loss: blob(number, [loss]))


def beside(store):
    return sorted(path.name for path in store.parent.iterdir() if ".inputs" in path.name)


def trained(path, case, ram_bytes, engine=ENGINE):
    make_store(path, case, engine=engine)
    with opened(path, case, engine=engine, activations=ram_bytes and budget(path, ram_bytes)) as model:
        losses = train(model, case)
        assert beside(path) == []
        found = losses, all_planes(model.state)
        peak = model.state.ledger.balances()["activations"][1]
        moved = model.saved.io_bytes()
    assert model.state.ledger.balances()["activations"][0] == 0
    return found, peak, moved


# ---------------------------------------------------------------------------------------------- the plan


def test_the_plan_keeps_the_last_blocks_and_moves_the_others_once_each_way():
    mib = 1 << 20
    plan = activation_plan(32, 100 * mib, 1000 * mib)
    assert (plan.in_ram, plan.on_drive, plan.ram_nbytes) == (10, 22, 1000 * mib)
    assert plan.moved_nbytes == 22 * 100 * mib
    plan = activation_plan(32, 3 * mib - 1, 9 * mib)  # slots are whole huge pages, transfers whole MiB
    assert (plan.in_ram, plan.slot_nbytes, plan.moved_nbytes) == (2, 4 * mib, 30 * 3 * mib)
    assert activation_plan(32, 100 * mib, None).moved_nbytes == 0
    assert activation_plan(32, 100 * mib, 3200 * mib).on_drive == 0


def test_less_than_two_blocks_is_refused_with_the_least_that_does(tmp_path):
    with pytest.raises(
        ConfigError, match=r"may take 8191 bytes .* take 4096 \(all 6 blocks: 24576\): 8192 is the least"
    ):
        activation_plan(BLOCKS, 4000, 8191, PAGE)
    assert activation_plan(BLOCKS, 4000, 8192, PAGE).in_ram == 2
    make_store(tmp_path / "store", CASE, engine=ENGINE)
    with opened(
        tmp_path / "store", CASE, engine=ENGINE, activations=budget(tmp_path / "store", PAGE)
    ) as model:
        with pytest.raises(ConfigError, match="is the least"):
            step_of(model, CASE, 1)
        assert model.state.io_bytes()[1] == 0
    with pytest.raises(ConfigError, match="no file for what is beyond it"):
        ActivationBudget(1 << 20)


# ---------------------------------------------------------------------------------------------- the bits


@pytest.mark.slow
@pytest.mark.parametrize("counts", [(1, 1, 1), (3, 3, 3)], ids=["one", "three"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_where_inputs_lie_changes_no_bit_and_moves_what_the_plan_says(tmp_path, tied, dtype, counts):
    case = Case(tied=tied, dtype=dtype, counts=counts, overrides=SHAPE)
    slot = largest_slot(case)
    (losses, planes), _, moved = trained(tmp_path / "ram", case, None)
    assert moved == (0, 0)
    for slots in (BLOCKS, BLOCKS // 2, 2):
        bound = slots * slot + PAGE
        (found, others), peak, moved = trained(tmp_path / str(slots), case, bound)
        assert found == losses
        assert differing(others, planes) == []
        assert peak <= bound
        expected = sum(plan.moved_nbytes for plan in plans(case, bound))
        assert (expected == 0) == (slots == BLOCKS)
        # Opening the file, and taking its mark away before the first write, is what is left.
        if expected == 0:
            assert moved == (0, 0)
        else:
            assert moved[1] - expected < 64 * PAGE
            assert moved[1] >= expected


def test_a_step_moves_exactly_what_the_plan_says(tmp_path):
    """In the steady state; the first step is the largest, so that the file is made once."""
    case = Case(dtype=torch.bfloat16, counts=(3, 1, 3, 2), overrides=SHAPE)
    bound = 2 * largest_slot(case)
    make_store(tmp_path / "store", case, engine=ENGINE)
    with opened(
        tmp_path / "store", case, engine=ENGINE, activations=budget(tmp_path / "store", bound)
    ) as model:
        step_of(model, case, 1)
        step_of(model, case, 3)
        for number, plan in enumerate(plans(case, bound), start=1):
            before = model.saved.io_bytes()
            step_of(model, case, number)
            after = model.saved.io_bytes()
            moved = [b - a for a, b in zip(before, after, strict=True)]
            assert moved == [plan.moved_nbytes] * 2
            model.evaluate([to_micro_batch(batch) for batch in case.steps[0]])
            assert model.saved.io_bytes() == after


def test_every_engine_gives_the_same_bits(tmp_path):
    (losses, planes), _, _ = trained(tmp_path / "ram", CASE, None)
    (found, others), _, _ = trained(tmp_path / "auto", CASE, 2 * largest_slot(CASE), engine="auto")
    assert found == losses
    assert differing(others, planes) == []


def test_one_block_is_written_while_the_next_are_computed_and_read_ahead(tmp_path):
    """Order of the transfers: each begins as soon as its slot allows, not when it is waited for."""
    order = []

    class Waited:
        def __init__(self, what, block, transfer):
            order.append((what, block))
            self.what, self.block, self.transfer = what, block, transfer

        def wait(self):
            order.append((f"{self.what} waited for", self.block))
            self.transfer.wait()

    class Noted(ActivationFile):
        def write(self, block, slot):
            return Waited("write", block, super().write(block, slot))

        def read(self, block, slot):
            return Waited("read", block, super().read(block, slot))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("megatrain_io.paging.activations.ActivationFile", Noted)
        saved = SavedActivations(Ledger(), budget(tmp_path / "store", 2 * PAGE), ENGINE)
        saved.reserve(4, [PAGE])
    inputs = [torch.full((PAGE,), block, dtype=torch.uint8) for block in range(4)]
    for block in range(4):
        order.append(("put", block))
        saved.put(block, 0, inputs[block])
        saved.finish(block)
    for block in reversed(range(4)):
        order.append(("get", block))
        assert torch.equal(saved.get(block, 0, inputs[block]), inputs[block])
        saved.release(block)
    assert order == [
        ("put", 0), ("write", 0), ("put", 1), ("write", 1),
        ("put", 2), ("write waited for", 0), ("put", 3), ("write waited for", 1),
        ("get", 3), ("read", 1), ("get", 2), ("read", 0), ("get", 1), ("read waited for", 1),
        ("get", 0), ("read waited for", 0),
    ]  # fmt: skip
    order.clear()
    saved.put(0, 0, inputs[0])
    saved.finish(0)
    saved.reserve(4, [PAGE])  # the step failed: its transfer ends before the slot is used again
    assert order == [("write", 0), ("write waited for", 0)]
    saved.close()


# --------------------------------------------------------------------------------------- what goes wrong


def flip(store):
    """One bit of every page of the file without a name, behind its tables."""
    flipped = 0
    for descriptor in Path("/proc/self/fd").iterdir():
        target = str(descriptor.readlink()) if descriptor.is_symlink() else ""
        if target.startswith(str(store)) and ".inputs" in target:
            assert target.endswith(" (deleted)")
            with descriptor.open("r+b", buffering=0) as file:
                for place in range(3 << 20, file.seek(0, os.SEEK_END), PAGE):
                    byte = os.pread(file.fileno(), 1, place + 9)
                    os.pwrite(file.fileno(), bytes([byte[0] ^ 4]), place + 9)
                os.fsync(file.fileno())
            flipped += 1
    assert flipped


def in_backward(model, patch, action):
    """Do something when the backward pass reaches its first block."""
    run_block, done = model.partition.run_block, []

    def acting(index, parameters, hidden, call):
        if torch.is_grad_enabled() and not done:
            done.append(index)
            action()
        return run_block(index, parameters, hidden, call)

    patch.setattr(model.partition, "run_block", acting)


class Boom(Exception):  # noqa: N818
    pass


def raising(error):
    def action():
        raise error

    return action


@pytest.mark.timeout(60)
def test_a_failed_step_leaves_nothing(tmp_path, monkeypatch):
    store = tmp_path / "store"
    (losses, planes), _, _ = trained(tmp_path / "ram", CASE, None)
    make_store(store, CASE, engine=ENGINE)
    kept = []
    with opened(store, CASE, engine=ENGINE, activations=budget(store, 2 * largest_slot(CASE))) as model:
        assert train(model, CASE, 1) == losses[:1]
        for error in (Boom(), KeyboardInterrupt()):
            with monkeypatch.context() as patch:
                in_backward(model, patch, raising(error))
                with pytest.raises(type(error)) as caught:
                    step_of(model, CASE, 2)
            kept.append(caught)
        with monkeypatch.context() as patch:
            loss = model.partition.loss
            patch.setattr(model.partition, "loss", lambda *arguments: loss(*arguments) * float("nan"))
            with pytest.raises(TrainingDivergedError):
                step_of(model, CASE, 2)
        assert train(model, CASE) == losses
        assert differing(all_planes(model.state), planes) == []


@pytest.mark.timeout(60)
def test_a_flipped_bit_is_found_and_named_and_the_next_step_is_whole(tmp_path, monkeypatch):
    store = tmp_path / "store"
    (losses, planes), _, _ = trained(tmp_path / "ram", CASE, None)
    make_store(store, CASE, engine=ENGINE)
    with opened(store, CASE, engine=ENGINE, activations=budget(store, 2 * largest_slot(CASE))) as model:
        assert train(model, CASE, 2) == losses[:2]
        with monkeypatch.context() as patch:
            in_backward(model, patch, lambda: flip(store))
            with pytest.raises(CorruptionError, match=r"not touched.*input of block 3.*store\.inputs\+"):
                step_of(model, CASE, 3)
        assert train(model, CASE) == losses
        assert differing(all_planes(model.state), planes) == []
        assert beside(store) == []


def test_a_full_drive_is_one_error_before_the_step(tmp_path, monkeypatch):
    path = tmp_path / "full.inputs"
    with pytest.raises(
        NoSpaceError, match=rf"full.inputs: the inputs of 3 blocks, {1 << 42} bytes each, do not fit .*RAM"
    ):
        ActivationFile(
            [path], blocks=3, nbytes=1 << 42, transfer_nbytes=1 << 28, memory_nbytes=PAGE,
            engine=ENGINE, ledger=Ledger(),
        )  # fmt: skip
    assert list(tmp_path.iterdir()) == []
    store = tmp_path / "store"
    make_store(store, CASE, engine=ENGINE)

    def full(paths, *_rest):
        raise NoSpaceError(f"{paths[0]} needs 7 bytes, and 6 are free")

    with opened(store, CASE, engine=ENGINE, activations=budget(store, 2 * largest_slot(CASE))) as model:
        before = model.state.io_bytes()
        with monkeypatch.context() as patch:
            patch.setattr(activation_file, "StoreCreator", full)
            with pytest.raises(NoSpaceError, match="needs 7 bytes, and 6 are free"):
                step_of(model, CASE, 1)
        assert model.state.io_bytes() == before
        assert step_of(model, CASE, 1).trained_tokens > 0


@pytest.mark.slow
@pytest.mark.timeout(120)
@pytest.mark.parametrize("when", ["in a step", "before the name is gone"])
def test_a_kill_leaves_nothing_that_the_next_start_does_not_remove(tmp_path, when):
    store = tmp_path / "store"
    make_store(store, CASE, engine=ENGINE)
    script = """
import os, signal, sys
from pathlib import Path
import pytest
from megatrain_io.paging import activation_file
from paged import opened
from test_activations import CASE, ENGINE, budget, in_backward, largest_slot, step_of

def die(*_arguments):
    os.kill(os.getpid(), signal.SIGKILL)

store = Path(sys.argv[1])
with opened(store, CASE, engine=ENGINE, activations=budget(store, 2 * largest_slot(CASE))) as model:
    if sys.argv[2] == "in a step":
        in_backward(model, pytest.MonkeyPatch(), die)
    else:
        activation_file.Store = die
    step_of(model, CASE, 1)
"""
    paths = {"PYTHONPATH": os.pathsep.join(sys.path), "PATH": "", PROFILE: str(DRIVES)}
    command = [sys.executable, "-W", "ignore", "-c", script, str(store), when]
    ended = subprocess.run(command, capture_output=True, text=True, check=False, env=paths, timeout=100)
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    assert bool(beside(store)) == (when != "in a step")
    with opened(store, CASE, engine=ENGINE, activations=budget(store, 2 * largest_slot(CASE))) as model:
        assert beside(store) == []
        assert step_of(model, CASE, 1).trained_tokens > 0
