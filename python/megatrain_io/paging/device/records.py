"""Records in the memory of a device: they come chunk by chunk from slots of the pool, and their gradients leave so.

Host memory holds some chunks on their way, never a block. Three streams work side by side: weights of the next
record come in while this one computes, and the gradient of the last one leaves for its update. One thread, the
caller's, keeps all of them going: whenever it would have to wait, and at every call, it does what can be done.
"""

import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby

import torch
from torch import Tensor

from megatrain_io.errors import MegatrainIoError
from megatrain_io.paging.device.base import Device, Done, Event, Stream
from megatrain_io.paging.device.events import DeviceEvents
from megatrain_io.paging.device.host_gradients import HostGradient, HostGradients
from megatrain_io.paging.device.pool import PIECES, DeviceKind, DevicePool, kind_of
from megatrain_io.store.dtypes import dtype_of
from megatrain_io.store.layout import Chunk, ModelLayout, Record
from megatrain_io.store.paged_store import BorrowedRecord, Buffer, PagedStore, values_of
from megatrain_io.store.schedule import ChunkOp

__all__ = ["DeviceRecords", "TransferPlan", "transfer_plan_of"]

_Free = dict[DeviceKind, deque[tuple[Tensor, Event]]]
"""Free buffers by kind, each with its last use."""

# How long to wait for a chunk before the other direction is looked after again, in seconds.
_PATIENCE = 0.001


@dataclass(frozen=True)
class TransferPlan:
    """What a schedule moves to a device.

    Attributes:
        loads: records whose weights are loaded, in order.
        updated: records that are updated in the same step, so that their weights go back.
    """

    loads: tuple[int, ...]
    updated: frozenset[int]


def transfer_plan_of(schedule: Sequence[ChunkOp]) -> TransferPlan:
    """The records that the chunk operations of a step load and update."""
    runs = [key for key, _ in groupby(schedule, lambda op: (op.kind, op.chunk.record, op.phase))]
    loads = tuple(record for kind, record, _ in runs if kind in {"load", "apply"})
    return TransferPlan(loads, frozenset(record for kind, record, _ in runs if kind == "update"))


@dataclass
class _Load:
    """Weights of a record on their way in."""

    record: int
    buffer: Tensor | None = None
    moved: int = 0
    event: Event = field(default_factory=Done)
    began: Event | None = None
    held: dict[int, Buffer] = field(default_factory=dict)
    """Slots of chunks that stay in RAM: the update wants them back."""


@dataclass
class _Leaving:
    """The gradient of a record on its way out, and the weights that it belongs to."""

    record: int
    load: _Load
    gradient: Tensor | HostGradient
    whole: Event
    is_ordered: bool = False
    moved: int = 0
    slot: Buffer | None = None


class _OnDevice(BorrowedRecord):
    """Tensors over a buffer of the device: the weights of a record, or its gradient."""

    def __init__(
        self, state: "DeviceRecords", tensors: dict[str, Tensor], load: _Load, gradient: Tensor | None
    ) -> None:
        self.tensors = tensors
        self.load = load
        self.gradient = gradient
        self._state = state

    def give_back(self) -> None:
        self.tensors = {}
        self._state.give_back(self)


class DeviceRecords:
    """The records of a paged store on a device, for as long as they are borrowed.

    It stands for the store in a step: ``weights`` in the schedule's order, ``gradient`` and ``submit``, or ``skip``.

    Args:
        state: the store, started by chunk.
        device: with memory of its own.
        pool: buffers on the device; all are allocated here, and none later.
    """

    def __init__(self, state: PagedStore, device: Device, pool: DevicePool) -> None:
        self.layout: ModelLayout = state.layout
        self._state = state
        self._device = device
        self._dtypes = [dtype_of(record.format) for record in state.layout.records]
        self._all: list[tuple[_Free, DeviceKind, Tensor]] = []
        self._weights = self._allocated(pool.weights, "weights")
        self._gradients = self._allocated(pool.gradients, "gradients")
        self._fetching: deque[_Load] = deque()
        self._fetched: deque[_Load] = deque()
        self._leaving: deque[_Leaving] = deque()
        self._behind: dict[str, deque[tuple[Event, Callable[[], None]]]] = {"in": deque(), "out": deque()}
        self._updated: frozenset[int] = frozenset()
        self.events = DeviceEvents(device)
        """When copies and compute happened; compute is told by record."""
        self._sums: HostGradients | None = None
        if pool.gathers:
            self._sums = HostGradients(state, device, self._gradients[PIECES], self.events, self.advance)
        self.also: list[Callable[[], bool]] = []
        """Called by ``advance``, to keep other copies going; each says whether it did anything."""

    def _allocated(self, kinds: Mapping[DeviceKind, tuple[int, int]], account: str) -> _Free:
        free: _Free = {}
        for kind, (nbytes, count) in kinds.items():
            free[kind] = deque()
            for _ in range(count):
                buffer = self._device.allocate(nbytes, account)
                free[kind].append((buffer, Done()))
                self._all.append((free, kind, buffer))
        return free

    # ----------------------------------------------------------------------------------------- of a step

    def begin(self, transfer_plan: TransferPlan) -> None:
        """Begin to bring in the weights of the step that the store has begun."""
        self._fetching.extend(map(_Load, transfer_plan.loads))
        self._updated = transfer_plan.updated
        self.advance()

    def weights(self, record: int) -> BorrowedRecord:
        """The weights of the schedule's next load, which must be of ``record``."""
        self.until(lambda: bool(self._fetched))
        load = self._fetched.popleft()
        if load.record != record:
            raise MegatrainIoError(
                f"weights of record {record} were asked for, and those of {load.record} are next"
            )
        self._device.wait("compute", load.event, "weights have come")
        load.began = self.events.began("compute")
        return _OnDevice(self, self._tensors(load.buffer, record, self._dtypes[record]), load, None)

    def gradient(self, record: int) -> BorrowedRecord:
        """A buffer for the fp32 gradient of ``record``, content arbitrary; or what gathers it in RAM."""
        if self._sums is not None:
            return HostGradient(self._sums, record)
        free = self._gradients[self._kind(record, self._gradients)]
        self.until(lambda: bool(free))
        buffer, left = free.popleft()
        self._device.wait("compute", left, "the last gradient has left")
        return _OnDevice(self, self._tensors(buffer, record, torch.float32), _Load(record), buffer)

    def submit(self, record: int, weights: BorrowedRecord, gradient: BorrowedRecord) -> None:
        """Hand a gradient over: it leaves by chunks, and each chunk is updated when it has arrived in RAM."""
        total = gradient.gradient if isinstance(gradient, _OnDevice) else gradient
        if not isinstance(weights, _OnDevice) or not isinstance(total, Tensor | HostGradient):
            raise MegatrainIoError(f"record {record}: what was submitted was not borrowed here")
        weights.tensors, gradient.tensors = {}, {}
        whole = self._device.record("compute")
        self._computed(weights.load, whole)
        self._leaving.append(_Leaving(record, weights.load, total, whole))
        self.advance()

    def skip(self, record: int, weights: BorrowedRecord) -> None:
        """Give the weights of a record back that got no gradient in a step which was to update it."""
        if not isinstance(weights, _OnDevice):
            raise MegatrainIoError(f"record {record}: what was given back was not borrowed here")
        weights.tensors = {}
        used, load = self._device.record("compute"), weights.load
        self._computed(load, used)
        self._free(load, used)
        for chunk in self.layout.chunks_of(record):
            held = load.held.pop(chunk.index, None)
            # The copy from a slot that stays in RAM has ended when it goes back.
            self.behind("out", load.event, partial(self._state.skip_chunk, chunk.index, held))
        self.advance()

    def give_back(self, borrowed: "_OnDevice") -> None:
        """Free the buffer of weights or of a gradient that was not submitted."""
        used = self._device.record("compute")
        if borrowed.gradient is not None:
            kind = self._kind(borrowed.load.record, self._gradients)
            self._gradients[kind].append((borrowed.gradient, used))
            return
        load = borrowed.load
        self._computed(load, used)
        self._free(load, used)
        for buffer in load.held.values():
            self._behind["in"].append((load.event, buffer.release))
        load.held = {}
        self.advance()

    def pass_by(self, record: int) -> None:
        """Take the weights of a load and give them back, without the device: only their update was wanted."""
        for chunk in self.layout.chunks_of(record):
            while (slot := self._state.try_chunk(chunk.index, _PATIENCE)) is None:
                self.advance()
            slot.release()

    def finish(self) -> None:
        """Wait until all gradients of the step have left the device and were handed over to the store."""
        self.until(lambda: not self._leaving and not self._behind["out"])

    def wait_for_compute(self) -> None:
        """Wait until the device has computed all that is queued; copies go on meanwhile."""
        event = self._device.record("compute")
        self.until(event.is_done)

    def abort(self) -> None:
        """Drop the step under way: its loads, gradients and copies. All buffers are free then."""
        streams: tuple[Stream, ...] = ("compute", "in", "out")
        for stream in streams:
            self._device.record(stream).wait()
        for event, _ in (*self._behind["in"], *self._behind["out"]):
            event.wait()  # what a copy leaves to the host is done with its own event
        self._fetching.clear()
        self._fetched.clear()
        self._leaving.clear()
        if self._sums is not None:
            self._sums.abort()
        for behind in self._behind.values():
            behind.clear()
        for free in (self._weights, self._gradients):
            for each in free.values():
                each.clear()
        for free, kind, buffer in self._all:
            free[kind].append((buffer, Done()))

    def _computed(self, load: _Load, ended: Event) -> None:
        # The last block's weights stay while the head's are used, as all of a stop do: each kind has a lane.
        record, layout = load.record, self.layout
        kind = self._kind(record, self._weights)
        is_first = record == layout.stops[layout.stop_of[record]][0]
        lane = f"device, {kind.stop}" if is_first else f"device, {kind.stop}, {kind.format}"
        self.events.ended(lane, layout.records[record].name, load.began, ended)

    # ------------------------------------------------------------------------------------- keeping it going

    def behind(self, stream: str, event: Event, action: Callable[[], None]) -> None:
        """Call ``action`` when an event of a stream has happened; in the order of the calls."""
        self._behind[stream].append((event, action))

    def until(self, is_so: Callable[[], bool]) -> None:
        """Keep all copies going until ``is_so`` returns True."""
        while not is_so():
            if self.advance() or is_so():
                continue
            if not (self._fetch(_PATIENCE) or self._send(_PATIENCE)):
                time.sleep(_PATIENCE / 10)

    def advance(self) -> bool:
        """Do all that can be done without waiting; True if there was anything."""
        did = False
        for behind in self._behind.values():
            while behind and behind[0][0].is_done():
                behind.popleft()[1]()
                did = True
        did |= self._send(0)
        did |= self._fetch(0)
        for look in self.also:
            did |= look()
        return did

    def _fetch(self, patience: float) -> bool:
        """Bring chunks in, in the schedule's order, as far as they are read and buffers are free; True if any was."""
        did = False
        while self._fetching:
            load = self._fetching[0]
            chunks = self.layout.chunks_of(load.record)
            if load.buffer is None:
                free = self._weights[self._kind(load.record, self._weights)]
                if not free:
                    return did
                load.buffer, used = free.popleft()
                self._device.wait("in", used, "the last weights were used")
            while load.moved < len(chunks):
                slot = self._state.try_chunk(chunks[load.moved].index, 0 if did else patience)
                if slot is None:
                    return did
                self._bring_in(load, chunks[load.moved], slot)
                did = True
            self._fetched.append(self._fetching.popleft())
        return did

    def _bring_in(self, load: _Load, chunk: Chunk, slot: Buffer) -> None:
        if load.buffer is None:
            raise MegatrainIoError("a load without a buffer: this is a bug")
        began = self.events.began("in")
        self._device.copy_in(self._part(load.buffer, chunk, self._dtypes[load.record]), values_of(slot))
        load.event = self._device.record("in")
        self.events.ended("copy in", "weights", began, load.event, chunk.index)
        load.moved += 1
        if load.record in self._state.residents.records:
            load.held[chunk.index] = slot
        else:
            self.behind("in", load.event, slot.release)

    def _send(self, patience: float) -> bool:
        """Send chunks of gradients out, and their weights, as far as there are slots for them; True if any was."""
        did = False
        while self._leaving:
            leaving = self._leaving[0]
            record, load = leaving.record, leaving.load
            chunks = self.layout.chunks_of(record)
            if not leaving.is_ordered:
                self._device.wait("out", leaving.whole, "the gradient is whole")
                leaving.is_ordered = True
            while leaving.moved < len(chunks):
                if not self._send_chunk(leaving, chunks[leaving.moved], 0 if did else patience):
                    return did
                did = True
            self._leaving.popleft()
            left = self._device.record("out")
            if isinstance(leaving.gradient, Tensor):
                self._gradients[self._kind(record, self._gradients)].append((leaving.gradient, left))
            self._free(load, left)
            for buffer in load.held.values():
                self.behind("out", left, buffer.release)
        return did

    def _send_chunk(self, leaving: _Leaving, chunk: Chunk, patience: float) -> bool:
        """Send one chunk of a gradient out, with its weights; False where no slot of the pool is free."""
        state, device = self._state, self._device
        gradient = leaving.gradient
        if isinstance(gradient, HostGradient):
            leaving.slot = leaving.slot or gradient.slots.pop(chunk.index)
        else:
            leaving.slot = leaving.slot or state.try_chunk_gradient(chunk.index, patience)
        if leaving.slot is None:
            return False
        weights, began = None, self.events.began("out")
        if leaving.record in self._updated:
            weights = leaving.load.held.pop(chunk.index, None)
            if weights is None:
                weights = state.try_outgoing(chunk.index, patience)
                if weights is None or leaving.load.buffer is None:
                    return False
                dtype = self._dtypes[leaving.record]
                device.copy_out(values_of(weights), self._part(leaving.load.buffer, chunk, dtype))
        if isinstance(gradient, Tensor):
            device.copy_out(values_of(leaving.slot), self._part(gradient, chunk, torch.float32))
        left = device.record("out")
        self.events.ended("copy out", "gradient", began, left, chunk.index)
        self.behind("out", left, partial(state.submit_chunk, chunk.index, weights, leaving.slot))
        leaving.slot = None
        leaving.moved += 1
        return True

    def _free(self, load: _Load, used: Event) -> None:
        """Let the buffer of a load be used again after an event."""
        if load.buffer is not None:
            self._weights[self._kind(load.record, self._weights)].append((load.buffer, used))
        load.buffer = None

    def _kind(self, record: int, buffers: Mapping[DeviceKind, object]) -> DeviceKind:
        return kind_of(self.layout, record, buffers)

    def _part(self, buffer: Tensor, chunk: Chunk, dtype: torch.dtype) -> Tensor:
        start = chunk.start * dtype.itemsize
        return buffer[start : start + chunk.parameters * dtype.itemsize].view(dtype)

    def _tensors(self, buffer: Tensor | None, record: int, dtype: torch.dtype) -> dict[str, Tensor]:
        if buffer is None:
            raise MegatrainIoError("a record without a buffer: this is a bug")
        places: Record = self.layout.records[record]
        flat = buffer[: places.parameters * dtype.itemsize].view(dtype)
        return {
            place.name: flat[place.offset : place.offset + place.elements].view(place.shape)
            for place in places.tensors
        }
