"""Plan and measurement are compared by the totals of the run, in all its starts."""

import json
from dataclasses import fields
from types import SimpleNamespace

import pytest

from megatrain_io.errors import InterruptedRunError
from megatrain_io.runs.metrics import StepReport
from megatrain_io.text import rows
from megatrain_io.training.plan_check import PlanCheck, Totals
from runs import blob_of, configured, start

PLAN = SimpleNamespace(
    time=SimpleNamespace(seconds=2.0),
    read_bytes=10,
    written_bytes=20,
    committing_bytes=20,
    ledger_bytes=None,
    process_bytes=None,
    updates_wait=False,
)


def report(step, read, written, seconds=2.0):
    others = dict.fromkeys((each.name for each in fields(StepReport)), 0)
    given = {
        "step": step,
        "max_steps": 1000,
        "read_bytes": read,
        "written_bytes": written,
        "seconds": seconds,
    }
    return StepReport(**(others | given))


def test_what_is_written_late_is_counted_to_the_run():
    """After three steps the last one alone was compared: "ratio 1.93", where the total was right to 0.1 %."""
    check = PlanCheck(PLAN, commit_every=1)
    for step, (read, written) in enumerate([(2, 1), (10, 20), (10, 38)], start=1):
        check.add(report(step, read, written))
    check.add_written(1)
    found = check.compared(0, 0)
    assert found["read_bytes_per_step"] == {"planned": 10, "measured": 10, "ratio": 1}
    assert found["written_bytes_per_step"] == {"planned": 20, "measured": 20, "ratio": 1}
    assert found["seconds_per_step"]["ratio"] == 1


def test_the_starts_before_are_part_of_the_run():
    first = PlanCheck(PLAN, commit_every=1)
    for step in range(1, 4):
        first.add(report(step, 10, 20))
    # The plan of the next start is another: it keeps nothing in RAM.
    plan = SimpleNamespace(**{**vars(PLAN), "read_bytes": 30, "written_bytes": 40})
    second = PlanCheck(plan, 1, Totals.of(json.loads(json.dumps(first.recorded()))))
    for step in range(4, 6):
        second.add(report(step, 30, 40))
    found = second.compared(0, 0)
    assert found["read_bytes_per_step"]["ratio"] == found["written_bytes_per_step"]["ratio"] == 1
    assert found["written_bytes_per_step"]["measured"] == (3 * 20 + 2 * 40) / 5


def test_commits_of_a_short_run_are_counted_as_they_are():
    """Three steps of a hundred to a commit: the last one commits what all three changed in RAM."""
    plan = SimpleNamespace(**{**vars(PLAN), "written_bytes": 1, "committing_bytes": 100})
    check = PlanCheck(plan, commit_every=100)
    for step in (998, 999, 1000):
        check.add(report(step, 10, 100 * (step == 1000)))
    assert check.compared(0, 0)["written_bytes_per_step"]["ratio"] == 1


def test_a_run_that_was_resumed_is_compared_as_a_whole(source, tmp_path):
    # So many steps that a chunk which one of them reads late, with the next one's, does not count.
    config = configured(source, tmp_path / "run", num_train_epochs=10)
    with pytest.raises(InterruptedRunError):
        start(config, stop=3)
    assert blob_of(config.output_dir)["compared"]["steps"] == 2, "the third was being committed"
    plan = start(config, resume=True)[0].plan
    assert plan["read_bytes_per_step"]["ratio"] == pytest.approx(1, abs=0.02)
    assert plan["written_bytes_per_step"]["planned"] > 10**6
    text = "\n".join(rows({"plan": plan}))
    assert "e+" not in text
    assert " planned, " in text


def test_figures_are_for_a_person():
    compared = {"planned": 39108608.0, "measured": 39108700, "ratio": 1.0000023}
    lines = [
        *rows(
            {"plan": {"written_bytes_per_step": compared, "seconds_per_step": compared | {"measured": 2.25}}}
        )
    ]
    assert lines == [
        "plan",
        "  written bytes per step  39.1 MB planned, 39.1 MB measured: ratio 1.00",
        "  seconds per step        39,108,608 planned, 2.25 measured: ratio 1.00",
    ]
    assert next(rows({"read_bytes_per_parameter_and_step": 14.25})).endswith("  14.25")
