"""What a run keeps of its steps, to compare them with its plan; and when it has written enough."""

from dataclasses import fields
from types import SimpleNamespace

import pytest

from megatrain_io.errors import WearLimitError
from megatrain_io.runs.metrics import StepReport
from megatrain_io.training.wear import Tally

PLAN = SimpleNamespace(
    time=None,
    read_bytes=10,
    written_bytes=20,
    committing_bytes=30,
    ledger_bytes=None,
    process_bytes=None,
    updates_wait=False,
)


def report(read, written):
    others = dict.fromkeys((each.name for each in fields(StepReport)), 0)
    return StepReport(**(others | {"read_bytes": read, "written_bytes": written}))


def test_a_long_run_is_compared_by_its_last_steps():
    tally = Tally(PLAN, commit_every=4, max_tbw=None)
    for _ in range(2000):
        tally.add(report(read=1, written=1))
    for step in range(2000):
        tally.add(report(read=10, written=80 * (step % 4 == 3)))
    found = tally.compared(0, 0)
    assert found["read_bytes_per_step"] == {"planned": 10, "measured": 10, "ratio": 1}
    assert found["written_bytes_per_step"] == {"planned": 20, "measured": 20, "ratio": 1}


@pytest.mark.parametrize(("written", "is_near"), [(0, False), (880, False), (881, True), (2000, True)])
def test_a_limit_is_near_when_four_steps_might_reach_it(written, is_near):
    assert Tally(PLAN, commit_every=1, max_tbw=1000e-12).is_near(written) is is_near
    assert not Tally(PLAN, commit_every=1, max_tbw=None).is_near(written)


def test_a_step_that_may_write_more_than_is_left_is_refused():
    tally = Tally(PLAN, commit_every=1, max_tbw=1000e-12)
    tally.check(970, step=7)
    with pytest.raises(WearLimitError, match="Step 7 is committed"):
        tally.check(971, step=7)
