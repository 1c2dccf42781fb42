"""What clipping by the exact norm costs: python -m benches.step.clipping --sizes 171M,325M --rounds 3 --folder DIR.

Each contender is a process of its own with a store of its own, and they take turns. Off: no limit, updates in the
backward pass. Deferred: the next step applies the gradients. Speculative: updates in the backward pass, taken
back where the norm was too large; never, in half or in all of the steps. Gradients wait in RAM, or on the drive.
All state is on NVMe.

A round's figure is the mean of its steps from the third on (in half of which some clip); ratios are to "off" of the
same round. Losses show that contenders with the same limits train the same.
"""

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benches.harness.comparison import answer, child, in_turn, machine, machine_text, shown, tell
from benches.step.contenders import (
    BETAS,
    DECAY,
    EPS,
    LEARNING_RATE,
    SIZES,
    config_of,
    make_store,
    measured,
    store_of,
    tokens_of,
)

Figures = dict[str, Any]
NEVER, ALWAYS = 1e9, 1e-9
FIRST = 2
"""Steps that are not counted: nothing waits before the first, and what is zero is not read."""


@dataclass(frozen=True)
class Contender:
    """How gradients are clipped: limits by step, in turn; the share of gradients that waits in RAM."""

    policy: str | None
    limits: tuple[float, ...] | None
    in_ram: float = 1.0


OFF = "off"
CONTENDERS = {
    OFF: Contender(None, None),
    "deferred, in RAM": Contender("deferred", (NEVER,)),
    "deferred, on the drive": Contender("deferred", (NEVER,), 0.0),
    "speculative, never clipped": Contender("speculative", (NEVER,)),
    "speculative, half clipped": Contender("speculative", (NEVER, ALWAYS)),
    "speculative, all clipped": Contender("speculative", (ALWAYS,)),
    "speculative, never clipped, on the drive": Contender("speculative", (NEVER,), 0.0),
}
GOALS = {"deferred, in RAM": 1.4, "speculative, never clipped": 1.1}


def train(job: Figures) -> Figures:
    """In the child: the steps of one contender."""
    import torch

    from megatrain_io.data.batch import MicroBatch
    from megatrain_io.models.partition import PartitionedModel
    from megatrain_io.models.probe import probe
    from megatrain_io.paging.paged_model import PagedPartition
    from megatrain_io.planning.residents import choose_gradients
    from megatrain_io.store.paged_store import AdamWStep, PagedStore, TensorSettings
    from megatrain_io.store.schedule import Residents

    contender, config = CONTENDERS[job["contender"]], config_of(SIZES[job["size"]])
    partition, store = PartitionedModel(config, torch.bfloat16, probe(config)), store_of(job)
    batches = [
        MicroBatch(ids, torch.nn.functional.pad(ids, (0, 1), value=-100)[:, 1:].contiguous())
        for ids in tokens_of(job)
    ]
    with PagedStore(store) as state:
        model = PagedPartition(
            partition,
            state,
            max_grad_norm=None if contender.limits is None else NEVER,
            policy=contender.policy,  # type: ignore[arg-type]  # a word of the table above
        )
        layout = state.layout
        nbytes = sum(map(layout.record_gradient_bytes, range(len(layout.records))))
        own = (
            choose_gradients(layout, int(contender.in_ram * nbytes)) if contender.limits else frozenset[int]()
        )
        residents = Residents(gradients=own)
        spills = contender.limits is not None and len(own) < len(layout.records)
        state.start(
            model.pool_sizes(training=True, residents=residents),
            residents=residents,
            gradient_files=[store.with_name("gradients")] if spills else (),
            settings=lambda _place: TensorSettings(DECAY),
        )

        def step(number: int) -> tuple[float, Mapping[str, float]]:
            before = state.timings()
            if contender.limits is not None:
                model.max_grad_norm = contender.limits[number % len(contender.limits)]
            adamw = AdamWStep(number, LEARNING_RATE, *BETAS, EPS)
            made = model.train_step(batches, adamw, lambda _loss: b"%d" % number)
            return made.loss, {name: value - before[name] for name, value in state.timings().items()}

        found = measured(step, job)
        clock = time.perf_counter()
        model.wait_durable()
        return {
            **found,
            "durable_seconds": time.perf_counter() - clock,
            "ledger_peak": state.ledger.total()[1],
        }


def run(name: str, size: str, options: argparse.Namespace, folder: Path) -> Figures:
    """One round of one contender; its files are gone afterwards."""
    place = folder / "contender"
    place.mkdir()
    job = {"contender": name, "size": size, "micro_batches": options.micro_batches, "steps": options.steps}
    job |= {"folder": str(place)}
    try:
        child(__spec__.name, sys.executable, [json.dumps({**job, "makes_store": True})])
        os.sync()  # what others left to be written is not this contender's
        return child(__spec__.name, sys.executable, [json.dumps({**job, "makes_store": False})])
    finally:
        shutil.rmtree(place)


def seconds(found: Figures) -> float:
    """Of a step."""
    return statistics.mean(row["seconds"] for row in found["steps"][FIRST:])


def table(rounds: Mapping[str, Sequence[Figures]]) -> str:
    """A row for each contender."""
    lines = [
        "| contender | s a step | of off | goal | CPU s | MB read | MB written | stalled s | ledger, MB |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, found in rounds.items():
        steps = [row for each in found for row in each["steps"][FIRST:]]
        ratios = [seconds(each) / seconds(off) for each, off in zip(found, rounds[OFF], strict=True)]
        stalled = [
            sum(value for part, value in row["parts"].items() if part.startswith("stall_")) for row in steps
        ]
        mean = lambda key: statistics.mean(row[key] for row in steps)  # noqa: B023, E731
        goal = f"at most {GOALS[name]}" if name in GOALS else ""
        lines.append(
            f"| {name} | {shown([seconds(each) for each in found], 3)} | {shown(ratios)} | {goal} | "
            f"{mean('cpu_seconds'):.2f} | {mean('read') / 1e6:.0f} | {mean('written') / 1e6:.0f} | "
            f"{statistics.mean(stalled):.3f} | {found[0]['ledger_peak'] / 1e6:.0f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--sizes", default="171M", help=f"of {', '.join(SIZES)}")
    parser.add_argument("--micro-batches", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--folder", type=Path, default=Path(), help="on the drive to measure")
    parser.add_argument("--json", type=Path, metavar="FILE", help="every figure of every step")
    options = parser.parse_args()
    facts = machine(options.folder, sys.executable)
    print(machine_text(facts))
    print(f"\n{options.rounds} rounds of {options.steps} steps; medians (least to most) of rounds")
    results: dict[str, dict[str, list[Figures]]] = {}
    with tempfile.TemporaryDirectory(prefix="clipping-", dir=options.folder) as folder:
        for size in options.sizes.split(","):
            results[size] = rounds = {name: [] for name in CONTENDERS}
            for number, name in in_turn(list(CONTENDERS), options.rounds):
                tell(f"{size}, round {number + 1} of {options.rounds}: {name}")
                rounds[name].append(run(name, size, options, Path(folder)))
            print(f"\n{size}, {options.micro_batches} micro-batch(es) of 256 tokens\n\n{table(rounds)}\n")
            for name, found in rounds.items():
                losses = [row["loss"] for row in found[0]["steps"]]
                print(f"losses of {name}: {' '.join(f'{loss:.6f}' for loss in losses[:5])}")
    if options.json is not None:
        contenders = {name: asdict(contender) for name, contender in CONTENDERS.items()}
        everything = {"machine": facts, "contenders": contenders, "results": results}
        options.json.write_text(json.dumps(everything, indent=1, default=str) + "\n", encoding="utf-8")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        asked = json.loads(sys.argv[2])
        answer(lambda: make_store(asked) if asked["makes_store"] else train(asked))
    else:
        main()
