"""Between model files and store: tensor by tensor, never the whole model in RAM."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatrain_io.layout import Chunk, ModelLayout, TensorPlace
from megatrain_io.swap import Engine, Ledger, StoreCreator

__all__ = ["TensorReader", "create_store"]

TensorReader = Callable[[TensorPlace, int, int], Tensor]
"""``read(place, start, stop)``: elements start..stop of a tensor, flat, in the dtype of the source."""


def create_store(
    path: Path,
    layout: ModelLayout,
    read: TensorReader,
    *,
    model: dict[str, Any],
    blob: bytes,
    engine: Engine = "auto",
    ledger: Ledger | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> str:
    """Make a store of ``layout`` with the weights that ``read`` gives, and return its UUID.

    A bf16 source costs 2 bytes a parameter on disk now, an fp16 or fp32 source 4 (bf16 format): planes that
    are zero are not written. Nothing is left behind when it fails.

    Raises:
        NoSpaceError, FormatError, StoreInUseError, StorageError.
    """
    creator = StoreCreator(path, layout.manifest(model), engine, ledger or Ledger())
    try:
        for chunk in layout.chunks:
            values, dtype = _chunk_values(layout, chunk, read)
            creator.write_chunk(chunk.index, values, dtype)
            if progress is not None:
                progress(chunk.index + 1, len(layout.chunks))
        return creator.finish(blob)
    except BaseException:
        creator.abandon()
        raise


def _chunk_values(layout: ModelLayout, chunk: Chunk, read: TensorReader) -> tuple[bytes, str]:
    """All parameters of a chunk, padding included, as bf16 where every source is, else as fp32."""
    end = chunk.start + chunk.parameters
    parts = []
    for place in layout.records[chunk.record].tensors:
        start, stop = max(chunk.start, place.offset), min(end, place.offset + place.elements)
        if start < stop:
            values = read(place, start - place.offset, stop - place.offset)
            parts.append((start - chunk.start, stop - chunk.start, values))
    is_bf16 = all(values.dtype == torch.bfloat16 for _, _, values in parts)
    dtype = torch.bfloat16 if is_bf16 else torch.float32
    out = torch.zeros(chunk.parameters, dtype=dtype)
    for start, stop, values in parts:
        out[start:stop] = values
    name = "bfloat16" if is_bf16 else "float32"
    return out.view(torch.uint8).numpy().tobytes(), name
