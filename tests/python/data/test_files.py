"""Files that cannot be trained on: each is refused in a sentence that names the place and what to do."""

import json
import re

import pytest

from corpus import TOKENIZER, TURNS, documents, ready, write
from megatrain_io.data.prepare import DataOptions, prepare
from megatrain_io.errors import DataError

UNKNOWN_KEYS = (
    "a.jsonl line 3 has keys [question, answer]. Known: text | prompt+completion | messages | instruction+output | "
    "conversations. Map with data.fields: {prompt: question, completion: answer}."
)
GOOD = '{"text": "good"}\n'


def turn(**changes):
    return json.dumps({"messages": [TURNS[0], {**TURNS[1], **changes}]})


@pytest.mark.parametrize(
    ("name", "content", "error"),
    [
        ("a.jsonl", GOOD + '{"question": "1", "answer": "2"}',
         "a.jsonl line 2 has keys [question, answer], but the file's first example is text, which needs [text]."),
        ("a.jsonl", '\n\n{"question": "1", "answer": "2"}',
         UNKNOWN_KEYS),
        ("a.jsonl", GOOD + '{"text": "cut o',
         "a.jsonl line 2 is not JSON: Unterminated string starting at at column 10. Each line must be one whole"),
        ("a.json", '{\n  "text": "pretty"\n}', "a.json line 1 is not JSON: Expecting property name enclosed"),
        ("a.json", '\n[{"text": "x"},\n {"text": }]', "a.json line 3 is not JSON: Expecting value at column 11."),
        ("a.json", '[{"text": "x"}, 3]', "a.json example 2 is a number, not an object such as"),
        ("a.jsonl", GOOD + '"text"', "a.jsonl line 2 is text, not an object such as"),
        ("a.jsonl", "[" * 100_000, "a.jsonl cannot be read: "),
        ("a.jsonl", '{"text": "\\ud83d"}', "a.jsonl line 1 holds half a character, \\ud83d: an emoji was cut"),
        ("a.jsonl", '{"text": 3}', "a.jsonl line 1: text is a number; it must be text in quotes."),
        ("a.jsonl", '{"prompt": "x", "completion": null}', "a.jsonl line 1: completion is null; it must be text"),
        ("a.jsonl", '{"instruction": "x", "input": ["y"], "output": "z"}', "line 1: input is a list; it must be"),
        ("a.jsonl", '{"messages": "hi"}', "a.jsonl line 1: messages is text; it must be a list of objects."),
        ("a.jsonl", '{"messages": ["hi"]}', "a.jsonl line 1: messages[0] is text; it must be an object."),
        ("a.jsonl", '{"messages": []}', "a.jsonl line 1: messages is an empty list. Remove the line."),
        ("a.jsonl", '{"messages": [{"who": "user"}]}',
         "a.jsonl line 1, messages[0] has keys [who]. Each turn needs role+content or from+value;"),
        ("a.jsonl", turn(role="robot"), "line 1, messages[1]: the role 'robot' is unknown. Known: system, developer"),
        ("a.jsonl", turn(content=[{"type": "text"}]), "line 1, messages[1]: content is a list; it must be text"),
        ("a.jsonl", '{"messages": [{"role": "user"}]}', "line 1, messages[0]: content is missing; it must be text"),
        ("a.csv", "text\n\ngood\na,b\n", "a.csv line 4 has 2 cells, but the header has 1: text. Put cells that"),
        ("a.csv", 'text\n"good"\n"never closed\n', "a.csv line 3 is not CSV: unexpected end of data. Look for"),
        ("a.csv", "prompt;completion\na;b\n", "a.csv line 2 has keys [prompt;completion]. Known: text | prompt"),
        ("a.txt", b"caf\xe9", "a.txt line 1 is not UTF-8 (byte 0xe9 at position 3). Convert it: iconv -f LATIN1"),
        ("a.jsonl", GOOD.encode() + b'{"text": "caf\xe9"}', "a.jsonl line 2 is not UTF-8 (byte 0xe9 at position 13)"),
        ("a.txt", b"ok\nPK\0\1", "a.txt line 2 holds a zero byte: this is no text. Remove the file"),
        ("a.txt", b"version https://git-lfs.github.com/spec/v1\noid", "a.txt is a Git-LFS pointer (46 bytes), not"),
        ("a.txt", "", "data.train: no documents in a.txt (0 bytes). The files are empty: give others."),
        ("a.csv", "text\n", "data.train: no documents in a.csv (5 bytes). The files are empty: give others."),
        ("a.jsonl", '{"text": " "}', "data.train: nothing is left to train on. 1 example had nothing to train"),
        ("a.docx", "x", "a.docx: the extension .docx is not one of .txt .md .jsonl .json .ndjson .csv. Say what"),
        ("a.parquet", "PAR1", "a.parquet is a Parquet file, which this version does not read. Convert it to JSON"),
        ("a.arrow", "x", "which this version does not read. Convert it to JSON lines first: datasets.load_from"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_named(tmp_path, name, content, error):
    with pytest.raises(DataError) as refused:
        ready(tmp_path, content, name)
    assert error in str(refused.value).replace(f"{tmp_path}/in/", "")
    assert not (tmp_path / "cache" / "index.json").exists()


def test_a_forced_format_says_that_it_was(tmp_path):
    with pytest.raises(
        DataError, match=r"line 1 has keys \[text\], but data.format says messages, which needs"
    ):
        ready(tmp_path, GOOD, format="messages")
    with pytest.raises(DataError, match=r"a.txt is plain text, and data.format: messages needs keys"):
        ready(tmp_path, "words", "a.txt", format="messages")


def test_missing_files_and_folders_without_any_are_named(tmp_path):
    def refusal(*sources, **options):
        with pytest.raises(DataError) as refused:
            prepare(DataOptions(sources, **options), TOKENIZER, tmp_path / "cache", packs=True)
        return str(refused.value).replace(str(tmp_path), "TMP")

    assert refusal(tmp_path / "no.txt").startswith(
        "data.train: there is no file or folder TMP/no.txt (looked for in"
    )
    good = write(tmp_path / "in" / "a.txt", "words")
    assert refusal(good, eval=tmp_path / "no.txt").startswith(
        "data.eval: there is no file or folder TMP/no.txt"
    )
    write(tmp_path / "empty" / "a.png", b"x")
    assert refusal(tmp_path / "empty") == (
        "data.train: no .txt .md .jsonl .json .ndjson .csv file in TMP/empty; 1 found, but TMP/empty/a.png was "
        "skipped: only .txt .md .jsonl .json .ndjson .csv are read from a folder. Give a file or a folder of them."
    )
    blank = write(tmp_path / "blank.txt", " \n")
    assert refusal(good, eval=blank) == (
        "data.eval: no documents in TMP/blank.txt (2 bytes). The files are empty: give others."
    )
    write(tmp_path / "set" / "part-0.parquet", b"PAR1")
    write(tmp_path / "set" / "README.md", "words")
    assert "part-0.parquet is a Parquet file" in refusal(tmp_path / "set"), "not the README alone"


def test_cells_may_be_long_and_the_limit_of_the_process_stays(tmp_path):
    import csv

    before = csv.field_size_limit()
    made = ready(tmp_path, 'text\n"' + "long\n" * 27_000 + '"\n', "a.csv", max_length=100_000)
    assert made.train.tokens == 135_001, "with eos"
    assert csv.field_size_limit() == before


def test_files_of_a_folder_come_by_name(tmp_path):
    for name in ("b.txt", "a/z.txt", "a.txt", "C.txt"):
        write(tmp_path / "in" / name, f"file {name}")
    made = prepare(DataOptions((tmp_path / "in",), packing=False), TOKENIZER, tmp_path / "cache", packs=True)
    assert [re.search(r"ile (.*)<", text)[1] for text in documents(made.train)] == [
        "C.txt",
        "a/z.txt",
        "a.txt",
        "b.txt",
    ]


def test_a_readme_beside_the_data_is_not_trained(tmp_path):
    write(tmp_path / "in" / "README.md", "about the data")
    write(tmp_path / "in" / "sub" / "data.jsonl", GOOD)
    made = prepare(DataOptions((tmp_path / "in",)), TOKENIZER, tmp_path / "cache", packs=True)
    assert documents(made.train) == ["g{+ood<|endoftext|>+}"]
    assert "README.md was skipped: it is about the data beside it" in made.summary.notes[0]
    (tmp_path / "in" / "sub" / "data.jsonl").rename(tmp_path / "in" / "sub" / "data.txt")
    made = prepare(DataOptions((tmp_path / "in",)), TOKENIZER, tmp_path / "cache", packs=True)
    assert made.train.documents == 2
