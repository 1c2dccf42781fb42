"""Holding Ctrl-C back while a step cannot be taken back."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

__all__ = ["after_the_step"]


@contextmanager
def after_the_step() -> Iterator[None]:
    """Hold Ctrl-C back until the step within has ended; the second one is not held back.

    Outside the main thread, where signals do not arrive, and where Ctrl-C is ignored (a background job), it
    does nothing.
    """
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or before in (None, signal.SIG_IGN):
        yield
        return
    held: list[int] = []

    def hold(number: int, _frame: FrameType | None) -> None:
        held.append(number)
        signal.signal(signal.SIGINT, before)

    signal.signal(signal.SIGINT, hold)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if held:
        signal.raise_signal(signal.SIGINT)
