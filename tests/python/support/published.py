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
# Class, configuration of the whole, of its text and of its images.
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
}  # fmt: skip


def published_config(model_type):
    """The class of a model that takes images, too, and a small configuration of it."""
    kind, whole, text, vision = PUBLISHED[model_type]
    return kind, kind.config_class(text_config=BASE | text, vision_config=vision, **whole)


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


def make_folder(folder, config, precision, kind=None):
    """A model folder of several files, with its tokenizer, and data beside it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        kind = kind or transformers.AutoModelForCausalLM
        make = kind.from_config if hasattr(kind, "from_config") else kind
        model = lively(make(config)).to(DTYPES[precision])
    size = sum(tensor.nbytes for tensor in model.state_dict().values())
    model.save_pretrained(folder / "model", max_shard_size=size // 2)
    make_tokenizer(template=None).save_pretrained(folder / "model")
    write(folder / "train.jsonl", [{"text": text} for text in TEXTS * 2])
    return folder / "model"


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


def in_memory(model, steps, precision):
    """The same training of a stock model in memory."""
    how = Hyperparameters(lr=[RATE] * len(steps), weight_decay=0.1)
    return train_in_memory(model, steps, how, DTYPES[precision], bf16_source=precision == "bf16")
