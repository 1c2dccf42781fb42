"""What the run took, compared with what was planned."""

import statistics
from collections import deque
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from megatrain_io.planning.plan import Plan
from megatrain_io.runs.metrics import StepReport
from megatrain_io.training.callbacks import Callback, Run

__all__ = ["PlanCheck", "Totals"]

# Enough for a median; a run may have a million.
_STEPS_MAX = 1024


@dataclass
class Totals:
    """Bytes of a run's steps in all its starts, as planned and as measured.

    Attributes:
        steps: number of steps whose writes are compared.
        planned_written: bytes that they were to write.
        written: bytes that they wrote.
        read_steps: number of steps whose reads are compared: the first of a start read less or more than the others.
        planned_read: bytes that these were to read.
        read: bytes that they read.
    """

    steps: int = 0
    planned_written: float = 0.0
    written: int = 0
    read_steps: int = 0
    planned_read: float = 0.0
    read: int = 0

    @classmethod
    def of(cls, figures: Mapping[str, Any] | None) -> "Totals":
        """Those that a run was committed with; none where it has none."""
        names = cls.__dataclass_fields__
        return cls(**{name: value for name, value in (figures or {}).items() if name in names})


@dataclass
class PlanCheck(Callback):
    """Adds up the steps of a run, to compare them with its plan.

    Attributes:
        plan: of this start.
        commit_every: steps between two commits.
        totals: of all starts so far.
    """

    plan: Plan
    commit_every: int
    totals: Totals = field(default_factory=Totals)
    _seconds: deque[float] = field(default_factory=lambda: deque(maxlen=_STEPS_MAX))
    _count: int = 0

    def on_step(self, run: Run, report: StepReport) -> None:
        """Add a step."""
        self.add(report)

    def add(self, report: StepReport) -> None:
        """Add a step."""
        totals = self.totals
        self._count += 1
        totals.steps += 1
        totals.planned_written += self._to_write(report)
        totals.written += report.written_bytes
        # State that was never written is not read, what stays in RAM is read once; an update that waits is a step late.
        if self._count > 1 + self.plan.updates_wait:
            totals.read_steps += 1
            totals.planned_read += self.plan.read_bytes
            totals.read += report.read_bytes
        self._seconds.append(report.seconds)

    def add_written(self, nbytes: int) -> None:
        """Add what the last steps wrote after they were reported."""
        self.totals.written += nbytes

    def recorded(self) -> dict[str, Any]:
        """The totals as plain types, for the trainer's state."""
        return asdict(self.totals)

    def compared(self, ledger_peak: int, process_peak: int) -> dict[str, dict[str, Any]]:
        """Planned and measured figures, and their ratio, by name.

        Bytes are those of the run in all its starts, for each step; the time of a step is a median of this start,
        without its first one; RAM is that at its peak.

        Args:
            ledger_peak: most bytes that the package itself held.
            process_peak: most bytes of RAM that the process held.
        """
        totals, plan = self.totals, self.plan
        seconds = [*self._seconds][1:] or [*self._seconds]
        pairs: dict[str, tuple[float | None, float]] = {}
        if seconds:
            planned = None if plan.time is None else plan.time.seconds
            pairs["seconds_per_step"] = (planned, statistics.median(seconds))
        if totals.read_steps:
            count = totals.read_steps
            pairs["read_bytes_per_step"] = (totals.planned_read / count, totals.read / count)
        if totals.steps:
            count = totals.steps
            pairs["written_bytes_per_step"] = (totals.planned_written / count, totals.written / count)
            pairs["ledger_bytes"] = (plan.ledger_bytes, ledger_peak)
            pairs["process_bytes"] = (plan.process_bytes, process_peak)
        return {
            name: {"planned": planned, "measured": measured, "ratio": measured / planned if planned else None}
            for name, (planned, measured) in pairs.items()
            if planned is not None
        }

    def _to_write(self, report: StepReport) -> float:
        """Bytes that a step was to write: one that commits writes what is kept in RAM between two commits, too."""
        plan, every = self.plan, self.commit_every
        if every == 1 or plan.updates_wait:
            return plan.written_bytes
        if report.step % every == 0 or report.step == report.max_steps:
            return plan.committing_bytes
        return max(0.0, (every * plan.written_bytes - plan.committing_bytes) / (every - 1))
