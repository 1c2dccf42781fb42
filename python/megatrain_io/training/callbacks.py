"""What is told of a run while it goes on: the interface, and the entries that every run has."""

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from megatrain_io.config.schema import RunConfig
from megatrain_io.files import storage_errors
from megatrain_io.paging.paged_model import PagedPartition
from megatrain_io.paging.trace import Trace
from megatrain_io.planning.plan import Plan
from megatrain_io.runs.metrics import MetricsFile, StepReport
from megatrain_io.runs.state import TrainerState

__all__ = ["Callback", "Callbacks", "MetricsCallback", "Run", "TraceCallback"]


class Run(Protocol):
    """A run while it is trained, as callbacks see it.

    Attributes:
        config: its configuration, with a value in place of each ``auto``.
        plan: what was planned for it on this machine.
        notes: sentences about how it starts.
        model: whose steps it makes; callbacks may measure with it (``evaluate``), and change nothing.
        max_steps: its last step.
        progress: how far it is, as the next commit has it.
    """

    config: RunConfig
    plan: Plan
    notes: Sequence[str]
    model: PagedPartition
    max_steps: int
    progress: TrainerState

    @property
    def step(self) -> int:
        """The last step that was trained; 0 before the first."""

    @property
    def written_bytes(self) -> int:
        """Bytes written to the drives in all starts of the run so far."""

    def commit_next(self) -> None:
        """Let the next step be committed, whatever ``memory.commit_every`` says."""

    def stop(self) -> None:
        """End the training with this step, which is committed now; with the next, if that must write what is in RAM."""

    def warn(self, message: str) -> None:
        """Tell all callbacks, and the result, of something that should be looked at."""

    def wait_durable(self) -> None:
        """Wait until all finished steps are durable, if they were to be committed."""


class Callback:
    """What is told of a run while it is trained: a base class whose methods do nothing.

    They are called in the thread that trains, which waits for them, in the order of the list: the metrics file and the
    comparison with the plan, then those that the caller has handed over, and the wear limit last. An error that one
    raises ends the training as it is; the last committed step stands, and ``on_end`` is called for all.
    """

    def on_start(self, run: Run) -> None:
        """The run is ready, and its next step is ``run.step + 1``."""

    def on_step(self, run: Run, report: StepReport) -> None:
        """A step was trained, and the held-out loss measured if that was due (``report.eval_loss``)."""

    def on_evaluate(self, run: Run, loss: float) -> None:
        """The held-out loss was measured: before the first step, or after step ``run.step``, ahead of ``on_step``."""

    def on_skip(self, run: Run, step: int, reason: str) -> None:
        """A step will be left out, because its gradients are not finite; the run goes back to step ``run.step``."""

    def on_warning(self, run: Run, message: str) -> None:
        """Something should be looked at, while the run goes on: a loss that has left all reason, RAM that runs out."""

    def on_pause(self, run: Run, reason: str) -> None:
        """The run ends before its last step, and can be resumed: a signal, ``stop``, or ``memory.max_tbw``."""

    def on_end(self, run: Run) -> None:
        """Nothing more will come, whether the run succeeded or not."""


class Callbacks(Callback):
    """Several callbacks as one."""

    def __init__(self, members: Sequence[Callback]) -> None:
        self._members = members

    def on_start(self, run: Run) -> None:
        """Tell all."""
        for member in self._members:
            member.on_start(run)

    def on_step(self, run: Run, report: StepReport) -> None:
        """Tell all."""
        for member in self._members:
            member.on_step(run, report)

    def on_evaluate(self, run: Run, loss: float) -> None:
        """Tell all."""
        for member in self._members:
            member.on_evaluate(run, loss)

    def on_skip(self, run: Run, step: int, reason: str) -> None:
        """Tell all."""
        for member in self._members:
            member.on_skip(run, step, reason)

    def on_warning(self, run: Run, message: str) -> None:
        """Tell all."""
        for member in self._members:
            member.on_warning(run, message)

    def on_pause(self, run: Run, reason: str) -> None:
        """Tell all."""
        for member in self._members:
            member.on_pause(run, reason)

    def on_end(self, run: Run) -> None:
        """Tell all, also where one fails; the first error is raised."""
        first: BaseException | None = None
        for member in self._members:
            try:
                member.on_end(run)
            except BaseException as error:  # noqa: BLE001 - the others must be told
                first = first or error
        if first is not None:
            raise first


class MetricsCallback(Callback):
    """Appends the figures of each step to a file of JSON lines.

    Args:
        path: of the file; lines of steps that an earlier start has lost are removed from it.
        safe: what is left where the file cannot be written, as a sentence.
    """

    def __init__(self, path: Path, safe: str) -> None:
        self._path = path
        self._safe = safe
        self._file: MetricsFile | None = None

    def on_start(self, run: Run) -> None:
        """Open the file."""
        with storage_errors(self._path, self._safe):
            self._file = MetricsFile(self._path, run.progress)
        run.notes = [*run.notes, *self._file.notes]

    def on_step(self, run: Run, report: StepReport) -> None:
        """Append a line, durably."""
        if self._file is not None:
            with storage_errors(self._path, self._safe):
                self._file.append(report)

    def on_skip(self, run: Run, step: int, reason: str) -> None:
        """Remove the lines of steps that will be trained again."""
        if self._file is not None:
            with storage_errors(self._path, self._safe):
                self._file.go_back(run.progress)

    def on_end(self, run: Run) -> None:
        """Close the file."""
        if self._file is not None:
            with storage_errors(self._path, self._safe):
                self._file.close()


class TraceCallback(Callback):
    """Writes what ran when, after each step.

    Args:
        trace: where it is written.
    """

    def __init__(self, trace: Trace) -> None:
        self._trace = trace

    def on_start(self, run: Run) -> None:
        """Begin to note what runs when."""
        run.model.trace_into(self._trace)

    def on_step(self, run: Run, report: StepReport) -> None:
        """Write what was noted."""
        run.model.flush_trace()

    def on_skip(self, run: Run, step: int, reason: str) -> None:
        """Write what was noted."""
        run.model.flush_trace()

    def on_end(self, run: Run) -> None:
        """Write what was noted."""
        run.model.flush_trace()
