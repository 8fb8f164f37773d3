"""One writer and four readers: what a reader sees is what some commit has left, and all of it.

The writer appends, replaces, deletes, compacts and merges without a pause. Second writers come all
the while, and must be told at once who holds the store.
"""

from __future__ import annotations

import json
import multiprocessing
import time
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import numpy as np
import trial
from filled import manifest
from history import DIM, Life, Operation, State, Wrong, after, read_from

import whence
from whence.errors import LockedError, StoreError
from whence.store import Writer

READERS = 4

AT_ONCE = 10.0
"""Seconds within which a second writer is refused, on a machine as busy as any: one that waited for
the writer would wait for ever, for that one lets nothing go while others are asked to take it."""

LONGEST = 0.5
"""Seconds that a reader waits between opening a store and reading it, at most."""

NEVER = ("torn", "other errors", "second writers let in")


class Shared(Life):
    """A life whose store is never let go of while others are asked to take it.

    Args:
        folder: As of `Life`.
        seed: As of `Life`.
        log: A file to which is written what is begun and confirmed.
        gate: Held from when the writer is closed until one is open again.
    """

    def __init__(self, folder: Path, seed: int, log: Path, gate: Any) -> None:
        self._log = log.open("a")
        self._gate = gate
        super().__init__(folder, seed, {}, self._note, lambda: self._note(None))
        gate.acquire()

    def _note(self, operation: Operation | None) -> None:
        self._log.write(json.dumps(operation) + "\n")
        self._log.flush()

    def close(self) -> None:
        if self._writer is not None:
            self._gate.acquire()
        super().close()

    def _open(self) -> Writer:
        if self._writer is None:
            super()._open()
            self._gate.release()
        return super()._open()


class Voice:
    """Tells the trial what happens in a process.

    Args:
        pipe: To the trial.
        ready: Waits for all processes to have begun.
        seconds: That they then go on for.
    """

    def __init__(self, pipe: Connection, ready: Any, seconds: float) -> None:
        self._pipe, self._ready, self._seconds = pipe, ready, seconds
        self._until = 0.0

    def goes_on(self) -> bool:
        """Whether there is time left."""
        if not self._until:
            self._ready.wait()
            self._until = time.monotonic() + self._seconds
        return time.monotonic() < self._until

    def count(self, what: str) -> None:
        self._pipe.send((what, None))

    def miss(self, what: str, how: object) -> None:
        self._pipe.send((what, str(how)))


def write(folder: Path, seed: int, voice: Voice, gate: Any) -> None:
    """Lives."""
    try:
        life = Shared(folder, seed, folder / "log", gate)
        life.prepare()
        life.step()  # what comes beside it is refused from now on
        while voice.goes_on():
            voice.count(f"times {life.step()}")
        life.close()
    except Exception as error:
        voice.miss("other errors", f"of the writer: {type(error).__name__}: {error}")


def intrude(folder: Path, seed: int, voice: Voice, gate: Any, holder: Any) -> None:
    """Tries to write beside the writer."""
    generator = np.random.default_rng(seed)
    tries = {
        "Writer": lambda path: Writer(path, manifest(DIM)).close(),
        "delete": lambda path: whence.delete(path, [1]),
        "compact": whence.compact,
    }
    while voice.goes_on():
        if not gate.acquire(timeout=0.1):
            continue
        name = str(generator.choice(list(tries)))
        begun = time.monotonic()
        try:
            tries[name](folder / "store")
            voice.miss("second writers let in", name)
        except LockedError as error:
            voice.count("second writers refused")
            if str(holder.value) not in str(error):
                voice.miss("other errors", f"the holder is not named: {error}")
        except Exception as error:
            voice.miss("other errors", f"of {name}: {type(error).__name__}: {error}")
        finally:
            gate.release()
        if time.monotonic() - begun > AT_ONCE:
            voice.miss("other errors", f"{name} is refused after {time.monotonic() - begun:.1f} s")
        time.sleep(0.02)


def read(folder: Path, seed: int, voice: Voice) -> None:
    """Opens the store and reads all of it, again and again."""
    generator = np.random.default_rng(seed)
    states = States(folder / "log")
    while voice.goes_on():
        first = states.confirmed()
        if first < 0:
            time.sleep(0.01)
            continue
        try:
            store = whence.open(folder / "store", memory_map=bool(generator.integers(2)))
            time.sleep(generator.uniform(0, LONGEST) * generator.integers(2))
            if states.lacks(read_from(store), first):
                voice.miss("torn", "what was read is what no commit since the opening has left")
            voice.count("stores read")
        except Wrong as error:
            voice.miss("torn", error)
        except StoreError as error:
            if "compact" in str(error):
                voice.count("readers told of a compaction")
            else:
                voice.miss("other errors", error)
        except Exception as error:
            voice.miss("other errors", f"{type(error).__name__}: {error}")


class States:
    """What the store has held, as its writer's log has it."""

    def __init__(self, log: Path) -> None:
        self._file = log.open()
        self._states: list[State] = [{}]
        self._confirmed = -1
        self._rest = ""

    def confirmed(self) -> int:
        """The number of the last state that was confirmed; -1 before the first."""
        *lines, self._rest = (self._rest + self._file.read()).split("\n")
        for line in lines:
            operation = json.loads(line)
            if operation is None:
                self._confirmed = len(self._states) - 1
            else:
                self._states.append(after(self._states[-1], operation))
        return self._confirmed

    def lacks(self, state: State, first: int) -> bool:
        """Whether this is no state since the first."""
        self.confirmed()
        found = state not in self._states[first:]
        self._states[:first] = [{}] * first  # which nobody will see any more
        return found


def run(count: int, seed: int) -> trial.Outcome:
    """For so many seconds."""
    outcome = trial.Outcome("sharing", *NEVER)
    context = multiprocessing.get_context("spawn")
    with trial.scratch() as folder:
        (folder / "log").touch()
        gate, holder, ready = context.Lock(), context.Value("i", 0), context.Barrier(2 + READERS)
        works = [(write, (gate,)), (intrude, (gate, holder)), *[(read, ())] * READERS]
        listening, processes = [], []
        for number, (work, given) in enumerate(works):
            ours, theirs = context.Pipe(duplex=False)
            process = context.Process(
                target=work, args=(folder, seed + number, Voice(theirs, ready, count), *given)
            )
            process.start()
            theirs.close()
            listening.append(ours)
            processes.append(process)
        holder.value = processes[0].pid
        while listening:
            for pipe in wait(listening):
                try:
                    what, how = pipe.recv()
                except EOFError:
                    listening.remove(pipe)
                    continue
                if how is None:
                    outcome.count(what)
                else:
                    outcome.miss(what, how)
        for process in processes:
            process.join()
            if process.exitcode:
                outcome.miss("other errors", f"a process died: {process.exitcode}")
    return outcome


if __name__ == "__main__":
    trial.main(run, short=20, full=600)
