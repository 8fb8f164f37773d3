"""`Divided`: a sketch of gradients that were divided by something, value by value."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from whence.errors import MismatchError
from whence.gradients.blocks import bad_rows
from whence.sketch import Accumulator, Sketch


class Divided:
    """A sketch of gradients that were divided, such as by an optimizer's second moments.

    Args:
        sketch: The sketch.
        whole: Parameter -> [shape] divisors; parameters without any are taken as they are.
        factored: Parameter -> ([rows], [columns]) divisors of a matrix, whose products they are.
    """

    def __init__(
        self,
        sketch: Sketch,
        whole: Mapping[str, Tensor],
        factored: Mapping[str, tuple[Tensor, Tensor]],
    ) -> None:
        self.sketch = sketch
        self.whole = {name: 1 / each.cpu().flatten() for name, each in whole.items()}
        self.factored = {
            name: (1 / left.cpu(), 1 / right.cpu()) for name, (left, right) in factored.items()
        }

    @property
    def dim(self) -> int:
        """Width of a row."""
        return self.sketch.dim

    @property
    def width(self) -> int:
        """How many values are divided."""
        products = (len(left) * len(right) for left, right in self.factored.values())
        return sum(map(len, self.whole.values())) + sum(products)

    def accumulator(self, batch: int, names: Any = None) -> DividedAccumulator:
        """Zeros for a batch."""
        return DividedAccumulator(self, batch, names)


class DividedAccumulator:
    """The rows of one batch.

    Args:
        divided: The map.
        batch: How many rows.
        names: Parameters that there are.
    """

    def __init__(self, divided: Divided, batch: int, names: Any) -> None:
        self._map = divided
        self._inner: Accumulator = divided.sketch.accumulator(batch, names)

    @property
    def totals(self) -> NDArray[np.float64]:
        """[batch, dim]."""
        return self._inner.totals

    def finish(self, totals: NDArray[np.float64]) -> NDArray[np.float32]:
        """[batch, dim] the rows of these totals."""
        return self._inner.finish(totals)

    def add(
        self, name: str, shape: Sequence[int], values: NDArray[np.float32], start: int = 0
    ) -> list[int]:
        """Takes [batch, values] of one parameter."""
        given = torch.from_numpy(values)
        if name in self._map.whole:
            given = given * self._map.whole[name][start : start + given.shape[1]]
        elif name in self._map.factored:
            left, right = self._map.factored[name]
            scale = torch.outer(left, right).flatten()[start : start + given.shape[1]]
            given = given * scale
        return self._inner.add(name, shape, given.numpy(), start) or []

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
        """Takes Σ_t left[t] right[t]ᵀ, formed only where a whole matrix divides it."""
        one, other = torch.from_numpy(left), torch.from_numpy(right)
        found: list[int] = []
        if total is not None:
            whole = torch.from_numpy(total)
            whole += one.flatten(0, 1).T @ other.flatten(0, 1)
        if bias is not None:
            with np.errstate(all="ignore"):  # what is not finite is named
                summed = left.sum(1)
            found += self.add(bias[0], bias[1], summed, bias[2])
        if name in self._map.whole:
            formed = (one.mT @ other).flatten(1)
            padded = formed.new_zeros(len(self.totals), formed.shape[1])
            padded[first : first + len(formed)] = formed
            return found + self.add(name, shape, padded.numpy(), start)
        if name in self._map.factored:
            rows, columns = self._map.factored[name]
            wide = math.prod(shape[1:])
            at = start // wide
            one = one * rows[at : at + one.shape[2]] if len(rows) == shape[0] else one
            other = other * columns[: other.shape[2]]
        found += bad_rows(one, first)
        added = self._inner.add_outer(name, shape, one.numpy(), other.numpy(), start, first)
        return found + list(added or [])

    def add_lookup(
        self,
        name: str,
        shape: Sequence[int],
        indices: NDArray[np.int64],
        values: NDArray[np.float32],
        ignored: int | None,
    ) -> list[int]:
        """Takes values[t] for row indices[t] of a table."""
        given, rows = torch.from_numpy(values), torch.from_numpy(indices)
        if name in self._map.whole:
            scale = self._map.whole[name].reshape(tuple(shape))
            given = given * scale[rows.clamp(min=0)]
        elif name in self._map.factored:
            left, right = self._map.factored[name]
            given = given * left[rows.clamp(min=0)][..., None] * right
        return list(self._inner.add_lookup(name, shape, indices, given.numpy(), ignored) or [])


def divided_arrays(divided: Divided) -> tuple[list[dict[str, Any]], dict[str, NDArray[Any]]]:
    """What a file keeps of a map but for its sketch: a description, and arrays by name."""
    described: list[dict[str, Any]] = []
    arrays: dict[str, NDArray[Any]] = {}
    for name, each in divided.whole.items():
        arrays[f"factor-{len(described)}"] = each.numpy()
        described.append({"parameter": name, "factored": False})
    for name, (left, right) in divided.factored.items():
        arrays[f"factor-{len(described)}-left"] = left.numpy()
        arrays[f"factor-{len(described)}-right"] = right.numpy()
        described.append({"parameter": name, "factored": True})
    return described, arrays


def divided_from(
    sketch: Sketch, described: Sequence[Mapping[str, Any]], arrays: Mapping[str, NDArray[Any]]
) -> Divided:
    """The map that `divided_arrays` described.

    Raises:
        MismatchError: If that is of another version.
    """
    divided = Divided(sketch, {}, {})
    known = {name: torch.from_numpy(np.array(array)) for name, array in arrays.items()}
    try:
        for number, each in enumerate(described):
            name, stem = each["parameter"], f"factor-{number}"
            if each["factored"]:
                divided.factored[name] = known[f"{stem}-left"], known[f"{stem}-right"]
            else:
                divided.whole[name] = known[stem]
    except (KeyError, TypeError) as error:
        raise MismatchError(f"map must be of this version of whence, got {error!r}") from None
    return divided
