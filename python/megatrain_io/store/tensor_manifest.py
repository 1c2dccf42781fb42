"""What a store of tensors holds, shapes and dtypes, and how its manifest says so."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatrain_io.errors import ConfigError, FormatError, UnsupportedError

__all__ = ["DTYPES", "TensorSpec", "manifest_of", "spec_from", "specs_of"]

_CHUNK_BYTES = 8 << 20
_ALIGNMENT = 128
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
    if isinstance(value, tuple) and len(value) == 2:  # noqa: PLR2004 - shape and dtype
        shape, dtype = value
    else:
        shape, dtype = getattr(value, "shape", None), getattr(value, "dtype", None)
    sizes = tuple(shape) if isinstance(shape, (tuple, list)) else None
    if sizes is None or not all(type(size) is int and size >= 0 for size in sizes):
        raise ConfigError(f"tensor {name!r}: give (shape, dtype), or a tensor; got {value!r:.100}")
    if dtype not in _NAMES:
        raise ConfigError(f"tensor {name!r}: dtype {dtype} cannot be stored; these can: {', '.join(DTYPES)}")
    return TensorSpec(sizes, dtype)


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
