"""The extension module. Few modules of the package import it; ``mypy.stubtest`` keeps this stub true."""

from collections.abc import Callable, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, Literal, Protocol, TypedDict, final, overload

__all__ = [
    "Buffer",
    "CheckedSchedule",
    "HeldFile",
    "Ledger",
    "Pipeline",
    "RecordTensors",
    "ScratchFile",
    "Store",
    "StoreCreator",
    "Transfer",
    "Workload",
    "adamw_kernels",
    "adamw_step",
    "allocate",
    "build_info",
    "dio_alignment",
    "error_examples",
    "inspect",
    "owner_of",
    "probe_uring",
    "state_formats",
    "store_memory",
]

class _DamagedExtent(TypedDict):
    record: str
    chunk: int
    group: str
    tensors: list[str]
    path: Path
    offset: int | None
    expected: int | None
    found: int | None
    message: str

class _Report(TypedDict):
    generation: int
    extents: int
    nbytes: int
    damaged: list[_DamagedExtent]

class _OlderReport(_Report):
    blob: bytes

class _Owner(TypedDict):
    text: str
    process: int | None
    command: str
    since: str
    has_ended: bool

class _StoreInfo(TypedDict):
    uuid: str
    manifest: str
    generation: int
    blob: bytes
    is_clean: bool
    is_of_this_boot: bool
    is_direct: bool

class _StateFormat(TypedDict):
    planes: list[tuple[str, str, int]]
    step_nbytes: tuple[int, int]

class _AdamWStep(Protocol):
    @property
    def optimizer(self) -> Literal["adamw"]: ...
    @property
    def learning_rate(self) -> float: ...
    @property
    def beta1(self) -> float: ...
    @property
    def beta2(self) -> float: ...
    @property
    def eps(self) -> float: ...
    @property
    def step(self) -> int: ...

class _PoolArguments(TypedDict):
    chunk_slots: tuple[int, int]
    weights: Sequence[tuple[str | None, int, int]]
    outgoing: tuple[int, int]
    gradients: Sequence[tuple[str | None, int, int]]

class _Work(TypedDict):
    read: int
    written: int
    seconds: float
    cpu_seconds: float

class _Transfer(_Work):
    registration_refused: str | None

@final
class Ledger:
    """Bytes of allocated memory by account, now and at their peak."""

    def __new__(cls) -> Ledger: ...
    def set(self, account: str, nbytes: int) -> None:
        """Set the bytes that ``account`` holds now."""

    def balances(self) -> dict[str, tuple[int, int]]:
        """``{account: (current, peak)}`` in bytes."""

    def total(self) -> tuple[int, int]:
        """``(current, peak)`` of all accounts together, in bytes."""

@final
class StoreCreator:
    """A store that is being filled by an import."""

    def __new__(
        cls, paths: Sequence[str | PathLike[str]], manifest: bytes, engine: str, ledger: Ledger
    ) -> StoreCreator: ...
    @property
    def uuid(self) -> str:
        """UUID of the store that is being made."""

    def chunks(self) -> list[tuple[int, int, int]]:
        """``(record, start, parameters)`` of every chunk."""

    def write_chunk(self, chunk: int, values: bytes, dtype: str) -> None:
        """Write a chunk's weights: little-endian bytes of all its parameters, padding included.

        ``dtype`` is ``float32``, ``bfloat16``, or ``raw`` for a record that is not trained.
        """

    def finish(self, blob: bytes) -> str:
        """Commit generation 1 and return the store's UUID."""

    def abandon(self) -> None:
        """Remove what was written, unless the store is finished."""

@final
class Store:
    """An open store, locked against other processes."""

    def __new__(
        cls,
        paths: Sequence[str | PathLike[str]],
        engine: str,
        ledger: Ledger,
        waiting: Callable[[str], object] | None = None,
        faults: Sequence[tuple[str, int, int, bool]] = ...,
    ) -> Store:
        """Open a store; ``waiting`` is called once when another process has held it for a second, with its name."""

    @property
    def uuid(self) -> str: ...
    @property
    def generation(self) -> int: ...
    def updates(self) -> list[int] | None: ...
    @property
    def blob(self) -> bytes: ...
    @property
    def manifest(self) -> str: ...
    @property
    def engine(self) -> tuple[str, str | None]: ...
    @property
    def is_direct(self) -> bool: ...
    @property
    def dio_alignment(self) -> tuple[int, int] | None: ...
    @property
    def fell_back_from(self) -> int | None: ...
    @property
    def verified_at_open(self) -> int | None: ...
    def io_bytes(self) -> tuple[int, int]:
        """Bytes read and bytes written through the I/O engine since the store was opened."""

    def chunks(self) -> list[tuple[int, int, int]]:
        """``(record, start, parameters)`` of every chunk."""

    def read_plane(self, chunk: int, plane: str) -> bytes:
        """Little-endian bytes of ``weight``, ``master``, ``exp_avg`` or ``exp_avg_sq`` of one chunk."""

    def verify(self, progress: Callable[[int, int], object] | None) -> _Report:
        """Read the committed state back and compare every checksum; ``progress`` gets extents done and in all."""

    def verify_older(self, progress: Callable[[int, int], object] | None) -> _OlderReport | None:
        """The same for the state before the committed one; None when there is none any more."""

    def go_back(self, progress: Callable[[int, int], object] | None) -> int | None:
        """Give the committed state up, durably, if it is damaged and the one before it is whole; close it then."""

    def close(self) -> None:
        """Mark the store clean on the drive, and close it."""

@final
class HeldFile:
    """A file that this process holds, so that nobody can open it as a store."""

    def __new__(
        cls, path: str | PathLike[str], waiting: Callable[[str], object] | None = None
    ) -> HeldFile: ...
    def remove(self) -> None:
        """Remove the file, durably, and release it."""

    def release(self) -> None:
        """Release the file, so that others can open it."""

@final
class CheckedSchedule:
    """The chunk operations of one step, checked against a store."""

    def __new__(
        cls, store: Store, operations: Sequence[tuple[str, int]], unit: Literal["record", "chunk"] = "record"
    ) -> CheckedSchedule: ...

@final
class Buffer:
    """A buffer of the pool, seen as a one-dimensional tensor (``torch.from_dlpack``)."""

    @property
    def exports(self) -> int: ...
    @property
    def what(self) -> str: ...
    def release(self) -> None:
        """Give the buffer back to the pool; raises while a tensor over it is alive."""

    def __dlpack_device__(self) -> tuple[int, int]: ...
    def __dlpack__(
        self,
        *,
        stream: Any = None,
        max_version: tuple[int, int] | None = None,
        dl_device: tuple[int, int] | None = None,
        copy: bool | None = None,
    ) -> Any: ...

@final
class Pipeline:
    """Reads ahead, updates and writes behind, while the caller computes."""

    def __new__(
        cls,
        store: Store,
        pool: _PoolArguments,
        threads: int,
        kernel: str | None,
        tensors: Sequence[tuple[int, int, int, float, float]],
        residents: tuple[Sequence[int], Sequence[int], Sequence[int]],
        gradient_files: Sequence[Path],
        unit: Literal["record", "chunk"] = "record",
    ) -> Pipeline:
        """A unit is what one buffer holds."""

    @property
    def registration_refused(self) -> str | None: ...
    @property
    def huge_pages(self) -> tuple[int, int] | None: ...
    def begin(self, schedule: CheckedSchedule, hyperparameters: _AdamWStep, commits: bool) -> None:
        """Begin a step; ``optimizer`` names the optimizer that the hyperparameters are of."""

    @overload
    def take_weights(self, unit: int, patience: None = None) -> Buffer:
        """The weights of the schedule's next load, which must be of ``unit``."""
    @overload
    def take_weights(self, unit: int, patience: float) -> Buffer | None:
        """The same; None when ``patience`` seconds have passed."""
    @overload
    def take_gradient(self, unit: int, patience: None = None) -> Buffer:
        """A free fp32 gradient buffer for ``unit``, its content arbitrary."""
    @overload
    def take_gradient(self, unit: int, patience: float) -> Buffer | None:
        """The same; None when ``patience`` seconds have passed."""
    @overload
    def take_outgoing(self, unit: int, patience: None = None) -> Buffer:
        """By chunk, a free buffer for the weights of ``unit`` that come back for their update."""
    @overload
    def take_outgoing(self, unit: int, patience: float) -> Buffer | None:
        """The same; None when ``patience`` seconds have passed."""

    def submit(self, unit: int, weights: Buffer | None, gradient: Buffer) -> None:
        """Hand the gradient of a whole unit over, with its weights, or without if the step only defers it."""

    def skip(self, unit: int, weights: Buffer | None) -> None:
        """Say that a unit got no gradient: it is not updated. Weights that stay in RAM are handed over."""

    def pool_memory(self) -> Buffer:
        """The memory of the whole pool, for its address and length alone: not to be read or written through it."""

    def squares(self) -> float:
        """The sum of the squares of all gradients of the step, in f64. Waits for the last one."""

    def end(self, blob: bytes | None, applied: float | None) -> None:
        """End the step; with a blob it is committed in the background.

        ``applied``: the next step applies the gradients that were kept, multiplied by it; None: updates stand.
        """

    def wait_durable(self) -> None:
        """Wait until every finished step is durable: written, and committed if that was asked for."""

    def abort(self) -> None:
        """Drop the pending step, back to the last commit; a step finished with a blob is committed first."""

    def timings(self) -> list[tuple[str, float]]:
        """Seconds since the start: ``stall_`` and a cause for each, ``update``, ``verify``."""

    def record_events(self) -> None:
        """Record events from now on, for ``take_events``."""

    def take_events(self) -> tuple[list[tuple[str, str, int | None, int, int]], int]:
        """``(lane, name, chunk, start, end)`` of each event since the last call, and how many more were dropped.

        Times are nanoseconds of ``time.monotonic_ns``.
        """

    def close(self) -> None:
        """Write the finished steps, drop a pending one, and stop."""

@final
class Transfer:
    """Something that was asked for; it goes on whether or not anybody waits."""

    @property
    def done(self) -> bool: ...
    def wait(self) -> None:
        """Wait until it has ended; raises what it failed with, if it did."""

    def buffer(self) -> Buffer:
        """The memory of the store that a prefetch has filled."""

@final
class RecordTensors:
    """Tensors of one store, by record: memory, transfers, commit."""

    def __new__(cls, store: Store, memory_nbytes: int, account: str | None = None) -> RecordTensors:
        """With ``account`` the memory stands under that name, and no tensor elsewhere can be put or read."""

    @property
    def registration_refused(self) -> str | None: ...
    @property
    def huge_pages(self) -> tuple[int, int] | None: ...
    def free_nbytes(self) -> tuple[int, int]:
        """Bytes of the memory that are free, and bytes of the longest free run."""

    def allocate(self, nbytes: int) -> Buffer | None:
        """Memory of the store for ``nbytes``, its content arbitrary; None when no free run is as long."""

    def put(self, record: int, content: Any) -> Transfer:
        """Write a tensor, given as its bytes."""

    def read_into(self, record: int, content: Any) -> None:
        """Read a tensor into writable bytes and wait for it."""

    def put_front(self, record: int, content: Any) -> Transfer:
        """Write memory of the store, all that was allocated at once, as a tensor's first chunks."""

    def fill_front(self, record: int, content: Any) -> Transfer:
        """Begin to read a tensor's first chunks into memory of the store, all that was allocated at once."""

    def prefetch(self, record: int) -> Transfer | None:
        """Begin to read a tensor into memory of the store; None when no free run is as long."""

    def commit(self) -> Transfer:
        """Make everything that was put before durable, all at once."""

    def drain(self) -> Transfer:
        """Wait for everything that was asked for before."""

    def close(self) -> None:
        """Wait for all transfers, and stop."""

@final
class ScratchFile:
    """A file to measure transfers on, with an engine. It has no name: nothing is left behind."""

    def __new__(cls, folder: str | PathLike[str], nbytes: int, engine: str) -> ScratchFile: ...
    @property
    def engine(self) -> tuple[str, str | None]: ...
    @property
    def is_direct(self) -> bool: ...
    def transfer(
        self,
        traffic: str,
        form: tuple[int, int],
        limit: tuple[int, float | None],
        offset: int,
    ) -> _Transfer:
        """Transfer from ``offset`` on, round and round.

        ``traffic`` is ``read``, ``write``, ``mixed`` or ``training``; ``form`` is bytes of a request and
        requests in flight; ``limit`` is the bytes and, unless None, the seconds after which it ends.
        """

    def fill(self) -> None:
        """Write the whole file once."""

    def verify(self) -> None:
        """Read the whole file and compare it with what was written."""

    def flush_latency(self, count: int, seconds: float) -> tuple[list[float], list[float]]:
        """Seconds of each ``fdatasync`` after 4 MiB were written, and of each durable write of 4 KiB."""

    def close(self) -> None:
        """Close the file, which gives its space back."""

@final
class Workload:
    """Work to measure on all cores, by its name.

    ``copy``, ``update``, ``checksum``, ``adamw f32``, ``adamw split``, the last two also with `` in place``.
    """

    def __new__(cls, name: str, parameters: int, kernel: str | None = None) -> Workload: ...
    def run(self) -> _Work:
        """Run the work once, and measure it."""

def adamw_step(
    weight: bytes,
    gradient: bytes,
    moments: tuple[bytes, bytes],
    adamw: tuple[float, float, float, float, int],
    weight_decay: float,
) -> list[bytes]:
    """One AdamW step (Loshchilov and Hutter, arXiv:1711.05101) on little-endian f32.

    Returns the new weight, ``exp_avg`` and ``exp_avg_sq``.

    ``adamw`` is ``(learning_rate, beta1, beta2, eps, step)``.
    """

def allocate(nbytes: int, ledger: Ledger, account: str) -> Buffer:
    """Zeroed memory outside the pool as a buffer of bytes, counted in ``account`` of the ledger until it is freed."""

def adamw_kernels() -> list[str]:
    """The AdamW kernels that this processor can run, the fastest last."""

def build_info() -> tuple[str, str, bool]:
    """Version of the core, build profile, and whether io_uring was compiled in."""

def owner_of(path: str | PathLike[str]) -> _Owner | None:
    """The process that holds the file; None when none does."""

def dio_alignment(folder: str | PathLike[str]) -> tuple[int, int] | None: ...
def inspect(paths: Sequence[str | PathLike[str]]) -> _StoreInfo:
    """What a store says of itself, without its lock."""

def probe_uring() -> str | None:
    """Why io_uring cannot be used here; None when it can."""

def state_formats() -> dict[str, _StateFormat]:
    """The formats of a record's state by name, in bytes of one parameter.

    ``planes`` lists ``(name, dtype, nbytes)``, that of the weight first; ``step_nbytes`` is what a step of training
    reads and what it writes, where nothing stays in RAM.
    """

def store_memory(manifest: bytes) -> int:
    """Bytes that a store with this manifest takes in RAM, once it is open.

    Raises:
        ValueError: the manifest is broken.
    """

def error_examples() -> list[Exception]:
    """One exception of each kind that the core can raise, for the tests."""
