"""Tensors of a GGUF file under the names of a model folder, read and written in parts of any size.

Quantised blocks are read as the numbers that they stand for, in fp32; other tensors in their own dtype. What llama.cpp
changes in its files is undone and done again here: rows of queries and keys in another order, norms with 1 added.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megatrain_io.errors import ModelFilesError, UnsupportedModelError
from megatrain_io.models.gguf_families import GgufSource
from megatrain_io.models.gguf_file import GgufFile, GgufPlan, GgufTensor, GgufWriter, gguf_library

__all__ = ["GgufEntry", "GgufTensorWriter", "GgufWeights", "type_in_gguf"]

Shape = tuple[int, ...]
_PLAIN = {"F32": "<f4", "F16": "<u2", "BF16": "<u2"}
_QUANTISED = frozenset(
    {
        *(
            "Q4_0",
            "Q4_1",
            "Q5_0",
            "Q5_1",
            "Q8_0",
            "Q2_K",
            "Q3_K",
            "Q4_K",
            "Q5_K",
            "Q6_K",
            "TQ1_0",
            "TQ2_0",
            "MXFP4",
        ),
        *("IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ1_S", "IQ1_M", "IQ4_NL", "IQ4_XS"),
    }
)
_WIDTHS = {"F32": 4, "F16": 2, "BF16": 2}
_TORCH = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# Elements that are dequantised at once: what the library makes of them on the way is many times as large.
_AT_ONCE = 1 << 16
_Q8_BLOCK = 32


@dataclass(frozen=True)
class GgufEntry:
    """A tensor of a GGUF file under its name in a model folder; see ``WeightEntry``.

    Attributes:
        dtype: of what is read: F32 where the file has quantised blocks.
        shape: in a model folder.
        source: where it lies.
        tensor: in which it lies.
    """

    dtype: str
    shape: Shape
    source: GgufSource
    tensor: GgufTensor

    @property
    def elements(self) -> int:
        """Number of elements of the tensor."""
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of what is read of it in all."""
        return self.elements * _WIDTHS[self.dtype]


class GgufWeights:
    """A ``WeightReader`` of a GGUF file. What has no name in a model folder keeps its own."""

    def __init__(
        self, file: GgufFile, sources: Mapping[str, GgufSource], shapes: Mapping[str, Shape]
    ) -> None:
        """Find the tensors of a model folder in a file.

        Args:
            file: an open file; it is not closed here.
            sources: where each tensor of the folder lies in it.
            shapes: of the tensors of the folder.

        Raises:
            UnsupportedModelError: a tensor has a type that is not read.
            ModelFilesError: a tensor is only in part of the model.
        """
        self._file, self._library = file, gguf_library()
        self._entries: dict[str, GgufEntry] = {}
        claimed: dict[str, int] = defaultdict(int)
        for name, source in sources.items():
            tensor = file.tensors.get(source.name)
            if tensor is None:
                continue  # the plan of names says that it is missing
            found = _shape_of(tensor, source, shapes[name])
            if source.first and source.first + prod(found) > tensor.elements:
                continue
            self._entries[name] = GgufEntry(self._dtype_of(tensor, source), found, source, tensor)
            claimed[source.name] += prod(found)
        for name, tensor in file.tensors.items():
            if name not in claimed:
                self._entries[name] = GgufEntry("F32", tensor.shape, GgufSource(name), tensor)
            elif claimed[name] != tensor.elements:
                raise ModelFilesError(
                    f"{file.path}: {name} has {tensor.elements:,} values, and {claimed[name]:,} of them have a place "
                    "in the model: fetch it again"
                )

    @property
    def entries(self) -> Mapping[str, GgufEntry]:
        """See ``WeightReader.entries``."""
        return self._entries

    def read(self, name: str, start: int, stop: int) -> bytearray:
        """See ``WeightReader.read``."""
        entry = self._entries[name]
        source, tensor = entry.source, entry.tensor
        if source.head:
            values = self._rows_of_heads(entry, start, stop)
        else:
            values = self._values(tensor, source.first + start, source.first + stop, entry.dtype)
        if source.shift:
            values = values - np.float32(source.shift)
        return bytearray(np.ascontiguousarray(values).view(np.uint8).data)

    def pieces(self, name: str) -> Iterator[tuple[int, bytearray]]:
        """All of a tensor, as ``safetensors.Checkpoint.pieces`` gives it."""
        entry = self._entries[name]
        width = _WIDTHS[entry.dtype]
        for start in range(0, entry.elements, _AT_ONCE):
            yield start * width, self.read(name, start, min(start + _AT_ONCE, entry.elements))

    def close(self) -> None:
        """Close the file; no tensor can be read afterwards."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _dtype_of(self, tensor: GgufTensor, source: GgufSource) -> str:
        if tensor.type in _PLAIN:
            return "F32" if source.shift else tensor.type
        if tensor.type not in _QUANTISED:
            raise UnsupportedModelError(
                f"{self._file.path}: {tensor.name} is {tensor.type}, which is not read: take a file in F16, BF16, "
                "Q8_0 or another one that llama.cpp quantises"
            )
        return "F32"

    def _values(self, tensor: GgufTensor, start: int, stop: int, dtype: str) -> NDArray[Any]:
        """Elements of a tensor in the order of the file: as bits where they have the dtype already, else in fp32."""
        elements, width = tensor.block
        first, last = start // elements, -(-stop // elements)
        data = np.frombuffer(self._file.read(tensor, first, last), dtype=np.uint8)
        if tensor.type == dtype:
            return data.view(_PLAIN[dtype])
        blocks = max(_AT_ONCE // elements, 1)
        out = np.empty((last - first) * elements, dtype=np.float32)
        for at in range(0, last - first, blocks):
            count = min(blocks, last - first - at)
            part = self._dequantized(tensor, data[at * width : (at + count) * width])
            out[at * elements : (at + count) * elements] = part
        return out[start - first * elements : stop - first * elements]

    def _dequantized(self, tensor: GgufTensor, data: NDArray[np.uint8]) -> NDArray[np.float32]:
        kind = self._library.GGMLQuantizationType[tensor.type]
        with np.errstate(all="ignore"):  # what is not finite is refused where it is imported
            values: NDArray[np.float32] = self._library.dequantize(data.reshape(1, -1), kind).reshape(-1)
        return values

    def _rows_of_heads(self, entry: GgufEntry, start: int, stop: int) -> NDArray[Any]:
        """Elements of a tensor whose heads have their halves row by row in turn: whole heads are put in order."""
        head = entry.source.head
        columns = entry.shape[1] if len(entry.shape) > 1 else 1
        size = head * columns
        parts = []
        for number in range(start // size, -(-stop // size)):
            values = self._values(entry.tensor, number * size, (number + 1) * size, entry.dtype)
            values = values.reshape(head // 2, 2, columns).swapaxes(0, 1).reshape(-1)
            parts.append(values[max(start - number * size, 0) : stop - number * size])
        return np.concatenate(parts) if parts else np.empty(0, dtype=_PLAIN[entry.dtype])


def _shape_of(tensor: GgufTensor, source: GgufSource, expected: Shape) -> Shape:
    """The shape that a tensor has in a folder; the file's own where it is another one. Experts are one in a file."""
    is_stack = source.first or len(tensor.shape) == len(expected) + 1
    there = tensor.shape[1:] if is_stack else tensor.shape
    plain, wanted = ([size for size in shape if size != 1] for shape in (there, expected))
    return expected if plain == wanted else there


def type_in_gguf(source: GgufSource, shape: Shape, wanted: str) -> str:
    """The type that a tensor gets in a file: vectors and norms stay whole numbers, as llama.cpp needs them.

    Args:
        source: where it lies.
        shape: of the tensor.
        wanted: type of matrices: F32, F16, BF16 or Q8_0.
    """
    if len(shape) < 2 or source.name.endswith("norm.weight"):  # noqa: PLR2004 - a matrix
        return "F32"
    return "BF16" if wanted == "Q8_0" and shape[-1] % _Q8_BLOCK else wanted


class GgufTensorWriter:
    """Writes tensors under their names in a model folder into a GGUF file, in parts of any size and in any order."""

    def __init__(
        self,
        writer: GgufWriter,
        plan: GgufPlan,
        sources: Mapping[str, GgufSource],
        shapes: Mapping[str, Shape],
    ) -> None:
        """Write through ``writer``, which is not closed here; the rest as ``GgufWeights`` has it."""
        self._writer, self._tensors, self._sources, self._shapes = writer, plan.tensors, sources, shapes
        self._library = gguf_library()
        self._cut: dict[tuple[str, int], tuple[NDArray[np.float32], int]] = {}

    def write(self, name: str, start: int, values: Tensor) -> None:
        """Write elements of a tensor from ``start`` on.

        Raises:
            ModelFilesError: a value is too large for fp16; the message names the tensor.
        """
        source, shape = self._sources[name], self._shapes[name]
        tensor = self._tensors[source.name]
        if source.shift:
            values = values.float() + source.shift
        if not source.head:
            self._put(name, tensor, source.first + start, values)
            return
        columns = shape[1] if len(shape) > 1 else 1
        done = 0
        while done < len(values):
            row, column = divmod(start + done, columns)
            count = min(columns - column, len(values) - done)
            place = _interleaved(row, source.head) * columns + column
            self._put(name, tensor, place, values[done : done + count])
            done += count

    def _put(self, name: str, tensor: GgufTensor, at: int, values: Tensor) -> None:
        if tensor.type in _TORCH:
            plain = values.to(_TORCH[tensor.type])
            if tensor.type == "F16" and not bool(plain.isfinite().all()):
                raise ModelFilesError(
                    f"{name} has a value of {values.abs().max().item():g}, and fp16 ends at 65504: choose --dtype bf16"
                )
            self._writer.write(tensor.name, at, plain.contiguous().view(torch.uint8).numpy().data)
            return
        self._put_blocks(tensor, at, values.float().numpy())

    def _put_blocks(self, tensor: GgufTensor, at: int, values: NDArray[np.float32]) -> None:
        """Quantise whole blocks; those of which a part came wait for the rest."""
        size = tensor.block[0]
        done = 0
        while done < len(values):
            block, inside = divmod(at + done, size)
            left = len(values) - done
            if inside or left < size:
                count = min(size - inside, left)
                self._put_part(tensor, block, inside, values[done : done + count])
            else:
                count = left // size * size
                self._write_blocks(tensor, block, values[done : done + count])
            done += count

    def _put_part(self, tensor: GgufTensor, block: int, inside: int, values: NDArray[np.float32]) -> None:
        key = tensor.name, block
        whole, there = self._cut.pop(key, (np.empty(tensor.block[0], dtype=np.float32), 0))
        whole[inside : inside + len(values)] = values
        if there + len(values) == tensor.block[0]:
            self._write_blocks(tensor, block, whole)
        else:
            self._cut[key] = whole, there + len(values)

    def _write_blocks(self, tensor: GgufTensor, block: int, values: NDArray[np.float32]) -> None:
        kind = self._library.GGMLQuantizationType[tensor.type]
        for start in range(0, len(values), _AT_ONCE):
            part = values[start : start + _AT_ONCE].reshape(1, -1)
            data: NDArray[np.uint8] = self._library.quantize(part, kind)
            self._writer.write(tensor.name, block + start // tensor.block[0], data.tobytes())


def _interleaved(row: int, head: int) -> int:
    """The row in a file at which a row of a model folder lies."""
    number, inside = divmod(row, head)
    half, index = divmod(inside, head // 2)
    return number * head + 2 * index + half
