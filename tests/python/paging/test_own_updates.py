"""Each record has its own t of AdamW: what a step leaves out, or no gradient reaches, is left alone, as by torch."""

import shutil
import struct
from functools import partial

import pytest
import torch

from format_reader import StoreReader, crc32c
from megatrain_io.errors import MegatrainIoError
from megatrain_io.paging.device.simulated import SimulatedDevice
from megatrain_io.store.paged_store import AdamWStep
from megatrain_io.store.schedule import build_schedule, flush_schedule, traffic
from paged import (
    DRIVES,
    Case,
    all_planes,
    differing,
    expected_planes,
    files,
    make_store,
    opened,
    to_micro_batch,
)
from reference.reference import train as train_in_memory

FP32, BF16 = torch.float32, torch.bfloat16

# Stops that each step updates: embedding, four blocks, head.
SETS = [{0, 1, 2, 3, 4, 5}, {0, 2, 5}, {3}, {1, 2, 4}, {0, 5}, {2, 3}]


def records_of(layout, stops):
    return [record for stop in sorted(stops) for record in layout.stops[stop]]


def names_of(layout, records):
    return {place.name for record in records for place in layout.records[record].tensors}


def train(model, case, sets=None, start=0, stop=None, commit_every=1):
    """Steps of these sets of stops; what each came to."""
    made, end = [], len(case.steps) if stop is None else stop
    for number in range(start + 1, end + 1):
        h = case.hyperparameters
        # Its step is of no account: each record has its own.
        adamw = AdamWStep(1000 + number, h.lr[number - 1], h.beta1, h.beta2, h.eps)
        commits = number % commit_every == 0 or number == end
        chosen = None if sets is None else sets[number - 1]
        made.append(
            model.train_step(
                [*map(to_micro_batch, case.steps[number - 1])],
                adamw,
                (lambda _loss: b"%d" % number) if commits else None,  # noqa: B023
                number=number,
                updated=None if chosen is None else records_of(model.state.layout, chosen),
            )
        )
    model.wait_durable()
    return made


def check(model, case, made, sets=SETS, before_step=None):
    """Losses, planes and t are those of torch."""
    layout = model.state.layout
    expected = train_in_memory(
        case.model,
        case.steps,
        case.hyperparameters,
        case.dtype,
        clip_coefficients=[step.clip_coefficient for step in made],
        updated=None if sets is None else [names_of(layout, records_of(layout, stops)) for stops in sets],
        before_step=before_step,
    )
    return check_result(model, made, expected)


def check_result(model, made, expected):
    layout = model.state.layout
    assert [step.loss for step in made] == expected.losses
    planes = expected_planes(expected) | {(name, "weight"): value for name, value in expected.weight.items()}
    assert differing(all_planes(model.state), planes) == []
    assert [step.grad_norm for step in made] == pytest.approx(expected.grad_norms, rel=1e-6)
    updates = {place.name: model.state.updates[place.record] for place in layout.tensors()}
    assert updates == dict.fromkeys(updates, 0) | expected.updates
    return updates


def limit_of(case, sets=None):
    """Some steps are clipped, others are not."""
    norms = train_in_memory(case.model, case.steps, case.hyperparameters, case.dtype).grad_norms
    return sorted(norms)[len(norms) // 3 if sets else len(norms) // 2]


HOW = [
    pytest.param({}, marks=pytest.mark.slow),
    pytest.param({"chunk_parameters": 4096, "small_pool": True}, marks=pytest.mark.slow),
    {"drives": 2, "commit_every": 3},
    pytest.param({"resident_share": 0.5, "commit_every": 2}, marks=pytest.mark.slow),
    {"resident_share": 1.0, "commit_every": 4, "small_pool": True},
    {"device": partial(SimulatedDevice, 3), "resident_share": 0.5, "commit_every": 2},
]


@pytest.mark.parametrize("how", HOW, ids=str)
@pytest.mark.parametrize("policy", [None, "deferred", "speculative"])
def test_steps_that_update_some_records_have_the_bits_of_torch(tmp_path, policy, how):
    how = dict(how)
    case = Case(dtype=FP32 if "drives" in how else BF16, counts=(1, 2, 1, 1, 2, 1))
    commit_every, drives = how.pop("commit_every", 1), how.pop("drives", DRIVES)
    make_store(tmp_path / "store", case, how.pop("chunk_parameters", None), drives=drives)
    if "device" in how:
        how["device"] = how["device"]()
    if policy is not None:
        kept = 0.0 if "small_pool" in how else 1.0
        how |= {"max_grad_norm": limit_of(case, SETS), "policy": policy, "kept_in_ram": kept}
    with opened(tmp_path / "store", case, drives=drives, **how) as model:
        made = train(model, case, SETS, commit_every=commit_every)
        updates = check(model, case, made)
        assert len(set(updates.values())) > 1
    if policy is not None:
        assert {step.clip_coefficient < 1 for step in made} == {True, False}


def test_a_tied_table_that_is_left_out_gets_no_gradient(tmp_path):
    case = Case(tied=True, dtype=BF16, counts=(1,) * 5)
    sets = [{0, 1, 2, 3, 4, 5}, {1, 2}, {0}, {3, 4, 5}, {0, 1, 5}]
    make_store(tmp_path / "store", case)
    with opened(tmp_path / "store", case) as model:
        check(model, case, train(model, case, sets), sets)


@pytest.mark.parametrize("policy", [None, "deferred"])
def test_a_run_that_was_killed_goes_on_with_each_ones_own(tmp_path, policy):
    case = Case(dtype=BF16, counts=(1,) * 6)
    how = {} if policy is None else {"max_grad_norm": limit_of(case), "policy": policy}
    make_store(tmp_path / "store", case)
    (tmp_path / "killed").mkdir()
    with opened(tmp_path / "store", case, **how) as model:
        made = train(model, case, SETS, stop=3)
        # What a kill leaves: no clean marker, and a step that was not committed.
        model.train_step([*map(to_micro_batch, case.steps[3])], AdamWStep(4, 1.0), None, updated=[1])
        for file in files(tmp_path / "store"):
            shutil.copy(file, tmp_path / "killed" / file.name)
        model.flush()
    with opened(tmp_path / "killed" / "store", case, **how) as model:
        assert model.state.blob == b"3"
        layout = model.state.layout
        held = [sum(record in records_of(layout, s) for s in SETS[:3]) for record in range(6)]
        assert model.state.updates == held
        made += train(model, case, SETS, start=3)
        check(model, case, made)


def without_blocks(model, left_out):
    """Let the blocks that ``left_out`` names for a step pass their input on: no gradient reaches their parameters."""
    run_block = model.partition.run_block

    def run(block, tensors, hidden, call):
        under_way = model._under_way
        if under_way is not None and block in left_out(under_way.number):
            return hidden
        return run_block(block, tensors, hidden, call)

    model.partition.run_block = run


@pytest.mark.parametrize(
    "how",
    [
        pytest.param({}, marks=pytest.mark.slow),
        {"resident_share": 0.5, "commit_every": 2},
        pytest.param({"resident_share": 1.0, "commit_every": 3, "small_pool": True}, marks=pytest.mark.slow),
        {"device": partial(SimulatedDevice, 5), "resident_share": 0.5, "commit_every": 2},
        pytest.param({"device": partial(SimulatedDevice, 6)}, marks=pytest.mark.slow),
    ],
    ids=str,
)
@pytest.mark.parametrize("policy", [None, "deferred", "speculative"])
def test_a_record_that_no_gradient_reaches_is_left_alone(tmp_path, policy, how):
    how, case = dict(how), Case(dtype=BF16, counts=(1, 2, 1, 1, 1, 1))
    commit_every = how.pop("commit_every", 1)
    if "device" in how:
        how["device"] = how["device"]()
    if policy is not None:
        how |= {"max_grad_norm": limit_of(case), "policy": policy, "kept_in_ram": 0.5}

    def left_out(number):
        return {2: {1}, 3: {0, 1}, 4: {3}, 6: {1, 2}}.get(number, set())

    forwards = {}

    def before_step(stock, number):
        for block, layer in enumerate(stock.model.layers):
            forwards.setdefault(block, layer.forward)
            is_left_out = block in left_out(number)
            layer.forward = (lambda hidden, *_, **__: hidden) if is_left_out else forwards[block]

    make_store(tmp_path / "store", case, 4096)
    with opened(tmp_path / "store", case, **how) as model:
        without_blocks(model, left_out)
        made = train(model, case, commit_every=commit_every)
        check(model, case, made, None, before_step)
        layout = model.state.layout
        blocks = [layout.stops[layout.block(block)][0] for block in range(4)]
        assert [model.state.updates[record] for record in blocks] == [5, 3, 5, 5]


def three_formats(name):
    return "raw32" if ".mlp.up" in name else "bf16" if "norm" in name else "f32"


def without_gradients(model, records):
    """Let no gradient reach the records that ``records`` names for a step."""
    partition, layout = model.partition, model.state.layout
    run_block, loss = partition.run_block, partition.loss

    def given(tensors):
        under_way = model._under_way
        cut = names_of(layout, records(under_way.number)) if under_way is not None else ()
        return {name: each.detach() if name in cut else each for name, each in tensors.items()}

    partition.run_block = lambda block, tensors, *others: run_block(block, given(tensors), *others)
    partition.loss = lambda tensors, *others: loss(given(tensors), *others)


@pytest.mark.parametrize(
    "how",
    [
        {"resident_share": 0.5, "commit_every": 2, "drives": 2},
        pytest.param({"resident_share": 0.2, "commit_every": 3, "small_pool": True}, marks=pytest.mark.slow),
        pytest.param({"device": partial(SimulatedDevice, 7), "resident_share": 0.5}, marks=pytest.mark.slow),
    ],
    ids=str,
)
@pytest.mark.parametrize("policy", [None, "deferred", "speculative"])
def test_of_a_stop_some_records_are_updated_some_get_no_gradient_and_some_are_frozen(tmp_path, policy, how):
    how, case = dict(how), Case(tied=True, counts=(1, 2, 1, 1, 2, 1), format_of=three_formats)
    commit_every, drives = how.pop("commit_every", 1), how.pop("drives", DRIVES)
    make_store(tmp_path / "store", case, 4096, drives=drives)
    if "device" in how:
        how["device"] = how["device"]()
    stock = case.model
    formats = {name: three_formats(name) for name, _ in stock.named_parameters()}
    for name, parameter in stock.named_parameters():
        parameter.requires_grad_(formats[name] != "raw32")
    # Of block 1 the norms, of block 2 all but them, of the head its only record, and the whole of block 0.
    left_out = {
        2: [(2, "bf16")],
        3: [(3, "f32"), (2, "bf16")],
        4: [(5, "bf16")],
        6: [(1, "f32"), (1, "bf16")],
    }
    not_chosen = {1: [(4, "f32")], 3: [(4, "bf16")], 5: [(3, "f32"), (3, "bf16")]}

    def of(layout, pairs):
        return {r for stop, form in pairs for r in layout.stops[stop] if layout.records[r].format == form}

    with opened(tmp_path / "store", case, drives=drives) as model:
        layout = model.state.layout
    sets = [set(layout.trained) - of(layout, not_chosen.get(number, ())) for number in range(1, 7)]
    gradients = [chosen - of(layout, left_out.get(number, ())) for number, chosen in enumerate(sets, 1)]

    def expected(coefficients=None):
        return train_in_memory(
            stock,
            case.steps,
            case.hyperparameters,
            BF16,
            clip_coefficients=coefficients,
            keep_in_fp32=[name for name, form in formats.items() if form != "bf16"],
            updated=[names_of(layout, chosen) for chosen in gradients],
        )

    if policy is not None:
        how |= {"max_grad_norm": sorted(expected().grad_norms)[3], "policy": policy, "kept_in_ram": 0.5}
    made = []
    with opened(tmp_path / "store", case, drives=drives, **how) as model:
        without_gradients(model, lambda number: of(layout, left_out.get(number, ())))
        for number, chosen in enumerate(sets, 1):
            h = case.hyperparameters
            adamw = AdamWStep(1000 + number, h.lr[number - 1], h.beta1, h.beta2, h.eps)
            batches = [*map(to_micro_batch, case.steps[number - 1])]
            blob = (lambda _loss: b"") if number % commit_every == 0 else None
            made.append(model.train_step(batches, adamw, blob, number=number, updated=chosen))
        model.wait_durable()
        updates = check_result(model, made, expected([step.clip_coefficient for step in made]))
    assert {*updates.values()} == {0, 4, 5, 6}
    if policy is not None:
        assert {step.clip_coefficient < 1 for step in made} == {True, False}


def test_embeddings_that_no_gradient_reaches_are_left_alone(tmp_path):
    case = Case(dtype=BF16, counts=(2,) * 3)
    make_store(tmp_path / "store", case)
    with opened(tmp_path / "store", case) as model:
        record = model.partition.record

        def cut(parameters, micro_batch, cache=None):
            is_cut = model._under_way is not None and model._under_way.number == 2
            given = {name: each.detach() if is_cut else each for name, each in parameters.items()}
            return record(given, micro_batch, cache)

        model.partition.record = cut
        everything = {0, 1, 2, 3, 4, 5}
        made = train(model, case)
        check(model, case, made, [everything, everything - {0}, everything])


def test_a_parameter_alone_without_a_gradient_is_refused_by_name_and_the_step_is_dropped(tmp_path):
    case = Case(dtype=BF16, counts=(1,) * 4)
    make_store(tmp_path / "store", case)
    name = "model.layers.1.mlp.up_proj.weight"
    with opened(tmp_path / "store", case) as model:
        run_block, is_cut = model.partition.run_block, False

        def run(block, tensors, hidden, call):
            cut = {name: tensors[name].detach()} if is_cut and name in tensors else {}
            return run_block(block, {**tensors, **cut}, hidden, call)

        model.partition.run_block = run
        made = train(model, case, stop=2)
        is_cut = True
        with pytest.raises(MegatrainIoError, match=rf"1 of 9 parameters .* the first is {name}, .*dropped"):
            train(model, case, start=2, stop=3)
        is_cut = False
        assert model.state.blob == b"2"
        made += train(model, case, start=2)
        check(model, case, made, None)


def test_sets_that_cannot_be_are_refused_before_anything_begins(tmp_path):
    case = Case(dtype=BF16, counts=(1,), format_of=lambda name: "raw16" if ".mlp." in name else "bf16")
    make_store(tmp_path / "store", case)
    batches = [to_micro_batch(batch) for batch in case.steps[0]]
    with opened(tmp_path / "store", case) as model:
        layout = model.state.layout
        frozen = min(set(range(len(layout.records))) - set(layout.trained))
        for updated, message in [
            ([], "updates no record"),
            ([frozen], f"record {frozen}, which is not trained"),
        ]:
            with pytest.raises(MegatrainIoError, match=message):
                model.train_step(batches, AdamWStep(1, 1e-3), lambda _loss: b"", updated=updated)
        assert model.state.generation == 1


@pytest.mark.parametrize("policy", [None, "deferred"])
def test_of_a_record_that_is_left_out_weights_alone_are_read(tmp_path, policy):
    case = Case(dtype=BF16, counts=(1,) * 6, overrides={"hidden_size": 128})
    how = {} if policy is None else {"max_grad_norm": 1e9, "policy": policy}
    sets = [None, None, {2}, {2}, {0, 5}, {1, 2, 3}]
    make_store(tmp_path / "store", case)
    with opened(tmp_path / "store", case, **how) as model:
        train(model, case, stop=2)
        layout, residents, moved, predicted = model.state.layout, model.state.residents, [], []
        for number in range(2, 6):
            before = model.state.io_bytes()
            train(model, case, sets, start=number, stop=number + 1)
            moved.append([b - a for a, b in zip(before, model.state.io_bytes(), strict=True)])
            chosen = records_of(layout, sets[number])
            schedule = build_schedule(
                layout, tied_embeddings=False, training=True, policy=policy or "immediate", updated=chosen
            )
            parts = [traffic(schedule, layout, residents)]
            if policy is not None:
                # All its gradients wait in RAM.
                kept = type(residents)(gradients=frozenset(layout.trained))
                parts = [traffic(made, layout, kept) for made in (schedule, flush_schedule(layout, chosen))]
            predicted.append([sum(part) for part in zip(*parts, strict=True)])
    assert [read for read, _ in moved] == [read for read, _ in predicted]
    # Beyond that, each step writes the same for its commit: table, blob, superblock and mirror.
    (commit,) = {now[1] - then[1] for now, then in zip(moved, predicted, strict=True)}
    assert 0 < commit <= 64 << 10
    one = layout.records[layout.stops[2][0]].parameters
    assert 12 * one <= predicted[0][1] <= 12 * one + 2 * 4096 * len(layout.chunks)


def make_older(path):
    """Make a store of format 0.3 of one that was just imported: only its headers differ."""
    for file in files(path):
        content = bytearray(file.read_bytes())
        for at in (0, 512 << 10):
            struct.pack_into("<I", content, at + 16, 3)
            struct.pack_into("<I", content, at + 4092, crc32c(bytes(content[at : at + 4092])))
        file.write_bytes(content)


def test_a_store_of_an_older_format_goes_on_with_one_number_for_all(tmp_path):
    case = Case(dtype=BF16, counts=(1,) * 3)
    planes = []
    for name in ("new", "old"):
        make_store(tmp_path / name, case)
        if name == "old":
            make_older(tmp_path / name)
        with opened(tmp_path / name, case) as model:
            for number, step in enumerate(case.steps, 1):
                batches = [to_micro_batch(batch) for batch in step]
                model.train_step(batches, AdamWStep(number, 1e-3), lambda _loss: b"")
            model.wait_durable()
            planes.append(all_planes(model.state))
            if name == "new":
                assert set(model.state.updates) == {3}
                continue
            assert model.state.updates is None
            with pytest.raises(
                MegatrainIoError, match=r"updates 1 of 6 .*before format 0\.4.*import it again"
            ):
                model.train_step(batches, AdamWStep(4, 1e-3), lambda _loss: b"", updated=[1])
            without_blocks(model, lambda _number: {1})
            with pytest.raises(MegatrainIoError, match=r"got no gradient.*before format 0\.4"):
                model.train_step(batches, AdamWStep(4, 1e-3), lambda _loss: b"")
            assert model.state.generation == 4
    assert differing(*planes) == []
    # It keeps its format, and its table says no more than before.
    readers = [StoreReader(*files(tmp_path / name)) for name in ("new", "old")]
    assert [reader.minor for reader in readers] == [4, 3]
    assert [set(reader.updates) for reader in readers] == [{3}, {0}]
