"""What this machine offers: a text to paste into a report, or the same as a dictionary.

Parsing is done by pure functions over the texts of files, so that every kind of machine can be made up in a
test. What cannot be found out is None, and never ends the examination.
"""

import os
import platform
import re
import resource
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from rich.filesize import decimal

from megatrain_io.report import gib

__all__ = ["examine", "render"]

ReadText = Callable[[Path], str | None]

_CGROUP_FILES = {
    2: (("memory.max", "memory.high"), "memory.current", "inactive_file"),
    1: (("memory.limit_in_bytes",), "memory.usage_in_bytes", "total_inactive_file"),
}
_NO_LIMIT = 2**60
"""cgroup v1 says "no limit" with a number near 2**63."""
_CPU_FEATURES = (
    "sse4_2",
    "avx2",
    "fma",
    "f16c",
    "avx512f",
    "avx512bw",
    "avx512_bf16",
    "amx_bf16",
    "asimd",
    "bf16",
)
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
_IN_RAM = {"tmpfs", "ramfs"}


@dataclass(frozen=True)
class Mount:
    """One line of ``/proc/self/mountinfo``.

    Attributes:
        device: ``major:minor``.
        root: what of the file system is mounted here.
        point: where.
        kind: type of file system.
        source: device or remote name.
        options: of the file system itself.
    """

    device: str
    root: str
    point: str
    kind: str
    source: str
    options: tuple[str, ...]


@dataclass(frozen=True)
class CgroupLimit:
    """The tightest memory limit of the control groups above this process; ``used`` is without page cache."""

    version: int
    file: str
    limit: int
    used: int


# ------------------------------------------------------------------------------------------------ parsing


def parse_mountinfo(text: str) -> list[Mount]:
    """All mounts, in the order they were made."""
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


def cgroup_folders(cgroup: str, mounts: list[Mount]) -> Iterator[tuple[int, Path]]:
    """``(version, folder)`` of every memory control group above a process, from the inside out.

    Args:
        cgroup: ``/proc/self/cgroup``.
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
    """The number that a file holds; ``max`` is none."""
    return int(text) if text is not None and text.strip().isdigit() else None


def parse_cpuinfo(text: str) -> tuple[str | None, list[str]]:
    """Model name and those features that matter here."""
    model = re.search(r"^(?:model name|Model)\s*:\s*(.+)$", text, re.MULTILINE)
    flags = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", text, re.MULTILINE)
    words = set(flags[1].split()) if flags else set()
    return (model[1].strip() if model else None), [name for name in _CPU_FEATURES if name in words]


def parse_choice(text: str | None) -> str | None:
    """The choice in brackets: ``always [madvise] never``."""
    chosen = re.search(r"\[(\w+)\]", text or "")
    return chosen[1] if chosen else None


def wsl_of(release: str) -> str | None:
    """Which Windows Subsystem for Linux a kernel release belongs to."""
    if "microsoft" not in release.lower():
        return None
    return "WSL2" if "wsl2" in release.lower() or "-microsoft-" in release else "WSL1"


def container_of(files: set[str], cgroup: str) -> str | None:
    """Which container this is, from marker files that exist and from ``/proc/self/cgroup``."""
    for file, name in (("/run/.containerenv", "podman"), ("/.dockerenv", "docker")):
        if file in files:
            return name
    match = re.search(r"kubepods|docker|libpod|lxc|containerd", cgroup)
    return match[0] if match else None


def spins(rotational: str | None, device: Path, model: str | None) -> bool | None:
    """Whether a drive is a spinning disk; what a virtual drive says of itself means nothing.

    Args:
        rotational: ``queue/rotational`` of the drive.
        device: its folder below ``/sys/devices``.
        model: ``device/model``.
    """
    is_virtual = any(part.startswith(("virtio", "vbd")) for part in device.parts)
    if rotational is None or is_virtual or re.search(r"virtual|vbox|vmware|qemu", model or "", re.IGNORECASE):
        return None
    return rotational.strip() == "1"


def drive_warnings(mount: Mount, *, rotational: bool | None, usb: bool) -> list[str]:
    """What speaks against a store on this mount, one sentence each."""
    point, kind = mount.point, mount.kind
    found = []
    if kind in {"9p", "drvfs", "v9fs"} and re.match(r"/mnt/[a-z](/|$)", point):
        found.append(
            f"{point} is a Windows drive seen through {kind}, which is slow. Put the store inside WSL, e.g. ~/mt"
        )
    elif kind in _NETWORK or kind.startswith("fuse.sshfs"):
        found.append(f"{point} is a network or shared file system ({kind}). Put the store on a local drive")
    elif kind in _IN_RAM:
        found.append(f"{point} is {kind}: that is RAM, and gone after a restart. Put the store on a drive")
    elif kind == "overlay":
        found.append(
            f"{point} is the container's own layer (overlay). Mount a folder of a local drive as a volume"
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


# ----------------------------------------------------------------------------------------------- examining


def examine(folder: Path) -> dict[str, Any]:
    """Everything about this machine, for a store in ``folder``; made of plain JSON types."""
    cgroup = _read("/proc/self/cgroup") or ""
    mounts = parse_mountinfo(_read("/proc/self/mountinfo") or "")
    return {
        "megatrain_io": _package(),
        "versions": {
            "python": platform.python_version(),
            **{name: _version(name) for name in ("torch", "transformers", "numpy")},
        },
        "system": _system(cgroup),
        "cpu": _cpu(),
        "memory": _memory(cgroup, mounts),
        "gpus": _gpus(),
        "drive": _drive(folder, mounts),
        "uring": _uring(),
        "locked_memory_limit": _locked_memory(),
        "transparent_huge_pages": parse_choice(_read("/sys/kernel/mm/transparent_hugepage/enabled")),
    }


def _read(path: Path | str) -> str | None:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _package() -> dict[str, Any]:
    found: dict[str, Any] = {"version": _version("megatrain-io")}
    try:
        from megatrain_io.swap import adamw_kernels, build_info

        found["core"], found["profile"], found["uring_built_in"] = build_info()
        found["adamw_kernels"] = list(adamw_kernels())
    except (ImportError, OSError) as error:  # the doctor is called when things are broken
        found["broken"] = f"{type(error).__name__}: {error}"
    return found


def _system(cgroup: str) -> dict[str, Any]:
    markers = {path for path in ("/.dockerenv", "/run/.containerenv") if Path(path).exists()}
    try:
        name = platform.freedesktop_os_release().get("PRETTY_NAME")
    except OSError:
        name = None
    return {
        "name": name,
        "kernel": f"{platform.system()} {platform.release()}",
        "machine": platform.machine(),
        "container": container_of(markers, cgroup),
        "wsl": wsl_of(platform.release()),
    }


def _cpu() -> dict[str, Any]:
    import psutil

    model, features = parse_cpuinfo(_read("/proc/cpuinfo") or "")
    usable = len(os.sched_getaffinity(0))
    return {"model": model, "cores": psutil.cpu_count(logical=False), "threads": usable, "features": features}


def _memory(cgroup: str, mounts: list[Mount]) -> dict[str, Any]:
    import psutil

    total, available = psutil.virtual_memory()[:2]
    return memory_that_counts(total, available, cgroup_limit(cgroup_folders(cgroup, mounts), _read))


def memory_that_counts(total: int, available: int, limit: CgroupLimit | None) -> dict[str, Any]:
    """RAM of the host, the limit of the control group, and what may really be used, and why."""
    room = None if limit is None else max(0, limit.limit - limit.used)
    is_limited = room is not None and room < available
    return {
        "total": total,
        "available": available,
        "cgroup": None if limit is None else asdict(limit),
        "usable": room if is_limited else available,
        "usable_because": "the cgroup limit" if is_limited else "the host's available memory",
    }


def _gpus() -> dict[str, Any]:
    try:
        import torch

        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            count = torch.cuda.device_count() if torch.cuda.is_available() else 0
            devices = [_gpu(torch.cuda, index) for index in range(count)]
    except (ImportError, OSError, RuntimeError) as error:
        return {"devices": [], "reason": f"{type(error).__name__}: {error}"}
    reason = str(caught[0].message) if caught and not devices else None
    return {"devices": devices, "reason": reason}


def _gpu(cuda: Any, index: int) -> dict[str, Any]:
    properties = cuda.get_device_properties(index)
    return {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "total": properties.total_memory,
        "free": cuda.mem_get_info(index)[0],
    }


def _drive(folder: Path, mounts: list[Mount]) -> dict[str, Any]:
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
    model = _read(device / "device/model") if device else None
    rotational = spins(_read(device / "queue/rotational"), device, model) if device else None
    usb = device is not None and any(part.startswith("usb") for part in device.parts)
    return {
        **found,
        "file_system": mount.kind,
        "mount_point": mount.point,
        "source": mount.source,
        "model": model.strip() if model else None,
        "rotational": rotational,
        "usb": usb,
        "warnings": drive_warnings(mount, rotational=rotational, usb=usb),
    }


def _block_device(mount: Mount) -> Path | None:
    """The folder below ``/sys`` of the whole drive; btrfs hides the number, so the name is tried too."""
    for entry in (Path("/sys/dev/block", mount.device), Path("/sys/class/block", Path(mount.source).name)):
        if entry.exists():
            device = entry.resolve()
            return device.parent if (device / "partition").exists() else device
    return None


def _uring() -> dict[str, Any]:
    try:
        from megatrain_io.swap import probe_uring

        reason = probe_uring()
    except (ImportError, OSError) as error:
        reason = f"{type(error).__name__}: {error}"
    return {"available": reason is None, "reason": reason}


def _locked_memory() -> int | None:
    limit, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    return None if limit == resource.RLIM_INFINITY else limit


# ----------------------------------------------------------------------------------------------- rendering


def render(found: Mapping[str, Any]) -> str:
    """The findings as a text to read and to paste."""
    rows = [
        ("megatrain-io", _package_text(found["megatrain_io"])),
        (
            "versions",
            ", ".join(f"{name} {number or 'missing'}" for name, number in found["versions"].items()),
        ),
        ("system", _system_text(found["system"])),
        ("CPU", _cpu_text(found["cpu"])),
        ("RAM", _memory_text(found["memory"])),
        *(("GPU", text) for text in _gpu_texts(found["gpus"])),
        ("drive", _drive_text(found["drive"])),
        (
            "io_uring",
            "available" if found["uring"]["available"] else f"not available: {found['uring']['reason']}",
        ),
        ("locked memory", _limit_text(found["locked_memory_limit"])),
        ("huge pages", found["transparent_huge_pages"] or "unknown"),
    ]
    lines = [f"{name:<14} {text}" for name, text in rows]
    return "\n".join([*lines, *(f"warning: {text}" for text in _warnings(found))])


def _package_text(package: Mapping[str, Any]) -> str:
    number = package["version"] or "(not installed)"
    if "broken" in package:
        return f"{number}, the extension cannot be used: {package['broken']}"
    uring = "with" if package["uring_built_in"] else "without"
    kernels = ", ".join(package["adamw_kernels"])
    return f"{number} ({package['profile']} build, {uring} io_uring; AdamW kernels: {kernels})"


def _system_text(system: Mapping[str, Any]) -> str:
    parts = [system["name"], system["kernel"], system["machine"], system["wsl"]]
    parts.append(f"container: {system['container']}" if system["container"] else None)
    return ", ".join(part for part in parts if part)


def _cpu_text(cpu: Mapping[str, Any]) -> str:
    cores = f"{cpu['cores'] or '?'} cores, {cpu['threads']} threads usable"
    return f"{cpu['model'] or 'unknown model'}, {cores}; {' '.join(cpu['features'])}".rstrip("; ")


def _memory_text(memory: Mapping[str, Any]) -> str:
    limit = memory["cgroup"]
    bound = f", cgroup v{limit['version']} limit {gib(limit['limit'])}" if limit else ", no cgroup limit"
    text = f"{gib(memory['available'])} available of {gib(memory['total'])}{bound}"
    return f"{text}; {gib(memory['usable'])} usable ({memory['usable_because']} counts)"


def _gpu_texts(gpus: Mapping[str, Any]) -> list[str]:
    if not gpus["devices"]:
        return [f"none that torch can use{': ' + gpus['reason'] if gpus['reason'] else ''}"]
    return [
        f"{gpu['name']}, {gib(gpu['free'])} free of {gib(gpu['total'])}, compute capability {gpu['capability']}"
        for gpu in gpus["devices"]
    ]


def _drive_text(drive: Mapping[str, Any]) -> str:
    room = f"{decimal(drive['free'])} free of {decimal(drive['total'])}"
    if drive["file_system"] is None:
        return f"{drive['path']}: {room}"
    kinds = {True: "spinning disk", False: "solid state", None: "unknown drive"}
    device = f"{drive['model'] + ', ' if drive['model'] else ''}{kinds[drive['rotational']]}"
    return f"{drive['path']}: {room}, {drive['file_system']} on {drive['source']} ({device})"


def _limit_text(limit: int | None) -> str:
    return "unlimited" if limit is None else f"{limit >> 20} MiB (RLIMIT_MEMLOCK; raise it with ulimit -l)"


def _warnings(found: Mapping[str, Any]) -> list[str]:
    texts: list[str] = list(found["drive"]["warnings"])
    memory = found["memory"]
    limit = memory["cgroup"]
    if limit and limit["limit"] < memory["total"]:
        source = f"cgroup {Path(limit['file']).name}"
        host = gib(memory["total"])
        texts.append(f"this container allows {gib(limit['limit'])} ({source}) although the host has {host}")
    if found["megatrain_io"].get("profile") == "debug":
        texts.append("this is a debug build of the core: it is correct but slow")
    return texts
