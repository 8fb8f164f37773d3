"""Representer points: the last layer's logits as a sum over the training data."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from whence import _arrays
from whence._interrupts import interruptible
from whence.errors import ArgumentError, LayerError
from whence.gradients.blocks import LOOKUP, OUTER, Block, BlockAccumulator, BlockMap
from whence.methods.method import Closure, Method
from whence.methods.run import Run
from whence.sketch import canonical_name


class RepresenterPoints(Method):
    """Each example's share in the query's logit, as the last linear layer has it.

    Of a last layer trained to a minimum with an L2 penalty, the logits are

        φ_t = Σ_i α_i (f_i · f_t),    α_i = −1 / (2 λ N) ∂L_i/∂φ_i

    (Yeh et al., "Representer point selection for explaining deep neural networks", NeurIPS 2018).
    The score is the share in the loss's downhill direction, −∂L_t/∂φ_t · α_i (f_i · f_t): positive
    where the example lifts the logits whose rise lowers the query's loss. It is the representer
    theorem only as far as the layer is at its minimum; the scale depends on λ.

    Time O(examples · queries · (features + classes)).

    Args:
        layer: Name of the last linear layer.
        weight_decay: λ; for an optimizer whose penalty is λ/2 |W|², half of its weight_decay.
    """

    name = "representer points: the last layer's logits as a sum over examples"
    unit = "loss, to first order in the logits"

    def __init__(self, layer: str, weight_decay: float) -> None:
        self._layer = layer
        self._decay = _arrays.number("weight_decay", weight_decay, positive=True)
        self._left: Tensor | None = None
        self._right: Tensor | None = None

    def _fit(self, run: Run) -> None:
        names = {canonical_name(name): each for name, each in run.model.named_modules()}
        if not isinstance(names.get(self._layer), nn.Linear):
            raise ArgumentError(f"layer must be the name of a Linear, got {self._layer!r}")
        left, right = [], []
        with run.at(run.last):
            for seen in run.training(_Factors(self._weight)):
                factors = _factors_of(seen.capture.accumulator)
                left.append(factors[0] * seen.factor)
                right.append(factors[1])
        self._left, self._right = torch.cat(left), torch.cat(right)

    @property
    def _weight(self) -> str:
        return f"{self._layer}.weight"

    def _scores(self, closure: Closure) -> NDArray[np.float32]:
        if self._left is None or self._right is None:
            raise ArgumentError("factors must be fitted, got None")
        with self.run.at(self.run.last):
            seen = self.run.queries(_Factors(self._weight), closure)
            left, right = _factors_of(seen.capture.accumulator)
        unit = 2 * self._decay * len(self._left)
        return interruptible(_products, left * seen.factor, right, self._left, self._right, unit)


def _products(
    left: Tensor, right: Tensor, its_left: Tensor, its_right: Tensor, unit: float
) -> NDArray[np.float32]:
    """[queries, examples] of products of outer products, in a unit."""
    found: NDArray[np.float32] = ((left @ its_left.T) * (right @ its_right.T)).numpy()
    return found / np.float32(unit)


class _Factors(BlockMap):
    """A map that keeps both factors of one weight."""

    def __init__(self, weight: str) -> None:
        super().__init__()
        self.weight = weight

    def accumulator(self, batch: int, names: object = None) -> _Accumulator:
        return _Accumulator(self, batch)

    def outer_of(
        self,
        name: str,
        start: int,
        shape: tuple[int, int],
        bias: tuple[str, list[int], int] | None,
    ) -> Block:
        return Block(name, start, OUTER, shape)

    def table_of(self, name: str, shape: Sequence[int]) -> Block:
        return Block(name, 0, LOOKUP, (shape[0], shape[1]))

    def vector_of(self, name: str, shape: Sequence[int]) -> Block | None:
        return None


class _Accumulator(BlockAccumulator):
    def __init__(self, blocks: _Factors, batch: int) -> None:
        super().__init__(blocks, batch)
        self._weight = blocks.weight
        self.factors: tuple[Tensor, Tensor] | None = None

    def outer(self, block: Block, left: Tensor, right: Tensor, first: int, *, bias: bool) -> None:
        if block.parameter != self._weight:
            return
        if left.shape[1] != 1:
            raise LayerError(
                f"layer must see one position an example, got {left.shape[1]} in {block.layer}"
            )
        self.factors = left[:, 0].clone(), right[:, 0].clone()

    def bias(self, block: Block, values: Tensor) -> None:
        pass

    def lookup(self, block: Block, indices: Tensor, values: Tensor) -> None:
        pass

    def formed(self, block: Block, values: Tensor) -> None:
        pass


def _factors_of(accumulator: object) -> tuple[Tensor, Tensor]:
    if not isinstance(accumulator, _Accumulator) or accumulator.factors is None:
        raise LayerError("layer must run in the loss, got one without a gradient")
    return accumulator.factors
