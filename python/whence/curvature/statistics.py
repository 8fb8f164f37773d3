"""What passes over the data gather: covariances of both sides, and second moments in their basis.

For a weight with inputs a_t and output gradients δ_t (Martens and Grosse, "Optimizing neural
networks with Kronecker-factored approximate curvature", arXiv 1503.05671; George et al., "Fast
approximate natural gradient descent in a Kronecker-factored eigenbasis", arXiv 1806.03884):

    A = mean_t a_t a_tᵀ    S = mean_t δ_t δ_tᵀ    Λ = mean_examples (Q_Sᵀ (Σ_t δ_t a_tᵀ) Q_A)²

A holds a constant one for the bias. Positions whose δ is all zero, such as padding, do not count.
The A of a table is diagonal, for its inputs are one-hot: its eigenvectors are the rows themselves.
Any other parameter has the covariance of its whole gradient, or if it is long only the diagonal.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from whence.curvature.spectra import eigh
from whence.gradients.blocks import (
    LOOKUP,
    OUTER,
    VECTOR,
    Block,
    BlockAccumulator,
    BlockMap,
    Side,
)

LONGEST_VECTOR = 1024
"""Parameters that are no weights have a whole covariance up to this many values."""

PRODUCTS = 1 << 24
"""Products of both sides are formed for as many samples at a time as fit in 128 MiB."""


@dataclass(eq=False)
class Covariance:
    """Sums over positions of one side's x xᵀ, stretch by stretch.

    Attributes:
        ranges: (first, end) of each stretch.
        sums: [length, length] float64 of each; the last with a constant one, if there is one.
        one: Whether there is.
    """

    ranges: list[tuple[int, int]]
    sums: list[Tensor]
    one: bool = False

    @classmethod
    def of(cls, length: int, longest: int, *, one: bool = False) -> Covariance:
        """Zeros for a side of this length, in stretches that are at most `longest`."""
        count = -(-length // longest)
        edges = [length * part // count for part in range(count + 1)]
        ranges = list(pairwise(edges))
        sizes = [end - first for first, end in ranges]
        sizes[-1] += one
        zeros = [torch.zeros(size, size, dtype=torch.float64) for size in sizes]
        return cls(ranges, zeros, one)

    def add(self, values: Tensor, weights: Tensor | None = None) -> None:
        """Takes [terms, length]; with [terms] weights of 0 or 1."""
        for place, ((first, end), total) in enumerate(zip(self.ranges, self.sums, strict=True)):
            part = values[:, first:end]
            counted = part if weights is None else part * weights[:, None]
            size = end - first
            total[:size, :size] += (counted.T @ part).double()
            if self.one and place == len(self.sums) - 1:
                sums = counted.double().sum(0)
                total[:size, size] += sums
                total[size, :size] += sums
                total[size, size] += len(values) if weights is None else weights.double().sum()

    def side(self, name: str, dtype: torch.dtype) -> tuple[Side, Tensor]:
        """Eigenvectors, largest first in each stretch, and [columns] float64 eigenvalues.

        Raises:
            NotFiniteError: If the covariance, which is called `name`, is not finite.
        """
        parts, values, ones = [], [], []
        for (first, end), total in zip(self.ranges, self.sums, strict=True):
            eigenvalues, vectors = eigh(name, total)
            values.append(eigenvalues.flip(0).clamp(min=0))
            vectors = vectors.flip(1)
            size = end - first
            parts.append((first, end, vectors[:size].to(dtype).contiguous()))
            ones.append(
                vectors[size] if len(vectors) > size else torch.zeros(len(vectors)).double()
            )
        joined = torch.cat(ones).to(dtype) if self.one else None
        return Side(parts, joined), torch.cat(values)


@dataclass(eq=False)
class BlockStatistics:
    """What is known of one block.

    Attributes:
        block: The block; with its eigenvectors, once they are found.
        left: Covariance of the left side; None for a vector that is taken as it is.
        right: Covariance of the right side of a weight.
        terms: Positions counted.
        kronecker: [left, right] products of both sides' eigenvalues, as K-FAC has them, of the
            gradient of an example.
        squares: [left, right] sum over examples of squared gradients in the eigenbasis.
    """

    block: Block
    left: Covariance | None
    right: Covariance | None
    terms: float = 0.0
    kronecker: Tensor | None = None
    squares: Tensor | None = None

    def rotate(self, examples: int, dtype: torch.dtype) -> BlockStatistics:
        """The same with eigenvectors, and room for second moments.

        Raises:
            NotFiniteError: If a covariance is not finite.
        """
        name = f"covariance of {self.block.parameter}"
        first = second = None
        values: tuple[Tensor | None, Tensor | None] = (None, None)
        if self.left is not None:
            first, left_values = self.left.side(name, dtype)
            values = (left_values, None)
        if self.right is not None:
            second, right_values = self.right.side(name, dtype)
            values = (values[0], right_values)
        block = replace(self.block, left=first, right=second)
        kronecker = None
        if block.kind == OUTER and values[0] is not None and values[1] is not None:
            # E ΣΣ δ δᵀ ⊗ a aᵀ, positions taken as independent: one sum of S, one mean of A.
            scale = 1.0 / max(self.terms, 1.0) / max(examples, 1)
            kronecker = torch.outer(values[0], values[1]) * scale
        squares = torch.zeros(block.values, dtype=torch.float64)
        return replace(self, block=block, kronecker=kronecker, squares=squares)


@dataclass(eq=False)
class Statistics(BlockMap):
    """All blocks of a model, at one checkpoint.

    Attributes:
        longest: Sides are cut in stretches that are at most so long.
        known: Block's key -> what is known of it.
        pairs: Weight -> (bias or None, side of the inputs), where rules may give the two apart.
        examples: How many examples were seen in the first pass, and in the second.
        dtype: Type of the gradients, and so of the eigenvectors.
    """

    wide = True

    longest: int
    pairs: dict[str, tuple[str | None, str]] = field(default_factory=dict)
    known: dict[tuple[str, int, str], BlockStatistics] = field(default_factory=dict)
    examples: list[int] = field(default_factory=lambda: [0, 0])
    dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        super().__init__(each.block for each in self.known.values())

    @property
    def is_rotated(self) -> bool:
        """Whether eigenvectors are known."""
        return any(each.squares is not None for each in self.known.values())

    def rotated(self) -> Statistics:
        """The same with eigenvectors, ready for the second pass. O(length³) for each side."""
        others = self.weights | self.tables  # of which a gradient that came first made a vector
        known = {
            key: each.rotate(self.examples[0], self.dtype)
            for key, each in self.known.items()
            if each.block.kind != VECTOR or each.block.parameter not in others
        }
        return Statistics(self.longest, self.pairs, known, [self.examples[0], 0], self.dtype)

    def widen(self, dtype: torch.dtype) -> None:
        """Notes the type of a gradient: float64 once one is."""
        self.dtype = torch.promote_types(self.dtype, dtype)

    def accumulator(self, batch: int, names: Any = None) -> BlockAccumulator:
        """What takes a batch in the present pass."""
        return _Squares(self, batch) if self.is_rotated else _Covariances(self, batch)

    @staticmethod
    def fold(accumulator: Any, factor: float) -> None:
        """Takes a batch over, its gradients times `factor`."""
        accumulator.fold(factor)

    def outer_of(
        self,
        name: str,
        start: int,
        shape: tuple[int, int],
        bias: tuple[str, list[int], int] | None,
    ) -> Block:
        """The block of these factors, new if it was not seen before."""
        if (name, start) in self.outer or self.is_rotated:
            return super().outer_of(name, start, shape, bias)
        pair, ones = None, "right"
        if name in self.pairs:
            other, ones = self.pairs[name]
            length = shape[1] if ones == "left" else shape[0]
            before = start // shape[1] if ones == "right" else 0  # groups of a convolution
            pair = None if other is None else (other, before, length)
        elif bias is not None and not self._has(bias[0], bias[2]):
            pair = (bias[0], bias[2], shape[0])
        block = Block(name, start, OUTER, shape, pair, ones)
        self._take(
            block,
            Covariance.of(shape[0], self.longest, one=block.has_one("left")),
            Covariance.of(shape[1], self.longest, one=block.has_one("right")),
        )
        return block

    def table_of(self, name: str, shape: Sequence[int]) -> Block:
        """The block of a table, new if it was not seen before."""
        if name not in self.tables and not self.is_rotated:
            block = Block(name, 0, LOOKUP, (shape[0], shape[1]))
            self._take(block, Covariance.of(shape[1], self.longest), None)
        return super().table_of(name, shape)

    def vector_of(self, name: str, shape: Sequence[int]) -> Block | None:
        """The block of another parameter, new if it was not seen before."""
        if name not in self.vectors and not self.is_rotated:
            if any(name == bias for bias, _ in self.pairs.values()):
                return None  # its weight comes later, and counts it
            length = math.prod(shape)
            block = Block(name, 0, VECTOR, (length, 1))
            whole = length <= LONGEST_VECTOR
            self._take(block, Covariance.of(length, length) if whole else None, None)
        return super().vector_of(name, shape)

    def _has(self, bias: str, first: int) -> bool:
        """Whether a block has these values of a bias already."""
        return any(
            block.bias == (bias, first, block.shape[0]) for block in self.biases.get(bias, ())
        )

    def _take(self, block: Block, left: Covariance | None, right: Covariance | None) -> None:
        self.append(block)
        self.known[block.key] = BlockStatistics(block, left, right)


@dataclass(eq=False)
class At:
    """Factors at one checkpoint.

    Attributes:
        name: Of the checkpoint.
        digest: Of its weights.
        weight: Of the checkpoint in a combined score.
        statistics: What was gathered of each block.
    """

    name: str
    digest: str
    weight: float
    statistics: Statistics


class _Covariances(BlockAccumulator):
    """The first pass: sums over positions."""

    map: Statistics

    def __init__(self, statistics: Statistics, batch: int) -> None:
        super().__init__(statistics, batch)
        self._left: list[tuple[Covariance, Tensor]] = []
        self._vectors: dict[tuple[str, int, str], Tensor] = {}

    def outer(self, block: Block, left: Tensor, right: Tensor, first: int, *, bias: bool) -> None:
        """Both sides' covariances."""
        known = self.map.known[block.key]
        left, right = left.flatten(0, 1), right.flatten(0, 1)
        outputs, inputs = (right, left) if block.ones == "left" else (left, right)
        counted = (outputs != 0).any(1).to(inputs.dtype)
        known.terms += float(counted.sum())
        self.map.widen(inputs.dtype)
        sides = (known.right, known.left) if block.ones == "left" else (known.left, known.right)
        if sides[0] is not None and sides[1] is not None:
            self._left.append((sides[0], outputs))
            sides[1].add(inputs, counted)

    def bias(self, block: Block, values: Tensor) -> None:
        """Nothing: the constant one is counted with the weight's inputs."""

    def lookup(self, block: Block, indices: Tensor, values: Tensor) -> None:
        """The covariance of a row's gradient."""
        known = self.map.known[block.key]
        flat = values.flatten(0, 1)
        self.map.widen(values.dtype)
        given = flat * (indices.reshape(-1, 1) >= 0)
        known.terms += float((given != 0).any(1).sum())
        if known.left is not None:
            self._left.append((known.left, given))

    def formed(self, block: Block, values: Tensor) -> None:
        """The whole gradient of each example."""
        flat = values.flatten(1)
        found = self._vectors.get(block.key)
        self._vectors[block.key] = flat.clone() if found is None else found + flat

    def fold(self, factor: float) -> None:
        """Takes the batch over, its gradients times `factor`."""
        for covariance, values in self._left:
            covariance.add(values * factor)
        for key, values in self._vectors.items():
            known = self.map.known[key]
            if known.block.kind == OUTER:  # whose factors are not known: its layers' own decide
                continue
            if known.block.kind == LOOKUP:
                values = values.reshape(-1, known.block.shape[1])
            known.terms += float((values != 0).any(1).sum())
            if known.left is not None:
                known.left.add(values * factor)
        self.map.examples[0] += self.batch


class _Squares(BlockAccumulator):
    """The second pass: squared gradients of examples in the eigenbasis."""

    map: Statistics

    def __init__(self, statistics: Statistics, batch: int) -> None:
        super().__init__(statistics, batch)
        self._factors: dict[tuple[str, int, str], list[tuple[int, Tensor, Tensor]]] = {}
        self._formed: dict[tuple[str, int, str], Tensor] = {}
        self._looked_up: dict[tuple[str, int, str], list[tuple[Tensor, Tensor]]] = {}

    def outer(self, block: Block, left: Tensor, right: Tensor, first: int, *, bias: bool) -> None:
        """Keeps both factors in the eigenbasis."""
        factors = block.projected(left, right, bias=bias)
        self._factors.setdefault(block.key, []).append((first, *factors))

    def bias(self, block: Block, values: Tensor) -> None:
        """One term more."""
        self._factors.setdefault(block.key, []).append((0, *block.biased(values)))

    def lookup(self, block: Block, indices: Tensor, values: Tensor) -> None:
        """Keeps the rows that were looked up."""
        if block.left is not None:
            kept = (indices, block.left.project(values))
            self._looked_up.setdefault(block.key, []).append(kept)

    def formed(self, block: Block, values: Tensor) -> None:
        """Keeps the whole gradient: of a weight as its product with one, of a table row by row."""
        now = block.formed(values)
        if block.kind == OUTER:
            one = torch.eye(now.shape[1], dtype=now.dtype).expand(len(now), -1, -1)
            self._factors.setdefault(block.key, []).append((0, one, now))
        elif block.kind == LOOKUP:
            every = torch.arange(now.shape[2]).expand(len(now), -1)
            self._looked_up.setdefault(block.key, []).append((every, now.mT))
        else:
            found = self._formed.get(block.key)
            self._formed[block.key] = now if found is None else found + now

    def fold(self, factor: float) -> None:
        """Takes the batch over, its gradients times `factor`."""
        scale = factor**2
        for key, factors in self._factors.items():
            squares = self.map.known[key].squares
            if squares is not None:
                squares += _squared_products(factors, self.batch) * scale
        for key, values in self._formed.items():
            squares = self.map.known[key].squares
            if squares is not None:
                squares += values.double().square().sum(0) * scale
        for key, looked_up in self._looked_up.items():
            squares = self.map.known[key].squares
            if squares is not None:
                _add_looked_up(squares, looked_up, scale)
        self.map.examples[1] += self.batch


def _squared_products(factors: list[tuple[int, Tensor, Tensor]], batch: int) -> Tensor:
    """[left, right] Σ over samples of (Σ_t left[t] right[t]ᵀ)², over all uses of a weight."""
    if len(factors) == 1 and factors[0][1].shape[1] == 1:  # of one term the square is a product
        _, left, right = factors[0]
        return (left[:, 0].square().T @ right[:, 0].square()).double()
    wide, other = factors[0][1].shape[2], factors[0][2].shape[2]
    total = torch.zeros(wide, other, dtype=torch.float64)
    step = max(1, PRODUCTS // (wide * other))
    for at in range(0, batch, step):
        end = min(at + step, batch)
        formed = torch.zeros(end - at, wide, other, dtype=factors[0][1].dtype)
        for first, left, right in factors:
            begin, last = max(at, first), min(end, first + len(left))
            if begin < last:
                mine = slice(begin - first, last - first)
                formed[begin - at : last - at] += left[mine].mT @ right[mine]
        total += formed.square_().sum(0)
    return total


def _add_looked_up(squares: Tensor, looked_up: list[tuple[Tensor, Tensor]], scale: float) -> None:
    """Adds squares of the sums over equal rows of a table, sample by sample."""
    rows = squares.shape[1]
    places, values = [], []
    for indices, given in looked_up:
        sample = torch.arange(len(indices))[:, None].expand_as(indices)
        mask = indices >= 0
        places.append((sample * rows + indices)[mask])
        values.append(given[mask])
    unique, inverse = torch.unique(torch.cat(places), return_inverse=True)
    joined = torch.cat(values)
    sums = torch.zeros(len(unique), joined.shape[1], dtype=joined.dtype)
    sums.index_add_(0, inverse, joined)
    squares.index_add_(1, unique % rows, sums.double().square().T * scale)
