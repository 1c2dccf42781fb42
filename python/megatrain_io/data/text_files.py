"""Text files, line by line or in passages. None is held whole, and what is no UTF-8 is named with the way out."""

from collections.abc import Iterator
from pathlib import Path

from megatrain_io.data.encodings import conversion
from megatrain_io.data.files import SourceFile, open_file
from megatrain_io.errors import DataError

__all__ = ["LINE_BYTES_MAX", "no_text", "read_lines", "read_passages"]

LINE_BYTES_MAX = 32 << 20
"""Bytes of a line of JSON or a row of CSV; more would take gigabytes of memory when it is read."""

# Characters after which a long text file is cut at the next paragraph border, so that none is held whole.
_PASSAGE_CHARACTERS = 1 << 20
# Bytes at which a line of running text is cut.
_TEXT_LINE_BYTES = 4 << 20
_SAMPLE_BYTES = 1 << 20


def read_lines(file: SourceFile) -> Iterator[tuple[int, str, int]]:
    """Yield (number, text with its line end, bytes read so far) of each line.

    Raises:
        DataError: a line is too long, or no text.
    """
    bytes_read = 0
    with open_file(file.path) as stream:
        for number, raw in enumerate(iter(lambda: stream.readline(LINE_BYTES_MAX + 1), b""), 1):
            if len(raw) > LINE_BYTES_MAX:
                raise DataError(
                    f"{file.path} line {number} has more than {LINE_BYTES_MAX:,} bytes, the most that a line is read "
                    f"with. Put each example on a line of its own, or split this one."
                )
            bytes_read += len(raw)
            yield number, _decoded(file.path, raw, number), bytes_read


def read_passages(file: SourceFile) -> Iterator[tuple[str, bool, int]]:
    """Yield the text of a file in passages that end with a paragraph: text, whether it is the last, bytes read.

    A blank file has none.
    """
    waiting = ""  # it is only known to be the last when no text follows
    bytes_waiting = 0
    lines: list[str] = []
    characters = bytes_read = 0
    for line, bytes_read in _text_lines(file):
        lines.append(line)
        characters += len(line)
        full = characters >= _PASSAGE_CHARACTERS and not line.strip()
        # A file without paragraphs is cut at a line.
        if full or characters >= 4 * _PASSAGE_CHARACTERS:
            if waiting.strip():
                yield waiting, False, bytes_waiting
            waiting, bytes_waiting = "".join(lines), bytes_read
            lines, characters = [], 0
    last = "".join(lines)
    if waiting.strip():
        yield waiting, not last.strip(), bytes_waiting
    if last.strip():
        yield last, True, bytes_read


def _text_lines(file: SourceFile) -> Iterator[tuple[str, int]]:
    """Yield (line or a part of a very long one, bytes read so far)."""
    bytes_read, number, rest = 0, 1, b""
    with open_file(file.path) as stream:
        while raw := rest + stream.readline(_TEXT_LINE_BYTES):
            whole, rest = raw, b""
            if not raw.endswith(b"\n") and len(raw) >= _TEXT_LINE_BYTES:
                whole, rest = _at_a_character(raw)
            bytes_read += len(whole)
            yield _decoded(file.path, whole, number), bytes_read
            number += whole.endswith(b"\n")


def _at_a_character(raw: bytes) -> tuple[bytes, bytes]:
    """Cut before a character at the end that is not whole."""
    for back in range(1, 4):
        if raw[-back] >= 0xC0:  # noqa: PLR2004 - the first byte of a longer character
            return raw[:-back], raw[-back:]
        if raw[-back] < 0x80:  # noqa: PLR2004
            break
    return raw, b""


def _decoded(path: Path, raw: bytes, number: int) -> str:
    line = raw.removeprefix(b"\xef\xbb\xbf") if number == 1 else raw
    try:
        text = line.decode()
    except UnicodeDecodeError as error:
        byte = f"byte 0x{line[error.start]:02x} at position {error.start}"
        raise no_text(path, f"line {number} is not UTF-8 ({byte})", line, error.start) from error
    if "\0" in text:
        raise no_text(path, f"line {number} holds a zero byte", line, line.index(0))
    return text.replace("\r\n", "\n")


def no_text(path: Path, what: str, where: bytes, at: int) -> DataError:
    """The error of a file that is no UTF-8, which says how to make it so, if that can be told.

    Args:
        path: of the file.
        what: what is wrong with it, and where.
        where: bytes of the file.
        at: the first of them that is wrong.
    """
    with open_file(path) as file:
        start = file.read(_SAMPLE_BYTES)
    half = _SAMPLE_BYTES // 2
    return DataError(f"{path} {what}: {conversion(path, start, where[max(0, at - half) : at + half])}")
