"""The command line. Each command imports what it needs when it runs, so that ``--help`` answers at once.

Standard output is for results: text, or one JSON object with ``--json``. Everything else goes to standard
error. Exit codes are those of ``megatrain_io.errors``.
"""

from typing import Annotated

import typer

from megatrain_io.cli.machine import bench_command, doctor_command, plan_command
from megatrain_io.cli.model import export_command, generate_command, import_command
from megatrain_io.cli.run import clean_command, status_command, verify_command
from megatrain_io.cli.train import train_command

__all__ = ["app"]

app = typer.Typer(
    help="Train language models that fit neither the GPU nor the RAM: NVMe is the memory, with the same bits.",
    epilog="Exit codes: 0 done, 1 bug, 2 usage or configuration, 3 does not fit, 4 environment or storage, "
    "5 data or model files, 6 store corrupt or failed, 7 diverged, 130 interrupted and resumable.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,  # a traceback here is for a bug report, and is pasted as it is
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)


def _print_version(wanted: bool) -> None:  # noqa: FBT001 - so are callbacks called
    if wanted:
        from importlib.metadata import PackageNotFoundError, version

        try:
            number = version("megatrain-io")
        except PackageNotFoundError:
            number = "(not installed)"
        typer.echo(f"megatrain-io {number}")
        raise typer.Exit


@app.callback()
def _root(
    *,
    _version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit."),
    ] = False,
) -> None:
    pass


# In the order of `--help`.
for _name, _function in (
    ("import", import_command),
    ("train", train_command),
    ("plan", plan_command),
    ("generate", generate_command),
    ("export", export_command),
    ("verify", verify_command),
    ("status", status_command),
    ("clean", clean_command),
    ("doctor", doctor_command),
    ("bench", bench_command),
):
    app.command(_name)(_function)
