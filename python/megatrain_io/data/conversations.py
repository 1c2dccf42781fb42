"""Conversations as text: what is trained of each, and what the chat template made of it.

A conversation is rendered up to each answer and again with it, and the difference is the answer. Templates may leave
out, rewrite and add: what came out is compared with what went in, and what a person would not expect is counted.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from megatrain_io.data.chat_templates import ChatRenderer, TemplateError
from megatrain_io.data.formats import Conversation
from megatrain_io.data.rows import Row
from megatrain_io.data.special_tokens import SpecialTokens
from megatrain_io.errors import DataError

__all__ = ["Findings", "Segments", "conversation_rows"]

Segments = list[tuple[str, bool]]
"""Text, and whether it is trained."""

# A header such as <|im_start|>user has fewer letters.
_HEADER_LETTERS = 24
_SHOWN = 60
_DETAILS = 5

_SENTENCES = {
    "alone": (
        "{n} with several answers: the chat template renders earlier turns otherwise once others follow (it leaves "
        "out their reasoning, for one). Each answer is trained in a row of its own, as the model meets it when asked"
    ),
    "prompt": (
        "{n}: the chat template asks for an answer with {detail} at the end, and leaves that out of answers that are "
        "given. They are trained behind it, as the model will be asked"
    ),
    "answer": "{n}: the chat template puts {detail} before the answer, which is trained with it",
    "system": "{n}: the chat template adds a beginning of its own: {detail}",
    "text": "{n}: the chat template leaves out text of a turn",
    "key": "{n}: the chat template does not show {detail} of the turns",
    "tools": "{n}: the chat template does not show the tools",
    "empty": "{n}: an answer is empty, and the model is trained to end at once",
    "mark": (
        "{n}: answers end with {detail}, which is no single token of this tokenizer: where an answer ends is learnt as "
        "text, and generation ends at eos alone, which stands behind the last answer"
    ),
    "headings": (
        "{n}: the model has no chat template, so instructions are trained under the heading '### Instruction:', with "
        "the answer under '### Response:'. Ask in the same way, or choose data.chat_template: chatml"
    ),
}


@dataclass
class _Finding:
    """How many examples, where the first is, and where the last one that was counted."""

    count: int
    place: str
    last: str = ""

    def add(self, place: str) -> None:
        """Count an example once, however many of its answers are meant."""
        self.count += place != self.last
        self.last = place


@dataclass
class Findings:
    """What was found in the examples that a person would not expect: kind and detail, how often, and first where.

    Attributes:
        refused: why the examples cannot be trained on, and in how many of them so far; None where they can.
    """

    found: dict[tuple[str, str], _Finding] = field(default_factory=dict)
    refused: _Finding | None = None

    def add(self, kind: str, place: str, detail: str = "") -> None:
        """Count one more example; what is different in each example is told of the first few."""
        details = [known for known in self.found if known[0] == kind]
        key = (kind, detail) if len(details) < _DETAILS or (kind, detail) in self.found else details[-1]
        self.found.setdefault(key, _Finding(0, place)).add(place)

    def refuse(self, place: str) -> None:
        """Count one more example whose answer the template loses."""
        self.refused = self.refused or _Finding(0, place)
        self.refused.add(place)

    def sentences(self) -> Iterator[str]:
        """A sentence for each kind, and for each detail of it."""
        for (kind, detail), finding in self.found.items():
            what = "example" if finding.count == 1 else "examples"
            n = f"{finding.count:,} {what} (first {finding.place})"
            yield _SENTENCES[kind].format(n=n, detail=detail) + "."


def conversation_rows(
    place: str,
    conversation: Conversation,
    renderer: ChatRenderer,
    tokens: SpecialTokens,
    findings: Findings,
    *,
    answers_only: bool,
) -> list[Segments]:
    """The text of a conversation, in one row, or in one for each answer where the template rewrites earlier turns.

    Args:
        place: file and line, for messages.
        conversation: its turns; answers of weight 0 are not trained.
        renderer: of the template.
        tokens: of the tokenizer.
        findings: gets what the template leaves out, rewrites or adds.
        answers_only: train the answers, each with the token that ends it; otherwise everything.

    Raises:
        DataError: the template refuses the conversation, or answers cannot be told from the rest.
    """
    messages = [
        {key: value for key, value in turn.items() if key != "weight"} for turn in conversation.messages
    ]
    # An answer to nothing has no prompt: it is context for the next one.
    answers = [
        i
        for i, turn in enumerate(conversation.messages)
        if turn["role"] == "assistant" and i and turn.get("weight", 1)
    ]
    parts = [(len(messages), False)]
    if answers_only:
        parts += [part for i in answers for part in ((i, True), (i + 1, False))]
    whole, *others = _rendered(place, messages, conversation, renderer, parts)
    pairs = list(zip(others[::2], others[1::2], strict=True))
    if not answers_only:
        rows: list[Segments] = [[(whole, True)]]
    elif (stable := _stable(whole, pairs)) is not None:
        rows = [stable]
    else:
        bases = _rendered(place, messages, conversation, renderer, [(i, False) for i in answers])
        rows = [
            _alone(place, i, messages, (base, *pair), tokens, findings)
            for i, base, pair in zip(answers, bases, pairs, strict=True)
        ]
        if len(rows) > 1:
            findings.add("alone", place)
    rows = [_without_white_space_after_the_end(row, tokens) for row in rows]
    texts = list(dict.fromkeys([whole, *("".join(text for text, _ in row) for row in rows)]))
    _compare(place, messages, conversation.tools, texts, findings)
    if answers_only:
        trained = [text for row in rows for text, is_trained in row if is_trained]
        for i, text in zip(answers, trained, strict=False):
            _compare_answer(place, messages[i], text, tokens, findings)
    return rows


def _rendered(
    place: str,
    messages: Sequence[Row],
    conversation: Conversation,
    renderer: ChatRenderer,
    parts: Sequence[tuple[int, bool]],
) -> list[str]:
    try:
        return renderer.render(messages, conversation.tools, parts)
    except TemplateError as error:
        roles = " ".join(turn["role"] for turn in messages[: error.turns][:20])
        raise DataError(
            f"{place}: the chat template does not render the first {error.turns} of {len(messages)} turns ({roles}): "
            f"{error.reason.rstrip('.')}. Choose another data.chat_template, or correct the line."
        ) from error


def _stable(whole: str, pairs: Sequence[tuple[str, str]]) -> Segments | None:
    """The answers and what is between them; None where the template rewrites what it rendered before."""
    segments: Segments = []
    at = 0
    for prompt, answered in pairs:
        if not (answered.startswith(prompt) and whole.startswith(answered)) or len(prompt) < at:
            return None
        segments += [(whole[at : len(prompt)], False), (whole[len(prompt) : len(answered)], True)]
        at = len(answered)
    return [*segments, (whole[at:], False)]


def _alone(
    place: str,
    turn: int,
    messages: Sequence[Row],
    texts: tuple[str, str, str],
    tokens: SpecialTokens,
    findings: Findings,
) -> Segments:
    """The prompt of one answer and the answer, as the model meets them when it is asked.

    Args:
        place: file and line.
        turn: number of the answer.
        messages: all turns.
        texts: what is rendered before the answer; with the prompt for it; with the answer.
        tokens: of the tokenizer.
        findings: gets what the template asks with and leaves out afterwards.
    """
    base, prompt, answered = texts
    if answered.startswith(prompt):
        return [(prompt, False), (answered[len(prompt) :], True)]
    if not (prompt.startswith(base) and answered.startswith(base)):
        at = len(_shared(prompt, answered))
        raise DataError(
            f"{place}: the chat template renders what is before turn {turn + 1} of {len(messages)} otherwise with "
            f"that answer than without it ({_short(prompt[at:])} without, {_short(answered[at:])} with it), so "
            f"the answer cannot be told from the rest. Set data.assistant_only_loss: false to train every token in the "
            f"model's own format, or choose another data.chat_template, which changes that format."
        )
    header, answer = prompt[len(base) :], answered[len(base) :]
    cut = _end_of_header(header, answer, messages[turn].get("content") or "", tokens)
    asked, answer = header[cut:], answer[cut:]
    findings.add("prompt", place, _short(asked))
    return [(prompt, False), (_with_its_reasoning(messages[turn], asked, answer), True)]


def _end_of_header(header: str, answer: str, content: str, tokens: SpecialTokens) -> int:
    """Where the header ends that the prompt for an answer shares with the answer; what else they share is chance."""
    shared = _shared(header, answer)
    begins = answer.find(content.strip()) if content.strip() else -1
    if 0 <= begins <= len(shared):
        return begins
    # Only a part of the content is there: a header ends with a token or white space.
    trimmed = shared
    while trimmed and not trimmed[-1].isspace() and tokens.mark_of(trimmed) is None:
        trimmed = trimmed[:-1]
    return len(trimmed or shared)


def _with_its_reasoning(message: Row, asked: str, answer: str) -> str:
    """An answer that begins in the data as it is asked for (`<think>`), where the template cut that off."""
    content = message.get("content") or ""
    beginning = content.lstrip()
    if not asked.strip() or not beginning.startswith(asked.strip()) or asked.strip() in answer:
        return answer
    rest = beginning[len(asked.strip()) :]
    if asked[-1:].isspace():
        rest = rest.removeprefix("\n")
    # What is left of it in the answer is its end, and behind that is what ends an answer.
    text = content.rstrip()
    low, high = 0, len(text)
    while low < high:
        middle = (low + high) // 2
        if text[middle:] in answer:
            high = middle
        else:
            low = middle + 1
    visible = text[low:]
    end = answer[answer.rindex(visible) + len(visible) :] if visible else answer
    return rest.rstrip() + end


def _without_white_space_after_the_end(segments: Segments, tokens: SpecialTokens) -> Segments:
    """Give the template's white space after an end-of-turn token to what follows: it is no answer."""
    moved: Segments = []
    space = ""
    for text, trained in segments:
        text, space = space + text, ""  # noqa: PLW2901
        if trained and tokens.mark_of(answer := text.rstrip()):
            text, space = answer, text[len(answer) :]  # noqa: PLW2901
        moved.append((text, trained))
    if space:
        moved.append((space, False))
    return moved


# --------------------------------------------------------------------------------------- what went in and out


def _compare(
    place: str, messages: Sequence[Row], tools: Sequence[Row] | None, texts: Sequence[str], findings: Findings
) -> None:
    """Count what the template left out of a conversation, and the beginning that it added."""
    lacking: set[tuple[str, str]] = set()
    for turn in messages:
        missing = [key for key, value in turn.items() if key != "role" and not _is_shown(texts, value)]
        lacking.update(("text", "") if key == "content" else ("key", key) for key in missing)
        if "tool_calls" in missing and not (turn.get("content") or "").strip():
            findings.refuse(place)
    if tools and not any(_shows(texts, name) for tool in tools for name in _names(tool)):
        lacking.add(("tools", ""))
    for kind, detail in sorted(lacking):
        findings.add(kind, place, detail)
    first = (messages[0].get("content") or "").strip().partition("\n")[0]
    if not tools and first and messages[0]["role"] not in ("system", "developer"):
        added = texts[0].partition(first)[0]
        if sum(map(str.isalpha, added)) > _HEADER_LETTERS:
            findings.add("system", place, _short(added))


def _compare_answer(place: str, message: Row, text: str, tokens: SpecialTokens, findings: Findings) -> None:
    """Count what the template added before and behind an answer, and an answer that is empty."""
    content = message.get("content")
    if not isinstance(content, str) or any(
        value for key, value in message.items() if key not in ("role", "content")
    ):
        return
    content = content.strip()
    if not content:
        findings.add("empty", place)
        return
    before, there, behind = text.partition(content)
    if not there:
        return
    if before.strip():
        findings.add("answer", place, _short(before))
    if behind.strip() and tokens.mark_of(behind.rstrip()) is None:
        findings.add("mark", place, _short(behind.strip()))


def _is_shown(texts: Sequence[str], value: Any) -> bool:
    """Whether a text is there as a whole, or any part of another value; nothing need not be."""
    if value in (None, "", [], {}):
        return True
    return (
        _shows(texts, value)
        if isinstance(value, str)
        else any(_shows(texts, leaf) for leaf in _leaves(value))
    )


def _shows(texts: Sequence[str], text: str) -> bool:
    """Whether a text is there: as it is but for white space, as JSON, or line by line."""
    text = text.strip()
    if any(text in rendered for rendered in texts):
        return True
    if any(json.dumps(text, ensure_ascii=False)[1:-1] in rendered for rendered in texts):
        return True
    if any("".join(text.split()) in "".join(rendered.split()) for rendered in texts):
        return True
    lines = [line.strip() for line in text.splitlines()]
    return len(lines) > 1 and all(any(line in rendered for rendered in texts) for line in lines)


def _leaves(value: Any) -> Iterator[str]:
    """All texts and numbers within a value, JSON in texts taken apart."""
    if isinstance(value, dict):
        for inner in value.values():
            yield from _leaves(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _leaves(inner)
    elif isinstance(value, str) and value.lstrip()[:1] in ("{", "["):
        yield value
        try:
            inner = json.loads(value)
        except (ValueError, RecursionError):
            return
        yield from _leaves(inner)
    elif isinstance(value, str) and value.strip():
        yield value
    elif not isinstance(value, str | bool | None):
        yield str(value)


def _names(tool: Row) -> Iterator[str]:
    for part in (tool, tool.get("function")):
        if isinstance(part, dict) and isinstance(part.get("name"), str):
            yield part["name"]


def _shared(one: str, other: str) -> str:
    """What both texts begin with."""
    pairs = enumerate(zip(one, other, strict=False))
    return one[: next((at for at, (a, b) in pairs if a != b), min(len(one), len(other)))]


def _short(text: str) -> str:
    shown = text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
    return repr(shown)
