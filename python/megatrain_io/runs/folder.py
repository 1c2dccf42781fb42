"""The run folder: where everything of one run lies, and which store belongs to it. No torch.

::

    RUN/run.json        version, precision, places and UUID of the store
    RUN/model/          config.json, tokenizer and chat template, as imported
    RUN/store.mtio      the store (elsewhere with memory.store_dir)
    RUN/config.yaml     the configuration of the last start
    RUN/metrics.jsonl   one line a step
    RUN/data/           tokenised training data
"""

import fcntl
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

from pydantic import Field, TypeAdapter, ValidationError

from megatrain_io.errors import (
    ConfigError,
    StoreInUseError,
)
from megatrain_io.files import replace_file
from megatrain_io.store.layout import Precision

__all__ = ["RunFolder", "RunInfo", "activations_file", "gradient_file"]


@dataclass(frozen=True)
class RunInfo:
    """What ``run.json`` holds.

    Attributes:
        version: of megatrain-io that imported the model.
        precision: compute dtype; bf16 keeps fp32 masters as bf16 + remainder.
        stores: paths of the store's files, one for each drive; relative ones are meant from the run folder.
        store_uuid: UUID of the store that was made for this run.
        source: the model folder it was imported from, for the record.
    """

    version: str
    precision: Precision
    stores: Annotated[list[str], Field(min_length=1)]
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

    @classmethod
    def of(cls, run: "RunFolder | Path | str") -> "RunFolder":
        """The run folder that is meant by a path, or by itself."""
        return run if isinstance(run, RunFolder) else cls(Path(run))

    @property
    def is_imported(self) -> bool:
        """Whether an import into this folder was finished."""
        return self.info_file.exists()

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

    def write(self, precision: Precision, stores: Sequence[Path], store_uuid: str, source: Path) -> RunInfo:
        """Write ``run.json``, durably: from then on the import is finished.

        Args:
            precision: compute dtype.
            stores: the files of the store, one for each drive.
            store_uuid: UUID of the store.
            source: the model folder that was imported.
        """
        here = self.path.resolve()
        resolved = [store.resolve() for store in stores]
        info = RunInfo(
            version=version("megatrain-io"),
            precision=precision,
            stores=[
                str(store.relative_to(here) if store.is_relative_to(here) else store) for store in resolved
            ],
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
        try:
            return TypeAdapter(RunInfo).validate_json(self.info_file.read_bytes(), strict=True)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            place = ".".join(map(str, first["loc"])) or "the whole"
            raise ConfigError(
                f"{self.info_file} is damaged ({place}: {first['msg']}); the store itself is not touched"
            ) from error

    def store_paths(self) -> list[Path]:
        """Paths of the store's files, one for each drive."""
        return [self.path / store for store in self.read().stores]


def activations_file(store: Path) -> Path:
    """Where activation checkpoints go that do not fit in RAM: beside a file of the store, on the same drive."""
    return store.with_name(store.name + ".inputs")


def gradient_file(store: Path) -> Path:
    """Where gradients wait for their norm that do not fit in RAM: beside a file of the store, on the same drive."""
    return store.with_name(store.name + ".gradients")
