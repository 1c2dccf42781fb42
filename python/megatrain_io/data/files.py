"""Files of training data: found and hashed, and what is found beside them and not read.

Only regular files are opened, and in a way that cannot block: a pipe or a device would be waited for without end.
"""

import hashlib
import os
import stat
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from io import BufferedReader
from pathlib import Path
from typing import Literal

from rich.filesize import decimal

from megatrain_io import files
from megatrain_io.data.encodings import WAY_OUT, kind_of
from megatrain_io.errors import DataError

__all__ = ["FoundFiles", "Kind", "SourceFile", "find_files", "not_read", "open_file"]

Kind = Literal["text", "json", "csv"]

_KINDS: dict[str, Kind] = {
    ".txt": "text",
    ".md": "text",
    ".jsonl": "json",
    ".json": "json",
    ".ndjson": "json",
    ".csv": "csv",
    ".tsv": "csv",
}
_READ = " ".join(_KINDS)
_LFS_POINTER = b"version https://git-lfs.github.com/spec/"
_NAMES_SHOWN = 3
_START_BYTES = 16
_SPECIAL = {
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFDIR: "a folder",
}


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


@dataclass
class FoundFiles:
    """What was found in the sources of the data.

    Attributes:
        files: those that are read.
        not_read: a sentence for each folder of which files are not read: how many, and which share of it.
        notes: a sentence for each other thing that was left out.
    """

    files: list[SourceFile] = field(default_factory=list)
    not_read: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


@dataclass
class _Folder:
    """The files of a folder by what becomes of them."""

    path: Path
    read: list[Path] = field(default_factory=list)
    other: list[Path] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def not_read(self) -> list[str]:
        """How many files are of a kind that is not read, and what share of the folder they are."""
        if not self.other:
            return []
        files = len(self.read) + len(self.other)
        nbytes, total = _nbytes(self.other), _nbytes([*self.read, *self.other])
        kinds = Counter(path.suffix.lower() or "without an extension" for path in self.other)
        named = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())
        first = ", ".join(path.relative_to(self.path).as_posix() for path in self.other[:_NAMES_SHOWN])
        first += ", ..." if len(self.other) > _NAMES_SHOWN else ""
        share = f"{100 * nbytes / total:.0f} % of its bytes, " if total else ""
        sentence = (
            f"{len(self.other)} of {files} files in {self.path} are not read ({share}{decimal(nbytes)} of "
            f"{decimal(total)}): {named} ({first}). Only {_READ} are: save what is to be trained as one of these"
        )
        return [sentence]


def find_files(sources: Sequence[Path], option: str, unknown_as: Kind | None) -> FoundFiles:
    """List the files of the sources, those of a folder by name, and hash them.

    Args:
        sources: files and folders; folders are searched to the bottom, hidden files left out.
        option: what the sources were given as, for messages.
        unknown_as: how a file of an unknown extension is read if it was named itself; None refuses it.

    Raises:
        DataError: a source is missing, or of a kind that cannot be read.
    """
    found = FoundFiles()
    for source in sources:
        mode = _mode(source)
        if mode is not None and stat.S_ISDIR(mode):
            folder = _look_through(source)
            found.not_read += folder.not_read()
            found.notes += folder.notes
            found.files += [
                _source_file(path, path.relative_to(source).as_posix(), unknown_as) for path in folder.read
            ]
        elif mode is not None:
            _refuse_columnar(source)
            if source.suffix.lower() not in _KINDS and unknown_as is None and stat.S_ISREG(mode):
                with open_file(source) as file:
                    kind = kind_of(file.read(_START_BYTES))
                if kind is not None:
                    raise DataError(f"{source} is {kind}, which is not read. {WAY_OUT}")
                raise DataError(
                    f"{source}: the extension {source.suffix or '(none)'} is not one of {_READ}. "
                    f"Say what is in it, for example data.format: text, or rename it."
                )
            found.files.append(_source_file(source, source.name, unknown_as))
        else:
            raise DataError(
                f"{option}: there is no file or folder {source} (looked for in {Path.cwd()}). "
                f"Correct the path; relative ones start at the folder that the command runs in."
            )
    if not found.files:
        skipped = "".join(f"; {sentence}" for sentence in [*found.not_read, *found.notes][:1])
        given = ", ".join(map(str, sources)) or "nothing"
        raise DataError(f"{option}: no {_READ} file in {given}{skipped}. Give a file or a folder of them.")
    return found


def not_read(sources: Iterable[Path]) -> list[str]:
    """A sentence for each folder among the sources of which files are not read; nothing is opened.

    Sources that are not there say nothing: a plan is made before the data are, too.
    """
    folders = [source for source in sources if stat.S_ISDIR(_mode(source) or 0)]
    return [sentence for folder in folders for sentence in _look_through(folder).not_read()]


def open_file(path: Path) -> BufferedReader:
    """Open a regular file for reading, without waiting for what writes to it.

    Raises:
        DataError: it is something else, or cannot be opened.
    """
    try:
        return files.open_file(path)
    except files.UnfitFileError as error:
        raise _no_file(path, _mode(path) or 0) from error
    except OSError as error:
        raise _unreadable(path, error) from error


def _mode(path: Path) -> int | None:
    """Kind and permissions of what a path leads to; None where there is nothing.

    Raises:
        DataError: the system refuses to say.
    """
    try:
        return path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError, ValueError):  # a zero byte in the name
        return None
    except OSError as error:
        raise _unreadable(path, error) from error


def _look_through(source: Path) -> _Folder:
    folder = _Folder(source)
    paths = sorted(_walk(source, folder.notes))
    for path in paths:
        _refuse_columnar(path)
    has_rows = any(_KINDS.get(path.suffix.lower(), "text") != "text" for path in paths)
    for path in paths:
        if has_rows and path.stem.lower() == "readme":
            folder.notes.append(
                f"{path} was skipped: it is about the data beside it. Name it to train on it."
            )
        elif (mode := _mode(path)) is None:
            folder.notes.append(f"{path} was skipped: it is a link that leads nowhere")
        elif not stat.S_ISREG(mode):
            folder.notes.append(f"{path} was skipped: it is {_SPECIAL.get(stat.S_IFMT(mode))}, not a file")
        elif path.suffix.lower() in _KINDS:
            folder.read.append(path)
        else:
            folder.other.append(path)
    return folder


def _walk(folder: Path, notes: list[str]) -> Iterator[Path]:
    def refused(error: OSError) -> None:
        raise _unreadable(Path(error.filename or folder), error) from error

    for parent, folders, names in os.walk(folder, onerror=refused):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        notes += [
            f"{Path(parent, name)} was skipped: links to folders are not followed. Name the folder that it leads to."
            for name in folders
            if Path(parent, name).is_symlink()
        ]
        hidden = [name for name in names if name.startswith(".")]
        # Those that a Mac leaves beside each file hold none of its text.
        if texts := [n for n in sorted(hidden) if Path(n).suffix.lower() in _KINDS and n[:2] != "._"]:
            notes.append(f"{Path(parent, texts[0])} was skipped: its name begins with a dot")
        yield from (Path(parent, name) for name in names if not name.startswith("."))


def _nbytes(paths: Iterable[Path]) -> int:
    total = 0
    for path in paths:
        try:
            total += path.stat().st_size
        except OSError:  # removed meanwhile
            continue
    return total


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
        raise _unreadable(path, error) from error
    if start == _LFS_POINTER:
        raise DataError(
            f"{path} is a Git-LFS pointer ({size} bytes), not the data. Fetch it with: git lfs pull"
        )
    return SourceFile(path, name, kind, size, sha256)


def _unreadable(path: Path, error: OSError) -> DataError:
    return DataError(f"{path} cannot be read: {error.strerror}. Correct its permissions or path.")


def _no_file(path: Path, mode: int) -> DataError:
    what = _SPECIAL.get(stat.S_IFMT(mode), "no file")
    return DataError(f"{path} is {what}: only files can be trained on. Write what comes out of it to a file.")
