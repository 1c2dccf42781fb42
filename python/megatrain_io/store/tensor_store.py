"""Fast, checked tensors on an NVMe drive, without training: put, get, prefetch, commit.

A ``TensorStore`` is one file of the format of ``docs/format.md``, with the same checksums and the same commit as a
store in training. ``docs/tensor_store.md`` says what it promises.
"""

import difflib
import json
import os
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext, suppress
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, NoReturn, Self, get_args

import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from megatrain_io.errors import (
    ConfigError,
    DoesNotFitError,
    MegatrainIoError,
    PoolExhaustedError,
)
from megatrain_io.machine.memory import usable_ram
from megatrain_io.store.advice import notes_of
from megatrain_io.store.inspect import remove_store, waiting_line
from megatrain_io.store.paged_store import (
    Engine,
    Ledger,
    RecordTensors,
    Store,
    StoreCreator,
    Transfer,
    verified,
)
from megatrain_io.store.tensor_manifest import TensorSpec, checked_specs, least_memory, manifest_of, specs_of
from megatrain_io.store.verify import VerifyReport

if TYPE_CHECKING:
    import numpy as np


__all__ = ["PrefetchTicket", "TensorStore", "Ticket"]

Durability = Literal["step", "scratch"]

_DRIVES_MAX = 16
_MANIFEST_BYTES_MAX = 256 << 20
_UNITS = {"": 1, "B": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40}


class Ticket:
    """A put under way. It goes on whether or not anybody waits for it, and keeps alive all that it needs."""

    def __init__(self, transfer: Transfer | None) -> None:
        # None: nothing had to be moved.
        self._transfer = transfer

    @property
    def done(self) -> bool:
        """Whether it has ended, well or not."""
        return self._transfer is None or self._transfer.done

    def wait(self) -> None:
        """Wait until it has ended. Ctrl-C ends the wait, and not the transfer.

        Raises:
            StorageError, CorruptionError, StoreFailedError, UsedAfterForkError: it failed.
        """
        if self._transfer is not None:
            self._transfer.wait()


class PrefetchTicket(Ticket):
    """A read under way, which ends with a tensor in memory of the store."""

    def __init__(self, transfer: Transfer | None, store: "TensorStore", name: str) -> None:
        super().__init__(transfer)
        self._store = store
        self._name = name
        self._tensor: Tensor | None = None

    def result(self) -> Tensor:
        """Wait for the tensor, and return it. It lies in memory of the store, and is the same one each time.

        Raises:
            StorageError, CorruptionError, StoreFailedError, UsedAfterForkError: it could not be read.
        """
        self.wait()
        # Who has the tensor may change it: the next get reads anew.
        self._store._forget(self._name, self)  # noqa: SLF001 - its other half
        if self._tensor is None:
            buffer = None if self._transfer is None else self._transfer.buffer()
            self._tensor = _tensor_over(buffer, self._store.spec(self._name))
        return self._tensor


class TensorStore:
    """Named tensors of fixed shape and dtype in one file; reads and writes run behind the caller's back.

    Made by ``create`` or ``open``. Its memory, of a fixed size, is mapped once, in huge pages, and registered with
    the kernel: tensors in it (``empty``, ``get``, ``prefetch``) move without a copy, others are copied through it.

    Calls are taken in their order, also those of several threads: a ``get`` sees the ``put`` before it. A tensor
    in the store's memory must not be changed while it is being put, nor read while it is being filled: wait for the
    ticket. Others may be changed as soon as ``put`` has returned.
    """

    def __init__(self, paths: Sequence[Path], *, engine: Engine, memory: int, ledger: Ledger) -> None:
        """Open the files of a store; to be called by ``open`` and ``create``."""
        path = self.path = paths[0]
        self.ledger = ledger
        self._turn = threading.RLock()
        self._prefetched: dict[str, PrefetchTicket] = {}
        opened: Store | None = None
        try:
            opened = self._store = Store(paths, engine, ledger, waiting_line(path))
            manifest = json.loads(self._store.manifest)
            self._specs = specs_of(manifest, path)
            self.durability: Durability = manifest["durability"]
            self._records = {name: record for record, name in enumerate(self._specs)}
            _check_memory(memory, self._specs)
            self._tensors = RecordTensors(self._store, memory)
        except BaseException:
            if opened is not None:
                opened.close()
            raise

    @classmethod
    def create(
        cls,
        path: str | Path | Sequence[str | Path],
        tensors: Mapping[str, Tensor | TensorSpec | tuple[Sequence[int], torch.dtype]],
        *,
        durability: Durability = "step",
        engine: Engine = "auto",
        memory: int | str = "256MiB",
        ledger: Ledger | None = None,
    ) -> Self:
        """Make a store, with all its space reserved, and open it. Every tensor is zero until it is put.

        Args:
            path: of a file that does not exist, or of one on each of several drives, which then work side by side.
            tensors: shape and dtype of each, or a tensor that has them (its values are not stored).
            durability: ``step``: what was committed survives a crash; takes twice the space. ``scratch``: nothing
                survives but a close.
            engine: I/O engine: ``auto``, ``uring`` or ``threads``.
            memory: bytes of pinned memory, or such as ``"256MiB"``; at least two chunks of 8 MiB and 2 MiB.
            ledger: of memory; None makes one.

        Raises:
            ConfigError: a dtype, name or size that cannot be.
            NoSpaceError, FormatError, UnsupportedError, StorageError: nothing is left behind.
        """
        paths, memory = _paths(path), _nbytes(memory)
        _check_choice("durability", durability, get_args(Durability))
        _check_choice("engine", engine, get_args(Engine))
        ledger = _checked(ledger)
        specs = checked_specs(tensors)
        _check_memory(memory, specs)  # before anything is written
        text = _manifest_text(specs, durability)
        creator = None
        try:
            creator = StoreCreator(paths, text, engine, ledger)
            creator.finish(b"")
            return cls(paths, engine=engine, memory=memory, ledger=ledger)
        except BaseException:
            if creator is not None:
                creator.abandon()
                remove_store(paths, creator.uuid)
            raise

    @classmethod
    def open(
        cls,
        path: str | Path | Sequence[str | Path],
        *,
        engine: Engine = "auto",
        memory: int | str = "256MiB",
        ledger: Ledger | None = None,
        from_older_state: bool = False,
    ) -> Self:
        """Open a store at what was committed last. One in use is waited for, five seconds at most.

        Args:
            path: of its file, or of one on each of several drives, in the order in which it was created.
            engine: I/O engine: ``auto``, ``uring`` or ``threads``.
            memory: bytes of pinned memory, or such as ``"256MiB"``; at least two chunks of 8 MiB and 2 MiB.
            ledger: of memory; None makes one.
            from_older_state: read everything first; where the last commit is damaged and the one before it is whole, go
                back to that one, for good. What was committed since is lost then. ``generation`` says where it is.

        Raises:
            FormatError: it is no store of tensors; with ``from_older_state``, both states are damaged.
            StoreInUseError, CorruptionError, UnsupportedError, StorageError: it cannot be opened, and is as it was.
        """
        paths, memory, ledger = _paths(path), _nbytes(memory), _checked(ledger)
        _check_choice("engine", engine, get_args(Engine))
        if from_older_state:
            store = Store(paths, engine, ledger, waiting_line(paths[0]))
            try:
                store.go_back(None)
            finally:
                store.close()
        return cls(paths, engine=engine, memory=memory, ledger=ledger)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all tensors, in the order in which the store was created with them."""
        return tuple(self._specs)

    def spec(self, name: str) -> TensorSpec:
        """Shape, dtype and bytes of a tensor.

        Raises:
            ConfigError: the store has no tensor of that name.
        """
        if not isinstance(name, str):
            raise ConfigError(f"the name {name!r:.50} is {type(name).__name__}: names of tensors are text")
        if name not in self._specs:
            close = difflib.get_close_matches(name, self._specs, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else f": it has {len(self._specs)} tensors"
            raise ConfigError(f"{self.path} has no tensor {name!r}{hint}")
        return self._specs[name]

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor.

        Raises:
            ConfigError: the store has no tensor of that name.
        """
        return self.spec(name).shape

    def dtype(self, name: str) -> torch.dtype:
        """Dtype of a tensor.

        Raises:
            ConfigError: the store has no tensor of that name.
        """
        return self.spec(name).dtype

    def nbytes(self, name: str) -> int:
        """Bytes of all elements of a tensor.

        Raises:
            ConfigError: the store has no tensor of that name.
        """
        return self.spec(name).nbytes

    def empty(self, name: str) -> Tensor:
        """A tensor with that shape and dtype over memory of the store, content arbitrary.

        Its memory is free again when the last view of it is gone.

        Raises:
            PoolExhaustedError: it does not fit what is free of the memory.
        """
        spec = self.spec(name)
        if spec.nbytes == 0:
            return _tensor_over(None, spec)
        buffer = self._tensors.allocate(spec.nbytes)
        if buffer is None:
            self._exhausted(name)
        return _tensor_over(buffer, spec)

    def put(self, name: str, tensor: Tensor) -> Ticket:
        """Write a tensor; durable with the next ``commit``.

        Args:
            name: of a tensor of the store.
            tensor: contiguous, on the CPU, of that shape and dtype.

        Raises:
            ConfigError: it is not.
            BufferInUseError: it lies in the store's memory and another put or read of it is under way.
            StorageError, StoreFailedError, UsedAfterForkError: it cannot be written.
        """
        content = self._bytes_of(name, tensor)
        with self._turn:
            self._prefetched.pop(name, None)
            return Ticket(self._tensors.put(self._records[name], content) if content.size else None)

    def get(self, name: str, out: Tensor | None = None) -> Tensor:
        """Read a tensor and verify it; waits for it, and gives way to Ctrl-C.

        Args:
            name: of a tensor of the store.
            out: where to; contiguous, on the CPU, of that shape and dtype. None: memory of the store, or torch's own
                where it does not fit what is free of that.

        Raises:
            ConfigError: ``out`` does not fit.
            CorruptionError: the bytes are not those that were written; it names tensor and place.
            BufferInUseError: ``out`` lies in the store's memory and a transfer of it is under way.
            StorageError, StoreFailedError, UsedAfterForkError: it cannot be read.
        """
        spec = self.spec(name)
        content = None if out is None else self._bytes_of(name, out)
        with self._turn:
            ticket = self._prefetched.pop(name, None)
            if out is None and ticket is None:
                ticket = self._read(name)
            if ticket is None:
                out = torch.empty(spec.shape, dtype=spec.dtype) if out is None else out
                content = self._bytes_of(name, out) if content is None else content
                if content.size:
                    self._tensors.read_into(self._records[name], content)
                return out
        found = ticket.result()
        return found if out is None else out.copy_(found)

    def prefetch(self, name: str) -> PrefetchTicket:
        """Begin to read a tensor into memory of the store; the next ``get`` of it takes this one.

        Raises:
            PoolExhaustedError: it does not fit what is free of the memory.
            StoreFailedError, UsedAfterForkError: it cannot be read.
        """
        self.spec(name)
        with self._turn:
            found = self._prefetched.get(name) or self._read(name)
            if found is None:
                self._exhausted(name)
            self._prefetched[name] = found
            return found

    def commit(self) -> None:
        """Make everything that was put before durable, all at once; waits for it.

        A crash before it returns leaves all of it, or none. With durability ``scratch`` it only waits.

        Raises:
            MegatrainIoError: a put failed or was interrupted, and was not repeated; nothing is committed.
            StorageError, StoreFailedError, UsedAfterForkError: nothing newer is durable for certain.
        """
        with self._turn:
            ticket = self._tensors.commit()
        ticket.wait()

    def verify(self, progress: Callable[[int, int], None] | None = None) -> VerifyReport:
        """Read back everything that is committed, and compare every checksum.

        With durability ``scratch`` that is everything that was put.

        Args:
            progress: called with the extents done and in all.
        """
        with self._turn:
            (self._tensors.commit() if self.durability == "scratch" else self._tensors.drain()).wait()
            return verified(self._store, progress)

    @property
    def generation(self) -> int:
        """Number of the newest commit; 1 is the creation."""
        return self._store.generation

    @property
    def engine(self) -> str:
        """Name of the I/O engine in use: ``uring`` or ``threads``."""
        return self._store.engine[0]

    @property
    def notes(self) -> list[str]:
        """What makes this store slower than it could be, one sentence each."""
        return notes_of(self._store, self._tensors.registration_refused, self._tensors.huge_pages)

    def io_bytes(self) -> tuple[int, int]:
        """Bytes read and bytes written through the I/O engine since the store was opened."""
        return self._store.io_bytes()

    def close(self) -> None:
        """Wait for what is under way and close the store. What was not committed is dropped.

        With durability ``scratch`` there is nothing to go back to: what was put stays. Tensors over the store's
        memory stay valid.

        Raises:
            StorageError: the store could not be marked clean; what was committed is safe, but for scratch.
        """
        with self._turn:
            self._prefetched.clear()
            self._tensors.close()
            self._store.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Commit, unless the context ended by an exception, and close."""
        # After an error that one is the news, not what closing then meets.
        with suppress(MegatrainIoError) if error is not None else nullcontext():
            try:
                if error is None:
                    self.commit()
            finally:
                self.close()

    def _read(self, name: str) -> PrefetchTicket | None:
        """Begin to read a tensor into memory of the store; None where it does not fit what is free."""
        spec = self.spec(name)
        transfer = self._tensors.prefetch(self._records[name]) if spec.nbytes else None
        if spec.nbytes and transfer is None:
            return None
        return PrefetchTicket(transfer, self, name)

    def _forget(self, name: str, ticket: PrefetchTicket) -> None:
        with self._turn:
            if self._prefetched.get(name) is ticket:
                del self._prefetched[name]

    def _bytes_of(self, name: str, tensor: Any) -> "np.ndarray[Any, np.dtype[np.uint8]]":
        """The bytes of a tensor that fits ``name``, without a copy."""
        spec = self.spec(name)
        if not isinstance(tensor, Tensor) or tensor.is_nested:
            what = "a nested tensor" if isinstance(tensor, Tensor) else type(tensor).__name__
            raise ConfigError(
                f"tensor {name!r} was given as {what}: give a tensor of torch (torch.from_numpy, torch.tensor)"
            )
        if tensor.dtype != spec.dtype or tuple(tensor.shape) != spec.shape:
            raise ConfigError(
                f"tensor {name!r} has shape {spec.shape} and dtype {spec.dtype}, and was given shape "
                f"{tuple(tensor.shape)} and dtype {tensor.dtype}"
            )
        if tensor.device.type != "cpu":
            raise ConfigError(
                f"tensor {name!r} was given on device {tensor.device}: bring it to the CPU first (.cpu(), or copy_ "
                "into store.empty(name))"
            )
        if (
            tensor.layout != torch.strided
            or not tensor.is_contiguous()
            or tensor.is_conj()
            or tensor.is_neg()
        ):
            raise ConfigError(
                f"tensor {name!r} was given in a form that is not contiguous: call .contiguous() (a lazy conjugate: "
                ".resolve_conj(), .resolve_neg())"
            )
        try:
            return tensor.detach().reshape(-1).view(torch.uint8).numpy()
        except RuntimeError as error:
            raise ConfigError(
                f"tensor {name!r} has no memory of its own that can be read ({error}): give a plain tensor, outside of "
                "vmap, grad and fake modes"
            ) from error

    def _exhausted(self, name: str) -> NoReturn:
        free, longest = self._tensors.free_nbytes()
        raise PoolExhaustedError(
            f"tensor {name!r} has {self.nbytes(name)} bytes and the longest free run of the store's memory has "
            f"{longest} (of {free} free in all): drop tensors over it, or open the store with more memory"
        )


def _tensor_over(buffer: Any, spec: TensorSpec) -> Tensor:
    if buffer is None:
        return torch.empty(spec.shape, dtype=spec.dtype)
    flat: Tensor = from_dlpack(buffer)
    return flat.view(spec.dtype).view(spec.shape)


def _paths(path: Any) -> list[Path]:
    paths = [path] if isinstance(path, str | Path) else path
    if not isinstance(paths, Sequence) or not all(isinstance(each, str | Path) for each in paths):
        raise ConfigError(
            f"path is {path!r:.100}: give the path of a file, or a list of them, one for each drive"
        )
    if not 0 < len(paths) <= _DRIVES_MAX:
        raise ConfigError(f"{len(paths)} paths: a store has 1 to {_DRIVES_MAX} files, one for each drive")
    for each in paths:
        text = str(each)
        if not text or "\0" in text:
            raise ConfigError(f"path is {text!r:.100}: that cannot name a file")
        try:
            os.fsencode(text)
        except UnicodeEncodeError:
            raise ConfigError(f"path is {text!r:.100}: that cannot name a file on this system") from None
    return [Path(each) for each in paths]


def _check_choice(name: str, value: object, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise ConfigError(f"{name} is {value!r:.50}: it must be one of {', '.join(allowed)}")


def _checked(ledger: Ledger | None) -> Ledger:
    if ledger is not None and not isinstance(ledger, Ledger):
        raise ConfigError(f"ledger is {type(ledger).__name__}: give a Ledger, or nothing")
    return ledger or Ledger()


def _check_memory(memory: int, specs: Mapping[str, TensorSpec]) -> None:
    """Refuse memory that is too little to move any tensor, or more than the machine has: it is populated at once."""
    if memory < (least := least_memory(specs)):
        raise ConfigError(f"memory is {memory} bytes: this store needs {least} at least")
    free, because = usable_ram()
    if memory > free:
        raise DoesNotFitError(
            f"memory is {memory} bytes, and {free} bytes of RAM are free ({because}): give less, or end other programs"
        )


def _manifest_text(specs: Mapping[str, TensorSpec], durability: str) -> bytes:
    text = json.dumps(manifest_of(specs, durability), separators=(",", ":"), ensure_ascii=False).encode()
    if len(text) > _MANIFEST_BYTES_MAX:
        raise ConfigError(
            f"the names and shapes of these {len(specs)} tensors take {len(text)} bytes, and a store has room for "
            f"{_MANIFEST_BYTES_MAX}: choose shorter names, or make several stores"
        )
    return text


def _nbytes(size: int | str) -> int:
    """Bytes of a size such as ``"1.5GiB"``."""
    found = re.fullmatch(r"([0-9]{1,15}(?:\.[0-9]{1,15})?)\s*([KMGT]iB|B|)", str(size).strip())
    if found is None or isinstance(size, bool):
        raise ConfigError(f"memory is {size!r}: give bytes, or a number with KiB, MiB, GiB or TiB")
    return int(float(found[1]) * _UNITS[found[2]])
