"""Scores against models that were trained on other subsets."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np

from whence import _arrays
from whence.errors import ShapeError
from whence.evaluate.checks import numbers, subsets_of
from whence.evaluate.measures import PerQuery
from whence.evaluate.ranks import (
    average_ranks,
    correlation_of_ranks,
    pearson,
    spearman,
    subset_sums,
)

TARGETS = {"loss": -1.0, "margin": 1.0}
"""What outputs may be, and the sign by which larger is better."""


@dataclass(frozen=True, eq=False)
class LDS(PerQuery):
    """Linear datamodeling scores.

    Attributes:
        per_query: [queries] float64, the rank correlation of each, from -1 to 1.
        measure: "LDS".
    """

    measure: str = "LDS"


@dataclass(frozen=True)
class NoiseCeiling:
    """The LDS that no scores can be expected to exceed, since outputs depend on seeds.

    Attributes:
        agreement: Mean Spearman correlation of the outputs of two seeds.
        seeds: How many seeds there are.
    """

    agreement: float
    seeds: int

    @property
    def reliability(self) -> float:
        """Of the mean over all seeds: `seeds r / (1 + (seeds - 1) r)`; 0 if `r` is not positive."""
        return self._reliability(self.seeds)

    @property
    def ceiling(self) -> float:
        """The root of the reliability."""
        return float(np.sqrt(self.reliability))

    def with_seeds(self, seeds: int) -> float:
        """The ceiling that outputs of so many seeds would have.

        Raises:
            ArgumentError: If `seeds` is below 1.
        """
        return float(np.sqrt(self._reliability(_arrays.integer("seeds", seeds, 1))))

    def _reliability(self, seeds: int) -> float:
        positive = max(self.agreement, 0.0)
        return seeds * positive / (1 + (seeds - 1) * positive)

    def __str__(self) -> str:
        return (
            f"noise ceiling {self.ceiling:.3f} with {self.seeds} seeds, {self.with_seeds(1):.3f} "
            f"with one (two seeds agree to {self.agreement:.3f})"
        )


def lds(scores: Any, masks: Any, outputs: Any, *, target: str = "loss") -> LDS:
    """The linear datamodeling score: how well sums of scores rank retrained models.

    For each query t, with the sum of the scores of the examples in subset j as its prediction,

        LDS[t] = Spearman over j of (Σ_{i in A_j} scores[i, t], mean over seeds of f[j, t])

    where f is minus the loss, or the margin (Park et al., "TRAK: Attributing Model Behavior at
    Scale", ICML 2023, section 2). Equal values share the mean of their ranks; where one side
    is constant the correlation is 0. Sums are exact: the result does not depend on the order of
    examples or the number of threads.

    Args:
        scores: [examples, queries], positive = helpful.
        masks: [subsets, size] integers, the places of the examples that each model was trained
            on, distinct in a subset; [subsets, examples] bool; or a list of arrays of places.
        outputs: [subsets, seeds, queries], or [subsets, queries] for one seed: what the models
            trained on the subsets gave.
        target: What outputs are: "loss", of which less is better, or "margin", of which more is:
            any output that training on a helpful example raises.

    Returns:
        One LDS for each query. O(subsets · examples · queries) time, and beside the scores
        subsets · examples bytes.

    Raises:
        DtypeError: If an array is of another type.
        ShapeError: If subsets or queries are not as many everywhere, or there is one subset.
        ArgumentError: If a place is not that of an example, or twice in a subset, or `target` is
            another word.
        NotFiniteError: If scores or outputs hold a NaN or an infinity.
    """
    sign = TARGETS[_arrays.choice("target", target, TARGETS)]
    values = numbers("scores", scores, "examples", "queries")
    subsets = subsets_of("masks", masks, len(values))
    if len(subsets) < 2:
        raise ShapeError(f"masks must be at least two subsets, got {len(subsets)}")
    found = _arrays.array("outputs", outputs)
    axes = ("subsets", "queries") if found.ndim == 2 else ("subsets", "seeds", "queries")
    found = numbers("outputs", found, *axes)
    if (len(found), found.shape[-1]) != (len(subsets), values.shape[1]):
        raise ShapeError(
            f"outputs must be of {len(subsets)} subsets and {values.shape[1]} queries, got "
            f"{list(found.shape)}"
        )
    found = found.astype(np.float64)
    means = found if found.ndim == 2 else found.mean(axis=1)
    return LDS(spearman(subset_sums(subsets, values), sign * means))


def noise_ceiling(outputs: Any) -> NoiseCeiling:
    """The LDS that perfect scores would be expected to reach, given that outputs depend on seeds.

        r = mean over queries and pairs of seeds of Spearman over subsets of their outputs
        reliability = seeds r / (1 + (seeds - 1) r)        ceiling = sqrt(reliability)

    The reliability is that of a mean of measurements (Spearman-Brown); scores that rank the
    expected output perfectly correlate with the measured mean by its root.

    Args:
        outputs: [subsets, seeds, queries], losses or margins, of at least two seeds.

    Returns:
        The ceiling. O(subsets · seeds² · queries).

    Raises:
        DtypeError: If outputs are not numbers.
        ShapeError: If they are not [subsets, seeds, queries], or of one subset or seed.
        NotFiniteError: If they hold a NaN or an infinity.
    """
    found = numbers("outputs", outputs, "subsets", "seeds", "queries")
    if min(found.shape[:2]) < 2:
        raise ShapeError(
            f"outputs must be of at least two subsets and two seeds, got {list(found.shape)}"
        )
    seeds = found.shape[1]
    ranks = average_ranks(found)
    agreements = [
        correlation_of_ranks(ranks[:, one], ranks[:, other]).mean()
        for one, other in combinations(range(seeds), 2)
    ]
    return NoiseCeiling(float(np.mean(agreements)), seeds)


def leave_one_out(scores: Any, changes: Any) -> PerQuery:
    """How well scores predict what leaving out one example does.

    For each query Pearson's correlation over examples of score and change; 0 where one of them is
    constant.

    Args:
        scores: [examples, queries], positive = helpful.
        changes: [examples, queries] the query's loss without the example minus the loss with it.

    Returns:
        One correlation for each query. O(examples · queries).

    Raises:
        DtypeError: If an array does not hold numbers.
        ShapeError: If the two differ in shape, or there is one example.
        NotFiniteError: If an array holds a NaN or an infinity.
    """
    one = numbers("scores", scores, "examples", "queries")
    other = numbers("changes", changes, "examples", "queries")
    if one.shape != other.shape or len(one) < 2:
        raise ShapeError(
            "changes must be of the examples and queries of scores, at least two examples, got "
            f"{list(one.shape)} and {list(other.shape)}"
        )
    return PerQuery(pearson(one, other), "leave-one-out correlation")
