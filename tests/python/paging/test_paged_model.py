"""The step: dropout that is replayed, slices of the loss, and steps that fail without leaving a trace."""

import os
import subprocess
import sys

import pytest
import torch
from transformers import GPT2Config

import paged
from megatrain_io.errors import BufferInUseError, MegatrainIoError
from megatrain_io.models.probe import probe
from megatrain_io.paging.paged_model import PagedPartition
from megatrain_io.store.layout import ModelLayout
from megatrain_io.store.paged_store import AdamWStep, Ledger, PagedStore, StoreCreator, TensorSettings
from paged import (
    DEVICE,
    Case,
    all_planes,
    differing,
    files,
    make_store,
    opened,
    partitioned,
    to_micro_batch,
    train,
)

ENGINE = "threads"  # stopping a ring takes a second; how bytes move is tested elsewhere
TIED = Case(tied=True, dtype=torch.bfloat16, counts=(2, 1, 2), overrides={"num_hidden_layers": 3})


class Dropping(Case):
    """GPT-2: it drops of the embedding, of attention, and of what each block adds."""

    @property
    def config(self):
        return GPT2Config(
            vocab_size=257, n_embd=64, n_layer=3, n_head=4, n_positions=64, attn_pdrop=0.2, resid_pdrop=0.2,
            embd_pdrop=0.2,
        )  # fmt: skip


DROPPING = Dropping(dtype=torch.float32, counts=(2, 1, 2))


@pytest.fixture(scope="module", autouse=True)
def _facts_of_gpt2():
    facts, known = probe(DROPPING.config), paged.facts_of
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            paged,
            "facts_of",
            lambda family, tied: facts if (family, tied) == ("llama", False) else known(family, tied),
        )
        yield


@pytest.fixture
def store(tmp_path):
    make_store(tmp_path / "store", TIED, engine=ENGINE)
    return tmp_path / "store"


def step_of(model, case, number):
    batches = [to_micro_batch(batch) for batch in case.steps[number - 1]]
    return model.train_step(batches, AdamWStep(number, 1e-3), lambda loss: paged.blob(number, [loss]))


# ------------------------------------------------------------------------------------------- dropout


def trained(path, **how):
    make_store(path, DROPPING, engine=how["engine"])
    with opened(path, DROPPING, **how) as model:
        return train(model, DROPPING), all_planes(model.state)


def test_dropout_follows_from_seed_and_step_alone(tmp_path):
    losses, planes = trained(tmp_path / "a", engine=ENGINE)
    torch.manual_seed(1)
    assert trained(tmp_path / "b", engine="auto", small_pool=True, threads=1)[0] == losses
    make_store(tmp_path / "c", DROPPING, engine=ENGINE)
    for stop in (2, None):  # in two lives
        torch.manual_seed(2)
        with opened(tmp_path / "c", DROPPING, engine=ENGINE) as model:
            again = train(model, DROPPING, stop)
            resumed = all_planes(model.state)
    assert again == losses
    assert differing(resumed, planes) == []
    with PagedStore(*files(tmp_path / "b"), engine=ENGINE) as state:
        assert differing(all_planes(state), planes) == []


def test_another_seed_drops_others_and_the_recompute_drops_the_same(tmp_path, monkeypatch):
    make_store(tmp_path / "store", DROPPING, engine=ENGINE)
    outputs = {True: [], False: []}
    partition = partitioned(DROPPING)
    run_block = partition.run_block

    def noted(index, parameters, hidden, call):
        out = run_block(index, parameters, hidden, call)
        outputs[torch.is_grad_enabled()].append((index, out.detach().clone()))
        return out

    monkeypatch.setattr(partition, "run_block", noted)
    losses = []
    with PagedStore(*files(tmp_path / "store"), engine=ENGINE) as state:
        for seed in (0, 1):
            model = PagedPartition(partition, state, seed=seed)
            state.start(model.pool_sizes(training=True), settings=lambda _place: TensorSettings(0.0))
            before = torch.get_rng_state()
            losses.append(model.train_step([to_micro_batch(DROPPING.steps[1][0])], AdamWStep(1, 0.0), None))
            assert torch.equal(torch.get_rng_state(), before)
            state.abort()
    assert losses[0] != losses[1]
    forward, recomputed = outputs[False], outputs[True]
    assert len(forward) == len(recomputed) == 6
    for life in (0, 3):
        for (i, one), (j, other) in zip(
            forward[life : life + 3], recomputed[life : life + 3][::-1], strict=True
        ):
            assert i == j
            assert torch.equal(one, other)


def test_evaluation_drops_nothing(tmp_path):
    make_store(tmp_path / "store", DROPPING, engine=ENGINE)
    batches = DROPPING.steps[0]
    stock = DROPPING.model.eval()
    count = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in batches)
    with torch.no_grad():
        expected = sum(stock(**batch, num_items_in_batch=count).loss for batch in batches)
    with opened(tmp_path / "store", DROPPING, engine=ENGINE) as model:
        trained_loss = step_of(model, DROPPING, 1).loss
        model.state.wait_durable()
    make_store(tmp_path / "fresh", DROPPING, engine=ENGINE)
    with opened(tmp_path / "fresh", DROPPING, engine=ENGINE) as model:
        found = [model.evaluate([to_micro_batch(batch) for batch in batches]).loss for _ in range(2)]
        assert model.state.generation == 1
    assert found == [expected.item()] * 2
    assert trained_loss != found[0]


# ------------------------------------------------------------------------------------ slices of the loss


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_slices_change_the_loss_by_rounding_only(tmp_path, tied):
    case = Case("qwen3", tied, torch.float32, (2,), {"num_hidden_layers": 1})
    batches = [to_micro_batch(batch) for batch in case.steps[0]]
    longest = max(batch.input_ids.shape[1] for batch in batches)
    found = {}
    for name, tokens in {"whole": 1 << 20, "one": longest, "many": 3}.items():
        make_store(tmp_path / name, case, engine=ENGINE)
        with PagedStore(*files(tmp_path / name), engine=ENGINE) as state:
            model = PagedPartition(partitioned(case), state, logits_bytes=4 * 257 * tokens)
            assert model.slice_tokens == tokens
            state.start(model.pool_sizes(training=True), settings=lambda _place: TensorSettings(0.0))
            evaluated = model.evaluate(batches)
            loss = model.train_step(batches, AdamWStep(1, 1e-3), lambda _loss: b"x")
            assert (evaluated.loss, evaluated.trained_tokens) == (loss.loss, loss.trained_tokens)
            # The first moment is a tenth of the gradient.
            found[name] = loss.loss, {key: v for key, v in all_planes(state).items() if key[1] == "exp_avg"}
    assert found["one"][0] == found["whole"][0]
    assert differing(found["one"][1], found["whole"][1]) == []
    assert found["many"][0] == pytest.approx(found["whole"][0], abs=1e-6)
    assert differing(found["many"][1], found["whole"][1]) != []
    for key, value in found["whole"][1].items():
        torch.testing.assert_close(found["many"][1][key], value, rtol=1e-3, atol=1e-7)


# ---------------------------------------------------------------------------------- steps that fail


class Boom(Exception):  # noqa: N818
    pass


def fail(model, where, monkeypatch):
    """Raise in the middle of the next step, with tensors of the block in frames and in a chained exception."""
    run_block = model.partition.run_block

    def deeper(held):
        raise KeyError(next(iter(held)))

    def failing(index, parameters, hidden, call):
        if (index, torch.is_grad_enabled()) == where:
            try:
                deeper(dict(parameters))
            except KeyError as error:
                raise Boom(error) from error
        return run_block(index, parameters, hidden, call)

    monkeypatch.setattr(model.partition, "run_block", failing)


@pytest.mark.timeout(30)
@pytest.mark.parametrize("small_pool", [False, True], ids=["pool", "small pool"])
def test_a_failed_step_leaves_nothing(store, monkeypatch, small_pool):
    make_store(store.with_name("whole"), TIED, engine=ENGINE)
    with opened(store.with_name("whole"), TIED, engine=ENGINE) as model:
        losses = train(model, TIED)
        expected = all_planes(model.state)
    kept = []
    with opened(store, TIED, engine=ENGINE, small_pool=small_pool) as model:
        assert train(model, TIED, 1) == losses[:1]
        before = all_planes(model.state)
        for where in ((2, False), (0, True), (1, True)):
            with monkeypatch.context() as patch:
                fail(model, where, patch)
                with pytest.raises(Boom) as caught:
                    step_of(model, TIED, 2)
            kept.append(caught)  # the exception, its frames and their tensors live on
            assert model.state.generation == 2
            assert differing(all_planes(model.state), before) == []
        assert train(model, TIED) == losses
        assert differing(all_planes(model.state), expected) == []
        assert model.state.verify().damaged == ()


def test_a_step_without_labels_is_refused_and_the_next_one_is_whole(store):
    with opened(store, TIED, engine=ENGINE) as model:
        batch = to_micro_batch(TIED.steps[0][0])
        batch.shift_labels.fill_(-100)
        with pytest.raises(MegatrainIoError, match="no token of this step has a label"):
            model.train_step([batch], AdamWStep(1, 1e-3), lambda _loss: b"x")
        assert step_of(model, TIED, 1).trained_tokens > 0


# ------------------------------------------------------------------------------------------ borrowing


@pytest.mark.skipif(DEVICE != "cpu", reason="whole records are lent to the CPU alone")
def test_a_tensor_that_is_kept_is_told_of(store):
    with opened(store, TIED, engine=ENGINE) as model:
        state = model.state
        state.begin(state.check(model.forward_schedule), AdamWStep(1, 0.0))
        record = state.weights(state.layout.embedding)
        kept = next(iter(record.tensors.values()))[0]
        content = kept.clone()
        with pytest.raises(BufferInUseError, match="1 tensor"):
            record.give_back()
        assert torch.equal(kept, content)
        del kept
        record.give_back()
        state.abort()
        assert step_of(model, TIED, 1).trained_tokens > 0


def test_a_fork_is_refused(store):
    script = """
import os, sys
from pathlib import Path
from megatrain_io.errors import UsedAfterForkError
from megatrain_io.store.pool import pool_sizes
from megatrain_io.store.schedule import build_schedule
from megatrain_io.store.paged_store import AdamWStep, PagedStore

with PagedStore(*sys.argv[1:], engine="threads") as state:
    operations = build_schedule(state.layout, tied_embeddings=True, training=False)
    schedule = state.check(operations)
    state.start(pool_sizes(state.layout, tied_embeddings=True, training=False))
    child = os.fork()
    if child == 0:
        refused = 0
        for use in (
            lambda: state.begin(schedule, AdamWStep(1, 0.0)),
            lambda: state.read_plane(0, "weight"),
            lambda: state.verify(),
        ):
            try:
                use()
            except UsedAfterForkError:
                refused += 1
        os._exit(refused)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 3, status
    # The parent goes on.
    state.begin(schedule, AdamWStep(1, 0.0))
    state.weights(0).give_back()
    state.abort()
    assert state.verify().damaged == ()
"""
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script, *map(str, files(store))],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert (result.returncode, result.stderr) == (0, "")


# -------------------------------------------------------------------------------------------- layout


@pytest.mark.parametrize("state_format", ["bf16", "f32"])
@pytest.mark.parametrize("chunk_parameters", [None, 4096, 12288])
def test_the_layout_is_that_of_rust(tmp_path, state_format, chunk_parameters):
    shapes = {
        "embedding": [("a", (257, 33)), ("b", (1,))],
        "block 0": [("c", (4096,)), ("d", (127, 3, 5)), ("e", (1, 1))],
        "block 1": [("f", (129,))],
        "head": [("g", (8191,)), ("h", (64, 65))],
    }
    layout = ModelLayout.build(shapes.items(), 2, state_format, chunk_parameters)
    creator = StoreCreator(files(tmp_path / "store"), layout.manifest({}), ENGINE, Ledger())
    expected = [(chunk.record, chunk.start, chunk.parameters) for chunk in layout.chunks]
    assert creator.chunks() == expected
    width = 4 if state_format == "f32" else 2
    name = "float32" if state_format == "f32" else "bfloat16"
    for chunk in layout.chunks:
        creator.write_chunk(chunk.index, b"\x01" * (chunk.parameters * width), name)
    creator.finish(b"")
    with PagedStore(*files(tmp_path / "store"), engine=ENGINE) as state:
        assert state._store.chunks() == expected
        assert state.layout == layout
        report = state.verify()
        assert report.damaged == ()
        assert report.nbytes == sum(layout.weight_extent_bytes(chunk) for chunk in layout.chunks)
        assert state.read_tensor(next(layout.tensors()), "weight").shape == (257, 33)
