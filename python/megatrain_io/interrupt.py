"""A polite stop: Ctrl-C, SIGTERM, SIGHUP and SIGUSR1 are heard, and obeyed where nothing is half done. No torch.

Outside a region that is ``held`` the first signal raises ``KeyboardInterrupt`` at once, as Ctrl-C does in Python.
Inside one it is only noted: ``check`` raises it at a safe point, ``is_requested`` asks. A second signal does what it
would have done without all this: Ctrl-C raises at once, the others end the process.
"""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from time import monotonic
from types import FrameType
from typing import Any, NoReturn

from megatrain_io.files import lead_nowhere

__all__ = ["STOP_SIGNALS", "at_once", "check", "held", "is_requested", "stop_signals"]

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)

# A closed terminal, `timeout` and some wrappers send one request twice: to the process, and to its group.
_ONE_REQUEST_SECONDS = 1.0
_OUTPUTS = (1, 2)


class _StopHandler:
    """What Python calls for a signal; which one is in force is the state, and there is no other.

    Args:
        owns_process: whether standard error and a closed terminal are ours to deal with.
    """

    def __init__(self, *, owns_process: bool) -> None:
        self.number: int | None = None
        self.holds = 0
        self._owns_process = owns_process
        self._terminals = [number for number in _OUTPUTS if owns_process and os.isatty(number)]
        self._first = 0.0
        self._before: dict[int, Any] = {}

    def put_in(self) -> None:
        """Take the signals over that nobody else handles: what is ignored (nohup) stays ignored."""
        for number in STOP_SIGNALS:
            if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
                self._before[number] = signal.signal(number, self)

    def put_back(self) -> None:
        """Give the signals back, but those that somebody has taken over since."""
        for number, before in self._before.items():
            if signal.getsignal(number) is self:
                signal.signal(number, before)

    def __call__(self, number: int, _frame: FrameType | None) -> None:
        if number == signal.SIGHUP:
            self._leave_terminal()
        now = monotonic()
        if self.number is None:
            self.number, self._first = number, now
            if not self.holds:
                _raise(number)
            self._announce()
        elif now - self._first >= _ONE_REQUEST_SECONDS:
            self.put_back()
            signal.raise_signal(number)

    def _announce(self) -> None:
        """Say that it was heard; the buffers of ``sys.stderr`` may be in use at this moment."""
        if self._owns_process and self.number is not None:
            name = signal.Signals(self.number).name
            text = f"megatrain-io: {name}: stopping where nothing is lost by it; a second one ends at once\n"
            with suppress(OSError):
                os.write(2, text.encode())

    def _leave_terminal(self) -> None:
        """Every write to a terminal that is gone fails, and must not stop what is still to be kept."""
        if self._terminals:
            lead_nowhere(self._terminals)
            self._terminals = []


def _raise(number: int) -> NoReturn:
    raise KeyboardInterrupt(signal.Signals(number).name)


@contextmanager
def stop_signals(*, owns_process: bool = False) -> Iterator[None]:
    """Hear the four signals while the context lasts, and put the handlers back that were there before.

    Only those are taken that would end the process otherwise. Outside the main thread, and inside another such
    context, it does nothing.

    Args:
        owns_process: this process is ours: say on standard error that a signal was heard, and leave a terminal that
            was closed.
    """
    if threading.current_thread() is not threading.main_thread() or _handler() is not None:
        yield
        return
    handler = _StopHandler(owns_process=owns_process)
    handler.put_in()
    try:
        yield
    finally:
        handler.put_back()


@contextmanager
def held() -> Iterator[None]:
    """Only note a signal while the context lasts; ``check`` raises it."""
    handler = _handler()
    if handler is None:
        yield
        return
    handler.holds += 1
    try:
        yield
    finally:
        handler.holds -= 1


@contextmanager
def at_once() -> Iterator[None]:
    """Raise a signal at once while the context lasts, inside a region that is held: for what may take long.

    Only for Python of our own: an exception that is raised inside a dispatch mode of torch may end the process.

    Raises:
        KeyboardInterrupt: a stop was asked for before, or within.
    """
    handler = _handler()
    if handler is None:
        yield
        return
    check()
    holds, handler.holds = handler.holds, 0
    try:
        yield
    finally:
        handler.holds = holds


def is_requested() -> bool:
    """Whether a stop was asked for since ``stop_signals`` was entered."""
    handler = _handler()
    return handler is not None and handler.number is not None


def check() -> None:
    """Raise the stop that was asked for, if one was: nothing is half done here.

    Raises:
        KeyboardInterrupt: its argument is the name of the signal.
    """
    handler = _handler()
    if handler is not None and handler.number is not None:
        _raise(handler.number)


def _handler() -> _StopHandler | None:
    handlers = (signal.getsignal(number) for number in STOP_SIGNALS)
    return next((handler for handler in handlers if isinstance(handler, _StopHandler)), None)
