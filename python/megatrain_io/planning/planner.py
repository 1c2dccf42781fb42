"""Making a plan from a configuration and a machine: the schedule, how RAM and VRAM are divided, the simulator."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING

from megatrain_io.data.batch import MicroBatch
from megatrain_io.errors import ConfigError, DoesNotFitError
from megatrain_io.machine.hardware import Hardware
from megatrain_io.paging.device.pool import VramPlan
from megatrain_io.planning.flops import Work, work_of
from megatrain_io.planning.job import TrainingJob
from megatrain_io.planning.memory_needs import (
    gathered_nbytes,
    least_vram_for,
    plan_ram,
    plan_vram,
    step_needs,
)
from megatrain_io.planning.plan import Plan, Prices, Problem, Variant, Wear
from megatrain_io.planning.ram_budget import RamPlan, StepNeeds, least_ram
from megatrain_io.planning.simulator import StandstillError
from megatrain_io.planning.step_time import (
    activations_moved,
    hiding_tokens,
    phases_of,
    policy_of,
    step_time,
    written_by_commit,
)
from megatrain_io.planning.timeline import StageKey
from megatrain_io.store.layout import ModelLayout

if TYPE_CHECKING:
    from megatrain_io.store.schedule import UpdatePolicy


__all__ = ["accumulation_that_hides_io", "make_plan"]

# Typical of consumer drives: full writes of the whole drive that it is rated for.
_TYPICAL_DRIVE_WRITES = 600
_LENGTH_LEAST = 32
_ACCUMULATION_MAX = 1024
_COMMIT_SELDOM = 10


# ---------------------------------------------------------------------------------------------- the whole


def make_plan(  # noqa: PLR0913 - each with a meaning of its own
    job: TrainingJob,
    hardware: Hardware,
    *,
    compute: Mapping[StageKey, float] | None = None,
    usable: tuple[int, str] | None = None,
    libraries: int = 0,
    prices: Prices = Prices(),  # noqa: B008 - it never changes
    variants: bool = True,
    notes: Sequence[str] = (),
) -> Plan:
    """Plan a run. What does not fit is no error, but a problem in the plan.

    Args:
        job: the run to plan.
        hardware: the machine; without rates of drive and compute there are no times.
        compute: measured seconds of each stage of a step; None works them out from FLOPs.
        usable: bytes of RAM that this process may use at all, and the limit that says so; None: not checked.
        libraries: bytes that the process takes without training; if ``compute`` was measured, with what that left
            in the heap for training to use again.
        prices: what costs are worked out from.
        variants: whether to say what single changes would do.
        notes: sentences for the person, which go into the plan.
    """
    vram, needs, too_small = _needs(job, hardware)
    memory, others = _problems(job, needs, hardware, usable)
    problems = (*too_small, *others)
    work = work_of(job.partition, job.layout, [_shape(batch) for batch in job.micro_batches])
    seconds = _compute(work, hardware, compute)
    plan = _empty(job, hardware, work, prices, problems, notes)
    if memory is None:
        return plan
    policy = policy_of(job)
    phases = phases_of(job, memory, policy)
    time = None
    if seconds is not None:
        try:
            time = step_time(
                job,
                memory,
                seconds,
                hardware,
                policy,
                vram=vram,
                is_measured=compute is not None,
            )
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
    committing = written_by_commit(job, memory, policy)
    limit = job.config.memory.max_tbw
    if limit is not None and committing > limit * 1e12:
        problem = Problem(f"a step may write {committing / 1e12:.3g} TB, and memory.max_tbw is {limit:g}")
        plan = replace(plan, problems=(*plan.problems, problem))
    elif limit is not None and job.steps is not None and job.steps * written > limit * 1e12:
        pause = f"the run will pause at memory.max_tbw after about {int(limit * 1e12 / written)} of {job.steps} steps"
        plan = replace(plan, notes=(*plan.notes, pause))
    return replace(
        plan,
        memory=memory,
        vram=None if too_small else vram,
        ledger_bytes=memory.total - memory.needs.heap,
        process_bytes=process_nbytes(memory, libraries, is_warm=compute is not None) if libraries else None,
        scratch_bytes=round(scratch_nbytes(job, memory)),
        phases=phases,
        committing_bytes=committing,
        time=time,
        tokens_to_hide_io=(None if seconds is None else hiding_tokens(job, phases, hardware, seconds)),
        variants=_variants(job, vram, needs, hardware, seconds) if variants else (),
        wear=None if job.steps is None else _wear(job.steps * written, hardware),
    )


def process_nbytes(memory: RamPlan, libraries: int, *, is_warm: bool) -> int:
    """The most bytes that the process takes; where ``is_warm``, its heap has room for the tensors of a step already."""
    return memory.total + libraries - (memory.needs.compute + memory.needs.heap) * is_warm


def _shape(batch: MicroBatch) -> tuple[int, int]:
    rows, length = batch.input_ids.shape
    return rows, length


def _compute(
    work: Work, hardware: Hardware, measured: Mapping[StageKey, float] | None
) -> Mapping[StageKey, float] | None:
    if hardware.read is None or hardware.write is None:
        return None
    if measured is not None:
        return measured
    rate = hardware.flops_per_second
    return None if rate is None else work.seconds(rate)


def _empty(
    job: TrainingJob,
    hardware: Hardware,
    work: Work,
    prices: Prices,
    problems: tuple[Problem, ...],
    notes: Sequence[str],
) -> Plan:
    """The plan with all that is known before RAM is divided."""
    config = job.config
    device = hardware.device
    return Plan(
        model=job.partition.spec.model_type,
        parameters=job.layout.parameters,
        active_parameters=work.active,
        machine=hardware.name,
        settings={
            "precision": config.train.precision,
            "max_length": config.data.max_length,
            "per_device_train_batch_size": config.train.per_device_train_batch_size,
            "gradient_accumulation_steps": len(job.micro_batches),
            "max_grad_norm": config.train.max_grad_norm,
            "commit_every": config.memory.commit_every,
            "durability": config.memory.durability,
        },
        tokens_per_step=job.tokens,
        steps=job.steps,
        memory=None,
        vram=None,
        ledger_bytes=None,
        process_bytes=None,
        store_bytes=store_nbytes(job.layout),
        scratch_bytes=0,
        vram_bytes=None if device is None else vram_nbytes(job),
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
    return copies * sum(
        layout.weight_extent_bytes(chunk) + layout.update_extent_bytes(chunk) for chunk in layout.chunks
    )


def scratch_nbytes(job: TrainingJob, memory: RamPlan) -> float:
    """Bytes on the drives while the run goes on: activation checkpoints, and gradients that wait for their norm."""
    nbytes = sum(activations_moved(job, memory).values())
    if memory.spills_gradients:
        nbytes += sum(
            job.layout.gradient_extent_bytes(chunk)
            for chunk in job.layout.chunks
            if chunk.record not in memory.residents.gradients
        )
    return nbytes


def vram_nbytes(job: TrainingJob) -> int:
    """The least bytes of VRAM that a step of the job can be done in."""
    partition, layout = job.partition, job.layout
    return least_vram_for(partition, layout, step_needs(partition, layout, job.micro_batches, job.tables))


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


def _needs(job: TrainingJob, hardware: Hardware) -> tuple[VramPlan | None, StepNeeds, tuple[Problem, ...]]:
    """How VRAM is divided, if there is any; what RAM must hold then; and why the VRAM is too small, if it is."""
    partition, layout = job.partition, job.layout
    needs = step_needs(partition, layout, job.micro_batches, job.tables)
    if hardware.device is None or job.vram is None:
        return None, needs, ()
    vram, least = job.vram, least_vram_for(partition, layout, needs)
    if least <= vram:
        return *plan_vram(partition, layout, needs, vram=vram), ()
    asked = job.config.memory.vram
    has = f"memory.vram is {_size(vram)}" if asked == vram else f"{hardware.device.name} has {_size(vram)}"
    problem = Problem(
        f"a step needs {-(-least // 2**20)} MiB of VRAM at least, and {has}",
        _nearest_rows(job, hardware),
    )
    # As if it were just enough.
    return *plan_vram(partition, layout, needs, vram=least), (problem,)


def _problems(
    job: TrainingJob, needs: StepNeeds, hardware: Hardware, usable: tuple[int, str] | None
) -> tuple[RamPlan | None, tuple[Problem, ...]]:
    """How RAM is divided, if it can be, and why the run does not fit."""
    problems = []
    memory = None
    try:
        memory = plan_ram(job.partition, job.layout, needs, ram=job.ram, defers=job.defers)
    except DoesNotFitError as error:
        problems.append(Problem(str(error).removesuffix("."), _nearest_rows(job, hardware)))
    if usable is not None and memory is not None and memory.total > usable[0]:
        room = int(usable[0] * 0.9)
        problems.append(
            Problem(
                f"memory.ram is {_size(job.ram)}, and {usable[1]} leaves {_size(usable[0])} to this process",
                (f"memory.ram={room >> 10}KiB",) if _divides(job, needs, room) else (),
            )
        )
    problems += _drive_problems(job, memory, hardware)
    return memory, tuple(problems)


def _divides(job: TrainingJob, needs: StepNeeds, ram: int) -> bool:
    tied = bool(job.partition.tied_parameters)
    return ram >= least_ram(job.layout, needs, tied_embeddings=tied, defers=job.defers)


def _nearest_rows(job: TrainingJob, hardware: Hardware) -> tuple[str, ...]:
    """Settings with smaller micro-batches that fit, with as many tokens a step if possible; empty if none fit."""
    train, data = job.config.train, job.config.data
    for keeps_tokens in (True, False):
        batch, length = train.per_device_train_batch_size, data.max_length
        while batch > 1 or length // 2 >= _LENGTH_LEAST:
            batch, length = (batch // 2, length) if batch > 1 else (batch, length // 2)
            tokens = job.tokens if keeps_tokens else len(job.micro_batches) * batch * length
            smaller = job.with_rows(batch, length, tokens)
            if not _fits_memory(smaller, hardware):
                continue
            changed = {
                "train.per_device_train_batch_size": (batch, train.per_device_train_batch_size),
                "data.max_length": (length, data.max_length),
                "train.gradient_accumulation_steps": (
                    len(smaller.micro_batches),
                    len(job.micro_batches),
                ),
            }
            return tuple(f"{key}={new}" for key, (new, old) in changed.items() if new != old)
    return ()


def _fits_memory(job: TrainingJob, hardware: Hardware) -> bool:
    """Whether RAM and VRAM are enough for a step of the job."""
    partition, layout = job.partition, job.layout
    needs = step_needs(partition, layout, job.micro_batches, job.tables)
    if hardware.device is not None and job.vram is not None:
        try:
            needs = plan_vram(partition, layout, needs, vram=job.vram)[1]
        except DoesNotFitError:
            return False
    return _divides(job, needs, job.ram)


def _drive_problems(job: TrainingJob, memory: RamPlan | None, hardware: Hardware) -> list[Problem]:
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
    hardware: Hardware,
    compute: Mapping[StageKey, float] | None,
) -> tuple[Variant, ...]:
    """What single changes of the settings or of the machine would do to a step; those that do not fit are left out."""
    train, kept = job.config.train, job.config.memory
    clipped = job.config.model_copy(update={"train": train.model_copy(update={"max_grad_norm": 1.0})})
    seldom = job.config.model_copy(
        update={"memory": kept.model_copy(update={"commit_every": _COMMIT_SELDOM})}
    )
    changed: list[tuple[str, TrainingJob, UpdatePolicy, Hardware]] = []
    if job.defers:
        changed.append(("every step clipped: updates wait", job, "deferred", hardware))
    else:
        asks = replace(job, config=clipped)
        changed.append(("max_grad_norm, never reached", asks, policy_of(asks), hardware))
        changed.append(("max_grad_norm, always reached: updates wait", asks, "deferred", hardware))
    if kept.commit_every < _COMMIT_SELDOM and job.layout.durability == "step":
        less = replace(job, config=seldom)
        changed.append((f"commit_every {_COMMIT_SELDOM}", less, policy_of(less), hardware))
    more = replace(job, ram=2 * job.ram)
    changed.append((f"{_size(2 * job.ram)} of RAM", more, policy_of(job), hardware))
    second = hardware.model_copy(update={"drives": (*hardware.drives, hardware.drives[0])})
    changed.append(("one more drive", job, policy_of(job), second))
    variants = []
    for change, variant, policy, machine in changed:
        try:
            division = plan_ram(
                variant.partition, variant.layout, needs, ram=variant.ram, defers=variant.defers
            )
        except DoesNotFitError:
            continue  # what a change needs more is not there
        phases = phases_of(variant, division, policy)
        seconds = None
        if compute is not None:
            with suppress(StandstillError):
                seconds = step_time(variant, division, compute, machine, policy, vram=vram).seconds
        read, written = (sum(nbytes) for nbytes in zip(*phases.values(), strict=True))
        variants.append(Variant(change, seconds, read, written))
    return tuple(variants)


def accumulation_that_hides_io(
    job: TrainingJob, hardware: Hardware, compute: Mapping[StageKey, float] | None
) -> int:
    """Micro-batches from which on computing takes longer than moving bytes, or as many as memory has room for.

    Args:
        job: with one micro-batch.
        hardware: the machine.
        compute: measured seconds of each stage of one micro-batch; None works them out from FLOPs.

    Raises:
        ConfigError: the machine's rates are not known.
        DoesNotFitError: not even one micro-batch fits.
    """
    work = work_of(job.partition, job.layout, [_shape(batch) for batch in job.micro_batches])
    compute = _compute(work, hardware, compute)
    if compute is None:
        raise ConfigError(
            "train.gradient_accumulation_steps is auto, which is worked out from the rates of drive and CPU; one of "
            "these is not known: run megatrain-io bench DIR on the drive of the store once, or give a number"
        )
    _, needs, _ = _needs(job, hardware)
    memory = plan_ram(job.partition, job.layout, needs, ram=job.ram, defers=job.defers)
    policy = policy_of(job)
    phases = phases_of(job, memory, policy)
    tokens = hiding_tokens(job, phases, hardware, compute)
    count = min(_ACCUMULATION_MAX, max(1, -(-tokens // job.tokens)))
    while count > 1 and not _fits_memory(job.with_accumulation(count), hardware):
        count //= 2
    return count


def _size(nbytes: float) -> str:
    return f"{nbytes / 2**30:.2f} GiB" if nbytes >= 2**30 else f"{nbytes / 2**20:.1f} MiB"
