"""The Modelfile beside a GGUF file: how Ollama writes a conversation, and what ends an answer.

A chat template is a program in Jinja, and Ollama has patterns in another language: conversations with marks are
rendered, and what lies around the marks is the pattern. A template that follows none is left to what Ollama makes of
the file.
"""

import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from megatrain_io.data.chat_templates import ChatRenderer, TemplateError
from megatrain_io.errors import DataError

__all__ = ["modelfile_of"]

_SYSTEM, _USER, _ANSWER, _AGAIN = (f"\ue000{word}\ue000" for word in ("SYSTEM", "USER", "ANSWER", "AGAIN"))
_ASKED = [{"role": "user", "content": _USER}]
_ANSWERED = [*_ASKED, {"role": "assistant", "content": _ANSWER}]


@dataclass(frozen=True)
class _Pattern:
    """What lies around the texts of a conversation.

    Attributes:
        first: what a conversation without instructions begins with, such as instructions that are always there.
        user: before a message.
        assistant: between a message and its answer.
        end: after an answer.
    """

    first: str
    user: str
    assistant: str
    end: str


def modelfile_of(tokenizer: PreTrainedTokenizerBase, ends: Sequence[int]) -> str:
    """The lines of a Modelfile after the first, which names the file.

    Args:
        tokenizer: of the model.
        ends: tokens that end what is generated.
    """
    lines = []
    if tokenizer.chat_template:
        with (
            ChatRenderer(tokenizer, fixed_day=True) as renderer,
            suppress(ValueError, TemplateError, DataError),
        ):
            lines += _template(renderer, _begin(tokenizer))
    for number in ends:
        token = tokenizer.convert_ids_to_tokens(number)
        if isinstance(token, str):
            lines.append(f"PARAMETER stop {json.dumps(token, ensure_ascii=False)}")
    return "".join(f"{line}\n" for line in lines)


def _begin(tokenizer: PreTrainedTokenizerBase) -> str:
    """What llama.cpp puts before a conversation by itself, so that the pattern must not have it."""
    asked: Any = tokenizer
    ids: list[int] = asked("a", verbose=False)["input_ids"]
    return str(tokenizer.bos_token) if ids and ids[0] == tokenizer.bos_token_id else ""


def _template(renderer: ChatRenderer, bos: str) -> list[str]:
    """The lines that say how a conversation is written; ValueError where no pattern is found."""
    pattern = _pattern(renderer, bos)
    turn = f"{pattern.user}{{{{ .Prompt }}}}{pattern.assistant}{{{{ .Response }}}}{pattern.end}"
    told = inside = ""
    default = None
    with suppress(ValueError, TemplateError):
        before, between = _instructions(renderer, bos)
        if between.endswith(pattern.user) and not before.startswith(pattern.user):
            after = between.removesuffix(pattern.user)
            told = f"{{{{ if .System }}}}{before}{{{{ .System }}}}{after}{{{{ end }}}}"
            if pattern.first.startswith(before) and pattern.first.endswith(after):
                default = pattern.first[len(before) : len(pattern.first) - len(after)]
        elif before.startswith(pattern.user):
            inside = before.removeprefix(pattern.user)
            inside = f"{{{{ if .System }}}}{inside}{{{{ .System }}}}{between}{{{{ end }}}}"
    if inside:
        turn = turn.removeprefix(pattern.user)
        turn = f"{pattern.user}{inside}{turn}"
    if pattern.first and default is None:
        raise ValueError("a conversation begins with something that is no instruction")
    lines = [f'TEMPLATE """{told}{turn}"""']
    return [*lines, f'SYSTEM """{default}"""'] if default else lines


def _pattern(renderer: ChatRenderer, bos: str) -> _Pattern:
    messages = [*_ANSWERED, {"role": "user", "content": _AGAIN}]
    (text,) = renderer.render(messages, None, [(3, True)])
    begin, assistant, middle, after = _between(text, _USER, _ANSWER, _AGAIN)
    (whole,) = renderer.render(_ANSWERED, None, [(2, False)])
    *_, end = _between(whole, _USER, _ANSWER)
    if not middle.startswith(end) or assistant != after:
        raise ValueError("turns are not written alike")
    user = middle.removeprefix(end)
    begin = begin.removeprefix(bos)
    if not begin.endswith(user):
        raise ValueError("the first message is not written like the others")
    return _plain(_Pattern(begin.removesuffix(user), user, assistant, end))


def _instructions(renderer: ChatRenderer, bos: str) -> tuple[str, str]:
    """What lies before instructions, and between them and the first message."""
    messages = [{"role": "system", "content": _SYSTEM}, *_ASKED]
    (text,) = renderer.render(messages, None, [(2, True)])
    before, between, _ = _between(text, _SYSTEM, _USER)
    return before.removeprefix(bos), between


def _between(text: str, *marks: str) -> list[str]:
    """What lies around marks that a text has once each, in this order; ValueError if it has not."""
    parts = []
    for mark in marks:
        if text.count(mark) != 1:
            raise ValueError(f"{mark} is there {text.count(mark)} times")
        part, _, text = text.partition(mark)
        parts.append(part)
    return [*parts, text]


def _plain(pattern: _Pattern) -> _Pattern:
    """A pattern that can be written as it is; ValueError for one that Ollama would read otherwise."""
    texts = pattern.first, pattern.user, pattern.assistant, pattern.end
    if any(mark in text for text in texts for mark in ('"""', "{{", "}}", "\ue000")):
        raise ValueError("it has marks of Ollama's own")
    return pattern
