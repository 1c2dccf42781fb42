"""A budget of RAM, divided before the run: what must be there, what helps, and what stays from step to step."""

from collections.abc import Sequence
from dataclasses import dataclass

from megatrain_io.errors import ConfigError
from megatrain_io.layout import PAGE_BYTES, ModelLayout
from megatrain_io.residents import choose_residents, resident_nbytes
from megatrain_io.schedule import ChunkOp, PoolSizes, Residents, pool_sizes

__all__ = ["MemoryPlan", "StepNeeds", "divide", "smallest"]

_HUGE_PAGE_BYTES = 2 << 20
# Slots of each kind, from what overlaps best to what a step cannot do without.
_POOLS = (
    {"block_buffers": 3, "chunk_slots": 4, "block_gradients": 2},
    {"block_buffers": 3, "chunk_slots": 2, "block_gradients": 1},
    {"block_buffers": 2, "chunk_slots": 2, "block_gradients": 1},
    {"block_buffers": 2, "chunk_slots": 1, "block_gradients": 1},
)


@dataclass(frozen=True)
class StepNeeds:
    """What a step needs besides pool and residents, in bytes.

    Attributes:
        tables: of the store, and buffers of its commit.
        activations: tensors of compute that are alive at once.
        saved_inputs: inputs of all blocks and micro-batches.
    """

    tables: int
    activations: int
    saved_inputs: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.tables + self.activations + self.saved_inputs


@dataclass(frozen=True)
class MemoryPlan:
    """How a budget is divided.

    Attributes:
        ram: the budget.
        needs: what a step needs besides.
        pool: buffers of transfers and gradients.
        residents: what stays in RAM from step to step.
        pool_nbytes: of pool and gradients.
        resident_nbytes: of the residents.
    """

    ram: int
    needs: StepNeeds
    pool: PoolSizes
    residents: Residents
    pool_nbytes: int
    resident_nbytes: int

    @property
    def total(self) -> int:
        """Bytes that will be taken: at most the budget."""
        return self.needs.total + self.pool_nbytes + self.resident_nbytes

    def __str__(self) -> str:
        """The division, for a person."""
        stays = f"state that stays {_mib(self.resident_nbytes)}" if self.resident_nbytes else "no state stays"
        return (
            f"RAM: {_mib(self.total)} of {_mib(self.ram)}: buffers {_mib(self.pool_nbytes)}, inputs of blocks "
            f"{_mib(self.needs.saved_inputs)}, compute {_mib(self.needs.activations)}, tables "
            f"{_mib(self.needs.tables)}, {stays}"
        )


def divide(
    layout: ModelLayout,
    schedule: Sequence[ChunkOp],
    needs: StepNeeds,
    *,
    borrows_prologue: bool,
    ram: int,
) -> MemoryPlan:
    """Divide ``ram`` bytes: the largest pool that fits, and residents with what is left.

    Raises:
        ConfigError: it is too small; says what would do.
    """
    for sizes in _POOLS:
        pool = pool_sizes(
            layout, borrows_prologue=borrows_prologue, training=True, residents=Residents(), **sizes
        )
        if needs.total + _mapped(pool, 0) <= ram:
            break
    else:
        least = smallest(layout, needs, borrows_prologue=borrows_prologue)
        raise ConfigError(
            f"memory.ram is {_mib(ram)}, and this training needs {_mib(least)} at least: inputs of blocks "
            f"{_mib(needs.saved_inputs)}, compute {_mib(needs.activations)}, tables {_mib(needs.tables)}, buffers "
            f"{_mib(least - needs.total)}. Give more, or make a step smaller: train.per_device_train_batch_size, "
            "data.max_length, train.gradient_accumulation_steps"
        )
    chosen, taken = Residents(), 0
    # What stays needs no buffers in the pool, and their room is for more that stays.
    while True:
        room = ram - needs.total - _mapped(pool, 0)
        found = choose_residents(layout, schedule, room - _HUGE_PAGE_BYTES)
        slimmer = pool_sizes(
            layout, borrows_prologue=borrows_prologue, training=True, residents=found, **sizes
        )
        nbytes = resident_nbytes(found, layout)
        if nbytes <= taken:
            break
        chosen, taken, pool = found, nbytes, slimmer
    pool_nbytes = _mapped(pool, 0)
    return MemoryPlan(ram, needs, pool, chosen, pool_nbytes, _mapped(pool, taken) - pool_nbytes)


def smallest(layout: ModelLayout, needs: StepNeeds, *, borrows_prologue: bool) -> int:
    """The least RAM that such a step can be done in."""
    pool = pool_sizes(
        layout, borrows_prologue=borrows_prologue, training=True, residents=Residents(), **_POOLS[-1]
    )
    return needs.total + _mapped(pool, 0)


def _mapped(pool: PoolSizes, resident: int) -> int:
    """Bytes of the one mapping: lists of large slots start at 2 MiB borders, and so do the residents."""
    total = 0
    for nbytes, count in vars(pool).values():
        slot = _up(nbytes, PAGE_BYTES)
        if slot >= _HUGE_PAGE_BYTES:
            total = _up(total, _HUGE_PAGE_BYTES)
        total += slot * count
    return _up(total, _HUGE_PAGE_BYTES) + resident if resident else total


def _up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def _mib(nbytes: int) -> str:
    return f"{-(-nbytes // (1 << 20))} MiB"
