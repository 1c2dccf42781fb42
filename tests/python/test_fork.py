"""A forked worker must hold neither the store's lock nor the pool, whatever becomes of its parent."""

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from megatrain_io.layout import ModelLayout
from megatrain_io.swap import Ledger, PagedState, StoreCreator

ENGINES = ["uring", "threads"]

# Opens the store, forks a worker that outlives it, says where the pool lies, and waits to be killed.
PARENT = """
    import os, sys
    from pathlib import Path
    from megatrain_io.schedule import PoolSizes
    from megatrain_io.swap import PagedState

    state = PagedState(Path(sys.argv[1]), engine=sys.argv[2])
    state.start(PoolSizes((4 << 20, 2), (4 << 20, 2), (0, 0), (0, 0), (0, 0)))
    maps = lambda: open("/proc/self/maps").read().splitlines()
    regions = {line.split()[0] for line in maps()}
    child = os.fork()
    if child == 0:
        # What the parent has and the child has not: the pool, which is not inherited.
        inherited = {line.split()[0] for line in maps()}
        sizes = [int(b, 16) - int(a, 16) for a, b in (r.split("-") for r in regions - inherited)]
        targets = [os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd")
                   if os.path.lexists(f"/proc/self/fd/{fd}")]
        print(max(sizes, default=0), any("store" in t or "io_uring" in t for t in targets), flush=True)
        sys.stdin.read()  # until the test closes it
        os._exit(0)
    print(child, flush=True)
    os.waitpid(child, 0)
"""


@pytest.fixture
def store(tmp_path):
    layout = ModelLayout.build([("only", [("weight", (4096,))])], 1, "f32", 4096)
    path = Path(tmp_path / "store")
    creator = StoreCreator(path, layout.manifest({}), "threads", Ledger())
    creator.write_chunk(0, bytes(4 * 4096), "float32")
    creator.finish(b"blob")
    return path


@pytest.mark.parametrize("engine", ENGINES)
def test_a_worker_that_outlives_its_killed_parent_holds_neither_lock_nor_pool(store, engine):
    parent = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(PARENT), str(store), engine],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    said = sorted((parent.stdout.readline().split() for _ in range(2)), key=len)
    child, (missing, holds) = int(said[0][0]), said[1]
    try:
        parent.send_signal(signal.SIGKILL)
        parent.wait()
        os.kill(child, 0)  # the worker is alive
        with PagedState(store, engine="threads") as state:  # waits up to 5 s for the lock, else raises
            assert state.blob == b"blob"
        assert holds == "False", "the child holds the store's or the ring's descriptor"
        assert int(missing) >= 8 << 20, "the pool was inherited"
    finally:
        parent.stdin.close()
        parent.stdout.close()
