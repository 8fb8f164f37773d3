"""Plain products of gradients: the weak baselines."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from whence.gradients.passes import pairs_of
from whence.methods.method import Closure, Method
from whence.methods.products import Products, ProductsAccumulator, Whole, WholeAccumulator
from whence.methods.run import Run

LONGEST = 1 << 30
"""Gradients that are not rotated are not cut."""


class GradientDot(Method):
    """The inner product of both loss gradients, exact, at the last checkpoint.

    What one step of gradient descent on the example takes off the query's loss, to first order.
    Time O(examples · queries · parameters); memory O(queries · parameters).
    """

    name = "gradient product, exact: no curvature, no preconditioning"
    unit = "loss per unit of learning rate"

    def _fit(self, run: Run) -> None:
        """Nothing: gradients are recomputed for each question."""

    def _checkpoints(self) -> dict[str, float]:
        """Which count, and how much."""
        return {self.run.last: 1.0}

    def _scores(self, closure: Closure) -> NDArray[np.float32]:
        total: NDArray[np.float64] | None = None
        for name, weight in self._checkpoints().items():
            with self.run.at(name):
                found = self._at(closure) * weight
            total = found if total is None else total + found
        return np.asarray(total, np.float32)

    def _at(self, closure: Closure) -> NDArray[np.float64]:
        """[queries, examples] at the present weights."""
        dots, _, _ = products(self.run, closure)
        return dots


class TracInCP(GradientDot):
    """The same summed over checkpoints, weighted by learning rates.

    Pruthi et al., "Estimating training data influence by tracing gradient descent", NeurIPS 2020,
    section 3.2, exact.
    """

    name = "TracInCP, exact: gradient products summed over checkpoints"
    unit = "loss: what a step on the example at each checkpoint takes off, to first order"

    def _checkpoints(self) -> dict[str, float]:
        return self.run.learning_rates


class GradientCosine(GradientDot):
    """The cosine of both loss gradients, exact, at the last checkpoint."""

    name = "cosine of gradients, exact: no curvature"
    unit = "cosine, from -1 to 1"

    def _at(self, closure: Closure) -> NDArray[np.float64]:
        dots, own, squares = products(self.run, closure, squares=True)
        norms = np.sqrt(own)[:, None] * np.sqrt(squares)
        found: NDArray[np.float64] = np.divide(
            dots, norms, out=np.zeros_like(dots), where=norms > 0
        )
        return found


def products(
    run: Run, closure: Closure, *, squares: bool = False
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """[queries, examples] products at the present weights; squared norms of both."""
    whole = Whole(LONGEST, dict(pairs_of(run.structure.layers)))
    asked = run.queries(whole, closure)
    queries = asked.capture.accumulator
    if not isinstance(queries, WholeAccumulator):
        raise TypeError("queries must be kept whole")
    own = sum(
        (
            each.double().flatten(1).square().sum(1)
            for each in [*queries.weights.values(), *queries.biases.values()]
        ),
        torch.zeros(queries.batch, dtype=torch.float64),
    )
    rows = Products(queries, squares=squares)
    dots, lengths = [], []
    for seen in run.training(rows):
        found = seen.capture.accumulator
        if not isinstance(found, ProductsAccumulator):
            raise TypeError("examples must be products")
        total = torch.stack(list(found.parts.values())).double().sum(0)
        dots.append(total.numpy() * seen.factor * asked.factor)
        lengths.append(found.squares.double().numpy() * seen.factor**2)
    return np.concatenate(dots, 1), own.numpy() * asked.factor**2, np.concatenate(lengths)
