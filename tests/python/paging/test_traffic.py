"""Bytes per parameter and step by the kernel's own counters, in the steady state."""

from pathlib import Path

import pytest
import torch

from megatrain_io.planning.residents import resident_nbytes
from megatrain_io.store.schedule import Residents, build_schedule, flush_schedule, traffic
from paged import Case, kept_part, make_store, opened, resident_part, train

SIZES = {
    "hidden_size": 256,
    "intermediate_size": 688,
    "vocab_size": 2053,
    "num_hidden_layers": 6,
    "head_dim": 64,
}
MEASURED_STEPS = 3


def kernel_counters() -> tuple[int, int]:
    """Bytes that this process made the drives read and write."""
    lines = Path("/proc/self/io").read_text(encoding="ascii").splitlines()
    fields = dict(line.split(": ") for line in lines)
    return int(fields["read_bytes"]), int(fields["write_bytes"])


def measured(model, case, commit_every: int = 1) -> tuple[float, float]:
    """Bytes read and written by a step, after two that are not counted."""
    if not model.state.is_direct:
        pytest.skip("the file system of the temporary folder has no direct I/O: the kernel does not count")
    train(model, case, stop=2)
    before = kernel_counters()
    train(model, case, commit_every=commit_every)
    after = kernel_counters()
    read, written = ((b - a) / MEASURED_STEPS for a, b in zip(before, after, strict=True))
    return read, written


@pytest.mark.slow
@pytest.mark.parametrize("micro_batches", [1, 4])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def test_bytes_per_parameter_and_step(tmp_path, dtype, tied, micro_batches):
    case = Case(tied=tied, dtype=dtype, counts=(micro_batches,) * (2 + MEASURED_STEPS), overrides=SIZES)
    make_store(tmp_path / "store", case)
    with opened(tmp_path / "store", case) as model:
        read, written = measured(model, case)
        layout = model.state.layout
        parameters = layout.parameters
        shared = layout.records[layout.stops[layout.embedding][0]].parameters if tied else 0
        predicted_read, predicted_written = traffic(model.training_schedule, layout)

    read_limit = {torch.bfloat16: 14, torch.float32: 16}[dtype] * parameters
    read_limit += dtype.itemsize * shared
    assert read <= 1.01 * read_limit
    assert written <= 1.01 * 12 * parameters
    # What the schedule says is what the kernel saw; metadata of the commit is what is left.
    assert predicted_read <= read <= 1.01 * predicted_read
    assert predicted_written <= written <= 1.01 * predicted_written


@pytest.mark.slow
@pytest.mark.parametrize("share", [0.05, 0.3, 1.0])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def test_what_stays_in_ram_moves_as_the_formulas_say(tmp_path, dtype, tied, share):
    case = Case(tied=tied, dtype=dtype, counts=(1,) * (2 + MEASURED_STEPS), overrides=SIZES)
    make_store(tmp_path / "store", case, chunk_parameters=1 << 16)
    with opened(tmp_path / "store", case, resident_share=share) as model:
        # Steps 3 to 5, of which the last one is committed.
        read, written = measured(model, case, commit_every=MEASURED_STEPS + 2)
        layout, schedule = model.state.layout, model.training_schedule
        residents = resident_part(model, share)
        between = traffic(schedule, layout, residents, commits=False)
        commit = traffic(schedule, layout, residents)
    stays = resident_nbytes(residents, layout)
    table = 1 << 20
    expected = ((MEASURED_STEPS - 1) * between[1] + commit[1]) / MEASURED_STEPS
    assert between[0] == commit[0]
    assert commit[0] <= read <= 1.01 * commit[0] + table
    assert expected <= written <= 1.01 * expected + table
    # W = 12 P - C (1 - 1 / K), whatever stays.
    everything = traffic(schedule, layout)
    assert expected == pytest.approx(everything[1] - stays * (1 - 1 / MEASURED_STEPS), rel=1e-12)
    if share == 1.0:
        assert commit[0] == 0
        assert between == (0, 0)


@pytest.mark.parametrize(
    ("policy", "limit"), [("deferred", 1e9), ("speculative", 1e9), ("speculative", 1e-9)]
)
@pytest.mark.parametrize("kept_in_ram", [1.0, 0.0], ids=["in RAM", "on the drive"])
def test_gradients_that_wait_cost_what_the_schedule_says(tmp_path, kept_in_ram, policy, limit):
    case = Case(dtype=torch.bfloat16, counts=(1,) * (2 + MEASURED_STEPS), overrides=SIZES)
    make_store(tmp_path / "store", case)
    how = {"max_grad_norm": limit, "policy": policy, "kept_in_ram": kept_in_ram}
    with opened(tmp_path / "store", case, **how) as model:
        read, written = measured(model, case)
        layout, parameters = model.state.layout, model.state.layout.parameters
        residents = Residents(gradients=kept_part(model, kept_in_ram))
    waits = policy == "deferred" or limit < 1

    def step(applies):
        schedule = build_schedule(
            layout, tied_embeddings=False, training=True, applies=applies, policy=policy
        )
        return traffic(schedule, layout, residents)

    # What was measured begins without gradients that wait, and ends with a flush.
    parts = [step(False), *[step(waits)] * (MEASURED_STEPS - 1)]
    parts += [traffic(flush_schedule(layout), layout, residents)] * waits
    predicted_read, predicted_written = (sum(part) / MEASURED_STEPS for part in zip(*parts, strict=True))
    assert predicted_read <= read <= 1.01 * predicted_read
    assert predicted_written <= written <= 1.01 * predicted_written
    spilled = 4 if kept_in_ram < 1 else 0
    limits = {
        ("deferred", 1e9): (14 + spilled, 12 + spilled),
        ("speculative", 1e9): (14, 12 + spilled),
        ("speculative", 1e-9): (24 + spilled, 24 + spilled),
    }[policy, limit]
    assert 0.9 * limits[0] * parameters < step(waits)[0] <= 1.01 * limits[0] * parameters
    assert 0.99 * limits[1] * parameters < step(waits)[1] <= 1.01 * limits[1] * parameters
