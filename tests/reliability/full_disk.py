"""Full disks: an error each time, what was there intact, and on it goes once there is room.

Room is given in steps of 4 KiB, from none at all to enough, to everything that writes. On a file
system in memory whose size moves, which needs root; and by a limit on the length of files, which
needs nothing.
"""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import trial
from history import OTHERS, State, Wrong, fill, opened, put, read
from samples import factors

import whence
from whence.errors import StoreError, WhenceError

STEP = 4096

HANDLES = Path("/dev/fd")

MOST = 10_000
"""Steps after which there is room enough."""

REFUSALS = ("No space left on device", "File too large")
"""What the system says."""


class Size:
    """A file system in memory whose size is limited."""

    def __init__(self, folder: Path, what: str) -> None:
        self.folder, self._what = folder, what
        folder.mkdir()
        _command("mount", "-t", "tmpfs", "-o", "size=1g", "tmpfs", folder)

    @contextmanager
    def room(self, steps: int) -> Iterator[None]:
        """Leaves so many pages, or names, free."""
        found = os.statvfs(self.folder)
        if self._what == "pages":
            self._limit(f"size={(found.f_blocks - found.f_bfree) * found.f_bsize + steps * STEP}")
        else:
            self._limit(f"nr_inodes={found.f_files - found.f_ffree + steps}")
        try:
            yield
        finally:
            self._limit("size=1g,nr_inodes=1m")

    def _limit(self, options: str) -> None:
        _command("mount", "-o", f"remount,{options}", self.folder)

    def close(self) -> None:
        _command("umount", "--lazy", self.folder)


class Lengths:
    """A folder whose files are limited in length."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()

    @contextmanager
    def room(self, steps: int) -> Iterator[None]:
        """Lets a file be so many pages long."""
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (steps * STEP, before[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    def close(self) -> None:
        """Nothing is left of it."""


def _command(*words: str | Path) -> None:
    subprocess.run(words, check=True, capture_output=True)


# What is done


class Work:
    """Something that writes, in a folder.

    Args:
        folder: With a store of `before` in `store`.
        before: What the store holds.
        more: What could come to it.
    """

    def __init__(self, folder: Path, before: State, more: State) -> None:
        self.folder, self.path, self.before, self.more = folder, folder / "store", before, more
        self.out = folder / "out"

    def prepare(self) -> None:
        """What comes before, with all the room there is."""

    def do(self) -> None:
        """What needs room; once more after it has failed."""

    @property
    def after(self) -> State:
        """What the store holds when it is done."""
        return self.before

    def check_out(self) -> None:
        """Nothing, if what it made beside the store is whole."""

    def finish(self) -> None:
        """What comes after."""


class Append(Work):
    def prepare(self) -> None:
        self._writer, self._taken = opened(self.path), False

    def do(self) -> None:
        if not self._taken:
            self._taken = True  # an append that fails in its commit has taken the rows
            put(self._writer, self.more, replace=self.more.keys() <= self.before.keys())
        self._writer.commit()

    @property
    def after(self) -> State:
        return self.before | self.more

    def finish(self) -> None:
        self._writer.close()


class Replace(Append):
    def __init__(self, folder: Path, before: State, more: State) -> None:
        super().__init__(folder, before, dict.fromkeys(before, 10**6))


class Delete(Work):
    def do(self) -> None:
        whence.delete(self.path, list(self.before)[::2])

    @property
    def after(self) -> State:
        return dict(list(self.before.items())[1::2])


class Compact(Work):
    def prepare(self) -> None:
        whence.delete(self.path, list(self.before)[::2])
        self.before = dict(list(self.before.items())[1::2])

    def do(self) -> None:
        whence.compact(self.path)


class Merge(Work):
    def do(self) -> None:
        whence.merge([self.path, self.folder / "other"], self.out)

    def check_out(self) -> None:
        _expect(read(self.out), self.before | OTHERS)


class Split(Work):
    def do(self) -> None:
        whence.split(self.path, {self.out: {"even": True}, self.folder / "odd": {"even": False}})

    def check_out(self) -> None:
        found = read(self.out), read(self.folder / "odd")
        _expect(found[0] | found[1], self.before)
        _expect({number: 0 for number in found[0] if number % 2}, {})


class Export(Work):
    SUFFIX = ".npz"

    def prepare(self) -> None:
        self.out = self.out.with_suffix(self.SUFFIX)

    def do(self) -> None:
        whence.export_store(self.path, self.out)

    def check_out(self) -> None:
        again = self.folder / "again"
        whence.import_store(self.out, again)
        _expect(read(again), self.before)
        shutil.rmtree(again)


class ExportParquet(Export):
    SUFFIX = ".parquet"


class Import(Work):
    def prepare(self) -> None:
        whence.export_store(self.path, self.folder / "store.npz")

    def do(self) -> None:
        whence.import_store(self.folder / "store.npz", self.out)

    def check_out(self) -> None:
        _expect(read(self.out), self.before)


class SaveIndex(Work):
    def prepare(self) -> None:
        self._index = whence.Index(self.path, "hnsw")

    def do(self) -> None:
        self._index.save(self.out)

    def check_out(self) -> None:
        whence.Index.load(self.out, self.path)


class SaveFactors(Work):
    def prepare(self) -> None:
        self._factors = factors()

    def do(self) -> None:
        self._factors.save(self.out)

    def check_out(self) -> None:
        whence.Factors.load(self.out)


def _expect(found: State, expected: State) -> None:
    if found != expected:
        raise Wrong(f"it holds {len(found)} examples, and not the {len(expected)} that it should")


WORKS: tuple[type[Work], ...] = (
    Append,
    Replace,
    Delete,
    Compact,
    Merge,
    Split,
    Export,
    ExportParquet,
    Import,
    SaveIndex,
    SaveFactors,
)


# The trial


def run(count: int, seed: int) -> trial.Outcome:
    """With stores of as many examples."""
    never = ("false successes", "lost", "other errors", "not gone on with", "handles left open")
    outcome = trial.Outcome("full disk", *never)
    numbers = np.random.default_rng(seed).permutation(2 * count).tolist()
    before, more = dict.fromkeys(numbers[:count], 1), dict.fromkeys(numbers[count:], 1)
    with trial.scratch() as scratch:
        fill(scratch / "base" / "store", before)
        fill(scratch / "base" / "other", OTHERS)
        for disk in disks(scratch):
            try:
                for work in WORKS:
                    for steps in range(MOST):
                        if attempt(disk, scratch / "base", work, steps, before, more, outcome):
                            break
                    else:
                        outcome.miss("other errors", f"{work.__name__} is never done")
            finally:
                disk.close()
    return outcome


def disks(scratch: Path) -> Iterator[Size | Lengths]:
    """Every way to be full that there is here."""
    yield Lengths(scratch / "lengths")
    for what in ("pages", "names"):
        try:
            disk = Size(scratch / what, what)
        except (OSError, subprocess.CalledProcessError):
            trial.say("full disk: no file system can be mounted here, so by lengths of files alone")
            return
        yield disk


def attempt(
    disk: Size | Lengths,
    base: Path,
    kind: type[Work],
    steps: int,
    before: State,
    more: State,
    outcome: trial.Outcome,
) -> bool:
    """Does a work with so much room; whether it was enough."""
    folder = disk.folder / "work"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(base, folder)
    work = kind(folder, before, more)
    open_before = len(list(HANDLES.iterdir()))
    work.prepare()
    where = f"{kind.__name__} with {steps} steps in {disk.folder.name}"
    done = False
    try:
        with disk.room(steps):
            work.do()
        done = True
    except StoreError as error:
        if not any(refusal in str(error) for refusal in REFUSALS):
            outcome.miss("other errors", f"{where}: {error}")
    except Exception as error:
        outcome.miss("other errors", f"{where}: {type(error).__name__}: {error}")
    outcome.count("done" if done else "refused")
    what = "false successes" if done else "lost"
    try:
        _expect(read(work.path), work.after if done else work.before)
        what = "not gone on with" if not done else what
        if not done:
            work.do()
        work.finish()
        _expect(read(work.path), work.after)
        if not whence.verify(work.path).is_sound:
            raise Wrong("it is not sound")
        work.check_out()
    except (Wrong, WhenceError) as error:
        outcome.miss(what, f"{where}: {error}")
    if len(list(HANDLES.iterdir())) > open_before:
        outcome.miss("handles left open", where)
    return done


if __name__ == "__main__":
    trial.main(run, short=40, full=2000)
