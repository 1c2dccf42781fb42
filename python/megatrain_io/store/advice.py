"""What makes a store slower than it could be, one sentence each, and what to do about it."""

from typing import Protocol

__all__ = ["notes_of"]

_HUGE_SHARE = 0.9


class StoreFacts(Protocol):
    """What advice needs to know of an open store."""

    @property
    def fell_back_from(self) -> int | None:
        """The newer generation that did not hold when the store was opened; None if the newest one did."""

    @property
    def generation(self) -> int:
        """Number of the newest committed state."""

    @property
    def engine(self) -> tuple[str, str | None]:
        """The I/O engine in use, and why it is not io_uring where that was left open."""

    @property
    def is_direct(self) -> bool:
        """Whether transfers bypass the page cache."""

    @property
    def dio_alignment(self) -> tuple[int, int] | None:
        """Alignment of direct transfers, in bytes: (in memory, in the file); None where the kernel does not say."""


def notes_of(
    store: StoreFacts,
    registration_refused: str | None = None,
    huge_pages: tuple[int, int] | None = None,
) -> list[str]:
    """What makes this store slower than it could be, one sentence each.

    Args:
        store: that is open.
        registration_refused: why the pool could not be registered with the kernel; None if it was.
        huge_pages: bytes of the pool that lie in huge pages, and bytes that could; None without a pool.
    """
    notes = []
    if store.fell_back_from is not None:
        notes.append(
            f"generation {store.fell_back_from} did not survive the last stop (the drive lost data it "
            f"had confirmed, or a power cut came in the middle of a commit): going on from {store.generation}"
        )
    name, reason = store.engine
    if reason is not None:
        notes.append(f"I/O engine: {name} ({reason})")
    if not store.is_direct:
        notes.append(_buffered_note(store.dio_alignment))
    if registration_refused is not None:
        notes.append(
            f"the pool is not registered with the kernel ({registration_refused}); "
            "this costs some CPU time. To allow it, raise the limit on locked memory (ulimit -l)"
        )
    if huge_pages is not None:
        notes += _huge_page_notes(*huge_pages)
    return notes


def _buffered_note(alignment: tuple[int, int] | None) -> str:
    """Why transfers are not direct; zeros mean that the file has no direct I/O (ext4 with data=journal)."""
    if alignment is None or 0 in alignment:
        return "the file system has no direct I/O: transfers go through the page cache"
    memory, offset = alignment
    return (
        f"direct I/O needs an alignment of {memory} bytes in memory and {offset} in the file here, more than the "
        "4096 of the store: transfers go through the page cache"
    )


def _huge_page_notes(huge: int, nbytes: int) -> list[str]:
    """A note where fewer than nine tenths of the pool lie in huge pages."""
    if huge >= nbytes * _HUGE_SHARE:
        return []
    note = (
        f"{huge >> 20} of {nbytes >> 20} MiB of the pool lie in huge pages; reading may be half as fast without. "
        "To allow them: echo madvise > /sys/kernel/mm/transparent_hugepage/enabled (as root). Where they are "
        "allowed, memory is short or fragmented: fewer other programs or a restart of the machine help"
    )
    return [note]
