"""Bounds on the numbers of a config.json, which a stranger wrote: looked at before anything is built by them."""

import math
from collections.abc import Iterator
from typing import Any

from megatrain_io.errors import ModelFilesError

__all__ = ["PARAMETERS_MAX", "refuse_numbers"]

PARAMETERS_MAX = 1 << 43
"""Most parameters of a model: a store has room for twice as many."""

_LAYERS_MAX = 2048
_EXPERTS_MAX = 1 << 14
_LABELS_MAX = 1 << 20
_SIZE_MAX = 2**31 - 1
_ENTRIES_MAX = 1 << 16
_DEPTH_MAX = 32
_SHOWN_MAX = 10**24
_AT_LEAST_ONE = (
    "num_hidden_layers",
    "n_layer",
    "hidden_size",
    "n_embd",
    "vocab_size",
    "num_attention_heads",
    "n_head",
)
_LAYERS = ("layers", "n_layer", "num_blocks")
_EXPERTS = ("experts",)
# What a size is called, in the configurations of many families.
_SIZES = (
    "size", "dim", "heads", "head", "rank", "groups", "positions", "embeddings", "inner", "width", "window", "length",
    "kernel", "state", "n_embd", "n_ctx", "d_model", "d_ff", "d_kv", "expand", "_len",
)  # fmt: skip
_PROBABILITIES = ("dropout", "pdrop", "drop", "drop_rate", "dropout_rate", "layerdrop", "dropout_prob")


def refuse_numbers(config: dict[str, Any], where: str) -> None:
    """Refuse numbers that no model has, and that would take minutes, or all memory, to build; and nesting without end.

    Args:
        config: content of a config.json.
        where: its path, for the message.

    Raises:
        ModelFilesError: the message names key, value and bound.
    """
    _refuse_depth(config, where)
    for name, value in _numbers(config):
        least, most = _bounds(name, value)
        if not least <= value <= most:
            bound = f"at least {max(least, 0):,}" if value < least else f"at most {most:,}"
            raise ModelFilesError(
                f"{where}: {name} is {_shown(value)}, and a model has {bound}: fetch config.json again, or correct it"
            )
    for part in _objects(config):
        for name, value in part.items():
            if isinstance(value, list) and len(value) > _ENTRIES_MAX:
                raise ModelFilesError(
                    f"{where}: {name} has {len(value):,} entries, at most {_ENTRIES_MAX:,} are read: fetch config.json "
                    "again, or correct it"
                )
        layers, experts = _most(part, _LAYERS), _most(part, _EXPERTS)
        if layers * experts > 1 << 20:
            raise ModelFilesError(
                f"{where}: {layers:,} layers with {experts:,} experts each are more than any model has: at most "
                f"{1 << 20:,} experts in all are built"
            )


def _refuse_depth(config: dict[str, Any], where: str) -> None:
    """Refuse what copying a configuration, which is recursive, would not come to the end of."""
    level: list[Any] = [config]
    for _ in range(_DEPTH_MAX):
        inside = [part.values() if isinstance(part, dict) else part for part in level]
        level = [value for values in inside for value in values if isinstance(value, dict | list)]
        if not level:
            return
    raise ModelFilesError(
        f"{where}: its entries are nested more than {_DEPTH_MAX} deep, and those of no model are: fetch config.json "
        "again, or correct it"
    )


def _objects(config: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The configuration, and those of its parts."""
    waiting = [config]
    while waiting:
        part = waiting.pop()
        yield part
        waiting += [value for value in part.values() if isinstance(value, dict)]


def _numbers(config: dict[str, Any]) -> Iterator[tuple[str, int | float]]:
    for part in _objects(config):
        for name, value in part.items():
            for each in value[:_ENTRIES_MAX] if isinstance(value, list) else [value]:
                if isinstance(each, int | float) and not isinstance(each, bool):
                    yield name, each


def _bounds(name: str, value: float) -> tuple[int | float, int | float]:
    """The least and the most that a number of this name may be; -1 often stands for none."""
    if name.endswith(_PROBABILITIES):
        return 0, 1
    if not isinstance(value, int) and name not in _AT_LEAST_ONE:
        return -math.inf, math.inf
    kinds = (
        (_LAYERS, _LAYERS_MAX),
        (_EXPERTS, _EXPERTS_MAX),
        (("num_labels",), _LABELS_MAX),
        (_SIZES, _SIZE_MAX),
    )
    most = next((most for endings, most in kinds if name.endswith(endings)), None)
    if most is None:
        return (1 if name in _AT_LEAST_ONE else -math.inf), math.inf
    return (1 if name in _AT_LEAST_ONE else -1), most


def _most(part: dict[str, Any], endings: tuple[str, ...]) -> int:
    values = [value for name, value in part.items() if name.endswith(endings) and isinstance(value, int)]
    return max(values, default=0)


def _shown(value: float) -> str:
    if isinstance(value, int):
        return f"{value:,}" if abs(value) < _SHOWN_MAX else f"a number of {len(str(value)):,} digits"
    return f"{value:g}"
