"""What is planned, and one step of it: its schedule, what it moves, how long it takes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from math import ceil, inf

from megatrain_io.budget import MemoryPlan
from megatrain_io.checkpoint import saved_inputs_plan
from megatrain_io.config import RunConfig
from megatrain_io.fitting import saved_inputs_of
from megatrain_io.hardware import Hardware
from megatrain_io.layout import ModelLayout
from megatrain_io.model import CutModel, MicroBatch
from megatrain_io.planned import StepTime
from megatrain_io.program import StopKey
from megatrain_io.rows import blank_micro_batch
from megatrain_io.schedule import (
    ChunkOp,
    Gradients,
    Phase,
    PoolSizes,
    build_schedule,
    flush_schedule,
    traffic,
)
from megatrain_io.simulator import Rates, simulate
from megatrain_io.vram import VramPlan

__all__ = [
    "Candidate",
    "forget_schedules",
    "gradients_of",
    "hiding_tokens",
    "inputs_moved",
    "phases_of",
    "schedule_of",
    "step_time",
    "written_by_commit",
]


# Seconds for each chunk that workers check or update on cores that torch's threads are spinning on: woken late, they
# let those wait for one another. Measured with benches/plan/accuracy.py, on two cores.
_HANDOFF = 0.9e-3


@dataclass(frozen=True)
class Candidate:
    """What is planned: a configuration over a model.

    Attributes:
        config: of the run.
        cut: the model without its parameters.
        layout: of its store, which need not be there.
        micro_batches: of the largest step.
        tables: bytes that the store itself takes when it is open.
        ram: bytes that training may take.
        vram: of the memory of a device; None where the CPU computes.
        steps: of the run; None where it is not known.
        is_made: whether the store is there already.
    """

    config: RunConfig
    cut: CutModel
    layout: ModelLayout
    micro_batches: Sequence[MicroBatch]
    tables: int
    ram: int
    steps: int | None = None
    is_made: bool = False
    vram: int | None = None

    @property
    def tokens(self) -> int:
        """Of a step."""
        return sum(batch.input_ids.numel() for batch in self.micro_batches)

    @property
    def keeps(self) -> bool:
        """Whether gradients wait for their norm."""
        return self.config.train.max_grad_norm is not None

    @property
    def commits_at_once(self) -> bool:
        """Whether every step is committed: then a step may guess that its gradients stay below the limit."""
        return self.config.memory.commit_every == 1 and self.layout.durability == "step"

    def with_accumulation(self, count: int) -> "Candidate":
        """The same with ``count`` micro-batches like the first one."""
        train = self.config.train.model_copy(update={"gradient_accumulation_steps": count})
        config = self.config.model_copy(update={"train": train})
        return replace(self, config=config, micro_batches=[self.micro_batches[0]] * count)

    def with_rows(self, batch: int, length: int, tokens: int) -> "Candidate":
        """The same with ``tokens`` a step or a few more, in micro-batches of ``batch`` rows of ``length``."""
        train, data = self.config.train, self.config.data
        count = max(1, -(-tokens // (batch * length)))
        config = self.config.model_copy(
            update={
                "train": train.model_copy(
                    update={"per_device_train_batch_size": batch, "gradient_accumulation_steps": count}
                ),
                "data": data.model_copy(update={"max_length": length}),
            }
        )
        packed = data.packing and self.cut.facts.packs
        return replace(
            self, config=config, micro_batches=[blank_micro_batch(batch, length, packed=packed)] * count
        )


# ---------------------------------------------------------------------------------------------- one step


def schedule_of(candidate: Candidate, gradients: Gradients, *, applies: bool = False) -> tuple[ChunkOp, ...]:
    """That of a training step, as training builds it; kept until ``forget_schedules``, as large ones take seconds."""
    return _schedule(candidate.layout, bool(candidate.cut.epilogue_borrowed), gradients, applies)


@lru_cache(maxsize=4)
def _schedule(
    layout: ModelLayout,
    borrows_prologue: bool,  # noqa: FBT001 - of one caller
    gradients: Gradients,
    applies: bool,  # noqa: FBT001
) -> tuple[ChunkOp, ...]:
    return build_schedule(
        layout, borrows_prologue=borrows_prologue, training=True, applies=applies, gradients=gradients
    )


def forget_schedules() -> None:
    """Give back the RAM of schedules that were kept."""
    _schedule.cache_clear()


def gradients_of(candidate: Candidate) -> Gradients:
    """What a step does with its gradients as long as none is too large."""
    if not candidate.keeps:
        return "update"
    return "both" if candidate.commits_at_once else "keep"


def _commits(candidate: Candidate) -> tuple[float, float]:
    """Shares of steps that commit, and that do not."""
    if candidate.layout.durability == "scratch":
        return 1.0, 0.0
    every = candidate.config.memory.commit_every
    return 1 / every, 1 - 1 / every


def inputs_moved(candidate: Candidate, memory: MemoryPlan) -> dict[int, float]:
    """Bytes of inputs that go to the drive and come back, by record."""
    budget, needs = saved_inputs_of(memory, [candidate.config.output_dir / "inputs"]), memory.needs
    # Those of the last blocks stay where they are computed, if that has memory of its own.
    blocks = needs.saved_inputs // max(1, needs.inputs_per_block)
    plan = saved_inputs_plan(blocks, needs.inputs_per_block, budget.ram_bytes)
    if not plan.on_drive:
        return {}
    return {
        candidate.layout.block(index): plan.moved_nbytes / plan.on_drive for index in range(plan.on_drive)
    }


def phases_of(
    candidate: Candidate, memory: MemoryPlan, gradients: Gradients
) -> dict[str, tuple[float, float]]:
    """Bytes read and written, by phase, of a step between others of its kind."""
    schedule = schedule_of(candidate, gradients, applies=gradients == "keep")
    layout, residents = candidate.layout, memory.residents
    shares = list(zip(_commits(candidate), (True, False), strict=True))
    found = dict.fromkeys(map(str, Phase), (0.0, 0.0))
    for operation in schedule:
        read, written = found[operation.phase]
        written += sum(
            share * operation.written_bytes(layout, residents, commits=commits)
            for share, commits in shares
            if share
        )
        found[operation.phase] = read + operation.read_bytes(layout, residents), written
    moved = sum(inputs_moved(candidate, memory).values())
    forward, backward = found[Phase.FORWARD], found[Phase.BACKWARD]
    found[Phase.FORWARD] = forward[0], forward[1] + moved
    found[Phase.BACKWARD] = backward[0] + moved, backward[1]
    return found


def written_by_commit(candidate: Candidate, memory: MemoryPlan, gradients: Gradients) -> int:
    """The most that a step writes: one that commits, whose guess, if it makes one, was wrong."""
    schedule = schedule_of(candidate, gradients, applies=gradients == "keep")
    _, written = traffic(schedule, candidate.layout, memory.residents)
    if candidate.keeps:
        written += traffic(flush_schedule(candidate.layout), candidate.layout, memory.residents)[1]
    return written + ceil(sum(inputs_moved(candidate, memory).values()))


def step_time(
    candidate: Candidate,
    memory: MemoryPlan,
    compute: Mapping[StopKey, float],
    hardware: Hardware,
    gradients: Gradients,
    *,
    vram: VramPlan | None = None,
    is_measured: bool = False,
) -> StepTime:
    """Seconds of a step in the steady state."""
    applies = gradients == "keep"
    first = schedule_of(candidate, gradients)
    then = schedule_of(candidate, gradients, applies=True) if applies else first
    every = 1 if candidate.layout.durability == "scratch" else candidate.config.memory.commit_every
    pattern = [True] * 3 if every == 1 else [False, False, True, False]
    played = simulate(
        [(first if index == 0 else then, commits) for index, commits in enumerate(pattern)],
        candidate.layout,
        memory.pool if vram is None else _pool_on_device(candidate, memory, vram),
        compute,
        _rates(candidate, hardware),
        residents=memory.residents,
        inputs=inputs_moved(candidate, memory),
        behind=0 if vram is None else memory.pool.block_gradients[1] - memory.needs.gathered,
    )
    # The step that commits, the one that it passes the commit on to, and those in between.
    weights = {2: 1.0} if every == 1 else {2: 1 / every, 3: 1 / every, 1: 1 - 2 / every}

    def mean(name: str) -> dict[str, float]:
        found: dict[str, float] = {}
        for index, weight in weights.items():
            for key, value in getattr(played[index], name).items():
                found[str(key)] = found.get(str(key), 0.0) + weight * value
        return found

    seconds = sum(weight * played[index].seconds for index, weight in weights.items())
    return StepTime(
        seconds=seconds,
        phases=mean("phases"),
        waits=mean("waits"),
        compute=sum(compute.values()),
        is_measured=is_measured,
    )


def _pool_on_device(candidate: Candidate, memory: MemoryPlan, vram: VramPlan) -> PoolSizes:
    """Buffers that records pass through, as the simulation knows them: those of the device."""

    def outer(kinds: Mapping[str, tuple[int, int]]) -> tuple[int, int]:
        sizes = [size for kind, size in kinds.items() if kind not in {"block", "any"}]
        return max((nbytes for nbytes, _ in sizes), default=0), sum(count for _, count in sizes)

    def block(kinds: Mapping[str, tuple[int, int]], needed: list[int]) -> tuple[int, int]:
        if "any" in kinds:
            return kinds["any"]
        nbytes, count = kinds["block"]
        # Smaller records than a block have buffers of their own there, and none in the simulation.
        return nbytes, count + sum(each <= nbytes for each in needed)

    layout, pool, gradients = candidate.layout, vram.pool, vram.pool.gradients
    if pool.gathers:
        # RAM has room for one of a record, and for a tied table's beside it.
        largest = max(map(layout.record_gradient_bytes, range(len(layout.records))))
        gradients = {"any": (largest, 1 + bool(candidate.cut.epilogue_borrowed))}
    others = [record for record in (layout.prologue, layout.epilogue) if record is not None]
    return PoolSizes(
        memory.pool.chunk_slots,
        block(pool.weights, [layout.record_weight_bytes(record) for record in others]),
        outer(pool.weights),
        block(gradients, [layout.record_gradient_bytes(record) for record in others]),
        outer(gradients),
    )


def _rates(candidate: Candidate, hardware: Hardware) -> Rates:
    scratch = candidate.layout.durability == "scratch"
    return Rates(
        read=hardware.read or inf,
        write=hardware.write or inf,
        side_by_side=hardware.side_by_side,
        check=hardware.checksum_gb_per_s * 1e9,
        update=1 / (1 / hardware.adamw_parameters_per_s + 12 / (hardware.checksum_gb_per_s * 1e9)),
        shares_cores=hardware.shares_cores,
        handoff=_HANDOFF if hardware.shares_cores else 0.0,
        commit=0.0 if scratch else hardware.commit_seconds,
    )


def hiding_tokens(
    candidate: Candidate,
    phases: Mapping[str, tuple[float, float]],
    hardware: Hardware,
    compute: Mapping[StopKey, float],
) -> int:
    """Tokens of a step from which on both halves of it compute for longer than they move bytes."""
    halves = ({Phase.PROLOGUE, Phase.FORWARD}, {Phase.EPILOGUE, Phase.BACKWARD, Phase.PROLOGUE_BACKWARD})
    most = 0.0
    for half in halves:
        read = sum(phases[phase][0] for phase in half) / (hardware.read or inf)
        write = sum(phases[phase][1] for phase in half) / (hardware.write or inf)
        both = max((read + write) / hardware.side_by_side, read, write)
        computing = sum(seconds for (phase, _), seconds in compute.items() if phase in half)
        most = max(most, both / computing if computing else 0.0)
    return round(candidate.tokens * most)
