"""What becomes of a run when drive, machine or user do what they should not."""

import errno
import json
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
from contextlib import chdir

import pytest
import torch
from typer.testing import CliRunner

from format_reader import crc32c
from megatrain_io import _lib
from megatrain_io.cli.app import app
from megatrain_io.errors import (
    ConfigError,
    CorruptionError,
    FormatError,
    InterruptedRunError,
    NoSpaceError,
    StorageError,
    StoreFailedError,
    StoreInUseError,
    TrainingDivergedError,
)
from megatrain_io.paging.step import Step
from megatrain_io.runs.folder import RunFolder
from megatrain_io.runs.import_model import import_model
from megatrain_io.runs.open_store import open_store
from megatrain_io.store.paged_store import PagedStore
from megatrain_io.training.callbacks import Callback
from reference.reference import build, tiny_config
from runs import (
    ENGINE,
    STEPS,
    blob_of,
    check_equals,
    configured,
    metrics_of,
    start,
)

pytestmark = pytest.mark.slow

# ------------------------------------------------------------------------------------- the drive

EIO, ENOSPC = errno.EIO, errno.ENOSPC
# Chunks of the store are known only when it is there: places behind all chunk writes of a step.
TABLE, BLOB = "table", "blob"

# Faults of the drive in the fourth step, and what becomes of the run: the error that the user sees, and the
# step that the store is at when it is opened again. Operations are counted from the open; 0 of `sync` is that
# of the open itself, 0 of `write_durable` the clean marker.
DRIVE_FAULTS = {
    "a read fails once": ([("read", 30, EIO, False)], None, 5),
    "a read fails twice": ([("read", n, EIO, False) for n in range(30, 60)], StorageError, 3),
    "a write fails once": ([("write", 0, EIO, False)], None, 5),
    "a write fails twice": ([("write", n, EIO, False) for n in range(9)], StorageError, 3),
    "the drive is full": ([("write", 0, ENOSPC, False)], StorageError, 3),
    "a write stops half-way": ([("write", 0, ENOSPC, True)], StorageError, 3),
    "the table cannot be written": ([("write", TABLE, ENOSPC, False)], StorageError, 3),
    "the trainer's state cannot be written": ([("write", BLOB, ENOSPC, False)], StorageError, 3),
    "the marker cannot be written": ([("write_durable", 0, EIO, False)], StoreFailedError, 3),
    "the flush fails": ([("sync", 1, EIO, False)], StoreFailedError, 3),
    "the superblock cannot be written": ([("write_durable", 1, EIO, False)], StoreFailedError, 3),
    "its mirror cannot be written": ([("write_durable", 2, EIO, False)], StoreFailedError, 4),
}


@pytest.mark.parametrize("case", DRIVE_FAULTS)
def test_a_fault_of_the_drive(source, whole, stopped, monkeypatch, case):
    faults, error, step = DRIVE_FAULTS[case]
    with open_store(RunFolder(stopped), engine=ENGINE) as state:
        writes = 2 * len(state.layout.chunks)
    places = {TABLE: writes, BLOB: writes + 1}
    faults = [(name, places.get(n, n), code, short) for name, n, code, short in faults]
    real = _lib.Store
    with monkeypatch.context() as patch:
        patch.setattr(_lib, "Store", lambda *arguments, **named: real(*arguments, **named, faults=faults))
        if error is None:
            start(configured(source, stopped), resume=True)
        else:
            with pytest.raises(error, match=r"store\.mtio(\+\d+|:)") as caught:
                start(configured(source, stopped), resume=True)
            assert type(caught.value) is error
    assert blob_of(stopped)["step"] == step
    if step < STEPS:
        start(configured(source, stopped), resume=True)
    check_equals(stopped, whole)


def test_a_fault_of_the_drive_on_the_command_line(source, stopped, tmp_path, monkeypatch):
    (tmp_path / "run.yaml").write_text(configured(source, stopped).to_yaml())
    real = _lib.Store
    faults = [("write", 0, ENOSPC, False)]
    monkeypatch.setattr(_lib, "Store", lambda *arguments, **named: real(*arguments, **named, faults=faults))
    arguments = ["train", "--config", str(tmp_path / "run.yaml"), "--resume"]
    ended = CliRunner().invoke(app, arguments, prog_name="megatrain-io")
    assert ended.exit_code == 4
    assert "No space left on device" in ended.stderr
    assert "Traceback" not in ended.stderr


class _AtStep(Callback):
    """Does something to the files of a run after its second step."""

    def __init__(self, action):
        self.action = action

    def on_step(self, run, report):
        if report.step == 2:
            run.wait_durable()
            self.action()


@pytest.mark.parametrize("durability", ["step", "scratch"])
def test_a_store_that_is_removed_while_it_trains_ends_the_run(source, tmp_path, durability):
    """It trained 30 steps more, each acknowledged, ended with 0, and nothing was left of any."""
    config = configured(source, tmp_path / "run", memory={"durability": durability})
    remover = _AtStep((tmp_path / "run" / "store.mtio").unlink)
    with pytest.raises(StorageError, match=r"removed while it was open.*/proc/\d+/fd/\d+ COPY"):
        start(config, callbacks=[remover])
    assert len(metrics_of(config.output_dir)) in (2, 3)  # the step under way may have been computed


def test_a_store_that_is_moved_away_is_told_and_goes_on_when_it_is_back(source, whole, tmp_path):
    config = configured(source, tmp_path / "run")
    store, elsewhere = tmp_path / "run" / "store.mtio", tmp_path / "elsewhere"
    with pytest.raises(StorageError, match=rf"it is {elsewhere} now. Nothing is lost: move it back"):
        start(config, callbacks=[_AtStep(lambda: store.rename(elsewhere))])
    elsewhere.rename(store)
    start(config, resume=True)
    check_equals(config.output_dir, whole)


def test_a_removed_store_on_the_command_line(source, tmp_path, monkeypatch):
    (tmp_path / "run.yaml").write_text(configured(source, tmp_path / "run").to_yaml())
    backward = Step.backward

    def removing(step):
        backward(step)
        if step._number == 3:
            (tmp_path / "run" / "store.mtio").unlink()

    monkeypatch.setattr(Step, "backward", removing)
    ended = CliRunner().invoke(
        app, ["train", "--config", str(tmp_path / "run.yaml")], prog_name="megatrain-io"
    )
    assert ended.exit_code == 4
    assert "removed while it was open" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_a_truncated_store(source, stopped):
    path = stopped / "store.mtio"
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - 4096)
    with pytest.raises(FormatError, match=r"has \d+ bytes and should have \d+: it was truncated"):
        start(configured(source, stopped), resume=True)


# ----------------------------------------------------------------------------- durability: scratch


def test_a_scratch_store_takes_half_the_space_and_gives_the_same_bits(source, whole, tmp_path):
    config = configured(source, tmp_path / "run", memory={"durability": "scratch"})
    with pytest.raises(InterruptedRunError, match="step 3 "):
        start(config, stop=3)
    start(config, resume=True)
    check_equals(config.output_dir, whole)
    halves = [(run / "store.mtio").stat().st_size - (6 << 20) for run in (config.output_dir, whole[0])]
    assert halves[0] < 0.55 * halves[1]


def test_a_scratch_store_that_was_not_closed_is_refused(source, tmp_path):
    config = configured(source, tmp_path / "run", memory={"durability": "scratch"})
    script = (
        "import os, sys; from megatrain_io.runs.metrics import MetricsFile\n"
        "append = MetricsFile.append\n"
        "def killed(self, report):\n"
        "    append(self, report); report.step == 2 and os.kill(os.getpid(), 9)\n"
        "MetricsFile.append = killed\n"
        "from megatrain_io.__main__ import main; main()"
    )
    (tmp_path / "run.yaml").write_text(config.to_yaml())
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", script, "train", "--config", str(tmp_path / "run.yaml")]
    ended = subprocess.run(command, check=False, capture_output=True, env=environment)
    assert ended.returncode == -9
    with pytest.raises(FormatError, match="only a store that was closed can be opened again"):
        start(config, resume=True)


def test_a_step_that_is_dropped_ends_a_scratch_store(source, tmp_path, monkeypatch):
    config = configured(source, tmp_path / "run", memory={"durability": "scratch"})
    backward = Step.backward

    def failing(step):
        backward(step)
        if step._number == 3:
            raise RuntimeError("of the test")

    with monkeypatch.context() as patch:
        patch.setattr(Step, "backward", failing)
        with pytest.raises(RuntimeError, match="of the test") as caught:
            start(config)
    assert "the state is lost" in caught.value.__notes__[0]
    with pytest.raises(FormatError, match="only a store that was closed"):
        start(config, resume=True)


def test_a_scratch_store_survives_a_loss_that_is_not_finite(source, tmp_path, monkeypatch):
    """The loss is looked at before anything of its step is written."""
    config = configured(source, tmp_path / "run", memory={"durability": "scratch"})
    slices = Step._head_slices

    def diverging(step, *arguments, **keywords):
        loss = slices(step, *arguments, **keywords)
        return loss * math.nan if step._number == 3 else loss

    monkeypatch.setattr(Step, "_head_slices", diverging)
    with pytest.raises(TrainingDivergedError, match="step 3"):
        start(config)
    assert blob_of(config.output_dir)["step"] == 2


def test_a_scratch_store_that_cannot_be_closed_says_so(source, tmp_path, monkeypatch):
    """After Ctrl-C the step was called kept, and what closing met was swallowed."""
    config = configured(source, tmp_path / "run", memory={"durability": "scratch"})
    real = _lib.Store
    faults = [("sync", 1, EIO, False)]
    monkeypatch.setattr(_lib, "Store", lambda *arguments, **named: real(*arguments, **named, faults=faults))
    with pytest.raises(StorageError, match="fdatasync"):
        start(config, stop=3)


def test_the_durability_of_a_store_does_not_change(source, stopped):
    with pytest.raises(ConfigError, match=r"memory\.durability is scratch, and the store .* made with step"):
        start(configured(source, stopped, memory={"durability": "scratch"}), resume=True)


# --------------------------------------------------------------------------------------- the store


def test_a_store_in_use_is_waited_for_and_then_refused(source, stopped):
    holder = (
        "import fcntl, sys; f = open(sys.argv[1]); fcntl.flock(f, fcntl.LOCK_EX)\n"
        "print(flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-I", "-S", "-c", holder, str(stopped / "store.mtio")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        process.stdout.readline()
        with pytest.raises(StoreInUseError, match="in use"):
            start(configured(source, stopped), resume=True)
        process.stdin.close()
    assert start(configured(source, stopped), resume=True)[0].steps == STEPS


def test_the_store_of_another_run(source, whole, stopped):
    shutil.copy(whole[0] / "store.mtio", stopped / "store.mtio")
    with pytest.raises(FormatError, match="belongs to another run"):
        start(configured(source, stopped), resume=True)


def test_a_newer_format_is_left_alone(source, stopped):
    path = stopped / "store.mtio"
    with path.open("r+b") as file:
        for offset in (0, 512 << 10):
            file.seek(offset)
            page = bytearray(file.read(4096))
            assert page[-4:] == crc32c(page[:-4]).to_bytes(4, "little")
            page[12] = 9
            page[-4:] = crc32c(page[:-4]).to_bytes(4, "little")
            file.seek(offset)
            file.write(page)
    before = path.read_bytes()
    with pytest.raises(FormatError, match=r"format 9\.4, .*not modified"):
        start(configured(source, stopped), resume=True)
    assert path.read_bytes() == before


def flip_a_bit(path, name, plane="weight"):
    """Flip a bit of a tensor of the newest state, in a file that nobody has open."""
    with PagedStore(path, engine=ENGINE) as state:
        place = next(place for place in state.layout.tensors() if place.name == name)
        pattern = state.read_tensor(place, plane).flatten()[:64].view(torch.uint8).numpy().tobytes()
    content = path.read_bytes()
    assert content.count(pattern) == 1
    with path.open("r+b") as file:
        file.seek(content.index(pattern) + 9)
        flipped = bytes([content[content.index(pattern) + 9] ^ 4])
        file.write(flipped)


def call(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments], prog_name="megatrain-io")


def follow(text):
    """Run the command that a text names, as printed, in another folder."""
    _, *arguments = shlex.split(re.search(r"`(megatrain-io [^`]*)`", text)[1])
    with chdir("/"):
        return call(*arguments)


@pytest.mark.parametrize("is_clean", [True, False])
def test_a_damaged_state_is_given_up_for_the_one_before_it_as_printed(source, whole, stopped, is_clean):
    """The bytes that open at the older state after a reboot were refused before it: the import was to be repeated."""
    flip_a_bit(stopped / "store.mtio", "model.layers.1.mlp.down_proj.weight")
    if not is_clean:
        with (stopped / "store.mtio").open("r+b") as file:
            file.seek((2 << 20) + (512 << 10))  # the clean marker
            file.write(bytes(4096))
    (stopped.parent / "my run.yaml").write_text(configured(source, stopped).to_yaml())
    resume = ["train", "--config", stopped.parent / "my run.yaml", "--resume"]
    ended = call(*resume)
    assert ended.exit_code == 6
    assert "--from-older-state" in ended.stderr
    for command in [("export", stopped, stopped.parent / "out"), ("generate", stopped, "--prompt", "the")]:
        assert "megatrain-io verify" in call(*command).stderr
    found = follow(ended.stderr)
    assert found.exit_code == 6
    assert "(generation 3, after step 2) is whole" in found.stdout
    gone_back = follow(found.stdout)
    assert (gone_back.exit_code, gone_back.stderr.count("Traceback")) == (0, 0)
    assert "Went back to the state before it (generation 3, after step 2)" in gone_back.stdout
    assert call("verify", stopped, "--from-older-state").stdout.startswith("generation 3: whole")
    assert call(*resume).exit_code == 0
    check_equals(stopped, whole)


def test_where_the_older_state_is_gone_nothing_is_changed(stopped):
    name = "model.layers.1.mlp.down_proj.weight"
    path = stopped / "store.mtio"
    flip_a_bit(path, name)
    assert call("verify", stopped, "--from-older-state").exit_code == 0
    flip_a_bit(path, name)
    before = path.read_bytes()
    found = json.loads(call("verify", stopped, "--from-older-state", "--json").stdout)
    assert found["older_state"] is None
    assert "No older state is left" in call("verify", stopped, "--from-older-state").stdout
    assert path.read_bytes() == before


@pytest.mark.parametrize("plane", ["weight", "exp_avg"])
def test_a_flipped_bit_is_found_and_named(source, stopped, plane):
    path, name = stopped / "store.mtio", "model.layers.1.mlp.down_proj.weight"
    flip_a_bit(path, name, plane)
    with PagedStore(path, engine=ENGINE) as state:
        damaged = state.verify().damaged
        assert len(damaged) == 1
        assert name in damaged[0].tensors
    result = CliRunner().invoke(app, ["verify", str(stopped)], prog_name="megatrain-io")
    assert result.exit_code == 6
    with pytest.raises(CorruptionError, match=name):
        start(configured(source, stopped), resume=True)
    assert len(metrics_of(stopped)) == 3
    with PagedStore(path, engine=ENGINE) as state:
        assert json.loads(state.blob)["step"] == 3
        assert state.verify().damaged == damaged


def test_no_space_is_told_before_anything_is_written(source, tmp_path):
    free = shutil.disk_usage(tmp_path).free
    # Two copies of 12 bytes a parameter, a tied table, and no more than a hole for the weights.
    hidden = 4096
    vocabulary = free // (24 * hidden) + 2000
    config = tiny_config(
        "llama", tied=True, vocab_size=vocabulary, hidden_size=hidden, num_hidden_layers=1, intermediate_size=8,
        head_dim=8,
    )  # fmt: skip
    folder = tmp_path / "source"
    shutil.copytree(source / "model", folder)
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    small = tiny_config(
        "llama",
        tied=True,
        vocab_size=1,
        hidden_size=hidden,
        num_hidden_layers=1,
        intermediate_size=8,
        head_dim=8,
    )
    shapes = {name: list(value.shape) for name, value in build(small, seed=1).named_parameters()}
    shapes["model.embed_tokens.weight"] = [vocabulary, hidden]
    header, offset = {}, 0
    for name, shape in shapes.items():
        end = offset + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + offset)
    with pytest.raises(NoSpaceError, match=r"needs (\d+) bytes .* and (\d+) bytes .* free") as caught:
        import_model(folder, RunFolder(tmp_path / "run"), precision="bf16", chunk_parameters=1 << 24)
    assert caught.value.exit_code == 3
    assert not (tmp_path / "run").exists()
