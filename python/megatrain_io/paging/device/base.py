"""What computes: the CPU, on the buffers of the pool, or an accelerator with memory of its own.

An accelerator works in three streams. ``compute`` is where torch's operations go; ``in`` and ``out`` carry copies
from and to RAM. Inside a stream things happen in order; between streams only where one waits for an event of
another. Nothing here waits for the accelerator but ``Event.wait``.
"""

from contextlib import AbstractContextManager
from typing import Literal, Protocol

import torch
from torch import Tensor

from megatrain_io.errors import DoesNotFitError

__all__ = ["Accounts", "Device", "Done", "Event", "Stream", "out_of_memory"]

Stream = Literal["compute", "in", "out"]


class Event(Protocol):
    """A point in a stream."""

    def is_done(self) -> bool:
        """Whether everything before it has happened."""

    def wait(self) -> None:
        """Return when everything before it has happened."""

    def at_ns(self) -> int | None:
        """When it happened, if that is known: nanoseconds of ``time.monotonic_ns``."""


class Done:
    """An event in the past."""

    def is_done(self) -> bool:
        """It is."""
        return True

    def wait(self) -> None:
        """Nothing to wait for."""

    def at_ns(self) -> None:
        """Nobody looked."""


class Accounts:
    """Bytes that were allocated on a device, by account.

    Attributes:
        nbytes: now, by account.
        peak_nbytes: the most of all accounts together.
    """

    def __init__(self) -> None:
        self.nbytes: dict[str, int] = {}
        self.peak_nbytes = 0

    def add(self, account: str, nbytes: int) -> None:
        """Enter an allocation, or with a negative number its end."""
        self.nbytes[account] = self.nbytes.get(account, 0) + nbytes
        self.peak_nbytes = max(self.peak_nbytes, sum(self.nbytes.values()))


class Device(Protocol):
    """Memory and streams of what computes.

    Attributes:
        name: for people.
        torch_device: where tensors of compute lie.
        has_own_memory: whether weights must be copied to it.
        has_bf16: whether it computes in bf16.
        vram: bytes of its own memory that may be taken.
        accounts: of what ``allocate`` gave.
    """

    name: str
    torch_device: torch.device
    has_own_memory: bool
    has_bf16: bool
    vram: int
    accounts: Accounts

    def allocate(self, nbytes: int, account: str) -> Tensor:
        """Bytes [nbytes], aligned to 256; content arbitrary. They stay for good: nothing comes and goes in a step.

        Raises:
            DoesNotFitError: the device has not so much memory left.
        """

    def pin(self, memory: Tensor) -> AbstractContextManager[bool]:
        """While it lasts, copies from and to this host memory need no detour; False if the system refuses."""

    def copy_in(self, to: Tensor, content: Tensor) -> None:
        """Queue a copy from RAM on the stream ``in``; the host must leave ``content`` alone until it has happened."""

    def copy_out(self, to: Tensor, content: Tensor) -> None:
        """Queue a copy to RAM on the stream ``out``; the host must leave ``to`` alone until it has happened."""

    def record(self, stream: Stream) -> Event:
        """An event after all that was queued on a stream so far."""

    def wait(self, stream: Stream, event: Event, why: str) -> None:
        """What is queued on a stream from now on happens after ``event``; the host goes on. ``why`` names the wait."""

    def computing(self) -> AbstractContextManager[None]:
        """Inside, what torch does belongs to the stream ``compute``."""

    def seed(self, seed: int) -> None:
        """Seed the random numbers of torch's operations there."""

    def random_state(self) -> AbstractContextManager[None]:
        """Leave the random numbers as they were before."""

    def close(self) -> None:
        """Wait for all streams, and end them."""


def out_of_memory(device: Device, error: BaseException) -> DoesNotFitError | None:
    """The error to tell instead, if this one is of a device whose memory ran out."""
    says = any(word in str(error) for word in ("out of memory", "ALLOC_FAILED"))
    if not isinstance(error, torch.OutOfMemoryError) and not (isinstance(error, RuntimeError) and says):
        return None
    return DoesNotFitError(
        f"{device.name} ran out of memory, with {device.vram >> 20} MiB to be taken, of which buffers take "
        f"{sum(device.accounts.nbytes.values()) >> 20} MiB. What was under way was dropped; the last committed step "
        "stands. Make a step smaller (train.per_device_train_batch_size, data.max_length) or allow more VRAM. In "
        f"full: {error}"
    )
