"""The directions that codes begin with: those that hold most of the rows' energy."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from whence import _arrays
from whence._interrupts import interruptible
from whence.search.source import Source

PREFIX = 64
"""Coordinates that are looked at first."""

STEEP = 0.8
"""From this share of energy on, leading directions are worth a look of their own."""

FALLING = 0.2
"""The same of the leading coordinates of rows that come in a basis already."""

SAMPLE = 4096
"""Rows that the spectrum is taken of."""


@dataclass(frozen=True, eq=False)
class Basis:
    """What comes first in codes.

    Attributes:
        prefix: Lengths of the segments before the rest.
        directions: [directions, length] float64 reflections that bring them to the front.
        share: The share of energy that the leading directions, or coordinates, hold.
        why: In words.
    """

    prefix: list[int]
    directions: NDArray[np.float64]
    share: float
    why: str


def choose(source: Source, wanted: str, seed: int) -> Basis:
    """The basis for the rows of a source.

    Args:
        source: The rows.
        wanted: "auto", "eigen" for the leading eigenvectors of the rows' Gram matrix, "rows" for
            their own leading coordinates, "none".
        seed: Of the sample.

    O(sample · length²), and O(length³) for the eigenvectors; in float64 by LAPACK.
    """
    length = len(source.checkpoints) * source.dim
    nothing = np.zeros((0, length))
    if wanted == "none" or length <= PREFIX or len(source.ids) <= PREFIX:
        return Basis([], nothing, 1.0, "no prefix: none was asked for, or rows are too short")
    rows = sample(source, seed)
    total = float((rows**2).sum()) or 1.0
    leading = float((rows[:, :PREFIX] ** 2).sum()) / total
    falling = leading >= max(FALLING, 2 * PREFIX / length)
    if wanted == "rows" or (wanted == "auto" and falling):
        prefix = [PREFIX, PREFIX] if length >= 4 * PREFIX else [PREFIX]
        why = f"the first {PREFIX} coordinates hold {leading:.0%} of the energy as the rows come"
        return Basis(prefix, nothing, leading, why)
    values, vectors = interruptible(_spectrum if length <= SAMPLE else _wide, rows)
    share = float(values[-PREFIX:].sum()) / total
    if wanted == "auto" and share < STEEP:
        why = f"no prefix: the leading {PREFIX} directions hold {share:.0%} of the energy"
        return Basis([], nothing, share, why)
    why = f"the leading {PREFIX} directions hold {share:.0%} of the energy"
    directions = interruptible(reflections, vectors[:, : -PREFIX - 1 : -1])
    return Basis([PREFIX], directions, share, why)


def sample(source: Source, seed: int) -> NDArray[np.float64]:
    """[examples, checkpoints · dim] some rows side by side, each times its weight."""
    complete = np.arange(len(source.ids))
    if source.incomplete is not None:
        complete = complete[~source.incomplete]
    if len(complete) > SAMPLE:
        # One of each stretch: rows that were recorded together can be alike.
        edges = np.linspace(0, len(complete), SAMPLE + 1).astype(np.int64)
        draws = np.random.default_rng(seed).random(SAMPLE)
        complete = complete[edges[:-1] + (draws * np.diff(edges)).astype(np.int64)]
    return source.side_by_side(complete, np.float64)


def _spectrum(rows: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Rising eigenvalues and eigenvectors of the rows' Gram matrix."""
    values, vectors = np.linalg.eigh(_arrays.matmul(rows.T, rows))
    return values, vectors


def _wide(rows: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The same of rows that are long: of few of them."""
    some = rows[:: max(1, len(rows) // (4 * PREFIX))]
    _, singular, vectors = np.linalg.svd(some, full_matrices=False)
    scale = len(rows) / len(some)
    return scale * singular[::-1] ** 2, vectors[::-1].T


def reflections(vectors: NDArray[np.float64]) -> NDArray[np.float64]:
    """[count, length] Householder vectors that bring [length, count] orthonormal columns forward.

    Applied in order, they turn column i to plus or minus the i-th axis (Golub and Van Loan,
    "Matrix Computations", 5.2).
    """
    factors, _ = np.linalg.qr(vectors, mode="raw")  # transposed: a row is below its own diagonal
    found = np.triu(factors, 1)
    np.fill_diagonal(found, 1.0)
    return np.ascontiguousarray(found)
