"""Power cuts: what was confirmed is there after them, whole, and the next writer goes on.

Two ways. On a real file system, which needs root: ext4 on a loop device, shut down while a writer
lives, without what its journal has not written yet. And on a model of a disk, which needs nothing:
before and after each sync, renaming and removal in a store's life, what no sync has made durable is
dropped, in whole or in part.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
import struct
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import trial
from history import Life, Log, Wrong
from kills import LIVES, goes_on, through

from whence.errors import WhenceError

SHUTDOWN, NO_LOG_FLUSH = 0x8004587D, struct.pack("I", 2)
"""ext4's request that drops what is not durable, and how."""

AFTERWARDS = 0.05
"""Seconds that a writer goes on after the cut, in which it must not confirm anything."""

SHARE = 0.05
"""Of the model's power cuts, after which the next writer goes on too."""


def run(count: int, seed: int) -> trial.Outcome:
    """As many cuts of a real file system, and the model's in a life of as many operations."""
    outcome = trial.Outcome("power cuts", "lost or half", "not opened or gone on with")
    generator = np.random.default_rng(seed)
    with tempfile.TemporaryDirectory() as scratch:
        if mountable(Path(scratch)):
            for first in range(0, count, LIVES):
                disk = Loop(Path(scratch) / f"{first}{'-text' if first // LIVES % 2 else ''}")
                try:
                    through(disk.folder, min(LIVES, count - first), generator, outcome, disk.cut)
                finally:
                    disk.unmount()
        else:
            trial.say("power cuts: no file system can be mounted here, so those of the model alone")
    model(count, generator, outcome)
    return outcome


class Loop:
    """ext4 in a file, mounted on a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder, self._image = folder, folder.with_suffix(".image")
        folder.mkdir()
        with self._image.open("wb") as file:
            file.truncate(96 << 20)
        _command("mkfs.ext4", "-q", "-F", self._image)
        self._mount()

    def _mount(self) -> None:
        _command("mount", "-o", "loop", self._image, self.folder)

    def unmount(self) -> None:
        _command("umount", "--lazy", self.folder)

    def cut(self, child: subprocess.Popen[str]) -> None:
        """Cuts the power under a living writer, and gives it back."""
        handle = os.open(self.folder, os.O_RDONLY)
        try:
            fcntl.ioctl(handle, SHUTDOWN, NO_LOG_FLUSH)
        finally:
            os.close(handle)
        time.sleep(AFTERWARDS)
        child.send_signal(signal.SIGKILL)
        child.wait()
        _command("umount", self.folder)
        self._mount()


def mountable(scratch: Path) -> bool:
    """Whether file systems can be mounted here."""
    try:
        Loop(scratch / "try").unmount()
    except (OSError, subprocess.CalledProcessError):
        return False
    return True


def _command(*words: str | Path) -> None:
    subprocess.run(words, check=True, capture_output=True)


def model(count: int, generator: np.random.Generator, outcome: trial.Outcome) -> None:
    """Cuts the power of a modelled disk at each moment of a life of `count` operations."""
    log = Log()
    with trial.scratch() as scratch:
        folder, crashed = scratch / "disk", scratch / "crashed"
        folder.mkdir()
        life = Life(folder, int(generator.integers(2**31)), {}, log.begin, log.confirm)
        life.prepare()
        disk = Disk(folder)

        def cut() -> None:
            for fate in (lost, kept, partly):
                outcome.count(f"modelled during {log.under_way}")
                try:
                    disk.after_a_cut(crashed, partial(fate, generator))
                    found = log.check(crashed)
                    if generator.random() < SHARE:
                        again = Log()
                        again.go_on(found)
                        goes_on(crashed, again, generator)
                        again.check(crashed)
                except (Wrong, WhenceError) as error:
                    what = f"modelled, {fate.__name__}, during {log.under_way}: {error}"
                    outcome.miss("lost or half", what)

        with disk.watched(cut):
            for _ in range(count):
                life.step()
            life.close()


def lost(generator: np.random.Generator, now: Any, durable: Any) -> Any:
    """Nothing that was not synced has reached the disk."""
    return durable


def kept(generator: np.random.Generator, now: Any, durable: Any) -> Any:
    """All names have, and no bytes: a file is as long as it was made, and full of zeros."""
    if isinstance(now, bytes):
        return durable if durable == now else (durable or b"")[: len(now)].ljust(len(now), b"\0")
    return now


def partly(generator: np.random.Generator, now: Any, durable: Any) -> Any:
    """Any names have, and the beginning of what was written."""
    if isinstance(now, bytes):
        end = int(generator.integers(len(now) + 1))
        return durable if durable == now else now[:end] + (durable or b"")[end:]
    return now if generator.random() < 0.5 else durable


Fate = Callable[[Any, Any], Any]
"""Of the bytes of a file, or of what a name stands for: as they are, and as they are durable, ->
as they are after a cut. What is not durable is None."""


class Disk:
    """A folder, and what of it would be there after a power cut.

    The bytes of a file are durable once it is synced, and the names in a folder once that is.
    """

    CALLS = ("fsync", "replace", "rename", "remove", "unlink", "rmdir", "mkdir", "link")

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._bytes: dict[int, bytes] = {}
        self._names: dict[int, dict[str, int]] = {}
        # Numbers of inodes are used again: each of ours belongs to one file.
        self._ours: dict[int, int] = {}
        self._last = 0
        self._watching = True
        self._look()
        self._durable_bytes, self._durable_names = dict(self._bytes), dict(self._names)

    @contextmanager
    def watched(self, cut: Callable[[], None]) -> Iterator[None]:
        """Calls `cut` before each call that can change what is durable."""

        def wrap(name: str) -> Any:
            call = getattr(os, name)

            def wrapped(*given: Any, **options: Any) -> Any:
                if not self._watching:
                    return call(*given, **options)
                self._look()
                self._watching = False
                cut()
                self._watching = True
                found = call(*given, **options)
                if name == "fsync":
                    self._synced(os.fstat(given[0]).st_ino)
                else:
                    self._look()
                return found

            return mock.patch.object(os, name, wrapped)

        with ExitStack() as stack:
            stack.enter_context(mock.patch("whence.store.files.SYNCS", 1))  # in a fixed order
            for name in self.CALLS:
                stack.enter_context(wrap(name))
            yield

    def _look(self) -> None:
        """Takes note of all names and bytes as they are."""
        seen: dict[int, int] = {}
        self._bytes, self._names = {}, {}

        def look(path: Path) -> int:
            inode = path.stat().st_ino
            if inode not in self._ours:
                self._last += 1
            seen[inode] = number = self._ours.get(inode, self._last)
            if path.is_dir():
                self._names[number] = {each.name: look(each) for each in path.iterdir()}
            else:
                self._bytes[number] = path.read_bytes()
            return number

        self._root = look(self.folder)
        self._ours = seen

    def _synced(self, inode: int) -> None:
        number = self._ours.get(inode)
        if number in self._bytes:
            self._durable_bytes[number] = self._bytes[number]
        elif number in self._names:
            self._durable_names[number] = self._names[number]

    def after_a_cut(self, out: Path, fate: Fate) -> None:
        """Makes a folder like this one after a power cut, in which each thing meets its fate."""
        shutil.rmtree(out, ignore_errors=True)

        def make(number: int, path: Path) -> None:
            if number in self._bytes or number in self._durable_bytes:
                durable = self._durable_bytes.get(number)
                path.write_bytes(fate(self._bytes.get(number, durable), durable) or b"")
                return
            path.mkdir()
            durable_names = self._durable_names.get(number, {})
            now = self._names.get(number, durable_names)
            for name in now.keys() | durable_names.keys():
                found = fate(now.get(name), durable_names.get(name))
                if found is not None:
                    make(found, path / name)

        make(self._root, out)


if __name__ == "__main__":
    trial.main(run, short=10, full=100)
