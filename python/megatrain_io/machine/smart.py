"""What a drive says of its own wear, asked of ``smartctl`` where that is installed and allowed."""

import json
import re
import shutil
import subprocess
from contextlib import suppress
from dataclasses import dataclass

__all__ = ["Smart", "parse_smart", "read_smart"]

_DATA_UNIT_NBYTES = 512_000  # NVM Express Base Specification: "in thousands of 512 byte units"
_SECONDS = 10


@dataclass(frozen=True)
class Smart:
    """The wear of one NVMe drive.

    Attributes:
        written_tb: written by the host in the drive's life, in TB (10^12 bytes).
        used: share of its life that the drive says is used; above 1 it goes on all the same.
    """

    written_tb: float
    used: float | None


def parse_smart(text: str) -> Smart | None:
    """The wear that ``smartctl --json --attributes`` printed; None where that is of no NVMe drive."""
    with suppress(ValueError, KeyError, TypeError, AttributeError):
        log = json.loads(text)["nvme_smart_health_information_log"]
        used = log.get("percentage_used")
        written = log["data_units_written"] * _DATA_UNIT_NBYTES / 1e12
        return Smart(written, None if used is None else used / 100)
    return None


def read_smart(source: str | None) -> Smart | None:
    """Ask the drive of ``source``, a device such as ``/dev/nvme0n1p2``, for its wear; None where it gives none."""
    program = shutil.which("smartctl")
    if program is None or source is None or not source.startswith("/dev/"):
        return None
    device = re.sub(r"(?<=nvme)(\d+n\d+)p\d+$", r"\1", source)
    with suppress(OSError, subprocess.SubprocessError):
        found = subprocess.run(  # noqa: S603 - a program of the system, and a device of a mount
            [program, "--json", "--attributes", device],
            capture_output=True,
            text=True,
            timeout=_SECONDS,
            check=False,
        )
        return parse_smart(found.stdout)
    return None
