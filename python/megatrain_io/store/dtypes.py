"""Dtypes by precision and state format: what computes, and what a store keeps for it."""

import torch

from megatrain_io.errors import ConfigError
from megatrain_io.store.layout import Precision
from megatrain_io.store.state_format import StateFormat

__all__ = ["DTYPES", "FORMATS", "check_precision", "dtype_of", "format_of"]

DTYPES: dict[Precision, torch.dtype] = {"bf16": torch.bfloat16, "fp32": torch.float32}
"""Compute dtype of each precision."""

FORMATS: dict[Precision, StateFormat] = {"bf16": "bf16", "fp32": "f32"}
"""State format of the trained parameters that compute in the dtype of each precision."""


def format_of(dtype: torch.dtype, *, is_trained: bool) -> StateFormat:
    """The state format of a parameter that computes in bf16 or fp32."""
    if dtype == torch.bfloat16:
        return "bf16" if is_trained else "raw16"
    return "f32" if is_trained else "raw32"


def dtype_of(state_format: StateFormat) -> torch.dtype:
    """The dtype in which the weights of a record compute."""
    return torch.bfloat16 if state_format in {"bf16", "raw16"} else torch.float32


def check_precision(option: str, value: str) -> None:
    """Refuse a value that is no precision.

    Raises:
        ConfigError: the message names ``option`` and what it may be.
    """
    if value not in tuple(DTYPES):
        raise ConfigError(f"{option} is {value!r}: it must be one of {', '.join(DTYPES)}")
