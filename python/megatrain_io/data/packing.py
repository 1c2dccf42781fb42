"""Packing documents into rows of tokens, and writing them to a shard file."""

import hashlib
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, BinaryIO

import numpy as np
import zstandard
from numpy.typing import NDArray

__all__ = ["STARTS", "TRAINED", "RowWriter", "Shard", "pack"]

TRAINED = 1  # to be predicted from the tokens before it

STARTS = 2  # first of its document

_FRAME_BYTES = 1 << 20

# Documents are packed with those near them, so that rows are written as the data are read: at most this many
# tokens, or this many rows of them, wait. Little is lost to rows that are not full at the end of each turn.
_WINDOW_TOKENS = 1 << 21

_WINDOW_ROWS = 64


def pack(lengths: Sequence[int], room: int) -> list[list[int]]:
    """Pack documents into rows: the longest first, each into the row that it fills best (best fit decreasing).

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
    """What must be known of a shard file to read it; plain values that JSON holds.

    Attributes:
        token_type: numpy's name of the tokens' type, "<u2" or "<u4".
        packed: whether rows hold several documents.
        rows: number of rows.
        tokens: number of tokens.
        trained_tokens: number of tokens that are to be predicted.
        documents: number of documents, long ones counted once for each piece.
        longest_row: number of tokens of the longest row.
        largest_token: id of the largest token; the model's vocabulary must be larger.
        frames: offset, bytes, rows and tokens of each frame.
        lengths: offset and bytes of the frame with the lengths of the rows.
        sha256: over the uncompressed frames, the rows' lengths last: the same rows have the same.
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
        flags = np.where(trained, np.uint8(TRAINED), np.uint8(0))
        flags[0] = STARTS  # nothing before the first token predicts it
        self.shard.documents += 1
        self.shard.tokens += len(ids)
        self.shard.trained_tokens += int((flags == TRAINED).sum())
        self.shard.largest_token = max(self.shard.largest_token, int(ids.max()))
        self._window.append((ids.astype(self.shard.token_type), flags))
        self._waiting += len(ids)
        if self._waiting >= self._window_tokens:
            self._write_window()

    def finish(self) -> Shard:
        """Write the documents that wait, and return the shard, which is complete then."""
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
