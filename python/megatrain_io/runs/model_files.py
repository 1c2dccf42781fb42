"""The files of RUN/model: those of the import, or refused by name; what is missing is copied again from the source.

No torch, but where weights are read to make a file of them again.
"""

import hashlib
import json
import math
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from megatrain_io.errors import MegatrainIoError, ModelFilesError
from megatrain_io.files import open_file, read_file, replace_file, storage_errors, sync_folder
from megatrain_io.models.companions import COMPANIONS
from megatrain_io.runs.folder import CARRIED, KEPT, RunFolder
from megatrain_io.runs.provenance import bound_files, found_in
from megatrain_io.store.inspect import store_info

__all__ = ["differing_files", "digests_of", "mended_model", "write_model_files"]

_CONFIG = "config.json"
# What a person may change: none of it decides the bits of a step, but for the template, which the data are bound to.
_FREE = {
    *("generation_config.json", "chat_template.jinja", "chat_template.json", "NOTICE"),
    *("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json"),
}
_BYTES_MAX = 1 << 30
_SAFE = "the store is not touched"


def digests_of(folder: Path) -> dict[str, str]:
    """SHA-256 of configuration, tokenizer and whatever else belongs to a model in a folder, by name."""
    names = [name for name in (_CONFIG, *COMPANIONS, *KEPT) if (folder / name).exists()]
    names += sorted(path.name for path in folder.glob("*.py"))
    return {name: _digest(folder / name) for name in names}


def write_model_files(run: RunFolder, contents: Mapping[str, bytes]) -> None:
    """Give files of RUN/model another content, durably; a crash in between leaves files that the run knows."""
    changed = {
        name: content
        for name, content in contents.items()
        if not (run.model / name).exists() or read_file(run.model / name, _BYTES_MAX) != content
    }
    if changed:
        _refuse_link(run)
    run.bind({name: hashlib.sha256(content).hexdigest() for name, content in changed.items()})
    for name, content in changed.items():
        replace_file(run.model / name, content)


def mended_model(run: RunFolder, *, whole: bool = False) -> list[str]:
    """Compare the files of RUN/model with those of the import, and bring back what is missing.

    Args:
        run: the folder.
        whole: read all of what is carried to an export, which may take long; training needs none of it.

    Returns:
        A sentence for each that was brought back, or changed where that is allowed.

    Raises:
        ModelFilesError: one that decides bits was changed, is missing, or was not there at the import.
        StorageError: one cannot be read.
    """
    with storage_errors(run.model, _SAFE):
        _finish_rename(run)
        info = run.read()
        if not info.files:
            return _compared_with_store(run)
        unread = {CARRIED} if not whole and (run.model / CARRIED).exists() else set()
        notes = [
            note
            for name, known in info.files.items()
            if name not in unread
            for note in _compared(run, name, known)
        ]
        for name in _new(run):
            _refuse_new(run, name)
        return notes


def differing_files(run: RunFolder) -> Iterator[str]:
    """What the next command that reads the files of RUN/model will refuse, or mend from the source; nothing is changed.

    What is carried to an export is not read, which may take long: whether it is there is looked at.

    Yields:
        A sentence for each.
    """
    info = run.read()
    if not run.model.exists() and run.model.with_name(run.model.name + ".partial").is_dir():
        return  # the next start gives it its name
    for name, known in info.files.items() if info.files else [(_CONFIG, ())]:
        try:
            with storage_errors(run.model, _SAFE):
                yield from _differing(run, name, known)
        except MegatrainIoError as error:
            yield str(error)
    for name in _new(run):
        try:
            _refuse_new(run, name)
        except MegatrainIoError as error:
            yield str(error)


def _differing(run: RunFolder, name: str, known: Sequence[str]) -> Iterator[str]:
    path = run.model / name
    if name in KEPT:
        if lost := _lost(run, name, known, whole=False):
            source = run.read().source
            yield (
                f"{path} {lost}: the next command that needs it makes it again from {source}, if that has still the "
                "weights of the import"
            )
    elif path.exists():
        for _ in _compared(run, name, known):
            pass  # what may be changed
    elif _decides(name):
        is_there = _original(run, name, known) is not None
        yield f"{path} is missing: {'the next start copies it again' if is_there else _cure(run, name, known)}"


def _new(run: RunFolder) -> list[str]:
    """Files of a model that were not there at the import, and that a library would read."""
    files = run.read().files
    return [
        name
        for name in (*COMPANIONS, *KEPT)
        if files and _decides(name) and name not in files and (run.model / name).exists()
    ]


def _finish_rename(run: RunFolder) -> None:
    """Give the model's folder its name, where a power cut came between that and the store."""
    partial = run.model.with_name(run.model.name + ".partial")
    if not run.model.exists() and partial.is_dir():
        partial.rename(run.model)
        sync_folder(run.path)


def _compared(run: RunFolder, name: str, known: Sequence[str]) -> Iterator[str]:
    path = run.model / name
    if name in KEPT:
        yield from _kept(run, name, known)
        return
    if not path.exists():
        yield from _brought_back(run, name, known)
        return
    digest = _digest(path)
    if digest in known or digest in _known_to_store(run).get(name, []):
        return
    if name == _CONFIG:
        _refuse_other_config(run, known)
    elif _decides(name):
        raise ModelFilesError(f"{path} is not the one of the import. {_cure(run, name, known)}; {_SAFE}")
    elif name.endswith(".json") and not _is_object(path):
        raise ModelFilesError(
            f"{path} is damaged: it holds no JSON object. {_cure(run, name, known)}, or remove it to do without; "
            f"{_SAFE}"
        )
    else:
        yield f"{path} is not the one of the import: it is used as it is now"


def _kept(run: RunFolder, name: str, known: Sequence[str]) -> Iterator[str]:
    """Compare what was made of the imported weights; what is missing or changed is made of them again."""
    lost = _lost(run, name, known)
    if not lost:
        return
    path, source = run.model / name, run.read().source
    _refuse_link(run)
    from megatrain_io.runs.kept_tensors import remade  # noqa: PLC0415 - what looks at a run has no torch

    if not remade(run, name, [*known, *_known_to_store(run).get(name, [])]):
        raise ModelFilesError(
            f"{path} {lost}, and it cannot be made again: {source} has no longer the weights of the import. Put these "
            f"back there, or a copy of the file in its place; {_SAFE}"
        )
    yield f"{path} {lost.replace('is', 'was', 1)}: it was made again from {source}"


def _lost(run: RunFolder, name: str, known: Sequence[str], *, whole: bool = True) -> str:
    """What is wrong with a file that was made of the weights, as words; empty where it is that of the import."""
    path = run.model / name
    if not path.exists():
        return "is missing"
    if name == CARRIED and not whole:
        return ""
    digest = _digest(path)
    if digest in known or digest in _known_to_store(run).get(name, []):
        return ""
    return "is not the one of the import"


def _refuse_link(run: RunFolder) -> None:
    """Refuse to write where a link leads to: a run comes from others, too."""
    if run.model.is_symlink():
        raise ModelFilesError(
            f"{run.model} is a link to {run.model.readlink()}, and nothing is written there: put the folder itself in "
            f"the place of the link; {_SAFE}"
        )


def _known_to_store(run: RunFolder) -> dict[str, list[str]]:
    """The hashes that the store has, should ``run.json`` be the one that was damaged."""
    found = found_in(run.store_paths())
    return {} if found is None else bound_files(*found)


def _brought_back(run: RunFolder, name: str, known: Sequence[str]) -> Iterator[str]:
    """Copy a missing file from the source, where that still has it."""
    path, original = run.model / name, _original(run, name, known)
    if original is not None:
        _refuse_link(run)
        run.model.mkdir(0o700, exist_ok=True)
        replace_file(path, read_file(original, _BYTES_MAX))
        yield f"{path} was missing: it was copied again from {original.parent}"
    elif _decides(name):
        raise ModelFilesError(f"{path} is missing. {_cure(run, name, known)}; {_SAFE}")


def _refuse_new(run: RunFolder, name: str) -> NoReturn:
    raise ModelFilesError(
        f"{run.model / name} was not there at the import, and {'the model' if name in KEPT else 'the tokenizer'} "
        f"would read it: move it out of {run.model}; {_SAFE}"
    )


def _compared_with_store(run: RunFolder) -> list[str]:
    """Runs of versions that wrote down no hash: the store has the configuration."""
    if not (run.model / _CONFIG).exists():
        raise ModelFilesError(f"{run.model / _CONFIG} is missing. {_cure(run, _CONFIG, ())}; {_SAFE}")
    _refuse_other_config(run, ())
    return []


def _refuse_other_config(run: RunFolder, known: Sequence[str]) -> None:
    """Refuse a configuration that says something else than the one of the import, with what is different."""
    path = run.model / _CONFIG
    imported = json.loads(store_info(*run.store_paths()).manifest)["model"].get("config")
    if imported is None:  # of a store that another tool of ours made
        return
    found = _json_of(path)
    differences = "it cannot be read" if found is None else ", ".join(_differences(imported, found)[:3])
    if differences:
        raise ModelFilesError(
            f"{path} is not the one of the import: {differences}. {_cure(run, _CONFIG, known)}; {_SAFE}"
        )


def _differences(imported: Any, found: Any, place: str = "") -> list[str]:
    """What is different, in words; numbers that the store's own JSON rounds in their last digit are not."""
    if isinstance(imported, dict) and isinstance(found, dict):
        return [
            difference
            for key in dict.fromkeys([*imported, *found])
            for difference in _differences(
                imported.get(key), found.get(key), f"{place}.{key}" if place else str(key)
            )
        ]
    if isinstance(imported, list) and isinstance(found, list) and len(imported) == len(found):
        pairs = enumerate(zip(imported, found, strict=True))
        return [one for index, (a, b) in pairs for one in _differences(a, b, f"{place}[{index}]")]
    if (
        isinstance(imported, float)
        and isinstance(found, float)
        and math.isclose(imported, found, rel_tol=4e-16)
    ):
        return []
    if type(imported) is type(found) and imported == found:
        return []
    return [f"{place or 'all of it'} is {_short(found)}, and was {_short(imported)}"]


def _cure(run: RunFolder, name: str, known: Sequence[str]) -> str:
    """What brings a file back, as a sentence without its full stop."""
    original, path = _original(run, name, known), run.model / name
    if original is not None:
        return f"Put it back: cp {shlex.quote(str(original))} {shlex.quote(str(path.resolve()))}"
    return f"Put the {name} of the import back (the model came from {run.read().source})"


def _original(run: RunFolder, name: str, known: Sequence[str]) -> Path | None:
    """The file in the model folder that was imported, if it is still what it was."""
    path = Path(run.read().source) / name
    try:
        return path if _digest(path) in known else None
    except OSError:
        return None


def _decides(name: str) -> bool:
    return name not in _FREE and not name.startswith("LICENSE")


def _digest(path: Path) -> str:
    with open_file(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _is_object(path: Path) -> bool:
    return isinstance(_json_of(path), dict)


def _json_of(path: Path) -> Any:
    try:
        # Numbers that JSON does not have are written in the store as transformers marks them.
        constants: Callable[[str], Any] = lambda constant: {"__float__": constant}  # noqa: E731
        return json.loads(read_file(path, _BYTES_MAX), parse_constant=constants)
    except (ValueError, RecursionError):
        return None


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."  # noqa: PLR2004 - of a line
