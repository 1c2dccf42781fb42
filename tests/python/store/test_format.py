"""The format is what docs/format.md says: a reader written from it alone reads what the package wrote."""

import pytest
import torch

from format_reader import StoreReader
from megatrain_io.runs.folder import RunFolder
from megatrain_io.runs.open_store import open_store
from megatrain_io.store.paged_store import PagedStore
from paged import Case, blob, files, make_store, opened, train
from runs import configured, start


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("steps", "drives"), [(0, 1), (3, 1), (3, 3)])
def test_a_reader_made_from_the_document_reads_every_plane(tmp_path, dtype, steps, drives):
    case = Case(dtype=dtype, counts=(1,) * 3, overrides={"num_hidden_layers": 2})
    path = tmp_path / "store"
    # Small chunks, so that records have several and tensors cross their borders.
    make_store(path, case, chunk_parameters=4096, engine="threads", drives=drives)
    if steps:
        with opened(path, case, engine="threads", threads=1, drives=drives) as model:
            train(model, case, steps)
            model.state.wait_durable()
    reader = StoreReader(*files(path, drives))
    assert reader.is_clean
    planes = ["weight", "exp_avg", "exp_avg_sq"]
    with PagedStore(*files(path, drives), engine="threads") as state:
        assert (reader.generation, reader.blob) == (state.generation, state.blob)
        assert reader.generation == 1 + steps
        assert reader.minor == 4
        assert reader.updates == [steps] * len(reader.chunks)
        if not steps:
            assert reader.blob == blob(0, [])
        for place in state.layout.tensors():
            for plane in planes:
                expected = state.read_tensor(place, plane).flatten().view(torch.uint8).numpy().tobytes()
                assert reader.plane(place.name, plane) == expected, (place.name, plane)
            if dtype is torch.bfloat16:
                upper, lower = (
                    torch.frombuffer(bytearray(reader.plane(place.name, name)), dtype=torch.int16).int()
                    for name in ("weight", "remainder")
                )
                master = ((upper << 16) + lower).view(torch.float32)
                assert torch.equal(master, state.read_tensor(place, "master").flatten())


def test_a_scratch_store_has_one_copy(source, tmp_path):
    config = configured(source, tmp_path / "run", memory={"durability": "scratch"}, max_steps=1)
    start(config)
    run = RunFolder(tmp_path / "run")
    reader = StoreReader(*run.store_paths())
    assert reader.manifest["durability"] == "scratch"
    assert reader.is_clean
    with open_store(run, engine="threads") as state:
        for place in state.layout.tensors():
            expected = state.read_tensor(place, "exp_avg").flatten().view(torch.uint8).numpy().tobytes()
            assert reader.plane(place.name, "exp_avg") == expected
