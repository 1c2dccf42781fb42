"""Trains a few steps and prints what it took of RAM. A process of its own: a heap remembers its past.

memory_of_training.py STORE LAYERS HIDDEN DTYPE TOKENS
"""

import gc
import json
import sys
import tempfile
from pathlib import Path

import torch

from megatrain_io.models.partition import PartitionedModel
from megatrain_io.paging.paged_model import PagedPartition
from megatrain_io.store.paged_store import AdamWStep, PagedStore, TensorSettings
from paged import Case, files, make_store, partitioned, to_micro_batch
from reference.reference import micro_batches

STEPS = 3


def shape(layers: int, hidden: int) -> dict[str, int]:
    return {
        "hidden_size": hidden,
        "intermediate_size": hidden * 11 // 4,
        "vocab_size": 2053,
        "num_hidden_layers": layers,
        "head_dim": hidden // 4,
    }


def resident() -> dict[str, int]:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    fields = dict(line.split(":", 1) for line in lines)
    return {name: int(fields[name].split()[0]) * 1024 for name in ("VmRSS", "VmHWM")}


def run(store: Path, partition: PartitionedModel, steps: list) -> PagedStore:
    with PagedStore(*files(store)) as state:
        model = PagedPartition(partition, state)
        state.start(model.pool_sizes(training=True), settings=lambda _place: TensorSettings(0.1))
        for number, step in enumerate(steps, start=1):
            model.train_step(
                [to_micro_batch(batch) for batch in step], AdamWStep(number, 1e-4), lambda _loss: b"x"
            )
        state.wait_durable()
    return state


def main() -> None:
    torch.set_num_threads(1)
    store, layers, hidden, dtype, tokens = sys.argv[1:]
    case = Case(dtype=getattr(torch, dtype), overrides=shape(int(layers), int(hidden)))
    steps = micro_batches(2053, (2,) * STEPS, seed=3, lengths=(int(tokens) - 3, int(tokens)))
    partition = partitioned(case)
    # What libraries load at first use, and the kernels that they make and keep for every shape of matrix, are
    # theirs: the same tokens go through a model of the same width first.
    warm = Case(dtype=case.dtype, overrides=shape(1, int(hidden)))
    with tempfile.TemporaryDirectory(dir=Path(store).parent) as folder:
        make_store(Path(folder) / "warm", warm)
        run(Path(folder) / "warm", partitioned(warm), steps)
    gc.collect()
    before = resident()["VmRSS"]
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak starts anew
    state = run(Path(store), partition, steps)
    result = {
        "growth": resident()["VmHWM"] - before,
        "ledger": state.ledger.total()[1],
        "accounts": {name: peak for name, (_, peak) in state.ledger.balances().items()},
        "parameters": state.layout.parameters,
    }
    print(json.dumps(result))  # noqa: T201 - the test that started this reads it


if __name__ == "__main__":
    main()
