"""What is common to files of weights, whatever their format: positioned reads, and pointers in place of files."""

import os
from pathlib import Path

from megatrain_io.errors import ModelFilesError

__all__ = ["GIT_LFS", "READ_BYTES_MAX", "read_at", "refuse_git_lfs"]

READ_BYTES_MAX = 8 << 20
"""Most bytes asked of the system in one read."""

GIT_LFS = b"version https://git-lfs"
"""What a file begins with that Git LFS left in place of another one."""


def read_at(path: Path, descriptor: int, offset: int, nbytes: int) -> bytearray:
    """Bytes of an open file, which are not left in the page cache: they are used once.

    Args:
        path: of the file, for messages.
        descriptor: of the file.
        offset: of the first byte.
        nbytes: how many.

    Raises:
        ModelFilesError: the file became shorter, or the drive failed to read it.
    """
    out = bytearray(nbytes)
    view = memoryview(out)
    done = 0
    while done < nbytes:
        try:
            count = os.preadv(descriptor, [view[done : done + READ_BYTES_MAX]], offset + done)
        except OSError as error:
            raise ModelFilesError(
                f"{path} cannot be read at byte {offset + done:,}: {error.strerror}"
            ) from error
        if count == 0:
            raise ModelFilesError(f"{path} ends at byte {offset + done:,}: it was changed while it was read")
        done += count
    os.posix_fadvise(descriptor, offset, nbytes, os.POSIX_FADV_DONTNEED)
    return out


def refuse_git_lfs(path: Path, start: bytes, file_bytes: int) -> None:
    """Refuse a file that begins as a pointer of Git LFS does.

    Args:
        path: of the file.
        start: its first bytes, as many as ``GIT_LFS`` has.
        file_bytes: its length.

    Raises:
        ModelFilesError: it does.
    """
    if start == GIT_LFS:
        raise ModelFilesError(
            f"{path} is a Git-LFS pointer ({file_bytes} bytes) in place of the file itself: run `git lfs pull` in its "
            "folder, or download the file"
        )
