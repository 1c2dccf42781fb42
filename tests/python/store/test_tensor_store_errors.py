"""What is wrong with a call, a store or the drive beneath tensors is one clear error."""

import json
import os
import re
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from test_tensor_store import ENVIRONMENT, MEMORY, created

from megatrain_io import TensorStore
from megatrain_io.errors import (
    BufferInUseError,
    ConfigError,
    FormatError,
    MegatrainIoError,
    StoreFailedError,
    UsedAfterForkError,
)
from megatrain_io.store import tensor_manifest, tensor_store
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
        ({"tensors": {"w": ((-1,), torch.uint8)}}, r"give \(shape, dtype\)"),
        ({"tensors": {"w": 7}}, r"give \(shape, dtype\)"),
    ],
)
def test_what_cannot_be_created_leaves_nothing_behind(tmp_path, options, message):
    options = {"tensors": {"w": ((2,), torch.uint8)}, **options}
    with pytest.raises(ConfigError, match=message):
        created(tmp_path / "store", **options)
    assert list(tmp_path.iterdir()) == []


def test_too_little_memory_is_refused_with_the_least_that_does(tmp_path):
    spec = {"w": ((9 << 20,), torch.uint8)}
    with pytest.raises(MegatrainIoError, match="memory of 8388608 bytes: this store needs 18874368 at least"):
        created(tmp_path / "store", spec, memory="8MiB")
    with TensorStore.open(tmp_path / "store", memory=18874368) as store:
        assert store.get("w").nbytes == 9 << 20


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
