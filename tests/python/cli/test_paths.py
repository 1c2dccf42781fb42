"""Paths: commands that are printed work from any folder, and names of any letters under any locale."""

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from megatrain_io.cli.app import app
from runs import check_equals, configured, metrics_of


def call(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments], prog_name="megatrain-io")


def relative(source, folder, **changes):
    """A configuration as a person writes it, with paths from the folder where it lies."""
    config = configured(source, Path("a run"), **changes).model_dump(mode="json")
    config["model"] = "source/model"
    config["data"] |= {"train": ["source/train.jsonl"], "eval": "source/eval.jsonl"}
    (folder / "my.yaml").write_text(yaml.safe_dump(config))
    shutil.copytree(source, folder / "source")


def next_of(run):
    (line,) = [line for line in call("status", run).stdout.splitlines() if line.startswith("next")]
    return shlex.split(line.removeprefix("next").strip())


def test_the_command_that_status_prints_works_from_any_folder(source, whole, tmp_path, monkeypatch):
    """Paths were kept as they had been typed: elsewhere there was "no run to resume"."""
    home, elsewhere = tmp_path / "home", tmp_path / "elsewhere"
    home.mkdir()
    elsewhere.mkdir()
    relative(source, home, memory={"store_dir": ["fast"]})
    monkeypatch.chdir(home)
    with monkeypatch.context() as patch:
        patch.setattr("megatrain_io.runs.metrics.MetricsFile.append", _interrupted_at(2))
        assert call("train", "--config", "my.yaml").exit_code == 130
    command = next_of("a run")
    monkeypatch.chdir(elsewhere)
    assert command == next_of(home / "a run")
    ended = call(*command[1:])
    assert ended.exit_code == 0, ended.stderr
    check_equals(home / "a run", whole)
    assert list(elsewhere.iterdir()) == []
    done = next_of(home / "a run")
    assert done[1:5] == ["megatrain-io", "generate", str(home / "a run"), "--prompt"]
    assert call("generate", done[3], "--prompt", "the").exit_code == 0


def test_a_run_that_was_moved_is_resumed_with_the_command_of_its_status(
    source, whole, stopped, tmp_path, monkeypatch
):
    moved = stopped.rename(tmp_path / "moved")
    (moved / "config.yaml").write_text(configured(source, stopped).to_yaml())
    monkeypatch.chdir("/")
    command = next_of(moved)
    assert f"output_dir={moved}" in command
    assert call(*command[1:]).exit_code == 0
    check_equals(moved, whole)


def test_a_run_that_is_not_found_says_where_it_was_looked_for(source, tmp_path, monkeypatch):
    relative(source, tmp_path)
    monkeypatch.chdir(tmp_path)
    ended = call("train", "--config", "my.yaml", "--resume")
    assert ended.exit_code == 2
    assert f"{tmp_path / 'a run'} has no run to resume" in ended.stderr
    assert f"meant from the current directory, {tmp_path}" in ended.stderr


def _interrupted_at(step):
    from megatrain_io.runs.metrics import MetricsFile

    append = MetricsFile.append

    def interrupted(self, report):
        append(self, report)
        if report.step == step:
            raise KeyboardInterrupt

    return interrupted


def test_a_name_that_is_no_text_is_refused_with_a_sentence(source, tmp_path):
    strange = tmp_path / os.fsdecode(b"caf\xe9")
    strange.mkdir()
    for arguments in (("import", source / "model", strange / "run"), ("import", strange, tmp_path / "run")):
        ended = call(*arguments)
        assert ended.exit_code == 2, ended.exception
        assert "bytes that are no UTF-8" in ended.stderr
    assert list(strange.iterdir()) == []


@pytest.mark.slow
def test_names_of_any_letters_work_under_an_ascii_locale(source, tmp_path):
    """A path with an umlaut ended in a UnicodeEncodeError."""
    home = tmp_path / "Über Größe \N{SNOWMAN}"
    home.mkdir()
    relative(source, home, max_steps=1)
    environment = {
        "PATH": os.environ["PATH"], "PYTHONPATH": os.pathsep.join(sys.path), "LC_ALL": "C", "PYTHONUTF8": "0",
        "PYTHONCOERCECLOCALE": "0", "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    for arguments in (
        ("train", "--config", home / "my.yaml"),
        ("status", home / "a run"),
        ("train", "--config", home / "nö.yaml"),
    ):
        command = [sys.executable, "-m", "megatrain_io", *map(str, arguments)]
        ended = subprocess.run(command, cwd=home, env=environment, capture_output=True, check=False)
        shown = (ended.stdout + ended.stderr).decode()
        assert ended.returncode == (2 if "nö" in str(arguments[-1]) else 0), shown
        assert "Traceback" not in shown
        if arguments[0] == "status":
            assert str(home) in shown
    assert len(metrics_of(home / "a run")) == 1
