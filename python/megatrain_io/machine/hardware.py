"""The machine that a plan is made for: this one, as ``megatrain-io bench`` measured it, or one that a file has."""

from collections.abc import Iterator, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from megatrain_io.config.values import Size
from megatrain_io.config.yaml_text import NOT_YAML, yaml_problem
from megatrain_io.errors import ConfigError
from megatrain_io.files import SETTINGS_BYTES_MAX, read_file
from megatrain_io.machine.drive import examine_drive, is_network, read_mounts
from megatrain_io.machine.extension import state_formats
from megatrain_io.machine.profile import DriveProfile, Profile
from megatrain_io.machine.smart import read_smart

__all__ = ["Drive", "Gpu", "Hardware", "known_machines", "load_hardware", "this_machine"]

# Of the bytes that training in bf16 moves: ``bench`` measures its traffic.
_READ, _WRITTEN = state_formats()["bf16"]["step_nbytes"]
_READ_SHARE, _WRITTEN_SHARE = _READ / (_READ + _WRITTEN), _WRITTEN / (_READ + _WRITTEN)

Positive = Annotated[float, Field(gt=0)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True)


class Drive(_Section):
    """Rates, room and wear of one drive; None where a figure is not known."""

    read_gb_per_s: Positive | None = None
    """GB/s (10^9 bytes) read, when nothing is written"""
    write_gb_per_s: Positive | None = None
    """GB/s written for long: behind the drive's cache"""
    burst_write_gb_per_s: Positive | None = None
    """GB/s written until the drive's cache is full"""
    side_by_side: Annotated[float, Field(ge=0.5, le=2)] = 1.0
    """what reading and writing at once reach, as a multiple of taking turns"""
    capacity: Size | None = None
    """bytes of the whole drive"""
    free: Size | None = None
    """bytes that a store may take"""
    tbw: Positive | None = None
    """TB written that the drive is rated for"""
    tbw_used: Annotated[float, Field(ge=0)] | None = None
    """TB written in its life so far"""
    problem: str | None = None
    """why no store can lie there"""


class Gpu(_Section):
    """A GPU that computes in place of the CPU."""

    name: str
    """as it is sold"""
    vram: Size
    """bytes of its memory"""
    tflops: Positive | None = None
    """10^12 operations a second in the compute dtype that training reaches, not those of the data sheet"""
    has_bf16: bool = True
    """whether it computes in bf16"""


class Hardware(_Section):
    """A machine as a plan needs it: RAM, drives, what computes, and its rates."""

    name: str
    """what it is called"""
    ram: Size
    """bytes of RAM that training may use"""
    drives: Annotated[tuple[Drive, ...], Field(min_length=1)]
    """those that the store is spread over"""
    device: Gpu | None = None
    """GPU; none: the CPU computes"""
    cpu_tflops: Positive | None = None
    """10^12 operations a second of the CPU in the compute dtype, where there is no GPU"""
    checksum_gb_per_s: Positive = 20.0
    """GB/s whose checksums are compared"""
    adamw_parameters_per_s: Positive = 1.0e9
    """parameters a second that AdamW updates"""
    commit_seconds: Annotated[float, Field(ge=0)] = 0.002
    """from the last write to the durable superblock"""
    watts: Positive | None = None
    """power that the machine takes while it trains"""

    @property
    def read(self) -> float | None:
        """Bytes per second read from all drives: chunks are spread evenly, so the slowest counts; None if unknown."""
        return self._of_all([drive.read_gb_per_s for drive in self.drives])

    @property
    def write(self) -> float | None:
        """Bytes per second written to all drives for long, with full caches; None if unknown."""
        return self._of_all([drive.write_gb_per_s for drive in self.drives])

    @property
    def flops_per_second(self) -> float | None:
        """FLOPs per second of what computes, the GPU or else the CPU; None if unknown."""
        tflops = self.cpu_tflops if self.device is None else self.device.tflops
        return None if tflops is None else tflops * 1e12

    @property
    def side_by_side(self) -> float:
        """What reading and writing at once reach on the slowest drive, as a multiple of taking turns."""
        return min(drive.side_by_side for drive in self.drives)

    @property
    def shares_cores(self) -> bool:
        """Whether compute runs on the same cores as AdamW and checksums."""
        return self.device is None

    def _of_all(self, rates: Sequence[float | None]) -> float | None:
        known = [rate for rate in rates if rate is not None]
        return len(rates) * min(known) * 1e9 if len(known) == len(rates) else None


def this_machine(
    folders: Sequence[Path],
    ram: int,
    precision: str,
    profile: Profile | None = None,
    *,
    gpu: Gpu | None = None,
    asks_drives: bool = False,
) -> Hardware:
    """The machine that this runs on: its drives as they are now, its rates as ``bench`` measured them.

    Args:
        folders: where the store's files would lie; those on one file system share its drive.
        ram: bytes of RAM that training may use.
        precision: compute dtype.
        profile: what was measured; without one there are no rates.
        gpu: the GPU that computes, if it is not the CPU.
        asks_drives: whether the drives are asked for their wear (``smartctl``).
    """
    mounts = read_mounts()
    examined = [examine_drive(folder, mounts) for folder in folders]
    # Files that share a drive are no faster for being two, and take their room from the same.
    found = {(each.get("mount_point", each["path"]), each.get("source")): each for each in examined}.values()
    measured = [
        None if profile is None else profile.drive(each.get("mount_point", ""), each.get("source", ""))
        for each in found
    ]
    drives = tuple(
        _drive_here(about, rates, asks=asks_drives) for about, rates in zip(found, measured, strict=True)
    )
    if profile is None:
        return Hardware(name="this machine", ram=ram, drives=drives, device=gpu)
    cpu, matmul = profile.cpu, profile.matmul
    tflops = None
    # Measured where it will compute, or not at all.
    if matmul is not None and (matmul.device == "cpu") == (gpu is None):
        tflops = (matmul.bf16 if precision == "bf16" else matmul.fp32) / 1e3
    device = None if gpu is None else gpu.model_copy(update={"tflops": tflops})
    flushes = [each.flush.sync_median + 2 * each.flush.durable_write_median for each in measured if each]
    return Hardware(
        name=f"this machine ({profile.machine.cpu or profile.machine.host}, {profile.machine.threads} threads)",
        ram=ram,
        drives=drives,
        device=device,
        cpu_tflops=tflops if device is None else None,
        checksum_gb_per_s=cpu.checksum.gb_per_s,
        adamw_parameters_per_s=cpu.adamw_split if precision == "bf16" else cpu.adamw_f32,
        commit_seconds=max(flushes, default=0.0),
    )


def _drive_here(about: dict[str, Any], rates: DriveProfile | None, *, asks: bool) -> Drive:
    """A drive of this machine, from what is known of it and the rates that were measured."""
    smart = read_smart(about.get("source")) if asks else None
    kind = about["file_system"]
    is_remote = kind is not None and is_network(kind)
    drive = Drive() if rates is None else _drive_of(rates)
    return drive.model_copy(
        update={
            "capacity": about["total"],
            "free": about["free"],
            "tbw_used": None if smart is None else smart.written_tb,
            "problem": next(iter(about["warnings"]), None) if is_remote else None,
        }
    )


def _drive_of(profile: DriveProfile) -> Drive:
    """The rates of a drive that was measured; the sustained rate of writing where that was."""
    read, write = profile.read.gb_per_s, profile.write.gb_per_s
    # Seconds for a GB of training's traffic, taking turns, over those that were measured.
    turns = _READ_SHARE / read + _WRITTEN_SHARE / write
    sustained = profile.sustained
    return Drive(
        read_gb_per_s=read,
        write_gb_per_s=write if sustained is None else min(write, sustained.after_gb_per_s),
        burst_write_gb_per_s=write,
        side_by_side=min(2.0, max(0.5, turns * profile.mixed.gb_per_s)),
    )


def known_machines() -> Iterator[str]:
    """Names of the descriptions that come with the package."""
    for entry in sorted(
        files("megatrain_io.machine").joinpath("machines").iterdir(), key=lambda entry: entry.name
    ):
        yield entry.name.removesuffix(".yaml")


def load_hardware(machine: str) -> Hardware:
    """The machine that a file describes, or one of ``known_machines``.

    Raises:
        ConfigError: there is no such file, or something in it is wrong.
    """
    known = list(known_machines())
    if machine in known:
        source = f"{machine}.yaml"
        text = files("megatrain_io.machine").joinpath("machines", source).read_text(encoding="utf-8")
    else:
        source = machine
        try:
            text = read_file(Path(machine), SETTINGS_BYTES_MAX).decode()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(
                f"{machine} is no file with a machine that can be read ({error}), and none of those that come "
                f"with megatrain-io: {', '.join(known)}"
            ) from error
    try:
        content = yaml.safe_load(text)
    except NOT_YAML as error:
        raise ConfigError(f"{source}: not YAML: {yaml_problem(error)}") from error
    try:
        return Hardware.model_validate(content)
    except ValidationError as error:
        problems = [
            f"{'.'.join(map(str, each['loc'])) or 'the whole'}: {each['msg']}"
            for each in error.errors(include_url=False)
        ]
        raise ConfigError("\n  ".join([f"{source}: {len(problems)} problem(s)", *problems])) from error
