"""A small model of any family of transformers, driven through every command in this process."""

import json
import time
from dataclasses import dataclass

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from typer.testing import CliRunner

from corpus import make_tokenizer, write
from megatrain_io.cli.app import app
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

VOCABULARY = 271  # a little more than the tokenizer has
PROMPT = "The quick brown Pony"
NEW = 8
TEXTS = ["The quick brown fox jumps over", "a lazy dog", "while wizards brew", "potions in Paris and Prague"]


@dataclass
class Outcome:
    """What became of a family: ``stage`` is ``done``, or the command that failed, with its exit code and message."""

    stage: str
    seconds: float
    code: int = 0
    message: str = ""
    fault: BaseException | None = None

    @property
    def is_refused(self):
        """Whether a command refused it with a sentence for a person, and not by accident."""
        return self.stage != "done" and self.fault is None and self.code not in (0, 1)


def small_config(family):
    """The configuration of one of ``FAMILIES``, or as published and shrunk, with the tokenizer's vocabulary."""
    if family in FAMILIES:
        model_type, values = FAMILIES[family]
        return AutoConfig.for_model(model_type, **{**values, "vocab_size": VOCABULARY})
    config = shrink_config(AutoConfig.for_model(family))
    text_config = config.get_text_config()
    for name in ("vocab_size", "vocab_size_per_layer_input"):
        if getattr(text_config, name, None):
            setattr(text_config, name, VOCABULARY)
    return config


def make_source(folder, config, dtype=torch.float32):
    """A model folder with random weights in which nothing is 0 or 1 by initialisation, and data beside it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=False)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.05)
    model.to(dtype).save_pretrained(folder / "model")
    make_tokenizer(template=None).save_pretrained(folder / "model")
    write(folder / "train.jsonl", [{"text": text} for text in TEXTS])


def run(*arguments):
    """A command in this process; its result, as ``typer.testing`` has it."""
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def drive(folder, config, precision, *, options=()):
    """Import, two steps, export and generate, by the command line.

    Returns:
        The outcome; what generate says must be what stock transformers says from the export.
    """
    began = time.perf_counter()
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "model").exists():
        make_source(folder, config)
    here = folder / precision
    settings = [
        f"model={folder / 'model'}",
        f"output_dir={here}",
        f"data.train={folder / 'train.jsonl'}",
        "data.max_length=32",
        "train.max_steps=2",
        "train.gradient_accumulation_steps=2",
        "train.learning_rate=1.0e-3",
        f"train.precision={precision}",
        "train.device=cpu",
        "memory.io_backend=threads",
        "memory.threads=1",
        "memory.ram=1GiB",
        *options,
    ]
    commands = {
        "import": (
            "import",
            folder / "model",
            here,
            "--precision",
            precision,
            "--io-backend",
            "threads",
            "--json",
        ),
        "train": ("train", *settings, "--json"),
        "export": ("export", here, here / "out", "--json"),
        "generate": ("generate", here, "--prompt", PROMPT, "--max-new-tokens", NEW, "--json"),
    }
    text = ""
    for stage, arguments in commands.items():
        result = run(*arguments)
        fault = result.exception if not isinstance(result.exception, SystemExit) else None
        if result.exit_code or fault is not None:
            message = "" if fault is not None else json.loads(result.stdout)["error"]["message"]
            return Outcome(stage, time.perf_counter() - began, result.exit_code, message, fault)
        text = result.stdout
    said, stock = json.loads(text)["text"], stock_text(here / "out")
    assert stock in (None, said), f"{config.model_type}: generate says {said!r}, stock transformers {stock!r}"
    return Outcome("done", time.perf_counter() - began)


def stock_text(folder, prompt=PROMPT, new=NEW):
    """What stock transformers continues a prompt with, greedily, from an exported folder; None where it cannot."""
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False, dtype="auto").eval()
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    asked = GenerationConfig.from_pretrained(folder) if (folder / "generation_config.json").exists() else None
    ends = asked.eos_token_id if asked else model.config.get_text_config().eos_token_id
    how = {"do_sample": False, "max_new_tokens": new, "pad_token_id": 0, "eos_token_id": ends}
    try:
        out = model.generate(ids, attention_mask=torch.ones_like(ids), **how)
    except (KeyError, TypeError, ValueError):
        return None
    return tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
