"""A run writes no more than ``memory.max_tbw``: it pauses at a commit, and goes on with the same bits."""

import re

import pytest

from megatrain_io.errors import InterruptedRunError, WearLimitError
from runs import STEPS, blob_of, check_equals, configured, metrics_of, planes_of, start

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    ("train_keys", "memory"),
    [({}, {}), ({}, {"commit_every": 2, "ram": "8MiB"}), ({"max_grad_norm": 0.5}, {})],
    ids=["paged", "seldom", "clipped"],
)
def test_a_paused_run_goes_on_with_the_bits_of_one_that_was_not(source, tmp_path, train_keys, memory):
    whole, _ = start(configured(source, tmp_path / "whole", memory=memory, **train_keys))
    limit = 0.55 * whole.written_bytes_total / 1e12
    run = tmp_path / "run"
    config = configured(source, run, memory=memory | {"max_tbw": limit}, **train_keys)
    with pytest.raises(
        WearLimitError, match=r"^paused: this run has written .* memory\.max_tbw is "
    ) as error:
        start(config)
    assert isinstance(error.value, InterruptedRunError)
    assert error.value.exit_code == 130
    done = len(metrics_of(run))
    assert 0 < done < STEPS
    written = float(re.search(r"has written (\S+) TB", str(error.value))[1])
    assert 0.2 * limit < written <= limit
    # Nothing is begun while the limit stands.
    with pytest.raises(WearLimitError, match=f"Step {done} is committed"):
        start(config, resume=True)
    raised = configured(source, run, memory=memory, **train_keys)
    result, _ = start(raised, resume=True)
    assert result.steps == STEPS
    check_equals(run, (tmp_path / "whole", planes_of(tmp_path / "whole"), whole))


def test_a_limit_that_is_not_reached_changes_nothing(source, tmp_path, whole):
    start(configured(source, tmp_path / "run", memory={"max_tbw": 1.0}))
    check_equals(tmp_path / "run", whole)


def test_what_was_written_is_known_however_often_the_run_paused(source, tmp_path, whole):
    total, pauses = whole[2].written_bytes_total, (0.45, 0.65, 0.85)
    for number, share in enumerate(pauses):
        memory = {"max_tbw": share * total / 1e12}
        with pytest.raises(WearLimitError):
            start(configured(source, tmp_path / "run", memory=memory), resume=number > 0)
        # What was still on its way when the last step was reported is in it, too: how much that was is chance.
        last = metrics_of(tmp_path / "run")[-1]
        assert blob_of(tmp_path / "run")["written_bytes"] >= last["written_bytes_total"]
    result, _ = start(configured(source, tmp_path / "run"), resume=True)
    # A pause commits once more: table, blob and superblock.
    assert 0 <= result.written_bytes_total - total <= len(pauses) * 24 * 1024
