"""What a store of tensors holds, shapes and dtypes, and how its manifest says so."""

import math
import operator
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatrain_io.errors import ConfigError, FormatError, UnsupportedError

__all__ = ["DTYPES", "TensorSpec", "checked_specs", "least_memory", "manifest_of", "spec_from", "specs_of"]

_CHUNK_BYTES = 8 << 20
_ALIGNMENT = 128
_PAGE, _HUGE_PAGE = 4 << 10, 2 << 20
_NAME_BYTES_MAX = 512
_TENSORS_MAX = _CHUNKS_MAX = 1 << 20
_NBYTES_MAX = 1 << 44
# Every dtype of torch with elements of whole bytes; an older torch may lack some.
_DTYPE_NAMES = [
    *("bool", "uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64"),
    *("float16", "bfloat16", "float32", "float64", "complex32", "complex64", "complex128"),
    *("float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu"),
]
DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in _DTYPE_NAMES if hasattr(torch, name)}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class TensorSpec:
    """Shape and dtype of a tensor of a store; they never change."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of all elements of the tensor."""
        return math.prod(self.shape) * self.dtype.itemsize


def spec_from(name: str, value: Any) -> TensorSpec:
    """The shape and dtype that ``(shape, dtype)`` or a tensor gives.

    Raises:
        ConfigError: it gives none, or a dtype that cannot be stored.
    """
    shape: Any
    dtype: Any
    match value:
        case torch.Tensor() | TensorSpec():
            shape, dtype = value.shape, value.dtype
        case (shape, dtype):
            pass
        case _:
            raise ConfigError(
                f"tensor {name!r}: give (shape, dtype), or a tensor of torch; got {value!r:.100}"
            )
    sizes = _sizes(shape)
    if sizes is None:
        raise ConfigError(
            f"tensor {name!r}: a shape is a tuple of whole numbers from 0, such as (1000, 64); got {shape!r:.100}"
        )
    if not isinstance(dtype, torch.dtype) or dtype not in _NAMES:
        raise ConfigError(
            f"tensor {name!r}: dtype {dtype!r:.50} cannot be stored; these of torch can: {', '.join(DTYPES)}"
        )
    return TensorSpec(sizes, dtype)


def _sizes(shape: Any) -> tuple[int, ...] | None:
    """A shape as plain integers, also from numpy's; None if it is none."""
    try:
        sizes = tuple(shape)
        if any(isinstance(size, bool) for size in sizes):
            return None
        whole = tuple(operator.index(size) for size in sizes)
    except (TypeError, RuntimeError):
        return None  # also a nested tensor, which has no one shape
    return whole if all(size >= 0 for size in whole) else None


def checked_specs(tensors: Any) -> dict[str, TensorSpec]:
    """Shape and dtype of each tensor that a store is to be made for.

    Raises:
        ConfigError: a name, shape or dtype that cannot be, or more of them than a store can hold.
    """
    if not isinstance(tensors, Mapping):
        raise ConfigError(
            f"tensors is {type(tensors).__name__}: give a mapping from name to (shape, dtype), or to a tensor"
        )
    specs: dict[str, TensorSpec] = {}
    for name, value in tensors.items():
        _check_name(name)
        specs[name] = spec_from(name, value)
    chunks = sum(-(-max(spec.nbytes, 1) // _CHUNK_BYTES) for spec in specs.values())
    nbytes = sum(spec.nbytes for spec in specs.values())
    for found, limit, what in (
        (len(specs), _TENSORS_MAX, "tensors"),
        (nbytes, _NBYTES_MAX, "bytes"),
        (chunks, _CHUNKS_MAX, f"chunks of {_CHUNK_BYTES >> 20} MiB (each tensor takes one at least)"),
    ):
        if found > limit:
            raise ConfigError(f"{found} {what}: a store holds {limit} at most. Make several stores")
    if not specs:
        raise ConfigError("no tensors: a store is made with the names and shapes of all that it will hold")
    return specs


def _check_name(name: Any) -> None:
    if not isinstance(name, str):
        raise ConfigError(f"the name {name!r:.50} is {type(name).__name__}: names of tensors are text")
    try:
        length = len(name.encode())
    except UnicodeEncodeError:
        raise ConfigError(f"the name {name[:40]!r} is not text that can be written as UTF-8") from None
    if not 0 < length <= _NAME_BYTES_MAX or "\0" in name:
        raise ConfigError(
            f"the name {name[:40]!r} has {length} bytes: 1 to {_NAME_BYTES_MAX} without NUL are possible"
        )


def least_memory(specs: Mapping[str, TensorSpec]) -> int:
    """Bytes that a store of these tensors needs to move any of them: two of its largest chunks, and a huge page."""
    largest = max((min(spec.nbytes, _CHUNK_BYTES) for spec in specs.values()), default=0)
    extent = max(_PAGE, -(-largest // _PAGE) * _PAGE)
    return -(-2 * extent // _HUGE_PAGE) * _HUGE_PAGE + _HUGE_PAGE


def manifest_of(
    specs: Mapping[str, TensorSpec], durability: str, *, chunk_nbytes: int = _CHUNK_BYTES
) -> dict[str, Any]:
    """The manifest of a store of these tensors, without their values; they move by ``chunk_nbytes``."""
    length = {
        name: max(_ALIGNMENT, -(-spec.nbytes // _ALIGNMENT) * _ALIGNMENT) for name, spec in specs.items()
    }
    return {
        "chunk_parameters": chunk_nbytes,
        "durability": durability,
        "content": "tensors",
        "records": [{"name": name, "format": "raw8", "parameters": length[name]} for name in specs],
        "tensors": [
            {"name": name, "record": record, "offset": 0, "shape": [spec.nbytes]}
            for record, (name, spec) in enumerate(specs.items())
        ],
        "model": {"tensors": [[_NAMES[spec.dtype], list(spec.shape)] for spec in specs.values()]},
    }


def specs_of(manifest: Mapping[str, Any], path: Path) -> dict[str, TensorSpec]:
    """Shape and dtype of each tensor of a store; the core has checked all of its manifest but ``model``.

    Raises:
        FormatError: it holds something else, or ``model`` is not what ``manifest_of`` writes.
        UnsupportedError: this torch lacks one of its dtypes.
    """
    if manifest["content"] != "tensors":
        raise FormatError(
            f"{path}: this store holds a model in training, not tensors of a TensorStore: use it through its run"
        )
    tensors, model = manifest["tensors"], manifest["model"]
    described = model.get("tensors") if isinstance(model, dict) else None
    if not isinstance(described, list) or len(described) != len(tensors):
        raise FormatError(
            f"{path}: its manifest does not describe its {len(tensors)} tensors: TensorStore did not make it"
        )
    specs: dict[str, TensorSpec] = {}
    for tensor, entry in zip(tensors, described, strict=True):
        name = tensor["name"]
        match entry:
            case [str(dtype), [*shape]] if all(type(size) is int and size >= 0 for size in shape):
                pass
            case _:
                raise FormatError(
                    f"{path}: tensor {name!r} is described as {entry!r:.100}, not as dtype and shape"
                )
        if dtype not in DTYPES:
            known = dtype in _DTYPE_NAMES
            if known:
                raise UnsupportedError(
                    f"{path}: tensor {name!r} has dtype {dtype}, which this torch does not know"
                )
            raise FormatError(f"{path}: tensor {name!r} has dtype {dtype!r:.100}, which there is not")
        spec = TensorSpec(tuple(shape), DTYPES[dtype])
        if name in specs or [spec.nbytes] != tensor["shape"]:
            raise FormatError(
                f"{path}: tensor {name!r} stands there twice, or has other bytes than its shape and dtype"
            )
        specs[name] = spec
    return specs
