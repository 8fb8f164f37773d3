"""The basis that coordinates are rotated onto, and the curvature that is left in it.

The basis spans what a sample of the training data spans most of, each example's row divided by the
root of its norm: an example's own size says how much it matters to itself more than which
directions matter to others. In it, what layer-wise curvature leaves out can be put right: rows of
labels that are drawn from the model have a second moment M there, which would be the identity (but
for damping) if layers and eigenvectors were independent. Rows are multiplied with (1 + M / r)^-1/2,
r = tr M² / tr M, the mean eigenvalue weighted by itself: directions in which M holds much are
damped, and those in which it is noise are left alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from whence.errors import ArgumentError

NEGLIGIBLE = 1e-5
"""Directions that hold less than this share of the first are rounding."""


@dataclass(frozen=True, eq=False)
class Spectrum:
    """The Gram matrix of sampled rows, side by side over checkpoints, taken apart.

    Attributes:
        values: [directions] eigenvalues, largest first, above rounding.
        mixed: [examples, directions] what the rows are summed with to be the directions.
    """

    values: Tensor
    mixed: Tensor

    @classmethod
    def of(cls, samples: Sequence[Tensor], weights: Sequence[float]) -> Spectrum:
        """That of [examples, coordinates] rows of each checkpoint.

        O(examples² · coordinates), and O(examples³) for the eigenvectors.

        Raises:
            ArgumentError: If all rows are zero.
        """
        gram = torch.zeros(len(samples[0]), len(samples[0]), dtype=torch.float64)
        for sample, weight in zip(samples, weights, strict=True):
            gram += weight * (sample @ sample.T).double()
        norms = gram.diagonal().sqrt()
        inverse = torch.where(norms > 0, norms.rsqrt(), 0)
        # In float32, which tells leading directions from each other and takes half the time.
        values, vectors = torch.linalg.eigh((gram * inverse[:, None] * inverse).float())
        values, vectors = values.flip(0), vectors.flip(1)
        kept = int((values > NEGLIGIBLE * values[0]).sum()) if float(values[0]) > 0 else 0
        if not kept:
            raise ArgumentError("factors must be of examples with a gradient, got only zeros")
        values, vectors = values[:kept], vectors[:, :kept]
        return cls(values, inverse.float()[:, None] * vectors / values.sqrt())


def bases(
    samples: Sequence[Tensor],
    weights: Sequence[float],
    spectrum: Spectrum,
    dim: int,
    drawn: Tensor | None,
    turn: int | None,
) -> list[NDArray[np.float32]]:
    """What coordinates are multiplied with to be rows, at each checkpoint.

    Args:
        samples: [examples, coordinates] of each checkpoint.
        weights: Of each checkpoint. Side by side the coordinates are times their roots, and the
            directions have another: so both are in the matrices.
        spectrum: Of the samples.
        dim: How many directions.
        drawn: [draws, examples] products of rows with drawn labels and the samples; None to leave
            the curvature in the basis as it is.
        turn: Seed of an orthogonal matrix that spreads what the directions hold evenly over the
            columns, which rows of few bits need; None to leave them in falling order.

    Returns:
        [coordinates, dim] of each checkpoint.

    Raises:
        ArgumentError: If the sample has fewer examples.
    """
    rank = len(spectrum.values)
    if rank < dim and rank == len(samples[0]):
        raise ArgumentError(
            f"dim must be at most {rank}, the directions that a sample of as many examples "
            f"spans, got {dim}; fit with a larger sample"
        )
    # Fewer directions than columns hold all that the examples differ in: the rest is zero.
    mixed = torch.nn.functional.pad(spectrum.mixed[:, :dim], (0, max(0, dim - rank)))
    after = torch.eye(dim, dtype=torch.float64)
    if drawn is not None:
        rows = (drawn @ mixed).double()
        values, vectors = torch.linalg.eigh(rows.T @ rows / len(rows))
        values = values.clamp(min=0)
        ridge = float(values.square().sum() / values.sum()) if float(values.sum()) > 0 else 1.0
        after = vectors * (1 + values / ridge).rsqrt()
        if turn is None:  # in falling order of what they hold
            after = after.flip(1)
    if turn is not None:
        random = np.random.default_rng(turn).standard_normal((dim, dim))
        orthogonal, upper = np.linalg.qr(random)
        # Uniform among orthogonal matrices (Mezzadri, arXiv math-ph/0609050).
        after = after @ torch.from_numpy(orthogonal * np.sign(np.diag(upper)))
    whole = mixed @ after.float()
    return [
        np.ascontiguousarray((weight * (sample.T @ whole)).numpy())
        for sample, weight in zip(samples, weights, strict=True)
    ]
