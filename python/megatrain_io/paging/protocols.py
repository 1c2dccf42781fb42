"""What a step needs of records and activations, as protocols: so that it also runs on fakes, without a store."""

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from megatrain_io.store.layout import ModelLayout
from megatrain_io.store.paged_store import BorrowedRecord

__all__ = ["Activations", "Records"]


class Records(Protocol):
    """Where weights come from and gradients go, record by record, in the order of the schedule."""

    @property
    def layout(self) -> ModelLayout:
        """Which tensor lies in which record, and where."""

    def weights(self, record: int) -> BorrowedRecord:
        """The weights of a record, in the compute dtype; waits until they are there."""

    def gradient(self, record: int) -> BorrowedRecord:
        """Memory for the fp32 gradient of a record, its content arbitrary; waits until some is free."""

    def submit(self, record: int, weights: BorrowedRecord, gradient: BorrowedRecord) -> None:
        """Hand a whole gradient over for the update, and the weights back.

        Raises:
            BufferInUseError: a tensor over one of them is still alive.
        """

    def skip(self, record: int, weights: BorrowedRecord) -> None:
        """Give the weights of a record back that was to be updated and got no gradient: it stays as it is."""


class Activations(Protocol):
    """Activation checkpoints: the input [B, T, H] of each block and micro-batch, from forward to backward pass."""

    def reserve(self, blocks: int, hidden_nbytes: Sequence[int]) -> None:
        """Make room for the inputs of ``blocks`` blocks; ``hidden_nbytes`` are those of each micro-batch."""

    def put(self, block: int, micro_batch: int, hidden: Tensor) -> None:
        """Save the input [B, T, H] of a block; ``hidden`` may be overwritten as soon as this returns."""

    def finish(self, block: int) -> None:
        """All inputs of a block were saved, and may be moved."""

    def get(self, block: int, micro_batch: int, like: Tensor) -> Tensor:
        """The saved input of a block, with the shape and dtype of ``like``; waits until it is there."""

    def release(self, block: int) -> None:
        """The inputs of a block are not needed any more."""
