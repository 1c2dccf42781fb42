"""``status``, ``clean`` and ``verify`` over real stores: what they say, what they leave alone, whom they refuse."""

import fcntl
import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from megatrain_io.cli import run as run_commands
from megatrain_io.cli.app import app
from megatrain_io.errors import FormatError, StoreInUseError
from megatrain_io.runs.folder import RunFolder
from megatrain_io.runs.metrics import MetricsFile, StepReport
from megatrain_io.runs.open_store import open_store
from megatrain_io.runs.state import TrainerState
from megatrain_io.store.inspect import held, owner_of
from megatrain_io.store.paged_store import PagedStore
from paged import AdamWStep, Case, make_store, opened, to_micro_batch, train

ENGINE = "threads"
CASE = Case(tied=True, dtype=torch.bfloat16, counts=(1, 1, 1))
SINCE = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d"
# Locks a file as a training does, with a hint, and says so; then waits for its end of the pipe.
HOLDER = """
import sys
from megatrain_io import _lib
held = _lib.HeldFile(sys.argv[1])
print(flush=True)
sys.stdin.read()
"""


def call(*arguments, **kwargs):
    words = [str(argument) for argument in arguments]
    return CliRunner().invoke(app, words, prog_name="megatrain-io", **kwargs)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A run with two of its three steps done."""
    run = RunFolder(tmp_path_factory.mktemp("made") / "run")
    run.model.mkdir(parents=True)
    (run.model / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}', encoding="utf-8")
    make_store(run.own_store, CASE, engine=ENGINE, drives=1)
    with opened(run.own_store, CASE, engine=ENGINE, threads=1, drives=1) as model:
        train(model, CASE, stop=2)
        uuid = model.state.uuid
    run.write("bf16", [run.own_store], uuid, Path("/models/tiny"))
    run.config.write_text(f"{{model: /m, output_dir: {run.path}, data: {{train: [/t]}}}}\n", encoding="utf-8")
    metrics = MetricsFile(run.metrics, TrainerState())
    for step in (1, 2):
        metrics.append(StepReport(step, 3, 2.5, 1e-5, 8, 8, 1.0, 1, 1, 0.0, 1, 1, 1))
    metrics.close()
    return run


@pytest.fixture
def run(made, tmp_path):
    """The same, to be changed."""
    shutil.copytree(made.path, tmp_path / "run")
    return RunFolder(tmp_path / "run")


@contextmanager
def holder(path):
    """A process that has the store open."""
    command = [sys.executable, "-c", HOLDER, str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "\n"
        yield process
        process.stdin.close()


@contextmanager
def when_waiting(action):
    """Does something as soon as the person is told that a store is waited for."""
    handler = logging.Handler()
    handler.emit = lambda _: action()
    logger = logging.getLogger("megatrain_io.store.inspect")
    logger.addHandler(handler)
    yield
    logger.removeHandler(handler)


def files_of(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# --------------------------------------------------------------------------------------------- the lock


def test_whoever_waits_is_told_for_whom_and_since_when(run, caplog):
    """Silence for five seconds looked like a hang, and nobody knew whom to stop."""
    with (
        holder(run.own_store) as process,
        when_waiting(process.stdin.close),
        open_store(run, engine=ENGINE) as state,
    ):
        assert state.generation == 3
    (line,) = [
        record.getMessage() for record in caplog.records if record.name == "megatrain_io.store.inspect"
    ]
    found = re.fullmatch(
        rf"waiting for the store (\S+): in use by process (\d+) \((\S+)\) since {SINCE}; a killed process holds it "
        "until its last writes have landed",
        line,
    )
    assert found is not None, line
    assert (found[1], found[2]) == (str(run.own_store), str(process.pid))
    assert not Path(f"{run.own_store}.owner").exists()


def test_a_store_that_stays_in_use_is_refused_after_five_seconds_in_all(run):
    with (
        holder(run.own_store) as process,
        pytest.raises(StoreInUseError, match=rf"process {process.pid} \(\S+\) since {SINCE} \(waited 5\."),
    ):
        PagedStore(run.own_store, engine=ENGINE)


def test_a_wait_gives_way_to_ctrl_c(run):
    code = (
        "import signal, sys; from megatrain_io import _lib\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "try: _lib.HeldFile(sys.argv[1], lambda owner: print('waiting', flush=True))\n"
        "except KeyboardInterrupt: print('interrupted')"
    )
    command = [sys.executable, "-c", code, str(run.own_store)]
    with held(run.own_store), subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "waiting\n"
        process.send_signal(signal.SIGINT)
        assert process.communicate()[0] == "interrupted\n"


def test_a_hint_of_a_process_that_has_ended_does_not_mislead(run):
    """Until its last writes have landed the kernel holds the lock of a killed process; so does this test.

    Nor does a forked child that ends take its parent's hint away.
    """
    code = HOLDER.replace("print(flush", "import os; os.fork() or sys.exit()\nos.wait()\nprint(flush")
    command = [sys.executable, "-W", "ignore", "-c", code, str(run.own_store)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        process.stdout.readline()
        held = owner_of(run.own_store)
        assert (held.process, held.has_ended) == (process.pid, False)
        process.kill()
        process.wait()
    with run.own_store.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        owner = owner_of(run.own_store)
    assert (owner.process, owner.has_ended) == (process.pid, True)
    assert re.fullmatch(
        rf"a process that has ended \(process {process.pid} \(\S+\) since {SINCE}\), its last writes are landing",
        owner.text,
    )
    assert owner_of(run.own_store) is None


# ----------------------------------------------------------------------------------------------- status


def test_status_of_a_run_that_can_go_on(run):
    before = files_of(run.path)
    result = call("status", run.path)
    assert result.exit_code == 0
    lines = dict(line.split(maxsplit=1) for line in result.stdout.replace("in use", "in_use").splitlines())
    assert lines["model"].startswith("LlamaForCausalLM, imported from /models/tiny")
    assert lines["committed"] == "step 2 of 3 (generation 3)"
    assert lines["in_use"] == "no"
    assert lines["last"] == "stop  clean"
    assert lines["next"] == f"megatrain-io train --config {run.config} output_dir={run.path} --resume", (
        "moved"
    )
    assert files_of(run.path) == before, "looking changes nothing"

    found = json.loads(call("status", run.path, "--json").stdout)
    with PagedStore(run.own_store, engine=ENGINE) as state:
        assert found["parameters"] == state.layout.parameters
        assert found["is_direct"] == state.is_direct
    assert found["store_bytes"] == pytest.approx(run.own_store.stat().st_size, rel=0.05)  # and its own blocks
    assert (found["step"], found["max_steps"], found["generation"], found["precision"]) == (2, 3, 3, "bf16")
    assert (found["in_use"], found["problem"], found["last_stop"]) == (None, None, "clean")
    assert found["file_system"]


@pytest.mark.parametrize(("nbytes", "said"), [(3_456_700_000_000, "3.4567 TB"), (12_345, "12.3450 kB")])
def test_status_knows_what_the_trainer_committed(run, nbytes, said):
    """Loss and bytes are those of the committed step, not of a later line of metrics.jsonl."""
    with opened(run.own_store, CASE, engine=ENGINE, threads=1, drives=1) as model:
        blob = json.dumps({"step": 3, "loss": 1.25, "written_bytes": nbytes}).encode()
        model.train_step(
            [to_micro_batch(batch) for batch in CASE.steps[2]], AdamWStep(3, 1e-3), lambda _: blob
        )
        model.state.wait_durable()
    text = call("status", run.path).stdout
    assert "committed  step 3 of 3, loss 1.2500 (generation 4)" in text
    assert f"written    {said}" in text
    assert f"next       done: megatrain-io generate {run.path}" in text


def test_status_of_a_run_in_use_waits_for_nothing(run):
    with holder(run.own_store) as process:
        result = call("status", run.path, "--json")
        assert result.exit_code == 0
        found = json.loads(result.stdout)
        assert found["in_use"]["process"] == process.pid
        assert re.fullmatch(SINCE, found["in_use"]["since"])
        assert (found["step"], found["generation"], found["last_stop"]) == (2, 3, None)
        assert f"by process {process.pid} (" in call("status", run.path).stdout


def test_status_tells_a_kill_from_a_clean_stop(run):
    marker = (2 << 20) + (512 << 10)
    with run.own_store.open("r+b") as file:
        file.seek(marker)
        file.write(bytes(4096))
    assert json.loads(call("status", run.path, "--json").stdout)["last_stop"] == "killed"
    assert "the process was killed" in call("status", run.path).stdout


@pytest.mark.parametrize(
    ("spoil", "problem"),
    [
        (lambda path: path.unlink(), "No such file"),
        (lambda path: path.write_bytes(b"x" * (1 << 20)), "not a megatrain-io store"),
        (lambda path: os.truncate(path, 4 << 20), "truncated"),
    ],
)
def test_status_of_a_store_that_cannot_be_used(run, spoil, problem):
    spoil(run.own_store)
    result = call("status", run.path)
    assert result.exit_code == 4
    assert problem in result.stdout
    assert "Traceback" not in result.output
    assert problem in json.loads(call("status", run.path, "--json").stdout)["problem"]


def test_status_and_clean_answer_without_torch(run):
    code = (
        "import sys; from megatrain_io.cli.app import app\n"
        "try: app()\n"
        "except SystemExit as end: code = end.code\n"
        "heavy = {'torch', 'transformers', 'numpy'} & sys.modules.keys()\n"
        "sys.exit(code or (f'imported {heavy}' if heavy else 0))"
    )
    for verb in ("status", "clean"):
        command = [sys.executable, "-c", code, verb, str(run.path)]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        assert (result.returncode, result.stderr) == (0, "")


# ------------------------------------------------------------------------------------------------ clean


def leave_everything(run):
    """What kills at the worst moments leave, and what is somebody else's."""
    leftovers = {
        "store.mtio.partial": b"x" * 5000,
        "store.mtio.partial.owner": b"process 1 (x) since y\n",
        "store.mtio.inputs": b"x" * 5000,
        "store.mtio.inputs.partial": b"x",
        "model.partial/config.json": b"{}",
        "run.json.tmp": b"{",
        "config.yaml.tmp": b"m",
        "metrics.jsonl.tmp": b"{",
        "data/index.tmp": b"{",
        "data/train.tokens": b"12",
    }
    others = {"notes.txt": b"mine", "old.partial": b"mine", "data/mine.jsonl": b"{}", "other.mtio": b"mine"}
    for name, content in (leftovers | others).items():
        path = run.path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
    return leftovers


def test_clean_removes_what_killed_processes_left_and_nothing_else(run):
    kept = files_of(run.path)
    leave_everything(run)
    others = {"notes.txt", "old.partial", "data/mine.jsonl", "other.mtio"}
    result = call("clean", run.path, "--yes", "--json")
    assert result.exit_code == 0
    removed = [
        Path(each["path"]).relative_to(run.path).as_posix() for each in json.loads(result.stdout)["removed"]
    ]
    assert removed == [
        "store.mtio.partial", "store.mtio.inputs", "store.mtio.inputs.partial", "model.partial",
        "run.json.tmp", "config.yaml.tmp", "metrics.jsonl.tmp", "data/index.tmp", "data/train.tokens",
    ]  # fmt: skip
    left = files_of(run.path)
    assert left.keys() == kept.keys() | others
    assert {name: left[name] for name in kept} == kept
    assert call("clean", run.path).stdout == f"{run.path}: nothing to remove\n"


def test_clean_asks_and_takes_no_for_an_answer(run, monkeypatch):
    leave_everything(run)
    before = files_of(run.path)
    monkeypatch.setattr(run_commands, "_can_ask", lambda: True)
    for answer in ("n\n", "\n"):
        result = call("clean", run.path, input=answer)
        assert (result.exit_code, result.stdout) == (0, "Nothing was removed.\n")
        assert f"{run.path / 'run.json.tmp'}: a file that was not written to its end" in result.stderr
        assert "[y/N]" in result.stderr
    before.pop("store.mtio.partial.owner")  # the name of a process that is gone: holding the file replaced it
    assert files_of(run.path) == before
    assert call("clean", run.path, input="y\n").stdout.startswith("removed ")
    assert not (run.path / "run.json.tmp").exists()


def test_clean_removes_nothing_where_nobody_can_be_asked(run):
    leave_everything(run)
    result = call("clean", run.path)
    assert result.exit_code == 2
    assert "--yes" in result.stderr
    assert (run.path / "run.json.tmp").exists()


def test_the_store_goes_only_when_it_is_named_and_its_step_is_told(run, monkeypatch):
    assert call("clean", run.path, "--yes").stdout == f"{run.path}: nothing to remove\n"
    assert run.own_store.exists()
    monkeypatch.setattr(run_commands, "_can_ask", lambda: True)
    result = call("clean", run.path, "--store", input="n\n")
    assert re.search(
        r"the store \([\d.]+ MB\)\? It holds the only copy of the training state of step 2:", result.stderr
    )
    assert run.own_store.exists()
    assert call("clean", run.path, "--store", input="y\n").exit_code == 0
    assert sorted(files_of(run.path)) == ["config.yaml", "metrics.jsonl"]


def test_clean_refuses_a_store_in_use(run):
    leave_everything(run)
    before = files_of(run.path)
    with holder(run.own_store) as process:
        result = call("clean", run.path, "--store", "--yes")
        assert result.exit_code == 4
        assert f"in use by process {process.pid}" in result.stderr
        assert files_of(run.path).keys() == before.keys() | {"store.mtio.owner"}


def test_clean_leaves_the_store_of_another_run_alone(run, tmp_path):
    make_store(tmp_path / "other", CASE, engine=ENGINE, drives=1)
    shutil.copy(tmp_path / "other", run.own_store)
    result = call("clean", run.path, "--store", "--yes")
    assert result.exit_code == 4
    assert "belongs to another run and is not removed" in result.stderr
    run.own_store.write_bytes(b"mine")
    assert call("clean", run.path, "--store", "--yes").exit_code == 4
    assert run.own_store.read_bytes() == b"mine"


def test_the_tokenised_data_goes_when_it_is_named(run):
    run.data.mkdir()
    for name in ("index.json", "train.tokens", "eval.tokens", "mine.jsonl"):
        (run.data / name).write_bytes(b"x")
    assert "nothing to remove" in call("clean", run.path).stdout
    assert call("clean", run.path, "--cache", "--yes").exit_code == 0
    assert [path.name for path in run.data.iterdir()] == ["mine.jsonl"]


def test_clean_after_an_import_that_was_killed(tmp_path):
    run = RunFolder(tmp_path / "run")
    run.path.mkdir()
    drive = tmp_path / "drive"
    drive.mkdir()
    make_store(run.own_store, CASE, engine=ENGINE, drives=1)  # killed before run.json
    (drive / "run.mtio.partial").write_bytes(b"x")
    assert call("clean", run.path, "--store-dir", drive, "--yes").exit_code == 0
    assert not (drive / "run.mtio.partial").exists()
    assert call("clean", run.path, "--yes").exit_code == 0
    assert not run.own_store.exists()
    result = call("clean", run.path, "--yes")
    assert result.exit_code == 2
    assert "is not a run folder" in result.stderr


def test_clean_leaves_the_store_of_a_namesake_alone(run, tmp_path):
    """Runs of the same name in two folders share a name in `--store-dir`: one removed the other's store."""
    drive, namesake = tmp_path / "drive", tmp_path / "other" / "run"
    drive.mkdir()
    namesake.mkdir(parents=True)
    run.own_store.rename(drive / "run.mtio")
    assert call("clean", namesake, "--store-dir", drive, "--yes").exit_code == 2
    result = call("clean", namesake, "--store-dir", drive, "--store", "--yes")
    assert result.exit_code == 4
    assert "it is the store of a run that it does not name, at step 2" in result.stderr
    assert (drive / "run.mtio").exists()
    result = call("clean", run.path, "--store", "--yes")  # as if the drive were not mounted
    assert result.exit_code == 2
    assert run.info_file.exists()


def test_clean_leaves_an_import_alone(run):
    leave_everything(run)
    before = files_of(run.path)
    with run.importing():
        result = call("clean", run.path, "--yes")
    assert result.exit_code == 4
    assert "another process imports" in result.stderr
    assert files_of(run.path) == before


def test_clean_keeps_what_only_looks_like_a_leftover(run, tmp_path):
    """A store that was just imported is at generation 1, and one whose run.json is gone may be trained."""
    run.info_file.rename(tmp_path / "run.json")
    assert call("clean", run.path, "--yes").exit_code == 2
    assert run.own_store.exists()
    imported = RunFolder(tmp_path / "imported")
    imported.path.mkdir()
    make_store(imported.own_store, CASE, engine=ENGINE, drives=1)
    with PagedStore(imported.own_store, engine=ENGINE) as state:
        imported.write("bf16", [imported.own_store], state.uuid, tmp_path)
    assert "nothing to remove" in call("clean", imported.path, "--yes").stdout
    assert imported.own_store.exists()


def test_what_changes_between_question_and_answer_is_not_removed(run):
    from megatrain_io.runs.cleanup import ConfigError, Leftovers

    leave_everything(run)
    leftovers = Leftovers(run)
    (run.path / "run.json.tmp").unlink()
    with pytest.raises(ConfigError, match="changed in the meantime: nothing was removed"):
        leftovers.remove()
    assert (run.path / "metrics.jsonl.tmp").exists()


def test_a_store_that_is_removed_while_it_is_waited_for_is_not_trained(run):
    with (
        held(run.own_store) as file,
        when_waiting(file.remove),
        pytest.raises(FormatError, match="removed while it was waited for"),
    ):
        PagedStore(run.own_store, engine=ENGINE)


# ----------------------------------------------------------------------------------------------- verify


@pytest.mark.parametrize("group", ["weight", "update"])
def test_verify_names_everything_about_a_flipped_byte(run, group):
    """Found by itself: the byte is one of a plane of chunk 1 of the last block's record, which is looked up here."""
    with PagedStore(run.own_store, engine=ENGINE) as state:
        (number,) = state.layout.stops[state.layout.block(1)]
        record, chunk = state.layout.records[number], state.layout.chunks_of(number)[1]
        plane = state.read_plane(chunk.index, {"weight": "weight", "update": "exp_avg"}[group])
    content = run.own_store.read_bytes()
    places = [found.start() for found in re.finditer(re.escape(plane), content)]
    # In copy A or B, or in both of them: flip all, and one of them is the committed one.
    with run.own_store.open("r+b") as file:
        for place in places:
            file.seek(place + 7)
            file.write(bytes([content[place + 7] ^ 1]))
    end = chunk.start + chunk.parameters
    tensors = [t.name for t in record.tensors if t.offset < end and t.offset + t.elements > chunk.start]

    result = call("verify", run.path, "--json")
    assert result.exit_code == 6
    (damage,) = json.loads(result.stdout)["damaged"]
    assert (damage["record"], damage["chunk"], damage["group"]) == (record.name, 1, group)
    assert damage["tensors"] == tensors
    assert damage["path"] == str(run.own_store)
    before = {"weight": 0, "update": 2 * chunk.parameters}[group]  # the remainder comes first
    assert damage["offset"] in [place - before for place in places]
    assert re.fullmatch("0x[0-9a-f]{8}", damage["expected"])
    assert re.fullmatch("0x[0-9a-f]{8}", damage["found"])
    assert damage["expected"] != damage["found"]
    assert damage["expected"] in damage["message"]

    text = call("verify", run.path)
    assert text.exit_code == 6
    (line,) = [line for line in text.stdout.splitlines() if line.startswith("  ")]
    for part in [record.name, "chunk 1", f"{group} group", f"{run.own_store}+{damage['offset']}", *tensors]:
        assert part in line
    assert f"checksum {damage['expected']} expected, {damage['found']} found" in line
