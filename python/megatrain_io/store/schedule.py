"""The schedule of a step: one pure function that training, plan, simulator and trace share.

Cyclic and known before it starts, so nothing has to be guessed while it runs: the pipeline reads ahead in
this order. A step meets, in order: embedding, blocks first to last, head, blocks last to first with
their updates, embedding with its update. Updates that need the norm of all gradients ride on the first load
of each record in the step after.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import Literal

from megatrain_io.store.layout import Chunk, ModelLayout

__all__ = [
    "ChunkOp",
    "Kind",
    "Phase",
    "Residents",
    "UpdatePolicy",
    "build_schedule",
    "flush_schedule",
    "traffic",
]

Kind = Literal["load", "apply", "update", "defer"]

UpdatePolicy = Literal["immediate", "deferred", "speculative"]
"""What a step does with its gradients: it updates with them at once; it defers them until their norm is known, and
the next step applies them; or both: then it may take its updates back.
"""

_KINDS: dict[UpdatePolicy, tuple[Kind, ...]] = {
    "immediate": ("update",),
    "deferred": ("defer",),
    "speculative": ("update", "defer"),
}


class Phase(StrEnum):
    """The phases of a step, in order: each names what compute does with the records that it meets."""

    EMBEDDING = "embedding"
    FORWARD = "forward"
    HEAD = "head"
    BACKWARD = "backward"
    EMBEDDING_BACKWARD = "embedding_backward"


@dataclass(frozen=True)
class Residents:
    """What stays in RAM from step to step: it is read once, and written when a step is committed.

    Attributes:
        records: those whose weights stay.
        chunks: those, by index, whose update planes stay.
        gradients: records whose gradient has a buffer of its own, and waits there if it is deferred.
    """

    records: frozenset[int] = frozenset()
    chunks: frozenset[int] = frozenset()
    gradients: frozenset[int] = frozenset()


_NOTHING = Residents()


@dataclass(frozen=True)
class ChunkOp:
    """One operation on one chunk.

    ``load`` reads its weights into the record's buffer. ``update`` reads its update planes, and writes
    weights and update planes. ``apply`` does both, with the gradient that ``defer`` has deferred in the
    step before. What stays in RAM is not read, and written only for a commit.
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
        if self.kind == "defer":
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
    tied_embeddings: bool,
    training: bool,
    applies: bool = False,
    policy: UpdatePolicy = "immediate",
) -> tuple[ChunkOp, ...]:
    """Order the chunk operations of one step.

    Args:
        layout: the parameter space.
        tied_embeddings: whether the head needs the embedding's weights, too.
        training: False leaves out the backward pass: evaluation and generation.
        applies: whether the step before has deferred its gradients, and this one applies them.
        policy: what becomes of this step's.

    The last block is still in its buffer when the backward pass begins: it is not loaded twice. Where all weights are
    frozen, the backward pass is over when the first block has passed its gradient on.
    """
    operations = _forward(layout, "apply" if applies else "load", tied_embeddings=tied_embeddings)
    backward = _backward(layout, policy) if training else ()
    return (*operations, *backward)


def flush_schedule(layout: ModelLayout) -> tuple[ChunkOp, ...]:
    """Apply the gradients that the last step has deferred, and compute nothing."""
    return tuple(_forward(layout, "apply", tied_embeddings=False))


def _forward(layout: ModelLayout, first: Kind, *, tied_embeddings: bool) -> Iterator[ChunkOp]:
    yield from _whole(layout, first, layout.embedding, Phase.EMBEDDING)
    for index in range(layout.blocks):
        yield from _whole(layout, first, layout.block(index), Phase.FORWARD)
    if layout.head is not None:
        yield from _whole(layout, first, layout.head, Phase.HEAD)
    if tied_embeddings:
        yield from _whole(layout, "load", layout.embedding, Phase.HEAD)


def _backward(layout: ModelLayout, policy: UpdatePolicy) -> Iterator[ChunkOp]:
    kinds = () if layout.is_frozen else _KINDS[policy]

    def done(record: int, phase: Phase) -> Iterator[ChunkOp]:
        for kind in kinds:
            yield from _whole(layout, kind, record, phase)

    last = layout.blocks - 1
    if layout.head is not None:
        yield from done(layout.head, Phase.HEAD)
    for index in range(last, -1, -1):
        if index != last:
            yield from _whole(layout, "load", layout.block(index), Phase.BACKWARD)
        yield from done(layout.block(index), Phase.BACKWARD)
    if layout.is_frozen:
        return
    yield from _whole(layout, "load", layout.embedding, Phase.EMBEDDING_BACKWARD)
    yield from done(layout.embedding, Phase.EMBEDDING_BACKWARD)


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
