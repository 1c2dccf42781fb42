"""The in-memory reference that the product must equal bit for bit. Imports torch and transformers only."""

from .reference import (
    Hyperparameters,
    MicroBatch,
    Result,
    accumulate,
    build,
    is_matrix,
    micro_batches,
    round_half_away,
    tiny_config,
    train,
    untie,
)

__all__ = [
    "Hyperparameters",
    "MicroBatch",
    "Result",
    "accumulate",
    "build",
    "is_matrix",
    "micro_batches",
    "round_half_away",
    "tiny_config",
    "train",
    "untie",
]
