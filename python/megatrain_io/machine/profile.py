"""The figures that ``megatrain-io bench`` measured, as a file: one machine, and each drive that was measured."""

import os
from datetime import datetime
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from megatrain_io.errors import ConfigError, StorageError
from megatrain_io.files import SETTINGS_BYTES_MAX, make_folder, read_file, replace_file

__all__ = [
    "CpuProfile",
    "DriveProfile",
    "FlushProfile",
    "Machine",
    "MatmulProfile",
    "Profile",
    "Rate",
    "Sustained",
    "default_path",
]


Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Rate(_Model):
    """A rate over several windows of about a second.

    Attributes:
        gb_per_s: median, 10^9 bytes, read and written together.
        least: the slowest window, GB/s.
        most: the fastest window, GB/s.
        cpu_s_per_gb: CPU seconds for each GB, over all windows.
        nbytes: moved in all windows.
    """

    gb_per_s: Positive
    least: NotNegative
    most: Positive
    cpu_s_per_gb: NotNegative
    nbytes: Annotated[int, Field(ge=0)]


class FlushProfile(_Model):
    """NotNegative until writes are on stable storage.

    Attributes:
        count: number of flushes of each kind.
        sync_median: ``fdatasync`` after 4 MiB were written, median.
        sync_p99: the same, 99th percentile.
        durable_write_median: a 4 KiB write that is durable by itself, median.
        durable_write_p99: the same, 99th percentile.
    """

    count: int
    sync_median: NotNegative
    sync_p99: NotNegative
    durable_write_median: NotNegative
    durable_write_p99: NotNegative


class Sustained(_Model):
    """Rates of writing for long, until the drive's cache is full.

    Attributes:
        before_gb_per_s: until the knee, or throughout.
        after_gb_per_s: from the knee on, or throughout.
        knee_bytes: bytes written when the rate fell; None when it did not.
        nbytes: bytes written in all.
        seconds: time that was spent writing.
        ended: why it stopped: ``steady`` after a knee, or at the limit of ``size`` or ``time``.
    """

    before_gb_per_s: Positive
    after_gb_per_s: Positive
    knee_bytes: int | None
    nbytes: int
    seconds: NotNegative
    ended: Literal["steady", "size", "time"]


class DriveProfile(_Model):
    """The figures of one drive; ``mount_point`` and ``source`` name it.

    Attributes:
        is_direct: whether transfers bypass the page cache.
        registration_refused: why the engine could not register its memory, which costs CPU time; else None.
        mixed: 14 bytes read for 12 written, in the extents of training.
        sustained: rates of writing for long; None when that was not asked for.
    """

    mount_point: str
    source: str
    file_system: str
    model: str | None
    measured_at: datetime
    engine: Literal["uring", "threads"]
    is_direct: bool
    registration_refused: str | None
    read: Rate
    write: Rate
    mixed: Rate
    flush: FlushProfile
    sustained: Sustained | None


class CpuProfile(_Model):
    """What runs on the CPU, on all cores.

    Attributes:
        memory_copy: bytes read and bytes written, both counted.
        checksum: bytes checked.
        adamw_f32: parameters per second, with fp32 weights.
        adamw_split: parameters per second, with weights split into bf16 and remainder.
        kernel: name of the AdamW kernel that ran.
    """

    memory_copy: Rate
    checksum: Rate
    adamw_f32: Positive
    adamw_split: Positive
    kernel: str


class MatmulProfile(_Model):
    """Square matrix products [size, size], in GFLOP/s by dtype."""

    device: str
    bf16: Positive
    fp32: Positive
    size: int


class Machine(_Model):
    """The machine that the figures were measured on; ``ram_bytes`` is all of its RAM."""

    host: str
    cpu: str | None
    threads: int
    kernel: str
    ram_bytes: int


class Profile(_Model):
    """The content of a profile file: the figures of one machine and of its drives."""

    schema_version: Literal[1] = 1
    machine: Machine
    cpu: CpuProfile
    matmul: MatmulProfile | None
    drives: list[DriveProfile]

    def drive(self, mount_point: str, source: str) -> DriveProfile | None:
        """The figures of the drive with this mount point and source; None where it was not measured."""
        places = ((each.mount_point, each.source) for each in self.drives)
        return next(
            (d for d, place in zip(self.drives, places, strict=True) if place == (mount_point, source)), None
        )

    def joined_to(self, older: Self | None) -> Self:
        """This profile, with the drives that only an older one of the same machine has."""
        if older is None or older.machine.host != self.machine.host or older.machine.cpu != self.machine.cpu:
            return self
        kept = [each for each in older.drives if self.drive(each.mount_point, each.source) is None]
        return self.model_copy(update={"drives": [*kept, *self.drives]})

    @classmethod
    def read(cls, path: Path) -> "Profile | None":
        """The profile in a file, or None when there is no such file.

        Raises:
            ConfigError: it is no profile that this version reads.
            StorageError: it cannot be read.
        """
        try:
            return Profile.model_validate_json(read_file(path, SETTINGS_BYTES_MAX))
        except FileNotFoundError:
            return None
        except (ValidationError, UnicodeDecodeError) as error:
            what = str(error).splitlines()[0]
            raise ConfigError(
                f"{path} is no profile that this version reads ({what}). Measure anew: megatrain-io bench"
            ) from error
        except OSError as error:
            raise StorageError(f"{path} cannot be read: {error.strerror}") from error

    @staticmethod
    def check_writable(path: Path) -> None:
        """Make the folder of the file, and find out before measuring whether the file can be written.

        Raises:
            StorageError: it cannot.
        """
        try:
            make_folder(path.parent)
        except OSError as error:
            raise StorageError(f"{path} cannot be written: {error.strerror}") from error
        if path.is_dir() or not os.access(path.parent, os.W_OK):
            raise StorageError(f"{path} cannot be written: name another file with --output")

    def write(self, path: Path) -> None:
        """Replace the file; whoever reads it meanwhile finds the old or the new one.

        Raises:
            StorageError: it cannot be written.
        """
        try:
            make_folder(path.parent)
            replace_file(path, self.model_dump_json(indent=2) + "\n")
        except OSError as error:
            raise StorageError(f"{path} cannot be written: {error.strerror}") from error


def default_path() -> Path:
    """Path of the profile of this machine, where no other is given."""
    import typer

    return Path(typer.get_app_dir("megatrain-io")) / "profile.json"
