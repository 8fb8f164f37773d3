"""Blocks: the parts of a gradient that have a preconditioner of their own.

A block is a weight together with its bias, a table, or any other parameter as one vector. A weight
that is used by several projections (attention's) or groups (of a convolution) has a block for each.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from whence.errors import CoverageError

OUTER, LOOKUP, VECTOR = "outer", "lookup", "vector"
"""Kinds of blocks: weights of linear maps, tables, and anything else as one vector."""


@dataclass(frozen=True, eq=False)
class Side:
    """Columns that one side of a block is multiplied with: eigenvectors of its covariance.

    Attributes:
        parts: (first, end, [end - first, columns] float32) of each stretch of the side, which
            has eigenvectors of its own; their columns follow each other.
        ones: [columns] float32, what a constant one after the last value is multiplied with: the
            bias's share of the eigenvectors; None if there is no bias on this side.
    """

    parts: Sequence[tuple[int, int, Tensor]]
    ones: Tensor | None = None

    @property
    def columns(self) -> int:
        """The number of columns."""
        return sum(matrix.shape[1] for _, _, matrix in self.parts)

    def spans(self, length: int) -> bool:
        """Whether each column is of all `length` values."""
        return [part[:2] for part in self.parts] == [(0, length)]

    def project(self, values: Tensor, *, one: bool = False) -> Tensor:
        """[..., length] to [..., columns], with the constant one if `one`; in the columns' type."""
        if self.parts:  # rules of norms and biases hand over float32, of a float64 model too
            values = values.to(self.parts[0][2].dtype)
        found = [values[..., first:end] @ matrix for first, end, matrix in self.parts]
        projected = found[0] if len(found) == 1 else torch.cat(found, -1)
        return projected + self.ones if one and self.ones is not None else projected

    def back(self, values: Tensor, length: int) -> Tensor:
        """[..., columns] to [..., length], and the constant one's place after it if there is one.

        The transpose of `project`, and so its inverse if all eigenvectors are there.
        """
        found = values.new_zeros(*values.shape[:-1], length + (self.ones is not None))
        at = 0
        for first, end, matrix in self.parts:
            found[..., first:end] = values[..., at : at + matrix.shape[1]] @ matrix.T
            at += matrix.shape[1]
        if self.ones is not None:
            found[..., -1] = values @ self.ones
        return found

    def chosen(self, columns: NDArray[np.int64]) -> Side:
        """The side with these columns only, which rise."""
        parts, at = [], 0
        for first, end, matrix in self.parts:
            mine = columns[(columns >= at) & (columns < at + matrix.shape[1])] - at
            at += matrix.shape[1]
            if len(mine):
                parts.append((first, end, matrix[:, torch.from_numpy(mine)].contiguous()))
        ones = None if self.ones is None else self.ones[torch.from_numpy(columns)].contiguous()
        return Side(parts, ones)


@dataclass(frozen=True, eq=False)
class Block:
    """A part of the gradient.

    Attributes:
        parameter: Canonical name of the parameter.
        start: The block's first value in the parameter.
        kind: "outer" for Σ_t left[t] right[t]ᵀ, "lookup" for rows of a table, "vector".
        shape: (rows, columns) of a weight or a table; (values, 1) of a vector.
        bias: (name, first value, length) of the bias that goes with the weight, or None.
        ones: The side of the inputs, after whose values a constant one stands for the bias: "left"
            in Hugging Face's Conv1D, else "right".
        left: Eigenvectors of the left side; of a table those of its rows, whose right side is the
            identity; None for a vector whose values are taken as they are.
        right: Eigenvectors of the right side of a weight, else None.
    """

    parameter: str
    start: int
    kind: str
    shape: tuple[int, int]
    bias: tuple[str, int, int] | None = None
    ones: str = "right"
    left: Side | None = None
    right: Side | None = None

    @property
    def key(self) -> tuple[str, int, str]:
        """What tells it from others of the model."""
        return self.parameter, self.start, self.kind

    @property
    def layer(self) -> str:
        """Name of the layer."""
        return self.parameter.rpartition(".")[0] or self.parameter

    @property
    def lengths(self) -> dict[str, int]:
        """Name -> number of values of each side that can have eigenvectors."""
        rows, columns = self.shape
        if self.kind == OUTER:
            return {"left": rows, "right": columns}
        return {"left": columns if self.kind == LOOKUP else rows}

    def has_one(self, side: str) -> bool:
        """Whether a constant one stands for the bias after the values of a side."""
        return self.bias is not None and self.ones == side

    @property
    def sides(self) -> tuple[Side, Side]:
        """Both sides of a weight."""
        if self.left is None or self.right is None:
            raise TypeError(f"{self.parameter} must have both sides, got a {self.kind}")
        return self.left, self.right

    @property
    def values(self) -> tuple[int, int]:
        """Shape of the eigenvalues."""
        if self.kind == OUTER:
            left, right = self.sides
            return left.columns, right.columns
        if self.kind == LOOKUP and self.left is not None:
            return self.left.columns, self.shape[0]
        return (self.shape[0] if self.left is None else self.left.columns), 1

    def projected(self, left: Tensor, right: Tensor, *, bias: bool) -> tuple[Tensor, Tensor]:
        """Factors [batch, terms, length] in the eigenbasis, with the bias if `bias`."""
        first, second = self.sides
        return first.project(left, one=bias), second.project(right, one=bias)

    def biased(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """The bias's gradient [batch, length] as factors in the eigenbasis, of one term."""
        left, right = self.sides
        values = values[:, None]
        if right.ones is not None:
            return left.project(values), right.ones.expand(len(values), 1, -1)
        if left.ones is not None:
            return left.ones.expand(len(values), 1, -1), right.project(values)
        raise TypeError(f"{self.parameter} must have a bias, got none")

    def formed(self, values: Tensor) -> Tensor:
        """[batch, *values] of the gradient itself, [batch, rows, columns], without the bias."""
        if self.kind == OUTER:
            left, right = self.sides
            return left.project(right.project(values).mT).mT
        if self.kind == LOOKUP and self.left is not None:
            return self.left.project(values).mT
        values = values.flatten(1)
        return (values if self.left is None else self.left.project(values))[..., None]


class BlockMap(ABC):
    """Which block takes which gradient.

    Args:
        blocks: All of a model.
    """

    wide = False
    """Whether gradients of float64 are taken as they are."""

    def __init__(self, blocks: Iterable[Block] = ()) -> None:
        self.blocks: list[Block] = []
        self.outer: dict[tuple[str, int], Block] = {}
        self.tables: dict[str, Block] = {}
        self.vectors: dict[str, Block] = {}
        self.weights: dict[str, list[Block]] = {}
        self.biases: dict[str, list[Block]] = {}
        for block in blocks:
            self.append(block)

    def append(self, block: Block) -> None:
        """Takes one more."""
        self.blocks.append(block)
        if block.kind == OUTER:
            self.outer[block.parameter, block.start] = block
            self.weights.setdefault(block.parameter, []).append(block)
        elif block.kind == LOOKUP:
            self.tables[block.parameter] = block
        else:
            self.vectors[block.parameter] = block
        if block.bias is not None:
            self.biases.setdefault(block.bias[0], []).append(block)

    @abstractmethod
    def accumulator(self, batch: int, names: Any = None) -> BlockAccumulator:
        """What takes the gradients of a batch."""

    @property
    def is_tied(self) -> bool:
        """Whether a parameter is both a weight and a table: its gradient is not known apart."""
        return bool(set(self.weights) & set(self.tables))

    def outer_of(
        self,
        name: str,
        start: int,
        shape: tuple[int, int],
        bias: tuple[str, list[int], int] | None,
    ) -> Block:
        """The block of factors of this shape, and of the bias that comes with them.

        Raises:
            CoverageError: If there is none, as in the other two.
        """
        found = _there(name, self.outer.get((name, start)))
        if found.shape != tuple(shape):
            raise _unseen(f"{name} as {list(shape)}, which was {list(found.shape)} then")
        return found

    def table_of(self, name: str, shape: Sequence[int]) -> Block:
        """The block of a table."""
        return _there(name, self.tables.get(name))

    def vector_of(self, name: str, shape: Sequence[int]) -> Block | None:
        """The block of a parameter that is no weight; None if it comes with a weight."""
        return _there(name, self.vectors.get(name))


class BlockAccumulator(ABC):
    """Takes the gradients of one batch, and hands each to its block.

    Args:
        blocks: Which block takes what.
        batch: How many samples.
    """

    def __init__(self, blocks: BlockMap, batch: int) -> None:
        self.map = blocks
        self.batch = batch

    @abstractmethod
    def outer(
        self, block: Block, left: Tensor, right: Tensor, first: int, *, bias: bool
    ) -> bool | None:
        """Σ_t left[t] right[t]ᵀ of the samples from `first` on, of the bias as well if `bias`.

        Returns:
            True if all values are known to be finite by now: they are not looked at again.
        """

    @abstractmethod
    def bias(self, block: Block, values: Tensor) -> None:
        """[batch, length] of the bias of a weight."""

    @abstractmethod
    def lookup(self, block: Block, indices: Tensor, values: Tensor) -> None:
        """values[t] for row indices[t] of a table; -1 for none."""

    @abstractmethod
    def formed(self, block: Block, values: Tensor) -> None:
        """[batch, rows, columns] of a block."""

    def add(
        self, name: str, shape: Sequence[int], values: NDArray[np.float32], start: int = 0
    ) -> list[int]:
        """Takes [batch, values] of one parameter, from its value `start` on.

        Returns:
            The rows that are not finite.
        """
        flat = torch.from_numpy(values)
        for block in self.map.biases.get(name, ()):
            if block.bias is not None:
                self.bias(block, _placed(flat, start, *block.bias[1:]))
        for block in self.map.weights.get(name, ()):
            part = _placed(flat, start, block.start, math.prod(block.shape))
            self.formed(block, part.reshape(len(part), *block.shape))
        if name in self.map.tables and name not in self.map.weights:
            self.formed(self.map.tables[name], flat.reshape(len(flat), *shape))
        if name not in self.map.biases and name not in self.map.weights | self.map.tables:
            vector = self.map.vector_of(name, shape)
            if vector is not None:
                self.formed(vector, _placed(flat, start, 0, vector.shape[0])[..., None])
        return bad_rows(flat)

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
        """Takes Σ_t left[t] right[t]ᵀ of [batch, terms, rows] and [batch, terms, columns].

        Args:
            name: Canonical name of the parameter.
            shape: Shape of the parameter.
            left: The left factors.
            right: The right factors.
            start: First value of the block in the parameter.
            first: The row of the first sample.
            total: [rows, columns], to which the sum of all samples' matrices is added.
            bias: (name, shape, first value) of a parameter whose gradient is Σ_t left[t].

        Returns:
            The rows that are not finite.
        """
        factors = torch.from_numpy(left), torch.from_numpy(right)
        if total is not None:
            whole = torch.from_numpy(total)
            whole += factors[0].flatten(0, 1).T @ factors[1].flatten(0, 1)
        sizes = left.shape[2], right.shape[2]
        block = self.map.outer_of(name, start, sizes, bias)
        joined = bias is not None and block.bias is not None
        joined = joined and block.ones == "right" and block.bias[:2] == (bias[0], bias[2])  # type: ignore[index]
        finite = self.outer(block, *factors, first, bias=joined)
        if bias is not None and not joined:
            with np.errstate(all="ignore"):  # what is not finite is named below
                summed = left.sum(1)
            self.add(bias[0], bias[1], summed, bias[2])
        if finite:
            return []
        # A product of what is not finite is not finite, but for zeros: so both sides are looked at.
        return bad_rows(factors[0], first) + bad_rows(factors[1], first)

    def add_lookup(
        self,
        name: str,
        shape: Sequence[int],
        indices: NDArray[np.int64],
        values: NDArray[np.float32],
        ignored: int | None,
    ) -> list[int]:
        """Takes values[t] for row indices[t] of a table, [batch, terms] and [batch, terms, width].

        Returns:
            The rows that are not finite.
        """
        given, table = torch.from_numpy(values), torch.from_numpy(indices)
        block = self.map.table_of(name, shape)
        if ignored is not None:
            table = torch.where(table == ignored, -1, table)
        self.lookup(block, table, given)
        return bad_rows(given)


def _there(name: str, block: Block | None) -> Block:
    if block is None:
        raise _unseen(f"{name}, which had none then")
    return block


def _unseen(what: str) -> CoverageError:
    return CoverageError(
        "factors must be fitted to examples that reach every layer in the way that others do, got "
        f"a gradient in {what}; fit to more examples, or leave the layer out with layers="
    )


def bad_rows(values: Tensor, first: int = 0) -> list[int]:
    """The rows that hold a NaN or an infinity, or a sum that overflows."""
    if torch.isfinite(values.sum()):
        return []
    wrong = ~torch.isfinite(values.flatten(1)).all(1)
    return [first + int(row) for row in torch.nonzero(wrong).flatten()]


def _placed(values: Tensor, start: int, first: int, size: int) -> Tensor:
    """[batch, size] the values from `first` on, of [batch, n] that begin at `start`; else zero."""
    if start == first and values.shape[1] == size:
        return values
    found = torch.zeros(len(values), size, dtype=values.dtype)
    begin, end = max(start, first), min(start + values.shape[1], first + size)
    if begin < end:
        found[:, begin - first : end - first] = values[:, begin - start : end - start]
    return found
