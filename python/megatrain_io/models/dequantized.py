"""Weights in fp8 with a scale for each block of them, read as the numbers that they stand for.

So DeepSeek's models and those after them are published: a matrix in ``float8_e4m3`` and beside it
``NAME_scale_inv``, fp32, with an entry for each 128 rows and columns. A number is its fp8 value times the entry of its
block, in fp32, as transformers makes it; nothing is rounded, so bf16 weights are those of a copy in bf16.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import ceil, prod
from typing import Any

import torch

from megatrain_io.errors import ModelFilesError, UnsupportedModelError
from megatrain_io.models.safetensors import TensorEntry
from megatrain_io.models.weights import StoredEntry, StoredWeights, WeightEntry, WeightReader

__all__ = ["DequantizedFiles", "DequantizedWeights", "can_dequantize"]

_SCALE = "_scale_inv"
_QUANTISED = {"F8_E4M3": torch.float8_e4m3fn}
_DIMENSIONS = 2
_READ_AT_ONCE = 1 << 21


def can_dequantize(marks: Mapping[str, Any]) -> bool:
    """Whether a ``quantization_config`` says fp8 with a scale for each block."""
    block = marks.get("weight_block_size")
    return (
        marks.get("quant_method") == "fp8"
        and isinstance(block, list)
        and len(block) == _DIMENSIONS
        and all(isinstance(size, int) and size > 0 for size in block)
    )


@dataclass(frozen=True)
class _Entry:
    dtype: str
    shape: tuple[int, ...]

    @property
    def elements(self) -> int:
        """Number of elements of the tensor."""
        return prod(self.shape)


class DequantizedWeights:
    """A ``WeightReader`` over one whose matrices are in fp8: these read as fp32, and their scales are not there."""

    def __init__(self, files: WeightReader, block: tuple[int, int]) -> None:
        """Read ``files``, in which each block of ``block`` rows and columns has a scale.

        Raises:
            ModelFilesError: a scale is missing, or has not an entry for each block.
            UnsupportedModelError: one is not in fp32, or not of a matrix.
        """
        self._files, self._block = files, block
        self._scales: dict[str, torch.Tensor] = {}
        entries: dict[str, WeightEntry] = {}
        for name, entry in files.entries.items():
            if name.endswith(_SCALE) and name.removesuffix(_SCALE) in files.entries:
                continue
            entries[name] = entry
            if entry.dtype in _QUANTISED:
                self._check(name, entry)
                entries[name] = _Entry("F32", entry.shape)
        self._entries = entries

    @property
    def entries(self) -> Mapping[str, WeightEntry]:
        """See ``WeightReader.entries``."""
        return self._entries

    def read(self, name: str, start: int, stop: int) -> bytearray:
        """See ``WeightReader.read``."""
        data = self._files.read(name, start, stop)
        entry = self._files.entries[name]
        if entry.dtype not in _QUANTISED or start == stop:
            return data
        values = torch.frombuffer(data, dtype=_QUANTISED[entry.dtype]).float()
        columns, (rows_of_block, columns_of_block) = entry.shape[1], self._block
        first, last = start // columns, ceil(stop / columns)
        grid = self._scale(name)[first // rows_of_block : ceil(last / rows_of_block)]
        by_row = torch.arange(first, last) // rows_of_block - first // rows_of_block
        scales = grid.repeat_interleave(min(columns_of_block, columns), 1)[:, :columns][by_row].reshape(-1)
        values *= scales[start - first * columns : stop - first * columns]
        return bytearray(values.view(torch.uint8).numpy().tobytes())

    def _scale(self, name: str) -> torch.Tensor:
        """Scales of a matrix; those of the last one are kept, as it is read in parts."""
        if name not in self._scales:
            entry = self._files.entries[name + _SCALE]
            data = self._files.read(name + _SCALE, 0, entry.elements)
            self._scales = {name: torch.frombuffer(data, dtype=torch.float32).view(entry.shape)}
        return self._scales[name]

    def _check(self, name: str, entry: WeightEntry) -> None:
        scale = self._files.entries.get(name + _SCALE)
        if scale is None:
            raise ModelFilesError(
                f"{name} is {entry.dtype}, and the files hold no {name + _SCALE} for it: fetch the files again"
            )
        if len(entry.shape) != _DIMENSIONS or scale.dtype != "F32":
            raise UnsupportedModelError(
                f"{name} is {entry.dtype} {list(entry.shape)} with scales in {scale.dtype}, and only matrices with "
                "scales in F32 are dequantised: import a copy of the model in bf16, fp16 or fp32"
            )
        blocks = tuple(ceil(n / size) for n, size in zip(entry.shape, self._block, strict=False))
        if scale.shape != blocks:
            raise ModelFilesError(
                f"{name + _SCALE} is {scale.dtype} {list(scale.shape)}, and {name} {list(entry.shape)} with blocks of "
                f"{list(self._block)} needs F32 {list(blocks)}: fetch the files again"
            )


class DequantizedFiles:
    """The tensors of such files as an export has them that does not train them: fp8 in bf16, all else as it lies there.

    Without its scale, an fp8 matrix would be another one.
    """

    def __init__(self, files: StoredWeights, weights: DequantizedWeights) -> None:
        """Read ``files``, whose numbers ``weights`` gives."""
        self._files, self._weights = files, weights

    @property
    def entries(self) -> Mapping[str, StoredEntry]:
        """Dtype, shape and size of every tensor, by name; scales are none."""
        there = self._files.entries
        return {
            name: TensorEntry(name, "BF16", there[name].shape, 0) if self.is_changed(name) else there[name]
            for name in self._weights.entries
        }

    def is_changed(self, name: str) -> bool:
        """Whether a tensor is in fp8."""
        return self._files.entries[name].dtype in _QUANTISED

    def pieces(self, name: str) -> Iterator[tuple[int, bytearray]]:
        """See ``Checkpoint.pieces``; numbers are rounded to the nearest bf16, ties to even."""
        if not self.is_changed(name):
            yield from self._files.pieces(name)
            return
        elements = self._weights.entries[name].elements
        for start in range(0, elements, _READ_AT_ONCE):
            data = self._weights.read(name, start, min(start + _READ_AT_ONCE, elements))
            values = torch.frombuffer(data, dtype=torch.float32).bfloat16()
            yield 2 * start, bytearray(values.view(torch.uint8).numpy().tobytes())
