"""The schedules of the learning rate: constant, linear and cosine, with warm-up. No torch."""

import math

from megatrain_io.config.schema import TrainConfig

__all__ = ["learning_rate_at"]


def learning_rate_at(config: TrainConfig, step: int, max_steps: int) -> float:
    """Learning rate of ``step``, counted from 1, by the formulas of transformers' schedulers.

    There the first step of a warm-up has rate 0 and a schedule ends one step after its last rate. With
    ``warmup_steps``, ``constant`` is their ``constant_with_warmup``. Source: ``transformers.optimization``,
    ``get_linear_schedule_with_warmup`` and ``get_cosine_schedule_with_warmup`` with half a cycle.

    Args:
        config: highest rate, type of the schedule and warm-up steps.
        step: optimizer step, skipped ones not counted.
        max_steps: last step of the run.
    """
    index, warmup = step - 1, config.warmup_steps
    if index < warmup:
        return config.learning_rate * (index / max(1, warmup))
    if config.lr_scheduler_type == "constant":
        return config.learning_rate
    if config.lr_scheduler_type == "linear":
        return config.learning_rate * max(0.0, (max_steps - index) / max(1, max_steps - warmup))
    share = (index - warmup) / max(1, max_steps - warmup)
    return config.learning_rate * max(0.0, 0.5 * (1.0 + math.cos(math.pi * 0.5 * 2.0 * share)))
