"""Activation checkpoints: the input of every block, kept from the forward to the backward pass."""

from torch import Tensor

from megatrain_io.swap import Ledger

__all__ = ["SavedInputs"]

_ACCOUNT = "saved inputs"


class SavedInputs:
    """Hidden states by block and micro-batch, in RAM; each is taken once, in the backward pass."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._inputs: dict[tuple[int, int], Tensor] = {}
        self._nbytes = 0

    def put(self, block: int, micro_batch: int, hidden: Tensor) -> None:
        """Keep the input [B, T, H] of ``block``."""
        self._inputs[block, micro_batch] = hidden
        self._count(hidden.nbytes)

    def take(self, block: int, micro_batch: int) -> Tensor:
        """Hand the input out and forget it."""
        hidden = self._inputs.pop((block, micro_batch))
        self._count(-hidden.nbytes)
        return hidden

    def clear(self) -> None:
        """Forget everything (an aborted step)."""
        self._inputs.clear()
        self._count(-self._nbytes)

    def _count(self, nbytes: int) -> None:
        self._nbytes += nbytes
        self._ledger.set(_ACCOUNT, self._nbytes)
