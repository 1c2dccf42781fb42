"""Documents as tokens, and which of them are trained.

What is trained is found in the text: a conversation is rendered up to each answer and again with it, and the
difference is the answer. It is carried over to tokens in the same way: the tokens of a prompt, as the model
will meet it, must be the first tokens of the whole. No token is ever judged by its number, so that padding
which doubles as end of text cannot hide the end of an answer.
"""

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import accumulate, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from megatrain_io.data.formats import Completion, Conversation, Document, Instruction, Text
from megatrain_io.errors import DataError
from megatrain_io.files import SETTINGS_BYTES_MAX, read_file

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Encoder", "Encoding", "Piece", "marked", "read_chat_template", "tokenizer_digest"]

Segments = list[tuple[str, bool]]

CHAT_TEMPLATES = {
    "chatml": (
        "{% for message in messages %}"
        "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
        "{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
}
# For instructions, where the model has no chat template.
_INSTRUCTION = "### Instruction:\n{}\n\n### Response:\n"
# The day that templates are told it is. The day of the run would give other tokens on another day.
_TODAY = datetime(2024, 7, 26, tzinfo=UTC)
_TODAY_CALL = re.compile(r"""strftime_now\(\s*(["'])(.*?)\1\s*\)""")
_PARAGRAPH_BORDER = re.compile(r"(\n\s*\n)")
# Text with more characters for each token it may have is split at once, without a try whether it fits.
_CHARACTERS_PER_TOKEN = 8


@dataclass(frozen=True)
class Piece:
    """A document, or a part of one that fits.

    Attributes:
        ids: int64 [t].
        trained: bool [t]; whether a token is to be predicted from those before it, so never the first.
    """

    ids: NDArray[np.int64]
    trained: NDArray[np.bool_]


@dataclass(frozen=True)
class Encoding:
    """The tokens of a document.

    Attributes:
        pieces: the document, in as many pieces as it needs; none where nothing would be trained.
        tokens: number of tokens of the document, those that were cut off included.
        cut: whether its end was cut off to fit.
    """

    pieces: tuple[Piece, ...]
    tokens: int
    cut: bool


class Encoder:
    """Turns documents into pieces of at most `max_length` tokens."""

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerBase",
        *,
        max_length: int,
        assistant_only_loss: bool,
        chat_template: str | None,
    ) -> None:
        """Find out which tokens the tokenizer puts at the beginning and the end.

        Args:
            tokenizer: a transformers tokenizer; it is not changed.
            max_length: most tokens of a piece.
            assistant_only_loss: train the assistant's turns of a conversation, otherwise all of it.
            chat_template: a Jinja template to use instead of the tokenizer's.
        """
        self._tokenizer: Any = tokenizer
        self._max_length = max_length
        self._assistant_only_loss = assistant_only_loss
        self._chat_template = chat_template
        self._has_template = bool(chat_template or tokenizer.chat_template)
        added = self._tokenizer.added_tokens_decoder.values()
        special = {*self._tokenizer.all_special_tokens, *(str(token) for token in added if token.special)}
        self._special = tuple(sorted(special))
        # Only whether the tokenizer begins with its bos is asked: a post-processor that also appends
        # something would make every prompt end with it.
        bos = self._tokenizer.bos_token_id
        begun = self._tokenizer("a", verbose=False)["input_ids"]
        self._begin = [bos] if bos is not None and begun[:1] == [bos] else []
        eos = self._tokenizer.eos_token_id
        self._end = [] if eos is None else [eos]

    def encode(self, documents: Sequence[Document]) -> Iterator[Encoding]:
        """Encode documents together, one encoding for each, in order.

        Raises:
            DataError: a conversation cannot be rendered, or its answers cannot be told from the rest.
        """
        plans = [self._segments(document) for document in documents]
        prefixes = [list(accumulate(text for text, _ in plan)) for plan in plans]
        for document, taken in zip(documents, prefixes, strict=True):
            if self._is_surely_long(document):
                taken.clear()
        ids = iter(self._ids([prefix for taken in prefixes for prefix in taken]))
        for document, plan, taken in zip(documents, plans, prefixes, strict=True):
            yield self._encoding(document, plan, [next(ids) for _ in taken])

    def _ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Tokens of each text, without bos and eos."""
        if not texts:
            return []
        found: list[list[int]] = self._tokenizer(list(texts), add_special_tokens=False, verbose=False)[
            "input_ids"
        ]
        return found

    def _is_surely_long(self, document: Document) -> bool:
        content = document.content
        return isinstance(content, Text) and len(content.text) > _CHARACTERS_PER_TOKEN * self._max_length

    def _encoding(self, document: Document, plan: Segments, prefixes: list[list[int]]) -> Encoding:
        if not plan:
            return Encoding((), 0, cut=False)
        content = document.content
        begin = [] if self._is_rendered(document) else self._begin
        end = self._end if self._ends_with_eos(document, plan) else []
        if not prefixes:
            return self._split(plan[0][0], end)
        ids, lengths = self._joined(plan, prefixes)
        if ids[-1:] == end:  # written out in the data
            end = []
        if isinstance(content, Text) and len(begin) + len(ids) + len(end) > self._max_length:
            return self._split(content.text, end)
        trained = [flag for (_, flag), tokens in zip(plan, lengths, strict=True) for _ in range(tokens)]
        ids, trained = [*begin, *ids, *end], [*[False] * len(begin), *trained, *[True] * len(end)]
        piece = _piece(ids[: self._max_length], trained[: self._max_length])
        pieces = (piece,) if piece.trained.any() else ()
        return Encoding(pieces, len(ids), cut=len(ids) > self._max_length)

    def _joined(self, plan: Segments, prefixes: list[list[int]]) -> tuple[list[int], list[int]]:
        """Tokens of the whole document, and the number of tokens of each segment.

        Where the tokens of a prompt change with what follows it (a space that belongs to the next word), the
        segments are taken by themselves: the prompt must be what the model meets when it is asked.
        """
        whole = prefixes[-1]
        if all(whole[: len(prefix)] == prefix for prefix in prefixes):
            ends = [len(prefix) for prefix in prefixes]
            return whole, [end - start for start, end in zip([0, *ends], ends, strict=False)]
        segments = [prefixes[0], *self._ids([text for text, _ in plan[1:]])]
        return [token for segment in segments for token in segment], [len(segment) for segment in segments]

    def _split(self, text: str, end: list[int]) -> Encoding:
        """Cut long text at paragraphs; a paragraph that does not fit at lines; a line anywhere."""
        room = self._max_length - len(self._begin) - len(end)
        room = max(room, 1)
        parts = [
            ids[at : at + room]
            for ids in self._ids(list(self._groups(text, room)))
            for at in range(0, len(ids), room)
        ]
        tokens = sum(map(len, parts)) + len(end)
        parts = [[*self._begin, *part] for part in parts]
        parts[-1].extend(end)
        pieces = [_piece(part, [True] * len(part)) for part in parts]
        return Encoding(tuple(piece for piece in pieces if piece.trained.any()), tokens, cut=False)

    def _groups(self, text: str, room: int) -> Iterator[str]:
        """Yield the text in groups of as many paragraphs as fit in `room` tokens."""
        split = _PARAGRAPH_BORDER.split(text)
        paragraphs = [a + b for a, b in zip(split[::2], [*split[1::2], ""], strict=True)]
        units: list[tuple[str, int]] = []
        for paragraph, ids in zip(paragraphs, self._ids(paragraphs), strict=True):
            if len(ids) <= room:
                units.append((paragraph, len(ids)))
            else:
                lines = paragraph.splitlines(keepends=True)
                units += zip(lines, map(len, self._ids(lines)), strict=True)
        group: list[str] = []
        filled = 0
        for unit, tokens in units:
            if group and filled + tokens > room:
                yield "".join(group)
                group, filled = [], 0
            group.append(unit)
            filled += tokens
        if group:
            yield "".join(group)

    # ------------------------------------------------------------------------------------ what is trained

    def _is_rendered(self, document: Document) -> bool:
        """Whether a chat template made the text, with whatever token it wants to begin with."""
        content = document.content
        return isinstance(content, Conversation) or (isinstance(content, Instruction) and self._has_template)

    def _ends_with_eos(self, document: Document, plan: Segments) -> bool:
        """Whether eos is appended: where nothing else tells the model to stop."""
        if isinstance(document.content, Text):
            return document.content.ends
        if not self._is_rendered(document):
            return True
        last, trained = plan[-1]
        return trained and not last.endswith(self._special)

    def _segments(self, document: Document) -> Segments:
        """Segments of the text, none of them empty, and whether each is trained."""
        segments: Segments
        match document.content:
            case Text(text):
                segments = [(text, True)] if text.strip() else []
            case Completion(prompt, completion):
                segments = [(prompt, False), (completion, True)]
            case Instruction(instruction, output) if not self._has_template:
                segments = [(_INSTRUCTION.format(instruction), False), (output, True)]
            case Instruction(instruction, output):
                turns = [{"role": "user", "content": instruction}, {"role": "assistant", "content": output}]
                segments = self._turns(document.place, Conversation(tuple(turns)), answers_only=True)
            case Conversation() as conversation:
                segments = self._turns(document.place, conversation, answers_only=self._assistant_only_loss)
        return [(text, trained) for text, trained in segments if text]

    def _turns(self, place: str, conversation: Conversation, *, answers_only: bool) -> Segments:
        """Segments of a conversation: its answers, each with the token that ends it, and the text between them."""
        messages = conversation.messages
        whole = self._render(place, conversation, len(messages))
        if not answers_only:
            return self._without_white_space_after_the_end([(whole, True)])
        segments: Segments = []
        at = 0
        for i, message in enumerate(messages):
            # An answer to nothing has no prompt: it is context for the next one.
            if message["role"] != "assistant" or i == 0:
                continue
            prompt = self._render(place, conversation, i, prompting=True)
            answered = self._render(place, conversation, i + 1)
            if not (answered.startswith(prompt) and whole.startswith(answered)) or len(prompt) < at:
                raise DataError(
                    f"{place}: the chat template changes earlier turns (not prefix-stable) at turn {i + 1} of "
                    f"{len(messages)}: what is rendered with the turn does not begin with what is rendered "
                    f"before it, so the assistant's tokens cannot be told from the rest. Choose "
                    f"data.chat_template: chatml, or data.assistant_only_loss: false to train every token."
                )
            segments += [(whole[at : len(prompt)], False), (whole[len(prompt) : len(answered)], True)]
            at = len(answered)
        segments.append((whole[at:], False))
        return self._without_white_space_after_the_end(segments)

    def _without_white_space_after_the_end(self, segments: Segments) -> Segments:
        """Give the template's white space after an end-of-turn token to what follows: it is no answer."""
        moved: Segments = []
        space = ""
        for text, trained in segments:
            text, space = space + text, ""  # noqa: PLW2901
            if trained and (answer := text.rstrip()).endswith(self._special):
                text, space = answer, text[len(answer) :]  # noqa: PLW2901
            moved.append((text, trained))
        if space:
            moved.append((space, False))
        return [(text, trained) for text, trained in moved if text]

    def _render(self, place: str, conversation: Conversation, turns: int, *, prompting: bool = False) -> str:
        if not self._has_template:
            raise DataError(
                f"This base model has no chat template but the data are messages ({place}). Choose "
                f"data.chat_template: chatml, or use the instruction-tuned model."
            )
        tools = list(conversation.tools) if conversation.tools else None
        try:
            template = self._tokenizer.get_chat_template(self._chat_template, tools)
            rendered: str = self._tokenizer.apply_chat_template(
                [dict(message) for message in conversation.messages[:turns]],
                tools=tools,
                chat_template=_with_a_fixed_day(template),
                add_generation_prompt=prompting,
                tokenize=False,
            )
        except Exception as error:  # whatever a template raises, or does wrong
            raise DataError(
                f"{place}: the chat template refuses the first {turns} of {len(conversation.messages)} turns "
                f"({' '.join(m['role'] for m in conversation.messages[:turns])}): {error}. Correct the line, or "
                f"choose another data.chat_template."
            ) from error
        return rendered


def _piece(ids: list[int], trained: list[bool]) -> Piece:
    piece = Piece(np.array(ids, np.int64), np.array(trained, np.bool_))
    piece.trained[:1] = False
    return piece


def _with_a_fixed_day(template: str) -> str:
    return _TODAY_CALL.sub(lambda call: json.dumps(_TODAY.strftime(call[2])), template)


def read_chat_template(choice: str | None) -> str | None:
    """Text of the template that was chosen by name, as the path of a file, or as the text itself.

    Raises:
        DataError: the choice is none of them.
    """
    if choice is not None and re.search(r"\{[{%]", choice):
        return choice
    if choice is None or choice in CHAT_TEMPLATES:
        return CHAT_TEMPLATES[choice] if choice else None
    try:
        return read_file(Path(choice), SETTINGS_BYTES_MAX).decode()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"data.chat_template: {choice!r} is neither {', '.join(CHAT_TEMPLATES)} nor a text file that can be "
            f"read ({error}). Give one of the names, or the path or text of a Jinja template."
        ) from error


def tokenizer_digest(tokenizer: "PreTrainedTokenizerBase") -> str:
    """SHA-256 over all that decides which tokens a text has, and how conversations are rendered."""
    its: Any = tokenizer
    if its.is_fast:
        rules = json.loads(its.backend_tokenizer.to_str())
        # How the last call cut and padded, not how text is split.
        rules.pop("truncation", None)
        rules.pop("padding", None)
    else:
        rules = [type(its).__name__, its.get_vocab()]
    habits = [its.special_tokens_map, its.chat_template, its("A b 1\n\u00e9")["input_ids"]]
    return hashlib.sha256(json.dumps([rules, habits], sort_keys=True, default=str).encode()).hexdigest()


def marked(tokenizer: "PreTrainedTokenizerBase", piece: Piece, characters: int = 400) -> str:
    """The text of a piece, with trained stretches as `{+...+}`; of each stretch at most `characters` are shown."""
    its: Any = tokenizer
    borders = [0, *(np.flatnonzero(np.diff(piece.trained)) + 1).tolist(), len(piece.ids)]
    shown = []
    for start, end in pairwise(borders):
        text = its.decode(
            piece.ids[start:end].tolist(), skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        if len(text) > characters:
            text = f"{text[: characters // 2]} ... {text[-characters // 2 :]}"
        shown.append(f"{{+{text}+}}" if piece.trained[start] else text)
    return "".join(shown)
