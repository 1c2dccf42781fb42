"""Arguments and options that several commands share."""

from pathlib import Path
from typing import Annotated

import typer

__all__ = ["BlockList", "JsonOutput", "Miniature", "Model", "Run"]

Model = Annotated[
    Path, typer.Argument(metavar="MODEL", help="Model folder: config.json, safetensors, tokenizer.")
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
