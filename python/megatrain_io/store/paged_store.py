"""Records of a store as tensors, for as long as they are borrowed: the way to the extension for all who open a store.

``PagedStore`` owns store, pool and pipeline. A borrowed record is a mapping from parameter name to tensor
over a buffer of the pool; giving it back with a tensor still alive raises, because the buffer will be
filled with something else.
"""

import math
import warnings
import weakref
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import ClassVar, Literal, Self

import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from megatrain_io import _lib
from megatrain_io.errors import BufferInUseError, MegatrainIoError
from megatrain_io.machine.extension import build_info
from megatrain_io.store.advice import notes_of
from megatrain_io.store.dtypes import dtype_of
from megatrain_io.store.inspect import waiting_line
from megatrain_io.store.layout import ModelLayout, Record, TensorPlace
from megatrain_io.store.pool import PoolSizes, Unit
from megatrain_io.store.schedule import ChunkOp, Residents
from megatrain_io.store.verify import OlderState, VerifyReport, older_state_of, report_of

__all__ = [
    "AdamWStep",
    "BorrowedRecord",
    "Buffer",
    "CheckedSchedule",
    "Engine",
    "Ledger",
    "PagedStore",
    "RecordTensors",
    "Store",
    "StoreCreator",
    "TensorSettings",
    "Transfer",
    "allocate",
    "store_memory",
    "values_of",
    "verified",
]

Engine = Literal["auto", "uring", "threads"]

Buffer = _lib.Buffer
CheckedSchedule = _lib.CheckedSchedule
Ledger = _lib.Ledger
Store = _lib.Store
RecordTensors = _lib.RecordTensors
StoreCreator = _lib.StoreCreator
Transfer = _lib.Transfer
store_memory = _lib.store_memory

_OF_BITS = {torch.uint16: torch.bfloat16, torch.uint32: torch.float32}

if build_info()[1] == "debug":
    warnings.warn(
        "the extension was built without optimisation: it is many times slower. Build with --release",
        stacklevel=2,
    )


@dataclass(frozen=True)
class AdamWStep:
    """Hyperparameters of one AdamW update (Loshchilov and Hutter, arXiv:1711.05101), as ``torch.optim.AdamW`` has them.

    ``step`` counts from 1. It is AdamW's t in a store that has one for all records (``PagedStore.updates``); in others
    each record's own is.
    """

    optimizer: ClassVar[Literal["adamw"]] = "adamw"
    """Its name, by which the core knows what hyperparameters these are."""
    step: int
    learning_rate: float
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8


@dataclass(frozen=True)
class TensorSettings:
    """What may differ from tensor to tensor in an update.

    Attributes:
        weight_decay: decoupled weight decay.
        lr_scale: factor on the learning rate.
    """

    weight_decay: float
    lr_scale: float = 1.0

    @classmethod
    def usual(cls, place: TensorPlace, weight_decay: float) -> Self:
        """The usual recipe: matrices and embeddings decay, norms and biases do not."""
        return cls(weight_decay if len(place.shape) > 1 else 0.0)


class BorrowedRecord:
    """Tensors over one record's buffer; ``tensors`` is empty once it was given back.

    For weights the tensors have the compute dtype, for gradients they are fp32 with arbitrary content.
    """

    def __init__(self, buffer: _lib.Buffer, record: Record) -> None:
        self._buffer = buffer
        flat = values_of(buffer)
        self.tensors: dict[str, Tensor] = {
            place.name: flat[place.offset : place.offset + place.elements].view(place.shape)
            for place in record.tensors
        }

    def take(self) -> _lib.Buffer:
        """Drop the tensors, and return the buffer beneath them."""
        self.tensors = {}
        return self._buffer

    def give_back(self) -> None:
        """Return the buffer to the pool.

        Raises:
            BufferInUseError: a tensor or view over it is still alive.
        """
        self.take().release()


def values_of(buffer: _lib.Buffer) -> Tensor:
    """The content of a buffer as a flat tensor in the dtype that computes; frozen weights are exported as bits."""
    flat: Tensor = from_dlpack(buffer)
    return flat.view(_OF_BITS[flat.dtype]) if flat.dtype in _OF_BITS else flat


def allocate(nbytes: int, ledger: Ledger, account: str) -> Tensor:
    """Zeroed memory outside torch's heap, uint8 [nbytes], in huge pages and not inherited by forks.

    It counts in ``account`` of the ledger until the last tensor over it is gone.
    """
    flat: Tensor = from_dlpack(_lib.allocate(nbytes, ledger, account))
    return flat


class PagedStore:
    """A store, its pool and the pipeline that moves records between them.

    One step at a time: ``begin``, then ``weights`` in the schedule's order, ``gradient`` and ``submit`` for
    each record to update, ``end``. Calls that wait release the interpreter lock, and Ctrl-C ends them.
    """

    def __init__(self, *paths: Path, engine: Engine = "auto", ledger: Ledger | None = None) -> None:
        """Open the store at its newest whole generation; its files lie at ``paths``, one for each drive.

        A store in use is waited for, five seconds at most: a killed process holds it until its last writes
        have landed. After one second the log says what is waited for.

        Raises:
            StoreInUseError, FormatError, CorruptionError, UnsupportedError, StorageError: it cannot be opened, and is
                as it was.
        """
        self.ledger = ledger or Ledger()
        self.path = paths[0]
        self._store = _lib.Store(paths, engine, self.ledger, waiting_line(self.path))
        self.layout = ModelLayout.from_manifest(self._store.manifest)
        self._pipeline: _lib.Pipeline | None = None
        self.residents = Residents()
        """What stays in RAM from step to step."""
        self._borrowed: weakref.WeakSet[BorrowedRecord] = weakref.WeakSet()

    def start(
        self,
        pool: PoolSizes,
        *,
        residents: Residents | None = None,
        gradient_files: Sequence[Path] = (),
        settings: Callable[[TensorPlace], TensorSettings] | None = None,
        threads: int = 0,
        kernel: str | None = None,
        unit: Unit = "record",
    ) -> None:
        """Allocate the pool and start the pipeline; a pipeline started before is closed.

        Args:
            pool: sizes of all buffers; nothing grows later.
            residents: what stays in RAM from step to step, in memory of its own.
            gradient_files: where gradients wait for their norm that have no memory of their own, one for each
                drive. They have no name afterwards.
            settings: weight decay and learning-rate scale of each trained tensor; None reads only.
            threads: for AdamW and checksums; 0 = one for each core.
            kernel: one of ``adamw_kernels()``; None = the fastest.
            unit: what a buffer holds. Of a chunk, ``take_chunk`` and so on take the place of ``weights``,
                ``gradient`` and ``submit``; schedules are checked with the same unit.
        """
        self._stop()
        tensors: list[tuple[int, int, int, float, float]] = []
        for place in self.layout.tensors():
            if settings is not None and self.layout.records[place.record].is_trained:
                own = settings(place)
                tensors.append((place.record, place.offset, place.elements, own.weight_decay, own.lr_scale))
        weights, gradients = (
            [(kind.format, kind.nbytes, kind.count) for kind in kinds]
            for kinds in (pool.weights, pool.gradients)
        )
        self.residents = kept = residents or Residents()
        stay = (
            self._units(kept.records, unit),
            sorted(kept.chunks),
            self._units(kept.gradients, unit),
        )
        self._pipeline = _lib.Pipeline(
            self._store,
            {
                "chunk_slots": pool.chunk_slots,
                "weights": weights,
                "outgoing": pool.outgoing,
                "gradients": gradients,
            },
            threads,
            kernel,
            tensors,
            stay,
            list(gradient_files),
            unit,
        )

    def check(self, schedule: Sequence[ChunkOp], *, unit: Unit = "record") -> CheckedSchedule:
        """Check a schedule against the store, once, for any number of steps."""
        operations = [(operation.kind, operation.chunk.index) for operation in schedule]
        return _lib.CheckedSchedule(self._store, operations, unit)

    def begin(self, schedule: CheckedSchedule, hyperparameters: AdamWStep, *, commits: bool = False) -> None:
        """Begin a step: its reads start at once.

        Args:
            schedule: of the step.
            hyperparameters: of its updates, and with them the optimizer.
            commits: whether ``end`` will get a blob: then what stays in RAM is written as it is updated.
        """
        self._running().begin(schedule, hyperparameters, commits)

    def weights(self, record: int) -> BorrowedRecord:
        """The weights of the schedule's next load, which must be of ``record``; waits for them."""
        return self._borrow(self._running().take_weights(record), record)

    def gradient(self, record: int) -> BorrowedRecord:
        """An fp32 gradient buffer for ``record``, content arbitrary; waits for a free one."""
        return self._borrow(self._running().take_gradient(record), record)

    def submit(self, record: int, weights: BorrowedRecord, gradient: BorrowedRecord) -> None:
        """Hand over the gradient of a record, with its weights: it is updated and written in the background.

        Raises:
            BufferInUseError: a tensor over weights or gradient is still alive.
        """
        self._running().submit(record, weights.take(), gradient.take())

    def skip(self, record: int, weights: BorrowedRecord) -> None:
        """Say that a record which the step updates got no gradient, and give its weights back.

        It is not updated: its t does not advance, and nothing of it is written but what changed in RAM alone.

        Raises:
            BufferInUseError: a tensor over its weights is still alive.
            MegatrainIoError: the store has one t for all records.
        """
        self._running().skip(record, weights.take())

    def take_chunk(self, chunk: int) -> Buffer:
        """By chunk: the weights of the schedule's next load; waits for them."""
        return self._running().take_weights(chunk)

    def try_chunk(self, chunk: int, patience: float) -> Buffer | None:
        """By chunk: the weights of the schedule's next load; None when ``patience`` seconds have passed."""
        return self._running().take_weights(chunk, patience)

    def try_chunk_gradient(self, chunk: int, patience: float) -> Buffer | None:
        """By chunk: an fp32 gradient buffer, content arbitrary; None when none comes free for so long."""
        return self._running().take_gradient(chunk, patience)

    def try_outgoing(self, chunk: int, patience: float) -> Buffer | None:
        """By chunk: a buffer for weights that come back for their update; None likewise."""
        return self._running().take_outgoing(chunk, patience)

    def submit_chunk(self, chunk: int, weights: Buffer | None, gradient: Buffer) -> None:
        """By chunk: hand a gradient over; without weights if the step only defers it."""
        self._running().submit(chunk, weights, gradient)

    def skip_chunk(self, chunk: int, weights: Buffer | None) -> None:
        """By chunk: say that it got no gradient, as all of its record; weights that stay in RAM are given back."""
        self._running().skip(chunk, weights)

    def gradient_norm(self) -> float:
        """The norm over all gradients of the step that was begun; waits for the last one.

        Squares are summed in f64 in an order that depends on the tensors alone (docs/design.md).

        Raises:
            NotFiniteError: a gradient has an element that is NaN or infinite; the message names its record.
        """
        return math.sqrt(self._running().squares())

    def end(self, blob: bytes | None, applied: float | None = None) -> None:
        """End the step; with a trainer blob it is committed while the next one begins.

        Args:
            blob: the trainer's state; None = the step becomes durable with the next commit.
            applied: the next step applies the gradients that this one deferred, multiplied by this (exact as fp32),
                and updates of this one are taken back; None = they stand.
        """
        self._running().end(blob, applied)

    def wait_durable(self) -> None:
        """Wait until every finished step is durable: written, and committed if that was asked for."""
        self._running().wait_durable()

    def abort(self) -> None:
        """Drop the pending step, and with it everything since the last commit.

        A step finished with a blob is committed first. ``blob`` says from which step to go on.
        """
        for borrowed in list(self._borrowed):
            # A tensor that somebody still holds keeps its buffer until it dies.
            with suppress(BufferInUseError, MegatrainIoError):
                borrowed.give_back()
        self._borrowed.clear()
        if self._pipeline is not None:
            self._pipeline.abort()

    def read_plane(self, chunk: int, plane: str) -> bytes:
        """Committed little-endian bytes of a plane of a chunk: ``weight``, ``master``, ``exp_avg``, ``exp_avg_sq``."""
        return self._store.read_plane(chunk, plane)

    def read_tensor(self, place: TensorPlace, plane: str) -> Tensor:
        """One committed tensor: ``weight`` in the dtype that it computes in, the other planes in fp32.

        The master of what is not trained is its weight. Between steps only: chunks read while a commit is under way
        could be of two generations.
        """
        state_format = self.layout.records[place.record].format
        if plane == "master" and not self.layout.records[place.record].is_trained:
            return self.read_tensor(place, "weight").float()
        dtype = torch.float32 if plane != "weight" else dtype_of(state_format)
        width = dtype.itemsize
        if self._pipeline is not None:
            self._pipeline.wait_durable()
        out = torch.empty(place.elements, dtype=dtype)
        end = place.offset + place.elements
        for chunk in self.layout.chunks_of(place.record):
            start, stop = max(chunk.start, place.offset), min(chunk.start + chunk.parameters, end)
            if start < stop:
                values = bytearray(self._store.read_plane(chunk.index, plane))
                part = torch.frombuffer(values, dtype=dtype)
                out[start - place.offset : stop - place.offset] = part[
                    start - chunk.start : stop - chunk.start
                ]
        if width * place.elements == 0:
            raise ValueError(f"{place.name} has no elements")
        return out.view(place.shape)

    def verify(self, progress: Callable[[int, int], None] | None = None) -> VerifyReport:
        """Read back all that is committed, and compare every checksum; ``progress`` gets extents done and in all."""
        return verified(self._store, progress)

    def verify_older(self, progress: Callable[[int, int], None] | None = None) -> OlderState | None:
        """Read back the state before the committed one; None when there is none any more.

        There is one until the first update after a commit; with durability ``scratch`` there never is.
        """
        older = self._store.verify_older(progress)
        return None if older is None else older_state_of(older)

    def go_back(self, progress: Callable[[int, int], None] | None = None) -> int | None:
        """Give the committed state up, durably, if it is damaged and the one before it is whole.

        Returns:
            The generation that the store went back to: it is to be closed, and opened anew to go on. None when the
            committed state is whole, and nothing was changed.

        Raises:
            FormatError: there is no older state any more, or it is damaged, too. Nothing was changed.
        """
        return self._store.go_back(progress)

    def pool_memory(self) -> Tensor:
        """The memory of the whole pool, for its address and length alone; a tensor over it keeps it mapped."""
        memory: Tensor = from_dlpack(self._running().pool_memory())
        return memory

    @property
    def uuid(self) -> str:
        """UUID of the store, as text: it is made at the import and never changes."""
        return self._store.uuid

    @property
    def generation(self) -> int:
        """Number of the newest committed state; 1 is the import."""
        return self._store.generation

    @property
    def updates(self) -> list[int] | None:
        """How often each record was updated in that generation: AdamW's t; 0 where it is not trained.

        None where the store was made with a format before 0.4: its trainer has one number for all records.
        """
        by_chunk = self._store.updates()
        if by_chunk is None:
            return None
        records = range(len(self.layout.records))
        return [by_chunk[self.layout.chunks_of(record)[0].index] for record in records]

    @property
    def blob(self) -> bytes:
        """The trainer's own state, committed with that generation."""
        return self._store.blob

    @property
    def manifest(self) -> str:
        """What the store holds, as JSON."""
        return self._store.manifest

    @property
    def engine(self) -> tuple[str, str | None]:
        """Name of the I/O engine in use, and why it is not io_uring where that was left open."""
        return self._store.engine

    @property
    def is_direct(self) -> bool:
        """Whether transfers bypass the page cache."""
        return self._store.is_direct

    @property
    def dio_alignment(self) -> tuple[int, int] | None:
        """Alignment of direct transfers, in bytes: (in memory, in the file); None where the kernel does not say."""
        return self._store.dio_alignment

    @property
    def notes(self) -> list[str]:
        """What makes this store slower than it could be, one sentence each."""
        pipeline = self._pipeline
        if pipeline is None:
            return notes_of(self._store)
        return notes_of(self._store, pipeline.registration_refused, pipeline.huge_pages)

    def io_bytes(self) -> tuple[int, int]:
        """Bytes read and bytes written through the I/O engine since the store was opened."""
        return self._store.io_bytes()

    def timings(self) -> Mapping[str, float]:
        """Seconds since ``start``, by name: ``stall_`` and the cause of a wait, ``update`` and ``verify``."""
        return dict(self._running().timings())

    def record_events(self) -> None:
        """Record what the pipeline does from now on, for ``take_events``."""
        self._running().record_events()

    def take_events(self) -> tuple[list[tuple[str, str, int | None, int, int]], int]:
        """Lane, name, chunk, start and end (ns) of each event since the last call, and how many more were dropped."""
        return ([], 0) if self._pipeline is None else self._pipeline.take_events()

    def close(self) -> None:
        """Wait until finished steps are durable, stop, and mark the store clean.

        A pending step is dropped.

        Raises:
            StorageError, StoreFailedError: a finished step could not be made durable.
        """
        try:
            if self._pipeline is not None:
                self._pipeline.wait_durable()
        finally:
            self._stop()
            self._store.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        # After an error that one is the news, not what closing then meets.
        with suppress(MegatrainIoError) if error is not None else nullcontext():
            self.close()

    def _borrow(self, buffer: Buffer, record: int) -> BorrowedRecord:
        borrowed = BorrowedRecord(buffer, self.layout.records[record])
        self._borrowed.add(borrowed)
        return borrowed

    def _units(self, records: Collection[int], unit: Unit) -> list[int]:
        if unit == "record":
            return sorted(records)
        return [chunk.index for record in sorted(records) for chunk in self.layout.chunks_of(record)]

    def _running(self) -> _lib.Pipeline:
        if self._pipeline is None:
            raise RuntimeError("the pipeline was not started: call start() first")
        return self._pipeline

    def _stop(self) -> None:
        if self._pipeline is not None:
            self._pipeline.close()
            self._pipeline = None


def verified(store: Store, progress: Callable[[int, int], None] | None) -> VerifyReport:
    """Read everything that is committed back and compare every checksum."""
    return report_of(store.verify(progress))
