"""The drive that holds a folder: mount, file system, block device, and what speaks against a store there.

Pure functions parse the texts of files, so that a test can make up every kind of drive. What cannot be found out is
None.
"""

import errno
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.filesize import decimal

from megatrain_io.errors import MegatrainIoError, StorageError, UnsupportedError
from megatrain_io.files import read_file

__all__ = [
    "Mount",
    "direct_io",
    "drive_texts",
    "drive_warnings",
    "examine_drive",
    "is_network",
    "mount_of",
    "parse_choice",
    "parse_mountinfo",
    "parse_queue",
    "read_mounts",
    "read_text",
    "spins",
    "store_drive_notes",
]

_NETWORK = {
    "9p",
    "afs",
    "beegfs",
    "ceph",
    "cifs",
    "glusterfs",
    "lustre",
    "nfs",
    "nfs4",
    "smb3",
    "smbfs",
    "virtiofs",
}
# Of the kernel's own texts, such as the list of mounts.
_TEXT_BYTES_MAX = 64 << 20
_IN_RAM = {"devtmpfs", "ramfs", "tmpfs"}
# File systems of the kernel, in which nobody keeps files.
_KERNEL = {
    *(
        "autofs",
        "binfmt_misc",
        "bpf",
        "cgroup",
        "cgroup2",
        "configfs",
        "debugfs",
        "devpts",
        "efivarfs",
        "fusectl",
    ),
    *("hugetlbfs", "mqueue", "nsfs", "proc", "pstore", "securityfs", "selinuxfs", "sysfs", "tracefs"),
}


@dataclass(frozen=True)
class Mount:
    """One line of ``/proc/self/mountinfo``.

    Attributes:
        device: ``major:minor`` of the block device.
        root: path in the file system of what is mounted.
        point: path where it is mounted.
        kind: type of the file system.
        source: device or remote name.
        options: of the file system itself.
    """

    device: str
    root: str
    point: str
    kind: str
    source: str
    options: tuple[str, ...]


def parse_mountinfo(text: str) -> list[Mount]:
    """All mounts in the text of ``/proc/self/mountinfo``, in the order in which they were made."""
    mounts = []
    for line in text.splitlines():
        left, separator, right = line.partition(" - ")
        fields, more = left.split(), right.split()
        if separator and len(fields) >= 5 and len(more) >= 2:  # noqa: PLR2004 - see proc(5)
            device, root, point = fields[2], _unescaped(fields[3]), _unescaped(fields[4])
            options = tuple(more[2].split(",")) if more[2:] else ()
            mounts.append(Mount(device, root, point, more[0], _unescaped(more[1]), options))
    return mounts


def _unescaped(field: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), field)


def mount_of(path: Path, mounts: list[Mount]) -> Mount | None:
    """The mount that an absolute path lies on: the deepest, and of several on one point the last."""
    holding = [mount for mount in mounts if path.is_relative_to(mount.point)]
    return max(reversed(holding), key=lambda mount: len(Path(mount.point).parts), default=None)


def parse_choice(text: str | None) -> str | None:
    """The choice in brackets of a kernel file, as in ``always [madvise] never``; None without one."""
    chosen = re.search(r"\[([\w-]+)\]", text or "")
    return chosen[1] if chosen else None


def spins(rotational: str | None, device: Path, model: str | None) -> bool | None:
    """Whether a drive is a spinning disk; None for a virtual drive, whose own word means nothing, or if unknown.

    Args:
        rotational: text of its file ``queue/rotational``.
        device: its folder below ``/sys/devices``.
        model: text of its file ``device/model``.
    """
    is_virtual = any(part.startswith(("virtio", "vbd")) for part in device.parts)
    if rotational is None or is_virtual or re.search(r"virtual|vbox|vmware|qemu", model or "", re.IGNORECASE):
        return None
    return rotational.strip() == "1"


def is_network(kind: str) -> bool:
    """Whether a file system of this type lies on another machine, or is shared with one."""
    return kind in _NETWORK or kind.startswith("fuse.sshfs")


def drive_warnings(mount: Mount, *, rotational: bool | None, usb: bool) -> list[str]:
    """What speaks against a store on this mount, one sentence each, with what to do."""
    point, kind = mount.point, mount.kind
    found = []
    if kind in {"9p", "drvfs", "v9fs"} and re.match(r"/mnt/[a-z](/|$)", point):
        found.append(
            f"{point} is a Windows drive seen through {kind}, which is slow. Put the store inside WSL, e.g. ~/mt"
        )
    elif is_network(kind):
        found.append(f"{point} is a network or shared file system ({kind}). Put the store on a local drive")
    elif kind in _IN_RAM:
        found.append(
            f"{point} is {kind}: that is RAM, no step survives a power cut or a restart, and what lies there takes RAM "
            "that training needs. Put the store on a drive"
        )
    elif kind == "overlay":
        found.append(
            f"{point} is the container's own layer (overlay), which goes with the container. Mount a folder of a "
            "local drive as a volume"
        )
    elif kind.startswith("fuse"):
        found.append(
            f"{point} is a file system in user space ({kind}), which may be slow and may lack direct I/O"
        )
    if rotational:
        found.append(
            f"the drive beneath {point} is a spinning disk: steps will take very long. Use an NVMe drive"
        )
    if usb:
        found.append(
            f"the drive beneath {point} is attached by USB: expect a fraction of an NVMe drive's speed"
        )
    return found


def parse_queue(read: Callable[[str], str | None]) -> dict[str, Any]:
    """What the kernel says of a drive's queue; ``read`` gives the text of a file in its folder ``queue``.

    Offsets and lengths of direct I/O must be multiples of ``logical_block_size`` bytes, addresses in memory of
    ``dma_alignment`` bytes.
    """

    def number(name: str) -> int | None:
        text = (read(name) or "").strip()
        return int(text) if text.isdigit() else None

    mask = number("dma_alignment")
    scheduler = read("scheduler")
    return {
        "scheduler": parse_choice(scheduler) or ((scheduler or "").strip() or None),
        "write_cache": (read("write_cache") or "").strip() or None,
        "logical_block_size": number("logical_block_size"),
        "dma_alignment": None if mask is None else mask + 1,
        "largest_request_kib": number("max_sectors_kb"),
    }


def direct_io(folder: Path) -> bool | None:
    """Whether the file system opens files for direct I/O; None if not even a nameless file can be made to try."""
    try:
        os.close(os.open(folder, os.O_TMPFILE | os.O_RDWR | os.O_DIRECT, 0o600))
    except OSError as error:
        return False if error.errno == errno.EINVAL else None
    return True


# ----------------------------------------------------------------------------------------------- examining


def read_mounts() -> list[Mount]:
    """The mounts that this process sees."""
    return parse_mountinfo(read_text("/proc/self/mountinfo") or "")


def read_text(path: Path | str) -> str | None:
    """The text of a file, or None when it cannot be read."""
    try:
        return read_file(Path(path), _TEXT_BYTES_MAX).decode(errors="replace")
    except OSError:
        return None


def examine_drive(folder: Path, mounts: list[Mount]) -> dict[str, Any]:
    """What is known of the drive that holds ``folder``, or would hold it; made of plain JSON types.

    Without a mount only ``path``, ``free``, ``total``, ``file_system`` (None) and ``warnings`` are there.
    """
    path = folder.resolve()
    path = next(one for one in (path, *path.parents) if one.exists())
    statistics = os.statvfs(path)
    found: dict[str, Any] = {
        "path": str(path),
        "free": statistics.f_bavail * statistics.f_frsize,
        "total": statistics.f_blocks * statistics.f_frsize,
    }
    mount = mount_of(path, mounts)
    if mount is None:
        return {**found, "file_system": None, "warnings": []}
    device = _block_device(mount)
    model = read_text(device / "device/model") if device else None
    rotational, usb = _kind_of(device, model)
    return {
        **found,
        "file_system": mount.kind,
        "mount_point": mount.point,
        "source": mount.source,
        "model": model.strip() if model else None,
        "rotational": rotational,
        "usb": usb,
        "direct_io": direct_io(path),
        "dio_alignment": _dio_alignment(path),
        "queue": None if device is None else parse_queue(lambda name: read_text(device / "queue" / name)),
        "warnings": drive_warnings(mount, rotational=rotational, usb=usb),
    }


def store_drive_notes(paths: Sequence[Path], mounts: list[Mount] | None = None) -> list[str]:
    """What speaks against files of a run at these paths, one sentence for each drive and reason.

    Args:
        paths: of files or folders that need not be there.
        mounts: of this process; None = as they are now.

    Raises:
        UnsupportedError: one would lie on another machine, or where nobody keeps files.
        StorageError: one would lie where nothing can be written.
    """
    mounts = read_mounts() if mounts is None else mounts
    notes: dict[str, None] = {}
    for path in paths:
        there = path.expanduser().resolve()
        there = next(one for one in (there, *there.parents) if one.exists())
        mount = mount_of(there, mounts)
        if mount is None:
            continue
        if mount.kind in _KERNEL:
            raise UnsupportedError(
                f"{path} would lie on {mount.point} ({mount.kind}), where the kernel shows itself and no files are "
                "kept. Choose a folder on a local drive"
            )
        if is_network(mount.kind):
            raise UnsupportedError(
                f"{path} would lie on {mount.point}, a network or shared file system ({mount.kind}): a flush there "
                "promises nothing. Choose a folder on a local drive"
            )
        if os.statvfs(there).f_flag & os.ST_RDONLY:
            raise StorageError(
                f"{path} would lie on {mount.point} ({mount.kind}), which is mounted read-only. Mount it for writing, "
                "or choose another folder"
            )
        notes |= dict.fromkeys(_warnings(mount))
    return list(notes)


def _warnings(mount: Mount) -> list[str]:
    device = _block_device(mount)
    rotational, usb = _kind_of(device, read_text(device / "device/model") if device else None)
    return drive_warnings(mount, rotational=rotational, usb=usb)


def _kind_of(device: Path | None, model: str | None) -> tuple[bool | None, bool]:
    """Whether a drive spins, and whether it is attached by USB."""
    rotational = spins(read_text(device / "queue/rotational"), device, model) if device else None
    return rotational, device is not None and any(part.startswith("usb") for part in device.parts)


def _dio_alignment(folder: Path) -> dict[str, int] | None:
    """Alignment of direct I/O by ``STATX_DIOALIGN``, in bytes; zeros where it is silently buffered."""
    try:
        from megatrain_io.machine.extension import dio_alignment  # noqa: PLC0415 - the doctor is called when things are broken

        found = dio_alignment(folder)
    except (ImportError, OSError, MegatrainIoError):
        return None
    return None if found is None else {"memory": found[0], "offset": found[1]}


def _block_device(mount: Mount) -> Path | None:
    """Folder below ``/sys`` of the whole drive; btrfs hides its number, so its name is tried, too."""
    for entry in (Path("/sys/dev/block", mount.device), Path("/sys/class/block", Path(mount.source).name)):
        if entry.exists():
            device = entry.resolve()
            return device.parent if (device / "partition").exists() else device
    return None


# ----------------------------------------------------------------------------------------------- rendering


def drive_texts(drive: Mapping[str, Any]) -> list[str]:
    """The drive in a line, and its queue and alignment in another where they are known."""
    room = f"{decimal(drive['free'])} free of {decimal(drive['total'])}"
    if drive["file_system"] is None:
        return [f"{drive['path']}: {room}"]
    kinds = {True: "spinning disk", False: "solid state", None: "unknown drive"}
    device = f"{drive['model'] + ', ' if drive['model'] else ''}{kinds[drive['rotational']]}"
    first = f"{drive['path']}: {room}, {drive['file_system']} on {drive['source']} ({device})"
    alignment = drive["dio_alignment"]
    is_direct = drive["direct_io"] if alignment is None else 0 not in alignment.values()
    queue = _queue_text(is_direct, alignment, drive["queue"])
    return [first, queue] if queue else [first]


def _queue_text(
    is_direct: bool | None,  # noqa: FBT001 - a finding
    dio: Mapping[str, int] | None,
    queue: Mapping[str, Any] | None,
) -> str:
    words = {True: "direct I/O", False: "no direct I/O: everything goes through the page cache", None: ""}
    parts = [words[is_direct]]
    if is_direct and dio is not None:
        parts[0] += f" aligned to {dio['offset']} bytes in the file and {dio['memory']} in memory"
    if queue is not None:
        size, alignment = queue["logical_block_size"], queue["dma_alignment"]
        parts += [
            f"logical blocks of {size} bytes" if size else "",
            f"memory aligned to {alignment}" if alignment else "",
            f"requests up to {queue['largest_request_kib']} KiB" if queue["largest_request_kib"] else "",
            f"write cache: {queue['write_cache']}" if queue["write_cache"] else "",
            f"scheduler {queue['scheduler']}" if queue["scheduler"] else "",
        ]
    return ", ".join(part for part in parts if part)
