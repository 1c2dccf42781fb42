"""Install the wheel in fresh environments without Rust, as a person would, and use it there.

    python tests/wheel/install.py dist [PYTHON ...]

On each Python from 3.11 on that is found (or is named): a venv, pip, then `doctor`, `plan`, `train`, `verify` and
`export` of a tiny random model, from an otherwise empty folder and with no compiler on PATH. torch alone downloads
3 GB, and 8 GB of the folder for temporary files are taken; environments come one after the other.
"""

import hashlib
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

FIRST = (3, 11)
STEPS = 6
TINY_MODEL = Path(__file__).with_name("tiny_model.py")
VERSION = "import sys, venv, ensurepip; print(*sys.version_info[:3], sys.implementation.name)"


class BrokenError(Exception):
    """Something did not work; the message says what."""


def version_of(python: str) -> tuple[int, int, int] | None:
    """Of a CPython that can make a venv; None for anything else."""
    try:
        done = subprocess.run([python, "-c", VERSION], check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    *numbers, name = done.stdout.split()
    major, minor, micro = map(int, numbers)
    return (major, minor, micro) if name == "cpython" else None


def pythons() -> list[str]:
    """The newest of each minor version, on PATH and of pyenv."""
    on_path = [f"python3.{minor}" for minor in range(FIRST[1], 30)] + ["python3"]
    of_pyenv = sorted((Path.home() / ".pyenv/versions").glob("3.*/bin/python3"))
    found: dict[tuple[int, int], tuple[int, str]] = {}
    for python in [*filter(None, map(shutil.which, on_path)), *map(str, of_pyenv)]:
        version = version_of(python)
        if version and version[:2] >= FIRST:
            found[version[:2]] = max(found.get(version[:2], (-1, "")), (version[2], python))
    return [python for _, (_, python) in sorted(found.items())]


class Environment:
    """A fresh venv in a folder, and an empty folder to work in; nothing but the venv is on PATH."""

    def __init__(self, python: str, folder: Path) -> None:
        self.bin, self.work = folder / "venv/bin", folder / "work"
        self.work.mkdir()
        subprocess.run([python, "-m", "venv", folder / "venv"], check=True)
        self._environment = {"PATH": str(self.bin), "HOME": str(self.work), "LANG": "C.UTF-8"}

    def pip(self, *arguments: str) -> None:
        """With the person's own settings and cache of pip."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
        self._run([str(self.bin / "python"), "-m", "pip", *arguments], kept | {"PATH": str(self.bin)})

    def run(self, program: str, *arguments: str) -> str:
        """What a program of the venv wrote to standard output."""
        return self._run([str(self.bin / program), *arguments], self._environment)

    def _run(self, command: list[str], environment: dict[str, str]) -> str:
        begun = time.monotonic()
        done = subprocess.run(
            command, check=False, cwd=self.work, env=environment, capture_output=True, text=True
        )
        words = " ".join([Path(command[0]).name, *(Path(word).name for word in command[1:])])
        print(f"  {words}: {time.monotonic() - begun:.0f} s", flush=True)
        if done.returncode != 0:
            raise BrokenError(f"{words} ended with {done.returncode}:\n{done.stdout}\n{done.stderr}")
        return done.stdout


def use(environment: Environment, wheel: Path) -> str:
    """Install the wheel and train with it; a checksum of the trained model."""
    environment.pip("install", "--quiet", "--only-binary", ":all:", str(wheel))
    environment.pip("check")
    environment.run("python", str(TINY_MODEL))
    doctor = environment.run("megatrain-io", "doctor")
    print("".join(f"    {line}\n" for line in doctor.splitlines()[:2]), end="")
    if "AdamW kernels" not in doctor:
        raise BrokenError(f"the extension cannot be loaded:\n{doctor}")
    plan = environment.run("megatrain-io", "plan", "model", "--config", "my.yaml", "--json")
    if not json.loads(plan)["fits"]:
        raise BrokenError(f"a model of 100,000 parameters does not fit:\n{plan}")
    environment.run("megatrain-io", "train", "--config", "my.yaml")
    metrics = (environment.work / "run/metrics.jsonl").read_text(encoding="utf-8").splitlines()
    losses = [json.loads(line)["loss"] for line in metrics]
    print(f"    losses {' '.join(f'{loss:.3f}' for loss in losses)}")
    if len(losses) != STEPS or not all(map(math.isfinite, losses)) or losses[-1] >= losses[0]:
        raise BrokenError(f"{STEPS} steps that learn were to be made")
    environment.run("megatrain-io", "verify", "run")
    environment.run("megatrain-io", "export", "run", "trained")
    return hashlib.sha256((environment.work / "trained/model.safetensors").read_bytes()).hexdigest()


def main(folder: Path, named: list[str]) -> int:
    """Use the one wheel in a folder on each Python; the exit status."""
    (wheel,) = folder.resolve().glob("*.whl")
    chosen = named or pythons()
    if not chosen:
        print("no Python from 3.11 on was found", file=sys.stderr)
        return 1
    checksums = set()
    for python in chosen:
        version = version_of(python)
        if version is None:
            print(f"{python} is no Python that can make a venv", file=sys.stderr)
            return 1
        print(f"Python {'.'.join(map(str, version))}: {python}", flush=True)
        with tempfile.TemporaryDirectory(prefix="megatrain-io-wheel-") as temporary:
            try:
                checksums.add(use(Environment(python, Path(temporary)), wheel))
            except BrokenError as broken:
                print(f"Python {'.'.join(map(str, version))}: {broken}", file=sys.stderr)
                return 1
    print(f"{len(chosen)} environments; trained models: {len(checksums)} different")
    return 0 if len(checksums) == 1 else 1


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2:]))
