"""Kinds of values that keys of the configuration take, with the sentence that a wrong one is refused by. No torch."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BeforeValidator,
    ByteSize,
    Field,
    PlainValidator,
    TypeAdapter,
    ValidationError,
)

__all__ = [
    "FP32_SMALLEST",
    "INT_MAX",
    "SEED_MAX",
    "Count",
    "CountOrAuto",
    "Folders",
    "Fp32Positive",
    "FractionOrPath",
    "LocalPath",
    "Paths",
    "Size",
    "WholeCount",
]

INT_MAX = 2**31 - 1
SEED_MAX = 2**63 - 1
FP32_SMALLEST = 1.2e-38
"""The smallest normal number, rounded up."""
_BYTES = TypeAdapter(ByteSize)


def _text(value: Any) -> str:
    value = str(value) if isinstance(value, Path) else value
    if not isinstance(value, str) or not value.strip():
        raise ValueError("must be a path, as text")
    try:
        return str(Path(value).expanduser())
    except RuntimeError as error:
        raise ValueError("must be a path: there is no such home directory") from error


def _path(value: Any) -> Path:
    return value if isinstance(value, Path) else Path(_text(value))


def _texts(value: Any) -> list[str]:
    values = value if isinstance(value, list) else [value]
    if not values or not all(isinstance(item, str | Path) for item in values):
        raise ValueError("must be a path, or a list of paths")
    return [_text(item) for item in values]


def _fraction_or_text(value: Any) -> float | str | None:
    if value is None or (isinstance(value, float) and 0 < value < 1):
        return value
    if isinstance(value, Path) or (isinstance(value, str) and value.strip()):
        return _text(value)
    raise ValueError("must be a fraction between 0 and 1, or a path, or null")


def _whole(value: Any) -> Any:
    """An integer for a whole number that was written as ``3.0``, as other tools do."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _not_zero_in_fp32(value: float) -> float:
    if value < FP32_SMALLEST:
        raise ValueError(f"must be at least {FP32_SMALLEST}, the smallest normal number of fp32")
    return value


def _count_or_auto(value: Any) -> int | str:
    value = _whole(value)
    if value == "auto":
        return "auto"
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= INT_MAX:
        raise ValueError(f"must be a whole number from 1 to {INT_MAX}, or auto")
    return value


def _size(value: Any) -> int:
    if isinstance(value, str):
        try:
            value = int(_BYTES.validate_python(value))
        except ValidationError:
            raise ValueError("must be a size, such as 4GiB") from None
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError("must be a size, such as 4GiB")
    return value


def _folders(value: Any) -> tuple[Path, ...]:
    values = value if isinstance(value, list) else [value]
    if not values:
        raise ValueError("must be a path, or a list of paths")
    return tuple(_path(item) for item in values)


Count = Annotated[int, Field(ge=1, le=INT_MAX)]
CountOrAuto = Annotated[int | Literal["auto"], PlainValidator(_count_or_auto)]
WholeCount = Annotated[Count, BeforeValidator(_whole)]
Size = Annotated[int, PlainValidator(_size)]
LocalPath = Annotated[Path, BeforeValidator(_path)]
Folders = Annotated[tuple[Path, ...], BeforeValidator(_folders)]
Paths = Annotated[list[str], PlainValidator(_texts)]
FractionOrPath = Annotated[float | str | None, PlainValidator(_fraction_or_text)]
Fp32Positive = Annotated[float, AfterValidator(_not_zero_in_fp32)]
