"""A step on a GPU within a budget of VRAM.

    python -m benches.gpu.train_step --sizes 1.3B --vram 8GiB --ram 8GiB --folder DIR

For each size a process makes a store with random weights, measures the step on two blocks with weights that stay
(computing alone), then trains from the drive. Beside the median step stand the sum of computing alone, the time that
the bytes of a step take at the drive's rate of training's traffic, what of the smaller one was hidden behind the
larger, by the events of both, tokens a second, and the share of the GPU's peak, counted as 6 and as 8 operations for
each parameter and token (without and with the recomputation of blocks). With ``--frozen`` the store holds weights
alone, and a step passes gradients through them, forward and backward, as adapters need it: 4 and 6 operations. With
``--device simulated`` nothing of that means anything, but all of it runs.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from benches.harness.comparison import answer, child, machine, machine_text, tell
from benches.step.contenders import (
    BETAS,
    DECAY,
    EPS,
    LEARNING_RATE,
    SIZES,
    config_of,
    drive_bytes,
    micro_batches,
    peak_rss,
    reset_peak_rss,
)
from benches.step.ram_budget import make_store, size_of

Figures = dict[str, Any]
Intervals = list[tuple[int, int]]
Alone = Callable[[Any, Any, Any, Any], Mapping[Any, float]]
WARM_UP = 2
IO_LANES = ("read", "write", "copy in", "copy out")


def device_of(job: Figures) -> Any:
    if job["device"] == "simulated":
        from megatrain_io.paging.device.simulated import SimulatedDevice

        return SimulatedDevice(nbytes=job["vram"])
    from megatrain_io.paging.device.cuda import Cuda

    return Cuda(job["vram"])


def measure(job: Figures) -> Figures:
    """In the child."""
    make_store(Path(job["store"]), job["size"], "raw16" if job["frozen"] else "bf16")
    return train(job)


def train(job: Figures, *, alone: Alone | None = None, commits: bool = True) -> Figures:
    """Steps from a store that is there.

    Args:
        job: what to train.
        alone: measures computing alone, as ``measured_seconds`` does, which is the default.
        commits: every step is committed; else none.
    """
    import torch

    from megatrain_io.models.partition import PartitionedModel
    from megatrain_io.models.probe import probe
    from megatrain_io.paging.paged_model import PagedPartition
    from megatrain_io.planning.compute_time import measured_seconds
    from megatrain_io.planning.memory_needs import activation_budget_of, plan_ram, plan_vram, step_needs
    from megatrain_io.store.paged_store import AdamWStep, PagedStore, TensorSettings

    path = Path(job["store"])
    is_frozen = job["frozen"]
    config = config_of(SIZES[job["size"]])
    partition = PartitionedModel(config, torch.bfloat16, probe(config))
    batches, device = micro_batches(job), device_of(job)
    seconds, losses, events = [], [], []
    with PagedStore(path) as state:
        layout = state.layout
        seconds_alone = (alone or measured_seconds)(partition, layout, batches[0], device)
        if device.torch_device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        needs = step_needs(
            PartitionedModel(config, torch.bfloat16, probe(config)), layout, batches, state.ledger.total()[0]
        )
        vram, left = plan_vram(partition, layout, needs, vram=job["vram"])
        plan = plan_ram(partition, layout, left, ram=job["ram"])
        inputs = activation_budget_of(plan, [path.with_name("inputs")])
        model = PagedPartition(partition, state, activations=inputs, device=device, vram=vram)
        reset_peak_rss()
        settings = None if is_frozen else lambda _place: TensorSettings(DECAY)
        state.start(plan.pool, residents=plan.residents, settings=settings, unit=model.unit)
        with device.pin(state.pool_memory()) as is_pinned:
            for number in range(1, job["steps"] + WARM_UP + 1):
                if number == WARM_UP + 1:
                    state.wait_durable()
                    state.record_events()
                    model.record_device_events()
                    before, drive_before = state.io_bytes(), drive_bytes()
                began = time.perf_counter()
                if is_frozen:
                    step = model.pass_gradients(batches, number=number)[0]
                else:
                    adamw = AdamWStep(number, LEARNING_RATE, *BETAS, EPS)
                    step = model.train_step(batches, adamw, (lambda _loss: b"x") if commits else None)
                losses.append(step.loss)
                seconds.append(time.perf_counter() - began)
            state.wait_durable()
            moved, by_system = (
                [(now - then) / job["steps"] for now, then in zip(nows, thens, strict=True)]
                for nows, thens in ((state.io_bytes(), before), (drive_bytes(), drive_before))
            )
            events = [*state.take_events()[0], *model.take_device_events()]
            model.close()
    io = joined((start, end) for lane, _, _, start, end in events if lane.startswith(IO_LANES))
    computing = joined((start, end) for lane, _, _, start, end in events if lane.startswith("device"))
    both = length(io) + length(computing) - length(joined([*io, *computing]))
    device.close()
    return {
        "device": device.name,
        "is_pinned": is_pinned,
        "parameters": layout.parameters,
        "vram": str(vram),
        "ram": str(plan),
        "vram_planned": vram.total,
        "vram_peak": getattr(device, "peak_nbytes", device.accounts.peak_nbytes),
        "seconds": seconds[WARM_UP:],
        "compute_alone": job["micro_batches"] * sum(seconds_alone.values()),
        "read": moved[0],
        "written": moved[1],
        "read_by_system": by_system[0],
        "written_by_system": by_system[1],
        "peak_rss": peak_rss(),
        "hidden": both / max(1, min(length(io), length(computing))),
        "tokens": job["tokens"] * job["micro_batches"],
        "losses": losses,
    }


def joined(intervals: Iterable[tuple[int, int]]) -> Intervals:
    """The same moments without overlaps."""
    found: Intervals = []
    for start, end in sorted(intervals):
        if found and start <= found[-1][1]:
            found[-1] = (found[-1][0], max(end, found[-1][1]))
        else:
            found.append((start, end))
    return found


def length(intervals: Intervals) -> int:
    return sum(end - start for start, end in intervals)


def drive_rate(folder: Path) -> float:
    """Bytes a second of training's traffic."""
    from megatrain_io.machine.measure import scratch_file, transfer

    with scratch_file(folder, 1 << 30, "auto") as file:
        file.fill()
        return 1e9 * transfer(file, "training", (1 << 20, 8), 4 << 30, seconds=5).gb_per_s


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--sizes", default="1.3B", help=f"of {', '.join(SIZES)}")
    parser.add_argument(
        "--frozen", action="store_true", help="no weight is trained: forward and backward alone"
    )
    parser.add_argument("--device", choices=["cuda", "simulated"], default="cuda")
    parser.add_argument("--vram", default="8GiB")
    parser.add_argument("--ram", default="8GiB")
    parser.add_argument("--tokens", type=int, default=2048, help="of a micro-batch")
    parser.add_argument("--micro-batches", type=int, default=4)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--tflops", type=float, help="the GPU's peak in bf16, for the share of it")
    parser.add_argument("--folder", type=Path, default=Path())
    parser.add_argument("--json", type=Path, metavar="FILE", help="every figure")
    options = parser.parse_args()
    least = 4 if options.frozen else 6  # operations for each parameter and token, without recomputation
    facts, rate = machine(options.folder, sys.executable), drive_rate(options.folder)
    print(f"{machine_text(facts)}\ndrive {rate / 1e9:.2f} GB/s of training's traffic\n")
    print(
        "| size | parameters | VRAM planned | peak | step | computing alone | bytes at the drive's rate | hidden | "
        f"tok/s | MFU {least}PT / {least + 2}PT |\n|---|---|---|---|---|---|---|---|---|---|"
    )
    results = {}
    for size in options.sizes.split(","):
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            job = {
                "size": size,
                "store": str(Path(folder) / "store.mtio"),
                "frozen": options.frozen,
                "device": options.device,
                "vram": size_of(options.vram),
                "ram": size_of(options.ram),
                "tokens": options.tokens,
                "micro_batches": options.micro_batches,
                "steps": options.steps,
            }
            tell(f"{size}: storing random weights, then training")
            results[size] = found = child(__spec__.name, sys.executable, [json.dumps(job)])
        step = statistics.median(found["seconds"])
        operations = found["parameters"] * found["tokens"] / step / 1e12
        share = "-"
        if options.tflops:
            share = (
                f"{least * operations / options.tflops:.1%} / {(least + 2) * operations / options.tflops:.1%}"
            )
        moved = (found["read"] + found["written"]) / rate
        print(
            f"| {size} | {found['parameters']} | {found['vram_planned'] / 2**20:.0f} MiB | "
            f"{found['vram_peak'] / 2**20:.0f} MiB | {step:.2f} s ({min(found['seconds']):.2f} to "
            f"{max(found['seconds']):.2f}) | {found['compute_alone']:.2f} s | {moved:.2f} s | {found['hidden']:.0%} | "
            f"{found['tokens'] / step:.0f} | {share} |"
        )
    for size, found in results.items():
        print(f"\n{size} on {found['device']}: {found['vram']}\n{found['ram']}")
    if options.json is not None:
        everything = {"machine": facts, "options": vars(options), "drive": rate, "results": results}
        options.json.write_text(json.dumps(everything, indent=1, default=str) + "\n", encoding="utf-8")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        answer(lambda: measure(json.loads(sys.argv[2])))
    else:
        main()
