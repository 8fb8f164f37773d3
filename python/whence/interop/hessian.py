"""The dense Hessians that bergson saves beside gradients, and their inverses."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from whence import _arrays
from whence._interrupts import interruptible
from whence._optional import imported
from whence.errors import MismatchError, NotFiniteError, StoreError

Float = NDArray[np.float64]

INVERSIONS: dict[str, Callable[[Float, float], Float]] = {
    "damped_inverse": lambda values, damping: 1 / (values + damping * values.mean()),
    "absolute_damped_inverse": lambda values, damping: 1 / (values + damping),
    "factored_tikhonov": lambda values, damping: 1 / (values + damping * values.mean()),
    "pseudoinverse": lambda values, damping: np.where(
        values > damping * values.mean(), 1 / values, 0
    ),
    "tikhonov_filtered": lambda values, damping: (
        values / (values**2 + (damping * values.mean()) ** 2)
    ),
}
"""By bergson's names: (eigenvalues, damping factor) -> what stands for their inverses.

As `bergson.hessians.inversion` has them for dense matrices.
"""


class Hessian:
    """The inverse of a Hessian in blocks along its diagonal, and the square root of that.

    Args:
        blocks: (first coordinate, [size, size] symmetric block); one is 1 where there is none.
        inversion: One of `INVERSIONS`.
        damping_factor: As there.

    Raises:
        NotFiniteError: If a block, or its inverse, holds a NaN or an infinity.

    O(size³) time for each block.
    """

    def __init__(
        self, blocks: list[tuple[int, Float]], inversion: str, damping_factor: float
    ) -> None:
        self._inverses: list[tuple[slice, Float]] = []
        self._roots: list[tuple[slice, Float]] = []
        for first, block in blocks:
            place = slice(first, first + len(block))
            _arrays.finite(f"hessian of coordinates {first} to {place.stop}", block)
            values, vectors = interruptible(np.linalg.eigh, block)
            with np.errstate(all="ignore"):  # what is not finite is reported
                inverse = INVERSIONS[inversion](values.clip(min=0), damping_factor)
            if not np.isfinite(inverse).all():
                raise NotFiniteError(
                    f"the inverse of the hessian of coordinates {first} to {place.stop} must be "
                    f"finite, got infinity with damping_factor={damping_factor}"
                )
            for kept, scales in ((self._inverses, inverse), (self._roots, np.sqrt(inverse))):
                kept.append((place, interruptible(_arrays.matmul, vectors * scales, vectors.T)))

    def inverse(self, rows: NDArray[Any]) -> Float:
        """[rows, dim] times the inverse."""
        return _times(rows, self._inverses)

    def root(self, rows: NDArray[Any]) -> Float:
        """[rows, dim] times the root of the inverse."""
        return _times(rows, self._roots)


def _times(rows: NDArray[Any], blocks: list[tuple[slice, Float]]) -> Float:
    found: Float = rows.astype(np.float64)
    for place, block in blocks:
        found[:, place] = interruptible(_arrays.matmul, found[:, place], block)
    return found


def read_hessian(
    path: Path, sizes: Mapping[str, int], inversion: str, damping_factor: float
) -> Hessian:
    """The Hessian in a folder of bergson's, of modules that lie beside each other.

    Args:
        path: The folder, with `hessians.pth`: name of a module -> [size, size], or "joint" -> one
            of all modules. Modules without one are left as they are.
        sizes: module -> how many coordinates it has, in their order.
        inversion: One of `INVERSIONS`.
        damping_factor: As there.

    Raises:
        MismatchError: If it is factored, or of other modules.
        MissingDependencyError: If torch is not installed, which has written the file.
        NotFiniteError: If it, or its inverse, is not finite.
        StoreError: If the file is not there, or damaged.
    """
    if (path / "eigen_activation_sharded").is_dir():
        raise MismatchError(f"hessian must be dense ('autocorrelation'), got factors in {path}")
    file = path / "hessians.pth"
    if not file.is_file():
        raise StoreError(f"hessian must be a folder of bergson, got {path} without {file.name}")
    torch = imported("torch", "hessian", "torch")
    try:
        loaded = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file can end in any
        raise StoreError(f"{file} is damaged: {type(error).__name__}: {error}") from None
    if not isinstance(loaded, dict):
        raise StoreError(f"{file} must hold a matrix for each module, got {type(loaded).__name__}")
    if not loaded:  # an index without a Hessian has an empty file
        raise StoreError(f"{file} must hold a matrix for each module, got none")
    if "joint" in loaded:
        places = {"joint": (0, sum(sizes.values()))}
    else:
        places, first = {}, 0
        for name, size in sizes.items():
            places[name] = (first, size)
            first += size
    unknown = sorted(str(name) for name in loaded if name not in places)
    if unknown:
        raise MismatchError(f"hessian must be of the modules of the index, got {unknown[0]!r}")
    blocks = []
    for name, matrix in loaded.items():
        first, size = places[name]
        if tuple(getattr(matrix, "shape", ())) != (size, size):
            raise MismatchError(
                f"hessian of {name!r} must be [{size}, {size}], got {_arrays.describe(matrix)}"
            )
        blocks.append((first, np.asarray(matrix.double().numpy())))
    return Hessian(blocks, inversion, damping_factor)
