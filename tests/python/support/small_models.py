"""Small models of any family of transformers, as folders like those of the hub: configurations, weights, tokenizer."""

import copy
import shutil

import torch
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoModelForCausalLM

from corpus import make_tokenizer, write
from megatrain_io.models.shrink import shrink_config

SMALL = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED = SMALL | {"num_key_value_heads": 2}
WINDOW = {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
EXPERTS = {"num_experts_per_tok": 2, "num_experts": 4, "moe_intermediate_size": 24}
NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
FAMILIES = {
    "llama": ("llama", GROUPED),
    "llama tied": ("llama", GROUPED | {"tie_word_embeddings": True}),
    "qwen2": ("qwen2", GROUPED),
    "qwen3": ("qwen3", GROUPED | {"head_dim": 8}),
    "qwen3 tied": ("qwen3", GROUPED | {"head_dim": 8, "tie_word_embeddings": True}),
    "mistral": ("mistral", GROUPED | {"sliding_window": 4}),
    "gemma2": ("gemma2", GROUPED | WINDOW | {"head_dim": 8}),
    "gemma3": ("gemma3_text", GROUPED | WINDOW | {"head_dim": 8}),
    "gpt2": ("gpt2", SMALL | NO_DROPOUT),
    "gpt_neox": ("gpt_neox", SMALL),
    "olmo2": ("olmo2", GROUPED),
    "olmo3": ("olmo3", GROUPED | WINDOW),
    "phi3": ("phi3", GROUPED),
    "falcon": ("falcon", SMALL),
    "mixtral": ("mixtral", GROUPED | {"num_local_experts": 4}),
    "qwen3_moe": ("qwen3_moe", GROUPED | EXPERTS | {"head_dim": 8, "mlp_only_layers": [1]}),
}

_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_ENDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_BY_HAND = GROUPED | {"vocab_size": 271}
_ENCODER_DECODER = _ENDS | {
    "vocab_size": 271, "d_model": 32, "encoder_layers": 2, "decoder_layers": 3, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "dropout": 0.0,
    "attention_dropout": 0.0, "is_decoder": True,
}  # fmt: skip
_BLT = {
    "vocab_size": 271, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 4,
    "num_hidden_layers": 1, "max_position_embeddings": 64, "head_dim": 8,
}  # fmt: skip
_QWEN4 = _BY_HAND | EXPERTS | {
    "head_dim": 8, "linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2,
    "linear_num_value_heads": 4, "shared_expert_intermediate_size": 24, "num_hidden_layers": 4,
    "layer_types": ["linear_attention", "full_attention"] * 2, "hc_count": 2, "hc_lowrank": 8, "ple_embed_dim": 32,
    "ngram_vocab_size_base": 97, "make_ngram_vocab_size_divisible_by": 8, "split_ngram_parts": 1,
    "heads_per_ngram": 2, "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 8,
    "indexer_compress_ratio": 2,
}  # fmt: skip
# Small configurations of families that have none as published, or none that shrinks: all that a model needs.
BY_HAND = {
    "blt": _ENDS | {
        "vocab_size": 271, "encoder_hash_byte_group_vocab": 97, "encoder_hash_byte_group_size": [3, 4],
        "max_position_embeddings": 64, "patcher_config": _BLT, "encoder_config": _BLT | {"hidden_size_global": 32},
        "decoder_config": _BLT | {"hidden_size_global": 32}, "global_config": _BLT,
    },
    "cohere_compass_text": _BY_HAND | WINDOW | {
        "head_dim": 8, "rope_parameters": {"sliding_attention": _ROPE, "full_attention": _ROPE},
    },
    "dbrx": {
        "vocab_size": 271, "d_model": 32, "n_heads": 4, "n_layers": 3, "max_seq_len": 64,
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
        "ffn_config": {"hidden_size": 32, "ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "dory": _BY_HAND | {
        "head_dim": 8, "sliding_window": 4, "num_hidden_layers": 6, "layer_types": ["sliding_attention", "mlp"] * 3,
        "n_input_layers": 2, "n_recurrent_layers": 2, "n_output_layers": 2,
    },
    "dots1": _BY_HAND | {
        "head_dim": 8, "n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2,
        "moe_intermediate_size": 24, "first_k_dense_replace": 1,
    },
    "dots3_note": {
        "text_config": _BY_HAND | {
            "num_key_value_heads": 4, "moe_intermediate_size": 24, "n_shared_experts": 1, "n_routed_experts": 4,
            "num_experts_per_tok": 2, "kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 8, "v_head_dim": 8, "head_dim": 16, "index_topk": 4, "index_head_dim": 16,
            "index_n_heads": 2, "shared_experts_intermediate_size": 24, "sliding_window": 4,
            "layer_types": ["indexed_attention", "sliding_attention", "indexed_attention"],
            "mlp_layer_types": ["dense", "sparse", "sparse"],
        },
        "vision_config": {"adapter_out_dim": 32}, "audio_config": {"adapter_out_dim": 32},
        "image_token_id": 268, "video_token_id": 269, "audio_token_id": 270,
    },
    "gemma4_assistant": {
        "text_config": _BY_HAND | {
            "head_dim": 8, "global_head_dim": 16, "sliding_window": 4, "num_hidden_layers": 4,
            "layer_types": ["sliding_attention", "full_attention"] * 2, "hidden_size_per_layer_input": 0,
            "vocab_size_per_layer_input": 0, "num_kv_shared_layers": 0,
        },
    },
    "hunyuan_v1_dense": _BY_HAND | {"head_dim": 8},
    "hunyuan_v1_moe": _BY_HAND | {"head_dim": 8, "num_experts": 4, "moe_topk": 2},
    "lfm2_moe": _BY_HAND | EXPERTS | {"num_dense_layers": 1, "layer_types": ["conv", "full_attention", "conv"]},
    "longcat_flash": SMALL | {
        "vocab_size": 271, "num_layers": 2, "ffn_hidden_size": 48, "q_lora_rank": 16, "kv_lora_rank": 16,
        "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "head_dim": 8, "v_head_dim": 8, "qk_head_dim": 16,
        "moe_topk": 2, "n_routed_experts": 4, "zero_expert_num": 2, "expert_ffn_hidden_size": 24,
    },
    "ministral": _BY_HAND | WINDOW | {"head_dim": 8},
    "moss_transcribe_diarize": {
        "audio_config": {
            "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48, "hidden_size": 32,
            "max_source_positions": 64,
        },
        "text_config": _BY_HAND | {"head_dim": 8, "model_type": "qwen3"}, "audio_token_id": 270,
    },
    "nemotron": _BY_HAND | {"head_dim": 8},
    "plbart": _ENCODER_DECODER | {"max_position_embeddings": 64},
    "qwen4_exp": {
        "text_config": _QWEN4,
        "vision_config": {
            "depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 4, "out_hidden_size": 32,
            "patch_size": 4, "num_position_embeddings": 16,
        },
        "image_token_id": 266, "video_token_id": 267, "vision_start_token_id": 268, "vision_end_token_id": 269,
    },
    "qwen4_exp_text": _QWEN4,
    "reformer": _ENDS | {
        "vocab_size": 271, "hidden_size": 32, "attention_head_size": 8, "num_attention_heads": 4,
        "attn_layers": ["local"] * 3, "axial_pos_shape": [8, 8], "axial_pos_embds_dim": [16, 16],
        "feed_forward_size": 48, "max_position_embeddings": 64, "local_attn_chunk_length": 4, "is_decoder": True,
        "hidden_dropout_prob": 0.0, "local_attention_probs_dropout_prob": 0.0,
    },
    "whisper": _ENCODER_DECODER | {
        "max_target_positions": 64, "max_source_positions": 64, "decoder_start_token_id": 1,
        "begin_suppress_tokens": None,
    },
    "xlnet": _ENDS | {
        "vocab_size": 271, "d_model": 32, "n_layer": 3, "n_head": 4, "d_head": 8, "d_inner": 48, "dropout": 0.0,
        "summary_last_dropout": 0.0,
    },
    "zamba": SMALL | {
        "vocab_size": 271, "num_hidden_layers": 6, "num_key_value_heads": 4, "attention_hidden_size": 64,
        "attention_head_dim": 16, "n_mamba_heads": 2, "mamba_d_state": 8, "mamba_dt_rank": 4, "attn_layer_period": 2,
        "attn_layer_offset": 1,
    },
}  # fmt: skip
# What a configuration class leaves open, and a model needs; and widths that would make a small one slow.
SET = {
    "bailing_hybrid": {"head_dim": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16},
    "bamba": {"attn_layer_indices": [9, 18, 27]},
    "deepseek_v2": {"num_experts_per_tok": 6, "first_k_dense_replace": 1},
    "granitemoehybrid": {"layer_types": (["linear_attention"] * 3 + ["full_attention"]) * 8},
    "kimi_linear": {
        "linear_head_dim": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16,
    },
    "lfm2": {"full_attn_idxs": [2, 5, 8, 10, 12, 14]},
    "xmod": {"default_language": "en_XX"},
}  # fmt: skip
# Buffers that training in public changed: on the hub they are not what a new model has.
TRAINED_BUFFERS = ("e_score_correction_bias", "expert_bias", "balancing_biases", "layer_scalar")

VOCABULARY = 271  # a little more than the tokenizer has
TEXTS = ["The quick brown fox jumps over", "a lazy dog", "while wizards brew", "potions in Paris and Prague"]
SHARD_SIZE = "400KB"  # several files, as models on the hub have them


def small_config(family):
    """The configuration of one of ``FAMILIES``, or as published and shrunk, with the tokenizer's vocabulary."""
    if family in FAMILIES:
        model_type, values = FAMILIES[family]
        return AutoConfig.for_model(model_type, **{**values, "vocab_size": VOCABULARY})
    if family in BY_HAND:
        return AutoConfig.for_model(family, **BY_HAND[family])
    config = shrink_config(AutoConfig.for_model(family, **SET.get(family, {})))
    text_config = config.get_text_config()
    for name in ("vocab_size", "vocab_size_per_layer_input", "decoder_vocab_size"):
        if getattr(text_config, name, None):
            setattr(text_config, name, VOCABULARY)
    return config


def make_source(folder, config, dtype=torch.float32, *, shard_size="5GB"):
    """A model folder with random weights in which nothing is 0 or 1 by initialisation, and data beside it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=False)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.05)
    save(model.to(dtype), config, folder / "model", max_shard_size=shard_size)
    make_tokenizer(template=None).save_pretrained(folder / "model")
    write(folder / "train.jsonl", [{"text": text} for text in TEXTS])


def save(model, config, folder, **how):
    """Save a model; where transformers reads its text model by the configuration of the whole one alone, with that."""
    model.save_pretrained(folder, **how)
    if type(model.config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        whole = copy.deepcopy(config)
        whole.architectures, whole.dtype = [type(model).__name__], model.dtype
        whole.save_pretrained(folder)


def make_published(folder, config, dtype, **saving):
    """As ``make_source``, with buffers that were trained, in several files, and each tensor in the dtype that
    transformers gives it in a model that computes in ``dtype``: some architectures keep a few in fp32. ``saving`` are
    options of ``save_pretrained``.
    """
    make_source(folder, config)
    model = load(folder / "model", dtype)
    kept = model.state_dict().keys()
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(5)
        for name, buffer in model.named_buffers():
            if name in kept and name.endswith(TRAINED_BUFFERS):
                buffer.add_(0.05 * torch.rand_like(buffer))
    shutil.rmtree(folder / "model")
    save(model, config, folder / "model", max_shard_size=SHARD_SIZE, **saving)
    make_tokenizer(template=None).save_pretrained(folder / "model")


def load(folder, dtype="auto"):
    """What stock transformers makes of a folder; a tensor that is missing or too much is an error."""
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=False, dtype=dtype, output_loading_info=True
    )
    wrong = {what: names for what, names in info.items() if names and what != "error_msgs"}
    assert not wrong, f"stock transformers loads {folder.name} with {wrong}"
    return model
