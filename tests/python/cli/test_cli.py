"""The command line: help at once, one object with --json, the right exit code, and no traceback for our errors.

What the commands call is made up here: each has tests of its own.
"""

import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from typer.testing import CliRunner

from megatrain_io import __main__, errors
from megatrain_io.cli.app import app
from megatrain_io.models.model_options import ModelOptions
from megatrain_io.runs.folder import RunFolder, RunInfo
from megatrain_io.runs.metrics import StepReport
from megatrain_io.store.verify import DamagedExtent, VerifyReport

VERBS = ["import", "train", "generate", "export", "verify", "status", "clean", "doctor", "bench"]
INFO = RunInfo("0.1.0", "bf16", ["store.mtio"], "uuid-1", "/m")
TRAIN = ["train", "model=m", "output_dir=runs/x", "data.train=a.jsonl"]


def call(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments], prog_name="megatrain-io")


@pytest.fixture
def fake(monkeypatch):
    """Puts a made-up module in the place of a heavy one."""

    def fake(name, **attributes):
        module = ModuleType(f"megatrain_io.{name}")
        vars(module).update(attributes)
        monkeypatch.setitem(sys.modules, module.__name__, module)

    return fake


@pytest.fixture
def failing(fake):
    """Makes training end with an error."""

    def failing(error):
        def train(_config, **_):
            raise error

        fake("training.trainer", train=train)

    return failing


# ----------------------------------------------------------------------------------------------- help


@pytest.mark.parametrize(
    "arguments", [["--help"], ["train", "--keys"], ["--version"], *([v, "-h"] for v in VERBS)]
)
def test_help_comes_at_once(arguments):
    """Without torch, transformers and numpy, which take seconds to import."""
    code = (
        "import sys; from megatrain_io.__main__ import main\n"
        "try: main()\n"
        "except SystemExit as end: code = end.code\n"
        "heavy = {'torch', 'transformers', 'numpy'} & sys.modules.keys()\n"
        "sys.exit(code or (f'imported {heavy}' if heavy else 0))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False
    )
    assert (result.returncode, result.stderr) == (0, "")
    expected = {"--keys": "train.learning_rate", "--version": "megatrain-io "}.get(
        arguments[-1], "Usage: megatrain-io"
    )
    assert expected in result.stdout


def test_the_root_lists_every_verb():
    text = call("--help").stdout
    assert [verb for verb in VERBS if f"\n  {verb} " not in text] == []
    assert "130 interrupted" in text


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_json(verb):
    assert "--json" in call(verb, "--help").stdout


def test_python_dash_m():
    command = [sys.executable, "-m", "megatrain_io", "nonsense"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert "No such command 'nonsense'" in result.stderr
    assert "Traceback" not in result.stderr


def test_nothing_is_fetched(monkeypatch):
    seen = {}

    def fake_app(*, prog_name):
        seen.update(__main__.os.environ, prog_name=prog_name)

    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_VERBOSITY", "TOKENIZERS_PARALLELISM", "GOMP_SPINCOUNT"):
        monkeypatch.setenv(name, "x")
    monkeypatch.setattr("megatrain_io.cli.app.app", fake_app)
    __main__.main()
    assert seen["HF_HUB_OFFLINE"] == "1"
    assert seen["TRANSFORMERS_VERBOSITY"] == "error"
    assert seen["TOKENIZERS_PARALLELISM"] == "false"
    assert seen["prog_name"] == "megatrain-io"


def settings_of_libgomp(**environment):
    """What libgomp, which torch computes with, says of itself when the command line has imported torch."""
    code = (
        "import sys, megatrain_io.__main__ as main; sys.argv = ['megatrain-io', '--version']\n"
        "try: main.main()\n"
        "except SystemExit: pass\n"
        "import torch"
    )
    unset = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
    environment |= {name: value for name, value in os.environ.items() if name not in unset}
    environment["OMP_DISPLAY_ENV"] = "VERBOSE"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment
    )
    found = dict(re.findall(r"(\w+) = '(\w+)'", result.stderr))
    if "GOMP_SPINCOUNT" not in found:
        pytest.skip("torch computes with another library than libgomp here")
    return found


def test_threads_of_torch_that_wait_leave_their_core_to_the_workers():
    assert settings_of_libgomp()["GOMP_SPINCOUNT"] == "1000"


@pytest.mark.parametrize(
    ("own", "spins"),
    [({"GOMP_SPINCOUNT": "77"}, "77"), ({"OMP_WAIT_POLICY": "PASSIVE"}, "0")],
    ids=["count", "policy"],
)
def test_how_threads_of_torch_wait_can_be_set_from_outside(own, spins):
    assert settings_of_libgomp(**own)["GOMP_SPINCOUNT"] == spins


# ------------------------------------------------------------------------------------------ the verbs


def test_import(fake, tmp_path):
    seen = {}

    def import_model(model, run, *, progress, **rest):
        seen.update(rest, model=model, run=run.path)
        progress(1, 1)
        return INFO

    fake("runs.import_model", import_model=import_model)
    run = tmp_path / "x"
    result = call(
        "import",
        "m",
        run,
        "--precision",
        "fp32",
        "--store-dir",
        "/a",
        "--store-dir",
        "/b",
        "--io-backend",
        "threads",
    )
    assert result.exit_code == 0
    assert seen == {
        "model": Path("m"),
        "run": run,
        "precision": "fp32",
        "stores": [Path("/a/x.mtio"), Path("/b/x.1.mtio")],
        "durability": "step",
        "model_options": ModelOptions(),
        "engine": "threads",
    }
    assert result.stdout == f"imported m into {run}: bf16, store store.mtio\n"
    assert result.stderr == "import: 1/1\n"

    result = call("import", "m", run, "--json")
    assert json.loads(result.stdout)["store_uuid"] == "uuid-1"
    assert result.stderr == ""
    assert seen["stores"] == [run / "store.mtio"]


def test_import_refuses_an_unknown_precision():
    result = call("import", "m", "r", "--precision", "fp16")
    assert result.exit_code == 2
    assert "bf16" in result.stderr


@dataclass
class Result:
    steps: int = 2
    loss: float = 2.5
    eval_loss: float | None = None
    read_bytes_per_parameter_step: float = 14.0
    written_bytes_total: int = 24_000_000_000
    peak_ram_bytes: int = 2**30
    ledger: dict[str, tuple[int, int]] | None = None


def fake_train(_config, *, resume, callbacks):
    """Two steps, with a library that prints where it should not."""
    run = SimpleNamespace(step=0, max_steps=2, notes=["a note"])
    for callback in callbacks:
        callback.on_start(run)
        for step in (1, 2):
            report = StepReport(step, 2, 2.5, 1e-5, 8, 8, 1.0, 1, 1, 0.0, 1, 1, 1)
            callback.on_step(run, report)
    sys.stdout.write("chatter\n")
    return Result(loss=float("nan") if resume else 2.5, ledger={"pool": (2**20, 2**21)})


def test_train(fake):
    fake("training.trainer", train=fake_train)
    result = call(*TRAIN, "sequence_len=64")
    assert result.exit_code == 0
    assert [line.split(maxsplit=5) for line in result.stdout.splitlines()] == [
        ["run", "runs/x"],
        ["steps", "2"],
        ["loss", "2.5"],
        ["read", "bytes", "per", "parameter", "step", "14"],
        ["written", "bytes", "total", "24.0", "GB"],
        ["peak", "ram", "bytes", "1.0", "GiB"],
        ["ledger"],
        ["pool", "1.0", "MiB,", "peak", "2.0", "MiB"],
    ]
    told = result.stderr.splitlines()
    assert told[:3] == [
        "note: data.sequence_len: taken as data.max_length (on the command line)",
        "note: a note",
        "training for 2 steps",
    ]
    assert told[3].startswith("step 1/2  loss 2.5000")


def test_train_as_json_is_json_even_where_the_loss_is_no_number(fake):
    fake("training.trainer", train=fake_train)
    result = call(*TRAIN, "--resume", "--json")
    found = json.loads(result.stdout, parse_constant=pytest.fail)
    assert found["loss"] is None
    assert found["ledger"] == {"pool": [2**20, 2**21]}
    assert found["run"] == "runs/x"
    assert result.stderr == "chatter\n"


def test_train_reads_the_file(fake, tmp_path):
    fake("training.trainer", train=fake_train)
    file = tmp_path / "c.yaml"
    file.write_text("model: m\noutput_dir: o\ndata: {train: a}\ntrain: {learning_rat: 1}\n", encoding="utf-8")
    result = call("train", "-c", file)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr == (
        f"megatrain-io: {file}: train.learning_rat: unknown key (line 4). Did you mean learning_rate?\n"
    )


class FakeGenerator:
    """Answers with what it was asked."""

    @classmethod
    def open(cls, run, *, modules):
        assert (run, modules) == (Path("r"), None)
        return cls()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def asking_note(self, prompt, *, chat):
        return f"{prompt} was trained otherwise" if chat else None

    def complete(self, prompt, **how):
        return f"{prompt} {sorted(how)}"

    def chat(self, messages, **how):
        return f"{messages} {how['seed']}"


def test_generate(fake):
    fake("generate", Generator=FakeGenerator)
    assert call("generate", "r", "-p", "once").stdout == (
        "once ['max_new_tokens', 'seed', 'temperature', 'top_k', 'top_p']\n"
    )
    chat = call("generate", "r", "-p", "hi", "--chat", "--seed", "7", "--json")
    assert chat.stderr == "note: hi was trained otherwise\n"
    assert json.loads(chat.stdout) == {
        "prompt": "hi",
        "text": "[{'role': 'user', 'content': 'hi'}] 7",
        "max_new_tokens": 64,
        "temperature": 0.0,
        "top_p": 1.0,
        "top_k": 0,
        "seed": 7,
    }
    assert call("generate", "r").exit_code == 2


def test_export(fake):
    seen = []

    def export_model(run, out, *, dtype, progress, modules):
        seen.append((run.path, out, dtype, modules))
        progress(1, 1)

    fake("runs.export_model", export_model=export_model)
    assert call("export", "r", "o", "--dtype", "fp32").stdout == "exported r to o\n"
    assert seen == [(Path("r"), Path("o"), "fp32", None)]


@pytest.fixture
def run(tmp_path):
    """A run folder whose store has the UUID that the test expects."""
    folder = RunFolder(tmp_path)
    (tmp_path / "run.json").write_text(json.dumps(vars(INFO)), encoding="utf-8")
    return folder.path


def fake_state(damaged=(), *, of_another_run=False):
    class State:
        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def verify(self, progress):
            progress(3, 3)
            return VerifyReport(4, 3, 2**29, tuple(damaged))

        def verify_older(self, progress):
            return None

    def open_store(run):
        if of_another_run:
            raise errors.FormatError(f"{run.store_paths()[0]} belongs to another run")
        return State()

    return open_store


def test_verify_a_store_that_is_whole(fake, run):
    fake("runs.open_store", open_store=fake_state())
    result = call("verify", run)
    assert result.exit_code == 0
    assert result.stdout == "generation 4: whole (0.50 GiB in 3 extents)\n"
    found = json.loads(call("verify", run, "--json").stdout)
    assert found == {"run": str(run), "generation": 4, "extents": 3, "nbytes": 2**29, "damaged": []}


def test_verify_a_store_that_is_damaged(fake, run):
    unreadable = DamagedExtent(
        ("a",), "head", 0, "update", "/s", 4096, None, None, "read of 8192 bytes at /s+4096: EIO"
    )
    flipped = DamagedExtent(
        ("a", "b"), "layers.0", 3, "weight", "/s", 8192, "0x00000001", "0x00000002", "long message"
    )
    fake("runs.open_store", open_store=fake_state([flipped, unreadable]))
    result = call("verify", run)
    assert result.exit_code == 6
    assert result.stdout.splitlines()[:3] == [
        "generation 4: 2 damaged extents (0.50 GiB in 3 extents)",
        (
            "  record layers.0, chunk 3, weight group, at /s+8192: "
            "checksum 0x00000001 expected, 0x00000002 found; tensors a, b"
        ),
        "  read of 8192 bytes at /s+4096: EIO",
    ]
    result = call("verify", run, "--json")
    assert result.exit_code == 6
    assert json.loads(result.stdout)["damaged"][0] == {
        "tensors": ["a", "b"],
        "record": "layers.0",
        "chunk": 3,
        "group": "weight",
        "path": "/s",
        "offset": 8192,
        "expected": "0x00000001",
        "found": "0x00000002",
        "message": "long message",
    }


def test_verify_the_store_of_another_run(fake, run):
    fake("runs.open_store", open_store=fake_state(of_another_run=True))
    result = call("verify", run)
    assert result.exit_code == 4
    assert "belongs to another run" in result.stderr


def test_verify_what_is_no_run(tmp_path):
    result = call("verify", tmp_path)
    assert result.exit_code == 2
    assert result.stderr.startswith(f"megatrain-io: {tmp_path} is not a run folder")


def test_doctor(tmp_path):
    result = call("doctor", tmp_path, "--json")
    assert result.exit_code == 0
    assert json.loads(result.stdout)["drive"]["path"] == str(tmp_path)
    assert result.stderr == ""


# ----------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize("name", errors.__all__)
def test_our_errors_are_a_message_and_a_code(failing, name):
    error = getattr(errors, name)
    failing(error("3 GiB are missing"))
    result = call(*TRAIN)
    assert result.exit_code == error.exit_code
    assert result.stdout == ""
    assert result.stderr.startswith("megatrain-io: 3 GiB are missing")
    assert ("report it" in result.stderr) == (error.exit_code == 1)
    assert "Traceback" not in result.stderr


def test_an_error_is_an_object_too(failing):
    failing(errors.NoSpaceError("3 GiB are missing"))
    result = call(*TRAIN, "--json")
    assert result.exit_code == 3
    assert json.loads(result.stdout) == {
        "error": {"kind": "NoSpaceError", "message": "3 GiB are missing", "exit_code": 3}
    }
    assert result.stderr == "megatrain-io: 3 GiB are missing\n"


def test_ctrl_c(failing):
    failing(KeyboardInterrupt())
    result = call(*TRAIN)
    assert result.exit_code == 130
    assert result.stderr == (
        "megatrain-io: interrupted. The run is as it was: give the same command again.\n"
    )


def test_the_unexpected_keeps_its_traceback(failing):
    failing(RuntimeError("a bug"))
    result = call(*TRAIN)
    assert isinstance(result.exception, RuntimeError)
    assert result.stdout == ""
