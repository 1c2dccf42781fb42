"""The training loop: from a configuration to a trained run, resumable at any step."""

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil

from megatrain_io.config.schema import RunConfig
from megatrain_io.data.batch import MicroBatch, trained_tokens
from megatrain_io.errors import (
    ConfigError,
    InterruptedRunError,
    MegatrainIoError,
    NotFiniteError,
    TrainingDivergedError,
    WearLimitError,
)
from megatrain_io.files import replace_file, storage_errors
from megatrain_io.machine.memory import peak_ram
from megatrain_io.models.partition import PartitionedModel
from megatrain_io.paging.device.base import Device
from megatrain_io.paging.paged_model import PagedModel, StepLoss
from megatrain_io.paging.trace import Trace
from megatrain_io.planning.memory_needs import activation_budget_of
from megatrain_io.planning.resolve import device_for, precision_of, resolve_precision
from megatrain_io.runs.folder import RunFolder, activations_file, gradient_file
from megatrain_io.runs.import_model import import_model
from megatrain_io.runs.metrics import MetricsFile, StepReport, TrainResult, last_report
from megatrain_io.runs.open_store import open_store
from megatrain_io.runs.state import TrainerState
from megatrain_io.store.layout import ModelLayout, TensorPlace
from megatrain_io.store.paged_store import AdamWStep, PagedStore, TensorSettings, store_memory
from megatrain_io.training.fingerprint import differences, fingerprint_of
from megatrain_io.training.interrupt import after_the_step
from megatrain_io.training.lr_schedule import learning_rate_at
from megatrain_io.training.plan_check import PlanCheck
from megatrain_io.training.reporters import Reporter
from megatrain_io.training.setup import Start
from megatrain_io.training.wear import WearLimit

__all__ = ["train"]

# Steps in a row whose gradients are not finite: then no later one will be.
_SKIPS_MAX = 3
# Micro-batches that go through the blocks together when the held-out loss is measured.
_EVAL_MICRO_BATCHES = 16


def train(config: RunConfig, *, resume: bool, reporter: Reporter, trace: Trace | None = None) -> TrainResult:
    """Train ``config``, importing the model first if the run has no store yet.

    Every step is durable before the next one writes anything, so an end at any moment loses one step at
    most (``memory.commit_every`` steps; one more with ``train.max_grad_norm``); with ``memory.durability``
    scratch it loses the run, and Ctrl-C waits for the end of the step. Random numbers and the order of the
    data follow from seed and step alone: a resumed run has the bits of one that was never stopped.

    Args:
        config: what to train.
        resume: go on with a run that has begun; without it such a run is refused.
        reporter: told of every step.
        trace: gets what ran when.

    Returns:
        Losses, time, traffic and memory of this start.

    Raises:
        MegatrainIoError: one of its kinds, as its message says.
        InterruptedRunError: Ctrl-C; the run can be resumed.
        WearLimitError: one more step could write more than ``memory.max_tbw``; the run can be resumed.
    """
    started = time.monotonic()
    run = RunFolder(Path(config.output_dir))
    safe = "the last committed step is safe: go on with --resume"
    with ExitStack() as open_:
        device = open_.enter_context(closing(device_for(config)))
        without_bf16 = None if device.has_bf16 else device.name
        config, notes = resolve_precision(config, run, without_bf16=without_bf16)
        start = _import_if_needed(config, run, device, resume=resume)
        open_.enter_context(storage_errors(run.path, safe))
        state = open_.enter_context(open_store(run, engine=config.memory.io_backend))
        with closing(_Trainer(config, run, state, device, reporter, trace)) as trainer:
            trainer.prepare(start, notes, resume=resume)
            try:
                trainer.run()
            except KeyboardInterrupt:
                # A finished step is committed first, if it was to be; steps since the last commit are lost.
                trainer.wait_durable()
                kept = TrainerState.parse(state.blob).step
                if state.layout.durability == "scratch":
                    state.close()  # the step is kept only if this succeeds: its error is the one to tell
                raise InterruptedRunError(
                    f"interrupted; step {kept} is the last one that was committed, and it is kept. Go on with "
                    "--resume"
                ) from None
            finally:
                trainer.write_trace()
            return trainer.result(time.monotonic() - started)


def _import_if_needed(config: RunConfig, run: RunFolder, device: Device, *, resume: bool) -> Start | None:
    """What the run starts from, if the model had to be imported first; None where it was there already."""
    if run.is_imported:
        recorded = run.read()
        if recorded.source != str(config.model.resolve()):
            raise ConfigError(
                f"model is {config.model}, and {run.path} was imported from {recorded.source}: set it to that, or "
                "choose a new output_dir"
            )
        if recorded.precision != config.train.precision:
            raise ConfigError(
                f"train.precision is {config.train.precision}, and {run.path} was imported with {recorded.precision}: "
                "set it to that, or choose a new output_dir"
            )
        return None
    if resume:
        raise ConfigError(f"{run.path} has no run to resume: leave --resume out to start one")
    starts = []

    def prepare(partition: PartitionedModel, layout: ModelLayout) -> None:
        # Before the import, which may take long: data that cannot be read, RAM that is not enough.
        start = Start.prepare(config, run, config.model, device, partition)
        start.plan(run, layout, store_memory(layout.manifest({})), is_made=False).require_fits()
        starts.append(start)

    try:
        import_model(
            Path(config.model),
            run,
            precision=precision_of(config),
            stores=run.stores_in(config.memory.store_dir),
            durability=config.memory.durability,
            engine=config.memory.io_backend,
            before=prepare,
        )
    except KeyboardInterrupt:
        raise InterruptedRunError(
            "interrupted while the model was imported: nothing was left behind. Start again, without --resume"
        ) from None
    return starts[0]


class _Trainer:
    """One start of a run: it prepares everything, then trains until the last step."""

    def __init__(
        self,
        config: RunConfig,
        run: RunFolder,
        state: PagedStore,
        device: Device,
        reporter: Reporter,
        trace: Trace | None,
    ) -> None:
        self._config = config
        self._device = device
        self._run = run
        self._state = state
        self._reporter = reporter
        self._trace = trace
        self._process = psutil.Process()
        self.progress = TrainerState.parse(state.blob)
        # Steps that were lost have been written all the same.
        last = last_report(run.metrics)
        self._written_before = max(self.progress.written_bytes, last.written_bytes_total if last else 0)
        self._is_near_limit = False
        # Bytes read and written by the training steps of this start, and the number of these steps.
        self._trained = [0, 0]
        self._steps = 0
        self._eval_loss: float | None = None
        self._closing = ExitStack()
        # Loss of each step that is left out, because its gradients are not finite.
        self._skips: dict[int, float] = {}
        self._under_way = 0
        self._is_scratch = state.layout.durability == "scratch"

    def prepare(self, imported: Start | None, notes: Sequence[str], *, resume: bool) -> None:
        """Make everything ready; whatever can be refused is refused here, before the first step.

        Args:
            imported: what was prepared for the import, if there was one.
            notes: sentences to tell at the start besides.
            resume: go on with a run that has begun.

        Raises:
            ConfigError: the run has begun, and ``resume`` is not set; or settings or data are not those it began with.
            DoesNotFitError: RAM, VRAM or drive are too small.
        """
        config, progress = self._config, self.progress
        stored, asked = self._state.layout.durability, config.memory.durability
        if stored != asked:
            raise ConfigError(
                f"memory.durability is {asked}, and the store of {self._run.path} was made with {stored}: set it to "
                "that, or choose a new output_dir"
            )
        if progress.step > 0 and not resume:
            raise ConfigError(
                f"{self._run.path} has a run at step {progress.step}: go on with --resume, or choose a new output_dir"
            )
        start = imported or Start.prepare(config, self._run, self._run.model, self._device)
        config = self._config = start.config
        self._accumulation, self._data, self._max_steps = start.accumulation, start.data, start.max_steps
        self._check_resume(progress)
        start.keep_chat_template(self._run.model)
        plan = start.plan(self._run, self._state.layout, self._state.ledger.total()[0], is_made=True)
        memory = plan.require_fits().memory
        if memory is None:
            raise MegatrainIoError("the plan fits, and does not say how RAM is divided")
        commit_every = 1 if self._is_scratch else config.memory.commit_every
        self._plan_check = PlanCheck(plan, commit_every)
        self._wear_limit = WearLimit(plan.committing_bytes, config.memory.max_tbw)
        scratch = [activations_file(store) for store in self._run.store_paths()]
        self._model = PagedModel(
            start.partition,
            self._state,
            seed=config.train.seed,
            activations=activation_budget_of(memory, scratch),
            max_grad_norm=config.train.max_grad_norm,
            trace=self._trace,
            device=self._device,
            vram=plan.vram,
        )
        self._state.start(
            memory.pool,
            residents=memory.residents,
            gradient_files=[*map(gradient_file, self._run.store_paths())] if memory.spills_gradients else (),
            settings=lambda place: _settings(place, config.train.weight_decay),
            threads=config.memory.threads,
            unit=self._model.unit,
        )
        is_pinned = self._closing.enter_context(self._device.pin(self._state.pool_memory()))
        self._closing.callback(self._model.close)
        if self._trace is not None:
            self._state.record_events()
            self._model.record_device_events()
        replace_file(self._run.config, config.to_yaml())
        self._metrics = MetricsFile(self._run.metrics, progress.step)
        now = fingerprint_of(self._device, start.partition)
        notes = [
            *notes,
            *self._state.notes,
            *start.partition.loss_notes,
            *differences(self.progress.environment, now),
        ]
        notes += [*plan.summary(), str(self._data.summary)]
        if not is_pinned:
            notes.insert(
                0,
                f"copies to and from {self._device.name} go through a small staging buffer, because its driver "
                "refused to pin the pool's memory",
            )
        if imported is not None:
            notes.insert(0, f"imported {config.model} into {self._state.path}")
        self._reporter.started(step=progress.step, max_steps=self._max_steps, notes=notes)

    def run(self) -> None:
        """Train all steps that are left, and wait until the last one is durable."""
        with self._metrics:
            if self.progress.step == 0:
                self.progress.eval_loss_before = self._evaluate()
            before = self._counters()
            while self.progress.step < self._max_steps:
                self._check_wear()
                try:
                    before = self._train(self.progress.step + 1, before)
                except NotFiniteError as error:
                    self._will_skip(error)
                    before = self._counters()
                self.write_trace()
            self._model.wait_durable()

    def _train(
        self, step: int, before: tuple[int, int, Mapping[str, float]]
    ) -> tuple[int, int, Mapping[str, float]]:
        """Train one step; returns the counters from which the next one counts."""
        began = time.monotonic()
        config, micro_batches = self._config.train, self._micro_batches(step)
        # A step that is skipped counts for neither AdamW's t nor the learning rate, as in stock loops.
        number = step - self.progress.skipped_steps
        adamw = AdamWStep(
            number,
            learning_rate_at(config, number, self._max_steps),
            config.adam_beta1,
            config.adam_beta2,
            config.adam_epsilon,
        )
        if step in self._skips:
            self.progress.skipped_steps += 1
            step_loss = StepLoss(self._skips[step], trained_tokens(micro_batches))
            self._model.skip(self._blob_of(step)(step_loss.loss))
            self.progress.step, self.progress.loss = step, step_loss.loss
            return self._report(step, step_loss, 0.0, micro_batches, began, before)
        # A scratch store's commits cost nothing: they reach the drive when it is closed.
        commits = (
            self._is_scratch
            or step % self._config.memory.commit_every == 0
            or step == self._max_steps
            or step + 1 in self._skips
            or self._is_near_limit
        )
        self._under_way = step
        with after_the_step() if self._is_scratch else nullcontext():
            step_loss = self._model.train_step(
                micro_batches, adamw, self._blob_of(step) if commits else None, number=step
            )
        self.progress.step, self.progress.loss = step, step_loss.loss
        self._steps += 1
        return self._report(step, step_loss, adamw.learning_rate, micro_batches, began, before)

    def _will_skip(self, error: NotFiniteError) -> None:
        """Go back to the last commit; from there on the step whose gradients are not finite is left out."""
        if getattr(error, "__notes__", None):
            raise error  # there is no commit to go back to: a note says so
        step, eval_loss_before = self._under_way, self.progress.eval_loss_before
        self.progress = TrainerState.parse(self._state.blob)
        self.progress.eval_loss_before = eval_loss_before
        self._skips[step] = error.loss or 0.0
        if all(earlier in self._skips for earlier in range(step - _SKIPS_MAX + 1, step + 1)):
            raise TrainingDivergedError(
                f"{error} in step {step}, and no gradient was in the {_SKIPS_MAX - 1} steps before it. They were "
                "skipped; the last committed step stands. Lower the learning rate, set train.max_grad_norm, or look "
                "at the data"
            ) from error
        self._metrics.go_back(self.progress.step)
        self._reporter.note(f"step {step} is skipped: {error}; nothing is updated by it")

    def _check_wear(self) -> None:
        """Pause before a step that could write more than the run may."""
        self._is_near_limit = self._wear_limit.is_near(self._written_total())
        if not self._is_near_limit:
            return
        self.wait_durable()
        try:
            self._wear_limit.check(self._written_total(), self.progress.step)
        except WearLimitError:
            if self._steps:
                # How much was written is known to the byte now, and must be when the run goes on.
                self._model.skip(self._blob_of(self.progress.step, is_durable=True)(self.progress.loss))
                self.wait_durable()
            if self._is_scratch:
                self._state.close()  # the step is kept only if this succeeds: its error is the one to tell
            raise

    def wait_durable(self) -> None:
        """Wait until all finished steps are durable, if they were to be committed."""
        self._model.wait_durable()

    def write_trace(self) -> None:
        """Append the events since the last call to the trace, if there is one."""
        if self._trace is not None:
            self._trace.extend(*self._state.take_events())
            self._trace.extend(self._model.take_device_events(), 0)
            self._trace.flush()

    def result(self, seconds: float) -> TrainResult:
        """Losses, time, traffic and memory of this start, which took ``seconds``."""
        parameters = self._state.layout.parameters
        peak = peak_ram()
        per_step = [count / self._steps / parameters if self._steps else None for count in self._trained]
        return TrainResult(
            steps=self.progress.step,
            loss=self.progress.loss,
            eval_loss_before=self.progress.eval_loss_before,
            eval_loss=self._eval_loss,
            seconds=seconds,
            parameters=parameters,
            read_bytes_per_parameter_and_step=per_step[0],
            written_bytes_per_parameter_and_step=per_step[1],
            written_bytes_total=self._written_total(),
            peak_ram_bytes=peak,
            ledger=self._state.ledger.balances(),
            plan=self._plan_check.compared(self._state.ledger.total()[1], peak),
        )

    def _report(
        self,
        step: int,
        made: StepLoss,
        learning_rate: float,
        micro_batches: Sequence[MicroBatch],
        began: float,
        before: tuple[int, int, Mapping[str, float]],
    ) -> tuple[int, int, Mapping[str, float]]:
        """Report a step; returns the counters from which the next one counts, so that no byte falls in between."""
        last = step == self._max_steps
        evaluates = last or (
            self._config.train.eval_steps is not None and step % self._config.train.eval_steps == 0
        )
        if evaluates:
            # What is still to be written belongs to this step, not to the evaluation.
            self._model.wait_durable()
        after, seconds = self._counters(), time.monotonic() - began
        self._trained[0] += after[0] - before[0]
        self._trained[1] += after[1] - before[1]
        stalled = {cause: after[2][cause] - before[2][cause] for cause in after[2]}
        eval_loss = self._evaluate() if evaluates else None
        report = StepReport(
            step=step,
            max_steps=self._max_steps,
            loss=made.loss,
            learning_rate=learning_rate,
            tokens=sum(batch.input_ids.numel() for batch in micro_batches),
            trained_tokens=trained_tokens(micro_batches),
            seconds=seconds,
            read_bytes=after[0] - before[0],
            written_bytes=after[1] - before[1],
            stalled_seconds=sum(stalled.values()),
            ram_bytes=self._process.memory_info().rss,
            ledger_bytes=self._state.ledger.total()[0],
            written_bytes_total=self._written_before + after[1],
            eval_loss=eval_loss,
            stalled=stalled,
            grad_norm=made.grad_norm,
            clip_coefficient=made.clip_coefficient,
            skipped_steps=self.progress.skipped_steps,
        )
        self._metrics.append(report)
        self._plan_check.add(report)
        self._reporter.step(report)
        return self._counters() if evaluates else after

    def _evaluate(self) -> float | None:
        """Measure the mean loss per trained token of the held-out rows; None where there are none."""
        rows = self._data.eval
        if rows is None:
            return None
        batch = self._config.train.per_device_train_batch_size
        micro_batches = [
            rows.micro_batch(range(start, min(start + batch, len(rows))))
            for start in range(0, len(rows), batch)
        ]
        total, tokens = 0.0, 0
        together = _EVAL_MICRO_BATCHES
        if self._device.has_own_memory:
            together = min(together, self._accumulation)  # its memory was divided for so many
        for start in range(0, len(micro_batches), together):
            group = micro_batches[start : start + together]
            part = self._model.evaluate(group)
            total += part.loss * part.trained_tokens
            tokens += part.trained_tokens
        self._eval_loss = total / tokens
        return self._eval_loss

    def _micro_batches(self, step: int) -> list[MicroBatch]:
        rows = self._data.train
        batch, count = self._config.train.per_device_train_batch_size, self._accumulation
        indices = self._data.order.indices_for_step(step, batch * count)
        return [rows.micro_batch(indices[start : start + batch]) for start in range(0, batch * count, batch)]

    def _blob_of(self, step: int, *, is_durable: bool = False) -> Any:
        def encode(loss: float) -> bytes:
            fields = asdict(self.progress) | {
                "step": step,
                "loss": loss,
                "settings": self._settings_digest(),
                "data": self._data.train.sha256,
                "written_bytes": self._wear_limit.at_most(self._written_total(), is_durable=is_durable),
                "environment": fingerprint_of(self._device, self._model.partition),
            }
            return TrainerState(**fields).encode()

        return encode

    def _check_resume(self, progress: TrainerState) -> None:
        if progress.step == 0:
            return
        if progress.data != self._data.train.sha256:
            raise ConfigError(
                f"the run stands at step {progress.step} with other data, or other options of data (fingerprint "
                f"{progress.data[:8]}, now {self._data.train.sha256[:8]}): resume with the same, or choose a new "
                "output_dir"
            )
        if progress.settings != self._settings_digest():
            raise ConfigError(
                f"the run stands at step {progress.step} with other settings of train: compare with "
                f"{self._run.config}, resume with the same, or choose a new output_dir"
            )
        if progress.step >= self._max_steps:
            raise ConfigError(
                f"the run has done all its {self._max_steps} steps: there is nothing left to train"
            )

    def _settings_digest(self) -> str:
        """SHA-256 of all settings that decide the bits of a step, besides model and data."""
        reporting = {"device", "eval_steps", "logging_steps", "num_train_epochs"}
        settings = self._config.train.model_dump(exclude=reporting)
        settings["max_steps"] = self._max_steps
        if settings["max_grad_norm"] is None:
            del settings["max_grad_norm"]  # as in runs of versions that did not know it
        return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()

    def _counters(self) -> tuple[int, int, Mapping[str, float]]:
        """Bytes read and written so far by this start, and seconds that compute waited, by cause."""
        timings, saved = self._state.timings().items(), self._model.saved
        stalled = {name.removeprefix("stall_"): value for name, value in timings if name.startswith("stall_")}
        stalled["inputs"] = saved.stalled_seconds
        moved = zip(self._state.io_bytes(), saved.io_bytes(), strict=True)
        read, written = (state + inputs for state, inputs in moved)
        return read, written, stalled

    def _written_total(self) -> int:
        """Bytes written to the drives in all starts of the run so far."""
        return self._written_before + self._counters()[1]

    def close(self) -> None:
        """Give back what training takes in RAM, on the device and on the drives. The store stays open."""
        self._closing.close()


def _settings(place: TensorPlace, weight_decay: float) -> TensorSettings:
    """Matrices and embeddings decay, norms and biases do not: the usual recipe."""
    return TensorSettings(weight_decay if len(place.shape) > 1 else 0.0)
