"""The model that a loop of one's own trains: a module, a function that makes one, or a model folder."""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from megatrain_io.errors import ConfigError, ModelFilesError, UnsupportedModelError
from megatrain_io.models.causal_lm import module_name
from megatrain_io.models.gguf_folder import model_folder
from megatrain_io.models.meta_model import module_lists, parameters_on_meta
from megatrain_io.models.partition import PartitionedModel, model_parts
from megatrain_io.models.probe import probe
from megatrain_io.models.probe_module import SMALL_PARAMETERS_MAX, OwnModule, probe_module
from megatrain_io.models.text_model import proof_of_text_model, text_config_of
from megatrain_io.runs.import_model import TensorReader, checked_weights
from megatrain_io.runs.kept_tensors import (
    Kept,
    buffers_digest,
    carried_digest,
    kept_in,
    opened_weights,
)
from megatrain_io.store.dtypes import DTYPES
from megatrain_io.store.layout import Precision, TensorPlace
from megatrain_io.text import visible
from megatrain_io.training.fingerprint import differences

if TYPE_CHECKING:
    from megatrain_io.models.hub_folder import ModelFolder

__all__ = ["Model", "ModelSource", "Weights"]

Model = nn.Module | Callable[[], nn.Module] | Path | str
"""A module, a function that makes one, or a model folder."""

Weights = Callable[[str, tuple[int, ...]], Tensor]
"""``weights(name, shape)``: the first values of a parameter, bf16, fp16 or fp32."""

_DECIDES_NOTHING = {
    "_name_or_path",
    "architectures",
    "dtype",
    "id2label",
    "label2id",
    "transformers_version",
    "use_cache",
}
_SHOWN_AT_MOST = 60

_TRAINABLE = (torch.bfloat16, torch.float16, torch.float32)
_ATTENTION = ("sdpa", "eager")


class ModelSource:
    """A model without its parameters, and where their first values come from.

    Args:
        model: a module, a function that makes one, or a model folder. A function is called without memory for
            parameters.
        precision: that computes.
        blocks: name of the module list of its blocks; None where transformers marks it.
        small: an instance with few and small blocks, to prove a module on.

    Raises:
        UnsupportedModelError: it cannot be trained block by block.
        ConfigError: an argument is missing, or not for such a model.
        ModelFilesError: the folder is incomplete or damaged.

    Attributes:
        precision: that computes.
        partition: the model without its parameters.
        parts: name and tensors of each part, as ``model_parts`` gives them.
        folder: model folder that it comes from; None where it is a module.
        is_own_module: whether it is no transformers model.
        buffers: saved buffers that the folder has with other values than the model's constructor gives them, by name;
            empty before ``take_kept``.
        notes: sentences for the person.
    """

    def __init__(
        self, model: Model, precision: Precision, blocks: str | None = None, small: nn.Module | None = None
    ) -> None:
        self.precision: Precision = precision
        self.notes: list[str] = []
        self.buffers: Mapping[str, Tensor] = {}
        self._carried = ""
        self._module: nn.Module | None = None
        self.folder: ModelFolder | None = None
        self._config: PreTrainedConfig | None = None
        if isinstance(model, Path | str):
            self.folder = model_folder(Path(model))
            self._config = self.folder.config()
            self.partition = self._of_config(self._config, None, blocks, small)
        else:
            if not callable(model):
                raise ConfigError(
                    f"model is a {type(model).__name__}: it must be a module, a function that makes one, or the path "
                    "of a model folder"
                )
            if not isinstance(model, nn.Module):
                model, small = _without_memory(model, small)
            self._module = model
            if isinstance(model, PreTrainedModel):
                self._config = model.config
                attention = getattr(model.config, "_attn_implementation", None)
                self.partition = self._of_config(
                    model.config, attention if attention in _ATTENTION else None, blocks, small
                )
            else:
                self.partition = self._of_module(model, blocks, small)
            self._refuse_other_names(model)
        self.parts = model_parts(self.partition)
        self.is_own_module = self.folder is None and not isinstance(self._module, PreTrainedModel)

    def describe(self) -> dict[str, Any]:
        """What the store says of the model: plain JSON types."""
        spec = self.partition.spec
        own: dict[str, Any] = {
            "class": spec.model_type,
            "block_list": spec.block_list,
            "precision": self.precision,
        }
        if self._config is not None:
            own["config"] = json.loads(self._config.to_json_string(use_diff=False))
        if self.buffers:
            own["buffers"] = buffers_digest(self.buffers)
        if self._carried:
            own["carried"] = self._carried
        return {"paged_model": own, "tied": self.partition.tied}

    def changes(self, described: Mapping[str, Any]) -> list[str]:
        """A sentence for each entry of a transformers configuration that is not as ``describe`` wrote it."""
        before, now = (
            own.get("config", {}) for own in (described["paged_model"], self.describe()["paged_model"])
        )
        # What one has alone is of another version of transformers.
        keys = [key for key in now if key in before and key not in _DECIDES_NOTHING]
        was, there = (
            {f"{key} of the configuration": _short(each[key]) for key in keys} for each in (before, now)
        )
        return differences(was, there)

    def take_kept(self) -> None:
        """Compute with the saved buffers that the folder has, and note what it has besides; a module has its own.

        Raises:
            ModelFilesError, UnsupportedModelError: as ``checked_weights``.
        """
        if self.folder is None:
            return
        with opened_weights(self.folder, DTYPES[self.precision]) as weights:
            kept = kept_in(weights)
            self.buffers, self._carried = kept.buffers, carried_digest(kept)
            self.notes += weights.notes()
        if kept.shapes is not None and (proof := proof_of_text_model(self.folder.published_config())):
            self.notes.append(proof)
        self.partition.set_buffers(self.buffers)

    def take_bound_buffers(self, described: Mapping[str, Any]) -> None:
        """Compute with the saved buffers that a store was made with, as ``describe`` wrote them down.

        Raises:
            ModelFilesError: the folder has others now, or none.
        """
        if "buffers" in described["paged_model"]:
            with self.kept(described) as kept:
                self.buffers = kept.buffers
            self.partition.set_buffers(self.buffers)

    @contextmanager
    def kept(self, described: Mapping[str, Any]) -> Iterator[Kept]:
        """What belongs into an export beside the trained parameters, as the folder has it.

        Args:
            described: what ``describe`` wrote down when the store was made.

        Raises:
            ModelFilesError: the folder has something else now, or nothing.
        """
        own = described["paged_model"]
        is_text_inside = (
            self.folder is not None and text_config_of(self.folder.published_config()) is not None
        )
        if self.folder is None or not (is_text_inside or own.keys() & {"buffers", "carried"}):
            yield Kept()
            return
        with opened_weights(self.folder, DTYPES[self.precision]) as weights:
            kept = kept_in(weights)
            digests = {
                "buffers": buffers_digest(kept.buffers) if kept.buffers else None,
                "carried": carried_digest(kept) or None,
            }
            for what, digest in digests.items():
                if digest != own.get(what):
                    named = "buffers of the model" if what == "buffers" else "tensors that are not trained"
                    raise ModelFilesError(
                        f"{self.folder.path} has other values for the {named} than when the file was made: put the "
                        "weights back with which it was made"
                    )
            yield kept

    @contextmanager
    def reading(self, weights: Weights | None) -> Iterator[TensorReader]:
        """Read the first values of the parameters in the context: from ``weights``, the folder or the module.

        Raises:
            ConfigError: ``weights`` are given for a folder, or missing for a module without memory.
            ModelFilesError, UnsupportedModelError: as ``checked_weights``.
        """
        if self.folder is not None:
            if weights is not None:
                raise ConfigError(
                    "weights are given, and the model is a folder, which has its own: leave them out"
                )
            with checked_weights(self.folder, self.precision) as (_, read):
                yield read
            return
        own: dict[str, Tensor] = {} if self._module is None else dict(self._module.named_parameters())
        missing = [name for name, parameter in own.items() if parameter.is_meta]
        if weights is not None and not callable(weights):
            raise ConfigError(
                f"weights is a {type(weights).__name__}: it must be a function (name, shape) -> tensor"
            )
        if weights is None and missing:
            raise ConfigError(
                f"parameter {missing[0]} has no values (it is on meta): give weights=, a function (name, shape) -> "
                "tensor that makes the first values of each parameter"
            )
        yield _Given(weights or (lambda name, _shape: own[name].detach().cpu()))

    def release(self) -> None:
        """Let go of the module, whose weights take RAM: only its code is needed from now on."""
        self._module = None

    def _of_config(
        self, config: PreTrainedConfig, attention: str | None, blocks: str | None, small: nn.Module | None
    ) -> PartitionedModel:
        if small is not None:
            raise ConfigError(
                "small is for modules of your own: leave it out, transformers models are shrunk here"
            )
        spec = probe(config, attn_implementation=attention, block_list=blocks)
        return PartitionedModel(config, DTYPES[self.precision], spec)

    def _of_module(self, module: nn.Module, blocks: str | None, small: nn.Module | None) -> PartitionedModel:
        if blocks is None:
            lists = ", ".join(map(repr, module_lists(module))) or "none"
            raise ConfigError(
                f"blocks is missing: the name of the module list that holds the blocks of {module_name(module)} (it "
                f"has {lists})"
            )
        spec, self.notes = probe_module(OwnModule(module, blocks, small))
        return PartitionedModel(module, DTYPES[self.precision], spec)

    def _refuse_other_names(self, module: nn.Module) -> None:
        """Refuse a transformers model that is not the one of its configuration, such as a part or a wrapper of it."""
        expected = {name: shape for _, tensors in model_parts(self.partition) for name, shape in tensors}
        found = {name: tuple(parameter.shape) for name, parameter in module.named_parameters()}
        for name in sorted(expected.keys() ^ found.keys()):
            where = "not in" if name in expected else "only in"
            raise UnsupportedModelError(
                f"{module_name(module)}: parameter {name} of the causal language model of its configuration is {where} "
                "it: give the model that AutoModelForCausalLM makes"
            )
        for name, shape in expected.items():
            if found[name] != shape:
                raise UnsupportedModelError(
                    f"{module_name(module)}: {name} is {list(found[name])}, and {list(shape)} by its configuration"
                )


class _Given:
    """A reader of tensors that come one at a time, in order: only the last one is kept."""

    def __init__(self, weights: Weights) -> None:
        self._weights = weights
        self._last: tuple[str, Tensor] | None = None

    def __call__(self, place: TensorPlace, start: int, stop: int) -> Tensor:
        if self._last is None or self._last[0] != place.name:
            self._last = None  # before the next one is made
            values: Any = self._weights(place.name, place.shape)
            if not isinstance(values, Tensor):
                raise ConfigError(
                    f"weights gave a {type(values).__name__} for {place.name}: it must be a tensor, bf16, fp16 or fp32 "
                    f"{list(place.shape)}"
                )
            if tuple(values.shape) != place.shape or values.dtype not in _TRAINABLE or values.is_meta:
                raise ConfigError(
                    f"weights gave {values.dtype} {list(values.shape)} on {values.device} for {place.name}: it must be "
                    f"bf16, fp16 or fp32 {list(place.shape)}"
                )
            self._last = place.name, values.detach().cpu().reshape(-1)
        return self._last[1][start:stop]


def _without_memory(
    make: Callable[[], nn.Module], small: nn.Module | None
) -> tuple[nn.Module, nn.Module | None]:
    """The module that a function makes, on meta; and whole, if it is small and there is no other small one."""
    with torch.random.fork_rng(devices=[]), parameters_on_meta():
        module = make()
    if not isinstance(module, nn.Module):
        raise ConfigError(
            f"the model is a function that made a {type(module).__name__}: it must make an nn.Module"
        )
    count = sum(parameter.numel() for parameter in module.parameters())
    if small is None and count <= SMALL_PARAMETERS_MAX and not isinstance(module, PreTrainedModel):
        with torch.random.fork_rng(devices=[]):
            small = make()
    return module, small


def _short(value: object) -> str:
    """A value of a configuration for a sentence; what is cut is told apart by its length and hash."""
    text = visible(json.dumps(value, sort_keys=True))
    if len(text) <= _SHOWN_AT_MOST:
        return text
    return f"{text[:_SHOWN_AT_MOST]}... ({len(text)} characters, {hashlib.sha256(text.encode()).hexdigest()[:8]})"
