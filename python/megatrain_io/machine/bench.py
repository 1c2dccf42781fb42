"""What this machine can do, measured in about half a minute: drive, memory, AdamW, matrix products.

What is decided from the rates is decided by pure functions, so that a test can make up every kind of drive.
"""

import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import accumulate
from pathlib import Path
from typing import Literal

from rich.filesize import decimal

from megatrain_io.errors import ConfigError, NoSpaceError, UnsupportedError
from megatrain_io.machine.drive import Mount, examine_drive, is_network, mount_of, read_mounts
from megatrain_io.machine.measure import (
    Figure,
    ScratchFile,
    Traffic,
    Workload,
    adamw_kernels,
    figure_of,
    scratch_file,
    transfer,
)
from megatrain_io.machine.profile import (
    CpuProfile,
    DriveProfile,
    FlushProfile,
    Machine,
    MatmulProfile,
    Profile,
    Rate,
    Sustained,
    default_path,
)

__all__ = ["Options", "bench", "knee_of", "measure_into", "render", "required_bytes"]

Progress = Callable[[int, int], None]

MIB = 1 << 20
_MARGIN = 256 * MIB
"""Bytes left free beside the scratch file."""
_CYCLE = 48 * MIB
"""Bytes of both copies of a chunk: the traffic of training needs room for one at least."""
_FORM = (4 * MIB, 8)
_TRAINING_FORM = (20 * MIB, 4)
_LARGEST_SUSTAINED = 256_000_000_000
_FALL = 0.75
"""A rate that stays below so much of the rate before has fallen."""
_WINDOWS_OF_A_KNEE = 4
_WINDOWS_STEADY = 8
_SPREAD_STEADY = 0.15
_PARAMETERS = 16 << 20
_SUSTAINED_SHARE = 60.0
"""Seconds that sustained writing counts for in the progress: how long it takes is not known before."""


@dataclass(frozen=True)
class Options:
    """What to measure, and for how long.

    Attributes:
        nbytes: bytes of the scratch file.
        seconds: for each kind of traffic; what runs on the CPU takes a share of it.
        engine: ``auto``, ``uring`` or ``threads``.
        sustained: whether to write until the drive's cache is full.
        sustained_bytes: most bytes that this writes; None for half of what is free, 256 GB at most.
        sustained_seconds: longest time that it takes.
        matmul: whether to measure matrix products, for which torch is imported.
    """

    nbytes: int = 2 << 30
    seconds: float = 5.0
    engine: Literal["auto", "uring", "threads"] = "auto"
    sustained: bool = False
    sustained_bytes: int | None = None
    sustained_seconds: float = 600.0
    matmul: bool = True


# ------------------------------------------------------------------------------------------------ deciding


def required_bytes(options: Options, free: int) -> int:
    """Bytes of the scratch file for these options, with ``free`` bytes on the drive.

    Raises:
        ConfigError: too small for the traffic of training.
    """
    nbytes = options.nbytes
    if options.sustained:
        wanted = options.sustained_bytes
        nbytes = max(nbytes, min(free // 2, _LARGEST_SUSTAINED) if wanted is None else wanted)
    if nbytes < _CYCLE:
        raise ConfigError(
            f"{decimal(nbytes)} are too small a file to measure on: give at least {_CYCLE // MIB} MiB"
        )
    return nbytes


def check_place(folder: Path, mount: Mount | None, nbytes: int, free: int) -> None:
    """Refuse a folder that cannot be measured on, before anything is written.

    Raises:
        ConfigError: the folder does not exist.
        UnsupportedError: it lies on a network file system.
        NoSpaceError: there is too little room.
    """
    if not folder.is_dir():
        raise ConfigError(f"{folder} is no folder: give one on the drive to measure")
    if mount is not None and is_network(mount.kind):
        raise UnsupportedError(
            f"{folder} lies on a network or shared file system ({mount.kind} at {mount.point}), whose figures say "
            "nothing about a store. Nothing was written: name a folder on a local drive"
        )
    if free < nbytes + _MARGIN:
        raise NoSpaceError(
            f"measuring takes {decimal(nbytes)} for a file and {decimal(_MARGIN)} to spare, and {folder} has "
            f"{decimal(free)} free. Nothing was written: free space, choose another drive, or a smaller --size"
        )


def rate_of(figures: Sequence[Figure]) -> Rate:
    """The rate over several windows: median, slowest and fastest, and the CPU time."""
    rates = [each.gb_per_s for each in figures]
    nbytes = sum(each.nbytes for each in figures)
    cpu = sum(each.cpu_seconds for each in figures)
    return Rate(
        gb_per_s=statistics.median(rates),
        least=min(rates),
        most=max(rates),
        cpu_s_per_gb=cpu / (nbytes / 1e9) if nbytes else 0.0,
        nbytes=nbytes,
    )


def knee_of(rates: Sequence[float]) -> int | None:
    """The first window of the lower rate of a drive whose cache is full, or None when the rate did not fall.

    The cut is where two levels fit best (least squares); what is no lasting fall by a quarter is noise.
    """
    least = _WINDOWS_OF_A_KNEE
    cuts = range(least, len(rates) - least + 1)
    if not cuts:
        return None

    sums, whole = [0.0, *accumulate(rates)], sum(rates)

    def explained(cut: int) -> float:
        left = sums[cut]
        return left**2 / cut + (whole - left) ** 2 / (len(rates) - cut)

    cut = max(cuts, key=explained)
    before, after = statistics.median(rates[:cut]), statistics.median(rates[cut:])
    return cut if max(rates[cut], after) < _FALL * before else None


def is_steady(rates: Sequence[float]) -> bool:
    """Whether the last windows are alike: the first half of them and the second have the same level."""
    last = rates[-_WINDOWS_STEADY:]
    if len(last) < _WINDOWS_STEADY:
        return False
    first, second = (statistics.median(half) for half in (last[: len(last) // 2], last[len(last) // 2 :]))
    return abs(first - second) <= _SPREAD_STEADY * max(first, second)


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that is at least as large as a share ``share`` of all."""
    ordered = sorted(values)
    return ordered[max(0, -int(-share * len(ordered) // 1) - 1)]


def sustained_of(figures: Sequence[Figure], ended: Literal["steady", "size", "time"]) -> Sustained:
    """What windows of sustained writing say about the drive's cache."""
    rates = [each.gb_per_s for each in figures]
    knee = knee_of(rates)
    written = [0]
    for each in figures:
        written.append(written[-1] + each.written)
    cut = len(rates) if knee is None else knee
    before = statistics.median(rates[:cut])
    return Sustained(
        before_gb_per_s=before,
        after_gb_per_s=before if knee is None else statistics.median(rates[cut:]),
        knee_bytes=None if knee is None else written[cut],
        nbytes=written[-1],
        seconds=sum(each.seconds for each in figures),
        ended=ended,
    )


# ----------------------------------------------------------------------------------------------- measuring


@dataclass
class _Share:
    """Progress of a measurement of ``whole`` seconds, told in hundredths."""

    progress: Progress
    whole: float
    done: float = field(default=0.0)

    def add(self, seconds: float) -> None:
        self.done = min(self.whole, self.done + seconds)
        self.progress(int(99 * self.done / self.whole), 100)


def bench(folder: Path, options: Options, progress: Progress) -> Profile:
    """Measure the drive that holds ``folder`` and this machine. Nothing is left on the drive.

    Raises:
        ConfigError, UnsupportedError, NoSpaceError: it cannot be measured there; nothing was written.
        StorageError: the drive failed.
    """
    statistics_of_folder = os.statvfs(folder) if folder.is_dir() else None
    free = statistics_of_folder.f_bavail * statistics_of_folder.f_frsize if statistics_of_folder else 0
    mounts = read_mounts()
    mount = mount_of(folder.resolve(), mounts)
    nbytes = required_bytes(options, free)
    check_place(folder, mount, nbytes, free)
    whole = 5 * options.seconds + (_SUSTAINED_SHARE if options.sustained else 0.0)
    share = _Share(progress, whole)
    drive = _drive(folder, mounts, nbytes, options, share)
    cpu = _cpu(options.seconds, share)
    matmul = _matmul(options.seconds / 4, share) if options.matmul else None
    progress(100, 100)
    return Profile(machine=_machine(), cpu=cpu, matmul=matmul, drives=[drive])


def measure_into(
    path: Path | None, folder: Path, options: Options, progress: Progress
) -> tuple[Profile, Path]:
    """Measure as ``bench`` does, and keep the figures in a profile beside those of other drives.

    Args:
        path: path of the profile; None for that of this machine. One that cannot be read is refused beforehand.
        folder: on the drive to measure.
        options: what to measure.
        progress: called with hundredths done.

    Returns:
        What was measured now, and where the profile lies.

    Raises:
        ConfigError, UnsupportedError, NoSpaceError, StorageError: as ``bench``; or the profile's.
    """
    path = default_path() if path is None else path
    older = Profile.read(path)
    Profile.check_writable(path)
    found = bench(folder, options, progress)
    found.joined_to(older).write(path)
    return found, path


def _machine() -> Machine:
    import psutil

    from megatrain_io.machine.cpu import cpu_model

    return Machine(
        host=platform.node(),
        cpu=cpu_model(),
        threads=len(os.sched_getaffinity(0)),
        kernel=platform.release(),
        ram_bytes=psutil.virtual_memory().total,
    )


def _drive(folder: Path, mounts: list[Mount], nbytes: int, options: Options, share: _Share) -> DriveProfile:
    about = examine_drive(folder, mounts)
    sustained = None
    if options.sustained:
        with scratch_file(folder, nbytes, options.engine) as file:
            sustained = _sustained(file, nbytes, options, share)
    nbytes = options.nbytes
    with scratch_file(folder, nbytes, options.engine) as file:
        # What was never written is not read from the drive. In pieces, so that Ctrl-C is heard on a slow one.
        for offset in range(0, nbytes, 256 * MIB):
            transfer(file, "write", _FORM, min(256 * MIB, nbytes - offset), offset=offset)
        kinds: tuple[tuple[Traffic, tuple[int, int]], ...] = (
            ("read", _FORM),
            ("write", _FORM),
            ("training", _TRAINING_FORM),
        )
        windows = {
            traffic: list(_windows(file, traffic, form, nbytes, options.seconds, share))
            for traffic, form in kinds
        }
        rates = {traffic: rate_of(figures) for traffic, figures in windows.items()}
        refused = windows["training"][0].registration_refused
        syncs, durable = file.flush_latency(100, options.seconds / 2)
        share.add(options.seconds / 2)
        engine, _ = file.engine
        return DriveProfile(
            mount_point=about.get("mount_point") or str(folder.resolve()),
            source=about.get("source") or "unknown",
            file_system=about["file_system"] or "unknown",
            model=about.get("model"),
            measured_at=datetime.now(UTC).replace(microsecond=0),
            engine="uring" if engine == "uring" else "threads",
            is_direct=file.is_direct,
            registration_refused=refused,
            read=rates["read"],
            write=rates["write"],
            mixed=rates["training"],
            flush=FlushProfile(
                count=len(syncs),
                sync_median=statistics.median(syncs),
                sync_p99=percentile(syncs, 0.99),
                durable_write_median=statistics.median(durable),
                durable_write_p99=percentile(durable, 0.99),
            ),
            sustained=sustained,
        )


def _windows(
    file: ScratchFile, traffic: Traffic, form: tuple[int, int], nbytes: int, seconds: float, share: _Share
) -> Iterator[Figure]:
    """Measure windows of a second at most, so that Ctrl-C is heard in between; at least one."""
    offset, end = 0, time.monotonic() + seconds
    while True:
        window = min(1.0, max(end - time.monotonic(), 0.05))
        figure = transfer(file, traffic, form, 1 << 60, seconds=window, offset=offset)
        offset = (offset + max(figure.read, figure.written)) % nbytes
        share.add(figure.seconds)
        yield figure
        if time.monotonic() >= end:
            return


def _sustained(file: ScratchFile, nbytes: int, options: Options, share: _Share) -> Sustained:
    """Write the whole file, until the rate has fallen and is steady, or a limit is reached.

    A rate that never fell says nothing about what comes after the cache, however steady it is: so only a knee
    lets it end before the limits.
    """
    figures: list[Figure] = []
    start, written = time.monotonic(), 0
    ended: Literal["steady", "size", "time"] = "size"
    while written < nbytes:
        figure = transfer(file, "write", _FORM, nbytes - written, seconds=1.0, offset=written)
        written += figure.written
        figures.append(figure)
        share.add(_SUSTAINED_SHARE * figure.written / nbytes)
        rates = [each.gb_per_s for each in figures]
        if knee_of(rates) is not None and is_steady(rates):
            ended = "steady"
            break
        if time.monotonic() - start >= options.sustained_seconds:
            ended = "time"
            break
    if len(figures) > 1 and figures[-1].seconds < figures[-2].seconds / 2:
        figures.pop()  # the rest of the file: too short a window to say anything
    return sustained_of(figures, ended)


def _cpu(seconds: float, share: _Share) -> CpuProfile:
    found = {}
    for name in ("copy", "checksum", "adamw f32", "adamw split"):
        workload = Workload(name, _PARAMETERS)
        workload.run()  # touches the memory
        end, figures = time.monotonic() + seconds / 6, [figure_of(workload.run())]
        while time.monotonic() < end:
            figures.append(figure_of(workload.run()))
        found[name] = figures
        share.add(seconds / 6)
    pace = {
        name: _PARAMETERS / statistics.median(each.seconds for each in found[name])
        for name in ("adamw f32", "adamw split")
    }
    return CpuProfile(
        memory_copy=rate_of(found["copy"]),
        checksum=rate_of(found["checksum"]),
        adamw_f32=pace["adamw f32"],
        adamw_split=pace["adamw split"],
        kernel=adamw_kernels()[-1],
    )


def _matmul(seconds: float, share: _Share) -> MatmulProfile:
    import torch

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    size = 8192 if device.type == "cuda" else 1024
    found = {}
    for dtype in (torch.bfloat16, torch.float32):
        a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
        out = torch.empty(size, size, device=device, dtype=dtype)
        times: list[float] = []
        with _torch_at_rest(device):
            torch.mm(a, b, out=out)  # the first one chooses its kernel
        end = time.monotonic() + seconds
        while not times or time.monotonic() < end:
            start = time.perf_counter()
            with _torch_at_rest(device):
                torch.mm(a, b, out=out)
            times.append(time.perf_counter() - start)
        found[dtype] = 2 * size**3 / 1e9 / statistics.median(times)
        share.add(seconds)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    return MatmulProfile(device=name, bf16=found[torch.bfloat16], fp32=found[torch.float32], size=size)


@contextmanager
def _torch_at_rest(device: "torch.device") -> Iterator[None]:  # type: ignore[name-defined]  # noqa: F821 - imported late
    """Wait at the end for what the body has started on the device."""
    yield
    if device.type == "cuda":
        import torch

        torch.cuda.synchronize(device)


# ----------------------------------------------------------------------------------------------- rendering


def render(profile: Profile) -> str:
    """The figures of one measurement as text, a line for each."""
    (drive,) = profile.drives[-1:]
    cpu, matmul = profile.cpu, profile.matmul
    rows = [
        ("drive", _place_text(drive)),
        *((name, rate_text(getattr(drive, name))) for name in ("read", "write", "mixed")),
        ("flush", flush_text(drive.flush)),
        *([("sustained", sustained_text(drive.sustained))] if drive.sustained else []),
        ("memory copy", rate_text(cpu.memory_copy)),
        ("checksum", rate_text(cpu.checksum)),
        (
            "AdamW",
            f"{cpu.adamw_f32 / 1e6:.0f} M parameters/s in f32, {cpu.adamw_split / 1e6:.0f} M split ({cpu.kernel})",
        ),
    ]
    if matmul is not None:
        figures = f"{matmul.bf16:.3g} GFLOP/s in bf16, {matmul.fp32:.3g} in fp32"
        rows.append(("matmul", f"{figures} ({matmul.size} x {matmul.size}, {matmul.device})"))
    return "\n".join(f"{name:<14} {text}" for name, text in rows)


def _place_text(drive: DriveProfile) -> str:
    direct = "" if drive.is_direct else ", through the page cache: no direct I/O here"
    why = drive.registration_refused
    unregistered = f", memory is not registered, which costs CPU time: {why}" if why else ""
    model = f", {drive.model}" if drive.model else ""
    place = f"{drive.mount_point} ({drive.file_system} on {drive.source}{model})"
    return f"{place}, engine {drive.engine}{direct}{unregistered}"


def rate_text(rate: Rate) -> str:
    """Median, slowest and fastest window in GB/s, and CPU seconds for each GB."""
    spread = f"{rate.least:.2f} to {rate.most:.2f}"
    return f"{rate.gb_per_s:.2f} GB/s ({spread}), {rate.cpu_s_per_gb:.3f} CPU s/GB"


def flush_text(flush: FlushProfile) -> str:
    """Median and 99th percentile of both kinds of flush, in milliseconds."""
    kinds = (
        ("fdatasync", flush.sync_median, flush.sync_p99),
        ("4 KiB durable", flush.durable_write_median, flush.durable_write_p99),
    )
    texts = [f"{name} {median * 1e3:.2f} ms, p99 {p99 * 1e3:.2f} ms" for name, median, p99 in kinds]
    return "; ".join(texts)


def sustained_text(found: Sustained) -> str:
    """Rates before and after the knee in GB/s, or that there was none."""
    limits = {"size": "the limit of size", "time": "the limit of time", "steady": "a steady rate"}
    end = f"{decimal(found.nbytes)} in {found.seconds:.0f} s, up to {limits[found.ended]}"
    if found.knee_bytes is None:
        return f"{found.before_gb_per_s:.2f} GB/s throughout ({end}): the rate did not fall"
    fall = f"{found.before_gb_per_s:.2f} GB/s, then {found.after_gb_per_s:.2f} GB/s"
    return f"{fall} after {decimal(found.knee_bytes)} ({end})"
