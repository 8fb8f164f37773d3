"""`Coordinates`: gradients in a preconditioner's eigenbasis, the leading coordinates of it.

A weight's gradient G, seen from the eigenvectors of the two sides' covariances, is Q_Sᵀ G Q_A. Of
its values only some are wanted: those of large eigenvalue. They take two thin products with the
eigenvectors that are used, and G itself is never formed where that is cheaper:

    z_k = s_k (Σ_t (Q_Sᵀ δ_t)_p(k) (Q_Aᵀ a_t)_m(k)),    s_k = (Λ_k + damping)^-1/2

A row is z, or z V for a basis V learnt from the training data.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from whence import _arrays
from whence.errors import MismatchError
from whence.gradients.blocks import LOOKUP, OUTER, VECTOR, Block, BlockAccumulator, BlockMap, Side
from whence.sketch import Sketch
from whence.store.files import WRONG

FORMED_VALUES = 1 << 24
"""Products of both sides are formed for as many samples at a time as fit in 64 MiB."""


@dataclass(frozen=True, eq=False)
class Choice:
    """The coordinates that are kept of a block.

    Attributes:
        block: The block, with the eigenvectors that they use.
        rows: [coordinates] int64 place among the eigenvectors of the left side.
        columns: [coordinates] int64 the same of the right side; of a table the row, rising.
        scales: [coordinates] float32 what each is multiplied with.
    """

    block: Block
    rows: Tensor
    columns: Tensor
    scales: Tensor

    def __len__(self) -> int:
        return len(self.scales)


class Coordinates(BlockMap):
    """A map from gradients to rows of whitened, chosen and perhaps rotated coordinates.

    Args:
        choices: What is kept of each block, in the order of the coordinates.
        basis: [coordinates, dim] float32 whose product with the coordinates is the row; None for
            the coordinates themselves.
    """

    def __init__(self, choices: Sequence[Choice], basis: NDArray[np.float32] | None = None) -> None:
        super().__init__(choice.block for choice in choices)
        self.choices = list(choices)
        self.width = sum(map(len, choices))
        self.basis = None if basis is None else _tensor(basis)
        self.dim = self.width if basis is None else basis.shape[1]
        starts = np.cumsum([0, *map(len, choices)]).tolist()
        self.places = {
            choice.block.key: (start, choice)
            for start, choice in zip(starts, choices, strict=False)
        }

    def accumulator(self, batch: int, names: Any = None) -> CoordinatesAccumulator:
        """Coordinates of a batch, all zero."""
        return CoordinatesAccumulator(self, batch)

    def rotated(self, basis: NDArray[np.float32] | None) -> Coordinates:
        """The same coordinates in another basis."""
        return Coordinates(self.choices, basis)


class CoordinatesAccumulator(BlockAccumulator):
    """The coordinates of one batch, to which gradients are added.

    Args:
        coordinates: The map.
        batch: How many rows.
    """

    map: Coordinates

    def __init__(self, coordinates: Coordinates, batch: int) -> None:
        super().__init__(coordinates, batch)
        self._totals = torch.zeros(batch, coordinates.width)

    @property
    def totals(self) -> NDArray[Any]:
        """[batch, coordinates]."""
        return self._totals.numpy()

    def finish(self, totals: NDArray[Any]) -> NDArray[np.float32]:
        """[batch, dim] the rows of these totals."""
        if self.map.basis is None:
            return totals
        found: NDArray[np.float32] = (torch.from_numpy(totals) @ self.map.basis).numpy()
        return found

    def outer(self, block: Block, left: Tensor, right: Tensor, first: int, *, bias: bool) -> bool:
        """Two thin products, and of their product what is wanted."""
        start, choice = self.map.places[block.key]
        if not len(choice):
            return False
        batch, terms, rows = left.shape
        wide, other = block.values
        thin = terms * (rows * wide + right.shape[2] * other + wide * other)
        formed = rows * right.shape[2] * (terms + other) + rows * wide * other
        if terms > 1 and not bias and formed < thin:
            found = self._picked(choice, block.formed(left.mT @ right))
            self._put(start, first, found)
            return _proves(block, left, right, found)
        factors = block.projected(left, right, bias=bias)
        if terms == 1:
            found = factors[0][:, 0, choice.rows] * factors[1][:, 0, choice.columns]
            self._put(start, first, found * choice.scales)
            return _proves(block, left, right, found)
        step, finite = max(1, FORMED_VALUES // (wide * other)), True
        for at in range(0, batch, step):
            formed_part = factors[0][at : at + step].mT @ factors[1][at : at + step]
            found = self._picked(choice, formed_part)
            self._put(start, first + at, found)
            finite = finite and _proves(block, left, right, found)
        return finite

    def bias(self, block: Block, values: Tensor) -> None:
        """The bias, where it does not come with its weight."""
        start, choice = self.map.places[block.key]
        if not len(choice):
            return
        left, right = block.biased(values)
        self._put(start, 0, left[:, 0, choice.rows] * right[:, 0, choice.columns] * choice.scales)

    def formed(self, block: Block, values: Tensor) -> None:
        """A gradient that is there already."""
        start, choice = self.map.places[block.key]
        if len(choice):
            self._put(start, 0, self._picked(choice, block.formed(values)))

    def lookup(self, block: Block, indices: Tensor, values: Tensor) -> None:
        """Of each row of the table that is looked up, the coordinates that are wanted."""
        start, choice = self.map.places[block.key]
        if block.left is None or not len(choice):
            return
        batch, terms = indices.shape
        projected = block.left.project(values).reshape(batch * terms, -1)
        table = indices.reshape(-1).contiguous()
        firsts = torch.searchsorted(choice.columns, table)
        counts = torch.searchsorted(choice.columns, table, right=True) - firsts
        term = torch.arange(batch * terms).repeat_interleave(counts)
        within = torch.arange(len(term)) - (counts.cumsum(0) - counts).repeat_interleave(counts)
        place = firsts.repeat_interleave(counts) + within
        added = projected[term, choice.rows[place]] * choice.scales[place]
        found = torch.zeros(batch * len(choice))
        found.index_add_(0, term // terms * len(choice) + place, added)
        self._put(start, 0, found.reshape(batch, -1))

    @staticmethod
    def _picked(choice: Choice, formed: Tensor) -> Tensor:
        """[batch, coordinates] of [batch, left, right]."""
        places = choice.rows * formed.shape[2] + choice.columns
        return formed.flatten(1)[:, places] * choice.scales

    def _put(self, start: int, first: int, found: Tensor) -> None:
        self._totals[first : first + len(found), start : start + found.shape[1]] += found


def _proves(block: Block, left: Tensor, right: Tensor, found: Tensor) -> bool:
    """Whether coordinates show that both factors are finite: all of them have all values in them.

    A value that is not finite makes every column of its side not finite, whatever it is multiplied
    with, for 0 times it is NaN; and so every coordinate of its sample.
    """
    if block.left is None or block.right is None:
        return False
    spanned = block.left.spans(left.shape[2]) and block.right.spans(right.shape[2])
    return spanned and bool(torch.isfinite(found.sum()))


def random_basis(sketch: Sketch, name: str, width: int) -> NDArray[np.float32]:
    """[width, dim] a random map of the coordinates of the checkpoint of this name."""
    return sketch({name: np.eye(width, dtype=np.float32)})


def to_arrays(coordinates: Coordinates) -> tuple[list[dict[str, Any]], dict[str, NDArray[Any]]]:
    """What a file keeps of a map: a description of its blocks, and arrays by name."""
    described, arrays = [], {}
    for number, choice in enumerate(coordinates.choices):
        block = choice.block
        sides: dict[str, Any] = {}
        for name, side in (("left", block.left), ("right", block.right)):
            if side is not None:
                sides[name] = [[first, end] for first, end, _ in side.parts]
                for place, (_, _, matrix) in enumerate(side.parts):
                    arrays[f"block-{number}-{name}-{place}"] = matrix.numpy()
                if side.ones is not None:
                    arrays[f"block-{number}-{name}-ones"] = side.ones.numpy()
        for name in ("rows", "columns", "scales"):
            arrays[f"block-{number}-{name}"] = getattr(choice, name).numpy()
        described.append({**describe(block), "sides": sides})
    if coordinates.basis is not None:
        arrays["basis"] = coordinates.basis.numpy()
    return described, arrays


def describe(block: Block) -> dict[str, Any]:
    """A block without its eigenvectors, for JSON."""
    return {
        "parameter": block.parameter,
        "start": block.start,
        "kind": block.kind,
        "shape": list(block.shape),
        "bias": None if block.bias is None else list(block.bias),
        "ones": block.ones,
    }


def described_block(each: Mapping[str, Any]) -> Block:
    """The block that `describe` described, still without eigenvectors.

    Raises:
        ValueError: If it cannot have been; or another error of `whence.store.files.WRONG`.
    """
    (rows, columns), bias = (_arrays.integer("shape", size, 1) for size in each["shape"]), None
    kind = _arrays.choice("kind", each["kind"], (OUTER, LOOKUP, VECTOR))
    ones = _arrays.choice("ones", each["ones"], ("left", "right"))
    names = [each["parameter"]]
    if each["bias"] is not None:
        name, first, length = each["bias"]
        bias = name, _arrays.integer("bias", first, 0), _arrays.integer("bias", length, 1)
        names.append(name)
        if kind != OUTER or length != (columns if ones == "left" else rows):
            raise ValueError(f"a bias must be of a side of a weight, got {length} values")
    if not all(isinstance(name, str) for name in names) or (kind == VECTOR and columns != 1):
        raise ValueError(f"a block must be of a parameter, got {names!r:.80}, {columns} columns")
    start = _arrays.integer("start", each["start"], 0)
    block = Block(names[0], start, kind, (rows, columns), bias, ones)
    given, wanted = set(each["sides"]), set(block.lengths)
    if given != wanted and (kind != VECTOR or given):  # a long vector has none
        raise ValueError(f"{block.parameter} must have the sides {wanted}, got {given!r:.80}")
    return block


def from_arrays(
    described: Sequence[Mapping[str, Any]], arrays: Mapping[str, NDArray[Any]]
) -> Coordinates:
    """The map that `to_arrays` described.

    Raises:
        MismatchError: If the description does not fit the arrays.
    """
    choices = []
    try:
        for number, each in enumerate(described):
            stem, block = f"block-{number}", described_block(each)
            sides = {
                name: _side(block, name, ranges, f"{stem}-{name}", arrays)
                for name, ranges in each["sides"].items()
            }
            block = replace(block, left=sides.get("left"), right=sides.get("right"))
            choices.append(_choice(block, stem, arrays))
        basis = arrays.get("basis")
        if basis is not None and basis.shape[0] != sum(map(len, choices)):
            raise ValueError(f"basis must be of the coordinates, got {_arrays.describe(basis)}")
        return Coordinates(choices, basis)
    except WRONG as error:
        raise MismatchError(
            f"coordinates must be of this version of whence, got {type(error).__name__}: {error}"
        ) from None


def _side(
    block: Block, name: str, ranges: Any, stem: str, arrays: Mapping[str, NDArray[Any]]
) -> Side:
    """A side of a block, once its stretches follow each other and its arrays fit them.

    Raises:
        ValueError: If they do not; or another error of `WRONG`.
    """
    parts, before = [], 0
    for place, (first, end) in enumerate(ranges):
        first = _arrays.integer("ranges", first, before)
        before = _arrays.integer("ranges", end, first + 1, block.lengths[name])
        matrix = arrays[f"{stem}-{place}"]
        _fits(f"{stem}-{place}", matrix, np.float32, (end - first, matrix.shape[-1]))
        parts.append((first, end, _tensor(matrix)))
    side = Side(parts)
    ones = arrays.get(f"{stem}-ones")
    if (ones is not None) != block.has_one(name):
        raise ValueError(f"{stem}-ones must be there for a bias alone")
    if ones is not None:
        _fits(f"{stem}-ones", ones, np.float32, (side.columns,))
        side = replace(side, ones=_tensor(ones))
    return side


def _choice(block: Block, stem: str, arrays: Mapping[str, NDArray[Any]]) -> Choice:
    """What is kept of a block, once it is there.

    Raises:
        ValueError: If it is not; or another error of `WRONG`.
    """
    rows, columns, scales = (arrays[f"{stem}-{name}"] for name in ("rows", "columns", "scales"))
    _fits(f"{stem}-scales", scales, np.float32, (scales.size,))
    for name, places, count in zip(("rows", "columns"), (rows, columns), block.values, strict=True):
        _fits(f"{stem}-{name}", places, np.int64, scales.shape)
        if ((places < 0) | (places >= count)).any():
            raise ValueError(f"{stem}-{name} must be places from 0 to {count - 1}")
    if block.kind == LOOKUP and (np.diff(columns) < 0).any():
        raise ValueError(f"{stem}-columns must rise")
    return Choice(block, *map(_tensor, (rows, columns, scales)))


def _fits(name: str, array: NDArray[Any], dtype: type, shape: tuple[int, ...]) -> None:
    if array.dtype != dtype or array.shape != shape:
        got = _arrays.describe(array)
        raise ValueError(f"{name} must be {np.dtype(dtype)} of shape {list(shape)}, got {got}")


def _tensor(array: NDArray[Any]) -> Tensor:
    return torch.from_numpy(np.array(array))
