"""Arguments and options that several commands share."""

from pathlib import Path
from typing import Annotated

import typer

__all__ = ["JsonOutput", "Model", "Run"]

Model = Annotated[
    Path, typer.Argument(metavar="MODEL", help="Model folder: config.json, safetensors, tokenizer.")
]

Run = Annotated[Path, typer.Argument(metavar="RUN", help="Run folder: the output_dir of its configuration.")]

JsonOutput = Annotated[
    bool, typer.Option("--json", help="Print one JSON object on standard output, and no progress.")
]
