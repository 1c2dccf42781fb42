"""Models as they lie on the hub, by the command line: what is not trained is there afterwards, to the bit."""

import os

import pytest
from transformers import AutoModelForCausalLM

from model_sources import differing
from published import (
    DTYPES,
    in_memory,
    make_folder,
    tensors_of,
    text_config,
    trained,
)

OF_FAMILIES = pytest.mark.skipif(not os.environ.get("MEGATRAIN_FAMILIES"), reason="make families runs it")


def load(folder, precision):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=DTYPES[precision], trust_remote_code=False)


@pytest.mark.parametrize(
    ("model_type", "precision", "buffer"),
    [
        ("deepseek_v3", "fp32", "model.layers.1.mlp.gate.e_score_correction_bias"),
        pytest.param("minimax_m2", "bf16", "model.layers.2.mlp.e_score_correction_bias", marks=OF_FAMILIES),
        pytest.param("gemma4_text", "bf16", "model.layers.0.layer_scalar", marks=OF_FAMILIES),
    ],
)
def test_saved_buffers_are_computed_with_and_exported(tmp_path, monkeypatch, model_type, precision, buffer):
    source = make_folder(tmp_path, text_config(model_type), precision)
    steps, losses = trained(tmp_path, precision, monkeypatch)
    stock = load(source, precision)
    assert stock.get_buffer(buffer).abs().max() > 0.1
    expected = in_memory(stock, steps, precision)
    assert losses == expected.losses
    exported = load(tmp_path / "out", precision)
    assert differing(dict(exported.named_parameters()), expected.weight) == []
    assert differing(dict(exported.named_buffers()), dict(stock.named_buffers())) == []
    stock.save_pretrained(tmp_path / "stock")
    before, after = tensors_of(tmp_path / "stock"), tensors_of(tmp_path / "out")
    assert before.keys() == after.keys()
    assert {name: each.dtype for name, each in before.items()} == {
        name: each.dtype for name, each in after.items()
    }
    # With the constructor's values it would be another model.
    for each in ("e_score_correction_bias", "layer_scalar"):
        for name, value in stock.named_buffers():
            if name.endswith(each):
                value.fill_(each == "layer_scalar")
    assert in_memory(stock, steps[:1], precision).losses != losses[:1]
