"""Progress of a command that counts, on standard error."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)

from megatrain_io.text import SECONDS_BETWEEN_LINES, tell

__all__ = ["counting"]


@contextmanager
def counting(what: str, console: Console, *, quiet: bool = False) -> Iterator[Callable[[int, int], None]]:
    """A callback ``(done, total)`` that shows how far ``what`` is, while the context lasts."""
    if quiet:
        yield lambda _done, _total: None
    elif console.is_terminal:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=console, refresh_per_second=2) as progress:
            task = progress.add_task(what, total=None)
            yield lambda done, total: progress.update(task, completed=done, total=total)
    else:
        yield _CountingLines(what, console)


class _CountingLines:
    """Prints a line every few seconds, and one at the end."""

    def __init__(self, what: str, console: Console) -> None:
        self._what = what
        self._console = console
        self._last = time.monotonic()

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        if done == total or now - self._last >= SECONDS_BETWEEN_LINES:
            self._last = now
            tell(self._console, f"{self._what}: {done}/{total}")
