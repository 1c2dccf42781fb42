"""The schedule of a step: one pure function that training, plan, simulator and trace share.

Cyclic and known before it starts, so nothing has to be guessed while it runs: the pipeline reads ahead in
this order. A step meets, in order: prologue, blocks first to last, epilogue, blocks last to first with
their updates, prologue with its update. Updates that need the norm of all gradients ride on the first load
of each record in the step after.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import Literal

from megatrain_io.layout import Chunk, ModelLayout

__all__ = [
    "ChunkOp",
    "Gradients",
    "Kind",
    "Phase",
    "PoolSizes",
    "Residents",
    "build_schedule",
    "flush_schedule",
    "pool_sizes",
    "traffic",
]

Kind = Literal["load", "apply", "update", "keep"]

Gradients = Literal["update", "keep", "both"]
"""What a step does with its gradients: it updates with them at once, it keeps them until their norm is known
and the next step applies them, or both: then it may take its updates back.
"""


class Phase(StrEnum):
    """Part of a step."""

    PROLOGUE = "prologue"
    FORWARD = "forward"
    EPILOGUE = "epilogue"
    BACKWARD = "backward"
    PROLOGUE_BACKWARD = "prologue_backward"


@dataclass(frozen=True)
class Residents:
    """What stays in RAM from step to step: it is read once, and written when a step is committed.

    Attributes:
        records: those whose weights stay.
        chunks: those, by index, whose update planes stay.
        gradients: records whose gradient has a buffer of its own, and waits there if it is kept.
    """

    records: frozenset[int] = frozenset()
    chunks: frozenset[int] = frozenset()
    gradients: frozenset[int] = frozenset()


_NOTHING = Residents()


@dataclass(frozen=True)
class ChunkOp:
    """One operation on one chunk.

    ``load`` reads its weights into the record's buffer. ``update`` reads its update planes, and writes
    weights and update planes. ``apply`` does both, with the gradient that ``keep`` has kept in the step
    before. What stays in RAM is not read, and written only for a commit.
    """

    kind: Kind
    chunk: Chunk
    phase: Phase

    def read_bytes(self, layout: ModelLayout, residents: Residents = _NOTHING) -> int:
        """Bytes read in the steady state, when every plane has been written."""
        chunk, read = self.chunk, 0
        if self.kind in {"load", "apply"} and chunk.record not in residents.records:
            read += layout.weight_extent_bytes(chunk)
        if self.kind in {"update", "apply"} and chunk.index not in residents.chunks:
            read += layout.update_extent_bytes(chunk)
        if self.kind == "apply" and chunk.record not in residents.gradients:
            read += layout.gradient_extent_bytes(chunk)
        return read

    def written_bytes(
        self, layout: ModelLayout, residents: Residents = _NOTHING, *, commits: bool = True
    ) -> int:
        """Bytes written by a step that ``commits``, or by one between two commits."""
        if self.kind == "load":
            return 0
        if self.kind == "keep":
            is_spilled = self.chunk.record not in residents.gradients
            return is_spilled * layout.gradient_extent_bytes(self.chunk)
        weights = commits or self.chunk.record not in residents.records
        planes = commits or self.chunk.index not in residents.chunks
        return weights * layout.weight_extent_bytes(self.chunk) + planes * layout.update_extent_bytes(
            self.chunk
        )


def build_schedule(
    layout: ModelLayout,
    *,
    borrows_prologue: bool,
    training: bool,
    applies: bool = False,
    gradients: Gradients = "update",
) -> tuple[ChunkOp, ...]:
    """Order the chunk operations of one step.

    Args:
        layout: the parameter space.
        borrows_prologue: whether the epilogue needs the prologue's weights too (tied embeddings).
        training: False leaves out the backward pass: evaluation and generation.
        applies: whether the step before has kept its gradients, and this one applies them.
        gradients: what becomes of this step's.

    The last block is still in its buffer when the backward pass begins: it is not loaded twice. Where all weights are
    frozen, the backward pass is over when the first block has passed its gradient on.
    """
    operations = _forward(layout, "apply" if applies else "load", borrows_prologue=borrows_prologue)
    backward = _backward(layout, gradients) if training else ()
    return (*operations, *backward)


def flush_schedule(layout: ModelLayout) -> tuple[ChunkOp, ...]:
    """Apply the gradients that the last step has kept, and compute nothing."""
    return tuple(_forward(layout, "apply", borrows_prologue=False))


def _forward(layout: ModelLayout, first: Kind, *, borrows_prologue: bool) -> Iterator[ChunkOp]:
    yield from _whole(layout, first, layout.prologue, Phase.PROLOGUE)
    for index in range(layout.blocks):
        yield from _whole(layout, first, layout.block(index), Phase.FORWARD)
    if layout.epilogue is not None:
        yield from _whole(layout, first, layout.epilogue, Phase.EPILOGUE)
    if borrows_prologue:
        yield from _whole(layout, "load", layout.prologue, Phase.EPILOGUE)


def _backward(layout: ModelLayout, gradients: Gradients) -> Iterator[ChunkOp]:
    kinds: tuple[Kind, ...] = ("update", "keep") if gradients == "both" else (gradients,)
    if layout.is_frozen:
        kinds = ()

    def done(record: int, phase: Phase) -> Iterator[ChunkOp]:
        for kind in kinds:
            yield from _whole(layout, kind, record, phase)

    last = layout.blocks - 1
    if layout.epilogue is not None:
        yield from done(layout.epilogue, Phase.EPILOGUE)
    for index in range(last, -1, -1):
        if index != last:
            yield from _whole(layout, "load", layout.block(index), Phase.BACKWARD)
        yield from done(layout.block(index), Phase.BACKWARD)
    if layout.is_frozen:
        return
    yield from _whole(layout, "load", layout.prologue, Phase.PROLOGUE_BACKWARD)
    yield from done(layout.prologue, Phase.PROLOGUE_BACKWARD)


def _whole(layout: ModelLayout, kind: Kind, record: int, phase: Phase) -> Iterator[ChunkOp]:
    for chunk in layout.chunks_of(record):
        yield ChunkOp(kind, chunk, phase)


def traffic(
    schedule: tuple[ChunkOp, ...],
    layout: ModelLayout,
    residents: Residents = _NOTHING,
    *,
    commits: bool = True,
) -> tuple[int, int]:
    """Bytes read and written by one step in the steady state; metadata of the commit left out."""
    read = sum(operation.read_bytes(layout, residents) for operation in schedule)
    written = sum(operation.written_bytes(layout, residents, commits=commits) for operation in schedule)
    return read, written


@dataclass(frozen=True)
class PoolSizes:
    """The pool as a sum of named terms: ``(bytes, count)`` of each kind of slot."""

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
    borrows_prologue: bool,
    training: bool,
    residents: Residents = _NOTHING,
    keeps: bool = False,
    by_chunk: bool = False,
    block_buffers: int = 3,
    chunk_slots: int = 4,
    block_gradients: int = 2,
    gathered: int = 0,
) -> PoolSizes:
    """Size the pool for ``build_schedule``'s step.

    Records larger than any block (embeddings, head) have buffers of their own kind: one is enough, because
    the step needs them one after the other, except where a tied head holds prologue and epilogue at once.

    Args:
        layout: the parameter space.
        borrows_prologue: whether the epilogue needs the prologue's weights too (tied embeddings).
        training: False leaves out what only updates need, as frozen weights do.
        residents: they have memory of their own, which is not counted here.
        keeps: whether gradients wait for their norm, on the drive where they have no buffer of their own.
        by_chunk: whether compute has memory of its own, so that buffers hold chunks on their way to it and back, as
            many as are said for blocks; those for larger records are then for weights that come back to be updated.
        block_buffers: one to compute with and the others to read ahead; at least two, because the last
            block waits in its buffer while the epilogue runs.
        chunk_slots: updates in flight.
        block_gradients: one to accumulate in and the others for updates behind.
        gathered: by chunk, how many more gradients gather here as the device has no room for those of a record.
    """
    if block_buffers < (1 if by_chunk else 2) or chunk_slots < 1 or block_gradients < 1:
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
    held = layout.prologue in outer
    held_gradient = layout.prologue in outer_gradient or layout.prologue not in shared
    # A tied head holds the prologue's weights beside the last block and the epilogue, and its gradient
    # from the epilogue to the end of the step.
    beside = int(borrows_prologue)
    # Kept gradients are applied on the weights' way to compute, so those are written from elsewhere.
    updated = [
        chunk
        for chunk in layout.chunks
        if keeps or chunk.record in paged or chunk.index not in residents.chunks
    ]
    slot = max(
        (
            layout.weight_extent_bytes(chunk)
            + layout.update_extent_bytes(chunk)
            + layout.gradient_extent_bytes(chunk) * (keeps and chunk.record in shared)
            for chunk in updated
        ),
        default=0,
    )
    if by_chunk:
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
