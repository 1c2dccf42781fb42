"""A store seen without opening it: who holds it, and what it says of itself. No torch.

Which of its states can be trusted is decided by opening it, in ``paged_store``. This module answers at once.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from megatrain_io import _lib
from megatrain_io.errors import MegatrainIoError

__all__ = ["HeldFile", "Owner", "StoreInfo", "held", "owner_of", "remove_store", "store_info", "waiting_line"]

HeldFile = _lib.HeldFile

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Owner:
    """The process that holds a store, by the hint file that it left.

    Attributes:
        text: all of the following, for a sentence.
        process: process id; None when there is no hint.
        command: name of its program.
        since: local time, as ``2026-11-23 14:02:11``.
        has_ended: it is gone, and its last writes are landing (or a process that it started has the file).
    """

    text: str
    process: int | None
    command: str
    since: str
    has_ended: bool


@dataclass(frozen=True)
class StoreInfo:
    """The newest state whose superblock, table and blob hold. Its chunks were not looked at.

    Attributes:
        uuid: of the store.
        manifest: what the store holds, as JSON.
        generation: number of the state; 1 is the import.
        blob: the trainer's own state, committed with it.
        is_clean: whether the store was closed after that commit.
        is_of_this_boot: whether it was committed since the machine was started.
        is_direct: whether the file system has direct I/O.
    """

    uuid: str
    manifest: str
    generation: int
    blob: bytes
    is_clean: bool
    is_of_this_boot: bool
    is_direct: bool


def owner_of(path: Path) -> Owner | None:
    """The process that holds the store; None when none does. Waits for nothing.

    Raises:
        StorageError, FormatError, UnsupportedError: it cannot be found out.
    """
    found = _lib.owner_of(path)
    return None if found is None else Owner(**found)


def store_info(*paths: Path) -> StoreInfo:
    """What the store in these files says of itself, also while another process writes it.

    Raises:
        FormatError: it is no store, it was cut short, or no committed state of it holds.
        StorageError, UnsupportedError: it cannot be read.
    """
    return StoreInfo(**_lib.inspect(paths))


def waiting_line(path: Path) -> Callable[[str], None]:
    """What opening a store calls when another process has held it for a second: it logs by whom, once."""
    return lambda owner: _log.warning(
        "waiting for the store %s: in use by %s; a killed process holds it until its last writes have landed",
        path,
        owner,
    )


@contextmanager
def held(path: Path) -> Iterator[HeldFile]:
    """Hold a file while the context lasts, so that nobody opens it as a store.

    Raises:
        StoreInUseError: another process held it for five seconds.
        StorageError, FormatError, UnsupportedError: it cannot be opened.
    """
    file = HeldFile(path, waiting_line(path))
    try:
        yield file
    finally:
        file.release()


def remove_store(paths: Sequence[Path], uuid: str) -> None:
    """Remove the files of a store that was just made and is of no use, if they are there; nobody else's.

    Making a store blocks signals until it has its name: what is raised then finds it finished. Its error is the one
    to report, so what cannot be removed is left.
    """
    with suppress(MegatrainIoError, OSError):
        if store_info(*paths).uuid == uuid:
            for path in paths:
                with held(path) as file:
                    file.remove()
