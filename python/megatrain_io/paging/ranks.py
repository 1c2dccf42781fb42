"""Processes that train one model together: what each passes through it, and what they add up."""

from collections.abc import Sequence
from typing import Protocol, TypeVar

from torch import Tensor

from megatrain_io.store.paged_store import BorrowedRecord

__all__ = ["OneRank", "Ranks"]

_T = TypeVar("_T")


class Ranks(Protocol):
    """The ranks of a training: each has the whole model, and passes some micro-batches of every step through it.

    All ranks make the same calls in the same order, since each follows the schedule. Sums are made in an order that
    does not depend on which rank is first, so that all ranks have the same bits.

    Attributes:
        rank: number of this process, from 0 on.
        world: number of processes.
    """

    rank: int
    world: int

    def share(self, micro_batches: Sequence[_T]) -> Sequence[_T]:
        """Those of a step's micro-batches that this rank passes through the model, one at least."""

    def sum_tokens(self, count: int) -> int:
        """Trained tokens of the step, from those of this rank's micro-batches."""

    def sum_loss(self, loss: Tensor) -> Tensor:
        """Loss of the step, an fp32 scalar, from the part of this rank."""

    def sum_gradient(self, record: int, gradient: BorrowedRecord) -> None:
        """Put the sum over all ranks in the place of this rank's fp32 gradient of a record; waits for it."""

    def norm(self, norm: float) -> float:
        """Norm over all gradients, from the norm over those that this rank updates with."""


class OneRank:
    """A training in one process: all micro-batches are its own, and there is nothing to add."""

    rank = 0
    world = 1

    def share(self, micro_batches: Sequence[_T]) -> Sequence[_T]:
        """All of them."""
        return micro_batches

    def sum_tokens(self, count: int) -> int:
        """The tokens of this process are all."""
        return count

    def sum_loss(self, loss: Tensor) -> Tensor:
        """The loss of this process is all."""
        return loss

    def sum_gradient(self, record: int, gradient: BorrowedRecord) -> None:
        """The gradient of this process is all."""

    def norm(self, norm: float) -> float:
        """This process updates with all gradients."""
        return norm
