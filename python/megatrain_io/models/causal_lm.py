"""Causal language models whose parameters have no memory: how they are called, and how they compute their loss.

transformers' models do both in one way, a module that somebody wrote in another: the partition knows only the
protocol.
"""

import copy
import inspect
from collections.abc import Callable, Iterable
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedConfig, PreTrainedModel
from transformers.loss.loss_utils import ForCausalLMLoss

from megatrain_io.data.batch import MicroBatch
from megatrain_io.errors import ConfigError, UnsupportedModelError
from megatrain_io.models.liger_loss import Loss

__all__ = ["CausalLM", "Inputs", "ModuleLM", "TransformersLM", "module_name", "replace_parameters"]

Inputs = tuple[tuple[Tensor, ...], dict[str, object]]
"""Arguments and keyword arguments of ``forward``."""

_TRAINABLE = (torch.bfloat16, torch.float16, torch.float32)
# Inputs that a model may do without, and then takes no such argument.
_OPTIONAL_INPUTS = ("position_ids", "attention_mask")
# As newer transformers call it, as older ones did for state spaces, and for all others.
_CACHE_NAMES = ("cache", "cache_params", "past_key_values")


class CausalLM(Protocol):
    """A causal language model without memory for its parameters.

    Attributes:
        name: as people are told of it.
        module: the model itself: parameters on meta in the dtype that computes, buffers real.
        config: its transformers configuration; None where it has none.
    """

    name: str
    module: nn.Module
    config: PreTrainedConfig | None

    def inputs(self, micro_batch: MicroBatch, cache: Cache | None) -> Inputs:
        """What ``forward`` takes for a micro-batch; its labels are not looked at."""

    def loss(
        self, run: Callable[[dict[str, object]], Any], shift_labels: Tensor, num_items_in_batch: int | Tensor
    ) -> Tensor:
        """Sum of the token losses divided by ``num_items_in_batch``, a scalar in float32.

        Args:
            run: calls ``forward`` behind the last block, with keyword arguments besides its tokens.
            shift_labels: int64 [B, t], contiguous.
            num_items_in_batch: trained tokens of the whole step.
        """

    def logits(self, output: Any) -> Tensor:
        """The scores [B, t, V] in what ``forward`` returned."""

    def to(self, device: torch.device) -> None:
        """Compute the loss on ``device`` from now on."""

    @property
    def loss_notes(self) -> list[str]:
        """Sentences for the person on which function computes the loss."""

    @property
    def liger_version(self) -> str | None:
        """Version of liger-kernel, if it computes the loss; else None."""


class _WithLoss:
    """The loss function of a model, where it computes."""

    def __init__(self, own: Callable[..., Any]) -> None:
        self._own_loss = own
        self.to(torch.device("cpu"))

    def to(self, device: torch.device) -> None:
        """See ``CausalLM.to``."""
        self._loss = Loss(self._own_loss, device)

    def _loss_of(self, logits: Tensor, shift_labels: Tensor, num_items_in_batch: int | Tensor) -> Tensor:
        """The loss of scores [B, t, V]."""
        return self._loss(
            logits, None, logits.shape[-1], shift_labels=shift_labels, num_items_in_batch=num_items_in_batch
        )

    @property
    def loss_notes(self) -> list[str]:
        """See ``CausalLM.loss_notes``."""
        return self._loss.notes

    @property
    def liger_version(self) -> str | None:
        """See ``CausalLM.liger_version``."""
        return self._loss.version


class TransformersLM(_WithLoss):
    """A causal language model of transformers, which calls its own loss function, or whose scores are enough."""

    def __init__(self, model: PreTrainedModel, *, loss_of_scores: bool = False) -> None:
        """Call ``model``, whose parameters are on meta, as ``meta_model`` builds it.

        Args:
            model: it is kept.
            loss_of_scores: whether the loss is made from its scores, because its ``forward`` calls no loss function.
        """
        self._model = model
        self._loss_of_scores = loss_of_scores
        self.module: nn.Module = model
        self.config: PreTrainedConfig | None = model.config
        self.name = str(model.config.model_type)
        super().__init__(ForCausalLMLoss if loss_of_scores else model.loss_function)
        taken = inspect.signature(self._model.forward).parameters
        self._cache_name = next((name for name in _CACHE_NAMES if name in taken), _CACHE_NAMES[-1])

    @property
    def loss_notes(self) -> list[str]:
        """See ``CausalLM.loss_notes``."""
        note = (
            f"{self.name} compares its scores with labels as they are given: its loss is made from its scores here, "
            "by transformers' function for causal language models"
        )
        return [note] * self._loss_of_scores + super().loss_notes

    def inputs(self, micro_batch: MicroBatch, cache: Cache | None) -> Inputs:
        """Keyword arguments, those left out that are None; see ``CausalLM.inputs``."""
        optional: dict[str, object] = {
            "position_ids": micro_batch.position_ids,
            "attention_mask": micro_batch.attention_mask,
            self._cache_name: cache,
            "use_cache": None if cache is None else True,
        }
        given = {name: value for name, value in optional.items() if value is not None}
        return (), {"input_ids": micro_batch.input_ids, **given}

    def loss(
        self, run: Callable[[dict[str, object]], Any], shift_labels: Tensor, num_items_in_batch: int | Tensor
    ) -> Tensor:
        """By the model's own code, or liger-kernel's on CUDA; see ``CausalLM.loss``."""
        if self._loss_of_scores:
            return self._loss_of(self.logits(run({})), shift_labels, num_items_in_batch)
        used = False

        def loss_of_shifted(logits: Tensor, *args: object, **kwargs: object) -> Tensor:
            nonlocal used
            used = True
            kwargs |= {"shift_labels": shift_labels, "num_items_in_batch": num_items_in_batch}
            return self._loss(logits, *args, **kwargs)

        self._model.loss_function = loss_of_shifted
        try:
            output = run({"labels": shift_labels})
        finally:
            self._model.loss_function = self._own_loss
        if not used or output.loss is None:
            raise UnsupportedModelError(
                f"{self.name}: it does not compute its loss by transformers' loss_function, as it did in the small "
                "copy that was probed; choose another"
            )
        return cast("Tensor", output.loss)

    def logits(self, output: Any) -> Tensor:
        """See ``CausalLM.logits``."""
        return cast("Tensor", output.logits)


class ModuleLM(_WithLoss):
    """A module of any class: ``forward`` takes int64 tokens [B, T] first, and returns scores [B, T, V].

    Or an object that has the scores as ``logits``.
    """

    def __init__(self, module: nn.Module, dtype: torch.dtype) -> None:
        """Copy ``module`` without the memory of its parameters; it stays as it is.

        Raises:
            UnsupportedModelError: it cannot be copied, or a parameter or buffer of it cannot be used.
        """
        self.name = module_name(module)
        self._refuse_tensors(module)
        try:
            self.module = replace_parameters(
                module, lambda parameter: torch.empty_like(parameter, dtype=dtype, device="meta")
            ).train()
        except Exception as cause:
            raise UnsupportedModelError(
                f"{self.name}: the module cannot be copied ({' '.join(str(cause).split())}): keep its tensors as "
                "parameters and buffers"
            ) from cause
        for each in self.module.modules():
            for name, buffer in each.named_buffers(recurse=False):
                setattr(each, name, buffer.cpu())
        self.config: PreTrainedConfig | None = None
        super().__init__(ForCausalLMLoss)
        taken = inspect.signature(module.forward).parameters.values()
        takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in taken)
        names = {parameter.name for parameter in taken}
        self._not_taken = () if takes_all else tuple(n for n in _OPTIONAL_INPUTS if n not in names)

    def inputs(self, micro_batch: MicroBatch, cache: Cache | None) -> Inputs:
        """The tokens, and by name what the micro-batch has besides; see ``CausalLM.inputs``.

        Raises:
            ConfigError: ``forward`` does not take that.
        """
        if cache is not None:
            raise ConfigError(f"{self.name}: a module of your own has no key-value cache to generate with")
        given: dict[str, object] = {
            name: value for name in _OPTIONAL_INPUTS if (value := getattr(micro_batch, name)) is not None
        }
        for name in self._not_taken:
            if name in given:
                raise ConfigError(
                    f"{self.name}: the micro-batch has {name}, and forward takes no argument of this name: leave it "
                    "out, or let forward take it"
                )
        return (micro_batch.input_ids,), given

    def loss(
        self, run: Callable[[dict[str, object]], Any], shift_labels: Tensor, num_items_in_batch: int | Tensor
    ) -> Tensor:
        """Cross entropy in fp32 of what ``forward`` returns, as transformers computes it; see ``CausalLM.loss``."""
        return self._loss_of(self.logits(run({})), shift_labels, num_items_in_batch)

    def logits(self, output: Any) -> Tensor:
        """The tensor itself, or its ``logits``; see ``CausalLM.logits``."""
        logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
        if not isinstance(logits, Tensor):
            raise UnsupportedModelError(
                f"{self.name}: forward returned {type(output).__name__}: it must return scores [B, T, V], or an object "
                "that has them as .logits"
            )
        return logits

    def _refuse_tensors(self, module: nn.Module) -> None:
        lazy = [
            name
            for name, parameter in module.named_parameters()
            if isinstance(parameter, nn.UninitializedParameter)
        ]
        if lazy:
            raise UnsupportedModelError(
                f"{self.name}: parameter {lazy[0]} has no shape yet: pass some tokens through the module once"
            )
        for name, parameter in module.named_parameters():
            if parameter.dtype not in _TRAINABLE:
                raise UnsupportedModelError(
                    f"{self.name}: parameter {name} is {parameter.dtype}: only {_text(_TRAINABLE)} are trained"
                )
        for name, buffer in module.named_buffers():
            if buffer.is_meta:
                raise UnsupportedModelError(
                    f"{self.name}: buffer {name} has no values (it is on meta): make the module by a function, which "
                    "PagedModel calls without memory for parameters alone, or give the buffer its values"
                )


def module_name(module: nn.Module) -> str:
    """Name of a module's class, as people are told of it."""
    return type(module).__name__


def replace_parameters(module: nn.Module, replace: Callable[[nn.Parameter], Tensor]) -> nn.Module:
    """Copy a module with other tensors as its parameters; what is shared stays shared, buffers are copied."""
    parameters: dict[int, object] = {
        id(parameter): nn.Parameter(replace(parameter), requires_grad=parameter.requires_grad)
        for parameter in module.parameters()
    }
    return copy.deepcopy(module, parameters)


def _text(dtypes: Iterable[torch.dtype]) -> str:
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
