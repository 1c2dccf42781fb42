"""The training loop, in the order in which things happen: train, evaluate, log. A commit rides along with its step."""

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any

import psutil

from megatrain_io.data.batch import MicroBatch, trained_tokens
from megatrain_io.errors import (
    InterruptedRunError,
    NotFiniteError,
    TrainingDivergedError,
    WearLimitError,
)
from megatrain_io.interrupt import check, is_requested
from megatrain_io.machine.memory import peak_ram
from megatrain_io.paging.paged_model import PagedPartition, StepLoss
from megatrain_io.runs.metrics import StepReport, TrainResult, last_report
from megatrain_io.runs.state import TrainerState
from megatrain_io.store.paged_store import AdamWStep
from megatrain_io.training.callbacks import Callback, Callbacks, MetricsCallback
from megatrain_io.training.fingerprint import fingerprint_of
from megatrain_io.training.plan_check import PlanCheck, Totals
from megatrain_io.training.setup import SAFE, Setup
from megatrain_io.training.step_data import StepData
from megatrain_io.training.watch import LossWatch, RamWatch
from megatrain_io.training.wear import WearLimit

__all__ = ["TrainingRun", "held_out_loss"]

# Steps in a row whose gradients are not finite: then no later one will be.
_SKIPS_MAX = 3
# Micro-batches that go through the blocks together when the held-out loss is measured.
_EVAL_MICRO_BATCHES = 16


def held_out_loss(model: PagedPartition, data: StepData, accumulation: int) -> float | None:
    """Mean loss per trained token of what is held out; None where nothing is.

    Args:
        model: that measures it.
        data: of the run.
        accumulation: micro-batches of a step: a device's memory was divided for so many.

    Raises:
        KeyboardInterrupt: a stop was asked for.
    """
    together = min(_EVAL_MICRO_BATCHES, accumulation) if model.device.has_own_memory else _EVAL_MICRO_BATCHES
    total, tokens = 0.0, 0
    waiting = data.held_out()
    while group := list(islice(waiting, together)):
        check()
        part = model.evaluate(group)
        total += part.loss * part.trained_tokens
        tokens += part.trained_tokens
    return total / tokens if tokens else None


class TrainingRun:
    """A run while it is trained; it is what callbacks see as ``callbacks.Run``.

    Args:
        setup: the run, ready to train.
        callbacks: those of the caller.
        started: when this start began, in seconds of ``time.monotonic``.

    Attributes:
        config: of the run, with a value in place of each ``auto``.
        plan: of the run on this machine.
        notes: sentences about how it starts.
        model: whose steps it makes.
        max_steps: last step of the run.
        progress: how far it is.
    """

    def __init__(self, setup: Setup, callbacks: Sequence[Callback], started: float) -> None:
        self._started = started
        self.config = setup.config
        self.plan = setup.plan
        self.notes: Sequence[str] = setup.notes
        self.model = setup.model
        self.max_steps = setup.max_steps
        self.progress = setup.progress
        self._accumulation = setup.job.accumulation
        self._data = setup.data
        self._state = setup.model.state
        self._process = psutil.Process()
        self._meter = _Meter(setup.model)
        # Steps that were lost have been written all the same.
        last = last_report(setup.folder.metrics)
        self._written_before = max(self.progress.written_bytes, last.written_bytes_total if last else 0)
        # Bytes read and written by the training steps of this start, and the number of these steps.
        self._trained = [0, 0]
        self._steps = 0
        self._eval_loss: float | None = None
        # Loss of each step that is left out, because its gradients are not finite.
        self._skips: dict[int, float] = {}
        # The step that is being trained; None between two.
        self._under_way: int | None = None
        self._commits_next = False
        self._is_committed = True
        self._is_stopped = False
        self._warnings: list[str] = []
        self._is_scratch = self._state.layout.durability == "scratch"
        self._digest = setup.digest
        self._recorded = setup.recorded
        self._learning_rate = setup.learning_rate
        self._plan_check = PlanCheck(
            self.plan, setup.job.steps_to_a_commit, Totals.of(self.progress.compared)
        )
        self._wear_limit = WearLimit(self.plan.committing_bytes, setup.job.max_tbw)
        # The limit comes last: when it ends the run, all others know of the step.
        self._callbacks = Callbacks(
            [
                MetricsCallback(setup.folder.metrics, SAFE),
                self._plan_check,
                *callbacks,
                LossWatch(setup.model.partition.vocab_size),
                RamWatch(),
                self._wear_limit,
            ]
        )

    @property
    def step(self) -> int:
        """The last step that was trained; 0 before the first."""
        return self.progress.step

    @property
    def written_bytes(self) -> int:
        """Bytes written to the drives in all starts of the run so far."""
        return self._written_before + self._meter.now().written

    def commit_next(self) -> None:
        """Let the next step be committed, whatever ``memory.commit_every`` says."""
        self._commits_next = True

    def stop(self) -> None:
        """End the training with this step, which is committed now; with the next, if that must write what is in RAM."""
        self._is_stopped = True

    def warn(self, message: str) -> None:
        """Tell all callbacks, and the result, of something that should be looked at."""
        self._warnings.append(message)
        self._callbacks.on_warning(self, message)

    def wait_durable(self) -> None:
        """Wait until all finished steps are durable, if they were to be committed."""
        self.model.wait_durable()

    # ------------------------------------------------------------------------------------------- the loop

    def train(self) -> TrainResult:
        """Train all steps that are left, and wait until the last one is durable.

        Raises:
            InterruptedRunError: Ctrl-C, SIGTERM, SIGHUP or SIGUSR1; the run can be resumed.
            WearLimitError: one more step could write more than ``memory.max_tbw``; the run can be resumed.
            MegatrainIoError: one of its kinds, as its message says.
        """
        try:
            self._loop()
        except BaseException as error:
            try:
                told = self._ended_by(error)
            finally:
                # That error is the news, not what a callback then says.
                with suppress(Exception):
                    self._callbacks.on_end(self)
            if told is error:
                raise
            raise told from None
        self._callbacks.on_end(self)
        return self._result(time.monotonic() - self._started)

    def _loop(self) -> None:
        self._callbacks.on_start(self)
        if self.step == 0:
            self.progress.eval_loss_before = self._evaluate()
        self._meter.lap()
        while self.step < self.max_steps and not (self._is_ending and self._is_committed):
            number, began = self.step + 1, time.monotonic()
            micro_batches = self._data.step(number, self._accumulation)
            try:
                loss, learning_rate = self._train(number, micro_batches)
            except NotFiniteError as error:
                self._will_skip(error)
                self._meter.lap()
                continue
            self._tell(loss, learning_rate, micro_batches, began)
            if self._is_ending:
                self._commit_what_is_trained()
        self.wait_durable()
        if self.step < self.max_steps:
            check()
            self._callbacks.on_pause(self, "a callback has stopped it")

    @property
    def _is_ending(self) -> bool:
        """Whether the run ends with the next committed step."""
        return self._is_stopped or is_requested()

    def _tell(
        self, loss: StepLoss, learning_rate: float, micro_batches: Sequence[MicroBatch], began: float
    ) -> None:
        """Evaluate, if that is due, and report the step that was trained: also if something fails in between."""
        evaluates, eval_loss = self._is_evaluated(self.step), None
        moved, seconds, ended = None, 0.0, None
        try:
            if evaluates:
                # What is still to be written belongs to this step, not to the evaluation.
                self.wait_durable()
            moved, seconds = self._meter.lap(), time.monotonic() - began
            if evaluates:
                eval_loss = self._evaluate()
        except BaseException as error:  # noqa: BLE001 - the step may be committed by now: it is reported first
            ended = error
        report = self._report(
            loss, learning_rate, micro_batches, moved or self._meter.lap(), seconds, eval_loss
        )
        if evaluates:
            self._meter.lap()
        # A stop ends the loop at its own place: no step must be lost for a held-out loss.
        is_stop = isinstance(ended, KeyboardInterrupt) and is_requested()
        if is_stop and self.step == self.max_steps:
            self.warn("the held-out loss of the last step was not measured: a stop was asked for meanwhile")
        if ended is None or is_stop:
            self._callbacks.on_step(self, report)
            return
        with suppress(Exception):
            self._callbacks.on_step(self, report)
        raise ended

    def _commit_what_is_trained(self) -> None:
        """Commit the steps since the last commit now, if that needs no other step.

        What changed in RAM alone is written by the update of a step that commits: then it is the next one.
        """
        kept = self._state.residents
        is_in_ram = bool(kept.records or kept.chunks)
        if not self._is_committed and self._under_way is None and not is_in_ram:
            self.model.skip(self._blob_of(self.step)(self.progress.loss or 0.0))
            self._is_committed = True

    def _train(self, step: int, micro_batches: Sequence[MicroBatch]) -> tuple[StepLoss, float]:
        """Train one step, or leave it out; returns its loss and its learning rate."""
        config = self.config.train
        if step in self._skips:
            self.progress.skipped_steps += 1
            loss = StepLoss(self._skips[step], trained_tokens(micro_batches))
            self.model.skip(self._blob_of(step)(loss.loss))
            self._is_committed, self._commits_next = True, False
            self.progress.step, self.progress.loss = step, loss.loss
            return loss, 0.0
        # A step that is skipped counts for neither AdamW's t nor the learning rate, as in stock loops.
        number = step - self.progress.skipped_steps
        adamw = AdamWStep(
            number,
            self._learning_rate(number),
            config.adam_beta1,
            config.adam_beta2,
            config.adam_epsilon,
        )
        commits = self._is_due(step)
        blob = self._blob_of(step) if commits else None
        self._under_way = step
        loss = self.model.train_step(micro_batches, adamw, blob, number=step)
        self._under_way = None
        self._is_committed, self._commits_next = commits, False
        self.progress.step, self.progress.loss = step, loss.loss
        self._steps += 1
        return loss, adamw.learning_rate

    def _is_due(self, step: int) -> bool:
        """Whether a step is committed. A scratch store's commits cost nothing: they reach the drive when it closes."""
        return (
            self._is_scratch
            or step % self.config.memory.commit_every == 0
            or step == self.max_steps
            or step + 1 in self._skips
            or self._commits_next
            or self._is_ending
        )

    def _is_evaluated(self, step: int) -> bool:
        """Whether the held-out loss is measured after a step."""
        every = self.config.train.eval_steps
        return step == self.max_steps or (every is not None and step % every == 0)

    def _evaluate(self) -> float | None:
        """Measure the held-out loss; None where nothing is held out."""
        try:
            loss = held_out_loss(self.model, self._data, self._accumulation)
        except BaseException:
            # Between two passes nothing is lost. Within one the steps since the last commit are.
            self._under_way = None if is_requested() else self.step
            self._eval_loss = None
            raise
        if loss is not None:
            self._eval_loss = loss
            self._callbacks.on_evaluate(self, loss)
        return loss

    # ------------------------------------------------------------------------------- what ends or interrupts it

    def _will_skip(self, error: NotFiniteError) -> None:
        """Go back to the last commit; from there on the step whose gradients are not finite is left out."""
        if getattr(error, "__notes__", None):
            raise error  # there is no commit to go back to: a note says so
        step, eval_loss_before = self._under_way or 0, self.progress.eval_loss_before
        self._under_way = None
        self.progress = TrainerState.parse(self._state.blob)
        self.progress.eval_loss_before = eval_loss_before
        self._is_committed = True
        self._skips[step] = error.loss or 0.0
        if all(earlier in self._skips for earlier in range(step - _SKIPS_MAX + 1, step + 1)):
            raise TrainingDivergedError(
                f"{error} in step {step}, and no gradient was in the {_SKIPS_MAX - 1} steps before it. They were "
                "skipped; the last committed step stands. Lower the learning rate, set train.max_grad_norm, or look "
                "at the data"
            ) from error
        self._callbacks.on_skip(self, step, str(error))

    def _ended_by(self, error: BaseException) -> BaseException:
        """What to tell of the error that ended the loop, after what can be kept was kept."""
        if isinstance(error, KeyboardInterrupt):
            # Between two steps nothing is lost, but what only another step could write.
            self._commit_what_is_trained()
            self.wait_durable()
            step = TrainerState.parse(self._state.blob).step
            by = f" by {error}" if str(error) else ""
            lost = (
                f" (the {self.step - step} after it are lost: memory.commit_every)"
                if self.step > step
                else ""
            )
            told: BaseException = InterruptedRunError(
                f"interrupted{by}; step {step} is the last one that was committed, and it is kept{lost}. Go on with "
                "--resume"
            )
        elif isinstance(error, WearLimitError):
            if self._steps:
                # How much was written is known to the byte now, and must be when the run goes on.
                self.model.skip(self._blob_of(self.step, is_durable=True)(self.progress.loss or 0.0))
                self.wait_durable()
            told = error
        else:
            return error
        if self._is_scratch:
            self._state.close()  # the step is kept only if this succeeds: its error is the one to tell
        with suppress(Exception):
            self._callbacks.on_pause(self, str(told))
        return told

    # ------------------------------------------------------------------------------------------ what is told

    def _blob_of(self, step: int, *, is_durable: bool = False) -> Callable[[float], bytes]:
        """Makes the trainer's state after a step from the step's loss."""

        def encode(loss: float) -> bytes:
            fields: dict[str, Any] = asdict(self.progress) | {
                "step": step,
                "loss": loss,
                "settings": self._digest,
                "configuration": self._recorded,
                "compared": self._plan_check.recorded(),
                "data": self._data.sha256,
                "written_bytes": self._wear_limit.at_most(self.written_bytes, is_durable=is_durable),
                "environment": fingerprint_of(self.model.device, self.model.partition),
            }
            return TrainerState(**fields).encode()

        return encode

    def _report(
        self,
        loss: StepLoss,
        learning_rate: float,
        micro_batches: Sequence[MicroBatch],
        moved: "_Moved",
        seconds: float,
        eval_loss: float | None,
    ) -> StepReport:
        self._trained[0] += moved.read
        self._trained[1] += moved.written
        return StepReport(
            step=self.step,
            max_steps=self.max_steps,
            loss=loss.loss,
            learning_rate=learning_rate,
            tokens=sum(batch.input_ids.numel() for batch in micro_batches),
            trained_tokens=trained_tokens(micro_batches),
            seconds=seconds,
            read_bytes=moved.read,
            written_bytes=moved.written,
            stalled_seconds=sum(moved.stalled.values()),
            ram_bytes=self._process.memory_info().rss,
            ledger_bytes=self._state.ledger.total()[0],
            written_bytes_total=self._written_before + moved.written_so_far,
            eval_loss=eval_loss,
            stalled=dict(moved.stalled),
            grad_norm=loss.grad_norm,
            clip_coefficient=loss.clip_coefficient,
            skipped_steps=self.progress.skipped_steps,
        )

    def _result(self, seconds: float) -> TrainResult:
        """Losses, time, traffic and memory of this start, which took ``seconds``."""
        parameters = self._state.layout.parameters
        peak = peak_ram()
        self._plan_check.add_written(self._meter.lap().written)
        per_step = [count / self._steps / parameters if self._steps else None for count in self._trained]
        return TrainResult(
            steps=self.step,
            loss=self.progress.loss,
            eval_loss_before=self.progress.eval_loss_before,
            eval_loss=self._eval_loss,
            seconds=seconds,
            parameters=parameters,
            read_bytes_per_parameter_and_step=per_step[0],
            written_bytes_per_parameter_and_step=per_step[1],
            written_bytes_total=self.written_bytes,
            peak_ram_bytes=peak,
            ledger=self._state.ledger.balances(),
            plan=self._plan_check.compared(self._state.ledger.total()[1], peak),
            warnings=tuple(self._warnings),
        )


@dataclass(frozen=True)
class _Moved:
    """Bytes moved, and seconds that compute waited by cause, since the lap before; and all that was written so far."""

    read: int
    written: int
    stalled: Mapping[str, float]
    written_so_far: int = 0


class _Meter:
    """Counts what the steps of a model move, from lap to lap, so that no byte falls in between."""

    def __init__(self, model: PagedPartition) -> None:
        self._model = model
        self._last = self.now()

    def now(self) -> _Moved:
        """All that was moved by this start so far."""
        timings, saved = self._model.state.timings().items(), self._model.saved
        stalled = {name.removeprefix("stall_"): value for name, value in timings if name.startswith("stall_")}
        stalled["inputs"] = saved.stalled_seconds
        moved = zip(self._model.state.io_bytes(), saved.io_bytes(), strict=True)
        read, written = (state + inputs for state, inputs in moved)
        return _Moved(read, written, stalled)

    def lap(self) -> _Moved:
        """What was moved since the last call."""
        now, before = self.now(), self._last
        self._last = now
        stalled = {cause: now.stalled[cause] - before.stalled[cause] for cause in now.stalled}
        return _Moved(now.read - before.read, now.written - before.written, stalled, now.written)
