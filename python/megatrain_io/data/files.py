"""Files of training data: found and hashed, then read as streams of passages or of rows.

A file is read a line, or about a mebibyte of text, at a time; only a JSON list is held whole. Whatever is
wrong with one is a `DataError` that names the file and the line.
"""

import csv
import hashlib
import json
import os
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from megatrain_io.errors import DataError
from megatrain_io.files import open_file

__all__ = ["Row", "SourceFile", "find_files", "json_name", "read_passages", "read_rows"]

Kind = Literal["text", "json", "csv"]
Row = dict[str, Any]

_KINDS: dict[str, Kind] = {
    ".txt": "text",
    ".md": "text",
    ".jsonl": "json",
    ".json": "json",
    ".ndjson": "json",
    ".csv": "csv",
}
_JSON_NAMES = {dict: "an object", list: "a list", bool: "a truth value", type(None): "null"}
_LFS_POINTER = b"version https://git-lfs.github.com/spec/"
# Surrogates, which are valid in JSON and nowhere else.
_MAY_BE_HALF_A_CHARACTER = re.compile(r"\\u[dD][89a-fA-F]")
# Characters after which a long text file is cut at the next paragraph border, so that none is held whole.
_PASSAGE_CHARACTERS = 1 << 20


@dataclass(frozen=True)
class SourceFile:
    """A file of the training data.

    Attributes:
        path: path of the file.
        name: its path within the source it was found in; the same wherever that source is moved to.
        kind: how it is read.
        size: bytes of the file.
        sha256: of its content, hexadecimal.
    """

    path: Path
    name: str
    kind: Kind
    size: int
    sha256: str


def find_files(
    sources: Sequence[Path], option: str, unknown_as: Kind | None
) -> tuple[list[SourceFile], list[str]]:
    """List the files of the sources, those of a folder by name, and hash them.

    Args:
        sources: files and folders; folders are searched to the bottom, hidden files left out.
        option: what the sources were given as, for messages.
        unknown_as: how a file of an unknown extension is read if it was named itself; None refuses it.

    Returns:
        The files, and a sentence for each that was skipped in a folder.

    Raises:
        DataError: a source is missing, or of a kind that cannot be read.
    """
    files: list[SourceFile] = []
    notes: list[str] = []
    for source in sources:
        if source.is_dir():
            paths = sorted(_walk(source))
            for path in paths:
                _refuse_columnar(path)
            has_rows = any(_KINDS.get(path.suffix.lower(), "text") != "text" for path in paths)
            for path in paths:
                if has_rows and path.stem.lower() == "readme":
                    notes.append(
                        f"{path} was skipped: it is about the data beside it. Name it to train on it."
                    )
                elif path.suffix.lower() in _KINDS:
                    files.append(_source_file(path, path.relative_to(source).as_posix(), unknown_as))
                else:
                    notes.append(f"{path} was skipped: only {' '.join(_KINDS)} are read from a folder")
        elif source.is_file():
            _refuse_columnar(source)
            if source.suffix.lower() not in _KINDS and unknown_as is None:
                raise DataError(
                    f"{source}: the extension {source.suffix or '(none)'} is not one of {' '.join(_KINDS)}. "
                    f"Say what is in it, for example data.format: text, or rename it."
                )
            files.append(_source_file(source, source.name, unknown_as))
        else:
            raise DataError(
                f"{option}: there is no file or folder {source} (looked for in {Path.cwd()}). "
                f"Correct the path; relative ones start at the folder that the command runs in."
            )
    if not files:
        skipped = f"; {len(notes)} found, but {notes[0]}" if notes else ""
        given = ", ".join(map(str, sources)) or "nothing"
        raise DataError(
            f"{option}: no {' '.join(_KINDS)} file in {given}{skipped}. Give a file or a folder of them."
        )
    return files, notes


def _walk(folder: Path) -> Iterator[Path]:
    for parent, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (Path(parent, name) for name in names if not name.startswith("."))


def _refuse_columnar(path: Path) -> None:
    if path.suffix.lower() == ".parquet":
        raise DataError(
            f"{path} is a Parquet file, which this version does not read. Convert it to JSON lines first: "
            f"pandas.read_parquet({path.name!r}).to_json('data.jsonl', orient='records', lines=True)"
        )
    if path.suffix.lower() == ".arrow":
        raise DataError(
            f"{path.parent} is a folder saved by Hugging Face datasets, which this version does not read. "
            f"Convert it to JSON lines first: datasets.load_from_disk({str(path.parent)!r}).to_json('data.jsonl')"
        )


def _source_file(path: Path, name: str, unknown_as: Kind | None) -> SourceFile:
    kind = _KINDS.get(path.suffix.lower(), unknown_as or "text")
    try:
        with open_file(path) as file:
            start = file.read(len(_LFS_POINTER))
            file.seek(0)
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
            size = file.tell()
    except OSError as error:
        raise DataError(
            f"{path} cannot be read: {error.strerror}. Correct its permissions or path."
        ) from error
    if start == _LFS_POINTER:
        raise DataError(
            f"{path} is a Git-LFS pointer ({size} bytes), not the data. Fetch it with: git lfs pull"
        )
    return SourceFile(path, name, kind, size, sha256)


def _lines(file: SourceFile) -> Iterator[tuple[int, str, int]]:
    """Yield (number, text with its line end, bytes read so far) of each line."""
    bytes_read = 0
    with open_file(file.path) as stream:
        for number, raw in enumerate(stream, 1):
            bytes_read += len(raw)
            line = raw.removeprefix(b"\xef\xbb\xbf") if number == 1 else raw
            try:
                text = line.decode()
            except UnicodeDecodeError as error:
                raise DataError(
                    f"{file.path} line {number} is not UTF-8 (byte 0x{line[error.start]:02x} at position "
                    f"{error.start}). Convert it: iconv -f LATIN1 -t UTF-8 {file.path.name} > utf8{file.path.suffix}"
                ) from error
            if "\0" in text:
                raise DataError(
                    f"{file.path} line {number} holds a zero byte: this is no text. Remove the file, or convert "
                    f"it: iconv -f UTF-16 -t UTF-8 {file.path.name} > utf8{file.path.suffix}"
                )
            yield number, text.replace("\r\n", "\n"), bytes_read


def read_passages(file: SourceFile) -> Iterator[tuple[str, bool, int]]:
    """Yield the text of a file in passages that end with a paragraph: text, whether it is the last, bytes read.

    A blank file has none.
    """
    waiting = ""  # it is only known to be the last when no text follows
    bytes_waiting = 0
    lines: list[str] = []
    characters = bytes_read = 0
    for _, line, bytes_read in _lines(file):
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


def read_rows(file: SourceFile) -> Iterator[tuple[str, Row, int]]:
    """Yield the objects of a JSON file or the rows of a CSV file: (place for people, row, bytes read)."""
    return _read_csv(file) if file.kind == "csv" else _read_json(file)


def _read_json(file: SourceFile) -> Iterator[tuple[str, Row, int]]:
    """Yield (place, object, bytes read) of an object a line, or of one list of objects."""
    lines = _lines(file)
    for number, line, bytes_read in lines:
        if not line.strip():
            continue
        place = f"{file.path} line {number}"
        if line.lstrip().startswith("["):
            rest = "".join(text for _, text, _ in lines)
            yield from _read_json_list(file, line + rest, number)
            return
        row = _parse(line, place, "Each line must be one whole object, or the file one list of objects.")
        if not isinstance(row, dict):
            raise DataError(f'{place} is {json_name(row)}, not an object such as {{"text": "..."}}.')
        yield place, row, bytes_read


def _read_json_list(file: SourceFile, text: str, first_line: int) -> Iterator[tuple[str, Row, int]]:
    rows = _parse(text, str(file.path), "Check it with: python -m json.tool", first_line)
    for number, row in enumerate(rows, 1):
        place = f"{file.path} example {number}"
        if not isinstance(row, dict):
            raise DataError(f'{place} is {json_name(row)}, not an object such as {{"text": "..."}}.')
        yield place, row, file.size * number // len(rows)


def _parse(text: str, place: str, advice: str, first_line: int | None = None) -> Any:
    try:
        value = json.loads(text)
        if _MAY_BE_HALF_A_CHARACTER.search(text):
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{place} holds half a character, \\u{ord(error.object[error.start]):04x}: an emoji was cut in two when "
            f"the file was made. Remove it."
        ) from error
    except json.JSONDecodeError as error:
        line = f" line {error.lineno + first_line - 1}" if first_line else ""
        raise DataError(
            f"{place}{line} is not JSON: {error.msg} at column {error.colno}. {advice}"
        ) from error
    except (RecursionError, ValueError) as error:  # nested a thousand deep; a number of thousands of digits
        raise DataError(f"{place} cannot be read: {error}. {advice}") from error
    return value


def _read_csv(file: SourceFile) -> Iterator[tuple[str, Row, int]]:
    """Yield (place, cells by the name of their column, bytes read) of each line after the header."""
    bytes_read = 0

    def texts() -> Iterator[str]:
        nonlocal bytes_read
        for _, text, bytes_read in _lines(file):  # noqa: B007 - it is the function's own
            yield text

    reader = csv.reader(texts(), strict=True)
    header: list[str] | None = None
    while True:
        line = reader.line_num + 1
        place = f"{file.path} line {line}"
        try:
            cells = _next_cells(reader)
        except csv.Error as error:
            raise DataError(f"{place} is not CSV: {error}. Look for a quote that is not closed.") from error
        if cells is None:
            return
        if not cells:
            continue
        if header is None:
            header = [re.sub(r"\s+", " ", cell).strip() for cell in cells]
            continue
        if len(cells) != len(header):
            raise DataError(
                f"{place} has {len(cells)} cells, but the header has {len(header)}: {', '.join(header)}. "
                f"Put cells that hold a comma or a line break in double quotes."
            )
        yield place, dict(zip(header, cells, strict=True)), bytes_read


def _next_cells(reader: Iterator[list[str]]) -> list[str] | None:
    # The limit (128 KiB a cell) belongs to the whole process: raised for one call, then put back.
    limit = csv.field_size_limit(sys.maxsize)
    try:
        return next(reader, None)
    finally:
        csv.field_size_limit(limit)


def json_name(value: object) -> str:
    """What the type of a value is called in JSON, for messages."""
    return _JSON_NAMES.get(type(value), "text" if isinstance(value, str) else "a number")
