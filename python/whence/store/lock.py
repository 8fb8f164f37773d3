"""One writer at a time."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import weakref
from pathlib import Path
from types import TracebackType
from typing import Any

from whence.errors import LockedError, StoreError
from whence.store.files import store_errors

_FAR = 1 << 30
"""Windows locks bytes, not files: one far behind the text, so that the text stays readable."""


class Lock:
    """An exclusive lock on a store, which the system drops when its process ends.

    A process that is forked meanwhile has no part in it.

    Raises:
        LockedError: If another writer holds it; says which.
        StoreError: If the file cannot be made.
    """

    def __init__(self, folder: Path) -> None:
        self._path = path = folder / "lock"
        with store_errors(path):
            # Follows no link: what a store points to is not ours to write.
            handle = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)
            self._file = os.fdopen(handle, "r+", encoding="utf-8")
        try:
            _lock(self._file)
        except (BlockingIOError, PermissionError):
            self._file.seek(0)
            text = self._file.read()
            self._file.close()
            raise LockedError(f"{folder} must have one writer, got {_holder(text)}") from None
        except OSError as error:  # a file system without locks
            self._file.close()
            raise StoreError(f"{path} must be lockable, got: {error.strerror}") from error
        try:
            with store_errors(path):
                self._file.seek(0)
                self._file.truncate(0)
                held = {"process": os.getpid(), "host": socket.gethostname()}
                self._file.write(json.dumps(held))
                self._file.flush()
        except BaseException:  # a full disk
            with contextlib.suppress(OSError):
                self._file.close()
            raise
        self.process = os.getpid()
        _held.add(self)

    @property
    def is_held(self) -> bool:
        """Whether it was not let go."""
        return not self._file.closed

    @property
    def is_in_place(self) -> bool:
        """Whether the folder still has this lock: if not, others do not see that it is held."""
        try:
            return os.path.samestat(os.fstat(self._file.fileno()), self._path.lstat())
        except (OSError, ValueError):  # the latter once it was let go
            return False

    @property
    def is_ours(self) -> bool:
        """Whether this process took it; one that was forked since has only a copy of its holder."""
        return self.process == os.getpid()

    def close(self) -> None:
        """Lets go of the lock; in a process forked meanwhile it stays with the one that took it."""
        if not self._file.closed:
            if self.is_ours:
                _unlock(self._file)
            self._file.close()

    def __enter__(self) -> Lock:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


_held: weakref.WeakSet[Lock] = weakref.WeakSet()


def _leave() -> None:
    """In a forked child: closes its copies, which would keep the locks when their process ends."""
    for lock in list(_held):
        with contextlib.suppress(OSError):
            lock._file.close()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_leave)


def _lock(file: Any) -> None:
    if sys.platform == "win32":
        import msvcrt

        file.seek(_FAR)
        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
    else:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _unlock(file: Any) -> None:
    if sys.platform == "win32":
        import msvcrt

        file.seek(_FAR)
        msvcrt.locking(file.fileno(), msvcrt.LK_UNLCK, 1)
    else:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_UN)


def _holder(text: str) -> str:
    try:
        held = json.loads(text)
        if held["process"] == os.getpid():
            return (
                f"a second one in this process {os.getpid()}, where an earlier recorder is still "
                "open, or was made and never entered"
            )
        return f"a second one while process {held['process']} on {held['host']} writes"
    except (ValueError, KeyError, TypeError):
        return "a second one while another process writes"
