"""A step through frozen weights has the bits of stock autograd, reads weights alone, and changes nothing."""

from functools import partial

import pytest
import torch

from megatrain_io.errors import MegatrainIoError
from megatrain_io.paging.activations import ActivationBudget
from megatrain_io.paging.device.pool import CONTEXT_NBYTES
from megatrain_io.paging.device.simulated import SimulatedDevice
from megatrain_io.planning.dry_run import dry_run
from megatrain_io.planning.memory_needs import plan_ram, plan_vram, step_needs
from megatrain_io.store.paged_store import AdamWStep
from megatrain_io.store.schedule import traffic
from paged import DEVICE, Case, make_store, opened, to_micro_batch

FP32, BF16 = torch.float32, torch.bfloat16
MIB = 1 << 20


def stock(case):
    """Loss of one step, and its gradients with respect to the embedded tokens, by autograd over a frozen model."""
    model = case.model.requires_grad_(False)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(case.dtype)  # buffers (rotary frequencies) stay in fp32
    (step,) = case.steps
    num_items = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in step)
    total, gradients = None, []
    for batch in step:
        embedded = model.get_input_embeddings()(batch["input_ids"]).detach().requires_grad_()
        out = model(
            inputs_embeds=embedded, labels=batch["labels"], num_items_in_batch=num_items, use_cache=False
        )
        gradients += torch.autograd.grad(out.loss, embedded)
        total = out.loss.detach() if total is None else total + out.loss.detach()
    return total.item(), gradients


def check(case, path, passes=2, **how):
    expected_loss, expected = stock(case)
    batches = [to_micro_batch(batch) for batch in case.steps[0]]
    with opened(path, case, **how) as model:
        state, moved = model.state, []
        for _ in range(passes):
            before = state.io_bytes()
            loss, gradients = model.pass_gradients(batches)
            moved.append(tuple(now - then for now, then in zip(state.io_bytes(), before, strict=True)))
            assert loss.loss == expected_loss
            assert loss.grad_norm is None
            assert len(gradients) == len(expected)
            assert all(map(torch.equal, (each.cpu() for each in gradients), expected))
        assert state.generation == 1
        assert moved[-1] == traffic(model.training_schedule, state.layout, state.residents)
        assert moved[-1][1] == 0
        return model, moved[-1][0]


@pytest.mark.slow
@pytest.mark.parametrize("micro_batches", [1, 3])
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_a_step_equals_stock_autograd(tmp_path, family, tied, dtype, micro_batches):
    case = Case(family, tied, dtype, (micro_batches,), is_frozen=True)
    make_store(tmp_path / "store", case, 4096)
    check(case, tmp_path / "store")


@pytest.mark.parametrize(
    "how",
    [
        {"small_pool": True},
        {"resident_share": 0.5},
        {"resident_share": 1.0},
        {"activations": 1},
        {"engine": "threads"},
        {"device": partial(SimulatedDevice, 3)},
        {"device": partial(SimulatedDevice, 4), "resident_share": 0.5, "small_pool": True},
    ],
    ids=str,
)
def test_how_bytes_move_changes_no_bit(tmp_path, how):
    how = dict(how)
    if "activations" in how:
        how["activations"] = ActivationBudget(2 << 20, [tmp_path / "inputs"])
    if "device" in how:
        how["device"] = how["device"]()
    case = Case(dtype=BF16, counts=(3,), is_frozen=True)
    make_store(tmp_path / "store", case, 4096)
    check(case, tmp_path / "store", **how)


def test_weights_are_read_once_or_twice_and_nothing_else(tmp_path):
    case = Case(dtype=BF16, counts=(1,), is_frozen=True)
    make_store(tmp_path / "store", case, 4096)
    model, read = check(case, tmp_path / "store")
    layout = model.state.layout
    # Embeddings, last block and head once, the other blocks twice.
    once = [
        layout.stops[stop][0] for stop in (layout.embedding, layout.block(layout.blocks - 1), layout.head)
    ]
    sizes = map(layout.record_weight_bytes, range(len(layout.records)))
    assert read == sum(nbytes * (1 if record in once else 2) for record, nbytes in enumerate(sizes))


def test_frozen_weights_are_not_trained_nor_trained_ones_passed_through(tmp_path):
    batches = [to_micro_batch(batch) for batch in Case(counts=(1,)).steps[0]]
    frozen, trained = Case(counts=(1,), is_frozen=True), Case(counts=(1,))
    make_store(tmp_path / "frozen", frozen)
    make_store(tmp_path / "trained", trained)
    with opened(tmp_path / "frozen", frozen) as model:
        with pytest.raises(MegatrainIoError, match="nothing to update"):
            model.train_step(batches, AdamWStep(1, 1e-3), lambda _loss: b"")
        assert model.pass_gradients(batches)[0].loss == model.evaluate(batches).loss
    with opened(tmp_path / "trained", trained) as model:
        with pytest.raises(MegatrainIoError, match="makes their gradients, too"):
            model.pass_gradients(batches)
        model.train_step(batches, AdamWStep(1, 1e-3), lambda _loss: b"")


@pytest.mark.skipif(DEVICE != "cpu", reason="measures the RAM of compute")
@pytest.mark.parametrize("micro_batches", [1, 3])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_a_dry_run_needs_what_a_real_one_does(tmp_path, tied, micro_batches):
    sizes = {"hidden_size": 256, "intermediate_size": 688, "vocab_size": 2053, "head_dim": 64}
    case = Case(tied=tied, dtype=BF16, counts=(micro_batches,), overrides=sizes, is_frozen=True)
    make_store(tmp_path / "store", case)
    batches = [to_micro_batch(batch) for batch in case.steps[0]]
    with opened(tmp_path / "store", case) as model:
        expected = dry_run(model.partition, model.state.layout, batches, slice_tokens=model.slice_tokens)
        model.pass_gradients(batches)
        measured = model.state.ledger.balances()["compute"][1]
    assert expected == pytest.approx(measured, rel=0.01)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_it_keeps_within_ram_and_vram_that_have_no_room_for_gradients(tmp_path, tied):
    case = Case(tied=tied, dtype=BF16, counts=(3,), is_frozen=True)
    make_store(tmp_path / "store", case, 4096)
    batches = [to_micro_batch(batch) for batch in case.steps[0]]
    with opened(tmp_path / "store", case) as model:
        needs = step_needs(model.partition, model.state.layout, batches, model.state.ledger.total()[0])
        plan, left = plan_vram(model.partition, model.state.layout, needs, vram=CONTEXT_NBYTES + 66 * MIB)
        ram = plan_ram(model.partition, model.state.layout, left, ram=2 * MIB)
    assert not plan.pool.gradients
    assert [count for _, count in ram.pool.slots if count] == [kind.count for kind in ram.pool.weights]
    assert not ram.residents.chunks
    device = SimulatedDevice(1, nbytes=plan.vram)
    check(case, tmp_path / "store", device=device, vram=plan)
    assert device.accounts.peak_nbytes == plan.allocated
