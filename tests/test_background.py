"""Calls behind their caller: one at a time, whose errors are not lost."""

import threading

import pytest

from whence._background import Background


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


def test_draining_lets_an_interrupt_through_once_the_call_has_ended(monkeypatch):
    background, ended = Background(), []
    open_ = threading.Event()
    background.start(lambda: (open_.wait(10), ended.append(True)))
    join, asked = threading.Thread.join, []

    def interrupted(thread, timeout=None):
        asked.append(thread)
        if len(asked) == 1:
            open_.set()
            raise KeyboardInterrupt
        join(thread, timeout)

    monkeypatch.setattr(threading.Thread, "join", interrupted)
    with pytest.raises(KeyboardInterrupt):
        background.drain()
    assert ended == [True]


def test_where_no_thread_starts_the_call_is_made_at_once(monkeypatch):
    def refuse(thread):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    background, seen = Background(), []
    background.start(seen.append, 1)
    assert seen == [1]
