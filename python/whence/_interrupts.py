"""Ctrl-C while numpy or torch is inside one long call, such as LAPACK's of a large matrix.

Python answers a signal on its main thread, between two of its own steps: a library that computes
for half a minute lets it wait for as long. Here the main thread waits for a result instead of
computing it. What it gave away goes on in the background, for LAPACK cannot be stopped.
"""

from __future__ import annotations

import atexit
import os
import sys
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from contextvars import copy_context
from functools import partial
from typing import Any, ParamSpec, TypeVar

import numpy as np

from whence._background import Call

P = ParamSpec("P")
T = TypeVar("T")

LARGE = 1 << 21
"""Bytes of arguments from which on a call can take longer than Ctrl-C should.

A float64 matrix of 512 rows has as many, whose eigenvectors take some tens of milliseconds.
"""

_running: set[Call] = set()


def interruptible(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """What `function` returns, unless Ctrl-C comes first.

    A call from the main thread with large arrays among its arguments is computed on a thread of its
    own, with the caller's settings of numpy and torch. It may change nothing that others see: after
    an interrupt it goes on, and holds its arguments until it has ended.

    Raises:
        BaseException: What `function` raises, or a signal's handler meanwhile: KeyboardInterrupt.
    """
    small = _bytes((args, *kwargs.values())) < LARGE
    if small or threading.current_thread() is not threading.main_thread():
        return function(*args, **kwargs)
    found: list[T] = []
    settings = _settings()

    def work() -> None:
        try:
            with ExitStack() as stack:
                for setting in settings:
                    stack.enter_context(setting())
                found.append(function(*args, **kwargs))
        finally:
            _running.discard(call)

    call = Call(partial(copy_context().run, work))
    try:
        _running.add(call)
        call.start(daemon=True)
    except BaseException:
        if call.cancel():
            _running.discard(call)
        raise
    call.wait()
    call.check()
    return found.pop()


def _bytes(value: Any) -> int:
    """Of an array, or of those in a list."""
    if isinstance(value, (list, tuple)):
        return sum(map(_bytes, value))
    if isinstance(value, type):  # a dtype, of which numpy says how many bytes a value has
        return 0
    return int(getattr(value, "nbytes", 0))


def _settings() -> list[Callable[[], AbstractContextManager[Any]]]:
    """What this thread has set for itself alone, to be entered on another."""
    settings: list[Callable[[], AbstractContextManager[Any]]] = [
        partial(np.errstate, **np.geterr())
    ]
    torch = sys.modules.get("torch")
    if torch is not None:
        settings += [
            partial(torch.inference_mode, torch.is_inference_mode_enabled()),
            partial(torch.set_grad_enabled, torch.is_grad_enabled()),
            partial(_as_many_threads, torch),
        ]
    return settings


def _as_many_threads(torch: Any) -> AbstractContextManager[Any]:
    """Nothing; but a thread that has asked uses as many threads as its caller, and not all."""
    torch.get_num_threads()
    return ExitStack()


def _finish() -> None:
    """Waits for what an interrupt has left, and still runs."""
    for call in list(_running):
        call.wait()


@atexit.register
def _exit() -> None:
    """Nothing is left running: a process can hang that exits while OpenBLAS computes.

    One that an interrupt ends does not exit but dies of the signal, at once.
    """
    if getattr(sys, "last_type", None) is not KeyboardInterrupt:
        _finish()


if hasattr(os, "register_at_fork"):  # OpenBLAS's locks would stay locked in the child
    os.register_at_fork(before=_finish)
