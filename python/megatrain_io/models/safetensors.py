"""Safetensors files, read and written in pieces: positioned reads, headers that are checked, no mapping.

A file is 8 bytes with the length of its header (little-endian), the header (JSON: dtype, shape and byte range
of each tensor), and the tensors' bytes, without gaps. A header comes from strangers: every number in it is
checked against the length of the file before anything is read or allocated for it.
"""

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn, Self

import torch

from megatrain_io.errors import (
    ModelFilesError,
)
from megatrain_io.files import new_file
from megatrain_io.models.weight_file import GIT_LFS, READ_BYTES_MAX, read_at, refuse_git_lfs

__all__ = [
    "FILE_DTYPES",
    "HEADER_BYTES_MAX",
    "TENSORS_MAX",
    "TORCH_DTYPES",
    "Checkpoint",
    "SafetensorsFile",
    "ShardPlan",
    "ShardWriter",
    "TensorEntry",
    "index_of",
    "plan_file",
    "plan_shards",
]

HEADER_BYTES_MAX = 100_000_000
"""Most bytes of a header, as in the safetensors package."""

TENSORS_MAX = 1 << 18
"""Most tensors in a file: the largest mixtures of experts have a third of that in all their files."""

_LENGTH_BYTES = 8
_DIMENSIONS_MAX = 8

_DTYPE_BITS = {
    **dict.fromkeys(["BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"], 8),
    **dict.fromkeys(["I16", "U16", "F16", "BF16"], 16),
    **dict.fromkeys(["I32", "U32", "F32"], 32),
    **dict.fromkeys(["I64", "U64", "F64", "C64"], 64),
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
}


@dataclass(frozen=True)
class TensorEntry:
    """A tensor in a safetensors file.

    Attributes:
        name: of the tensor.
        dtype: its name in the format, such as ``BF16``.
        shape: of the tensor.
        offset: bytes from the start of the file to its first element.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int

    @property
    def elements(self) -> int:
        """Number of elements of the tensor."""
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes that the tensor takes in the file."""
        return self.elements * _DTYPE_BITS[self.dtype] // 8


class SafetensorsFile:
    """An open file whose header was found sound. Reads are positioned and leave no pages cached behind."""

    def __init__(self, path: Path) -> None:
        """Open ``path`` and check its header against its length.

        Raises:
            ModelFilesError: it cannot be read, is a Git-LFS pointer, truncated, or not safetensors.
        """
        self.path = path
        try:
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        except OSError as error:
            self._refuse(f"cannot be opened: {error.strerror}", error)
        try:
            self.entries = self._read_header(os.fstat(self._fd).st_size)
        except BaseException:
            self.close()
            raise

    def read(self, entry: TensorEntry, start: int, stop: int) -> bytearray:
        """Little-endian bytes of elements ``start``..``stop`` of a tensor, read row by row.

        Raises:
            ModelFilesError: the file became shorter, or the drive failed to read it.
        """
        width = _DTYPE_BITS[entry.dtype] // 8
        return self._read_at(entry.offset + start * width, (stop - start) * width)

    def read_bytes(self, entry: TensorEntry, start: int, stop: int) -> bytearray:
        """Bytes ``start``..``stop`` of a tensor, whatever its dtype; as ``read``."""
        return self._read_at(entry.offset + start, stop - start)

    def close(self) -> None:
        """Close the file; it must not be read again."""
        os.close(self._fd)

    def _read_at(self, offset: int, nbytes: int) -> bytearray:
        return read_at(self.path, self._fd, offset, nbytes)

    def _read_header(self, file_bytes: int) -> dict[str, TensorEntry]:
        start = bytes(self._read_at(0, min(file_bytes, len(GIT_LFS))))
        refuse_git_lfs(self.path, start, file_bytes)
        header_bytes = int.from_bytes(start[:_LENGTH_BYTES], "little")
        if file_bytes < _LENGTH_BYTES:
            self._refuse(f"has {file_bytes} bytes, too few for a safetensors file: fetch it again")
        if header_bytes > HEADER_BYTES_MAX:
            self._refuse(
                f"is not a safetensors file: it claims a header of {header_bytes:,} bytes, at most "
                f"{HEADER_BYTES_MAX:,} are allowed"
            )
        data_offset = _LENGTH_BYTES + header_bytes
        if data_offset > file_bytes:
            self._refuse_truncated(data_offset, file_bytes)
        text = bytes(self._read_at(_LENGTH_BYTES, header_bytes))
        if (count := text.count(b'"data_offsets"')) > TENSORS_MAX:
            self._refuse(f"has a header of {count:,} tensors, at most {TENSORS_MAX:,} are read from a file")
        try:
            header = json.loads(text.decode("utf-8"), object_pairs_hook=_without_duplicates)
            if not isinstance(header, dict):
                raise TypeError("it is not an object")  # noqa: TRY301
            header.pop("__metadata__", None)
            entries = [_entry(name, fields, data_offset) for name, fields in header.items()]
        except (ValueError, TypeError, RecursionError) as error:
            self._refuse(f"has a header that is not valid safetensors: {error}", error)
        return self._without_gaps(sorted(entries, key=lambda entry: entry[1:]), data_offset, file_bytes)

    def _without_gaps(
        self, entries: Sequence[tuple[TensorEntry, int, int]], data_offset: int, file_bytes: int
    ) -> dict[str, TensorEntry]:
        """The tensors by name, if they lie end to end and fill the file exactly."""
        position = data_offset
        for entry, begin, end in entries:
            if begin != position:
                what = "overlaps the tensor before it" if begin < position else "leaves a gap before it"
                self._refuse(f"has a header that is not valid safetensors: {entry.name} {what}")
            position = end
        if position > file_bytes:
            self._refuse_truncated(position, file_bytes)
        if position < file_bytes:
            self._refuse(
                f"has {file_bytes:,} bytes, its header accounts for {position:,} only: fetch it again"
            )
        return {entry.name: entry for entry, _, _ in entries}

    def _refuse_truncated(self, expected: int, found: int) -> NoReturn:
        self._refuse(f"is truncated: its header says {expected:,} bytes, it has {found:,}. Fetch it again")

    def _refuse(self, reason: str, cause: BaseException | None = None) -> NoReturn:
        raise ModelFilesError(f"{self.path} {reason}") from cause


class Checkpoint:
    """The tensors of several safetensors files, by name."""

    def __init__(self, paths: Iterable[Path]) -> None:
        """Open all files.

        Raises:
            ModelFilesError: as for one file, or two files hold a tensor of the same name.
        """
        self._files: list[SafetensorsFile] = []
        self._places: dict[str, tuple[SafetensorsFile, TensorEntry]] = {}
        try:
            for path in paths:
                self._add(SafetensorsFile(path))
        except BaseException:
            self.close()
            raise

    def _add(self, file: SafetensorsFile) -> None:
        self._files.append(file)
        for name, entry in file.entries.items():
            other, _ = self._places.setdefault(name, (file, entry))
            if other is not file:
                raise ModelFilesError(
                    f"{name} is in both {other.path} and {file.path}: remove one of the files"
                )

    @property
    def entries(self) -> Mapping[str, TensorEntry]:
        """Place, dtype and shape of every tensor, by name."""
        return {name: entry for name, (_, entry) in self._places.items()}

    def file_of(self, name: str) -> Path:
        """Path of the file that holds a tensor."""
        return self._places[name][0].path

    def read(self, name: str, start: int, stop: int) -> bytearray:
        """Little-endian bytes of elements ``start``..``stop`` of a tensor; see ``SafetensorsFile.read``."""
        file, entry = self._places[name]
        return file.read(entry, start, stop)

    def pieces(self, name: str) -> Iterator[tuple[int, bytearray]]:
        """A tensor of any dtype as it lies in its file: offset and bytes of each piece, so many as are read at once."""
        file, entry = self._places[name]
        for start in range(0, entry.nbytes, READ_BYTES_MAX):
            yield start, file.read_bytes(entry, start, min(start + READ_BYTES_MAX, entry.nbytes))

    def close(self) -> None:
        """Close all files; no tensor can be read afterwards."""
        for file in self._files:
            file.close()
        self._files.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


@dataclass(frozen=True)
class ShardPlan:
    """A safetensors file to be written.

    Attributes:
        name: of the file.
        header: its first bytes, length included.
        entries: where in the file each tensor's bytes belong.
        file_bytes: bytes of the whole file.
    """

    name: str
    header: bytes
    entries: tuple[TensorEntry, ...]
    file_bytes: int


def plan_shards(tensors: Iterable[tuple[str, str, tuple[int, ...]]], shard_bytes: int) -> list[ShardPlan]:
    """Distribute (name, dtype, shape) over files as ``save_pretrained`` does, and lay each file out.

    Args:
        tensors: in the order of the model.
        shard_bytes: of tensors in one file; a larger tensor gets a file of its own.
    """
    shards = list(_distribute([TensorEntry(*tensor, offset=0) for tensor in tensors], shard_bytes))
    if len(shards) == 1:
        return [_lay_out("model.safetensors", shards[0])]
    names = (f"model-{index + 1:05d}-of-{len(shards):05d}.safetensors" for index in range(len(shards)))
    return [_lay_out(name, shard) for name, shard in zip(names, shards, strict=True)]


def plan_file(name: str, tensors: Iterable[tuple[str, str, tuple[int, ...]]]) -> ShardPlan:
    """Lay (name, dtype, shape) out in one file of that name."""
    return _lay_out(name, [TensorEntry(*tensor, offset=0) for tensor in tensors])


def index_of(shards: Sequence[ShardPlan], parameters: int) -> str:
    """Content of model.safetensors.index.json for several shards of a model with so many parameters."""
    metadata = {
        "total_parameters": parameters,
        "total_size": sum(entry.nbytes for shard in shards for entry in shard.entries),
    }
    weight_map = {entry.name: shard.name for shard in shards for entry in shard.entries}
    return json.dumps({"metadata": metadata, "weight_map": weight_map}, indent=2, sort_keys=True) + "\n"


class ShardWriter:
    """Files that are filled at any place and in any order; durable once the context ends without an error."""

    def __init__(self, folder: Path, shards: Iterable[ShardPlan]) -> None:
        """Create all files, reserve their space and write their headers.

        Raises:
            OSError: as the system says it; what was created is left to the caller.
        """
        self._descriptors: list[int] = []
        self._places: dict[str, tuple[int, TensorEntry]] = {}
        try:
            for shard in shards:
                self._create(folder / shard.name, shard)
        except BaseException:
            self._close()
            raise

    def dtype_of(self, name: str) -> str:
        """Name of the dtype of a tensor in the format."""
        return self._places[name][1].dtype

    def write(self, name: str, offset: int, data: bytes | memoryview) -> None:
        """Write bytes of a tensor, beginning ``offset`` bytes after its start."""
        descriptor, entry = self._places[name]
        _write_at(descriptor, data, entry.offset + offset)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                for descriptor in self._descriptors:
                    os.fsync(descriptor)
        finally:
            self._close()

    def _create(self, path: Path, shard: ShardPlan) -> None:
        with new_file(path) as file:
            descriptor = os.dup(file.fileno())
        self._descriptors.append(descriptor)
        os.posix_fallocate(descriptor, 0, shard.file_bytes)
        _write_at(descriptor, shard.header, 0)
        self._places.update((entry.name, (descriptor, entry)) for entry in shard.entries)

    def _close(self) -> None:
        while self._descriptors:
            os.close(self._descriptors.pop())


def _write_at(descriptor: int, data: bytes | memoryview, offset: int) -> None:
    view = memoryview(data).cast("B")
    while view:
        done = os.pwrite(descriptor, view, offset)
        view, offset = view[done:], offset + done


def _distribute(entries: Sequence[TensorEntry], shard_bytes: int) -> Iterator[list[TensorEntry]]:
    current: list[TensorEntry] = []
    held = 0
    for entry in entries:
        if entry.nbytes > shard_bytes:
            yield [entry]
            continue
        if held + entry.nbytes > shard_bytes:
            yield current
            current, held = [], 0
        current.append(entry)
        held += entry.nbytes
    if current:
        yield current


def _lay_out(name: str, entries: Sequence[TensorEntry]) -> ShardPlan:
    # The order and the spelling of the safetensors package: the same tensors give the same bytes.
    ordered = sorted(entries, key=lambda entry: (-_DTYPE_BITS[entry.dtype], entry.name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for entry in ordered:
        offsets = [offset, offset + entry.nbytes]
        header[entry.name] = {"dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": offsets}
        offset += entry.nbytes
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    data_offset = _LENGTH_BYTES + len(text)
    placed = tuple(
        TensorEntry(entry.name, entry.dtype, entry.shape, data_offset + header[entry.name]["data_offsets"][0])
        for entry in ordered
    )
    return ShardPlan(name, len(text).to_bytes(_LENGTH_BYTES, "little") + text, placed, data_offset + offset)


def _entry(name: str, fields: Any, data_offset: int) -> tuple[TensorEntry, int, int]:
    """The tensor that an entry of a header describes, and its byte range in the file; ValueError if it cannot be."""
    if not isinstance(fields, dict) or fields.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{name} must have dtype, shape and data_offsets")
    dtype, shape, offsets = fields["dtype"], fields["shape"], fields["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _DTYPE_BITS:
        raise ValueError(f"{name} has the unknown dtype {dtype!r}")
    if not _is_sizes(shape) or len(shape) > _DIMENSIONS_MAX:
        raise ValueError(f"{name} has the shape {shape!r}")
    if not _is_sizes(offsets) or len(offsets) != 2:  # noqa: PLR2004
        raise ValueError(f"{name} has the offsets {offsets!r}")
    begin, end = offsets
    bits = prod(shape) * _DTYPE_BITS[dtype]
    if bits % 8 or end - begin != bits // 8:
        raise ValueError(f"{name} is {shape} of {dtype}, {bits // 8:,} bytes, but has {end - begin:,}")
    return TensorEntry(name, dtype, tuple(shape), data_offset + begin), data_offset + begin, data_offset + end


def _is_sizes(values: Any) -> bool:
    """Whether this is a list of integers that can be sizes in a file."""
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 1 << 63 for value in values)


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        raise ValueError("a name occurs twice")
    return values


TORCH_DTYPES = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F64": torch.float64,
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
}

FILE_DTYPES = {dtype: name for name, dtype in TORCH_DTYPES.items()}
