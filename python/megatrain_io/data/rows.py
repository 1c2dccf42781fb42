"""Rows of training data: objects of JSON files and lines of CSV files, one at a time.

Whatever is wrong with one is a `DataError` that names the file and the line. Limits bound what is in memory at once.
"""

import codecs
import csv
import json
import re
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any, NoReturn

from megatrain_io.data.files import SourceFile, open_file
from megatrain_io.data.text_files import LINE_BYTES_MAX, no_text, read_lines
from megatrain_io.errors import DataError

__all__ = ["Row", "json_name", "read_rows"]

Row = dict[str, Any]

_JSON_NAMES = {dict: "an object", list: "a list", bool: "a truth value", type(None): "null"}
# Surrogates, which are valid in JSON and nowhere else.
_MAY_BE_HALF_A_CHARACTER = re.compile(r"\\u[dD][89a-fA-F]")
_NESTED_MAX = 100
_BLOCK_BYTES = 1 << 20
_DELIMITERS = {",": "comma", ";": "semicolon", "\t": "tab", "|": "bar"}
# Lines, and characters of them, by which the way a CSV file is written is told.
_LINES_SNIFFED = 200
_SNIFFED_CHARACTERS = 1 << 20
_SEPARATOR_LINE = re.compile(r'"?sep=(.)"?\s*')
_SPACE_THEN_QUOTE = re.compile(r'^ +"')


def read_rows(file: SourceFile) -> Iterator[tuple[str, Row, int]]:
    """Yield the objects of a JSON file or the rows of a CSV file: (place for people, row, bytes read)."""
    if file.kind == "csv":
        return _CsvFile(file).rows()
    return _read_json(file)


def json_name(value: object) -> str:
    """What the type of a value is called in JSON, for messages."""
    return _JSON_NAMES.get(type(value), "text" if isinstance(value, str) else "a number")


# ------------------------------------------------------------------------------------------------------ JSON


class _RepeatedKeyError(ValueError):
    """A key stands twice in an object."""


def _object(pairs: list[tuple[str, Any]]) -> Row:
    row = dict(pairs)
    if len(row) != len(pairs):
        names = [name for name, _ in pairs]
        raise _RepeatedKeyError(next(name for name in row if names.count(name) > 1))
    return row


_DECODER = json.JSONDecoder(object_pairs_hook=_object)


def _read_json(file: SourceFile) -> Iterator[tuple[str, Row, int]]:
    """Yield (place, object, bytes read) of an object a line, or of one list of objects."""
    with open_file(file.path) as stream:
        start = next((text for line in iter(lambda: stream.readline(1 << 16), b"")
                      if (text := line.removeprefix(b"\xef\xbb\xbf").lstrip())), b"")  # fmt: skip
    rows = _JsonList(file).values() if start.startswith(b"[") else _json_lines(file)
    for place, row, bytes_read in rows:
        if not isinstance(row, dict):
            raise DataError(f'{place} is {json_name(row)}, not an object such as {{"text": "..."}}.')
        yield place, row, bytes_read


def _json_lines(file: SourceFile) -> Iterator[tuple[str, Any, int]]:
    advice = "Each line must be one whole object, or the file one list of objects."
    for number, line, bytes_read in read_lines(file):
        if not line.strip():
            continue
        place = f"{file.path} line {number}"
        try:
            value, end = _DECODER.raw_decode(line, len(line) - len(line.lstrip()))
            if line[end:].strip():
                raise json.JSONDecodeError("Extra data", line, end)  # noqa: TRY301 - it gets its place below
            _check_value(place, line, value)
        except json.JSONDecodeError as error:
            raise DataError(f"{place} is not JSON: {error.msg} at column {error.colno}. {advice}") from error
        except (RecursionError, ValueError) as error:
            _refuse_value(place, error)
        yield place, value, bytes_read


def _check_value(place: str, text: str, value: Any) -> None:
    """Refuse what nothing after this could be done with: half characters, and what is nested too deep."""
    if text.count("[") + text.count("{") > _NESTED_MAX:
        _check_depth(value)
    if _MAY_BE_HALF_A_CHARACTER.search(text):
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise DataError(
                f"{place} holds half a character, \\u{ord(error.object[error.start]):04x}: an emoji was cut in two "
                f"when the file was made. Remove it."
            ) from error


def _check_depth(value: Any) -> None:
    level = [value]
    for _ in range(_NESTED_MAX):
        level = [
            inner
            for outer in level
            if isinstance(outer, dict | list)
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, dict | list)
        ]
        if not level:
            return
    raise RecursionError


def _refuse_value(place: str, error: Exception) -> NoReturn:
    if isinstance(error, DataError):
        raise error
    if isinstance(error, _RepeatedKeyError):
        raise DataError(
            f"{place} has the key {error.args[0]!r} twice: which one is meant cannot be told. Remove one."
        ) from error
    if isinstance(error, RecursionError):
        what = f"it is nested more than {_NESTED_MAX} deep"
    else:
        what = str(error).partition(";")[0]  # a number of thousands of digits; the rest is about Python
    raise DataError(f"{place} cannot be read: {what}. Remove it, or write it as text in quotes.") from error


class _JsonList:
    """The values of a file that is one list, decoded one by one: only the text of one is in memory."""

    def __init__(self, file: SourceFile) -> None:
        self._file = file
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self._text = ""
        self._at = 0
        self._bytes_read = 0
        self._ended = False
        # Of what was dropped from the text.
        self._lines = self._columns = 0

    def values(self) -> Iterator[tuple[str, Any, int]]:
        """Yield (place, value, bytes read)."""
        with open_file(self._file.path) as stream:
            self._stream = stream
            self._expect("[", "Expecting value")
            if self._next() == "]":
                self._at += 1
            else:
                number = 0
                while True:
                    number += 1
                    place = f"{self._file.path} example {number}"
                    yield place, self._value(place), self._bytes_read
                    if self._next() == "]":
                        self._at += 1
                        break
                    self._expect(",", "Expecting ',' delimiter")
            if self._next():
                self._refuse("Extra data", self._at)

    def _value(self, place: str) -> Any:
        self._next()
        while True:
            try:
                value, end = _DECODER.raw_decode(self._text, self._at)
                if end == len(self._text) and not self._ended and not isinstance(value, dict | list | str):
                    raise json.JSONDecodeError("Unterminated", self._text, end)  # noqa: TRY301 - a number, perhaps
                _check_value(place, self._text[self._at : end], value)
            except json.JSONDecodeError as error:
                # What ends with the text may only have been cut.
                is_cut = error.pos >= len(self._text) - 16 or error.msg.startswith("Unterminated")
                if self._ended or not is_cut:
                    self._refuse(error.msg, error.pos)
            except (RecursionError, ValueError) as error:
                _refuse_value(place, error)
            else:
                if end - self._at <= LINE_BYTES_MAX:
                    self._at = end
                    return value
            if len(self._text) - self._at > LINE_BYTES_MAX:
                raise DataError(
                    f"{place} has more than {LINE_BYTES_MAX:,} characters, the most that an example is read with, or "
                    f"is not JSON. Split it, or look there for a quote or a bracket that is not closed."
                )
            self._read()

    def _next(self) -> str:
        """The next character that is no white space; empty at the end."""
        while True:
            while self._at < len(self._text) and self._text[self._at] in " \t\r\n":
                self._at += 1
            if self._at < len(self._text) or self._ended:
                return self._text[self._at : self._at + 1]
            self._read()

    def _expect(self, character: str, otherwise: str) -> None:
        if self._next() != character:
            self._refuse(otherwise, self._at)
        self._at += 1

    def _read(self) -> None:
        """Read a block, and drop what was decoded."""
        # As much as there is: a long value is then tried a few times only.
        block = self._stream.read(max(_BLOCK_BYTES, len(self._text) - self._at))
        try:
            more = self._decoder.decode(block, final=not block)
        except UnicodeDecodeError as error:
            byte = f"byte 0x{error.object[error.start]:02x} at position {self._bytes_read + error.start}"
            raise no_text(self._file.path, f"is not UTF-8 ({byte})", error.object, error.start) from error
        self._bytes_read += len(block)
        self._ended = not block
        gone = self._text[: self._at]
        self._columns = len(gone) - gone.rfind("\n") - 1 if "\n" in gone else self._columns + len(gone)
        self._lines += gone.count("\n")
        self._text, self._at = self._text[self._at :] + more, 0

    def _refuse(self, what: str, at: int) -> NoReturn:
        line = self._text.count("\n", 0, at) + 1
        column = at - self._text.rfind("\n", 0, at) + (self._columns if line == 1 else 0)
        raise DataError(
            f"{self._file.path} line {self._lines + line} is not JSON: {what} at column {column}. "
            f"Check it with: python -m json.tool"
        )


# ------------------------------------------------------------------------------------------------------- CSV


class _CsvFile:
    """A CSV file, in whichever of the usual ways it is written.

    The delimiter is the one by which the first rows have as many cells as the header, at least two. `csv.Sniffer` takes
    letters for delimiters where cells are sentences. A space between delimiter and quote is no part of the cell.
    """

    def __init__(self, file: SourceFile) -> None:
        self._file = file
        lines = _first_lines(file)
        # Excel says its delimiter in a line of its own.
        said = _SEPARATOR_LINE.fullmatch(lines[0]) if lines else None
        self._first_line = 2 if said else 1
        lines = lines[self._first_line - 1 :]
        self._delimiter = said[1] if said else _delimiter(lines, file.path.suffix.lower())
        self._skips_spaces = _quotes_after_spaces(lines, self._delimiter)
        self._taken: list[str] = []
        self._bytes_read = 0

    def rows(self) -> Iterator[tuple[str, Row, int]]:
        """Yield (place, cells by the name of their column, bytes read) of each line after the header."""
        reader = self._reader(self._texts(), skips_spaces=self._skips_spaces)
        header: list[str] = []
        while True:
            place = f"{self._file.path} line {reader.line_num + self._first_line}"
            self._taken.clear()
            cells = self._cells(reader, place)
            if cells is None:
                return
            if not any(cells):
                continue  # a blank line, or one of delimiters alone
            if not header:
                header = [re.sub(r"\s+", " ", cell).strip() for cell in cells]
                self._check_header(place, header)
                continue
            if len(cells) != len(header):
                raise DataError(
                    f"{place} has {len(cells)} cells, but the header has {len(header)}: {', '.join(header)}. "
                    f"Put cells that hold a {_DELIMITERS.get(self._delimiter, self._delimiter)} or a line break in "
                    f"double quotes."
                )
            self._check_quotes(place, cells)
            yield place, self._row(place, header, cells), self._bytes_read

    def _texts(self) -> Iterator[str]:
        nbytes = 0
        for number, text, bytes_read in read_lines(self._file):
            self._bytes_read = bytes_read
            if number < self._first_line:
                continue
            nbytes = len(text) + (nbytes if self._taken else 0)
            if nbytes > LINE_BYTES_MAX:
                raise DataError(
                    f"{self._file.path} line {number}: a row has more than {LINE_BYTES_MAX:,} characters by now, the "
                    f"most that one is read with. Look before it for a quote that is not closed."
                )
            self._taken.append(text)
            yield text

    def _reader(self, lines: Iterator[str], *, skips_spaces: bool) -> Any:
        return csv.reader(lines, strict=True, delimiter=self._delimiter, skipinitialspace=skips_spaces)

    def _cells(self, reader: Any, place: str) -> list[str] | None:
        try:
            return _next_cells(reader)
        except csv.Error as error:
            raise DataError(f"{place} is not CSV: {error}. Look for a quote that is not closed.") from error

    def _check_header(self, place: str, header: list[str]) -> None:
        repeated = sorted({name for name in header if name and header.count(name) > 1})
        if repeated:
            raise DataError(
                f"{place} names the column {', '.join(map(repr, repeated))} twice: which one is meant cannot be told. "
                f"Rename or remove one."
            )

    def _check_quotes(self, place: str, cells: list[str]) -> None:
        """Refuse a quote behind a space where the rows before have none: it would be trained."""
        if self._skips_spaces or not any(_SPACE_THEN_QUOTE.match(cell) for cell in cells):
            return
        if _quotes_after_spaces(list(self._taken), self._delimiter):
            raise DataError(
                f"{place} has a space before a quote, and the first {_LINES_SNIFFED} lines have none: whether the "
                f"quotes are meant as text cannot be told. Remove the space."
            )

    def _row(self, place: str, header: list[str], cells: list[str]) -> Row:
        row = dict(zip(header, cells, strict=True))
        if "" in row:  # columns that a spreadsheet wrote although nothing is in them
            row.pop("")
            if any(cell for name, cell in zip(header, cells, strict=True) if not name):
                raise DataError(
                    f"{place} has a cell in a column without a name. Name the column, or empty it."
                )
        return row


def _first_lines(file: SourceFile) -> list[str]:
    lines: list[str] = []
    characters = 0
    for _, text, _ in islice(read_lines(file), _LINES_SNIFFED):
        lines.append(text)
        characters += len(text)
        if characters >= _SNIFFED_CHARACTERS:
            break
    return lines


def _next_cells(reader: Iterator[list[str]]) -> list[str] | None:
    # The limit (128 KiB a cell) belongs to the whole process: raised for one call, then put back.
    limit = csv.field_size_limit(LINE_BYTES_MAX)
    try:
        return next(reader, None)
    finally:
        csv.field_size_limit(limit)


def _parsed(lines: Sequence[str], delimiter: str, *, skips_spaces: bool) -> list[list[str]]:
    """Rows of some lines, those before what cannot be read."""
    reader = csv.reader(iter(lines), strict=True, delimiter=delimiter, skipinitialspace=skips_spaces)
    rows: list[list[str]] = []
    try:
        while (cells := _next_cells(reader)) is not None:
            rows.append(cells)
    except csv.Error:
        pass
    return [cells for cells in rows if any(cells)]


def _delimiter(lines: Sequence[str], extension: str) -> str:
    """The delimiter by which most of the first rows have as many cells as the header, and the header has several."""
    if extension == ".tsv":
        return "\t"
    best, most = ",", (0.0, 0)
    for delimiter in _DELIMITERS:
        rows = _parsed(lines, delimiter, skips_spaces=True)
        columns = len(rows[0]) if rows else 0
        if columns > 1:
            alike = sum(len(cells) == columns for cells in rows) / len(rows)
            if (alike, columns) > most:
                best, most = delimiter, (alike, columns)
    return best


def _quotes_after_spaces(lines: Sequence[str], delimiter: str) -> bool:
    """Whether cells are quoted behind a space: they are others when it is left out, by more than the space."""
    kept, left_out = (_parsed(lines, delimiter, skips_spaces=skips) for skips in (False, True))
    return [[cell.lstrip(" ") for cell in row] for row in kept] != [
        [cell.lstrip(" ") for cell in row] for row in left_out
    ]
