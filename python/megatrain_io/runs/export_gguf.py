"""Writing the committed weights of a run as a GGUF file, for llama.cpp, Ollama and what is made of them.

Each chunk is read once, and its parameters are written to wherever the file holds them, as for a model folder.
"""

import fcntl
import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Literal, get_args

import torch

from megatrain_io.errors import ConfigError, NoSpaceError
from megatrain_io.files import (
    SETTINGS_BYTES_MAX,
    make_folder,
    new_file,
    open_folder,
    read_file,
    storage_errors,
    sync_folder,
)
from megatrain_io.interrupt import check, held
from megatrain_io.models.generation_config import end_tokens, with_end_tokens
from megatrain_io.models.gguf_families import GgufModel, model_for, sources_of
from megatrain_io.models.gguf_file import GgufPlan, GgufWriter, Value, plan_gguf
from megatrain_io.models.gguf_tokenizer import tokenizer_keys
from megatrain_io.models.gguf_weights import GgufTensorWriter, type_in_gguf
from megatrain_io.models.hub_folder import ModelFolder
from megatrain_io.models.hub_names import HubNames, NamePlan
from megatrain_io.models.model_options import ModelOptions
from megatrain_io.runs.folder import RunFolder
from megatrain_io.runs.import_model import NOTHING_LEFT, Progress
from megatrain_io.runs.model_files import mended_model
from megatrain_io.runs.modelfile import modelfile_of
from megatrain_io.runs.open_store import open_store
from megatrain_io.runs.state import TrainerState
from megatrain_io.store.dtypes import DTYPES, dtype_of
from megatrain_io.store.layout import Precision
from megatrain_io.store.paged_store import Engine, PagedStore
from megatrain_io.text import visible

__all__ = ["GgufType", "export_gguf"]

GgufType = Literal["bf16", "f16", "f32", "q8_0"]
"""Of the matrices of a GGUF file."""

_LOG = logging.getLogger("megatrain_io")
_MODELFILE = "Modelfile"
_GENERATION = "generation_config.json"
_SPARE_BYTES = 1 << 20
_FILE_TYPES = {"f32": 0, "f16": 1, "q8_0": 7, "bf16": 32}


def export_gguf(
    run: RunFolder | Path | str,
    out: Path | str,
    *,
    dtype: GgufType | None = None,
    engine: Engine = "auto",
    progress: Progress | None = None,
    modules: Path | None = None,
) -> None:
    """Write the committed weights of a run as a GGUF file with its tokenizer, and a Modelfile for Ollama beside it.

    The file gets its name when it is complete; when it fails, nothing is left behind.

    Args:
        run: folder of a run with a finished import; its store must not be in use.
        out: path of the file, which does not exist.
        dtype: of matrices: "bf16" are the weights that were trained with; "f32", "f16" and "q8_0" are made of the fp32
            masters. Vectors are fp32. None = bf16 for a run in bf16, else f32.
        engine: I/O engine that reads.
        progress: called after each chunk.
        modules: where the file of ``model_options.modules`` is now; None = where it was at the import.

    Raises:
        ConfigError: there is no finished import, something is in the way at ``out``, or the library gguf is missing.
        UnsupportedModelError: llama.cpp would compute something else, or the family is not written.
        NoSpaceError: the file does not fit.
        CorruptionError, StoreInUseError, FormatError, StorageError: the store cannot be read.
    """
    run, out = RunFolder.of(run), Path(out).absolute()
    info = run.read()
    options = ModelOptions.kept(info.model_options).run_modules(run.path, Path(info.source), at=modules)
    _check(out, dtype)
    with held(), storage_errors(out, NOTHING_LEFT), ExitStack() as open_:
        state = open_.enter_context(open_store(run, engine=engine))
        for note in mended_model(run, whole=False):
            _LOG.warning("note: %s", visible(note))
        folder = ModelFolder(run.model, dequantizes=bool(options.dequantize))
        wanted: GgufType = dtype or ("bf16" if info.precision == "bf16" else "f32")
        export = _Export(folder, wanted, TrainerState.stop_tokens_of(state.blob))
        for note in export.notes:
            _LOG.warning("note: %s", visible(note))
        _write(export, state, out, progress)


class _Export:
    """What goes into a file, before anything is written.

    Attributes:
        notes: sentences for the person.
        plan: of the file.
        names: where each parameter of the store belongs, by the names of a model folder.
        modelfile: text of the Modelfile, without its first line.
    """

    def __init__(self, folder: ModelFolder, dtype: GgufType, stop_tokens: Sequence[int]) -> None:
        config, tokenizer = folder.config(), folder.tokenizer()
        self.dtype, self._config = dtype, config
        model = model_for(config)
        ends = _ends_of(folder, stop_tokens)
        keys, notes = tokenizer_keys(tokenizer, config.vocab_size, ends)
        self.notes = [*model.notes, *notes]
        names = HubNames(config, DTYPES[self.precision])
        self.shapes = names.file_shapes()
        self.names: NamePlan = names.plan(self.shapes)
        self.sources = sources_of(model.architecture, config, self.shapes)
        self._side = model.tensors
        metadata = _general(folder, model, dtype) | model.metadata | keys
        self.plan = self._laid_out(model, metadata)
        self.modelfile = modelfile_of(tokenizer, ends)

    @property
    def precision(self) -> Precision:
        """What is read of the store: the weights, or the fp32 masters."""
        return "bf16" if self.dtype == "bf16" else "fp32"

    def _laid_out(self, model: GgufModel, metadata: Mapping[str, Value]) -> GgufPlan:
        wanted = self.dtype.upper()
        tensors: list[tuple[str, str, tuple[int, ...]]] = [
            (name, "F32", (len(values),)) for name, values in model.tensors.items()
        ]
        for name, shape in self.shapes.items():
            source = self.sources[name]
            tensors.append((source.name, type_in_gguf(source, shape, wanted), shape))
        return plan_gguf(metadata, tensors)

    def write(self, writer: GgufWriter, state: PagedStore, progress: Progress | None) -> None:
        """Fill the file."""
        for name, factors in self._side.items():
            side = torch.tensor(factors, dtype=torch.float32)
            writer.write(name, 0, side.view(torch.uint8).numpy().data)
        out = GgufTensorWriter(writer, self.plan, self.sources, self.shapes)
        for chunk in state.layout.chunks:
            record = state.layout.records[chunk.record]
            is_master = self.precision == "fp32" and record.is_trained
            data = bytearray(state.read_plane(chunk.index, "master" if is_master else "weight"))
            values = torch.frombuffer(data, dtype=torch.float32 if is_master else dtype_of(record.format))
            if self.precision == "bf16":
                values = values.bfloat16()
            end = chunk.start + chunk.parameters
            for place in record.tensors:
                start, stop = max(chunk.start, place.offset), min(end, place.offset + place.elements)
                for piece in self.names.parameters[place.name] if start < stop else ():
                    for at, source, count in piece.runs(start - place.offset, stop - place.offset):
                        first = place.offset + at - chunk.start
                        out.write(piece.name, source, values[first : first + count])
            if progress is not None:
                progress(chunk.index + 1, len(state.layout.chunks))
            check()


def _write(export: _Export, state: PagedStore, out: Path, progress: Progress | None) -> None:
    partial = out.with_name(out.name + ".partial")
    modelfile = out.parent / _MODELFILE
    with ExitStack() as made:
        for folder in make_folder(out.parent):
            made.callback(_remove_if_empty, folder)
        with _held(out.parent), ExitStack() as undo:
            _refuse_what_is_in_the_way(out)
            partial.unlink(missing_ok=True)  # of an export that was killed
            _require_space(out, export.plan.file_bytes)
            undo.callback(partial.unlink, missing_ok=True)
            with GgufWriter(partial, export.plan) as writer:
                export.write(writer, state, progress)
            undo.callback(modelfile.unlink, missing_ok=True)
            with new_file(modelfile) as file:
                file.write(f"FROM ./{out.name}\n{export.modelfile}".encode())
                file.flush()
                os.fsync(file.fileno())
            partial.rename(out)
            undo.pop_all()
            made.pop_all()
            sync_folder(out.parent)


def _remove_if_empty(folder: Path) -> None:
    with suppress(OSError):
        folder.rmdir()


@contextmanager
def _held(folder: Path) -> Iterator[None]:
    """Hold a folder, so that another export into it is refused.

    Raises:
        ConfigError: another export holds it.
    """
    descriptor = open_folder(folder)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(
                f"another export writes to {folder}: wait until it has ended, or choose another folder"
            ) from None
        yield
    finally:
        os.close(descriptor)


def _check(out: Path, dtype: GgufType | None) -> None:
    if dtype is not None and dtype not in get_args(GgufType):
        raise ConfigError(f"dtype is {dtype!r}: for GGUF it must be one of {', '.join(get_args(GgufType))}")
    if out.suffix.lower() != ".gguf":
        raise ConfigError(f"{out} does not end with .gguf: give the path of the file to write")
    _refuse_what_is_in_the_way(out)


def _refuse_what_is_in_the_way(out: Path) -> None:
    for path in (out, out.parent / _MODELFILE):
        if os.path.lexists(path):
            raise ConfigError(
                f"{path} exists, and nothing is overwritten: choose another folder for the file and its Modelfile"
            )


def _require_space(out: Path, needed: int) -> None:
    system = os.statvfs(out.parent)
    free = system.f_bavail * system.f_frsize
    needed += _SPARE_BYTES
    if free < needed:
        raise NoSpaceError(
            f"the export needs {needed:,} bytes, {free:,} are free in {out.parent}. Free {needed - free:,} bytes, or "
            "choose another disk; nothing was written"
        )


def _general(folder: ModelFolder, model: GgufModel, dtype: GgufType) -> dict[str, Value]:
    general: dict[str, Value] = {
        "general.architecture": model.architecture,
        "general.type": "model",
        "general.name": folder.path.absolute().parent.name,
        "general.file_type": _FILE_TYPES[dtype],
    }
    return general | ({"general.quantization_version": 2} if dtype == "q8_0" else {})


def _ends_of(folder: ModelFolder, stop_tokens: Sequence[int]) -> list[int]:
    """Tokens that end what is generated: those of the folder, and what training found answers to end with."""
    path = folder.path / _GENERATION
    before = read_file(path, SETTINGS_BYTES_MAX).decode() if path.exists() else None
    content = json.loads(with_end_tokens(before, folder.raw_config, stop_tokens) or before or "{}")
    return end_tokens(content.get("eos_token_id", folder.config().eos_token_id))
