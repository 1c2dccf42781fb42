"""Small runs through the training loop, for tests of what becomes of them."""

import json
from contextlib import closing, nullcontext

from megatrain_io.config.schema import RunConfig
from megatrain_io.runs.folder import RunFolder
from megatrain_io.runs.open_store import open_store
from megatrain_io.training.callbacks import Callback
from megatrain_io.training.trainer import train
from paged import all_planes, differing, new_device

ENGINE = "threads"  # stopping a ring takes a second; how bytes move is tested elsewhere
STEPS = 5
WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "while", "wizards", "brew"]


def configured(source, run, *, data="train.jsonl", memory=None, **changes):
    settings = {
        "num_train_epochs": 1,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "learning_rate": 3e-3,
        "warmup_steps": 1,
        "weight_decay": 0.1,
        "precision": "bf16",  # whatever computes fastest here
    }
    return RunConfig(
        model=source / "model",
        output_dir=run,
        data={
            "train": [str(source / data)], "eval": str(source / "eval.jsonl"), "max_length": 64, "packing": False
        },
        train=settings | changes,
        # Little more than it needs: nearly all state is paged.
        memory={"io_backend": ENGINE, "threads": 1, "ram": "2000KiB"} | (memory or {}),
    )  # fmt: skip


class Reporter(Callback):
    """Remembers, and presses Ctrl-C after a step."""

    def __init__(self, stop=None):
        self.stop = stop
        self.starts = []
        self.reports = []
        self.notes = []

    def on_start(self, run):
        self.starts.append((run.step, run.max_steps, list(run.notes)))

    def on_skip(self, run, step, reason):
        self.notes.append(f"step {step} is skipped: {reason}; nothing is updated by it")

    def on_step(self, run, report):
        self.reports.append(report)
        if report.step == self.stop:
            raise KeyboardInterrupt


def start(config, *, resume=False, stop=None, device=None, callbacks=()):
    """Train on ``device``, or on what the test profile names; the result, and what was told."""
    reporter = Reporter(stop)
    with nullcontext(device) if device is not None else closing(new_device()) as chosen:
        return train(config, resume=resume, callbacks=[reporter, *callbacks], device=chosen), reporter


def metrics_of(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def figures(run):
    """What of the metrics must be the same for the same bits."""
    names = ("step", "max_steps", "loss", "learning_rate", "tokens", "trained_tokens")
    return [tuple(line[name] for name in names) for line in metrics_of(run)]


def planes_of(run):
    with open_store(RunFolder(run), engine=ENGINE) as state:
        assert state.verify().damaged == ()
        return all_planes(state)


def blob_of(run):
    with open_store(RunFolder(run), engine=ENGINE) as state:
        return json.loads(state.blob)


def check_equals(run, whole):
    assert figures(run) == figures(whole[0])
    assert metrics_of(run)[-1]["eval_loss"] == whole[2].eval_loss
    assert differing(planes_of(run), whole[1]) == []
