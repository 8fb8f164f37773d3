"""One call at a time on a thread of its own, while its caller goes on."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import ParamSpec

P = ParamSpec("P")


class Background:
    """What runs behind its caller: at most one call, which the caller waits for before the next."""

    def __init__(self) -> None:
        self._worker: threading.Thread | None = None
        self._failed: list[BaseException] = []

    def start(self, function: Callable[P, object], *args: P.args, **kwargs: P.kwargs) -> None:
        """Lets a call run, once the one before has ended.

        Raises:
            BaseException: As `wait`; the call then is not made.
        """
        self.wait()

        def work() -> None:
            try:
                function(*args, **kwargs)
            except BaseException as error:
                self._failed.append(error)

        worker = threading.Thread(target=work)
        try:
            worker.start()
        except RuntimeError:  # no more threads, or Python is about to end
            work()
        else:
            self._worker = worker

    def wait(self) -> None:
        """Waits for the call.

        Raises:
            BaseException: What it raised, or a signal's handler meanwhile: KeyboardInterrupt.
        """
        if self._worker is not None:
            self._worker.join()
            self._worker = None
        if self._failed:
            raise self._failed.pop()

    def drain(self) -> None:
        """Waits for the call in any case, and drops what it raised.

        Raises:
            BaseException: What a signal's handler raises meanwhile, once the call has ended.
        """
        interrupt: BaseException | None = None
        while self._worker is not None:
            try:
                self._worker.join()
                self._worker = None
            except BaseException as error:
                interrupt = error
        self._failed.clear()
        if interrupt is not None:
            raise interrupt
