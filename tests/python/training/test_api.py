"""What the package offers from Python: the bits of the command line, own data, own callbacks, own devices."""

import importlib.util
import json
import pydoc
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

import pytest
import torch
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import megatrain_io as mt
from megatrain_io.cli.app import app
from megatrain_io.data.batch import MicroBatch
from megatrain_io.errors import ConfigError, DataError, UnsupportedModelError
from megatrain_io.paging.device.simulated import SimulatedDevice
from megatrain_io.training.callbacks import Callback
from paged import differing
from runs import STEPS, blob_of, check_equals, configured, figures, metrics_of, planes_of, start

README = Path(__file__).parents[3] / "README.md"
EXAMPLE = Path(__file__).parents[1] / "examples" / "trainer.py"


class Told(Callback):
    """Writes down what it is told, and in which order."""

    def __init__(self):
        self.events = []

    def on_start(self, run):
        self.events.append(("start", run.step, run.max_steps))

    def on_evaluate(self, run, loss):
        self.events.append(("evaluate", run.step, loss))

    def on_step(self, run, report):
        self.events.append(("step", run.step, report.eval_loss))

    def on_pause(self, run, reason):
        self.events.append(("pause", run.step, reason))

    def on_end(self, run):
        self.events.append(("end", run.step, None))


class StopAt(Callback):
    def __init__(self, step):
        self.step = step

    def on_step(self, run, report):
        if run.step == self.step:
            run.stop()


def by_command(config, *arguments):
    """Train by the command line."""
    config.output_dir.parent.mkdir(parents=True, exist_ok=True)
    path = config.output_dir.parent / "by_command.yaml"
    path.write_text(config.to_yaml())
    done = CliRunner().invoke(app, ["train", "--config", str(path), *arguments])
    assert done.exit_code == 0, done.output


def same_run(one, other):
    """Losses, learning rates and all planes are equal to the bit."""
    assert figures(one) == figures(other)
    assert [line["eval_loss"] for line in metrics_of(one)] == [
        line["eval_loss"] for line in metrics_of(other)
    ]
    assert differing(planes_of(one), planes_of(other)) == []


# ------------------------------------------------------------------------------------------------ examples


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("trainer_example", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_example_has_the_bits_of_the_command_line(example, source, tmp_path, capsys):
    result = example.main(source / "model", tmp_path / "run")
    assert result.steps > 1
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in example.rows()))
    written = mt.load_config(tmp_path / "run" / "config.yaml")
    data = written.data.model_copy(update={"train": [str(rows)]})
    by_command(written.model_copy(update={"output_dir": tmp_path / "command", "data": data}))
    same_run(tmp_path / "run", tmp_path / "command")
    out = capsys.readouterr().out
    last = metrics_of(tmp_path / "run")[-1]
    assert f"held-out loss: {last['eval_loss']}" in out, (
        "what is evaluated afterwards is what training has measured"
    )
    assert re.search(r"^the quick brown -> ", out, re.MULTILINE)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "trained", dtype="auto")
    weights = {
        name: tensor for (name, plane), tensor in planes_of(tmp_path / "run").items() if plane == "weight"
    }
    assert differing({name: p.detach() for name, p in loaded.named_parameters()}, weights) == []


def test_the_block_of_the_readme_is_what_it_says(source, tmp_path, monkeypatch):
    """Every block of Python in it that uses the package runs, one after the other."""
    blocks = re.findall(r"```python\n(.*?)```", README.read_text("utf-8"), re.DOTALL)
    assert any("mt.Trainer(" in block for block in blocks)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").symlink_to(source / "model")
    (tmp_path / "text.jsonl").write_text((source / "train.jsonl").read_text())
    (tmp_path / "my.yaml").write_text(
        re.search(r"```yaml\n(.*?)```", README.read_text("utf-8"), re.DOTALL)[1]
    )
    for block in blocks:
        if "mt.Trainer(" in block:
            exec(compile(block, "README.md", "exec"), {"__name__": "readme"})  # noqa: S102 - it is ours
    assert (tmp_path / "trained" / "model.safetensors").exists()


def test_the_help_of_the_trainer_reads_on_its_own():
    text = pydoc.plain(pydoc.render_doc(mt.Trainer))
    for word in (
        "plan(self)",
        "train(self",
        "evaluate(self)",
        "generate(",
        "export(",
        "close(self)",
        "callbacks:",
        "data:",
    ):
        assert word in text
    for name in mt.__all__:
        assert getattr(mt, name).__doc__, name


# --------------------------------------------------------------------------------------------- the package


def test_the_package_names_what_it_has():
    assert {*mt.__all__} <= {*dir(mt)}
    assert re.fullmatch(r"\d+\.\d+\.\d+\S*", mt.__version__)
    with pytest.raises(AttributeError, match="no attribute 'trainer'"):
        mt.trainer  # noqa: B018


def test_importing_the_package_imports_no_torch():
    code = "import sys, megatrain_io; dir(megatrain_io); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_configuration_may_be_a_file_a_mapping_or_itself(source, tmp_path):
    config = configured(source, tmp_path / "run")
    path = tmp_path / "run.yaml"
    path.write_text(config.to_yaml())
    nested = config.model_dump(mode="json")
    dotted = {
        f"{section}.{key}": value
        for section in ("data", "train", "memory")
        for key, value in nested[section].items()
    }
    dotted |= {"model": config.model, "output_dir": config.output_dir}
    for given in (config, path, str(path), nested, dotted):
        assert mt.Trainer(given).config == config
    assert mt.load_config(nested, {"train.seed": 7}).train.seed == 7
    with pytest.raises(
        ConfigError, match=r"train\.sed: unknown key \(in the mapping\)\. Did you mean seed\?"
    ):
        mt.load_config(nested, {"train.sed": 7})


# ------------------------------------------------------------------------------------------------ training


def test_training_from_python_has_the_bits_of_the_command_line(source, whole, tmp_path):
    told = Told()
    config = configured(source, tmp_path / "run")
    result = mt.train(config.model_dump(mode="json"), callbacks=[told])
    check_equals(tmp_path / "run", whole)
    by_command(configured(source, tmp_path / "command"))
    same_run(tmp_path / "run", tmp_path / "command")
    first, second, *steps, evaluated, last, end = told.events
    assert first == ("start", 0, STEPS)
    assert second == ("evaluate", 0, result.eval_loss_before)
    assert steps == [("step", step, None) for step in range(1, STEPS)]
    assert evaluated == ("evaluate", STEPS, result.eval_loss)
    assert last == ("step", STEPS, result.eval_loss)
    assert end == ("end", STEPS, None)


def test_a_callback_stops_a_run_at_a_commit_and_it_goes_on_with_the_same_bits(source, whole, tmp_path):
    class Stop(Told):
        def on_step(self, run, report):
            super().on_step(run, report)
            if run.step == 1:
                run.stop()

    # What is kept in RAM from step to step is written by one step more.
    for commit_every, stops_at in ((1, {1}), (4, {1, 2})):
        told, run = Stop(), tmp_path / f"every {commit_every}"
        config = configured(source, run, memory={"commit_every": commit_every})
        result, _ = start(config, callbacks=[told])
        assert result.steps in stops_at
        assert told.events[-2:] == [
            ("pause", result.steps, "a callback has stopped it"),
            ("end", result.steps, None),
        ]
        start(config, resume=True)
        check_equals(run, whole)


def test_a_callback_lets_the_next_step_be_committed(source, whole, tmp_path):
    class Asks(Callback):
        def on_step(self, run, report):
            if run.step == 1:
                run.commit_next()
            if run.step == 3:
                raise KeyError(report.step)

    config = configured(source, tmp_path / "run", memory={"commit_every": 4})
    with pytest.raises(KeyError, match="3"):
        start(config, callbacks=[Asks()])
    assert blob_of(tmp_path / "run")["step"] == 2, "neither the first nor the third"
    start(config, resume=True)
    check_equals(tmp_path / "run", whole)


def test_an_error_of_a_callback_ends_the_run_and_all_are_told(source, whole, tmp_path):
    class Broken(Callback):
        def on_step(self, run, report):
            raise KeyError(report.step)

        def on_end(self, run):
            raise OSError("and again")

    told = Told()
    config = configured(source, tmp_path / "run")
    with pytest.raises(KeyError, match="1"):
        start(config, callbacks=[Broken(), told])
    assert told.events[-1] == ("end", 1, None)
    start(config, resume=True)
    check_equals(tmp_path / "run", whole)


def test_what_is_no_callback_is_refused_at_once(source, tmp_path):
    for wrong in (Told, print):
        with pytest.raises(
            ConfigError, match=r"callbacks holds .*: give objects of classes that are derived"
        ):
            mt.Trainer(configured(source, tmp_path / "run"), callbacks=[wrong])


def test_a_plan_imports_nothing_and_is_the_plan_of_the_run(source, tmp_path):
    config = configured(source, tmp_path / "run", memory={"ram": "8MiB"})
    with mt.Trainer(config) as trainer:
        before = trainer.plan()
        assert not trainer.folder.is_imported
        assert not trainer.folder.own_store.exists()
        plans = []
        started = type("Started", (Callback,), {"on_start": lambda _, run: plans.append(run.plan)})()
        mt.train(config, callbacks=[started])
        after = trainer.plan()
    assert before.memory.pool == plans[0].memory.pool == after.memory.pool
    assert before.phases == plans[0].phases == after.phases
    assert before.steps == STEPS


def test_evaluating_and_asking_leave_the_run_as_it_is(source, stopped):
    planes, files = planes_of(stopped), ("config.yaml", "metrics.jsonl")
    before = [(stopped / name).read_bytes() for name in files]
    with mt.Trainer(configured(source, stopped)) as trainer:
        loss = trainer.evaluate()
        assert loss == trainer.evaluate()
        text = trainer.generate("the quick", max_new_tokens=4)
        assert trainer.generate("the quick", max_new_tokens=4) == text
        trainer.export(stopped.with_name("out"))  # closes what asking has opened
    assert differing(planes_of(stopped), planes) == []
    assert [(stopped / name).read_bytes() for name in files] == before


def test_nothing_to_evaluate_is_said(source, tmp_path):
    config = configured(source, tmp_path / "run")
    config = config.model_copy(update={"data": config.data.model_copy(update={"eval": None})})
    with mt.Trainer(config) as trainer, pytest.raises(ConfigError, match=r"give data\.eval"):
        trainer.evaluate()


class Lent(SimulatedDevice):
    """A device that belongs to the caller, and knows how often it was closed."""

    closed = 0

    def close(self):
        self.closed += 1
        super().close()


def test_a_device_that_is_handed_in_stays_open(source, whole, tmp_path):
    device = Lent(1)
    with mt.Trainer(configured(source, tmp_path / "run"), device=device) as trainer:
        trainer.train()
        assert device.closed == 0
        assert trainer.generate("the quick", max_new_tokens=4)
    assert device.closed == 0
    device.close()
    check_equals(tmp_path / "run", whole)


def test_a_device_without_room_for_a_block_stays_open_while_the_cpu_answers(stopped):
    """It was closed, although the caller had handed it in."""
    device = Lent(1, nbytes=1)
    with mt.Generator.open(stopped, device=device) as generator:
        assert generator.complete("the quick", max_new_tokens=4)
    assert device.closed == 0
    device.close()


@pytest.mark.slow
def test_a_tokenizer_that_brings_code_is_refused_and_the_code_is_not_run(source, tmp_path, monkeypatch):
    """Where nobody says no, transformers asks on the terminal whether to run it: nobody is asked."""
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    model = Path(shutil.copytree(source / "model", tmp_path / "model"))
    (model / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Evil: pass\n")
    path = model / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    settings |= {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}}
    path.write_text(json.dumps(settings))
    config = configured(source, tmp_path / "run").model_copy(update={"model": model})
    with pytest.raises(UnsupportedModelError, match="code that comes with a model is not run"):
        mt.train(config)
    assert not (tmp_path / "ran").exists()
    assert not (tmp_path / "run" / "run.json").exists()


# ------------------------------------------------------------------------------------------------ own data


def own_micro_batches(count, rows=2):
    random = torch.Generator().manual_seed(1)
    batches = []
    for index in range(count):
        ids = torch.randint(5, 200, (rows, 12 + index % 4), generator=random)
        batches.append(MicroBatch(ids, torch.nn.functional.pad(ids, (0, 1), value=-100)[:, 1:].contiguous()))
    return batches


def without_data(config):
    settings = config.model_dump(mode="json")
    settings["data"] = {"max_length": 64, "packing": False}
    return settings


def test_micro_batches_of_ones_own_are_trained_in_their_order_and_resumed(source, tmp_path):
    batches = own_micro_batches(5)
    settings = without_data(
        configured(source, tmp_path / "whole", num_train_epochs=2, gradient_accumulation_steps=2)
    )
    result = mt.train(settings, data=batches)
    assert result.steps == 5  # ten micro-batches, two a step
    tokens = [line["tokens"] for line in metrics_of(tmp_path / "whole")]
    assert tokens == [
        sum(batches[index % 5].input_ids.numel() for index in (2 * step, 2 * step + 1)) for step in range(5)
    ]
    again = settings | {"output_dir": str(tmp_path / "again")}

    assert mt.train(again, data=iter(batches), callbacks=[StopAt(2)]).steps == 2
    with pytest.raises(ConfigError, match="with other data"):
        mt.train(again, data=batches[::-1], resume=True)
    mt.train(again, data=batches, resume=True)
    same_run(tmp_path / "whole", tmp_path / "again")


def test_rows_of_ones_own_need_no_file_and_the_command_line_goes_on_with_them(source, whole, tmp_path):
    rows = [json.loads(line) for line in (source / "train.jsonl").read_text().splitlines()]
    config = configured(source, tmp_path / "run")
    settings = config.model_dump(mode="json")
    del settings["data"]["train"]

    assert mt.train(settings, data=rows, callbacks=[StopAt(2)]).steps == 2
    by_command(mt.load_config(tmp_path / "run" / "config.yaml"), "--resume")
    check_equals(tmp_path / "run", whole)


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        ([], DataError, "data holds nothing"),
        ([7], ConfigError, "data holds a int"),
        ([{"text": {1, 2}}], DataError, "row 0 of data cannot be written as JSON"),
        ([{"text": "x"}, ["x"]], DataError, "row 1 of data is a list, and the first is a mapping"),
        ([*own_micro_batches(1), {"text": "x"}], DataError, "entry 1 of data is a dict"),
        (
            [replace(own_micro_batches(1)[0], shift_labels=torch.zeros(2, 3, dtype=torch.int64))],
            DataError,
            r"micro-batch 0 of data: shift_labels of a micro-batch is torch\.int64 \[2, 3\]: it must be int64",
        ),
        (
            [replace(own_micro_batches(1)[0], input_ids=torch.full((2, 12), 4000))],
            DataError,
            "a token is 4000",
        ),
        ([replace(own_micro_batches(1)[0], input_ids=torch.full((2, 12), -1))], DataError, "a token is -1"),
        (
            [replace(own_micro_batches(1)[0], shift_labels=torch.full((2, 12), 4000))],
            DataError,
            "a label is 4000",
        ),
        (
            [replace(own_micro_batches(1)[0], shift_labels=torch.full((2, 12), -100))],
            DataError,
            "has no label",
        ),
        ([replace(own_micro_batches(1)[0], input_ids=torch.ones(2, 12))], DataError, r"float32 \[2, 12\]"),
        (
            [replace(own_micro_batches(1)[0], position_ids=torch.ones(2, 3))],
            DataError,
            r"position_ids .* \[2, 3\]",
        ),
        (
            [replace(own_micro_batches(1)[0], input_ids=[[1, 2]])],
            DataError,
            "input_ids of a micro-batch is a list",
        ),
        ("text", ConfigError, "data is a str"),
        (7, ConfigError, "data is a int"),
    ],
    ids=str,
)
def test_data_that_cannot_be_trained_are_refused_before_the_import(source, tmp_path, data, error, message):
    with pytest.raises(error, match=message):
        mt.train(without_data(configured(source, tmp_path / "run")), data=data)
    assert not (tmp_path / "run" / "run.json").exists()


def test_a_refused_call_leaves_the_rows_of_the_run_alone(source, whole, tmp_path):
    """Once they were written over by what was then refused: the run could not be resumed from its own folder."""
    rows = [json.loads(line) for line in (source / "train.jsonl").read_text().splitlines()]
    settings = configured(source, tmp_path / "run").model_dump(mode="json")
    mt.train(settings, data=rows, callbacks=[StopAt(2)])
    others = [{"text": "something else " * 3}] * 9
    with pytest.raises(ConfigError, match="with other data"):
        mt.train(settings, data=others, resume=True)
    mt.Trainer(settings, data=others).plan()
    by_command(mt.load_config(tmp_path / "run" / "config.yaml"), "--resume")
    check_equals(tmp_path / "run", whole)


class Numbered:
    """As the datasets of torch are: no sequence by its class."""

    def __init__(self, rows):
        self.rows = rows

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return self.rows[index]


def test_data_need_be_no_sequence_and_rows_no_dict(source, whole, tmp_path):
    rows = [MappingProxyType(json.loads(line)) for line in (source / "train.jsonl").read_text().splitlines()]
    settings = configured(source, tmp_path / "run").model_dump(mode="json")
    mt.train(settings, data=Numbered(rows))
    check_equals(tmp_path / "run", whole)


def test_an_error_of_the_callers_own_passes_as_it_is(source, tmp_path):
    """They were taken for errors of the run's drive, with advice about its permissions."""

    class Lost(Callback):
        def on_step(self, run, report):
            raise ConnectionError("my tracker is down")

    with pytest.raises(ConnectionError, match="my tracker is down"):
        mt.train(configured(source, tmp_path / "run"), callbacks=[Lost()])


def test_evaluating_with_another_template_does_not_change_the_run(source, stopped):
    config = configured(source, stopped)
    data = config.data.model_copy(update={"chat_template": "chatml"})
    before = {path.name: path.read_bytes() for path in (stopped / "model").iterdir()}
    with mt.Trainer(config.model_copy(update={"data": data})) as trainer:
        trainer.evaluate()
    assert {path.name: path.read_bytes() for path in (stopped / "model").iterdir()} == before


def test_what_is_held_out_needs_rows(source, tmp_path):
    settings = configured(source, tmp_path / "run").model_dump(mode="json")
    with pytest.raises(ConfigError, match=r"data\.eval is set, and the data are micro-batches of your own"):
        mt.train(settings, data=own_micro_batches(2))
