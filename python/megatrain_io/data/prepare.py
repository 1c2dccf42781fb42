"""Training data, from files to rows of tokens: read, masked and tokenised once, then kept on disk.

::

    CACHE/index.json     fingerprint of everything that decides the tokens; what the shard files hold; summary
    CACHE/train.tokens   rows to train
    CACHE/eval.tokens    rows held out, if any

The cache is used while its fingerprint is that of the files, the tokenizer and the options, and its content is
what was written; otherwise it is made anew.
"""

import hashlib
import json
import math
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, get_args

import numpy as np

from megatrain_io.data.chat_templates import read_chat_template
from megatrain_io.data.files import find_files
from megatrain_io.data.formats import Document, DocumentReader, Format, Text
from megatrain_io.data.packed_dataset import EpochOrder, PackedDataset
from megatrain_io.data.packing import RowWriter, Shard
from megatrain_io.data.tokenize import Asking, Encoder, Encoding, marked, tokenizer_digest
from megatrain_io.errors import ConfigError, DataError, StorageError
from megatrain_io.files import make_folder, new_file, read_file, replace_file
from megatrain_io.text import visible

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["DataOptions", "DataSummary", "FileSummary", "TrainingData", "asked_in_training", "prepare"]

# Raised with every change that gives other rows for the same data, or another layout of the files.
_CACHE_VERSION = 2
_INDEX = "index.json"
_SHARD = "{}.tokens"
_INDEX_BYTES_MAX = 256 << 20
# Documents that are tokenised together: as many, or of as many bytes.
_BATCH_DOCUMENTS = 256
_BATCH_BYTES = 1 << 20
_FILES_SHOWN = 10


@dataclass(frozen=True)
class DataOptions:
    """What to train on, and how it is made into rows.

    Attributes:
        train: files and folders.
        eval: what is held out: a share of the documents of `train`, a file or folder of its own, or None.
        format: forces one format for all files; None finds it out for each.
        fields: which key of the data stands for which of ours: `{"prompt": "question"}`.
        max_length: tokens of a row.
        packing: put several short documents into a row, where the architecture keeps them apart.
        assistant_only_loss: train the assistant's turns of conversations, otherwise all of them.
        chat_template: "chatml", the path or the text of a Jinja template, or None for the tokenizer's.
        seed: of the share held out, and of the order of the rows.
    """

    train: tuple[Path, ...]
    eval: float | Path | None = None
    format: Format | None = None
    fields: Mapping[str, str] = field(default_factory=dict)
    max_length: int = 1024
    packing: bool = True
    assistant_only_loss: bool = True
    chat_template: str | None = None
    seed: int = 42

    def __post_init__(self) -> None:
        if self.max_length < 2:  # noqa: PLR2004 - one token predicts nothing
            raise ConfigError(f"data.max_length: {self.max_length} is too short; give at least 2")
        share = self.eval
        if isinstance(share, (int, float)) and not 0 < share < 1:
            raise ConfigError(f"data.eval: {share} is not a share between 0 and 1, such as 0.02, nor a path")


@dataclass(frozen=True)
class FileSummary:
    """What was found in a file of the data. Tokens are counted before any are cut off."""

    path: str
    format: str
    documents: int
    tokens: int


@dataclass(frozen=True)
class DataSummary:
    """What became of the data: `str()` is all of it in lines for a person.

    Attributes:
        not_read: sentences about files that are not read, with their share; not part of `str()`, but to be said first.
        files: those of `train`, then those of `eval`.
        cut: number of examples whose end was cut off at `max_length`.
        dropped: number of examples left out because nothing of them would be trained.
        longest: tokens of the longest example; text, which is split and not cut, left out.
        rows: one line on the rows for training, and one on those held out, if any.
        notes: sentences about what was skipped, cut or switched off.
        sample_place: file and line of the sample.
        sample: the first document to train, decoded, with what is trained as `{+...+}`.
    """

    not_read: tuple[str, ...]
    files: tuple[FileSummary, ...]
    cut: int
    dropped: int
    longest: int
    rows: tuple[str, ...]
    notes: tuple[str, ...]
    sample_place: str
    sample: str

    def __str__(self) -> str:
        lines = [
            f"  {file.path}: {file.format}, {_counted(file.documents, 'document')}, {file.tokens:,} tokens"
            for file in self.files[:_FILES_SHOWN]
        ]
        if rest := self.files[_FILES_SHOWN:]:
            documents, tokens = sum(file.documents for file in rest), sum(file.tokens for file in rest)
            lines.append(f"  {len(rest)} more files: {_counted(documents, 'document')}, {tokens:,} tokens")
        lines += [*self.rows, *(f"note: {note}" for note in self.notes)]
        lines.append(f"sample ({self.sample_place}), {{+trained+}}:")
        lines += [f"  | {line}" for line in self.sample.split("\n")]
        # A line is one of ours, whatever names and texts have in them.
        return "\n".join(map(visible, lines))


@dataclass(frozen=True)
class TrainingData:
    """Rows to train and rows held out, and how they were made.

    Attributes:
        train: rows to train.
        eval: rows held out, or None.
        order: the order in which the rows of `train` are trained.
        fingerprint: sha256 over the files, the tokenizer and the options that decide the tokens.
        summary: what was found in the files, and what became of it.
        chat_template: text of the template that the options chose, which the trained model needs; None where
            it is the tokenizer's own.
        stop_tokens: what texts and answers end with, and so what ends generation.
        reused: whether the tokens were in the cache already.
    """

    train: PackedDataset
    eval: PackedDataset | None
    order: EpochOrder
    fingerprint: str
    summary: DataSummary
    chat_template: str | None
    stop_tokens: tuple[int, ...]
    reused: bool


def prepare(
    options: DataOptions,
    tokenizer: "PreTrainedTokenizerBase",
    cache_dir: Path,
    *,
    packs: bool,
    vocabulary: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> TrainingData:
    """Make training data ready: from the cache, or by reading and tokenising all of it.

    Args:
        options: what to train on.
        tokenizer: the model's.
        cache_dir: folder for the tokens, made if missing. One process at a time.
        packs: whether the architecture keeps packed documents apart; if not, rows hold one document each.
        vocabulary: number of tokens that the model knows, which padding must be one of; None = all are known.
        progress: called with bytes read and bytes in all, while tokenising.

    Raises:
        DataError: the data cannot be used; the message names file and line.
        ConfigError: an option is wrong.
        StorageError: the tokens cannot be written.
    """
    return _Preparation(options, tokenizer, cache_dir, packs=packs, vocabulary=vocabulary).run(
        progress or (lambda _done, _total: None)
    )


def asked_in_training(cache_dir: Path) -> Mapping[Asking, int]:
    """How many examples of the data in a cache are asked for in which way; none where there is no cache."""
    try:
        asked = json.loads(read_file(cache_dir / _INDEX, _INDEX_BYTES_MAX).decode().partition("\n")[2])[
            "asked"
        ]
        return {how: int(asked.get(how, 0)) for how in get_args(Asking)}
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return {}


class _Preparation:
    """One call of `prepare`: the files it found, and how their rows are loaded from the cache or built."""

    def __init__(
        self,
        options: DataOptions,
        tokenizer: "PreTrainedTokenizerBase",
        cache_dir: Path,
        *,
        packs: bool,
        vocabulary: int | None,
    ) -> None:
        self._options = options
        self._vocabulary = vocabulary
        self._tokenizer: Any = tokenizer
        self._cache_dir = cache_dir
        self._packed = options.packing and packs
        self._reader = DocumentReader(options.format, options.fields)
        self._chat_template = read_chat_template(options.chat_template)
        found = [find_files(options.train, "data.train", self._reader.reads_unknown_as)]
        if isinstance(options.eval, Path):
            found.append(find_files((options.eval,), "data.eval", self._reader.reads_unknown_as))
        self._train_files = found[0].files
        self._eval_files = [file for each in found[1:] for file in each.files]
        self._files = [*self._train_files, *self._eval_files]
        self._not_read = tuple(sentence for each in found for sentence in each.not_read)
        self._notes = _first_few([note for each in found for note in each.notes])
        if options.packing and not packs:
            self._notes.append("packing is off: this architecture does not keep the documents of a row apart")

    def run(self, progress: Callable[[int, int], None]) -> TrainingData:
        fingerprint = self._fingerprint()
        data = self._load(fingerprint)
        if data is None:
            try:
                self._build(fingerprint, progress)
            except OSError as error:
                raise StorageError(
                    f"The tokens cannot be written to {error.filename or self._cache_dir}: "
                    f"{error.strerror or error}. Nothing else was touched. Make room there or choose another folder, "
                    f"then start again."
                ) from error
            data = self._load(fingerprint)
            if data is None:
                raise DataError(
                    f"{self._cache_dir} does not hold what was just written to it. Check the drive, and that no "
                    f"other process uses this folder."
                )
            data = replace(data, reused=False)
        return data

    def _fingerprint(self) -> str:
        options = self._options
        share = options.eval if isinstance(options.eval, float) else None
        decisive = [
            _CACHE_VERSION,
            [(file.name, file.kind, file.sha256) for file in self._train_files],
            [(file.name, file.kind, file.sha256) for file in self._eval_files],
            [share, options.seed if share else None],
            [options.format, dict(options.fields), options.max_length, self._packed],
            [options.assistant_only_loss, self._chat_template],
            tokenizer_digest(self._tokenizer),
        ]
        return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()

    # ----------------------------------------------------------------------------------------- the cache

    def _load(self, fingerprint: str) -> TrainingData | None:
        """The training data that the cache holds; None where it holds others, damaged ones or nothing."""
        try:
            text = read_file(self._cache_dir / _INDEX, _INDEX_BYTES_MAX).decode()
            checksum, _, body = text.partition("\n")
            if checksum != hashlib.sha256(body.encode()).hexdigest():
                return None
            index = json.loads(body)
            if index["fingerprint"] != fingerprint:
                return None
            rows = {name: self._open(name, shard) for name, shard in index["shards"].items()}
        except (OSError, ValueError, RecursionError):  # DataError is a ValueError too
            return None
        found = index["summary"]
        # The same files may lie elsewhere by now.
        files = tuple(
            FileSummary(**{**old, "path": str(file.path)})
            for old, file in zip(found["files"], self._files, strict=True)
        )
        lists = {
            "not_read": self._not_read,
            "files": files,
            "rows": tuple(found["rows"]),
            "notes": (*self._notes, *found["notes"]),
        }
        return TrainingData(
            train=rows["train"],
            eval=rows.get("eval"),
            order=EpochOrder(len(rows["train"]), self._options.seed),
            fingerprint=fingerprint,
            summary=DataSummary(**{**found, **lists}),
            chat_template=self._chat_template,
            stop_tokens=tuple(index["stop_tokens"]),
            reused=True,
        )

    def _open(self, name: str, shard: dict[str, Any]) -> PackedDataset:
        # Any does, as nothing attends to it; but the embedding must have it, and a tokenizer may have a token more.
        tokens = (self._tokenizer.pad_token_id, self._tokenizer.eos_token_id, 0)
        known = math.inf if self._vocabulary is None else self._vocabulary
        pad = next(token for token in tokens if token is not None and 0 <= token < known)
        return PackedDataset(self._cache_dir / _SHARD.format(name), Shard(**shard), pad)

    def _build(self, fingerprint: str, progress: Callable[[int, int], None]) -> None:
        make_folder(self._cache_dir)
        # While there is no index, what else lies there is nothing.
        train, eval_ = (self._cache_dir / _SHARD.format(name) for name in ("train", "eval"))
        for path in (self._cache_dir / _INDEX, train, eval_):
            path.unlink(missing_ok=True)
        held_out = self._options.eval is not None
        with new_file(train) as train_file:
            if held_out:
                with new_file(eval_) as eval_file:
                    shards, counts = self._tokenise(progress, train_file, eval_file)
            else:
                shards, counts = self._tokenise(progress, train_file, None)
        index = {
            "fingerprint": fingerprint,
            "shards": {name: asdict(shard) for name, shard in shards.items()},
            "asked": dict(counts.asked),
            "stop_tokens": counts.stop_tokens,
            "summary": asdict(self._summary(shards, counts)),
        }
        body = json.dumps(index, indent=1) + "\n"
        checksum = hashlib.sha256(body.encode()).hexdigest()
        replace_file(self._cache_dir / _INDEX, f"{checksum}\n{body}")

    # ------------------------------------------------------------------------------------------ building

    def _tokenise(
        self, progress: Callable[[int, int], None], train_file: BinaryIO, eval_file: BinaryIO | None
    ) -> tuple[dict[str, Shard], "_Counts"]:
        options = self._options
        counts = _Counts()
        encoder = Encoder(
            self._tokenizer,
            max_length=options.max_length,
            assistant_only_loss=options.assistant_only_loss,
            chat_template=self._chat_template,
        )
        # Not the number of tokens: there may be gaps between their numbers.
        vocabulary = max(self._tokenizer.get_vocab().values()) + 1
        outputs = {"train": train_file} | ({"eval": eval_file} if eval_file else {})
        writers = {
            name: RowWriter(file, vocabulary=vocabulary, max_length=options.max_length, packed=self._packed)
            for name, file in outputs.items()
        }
        threshold = self._threshold() if isinstance(options.eval, float) else -1
        total = sum(file.size for file in self._files)
        done = 0
        with closing(encoder):
            for number, file in enumerate(self._files):
                for batch in _batches(self._reader.read(file)):
                    for document, encoding in zip(batch, encoder.encode(batch), strict=True):
                        counts.add(number, document, encoding, encoder.asked_by(document))
                        held_out = number >= len(self._train_files) or (
                            threshold >= 0 and document.key(options.seed) <= threshold
                        )
                        for piece in encoding.pieces:
                            writers["eval" if held_out else "train"].add(piece.ids, piece.trained)
                        if encoding.pieces and not held_out and not counts.sample:
                            counts.sample_place = document.place
                            counts.sample = marked(self._tokenizer, encoding.pieces[0])
                    progress(done + batch[-1].bytes_read, total)
                done += file.size
        counts.findings = tuple(encoder.findings.sentences())
        counts.stop_tokens = sorted(encoder.stop_tokens)
        for name, writer in writers.items():
            if not writer.shard.documents:
                self._refuse_empty(name, counts)
        return {name: writer.finish() for name, writer in writers.items()}, counts

    def _threshold(self) -> int:
        """The key up to which documents are held out: the share of them with the smallest hashes."""
        keys = array("Q")
        for file in self._train_files:
            for document in self._reader.read(file):
                keys.append(document.key(self._options.seed))
                if document.whole:  # further passages have the same key
                    break
        if not keys:
            return -1  # refused when nothing comes of tokenising either
        share = float(self._options.eval or 0)  # type: ignore[arg-type]
        chosen = max(1, round(share * len(keys)))
        ordered = np.sort(np.frombuffer(keys, np.uint64))
        if ordered[chosen - 1] == ordered[-1]:
            raise DataError(
                f"data.eval: a share of {share} cannot be held out of {_counted(len(keys), 'document')} "
                f"({len(np.unique(ordered))} different); a plain-text file is one document. Split the data into "
                f"more documents, or give data.eval a file of its own."
            )
        return int(ordered[chosen - 1])

    def _refuse_empty(self, name: str, counts: "_Counts") -> None:
        files = self._eval_files if name == "eval" and self._eval_files else self._train_files
        if not any(counts.documents[file] for file in range(len(self._files)) if self._files[file] in files):
            named = ", ".join(f"{file.path} ({file.size:,} bytes)" for file in files[:_FILES_SHOWN])
            more = f" and {len(files) - _FILES_SHOWN} more" if len(files) > _FILES_SHOWN else ""
            raise DataError(f"data.{name}: no documents in {named}{more}. The files are empty: give others.")
        reasons = " ".join(counts.notes(self._options.max_length))
        raise DataError(f"data.{name}: nothing is left to {name} on. {reasons}")

    def _summary(self, shards: dict[str, Shard], counts: "_Counts") -> DataSummary:
        files = tuple(
            FileSummary(str(file.path), counts.formats.get(i, "empty"), counts.documents[i], counts.tokens[i])
            for i, file in enumerate(self._files)
        )
        rows = tuple(_rows_line(name, shard, self._options.max_length) for name, shard in shards.items())
        return DataSummary(
            not_read=(),  # of the files as they are when the cache is read
            files=files,
            cut=counts.cut,
            dropped=counts.dropped,
            longest=max(counts.lengths, default=0),
            rows=rows,
            notes=(
                *counts.notes(self._options.max_length),
                *counts.findings,
                *counts.unused_notes(),
                *self._asking_notes(counts),
            ),
            sample_place=counts.sample_place,
            sample=counts.sample,
        )

    def _asking_notes(self, counts: "_Counts") -> list[str]:
        """Where the model has a chat template, and is trained without it."""
        prompts = counts.asked["prompt"]
        if not prompts or not (self._chat_template or self._tokenizer.chat_template):
            return []
        prompt, completion = (self._options.fields.get(key, key) for key in ("prompt", "completion"))
        sentence = (
            f"prompt and completion ({_counted(prompts, 'example')}) are trained as they stand, and not in the model's "
            f"chat template: ask the trained model without --chat. To train them in the template, set data.fields: "
            f"{{instruction: {prompt}, output: {completion}}}."
        )
        return [sentence]


class _Counts:
    """Counts of documents and tokens by file, and of what was cut or dropped."""

    def __init__(self) -> None:
        self.documents: Counter[int] = Counter()
        self.tokens: Counter[int] = Counter()
        self.formats: dict[int, str] = {}
        self.lengths = array("I")
        self.cut = 0
        self.cut_away = 0  # nothing trained is left of them
        self.untrained = 0  # there never was anything to train in them
        self.unused: Counter[str] = Counter()
        self.asked: Counter[Asking] = Counter()
        self.findings: tuple[str, ...] = ()
        self.stop_tokens: list[int] = []
        self.sample_place = ""
        self.sample = ""

    @property
    def dropped(self) -> int:
        return self.cut_away + self.untrained

    def add(self, file: int, document: Document, encoding: Encoding, asking: Asking) -> None:
        is_text = isinstance(document.content, Text)
        self.formats[file] = document.format
        self.documents[file] += not (isinstance(document.content, Text) and not document.content.ends)
        self.tokens[file] += encoding.tokens
        if not is_text:
            self.lengths.append(encoding.longest)
        self.unused.update(document.unused)
        self.asked[asking] += bool(encoding.pieces)
        self.cut += encoding.cut
        if not encoding.pieces:
            self.cut_away += encoding.cut
            self.untrained += not encoding.cut

    def notes(self, max_length: int) -> list[str]:
        """Sentences about what was cut off or dropped, with how long the examples are."""
        notes = []
        examples = len(self.lengths)
        if self.cut:
            lengths_95 = np.percentile(np.frombuffer(self.lengths, np.uint32), 95, method="higher")
            fits = math.ceil(lengths_95 / 64) * 64
            lengths = f"Longest is {max(self.lengths):,} tokens; 95 % fit in {fits:,}."
            if self.cut_away:
                notes.append(
                    f"{self.cut_away:,} of {examples:,} examples have no trained token left after max_length "
                    f"{max_length:,}; they would train nothing and were dropped. {lengths}"
                )
            if kept := self.cut - self.cut_away:
                notes.append(
                    f"{kept:,} of {examples:,} examples were cut off at max_length {max_length:,}. {lengths}"
                )
        if self.untrained:
            notes.append(
                f"{_counted(self.untrained, 'example')} had nothing to train (no answer of the assistant, or no "
                f"more than a token of text): dropped."
            )
        return notes

    def unused_notes(self) -> list[str]:
        """A sentence about the keys of the data that nothing is done with."""
        if not self.unused:
            return []
        named = ", ".join(f"{key} ({count:,} times)" for key, count in self.unused.most_common(_FILES_SHOWN))
        more = f" and {len(self.unused) - _FILES_SHOWN} more" if len(self.unused) > _FILES_SHOWN else ""
        return [
            f"keys of the data that are not used: {named}{more}. Map them with data.fields if they are meant."
        ]


def _batches(documents: Iterator[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    start = 0
    for document in documents:
        batch.append(document)
        if len(batch) >= _BATCH_DOCUMENTS or document.bytes_read - start >= _BATCH_BYTES:
            yield batch
            batch, start = [], document.bytes_read
    if batch:
        yield batch


def _rows_line(name: str, shard: Shard, max_length: int) -> str:
    how = "one document each"
    if shard.packed:
        how = f"packed, {100 * shard.tokens / (shard.rows * max_length):.1f} % full"
    return (
        f"{name}: {_counted(shard.rows, 'row')} of up to {max_length:,} tokens ({how}), {shard.tokens:,} tokens, "
        f"{shard.trained_tokens:,} trained"
    )


def _first_few(notes: list[str]) -> list[str]:
    rest = len(notes) - _FILES_SHOWN
    return [*notes[:_FILES_SHOWN], f"{rest} more files were skipped"] if rest > 0 else notes


def _counted(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"
