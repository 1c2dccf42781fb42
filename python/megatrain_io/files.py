"""Files as they are read and written here, and errors of the operating system that say what to do.

What comes from outside is looked at first, so that nothing blocks. What is written is its owner's alone, and whole
after a power cut.
"""

import errno
import os
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from io import BufferedReader, BufferedWriter
from pathlib import Path
from typing import BinaryIO

from megatrain_io.errors import (
    MegatrainIoError,
    ModelFilesError,
    NoSpaceError,
    StorageError,
)

__all__ = [
    "SETTINGS_BYTES_MAX",
    "UnfitFileError",
    "append_file",
    "lead_nowhere",
    "make_folder",
    "new_file",
    "open_file",
    "open_folder",
    "read_file",
    "replace_file",
    "storage_errors",
    "sync_folder",
]

SETTINGS_BYTES_MAX = 1 << 20
"""Of a file that a person writes, or that says a few facts."""

_PIECE = 1 << 16
_OWNER_ALONE = 0o600
_FOLDER_OWNER_ALONE = 0o700

_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a named pipe (FIFO)",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


class UnfitFileError(OSError):
    """A file that is not read: it is no regular file, or larger than what is read of its kind."""


# --------------------------------------------------------------------------------------------------- reading


def open_file(path: Path, *, limit: int | None = None) -> BufferedReader:
    """Open a file that comes from outside, to read it. It is looked at first: no pipe makes this wait.

    Args:
        path: of the file; links are followed.
        limit: most bytes that it may have; None = any number.

    Raises:
        UnfitFileError: it is no regular file, or larger than ``limit``; ``strerror`` says so.
        OSError: the system's own.
    """
    return os.fdopen(_looked_at(path, os.O_RDONLY, limit), "rb")


def append_file(path: Path) -> BufferedWriter:
    """Open a file to write at its end, as ``open_file`` does; it must be there."""
    return os.fdopen(_looked_at(path, os.O_WRONLY | os.O_APPEND, None), "ab")


def read_file(path: Path, limit: int) -> bytes:
    """The content of a file that comes from outside, ``limit`` bytes at most; see ``open_file``."""
    with open_file(path, limit=limit) as file:
        content = file.read(os.fstat(file.fileno()).st_size + 1)
        # What grows has more, and so have files of the kernel, which tell no size.
        while len(content) <= limit and (more := file.read(_PIECE)):
            content += more
    if len(content) > limit:
        raise _too_large(path, f"more than {limit:,}", limit)
    return content


def _looked_at(path: Path, access: int, limit: int | None) -> int:
    """The descriptor of a regular file."""
    _refuse_unfit(path, os.stat(path), limit)  # noqa: PTH116 - to open a device may already do something
    # What takes its place in between is met by the second look; a pipe without a writer does not block.
    descriptor = os.open(path, access | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY)
    try:
        _refuse_unfit(path, os.fstat(descriptor), limit)
        os.set_blocking(descriptor, True)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _refuse_unfit(path: Path, status: os.stat_result, limit: int | None) -> None:
    if not stat.S_ISREG(status.st_mode):
        kind = _KINDS.get(stat.S_IFMT(status.st_mode), "no file")
        what = f"it is {kind}, and a regular file is needed"
        raise UnfitFileError(errno.EISDIR if stat.S_ISDIR(status.st_mode) else errno.EINVAL, what, str(path))
    if limit is not None and status.st_size > limit:
        raise _too_large(path, f"{status.st_size:,}", limit)


def _too_large(path: Path, size: str, limit: int) -> UnfitFileError:
    return UnfitFileError(errno.EFBIG, f"it has {size} bytes, and at most {limit:,} are read", str(path))


# --------------------------------------------------------------------------------------------------- writing


def new_file(path: Path, *, buffering: int = -1) -> BinaryIO:
    """Make a file that its owner alone may read and write, whatever the umask. What lies there is an error.

    Raises:
        FileExistsError: something has this name, be it a link that leads nowhere.
    """
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    descriptor = os.open(path, flags, _OWNER_ALONE)
    try:
        os.fchmod(descriptor, _OWNER_ALONE)  # a umask may take more
        return os.fdopen(descriptor, "wb", buffering)
    except BaseException:
        os.close(descriptor)
        raise


def make_folder(path: Path) -> list[Path]:
    """Make a folder that its owner alone may enter, whatever the umask, and those above it; durably.

    Returns:
        Those that are new, the outermost first; a folder that is there already stays as it is.
    """
    made = []
    for folder in reversed([path, *path.parents]):
        try:
            folder.mkdir(_FOLDER_OWNER_ALONE)
        except FileExistsError:
            if not folder.is_dir():
                raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(folder)) from None
            continue
        except OSError:
            if folder.is_dir():  # of another's, or on a file system that is only read
                continue
            raise
        folder.chmod(_FOLDER_OWNER_ALONE)
        with suppress(PermissionError):  # of a folder that may be written to and not read
            sync_folder(folder.parent)
        made.append(folder)
    return made


def replace_file(path: Path, content: str | bytes) -> None:
    """Give a file new content, durably: after a power cut it has the old content or the new one, whole.

    Its owner alone may read it, also where that was not so before.
    """
    fresh = path.with_name(path.name + ".tmp")
    fresh.unlink(missing_ok=True)  # of a process that was killed
    with new_file(fresh) as file:
        file.write(content.encode() if isinstance(content, str) else content)
        file.flush()
        os.fsync(file.fileno())
    fresh.replace(path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make the names of the files in a folder durable."""
    descriptor = open_folder(folder)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def open_folder(folder: Path, *, follows: bool = True) -> int:
    """A descriptor of a folder, which the caller closes: to sync it, or to hold it by a lock.

    Raises:
        OSError: it is none; or a link, and ``follows`` is false.
    """
    return os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | (0 if follows else os.O_NOFOLLOW))


def lead_nowhere(numbers: Iterable[int]) -> None:
    """Let descriptors of this process lead to ``/dev/null``, whatever they led to."""
    nowhere = os.open(os.devnull, os.O_RDWR)
    for number in numbers:
        os.dup2(nowhere, number)
    os.close(nowhere)


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
        if isinstance(error, UnfitFileError):
            advice = "Move it away, and put the file itself in its place"
        else:
            advice = "Free some space" if full else "Look at its permissions and the system's log"
        raise kind(f"{error.filename or path}: {error.strerror}. {advice}; {safe}") from error
