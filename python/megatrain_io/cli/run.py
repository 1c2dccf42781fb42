"""Commands about a run: verify, status, clean."""

import shlex
import sys
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from megatrain_io.cli.options import BlockList, JsonOutput, Miniature, Run
from megatrain_io.cli.result import CommandResult, command
from megatrain_io.errors import ConfigError, CorruptionError, StorageError, UnsupportedModelError
from megatrain_io.interrupt import check, held
from megatrain_io.text import visible

if TYPE_CHECKING:
    from megatrain_io.runs.cleanup import Leftover, Leftovers
    from megatrain_io.store.verify import DamagedExtent, OlderState

__all__ = ["clean_command", "status_command", "verify_command"]


def verify_command(
    run: Annotated[
        Path | None,
        typer.Argument(metavar="RUN", help="Run folder: the output_dir of its configuration."),
    ] = None,
    *,
    model: Annotated[
        Path | None,
        typer.Option(
            metavar="MODEL",
            help="In place of a run: train a small copy of this model here, paged and in memory, and compare the bits; "
            "of the folder config.json is enough.",
        ),
    ] = None,
    block_list: BlockList = None,
    miniature: Miniature = None,
    from_older_state: Annotated[
        bool,
        typer.Option(
            "--from-older-state",
            help="Where the newest state is damaged and the one before it is whole, go back to that one, for good.",
        ),
    ] = False,
    json_output: JsonOutput = False,
) -> None:
    """Compare every checksum of a store. All of it is read; what is damaged is named, with its place.

    With --model, say in a minute whether paged training of an architecture has the bits of training in memory here.
    """
    with command(json_output=json_output, interrupted="The run is as it was.") as result:
        if model is not None:
            if run is not None or from_older_state:
                raise ConfigError("verify takes a run or --model, not both; --from-older-state is for a run")
            _verify_model(result, model, block_list, miniature)
            return
        if run is None:
            raise ConfigError("give the run folder whose store is verified, or a model folder: --model MODEL")
        if block_list is not None or miniature is not None:
            raise ConfigError("--block-list and --miniature are for --model: a run has kept its own")
        from megatrain_io.runs.folder import RunFolder

        folder = RunFolder(run)
        folder.read()  # what is no run is refused before torch is imported

        from megatrain_io.runs.open_store import open_store

        with open_store(folder) as state, result.counting("verify") as progress:
            report = state.verify(progress)
            result.values = {"run": run, **asdict(report)}
            size = f"{report.nbytes / 2**30:.2f} GiB in {report.extents} extents"
            if not report.damaged:
                result.text = f"generation {report.generation}: whole ({size})"
                return
            older = state.verify_older(progress)
            goes_back = from_older_state and older is not None and not older.report.damaged
            if goes_back:
                state.go_back(progress)
        step = None if older is None else _step_of(older.blob)
        result.exit_code = 0 if goes_back else CorruptionError.exit_code
        result.values["older_state"] = (
            None if older is None else {"step": step, "went_back": goes_back, **asdict(older.report)}
        )
        extents = "extent" if len(report.damaged) == 1 else "extents"
        lines = [
            f"generation {report.generation}: {len(report.damaged)} damaged {extents} ({size})",
            *(f"  {_damage_line(damage)}" for damage in report.damaged),
            *_way_back(run, older, step, goes_back=goes_back),
        ]
        result.text = "\n".join(lines)


def _verify_model(result: CommandResult, model: Path, block_list: str | None, miniature: Path | None) -> None:
    """Compare paged training of a small copy with training in memory."""
    with held():
        from megatrain_io.config.schema import ModelOptionsConfig
        from megatrain_io.models.model_options import ModelOptions
        from megatrain_io.training.verify_model import verify_model
    check()
    options = ModelOptions.of(ModelOptionsConfig(block_list=block_list or None, miniature=miniature))
    with held():
        report = verify_model(model, options)
    result.values = {"model": model, "equal": not report.differing, **asdict(report)}
    result.text = visible(str(report))
    if report.differing:
        result.exit_code = UnsupportedModelError.exit_code


def _step_of(blob: bytes) -> int | None:
    from megatrain_io.runs.state import TrainerState

    # A loop of one's own commits what it likes.
    with suppress(StorageError, ConfigError):
        return TrainerState.parse(blob).step if blob else 0
    return None


def _way_back(run: Path, older: "OlderState | None", step: int | None, *, goes_back: bool) -> list[str]:
    """What is left where the newest state is damaged, and what to do."""
    otherwise = "restore a copy or import an export again"
    if older is None:
        return [f"No older state is left. Copy the store elsewhere and check the drive, then {otherwise}."]
    name = f"generation {older.report.generation}" + ("" if step is None else f", after step {step}")
    if older.report.damaged:
        count = f"{len(older.report.damaged)} of {older.report.extents} extents"
        return [
            f"The state before it ({name}) is damaged, too: {count}.",
            f"Copy the store elsewhere and check the drive, then {otherwise}.",
        ]
    if goes_back:
        return [f"Went back to the state before it ({name}), which is whole; what was trained since is lost."]
    back = f"megatrain-io verify {shlex.quote(str(run.absolute()))} --from-older-state"
    return [
        f"The state before it ({name}) is whole: `{back}` goes back to it, and what was trained since is lost then.",
        f"Copy the store elsewhere and check the drive first; or {otherwise}.",
    ]


def status_command(run: Run, *, json_output: JsonOutput = False) -> None:
    """Say how a run stands and what to do next. Nothing is opened or changed, and a run in use is not disturbed."""
    with command(json_output=json_output, interrupted="The run is as it was.") as result:
        from megatrain_io.runs.folder import RunFolder
        from megatrain_io.runs.status import examine, render

        status = examine(RunFolder(run))
        result.values = asdict(status)
        result.text = render(status)
        if status.problem is not None:
            result.exit_code = StorageError.exit_code


def clean_command(
    run: Run,
    *,
    cache: Annotated[
        bool, typer.Option("--cache", help="Remove the tokenised data, too; it is made anew when needed.")
    ] = False,
    store: Annotated[
        bool,
        typer.Option(
            "--store",
            help="Remove the store, too, with run.json and RUN/model: the training cannot be resumed then.",
        ),
    ] = False,
    store_dir: Annotated[
        list[Path] | None,
        typer.Option(metavar="DIR", help="Folder where a killed import was to make its store."),
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask; needed without a terminal.")] = False,
    json_output: JsonOutput = False,
) -> None:
    """Remove what killed processes left in a run. It lists and asks first.

    Without --cache and --store only files that nothing needs: parts of an import, and what was not written to
    its end. Metrics, configuration, exports and whatever else lies in the folder stay. A run in use is refused.
    """
    with command(json_output=json_output, interrupted="Look with: megatrain-io clean RUN") as result:
        from megatrain_io.runs.cleanup import Leftovers
        from megatrain_io.runs.folder import RunFolder

        leftovers = Leftovers(RunFolder(run), store_dirs=store_dir or None, cache=cache, store=store)
        result.values = {"run": run, "removed": [], "bytes": 0}
        result.text = (
            f"{visible(str(run))}: nothing to remove" if not leftovers.found else "Nothing was removed."
        )
        if leftovers.found and (yes or _agrees(leftovers)):
            removed = [asdict(leftover) for leftover in leftovers.remove()]
            result.values |= {"removed": removed, "bytes": leftovers.nbytes}
            lines = [_leftover_line(leftover) for leftover in leftovers.found] if yes else []
            result.text = "\n".join([*lines, f"removed {_size(leftovers.nbytes)}"])


def _damage_line(damage: "DamagedExtent") -> str:
    if damage.expected is None:
        return visible(damage.message)  # it could not be read: there is nothing to compare
    return visible(
        f"record {damage.record}, chunk {damage.chunk}, {damage.group} group, at {damage.path}+{damage.offset}: "
        f"checksum {damage.expected} expected, {damage.found} found; tensors {', '.join(damage.tensors)}"
    )


def _agrees(leftovers: "Leftovers") -> bool:
    """Show what is to be removed, and ask.

    Raises:
        ConfigError: there is nobody to ask.
    """
    for leftover in leftovers.found:
        typer.echo(_leftover_line(leftover), err=True)
    if not _can_ask():
        raise ConfigError("nothing was removed: there is no terminal to ask on. Give --yes to remove this")
    question = f"Remove {'this' if len(leftovers.found) == 1 else 'these'} ({_size(leftovers.nbytes)})?"
    if leftovers.store_bytes:
        at = "" if leftovers.step is None else f" of step {leftovers.step}"
        question = (
            f"Remove all this and the store ({_size(leftovers.store_bytes)})? It holds the only copy of the training "
            f"state{at}: exports have its weights, and no training goes on from them."
        )
    try:
        return typer.confirm(question, err=True)
    except typer.Abort:
        raise KeyboardInterrupt from None


def _can_ask() -> bool:
    return sys.stdin.isatty() and sys.stderr.isatty()


def _leftover_line(leftover: "Leftover") -> str:
    return f"  {_size(leftover.nbytes):>9}  {visible(f'{leftover.path}: {leftover.what}')}"


def _size(nbytes: int) -> str:
    from rich.filesize import decimal

    return decimal(nbytes, precision=2)
