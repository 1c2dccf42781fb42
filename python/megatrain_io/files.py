"""Files that a power cut leaves whole, and errors of the operating system that say what to do."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatrain_io.errors import (
    MegatrainIoError,
    ModelFilesError,
    NoSpaceError,
    StorageError,
)

__all__ = ["replace_file", "storage_errors", "sync_folder"]


def replace_file(path: Path, content: str | bytes) -> None:
    """Give a file new content, durably: after a power cut it has the old content or the new one, whole."""
    fresh = path.with_name(path.name + ".tmp")
    with fresh.open("wb") as file:
        file.write(content.encode() if isinstance(content, str) else content)
        file.flush()
        os.fsync(file.fileno())
    fresh.replace(path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make the names of the files in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def storage_errors(path: Path, safe: str) -> Iterator[None]:
    """Turn errors of the operating system into our own, with advice; ``safe`` says what is left after them.

    Raises:
        NoSpaceError, StorageError: the system refused or failed.
        ModelFilesError: a library refused files of the run.
    """
    try:
        yield
    except (MegatrainIoError, BrokenPipeError):
        raise
    except OSError as error:
        if error.errno is None:
            # Not the system's: a library's own sentence, on files of the run.
            raise ModelFilesError(f"{path}: {error}") from error
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        kind = NoSpaceError if full else StorageError
        advice = "Free some space" if full else "Look at its permissions and the system's log"
        raise kind(f"{error.filename or path}: {error.strerror}. {advice}; {safe}") from error
