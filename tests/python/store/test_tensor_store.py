"""Tensors on a drive: the same bits come back, a commit is all or nothing, and each mistake is one clear error."""

import gc
import os
import random
import re
import signal
import subprocess
import sys
import textwrap
import threading
from contextlib import suppress
from pathlib import Path

import pytest
import torch

import megatrain_io
from format_reader import StoreReader
from megatrain_io import TensorStore
from megatrain_io.errors import (
    CorruptionError,
    FormatError,
    PoolExhaustedError,
)
from megatrain_io.store.paged_store import Ledger
from megatrain_io.store.tensor_manifest import DTYPES

ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(megatrain_io.__file__).parents[1])}
ENGINES = ["uring", "threads"]
MEMORY = "24MiB"


@pytest.fixture(params=ENGINES)
def engine(request):
    return request.param


def random_bits(shape, dtype, seed=0):
    """A tensor with every bit pattern that comes, NaNs too."""
    generator = torch.Generator().manual_seed(seed)
    count = dtype.itemsize * torch.Size(shape).numel()
    high = 2 if dtype is torch.bool else 256
    return torch.randint(0, high, (count,), dtype=torch.uint8, generator=generator).view(dtype).view(shape)


def same_bits(a, b):
    assert (a.shape, a.dtype) == (b.shape, b.dtype)
    return torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))


def created(path, tensors, **options):
    return TensorStore.create(path, tensors, **{"engine": "threads", "memory": MEMORY, **options})


# ------------------------------------------------------------------------------------------ the bits


@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")
def test_every_dtype_and_shape_comes_back_to_the_bit(tmp_path, engine):
    assert {dtype.itemsize for dtype in DTYPES.values()} == {1, 2, 4, 8, 16}
    shapes = {"scalar": (), "empty": (0, 3), "short": (5,), "matrix": (3, 1000)}
    put = {
        f"{name}.{shape}": random_bits(sizes, dtype, seed)
        for seed, (name, dtype) in enumerate(DTYPES.items())
        for shape, sizes in shapes.items()
    }
    with created(tmp_path / "store", put, engine=engine) as store:
        for name, tensor in put.items():
            assert not store.get(name).reshape(-1).view(torch.uint8).any(), "zero before it is put"
            store.put(name, tensor)
    with TensorStore.open(tmp_path / "store", engine=engine, memory=MEMORY) as store:
        assert store.names == tuple(put)
        for name, tensor in put.items():
            assert (store.shape(name), store.dtype(name)) == (tensor.shape, tensor.dtype)
            assert store.nbytes(name) == tensor.nbytes
            assert same_bits(store.get(name), tensor), name


@pytest.mark.parametrize("elements", [8 << 20, (8 << 20) + 1, (16 << 20) - 4096, 20_000_001])
def test_chunk_borders_are_no_borders(tmp_path, engine, elements):
    inside, outside = "inside", "outside"
    spec = ((elements,), torch.uint8)
    memory = "48MiB"
    with created(tmp_path / "store", {inside: spec, outside: spec}, engine=engine, memory=memory) as store:
        given = random_bits((elements,), torch.uint8)
        tensor = store.empty(inside).copy_(given)
        ticket = store.put(inside, tensor)
        store.put(outside, given).wait()
        ticket.wait()
        assert same_bits(tensor, given), "what is put stays where it is"
        tensor.zero_()
        assert store.get(inside, out=tensor) is tensor
        assert same_bits(tensor, given)
        out = torch.zeros_like(given)
        assert store.get(outside, out=out) is out
        assert same_bits(out, given)
        assert store.verify().damaged == ()


def test_tensors_on_several_drives_come_back_to_the_bit(tmp_path, engine):
    paths = [tmp_path / "a", tmp_path / "b", tmp_path / "c"]
    tensor = random_bits((4 * (8 << 20) + 5,), torch.uint8)
    with TensorStore.create(paths, {"x": tensor}, engine=engine, memory="48MiB") as store:
        store.put("x", tensor)
    assert len({path.stat().st_size for path in paths}) > 1, "five chunks over three drives"
    with TensorStore.open(paths, engine=engine, memory="48MiB") as store:
        assert same_bits(store.get("x"), tensor)
        assert store.verify().extents == 5


def test_a_tensor_in_the_stores_memory_moves_without_a_copy(tmp_path, engine):
    with created(tmp_path / "store", {"w": ((1000,), torch.float32)}, engine=engine) as store:
        tensor = store.empty("w").fill_(1.5)
        staged = store.ledger.balances()["tensors"]
        store.put("w", tensor).wait()
        assert store.io_bytes()[1] >= 4096
        # Its last page is the tensor's own, so a copy elsewhere would not show the file what is here.
        address = tensor.data_ptr()
        assert store.get("w", out=tensor).data_ptr() == address
        assert store.ledger.balances()["tensors"] == staged


def test_bytes_behind_a_tensor_are_not_those_of_another(tmp_path):
    path = tmp_path / "store"
    with created(path, {"w": ((5,), torch.uint8), "page": ((4096,), torch.uint8)}) as store:
        store.put("page", store.empty("page").fill_(255)).wait()
        gc.collect()
        store.put("w", store.empty("w").fill_(1)).wait()
    reader = StoreReader(path)
    assert reader.plane("w", "weight") == b"\1" * 5
    assert reader.group(0, 0)[5:] == bytes(4091)
    assert reader.plane("page", "weight") == b"\xff" * 4096


def test_a_slice_of_a_tensor_is_a_tensor_of_its_own(tmp_path):
    """Its memory begins where that of the whole does: only its own bytes may be touched."""
    with created(tmp_path / "store", {"big": ((4096,), torch.uint8), "w": ((100,), torch.uint8)}) as store:
        big = store.empty("big").fill_(7)
        store.put("w", big[:100]).wait()
        assert bool((big == 7).all())
        store.put("w", torch.ones(100, dtype=torch.uint8))
        store.get("w", out=big[:100])
        assert bool((big[:100] == 1).all())
        assert bool((big[100:] == 7).all())
        store.put("w", big[1000:1100])
        assert bool((store.get("w") == 7).all())


def test_a_scratch_store_takes_half_the_space_and_keeps_what_was_put(tmp_path):
    spec = {"w": ((8 << 20,), torch.uint8)}
    value = random_bits((8 << 20,), torch.uint8)
    sizes = {}
    for durability in ("step", "scratch"):
        path = tmp_path / durability
        store = created(path, spec, durability=durability)
        store.put("w", value)
        assert store.verify().damaged == ()
        store.close()
        sizes[durability] = path.stat().st_size
        with TensorStore.open(path, memory=MEMORY) as store:
            assert bool(store.get("w").any()) is (durability == "scratch")
    assert sizes["step"] - sizes["scratch"] == 8 << 20
    assert StoreReader(tmp_path / "scratch").plane("w", "weight") == value.numpy().tobytes()


# --------------------------------------------------------------------------------------- under way


def test_tickets_may_be_waited_for_in_any_order(tmp_path, engine):
    names = [f"t{i}" for i in range(40)]
    with created(tmp_path / "store", dict.fromkeys(names, ((10000,), torch.int32)), engine=engine) as store:
        tickets = [
            store.put(name, torch.full((10_000,), i, dtype=torch.int32)) for i, name in enumerate(names)
        ]
        random.Random(1).shuffle(tickets)
        for ticket in tickets:
            ticket.wait()
            assert ticket.done
            ticket.wait()
        fetched = [(i, store.prefetch(name)) for i, name in enumerate(names)]
        for i, ticket in reversed(fetched):
            assert int(ticket.result().min()) == int(ticket.result().max()) == i
            assert ticket.result() is ticket.result()


def test_get_takes_what_was_prefetched_and_nothing_older_than_the_last_put(tmp_path):
    with created(tmp_path / "store", {"w": ((10_000,), torch.int32)}) as store:
        store.put("w", torch.full((10_000,), 1, dtype=torch.int32)).wait()
        store.prefetch("w")
        read = store.io_bytes()[0]
        first = store.get("w")
        assert store.io_bytes()[0] in (read, read + 40_960)
        read = store.io_bytes()[0]
        assert store.get("w").data_ptr() != first.data_ptr(), "a second get has its own"
        assert store.io_bytes()[0] == read + 40_960
        store.prefetch("w")
        store.put("w", torch.full((10_000,), 2, dtype=torch.int32))
        assert int(store.get("w")[0]) == 2
        ticket = store.prefetch("w")
        ticket.result().zero_()
        assert int(store.get("w")[0]) == 2, "who has the tensor may change it"
        store.prefetch("w")
        out = torch.zeros(10_000, dtype=torch.int32)
        assert int(store.get("w", out=out)[0]) == 2


def test_threads_may_share_a_store(tmp_path):
    names = [f"t{i}" for i in range(4)]
    wrong = []

    def work(store, name, value):
        for turn in range(10):
            given = torch.full((100_000,), value * 100 + turn, dtype=torch.int32)
            store.put(name, given)
            if not torch.equal(store.get(name), given):
                wrong.append((name, turn))
            store.commit()

    with created(tmp_path / "store", dict.fromkeys(names, ((100000,), torch.int32))) as store:
        threads = [threading.Thread(target=work, args=(store, n, i)) for i, n in enumerate(names)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert wrong == []


def test_memory_is_fixed_counted_and_free_again(tmp_path):
    ledger = Ledger()
    store = created(tmp_path / "store", {"w": ((2 << 20,), torch.uint8)}, ledger=ledger, memory="16MiB")
    mapped = ledger.balances()["tensors"]
    assert mapped == (16 << 20, 16 << 20)
    held = []
    while True:
        try:
            held.append(store.empty("w"))
        except PoolExhaustedError as error:
            refused = str(error)
            break
    assert re.search(r"'w' has 2097152 bytes .* free run .* has 0 \(of 0 free", refused)
    assert len(held) == 6, "16 MiB less two slots of 2 MiB to copy through"
    # A get goes on, in torch's memory.
    assert store.get("w").nbytes == 2 << 20
    view = held.pop()[100:200]
    with pytest.raises(PoolExhaustedError):
        store.prefetch("w")
    del view
    store.prefetch("w").result()
    store.put("w", held[0].fill_(7)).wait()
    store.close()
    assert ledger.balances()["tensors"] == mapped, "a tensor outlives the store"
    assert bool((held[0] == 7).all())
    held.clear()
    gc.collect()
    assert ledger.balances()["tensors"][0] == 0


@pytest.mark.slow
def test_ctrl_c_gives_way_and_the_put_must_be_repeated(tmp_path):
    """Signals are looked at while a copy waits for a slot; what was half put is not taken for whole."""
    script = f"""
        import signal, threading, torch, os, sys
        from megatrain_io import TensorStore
        from megatrain_io.errors import MegatrainIoError
        store = TensorStore.create({str(tmp_path / "store")!r}, {{"w": ((60 << 20,), torch.uint8)}}, memory="20MiB")
        given = torch.ones(60 << 20, dtype=torch.uint8)
        def interrupt(*_):
            raise KeyboardInterrupt
        signal.signal(signal.SIGALRM, interrupt)
        for microseconds in (2000, 4000, 8000, 16000, 32000, 500, 200, 100000):
            try:
                signal.setitimer(signal.ITIMER_REAL, microseconds / 1e6)
                store.put("w", given).wait()
                signal.setitimer(signal.ITIMER_REAL, 0)
            except KeyboardInterrupt:
                try:
                    content = store.get("w")
                except MegatrainIoError as error:
                    assert "put of tensor w was not finished (it was interrupted)" in str(error), error
                else:
                    assert bool((content == content[0]).all()), "a mixture"
                    del content
        store.put("w", given).wait()
        store.commit()
        assert bool(store.get("w").all())
        store.close()
    """
    subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        check=True,
        timeout=60,
        env=ENVIRONMENT,
    )


# -------------------------------------------------------------------------------- what is committed


@pytest.mark.slow
def test_only_what_was_committed_is_there_again(tmp_path, engine):
    path = tmp_path / "store"
    spec = {"a": ((5000,), torch.int32), "b": ((), torch.int32)}
    with created(path, spec, engine=engine) as store:
        store.put("a", torch.full((5000,), 1, dtype=torch.int32))
        store.put("b", torch.tensor(1, dtype=torch.int32))
        store.commit()
        assert store.generation == 2
        store.commit()
        assert store.generation == 2, "nothing was put: there is nothing to commit"
    with suppress(ZeroDivisionError), TensorStore.open(path, engine=engine, memory=MEMORY) as store:
        store.put("a", torch.full((5000,), 2, dtype=torch.int32)).wait()
        assert int(store.get("a")[0]) == 2
        raise ZeroDivisionError
    store = TensorStore.open(path, engine=engine, memory=MEMORY)
    store.put("b", torch.tensor(2, dtype=torch.int32)).wait()
    store.close()
    with TensorStore.open(path, engine=engine, memory=MEMORY) as store:
        assert (int(store.get("a")[0]), int(store.get("b")), store.generation) == (1, 1, 2)


KILLED = """
    import sys, torch
    from megatrain_io import TensorStore
    store = TensorStore.open(sys.argv[1], engine=sys.argv[2], memory="64MiB")
    value = int(store.get("small")[0])
    print("ready", flush=True)
    while True:
        value += 1
        for name in store.names:
            given = torch.full(store.shape(name), value, dtype=torch.int32)
            if value % 2:
                given = store.empty(name).copy_(given)
            store.put(name, given)
        store.commit()
        print(value, flush=True)
"""


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_kill_at_any_moment_leaves_the_old_set_or_the_new_one(tmp_path):
    path = tmp_path / "store"
    spec = {"small": ((10,), torch.int32), "large": ((3 << 20,), torch.int32)}
    created(path, spec).close()
    seed = random.SystemRandom().randrange(1 << 32)
    moments = random.Random(seed)
    committed = 0
    for kill in range(4):
        command = [sys.executable, "-c", textwrap.dedent(KILLED), str(path), ENGINES[kill % 2]]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=ENVIRONMENT) as process:
            assert process.stdout.readline() == "ready\n"
            timer = threading.Timer(moments.uniform(0.02, 0.3), process.send_signal, [signal.SIGKILL])
            timer.start()
            said = process.stdout.read().splitlines()
            process.wait()
        committed = int(said[-1]) if said else committed
        with TensorStore.open(path, memory=MEMORY) as store:
            values = {int(v) for name in store.names for v in store.get(name).unique()}
            assert len(values) == 1, f"a mixture: {values} (seed {seed}, kill {kill})"
            assert values <= {committed, committed + 1}, f"seed {seed}, kill {kill}"
            committed = values.pop()
            assert store.verify().damaged == ()
    assert committed > 0, "nothing was committed before a kill: the test shows nothing"


def test_a_changed_byte_is_reported_with_tensor_and_place(tmp_path, engine):
    path = tmp_path / "store"
    value = random_bits((9 << 20,), torch.uint8)
    with created(path, {"first": ((10,), torch.uint8), "w": (value.shape, torch.uint8)}) as store:
        store.put("w", value)
        store.put("first", torch.ones(10, dtype=torch.uint8))
    content = path.read_bytes()
    at = content.index(value[5 << 20 : (5 << 20) + 64].numpy().tobytes())
    with path.open("r+b") as file:
        file.seek(at + 17)
        file.write(bytes([content[at + 17] ^ 1]))
    del content
    with TensorStore.open(path, engine=engine, memory=MEMORY) as store:
        for read in (lambda: store.get("w"), lambda: store.get("w", out=torch.empty_like(value))):
            with pytest.raises(CorruptionError, match=rf"tensors w\).* at .*\+{at}: checksum 0x"):
                read()
        (damage,) = store.verify().damaged
        assert (damage.tensors, damage.offset) == (("w",), at)
        assert bool(store.get("first").all()), "the others are still there"
        store.put("w", value)
        assert same_bits(store.get("w"), value), "a put repairs"


def test_scratch_tensors_that_were_not_closed_are_refused(tmp_path):
    path = tmp_path / "store"
    script = (
        "import os, sys, torch; from megatrain_io import TensorStore\n"
        "store = TensorStore.create(sys.argv[1], {'w': ((10,), torch.uint8)}, durability='scratch', memory='8MiB')\n"
        "store.put('w', torch.ones(10, dtype=torch.uint8)).wait(); os._exit(0)"
    )
    subprocess.run([sys.executable, "-c", script, str(path)], check=True, env=ENVIRONMENT, timeout=60)
    with pytest.raises(FormatError, match="scratch only a store that was closed"):
        TensorStore.open(path)


def test_a_damaged_commit_is_given_up_for_the_one_before_it(tmp_path):
    path = tmp_path / "store"
    with created(path, {"w": ((100,), torch.uint8)}) as store:
        for value in (1, 2):
            store.put("w", torch.full((100,), value, dtype=torch.uint8))
            store.commit()
        generation = store.generation
    content = path.read_bytes()
    assert content.count(b"\2" * 100) == 1
    with path.open("r+b") as file:
        file.seek(content.index(b"\2" * 100) + 50)
        file.write(b"\3")
    with TensorStore.open(path, memory=MEMORY) as store, pytest.raises(CorruptionError, match="from-older"):
        store.get("w")
    with TensorStore.open(path, memory=MEMORY, from_older_state=True) as store:
        assert store.generation == generation - 1
        assert bool((store.get("w") == 1).all())
    with TensorStore.open(
        path, memory=MEMORY, from_older_state=True
    ) as store:  # whole: nothing to go back from
        assert store.generation == generation - 1
        store.put("w", torch.full((100,), 4, dtype=torch.uint8))
    with TensorStore.open(path, memory=MEMORY) as store:
        assert bool((store.get("w") == 4).all())
