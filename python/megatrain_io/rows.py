"""Rows of tokens: packed out of documents, kept on disk compressed, handed out as micro-batches.

A row is what one sequence of a micro-batch holds: one document, or several packed one behind the other. Rows
lie in a shard file as zstd frames of about a mebibyte of tokens; a row never crosses a frame::

    frame       = tokens of its rows (uint16 or uint32, little endian), then one byte of flags for each token
    shard file  = frame ... frame, then one zstd frame with the length of each row (uint32)

In memory are the lengths of the rows and the few frames used last.
"""

import hashlib
import math
from collections import OrderedDict, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
import zstandard
from numpy.typing import NDArray

from megatrain_io.errors import DataError
from megatrain_io.model import MicroBatch

__all__ = ["RowOrder", "RowWriter", "Rows", "Shard", "pack"]

IGNORED = -100

_TRAINED = 1  # to be predicted from the tokens before it
_STARTS = 2  # first of its document
_FRAME_BYTES = 1 << 20
# Documents are packed with those near them, so that rows are written as the data are read: at most this many
# tokens, or this many rows of them, wait. Little is lost to rows that are not full at the end of each turn.
_WINDOW_TOKENS = 1 << 21
_WINDOW_ROWS = 64
_FRAMES_KEPT = 8


def pack(lengths: Sequence[int], room: int) -> list[list[int]]:
    """Pack documents into rows: the longest first, each into the row that it fills best.

    Args:
        lengths: tokens of each document, none above `room`.
        room: tokens of a row.

    Returns:
        The documents of each row by number, in rising order, as are the rows by their first document.
    """
    rows: list[list[int]] = []
    with_space: defaultdict[int, list[list[int]]] = defaultdict(list)
    spaces = 0  # bit s is set while some row has s tokens of space left
    for document in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        length = lengths[document]
        large_enough = spaces >> length
        if large_enough:
            space = length + (large_enough & -large_enough).bit_length() - 1
            row = with_space[space].pop()
            if not with_space[space]:
                spaces ^= 1 << space
        else:
            space, row = room, []
            rows.append(row)
        row.append(document)
        if left := space - length:
            with_space[left].append(row)
            spaces |= 1 << left
    return sorted(sorted(row) for row in rows)


@dataclass
class Shard:
    """What is to be known of a shard file; plain values that JSON holds.

    Attributes:
        token_type: numpy's name of the tokens' type, "<u2" or "<u4".
        packed: whether rows hold several documents.
        rows: number of rows.
        tokens: number of tokens.
        trained_tokens: number of tokens that are to be predicted.
        documents: number of documents, long ones counted once for each piece.
        longest_row: tokens of the longest row.
        largest_token: the largest token; the model's vocabulary must be larger.
        frames: offset, bytes, rows and tokens of each frame.
        lengths: offset and bytes of the frame with the lengths of the rows.
        sha256: of the uncompressed frames, the rows' lengths last: the same rows have the same.
    """

    token_type: str
    packed: bool
    rows: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    documents: int = 0
    longest_row: int = 0
    largest_token: int = 0
    frames: list[list[int]] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    sha256: str = ""


class RowWriter:
    """Packs documents into rows and writes them, a frame at a time."""

    def __init__(self, file: BinaryIO, *, vocabulary: int, max_length: int, packed: bool) -> None:
        """Start a shard.

        Args:
            file: open for writing; it is not closed.
            vocabulary: number above all tokens.
            max_length: tokens of a row.
            packed: put several documents into a row.
        """
        self.shard = Shard("<u2" if vocabulary <= 1 << 16 else "<u4", packed)
        self._file = file
        self._max_length = max_length
        self._window_tokens = max(_WINDOW_TOKENS, _WINDOW_ROWS * max_length) if packed else 0
        self._window: list[tuple[NDArray[Any], NDArray[np.uint8]]] = []
        self._waiting = 0
        self._frame: list[tuple[NDArray[Any], NDArray[np.uint8]]] = []
        self._frame_rows = self._frame_tokens = 0
        self._row_lengths: list[NDArray[np.uint32]] = []
        self._lengths: list[int] = []
        self._sha256 = hashlib.sha256()
        self._compressor = zstandard.ZstdCompressor(level=3, write_checksum=True)

    def add(self, ids: NDArray[np.int64], trained: NDArray[np.bool_]) -> None:
        """Add a document of at most `max_length` tokens: ids [t], and which are trained [t]."""
        flags = np.where(trained, np.uint8(_TRAINED), np.uint8(0))
        flags[0] = _STARTS  # nothing before the first token predicts it
        self.shard.documents += 1
        self.shard.tokens += len(ids)
        self.shard.trained_tokens += int((flags == _TRAINED).sum())
        self.shard.largest_token = max(self.shard.largest_token, int(ids.max()))
        self._window.append((ids.astype(self.shard.token_type), flags))
        self._waiting += len(ids)
        if self._waiting >= self._window_tokens:
            self._write_window()

    def finish(self) -> Shard:
        """Write what waits; the shard is complete then."""
        self._write_window()
        self._write_frame()
        self._row_lengths.append(np.array(self._lengths, "<u4"))
        self.shard.lengths = self._write(np.concatenate(self._row_lengths).tobytes())
        self.shard.sha256 = self._sha256.hexdigest()
        return self.shard

    def _write_window(self) -> None:
        lengths = [len(ids) for ids, _ in self._window]
        packed = self.shard.packed
        for row in pack(lengths, self._max_length) if packed else [[i] for i in range(len(lengths))]:
            tokens = sum(lengths[document] for document in row)
            self._frame.extend(self._window[document] for document in row)
            self._frame_rows += 1
            self._frame_tokens += tokens
            self._lengths.append(tokens)
            self.shard.longest_row = max(self.shard.longest_row, tokens)
            if self._frame_tokens * np.dtype(self.shard.token_type).itemsize >= _FRAME_BYTES:
                self._write_frame()
        self._window.clear()
        self._waiting = 0

    def _write_frame(self) -> None:
        if not self._frame:
            return
        raw = b"".join(
            [*(ids.tobytes() for ids, _ in self._frame), *(flags.tobytes() for _, flags in self._frame)]
        )
        self.shard.frames.append([*self._write(raw), self._frame_rows, self._frame_tokens])
        self.shard.rows += self._frame_rows
        self._row_lengths.append(np.array(self._lengths, "<u4"))
        self._lengths.clear()
        self._frame.clear()
        self._frame_rows = self._frame_tokens = 0

    def _write(self, raw: bytes) -> list[int]:
        self._sha256.update(raw)
        offset = self._file.tell()
        return [offset, self._file.write(self._compressor.compress(raw))]


class Rows:
    """The rows of a shard file. Not to be shared between threads."""

    def __init__(self, path: Path, shard: Shard, pad_token: int) -> None:
        """Open a shard and verify all of it.

        Args:
            path: the shard file; it stays closed between reads.
            shard: what was said of it when it was written.
            pad_token: what fills the rest of a row where the longest of a micro-batch is longer.

        Raises:
            DataError: it is not as it was written.
        """
        self._path = path
        self._shard = shard
        self._pad_token = pad_token
        self._frames: OrderedDict[int, tuple[NDArray[Any], NDArray[np.uint8]]] = OrderedDict()
        sha256 = hashlib.sha256()
        for offset, size, _, _ in shard.frames:
            sha256.update(self._read(offset, size))
        raw = self._read(*shard.lengths)
        sha256.update(raw)
        if sha256.hexdigest() != shard.sha256:
            raise self._damaged("its tokens are not those that were written")
        self._starts = np.concatenate([[0], np.cumsum(np.frombuffer(raw, "<u4"), dtype=np.int64)])
        self._first_rows = np.cumsum([0, *(rows for _, _, rows, _ in shard.frames)])

    def __len__(self) -> int:
        return self._shard.rows

    @property
    def tokens(self) -> int:
        """Tokens of all rows, without padding."""
        return self._shard.tokens

    @property
    def trained_tokens(self) -> int:
        """Tokens that are to be predicted."""
        return self._shard.trained_tokens

    @property
    def documents(self) -> int:
        """Documents, long ones counted once for each piece."""
        return self._shard.documents

    @property
    def longest_row(self) -> int:
        """Tokens of the longest row."""
        return self._shard.longest_row

    @property
    def largest_token(self) -> int:
        """The largest token; the model's vocabulary must be larger."""
        return self._shard.largest_token

    @property
    def packed(self) -> bool:
        """Whether rows hold several documents, told apart by their position ids."""
        return self._shard.packed

    @property
    def sha256(self) -> str:
        """Of all tokens, masks and rows: a run may be resumed with data of which this is the same."""
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
        shift_labels = np.full((batch, width), IGNORED, np.int64)
        positions = np.zeros((batch, width), np.int64)
        is_token = np.zeros((batch, width), np.int64)
        for b, (ids, flags) in enumerate(rows):
            n = len(ids)
            input_ids[b, :n] = ids
            is_token[b, :n] = 1
            # The first token of a document is never trained, so no label crosses into the next document.
            shift_labels[b, : n - 1] = np.where(flags[1:] & _TRAINED, input_ids[b, 1:n], IGNORED)
            here = np.arange(width)
            starts = np.zeros(width, np.bool_)
            starts[:n] = flags & _STARTS
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
        """One of the kind and size of the largest that ``rows`` rows can make; its content means nothing."""
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
        raw = self._read(offset, size)
        token_type = np.dtype(self._shard.token_type)
        if len(raw) != tokens * (token_type.itemsize + 1):
            raise self._damaged(f"frame {number} has {len(raw)} bytes")
        ids = np.frombuffer(raw, token_type, tokens)
        flags = np.frombuffer(raw, np.uint8, tokens, tokens * token_type.itemsize)
        self._frames[number] = ids, flags
        if len(self._frames) > _FRAMES_KEPT:
            self._frames.popitem(last=False)
        return ids, flags

    def _read(self, offset: int, size: int) -> bytes:
        try:
            with self._path.open("rb") as file:
                file.seek(offset)
                return zstandard.ZstdDecompressor().decompress(file.read(size))
        except (OSError, zstandard.ZstdError) as error:
            raise self._damaged(str(error)) from error

    def _damaged(self, how: str) -> DataError:
        return DataError(
            f"{self._path} is damaged: {how}. It only holds tokenised data: start again, and it is made anew; "
            f"if this comes back, check the drive."
        )


def blank_micro_batch(rows: int, length: int, *, packed: bool) -> MicroBatch:
    """One with ``rows`` rows of ``length`` tokens that mean nothing, of the kind that takes most memory."""
    shape = (rows, max(2, length))
    ids = torch.zeros(shape, dtype=torch.int64)
    position_ids = attention_mask = None
    if packed:
        # Two documents in each row: one alone needs no mask.
        half = shape[1] // 2
        position_ids = torch.cat([torch.arange(half), torch.arange(shape[1] - half)]).repeat(rows, 1)
    elif rows > 1:
        attention_mask = torch.ones_like(ids)
        attention_mask[0, -1] = 0
    return MicroBatch(ids, ids.clone(), position_ids, attention_mask)


class RowOrder:
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
        """Rows of a step, counted from 1; epochs follow each other without a gap, even within a step."""
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
    """SplitMix64 of each number."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
