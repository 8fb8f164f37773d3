"""What every trial has in common: its flags, what it counts, its last line and exit status."""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))  # for filled.py


class Outcome:
    """What happened in a trial, and what must not have.

    Args:
        name: Of the trial.
        never: What must not happen, in words.
    """

    def __init__(self, name: str, *never: str) -> None:
        self.name = name
        self.counts: Counter[str] = Counter()
        self.missed = dict.fromkeys(never, 0)
        self._begun = self._told = time.monotonic()

    def count(self, what: str) -> None:
        self.counts[what] += 1
        if time.monotonic() - self._told > 20:
            self._told = time.monotonic()
            say(self)

    def miss(self, what: str, how: str) -> None:
        """Counts something that must not happen, and says at once what it was."""
        self.missed[what] += 1
        if self.missed[what] <= 20:
            say(f"{self.name}: {what}: {how}")

    @property
    def reached(self) -> bool:
        """Whether something was tried, and nothing happened that must not."""
        return bool(self.counts) and not any(self.missed.values())

    def __str__(self) -> str:
        counts, missed = (
            ", ".join(f"{number:,} {what}" for what, number in each.items())
            for each in (self.counts, self.missed)
        )
        return f"{self.name}: {counts}; {missed}; {time.monotonic() - self._begun:.0f} s"


@contextmanager
def scratch() -> Iterator[Path]:
    """A folder for a while, in memory where there is such a place: its syncs take no time."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(
        prefix="whence-trial-", dir=memory if memory.is_dir() else None
    ) as made:
        yield Path(made)


def say(what: object) -> None:
    """Prints it at once."""
    print(what, flush=True)  # noqa: T201


def main(run: Callable[[int, int], Outcome], *, short: int, full: int) -> None:
    """Runs a trial as its flags say, and exits with 1 if its figure is missed.

    Args:
        run: How much to try, and the seed -> what happened.
        short: How much to try without flags.
        full: How much with --full.
    """
    parser = argparse.ArgumentParser(description=sys.modules["__main__"].__doc__)
    parser.add_argument("--full", action="store_true", help=f"try {full}, not {short}")
    parser.add_argument("--count", type=int, help="try so many")
    parser.add_argument("--seed", type=int, default=0, help="of everything random (%(default)s)")
    asked = parser.parse_args()
    outcome = run(asked.count or (full if asked.full else short), asked.seed)
    say(f"{outcome} - {'reached' if outcome.reached else 'MISSED'}")
    sys.exit(not outcome.reached)
