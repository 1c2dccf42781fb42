"""Activation checkpoints: the input of every block, kept from the forward to the backward pass."""

from collections.abc import Sequence

import torch
from torch import Tensor

from megatrain_io.errors import MegatrainIoError
from megatrain_io.swap import Ledger, allocate

__all__ = ["SavedInputs", "saved_inputs_nbytes"]

_ACCOUNT = "saved inputs"
# As tensors in a block buffer: matrix kernels choose their path by alignment.
_ALIGNMENT = 256


def saved_inputs_nbytes(blocks: int, hidden: Sequence[Tensor]) -> int:
    """Bytes of the inputs of ``blocks`` blocks, each as large as ``hidden`` (one a micro-batch)."""
    return blocks * sum(_aligned(tensor.nbytes) for tensor in hidden) + _ALIGNMENT


def _aligned(nbytes: int) -> int:
    return -(-nbytes // _ALIGNMENT) * _ALIGNMENT


class SavedInputs:
    """Hidden states by block and micro-batch, in one piece of RAM that is kept from step to step.

    Tensors that live through the whole step among short-lived ones would leave holes in the heap.
    """

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._arena = torch.empty(0, dtype=torch.uint8)
        self._offsets: list[int] = []
        self._nbytes: list[int] = []
        self._block_nbytes = 0

    def reserve(self, blocks: int, hidden: Sequence[Tensor]) -> None:
        """Make room for the inputs of ``blocks`` blocks, each as large as ``hidden`` (one a micro-batch)."""
        self._offsets = []
        self._nbytes = [tensor.nbytes for tensor in hidden]
        self._block_nbytes = 0
        for tensor in hidden:
            self._offsets.append(self._block_nbytes)
            self._block_nbytes += _aligned(tensor.nbytes)
        nbytes = saved_inputs_nbytes(blocks, hidden)
        if nbytes > self._arena.nbytes:
            self._arena = torch.empty(0, dtype=torch.uint8)  # the old one goes before the new one comes
            self._arena = allocate(nbytes, self._ledger, _ACCOUNT)

    def put(self, block: int, micro_batch: int, hidden: Tensor) -> None:
        """Keep a copy of the input [B, T, H] of ``block``."""
        if hidden.nbytes != self._nbytes[micro_batch]:
            raise MegatrainIoError(
                f"the input of block {block} has {hidden.nbytes} bytes, that of the first has "
                f"{self._nbytes[micro_batch]}: blocks must keep the size of the hidden state"
            )
        self._place(block, micro_batch, hidden).copy_(hidden)

    def get(self, block: int, micro_batch: int, like: Tensor) -> Tensor:
        """The input that was kept, without a copy; ``like`` has its shape and dtype."""
        return self._place(block, micro_batch, like)

    def _place(self, block: int, micro_batch: int, like: Tensor) -> Tensor:
        base = -self._arena.data_ptr() % _ALIGNMENT
        start = base + block * self._block_nbytes + self._offsets[micro_batch]
        return self._arena[start : start + like.nbytes].view(like.dtype).view(like.shape)
