"""What the steps took, compared with what was planned."""

import statistics
from collections import deque
from dataclasses import dataclass, field
from typing import Any

from megatrain_io.planning.plan import Plan
from megatrain_io.runs.metrics import StepReport
from megatrain_io.training.callbacks import Callback, Run

__all__ = ["PlanCheck"]

# Moments that were never written are not read, and state that stays is: the first steps are no measure.
_FIRST_STEPS = 2
# Enough for averages; a run may have a million.
_STEPS_MAX = 1024


@dataclass
class PlanCheck(Callback):
    """Collects the last steps of one start, to compare them with the plan.

    Attributes:
        plan: of the run.
        commit_every: steps between two commits.
    """

    plan: Plan
    commit_every: int
    _steps: deque[StepReport] = field(default_factory=lambda: deque(maxlen=_STEPS_MAX))

    def on_step(self, run: Run, report: StepReport) -> None:
        """Add a step; when there are many, the oldest is forgotten."""
        self.add(report)

    def add(self, report: StepReport) -> None:
        """Add a step; when there are many, the oldest is forgotten."""
        self._steps.append(report)

    def compared(self, ledger_peak: int, process_peak: int) -> dict[str, dict[str, Any]]:
        """Planned and measured figures, and their ratio, by name.

        Time and traffic are those of the steady state where there were enough steps; RAM is that at its peak.

        Args:
            ledger_peak: most bytes that the package itself held.
            process_peak: most bytes of RAM that the process held.
        """
        steps = list(self._steps)
        steady = steps[_FIRST_STEPS:]
        if self.plan.updates_wait:
            steady = steady[:-1]  # the last one makes its own update, too
        steady = steady[: len(steady) - len(steady) % self.commit_every] or steady or steps
        if not steady:
            return {}
        plan = self.plan
        pairs: dict[str, tuple[float | None, float]] = {
            "seconds_per_step": (
                None if plan.time is None else plan.time.seconds,
                statistics.median(report.seconds for report in steady),
            ),
            "read_bytes_per_step": (
                plan.read_bytes,
                statistics.fmean(report.read_bytes for report in steady),
            ),
            "written_bytes_per_step": (
                plan.written_bytes,
                statistics.fmean(report.written_bytes for report in steady),
            ),
            "ledger_bytes": (plan.ledger_bytes, ledger_peak),
            "process_bytes": (plan.process_bytes, process_peak),
        }
        return {
            name: {"planned": planned, "measured": measured, "ratio": measured / planned if planned else None}
            for name, (planned, measured) in pairs.items()
            if planned is not None
        }
