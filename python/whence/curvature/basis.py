"""The basis that coordinates are rotated onto: what a sample of the training data spans most of."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from whence.errors import ArgumentError


def spectrum(samples: Sequence[Tensor], weights: Sequence[float]) -> tuple[Tensor, Tensor, Tensor]:
    """The Gram matrix of unit rows, side by side over checkpoints, taken apart.

    Rows of one length: an example's own size says how much it matters to itself, not which
    directions matter to others. O(examples² · coordinates), and O(examples³) for the eigenvectors.

    Args:
        samples: [examples, coordinates] of each checkpoint.
        weights: Of each checkpoint.

    Returns:
        [examples] eigenvalues, largest first, that are above rounding; [examples, values]
        eigenvectors; [examples] one divided by the norms of rows.

    Raises:
        ArgumentError: If all rows are zero.
    """
    gram = torch.zeros(len(samples[0]), len(samples[0]), dtype=torch.float64)
    for sample, weight in zip(samples, weights, strict=True):
        gram += weight * (sample @ sample.T).double()
    norms = gram.diagonal().sqrt()
    inverse = torch.where(norms > 0, 1 / norms, 0)
    # In float32, which leading directions do not tell from float64 and which takes half the time.
    values, vectors = torch.linalg.eigh((gram * inverse[:, None] * inverse).float())
    values, vectors = values.flip(0), vectors.flip(1)
    kept = int((values > 1e-5 * values[0]).sum()) if float(values[0]) > 0 else 0
    if not kept:
        raise ArgumentError("factors must be of examples with a gradient, got only zeros")
    return values[:kept], vectors[:, :kept], inverse


def bases(
    samples: Sequence[Tensor],
    weights: Sequence[float],
    found: tuple[Tensor, Tensor, Tensor],
    dim: int,
    turn: int | None,
) -> list[NDArray[np.float32]]:
    """The leading directions of sampled rows, as one matrix a checkpoint.

    Args:
        samples: [examples, coordinates] of each checkpoint.
        weights: Of each checkpoint. The directions V are orthonormal in [√w_c z_c], side by side
            over checkpoints, and the matrices are √w_c V_c: so the inner product of two rows
            Σ_c √w_c z_c V_c is the weighted sum over checkpoints, as far as V keeps it.
        found: What `spectrum` returned for them.
        dim: How many directions.
        turn: Seed of an orthogonal matrix that spreads what the directions hold evenly over the
            columns, which quantised rows need; None to leave them in falling order.

    Returns:
        [coordinates, dim] of each checkpoint.

    Raises:
        ArgumentError: If the sample does not span so many directions.
    """
    values, vectors, inverse = found
    if len(values) < dim:
        raise ArgumentError(
            f"dim must be at most {len(values)}, the directions that the sample of "
            f"{len(samples[0])} training examples spans, got {dim}"
        )
    mixed = (inverse[:, None] * vectors[:, :dim] / values[:dim].sqrt()).float()
    turned = [weight * (sample.T @ mixed) for sample, weight in zip(samples, weights, strict=True)]
    if turn is not None:
        random = np.random.default_rng(turn).standard_normal((dim, dim))
        orthogonal, upper = np.linalg.qr(random)
        orthogonal *= np.sign(np.diag(upper))  # uniform among orthogonal matrices (Mezzadri 2007)
        matrix = torch.from_numpy(orthogonal.astype(np.float32))
        turned = [each @ matrix for each in turned]
    return [np.ascontiguousarray(each.numpy()) for each in turned]
