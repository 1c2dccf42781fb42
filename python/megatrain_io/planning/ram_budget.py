"""A budget of RAM, divided before the run: what must be there, what helps, and what stays from step to step."""

from dataclasses import dataclass, replace

from megatrain_io.errors import DoesNotFitError
from megatrain_io.planning.residents import (
    choose_gradients,
    choose_residents,
    gradient_nbytes,
    resident_nbytes,
)
from megatrain_io.store.layout import ModelLayout
from megatrain_io.store.pool import HUGE_PAGE_BYTES, PoolSizes, Unit, mapped_nbytes, pool_sizes
from megatrain_io.store.schedule import Residents, Schedule
from megatrain_io.text import mib

__all__ = ["RamPlan", "StepNeeds", "divide_ram", "least_ram"]

# Bytes of RAM for the file of activation checkpoints: its tables, and the buffers of its commit.
_SCRATCH_TABLES = 512 << 10
# Block buffers, chunk slots and gradient buffers, from what overlaps best to what a step cannot do without.
_POOLS = ((3, 4, 2), (3, 2, 1), (2, 2, 1), (2, 1, 1))
# The same, where each buffer holds a chunk.
_CHUNK_POOLS = ((8, 4, 4), (4, 2, 2), (2, 1, 1))
# Reciprocal share of the budget for chunks of a gradient that has left the device and was not updated yet.
_BEHIND_SHARE = 8


@dataclass(frozen=True)
class StepNeeds:
    """What a step needs besides pool and residents, in bytes.

    Attributes:
        tables: tables of the open store, and buffers of its commit.
        compute: tensors of compute that are alive at once.
        activations: activation checkpoints of all blocks and micro-batches.
        activations_least: what must be in RAM of them when all others are on the drive.
        activations_per_block: activation checkpoints of one block, all micro-batches.
        unit: what a buffer holds: chunks on their way to that memory and back, or records.
        gathered: number of chunks of gradients that gather in RAM, where that memory has no room for a record's.
        is_known: whether ``compute`` is known; if not it is 0, and comes on top of the budget.
    """

    tables: int
    compute: int
    activations: int
    activations_least: int
    activations_per_block: int = 0
    unit: Unit = "record"
    gathered: int = 0
    is_known: bool = True

    @property
    def activations_at_least(self) -> int:
        """The least bytes of RAM for activation checkpoints, with the tables of the file that the others go to."""
        return min(self.activations, self.activations_least + _SCRATCH_TABLES)

    @property
    def always(self) -> int:
        """Bytes that are taken however the rest is divided: tables, compute and its heap."""
        return self.tables + self.compute + self.heap

    @property
    def heap(self) -> int:
        """Bytes that the C heap and torch's kernels keep beside the tensors: at most as many again, as measured."""
        return self.compute


@dataclass(frozen=True)
class RamPlan:
    """How a budget of RAM is divided, in bytes.

    Attributes:
        ram: the budget.
        needs: what a step needs besides pool and residents.
        activations: RAM for activation checkpoints; the rest of them goes to the drive.
        pool: sizes and numbers of the buffers for transfers and gradients.
        residents: the state that stays in RAM from step to step.
        pool_nbytes: bytes of the pool.
        deferred_nbytes: bytes of gradients that wait for their norm in RAM; the others do so on the drive.
        resident_nbytes: bytes of the residents.
        spills_gradients: whether some gradients wait for their norm on the drive.
    """

    ram: int
    needs: StepNeeds
    activations: int
    pool: PoolSizes
    residents: Residents
    pool_nbytes: int
    deferred_nbytes: int
    resident_nbytes: int
    spills_gradients: bool

    @property
    def total(self) -> int:
        """Bytes that will be taken: at most the budget."""
        state = self.pool_nbytes + self.deferred_nbytes + self.resident_nbytes
        return self.needs.always + self.activations + state

    @property
    def is_spilled(self) -> bool:
        """Whether some activation checkpoints go to the drive."""
        return self.activations < self.needs.activations

    def __str__(self) -> str:
        """How the budget is divided, as a line for a person."""
        waiting = (
            f"gradients that wait for their norm {mib(self.deferred_nbytes)}" if self.deferred_nbytes else ""
        )
        if self.spills_gradients:
            waiting = (
                f"{waiting} (the rest on the drive)"
                if waiting
                else "gradients wait for their norm on the drive"
            )
        waiting += ", " * bool(waiting)
        stays = f"resident state {mib(self.resident_nbytes)}" if self.resident_nbytes else "no resident state"
        spilled = f" (of {mib(self.needs.activations)}, the rest on the drive)" if self.is_spilled else ""
        compute = f"compute {mib(self.needs.compute + self.needs.heap)}"
        if not self.needs.is_known:
            compute = "compute not counted (its shapes depend on the data: it comes on top of memory.ram)"
        return (
            f"RAM: {mib(self.total)} of {mib(self.ram)}: buffers {mib(self.pool_nbytes)}, activations "
            f"{mib(self.activations)}{spilled}, {compute}, tables {mib(self.needs.tables)}, {waiting}{stays}"
        )


def divide_ram(
    layout: ModelLayout,
    schedule: Schedule,
    needs: StepNeeds,
    *,
    tied_embeddings: bool,
    ram: int,
    defers: bool = False,
) -> RamPlan:
    """Divide ``ram`` bytes: the largest pool that fits, then activation checkpoints, gradients, residents.

    A byte of an input or of a gradient that waits saves two bytes a step, as one of a weight does, and no
    commit writes it.

    Args:
        layout: of the store.
        schedule: of a step.
        needs: what the step needs besides pool and residents.
        tied_embeddings: whether the head needs the embedding's weights, too.
        ram: the budget.
        defers: whether gradients wait until the norm over all of them is known.

    Raises:
        DoesNotFitError: ``ram`` is too small; the message has the least that is enough.
    """

    def size(slots: tuple[int, int, int], residents: Residents) -> PoolSizes:
        return _pool(layout, needs, slots, residents, tied_embeddings=tied_embeddings, defers=defers)

    for sizes in _chunk_pools(layout, ram) if needs.unit == "chunk" else _POOLS:
        pool = size(sizes, Residents())
        if needs.always + needs.activations_at_least + mapped_nbytes(pool) <= ram:
            break
    else:
        least = least_ram(layout, needs, tied_embeddings=tied_embeddings, defers=defers)
        compute = needs.compute + needs.heap
        raise DoesNotFitError(
            f"memory.ram is {mib(ram)}, and this training needs {mib(least)} at least: activations "
            f"{mib(needs.activations_at_least)}, compute {mib(compute)}, tables {mib(needs.tables)}, "
            f"buffers {mib(least - needs.always - needs.activations_at_least)}. Give "
            "more, or make a step smaller: train.per_device_train_batch_size, data.max_length, "
            "train.gradient_accumulation_steps"
        )
    activations = min(needs.activations, ram - needs.always - mapped_nbytes(pool))
    if activations < needs.activations:
        activations -= _SCRATCH_TABLES
    free = ram - needs.always - activations
    chosen, taken = Residents(), (0, 0)
    # What stays needs no buffers in the pool, and their room is for more that stays.
    while True:
        room = free - mapped_nbytes(pool) - 2 * HUGE_PAGE_BYTES
        gradients = choose_gradients(layout, room) if defers else frozenset[int]()
        kept = gradient_nbytes(Residents(gradients=gradients), layout)
        residents = replace(choose_residents(layout, schedule, room - kept), gradients=gradients)
        nbytes = (kept, resident_nbytes(residents, layout))
        slimmer = size(sizes, residents)
        # A choice need not hold what the one before did, and then its pool is larger again.
        if nbytes <= taken or mapped_nbytes(slimmer, *nbytes) > free:
            break
        chosen, taken, pool = residents, nbytes, slimmer
    sums = [mapped_nbytes(pool), mapped_nbytes(pool, taken[0]), mapped_nbytes(pool, *taken)]
    spills = defers and len(chosen.gradients) < len(layout.trained)
    return RamPlan(
        ram=ram,
        needs=needs,
        activations=activations,
        pool=pool,
        residents=chosen,
        pool_nbytes=sums[0],
        deferred_nbytes=sums[1] - sums[0],
        resident_nbytes=sums[2] - sums[1],
        spills_gradients=spills,
    )


def _chunk_pools(layout: ModelLayout, ram: int) -> list[tuple[int, int, int]]:
    """The pools to choose from where compute has memory of its own, the best first, as in ``_POOLS``.

    A gradient that is in RAM as a whole frees its buffer there before it is updated, as fast as it can be copied: so
    compute does not wait for the drive to take it.
    """
    block_buffers, chunk_slots, gradients = _CHUNK_POOLS[0]
    blocks = [
        sum(len(layout.chunks_of(record)) for record in layout.trained_of(layout.block(index)))
        for index in range(layout.blocks)
    ]
    per_chunk = max(
        layout.weight_extent_bytes(chunk) + layout.gradient_extent_bytes(chunk)
        for chunk in layout.first_chunks()
    )
    behind = min(gradients + max(blocks), ram // _BEHIND_SHARE // per_chunk)
    return [(block_buffers, chunk_slots, behind), *_CHUNK_POOLS] if behind > gradients else [*_CHUNK_POOLS]


def least_ram(layout: ModelLayout, needs: StepNeeds, *, tied_embeddings: bool, defers: bool = False) -> int:
    """The least bytes of RAM that a step which needs ``needs`` can be done in."""
    slots = (_CHUNK_POOLS if needs.unit == "chunk" else _POOLS)[-1]
    pool = _pool(layout, needs, slots, Residents(), tied_embeddings=tied_embeddings, defers=defers)
    return needs.always + needs.activations_at_least + mapped_nbytes(pool)


def _pool(
    layout: ModelLayout,
    needs: StepNeeds,
    slots: tuple[int, int, int],
    residents: Residents,
    *,
    tied_embeddings: bool,
    defers: bool,
) -> PoolSizes:
    block_buffers, chunk_slots, block_gradients = slots
    return pool_sizes(
        layout,
        tied_embeddings=tied_embeddings,
        training=True,
        residents=residents,
        defers=defers,
        unit=needs.unit,
        block_buffers=block_buffers,
        chunk_slots=chunk_slots,
        block_gradients=block_gradients,
        gathered=needs.gathered,
    )
