"""A forked worker must hold neither the store's lock nor the pool, whatever becomes of its parent."""

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from megatrain_io.store.inspect import owner_of
from megatrain_io.store.layout import ModelLayout
from megatrain_io.store.paged_store import Ledger, PagedStore, StoreCreator
from megatrain_io.store.pool import BufferKind, PoolSizes

pytestmark = pytest.mark.slow

ENGINES = ["uring", "threads"]

# Opens the store and makes a worker, which says who it is and what it has of its parent, and lives until
# the test closes the pipe.
PARENT = """
    import os, signal, sys
    from pathlib import Path
    from torch.utils.data import DataLoader, Dataset
    from megatrain_io.store.pool import BufferKind, PoolSizes
    from megatrain_io.store.paged_store import PagedStore

    state = PagedStore(Path(sys.argv[1]), engine=sys.argv[2])
    state.start(PoolSizes((4 << 20, 2), (BufferKind(None, 4 << 20, 2),)))
    maps = lambda: open("/proc/self/maps").read().splitlines()
    regions = {line.split()[0] for line in maps()}

    def work():
        inherited = {line.split()[0] for line in maps()}
        sizes = [int(b, 16) - int(a, 16) for a, b in (r.split("-") for r in regions - inherited)]
        links = [f"/proc/self/fd/{fd}" for fd in os.listdir("/proc/self/fd")]
        targets = [os.readlink(link) for link in links if os.path.lexists(link)]
        holds = any(target.endswith("/store") or "io_uring" in target for target in targets)
        print(os.getpid(), max(sizes, default=0), holds, flush=True)
        os.read(int(sys.argv[4]), 1)

    class PackedDataset(Dataset):
        def __len__(self):
            return 1

        def __getitem__(self, index):
            work()

    if sys.argv[3] == "loader":
        next(iter(DataLoader(PackedDataset(), num_workers=1, multiprocessing_context="fork")))
    elif os.fork() == 0:
        work()
        os._exit(0)
    signal.pause()
"""


@pytest.fixture
def store(tmp_path):
    layout = ModelLayout.build([("only", [("weight", (4096,))])], 0, "f32", 4096)
    path = Path(tmp_path / "store")
    creator = StoreCreator([path], layout.manifest({}), "threads", Ledger())
    creator.write_chunk(0, bytes(4 * 4096), "float32")
    creator.finish(b"blob")
    return path


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("worker", ["fork", "loader"])
def test_a_worker_that_outlives_its_killed_parent_holds_neither_lock_nor_pool(store, engine, worker):
    reading, writing = os.pipe()
    arguments = [str(store), engine, worker, str(reading)]
    parent = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(PARENT), *arguments],
        stdout=subprocess.PIPE,
        text=True,
        pass_fds=[reading],
    )
    try:
        child, missing, holds = parent.stdout.readline().split()
        parent.send_signal(signal.SIGKILL)
        parent.wait()
        os.kill(int(child), 0)  # the worker is alive
        with PagedStore(store, engine="threads") as state:  # waits up to 5 s for the lock, else raises
            assert state.blob == b"blob"
        os.kill(int(child), 0)
        assert holds == "False", "the child holds the store's or the ring's descriptor"
        assert int(missing) >= 8 << 20, "the pool was inherited"
    finally:
        os.close(writing)
        os.close(reading)
        parent.stdout.close()


@pytest.mark.parametrize("engine", ENGINES)
def test_closing_gives_the_lock_back_at_once(store, engine):
    """Nothing of the engine keeps the file open, however soon the next one comes."""
    for _ in range(3):
        with PagedStore(store, engine=engine) as state:
            state.start(PoolSizes((4 << 20, 2), (BufferKind(None, 4 << 20, 2),)))
            assert state.verify().damaged == ()
            assert owner_of(store) is not None
        assert owner_of(store) is None
