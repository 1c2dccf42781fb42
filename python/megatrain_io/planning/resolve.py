"""A plan from a model folder, settings and the name of a machine; and what "auto" means for each setting."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import inf
from pathlib import Path
from typing import Any

import psutil
import torch

from megatrain_io.config.parse import load
from megatrain_io.config.schema import RunConfig
from megatrain_io.data.batch import blank_micro_batch
from megatrain_io.errors import ConfigError, MegatrainIoError
from megatrain_io.machine.hardware import Gpu, Hardware, load_hardware, this_machine
from megatrain_io.machine.memory import usable_ram
from megatrain_io.machine.profile import Profile, default_path
from megatrain_io.models.hub_folder import ModelFolder
from megatrain_io.models.partition import PartitionedModel, model_parts
from megatrain_io.models.probe import probe
from megatrain_io.paging.device.base import Device
from megatrain_io.paging.device.cpu import Cpu
from megatrain_io.paging.device.cuda import Cuda, has_bf16, no_gpu
from megatrain_io.planning.compute_time import measured_seconds
from megatrain_io.planning.dry_run import fake_store_nbytes, shortened
from megatrain_io.planning.flops import work_of
from megatrain_io.planning.job import TrainingJob
from megatrain_io.planning.memory_needs import step_needs
from megatrain_io.planning.plan import Plan, Prices
from megatrain_io.planning.planner import accumulation_that_hides_io, make_plan
from megatrain_io.planning.step_time import forget_schedules
from megatrain_io.planning.timeline import StageKey
from megatrain_io.runs.folder import RunFolder
from megatrain_io.store.dtypes import DTYPES, FORMATS
from megatrain_io.store.layout import ModelLayout, Precision
from megatrain_io.store.paged_store import store_memory
from megatrain_io.store.schedule import Phase
from megatrain_io.store.state_format import SPECS

__all__ = [
    "calibrate",
    "device_for",
    "gpu_here",
    "layout_of",
    "plan",
    "precision_of",
    "ram_of",
    "resolve_precision",
    "vram_of",
]

# The rest is for the libraries, the page cache and other programs.
_SHARE_OF_FREE_RAM = 0.5

# A step of two blocks and the head that would take longer is not run for its time.
_CALIBRATION_SECONDS = 2.0
_NO_RATES = (
    "no times: the drive of the store was not measured. Run megatrain-io bench DIR once, with a folder on it"
)
_NO_FLOPS = (
    "no times: matrix products were not measured on this machine. Run megatrain-io bench without --no-matmul"
)
_NO_DESCRIBED_FLOPS = (
    "no times: the described machine gives no rate for matrix products on its CPU: add cpu_tflops to it"
)
_GPU_NOTE = (
    "times for a GPU follow from its rate and the drive's: copies between RAM and VRAM are assumed to overlap with "
    "both, and compute to need as much memory for its tensors as on a CPU"
)


def plan(  # noqa: PLR0913 - each with a meaning of its own
    model: Path | str,
    config: Path | str | None = None,
    *,
    on: str | None = None,
    tokens: float | None = None,
    watts: float | None = None,
    kilowatt_hour: float | None = None,
    rented_hour: float | None = None,
    settings: Mapping[str, Any] | Sequence[str] = (),
) -> Plan:
    """Plan a run from ``config.json`` alone; weights and data need not be there.

    Args:
        model: folder with config.json.
        config: YAML file of the run; None: the defaults.
        on: name of a machine that is known, or a YAML file that describes one; None: this one.
        tokens: tokens of the whole run, where ``train.max_steps`` is not given.
        watts: power in W that the machine takes while it trains; None: the machine's own figure.
        kilowatt_hour: price of a kWh of electricity.
        rented_hour: price of an hour of a rented GPU, in the same currency.
        settings: settings that win over the file: ``{"train.learning_rate": 2e-5}`` or ``["learning_rate=2e-5"]``.

    Returns:
        The plan. What does not fit is no error, but one of its ``problems``.

    Raises:
        MegatrainIoError: model or configuration cannot be used.
    """
    given = settings
    if isinstance(given, Mapping):
        given = [f"{key}={json.dumps(value)}" for key, value in given.items()]  # YAML, too
    run_config, notes = load(
        None if config is None else Path(config),
        [f"model={json.dumps(str(model))}", *given],
        {("", "output_dir"): ".", ("data", "train"): ["."]},
    )
    is_here = on is None
    described = None if on is None else load_hardware(on)
    gpu = gpu_here(run_config.train.device) if described is None else described.device
    gpu = None if run_config.train.device == "cpu" else gpu
    without_bf16 = None if gpu is None or gpu.has_bf16 else gpu.name
    run = RunFolder(Path(run_config.output_dir))
    run_config, resolved = resolve_precision(run_config, run, without_bf16=without_bf16)
    notes += resolved
    job, hardware = _job(run_config, run, described, gpu)
    compute = calibrate(job, hardware) if is_here else None
    libraries = psutil.Process().memory_info().rss if is_here else 0
    count = run_config.train.gradient_accumulation_steps
    if count == "auto":
        count = accumulation_that_hides_io(job, hardware, compute)
    job = job.with_accumulation(count)
    steps = run_config.train.max_steps
    if tokens is not None and not 1 <= tokens < inf:
        raise ConfigError(f"tokens must be a number from 1 on, and are {tokens}")
    if steps is None and tokens is not None:
        steps = max(1, round(tokens / job.tokens))
    if hardware.read is None:
        notes.append(_NO_RATES)
    elif compute is None and hardware.flops_per_second is None:
        notes.append(_NO_FLOPS if is_here else _NO_DESCRIBED_FLOPS)
    if hardware.device is not None:
        notes.append(_GPU_NOTE)
    run_plan = make_plan(
        replace(job, steps=steps),
        hardware,
        compute=compute and {stage: count * seconds for stage, seconds in compute.items()},
        usable=usable_ram() if is_here and run_config.memory.ram is not None else None,
        libraries=libraries,
        prices=Prices(watts or hardware.watts, kilowatt_hour, rented_hour),
        notes=notes,
    )
    forget_schedules()
    return run_plan


def _job(
    config: RunConfig, run: RunFolder, described: Hardware | None, gpu: Gpu | None
) -> tuple[TrainingJob, Hardware]:
    precision = precision_of(config)
    path = Path(config.model)
    folder = ModelFolder(path.parent if path.name == "config.json" else path)
    model_config = folder.config()
    partition = PartitionedModel(model_config, DTYPES[precision], probe(model_config))
    layout = layout_of(config, partition)
    if described is None:
        ram = ram_of(config)
        folders = [store.parent for store in run.stores_in(config.memory.store_dir)]
        profile = Profile.read(default_path())
        hardware = this_machine(folders, ram, precision, profile, gpu=gpu, asks_drives=True)
    else:
        hardware = described.model_copy(update={"device": gpu})
        ram = config.memory.ram or hardware.ram
    packed = config.data.packing and partition.spec.packs
    batch = blank_micro_batch(config.train.per_device_train_batch_size, config.data.max_length, packed=packed)
    tables = store_memory(layout.manifest({}))
    vram = vram_of(config, hardware)
    return TrainingJob(config, partition, layout, [batch], tables, ram, vram=vram), hardware


def layout_of(config: RunConfig, partition: PartitionedModel) -> ModelLayout:
    """Layout of the store that an import of this model with this configuration makes."""
    durability, state_format = config.memory.durability, FORMATS[precision_of(config)]
    return ModelLayout.build(
        model_parts(partition), len(partition.blocks), state_format, durability=durability
    )


def ram_of(config: RunConfig) -> int:
    """Bytes of RAM that training may take: ``memory.ram``, or half of what is free."""
    return config.memory.ram or int(usable_ram()[0] * _SHARE_OF_FREE_RAM)


def vram_of(config: RunConfig, hardware: Hardware) -> int | None:
    """Bytes of a device's memory that training may take; None where the CPU computes.

    Raises:
        ConfigError: ``memory.vram`` is set, and there is no device.
    """
    if hardware.device is not None:
        return min(config.memory.vram or hardware.device.vram, hardware.device.vram)
    if config.memory.vram is not None:
        raise ConfigError(
            "memory.vram is set, and the CPU computes: remove it, or plan for a machine with a GPU"
        )
    return None


def calibrate(job: TrainingJob, hardware: Hardware) -> dict[StageKey, float] | None:
    """Measure the seconds of each stage of one micro-batch on this machine.

    None where the drive's rates are not known, so that there are no times anyway; where a GPU computes; or where
    measuring would take too long or too much RAM.
    """
    partition, layout, batch, rate = (
        job.partition,
        job.layout,
        job.micro_batches[0],
        hardware.flops_per_second,
    )
    if hardware.read is None or rate is None or hardware.device is not None:
        return None
    needs = step_needs(partition, layout, [batch], job.tables)
    if fake_store_nbytes(layout) + needs.always + needs.activations > job.ram:
        return None
    rows, length = batch.input_ids.shape
    work = work_of(partition, layout, [(rows, length)])
    stages = [
        (phase, layout.block(index))
        for phase in (Phase.FORWARD, Phase.BACKWARD)
        for index in range(shortened(layout).blocks)
    ]
    head = sum(flops for (phase, _), flops in work.flops.items() if phase is Phase.HEAD)
    if (sum(work.flops.get(stage, 0.0) for stage in stages) + head) / rate > _CALIBRATION_SECONDS:
        return None
    try:
        return measured_seconds(partition, layout, batch)
    except MegatrainIoError:
        return None  # made-up weights may leave a part of the model without a gradient


def precision_of(config: RunConfig) -> Precision:
    """Precision of a configuration that ``resolve_precision`` has resolved.

    Raises:
        MegatrainIoError: it is still ``auto``.
    """
    precision = config.train.precision
    if precision == "auto":
        raise MegatrainIoError("train.precision is auto, and was not resolved before it was asked for")
    return precision


def resolve_precision(
    config: RunConfig, run: RunFolder, *, without_bf16: str | None
) -> tuple[RunConfig, list[str]]:
    """Put a precision in the place of ``auto``: that of an imported run, else bf16, or fp32 on a GPU without it.

    Args:
        config: of the run.
        run: its folder, which need not be there.
        without_bf16: name of the GPU that computes, if it does not do so in bf16.

    Returns:
        The configuration, whose precision is bf16 or fp32; and notes about it.

    Raises:
        ConfigError: it is bf16, and the GPU has none; or the run's folder is damaged.
    """
    precision, notes = config.train.precision, []
    if precision == "auto" and run.is_imported and run.read().source == str(_folder_of(config.model)):
        precision = run.read().precision
    elif precision == "auto" and without_bf16 is not None:
        precision = "fp32"
        fp32, bf16 = SPECS[FORMATS["fp32"]], SPECS[FORMATS["bf16"]]
        notes.append(
            f"train.precision is fp32, because {without_bf16} does not compute in bf16: {fp32.read_bytes} bytes are "
            f"read and {fp32.written_bytes} written for each parameter and step, instead of {bf16.read_bytes} and "
            f"{bf16.written_bytes}, and matrix products are slower"
        )
    elif precision == "auto":
        precision = "bf16"
    if precision == "bf16" and without_bf16 is not None:
        raise ConfigError(
            f"{without_bf16} does not compute in bf16: set train.precision=fp32 (an imported run keeps its precision: "
            "choose a new output_dir)"
        )
    train = config.train.model_copy(update={"precision": precision})
    return config.model_copy(update={"train": train}), notes


def _folder_of(model: Path) -> Path:
    """Folder of a model, which may be named by its config.json, too."""
    model = Path(model).resolve()
    return model.parent if model.name == "config.json" else model


def device_for(config: RunConfig) -> Device:
    """The device that computes a run: what ``train.device`` says, with ``memory.vram`` as its bound.

    Raises:
        UnsupportedError: a GPU was asked for, and torch finds none.
        ConfigError: ``memory.vram`` is set, and the CPU computes.
    """
    name, vram = config.train.device, config.memory.vram
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        if vram is not None:
            raise ConfigError(
                "memory.vram is set, and the CPU computes: remove it, or "
                + ("set train.device=cuda" if name == "cpu" else "train where torch finds a GPU")
            )
        return Cpu()
    return Cuda(vram)


def gpu_here(name: str) -> Gpu | None:
    """The GPU that would compute for this ``train.device``, if any, with the bytes of its memory that are free.

    Raises:
        UnsupportedError: one was asked for, and there is none.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise no_gpu()
    if name == "cpu" or not torch.cuda.is_available():
        return None
    free, _ = torch.cuda.mem_get_info()
    return Gpu(name=torch.cuda.get_device_name(), vram=free, has_bf16=has_bf16())
