"""Whom the probe accepts, whom it refuses and in what words, and the small copies that it makes."""

from logging import StreamHandler
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.activations import XIELUActivation
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.utils import logging

from megatrain_io.errors import UnsupportedModelError
from megatrain_io.models import probe as probing
from megatrain_io.models.partition import PartitionedModel
from megatrain_io.models.probe import probe
from megatrain_io.models.proof import RefusedError, random_tokens
from megatrain_io.models.shrink import shrink_config
from small_models import small_config

PACKS = {
    "llama": True,
    "qwen2": True,
    "qwen3": True,
    "mistral": True,
    "gemma2": True,
    "gemma3_text": True,
    "gpt2": True,
    "gpt_neox": True,
    "olmo2": True,
    "olmo3": True,
    "phi3": True,
    "mixtral": True,
    "mamba2": False,
    "bamba": False,
    "qwen3_moe": True,
    "deepseek_v3": True,  # latent attention
    "gemma4_unified_text": True,  # layers with head sizes of their own
    "gptj": True,  # blocks that return tuples, rotary dimensions by number
    "falcon": None,  # older transformers mix them
    "opt": False,
    "qwen3_next": False,
}


@pytest.mark.parametrize("model_type", PACKS)
def test_architectures_are_accepted_at_the_size_they_were_published(model_type):
    """`packs`: whether documents in one row are kept apart (the stock models themselves mix some)."""
    spec = probe(AutoConfig.for_model(model_type))
    assert spec.model_type == model_type
    expected = PACKS[model_type]
    assert spec.packs is (keeps_apart(model_type) if expected is None else expected)


@torch.no_grad()
def keeps_apart(model_type):
    """Whether the stock model's scores of a row's second document do not change with the first one."""
    stock = AutoModelForCausalLM.from_config(shrink_config(AutoConfig.for_model(model_type))).eval()
    rows = torch.randint(1, 50, (2, 9), generator=torch.Generator().manual_seed(1))
    rows[1, 4:] = rows[0, 4:]
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]])
    one, other = (stock(row[None], position_ids=positions, use_cache=False).logits[0, 4:] for row in rows)
    return torch.allclose(one, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("model_type", "values", "reason"),
    [
        (
            "openai-gpt",
            {},
            r"is marked .* model_options.block_list=NAME .* it has transformer\.h \(\d of Block\)",
        ),
        ("ctrl", {}, "no list of decoder blocks is marked"),
        ("bert", {}, "looks at later tokens"),
        ("t5", {}, "no causal language model of this type"),
        ("git", {}, r"its own loss of them fails with ValueError: .*; choose another"),
        ("hrm_text", {}, r"calls the blocks of .* in the order"),
        ("mixtral", {"output_router_logits": True}, "set output_router_logits to false in config.json"),
        ("llama", {"quantization_config": {"quant_method": "gptq"}}, "weights are quantised"),
    ],
)
def test_what_cannot_be_equal_is_refused_by_name(model_type, values, reason):
    with pytest.raises(UnsupportedModelError, match=f"^{model_type}: .*{reason}"):
        probe(AutoConfig.for_model(model_type, **values))


def test_parameters_that_scores_depend_on_without_a_gradient_are_refused():
    """These cut a text into patches; what other inputs take, and a text does not pass, stays as it is."""
    with pytest.raises(
        UnsupportedModelError, match=r"^blt: its scores depend on parameters .*\(model\.patcher"
    ):
        probe(small_config("blt"))


def test_several_hidden_states_of_a_token_are_told_from_tokens():
    """The head gets tokens in slices: here they are not the last dimension but one."""
    assert probe(AutoConfig.for_model("deepseek_v4")).axes == "BTAH"


def test_blocks_that_a_text_does_not_pass_are_noted():
    spec = probe(AutoConfig.for_model("mllama"))
    assert spec.skips
    config = shrink_config(AutoConfig.for_model("mllama"))
    partition = PartitionedModel(config, torch.float32, spec)
    assert partition.skipped == {*config.get_text_config().cross_attention_layers}
    (skipped,) = partition.skipped
    assert {name for name, _ in partition.block_parameters(skipped)} <= partition.unreached


def test_a_model_without_a_bound_of_positions_whose_hidden_state_has_time_first():
    config = small_config("xlnet")
    config.attn_type = "uni"
    spec = probe(config, block_list="transformer.layer")
    assert (spec.axes, spec.positions) == ("TBH", None)


class Scores:
    """A model with given scores, and a loss of its own."""

    def __init__(self, own):
        self.own, self.loss_function = own, ForCausalLMLoss

    def __call__(self, input_ids, labels):
        generator = torch.Generator().manual_seed(1)
        logits = torch.randn((*input_ids.shape, 9), generator=generator)
        return SimpleNamespace(logits=logits, loss=self.own(self, logits, labels))


def cross_entropy(logits, labels):
    return torch.nn.functional.cross_entropy(logits.reshape(-1, 9), labels.reshape(-1))


@pytest.mark.parametrize(
    ("own", "expected"),
    [
        (lambda model, logits, labels: model.loss_function(logits, labels, 9), False),
        (lambda _model, logits, labels: cross_entropy(logits, labels), True),
        (lambda _model, logits, labels: cross_entropy(logits[:, :-1], labels[:, 1:]), True),
        (lambda *_: None, RefusedError),
        (lambda _model, logits, labels: cross_entropy(logits, labels) + logits.square().mean(), RefusedError),
    ],
)
def test_a_loss_without_transformers_function_must_be_that_of_the_scores(own, expected):
    model, batch = Scores(own), random_tokens(9, 2, 7)
    if expected is RefusedError:
        with pytest.raises(RefusedError, match="not the cross entropy of its scores of the next token"):
            probing._is_loss_of_scores(model, batch)
    else:
        assert probing._is_loss_of_scores(model, batch) is expected
    assert model.loss_function is ForCausalLMLoss


def test_a_loss_that_differs_is_refused_though_its_gradients_agree(monkeypatch):
    loss_of = PartitionedModel.loss
    monkeypatch.setattr(PartitionedModel, "loss", lambda *args: loss_of(*args) + 1)
    with pytest.raises(UnsupportedModelError, match=r"^llama: block by block its loss is .* as in memory"):
        probe(AutoConfig.for_model("llama"))


def test_blocks_can_be_named_by_hand():
    config = AutoConfig.for_model("openai-gpt")
    assert probe(config, block_list="transformer.h").output_entries == 1
    with pytest.raises(
        UnsupportedModelError,
        match=r"openai-gpt: it has no module list transformer\.layers .* it has transformer\.h",
    ):
        probe(config, block_list="transformer.layers")


def test_the_small_copy_can_be_made_by_hand():
    config = AutoConfig.for_model("mamba2")
    small = AutoConfig.for_model(
        "mamba2",
        vocab_size=97,
        hidden_size=32,
        num_heads=8,
        head_dim=8,
        state_size=8,
        n_groups=1,
        num_hidden_layers=2,
        chunk_size=8,
    )
    before = small.to_dict()
    assert not probe(config, small_config=small).packs
    assert small.to_dict() == before
    with pytest.raises(
        UnsupportedModelError,
        match=r"parameters, and may have 33,554,432; .* by model_options\.miniature=DIR",
    ):
        probe(config, small_config=config)


def test_a_small_copy_that_fails_says_by_which_key_another_is_given(monkeypatch):
    def fails(_config, **_):
        raise KeyError("a layer")

    monkeypatch.setattr(probing, "shrink_config", fails)
    with pytest.raises(
        UnsupportedModelError,
        match=r"^llama: the small copy .*KeyError: .*says nothing of the model.*model_options\.miniature=DIR",
    ):
        probe(AutoConfig.for_model("llama"))


@pytest.mark.parametrize(
    ("model_type", "values"),
    [
        ("bamba", {"attn_layer_indices": [5]}),
        ("jamba", {}),
        ("mamba2", {}),
        ("falcon_h1", {}),
        ("nemotron_h", {}),
    ],
)
def test_small_copies_of_state_spaces_are_small_and_keep_what_they_are_made_of(model_type, values):
    config = AutoConfig.for_model(model_type, **values)
    small = shrink_config(config)
    stock = AutoModelForCausalLM.from_config(small, trust_remote_code=False)
    assert sum(parameter.numel() for parameter in stock.parameters()) < 2_000_000
    if model_type == "bamba":
        assert len(small.attn_layer_indices) == 1
        assert small.attn_layer_indices[0] < small.num_hidden_layers


@pytest.mark.parametrize(
    ("model_type", "of_each_kind"),
    [
        ("dory", 1),
        ("longcat_flash", 1),
        ("plbart", 1),
        ("whisper", 1),
        ("xlnet", 1),
        ("dots3_note", 1),
        ("zamba", 2),
    ],
)
def test_configurations_whose_numbers_depend_on_each_other_are_shrunk(model_type, of_each_kind):
    """Their classes refused the small numbers, or the copy was as large as the model."""
    small = shrink_config(AutoConfig.for_model(model_type), of_each_kind=of_each_kind)
    with torch.device("meta"):
        stock = AutoModelForCausalLM.from_config(small, trust_remote_code=False)
    assert sum(parameter.numel() for parameter in stock.parameters()) < 1 << 25


def test_a_model_that_transformers_does_not_build_is_not_blamed_on_its_small_copy():
    config = AutoConfig.for_model("llama", hidden_act="none of these")
    with pytest.raises(UnsupportedModelError, match=r"^llama: transformers does not build a model from this"):
        probe(config)


def test_the_small_copy_keeps_a_layer_of_each_kind_and_leaves_the_configuration_alone():
    config = AutoConfig.for_model("gemma3_text")
    before = config.to_dict()
    small = shrink_config(config)
    assert config.to_dict() == before
    assert set(small.layer_types) == set(config.layer_types) == {"sliding_attention", "full_attention"}
    assert small.layer_types[-1] == config.layer_types[-1]
    assert 3 <= small.num_hidden_layers == len(small.layer_types) <= 4
    assert small.num_key_value_heads < small.num_attention_heads
    assert max(small.hidden_size, small.intermediate_size, small.vocab_size) <= 256


@pytest.mark.parametrize(
    ("model_type", "expected"),
    [
        ("gpt2", ("n_positions", 0, True)),
        (
            "opt",
            ("max_position_embeddings", 0, True),
        ),  # two rows of its table come first, and are not counted
        ("roberta", ("max_position_embeddings", 1, True)),  # that of padding does
        ("gptj", ("n_positions", 0, True)),
        ("llama", ("max_position_embeddings", 0, False)),
        ("xglm", ("max_position_embeddings", 0, False)),  # its table grows
        ("bloom", None),
        ("mamba", None),
    ],
)
def test_positions_are_found_where_a_model_ends(model_type, expected):
    values = {"is_decoder": True} if model_type == "roberta" else {}
    positions = probe(AutoConfig.for_model(model_type, **values)).positions
    found = None if positions is None else (positions.name, positions.lost, positions.is_bound)
    assert found == expected


def test_numbers_of_layers_are_not_taken_for_kinds_of_layers():
    """All layers of Llama 4 are numbered in moe_layers, and each was kept as one of its own kind."""
    config = AutoConfig.for_model("llama4_text")
    small = shrink_config(config)
    assert len(config.moe_layers) == config.num_hidden_layers == 48
    assert small.num_hidden_layers <= 5
    assert small.moe_layers == list(range(small.num_hidden_layers))
    assert set(small.layer_types) == set(config.layer_types)


def test_the_probe_leaves_no_trace(recwarn):
    config = AutoConfig.for_model("gpt2")  # transformers warns of its loss type, once a process
    logging.warning_once.cache_clear()
    messages, verbosity = Messages(), logging.get_verbosity()
    logging.add_handler(messages)
    logging.set_verbosity_warning()
    before, state = config.to_dict(), torch.get_rng_state()
    try:
        probe(config)
        assert logging.get_verbosity() == logging.logging.WARNING
    finally:
        logging.remove_handler(messages)
        logging.set_verbosity(verbosity)
    assert messages.found == []
    assert len(recwarn) == 0
    assert config.to_dict() == before
    assert torch.equal(torch.get_rng_state(), state)


class Messages(StreamHandler):
    """What transformers has to say."""

    def __init__(self):
        super().__init__()
        self.found = []

    def emit(self, record):
        self.found.append(record.getMessage())


def test_a_model_that_changes_a_saved_buffer_is_refused_by_its_name(monkeypatch):
    forward = XIELUActivation.forward

    def changing(self, hidden):
        self.eps = self.eps * 1.1
        return forward(self, hidden)

    monkeypatch.setattr(XIELUActivation, "forward", changing)
    with pytest.raises(
        UnsupportedModelError, match=r"apertus: its forward pass changes buffer \S+act_fn.eps, and"
    ):
        probe(AutoConfig.for_model("apertus", num_hidden_layers=2, hidden_size=64, intermediate_size=96))
