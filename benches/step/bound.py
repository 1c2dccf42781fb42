"""The least time that a step can take: by phase, the longer of computing and moving its bytes. Pure.

Compute and transfers of a phase may run side by side, phases may not: the weights of the backward pass are wanted
again only when the forward pass has ended, and the next step's when this one's are written. AdamW and checksums are
left out: they run behind, and what they take from compute is ours to answer for.
"""

from collections.abc import Mapping, Sequence
from typing import Any

Bytes = tuple[float, float]
"""Read and written."""

# A phase of the bound, and those of the schedule that it is made of.
PHASES = {
    "forward": ("embedding", "forward"),
    "backward": ("head", "backward", "embedding_backward"),
}
MIXED_WRITES = 12 / 26
"""Share of writes in what fio moves as ``mixed``."""


def bytes_of_phases(
    schedule: Sequence[Any], layout: Any, residents: Any, *, commits: bool
) -> dict[str, Bytes]:
    """Bytes of each phase of the bound, by the schedule that the training itself runs."""
    found: dict[str, Bytes] = {}
    for phase, parts in PHASES.items():
        operations = [operation for operation in schedule if operation.phase in parts]
        found[phase] = (
            sum(operation.read_bytes(layout, residents) for operation in operations),
            sum(operation.written_bytes(layout, residents, commits=commits) for operation in operations),
        )
    return found


def seconds_to_move(moved: Bytes, rates: Mapping[str, float]) -> float:
    """Time for these bytes at fio's rates (bytes/s) of ``read``, ``write`` and ``mixed``.

    Seconds a byte are taken as linear in the share of writes between the three that were measured.
    """
    read, written = moved
    total = read + written
    if total == 0:
        return 0.0
    share = written / total
    if share <= MIXED_WRITES:
        low, high, way = "read", "mixed", share / MIXED_WRITES
    else:
        low, high, way = "mixed", "write", (share - MIXED_WRITES) / (1 - MIXED_WRITES)
    return total * ((1 - way) / rates[low] + way / rates[high])


def bound(
    moved: Mapping[str, Bytes], compute: Mapping[str, float], rates: Mapping[str, float]
) -> dict[str, float]:
    """Seconds of each phase, and of the step.

    Args:
        moved: bytes read and written, by phase.
        compute: seconds of computing, by phase; recomputation is the backward pass's.
        rates: fio's, in bytes/s.
    """
    found = {phase: max(compute[phase], seconds_to_move(moved[phase], rates)) for phase in PHASES}
    return {**found, "step": sum(found.values())}
