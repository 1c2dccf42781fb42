"""What a run trains on, step by step: rows of files, rows that the caller hands over, or micro-batches of its own."""

import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Protocol, cast

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from megatrain_io.config.schema import DataConfig, TrainConfig
from megatrain_io.data.batch import MicroBatch, blank_micro_batch
from megatrain_io.data.prepare import DataOptions, TrainingData, prepare
from megatrain_io.errors import ConfigError, DataError
from megatrain_io.files import replace_file
from megatrain_io.models.partition import PartitionedModel

__all__ = ["FileData", "OwnData", "OwnMicroBatches", "StepData", "rows_file", "step_data"]

OwnData = Iterable[Mapping[str, Any]] | Iterable[MicroBatch]
"""Rows as in the lines of a JSON lines file, or micro-batches."""


def rows_file(cache: Path) -> Path:
    """Where rows of the caller's own are written: in the folder for the tokens."""
    return cache / "rows.jsonl"


class StepData(Protocol):
    """What a run trains on; ``planning.resolve.DataShape`` is a part of it.

    Attributes:
        largest: a micro-batch of the kind and size of the largest.
        mean_share: length of the mean row, as a share of the longest one's.
        micro_batches: number of micro-batches in the data.
        sha256: over all that is trained: a run goes on only with the same.
        summary: what the data are, in sentences for a person.
    """

    largest: MicroBatch
    mean_share: float
    micro_batches: int | None
    sha256: str
    summary: str

    def steps(self, accumulation: int) -> int | None:
        """Optimizer steps of ``train.num_train_epochs``, with so many micro-batches each."""

    def step(self, number: int, accumulation: int) -> list[MicroBatch]:
        """The micro-batches of a step, counted from 1; they follow from its number alone."""

    def held_out(self) -> Iterator[MicroBatch]:
        """Micro-batches of what is held out; none where nothing is."""

    def keep_chat_template(self, model: Path) -> None:
        """Write the tokenizer to ``model``, with the chat template of the data, if one was chosen."""


def step_data(
    data: DataConfig,
    train: TrainConfig,
    *,
    model: Path,
    cache: Path,
    partition: PartitionedModel,
    own: OwnData | None,
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
    options = _options(data, train.seed)
    if own is not None:
        first, rows = _first_of(own)
        if isinstance(first, MicroBatch):
            if data.eval is not None:
                raise ConfigError(
                    "data.eval is set, and the data are micro-batches of your own, of which nothing is held out: "
                    "remove it, or hand over rows"
                )
            return OwnMicroBatches(cast("Iterable[MicroBatch]", rows), train.num_train_epochs, partition)
        options = _options(data, train.seed, _written(cast("Iterable[Mapping[str, Any]]", rows), cache))
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(model, local_files_only=True)
    prepared = prepare(options, tokenizer, cache, packs=partition.spec.packs)
    _refuse_token(prepared.train.largest_token, partition)
    return FileData(prepared, tokenizer, train.per_device_train_batch_size, train.num_train_epochs)


class FileData:
    """Rows of tokens, shuffled anew in every epoch; see ``StepData``.

    Args:
        data: the rows, and their order.
        tokenizer: the model's.
        rows: rows of a micro-batch.
        epochs: how often all rows are trained.
    """

    def __init__(
        self, data: TrainingData, tokenizer: PreTrainedTokenizerBase, rows: int, epochs: float
    ) -> None:
        self._data = data
        self._tokenizer = tokenizer
        self._rows = rows
        self._epochs = epochs
        train = data.train
        self.largest = train.largest_micro_batch(rows)
        self.mean_share = train.tokens / (len(train) * max(1, train.longest_row))
        self.micro_batches: int | None = len(train) // rows
        self.sha256 = train.sha256
        self.summary = str(data.summary)

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

    def keep_chat_template(self, model: Path) -> None:
        """Write the tokenizer to ``model``, with the chat template of the data, if one was chosen."""
        if self._data.chat_template is None:
            return
        self._tokenizer.chat_template = self._data.chat_template
        with TemporaryDirectory() as folder:
            self._tokenizer.save_pretrained(folder)
            for file in sorted(Path(folder).iterdir()):
                replace_file(model / file.name, file.read_bytes())


class OwnMicroBatches:
    """Micro-batches of the caller's own, trained in the order in which they come; see ``StepData``.

    Args:
        batches: all of them. A sequence is asked for each when it is trained; else they are read into memory.
        epochs: how often all are trained.
        partition: the model without its parameters.

    Raises:
        DataError: there is none, one is no micro-batch, or one has a token that the model does not know.
    """

    def __init__(self, batches: Iterable[MicroBatch], epochs: float, partition: PartitionedModel) -> None:
        self._batches = batches if isinstance(batches, Sequence) else list(batches)
        self._epochs = epochs
        digest = hashlib.sha256()
        sizes: list[tuple[int, int]] = []
        packed = False
        for number, batch in enumerate(self._batches):
            _refuse_shape(batch, number)
            _refuse_token(int(batch.input_ids.max()), partition)
            rows, length = batch.input_ids.shape
            sizes.append((rows, length))
            packed = packed or batch.position_ids is not None
            for name, tensor in vars(batch).items():
                if tensor is not None:
                    digest.update(f"{name} {tuple(tensor.shape)}".encode())
                    digest.update(tensor.contiguous().numpy().tobytes())
        if not sizes:
            raise DataError("the data have no micro-batch: there is nothing to train")
        rows, length = max(sizes, key=lambda size: size[0] * size[1])
        self.largest = blank_micro_batch(rows, length, packed=packed)
        self.mean_share = sum(r * t for r, t in sizes) / (len(sizes) * rows * length)
        self.micro_batches: int | None = len(sizes)
        self.sha256 = digest.hexdigest()
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

    def keep_chat_template(self, model: Path) -> None:
        """Write nothing: micro-batches come without a tokenizer."""


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


def _first_of(own: OwnData) -> tuple[object, Iterable[object]]:
    """The first row or micro-batch, and all of them."""
    rows = own if isinstance(own, Sequence) else list(own)
    if not rows:
        raise DataError("data holds nothing: give rows ({'text': ...}) or micro-batches, one at least")
    if not isinstance(rows[0], Mapping | MicroBatch):
        raise ConfigError(
            f"data holds a {type(rows[0]).__name__}: give rows, each a mapping as in a line of a JSON lines file "
            "({'text': ...}, {'messages': [...]}), or MicroBatch objects"
        )
    return rows[0], rows


def _written(rows: Iterable[Mapping[str, Any]], cache: Path) -> Path:
    """The file with the rows, one a line, from which they are read like any other."""
    cache.mkdir(mode=0o700, parents=True, exist_ok=True)
    path = rows_file(cache)
    partial = path.with_name(f"{path.name}.tmp")
    with partial.open("w", encoding="utf-8") as file:
        for number, row in enumerate(rows, start=1):
            try:
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
            except (TypeError, ValueError) as error:
                raise DataError(f"row {number} of data cannot be written as JSON: {error}") from error
    partial.replace(path)
    return path


def _refuse_shape(batch: object, number: int) -> None:
    if not isinstance(batch, MicroBatch):
        raise DataError(f"entry {number} of data is a {type(batch).__name__}, and the first is a MicroBatch")
    ids, labels = batch.input_ids, batch.shift_labels
    if ids.dim() != 2 or labels.shape != ids.shape or ids.numel() == 0:  # noqa: PLR2004 - [B, T]
        raise DataError(
            f"micro-batch {number} has input_ids {list(ids.shape)} and shift_labels {list(labels.shape)}: both must "
            "be [B, T], with one token at least"
        )


def _refuse_token(largest: int, partition: PartitionedModel) -> None:
    vocabulary = partition.config.get_text_config().vocab_size
    if largest >= vocabulary:
        raise ConfigError(
            f"the tokenizer makes token {largest}, and the model's vocabulary has {vocabulary}: tokenizer and "
            "model do not belong together"
        )
