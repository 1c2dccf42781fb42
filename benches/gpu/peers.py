"""A step on a GPU beside its peers: megatrain-io, torch with CPU offload, DeepSpeed ZeRO-3 with NVMe.

    python -m benches.gpu.peers --sizes 1.3B --vram 8GiB --ram 8GiB --rounds 3 --folder /nvme --peer-python PYTHON

Each contender is a process of its own, started anew in each round, and they take turns; a store of ours is made before
its contender and removed after it. The budget of VRAM holds for all. That of RAM is ours alone: the peers take what
they need, and are skipped where the machine has not so much. A round's figure is the median of its steps but the first
two; of bytes it is their mean, as the kernel counts them for the process. With ``--device cpu`` the peers run on the
CPU, and ours on a device that is made up: its times mean nothing, but all of it runs.
"""

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from benches.gpu import contenders
from benches.gpu.contenders import CONTENDERS, OURS, WARM_UP
from benches.harness.comparison import SkippedError, child, in_turn, machine, machine_text, shown, tell
from benches.step.contenders import DEEPSPEED, SIZES
from benches.step.ram_budget import size_of
from benches.step.train_step import (
    MEGA,
    SHOWN_LOSSES,
    Results,
    Rounds,
    deepspeed_child,
    equal_digits,
    ratios,
    refuse_what_does_not_fit,
    words_of,
)

Figures = dict[str, Any]


def run(name: str, size: str, options: argparse.Namespace, folder: Path) -> Figures:
    """One round of one contender; its files are gone afterwards.

    Raises:
        SkippedError: it does not fit, or fails.
    """
    from megatrain_io.paging.device.pool import CONTEXT_NBYTES

    refuse_what_does_not_fit(CONTENDERS[name], size, folder, options.ram if name == OURS else 0)
    place = folder / "contender"
    place.mkdir()
    job = {
        "contender": name,
        "size": size,
        "device": options.device,
        "tokens": options.tokens,
        "micro_batches": options.micro_batches,
        "steps": options.steps,
        "vram": options.vram,
        # The interpreter of a peer has no package of ours to ask.
        "vram_of_torch": options.vram - CONTEXT_NBYTES,
        "ram": options.ram,
        "folder": str(place),
        "makes_store": False,
    }
    module = contenders.__name__
    try:
        if name == DEEPSPEED:
            return deepspeed_child(module, options.peer_python, job, options.device)
        if name == OURS:
            child(module, sys.executable, [json.dumps({**job, "makes_store": True})])
        os.sync()  # what others left to be written is not this contender's
        return child(module, sys.executable, [json.dumps(job)])
    except SystemExit as failed:
        tell(failed.code)
        raise SkippedError(f"it fails: {str(failed.code).strip().splitlines()[-1]}") from failed
    finally:
        shutil.rmtree(place)


def measure(size: str, options: argparse.Namespace, folder: Path) -> tuple[Results, dict[str, str]]:
    """All rounds of one size, and what was skipped and why."""
    results: Results = {name: [] for name in CONTENDERS}
    skipped: dict[str, str] = {}
    for number, name in in_turn(list(CONTENDERS), options.rounds):
        if name in skipped:
            continue
        tell(f"{size}, round {number + 1} of {options.rounds}: {name}")
        try:
            results[name].append({"round": number, **run(name, size, options, folder)})
        except SkippedError as reason:
            skipped[name] = " ".join(str(reason).split())
            tell(f"{name} is skipped: {skipped[name]}")
    return {name: rounds for name, rounds in results.items() if rounds}, skipped


def seconds(figures: Figures) -> float:
    """Of a step: the median of a run."""
    return statistics.median(figures["seconds"])


def table(results: Results, tokens: int) -> Iterator[str]:
    """One line a contender; ``tokens`` are those of a step."""
    yield (
        "| contender | s a step | of ours | tokens/s | peak VRAM MB | peak RSS MB | MB read | MB written | "
        "first losses |"
    )
    yield "|---|---|---|---|---|---|---|---|---|"
    for name, rounds in results.items():
        beside = ratios(rounds, results.get(OURS, []), seconds)
        has_vram = all(each["vram_peak"] is not None for each in rounds)
        cells = [
            name,
            shown([seconds(each) for each in rounds], 3),
            shown(beside) if beside else "-",
            shown([tokens / seconds(each) for each in rounds], 0),
            of_each(rounds, "vram_peak") if has_vram else "-",
            *(of_each(rounds, what) for what in ("peak_rss", "read", "written")),
            " ".join(f"{loss:.6f}" for loss in rounds[0]["losses"][:SHOWN_LOSSES]),
        ]
        yield f"| {' | '.join(cells)} |"


def of_each(rounds: Rounds, what: str) -> str:
    """Megabytes, of all rounds."""
    return shown([each[what] / MEGA for each in rounds], 0)


def loss_lines(results: Results) -> Iterator[str]:
    """How far the losses of each contender agree with ours."""
    if OURS not in results:
        return
    mine = results[OURS][0]["losses"]
    for name, rounds in results.items():
        if name != OURS:
            digits = equal_digits(mine, rounds[0]["losses"])
            yield (
                f"losses of {name} and ours, over {len(mine)} steps: equal "
                f"{'in every bit' if digits is None else f'to {digits} digits'}"
            )


def report(size: str, results: Results, skipped: Mapping[str, str], options: argparse.Namespace) -> None:
    tokens = options.tokens * options.micro_batches
    print(
        f"\n{size}: {SIZES[size].parameters:,} parameters, bf16, {options.micro_batches} micro-batch(es) of "
        f"{options.tokens}\n"
    )
    print("\n".join(table(results, tokens)))
    for line in loss_lines(results):
        print(f"\n{line}")
    for name, reason in skipped.items():
        print(f"\n{name} was skipped: {reason}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--sizes", type=words_of, default=["1.3B"], help=f"of {','.join(SIZES)}")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="of the peers")
    parser.add_argument("--tokens", type=int, default=2048, help="of a micro-batch")
    parser.add_argument("--micro-batches", type=int, default=4)
    parser.add_argument(
        "--steps", type=int, default=5, help=f"of a run, behind {WARM_UP} that are not counted"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--vram", type=size_of, default="8GiB", help="the budget of each contender")
    parser.add_argument("--ram", type=size_of, default="8GiB", help="the budget of ours")
    parser.add_argument("--folder", type=Path, default=Path(), help="on the drive to measure")
    parser.add_argument("--peer-python", default=sys.executable, help="interpreter that has deepspeed")
    parser.add_argument("--json", type=Path, metavar="FILE", help="every figure")
    options = parser.parse_args()
    if unknown := [size for size in options.sizes if size not in SIZES]:
        parser.error(f"no size is {unknown[0]}: sizes are {', '.join(SIZES)}")
    if shutil.which(options.peer_python) is None:
        parser.error(f"--peer-python: there is no interpreter {options.peer_python}")
    if options.device == "cuda":
        import torch

        if not torch.cuda.is_available():
            parser.error("torch finds no CUDA device here; --device cpu runs all of it without one")
    facts = machine(options.folder, options.peer_python)
    found: dict[str, tuple[Results, dict[str, str]]] = {}
    folder = Path(tempfile.mkdtemp(dir=options.folder, prefix="gpu-peers-")).absolute()
    try:
        for size in options.sizes:
            found[size] = measure(size, options, folder)
    finally:
        shutil.rmtree(folder)
    print(
        f"{machine_text(facts)}\n{options.rounds} rounds of {options.steps} steps; medians (least to most) of rounds"
    )
    for size, (results, skipped) in found.items():
        report(size, results, skipped, options)
    if options.json is not None:
        runs = {
            size: {"parameters": SIZES[size].parameters, "results": results, "skipped": skipped}
            for size, (results, skipped) in found.items()
        }
        everything = {"machine": facts, "options": vars(options), "runs": runs}
        options.json.write_text(json.dumps(everything, indent=1, default=str) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
