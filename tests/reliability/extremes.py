"""Extremes: a read-only file system, odd paths, very many shards, very many ids that are strings.

Each must work, and what cannot be done must be refused by name.
"""

from __future__ import annotations

import os
import stat
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import numpy as np
import trial
from filled import manifest, random_rows
from history import OTHERS, Wrong, fill, opened, read

import whence
from whence.errors import StoreError
from whence.store import Checkpoint, Writer

PATHS = (
    "with spaces",
    " at its ends ",
    "ünïcödé 梯度 🧭",
    "e\u0301 composed not",
    "'quotes' \"and\" $(more); * ? [x]",
    "-dash",
    "%s {0} \\n",
    "line\nbreak",
    "." + "long" * 60,
    os.fsdecode(b"no \xff utf-8"),
    "/".join(["deep"] * 300),
)


def run(count: int, seed: int) -> trial.Outcome:
    """With so many shards, and ten times as many strings."""
    outcome = trial.Outcome("extremes", "did not work")
    generator = np.random.default_rng(seed)

    def attempt(what: str, work: Callable[..., None], *given: object) -> None:
        begun = time.monotonic()
        try:
            work(*given)
            outcome.count(what)
        except Exception as error:
            outcome.miss("did not work", f"{what}: {type(error).__name__}: {error}")
        trial.say(f"extremes: {what}: {time.monotonic() - begun:.1f} s")

    with trial.scratch() as scratch:
        attempt("read-only file system", read_only, scratch)
        for number, name in enumerate(PATHS):
            attempt("odd paths", odd_path, scratch / str(number) / name)
        attempt("very many shards", many_shards, scratch / "shards", count, generator)
        attempt("very many strings", many_strings, scratch / "ids", 10 * count, generator)
    return outcome


def expect(found: object, expected: object, what: str) -> None:
    if found != expected:
        raise Wrong(f"{what} is {found!r:.80}, and not {expected!r:.80}")


# A read-only file system


def read_only(scratch: Path) -> None:
    """All that reads works, and all that writes is refused."""
    folder, state = scratch / "store", dict.fromkeys(range(50), 1)
    fill(folder, state)
    whence.Index(folder, "hnsw").save(scratch / "index")
    with frozen(scratch):
        expect(read(folder), state, "what is read")
        expect(whence.verify(folder).is_sound, True, "soundness")
        expect(len(whence.Index.load(scratch / "index", folder)), 50, "the length of the index")
        whence.info(folder)
        for work in (
            lambda: opened(folder),
            lambda: whence.delete(folder, [3]),
            lambda: whence.compact(folder),
            lambda: whence.repair(folder),
            lambda: whence.merge([folder], scratch / "merged"),
            lambda: whence.export_store(folder, scratch / "store.npz"),
            lambda: whence.Index(folder, "hnsw").save(scratch / "again"),
        ):
            refused(work)
    expect(read(folder), state, "what is read afterwards")


def refused(work: Callable[[], object]) -> None:
    try:
        work()
    except StoreError as error:
        if not any(word in str(error) for word in ("Read-only", "Permission denied")):
            raise
        return
    raise Wrong("what cannot be written was written")


@contextmanager
def frozen(folder: Path) -> Iterator[None]:
    """A folder on a read-only file system; where none can be mounted, one without permissions."""
    try:
        _command("mount", "--bind", folder, folder)
    except (OSError, subprocess.CalledProcessError):
        if os.geteuid() == 0:
            raise
        every = [folder, *folder.rglob("*")]
        for path in every:
            path.chmod(path.stat().st_mode & ~(stat.S_IWUSR | stat.S_IWGRP | stat.S_IWOTH))
        try:
            yield
        finally:
            for path in every:
                path.chmod(path.stat().st_mode | stat.S_IWUSR)
        return
    try:
        _command("mount", "-o", "remount,bind,ro", folder, folder)
        yield
    finally:
        _command("umount", "--lazy", folder)


def _command(*words: str | Path) -> None:
    subprocess.run(words, check=True, capture_output=True)


# Odd paths


def odd_path(folder: Path) -> None:
    """All that a store goes through."""
    state = dict.fromkeys(range(40), 1)
    folder.mkdir(parents=True)
    path = folder / folder.name
    fill(path, state)
    fill(path.with_name("other"), OTHERS)
    expect(read(path), state, "what is read")
    whence.delete(path, [5, 6])
    state = {number: version for number, version in state.items() if number not in (5, 6)}
    expect(read(path), state, "what is read without what was deleted")
    whence.compact(path)
    expect(read(path), state, "what is read when compacted")
    expect(whence.verify(path).is_sound, True, "soundness")
    whence.merge([path, path.with_name("other")], folder / "merged")
    expect(read(folder / "merged"), state | OTHERS, "what is merged")
    whence.export_store(path, folder / "store.npz")
    whence.import_store(folder / "store.npz", folder / "imported")
    expect(read(folder / "imported"), state, "what is imported")
    whence.Index(path, "hnsw").save(folder / "index")
    expect(len(whence.Index.load(folder / "index", path)), len(state), "the length of the index")


# Very many


def many_shards(path: Path, count: int, generator: np.random.Generator) -> None:
    """One row a shard."""
    rows = random_rows(count, 4, seed=int(generator.integers(2**31)))
    writer = Writer(path, manifest(4))
    writer.set_checkpoint(Checkpoint("0"))
    with mock.patch("whence.store.manifest.PACKED", min(1000, count // 20)):
        for number in range(count):
            writer.append(np.array([number]), rows[number : number + 1], {})
            writer.commit()
        writer.close()
    store = whence.open(path)
    expect(len(store.manifest.shards), count, "the number of shards")
    expect(store.ids.tolist(), list(range(count)), "what the ids are")
    check_search(store, rows, generator)
    expect(whence.verify(path).is_sound, True, "soundness")
    gone = generator.choice(count, count // 3, replace=False)
    whence.delete(path, gone)
    whence.compact(path)
    store = whence.open(path)
    expect(len(store.manifest.shards), 1, "the number of shards that are left")
    left = np.setdiff1d(np.arange(count), gone)
    expect(store.ids.tolist(), left.tolist(), "what the ids are that are left")
    check_search(store, rows[left], generator)


def many_strings(path: Path, count: int, generator: np.random.Generator) -> None:
    """Ids of texts of many lengths and scripts."""
    ids = np.array([f"{'梯é🧭x'[number % 4] * (number % 9)} {number}" for number in range(count)])
    rows = random_rows(count, 4, seed=int(generator.integers(2**31)))
    writer = Writer(path, manifest(4))
    writer.set_checkpoint(Checkpoint("0"))
    for part in np.array_split(np.arange(count), 5):
        writer.append(ids[part], rows[part], {})
        writer.commit()
    writer.close()
    store = whence.open(path)
    expect(bool((store.ids == ids).all()), True, "whether the ids are the same")
    check_search(store, rows, generator)
    asked = generator.choice(count, 100, replace=False)
    found = np.abs(store.rows(ids[asked]) - rows[asked]).max() <= 1e-4 * np.abs(rows).max()
    expect(bool(found), True, "whether rows are found by id")
    expect(whence.verify(path).is_sound, True, "soundness")
    whence.delete(path, ids[asked])
    whence.compact(path)
    left = np.delete(np.arange(count), asked)
    store = whence.open(path)
    expect(bool((store.ids == ids[left]).all()), True, "whether the ids left are the same")
    check_search(store, rows[left], generator)


def check_search(store: whence.Store, rows: np.ndarray, generator: np.random.Generator) -> None:
    """Nothing, if the best of a search has the score that numpy finds best."""
    query = generator.normal(size=(1, rows.shape[1])).astype(np.float32)
    best = float((rows.astype(np.float64) @ query[0]).max())
    found = float(store.search(query, k=1).helpful.scores[0, 0])
    expect(abs(found - best) <= 1e-5 * abs(best), True, f"{found} beside {best}")


if __name__ == "__main__":
    trial.main(run, short=500, full=100_000)
