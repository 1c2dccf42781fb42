"""Sizes of the pool: buffers that transfers and gradients use, and the mapping that holds them."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from megatrain_io.store.layout import PAGE_BYTES, Chunk, ModelLayout
from megatrain_io.store.schedule import Residents
from megatrain_io.store.state_format import StateFormat

__all__ = ["HUGE_PAGE_BYTES", "BufferKind", "PoolSizes", "Unit", "kind_for", "mapped_nbytes", "pool_sizes"]

Unit = Literal["record", "chunk"]
"""What one buffer of the pool holds."""

HUGE_PAGE_BYTES = 2 << 20
_NOTHING = Residents()


@dataclass(frozen=True)
class BufferKind:
    """Buffers of one size, for weights or gradients.

    Attributes:
        format: of the records that they are for; None = of all.
        nbytes: of a buffer.
        count: of buffers.
    """

    format: StateFormat | None
    nbytes: int
    count: int

    def holds(self, state_format: StateFormat, nbytes: int) -> bool:
        """Whether ``nbytes`` of a record of that format have room in a buffer of this kind."""
        return self.format in {None, state_format} and nbytes <= self.nbytes and self.count > 0


@dataclass(frozen=True)
class PoolSizes:
    """Sizes of a pool, in the order in which its memory is cut.

    What is loaded gets a buffer of the first kind that holds it, and so does its gradient. By record each format has
    two: for its records in blocks, and for those that are larger than any of these (embedding, head).

    Attributes:
        chunk_slots: ``(bytes, count)`` of the slots for chunks that are updated.
        weights: for weights on their way to compute.
        outgoing: by chunk, ``(bytes, count)`` of the buffers for weights that come back for their update.
        gradients: for fp32 gradients.
    """

    chunk_slots: tuple[int, int] = (0, 0)
    weights: tuple[BufferKind, ...] = ()
    outgoing: tuple[int, int] = (0, 0)
    gradients: tuple[BufferKind, ...] = ()

    @property
    def slots(self) -> list[tuple[int, int]]:
        """``(bytes, count)`` of each kind of slot, in order."""
        weights, gradients = (
            [(kind.nbytes, kind.count) for kind in kinds] for kinds in (self.weights, self.gradients)
        )
        return [self.chunk_slots, *weights, self.outgoing, *gradients]

    @property
    def total_bytes(self) -> int:
        """Bytes of the whole pool."""
        return sum(nbytes * count for nbytes, count in self.slots)


def kind_for(kinds: Sequence[BufferKind], state_format: StateFormat, nbytes: int) -> int:
    """Number of the kind, among ``kinds``, that ``nbytes`` of a record of that format get a buffer of: the first one.

    Raises:
        ValueError: none has room for them.
    """
    for number, kind in enumerate(kinds):
        if kind.holds(state_format, nbytes):
            return number
    raise ValueError(f"a pool without a buffer for {nbytes} bytes of a record in {state_format}")


def pool_sizes(  # noqa: PLR0913 - each with a meaning of its own
    layout: ModelLayout,
    *,
    tied_embeddings: bool,
    training: bool,
    residents: Residents = _NOTHING,
    defers: bool = False,
    unit: Unit = "record",
    block_buffers: int = 3,
    chunk_slots: int = 4,
    block_gradients: int = 2,
    gathered: int = 0,
) -> PoolSizes:
    """Size the pool for ``build_schedule``'s step.

    A stop has one record of each format, so what is said of one format holds for each by itself. Records larger than
    any in a block (of embeddings, head) have buffers of their own kind: one is enough, because the step needs them one
    after the other, except where a tied head holds embedding and head at once.

    Args:
        layout: the parameter space.
        tied_embeddings: whether the head needs the embedding's weights, too.
        training: False leaves out what only updates need, as frozen weights do.
        residents: they have memory of their own, which is not counted here.
        defers: whether gradients wait for their norm, on the drive where they have no buffer of their own.
        unit: what a buffer holds. Chunks, on their way to compute with memory of its own and back, have as many
            buffers as are said for blocks, of any format, and as many to come back in as there are for gradients.
        block_buffers: one of each format to compute with and the others to read ahead; at least two, because the last
            block waits in its buffer while the head runs.
        chunk_slots: updates in flight.
        block_gradients: one to accumulate in and the others for updates behind.
        gathered: by chunk, how many more gradients gather here as the device has no room for those of a record.
    """
    if block_buffers < (1 if unit == "chunk" else 2) or chunk_slots < 1 or block_gradients < 1:
        raise ValueError("a pool needs two block buffers, one chunk slot and one gradient buffer at least")
    paged = [record for record in range(len(layout.records)) if record not in residents.records]
    shared = [record for record in layout.trained if record not in residents.gradients]
    # Deferred gradients are applied on the weights' way to compute, so those are written from elsewhere.
    slot = updated = 0
    for record in layout.trained:
        chunks: Sequence[Chunk] = layout.chunks_of(record)
        if not defers and record in residents.records:
            chunks = [chunk for chunk in chunks if chunk.index not in residents.chunks]
        updated += len(chunks)
        for chunk in chunks[:1]:  # the others are no larger
            waiting = layout.gradient_extent_bytes(chunk) if defers and record in shared else 0
            slot = max(slot, layout.weight_extent_bytes(chunk) + layout.update_extent_bytes(chunk) + waiting)
    slots = (slot, min(chunk_slots, updated) if training else 0)
    if unit == "chunk":
        first = list(layout.first_chunks())
        weights = max((layout.weight_extent_bytes(c) for c in first if c.record in paged), default=0)
        returning = [record for record in layout.trained if record in paged]
        gradient = max((layout.gradient_extent_bytes(c) for c in first if c.record in shared), default=0)
        back = max((layout.weight_extent_bytes(c) for c in first if c.record in returning), default=0)
        gradients = block_gradients + gathered if gradient and training else 0
        return PoolSizes(
            slots,
            (BufferKind(None, weights, block_buffers if weights else 0),),
            (back, block_gradients if back and training else 0),
            (BufferKind(None, gradient, gradients),),
        )
    # A tied head holds the embedding's weights beside the last block and the head, and its gradients from the head to
    # the end of the step.
    tables = layout.stops[layout.embedding] if tied_embeddings else ()
    kinds = [
        kind
        for state_format in dict.fromkeys(record.format for record in layout.records)
        for kind in _kinds_of(layout, state_format, paged, layout.record_weight_bytes, block_buffers, tables)
    ]
    gradient_kinds = [
        kind if training else replace(kind, count=0)
        for state_format in dict.fromkeys(layout.records[record].format for record in layout.trained)
        for kind in _kinds_of(
            layout,
            state_format,
            shared,
            layout.record_gradient_bytes,
            block_gradients,
            [table for table in tables if table in shared],
        )
    ]
    return PoolSizes(slots, tuple(kinds), (0, 0), tuple(gradient_kinds))


def _kinds_of(
    layout: ModelLayout,
    state_format: StateFormat,
    sharing: Iterable[int],
    nbytes_of: Callable[[int], int],
    count: int,
    tables: Iterable[int],
) -> tuple[BufferKind, BufferKind]:
    """The two kinds of a format: ``count`` buffers for records of blocks, and those for larger ones.

    Args:
        layout: the parameter space.
        state_format: of the records.
        sharing: all records, of any format, that get their buffers from the pool.
        nbytes_of: bytes of what a buffer holds, by record.
        count: buffers for records of blocks.
        tables: records of a tied embedding.
    """
    own = [record for record in sharing if layout.records[record].format == state_format]
    blocks = range(layout.block(0), layout.block(layout.blocks))
    largest = max((nbytes_of(record) for record in own if layout.stop_of[record] in blocks), default=0)
    outer = [record for record in own if nbytes_of(record) > largest]
    beside = [table for table in tables if layout.records[table].format == state_format]
    in_blocks = count + sum(table not in outer for table in beside)
    return (
        BufferKind(state_format, largest, min(in_blocks, len(own) - len(outer))),
        BufferKind(state_format, max(map(nbytes_of, outer), default=0), min(len(outer), 1 + len(beside))),
    )


def mapped_nbytes(pool: PoolSizes, *shares: int) -> int:
    """Bytes of the one mapping that holds ``pool``, and behind it ``shares`` of that many bytes each.

    Lists of large slots start at 2 MiB borders, and so does each share.
    """
    total = 0
    for nbytes, count in pool.slots:
        slot = _up(nbytes, PAGE_BYTES)
        if slot >= HUGE_PAGE_BYTES:
            total = _up(total, HUGE_PAGE_BYTES)
        total += slot * count
    for share in shares:
        total = _up(total, HUGE_PAGE_BYTES) + share if share else total
    return total


def _up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
