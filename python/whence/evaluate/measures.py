"""A figure for each query, and two of them compared."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from whence import _arrays
from whence.errors import ArgumentError, DtypeError, ShapeError
from whence.evaluate.checks import numbers
from whence.hashing.families import MAX_SEED

BLOCK = 1 << 22
"""How many drawn values a bootstrap holds at a time."""


@dataclass(frozen=True, eq=False)
class PerQuery:
    """A figure for each query.

    Attributes:
        per_query: [queries] float64.
        measure: What is measured.

    Raises:
        DtypeError: If the figures are not numbers.
        ShapeError: If they are not [queries].
        NotFiniteError: If one is NaN or infinite.
    """

    per_query: NDArray[np.float64]
    measure: str

    def __post_init__(self) -> None:
        found = numbers("per_query", self.per_query, "queries").astype(np.float64)
        object.__setattr__(self, "per_query", found)

    @property
    def mean(self) -> float:
        """The mean over queries."""
        return float(self.per_query.mean())

    @property
    def standard_error(self) -> float:
        """Of the mean: the standard deviation over queries / sqrt(queries).

        It covers the choice of queries and nothing else. NaN for a single query.
        """
        if len(self.per_query) == 1:
            return float("nan")
        return float(self.per_query.std(ddof=1) / np.sqrt(len(self.per_query)))

    def __len__(self) -> int:
        return len(self.per_query)

    def __str__(self) -> str:
        return (
            f"{self.measure} {self.mean:.3f}, standard error {self.standard_error:.3f} "
            f"over {len(self)} queries"
        )


@dataclass(frozen=True)
class Comparison:
    """Two figures on the same queries.

    Attributes:
        measure: What is measured.
        one: Mean of the first.
        other: Mean of the second.
        low: Lower end of the interval of `one - other`.
        high: Its upper end.
        confidence: Of the interval.
        probability: The share of resamples in which `one` is larger; a tie counts half.
        queries: How many queries there are.
        runs: How many runs.
        resamples: How many were drawn.
    """

    measure: str
    one: float
    other: float
    low: float
    high: float
    confidence: float
    probability: float
    queries: int
    runs: int
    resamples: int

    @property
    def difference(self) -> float:
        """`one - other`."""
        return self.one - self.other

    def __str__(self) -> str:
        runs = f" and {self.runs} runs" if self.runs > 1 else ""
        return (
            f"{self.measure} {self.one:.3f} against {self.other:.3f}: "
            f"difference {self.difference:+.3f}, {self.confidence:.0%} interval "
            f"{self.low:+.3f} to {self.high:+.3f}, above zero in {self.probability:.1%} of "
            f"{self.resamples:,} resamples of {self.queries} queries{runs}"
        )


def compare(
    one: PerQuery | Sequence[PerQuery],
    other: PerQuery | Sequence[PerQuery],
    *,
    seed: int = 0,
    resamples: int = 10_000,
    confidence: float = 0.95,
) -> Comparison:
    """Whether one figure is larger than another on the same queries, by a paired bootstrap.

    Queries are drawn with replacement, and the mean difference of those drawn is taken: what is
    hard for both cancels. With several runs (models of several seeds) runs and queries are drawn
    independently of each other, and the difference is the mean over both (Owen, "The pigeonhole
    bootstrap", Annals of Applied Statistics 2007). The interval is that of the percentiles (Efron
    and Tibshirani, "An Introduction to the Bootstrap", 1993, chapter 13). With a handful of runs
    it is somewhat too narrow, by a factor of about sqrt(1 - 1 / runs) in what runs add.

    Args:
        one: What `lds` or another measure returned, or a list of it: one for each run.
        other: The same of the other method; run i of both belongs together.
        seed: Seed of the draws, 0 to 2**64 - 1.
        resamples: How many draws.
        confidence: Of the interval, between 0 and 1.

    Returns:
        Means, interval and probability. O(resamples · runs · queries).

    Raises:
        DtypeError: If an argument is of another type.
        ShapeError: If queries or runs are not as many on both sides.
        ArgumentError: If an argument is out of range, or the measures differ.
    """
    seed = _arrays.integer("seed", seed, 0, MAX_SEED)
    resamples = _arrays.integer("resamples", resamples, 1)
    confidence = fraction("confidence", confidence)
    first, second = _runs("one", one), _runs("other", other)
    measures = {each.measure for each in (*first, *second)}
    if len(measures) > 1:
        raise ArgumentError(f"one and other must be of one measure, got {sorted(measures)}")
    if len(first) != len(second):
        raise ShapeError(
            f"one and other must have as many runs, got {len(first)} and {len(second)}"
        )
    queries = {len(each) for each in (*first, *second)}
    if len(queries) > 1:
        raise ShapeError(f"one and other must be of the same queries, got {sorted(queries)}")
    ones = np.stack([each.per_query for each in first])
    others = np.stack([each.per_query for each in second])
    means = np.concatenate(list(_resampled(ones - others, seed, resamples)))
    low, high, probability = interval(means, confidence)
    return Comparison(
        measure=measures.pop(),
        one=float(ones.mean()),
        other=float(others.mean()),
        low=low,
        high=high,
        confidence=confidence,
        probability=probability,
        queries=ones.shape[1],
        runs=len(ones),
        resamples=resamples,
    )


def interval(draws: NDArray[np.float64], confidence: float) -> tuple[float, float, float]:
    """The percentiles of drawn differences, and the share above zero, with ties half."""
    low, high = np.quantile(draws, [(1 - confidence) / 2, (1 + confidence) / 2])
    above = np.count_nonzero(draws > 0) + np.count_nonzero(draws == 0) / 2
    return float(low), float(high), above / len(draws)


def fraction(name: str, value: Any) -> float:
    """`value` as a number between 0 and 1.

    Raises:
        DtypeError: If it is no number.
        ArgumentError: If it is not between 0 and 1.
    """
    found = _arrays.number(name, value)
    if not 0 < found < 1:
        raise ArgumentError(f"{name} must be between 0 and 1, got {found}")
    return found


def _resampled(
    differences: NDArray[np.float64], seed: int, resamples: int
) -> Iterator[NDArray[np.float64]]:
    """Means of drawn runs and queries of [runs, queries] differences."""
    generator = np.random.default_rng(seed)
    runs, queries = differences.shape
    step = max(1, BLOCK // differences.size)
    for start in range(0, resamples, step):
        count = min(step, resamples - start)
        rows = np.broadcast_to(differences, (count, queries)) if runs == 1 else None
        if rows is None:
            drawn = generator.integers(0, runs, (count, runs))
            rows = differences[drawn].mean(axis=1)
        columns = generator.integers(0, queries, (count, queries))
        yield np.take_along_axis(rows, columns, axis=1).mean(axis=1)


def _runs(name: str, value: Any) -> list[PerQuery]:
    found = [value] if isinstance(value, PerQuery) else value
    if not isinstance(found, Sequence) or not all(isinstance(each, PerQuery) for each in found):
        raise DtypeError(
            f"{name} must be what lds or another measure returned, or a list of it, got "
            f"{_arrays.describe(value)}"
        )
    if not found:
        raise ShapeError(f"{name} must have a run, got none")
    return list(found)
