"""Files that cannot be trained on: each is refused in a sentence that names the place and what to do."""

import json
import os
import re
import shutil
import socket
import tracemalloc
from pathlib import Path

import pytest

from corpus import TOKENIZER, TURNS, documents, ready, write
from megatrain_io.data import text_files
from megatrain_io.data.files import not_read
from megatrain_io.data.prepare import DataOptions, prepare
from megatrain_io.data.text_files import LINE_BYTES_MAX
from megatrain_io.errors import DataError

UNKNOWN_KEYS = (
    "a.jsonl line 3 has keys [question, answer]. Known: text | prompt+completion | messages | instruction+output | "
    "conversations. Map with data.fields: {instruction: question, output: answer} to train answers in the chat "
    "template, or {prompt: question, completion: answer} to train them as they stand."
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
        ("a.jsonl", "[" * 100_000, "a.jsonl example 1 cannot be read: it is nested more than 100 deep. Remove it, or"),
        ("a.jsonl", GOOD + '{"a": ' + "[" * 3000, "a.jsonl line 2 cannot be read: it is nested more than 100 deep."),
        ("a.jsonl", '{"text": "x", "a": ' + "[" * 200 + "]" * 200 + "}", "line 1 cannot be read: it is nested"),
        ("a.jsonl", '{"text": ' + "1" * 5000 + "}",
         "a.jsonl line 1 cannot be read: Exceeds the limit (4300 digits) for integer string conversion"),
        ("a.jsonl", '{"te\\ud83dxt": ""}', "a.jsonl line 1 holds half a character, \\ud83d: an emoji was cut"),
        ("a.jsonl", '{"text": "a", "text": "b"}', "a.jsonl line 1 has the key 'text' twice: which one is meant cannot"),
        ("a.json", '[{"text": "x"}, {"text": "x", "y": {"z": 1, "z": 2}}]', "a.json example 2 has the key 'z' twice"),
        ("a.csv", "text,a,text\nx,y,z\n", "a.csv line 1 names the column 'text' twice: which one is meant cannot be"),
        ("a.csv", "text,\nx,y\n", "a.csv line 2 has a cell in a column without a name. Name the column, or empty it."),
        ("a.csv", "text,b\n" + "x,y\n" * 300 + 'x, "y"\n', "a.csv line 302 has a space before a quote, and the first"),
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
        ("a.csv", "pro;com\na;b\n", "a.csv line 2 has keys [pro, com]. Known: text | prompt"),
        ("a.txt", b"caf\xe9", "a.txt line 1 is not UTF-8 (byte 0xe9 at position 3): it looks like CP1252. Convert it"),
        ("a.jsonl", GOOD.encode() + b'{"text": "caf\xe9"}', "a.jsonl line 2 is not UTF-8 (byte 0xe9 at position 13)"),
        ("a.txt", b"ok\nPK\0\1", "a.txt line 2 holds a zero byte: it is no text. Leave it out."),
        ("a.txt", b"PK\3\4\0", "a.txt line 1 holds a zero byte: it is a zip archive, as .docx, .xlsx and .epub are."),
        ("a.txt", b"\x1f\x8b\x08", "a.txt line 1 is not UTF-8 (byte 0x8b at position 1): it is compressed by gzip."),
        ("a.txt", b"version https://git-lfs.github.com/spec/v1\noid", "a.txt is a Git-LFS pointer (46 bytes), not"),
        ("a.txt", "", "data.train: no documents in a.txt (0 bytes). The files are empty: give others."),
        ("a.csv", "text\n", "data.train: no documents in a.csv (5 bytes). The files are empty: give others."),
        ("a.jsonl", '{"text": " "}', "data.train: nothing is left to train on. 1 example had nothing to train"),
        ("a.docx", "PK\3\4", "a.docx is a zip archive, as .docx, .xlsx and .epub are, which is not read. Unpack"),
        ("a.jsonl.gz", b"\x1f\x8b\x08", "a.jsonl.gz is compressed by gzip, which is not read. Unpack it, or save its"),
        ("a.docx", "x", "a.docx: the extension .docx is not one of .txt .md .jsonl .json .ndjson .csv .tsv. Say what"),
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
        "data.train: no .txt .md .jsonl .json .ndjson .csv .tsv file in TMP/empty; 1 of 1 files in TMP/empty are not "
        "read (100 % of its bytes, 1 byte of 1 byte): 1 .png (a.png). Only .txt .md .jsonl .json .ndjson .csv .tsv "
        "are: save what is to be trained as one of these. Give a file or a folder of them."
    )
    blank = write(tmp_path / "blank.txt", " \n")
    assert refusal(good, eval=blank) == (
        "data.eval: no documents in TMP/blank.txt (2 bytes). The files are empty: give others."
    )
    write(tmp_path / "set" / "part-0.parquet", b"PAR1")
    write(tmp_path / "set" / "README.md", "words")
    assert "part-0.parquet is a Parquet file" in refusal(tmp_path / "set"), "not the README alone"


# ------------------------------------------------------------------------------- what is no file


def folder_with(tmp_path, name):
    folder = tmp_path / "in"
    write(folder / "a.txt", "words")
    return folder, folder / name


def made_from(folder, tmp_path):
    return prepare(DataOptions((folder,), packing=False), TOKENIZER, tmp_path / "cache", packs=True)


@pytest.mark.parametrize("name", ["b.txt", "b.jsonl"])
@pytest.mark.parametrize("kind", ["pipe", "socket", "device", "link to a pipe"])
def test_what_is_no_file_is_skipped_in_a_folder_and_refused_by_name(tmp_path, name, kind):
    """A pipe was opened and waited for without end, and a device such as /dev/zero was read without one."""
    folder, path = folder_with(tmp_path, name)
    if kind == "socket":
        relative = os.path.relpath(path)  # the name of a socket has 107 bytes at most
        server = socket.socket(socket.AF_UNIX)
        server.bind(relative if len(relative) < len(str(path)) else str(path))
        server.close()
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        os.mkfifo(tmp_path / "pipe" if kind.startswith("link") else path)
        if kind.startswith("link"):
            path.symlink_to(tmp_path / "pipe")
    made = made_from(folder, tmp_path)
    what = {"socket": "a socket", "device": "a device"}.get(kind, "a named pipe")
    assert made.train.documents == 1
    assert made.summary.notes[0] == f"{path} was skipped: it is {what}, not a file"
    with pytest.raises(
        DataError, match=f"{name} is {what}: only files can be trained on. Write what comes out"
    ):
        made_from(path, tmp_path)


def test_links_that_lead_nowhere_or_to_folders_are_noted(tmp_path):
    folder, path = folder_with(tmp_path, "b.txt")
    path.symlink_to(tmp_path / "gone.txt")
    write(tmp_path / "more" / "c.txt", "more words")
    (folder / "more").symlink_to(tmp_path / "more")
    write(folder / ".d.txt", "hidden")
    notes = made_from(folder, tmp_path).summary.notes
    assert [note.removeprefix(f"{folder}/") for note in notes] == [
        "more was skipped: links to folders are not followed. Name the folder that it leads to.",
        ".d.txt was skipped: its name begins with a dot",
        "b.txt was skipped: it is a link that leads nowhere",
    ]


def test_a_folder_that_may_not_be_looked_into_is_refused(tmp_path, monkeypatch):
    """It was left out without a word: os.walk passes over errors."""
    folder, path = folder_with(tmp_path, "private")
    path.mkdir()
    scandir = os.scandir

    def refusing(where):
        if str(where) == str(path):
            raise PermissionError(13, "Permission denied", str(where))
        return scandir(where)

    monkeypatch.setattr(os, "scandir", refusing)
    with pytest.raises(DataError, match=r"private cannot be read: Permission denied\. Correct"):
        made_from(folder, tmp_path)


@pytest.mark.parametrize("name", ["x" * 300, "a\0b.txt"], ids=["300 bytes", "zero byte"])
def test_names_that_no_file_can_have_are_refused(tmp_path, name):
    with pytest.raises(DataError, match=r"there is no file or folder|File name too long"):
        made_from(tmp_path / name, tmp_path)


def test_names_that_are_no_text_are_read(tmp_path):
    folder, _ = folder_with(tmp_path, "")
    Path(os.fsdecode(os.fsencode(folder) + b"/\xff.txt")).write_text("more")
    assert made_from(folder, tmp_path).train.documents == 2
    assert made_from(folder, tmp_path).reused


# ---------------------------------------------------------------------------- how much is not read


def test_what_is_not_read_stands_first_with_its_share(tmp_path):
    """Half of somebody's contracts were left out, with a note among others."""
    folder = tmp_path / "contracts"
    for i in range(16):
        write(folder / f"{i:02}.txt", "words " * 10)
    for i in range(9):
        write(folder / "old" / f"{i}.docx", b"PK" * 60)
    for i in range(5):
        write(folder / f"{i}.PDF", b"%PDF" * 30)
    line = (
        f"14 of 30 files in {folder} are not read (64 % of its bytes, 1.7 kB of 2.6 kB): 9 .docx, 5 .pdf (0.PDF, "
        "1.PDF, 2.PDF, ...). Only .txt .md .jsonl .json .ndjson .csv .tsv are: save what is to be trained as one of "
        "these"
    )
    made = made_from(folder, tmp_path)
    assert made.summary.not_read == (line,)
    assert made_from(folder, tmp_path).summary == made.summary, "from the cache, too"
    assert not_read([folder, tmp_path / "gone", folder / "00.txt"]) == [line]


# ------------------------------------------------------------------------------------ what is too long


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv"])
def test_rows_are_read_up_to_a_limit(tmp_path, name):
    """A line of 200 MB took 6 GB of memory."""
    long = "x" * (LINE_BYTES_MAX + 9)
    content = {
        "a.csv": f'text\n"{long}"\n',
        "a.jsonl": f'{{"text": "{long}"}}',
        "a.json": f'[{{"text": "{long}"}}]',
    }
    path = write(tmp_path / "in" / name, content[name])
    tracemalloc.start()
    try:
        with pytest.raises(DataError, match=r"more than 33,554,432 (bytes|characters)(, the| by now)"):
            made_from(path, tmp_path)
        assert tracemalloc.get_traced_memory()[1] < 8 * LINE_BYTES_MAX
    finally:
        tracemalloc.stop()


def test_a_quote_that_is_never_closed_does_not_gather_the_file(tmp_path):
    path = write(tmp_path / "a.csv", 'text\n"' + ("x" * 999 + "\n") * (LINE_BYTES_MAX // 1000 + 9))
    with pytest.raises(
        DataError, match=r"a row has more than .* Look before it for a quote that is not closed"
    ):
        made_from(path, tmp_path)


def test_running_text_may_be_one_line(tmp_path, monkeypatch):
    text = "ab\u00e4\u20ac\U0001f600" * 50
    whole = documents(ready(tmp_path, text, "a.txt", max_length=100).train)
    monkeypatch.setattr(text_files, "_TEXT_LINE_BYTES", 10)
    monkeypatch.setattr(text_files, "_PASSAGE_CHARACTERS", 10)
    shutil.rmtree(tmp_path / "cache")
    parts = documents(ready(tmp_path, text, "a.txt", max_length=100).train)
    assert len(parts) > len(whole)
    assert sum(part.count("b") for part in parts) == 50


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
