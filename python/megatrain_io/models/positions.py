"""How many positions a model has: a table of them ends, rotary ones go on beyond what was trained."""

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from transformers import PreTrainedConfig, PreTrainedModel

__all__ = ["Positions", "find_positions", "positions_text"]

_NAMES = (
    "max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length", "max_target_positions", "n_ctx",
    "seq_length",
)  # fmt: skip
_FEW, _MANY, _LOST_MAX = 16, 24, 4


@dataclass(frozen=True)
class Positions:
    """Where the number of positions of an architecture stands.

    Attributes:
        name: of the setting in the configuration.
        lost: positions of the table that no token gets (those of padding come first in some).
        is_bound: whether longer rows fail; else they only meet positions that were not trained.
        remembers: whether a longer row changes what later ones get ("dynamic" rotary tables grow with it): a resumed
            run does not know the rows of before.
    """

    name: str
    lost: int
    is_bound: bool
    remembers: bool = False

    def of(self, config: PreTrainedConfig) -> int | None:
        """The number for a model of this architecture; None where its configuration has none."""
        value = getattr(config.get_text_config(), self.name, None)
        return value - self.lost if isinstance(value, int) and value > self.lost else None


def find_positions(
    small: PreTrainedConfig, build: Callable[[PreTrainedConfig], PreTrainedModel]
) -> Positions | None:
    """Try rows that are longer than the configuration has positions on a small copy.

    Args:
        small: its configuration; it is not changed.
        build: makes the small copy.

    Returns:
        None where the configuration names no positions.
    """
    text_config = small.get_text_config()
    standard = getattr(text_config, "attribute_map", {})
    taken = {standard.get(name, name) for name in _NAMES}
    # A number that is not positive says that there is no bound (XLNet), and such a setting may refuse another.
    names = [
        name
        for name in _NAMES
        if name in taken and isinstance(value := getattr(text_config, name, None), int) and value > 0
    ]
    for name in names:
        config = copy.deepcopy(small)
        setattr(config.get_text_config(), name, _FEW)
        try:
            model = build(config).eval()
        except Exception:  # noqa: BLE001, S112 - a setting that others depend on
            continue
        fresh = copy.deepcopy(model)
        if _runs(model, _MANY):
            if not _same_scores(model, fresh, (_FEW + _MANY) // 2):
                return Positions(name, 0, is_bound=False, remembers=True)
            continue
        lost = next((lost for lost in range(_LOST_MAX + 1) if _runs(model, _FEW - lost)), None)
        if lost is not None:
            return Positions(name, lost, is_bound=True)
    return Positions(names[0], 0, is_bound=False) if names else None


def positions_text(positions: Positions, count: int, length: int, setting: str) -> str:
    """What to tell of rows that are longer than a model's positions.

    Args:
        positions: where their number stands.
        count: the number.
        length: tokens of a row.
        setting: the key that bounds rows; empty where they are the caller's own.
    """
    rows = f"{setting} is {length}" if setting else f"a row has {length} tokens"
    shorter = f"set {setting}={count} or less" if setting else f"give at most {count}"
    there = f"({positions.name} in config.json)"
    if positions.is_bound:
        return (
            f"{rows}, and the model has {count} positions {there}: longer rows cannot be computed; {shorter}"
        )
    if positions.remembers:
        return (
            f"{rows}, and the model has {count} positions {there}: a longer row changes the rotary table of "
            f"those after it, which a resumed run does not know; {shorter}"
        )
    return (
        f"{rows}, and the model was made for {count} positions {there}: what is behind them meets positions that it "
        f"has not learned; {shorter} to avoid that"
    )


@torch.no_grad()
def _runs(model: PreTrainedModel, length: int) -> bool:
    try:
        model(input_ids=torch.ones((1, length), dtype=torch.int64))
    except Exception:  # noqa: BLE001 - whatever its table says of a place that is not there
        return False
    return True


@torch.no_grad()
def _same_scores(used: PreTrainedModel, fresh: PreTrainedModel, length: int) -> bool:
    """Whether what passed before makes no difference."""
    # Of equal tokens attention makes the same sum wherever they are.
    tokens = 1 + torch.arange(length).unsqueeze(0) % 7
    scores = [model(input_ids=tokens, use_cache=False).logits for model in (used, fresh)]
    return torch.equal(*scores)
