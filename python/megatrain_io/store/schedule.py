"""The schedule of a step: one pure function that training, plan, simulator and trace share.

Cyclic and known before it starts, so nothing has to be guessed while it runs: the pipeline reads ahead in
this order. A step stops, in order, at: embedding, blocks first to last, head, blocks last to first with
their updates, embedding with its update. At each stop it loads all records of the stop, one after the other in the
order of the layout, and then updates those that are trained, in the same order. A tied head stops with its own
records, then those of the embedding. Updates that need the norm of all gradients ride on the first load of each
record in the step after.

A step may update some of the trained records alone. Of the others weights are loaded where the gradient passes through
them, and nothing is written; an embedding without anything to update has no backward pass.
"""

from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from typing import Literal, NamedTuple, overload

from megatrain_io.store.layout import Chunk, ModelLayout

__all__ = [
    "ChunkOp",
    "Kind",
    "Pass",
    "Phase",
    "Residents",
    "Schedule",
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
    """The phases of a step, in order: each names what compute does at the stops that it meets."""

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


class Pass(NamedTuple):
    """An operation on all chunks of a record, one after the other."""

    kind: Kind
    record: int
    phase: Phase


class Schedule(Sequence[ChunkOp]):
    """The chunk operations of a step, in order.

    Planning looks at passes: a store of 10^12 parameters has a million operations and more.

    Attributes:
        layout: the parameter space.
        passes: what the operations are made of, in order.
    """

    def __init__(self, layout: ModelLayout, passes: Iterable[Pass]) -> None:
        self.layout, self.passes = layout, tuple(passes)

    @cached_property
    def _operations(self) -> tuple[ChunkOp, ...]:
        return tuple(
            ChunkOp(each.kind, chunk, each.phase)
            for each in self.passes
            for chunk in self.layout.chunks_of(each.record)
        )

    def __len__(self) -> int:
        return sum(len(self.layout.chunks_of(each.record)) for each in self.passes)

    def __iter__(self) -> Iterator[ChunkOp]:
        return iter(self._operations)

    @overload
    def __getitem__(self, index: int) -> ChunkOp: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[ChunkOp]: ...

    def __getitem__(self, index: int | slice) -> ChunkOp | Sequence[ChunkOp]:
        return self._operations[index]

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Schedule):
            return NotImplemented
        return self.layout == other.layout and self.passes == other.passes

    def __hash__(self) -> int:
        return hash(self.passes)

    def traffic_by_phase(
        self, residents: Residents = _NOTHING, *, commits: bool = True
    ) -> dict[Phase, tuple[int, int]]:
        """Bytes read and written in each phase of a step in the steady state: the sums over its operations."""
        kept = _resident_updates(self.layout, residents)
        sums = dict.fromkeys(Phase, (0, 0))
        for each in self.passes:
            read, written = self._moved(each, residents, kept, commits=commits)
            before = sums[each.phase]
            sums[each.phase] = before[0] + read, before[1] + written
        return sums

    def traffic(self, residents: Residents = _NOTHING, *, commits: bool = True) -> tuple[int, int]:
        """Bytes read and written by one step in the steady state; metadata of the commit left out."""
        phases = self.traffic_by_phase(residents, commits=commits).values()
        return sum(read for read, _ in phases), sum(written for _, written in phases)

    def _moved(
        self, each: Pass, residents: Residents, kept: Mapping[int, int], *, commits: bool
    ) -> tuple[int, int]:
        """What ``ChunkOp.read_bytes`` and ``written_bytes`` say of all chunks of a pass."""
        kind, record, layout = each.kind, each.record, self.layout
        weights, updates = layout.record_weight_bytes(record), layout.record_update_bytes(record)
        waiting = 0 if record in residents.gradients else layout.record_deferred_bytes(record)
        stays = record in residents.records
        if kind == "load":
            return 0 if stays else weights, 0
        if kind == "defer":
            return 0, waiting
        read = updates - kept.get(record, 0)
        if kind == "apply":
            read += waiting + (0 if stays else weights)
        written = (weights if commits or not stays else 0) + updates
        return read, written if commits else written - kept.get(record, 0)


def _resident_updates(layout: ModelLayout, residents: Residents) -> dict[int, int]:
    """Bytes of update planes that stay in RAM, by record."""
    kept: dict[int, int] = defaultdict(int)
    for index in residents.chunks:
        chunk = layout.chunks[index]
        kept[chunk.record] += layout.update_extent_bytes(chunk)
    return kept


def build_schedule(
    layout: ModelLayout,
    *,
    tied_embeddings: bool,
    training: bool,
    applies: bool = False,
    policy: UpdatePolicy = "immediate",
    updated: Collection[int] | None = None,
    applied: Collection[int] | None = None,
) -> Schedule:
    """Order the chunk operations of one step.

    Args:
        layout: the parameter space.
        tied_embeddings: whether the head needs the embedding's weights, too.
        training: False leaves out the backward pass: evaluation and generation.
        applies: whether the step before has deferred its gradients, and this one applies them.
        policy: what becomes of this step's.
        updated: records that get a gradient in this step; None = all that are trained.
        applied: where it ``applies``, records whose gradients the step before has deferred; None = likewise.

    The last block is still in its buffers when the backward pass begins: it is not loaded twice. Where the embedding is
    frozen, the backward pass is over when the first block has passed its gradient on.
    """
    trained = frozenset(layout.trained)
    waiting = (trained if applied is None else trained & frozenset(applied)) if applies else frozenset()
    operations = _forward(layout, waiting, tied_embeddings=tied_embeddings)
    own = trained if updated is None else trained & frozenset(updated)
    backward = _backward(layout, policy, own) if training else ()
    return Schedule(layout, (*operations, *backward))


def flush_schedule(layout: ModelLayout, applied: Collection[int] | None = None) -> Schedule:
    """Apply the gradients that the last step has deferred, and compute nothing: a load of each of their records.

    ``applied`` are these records; None = all that are trained.
    """
    waiting = frozenset(layout.trained if applied is None else applied)
    first_loads = _forward(layout, waiting, tied_embeddings=False)
    return Schedule(layout, (each for each in first_loads if each.kind == "apply"))


def _forward(layout: ModelLayout, waiting: frozenset[int], *, tied_embeddings: bool) -> Iterator[Pass]:
    phases = [Phase.EMBEDDING, *[Phase.FORWARD] * layout.blocks, Phase.HEAD]
    for stop, phase in zip(layout.stops, phases, strict=False):
        for record in stop:
            first: Kind = "apply" if record in waiting else "load"
            yield Pass(first, record, phase)
    if tied_embeddings:
        yield from _load(layout, layout.embedding, Phase.HEAD)


def _backward(layout: ModelLayout, policy: UpdatePolicy, updated: frozenset[int]) -> Iterator[Pass]:
    last = layout.blocks - 1
    if layout.head is not None:
        yield from _update(layout, layout.head, Phase.HEAD, policy, updated)
    for index in range(last, -1, -1):
        if index != last:
            yield from _load(layout, layout.block(index), Phase.BACKWARD)
        yield from _update(layout, layout.block(index), Phase.BACKWARD, policy, updated)
    if not updated.isdisjoint(layout.stops[layout.embedding]):
        yield from _load(layout, layout.embedding, Phase.EMBEDDING_BACKWARD)
        yield from _update(layout, layout.embedding, Phase.EMBEDDING_BACKWARD, policy, updated)


def _load(layout: ModelLayout, stop: int, phase: Phase) -> Iterator[Pass]:
    for record in layout.stops[stop]:
        yield Pass("load", record, phase)


def _update(
    layout: ModelLayout, stop: int, phase: Phase, policy: UpdatePolicy, updated: frozenset[int]
) -> Iterator[Pass]:
    for record in filter(updated.__contains__, layout.stops[stop]):
        for kind in _KINDS[policy]:
            yield Pass(kind, record, phase)


def traffic(
    schedule: Iterable[ChunkOp],
    layout: ModelLayout,
    residents: Residents = _NOTHING,
    *,
    commits: bool = True,
) -> tuple[int, int]:
    """Bytes read and written by operations, one by one, in the steady state; metadata of the commit left out."""
    schedule = list(schedule)
    read = sum(operation.read_bytes(layout, residents) for operation in schedule)
    written = sum(operation.written_bytes(layout, residents, commits=commits) for operation in schedule)
    return read, written
