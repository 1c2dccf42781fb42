"""The figures of a run, for each step and at its end, and the file of the former. No torch."""

import json
import os
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from megatrain_io.files import replace_file

__all__ = ["MetricsFile", "StepReport", "TrainResult", "last_report"]

_TAIL_BYTES = 1 << 16
"""Bytes at the end of the file, some hundred lines: the last whole one is among them."""


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

    step: int
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


def last_report(path: Path) -> StepReport | None:
    """The newest whole line of a metrics file, also while it is written; None where there is none."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - _TAIL_BYTES))
            lines = file.read().splitlines()
    except OSError:
        return None
    for line in reversed(lines):
        try:
            return StepReport(**json.loads(line))
        except (ValueError, TypeError):
            continue  # cut short by a crash, or not yet written to its end
    return None


class MetricsFile:
    """Metrics as JSON lines, one for each step, in step order without repeats.

    A line is durable when ``append`` returns. A step becomes durable by itself: a power cut between the two
    may take the line of the last committed step, no other.
    """

    def __init__(self, path: Path, committed_step: int) -> None:
        """Open for appending; lines of steps after ``committed_step``, which an earlier start lost, are removed."""
        self._path = path
        self._open(committed_step)

    def go_back(self, committed_step: int) -> None:
        """Remove the lines of steps after ``committed_step``: they will be trained again."""
        self._file.close()
        self._open(committed_step)

    def _open(self, committed_step: int) -> None:
        kept, path = [], self._path
        if path.exists():
            for line in path.read_text(encoding="utf-8").splitlines():
                try:
                    step = json.loads(line)["step"]
                except (ValueError, KeyError, TypeError):
                    break  # a line that a crash cut short; what follows it is not in order
                if step > committed_step:
                    break
                kept.append(line)
        replace_file(path, "".join(f"{line}\n" for line in kept))
        self._file = path.open("a", encoding="utf-8")

    def append(self, report: StepReport) -> None:
        """Write the line of one step; it is durable when this returns."""
        self._file.write(json.dumps(asdict(report)) + "\n")
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
