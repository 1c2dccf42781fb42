"""Words and figures for a person."""

import math
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any

from rich.console import Console
from rich.filesize import decimal

__all__ = ["SECONDS_BETWEEN_LINES", "gib", "mib", "rows", "tell", "visible", "whole_mib"]

SECONDS_BETWEEN_LINES = 5.0
"""Where there is no terminal, progress is told so often."""

_SMALL = 64 << 20
_MILLION = 1e6
_COMPARED = {"planned", "measured", "ratio"}

# Control characters, what turns the direction of writing, line breaks of Unicode, and halves of pairs. Of line
# breaks only those stay that a message of ours has: the next line is indented.
_HIDDEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]|\n(?!  )")


def visible(text: str) -> str:
    """Text as a terminal may be given it: what would steer the terminal, or begin a line, is shown by its number."""
    return _HIDDEN.sub(_number_of, text)


def _number_of(found: re.Match[str]) -> str:
    return found[0].encode("unicode_escape").decode("ascii")


def mib(nbytes: int) -> str:
    """A size in MiB, rounded up, so that what is named is enough; small ones have a decimal."""
    if nbytes < _SMALL:
        return f"{math.ceil(nbytes / (1 << 20) * 10) / 10} MiB"
    return whole_mib(nbytes)


def whole_mib(nbytes: int) -> str:
    """A size in MiB, rounded up to a whole number."""
    return f"{-(-nbytes // (1 << 20))} MiB"


def gib(nbytes: int) -> str:
    """A size of memory in GiB, with one decimal."""
    return f"{nbytes / 2**30:.1f} GiB"


def rows(result: Mapping[str, Any], indent: str = "") -> Iterator[str]:
    """A line for each figure of a result, with the unit that its name implies; nested ones are indented."""
    width = max(map(len, result), default=0)
    for name, value in result.items():
        label = f"{indent}{name.replace('_', ' '):<{width}}"
        if isinstance(value, Mapping) and value.keys() == _COMPARED:
            planned, measured = (_figure(name, value[key]) for key in ("planned", "measured"))
            ratio = "" if value["ratio"] is None else f": ratio {value['ratio']:.2f}"
            yield f"{label}  {planned} planned, {measured} measured{ratio}"
        elif isinstance(value, Mapping):
            yield label.rstrip()
            yield from rows(value, indent + "  ")
        elif value is not None:
            yield f"{label}  {_figure(name, value)}"


def _figure(name: str, value: Any) -> str:
    if isinstance(value, tuple | list) and value:  # an account: current and peak
        return f"{_memory(value[0])}, peak {_memory(value[-1])}"
    if name.startswith("peak_"):
        return _memory(value)
    if "bytes" in name and "per_parameter" not in name and isinstance(value, int | float):
        return decimal(round(value))
    if isinstance(value, float):
        return f"{value:,.0f}" if _MILLION <= abs(value) < math.inf else f"{value:.6g}"
    return visible(str(value))


def _memory(nbytes: int) -> str:
    return f"{nbytes / 2**30:.1f} GiB" if nbytes >= 2**30 else f"{nbytes / 2**20:.1f} MiB"


def tell(console: Console, text: str) -> None:
    """Print text as it is: no markup, no colours for numbers, no line breaks added; control characters are shown.

    Where the console is gone, nothing is printed: what is done meanwhile goes on.
    """
    with suppress(OSError, SystemExit):  # rich exits where a pipe is broken
        console.print(visible(text), markup=False, highlight=False, soft_wrap=True)
