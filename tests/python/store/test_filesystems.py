"""The store on real file systems: full, failing, turned read-only, and after power cuts.

They lie in image files and need root, loop devices and their tools; each test says what it misses. `filesystems.py`
says why a copied image is one that a power cut may leave.
"""

import errno
import json
import os
import random
import re
import shutil
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from typer.testing import CliRunner

from corpus import make_tokenizer, write
from filesystems import (
    KINDS,
    MIB,
    PacedTraining,
    Volume,
    fill,
    is_nocow,
    new_drive,
    new_tmpfs,
    new_volume,
    paced_case,
    shut_down,
)
from megatrain_io.cli.app import app
from megatrain_io.errors import FormatError, NoSpaceError, StoreFailedError
from megatrain_io.paging.step import Step
from megatrain_io.runs.folder import RunFolder
from megatrain_io.runs.metrics import MetricsFile
from megatrain_io.runs.open_store import open_store
from megatrain_io.runs.state import TrainerState
from megatrain_io.store.paged_store import PagedStore
from paged import Case, all_planes, differing, files, make_store, opened, progress_of, train
from reference.reference import build, tiny_config

pytestmark = pytest.mark.slow

ENGINE = "threads"  # of what only looks: stopping a ring takes a second; what fails and is cut runs on `auto`
IMAGE_BYTES = 320 * MIB  # XFS takes no less than 300 MiB; the files are sparse
CUTS = 6
HAS_MOUNT_NUMBERS = tuple(map(int, re.findall(r"\d+", os.uname().release)[:2])) >= (6, 8)
CASE = paced_case(Case, 2 * CUTS + 2)


@pytest.fixture
def volume(request, tmp_path):
    """An empty file system of the kind that the test's parameter names."""
    with new_volume(request.param, tmp_path / "image", IMAGE_BYTES) as made:
        yield made


@pytest.fixture
def folder(request, tmp_path):
    """The same, or a tmpfs; the folder alone."""
    if request.param == "tmpfs":
        with new_tmpfs(tmp_path / "mounted", IMAGE_BYTES) as made:
            yield made
    else:
        with new_volume(request.param, tmp_path / "image", IMAGE_BYTES) as made:
            yield made.folder


@pytest.fixture
def drive(tmp_path):
    with new_drive(tmp_path) as made:
        yield made


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """Losses and state of the training that nothing happened to, on the file system of all other tests."""
    path = tmp_path_factory.mktemp("undisturbed") / "store"
    make_store(path, CASE)
    with opened(path, CASE) as model:
        return train(model, CASE), all_planes(model.state)


def check_end(path, undisturbed):
    """Train to the end, from wherever the store stands."""
    with opened(path, CASE, engine=ENGINE) as model:
        assert train(model, CASE) == undisturbed[0]
        assert differing(all_planes(model.state), undisturbed[1]) == []


# ------------------------------------------------------------------------------ any file system will do


@pytest.mark.parametrize("folder", [*KINDS, "tmpfs"], indirect=True)
@pytest.mark.parametrize("engine", ["uring", "threads"])
def test_the_bits_are_those_of_any_file_system(folder, engine, request, undisturbed):
    kind = request.node.callspec.params["folder"]
    make_store(folder / "store", CASE, engine=engine)
    with opened(folder / "store", CASE, engine=engine) as model:
        name, reason = model.state.engine
        print(kind, name, f"is_direct={model.state.is_direct}")  # noqa: T201 - shown with -rP
        assert (name, reason) == (engine, None)
        # The tmpfs of Linux 6.6 and later takes O_DIRECT and goes through the page cache all the same.
        assert model.state.is_direct or kind == "tmpfs"
        assert model.state.is_direct is not any("no direct I/O" in note for note in model.state.notes)
        assert train(model, CASE) == undisturbed[0]
        assert differing(all_planes(model.state), undisturbed[1]) == []
    if kind == "btrfs":
        assert is_nocow(folder / "store")
    assert set(folder.iterdir()) - {folder / "lost+found"} == set(files(folder / "store"))


def test_a_file_system_without_direct_io_is_used_through_the_page_cache(tmp_path, undisturbed):
    """With ``data=journal`` ext4 takes ``O_DIRECT`` and buffers on the quiet: only statx tells."""
    with new_volume("ext4", tmp_path / "image", IMAGE_BYTES, "data=journal") as volume:
        make_store(volume.folder / "store", CASE)
        with opened(volume.folder / "store", CASE) as model:
            if model.state.dio_alignment is None:
                pytest.skip("the kernel does not say what direct I/O needs: it does since Linux 6.1")
            assert model.state.dio_alignment == (0, 0)
            assert not model.state.is_direct
            assert [note for note in model.state.notes if "no direct I/O" in note]
            assert train(model, CASE) == undisturbed[0]
            assert differing(all_planes(model.state), undisturbed[1]) == []


# ------------------------------------------------------------------------------------------ no space


@pytest.mark.parametrize("folder", [*KINDS, "tmpfs"], indirect=True)
def test_a_store_that_does_not_fit_leaves_nothing_behind(folder):
    fill(folder, leave=2 * MIB)
    before = sorted(folder.iterdir())
    with pytest.raises(NoSpaceError, match=r"needs (\d+) bytes .* and (\d+) bytes .* free") as caught:
        make_store(folder / "store", CASE)
    needed, free = map(int, re.findall(r"(\d+) bytes", str(caught.value)))
    assert free < needed
    assert needed > 2 * MIB
    assert caught.value.exit_code == 3
    assert sorted(folder.iterdir()) == before


@pytest.mark.parametrize("folder", [*KINDS, "tmpfs"], indirect=True)
def test_a_store_that_was_made_needs_no_more_space(folder, undisturbed):
    make_store(folder / "store", CASE)
    fill(folder)
    with pytest.raises(OSError, match="No space left"), (folder / "more").open("xb") as file:
        os.posix_fallocate(file.fileno(), 0, 1 * MIB)
    check_end(folder / "store", undisturbed)


# -------------------------------------------------------------------------------------------- failure

STEPS = 5


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A model folder, and data beside it."""
    folder = tmp_path_factory.mktemp("source")
    config = tiny_config("llama", tied=True, num_hidden_layers=2, vocab_size=263)
    build(config, seed=1).to(torch.bfloat16).save_pretrained(folder / "model")
    make_tokenizer(template=None).save_pretrained(folder / "model")
    write(folder / "train.jsonl", [{"text": "the quick brown fox jumps"[: 5 + i]} for i in range(20)])
    return folder


def command_line(source, run, *more):
    """`megatrain-io train`, with everything of the run in one folder."""
    settings = {
        "model": source / "model",
        "output_dir": run,
        "data.train": json.dumps([str(source / "train.jsonl")]),
        "data.packing": "false",
        "data.max_length": 64,
        "train.max_steps": STEPS,
        "train.per_device_train_batch_size": 2,
        "train.gradient_accumulation_steps": 2,
        "memory.threads": 1,
    }
    arguments = ["train", *(f"{name}={value}" for name, value in settings.items()), "--json", *more]
    return CliRunner().invoke(app, arguments, prog_name="megatrain-io")


def result_of(run):
    """Losses and state of a run."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    with open_store(RunFolder(run), engine=ENGINE) as state:
        assert state.verify().damaged == ()
        return {line["step"]: line["loss"] for line in lines}, all_planes(state)


@pytest.fixture(scope="module")
def whole(source, tmp_path_factory):
    run = tmp_path_factory.mktemp("whole") / "run"
    ended = command_line(source, run)
    assert ended.exit_code == 0, ended.stderr
    return result_of(run)


class Failure:
    """Something that befalls the drive at a place of the third or fourth step, once."""

    def __init__(self, monkeypatch, place, befall):
        self.acknowledged = None
        name, number = place
        plain = getattr(Step, name)

        def failing(step, *arguments, **options):
            if step._number == number and self.acknowledged is None:
                state = getattr(
                    step._state, "_state", step._state
                )  # beneath a device, where the profile has one
                self.acknowledged = state.generation - 1
                befall()
            return plain(step, *arguments, **options)

        monkeypatch.setattr(Step, name, failing)


# While the step reads ahead; while it updates and writes; while the step before it is being committed.
PLACES = [("forward", 3), ("_block_backward", 3), ("embedding", 4)]


def check_stopped(ended, acknowledged):
    """One clear error, from one class of the package, and no traceback."""
    assert isinstance(ended.exception, SystemExit), ended.exception
    error = json.loads(ended.stdout)["error"]
    print(acknowledged, error)  # noqa: T201 - shown with -rP
    assert (error["kind"], ended.exit_code) in [("StorageError", 4), ("StoreFailedError", 6)]
    assert error["exit_code"] == ended.exit_code
    assert [line for line in ended.stderr.splitlines() if not line.startswith("note: ")] == [
        f"megatrain-io: {error['message']}"
    ]
    assert acknowledged is not None


def check_resumed(source, run, whole, acknowledged):
    with open_store(RunFolder(run), engine=ENGINE) as state:
        step = json.loads(state.blob)["step"]
        assert acknowledged <= step <= acknowledged + 1
        assert state.generation == step + 1
        assert state.verify().damaged == ()
    ended = command_line(source, run, "--resume", f"memory.io_backend={ENGINE}")
    assert ended.exit_code == 0, ended.stderr
    losses, planes = result_of(run)
    assert losses == whole[0], "a line that the cut took was made anew"
    assert differing(planes, whole[1]) == []


def test_what_a_failing_drive_says_to_the_metrics_does_not_hide_what_came_first(tmp_path, monkeypatch):
    """Closing `metrics.jsonl` on the way out hid the store's error: a traceback instead of its exit code."""
    failing = Mock(close=Mock(side_effect=OSError(errno.EIO, "Input/output error")))
    metrics = MetricsFile(tmp_path / "metrics.jsonl", TrainerState())
    metrics.close()
    monkeypatch.setattr(metrics, "_file", failing)
    with pytest.raises(StoreFailedError, match="first"), metrics:
        raise StoreFailedError("first")
    with pytest.raises(OSError, match="Input/output"), metrics:
        pass


@pytest.mark.parametrize("volume", ["ext4"], indirect=True)
def test_a_full_file_system_stops_what_is_beside_the_store(volume, source, whole, monkeypatch):
    """`metrics.jsonl` grew where no space was left: a traceback, and no word of what was safe."""
    run = volume.folder / "run"
    with monkeypatch.context() as patch:
        failure = Failure(patch, ("forward", 3), lambda: fill(volume.folder))
        ended = command_line(source, run)
    assert ended.exit_code == 3, ended.exception
    error = json.loads(ended.stdout)["error"]
    assert error["kind"] == "NoSpaceError"
    assert error["message"].endswith("the last committed step is safe: go on with --resume")
    ended = command_line(source, run, "--resume")
    assert (ended.exit_code, json.loads(ended.stdout)["error"]["kind"]) == (3, "NoSpaceError")
    with open_store(RunFolder(run), engine=ENGINE) as state:
        kept = json.loads(state.blob)["step"]
    assert failure.acknowledged < kept < STEPS  # the store needed no space
    (volume.folder / "filler").unlink()
    check_resumed(source, run, whole, kept)


@pytest.mark.parametrize("place", PLACES, ids=lambda place: place[0].strip("_"))
@pytest.mark.parametrize("kind", KINDS)
def test_a_drive_that_fails_stops_the_run_and_loses_nothing(kind, place, drive, source, whole, monkeypatch):
    with new_volume(kind, drive.folder / "image", IMAGE_BYTES) as volume:
        run = volume.folder / "run"
        with monkeypatch.context() as patch:
            failure = Failure(patch, place, drive.fail)
            check_stopped(command_line(source, run), failure.acknowledged)
        volume.unmount()
        drive.power_on()
        volume.mount()
        check_resumed(source, run, whole, failure.acknowledged)


@pytest.mark.parametrize("place", PLACES, ids=lambda place: place[0].strip("_"))
@pytest.mark.parametrize("kind", KINDS)
def test_a_file_system_that_turns_read_only(kind, place, tmp_path, source, whole, monkeypatch):
    if kind == "btrfs":
        pytest.skip("btrfs has no switch for this; when its drive fails it turns read-only by itself")
    options = "errors=remount-ro" if kind == "ext4" else "rw"
    with new_volume(kind, tmp_path / "image", IMAGE_BYTES, options) as volume:
        run = volume.folder / "run"

        def turn():
            if kind == "ext4":
                Path("/sys/fs/ext4", Path(volume.device).name, "trigger_fs_error").write_text("1")
            else:
                shut_down(volume.folder)

        with monkeypatch.context() as patch:
            failure = Failure(patch, place, turn)
            check_stopped(command_line(source, run), failure.acknowledged)
        with pytest.raises(OSError, match="Read-only" if kind == "ext4" else "Input/output"):
            (volume.folder / "more").touch()
        volume.unmount()
        volume.mount(options)
        check_resumed(source, run, whole, failure.acknowledged)


@pytest.mark.skipif(not HAS_MOUNT_NUMBERS, reason="before Linux 6.8 no mount can be told from the next one")
@pytest.mark.parametrize("volume", ["ext4"], indirect=True)
def test_a_state_of_an_earlier_mount_is_verified_before_it_is_believed(volume):
    """A file system that turned read-only took writes and never made them; its superblock had landed all the same.

    Within one boot that was believed, as after a kill: the store opened with damaged extents. Now a state is believed
    only on the mount where it was written.
    """
    store, case = volume.folder / "store", Case(counts=(1,) * 3)
    make_store(store, case, drives=1)
    with opened(store, case, drives=1) as model:
        train(model, case)
        for name in (
            "killed",
            "mounted again",
        ):  # as a kill would leave them, but for what is written over now
            damaged = store.with_name(name)
            shutil.copy(store, damaged)
            with damaged.open("r+b") as file:
                file.seek(damaged.stat().st_size // 2)
                file.write(b"\xff" * (damaged.stat().st_size // 2))
    with PagedStore(store.with_name("killed"), engine=ENGINE) as state:
        assert state.verify().damaged, "the kernel was there all the time: it is not read through"
    volume.unmount()
    volume.mount()
    with pytest.raises(FormatError, match="generation 4 fails"):
        PagedStore(store.with_name("mounted again"), engine=ENGINE)


# ------------------------------------------------------------------------------------------ power cuts


def test_the_drive_of_these_tests_forgets_what_was_not_flushed(drive):
    for name in ("kept", "lost"):
        with (drive.folder / name).open("xb") as file:
            file.truncate(1 * MIB)
            os.fsync(file.fileno())
            file.write(b"written")
            file.flush()
            if name == "kept":
                os.fsync(file.fileno())
    drive.fail()
    drive.power_on()
    assert (drive.folder / "kept").read_bytes()[:7] == b"written"
    assert (drive.folder / "lost").read_bytes()[:7] == bytes(7)


@pytest.fixture(scope="module")
def training():
    with PacedTraining(len(CASE.counts)) as made:
        yield made


@pytest.mark.parametrize("kind", KINDS)
def test_an_image_of_any_moment_opens_at_a_whole_step(kind, drive, training, undisturbed):
    seed = random.SystemRandom().randrange(1 << 32)
    moments, images = random.Random(seed), []
    with new_volume(kind, drive.folder / "image", IMAGE_BYTES) as volume:
        make_store(volume.folder / "store", CASE)
        training.begin(volume.folder / "store")
        for cut in range(CUTS):
            # Of each two steps the first says how many writes a step is, the second is the one to be cut.
            before = volume.writes()
            training.give(2)
            training.wait_for(2 * cut + 1)
            seen = volume.writes()
            moment = seen + moments.randrange(seen - before + 1)
            while volume.writes() < moment and training.durable() < 2 * cut + 2:
                pass
            acknowledged = training.durable()
            if cut < CUTS - 1:
                image = drive.snapshot(volume.image, f"cut{cut}")
                images.append((image, acknowledged, training.durable() + 1))
                training.wait_for(2 * cut + 2)
            else:
                drive.fail()
                images.append((volume.image, acknowledged, training.end() + 1))
        volume.unmount()
    drive.power_on()
    for image, least, most in images:
        cut = Volume(kind, image, drive.folder / "mounted")
        cut.folder.mkdir(exist_ok=True)
        try:
            cut.mount()
            with PagedStore(*files(cut.folder / "store"), engine=ENGINE) as state:
                step, seen = progress_of(state)
                assert least <= step <= most, f"seed {seed}, {image.name}"
                assert state.generation == step + 1, f"seed {seed}, {image.name}"
                assert seen == undisturbed[0][:step], f"seed {seed}, {image.name}"
                assert state.verify().damaged == (), f"seed {seed}, {image.name}"
                print(kind, image.name, least, step, most)  # noqa: T201 - shown with -rP
            check_end(cut.folder / "store", undisturbed)
            cut.unmount()
        finally:
            cut.tear_down()
