"""Nothing that runs before the first step changes what training computes: buffers, attributes, generators."""

import copy
import random

import numpy as np
import pytest
import torch
from transformers import AutoConfig

from megatrain_io.data.batch import blank_micro_batch
from megatrain_io.models.partition import PartitionedModel, model_parts
from megatrain_io.models.probe import probe
from megatrain_io.planning import compute_time
from megatrain_io.planning.compute_time import measured_seconds
from megatrain_io.planning.dry_run import dry_run
from megatrain_io.store.layout import ModelLayout

POSITIONS = 16
LONGER = 40  # than the positions of the configuration
SMALL = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": POSITIONS,
}
PARTS = {"short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [2.0, 2.1, 2.2, 2.3]}
ROTARY = {
    "default": {},
    "linear": {"factor": 2.0},
    "dynamic": {"factor": 2.0},
    "yarn": {"factor": 2.0, "original_max_position_embeddings": 8},
    "longrope": {**PARTS, "factor": 2.0, "original_max_position_embeddings": 8},
    "llama3": {
        "factor": 2.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8
    },
}  # fmt: skip
KINDS = [
    *(("llama", {"rope_parameters": {"rope_type": kind, "rope_theta": 1e4, **more}}) for kind, more in ROTARY.items()),
    ("gemma3_text", {"head_dim": 8, "sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}),
    ("gptj", {"n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4, "n_positions": LONGER}),
    ("falcon", {"alibi": True}),
    ("recurrent_gemma", {"block_types": ["recurrent", "attention"], "lru_width": 32, "attention_window_size": 8}),
]  # fmt: skip


@pytest.mark.parametrize(("family", "values"), KINDS, ids=lambda each: each if isinstance(each, str) else "")
def test_what_runs_before_the_first_step_leaves_the_model_and_the_generators_as_they_were(
    family, values, monkeypatch
):
    monkeypatch.setattr(compute_time, "_ROUNDS", 1)
    monkeypatch.setattr(compute_time, "_SECONDS", 0.0)
    size = {} if family == "gptj" else SMALL
    config = AutoConfig.for_model(family, **{**size, "vocab_size": 97, **values})
    before = config.to_dict()
    generators = generator_states()
    partition = PartitionedModel(config, torch.float32, probe(config))
    untouched = state_of(partition)
    layout = ModelLayout.build(model_parts(partition), len(partition.blocks), "f32")
    batch = blank_micro_batch(2, LONGER, packed=False)
    counted = dry_run(partition, layout, [batch] * 2, slice_tokens=16)
    # That kind looks at the positions, of which there are none on shapes alone.
    assert counted or "dynamic" in str(values)
    assert measured_seconds(partition, layout, batch)
    found = state_of(partition)
    assert found.keys() == untouched.keys()
    assert [name for name in found if not same(found[name], untouched[name])] == []
    assert config.to_dict() == before
    assert all(same(*states) for states in zip(generators, generator_states(), strict=True))


def state_of(partition):
    """Buffers and attributes of all modules, copied; parameters have no values here."""
    state = {}
    for root, each in (("model", partition._model), *enumerate(partition.blocks)):
        for name, module in each.named_modules():
            where = f"{root}.{name}"
            state |= {f"{where}:{n}": buffer.clone() for n, buffer in module.named_buffers(recurse=False)}
            for attribute, value in vars(module).items():
                if attribute not in ("_parameters", "_buffers", "_modules", "_block", "config"):
                    is_container = isinstance(value, dict | list | set)
                    state[f"{where}.{attribute}"] = copy.copy(value) if is_container else value
    return state


def generator_states():
    return torch.get_rng_state(), random.getstate(), np.random.get_state()[1]  # noqa: NPY002


def same(one, other):
    if isinstance(one, torch.Tensor):
        return type(one) is type(other) and torch.equal(one, other)
    if isinstance(one, np.ndarray):
        return np.array_equal(one, other)
    return one is other or one == other
