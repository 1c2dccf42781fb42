"""Kinds of values that keys of the configuration take, with the sentence that a wrong one is refused by. No torch."""

import os
import re
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
    "EPSILON_MAX",
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
    "TemplateText",
    "WholeCount",
]

INT_MAX = 2**31 - 1
SEED_MAX = 2**63 - 1
FP32_SMALLEST = 1.2e-38
"""The smallest normal number, rounded up."""
EPSILON_MAX = 0.01
"""Of AdamW's epsilon: the root of the second moment is mostly far smaller, and an update would have no effect."""
_BYTES = TypeAdapter(ByteSize)
_SIZE = re.compile(r"\d+(\.\d+)?\s*([kmgtp]i?b?|b)?", re.IGNORECASE)
_SMALLEST_SIZE = 1 << 16
"""Bytes: a smaller number without a unit was meant in another one."""
_NAME_MAX, _PATH_MAX = 255, 4095
"""Bytes of a file name and of a path that Linux takes."""


def _text(value: Any) -> str:
    value = str(value) if isinstance(value, Path) else value
    if not isinstance(value, str) or not value.strip():
        raise ValueError("must be a path, as text")
    try:
        path = str(Path(value).expanduser())
        name = max(map(len, os.fsencode(path).split(b"/")))
    except RuntimeError as error:
        raise ValueError("must be a path: there is no such home directory") from error
    except UnicodeEncodeError:
        raise ValueError(
            "must be a path: it has half of a pair of characters, which no file name has"
        ) from None
    if "\0" in path:
        raise ValueError("must be a path: it has a NUL character, which no file name has")
    if name > _NAME_MAX or len(os.fsencode(path)) > _PATH_MAX:
        raise ValueError(
            f"must be a path, of {_PATH_MAX} bytes at most with names of {_NAME_MAX} bytes at most: here one has {name}"
        )
    return path


def _path(value: Any) -> Path:
    return Path(_text(value))


def _template(value: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ValueError("must be a name, a file or the text of a chat template, or null for the model's own")
    if "\0" in value:
        raise ValueError("must be text without NUL characters")
    return _text(value) if value.startswith("~") else value


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
    has_unit = False
    if isinstance(value, str):
        try:
            has_unit = _SIZE.fullmatch(value.strip()) is not None and value.strip()[-1].isalpha()
            value = int(_BYTES.validate_python(value)) if has_unit else int(value)
        except (ValidationError, ValueError):
            raise ValueError("must be a size, such as 4GiB") from None
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= SEED_MAX:
        raise ValueError("must be a size, such as 4GiB")
    if value < _SMALLEST_SIZE and not has_unit:
        raise ValueError("must be a size with its unit, such as 4GiB: without one it is bytes")
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
TemplateText = Annotated[str, PlainValidator(_template)]
FractionOrPath = Annotated[float | str | None, PlainValidator(_fraction_or_text)]
Fp32Positive = Annotated[float, AfterValidator(_not_zero_in_fp32)]
