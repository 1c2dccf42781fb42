"""Containers, ordinary users and old kernels refuse io_uring, or locked memory: training goes on, with the same
bits, and what it costs is said once.
"""

import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import restricted
from megatrain_io.machine.extension import probe_uring
from paged import DRIVES, PROFILE, files, make_store

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        platform.machine() not in restricted.ARCHITECTURES,
        reason="the filters are written for x86-64 and ARM64",
    ),
]
needs_uring = pytest.mark.skipif(probe_uring() is not None, reason="io_uring is refused here anyway")


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What became of the same training under each restriction."""
    folder = tmp_path_factory.mktemp("restricted")
    made = folder / "nothing"
    make_store(made, restricted.CASE)
    for name in restricted.RESTRICTIONS:
        if name != made.name:
            for there, here in zip(files(made), files(folder / name), strict=True):
                shutil.copy(there, here)
    if os.geteuid() == 0:
        for path in [folder, *files(folder / "ordinary user")]:
            os.chown(path, restricted.NOBODY, restricted.NOBODY)
    script = Path(restricted.__file__)
    paths = sys.path
    ended = subprocess.run(
        [sys.executable, "-W", "ignore", str(script), str(folder), *restricted.RESTRICTIONS],
        env={"PYTHONPATH": os.pathsep.join(paths), "PATH": "", PROFILE: str(DRIVES)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    return dict(zip(restricted.RESTRICTIONS, map(json.loads, ended.stdout.splitlines()), strict=True))


@pytest.mark.parametrize("name", list(restricted.RESTRICTIONS)[1:])
def test_the_bits_are_those_of_training_without_restrictions(results, name):
    for what in ("losses", "planes"):
        assert results[name][what] == results["nothing"][what]


def of_the_ring(result):
    return [note for note in result["notes"] if "I/O engine" in note or "registered" in note]


@needs_uring
@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("no ring, EPERM", "io_uring_setup: Operation not permitted"),
        ("no ring, ENOSYS", "io_uring_setup: Function not implemented"),
        ("no operations", "a ring was set up, but a first operation failed"),
        ("no registering", "io_uring_register: Operation not permitted"),
    ],
)
def test_without_a_ring_threads_take_over_and_one_note_says_why(results, name, words):
    assert results[name]["engine"] == "threads"
    [note] = of_the_ring(results[name])
    assert words in note


@needs_uring
@pytest.mark.parametrize("name", ["no registered buffers, ENOMEM", "no registered buffers, EPERM"])
def test_a_pool_that_cannot_be_registered_is_used_all_the_same(results, name):
    assert results[name]["engine"] == "uring"
    [note] = of_the_ring(results[name])
    assert "the pool is not registered with the kernel" in note
    assert "ulimit -l" in note


@needs_uring
@pytest.mark.skipif(os.geteuid() != 0, reason="only root can tell what another user is refused")
def test_an_ordinary_user_trains_with_8_mib_of_locked_memory(results):
    assert results["nothing"]["notes"] == []
    assert results["ordinary user"]["engine"] == "uring"
    [note] = of_the_ring(results["ordinary user"])
    assert "the pool is not registered with the kernel" in note


def test_a_pool_without_huge_pages_is_said_with_both_numbers(results):
    [note] = [note for note in results["no huge pages"]["notes"] if "huge pages" in note]
    huge, of = note.split(" of ")[0], note.split(" of ")[1].split(" MiB")[0]
    assert int(huge) == 0
    assert int(of) >= (restricted.POOL_SLOTS[0] * restricted.POOL_SLOTS[1]) >> 20
    assert "transparent_hugepage/enabled" in note
