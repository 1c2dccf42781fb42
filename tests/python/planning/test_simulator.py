"""The simulator plays the schedule that training runs: its bytes, its buffers, its gate."""

from dataclasses import replace
from itertools import product

import pytest

from megatrain_io.planning.residents import choose_gradients, choose_residents
from megatrain_io.planning.simulator import Rates, _Simulation, simulate
from megatrain_io.store.layout import ModelLayout
from megatrain_io.store.pool import pool_sizes
from megatrain_io.store.schedule import Phase, Residents, build_schedule, flush_schedule, traffic

BLOCKS = 6
STEPS = 4
STEADY = 3


def layout(*, tied=False, table=2048, width=512):
    block = [("weight", (width, 512))]
    outer = [("table", (table, 512))]
    parts = [("embedding", outer), *((f"block {index}", block) for index in range(BLOCKS))]
    parts.append(("head", [("norm", (512,))] if tied else outer))
    return ModelLayout.build(parts, BLOCKS, "bf16")


def seconds_of(place, forward, *, backward=None):
    """Seconds of computing for each stop."""
    found = {(Phase.HEAD, place.head): forward}
    for index in range(BLOCKS):
        found[Phase.FORWARD, place.block(index)] = forward
        found[Phase.BACKWARD, place.block(index)] = 3 * forward if backward is None else backward
    return found


def played(
    place,
    rates,
    compute,
    *,
    tied=False,
    share=0.0,
    commits=True,
    policy="immediate",
    spilled=False,
    slots=(3, 4, 2),
    behind=0,
):
    first = build_schedule(place, tied_embeddings=tied, training=True, policy=policy)
    then = build_schedule(
        place, tied_embeddings=tied, training=True, policy=policy, applies=policy == "deferred"
    )
    residents = choose_residents(place, first, int(share * 12 * place.parameters)) if share else Residents()
    if policy != "immediate" and not spilled:
        residents = replace(residents, gradients=choose_gradients(place, 1 << 40))
    pool = pool_sizes(
        place,
        tied_embeddings=tied,
        training=True,
        residents=residents,
        defers=policy != "immediate",
        block_buffers=slots[0],
        chunk_slots=slots[1],
        block_gradients=slots[2],
    )
    steps = [(first if number == 0 else then, commits) for number in range(STEPS)]
    if policy == "deferred":
        steps.append((flush_schedule(place), False))
    found = simulate(steps, place, pool, compute, rates, residents=residents, behind=behind)
    moved = [traffic(schedule, place, residents, commits=commits) for schedule, _ in steps]
    return found, moved


SPEED = Rates(read=2e9, write=1e9)


def several_records(*, tied=False):
    """Three records a stop, one of them frozen, one at the embedding; the last block trains nothing."""
    names = [*(f"block {index}" for index in range(BLOCKS)), "head"]
    tensors = {"weight": (512, 512), "base": (2048, 512), "oddment": (512,)}
    parts = [("embedding", [("table weight", (2048, 512))])]
    parts += [(part, [(f"{part} {name}", shape) for name, shape in tensors.items()]) for part in names]
    trained = {"weight": "bf16", "base": "raw16", "oddment": "f32"}
    frozen = {"weight": "raw32", "base": "raw16"}
    of_last = [(f"last {name}", tensors[name]) for name in frozen]
    parts[BLOCKS] = ("last block", of_last)

    def format_of(name):
        return (frozen if name.startswith("last") else trained)[name.split()[-1]]

    del tied
    return ModelLayout.build(parts, BLOCKS, format_of)


@pytest.mark.parametrize("layout_of", [layout, several_records], ids=["one record", "several records"])
@pytest.mark.parametrize("slots", [(3, 4, 2), (2, 1, 1)], ids=["large pool", "least pool"])
@pytest.mark.parametrize("policy", ["immediate", "deferred", "speculative"])
@pytest.mark.parametrize("share", [0.0, 0.5, 2.0])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_every_byte_of_the_schedule_is_played_and_nothing_stands_still(
    monkeypatch, tied, share, policy, slots, layout_of
):
    place, plays, run = layout_of(tied=tied), [], _Simulation.run
    monkeypatch.setattr(
        _Simulation, "run", lambda play: (plays.append((play, dict(play._free))), run(play))[1]
    )
    for commits, spilled, behind in product((True, False), (False, True), (0, 2, 1000)):
        found, moved = played(
            place,
            SPEED,
            seconds_of(place, 1e-4),
            tied=tied,
            share=share,
            commits=commits,
            policy=policy,
            spilled=spilled,
            slots=slots,
            behind=behind,
        )
        # A side that is busy beside the other one goes at half its speed.
        read, written = (sum(each) for each in zip(*moved, strict=True))
        for name, least in (("read", read / SPEED.read), ("write", written / SPEED.write)):
            busy = sum(step.busy[name] for step in found)
            assert least * (1 - 1e-9) <= busy <= 2 * least * (1 + 1e-9)
    for play, buffers in plays:
        assert play._free == buffers, "each is given back once"
        assert not play._gradients


@pytest.mark.parametrize("policy", ["immediate", "deferred", "speculative"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_embeddings_no_larger_than_a_block_pass_through_its_buffers(tied, policy):
    place = layout(tied=tied, table=256, width=4096)
    for slots, share in product([(3, 4, 2), (2, 1, 1)], [0.0, 0.3, 0.7]):
        compute = seconds_of(place, 1e-4)
        found, _ = played(place, SPEED, compute, tied=tied, share=share, policy=policy, slots=slots)
        assert found[STEADY].seconds > 0


def test_without_a_drive_to_wait_for_a_step_takes_what_it_computes():
    place = layout()
    compute = seconds_of(place, 0.01)
    found, _ = played(place, Rates(1e18, 1e18), compute, share=2.0)
    assert found[STEADY].seconds == pytest.approx(sum(compute.values()), rel=1e-6)
    assert sum(found[STEADY].waits.values()) == pytest.approx(0, abs=1e-6)


def test_without_computing_the_drive_is_never_idle():
    place = layout()
    found, moved = played(place, SPEED, {})
    read, written = moved[-1]
    assert found[STEADY].seconds == pytest.approx(read / SPEED.read + written / SPEED.write, rel=0.02)
    both = replace(SPEED, side_by_side=2.0)
    faster, _ = played(place, both, {})
    slowest = max(read / SPEED.read, written / SPEED.write)
    assert slowest <= faster[STEADY].seconds < found[STEADY].seconds


@pytest.mark.parametrize("policy", ["immediate", "deferred", "speculative"])
def test_a_gradient_that_ram_holds_frees_its_buffer_before_the_drive_has_taken_it(policy):
    place = layout()
    compute = seconds_of(place, 2e-3, backward=1.2e-2)
    waiting, enough, ample = (
        played(place, SPEED, compute, policy=policy, spilled=True, slots=(3, 4, buffers), behind=behind)[0][
            STEADY
        ].seconds
        for buffers, behind in ((1, 0), (1, len(place.chunks)), (4, 0))
    )
    assert enough < 0.97 * waiting
    assert enough == pytest.approx(ample, rel=0.02)


def test_no_update_is_written_before_the_commit_of_the_step_before():
    place = layout()
    slow = replace(SPEED, commit=5.0)
    found, _ = played(place, slow, seconds_of(place, 1e-4))
    assert found[STEADY].seconds >= 5.0
    assert max(found[STEADY].waits, key=found[STEADY].waits.get) in {"write", "update"}
    hidden, _ = played(place, replace(SPEED, commit=0.05), seconds_of(place, 0.1))
    alone, _ = played(place, SPEED, seconds_of(place, 0.1))
    assert hidden[STEADY].seconds == pytest.approx(alone[STEADY].seconds, rel=0.01), (
        "a commit passes under the forward pass"
    )


def test_updates_wait_for_the_commit_of_the_step_before():
    place = layout()
    rates = Rates(read=1e18, write=1e18, update=place.parameters / 3.0, commit=2.0)
    found, _ = played(place, rates, seconds_of(place, 1e-4))
    assert found[STEADY].seconds >= 3.0 + 2.0


def test_nothing_of_a_step_is_read_before_the_one_before_has_computed():
    place = layout()
    schedule = build_schedule(place, tied_embeddings=False, training=False)
    pool = pool_sizes(place, tied_embeddings=False, training=False)
    compute = {(Phase.HEAD, place.head): 100.0}
    found = simulate([(schedule, False)] * STEPS, place, pool, compute, Rates(read=2e6, write=1e18))
    assert found[STEADY].seconds == pytest.approx(100.0 + traffic(schedule, place)[0] / 2e6)


def test_updates_on_the_cores_that_compute_make_both_slower():
    place = layout(table=8)  # else the next step waits for a large table's update, wherever that is made
    compute = seconds_of(place, 0.01)
    work = replace(SPEED, read=1e18, write=1e18, update=place.parameters / 0.2)
    apart, _ = played(place, work, compute, share=2.0)
    shared, _ = played(place, replace(work, shares_cores=True), compute, share=2.0)
    alone = sum(compute.values())
    assert apart[STEADY].seconds == pytest.approx(alone, rel=0.2)
    assert shared[STEADY].seconds == pytest.approx(alone + 0.2, rel=0.05)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.6, 1.0])
def test_more_that_stays_and_a_faster_drive_are_never_slower(share):
    place = layout()
    compute = seconds_of(place, 1e-3)
    less, _ = played(place, SPEED, compute, share=share)
    more, _ = played(place, SPEED, compute, share=share + 0.3)
    faster, _ = played(place, replace(SPEED, read=4e9, write=2e9), compute, share=share)
    assert more[STEADY].seconds <= less[STEADY].seconds * 1.01
    assert faster[STEADY].seconds <= less[STEADY].seconds * 1.001


def test_gradients_that_wait_cost_time_and_right_speculation_does_not():
    place = layout()
    compute = seconds_of(place, 2e-3)
    free, _ = played(place, SPEED, compute)
    waiting, _ = played(place, SPEED, compute, policy="deferred")
    spilled, _ = played(place, SPEED, compute, policy="deferred", spilled=True)
    speculative, _ = played(place, SPEED, compute, policy="speculative")
    assert free[STEADY].seconds < waiting[STEADY].seconds < spilled[STEADY].seconds
    assert speculative[STEADY].seconds == pytest.approx(free[STEADY].seconds, rel=0.05)


def test_inputs_on_the_drive_are_moved_twice():
    place = layout()
    schedule = build_schedule(place, tied_embeddings=False, training=True)
    pool = pool_sizes(place, tied_embeddings=False, training=True)
    inputs = {place.block(index): 1e9 for index in range(3)}
    steps = [(schedule, True)] * STEPS
    compute = seconds_of(place, 1e-3)
    without = simulate(steps, place, pool, compute, SPEED)
    with_them = simulate(steps, place, pool, compute, SPEED, inputs=inputs)
    assert with_them[STEADY].seconds - without[STEADY].seconds == pytest.approx(3 / 2 + 3 / 1, rel=0.05)
