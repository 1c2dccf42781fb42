"""An NVIDIA GPU, through torch: three streams, and host memory that is registered with the driver.

Buffers are never freed while the device lives, and what compute allocates for itself stays on its own stream, so
torch's allocator needs to be told of no other (``record_stream``).
"""

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, field

import torch
from torch import Tensor

from megatrain_io.errors import DoesNotFitError, UnsupportedError
from megatrain_io.paging.device.base import Accounts, Event, Stream
from megatrain_io.paging.device.pool import CONTEXT_NBYTES

__all__ = ["Cuda", "has_bf16", "no_gpu"]

# Number of staging buffers that copies pass through where the pool could not be registered.
_RING = 4
_MIB = 1 << 20
# How long times are counted from one moment, in nanoseconds: CUDA tells them in milliseconds as fp32.
_ANCHOR_NS = 60 * 10**9


class _Landing:
    """The host's part of a copy out: from its staging buffer to its place, once, when the GPU's part has happened."""

    def __init__(self, to: Tensor, content: Tensor) -> None:
        self._copy: tuple[Tensor, Tensor] | None = (to, content)

    @property
    def has_landed(self) -> bool:
        return self._copy is None

    def is_to(self, place: range) -> bool:
        """Whether it is still to write to some of these addresses."""
        if self._copy is None:
            return False
        start = self._copy[0].data_ptr()
        return start < place.stop and place.start < start + self._copy[0].nbytes

    def land(self) -> None:
        copy, self._copy = self._copy, None
        if copy is not None:
            copy[0].copy_(copy[1])


@dataclass
class _Staging:
    """A staging buffer: pinned memory of the driver that a copy passes through."""

    memory: Tensor
    event: torch.cuda.Event | None = None
    landing: _Landing | None = None

    def wait(self) -> None:
        """Wait until the copy that used it last has happened, on to its place."""
        if self.event is not None:
            self.event.synchronize()
        if self.landing is not None:
            self.landing.land()


@dataclass
class _Origin:
    """A moment that times are counted from: the first by both clocks, the others follow from it by the GPU's."""

    event: torch.cuda.Event
    ns: int = 0
    """Nanoseconds of the host's clock; 0 until worked out where ``before`` is set."""
    before: "_Origin | None" = None

    def at_ns(self) -> int:
        """Nanoseconds of the host's clock; its event must have happened."""
        if self.before is not None:
            self.ns, self.before = self.before.until(self.event), None
        return self.ns

    def until(self, event: torch.cuda.Event) -> int:
        """When an event happened, in nanoseconds of the host's clock."""
        milliseconds: float = self.event.elapsed_time(event)
        return self.at_ns() + round(1e6 * milliseconds)


@dataclass
class _CudaEvent:
    """A point in a stream, and the copies out whose last part the host does when it has happened."""

    event: torch.cuda.Event
    origin: _Origin
    landing: list[_Landing] = field(default_factory=list)

    def is_done(self) -> bool:
        if not self.event.query():
            return False
        self._land()
        return True

    def wait(self) -> None:
        self.event.synchronize()
        self._land()

    def at_ns(self) -> int | None:
        # The origin may be of another stream, and not have happened yet.
        has_happened = self.event.query() and self.origin.event.query()
        return self.origin.until(self.event) if has_happened else None

    def _land(self) -> None:
        for landing in self.landing:
            landing.land()
        self.landing.clear()


class Cuda:
    """An NVIDIA GPU that computes.

    Args:
        vram: bytes of its memory that may be taken, driver and libraries included; None = all that are free.
        index: which GPU.

    Raises:
        UnsupportedError: torch can use none.
    """

    def __init__(self, vram: int | None = None, index: int = 0) -> None:
        if not torch.cuda.is_available():
            raise no_gpu()
        self.torch_device = torch.device("cuda", index)
        torch.cuda.set_device(self.torch_device)
        about = torch.cuda.get_device_properties(self.torch_device)
        self.name: str = about.name
        self.has_own_memory = True
        self.has_bf16 = has_bf16()
        self.accounts = Accounts()
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info(self.torch_device)
        # The context is there by now, but not what libraries take when they are first called.
        self.vram: int = min(vram or free, total)
        # Torch's allocator refuses what is beyond; the driver's part is not its own.
        share = max(0.0, (self.vram - CONTEXT_NBYTES) / total)
        torch.cuda.set_per_process_memory_fraction(min(1.0, share), self.torch_device)
        self._streams = {
            "compute": torch.cuda.current_stream(self.torch_device),
            "in": torch.cuda.Stream(self.torch_device),
            "out": torch.cuda.Stream(self.torch_device),
        }
        event = torch.cuda.Event(enable_timing=True)
        event.record(self._streams["compute"])
        event.synchronize()
        self._anchored = time.monotonic_ns()
        self._origin = _Origin(event, self._anchored)
        self._pinned: list[range] = []
        self._rings: dict[str, list[_Staging]] = {"in": [], "out": []}
        self._landing: list[_Landing] = []

    @property
    def peak_nbytes(self) -> int:
        """The most bytes that torch had allocated on it at once."""
        return torch.cuda.max_memory_allocated(self.torch_device)

    def allocate(self, nbytes: int, account: str) -> Tensor:
        """Bytes, uint8 [nbytes], from torch's allocator, which aligns to 512; content arbitrary."""
        try:
            memory = torch.empty(nbytes, dtype=torch.uint8, device=self.torch_device)
        except torch.OutOfMemoryError as error:
            raise DoesNotFitError(
                f"{self.name}: {nbytes // _MIB} MiB for {account} do not fit the {self.vram // _MIB} MiB of "
                f"memory.vram beside the {sum(self.accounts.nbytes.values()) // _MIB} MiB that are taken: allow more, "
                "or close what else uses the GPU"
            ) from error
        self.accounts.add(account, nbytes)
        return memory

    @contextmanager
    def pin(self, memory: Tensor) -> Iterator[bool]:
        """Register host memory with the driver where it lies: torch's own is rounded up to powers of two."""
        place = range(memory.data_ptr(), memory.data_ptr() + memory.nbytes)
        refused = int(torch.cuda.cudart().cudaHostRegister(place.start, len(place), 0))
        if refused:
            self._forget_error()
            yield False
            return
        self._pinned.append(place)
        try:
            yield True
        finally:
            # Before the mapping goes, and when nothing is on its way from or to it.
            self._streams["in"].synchronize()
            self._streams["out"].synchronize()
            self._pinned.remove(place)
            if int(torch.cuda.cudart().cudaHostUnregister(place.start)):
                self._forget_error()

    def copy_in(self, to: Tensor, content: Tensor) -> None:
        """Queue the copy on the copy engine; through a staging buffer where the host memory is not registered."""
        with torch.cuda.stream(self._streams["in"]):
            if self._is_pinned(content):
                to.copy_(content, non_blocking=True)
                return
            # The host reads it now, and what was queued to be there by now must have landed.
            place = range(content.data_ptr(), content.data_ptr() + content.nbytes)
            for leaving in self._rings["out"]:
                if leaving.landing is not None and leaving.landing.is_to(place):
                    leaving.wait()
            staging = self._staging("in", content.nbytes)
            there = _as(staging.memory, content)
            there.copy_(content)
            to.copy_(there, non_blocking=True)
            staging.event = torch.cuda.Event()
            staging.event.record()

    def copy_out(self, to: Tensor, content: Tensor) -> None:
        """Queue the copy on the copy engine; through a staging buffer where the host memory is not registered."""
        with torch.cuda.stream(self._streams["out"]):
            if self._is_pinned(to):
                to.copy_(content, non_blocking=True)
                return
            staging = self._staging("out", to.nbytes)
            there = _as(staging.memory, to)
            there.copy_(content, non_blocking=True)
            staging.event = torch.cuda.Event()
            staging.event.record()
            staging.landing = _Landing(to, there)
            self._landing.append(staging.landing)

    def record(self, stream: Stream) -> Event:
        """An event of CUDA with its time, after all that was queued on the stream so far."""
        event = torch.cuda.Event(enable_timing=True)
        event.record(self._streams[stream])
        landing = []
        if stream == "out":
            # All so far, as a stream is in order: nobody may look at the events before this one.
            self._landing = [each for each in self._landing if not each.has_landed]
            landing = [*self._landing]
        recorded = _CudaEvent(event, self._origin, landing)
        self._anchor(event)
        return recorded

    def wait(self, stream: Stream, event: Event, why: str) -> None:
        """Let the stream itself wait for the event: the host goes on."""
        del why
        if isinstance(event, _CudaEvent):
            self._streams[stream].wait_event(event.event)

    def computing(self) -> AbstractContextManager[None]:
        """Make the stream on which torch computes the current one."""
        return torch.cuda.stream(self._streams["compute"])

    def seed(self, seed: int) -> None:
        """Seed torch's generators for the CPU and the GPU: dropout masks are drawn on either."""
        torch.default_generator.manual_seed(seed)
        torch.cuda.manual_seed(seed)

    @contextmanager
    def random_state(self) -> Iterator[None]:
        """Restore the states of torch's generators for the CPU and the GPU when the context ends."""
        states = torch.get_rng_state(), torch.cuda.get_rng_state(self.torch_device)
        try:
            yield
        finally:
            torch.set_rng_state(states[0])
            torch.cuda.set_rng_state(states[1], self.torch_device)

    def close(self) -> None:
        """Wait for all streams, and for copies that the host still has to finish."""
        for stream in self._streams.values():
            stream.synchronize()
        for ring in self._rings.values():
            for staging in ring:
                staging.wait()
            ring.clear()

    def _is_pinned(self, tensor: Tensor) -> bool:
        start = tensor.data_ptr()
        return any(start in place and start + tensor.nbytes <= place.stop for place in self._pinned)

    def _staging(self, stream: str, nbytes: int) -> _Staging:
        """A staging buffer of at least ``nbytes``: the one that was used longest ago."""
        ring = self._rings[stream]
        if len(ring) < _RING:
            return self._joined(ring, nbytes)
        staging = ring.pop(0)
        staging.wait()
        if staging.memory.nbytes < nbytes:
            return self._joined(ring, nbytes)
        ring.append(staging)
        return staging

    def _joined(self, ring: list[_Staging], nbytes: int) -> _Staging:
        ring.append(_Staging(torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)))
        return ring[-1]

    def _anchor(self, event: torch.cuda.Event) -> None:
        """Count times from this event on, if they are counted from one long ago, which has happened by now."""
        now = time.monotonic_ns()
        if now - self._anchored > _ANCHOR_NS and self._origin.event.query():
            self._origin.at_ns()
            self._origin, self._anchored = _Origin(event, before=self._origin), now

    def _forget_error(self) -> None:
        """Clear the error that a failed call left: the next kernel would report it."""
        with suppress(RuntimeError):
            torch.zeros(1, device=self.torch_device)


def has_bf16() -> bool:
    """Whether the GPU computes in bf16 itself, without emulation."""
    return bool(torch.cuda.is_bf16_supported(including_emulation=False))


def no_gpu() -> UnsupportedError:
    """The error for a run that asks for a GPU where torch finds none."""
    return UnsupportedError(
        "train.device is cuda, and torch finds no CUDA device here: see megatrain-io doctor, or set train.device=cpu"
    )


def _as(memory: Tensor, like: Tensor) -> Tensor:
    return memory[: like.nbytes].view(like.dtype).view(like.shape)
