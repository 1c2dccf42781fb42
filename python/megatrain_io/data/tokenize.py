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
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from megatrain_io.data.chat_templates import ChatRenderer
from megatrain_io.data.conversations import Findings, Segments, conversation_rows
from megatrain_io.data.formats import Completion, Conversation, Document, Instruction, Text
from megatrain_io.data.special_tokens import SpecialTokens
from megatrain_io.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Asking", "Encoder", "Encoding", "Piece", "marked", "tokenizer_digest"]

Asking = Literal["chat", "prompt", "headings", "text"]
"""How a model is asked: in its chat template, with a prompt as it stands, under headings; or nothing is asked."""

# For instructions, where the model has no chat template.
_INSTRUCTION = "### Instruction:\n{}\n\n### Response:\n"
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
        longest: the most of them in a row: a conversation may need one for each answer.
        cut: whether its end was cut off to fit.
    """

    pieces: tuple[Piece, ...]
    tokens: int
    longest: int
    cut: bool


class Encoder:
    """Turns documents into pieces of at most `max_length` tokens.

    Attributes:
        findings: what the chat template left out, rewrote or added, and what else a person would not expect.
        stop_tokens: what texts and answers ended with so far: what ends generation.
    """

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
        self._tokens = SpecialTokens(tokenizer)
        self._max_length = max_length
        self._assistant_only_loss = assistant_only_loss
        self._has_template = bool(chat_template or tokenizer.chat_template)
        self._renderer = ChatRenderer(tokenizer, chat_template, fixed_day=True)
        self.findings = Findings()
        self.stop_tokens: set[int] = set()

    def close(self) -> None:
        """End the process that renders conversations."""
        self._renderer.close()

    def encode(self, documents: Sequence[Document]) -> Iterator[Encoding]:
        """Encode documents together, one encoding for each, in order.

        Raises:
            DataError: a conversation cannot be rendered, or its answers cannot be told from the rest.
        """
        plans = [self._rows(document) for document in documents]
        self._refuse_lost_answers(documents)
        prefixes = [[list(accumulate(text for text, _ in row)) for row in rows] for rows in plans]
        for document, taken in zip(documents, prefixes, strict=True):
            if self._is_surely_long(document):
                taken[:] = [[] for _ in taken]
        ids = iter(self._tokens.ids([prefix for rows in prefixes for row in rows for prefix in row]))
        for document, rows, taken in zip(documents, plans, prefixes, strict=True):
            encodings = [
                self._encoding(document, row, [next(ids) for _ in prefixes_of_row])
                for row, prefixes_of_row in zip(rows, taken, strict=True)
            ]
            yield Encoding(
                tuple(piece for encoding in encodings for piece in encoding.pieces),
                sum(encoding.tokens for encoding in encodings),
                max((encoding.longest for encoding in encodings), default=0),
                cut=any(encoding.cut for encoding in encodings),
            )

    def asked_by(self, document: Document) -> Asking:
        """How the model is to be asked for what it learns from a document."""
        if self._is_rendered(document):
            return "chat"
        asking: dict[type, Asking] = {Text: "text", Completion: "prompt", Instruction: "headings"}
        return asking[type(document.content)]

    def _refuse_lost_answers(self, documents: Sequence[Document]) -> None:
        lost = self.findings.refused
        if lost is None:
            return
        raise DataError(
            f"{lost.place}: the chat template does not show the tool_calls of an answer, and nothing else is in it: "
            f"the model would learn to answer nothing. So it is with {lost.count:,} of {len(documents):,} examples "
            f"there. Choose a data.chat_template that knows tools, or remove these examples."
        )

    def _is_surely_long(self, document: Document) -> bool:
        content = document.content
        return isinstance(content, Text) and len(content.text) > _CHARACTERS_PER_TOKEN * self._max_length

    def _encoding(self, document: Document, plan: Segments, prefixes: list[list[int]]) -> Encoding:
        end = self._tokens.end if self._ends_with_eos(document, plan) else []
        self._note_stops(document, plan, end)
        if not prefixes:
            return self._split(plan[0][0], end)
        ids, lengths = self._joined(plan, prefixes)
        if not ids:
            return Encoding((), 0, 0, cut=False)
        begin = [] if self._is_rendered(document) or self._tokens.has_begun(ids) else self._tokens.begin
        if ids[-1:] == end:  # written out in the data
            end = []
        content = document.content
        if isinstance(content, Text) and len(begin) + len(ids) + len(end) > self._max_length:
            return self._split(content.text, end)
        trained = [flag for (_, flag), tokens in zip(plan, lengths, strict=True) for _ in range(tokens)]
        ids, trained = [*begin, *ids, *end], [*[False] * len(begin), *trained, *[True] * len(end)]
        if self._tokens.has_begun(ids):
            trained[: len(self._tokens.begin)] = [False] * len(self._tokens.begin)
        piece = _piece(ids[: self._max_length], trained[: self._max_length])
        pieces = (piece,) if piece.trained.any() else ()
        return Encoding(pieces, len(ids), len(ids), cut=len(ids) > self._max_length)

    def _note_stops(self, document: Document, plan: Segments, end: list[int]) -> None:
        """Remember the tokens that answers and texts end with: they end what is generated."""
        self.stop_tokens.update(end)
        for text, trained in plan if self._is_rendered(document) else ():
            if trained and (mark := self._tokens.mark_of(text)) is not None:
                self.stop_tokens.add(self._tokens.id_of(mark))

    def _joined(self, plan: Segments, prefixes: list[list[int]]) -> tuple[list[int], list[int]]:
        """Tokens of the whole document, and the number of tokens of each segment.

        Where the tokens of a prompt change with what follows it (a space that belongs to the next word), the
        segments are taken by themselves: the prompt must be what the model meets when it is asked.
        """
        whole = prefixes[-1]
        if all(whole[: len(prefix)] == prefix for prefix in prefixes):
            ends = [len(prefix) for prefix in prefixes]
            return whole, [end - start for start, end in zip([0, *ends], ends, strict=False)]
        segments = [prefixes[0], *self._tokens.ids([text for text, _ in plan[1:]])]
        return [token for segment in segments for token in segment], [len(segment) for segment in segments]

    def _split(self, text: str, end: list[int]) -> Encoding:
        """Cut long text at paragraphs; a paragraph that does not fit at lines; a line anywhere."""
        begin = self._tokens.begin
        room = self._max_length - len(begin) - len(end)
        room = max(room, 1)
        parts = [
            ids[at : at + room]
            for ids in self._tokens.ids(list(self._groups(text, room)))
            for at in range(0, len(ids), room)
        ]
        if parts and self._tokens.has_begun(parts[0]):  # written out in the data
            parts[0] = parts[0][len(begin) :]
        if parts and parts[-1][-1:] == end:
            parts[-1].pop()
        parts = [part for part in parts if part]
        if not parts:
            return Encoding((), 0, 0, cut=False)
        tokens = sum(map(len, parts)) + len(end)
        parts = [[*begin, *part] for part in parts]
        parts[-1].extend(end)
        pieces = [_piece(part, [at >= len(begin) for at in range(len(part))]) for part in parts]
        return Encoding(tuple(piece for piece in pieces if piece.trained.any()), tokens, tokens, cut=False)

    def _groups(self, text: str, room: int) -> Iterator[str]:
        """Yield the text in groups of as many paragraphs as fit in `room` tokens."""
        split = _PARAGRAPH_BORDER.split(text)
        paragraphs = [a + b for a, b in zip(split[::2], [*split[1::2], ""], strict=True)]
        units: list[tuple[str, int]] = []
        for paragraph, ids in zip(paragraphs, self._tokens.ids(paragraphs), strict=True):
            if len(ids) <= room:
                units.append((paragraph, len(ids)))
            else:
                lines = paragraph.splitlines(keepends=True)
                units += zip(lines, map(len, self._tokens.ids(lines)), strict=True)
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
        return trained and self._tokens.mark_of(last) is None

    def _rows(self, document: Document) -> list[Segments]:
        """The rows of a document, none of them empty; each in segments of text, and whether they are trained."""
        place, content = document.place, document.content
        rows: list[Segments]
        match content:
            case Text(text):
                rows = [[(text, True)]] if text.strip() else []
            case Completion(prompt, completion):
                if not completion.strip():
                    self.findings.add("empty", place)
                rows = [[(prompt, False), (completion, True)]]
            case Instruction(output=output) if not self._has_template:
                self.findings.add("headings", place)
                rows = [[(_under_headings(content), False), (output, True)]]
            case Instruction():
                rows = self._conversation(place, Conversation(content.turns()), answers_only=True)
            case Conversation():
                rows = self._conversation(place, content, answers_only=self._assistant_only_loss)
        rows = [[(text, trained) for text, trained in row if text] for row in rows]
        return [row for row in rows if row]

    def _conversation(self, place: str, conversation: Conversation, *, answers_only: bool) -> list[Segments]:
        if not self._has_template:
            raise DataError(
                f"This base model has no chat template but the data are messages ({place}). Choose "
                f"data.chat_template: chatml, or use the instruction-tuned model."
            )
        return conversation_rows(
            place, conversation, self._renderer, self._tokens, self.findings, answers_only=answers_only
        )


def _under_headings(content: Instruction) -> str:
    """The prompt of an instruction where there is no chat template."""
    earlier = "".join(_INSTRUCTION.format(question) + answer + "\n\n" for question, answer in content.history)
    system = f"{content.system}\n\n" if content.system else ""
    return system + earlier + _INSTRUCTION.format(content.instruction)


def _piece(ids: list[int], trained: list[bool]) -> Piece:
    piece = Piece(np.array(ids, np.int64), np.array(trained, np.bool_))
    piece.trained[:1] = False
    return piece


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
