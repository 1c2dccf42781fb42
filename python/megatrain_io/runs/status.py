"""How a run stands, from its files alone: also while it is in use, without waiting for it. No torch."""

import json
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from rich.filesize import decimal

from megatrain_io.config.parse import load
from megatrain_io.errors import ConfigError, FormatError, MegatrainIoError
from megatrain_io.files import read_file
from megatrain_io.machine.drive import mount_of, read_mounts
from megatrain_io.runs.folder import RunFolder, RunInfo
from megatrain_io.runs.metrics import last_report
from megatrain_io.runs.model_files import differing_files
from megatrain_io.runs.state import TrainerState
from megatrain_io.store.inspect import Owner, StoreInfo, owner_of, store_info
from megatrain_io.store.layout import Durability, ModelLayout
from megatrain_io.text import visible

__all__ = ["RunStatus", "examine", "render"]

LastStop = Literal["clean", "killed", "system down"]

_LAST_STOPS: dict[LastStop, str] = {
    "clean": "clean",
    "killed": "not clean (the process was killed): the last committed step is whole",
    "system down": "not clean, and the machine was started since: the next start verifies all of the store first",
}
_CONFIG_BYTES_MAX = 64 << 20


@dataclass(frozen=True)
class RunStatus:
    """What is known of a run; None is what could not be found out.

    Attributes:
        run: its folder.
        architecture: of the model, by its config.json.
        source: the model folder it was imported from.
        version: of megatrain-io that imported it.
        precision: compute dtype.
        stores: paths of the store's files, one for each drive.
        store_bytes: bytes that it takes on its drives.
        file_system: type of the file system that the first of them lies on.
        is_direct: whether that file system has direct I/O.
        parameters: number of parameters of the model.
        durability: whether a committed step survives a crash, or only a clean end does (scratch).
        generation: number of the newest committed state; 1 is the import.
        step: last committed step.
        max_steps: last step of the run, once a step was done.
        loss: of that step.
        written_bytes: bytes that training wrote in all starts so far: at most a step too many.
        last_stop: how the last process ended; None while one runs.
        in_use: who holds the store now.
        problem: why the store cannot be used, in a sentence.
        files: what the next command will refuse of the files of RUN/model, or mend, a sentence each.
        code: path of the file of code that makes the model known; None where there is none.
        next: what to do, in a sentence.
    """

    run: Path
    architecture: str | None
    source: str
    version: str
    precision: str
    stores: tuple[Path, ...]
    store_bytes: int | None = None
    file_system: str | None = None
    is_direct: bool | None = None
    parameters: int | None = None
    durability: Durability | None = None
    generation: int | None = None
    step: int | None = None
    max_steps: int | None = None
    loss: float | None = None
    written_bytes: int | None = None
    last_stop: LastStop | None = None
    in_use: Owner | None = None
    problem: str | None = None
    files: tuple[str, ...] = ()
    code: str | None = None
    next: str = ""


def examine(run: RunFolder) -> RunStatus:
    """Look at a run without opening its store.

    Raises:
        ConfigError: this is no run folder.
    """
    info, stores = run.read(), tuple(run.store_paths())
    store = stores[0]
    status = RunStatus(
        run=run.path,
        architecture=_architecture(run),
        source=info.source,
        version=info.version,
        precision=info.precision,
        stores=stores,
        code=_code(info),
    )
    try:
        owner, state = owner_of(store), store_info(*stores)
        if state.uuid != info.store_uuid:
            raise FormatError(f"{store} is store {state.uuid}, and run.json names {info.store_uuid}")
        progress = TrainerState.parse(state.blob)
        layout = ModelLayout.from_manifest(state.manifest)
    except MegatrainIoError as error:
        status = replace(status, problem=str(error))
        return replace(status, next="put the store of this run in its place, or import into a new folder")
    if layout.durability == "scratch" and not state.is_clean and owner is None:
        problem = (
            "with durability scratch only a store that was closed can be opened again: its state is lost"
        )
        return replace(status, problem=problem, next="import the model again, into a new folder")
    report = last_report(run.metrics)
    status = replace(
        status,
        store_bytes=sum(path.stat().st_blocks * 512 for path in stores),
        file_system=_file_system(store),
        is_direct=state.is_direct,
        parameters=layout.parameters,
        durability=layout.durability,
        generation=state.generation,
        step=progress.step,
        max_steps=None if report is None else report.max_steps,
        loss=progress.loss,
        written_bytes=progress.written_bytes,
        last_stop=_last_stop(state) if owner is None else None,
        in_use=owner,
        files=tuple(differing_files(run)),
    )
    return replace(status, next=_next(status, run))


def render(status: RunStatus) -> str:
    """The status as text for a person, a line for each fact."""
    return "\n".join(f"{name:<10} {visible(value)}" for name, value in _lines(status))


def _lines(status: RunStatus) -> Iterator[tuple[str, str]]:
    yield "run", str(status.run)
    model = status.architecture or "unknown"
    yield "model", f"{model}, imported from {status.source} by megatrain-io {status.version}"
    yield "precision", status.precision
    if status.problem is not None:
        yield "store", ", ".join(map(str, status.stores))
        yield "problem", status.problem
    else:
        io = "direct I/O" if status.is_direct else "no direct I/O: transfers go through the page cache"
        size = decimal(status.store_bytes or 0)
        stores = ", ".join(map(str, status.stores))
        yield "parameters", f"{status.parameters:,}"
        yield (
            "store",
            f"{stores}: {size} on {status.file_system or 'an unknown file system'}, {io}",
        )
        last = "" if status.max_steps is None else f" of {status.max_steps}"
        loss = "" if status.loss is None else f", loss {status.loss:.4f}"
        yield "committed", f"step {status.step}{last}{loss} (generation {status.generation})"
        yield "written", decimal(status.written_bytes or 0, precision=4)
        yield "in use", "no" if status.in_use is None else f"by {status.in_use.text}"
        if status.last_stop is not None:
            yield "last stop", _LAST_STOPS[status.last_stop]
    for sentence in status.files:
        yield "files", sentence
    if status.code is not None:
        yield "code", f"{status.code}: train, generate and export run it where --allow-code says so"
    yield "next", status.next


def _code(info: RunInfo) -> str | None:
    """Path of the file of code with which a run was imported."""
    modules = info.model_options.get("modules")
    path = modules.get("path") if isinstance(modules, dict) else None
    return path if isinstance(path, str) else None


def _architecture(run: RunFolder) -> str | None:
    try:
        config = json.loads(read_file(run.model / "config.json", _CONFIG_BYTES_MAX))
        return str((config.get("architectures") or [config["model_type"]])[0])
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return None


def _file_system(path: Path) -> str | None:
    mount = mount_of(path.resolve(), read_mounts())
    return None if mount is None else mount.kind


def _last_stop(found: StoreInfo) -> LastStop:
    if found.is_clean:
        return "clean"
    return "killed" if found.is_of_this_boot else "system down"


def _next(status: RunStatus, run: RunFolder) -> str:
    if status.in_use is not None:
        if status.in_use.has_ended:
            return "wait a second, and look again"
        if status.durability == "scratch":
            return "let it go on, or stop it with Ctrl-C or SIGTERM and wait for its end: kill -9 loses everything"
        return "let it go on, or stop it with Ctrl-C or SIGTERM: the last committed step is safe"
    code = "" if status.code is None else " --allow-code"
    if not status.step:
        return f"{_train_command(run)}{code}"
    if status.max_steps is None or status.step < status.max_steps:
        return f"{_train_command(run)}{code} --resume"
    path = shlex.quote(str(run.path.absolute()))
    return (
        f"done: megatrain-io generate {path} --prompt TEXT{code}, or megatrain-io export {path} OUT{code}. To train "
        f"on: {_train_command(run)}{code} --resume max_steps=N, with N above {status.step}"
    )


def _train_command(run: RunFolder) -> str:
    """The command that goes on with a run, from whatever folder it is typed in."""
    here, file = run.path.absolute(), run.config.absolute()
    try:
        config, _ = load(file)
    except ConfigError:
        # Of a run that was only imported, or damaged.
        return f"megatrain-io train --config FILE output_dir={shlex.quote(str(here))}"
    moved = config.output_dir.absolute().resolve() != here.resolve()
    return f"megatrain-io train --config {shlex.quote(str(file))}" + (
        f" output_dir={shlex.quote(str(here))}" if moved else ""
    )
