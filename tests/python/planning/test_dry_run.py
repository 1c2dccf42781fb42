"""A step on shapes alone says what a real one allocates."""

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from transformers import GPT2Config, MixtralConfig

import paged
from megatrain_io.data.batch import blank_micro_batch
from megatrain_io.errors import ConfigError
from megatrain_io.models.partition import model_parts
from megatrain_io.models.probe import probe
from megatrain_io.planning.dry_run import dry_run, shortened, with_all_neighbours
from megatrain_io.store.layout import ModelLayout
from megatrain_io.store.paged_store import AdamWStep
from paged import DEVICE, Case, make_store, opened, partitioned, to_micro_batch, train

SIZES = {
    "hidden_size": 256,
    "intermediate_size": 688,
    "vocab_size": 2053,
    "num_hidden_layers": 5,
    "head_dim": 64,
}


def counted(model, micro_batches):
    return dry_run(model.partition, model.state.layout, micro_batches, slice_tokens=model.slice_tokens)


@pytest.mark.slow
@pytest.mark.parametrize("micro_batches", [1, 3])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_a_dry_run_needs_what_a_real_one_does(tmp_path, family, tied, dtype, micro_batches):
    case = Case(family, tied, dtype, (micro_batches,), SIZES)
    make_store(tmp_path / "store", case)
    with opened(tmp_path / "store", case) as model:
        batches = [to_micro_batch(batch) for batch in case.steps[0]]
        expected = counted(model, batches)
        read = model.state.io_bytes()
        train(model, case)
        accounts = model.state.ledger.balances()
    assert read == (0, 0) or read[0] < 1 << 20, "nothing of the model was read"
    assert expected == pytest.approx(model.compute_nbytes, rel=0.01)
    if DEVICE == "cpu":  # elsewhere it is no RAM
        assert accounts["compute"][1] == model.compute_nbytes


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_many_alike_take_what_a_dry_run_of_all_says(tied):
    partition = partitioned(Case(tied=tied, overrides=SIZES))
    layout = ModelLayout.build(model_parts(partition), len(partition.blocks), "f32")
    batch = blank_micro_batch(2, 24, packed=True)
    one_by_one = [replace(batch) for _ in range(9)]
    whole = dry_run(partition, layout, one_by_one, slice_tokens=16)
    assert dry_run(partition, layout, [batch] * 9, slice_tokens=16) == pytest.approx(whole, rel=1e-4)


# Blocks and head so small that hidden states are nearly all that a step needs.
FLAT = SIZES | {"intermediate_size": 16, "vocab_size": 263, "head_dim": 16}


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def test_many_alike_are_counted_by_three_of_them(tmp_path, dtype):
    case = Case(dtype=dtype, overrides=FLAT | {"num_attention_heads": 1, "num_key_value_heads": 1})
    batches = [blank_micro_batch(4, 32, packed=False)] * 5
    make_store(tmp_path / "store", case)
    with opened(tmp_path / "store", case) as model:
        model.slice_tokens = 16
        expected = counted(model, batches)
        whole = counted(model, [replace(batch) for batch in batches])
        model.train_step(batches, AdamWStep(1, 1e-3), lambda _loss: b"")
        measured = model.compute_nbytes
    assert expected == pytest.approx(whole, rel=1e-4)
    assert expected == pytest.approx(measured, rel=0.01)


class _Positions(Case):
    """A model with a table of positions: the backward pass of its embedding is where a step needs most."""

    @property
    def config(self):
        return GPT2Config(
            vocab_size=257, n_embd=64, n_layer=2, n_head=4, n_positions=3072, bos_token_id=1, eos_token_id=2
        )


def test_the_gradient_of_a_large_embedding_is_counted(tmp_path, monkeypatch):
    case = _Positions(tied=True, counts=(9,))
    monkeypatch.setattr(paged, "facts_of", lambda *_: probe(case.config))
    make_store(tmp_path / "store", case)
    with opened(tmp_path / "store", case) as model:
        expected = counted(model, [to_micro_batch(batch) for batch in case.steps[0]])
        train(model, case)
        measured = model.compute_nbytes
    assert measured > 4 * 64 * 3072
    # Rather too much: of the backward pass no more is known than that it makes the embedding once more.
    assert measured <= expected <= 1.05 * measured


@pytest.mark.parametrize("family", ["gemma4_text", "gemma3n_text"])
def test_what_side_inputs_take_is_counted_for_every_block(tmp_path, family):
    """Gradients of per-layer inputs gather until the embedding's backward pass, which keeps all that it computed."""
    layers = 24
    sizes = {
        "num_hidden_layers": layers,
        "layer_types": ["full_attention"] * layers,
        "num_kv_shared_layers": 0,
    }
    sizes |= {"hidden_size_per_layer_input": 64, "intermediate_size": 16}
    if family == "gemma3n_text":
        sizes |= {"activation_sparsity_pattern": [0.0] * layers}
    case = Case(family, tied=True, counts=(2,), overrides=sizes, rows=8)
    make_store(tmp_path / "store", case)
    with opened(tmp_path / "store", case) as model:
        expected = counted(model, [to_micro_batch(batch) for batch in case.steps[0]])
        train(model, case)
        measured = model.compute_nbytes
    # Rather too much: not all that the embedding makes is kept.
    assert measured <= expected <= 1.25 * measured


class _Experts(Case):
    """A mixture of experts, whose products have no shape function for fp32."""

    @property
    def config(self):
        return MixtralConfig(
            vocab_size=257, hidden_size=64, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, num_local_experts=4, bos_token_id=1, eos_token_id=2,
        )  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def test_a_mixture_of_experts_is_counted_in_every_precision(tmp_path, monkeypatch, dtype, capfd):
    case = _Experts(dtype=dtype, counts=(2,))
    monkeypatch.setattr(paged, "facts_of", lambda *_: probe(case.config))
    make_store(tmp_path / "store", case)
    with opened(tmp_path / "store", case) as model:
        expected = counted(model, [to_micro_batch(batch) for batch in case.steps[0]])
        train(model, case)
        measured = model.compute_nbytes
    assert expected == pytest.approx(measured, rel=0.02)
    assert capfd.readouterr().err == "", "torch reports what was asked otherwise"


def test_a_model_that_cannot_run_on_shapes_is_not_counted_and_an_error_of_ours_passes(monkeypatch):
    partition = partitioned(Case(overrides=SIZES))
    layout = ModelLayout.build(model_parts(partition), len(partition.blocks), "f32")
    batch = blank_micro_batch(2, 24, packed=True)
    for error, passes in (
        (ValueError("data"), False),
        (RuntimeError("shape"), False),
        (ConfigError("a"), True),
    ):
        monkeypatch.setattr(partition, "run_block", Raises(error))
        with pytest.raises(ConfigError) if passes else nullcontext():
            assert dry_run(partition, layout, [batch], slice_tokens=16) is None


class Raises:
    def __init__(self, error):
        self.error = error

    def __call__(self, *_):
        raise self.error


def packed(batch):
    """Two documents in each row, as packing makes them."""
    micro_batch = to_micro_batch(batch)
    rows, tokens = micro_batch.input_ids.shape
    position_ids = torch.cat([torch.arange(tokens // 2), torch.arange(tokens - tokens // 2)])
    return replace(micro_batch, position_ids=position_ids.expand(rows, -1))


def padded(batch):
    micro_batch = to_micro_batch(batch)
    attention_mask = torch.ones_like(micro_batch.input_ids)
    attention_mask[0, -3:] = 0
    return replace(micro_batch, attention_mask=attention_mask)


@pytest.mark.parametrize("made", [packed, padded])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def test_rows_of_several_documents_and_padded_ones_are_counted(tmp_path, dtype, made):
    case = Case(dtype=dtype, counts=(2,), overrides=SIZES)
    make_store(tmp_path / "store", case)
    with opened(tmp_path / "store", case) as model:
        batches = [made(batch) for batch in case.steps[0]]
        expected = counted(model, batches)
        model.train_step(batches, AdamWStep(1, 1e-3), lambda _loss: b"")
        measured = model.compute_nbytes
    assert expected == pytest.approx(measured, rel=0.01)


def test_dropout_of_the_step_after_is_what_it_would_have_been(tmp_path):
    case = Case(counts=(1,))
    make_store(tmp_path / "store", case)
    with opened(tmp_path / "store", case) as model:
        torch.manual_seed(5)
        before = torch.get_rng_state()
        counted(model, [to_micro_batch(batch) for batch in case.steps[0]])
        assert torch.equal(torch.get_rng_state(), before)


def test_slices_of_logits_are_counted_too(tmp_path):
    case = Case(counts=(1,), overrides=SIZES)
    make_store(tmp_path / "store", case)
    with opened(tmp_path / "store", case) as model:
        model.slice_tokens = 8
        expected = counted(model, [to_micro_batch(batch) for batch in case.steps[0]])
        train(model, case)
        measured = model.compute_nbytes
    assert expected == pytest.approx(measured, rel=0.01)


def test_slices_do_not_add_their_gradients_of_the_head_to_one_another(tmp_path):
    case = Case(counts=(1,), overrides=SIZES | {"vocab_size": 8192})
    make_store(tmp_path / "store", case)
    with opened(tmp_path / "store", case) as model:
        model.slice_tokens = 4
        expected = counted(model, [to_micro_batch(batch) for batch in case.steps[0]])
    head = 8192 * case.config.hidden_size * 4
    assert head < expected < 1.5 * head


def test_two_blocks_stand_for_all_that_are_alike():
    partition = partitioned(Case(overrides=SIZES))
    layout = ModelLayout.build(model_parts(partition), len(partition.blocks), "f32")
    short = shortened(layout)
    assert (short.blocks, len(short.records)) == (2, len(layout.records) - 3)
    assert short.records[-1] == layout.records[-1]
    parts = [
        (name, tensors if name != "block 3" else tensors[:-1]) for name, tensors in model_parts(partition)
    ]
    unlike = ModelLayout.build(parts, len(partition.blocks), "f32")
    assert shortened(unlike) == unlike


def test_as_many_blocks_stand_for_all_as_show_every_kind_behind_every_other():
    kinds = {"d": [("weight", (256, 128))], "m": [("experts", (8, 64, 128))]}

    def layout_of(text):
        blocks = [
            (f"block {number}", [(f"{number}.{name}", shape) for name, shape in kinds[kind]])
            for number, kind in enumerate(text)
        ]
        parts = [("prologue", [("table", (64, 128))]), *blocks, ("epilogue", [("norm", (128,))])]
        return ModelLayout.build(parts, len(text), "f32")

    for text, enough in [("dddmmmmm", 5), ("dmdmdm", 3), ("mmmmd", 5), ("mmm", 2), ("d", 1)]:
        layout = layout_of(text)
        short = with_all_neighbours(layout)
        assert short.blocks == enough, text
        assert short.records[1:-1] == layout.records[1 : 1 + enough]
        assert short.records[-1] == layout.records[-1]
