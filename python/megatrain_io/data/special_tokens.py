"""Which special tokens text begins and ends with: one rule for data, for generation and for the export."""

import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["SpecialTokens"]

_LIKE_A_MARK = re.compile(r"<\|\S+\|>|<end_\S+>")


class SpecialTokens:
    """The special tokens of a tokenizer.

    Attributes:
        begin: what the tokenizer puts before a text, such as bos.
        end: eos, or nothing where there is none.
        marks: all tokens that stand in a text as they are: `<|im_end|>`.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        """Ask the tokenizer, which is not changed."""
        self._tokenizer: Any = tokenizer
        # Only what it begins with is asked: a post-processor that also appends something would make every
        # prompt end with it.
        begun: list[int] = self._tokenizer("a", verbose=False)["input_ids"]
        plain = self.ids(["a"])[0]
        starts = (at for at in range(len(begun)) if plain and begun[at : at + len(plain)] == plain)
        self.begin = begun[: next(starts, 0)]
        eos = self._tokenizer.eos_token_id
        self.end: list[int] = [] if eos is None else [eos]
        # Some that are not called special end turns; others are words, spaces of some length, or `</think>`.
        added = (
            str(token)
            for token in self._tokenizer.added_tokens_decoder.values()
            if token.special or _LIKE_A_MARK.fullmatch(str(token))
        )
        self.marks = frozenset({*self._tokenizer.all_special_tokens, *added})
        self._lengths = sorted({len(mark) for mark in self.marks if mark}, reverse=True)

    def ids(self, texts: list[str]) -> list[list[int]]:
        """Tokens of each text, without those that the tokenizer would add."""
        if not texts:
            return []
        found: list[list[int]] = self._tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        return found

    def prompt(self, text: str) -> list[int]:
        """Tokens of a text that is to be continued."""
        ids = self.ids([text])[0]
        return ids if self.has_begun(ids) else [*self.begin, *ids]

    def has_begun(self, ids: list[int]) -> bool:
        """Whether the text has itself what the tokenizer would put before it."""
        return bool(self.begin) and ids[: len(self.begin)] == self.begin

    def mark_of(self, text: str) -> str | None:
        """The token that a text ends with, if it is one that stands in a text as it is."""
        # The longest first, for what ends with one that is the end of another.
        return next((text[-n:] for n in self._lengths if text[-n:] in self.marks), None)

    def id_of(self, mark: str) -> int:
        """The number of a token."""
        number: int = self._tokenizer.convert_tokens_to_ids(mark)
        return number
