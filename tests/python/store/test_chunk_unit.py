"""Units that are chunks, from Python: the bits and the norm of whole records, and the pool's address."""

from pathlib import Path

import pytest
import torch
from torch.utils.dlpack import from_dlpack

from megatrain_io.errors import MegatrainIoError
from megatrain_io.store.paged_store import AdamWStep, PagedStore, TensorSettings
from megatrain_io.store.pool import BufferKind, PoolSizes, Unit
from megatrain_io.store.schedule import ChunkOp, Phase, Residents
from paged import Case, all_planes, files, make_store

CHUNK = 4096
RESIDENTS = Residents(records=frozenset({1}), chunks=frozenset({0, 2}))


def schedule(state: PagedStore) -> list[ChunkOp]:
    layout = state.layout
    return [
        ChunkOp(kind, chunk, Phase.BACKWARD)
        for record in range(len(layout.records))
        for kind in ("load", "update")
        for chunk in layout.chunks_of(record)
    ]


def gradient_of(state: PagedStore, step: int, record: int) -> torch.Tensor:
    seeded = torch.Generator().manual_seed(100 * step + record)
    return torch.randn(state.layout.records[record].parameters, generator=seeded)


def start(state: PagedStore, *, unit: Unit, residents: Residents = RESIDENTS) -> None:
    layout = state.layout
    chunk, records = layout.chunks[0], range(len(layout.records))
    weights = layout.weight_extent_bytes(chunk)
    slots = (weights + layout.update_extent_bytes(chunk), 2)
    if unit == "chunk":
        kinds = [(BufferKind(None, nbytes, 1),) for nbytes in (weights, 4 * CHUNK)]
        pool = PoolSizes(slots, kinds[0], (weights, 1), kinds[1])
    else:
        block = max(map(layout.record_weight_bytes, records))
        gradient = max(map(layout.record_gradient_bytes, records))
        weights, gradients = BufferKind(None, block, 2), BufferKind(None, gradient, 1)
        pool = PoolSizes(slots, weights=(weights,), gradients=(gradients,))
    settings = lambda _: TensorSettings(0.01)  # noqa: E731
    state.start(pool, residents=residents, settings=settings, unit=unit)


def train_record(state: PagedStore, record: int, gradient: torch.Tensor) -> None:
    weights, buffer = state.weights(record), state.gradient(record)
    for place in state.layout.records[record].tensors:
        values = gradient[place.offset : place.offset + place.elements]
        buffer.tensors[place.name].view(-1).copy_(values)
    state.submit(record, weights, buffer)


def train_chunks(state: PagedStore, record: int, gradient: torch.Tensor) -> None:
    """The weights of the whole record go away, and come back one by one, as to a device."""
    chunks, away, held = state.layout.chunks_of(record), [], []
    for chunk in chunks:
        buffer = state.take_chunk(chunk.index)
        away.append(from_dlpack(buffer).clone())
        if record in RESIDENTS.records:
            held.append(buffer)
        else:
            buffer.release()
    for number, chunk in enumerate(chunks):
        assert away[number].numel() == chunk.parameters
        if held:
            weights = held[number]
        else:
            weights = state.try_outgoing(chunk.index, 60)
            from_dlpack(weights).copy_(away[number])
        buffer = state.try_chunk_gradient(chunk.index, 60)
        flat = from_dlpack(buffer)
        flat.copy_(gradient[chunk.start : chunk.start + chunk.parameters])
        del flat
        state.submit_chunk(chunk.index, weights, buffer)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_training_by_chunk_has_the_bits_of_training_by_record(tmp_path: Path, dtype: torch.dtype) -> None:
    found = []
    units: tuple[Unit, ...] = ("record", "chunk")
    for unit, train in zip(units, (train_record, train_chunks), strict=True):
        path = tmp_path / unit
        make_store(path, Case(dtype=dtype), CHUNK)
        norms = []
        with PagedStore(*files(path)) as state:
            start(state, unit=unit)
            checked = state.check(schedule(state), unit=unit)
            for step in (1, 2):
                state.begin(checked, AdamWStep(step, 1e-3), commits=True)
                for record in range(len(state.layout.records)):
                    train(state, record, gradient_of(state, step, record))
                norms.append(state.gradient_norm())
                state.end(b"%d" % step)
            state.wait_durable()
            found.append((norms, all_planes(state)))
    (norms, planes), (chunk_norms, chunk_planes) = found
    assert norms == chunk_norms
    for key, value in planes.items():
        assert torch.equal(value, chunk_planes[key]), key


def test_all_memory_of_the_pool_has_an_address(tmp_path: Path) -> None:
    path = tmp_path / "store"
    make_store(path, Case(), CHUNK)
    with PagedStore(*files(path)) as state:
        start(state, unit="chunk", residents=Residents())
        pipeline = state._pipeline
        assert pipeline is not None
        memory = pipeline.pool_memory()
        with pytest.raises(MegatrainIoError, match="memory of the pool goes back with its last tensor"):
            memory.release()
        flat = from_dlpack(memory)
        assert (flat.dtype, flat.numel()) == (torch.uint8, memory_nbytes(state))
        checked = state.check(schedule(state), unit="chunk")
        state.begin(checked, AdamWStep(1, 1e-3))
        buffer = state.take_chunk(0)
        address = from_dlpack(buffer).data_ptr() - flat.data_ptr()
        assert 0 <= address < flat.numel()
        buffer.release()
        state.abort()
        state.start(PoolSizes(weights=(BufferKind(None, 1 << 20, 1),)), unit="chunk")
        del pipeline, memory
        # Mapped as long as somebody has its address.
        assert state.ledger.balances()["pool"][0] > 1 << 20
        del flat
        assert state.ledger.balances()["pool"][0] == 1 << 20


def memory_nbytes(state: PagedStore) -> int:
    """What the ledger has of the pool's mapping."""
    return sum(state.ledger.balances()[account][0] for account in ("pool", "gradients"))
