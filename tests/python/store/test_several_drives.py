"""A store with a file on each of several drives: one store to every command, refused when a file is missing."""

import json
import os
from pathlib import Path

import pytest
from typer.testing import CliRunner

from megatrain_io.cli.app import app
from megatrain_io.runs.folder import RunFolder
from megatrain_io.runs.state import TrainerState
from megatrain_io.store.layout import ModelLayout
from megatrain_io.store.paged_store import Ledger, StoreCreator

ENGINE = "threads"  # stopping a ring takes a second; bits over both engines are tested in test_bit_equality
LAYOUT = ModelLayout.build([("only", [("weight", (4 * 4096,))])], 0, "f32", 4096)


def call(*arguments):
    return CliRunner().invoke(app, [str(word) for word in arguments], prog_name="megatrain-io")


@pytest.fixture
def run(tmp_path):
    """Four chunks on two drives."""
    run = RunFolder(tmp_path / "run")
    run.path.mkdir()
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        folder.mkdir()
    stores = run.stores_in(folders)
    creator = StoreCreator(stores, LAYOUT.manifest({}), ENGINE, Ledger())
    for chunk in LAYOUT.chunks:
        creator.write_chunk(chunk.index, b"\1" * (chunk.parameters * 4), "float32")
    run.write("fp32", stores, creator.finish(TrainerState().encode()), tmp_path)
    return run


def test_it_is_one_store_to_every_command(run):
    first, second = run.store_paths()
    assert (first.name, second.name) == ("run.mtio", "run.1.mtio")
    found = json.loads(call("status", run.path, "--json").stdout)
    assert found["stores"] == [str(first), str(second)]
    assert found["store_bytes"] == sum(path.stat().st_blocks * 512 for path in (first, second))
    assert json.loads(call("verify", run.path, "--json").stdout)["extents"] == 4
    assert call("clean", run.path, "--store", "--yes").exit_code == 0
    assert not first.exists()
    assert not second.exists()


def test_damage_is_named_with_the_file_that_it_is_in(run):
    _, second = run.store_paths()
    content = second.read_bytes()
    at = content.rfind(b"\1")
    with second.open("r+b") as file:
        file.seek(at)
        file.write(b"\2")
    result = json.loads(call("verify", run.path, "--json").stdout)
    (damage,) = result["damaged"]
    assert (damage["path"], damage["offset"]) == (str(second), at - 4 * 4096 + 1)


@pytest.mark.parametrize(
    ("spoil", "problem"),
    [
        (lambda _first, second: second.unlink(), "No such file"),
        (lambda first, second: second.write_bytes(first.read_bytes()), "it is file 1 of 2 of its store"),
        (lambda _first, second: os.truncate(second, 1 << 20), "it was truncated"),
        (lambda _first, second: second.write_bytes(bytes(8 << 20)), "not a megatrain-io store"),
    ],
    ids=["gone", "the other one", "truncated", "zeros"],
)
def test_without_one_of_its_files_it_is_refused_and_left_alone(run, spoil, problem):
    first, second = run.store_paths()
    spoil(first, second)
    before = first.read_bytes()
    for command in ("status", "verify"):
        result = call(command, run.path)
        assert problem in result.stdout + result.stderr
        assert str(second) in result.stdout + result.stderr
    assert first.read_bytes() == before


def test_files_of_two_stores_are_told_apart(run, tmp_path):
    other = [tmp_path / "c.mtio", tmp_path / "d.mtio"]
    creator = StoreCreator(other, LAYOUT.manifest({}), ENGINE, Ledger())
    creator.finish(b"")
    _, second = run.store_paths()
    second.write_bytes(other[1].read_bytes())
    assert "belongs to another store" in call("verify", run.path).stderr


def test_too_few_and_too_many_files_are_refused(run):
    info = json.loads(run.info_file.read_text())
    first, second = info["stores"]
    for stores, problem in (([first], "given as file 1 of 1"), ([second, first], "file 2 of 2")):
        run.info_file.write_text(json.dumps(info | {"stores": stores}))
        assert problem in call("verify", run.path).stderr


def test_a_folder_given_twice_holds_two_files_and_a_file_given_twice_is_refused(tmp_path):
    run = RunFolder(tmp_path / "run")
    assert len(set(run.stores_in([tmp_path, tmp_path]))) == 2
    with pytest.raises(Exception, match="give each drive a file of its own"):
        StoreCreator([tmp_path / "x", tmp_path / "x"], LAYOUT.manifest({}), ENGINE, Ledger())


def test_an_import_killed_between_two_renames_leaves_what_clean_removes(run):
    first, second = run.store_paths()
    run.info_file.unlink()
    first.rename(f"{first}.partial")
    result = call("clean", run.path, "--yes", "--store-dir", first.parent, "--store-dir", second.parent)
    assert result.exit_code == 0, result.stderr
    assert not Path(f"{first}.partial").exists()
    assert not second.exists()
