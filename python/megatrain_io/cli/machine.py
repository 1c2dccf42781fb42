"""Commands about a machine: doctor, bench, plan."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from megatrain_io.cli.options import AllowCode, JsonOutput, allow_code
from megatrain_io.cli.result import command
from megatrain_io.errors import DoesNotFitError
from megatrain_io.interrupt import check, held

__all__ = ["bench_command", "doctor_command", "plan_command"]


def plan_command(  # noqa: PLR0913 - an option each
    model: Annotated[
        Path, typer.Argument(metavar="MODEL", help="Model folder; of its files only config.json is needed.")
    ],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Overrides the file, as for train.")
    ] = None,
    *,
    config_file: Annotated[
        Path | None, typer.Option("--config", "-c", metavar="FILE", help="YAML file of the run.")
    ] = None,
    on: Annotated[
        str | None,
        typer.Option(
            metavar="MACHINE",
            help="laptop-8gb, desktop-24gb, workstation-32gb, or a YAML file. Default: this machine, as bench "
            "measured it.",
        ),
    ] = None,
    tokens: Annotated[
        float | None,
        typer.Option(min=1, help="Tokens of the whole run, such as 1e9, where max_steps is not given."),
    ] = None,
    watts: Annotated[float | None, typer.Option(min=0.1, help="Power that the machine takes.")] = None,
    kilowatt_hour: Annotated[
        float | None, typer.Option(metavar="PRICE", min=0, help="Price of a kWh of electricity.")
    ] = None,
    rented_hour: Annotated[
        float | None, typer.Option(metavar="PRICE", min=0, help="Price of an hour of a rented GPU.")
    ] = None,
    allows_code: AllowCode = False,
    json_output: JsonOutput = False,
) -> None:
    """Say what a run needs, how long it takes and how much it writes, before it begins. Weights need not be there."""
    with command(json_output=json_output, interrupted="Nothing was changed.") as result:
        # The dry run has dispatch modes of torch: an exception raised anywhere in them may end the process.
        with held():
            from megatrain_io.planning.planner import plan

            allow_code(allows_code, overrides=overrides or ())
            run_plan = plan(
                model,
                config_file,
                on=on,
                tokens=tokens,
                watts=watts,
                kilowatt_hour=kilowatt_hour,
                rented_hour=rented_hour,
                settings=overrides or [],
            )
        check()
        result.values = run_plan.as_dict()
        result.text = str(run_plan)
        if not run_plan.fits:
            result.exit_code = DoesNotFitError.exit_code


def doctor_command(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder where a store would lie.")] = Path(),
    *,
    json_output: JsonOutput = False,
) -> None:
    """Say what this machine offers. RAM, GPU, drive, io_uring, versions: as a text to paste into a report."""
    with command(json_output=json_output, interrupted="Nothing was changed.") as result:
        from megatrain_io.machine.doctor import examine, render

        result.values = examine(folder)
        result.text = render(result.values)


def bench_command(  # noqa: PLR0913 - an option each
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder on the drive to measure.")] = Path(),
    *,
    output: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Profile to write; figures of other drives in it are kept."),
    ] = None,
    size: Annotated[
        float, typer.Option(min=0.0625, metavar="GIB", help="Size of the file that is read and written.")
    ] = 2.0,
    seconds: Annotated[float, typer.Option(min=0.01, help="Seconds for each kind of traffic.")] = 5.0,
    sustained: Annotated[
        bool,
        typer.Option("--sustained", help="Write until the drive's cache is full, too: it wears the drive."),
    ] = False,
    sustained_size: Annotated[
        float | None,
        typer.Option(
            metavar="GIB", help="Most to write with --sustained. Default: half of what is free, at most 238."
        ),
    ] = None,
    sustained_minutes: Annotated[
        float, typer.Option(min=0.001, help="Longest time of --sustained, in minutes.")
    ] = 10.0,
    io_backend: Annotated[Literal["auto", "uring", "threads"], typer.Option(help="I/O engine.")] = "auto",
    matmul: Annotated[bool, typer.Option(help="Measure matrix products, too.")] = True,
    json_output: JsonOutput = False,
) -> None:
    """Measure drive, memory, AdamW and matrix products. It takes half a minute, and leaves only a profile behind."""
    with command(json_output=json_output, interrupted="Nothing was left behind.") as result:
        from megatrain_io.machine.bench import Options, measure_into, render

        options = Options(
            nbytes=int(size * 2**30),
            seconds=seconds,
            engine=io_backend,
            sustained=sustained,
            sustained_bytes=None if sustained_size is None else int(sustained_size * 2**30),
            sustained_seconds=60 * sustained_minutes,
            matmul=matmul,
        )
        with result.counting("bench") as progress:
            profile, path = measure_into(output, folder, options, progress)
        result.values = {"profile": path, **profile.model_dump(mode="json")}
        result.text = f"{render(profile)}\nprofile        {path}"
