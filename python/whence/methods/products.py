"""Exact inner products of recomputed gradients: of queries, kept whole, with the training data.

With W the gradient of a query, as it is or preconditioned, an example's score is

    Σ over layers of ⟨W, Σ_t δ_t a_tᵀ⟩ = Σ_t δ_tᵀ W a_t

so that the training data's gradients exist one batch at a time, and no store is needed. Of a layer
that sees many positions, W can be cut to a few singular vectors (Grosse et al., "Studying large
language model generalization with influence functions", arXiv 2308.03296, section 3.2.2).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from whence._interrupts import interruptible
from whence.curvature.statistics import Statistics
from whence.errors import ArgumentError
from whence.gradients.blocks import LOOKUP, OUTER, Block, BlockAccumulator

Key = tuple[str, int, str]


class Whole(Statistics):
    """A map that keeps each sample's gradient whole, block by block, with its bias beside it.

    Attributes:
        by_token: Whether each position is a sample of its own; of weights and tables alone.
    """

    by_token = False

    def accumulator(self, batch: int, names: Any = None) -> WholeAccumulator:
        """Zeros for a batch."""
        return WholeAccumulator(self, batch)

    def _take(self, block: Block, left: Any, right: Any) -> None:
        self.append(block)


class WholeAccumulator(BlockAccumulator):
    """The whole gradients of one batch.

    Attributes:
        weights: Block -> [batch, rows, columns].
        biases: Block -> [batch, length] of the bias that goes with it.
    """

    def __init__(self, blocks: Whole, batch: int) -> None:
        super().__init__(blocks, batch)
        self.weights: dict[Key, Tensor] = {}
        self.biases: dict[Key, Tensor] = {}
        self.terms = 1
        self._apart = blocks.by_token

    def _take_apart(self, *values: Tensor) -> list[Tensor]:
        """[batch, terms, ...] as [batch · terms, 1, ...].

        Raises:
            ArgumentError: If another layer saw other positions.
        """
        terms = values[0].shape[1]
        if self.weights and terms != self.terms:
            raise ArgumentError(
                "the model must have layers that all see the same positions for scores by token, "
                f"got {self.terms} and {terms}"
            )
        if not self.weights:
            self.terms, self.batch = terms, self.batch * terms
        return [each.flatten(0, 1)[:, None] for each in values]

    def outer(self, block: Block, left: Tensor, right: Tensor, first: int, *, bias: bool) -> None:
        """Forms the product of both factors."""
        if self._apart:
            left, right = self._take_apart(left, right)
        formed = left.mT @ right
        if first or len(left) < self.batch:
            whole = formed.new_zeros(self.batch, *formed.shape[1:])
            whole[first : first + len(left)] = formed
            formed = whole
        self._add(self.weights, block, formed)
        if bias:
            sums = left.new_zeros(self.batch, left.shape[2])
            sums[first : first + len(left)] = left.sum(1)
            self._add(self.biases, block, sums)

    def bias(self, block: Block, values: Tensor) -> None:
        """Keeps it."""
        if not self._apart:
            self._add(self.biases, block, values)

    def lookup(self, block: Block, indices: Tensor, values: Tensor) -> None:
        """Sums over equal rows of the table."""
        if self._apart:
            indices, values = self._take_apart(indices, values)
        rows = block.shape[0]
        mask = indices >= 0
        sample = torch.arange(self.batch)[:, None].expand_as(indices)
        formed = values.new_zeros(self.batch * rows, block.shape[1])
        formed.index_add_(0, (sample * rows + indices)[mask], values[mask])
        self._add(self.weights, block, formed.reshape(self.batch, *block.shape))

    def formed(self, block: Block, values: Tensor) -> None:
        """Keeps it; not where positions are kept apart, which it does not tell apart."""
        if not self._apart:
            self._add(self.weights, block, values.reshape(len(values), *block.shape))

    @staticmethod
    def _add(into: dict[Key, Tensor], block: Block, values: Tensor) -> None:
        into[block.key] = into[block.key] + values if block.key in into else values.clone()


class Products(Whole):
    """A map to the inner products with whole gradients of queries, layer by layer.

    Args:
        queries: What `WholeAccumulator` gathered, or that preconditioned.
        rank: Singular vectors that stand for a query's gradient where that is cheaper; None for
            all.
        squares: Whether to sum the squares of the examples' own gradients as well.
        by_token: Whether to keep the products of positions apart; of weights and tables alone.
    """

    def __init__(
        self,
        queries: WholeAccumulator,
        *,
        rank: int | None = None,
        squares: bool = False,
        by_token: bool = False,
    ) -> None:
        whole = queries.map
        if not isinstance(whole, Statistics):
            raise TypeError("queries must be of a map that keeps gradients whole")
        super().__init__(whole.longest, whole.pairs)
        for block in whole.blocks:
            self.append(block)
        self.count = queries.batch
        self.squares = squares
        self.by_token = by_token
        self.asked = {key: value.flatten(1) for key, value in queries.weights.items()}
        self.asked_biases: Mapping[Key, Tensor] = queries.biases
        self.low: dict[Key, tuple[Tensor, Tensor]] = {}
        if rank is not None:
            for block in self.blocks:
                whole_gradient = queries.weights.get(block.key)
                if block.kind == OUTER and whole_gradient is not None and rank < min(block.shape):
                    self.low[block.key] = _cut(whole_gradient, rank)

    def accumulator(self, batch: int, names: Any = None) -> ProductsAccumulator:  # type: ignore[override]
        """Zeros for a batch."""
        return ProductsAccumulator(self, batch)


def _cut(values: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """[queries, rows, rank] and [queries, columns, rank] whose product is nearest."""
    left, singular, right = interruptible(torch.linalg.svd, values, full_matrices=False)
    return left[:, :, :rank] * singular[:, None, :rank], right[:, :rank].mT


class ProductsAccumulator(BlockAccumulator):
    """The products of one batch.

    Attributes:
        parts: Layer -> [queries, batch], not multiplied with anything.
        squares: [batch] squared norms, if they are wanted.
        tokens: [queries, batch, terms] of layers that see positions, if they are wanted.
    """

    map: Products

    def __init__(self, products: Products, batch: int) -> None:
        super().__init__(products, batch)
        self.parts: dict[str, Tensor] = {}
        self.squares = torch.zeros(batch)
        self.tokens: Tensor | None = None
        self._summed: dict[Key, tuple[Tensor, Block]] = {}

    def outer(self, block: Block, left: Tensor, right: Tensor, first: int, *, bias: bool) -> None:
        """Each query's δᵀ W a, summed over positions."""
        weight = self.map.asked.get(block.key)
        if weight is not None:
            if self.map.by_token:
                self._positions(block, left, right, bias=bias)
            terms, cost = left.shape[1], block.shape[0] * block.shape[1]
            low = self.map.low.get(block.key)
            if low is not None and terms * sum(block.shape) * low[0].shape[2] < cost:
                found = self._thin(*low, left, right)
            elif terms == 1:
                found = self._single(weight, left[:, 0], right[:, 0])
            else:
                found = weight @ (left.mT @ right).flatten(1).T
            self._add(block, found, first)
        if self.map.squares:
            formed = left.mT @ right if left.shape[1] > 1 else None
            self._square(block, left, right, formed, first)
        if bias:
            self._bias(block, left.sum(1), first)

    def bias(self, block: Block, values: Tensor) -> None:
        """Its share of the product."""
        self._bias(block, values, 0)

    def _bias(self, block: Block, values: Tensor, first: int) -> None:
        weight = self.map.asked_biases.get(block.key)
        if weight is not None:
            self._add(block, weight @ values.T, first)
        if self.map.squares:
            self.squares[first : first + len(values)] += values.square().sum(1)

    def lookup(self, block: Block, indices: Tensor, values: Tensor) -> None:
        """Each position's row of the query's gradient, times its own."""
        weight = self.map.asked.get(block.key)
        if weight is not None:
            rows = weight.reshape(self.map.count, *block.shape)[:, indices.clamp(min=0)]
            given = values * (indices >= 0)[..., None]
            found = (rows * given).sum(3)
            if self.map.by_token:
                self._token(found)
            self._add(block, found.sum(2), 0)
        if self.map.squares:
            kept = Whole(self.map.longest)
            whole = WholeAccumulator(kept, self.batch)
            whole.lookup(block, indices, values)
            self.squares += whole.weights[block.key].square().sum((1, 2))

    def formed(self, block: Block, values: Tensor) -> None:
        """A product with what is there already."""
        flat, weight = values.flatten(1), self.map.asked.get(block.key)
        if weight is not None:
            self._add(block, weight @ flat.T, 0)
        if self.map.squares:
            self.squares += flat.square().sum(1)

    def _single(self, weight: Tensor, left: Tensor, right: Tensor) -> Tensor:
        """[queries, batch] of one position an example."""
        formed = (left[:, :, None] * right[:, None]).flatten(1)
        return weight @ formed.T

    @staticmethod
    def _thin(one: Tensor, other: Tensor, left: Tensor, right: Tensor) -> Tensor:
        """[queries, batch] by the leading singular vectors of the queries."""
        queries, _, rank = one.shape
        first = left @ one.permute(1, 0, 2).flatten(1)
        second = right @ other.permute(1, 0, 2).flatten(1)
        products = (first * second).sum(1)
        return products.reshape(len(left), queries, rank).sum(2).T

    def _positions(self, block: Block, left: Tensor, right: Tensor, *, bias: bool) -> None:
        """[queries, batch, terms] of a weight, added to those of other layers."""
        weight = self.map.asked[block.key].reshape(self.map.count, *block.shape)
        found = torch.einsum("bto,qoi,bti->qbt", left, weight, right)
        shift = self.map.asked_biases.get(block.key)
        if bias and shift is not None:
            found += torch.einsum("bto,qo->qbt", left, shift)
        self._token(found)

    def _token(self, found: Tensor) -> None:
        if self.tokens is None:
            self.tokens = found.clone()
        elif self.tokens.shape == found.shape:
            self.tokens += found
        else:
            raise ValueError("layers must see the same positions for scores by token")

    def _square(
        self, block: Block, left: Tensor, right: Tensor, formed: Tensor | None, first: int
    ) -> None:
        if formed is None:
            found = left.square().sum((1, 2)) * right.square().sum((1, 2))
        else:
            found = formed.square().sum((1, 2))
        self.squares[first : first + len(left)] += found

    def _add(self, block: Block, found: Tensor, first: int) -> None:
        layer = block.layer
        if layer not in self.parts:
            self.parts[layer] = torch.zeros(self.map.count, self.batch)
        self.parts[layer][:, first : first + found.shape[1]] += found


def preconditioned(
    queries: WholeAccumulator,
    blocks: Mapping[Key, Block],
    damped: Mapping[Key, tuple[Tensor, float]],
) -> WholeAccumulator:
    """Whole gradients, multiplied with the inverse of EK-FAC's damped curvature.

    Q_S ((Q_Sᵀ G Q_A) / (Λ + damping)) Q_Aᵀ of each block (Grosse et al., arXiv 2308.03296, Eq. 20).

    Args:
        queries: The gradients; changed in place.
        blocks: Blocks with their eigenvectors.
        damped: Block -> eigenvalues and damping.
    """
    for key, values in queries.weights.items():
        block, (eigenvalues, damping) = blocks[key], damped[key]
        inverse = (eigenvalues + damping).reciprocal().to(values.dtype)
        turned = block.formed(values)
        bias = queries.biases.get(key)
        if bias is not None and block.bias is not None:
            left, right = block.biased(bias)
            turned = turned + left.mT @ right
        turned = turned * inverse
        if block.kind == OUTER:
            sides = block.sides
            back = sides[1].back(turned, block.shape[1])
            whole = sides[0].back(back.mT, block.shape[0]).mT
            rows, columns = block.shape
            queries.weights[key] = whole[:, :rows, :columns]
            if bias is not None and block.bias is not None:
                found = whole[:, :rows, -1] if block.ones == "right" else whole[:, -1, :columns]
                queries.biases[key] = found.contiguous()
        elif block.kind == LOOKUP and block.left is not None:
            queries.weights[key] = block.left.back(turned.mT, block.shape[1])
        else:
            flat = turned[..., 0]
            whole = flat if block.left is None else block.left.back(flat, block.shape[0])
            queries.weights[key] = whole[..., None]
    return queries
