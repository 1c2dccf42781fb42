"""Special tokens are put once, by one rule, whether the data or the prompt have them already or not."""

import pytest
from tokenizers import processors
from transformers import ByT5Tokenizer

from corpus import EOS, documents, make_tokenizer, ready
from megatrain_io.data.special_tokens import SpecialTokens

BOS = make_tokenizer(bos=True)


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"text": "One"}, f"<s>{{+One{EOS}+}}"),
        ({"text": "<s>One"}, f"<s>{{+One{EOS}+}}"),
        ({"text": f"<s>One{EOS}"}, f"<s>{{+One{EOS}+}}"),
        ({"prompt": "One", "completion": "two"}, f"<s>One{{+two{EOS}+}}"),
        ({"prompt": "<s>One", "completion": "two"}, f"<s>One{{+two{EOS}+}}"),
        ({"prompt": "", "completion": "two"}, f"<s>{{+two{EOS}+}}"),
        ({"prompt": "", "completion": "<s>two"}, f"<s>{{+two{EOS}+}}"),
    ],
    ids=str,
)
def test_bos_is_put_once_and_not_trained(tmp_path, row, expected):
    """Two were put, and the second one was trained."""
    assert documents(ready(tmp_path, [row], tokenizer=BOS).train) == [expected]


def test_so_it_is_with_text_that_is_split(tmp_path):
    """Here eos was put twice, too, where text had it and was so long that no try was made whether it fits."""
    text = "<s>" + "One two.\n\n" * 30 + EOS
    parts = documents(ready(tmp_path, [{"text": text}], tokenizer=BOS, max_length=20).train)
    assert len(parts) > 10
    assert all(part.startswith("<s>{+One") for part in parts[:-1])
    assert "".join(parts).count(EOS) == 1
    assert parts[-1].endswith(f"{EOS}+}}")


def test_bos_that_the_tokenizer_does_not_put_stays_where_the_data_have_it(tmp_path):
    plain = make_tokenizer()
    assert documents(ready(tmp_path, [{"text": "<s>One"}], tokenizer=plain).train) == [f"<s>{{+One{EOS}+}}"]
    assert SpecialTokens(plain).begin == []


def test_a_prompt_begins_as_what_was_trained():
    tokens = SpecialTokens(BOS)
    (bos,) = tokens.begin
    assert tokens.prompt("One")[0] == bos
    assert tokens.prompt("<s>One") == tokens.prompt("One")
    assert tokens.prompt("") == [bos]


def test_all_that_a_tokenizer_puts_before_a_text_is_put_and_nothing_behind_it():
    """GLM begins with two tokens, neither of them bos; others end every text with eos, which no prompt may end with."""
    tokenizer = make_tokenizer()
    names = ("<|im_start|>", "<s>", EOS)
    numbers = [(name, tokenizer.convert_tokens_to_ids(name)) for name in names]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"<|im_start|> <s> $A {EOS}", special_tokens=numbers
    )
    tokens = SpecialTokens(tokenizer)
    assert tokens.begin == [number for _, number in numbers[:2]]
    assert tokens.prompt("ab")[:2] == tokens.begin
    assert len(tokens.prompt("ab")) == 4
    assert SpecialTokens(ByT5Tokenizer()).begin == []


def test_words_and_spaces_that_were_added_are_no_marks():
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["\n\n", "porter", "</think>", "<end_of_turn>", "<|eot|>"])
    tokens = SpecialTokens(tokenizer)
    assert [tokens.mark_of(text) for text in ("a\n\n", "porter", "a</think>", "a")] == [None] * 4
    assert tokens.mark_of("a<end_of_turn>") == "<end_of_turn>"
    assert tokens.mark_of("a<|eot|>") == "<|eot|>"
    assert tokens.mark_of(f"a{EOS}") == EOS
