"""Rows of tokens: packing, micro-batches, frames, and the order in which rows are trained."""

import shutil
import tracemalloc

import numpy as np
import pytest
import torch
import zstandard
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from corpus import TOKENIZER, documents, ready, shown
from megatrain_io.data import packed_dataset, packing
from megatrain_io.data.prepare import EpochOrder
from megatrain_io.errors import DataError

# ------------------------------------------------------------------------------- packing, micro-batches


@given(st.lists(st.integers(1, 50), max_size=60))
def test_packing_keeps_every_document_once_and_fills_no_row_beyond_its_room(lengths):
    packed = packing.pack(lengths, 50)
    assert sorted(document for row in packed for document in row) == list(range(len(lengths)))
    used = [sum(lengths[document] for document in row) for row in packed]
    assert all(tokens <= 50 for tokens in used)
    assert sum(tokens <= 25 for tokens in used) <= 1, "two half empty rows would be one"
    assert packed == sorted(sorted(row) for row in packed)


CHATS = [{"prompt": "p" * (i % 7 + 1), "completion": "c" * (i % 11 + 1)} for i in range(40)]


def test_packed_documents_are_those_of_rows_of_their_own(tmp_path):
    apart = ready(tmp_path / "apart", CHATS, max_length=32)
    packed = ready(tmp_path / "packed", CHATS, max_length=32, packs=True)
    assert len(apart.train) == 40
    assert len(packed.train) < 20
    assert sorted(documents(packed.train)) == sorted(documents(apart.train))
    assert packed.train.tokens == apart.train.tokens
    assert packed.train.trained_tokens == apart.train.trained_tokens
    assert packed.train.longest_row <= 32
    assert packed.fingerprint != apart.fingerprint

    batch = packed.train.micro_batch(range(4))
    assert batch.attention_mask is None
    assert batch.input_ids.dtype == batch.shift_labels.dtype == batch.position_ids.dtype == torch.int64
    for ids, positions in zip(batch.input_ids.tolist(), batch.position_ids.tolist(), strict=True):
        starts = [t for t, position in enumerate(positions) if position == 0]
        assert starts[0] == 0
        assert all(
            positions[t] == positions[t - 1] + 1 for t in range(1, 32) if t < len(ids) and t not in starts
        )


def test_packing_is_off_where_the_architecture_or_the_option_says_so(tmp_path):
    made = ready(tmp_path, CHATS, packs=False)
    assert not made.train.packed
    assert (
        "packing is off: this architecture does not keep the documents of a row apart" in made.summary.notes
    )
    made = ready(tmp_path, CHATS, packs=True, packing=False)
    assert not made.train.packed
    assert not any("packing" in note for note in made.summary.notes)


def test_rows_of_one_document_are_padded_on_the_right(tmp_path):
    made = ready(tmp_path, [{"text": "ab"}, {"text": "abcd"}, {"text": "xy"}]).train
    eos = TOKENIZER.eos_token_id
    ids = [TOKENIZER.encode("ab") + [eos] * 3, [*TOKENIZER.encode("abcd"), eos]]
    batch = made.micro_batch([0, 1])
    assert batch.input_ids.tolist() == ids
    assert batch.shift_labels.tolist() == [[ids[0][1], eos, -100, -100, -100], [*ids[1][1:], -100]]
    assert batch.attention_mask.tolist() == [[1, 1, 1, 0, 0], [1] * 5]
    assert batch.position_ids is None
    assert made.micro_batch([1]).attention_mask is None
    assert made.micro_batch([0, 2]).attention_mask is None, "nothing is padded"
    with pytest.raises(IndexError, match="row 3 of 3"):
        made.micro_batch([3])


def test_a_model_loses_the_same_on_packed_documents_as_on_each_by_itself(tmp_path):
    apart = ready(tmp_path / "apart", CHATS[:12], max_length=32).train
    packed = ready(tmp_path / "packed", CHATS[:12], max_length=32, packs=True).train
    torch.manual_seed(0)
    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=300, use_cache=False, **size)).eval()

    def losses(made, indices):
        batch = made.micro_batch(indices)
        logits = model(
            batch.input_ids, attention_mask=batch.attention_mask, position_ids=batch.position_ids
        ).logits
        loss = torch.nn.functional.cross_entropy(logits.mT, batch.shift_labels, reduction="none")
        return sorted(loss[batch.shift_labels != -100].tolist())

    with torch.no_grad():
        expected = sorted(loss for i in range(12) for loss in losses(apart, [i]))
        assert losses(apart, range(12)) == pytest.approx(expected, abs=1e-5)
        assert losses(packed, range(len(packed))) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("packs", [True, False])
def test_frames_are_cut_between_rows_and_read_in_any_order(tmp_path, monkeypatch, packs):
    whole = ready(tmp_path, CHATS, max_length=32, packs=packs).train
    expected = [shown(whole.micro_batch([i])) for i in range(len(whole))]
    monkeypatch.setattr(packing, "_FRAME_BYTES", 100)
    monkeypatch.setattr(packed_dataset, "_FRAMES_KEPT", 2)
    shutil.rmtree(tmp_path / "cache")
    small = ready(tmp_path, CHATS, max_length=32, packs=packs).train
    assert len(small._shard.frames) > 3
    for i in [*range(len(small)), *reversed(range(len(small)))]:
        assert shown(small.micro_batch([i])) == expected[i]
        assert len(small._frames) <= 2


def test_a_frame_that_would_grow_without_bound_is_not_unpacked(tmp_path):
    """What a frame says of its own size was asked of memory first."""
    texts = [{"text": np.random.default_rng(i).bytes(3000).hex()} for i in range(9)]
    made = ready(tmp_path, texts, max_length=9000)
    path = tmp_path / "cache" / "train.tokens"
    whole = path.read_bytes()
    bomb = zstandard.ZstdCompressor().compress(bytes(64 << 20))
    assert len(bomb) < len(whole) // 2
    path.write_bytes(bomb + whole[len(bomb) :])
    tracemalloc.start()
    try:
        with pytest.raises(
            DataError, match=r"train\.tokens is damaged: a frame of it would grow beyond what was written"
        ):
            made.train.micro_batch([0])
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()
    again = ready(tmp_path, texts, max_length=9000)
    assert not again.reused
    assert again.train.sha256 == made.train.sha256


def test_documents_are_packed_with_those_near_them(tmp_path, monkeypatch):
    monkeypatch.setattr(packing, "_WINDOW_TOKENS", 64)
    monkeypatch.setattr(packing, "_WINDOW_ROWS", 2)
    made = ready(tmp_path, CHATS, max_length=32, packs=True).train
    assert sorted(documents(made)) == sorted(documents(ready(tmp_path / "apart", CHATS).train))


@pytest.mark.parametrize(("vocabulary", "token_type"), [(1 << 16, "<u2"), ((1 << 16) + 1, "<u4")])
def test_tokens_take_two_bytes_where_the_vocabulary_allows(tmp_path, vocabulary, token_type):
    with (tmp_path / "tokens").open("wb") as file:
        writer = packing.RowWriter(file, vocabulary=vocabulary, max_length=8, packed=True)
        writer.add(np.array([1, vocabulary - 1]), np.array([True, True]))
        shard = writer.finish()
    assert shard.token_type == token_type
    made = packed_dataset.PackedDataset(tmp_path / "tokens", shard, 0)
    assert made.micro_batch([0]).input_ids.tolist() == [[1, vocabulary - 1]]
    assert made.largest_token == vocabulary - 1


# ----------------------------------------------------------------------------------------------- order


def test_each_epoch_is_another_order_of_all_rows_and_never_changes():
    order = EpochOrder(10, seed=42)
    epochs = [order.epoch(epoch).tolist() for epoch in range(4)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert EpochOrder(10, seed=43).epoch(0).tolist() != epochs[0]
    assert epochs[0] == [9, 4, 0, 3, 5, 1, 6, 2, 7, 8], "runs that were begun before go on in this order"


def test_a_step_takes_the_rows_that_its_number_says():
    order = EpochOrder(10, seed=1)
    through = [row for epoch in range(6) for row in order.epoch(epoch).tolist()]
    taken = [order.indices_for_step(step, 4) for step in range(1, 16)]
    assert [row for step in taken for row in step] == through[:60]
    assert EpochOrder(10, seed=1).indices_for_step(9, 4) == taken[8], "resumed in a new process"
    assert list(EpochOrder(10, seed=1).indices_for_step(2, 25)) == through[25:50], "more rows than there are"
    assert [order.steps(*how) for how in [(1, 4), (2, 4), (0.7, 1), (0.01, 4)]] == [3, 5, 7, 1]
    with pytest.raises(ValueError, match="step 0"):
        order.indices_for_step(0, 4)
