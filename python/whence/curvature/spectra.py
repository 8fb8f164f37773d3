"""Eigenvectors of symmetric matrices."""

from __future__ import annotations

import torch
from torch import Tensor

from whence import _arrays
from whence._interrupts import interruptible
from whence.errors import NotFiniteError


def eigh(name: str, matrix: Tensor) -> tuple[Tensor, Tensor]:
    """[length] eigenvalues, which rise, and [length, length] eigenvectors, one a column.

    Of what is not finite LAPACK finds NaN for small matrices, and nothing for others.

    Args:
        name: What the matrix is, for an error.
        matrix: [length, length], symmetric.

    Raises:
        NotFiniteError: If a value or an eigenvalue is NaN or infinite, or none are found.

    O(length³).
    """
    _arrays.finite(name, matrix.numpy())
    try:
        values, vectors = interruptible(torch.linalg.eigh, matrix)
    except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
        raise NotFiniteError(f"eigenvalues of {name} must be finite, got none: {error}") from None
    _arrays.finite(f"eigenvalues of {name}", values.numpy())
    return values, vectors
