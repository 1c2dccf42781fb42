"""Signals that ask for a stop: heard where nothing is half done, obeyed at once the second time, and given back."""

import os
import signal
import threading
from itertools import count

import pytest

from megatrain_io import interrupt
from megatrain_io.interrupt import STOP_SIGNALS, at_once, check, held, is_requested, stop_signals


@pytest.fixture(autouse=True)
def _as_at_start():
    """A background job of a shell begins with Ctrl-C ignored."""
    outside = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in STOP_SIGNALS[1:]:
        signal.signal(number, signal.SIG_DFL)
    yield
    for number, handler in outside.items():
        signal.signal(number, handler)


@pytest.fixture
def clock(monkeypatch):
    """Ten seconds pass between two signals."""
    ticks = count(0, 10)
    monkeypatch.setattr(interrupt, "monotonic", lambda: next(ticks))


def send(number):
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", STOP_SIGNALS, ids=lambda number: number.name)
def test_each_of_the_four_is_held_back_until_a_safe_point(number):
    done = []
    with stop_signals():
        with held():
            check()
            send(number)
            assert is_requested()
            done.append("the step")
        done.append("the commit")
        with pytest.raises(KeyboardInterrupt, match=number.name):
            check()
        with held(), pytest.raises(KeyboardInterrupt, match=number.name):
            check()  # goes on until somebody ends
    assert done == ["the step", "the commit"]
    assert not is_requested()


@pytest.mark.parametrize("number", STOP_SIGNALS, ids=lambda number: number.name)
def test_where_nothing_is_held_it_is_raised_at_once(number):
    with stop_signals(), pytest.raises(KeyboardInterrupt, match=number.name):
        send(number)


@pytest.mark.usefixtures("clock")
def test_a_second_one_does_what_it_did_before():
    with stop_signals(), held():
        send(signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            send(signal.SIGINT)
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_one_request_that_comes_twice_is_one(monkeypatch):
    """`timeout` and a closed terminal send a signal to the process and then to its group."""
    monkeypatch.setattr(interrupt, "monotonic", lambda: 5.0)
    with stop_signals(), held():
        send(signal.SIGHUP)
        send(signal.SIGHUP)
        send(signal.SIGTERM)
        assert is_requested()


def test_what_may_take_long_is_left_at_once():
    with stop_signals(), held():
        with pytest.raises(KeyboardInterrupt, match="SIGTERM"), at_once():
            send(signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt), at_once():
            pytest.fail("it is not begun when a stop was asked for")


def test_handlers_are_put_back_however_it_ends():
    before = [signal.getsignal(number) for number in STOP_SIGNALS]
    for error in (None, ValueError(), KeyboardInterrupt()):
        with pytest.raises(type(error)) if error else stop_signals(), stop_signals():
            assert [signal.getsignal(number) for number in STOP_SIGNALS] != before
            if error:
                raise error
        assert [signal.getsignal(number) for number in STOP_SIGNALS] == before


def test_what_is_ignored_or_in_other_hands_stays_so():
    heard = []
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # nohup
    signal.signal(signal.SIGUSR1, lambda number, _frame: heard.append(number))
    with stop_signals(), held():
        send(signal.SIGHUP)
        send(signal.SIGUSR1)
        check()
        later = signal.signal(signal.SIGTERM, signal.SIG_IGN)
        assert callable(later)
    assert heard == [signal.SIGUSR1]
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_IGN, "taken over meanwhile: left alone"


def test_another_thread_leaves_the_handlers_alone():
    found = []

    def look():
        with stop_signals(), held():
            found.extend(signal.getsignal(number) for number in STOP_SIGNALS)
            check()

    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    assert found == [signal.default_int_handler, *[signal.SIG_DFL] * 3]


def test_contexts_within_one_another_are_one():
    with stop_signals():
        outer = signal.getsignal(signal.SIGTERM)
        with stop_signals(), held():
            send(signal.SIGTERM)
            assert signal.getsignal(signal.SIGTERM) is outer
        assert is_requested()
