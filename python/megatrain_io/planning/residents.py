"""What stays in RAM from step to step.

A step meets all state in the same order each time, and for such access no cache beats a fixed set: least
recently used would throw out what is needed next. So residents are chosen once, before the run.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from megatrain_io.store.layout import ModelLayout
from megatrain_io.store.schedule import ChunkOp, Residents

__all__ = ["choose_gradients", "choose_residents", "gradient_nbytes", "resident_nbytes"]


@dataclass(frozen=True)
class _Resident:
    """The weights of a record, or the planes of one of its chunks."""

    record: int
    chunk: int | None
    nbytes: int


def resident_nbytes(residents: Residents, layout: ModelLayout) -> int:
    """Bytes of RAM that ``residents`` take, their gradients left out."""
    weights = sum(layout.record_weight_bytes(record) for record in residents.records)
    planes = sum(
        layout.update_extent_bytes(chunk) for chunk in layout.chunks if chunk.index in residents.chunks
    )
    return weights + planes


def gradient_nbytes(residents: Residents, layout: ModelLayout) -> int:
    """Bytes of RAM in which gradients of ``residents`` wait for the norm over all of them."""
    return sum(map(layout.record_gradient_bytes, residents.gradients))


def choose_gradients(layout: ModelLayout, nbytes: int) -> frozenset[int]:
    """The trained records whose gradients wait in ``nbytes`` of RAM, spread evenly over the model."""
    chosen, left = set(), nbytes
    for record in filter(layout.trained.__contains__, _spread(len(layout.records))):
        needed = layout.record_gradient_bytes(record)
        if needed <= left:
            chosen.add(record)
            left -= needed
    return frozenset(chosen)


def choose_residents(layout: ModelLayout, schedule: Sequence[ChunkOp], nbytes: int) -> Residents:
    """Choose what saves the most traffic in ``nbytes`` of RAM.

    Records of less than a chunk come first, weights and planes: an operation on the drive costs the most for the
    least bytes there. A byte that stays saves each of its reads, and its write in all steps but those that commit. So
    what is read most often in ``schedule`` comes next: a tied table (3 times), the weights of blocks (2), then
    what is read once, weights before moments. Whatever does not fit is left out, and the next one tried.
    Every choice is spread evenly over the model, so that I/O stays as smooth as it was.
    """
    records, chunks, left = set(), set(), nbytes
    for resident in _by_worth(layout, schedule):
        if resident.nbytes > left:
            continue
        left -= resident.nbytes
        if resident.chunk is None:
            records.add(resident.record)
        else:
            chunks.add(resident.chunk)
    return Residents(frozenset(records), frozenset(chunks))


def _by_worth(layout: ModelLayout, schedule: Sequence[ChunkOp]) -> Iterator[_Resident]:
    firsts = {layout.chunks_of(record)[0].index for record in range(len(layout.records))}
    loads = Counter(
        op.chunk.record for op in schedule if op.kind in {"load", "apply"} and op.chunk.index in firsts
    )
    updated = [op.chunk for op in schedule if op.kind in {"update", "apply"}]
    # Python's sort is stable: equals keep their spread order.
    records = sorted(_spread(len(layout.records)), key=lambda record: -loads[record])
    weights = [
        _Resident(record, None, layout.record_weight_bytes(record)) for record in records if loads[record]
    ]
    planes = [
        _Resident(chunk.record, chunk.index, layout.update_extent_bytes(chunk))
        for chunk in map(updated.__getitem__, _spread(len(updated)))
    ]
    yield from sorted((*weights, *planes), key=lambda each: not _is_small(layout, each.record))


def _is_small(layout: ModelLayout, record: int) -> bool:
    """Whether a record is less than a chunk: some parameters in a format of their own, an adapter, a final norm."""
    return layout.records[record].parameters < layout.chunk_parameters


def _spread(count: int) -> list[int]:
    """The numbers below ``count`` in an order of which every beginning is spread evenly (van der Corput)."""
    digits = max(1, (count - 1).bit_length())
    return sorted(range(count), key=lambda number: f"{number:0{digits}b}"[::-1])
