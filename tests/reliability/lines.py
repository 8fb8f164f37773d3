"""Ctrl-C at every line of the library's own, while stores are written, thinned out and copied.

An operation is made again and again, and each time a KeyboardInterrupt is raised at another line,
or return, of a function of whence: what a signal does at a random moment is done at each. Then the
store must open and be sound, and hold what was there before or all that the operation adds; what
was taken before the interrupt, and closed as a `with` closes it, is there; a file or store that was
made is whole or not there; nobody holds the lock; and the operation can be made again.

    python tests/reliability/lines.py [--full] [--seed N] [--count N]
"""

from __future__ import annotations

import gc
import shutil
import sys
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any
from unittest import mock

import numpy as np
import trial
from history import State, Wrong, fill, opened, put, read

import whence
from whence.errors import StoreError
from whence.store.files import BLOCK

PACKAGE = str(Path(whence.__file__).parent)

BROKEN, WRONG = "raised something else", "not what must be"


class Operation:
    """Something that is interrupted.

    Args:
        folder: An empty one.

    Attributes:
        path: Of the store.
        before: What it holds before.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.path = folder, folder / "store"
        self.before: State = {}

    def prepare(self) -> None:
        """Makes what is needed."""
        parts = [{number: 0 for number in range(first, first + 7)} for first in range(0, 21, 7)]
        writer = opened(self.path)
        for part in parts:
            put(writer, part)
            writer.commit()
            self.before |= part
        writer.close()

    def run(self) -> None:
        """Does it."""
        raise NotImplementedError

    def check(self) -> None:
        """Does it again if it was not done, and looks at all there is.

        Raises:
            Wrong: If it is not what it must be.
        """
        raise NotImplementedError

    def expect(self, path: Path, *allowed: State) -> State:
        """What the store at a path holds, which is sound and has no holder."""
        found = read(path)
        if found not in allowed:
            raise Wrong(f"{path.name} holds {found}, and none of {allowed}")
        if not (verification := whence.verify(path)).is_sound:
            raise Wrong(f"{path.name} is not sound: {verification}")
        opened(path).close()
        return found


class Append(Operation):
    """Rows, new ones and such as take the place of others, written ahead and committed."""

    def prepare(self) -> None:
        super().prepare()
        self.states = [self.before]
        self.least = 0

    def run(self) -> None:
        with mock.patch("whence.store.writer.AHEAD_BYTES", 256):
            writer = opened(self.path)
            try:
                for step in range(1, 6):
                    replaces = step % 2 == 0
                    first = 5 * step if replaces else 100 * step
                    part = {number: step for number in range(first, first + 6)}
                    self.states.append(self.states[-1] | part)
                    put(writer, part, replace=replaces)
                    self.least = step  # unless closing is interrupted, it is there in the end
                    if step == 3:
                        writer.commit()
                        committed = step
            except BaseException:
                writer.close()
                raise
            self.least = committed
            writer.close()

    def check(self) -> None:
        found = self.expect(self.path, *self.states[self.least :])
        writer = opened(self.path)
        put(writer, {10_000: 9})
        writer.close()
        self.expect(self.path, found | {10_000: 9})


class Delete(Operation):
    """Examples, by id."""

    gone = (2, 9, 16)

    def run(self) -> None:
        whence.delete(self.path, list(self.gone))

    def check(self) -> None:
        after = {number: 0 for number in self.before if number not in self.gone}
        self.expect(self.path, self.before, after)
        whence.delete(self.path, list(self.gone), missing="skip")
        self.expect(self.path, after)


class Compact(Operation):
    """A store that examples were deleted from."""

    def prepare(self) -> None:
        super().prepare()
        whence.delete(self.path, [2, 9, 16])
        self.before = read(self.path)

    def run(self) -> None:
        whence.compact(self.path)

    def check(self) -> None:
        self.expect(self.path, self.before)
        whence.compact(self.path)
        self.expect(self.path, self.before)
        if whence.info(self.path).leftovers or len(list(self.path.glob("shard-*"))) != 1:
            raise Wrong("it is not compact")


class Repair(Operation):
    """A store with a damaged block."""

    def prepare(self) -> None:
        self.before = {number: 0 for number in range(3000)}
        fill(self.path, self.before)
        file = self.path / "shard-00000001" / "rows.npy"
        content = bytearray(file.read_bytes())
        content[BLOCK + 1] ^= 1
        file.write_bytes(content)

    def run(self) -> None:
        whence.repair(self.path)

    def check(self) -> None:
        whence.repair(self.path)
        found = read(self.path)
        self.expect(self.path, found)
        if not 0 < len(found) < 3000 or found.items() - self.before.items():
            raise Wrong(f"{len(found)} rows are left")


class Made(Operation):
    """Stores that are made of another."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.made: dict[Path, State] = {}

    def check(self) -> None:
        self.expect(self.path, self.before)
        for path, state in self.made.items():
            with suppress(StoreError):
                whence.open(path)
                self.expect(path, state)
        there = [path.exists() and any(path.glob("manifest-*.json")) for path in self.made]
        if not all(there):
            if any(there):  # between two names no interrupt must come: one of them is no harm
                for path in self.made:
                    shutil.rmtree(path, ignore_errors=True)
            self.run()
        for path, state in self.made.items():
            self.expect(path, state)


class Merge(Made):
    """Two stores into one."""

    def prepare(self) -> None:
        super().prepare()
        other = dict.fromkeys(range(50, 56), 3)
        fill(self.folder / "other", other)
        self.made = {self.folder / "merged": self.before | other}

    def run(self) -> None:
        whence.merge([self.path, self.folder / "other"], self.folder / "merged")


class Split(Made):
    """One store into two."""

    def prepare(self) -> None:
        super().prepare()
        self.made = {
            self.folder / name: {number: 0 for number in self.before if (number % 2 == 0) == even}
            for name, even in (("even", True), ("odd", False))
        }

    def run(self) -> None:
        whence.split(
            self.path, {path: {"number": list(state)} for path, state in self.made.items()}
        )


class Exchange(Made):
    """A store into a file, and that into a store."""

    suffix = ".npz"

    def prepare(self) -> None:
        super().prepare()
        self.made = {self.folder / "imported": self.before}

    def run(self) -> None:
        file = self.folder / f"store{self.suffix}"
        whence.export_store(self.path, file)
        whence.import_store(file, self.folder / "imported")

    def check(self) -> None:
        if left := list(self.folder.glob(".whence-*")):
            raise Wrong(f"{left[0].name} was left")
        super().check()


class ExchangeParquet(Exchange):
    """The same by Parquet."""

    suffix = ".parquet"


OPERATIONS = [Append, Delete, Compact, Repair, Merge, Split, Exchange, ExchangeParquet]


def traced(call: Callable[[], None], at: int, say: Callable[[str], None]) -> int:
    """Makes a call, with an interrupt at a line or return of a function of whence.

    Args:
        call: What is made.
        at: At which of them; -1 for none.
        say: Is told where the interrupt came.

    Returns:
        How many there were.
    """
    passed = 0

    def look(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal passed
        if not frame.f_code.co_filename.startswith(PACKAGE):
            return None
        if event in ("line", "return"):
            passed += 1
            if passed == at + 1:
                file = frame.f_code.co_filename.removeprefix(f"{PACKAGE}/")
                say(f"{file}:{frame.f_lineno} {frame.f_code.co_name}, {event}")
                raise KeyboardInterrupt  # which ends tracing
        return look

    before = sys.gettrace()
    sys.settrace(look)
    try:
        call()
    finally:
        sys.settrace(before)
    return passed


def interrupt(kind: type[Operation], at: int, outcome: trial.Outcome) -> None:
    """Makes an operation with an interrupt, and looks at what it has left."""
    name = kind.__name__.lower()
    with trial.scratch() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # of what was interrupted
        operation = kind(folder)
        operation.prepare()
        places: list[str] = []
        try:
            traced(operation.run, at, places.append)
        except KeyboardInterrupt:
            pass
        except BaseException as error:
            outcome.miss(BROKEN, f"{name} at {places}: {type(error).__name__}: {error}")
            return
        gc.collect()  # what the interrupt's traceback held
        try:
            operation.check()
        except (Wrong, StoreError) as error:
            outcome.miss(WRONG, f"{name} at {places}: {error}")
        outcome.count(name)


def lines_of(kind: type[Operation]) -> int:
    """How many lines and returns there are in an operation."""
    with trial.scratch() as folder:
        operation = kind(folder)
        operation.prepare()
        found = traced(operation.run, -1, print)
        operation.check()
    return found


def run(count: int, seed: int) -> trial.Outcome:
    """Interrupts at `count` lines, or at all if there are fewer, evenly from each operation."""
    outcome = trial.Outcome("lines", BROKEN, WRONG)
    random = np.random.default_rng(seed)
    totals = {kind: lines_of(kind) for kind in OPERATIONS}
    share = min(1.0, count / sum(totals.values()))
    for kind, total in totals.items():
        places = random.choice(total, max(1, round(share * total)), replace=False)
        for at in np.sort(places).tolist():
            interrupt(kind, at, outcome)
    return outcome


if __name__ == "__main__":
    trial.main(run, short=200, full=100_000)
