"""`Factored`: gradients of layers that see one position an example, kept exactly as two factors."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from whence import _arrays, _core
from whence.errors import LayerError, MismatchError
from whence.sketch import Sketch

LAYOUT = "factored"
"""What a manifest calls it."""


@dataclass(frozen=True)
class Segment:
    """The part of a row that one weight matrix, or one other parameter, has.

    A matrix G = left rightᵀ takes `left + right` columns. With a bias, the gradient of the bias is
    the factor on the side of the output; the other factor has a one at its end for it.

    Attributes:
        parameter: Name of the parameter.
        left: Length of the left factor; 0 for a parameter that is kept as it is.
        right: Length of the right factor, or of the parameter.
        bias: Name of the bias, or None.
        transposed: Whether the output is the right side, as in Hugging Face's Conv1D.
    """

    parameter: str
    left: int
    right: int
    bias: str | None = None
    transposed: bool = False

    @property
    def width(self) -> int:
        """The number of columns."""
        return self.left + self.right


class Factored:
    """An exact map for layers that see one position an example: each factor is kept.

    For a linear layer with input a and output gradient δ the gradient of one example is δaᵀ, and

        (δaᵀ) · (δ′a′ᵀ) = (δ·δ′)(a·a′)

    (Goodfellow, "Efficient per-example gradient computations", arXiv 1510.01799). A row holds δ and
    a of every layer, and the gradients of all other parameters as they are. Rows are scaled so that
    the scale of a row is the norm of its gradient, and its factors are of one size.

    Args:
        segments: The parts of a row, in order.

    Raises:
        MismatchError: If a row would be wider than the core allows.
    """

    def __init__(self, segments: Sequence[Segment]) -> None:
        self.segments = list(segments)
        self.width = sum(segment.width for segment in segments)
        if not 1 <= self.width <= _core.MAX_DIM:
            raise MismatchError(
                f"a factored row must be from 1 to {_core.MAX_DIM} wide, got {self.width}"
            )

    @classmethod
    def from_spec(cls, spec: Mapping[str, Any]) -> Factored:
        """The map that a store says its rows were made with.

        Raises:
            MismatchError: If this version of whence does not have that map.
        """
        try:
            return cls([Segment(**segment) for segment in spec["segments"]])
        except (KeyError, TypeError) as error:
            raise MismatchError(
                f"the store's segments must be of this version of whence: {error}"
            ) from None

    @property
    def spec(self) -> dict[str, Any]:
        """All that defines the map."""
        return {"layout": LAYOUT, "segments": [asdict(segment) for segment in self.segments]}

    def weighted(self, rows: NDArray[np.float32], weights: NDArray[Any]) -> NDArray[np.float32]:
        """Rows whose products with any row are multiplied with [rows] `weights`."""
        once = np.zeros(self.width, np.bool_)  # one factor of each product, and plain values
        at = 0
        for segment in self.segments:
            once[at : at + (segment.left or segment.right)] = True
            at += segment.width
        with np.errstate(over="ignore"):
            found: NDArray[np.float32] = np.where(once, rows * weights[..., None], rows)
        return found.astype(np.float32)

    @property
    def places(self) -> list[tuple[int, int]]:
        """(left, right) of each segment, as the search engine takes them."""
        return [(segment.left, segment.right) for segment in self.segments]

    def accumulator(self, batch: int, names: Any = None) -> FactoredAccumulator:
        """Empty rows of a batch."""
        return FactoredAccumulator(self, batch)

    def sketched(
        self, rows: NDArray[np.float32], shapes: Mapping[str, Sequence[int]], sketch: Sketch
    ) -> NDArray[np.float64]:
        """[rows, dim] the sketch of the gradients that factored rows stand for.

        Args:
            rows: [rows, width] as `FactoredAccumulator.rows` returns them.
            shapes: Name -> shape of every parameter.
            sketch: Any map.
        """
        totals = sketch.accumulator(len(rows), shapes)
        at = 0
        for segment in self.segments:
            left = rows[:, at : at + segment.left]
            right = rows[:, at + segment.left : at + segment.width]
            at += segment.width
            if not segment.left:
                totals.add(segment.parameter, shapes[segment.parameter], right)
                continue
            if segment.bias is not None:
                one, other = (left, right) if segment.transposed else (right, left)
                totals.add(segment.bias, shapes[segment.bias], other * one[:, -1:])
                left, right = (left[:, :-1], right) if segment.transposed else (left, right[:, :-1])
            totals.add_outer(
                segment.parameter, shapes[segment.parameter], left[:, None], right[:, None]
            )
        return totals.totals


def _direction(size: int) -> NDArray[np.float32]:
    """A fixed random direction: what two different gradients surely differ along."""
    return np.random.default_rng(size).standard_normal(size, np.float32)


class FactoredAccumulator:
    """The rows of one batch, to which each parameter is added once.

    Args:
        factored: The map.
        batch: How many rows.
    """

    def __init__(self, factored: Factored, batch: int) -> None:
        self.map = factored
        self._batch = batch
        self._given: dict[str, tuple[NDArray[np.float32], ...]] = {}

    def add(
        self, name: str, shape: Sequence[int], values: NDArray[np.float32], start: int = 0
    ) -> list[int]:
        """Takes [batch, values] of one parameter.

        Returns:
            Nothing; `bad_parameters` says which rows are not finite.
        """
        return self._take(name, math.prod(shape), start, (values,))

    def add_outer(
        self,
        name: str,
        shape: Sequence[int],
        left: NDArray[np.float32],
        right: NDArray[np.float32],
        start: int = 0,
        first: int = 0,
        total: NDArray[np.float32] | None = None,
        bias: tuple[str, list[int], int] | None = None,
    ) -> list[int]:
        """Takes the factors [batch, 1, rows] and [batch, 1, columns] of one parameter.

        Args:
            name: Canonical name of the parameter.
            shape: Shape of the parameter.
            left: The left factor.
            right: The right factor.
            start: First coordinate of the matrix in the parameter; 0.
            first: The row of the first sample; 0.
            total: [rows, columns], to which the sum of all samples' matrices is added.
            bias: A parameter whose gradient is the left factor, which is kept anyway.

        Returns:
            Nothing; `bad_parameters` says which rows are not finite.

        Raises:
            LayerError: If there are several positions.
        """
        if left.shape[1] != 1 or first:
            raise LayerError(
                f"layout='factored' must be used where layers see one position an example, got "
                f"{left.shape[1]} in {name}; use layout='global'"
            )
        left, right = left[:, 0], right[:, 0]
        if total is not None:
            total += _arrays.matmul(left.T, right)
        return self._take(name, left.shape[1] * right.shape[1], start, (left, right))

    def add_lookup(self, name: str, *_: Any) -> list[int]:
        """Refuses.

        Raises:
            LayerError: Always: an embedding has no two factors.
        """
        raise LayerError(f"layout='factored' must be used without embeddings, got {name}")

    def _take(
        self, name: str, size: int, start: int, values: tuple[NDArray[np.float32], ...]
    ) -> list[int]:
        whole = start == 0 and math.prod(each.shape[1] for each in values) == size
        if name in self._given or not whole:
            raise LayerError(
                f"layout='factored' must be used where each layer runs once in a forward pass, got "
                f"a second use of {name}; use layout='global'"
            )
        # Copies: the tensors' owners, autograd and the loop, may change them before the batch ends.
        self._given[name] = values = tuple(np.array(each, np.float32) for each in values)
        return []

    def bad_parameters(self) -> dict[int, str]:
        """Row -> name of a parameter in which a value is NaN or infinite. O(values)."""
        found: dict[int, str] = {}
        for name, values in self._given.items():
            for each in values:
                for row in np.flatnonzero(~np.isfinite(each).all(axis=1)):
                    found.setdefault(int(row), name)
        return found

    def probe(self, name: str, gradient: NDArray[np.float32]) -> NDArray[np.float64]:
        """[1, n] a parameter's gradient times a fixed random direction, or a vector as it is."""
        if all(each.parameter != name or not each.left for each in self.map.segments):
            return gradient.reshape(1, -1).astype(np.float64)
        along = _arrays.matmul(gradient, _direction(gradient.shape[1]))
        return along[None].astype(np.float64)

    def probes(self) -> dict[str, NDArray[np.float64]]:
        """Name -> [batch, n], the same of each sample."""
        found: dict[str, NDArray[np.float64]] = {}
        for segment in self.map.segments:
            given = self._given.get(segment.parameter)
            if given is None:
                continue
            if not segment.left:
                found[segment.parameter] = given[0].astype(np.float64)
                continue
            left, right = (each.astype(np.float64) for each in given)
            along = _arrays.matmul(right, _direction(right.shape[1]))
            found[segment.parameter] = left * along[:, None]
            if segment.bias is not None:
                found[segment.bias] = right if segment.transposed else left
        return found

    def rows(
        self, factor: float = 1.0, dtype: str = "float32"
    ) -> tuple[NDArray[Any], NDArray[np.float64]]:
        """The rows times `factor`, of unit gradients, and the norms of the gradients.

        Args:
            factor: What the gradients are multiplied with.
            dtype: "float16" or "float32".

        Returns:
            [batch, width] rows r such that the inner product of two gradients is the sum over
            segments of the products of their factors, times both norms; and [batch] norms, NaN or
            infinite where a value is.
        """
        parts = [self._part(segment) for segment in self.map.segments]
        rows, norms = _core.encode_factors(parts, dtype == "float16")
        return rows, norms.astype(np.float64) * abs(factor)

    def _part(
        self, segment: Segment
    ) -> tuple[NDArray[np.float32] | None, NDArray[np.float32], tuple[bool, bool]]:
        """The factors of a segment, and which of them a one follows; zeros where none came."""
        given = self._given.get(segment.parameter)
        if not segment.left:
            zeros = np.zeros((self._batch, segment.right), np.float32)
            right = zeros if given is None else given[0].reshape(self._batch, -1)
            return None, right, (False, False)
        ones = (
            segment.bias is not None and segment.transposed,
            segment.bias is not None and not segment.transposed,
        )
        if given is None:
            return (
                np.zeros((self._batch, segment.left - ones[0]), np.float32),
                np.zeros((self._batch, segment.right - ones[1]), np.float32),
                ones,
            )
        return given[0], given[1], ones
