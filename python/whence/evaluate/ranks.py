"""Ranks, correlations, and sums over subsets that no order of adding changes."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from whence import _arrays
from whence._interrupts import interruptible

BLOCK = 1 << 22
"""How many scores are turned into float64 at a time."""


def average_ranks(values: NDArray[Any]) -> NDArray[np.float64]:
    """The rank of each value in its column, from 1; equal values share the mean of their ranks.

    Args:
        values: [rows, ...] finite.

    Returns:
        The same shape. O(values · log rows).
    """
    return interruptible(_average_ranks, values)


def _average_ranks(values: NDArray[Any]) -> NDArray[np.float64]:
    order = np.argsort(values, axis=0, kind="stable")
    ordered = np.take_along_axis(values, order, axis=0)
    rows = np.arange(len(values)).reshape(-1, *[1] * (values.ndim - 1))
    differs = ordered[1:] != ordered[:-1]
    # The first and the last place of each run of equal values.
    first = np.zeros(values.shape, np.int64)
    np.maximum.accumulate(np.where(differs, rows[1:], 0), axis=0, out=first[1:])
    last = np.full(values.shape, len(values) - 1, np.int64)
    last[:-1] = np.minimum.accumulate(np.where(differs, rows[:-1], len(values) - 1)[::-1], axis=0)[
        ::-1
    ]
    ranks = np.empty(values.shape)
    np.put_along_axis(ranks, order, (first + last) / 2 + 1, axis=0)
    return ranks


def spearman(one: NDArray[Any], other: NDArray[Any]) -> NDArray[np.float64]:
    """Spearman's rank correlation of each pair of columns; 0 where one of them is constant.

    Args:
        one: [rows, ...] finite.
        other: The same shape.

    Returns:
        [...] from -1 to 1. O(values · log rows).
    """
    return correlation_of_ranks(average_ranks(one), average_ranks(other))


def correlation_of_ranks(
    one: NDArray[np.float64], other: NDArray[np.float64]
) -> NDArray[np.float64]:
    """`spearman`, of ranks."""
    # Centred ranks are multiples of 1/2, so these sums are exact in any order up to 10^5 rows.
    middle = (len(one) + 1) / 2
    return _cosine(one - middle, other - middle)


def pearson(one: NDArray[Any], other: NDArray[Any]) -> NDArray[np.float64]:
    """Pearson's correlation of each pair of columns; 0 where one of them is constant.

    Args:
        one: [rows, columns] finite.
        other: The same shape.

    Returns:
        [columns] from -1 to 1. O(values).
    """
    return interruptible(_correlation, one, other)


def _correlation(one: NDArray[Any], other: NDArray[Any]) -> NDArray[np.float64]:
    return _cosine(_centred(one), _centred(other))


def _centred(values: NDArray[Any]) -> NDArray[np.float64]:
    """Each column less its mean, in units of its largest value; zeros if it is constant."""
    found = values.astype(np.float64)
    _, exponents = np.frexp(np.abs(found).max(axis=0))
    np.ldexp(found, -exponents, out=found)  # so that no square overflows
    constant = (found == found[0]).all(axis=0)
    found -= found.mean(axis=0)
    found[:, constant] = 0  # the mean of equal values can be off by rounding
    return found


def _cosine(one: NDArray[np.float64], other: NDArray[np.float64]) -> NDArray[np.float64]:
    squares = (one * one).sum(axis=0) * (other * other).sum(axis=0)
    products = (one * other).sum(axis=0)
    found: NDArray[np.float64] = products / np.sqrt(np.where(squares > 0, squares, 1))
    return np.clip(found, -1, 1) + 0.0  # no minus zero


def subset_sums(subsets: list[NDArray[np.int64]], scores: NDArray[Any]) -> NDArray[np.float64]:
    """The sum of the scores of each subset, each column in a unit of its own.

    Scores are cut into two whole numbers so small that no sum of them rounds: the result does not
    depend on the order of examples, nor on how a library for products of matrices splits its work.
    What is cut off is below 2^-(103 - 2 log2(examples)) of the column's largest score.

    Args:
        subsets: The places of the examples of each.
        scores: [examples, queries] finite.

    Returns:
        [subsets, queries]. O(subsets · examples · queries).
    """
    examples, queries = scores.shape
    member = np.zeros((len(subsets), examples), np.bool_)
    for number, places in enumerate(subsets):
        member[number, places] = True
    step = max(1, BLOCK // max(queries, len(subsets)))
    parts = [scores[start : start + step] for start in range(0, examples, step)]
    largest = np.max([np.abs(part.astype(np.float64)).max(axis=0) for part in parts], axis=0)
    _, exponents = np.frexp(largest)
    bits = 53 - (examples - 1).bit_length()  # so that `examples` of them stay below 2^53
    high, low = np.zeros((2, len(subsets), queries))
    for number, part in enumerate(parts):
        scaled = np.ldexp(part.astype(np.float64), bits - exponents)
        whole = np.rint(scaled)
        chosen = member[:, number * step : number * step + len(part)].astype(np.float64)
        high += interruptible(_arrays.matmul, chosen, whole)
        low += interruptible(_arrays.matmul, chosen, np.rint(np.ldexp(scaled - whole, bits)))
    found: NDArray[np.float64] = high + np.ldexp(low, -bits)
    return found
