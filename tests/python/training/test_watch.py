"""What is warned of while a run goes on, once, and what is not."""

import json
import random
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

from megatrain_io.cli.app import app
from megatrain_io.config.schema import TrainConfig
from megatrain_io.training import watch
from megatrain_io.training.watch import LossWatch, RamWatch
from runs import configured

GIB = 1 << 30


class Run:
    """As much of a run as a watch looks at."""

    def __init__(self, step=0, **plan):
        self.step = step
        self.warnings = []
        self.plan = SimpleNamespace(**plan)
        self.config = SimpleNamespace(
            train=SimpleNamespace(learning_rate=100.0), memory=SimpleNamespace(ram=4 * GIB)
        )

    def warn(self, message):
        self.warnings.append(message)


def warned_of(losses, *, vocabulary=32000, step=0):
    run, loss_watch = Run(step), LossWatch(vocabulary)
    loss_watch.on_start(run)
    for number, loss in enumerate(losses, start=step + 1):
        loss_watch.on_step(run, SimpleNamespace(step=number, loss=loss))
    return run.warnings


def test_losses_that_leave_all_reason_are_warned_of_at_once():
    """A run with a learning rate of 100 ended with exit code 0 and no word: 10.7, 211,878, 102,024."""
    (warning,) = warned_of([10.7, 211_878.0, 102_024.0])
    assert warning.startswith(
        "the loss of step 2 is 211,878, and guessing among the 32,000 tokens has 10.4: "
    )
    assert "lower train.learning_rate (it is 100)" in warning
    assert len(warned_of([1.8, 2.0, 9.0, 12.0, 11.0, 11.0])) == 1, "worse than guessing, three times in a row"
    assert len(warned_of([500.0, 600.0], step=7)) == 1, "resumed behind a run that had left all reason"


@pytest.mark.parametrize(
    "losses",
    [
        [10.5, 10.3, 9.0, 8.0],  # from nothing
        [1.5, 1.4, 12.0, 1.5, 11.0, 13.0, 1.4],  # batches of another kind
        [14.0, 13.5, 15.0, 11.0, 14.0],  # a model whose first loss is worse than guessing
        [25.0, 30.0, 24.0, 20.0, 12.0],
        [0.0, 0.0, 1.0, 0.0],
    ],
    ids=str,
)
def test_ordinary_training_is_not_warned_of(losses):
    assert warned_of(losses) == []


def test_noise_of_fine_tuning_is_not_warned_of():
    noise = random.Random(5)
    for _ in range(200):
        level = noise.uniform(0.3, 4.0)
        losses = [level * noise.lognormvariate(0, 0.35) for _ in range(300)]
        assert warned_of(losses) == [], losses


def test_a_rate_that_is_hardly_meant_is_said_beforehand(source, tmp_path):
    assert TrainConfig(learning_rate=1e-3).doubts() == []
    (doubt,) = TrainConfig(learning_rate=100).doubts()
    assert doubt.startswith("train.learning_rate is 100: ")
    assert "1e-6 to 1e-4" in doubt
    config = configured(source, tmp_path / "run", learning_rate=100, warmup_steps=0, max_steps=3)
    (tmp_path / "my.yaml").write_text(config.to_yaml())
    how = ["--config", str(tmp_path / "my.yaml")]
    planned = CliRunner().invoke(app, ["plan", str(source / "model"), *how], prog_name="megatrain-io")
    assert doubt in planned.stdout
    ended = CliRunner().invoke(app, ["train", *how, "--json"], prog_name="megatrain-io")
    assert ended.exit_code in {0, 7}, "finite, or not any more"
    assert "warning: the loss of step " in ended.stderr
    if ended.exit_code == 0:
        assert len(json.loads(ended.stdout)["warnings"]) == 1


def test_ram_that_others_take_is_warned_of_once(monkeypatch):
    """The budget was looked at when training began, and the kernel ended the process without a word before."""
    left = []
    monkeypatch.setattr(watch, "usable_ram", lambda: (left[-1], "the cgroup limit"))
    monkeypatch.setattr(watch, "_SECONDS_BETWEEN", 0.0)
    run, ram_watch = Run(process_bytes=5 * GIB), RamWatch()
    ram_watch.on_start(run)
    for free in (8.0, 1.5, 1.0, 0.5):
        left.append(int(free * GIB))
        ram_watch.on_step(run, SimpleNamespace(step=len(left), ram_bytes=4 * GIB))
    (warning,) = run.warnings
    assert warning.startswith(
        "1.0 GiB of RAM are left (the cgroup limit), this process holds 4.0 GiB and may need 1.0 GiB more: "
    )
    assert "Step 3 is finished" in warning
    assert "smaller memory.ram (it is 4096 MiB)" in warning


def test_a_plan_that_knows_nothing_of_the_process_warns_near_the_end(monkeypatch):
    monkeypatch.setattr(watch, "usable_ram", lambda: (300 << 20, "the host's available memory"))
    run, ram_watch = Run(process_bytes=None), RamWatch()
    ram_watch.on_start(run)
    ram_watch.on_step(run, SimpleNamespace(step=1, ram_bytes=GIB))
    assert run.warnings == []
