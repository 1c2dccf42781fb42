"""What the operating system refuses is told with the operation, the path, the cause and what to do."""

import os
import re
import resource
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

import megatrain_io
from megatrain_io import TensorStore
from megatrain_io.errors import FormatError, StorageError, StoreInUseError

SPEC = {"w": ((2,), torch.uint8)}
MEMORY = "24MiB"
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(megatrain_io.__file__).parents[1])}


def create(path, spec=SPEC):
    return TensorStore.create(path, spec, engine="threads", memory=MEMORY)


@contextmanager
def limited(what, soft):
    before = resource.getrlimit(what)
    resource.setrlimit(what, (soft, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(what, before)


def told(error):
    """The message of an error, which must be a sentence about one operation on one file."""
    text = str(error.value)
    assert "of 0 bytes" not in text
    assert "of of" not in text
    assert "+0:" not in text or "reservation" in text
    return text


def test_a_limit_on_the_size_of_files_is_not_told_as_a_full_drive(tmp_path):
    """With 60 GB free: "needs 1048576 bytes and 60000000000 are free"."""
    with limited(resource.RLIMIT_FSIZE, 1 << 20), pytest.raises(StorageError) as error:
        create(tmp_path / "store")
    assert re.search(r"reservation of \d+ bytes at .*store.partial.*File too large.*ulimit -f", told(error))
    assert list(tmp_path.iterdir()) == []


def test_too_many_open_files(tmp_path):
    create(tmp_path / "store").close()
    lowest = os.dup(0)
    os.close(lowest)
    with limited(resource.RLIMIT_NOFILE, lowest), pytest.raises(StorageError) as error:
        TensorStore.open(tmp_path / "store", engine="threads", memory=MEMORY)
    assert re.search(r"^open .*store: Too many open files.*ulimit -n", told(error))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "missing/store",
            r"look at .*missing: No such file or directory.*Check the path, and that its drive is mounted",
        ),
        ("file/store", r"(look at|create) .*file.*: Not a directory.*is a file: check the path"),
        ("n" * 300, r"create .*: File name too long.*Choose a shorter name"),
    ],
)
def test_a_path_that_cannot_be(tmp_path, name, message):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StorageError) as error:
        create(tmp_path / name)
    assert re.search(message, told(error))
    assert [each.name for each in tmp_path.iterdir()] == ["file"]


def test_what_is_opened_is_there_and_a_file(tmp_path):
    create(tmp_path / "store").close()
    (tmp_path / "link").symlink_to("store")
    (tmp_path / "circle").symlink_to("circle")
    for name, message in [
        ("missing", r"missing: No such file or directory.*Check the path"),
        ("link", r"open .*link: Too many levels of symbolic links.*give the path of the file itself"),
        ("circle", r"circle: Too many levels of symbolic links"),
        (".", r"Is a directory.*give the path of a file"),
    ]:
        with pytest.raises(StorageError) as error:
            TensorStore.open(tmp_path / name, memory=MEMORY)
        assert re.search(message, told(error))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_no_right_to_write(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(StorageError) as error:
        create(tmp_path / "store")
    assert re.search(r"create .*Permission denied.*ls -ld", told(error))


@pytest.mark.parametrize("other", ["a", "./a", "folder/../a", "linked/a"])
def test_one_file_cannot_stand_for_two_drives(tmp_path, other):
    """Whoever locked it once waited five seconds for itself, and then blamed itself by its process number."""
    (tmp_path / "folder").mkdir()
    (tmp_path / "linked").symlink_to(".")
    before = {path.name for path in tmp_path.iterdir()}
    paths = [str(tmp_path / "a"), f"{tmp_path}/{other}"]
    with pytest.raises(FormatError, match="files 1 and 2 of the store are this one file"):
        create(paths)
    assert {path.name for path in tmp_path.iterdir()} == before
    create(tmp_path / "a").close()
    with pytest.raises(FormatError, match="files 1 and 2 of the store are this one file"):
        TensorStore.open(paths, memory=MEMORY)


@pytest.mark.slow
def test_a_store_that_this_process_has_open_itself(tmp_path):
    with (
        create(tmp_path / "store"),
        pytest.raises(StoreInUseError, match="very process: close it there first"),
    ):
        TensorStore.open(tmp_path / "store", memory=MEMORY)


@pytest.mark.slow
def test_memory_that_the_kernel_does_not_give(tmp_path):
    script = """
import resource, sys
from pathlib import Path
import torch
from megatrain_io import TensorStore
from megatrain_io.errors import DoesNotFitError
used = int(Path("/proc/self/statm").read_text().split()[0]) * 4096
resource.setrlimit(resource.RLIMIT_AS, (used + (64 << 20),) * 2)
try:
    TensorStore.create(sys.argv[1], {"w": ((2,), torch.uint8)}, engine="threads", memory="512MiB")
except DoesNotFitError as error:
    print(error)
"""
    command = [sys.executable, "-c", script, str(tmp_path / "store")]
    ended = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=True)
    assert re.search(r"bytes of RAM .* cannot be had: Cannot allocate memory.*ulimit -v", ended.stdout)
    assert list(tmp_path.iterdir()) == []
