"""A small configuration of the same architecture, for the probe to build with real weights.

Only names that the configurations of many families share are known here. Sizes shrink; whatever
chooses code (layer types, activations, biases, head size and rotary kind, tying) stays as it is.
"""

from itertools import accumulate
from typing import Any

from transformers import PreTrainedConfig

__all__ = ["shrink_config", "without_noise"]

_HEADS = 4
_HEAD_DIM = 32
_LAYERS_MIN = 3  # a first, a middle and a last block

# Upper bounds for values under their standard names ...
_CAPS = {
    "sliding_window": 4,
    "attention_chunk_size": 4,
    "max_window_layers": 1,
    "first_k_dense_replace": 1,
    "num_dense_layers": 1,
    "num_kv_shared_layers": 1,
    "num_experts_per_tok": 2,
    "num_shared_experts": 1,
    "n_shared_experts": 1,
    "zero_expert_num": 2,
    "n_group": 2,
    "topk_group": 1,
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "o_lora_rank": 32,
    "o_groups": 2,
    "index_n_heads": 4,
    "n_groups": 2,
    "mamba_n_groups": 2,
    "mamba_ngroups": 2,
    "attn_layer_period": 2,
    "attn_layer_offset": 1,
    "expert_layer_period": 2,
    "expert_layer_offset": 1,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "compress_rates": 4,
}
# ... and for all names that end like this.
_CAPS_BY_ENDING = {
    "vocab_size": 128,
    "vocab_size_per_layer_input": 128,
    "intermediate_size": 64,
    "intermediate_size_mlp": 64,
    "ffn_dim": 64,
    "ffn_hidden_size": 64,
    "n_inner": 64,
    "d_ff": 64,
    "state_size": 16,
    "d_state": 16,
    "chunk_size": 8,
    "experts": 8,
    "token_id": 0,
}
# Heads, their width, and what their product is a multiple of: the hidden size, or a width of its own.
_STATE_SPACES = (
    ("num_heads", "head_dim", "expand", "hidden_size"),
    ("mamba_num_heads", "mamba_head_dim", "expand", "hidden_size"),
    ("mamba_n_heads", "mamba_d_head", "mamba_expand", "hidden_size"),
    ("n_mamba_heads", "mamba_headdim", "mamba_expand", "hidden_size"),
    ("mamba_n_heads", "mamba_d_head", None, "mamba_d_ssm"),
)
_STATE_SPACE_WIDTH = 64
_LATENT_HIDDEN_SIZE = 256
_KEY_VALUE_HEADS = ("num_key_value_heads", "num_kv_heads")
_HEADS_OF_HALVES = ("encoder_attention_heads", "decoder_attention_heads")
# The number of layers, where num_hidden_layers is not a setting of its own.
_LAYER_COUNTS = ("num_hidden_layers", "num_layers", "n_layers", "n_layer")
_TEXT = ("text_config", "llm_config", "thinker_config")
# Lists of the numbers of layers that are of some kind.
_LAYER_NUMBERS = (
    "layer_ids", "layer_indices", "layer_idxs", "only_layers", "moe_layers", "cross_attention_layers",
)  # fmt: skip
_NOISE = ("drop", "jitter")
_LIKE_HIDDEN_SIZE = ("size", "dim", "width", "model")


def shrink_config(config: PreTrainedConfig, *, of_each_kind: int = 1) -> PreTrainedConfig:
    """Reduce `config` to a few layers, heads, experts and tokens, with dropout 0; `config` stays as it is.

    Where layers differ by a list in the configuration (layer types, sliding windows, numbers of layers), layers of each
    kind are kept, ``of_each_kind`` of them.

    Raises:
        ValueError: the configuration class does not take the smaller values.
    """
    return type(config).from_dict(_shrink_values(config.to_dict(), type(config), of_each_kind))


def without_noise(config: PreTrainedConfig) -> PreTrainedConfig:
    """The same configuration with dropout and its like 0; ``config`` stays as it is."""
    return type(config).from_dict(_still(config.to_dict()))


def _still(values: dict[str, Any]) -> dict[str, Any]:
    return {
        name: _still(value)
        if isinstance(value, dict)
        else type(value)(0)
        if _is_noise(name, value)
        else value
        for name, value in values.items()
    }


def _is_noise(name: str, value: Any) -> bool:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and any(noise in name for noise in _NOISE)


def _shrink_values(
    values: dict[str, Any],
    config_class: type[PreTrainedConfig],
    of_each_kind: int,
    text_size: tuple[int | None, int | None] = (None, None),
) -> dict[str, Any]:
    """Shrink a configuration; ``text_size`` is the hidden size of the text model beside it, and the small one."""
    # A sub-configuration may be declared as AutoConfig, which has neither.
    standard_names = {own: name for name, own in getattr(config_class, "attribute_map", {}).items()}
    sub_configs = getattr(config_class, "sub_configs", {})
    named = {standard_names.get(key, key): value for key, value in values.items()}
    sizes = _head_sizes(named)
    count_name = next((name for name in _LAYER_COUNTS if isinstance(named.get(name), int)), "")
    count = named.get(count_name)
    groups = _layer_groups(named, count_name)
    layers = _layers_to_keep(named, count, of_each_kind, groups)
    sizes |= {name: kept for name, (kept, _) in groups.items()}
    for key in _TEXT:
        if isinstance(values.get(key), dict) and key in sub_configs:
            text_size = values[key].get("hidden_size"), _head_sizes(values[key]).get("hidden_size")
    small: dict[str, Any] = {}
    for key, value in values.items():
        name = standard_names.get(key, key)
        if isinstance(value, dict) and key in sub_configs:
            small[key] = _shrink_values(value, sub_configs[key], of_each_kind, text_size)
        elif isinstance(value, dict) and key == "per_layer_config":
            small[key] = _shrink_overrides(value, sizes, layers)
        elif name in sizes:
            small[key] = sizes[name]
        elif name == count_name:
            small[key] = len(layers)
        elif _are_layer_numbers(name, value):
            small[key] = [layers.index(layer) for layer in value if layer in layers]
        elif isinstance(value, list) and len(value) == count:
            small[key] = [value[layer] for layer in layers]
        else:
            own = named.get("hidden_size"), sizes.get("hidden_size")
            small[key] = _shrink_value(name, value, *(own if value == own[0] else text_size))
    return small


def _shrink_value(name: str, value: Any, hidden_size: int | None, small_hidden_size: int | None) -> Any:
    if isinstance(value, bool) or not isinstance(value, int | float):
        if isinstance(value, dict) and name in _CAPS:
            return {key: min(each, _CAPS[name]) for key, each in value.items()}
        return [0] if isinstance(value, list) and name.endswith("token_id") else value
    if _is_noise(name, value):
        return type(value)(0)
    if not isinstance(value, int):
        return value
    if value == hidden_size and small_hidden_size is not None and name.endswith(_LIKE_HIDDEN_SIZE):
        return small_hidden_size
    caps = [cap for ending, cap in _CAPS_BY_ENDING.items() if name.endswith(ending)]
    return min([value, _CAPS[name]] if name in _CAPS else [value, *caps])


def _shrink_overrides(
    overrides: dict[str, dict[str, Any]], sizes: dict[str, int], layers: list[int]
) -> dict[int, Any]:
    """The overrides of single layers, shrunk and renumbered, for the layers that are kept."""
    return {
        layers.index(int(layer)): {
            name: sizes.get(name, _shrink_value(name, value, None, None)) for name, value in values.items()
        }
        for layer, values in overrides.items()
        if int(layer) in layers
    }


def _head_sizes(named: dict[str, Any]) -> dict[str, int]:
    """Few heads, grouped as before, and a hidden size that they fill."""
    heads, hidden_size = named.get("num_attention_heads"), named.get("hidden_size")
    if not isinstance(hidden_size, int):
        return {}
    if not isinstance(heads, int):
        small = min(hidden_size, _HEADS * _HEAD_DIM)
        return {"hidden_size": small, **_state_space_sizes(named, small)}
    sizes = {}
    head_dim = named.get("head_dim") or hidden_size // heads
    if not _rotary_is_per_dimension(named):
        head_dim = min(head_dim, max(_HEAD_DIM, named.get("rotary_dim") or 0))
        if named.get("head_dim") is not None:
            sizes["head_dim"] = head_dim
    few = min(heads, _HEADS)
    for name in _KEY_VALUE_HEADS:
        key_value_heads = named.get(name)
        if isinstance(key_value_heads, int):
            sizes[name] = few if key_value_heads == heads else min(key_value_heads, _HEADS // 2)
    sizes |= {name: few for name in _HEADS_OF_HALVES if isinstance(named.get(name), int)}
    sizes["num_attention_heads"] = few
    if named.get("d_head") == hidden_size // heads:
        sizes["d_head"] = head_dim
    small = min(hidden_size, few * head_dim)
    if "qk_rope_head_dim" in named:
        small = min(small, _LATENT_HIDDEN_SIZE)  # heads are as wide as they please there
    sizes["hidden_size"] = small
    wide = named.get("attention_hidden_size")
    if isinstance(wide, int) and wide % hidden_size == 0:
        sizes["attention_hidden_size"] = wide // hidden_size * small
    return sizes | _state_space_sizes(named, small)


def _state_space_sizes(named: dict[str, Any], small_hidden_size: int) -> dict[str, int]:
    """Few heads of state spaces, that fill what they filled before."""
    sizes: dict[str, int] = {}
    for heads_name, dim_name, expand_name, width_name in _STATE_SPACES:
        heads, dim, width = (_int(named.get(name)) for name in (heads_name, dim_name, width_name))
        expand = 1 if expand_name is None else _int(named.get(expand_name))
        if not heads * dim * width or heads * dim != expand * width:
            continue
        is_hidden = width_name == "hidden_size"
        small = small_hidden_size if is_hidden else min(width, _STATE_SPACE_WIDTH)
        dim = min(dim, _HEAD_DIM)
        sizes |= {heads_name: expand * small // dim, dim_name: dim}
        if not is_hidden:
            sizes[width_name] = small
    return sizes


def _int(value: Any) -> int:
    return value if isinstance(value, int) else 0


def _rotary_is_per_dimension(named: dict[str, Any]) -> bool:
    """Whether head dimensions are split by further numbers (latent attention) or listed (LongRoPE)."""
    return "qk_rope_head_dim" in named or "[" in str(named.get("rope_parameters"))


def _layer_groups(named: dict[str, Any], count_name: str) -> dict[str, tuple[int, int]]:
    """Numbers of layers that follow each other and are all layers together: how many are kept, and there are."""
    groups = {
        name: value
        for name, value in named.items()
        if name != count_name and name.endswith("_layers") and isinstance(value, int) and value > 0
    }
    if len(groups) < 2 or sum(groups.values()) != named.get(count_name):  # noqa: PLR2004 - one is no division
        return {}
    # Where all are even, pairs of layers may be what counts.
    kept = 2 if all(value % 2 == 0 for value in groups.values()) else 1
    return {name: (min(kept, value), value) for name, value in groups.items()}


def _layers_to_keep(
    named: dict[str, Any], count: Any, of_each_kind: int, groups: dict[str, tuple[int, int]]
) -> list[int]:
    """Indices of the first layers of each kind, the last layer, and some more if these are few."""
    if not isinstance(count, int):
        return []
    if groups:
        starts = [0, *accumulate(total for _, total in groups.values())]
        return [
            start + layer
            for start, (kept, _) in zip(starts, groups.values(), strict=False)
            for layer in range(kept)
        ]
    lists = [
        value
        for name, value in named.items()
        if isinstance(value, list) and len(value) == count and not _are_layer_numbers(name, value)
    ]
    chosen = [value for name, value in named.items() if _are_layer_numbers(name, value)]
    kinds: dict[str, list[int]] = {}
    for layer in range(count):
        kind = str([[values[layer] for values in lists], [layer in numbers for numbers in chosen]])
        kinds.setdefault(kind, []).append(layer)
    # Hybrid layers have the parameters of this many blocks in common: two of each show that.
    of_hybrids = 2 * _int(named.get("num_mem_blocks", 1))
    keep = {count - 1}
    for kind, same in kinds.items():
        keep |= {*same[: max(of_each_kind, of_hybrids if "'hybrid'" in kind else 0)]}
    for layer in range(count):
        if len(keep) >= _LAYERS_MIN:
            break
        keep.add(layer)
    return sorted(keep)


def _are_layer_numbers(name: str, value: Any) -> bool:
    return name.endswith(_LAYER_NUMBERS) and isinstance(value, list) and len(value) > 0
