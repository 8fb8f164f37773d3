"""Processes that fork after the library was used: their children use it too, and none hangs.

A process searches with threads, builds indexes, sketches and records; then it forks in the ways
that programs do: by `os.fork`, by `multiprocessing`, as the workers of a DataLoader, and while what
an interrupt left is computed on. Each child opens a store and searches it, asks the indexes that it
was born with, sketches, and multiplies beside the main thread. What it finds must be what was found
before.

    python tests/reliability/forks.py [--full] [--seed N] [--count N]
"""

from __future__ import annotations

import multiprocessing
import os
import select
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import trial
from filled import fill
from numpy.typing import NDArray

import whence
from whence._interrupts import interruptible

PATIENCE = 20.0
"""Seconds after which a child hangs."""

FORKS = 20
"""How often one process forks."""

THREADS = 4

HANGS, WRONG = "hangs", "wrong"


class Used:
    """What a process has used, and what its children should find.

    Args:
        folder: For stores.
        seed: Of the rows.
    """

    def __init__(self, folder: Path, seed: int) -> None:
        random = np.random.default_rng(seed)
        self._path = folder / "store"
        self._rows = random.standard_normal((3000, 64), np.float32)
        self._gradients = random.standard_normal((8, 200_000), np.float32)
        fill(self._path, self._rows, parts=3)
        self._indexes = [whence.Index(self._rows, method) for method in ("exact", "certified")]
        self._record(folder / "recorded")
        self._expected = self._found()

    def _record(self, path: Path) -> None:
        model = torch.nn.Linear(64, 300)
        with whence.record(model, path, dim=256) as recorder:
            for first in range(0, 64, 16):
                with recorder.batch(range(first, first + 16)):
                    model(torch.from_numpy(self._rows[first:][:16])).square().mean().backward()

    def _found(self) -> list[NDArray[np.float32]]:
        sources = [whence.open(self._path), *self._indexes]
        asked = self._rows[:20]
        hits = [each.search(asked, k=5, threads=THREADS).helpful.scores for each in sources]
        sketch = whence.Sketch(dim=64, threads=THREADS)
        product = interruptible(np.matmul, self._gradients.T[:1000], self._gradients[:, :1000])
        return [*hits, sketch(self._gradients), product]

    def works(self) -> bool:
        """Whether the library finds the same again."""
        same = zip(self._found(), self._expected, strict=True)
        return all(np.array_equal(one, other) for one, other in same)


# The ways to fork; each says whether the library works in all children.


def os_fork(used: Used) -> bool:
    child = os.fork()
    if child == 0:
        os._exit(0 if used.works() else 1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def multiprocessing_fork(used: Used) -> bool:
    context = multiprocessing.get_context("fork")
    children = [context.Process(target=_child, args=(used,)) for _ in range(2)]
    for each in children:
        each.start()
    for each in children:
        each.join()
    return all(each.exitcode == 0 for each in children)


def _child(used: Used) -> None:
    if not used.works():
        raise SystemExit(1)


class Items(torch.utils.data.Dataset):
    """Whether the library works in the process that an item comes from."""

    def __init__(self, used: Used) -> None:
        self._used = used

    def __len__(self) -> int:
        return 4

    def __getitem__(self, _: int) -> bool:
        return self._used.works()


def data_loader(used: Used) -> bool:
    loader = torch.utils.data.DataLoader(Items(used), num_workers=2, multiprocessing_context="fork")
    return all(map(bool, loader))


def os_fork_after_an_interrupt(used: Used) -> bool:
    def computed(matrix: NDArray[np.float64]) -> None:
        signal.raise_signal(signal.SIGINT)
        np.linalg.eigh(matrix)

    random = np.random.default_rng(0).standard_normal((1000, 1000))
    try:
        interruptible(computed, random + random.T)
    except KeyboardInterrupt:
        return os_fork(used)
    return False


WAYS: tuple[Callable[[Used], bool], ...] = (
    os_fork,
    multiprocessing_fork,
    data_loader,
    os_fork_after_an_interrupt,
)


# The trial


def serve(folder: str, seed: str) -> None:
    """Forks in the ways that the lines of standard input name, and says what came of each."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    used = Used(Path(folder), int(seed))
    trial.say("ready")
    ways = {way.__name__: way for way in WAYS}
    for line in sys.stdin:
        right = used.works() and ways[line.strip()](used)
        trial.say("right" if right else "wrong")


class Forking:
    """A process that forks when it is asked to."""

    def __init__(self, folder: Path, seed: int) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__, "--serve", str(folder), str(seed)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self._process.stdout.readline()

    def __enter__(self) -> Forking:
        return self

    def __exit__(self, *_: object) -> None:
        os.killpg(self._process.pid, signal.SIGKILL)  # its children with it
        self._process.communicate()

    def fork(self, way: str) -> str | None:
        """What came of it; None if nothing did in time."""
        self._process.stdin.write(f"{way}\n")
        self._process.stdin.flush()
        ready, _, _ = select.select([self._process.stdout], [], [], PATIENCE)
        return self._process.stdout.readline().strip() if ready else None


def run(count: int, seed: int) -> trial.Outcome:
    """As many forks."""
    outcome = trial.Outcome("forks", HANGS, WRONG)
    for first in range(0, count, FORKS):
        with trial.scratch() as folder, Forking(folder, seed + first) as process:
            for number in range(first, min(count, first + FORKS)):
                way = WAYS[number % len(WAYS)].__name__
                found = process.fork(way)
                outcome.count(way)
                if found is None:
                    outcome.miss(HANGS, way)
                    break
                if found != "right":
                    outcome.miss(WRONG, f"{way}: {found or 'the process ended'}")
                    break
    return outcome


if __name__ == "__main__":
    if sys.argv[1:2] == ["--serve"]:
        serve(*sys.argv[2:])
    else:
        trial.main(run, short=4, full=100)
