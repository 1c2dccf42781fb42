"""How much memory this process may use: what the host has left, or what its control groups allow."""

import re
import resource
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

from megatrain_io.machine.drive import Mount, read_mounts, read_text

__all__ = [
    "CgroupLimit",
    "cgroup_folders",
    "cgroup_limit",
    "memory",
    "memory_that_counts",
    "peak_ram",
    "usable_ram",
]

ReadText = Callable[[Path], str | None]

_CGROUP_FILES = {
    2: (("memory.max", "memory.high"), "memory.current", "inactive_file"),
    1: (("memory.limit_in_bytes",), "memory.usage_in_bytes", "total_inactive_file"),
}
_NO_LIMIT = 2**60
"""cgroup v1 says "no limit" with a number near 2**63."""


@dataclass(frozen=True)
class CgroupLimit:
    """The tightest memory limit of the control groups above this process.

    Attributes:
        version: of control groups, 1 or 2.
        file: that holds the limit.
        limit: in bytes.
        used: bytes that the group uses, page cache left out.
    """

    version: int
    file: str
    limit: int
    used: int


def cgroup_folders(cgroup: str, mounts: list[Mount]) -> Iterator[tuple[int, Path]]:
    """``(version, folder)`` of every memory control group above a process, from the inside out.

    Args:
        cgroup: text of ``/proc/self/cgroup``.
        mounts: of ``/proc/self/mountinfo``.
    """
    for line in cgroup.splitlines():
        hierarchy, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if "memory" in controllers.split(","):
            kind, number = "cgroup", 1
        elif hierarchy == "0" and not controllers:
            kind, number = "cgroup2", 2
        else:
            continue
        for mount in mounts:
            if mount.kind == kind and (number == 2 or "memory" in mount.options):  # noqa: PLR2004 - a version
                top = Path(mount.point)
                # Without a namespace of its own, a container sees its path from the host's root.
                inside = Path(path)
                below = inside.relative_to(mount.root) if inside.is_relative_to(mount.root) else Path()
                folder = top / below
                yield from (
                    (number, level) for level in (folder, *folder.parents) if level.is_relative_to(top)
                )


def cgroup_limit(folders: Iterator[tuple[int, Path]], read: ReadText) -> CgroupLimit | None:
    """The limit that leaves the least room, or None where there is none."""
    found = []
    for number, folder in folders:
        limits, usage, cache = _CGROUP_FILES[number]
        statistics = re.search(rf"^{cache} (\d+)$", read(folder / "memory.stat") or "", re.MULTILINE)
        used = _number(read(folder / usage)) or 0
        used = max(0, used - (int(statistics[1]) if statistics else 0))
        for name in limits:
            limit = _number(read(folder / name))
            if limit is not None and limit < _NO_LIMIT:
                found.append(CgroupLimit(number, str(folder / name), limit, used))
    return min(found, key=lambda one: one.limit - one.used, default=None)


def _number(text: str | None) -> int | None:
    """The number that a file holds; None for ``max`` or anything else."""
    return int(text) if text is not None and text.strip().isdigit() else None


def memory(cgroup: str, mounts: list[Mount]) -> dict[str, Any]:
    """RAM of this machine and what of it this process may use.

    Args:
        cgroup: text of ``/proc/self/cgroup``.
        mounts: of ``/proc/self/mountinfo``.
    """
    total, available = psutil.virtual_memory()[:2]
    return memory_that_counts(total, available, cgroup_limit(cgroup_folders(cgroup, mounts), read_text))


def memory_that_counts(total: int, available: int, limit: CgroupLimit | None) -> dict[str, Any]:
    """Bytes of RAM of the host, the limit of the control group, what may really be used, and which of both says so."""
    room = None if limit is None else max(0, limit.limit - limit.used)
    is_limited = room is not None and room < available
    return {
        "total": total,
        "available": available,
        "cgroup": None if limit is None else asdict(limit),
        "usable": room if is_limited else available,
        "usable_because": "the cgroup limit" if is_limited else "the host's available memory",
    }


def usable_ram() -> tuple[int, str]:
    """Bytes of RAM that this process may still take, and the limit that says so, in words."""
    found = memory(read_text("/proc/self/cgroup") or "", read_mounts())
    return found["usable"], found["usable_because"]


def peak_ram() -> int:
    """Most bytes of RAM that this process has held since it began, libraries included.

    getrusage would begin a child at what its parent held: that figure outlives exec. It stands in where the kernel has
    no other.
    """
    found = re.search(r"^VmHWM:\s*(\d+) kB$", read_text("/proc/self/status") or "", re.MULTILINE)
    kib = int(found[1]) if found else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kib * 1024
