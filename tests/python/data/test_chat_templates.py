"""Chat templates are programs from elsewhere: each ends within its limits of time and memory, with a sentence."""

import os
import time
from pathlib import Path

import psutil
import pytest

from corpus import TEMPLATE, TURNS, documents, make_tokenizer, ready
from megatrain_io.data import chat_templates
from megatrain_io.data.chat_templates import ChatRenderer, TemplateError, read_chat_template
from megatrain_io.errors import DataError

LOOPS = (
    "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}" + "{% endfor %}" * 3
)
TIME = [
    LOOPS,
    "{% if messages | length == 3 %}" + LOOPS + "{% endif %}" + TEMPLATE,
    "{% set ns = namespace(x=7) %}{% for a in range(99999) %}{% set ns.x = ns.x * ns.x %}{% endfor %}",
    "{{ 9 ** (9 ** 9) }}",
]
MEMORY = [
    "{{ 'ha' * 9999999999 }}",
    "{% set ns = namespace(x='ha') %}{% for a in range(99) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}{{ ns.x }}",
    "{{ '%09999999999d' % 1 }}",
    "{{ [0] * 9999999999 }}",
    "{{ 'a' | center(9999999999) }}",
]
DEEP = "{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}"


@pytest.fixture(autouse=True)
def _short(monkeypatch):
    monkeypatch.setattr(chat_templates, "_CPU_SECONDS", 0.3)
    monkeypatch.setattr(chat_templates, "_MEMORY", 64 << 20)


def refusal(tmp_path, template):
    with pytest.raises(DataError) as refused:
        ready(tmp_path, [{"messages": TURNS}], tokenizer=make_tokenizer(template=template))
    return str(refused.value)


@pytest.mark.slow
@pytest.mark.parametrize("template", TIME, ids=["loops", "loops on a part", "numbers", "a power"])
def test_a_template_that_does_not_end_is_ended(tmp_path, template):
    """It hung for good, also after Ctrl-C."""
    text = refusal(tmp_path, template)
    assert (
        "data.jsonl line 1: the chat template does not render the first 4 of 4 turns (user assistant user assistant): "
        in text
    )
    assert "seconds of computing, the most that one rendering may. Choose another" in text


@pytest.mark.slow
@pytest.mark.parametrize("template", MEMORY, ids=["repeated", "doubled", "formatted", "a list", "centred"])
def test_a_template_that_takes_all_memory_is_ended(tmp_path, template):
    """`(user assistant): .` was all that it said, once the machine came back."""
    text = refusal(tmp_path, template)
    assert "it needs more than 64 MiB of memory, the most that one rendering may" in text


def test_other_ends_have_a_reason_too(tmp_path, monkeypatch):
    assert "maximum recursion depth exceeded" in refusal(tmp_path, DEEP)
    assert "half a character" in refusal(tmp_path, "{{ '\\ud800' }}")
    assert "(user assistant user assistant): TemplateError. Choose" in refusal(
        tmp_path, "{{ raise_exception('') }}"
    )
    monkeypatch.setattr(chat_templates, "_CHARACTERS", 9)
    assert "it makes 10 characters, more than 9" in refusal(tmp_path, "{{ '0123456789' }}")


def test_a_conversation_of_very_many_turns_ends_too(monkeypatch):
    monkeypatch.setattr(chat_templates, "_CONVERSATION_SECONDS", 0.0)
    with (
        ChatRenderer(make_tokenizer(), fixed_day=True) as renderer,
        pytest.raises(TemplateError, match="split the conv"),
    ):
        renderer.render(TURNS * 99, None, [(1, False), (99, False)])


def test_what_was_started_is_ended(tmp_path):
    def children():
        return psutil.Process().children()

    before = children()
    made = ready(tmp_path, [{"messages": TURNS}] * 3)
    assert made.train.documents == 3
    refusal(tmp_path, LOOPS)
    renderer = ChatRenderer(make_tokenizer(), fixed_day=True)
    renderer.render(TURNS, None, [(1, True)])
    assert len(children()) == len(before) + 1
    del renderer
    assert children() == before


def test_a_renderer_goes_on_after_a_refusal():
    tokenizer = make_tokenizer(template="{% if messages|length == 1 %}" + LOOPS + "{% endif %}" + TEMPLATE)
    with ChatRenderer(tokenizer, fixed_day=True) as renderer:
        for _ in range(2):
            with pytest.raises(TemplateError, match="seconds of computing"):
                renderer.render(TURNS, None, [(1, True)])
            assert renderer.render(TURNS, None, [(2, False)])[0].endswith("Yo<|im_end|>\n")


def test_time_is_counted_for_each_rendering(tmp_path):
    """Long conversations are rendered many times."""
    slow = "{% for a in range(9000) %}{% set x = a * a %}{% endfor %}" + TEMPLATE
    start = time.process_time()
    make_tokenizer(template=slow).apply_chat_template(TURNS, tokenize=False)
    assert time.process_time() > start
    made = ready(
        tmp_path, [{"messages": TURNS[:2] * 60}], tokenizer=make_tokenizer(template=slow), max_length=9000
    )
    assert documents(made.train)[0].count("{+Yo") == 60


def test_the_process_leaves_what_belongs_to_its_parent_alone(tmp_path):
    """It has no file of the parent's open, and none of the parent's signals."""
    with (tmp_path / "lock").open("w"), ChatRenderer(make_tokenizer(), fixed_day=True) as renderer:
        renderer.render(TURNS, None, [(1, True)])
        targets = {str(path.readlink()) for path in Path(f"/proc/{renderer._process}/fd").iterdir()}
        assert not any("lock" in target for target in targets)
        assert len(targets) == 2, "nothing, and the way to its parent"


@pytest.mark.parametrize(
    ("choice", "reason"),
    [
        ("", "is a folder"),
        ("chatlm", "cannot be read: No such file"),
        ("a\0b", "embedded null byte"),
        ("x" * 300, "File name too long"),
        ("FOLDER", "is a folder: only files"),
        ("PIPE", "is a named pipe: only files"),
        ("LATIN", "codec can't decode"),
        ("LARGE", "it has more than 4,194,304 bytes"),
        ("/dev/zero", "is a device: only files"),
    ],
)
def test_what_is_no_template_is_refused(tmp_path, choice, reason):
    os.mkfifo(tmp_path / "PIPE")
    (tmp_path / "FOLDER").mkdir()
    (tmp_path / "LATIN").write_bytes(b"caf\xe9")
    (tmp_path / "LARGE").write_bytes(b"x" * (chat_templates._TEMPLATE_BYTES_MAX + 1))
    path = str(tmp_path / choice) if choice.isupper() else choice
    with pytest.raises(DataError, match="is neither chatml nor a text file that can be read") as refused:
        read_chat_template(path)
    assert reason in str(refused.value)


def test_a_template_in_the_home_folder_is_found(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "t.jinja").write_text("text")
    assert read_chat_template("~/t.jinja") == "text"
