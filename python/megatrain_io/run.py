"""The run folder: where everything of one run lies, and which store belongs to it. No torch.

::

    RUN/run.json        version, precision, location and UUID of the store
    RUN/model/          config.json, tokenizer and chat template, as imported
    RUN/store.mtio      the store (elsewhere with memory.store_dir)
    RUN/config.yaml     the configuration of the last start
    RUN/metrics.jsonl   one line a step
    RUN/data/           tokenised training data
"""

import errno
import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Literal

from megatrain_io.errors import (
    ConfigError,
    MegatrainIoError,
    ModelFilesError,
    NoSpaceError,
    StorageError,
    StoreInUseError,
)

__all__ = ["Precision", "RunFolder", "RunInfo", "replace_file", "storage_errors", "sync_folder"]

Precision = Literal["bf16", "fp32"]


@dataclass(frozen=True)
class RunInfo:
    """What ``run.json`` holds.

    Attributes:
        version: of megatrain-io that imported the model.
        precision: compute dtype; bf16 keeps fp32 masters as bf16 + remainder.
        store: path of the store; relative paths are meant from the run folder.
        store_uuid: UUID of the store that was made for this run.
        source: the model folder it was imported from, for the record.
    """

    version: str
    precision: Precision
    store: str
    store_uuid: str
    source: str


class RunFolder:
    """Paths of one run; nothing is created before ``write``."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.info_file = path / "run.json"
        self.model = path / "model"
        self.own_store = path / "store.mtio"
        self.config = path / "config.yaml"
        self.metrics = path / "metrics.jsonl"
        self.data = path / "data"

    @property
    def is_imported(self) -> bool:
        """Whether an import into this folder was finished."""
        return self.info_file.exists()

    def write(self, precision: Precision, store: Path, store_uuid: str, source: Path) -> RunInfo:
        """Record a finished import."""
        store = store.resolve()
        inside = store.is_relative_to(self.path.resolve())
        info = RunInfo(
            version=version("megatrain-io"),
            precision=precision,
            store=str(store.relative_to(self.path.resolve()) if inside else store),
            store_uuid=store_uuid,
            source=str(source.resolve()),
        )
        # Else the steps that follow are durable, and a power cut may take what says which store they are in.
        replace_file(self.info_file, json.dumps(asdict(info), indent=2) + "\n")
        return info

    @contextmanager
    def importing(self) -> Iterator[None]:
        """Hold the folder for an import, or for looking at what one left.

        Raises:
            StoreInUseError: another process does so now.
        """
        lock = self.path / "import.lock"
        with lock.open("wb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise StoreInUseError(
                    f"another process imports into {self.path}, or cleans it. Wait for its end, or stop it"
                ) from error
            try:
                yield
            finally:
                # Still held: who waits for nothing cannot be in between.
                lock.unlink(missing_ok=True)

    def read(self) -> RunInfo:
        """What was recorded.

        Raises:
            ConfigError: this is no run folder, or its file is damaged.
        """
        if not self.is_imported:
            raise ConfigError(
                f"{self.path} is not a run folder: it has no run.json. Give the output_dir of a training run, "
                f"or import a model first: megatrain-io import MODEL {self.path}"
            )
        try:
            return RunInfo(**json.loads(self.info_file.read_text(encoding="utf-8")))
        except (ValueError, TypeError) as error:
            raise ConfigError(
                f"{self.info_file} is damaged ({error}); the store itself is not touched"
            ) from error

    def store_path(self) -> Path:
        """Path of the store."""
        return self.path / self.read().store


def replace_file(path: Path, content: str | bytes) -> None:
    """Give a file new content, durably: after a power cut it is the old one or the new one, whole."""
    fresh = path.with_name(path.name + ".tmp")
    with fresh.open("wb") as file:
        file.write(content.encode() if isinstance(content, str) else content)
        file.flush()
        os.fsync(file.fileno())
    fresh.replace(path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def storage_errors(path: Path, safe: str) -> Iterator[None]:
    """Errors of the operating system become errors with a class and advice; ``safe`` says what they left."""
    try:
        yield
    except (MegatrainIoError, BrokenPipeError):
        raise
    except OSError as error:
        if error.errno is None:
            # Not the system's: a library's own sentence, on files of the run.
            raise ModelFilesError(f"{path}: {error}") from error
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        kind = NoSpaceError if full else StorageError
        advice = "Free some space" if full else "Look at its permissions and the system's log"
        raise kind(f"{error.filename or path}: {error.strerror}. {advice}; {safe}") from error
