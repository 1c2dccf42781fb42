"""When a run has written enough."""

import pytest

from megatrain_io.errors import WearLimitError
from megatrain_io.training.wear import WearLimit


@pytest.mark.parametrize(("written", "is_near"), [(0, False), (880, False), (881, True), (2000, True)])
def test_a_limit_is_near_when_four_steps_might_reach_it(written, is_near):
    assert WearLimit(30, max_tbw=1000e-12).is_near(written) is is_near
    assert not WearLimit(30, max_tbw=None).is_near(written)


def test_a_step_that_may_write_more_than_is_left_is_refused():
    limit = WearLimit(30, max_tbw=1000e-12)
    limit.check(970, step=7)
    with pytest.raises(WearLimitError, match="Step 7 is committed"):
        limit.check(971, step=7)


class Watched:
    """A run at a step, and what the limit asked of it."""

    def __init__(self, written_bytes, step=7):
        self.written_bytes, self.step, self.max_steps, self.asked = written_bytes, step, 10, []

    def commit_next(self):
        self.asked.append("commit")

    def wait_durable(self):
        self.asked.append("wait")


def test_near_the_limit_each_step_is_committed_and_counted_before_the_next():
    limit = WearLimit(30, max_tbw=1000e-12)
    for written, asked in ((880, []), (881, ["commit", "wait"])):
        for tell in (
            limit.on_start,
            lambda run: limit.on_step(run, None),
            lambda run: limit.on_skip(run, 8, ""),
        ):
            run = Watched(written)
            tell(run)
            assert run.asked == asked
    with pytest.raises(WearLimitError, match="Step 7 is committed"):
        limit.on_step(Watched(971), None)
    limit.on_step(Watched(971, step=10), None)  # nothing comes after the last one
