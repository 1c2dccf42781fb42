"""The command line. Each command imports what it needs when it runs, so that ``--help`` answers at once.

Standard output is for results: text, or one JSON object with ``--json``. Everything else goes to standard
error. Exit codes are those of ``megatrain_io.errors``.
"""

import sys
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from megatrain_io.errors import ConfigError, CorruptionError, DoesNotFitError, StorageError
from megatrain_io.outcome import command

if TYPE_CHECKING:
    from megatrain_io.damage import Damage
    from megatrain_io.leftovers import Leftover, Leftovers

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

Model = Annotated[
    Path, typer.Argument(metavar="MODEL", help="Model folder: config.json, safetensors, tokenizer.")
]
Run = Annotated[Path, typer.Argument(metavar="RUN", help="Run folder: the output_dir of its configuration.")]
JsonOutput = Annotated[
    bool, typer.Option("--json", help="Print one JSON object on standard output, and no progress.")
]


def _print_version(wanted: bool) -> None:  # noqa: FBT001 - so are callbacks called
    if wanted:
        from importlib.metadata import PackageNotFoundError, version

        try:
            number = version("megatrain-io")
        except PackageNotFoundError:
            number = "(not installed)"
        typer.echo(f"megatrain-io {number}")
        raise typer.Exit


def _print_keys(wanted: bool) -> None:  # noqa: FBT001 - so are callbacks called
    if wanted:
        from megatrain_io.config import describe_keys

        typer.echo(describe_keys())
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


# ------------------------------------------------------------------------------------------------ commands


@app.command("import")
def import_command(
    model: Model,
    run: Run,
    *,
    precision: Annotated[
        Literal["bf16", "fp32"],
        typer.Option(
            help="Compute dtype; master weights are fp32 either way. A GPU without bf16 (RTX 20, T4) needs fp32."
        ),
    ] = "bf16",
    store_dir: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="DIR",
            help="Folder for the store, on a local NVMe drive. Once for each of several drives. Default: RUN.",
        ),
    ] = None,
    durability: Annotated[
        Literal["step", "scratch"],
        typer.Option(help="scratch takes half the space, and a crash loses everything."),
    ] = "step",
    io_backend: Annotated[Literal["auto", "uring", "threads"], typer.Option(help="How bytes move.")] = "auto",
    json_output: JsonOutput = False,
) -> None:
    """Make a store from a model folder. It goes tensor by tensor: the model is never whole in RAM."""
    with command(json_output=json_output, interrupted="Nothing was left behind: import again.") as outcome:
        from megatrain_io.convert import import_model
        from megatrain_io.run import RunFolder

        folder = RunFolder(run)

        with outcome.counting("import") as progress:
            info = import_model(
                model,
                folder,
                precision=precision,
                stores=folder.stores_in(store_dir or None),
                durability=durability,
                engine=io_backend,
                progress=progress,
            )
        outcome.result = {"run": run, **asdict(info)}
        outcome.text = f"imported {model} into {run}: {info.precision}, store {', '.join(info.stores)}"


@app.command("train")
def train_command(
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="KEY=VALUE",
            help="Win over the file: train.learning_rate=2e-5, or learning_rate=2e-5 for short.",
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
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last committed step.")] = False,
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
    json_output: JsonOutput = False,
) -> None:
    """Train, or go on with a training."""
    sentence = "The last committed step is safe: go on with the same command and --resume."
    with command(json_output=json_output, interrupted=sentence) as outcome:
        from megatrain_io.config import load

        config, notes = load(config_file, overrides or [])
        for note in notes:
            typer.echo(f"note: {note}", err=True)

        from rich.console import Console

        from megatrain_io.report import reporter_for, rows
        from megatrain_io.trace import Trace
        from megatrain_io.train import train

        logging_steps = config.train.logging_steps
        reporter = reporter_for(Console(stderr=True), quiet=json_output, logging_steps=logging_steps)
        with nullcontext() if trace is None else Trace(trace) as tracer:
            try:
                result = train(config, resume=resume, reporter=reporter, trace=tracer)
            finally:
                reporter.finished()
        outcome.result = {"run": config.output_dir, **asdict(result)}
        outcome.text = "\n".join(rows(outcome.result))


@app.command("plan")
def plan_command(  # noqa: PLR0913 - an option each
    model: Annotated[
        Path, typer.Argument(metavar="MODEL", help="Model folder; of its files only config.json is needed.")
    ],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Win over the file, as for train.")
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
        float | None, typer.Option(min=1, help="Of the whole run, where max_steps is not given: 1e9.")
    ] = None,
    watts: Annotated[float | None, typer.Option(min=0.1, help="Power that the machine takes.")] = None,
    kilowatt_hour: Annotated[
        float | None, typer.Option(metavar="PRICE", min=0, help="Price of a kWh of electricity.")
    ] = None,
    rented_hour: Annotated[
        float | None, typer.Option(metavar="PRICE", min=0, help="Price of an hour of a rented GPU.")
    ] = None,
    json_output: JsonOutput = False,
) -> None:
    """Say what a run needs, how long it takes and what it wears, before it begins. Weights need not be there."""
    with command(json_output=json_output, interrupted="Nothing was changed.") as outcome:
        from megatrain_io.planning import plan

        found = plan(
            model,
            config_file,
            on=on,
            tokens=tokens,
            watts=watts,
            kilowatt_hour=kilowatt_hour,
            rented_hour=rented_hour,
            settings=overrides or [],
        )
        outcome.result = found.as_dict()
        outcome.text = str(found)
        if not found.fits:
            outcome.exit_code = DoesNotFitError.exit_code


@app.command("generate")
def generate_command(  # noqa: PLR0913 - an option each
    run: Run,
    *,
    prompt: Annotated[str, typer.Option("--prompt", "-p", metavar="TEXT", help="What to go on from.")],
    chat: Annotated[
        bool, typer.Option("--chat", help="TEXT is a message to answer, in the model's chat template.")
    ] = False,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 64,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the likeliest token.")] = 0.0,
    top_p: Annotated[float, typer.Option(min=0.0, max=1.0, help="Nucleus sampling; 1 is off.")] = 1.0,
    top_k: Annotated[int, typer.Option(min=0, help="Sample from so many tokens; 0 is off.")] = 0,
    seed: Annotated[int, typer.Option(min=0, help="Of the sampling.")] = 0,
    json_output: JsonOutput = False,
) -> None:
    """Continue a text. It is done with the newest committed weights."""
    with command(json_output=json_output, interrupted="The run is as it was.") as outcome:
        from megatrain_io.generate import Generator

        how: dict[str, Any] = {
            "max_new_tokens": max_new_tokens,
            "temperature": temperature,
            "top_p": top_p,
            "top_k": top_k,
            "seed": seed,
        }
        with Generator.open(run) as generator:
            if chat:
                outcome.text = generator.chat([{"role": "user", "content": prompt}], **how)
            else:
                outcome.text = generator.complete(prompt, **how)
        outcome.result = {"prompt": prompt, "text": outcome.text, **how}


@app.command("export")
def export_command(
    run: Run,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to make.")],
    *,
    dtype: Annotated[
        Literal["bf16", "fp32"] | None,
        typer.Option(help="fp32 are the master weights. Default: what the run computes in."),
    ] = None,
    json_output: JsonOutput = False,
) -> None:
    """Write the weights as a model folder. They are the newest committed ones; transformers loads the folder."""
    with command(json_output=json_output, interrupted="The run is as it was: export again.") as outcome:
        from megatrain_io.convert import export_model
        from megatrain_io.run import RunFolder

        with outcome.counting("export") as progress:
            export_model(RunFolder(run), out, dtype=dtype, progress=progress)
        outcome.result = {"run": run, "out": out, "dtype": dtype}
        outcome.text = f"exported {run} to {out}"


@app.command("verify")
def verify_command(run: Run, *, json_output: JsonOutput = False) -> None:
    """Compare every checksum of a store. All of it is read; what is damaged is named, with its place."""
    with command(json_output=json_output, interrupted="The run is as it was.") as outcome:
        from megatrain_io.run import RunFolder

        folder = RunFolder(run)
        folder.read()  # what is no run is refused before torch is imported

        from megatrain_io.swap import PagedState

        with PagedState.of_run(folder) as state, outcome.counting("verify") as progress:
            report = state.verify(progress)
        outcome.result = {"run": run, **asdict(report)}
        size = f"{report.nbytes / 2**30:.2f} GiB in {report.extents} extents"
        if report.damaged:
            outcome.exit_code = CorruptionError.exit_code
            extents = "extent" if len(report.damaged) == 1 else "extents"
            lines = [
                f"generation {report.generation}: {len(report.damaged)} damaged {extents} ({size})",
                *(f"  {_damage_line(damage)}" for damage in report.damaged),
                "Copy the store elsewhere and check the drive, then restore a copy or import an export again.",
            ]
            outcome.text = "\n".join(lines)
        else:
            outcome.text = f"generation {report.generation}: whole ({size})"


@app.command("status")
def status_command(run: Run, *, json_output: JsonOutput = False) -> None:
    """Say how a run stands and what to do next. Nothing is opened or changed, and a run in use is not disturbed."""
    with command(json_output=json_output, interrupted="The run is as it was.") as outcome:
        from megatrain_io.run import RunFolder
        from megatrain_io.status import examine, render

        status = examine(RunFolder(run))
        outcome.result = asdict(status)
        outcome.text = render(status)
        if status.problem is not None:
            outcome.exit_code = StorageError.exit_code


@app.command("clean")
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
        typer.Option(metavar="DIR", help="Where the store of an import was to be that was killed."),
    ] = None,
    yes: Annotated[
        bool, typer.Option("--yes", "-y", help="Do not ask; needed where nobody can answer.")
    ] = False,
    json_output: JsonOutput = False,
) -> None:
    """Remove what killed processes left in a run. It lists and asks first.

    Without --cache and --store only files that nothing needs: parts of an import, and what was not written to
    its end. Metrics, configuration, exports and whatever else lies in the folder stay. A run in use is refused.
    """
    with command(json_output=json_output, interrupted="Look with: megatrain-io clean RUN") as outcome:
        from megatrain_io.leftovers import Leftovers
        from megatrain_io.run import RunFolder

        leftovers = Leftovers(RunFolder(run), store_dirs=store_dir or None, cache=cache, store=store)
        outcome.result = {"run": run, "removed": [], "bytes": 0}
        outcome.text = f"{run}: nothing to remove" if not leftovers.found else "Nothing was removed."
        if leftovers.found and (yes or _agrees(leftovers)):
            removed = [asdict(each) for each in leftovers.remove()]
            outcome.result |= {"removed": removed, "bytes": leftovers.nbytes}
            lines = [_leftover_line(each) for each in leftovers.found] if yes else []
            outcome.text = "\n".join([*lines, f"removed {_size(leftovers.nbytes)}"])


@app.command("doctor")
def doctor_command(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Where a store would be.")] = Path(),
    *,
    json_output: JsonOutput = False,
) -> None:
    """Say what this machine offers. RAM, GPU, drive, io_uring, versions: as a text to paste into a report."""
    with command(json_output=json_output, interrupted="Nothing was changed.") as outcome:
        from megatrain_io.doctor import examine, render

        outcome.result = examine(folder)
        outcome.text = render(outcome.result)


@app.command("bench")
def bench_command(  # noqa: PLR0913 - an option each
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="On the drive to measure.")] = Path(),
    *,
    output: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Profile to write; it keeps the figures of other drives."),
    ] = None,
    size: Annotated[
        float, typer.Option(min=0.0625, metavar="GIB", help="Of the file that is read and written.")
    ] = 2.0,
    seconds: Annotated[float, typer.Option(min=0.01, help="Of each kind of traffic.")] = 5.0,
    sustained: Annotated[
        bool,
        typer.Option("--sustained", help="Write until the drive's cache is full, too: it wears the drive."),
    ] = False,
    sustained_size: Annotated[
        float | None,
        typer.Option(metavar="GIB", help="At most so much. Default: half of what is free, 238 at most."),
    ] = None,
    sustained_minutes: Annotated[float, typer.Option(min=0.001, help="At most so long.")] = 10.0,
    io_backend: Annotated[Literal["auto", "uring", "threads"], typer.Option(help="How bytes move.")] = "auto",
    matmul: Annotated[bool, typer.Option(help="Measure matrix products, too.")] = True,
    json_output: JsonOutput = False,
) -> None:
    """Measure drive, memory, AdamW and matrix products. It takes half a minute, and leaves a profile alone."""
    with command(json_output=json_output, interrupted="Nothing was left behind.") as outcome:
        from megatrain_io.bench import Options, measure_into, render

        options = Options(
            nbytes=int(size * 2**30),
            seconds=seconds,
            engine=io_backend,
            sustained=sustained,
            sustained_bytes=None if sustained_size is None else int(sustained_size * 2**30),
            sustained_seconds=60 * sustained_minutes,
            matmul=matmul,
        )
        with outcome.counting("bench") as progress:
            profile, path = measure_into(output, folder, options, progress)
        outcome.result = {"profile": path, **profile.model_dump(mode="json")}
        outcome.text = f"{render(profile)}\nprofile        {path}"


# ----------------------------------------------------------------------------------------------- details


def _damage_line(damage: "Damage") -> str:
    if damage.expected is None:
        return damage.message  # it could not be read: there is nothing to compare
    return (
        f"record {damage.record}, chunk {damage.chunk}, {damage.group} group, at {damage.path}+{damage.offset}: "
        f"checksum {damage.expected} expected, {damage.found} found; tensors {', '.join(damage.tensors)}"
    )


def _agrees(leftovers: "Leftovers") -> bool:
    """Show what is to be removed, and ask.

    Raises:
        ConfigError: there is nobody to ask.
    """
    for each in leftovers.found:
        typer.echo(_leftover_line(each), err=True)
    if not _can_ask():
        raise ConfigError("nothing was removed, as nobody can be asked here: say --yes to remove this")
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
    return f"  {_size(leftover.nbytes):>9}  {leftover.path}: {leftover.what}"


def _size(nbytes: int) -> str:
    from rich.filesize import decimal

    return decimal(nbytes, precision=2)
