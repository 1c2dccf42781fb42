"""Seconds of an optimizer step: torch in RAM, DeepSpeed from NVMe, ours from NVMe and from RAM, and the bound.

    python -m benches.step.train_step --sizes 171M,325M,1.3B --micro-batches 1,4 --rounds 5 --folder /nvme

Each contender is a process of its own, started anew in each round, and they take turns; a store of ours is made before
its contender and removed after it. A round's figure is the median of its steps but the first; of bytes and CPU seconds
it is their mean. A contender that seldom commits shows the steps between two commits. What is still to be written when
the last step ends is waited for outside of the steps (``durable_seconds`` in the JSON).

The bound (``bound.py``) is made of fio's rates and of torch's forward and backward seconds, of the same round.
"""

import argparse
import json
import math
import os
import shutil
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil

from benches.harness.comparison import MIB, SkippedError, child, in_turn, machine, machine_text, shown, tell
from benches.io.compare import goal_of
from benches.io.contenders import fio, fio_version, lay_out
from benches.step import contenders
from benches.step.bound import PHASES, bound
from benches.step.contenders import (
    CHECKPOINTED,
    COMPUTE,
    CONTENDERS,
    DEEPSPEED,
    FIO,
    ON_NVME,
    OURS,
    RESIDENT,
    SELDOM,
    SIZES,
    TOKENS,
    Contender,
)

GOAL_SIZE = "171M"
MEGA = 1e6
# Interpreter, torch, transformers and activations: what a contender needs whatever the model.
RAM_OF_ALL = 1_200_000_000
# Seconds after which DeepSpeed is taken to hang.
PEER_LIMIT = 1800.0
SHOWN_LOSSES = 4

Figures = dict[str, Any]
Rounds = list[Figures]
Results = dict[str, Rounds]
"""Of one size and number of micro-batches: contender to its rounds, each with its number as ``round``."""


# ------------------------------------------------------------------------------------------------ running


def refuse_what_does_not_fit(contender: Contender, size: str, folder: Path, budget: int = 0) -> None:
    """Rather say it than let the machine swap or the drive fill; ``budget`` is what it takes of RAM in any case.

    Raises:
        SkippedError: not enough free RAM or disk.
    """
    parameters = SIZES[size].parameters
    ram, disk = max(contender.ram * parameters, budget) + RAM_OF_ALL, contender.disk * parameters
    available, free = psutil.virtual_memory().available, shutil.disk_usage(folder).free
    for what, needed, there in (("RAM", ram, available), ("disk", disk, free)):
        if needed > there:
            raise SkippedError(f"it needs {needed / 1e9:.1f} GB of {what}, and {there / 1e9:.1f} GB are free")


def run(name: str, size: str, micro_batches: int, options: argparse.Namespace, folder: Path) -> Figures:
    """One round of one contender; its files are gone afterwards."""
    if name == FIO:
        return rates_of(folder, options.mib * MIB)
    refuse_what_does_not_fit(CONTENDERS[name], size, folder)
    place = folder / "contender"
    place.mkdir()
    job = {"contender": name, "size": size, "micro_batches": micro_batches, "steps": options.steps}
    job |= {"dtype": options.dtype, "tokens": options.tokens, "folder": str(place), "makes_store": False}
    module = contenders.__name__
    try:
        if name in OURS:
            child(module, sys.executable, [json.dumps({**job, "makes_store": True})])
        os.sync()  # what others left to be written is not this contender's
        if name != DEEPSPEED:
            return child(module, sys.executable, [json.dumps(job)])
        return deepspeed_child(module, options.peer_python, job, "cpu")
    finally:
        shutil.rmtree(place)


def deepspeed_child(module: str, python: str, job: Figures, accelerator: str) -> Figures:
    """A contender of DeepSpeed, with the interpreter that has it.

    Raises:
        SkippedError: it hangs or fails, or is not there.
    """
    path = f"{Path(python).parent}:{os.environ.get('PATH', '')}"
    environment = {"DS_ACCELERATOR": accelerator, "PATH": path}
    try:
        return child(module, python, [json.dumps(job)], environment, PEER_LIMIT)
    except SystemExit as failed:  # it can end without an exception of Python
        raise SkippedError(f"DeepSpeed fails: {str(failed.code).strip().splitlines()[-1]}") from failed


def rates_of(folder: Path, nbytes: int) -> Figures:
    """Bytes/s by fio: read, write and mixed, in the requests that training makes or the like."""
    if shutil.which("fio") is None:
        raise SkippedError("fio is not installed")
    forms = {"read": "4M qd8", "write": "4M qd8", "mixed": "extents qd8"}
    found = {kind: fio(folder, nbytes, kind, form) for kind, form in forms.items()}
    return {kind: (each["read"] + each["written"]) / each["seconds"] for kind, each in found.items()}


def measure(
    names: Sequence[str], size: str, micro_batches: int, options: argparse.Namespace, folder: Path
) -> tuple[Results, dict[str, str]]:
    """All rounds of one size and number of micro-batches, and what was skipped and why."""
    results: Results = {name: [] for name in names}
    skipped: dict[str, str] = {}
    for number, name in in_turn(names, options.rounds):
        if name in skipped:
            continue
        tell(f"{size}, {micro_batches} micro-batches, round {number + 1} of {options.rounds}: {name}")
        try:
            results[name].append({"round": number, **run(name, size, micro_batches, options, folder)})
        except SkippedError as reason:
            skipped[name] = str(reason)
            tell(f"{name} is skipped: {reason}")
    results = {name: rounds for name, rounds in results.items() if rounds}
    add_bounds(results)
    return results, skipped


# ---------------------------------------------------------------------------------------- what a run says


def later(figures: Figures, of: Callable[[Figures], float]) -> list[float]:
    """Of all steps but the first, which builds what the others find."""
    return [of(step) for step in figures["steps"][1:]]


def seconds(figures: Figures) -> float:
    """Of a step: the median of a run."""
    return statistics.median(later(figures, lambda step: step["seconds"]))


def mean(figures: Figures, name: str) -> float:
    """Of a step: bytes and the like, which move between neighbours."""
    return statistics.fmean(later(figures, lambda step: step[name]))


def part(figures: Figures, name: str) -> float:
    """Seconds of a step that went to one of its parts: the median of a run, as of its seconds."""
    return statistics.median(later(figures, lambda step: step["parts"][name]))


def losses(figures: Figures) -> list[float]:
    """Of all steps."""
    return [step["loss"] for step in figures["steps"]]


def by_round(rounds: Rounds) -> dict[int, Figures]:
    """A contender may lack a round in which it was skipped."""
    return {figures["round"]: figures for figures in rounds}


def add_bounds(results: Results) -> None:
    """Each round of ours gets its bound, where fio and torch ran in that round."""
    drive, compute = by_round(results.get(FIO, [])), by_round(results.get(COMPUTE, []))
    for name in OURS:
        for figures in results.get(name, []):
            number = figures["round"]
            if number in drive and number in compute:
                takes = {phase: part(compute[number], phase) for phase in PHASES}
                figures["bound"] = bound(figures["scheduled"], takes, drive[number])


def ratios(ours: Rounds, theirs: Rounds, of: Callable[[Figures], float] = seconds) -> list[float]:
    """Ours to theirs in the same round."""
    others = by_round(theirs)
    return [of(figures) / of(others[figures["round"]]) for figures in ours if figures["round"] in others]


def of_bound(rounds: Rounds) -> list[float]:
    """Seconds of a step, in those of the round's bound."""
    return [seconds(figures) / figures["bound"]["step"] for figures in rounds if "bound" in figures]


def same_losses(results: Results) -> bool:
    """Whether all placements of ours, in all rounds, have the same losses, bit for bit."""
    found = {tuple(losses(figures)) for name in OURS for figures in results.get(name, [])}
    return len(found) <= 1


def equal_digits(ours: Sequence[float], theirs: Sequence[float]) -> int | None:
    """Digits to which all losses agree, by their largest relative difference; None where every bit does."""
    difference = max(abs(a - b) / abs(b) for a, b in zip(ours, theirs, strict=True))
    return None if difference == 0 else max(0, math.floor(-math.log10(difference)))


# ------------------------------------------------------------------------------------------ tables and goals


def table(results: Results, tokens: int) -> Iterator[str]:
    """One line a contender; a step has so many tokens."""
    yield (
        "| contender | s a step | of the bound | tokens/s | MB read | MB written | CPU s | peak RSS MB | "
        "pool and all else of ours, MB | seconds in |"
    )
    yield "|---|---|---|---|---|---|---|---|---|---|"
    for name, rounds in results.items():
        if name == FIO:
            continue
        pace = shown([tokens / seconds(each) for each in rounds], 0)
        held = of_bound(rounds)
        ledger = [each["ledger_peak"] / MEGA for each in rounds if "ledger_peak" in each]
        cells = [
            name,
            shown([seconds(each) for each in rounds], 3),
            shown(held) if held else "",
            pace,
            *(shown([mean(each, what) / MEGA for each in rounds], 0) for what in ("read", "written")),
            shown([mean(each, "cpu_seconds") for each in rounds]),
            shown([each["peak_rss"] / MEGA for each in rounds], 0),
            shown(ledger, 0) if ledger else "",
            ", ".join(_parts(rounds)),
        ]
        yield f"| {' | '.join(cells)} |"


def _parts(rounds: Rounds) -> Iterator[str]:
    for name in rounds[0]["steps"][0]["parts"]:
        yield f"{name.replace('_', ' ')} {statistics.median(part(each, name) for each in rounds):.3f}"


def bound_lines(results: Results) -> Iterator[str]:
    """What the bounds were made of."""
    if FIO in results:
        rates = (
            f"{kind} {shown([each[kind] / 1e9 for each in results[FIO]])}"
            for kind in ("read", "mixed", "write")
        )
        yield f"fio, GB/s: {', '.join(rates)}"
    for name in OURS:
        bounds = [each["bound"] for each in results.get(name, []) if "bound" in each]
        if bounds:
            phases = (f"{phase} {shown([each[phase] for each in bounds], 3)}" for phase in (*PHASES, "step"))
            yield f"bound of {name}, s: {', '.join(phases)}"


def loss_lines(results: Results) -> Iterator[str]:
    """The first losses of each contender, and how far they agree."""
    for name, rounds in results.items():
        if name not in (FIO, COMPUTE):
            first = " ".join(f"{loss:.6f}" for loss in losses(rounds[0])[:SHOWN_LOSSES])
            yield f"losses of {name}: {first}"
    mine = next((results[name] for name in OURS if name in results), None)
    if mine is None:
        return
    yield f"losses of all placements of megatrain-io equal bit for bit: {'yes' if same_losses(results) else 'NO'}"
    if CHECKPOINTED in results:
        ours, theirs = losses(mine[0]), losses(results[CHECKPOINTED][0])
        digits = equal_digits(ours, theirs)
        yield (
            f"with those of {CHECKPOINTED}, over {len(ours)} steps: equal "
            f"{'in every bit' if digits is None else f'to {digits} digits'} "
            "(torch rounds ties to even, ours away from zero)"
        )


def goals(found: Mapping[tuple[str, int], Results]) -> list[dict[str, Any]]:
    """Each goal with the figure that decides it: medians of ratios within a round."""
    one, four = found.get((GOAL_SIZE, 1), {}), found.get((GOAL_SIZE, 4), {})
    of = lambda results, name: results.get(name, [])  # noqa: E731
    middle = lambda values: statistics.median(values) if values else None  # noqa: E731
    moved = lambda figures: mean(figures, "read") + mean(figures, "written")  # noqa: E731
    seldom, changed = RESIDENT + SELDOM, middle(ratios(of(four, ON_NVME), of(one, ON_NVME), moved))
    rows = [
        ("all on NVMe, of the bound", middle(of_bound(of(one, ON_NVME))), 1.15),
        (f"all on NVMe, of {DEEPSPEED}", middle(ratios(of(one, ON_NVME), of(one, DEEPSPEED))), 0.4),
        (
            f"all resident{SELDOM}, of {CHECKPOINTED}",
            middle(ratios(of(one, seldom), of(one, CHECKPOINTED))),
            1.05,
        ),
        (
            "all on NVMe, 4 micro-batches: change of the bytes a step",
            None if changed is None else abs(changed - 1),
            0.01,
        ),
        (
            f"all on NVMe, 4 micro-batches: time a token, of {CHECKPOINTED}",
            middle(ratios(of(four, ON_NVME), of(four, CHECKPOINTED))),
            1.1,
        ),
    ]
    return [goal_of(f"{GOAL_SIZE}: {goal}", value, limit, at_least=False) for goal, value, limit in rows]


def report(
    found: Mapping[tuple[str, int], Results],
    skipped: Mapping[tuple[str, int], Mapping[str, str]],
    reached: Sequence[Mapping[str, Any]],
    options: argparse.Namespace,
) -> None:
    """A table for each size and number of micro-batches, then the goals."""
    for (size, micro_batches), results in found.items():
        print(
            f"\n{size}: {SIZES[size].parameters:,} parameters, {options.dtype}, {micro_batches} micro-batch(es) of "
            f"{options.tokens}\n"
        )
        print("\n".join(table(results, micro_batches * options.tokens)))
        for line in (*bound_lines(results), *loss_lines(results)):
            print(f"\n{line}")
        for name, reason in skipped[size, micro_batches].items():
            print(f"\n{name} was skipped: {reason}")
    print("\n| goal | bound | found | |\n|---|---|---|---|")
    for each in reached:
        value = "not measured" if each["value"] is None else f"{each['value']:.3f}"
        verdict = {True: "pass", False: "FAIL", None: ""}[each["met"]]
        print(f"| {each['goal']} | {each['bound']:.3f} | {value} | {verdict} |")


def words_of(text: str) -> list[str]:
    """Of an option that takes several, with commas between."""
    return [word.strip() for word in text.split(",") if word.strip()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--sizes", type=words_of, default=[GOAL_SIZE], help=f"of {','.join(SIZES)}")
    parser.add_argument("--micro-batches", type=words_of, default=["1"], help="numbers, with commas between")
    parser.add_argument("--dtype", choices=["bf16", "f32"], default="bf16")
    parser.add_argument("--tokens", type=int, default=TOKENS, help=f"of a micro-batch; at most {TOKENS}")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=6, help="of a run; at least 4, the first is not counted")
    parser.add_argument("--mib", type=int, default=1024, help="of fio's file")
    parser.add_argument("--folder", type=Path, default=Path(), help="on the drive to measure")
    parser.add_argument(
        "--only", type=words_of, default=[], help="contenders whose names hold one of these words"
    )
    parser.add_argument("--peer-python", default=sys.executable, help="interpreter that has deepspeed")
    parser.add_argument("--json", type=Path, metavar="FILE", help="every figure of every step")
    options = parser.parse_args()
    unknown = [size for size in options.sizes if size not in SIZES]
    if unknown or options.steps < 4:
        parser.error(f"sizes are {', '.join(SIZES)}" if unknown else "--steps must be 4 at least")
    names = [
        name for name in (FIO, *CONTENDERS) if not options.only or any(word in name for word in options.only)
    ]
    facts = machine(options.folder, options.peer_python)
    facts["versions"]["fio"] = fio_version()
    found: dict[tuple[str, int], Results] = {}
    skipped: dict[tuple[str, int], dict[str, str]] = {}
    folder = Path(tempfile.mkdtemp(dir=options.folder, prefix="train-step-")).absolute()
    try:
        if FIO in names:
            lay_out(folder / "fio.dat", options.mib * MIB)
        for size in options.sizes:
            for micro_batches in map(int, options.micro_batches):
                key = size, micro_batches
                found[key], skipped[key] = measure(names, size, micro_batches, options, folder)
    finally:
        shutil.rmtree(folder)
    reached = goals(found)
    print(
        f"{machine_text(facts)}\n{options.rounds} rounds of {options.steps} steps; medians (least to most) of rounds"
    )
    report(found, skipped, reached, options)
    if options.json is not None:
        kept = ("dtype", "tokens", "rounds", "steps", "mib", "only")
        plain = {name: getattr(options, name) for name in kept}
        runs = [
            {
                "size": size,
                "parameters": SIZES[size].parameters,
                "micro_batches": micro_batches,
                "results": results,
                "skipped": skipped[size, micro_batches],
            }
            for (size, micro_batches), results in found.items()
        ]
        everything = {"machine": facts, "options": plain, "runs": runs, "goals": reached}
        options.json.write_text(json.dumps(everything, indent=1) + "\n", encoding="utf-8")
    if not all(same_losses(results) for results in found.values()):
        sys.exit("the losses of megatrain-io differ between placements")


if __name__ == "__main__":
    main()
