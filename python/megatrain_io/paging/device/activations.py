"""Activation checkpoints on a device: a ring of slots there, above the one in RAM, which is above the drive.

As in RAM: the last blocks' inputs never leave, because they are needed first; those of the first
ones go on to RAM behind the forward pass, and come back ahead of the backward pass. Block b is in slot b modulo
their number.
"""

from collections import deque
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial

import torch
from torch import Tensor

from megatrain_io.errors import ConfigError, MegatrainIoError
from megatrain_io.paging.activations import ActivationPlan, SavedActivations, activation_nbytes
from megatrain_io.paging.device.base import Device, Done, Event
from megatrain_io.paging.device.pool import slot_nbytes
from megatrain_io.paging.device.records import DeviceRecords

__all__ = ["DeviceActivations"]

# As tensors in a block buffer: matrix kernels choose their path by alignment.
_ALIGNMENT = 256
# One in use, one on its way.
_SLOTS_MIN = 2


class DeviceActivations:
    """Activation checkpoints in the memory of a device, and in RAM what does not fit there.

    It stands for ``SavedActivations`` in a step.

    Args:
        host: keeps the inputs that go on to RAM.
        device: keeps the others in its memory.
        state: the records on the device, which keep copies going.
        nbytes: bytes of the device's memory that inputs may take; None = as many as they need.
    """

    def __init__(
        self, host: SavedActivations, device: Device, state: DeviceRecords, nbytes: int | None = None
    ) -> None:
        self.host = host
        self._device = device
        self._state = state
        self._bound = nbytes
        # Each a tensor of its own: autograd takes a write to one for a write to all that share memory.
        self._memory: list[Tensor] = []
        self._slots: list[Tensor] = []
        self._like: list[Tensor] = []
        self._dtypes: dict[int, torch.dtype] = {}
        self._offsets: list[int] = []
        self._nbytes: list[int] = []
        # When what lay in a slot has left it, and when what is to lie there has come.
        self._left: list[Event] = []
        self._came: list[Event] = []
        self._in_host = 0
        self._pins, self._is_pinned = ExitStack(), False
        host.before_release = self._unpin
        self._finished = 0
        self._coming: deque[tuple[int, Event]] = deque()
        state.also.append(self._bring_in)

    @property
    def stalled_seconds(self) -> float:
        """Seconds that compute waited for inputs from the drive, so far."""
        return self.host.stalled_seconds

    @property
    def plan(self) -> ActivationPlan:
        """How the inputs that go on to RAM are divided between RAM and drive."""
        return self.host.plan

    def io_bytes(self) -> tuple[int, int]:
        """Bytes read from and written to the drive so far."""
        return self.host.io_bytes()

    def reserve(self, blocks: int, hidden_nbytes: Sequence[int]) -> None:
        """Make room for the inputs of ``blocks`` blocks, each of ``hidden_nbytes`` (one a micro-batch).

        Raises:
            ConfigError: not even two blocks' inputs fit the bound; and what ``SavedActivations.reserve`` raises.
        """
        per_block = activation_nbytes(hidden_nbytes)
        count = blocks
        if self._bound is not None and per_block:
            count = min(blocks, self._bound // slot_nbytes(per_block))
        if self._memory and per_block <= self._memory[0].nbytes:
            # Made for a larger step: a smaller one makes no more of them.
            count = min(count, len(self._memory))
        if count < min(blocks, _SLOTS_MIN):
            raise ConfigError(
                f"activations may take {self._bound} bytes of {self._device.name}, and those of one block take "
                f"{per_block}: two blocks' are the least. Allow more, or use shorter or fewer micro-batches"
            )
        if (
            list(hidden_nbytes) == self._nbytes
            and count == len(self._slots)
            and self._in_host == blocks - count
        ):
            self._reserve_host(hidden_nbytes)
        else:
            self._cut(blocks, count, hidden_nbytes)
        self._finished = 0
        self._coming.clear()
        self._left = [Done() for _ in self._slots]
        self._came = [Done() for _ in self._slots]

    def _cut(self, blocks: int, count: int, hidden_nbytes: Sequence[int]) -> None:
        per_block = activation_nbytes(hidden_nbytes)
        self._in_host = blocks - count
        self._reserve_host(hidden_nbytes)
        self._nbytes = list(hidden_nbytes)
        self._offsets = [activation_nbytes(hidden_nbytes[:index]) for index in range(len(hidden_nbytes))]
        self._like = [torch.empty(0)] * len(hidden_nbytes)
        if count > len(self._memory) or per_block > min(memory.nbytes for memory in self._memory):
            self._device.accounts.add("activations", -sum(memory.nbytes for memory in self._memory))
            self._slots, self._memory = [], []  # the old ones go before the new ones come
            for _ in range(count):
                self._memory.append(self._device.allocate(slot_nbytes(per_block), "activations"))
        self._slots = self._memory[:count]

    def _reserve_host(self, hidden_nbytes: Sequence[int]) -> None:
        self.host.reserve(self._in_host, hidden_nbytes)
        if not self._is_pinned:
            self._is_pinned = True
            for memory in self.host.memory():
                self._pins.enter_context(self._device.pin(memory))

    def _unpin(self) -> None:
        self._is_pinned = False
        self._pins.close()

    def put(self, block: int, micro_batch: int, hidden: Tensor) -> None:
        """Keep a copy of the input [B, T, H] of ``block``, made after what lay in its slot has left."""
        if hidden.nbytes > self._nbytes[micro_batch]:
            raise MegatrainIoError(
                f"the input of block {block} has {hidden.nbytes} bytes, and room was made for "
                f"{self._nbytes[micro_batch]}: blocks must keep the size of the hidden state"
            )
        slot = block % len(self._slots)
        if micro_batch == 0:
            self._device.wait("compute", self._left[slot], "inputs have left their slot")
        self._like[micro_batch] = torch.empty(hidden.shape, dtype=hidden.dtype, device="meta")
        self._dtypes[block] = hidden.dtype
        self._place(block, micro_batch).copy_(hidden)

    def finish(self, block: int) -> None:
        """All inputs of ``block`` are there: they go on to RAM, if they are to."""
        if block >= self._in_host:
            return
        # Their room in RAM is free when those before them have gone on to the drive.
        before = block - (self.host.plan.in_ram or self._in_host)
        self._state.until(lambda: self._finished > before)
        self._device.wait("out", self._device.record("compute"), "inputs are whole")
        for index in range(len(self._like)):
            room = self.host.room(block, index, self._like_of(block, index))
            self._device.copy_out(room, self._place(block, index))
        self._left[block % len(self._slots)] = left = self._device.record("out")
        self._state.behind("out", left, partial(self._has_left, block))

    def _has_left(self, block: int) -> None:
        self.host.finish(block)
        self._finished = block + 1

    def get(self, block: int, micro_batch: int, like: Tensor) -> Tensor:
        """The input that was kept, without a copy. Valid until ``release``."""
        del like
        if micro_batch == 0 and block < self._in_host:
            self._state.until(lambda: all(block != coming for coming, _ in self._coming))
            self._device.wait("compute", self._came[block % len(self._slots)], "inputs have come")
        return self._place(block, micro_batch)

    def release(self, block: int) -> None:
        """The inputs of ``block`` are not needed any more: those that take their slot begin to come in."""
        before = block - len(self._slots)
        if before >= 0:
            self._coming.append((before, self._device.record("compute")))
            self._state.advance()

    def _bring_in(self) -> bool:
        """Bring in inputs that are in RAM and have a slot on the device; True if there were any."""
        did = False
        while self._coming and self._finished > self._coming[0][0] and self.host.is_here(self._coming[0][0]):
            block, used = self._coming.popleft()
            self._device.wait("in", used, "inputs were used")
            for index in range(len(self._like)):
                came_from = self.host.get(block, index, self._like_of(block, index))
                self._device.copy_in(self._place(block, index), came_from)
            self._came[block % len(self._slots)] = came = self._device.record("in")
            self._state.behind("in", came, partial(self.host.release, block))
            did = True
        return did

    def abort(self) -> None:
        """Forget the inputs that were to come in; the copies themselves have ended."""
        self._coming.clear()

    def close(self) -> None:
        """Give the room for inputs in RAM and on the drive back."""
        self._coming.clear()
        self.host.close()

    def _place(self, block: int, micro_batch: int) -> Tensor:
        like, start = self._like_of(block, micro_batch), self._offsets[micro_batch]
        slot = self._slots[block % len(self._slots)]
        return slot[start : start + like.nbytes].view(like.dtype).view(like.shape)

    def _like_of(self, block: int, micro_batch: int) -> Tensor:
        """A tensor without memory that has shape and dtype of an input."""
        return torch.empty(self._like[micro_batch].shape, dtype=self._dtypes[block], device="meta")
