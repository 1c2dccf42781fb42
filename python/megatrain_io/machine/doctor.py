"""What this machine offers: a text to paste into a report, or the same as a dictionary.

Pure functions parse the texts of files, so that a test can make up every kind of machine. What cannot be found out is
None, and never ends the examination.
"""

import os
import platform
import re
import resource
import warnings
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from megatrain_io.errors import MegatrainIoError
from megatrain_io.machine.cpu import parse_cpuinfo
from megatrain_io.machine.drive import drive_texts, examine_drive, parse_choice, read_mounts, read_text
from megatrain_io.machine.memory import memory
from megatrain_io.machine.profile import Profile, default_path
from megatrain_io.text import gib

__all__ = ["examine", "render"]

# ------------------------------------------------------------------------------------------------ parsing


def wsl_of(release: str) -> str | None:
    """Version of the Windows Subsystem for Linux that a kernel release belongs to; None elsewhere."""
    if "microsoft" not in release.lower():
        return None
    return "WSL2" if "wsl2" in release.lower() or "-microsoft-" in release else "WSL1"


def container_of(files: set[str], cgroup: str) -> str | None:
    """Kind of container, from marker files that exist and the text of ``/proc/self/cgroup``; None outside of one."""
    for file, name in (("/run/.containerenv", "podman"), ("/.dockerenv", "docker")):
        if file in files:
            return name
    match = re.search(r"kubepods|docker|libpod|lxc|containerd", cgroup)
    return match[0] if match else None


# ----------------------------------------------------------------------------------------------- examining


def examine(folder: Path, profile: Path | None = None) -> dict[str, Any]:
    """Examine this machine, for a store in ``folder``; the findings are plain JSON types.

    Args:
        folder: where a store would lie; it need not exist.
        profile: file that ``megatrain-io bench`` wrote; None for its default place.
    """
    cgroup = read_text("/proc/self/cgroup") or ""
    mounts = read_mounts()
    drive = examine_drive(folder, mounts)
    return {
        "megatrain_io": _package(),
        "versions": {
            "python": platform.python_version(),
            **{name: _version(name) for name in ("torch", "transformers", "numpy")},
        },
        "system": _system(cgroup),
        "cpu": _cpu(),
        "memory": memory(cgroup, mounts),
        "gpus": _gpus(),
        "drive": drive,
        "measured": _measured(drive, default_path() if profile is None else profile),
        "uring": _uring(),
        "locked_memory_limit": _locked_memory(),
        "transparent_huge_pages": parse_choice(read_text("/sys/kernel/mm/transparent_hugepage/enabled")),
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _package() -> dict[str, Any]:
    found: dict[str, Any] = {"version": _version("megatrain-io")}
    try:
        from megatrain_io.machine.extension import adamw_kernels, build_info

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

    model, features = parse_cpuinfo(read_text("/proc/cpuinfo") or "")
    usable = len(os.sched_getaffinity(0))
    return {"model": model, "cores": psutil.cpu_count(logical=False), "threads": usable, "features": features}


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


def _measured(drive: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """The figures of the last ``megatrain-io bench`` on this drive: ``drive``, or None and the ``reason``."""
    try:
        profile = Profile.read(path)
    except MegatrainIoError as error:
        return {"drive": None, "reason": str(error)}
    if profile is not None and profile.machine.host != platform.node():
        return {"drive": None, "reason": f"{path} is of another machine ({profile.machine.host})"}
    found = profile and profile.drive(drive.get("mount_point", ""), drive.get("source", ""))
    return {"drive": found.model_dump(mode="json") if found else None, "reason": None}


def _uring() -> dict[str, Any]:
    try:
        from megatrain_io.machine.extension import probe_uring

        reason = probe_uring()
    except (ImportError, OSError) as error:
        reason = f"{type(error).__name__}: {error}"
    return {"available": reason is None, "reason": reason}


def _locked_memory() -> int | None:
    limit, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    return None if limit == resource.RLIM_INFINITY else limit


# ----------------------------------------------------------------------------------------------- rendering


def render(found: Mapping[str, Any]) -> str:
    """The findings as text to read and to paste, a line for each, with the warnings at the end."""
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
        *(("drive", text) for text in drive_texts(found["drive"])),
        ("measured", _measured_text(found["measured"])),
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


def _measured_text(measured: Mapping[str, Any]) -> str:
    drive = measured["drive"]
    if drive is None:
        return measured["reason"] or "not yet on this drive: megatrain-io bench"
    rates = ", ".join(f"{kind} {drive[kind]['gb_per_s']:.2f}" for kind in ("read", "write", "mixed"))
    flush = f"fdatasync {drive['flush']['sync_median'] * 1e3:.2f} ms"
    return f"{rates} GB/s, {flush} (engine {drive['engine']}, {drive['measured_at']})"


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
