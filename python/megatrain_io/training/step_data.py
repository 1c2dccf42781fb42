"""What a run trains on, step by step: rows of files, rows that the caller hands over, or micro-batches of its own."""

import hashlib
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from textwrap import indent
from typing import Any, Protocol, cast

from transformers import PreTrainedTokenizerBase

from megatrain_io.config.schema import DataConfig, TrainConfig
from megatrain_io.data.batch import (
    MicroBatch,
    blank_micro_batch,
    micro_batch_of,
    refuse_tokens,
    trained_tokens,
)
from megatrain_io.data.prepare import DataOptions, TrainingData, prepare
from megatrain_io.errors import ConfigError, DataError
from megatrain_io.files import make_folder, new_file, read_file, storage_errors, sync_folder
from megatrain_io.models.generation_config import with_end_tokens
from megatrain_io.models.gguf_folder import model_folder
from megatrain_io.models.hub_folder import ModelFolder
from megatrain_io.models.partition import PartitionedModel

__all__ = ["FileData", "OwnData", "OwnMicroBatches", "OwnSequence", "StepData", "sequence_of", "step_data"]

Row = Mapping[str, Any] | MicroBatch
"""A row as in a line of a JSON lines file, or a micro-batch."""


class Numbered(Protocol):
    """Data that have a length and give their entries by number, such as the datasets of torch."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> Row: ...


OwnData = Iterable[Row] | Numbered
"""Data of the caller's own: rows or micro-batches."""

OwnSequence = Sequence[Row]
"""The same, to be gone through more than once."""

_TOKENIZER_BYTES_MAX = 1 << 30
_HANDED_OVER = "(micro-batches that were handed to megatrain_io.Trainer: hand them over again)"


def sequence_of(data: OwnData) -> OwnSequence:
    """Data that can be gone through more than once: as they are, if their entries have numbers; else a list of them.

    Raises:
        ConfigError: these are no data.
    """
    if isinstance(data, Sequence) and not isinstance(data, str | bytes):
        return data
    is_numbered = hasattr(data, "__len__") and hasattr(data, "__getitem__")
    if isinstance(data, Mapping | str | bytes | Path) or not (is_numbered or isinstance(data, Iterable)):
        raise ConfigError(
            f"data is a {type(data).__name__}: give rows, each a mapping as in a line of a JSON lines file, or "
            "MicroBatch objects; files are named by data.train of the configuration"
        )
    return _Numbered(data) if is_numbered else list(cast("Iterable[Row]", data))


class _Numbered(Sequence[Row]):
    """Data with numbers, as a sequence."""

    def __init__(self, data: Any) -> None:
        self._data = data

    def __len__(self) -> int:
        return len(self._data)

    def __getitem__(self, index: Any) -> Any:
        if not 0 <= index < len(self._data):
            raise IndexError(index)
        return self._data[index]


class StepData(Protocol):
    """What a run trains on; ``planning.resolve.DataShape`` is a part of it.

    Attributes:
        largest: a micro-batch of the kind and size of the largest.
        mean_share: length of the mean row, as a share of the longest one's.
        micro_batches: number of micro-batches in the data.
        sha256: over all that is trained: a run goes on only with the same.
        summary: what the data are, in sentences for a person.
        files: what ``data.train`` is for a run that goes on with them; None = as it was given.
        not_read: sentences about files of the data that are not read, with their share.
        stop_tokens: what texts and answers end with, and so what ends generation.
    """

    largest: MicroBatch
    mean_share: float
    micro_batches: int | None
    sha256: str
    summary: str
    files: list[str] | None
    not_read: tuple[str, ...]
    stop_tokens: Sequence[int]

    def steps(self, accumulation: int) -> int | None:
        """Optimizer steps of ``train.num_train_epochs``, with so many micro-batches each."""

    def step(self, number: int, accumulation: int) -> list[MicroBatch]:
        """The micro-batches of a step, counted from 1; they follow from its number alone."""

    def held_out(self) -> Iterator[MicroBatch]:
        """Micro-batches of what is held out; none where nothing is."""

    def model_files(self) -> dict[str, bytes]:
        """Files that make a model be asked as it was trained, by name: a template chosen for it, what ends answers."""


def step_data(
    data: DataConfig,
    train: TrainConfig,
    *,
    model: Path,
    cache: Path,
    partition: PartitionedModel,
    own: OwnSequence | None,
) -> StepData:
    """Make the data of a run ready.

    Args:
        data: section ``data`` of the configuration; with data of the caller's own, ``data.train`` is not looked at.
        train: section ``train``: rows of a micro-batch, number of epochs, seed.
        model: folder of the model, for its tokenizer.
        cache: folder for the tokens.
        partition: the model without its parameters.
        own: data of the caller's own; None = the files of ``data.train``.

    Raises:
        DataError, ConfigError, StorageError: they cannot be used.
    """
    options, files = _options(data, train.seed), None
    if own is not None:
        _refuse_first(own)
        if isinstance(own[0], MicroBatch):
            if data.eval is not None:
                raise ConfigError(
                    "data.eval is set, and the data are micro-batches of your own, of which nothing is held out: "
                    "remove it, or hand over rows"
                )
            return OwnMicroBatches(cast("Sequence[MicroBatch]", own), train.num_train_epochs, partition)
        written = _written(cast("Sequence[Mapping[str, Any]]", own), cache)
        options, files = _options(data, train.seed, written), [str(written)]
    folder = model_folder(model)
    tokenizer = folder.tokenizer()
    prepared = prepare(options, tokenizer, cache, packs=partition.spec.packs, vocabulary=partition.vocab_size)
    _refuse_token(prepared.train.largest_token, partition)
    return FileData(
        prepared,
        tokenizer,
        train.per_device_train_batch_size,
        train.num_train_epochs,
        files=files,
        generation_config=_generation_config(folder, prepared.stop_tokens),
    )


class FileData:
    """Rows of tokens, shuffled anew in every epoch; see ``StepData``.

    Args:
        data: the rows, and their order.
        tokenizer: the model's.
        rows: rows of a micro-batch.
        epochs: how often all rows are trained.
        files: where rows of the caller's own were written.
        generation_config: content of generation_config.json that ends what is generated as the data end; None where it
            is right as it is.
    """

    def __init__(
        self,
        data: TrainingData,
        tokenizer: PreTrainedTokenizerBase,
        rows: int,
        epochs: float,
        *,
        files: list[str] | None = None,
        generation_config: str | None = None,
    ) -> None:
        self._generation_config = generation_config
        self._data = data
        self._tokenizer = tokenizer
        self._rows = rows
        self._epochs = epochs
        train = data.train
        self.largest = train.largest_micro_batch(rows)
        self.mean_share = train.tokens / (len(train) * max(1, train.longest_row))
        self.micro_batches: int | None = len(train) // rows
        self.sha256 = train.sha256
        self.summary = "data:\n" + indent(str(data.summary), "  ")
        self.not_read = data.summary.not_read
        self.stop_tokens: Sequence[int] = data.stop_tokens
        self.files = files

    def steps(self, accumulation: int) -> int | None:
        """Optimizer steps after which all rows were trained as often as asked for."""
        return self._data.order.steps(self._epochs, self._rows * accumulation)

    def step(self, number: int, accumulation: int) -> list[MicroBatch]:
        """The micro-batches of a step, by the order of its epoch."""
        rows, count = self._data.train, self._rows
        indices = self._data.order.indices_for_step(number, count * accumulation)
        return [rows.micro_batch(indices[start : start + count]) for start in range(0, len(indices), count)]

    def held_out(self) -> Iterator[MicroBatch]:
        """The held-out rows, in order."""
        rows = self._data.eval
        if rows is not None:
            for start in range(0, len(rows), self._rows):
                yield rows.micro_batch(range(start, min(start + self._rows, len(rows))))

    def model_files(self) -> dict[str, bytes]:
        """The tokenizer's files, if a chat template was chosen; generation_config.json, if answers end otherwise."""
        generation = self._generation_config
        own = {} if generation is None else {"generation_config.json": generation.encode()}
        return own | self._tokenizer_files()

    def _tokenizer_files(self) -> dict[str, bytes]:
        if self._data.chat_template is None:
            return {}
        self._tokenizer.chat_template = self._data.chat_template
        with TemporaryDirectory() as folder:
            self._tokenizer.save_pretrained(folder)
            files = sorted(file for file in Path(folder).iterdir() if file.is_file())
            return {file.name: read_file(file, _TOKENIZER_BYTES_MAX) for file in files}


class OwnMicroBatches:
    """Micro-batches of the caller's own, trained in the order in which they come; see ``StepData``.

    Args:
        batches: all of them; each is asked for when it is trained.
        epochs: how often all are trained.
        partition: the model without its parameters.

    Raises:
        DataError: there is none, one is no micro-batch, has a token that the model does not know, or no label.
    """

    def __init__(self, batches: Sequence[MicroBatch], epochs: float, partition: PartitionedModel) -> None:
        self._batches = batches
        self._epochs = epochs
        digest = hashlib.sha256()
        sizes: list[tuple[int, int]] = []
        packed = False
        for number, batch in enumerate(self._batches):
            _check(batch, number, partition.vocab_size)
            rows, length = batch.input_ids.shape
            sizes.append((rows, length))
            packed = packed or batch.position_ids is not None
            for name, tensor in vars(batch).items():
                if tensor is not None:
                    digest.update(f"{name} {tuple(tensor.shape)}".encode())
                    digest.update(tensor.cpu().contiguous().numpy().tobytes())
        if not sizes:
            raise DataError("the data have no micro-batch: there is nothing to train")
        rows, length = max(sizes, key=lambda size: size[0] * size[1])
        self.largest = blank_micro_batch(rows, length, packed=packed)
        self.mean_share = sum(r * t for r, t in sizes) / (len(sizes) * rows * length)
        self.micro_batches: int | None = len(sizes)
        # Nothing that the command line could go on with, and this name says so.
        self.files: list[str] | None = [_HANDED_OVER]
        self.sha256 = digest.hexdigest()
        self.not_read: tuple[str, ...] = ()
        self.stop_tokens: Sequence[int] = ()
        self.summary = (
            f"data: {len(sizes)} micro-batches of the caller's own, {rows} x {length} tokens at most"
        )

    def steps(self, accumulation: int) -> int | None:
        """Optimizer steps after which all micro-batches were trained as often as asked for."""
        return max(1, math.ceil(round(self._epochs * len(self._batches) / accumulation, 6)))

    def step(self, number: int, accumulation: int) -> list[MicroBatch]:
        """The next micro-batches; after the last one comes the first one again."""
        first = (number - 1) * accumulation
        return [self._batches[index % len(self._batches)] for index in range(first, first + accumulation)]

    def held_out(self) -> Iterator[MicroBatch]:
        """None: nothing is held out of these."""
        return iter(())

    def model_files(self) -> dict[str, bytes]:
        """None: micro-batches come without a tokenizer."""
        return {}


def _generation_config(folder: ModelFolder, stop_tokens: Iterable[int]) -> str | None:
    path = folder.path / "generation_config.json"
    before = read_file(path, _TOKENIZER_BYTES_MAX).decode(errors="replace") if path.is_file() else None
    return with_end_tokens(before, folder.raw_config, stop_tokens)


def _options(data: DataConfig, seed: int, rows: Path | None = None) -> DataOptions:
    return DataOptions(
        train=tuple(Path(path) for path in data.train) if rows is None else (rows,),
        eval=Path(data.eval) if isinstance(data.eval, str) else data.eval,
        format=None if data.format == "auto" else data.format,
        fields=data.fields or {},
        max_length=data.max_length,
        packing=data.packing,
        assistant_only_loss=data.assistant_only_loss,
        chat_template=data.chat_template,
        seed=seed,
    )


def _refuse_first(own: OwnSequence) -> None:
    """Refuse what holds nothing, and what is neither rows nor micro-batches."""
    if not len(own):
        raise DataError("data holds nothing: give rows ({'text': ...}) or micro-batches, one at least")
    if not isinstance(own[0], Mapping | MicroBatch):
        raise ConfigError(
            f"data holds a {type(own[0]).__name__}: give rows, each a mapping as in a line of a JSON lines file "
            "({'text': ...}, {'messages': [...]}), or MicroBatch objects"
        )


def _written(rows: Sequence[Mapping[str, Any]], cache: Path) -> Path:
    """The file with the rows, one a line, from which they are read like any other; it is named by its content."""
    with storage_errors(cache, "nothing of the run was touched"):
        make_folder(cache)
    digest = hashlib.sha256()
    partial = cache / f"rows.{os.getpid()}.tmp"
    safe = "nothing of the run was touched"
    with ExitStack() as undo:
        undo.callback(partial.unlink, missing_ok=True)
        with storage_errors(cache, safe):
            partial.unlink(missing_ok=True)
            file = undo.enter_context(new_file(partial))
        for number in range(len(rows)):
            line = _line(rows[number], number)
            digest.update(line)
            with storage_errors(cache, safe):
                file.write(line)
        with storage_errors(cache, safe):
            file.flush()
            os.fsync(file.fileno())
            path = cache / f"rows-{digest.hexdigest()[:16]}.jsonl"
            partial.replace(path)
            sync_folder(cache)
    return path


def _line(row: object, number: int) -> bytes:
    if not isinstance(row, Mapping):
        raise DataError(f"row {number} of data is a {type(row).__name__}, and the first is a mapping")
    try:
        return (json.dumps(dict(row), ensure_ascii=False) + "\n").encode()
    except (TypeError, ValueError) as error:
        raise DataError(f"row {number} of data cannot be written as JSON: {error}") from error


def _check(batch: object, number: int, vocabulary: int) -> None:
    """Refuse a micro-batch that the model could not be trained on."""
    if not isinstance(batch, MicroBatch):
        raise DataError(f"entry {number} of data is a {type(batch).__name__}, and the first is a MicroBatch")
    try:
        refuse_tokens(micro_batch_of(batch), vocabulary)
    except DataError as error:
        raise DataError(f"micro-batch {number} of data: {error}") from None
    if trained_tokens([batch]) == 0:
        raise DataError(
            f"micro-batch {number} of data has no label: there is nothing to train in it, leave it out"
        )


def _refuse_token(largest: int, partition: PartitionedModel) -> None:
    vocabulary = partition.vocab_size
    if largest >= vocabulary:
        raise ConfigError(
            f"the tokenizer makes token {largest}, and the model's vocabulary has {vocabulary}: tokenizer and "
            "model do not belong together"
        )
