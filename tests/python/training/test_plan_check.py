"""What a run keeps of its steps, to compare them with its plan."""

from dataclasses import fields
from types import SimpleNamespace

from megatrain_io.runs.metrics import StepReport
from megatrain_io.training.plan_check import PlanCheck

PLAN = SimpleNamespace(
    time=None,
    read_bytes=10,
    written_bytes=20,
    ledger_bytes=None,
    process_bytes=None,
    updates_wait=False,
)


def report(read, written):
    others = dict.fromkeys((each.name for each in fields(StepReport)), 0)
    return StepReport(**(others | {"read_bytes": read, "written_bytes": written}))


def test_a_long_run_is_compared_by_its_last_steps():
    check = PlanCheck(PLAN, commit_every=4)
    for _ in range(2000):
        check.add(report(read=1, written=1))
    for step in range(2000):
        check.add(report(read=10, written=80 * (step % 4 == 3)))
    found = check.compared(0, 0)
    assert found["read_bytes_per_step"] == {"planned": 10, "measured": 10, "ratio": 1}
    assert found["written_bytes_per_step"] == {"planned": 20, "measured": 20, "ratio": 1}
