"""Small model folders, and their way in and out, for tests of import and export."""

import json

import pytest
import safetensors.torch
import torch
import transformers
from transformers import AutoModelForCausalLM

from megatrain_io.runs.import_model import import_model
from megatrain_io.store.paged_store import PagedStore
from paged import all_planes
from reference.reference import build, tiny_config

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
NAMES = {"bf16": BF16, "fp32": FP32}
ENGINE = "threads"  # stopping a ring takes a second; how bytes move is tested elsewhere

SMALL = {
    "vocab_size": 257,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
EXPERTS = {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
GPT2 = {"vocab_size": 257, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64, "bos_token_id": 1}
NEOX = {key: value for key, value in SMALL.items() if key not in ("num_key_value_heads", "head_dim")}
FALCON = {key: value for key, value in NEOX.items() if key != "intermediate_size"}

FAMILIES = {
    "llama": lambda: tiny_config("llama", tied=False),
    "llama tied": lambda: tiny_config("llama", tied=True),
    "qwen3": lambda: tiny_config("qwen3", tied=False),
    "gpt2": lambda: transformers.GPT2Config(**GPT2, eos_token_id=2),
    "gpt_neox": lambda: transformers.GPTNeoXConfig(**NEOX),
    "gemma3": lambda: transformers.Gemma3TextConfig(**SMALL),
    "mixtral": lambda: transformers.MixtralConfig(**SMALL, num_local_experts=3),
    "qwen3_moe": lambda: transformers.Qwen3MoeConfig(**SMALL, **EXPERTS),
    "falcon": lambda: transformers.FalconConfig(**FALCON),
    "apertus": lambda: transformers.ApertusConfig(**SMALL),  # persistent buffers
}
NORM, TABLE = "model.norm.weight", "model.embed_tokens.weight"


def save(folder, config, dtype=BF16, max_shard_size="1GB"):
    build(config, seed=1).to(dtype).save_pretrained(folder, max_shard_size=max_shard_size)
    return folder


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder)


def bring_in(source, run, precision="bf16", **options):
    return import_model(source, run, precision=precision, engine=ENGINE, chunk_parameters=4096, **options)


def planes(run):
    with PagedStore(*run.store_paths(), engine=ENGINE) as state:
        return all_planes(state)


def bits(tensor):
    return tensor.detach().reshape(-1).view(torch.uint8)


def same(one, other):
    return one.dtype == other.dtype and one.shape == other.shape and torch.equal(bits(one), bits(other))


def differing(one, other):
    return [name for name in one.keys() | other.keys() if not same(one[name], other[name])]


def rewrite(folder, change):
    """Change the tensors of a folder with one file."""
    path = folder / "model.safetensors"
    tensors = safetensors.torch.load_file(path)
    change(tensors)
    safetensors.torch.save_file(tensors, path)


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def check_refused(source, run, kind, message):
    """Refused with this message, and nothing is there that was not there before."""
    before = sorted(run.path.parent.rglob("*"))
    with pytest.raises(kind, match=message) as caught:
        bring_in(source, run)
    assert caught.value.exit_code == 5
    assert sorted(run.path.parent.rglob("*")) == before
