"""Micro-batches: the tokens that go through a model at once."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["IGNORE_INDEX", "MicroBatch", "blank_micro_batch", "trained_tokens"]

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
