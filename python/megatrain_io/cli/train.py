"""The command that trains a run, or resumes it."""

from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from megatrain_io.cli.options import AllowCode, JsonOutput, allow_code
from megatrain_io.cli.result import command
from megatrain_io.interrupt import check, held

__all__ = ["train_command"]


def _print_keys(wanted: bool) -> None:  # noqa: FBT001 - so are callbacks called
    if wanted:
        from megatrain_io.config.parse import describe_keys

        typer.echo(describe_keys())
        raise typer.Exit


def train_command(
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="KEY=VALUE",
            help="Overrides the file: train.learning_rate=2e-5, or learning_rate=2e-5 for short.",
        ),
    ] = None,
    *,
    config_file: Annotated[
        Path | None,
        typer.Option(
            "--config",
            "-c",
            metavar="FILE",
            help="YAML file. Relative paths in it are meant from the current directory.",
        ),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Resume from the last committed step.")] = False,
    trace: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write what ran when to a new file, for ui.perfetto.dev."),
    ] = None,
    _keys: Annotated[
        bool,
        typer.Option(
            "--keys", callback=_print_keys, is_eager=True, help="List every key with its default, and exit."
        ),
    ] = False,
    allows_code: AllowCode = False,
    json_output: JsonOutput = False,
) -> None:
    """Train a model, or resume a run."""
    sentence = "The run is as it was: give the same command again."
    with command(json_output=json_output, interrupted=sentence) as result:
        from megatrain_io.config.parse import load
        from megatrain_io.text import rows, visible

        config, notes = load(config_file, overrides or [])
        for note in notes:
            typer.echo(f"note: {visible(note)}", err=True)

        with held():
            from rich.console import Console

            from megatrain_io.paging.trace import Trace
            from megatrain_io.runs.folder import RunFolder
            from megatrain_io.runs.open_store import naming_the_way_back
            from megatrain_io.training.callbacks import Callback, TraceCallback
            from megatrain_io.training.reporters import WarningReporter, reporter
            from megatrain_io.training.trainer import train

            allow_code(allows_code, overrides=overrides or ())
        check()

        reports = WarningReporter(Console(stderr=True)) if json_output else None
        callbacks: list[Callback] = [reports or reporter(logging_steps=config.train.logging_steps)]
        with ExitStack() as open_:
            open_.enter_context(naming_the_way_back(RunFolder(config.output_dir)))
            if trace is not None:
                callbacks.append(TraceCallback(open_.enter_context(Trace(trace))))
            trained = train(config, resume=resume, callbacks=callbacks)
        result.values = {"run": config.output_dir, **asdict(trained)}
        # They were told when they came up.
        result.text = "\n".join(rows({k: v for k, v in result.values.items() if k != "warnings"}))
