"""How well scores find wrong labels."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from whence import _arrays
from whence.errors import ArgumentError, DtypeError


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
    values, mask = _checked(scores, wrong)
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    ranks = (ends - (counts - 1) / 2)[inverse.reshape(-1)]  # average rank, from 1
    positive = int(mask.sum())
    negative = len(mask) - positive
    return float((ranks[mask].sum() - positive * (positive + 1) / 2) / (positive * negative))


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
    first = np.argsort(-values, kind="stable")[:inspected]
    return float(mask[first].sum() / mask.sum())


def _checked(scores: Any, wrong: Any) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    mask = np.asarray(_arrays.to_numpy(wrong))
    if mask.dtype != np.bool_ or mask.ndim != 1:
        raise DtypeError(f"wrong must be [examples] bool, got {_arrays.describe(mask)}")
    values = _arrays.column("scores", scores, len(mask)).astype(np.float64)
    _arrays.finite("scores", values)
    if not 0 < mask.sum() < len(mask):
        raise ArgumentError(
            f"wrong must hold both kinds, got {int(mask.sum())} wrong labels of {len(mask)}"
        )
    return values, mask
