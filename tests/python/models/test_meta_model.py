"""The stock model without memory for its parameters."""

import copy

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM, DeepseekV3PreTrainedModel

from megatrain_io.models.meta_model import build_meta_model
from megatrain_io.models.shrink import shrink_config

SMALL = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
}
WINDOW = {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}


@pytest.mark.parametrize(
    ("model_type", "values"),
    [
        ("llama", SMALL | {"rope_parameters": {"rope_type": "linear", "rope_theta": 5e5, "factor": 8.0}}),
        ("gemma3_text", SMALL | WINDOW | {"head_dim": 8}),
        ("gptj", {"vocab_size": 97, "n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4}),
        ("deepseek_v3", None),
    ],
    ids=["llama", "gemma3", "gptj", "deepseek_v3"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
def test_a_meta_model_has_the_buffers_of_the_stock_model_and_no_parameters(
    tmp_path, model_type, values, dtype
):
    config = (
        shrink_config(AutoConfig.for_model(model_type))
        if values is None
        else AutoConfig.for_model(model_type, **values)
    )
    AutoModelForCausalLM.from_config(copy.deepcopy(config)).save_pretrained(tmp_path)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    before = config.to_dict()
    model = build_meta_model(config, dtype)
    assert config.to_dict() == before
    assert all(p.is_meta for p in model.parameters())
    assert [(n, p.dtype) for n, p in model.named_parameters()] == [
        (n, p.dtype) for n, p in stock.named_parameters()
    ]
    expected, found = dict(stock.named_buffers()), dict(model.named_buffers())
    assert len(expected) > 0
    assert found.keys() == expected.keys()
    for name, buffer in expected.items():
        assert found[name].dtype == buffer.dtype
        assert torch.equal(found[name], buffer)
    assert not model.config.use_cache


class LargestAllocation(TorchDispatchMode):
    """Notes the bytes of the largest tensor that comes to be in memory."""

    nbytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        if isinstance(output, torch.Tensor) and output.device.type == "cpu":
            self.nbytes = max(self.nbytes, output.untyped_storage().nbytes())
        return output


@pytest.mark.parametrize(
    ("model_type", "values", "parameters"),
    [
        (
            "llama",
            {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "vocab_size": 128256},
            78e9,
        ),
        ("mixtral", {"hidden_size": 6144, "intermediate_size": 16384, "num_hidden_layers": 56}, 140e9),
        ("llama4_text", {}, 107e9),
    ],
)
def test_a_large_meta_model_takes_no_memory(model_type, values, parameters):
    config = AutoConfig.for_model(model_type, **values)
    with LargestAllocation() as largest:
        model = build_meta_model(config, torch.bfloat16)
    assert sum(p.numel() for p in model.parameters()) > parameters
    assert 0 < largest.nbytes < 1 << 26


@pytest.mark.parametrize("constructs_fp32", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
def test_parameters_and_buffers_have_the_dtypes_of_a_loaded_model(
    tmp_path, monkeypatch, dtype, constructs_fp32
):
    config = shrink_config(AutoConfig.for_model("deepseek_v3"))
    if not constructs_fp32:  # what loading keeps in fp32 need not be what the constructor makes so
        monkeypatch.setattr(
            DeepseekV3PreTrainedModel, "_keep_in_fp32_modules_strict", ["lm_head", "layers.*.input_layernorm"]
        )
    AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=torch.float32).save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    model = build_meta_model(config, dtype)
    expected = {name: tensor.dtype for name, tensor in loaded.state_dict().items()}
    assert {name: tensor.dtype for name, tensor in model.state_dict().items()} == expected
    assert all(parameter.is_meta for parameter in model.parameters())
    kept = {name for name, each in expected.items() if each != dtype}
    assert any("input_layernorm" in name for name in kept) == (
        dtype == torch.bfloat16 and not constructs_fp32
    )
