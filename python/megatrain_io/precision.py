"""The two precisions of training: what computes, what a store keeps for it, and which one a run has."""

from pathlib import Path

import torch

from megatrain_io.config import RunConfig
from megatrain_io.errors import ConfigError, MegatrainIoError
from megatrain_io.layout import ModelLayout, StateFormat
from megatrain_io.run import Precision, RunFolder

__all__ = ["DTYPES", "FORMATS", "dtype_of", "precision_of", "settle_precision"]

DTYPES: dict[Precision, torch.dtype] = {"bf16": torch.bfloat16, "fp32": torch.float32}
"""Of weights, where they compute."""

FORMATS: dict[Precision, StateFormat] = {"bf16": "bf16", "fp32": "f32"}
"""Of the store's records."""


def dtype_of(layout: ModelLayout) -> torch.dtype:
    """Of a store's weights, where they compute."""
    return torch.bfloat16 if layout.weight_bytes == torch.bfloat16.itemsize else torch.float32


def precision_of(config: RunConfig) -> Precision:
    """That of a configuration which ``settle_precision`` has seen."""
    precision = config.train.precision
    if precision == "auto":
        raise MegatrainIoError("train.precision is auto, and was not settled before it was asked for")
    return precision


def settle_precision(
    config: RunConfig, run: RunFolder, *, without_bf16: str | None
) -> tuple[RunConfig, list[str]]:
    """Put a precision in the place of ``auto``: that of an imported run, else bf16, or fp32 on a GPU without it.

    Args:
        config: of the run.
        run: its folder, which need not be there.
        without_bf16: name of the GPU that computes, if it does not do so in bf16.

    Returns:
        The configuration, whose precision is bf16 or fp32; and notes about it.

    Raises:
        ConfigError: it is bf16, and the GPU has none; or the run's folder is damaged.
    """
    precision, notes = config.train.precision, []
    if precision == "auto" and run.is_imported and run.read().source == str(_folder_of(config.model)):
        precision = run.read().precision
    elif precision == "auto" and without_bf16 is not None:
        precision = "fp32"
        notes.append(
            f"train.precision is fp32, because {without_bf16} does not compute in bf16: 16 bytes are read and 12 "
            "written for each parameter and step, instead of 14 and 12, and matrix products are slower"
        )
    elif precision == "auto":
        precision = "bf16"
    if precision == "bf16" and without_bf16 is not None:
        raise ConfigError(
            f"{without_bf16} does not compute in bf16: set train.precision=fp32 (an imported run keeps its precision: "
            "choose a new output_dir)"
        )
    train = config.train.model_copy(update={"precision": precision})
    return config.model_copy(update={"train": train}), notes


def _folder_of(model: Path) -> Path:
    """That of a model which may be named by its config.json, as a plan takes it."""
    model = Path(model).resolve()
    return model.parent if model.name == "config.json" else model
