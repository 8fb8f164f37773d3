"""Ctrl-C in every long call: the KeyboardInterrupt comes at once, and the library works on.

Each call of `long_calls.py` runs in a process of its own, with so much work that it takes seconds:

- once to its end, while a timer asks for Python's attention every few milliseconds: the longest
  that it was kept waiting is the longest that Ctrl-C can wait, at whatever moment it comes;
- then SIGINT comes at random moments, and what is timed is from there to the exception that leaves
  the call. A search must then give the right answer, and the call can be made again.

    python tests/reliability/interrupts.py [--full] [--seed N] [--count N] [--only NAME ...]
"""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from types import FrameType
from typing import Any

import trial

LIMIT = 0.2
"""Seconds from Ctrl-C to the exception."""

LONG = 1.0
"""Seconds that a call takes at least; its work is doubled until it does."""

MOST = 8
"""How much its work is multiplied at most: a sketch of gradients of gigabytes is done sooner."""

BEAT = 0.005
"""Seconds between two calls for attention."""

LATE, DEAF, BROKEN = "late", "went on", "broken after"


class Outcome(trial.Outcome):
    """What came of it, with the times of all waits."""

    def __init__(self) -> None:
        super().__init__("interrupts", LATE, DEAF, BROKEN)
        self.waits: list[float] = []
        self.silences: list[float] = []

    def __str__(self) -> str:
        waits = sorted(self.waits) or [0.0]
        return (
            f"{super().__str__()}; from Ctrl-C to the exception {waits[len(waits) // 2]:.3f} s in "
            f"the median, {waits[-1]:.3f} s at most; longest silence "
            f"{max(self.silences, default=0):.3f} s; {LIMIT} s are allowed"
        )


# The process whose calls are interrupted


def serve(name: str, folder: str, scale: str) -> None:
    """Does what the lines of standard input say, and answers each with lines of JSON."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    import numpy as np
    from long_calls import CALLS

    import whence

    call = CALLS[name](Path(folder), int(scale))
    rows = np.random.default_rng(0).integers(-9, 10, (500, 16)).astype(np.float32)
    expected = np.argsort(-(rows[:20] @ rows.T), axis=1, kind="stable")[:, :10]

    def check() -> None:
        """A search gives what numpy does; no sum of whole numbers is rounded."""
        hits = whence.Index(rows, "certified").search(rows[:20], k=10)
        answer("right" if np.array_equal(hits.helpful.positions, expected) else "wrong")

    check()
    for line in sys.stdin:
        {"measure": measured, "call": interrupted}[line.strip()](call)
        check()


def answer(what: str, **more: Any) -> None:
    trial.say(json.dumps({"what": what, **more}))


def measured(call: Callable[[], Any]) -> None:
    """Times a call, and the longest time that it let no signal through."""
    silence, busy, place = 0.0, 0.0, ""
    last, worked = time.monotonic(), time.thread_time()

    def look(_: int, frame: FrameType | None) -> None:
        nonlocal silence, busy, place, last, worked
        now, work = time.monotonic(), time.thread_time()
        if now - last > silence:
            silence, busy, place = now - last, work - worked, place_of(frame)
        last, worked = time.monotonic(), work

    begun = time.monotonic()
    signal.signal(signal.SIGALRM, look)
    signal.setitimer(signal.ITIMER_REAL, BEAT, BEAT)
    call()
    signal.setitimer(signal.ITIMER_REAL, 0)
    seconds = time.monotonic() - begun
    answer("measured", seconds=seconds, silence=silence, busy=busy, place=place)


def place_of(frame: FrameType | None) -> str:
    """Where a signal was answered at last: the library's line, and those that it calls."""
    found: list[str] = []
    for at, line in traceback.walk_stack(frame):
        found.append(f"{Path(at.f_code.co_filename).name}:{line}")
        if "whence" in Path(at.f_code.co_filename).parent.parts:
            break
    return " < ".join(found[:4])


def interrupted(call: Callable[[], Any]) -> None:
    """Says when a call begins, and when and how it was left."""
    how = "ended"
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        answer("begun")
        call()
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    except KeyboardInterrupt:
        how = "stopped"
    except BaseException:
        how = traceback.format_exc()
    now = time.monotonic()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    answer(how, at=now)


# The process that interrupts


class Broken(Exception):
    """The library does not work on."""


class Deaf(Exception):
    """The call went on to its end."""


class Child:
    """A process that makes one call whenever it is asked to."""

    def __init__(self, name: str, folder: Path, scale: int) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__, "--serve", name, str(folder), str(scale)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __enter__(self) -> Child:
        self._read("right")
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()

    def _read(self, *expected: str) -> dict[str, Any]:
        line = self._process.stdout.readline()
        if not line:
            raise Broken(f"the process ended with {self._process.wait()}")
        found = json.loads(line)
        if found["what"] not in expected:
            raise Broken(found["what"])
        return found

    def _ask(self, what: str) -> None:
        self._process.stdin.write(f"{what}\n")
        self._process.stdin.flush()

    def measure(self) -> dict[str, Any]:
        """How long a call takes, and is silent."""
        self._ask("measure")
        found = self._read("measured")
        self._read("right")
        return found

    def interrupt(self, after: float) -> float | None:
        """Seconds from Ctrl-C, `after` seconds into a call, to the exception.

        None if the call had ended before.

        Raises:
            Deaf: If it went on to its end.
            Broken: If another exception came, or a search is not right afterwards.
        """
        self._ask("call")
        self._read("begun")
        time.sleep(after)
        sent = time.monotonic()
        self._process.send_signal(signal.SIGINT)
        found = self._read("stopped", "ended")
        self._read("right")
        if found["what"] == "stopped":
            return found["at"] - sent
        if found["at"] > sent + LIMIT:
            raise Deaf(f"for {found['at'] - sent:.1f} s")
        return None


def attempt(name: str, moments: int, generator: random.Random, outcome: Outcome) -> None:
    """Interrupts one call at as many moments."""
    scale = 1
    while True:
        with trial.scratch() as folder, Child(name, folder, scale) as child:
            found = child.measure()
            if found["seconds"] < LONG and scale < MOST:
                scale *= 2
                continue
            outcome.silences.append(found["silence"])
            if found["silence"] > LIMIT:
                how = f"{found['busy']:.3f} s of it computing, at {found['place']}"
                outcome.miss(LATE, f"{name}: silent for {found['silence']:.3f} s, {how}")
            waits: list[float] = []
            while len(waits) < moments:
                wait = child.interrupt(generator.uniform(0, 0.9 * found["seconds"]))
                if wait is not None:
                    waits.append(wait)
                    outcome.count("interrupts")
                    if wait > LIMIT:
                        outcome.miss(LATE, f"{name}: after {wait:.3f} s")
            outcome.waits += waits
            trial.say(
                f"{name:28} {found['seconds']:5.1f} s, silent for {found['silence']:.3f} s; "
                f"interrupts {sorted(waits)[len(waits) // 2]:.3f} to {max(waits):.3f} s"
            )
            return


def run(count: int, seed: int, names: Iterable[str] | None = None) -> Outcome:
    """As many interrupts of each call."""
    from long_calls import CALLS

    outcome, generator = Outcome(), random.Random(seed)
    for name in names or CALLS:
        try:
            attempt(name, count, generator, outcome)
            outcome.count("calls")
        except Deaf as error:
            outcome.miss(DEAF, f"{name}: {error}")
        except Broken as error:
            outcome.miss(BROKEN, f"{name}: {error}")
    return outcome


if __name__ == "__main__":
    if sys.argv[1:2] == ["--serve"]:
        serve(*sys.argv[2:])
    else:
        at = sys.argv.index("--only") if "--only" in sys.argv else len(sys.argv)
        names = sys.argv[at + 1 :]
        del sys.argv[at:]
        trial.main(lambda count, seed: run(count, seed, names), short=1, full=10)
