"""Writers killed at random moments: what was confirmed is there, whole, and the next goes on."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from subprocess import PIPE

import numpy as np
import trial
from history import Life, Log, Wrong, check_compacted

from whence.errors import WhenceError

WINDOW = 0.8
"""Seconds within which a writer is killed."""

LIVES = 10
"""Kills that one store goes through."""

SCRIPT = Path(__file__).with_name("history.py")


def run(count: int, seed: int) -> trial.Outcome:
    """As many kills."""
    outcome = trial.Outcome("kills", "lost or half", "not opened or gone on with")
    generator = np.random.default_rng(seed)
    with tempfile.TemporaryDirectory() as scratch:
        for first in range(0, count, LIVES):
            folder = Path(scratch) / f"{first}{'-text' if first // LIVES % 2 else ''}"
            folder.mkdir()
            through(folder, min(LIVES, count - first), generator, outcome, kill)
    return outcome


def through(
    folder: Path,
    count: int,
    generator: np.random.Generator,
    outcome: trial.Outcome,
    strike: Callable[[subprocess.Popen[str]], None],
    *,
    window: float = WINDOW,
) -> None:
    """Strikes one store's writers as often, and looks at it after each."""
    log = Log()
    for number in range(count):
        try:
            lived(folder, log, int(generator.integers(2**31)), generator.uniform(0, window), strike)
            outcome.count(f"during {log.under_way}")
            log.go_on(log.check(folder))
        except (Wrong, WhenceError) as error:
            outcome.miss("lost or half", f"{folder.name}, strike {number}: {error}")
            return
    try:
        goes_on(folder, log, generator)
        check_compacted(folder, log)
        log.check(folder)
    except (Wrong, WhenceError) as error:
        outcome.miss("not opened or gone on with", f"{folder.name}: {error}")


def lived(
    folder: Path,
    log: Log,
    seed: int,
    seconds: float,
    strike: Callable[[subprocess.Popen[str]], None],
) -> None:
    """Lets a writer live for so long, and strikes; the log knows what it said.

    Raises:
        Wrong: If it failed by itself.
    """
    ready, failed = threading.Event(), []

    def listen() -> None:
        for line in child.stdout:
            said = json.loads(line)
            if said == ["ready"]:
                ready.set()
            elif said == ["confirmed"]:
                log.confirm()
            elif said[0] == "failed":
                failed.append(said)
            else:
                log.begin(said)
        ready.set()

    words = [sys.executable, SCRIPT, folder, str(seed)]
    with subprocess.Popen(words, stdin=PIPE, stdout=PIPE, stderr=PIPE, text=True) as child:
        json.dump(list(log.state.items()), child.stdin)
        child.stdin.close()
        listener = threading.Thread(target=listen)
        listener.start()
        ready.wait()
        time.sleep(seconds)
        alive = child.poll() is None and not failed
        strike(child)
        child.wait()
        listener.join()
        text = child.stderr.read()
    if not alive:
        raise Wrong(f"its writer ended by itself: {failed or text}")


def kill(child: subprocess.Popen[str]) -> None:
    child.send_signal(signal.SIGKILL)


def goes_on(folder: Path, log: Log, generator: np.random.Generator) -> None:
    """Lets a writer of this process do some more, and close in order."""
    life = Life(folder, int(generator.integers(2**31)), log.state, log.begin, log.confirm)
    life.prepare()
    for _ in range(6):
        life.step()
    life.close()


if __name__ == "__main__":
    trial.main(run, short=20, full=200)
