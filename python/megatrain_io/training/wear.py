"""What steps took, against what was planned; and how much more may be written."""

import statistics
from collections import deque
from dataclasses import dataclass, field
from typing import Any

from megatrain_io.errors import WearLimitError
from megatrain_io.planning.plan import Plan
from megatrain_io.runs.metrics import StepReport

__all__ = ["Tally"]

_TB = 1e12
# Moments that were never written are not read, and state that stays is: the first steps are no measure.
_FIRST_STEPS = 2
# What is written behind is counted a step or two late, and where commits are seldom they come to a few.
_NEAR_STEPS = 4
# Enough for averages; a run may have a million.
_STEPS_MAX = 1024


@dataclass
class Tally:
    """The last steps of one start.

    Attributes:
        plan: of the run.
        commit_every: steps between two commits.
        max_tbw: terabytes that the run may write.
    """

    plan: Plan
    commit_every: int
    max_tbw: float | None
    _steps: deque[StepReport] = field(default_factory=lambda: deque(maxlen=_STEPS_MAX))

    def add(self, report: StepReport) -> None:
        """Take note of a step."""
        self._steps.append(report)

    def at_most(self, measured: int, *, is_durable: bool) -> int:
        """Bytes that the run wrote; until all is durable, with what may still be on its way: those of a step."""
        return measured if is_durable else measured + self.plan.committing_bytes

    def is_near(self, measured: int) -> bool:
        """Whether the limit may be reached within the next steps: then each is committed, and counted to its end."""
        return self.max_tbw is not None and self._beyond(measured, steps=_NEAR_STEPS)

    def check(self, measured: int, step: int) -> None:
        """Refuse one more step, after all that was written is counted.

        Raises:
            WearLimitError: it could write more than the run may.
        """
        if self._beyond(measured, steps=1):
            raise WearLimitError(
                f"paused: this run has written {measured / _TB:.4g} TB, a step writes up to "
                f"{self.plan.committing_bytes / _TB:.4g} TB, and memory.max_tbw is {self.max_tbw:g}. Step {step} is "
                "committed, and nothing is lost: raise memory.max_tbw and go on with --resume, or export"
            )

    def _beyond(self, written: int, *, steps: int) -> bool:
        return written + steps * self.plan.committing_bytes > (self.max_tbw or 0.0) * _TB

    def compared(self, ledger_peak: int, process_peak: int) -> dict[str, dict[str, Any]]:
        """Planned and measured figures by name, in the steady state where there were enough steps; RAM at its peak."""
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
                statistics.median(each.seconds for each in steady),
            ),
            "read_bytes_per_step": (plan.read_bytes, statistics.fmean(each.read_bytes for each in steady)),
            "written_bytes_per_step": (
                plan.written_bytes,
                statistics.fmean(each.written_bytes for each in steady),
            ),
            "ledger_bytes": (plan.ledger_bytes, ledger_peak),
            "process_bytes": (plan.process_bytes, process_peak),
        }
        return {
            name: {"planned": planned, "measured": measured, "ratio": measured / planned if planned else None}
            for name, (planned, measured) in pairs.items()
            if planned is not None
        }
