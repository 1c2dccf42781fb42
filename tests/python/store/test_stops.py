"""A stop with several records, one for each state format: in the layout, its manifest, the schedule and the pool."""

import json
from itertools import groupby

import pytest

from megatrain_io.errors import FormatError
from megatrain_io.store.layout import ModelLayout
from megatrain_io.store.pool import pool_sizes
from megatrain_io.store.schedule import Residents, build_schedule, flush_schedule

FORMATS = {"weight": "bf16", "oddment": "f32", "base": "raw16"}
BLOCKS = 3


def layout(of_block=("weight", "oddment", "base"), of_embedding=("weight",), of_head=("weight", "oddment")):
    """A model whose tensors are called by the key of their format."""
    parts = [
        ("embedding", of_embedding),
        *((f"block {n}", of_block) for n in range(BLOCKS)),
        ("head", of_head),
    ]
    sizes = {"weight": 9000, "oddment": 130, "base": 70_000}
    tensors = [(part, [(f"{part} {name}", (sizes[name],)) for name in names]) for part, names in parts]
    return ModelLayout.build(tensors, BLOCKS, lambda name: FORMATS[name.split()[-1]], 4096)


def runs(schedule):
    """Each run of a schedule through all chunks of a record."""
    return [key for key, _ in groupby(schedule, lambda op: (op.kind, op.chunk.record))]


def test_a_stop_has_a_record_for_each_format_in_the_order_of_its_tensors():
    made = layout()
    assert made.stops == ((0,), (1, 2, 3), (4, 5, 6), (7, 8, 9), (10, 11))
    assert [record.format for record in made.records[4:8]] == ["bf16", "f32", "raw16", "bf16"]
    assert made.records[0].name == "embedding"
    assert [made.records[number].name for number in made.stops[1]] == [
        *("block 0 (bf16)", "block 0 (f32)", "block 0 (raw16)")
    ]
    assert [made.stop_of[number] for number in (0, 3, 4, 11)] == [0, 1, 2, 4]
    assert (made.trained_of(2), made.trained) == ((4, 5), (0, 1, 2, 4, 5, 7, 8, 10, 11))
    of_bf16, of_f32, of_base = (made.chunks_of(number)[0] for number in made.stops[1])
    assert [made.weight_extent_bytes(chunk) for chunk in (of_bf16, of_f32, of_base)] == [8192, 4096, 8192]
    assert [made.update_extent_bytes(chunk) for chunk in (of_bf16, of_f32, of_base)] == [40960, 4096, 0]


def test_the_manifest_says_which_records_a_stop_has_only_where_it_has_several():
    several, one = layout(), layout(of_block=("weight",), of_head=("weight",))
    for made in (several, one):
        assert ModelLayout.from_manifest(made.manifest({"config": {}}).decode()) == made
    assert json.loads(several.manifest({}))["model"] == {"blocks": 3, "stops": [1, 3, 3, 3, 2]}
    assert json.loads(one.manifest({}))["model"] == {"blocks": 3}, "as ever"


def test_a_block_without_parameters_is_a_stop_without_records():
    parts = [
        ("embedding", [("table", (8, 16))]),
        ("block 0", []),
        ("block 1", [("w", (256,))]),
        ("head", [("h", (16,))]),
    ]
    for formats in ("bf16", lambda _name: "bf16"):
        made = ModelLayout.build(parts, 2, formats)
        assert made.stops == ((0,), (), (1,), (2,))
        assert ModelLayout.from_manifest(made.manifest({}).decode()) == made
        steps = runs(build_schedule(made, tied_embeddings=False, training=True))
        assert steps == [
            ("load", 0),
            ("load", 1),
            ("load", 2),
            ("update", 2),
            ("update", 1),
            ("load", 0),
            ("update", 0),
        ]


@pytest.mark.parametrize(
    ("stops", "refused"),
    [
        ([1, 3, 3, 3, 3], "not made by an import"),
        ([1, 3, 3, 3, 2, 0], "not made by an import"),
        ([1, 3, 3, 3, True, 1], "not made by an import"),
        ([0, 4, 3, 3, 2], "not made by an import"),
        ("many", "not made by an import"),
        ([1, 3, 3, 5], "embedding and head are two at most|formats"),
        ([12], "12 records and says that 3 of them are blocks"),
        ([1, 4, 2, 3, 2], "of one stop have the formats bf16, f32, raw16, bf16"),
    ],
)
def test_a_manifest_with_stops_that_cannot_be_is_refused(stops, refused):
    manifest = json.loads(layout().manifest({}))
    manifest["model"]["stops"] = stops
    with pytest.raises(FormatError, match=refused):
        ModelLayout.from_manifest(json.dumps(manifest))


def test_records_of_tensors_as_bytes_are_refused_in_a_model():
    manifest = json.loads(layout(of_block=("weight",)).manifest({}))
    manifest["records"][1]["format"] = "raw8"
    with pytest.raises(FormatError, match="have the format raw8"):
        ModelLayout.from_manifest(json.dumps(manifest))


def test_a_stop_loads_all_its_records_and_then_updates_those_that_are_trained():
    made = layout()
    steps = runs(build_schedule(made, tied_embeddings=True, training=True))
    forward = [("load", record) for record in range(12)]
    head = [("load", 0), ("update", 10), ("update", 11)]
    last = [("update", 7), ("update", 8)]
    block = [("load", 4), ("load", 5), ("load", 6), ("update", 4), ("update", 5)]
    first = [("load", 1), ("load", 2), ("load", 3), ("update", 1), ("update", 2)]
    assert steps == [*forward, *head, *last, *block, *first, ("load", 0), ("update", 0)]
    applied = build_schedule(made, tied_embeddings=False, training=True, applies=True, policy="speculative")
    frozen = {3, 6, 9}
    assert runs(applied)[:12] == [("load" if record in frozen else "apply", record) for record in range(12)]
    assert runs(applied)[12:14] == [("update", 10), ("defer", 10)]
    assert runs(flush_schedule(made)) == [("apply", record) for record in made.trained]


def test_a_frozen_embedding_is_not_met_again_at_the_end_of_the_step():
    made = layout(of_embedding=("base",))
    assert runs(build_schedule(made, tied_embeddings=False, training=True))[-1] == ("update", 2)


def test_the_pool_has_buffers_of_each_format_by_its_own_largest_record():
    made = layout(of_head=("weight", "oddment", "base"))
    pool = pool_sizes(made, tied_embeddings=False, training=True)
    assert [(kind.format, kind.nbytes, kind.count) for kind in pool.weights if kind.count] == [
        ("bf16", 20480, 3),
        ("f32", 4096, 3),
        ("raw16", 143360, 3),
    ]
    assert [(kind.format, kind.nbytes, kind.count) for kind in pool.gradients if kind.count] == [
        ("bf16", 36864, 2),
        ("f32", 4096, 2),
    ], "frozen records have no gradient"
    tied = pool_sizes(made, tied_embeddings=True, training=True)
    assert [kind.count for kind in tied.weights if kind.count] == [4, 3, 3], "the table is beside the head"
    of_f32 = frozenset(number for number, record in enumerate(made.records) if record.format == "f32")
    stays = pool_sizes(made, tied_embeddings=False, training=True, residents=Residents(of_f32))
    assert [kind.format for kind in stays.weights if kind.count] == ["bf16", "raw16"]
