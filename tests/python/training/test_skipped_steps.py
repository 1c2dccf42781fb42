"""A step whose gradients are not finite is left out: nothing is updated by it, and the run goes on."""

import math

import pytest

from megatrain_io.errors import NotFiniteError, TrainingDivergedError
from megatrain_io.paging.step import Step
from megatrain_io.training.lr_schedule import learning_rate_at
from paged import differing
from runs import STEPS, blob_of, check_equals, configured, metrics_of, planes_of, start

pytestmark = pytest.mark.slow

MODES = [
    {},
    {"memory": {"commit_every": 2}},
    {"memory": {"commit_every": 3, "ram": "1GiB"}},
    {"max_grad_norm": 1e9},
    {"max_grad_norm": 1e9, "memory": {"commit_every": 2}},
]


def poison(monkeypatch, poisoned, block=1):
    """From now on a gradient of ``block`` is infinite in these steps."""
    backward = Step._block_backward

    def wrong(step, at, index, tensors, gradient):
        out = backward(step, at, index, tensors, gradient)
        if step._number in poisoned and at == block:
            (record,) = gradient._borrowed.values()
            next(iter(record.tensors.values())).view(-1)[0] = math.inf
        return out

    monkeypatch.setattr(Step, "_block_backward", wrong)


@pytest.fixture(scope="module")
def reference(source, tmp_path_factory):
    """The planes after a run that skips step 3."""
    with pytest.MonkeyPatch.context() as patch:
        poison(patch, {3})
        run = tmp_path_factory.mktemp("skipping") / "run"
        start(configured(source, run))
        return planes_of(run), metrics_of(run)


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_no_mode_changes_what_is_left_out(source, tmp_path, monkeypatch, reference, mode):
    poison(monkeypatch, {3})
    config = configured(source, tmp_path / "run", **mode)
    result, reporter = start(config)
    assert (result.steps, [report.step for report in reporter.reports][-1]) == (STEPS, STEPS)
    lines = metrics_of(config.output_dir)
    assert [line["step"] for line in lines] == [*range(1, STEPS + 1)]
    assert [line["skipped_steps"] for line in lines] == [0, 0, 1, 1, 1][:STEPS]
    assert [line["loss"] for line in lines] == [line["loss"] for line in reference[1]]
    assert differing(planes_of(config.output_dir), reference[0]) == []
    assert any("step 3 is skipped: the gradient of block 1 is not finite" in note for note in reporter.notes)


def test_the_first_step_can_be_left_out_too(source, tmp_path, monkeypatch):
    poison(monkeypatch, {1})
    result, _ = start(configured(source, tmp_path / "run"))
    assert result.eval_loss_before is not None
    assert blob_of(tmp_path / "run")["eval_loss_before"] == result.eval_loss_before
    assert metrics_of(tmp_path / "run")[-1]["skipped_steps"] == 1


def test_a_scratch_store_that_cannot_go_back_says_so(source, tmp_path, monkeypatch):
    poison(monkeypatch, {3})
    config = configured(source, tmp_path / "run", memory={"durability": "scratch"})
    with pytest.raises(NotFiniteError) as found:
        start(config)
    assert "the state is lost" in found.value.__notes__[0]
    waiting = configured(source, tmp_path / "other", memory={"durability": "scratch"}, max_grad_norm=1e9)
    assert start(waiting)[0].steps == STEPS


def test_it_counts_neither_for_the_learning_rate_nor_for_the_moments(source, reference):
    config = configured(source, source)
    rates = [line["learning_rate"] for line in reference[1]]
    expected = [learning_rate_at(config.train, step, STEPS) for step in (1, 2, 0, 3, 4)]
    assert [*rates[:2], *rates[3:]] == [*expected[:2], *expected[3:]]
    assert rates[2] == 0.0


@pytest.mark.parametrize("mode", MODES[:4], ids=str)
def test_nothing_changes_in_the_step_itself(source, tmp_path, monkeypatch, mode):
    poison(monkeypatch, {STEPS})
    config = configured(source, tmp_path / "run", **mode)
    start(config)
    short = configured(source, tmp_path / "short", **mode, max_steps=STEPS - 1, lr_scheduler_type="constant")
    whole = configured(source, tmp_path / "whole", **mode, max_steps=STEPS, lr_scheduler_type="constant")
    start(short)
    start(whole)
    assert differing(planes_of(whole.output_dir), planes_of(short.output_dir)) == []
    assert blob_of(config.output_dir)["step"] == STEPS
    assert blob_of(config.output_dir)["skipped_steps"] == 1


def test_several_in_a_row_end_the_run_and_the_cause_can_be_mended(source, tmp_path):
    config = configured(source, tmp_path / "run")
    with pytest.MonkeyPatch.context() as patch:
        poison(patch, {2, 3, 4})
        with pytest.raises(
            TrainingDivergedError, match=r"block 1 is not finite in step 4, .* the 2 steps before"
        ):
            start(config)
    assert blob_of(config.output_dir)["skipped_steps"] == 2
    start(config, resume=True)
    assert metrics_of(config.output_dir)[-1]["step"] == STEPS


def test_a_run_without_such_a_step_is_as_it_was(source, whole, tmp_path, monkeypatch):
    poison(monkeypatch, set())
    config = configured(source, tmp_path / "run")
    start(config)
    check_equals(config.output_dir, whole)
