"""A store's random life, of which every row is known: it follows from its id and its version.

As a script it lives until it is killed, and says on its output what it begins and what is
confirmed, a JSON list a line.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import trial  # noqa: F401 - which knows where filled.py is
from filled import manifest

import whence
from whence.errors import StoreError
from whence.store import Checkpoint, Manifest, Writer

DIM = 12
OTHERS = {2**40 + number: 0 for number in range(30)}
"""What is in the store that is merged with this one."""

State = dict[int, int]
"""The number of each example in a store, and its version."""

Operation = list[Any]
"""Its name and what it takes."""


class Wrong(Exception):
    """A store is not what it must be."""


def rows_of(state: State) -> np.ndarray:
    """[examples, DIM] the rows of these numbers and versions: no two have a value alike."""
    numbers, versions = _arrays_of(state)
    mixed = (
        numbers[:, None] * 7919 + versions[:, None] * 104729 + np.arange(DIM) * 15485863
    ) % 65521
    return (mixed - 32760).astype(np.float32)


def columns_of(state: State) -> dict[str, np.ndarray]:
    """A column of each type."""
    numbers, versions = _arrays_of(state)
    texts = np.empty(len(state), object)
    texts[:] = [text_of(number, version) for number, version in state.items()]
    return {
        "number": numbers,
        "version": versions,
        "third": numbers / 3,
        "even": numbers % 2 == 0,
        "text": texts,
    }


def _arrays_of(state: State) -> tuple[np.ndarray, np.ndarray]:
    return np.array(list(state), np.int64), np.array(list(state.values()), np.int64)


def text_of(number: int, version: int) -> str:
    """The text of an example: nothing else in a store looks like it."""
    return f"«{number}·{version}»"


def read(path: Path) -> State:
    """What the store at a path holds. See `read_from`."""
    return read_from(whence.open(path))


def read_from(store: whence.Store) -> State:
    """What an open store holds.

    Raises:
        Wrong: If a row, or what belongs to it, is not what its number and version say.
    """
    numbers = [int(str(id_).removeprefix("id ")) for id_ in store.ids.tolist()]
    state = dict(zip(numbers, store.columns["version"].tolist(), strict=True))
    if len(state) < len(numbers):
        raise Wrong("an id is there twice")
    if not state:
        return state
    for name, expected in columns_of(state).items():
        if not np.array_equal(store.columns[name], expected):
            raise Wrong(f"column {name} is not that of its ids")
    expected_rows = rows_of(state)
    if np.abs(store.rows() - expected_rows).max() > 0.25:  # of steps of 1 up to 32760
        raise Wrong("a row is not that of its id")
    hits = store.search(expected_rows[:1], k=1)
    if hits.helpful.ids.shape != (1, 1) or not np.isfinite(hits.helpful.scores).all():
        raise Wrong("a search finds nothing")
    return state


def after(state: State, operation: Operation) -> State:
    """What a store holds after an operation."""
    name, *given = operation
    if name in ("append", "replace"):
        return state | dict.fromkeys(given[0], given[1])
    if name == "delete":
        return {number: version for number, version in state.items() if number not in given[0]}
    return state


class Log:
    """What was begun in a store, and how much of it is confirmed.

    Attributes:
        state: What is confirmed.
        begun: What was begun since.
        made: Stores made of this one that must be there.
        ever: Every (number, version) that may have been written.
        is_new: Whether nothing was ever confirmed.
    """

    def __init__(self) -> None:
        self.state: State = {}
        self.begun: list[Operation] = []
        self.made: dict[str, State] = {}
        self.ever: set[tuple[int, int]] = set()
        self.is_new = True

    def begin(self, operation: Operation) -> None:
        self.begun.append(operation)
        self.ever |= after({}, operation).items()
        if operation[0] == "forget":
            self.made.pop(operation[1], None)

    def confirm(self) -> None:
        """All that was begun has been done."""
        for operation in self.begun:
            self.state = after(self.state, operation)
            if operation[0] == "merge":
                self.made[operation[1]] = self.state | OTHERS
        self.is_new &= not self.begun
        self.begun = []

    def go_on(self, state: State) -> None:
        """A new writer begins with what was found, and removes what was made."""
        self.state, self.begun, self.made = state, [], {}
        self.is_new &= not state

    @property
    def under_way(self) -> str:
        """What was not confirmed, in a word."""
        return self.begun[-1][0] if self.begun else "nothing"

    def check(self, folder: Path) -> State:
        """What the store in a folder holds.

        Raises:
            Wrong: If that is not what was confirmed, with a whole number of the operations that
                were begun since; or if it does not open.
        """
        allowed = [self.state]
        for operation in self.begun:
            allowed.append(after(allowed[-1], operation))
        try:
            found = read(folder / "store")
            verification = whence.verify(folder / "store")
        except StoreError as error:
            if self.is_new:
                return {}
            raise Wrong(f"it does not open: {error}") from error
        if found not in allowed:
            raise Wrong(_difference(found, allowed))
        if not verification.is_sound:
            raise Wrong(f"it opens, and is not sound: {verification}")
        self._check_made(folder)
        return found

    def _check_made(self, folder: Path) -> None:
        """Stores that were merged: those confirmed are there, and any that opens is whole."""
        removed = {operation[1] for operation in self.begun if operation[0] == "forget"}
        for path in folder.glob("merged-*"):
            if path.name in removed or ".part" in path.name:
                continue
            expected = self.made.get(path.name)
            try:
                found = read(path)
            except StoreError as error:
                if expected is None:
                    continue
                raise Wrong(f"{path.name} does not open: {error}") from error
            if found != (self.state | OTHERS if expected is None else expected):
                raise Wrong(f"{path.name} opens, and is not whole")
        missing = [name for name in self.made if not (folder / name).exists()]
        if missing:
            raise Wrong(f"{missing[0]} was confirmed, and is not there")


def _difference(found: State, allowed: list[State]) -> str:
    near = min(allowed, key=lambda state: len(state.items() ^ found.items()))
    lost = {number for number in near if number not in found}
    more = {number for number in found if number not in near}
    other = {number for number in found if number in near and found[number] != near[number]}
    return (
        f"it holds {len(found)} examples, and none of {len(allowed)} states that it may be in; "
        f"from the nearest, {len(lost)} are lost, {len(more)} too many, {len(other)} of another "
        "version"
    )


class Life:
    """Random operations on the store of a folder.

    Args:
        folder: With the store in `store`.
        seed: Of the operations.
        state: What the store holds.
        begin: Told of each operation before it begins.
        confirm: Told when all that was begun is confirmed.
    """

    WEIGHTS: ClassVar = {
        "append": 9,
        "replace": 3,
        "delete": 3,
        "compact": 2,
        "merge": 2,
        "reopen": 1,
    }

    def __init__(
        self,
        folder: Path,
        seed: int,
        state: State,
        begin: Callable[[Operation], None],
        confirm: Callable[[], None],
    ) -> None:
        self.folder, self.path, self.state = folder, folder / "store", dict(state)
        self._random = np.random.default_rng(seed)
        self._as_text = folder.name.endswith("text")
        self._begin, self._confirm = begin, confirm
        self._writer: Writer | None = None
        self._merged: set[str] = set()
        self._version = 1 + max(state.values(), default=0)
        self._next = 1 + max((number for number in state if number not in OTHERS), default=0)

    def prepare(self) -> None:
        """Removes what was merged, but for what is under way; makes the store to merge with."""
        for path in self.folder.glob("forgotten-*"):
            shutil.rmtree(path)
        for path in self.folder.glob("merged-*"):
            # A disk whose renaming is not atomic can lose both names of the manifest: what is left
            # is refused as a folder of something else, and it is for its owner to remove it.
            under_way = (path / "manifest-00000001.part").exists()
            if (path / "manifest-00000001.json").exists() or not under_way:
                shutil.rmtree(path.rename(self.folder / f"forgotten-{path.name}"))
        # Else a power cut brings back a store of rows that are not those of this life's beginning.
        handle = os.open(self.folder, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)
        if not (self.folder / "other").exists():
            fill(self.folder / "other.part", OTHERS, as_text=self._as_text)
            (self.folder / "other.part").rename(self.folder / "other")

    def step(self) -> str:
        """One operation, until it is confirmed; its name."""
        names = list(self.WEIGHTS) if self.state else ["append"]
        weights = np.array([self.WEIGHTS[name] for name in names], float)
        name = str(self._random.choice(names, p=weights / weights.sum()))
        getattr(self, f"_{name}")()
        self._confirm()
        return name

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def _append(self) -> None:
        for _ in range(self._random.integers(1, 4)):
            count = int(self._random.integers(1, 60))
            self._put("append", list(range(self._next, self._next + count)))
            self._next += count
        self._open().commit()

    def _replace(self) -> None:
        self._put("replace", self._some())
        self._open().commit()

    def _put(self, name: str, numbers: list[int]) -> None:
        part = dict.fromkeys(numbers, self._version)
        self._say([name, numbers, self._version])
        self._version += 1
        put(self._open(), part, as_text=self._as_text, replace=name == "replace")

    def _delete(self) -> None:
        numbers = self._some()
        self.close()
        self._say(["delete", numbers])
        whence.delete(self.path, ids_of(numbers, as_text=self._as_text))

    def _compact(self) -> None:
        self.close()
        self._say(["compact"])
        whence.compact(self.path)

    def _merge(self) -> None:
        self.close()
        name = f"merged-{self._version}"
        self._version += 1
        for old in self.folder.glob("merged-*"):
            if old.name in self._merged:
                self._say(["forget", old.name])
                shutil.rmtree(old.rename(self.folder / f"forgotten-{old.name}"))
            else:
                name = old.name  # a killed one, which is taken up again
        self._merged.add(name)
        self._say(["merge", name])
        whence.merge([self.path, self.folder / "other"], self.folder / name)

    def _reopen(self) -> None:
        self.close()

    def _some(self) -> list[int]:
        """A tenth of the examples, and at least one; most of them if there are many."""
        share = 0.1 if len(self.state) < 600 else 0.7
        count = max(1, int(len(self.state) * share))
        return self._random.choice(list(self.state), count, replace=False).tolist()

    def _say(self, operation: Operation) -> None:
        self._begin(operation)
        self.state = after(self.state, operation)

    def _open(self) -> Writer:
        if self._writer is None:
            self._writer = opened(self.path)
        return self._writer


def opened(path: Path) -> Writer:
    """A writer of a store of known rows."""
    writer = Writer(path, manifest(DIM))
    writer.set_checkpoint(Checkpoint("0"))
    return writer


def put(writer: Writer, state: State, *, as_text: bool = False, replace: bool = False) -> None:
    """Appends known rows."""
    ids = np.array(ids_of(list(state), as_text=as_text))
    columns = writer.check_columns(columns_of(state))
    writer.append(ids, rows_of(state), columns, replaces=replace)


def fill(path: Path, state: State, *, as_text: bool = False) -> None:
    """A store of known rows."""
    writer = opened(path)
    put(writer, state, as_text=as_text)
    writer.close()


def ids_of(numbers: list[int], *, as_text: bool) -> list[Any]:
    return [f"id {number}" for number in numbers] if as_text else numbers


def check_compacted(folder: Path, log: Log) -> None:
    """Nothing, if a store that was compacted holds nothing but its rows.

    Raises:
        Wrong: If something is left of a killed writer, or of rows that are gone.
    """
    path = folder / "store"
    whence.compact(path)
    found, _ = Manifest.load(path)
    named = {shard.name for shard in found.shards}
    there = {each.name for each in path.glob("shard-*")}
    parts = list(path.rglob("*.part"))
    if there != named or parts:
        raise Wrong(f"compact leaves {sorted(there ^ named) + parts}")
    content = b"".join(each.read_bytes() for each in path.rglob("*") if each.is_file())
    for number, version in log.ever - log.state.items():
        if text_of(number, version).encode() in content:
            raise Wrong(f"compact leaves the text of {number}, which is gone")


def main(folder: Path, seed: int) -> None:
    """Lives until it is killed, from the state that is on its input."""

    def say(line: list[Any]) -> None:
        sys.stdout.write(json.dumps(line) + "\n")
        sys.stdout.flush()

    state = {int(number): version for number, version in json.load(sys.stdin)}
    life = Life(folder, seed, state, say, lambda: say(["confirmed"]))
    life.prepare()
    say(["ready"])
    try:
        while True:
            life.step()
    except BaseException as error:
        say(["failed", type(error).__name__, str(error)])
        raise


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
