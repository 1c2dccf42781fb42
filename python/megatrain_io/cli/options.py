"""Arguments and options that several commands share."""

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import typer

__all__ = ["AllowCode", "BlockList", "JsonOutput", "Miniature", "Model", "Modules", "Run", "allow_code"]

Model = Annotated[
    Path,
    typer.Argument(
        metavar="MODEL", help="Model folder (config.json, safetensors, tokenizer), or a GGUF file."
    ),
]

Run = Annotated[Path, typer.Argument(metavar="RUN", help="Run folder: the output_dir of its configuration.")]

BlockList = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="Module list of decoder blocks, where transformers does not mark it."),
]

Miniature = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR",
        help="config.json of a small model of the same architecture, where it cannot be shrunk.",
    ),
]

JsonOutput = Annotated[
    bool, typer.Option("--json", help="Print one JSON object on standard output, and no progress.")
]

Modules = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE", help="Python file of your own that registers the model with transformers: it runs."
    ),
]

AllowCode = Annotated[
    bool,
    typer.Option(
        "--allow-code", help="Run the file that model_options.modules of the configuration or run names."
    ),
]


def allow_code(allow_all: bool, modules: Path | None = None, overrides: Iterable[str] = ()) -> None:  # noqa: FBT001
    """Let code run as the command line says: any, or a file that it names."""
    named = [item for item in overrides if "modules" in item]
    if not allow_all and modules is None and not named:
        return
    from megatrain_io.models import own_code

    own_code.allow_named(named)
    if modules is not None:
        own_code.allow(modules)
    if allow_all:
        own_code.allow_all()
