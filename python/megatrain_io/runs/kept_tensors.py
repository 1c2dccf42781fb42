"""What a model's files hold beside its trained parameters, kept with the run: RUN/model has it as the files had it.

Buffers that are saved with a model (the biases by which a mixture of experts balances its routers) are no parameters:
training reads them and leaves them as they are.
"""

import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megatrain_io.errors import MegatrainIoError, ModelFilesError, UnsupportedModelError
from megatrain_io.files import open_file, sync_folder
from megatrain_io.models.hub_folder import ModelFolder
from megatrain_io.models.hub_names import HubNames, NamePlan
from megatrain_io.models.safetensors import (
    FILE_DTYPES,
    TORCH_DTYPES,
    Checkpoint,
    ShardPlan,
    ShardWriter,
    plan_file,
)
from megatrain_io.models.weights import WeightReader
from megatrain_io.runs.folder import RunFolder
from megatrain_io.store.dtypes import DTYPES
from megatrain_io.store.layout import Precision

__all__ = [
    "BUFFERS",
    "KEPT",
    "SourceWeights",
    "buffers_digest",
    "buffers_of",
    "kept_buffers",
    "opened_weights",
    "remade",
    "write_kept",
]

BUFFERS = "buffers.safetensors"
"""The saved buffers of a model, by their names in it, where one has another value than its constructor gives it."""

KEPT = (BUFFERS,)
"""Files of RUN/model that were made of the weights that were imported."""


@dataclass(frozen=True)
class SourceWeights:
    """The weight files of a model folder, opened, and where everything in them belongs.

    Attributes:
        names: the names of its model, both ways.
        plan: where everything in the files belongs.
        files: the tensors themselves.
    """

    names: HubNames
    plan: NamePlan
    files: Checkpoint


@contextmanager
def opened_weights(folder: ModelFolder, precision: Precision) -> Iterator[SourceWeights]:
    """Open the weight files of a model folder, and find the place of each tensor.

    Raises:
        ModelFilesError: the files are incomplete, damaged, or do not fit their configuration.
        UnsupportedModelError: the weights are quantised, or transformers cannot build the model.
    """
    with Checkpoint(folder.weight_files()) as files:
        names = HubNames(folder.config(), DTYPES[precision])
        plan = names.plan({name: entry.shape for name, entry in files.entries.items()})
        yield SourceWeights(names, plan, files)


def buffers_of(weights: SourceWeights) -> dict[str, Tensor]:
    """Saved buffers of a model in the dtype of its files, by their names in it; none where all are the constructor's.

    Raises:
        UnsupportedModelError: one has a dtype that is not read, or is put together from several tensors.
        ModelFilesError: one has a value that is not a number.
    """
    found: dict[str, Tensor] = {}
    differs = False
    for name, target in weights.plan.buffers.items():
        entry, own = weights.files.entries[name], weights.names.buffer(target)
        if entry.dtype not in TORCH_DTYPES or entry.shape != tuple(own.shape):
            raise UnsupportedModelError(
                f"{name} {list(entry.shape)} is {entry.dtype} in the files, and buffer {target} is {list(own.shape)} "
                f"of {own.dtype}: import the original model in bf16, fp16 or fp32"
            )
        found[target] = _read(weights.files, name)
        if found[target].isnan().any():
            raise ModelFilesError(
                f"{name}, a buffer of the model, has values that are not a number: the files are damaged, or were "
                "saved after training had diverged. Fetch the weights again, or take an earlier checkpoint"
            )
        differs = differs or not torch.equal(found[target].double(), own.double())
    return found if differs else {}


def write_kept(weights: SourceWeights, folder: Path) -> None:
    """Write the files of ``KEPT`` that a model needs into a folder, durably; the same weights make the same bytes."""
    if buffers := buffers_of(weights):
        with ShardWriter(folder, [_plan_of(buffers)]) as file:
            for name, value in buffers.items():
                file.write(name, 0, _bytes_of(value))


def kept_buffers(run: RunFolder) -> dict[str, Tensor]:
    """The saved buffers that the import of a run kept, by their names in the model; none where it kept none.

    Raises:
        ModelFilesError: the file is damaged.
    """
    if BUFFERS not in run.read().files:
        return {}
    with Checkpoint([run.model / BUFFERS]) as file:
        return {name: _read(file, name) for name in file.entries}


def buffers_digest(buffers: Mapping[str, Tensor]) -> str:
    """SHA-256 of the file that ``write_kept`` makes of buffers."""
    plan = _plan_of(buffers)
    return hashlib.sha256(
        plan.header + b"".join(_bytes_of(buffers[entry.name]) for entry in plan.entries)
    ).hexdigest()


def remade(run: RunFolder, name: str, known: Iterable[str]) -> bool:
    """Make one of ``KEPT`` anew from the folder that was imported, and put it in its place, durably.

    Args:
        run: that has lost it.
        name: of the file.
        known: SHA-256 that it may have.

    Returns:
        Whether that folder still has what it was made of.
    """
    info = run.read()
    scratch = run.model / "remade.partial"
    try:
        _clear(scratch)
        scratch.mkdir(0o700)
        with opened_weights(ModelFolder(Path(info.source)), info.precision) as weights:
            write_kept(weights, scratch)
        with open_file(scratch / name) as file:
            if hashlib.file_digest(file, "sha256").hexdigest() not in known:
                return False
        (scratch / name).replace(run.model / name)
    except (MegatrainIoError, FileNotFoundError):
        return False
    finally:
        _clear(scratch)
    sync_folder(run.model)
    return True


def _clear(folder: Path) -> None:
    if os.path.lexists(folder):
        for path in folder.iterdir():
            path.unlink()
        folder.rmdir()


def _plan_of(buffers: Mapping[str, Tensor]) -> ShardPlan:
    return plan_file(
        BUFFERS, [(name, FILE_DTYPES[value.dtype], tuple(value.shape)) for name, value in buffers.items()]
    )


def _read(files: WeightReader, name: str) -> Tensor:
    entry = files.entries[name]
    data = files.read(name, 0, entry.elements)
    dtype = TORCH_DTYPES[entry.dtype]
    values = torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)
    return values.view(entry.shape)


def _bytes_of(values: Tensor) -> bytes:
    return values.reshape(-1).view(torch.uint8).numpy().tobytes()
