"""A budget of RAM, divided before the run: what must be there, what helps, and what stays from step to step."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from megatrain_io.errors import ConfigError
from megatrain_io.layout import PAGE_BYTES, ModelLayout
from megatrain_io.residents import choose_residents, resident_nbytes
from megatrain_io.schedule import ChunkOp, PoolSizes, Residents, pool_sizes

__all__ = ["MemoryPlan", "StepNeeds", "divide", "smallest"]

_HUGE_PAGE_BYTES = 2 << 20
_SMALL = 64 << 20
# Of the file for saved inputs: its tables, and the buffers of its commit.
_SCRATCH_TABLES = 512 << 10
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
        saved_inputs_least: with all that can be on the drive instead.
        is_rehearsed: whether ``activations`` is known; if not it is 0, and comes on top of the budget.
    """

    tables: int
    activations: int
    saved_inputs: int
    saved_inputs_least: int
    is_rehearsed: bool = True

    @property
    def saved_inputs_at_least(self) -> int:
        """The least RAM for inputs of blocks, with the tables of the file that the others go to."""
        return min(self.saved_inputs, self.saved_inputs_least + _SCRATCH_TABLES)

    @property
    def always(self) -> int:
        """What no budget can change."""
        return self.tables + self.activations + self.heap

    @property
    def heap(self) -> int:
        """What the C heap and torch's kernels keep beside the tensors: at most as much again, measured."""
        return self.activations


@dataclass(frozen=True)
class MemoryPlan:
    """How a budget is divided.

    Attributes:
        ram: the budget.
        needs: what a step needs besides.
        saved_inputs: RAM for inputs of blocks; the rest of them goes to the drive.
        pool: buffers of transfers and gradients.
        residents: what stays in RAM from step to step.
        pool_nbytes: of pool and gradients.
        resident_nbytes: of the residents.
    """

    ram: int
    needs: StepNeeds
    saved_inputs: int
    pool: PoolSizes
    residents: Residents
    pool_nbytes: int
    resident_nbytes: int

    @property
    def total(self) -> int:
        """Bytes that will be taken: at most the budget."""
        return self.needs.always + self.saved_inputs + self.pool_nbytes + self.resident_nbytes

    @property
    def is_spilled(self) -> bool:
        """Whether some inputs of blocks go to the drive."""
        return self.saved_inputs < self.needs.saved_inputs

    def __str__(self) -> str:
        """The division, for a person."""
        stays = f"state that stays {_mib(self.resident_nbytes)}" if self.resident_nbytes else "no state stays"
        spilled = f" (of {_mib(self.needs.saved_inputs)}, the rest on the drive)" if self.is_spilled else ""
        compute = f"compute {_mib(self.needs.activations + self.needs.heap)}"
        if not self.needs.is_rehearsed:
            compute = "compute not counted (its shapes depend on the data: it comes on top of memory.ram)"
        return (
            f"RAM: {_mib(self.total)} of {_mib(self.ram)}: buffers {_mib(self.pool_nbytes)}, inputs of blocks "
            f"{_mib(self.saved_inputs)}{spilled}, {compute}, tables {_mib(self.needs.tables)}, {stays}"
        )


def divide(
    layout: ModelLayout,
    schedule: Sequence[ChunkOp],
    needs: StepNeeds,
    *,
    borrows_prologue: bool,
    ram: int,
) -> MemoryPlan:
    """Divide ``ram`` bytes: the largest pool that fits, then inputs of blocks, then residents.

    A byte of an input saves two bytes a step, as one of a weight does, and needs no commit.

    Raises:
        ConfigError: it is too small; says what would do.
    """
    for sizes in _POOLS:
        pool = pool_sizes(
            layout, borrows_prologue=borrows_prologue, training=True, residents=Residents(), **sizes
        )
        if needs.always + needs.saved_inputs_at_least + _mapped(pool, 0) <= ram:
            break
    else:
        least = smallest(layout, needs, borrows_prologue=borrows_prologue)
        compute = needs.activations + needs.heap
        raise ConfigError(
            f"memory.ram is {_mib(ram)}, and this training needs {_mib(least)} at least: inputs of blocks "
            f"{_mib(needs.saved_inputs_at_least)}, compute {_mib(compute)}, tables {_mib(needs.tables)}, "
            f"buffers {_mib(least - needs.always - needs.saved_inputs_at_least)}. Give "
            "more, or make a step smaller: train.per_device_train_batch_size, data.max_length, "
            "train.gradient_accumulation_steps"
        )
    saved_inputs = min(needs.saved_inputs, ram - needs.always - _mapped(pool, 0))
    if saved_inputs < needs.saved_inputs:
        saved_inputs -= _SCRATCH_TABLES
    chosen, taken = Residents(), 0
    # What stays needs no buffers in the pool, and their room is for more that stays.
    while True:
        room = ram - needs.always - saved_inputs - _mapped(pool, 0)
        found = choose_residents(layout, schedule, room - _HUGE_PAGE_BYTES)
        slimmer = pool_sizes(
            layout, borrows_prologue=borrows_prologue, training=True, residents=found, **sizes
        )
        nbytes = resident_nbytes(found, layout)
        if nbytes <= taken:
            break
        chosen, taken, pool = found, nbytes, slimmer
    pool_nbytes = _mapped(pool, 0)
    resident = _mapped(pool, taken) - pool_nbytes
    return MemoryPlan(ram, needs, saved_inputs, pool, chosen, pool_nbytes, resident)


def smallest(layout: ModelLayout, needs: StepNeeds, *, borrows_prologue: bool) -> int:
    """The least RAM that such a step can be done in."""
    pool = pool_sizes(
        layout, borrows_prologue=borrows_prologue, training=True, residents=Residents(), **_POOLS[-1]
    )
    return needs.always + needs.saved_inputs_at_least + _mapped(pool, 0)


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
    """Rounded up, so that what is named is enough."""
    if nbytes < _SMALL:
        return f"{math.ceil(nbytes / (1 << 20) * 10) / 10} MiB"
    return f"{-(-nbytes // (1 << 20))} MiB"
