"""Run as a script: trains the same store in one process after the other, each with fewer rights than this one.

Arguments are a folder with one store for each restriction, named after it, and the restrictions. Each process
prints one line of JSON: engine, notes, losses, and a digest of every plane.
"""

import ctypes
import dataclasses
import errno
import hashlib
import json
import os
import platform
import resource
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from megatrain_io.paging.paged_model import PagedPartition
from megatrain_io.store.paged_store import PagedStore, TensorSettings
from paged import Case, all_planes, files, partitioned, train

CASE = Case(tied=True, dtype=torch.bfloat16, counts=(1,) * 3)
NOBODY = 65534
LOCKED_BYTES = 8 << 20
"""What most distributions let an ordinary user lock."""
POOL_SLOTS = (4 << 20, 4)
"""More than that."""

PR_SET_DUMPABLE, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS, PR_SET_THP_DISABLE = 4, 22, 38, 41
ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
# The same numbers on both.
IO_URING_SETUP, IO_URING_ENTER, IO_URING_REGISTER = 425, 426, 427
REGISTER_BUFFERS = 0
LOAD, EQUAL, RETURN = 0x20, 0x15, 0x06
ALLOW, REFUSE = 0x7FFF0000, 0x00050000


class Instruction(ctypes.Structure):
    """``struct sock_filter``."""

    _fields_ = (
        ("code", ctypes.c_uint16),
        ("true", ctypes.c_uint8),
        ("false", ctypes.c_uint8),
        ("k", ctypes.c_uint32),
    )


class Program(ctypes.Structure):
    """``struct sock_fprog``."""

    _fields_ = (("length", ctypes.c_uint16), ("instructions", ctypes.POINTER(Instruction)))


def call(option: int, *arguments: object) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(option, *arguments, *[0] * (4 - len(arguments))):
        raise OSError(ctypes.get_errno(), f"prctl {option}")


def refuse(number: int, code: int, second_argument: int | None = None) -> None:
    """Let a system call fail from now on, always or where its second argument is the one given."""
    conditions = [(4, ARCHITECTURES[platform.machine()]), (0, number)]
    if second_argument is not None:
        conditions.append((24, second_argument))
    lines = []
    for place, (offset, value) in enumerate(conditions):
        lines += [(LOAD, 0, 0, offset), (EQUAL, 0, 2 * (len(conditions) - place) - 1, value)]
    lines += [(RETURN, 0, 0, REFUSE | code), (RETURN, 0, 0, ALLOW)]
    instructions = (Instruction * len(lines))(*lines)
    call(PR_SET_NO_NEW_PRIVS, 1)
    call(PR_SET_SECCOMP, 2, ctypes.byref(Program(len(lines), instructions)))


def become_an_ordinary_user() -> None:
    """Of whom nothing is known but that 8 MiB may be locked."""
    resource.setrlimit(resource.RLIMIT_MEMLOCK, (LOCKED_BYTES, LOCKED_BYTES))
    if os.geteuid() == 0:
        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)
        # As if it had been started by that user: /proc/self belongs to it again.
        call(PR_SET_DUMPABLE, 1)


RESTRICTIONS: dict[str, Callable[[], None]] = {
    "nothing": lambda: None,
    "ordinary user": become_an_ordinary_user,
    "no ring, EPERM": lambda: refuse(IO_URING_SETUP, errno.EPERM),
    "no ring, ENOSYS": lambda: refuse(IO_URING_SETUP, errno.ENOSYS),
    "no operations": lambda: refuse(IO_URING_ENTER, errno.EPERM),
    "no registering": lambda: refuse(IO_URING_REGISTER, errno.EPERM),
    "no registered buffers, ENOMEM": lambda: refuse(IO_URING_REGISTER, errno.ENOMEM, REGISTER_BUFFERS),
    "no registered buffers, EPERM": lambda: refuse(IO_URING_REGISTER, errno.EPERM, REGISTER_BUFFERS),
    "no huge pages": lambda: call(PR_SET_THP_DISABLE, 1),
}


def trained(path: Path) -> dict[str, object]:
    with PagedStore(*files(path)) as state:
        model = PagedPartition(partitioned(CASE), state)
        pool = dataclasses.replace(model.pool_sizes(training=True), chunk_slots=POOL_SLOTS)
        state.start(pool, settings=lambda _: TensorSettings(0.01))
        losses = train(model, CASE)
        digest = hashlib.sha256()
        for plane in all_planes(state).values():
            digest.update(plane.contiguous().view(torch.uint8).numpy().tobytes())
        engine, reason = state.engine
        return {
            "engine": engine,
            "reason": reason,
            "notes": state.notes,
            "losses": [loss.hex() for loss in losses],
            "planes": digest.hexdigest(),
        }


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder, *names = sys.argv[1:]
    # The user that a child becomes may not be able to walk to the folder: it starts inside.
    os.chdir(folder)
    # Found out once, by who may: building the tiny model needs nothing of the restrictions.
    partitioned(CASE)
    for name in names:
        child = os.fork()
        if child == 0:
            RESTRICTIONS[name]()
            print(json.dumps(trained(Path(name))), flush=True)  # noqa: T201 - what the test reads
            os._exit(0)
        if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]):
            sys.exit(f"the process with {name} failed")
