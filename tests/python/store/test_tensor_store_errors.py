"""What is wrong with a call, a store or the drive beneath tensors is one clear error."""

import json
import os
import re
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from test_tensor_store import ENVIRONMENT, MEMORY, created

from megatrain_io import TensorStore
from megatrain_io.errors import (
    BufferInUseError,
    ConfigError,
    FormatError,
    MegatrainIoError,
    StorageError,
    StoreFailedError,
    UsedAfterForkError,
)
from megatrain_io.store import tensor_manifest, tensor_store
from megatrain_io.store.inspect import remove_store
from megatrain_io.store.layout import ModelLayout
from megatrain_io.store.paged_store import Ledger, PagedStore, StoreCreator


@pytest.fixture
def store(tmp_path):
    spec = {"layers.0.weight": ((4, 6), torch.float32), "complex": ((4,), torch.complex64)}
    store = created(tmp_path / "store", spec)
    yield store
    store.close()


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (torch.zeros(6, 4), r"has shape \(4, 6\) and dtype torch.float32, and was given shape \(6, 4\)"),
        (torch.zeros(4, 6, dtype=torch.float64), r"was given shape \(4, 6\) and dtype torch.float64"),
        (torch.zeros(6, 4).t(), "not contiguous"),
        (torch.zeros(4, 6, device="meta"), "on device meta: bring it to the CPU"),
        (torch.zeros(4, 6).to_sparse(), "not contiguous"),
    ],
)
def test_a_tensor_that_does_not_fit_is_refused_with_both_sides(store, tensor, message):
    for call in (store.put, store.get):
        with pytest.raises(ConfigError, match=message):
            call("layers.0.weight", tensor)
    assert store.io_bytes()[1] == 0


def test_a_lazy_conjugate_is_refused_and_a_parameter_is_a_tensor(store):
    given = torch.randn(4, dtype=torch.complex64)
    with pytest.raises(ConfigError, match="resolve_conj"):
        store.put("complex", given.conj())
    store.put("complex", given.conj().resolve_conj())
    assert torch.equal(store.get("complex"), given.conj())
    store.put("layers.0.weight", torch.nn.Parameter(torch.ones(4, 6)))
    assert bool(store.get("layers.0.weight").all())


def test_a_wrong_name_names_the_nearest(store):
    for call in (store.get, store.empty, store.prefetch, store.nbytes):
        with pytest.raises(
            ConfigError, match=r"no tensor 'layer.0.weight'; did you mean 'layers.0.weight'\?"
        ):
            call("layer.0.weight")


def test_memory_that_is_under_way_is_refused_to_another_transfer(tmp_path):
    with created(tmp_path / "store", {"w": ((12 << 20,), torch.uint8)}, memory="32MiB") as store:
        tensor = store.empty("w")
        ticket = store.put("w", tensor)
        with suppress(BufferInUseError):
            # Unless the first put was quicker, which then must have ended.
            store.put("w", tensor).wait()
            assert ticket.done
        ticket.wait()
        store.put("w", tensor).wait()


def test_a_closed_store_says_so_and_closes_twice(store):
    store.close()
    store.close()
    for call in (lambda: store.get("complex"), store.commit, lambda: store.empty("complex"), store.verify):
        with pytest.raises(MegatrainIoError, match="the store is closed"):
            call()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"memory": "much"}, "memory is 'much'"),
        ({"tensors": {"w": ((2,), torch.qint8)}}, "dtype torch.qint8 cannot be stored"),
        ({"tensors": {"w": ((-1,), torch.uint8)}}, r"a shape is a tuple of whole numbers"),
        ({"tensors": {"w": (3, torch.uint8)}}, r"a shape is a tuple of whole numbers"),
        ({"tensors": {"w": ((True,), torch.uint8)}}, r"a shape is a tuple of whole numbers"),
        ({"tensors": {"w": ((2,), "uint8")}}, "dtype 'uint8' cannot be stored; these of torch can"),
        ({"tensors": {"w": ((2,), [1])}}, r"dtype \[1\] cannot be stored"),
        ({"tensors": {"w": 7}}, r"give \(shape, dtype\)"),
        ({"tensors": {"w": np.zeros(2)}}, r"give \(shape, dtype\), or a tensor of torch"),
        ({"tensors": ["w"]}, "tensors is list: give a mapping"),
        ({"tensors": None}, "tensors is NoneType: give a mapping"),
        ({"tensors": {}}, "no tensors"),
        ({"tensors": {3: ((2,), torch.uint8)}}, "the name 3 is int: names of tensors are text"),
        ({"tensors": {"": ((2,), torch.uint8)}}, "has 0 bytes: 1 to 512"),
        ({"tensors": {"a\0": ((2,), torch.uint8)}}, "without NUL"),
        ({"tensors": {"a" * 513: ((2,), torch.uint8)}}, "has 513 bytes: 1 to 512"),
        ({"tensors": {"\ud800": ((2,), torch.uint8)}}, "not text that can be written"),
        ({"tensors": {"w": ((10**30,), torch.uint8)}}, "bytes: a store holds 17592186044416 at most"),
        ({"memory": None}, "memory is None"),
        ({"memory": -1}, "memory is -1"),
        ({"memory": True}, "memory is True"),
        ({"memory": 1000}, "memory is 1000 bytes: this store needs 4194304 at least"),
        ({"memory": "900TiB"}, "bytes of RAM are free"),
        ({"durability": "never"}, "durability is 'never': it must be one of step, scratch"),
        ({"engine": "steam"}, "engine is 'steam': it must be one of auto, uring, threads"),
        ({"ledger": 3}, "ledger is int"),
    ],
)
def test_what_cannot_be_created_leaves_nothing_behind(tmp_path, options, message):
    options = {"tensors": {"w": ((2,), torch.uint8)}, **options}
    with pytest.raises(ConfigError, match=message):
        created(tmp_path / "store", **options)
    assert list(tmp_path.iterdir()) == []
    if "tensors" not in options:  # what opening is given, too
        created(tmp_path / "store", {"w": ((2,), torch.uint8)}).close()


@pytest.mark.parametrize("path", [None, 3, b"x", "", "a\0", "\ud800", [], [None], ["x"] * 17])
def test_what_is_no_path_is_refused(path):
    for call in (lambda: created(path, {"w": ((2,), torch.uint8)}), lambda: TensorStore.open(path)):
        with pytest.raises(ConfigError, match="path"):
            call()


def test_more_than_a_store_holds_is_told_with_the_limit(tmp_path, monkeypatch):
    """60,000 tensors were "the model's configuration has 1080013 bytes, the limit is 1048576"."""
    spec = {str(number): ((2,), torch.uint8) for number in range(5)}
    for name, limit, message in [
        ("_TENSORS_MAX", 4, "5 tensors: a store holds 4 at most"),
        ("_CHUNKS_MAX", 4, "5 chunks of 8 MiB"),
        ("_NBYTES_MAX", 9, "10 bytes: a store holds 9"),
    ]:
        with monkeypatch.context() as patch:
            patch.setattr(tensor_manifest, name, limit)
            with pytest.raises(ConfigError, match=message):
                created(tmp_path / "store", spec)
    monkeypatch.setattr(tensor_store, "_MANIFEST_BYTES_MAX", 500)
    with pytest.raises(ConfigError, match="names and shapes of these 5 tensors"):
        created(tmp_path / "store", spec)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_sixty_thousand_tensors(tmp_path):
    count = 60_000
    spec = {f"layers.{number}.weight": ((2, 3), torch.float32) for number in range(count)}
    with created(tmp_path / "store", spec, durability="scratch") as store:
        for number in (0, count // 2, count - 1):
            store.put(f"layers.{number}.weight", torch.full((2, 3), float(number)))
    with TensorStore.open(tmp_path / "store", memory=MEMORY) as store:
        assert store.names == tuple(spec)
        assert bool((store.get(f"layers.{count - 1}.weight") == count - 1).all())
    (tmp_path / "store").unlink()


@pytest.mark.parametrize("error", [KeyboardInterrupt, StorageError("of the test")])
@pytest.mark.parametrize("name", ["Store", "RecordTensors", "specs_of"])
def test_a_creation_that_fails_later_leaves_nothing_behind(tmp_path, monkeypatch, name, error):
    """Too little memory left the reserved file there, and the second try said that there is already one."""

    def failing(*_arguments):
        raise error

    paths = [tmp_path / "a", tmp_path / "b"]
    with monkeypatch.context() as patch:
        patch.setattr(tensor_store, name, failing)
        with pytest.raises((KeyboardInterrupt, StorageError)):
            created(paths, {"w": ((2,), torch.uint8)})
    assert list(tmp_path.iterdir()) == []
    created(paths, {"w": ((2,), torch.uint8)}).close()


def test_an_interrupt_anywhere_in_a_creation_leaves_nothing_behind(tmp_path):
    """At every line of it that Python runs, as Ctrl-C comes: also just behind the call that names the store."""

    def create(stop):
        lines = 0

        def trace(frame, event, _argument):
            nonlocal lines
            if "megatrain_io/store/tensor_store" not in frame.f_code.co_filename:
                return None
            if event == "line":
                lines += 1
                if lines == stop:
                    raise KeyboardInterrupt
            return trace

        before = sys.gettrace()
        sys.settrace(trace)
        try:
            return created(tmp_path / "store", {"w": ((2,), torch.uint8)})
        finally:
            sys.settrace(before)

    for stop in range(1, 200):
        try:
            store = create(stop)
        except KeyboardInterrupt:
            assert list(tmp_path.iterdir()) == [], f"line {stop}"
        else:
            store.close()
            assert stop > 30
            return
    pytest.fail("it never came to an end")


def test_a_store_of_somebody_else_is_not_removed_with_ones_own(tmp_path):
    created(tmp_path / "store", {"w": ((2,), torch.uint8)}).close()
    with pytest.raises(FormatError, match="already a file"):
        created(tmp_path / "store", {"w": ((2,), torch.uint8)})
    remove_store([tmp_path / "store"], "0" * 32)
    TensorStore.open(tmp_path / "store", memory=MEMORY).close()


@pytest.mark.parametrize("value", [None, [0.0] * 24, np.zeros((4, 6), dtype=np.float32), 3])
def test_what_is_no_tensor_is_refused(store, value):
    with pytest.raises(ConfigError, match="give a tensor of torch"):
        store.put("layers.0.weight", value)
    if value is not None:
        with pytest.raises(ConfigError, match="give a tensor of torch"):
            store.get("layers.0.weight", value)


@pytest.mark.parametrize("name", [None, [], 3, b"w"])
def test_what_is_no_name_is_refused(store, name):
    for call in (
        store.get,
        store.empty,
        store.prefetch,
        store.nbytes,
        lambda n: store.put(n, torch.zeros(4, 6)),
    ):
        with pytest.raises(ConfigError, match="names of tensors are text"):
            call(name)


def test_a_tensor_without_memory_of_its_own_is_refused(store):
    with pytest.raises(ConfigError, match="plain tensor"):
        torch.func.vmap(lambda tensor: store.put("layers.0.weight", tensor))(torch.zeros(2, 4, 6))


def test_a_tensor_that_is_changed_while_it_is_put_is_whole_or_an_error(tmp_path):
    """It was committed as damaged for good: reading it said to check the drive."""
    with created(tmp_path / "store", {"w": ((6 << 20,), torch.uint8)}, memory="32MiB") as store:
        tensor = store.empty("w").fill_(0)
        for value in range(1, 13):
            ticket = store.put("w", tensor)
            tensor.fill_(value)
            tensor.fill_(value - value % 2)  # every other one back to what it may have been
            failed = False
            try:
                ticket.wait()
            except BufferInUseError as error:
                failed = True
                assert "changed while it was being put" in str(error)  # noqa: PT017 - it need not come
                with pytest.raises(MegatrainIoError, match="put it again"):
                    store.commit()
            if failed:
                store.put("w", tensor).wait()
            store.commit()
            assert store.verify().damaged == ()
            store.get("w")


def test_too_little_memory_is_refused_with_the_least_that_does(tmp_path):
    spec = {"w": ((9 << 20,), torch.uint8)}
    with pytest.raises(ConfigError, match="memory is 8388608 bytes: this store needs 18874368 at least"):
        created(tmp_path / "store", spec, memory="8MiB")
    with created(tmp_path / "store", spec, memory=18874368) as store:
        assert store.get("w").nbytes == 9 << 20
    with pytest.raises(ConfigError, match="memory is 18874367 bytes: this store needs 18874368 at least"):
        TensorStore.open(tmp_path / "store", memory=18874367)


def test_tensors_and_a_state_dict_describe_a_store(tmp_path):
    module = torch.nn.Linear(3, 2, dtype=torch.bfloat16)
    with created(tmp_path / "store", module.state_dict()) as store:
        for name, tensor in module.state_dict().items():
            store.put(name, tensor)
        copy = torch.nn.Linear(3, 2, dtype=torch.bfloat16)
        copy.load_state_dict({name: store.get(name) for name in store.names})
    assert torch.equal(copy.weight, module.weight)


def test_runs_and_tensors_do_not_take_each_others_stores(tmp_path, store):
    store.close()
    with pytest.raises(
        FormatError, match=r"holds tensors, not a model in training: .* megatrain_io.TensorStore"
    ):
        PagedStore(store.path)
    layout = ModelLayout.build([("only", [("weight", (4096,))])], 0, "f32", 4096)
    path = tmp_path / "run"
    creator = StoreCreator([path], layout.manifest({}), "threads", Ledger())
    for index, chunk in enumerate(layout.chunks):
        creator.write_chunk(index, bytes(4 * chunk.parameters), "float32")
    creator.finish(b"")
    with pytest.raises(FormatError, match="holds a model in training, not tensors"):
        TensorStore.open(path)


@pytest.mark.parametrize(
    "model",
    [
        None,
        {"tensors": []},
        {"tensors": [["float32"]]},
        {"tensors": [["float32", [3]]]},
        {"tensors": [["float32", [-1, -2]]]},
        {"tensors": [["float31", [2]]]},
        {"tensors": [[["float32"], [2]]]},
        {"tensors": [["float32", [True, 2]]]},
    ],
)
def test_a_manifest_that_we_did_not_write_is_refused_in_our_words(tmp_path, model):
    path = tmp_path / "store"
    specs = {"w": tensor_manifest.TensorSpec((2,), torch.float32)}
    manifest = {**tensor_manifest.manifest_of(specs, "step"), "model": model}
    StoreCreator([path], json.dumps(manifest).encode(), "threads", Ledger()).finish(b"")
    with pytest.raises(FormatError, match=re.escape(str(path))):
        TensorStore.open(path)


def test_a_fork_is_told_so(store):
    ticket = store.put("complex", torch.ones(4, dtype=torch.complex64))
    pid = os.fork()
    if pid == 0:
        refused = 0
        for call in (lambda: store.get("complex"), store.commit, ticket.wait):
            try:
                call()
            except UsedAfterForkError:
                refused += 1
        os._exit(0 if refused == 3 else 1)
    assert os.waitpid(pid, 0)[1] == 0
    ticket.wait()
    assert bool(store.get("complex").real.all())


def test_a_failing_drive_fails_the_ticket_and_not_the_store(tmp_path, monkeypatch):
    """Faults as the core injects them: two failed writes are a failed put, one is tried again."""
    created(tmp_path / "store", {"w": ((10,), torch.uint8)}).close()
    opened = tensor_store.Store

    def failing(path, engine, ledger, waiting):
        return opened(path, engine, ledger, waiting, [("write", 1, 5, False), ("write", 2, 5, False)])

    monkeypatch.setattr(tensor_store, "Store", failing)
    ones = torch.ones(10, dtype=torch.uint8)
    with TensorStore.open(tmp_path / "store", memory=MEMORY) as store:
        store.put("w", ones).wait()
        with pytest.raises(MegatrainIoError, match="write of 4096 bytes"):
            store.put("w", ones).wait()
        with pytest.raises(MegatrainIoError, match="put of tensor w was not finished"):
            store.commit()
        store.put("w", ones).wait()


def test_a_failed_flush_is_final(tmp_path, monkeypatch):
    created(tmp_path / "store", {"w": ((10,), torch.uint8)}).close()
    opened = tensor_store.Store
    monkeypatch.setattr(tensor_store, "Store", lambda *arguments: opened(*arguments, [("sync", 1, 5, False)]))
    store = TensorStore.open(tmp_path / "store", memory=MEMORY)
    store.put("w", torch.ones(10, dtype=torch.uint8))
    with pytest.raises(MegatrainIoError, match="fdatasync"):
        store.commit()
    with pytest.raises(StoreFailedError):
        store.put("w", torch.ones(10, dtype=torch.uint8))
    store.close()


def test_importing_the_package_imports_no_torch():
    script = "import sys, megatrain_io; assert 'torch' not in sys.modules; megatrain_io.TensorStore"
    subprocess.run([sys.executable, "-c", script], check=True, env=ENVIRONMENT, timeout=60)


def test_the_example_of_the_document_runs(tmp_path, monkeypatch, capsys):
    text = (Path(__file__).parents[3] / "docs" / "tensor_store.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    monkeypatch.chdir(tmp_path)
    exec(example, {})  # noqa: S102 - our own document
    assert capsys.readouterr().out == "tensor(1) torch.Size([1000, 64])\n"
