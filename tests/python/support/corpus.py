"""Small data, and a tokenizer small enough to tell its tokens by eye, for the tests of training data."""

import json

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from megatrain_io.data import tokenize
from megatrain_io.data.prepare import DataOptions, prepare

TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
EOS = "<|endoftext|>"
TURNS = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Yo"},
    {"role": "user", "content": "Bye"},
    {"role": "assistant", "content": "So long"},
]
RENDERED = (
    "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n{+Yo<|im_end|>+}\n"
    "<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\n{+So long<|im_end|>+}\n"
)


def make_tokenizer(*, template=TEMPLATE, bos=False, **changes):
    """A token for each byte, but one for " P"; padding is end of text, as in many real ones."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: i for i, letter in enumerate([*letters, "ĠP"])}
    backend = Tokenizer(models.BPE(vocabulary, [("Ġ", "P")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(
        [AddedToken(t, special=True) for t in (EOS, "<|im_start|>", "<|im_end|>", "<s>")]
    )
    if bos:
        backend.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", backend.token_to_id("<s>"))]
        )
    settings = {
        "eos_token": EOS,
        "pad_token": EOS,
        "bos_token": "<s>" if bos else None,
        "chat_template": template,
    }
    return PreTrainedTokenizerFast(tokenizer_object=backend, **{**settings, **changes})


TOKENIZER = make_tokenizer()


def write(path, content):
    """A file of what belongs into one of its kind."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, list):
        content = "".join(json.dumps(row) + "\n" for row in content)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def ready(tmp_path, content, name="data.jsonl", tokenizer=TOKENIZER, packs=False, **options):
    source = write(tmp_path / "in" / name, content)
    cache = tmp_path / "cache"
    return prepare(DataOptions((source,), **{"max_length": 300, **options}), tokenizer, cache, packs=packs)


def shown(batch, tokenizer=TOKENIZER):
    """Documents of a micro-batch as text, with what is trained marked."""
    found = []
    for b in range(len(batch.input_ids)):
        ids, labels = batch.input_ids[b].tolist(), batch.shift_labels[b].tolist()
        trained = [False, *(label != -100 for label in labels[:-1])]
        assert all(labels[t] == ids[t + 1] for t in range(len(ids) - 1) if trained[t + 1]), (
            "labels are shifted"
        )
        assert labels[-1] == -100
        starts = [0]
        if batch.position_ids is not None:
            starts = [t for t, position in enumerate(batch.position_ids[b].tolist()) if position == 0]
        for start, end in zip(starts, [*starts[1:], len(ids)], strict=True):
            piece = tokenize.Piece(np.array(ids[start:end]), np.array(trained[start:end]))
            found.append(tokenize.marked(tokenizer, piece))
    return found


def documents(made, tokenizer=TOKENIZER):
    return [text for i in range(len(made)) for text in shown(made.micro_batch([i]), tokenizer)]
