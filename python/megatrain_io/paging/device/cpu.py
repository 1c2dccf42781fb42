"""The CPU as the device that computes."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor

from megatrain_io.paging.device.base import Accounts, Done, Event, Stream

__all__ = ["Cpu"]


class Cpu:
    """Computes where the pool lies: nothing is copied, and everything happens at once."""

    def __init__(self) -> None:
        self.name = "cpu"
        self.torch_device = torch.device("cpu")
        self.has_own_memory = False
        self.has_bf16 = True
        self.vram = 0
        self.accounts = Accounts()

    def allocate(self, nbytes: int, account: str) -> Tensor:
        """Host memory."""
        self.accounts.add(account, nbytes)
        return torch.empty(nbytes, dtype=torch.uint8)

    def pin(self, memory: Tensor) -> AbstractContextManager[bool]:
        """Nothing is copied: there is no detour."""
        del memory
        return nullcontext(True)

    def copy_in(self, to: Tensor, content: Tensor) -> None:
        """At once."""
        to.copy_(content)

    def copy_out(self, to: Tensor, content: Tensor) -> None:
        """At once."""
        to.copy_(content)

    def record(self, stream: Stream) -> Event:
        """In the past."""
        del stream
        return Done()

    def wait(self, stream: Stream, event: Event, why: str) -> None:
        """Everything has happened."""
        del stream, event, why

    def computing(self) -> AbstractContextManager[None]:
        """Nothing to set."""
        return nullcontext()

    def seed(self, seed: int) -> None:
        """Torch's own generator for the CPU."""
        torch.default_generator.manual_seed(seed)

    @contextmanager
    def random_state(self) -> Iterator[None]:
        """Of torch's generator for the CPU."""
        state = torch.get_rng_state()
        try:
            yield
        finally:
            torch.set_rng_state(state)

    def close(self) -> None:
        """Nothing was begun."""
