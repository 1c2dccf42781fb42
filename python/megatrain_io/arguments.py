"""Numbers among the arguments of calls: what is none, or out of its range, is refused with a sentence. No torch."""

from numbers import Integral, Real
from typing import Any

from megatrain_io.errors import ConfigError

__all__ = ["is_number", "number", "whole_number"]

_FP32_MAX = 3.4028234663852886e38


def is_number(value: Any) -> bool:
    """Whether it is a finite number from 0 on that fp32 can hold."""
    real: Any = -1 if isinstance(value, bool) or not isinstance(value, Real) else value
    return bool(0 <= real <= _FP32_MAX)


def number(name: str, value: Any) -> float:
    """A number from 0 on that fp32 can hold.

    Raises:
        ConfigError: it is none; the message calls it ``name``.
    """
    if not is_number(value):
        raise ConfigError(f"{name} is {value!r}: it must be a number from 0 on, and finite in fp32")
    return float(value)


def whole_number(name: str, value: Any, least: int, most: int) -> int:
    """A whole number from ``least`` to ``most``.

    Raises:
        ConfigError: it is none; the message calls it ``name``.
    """
    if isinstance(value, bool) or not isinstance(value, Integral) or not least <= int(value) <= most:
        raise ConfigError(f"{name} is {value!r}: it must be a whole number from {least} to {most}")
    return int(value)
