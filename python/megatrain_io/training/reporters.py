"""What a person sees while something runs: a live display on a terminal, a line now and then elsewhere.

Everything goes to the console that is handed in, which is standard error: standard output is for results. A console
that is gone (a closed terminal, a pipe whose reader has ended) stops nothing.
"""

import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta

from rich.console import Console, Group
from rich.filesize import decimal
from rich.live import Live
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from megatrain_io.runs.metrics import StepReport
from megatrain_io.text import SECONDS_BETWEEN_LINES, gib, tell
from megatrain_io.training.callbacks import Callback, Run

__all__ = [
    "LineReporter",
    "LiveReporter",
    "WarningReporter",
    "facts",
    "reporter",
]

_STEPS_FOR_PACE = 20
_A_DAY = 86400.0
_SMALLEST_SHARE = 0.005
"""Share of a step: a cause with a smaller one would be shown as 0 %."""
_MACHINE_FACTS = 5
"""Number of facts, the last ones, that are about the machine; the others are about the training."""


class LineReporter(Callback):
    """Prints a line every few seconds; always for the first and the last step, and where there was an evaluation."""

    def __init__(
        self,
        console: Console,
        *,
        logging_steps: int = 1,
        seconds_between: float = SECONDS_BETWEEN_LINES,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._console = console
        self._logging_steps = logging_steps
        self._seconds_between = seconds_between
        self._clock = clock
        self._last: float | None = None
        self._pace = _Pace()

    def on_start(self, run: Run) -> None:
        """Print the notes, and at which step the run begins."""
        self._last, self._pace = None, _Pace()
        _tell_start(self._console, run)

    def on_step(self, run: Run, report: StepReport) -> None:
        """Print a line about the step, if one is due."""
        remaining = self._pace.remaining(report)
        now = self._clock()
        is_due = self._last is None or now - self._last >= self._seconds_between
        is_special = self._last is None or report.step == report.max_steps or report.eval_loss is not None
        if is_special or (is_due and report.step % self._logging_steps == 0):
            self._last = now
            parts = [
                f"step {report.step}/{report.max_steps}",
                *facts(report),
                f"ETA {_clock_time(remaining)}",
            ]
            tell(self._console, "  ".join(parts))

    def on_skip(self, run: Run, step: int, reason: str) -> None:
        """Print why a step is left out, as a line of its own."""
        tell(self._console, _skipped(step, reason))

    def on_warning(self, run: Run, message: str) -> None:
        """Print a warning, as a line of its own."""
        tell(self._console, f"warning: {message}")


class LiveReporter(Callback):
    """Shows a progress bar, time and the figures of the newest step, in place."""

    def __init__(self, console: Console, *, logging_steps: int = 1) -> None:
        self._logging_steps = logging_steps
        # Steps may take minutes: a pace worked out over half a minute, as is usual, would know nothing.
        self._progress = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(),
            TimeElapsedColumn(),
            TextColumn("ETA"),
            TimeRemainingColumn(),
            speed_estimate_period=_A_DAY,
        )
        self._facts = Text("waiting for the first step")
        self._live = Live(Group(self._progress, self._facts), console=console, refresh_per_second=2)

    def on_start(self, run: Run) -> None:
        """Print the notes, and begin to show the progress bar."""
        _tell_start(self._live.console, run)
        for task in self._progress.task_ids:
            self._progress.remove_task(task)  # of an earlier start
        self._progress.add_task("step", total=run.max_steps, completed=run.step)
        with suppress(OSError, SystemExit):
            self._live.start()

    def on_step(self, run: Run, report: StepReport) -> None:
        """Show a step; an evaluation stays on the screen as a line of its own."""
        for task in self._progress.task_ids:
            self._progress.update(task, completed=report.step, total=report.max_steps)
        if report.step % self._logging_steps == 0 or report.step == report.max_steps:
            figures = facts(report)
            self._facts.plain = "\n".join(
                ["  ".join(figures[:-_MACHINE_FACTS]), "  ".join(figures[-_MACHINE_FACTS:])]
            )
        if report.eval_loss is not None:
            tell(self._live.console, f"step {report.step}: held-out loss {report.eval_loss:.4f}")

    def on_skip(self, run: Run, step: int, reason: str) -> None:
        """Print why a step is left out, as a line that stays on the screen."""
        tell(self._live.console, _skipped(step, reason))

    def on_warning(self, run: Run, message: str) -> None:
        """Print a warning, as a line that stays on the screen."""
        tell(self._live.console, f"warning: {message}")

    def on_end(self, run: Run) -> None:
        """Stop the display; its last state stays on the screen."""
        with suppress(OSError, SystemExit):
            self._live.stop()


class WarningReporter(Callback):
    """Prints warnings alone, where figures go elsewhere.

    Args:
        console: where; standard output is for results.
    """

    def __init__(self, console: Console) -> None:
        self._console = console

    def on_warning(self, run: Run, message: str) -> None:
        """Print a warning, as a line of its own."""
        tell(self._console, f"warning: {message}")


def reporter(console: Console | None = None, *, logging_steps: int = 1) -> Callback:
    """A callback that shows the progress of a run: live on a terminal, a line every few seconds elsewhere.

    Args:
        console: where it is shown; None = standard error.
        logging_steps: figures are shown every so many steps.
    """
    console = console or Console(stderr=True)
    kind = LiveReporter if console.is_terminal else LineReporter
    return kind(console, logging_steps=logging_steps)


class _Pace:
    """Mean seconds of the newest steps."""

    def __init__(self) -> None:
        self._seconds: deque[float] = deque(maxlen=_STEPS_FOR_PACE)

    def remaining(self, report: StepReport) -> float:
        """Seconds to the end of the run, with ``report`` as the newest step."""
        self._seconds.append(report.seconds)
        return (report.max_steps - report.step) * sum(self._seconds) / len(self._seconds)


def facts(report: StepReport) -> list[str]:
    """The figures of a step, each with its unit."""
    seconds = max(report.seconds, 1e-9)
    figures = [
        f"loss {report.loss:.4f}",
        f"lr {report.learning_rate:.2e}",
        *_gradients(report),
        f"{report.tokens / seconds:,.0f} tok/s",
        f"read {decimal(round(report.read_bytes / seconds))}/s",
        f"write {decimal(round(report.written_bytes / seconds))}/s",
        _stalled(report, seconds),
        f"RAM {gib(report.ram_bytes)}",
        f"written {decimal(report.written_bytes_total)}",
    ]
    if report.eval_loss is not None:
        figures.insert(1, f"held-out loss {report.eval_loss:.4f}")
    return figures


def _gradients(report: StepReport) -> list[str]:
    """The norm of the gradients, whether they were clipped, and how many steps were skipped."""
    if report.grad_norm is None:
        return []
    clipped = f" (clipped to {report.clip_coefficient:.0%})" if report.clip_coefficient < 1 else ""
    skipped = [f"skipped {report.skipped_steps}"] if report.skipped_steps else []
    return [f"grad norm {report.grad_norm:.3g}{clipped}", *skipped]


def _stalled(report: StepReport, seconds: float) -> str:
    """The share of a step that was waiting, and its causes, the largest first."""
    shares = sorted(((value / seconds, cause) for cause, value in report.stalled.items()), reverse=True)
    causes = [f"{cause} {share:.0%}" for share, cause in shares if share >= _SMALLEST_SHARE]
    return f"stalled {report.stalled_seconds / seconds:.0%}" + (f" ({', '.join(causes)})" if causes else "")


def _clock_time(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))


def _tell_start(console: Console, run: Run) -> None:
    for note in run.notes:
        tell(console, f"note: {note}")
    steps = run.max_steps
    tell(console, f"resuming after step {run.step} of {steps}" if run.step else f"training for {steps} steps")


def _skipped(step: int, reason: str) -> str:
    return f"step {step} is skipped: {reason}; nothing is updated by it"
