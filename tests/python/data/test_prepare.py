"""Training data: what is trained of each format, what is cut, held out and kept."""

import re
import shutil
from pathlib import Path

import pytest
import yaml
from transformers import ByT5Tokenizer

from corpus import EOS, RENDERED, TEMPLATE, TOKENIZER, TURNS, documents, make_tokenizer, ready, write
from megatrain_io.data import text_files
from megatrain_io.data.packing import RowWriter
from megatrain_io.data.prepare import _CACHE_VERSION, DataOptions, prepare
from megatrain_io.data.tokenize import Encoder
from megatrain_io.errors import ConfigError, DataError, StorageError

# ------------------------------------------------------------------------------------ what is trained


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.txt", "One. Two.", f"O{{+ne. Two.{EOS}+}}"),
        ("a.md", "\ufeffOne.\r\nTwo.", f"O{{+ne.\nTwo.{EOS}+}}"),
        ("a.jsonl", [{"text": "One."}], f"O{{+ne.{EOS}+}}"),
        ("a.json", '[\n {"text": "One."}\n]', f"O{{+ne.{EOS}+}}"),
        ("a.jsonl", [{"prompt": "1+1=", "completion": "2"}], f"1+1={{+2{EOS}+}}"),
        ("a.jsonl", [{"prompt": "1+1=", "completion": f"2{EOS}"}], f"1+1={{+2{EOS}+}}"),
        ("a.csv", 'prompt,completion\n"1,\n1=",2\n', f"1,\n1={{+2{EOS}+}}"),
        ("a.jsonl", [{"messages": TURNS}], RENDERED),
        ("a.jsonl", [{"messages": [{"role": "assistant", "content": "Hm"}, *TURNS[:2]]}],
         "<|im_start|>assistant\nHm<|im_end|>\n" + RENDERED[: RENDERED.index("+}") + 3]),
        ("a.jsonl", [{"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yo"}]}],
         RENDERED[: RENDERED.index("+}") + 3]),
        ("a.jsonl", [{"instruction": "Hi", "input": "", "output": "Yo", "text": "both"}],
         RENDERED[: RENDERED.index("+}") + 3]),
        ("a.jsonl", [{"instruction": "Hi", "input": "x", "output": "Yo"}],
         "<|im_start|>user\nHi\n\nx<|im_end|>\n<|im_start|>assistant\n{+Yo<|im_end|>+}\n"),
    ],
)  # fmt: skip
def test_what_is_trained(tmp_path, name, content, expected):
    made = ready(tmp_path, content, name).train
    assert documents(made) == [expected]
    assert made.trained_tokens == int((made.micro_batch([0]).shift_labels != -100).sum())


def test_all_of_a_conversation_is_trained_on_request(tmp_path):
    made = ready(tmp_path, [{"messages": TURNS[:2]}], assistant_only_loss=False).train
    whole = "im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nYo<|im_end|>"
    assert documents(made) == [f"<|im_start|>{{+{whole.removeprefix('im_start|>')}+}}\n"]


def test_an_answer_without_an_end_of_turn_ends_with_eos(tmp_path):
    plain = make_tokenizer(template="{% for m in messages %}{{ m.role[0] }}:{{ m.content }}\n{% endfor %}"
                           "{% if add_generation_prompt %}a:{% endif %}")  # fmt: skip
    assert documents(ready(tmp_path, [{"messages": TURNS}], tokenizer=plain).train) == [
        f"u:Hi\na:{{+Yo\n+}}u:Bye\na:{{+So long\n{EOS}+}}"
    ]


def test_an_instruction_without_a_template_has_headings(tmp_path):
    made = ready(
        tmp_path, [{"instruction": "Hi", "output": "Yo"}], tokenizer=make_tokenizer(template=None)
    ).train
    assert documents(made) == [f"### Instruction:\nHi\n\n### Response:\n{{+Yo{EOS}+}}"]


def test_a_prompt_keeps_the_tokens_that_the_model_is_asked_with(tmp_path):
    made = ready(
        tmp_path, [{"prompt": "A: ", "completion": "Paris"}, {"prompt": "A:", "completion": " Paris"}]
    ).train
    assert documents(made) == [f"A: {{+Paris{EOS}+}}", f"A:{{+ Paris{EOS}+}}"]
    assert [len(made.micro_batch([i]).input_ids[0]) for i in range(2)] == [9, 8], (
        "space and P apart; together"
    )


def test_bos_comes_first_where_the_tokenizer_puts_it_and_no_template_does(tmp_path):
    tokenizer = make_tokenizer(bos=True)
    content = [{"text": "One.\n\nTwo."}]
    assert documents(ready(tmp_path, content, tokenizer=tokenizer).train) == [f"<s>{{+One.\n\nTwo.{EOS}+}}"]
    assert documents(ready(tmp_path, content, tokenizer=tokenizer, max_length=8).train) == [
        "<s>{+One.\n\n+}",
        f"<s>{{+Two.{EOS}+}}",
    ]
    assert documents(ready(tmp_path, [{"messages": TURNS}], tokenizer=tokenizer).train) == [RENDERED]


def test_keys_are_renamed_and_formats_forced(tmp_path):
    made = ready(tmp_path, [{"q": "1", "a": "2", "text": "x"}], fields={"prompt": "q", "completion": "a"})
    assert documents(made.train) == [f"1{{+2{EOS}+}}"]
    made = ready(tmp_path, [{"prompt": "1", "completion": "2", "text": "x y"}], format="text")
    assert documents(made.train) == [f"x{{+ y{EOS}+}}"]
    made = ready(tmp_path, "any words", "notes.log", format="text")
    assert made.summary.files[0].format == "text"
    turns = [{"who": "user", "says": "Hi"}, {"who": "assistant", "says": "Yo"}]
    made = ready(tmp_path, [{"chat": turns}], fields={"messages": "chat", "role": "who", "content": "says"})
    assert documents(made.train) == [RENDERED[: RENDERED.index("+}") + 3]]


# ---------------------------------------------------------------------------------------- what is long


def test_long_text_is_split_at_paragraphs_then_lines_then_anywhere(tmp_path):
    text = "Aaaa.\n\nBb.\n\nCc.\n\nDddd\nEeee\nFfff\n\nGgggggggggggggggg"
    made = ready(tmp_path, text, "a.txt", max_length=13)
    found = [re.sub(r"{\+|\+}", "", document) for document in documents(made.train)]
    assert found == ["Aaaa.\n\nBb.\n\n", "Cc.\n\nDddd\n", "Eeee\nFfff\n\n", "Gggggggggggg", f"ggggg{EOS}"]
    assert made.summary.files[0].documents == 1
    assert made.summary.cut == made.summary.dropped == 0


@pytest.mark.parametrize("border", ["\n\n", "\n"], ids=["paragraphs", "lines"])
def test_a_long_file_is_read_in_passages_and_is_one_document(tmp_path, monkeypatch, border):
    text = border.join(f"Paragraph {i}." for i in range(100)) + "\n\n \n"
    whole = "".join(documents(ready(tmp_path, text, "a.txt").train))
    monkeypatch.setattr(text_files, "_PASSAGE_CHARACTERS", 40)
    shutil.rmtree(tmp_path / "cache")
    made = ready(tmp_path, text, "a.txt")
    passages = documents(made.train)
    assert len(passages) > 5
    assert re.sub(r"{\+|\+}", "", "".join(passages)).split() == re.sub(r"{\+|\+}", "", whole).split()
    assert [EOS in passage for passage in passages] == [False] * (len(passages) - 1) + [True]
    assert made.summary.files[0].documents == 1


def test_long_examples_are_cut_and_dropped_by_number(tmp_path):
    content = [
        {"prompt": "p" * 5, "completion": "c" * 2},
        {"prompt": "p" * 5, "completion": "c" * 20},
        {"prompt": "p" * 200, "completion": "c"},
        {"messages": TURNS[:1]},
    ]
    made = ready(tmp_path, content[:3], max_length=10, packing=False)
    assert documents(made.train) == [f"ppppp{{+cc{EOS}+}}", "ppppp{+ccccc+}"]
    summary = made.summary
    nothing = "they would train nothing and were dropped"
    lengths = "Longest is 202 tokens; 95 % fit in 256."
    assert (summary.cut, summary.dropped, summary.longest) == (2, 1, 202)
    assert summary.notes[:2] == (
        f"1 of 3 examples have no trained token left after max_length 10; {nothing}. {lengths}",
        f"1 of 3 examples were cut off at max_length 10. {lengths}",
    )
    with pytest.raises(DataError) as refused:
        ready(tmp_path, content[2:3] * 4, max_length=10)
    assert str(refused.value) == (
        "data.train: nothing is left to train on. 4 of 4 examples have no trained token left after max_length 10; "
        f"{nothing}. {lengths}"
    )
    with pytest.raises(DataError, match=r"left to train on\. 1 example had nothing to train \(no answer"):
        ready(tmp_path, content[3:])


# -------------------------------------------------------------------------------------- chat templates


def test_a_base_model_gets_a_template_by_name_file_or_text(tmp_path):
    base = make_tokenizer(template=None)
    content = [{"messages": TURNS}]
    with pytest.raises(DataError) as refused:
        ready(tmp_path, content, tokenizer=base)
    assert str(refused.value) == (
        f"This base model has no chat template but the data are messages ({tmp_path}/in/data.jsonl line 1). "
        f"Choose data.chat_template: chatml, or use the instruction-tuned model."
    )
    made = ready(tmp_path, content, tokenizer=base, chat_template="chatml")
    assert documents(made.train) == [RENDERED]
    assert "<|im_start|>" in made.chat_template
    file = write(tmp_path / "mine.jinja", TEMPLATE.replace("\n", "~"))
    made = ready(tmp_path, content[:1], tokenizer=base, chat_template=str(file))
    assert made.chat_template == file.read_text()
    made = ready(tmp_path, content, tokenizer=base, chat_template=TEMPLATE)
    assert made.chat_template == TEMPLATE
    with pytest.raises(DataError, match="'chatlm' is neither chatml nor a text file that can be read"):
        ready(tmp_path, content, chat_template="chatlm")


@pytest.mark.parametrize(
    ("template", "error"),
    [
        (
            "{{ messages | length }} turns\n" + TEMPLATE,
            r"line 2: the chat template renders what is before turn 4 of 4 otherwise .* Set data\.assistant_only_loss",
        ),
        (
            "{{ raise_exception('no user here') }}",
            r"line 2: the chat template does not render the first 4 of 4 turns \(user .*\): no user here\. Choose",
        ),
    ],
    ids=["not prefix-stable", "raises"],
)
def test_templates_that_cannot_be_masked_are_refused(tmp_path, template, error):
    content = [{"messages": [{"role": "user", "content": "no answer"}]}, {"messages": TURNS}]
    bad = make_tokenizer(template="{% if messages | length > 1 %}" + template + "{% endif %}")
    with pytest.raises(DataError, match=error):
        ready(tmp_path, content, tokenizer=bad)
    if "length }}" in template:
        assert len(ready(tmp_path, content, tokenizer=bad, assistant_only_loss=False).train) == 1


def test_templates_are_told_the_same_day_every_day(tmp_path):
    """Llama 3's writes the date into each conversation: data made again after a crash would have been others."""
    dated = make_tokenizer(
        template="{% if strftime_now is defined %}{{ strftime_now('%d %b %Y') }}\n{% endif %}" + TEMPLATE
    )
    made = ready(tmp_path, [{"messages": TURNS}], tokenizer=dated)
    assert documents(made.train) == ["26 Jul 2024\n" + RENDERED]


def test_templates_see_tools_and_reasoning(tmp_path):
    template = "{{ tools[0].name }} {{ messages[1].reasoning }} {{ messages[0].content }}"
    row = {"messages": [TURNS[0], {**TURNS[1], "reasoning": "because"}], "tools": [{"name": "clock"}]}
    made = ready(tmp_path, [row], tokenizer=make_tokenizer(template=template), assistant_only_loss=False)
    assert documents(made.train) == [f"c{{+lock because Hi{EOS}+}}"]


# --------------------------------------------------------------------------------------------- holding out

TEXTS = [{"text": f"document {i}"} for i in range(50)]


def test_a_share_is_held_out_by_content_and_not_by_order(tmp_path):
    made = ready(tmp_path, TEXTS, eval=0.1)
    held_out = documents(made.eval)
    assert len(held_out) == 5
    assert sorted(documents(made.train) + held_out) == sorted(
        f"d{{+{row['text'][1:]}{EOS}+}}" for row in TEXTS
    )
    again = ready(tmp_path, TEXTS[::-1], eval=0.1)
    assert sorted(documents(again.eval)) == sorted(held_out)
    other = ready(tmp_path, TEXTS, eval=0.1, seed=1)
    assert sorted(documents(other.eval)) != sorted(held_out)
    assert len(ready(tmp_path, TEXTS[:2], eval=0.01).eval) == 1, "never none"


def test_the_same_text_is_never_on_both_sides(tmp_path):
    made = ready(tmp_path, TEXTS * 3, eval=0.1)
    assert not set(documents(made.train)) & set(documents(made.eval))


def test_what_is_held_out_may_be_a_file(tmp_path):
    made = ready(tmp_path, TEXTS, eval=write(tmp_path / "held.txt", "held"))
    assert documents(made.eval) == [f"h{{+eld{EOS}+}}"]
    assert len(made.train) == 50
    assert [Path(file.path).name for file in made.summary.files] == ["data.jsonl", "held.txt"]
    assert ready(tmp_path, TEXTS).eval is None
    assert not (tmp_path / "cache" / "eval.tokens").exists()


def test_one_document_is_not_shared_out(tmp_path):
    with pytest.raises(DataError) as refused:
        ready(tmp_path, "all of it", "a.txt", eval=0.02)
    assert str(refused.value) == (
        "data.eval: a share of 0.02 cannot be held out of 1 document (1 different); a plain-text file is one "
        "document. Split the data into more documents, or give data.eval a file of its own."
    )


# ------------------------------------------------------------------------------------------------ the cache


class Counting:
    """How often texts were tokenised to train on them."""

    def __init__(self, monkeypatch):
        self.calls = 0
        original = Encoder.encode

        def encode(encoder, batch):
            self.calls += 1
            return original(encoder, batch)

        monkeypatch.setattr(Encoder, "encode", encode)


def test_tokens_are_made_once(tmp_path, monkeypatch):
    counting = Counting(monkeypatch)
    first = ready(tmp_path, TEXTS, eval=0.1)
    assert (counting.calls, first.reused) == (1, False)
    again = ready(tmp_path, TEXTS, eval=0.1)
    assert (counting.calls, again.reused) == (1, True)
    assert documents(again.train) == documents(first.train)
    assert again.summary == first.summary
    (tmp_path / "in").rename(tmp_path / "moved")
    source = tmp_path / "moved" / "data.jsonl"
    options = DataOptions((source,), max_length=300, eval=0.1)
    moved = prepare(options, TOKENIZER, tmp_path / "cache", packs=False)
    assert (counting.calls, moved.summary.files[0].path) == (1, str(source))


@pytest.mark.parametrize(
    "change",
    [
        {"max_length": 301},
        {"format": "text"},
        {"fields": {"prompt": "question"}},
        {"eval": 0.2},
        {"seed": 1},
        {"assistant_only_loss": False},
        {"chat_template": "chatml"},
        {"packs": True},
        {"name": "other.jsonl"},
        {"content": TEXTS[1:]},
        {"tokenizer": make_tokenizer(bos=True)},
        {"tokenizer": make_tokenizer(template="{{ messages }}")},
        {"tokenizer": make_tokenizer(eos_token="<|im_end|>")},  # noqa: S106 - no password
    ],
    ids=str,
)
def test_tokens_are_made_anew_when_anything_changed_that_decides_them(tmp_path, change):
    unchanged = {"content": TEXTS, "eval": 0.1}
    first = ready(tmp_path, **unchanged)
    assert ready(tmp_path, **unchanged).reused
    changed = ready(tmp_path, **{**unchanged, **change})
    assert not changed.reused
    assert changed.fingerprint != first.fingerprint
    back = ready(tmp_path, **unchanged)
    assert (back.fingerprint, back.train.sha256) == (first.fingerprint, first.train.sha256)


def test_padding_and_cutting_of_earlier_calls_change_nothing(tmp_path):
    tokenizer = make_tokenizer()
    ready(tmp_path, TEXTS, tokenizer=tokenizer)
    tokenizer(["a", "abc"], padding=True, truncation=True, max_length=2)
    assert ready(tmp_path, TEXTS, tokenizer=tokenizer).reused


@pytest.mark.parametrize("name", ["index.json", "train.tokens", "eval.tokens"])
@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_a_damaged_cache_is_made_anew(tmp_path, name, damage):
    first = ready(tmp_path, TEXTS, eval=0.1)
    path = tmp_path / "cache" / name
    whole = path.read_bytes()
    for at in range(0, len(whole), max(1, len(whole) // 5)):
        if damage == "flip":
            path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        elif damage == "cut":
            path.write_bytes(whole[:at])
        else:
            path.unlink(missing_ok=True)
        made = ready(tmp_path, TEXTS, eval=0.1)
        assert not made.reused
        assert (made.train.sha256, made.eval.sha256) == (first.train.sha256, first.eval.sha256)
        assert path.read_bytes() == whole


def test_a_full_disk_is_named(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(RowWriter, "finish", full)
        with pytest.raises(StorageError, match=r"cannot be written to .*cache: No space left on device\."):
            ready(tmp_path, TEXTS)
    assert not ready(tmp_path, TEXTS).reused, "nothing half made is used"


def test_tokenizers_in_python_do_too(tmp_path):
    tokenizer = ByT5Tokenizer()
    assert not tokenizer.is_fast
    content = [{"prompt": "1+1=", "completion": "2"}]
    assert documents(ready(tmp_path, content, tokenizer=tokenizer).train, tokenizer) == ["1+1={+2</s>+}"]
    assert ready(tmp_path, content, tokenizer=tokenizer).reused


def test_damage_during_the_run_is_named(tmp_path):
    made = ready(tmp_path, TEXTS)
    path = tmp_path / "cache" / "train.tokens"
    path.write_bytes(path.read_bytes()[:10])
    with pytest.raises(DataError, match=r"train\.tokens is damaged: .* start again, and it is made anew"):
        made.train.micro_batch([0])


def test_the_same_data_give_the_same_tokens_for_ever(tmp_path):
    """Whoever changes this raises `_CACHE_VERSION`: runs that were begun before would go on with other rows."""
    made = ready(tmp_path, [{"messages": TURNS}] * 9, packs=True)
    assert _CACHE_VERSION == 2, "the same rows, and an index that says how to ask"
    assert made.train.sha256[:16] == "4dcd0468e0c63e29"


# ---------------------------------------------------------------------------------------- what is shown


def test_the_summary_shows_files_rows_notes_and_a_sample(tmp_path):
    folder = tmp_path / "in"
    for i in range(12):
        write(folder / f"{i:02}.txt", "word " * i)
    write(folder / "a.jsonl", [{"messages": TURNS[:2]}])
    write(folder / "cat.png", b"\x89PNG\0")
    write(folder / ".git" / "x.txt", "hidden")
    options = DataOptions((folder,), max_length=64)
    calls = []
    made = prepare(
        options, TOKENIZER, tmp_path / "cache", packs=True, progress=lambda *seen: calls.append(seen)
    )
    assert calls == sorted(calls)
    assert {total for _, total in calls} == {calls[-1][0]}
    lines = str(made.summary).replace(str(folder), "IN").split("\n")
    (sentence,) = made.summary.not_read
    assert sentence.replace(str(folder), "IN") == (
        "1 of 14 files in IN are not read (1 % of its bytes, 5 bytes of 425 bytes): 1 .png (cat.png). Only "
        ".txt .md .jsonl .json .ndjson .csv .tsv are: save what is to be trained as one of these"
    )
    assert lines[:3] == [
        "  IN/00.txt: empty, 0 documents, 0 tokens",
        "  IN/01.txt: text, 1 document, 6 tokens",
        "  IN/02.txt: text, 1 document, 11 tokens",
    ]
    assert lines[10:] == [
        "  3 more files: 3 documents, 132 tokens",
        "train: 6 rows of up to 64 tokens (packed, 95.3 % full), 366 tokens, 333 trained",
        "sample (IN/01.txt), {+trained+}:",
        f"  | w{{+ord {EOS}+}}",
    ]


def test_an_empty_file_among_others_is_no_error(tmp_path):
    write(tmp_path / "in" / "empty.txt", "")
    write(tmp_path / "in" / "blank.jsonl", "\n\n")
    write(tmp_path / "in" / "full.txt", "words")
    made = prepare(DataOptions((tmp_path / "in",)), TOKENIZER, tmp_path / "cache", packs=True)
    assert documents(made.train) == [f"w{{+ords{EOS}+}}"]


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"max_length": 1}, "data.max_length: 1 is too short"),
        ({"eval": 1.0}, "data.eval: 1.0 is not a share between 0 and 1"),
        (
            {"format": "chat"},
            "data.format: 'chat' is not one of text, prompt_completion, messages, alpaca, sharegpt",
        ),
        ({"fields": {"promt": "q"}}, "data.fields: 'promt' is not one of .* prompt"),
    ],
)
def test_options_that_contradict_themselves_are_refused(tmp_path, options, error):
    with pytest.raises(ConfigError, match=error):
        ready(tmp_path, TEXTS, **options)


@pytest.mark.parametrize(
    ("row", "fields"),
    [
        (
            {"prompt": "Who?", "chosen": "I.", "rejected": "You."},
            {"prompt": "prompt", "completion": "chosen"},
        ),
        (
            {"question": "Who?", "chosen": "I.", "rejected": "You."},
            {"prompt": "question", "completion": "chosen"},
        ),
        ({"chosen": TURNS[:2], "rejected": TURNS[2:]}, {"messages": "chosen"}),
        ({"input": "Who?", "chosen": "I.", "rejected": "You."}, {"prompt": "input", "completion": "chosen"}),
        (
            {"chosen": "Human: who? Assistant: I.", "rejected": "Human: who? Assistant: you."},
            {"text": "chosen"},
        ),
    ],
    ids=["prompt", "question", "turns", "input", "in one"],
)
def test_preference_pairs_are_refused_with_a_mapping_that_works(tmp_path, row, fields):
    """The advice named columns that the data had not."""
    with pytest.raises(DataError, match="preference pairs are not trained") as refused:
        ready(tmp_path, [row])
    assert "{" + ", ".join(f"{key}: {value}" for key, value in fields.items()) + "}." in str(refused.value)
    assert documents(ready(tmp_path, [row], fields=fields).train)


def test_preference_pairs_of_turns_are_told_to_be_joined(tmp_path):
    """Answers alone would be trained without their questions, or dropped."""
    row = {"prompt": TURNS[:1], "chosen": TURNS[1:2], "rejected": TURNS[1:2]}
    with pytest.raises(
        DataError, match="write prompt and chosen of each line as one list under the key messages"
    ):
        ready(tmp_path, [row])
    assert documents(ready(tmp_path, [{"messages": row["prompt"] + row["chosen"]}]).train)


@pytest.mark.parametrize(
    ("row", "advised"),
    [
        ({"id": 7, "question": "Who?", "answer": "I."}, "{instruction: question, output: answer}"),
        ({"Frage": "Who?", "Antwort": "I."}, "{instruction: Frage, output: Antwort}"),
        ({"my text: x, y": "Fox and hen."}, '{text: "my text: x, y"}'),
        ({"a": "1", "b": "2", "c": "3"}, "{instruction: KEY_OF_THE_QUESTION, output: KEY_OF_THE_ANSWER}"),
    ],
    ids=["known", "two", "quoted", "unknown"],
)
def test_unknown_keys_are_refused_with_a_mapping_that_is_yaml(tmp_path, row, advised):
    with pytest.raises(DataError) as refused:
        ready(tmp_path, [row])
    assert f"data.fields: {advised}" in str(refused.value)
    fields = yaml.safe_load(advised)
    if set(fields.values()) <= row.keys():
        assert documents(ready(tmp_path, [row], fields=fields).train)
