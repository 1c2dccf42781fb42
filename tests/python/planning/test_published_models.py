"""Plans of the largest published models, from the config.json that their makers published and nothing else."""

import json

import pytest
from typer.testing import CliRunner

from megatrain_io.cli.app import app

FP8 = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128]}
DEEPSEEK = {
    "architectures": ["DeepseekV3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "ep_size": 1,
    "auto_map": {
        "AutoConfig": "configuration_deepseek.DeepseekV3Config",
        "AutoModelForCausalLM": "modeling_deepseek.DeepseekV3ForCausalLM",
    },
    "hidden_act": "silu", "hidden_size": 7168, "intermediate_size": 18432, "kv_lora_rank": 512, "moe_layer_freq": 1,
    "moe_intermediate_size": 2048, "n_shared_experts": 1, "norm_topk_prob": True, "num_experts_per_tok": 8,
    "num_hidden_layers": 61, "q_lora_rank": 1536, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64,
    "quantization_config": FP8, "rms_norm_eps": 1e-6, "scoring_func": "sigmoid", "tie_word_embeddings": False,
    "topk_method": "noaux_tc", "torch_dtype": "bfloat16", "use_cache": True, "v_head_dim": 128,
}  # fmt: skip
YARN = {"beta_fast": 32, "beta_slow": 1, "mscale": 1.0, "mscale_all_dim": 1.0, "type": "yarn"}
YARN |= {"original_max_position_embeddings": 4096}
PUBLISHED = {
    "DeepSeek-V3": DEEPSEEK | {
        "model_type": "deepseek_v3", "bos_token_id": 0, "eos_token_id": 1, "first_k_dense_replace": 3, "n_group": 8,
        "topk_group": 4, "n_routed_experts": 256, "num_attention_heads": 128, "num_key_value_heads": 128,
        "num_nextn_predict_layers": 1, "max_position_embeddings": 163840, "rope_theta": 10000,
        "rope_scaling": YARN | {"factor": 40}, "routed_scaling_factor": 2.5, "vocab_size": 129280,
    },
    "Kimi-K2": DEEPSEEK | {
        "model_type": "kimi_k2", "bos_token_id": 163584, "eos_token_id": 163585, "first_k_dense_replace": 1,
        "n_group": 1, "topk_group": 1, "n_routed_experts": 384, "num_attention_heads": 64, "num_key_value_heads": 64,
        "num_nextn_predict_layers": 0, "max_position_embeddings": 131072, "rope_theta": 50000.0,
        "rope_scaling": YARN | {"factor": 32}, "routed_scaling_factor": 2.827, "vocab_size": 163840,
        "aux_loss_alpha": 0.001, "seq_aux": True,
    },
    "GLM-4.5-Air": {
        "architectures": ["Glm4MoeForCausalLM"], "model_type": "glm4_moe", "attention_bias": True, "head_dim": 128,
        "attention_dropout": 0.0, "pad_token_id": 151329, "eos_token_id": [151329, 151336, 151338],
        "hidden_act": "silu", "hidden_size": 4096, "partial_rotary_factor": 0.5, "intermediate_size": 10944,
        "max_position_embeddings": 131072, "moe_intermediate_size": 1408, "norm_topk_prob": True,
        "num_attention_heads": 96, "n_group": 1, "topk_group": 1, "n_routed_experts": 128, "n_shared_experts": 1,
        "routed_scaling_factor": 1.0, "num_experts_per_tok": 8, "first_k_dense_replace": 1, "num_hidden_layers": 46,
        "num_key_value_heads": 8, "num_nextn_predict_layers": 1, "rms_norm_eps": 1e-5, "rope_scaling": None,
        "rope_theta": 1000000, "tie_word_embeddings": False, "torch_dtype": "bfloat16", "use_qk_norm": False,
        "vocab_size": 151552,
    },
}  # fmt: skip


def attention(c):
    """Parameters of a block's attention, its norms in between counted."""
    h, heads = c["hidden_size"], c["num_attention_heads"]
    if "kv_lora_rank" not in c:
        wide, narrow = heads * c["head_dim"], c["num_key_value_heads"] * c["head_dim"]
        return (h + 1) * wide + 2 * (h + 1) * narrow + wide * h
    q, kv, nope, rope, v = (
        c[name]
        for name in ("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
    )
    down = h * q + q + h * (kv + rope) + kv
    return down + q * heads * (nope + rope) + kv * heads * (nope + v) + heads * v * h


def parameters(c, experts=None):
    """Parameters without those of multi-token prediction, with so many experts of a block (all by default)."""
    h, layers, dense = c["hidden_size"], c["num_hidden_layers"], c["first_k_dense_replace"]
    count = (c["n_routed_experts"] if experts is None else experts) + c["n_shared_experts"]
    mixture = count * 3 * h * c["moe_intermediate_size"] + c["n_routed_experts"] * h
    blocks = (
        layers * (attention(c) + 2 * h) + dense * 3 * h * c["intermediate_size"] + (layers - dense) * mixture
    )
    return 2 * c["vocab_size"] * h + h + blocks


def test_the_formula_gives_the_published_number():
    # There the biases that correct the routers' scores are counted, which are buffers: no gradient trains them.
    config = PUBLISHED["DeepSeek-V3"]
    mixtures = config["num_hidden_layers"] - config["first_k_dense_replace"]
    assert parameters(config) + mixtures * config["n_routed_experts"] == 671_026_419_200


@pytest.mark.slow
@pytest.mark.parametrize("name", PUBLISHED)
def test_their_parameters_are_counted_exactly(tmp_path, name):
    config = PUBLISHED[name]
    (tmp_path / "config.json").write_text(json.dumps(config))
    options = ("--on", "workstation-32gb", "train.precision=fp32", "train.device=cpu", "--json")
    result = CliRunner().invoke(app, ["plan", str(tmp_path), *options])
    assert result.exception is None or isinstance(result.exception, SystemExit)
    plan = json.loads(result.stdout)
    assert plan["parameters"] == parameters(config)
    assert plan["active_parameters"] == parameters(config, config["num_experts_per_tok"])
    assert plan["store_bytes"] >= 24 * plan["parameters"]
    notes = " ".join(plan["notes"])
    assert ("quantised (FP8)" in notes) == ("quantization_config" in config)
    assert ("read as the DeepseekV3ForCausalLM that it names" in notes) == (name == "Kimi-K2")
