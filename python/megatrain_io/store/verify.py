"""What reading a store back found: extents whose bytes are not those that were written. No torch."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["DamagedExtent", "OlderState", "VerifyReport", "older_state_of", "report_of"]


@dataclass(frozen=True)
class DamagedExtent:
    """An extent whose bytes are not those that were written.

    Attributes:
        tensors: names of those with parameters in its chunk.
        record: name of the record they belong to.
        chunk: number of the chunk, counted from the start of the record.
        group: which planes of the chunk: ``weight``, or ``update`` for all others.
        path: of the store's file.
        offset: of the first checksum unit that does not hold, in bytes from the start of the file.
        expected: its checksum as it was written, as ``0x0123abcd``; None where the drive could not read.
        found: checksum of the bytes that were read (twice).
        message: all of it, for a person.
    """

    tensors: tuple[str, ...]
    record: str
    chunk: int
    group: str
    path: str
    offset: int | None
    expected: str | None
    found: str | None
    message: str


@dataclass(frozen=True)
class VerifyReport:
    """What reading everything back found.

    Attributes:
        generation: number of the committed state that was read.
        extents: number of extents that were compared.
        nbytes: bytes that were read.
        damaged: extents whose bytes are not those that were written.
    """

    generation: int
    extents: int
    nbytes: int
    damaged: tuple[DamagedExtent, ...]


@dataclass(frozen=True)
class OlderState:
    """The state before the committed one.

    Attributes:
        report: what reading it back found.
        blob: the trainer's own state, committed with it.
    """

    report: VerifyReport
    blob: bytes


def older_state_of(report: Mapping[str, Any]) -> OlderState:
    """The state and its report, made from what the extension returned."""
    return OlderState(report_of(report), report["blob"])


def report_of(report: Mapping[str, Any]) -> VerifyReport:
    """The report, made from what the extension returned."""
    damaged = (
        DamagedExtent(
            tensors=tuple(found["tensors"]),
            record=found["record"],
            chunk=found["chunk"],
            group=found["group"],
            path=str(found["path"]),
            offset=found["offset"],
            expected=_hexadecimal(found["expected"]),
            found=_hexadecimal(found["found"]),
            message=found["message"],
        )
        for found in report["damaged"]
    )
    return VerifyReport(report["generation"], report["extents"], report["nbytes"], tuple(damaged))


def _hexadecimal(checksum: int | None) -> str | None:
    return None if checksum is None else f"{checksum:#010x}"
