"""How well scores find wrong labels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from whence import _arrays
from whence.errors import ArgumentError, DtypeError
from whence.evaluate.checks import table
from whence.evaluate.measures import fraction, interval
from whence.evaluate.ranks import average_ranks
from whence.hashing.families import MAX_SEED

BLOCK = 1 << 22
"""How many drawn examples a bootstrap holds at a time."""


@dataclass(frozen=True)
class Mislabel:
    """How well scores find wrong labels, beside the loss.

    Attributes:
        auc: Area under the ROC curve of the scores.
        baseline: The same of the losses.
        low: Lower end of the interval of `auc - baseline`.
        high: Its upper end.
        confidence: Of the interval.
        probability: The share of resamples in which the scores' area is larger; a tie counts half.
        found: The share of wrong labels among the `inspected` highest scores.
        baseline_found: The same of the losses.
        inspected: How many examples a person looks at.
        wrong: How many labels are wrong.
        examples: How many labels there are.
        resamples: How many were drawn.
    """

    auc: float
    baseline: float
    low: float
    high: float
    confidence: float
    probability: float
    found: float
    baseline_found: float
    inspected: int
    wrong: int
    examples: int
    resamples: int

    def __str__(self) -> str:
        rows = [
            ["", "AUC", f"found in the first {self.inspected:,}"],
            ["scores", f"{self.auc:.3f}", f"{self.found:.1%}"],
            ["loss (baseline)", f"{self.baseline:.3f}", f"{self.baseline_found:.1%}"],
        ]
        return (
            f"{self.wrong:,} wrong labels of {self.examples:,}\n{table(rows)}\n"
            f"difference of AUC {self.auc - self.baseline:+.3f}, {self.confidence:.0%} interval "
            f"{self.low:+.3f} to {self.high:+.3f}, above zero in {self.probability:.1%} of "
            f"{self.resamples:,} resamples"
        )


def mislabel(
    scores: Any,
    wrong: Any,
    losses: Any,
    *,
    inspected: int | None = None,
    seed: int = 0,
    resamples: int = 2000,
    confidence: float = 0.95,
) -> Mislabel:
    """How well scores find wrong labels, beside the examples' own losses.

    The loss alone finds most wrong labels; what scores add to it is the difference. Its interval
    is that of a paired bootstrap: wrong and right labels are drawn with replacement, each as many
    as there are, and both areas are taken of those drawn.

    Args:
        scores: As in `mislabel_auc`, such as `Store.self_influence`.
        wrong: As in `mislabel_auc`.
        losses: [examples] the loss of each under the label it has.
        inspected: How many examples a person looks at; None means a tenth.
        seed: Seed of the draws, 0 to 2**64 - 1.
        resamples: How many draws.
        confidence: Of the interval, between 0 and 1.

    Returns:
        Both areas and their difference. O(resamples · examples + examples log examples).

    Raises:
        WhenceError: As `mislabel_auc`; ArgumentError if another argument is out of range.
    """
    values, mask = _checked(scores, wrong)
    baseline, _ = _checked(losses, wrong, "losses")
    if inspected is None:
        inspected = max(1, round(len(values) / 10))
    inspected = _arrays.integer("inspected", inspected, 1, len(values))
    seed = _arrays.integer("seed", seed, 0, MAX_SEED)
    resamples = _arrays.integer("resamples", resamples, 1)
    confidence = fraction("confidence", confidence)
    drawn = _resampled([values, baseline], mask, seed, resamples)
    low, high, probability = interval(drawn[0] - drawn[1], confidence)
    return Mislabel(
        auc=_auc(values, mask),
        baseline=_auc(baseline, mask),
        low=low,
        high=high,
        confidence=confidence,
        probability=probability,
        found=_found(values, mask, inspected),
        baseline_found=_found(baseline, mask, inspected),
        inspected=inspected,
        wrong=int(mask.sum()),
        examples=len(mask),
        resamples=resamples,
    )


def mislabel_auc(scores: Any, wrong: Any) -> float:
    """The area under the ROC curve of `scores` as a detector of wrong labels.

    The probability that a wrongly labelled example has a higher score than a rightly labelled
    one, ties counted half (the Mann-Whitney statistic): 1 is perfect, 0.5 is chance.

    Args:
        scores: [examples] finite numbers, high where a label looks wrong: self-influence, or
            the example's own loss as the baseline to print beside it.
        wrong: [examples] bool, which labels are wrong.

    Returns:
        From 0 to 1. O(n log n).

    Raises:
        ShapeError: If the two differ in length.
        DtypeError: If `wrong` is not bool.
        NotFiniteError: If a score is NaN or infinite.
        ArgumentError: If all labels are wrong, or none is.
    """
    return _auc(*_checked(scores, wrong))


def share_found(scores: Any, wrong: Any, inspected: int) -> float:
    """The share of wrong labels among the `inspected` highest scores.

    Args:
        scores: As in `mislabel_auc`.
        wrong: As in `mislabel_auc`.
        inspected: How many examples a person looks at; of equal scores the earlier first.

    Returns:
        Wrong labels found, divided by all wrong labels.

    Raises:
        WhenceError: As `mislabel_auc`.
    """
    values, mask = _checked(scores, wrong)
    inspected = _arrays.integer("inspected", inspected, 1, len(values))
    return _found(values, mask, inspected)


def _auc(values: NDArray[np.float64], mask: NDArray[np.bool_]) -> float:
    positive = int(mask.sum())
    above = average_ranks(values)[mask].sum() - positive * (positive + 1) / 2
    return float(above / (positive * (len(mask) - positive)))


def _found(values: NDArray[np.float64], mask: NDArray[np.bool_], inspected: int) -> float:
    first = np.argsort(-values, kind="stable")[:inspected]
    return float(mask[first].sum() / mask.sum())


def _resampled(
    rankings: list[NDArray[np.float64]], mask: NDArray[np.bool_], seed: int, resamples: int
) -> NDArray[np.float64]:
    """[rankings, resamples] areas of drawn wrong and right labels, the same for all rankings."""
    generator = np.random.default_rng(seed)
    sides = []
    for values in rankings:
        right = values[~mask]
        order = np.argsort(right, kind="stable")
        # How many right labels lie below each wrong one, and how many not above it.
        below = np.searchsorted(right[order], values[mask], "left")
        most = np.searchsorted(right[order], values[mask], "right")
        sides.append((order, below, most))
    positive = int(mask.sum())
    negative = len(mask) - positive
    found = np.empty((len(rankings), resamples))
    step = max(1, BLOCK // len(mask))
    for start in range(0, resamples, step):
        count = min(step, resamples - start)
        drawn_wrong = _times_drawn(generator, count, positive)
        drawn_right = _times_drawn(generator, count, negative)
        for number, (order, below, most) in enumerate(sides):
            sums = np.zeros((count, negative + 1), np.int64)
            np.cumsum(drawn_right[:, order], axis=1, out=sums[:, 1:])
            twice = (drawn_wrong * (sums[:, below] + sums[:, most])).sum(axis=1)
            found[number, start : start + count] = twice / (2 * positive * negative)
    return found


def _times_drawn(generator: np.random.Generator, draws: int, count: int) -> NDArray[np.int64]:
    """[draws, count] how often each of `count` things is drawn, `count` times with replacement."""
    drawn = generator.integers(0, count, (draws, count)) + count * np.arange(draws)[:, None]
    return np.bincount(drawn.reshape(-1), minlength=draws * count).reshape(draws, count)


def _checked(
    scores: Any, wrong: Any, name: str = "scores"
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    mask = np.asarray(_arrays.to_numpy(wrong))
    if mask.dtype != np.bool_ or mask.ndim != 1:
        raise DtypeError(f"wrong must be [examples] bool, got {_arrays.describe(mask)}")
    values = _arrays.column(name, scores, len(mask)).astype(np.float64)
    _arrays.finite(name, values)
    if not 0 < mask.sum() < len(mask):
        raise ArgumentError(
            f"wrong must hold both kinds, got {int(mask.sum())} wrong labels of {len(mask)}"
        )
    return values, mask
