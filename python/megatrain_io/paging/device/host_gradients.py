"""Gradients that gather in RAM, where a device has no room for one of a whole record.

Each chunk's sum lies in the slot of the pool that it is updated from. A piece of it comes in, a native gradient is
added there, and it goes out again: the additions and their order are those of a sum that stays, so its bits are, too.
"""

import weakref
from collections import deque
from collections.abc import Callable
from contextlib import suppress

import torch
from torch import Tensor

from megatrain_io.errors import BufferInUseError
from megatrain_io.paging.device.base import Device, Done, Event
from megatrain_io.paging.device.events import DeviceEvents
from megatrain_io.store.layout import Chunk
from megatrain_io.store.paged_store import BorrowedRecord, Buffer, PagedStore, values_of

__all__ = ["HostGradient", "HostGradients"]

# How long to wait for a slot before other copies are looked after, in seconds.
_PATIENCE = 0.001


class HostGradient(BorrowedRecord):
    """The fp32 gradient of a record, in slots of the pool: one for each chunk that something was added to."""

    def __init__(self, sums: "HostGradients", record: int) -> None:
        self.tensors = {}
        self.record = record
        self.slots: dict[int, Buffer] = {}
        self._sums = sums
        sums.gradients.add(self)

    def give_back(self) -> None:
        """Return all slots; nothing may be on its way to or from them."""
        while self.slots:
            self.slots.popitem()[1].release()

    def add(self, name: str, gradient: Tensor, *, is_first: bool) -> None:
        """Add the native gradient of a tensor; the first one is copied."""
        self._sums.add(self, name, gradient, is_first=is_first)


class HostGradients:
    """Adds native gradients to sums in RAM, on the device, piece by piece.

    Args:
        state: the store whose pool has the slots that hold the sums.
        device: where the additions are computed.
        buffers: free memory of the device, each for the piece of a sum, and when it was used last.
        events: notes the copies.
        advance: keeps all other copies going; called while a slot is waited for.
    """

    def __init__(
        self,
        state: PagedStore,
        device: Device,
        buffers: deque[tuple[Tensor, Event]],
        events: DeviceEvents,
        advance: Callable[[], object],
    ) -> None:
        self._state = state
        self._device = device
        self._buffers = buffers
        self._events = events
        self._advance = advance
        self.gradients: weakref.WeakSet[HostGradient] = weakref.WeakSet()
        """Gradients that may hold slots of the pool."""
        self._number = 0
        # Of each buffer and each chunk's slot, which sum has left it last.
        self._of_buffer: dict[int, int] = {}
        self._of_chunk: dict[int, tuple[int, Event]] = {}

    def add(self, gradient: HostGradient, name: str, native: Tensor, *, is_first: bool) -> None:
        """Add a native gradient; its memory may be given back as soon as this returns."""
        layout = self._state.layout
        (place,) = (place for place in layout.records[gradient.record].tensors if place.name == name)
        for chunk in layout.chunks_of(gradient.record):
            start = max(chunk.start, place.offset)
            stop = min(chunk.start + chunk.parameters, place.offset + place.elements)
            if start < stop:
                slot = self._slot(gradient, chunk)
                there = values_of(slot)[start - chunk.start : stop - chunk.start]
                self._add(chunk, there, _part(native, start - place.offset, stop - place.offset), is_first)

    def abort(self) -> None:
        """Give all slots back; nothing may be on its way. Whoever keeps an error keeps the gradients of its step."""
        for gradient in list(self.gradients):
            for slot in gradient.slots.values():
                # A tensor that somebody still holds keeps its slot until it dies.
                with suppress(BufferInUseError):
                    slot.release()
            gradient.slots.clear()

    def _slot(self, gradient: HostGradient, chunk: Chunk) -> Buffer:
        while chunk.index not in gradient.slots:
            slot = self._state.try_chunk_gradient(chunk.index, _PATIENCE)
            if slot is None:
                self._advance()
            else:
                # Whoever had it before has seen the last copy from or to it.
                self._of_chunk.pop(chunk.index, None)
                gradient.slots[chunk.index] = slot
        return gradient.slots[chunk.index]

    def _add(self, chunk: Chunk, there: Tensor, native: Tensor, is_first: bool) -> None:  # noqa: FBT001
        device = self._device
        buffer, left = self._buffers.popleft()
        total = buffer[: there.nbytes].view(torch.float32)
        if is_first:
            device.wait("compute", left, "the last sum has left")
            total.copy_(native)
        else:
            # Sums leave in order, so the later of two has left behind the other.
            number, sent = self._of_chunk.get(chunk.index, (0, Done()))
            is_later = number > self._of_buffer.get(id(buffer), 0)
            device.wait("in", sent if is_later else left, "sums have left")
            began = self._events.began("in")
            device.copy_in(total, there)
            came = device.record("in")
            self._events.ended("copy in", "sum", began, came, chunk.index)
            device.wait("compute", came, "the sum has come")
            total.add_(native)
        device.wait("out", device.record("compute"), "the sum is whole")
        began = self._events.began("out")
        device.copy_out(there, total)
        left = device.record("out")
        self._events.ended("copy out", "sum", began, left, chunk.index)
        self._number += 1
        self._of_chunk[chunk.index] = self._number, left
        self._of_buffer[id(buffer)] = self._number
        self._buffers.append((buffer, left))


def _part(tensor: Tensor, start: int, stop: int) -> Tensor:
    """Some elements of a tensor in the order of its shape, without a copy of more than some rows."""
    if tensor.is_contiguous():
        return tensor.view(-1)[start:stop]
    width = tensor.numel() // tensor.shape[0]
    first = start // width
    rows = tensor[first : -(-stop // width)].reshape(-1)
    return rows[start - first * width : stop - first * width]
