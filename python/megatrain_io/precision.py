"""The two precisions of training: what computes, and what a store keeps for it."""

import torch

from megatrain_io.layout import ModelLayout, StateFormat
from megatrain_io.run import Precision

__all__ = ["DTYPES", "FORMATS", "dtype_of"]

DTYPES: dict[Precision, torch.dtype] = {"bf16": torch.bfloat16, "fp32": torch.float32}
"""Of weights, where they compute."""

FORMATS: dict[Precision, StateFormat] = {"bf16": "bf16", "fp32": "f32"}
"""Of the store's records."""


def dtype_of(layout: ModelLayout) -> torch.dtype:
    """Of a store's weights, where they compute."""
    return torch.bfloat16 if layout.weight_bytes == torch.bfloat16.itemsize else torch.float32
