"""The basis that coordinates are rotated onto, and the curvature that is left in it.

The basis spans what a sample of the training data spans most of, each example's row divided by the
root of its norm: an example's own size says how much it matters to itself more than which
directions matter to others. It is found in one pass, so that samples may be as large as the data:
the leading directions of what was seen so far stand for it when more comes (Levy and Lindenbaum,
"Sequential Karhunen–Loeve basis extraction", IEEE Transactions on Image Processing 9, 2000).

In the basis, what layer-wise curvature leaves out can be put right: rows of labels that are drawn
from the model have a second moment M there, which would be the identity (but for damping) if layers
and eigenvectors were independent. Rows are multiplied with (1 + M / r)^-1/2, r = tr M³ / tr M², the
mean of M's eigenvalues weighted by each one's share in squared scores: directions in which M holds
much are damped, and those in which it is noise are left alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from whence._interrupts import interruptible
from whence.curvature.spectra import eigh
from whence.errors import ArgumentError

NEGLIGIBLE = 1e-5
"""Directions that hold less than this share of the first are rounding."""

ALONE = 4096
"""Examples of which the first directions are found."""


@dataclass(frozen=True, eq=False)
class Directions:
    """The leading directions of sampled rows, side by side over checkpoints.

    Attributes:
        values: [directions] what the rows hold of each, largest first, above rounding.
        matrices: [coordinates, directions] of each checkpoint, with which its coordinates are
            multiplied and summed over checkpoints.
        total: What the rows hold in all.
        examples: How many rows.
        widest: How many directions were kept at most.
        moment: [directions, directions] the second moment of rows of drawn labels; None where the
            curvature is left as it is.
    """

    values: Tensor
    matrices: list[Tensor]
    total: float
    examples: int
    widest: int
    moment: Tensor | None = None

    def energy(self, dim: int) -> float:
        """The share of what the rows hold that the leading `dim` directions have."""
        return min(1.0, float(self.values[:dim].sum()) / self.total)


class Leading:
    """Gathers the leading directions of rows.

    Args:
        widest: How many are kept.
        weights: Of each checkpoint. Side by side the coordinates are times their roots.
    """

    def __init__(self, widest: int, weights: Sequence[float]) -> None:
        self._widest = widest
        self._roots = [weight**0.5 for weight in weights]
        self._waiting: list[Sequence[Tensor]] = []
        self._kept: list[Tensor] = []
        self._values = torch.zeros(0)
        self._total = 0.0
        self._examples = 0

    def add(self, samples: Sequence[Tensor]) -> None:
        """Takes in [examples, coordinates] rows of each checkpoint.

        O(n (widest + n) · coordinates) for n = `ALONE` examples at first, 2 · widest after that.

        Raises:
            NotFiniteError: If their products are not finite.
        """
        self._waiting.append(samples)
        while sum(len(each[0]) for each in self._waiting) >= self._enough:
            self._take()

    @property
    def _enough(self) -> int:
        """How many examples are taken in together."""
        return 2 * self._widest if self._kept else max(ALONE, 2 * self._widest)

    def _take(self) -> None:
        """Takes in the first examples that wait."""
        joined = [torch.cat(each) for each in zip(*self._waiting, strict=True)]
        enough = self._enough
        left = [each[enough:] for each in joined]
        self._waiting = [left] if len(left[0]) else []
        samples = [each[:enough] for each in joined]
        self._values, self._kept, total = interruptible(
            _folded, self._values, self._kept, samples, self._roots, self._widest
        )
        self._total += total
        self._examples += len(samples[0])

    def directions(self) -> Directions:
        """What was found.

        Raises:
            ArgumentError: If all rows are zero.
            NotFiniteError: If their products are not finite.
        """
        if self._waiting:
            self._take()
        if not len(self._values):
            raise ArgumentError("factors must be of examples with a gradient, got only zeros")
        scales = self._values.rsqrt()
        matrices = [
            (kept.T * (scales * root)).contiguous()
            for kept, root in zip(self._kept, self._roots, strict=True)
        ]
        return Directions(self._values, matrices, self._total, self._examples, self._widest)


def _folded(
    old: Tensor, held: list[Tensor], samples: list[Tensor], roots: list[float], widest: int
) -> tuple[Tensor, list[Tensor], float]:
    """Leading directions, as `Leading` keeps them, with more samples; what those hold in all.

    Args:
        old: [directions] what is held of each.
        held: [directions, coordinates] of each checkpoint; none at first.
        samples: [examples, coordinates] of each checkpoint.
        roots: Of the checkpoints' weights.
        widest: How many directions are kept.
    """
    count = len(samples[0])
    rows = [sample * root for sample, root in zip(samples, roots, strict=True)]
    lengths = [torch.linalg.vector_norm(each, dim=1, dtype=torch.float64) for each in rows]
    norms = torch.stack(lengths).norm(dim=0)
    inverse = torch.where(norms > 0, norms.rsqrt(), 0).float()
    for each in rows:
        each *= inverse[:, None]
    gram = sum((each @ each.T for each in rows), torch.zeros(count, count))
    total = float(gram.diagonal().double().sum())
    if held:  # whose rows are their directions times the roots of their values
        beside = sum(
            (kept @ each.T for kept, each in zip(held, rows, strict=True)),
            torch.zeros(len(old), count),
        )
        above = torch.cat([torch.diag(old), beside], 1)
        gram = torch.cat([above, torch.cat([beside.T, gram], 1)])
    # In float32, which tells leading directions from each other and takes half the time.
    values, vectors = eigh("products of sampled rows", gram)
    values, vectors = values.flip(0)[:widest], vectors.flip(1)[:, :widest]
    above_rounding = int((values > NEGLIGIBLE * values[0]).sum()) if float(values[0]) > 0 else 0
    mixed = vectors[:, :above_rounding].T
    kept = [
        mixed[:, len(old) :] @ each + (mixed[:, : len(old)] @ held[place] if held else 0)
        for place, each in enumerate(rows)
    ]
    return values[:above_rounding], kept, total


def bases(directions: Directions, dim: int, turn: int | None) -> list[NDArray[np.float32]]:
    """What coordinates are multiplied with to be rows, at each checkpoint.

    Args:
        directions: Of the training data.
        dim: How many are taken.
        turn: Seed of an orthogonal matrix that spreads what the directions hold evenly over the
            columns, which rows of few bits need; None to leave them in falling order.

    Returns:
        [coordinates, dim] of each checkpoint.

    Raises:
        ArgumentError: If there are not so many.
        NotFiniteError: If the second moment is not finite.
    """
    if dim > directions.widest:
        raise ArgumentError(
            f"dim must be at most {directions.widest}, the directions that were kept, got {dim}; "
            "fit with a larger widest"
        )
    if dim > directions.examples:
        raise ArgumentError(
            f"dim must be at most {directions.examples}, the directions that a sample of as many "
            f"examples spans, got {dim}; fit with a larger sample"
        )
    return interruptible(_turned, directions.matrices, directions.moment, dim, turn)


def _turned(
    matrices: list[Tensor], moment: Tensor | None, dim: int, turn: int | None
) -> list[NDArray[np.float32]]:
    """`bases`, of matrices and a moment of `Directions`."""
    # Fewer directions than columns hold all that the examples differ in: the rest is zero.
    empty = max(0, dim - matrices[0].shape[1])
    after = torch.eye(dim, dtype=torch.float64)
    if moment is not None:
        moment = moment[:dim, :dim].double()
        padded = torch.nn.functional.pad(moment, (0, empty, 0, empty))
        values, vectors = eigh("second moment of drawn labels' rows", padded)
        values = values.clamp(min=0)
        squares = float(values.square().sum())
        ridge = float((values**3).sum()) / squares if squares > 0 else 1.0
        after = vectors * (1 + values / ridge).rsqrt()
        if turn is None:  # in falling order of what they hold
            after = after.flip(1)
    if turn is not None:
        random = np.random.default_rng(turn).standard_normal((dim, dim))
        orthogonal, upper = np.linalg.qr(random)
        # Uniform among orthogonal matrices (Mezzadri, arXiv math-ph/0609050).
        after = after @ torch.from_numpy(orthogonal * np.sign(np.diag(upper)))
    after = after[: dim - empty].float()
    return [np.ascontiguousarray((matrix[:, :dim] @ after).numpy()) for matrix in matrices]
