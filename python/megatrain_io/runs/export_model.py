"""Writing the committed weights of a run as a model folder.

Each chunk is read once, and its parameters are written to wherever the files hold them: a few chunks are in memory,
whatever the size of the model.
"""

import fcntl
import json
import logging
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatrain_io.errors import (
    ConfigError,
    ModelFilesError,
    NoSpaceError,
    UnsupportedModelError,
)
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
from megatrain_io.models.generation_config import end_tokens, takes_several_ends, with_end_tokens
from megatrain_io.models.hub_folder import ModelFolder
from megatrain_io.models.hub_names import HubNames, NamePlan
from megatrain_io.models.model_options import ModelOptions
from megatrain_io.models.own_code import allow
from megatrain_io.models.safetensors import (
    FILE_DTYPES,
    TORCH_DTYPES,
    ShardPlan,
    ShardWriter,
    index_of,
    plan_shards,
)
from megatrain_io.runs.folder import RunFolder
from megatrain_io.runs.import_model import NOTHING_LEFT, Progress
from megatrain_io.runs.kept_tensors import Kept, kept_by, names_of
from megatrain_io.runs.model_files import mended_model
from megatrain_io.runs.open_store import open_store
from megatrain_io.runs.state import TrainerState
from megatrain_io.store.dtypes import DTYPES, check_precision, dtype_of
from megatrain_io.store.layout import ModelLayout, Precision
from megatrain_io.store.paged_store import Engine, PagedStore
from megatrain_io.text import visible

__all__ = ["export_model", "write_model_folder"]

_LOG = logging.getLogger("megatrain_io")
_SPARE_BYTES = 1 << 20
_GENERATION = "generation_config.json"
_SHARD = re.compile(r"model(-\d+-of-\d+)?\.safetensors")


def export_model(
    run: RunFolder | Path | str,
    out: Path | str,
    *,
    dtype: Precision | None = None,
    shard_bytes: int = 5 * 10**9,
    engine: Engine = "auto",
    progress: Progress | None = None,
    modules: Path | None = None,
) -> None:
    """Write the committed weights of a run as a model folder that stock transformers loads.

    The folder gets its name when it is complete; when it fails, nothing is left behind. Names and bytes of the
    tensors are those that ``save_pretrained`` writes; fused experts may lie in other shards than there.

    Args:
        run: folder of a run with a finished import; its store must not be in use.
        out: a folder that does not exist or is empty.
        dtype: "bf16" are the weights that were trained with, or fp32 ones rounded to nearest even, but for those that
            the architecture keeps in fp32; "fp32" are the masters. None = the run's own precision.
        shard_bytes: of tensors in one file; a larger tensor gets a file of its own.
        engine: I/O engine that reads.
        progress: called after each chunk.
        modules: where the file of ``model_options.modules`` is now, which may run then; None = where it was at the
            import.

    Raises:
        ConfigError: there is no finished import, something is in the way at ``out``, or the model needs code that may
            not run.
        NoSpaceError: the files do not fit.
        UnsupportedModelError: the run keeps a buffer that the model of this version of transformers has not.
        CorruptionError, StoreInUseError, FormatError, StorageError: the store cannot be read.
    """
    run, out = RunFolder.of(run), Path(out)
    info = run.read()
    if modules is not None:
        allow(modules)
    options = ModelOptions.kept(info.model_options).run_modules(run.path, Path(info.source), at=modules)
    _check(out, dtype, shard_bytes)  # before a store is opened that may be in use
    with ExitStack() as open_:
        open_.enter_context(storage_errors(out.absolute(), NOTHING_LEFT))
        state = open_.enter_context(open_store(run, engine=engine))
        for note in mended_model(run, whole=True):
            _LOG.warning("note: %s", visible(note))
        write_model_folder(
            state,
            ModelFolder(run.model, dequantizes=bool(options.dequantize)),
            out,
            dtype=dtype,
            shard_bytes=shard_bytes,
            stop_tokens=TrainerState.stop_tokens_of(state.blob),
            kept=open_.enter_context(kept_by(run)),
            progress=progress,
        )


def write_model_folder(  # noqa: PLR0913 - as export_model
    state: PagedStore,
    folder: ModelFolder,
    out: Path,
    *,
    dtype: Precision | None = None,
    shard_bytes: int = 5 * 10**9,
    stop_tokens: Sequence[int] = (),
    kept: Kept | None = None,
    progress: Progress | None = None,
) -> None:
    """Write the committed weights of an open store as a model folder; see ``export_model``.

    Args:
        state: the store, with no step under way.
        folder: model folder that the store was made from: its configuration and tokenizer.
        out: a folder that does not exist or is empty.
        dtype: "bf16" or "fp32" (the masters); None = what computes.
        shard_bytes: of tensors in one file.
        stop_tokens: what ends generation, besides what the folder says.
        kept: what belongs into the folder beside the trained parameters.
        progress: called after each chunk.
    """
    out, partial = _check(out, dtype, shard_bytes)
    with held(), storage_errors(out, NOTHING_LEFT), ExitStack() as open_:
        is_bf16 = any(dtype_of(record.format) == torch.bfloat16 for record in state.layout.records)
        wanted: Precision = dtype or ("bf16" if is_bf16 else "fp32")
        kept = kept or Kept()
        names = names_of(folder, DTYPES[wanted])
        plan, shards = _plan_export(state.layout, names, shard_bytes, kept)
        if gone := sorted(kept.buffers.keys() - {*plan.buffers.values()}):
            raise UnsupportedModelError(
                f"the run keeps a buffer {gone[0]} of the model, and with this version of transformers the model has "
                "none such: go on with the version that it was imported with"
            )
        companions = folder.companions()
        _require_space(out, partial, shards, [folder.path / name for name in companions])
        open_.enter_context(_held_folder(partial, companions))
        undo = open_.enter_context(ExitStack())
        undo.callback(shutil.rmtree, partial, ignore_errors=True)
        with ShardWriter(partial, shards) as written:
            _write_buffers(written, names, plan, kept.buffers)
            kept.write_carried(written)
            _write_parameters(written, state, plan, wanted, progress)
        if len(shards) > 1:
            parameters = state.layout.parameters + sum(prod(shape) for _, _, shape in kept.entries)
            _write_text(partial / "model.safetensors.index.json", index_of(shards, parameters))
        generation = _generation_config(folder, stop_tokens)
        ends = [] if generation is None else end_tokens(json.loads(generation).get("eos_token_id"))
        config = _config_for_export(
            folder.raw_config,
            names.architecture,
            DTYPES[wanted],
            ends,
            is_text_alone=kept.shapes is None,
            names_code=folder.stands_for is not None,
        )
        _write_text(partial / "config.json", config)
        folder.copy([name for name in companions if name != _GENERATION], partial)
        if generation is not None:
            _write_text(partial / _GENERATION, generation)
        sync_folder(partial)
        partial.rename(out)
        undo.pop_all()
        sync_folder(out.parent)


@contextmanager
def _held_folder(partial: Path, companions: Sequence[str]) -> Iterator[None]:
    """Make the folder of an export that is not complete, and hold it; one that nobody holds is emptied and taken over.

    Raises:
        ConfigError: another export holds it, or it has files that no export wrote.
    """
    make_folder(partial)
    descriptor = open_folder(partial, follows=False)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            is_ours = os.path.samestat(os.fstat(descriptor), partial.stat())
        except (BlockingIOError, FileNotFoundError):
            is_ours = False  # another export holds it, or has just given it its name
        if not is_ours:
            raise ConfigError(
                f"{partial} is of an export that runs: wait until it has ended, or choose another folder"
            )
        for path in _of_a_killed_export(partial, companions):
            path.unlink()
        yield
    finally:
        os.close(descriptor)


def _of_a_killed_export(partial: Path, companions: Sequence[str]) -> list[Path]:
    """The files that a killed export left.

    Raises:
        ConfigError: there are others: nothing is removed.
    """
    found = sorted(partial.iterdir())
    ours = {"config.json", "model.safetensors.index.json", *companions}
    others = [path.name for path in found if path.name not in ours and not _SHARD.fullmatch(path.name)]
    if others:
        raise ConfigError(
            f"{partial} is where an export is written until it is complete, and it has {len(others)} files that are "
            f"not of one ({', '.join(others[:3])}): move it away, or choose another folder"
        )
    return found


def _check(out: Path, dtype: Precision | None, shard_bytes: int) -> tuple[Path, Path]:
    """The folder to write, and what it is called until it is complete.

    Raises:
        ConfigError: an argument is wrong, or something is in the way.
    """
    if dtype is not None:
        check_precision("dtype", dtype)
    out = out.absolute()
    partial = out.with_name(out.name + ".partial")
    _refuse_occupied(out, partial)
    if shard_bytes < 1:
        raise ConfigError(f"shard_bytes is {shard_bytes}: give the bytes of one file, such as 5000000000")
    return out, partial


def _plan_export(
    layout: ModelLayout, names: HubNames, shard_bytes: int, kept: Kept
) -> tuple[NamePlan, list[ShardPlan]]:
    """Which tensor of the files each parameter goes to, and what each file holds."""
    if kept.shapes is None:
        shapes, plan = names.exported()
    else:
        shapes = {name: tuple(shape) for name, shape in kept.shapes.items()}
        plan = names.plan(shapes)
    if names.parameters != {place.name: place.shape for place in layout.tensors()}:
        raise ModelFilesError(
            f"the store was not made with this config.json: {layout.parameters:,} parameters in the store, others in "
            f"the {names.architecture} of config.json. Put the config.json of the import back"
        )
    owners = {
        piece.name: owner for owner, pieces in [*plan.parameters.items(), *plan.aliases] for piece in pieces
    }
    owners |= plan.buffers
    tensors = [(name, FILE_DTYPES[names.dtype_of(owners[name])], shape) for name, shape in shapes.items()]
    return plan, plan_shards([*tensors, *kept.entries], shard_bytes)


def _write_parameters(
    files: ShardWriter, state: PagedStore, plan: NamePlan, dtype: Precision, progress: Progress | None
) -> None:
    for chunk in state.layout.chunks:
        record = state.layout.records[chunk.record]
        is_master = dtype == "fp32" and record.is_trained
        data = bytearray(state.read_plane(chunk.index, "master" if is_master else "weight"))
        values = torch.frombuffer(data, dtype=torch.float32 if is_master else dtype_of(record.format))
        end = chunk.start + chunk.parameters
        for place in record.tensors:
            start, stop = max(chunk.start, place.offset), min(end, place.offset + place.elements)
            for piece in plan.parameters[place.name] if start < stop else ():
                for at, source, count in piece.runs(start - place.offset, stop - place.offset):
                    first = place.offset + at - chunk.start
                    _write(files, piece.name, source, values[first : first + count])
        if progress is not None:
            progress(chunk.index + 1, len(state.layout.chunks))
        check()


def _write_buffers(files: ShardWriter, names: HubNames, plan: NamePlan, values: Mapping[str, Tensor]) -> None:
    for name, target in plan.buffers.items():
        _write(files, name, 0, values.get(target, names.buffer(target)).detach().reshape(-1))


def _write(files: ShardWriter, name: str, element: int, values: Tensor) -> None:
    """Write ``values``, flat, from ``element`` on of a tensor; they get the dtype that it has in the file."""
    values = values.to(TORCH_DTYPES[files.dtype_of(name)])
    files.write(name, element * values.itemsize, values.view(torch.uint8).numpy().data)


def _generation_config(folder: ModelFolder, stop_tokens: Sequence[int]) -> str | None:
    """Content of generation_config.json, in which what training found answers to end with ends generation."""
    path = folder.path / _GENERATION
    before = read_file(path, SETTINGS_BYTES_MAX).decode() if path.exists() else None
    return with_end_tokens(before, folder.raw_config, stop_tokens) or before


def _config_for_export(
    config: Mapping[str, Any],
    architecture: str,
    dtype: torch.dtype,
    ends: Sequence[int],
    *,
    is_text_alone: bool,
    names_code: bool = False,
) -> str:
    """The configuration as it was imported, with the dtype of the files and all tokens that end generation.

    Code that was not copied is not named; ``names_code`` says that it was. Where more than text is in the model, the
    other parts stay as they were.
    """
    name = str(dtype).removeprefix("torch.")
    content = dict(config)
    for key, value in config.items():
        if isinstance(value, dict):
            content[key] = part = dict(value)
            if (is_text_alone or key == "text_config") and part.keys() & {"dtype", "torch_dtype"}:
                part["dtype"] = name
                part.pop("torch_dtype", None)
    content.pop("torch_dtype", None)
    for part in (content, *(value for value in content.values() if isinstance(value, dict))):
        if not names_code:
            part.pop("auto_map", None)
        part.pop("quantization_config", None)  # what is exported is not quantised
    before = end_tokens(content.get("eos_token_id"))
    if "eos_token_id" in content and (more := [token for token in ends if token not in before]):
        all_ends = [*before, *more]
        if len(all_ends) == 1 or takes_several_ends(content.get("model_type")):
            content["eos_token_id"] = all_ends if len(all_ends) > 1 else all_ends[0]
    return json.dumps({**content, "architectures": [architecture], "dtype": name}, indent=2) + "\n"


def _write_text(path: Path, text: str) -> None:
    with new_file(path) as file:
        file.write(text.encode())
        file.flush()
        os.fsync(file.fileno())


def _refuse_occupied(out: Path, partial: Path) -> None:
    if os.path.lexists(out) and not (out.is_dir() and not any(out.iterdir())):
        raise ConfigError(
            f"{out} exists and is not an empty folder: nothing is overwritten. Choose another one"
        )
    if os.path.lexists(partial) and (partial.is_symlink() or not partial.is_dir()):
        raise ConfigError(
            f"{partial} is where an export is written until it is complete, and it is no folder: move it away, or "
            "choose another folder"
        )


def _require_space(out: Path, partial: Path, shards: Sequence[ShardPlan], copies: Sequence[Path]) -> None:
    there = next(folder for folder in out.parents if folder.exists())
    system = os.statvfs(there)
    # What a killed export left is removed before anything is written.
    left = sum(path.lstat().st_blocks * 512 for path in partial.iterdir()) if partial.is_dir() else 0
    free = system.f_bavail * system.f_frsize + left
    needed = (
        sum(shard.file_bytes for shard in shards) + sum(path.stat().st_size for path in copies) + _SPARE_BYTES
    )
    if free < needed:
        raise NoSpaceError(
            f"the export needs {needed:,} bytes, {free:,} are free in {there}. Free {needed - free:,} bytes, or "
            "choose another disk; nothing was written"
        )
