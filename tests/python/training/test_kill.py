"""kill -9 at any moment: the store opens at a whole step, and the resumed run ends with the same bits."""

import multiprocessing
import random
import threading
from multiprocessing.connection import Connection
from pathlib import Path
from signal import SIGKILL
from typing import Any

import pytest
import torch

from megatrain_io.store.paged_store import PagedStore
from paged import (
    Case,
    all_planes,
    differing,
    files,
    make_store,
    opened,
    progress_of,
    train,
)
from reference.reference import train as train_in_memory

pytestmark = pytest.mark.slow

STEPS = 200
CASE = Case(tied=True, dtype=torch.bfloat16, counts=(1,) * STEPS)


def three_formats(name):
    """Norms in bf16 and half of each MLP not trained, in a model of fp32."""
    return "raw32" if ".mlp.up" in name else "bf16" if "norm" in name else "f32"


MIXED = Case(counts=(1,) * STEPS, format_of=three_formats)


@pytest.mark.timeout(600)
def test_twenty_kills_lose_nothing_but_the_step_under_way(tmp_path):
    check(tmp_path, 20, lambda _kills: {})


@pytest.mark.timeout(600)
def test_kills_while_gradients_wait_lose_nothing_but_their_step_and_the_one_under_way(tmp_path):
    first = Case(tied=True, dtype=torch.bfloat16, counts=(1,) * 10)
    norms = train_in_memory(first.model, first.steps, first.hyperparameters, first.dtype).grad_norms
    limit = sorted(norms)[5]  # some steps are clipped, others are not

    def clipping(kills):
        return {
            "max_grad_norm": limit,
            "policy": ("speculative", "deferred")[kills % 2],
            "kept_in_ram": (0.0, 0.5, 1.0)[kills % 3],
        }

    check(tmp_path, 8, clipping)


@pytest.mark.timeout(600)
def test_kills_lose_nothing_where_stops_have_records_of_several_formats(tmp_path):
    check(tmp_path, 6, lambda _kills: {}, MIXED)


def check(tmp_path, count, clipping, case=CASE):
    make_store(tmp_path / "whole", case)
    with opened(tmp_path / "whole", case, **clipping(0)) as model:
        losses = train(model, case)
        expected = all_planes(model.state)

    make_store(tmp_path / "killed", case)
    seed = random.SystemRandom().randrange(1 << 32)
    moments = random.Random(seed)
    kills, committed = 0, 0
    while kills < count:
        engine = ("uring", "threads", "auto")[kills % 3]
        # Between 5 ms and 250 ms after training began: within the first few steps of each life.
        how = {"engine": engine, "resident_share": (0.0, 0.3, 0.7, 1.0)[kills % 4], **clipping(kills)}
        killed = run_and_kill(tmp_path / "killed", case, how, after=moments.uniform(0.005, 0.25))
        assert killed, f"seed {seed}: training was done after {kills} kills; it needs more steps"
        kills += 1
        with PagedStore(*files(tmp_path / "killed")) as state:
            report = state.verify()
            assert report.damaged == (), f"seed {seed}, kill {kills}"
            step, seen = progress_of(state)
            assert state.generation == step + 1, f"seed {seed}, kill {kills}"
            assert step >= committed, f"seed {seed}, kill {kills}: an acknowledged step was lost"
            assert seen == losses[:step], f"seed {seed}, kill {kills}"
            committed = step
    with opened(tmp_path / "killed", case, **clipping(0)) as model:
        assert train(model, case) == losses
        assert differing(all_planes(model.state), expected) == [], f"seed {seed}"


# Each life is forked from one process that has imported everything and done nothing yet.
LIVES = multiprocessing.get_context("forkserver")
LIVES.set_forkserver_preload(["megatrain_io.paging.paged_model", "transformers.models.llama.modeling_llama"])


def live(begun: Connection, store: Path, case: Case, how: dict[str, Any]) -> None:
    """In a process of its own: train until killed."""
    torch.set_num_threads(1)
    with opened(store, case, **how) as model:
        begun.send("training")
        train(model, case)


def run_and_kill(store: Path, case: Case, how: dict[str, Any], after: float) -> bool:
    """Train in a process of its own; whether it was killed before it was done."""
    begun, says = LIVES.Pipe(duplex=False)
    life = LIVES.Process(target=live, args=(says, store, case, how), daemon=True)
    life.start()
    says.close()
    with begun:
        assert begun.recv() == "training"
    timer = threading.Timer(after, life.kill)
    timer.start()
    life.join()
    timer.cancel()
    assert life.exitcode in {0, -SIGKILL}
    return life.exitcode != 0
