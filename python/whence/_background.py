"""One call at a time on a thread of its own, while its caller goes on."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial
from typing import ParamSpec

P = ParamSpec("P")

LOOK = 0.05
"""Seconds after which who waits looks up by itself: a signal does not wake it everywhere."""


class Call:
    """A call on a thread of its own, which can be waited for and, until it begins, cancelled.

    It is not the thread that is waited for: up to Python 3.12 a `Thread.join` that a signal
    interrupts takes a thread that still runs for one that has ended.

    Args:
        function: What is called.

    Attributes:
        ended: Set once it has ended, or will not begin.
        failed: What it raised.
    """

    def __init__(self, function: Callable[[], object]) -> None:
        self.ended = threading.Event()
        self.failed: BaseException | None = None
        self._function: Callable[[], object] | None = function
        self._maker: dict[str, str] = {}  # who makes it: the first to say so, in one step

    def start(self, *, daemon: bool = False) -> None:
        """Begins; at once and here, where no thread can be had.

        Args:
            daemon: Whether Python may end while it runs.

        Raises:
            BaseException: What a signal's handler raises meanwhile; it may have begun then.
        """
        try:
            threading.Thread(target=self._run, daemon=daemon).start()
        except RuntimeError:  # no more threads, or Python is about to end
            try:
                self._run()
            finally:
                self.ended.set()

    def cancel(self) -> bool:
        """Whether it had not begun; then it never does."""
        if self._maker.setdefault("maker", "nobody") != "nobody":
            return False
        self.ended.set()
        return True

    def _run(self) -> None:
        if self._maker.setdefault("maker", "thread") == "nobody":
            return
        try:
            if self._function is not None:
                self._function()
        except BaseException as error:
            self.failed = error
        finally:
            self._function = None
            self.ended.set()

    def wait(self) -> None:
        """Waits until it has ended, or is known not to begin.

        Raises:
            BaseException: What a signal's handler raises meanwhile.
        """
        while not self.ended.wait(LOOK) and self._maker.get("maker") != "nobody":
            pass

    def check(self) -> None:
        """Nothing, if it has raised nothing; told once.

        Raises:
            BaseException: What it raised.
        """
        failed, self.failed = self.failed, None
        if failed is not None:
            try:
                raise failed
            finally:
                del failed  # which holds this frame, too


class Background:
    """What runs behind its caller: at most one call, which the caller waits for before the next."""

    def __init__(self) -> None:
        self._call: Call | None = None

    def start(self, function: Callable[P, object], *args: P.args, **kwargs: P.kwargs) -> None:
        """Lets a call run, once the one before has ended.

        Raises:
            BaseException: As `wait`; the call then is not made, or can be waited for.
        """
        self.wait()
        call = Call(partial(function, *args, **kwargs))
        try:
            self._call = call  # first: whoever waits must know of it
            call.start()
        except BaseException:
            call.cancel()
            raise
        if call.ended.is_set() and not isinstance(call.failed, Exception):
            self.wait()  # it was made here, and a signal's handler has raised

    @property
    def is_busy(self) -> bool:
        """Whether there is a call that nobody has waited for."""
        return self._call is not None

    def wait(self) -> None:
        """Waits for the call.

        Raises:
            BaseException: What it raised, or a signal's handler meanwhile: KeyboardInterrupt.
        """
        if self._call is not None:
            self._call.wait()
            call, self._call = self._call, None
            call.check()

    def drain(self) -> None:
        """Waits for the call in any case, and drops what it raised.

        Raises:
            BaseException: What a signal's handler raises meanwhile, once the call has ended.
        """
        interrupt: BaseException | None = None
        while self._call is not None:
            try:
                if not self._call.cancel():
                    self._call.wait()
                self._call = None
            except BaseException as error:
                interrupt = error
        if interrupt is not None:
            raise interrupt
