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
