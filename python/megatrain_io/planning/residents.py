"""What stays in RAM from step to step.

A step meets all state in the same order each time, and for such access no cache beats a fixed set: least
recently used would throw out what is needed next. So residents are chosen once, before the run.
"""

from collections import Counter
from functools import lru_cache

from megatrain_io.store.layout import ModelLayout
from megatrain_io.store.schedule import Residents, Schedule

__all__ = ["choose_gradients", "choose_residents", "gradient_nbytes", "resident_nbytes"]


def resident_nbytes(residents: Residents, layout: ModelLayout) -> int:
    """Bytes of RAM that ``residents`` take, their gradients left out."""
    weights = sum(layout.record_weight_bytes(record) for record in residents.records)
    planes = sum(layout.update_extent_bytes(layout.chunks[index]) for index in residents.chunks)
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


def choose_residents(layout: ModelLayout, schedule: Schedule, nbytes: int) -> Residents:
    """Choose what saves the most traffic in ``nbytes`` of RAM.

    Records of less than a chunk come first, weights and planes: an operation on the drive costs the most for the
    least bytes there. A byte that stays saves each of its reads, and its write in all steps but those that commit. So
    what is read most often in ``schedule`` comes next: a tied table (3 times), the weights of blocks (2), then
    what is read once, weights before moments. Whatever does not fit is left out, and the next one tried.
    Every choice is spread evenly over the model, so that I/O stays as smooth as it was.
    """
    records, chunks, left = set(), set(), nbytes
    loads = Counter(each.record for each in schedule.passes if each.kind in {"load", "apply"})
    # Python's sort is stable: equals keep their spread order.
    by_loads = sorted(_spread(len(layout.records)), key=lambda record: -loads[record])
    owners = [each.record for each in schedule.passes if each.kind in {"update", "apply"}]
    updated = [chunk for record in owners for chunk in layout.chunks_of(record)]
    ends = [layout.chunks_of(record)[-1] for record in owners if layout.chunks_of(record)]
    least = min(map(layout.update_extent_bytes, ends), default=0)
    for is_small in (True, False):
        for record in by_loads:
            needed = layout.record_weight_bytes(record)
            if _is_small(layout, record) == is_small and loads[record] and needed <= left:
                records.add(record)
                left -= needed
        for position in _spread(len(updated)):
            if left < least:
                break
            chunk = updated[position]
            needed = layout.update_extent_bytes(chunk)
            if _is_small(layout, chunk.record) == is_small and needed <= left:
                chunks.add(chunk.index)
                left -= needed
    return Residents(frozenset(records), frozenset(chunks))


def _is_small(layout: ModelLayout, record: int) -> bool:
    """Whether a record is less than a chunk: some parameters in a format of their own, an adapter, a final norm."""
    return layout.records[record].parameters < layout.chunk_parameters


@lru_cache(maxsize=4)
def _spread(count: int) -> tuple[int, ...]:
    """The numbers below ``count`` in an order of which every beginning is spread evenly (van der Corput)."""
    digits = max(1, (count - 1).bit_length())
    return tuple(sorted(range(count), key=lambda number: f"{number:0{digits}b}"[::-1]))
