"""Micro-batches: the tokens that go through a model at once."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from megatrain_io.errors import DataError

__all__ = [
    "IGNORE_INDEX",
    "MicroBatch",
    "blank_micro_batch",
    "micro_batch_of",
    "refuse_tokens",
    "trained_tokens",
]

IGNORE_INDEX = -100
"""Label of a token that is not trained."""


@dataclass(frozen=True, eq=False)
class MicroBatch:
    """Tokens that go through the model together.

    Attributes:
        input_ids: int64 [B, T].
        shift_labels: int64 [B, T]; what each position must predict, ``IGNORE_INDEX`` where nothing is trained.
        position_ids: int64 [B, T], restarting at 0 for each document packed into a row; None for 0..T-1.
        attention_mask: int64 [B, T], 0 for padding; None without padding.
    """

    input_ids: Tensor
    shift_labels: Tensor
    position_ids: Tensor | None = None
    attention_mask: Tensor | None = None

    def to(self, device: torch.device) -> "MicroBatch":
        """The same micro-batch with its tensors on ``device``."""
        optional = (self.position_ids, self.attention_mask)
        moved = [None if each is None else each.to(device) for each in optional]
        return MicroBatch(self.input_ids.to(device), self.shift_labels.to(device), *moved)


def micro_batch_of(batch: MicroBatch | Mapping[str, Tensor] | Tensor) -> MicroBatch:
    """A micro-batch from what loops around transformers models have.

    Args:
        batch: a micro-batch, which is returned as it is; or ``input_ids`` int64 [B, T], alone or in a mapping with
            ``labels`` (not shifted; -100 is not trained; where they are missing, all tokens but padding are trained),
            ``attention_mask`` and ``position_ids``, [B, T] each.

    Raises:
        DataError: it has another key, shape or dtype.
    """
    if isinstance(batch, MicroBatch):
        _refuse_other_shapes(vars(batch))
        return batch
    if not isinstance(batch, Tensor | Mapping):
        raise DataError(
            f"a micro-batch is a {type(batch).__name__}: give a MicroBatch, input_ids as a tensor [B, T], or a mapping "
            "with input_ids"
        )
    given = {"input_ids": batch} if isinstance(batch, Tensor) else dict(batch)
    unknown = sorted(given.keys() - {"input_ids", "labels", "attention_mask", "position_ids"})
    if unknown or given.get("input_ids") is None:
        raise DataError(
            f"a micro-batch has the keys {', '.join(sorted(given)) or '(none)'}: it must have input_ids, and may have "
            "labels, attention_mask and position_ids, nothing else"
        )
    _refuse_other_shapes(given)
    ids, labels, mask = given["input_ids"], given.get("labels"), given.get("attention_mask")
    if labels is None:
        labels = ids if mask is None else ids.masked_fill(mask == 0, IGNORE_INDEX)
    shifted = pad(labels, (0, 1), value=IGNORE_INDEX)[:, 1:].contiguous()
    return MicroBatch(ids, shifted, given.get("position_ids"), mask)


def _refuse_other_shapes(given: Mapping[str, Any]) -> None:
    tensors = {name: tensor for name, tensor in given.items() if tensor is not None}
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise DataError(
                f"{name} of a micro-batch is a {type(tensor).__name__}: it must be a tensor, int64 [B, T]"
            )
    shape = tensors["input_ids"].shape
    for name, tensor in tensors.items():
        # A mask may be of truth values, as tokenizers and models have them.
        is_right = tensor.dtype == torch.int64 or (name == "attention_mask" and tensor.dtype == torch.bool)
        if tensor.dim() != 2 or tensor.shape != shape or not is_right or tensor.numel() == 0:  # noqa: PLR2004 - [B, T]
            raise DataError(
                f"{name} of a micro-batch is {tensor.dtype} {list(tensor.shape)}: it must be int64 [B, T], with the "
                "shape of input_ids, and one token at least"
            )


def refuse_tokens(batch: MicroBatch, vocabulary: int, *, bounds_inputs: bool = True) -> None:
    """Refuse tokens that an embedding or a loss would fail on; on a GPU that would end the process.

    Args:
        batch: a micro-batch with sound shapes.
        vocabulary: number of scores that the model has for a token.
        bounds_inputs: whether tokens must be below it, too; a table may have more rows than there are scores.

    Raises:
        DataError: a token or a label is negative, or not in the vocabulary; or a position is negative.
    """
    labels = batch.shift_labels[batch.shift_labels != IGNORE_INDEX]
    for what, tokens in (("token", batch.input_ids), ("label", labels), ("position", batch.position_ids)):
        if tokens is None or not tokens.numel():
            continue
        least, most = int(tokens.min()), int(tokens.max())
        is_bounded = what == "label" or (what == "token" and bounds_inputs)
        if least < 0 or (is_bounded and most >= vocabulary):
            raise DataError(
                f"a {what} is {least if least < 0 else most}, and the model has {vocabulary} scores: tokens and labels "
                f"are from 0 to {vocabulary - 1}, and a label of {IGNORE_INDEX} is not trained"
            )


def trained_tokens(micro_batches: Sequence[MicroBatch]) -> int:
    """Number of tokens of all micro-batches that have a label."""
    return sum(int((batch.shift_labels != IGNORE_INDEX).sum()) for batch in micro_batches)


def blank_micro_batch(rows: int, length: int, *, packed: bool) -> MicroBatch:
    """A micro-batch of ``rows`` rows of ``length`` meaningless tokens, of the kind that takes most memory."""
    shape = (rows, max(2, length))
    ids = torch.zeros(shape, dtype=torch.int64)
    position_ids = attention_mask = None
    if packed:
        # Two documents in each row: one alone needs no mask.
        half = shape[1] // 2
        position_ids = torch.cat([torch.arange(half), torch.arange(shape[1] - half)]).repeat(rows, 1)
    elif rows > 1:
        attention_mask = torch.ones_like(ids)
        attention_mask[0, -1] = 0
    return MicroBatch(ids, ids.clone(), position_ids, attention_mask)
