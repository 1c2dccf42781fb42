"""What a model's files hold beside its trained parameters, kept with the run: RUN/model has it as the files had it.

Buffers that are saved with a model (the biases by which a mixture of experts balances its routers) are no parameters:
training reads them and leaves them as they are. Tensors that the trained model does not compute with at all (a tower
for images, layers that predict further tokens) are carried to the export, byte for byte.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from pydantic import NonNegativeInt, TypeAdapter, ValidationError
from torch import Tensor

from megatrain_io.errors import MegatrainIoError, ModelFilesError, UnsupportedModelError
from megatrain_io.files import open_file, read_file, replace_file, sync_folder
from megatrain_io.interrupt import check
from megatrain_io.models.dequantized import DequantizedFiles, DequantizedWeights
from megatrain_io.models.gguf_folder import model_folder
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
from megatrain_io.models.text_model import TextNames, text_config_of
from megatrain_io.models.weights import StoredWeights, WeightReader
from megatrain_io.runs.folder import BUFFERS, CARRIED, SOURCE_TENSORS, RunFolder
from megatrain_io.store.dtypes import DTYPES
from megatrain_io.text import mib

__all__ = [
    "Kept",
    "SourceWeights",
    "buffers_digest",
    "buffers_of",
    "carried_digest",
    "kept_buffers",
    "kept_by",
    "kept_in",
    "names_of",
    "opened_weights",
    "remade",
    "write_kept",
]

_SHAPES_BYTES_MAX = 1 << 28
_SHAPES = TypeAdapter(dict[str, list[NonNegativeInt]])
_GROUPS_SHOWN = 4
_NAMED_AT_MOST = 3


@dataclass(frozen=True)
class SourceWeights:
    """The weight files of a model folder, opened, and where everything in them belongs.

    Attributes:
        names: the names of its model, both ways.
        plan: where everything in the files belongs.
        files: the tensors themselves, as they are trained.
        stored: the same as they are carried.
        lacking: names that the index of the files has, and no file.
    """

    names: HubNames
    plan: NamePlan
    files: WeightReader
    stored: StoredWeights | DequantizedFiles
    lacking: tuple[str, ...] = ()

    @property
    def shapes(self) -> dict[str, tuple[int, ...]] | None:
        """What ``Kept`` has of these files."""
        if not isinstance(self.names, TextNames):
            return None
        left = {*self.plan.carried, *self.plan.derived}
        return {name: entry.shape for name, entry in self.files.entries.items() if name not in left}

    def notes(self) -> list[str]:
        """What is trained of these files and what is not, as sentences; none where all is."""
        found = []
        if isinstance(self.names, TextNames):
            found.append(
                f"trains the text model of {self.names.architecture} ({self.names.text_architecture}) alone"
            )
        entries, stored = self.stored.entries, self.stored
        is_changed = isinstance(stored, DequantizedFiles) and any(map(stored.is_changed, self.plan.carried))
        in_bf16 = "carried through, what is in fp8 as the bf16 numbers that it stands for"
        for names, fate in (
            (self.plan.carried, in_bf16 if is_changed else "carried through unchanged"),
            (self.plan.derived, "left out, as transformers makes them anew"),
        ):
            if names:
                size = mib(sum(entries[name].nbytes for name in names))
                count = "1 tensor" if len(names) == 1 else f"{len(names):,} tensors"
                verb = "is" if len(names) == 1 else "are"
                found.append(f"{count} ({size}) of {_groups(names)} {verb} {fate}")
        if self.lacking:
            shown = ", ".join(self.lacking[:_NAMED_AT_MOST]) + ", ..." * (len(self.lacking) > _NAMED_AT_MOST)
            found.append(
                f"of the tensors that the index of the weights names, {len(self.lacking):,} are in none of the files "
                f"({shown}): what is trained is all there, and an export will not have them either"
            )
        return found


@dataclass(frozen=True)
class Kept:
    """What belongs into an export beside the trained parameters.

    Attributes:
        buffers: saved buffers, by their names in the model, where they are not the constructor's.
        shapes: of the tensors that are trained, by their names in the imported files; None where an export has them as
            ``save_pretrained`` writes them.
        files: that hold what is carried.
        carried: names of these tensors.
    """

    buffers: Mapping[str, Tensor] = field(default_factory=dict)
    shapes: Mapping[str, tuple[int, ...]] | None = None
    files: StoredWeights | DequantizedFiles | None = None
    carried: tuple[str, ...] = ()

    @property
    def entries(self) -> list[tuple[str, str, tuple[int, ...]]]:
        """Name, dtype and shape of each tensor that is carried."""
        if self.files is None:
            return []
        entries = self.files.entries
        return [(name, entries[name].dtype, entries[name].shape) for name in self.carried]

    def write_carried(self, out: ShardWriter) -> None:
        """Copy what is carried into files that have room for it."""
        if self.files is not None:
            for name in self.carried:
                for offset, data in self.files.pieces(name):
                    out.write(name, offset, memoryview(data))
                    check()


def names_of(folder: ModelFolder, dtype: torch.dtype) -> HubNames:
    """The names that the trained model of a folder has in its files.

    Raises:
        ModelFilesError, UnsupportedModelError: as ``ModelFolder.config``, or the text model is not to be found.
    """
    published = folder.published_config()
    text = text_config_of(published)
    return HubNames(folder.config(), dtype) if text is None else TextNames(published, text, dtype)


@contextmanager
def opened_weights(folder: ModelFolder, dtype: torch.dtype) -> Iterator[SourceWeights]:
    """Open the weight files of a model folder, and find the place of each tensor.

    Raises:
        ModelFilesError: the files are incomplete, damaged, or do not fit their configuration.
        UnsupportedModelError: the weights are quantised, or transformers cannot build the model.
    """
    with folder.open_weights() as opened:
        files: WeightReader = opened
        stored: StoredWeights | DequantizedFiles = opened
        if (block := folder.fp8_block) is not None:
            files = dequantized = DequantizedWeights(files, block)
            stored = DequantizedFiles(opened, dequantized)
        names = names_of(folder, dtype)
        plan = names.plan({name: entry.shape for name, entry in files.entries.items()})
        lacking = tuple(sorted(folder.indexed() - opened.entries.keys()))
        yield SourceWeights(names, plan, files, stored, lacking)


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
    kept = kept_in(weights)
    if kept.carried:
        with ShardWriter(folder, [plan_file(CARRIED, kept.entries)]) as file:
            kept.write_carried(file)
    if kept.shapes is not None:
        replace_file(folder / SOURCE_TENSORS, json.dumps(kept.shapes) + "\n")


def kept_in(weights: SourceWeights) -> Kept:
    """What of opened weight files belongs into an export beside the trained parameters."""
    return Kept(buffers_of(weights), weights.shapes, weights.stored, weights.plan.carried)


@contextmanager
def kept_by(run: RunFolder) -> Iterator[Kept]:
    """What the import of a run kept for an export; its files were compared before (``model_files.mended_model``).

    Raises:
        ModelFilesError: a file is damaged.
    """
    bound = run.read().files
    shapes = None
    if SOURCE_TENSORS in bound:
        shapes = _shapes_in(run.model / SOURCE_TENSORS)
    if CARRIED not in bound:
        yield Kept(kept_buffers(run), shapes)
        return
    with Checkpoint([run.model / CARRIED]) as files:
        yield Kept(kept_buffers(run), shapes, files, tuple(files.entries))


def _shapes_in(path: Path) -> dict[str, tuple[int, ...]]:
    try:
        shapes = _SHAPES.validate_json(read_file(path, _SHAPES_BYTES_MAX), strict=True)
    except ValidationError as error:
        raise ModelFilesError(
            f"{path} does not hold names and shapes of tensors: put a copy of it back"
        ) from error
    return {name: tuple(shape) for name, shape in shapes.items()}


def carried_digest(kept: Kept) -> str:
    """SHA-256 of the file that ``write_kept`` makes of what is carried; empty where nothing is."""
    if not kept.carried or kept.files is None:
        return ""
    plan = plan_file(CARRIED, kept.entries)
    digest = hashlib.sha256(plan.header)
    for entry in plan.entries:
        for _, data in kept.files.pieces(entry.name):
            digest.update(data)
            check()
    return digest.hexdigest()


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

    Raises:
        StoreInUseError: another process imports into the run's folder, or cleans it.
    """
    with run.importing():  # so that nobody takes what is being made for what was left behind
        return _remade(run, name, known)


def _remade(run: RunFolder, name: str, known: Iterable[str]) -> bool:
    info, scratch = run.read(), run.remade
    try:
        _clear(scratch)
        scratch.mkdir(0o700)
        source = model_folder(Path(info.source), dequantizes=bool(info.model_options.get("dequantize")))
        with opened_weights(source, DTYPES[info.precision]) as weights:
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


def _groups(names: Iterable[str]) -> str:
    """What tensors belong to, as words: the first parts of their names."""
    groups = dict.fromkeys(
        ".".join(parts[: 1 + (parts[0] == "layers")])
        for parts in (name.removeprefix("model.").split(".") for name in names)
    )
    shown = ", ".join([*groups][:_GROUPS_SHOWN])
    return f"{shown} and {len(groups) - _GROUPS_SHOWN} more" if len(groups) > _GROUPS_SHOWN else shown


def _clear(folder: Path) -> None:
    """Remove what a killed process left. A run comes from others, too: what a link in its place leads to is theirs."""
    if folder.is_dir() and not folder.is_symlink():
        shutil.rmtree(folder)
    elif os.path.lexists(folder):
        folder.unlink()


def _plan_of(buffers: Mapping[str, Tensor]) -> ShardPlan:
    return plan_file(
        BUFFERS, [(name, FILE_DTYPES[value.dtype], tuple(value.shape)) for name, value in buffers.items()]
    )


def _read(files: WeightReader, name: str) -> Tensor:
    entry = files.entries[name]
    if entry.dtype not in TORCH_DTYPES:
        raise ModelFilesError(
            f"{name}, a buffer of the model, is {entry.dtype}: put the file of the import back"
        )
    data = files.read(name, 0, entry.elements)
    dtype = TORCH_DTYPES[entry.dtype]
    values = torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)
    return values.view(entry.shape)


def _bytes_of(values: Tensor) -> bytes:
    return values.reshape(-1).view(torch.uint8).numpy().tobytes()
