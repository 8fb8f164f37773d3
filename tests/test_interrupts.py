"""What numpy and torch compute for long does not keep Ctrl-C waiting."""

import os
import signal
import subprocess
import sys
import textwrap
import threading
import traceback

import numpy as np
import pytest
import torch

from whence._interrupts import LARGE, _running, interruptible

LONG = np.zeros(LARGE, np.uint8)


def thread_of(*_):
    return threading.current_thread()


def test_what_is_large_is_computed_beside_the_main_thread():
    assert interruptible(thread_of, LONG) is not threading.main_thread()
    assert interruptible(thread_of, [LONG[:1], (LONG[1:],)]) is not threading.main_thread()
    assert interruptible(thread_of, torch.from_numpy(LONG)) is not threading.main_thread()
    assert interruptible(thread_of, LONG[1:], "a word", 3) is threading.main_thread()


def test_another_thread_which_no_signal_reaches_computes_itself():
    found = []
    other = threading.Thread(target=lambda: found.append(interruptible(thread_of, LONG)))
    other.start()
    other.join()
    assert found == [other]


def test_a_result_is_that_of_the_function():
    matrix = np.random.default_rng(0).normal(size=(600, 600))
    assert np.array_equal(interruptible(np.sort, matrix, axis=0), np.sort(matrix, axis=0))
    values, vectors = interruptible(np.linalg.eigh, matrix @ matrix.T)
    assert np.allclose((vectors * values) @ vectors.T, matrix @ matrix.T)


def test_where_no_thread_can_be_had_the_caller_computes(monkeypatch):
    def refuse(_thread):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    assert interruptible(np.sum, LONG) == 0
    assert not _running


def test_an_error_says_where_it_was_raised():
    def fails(_):
        raise ZeroDivisionError("here")

    with pytest.raises(ZeroDivisionError, match="here") as caught:
        interruptible(fails, LONG)
    assert "fails" in [frame.name for frame in traceback.extract_tb(caught.value.__traceback__)]


def test_the_callers_settings_hold():
    def settings(_):
        return np.geterr()["under"], torch.is_grad_enabled(), torch.is_inference_mode_enabled()

    assert interruptible(settings, LONG) == ("ignore", True, False)
    with np.errstate(under="raise"), torch.no_grad():
        assert interruptible(settings, LONG) == ("raise", False, False)
    with torch.inference_mode():
        assert interruptible(settings, LONG) == ("ignore", False, True)


@pytest.mark.skipif(sys.platform == "win32", reason="signals are sent otherwise on Windows")
def test_an_interrupt_does_not_wait_for_the_function():
    begun, end = threading.Event(), threading.Event()

    def endless(_):
        begun.set()
        end.wait(60)

    def interrupts():
        begun.wait(60)
        os.kill(os.getpid(), signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    threading.Thread(target=interrupts).start()
    try:
        with pytest.raises(KeyboardInterrupt):
            interruptible(endless, LONG)
        assert begun.is_set()
        assert not end.is_set()  # it waits for that still
    finally:
        end.set()
        signal.signal(signal.SIGINT, before)


def left(ending):
    """The exit code of a process that is interrupted while it computes, and what it printed."""
    script = """
        import os, signal, threading, time
        import numpy as np
        from whence._interrupts import interruptible

        signal.signal(signal.SIGINT, signal.default_int_handler)

        def long(_):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)
            print("computed", flush=True)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script) + textwrap.dedent(ending)],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    return done.returncode, done.stdout


@pytest.mark.skipif(sys.platform == "win32", reason="signals are sent otherwise on Windows")
def test_a_process_that_an_interrupt_ends_does_not_wait():
    assert left("interruptible(long, np.zeros(1 << 21))") == (-signal.SIGINT, "")


@pytest.mark.skipif(sys.platform == "win32", reason="signals are sent otherwise on Windows")
def test_a_process_that_exits_waits_for_what_is_computed():
    ending = """
        try:
            interruptible(long, np.zeros(1 << 21))
        except KeyboardInterrupt:
            raise SystemExit(3)
    """
    assert left(ending) == (3, "computed\n")
