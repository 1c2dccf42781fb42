"""Small models in the form in which the hub has them, trained by the command line and in memory."""

import json
from contextlib import contextmanager

import safetensors.torch
import torch
import transformers
from transformers import AutoConfig
from typer.testing import CliRunner

from corpus import make_tokenizer, write
from megatrain_io.cli.app import app
from megatrain_io.paging.paged_model import PagedPartition
from reference.reference import Hyperparameters
from reference.reference import train as train_in_memory
from small_models import GROUPED, TEXTS, VOCABULARY

RATE = 1e-2
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
BASE = GROUPED | {"vocab_size": VOCABULARY}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 24}
TEXT = {
    "deepseek_v3": {
        "n_routed_experts": 8, "n_group": 2, "topk_group": 1, "num_key_value_heads": 4, "first_k_dense_replace": 1,
        "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8, **EXPERTS,
    },
    "glm4_moe": {
        "n_routed_experts": 8, "n_shared_experts": 1, "first_k_dense_replace": 1, "head_dim": 8, "use_qk_norm": True,
        "attention_bias": True, "num_nextn_predict_layers": 1, **EXPERTS,
    },
    "nemotron_h": {
        "layers_block_type": ["linear_attention", "moe", "full_attention", "linear_attention", "moe", "mlp"],
        "head_dim": 8, "mamba_num_heads": 4, "mamba_head_dim": 16, "ssm_state_size": 8, "n_groups": 2, "chunk_size": 8,
        "n_routed_experts": 8, "moe_shared_expert_intermediate_size": 24, **EXPERTS,
    },
    "minimax_m2": {"num_local_experts": 4, "head_dim": 8, "rotary_dim": 8, **EXPERTS},
    "gemma4_text": {
        "head_dim": 8, "global_head_dim": 16, "num_kv_shared_layers": 0, "hidden_size_per_layer_input": 0,
        "sliding_window": 4, "layer_types": ["sliding_attention", "full_attention", "full_attention"],
    },
}  # fmt: skip


VISION = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
HYBRID = {
    "head_dim": 8, "linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2,
    "linear_num_value_heads": 4, "layer_types": ["linear_attention", "linear_attention", "full_attention"],
}  # fmt: skip
IDS = {"image_token_id": 260, "video_token_id": 261, "vision_start_token_id": 262, "vision_end_token_id": 263}
OF_QWEN = {"hidden_size": 32, "intermediate_size": 48, "depth": 2, "num_heads": 2, "patch_size": 4}
OF_GLM = OF_QWEN | {"out_hidden_size": 32, "image_size": 16}
IDS_OF_GLM = {
    "image_token_id": 260, "video_token_id": 261, "image_start_token_id": 262, "image_end_token_id": 263,
    "video_start_token_id": 264, "video_end_token_id": 265,
}  # fmt: skip
SHARED = {
    "num_hidden_layers": 4, "num_kv_shared_layers": 2, "sliding_window": 4, "head_dim": 8,
    "layer_types": ["sliding_attention", "full_attention"] * 2, "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": VOCABULARY,
}  # fmt: skip


def rope(*sections, **values):
    """Positions of text, height and width, each in so many pairs of dimensions."""
    return {
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [*sections]}
        | values
    }


# Class, configuration of the whole, of its text, of its images and of its sound.
PUBLISHED = {
    "gemma3": (
        transformers.Gemma3ForConditionalGeneration,
        {"mm_tokens_per_image": 4, "image_token_index": 260, "boi_token_index": 261, "eoi_token_index": 262},
        {"head_dim": 8, "sliding_window": 4, "query_pre_attn_scalar": 8,
         "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
        VISION | {"model_type": "siglip_vision_model", "image_size": 32, "patch_size": 8},
    ),
    "mistral3": (
        transformers.Mistral3ForConditionalGeneration,
        {"image_token_index": 260, "tie_word_embeddings": False},
        {"model_type": "mistral", "head_dim": 8},
        VISION | {"model_type": "pixtral", "head_dim": 16, "image_size": 32, "patch_size": 8},
    ),
    "qwen3_5": (
        transformers.Qwen3_5ForConditionalGeneration,
        IDS,
        HYBRID,
        {"hidden_size": 32, "intermediate_size": 48, "depth": 2, "num_heads": 2, "out_hidden_size": 32, "patch_size": 4,
         "num_position_embeddings": 16},
    ),
    "gemma3n": (
        transformers.Gemma3nForConditionalGeneration,
        {"image_token_id": 268, "audio_token_id": 269},
        SHARED | {"altup_num_inputs": 2, "laurel_rank": 8, "activation_sparsity_pattern": [0.5, 0.0, 0.5, 0.0]},
        {"architecture": "resnet10t", "hidden_size": 512, "vocab_size": 2, "vocab_offset": VOCABULARY - 4,
         "label_names": ["a", "b"], "num_classes": 2},
        {"hidden_size": 32, "vocab_size": 2, "vocab_offset": VOCABULARY - 2, "conf_num_attention_heads": 2,
         "conf_num_hidden_layers": 1, "input_feat_size": 16, "sscp_conv_channel_size": [8, 4]},
    ),
    "gemma4": (
        transformers.Gemma4ForConditionalGeneration,
        {"image_token_id": 260, "video_token_id": 261, "audio_token_id": 262},
        SHARED | {"global_head_dim": 16},
        VISION | {"num_key_value_heads": 2, "head_dim": 16, "patch_size": 4, "position_embedding_size": 16,
                  "pooling_kernel_size": 2, "use_clipped_linears": True},
        {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "subsampling_conv_channels": [8, 4],
         "output_proj_dims": 32},
    ),
    "llama4": (
        transformers.Llama4ForConditionalGeneration,
        {},
        {"intermediate_size_mlp": 48, "num_local_experts": 4, "num_experts_per_tok": 1, "head_dim": 8,
         "interleave_moe_layer_step": 2, "attention_chunk_size": 8, "no_rope_layers": [1, 0, 1],
         "layer_types": ["chunked_attention", "full_attention", "chunked_attention"]},
        VISION | {"intermediate_size": 128, "image_size": 16, "patch_size": 4, "vision_output_dim": 32,
                  "projector_input_dim": 32, "projector_output_dim": 32},
    ),
    "qwen2_vl": (
        transformers.Qwen2VLForConditionalGeneration,
        IDS,
        rope(1, 1, 2),
        {"embed_dim": 32, "hidden_size": 32, "mlp_ratio": 2, "depth": 2, "num_heads": 2, "patch_size": 4},
    ),
    "qwen2_5_vl": (
        transformers.Qwen2_5_VLForConditionalGeneration,
        IDS,
        rope(1, 1, 2),
        OF_QWEN | {"out_hidden_size": 32, "window_size": 16, "fullatt_block_indexes": [1]},
    ),
    "qwen3_vl": (
        transformers.Qwen3VLForConditionalGeneration,
        IDS | {"tie_word_embeddings": True},
        {"head_dim": 8, **rope(2, 1, 1, mrope_interleaved=True)},
        OF_QWEN | {"out_hidden_size": 32, "num_position_embeddings": 16, "deepstack_visual_indexes": [0]},
    ),
    "qwen3_vl_moe": (
        transformers.Qwen3VLMoeForConditionalGeneration,
        IDS,
        {"head_dim": 8, "num_experts": 4, **EXPERTS, **rope(2, 1, 1, mrope_interleaved=True)},
        OF_QWEN | {"out_hidden_size": 32, "num_position_embeddings": 16, "deepstack_visual_indexes": [0]},
    ),
    "glm4v": (
        transformers.Glm4vForConditionalGeneration,
        IDS_OF_GLM,
        rope(1, 1, 0, partial_rotary_factor=0.5),
        OF_GLM,
    ),
    "glm4v_moe": (
        transformers.Glm4vMoeForConditionalGeneration,
        IDS_OF_GLM,
        {"head_dim": 16, "n_routed_experts": 8, "n_shared_experts": 1, "first_k_dense_replace": 1, **EXPERTS,
         **rope(2, 1, 1, partial_rotary_factor=0.5)},
        OF_GLM,
    ),
    "internvl": (
        transformers.InternVLForConditionalGeneration,
        {"image_token_id": 260},
        {"model_type": "qwen3", "head_dim": 8},
        VISION | {"image_size": [16, 16], "patch_size": [4, 4]},
    ),
    "llava": (
        transformers.LlavaForConditionalGeneration,
        {"image_token_index": 260},
        {"model_type": "llama"},
        VISION | {"model_type": "clip_vision_model", "image_size": 16, "patch_size": 4},
    ),
}  # fmt: skip


def published_config(model_type):
    """The class of a model that takes images, too, and a small configuration of it."""
    kind, whole, text, *towers = PUBLISHED[model_type]
    parts = dict(zip(("vision_config", "audio_config"), towers, strict=False))
    return kind, kind.config_class(text_config=BASE | text, **parts, **whole)


def text_config(model_type):
    return AutoConfig.for_model(model_type, **BASE | TEXT[model_type])


@torch.no_grad()
def lively(model):
    """A model in which no parameter and no saved buffer has the value of its constructor."""
    saved = model.state_dict().keys()
    generator = torch.Generator().manual_seed(7)
    for parameter in model.parameters():
        parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter.dtype), alpha=0.05)
    for name, buffer in model.named_buffers():
        if name in saved and buffer.is_floating_point():
            buffer.add_(torch.rand(buffer.shape, generator=generator).to(buffer.dtype), alpha=0.5)
    return model


@torch.no_grad()
def in_dtype(model, dtype):
    """A model in a dtype, but for the biases of routers, which the hub has in fp32."""
    for name, value in [*model.named_parameters(), *model.named_buffers()]:
        if value.is_floating_point() and not name.endswith("e_score_correction_bias"):
            value.data = value.data.to(dtype)
    return model


def make_folder(folder, config, precision, kind=None):
    """A model folder of several files, with its tokenizer, and data beside it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        kind = kind or transformers.AutoModelForCausalLM
        make = kind.from_config if hasattr(kind, "from_config") else kind
        model = in_dtype(lively(make(config)), DTYPES[precision])
    size = sum(tensor.nbytes for tensor in model.state_dict().values())
    model.save_pretrained(folder / "model", max_shard_size=size // 2)
    make_tokenizer(template=None).save_pretrained(folder / "model")
    write(folder / "train.jsonl", [{"text": text} for text in TEXTS * 2])
    return folder / "model"


def add_tensors(folder, tensors):
    """More tensors, in the last file of a folder with an index."""
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    file = max(index["weight_map"].values())
    before = safetensors.torch.load_file(folder / file)
    safetensors.torch.save_file(before | tensors, folder / file, metadata={"format": "pt"})
    index["weight_map"] |= dict.fromkeys(tensors, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def edit_config(folder, without=(), **changes):
    """Change entries of a folder's config.json."""
    path = folder / "config.json"
    before = json.loads(path.read_text())
    path.write_text(json.dumps({key: before[key] for key in before if key not in without} | changes))


def tensors_of(folder):
    """All tensors of a model folder, as they lie in its files."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= safetensors.torch.load_file(path)
    return found


def call(*arguments, code=0):
    """A command in this process; what it prints as JSON."""
    result = CliRunner().invoke(app, [*map(str, arguments), "--json"], prog_name="megatrain-io")
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    assert result.exit_code == code, result.output
    return json.loads(result.stdout)


def settings(folder, precision, steps):
    return [
        f"model={folder / 'model'}",
        f"output_dir={folder / 'run'}",
        f"data.train={folder / 'train.jsonl'}",
        "data.max_length=32",
        f"train.max_steps={steps}",
        "train.gradient_accumulation_steps=2",
        f"train.learning_rate={RATE}",
        "train.lr_scheduler_type=constant",
        "train.weight_decay=0.1",
        "train.adam_beta2=0.95",
        f"train.precision={precision}",
        "train.device=cpu",
        "memory.io_backend=threads",
        "memory.threads=1",
        "memory.ram=1GiB",
    ]


@contextmanager
def noted(monkeypatch):
    """The micro-batches of each step that is trained in the context, as stock models take them."""
    steps = []
    step = PagedPartition.training_step

    def noting(model, micro_batches, *arguments, **others):
        steps.append([stock_batch(batch) for batch in micro_batches])
        return step(model, micro_batches, *arguments, **others)

    with monkeypatch.context() as patch:
        patch.setattr(PagedPartition, "training_step", noting)
        yield steps


def stock_batch(batch):
    ignored = torch.full_like(batch.shift_labels[:, :1], -100)
    given = {
        "input_ids": batch.input_ids,
        "labels": torch.cat([ignored, batch.shift_labels[:, :-1]], dim=1),
        "position_ids": batch.position_ids,
        "attention_mask": batch.attention_mask,
    }
    return {name: value.clone() for name, value in given.items() if value is not None}


def trained(folder, precision, monkeypatch):
    """Import, a step, a second one after a new start, and export; the steps' micro-batches and losses."""
    run = folder / "run"
    call("import", folder / "model", run, "--precision", precision, "--io-backend", "threads")
    with noted(monkeypatch) as steps:
        call("train", *settings(folder, precision, 1))
        call("train", *settings(folder, precision, 2), "--resume")
    call("export", run, folder / "out")
    losses = [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    return steps, losses


def in_memory(model, steps):
    """The same training of a stock model in memory, each parameter in the dtype that it has there."""
    how = Hyperparameters(lr=[RATE] * len(steps), weight_decay=0.1)
    return train_in_memory(model, steps, how, compute_dtype=None)
