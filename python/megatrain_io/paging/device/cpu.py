"""The CPU as the device that computes."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor

from megatrain_io.paging.device.base import Accounts, Done, Event, Stream

__all__ = ["Cpu"]


class Cpu:
    """Computes on the buffers of the pool themselves: nothing is copied, and everything happens at once."""

    def __init__(self) -> None:
        self.name = "cpu"
        self.torch_device = torch.device("cpu")
        self.has_own_memory = False
        self.has_bf16 = True
        self.vram = 0
        self.accounts = Accounts()

    def allocate(self, nbytes: int, account: str) -> Tensor:
        """Host memory, uint8 [nbytes], from torch; content arbitrary."""
        self.accounts.add(account, nbytes)
        return torch.empty(nbytes, dtype=torch.uint8)

    def pin(self, memory: Tensor) -> AbstractContextManager[bool]:
        """Do nothing, and say True: nothing is copied to or from a device."""
        del memory
        return nullcontext(True)

    def copy_in(self, to: Tensor, content: Tensor) -> None:
        """Copy at once: it has happened when this returns."""
        to.copy_(content)

    def copy_out(self, to: Tensor, content: Tensor) -> None:
        """Copy at once: it has happened when this returns."""
        to.copy_(content)

    def record(self, stream: Stream) -> Event:
        """An event that has happened already: nothing is ever queued."""
        del stream
        return Done()

    def wait(self, stream: Stream, event: Event, why: str) -> None:
        """Do nothing: every event has happened."""
        del stream, event, why

    def computing(self) -> AbstractContextManager[None]:
        """Do nothing: the CPU has no streams."""
        return nullcontext()

    def seed(self, seed: int) -> None:
        """Seed torch's generator for the CPU."""
        torch.default_generator.manual_seed(seed)

    @contextmanager
    def random_state(self) -> Iterator[None]:
        """Restore the state of torch's generator for the CPU when the context ends."""
        state = torch.get_rng_state()
        try:
            yield
        finally:
            torch.set_rng_state(state)

    def close(self) -> None:
        """Do nothing: nothing is under way."""
