"""Rows of a comparison, and how those who are compared take turns."""

from __future__ import annotations

import importlib
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

SECONDS = 12.0
"""Time given to each comparison, for all who take part together."""

ROUNDS = (5, 60)
"""Fewest and most rounds of a comparison."""


@dataclass(frozen=True)
class Times:
    """Measured times of one who takes part, in milliseconds."""

    values: list[float]

    @property
    def median(self) -> float:
        """The median."""
        return float(np.median(self.values))

    def __str__(self) -> str:
        return f"{min(self.values):.4g} to {max(self.values):.4g}"


@dataclass(frozen=True)
class Row:
    """One comparison.

    Attributes:
        name: What was compared.
        ours: Our figure.
        peer: The peer's; None if there is none to compare with.
        unit: Of both.
        goal: What the ratio is to be; None if nothing was promised.
        lower_is_better: Whether the ratio is to be at most the goal, or at least.
        spread: The least and the most measured, for the reader.
        measure: What the goal is about: "ratio", "ours", or "difference", ours − peer.
    """

    name: str
    ours: float
    peer: float | None
    unit: str
    goal: float | None = None
    lower_is_better: bool = True
    spread: str = ""
    measure: str = "ratio"

    @property
    def ratio(self) -> float | None:
        """Ours ÷ peer."""
        return None if self.peer is None else self.ours / self.peer

    @property
    def met(self) -> bool | None:
        """Whether the goal is met; None if there is none."""
        value = self.measured
        if self.goal is None or value is None:
            return None
        return value <= self.goal if self.lower_is_better else value >= self.goal

    @property
    def measured(self) -> float | None:
        """What the goal is about."""
        if self.measure == "ours":
            return self.ours
        if self.measure == "difference":
            return None if self.peer is None else self.ours - self.peer
        return self.ratio

    def as_json(self) -> dict[str, Any]:
        """The row as it is written."""
        return {
            "name": self.name,
            "ours": self.ours,
            "peer": self.peer,
            "unit": self.unit,
            "ratio": self.ratio,
            "goal": self.goal,
            "measure": self.measure,
            "met": self.met,
            "spread": self.spread,
        }


@dataclass(frozen=True)
class Curve:
    """A line of a picture.

    Attributes:
        picture: Which picture it belongs to.
        name: What it shows.
        points: x and y of each, from left to right.
    """

    picture: str
    name: str
    points: list[tuple[float, float]]

    def as_json(self) -> dict[str, Any]:
        """The line as it is written."""
        return {"picture": self.picture, "name": self.name, "points": self.points}


Bench = Callable[[Path], Iterator[Row | Curve]]
"""An empty folder -> rows, and lines of pictures."""

BENCHES: dict[str, Bench] = {}
"""Every comparison by its name on the command line."""


def bench(function: Bench) -> Bench:
    """Registers a comparison under the name of its function."""
    BENCHES[function.__name__] = function
    return function


def peer(module: str) -> Any:
    """A peer that may not be installed; None, said by name and with the reason, if it is not."""
    try:
        return importlib.import_module(module)
    except Exception as error:  # one that is installed may fail in any way
        print(f"skipped: {module} cannot be imported: {error}", file=sys.stderr)
        return None


def flat_index(faiss: Any, rows: NDArray[np.float32]) -> Any:
    """The `IndexFlatIP` of faiss with these rows, which may lie in a file."""
    index = faiss.IndexFlatIP(rows.shape[1])
    for part in np.array_split(rows, max(1, len(rows) // 50_000)):
        index.add(np.ascontiguousarray(part))
    return index


def recall_of(found: Sequence[Any] | NDArray[Any], wanted: NDArray[np.int64]) -> float:
    """The mean share of the wanted rows that were found."""
    shares = [np.isin(want, each).mean() for want, each in zip(wanted, found, strict=True)]
    return float(np.mean(shares))


def take_turns(
    actions: dict[str, Callable[[], object]],
    seconds: float = SECONDS,
    rounds: tuple[int, int] = ROUNDS,
) -> dict[str, Times]:
    """Times of each action, which take turns; each should have run once before."""
    found: dict[str, list[float]] = {name: [] for name in actions}
    begin = time.perf_counter()
    fewest, most = rounds
    for done in range(most):
        if done >= fewest and time.perf_counter() - begin > seconds:
            break
        for name, action in actions.items():
            start = time.perf_counter()
            action()
            found[name].append(1e3 * (time.perf_counter() - start))
    return {name: Times(values) for name, values in found.items()}


def compared(name: str, ours: Times, theirs: Times, goal: float | None = None) -> Row:
    """A row of two measured times."""
    spread = f"ours {ours}, peer {theirs}, {len(ours.values)} rounds"
    return Row(name, ours.median, theirs.median, "ms", goal, spread=spread)


def compared_rates(
    name: str,
    ours: Times,
    theirs: Times,
    goal: float | None = None,
    *,
    unit: str,
    amounts: tuple[float, float],
    note: str = "",
) -> Row:
    """A row of two rates, of which more is better.

    Args:
        name: What was compared.
        ours: Our times.
        theirs: The peer's times.
        goal: What the ratio is to be at least.
        unit: Of the rates.
        amounts: How much of what the unit counts we do in one of our times, and the peer in one
            of its.
        note: What else the reader should know.
    """
    mine, other = (
        1e3 * amount / each.median for amount, each in zip(amounts, (ours, theirs), strict=True)
    )
    spread = f"ours {ours} ms, peer {theirs} ms, {len(ours.values)} rounds"
    spread = f"{spread}; {note}" if note else spread
    return Row(name, mine, other, unit, goal, lower_is_better=False, spread=spread)


def fastest(all_times: Iterable[Times]) -> Times:
    """In each round, the time of whoever was fastest in it."""
    return Times([min(each) for each in zip(*(times.values for times in all_times), strict=True)])
