"""What durability, checksums and several drives cost, side by side: python -m benches.io.durability [--folder DIR...].

Seven forms of the same training run one after another, round after round: durability ``step``, with
``commit_every`` 10, ``scratch``, ``step`` and ``scratch`` built without checksums, and ``step`` in stores of
two and three files, which lie in the folders given, in turn. Forward and backward
cost nothing here, so the drive and the update decide. Prints a table of medians (least to most).
"""

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
# name: (built with checksums, durability, commit_every, drives)
FORMS = {
    "step": (True, "step", 1, 1),
    "step, commit_every 10": (True, "step", 10, 1),
    "scratch": (True, "scratch", 1, 1),
    "step, no checksums": (False, "step", 1, 1),
    "scratch, no checksums": (False, "scratch", 1, 1),
    "step, 2 drives": (True, "step", 1, 2),
    "step, 3 drives": (True, "step", 1, 3),
}


def build(*, checksums: bool) -> Path:
    """The benchmark's program; the one without checksums has a folder of its own."""
    command = ["cargo", "bench", "--no-run", "--bench", "durability", "--message-format", "json"]
    environment = dict(os.environ)
    if not checksums:
        environment["RUSTFLAGS"] = f"{environment.get('RUSTFLAGS', '')} --cfg bench_without_checksums"
        command += ["--target-dir", str(ROOT / "target" / "no-checksums")]
    said = subprocess.run(
        command, cwd=ROOT, env=environment, check=True, stdout=subprocess.PIPE, text=True
    ).stdout
    messages = [json.loads(line) for line in said.splitlines()]
    return next(Path(m["executable"]) for m in messages if m.get("executable"))


def measure(program: Path, *arguments: str) -> dict[str, float]:
    """Run the program; its figures, and the CPU seconds that it took from start to end."""
    process = subprocess.Popen([program, *arguments], stdout=subprocess.PIPE, text=True)
    said = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.stdout.close()
    if status != 0:
        sys.exit(f"{program} {arguments} failed")
    return json.loads(said) | {"cpu": usage.ru_utime + usage.ru_stime}


def places(folders: list[Path], checksums: bool, drives: int) -> str:  # noqa: FBT001 - a form has no names
    """Folders for the files of one store, as the program takes them."""
    chosen = [folders[drive % len(folders)] / str(checksums) for drive in range(drives)]
    for folder in chosen:
        folder.mkdir(exist_ok=True)
    return ":".join(map(str, chosen))


def shown(values: list[float]) -> str:
    return f"{statistics.median(values):.3f} ({min(values):.3f} to {max(values):.3f})"


def main() -> None:
    parser = argparse.ArgumentParser(description="What durability and checksums cost.")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--parameters", type=int, default=32 << 20)
    parser.add_argument(
        "--folder", type=Path, nargs="+", default=[ROOT / "target"], help="on the drives to measure"
    )
    options = parser.parse_args()
    programs = {checksums: build(checksums=checksums) for checksums in (True, False)}
    folders = [Path(tempfile.mkdtemp(dir=folder, prefix="durability-")) for folder in options.folder]
    figures: dict[str, list[dict[str, float]]] = {name: [] for name in FORMS}
    try:
        for checksums, durability, drives in sorted({(form[0], form[1], form[3]) for form in FORMS.values()}):
            place = places(folders, checksums, drives)
            command = [programs[checksums], "make", place, durability, str(options.parameters)]
            subprocess.run(command, check=True)
        names = list(FORMS)
        for number in range(options.rounds):
            # Another one goes first each time, so that a drift of the drive is nobody's.
            for name in names[number % len(names) :] + names[: number % len(names)]:
                checksums, durability, every, drives = FORMS[name]
                place = places(folders, checksums, drives)
                arguments = ("run", place, durability, str(options.steps), str(every))
                figures[name].append(measure(programs[checksums], *arguments))
    finally:
        for folder in folders:
            shutil.rmtree(folder)

    moved = sum(figures["step"][0][name] for name in ("read", "written")) / 1e9
    print(f"{options.parameters:,} parameters, {options.steps} steps, {moved:.1f} GB moved a run, "
          f"{options.rounds} rounds; {platform.processor() or platform.machine()}, {os.cpu_count()} CPUs")  # fmt: skip
    print("| form | seconds | CPU seconds | seconds, relative to scratch in the same round |")
    print("|---|---|---|---|")
    for name, runs in figures.items():
        ratios = [
            run["seconds"] / base["seconds"] for run, base in zip(runs, figures["scratch"], strict=True)
        ]
        print(f"| {name} | {shown([r['seconds'] for r in runs])} | {shown([r['cpu'] for r in runs])} | "
              f"{shown(ratios)} |")  # fmt: skip
    pairs = list(zip(figures["step"], figures["step, no checksums"], strict=True))
    wall = [with_["seconds"] / without["seconds"] for with_, without in pairs]
    cpu = [(with_["cpu"] - without["cpu"]) / moved for with_, without in pairs]
    print(f"checksums: {shown(wall)} of the time without; {shown(cpu)} core-seconds a GB")


if __name__ == "__main__":
    main()
