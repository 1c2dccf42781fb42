"""Files of a run and around it: what cannot be read is refused at once, and what is written is its owner's alone."""

import os
import socket
import stat
from contextlib import contextmanager
from pathlib import Path

import pytest
from typer.testing import CliRunner

from megatrain_io import files
from megatrain_io.cli.app import app
from megatrain_io.errors import StorageError
from megatrain_io.files import (
    UnfitFileError,
    append_file,
    make_folder,
    new_file,
    open_file,
    read_file,
    replace_file,
    storage_errors,
)
from runs import configured, start


def mode(path):
    return stat.S_IMODE(path.lstat().st_mode)


@contextmanager
def umask(value):
    before = os.umask(value)
    yield
    os.umask(before)


def unfit(kind, path):
    """Put something at a path that is no regular file; what it is called."""
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        with socket.socket(socket.AF_UNIX) as end:
            here = Path.cwd()
            os.chdir(path.parent)  # the name of a socket may have 107 bytes
            end.bind(path.name)
            os.chdir(here)
    return {"pipe": "a named pipe (FIFO)"}.get(kind, f"a {kind}")


KINDS = ["pipe", "folder", "device", "socket"]


# ------------------------------------------------------------------------------------------- the functions


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_no_file_is_refused_and_does_not_block(kind, tmp_path):
    """A pipe in the place of a file hung the command for good, without a word."""
    path = tmp_path / "it"
    what = unfit(kind, path)
    for act in (open_file, append_file, lambda path: read_file(path, 10)):
        with pytest.raises(UnfitFileError, match=r"regular file is needed") as caught:
            act(path)
        assert caught.value.strerror == f"it is {what}, and a regular file is needed"
    with pytest.raises(StorageError, match=r"it: it is .*Move it away.*; safe"), storage_errors(path, "safe"):
        open_file(path)


def test_what_takes_the_place_of_a_file_is_refused_too(tmp_path, monkeypatch):
    """Between the look and the opening somebody may put a pipe there."""
    os.mkfifo(tmp_path / "it")
    real, looks = files._refuse_unfit, []
    monkeypatch.setattr(
        files, "_refuse_unfit", lambda *what: looks.append(what) or (len(looks) > 1 and real(*what))
    )
    with pytest.raises(UnfitFileError, match="named pipe"):
        open_file(tmp_path / "it")


def test_a_file_that_is_too_large_is_refused_with_both_numbers(tmp_path):
    (tmp_path / "it").write_bytes(bytes(11))
    with pytest.raises(UnfitFileError, match="it has 11 bytes, and at most 10 are read"):
        read_file(tmp_path / "it", 10)
    assert read_file(tmp_path / "it", 11) == bytes(11)
    with pytest.raises(UnfitFileError, match="more than 3 bytes"):
        read_file(Path("/proc/self/status"), 3)  # the kernel tells no size


@pytest.mark.parametrize("value", [0o000, 0o022, 0o077, 0o777], ids=oct)
def test_what_is_written_is_the_owners_alone_whatever_the_umask(tmp_path, value):
    with umask(value):
        made = make_folder(tmp_path / "a" / "b")
    assert made == [tmp_path / "a", tmp_path / "a" / "b"]
    assert [mode(folder) for folder in made] == [0o700, 0o700]
    assert make_folder(tmp_path / "a" / "b") == []
    with umask(value):
        new_file(tmp_path / "a" / "new").close()
        replace_file(tmp_path / "a" / "old", "x")
        (tmp_path / "a" / "old").chmod(0o666)
        replace_file(tmp_path / "a" / "old", "y")
    assert {mode(tmp_path / "a" / name) for name in ("new", "old")} == {0o600}


def test_a_link_in_the_place_of_a_new_file_is_not_followed(tmp_path):
    (tmp_path / "victim").write_text("mine")
    (tmp_path / "it.tmp").symlink_to(tmp_path / "victim")
    replace_file(tmp_path / "it", "new")
    assert ((tmp_path / "victim").read_text(), (tmp_path / "it").read_text()) == ("mine", "new")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(FileExistsError):
        new_file(tmp_path / "link")


def test_a_folder_that_was_there_stays_as_it_is(tmp_path):
    tmp_path.chmod(0o755)
    assert make_folder(tmp_path) == []
    assert mode(tmp_path) == 0o755
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError):
        make_folder(tmp_path / "file" / "more")


# ---------------------------------------------------------------------------------------- on the command line


def call(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments], prog_name="megatrain-io")


@pytest.mark.parametrize(
    ("name", "kind", "code"),
    [
        ("run.json", "pipe", 0),  # made anew from the store
        ("run.json", "folder", 4),
        ("metrics.jsonl", "pipe", 4),
        ("metrics.jsonl", "device", 4),
        ("model/config.json", "pipe", 4),
        ("model/tokenizer.json", "pipe", 4),
        ("model/generation_config.json", "pipe", 4),
        ("config.yaml", "pipe", 0),
        ("data/index.json", "pipe", 0),
        ("data/index.json", "folder", 4),
        ("data/train.tokens", "pipe", 0),
        ("store.mtio", "pipe", 4),
    ],
)
def test_no_file_of_a_run_hangs_it(source, stopped, name, kind, code):
    path = stopped / name
    path.rename(path.parent / "aside")
    what = unfit(kind, path)
    config = configured(source, stopped)
    (stopped.parent / "my.yaml").write_text(config.to_yaml())
    ended = call("train", "--config", stopped.parent / "my.yaml", "--resume")
    assert ended.exception is None or isinstance(ended.exception, SystemExit), ended.exception
    assert ended.exit_code == code, ended.stderr
    if code:
        sentence = ended.stderr.splitlines()[-1]
        assert str(path) in sentence
        assert what in sentence or "regular file" in sentence or "directory" in sentence.lower()


@pytest.mark.parametrize("kind", KINDS)
def test_no_file_that_a_command_names_hangs_it(source, tmp_path, kind):
    what = unfit(kind, tmp_path / "it")
    for arguments in (
        ("train", "--config", tmp_path / "it"),
        ("plan", source / "model", "--on", tmp_path / "it"),
        ("plan", source / "model", "--config", tmp_path / "it"),
        ("bench", tmp_path, "--output", tmp_path / "it"),
    ):
        ended = call(*arguments)
        assert ended.exit_code in (2, 4), (arguments, ended.exception)
        assert what in ended.stderr or "cannot be written" in ended.stderr
        assert "Traceback" not in ended.output


@pytest.mark.parametrize("value", [0o000, 0o022], ids=oct)
def test_everything_of_a_run_is_the_owners_alone_whatever_the_umask(source, tmp_path, value):
    """Tokenised text, samples, metrics and exports were readable by everybody; only the store was not."""
    config = configured(source, tmp_path / "run")
    (tmp_path / "my.yaml").write_text(config.to_yaml())
    trace = tmp_path / "trace.json"
    with umask(value):
        ended = call("train", "--config", tmp_path / "my.yaml", "--trace", trace, "max_steps=1")
        assert ended.exit_code == 0, ended.stderr
        assert call("export", tmp_path / "run", tmp_path / "deep" / "out").exit_code == 0
    places = [tmp_path / "run", tmp_path / "deep", trace]
    inside = [path for place in places for path in (place, *place.rglob("*"))]
    assert len(inside) > 15
    for path in inside:
        assert mode(path) == (0o700 if path.is_dir() else 0o600), path


def test_a_run_folder_made_by_hand_keeps_its_rights_and_its_files_are_private(source, tmp_path):
    (tmp_path / "run" / "data").mkdir(parents=True)
    for folder in (tmp_path / "run", tmp_path / "run" / "data"):
        folder.chmod(0o755)
    start(configured(source, tmp_path / "run", max_steps=1))
    assert mode(tmp_path / "run") == 0o755
    files_ = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert {mode(path) for path in files_} == {0o600}


def test_a_run_folder_that_everybody_may_write_to_is_told(source, tmp_path):
    (tmp_path / "a run").mkdir()
    (tmp_path / "a run").chmod(0o777)
    _, reporter = start(configured(source, tmp_path / "a run", max_steps=1))
    (note,) = [note for note in reporter.starts[0][2] if "chmod" in note]
    assert note.endswith(f"chmod o-w '{tmp_path / 'a run'}' ends that")
