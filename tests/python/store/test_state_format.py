"""Sizes of state: the core has the table, and what Python reckons with follows from it."""

from typing import get_args

import pytest

from megatrain_io.store.layout import ModelLayout
from megatrain_io.store.paged_store import Ledger, Store, StoreCreator
from megatrain_io.store.schedule import build_schedule, traffic
from megatrain_io.store.state_format import SPECS, StateFormat

FORMATS: tuple[StateFormat, ...] = get_args(StateFormat)
PARAMETERS = 4096


def layout_of(state_format: StateFormat) -> ModelLayout:
    """Embedding, two blocks and head, each a chunk that fills its pages."""
    parts = [(f"part {index}", [(f"tensor {index}", (2, PARAMETERS // 2))]) for index in range(4)]
    return ModelLayout.build(parts, 2, state_format, chunk_parameters=PARAMETERS)


def test_the_formats_of_models_are_those_of_the_core():
    # One more is the core's: that of stores of tensors.
    assert {*FORMATS, "raw8"} == SPECS.keys()


@pytest.mark.parametrize("state_format", FORMATS)
def test_the_core_lays_out_the_planes_that_python_reckons_with(tmp_path, state_format):
    layout, spec = layout_of(state_format), SPECS[state_format]
    path, ledger = tmp_path / "store", Ledger()
    StoreCreator([path], layout.manifest({}), "threads", ledger).finish(b"")
    store = Store([path], "threads", ledger)
    sizes = {plane.name: len(store.read_plane(0, plane.name)) for plane in (spec.weight, *spec.update)}
    store.close()
    assert sizes == {plane.name: plane.nbytes * PARAMETERS for plane in (spec.weight, *spec.update)}
    chunk = layout.chunks[0]
    assert layout.weight_extent_bytes(chunk) == sizes.pop("weight")
    assert layout.update_extent_bytes(chunk) == sum(sizes.values())


@pytest.mark.parametrize("state_format", FORMATS)
def test_a_step_moves_the_bytes_that_its_format_says(state_format):
    """Of a block that is read again for the backward pass: the last one is still there."""
    layout, spec = layout_of(state_format), SPECS[state_format]
    assert spec.is_trained is not layout.is_frozen
    schedule = build_schedule(layout, tied_embeddings=False, training=True)
    of_block = tuple(
        operation for operation in schedule if operation.chunk.record in layout.stops[layout.block(0)]
    )
    moved = spec.read_bytes * PARAMETERS, spec.written_bytes * PARAMETERS
    assert traffic(of_block, layout) == moved
