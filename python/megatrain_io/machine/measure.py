"""Measuring by the extension: transfers over a nameless file, and what runs on the CPU. No torch.

``bench`` and the comparisons in ``benches/`` go through here, so that both measure the same.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from megatrain_io import _lib

__all__ = [
    "Figure",
    "ScratchFile",
    "Traffic",
    "Workload",
    "adamw_kernels",
    "adamw_step",
    "figure_of",
    "scratch_file",
    "transfer",
]

ScratchFile = _lib.ScratchFile
Workload = _lib.Workload
adamw_kernels = _lib.adamw_kernels
adamw_step = _lib.adamw_step

Traffic = Literal["read", "write", "mixed", "training"]


@dataclass(frozen=True)
class Figure:
    """What a measured piece of work moved, and what it took.

    Attributes:
        read: bytes read.
        written: bytes written.
        seconds: wall time.
        cpu_seconds: CPU time of the whole process, with the kernel's work for it as far as it is accounted there.
        registration_refused: why the engine worked without registered memory, in a transfer; else None.
    """

    read: int
    written: int
    seconds: float
    cpu_seconds: float
    registration_refused: str | None = None

    @property
    def nbytes(self) -> int:
        """Bytes read and written together."""
        return self.read + self.written

    @property
    def gb_per_s(self) -> float:
        """GB/s, read and written together; 0 when no time passed."""
        return self.nbytes / 1e9 / self.seconds if self.seconds else 0.0

    @property
    def cpu_s_per_gb(self) -> float:
        """CPU seconds for each GB moved; 0 when nothing was."""
        return self.cpu_seconds / (self.nbytes / 1e9) if self.nbytes else 0.0


def figure_of(found: Mapping[str, Any]) -> Figure:
    """The figure, made from what the extension returned."""
    return Figure(**found)


def transfer(
    file: ScratchFile,
    traffic: Traffic,
    form: tuple[int, int],
    nbytes: int,
    *,
    seconds: float | None = None,
    offset: int = 0,
) -> Figure:
    """Transfer through the file, round and round, reads and writes in flight together.

    Args:
        file: to transfer from and to. What was never written is not read from the drive: fill it first.
        traffic: ``read``; ``write``; ``mixed``, 14 bytes read for 12 written; ``training``, the same in the
            extents of training, 4 and 20 MiB.
        form: bytes of a request, whole MiB (``training`` has its own), and requests in flight.
        nbytes: bytes after which it ends, rounded up to whole requests.
        seconds: time after which it ends, too, unless None.
        offset: where in the file it begins, in bytes.

    Raises:
        StorageError: the drive failed, or gave other bytes than were written.
    """
    return figure_of(file.transfer(traffic, form, (nbytes, seconds), offset))


@contextmanager
def scratch_file(folder: Path, nbytes: int, engine: str) -> Iterator[ScratchFile]:
    """A file to measure on, while the context lasts. It has no name: nothing is left behind.

    Raises:
        NoSpaceError, UnsupportedError, StorageError: it cannot be had.
    """
    file = ScratchFile(folder, nbytes, engine)
    try:
        yield file
    finally:
        file.close()
