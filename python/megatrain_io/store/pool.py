"""Sizes of the pool: buffers that transfers and gradients use, and the mapping that holds them."""

from dataclasses import dataclass
from typing import Literal

from megatrain_io.store.layout import PAGE_BYTES, ModelLayout
from megatrain_io.store.schedule import Residents

__all__ = ["HUGE_PAGE_BYTES", "PoolSizes", "Unit", "mapped_nbytes", "pool_sizes"]

Unit = Literal["record", "chunk"]
"""What one buffer of the pool holds."""

HUGE_PAGE_BYTES = 2 << 20
_NOTHING = Residents()


@dataclass(frozen=True)
class PoolSizes:
    """Sizes of a pool: ``(bytes, count)`` of each kind of slot.

    Attributes:
        chunk_slots: for chunks that are updated.
        block_buffers: for the weights of blocks.
        outer_buffers: for the weights of records that are larger than any block.
        block_gradients: for the fp32 gradients of blocks.
        outer_gradients: for the fp32 gradients of records that are larger than any block.
    """

    chunk_slots: tuple[int, int]
    block_buffers: tuple[int, int]
    outer_buffers: tuple[int, int]
    block_gradients: tuple[int, int]
    outer_gradients: tuple[int, int]

    @property
    def total_bytes(self) -> int:
        """Bytes of the whole pool."""
        return sum(nbytes * count for nbytes, count in vars(self).values())


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

    Records larger than any block (embeddings, head) have buffers of their own kind: one is enough, because
    the step needs them one after the other, except where a tied head holds embedding and head at once.

    Args:
        layout: the parameter space.
        tied_embeddings: whether the head needs the embedding's weights, too.
        training: False leaves out what only updates need, as frozen weights do.
        residents: they have memory of their own, which is not counted here.
        defers: whether gradients wait for their norm, on the drive where they have no buffer of their own.
        unit: what a buffer holds. Chunks, on their way to compute with memory of its own and back, have as many
            buffers as are said for blocks; those for larger records are then for weights that come back to be updated.
        block_buffers: one to compute with and the others to read ahead; at least two, because the last
            block waits in its buffer while the head runs.
        chunk_slots: updates in flight.
        block_gradients: one to accumulate in and the others for updates behind.
        gathered: by chunk, how many more gradients gather here as the device has no room for those of a record.
    """
    if block_buffers < (1 if unit == "chunk" else 2) or chunk_slots < 1 or block_gradients < 1:
        raise ValueError("a pool needs two block buffers, one chunk slot and one gradient buffer at least")
    training = training and not layout.is_frozen
    blocks = [layout.block(index) for index in range(layout.blocks)]
    others = [record for record in range(len(layout.records)) if record not in blocks]
    paged = [record for record in range(len(layout.records)) if record not in residents.records]
    block_bytes = max((layout.record_weight_bytes(block) for block in blocks if block in paged), default=0)
    shared = [record for record in range(len(layout.records)) if record not in residents.gradients]
    block_gradient = max(
        (layout.record_gradient_bytes(block) for block in blocks if block in shared), default=0
    )
    outer = [
        record for record in others if record in paged and layout.record_weight_bytes(record) > block_bytes
    ]
    in_blocks = len(paged) - len(outer)
    outer_gradient = [
        record
        for record in others
        if record in shared and layout.record_gradient_bytes(record) > block_gradient
    ]
    held = layout.embedding in outer
    held_gradient = layout.embedding in outer_gradient or layout.embedding not in shared
    # A tied head holds the embedding's weights beside the last block and the head, and its gradient
    # from the head to the end of the step.
    beside = int(tied_embeddings)
    # Deferred gradients are applied on the weights' way to compute, so those are written from elsewhere.
    updated = [
        chunk
        for chunk in layout.chunks
        if defers or chunk.record in paged or chunk.index not in residents.chunks
    ]
    slot = max(
        (
            layout.weight_extent_bytes(chunk)
            + layout.update_extent_bytes(chunk)
            + layout.gradient_extent_bytes(chunk) * (defers and chunk.record in shared)
            for chunk in updated
        ),
        default=0,
    )
    if unit == "chunk":
        weights = max(
            map(layout.weight_extent_bytes, (c for c in layout.chunks if c.record in paged)), default=0
        )
        gradients = max(
            map(layout.gradient_extent_bytes, (c for c in layout.chunks if c.record in shared)), default=0
        )
        return PoolSizes(
            chunk_slots=(slot, min(chunk_slots, len(updated)) if training else 0),
            block_buffers=(weights, block_buffers if weights else 0),
            outer_buffers=(weights, block_gradients if weights and training else 0),
            block_gradients=(gradients, block_gradients + gathered if gradients and training else 0),
            outer_gradients=(0, 0),
        )
    in_block_gradients = len(shared) - len(outer_gradient)
    return PoolSizes(
        chunk_slots=(slot, min(chunk_slots, len(updated)) if training else 0),
        block_buffers=(block_bytes, min(block_buffers + (0 if held else beside), in_blocks)),
        outer_buffers=(
            max(map(layout.record_weight_bytes, outer), default=0),
            min(len(outer), 1 + beside),
        ),
        block_gradients=(
            block_gradient,
            min(block_gradients + (0 if held_gradient else beside), in_block_gradients) * training,
        ),
        outer_gradients=(
            max(map(layout.record_gradient_bytes, outer_gradient), default=0),
            min(len(outer_gradient), 1 + beside) * training,
        ),
    )


def mapped_nbytes(pool: PoolSizes, *shares: int) -> int:
    """Bytes of the one mapping that holds ``pool``, and behind it ``shares`` of that many bytes each.

    Lists of large slots start at 2 MiB borders, and so does each share.
    """
    total = 0
    for nbytes, count in vars(pool).values():
        slot = _up(nbytes, PAGE_BYTES)
        if slot >= HUGE_PAGE_BYTES:
            total = _up(total, HUGE_PAGE_BYTES)
        total += slot * count
    for share in shares:
        total = _up(total, HUGE_PAGE_BYTES) + share if share else total
    return total


def _up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
