"""The plan against what then happens: python -m benches.plan.accuracy --folder DIR.

For each configuration and round a process of its own measures the machine (as ``megatrain-io bench`` does, shorter),
plans, and trains a few steps. Beside each planned figure stands the measured one, of the steady state.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benches.harness.comparison import answer, child, machine, machine_text, tell
from benches.step.contenders import (
    BETAS,
    DECAY,
    EPS,
    LEARNING_RATE,
    SIZES,
    TOKENS,
    config_of,
    peak_rss,
    reset_peak_rss,
)
from benches.step.contenders import tokens_of as tokens
from benches.step.ram_budget import make_store
from megatrain_io.machine.threads import let_waiting_threads_yield

Figures = dict[str, Any]
# Moments that were never written are not read, and the first commits have nothing to wait for.
FIRST_STEPS = 2


@dataclass(frozen=True)
class Setting:
    """A configuration: ``resident`` bytes a parameter stay in RAM, gradients that wait included."""

    size: str
    resident: float
    micro_batches: int = 1
    commit_every: int = 1
    max_grad_norm: float | None = None


NEVER = 1e9
SETTINGS = {
    "171M, all on NVMe": Setting("171M", 0.0),
    "171M, half resident": Setting("171M", 6.0),
    "171M, all resident": Setting("171M", 12.2),
    "171M, all resident, commit_every 4": Setting("171M", 12.2, commit_every=4),
    "171M, 4 micro-batches": Setting("171M", 0.0, micro_batches=4),
    "171M, clipping, never reached": Setting("171M", 4.2, max_grad_norm=NEVER),
    "325M, all on NVMe": Setting("325M", 0.0),
    "325M, half resident": Setting("325M", 6.0),
    "1.3B, all on NVMe": Setting("1.3B", 0.0),
    "1.3B, half resident": Setting("1.3B", 6.0),
}
FIGURES = {
    "seconds": ("s a step", 1.0),
    "read": ("MB read", 1e-6),
    "written": ("MB written", 1e-6),
    "ledger": ("ledger MB", 1e-6),
    "process": ("process MB", 1e-6),
}


def measure(job: Figures) -> Figures:
    """In the child: bench, plan, train."""
    let_waiting_threads_yield(os.environ)  # as the command line does
    import psutil
    import torch

    from megatrain_io.data.batch import MicroBatch
    from megatrain_io.machine.bench import Options, bench
    from megatrain_io.machine.hardware import this_machine
    from megatrain_io.models.partition import PartitionedModel
    from megatrain_io.models.probe import probe
    from megatrain_io.paging.paged_model import PagedPartition
    from megatrain_io.planning.compute_time import calibrate
    from megatrain_io.planning.job import TrainingJob
    from megatrain_io.planning.memory_needs import activation_budget_of, step_needs
    from megatrain_io.planning.planner import make_plan
    from megatrain_io.store.paged_store import AdamWStep, PagedStore, TensorSettings

    setting, store = Setting(**job["setting"]), Path(job["store"])
    profile = bench(store.parent, Options(nbytes=1 << 30, seconds=job["seconds"]), lambda _done, _total: None)
    model_config = config_of(SIZES[setting.size])
    partition = PartitionedModel(model_config, torch.bfloat16, probe(model_config))
    batches = [
        MicroBatch(ids, torch.nn.functional.pad(ids, (0, 1), value=-100)[:, 1:].contiguous())
        for ids in tokens({"size": setting.size, "micro_batches": setting.micro_batches})
    ]
    with PagedStore(store) as state:
        layout, tables = state.layout, state.ledger.total()[0]
        needs = step_needs(partition, layout, batches, tables)
        ram = least_for_overlap(partition, layout, needs) + int(setting.resident * layout.parameters)
        training = TrainingJob(
            hardware=this_machine([store.parent], ram, "bf16", profile),
            precision="bf16",
            partition=partition,
            layout=layout,
            micro_batch=batches[0],
            accumulation=len(batches),
            max_length=TOKENS,
            ram=ram,
            needs=needs,
            max_grad_norm=setting.max_grad_norm,
            commit_every=setting.commit_every,
            is_made=True,
        )
        training = replace(training, seconds=calibrate(training))
        libraries = psutil.Process().memory_info().rss
        planned = make_plan(training, libraries=libraries, variants=False).require_fits()
        memory = planned.memory
        model = PagedPartition(
            partition,
            state,
            activations=activation_budget_of(memory, [store.with_name("inputs")]),
            max_grad_norm=setting.max_grad_norm,
        )
        reset_peak_rss()
        state.start(
            memory.pool,
            residents=memory.residents,
            gradient_files=[store.with_name("gradients")] if memory.spills_gradients else (),
            settings=lambda _place: TensorSettings(DECAY),
        )
        rows = train(job, setting, model, batches, AdamWStep)
        state.wait_durable()
        model.close()
        steady = rows[FIRST_STEPS:]
        return {
            "planned": {
                "seconds": planned.time.seconds,
                "read": planned.read_bytes,
                "written": planned.written_bytes,
                "ledger": planned.ledger_bytes,
                "process": planned.process_bytes,
            },
            "measured": {
                "seconds": statistics.median(row["seconds"] for row in steady)
                if setting.commit_every == 1
                else statistics.fmean(row["seconds"] for row in steady),
                "read": statistics.fmean(row["read"] for row in steady),
                "written": statistics.fmean(row["written"] for row in steady),
                "ledger": state.ledger.total()[1],
                "process": peak_rss(),
            },
            "rows": rows,
            "plan": str(planned),
            "profile": profile.model_dump(mode="json"),
        }


def least_for_overlap(partition: Any, layout: Any, needs: Any) -> int:
    """RAM in which the largest pool fits, and nothing stays."""
    from megatrain_io.store.pool import mapped_nbytes, pool_sizes

    pool = pool_sizes(layout, tied_embeddings=bool(partition.tied_parameters), training=True)
    return needs.always + needs.compute + mapped_nbytes(pool) + (8 << 20)


def train(job: Figures, setting: Setting, model: Any, batches: Any, adamw_step: Any) -> list[Figures]:
    """Some steps; bytes are counted by the engine, from the begin of each step to that of the next."""
    import time

    rows = []
    for number in range(1, job["steps"] + 1):
        clock, before = time.perf_counter(), model.state.io_bytes()
        commits = number % setting.commit_every == 0
        adamw = adamw_step(number, LEARNING_RATE, *BETAS, EPS)
        model.train_step(batches, adamw, (lambda _loss: b"x") if commits else None)
        read, written = (now - then for now, then in zip(model.state.io_bytes(), before, strict=True))
        rows.append({"seconds": time.perf_counter() - clock, "read": read, "written": written})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", help="part of a configuration's name; several with ;")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument(
        "--seconds", type=float, default=2.0, help="of each kind of traffic that bench measures"
    )
    parser.add_argument("--folder", type=Path, default=Path())
    parser.add_argument("--json", type=Path, metavar="FILE", help="every figure")
    options = parser.parse_args()
    wanted = options.only.split(";") if options.only else [""]
    settings = {name: one for name, one in SETTINGS.items() if any(part in name for part in wanted)}
    facts = machine(options.folder, sys.executable)
    print(
        f"{machine_text(facts)}\n{options.rounds} rounds of {options.steps} steps; planned / measured, medians\n"
    )
    results: dict[str, list[Figures]] = {name: [] for name in settings}
    for size in dict.fromkeys(one.size for one in settings.values()):
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            store = Path(folder) / "store.mtio"
            tell(f"{size}: making the store")
            child(__spec__.name, sys.executable, [json.dumps({"make": size, "store": str(store)})])
            for number in range(options.rounds):
                for name, setting in settings.items():
                    if setting.size != size:
                        continue
                    tell(f"{name}: round {number + 1} of {options.rounds}")
                    steps = FIRST_STEPS + setting.commit_every * -(
                        -(options.steps - FIRST_STEPS) // setting.commit_every
                    )
                    job = {
                        "setting": vars(setting),
                        "store": str(store),
                        "steps": steps,
                        "seconds": options.seconds,
                    }
                    results[name].append(child(__spec__.name, sys.executable, [json.dumps(job)]))
    print(table(results))
    if options.json is not None:
        text = json.dumps({"machine": facts, "results": results}, indent=1, default=str)
        options.json.write_text(text + "\n", encoding="utf-8")


def table(results: dict[str, list[Figures]]) -> str:
    """Planned over measured, and the ratio."""
    lines = [
        "| configuration | " + " | ".join(title for title, _ in FIGURES.values()) + " |",
        "|---" * (len(FIGURES) + 1) + "|",
    ]
    for name, rounds in results.items():
        cells = []
        for figure, (_, unit) in FIGURES.items():
            planned, measured = (
                statistics.median(one[kind][figure] for one in rounds) for kind in ("planned", "measured")
            )
            ratios = [
                one["planned"][figure] / one["measured"][figure] if one["measured"][figure] else 1.0
                for one in rounds
            ]
            shown = 3 if unit == 1.0 else 0
            cells.append(
                f"{planned * unit:.{shown}f} / {measured * unit:.{shown}f} = {statistics.median(ratios):.3f}"
                + (f" ({min(ratios):.2f} to {max(ratios):.2f})" if figure == "seconds" else "")
            )
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        asked = json.loads(sys.argv[2])
        answer(lambda: make_store(Path(asked["store"]), asked["make"]) if "make" in asked else measure(asked))
    else:
        main()
