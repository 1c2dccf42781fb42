"""A polite stop keeps everything: Ctrl-C, SIGTERM, SIGHUP and SIGUSR1, in any phase, with any ``commit_every``."""

import os
import signal
from typing import Any, NamedTuple

import pytest

from megatrain_io import interrupt
from megatrain_io.errors import InterruptedRunError
from megatrain_io.interrupt import STOP_SIGNALS
from megatrain_io.paging.paged_model import PagedPartition
from megatrain_io.paging.step import Step
from megatrain_io.planning import resolve
from megatrain_io.training import setup, step_data
from runs import STEPS, blob_of, check_equals, configured, metrics_of, start


class Phase(NamedTuple):
    """A function that is called before the first step."""

    module: Any
    name: str


PAGED, IN_RAM = {"ram": "2000KiB"}, {"ram": "1GiB"}


@pytest.fixture(autouse=True)
def _signals_are_heard():
    """A background job of a shell begins with Ctrl-C ignored, one of ``nohup`` with SIGHUP."""
    outside = (
        signal.signal(signal.SIGINT, signal.default_int_handler),
        signal.signal(signal.SIGHUP, signal.SIG_DFL),
    )
    yield
    signal.signal(signal.SIGINT, outside[0])
    signal.signal(signal.SIGHUP, outside[1])


def sending(monkeypatch, number, *, step, phase="backward", times=1):
    """The signal comes in the middle of a step."""
    done = getattr(Step, phase)

    def interrupted(self, **how):
        if self._number == step:
            for _ in range(times):
                os.kill(os.getpid(), number)
        return done(self, **how)

    monkeypatch.setattr(Step, phase, interrupted)


@pytest.mark.parametrize(
    ("number", "memory", "kept"),
    [
        (signal.SIGTERM, PAGED, 3),
        (signal.SIGINT, PAGED | {"commit_every": 100}, 3),
        (signal.SIGHUP, IN_RAM | {"commit_every": 100}, 4),  # the fourth writes what the three changed in RAM
        (signal.SIGUSR1, PAGED | {"durability": "scratch"}, 3),
    ],
    ids=str,
)
def test_the_step_ends_and_all_is_committed(source, whole, tmp_path, monkeypatch, number, memory, kept):
    """``docker stop`` lost a scratch training as a whole, and with ``commit_every: 100`` a hundred steps."""
    config = configured(source, tmp_path / "run", memory=memory)
    handlers = [signal.getsignal(each) for each in STOP_SIGNALS]
    with monkeypatch.context() as patch:
        sending(patch, number, step=3)
        with pytest.raises(InterruptedRunError, match=rf"{number.name}; step {kept} .* kept\. .*--resume"):
            start(config)
    assert [signal.getsignal(each) for each in STOP_SIGNALS] == handlers
    assert blob_of(config.output_dir)["step"] == kept
    assert [line["step"] for line in metrics_of(config.output_dir)] == [*range(1, kept + 1)]
    start(config, resume=True)
    check_equals(config.output_dir, whole)


def test_a_stop_in_the_last_step_lets_the_run_be_done(source, tmp_path, monkeypatch):
    config = configured(source, tmp_path / "run")
    sending(monkeypatch, signal.SIGTERM, step=STEPS)
    result, _ = start(config)
    assert (result.steps, result.eval_loss) == (STEPS, None)
    assert result.warnings == (
        "the held-out loss of the last step was not measured: a stop was asked for meanwhile",
    )
    assert [line["step"] for line in metrics_of(config.output_dir)] == [*range(1, STEPS + 1)]


def test_a_stop_while_the_held_out_loss_is_measured_costs_that_alone(source, whole, tmp_path, monkeypatch):
    """The line of the step before was missing in the metrics, and steps without a commit were lost."""
    config = configured(source, tmp_path / "run", memory={"commit_every": 100}, eval_steps=2)
    evaluate = PagedPartition.evaluate

    def interrupted(model, micro_batches):
        if model.state.generation > 0 and len(metrics_of(config.output_dir)) == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return evaluate(model, micro_batches)

    with monkeypatch.context() as patch:
        patch.setattr(PagedPartition, "evaluate", interrupted)
        with pytest.raises(InterruptedRunError, match="step 2 "):
            start(config)
    assert [line["step"] for line in metrics_of(config.output_dir)] == [1, 2]
    start(config, resume=True)
    check_equals(config.output_dir, whole)


def test_what_fails_after_a_step_leaves_its_line(source, tmp_path, monkeypatch):
    config = configured(source, tmp_path / "run", eval_steps=2)
    evaluate = PagedPartition.evaluate

    def failing(model, micro_batches):
        if len(metrics_of(config.output_dir)) == 1:
            raise KeyboardInterrupt
        return evaluate(model, micro_batches)

    monkeypatch.setattr(PagedPartition, "evaluate", failing)
    with pytest.raises(InterruptedRunError, match="step 2 "):
        start(config)
    assert [line["step"] for line in metrics_of(config.output_dir)] == [1, 2]


@pytest.mark.parametrize(
    ("phase", "said"),
    [
        (Phase(step_data, "prepare"), "while the model was imported: .* without --resume"),
        (Phase(resolve, "step_needs"), "while the model was imported: .* without --resume"),
        (Phase(setup, "activation_budget_of"), "before the first step; the run is as it was: give the same"),
    ],
    ids=lambda each: each if isinstance(each, str) else each.name,
)
def test_a_stop_before_the_first_step_says_how_to_begin_again(source, tmp_path, monkeypatch, phase, said):
    """A dry run that is interrupted anywhere ends in std::terminate: it goes to its end first."""
    config, done = configured(source, tmp_path / "run"), []
    whole = getattr(phase.module, phase.name)

    def interrupted(*arguments, **how):
        os.kill(os.getpid(), signal.SIGTERM)
        done.append(whole(*arguments, **how))
        return done[0]

    with monkeypatch.context() as patch:
        patch.setattr(phase.module, phase.name, interrupted)
        with pytest.raises(InterruptedRunError, match=said):
            start(config)
    assert len(done) == (phase.name != "prepare")
    assert start(configured(source, tmp_path / "run", max_steps=1))[0].steps == 1


def test_a_second_ctrl_c_ends_at_once(source, tmp_path, monkeypatch):
    config = configured(source, tmp_path / "run", memory={"commit_every": 2})
    now = iter([0.0, 10.0])
    monkeypatch.setattr(interrupt, "monotonic", lambda: next(now))
    sending(monkeypatch, signal.SIGINT, step=4, times=2)
    with pytest.raises(InterruptedRunError, match=r"step 2 .* kept \(the 1 after it are lost: memory.commit"):
        start(config)
    assert blob_of(config.output_dir)["step"] == 2
