"""The limit on what a run may write to its drives."""

from dataclasses import dataclass

from megatrain_io.errors import WearLimitError
from megatrain_io.runs.metrics import StepReport
from megatrain_io.training.callbacks import Callback, Run

__all__ = ["WearLimit"]

_TB = 1e12
# What is written behind is counted a step or two late, and where commits are seldom they come to a few.
_NEAR_STEPS = 4


@dataclass(frozen=True)
class WearLimit(Callback):
    """The limit on what a run may write to its drives (``memory.max_tbw``).

    Attributes:
        committing_bytes: the most that a step writes.
        max_tbw: terabytes (10^12 bytes) that the run may write; None: no limit.
    """

    committing_bytes: int
    max_tbw: float | None

    def on_start(self, run: Run) -> None:
        """Refuse the first step, if it could write more than the run may."""
        self._look(run)

    def on_step(self, run: Run, report: StepReport) -> None:
        """Pause before the next step, if it could write more than the run may."""
        self._look(run)

    def on_skip(self, run: Run, step: int, reason: str) -> None:
        """Pause before the step that comes next, likewise."""
        self._look(run)

    def _look(self, run: Run) -> None:
        if run.step >= run.max_steps or not self.is_near(run.written_bytes):
            return
        run.commit_next()
        run.wait_durable()
        self.check(run.written_bytes, run.step)

    def at_most(self, measured: int, *, is_durable: bool) -> int:
        """Bytes that the run has written at most: what was measured, and what a step may still have on its way."""
        return measured if is_durable else measured + self.committing_bytes

    def is_near(self, measured: int) -> bool:
        """Whether the limit may be reached within the next steps: from then on each of them is committed."""
        return self.max_tbw is not None and self._beyond(measured, steps=_NEAR_STEPS)

    def check(self, measured: int, step: int) -> None:
        """Refuse one more step, after all that was written is counted.

        Raises:
            WearLimitError: it could write more than the run may.
        """
        if self._beyond(measured, steps=1):
            raise WearLimitError(
                f"paused: this run has written {measured / _TB:.4g} TB, a step writes up to "
                f"{self.committing_bytes / _TB:.4g} TB, and memory.max_tbw is {self.max_tbw:g}. Step {step} is "
                "committed, and nothing is lost: raise memory.max_tbw and go on with --resume, or export"
            )

    def _beyond(self, written: int, *, steps: int) -> bool:
        return written + steps * self.committing_bytes > (self.max_tbw or 0.0) * _TB
