"""Families of models in GGUF files: their configuration and the places of their tensors, both ways.

A GGUF file has a configuration in llama.cpp's words, and leaves to llama.cpp what it computes by the architecture's
name. What is read is all that the file says: a key that is not known here is refused, not passed over. What is written
is what llama.cpp computes as transformers does; a setting that it would not follow is refused.
"""

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np
from transformers import PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from megatrain_io.errors import ModelFilesError, UnsupportedModelError
from megatrain_io.models.gguf_file import GgufFile, Value, gguf_library

__all__ = ["SIDE_TENSORS", "GgufModel", "GgufSource", "config_in", "model_for", "sources_of"]

Shape = tuple[int, ...]
_EXPERT = re.compile(r"\.experts\.(\d+)\.")
# What no weight depends on.
_IGNORED = {"vocab_size", "tensor_data_layout", "rope.scaling.finetuned", "expert_group_count"}
_LONG, _SHORT, _FACTORS = "rope_factors_long.weight", "rope_factors_short.weight", "rope_freqs.weight"
SIDE_TENSORS = frozenset({_LONG, _SHORT, _FACTORS})
"""Tensors of a file that belong to its configuration."""
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
_GEMMA3_LOCAL_THETA = 10000.0
# Of these sizes llama.cpp knows by the number of layers that they scale attention otherwise.
_SCALED_BY_WIDTH = {"gemma2": 46, "gemma3": 62}
_PATTERN = {"gemma2": 2, "gemma3": 6}


@dataclass(frozen=True)
class GgufSource:
    """Where a tensor of a model folder lies in a GGUF file.

    Attributes:
        name: of the tensor in the file.
        first: element of it with which the tensor begins: experts are one tensor in the file.
        head: rows of an attention head whose two halves lie row by row in turn in the file; 0 = rows are as they are.
        shift: what is added to each value in the file.
    """

    name: str
    first: int = 0
    head: int = 0
    shift: float = 0.0


@dataclass(frozen=True)
class GgufModel:
    """A configuration in llama.cpp's words.

    Attributes:
        architecture: its name there.
        metadata: keys and values, without those of the tokenizer.
        tensors: small ones that belong to the configuration: factors of rotary frequencies.
        notes: sentences for the person: where llama.cpp computes otherwise.
    """

    architecture: str
    metadata: dict[str, Value]
    tensors: dict[str, list[float]]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Family:
    """What one architecture of llama.cpp is.

    Attributes:
        model_type: of transformers, in which it is read.
        read: the configuration that a file has.
        interleaved: whether rows of queries and keys lie in another order in the file.
        shift: what is added to the weights of norms in the file.
        written_for: model types that are written as this architecture.
        write: what a configuration is in the file.
    """

    model_type: str
    read: "Callable[[_Keys], dict[str, Any]]"
    interleaved: bool = False
    shift: float = 0.0
    written_for: tuple[str, ...] = ()
    write: "Callable[[PreTrainedConfig, _Written], None] | None" = None


# ------------------------------------------------------------------------------------------- reading


class _Keys:
    """The keys of a file's architecture, each read once: what is left is not understood."""

    def __init__(self, file: GgufFile, architecture: str) -> None:
        self.file, self._prefix = file, architecture + "."
        self._left = {
            key.removeprefix(self._prefix): value
            for key, value in file.metadata.items()
            if key.startswith(self._prefix)
        }
        self._read: dict[str, Any] = {}

    def whole(self, name: str, default: int | None = None) -> int:
        """A number of things."""
        value = self._take(name, default)
        if type(value) is not int or value < 0:
            self._refuse(name, value, "a whole number")
        return value

    def real(self, name: str, default: float | None = None) -> float:
        """A real number, as it was before it was rounded to fp32."""
        value = self._take(name, default)
        if type(value) not in {int, float} or not math.isfinite(value):
            self._refuse(name, value, "a number")
        return float(str(np.float32(value))) if isinstance(value, float) else float(value)

    def text(self, name: str, default: str) -> str:
        """A word."""
        value = self._take(name, default)
        if not isinstance(value, str):
            self._refuse(name, value, "a word")
        return value

    def has(self, name: str) -> bool:
        """Whether the file has this key."""
        return name in self._left or name in self._read

    def refuse(self, reason: str) -> NoReturn:
        """Refuse what would train something else than the file's model."""
        raise UnsupportedModelError(f"{self.file.path}: {reason}")

    def refuse_others(self) -> None:
        """Refuse keys that nothing here has read: they may change what the model computes."""
        others = [self._prefix + name for name in self._left if name not in _IGNORED]
        if others:
            shown = ", ".join(others[:3]) + (", ..." if len(others) > 3 else "")  # noqa: PLR2004
            self.refuse(
                f"it has settings that are not known here ({shown}), so its model might be another one than would be "
                "trained: import the model from its safetensors folder"
            )

    def _take(self, name: str, default: Any) -> Any:
        if name in self._left:
            self._read[name] = self._left.pop(name)
        value = self._read.get(name, default)
        if value is None:
            raise ModelFilesError(
                f"{self.file.path} has no {self._prefix}{name}, which its model needs: convert it again"
            )
        return value

    def _refuse(self, name: str, value: object, what: str) -> NoReturn:
        text = repr(value)
        shown = text if len(text) <= 60 else f"{text[:57]}..."  # noqa: PLR2004 - of a line
        raise ModelFilesError(f"{self.file.path}: {self._prefix}{name} is {shown}, and {what} is needed")


def config_in(file: GgufFile) -> dict[str, Any]:
    """Content of the config.json of the model in a file.

    Raises:
        ModelFilesError: a key is missing, or not what it must be.
        UnsupportedModelError: its architecture or a setting is not known here.
    """
    architecture = file.metadata.get("general.architecture")
    family = _FAMILIES.get(architecture) if isinstance(architecture, str) else None
    if family is None or not isinstance(architecture, str):
        raise UnsupportedModelError(
            f"{file.path} is of the architecture {architecture!r}; read are {', '.join(sorted(_FAMILIES))}: import "
            "the model from its safetensors folder"
        )
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None:
        raise ModelFilesError(f"{file.path} has no token_embd.weight: it is not a whole language model")
    keys = _Keys(file, architecture)
    layers = keys.whole("block_count")
    if layers > len(file.tensors):
        raise ModelFilesError(
            f"{file.path} claims {layers:,} layers and has {len(file.tensors):,} tensors: fetch it again"
        )
    config = {
        "architectures": [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[family.model_type]],
        "model_type": family.model_type,
        "dtype": _dtype_of(file),
        "vocab_size": embedding.shape[0],
        "num_hidden_layers": layers,
        "tie_word_embeddings": "output.weight" not in file.tensors,
        **family.read(keys),
    }
    keys.refuse_others()
    return config


def _dtype_of(file: GgufFile) -> str:
    types = {tensor.type for tensor in file.tensors.values()}
    if not types <= {"F32", "F16", "BF16"}:
        return "float32"
    return "bfloat16" if "BF16" in types else "float16" if "F16" in types else "float32"


def _dense(keys: _Keys) -> dict[str, Any]:
    heads = keys.whole("attention.head_count")
    hidden = keys.whole("embedding_length")
    if not heads or not hidden:
        raise ModelFilesError(f"{keys.file.path} claims {heads} attention heads and a width of {hidden}")
    return {
        "hidden_size": hidden,
        "intermediate_size": keys.whole("feed_forward_length"),
        "num_attention_heads": heads,
        "num_key_value_heads": keys.whole("attention.head_count_kv", heads),
        "max_position_embeddings": keys.whole("context_length"),
        "rms_norm_eps": keys.real("attention.layer_norm_rms_epsilon"),
    }


def _head_dim(keys: _Keys, config: dict[str, Any]) -> int:
    """Elements of a head; the whole of it is rotated."""
    default = config["hidden_size"] // config["num_attention_heads"]
    head = keys.whole("attention.key_length", default)
    sizes = {head, keys.whole("attention.value_length", head), keys.whole("rope.dimension_count", head)}
    if len(sizes) > 1 or not head:
        keys.refuse(f"keys, values and rotary part of a head have different sizes ({sorted(sizes)})")
    return head


def _rope(keys: _Keys, theta: float | None = None) -> dict[str, Any]:
    """Parameters of the rotary positions."""
    rope: dict[str, Any] = {
        "rope_type": "default",
        "rope_theta": keys.real("rope.freq_base", theta or 10000.0),
    }
    kind = keys.text("rope.scaling.type", "none")
    if keys.has("rope.scale_linear"):
        kind, factor = "linear", keys.real("rope.scale_linear")
    else:
        factor = keys.real("rope.scaling.factor", 0.0)
    if kind == "none":
        return rope
    if kind not in {"linear", "yarn"} or not factor > 0:
        keys.refuse(f"its rotary positions are scaled by {kind!r} and {factor:g}: linear and yarn are read")
    rope |= {"rope_type": kind, "factor": factor}
    if kind == "yarn":
        rope["original_max_position_embeddings"] = keys.whole("rope.scaling.original_context_length")
    elif keys.has("rope.scaling.original_context_length"):
        keys.whole("rope.scaling.original_context_length")
    return rope


def _read_llama(keys: _Keys) -> dict[str, Any]:
    if keys.has("expert_count") and keys.whole("expert_count"):
        keys.refuse("it is a mixture of experts of the architecture 'llama', which is not read")
    for name in ("expert_used_count", "expert_count"):
        keys.whole(name, 0)
    config = _dense(keys)
    rotary = keys.whole("rope.dimension_count", config["hidden_size"] // config["num_attention_heads"])
    keys.whole("attention.key_length", rotary)
    head = _head_dim(keys, config)
    rope = _rope(keys)
    if _FACTORS in keys.file.tensors:
        rope = _llama3_of(keys, rope, head)
    biased = "blk.0.attn_q.bias" in keys.file.tensors
    return config | {
        "head_dim": head,
        "rope_parameters": rope,
        "attention_bias": biased,
        "mlp_bias": "blk.0.ffn_gate.bias" in keys.file.tensors,
    }


def _llama3_of(keys: _Keys, rope: dict[str, Any], head: int) -> dict[str, Any]:
    """The parameters that make the factors of rotary frequencies that the file has."""
    factors = _values_of(keys.file, _FACTORS)
    found = rope | _LLAMA3 | {"rope_type": "llama3", "factor": max(factors, default=0.0)}
    expected = _llama3_factors(found, head) if found["factor"] >= 1 else []
    if rope["rope_type"] != "default" or not _close(factors, expected):
        keys.refuse(
            f"its {_FACTORS} are not those of Llama 3 (original context 8192, factors 1 and 4), the only ones that "
            "are read"
        )
    return found


def _llama3_factors(rope: Mapping[str, Any], head: int) -> list[float]:
    """By what each rotary frequency is divided, as transformers' ``llama3`` does it."""
    original, factor = rope["original_max_position_embeddings"], rope["factor"]
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    factors = []
    for index in range(0, head, 2):
        wavelength = 2 * math.pi * rope["rope_theta"] ** (index / head)
        if wavelength < original / high:
            factors.append(1.0)
        elif wavelength > original / low:
            factors.append(float(factor))
        else:
            smooth = (original / wavelength - low) / (high - low)
            factors.append(1 / ((1 - smooth) / factor + smooth))
    return factors


def _read_qwen2(keys: _Keys) -> dict[str, Any]:
    config = _dense(keys)
    if (head := _head_dim(keys, config)) * config["num_attention_heads"] != config["hidden_size"]:
        keys.refuse(f"its heads of {head} do not make up its width of {config['hidden_size']}")
    return config | {"rope_parameters": _rope(keys), "use_sliding_window": False}


def _read_qwen3(keys: _Keys) -> dict[str, Any]:
    config = _dense(keys)
    return config | {
        "head_dim": _head_dim(keys, config),
        "rope_parameters": _rope(keys),
        "attention_bias": False,
        "use_sliding_window": False,
    }


def _experts(keys: _Keys) -> dict[str, Any]:
    return {
        "num_experts": keys.whole("expert_count"),
        "num_experts_per_tok": keys.whole("expert_used_count"),
        "moe_intermediate_size": keys.whole("expert_feed_forward_length"),
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }


def _read_qwen2_moe(keys: _Keys) -> dict[str, Any]:
    shared = keys.whole("expert_shared_feed_forward_length")
    # llama.cpp does not make the weights of the chosen experts add up to 1 here, and does so for Qwen 3.
    more = {"shared_expert_intermediate_size": shared, "norm_topk_prob": False}
    return _read_qwen2(keys) | _experts(keys) | more


def _read_qwen3_moe(keys: _Keys) -> dict[str, Any]:
    return _read_qwen3(keys) | _experts(keys) | {"norm_topk_prob": True}


def _read_phi3(keys: _Keys) -> dict[str, Any]:
    config = _dense(keys)
    head = config["hidden_size"] // config["num_attention_heads"]
    rotary = keys.whole("rope.dimension_count", head)
    original = keys.whole("rope.scaling.original_context_length", config["max_position_embeddings"])
    rope: dict[str, Any] = {
        "rope_type": "default",
        "rope_theta": keys.real("rope.freq_base", 10000.0),
        "partial_rotary_factor": rotary / head,
    }
    attention = keys.real("rope.scaling.attn_factor", 1.0)
    if _LONG in keys.file.tensors:
        rope |= {
            "rope_type": "longrope",
            "long_factor": _values_of(keys.file, _LONG),
            "short_factor": _values_of(keys.file, _SHORT),
        }
        if not math.isclose(
            attention, _longrope_factor(config["max_position_embeddings"], original), rel_tol=1e-6
        ):
            rope["attention_factor"] = attention
    elif not math.isclose(attention, 1.0):
        keys.refuse(f"it scales attention by {attention:g}, and has no {_LONG}")
    return config | {
        "rope_parameters": rope,
        "partial_rotary_factor": rotary / head,
        "original_max_position_embeddings": original,
        "sliding_window": keys.whole("attention.sliding_window", 0) or None,
    }


def _longrope_factor(longest: int, original: int) -> float:
    scale = longest / original
    return math.sqrt(1 + math.log(scale) / math.log(original)) if scale > 1 else 1.0


def _read_gemma(keys: _Keys, kind: str) -> dict[str, Any]:
    config = _dense(keys)
    head = _head_dim(keys, config)
    layers = keys.whole("block_count")
    by_width = layers == _SCALED_BY_WIDTH[kind]
    pattern = keys.whole("attention.sliding_window_pattern", _PATTERN[kind])
    if pattern < 1:
        keys.refuse(f"its sliding_window_pattern is {pattern}")
    return config | {
        "head_dim": head,
        "query_pre_attn_scalar": config["hidden_size"] // config["num_attention_heads"] if by_width else head,
        "sliding_window": keys.whole("attention.sliding_window", 4096),
        "layer_types": _layer_types(layers, pattern),
    }


def _layer_types(layers: int, pattern: int) -> list[str]:
    return ["sliding_attention" if (layer + 1) % pattern else "full_attention" for layer in range(layers)]


def _read_gemma2(keys: _Keys) -> dict[str, Any]:
    return _read_gemma(keys, "gemma2") | {
        "rope_parameters": _rope(keys),
        "attn_logit_softcapping": keys.real("attn_logit_softcapping", 50.0),
        "final_logit_softcapping": keys.real("final_logit_softcapping", 30.0),
    }


def _read_gemma3(keys: _Keys) -> dict[str, Any]:
    local = keys.real("rope.freq_base_swa", _GEMMA3_LOCAL_THETA)
    capped = keys.real("final_logit_softcapping", 0.0)
    return _read_gemma(keys, "gemma3") | {
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": local},
            "full_attention": _rope(keys, 1e6),
        },
        "final_logit_softcapping": capped or None,
    }


def _values_of(file: GgufFile, name: str) -> list[float]:
    """The fp32 values of a small tensor, as they were before they were rounded to fp32."""
    tensor = file.tensors.get(name)
    if tensor is None or tensor.type != "F32" or tensor.elements > 1 << 12:
        raise ModelFilesError(f"{file.path} has no {name} in F32 that could be read: fetch it again")
    values = np.frombuffer(file.read(tensor, 0, tensor.elements), dtype="<f4")
    if not np.isfinite(values).all():
        raise ModelFilesError(f"{file.path}: {name} has values that are not finite: fetch it again")
    return [float(str(value)) for value in values]


def _close(values: Iterable[float], expected: Iterable[float]) -> bool:
    there, wanted = [*values], [*expected]
    return len(there) == len(wanted) and all(
        math.isclose(a, b, rel_tol=1e-5) for a, b in zip(there, wanted, strict=True)
    )


# ------------------------------------------------------------------------------------------- places


def sources_of(
    architecture: str, config: PreTrainedConfig, shapes: Mapping[str, Shape]
) -> dict[str, GgufSource]:
    """Where each tensor of a model folder lies in a GGUF file.

    Args:
        architecture: in llama.cpp's words.
        config: of the model.
        shapes: of the tensors of its folder, by name.

    Raises:
        UnsupportedModelError: the library gguf has no name for one.
    """
    library, family = gguf_library(), _FAMILIES[architecture]
    arch = next(key for key, name in library.MODEL_ARCH_NAMES.items() if name == architecture)
    names = library.get_tensor_name_map(arch, config.num_hidden_layers)
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    found = {}
    for name, shape in shapes.items():
        stem, _, suffix = name.rpartition(".")
        expert = _EXPERT.search(name)
        place = names.get_name(_EXPERT.sub(".experts.", stem))
        if place is None or suffix not in {"weight", "bias"}:
            raise UnsupportedModelError(f"{name} of a {config.model_type} has no name in GGUF")
        is_rotary = place.endswith((".attn_q", ".attn_k"))
        is_norm = place.endswith("norm") and suffix == "weight"
        found[name] = GgufSource(
            f"{place}.{suffix}",
            first=int(expert[1]) * math.prod(shape) if expert else 0,
            head=head if family.interleaved and is_rotary else 0,
            shift=family.shift if is_norm else 0.0,
        )
    return found


# ------------------------------------------------------------------------------------------- writing


class _Written:
    """What is written of a configuration, under the architecture's name."""

    def __init__(self, config: PreTrainedConfig, architecture: str) -> None:
        self.config, self._prefix = config, architecture + "."
        self.metadata: dict[str, Value] = {}
        self.tensors: dict[str, list[float]] = {}
        self.notes: list[str] = []

    def add(self, **values: Value) -> None:
        """Keys by name: two underscores stand for a dot."""
        for name, value in values.items():
            self.metadata[self._prefix + name.replace("__", ".")] = value

    def require(self, is_so: bool, what: str) -> None:  # noqa: FBT001
        """Refuse a setting that llama.cpp would not follow."""
        if not is_so:
            raise UnsupportedModelError(
                f"{self.config.model_type}: {what}, which llama.cpp does not compute for {self._prefix[:-1]}: the "
                "model cannot be written as GGUF. Export the model folder instead (without --to)"
            )


def model_for(config: PreTrainedConfig) -> GgufModel:
    """What a configuration is in a GGUF file.

    Raises:
        UnsupportedModelError: llama.cpp would compute something else, or the family is not written.
    """
    by_type = {
        model_type: architecture
        for architecture, family in _FAMILIES.items()
        for model_type in family.written_for
    }
    architecture = by_type.get(config.model_type)
    if architecture is None:
        raise UnsupportedModelError(
            f"{config.model_type} is not written as GGUF; written are {', '.join(sorted(by_type))}. Export the model "
            "folder (without --to), and convert that with llama.cpp's convert_hf_to_gguf.py"
        )
    written = _Written(config, architecture)
    written.add(
        vocab_size=config.vocab_size,
        context_length=config.max_position_embeddings,
        embedding_length=config.hidden_size,
        block_count=config.num_hidden_layers,
        feed_forward_length=config.intermediate_size,
        attention__head_count=config.num_attention_heads,
        attention__head_count_kv=config.num_key_value_heads or config.num_attention_heads,
        attention__layer_norm_rms_epsilon=float(config.rms_norm_eps),
    )
    activation = getattr(config, "hidden_activation", None) or config.hidden_act
    wanted = "gelu_pytorch_tanh" if architecture.startswith("gemma") else "silu"
    written.require(activation == wanted, f"it activates by {activation!r}")
    write = _FAMILIES[architecture].write
    if write is not None:
        write(config, written)
    return GgufModel(architecture, written.metadata, written.tensors, tuple(written.notes))


def _head_of(config: PreTrainedConfig) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _write_head(config: PreTrainedConfig, out: _Written) -> int:
    head = _head_of(config)
    out.add(attention__key_length=head, attention__value_length=head)
    return head


def _write_rope(rope: Mapping[str, Any], out: _Written) -> None:
    kind = rope.get("rope_type", "default")
    out.add(rope__freq_base=float(rope["rope_theta"]))
    factors = {"attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"}
    others = sorted(name for name in factors & rope.keys() if rope[name] is not None)
    out.require(not others, f"its rotary positions have the setting {others[0] if others else ''}")
    partial = rope.get("partial_rotary_factor", 1.0)
    out.require(partial in {None, 1.0}, f"it rotates {partial} of a head")
    out.require(
        kind in {"default", "linear", "yarn", "llama3"}, f"its rotary positions are scaled by {kind!r}"
    )
    if kind in {"linear", "yarn"}:
        out.add(rope__scaling__type=kind, rope__scaling__factor=float(rope["factor"]))
    if kind == "yarn":
        out.add(rope__scaling__original_context_length=int(rope["original_max_position_embeddings"]))


def _require_full_attention(config: PreTrainedConfig, out: _Written) -> None:
    kinds = {*(getattr(config, "layer_types", None) or ["full_attention"])}
    out.require(kinds == {"full_attention"}, f"some of its layers have {', '.join(sorted(kinds))}")


def _write_llama(config: PreTrainedConfig, out: _Written) -> None:
    head = _write_head(config, out)
    out.add(rope__dimension_count=head)
    _write_rope(config.rope_parameters, out)
    if config.rope_parameters.get("rope_type") == "llama3":
        out.tensors[_FACTORS] = _llama3_factors(config.rope_parameters, head)
    window = getattr(config, "sliding_window", None)
    _note_window(window, config, out)


def _note_window(window: int | None, config: PreTrainedConfig, out: _Written) -> None:
    if window and window < config.max_position_embeddings:
        out.notes.append(
            f"llama.cpp does not limit the attention of {config.model_type} to a window: answers are the model's up "
            f"to {window:,} tokens"
        )


def _write_qwen2(config: PreTrainedConfig, out: _Written) -> None:
    _require_full_attention(config, out)
    head = _head_of(config)
    out.require(
        head * config.num_attention_heads == config.hidden_size, f"its heads of {head} are not its width"
    )
    _write_rope(config.rope_parameters, out)
    out.require(config.rope_parameters.get("rope_type") != "llama3", "it scales as llama3 does")


def _write_qwen3(config: PreTrainedConfig, out: _Written) -> None:
    _require_full_attention(config, out)
    _write_head(config, out)
    out.require(not config.attention_bias, "its attention has biases")
    _write_rope(config.rope_parameters, out)
    out.require(config.rope_parameters.get("rope_type") != "llama3", "it scales as llama3 does")


def _write_phi3(config: PreTrainedConfig, out: _Written) -> None:
    rope = dict(config.rope_parameters)
    head = config.hidden_size // config.num_attention_heads
    rotary = int(head * (rope.pop("partial_rotary_factor", None) or 1.0))
    original = config.original_max_position_embeddings
    out.add(rope__dimension_count=rotary, rope__scaling__original_context_length=original)
    if rope.get("rope_type") == "longrope":
        factor = rope.get("attention_factor") or _longrope_factor(config.max_position_embeddings, original)
        out.add(rope__scaling__attn_factor=float(factor))
        out.tensors[_LONG] = [float(value) for value in rope["long_factor"]]
        out.tensors[_SHORT] = [float(value) for value in rope["short_factor"]]
        out.add(rope__freq_base=float(rope["rope_theta"]))
        out.notes.append(
            f"llama.cpp takes the long rotary factors for every text where its context is above {original:,} tokens, "
            f"and transformers for long texts alone: with a context of at most {original:,} both answer alike"
        )
    else:
        out.require(rope.get("rope_type", "default") == "default", "it scales its rotary positions")
        _write_rope(rope, out)
    if config.sliding_window:
        out.add(attention__sliding_window=int(config.sliding_window))
    _note_window(config.sliding_window, config, out)


def _write_gemma(config: PreTrainedConfig, out: _Written, kind: str) -> None:
    head = _write_head(config, out)
    by_width = config.num_hidden_layers == _SCALED_BY_WIDTH[kind]
    scale = config.hidden_size // config.num_attention_heads if by_width else head
    out.require(
        config.query_pre_attn_scalar == scale,
        f"it scales attention by {config.query_pre_attn_scalar}, not by {scale}",
    )
    out.require(not config.attention_bias, "its attention has biases")
    out.require(not config.use_bidirectional_attention, "it attends to what follows")
    types = _layer_types(config.num_hidden_layers, _PATTERN[kind])
    out.require(
        config.layer_types == types, f"not every layer but each {_PATTERN[kind]}th has a sliding window"
    )
    out.add(attention__sliding_window=int(config.sliding_window))


def _write_gemma2(config: PreTrainedConfig, out: _Written) -> None:
    _write_gemma(config, out, "gemma2")
    _write_rope(config.rope_parameters, out)
    out.require(config.rope_parameters.get("rope_type") == "default", "it scales its rotary positions")
    caps = config.attn_logit_softcapping, config.final_logit_softcapping
    out.require(None not in caps, "it does not cap its logits")
    out.add(attn_logit_softcapping=float(caps[0]), final_logit_softcapping=float(caps[1]))


def _write_gemma3(config: PreTrainedConfig, out: _Written) -> None:
    _write_gemma(config, out, "gemma3")
    local, full = (config.rope_parameters[kind] for kind in ("sliding_attention", "full_attention"))
    is_usual = local.get("rope_type") == "default" and local["rope_theta"] == _GEMMA3_LOCAL_THETA
    out.require(is_usual, "its layers with a window have other rotary positions than 10,000")
    caps = config.attn_logit_softcapping, config.final_logit_softcapping
    out.require(not any(caps), "it caps its logits")
    out.require(full.get("rope_type", "default") in {"default", "linear"}, "it scales its rotary positions")
    _write_rope(full, out)


_FAMILIES = {
    "llama": _Family(
        "llama", _read_llama, interleaved=True, written_for=("llama", "mistral"), write=_write_llama
    ),
    "qwen2": _Family("qwen2", _read_qwen2, written_for=("qwen2",), write=_write_qwen2),
    "qwen3": _Family("qwen3", _read_qwen3, written_for=("qwen3",), write=_write_qwen3),
    "qwen2moe": _Family("qwen2_moe", _read_qwen2_moe),
    "qwen3moe": _Family("qwen3_moe", _read_qwen3_moe),
    "phi3": _Family("phi3", _read_phi3, written_for=("phi3",), write=_write_phi3),
    "gemma2": _Family("gemma2", _read_gemma2, shift=1.0, written_for=("gemma2",), write=_write_gemma2),
    "gemma3": _Family(
        "gemma3_text", _read_gemma3, shift=1.0, written_for=("gemma3_text",), write=_write_gemma3
    ),
}
"""By what ``general.architecture`` says."""
