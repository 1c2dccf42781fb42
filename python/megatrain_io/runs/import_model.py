"""Making the store of a run from model files: tensor by tensor, never the whole model in RAM.

Each chunk's parameters are read from wherever the files hold them, and the chunk is written: a few chunks are in
memory, whatever the size of the model or of its largest tensor.
"""

import logging
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self, get_args

import torch
from torch import Tensor

from megatrain_io.errors import (
    ConfigError,
    ModelFilesError,
    UnsupportedModelError,
)
from megatrain_io.files import make_folder, storage_errors, sync_folder
from megatrain_io.interrupt import check, held
from megatrain_io.machine.drive import store_drive_notes
from megatrain_io.machine.precision import fastest_here
from megatrain_io.models.gguf_folder import model_folder
from megatrain_io.models.hub_folder import ModelFolder
from megatrain_io.models.hub_names import NamePlan, Piece
from megatrain_io.models.model_options import ModelOptions
from megatrain_io.models.partition import PartitionedModel, model_parts
from megatrain_io.models.safetensors import TORCH_DTYPES
from megatrain_io.models.text_model import proof_of_text_model
from megatrain_io.models.weights import WeightReader
from megatrain_io.runs.folder import RunFolder, RunInfo
from megatrain_io.runs.kept_tensors import SourceWeights, buffers_of, opened_weights, write_kept
from megatrain_io.runs.model_files import digests_of
from megatrain_io.runs.provenance import Provenance, described
from megatrain_io.runs.state import TrainerState
from megatrain_io.store.dtypes import DTYPES, check_precision, dtype_of, format_of
from megatrain_io.store.inspect import remove_store
from megatrain_io.store.layout import Chunk, Durability, ModelLayout, Precision, TensorPlace
from megatrain_io.store.paged_store import Engine, Ledger, StoreCreator
from megatrain_io.store.state_format import StateFormat
from megatrain_io.text import visible

__all__ = [
    "NOTHING_LEFT",
    "ModelImport",
    "Progress",
    "TensorReader",
    "checked_weights",
    "create_store",
    "import_model",
    "layout_of",
    "refuse_other_formats",
]

TensorReader = Callable[[TensorPlace, int, int], Tensor]
"""``read(place, start, stop)``: elements start..stop of a tensor, flat, in the dtype of the source."""

Progress = Callable[[int, int], None]
"""``progress(done, total)``: chunks done, and chunks in all."""

_LOG = logging.getLogger("megatrain_io")
_TRAINABLE = ("BF16", "F16", "F32")

NOTHING_LEFT = "nothing was left behind"
_COMPARED_AT_ONCE = 1 << 20
_CHUNK_STEP = 4096


def create_store(  # noqa: PLR0913 - keywords, each with a default or a meaning of its own
    paths: Sequence[Path],
    layout: ModelLayout,
    read: TensorReader,
    *,
    model: dict[str, Any],
    blob: bytes,
    engine: Engine = "auto",
    ledger: Ledger | None = None,
    progress: Progress | None = None,
) -> str:
    """Make a store of ``layout`` with the weights that ``read`` gives, and return its UUID.

    There is a path for each drive; chunks go to them in turn.

    A bf16 source costs 2 bytes a parameter on disk now, an fp16 or fp32 source 4 (bf16 format): planes that
    are zero are not written. Nothing is left behind when it fails.

    Raises:
        ModelFilesError: a value is infinite or not a number; the message names the tensor, and how many there are.
        NoSpaceError, FormatError, StoreInUseError, StorageError: it cannot be made.
    """
    creator = None
    try:
        creator = StoreCreator(paths, layout.manifest(model), engine, ledger or Ledger())
        for chunk in layout.chunks:
            values, dtype = _chunk_values(layout, chunk, read)
            creator.write_chunk(chunk.index, values, dtype)
            check()
            if progress is not None:
                progress(chunk.index + 1, len(layout.chunks))
        return creator.finish(blob)
    except BaseException:
        if creator is not None:
            creator.abandon()
            remove_store(paths, creator.uuid)
        raise


def layout_of(
    partition: PartitionedModel, chunk_parameters: int | None = None, durability: Durability = "step"
) -> ModelLayout:
    """Layout of the store of a model: of each stop a record for each dtype, and for what is trained and what is not.

    Args:
        partition: the model without its parameters.
        chunk_parameters: parameters of a chunk; None = by the model's size.
        durability: of the store.
    """

    def state_format(name: str) -> StateFormat:
        return format_of(partition.dtypes[name], is_trained=name not in partition.frozen)

    parts, blocks = model_parts(partition), len(partition.blocks)
    return ModelLayout.build(parts, blocks, state_format, chunk_parameters, durability)


def refuse_other_formats(partition: PartitionedModel, layout: ModelLayout, where: Path) -> None:
    """Refuse a store whose tensors have not the formats that an import would give them now.

    Args:
        partition: the model without its parameters.
        layout: of the store.
        where: what the message names.

    Raises:
        ConfigError: the message names the first tensor that differs, and both formats.
    """
    now, there = (
        {place.name: each.records[place.record].format for place in each.tensors()}
        for each in (layout_of(partition), layout)
    )
    for name, state_format in there.items():
        if name in now and now[name] != state_format:
            raise ConfigError(
                f"{where}: its store keeps {name} as {state_format}, and the model has it as {now[name]} now (bf16 and "
                "f32 are trained, raw16 and raw32 are not): take the model as it was then (requires_grad of a module "
                "of your own, the version of transformers), or import it again"
            )


def import_model(  # noqa: PLR0913 - as create_store
    model_dir: Path | str,
    run: RunFolder | Path | str,
    *,
    precision: Precision | Literal["auto"] = "auto",
    stores: Path | str | Sequence[Path | str] | None = None,
    chunk_parameters: int | None = None,
    durability: Durability = "step",
    model_options: ModelOptions | None = None,
    engine: Engine = "auto",
    ledger: Ledger | None = None,
    progress: Progress | None = None,
) -> RunInfo:
    """Make the store of a run from a model folder of the Hugging Face hub, or from a GGUF file.

    All files are checked before anything is written. The store, the configuration and the tokeniser are in
    place before ``run.json`` says so; when it fails, nothing is left behind.

    Args:
        model_dir: folder with config.json and weights in safetensors (bf16, fp16 or fp32), or a GGUF file.
        run: where the run lives; its folder is made if need be.
        precision: compute dtype; auto: what computes fastest here. bf16 keeps fp32 masters, whatever the source.
        stores: path of the store's file, or a list of them, one for each drive; None = store.mtio in the run folder.
        chunk_parameters: parameters of a chunk; None = by the model's size.
        durability: step = two copies on the drive, each step survives a crash; scratch = one, and only a store that
            was closed can be opened again.
        model_options: what must be said of some models beside their folder; None = nothing.
        engine: I/O engine that writes.
        ledger: accounts of memory.
        progress: called after each chunk.

    Raises:
        ConfigError: the run folder holds an import already, or something else is in the way.
        ModelFilesError: the files are incomplete, damaged, or do not fit their configuration.
        UnsupportedModelError: the weights are quantised, or the model cannot be trained block by block.
        NoSpaceError, StorageError: the drive of the store or of the run folder.
    """
    for name, value, allowed in (
        ("durability", durability, get_args(Durability)),
        ("engine", engine, get_args(Engine)),
    ):
        if value not in allowed:
            raise ConfigError(f"{name} is {value!r}: it must be one of {', '.join(allowed)}")
    if chunk_parameters is not None and (chunk_parameters < _CHUNK_STEP or chunk_parameters % _CHUNK_STEP):
        raise ConfigError(f"chunk_parameters is {chunk_parameters}: it must be a multiple of {_CHUNK_STEP}")
    files = [stores] if isinstance(stores, Path | str) else stores
    with ModelImport(
        Path(model_dir),
        RunFolder.of(run),
        precision=fastest_here() if precision == "auto" else precision,
        stores=None if files is None else [Path(file) for file in files],
        chunk_parameters=chunk_parameters,
        durability=durability,
        model_options=model_options,
    ) as checked:
        return checked.write(engine=engine, ledger=ledger, progress=progress)


class ModelImport:
    """An import whose files were checked, and of which nothing is written yet; the arguments are ``import_model``'s.

    Used as a context, which holds the run folder: other imports into it are refused. Without ``write``, or if that
    fails, nothing is left behind.

    Attributes:
        partition: the model without its parameters.
        layout: of the store that ``write`` makes.
        notes: what speaks against the drives of the store, and which parameters are not trained, a sentence each.

    Raises:
        ConfigError, ModelFilesError, UnsupportedModelError: as ``import_model``.
    """

    def __init__(
        self,
        model_dir: Path,
        run: RunFolder,
        *,
        precision: Precision,
        stores: Sequence[Path] | None = None,
        chunk_parameters: int | None = None,
        durability: Durability = "step",
        model_options: ModelOptions | None = None,
    ) -> None:
        check_precision("precision", precision)
        self._options = model_options or ModelOptions()
        self._run, self._precision = run, precision
        self._stores = [run.own_store] if stores is None else list(stores)
        for path in (model_dir, run.path, *self._stores):
            _refuse_no_text(path)
        run.mend(self._stores)
        _refuse_what_is_in_the_way(run, self._stores)
        self.notes = store_drive_notes([*self._stores, run.path])
        self._folder = model_folder(model_dir, dequantizes=bool(self._options.dequantize))
        self.notes += self._folder.notes
        self._options.run_modules(model_dir, run.path)
        self._undo, self._holding = ExitStack(), ExitStack()
        with ExitStack() as failing:
            opened = checked_weights(self._folder, precision)
            self._weights, self._read = failing.enter_context(opened)
            names, buffers = self._weights.names, buffers_of(self._weights)
            if self._weights.shapes is None:
                names.exported()  # what could not be exported is not trained
            elif proof := proof_of_text_model(self._folder.published_config()):
                self.notes.append(proof)
            self.notes += self._weights.notes()
            config = self._folder.config()
            self._companions = self._folder.companions()
            self._folder.refuse_tokenizer_of_code()
            self.partition = self._options.partition(config, DTYPES[precision])
            self.partition.set_buffers(buffers)
            self.layout = layout_of(self.partition, chunk_parameters, durability)
            self.notes += self.partition.notes
            self._closing = failing.pop_all()

    def __enter__(self) -> Self:
        try:
            with held(), storage_errors(self._run.path, NOTHING_LEFT):
                _make_folder(self._run.path, self._undo)
                # Let go before the folder is removed again, and not with what a finished import keeps.
                self._undo.callback(self._holding.close)
                self._holding.enter_context(self._run.importing())
        except BaseException:
            self._close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with held():
            self._close()

    @property
    def carried_nbytes(self) -> int:
        """Bytes of the tensors that are only carried to an export."""
        entries = self._weights.stored.entries
        return sum(entries[name].nbytes for name in self._weights.plan.carried)

    def write(
        self, *, engine: Engine = "auto", ledger: Ledger | None = None, progress: Progress | None = None
    ) -> RunInfo:
        """Make the store, and then say so in ``run.json``.

        Args:
            engine: I/O engine that writes.
            ledger: accounts of memory.
            progress: called after each chunk.

        Raises:
            NoSpaceError, StorageError: the drive of the store or of the run folder.
        """
        run, undo = self._run, self._undo
        for note in self.notes:
            _LOG.warning("note: %s", visible(note))
        with held(), storage_errors(run.path, NOTHING_LEFT):
            for store in self._stores:
                _make_folder(store.parent, undo)
            partial = run.model.with_name(run.model.name + ".partial")
            if partial.is_symlink():
                partial.unlink()  # none of ours: nothing is written where it leads to
            shutil.rmtree(partial, ignore_errors=True)  # of an import that was killed
            undo.callback(shutil.rmtree, partial, ignore_errors=True)
            make_folder(partial)
            self._folder.copy(["config.json", *self._companions], partial)
            write_kept(self._weights, partial)
            sync_folder(partial)
            sync_folder(run.path)
            # The store has its name last: with it the import is finished, and all that belongs to it is on the drive.
            files = digests_of(partial)
            uuid = create_store(
                self._stores,
                self.layout,
                self._read,
                model={
                    "config": self._folder.raw_config,
                    "architecture": self._weights.names.architecture,
                    "tied": self.partition.tied,
                    **self._provenance(files).as_entry(),
                },
                blob=TrainerState().encode(),
                engine=engine,
                ledger=ledger,
                progress=progress,
            )
            for store in self._stores:
                undo.callback(store.unlink, missing_ok=True)
            info = run.write(
                self._precision,
                self._stores,
                uuid,
                self._folder.path,
                files=files,
                model_options=self._options.as_dict(),
            )
            undo.callback(run.info_file.unlink, missing_ok=True)
            partial.rename(run.model)
            undo.callback(shutil.rmtree, run.model, ignore_errors=True)
            sync_folder(run.path)
            undo.pop_all()
        return info

    def _provenance(self, files: dict[str, str]) -> Provenance:
        """What the store says of this import.

        Args:
            files: SHA-256 of each file of RUN/model.
        """
        return Provenance(
            version=version("megatrain-io"),
            precision=self._precision,
            source=str(self._folder.path.resolve()),
            run=str(self._run.path.resolve()),
            files=files,
            model_options=self._options.as_dict(),
        )

    def _close(self) -> None:
        self._undo.close()
        self._holding.close()
        self._closing.close()


# ------------------------------------------------------------------------------------------- reading


@contextmanager
def checked_weights(
    folder: ModelFolder, precision: Precision
) -> Iterator[tuple[SourceWeights, TensorReader]]:
    """Open the weight files of a model folder, check that they are the model's, and read its tensors from them.

    Raises:
        ModelFilesError: the files are incomplete, damaged, or do not fit their configuration.
        UnsupportedModelError: the weights are quantised, or have a dtype that is not trained.
    """
    with opened_weights(folder, DTYPES[precision]) as weights:
        files, plan = weights.files, weights.plan
        _check_values(files, plan)
        yield weights, lambda place, start, stop: _read(files, plan.parameters[place.name], start, stop)


def _chunk_values(layout: ModelLayout, chunk: Chunk, read: TensorReader) -> tuple[bytes, str]:
    """All parameters of a chunk, padding included: as bf16 where every source is, else as fp32; frozen as they stay."""
    end = chunk.start + chunk.parameters
    parts = []
    for place in layout.records[chunk.record].tensors:
        start, stop = max(chunk.start, place.offset), min(end, place.offset + place.elements)
        if start < stop:
            values = read(place, start - place.offset, stop - place.offset)
            _refuse_not_finite(place, values, read)
            parts.append((start - chunk.start, stop - chunk.start, values))
    is_bf16 = all(values.dtype == torch.bfloat16 for _, _, values in parts)
    record = layout.records[chunk.record]
    dtype = torch.bfloat16 if is_bf16 else torch.float32
    if not record.is_trained:
        dtype = dtype_of(record.format)
    out = torch.zeros(chunk.parameters, dtype=dtype)
    for start, stop, values in parts:
        out[start:stop] = values
    name = "bfloat16" if is_bf16 else "float32"
    return out.view(torch.uint8).numpy().tobytes(), name if record.is_trained else "raw"


def _refuse_not_finite(place: TensorPlace, values: Tensor, read: TensorReader) -> None:
    """Refuse a tensor that has a value which is infinite or not a number, and count these in all of it.

    Raises:
        ModelFilesError: it names the tensor, and how many there are.
    """
    # One pass: a sum is finite only if all values are; one that grew too large is looked at again.
    if not values.is_floating_point() or bool(values.sum(dtype=torch.float32).isfinite()):
        return
    if bool(values.isfinite().all()):
        return
    nan = infinite = 0
    first: int | None = None
    for start in range(0, place.elements, _COMPARED_AT_ONCE):
        part = read(place, start, min(start + _COMPARED_AT_ONCE, place.elements))
        nan += int(part.isnan().sum())
        infinite += int(part.isinf().sum())
        if first is None and not bool(part.isfinite().all()):
            first = start + int(part.isfinite().logical_not().nonzero()[0])
    at = [int(index) for index in torch.unravel_index(torch.tensor(first), place.shape)]
    raise ModelFilesError(
        f"{place.name} {list(place.shape)} has values that are not finite ({nan:,} not a number, {infinite:,} "
        f"infinite), the first at {at}: the files are damaged, or were saved after training had diverged. Fetch the "
        "weights again, or take an earlier checkpoint"
    )


def _read(files: WeightReader, pieces: Sequence[Piece], start: int, stop: int) -> Tensor:
    """Elements ``start``..``stop`` of a tensor of the model, flat, from all pieces that hold some of them."""
    parts = []
    for piece in pieces:
        dtype = TORCH_DTYPES[files.entries[piece.name].dtype]
        for place, source, count in piece.runs(start, stop):
            data = files.read(piece.name, source, source + count)
            parts.append((place - start, torch.frombuffer(data, dtype=dtype)))
    if len(parts) == 1:
        return parts[0][1]
    dtypes = {values.dtype for _, values in parts}
    out = torch.empty(stop - start, dtype=dtypes.pop() if len(dtypes) == 1 else torch.float32)
    for place, values in parts:
        out[place : place + len(values)] = values
    return out


def _check_values(files: WeightReader, plan: NamePlan) -> None:
    """Refuse what can be wrong although names and shapes are right: dtypes, and values of tied weights."""
    strange = [
        f"{piece.name} is {files.entries[piece.name].dtype}"
        for pieces in plan.parameters.values()
        for piece in pieces
        if files.entries[piece.name].dtype not in _TRAINABLE
    ]
    if strange:
        raise UnsupportedModelError(
            f"{len(strange)} tensors have a dtype that is not trained ({', '.join(strange[:3])}): import the "
            "original model in bf16, fp16 or fp32"
        )
    for owner, pieces in plan.aliases:
        if not _are_equal(files, plan.parameters[owner], pieces):
            raise ModelFilesError(
                f"{owner} and {pieces[0].name} are one tensor by config.json, but the files hold two different "
                "ones: set tie_word_embeddings to false in config.json if the model was trained so"
            )


def _are_equal(files: WeightReader, one: Sequence[Piece], other: Sequence[Piece]) -> bool:
    elements = torch.Size(one[0].shape).numel()
    for start in range(0, elements, _COMPARED_AT_ONCE):
        stop = min(start + _COMPARED_AT_ONCE, elements)
        if not _equal(_read(files, one, start, stop).float(), _read(files, other, start, stop).float()):
            return False
    return True


def _equal(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors have the same values; what is not a number is found elsewhere, and no difference here."""
    return torch.equal(one, other) or bool(((one == other) | (one.isnan() & other.isnan())).all())


# ------------------------------------------------------------------------------------------- folders


def _refuse_what_is_in_the_way(run: RunFolder, stores: Sequence[Path]) -> None:
    if run.is_imported:
        raise ConfigError(
            f"{run.path} already holds a model, imported from {run.read().source}. Train or export that one, or "
            "choose another folder"
        )
    there = [path for path in stores if os.path.lexists(path)]
    if there:
        raise ConfigError(
            f"{there[0]} is in the way: {described(stores)}, and {run.path} has no run.json that names it. Nothing was "
            "changed. Give output_dir another name, which the files of a store have, too, or choose another "
            "memory.store_dir"
        )
    if os.path.lexists(run.model):
        raise ConfigError(
            f"{run.model} is in the way: the model's files go there, and {run.path} has no run.json, so it is not of "
            "an import. Nothing was changed. Choose another output_dir"
        )


def _refuse_no_text(path: Path) -> None:
    """Refuse a path that cannot be written down as text."""
    try:
        str(path.absolute()).encode()
    except UnicodeEncodeError as error:
        raise ConfigError(
            f"{path.absolute()} has a name with bytes that are no UTF-8, which neither the files of a run nor the "
            "libraries that read models can take: rename it"
        ) from error


def _make_folder(path: Path, undo: ExitStack) -> None:
    """Make a folder that only its owner may enter, and those above it; ``undo`` removes those that are new."""
    for folder in make_folder(path):
        undo.callback(_remove_if_empty, folder)


def _remove_if_empty(folder: Path) -> None:
    with suppress(OSError):
        folder.rmdir()
