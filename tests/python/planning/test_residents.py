"""What stays in RAM is what saves most, and is spread evenly."""

from itertools import pairwise

import pytest

from megatrain_io.planning.ram_budget import StepNeeds, divide_ram
from megatrain_io.planning.residents import choose_residents, resident_nbytes
from megatrain_io.store.layout import ModelLayout
from megatrain_io.store.pool import HUGE_PAGE_BYTES, BufferKind, mapped_nbytes, pool_sizes
from megatrain_io.store.schedule import Residents, build_schedule, traffic

EVERYTHING = 1 << 60


def model(blocks: int = 8, *, tied: bool = False) -> tuple[ModelLayout, tuple]:
    parts = [("embedding", [("table", (1 << 15,))])]
    parts += [(f"block {index}", [(f"{index}.w", (1 << 16,))]) for index in range(blocks)]
    parts.append(("head", [("norm", (128,)), *([] if tied else [("head", (1 << 15,))])]))
    layout = ModelLayout.build(parts, blocks, "bf16", chunk_parameters=1 << 14)
    return layout, build_schedule(layout, tied_embeddings=tied, training=True)


def test_nothing_stays_without_room_and_everything_with_enough():
    layout, schedule = model()
    assert choose_residents(layout, schedule, 4095) == Residents()
    everything = choose_residents(layout, schedule, EVERYTHING)
    assert len(everything.records) == len(layout.records)
    assert len(everything.chunks) == len(layout.chunks)
    # 12 bytes a parameter, and what fills the last extents: all that is written.
    assert resident_nbytes(everything, layout) == traffic(schedule, layout)[1]
    assert traffic(schedule, layout, everything, commits=False) == (0, 0)


@pytest.mark.parametrize("tied", [False, True])
def test_what_is_read_most_often_stays_first(tied):
    layout, schedule = model(tied=tied)
    table, weights = layout.record_weight_bytes(0), layout.record_weight_bytes(1)
    norm = small_records(layout)
    least = resident_nbytes(norm, layout)
    first = choose_residents(layout, schedule, least + max(table, weights) + (0 if tied else table))
    if tied:
        assert 0 in first.records, "three reads a step"
    # Block 7 is read once, as it stays across the turn; the others twice.
    twice = choose_residents(layout, schedule, least + table + 7 * weights)
    assert twice.records - norm.records == frozenset(range(8)), "embedding and blocks 0 to 6"
    assert twice.chunks == norm.chunks


def small_records(layout):
    """What stays of the records that are less than a chunk."""
    records = {
        number for number, each in enumerate(layout.records) if each.parameters < layout.chunk_parameters
    }
    chunks = {chunk.index for chunk in layout.chunks if chunk.record in records}
    trained = {index for index in chunks if layout.records[layout.chunks[index].record].is_trained}
    return Residents(frozenset(records), frozenset(trained))


def several_formats(blocks: int = 8) -> tuple[ModelLayout, tuple]:
    """Blocks with a router in fp32 and a bias that is not trained beside 64 Ki of bf16."""
    formats = {"router": "f32", "bias": "raw32"}
    parts = [("embedding", [("table", (1 << 15,))])]
    parts += [
        (f"block {i}", [(f"{i}.w", (1 << 16,)), (f"{i}.router", (1 << 12,)), (f"{i}.bias", (128,))])
        for i in range(blocks)
    ]
    parts.append(("head", [("norm", (1 << 15,))]))
    layout = ModelLayout.build(
        parts, blocks, lambda name: formats.get(name.partition(".")[2], "bf16"), chunk_parameters=1 << 14
    )
    return layout, build_schedule(layout, tied_embeddings=False, training=True)


def test_records_of_less_than_a_chunk_are_not_read_again_where_there_is_room_for_them():
    layout, schedule = several_formats()
    small = small_records(layout)
    assert {layout.records[record].format for record in small.records} == {"f32", "raw32"}
    needs = StepNeeds(tables=0, compute=0, activations=0, activations_least=0)
    pool = mapped_nbytes(pool_sizes(layout, tied_embeddings=False, training=True))
    ram = pool + resident_nbytes(small, layout) + 2 * HUGE_PAGE_BYTES  # and borders between the shares
    plan = divide_ram(layout, schedule, needs, tied_embeddings=False, ram=ram)
    assert small.records <= plan.residents.records
    assert small.chunks <= plan.residents.chunks
    assert len(plan.residents.records) < len(layout.records), "not everything"
    assert all(kind.count == 0 for kind in plan.pool.weights if kind.format in {"f32", "raw32"})
    stay = choose_residents(layout, schedule, resident_nbytes(small, layout))
    assert stay == small
    of_small = [op for op in schedule if op.chunk.record in small.records]
    assert traffic(tuple(of_small), layout, stay, commits=False) == (0, 0)
    assert traffic(tuple(of_small), layout, stay)[0] == 0


@pytest.mark.parametrize("stay", [1, 2, 3, 4, 7])
def test_what_stays_is_spread_evenly_over_the_blocks(stay):
    layout, schedule = model(blocks=17)
    room = layout.record_weight_bytes(0) + stay * layout.record_weight_bytes(1)
    chosen = sorted(choose_residents(layout, schedule, room).records - {0})
    assert len(chosen) == stay
    gaps = [after - before for before, after in zip([0, *chosen], [*chosen, 17], strict=True)]
    assert max(gaps) <= 2 * -(-17 // stay)


def test_more_room_never_saves_less():
    layout, schedule = model()
    saved = []
    for room in range(0, 8 << 20, 100_000):
        chosen = choose_residents(layout, schedule, room)
        assert resident_nbytes(chosen, layout) <= room
        saved.append(-traffic(schedule, layout, chosen)[0])
    assert all(before <= after for before, after in pairwise(saved))
    assert saved[-1] == 0


def test_the_pool_needs_no_buffer_for_what_stays():
    layout, schedule = model()
    everything = choose_residents(layout, schedule, EVERYTHING)
    sizes = pool_sizes(layout, tied_embeddings=False, training=True, residents=everything)
    assert [sizes.chunk_slots[1], *(kind.count for kind in sizes.weights)] == [0, 0, 0]
    assert sizes.gradients[0].count == 2
    weights = Residents(everything.records)
    sizes = pool_sizes(layout, tied_embeddings=False, training=True, residents=weights)
    assert sizes.chunk_slots[1] == 4
    assert sizes.weights[0].count == 0
    one_left = Residents(everything.records - {3}, everything.chunks)
    sizes = pool_sizes(layout, tied_embeddings=False, training=True, residents=one_left)
    assert sizes.weights[0] == BufferKind("bf16", layout.record_weight_bytes(3), 1)
