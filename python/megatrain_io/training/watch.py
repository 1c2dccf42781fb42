"""What is watched while a run goes on, and warned of once: a loss that has left all reason, RAM that others take."""

import math
import time

from megatrain_io.machine.memory import usable_ram
from megatrain_io.runs.metrics import StepReport
from megatrain_io.text import gib, mib
from megatrain_io.training.callbacks import Callback, Run

__all__ = ["LossWatch", "RamWatch"]

# Twice the loss of guessing: the right token gets the square of a guess's probability, on average.
_OUT_OF_REASON = 2.0
# Losses of single steps vary; so many in a row do not.
_WORSE_IN_A_ROW = 3
_KNEW_SOMETHING = 0.9
# What a kernel needs to go on without ending processes, and what a step may need besides.
_LEAST_RAM = 256 << 20
_SECONDS_BETWEEN = 1.0


class LossWatch(Callback):
    """Warns once when the loss leaves all reason, while it is still finite.

    That is a loss above twice that of guessing (the logarithm of the vocabulary) and twice the first one, or three in a
    row that are worse than guessing where the first ones were better.

    Args:
        vocabulary: number of tokens that the model tells apart.
    """

    def __init__(self, vocabulary: int) -> None:
        self._vocabulary = vocabulary
        self._guessing = math.log(max(2, vocabulary))
        self._first: float | None = None
        self._is_fresh = True
        self._worse = 0
        self._has_warned = False

    def on_start(self, run: Run) -> None:
        """Take the losses of this start alone."""
        self._first, self._worse, self._has_warned = None, 0, False
        # A run that is resumed may have left all reason before.
        self._is_fresh = run.step == 0

    def on_step(self, run: Run, report: StepReport) -> None:
        """Look at the loss of a step."""
        if self._first is None:
            self._first = report.loss
        limit = _OUT_OF_REASON * max(self._guessing, self._first if self._is_fresh else 0.0)
        knew_something = self._first < _KNEW_SOMETHING * self._guessing
        self._worse = self._worse + 1 if knew_something and report.loss > self._guessing else 0
        if self._has_warned or not (report.loss > limit or self._worse >= _WORSE_IN_A_ROW):
            return
        self._has_warned = True
        run.warn(
            f"the loss of step {report.step} is {report.loss:,.6g}, and guessing among the {self._vocabulary:,} tokens "
            f"has {self._guessing:.3g}: the model has forgotten what it knew. Stop the run (Ctrl-C), and begin a "
            f"new one with a lower train.learning_rate (it is {run.config.train.learning_rate:g}), warmup_steps or "
            "max_grad_norm; look at the data, too"
        )


class RamWatch(Callback):
    """Warns once when others have taken so much RAM that the kernel may soon end the process."""

    def __init__(self) -> None:
        self._next = 0.0
        self._has_warned = False

    def on_start(self, run: Run) -> None:
        """Begin to watch."""
        self._next, self._has_warned = 0.0, False

    def on_step(self, run: Run, report: StepReport) -> None:
        """Look at what is left, once a second at most."""
        if self._has_warned or time.monotonic() < self._next:
            return
        self._next = time.monotonic() + _SECONDS_BETWEEN
        left, because = usable_ram()
        # A step gives its tensors back, and takes them again.
        needed = max(0, (run.plan.process_bytes or 0) - report.ram_bytes)
        if left >= needed + _LEAST_RAM:
            return
        self._has_warned = True
        ram = run.config.memory.ram
        budget = "half of what was free at the start" if ram is None else mib(ram)
        run.warn(
            f"{gib(left)} of RAM are left ({because}), this process holds {gib(report.ram_bytes)} and may need "
            f"{gib(needed)} more: others have taken RAM since the start, and the kernel may end it. "
            f"Step {report.step} is finished: end other programs, or stop (Ctrl-C) and go on with --resume and a "
            f"smaller memory.ram (it is {budget})"
        )
