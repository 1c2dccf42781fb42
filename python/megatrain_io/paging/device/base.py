"""What computes: the CPU, on the buffers of the pool, or an accelerator with memory of its own.

An accelerator works in three streams. ``compute`` is where torch's operations go; ``in`` and ``out`` carry copies
from and to RAM. Inside a stream things happen in order; between streams only where one waits for an event of
another. The host waits for the accelerator only in ``Event.wait``.
"""

from contextlib import AbstractContextManager
from typing import Literal, Protocol

import torch
from torch import Tensor

from megatrain_io.errors import DoesNotFitError

__all__ = ["Accounts", "Device", "Done", "Event", "Stream", "out_of_memory"]

Stream = Literal["compute", "in", "out"]


class Event(Protocol):
    """A point in a stream, after all that was queued on it before."""

    def is_done(self) -> bool:
        """Whether everything before it has happened."""

    def wait(self) -> None:
        """Return when everything before it has happened."""

    def at_ns(self) -> int | None:
        """When it happened, in nanoseconds of ``time.monotonic_ns``; None where that is not known."""


class Done:
    """An event that has happened already, for devices and slots where nothing is under way."""

    def is_done(self) -> bool:
        """Always True: everything before it has happened."""
        return True

    def wait(self) -> None:
        """Return at once: everything before it has happened."""

    def at_ns(self) -> None:
        """None: the time at which it happened was not recorded."""


class Accounts:
    """Bytes that are allocated on a device, by account.

    Attributes:
        nbytes: allocated now, by account.
        peak_nbytes: the most that all accounts together held.
    """

    def __init__(self) -> None:
        self.nbytes: dict[str, int] = {}
        self.peak_nbytes = 0

    def add(self, account: str, nbytes: int) -> None:
        """Add an allocation of ``nbytes`` to an account; a negative number takes one off."""
        self.nbytes[account] = self.nbytes.get(account, 0) + nbytes
        self.peak_nbytes = max(self.peak_nbytes, sum(self.nbytes.values()))


class Device(Protocol):
    """Memory and streams of what computes.

    Attributes:
        name: as people call it.
        torch_device: where the tensors of compute lie.
        has_own_memory: whether weights must be copied to it.
        has_bf16: whether it computes in bf16.
        vram: bytes of its own memory that may be taken; 0 without any.
        accounts: bytes that ``allocate`` gave, by account.
    """

    name: str
    torch_device: torch.device
    has_own_memory: bool
    has_bf16: bool
    vram: int
    accounts: Accounts

    def allocate(self, nbytes: int, account: str) -> Tensor:
        """Bytes, uint8 [nbytes], aligned to 256, with arbitrary content. None are freed or allocated within a step.

        Raises:
            DoesNotFitError: the device has less memory left.
        """

    def pin(self, memory: Tensor) -> AbstractContextManager[bool]:
        """Pin host memory while the context lasts, so that copies from and to it need no staging buffer.

        False, and copies go through a small staging buffer, if the driver refuses.
        """

    def copy_in(self, to: Tensor, content: Tensor) -> None:
        """Queue a copy from RAM on the stream ``in``; the host must leave ``content`` alone until it has happened."""

    def copy_out(self, to: Tensor, content: Tensor) -> None:
        """Queue a copy to RAM on the stream ``out``; the host must leave ``to`` alone until it has happened."""

    def record(self, stream: Stream) -> Event:
        """An event after all that was queued on a stream so far."""

    def wait(self, stream: Stream, event: Event, why: str) -> None:
        """Let what is queued on a stream hereafter happen after ``event``, without the host. ``why`` names it."""

    def computing(self) -> AbstractContextManager[None]:
        """Run what torch does inside the context on the stream ``compute``."""

    def seed(self, seed: int) -> None:
        """Seed the generators that torch's operations draw from on this device."""

    def random_state(self) -> AbstractContextManager[None]:
        """Restore the states of torch's generators when the context ends."""

    def close(self) -> None:
        """Wait for all streams, and end them."""


def out_of_memory(device: Device, error: BaseException) -> DoesNotFitError | None:
    """The error to raise in place of ``error`` if that says that the memory of the device ran out; else None."""
    says = any(word in str(error) for word in ("out of memory", "ALLOC_FAILED"))
    if not isinstance(error, torch.OutOfMemoryError) and not (isinstance(error, RuntimeError) and says):
        return None
    return DoesNotFitError(
        f"{device.name} ran out of memory: training may take {device.vram >> 20} MiB, of which buffers take "
        f"{sum(device.accounts.nbytes.values()) >> 20} MiB. What was under way was dropped; the last committed step "
        "stands. Make a step smaller (train.per_device_train_batch_size, data.max_length) or allow more VRAM. In "
        f"full: {error}"
    )
