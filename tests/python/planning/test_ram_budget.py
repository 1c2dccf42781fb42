"""A budget of RAM is divided to the byte, or refused with what would do."""

import pytest
import torch

from megatrain_io.errors import ConfigError
from megatrain_io.paging.paged_model import PagedPartition
from megatrain_io.planning.memory_needs import activation_budget_of, plan_ram, step_needs
from megatrain_io.planning.ram_budget import StepNeeds, divide_ram, least_ram
from megatrain_io.planning.residents import resident_nbytes
from megatrain_io.store.layout import ModelLayout
from megatrain_io.store.paged_store import AdamWStep, PagedStore, TensorSettings, store_memory
from megatrain_io.store.schedule import build_schedule
from paged import (
    Case,
    all_planes,
    differing,
    expected_planes,
    files,
    make_store,
    partitioned,
    to_micro_batch,
    train,
)
from reference.reference import train as train_in_memory

# Matrix products in bf16 are slow on many processors, so there are many bytes to divide and few products: a wide
# model of short rows, and a deep one with so many inputs of blocks that they are worth spilling.
WIDE = {
    "hidden_size": 512,
    "intermediate_size": 1376,
    "vocab_size": 1031,
    "num_hidden_layers": 6,
    "head_dim": 64,
}
DEEP = {"num_hidden_layers": 12}
MIB = 1 << 20


@pytest.mark.slow
@pytest.mark.parametrize("clips", [False, True], ids=["free", "clipped"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 1.0])
def test_the_ledger_stays_within_the_budget_and_uses_it(tmp_path, share, tied, clips):
    rows = {"overrides": DEEP, "rows": 32} if share == 0.0 else {"overrides": WIDE}
    case = Case(tied=tied, dtype=torch.bfloat16, counts=(2,), **rows)
    make_store(tmp_path / "store", case)
    with PagedStore(*files(tmp_path / "store")) as state:
        partition, layout, tables = partitioned(case), state.layout, state.ledger.total()[0]
        batches = [to_micro_batch(batch) for batch in case.steps[0]]
        tied = bool(partition.tied_parameters)
        assert tables == store_memory(layout.manifest({}))
        needs = step_needs(partition, layout, batches, tables)
        least = least_ram(layout, needs, tied_embeddings=tied, defers=clips)
        everything = (16 if clips else 12) * layout.parameters + needs.activations
        ram = int(least + share * everything)
        plan = plan_ram(partition, layout, needs, ram=ram, defers=clips)
        model = PagedPartition(
            partition,
            state,
            activations=activation_budget_of(plan, [tmp_path / "inputs"]),
            max_grad_norm=1.0 if clips else None,
        )
        gradient_files = [file.with_name(f"{file.name}.g") for file in files(tmp_path / "store")]
        model.state.start(
            plan.pool,
            residents=plan.residents,
            gradient_files=gradient_files if plan.spills_gradients else (),
            settings=lambda _place: TensorSettings(0.0),
        )
        for step in (1, 2):
            model.train_step(batches, AdamWStep(step, 1e-3), (lambda _loss: b"x") if step == 2 else None)
        model.wait_durable()
        peak = model.state.ledger.total()[1]
        model.close()
    assert plan.is_spilled == (share == 0.0)
    assert plan.total <= ram
    # Pages are rounded up here and there, and the scratch file has tables of its own.
    assert peak <= 1.003 * ram
    assert peak >= 0.97 * (plan.total - needs.heap)
    assert plan.resident_nbytes >= resident_nbytes(plan.residents, layout)
    assert plan.spills_gradients == (clips and len(plan.residents.gradients) < len(layout.records))
    assert plan.spills_gradients == (clips and share < 0.5)
    if share == 1.0:
        assert plan.resident_nbytes >= 0.5 * 12 * layout.parameters


CASE = Case(tied=True, dtype=torch.bfloat16, counts=(1, 2, 1, 2), overrides=DEEP, rows=32)


@pytest.fixture(scope="module")
def expected():
    return train_in_memory(CASE.model, CASE.steps, CASE.hyperparameters, CASE.dtype)


@pytest.mark.slow
@pytest.mark.parametrize("commit_every", [1, 3])
@pytest.mark.parametrize("share", [0.0, 0.2, 1.0])
def test_no_budget_changes_a_bit(tmp_path, expected, share, commit_every):
    make_store(tmp_path / "store", CASE)
    with PagedStore(*files(tmp_path / "store")) as state:
        partition, layout, tables = partitioned(CASE), state.layout, state.ledger.total()[0]
        batches = [to_micro_batch(batch) for batch in CASE.steps[1]]
        needs = step_needs(partition, layout, batches, tables)
        least = least_ram(layout, needs, tied_embeddings=True)
        ram = int(least + share * (12 * layout.parameters + needs.activations))
        plan = plan_ram(partition, layout, needs, ram=ram)
        model = PagedPartition(
            partition, state, activations=activation_budget_of(plan, [tmp_path / "inputs"])
        )
        decay = CASE.hyperparameters.weight_decay
        state.start(
            plan.pool,
            residents=plan.residents,
            settings=lambda place: TensorSettings(decay if len(place.shape) > 1 else 0.0),
        )
        losses = train(model, CASE, commit_every=commit_every)
        planes = all_planes(state)
        model.close()
    stays = plan.resident_nbytes / (12 * layout.parameters)
    assert (plan.is_spilled, stays) == (True, 0.0) if share == 0.0 else not plan.is_spilled
    assert stays > 0.5 if share == 1.0 else stays < 0.5
    assert losses == expected.losses
    assert differing(planes, expected_planes(expected)) == []


@pytest.mark.parametrize("defers", [False, True], ids=["free", "clipped"])
@pytest.mark.parametrize(
    ("blocks", "block", "table"),
    [(6, 3_150_000, 25_700_000), (3, 12_000_000, 30_000_000), (22, 4_000_000, 6_000_000)],
)
def test_no_division_is_larger_than_the_budget(blocks, block, table, defers):
    inner = [(f"block {index}", [(f"w{index}", (block,))]) for index in range(blocks)]
    parts = [("embedding", [("table", (table,))]), *inner, ("head", [("head", (table,))])]
    layout = ModelLayout.build(parts, blocks, "bf16")
    schedule = build_schedule(layout, tied_embeddings=False, training=True)
    needs = StepNeeds(MIB, compute=MIB, activations=2 * MIB, activations_least=MIB)
    least = least_ram(layout, needs, tied_embeddings=False, defers=defers)
    for step in range(60):
        ram = least + step * 16 * layout.parameters // 55
        plan = divide_ram(layout, schedule, needs, tied_embeddings=False, ram=ram, defers=defers)
        assert plan.total <= ram, step
    assert len(plan.residents.chunks) == len(layout.chunks)


def test_too_little_is_refused_with_the_smallest_that_would_do(tmp_path):
    case = Case(dtype=torch.bfloat16, counts=(1,), overrides=WIDE)
    make_store(tmp_path / "store", case)
    with PagedStore(*files(tmp_path / "store")) as state:
        model = PagedPartition(partitioned(case), state)
        layout = model.state.layout
        needs = StepNeeds(MIB, compute=20 * MIB, activations=50 * MIB, activations_least=5 * MIB)
        least = least_ram(layout, needs, tied_embeddings=False)
        arguments = (layout, model.training_schedule, needs)
        plan = divide_ram(*arguments, tied_embeddings=False, ram=least)
        assert not plan.residents.records
        assert 5 * MIB <= plan.activations < 6 * MIB
        with pytest.raises(ConfigError, match=r"at least: activations 5\.5 MiB, compute 40\.0 MiB"):
            divide_ram(*arguments, tied_embeddings=False, ram=least - 1)
