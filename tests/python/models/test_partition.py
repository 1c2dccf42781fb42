"""The partitioned model against the stock one, bit for bit."""

import gc
import weakref
from functools import cache
from itertools import pairwise

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from megatrain_io.data.batch import MicroBatch
from megatrain_io.errors import UnsupportedModelError
from megatrain_io.models.partition import PartitionedModel
from megatrain_io.models.probe import probe
from small_models import FAMILIES, GROUPED, SMALL

EVERY_FAMILY = pytest.mark.parametrize("family", FAMILIES)


def config_of(family):
    model_type, values = FAMILIES[family]
    return AutoConfig.for_model(model_type, **values)


@cache
def facts_of(family):
    return probe(config_of(family))


def stock_of(family, dtype=torch.float32):
    """A stock model in which nothing is 0 or 1 by initialisation."""
    torch.manual_seed(7)
    model = AutoModelForCausalLM.from_config(config_of(family), dtype=dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


def partition_of(family, dtype=torch.float32):
    return PartitionedModel(config_of(family), dtype, facts_of(family))


def leaves_of(model):
    return {name: parameter.detach().requires_grad_() for name, parameter in model.named_parameters()}


def tokens(batch, length, seed):
    """Input, and labels not yet shifted, with some positions not trained."""
    generator = torch.Generator().manual_seed(seed)
    input_ids = torch.randint(1, 97, (batch, length), generator=generator)
    labels = input_ids.clone()
    labels[:, : length // 3] = -100
    return input_ids, labels


def shifted(labels):
    return torch.nn.functional.pad(labels, (0, 1), value=-100)[:, 1:].contiguous()


def grads(output, leaves, names, *hidden, grad_output=None):
    wanted = [*hidden, *(leaves[name] for name in names)]
    found = torch.autograd.grad(output, wanted, grad_output)
    return found[: len(hidden)], dict(zip(names, found[len(hidden) :], strict=True))


def layer_major(partition, leaves, micro_batches, items):
    """Losses and gradients of each micro-batch; every block sees all micro-batches before the next block does.

    This is the order of a paged step, and all of its autograd.
    """
    numbered = range(len(micro_batches))
    totals = [{} for _ in numbered]
    losses = []

    def add(number, gradients):
        for name, gradient in gradients.items():
            before = totals[number].get(name)
            totals[number][name] = gradient if before is None else before + gradient

    with torch.no_grad():
        hiddens, calls = zip(*[partition.record(leaves, each) for each in micro_batches], strict=True)
        saved = [list(hiddens)]
        for block in range(len(partition.blocks)):
            saved.append(
                [partition.run_block(block, leaves, saved[-1][n], calls[n][block]) for n in numbered]
            )
    above = []
    for number in numbered:
        hidden = saved[-1][number].requires_grad_()
        loss = partition.loss(leaves, hidden, micro_batches[number].shift_labels, items)
        names = [*(name for name, _ in partition.head_parameters), *partition.tied_parameters]
        (of_hidden,), gradients = grads(loss, leaves, names, hidden)
        losses.append(loss.detach())
        above.append(of_hidden)
        add(number, gradients)
    for block in reversed(range(len(partition.blocks))):
        names = [name for name, _ in partition.block_parameters(block)]
        for number in numbered:
            hidden = saved[block][number].requires_grad_()
            output = partition.run_block(block, leaves, hidden, calls[number][block])
            (above[number],), gradients = grads(output, leaves, names, hidden, grad_output=above[number])
            add(number, gradients)
    names = [name for name, _ in partition.embedding_parameters]
    for number in numbered:
        hidden, _ = partition.record(leaves, micro_batches[number])
        add(number, grads(hidden, leaves, names, grad_output=above[number])[1])
    return losses, totals


def assert_equal_to_stock(family, dtype, batches, **inputs):
    """`batches` are (input_ids, labels), `inputs` what the stock model is given besides."""
    stock, partition = stock_of(family, dtype), partition_of(family, dtype)
    items = sum(int((shifted(labels) != -100).sum()) for _, labels in batches)
    micro_batches = [MicroBatch(input_ids, shifted(labels), **inputs) for input_ids, labels in batches]
    losses, totals = layer_major(partition, leaves_of(stock), micro_batches, items)
    for number, (input_ids, labels) in enumerate(batches):
        loss = stock(
            input_ids=input_ids, labels=labels, num_items_in_batch=items, use_cache=False, **inputs
        ).loss
        assert torch.equal(losses[number], loss)
        assert loss.isfinite()
        expected = dict(
            zip(leaves_of(stock), torch.autograd.grad(loss, list(stock.parameters())), strict=True)
        )
        assert totals[number].keys() == expected.keys()
        assert [n for n in expected if not torch.equal(totals[number][n], expected[n])] == []


# -------------------------------------------------------------------------------- equal to the stock model


@EVERY_FAMILY
@pytest.mark.parametrize(
    ("dtype", "lengths"),
    [(torch.float32, [13]), (torch.float32, [13, 6]), (torch.bfloat16, [13, 6])],
    ids=["f32, one micro-batch", "f32, two", "bf16, two"],
)
def test_losses_and_all_gradients_are_those_of_the_stock_model(family, dtype, lengths):
    batches = [tokens(2 - number, length, seed=number) for number, length in enumerate(lengths)]
    assert_equal_to_stock(family, dtype, batches)


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "falcon"])
def test_packed_documents_are_those_of_the_stock_model(family):
    assert_equal_to_stock(
        family,
        torch.float32,
        [tokens(1, 12, seed=3)],
        position_ids=torch.tensor([[0, 1, 2, 3, 4, 5, 6, 0, 1, 2, 3, 4]]),
    )


@pytest.mark.parametrize("family", ["llama tied", "gemma3", "gpt2", "falcon"])
def test_padded_rows_are_those_of_the_stock_model(family):
    input_ids, labels = tokens(2, 9, seed=4)
    attention_mask = torch.ones_like(input_ids)
    attention_mask[1, 6:] = 0
    labels[1, 6:] = -100
    assert_equal_to_stock(family, torch.float32, [(input_ids, labels)], attention_mask=attention_mask)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_attention_is_the_one_asked_for(attention):
    spec = probe(config_of("llama"), attn_implementation=attention)
    partition = PartitionedModel(config_of("llama"), torch.float32, spec)
    input_ids, _ = tokens(1, 5, seed=0)
    _, calls = partition.record(leaves_of(stock_of("llama")), MicroBatch(input_ids, input_ids))
    # sdpa is told to be causal, eager attention adds a mask.
    assert (calls[0].kwargs["attention_mask"] is None) == (attention == "sdpa")


@pytest.mark.parametrize("family", ["llama tied", "olmo3", "gpt2", "falcon", "qwen3_moe"])
def test_greedy_generation_gives_the_tokens_of_the_stock_model(family):
    stock, partition = stock_of(family).eval(), partition_of(family)
    partition.train(False)
    parameters = dict(stock.named_parameters())
    with torch.no_grad():
        for name in [name for block in range(3) for name, _ in partition.block_parameters(block)]:
            parameters[name].add_(torch.randn_like(parameters[name]))  # else a tied head repeats its input
    prompt, _ = tokens(2, 5, seed=5)
    cache, found, new = partition.new_cache(), prompt, prompt
    with torch.no_grad():
        for _ in range(12):
            hidden, calls = partition.record(parameters, MicroBatch(new, new), cache=cache)
            for block, call in enumerate(calls):
                hidden = partition.run_block(block, parameters, hidden, call)
            new = partition.logits(parameters, hidden[:, -1:])[:, -1].argmax(-1, keepdim=True)
            found = torch.cat([found, new], dim=1)
    stock.generation_config.eos_token_id = None
    expected = stock.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=12, do_sample=False
    )
    assert torch.equal(found, expected)
    assert len(set(found[0, 5:].tolist())) > 3, "a model that repeats one token proves nothing"


def test_loss_in_slices_of_tokens_adds_up_to_the_whole():
    stock, partition = stock_of("llama tied"), partition_of("llama tied")
    leaves = leaves_of(stock)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(2, 11, 32, generator=generator)
    shift_labels = shifted(tokens(2, 11, seed=1)[1])
    whole = partition.loss(leaves, hidden, shift_labels, 13)
    ends = [0, 4, 8, 11]
    parts = [partition.loss(leaves, hidden[:, a:b], shift_labels[:, a:b], 13) for a, b in pairwise(ends)]
    torch.testing.assert_close(sum(parts), whole)
    per_token = torch.nn.functional.cross_entropy(
        partition.logits(leaves, hidden).flatten(0, 1), shift_labels.flatten(), reduction="sum"
    )
    torch.testing.assert_close(whole, per_token / 13)


# --------------------------------------------------------------------------------------------- the parts


@EVERY_FAMILY
def test_every_parameter_belongs_to_exactly_one_part(family):
    partition = partition_of(family)
    parts = [*partition.embedding_parameters, *partition.head_parameters]
    parts += [entry for block in range(len(partition.blocks)) for entry in partition.block_parameters(block)]
    stock = {name: tuple(p.shape) for name, p in stock_of(family).named_parameters()}
    assert sorted(parts) == sorted(stock.items())
    order = list(stock)
    for part in (partition.embedding_parameters, partition.head_parameters, partition.block_parameters(2)):
        assert [name for name, _ in part] == sorted((name for name, _ in part), key=order.index)


def test_a_tied_head_is_the_embeddings_and_borrowed_by_the_head():
    partition = partition_of("llama tied")
    assert partition.tied == {"lm_head.weight": "model.embed_tokens.weight"}
    assert partition.embedding_parameters == (("model.embed_tokens.weight", (97, 32)),)
    assert partition.tied_parameters == ("model.embed_tokens.weight",)
    assert partition.head_parameters == (("model.norm.weight", (32,)),)


def test_an_untied_head_is_the_heads():
    partition = partition_of("llama")
    assert (partition.tied, partition.tied_parameters) == ({}, ())
    assert [name for name, _ in partition.head_parameters] == ["model.norm.weight", "lm_head.weight"]


def test_each_block_keeps_its_own_state():
    partition = partition_of("gemma3")
    assert [block.self_attn.layer_idx for block in partition.blocks] == [0, 1, 2]
    assert [block.self_attn.is_sliding for block in partition.blocks] == [True, False, True]


def test_a_missing_parameter_is_a_key_error():
    partition, leaves = partition_of("llama"), leaves_of(stock_of("llama"))
    input_ids, _ = tokens(1, 5, seed=0)
    micro_batch = MicroBatch(input_ids, input_ids)
    hidden, calls = partition.record(leaves, micro_batch)
    without = {
        name: leaf
        for name, leaf in leaves.items()
        if not name.endswith(("tokens.weight", "0.mlp.up_proj.weight", "head.weight"))
    }
    with pytest.raises(KeyError, match=r"model\.embed_tokens\.weight"):
        partition.record(without, micro_batch)
    with pytest.raises(KeyError, match=r"model\.layers\.0\.mlp\.up_proj\.weight"):
        partition.run_block(0, without, hidden, calls[0])
    with pytest.raises(KeyError, match=r"lm_head\.weight"):
        partition.loss(without, hidden, input_ids, 4)


def test_only_the_hidden_state_is_connected_to_the_embedding():
    partition, leaves = partition_of("gpt2"), leaves_of(stock_of("gpt2"))
    input_ids, _ = tokens(1, 5, seed=0)
    hidden, calls = partition.record(leaves, MicroBatch(input_ids, input_ids))
    assert hidden.requires_grad
    values = [value for call in calls for value in (*call.args, *call.kwargs.values())]
    assert not any(value.requires_grad for value in values if isinstance(value, torch.Tensor))


@pytest.mark.parametrize("family", ["llama tied", "gpt2", "falcon", "mixtral"])
def test_no_call_keeps_parameters_alive(family):
    """Buffers under the parameters are refilled once no tensor is left: a cycle would keep them for long."""
    partition, values = partition_of(family), dict(stock_of(family).named_parameters())
    input_ids, _ = tokens(1, 5, seed=0)

    def one_step():
        leaves = {name: value.detach().clone().requires_grad_() for name, value in values.items()}
        layer_major(partition, leaves, [MicroBatch(input_ids, input_ids)], 4)
        return [weakref.ref(leaf) for leaf in leaves.values()]

    gc.collect()
    gc.disable()
    try:
        assert [ref() for ref in one_step() if ref() is not None] == []
    finally:
        gc.enable()


def test_train_switches_the_dropout_of_embedding_and_blocks():
    config = config_of("gpt2")
    config.embd_pdrop = config.resid_pdrop = 0.5
    partition, parameters = (
        PartitionedModel(config, torch.float32, facts_of("gpt2")),
        leaves_of(stock_of("gpt2")),
    )
    input_ids, _ = tokens(1, 5, seed=0)

    def run(seed):
        torch.manual_seed(seed)
        first, calls = partition.record(parameters, MicroBatch(input_ids, input_ids))
        torch.manual_seed(seed)
        return first, partition.run_block(0, parameters, torch.ones_like(first), calls[0])

    for one, replayed, other in zip(run(1), run(1), run(2), strict=True):
        assert torch.equal(one, replayed)
        assert not torch.equal(one, other)
    partition.train(False)
    for one, other in zip(run(1), run(2), strict=True):
        assert torch.equal(one, other)


def test_record_refuses_a_forward_that_skips_blocks():
    config = AutoConfig.for_model(
        "opt", **SMALL, ffn_dim=48, word_embed_proj_dim=32, dropout=0.0, layerdrop=0.999
    )
    partition = PartitionedModel(config, torch.float32, probe(config))
    parameters = {
        name: torch.zeros(shape)
        for name, shape in (*partition.embedding_parameters, *partition.head_parameters)
    }
    input_ids, _ = tokens(1, 5, seed=0)
    with pytest.raises(UnsupportedModelError, match=r"opt: its forward pass calls"):
        partition.record(parameters, MicroBatch(input_ids, input_ids))


def test_record_refuses_a_forward_that_reorders_blocks():
    partition, leaves = partition_of("llama"), leaves_of(stock_of("llama"))
    layers = partition._model.model.layers
    layers[0], layers[1] = layers[1], layers[0]
    input_ids, _ = tokens(1, 5, seed=0)
    with pytest.raises(UnsupportedModelError, match=r"calls block 1 where block 0 is next"):
        partition.record(leaves, MicroBatch(input_ids, input_ids))


def test_record_refuses_work_between_the_blocks():
    partition, leaves = partition_of("llama"), leaves_of(stock_of("llama"))
    partition._model.model.layers[1].register_forward_hook(lambda _block, _args, output: output + 1)
    input_ids, _ = tokens(1, 5, seed=0)
    with pytest.raises(UnsupportedModelError, match=r"changes the hidden state before block 2"):
        partition.record(leaves, MicroBatch(input_ids, input_ids))


def test_moving_to_a_device_moves_buffers_and_makes_nothing_large():
    """A copy of a placeholder was as large as the embedding that it stands for."""
    partition = partition_of("llama tied")
    partition.to(torch.device("meta"))
    assert all(not any(each.stride()) and each.is_meta for each in partition._placeholders.values())
    buffers = [each for root in (partition._model, *partition.blocks) for _, each in root.named_buffers()]
    assert buffers
    assert all(each.is_meta for each in buffers)


def test_a_stub_has_the_attributes_of_its_block():
    """The forward pass of some transformers versions looks at `decoder_layer.attention_type` and the like."""
    partition = partition_of("gemma3")
    assert partition._model.model.layers[1].self_attn is partition.blocks[1].self_attn
    with pytest.raises(AttributeError, match="no attribute 'absent'"):
        partition._model.model.layers[1].absent  # noqa: B018


def test_facts_of_another_architecture_are_refused():
    with pytest.raises(UnsupportedModelError, match=r"has no module list model\.layers; probe"):
        PartitionedModel(config_of("gpt2"), torch.float32, facts_of("llama"))
    with pytest.raises(UnsupportedModelError, match=r"model\.norm\.bias was not there"):
        PartitionedModel(AutoConfig.for_model("phimoe", **GROUPED), torch.float32, facts_of("llama"))
