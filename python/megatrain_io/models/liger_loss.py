"""Liger-kernel's cross entropy in place of torch's, on CUDA, where it is installed and the loss is transformers' own.

It writes the gradient over the logits, so a slice of tokens has them in fp32 once: torch makes their log-softmax and
its gradient beside them. Nothing is imported before a loss or a note is asked for, and elsewhere than on CUDA nothing
at all.
"""

from collections.abc import Callable
from functools import cached_property, partial
from importlib.metadata import PackageNotFoundError, version
from typing import Any, cast

import torch
from torch import Tensor
from transformers.loss.loss_utils import ForCausalLMLoss

__all__ = ["Loss", "liger_loss", "liger_version"]

LossFunction = Callable[..., Any]


class Loss:
    """The loss function of a model on the device where it computes.

    Args:
        own: the model's own loss function.
        device: where the logits lie.
    """

    def __init__(self, own: LossFunction, device: torch.device) -> None:
        self._own = own
        self._device = device

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        """The loss, a scalar; called as the model calls its own function, with labels that are shifted already."""
        return cast("Tensor", self._chosen[0](*args, **kwargs))

    @property
    def notes(self) -> list[str]:
        """Sentences for the person on which function computes the loss."""
        return self._chosen[1]

    @property
    def version(self) -> str | None:
        """Version of liger-kernel, if it computes the loss; else None."""
        return None if self._chosen[0] is self._own else liger_version(self._device)

    @cached_property
    def _chosen(self) -> tuple[LossFunction, list[str]]:
        number = liger_version(self._device)
        if number is None or self._own is not ForCausalLMLoss:
            return self._own, []
        try:
            from liger_kernel.transformers.functional import liger_cross_entropy
        except Exception as error:  # noqa: BLE001 - what keeps it from being imported is many things' business
            sentence = " ".join(str(error).split())
            return self._own, [
                f"liger-kernel {number} cannot be imported ({sentence}): torch computes the loss, with more VRAM"
            ]
        return partial(liger_loss, liger_cross_entropy), [f"liger-kernel {number} computes the cross entropy"]


def liger_version(device: torch.device) -> str | None:
    """Version of the liger-kernel that is installed, if it is used on this device; else None."""
    if device.type != "cuda":
        return None
    try:
        return version("liger-kernel")
    except PackageNotFoundError:
        return None


def liger_loss(
    cross_entropy: LossFunction,
    logits: Tensor,
    labels: Tensor,
    vocab_size: int,
    *,
    shift_labels: Tensor,
    num_items_in_batch: int | Tensor,
    ignore_index: int = -100,
    **kwargs: object,
) -> Tensor:
    """``ForCausalLMLoss`` of labels that are shifted already, by a cross entropy that writes into the logits.

    Args:
        cross_entropy: liger-kernel's.
        logits: of the compute dtype. In fp32 they are the model's own tensor, and hold their gradient afterwards.
        labels: not looked at.
        vocab_size: number of logits of a token, as the model passes it.
        shift_labels: int64 [B, t], the token that each position must predict.
        num_items_in_batch: number that the sum of the token losses is divided by.
        ignore_index: label of tokens that are not trained.
        kwargs: ignored, as transformers does.
    """
    del labels, kwargs
    # In fp32, as there: in bf16 it would also keep each token's loss in bf16.
    logits = logits.float().view(-1, vocab_size)
    # Autograd does not see a kernel write: whoever has kept the logits for its own gradient must find them changed.
    torch.autograd.graph.increment_version(logits)
    target = shift_labels.view(-1).to(logits.device)
    loss = cross_entropy(logits, target, ignore_index=ignore_index, reduction="sum")
    if isinstance(num_items_in_batch, Tensor):
        num_items_in_batch = num_items_in_batch.to(loss.device)
    return cast("Tensor", loss / num_items_in_batch)
