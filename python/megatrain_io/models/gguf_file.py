"""GGUF files, read and written in pieces: positioned reads, headers that are checked, no mapping.

A file is ``GGUF``, a version, the numbers of tensors and of keys, the keys with typed values, the tensors' names,
dimensions (the fastest first), types and offsets, and their bytes, each tensor at a multiple of the alignment. A header
comes from strangers: every number in it is checked against the length of the file before anything is read or allocated
for it, and no library sees the file.
"""

import os
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from io import BufferedReader
from math import prod
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any, NoReturn, Self

import numpy as np

from megatrain_io.errors import ConfigError, ModelFilesError
from megatrain_io.files import new_file, open_file
from megatrain_io.models.weight_file import GIT_LFS, read_at, refuse_git_lfs

__all__ = ["GgufFile", "GgufPlan", "GgufTensor", "GgufWriter", "Value", "gguf_library", "plan_gguf"]

Value = bool | int | float | str | Sequence[str] | Sequence[int] | Sequence[float] | Sequence[bool]
"""Of a key in a header."""

HEADER_BYTES_MAX = 512 << 20
"""Most bytes of a header: the largest vocabularies take a twentieth of it."""

KEYS_MAX = 1 << 14
TENSORS_MAX = 1 << 16
ENTRIES_MAX = 1 << 22
_NAME_BYTES_MAX = 1 << 12
_STRING_BYTES_MAX = 16 << 20
_DIMENSIONS_MAX = 4
_ALIGNMENT = 32
_ALIGNMENT_MAX = 1 << 16
_ELEMENTS_MAX = 1 << 43

_MAGIC = b"GGUF"
_VERSION = 3
_VERSIONS = (2, 3)
_STRING, _ARRAY = 8, 9
_SCALARS = dict(enumerate(["<B", "<b", "<H", "<h", "<I", "<i", "<f", "<B"])) | {10: "<Q", 11: "<q", 12: "<d"}
_UINT32, _INT32, _FLOAT32, _BOOL = range(4, 8)
_LENGTH = struct.Struct("<Q")


def gguf_library() -> ModuleType:
    """The library ``gguf``: types of tensors and what they stand for.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        import gguf  # noqa: PLC0415 - an extra
    except ImportError as error:
        raise ConfigError(
            f"GGUF files need the library gguf: pip install 'megatrain-io[gguf]' ({error})"
        ) from error
    return gguf


@dataclass(frozen=True)
class GgufTensor:
    """A tensor in a GGUF file.

    Attributes:
        name: of the tensor.
        type: its name in the format, such as ``Q4_K``.
        shape: of the tensor, as torch has it: the fastest dimension last.
        block: elements and bytes of a block of this type; 1 element where it is not quantised.
        offset: bytes from the start of the file to its first block.
    """

    name: str
    type: str
    shape: tuple[int, ...]
    block: tuple[int, int]
    offset: int = 0

    @property
    def elements(self) -> int:
        """Number of elements of the tensor."""
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes that the tensor takes in the file."""
        return self.elements // self.block[0] * self.block[1]


class GgufFile:
    """An open file whose header was found sound. Reads are positioned and leave no pages cached behind.

    Attributes:
        path: of the file.
        metadata: value of each key of the header.
        tensors: by name, in the order of the file.
    """

    def __init__(self, path: Path) -> None:
        """Open ``path`` and check its header against its length.

        Raises:
            ModelFilesError: it cannot be read, is a Git-LFS pointer, truncated, or not a sound GGUF file.
            ConfigError: the library gguf is not installed.
        """
        self.path = path
        self._library = gguf_library()
        try:
            self._file = open_file(path)
        except OSError as error:
            self._refuse(f"cannot be opened: {error.strerror}", error)
        try:
            self.metadata, self.tensors = self._read_header()
        except _UnsoundError as error:
            self.close()
            self._refuse(f"has a header that is not valid GGUF: {error}", error)
        except OSError as error:
            self.close()
            self._refuse(f"cannot be read: {error.strerror}", error)
        except BaseException:
            self.close()
            raise

    def read(self, tensor: GgufTensor, start: int, stop: int) -> bytearray:
        """Blocks ``start``..``stop`` of a tensor, as they lie in the file.

        Raises:
            ModelFilesError: the file became shorter, or the drive failed to read it.
        """
        _, width = tensor.block
        return read_at(self.path, self._file.fileno(), tensor.offset + start * width, (stop - start) * width)

    def close(self) -> None:
        """Close the file; it must not be read again."""
        self._file.close()

    def _read_header(self) -> tuple[dict[str, Any], dict[str, GgufTensor]]:
        cursor = _Cursor(self._file, os.fstat(self._file.fileno()).st_size)
        self._refuse_other_files(cursor)
        version, tensor_count, key_count = cursor.numbers("<IQQ")
        if version not in _VERSIONS:
            big = int.from_bytes(int(version).to_bytes(4, "little"), "big") in _VERSIONS
            self._refuse(
                "is GGUF in big-endian byte order: take the file for x86"
                if big
                else f"is GGUF of version {version}, and 2 and 3 are read: convert the model again"
            )
        if key_count > KEYS_MAX or tensor_count > TENSORS_MAX:
            raise _UnsoundError(
                f"it claims {tensor_count:,} tensors and {key_count:,} keys; at most {TENSORS_MAX:,} and "
                f"{KEYS_MAX:,} are read"
            )
        metadata: dict[str, Any] = {}
        for _ in range(key_count):
            key = cursor.text(_NAME_BYTES_MAX)
            if key in metadata:
                raise _UnsoundError(f"key {key!r} occurs twice")
            metadata[key] = cursor.value(key)
        infos = [self._tensor_info(cursor) for _ in range(tensor_count)]
        alignment = metadata.get("general.alignment", _ALIGNMENT)
        is_sound = type(alignment) is int and 0 < alignment <= _ALIGNMENT_MAX
        if not is_sound or alignment & (alignment - 1):
            raise _UnsoundError(f"its alignment is {_short(alignment)}: a power of two is needed")
        return metadata, self._placed(infos, alignment, cursor)

    def _refuse_other_files(self, cursor: "_Cursor") -> None:
        start = self._file.peek(len(GIT_LFS))[: len(GIT_LFS)]
        refuse_git_lfs(self.path, start, cursor.file_bytes)
        if start[:4] != _MAGIC:
            self._refuse("is not a GGUF file: it does not begin with GGUF. Fetch it again")
        cursor.take(4)

    def _tensor_info(self, cursor: "_Cursor") -> tuple[GgufTensor, int]:
        """A tensor, and where it begins among the tensors' bytes."""
        name = cursor.text(_NAME_BYTES_MAX)
        (dimensions,) = cursor.numbers("<I")
        if not 1 <= dimensions <= _DIMENSIONS_MAX:
            raise _UnsoundError(f"{name!r} has {dimensions:,} dimensions: 1 to {_DIMENSIONS_MAX} are read")
        shape = tuple(reversed(cursor.numbers(f"<{dimensions}Q")))
        number, offset = cursor.numbers("<IQ")
        kinds, sizes = self._library.GGMLQuantizationType, self._library.GGML_QUANT_SIZES
        if number not in kinds._value2member_map_ or kinds(number) not in sizes:
            raise _UnsoundError(f"{name!r} has the unknown type {number}")
        kind = kinds(number)
        elements, width = sizes[kind]
        if min(shape) < 1 or prod(shape) > _ELEMENTS_MAX:
            raise _UnsoundError(f"{name!r} has the shape {list(shape)}")
        if shape[-1] % elements:
            raise _UnsoundError(
                f"{name!r} has rows of {shape[-1]:,}, which are no whole blocks of {kind.name}"
            )
        return GgufTensor(name, kind.name, shape, (elements, width)), offset

    def _placed(
        self, infos: Sequence[tuple[GgufTensor, int]], alignment: int, cursor: "_Cursor"
    ) -> dict[str, GgufTensor]:
        """The tensors by name, if each begins where the one before it ends, and the last one with the file."""
        begin = position = _padded(cursor.position, alignment)
        placed: dict[str, GgufTensor] = {}
        for tensor, offset in infos:
            if tensor.name in placed:
                raise _UnsoundError(f"tensor {tensor.name!r} occurs twice")
            if begin + offset != position:
                what = "overlaps the tensor before it" if begin + offset < position else "leaves a gap"
                raise _UnsoundError(f"tensor {tensor.name!r} {what}: it is at {offset:,}")
            placed[tensor.name] = GgufTensor(tensor.name, tensor.type, tensor.shape, tensor.block, position)
            end = position + tensor.nbytes
            position = _padded(end, alignment)
            if end > cursor.file_bytes:
                needed = begin + sum(each.nbytes for each, _ in infos)
                self._refuse(
                    f"is truncated: its header says {needed:,} bytes or more, it has {cursor.file_bytes:,}. Fetch it "
                    "again"
                )
        if cursor.file_bytes > position:
            self._refuse(
                f"has {cursor.file_bytes:,} bytes, its header accounts for {position:,} only: fetch it again"
            )
        return placed

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _refuse(self, reason: str, cause: BaseException | None = None) -> NoReturn:
        raise ModelFilesError(f"{self.path} {reason}") from cause


class _UnsoundError(Exception):
    """What a header says cannot be."""


class _Cursor:
    """A place in a header: nothing is read beyond the end of the file, nor more than a header may have."""

    def __init__(self, file: BufferedReader, file_bytes: int) -> None:
        self.file_bytes, self.position = file_bytes, 0
        self._file = file

    def take(self, nbytes: int) -> bytes:
        """The next bytes."""
        end = self.position + nbytes
        if end > self.file_bytes:
            raise _UnsoundError(
                f"it goes on to byte {end:,} and the file ends at {self.file_bytes:,}. Fetch it again"
            )
        if end > HEADER_BYTES_MAX:
            raise _UnsoundError(f"it has more than {HEADER_BYTES_MAX:,} bytes")
        data = self._file.read(nbytes)
        if len(data) < nbytes:
            raise _UnsoundError(f"the file ends at {self.position + len(data):,}. Fetch it again")
        self.position = end
        return data

    def numbers(self, layout: str) -> tuple[int, ...]:
        """Numbers as ``struct`` describes them."""
        return struct.unpack(layout, self.take(struct.calcsize(layout)))

    def text(self, most: int) -> str:
        """A string, with its length before it."""
        (length,) = _LENGTH.unpack(self.take(8))
        if length > most:
            raise _UnsoundError(f"it has a string of {length:,} bytes, at most {most:,} are read there")
        try:
            return self.take(length).decode()
        except UnicodeDecodeError as error:
            raise _UnsoundError(f"it has a string that is not UTF-8 at byte {self.position:,}") from error

    def value(self, key: str) -> Any:
        """A value, with its type before it."""
        (kind,) = self.numbers("<I")
        if kind == _STRING:
            return self.text(_STRING_BYTES_MAX)
        if kind == _ARRAY:
            return self._array(key)
        if kind not in _SCALARS:
            raise _UnsoundError(f"{key!r} has the unknown type {kind}")
        (value,) = self.numbers(_SCALARS[kind])
        return self._boolean(key, value) if kind == _BOOL else value

    def _array(self, key: str) -> list[Any]:
        kind, count = self.numbers("<IQ")
        if count > ENTRIES_MAX:
            raise _UnsoundError(f"{key!r} has {count:,} entries, at most {ENTRIES_MAX:,} are read")
        if kind == _STRING:
            return [self.text(_STRING_BYTES_MAX) for _ in range(count)]
        if kind not in _SCALARS:
            raise _UnsoundError(f"{key!r} is a list of the type {kind}, which is not read")
        layout = np.dtype(_SCALARS[kind])
        values = np.frombuffer(self.take(count * layout.itemsize), dtype=layout).tolist()
        return [self._boolean(key, value) for value in values] if kind == _BOOL else values

    @staticmethod
    def _boolean(key: str, value: float) -> bool:
        if value not in {0, 1}:
            raise _UnsoundError(f"{key!r} is neither true nor false: {value}")
        return value == 1


# ------------------------------------------------------------------------------------------- writing


@dataclass(frozen=True)
class GgufPlan:
    """A GGUF file to be written.

    Attributes:
        header: its first bytes, up to the first tensor.
        tensors: by name, with their places.
        file_bytes: bytes of the whole file.
    """

    header: bytes
    tensors: Mapping[str, GgufTensor]
    file_bytes: int


def plan_gguf(metadata: Mapping[str, Value], tensors: Iterable[tuple[str, str, tuple[int, ...]]]) -> GgufPlan:
    """Lay (name, type, shape) out in one file with these keys.

    Integers are written with 32 bits, real numbers as float32, as llama.cpp reads them.

    Raises:
        ConfigError: the library gguf is not installed.
    """
    library = gguf_library()
    kinds, sizes = library.GGMLQuantizationType, library.GGML_QUANT_SIZES
    keys = b"".join(_text(key) + _typed(value) for key, value in metadata.items())
    infos, placed, position = bytearray(), [], 0
    for name, kind, shape in tensors:
        tensor = GgufTensor(name, kind, shape, sizes[kinds[kind]], position)
        infos += _text(name) + struct.pack("<I", len(shape))
        infos += struct.pack(f"<{len(shape)}Q", *reversed(shape))
        infos += struct.pack("<IQ", kinds[kind].value, position)
        placed.append(tensor)
        position = _padded(position + tensor.nbytes, _ALIGNMENT)
    header = _MAGIC + struct.pack("<IQQ", _VERSION, len(placed), len(metadata)) + keys + infos
    begin = _padded(len(header), _ALIGNMENT)
    at = {
        each.name: GgufTensor(each.name, each.type, each.shape, each.block, begin + each.offset)
        for each in placed
    }
    return GgufPlan(header.ljust(begin, b"\0"), at, begin + position)


class GgufWriter:
    """A file that is filled at any place and in any order; durable once the context ends without an error."""

    def __init__(self, path: Path, plan: GgufPlan) -> None:
        """Create the file, reserve its space and write its header.

        Raises:
            OSError: as the system says it; what was created is left to the caller.
        """
        self._tensors = plan.tensors
        self._file = new_file(path, buffering=0)
        try:
            os.posix_fallocate(self._file.fileno(), 0, plan.file_bytes)
            self._write_at(plan.header, 0)
        except BaseException:
            self._file.close()
            raise

    def write(self, name: str, block: int, data: bytes | memoryview) -> None:
        """Write blocks of a tensor, beginning with the one of this number."""
        tensor = self._tensors[name]
        self._write_at(data, tensor.offset + block * tensor.block[1])

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._file:
            if kind is None:
                os.fsync(self._file.fileno())

    def _write_at(self, data: bytes | memoryview, offset: int) -> None:
        view = memoryview(data)
        while view:
            count = os.pwrite(self._file.fileno(), view, offset)
            view, offset = view[count:], offset + count


def _padded(position: int, alignment: int) -> int:
    return -(-position // alignment) * alignment


def _text(value: str) -> bytes:
    data = value.encode()
    return _LENGTH.pack(len(data)) + data


def _typed(value: Value) -> bytes:
    if isinstance(value, Sequence) and not isinstance(value, str):
        kind = _kind_of(value[0]) if value else _INT32
        if kind == _UINT32:
            kind = _INT32
        head = struct.pack("<IIQ", _ARRAY, kind, len(value))
        if kind == _STRING:
            return head + b"".join(_text(str(each)) for each in value)
        return head + np.array(value, dtype=_SCALARS[kind]).tobytes()
    kind = _kind_of(value)
    if isinstance(value, str):
        return struct.pack("<I", kind) + _text(value)
    return struct.pack("<I", kind) + struct.pack(_SCALARS[kind], value)


def _kind_of(value: object) -> int:
    match value:
        case bool():
            return _BOOL
        case int():
            return _INT32 if value < 0 else _UINT32
        case float():
            return _FLOAT32
        case str():
            return _STRING
    raise TypeError(f"a {type(value).__name__} has no type in GGUF")


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."  # noqa: PLR2004 - of a line
