"""Rows of CSV and JSON files: read as whoever wrote them meant them, whatever program that was."""

import json
import random

import pytest

from corpus import EOS, documents, ready, write
from megatrain_io.data import rows
from megatrain_io.data.files import SourceFile
from megatrain_io.data.rows import read_rows

WHO = f"Who?{{+The porter{EOS}+}}"
SENTENCES = "prompt;completion\n" + "".join(
    f"One, two, {i}?;Yes, no; or 3\n".replace("; or", ", or") for i in range(9)
)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", 'prompt,completion\n"Who?","The porter"\n'),
        ("a.csv", 'prompt, completion\n"Who?", "The porter"\n'),
        ("a.csv", '"prompt", "completion"\n"Who?",   "The porter"\n'),
        ("a.csv", "\ufeffprompt;completion\r\nWho?;The porter\r\n"),
        ("a.csv", "\ufeffsep=;\r\nprompt;completion\r\nWho?;The porter\r\n"),
        ("a.csv", '"prompt";"completion";\n"Who?";"The porter";\n;;\n'),
        ("a.csv", "prompt\tcompletion\nWho?\tThe porter\n"),
        ("a.csv", "prompt|completion\nWho?|The porter\n"),
        ("a.tsv", "prompt\tcompletion\nWho?\tThe porter\n"),
        ("a.TSV", "completion\tprompt\nThe porter\tWho?\n"),
    ],
    ids=str,
)
def test_csv_is_read_as_it_was_written(tmp_path, name, content):
    """Quotes behind a space were trained, and what German Excel writes had one column."""
    assert documents(ready(tmp_path, content, name).train) == [WHO]


def test_cells_keep_what_is_theirs(tmp_path):
    """Spaces before text, quotes within quotes, delimiters of others, line breaks in quotes."""
    content = 'prompt,completion\nA:, Paris\n"B; ""b""\n\nC|",\t"" D\n'
    assert documents(ready(tmp_path, content, "a.csv").train) == [
        f"A:{{+ Paris{EOS}+}}",
        f'B; "b"\n\nC|{{+\t"" D{EOS}+}}',
    ]
    assert documents(ready(tmp_path, SENTENCES, "a.csv").train)[0] == f"One, two, 0?{{+Yes, no, or 3{EOS}+}}"
    content = 'prompt,completion\n" ""quoted""",x\n'
    assert documents(ready(tmp_path, content, "a.csv").train) == [f' "quoted"{{+x{EOS}+}}']


def test_one_column_needs_no_delimiter(tmp_path):
    assert documents(ready(tmp_path, "text\nOne; two\n", "a.csv").train) == [f"O{{+ne; two{EOS}+}}"]


def values_of(path):
    return [(place, row) for place, row, _ in read_rows(SourceFile(path, path.name, "json", 0, ""))]


@pytest.mark.parametrize("block", [1, 2, 3, 7, 64])
def test_a_list_is_read_in_blocks(tmp_path, monkeypatch, block):
    """Only the text of one example is in memory: a list was held whole, eight times its size."""
    numbers = random.Random(block)
    made = [
        {
            "text": '\u00e4\U0001f600\\"]},' * numbers.randrange(9),
            "n": [numbers.random(), -12, True, None, {"a": []}],
        }
        for _ in range(20)
    ]
    monkeypatch.setattr(rows, "_BLOCK_BYTES", block)
    for text in (
        json.dumps(made),
        json.dumps(made, ensure_ascii=False, indent=1),
        "\ufeff\n\t[ " + " ,\n".join(map(json.dumps, made)) + "]\n\n",
    ):
        path = write(tmp_path / "a.json", text)
        assert [row for _, row in values_of(path)] == made
        assert values_of(path)[4][0] == f"{path} example 5"
    assert values_of(write(tmp_path / "a.json", " [ ] ")) == []


@pytest.mark.parametrize("block", [1, 1000])
@pytest.mark.parametrize(
    "text",
    ['[{"a": 1},\n {"b": tru}]', '[{"a": 1}\n {"b": 1}]', '[{"a": 1},]',
     '[{"a": 1}] x', '[{"a": 1}', '[\n{"a": "1\n"}]'],
)  # fmt: skip
def test_what_is_wrong_in_a_list_is_named_where_it_is(tmp_path, monkeypatch, block, text):
    monkeypatch.setattr(rows, "_BLOCK_BYTES", block)
    path = write(tmp_path / "a.json", text)
    with pytest.raises(json.JSONDecodeError) as expected:
        json.loads(text)
    error = expected.value
    with pytest.raises(ValueError, match="is not JSON") as refused:
        values_of(path)
    assert str(refused.value).startswith(f"{path} line {error.lineno} is not JSON: {error.msg} at column")
