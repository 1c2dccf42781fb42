"""The run folder: where everything of one run lies, and which store belongs to it. No torch.

::

    RUN/run.json        version, precision, places and UUID of the store, hashes of the files of RUN/model
    RUN/model/          config.json, tokenizer and chat template, as imported, and tensors that are not trained
    RUN/store.mtio      the store (elsewhere with memory.store_dir)
    RUN/config.yaml     the configuration of the last start, with absolute paths
    RUN/metrics.jsonl   one line a step
    RUN/data/           tokenised training data
"""

import fcntl
import json
import os
import shlex
import stat
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, TypeAdapter, ValidationError

from megatrain_io.errors import (
    ConfigError,
    StoreInUseError,
)
from megatrain_io.files import SETTINGS_BYTES_MAX, append_file, new_file, read_file, replace_file
from megatrain_io.runs.provenance import bound_files, found_in
from megatrain_io.runs.state import FileName, PathText
from megatrain_io.store.layout import Precision

__all__ = [
    "BUFFERS",
    "CARRIED",
    "KEPT",
    "SOURCE_TENSORS",
    "RunFolder",
    "RunInfo",
    "activations_file",
    "gradient_file",
]

BUFFERS = "buffers.safetensors"
"""The saved buffers of a model, by their names in it, where one has another value than its constructor gives it."""

CARRIED = "carried.safetensors"
"""What the trained model does not compute with, as it was in the files, by the names there."""

SOURCE_TENSORS = "source_tensors.json"
"""Names and shapes of what is trained in the files of a model that has more than a text model: an export has them."""

KEPT = (BUFFERS, CARRIED, SOURCE_TENSORS)
"""Files of RUN/model that were made of the weights that were imported."""


@dataclass(frozen=True)
class RunInfo:
    """What ``run.json`` holds.

    Attributes:
        version: of megatrain-io that imported the model.
        precision: compute dtype; bf16 keeps fp32 masters as bf16 + remainder.
        stores: paths of the store's files, one for each drive; relative ones are meant from the run folder.
        store_uuid: UUID of the store that was made for this run.
        source: the model folder it was imported from, for the record.
        files: for each file of RUN/model the SHA-256 that it may have, in hexadecimal; none in runs of versions that
            did not write it down.
        model_options: what was said of the model beside its folder; see ``models.model_options``.
    """

    version: str
    precision: Precision
    stores: Annotated[list[PathText], Field(min_length=1)]
    store_uuid: str
    source: PathText
    files: dict[FileName, list[str]] = field(default_factory=dict)
    model_options: dict[str, Any] = field(default_factory=dict)


class RunFolder:
    """Paths of one run; nothing is created before ``write``."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.info_file = path / "run.json"
        self.model = path / "model"
        self.remade = self.model / "remade.partial"
        self.own_store = path / "store.mtio"
        self.config = path / "config.yaml"
        self.metrics = path / "metrics.jsonl"
        self.data = path / "data"

    @classmethod
    def of(cls, run: "RunFolder | Path | str") -> "RunFolder":
        """The run folder that is meant by a path, or by itself."""
        return run if isinstance(run, RunFolder) else cls(Path(run))

    @property
    def is_imported(self) -> bool:
        """Whether an import into this folder was finished: the store says so, too, where ``run.json`` is lost."""
        return os.path.lexists(self.info_file) or self._of_store([self.own_store]) is not None

    def stores_in(self, folders: Sequence[Path] | None) -> list[Path]:
        """The files of a store, one for each drive.

        Args:
            folders: one on each drive; the files there are named after the run. None: in the run folder.
        """
        if folders is None:
            return [self.own_store]
        name = self.path.resolve().name
        endings = ["mtio", *(f"{drive}.mtio" for drive in range(1, len(folders)))]
        return [
            folder.expanduser() / f"{name}.{ending}" for folder, ending in zip(folders, endings, strict=True)
        ]

    def write(
        self,
        precision: Precision,
        stores: Sequence[Path],
        store_uuid: str,
        source: Path,
        *,
        files: Mapping[str, str] | None = None,
        model_options: dict[str, Any] | None = None,
    ) -> RunInfo:
        """Write ``run.json``, durably: from then on the import is finished.

        Args:
            precision: compute dtype.
            stores: the files of the store, one for each drive.
            store_uuid: UUID of the store.
            source: the model folder that was imported.
            files: SHA-256 of each file of the model.
            model_options: what was said of the model beside its folder, as plain JSON types.
        """
        info = RunInfo(
            version=version("megatrain-io"),
            precision=precision,
            stores=self._as_recorded(stores),
            store_uuid=store_uuid,
            source=str(source.resolve()),
            files={name: [digest] for name, digest in (files or {}).items()},
            model_options=model_options or {},
        )
        # Else the steps that follow are durable, and a power cut may take what says which store they are in.
        self.save(info)
        return info

    def save(self, info: RunInfo) -> None:
        """Write ``run.json`` anew, durably."""
        replace_file(self.info_file, json.dumps(asdict(info), indent=2) + "\n")

    def bind(self, files: Mapping[str, str]) -> None:
        """Let files of the model have other content from now on, beside what they may have already; durably.

        Args:
            files: SHA-256 of each.
        """
        info = self.read()
        bound = info.files | {name: sorted({*info.files.get(name, []), new}) for name, new in files.items()}
        if info.files and bound != info.files:
            self.save(replace(info, files=bound))

    def mend(self, stores: Sequence[Path]) -> list[str]:
        """Make ``run.json`` anew where it is lost or damaged and the store says what was in it.

        The lock of an import that was killed when all was written is removed.

        Args:
            stores: where the store's files are, should the run folder not hold them.

        Returns:
            A sentence for the person; none where there was nothing to mend.
        """
        is_there = os.path.lexists(self.info_file)
        if is_there and self._import_lock.exists():
            with suppress(StoreInUseError, OSError), self.importing():
                pass
        if is_there and self._read() is not None:
            return []
        info = self._of_store([self.own_store]) or self._of_store(stores)
        if info is None:
            return []
        self.save(info)
        lost = "damaged" if is_there else "not there"
        return [f"{self.info_file} is {lost}: it was made anew from the store"]

    def doubts(self) -> list[str]:
        """What the rights of the folder allow that nobody will want, as sentences."""
        with suppress(FileNotFoundError):
            mode = self.path.stat().st_mode
            if mode & stat.S_IWOTH and not mode & stat.S_ISVTX:
                here = shlex.quote(str(self.path.absolute()))
                return [f"everybody may replace the files of {self.path}: chmod o-w {here} ends that"]
        return []

    def _as_recorded(self, stores: Sequence[Path]) -> list[str]:
        here = self.path.resolve()
        resolved = [store.resolve() for store in stores]
        return [str(store.relative_to(here) if store.is_relative_to(here) else store) for store in resolved]

    def _of_store(self, stores: Sequence[Path]) -> RunInfo | None:
        """What ``run.json`` of this run would say, by a store in these files; None where there is none of this run."""
        found = found_in(stores)
        if found is None:
            return None
        made, store = found
        is_here = list(stores) == [self.own_store]
        if not is_here and made.run != str(self.path.resolve()):
            return None
        return RunInfo(
            version=made.version,
            precision=made.precision,
            stores=self._as_recorded(stores),
            store_uuid=store.uuid,
            source=made.source,
            files=bound_files(made, store),
            model_options=made.model_options,
        )

    @property
    def _import_lock(self) -> Path:
        return self.path / "import.lock"

    @contextmanager
    def importing(self) -> Iterator[None]:
        """Hold the folder for an import, or for looking at what one left.

        Raises:
            StoreInUseError: another process does so now.
        """
        lock = self._import_lock
        with suppress(FileExistsError):
            new_file(lock).close()
        with append_file(lock) as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise StoreInUseError(
                    f"another process imports into {self.path}, or cleans it. Wait until it has ended, or stop it"
                ) from error
            try:
                yield
            finally:
                # Still held: who waits for nothing cannot be in between.
                lock.unlink(missing_ok=True)

    def read(self) -> RunInfo:
        """What ``run.json`` says of the run.

        Raises:
            ConfigError: this is no run folder, or the file is damaged.
        """
        if not self.is_imported:
            raise ConfigError(
                f"{self.path} is not a run folder: it has no run.json. Give the output_dir of a training run, "
                f"or import a model first: megatrain-io import MODEL {self.path}"
            )
        info = self._read() or self._of_store([self.own_store])
        if info is None:
            raise ConfigError(
                f"{self.info_file} is damaged ({self._damage()}); the store itself is not touched. Put a copy of it in "
                "its place; where the store lies in a memory.store_dir, megatrain-io train --config FILE --resume "
                "with that key makes it anew from the store"
            )
        return info

    def _read(self) -> RunInfo | None:
        """What ``run.json`` holds; None where it is damaged."""
        try:
            return _parsed(self.info_file)
        except (ValidationError, OSError):
            return None

    def _damage(self) -> str:
        """What is wrong with ``run.json``; nothing where it is whole."""
        try:
            _parsed(self.info_file)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            place = ".".join(map(str, first["loc"])) or "the whole"
            return f"{place}: {first['msg']}"
        except OSError as error:
            return error.strerror or str(error)
        return ""

    def store_paths(self) -> list[Path]:
        """Paths of the store's files, one for each drive."""
        return [self.path / store for store in self.read().stores]


def _parsed(path: Path) -> RunInfo:
    return TypeAdapter(RunInfo).validate_json(read_file(path, SETTINGS_BYTES_MAX), strict=True)


def activations_file(store: Path) -> Path:
    """Where activation checkpoints go that do not fit in RAM: beside a file of the store, on the same drive."""
    return store.with_name(store.name + ".inputs")


def gradient_file(store: Path) -> Path:
    """Where gradients wait for their norm that do not fit in RAM: beside a file of the store, on the same drive."""
    return store.with_name(store.name + ".gradients")
