"""What a run that goes on may change, what is said of it, and what is refused with key, old and new value."""

import json
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from megatrain_io.cli.app import app
from megatrain_io.errors import ConfigError
from megatrain_io.runs.folder import RunFolder
from megatrain_io.runs.open_store import open_store
from megatrain_io.runs.state import TrainerState
from megatrain_io.training.resume import changes_of, recorded_settings
from paged import differing
from runs import ENGINE, configured, figures, metrics_of, planes_of, start

CONSTANT = {"lr_scheduler_type": "constant"}


@pytest.fixture(scope="module")
def finished(source, tmp_path_factory):
    """A run that was finished, of three steps with a constant rate."""
    run = tmp_path_factory.mktemp("finished") / "run"
    start(configured(source, run, max_steps=3, **CONSTANT))
    return run


@pytest.fixture
def three(finished, tmp_path):
    """A copy of it."""
    return Path(shutil.copytree(finished, tmp_path / "three"))


def train(config, folder, *arguments):
    """By the command line; what it ended with."""
    path = folder / "my.yaml"
    path.write_text(config.to_yaml())
    words = ["train", "--config", str(path), "--resume", *arguments]
    return CliRunner().invoke(app, words, prog_name="megatrain-io")


def test_a_finished_run_goes_on_when_max_steps_is_raised(source, three, tmp_path):
    """It was refused without a word about which key, and the moments of a long run were lost with it."""
    ended = train(configured(source, three, max_steps=3, **CONSTANT), tmp_path)
    assert ended.exit_code == 2
    assert "all its 3 steps: there is nothing left to train. Raise train.max_steps" in ended.stderr
    status = CliRunner().invoke(app, ["status", str(three)], prog_name="megatrain-io").stdout
    # A copy, so that its configuration names another folder.
    asked = f"--config {three / 'config.yaml'} output_dir={three} --resume max_steps=N, with N above 3"
    assert asked in status
    ended = train(configured(source, three, max_steps=3, **CONSTANT), tmp_path, "max_steps=5")
    assert ended.exit_code == 0, ended.stderr
    assert (
        "note: train.max_steps was 3 and is 5: the run goes on from step 3, moments and all" in ended.stderr
    )
    start(configured(source, tmp_path / "five", max_steps=5, **CONSTANT))
    assert differing(planes_of(three), planes_of(tmp_path / "five")) == []
    without_last = [(step, *rest) for step, _, *rest in figures(three)]
    assert without_last == [(step, *rest) for step, _, *rest in figures(tmp_path / "five")]


def test_epochs_raise_the_end_likewise(source, three):
    config = configured(source, three, num_train_epochs=2, gradient_accumulation_steps=2, **CONSTANT)
    result, reporter = start(config, resume=True)
    assert result.steps == 10
    said = " ".join(reporter.starts[0][2])
    assert "train.max_steps was 3 and is 10" in said
    assert "train.num_train_epochs was 1 and is 2" in said


def test_a_schedule_that_depends_on_the_end_is_told_so(source, stopped):
    result, reporter = start(configured(source, stopped, max_steps=8), resume=True)
    assert result.steps == 8
    (said,) = [note for note in reporter.starts[0][2] if "schedule" in note]
    rates = {line["step"]: line["learning_rate"] for line in metrics_of(stopped)}
    assert (
        f"cosine schedule depends on the last step: the rate of step 4 is {rates[4]:.3g}, where 5 steps had"
        in said
    )


def test_what_leaves_the_past_alone_may_change_and_is_said(source, stopped):
    changes = {
        "learning_rate": 1e-3,
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "eval_steps": 2,
        "logging_steps": 3,
    }
    memory = {"ram": "1GiB", "store_dir": ["/nvme"]}
    result, reporter = start(configured(source, stopped, memory=memory, **changes), resume=True)
    assert result.steps == 5
    assert sorted(note for note in reporter.starts[0][2] if " was " in note) == [
        "memory.ram was 2.0 MiB and is 1024 MiB",
        'memory.store_dir was null and is ["/nvme"]: the store stays where it is',
        "train.eval_steps was null and is 2 from step 4 on",
        "train.learning_rate was 0.003 and is 0.001 from step 4 on",
        "train.logging_steps was 1 and is 3 from step 4 on",
        "train.max_grad_norm was null and is 1.0 from step 4 on",
        "train.weight_decay was 0.1 and is 0.0 from step 4 on",
    ]
    assert metrics_of(stopped)[1]["learning_rate"] == 3e-3, "the past is as it was"


def test_nothing_is_said_where_nothing_changed(source, stopped):
    notes = start(configured(source, stopped), resume=True)[1].starts[0][2]
    assert [note for note in notes if " was " in note] == []


def test_a_state_of_an_older_version_takes_the_settings_of_its_config(source, stopped):
    folder = RunFolder(stopped)
    with open_store(folder, engine=ENGINE) as state:
        older = {name: value for name, value in json.loads(state.blob).items() if name != "configuration"}
    progress = TrainerState.parse(json.dumps(older).encode())
    config = configured(source, stopped, precision="bf16", seed=7)
    how = {"digest": "another", "data": progress.data}
    with pytest.raises(ConfigError, match=r"train\.seed was 42 and is 7"):
        changes_of(folder, progress, config, 5, **how)
    folder.config.write_text("nonsense")
    with pytest.raises(ConfigError, match=r"other settings of train, and .*config.yaml does not say which"):
        changes_of(folder, progress, config, 5, **how)


def test_what_would_not_fit_a_commit_is_not_recorded(source, tmp_path):
    config = configured(source, tmp_path / "run")
    many = config.data.model_copy(update={"train": ["x" * 100] * 100})
    found = recorded_settings(config.model_copy(update={"data": many}), 7)
    assert "data.train" not in found
    assert (found["train.max_steps"], found["memory.commit_every"]) == (7, 1)
