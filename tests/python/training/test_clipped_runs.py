"""Runs with max_grad_norm: what is committed at any end, and that they go on with the same bits."""

import pytest

from megatrain_io.errors import InterruptedRunError
from megatrain_io.paging.step import Step
from paged import differing
from runs import STEPS, blob_of, configured, metrics_of, planes_of, start

pytestmark = pytest.mark.slow

LIMIT = 1.0
MODES = [{}, {"memory": {"commit_every": 2}}, {"memory": {"ram": "1GiB"}}, {"eval_steps": 2}]


@pytest.fixture(scope="module")
def clipped(source, tmp_path_factory):
    """Planes and metrics of a run that was never stopped; some of its steps are clipped, others are not."""
    run = tmp_path_factory.mktemp("clipped") / "run"
    start(configured(source, run, max_grad_norm=LIMIT))
    return planes_of(run), metrics_of(run)


def check(run, clipped):
    assert differing(planes_of(run), clipped[0]) == []
    for name in ("loss", "grad_norm", "clip_coefficient"):
        assert [line[name] for line in metrics_of(run)] == [line[name] for line in clipped[1]]


def test_some_steps_are_clipped_and_it_is_told(clipped):
    coefficients = [line["clip_coefficient"] for line in clipped[1]]
    assert len(coefficients) == STEPS
    assert min(coefficients) < 1.0
    for line in clipped[1]:
        assert (line["grad_norm"] > LIMIT) == (line["clip_coefficient"] < 1.0)


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_no_mode_changes_a_bit(source, tmp_path, clipped, mode):
    start(configured(source, tmp_path / "run", max_grad_norm=LIMIT, **mode))
    check(tmp_path / "run", clipped)
    assert sorted(path.name for path in (tmp_path / "run").glob("store*")) == ["store.mtio"]


@pytest.mark.parametrize("mode", MODES[:3], ids=str)
@pytest.mark.parametrize("stop", [1, 3])
def test_what_waits_when_a_run_is_stopped_is_applied_first(source, tmp_path, clipped, mode, stop):
    config = configured(source, tmp_path / "run", max_grad_norm=LIMIT, **mode)
    with pytest.raises(InterruptedRunError):
        start(config, stop=stop)
    assert blob_of(config.output_dir)["step"] == stop
    start(config, resume=True)
    check(config.output_dir, clipped)


@pytest.mark.parametrize("phase", ["embedding", "forward", "head", "backward", "embedding_backward"])
def test_a_step_that_is_dropped_takes_none_before_it_along(source, tmp_path, clipped, monkeypatch, phase):
    config = configured(source, tmp_path / "run", max_grad_norm=LIMIT)
    done = getattr(Step, phase)

    def interrupted(step, **how):
        if step._number == 3 and phase != "forward":
            raise KeyboardInterrupt
        out = done(step, **how)
        if step._number == 3:
            raise KeyboardInterrupt
        return out

    with monkeypatch.context() as patch:
        patch.setattr(Step, phase, interrupted)
        with pytest.raises(InterruptedRunError, match="step 2 "):
            start(config)
    assert blob_of(config.output_dir)["step"] == 2
    start(config, resume=True)
    check(config.output_dir, clipped)
