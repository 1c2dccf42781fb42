"""Text from outside that steers a terminal, or looks like a line of ours, is shown and never sent there as it is."""

import json
import os
import pty
import re
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from megatrain_io.cli.app import app
from megatrain_io.text import visible

# Sets the window's title, clears the screen, turns the direction of writing, and begins lines of its own.
EVIL = "\x1b]0;owned\x07\x1b[2J\u202eabc\r\x9b31m[bold]\nmegatrain-io: all is well"
RAW = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]|^megatrain-io: all is well", re.MULTILINE
)


def call(*words):
    done = CliRunner().invoke(app, [str(word) for word in words], prog_name="megatrain-io")
    assert isinstance(done.exception, SystemExit | None), done.exception
    return done


def refused(*words):
    done = call(*words)
    assert done.exit_code in {2, 3, 4, 5}
    assert done.stderr.startswith("megatrain-io: ")
    return done.output


def train(model, data, tmp_path, *more):
    return (
        "train",
        f"model={model}",
        f"output_dir={tmp_path / 'run'}",
        f"data.train={data}",
        "max_steps=1",
        *more,
    )


@pytest.fixture
def model(source, tmp_path):
    return shutil.copytree(source / "model", tmp_path / "model")


def of_a_key(model, source, tmp_path):
    return refused(*train(model, source / "train.jsonl", tmp_path, f"train.{EVIL}=1"))


def of_a_config_file(_model, _source, tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(json.dumps({"model": EVIL, EVIL: EVIL, "train": {"device": EVIL, EVIL: 1}}))
    return refused("train", "--config", path)


def of_a_data_key(model, _source, tmp_path):
    data = tmp_path / "data.jsonl"
    data.write_text(json.dumps({EVIL: "text", "other": 1}) + "\n")
    return refused(*train(model, data, tmp_path))


def of_a_file_name(model, _source, tmp_path):
    folder = tmp_path / f"data {EVIL}"
    folder.mkdir()
    (folder / f"{EVIL.replace('/', '')}.jsonl").write_text("{broken\n")
    return refused(*train(model, folder, tmp_path))


def of_a_skipped_file(model, source, tmp_path):
    (tmp_path / "data").mkdir()
    shutil.copy(source / "train.jsonl", tmp_path / "data")
    (tmp_path / "data" / f"{EVIL}.bin").write_bytes(b"\0\1")
    done = call(*train(model, tmp_path / "data", tmp_path))
    assert done.exit_code == 0, done.output
    return done.output


def of_the_sample(model, _source, tmp_path):
    data = tmp_path / "data.jsonl"
    data.write_text(json.dumps({"text": EVIL}) + "\n")
    done = call(*train(model, data, tmp_path))
    assert done.exit_code == 0, done.output
    assert "]0;owned" in done.output
    return done.output


def of_a_tensor(model, _source, tmp_path):
    tensors = load_file(model / "model.safetensors")
    save_file({**tensors, EVIL: torch.zeros(4)}, model / "model.safetensors")
    return refused("import", model, tmp_path / "run")


def of_a_model_type(model, _source, tmp_path):
    (model / "config.json").write_text(json.dumps({"model_type": EVIL, "architectures": [EVIL]}))
    return refused("import", model, tmp_path / "run")


def of_a_template(model, _source, tmp_path):
    (model / "chat_template.jinja").write_text("{{ raise_exception(" + json.dumps(EVIL) + ") }}")
    data = tmp_path / "data.jsonl"
    turns = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "I."}]
    data.write_text(json.dumps({"messages": turns}) + "\n")
    return refused(*train(model, data, tmp_path))


def of_a_run_folder(model, _source, tmp_path):
    run = tmp_path / f"run {EVIL}"
    assert call("import", model, run).exit_code == 0
    return "".join(call(*words).output for words in (["status", run], ["verify", run], ["clean", run]))


@pytest.mark.parametrize(
    "case",
    [
        of_a_key,
        of_a_config_file,
        of_a_data_key,
        of_a_file_name,
        of_a_skipped_file,
        of_the_sample,
        of_a_tensor,
        of_a_model_type,
        of_a_template,
        of_a_run_folder,
    ],
    ids=lambda case: case.__name__,
)
def test_no_text_from_outside_steers_a_terminal(case, model, source, tmp_path):
    shown = case(model, source, tmp_path)
    assert RAW.search(shown) is None, shown


NAME = "a" * 300


@pytest.mark.parametrize(
    "words",
    [
        *(
            ["status", NAME],
            ["verify", NAME],
            ["clean", NAME],
            ["export", NAME, "out"],
            ["export", "/dev/null", "out"],
        ),
        *(
            ["generate", NAME, "-p", "hi"],
            ["import", NAME, "run"],
            ["import", "/dev/null", "run"],
            ["plan", NAME],
        ),
        *(["plan", "/dev/zero"], ["plan", ".", "--on", NAME], ["bench", NAME], ["doctor", NAME]),
        *(["train", "--config", NAME], ["train", "--trace", NAME, "model=m", "output_dir=o", "data.train=t"]),
    ],
    ids=" ".join,
)
def test_a_path_that_no_file_has_is_one_sentence(words, tmp_path, monkeypatch):
    """A name of 300 bytes ended in a traceback of ``lstat``."""
    monkeypatch.chdir(tmp_path)
    assert refused(*words).count("\n") == 1
    assert [*tmp_path.iterdir()] == []


def test_what_a_terminal_may_be_given():
    assert visible("a\tb \u00e4\u4e2d\U0001f600\n  indented") == "a\tb \u00e4\u4e2d\U0001f600\n  indented"
    assert visible("\x1b[2J\x9b\r\u202e\ud800\nline") == "\\x1b[2J\\x9b\\r\\u202e\\ud800\\nline"


def test_what_a_model_says_is_shown_on_a_terminal_and_left_alone_in_a_pipe():
    code = (
        "from megatrain_io.cli.result import command\n"
        "with command(json_output=False, interrupted='') as result: result.text = '\\x1b[2J\\n\\ta'"
    )
    piped = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    assert piped.stdout == b"\x1b[2J\n\ta\n"
    ours, theirs = pty.openpty()
    subprocess.run([sys.executable, "-c", code], stdout=theirs, check=True)
    assert os.read(ours, 100).splitlines() == [b"\\x1b[2J", b"\ta"]
    os.close(theirs)
    os.close(ours)
