"""Data with other values, keys and bytes than a person meant: trained, or refused in a sentence."""

import json
import os
import random

import pytest

from corpus import TEMPLATE, TOKENIZER, TURNS, make_tokenizer, ready
from megatrain_io.errors import DataError

SEEDS = int(os.environ.get("MEGATRAIN_SOAK_SEEDS", "60"))
CALL = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}
ROWS = [
    {"messages": TURNS, "tools": [{"type": "function", "function": {"name": "f"}}], "system": "s"},
    {"messages": [TURNS[0], CALL, {"role": "tool", "content": "3", "tool_call_id": "a"}, TURNS[1]]},
    {"instruction": "Hi", "output": "Yo", "input": "x", "history": [["a", "b"]], "system": "s"},
    {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yo"}]},
    {"prompt": "a", "completion": "b"},
    {"text": "abc"},
]
VALUES = [
    None, True, 0, -1, 2.5, 1e308, "", " ", "\0", "\U0001f600", "{{ x }}", "<|im_end|>", "<s>", [], {}, [[]], ["a"],
    [["a", "b"]], [{}], {"a": 1}, TURNS[:1], {"function": {"name": "f", "arguments": {}}}, "[1]", '{"a": [1]}', "null",
]  # fmt: skip
KEYS = [
    "weight",
    "name",
    "train",
    "images",
    "tool_calls",
    "system",
    "history",
    "reasoning_content",
    "tools",
    "id",
]
TABLE = 'prompt,completion\nab,cd\n"x, y","z"\n'


def changed(choose, value):
    """Something within a value is another one, gone, or new."""
    if isinstance(value, dict) and choose.random() < 0.7:
        key = choose.choice([*value, *KEYS])
        if choose.random() < 0.2:
            return {name: inner for name, inner in value.items() if name != key}
        return value | {key: changed(choose, value[key]) if key in value else choose.choice(VALUES)}
    if isinstance(value, list) and value and choose.random() < 0.8:
        at = choose.randrange(len(value))
        return [*value[:at], changed(choose, value[at]), *value[at + 1 :]]
    return choose.choice(VALUES)


def damaged(choose, content):
    content = bytearray(content)
    for _ in range(choose.randrange(1, 4)):
        at = choose.randrange(len(content))
        how = choose.choice(["flip", "cut", "insert"])
        content[at : at + (choose.randrange(1, 9) if how == "cut" else how == "flip")] = (
            b"" if how == "cut" else choose.randbytes(1 if how == "flip" else 3)
        )
    return bytes(content)


TOKENIZERS = [TOKENIZER, make_tokenizer(template=None), make_tokenizer(template=TEMPLATE, bos=True)]


@pytest.mark.parametrize("tokenizer", TOKENIZERS, ids=["template", "none", "bos"])
def test_damaged_data_are_trained_or_refused_in_a_sentence(tmp_path, tokenizer):
    outcomes, refusals = [], []
    for seed in range(SEEDS):
        choose = random.Random(seed)
        row = choose.choice(ROWS)
        rows = [row, changed(choose, changed(choose, row))]
        kind, text = choose.choice(
            [("jsonl", "\n".join(map(json.dumps, rows))), ("json", json.dumps(rows)), ("csv", TABLE)]
        )
        content = damaged(choose, text.encode()) if choose.random() < 0.5 else text.encode()
        options = {"packs": choose.random() < 0.5, "eval": 0.5 if choose.random() < 0.2 else None}
        try:
            made = ready(tmp_path, content, f"a.{kind}", tokenizer=tokenizer, **options)
            batches = [made.train.micro_batch([i]) for i in range(len(made.train))]
            outcomes.append(all((batch.shift_labels != -100).any() for batch in batches))
        except DataError as error:
            refusals.append(str(error))
    assert False not in outcomes, "something is trained in each row"
    assert outcomes
    assert refusals
    assert [text for text in refusals if str(tmp_path) not in text and not text.startswith("data.")] == []
