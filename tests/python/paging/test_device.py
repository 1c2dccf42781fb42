"""A device with memory of its own: the same bits as on the CPU, in an order that nothing but its waits makes safe."""

import os
import threading
from collections import Counter
from contextlib import contextmanager

import pytest
import torch

from device_plans import GATHERED, LEAST, per_block_nbytes, plan
from megatrain_io.data.batch import MicroBatch
from megatrain_io.errors import DoesNotFitError, NotFiniteError, TrainingDivergedError
from megatrain_io.generate import Pick, next_tokens
from megatrain_io.models.partition import model_parts
from megatrain_io.paging.activations import ActivationBudget, SavedActivations
from megatrain_io.paging.device.cpu import Cpu
from megatrain_io.paging.device.records import DeviceRecords
from megatrain_io.paging.device.simulated import OrderError, SimulatedDevice
from megatrain_io.paging.device.vram_budget import divide_vram, least_vram
from megatrain_io.paging.step import Step
from megatrain_io.planning import memory_needs
from megatrain_io.planning.memory_needs import gathered_nbytes
from megatrain_io.store.layout import ModelLayout
from megatrain_io.store.paged_store import AdamWStep
from paged import (
    FORMATS,
    Case,
    all_planes,
    differing,
    expected_planes,
    in_memory,
    make_store,
    opened,
    partitioned,
    to_micro_batch,
    train,
)

FP32, BF16 = torch.float32, torch.bfloat16
MIB = 1 << 20

SEEDS = int(os.environ.get("MEGATRAIN_SOAK_SEEDS", "12"))
"""Orders of copies that are tried; `make soak` tries 1,000."""

WAITS = {
    "weights have come",
    "the last weights were used",
    "the gradient is whole",
    "the last gradient has left",
    "inputs are whole",
    "inputs have left their slot",
    "inputs were used",
    "inputs have come",
}
GATHERING = {"the last sum has left", "sums have left", "the sum has come", "the sum is whole"}
"""Of gradients that gather in RAM."""


def trained(path, case, device, **how):
    make_store(path, case, how.pop("chunk_parameters", None))
    with opened(path, case, device=device, **how) as model:
        losses = train(model, case)
        return losses, all_planes(model.state)


def check(path, case, device, **how):
    expected = in_memory(case)
    losses, planes = trained(path, case, device, **how)
    assert losses == expected.losses
    assert differing(planes, expected_planes(expected)) == []


@pytest.mark.parametrize("slots", [None, 2])
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_a_device_gives_the_bits_of_stock_training(tmp_path, family, tied, dtype, slots):
    case = Case(family, tied, dtype, (2, 1, 3, 1), {"num_hidden_layers": 5})
    device = SimulatedDevice(3)
    how = {"small_pool": slots is not None, "resident_share": 0.3 if slots else 0.0}
    check(tmp_path / "store", case, device, vram=plan(case, slots=slots), **how)
    assert device.waits == (
        WAITS if slots else WAITS - {"inputs are whole", "inputs were used", "inputs have come"}
    )


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(SEEDS))
def test_no_delay_changes_a_bit(tmp_path, seed):
    tied = seed % 2 == 1
    case = Case(tied=tied, dtype=BF16, counts=(2, 1, 2), overrides={"num_hidden_layers": 4})
    # Where records have buffers, a tied table's gradient has one of its own always.
    gradients = (2, 1, 1 if tied else 0, None)[seed // 4 % 4]
    shape = {"slots": 2 + seed % 3, "block_weights": 1 + seed // 2 % 2, "block_gradients": gradients}
    device, made = SimulatedDevice(seed, delay=0.002), plan(case, **shape)
    check(tmp_path / "store", case, device, vram=made, small_pool=seed % 5 == 0, engine="threads")
    # Steps of two sizes: slots for inputs are made once.
    assert device.accounts.peak_nbytes == sum(device.accounts.nbytes.values()) == made.allocated


# Copies so slow that other waits do not happen to cover for the one that is left out.
SLOW = {"the last gradient has left": {"out": 0.002}}


@pytest.mark.slow
@pytest.mark.parametrize("why", sorted(WAITS))
def test_every_wait_is_needed(tmp_path, monkeypatch, why):
    """Left out, it is noticed at the first access that comes too early."""
    case = Case(dtype=BF16, counts=(2, 2), overrides={"num_hidden_layers": 5})
    if why == "inputs have come":
        # As from a slow drive: later than the weights that they are needed with.
        looks = Counter()
        monkeypatch.setattr(SavedActivations, "is_here", lambda *who: looks.update([who]) or looks[who] > 40)
    how = {"vram": plan(case, **LEAST | {"block_weights": 2})}
    check(tmp_path / "whole", case, SimulatedDevice(1), **how)
    device = SimulatedDevice(1, gb_per_s=SLOW.get(why, {"in": 0.002}), skipped=frozenset({why}))
    if why == "inputs have left their slot":
        # None does, before the step is dropped, which waits for all copies.
        hold = threading.Event()
        device._copies["out"].put(hold.wait)
        abort = DeviceRecords.abort
        monkeypatch.setattr(DeviceRecords, "abort", lambda state: (hold.set(), abort(state)))
    with pytest.raises(OrderError):
        trained(tmp_path / "store", case, device, **how)


@pytest.mark.slow
@pytest.mark.parametrize("chunk_parameters", [4096, 1 << 20])
@pytest.mark.parametrize("why", sorted(GATHERING))
def test_every_wait_of_gradients_that_gather_is_needed(tmp_path, why, chunk_parameters):
    """With records of many chunks, and of one: what must have left differs."""
    case = Case(dtype=BF16, counts=(2, 2), overrides={"num_hidden_layers": 3})
    how = {"chunk_parameters": chunk_parameters}
    how["vram"] = plan(case, **GATHERED, **how)
    whole = SimulatedDevice(1)
    check(tmp_path / "whole", case, whole, **how)
    assert whole.waits > GATHERING
    device = SimulatedDevice(1, gb_per_s={"in": 0.002, "out": 0.002}, skipped=frozenset({why}))
    with pytest.raises(OrderError):
        trained(tmp_path / "store", case, device, **how)


class Pinning(SimulatedDevice):
    """Knows what is pinned."""

    @contextmanager
    def pin(self, memory):
        self.pinned = [*getattr(self, "pinned", []), memory.nbytes]
        yield True
        self.pinned.remove(memory.nbytes)


def test_inputs_go_on_to_ram_and_from_there_to_the_drive(tmp_path):
    case = Case(tied=True, dtype=BF16, counts=(2, 2), overrides={"num_hidden_layers": 9})
    per_block = -(-per_block_nbytes(case) // 4096) * 4096
    budget = ActivationBudget(2 * per_block, [tmp_path / "inputs"], transfer_nbytes=4096)
    make_store(tmp_path / "store", case)
    device = Pinning(5)
    how = {"device": device, "vram": plan(case, slots=3), "activations": budget}
    with opened(tmp_path / "store", case, **how) as model:
        train(model, case, stop=1)
        assert (model.saved.plan.in_ram, model.saved.plan.on_drive) == (2, 4)
        assert device.pinned == 2 * [per_block], "both slots in RAM"
        before = model.saved.io_bytes()
        losses = train(model, case)
        moved = 4 * per_block
        assert model.saved.io_bytes() == (before[0] + moved, before[1] + moved)
        planes = all_planes(model.state)
    assert device.pinned == []
    expected = in_memory(case)
    assert losses == expected.losses
    assert differing(planes, expected_planes(expected)) == []


@pytest.mark.slow
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_what_is_allocated_on_a_device_is_what_was_planned(tmp_path, tied):
    case = Case(tied=tied, dtype=BF16, counts=(2, 2), overrides={"num_hidden_layers": 6})
    whole = plan(case)
    partition = partitioned(case)
    layout = ModelLayout.build(model_parts(partition), len(partition.blocks), FORMATS[case.dtype])
    needs = {"context": 0, "compute": 0, "activations_per_block": per_block_nbytes(case)}
    least = least_vram(layout, tied_embeddings=tied, **needs)
    for vram in (whole.total, whole.total - 1, whole.total - 3 * per_block_nbytes(case), least):
        made = plan(case, vram=vram)
        assert made.total <= vram
        device = SimulatedDevice(nbytes=vram)
        folder = tmp_path / str(vram)
        folder.mkdir()
        check(folder / "store", case, device, vram=made)
        assert device.accounts.peak_nbytes == made.allocated


@pytest.mark.slow
@pytest.mark.parametrize("resident_share", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("policy", ["immediate", "deferred", "speculative"])
@pytest.mark.parametrize("buffers", ["any", "pieces", "pieces, tied"])
def test_little_memory_for_gradients_serves_all_records(
    tmp_path, monkeypatch, buffers, policy, resident_share
):
    """One buffer for all, or pieces of those that gather in RAM."""
    tied = buffers == "pieces, tied"
    case = Case(tied=tied, dtype=BF16, counts=(2, 1, 2), overrides={"num_hidden_layers": 4})
    count = 0 if buffers == "any" else None
    made = plan(case, block_weights=1, block_gradients=count, slots=2)
    how = {"vram": made, "resident_share": resident_share, "small_pool": tied}
    if policy != "immediate":
        how |= {"max_grad_norm": 1e9, "policy": policy, "kept_in_ram": 0.5}
    make_store(tmp_path / "store", case)
    with opened(tmp_path / "store", case, device=SimulatedDevice(6, delay=0.001), **how) as model:
        train(model, case, stop=1)
        # With the head's gradient on its way, and the buffer gone.
        backward = Step.backward
        monkeypatch.setattr(Step, "backward", lambda _: (_ for _ in ()).throw(KeyError("broken")))
        with pytest.raises(KeyError, match="broken"):
            train(model, case, stop=2)
        monkeypatch.setattr(Step, "backward", backward)
        model.evaluate([to_micro_batch(case.steps[0][0])])
        losses = train(model, case)
        model.flush()
        planes = all_planes(model.state)
    expected = in_memory(case)
    assert losses == expected.losses
    assert differing(planes, expected_planes(expected)) == []


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_the_least_vram_that_is_named_is_enough_and_one_byte_less_is_not(tied):
    case = Case(tied=tied, dtype=BF16, counts=(2, 2), overrides={"num_hidden_layers": 6})
    partition = partitioned(case)
    layout = ModelLayout.build(model_parts(partition), len(partition.blocks), FORMATS[case.dtype])
    needs = {"context": 600 * MIB, "compute": 5 * MIB, "activations_per_block": MIB, "tied_embeddings": tied}
    least = least_vram(layout, **needs)
    assert divide_vram(layout, vram=least, **needs).total == least
    with pytest.raises(DoesNotFitError, match=r"needs \d+ MiB at least: weights of one block"):
        divide_vram(layout, vram=least - 1, **needs)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_generating_on_a_device_gives_the_tokens_of_the_cpu(tmp_path, tied):
    case = Case(tied=tied, counts=(1,))
    make_store(tmp_path / "store", case)
    prompt, found = torch.tensor([[5, 7, 11]]), []
    for device in (Cpu(), SimulatedDevice(2)):
        with opened(tmp_path / "store", case, device=device) as model:
            tokens = next_tokens(model, prompt, Pick(), frozenset())
            found.append([next(tokens) for _ in range(8)])
            tokens.close()
            # An evaluation finds everything given back.
            found.append(model.evaluate([to_micro_batch(case.steps[0][0])]).loss)
    assert found[:2] == found[2:]


@pytest.mark.slow
@pytest.mark.parametrize("gathers", [False, True], ids=["on the device", "gathering"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("when", ["forward", "backward", "loss", "gradient"])
def test_a_step_that_fails_leaves_nothing_behind(tmp_path, monkeypatch, when, tied, gathers):
    """Also where the error is kept, and with it the step's gradients."""
    case = Case(tied=tied, dtype=BF16, counts=(2, 2), overrides={"num_hidden_layers": 4})
    make_store(tmp_path / "store", case)
    how = {"vram": plan(case, **(GATHERED if gathers else LEAST)), "small_pool": gathers}
    with opened(tmp_path / "store", case, device=SimulatedDevice(4), **how) as model:
        run, loss, calls = model.partition.run_block, model.partition.loss, Counter()

        def broken(index, parameters, hidden, call):
            calls[when] += 1
            if (when, calls[when]) in {("forward", 3), ("backward", 11)}:
                raise KeyError("broken")
            out = run(index, parameters, hidden, call)
            return out * float("nan") if (when, calls[when]) == ("gradient", 12) else out

        def diverged(*args):
            return loss(*args) * (float("nan") if when == "loss" else 1.0)

        monkeypatch.setattr(model.partition, "run_block", broken)
        monkeypatch.setattr(model.partition, "loss", diverged)
        errors = {"loss": TrainingDivergedError, "gradient": NotFiniteError}
        with pytest.raises(errors.get(when, KeyError)) as kept:
            model.train_step([*map(to_micro_batch, case.steps[0])], AdamWStep(1, 1e-3), lambda _: b"never")
        monkeypatch.undo()
        losses = train(model, case)
        planes = all_planes(model.state)
    assert kept.value.__traceback__ is not None
    expected = in_memory(case)
    assert losses == expected.losses
    assert differing(planes, expected_planes(expected)) == []


class Counting(SimulatedDevice):
    """Knows how much of which dtype was copied."""

    copied = 0

    def copy_in(self, to, content):
        self.copied += to.nbytes * (to.dtype == FP32)
        super().copy_in(to, content)

    def copy_out(self, to, content):
        self.copied += to.nbytes * (to.dtype == FP32)
        super().copy_out(to, content)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_what_gathering_moves_over_the_bus_is_known(tmp_path, monkeypatch, tied):
    case = Case(tied=tied, dtype=BF16, counts=(3,), overrides={"num_hidden_layers": 3})
    # Some slices of tokens for each micro-batch.
    monkeypatch.setattr(memory_needs, "LOGITS_BYTES", 10 * 4 * case.config.vocab_size)
    make_store(tmp_path / "store", case)
    device = Counting(2)
    with opened(tmp_path / "store", case, device=device, vram=plan(case, **GATHERED)) as model:
        model.slice_tokens = 10
        batches = [*map(to_micro_batch, case.steps[0])]
        expected = gathered_nbytes(model.partition, model.state.layout, batches)
        train(model, case)
    assert device.copied == expected


def test_memory_that_runs_out_in_a_step_is_one_error_and_the_step_is_dropped(tmp_path, monkeypatch):
    case = Case(dtype=BF16, counts=(2, 2))
    make_store(tmp_path / "store", case)
    with opened(tmp_path / "store", case, device=SimulatedDevice(nbytes=100 * MIB)) as model:

        def full(*_):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

        monkeypatch.setattr(model.partition, "loss", full)
        with pytest.raises(
            DoesNotFitError, match=r"ran out of memory: training may take 100 MiB, .* allocate 2.00 GiB"
        ):
            model.train_step([*map(to_micro_batch, case.steps[0])], AdamWStep(1, 1e-3), lambda _: b"never")
        monkeypatch.undo()
        monkeypatch.setattr(MicroBatch, "to", full)
        with pytest.raises(DoesNotFitError, match="ran out of memory"):
            model.evaluate([to_micro_batch(case.steps[0][0])])
        monkeypatch.undo()
        assert train(model, case) == in_memory(case).losses


def test_copies_and_compute_are_in_the_trace(tmp_path):
    case = Case(dtype=BF16, counts=(1,))
    make_store(tmp_path / "store", case)
    with opened(tmp_path / "store", case, device=SimulatedDevice(4)) as model:
        model.record_device_events()
        train(model, case)
        events = model.take_device_events()
        layout = model.state.layout
    by_lane = Counter(lane for lane, *_ in events)
    loads = 2 * len(layout.chunks) - len(layout.chunks_of(layout.block(layout.blocks - 1)))
    loads -= len(layout.chunks_of(layout.head))
    assert by_lane["copy in"] == loads
    assert by_lane["copy out"] == len(layout.chunks)
    assert by_lane["device, block"] == 2 * layout.blocks - 1
    assert by_lane["device, outer"] == 3
    assert all(start <= end for _, _, _, start, end in events)
