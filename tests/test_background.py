"""Calls behind their caller: one at a time, whose errors are not lost."""

import os
import signal
import sys
import threading
import time

import pytest

from whence._background import Background, Call

needs_signals = pytest.mark.skipif(
    sys.platform == "win32", reason="signals are sent otherwise on Windows"
)


@pytest.fixture
def interrupts():
    """What sends Ctrl-C to this thread, so many seconds from now."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield lambda seconds: threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGINT)).start()
    signal.signal(signal.SIGINT, before)


def refuse(_thread):
    raise RuntimeError("can't start new thread")


def test_calls_run_behind_the_caller_one_after_the_other():
    background, open_, seen = Background(), threading.Event(), []
    background.start(lambda: (open_.wait(10), seen.append(1)))
    assert seen == []  # it waits for us
    threading.Timer(0.05, open_.set).start()
    background.start(seen.append, 2)
    assert seen[0] == 1
    background.wait()
    assert seen == [1, 2]


def test_what_a_call_raises_comes_when_it_is_waited_for_and_once():
    background = Background()
    background.start(int, "x")
    with pytest.raises(ValueError, match="'x'"):
        background.wait()
    background.wait()
    background.start(int, "y")
    with pytest.raises(ValueError, match="'y'"):
        background.start(print, "not printed")


def test_draining_drops_what_a_call_raised():
    background = Background()
    background.start(int, "x")
    background.drain()
    background.wait()


@needs_signals
def test_draining_lets_an_interrupt_through_once_the_call_has_ended(interrupts):
    background, ended = Background(), []
    background.start(lambda: (time.sleep(0.6), ended.append(True)))
    interrupts(0.2)
    with pytest.raises(KeyboardInterrupt):
        background.drain()
    assert ended == [True]


@needs_signals
def test_a_wait_that_was_interrupted_is_taken_up_again(interrupts):
    background, ended = Background(), []
    background.start(lambda: (time.sleep(0.6), ended.append(True)))
    interrupts(0.2)
    with pytest.raises(KeyboardInterrupt):
        background.wait()
    assert ended == []
    background.wait()
    assert ended == [True]


@pytest.mark.parametrize("begun", [False, True])
def test_a_call_whose_beginning_was_interrupted_never_begins_or_is_waited_for(monkeypatch, begun):
    background, ended, threads = Background(), [], []
    start = threading.Thread.start

    def interrupted(thread):
        threads.append(thread)
        if begun:
            start(thread)
            time.sleep(0.1)
        raise KeyboardInterrupt

    monkeypatch.setattr(threading.Thread, "start", interrupted)
    with pytest.raises(KeyboardInterrupt):
        background.start(lambda: (time.sleep(0.4), ended.append(True)))
    background.drain()
    assert ended == [True] * begun
    if not begun:
        start(threads[0])
        threads[0].join()
        assert ended == []


def test_where_no_thread_starts_the_call_is_made_at_once(monkeypatch):
    monkeypatch.setattr(threading.Thread, "start", refuse)
    background, seen = Background(), []
    background.start(seen.append, 1)
    assert seen == [1]
    background.start(int, "x")
    with pytest.raises(ValueError, match="'x'"):
        background.wait()


def test_an_interrupt_of_a_call_that_is_made_at_once_comes_at_once(monkeypatch):
    def interrupted():
        raise KeyboardInterrupt

    monkeypatch.setattr(threading.Thread, "start", refuse)
    background = Background()
    with pytest.raises(KeyboardInterrupt):
        background.start(interrupted)
    background.wait()


def test_a_call_is_cancelled_before_it_begins_and_not_after():
    seen = []
    call = Call(lambda: seen.append(1))
    assert call.cancel()
    assert call.ended.is_set()
    call.start()
    assert seen == []
    call = Call(lambda: seen.append(2))
    call.start()
    call.ended.wait()
    assert not call.cancel()
    assert seen == [2]


def test_a_cancel_that_was_interrupted_can_be_made_again():
    call = Call(pytest.fail)
    call._maker["maker"] = "nobody"  # as a signal leaves it that comes in the midst
    call.wait()
    assert call.cancel()
    assert call.ended.is_set()
