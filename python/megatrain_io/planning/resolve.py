"""What "auto" means, settled once: device, precision, RAM, VRAM, micro-batches of a step, steps of the run."""

from collections.abc import Callable
from contextlib import nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from typing import Literal, Protocol

import psutil
import torch

from megatrain_io.config.schema import RunConfig
from megatrain_io.data.batch import MicroBatch
from megatrain_io.errors import ConfigError, DoesNotFitError, MegatrainIoError
from megatrain_io.machine.hardware import Gpu, Hardware, this_machine
from megatrain_io.machine.memory import usable_ram
from megatrain_io.machine.precision import fastest_on_cpu
from megatrain_io.machine.profile import Profile, default_path
from megatrain_io.models.partition import PartitionedModel
from megatrain_io.paging.device.base import Device
from megatrain_io.paging.device.cpu import Cpu
from megatrain_io.paging.device.cuda import Cuda, has_bf16, no_gpu
from megatrain_io.planning.compute_time import calibrate
from megatrain_io.planning.division import divide_ram_of, divide_vram_of, fits_memory
from megatrain_io.planning.job import TrainingJob
from megatrain_io.planning.memory_needs import step_needs
from megatrain_io.planning.step_time import (
    Schedules,
    compute_of,
    hiding_tokens,
    phases_of,
    policy_of,
    work_of_step,
)
from megatrain_io.runs.folder import RunFolder
from megatrain_io.store.dtypes import FORMATS
from megatrain_io.store.layout import ModelLayout, Precision
from megatrain_io.store.paged_store import store_memory
from megatrain_io.store.state_format import SPECS
from megatrain_io.text import gib

__all__ = [
    "DataShape",
    "gpu_here",
    "gpu_of",
    "hardware_here",
    "ram_of",
    "resolve",
    "resolve_device",
    "resolve_precision",
]

# The rest is for the libraries, the page cache and other programs.
_SHARE_OF_FREE_RAM = 0.5
_ACCUMULATION_MAX = 1024
_FP32, _BF16 = SPECS[FORMATS["fp32"]], SPECS[FORMATS["bf16"]]
_PRICE_OF_FP32 = (
    f"{_FP32.read_bytes} bytes are read and {_FP32.written_bytes} written for each parameter and step, instead of "
    f"{_BF16.read_bytes} and {_BF16.written_bytes}"
)


class DataShape(Protocol):
    """What planning must know of the data."""

    @property
    def largest(self) -> MicroBatch:
        """A micro-batch of the kind and size of the largest."""

    @property
    def mean_share(self) -> float:
        """Length of the mean row, as a share of the longest one's."""

    @property
    def micro_batches(self) -> int | None:
        """Number of micro-batches in the data; None where there are no data."""

    def steps(self, accumulation: int) -> int | None:
        """Optimizer steps of the run, with so many micro-batches each; None where their number is not known."""


def resolve(  # noqa: PLR0913 - each with a meaning of its own
    config: RunConfig,
    *,
    hardware: Hardware,
    precision: Precision,
    partition: PartitionedModel,
    layout: ModelLayout,
    data: DataShape,
    accumulation: int | Literal["auto"],
    measures: bool = True,
) -> TrainingJob:
    """Settle what the configuration leaves open, but for device and precision, which the others need.

    Args:
        config: of the run.
        hardware: the machine, with the RAM that training may take.
        precision: compute dtype, by ``resolve_precision``.
        partition: the model without its parameters.
        layout: of its store.
        data: what the run trains on.
        accumulation: micro-batches of a step; auto: as many as hide the drive behind computing.
        measures: whether computing may be measured, which takes a few seconds.

    Raises:
        ConfigError: ``accumulation`` is auto, and rates of the machine are not known; or ``memory.vram`` is set, and
            there is no device.
        DoesNotFitError: it is auto, and not even one micro-batch fits.
    """
    memory = config.memory
    vram = _vram_of(memory.vram, hardware.device)
    count = 1 if accumulation == "auto" else accumulation
    job = TrainingJob(
        hardware=hardware,
        precision=precision,
        partition=partition,
        layout=layout,
        micro_batch=data.largest,
        accumulation=count,
        max_length=config.data.max_length,
        ram=hardware.ram if memory.ram is None else memory.ram,
        needs=step_needs(partition, layout, [data.largest] * count, store_memory(layout.manifest({}))),
        max_grad_norm=config.train.max_grad_norm,
        commit_every=memory.commit_every,
        max_tbw=memory.max_tbw,
        vram=vram,
        is_vram_asked=vram is not None and vram == memory.vram,
    )
    seconds = calibrate(job) if measures else None
    if seconds is not None:
        # Of rows of mean length; it was measured with the longest.
        seconds = {stage: data.mean_share * each for stage, each in seconds.items()}
    job = replace(job, seconds=seconds)
    if accumulation == "auto":
        count = _accumulation_that_hides_io(job)
        most = count if data.micro_batches is None else data.micro_batches
        job = job.with_accumulation(min(count, max(1, most)))
    return replace(job, steps=config.train.max_steps or data.steps(job.accumulation))


def _accumulation_that_hides_io(job: TrainingJob) -> int:
    """Micro-batches from which on computing takes longer than moving bytes, or as many as memory has room for.

    Args:
        job: with one micro-batch.

    Raises:
        ConfigError: the machine's rates are not known.
        DoesNotFitError: not even one micro-batch fits.
    """
    compute = compute_of(job, work_of_step(job))
    if compute is None:
        raise ConfigError(
            "train.gradient_accumulation_steps is auto, which is worked out from the rates of drive and CPU; one of "
            "these is not known: run megatrain-io bench DIR on the drive of the store once, or give a number"
        )
    memory = divide_ram_of(job, divide_vram_of(job)[1])
    phases = phases_of(job, memory, policy_of(job), Schedules(job))
    tokens = hiding_tokens(job, phases, compute)
    count = min(_ACCUMULATION_MAX, max(1, -(-tokens // job.tokens)))
    while count > 1 and not fits_memory(job.with_accumulation(count)):
        count //= 2
    return count


# ------------------------------------------------------------------------------------- device and machine


def resolve_device(name: str, vram: int | None) -> Device:
    """The device that computes a run.

    Args:
        name: ``train.device``.
        vram: ``memory.vram``, the bytes that may be taken of its memory.

    Raises:
        UnsupportedError: a GPU was asked for, and torch finds none.
        ConfigError: ``vram`` is set, and the CPU computes.
    """
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        if vram is not None:
            raise ConfigError(
                "memory.vram is set, and the CPU computes: remove it, or "
                + ("set train.device=cuda" if name == "cpu" else "train where torch finds a GPU")
            )
        return Cpu()
    return Cuda(vram)


def gpu_of(device: Device) -> Gpu | None:
    """What planning must know of a device; None where it has no memory of its own."""
    if not device.has_own_memory:
        return None
    return Gpu(name=device.name, vram=device.vram, has_bf16=device.has_bf16)


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


def hardware_here(
    stores: list[Path], ram: int, precision: Precision, gpu: Gpu | None, *, for_plan: bool
) -> Hardware:
    """The machine that this runs on.

    Args:
        stores: the files of the store, one for each drive.
        ram: bytes of RAM that training may take.
        precision: compute dtype.
        gpu: what computes, if it is not the CPU.
        for_plan: whether drives are asked for their wear, and a profile that cannot be read is an error.
    """
    profile = None
    # No profile, or none that can be read, is no reason not to train.
    with nullcontext() if for_plan else suppress(MegatrainIoError):
        profile = Profile.read(default_path())
    folders = [store.parent for store in stores]
    return this_machine(folders, ram, precision, profile, gpu=gpu, asks_drives=for_plan)


def ram_of(asked: int | None, key: str = "memory.ram") -> int:
    """Bytes of RAM that training may take: what was asked for, or half of what is free.

    Raises:
        DoesNotFitError: this machine has less than that; the message calls it ``key``.
    """
    if asked is None:
        return int(usable_ram()[0] * _SHARE_OF_FREE_RAM)
    total = psutil.virtual_memory().total
    if asked > total:
        raise DoesNotFitError(
            f"{key} is {gib(asked)}, and this machine has {gib(total)}: set it to less, or leave it out to take half "
            "of what is free"
        )
    return asked


def _vram_of(asked: int | None, gpu: Gpu | None) -> int | None:
    if gpu is not None:
        return gpu.vram if asked is None else min(asked, gpu.vram)
    if asked is not None:
        raise ConfigError(
            "memory.vram is set, and the CPU computes: remove it, or plan for a machine with a GPU"
        )
    return None


# ---------------------------------------------------------------------------------------------- precision


def resolve_precision(
    asked: Precision | Literal["auto"],
    model: Path,
    run: RunFolder,
    gpu: Gpu | None,
    on_cpu: Callable[[], Precision] = fastest_on_cpu,
) -> tuple[Precision, list[str]]:
    """The precision of a run: what was asked for; for ``auto`` that of an imported run, else what computes fastest.

    Args:
        asked: ``train.precision``.
        model: folder of the model, or its config.json.
        run: its folder, which need not be there.
        gpu: what computes, if it is not the CPU.
        on_cpu: finds out what the CPU computes fastest in, where it computes.

    Returns:
        The precision, and notes about it.

    Raises:
        ConfigError: it is bf16, and the GPU has none; or the run's folder is damaged.
    """
    without_bf16 = None if gpu is None or gpu.has_bf16 else gpu.name
    precision, notes = asked, []
    if precision == "auto" and run.is_imported and run.read().source == str(_folder_of(model)):
        precision = run.read().precision
    elif precision == "auto" and without_bf16 is not None:
        precision = "fp32"
        notes.append(
            f"train.precision is fp32, because {without_bf16} does not compute in bf16: {_PRICE_OF_FP32}, and matrix "
            "products are slower"
        )
    elif precision == "auto":
        precision = "bf16" if gpu is not None else on_cpu()
        notes.append(
            f"train.precision is fp32, because this processor computes faster in it than in bf16: {_PRICE_OF_FP32}"
            if precision == "fp32"
            else f"train.precision is bf16, in which {'this processor' if gpu is None else gpu.name} computes fastest"
        )
    if precision == "bf16" and without_bf16 is not None:
        raise ConfigError(
            f"{without_bf16} does not compute in bf16: set train.precision=fp32 (an imported run keeps its precision: "
            "choose a new output_dir)"
        )
    return precision, notes


def _folder_of(model: Path) -> Path:
    """Folder of a model, which may be named by its config.json, too."""
    model = Path(model).resolve()
    return model.parent if model.name == "config.json" else model
