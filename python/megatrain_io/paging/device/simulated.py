"""A simulated accelerator, to find missing waits between streams on a machine without a GPU.

Its memory is apart, its copies are made by threads after random delays, and every access is checked: two that touch
the same bytes, one of them writing, must be ordered by the streams and the waits between them, whether or not they
met this time. Compute is torch on the CPU, so its bits are those of training there.

The order is kept by vector clocks (Lamport; Fidge 1988, Mattern 1989): each stream and the host count what they
do, an event takes the counts of its stream along, and who waits for it has seen all of them.
"""

import random
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from math import inf
from queue import SimpleQueue
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatrain_io.errors import DoesNotFitError
from megatrain_io.paging.device.base import Accounts, Event, Stream

__all__ = ["OrderError", "SimulatedDevice"]

_ALIGNMENT = 256
# A wait that takes longer than this is for something that nobody will do.
_PATIENCE = 60.0

Clock = dict[str, int]


class OrderError(AssertionError):
    """Two accesses to the same bytes that nothing orders."""


class _Access(NamedTuple):
    """One access to some bytes of an allocation: by which stream, when by its clock, and whether it writes."""

    start: int
    stop: int
    stream: str
    tick: int
    writes: bool
    what: str


@dataclass
class _Memory:
    """An allocation, and the accesses to it that later ones must be ordered after."""

    account: str
    accesses: list[_Access]


class _Event:
    """A point in a stream, and what that stream had seen by then."""

    def __init__(self, clock: Clock, host: Clock) -> None:
        self.clock = clock
        self._host = host
        self.happened = threading.Event()
        self._at: int | None = None

    def happen(self) -> None:
        self._at = time.monotonic_ns()
        self.happened.set()

    def at_ns(self) -> int | None:
        return self._at

    def is_done(self) -> bool:
        if self.happened.is_set():
            _join(self._host, self.clock)
            return True
        return False

    def wait(self) -> None:
        if not self.happened.wait(_PATIENCE):
            raise OrderError("the host waits for an event that never comes")
        _join(self._host, self.clock)


class _Copies(threading.Thread):
    """A stream of copies: a thread that makes them in order, each after a random delay."""

    def __init__(self, name: str, delay: Callable[[int], float]) -> None:
        super().__init__(name=f"simulated {name}", daemon=True)
        self._queue: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._delay = delay
        self.error: Exception | None = None
        self.start()

    def put(self, work: Callable[[], None] | None) -> None:
        self._queue.put(work)

    def copy(self, to: Tensor, content: Tensor) -> None:
        def copied() -> None:
            time.sleep(self._delay(to.nbytes))
            to.copy_(content)

        self.put(copied)

    def run(self) -> None:
        while (work := self._queue.get()) is not None:
            try:
                work()
            except Exception as error:  # noqa: BLE001 - told to the next one who looks
                self.error = self.error or error
            # The tensors of a copy go with it: what keeps host memory lent is a copy that did not happen.
            del work


class SimulatedDevice:
    """An accelerator with separate memory, copies that take their time, and a check of every access.

    Args:
        seed: of the random delays.
        delay: the longest that a copy takes, in seconds.
        gb_per_s: GB/s of copies by stream, on top of that; streams not named have no bound.
        nbytes: bytes of its memory.
        skipped: names of waits that are left out, to see that this is noticed.
    """

    def __init__(
        self,
        seed: int = 0,
        *,
        delay: float = 0.0005,
        gb_per_s: Mapping[Stream, float] | None = None,
        nbytes: int = 1 << 40,
        skipped: frozenset[str] = frozenset(),
    ) -> None:
        self.name = "simulated accelerator"
        self.torch_device = torch.device("cpu")
        self.has_own_memory = True
        self.has_bf16 = True
        self.vram = nbytes
        self.accounts = Accounts()
        self.waits: set[str] = set()
        """Names of the waits that were asked for."""
        self._skipped = skipped
        self._memory: dict[int, _Memory] = {}
        self._ram = _Memory("RAM", [])
        self._clocks: dict[str, Clock] = {name: {} for name in ("host", "compute", "in", "out")}
        numbers, rates = random.Random(seed), gb_per_s or {}  # noqa: S311 - delays

        def copies(stream: Stream) -> _Copies:
            rate = 1e9 * rates.get(stream, inf)
            # Mostly short: long delays everywhere would hide what goes wrong between them.
            return _Copies(stream, lambda nbytes: delay * numbers.random() ** 3 + nbytes / rate)

        self._copies: dict[str, _Copies] = {"in": copies("in"), "out": copies("out")}

    def allocate(self, nbytes: int, account: str) -> Tensor:
        """Bytes, uint8 [nbytes], that are NaN in every format."""
        if sum(self.accounts.nbytes.values()) + nbytes > self.vram:
            raise DoesNotFitError(
                f"{self.name}: {nbytes} bytes for {account} do not fit its {self.vram} beside {self.accounts.nbytes}"
            )
        self.accounts.add(account, nbytes)
        whole = torch.full((nbytes + _ALIGNMENT,), 0xFF, dtype=torch.uint8)
        start = -whole.data_ptr() % _ALIGNMENT
        storage = whole.untyped_storage()
        self._memory[storage.data_ptr()] = _Memory(account, [])
        # What is freed may be given to somebody else.
        weakref.finalize(storage, self._memory.pop, storage.data_ptr(), None).atexit = False
        return whole[start : start + nbytes]

    def pin(self, memory: Tensor) -> AbstractContextManager[bool]:
        """Do nothing, and say True: copies from and to any host memory are the same here."""
        del memory
        return nullcontext(True)

    def copy_in(self, to: Tensor, content: Tensor) -> None:
        """Queue a copy in, and check that what it overwrites is used by nothing that it is not ordered after."""
        self._queued("in")
        self._check_own(to)
        self._touch("in", to, writes=True, what="copy in")
        self._touch_ram("in", content, writes=False, what="copy in")
        self._copies["in"].copy(to, content)

    def copy_out(self, to: Tensor, content: Tensor) -> None:
        """Queue a copy out, and check that what it copies was written by something that it is ordered after."""
        self._queued("out")
        self._check_own(content)
        self._touch("out", content, writes=False, what="copy out")
        self._touch_ram("out", to, writes=True, what="copy out")
        self._copies["out"].copy(to, content)

    def record(self, stream: Stream) -> Event:
        """An event after all that was queued on the stream so far."""
        event = _Event(dict(self._queued(stream)), self._clocks["host"])
        if stream == "compute":
            event.happen()
        else:
            self._copies[stream].put(event.happen)
        return event

    def wait(self, stream: Stream, event: Event, why: str) -> None:
        """Order what is queued on a stream from now on after an event, unless this wait is skipped."""
        self.waits.add(why)
        if why in self._skipped or not isinstance(event, _Event):
            return
        _join(self._queued(stream), event.clock)
        if stream == "compute":
            # Torch computes at once, so what it needs must have come; a stream of its own would wait by itself.
            if not event.happened.wait(_PATIENCE):
                raise OrderError(f"{why}: compute waits for an event that never comes")
        else:
            self._copies[stream].put(lambda: _happened(event, why))

    @contextmanager
    def computing(self) -> Iterator[None]:
        """Check each of torch's operations inside the context."""
        with _Watch(self._computed):
            yield

    def seed(self, seed: int) -> None:
        """Seed torch's generator for the CPU, on which it computes."""
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
        """Wait until all copies that are queued have been made, and end their threads."""
        for copies in self._copies.values():
            copies.put(None)
            copies.join(_PATIENCE)

    def _queued(self, stream: str) -> Clock:
        """Count one more operation on a stream, ordered after all that the host has seen; returns its clock."""
        for copies in self._copies.values():
            if copies.error is not None:
                raise OrderError(f"a copy failed: {copies.error}") from copies.error
        clock = self._clocks[stream]
        _join(clock, self._clocks["host"])
        clock[stream] = clock.get(stream, 0) + 1
        return clock

    def _check_own(self, tensor: Tensor) -> None:
        """Refuse a copy of memory that compute allocated for itself, because that comes and goes."""
        if tensor.untyped_storage().data_ptr() not in self._memory:
            raise OrderError("a copy of memory that the device did not allocate for good")

    def _computed(self, tensors: list[tuple[Tensor, bool]], name: str) -> None:
        clock = self._queued("compute")
        del clock
        for tensor, writes in tensors:
            self._touch("compute", tensor, writes=writes, what=name)

    def _touch(self, stream: str, tensor: Tensor, *, writes: bool, what: str) -> None:
        memory = self._memory.get(tensor.untyped_storage().data_ptr())
        if memory is not None and tensor.numel() > 0:
            start = int(tensor.storage_offset()) * tensor.itemsize
            self._check(memory, tensor, start, stream, writes=writes, what=what)

    def _touch_ram(self, stream: str, tensor: Tensor, *, writes: bool, what: str) -> None:
        """Check a copy's access to RAM. The host's own accesses come after all that it has seen, and need no check."""
        if tensor.numel() > 0:
            self._check(self._ram, tensor, tensor.data_ptr(), stream, writes=writes, what=what)

    def _check(
        self, memory: _Memory, tensor: Tensor, start: int, stream: str, *, writes: bool, what: str
    ) -> None:
        """Enter an access to a tensor that starts there, if it is ordered behind those that it must not meet."""
        clock = self._clocks[stream]
        last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        new = _Access(start, start + (last + 1) * tensor.itemsize, stream, clock[stream], writes, what)
        kept = []
        for old in memory.accesses:
            meets = old.start < new.stop and new.start < old.stop
            is_before = old.tick <= clock.get(old.stream, 0)
            if meets and (old.writes or writes) and not is_before:
                raise OrderError(
                    f"{new.what} in {stream} {_verb(new)} bytes {new.start} to {new.stop} of {memory.account}, which "
                    f"{old.what} in {old.stream} {_verb(old)}, and nothing orders the two"
                )
            covered = new.start <= old.start and old.stop <= new.stop
            # Whoever is ordered behind the new one is behind the old one.
            if not (covered and is_before and (writes or not old.writes)):
                kept.append(old)
        memory.accesses = [*kept, new]


class _Watch(TorchDispatchMode):
    """Tells which tensors an operation reads and writes."""

    def __init__(self, seen: Callable[[list[tuple[Tensor, bool]], str], None]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch has no types here
        self._seen = seen

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Look at the operation, then let it happen."""
        kwargs = kwargs or {}
        schema = func._schema  # noqa: SLF001 - torch's own name for it
        is_view = any(out.alias_info is not None and not out.alias_info.is_write for out in schema.returns)
        if not is_view:
            named = {argument.name: argument for argument in schema.arguments}
            given = [*zip(schema.arguments, args, strict=False)]
            given += [(named[name], value) for name, value in kwargs.items()]
            tensors = [
                (leaf, argument.alias_info is not None and argument.alias_info.is_write)
                for argument, value in given
                for leaf in tree_leaves(value)
                if isinstance(leaf, Tensor)
            ]
            self._seen(tensors, schema.name)
        return func(*args, **kwargs)


def _join(clock: Clock, other: Clock) -> None:
    for name, tick in other.items():
        clock[name] = max(clock.get(name, 0), tick)


def _happened(event: _Event, why: str) -> None:
    if not event.happened.wait(_PATIENCE):
        raise OrderError(f"{why}: a stream waits for an event that never comes")


def _verb(access: _Access) -> str:
    return "writes" if access.writes else "reads"
