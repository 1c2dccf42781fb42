"""One step of a job: its schedule, the bytes that it moves, the seconds that it takes."""

from collections.abc import Callable, Iterator, Mapping
from math import ceil, inf

from megatrain_io.paging.activations import activation_plan
from megatrain_io.paging.device.pool import DeviceKind, VramPlan
from megatrain_io.planning.flops import Work, work_of
from megatrain_io.planning.job import TrainingJob
from megatrain_io.planning.plan import StepTime
from megatrain_io.planning.ram_budget import RamPlan
from megatrain_io.planning.simulator import Rates, simulate
from megatrain_io.planning.timeline import StageKey
from megatrain_io.store.pool import BufferKind, PoolSizes
from megatrain_io.store.schedule import Phase, Schedule, UpdatePolicy, build_schedule, flush_schedule
from megatrain_io.store.state_format import SPECS

__all__ = [
    "Schedules",
    "activations_moved",
    "compute_of",
    "hiding_tokens",
    "phases_of",
    "policy_of",
    "step_time",
    "work_of_step",
    "written_by_commit",
]


# ---------------------------------------------------------------------------------------------- one step


class Schedules:
    """The schedules of a job's training steps, as training builds them; each is built once.

    Args:
        job: its layout and its tied embeddings decide them.
    """

    def __init__(self, job: TrainingJob) -> None:
        self._layout = job.layout
        self._tied = bool(job.partition.tied_parameters)
        self._built: dict[tuple[UpdatePolicy, bool], Schedule] = {}

    def of(self, policy: UpdatePolicy, *, applies: bool = False) -> Schedule:
        """The schedule of a step with this policy; ``applies`` where the step before has deferred its gradients."""
        key = (policy, applies)
        if key not in self._built:
            self._built[key] = build_schedule(
                self._layout, tied_embeddings=self._tied, training=True, applies=applies, policy=policy
            )
        return self._built[key]


def work_of_step(job: TrainingJob) -> Work:
    """The operations of a training step of the job."""
    rows, length = job.micro_batch.input_ids.shape
    return work_of(job.partition, job.layout, [(rows, length)] * job.accumulation)


def compute_of(job: TrainingJob, work: Work) -> Mapping[StageKey, float] | None:
    """Seconds of each stage of a step, as measured, else by its operations; None where rates are not known."""
    hardware = job.hardware
    if hardware.read is None or hardware.write is None:
        return None
    if job.seconds is not None:
        return {stage: job.accumulation * seconds for stage, seconds in job.seconds.items()}
    rate = hardware.flops_per_second
    return None if rate is None else work.seconds(rate)


def policy_of(job: TrainingJob) -> UpdatePolicy:
    """What a step does with its gradients as long as their norm stays below the limit."""
    if not job.defers:
        return "immediate"
    return "speculative" if job.commits_at_once else "deferred"


def _commits(job: TrainingJob) -> tuple[float, float]:
    """Share of the steps that commit, and share of those that do not."""
    every = job.steps_to_a_commit
    return 1 / every, 1 - 1 / every


def activations_moved(job: TrainingJob, memory: RamPlan) -> dict[int, float]:
    """Bytes of activation checkpoints that a step writes to the drive and reads back, by stop of the block."""
    needs = memory.needs
    # Those of the last blocks stay where they are computed, if that has memory of its own.
    blocks = needs.activations // max(1, needs.activations_per_block)
    in_ram = memory.activations if memory.is_spilled else None
    plan = activation_plan(blocks, needs.activations_per_block, in_ram)
    if not plan.on_drive:
        return {}
    return {job.layout.block(index): plan.moved_nbytes / plan.on_drive for index in range(plan.on_drive)}


def phases_of(
    job: TrainingJob, memory: RamPlan, policy: UpdatePolicy, schedules: Schedules
) -> dict[str, tuple[float, float]]:
    """(Bytes read, bytes written) by phase of a step in the steady state, averaged between two commits."""
    schedule = schedules.of(policy, applies=policy == "deferred")
    phases = dict.fromkeys(map(str, Phase), (0.0, 0.0))
    for share, commits in zip(_commits(job), (True, False), strict=True):
        for phase, moved_bytes in schedule.traffic_by_phase(memory.residents, commits=commits).items():
            phases[phase] = float(moved_bytes[0]), phases[phase][1] + share * moved_bytes[1]
    moved = sum(activations_moved(job, memory).values())
    forward, backward = phases[Phase.FORWARD], phases[Phase.BACKWARD]
    phases[Phase.FORWARD] = forward[0], forward[1] + moved
    phases[Phase.BACKWARD] = backward[0] + moved, backward[1]
    return phases


def written_by_commit(job: TrainingJob, memory: RamPlan, policy: UpdatePolicy, schedules: Schedules) -> int:
    """The most bytes that a step writes: one that commits, and that takes its speculative updates back."""
    schedule = schedules.of(policy, applies=policy == "deferred")
    _, written = schedule.traffic(memory.residents)
    if job.defers:
        written += flush_schedule(job.layout).traffic(memory.residents)[1]
    return written + ceil(sum(activations_moved(job, memory).values()))


def step_time(
    job: TrainingJob,
    memory: RamPlan,
    compute: Mapping[StageKey, float],
    policy: UpdatePolicy,
    schedules: Schedules,
    *,
    vram: VramPlan | None = None,
) -> StepTime:
    """Simulate a step in the steady state, averaged between two commits.

    Args:
        job: the run.
        memory: how RAM is divided.
        compute: seconds of each stage of the step, all micro-batches.
        policy: what the step does with its gradients.
        schedules: of the job.
        vram: how the memory of a GPU is divided, if one computes.

    Raises:
        StandstillError: the simulator came to a standstill, which is a bug.
    """
    applies = policy == "deferred"
    first = schedules.of(policy)
    then = schedules.of(policy, applies=True) if applies else first
    every = job.steps_to_a_commit
    pattern = [True] * 3 if every == 1 else [False, False, True, False]
    played = simulate(
        [(first if index == 0 else then, commits) for index, commits in enumerate(pattern)],
        job.layout,
        memory.pool if vram is None else _pool_on_device(job, memory, vram),
        compute,
        _rates(job),
        residents=memory.residents,
        inputs=activations_moved(job, memory),
        behind=0 if vram is None else memory.pool.gradients[0].count - memory.needs.gathered,
    )
    # The step that commits, the one that it passes the commit on to, and those in between.
    weights = {2: 1.0} if every == 1 else {2: 1 / every, 3: 1 / every, 1: 1 - 2 / every}

    def mean(name: str) -> dict[str, float]:
        means: dict[str, float] = {}
        for index, weight in weights.items():
            for key, value in getattr(played[index], name).items():
                means[str(key)] = means.get(str(key), 0.0) + weight * value
        return means

    seconds = sum(weight * played[index].seconds for index, weight in weights.items())
    return StepTime(
        seconds=seconds,
        phases=mean("phases"),
        waits=mean("waits"),
        compute=sum(compute.values()),
        is_measured=job.seconds is not None,
    )


def _pool_on_device(job: TrainingJob, memory: RamPlan, vram: VramPlan) -> PoolSizes:
    """The pool that the simulation plays with where a GPU computes: the device's buffers, and RAM's chunk slots."""
    layout = job.layout
    others = [layout.embedding] if layout.head is None else [layout.embedding, layout.head]

    def kinds_of(
        buffers: Mapping[DeviceKind, tuple[int, int]], nbytes_of: Callable[[int], int]
    ) -> Iterator[BufferKind]:
        for state_format in dict.fromkeys(record.format for record in layout.records):
            own = {kind.stop: size for kind, size in buffers.items() if kind.format == state_format}
            for_all, block = own.pop("any", (0, 0)), own.pop("block", (0, 0))
            needed = [
                nbytes_of(record)
                for stop in others
                for record in layout.stops[stop]
                if layout.records[record].format == state_format
            ]
            # Smaller records than a block have buffers of their own there, and none in the simulation.
            smaller = 0 if block == (0, 0) else sum(size <= block[0] for size in needed)
            yield BufferKind(state_format, *for_all)
            yield BufferKind(state_format, block[0], block[1] + smaller)
            sizes = own.values()
            yield BufferKind(
                state_format,
                max((nbytes for nbytes, _ in sizes), default=0),
                sum(count for _, count in sizes),
            )

    gradients = vram.pool.gradients
    if vram.pool.gathers:
        # RAM has room for those of a stop, and for a tied table's beside them.
        count = 1 + bool(job.partition.tied_parameters)
        sizes: dict[DeviceKind, tuple[int, int]] = {}
        for record in layout.trained:
            kind, nbytes = (
                DeviceKind("any", layout.records[record].format),
                layout.record_gradient_bytes(record),
            )
            sizes[kind] = max(sizes.get(kind, (0, 0)), (nbytes, count))
        gradients = sizes
    return PoolSizes(
        memory.pool.chunk_slots,
        weights=tuple(kinds_of(vram.pool.weights, layout.record_weight_bytes)),
        gradients=tuple(kinds_of(gradients, layout.record_gradient_bytes)),
    )


def _rates(job: TrainingJob) -> Rates:
    """The machine's rates; those that are not known are taken as infinite."""
    hardware, scratch = job.hardware, job.layout.durability == "scratch"
    trained = (job.layout.records[record].format for record in job.layout.trained)
    written = max((SPECS[state_format].written_bytes for state_format in trained), default=0)
    return Rates(
        read=hardware.read or inf,
        write=hardware.write or inf,
        side_by_side=hardware.side_by_side,
        check=hardware.checksum_gb_per_s * 1e9,
        update=1 / (1 / hardware.adamw_parameters_per_s + written / (hardware.checksum_gb_per_s * 1e9)),
        shares_cores=hardware.shares_cores,
        commit=0.0 if scratch else hardware.commit_seconds,
    )


def hiding_tokens(
    job: TrainingJob,
    phases: Mapping[str, tuple[float, float]],
    compute: Mapping[StageKey, float],
) -> int:
    """Tokens of a step from which on both halves of it compute for longer than they move bytes."""
    hardware = job.hardware
    halves = ({Phase.EMBEDDING, Phase.FORWARD}, {Phase.HEAD, Phase.BACKWARD, Phase.EMBEDDING_BACKWARD})
    most = 0.0
    for half in halves:
        read = sum(phases[phase][0] for phase in half) / (hardware.read or inf)
        write = sum(phases[phase][1] for phase in half) / (hardware.write or inf)
        both = max((read + write) / hardware.side_by_side, read, write)
        computing = sum(seconds for (phase, _), seconds in compute.items() if phase in half)
        most = max(most, both / computing if computing else 0.0)
    return round(job.tokens * most)
