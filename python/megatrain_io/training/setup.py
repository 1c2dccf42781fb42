"""What a run starts from: the partitioned model, its data, and its plan. All that can be refused is refused here."""

from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import psutil
from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase

from megatrain_io.config.parse import load
from megatrain_io.config.schema import RunConfig
from megatrain_io.data.prepare import DataOptions, TrainingData, prepare
from megatrain_io.errors import ConfigError, MegatrainIoError
from megatrain_io.files import replace_file
from megatrain_io.machine.hardware import Gpu, Hardware, this_machine
from megatrain_io.machine.memory import usable_ram
from megatrain_io.machine.profile import Profile, default_path
from megatrain_io.models.hub_folder import ModelFolder
from megatrain_io.models.partition import PartitionedModel
from megatrain_io.models.probe import probe
from megatrain_io.paging.device.base import Device
from megatrain_io.planning.job import TrainingJob
from megatrain_io.planning.plan import Plan
from megatrain_io.planning.planner import accumulation_that_hides_io, make_plan
from megatrain_io.planning.resolve import calibrate, layout_of, precision_of, ram_of
from megatrain_io.planning.step_time import forget_schedules
from megatrain_io.planning.timeline import StageKey
from megatrain_io.runs.folder import RunFolder
from megatrain_io.store.dtypes import DTYPES
from megatrain_io.store.layout import ModelLayout
from megatrain_io.store.paged_store import store_memory

__all__ = ["Start"]


@dataclass(frozen=True)
class Start:
    """What a run starts from: the partitioned model and its data.

    Attributes:
        config: of the run, with a number in place of ``auto``.
        partition: the model without its parameters.
        tokenizer: the model's.
        data: rows of tokens, and the order in which they are trained.
        max_steps: last step of the run.
        accumulation: micro-batches of a step.
        device: what computes.
    """

    config: RunConfig
    partition: PartitionedModel
    tokenizer: PreTrainedTokenizerBase
    data: TrainingData
    max_steps: int
    accumulation: int
    device: Device

    @classmethod
    def prepare(
        cls,
        config: RunConfig,
        run: RunFolder,
        model: Path,
        device: Device,
        partition: PartitionedModel | None = None,
    ) -> "Start":
        """Read configuration and tokenizer of ``model``, and tokenise the data into ``run``.

        Args:
            config: of the run.
            run: its folder.
            model: folder of the model.
            device: what computes.
            partition: the same model without its parameters, if it was partitioned before.

        Raises:
            MegatrainIoError: model, data or configuration cannot be used.
        """
        if partition is None:
            model_config: PreTrainedConfig = ModelFolder(model).config()
            partition = PartitionedModel(model_config, DTYPES[precision_of(config)], probe(model_config))
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(model, local_files_only=True)
        data = prepare(_data_options(config), tokenizer, run.data, packs=partition.spec.packs)
        largest, vocabulary = data.train.largest_token, partition.config.get_text_config().vocab_size
        if largest >= vocabulary:
            raise ConfigError(
                f"the tokenizer makes token {largest}, and the model's vocabulary has {vocabulary}: tokenizer and "
                "model do not belong together"
            )
        accumulation = config.train.gradient_accumulation_steps
        if accumulation == "auto":
            accumulation = _chosen_before(run) or _choose(config, run, partition, data, device)
        train = config.train.model_copy(update={"gradient_accumulation_steps": accumulation})
        config = config.model_copy(update={"train": train})
        rows_per_step = train.per_device_train_batch_size * accumulation
        steps = train.max_steps or data.order.steps(train.num_train_epochs, rows_per_step)
        return cls(config, partition, tokenizer, data, steps, accumulation, device)

    def plan(self, run: RunFolder, layout: ModelLayout, tables: int, *, is_made: bool) -> Plan:
        """Plan the run on this machine.

        Args:
            run: its folder.
            layout: of the store.
            tables: bytes of RAM that the store takes when it is open.
            is_made: whether the store is there already; if not, no times are measured.
        """
        job = replace(
            _job(self.config, self.partition, layout, tables, self.data, self.device),
            steps=self.max_steps,
            is_made=is_made,
        )
        hardware = _hardware(self.config, run, job.ram, self.device)
        compute = _seconds_of(job, hardware, self.data) if is_made else None
        libraries = psutil.Process().memory_info().rss
        count = self.accumulation
        plan = make_plan(
            job.with_accumulation(count),
            hardware,
            compute=compute and {stage: count * seconds for stage, seconds in compute.items()},
            usable=None if self.config.memory.ram is None else usable_ram(),
            libraries=libraries,
            variants=False,
        )
        forget_schedules()
        return plan

    def keep_chat_template(self, model: Path) -> None:
        """Write the tokenizer to ``model``, with the chat template of the data, if one was chosen."""
        if self.data.chat_template is None:
            return
        self.tokenizer.chat_template = self.data.chat_template
        with TemporaryDirectory() as folder:
            self.tokenizer.save_pretrained(folder)
            for file in sorted(Path(folder).iterdir()):
                replace_file(model / file.name, file.read_bytes())


def _job(
    config: RunConfig,
    partition: PartitionedModel,
    layout: ModelLayout,
    tables: int,
    data: TrainingData,
    device: Device,
) -> TrainingJob:
    """The run as a job whose step has one micro-batch, the largest of the data."""
    batch = data.train.largest_micro_batch(config.train.per_device_train_batch_size)
    vram = device.vram if device.has_own_memory else None
    return TrainingJob(config, partition, layout, [batch], tables, ram_of(config), vram=vram)


def _hardware(config: RunConfig, run: RunFolder, ram: int, device: Device) -> Hardware:
    stores = run.store_paths() if run.is_imported else run.stores_in(config.memory.store_dir)
    profile = None
    with suppress(MegatrainIoError):  # no profile, or none that can be read, is no reason not to train
        profile = Profile.read(default_path())
    gpu = None
    if device.has_own_memory:
        gpu = Gpu(name=device.name, vram=device.vram, has_bf16=device.has_bf16)
    return this_machine([store.parent for store in stores], ram, precision_of(config), profile, gpu=gpu)


def _seconds_of(job: TrainingJob, hardware: Hardware, data: TrainingData) -> dict[StageKey, float] | None:
    """Seconds of the stages of one micro-batch of rows of mean length; ``job`` has the longest."""
    compute = calibrate(job, hardware)
    if compute is None:
        return None
    share = data.train.tokens / (len(data.train) * max(1, data.train.longest_row))
    return {stage: share * seconds for stage, seconds in compute.items()}


def _chosen_before(run: RunFolder) -> int | None:
    """What ``auto`` came to when the run began, if it has: it decides the bits, so it stays."""
    if not run.is_imported or not run.config.exists():
        return None
    count = load(run.config)[0].train.gradient_accumulation_steps
    return None if count == "auto" else count


def _choose(
    config: RunConfig, run: RunFolder, partition: PartitionedModel, data: TrainingData, device: Device
) -> int:
    """As many micro-batches as hide the drive behind computing, and no more than there are rows."""
    layout = layout_of(config, partition)
    job = _job(config, partition, layout, store_memory(layout.manifest({})), data, device)
    hardware = _hardware(config, run, job.ram, device)
    count = accumulation_that_hides_io(job, hardware, _seconds_of(job, hardware, data))
    return min(count, max(1, len(data.train) // config.train.per_device_train_batch_size))


def _data_options(config: RunConfig) -> DataOptions:
    data = config.data
    return DataOptions(
        train=tuple(Path(path) for path in data.train),
        eval=Path(data.eval) if isinstance(data.eval, str) else data.eval,
        format=None if data.format == "auto" else data.format,
        fields=data.fields or {},
        max_length=data.max_length,
        packing=data.packing,
        assistant_only_loss=data.assistant_only_loss,
        chat_template=data.chat_template,
        seed=config.train.seed,
    )
