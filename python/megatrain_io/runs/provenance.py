"""What a store says of the import that made it: from it a lost ``run.json`` is made anew. No torch."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from megatrain_io.errors import MegatrainIoError
from megatrain_io.runs.state import FileName, PathText, TrainerState
from megatrain_io.store.inspect import StoreInfo, store_info
from megatrain_io.store.layout import Precision

__all__ = ["Provenance", "bound_files", "described", "found_in"]

_KEY = "import"


@dataclass(frozen=True)
class Provenance:
    """The import of a store, as its manifest has it.

    Attributes:
        version: of megatrain-io.
        precision: compute dtype.
        source: the model folder.
        run: the run folder, at that time.
        files: SHA-256 of each file of RUN/model, in hexadecimal.
        model_options: what was said of the model beside its folder.
    """

    version: str
    precision: Precision
    source: PathText
    run: PathText
    files: dict[FileName, str]
    model_options: dict[str, Any] = field(default_factory=dict)

    def as_entry(self) -> dict[str, Any]:
        """The entry for the model part of a manifest."""
        return {_KEY: asdict(self)}


_ADAPTER = TypeAdapter(Provenance)


def found_in(stores: Sequence[Path]) -> tuple[Provenance, StoreInfo] | None:
    """What the store in these files says of its import, and of itself; None where there is none that does."""
    try:
        info = store_info(*stores)
        entry = json.loads(info.manifest)["model"][_KEY]
        return _ADAPTER.validate_json(json.dumps(entry), strict=True), info
    except (MegatrainIoError, ValidationError, KeyError, TypeError):
        return None


def bound_files(made: Provenance, store: StoreInfo) -> dict[str, list[str]]:
    """For each file of RUN/model the SHA-256 that it may have: the import's, and what training has written since."""
    try:
        later = TrainerState.parse(store.blob).model_files
    except MegatrainIoError:
        later = {}
    files = {name: [digest] for name, digest in made.files.items()}
    return {name: sorted({*files.get(name, []), *later.get(name, [])}) for name in {**files, **later}}


def described(stores: Sequence[Path]) -> str:
    """Whose store it is that lies in these files, and at which step, as a part of a sentence."""
    try:
        info = store_info(*stores)
    except MegatrainIoError as error:
        return f"it cannot be told whose it is ({error})"
    try:
        step = f"step {TrainerState.parse(info.blob).step}"
    except MegatrainIoError:
        step = f"generation {info.generation}"
    found = found_in(stores)
    whose = "of a run that it does not name" if found is None else f"of the run {found[0].run}"
    return f"it is the store {whose}, at {step}"
