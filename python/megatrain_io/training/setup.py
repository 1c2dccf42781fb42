"""From a configuration to a run that is ready to train. All that can be refused is refused here, before the first step.

A model that was not imported yet is imported on the way: its files are checked first, then the data, then whether the
run fits, and only then anything is written.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import psutil

from megatrain_io.config.parse import load
from megatrain_io.config.schema import RunConfig
from megatrain_io.data.batch import MicroBatch
from megatrain_io.errors import ConfigError, InterruptedRunError, MegatrainIoError
from megatrain_io.files import replace_file, storage_errors
from megatrain_io.interrupt import at_once, check
from megatrain_io.machine.memory import usable_ram
from megatrain_io.models.hub_folder import ModelFolder
from megatrain_io.models.model_options import ModelOptions
from megatrain_io.models.partition import PartitionedModel
from megatrain_io.paging.device.base import Device
from megatrain_io.paging.paged_model import PagedPartition
from megatrain_io.planning.job import TrainingJob
from megatrain_io.planning.memory_needs import activation_budget_of
from megatrain_io.planning.plan import Plan
from megatrain_io.planning.planner import make_plan
from megatrain_io.planning.resolve import gpu_of, hardware_here, ram_of, resolve, resolve_precision
from megatrain_io.runs.folder import CARRIED, RunFolder, activations_file, gradient_file
from megatrain_io.runs.import_model import ModelImport, refuse_other_formats
from megatrain_io.runs.kept_tensors import kept_buffers
from megatrain_io.runs.model_files import mended_model, write_model_files
from megatrain_io.runs.open_store import open_store
from megatrain_io.runs.state import TrainerState
from megatrain_io.store.dtypes import DTYPES
from megatrain_io.store.layout import ModelLayout
from megatrain_io.store.paged_store import PagedStore, TensorSettings
from megatrain_io.training.fingerprint import differences, fingerprint_of, settings_digest
from megatrain_io.training.lr_schedule import learning_rate_at
from megatrain_io.training.resume import changes_of, recorded_settings
from megatrain_io.training.step_data import OwnSequence, StepData, step_data

__all__ = ["SAFE", "Setup", "planned", "ready"]

SAFE = "the last committed step is safe: go on with --resume"
"""What is left of a run whose files cannot be written."""


@dataclass(frozen=True)
class Setup:
    """A run that is ready to train: its store is open, its memory taken.

    Attributes:
        config: of the run, with what was settled in place of ``auto``.
        folder: of the run.
        job: what was settled.
        plan: of the run on this machine.
        data: what it trains on.
        max_steps: last step of the run.
        digest: of all settings that decide the bits.
        recorded: settings that a resumed run is compared with, by key.
        learning_rate: of a step, counted from 1.
        model: ready for steps; its store is ``model.state``.
        progress: how far the run was when its store was opened.
        notes: sentences to tell at the start.
    """

    config: RunConfig
    folder: RunFolder
    job: TrainingJob
    plan: Plan
    data: StepData
    max_steps: int
    digest: str
    recorded: dict[str, Any]
    learning_rate: Callable[[int], float]
    model: PagedPartition
    progress: TrainerState
    notes: list[str]


def planned(config: RunConfig, folder: RunFolder, device: Device, own: OwnSequence | None) -> Plan:
    """The plan of a run, without importing its model: its files are checked, and its data are tokenised.

    Raises:
        MegatrainIoError: model, data or configuration cannot be used.
    """
    run = _Request(config, folder, device, own)
    with ExitStack() as open_:
        if folder.is_imported:
            run.refuse_other_model()
            state = open_.enter_context(open_store(folder, engine=config.memory.io_backend))
            job, data = run.job(run.partition(state.layout), state.layout)
            plan = run.plan(job.of_store(state.ledger.total()[0]))
        else:
            checked = open_.enter_context(run.checked_import())
            run.notes += checked.notes
            job, data = run.job(checked.partition, checked.layout)
            plan = run.plan(job)
    return replace(plan, notes=(*data.not_read, *run.notes, *plan.notes))


@contextmanager
def ready(
    config: RunConfig, folder: RunFolder, device: Device, own: OwnSequence | None, *, resume: bool | None
) -> Iterator[Setup]:
    """Make a run ready to train, importing its model first if that was not done.

    Args:
        config: of the run.
        folder: of the run.
        device: what computes.
        own: data of the caller's own, if there are any.
        resume: go on with a run that has begun; False refuses one, None does not train, and asks for nothing.

    Raises:
        MegatrainIoError: model, data or configuration cannot be used, or the run does not fit.
        InterruptedRunError: Ctrl-C, SIGTERM, SIGHUP or SIGUSR1 during the import.
    """
    run = _Request(config, folder, device, own)
    with ExitStack() as open_:
        made, first = None, []
        if not folder.is_imported:
            if resume:
                raise ConfigError(
                    f"{folder.path.absolute()} has no run to resume. Relative paths of a configuration are meant from "
                    f"the current directory, {Path.cwd()}: go to the folder where the run was started, or leave "
                    "--resume out to start one here"
                )
            made = run.import_model()
            first.append(f"imported {config.model} into {folder.store_paths()[0]}")
        run.refuse_other_model()
        with storage_errors(folder.path, SAFE):
            state = open_.enter_context(open_store(folder, engine=config.memory.io_backend))
            progress = TrainerState.parse(state.blob)
            run.refuse_other_state(state, progress, resume=resume)
        job, data = made or run.job(run.partition(state.layout), state.layout)
        max_steps = job.steps
        if max_steps is None:
            raise MegatrainIoError("the number of steps is not known, and was not asked for")
        config = config.settled(precision=job.precision, accumulation=job.accumulation, files=data.files)
        digest, changes = settings_digest(config.train, max_steps), []
        if resume is not None and progress.step > 0:
            changes = changes_of(folder, progress, config, max_steps, digest=digest, data=data.sha256)
        job = job.of_store(state.ledger.total()[0])
        plan = run.plan(job).require_fits()
        check()
        with storage_errors(folder.path, SAFE):
            if resume is not None:
                write_model_files(folder, data.model_files())
                progress.stop_tokens, progress.model_files = [*data.stop_tokens], folder.read().files
            model, is_pinned = open_.enter_context(run.started(state, job, plan))
            if resume is not None:
                replace_file(folder.config, config.to_yaml())
        if not is_pinned:
            first.append(
                f"copies to and from {device.name} go through a small staging buffer, because its driver "
                "refused to pin the pool's memory"
            )
        now = fingerprint_of(device, job.partition)
        untrained = [] if made else job.partition.notes  # which an import has told
        notes = [*data.not_read, *first, *run.notes, *state.notes, *untrained, *job.partition.loss_notes]
        notes += [*changes, *differences(progress.environment, now), *plan.summary(), data.summary]
        check()
        recorded = recorded_settings(config, max_steps)
        rate = partial(learning_rate_at, config.train, max_steps=max_steps)
        # Outside: errors of callbacks and data are the caller's own.
        yield Setup(
            config, folder, job, plan, data, max_steps, digest, recorded, rate, model, progress, notes
        )


class _Request:
    """What was asked for, on the way to a run that is ready."""

    def __init__(self, config: RunConfig, folder: RunFolder, device: Device, own: OwnSequence | None) -> None:
        self._config, self._folder, self._device, self._own = config, folder, device, own
        self._carried = 0
        self._gpu = gpu_of(device)
        self._ram = ram_of(config.memory.ram)
        asked = config.train.precision
        mended = self._mended()
        self._precision, notes = resolve_precision(asked, config.model, folder, self._gpu)
        self.notes = [*mended, *notes, *config.train.doubts()]

    def partition(self, layout: ModelLayout) -> PartitionedModel:
        """The imported model without its parameters; ``layout`` is that of its store."""
        with storage_errors(self._folder.path, SAFE):
            options = ModelOptions.kept(self._folder.read().model_options)
            folder = ModelFolder(self._folder.model, dequantizes=bool(options.dequantize))
            model_config, buffers = folder.config(), kept_buffers(self._folder)
        partition = options.partition(model_config, DTYPES[self._precision])
        partition.set_buffers(buffers)
        refuse_other_formats(partition, layout, self._folder.path)
        return partition

    def checked_import(self) -> ModelImport:
        """The import of the model, whose files are sound."""
        checked = ModelImport(
            Path(self._config.model),
            self._folder,
            precision=self._precision,
            stores=self._folder.stores_in(self._config.memory.store_dir),
            durability=self._config.memory.durability,
            model_options=ModelOptions.of(self._config.model_options),
        )
        self._carried = checked.carried_nbytes
        return checked

    def import_model(self) -> tuple[TrainingJob, StepData]:
        """Import the model, once data and plan say that it can be trained; returns the job and its data."""
        try:
            with self.checked_import() as checked:
                # Before the import, which may take long: data that cannot be read, RAM that is not enough.
                job, data = self.job(checked.partition, checked.layout)
                self.plan(job).require_fits()
                checked.write(engine=self._config.memory.io_backend)
        except KeyboardInterrupt:
            raise InterruptedRunError(
                "interrupted while the model was imported: nothing was left behind. Start again, without --resume"
            ) from None
        return job, data

    def job(self, partition: PartitionedModel, layout: ModelLayout) -> tuple[TrainingJob, StepData]:
        """The job, and its data, which are tokenised if that was not done."""
        config, folder = self._config, self._folder
        accumulation = self._accumulation()
        own = self._own
        is_counted = own is not None and len(own) > 0 and isinstance(own[0], MicroBatch)
        if not is_counted:
            self.notes += partition.check_length(config.data.max_length, "data.max_length")
        with at_once():
            data = step_data(
                config.data,
                config.train,
                model=folder.model if folder.is_imported else config.model,
                cache=folder.data,
                partition=partition,
                own=self._own,
            )
        if is_counted:
            self.notes += partition.check_length(data.largest.input_ids.shape[1])
        stores = folder.store_paths() if folder.is_imported else folder.stores_in(config.memory.store_dir)
        job = resolve(
            config,
            hardware=hardware_here(stores, self._ram, self._precision, self._gpu, for_plan=False),
            precision=self._precision,
            partition=partition,
            layout=layout,
            data=data,
            accumulation=accumulation,
        )
        return job, data

    def plan(self, job: TrainingJob) -> Plan:
        """The plan of the job on this machine."""
        return make_plan(
            job,
            usable=None if self._config.memory.ram is None else usable_ram(),
            libraries=psutil.Process().memory_info().rss,
            variants=False,
            carried=self._carried,
        )

    @contextmanager
    def started(
        self, state: PagedStore, job: TrainingJob, plan: Plan
    ) -> Iterator[tuple[PagedPartition, bool]]:
        """The model with its pool and its pipeline, as planned; and whether the pool's memory is pinned."""
        memory, files = plan.memory, self._folder.store_paths()
        if memory is None:
            raise MegatrainIoError("the plan fits, and does not say how RAM is divided")
        model = PagedPartition(
            job.partition,
            state,
            seed=self._config.train.seed,
            activations=activation_budget_of(memory, [*map(activations_file, files)]),
            max_grad_norm=job.max_grad_norm,
            device=self._device,
            vram=plan.vram,
        )
        with ExitStack() as open_:
            failing = open_.enter_context(ExitStack())
            failing.callback(model.close)
            state.start(
                memory.pool,
                residents=memory.residents,
                gradient_files=[*map(gradient_file, files)] if memory.spills_gradients else (),
                settings=lambda place: TensorSettings.usual(place, self._config.train.weight_decay),
                threads=self._config.memory.threads,
                unit=model.unit,
            )
            is_pinned = open_.enter_context(self._device.pin(state.pool_memory()))
            # What is on its way to the device ends before its memory is given back.
            open_.push(failing.pop_all())
            yield model, is_pinned

    def refuse_other_model(self) -> None:
        """Refuse a run that was imported from another model, or with another precision."""
        recorded, path = self._folder.read(), self._folder.path
        if recorded.source != str(self._config.model.resolve()):
            raise ConfigError(
                f"model is {self._config.model}, and {path} was imported from {recorded.source}: set it to that, or "
                "choose a new output_dir"
            )
        if recorded.precision != self._precision:
            raise ConfigError(
                f"train.precision is {self._precision}, and {path} was imported with {recorded.precision}: "
                "set it to that, or choose a new output_dir"
            )
        asked, kept = self._config.model_options, recorded.model_options
        if asked.miniature is not None and not asked.miniature.exists() and "miniature" in kept:
            asked = asked.model_copy(update={"miniature": None})  # the run has what it held
        ModelOptions.kept(kept).refuse_others(ModelOptions.of(asked), path)

    def refuse_other_state(self, state: PagedStore, progress: TrainerState, *, resume: bool | None) -> None:
        """Refuse a store that was made otherwise, and a run that has begun where none is to be resumed."""
        stored, asked = state.layout.durability, self._config.memory.durability
        if stored != asked:
            raise ConfigError(
                f"memory.durability is {asked}, and the store of {self._folder.path} was made with {stored}: set it "
                "to that, or choose a new output_dir"
            )
        if resume is False and progress.step > 0:
            raise ConfigError(
                f"{self._folder.path} has a run at step {progress.step}: go on with --resume, or choose a new "
                "output_dir"
            )

    def _mended(self) -> list[str]:
        """Make anew what a power cut or an accident took of the run's files, and refuse what was changed."""
        folder = self._folder
        with storage_errors(folder.path, SAFE):
            notes = folder.mend(folder.stores_in(self._config.memory.store_dir)) + folder.doubts()
            if not folder.is_imported:
                return notes
            # First: what was lost is made of the imported folder, which takes the model's class.
            options = ModelOptions.kept(folder.read().model_options)
            options.run_modules(self._config.model, folder.path, at=self._config.model_options.modules)
            notes += mended_model(folder)
            carried = folder.model / CARRIED
            self._carried = carried.stat().st_size if carried.exists() else 0
            return notes

    def _accumulation(self) -> int | Literal["auto"]:
        """What was asked for; where ``auto`` came to a number when the run began, that: it decides the bits."""
        asked, written = self._config.train.gradient_accumulation_steps, self._folder.config
        if asked != "auto" or not self._folder.is_imported or not written.exists():
            return asked
        return load(written)[0].train.gradient_accumulation_steps
