"""Making a plan: from a job, and from a model folder, settings and the name of a machine."""

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import torch

from megatrain_io.config.parse import load
from megatrain_io.config.schema import RunConfig
from megatrain_io.data.batch import MicroBatch, blank_micro_batch
from megatrain_io.data.files import not_read
from megatrain_io.errors import ConfigError, DoesNotFitError
from megatrain_io.machine.hardware import Hardware, load_hardware
from megatrain_io.machine.memory import usable_ram
from megatrain_io.models.gguf_folder import model_folder
from megatrain_io.models.hub_folder import ModelFolder
from megatrain_io.models.model_options import ModelOptions
from megatrain_io.models.text_model import TextNames, text_config_of
from megatrain_io.paging.device.pool import VramPlan
from megatrain_io.planning.division import divide_ram_of, divide_vram_of, fits_memory, has_ram, vram_nbytes
from megatrain_io.planning.flops import Work
from megatrain_io.planning.job import TrainingJob
from megatrain_io.planning.memory_needs import gathered_nbytes
from megatrain_io.planning.plan import Plan, Prices, Problem, Variant, Wear
from megatrain_io.planning.ram_budget import RamPlan, StepNeeds
from megatrain_io.planning.resolve import (
    gpu_here,
    hardware_here,
    ram_of,
    resolve,
    resolve_precision,
)
from megatrain_io.planning.simulator import StandstillError
from megatrain_io.planning.step_time import (
    Schedules,
    activations_moved,
    compute_of,
    hiding_tokens,
    phases_of,
    policy_of,
    step_time,
    work_of_step,
    written_by_commit,
)
from megatrain_io.planning.timeline import StageKey
from megatrain_io.runs.folder import RunFolder
from megatrain_io.runs.import_model import layout_of
from megatrain_io.store.dtypes import DTYPES
from megatrain_io.store.layout import ModelLayout

if TYPE_CHECKING:
    from megatrain_io.store.schedule import UpdatePolicy


__all__ = ["make_plan", "plan"]

# Typical of consumer drives: full writes of the whole drive that it is rated for.
_TYPICAL_DRIVE_WRITES = 600
_LENGTH_LEAST = 32
_COMMIT_SELDOM = 10
_NO_DATA = "(no data)"


_NO_RATES = (
    "no times: the drive of the store was not measured. Run megatrain-io bench DIR once, with a folder on it"
)
_NO_FLOPS = (
    "no times: matrix products were not measured on this machine. Run megatrain-io bench without --no-matmul"
)
_NO_DESCRIBED_FLOPS = (
    "no times: the described machine gives no rate for matrix products on its CPU: add cpu_tflops to it"
)
_SIDE_INPUTS = (
    "blocks of this model take more than the hidden state (side inputs): what these and their gradients take of RAM, "
    "for all micro-batches of a step, is counted under compute"
)
_GPU_NOTE = (
    "times for a GPU follow from its rate and the drive's: copies between RAM and VRAM are assumed to overlap with "
    "both, and compute to need as much memory for its tensors as on a CPU"
)


# ------------------------------------------------------------------------------------ from what a person has


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
    if isinstance(settings, Mapping):
        settings = {"model": str(model), **settings}
    else:
        settings = [f"model={json.dumps(str(model))}", *settings]  # YAML, too
    run_config, notes = load(
        None if config is None else Path(config),
        settings,
        {("", "output_dir"): ".", ("data", "train"): [_NO_DATA]},
    )
    if tokens is not None and not 1 <= tokens < inf:
        raise ConfigError(f"tokens must be a number from 1 on, and are {tokens}")
    described = None if on is None else load_hardware(on)
    job, more, carried = _job_without_data(run_config, described, tokens)
    notes += [*not_read(map(Path, run_config.data.train)), *more, *run_config.train.doubts()]
    hardware = job.hardware
    if hardware.read is None:
        notes.append(_NO_RATES)
    elif job.seconds is None and hardware.flops_per_second is None:
        notes.append(_NO_FLOPS if described is None else _NO_DESCRIBED_FLOPS)
    if hardware.device is not None:
        notes.append(_GPU_NOTE)
    is_here = described is None
    return make_plan(
        job,
        usable=usable_ram() if is_here and run_config.memory.ram is not None else None,
        libraries=psutil.Process().memory_info().rss if is_here else 0,
        prices=Prices(watts or hardware.watts, kilowatt_hour, rented_hour),
        notes=notes,
        carried=carried,
    )


@dataclass(frozen=True)
class _BlankData:
    """Stands for data that need not be there: all rows are as long as may be."""

    largest: MicroBatch
    tokens: float | None
    mean_share: float = 1.0
    micro_batches: int | None = None

    def steps(self, accumulation: int) -> int | None:
        """Optimizer steps in which all tokens are trained."""
        if self.tokens is None:
            return None
        return max(1, round(self.tokens / (accumulation * self.largest.input_ids.numel())))


def _job_without_data(
    config: RunConfig, described: Hardware | None, tokens: float | None
) -> tuple[TrainingJob, list[str], int]:
    """The job of a configuration on this machine or a described one, notes about it, and bytes that are carried."""
    train, memory = config.train, config.memory
    run = RunFolder(Path(config.output_dir))
    gpu = gpu_here(train.device) if described is None else described.device
    gpu = None if train.device == "cpu" else gpu
    precision, notes = resolve_precision(train.precision, config.model, run, gpu)
    folder = model_folder(config.model)
    outside = [folder.path, run.path] if run.is_imported else [folder.path]
    options = ModelOptions.of(config.model_options).run_modules(*outside)
    model_config = folder.config(needs_weights=False)
    notes += [*folder.notes, *folder.quantisation_notes]
    partition = options.partition(model_config, DTYPES[precision])
    if described is None:
        stores = run.stores_in(memory.store_dir)
        hardware = hardware_here(stores, ram_of(memory.ram), precision, gpu, for_plan=True)
    else:
        hardware = described.model_copy(update={"device": gpu})
    notes += [*partition.notes, *partition.check_length(config.data.max_length, "data.max_length")]
    packed = config.data.packing and partition.spec.packs
    largest = blank_micro_batch(train.per_device_train_batch_size, config.data.max_length, packed=packed)
    job = resolve(
        config,
        hardware=hardware,
        precision=precision,
        partition=partition,
        layout=layout_of(partition, durability=memory.durability),
        data=_BlankData(largest, tokens),
        accumulation=train.gradient_accumulation_steps,
        measures=described is None,
    )
    return job, notes, _carried_nbytes(folder, DTYPES[precision])


def _carried_nbytes(folder: ModelFolder, dtype: torch.dtype) -> int:
    """Bytes of what a model of more than text has besides its text model, as its config.json says; ``dtype``: else."""
    published = folder.published_config(needs_weights=False)
    text = text_config_of(published)
    named = published.dtype if isinstance(published.dtype, torch.dtype) else dtype
    return 0 if text is None else TextNames(published, text, named).carried_nbytes


# ---------------------------------------------------------------------------------------------- from a job


def make_plan(
    job: TrainingJob,
    *,
    usable: tuple[int, str] | None = None,
    libraries: int = 0,
    prices: Prices = Prices(),  # noqa: B008 - it never changes
    variants: bool = True,
    notes: Sequence[str] = (),
    carried: int = 0,
) -> Plan:
    """Plan a run. What does not fit is no error, but a problem in the plan.

    Args:
        job: the run to plan; without rates of drive and compute there are no times.
        usable: bytes of RAM that this process may use at all, and the limit that says so; None: not checked.
        libraries: bytes that the process takes without training; if the job's times were measured, with what that
            left in the heap for training to use again.
        prices: what costs are worked out from.
        variants: whether to say what single changes would do.
        notes: sentences for the person, which go into the plan.
        carried: bytes of tensors that are only carried to an export.
    """
    if job.partition.spec.sides:
        notes = (*notes, _SIDE_INPUTS)
    vram, needs = divide_vram_of(job)
    too_small = _vram_problems(job)
    memory, others = _problems(job, needs, usable)
    problems = (*too_small, *others)
    work = work_of_step(job)
    seconds = compute_of(job, work)
    plan = replace(_empty(job, work, prices, problems, notes), carried_bytes=carried)
    if memory is None:
        return plan
    policy = policy_of(job)
    schedules = Schedules(job)
    phases = phases_of(job, memory, policy, schedules)
    time = None
    if seconds is not None:
        try:
            time = step_time(job, memory, seconds, policy, schedules, vram=vram)
        except StandstillError as error:
            plan = replace(plan, notes=(*plan.notes, f"no times: {error}. This is a bug: please report it"))
    if vram is not None and vram.pool.gathers:
        moved = gathered_nbytes(job.partition, job.layout, job.micro_batches)
        gathers = (
            "gradients gather in RAM, because the VRAM has no room for the gradient of a whole record: "
            f"{moved / 1e9:.3g} GB more a step over the bus, which the times leave out"
        )
        plan = replace(plan, notes=(*plan.notes, gathers))
    written = sum(nbytes for _, nbytes in phases.values())
    committing = written_by_commit(job, memory, policy, schedules)
    limit = job.max_tbw
    if limit is not None and committing > limit * 1e12:
        problem = Problem(f"a step may write {committing / 1e12:.3g} TB, and memory.max_tbw is {limit:g}")
        plan = replace(plan, problems=(*plan.problems, problem))
    elif limit is not None and job.steps is not None and job.steps * written > limit * 1e12:
        pause = f"the run will pause at memory.max_tbw after about {int(limit * 1e12 / written)} of {job.steps} steps"
        plan = replace(plan, notes=(*plan.notes, pause))
    is_warm = job.seconds is not None
    return replace(
        plan,
        memory=memory,
        vram=None if too_small else vram,
        ledger_bytes=memory.total - memory.needs.heap,
        process_bytes=process_nbytes(memory, libraries, is_warm=is_warm) if libraries else None,
        scratch_bytes=round(scratch_nbytes(job, memory)),
        phases=phases,
        committing_bytes=committing,
        time=time,
        tokens_to_hide_io=None if seconds is None else hiding_tokens(job, phases, seconds),
        variants=_variants(job, vram, needs, schedules, seconds) if variants else (),
        wear=None if job.steps is None else _wear(job.steps * written, job.hardware),
    )


def process_nbytes(memory: RamPlan, libraries: int, *, is_warm: bool) -> int:
    """The most bytes that the process takes; where ``is_warm``, its heap has room for the tensors of a step already."""
    return memory.total + libraries - (memory.needs.compute + memory.needs.heap) * is_warm


def _empty(
    job: TrainingJob,
    work: Work,
    prices: Prices,
    problems: tuple[Problem, ...],
    notes: Sequence[str],
) -> Plan:
    """The plan with all that is known before RAM is divided."""
    return Plan(
        model=job.partition.spec.model_type,
        parameters=job.layout.parameters,
        active_parameters=work.active,
        machine=job.hardware.name,
        settings={
            "precision": job.precision,
            "max_length": job.max_length,
            "per_device_train_batch_size": len(job.micro_batch.input_ids),
            "gradient_accumulation_steps": job.accumulation,
            "max_grad_norm": job.max_grad_norm,
            "commit_every": job.commit_every,
            "durability": job.layout.durability,
        },
        tokens_per_step=job.tokens,
        steps=job.steps,
        memory=None,
        vram=None,
        ledger_bytes=None,
        process_bytes=None,
        store_bytes=store_nbytes(job.layout),
        scratch_bytes=0,
        vram_bytes=None if job.vram is None else vram_nbytes(job),
        phases={},
        committing_bytes=0,
        updates_wait=policy_of(job) == "deferred",
        time=None,
        tokens_to_hide_io=None,
        variants=(),
        wear=None,
        prices=prices,
        problems=problems,
        notes=tuple(notes),
    )


def store_nbytes(layout: ModelLayout) -> int:
    """Bytes of the store's files on all drives; metadata, less than a thousandth, left out."""
    copies = 2 if layout.durability == "step" else 1
    records = range(len(layout.records))
    return copies * sum(
        layout.record_weight_bytes(record) + layout.record_update_bytes(record) for record in records
    )


def scratch_nbytes(job: TrainingJob, memory: RamPlan) -> float:
    """Bytes on the drives while the run goes on: activation checkpoints, and gradients that wait for their norm."""
    nbytes = sum(activations_moved(job, memory).values())
    if memory.spills_gradients:
        nbytes += sum(
            job.layout.record_deferred_bytes(record)
            for record in range(len(job.layout.records))
            if record not in memory.residents.gradients
        )
    return nbytes


def _wear(written: float, hardware: Hardware) -> Wear:
    rated = [drive.tbw for drive in hardware.drives if drive.tbw is not None]
    sizes = [drive.capacity for drive in hardware.drives if drive.capacity is not None]
    is_typical = len(rated) < len(hardware.drives)
    if is_typical and (len(sizes) < len(hardware.drives) or not sum(sizes)):
        return Wear(written / 1e12, None, is_typical=False, used_tb=None)
    total = sum(sizes) / 1e12 * _TYPICAL_DRIVE_WRITES if is_typical else sum(rated)
    used = [drive.tbw_used for drive in hardware.drives if drive.tbw_used is not None]
    return Wear(written / 1e12, total, is_typical, sum(used) if used else None)


# ----------------------------------------------------------------------------------------------- what fits


def _vram_problems(job: TrainingJob) -> tuple[Problem, ...]:
    """Why the VRAM is too small, if it is."""
    if job.vram is None or job.hardware.device is None or (least := vram_nbytes(job)) <= job.vram:
        return ()
    has = (
        f"memory.vram is {_size(job.vram)}"
        if job.is_vram_asked
        else f"{job.hardware.device.name} has {_size(job.vram)}"
    )
    reason = f"a step needs {-(-least // 2**20)} MiB of VRAM at least, and {has}"
    return (Problem(reason, _nearest_rows(job)),)


def _problems(
    job: TrainingJob, needs: StepNeeds, usable: tuple[int, str] | None
) -> tuple[RamPlan | None, tuple[Problem, ...]]:
    """How RAM is divided, if it can be, and why the run does not fit."""
    problems = []
    memory = None
    try:
        memory = divide_ram_of(job, needs)
    except DoesNotFitError as error:
        problems.append(Problem(str(error).removesuffix("."), _nearest_rows(job)))
    if usable is not None and memory is not None and memory.total > usable[0]:
        room = int(usable[0] * 0.9)
        problems.append(
            Problem(
                f"memory.ram is {_size(job.ram)}, and {usable[1]} leaves {_size(usable[0])} to this process",
                (f"memory.ram={room >> 10}KiB",) if has_ram(job, needs, room) else (),
            )
        )
    problems += _drive_problems(job, memory)
    return memory, tuple(problems)


def _nearest_rows(job: TrainingJob) -> tuple[str, ...]:
    """Settings with smaller micro-batches that fit, with as many tokens a step if possible; empty if none fit."""
    # Rows without any tokens still need weights and pool: where these do not fit, no dry run of rows is made.
    nothing = replace(job.needs, compute=0, activations=0, activations_least=0, activations_per_block=0)
    if not fits_memory(replace(job, needs=nothing)):
        return ()
    rows = len(job.micro_batch.input_ids)
    for keeps_tokens in (True, False):
        batch, length = rows, job.max_length
        while batch > 1 or length // 2 >= _LENGTH_LEAST:
            batch, length = (batch // 2, length) if batch > 1 else (batch, length // 2)
            tokens = job.tokens if keeps_tokens else job.accumulation * batch * length
            smaller = job.with_rows(batch, length, tokens)
            if not fits_memory(smaller):
                continue
            changed = {
                "train.per_device_train_batch_size": (batch, rows),
                "data.max_length": (length, job.max_length),
                "train.gradient_accumulation_steps": (smaller.accumulation, job.accumulation),
            }
            return tuple(f"{key}={new}" for key, (new, old) in changed.items() if new != old)
    return ()


def _drive_problems(job: TrainingJob, memory: RamPlan | None) -> list[Problem]:
    hardware = job.hardware
    problems = [Problem(drive.problem) for drive in hardware.drives if drive.problem is not None]
    scratch = 0.0 if memory is None else scratch_nbytes(job, memory)
    store = 0 if job.is_made else store_nbytes(job.layout)
    share = (store + scratch) / len(hardware.drives)
    for number, drive in enumerate(hardware.drives, start=1):
        if drive.free is None or share <= drive.free:
            continue
        halved = (share - scratch / len(hardware.drives)) / 2 + scratch / len(hardware.drives)
        can_be_scratch = job.layout.durability == "step" and store > 0 and halved <= drive.free
        which = "the drive" if len(hardware.drives) == 1 else f"drive {number}"
        problems.append(
            Problem(
                f"the store takes {_size(share)} of {which}, which has {_size(drive.free)} free",
                ("memory.durability=scratch",) if can_be_scratch else (),
            )
        )
    return problems


def _variants(
    job: TrainingJob,
    vram: VramPlan | None,
    needs: StepNeeds,
    schedules: Schedules,
    compute: Mapping[StageKey, float] | None,
) -> tuple[Variant, ...]:
    """What single changes of the settings or of the machine would do to a step; those that do not fit are left out."""
    changed: list[tuple[str, TrainingJob, UpdatePolicy]] = []
    if job.defers:
        changed.append(("every step clipped: updates wait", job, "deferred"))
    else:
        clipped = replace(job, max_grad_norm=1.0)
        changed.append(("max_grad_norm, never reached", clipped, policy_of(clipped)))
        changed.append(("max_grad_norm, always reached: updates wait", clipped, "deferred"))
    if job.commit_every < _COMMIT_SELDOM and job.layout.durability == "step":
        seldom = replace(job, commit_every=_COMMIT_SELDOM)
        changed.append((f"commit_every {_COMMIT_SELDOM}", seldom, policy_of(seldom)))
    changed.append((f"{_size(2 * job.ram)} of RAM", replace(job, ram=2 * job.ram), policy_of(job)))
    drives = (*job.hardware.drives, job.hardware.drives[0])
    second = replace(job, hardware=job.hardware.model_copy(update={"drives": drives}))
    changed.append(("one more drive", second, policy_of(job)))
    variants = []
    for change, variant, policy in changed:
        try:
            division = divide_ram_of(variant, needs)
        except DoesNotFitError:
            continue  # what a change needs more is not there
        phases = phases_of(variant, division, policy, schedules)
        seconds = None
        if compute is not None:
            with suppress(StandstillError):
                seconds = step_time(variant, division, compute, policy, schedules, vram=vram).seconds
        read, written = (sum(nbytes) for nbytes in zip(*phases.values(), strict=True))
        variants.append(Variant(change, seconds, read, written))
    return tuple(variants)


def _size(nbytes: float) -> str:
    return f"{nbytes / 2**30:.2f} GiB" if nbytes >= 2**30 else f"{nbytes / 2**20:.1f} MiB"
