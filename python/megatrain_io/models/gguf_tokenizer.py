"""Tokenizers in GGUF files, both ways: byte-level BPE, which llama.cpp calls gpt2, and sentencepiece, called llama.

A GGUF file has a vocabulary, merges or scores, and the name of a rule by which text is cut before it is merged. Rules
are read and written by name; one that is not known here is refused, as its texts would become other tokens.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerBase

from megatrain_io.errors import ModelFilesError, UnsupportedModelError
from megatrain_io.models.gguf_file import GgufFile, Value

__all__ = ["GgufTokenizer", "tokenizer_in", "tokenizer_keys"]

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)
_SPACE = "\u2581"
_TOKEN_CHARACTERS_MAX = 512
_BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")
_PADDING = re.compile(r"\[PAD\d+\]")
# What ends a turn, where a chat template has it: files name one end of text, and models have two.
_ENDS_OF_TURN = (
    *(
        "<|im_end|>",
        "<|eot_id|>",
        "<end_of_turn>",
        "<|end|>",
        "<|end_of_text|>",
        "<|endoftext|>",
        "<|eom_id|>",
    ),
    *("<turn|>", "<|return|>", "<|END_OF_TURN_TOKEN|>", "<|end_of_turn|>"),
)
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = _WORDS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + _REST
_QWEN2 = _WORDS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + _REST
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_GPT4O = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_WORDS}?|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_WORDS}?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_DIGITS = "digits"  # each digit by itself, then the rule of GPT-2


@dataclass(frozen=True)
class _Rule:
    """How text is cut before it is merged.

    Attributes:
        split: a regular expression; ``_DIGITS``; empty for the rule of GPT-2.
        whole_words: whether a word that is a token is never merged from parts.
        begins: whether a text begins with bos where the file does not say it.
        composes: whether letters and their accents become one character first.
    """

    split: str
    whole_words: bool = False
    begins: bool = False
    composes: bool = False


_LLAMA3_RULE = _Rule(_LLAMA3, whole_words=True, begins=True)
_RULES = {
    "gpt-2": _Rule(""),
    "llama-bpe": _LLAMA3_RULE,
    "llama3": _LLAMA3_RULE,
    "llama-v3": _LLAMA3_RULE,
    "qwen2": _Rule(_QWEN2, composes=True),
    "deepseek-r1-qwen": _Rule(_QWEN2, composes=True),
    "smollm": _Rule(_DIGITS),
    "starcoder": _Rule(_DIGITS),
    "refact": _Rule(_DIGITS),
    "tekken": _Rule(_TEKKEN, whole_words=True, begins=True),
    "gpt-4o": _Rule(_GPT4O),
}
"""By ``tokenizer.ggml.pre``; the first with a regular expression is the name that is written for it."""


@dataclass(frozen=True)
class GgufTokenizer:
    """The tokenizer of a GGUF file as files of a model folder.

    Attributes:
        files: content of tokenizer.json, tokenizer_config.json, and chat_template.jinja where there is a template.
        special: number of each special token that the file names: ``bos_token_id`` and so on.
        ends: tokens that end what is generated; the first is eos.
        notes: sentences for the person.
    """

    files: dict[str, bytes]
    special: dict[str, int]
    ends: list[int]
    notes: list[str]


# ------------------------------------------------------------------------------------------- reading


def tokenizer_in(file: GgufFile, architecture: str, vocabulary: int) -> GgufTokenizer:
    """The tokenizer that a file describes.

    Args:
        file: an open file.
        architecture: of its model, in llama.cpp's words.
        vocabulary: rows of its embedding.

    Raises:
        ModelFilesError: what it says of a tokenizer cannot be.
        UnsupportedModelError: its tokenizer is of a kind that is not read.
    """
    return _Reading(file, architecture, vocabulary).result()


class _Reading:
    def __init__(self, file: GgufFile, architecture: str, vocabulary: int) -> None:
        self._file, self._architecture = file, architecture
        self._notes: list[str] = []
        self._tokens: list[str] = self._list("tokens", str)
        if not self._tokens or len(self._tokens) > vocabulary:
            self._refuse(f"it has {len(self._tokens):,} tokens, and the embedding {vocabulary:,} rows")
        if (longest := max(map(len, self._tokens))) > _TOKEN_CHARACTERS_MAX:
            self._refuse(f"a token has {longest:,} characters, at most {_TOKEN_CHARACTERS_MAX} are read")
        self._types: list[int] = self._list("token_type", int) or [_NORMAL] * len(self._tokens)
        self._scores: list[float] = self._list("scores", float)
        for name, values in (("token_type", self._types), ("scores", self._scores)):
            if values and len(values) != len(self._tokens):
                self._refuse(f"it has {len(self._tokens):,} tokens and {len(values):,} entries of {name}")
        self._number = {token: index for index, token in enumerate(self._tokens)}
        if len(self._number) < len(self._tokens):
            self._refuse("a token occurs twice")

    def result(self) -> GgufTokenizer:
        kind = self._file.metadata.get("tokenizer.ggml.model")
        build = {"gpt2": self._byte_level, "llama": self._sentencepiece}.get(str(kind))
        if build is None:
            raise UnsupportedModelError(
                f"{self._file.path} has a tokenizer of the kind {kind!r}; gpt2 and llama are read: import the model "
                "from its safetensors folder"
            )
        try:
            backend, begins = build()
        except (ModelFilesError, UnsupportedModelError):
            raise
        except Exception as cause:  # noqa: BLE001 - whatever the library says
            self._refuse(f"it cannot be built ({' '.join(str(cause).split())[:200]})", cause)
        template = self._text("tokenizer.chat_template")
        special = self._special(template)
        self._add_special(backend)
        self._begin_and_end(backend, special, begins=begins)
        named = {name.removesuffix("_id"): self._tokens[number] for name, number in special.items()}
        context = self._file.metadata.get(f"{self._architecture}.context_length")
        settings = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
            "model_max_length": context,
            **named,
        }
        files = {
            "tokenizer.json": backend.to_str().encode(),
            "tokenizer_config.json": (json.dumps(settings, indent=2, ensure_ascii=False) + "\n").encode(),
        }
        if template:
            files["chat_template.jinja"] = template.encode()
        return GgufTokenizer(files, special, self._ends(special, template), self._notes)

    # ---------------------------------------------------------------------------------- kinds

    def _byte_level(self) -> tuple[Tokenizer, bool]:
        name = self._text("tokenizer.ggml.pre")
        if name in {"", "default"}:
            self._notes.append(
                f"{self._file.path} does not say how its tokenizer cuts text: the rule of GPT-2 is taken. Files made "
                "since May 2024 say it; a newer one of the same model is safer"
            )
        rule = _RULES.get(name if name not in {"", "default"} else "gpt-2")
        if rule is None:
            raise UnsupportedModelError(
                f"{self._file.path} cuts text by the rule {name!r}; read are {', '.join(_RULES)}: import the model "
                "from its safetensors folder"
            )
        spelling = _byte_spelling()
        letters = {*spelling.values()}
        vocabulary = {}
        for index, (token, kind) in enumerate(zip(self._tokens, self._types, strict=True)):
            if self._is_padding(index):
                continue
            is_spelt = kind != _NORMAL or letters.issuperset(token)
            vocabulary[token if is_spelt else "".join(spelling[byte] for byte in token.encode())] = index
        merges = [self._pair(merge) for merge in self._list("merges", str)]
        if not merges:
            self._refuse("it has no merges")
        backend = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=rule.whole_words))
        if rule.composes:
            backend.normalizer = normalizers.NFC()
        backend.pre_tokenizer = _cutting(rule)
        backend.decoder = decoders.ByteLevel()
        return backend, rule.begins

    def _sentencepiece(self) -> tuple[Tokenizer, bool]:
        is_gemma = self._architecture.startswith("gemma")
        tokens = [
            token.replace(" ", _SPACE) if kind == _USER_DEFINED else token
            for token, kind in zip(self._tokens, self._types, strict=True)
        ]
        vocabulary = {token: index for index, token in enumerate(tokens) if not self._is_padding(index)}
        if not is_gemma and not self._scores:
            self._refuse("it has no scores")
        # The merges of Gemma follow the order of its tokens, those of other models their scores.
        ranks = [-float(index) for index in range(len(tokens))] if is_gemma else self._scores
        number = self._file.metadata.get("tokenizer.ggml.unknown_token_id", -1)
        is_named = type(number) is int and 0 <= number < len(tokens)
        unknown = tokens[number] if is_named else None
        model = models.BPE(
            vocabulary,
            _merges_of(tokens, self._types, ranks),
            unk_token=unknown,
            fuse_unk=True,
            byte_fallback=True,
        )
        backend = Tokenizer(model)
        prefixed = self._file.metadata.get("tokenizer.ggml.add_space_prefix", not is_gemma) is True
        decoding = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
        if not prefixed:
            backend.normalizer = normalizers.Replace(" ", _SPACE)
        elif self._architecture == "phi3":
            backend.normalizer = normalizers.Sequence(
                [normalizers.Prepend(_SPACE), normalizers.Replace(" ", _SPACE)]
            )
        else:
            backend.pre_tokenizer = pre_tokenizers.Metaspace(
                replacement=_SPACE, prepend_scheme="first", split=False
            )
        if prefixed:
            decoding.append(decoders.Strip(" ", 1, 0))
        backend.decoder = decoders.Sequence(decoding)
        return backend, True

    def _is_padding(self, index: int) -> bool:
        """Whether a token only fills the embedding up."""
        token = self._tokens[index]
        return not token or (self._types[index] == _UNUSED and _PADDING.fullmatch(token) is not None)

    def _pair(self, merge: str) -> tuple[str, str]:
        first, _, second = merge.partition(" ")
        if not first or not second or " " in second:
            self._refuse(f"it has the merge {merge[:40]!r}")
        return first, second

    # ---------------------------------------------------------------------------------- special tokens

    def _add_special(self, backend: Tokenizer) -> None:
        """Tokens that stand in a text as they are, special or not."""
        respelt = self._file.metadata.get("tokenizer.ggml.model") == "llama"
        special, plain = [], []
        for token, kind in zip(self._tokens, self._types, strict=True):
            if not token.strip(" "):
                continue  # runs of spaces are merged like other text
            if kind == _CONTROL or (kind == _UNKNOWN and respelt):
                special.append(AddedToken(token, special=True, normalized=False))
            elif kind == _USER_DEFINED:
                text = token.replace(" ", _SPACE) if respelt else token
                plain.append(AddedToken(text, special=False, normalized=respelt and _SPACE in text))
        backend.add_special_tokens(special)
        backend.add_tokens(plain)

    def _special(self, template: str) -> dict[str, int]:
        names = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
        found: dict[str, int] = {}
        for name, key in names.items():
            number = self._file.metadata.get(f"tokenizer.ggml.{key}_token_id")
            if number is None:
                continue
            if type(number) is not int or not 0 <= number < len(self._tokens):
                self._refuse(f"its {name} is token {number!r} of {len(self._tokens):,}")
            if not self._is_padding(number):
                found[f"{name}_token_id"] = number
        turn = next(iter(self._turn_ends(template)), None)
        eos = found.get("eos_token_id")
        # What begins a turn cannot end a text.
        if turn is not None and eos != turn and (eos is None or eos == found.get("bos_token_id")):
            found["eos_token_id"] = turn
            self._notes.append(
                f"{self._file.path} says that a text ends with {self._shown(eos)}; its chat template ends turns with "
                f"{self._shown(turn)}, which is taken"
            )
        return found

    def _turn_ends(self, template: str) -> Iterable[int]:
        """Tokens that end a turn in the chat template, as far as their names are known."""
        if not template:
            return
        for token in _ENDS_OF_TURN:
            number = self._number.get(token)
            if number is not None and token in template and self._types[number] in {_CONTROL, _USER_DEFINED}:
                yield number

    def _ends(self, special: Mapping[str, int], template: str) -> list[int]:
        keys = (f"tokenizer.ggml.{name}_token_id" for name in ("eot", "eom"))
        named = (self._file.metadata.get(key) for key in keys)
        also = [n for n in named if type(n) is int and 0 <= n < len(self._tokens)]
        eos = [special["eos_token_id"]] if "eos_token_id" in special else []
        return [*dict.fromkeys([*eos, *also, *self._turn_ends(template)])]

    def _begin_and_end(self, backend: Tokenizer, special: Mapping[str, int], *, begins: bool) -> None:
        """What is put before and after a text."""
        adds = {
            "bos": self._file.metadata.get("tokenizer.ggml.add_bos_token", begins) is True,
            "eos": self._file.metadata.get("tokenizer.ggml.add_eos_token", False) is True,
        }
        used = {
            name: special[f"{name}_token_id"]
            for name, is_added in adds.items()
            if is_added and f"{name}_token_id" in special
        }
        if not used:
            return
        texts = {name: self._tokens[number] for name, number in used.items()}
        before, after = ([texts[name]] if name in texts else [] for name in ("bos", "eos"))
        backend.post_processor = processors.TemplateProcessing(
            single=[*before, "$A", *after],
            pair=[
                *before,
                "$A",
                *after,
                *(f"{token}:1" for token in before),
                "$B:1",
                *(f"{t}:1" for t in after),
            ],
            special_tokens=[(texts[name], number) for name, number in used.items()],
        )

    def _shown(self, number: int | None) -> str:
        return "nothing" if number is None else repr(self._tokens[number][:40])

    # ---------------------------------------------------------------------------------- values

    def _list(self, name: str, kind: type) -> list[Any]:
        values = self._file.metadata.get(f"tokenizer.ggml.{name}", [])
        if not isinstance(values, list) or any(type(value) is not kind for value in values):
            self._refuse(f"tokenizer.ggml.{name} is no list of {kind.__name__}")
        return values

    def _text(self, key: str) -> str:
        value = self._file.metadata.get(key, "")
        if not isinstance(value, str):
            self._refuse(f"{key} is no text")
        return value

    def _refuse(self, reason: str, cause: BaseException | None = None) -> NoReturn:
        raise ModelFilesError(
            f"{self._file.path}: its tokenizer is damaged: {reason}. Fetch the file again"
        ) from cause


def _cutting(rule: _Rule) -> Any:
    if rule.split == "":
        return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    if rule.split == _DIGITS:
        return pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
            ]
        )
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(rule.split), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def _byte_spelling() -> dict[int, str]:
    """The character that stands for each byte in a byte-level vocabulary."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    spelling = {byte: chr(byte) for byte in plain}
    others = (byte for byte in range(256) if byte not in spelling)
    return spelling | {byte: chr(256 + index) for index, byte in enumerate(others)}


def _merges_of(tokens: Sequence[str], types: Sequence[int], ranks: Sequence[float]) -> list[tuple[str, str]]:
    """All ways to put a token together from two others, those of the best tokens first."""
    numbers = {
        token: index
        for index, (token, kind) in enumerate(zip(tokens, types, strict=True))
        if kind in {_NORMAL, _USER_DEFINED}
    }
    found = []
    for token, index in numbers.items():
        for at in range(1, len(token)):
            first, second = numbers.get(token[:at]), numbers.get(token[at:])
            if first is not None and second is not None:
                found.append((-ranks[index], index, at, first, second))
    found.sort(key=lambda each: each[:3])
    return [(tokens[first], tokens[second]) for *_, first, second in found]


# ------------------------------------------------------------------------------------------- writing


def tokenizer_keys(
    tokenizer: PreTrainedTokenizerBase, vocabulary: int, ends: Sequence[int]
) -> tuple[dict[str, Value], list[str]]:
    """What a tokenizer is in a GGUF file: keys with values, and sentences for the person.

    Args:
        tokenizer: of the model.
        vocabulary: rows of the embedding.
        ends: tokens that end what is generated.

    Raises:
        UnsupportedModelError: llama.cpp would make other tokens of a text, or has no such tokenizer.
    """
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    content = {} if backend is None else json.loads(backend.to_str())
    model = content.get("model") or {}
    if model.get("type") != "BPE":
        raise UnsupportedModelError(
            f"the tokenizer is of the kind {model.get('type') or type(tokenizer).__name__}, and BPE is written as "
            "GGUF. Export the model folder (without --to)"
        )
    written = _Writing(tokenizer, content, vocabulary)
    keys = written.sentencepiece() if model.get("byte_fallback") else written.byte_level()
    for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        number = getattr(tokenizer, f"{name}_token_id")
        if number is not None and number < vocabulary:
            keys[f"tokenizer.ggml.{key}_token_id"] = int(number)
    eos = tokenizer.eos_token_id
    if more := [number for number in ends if number != eos and number < vocabulary]:
        # The one that ends a turn, where the model has more: llama.cpp knows others by their names.
        by_name = [n for n in more if tokenizer.convert_ids_to_tokens(n) in _ENDS_OF_TURN]
        keys["tokenizer.ggml.eot_token_id"] = (by_name or more)[0]
    template: Any = tokenizer.chat_template
    if isinstance(template, dict):
        template = template.get("default")
    if template:
        keys["tokenizer.chat_template"] = str(template)
    return keys, written.notes


class _Writing:
    def __init__(self, tokenizer: PreTrainedTokenizerBase, content: dict[str, Any], vocabulary: int) -> None:
        self._tokenizer: Any = tokenizer
        self._content, self._model = content, content["model"]
        self.notes: list[str] = []
        self._vocabulary = vocabulary
        added = content.get("added_tokens") or []
        self._special = {entry["id"] for entry in added if entry["special"]}
        self._plain = {entry["id"] for entry in added if not entry["special"]}
        self._by_number: dict[int, str] = {number: token for token, number in self._model["vocab"].items()}
        self._by_number |= {entry["id"]: entry["content"] for entry in added}
        if over := [number for number in self._by_number if number >= vocabulary]:
            self.notes.append(
                f"{len(over)} tokens of the tokenizer have no row in the embedding ({vocabulary:,} rows): they are "
                "left out"
            )
        self._merges = [
            tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge)
            for merge in self._model.get("merges") or []
        ]

    def byte_level(self) -> dict[str, Value]:
        name = self._rule()
        tokens, types = self._tokens(" ")
        return {
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.pre": name,
            "tokenizer.ggml.tokens": tokens,
            "tokenizer.ggml.token_type": types,
            "tokenizer.ggml.merges": [" ".join(merge) for merge in self._merges],
            **self._begin_and_end(),
        }

    def sentencepiece(self) -> dict[str, Value]:
        prefix = self._prefix()
        tokens, types = self._tokens(_SPACE)
        rank: dict[str, int] = {}
        for index, (first, second) in enumerate(self._merges):
            rank.setdefault(first + second, index)
        last = len(self._merges) + 1
        # The order of merging is all that scores are for.
        scores = [
            -float(rank.get(token, last)) if kind == _NORMAL else 0.0
            for token, kind in zip(tokens, types, strict=True)
        ]
        return {
            "tokenizer.ggml.model": "llama",
            "tokenizer.ggml.pre": "default",
            "tokenizer.ggml.tokens": tokens,
            "tokenizer.ggml.scores": scores,
            "tokenizer.ggml.token_type": types,
            **self._begin_and_end(),
            "tokenizer.ggml.add_space_prefix": prefix,
        }

    def _tokens(self, space: str) -> tuple[list[str], list[int]]:
        """Token and type of each row of the embedding."""
        unknown = self._model.get("unk_token")
        is_pieces = space == _SPACE
        tokens, types = [], []
        for number in range(self._vocabulary):
            token = self._by_number.get(number)
            kind = _NORMAL
            if token is None:
                token, kind = f"[PAD{number}]", _UNUSED
            elif is_pieces and token == unknown:
                kind = _UNKNOWN
            elif number in self._special:
                kind = _CONTROL
            elif number in self._plain:
                kind = _USER_DEFINED
                token = token.replace(_SPACE, " ") if is_pieces else token
            elif is_pieces and _BYTE_TOKEN.fullmatch(token):
                kind = _BYTE
            tokens.append(token)
            types.append(kind)
        return tokens, types

    def _begin_and_end(self) -> dict[str, Value]:
        ids: list[int] = self._tokenizer("a", verbose=False)["input_ids"]
        bos, eos = self._tokenizer.bos_token_id, self._tokenizer.eos_token_id
        return {
            "tokenizer.ggml.add_bos_token": bool(ids) and bos is not None and ids[0] == bos,
            "tokenizer.ggml.add_eos_token": bool(ids) and eos is not None and ids[-1] == eos,
        }

    def _rule(self) -> str:
        """The name of the rule by which the tokenizer cuts text."""
        normalizer = self._content.get("normalizer")
        steps = _steps(self._content.get("pre_tokenizer"), "pretokenizers")
        kinds = [step["type"] for step in steps]
        split = None
        if kinds == ["ByteLevel"] and steps[0].get("use_regex", True):
            split = ""
        elif (
            kinds == ["Digits", "ByteLevel"]
            and steps[0]["individual_digits"]
            and steps[1].get("use_regex", True)
        ):
            split = _DIGITS
        elif kinds == ["Split", "ByteLevel"] and not steps[1].get("use_regex", True):
            pattern = steps[0]["pattern"]
            split = (
                pattern.get("Regex")
                if steps[0]["behavior"] == "Isolated" and not steps[0]["invert"]
                else None
            )
        is_known = normalizer is None or normalizer.get("type") == "NFC"
        names = [name for name, rule in _RULES.items() if rule.split == split and is_known]
        if not names or any(step.get("add_prefix_space") for step in steps):
            how = json.dumps(self._content.get("pre_tokenizer"))
            self._refuse(f"cuts text by a rule that has no name in GGUF ({how[:200]})")
        return names[0]

    def _prefix(self) -> bool:
        """Whether a text begins with a space that is put before it."""
        normalizer = _steps(self._content.get("normalizer"), "normalizers")
        cutting = _steps(self._content.get("pre_tokenizer"), "pretokenizers")
        kinds = {step["type"] for step in normalizer}, {step["type"] for step in cutting}
        if not kinds[0] <= {"Prepend", "Replace"} or not kinds[1] <= {"Metaspace", "Split"}:
            self._refuse(f"is a sentencepiece with other steps ({', '.join(sorted(kinds[0] | kinds[1]))})")
        scheme = next(
            (step.get("prepend_scheme") for step in cutting if step["type"] == "Metaspace"), "never"
        )
        if scheme == "first":
            self.notes.append(
                "llama.cpp puts a space before a text that begins with one, and after special tokens, too, where "
                "transformers does not: there its tokens are others"
            )
        return "Prepend" in kinds[0] or scheme in {"first", "always"}

    def _refuse(self, reason: str) -> NoReturn:
        raise UnsupportedModelError(
            f"the tokenizer {reason}: llama.cpp would make other tokens of a text. Export the model folder (without "
            "--to)"
        )


def _steps(part: dict[str, Any] | None, name: str) -> list[dict[str, Any]]:
    if part is None:
        return []
    if part["type"] == "Sequence":
        steps: list[dict[str, Any]] = part[name]
        return steps
    return [part]
