"""Training as a whole: what a run leaves behind, how it goes on after any end, and what is refused."""

import json
import math
import os
import re
import shutil
import subprocess
import sys
from unittest.mock import Mock

import pytest
import torch
from transformers import get_scheduler
from typer.testing import CliRunner

from corpus import write
from megatrain_io.cli.app import app
from megatrain_io.config.parse import load
from megatrain_io.config.schema import TrainConfig
from megatrain_io.errors import (
    ConfigError,
    DataError,
    InterruptedRunError,
    TrainingDivergedError,
)
from megatrain_io.paging.paged_model import PagedPartition
from megatrain_io.paging.step import Step
from megatrain_io.runs.import_model import ModelImport
from megatrain_io.runs.metrics import MetricsFile
from megatrain_io.runs.state import TrainerState
from megatrain_io.training.lr_schedule import learning_rate_at
from paged import DEVICE, differing
from runs import (
    STEPS,
    blob_of,
    check_equals,
    configured,
    metrics_of,
    planes_of,
    start,
)

# ------------------------------------------------------------------------------------ a run that ends


def test_what_a_run_leaves_behind(source, whole):
    run, _, result, reporter = whole
    lines = metrics_of(run)
    assert [line["step"] for line in lines] == [*range(1, STEPS + 1)]
    assert [report.loss for report in reporter.reports] == [line["loss"] for line in lines]
    assert [line["eval_loss"] is not None for line in lines] == [False] * (STEPS - 1) + [True]
    assert (result.steps, result.loss) == (STEPS, lines[-1]["loss"])
    assert result.eval_loss == lines[-1]["eval_loss"]
    assert result.eval_loss < result.eval_loss_before
    assert result.eval_loss_before == pytest.approx(math.log(263), rel=0.05)
    assert sum(line["written_bytes"] for line in lines) <= result.written_bytes_total
    assert lines[-1]["written_bytes_total"] <= result.written_bytes_total
    for line in lines:
        assert set(line["stalled"]) == {"read", "pool", "write", "update", "commit", "inputs"}
        assert line["stalled_seconds"] == pytest.approx(sum(line["stalled"].values()))
    # Before the evaluation the run waits for the last step's durability.
    assert lines[-1]["stalled"]["commit"] > 0
    assert result.read_bytes_per_parameter_and_step > 10
    assert result.peak_ram_bytes > 0
    assert load(run / "config.yaml")[0] == configured(source, run, precision="bf16"), "auto was resolved"
    [(step, max_steps, notes)] = reporter.starts
    assert (step, max_steps) == (0, STEPS)
    assert notes[0].startswith("imported ")
    blob = blob_of(run)
    assert (blob["step"], blob["loss"]) == (STEPS, result.loss)
    assert blob["eval_loss_before"] == result.eval_loss_before


def test_held_out_loss_every_so_many_steps(source, whole, tmp_path):
    start(configured(source, tmp_path / "run", eval_steps=2))
    check_equals(tmp_path / "run", whole)
    assert [line["step"] for line in metrics_of(tmp_path / "run") if line["eval_loss"]] == [2, 4, 5]


@pytest.mark.parametrize("name", ["cosine", "linear", "constant"])
@pytest.mark.parametrize("warmup", [0, 1, 4, 12])
def test_learning_rates_are_those_of_transformers(name, warmup):
    steps, rate = 12, 3e-4
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=rate)
    kind = "constant_with_warmup" if name == "constant" else name
    scheduler = get_scheduler(kind, optimizer, num_warmup_steps=warmup, num_training_steps=steps)
    config = TrainConfig(learning_rate=rate, lr_scheduler_type=name, warmup_steps=warmup)
    for step in range(1, steps + 1):
        assert learning_rate_at(config, step, steps) == scheduler.get_last_lr()[0], step
        optimizer.step()
        scheduler.step()


# ------------------------------------------------------------------------------- ends, and going on


@pytest.mark.slow
@pytest.mark.parametrize(("stop", "commit_every", "kept"), [(1, 1, 1), (4, 1, 4), (3, 2, 3), (1, 3, 1)])
def test_an_interrupted_run_goes_on_to_the_same_bits(source, whole, tmp_path, stop, commit_every, kept):
    config = configured(source, tmp_path / "run", memory={"commit_every": commit_every})
    with pytest.raises(InterruptedRunError, match=f"step {kept} .*--resume") as caught:
        start(config, stop=stop)
    assert caught.value.exit_code == 130
    assert blob_of(config.output_dir)["step"] == kept
    result, reporter = start(config, resume=True)
    assert reporter.starts[0][:2] == (kept, STEPS)
    assert result.eval_loss_before == whole[2].eval_loss_before
    assert result.steps == STEPS
    check_equals(config.output_dir, whole)


def test_an_interrupt_in_the_middle_of_a_step(source, whole, tmp_path, monkeypatch):
    config = configured(source, tmp_path / "run")
    block_backward = Step._block_backward

    def interrupted(step, block, index, *arguments):
        if (step._number, block, index) == (2, 0, 1):
            raise KeyboardInterrupt
        return block_backward(step, block, index, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Step, "_block_backward", interrupted)
        with pytest.raises(InterruptedRunError, match="step 1 "):
            start(config)
    start(config, resume=True)
    check_equals(config.output_dir, whole)


def test_an_interrupt_of_the_import_leaves_nothing_to_resume(source, tmp_path, monkeypatch):
    monkeypatch.setattr(ModelImport, "write", Mock(side_effect=KeyboardInterrupt))
    with pytest.raises(InterruptedRunError, match="without --resume"):
        start(configured(source, tmp_path / "run"))


def test_an_interrupt_before_the_first_step(source, whole, tmp_path, monkeypatch):
    config = configured(source, tmp_path / "run")
    with monkeypatch.context() as patch:
        patch.setattr(PagedPartition, "evaluate", Mock(side_effect=KeyboardInterrupt))
        with pytest.raises(InterruptedRunError, match="step 0 "):
            start(config)
    start(config)  # nothing was trained: this is not a resume
    check_equals(config.output_dir, whole)


KILLED = """
import os, sys
from megatrain_io.paging.step import Step

backward = Step.backward

def blocked(step):
    if step._number == 3:
        os.write(1, b"x")
        sys.stdin.read()  # until killed, with the update of the last record under way
    backward(step)

Step.backward = blocked
from megatrain_io.__main__ import main
main()
"""


@pytest.mark.slow
def test_a_killed_run_goes_on_from_the_command_line(source, whole, tmp_path):
    run = tmp_path / "run"
    config = configured(source, run)
    (tmp_path / "run.yaml").write_text(config.to_yaml())
    arguments = ["train", "--config", str(tmp_path / "run.yaml")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    environment |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    with subprocess.Popen(
        [sys.executable, "-c", KILLED, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=environment,
    ) as process:
        assert process.stdout.read(1) == b"x"
        process.kill()
    assert process.returncode == -9
    assert [line["step"] for line in metrics_of(run)] == [1, 2]
    # What a life that lost its third step may leave, cut short.
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({**metrics_of(run)[1], "step": 3, "loss": -1.0}) + '\n{"step": 4, "lo')
    ended = CliRunner().invoke(app, [*arguments, "--resume", "--json"], prog_name="megatrain-io")
    assert ended.exit_code == 0, ended.stderr
    assert json.loads(ended.stdout)["steps"] == STEPS
    check_equals(run, whole)


def test_metrics_end_at_the_committed_step(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"step": 4, "lo')
    MetricsFile(path, TrainerState(step=2)).close()
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'


# ------------------------------------------------------------------------------------ what is refused


def test_a_second_start_must_say_resume(source, stopped):
    before = planes_of(stopped)
    with pytest.raises(ConfigError, match=r"run at step 3: .*--resume"):
        start(configured(source, stopped))
    assert differing(planes_of(stopped), before) == []


def test_resume_needs_a_run(source, tmp_path):
    with pytest.raises(ConfigError, match="no run to resume"):
        start(configured(source, tmp_path / "run"), resume=True)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (
            {"data": "other.jsonl"},
            r"other data .*: data.train was \[.*train.jsonl\"\] and is \[.*other.jsonl",
        ),
        (
            {"gradient_accumulation_steps": 1},
            r"other settings: train.gradient_accumulation_steps was 2 and is 1\.",
        ),
        ({"seed": 7}, "train.seed was 42 and is 7"),
        ({"max_steps": 2}, "train.max_steps was 5 and is 2, and the run has done 3 steps: .* above 3"),
        ({"precision": "fp32"}, "precision is fp32, .* imported with bf16"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_what_decides_the_bits_must_not_change(source, whole, stopped, changes, reason):
    saved = {path.name: path.read_bytes() for path in (stopped / "model").iterdir()}
    config, metrics = (stopped / "config.yaml").read_text(), metrics_of(stopped)
    with pytest.raises(ConfigError, match=reason):
        start(configured(source, stopped, **changes), resume=True)
    assert {path.name: path.read_bytes() for path in (stopped / "model").iterdir()} == saved
    assert ((stopped / "config.yaml").read_text(), metrics_of(stopped)) == (config, metrics)
    if "data" in changes:
        start(configured(source, stopped), resume=True)
        check_equals(stopped, whole)


@pytest.mark.skipif(DEVICE != "cpu", reason="RAM holds chunks alone there: less is enough")
def test_what_does_not_fit_is_refused_before_the_import_with_what_would(source, whole, tmp_path):
    run = tmp_path / "run"
    with pytest.raises(
        ConfigError, match=r"memory.ram is 1.0 MiB, and this training needs [\d.]+ MiB at least"
    ) as found:
        start(configured(source, run, memory={"ram": "1MiB"}))
    assert [path.name for path in run.iterdir()] == ["data"]
    least = re.search(r"needs ([\d.]+ ?MiB) at least", str(found.value))[1].replace(" ", "")
    start(configured(source, run, memory={"ram": least}))
    check_equals(run, whole)


def test_data_that_cannot_be_read_is_found_before_the_import(source, tmp_path):
    (tmp_path / "broken.jsonl").write_text('{"text": "one"}\nnot json\n')
    config = configured(source, tmp_path / "run", data=tmp_path / "broken.jsonl")
    with pytest.raises(DataError, match=r"broken\.jsonl"):
        start(config)
    assert not list((tmp_path / "run").glob("store*"))


def test_another_model_is_refused(source, stopped, tmp_path):
    shutil.copytree(source / "model", tmp_path / "other" / "model")
    shutil.copy(source / "train.jsonl", tmp_path / "other")
    shutil.copy(source / "eval.jsonl", tmp_path / "other")
    with pytest.raises(ConfigError, match="imported from"):
        start(configured(tmp_path / "other", stopped), resume=True)


def test_a_refused_template_does_not_become_the_models(source, tmp_path):
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]
    write(tmp_path / "chat.jsonl", [{"messages": turns}] * 4)

    def config(template):
        made = configured(source, tmp_path / "run", gradient_accumulation_steps=1)
        data = made.data.model_copy(
            update={"train": [str(tmp_path / "chat.jsonl")], "eval": None, "chat_template": template}
        )
        return made.model_copy(update={"data": data})

    with pytest.raises(InterruptedRunError):
        start(config("chatml"), stop=1)
    folder = tmp_path / "run" / "model"
    saved = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert any(b"<|im_start|>" in content for content in saved.values())
    other = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    with pytest.raises(ConfigError, match="other data"):
        start(config(other), resume=True)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == saved
    assert start(config("chatml"), resume=True)[0].steps == 2


def test_another_seed_that_holds_out_another_share_is_named(source, tmp_path):
    """It was said that the files had changed."""

    def config(seed):
        asked = configured(source, tmp_path / "run", seed=seed, max_steps=2)
        return asked.model_copy(update={"data": asked.data.model_copy(update={"eval": 0.2})})

    with pytest.raises(InterruptedRunError):
        start(config(1), stop=1)
    with pytest.raises(ConfigError, match=r"with other data .*: train\.seed was 1 and is 2\. Resume"):
        start(config(2), resume=True)


def test_a_finished_run_has_nothing_left(source, whole):
    with pytest.raises(ConfigError, match=f"all its {STEPS} steps"):
        start(configured(source, whole[0]), resume=True)
    check_equals(whole[0], whole)


# ---------------------------------------------------------------------------------------- divergence


def test_a_loss_that_is_not_finite_drops_its_step(source, whole, tmp_path, monkeypatch):
    config = configured(source, tmp_path / "run")
    slices = Step._head_slices

    def diverging(step, *arguments, **keywords):
        loss = slices(step, *arguments, **keywords)
        return loss * math.nan if (step._number, arguments[0]) == (3, 1) else loss

    with monkeypatch.context() as patch:
        patch.setattr(Step, "_head_slices", diverging)
        with pytest.raises(TrainingDivergedError, match="step 3 is nan") as caught:
            start(config)
    assert caught.value.exit_code == 7
    assert blob_of(config.output_dir)["step"] == 2
    assert len(metrics_of(config.output_dir)) == 2
    start(config, resume=True)
    check_equals(config.output_dir, whole)


def test_divergence_has_an_exit_code(source, tmp_path):
    config = configured(source, tmp_path / "run", learning_rate=1e30, warmup_steps=0)
    (tmp_path / "run.yaml").write_text(config.to_yaml())
    arguments = ["train", "--config", str(tmp_path / "run.yaml"), "--json"]
    ended = CliRunner().invoke(app, arguments, prog_name="megatrain-io")
    assert ended.exit_code == 7
    assert json.loads(ended.stdout)["error"]["kind"] == "TrainingDivergedError"
    assert "learning rate" in ended.stderr
    step = blob_of(config.output_dir)["step"]
    assert step >= 1
    assert [line["step"] for line in metrics_of(config.output_dir)] == [*range(1, step + 1)]
    planes_of(config.output_dir)  # verifies
