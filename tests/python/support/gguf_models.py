"""Small models of the families that are written as GGUF, with tokenizers of the kinds that it has."""

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

ROWS = 336  # a little more than the tokenizers have
SIZES = {
    "vocab_size": ROWS, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
HEAD = {"head_dim": 16}
GEMMA = HEAD | {"query_pre_attn_scalar": 16, "sliding_window": 8}
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip
LONG = {
    "rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0 + i / 8 for i in range(8)],
    "long_factor": [1.5 + i for i in range(8)],
}  # fmt: skip
FAMILIES = {
    "llama": ("llama", {}, "llama3"),
    "llama tied": ("llama", {"tie_word_embeddings": True, "head_dim": 32}, "pieces"),
    "llama 3": ("llama", {"rope_parameters": LLAMA3, "head_dim": 32}, "llama3"),
    "llama with biases": ("llama", {"attention_bias": True, "mlp_bias": True}, "llama3"),
    "smollm": ("llama", {"tie_word_embeddings": True, "rms_norm_eps": 1e-5}, "digits"),
    "mistral": ("mistral", {"sliding_window": None}, "pieces"),
    "qwen2": ("qwen2", {}, "qwen2"),
    "qwen2 yarn": (
        "qwen2",
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 1e6,
                "factor": 4.0,
                "original_max_position_embeddings": 32,
            }
        },
        "qwen2",
    ),
    "qwen3 tied": ("qwen3", {"head_dim": 32, "tie_word_embeddings": True}, "qwen2"),
    "gemma2": ("gemma2", GEMMA | {"num_hidden_layers": 3}, "gemma"),
    "gemma3": (
        "gemma3_text",
        GEMMA
        | {
            "num_hidden_layers": 7,
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
                "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
            },
        },
        "gemma",
    ),
    "phi3": ("phi3", {"tie_word_embeddings": True}, "phi"),
    "phi3 long": (
        "phi3",
        {
            "rope_parameters": LONG,
            "original_max_position_embeddings": 32,
            "max_position_embeddings": 128,
            "sliding_window": None,
        },
        "phi",
    ),
}
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
GEMMA_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<start_of_turn>{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n"
    "{{ m['content'] | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SPLITS = {"llama3": WORDS + "{1,3}" + REST, "qwen2": WORDS + REST}
COMMON = ["th", "he", "in", "er", "the", "qu", "ck", "ing", "ow", "12"]


def tokenizer_of(kind):
    """A tokenizer as models of that kind have it."""
    return _byte_level(kind) if kind in {"llama3", "qwen2", "digits"} else _pieces(kind)


def _byte_level(kind):
    vocabulary = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    merges = []
    for word in [*COMMON, "Ġt", "Ġthe"]:
        merges.append(
            next((word[:at], word[at:]) for at in range(len(word) - 1, 0, -1) if word[:at] in vocabulary)
        )
        vocabulary[word] = len(vocabulary)
    backend = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=kind == "llama3"))
    if kind == "qwen2":
        backend.normalizer = normalizers.NFC()
    if kind == "digits":
        steps = [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    else:
        steps = [
            pre_tokenizers.Split(Regex(SPLITS[kind]), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    backend.pre_tokenizer = pre_tokenizers.Sequence(steps)
    backend.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    backend.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in special])
    backend.add_tokens([AddedToken("<think>", special=False, normalized=False)])
    if kind == "llama3":
        begin = backend.token_to_id("<|endoftext|>")
        backend.post_processor = processors.TemplateProcessing(
            single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", begin)]
        )
    names = {"bos_token": "<|endoftext|>", "eos_token": "<|im_end|>"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=CHATML, **names)


def _pieces(kind):
    """Sentencepiece, as tokenizer.json has it: the merges are all ways to make a piece."""
    begin, end = ("<bos>", "<eos>") if kind == "gemma" else ("<s>", "</s>")
    special = ["<pad>", begin, end, "<unk>"] if kind == "gemma" else ["<unk>", begin, end]
    letters = [chr(number) for number in range(ord("a"), ord("z") + 1)] + list("TQ12.,▁")
    pieces = [*COMMON, "▁t", "▁the", "▁▁"]
    tokens = [*special, *(f"<0x{number:02X}>" for number in range(256)), *pieces, *letters]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    plain = {*pieces, *letters}
    merges = [
        (piece[:at], piece[at:])
        for piece in pieces
        for at in range(1, len(piece))
        if piece[:at] in plain and piece[at:] in plain
    ]
    model = {"unk_token": "<unk>", "fuse_unk": True, "byte_fallback": True}
    backend = Tokenizer(models.BPE(vocabulary, merges, **model))
    decoding = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if kind == "gemma":
        backend.normalizer = normalizers.Replace(" ", "▁")
        backend.pre_tokenizer = pre_tokenizers.Split(" ", behavior="merged_with_previous")
    elif kind == "phi":
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    if kind != "gemma":
        decoding.append(decoders.Strip(" ", 1, 0))
    backend.decoder = decoders.Sequence(decoding)
    turns = ["<start_of_turn>", "<end_of_turn>"]
    backend.add_special_tokens(
        [AddedToken(text, special=True, normalized=False) for text in [*special, *turns]]
    )
    backend.post_processor = processors.TemplateProcessing(
        single=f"{begin} $A", special_tokens=[(begin, backend.token_to_id(begin))]
    )
    names = {"bos_token": begin, "eos_token": end, "unk_token": "<unk>"}
    pad = {"pad_token": "<pad>"} if kind == "gemma" else {}
    return PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=GEMMA_TEMPLATE, **names, **pad)


def make_model(folder, family, dtype=torch.bfloat16):
    """A model folder with random weights, none of which is 0 or 1 by initialisation, and a tokenizer."""
    model_type, changes, kind = FAMILIES[family]
    tokenizer = tokenizer_of(kind)
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    config = AutoConfig.for_model(model_type, **(SIZES | ids | changes))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.05)
                if "norm" in name:  # what 1 is added to keeps all its bits
                    parameter.copy_((parameter * 256).round() / 256)
    model.to(dtype).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
