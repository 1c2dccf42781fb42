"""Bytes to and from a drive, side by side: fio, DeepNVMe, the usual ways of Python, and megatrain-io.

    python -m benches.io.compare --rounds 5 --mib 1024 --folder /nvme

Each contender is a process of its own, started anew in each round (whether large buffers come to lie well is drawn once
a process), and they take turns. Only the transfers are timed, not starts and checks; what was read is compared once a
round. CPU seconds are those of the process; the kernel's own threads, which write the page cache back, are nobody's.
fio asks for the CPU time of its one thread (RUSAGE_THREAD): the workers of io_uring, which take large requests over
when the drive's queue is full, are missing from its figure, which is a lower bound therefore. What goes through the
page cache is timed with its fsync.

``mixed`` is 14 bytes read for 12 written. A contender named ``extents`` moves 4 and 20 MiB, as training does.
"""

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benches.harness.comparison import SkippedError, in_turn, machine, machine_text, shown, tell
from benches.io.contenders import CONTENDERS, KINDS, MIB, Figures, fio_version, lay_out, run

Results = dict[str, list[Figures]]


def rates(rounds: list[Figures], kind: str) -> list[float]:
    """GB/s of each round, read and written together."""
    runs = [figures[kind] for figures in rounds if kind in figures]
    return [(run["read"] + run["written"]) / 1e9 / run["seconds"] for run in runs]


def costs(rounds: list[Figures], kind: str) -> list[float]:
    """CPU seconds for each GB of each round."""
    runs = [figures[kind] for figures in rounds if kind in figures]
    return [run["cpu_seconds"] / ((run["read"] + run["written"]) / 1e9) for run in runs]


def best(results: Results, group: str, kind: str) -> str | None:
    """The contender of a group with the highest median."""
    names = [name for name in results if CONTENDERS[name][0] == group and rates(results[name], kind)]
    return max(names, key=lambda name: statistics.median(rates(results[name], kind)), default=None)


def table(results: Results, kind: str) -> Iterator[str]:
    """One line a contender."""
    yield f"\n| {kind} | GB/s | of fio's best with registered buffers | CPU s/GB |"
    yield "|---|---|---|---|"
    ceiling = best(results, "fio", kind)
    for name, rounds in results.items():
        if found := rates(rounds, kind):
            share = ""
            if ceiling is not None:
                top = statistics.median(rates(results[ceiling], kind))
                share = f"{100 * statistics.median(found) / top:.0f} %"
            yield f"| {name} | {shown(found)} | {share} | {shown(costs(rounds, kind), 3)} |"


def goals(results: Results) -> list[dict[str, Any]]:
    """Each goal with the figures that decide it; ``met`` is None where a side was not measured."""
    found = []
    for kind in KINDS:
        for group in ("uring", "TensorStore uring"):
            goal = f"{kind}: {group} at least 95 % of fio's best"
            found.append(goal_of(goal, _share(results, group, "fio", kind), 0.95))
            goal = f"{kind}: {group} above DeepNVMe in every round"
            found.append(goal_of(goal, _worst(results, group, kind), 1.0))
            others = group.replace("uring", "threads")
            goal = f"{kind}: {others} at least 90 % of {group}"
            found.append(goal_of(goal, _share(results, others, group, kind), 0.90))
            words = "" if group == "uring" else " + checksums"
            goal = f"{kind}: CPU s/GB of {group} within 1.2 x fio's{words}"
            found.append(goal_of(goal, *cpu_and_bound(results, group, kind), at_least=False))
    return found


def goal_of(goal: str, value: float | None, bound: float, *, at_least: bool = True) -> dict[str, Any]:
    """A goal, what was found and whether that is enough."""
    is_met = None if value is None else (value >= bound if at_least else value <= bound)
    return {"goal": goal, "value": value, "bound": bound, "met": is_met}


def _share(results: Results, of: str, to: str, kind: str) -> float | None:
    """Ratio of the medians of two groups' fastest contenders."""
    ours, theirs = best(results, of, kind), best(results, to, kind)
    if ours is None or theirs is None:
        return None
    return statistics.median(rates(results[ours], kind)) / statistics.median(rates(results[theirs], kind))


def cpu_and_bound(results: Results, group: str, kind: str) -> tuple[float | None, float]:
    """CPU seconds a GB of a group's fastest contender, and what fio allows it; checksums where it takes them.

    The same requests where fio had them too (half as many in flight cost more CPU); else its fastest contender.
    """
    ours, theirs = best(results, group, kind), best(results, "fio", kind)
    if ours is not None and (alike := ours.replace(group, "fio", 1)) in results:
        theirs = alike
    bound = 0.0 if theirs is None else 1.2 * statistics.median(costs(results[theirs], kind))
    sums = costs(results.get("checksums alone", []), "checksum")
    takes_sums = group.startswith("TensorStore")
    if takes_sums and sums:
        bound += statistics.median(sums)
    if ours is None or theirs is None or (takes_sums and not sums):
        return None, bound
    return statistics.median(costs(results[ours], kind)), bound


def _worst(results: Results, group: str, kind: str) -> float | None:
    """The least ratio to the fastest DeepNVMe contender of the same round."""
    ours = best(results, group, kind)
    theirs = [rates(r, kind) for name, r in results.items() if CONTENDERS[name][0] == "DeepNVMe"]
    theirs = [each for each in theirs if each]
    if ours is None or not theirs:
        return None
    return min(
        rate / max(others)
        for rate, others in zip(rates(results[ours], kind), zip(*theirs, strict=True), strict=True)
    )


def report(
    options: argparse.Namespace,
    facts: dict[str, Any],
    results: Results,
    reached: list[dict[str, Any]],
    skipped: dict[str, str],
) -> None:
    """The machine, a table for each kind, the goals, and what was skipped and why."""
    print(
        f"{machine_text(facts)}\n{options.mib} MiB a transfer, {options.rounds} rounds; medians (least to most)"
    )
    for kind in (*KINDS, "checksum"):
        lines = list(table(results, kind))
        if len(lines) > 2:
            print("\n".join(lines))
    print("\n| goal | bound | found | |\n|---|---|---|---|")
    for each in reached:
        value = "not measured" if each["value"] is None else f"{each['value']:.3f}"
        verdict = {True: "pass", False: "FAIL", None: ""}[each["met"]]
        print(f"| {each['goal']} | {each['bound']:.3f} | {value} | {verdict} |")
    for name, reason in skipped.items():
        print(f"\n{name} was skipped: {reason}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--mib", type=int, default=1024, help="of each transfer; a multiple of 48 is best")
    parser.add_argument("--folder", type=Path, default=Path(), help="on the drive to measure")
    parser.add_argument(
        "--only", default="", help="contenders whose names hold one of these words: fio,uring,DeepNVMe"
    )
    parser.add_argument("--peer-python", default=sys.executable, help="interpreter that has deepspeed")
    parser.add_argument("--json", type=Path, metavar="FILE", help="every figure of every round")
    options = parser.parse_args()
    words = [word.strip() for word in options.only.split(",") if word.strip()]
    names = [name for name in CONTENDERS if not words or any(word in name for word in words)]
    facts = machine(options.folder, options.peer_python)
    facts["versions"]["fio"] = fio_version()
    if not os.access("/proc/sys/vm/drop_caches", os.W_OK):
        tell("the page cache is dropped file by file only, as this is not root")
    results: Results = {name: [] for name in names}
    skipped: dict[str, str] = {}
    folder = Path(tempfile.mkdtemp(dir=options.folder, prefix="compare-io-"))
    try:
        if any(CONTENDERS[name][0] == "fio" for name in names):
            lay_out(folder / "fio.dat", options.mib * MIB)
        for number, name in in_turn(names, options.rounds):
            if name in skipped:
                continue
            tell(f"round {number + 1} of {options.rounds}: {name}")
            try:
                results[name].append(run(name, options, folder))
            except SkippedError as reason:
                skipped[name] = str(reason)
                tell(f"{name} is skipped: {reason}")
            for path in folder.iterdir():
                if path.name != "fio.dat":
                    path.unlink()
    finally:
        shutil.rmtree(folder)
    results = {name: rounds for name, rounds in results.items() if rounds}
    reached = goals(results)
    report(options, facts, results, reached, skipped)
    if options.json is not None:
        plain = {"rounds": options.rounds, "mib": options.mib, "only": words}
        everything = {
            "machine": facts,
            "options": plain,
            "results": results,
            "skipped": skipped,
            "goals": reached,
        }
        options.json.write_text(json.dumps(everything, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
