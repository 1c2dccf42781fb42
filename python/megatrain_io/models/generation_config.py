"""generation_config.json of a model folder: which tokens end what is generated."""

import json
from collections.abc import Iterable, Mapping
from typing import Any

from transformers import CONFIG_MAPPING

__all__ = ["end_tokens", "takes_several_ends", "with_end_tokens"]

# What transformers takes from config.json where there is no generation_config.json.
_TAKEN = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")


def end_tokens(value: Any) -> list[int]:
    """The tokens of an ``eos_token_id``, which is a number or a list of them; none where it is anything else."""
    values = value if isinstance(value, list) else [value]
    return [token for token in values if isinstance(token, int) and not isinstance(token, bool)]


def takes_several_ends(model_type: object) -> bool:
    """Whether a configuration may have a list as ``eos_token_id``: some types of transformers take a number alone."""
    try:
        kind: Any = CONFIG_MAPPING[str(model_type)]
        kind(eos_token_id=[0, 1])
    except KeyError:  # of another version: not known
        return True
    except Exception:  # noqa: BLE001 - whatever a configuration says of it
        return False
    return True


def with_end_tokens(generation: str | None, config: Mapping[str, Any], tokens: Iterable[int]) -> str | None:
    """Content of generation_config.json where tokens end what is generated, beside those that do already.

    Args:
        generation: its content; None where it is not there.
        config: content of config.json.
        tokens: that are to end it.

    Returns:
        The new content; None where nothing is to be changed.
    """
    try:
        content = json.loads(generation or "null")
    except (ValueError, RecursionError):
        content = None
    text = config.get("text_config")
    nested: Mapping[str, Any] = text if isinstance(text, Mapping) else {}
    if not isinstance(content, dict):
        content = {
            name: value for name in _TAKEN if (value := config.get(name, nested.get(name))) is not None
        }
    before = end_tokens(content.get("eos_token_id", config.get("eos_token_id", nested.get("eos_token_id"))))
    more = [token for token in dict.fromkeys(tokens) if token not in before]
    if not more:
        return None
    ends = [*before, *more]
    return json.dumps({**content, "eos_token_id": ends if len(ends) > 1 else ends[0]}, indent=2) + "\n"
