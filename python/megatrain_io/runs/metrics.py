"""The figures of a run, for each step and at its end, and the file of the former. No torch."""

import json
import os
from collections.abc import Iterator
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Annotated, Any, BinaryIO, Self

from pydantic import Field, TypeAdapter, ValidationError

from megatrain_io.files import append_file, new_file, open_file, sync_folder
from megatrain_io.runs.state import TrainerState

__all__ = ["MetricsFile", "StepReport", "TrainResult", "last_report"]

_TAIL_BYTES = 1 << 16
"""Bytes at the end of the file, some hundred lines: the last whole one is among them."""
_LINE_BYTES_MAX = 1 << 16
"""Of a line: what is longer is none of ours."""


@dataclass(frozen=True)
class StepReport:
    """Figures of one optimizer step. Bytes are those of the store's drives; seconds are wall time.

    Attributes:
        step: counted from 1.
        max_steps: last step of the run.
        loss: mean over the trained tokens of the step.
        learning_rate: of this step; 0 where it was skipped.
        tokens: tokens that went through the model, padding included.
        trained_tokens: those with a label.
        seconds: wall time of the step.
        read_bytes: bytes read from the drives during the step.
        written_bytes: bytes written to them during the step.
        stalled_seconds: seconds that compute waited.
        ram_bytes: resident memory of the process.
        ledger_bytes: what the package itself holds, the sum of its accounts.
        written_bytes_total: bytes written since the run began, in all its starts.
        eval_loss: held-out loss after this step, where it was measured.
        grad_norm: norm over the gradients of all parameters, before clipping.
        clip_coefficient: what gradients were multiplied by; 1 where they were not clipped.
        skipped_steps: steps so far whose gradients were not finite; nothing was updated by them.
        stalled: ``stalled_seconds`` by cause: ``read``, ``pool``, ``write``, ``update``, ``commit``,
            ``inputs`` (of blocks, on the drive).
    """

    step: Annotated[int, Field(ge=1)]
    max_steps: int
    loss: float
    learning_rate: float
    tokens: int
    trained_tokens: int
    seconds: float
    read_bytes: int
    written_bytes: int
    stalled_seconds: float
    ram_bytes: int
    ledger_bytes: int
    written_bytes_total: int
    eval_loss: float | None = None
    grad_norm: float | None = None
    clip_coefficient: float = 1.0
    skipped_steps: int = 0
    stalled: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class TrainResult:
    """What a run came to; bytes are those of the store's drive, counted by its engine.

    Attributes:
        steps: last step that was trained, counted from 1 over all starts.
        loss: of the last step.
        eval_loss_before: held-out loss of the imported model, where data.eval is set.
        eval_loss: held-out loss at the end.
        seconds: wall time of this start.
        parameters: number of parameters of the model.
        read_bytes_per_parameter_and_step: read by the training steps of this start; None if it trained none.
        written_bytes_per_parameter_and_step: written by them; None if it trained none.
        written_bytes_total: bytes written in all starts: exact for this one and those that paused; for each earlier
            one that ended otherwise off by a step at most.
        peak_ram_bytes: largest resident memory of this process, libraries included.
        ledger: (current, peak) bytes of each account of the package.
        plan: what was planned beside what was measured, and their ratio; see ``PlanCheck.compared``.
        warnings: sentences about what should be looked at.
    """

    steps: int
    loss: float | None
    eval_loss_before: float | None
    eval_loss: float | None
    seconds: float
    parameters: int
    read_bytes_per_parameter_and_step: float | None
    written_bytes_per_parameter_and_step: float | None
    written_bytes_total: int
    peak_ram_bytes: int
    ledger: dict[str, tuple[int, int]]
    plan: dict[str, dict[str, Any]]
    warnings: tuple[str, ...] = ()


def last_report(path: Path) -> StepReport | None:
    """The newest whole line of a metrics file, also while it is written; None where there is none."""
    try:
        with open_file(path) as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - _TAIL_BYTES))
            lines = file.read(_TAIL_BYTES).splitlines()
    except OSError:
        return None
    # Passed over: what a crash cut short, what is not yet written to its end, what was damaged or made anew.
    return next((report for line in reversed(lines) if (report := _report_of(line)) is not None), None)


def _report_of(line: bytes) -> StepReport | None:
    """The figures of a line; None where it has not all of them."""
    try:
        return _REPORT.validate_json(line, strict=True)
    except ValidationError:
        return None


def _step_of(line: bytes) -> int | None:
    """The step of a line, be it of another version or made anew; None where it is damaged."""
    try:
        step = json.loads(line)["step"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return step if type(step) is int and step > 0 else None


def _lines(file: BinaryIO) -> Iterator[bytes]:
    """The lines of a file, in pieces where they are too long to be ours."""
    while line := file.readline(_LINE_BYTES_MAX):
        yield line


class MetricsFile:
    """Metrics as JSON lines, one for each step, in step order without repeats.

    A line is durable when ``append`` returns, so before anything of the next step is. A step becomes durable by itself:
    a power cut between the two may take the line of the last committed step, no other. That one is made anew, with
    what the store knows of it.

    Args:
        path: of the file.
        committed: the trainer's state as it was committed; lines of later steps, which an earlier start lost, are
            removed.

    Attributes:
        notes: sentences about what was damaged, and what became of it.
    """

    def __init__(self, path: Path, committed: TrainerState) -> None:
        self._path = path
        self.notes: list[str] = []
        self._open(committed)

    def go_back(self, committed: TrainerState) -> None:
        """Remove the lines of steps after the committed one: they will be trained again."""
        self._file.close()
        self._open(committed)

    def _open(self, committed: TrainerState) -> None:
        fresh = self._path.with_name(self._path.name + ".tmp")
        fresh.unlink(missing_ok=True)  # of a process that was killed
        with new_file(fresh) as copy:
            self._keep(copy, committed)
            copy.flush()
            os.fsync(copy.fileno())
        fresh.replace(self._path)
        sync_folder(self._path.parent)
        self._file = append_file(self._path)

    def _keep(self, copy: BinaryIO, committed: TrainerState) -> None:
        """Copy the lines of steps up to the committed one, and add its own where that is missing."""
        last, damaged = 0, []
        for number, line in enumerate(self._old_lines(), 1):
            step = _step_of(line)
            if step is None:
                if line.endswith(b"\n"):  # else a crash cut it short
                    damaged.append(number)
            elif last < step <= committed.step:
                copy.write(line.rstrip(b"\n") + b"\n")
                last = step
        if damaged:
            lines = f"line {damaged[0]} was" if len(damaged) == 1 else f"{len(damaged)} lines were"
            self.notes.append(f"{self._path}: {lines} damaged and left out; the store has lost nothing by it")
        if last < committed.step:
            self.notes.append(
                f"{self._path}: the line of step {committed.step} was missing, and was made anew with what the store "
                "knows of the step"
            )
            copy.write(_made_anew(committed))

    def _old_lines(self) -> Iterator[bytes]:
        try:
            with open_file(self._path) as file:
                yield from _lines(file)
        except FileNotFoundError:
            return

    def append(self, report: StepReport) -> None:
        """Write the line of one step; it is durable when this returns."""
        self._file.write(json.dumps(asdict(report)).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file; what a failed ``append`` left in its buffer is tried again."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        # After an error that one is the news, not what the drive then says to the flush.
        with suppress(OSError) if error is not None else nullcontext():
            self.close()


def _made_anew(committed: TrainerState) -> bytes:
    """The line of a step whose own was lost: what the store knows, and null for what it does not."""
    nothing = dict.fromkeys(StepReport.__dataclass_fields__)
    known = {
        "step": committed.step,
        "loss": committed.loss,
        "written_bytes_total": committed.written_bytes,
        "skipped_steps": committed.skipped_steps,
    }
    return json.dumps({**nothing, **known, "made_anew": True}).encode() + b"\n"


_REPORT = TypeAdapter(StepReport)
