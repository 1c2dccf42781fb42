"""What the comparisons share: facts about the machine, contenders in processes of their own, rounds, medians."""

import json
import os
import platform
import signal
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
MIB = 1 << 20
_PACKAGES = ("megatrain-io", "torch", "transformers", "numpy", "safetensors")


class SkippedError(Exception):
    """A contender that cannot be measured here, with the reason as a sentence."""


def machine(folder: Path, peer_python: str) -> dict[str, Any]:
    """CPU, kernel, drive, file system, huge pages and versions; that of deepspeed is the peers' interpreter's."""
    from megatrain_io.machine import doctor

    found = doctor.examine(folder)
    drive = {name: value for name, value in found["drive"].items() if name != "path"}
    return {
        "cpu": found["cpu"],
        "ram_bytes": found["memory"]["total"],
        "kernel": platform.release(),
        "system": found["system"],
        "drive": drive,
        "uring": found["uring"],
        "transparent_huge_pages": found["transparent_huge_pages"],
        "load": os.getloadavg(),
        "adamw_kernels": found["megatrain_io"].get("adamw_kernels"),
        "versions": {
            "python": platform.python_version(),
            **{name: _version(name) for name in _PACKAGES},
            "deepspeed": _peer_version(peer_python),
        },
    }


def _peer_version(python: str) -> str | None:
    code = "from importlib.metadata import version; print(version('deepspeed'))"
    done = subprocess.run([python, "-c", code], capture_output=True, text=True, check=False)
    return done.stdout.strip() or None


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def machine_text(facts: Mapping[str, Any]) -> str:
    """The machine in a line or two, for above a table."""
    cpu, drive = facts["cpu"], facts["drive"]
    place = f"{drive.get('file_system')} on {drive.get('model') or drive.get('source')}"
    numbers = ", ".join(f"{name} {number}" for name, number in facts["versions"].items() if number)
    return (
        f"{cpu['model']}, {cpu['threads']} threads, {facts['ram_bytes'] / 2**30:.0f} GiB, Linux {facts['kernel']}, "
        f"{place}, huge pages {facts['transparent_huge_pages']}, load {facts['load'][0]:.1f} at the start\n{numbers}"
    )


def child(
    module: str,
    python: str,
    arguments: Sequence[str],
    environment: Mapping[str, str] | None = None,
    limit: float | None = None,
) -> Any:
    """Run a contender, ``benches.ROOM.MODULE``, in a process of its own; what it printed last, read as JSON.

    Raises:
        SkippedError: it said why it cannot be measured here, or did not end within ``limit`` seconds.
        SystemExit: it failed.
    """
    command = [python, "-m", module, "--child", *arguments]
    variables = {**os.environ, **(environment or {})}
    # The current folder may be another one.
    variables["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), variables.get("PYTHONPATH")]))
    try:
        done = subprocess.run(
            command,
            env=variables,
            capture_output=True,
            text=True,
            check=False,
            timeout=limit,
        )
    except subprocess.TimeoutExpired as error:
        raise SkippedError(f"it did not end within {limit:.0f} seconds") from error
    lines = done.stdout.splitlines()
    if done.returncode != 0 or not lines:
        ended = f"\nended by {signal.Signals(-done.returncode).name}" if done.returncode < 0 else ""
        sys.exit(f"{' '.join(command)} failed:\n{done.stderr[-4000:]}{ended}")
    said = json.loads(lines[-1])
    if "skipped" in said:
        raise SkippedError(said["skipped"])
    return said


def answer(work: Callable[[], Any]) -> None:
    """What a child does: print the result, or why there is none."""
    try:
        said = work()
    except SkippedError as reason:
        said = {"skipped": str(reason)}
    print(json.dumps(said))


def in_turn(names: Sequence[str], rounds: int) -> Iterator[tuple[int, str]]:
    """``(round, name)``: another one goes first each time, so that a drift of the machine is nobody's."""
    for number in range(rounds):
        at = number % len(names)
        for name in [*names[at:], *names[:at]]:
            yield number, name


def shown(values: Sequence[float], digits: int = 2) -> str:
    """Median, least and most."""
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def tell(*words: object) -> None:
    """Progress goes to standard error: standard output is for tables."""
    print(*words, file=sys.stderr, flush=True)
