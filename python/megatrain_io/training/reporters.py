"""What a person sees while something runs: a live display on a terminal, a line now and then elsewhere.

Everything goes to the console that is handed in, which is standard error: standard output is for results.
"""

import time
from collections import deque
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Protocol

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
from megatrain_io.text import gib

__all__ = [
    "SECONDS_BETWEEN_LINES",
    "LineReporter",
    "LiveReporter",
    "QuietReporter",
    "Reporter",
    "facts",
    "reporter_for",
    "tell",
]

SECONDS_BETWEEN_LINES = 5.0
_STEPS_FOR_PACE = 20
_A_DAY = 86400.0
_SMALLEST_SHARE = 0.005
"""Share of a step: a cause with a smaller one would be shown as 0 %."""
_MACHINE_FACTS = 5
"""Number of facts, the last ones, that are about the machine; the others are about the training."""


class Reporter(Protocol):
    """What training tells of its progress. Calls return at once."""

    def started(self, *, step: int, max_steps: int, notes: Sequence[str] = ()) -> None:
        """The run begins, or goes on after ``step``; each note is a sentence for the person."""

    def step(self, report: StepReport) -> None:
        """A step was done; ``eval_loss`` is set where the held-out loss was measured after it."""

    def note(self, text: str) -> None:
        """A sentence for the person, in the middle of the run."""

    def finished(self) -> None:
        """Nothing more will come, whether the run succeeded or not. May be called twice."""


class QuietReporter:
    """A reporter that shows nothing."""

    def started(self, *, step: int, max_steps: int, notes: Sequence[str] = ()) -> None:
        """Show nothing of the start of the run."""

    def step(self, report: StepReport) -> None:
        """Show nothing of the step."""

    def note(self, text: str) -> None:
        """Drop the sentence."""

    def finished(self) -> None:
        """Nothing was shown, so there is nothing to end."""


class LineReporter:
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

    def started(self, *, step: int, max_steps: int, notes: Sequence[str] = ()) -> None:
        """Print the notes, and at which step the run begins."""
        _tell_start(self._console, step, max_steps, notes)

    def step(self, report: StepReport) -> None:
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

    def note(self, text: str) -> None:
        """Print the sentence as a line of its own."""
        tell(self._console, text)

    def finished(self) -> None:
        """Print nothing: the last step had its line."""


class LiveReporter:
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

    def started(self, *, step: int, max_steps: int, notes: Sequence[str] = ()) -> None:
        """Print the notes, and begin to show the progress bar."""
        _tell_start(self._live.console, step, max_steps, notes)
        self._progress.add_task("step", total=max_steps, completed=step)
        self._live.start()

    def step(self, report: StepReport) -> None:
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

    def note(self, text: str) -> None:
        """Print the sentence as a line that stays on the screen."""
        tell(self._live.console, text)

    def finished(self) -> None:
        """Stop the display; its last state stays on the screen."""
        self._live.stop()


def reporter_for(console: Console, *, quiet: bool = False, logging_steps: int = 1) -> Reporter:
    """The reporter for a console: live on a terminal, lines elsewhere, nothing where ``quiet``."""
    if quiet:
        return QuietReporter()
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


def _tell_start(console: Console, step: int, max_steps: int, notes: Sequence[str]) -> None:
    for note in notes:
        tell(console, f"note: {note}")
    tell(console, f"resuming after step {step} of {max_steps}" if step else f"training for {max_steps} steps")


def tell(console: Console, text: str) -> None:
    """Print text as it is: no markup, no colours for numbers, no line breaks added."""
    console.print(text, markup=False, highlight=False, soft_wrap=True)
