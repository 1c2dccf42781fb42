"""Whether a budget of RAM holds: python -m benches.step.ram_budget --ram 1GiB --sizes 171M,325M,1.3B --folder DIR.

Each model trains a few steps within the budget, in a process of its own. Beside the ledger stands what the process
grew by: its peak resident memory less what it had with all libraries loaded and warm (the same code over a model of
one small block). With ``--limit 3GiB`` the process also lives in a memory control group (v1, as root) of that size:
what does not fit there is killed by the kernel.
"""

import argparse
import gc
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

from benches.harness.comparison import answer, child, machine, machine_text, tell
from benches.step.contenders import (
    BETAS,
    DECAY,
    EPS,
    LEARNING_RATE,
    SIZES,
    Size,
    config_of,
    peak_rss,
    reset_peak_rss,
)
from benches.step.contenders import micro_batches as micro_batches_of

CGROUP = Path("/sys/fs/cgroup/memory")
WARM = "warm"
SIZES[WARM] = Size(256, 1, 704, 1024)
Figures = dict[str, Any]


def size_of(text: str) -> int:
    """Bytes of ``1GiB``."""
    from pydantic import ByteSize, TypeAdapter

    return int(TypeAdapter(ByteSize).validate_python(text))


def resident() -> int:
    """Bytes of RAM that this process has now."""
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGESIZE")


def make_store(path: Path, size: str, state_format: Literal["bf16", "raw16"] = "bf16") -> Figures:
    """Random weights, drawn part by part: no more than a chunk is in RAM."""
    import torch

    from megatrain_io.models.partition import PartitionedModel, model_parts
    from megatrain_io.models.probe import probe
    from megatrain_io.runs.import_model import create_store
    from megatrain_io.store.layout import ModelLayout, TensorPlace

    config = config_of(SIZES[size])
    partition = PartitionedModel(config, torch.bfloat16, probe(config))
    layout = ModelLayout.build(model_parts(partition), len(partition.blocks), state_format)

    def values(place: TensorPlace, start: int, stop: int) -> Any:
        if len(place.shape) == 1:
            return torch.ones(stop - start)
        random = torch.Generator().manual_seed(place.record * 1_000_003 + place.offset + start)
        return torch.randn(stop - start, generator=random) * 0.02

    create_store([path], layout, values, model={}, blob=b"0")
    return {"parameters": layout.parameters}


def train(path: Path, size: str, micro_batches: int, steps: int, ram: int) -> Figures:
    """Some steps within ``ram``."""
    import torch

    from megatrain_io.models.partition import PartitionedModel
    from megatrain_io.models.probe import probe
    from megatrain_io.paging.paged_model import PagedPartition
    from megatrain_io.planning.memory_needs import activation_budget_of, plan_ram, step_needs
    from megatrain_io.store.paged_store import AdamWStep, PagedStore, TensorSettings

    config = config_of(SIZES[size])
    partition = PartitionedModel(config, torch.bfloat16, probe(config))
    batches = micro_batches_of({"size": size, "micro_batches": micro_batches})
    losses = []
    with PagedStore(path) as state:
        needs = step_needs(partition, state.layout, batches, state.ledger.total()[0])
        plan = plan_ram(partition, state.layout, needs, ram=ram)
        model = PagedPartition(
            partition, state, activations=activation_budget_of(plan, [path.with_name("inputs")])
        )
        state.start(plan.pool, residents=plan.residents, settings=lambda _place: TensorSettings(DECAY))
        for number in range(1, steps + 1):
            adamw = AdamWStep(number, LEARNING_RATE, *BETAS, EPS)
            losses.append(model.train_step(batches, adamw, lambda _loss: b"x").loss)
        state.wait_durable()
        model.close()
        return {
            "plan": str(plan),
            "planned": plan.total,
            "ledger": state.ledger.total()[1],
            "accounts": {name: peak for name, (_, peak) in state.ledger.balances().items()},
            "parameters": state.layout.parameters,
            "losses": losses,
        }


@contextmanager
def limited(nbytes: int | None) -> Iterator[Path | None]:
    """A control group of that size for the children; None where there is no limit to be set."""
    if nbytes is None:
        yield None
        return
    group = CGROUP / f"megatrain-io-{os.getpid()}"
    try:
        group.mkdir()
        (group / "memory.limit_in_bytes").write_text(str(nbytes), encoding="ascii")
    except OSError as error:
        sys.exit(f"a limit needs root and a memory control group of version 1 at {CGROUP}: {error}")
    try:
        yield group
    finally:
        with suppress(OSError):
            group.rmdir()


def measure(job: Figures) -> Figures:
    """In the child: libraries first, then the model."""
    if job["group"] is not None:
        (Path(job["group"]) / "cgroup.procs").write_text(str(os.getpid()), encoding="ascii")
    store = Path(job["store"])
    warm = store.with_name("warm.mtio")
    make_store(warm, WARM)
    train(warm, WARM, job["micro_batches"], 2, job["ram"])
    warm.unlink()
    gc.collect()
    before = resident()
    reset_peak_rss()
    found = train(store, job["size"], job["micro_batches"], job["steps"], job["ram"])
    found |= {"baseline": before, "growth": peak_rss() - before}
    if job["group"] is not None:
        group = Path(job["group"])
        for name in ("memory.max_usage_in_bytes", "memory.failcnt"):
            found[name] = int((group / name).read_text(encoding="ascii"))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--sizes", default="171M,325M,1.3B", help=f"of {', '.join(SIZES)}")
    parser.add_argument("--ram", default="1GiB", help="the budget")
    parser.add_argument("--limit", help="of a control group around the training")
    parser.add_argument("--micro-batches", type=int, default=1)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=Path())
    parser.add_argument("--json", type=Path, metavar="FILE", help="every figure")
    options = parser.parse_args()
    ram = size_of(options.ram)
    facts = machine(options.folder, sys.executable)
    print(
        f"{machine_text(facts)}\nbudget {options.ram}, {options.steps} steps, {options.micro_batches} micro-batches\n"
    )
    print(
        "| size | parameters | planned | ledger's peak | of the budget | process grew by | of the budget | libraries |"
    )
    print("|---|---|---|---|---|---|---|---|")
    results = {}
    for size in options.sizes.split(","):
        with (
            tempfile.TemporaryDirectory(dir=options.folder) as folder,
            limited(None if options.limit is None else size_of(options.limit)) as group,
        ):
            store = Path(folder) / "store.mtio"
            tell(f"{size}: making the store")
            child(__spec__.name, sys.executable, [json.dumps({"make": size, "store": str(store)})])
            tell(f"{size}: training")
            job = {
                "size": size,
                "store": str(store),
                "ram": ram,
                "micro_batches": options.micro_batches,
                "steps": options.steps,
                "group": None if group is None else str(group),
            }
            found = child(__spec__.name, sys.executable, [json.dumps(job)])
        results[size] = found
        mib = lambda name: f"{found[name] / 2**20:.0f} MiB"  # noqa: B023, E731
        print(
            f"| {size} | {found['parameters']} | {mib('planned')} | {mib('ledger')} | {found['ledger'] / ram:.1%} | "
            f"{mib('growth')} | {found['growth'] / ram:.1%} | {mib('baseline')} |"
        )
    for size, found in results.items():
        print(f"\n{size}: {found['plan']}; losses {', '.join(f'{loss:.5f}' for loss in found['losses'])}")
        if "memory.failcnt" in found:
            used = found["memory.max_usage_in_bytes"] / 2**20
            print(
                f"{size}: the control group's peak was {used:.0f} MiB, page cache included, of {options.limit}"
            )
    if options.json is not None:
        everything = {
            "machine": facts,
            "options": vars(options) | {"folder": str(options.folder)},
            "results": results,
        }
        options.json.write_text(json.dumps(everything, indent=1, default=str) + "\n", encoding="utf-8")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        asked = json.loads(sys.argv[2])
        answer(lambda: make_store(Path(asked["store"]), asked["make"]) if "make" in asked else measure(asked))
    else:
        main()
