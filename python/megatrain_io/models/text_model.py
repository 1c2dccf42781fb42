"""The text model inside a model that takes images or sound, too: it alone is trained.

The text model is the class that transformers has for its configuration alone, or for one that computes the same on
text. Its parameters are some of the published model's, under other names; everything else of the published model's
files is carried through as it is.
"""

import copy
import inspect
from collections.abc import Mapping
from typing import Any, cast

import torch
import transformers
from torch import Tensor
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    MODEL_FOR_MULTIMODAL_LM_MAPPING,
    MODEL_MAPPING,
    PreTrainedConfig,
    PreTrainedModel,
)

from megatrain_io.errors import UnsupportedModelError
from megatrain_io.models.hub_names import HubNames, NamePlan
from megatrain_io.models.meta_model import parameters_on_meta
from megatrain_io.models.preserved import preserved
from megatrain_io.models.proof import are_alike
from megatrain_io.models.shrink import shrink_config

__all__ = ["TextNames", "proof_of_text_model", "text_config_of"]

Shape = tuple[int, ...]

_TABLES_NBYTES_MAX = 2 << 30
_SMALL_PARAMETERS_MAX = 1 << 25
_SEED = 20

# Text models that transformers has inside a model of images alone, the type that computes the same on text, and what
# they do without a setting for it. Positions in three dimensions are one for text, and what images add to the hidden
# states behind the first blocks is not there. A small copy of each model is compared before it is trained.
_COMPUTES_AS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2_vl_text": ("qwen2", {}),
    "qwen2_5_vl_text": ("qwen2", {}),
    "qwen3_vl_text": ("qwen3", {}),
    "qwen3_vl_moe_text": ("qwen3_moe", {"norm_topk_prob": True}),
    "glm4v_text": ("glm4", {"attention_bias": True}),
    "glm4v_moe_text": ("glm4_moe", {"use_qk_norm": False}),
}
_OF_IMAGES = ("mrope_section", "mrope_interleaved")


def text_config_of(config: PreTrainedConfig) -> PreTrainedConfig | None:
    """The configuration of the text model of a published model, which is not changed; None where there is none."""
    inside = getattr(config, "text_config", None)
    published = _published_class(config)
    if not isinstance(inside, PreTrainedConfig) or published is None:
        return None
    if type(inside) in MODEL_FOR_CAUSAL_LM_MAPPING:
        text = copy.deepcopy(inside)
    elif inside.model_type in _COMPUTES_AS:
        text = _as_other_type(inside)
    else:
        return None
    # The published model ties its own head; where the head is inside the text model, that does.
    if getattr(published, "_tied_weights_keys", None):
        text.tie_word_embeddings = bool(getattr(config, "tie_word_embeddings", False))
    if getattr(config, "quantization_config", None) is not None:
        text.quantization_config = config.quantization_config
    text._attn_implementation = None  # noqa: SLF001
    text._experts_implementation = None  # noqa: SLF001
    return text


def _as_other_type(inside: PreTrainedConfig) -> PreTrainedConfig:
    """The configuration of the text model of another type that computes the same on text."""
    model_type, settings = _COMPUTES_AS[inside.model_type]
    values = {name: value for name, value in inside.to_dict().items() if name != "model_type"}
    rope = values.get("rope_parameters") or {}
    values["rope_parameters"] = {name: value for name, value in rope.items() if name not in _OF_IMAGES}
    # Their defaults are not the same.
    values["rope_parameters"].setdefault("partial_rotary_factor", 1.0)
    if not values.get("head_dim"):
        values["head_dim"] = values["hidden_size"] // values["num_attention_heads"]
    return CONFIG_MAPPING[model_type].from_dict(values | settings)


def _published_class(config: PreTrainedConfig) -> type[PreTrainedModel] | None:
    """The class of the whole model: that which config.json names, else the one that transformers has for it."""
    named: list[Any] = [getattr(transformers, str(name), None) for name in config.architectures or ()]
    mapped: list[Any] = [
        mapping[type(config)]
        for mapping in (
            MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
            MODEL_FOR_MULTIMODAL_LM_MAPPING,
            MODEL_FOR_CAUSAL_LM_MAPPING,
        )
        if type(config) in mapping
    ]
    for kind in (*named, *mapped):
        is_model = isinstance(kind, type) and issubclass(kind, PreTrainedModel)
        if is_model and kind.config_class is type(config) and _has_head(kind):
            return cast("type[PreTrainedModel]", kind)
    return None


def _has_head(kind: type[PreTrainedModel]) -> bool:
    """Whether a class is trained by itself: an assistant that drafts for another model takes no labels."""
    return not kind.__name__.endswith("Model") and "labels" in inspect.signature(kind.forward).parameters


class TextNames(HubNames):
    """The names that the text model of a published model has in the files of that."""

    def __init__(self, published: PreTrainedConfig, text: PreTrainedConfig, dtype: torch.dtype) -> None:
        """Build both models without memory for their parameters.

        Args:
            published: configuration of the whole model.
            text: that of its text model, as ``text_config_of`` gives it.
            dtype: of the parameters.

        Raises:
            UnsupportedModelError: transformers cannot build them, or one is not in the other.
        """
        super().__init__(text, dtype)
        whole = _built(published, dtype)
        self._whole = HubNames.of_model(whole)
        self.places = _places(self._model, whole, self.saved, self._whole.saved)
        pairs = {(self.owner_of(name), self._whole.owner_of(there)) for name, there in self.places.items()}
        if not len(pairs) == len({own for own, _ in pairs}) == len({there for _, there in pairs}):
            raise UnsupportedModelError(
                f"{published.model_type}: {self._whole.architecture} and its text model {self.architecture} do not "
                "share the same tensors between embedding and head, so it cannot be trained here"
            )
        self.text_architecture = self.architecture
        self.architecture = self._whole.architecture

    @property
    def carried_nbytes(self) -> int:
        """Bytes of the published model's parameters and saved buffers that are none of its text model's."""
        trained = {self._whole.owner_of(there) for there in self.places.values()}
        others = {self._whole.owner_of(name) for name in self._whole.saved} - trained
        return sum(self._whole.buffer(name).nbytes for name in others)

    def plan(self, shapes: Mapping[str, Shape], wanted: Any = None) -> NamePlan:
        """See ``HubNames.plan``; the files are those of the published model, and what is not text is carried."""
        whole = self._whole.plan(shapes, {*self.places.values()} if wanted is None else wanted)
        own = {there: name for name, there in self.places.items()}
        owners = {self._whole.owner_of(there): self.owner_of(name) for there, name in own.items()}
        return NamePlan(
            {owners[name]: pieces for name, pieces in whole.parameters.items()},
            [(owners[name], pieces) for name, pieces in whole.aliases],
            {name: own[target] for name, target in whole.buffers.items()},
            whole.carried,
            whole.derived,
        )


def _built(config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """The published model without memory for its parameters."""
    kind = _published_class(config)
    try:
        if kind is None:
            raise TypeError("it has no class for it")  # noqa: TRY301
        with parameters_on_meta(tables_max=_TABLES_NBYTES_MAX):
            return cast("PreTrainedModel", kind._from_config(copy.deepcopy(config), dtype=dtype))  # noqa: SLF001
    except Exception as cause:
        raise UnsupportedModelError(
            f"{config.model_type}: transformers does not build a model from this configuration: "
            f"{' '.join(str(cause).split())}"
        ) from cause


def _places(
    text: PreTrainedModel, whole: PreTrainedModel, saved: set[str], all_saved: set[str]
) -> dict[str, str]:
    """For each saved tensor of the text model its name in the published one."""
    own, inner = _decoder(text, text.config), _decoder(whole, whole.config.text_config)
    found = {}
    for name in sorted(saved):
        is_inner = name.startswith(f"{own}.")
        places = [inner + name.removeprefix(own)] if is_inner else _outer(name, inner)
        found[name] = next((place for place in places if place in all_saved), "")
        if not found[name]:
            raise UnsupportedModelError(
                f"{whole.config.model_type}: {name} of the text model {type(text).__name__} is not in "
                f"{type(whole).__name__}: train a model of text alone"
            )
    return found


def _decoder(model: PreTrainedModel, text: PreTrainedConfig) -> str:
    """Name of the module that is the decoder of a configuration of text."""
    kind: Any = MODEL_MAPPING.get(type(text), None)
    found: list[str] = [name for name, module in model.named_modules() if type(module) is kind]
    if len(found) != 1:
        raise UnsupportedModelError(
            f"{model.config.model_type}: {type(model).__name__} has {len(found)} decoders of type {text.model_type}, "
            "and exactly one would be its text model: train a model of text alone"
        )
    return found[0]


def _outer(name: str, inner: str) -> list[str]:
    """Where a tensor beside the decoder may lie: in the published model itself, or beside its decoder."""
    beside = inner.rpartition(".")[0]
    return [name, f"{beside}.{name}"] if beside else [name]


def proof_of_text_model(config: PreTrainedConfig) -> str | None:
    """Compare small copies of a published model and of its text model, with the same weights, on a text.

    Args:
        config: of the published model.

    Returns:
        None where they give the same scores; a sentence where transformers does not run the small copies.

    Raises:
        UnsupportedModelError: they give other scores; or it is not known that they give the same, and the text model is
            of another type.
    """
    try:
        with preserved(()):
            torch.default_generator.manual_seed(_SEED)
            before, after = _scores_of_both(config)
    except UnsupportedModelError:
        raise
    except Exception as cause:
        unproved = (
            f"it was not proved on a small copy that the text model of {config.model_type} computes as the whole one "
            f"does on text ({type(cause).__name__}: {' '.join(str(cause).split())[:200]})"
        )
        if config.text_config.model_type in _COMPUTES_AS:
            raise UnsupportedModelError(f"{unproved}, so it cannot be trained here") from cause
        return unproved
    if not are_alike(before, after):
        raise UnsupportedModelError(
            f"{config.model_type}: its text model by itself does not compute what the whole model does on text, so it "
            "cannot be trained here"
        )
    return None


@torch.no_grad()
def _scores_of_both(config: PreTrainedConfig) -> tuple[Tensor, Tensor]:
    small = shrink_config(config)
    text_config = text_config_of(small)
    kind = _published_class(small)
    if text_config is None or kind is None:
        raise TypeError("the small copy has no text model")
    meta = _built(small, torch.float32)
    size = sum(parameter.numel() for parameter in meta.parameters())
    if size > _SMALL_PARAMETERS_MAX:
        raise ValueError(f"the small copy has {size:,} parameters")
    names = TextNames(small, text_config, torch.float32)
    whole = kind._from_config(copy.deepcopy(small), dtype=torch.float32).eval()  # noqa: SLF001
    own_kind: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(text_config)]
    alone = own_kind._from_config(text_config, dtype=torch.float32).eval()  # noqa: SLF001
    state = whole.state_dict()
    for parameter in whole.parameters():
        parameter.add_(torch.randn_like(parameter), alpha=0.05)
    alone.load_state_dict({name: state[place] for name, place in names.places.items()}, strict=False)
    tokens = torch.randint(1, text_config.vocab_size, (1, 11))
    return whole(input_ids=tokens).logits, alone(input_ids=tokens).logits
