"""Rows of tokens: packed out of documents, kept on disk compressed, handed out as micro-batches.

A row is what one sequence of a micro-batch holds: one document, or several packed one behind the other. Rows
lie in a shard file as zstd frames of about a mebibyte of tokens; a row never crosses a frame::

    frame       = tokens of its rows (uint16 or uint32, little endian), then one byte of flags for each token
    shard file  = frame ... frame, then one zstd frame with the length of each row (uint32)

In memory are the lengths of the rows and the few frames used last.
"""

import hashlib
import math
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import zstandard
from numpy.typing import NDArray

from megatrain_io.data.batch import IGNORE_INDEX, MicroBatch, blank_micro_batch
from megatrain_io.data.packing import STARTS, TRAINED, Shard
from megatrain_io.errors import DataError
from megatrain_io.files import open_file

__all__ = ["EpochOrder", "PackedDataset"]

_FRAMES_KEPT = 8


class PackedDataset:
    """The rows of a shard file, handed out as micro-batches. Not to be shared between threads."""

    def __init__(self, path: Path, shard: Shard, pad_token: int) -> None:
        """Open a shard and verify all of it.

        Args:
            path: the shard file; it stays closed between reads.
            shard: what ``RowWriter`` returned when it was written.
            pad_token: what fills the rest of a row where the longest of a micro-batch is longer.

        Raises:
            DataError: it is not as it was written.
        """
        self._path = path
        self._shard = shard
        self._pad_token = pad_token
        self._frames: OrderedDict[int, tuple[NDArray[Any], NDArray[np.uint8]]] = OrderedDict()
        sha256 = hashlib.sha256()
        self._token_nbytes = np.dtype(shard.token_type).itemsize + 1
        for offset, size, _, tokens in shard.frames:
            sha256.update(self._read(offset, size, tokens * self._token_nbytes))
        raw = self._read(shard.lengths[0], shard.lengths[1], shard.rows * 4)
        sha256.update(raw)
        if sha256.hexdigest() != shard.sha256:
            raise self._damaged("its tokens are not those that were written")
        self._starts = np.concatenate([[0], np.cumsum(np.frombuffer(raw, "<u4"), dtype=np.int64)])
        self._first_rows = np.cumsum([0, *(rows for _, _, rows, _ in shard.frames)])

    def __len__(self) -> int:
        return self._shard.rows

    @property
    def tokens(self) -> int:
        """Number of tokens of all rows, without padding."""
        return self._shard.tokens

    @property
    def trained_tokens(self) -> int:
        """Number of tokens of all rows that are to be predicted."""
        return self._shard.trained_tokens

    @property
    def documents(self) -> int:
        """Number of documents, long ones counted once for each piece."""
        return self._shard.documents

    @property
    def longest_row(self) -> int:
        """Number of tokens of the longest row."""
        return self._shard.longest_row

    @property
    def largest_token(self) -> int:
        """Id of the largest token; the model's vocabulary must be larger."""
        return self._shard.largest_token

    @property
    def packed(self) -> bool:
        """Whether rows hold several documents, told apart by their position ids."""
        return self._shard.packed

    @property
    def sha256(self) -> str:
        """SHA-256 over all tokens, masks and rows: a run may be resumed only with data that have the same."""
        return self._shard.sha256

    def micro_batch(self, indices: Sequence[int]) -> MicroBatch:
        """Make a micro-batch [B, T] of some rows: T is the length of the longest.

        Packed rows have position ids that restart at each document, and so at the padding, which is thereby
        one more document that nobody attends to; there is no attention mask. Rows of one document have no
        position ids, and an attention mask where one is shorter than the others.
        """
        rows = [self._row(index) for index in indices]
        batch, width = len(rows), max(len(ids) for ids, _ in rows)
        input_ids = np.full((batch, width), self._pad_token, np.int64)
        shift_labels = np.full((batch, width), IGNORE_INDEX, np.int64)
        positions = np.zeros((batch, width), np.int64)
        is_token = np.zeros((batch, width), np.int64)
        for b, (ids, flags) in enumerate(rows):
            n = len(ids)
            input_ids[b, :n] = ids
            is_token[b, :n] = 1
            # The first token of a document is never trained, so no label crosses into the next document.
            shift_labels[b, : n - 1] = np.where(flags[1:] & TRAINED, input_ids[b, 1:n], IGNORE_INDEX)
            here = np.arange(width)
            starts = np.zeros(width, np.bool_)
            starts[:n] = flags & STARTS
            starts[n : n + 1] = True
            positions[b] = here - np.maximum.accumulate(np.where(starts, here, 0))
        padded = not is_token.all()
        return MicroBatch(
            input_ids=torch.from_numpy(input_ids),
            shift_labels=torch.from_numpy(shift_labels),
            position_ids=torch.from_numpy(positions) if self.packed else None,
            attention_mask=torch.from_numpy(is_token) if padded and not self.packed else None,
        )

    def largest_micro_batch(self, rows: int) -> MicroBatch:
        """A micro-batch of the kind and size of the largest that ``rows`` rows can make; its content means nothing."""
        return blank_micro_batch(rows, self.longest_row, packed=self.packed)

    def _row(self, index: int) -> tuple[NDArray[Any], NDArray[np.uint8]]:
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        frame = int(np.searchsorted(self._first_rows, index, side="right")) - 1
        ids, flags = self._cached_frame(frame)
        start, end = self._starts[index : index + 2] - self._starts[self._first_rows[frame]]
        return ids[start:end], flags[start:end]

    def _cached_frame(self, number: int) -> tuple[NDArray[Any], NDArray[np.uint8]]:
        if number in self._frames:
            self._frames.move_to_end(number)
            return self._frames[number]
        offset, size, _, tokens = self._shard.frames[number]
        raw = self._read(offset, size, tokens * self._token_nbytes)
        token_type = np.dtype(self._shard.token_type)
        if len(raw) != tokens * (token_type.itemsize + 1):
            raise self._damaged(f"frame {number} has {len(raw)} bytes")
        ids = np.frombuffer(raw, token_type, tokens)
        flags = np.frombuffer(raw, np.uint8, tokens, tokens * token_type.itemsize)
        self._frames[number] = ids, flags
        if len(self._frames) > _FRAMES_KEPT:
            self._frames.popitem(last=False)
        return ids, flags

    def _read(self, offset: int, size: int, most: int) -> bytes:
        """Decompress a frame of at most so many bytes."""
        try:
            with open_file(self._path) as file:
                file.seek(offset)
                frame = file.read(size)
            # What a damaged frame says of its own size is not believed: it would be asked of memory first.
            if zstandard.frame_content_size(frame) > most:
                raise self._damaged("a frame of it would grow beyond what was written")
            return zstandard.ZstdDecompressor().decompress(frame)
        except (OSError, zstandard.ZstdError) as error:
            raise self._damaged(str(error)) from error

    def _damaged(self, how: str) -> DataError:
        return DataError(
            f"{self._path} is damaged: {how}. It only holds tokenised data: start again, and it is made anew; "
            f"if this comes back, check the drive."
        )


class EpochOrder:
    """The order in which rows are trained: every epoch all of them, shuffled anew.

    Which rows a step takes follows from its number alone, so that resuming needs nothing else.
    """

    def __init__(self, rows: int, seed: int) -> None:
        self.rows = rows
        self.seed = seed
        self._epochs: OrderedDict[int, NDArray[np.int64]] = OrderedDict()

    def epoch(self, epoch: int) -> NDArray[np.int64]:
        """The rows [rows] in the order of an epoch, counted from 0.

        Made from hashes of (seed, epoch, row) and not by a library's shuffle, which may change.
        """
        if epoch not in self._epochs:
            stream = _mixed(_mixed(np.array([self.seed % 2**64], np.uint64)) ^ np.uint64(epoch))
            keys = _mixed(stream ^ _mixed(np.arange(self.rows, dtype=np.uint64)))
            self._epochs[epoch] = np.argsort(keys, kind="stable").astype(np.int64)
            if len(self._epochs) > 2:  # noqa: PLR2004 - a step may end one epoch and begin the next
                self._epochs.popitem(last=False)
        return self._epochs[epoch]

    def indices_for_step(self, step: int, rows_per_step: int) -> tuple[int, ...]:
        """Indices of the rows of a step, counted from 1; epochs follow each other without a gap, even within a step."""
        if step < 1 or rows_per_step < 1:
            raise ValueError(f"step {step} with {rows_per_step} rows")
        first = (step - 1) * rows_per_step
        places = (divmod(place, self.rows) for place in range(first, first + rows_per_step))
        return tuple(int(self.epoch(epoch)[place]) for epoch, place in places)

    def steps(self, epochs: float, rows_per_step: int) -> int:
        """Steps after which every row was trained `epochs` times; the last step may go beyond."""
        # Rounded first: 0.7 * 10 is 7.000000000000001.
        return max(1, math.ceil(round(epochs * self.rows / rows_per_step, 6)))


def _mixed(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The output of SplitMix64 for each state of ``x``, uint64 of any shape.

    Steele, Lea and Flood, "Fast Splittable Pseudorandom Number Generators", OOPSLA 2014.
    """
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
