"""A trace of a run: what ran when, in lanes, for ui.perfetto.dev or chrome://tracing. No torch."""

import json
import os
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from megatrain_io.errors import ConfigError
from megatrain_io.files import new_file, storage_errors

__all__ = ["Trace"]

_SAFE = "the last committed step is safe: go on with --resume, and --trace elsewhere or without it"


class Trace:
    """Events, appended to a file as the JSON array of Chrome's trace event format.

    Viewers take an array without an end, so the file can be opened at any moment, also after a kill: each
    ``flush`` adds whole events, and ``close`` only the bracket. A trace that got no event leaves no file.
    """

    def __init__(self, path: Path) -> None:
        """Make the file.

        Raises:
            ConfigError: it exists, or cannot be made there.
        """
        self._path = path
        try:
            self._file = new_file(path, buffering=0)
        except FileExistsError as error:
            raise ConfigError(f"--trace {path} exists: choose a new file, or remove it first") from error
        except FileNotFoundError as error:
            raise ConfigError(
                f"--trace {path}: there is no folder {path.parent}: make it, or choose another"
            ) from error
        except OSError as error:
            raise ConfigError(
                f"--trace {path} cannot be made ({error.strerror}): choose another place"
            ) from error
        self._origin = time.monotonic_ns()
        self._lanes: dict[str, int] = {}
        self._waiting: list[dict[str, Any]] = []
        self._is_empty = True

    @contextmanager
    def span(self, name: str) -> Iterator[None]:
        """Add an event of the lane ``compute`` that lasts as long as the context; none if an error ends it."""
        start = time.monotonic_ns()
        yield
        self.add("compute", name, start, time.monotonic_ns())

    def add(self, lane: str, name: str, start: int, end: int, chunk: int | None = None) -> None:
        """Add an event.

        Args:
            lane: where it is shown; events of a lane must not overlap, unless one holds the other.
            name: what it was.
            start: nanoseconds of ``time.monotonic_ns``.
            end: nanoseconds of ``time.monotonic_ns``.
            chunk: index of the chunk that it was about, if any.
        """
        event = {
            "name": name,
            "ph": "X",
            "ts": (start - self._origin) / 1000,
            "dur": (end - start) / 1000,
            "pid": os.getpid(),
            "tid": self._lane(lane),
        }
        self._waiting.append(event if chunk is None else event | {"args": {"chunk": chunk}})

    def extend(self, events: Iterable[tuple[str, str, int | None, int, int]], dropped: int) -> None:
        """Add the events that ``PagedStore.take_events`` returned, and a mark if it dropped some."""
        for lane, name, chunk, start, end in events:
            self.add(lane, name, start, end, chunk)
        if dropped:
            self._waiting.append(
                {
                    "name": f"{dropped} more events were dropped: there was no room for them",
                    "ph": "i",
                    "s": "p",
                    "ts": (time.monotonic_ns() - self._origin) / 1000,
                    "pid": os.getpid(),
                    "tid": self._lane("compute"),
                }
            )

    def flush(self) -> None:
        """Append the events that were added since the last call to the file.

        Raises:
            StorageError, NoSpaceError: the drive did not take them.
        """
        if self._waiting:
            lines = ",\n".join(json.dumps(event) for event in self._waiting)
            self._waiting.clear()
            self._write(("[\n" if self._is_empty else ",\n") + lines)
            self._is_empty = False

    def close(self) -> None:
        """Append the remaining events and the end of the array, and close the file."""
        try:
            self.flush()
            if self._is_empty:
                self._path.unlink(missing_ok=True)
            else:
                self._write("\n]\n")
        finally:
            self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is None:
            self.close()
        else:
            # That error is the news, not what the drive then says.
            with suppress(Exception):
                self.close()

    def _lane(self, name: str) -> int:
        """Number of a lane; its name is told at its first event."""
        if name not in self._lanes:
            self._lanes[name] = len(self._lanes) + 1
            about = {"ph": "M", "pid": os.getpid(), "tid": self._lanes[name]}
            self._waiting.append(about | {"name": "thread_name", "args": {"name": name}})
        return self._lanes[name]

    def _write(self, text: str) -> None:
        left = memoryview(text.encode())
        with storage_errors(self._path, _SAFE):
            while left:
                left = left[self._file.write(left) :]
