"""Second moments of an optimizer as a preconditioner: gradients as the optimizer saw them.

Adam divides a step by √v + ε (Kingma and Ba, arXiv 1412.6980); Adafactor keeps of a matrix the sums
of v over rows and columns alone, v ≈ r cᵀ / Σ r (Shazeer and Stern, arXiv 1804.04235). With the
latter a linear layer's factors are scaled on their own, and no gradient is formed (as in Chang et
al., "Scalable influence and fact tracing", arXiv 2410.17413).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from whence.errors import ArgumentError
from whence.gradients.blocks import bad_rows
from whence.gradients.structure import canonical_parameters
from whence.sketch import Accumulator, Sketch


@dataclass(frozen=True, eq=False)
class Moments:
    """What gradients are divided by.

    Attributes:
        whole: Parameter -> [shape] divisors.
        factored: Parameter -> ([rows], [columns]) divisors of a matrix, whose products they are.
    """

    whole: Mapping[str, Tensor]
    factored: Mapping[str, tuple[Tensor, Tensor]]

    def __repr__(self) -> str:
        return (
            f"<second moments of {len(self.whole)} parameters, and of rows and columns of "
            f"{len(self.factored)} matrices>"
        )


def moments_of(optimizer: torch.optim.Optimizer, model: nn.Module) -> Moments:
    """The second moments in the state of Adam, AdamW, RMSprop or Adafactor.

    Bias-corrected as the optimizer's next step would see them, with its ε.

    Args:
        optimizer: The user's optimizer, after at least one step.
        model: The model whose parameters it has.

    Raises:
        ArgumentError: If a trainable parameter has no second moment in it.
    """
    whole: dict[str, Tensor] = {}
    factored: dict[str, tuple[Tensor, Tensor]] = {}
    groups = {id(each): group for group in optimizer.param_groups for each in group["params"]}
    for parameter in dict.fromkeys(canonical_parameters(model).values()):
        tensor = parameter.tensor
        if not tensor.requires_grad:
            continue
        state, group = optimizer.state.get(tensor, {}), groups.get(id(tensor), {})
        epsilon = group.get("eps", 1e-8)
        if isinstance(epsilon, (tuple, list)):  # Adafactor's first is of squares
            epsilon = None if epsilon[0] is None else epsilon[0] ** 0.5
        epsilon = epsilon or 1e-8
        if "exp_avg_sq" in state:
            step = float(state.get("step", 1))
            decay = group["betas"][1] if "betas" in group else 0.0
            corrected = state["exp_avg_sq"].double() / (1 - decay**step)
            whole[parameter.name] = (corrected.sqrt() + epsilon).float()
        elif "square_avg" in state:
            whole[parameter.name] = (state["square_avg"].double().sqrt() + epsilon).float()
        elif (rows := _first(state, "row_var", "exp_avg_sq_row")) is not None:
            columns = _first(state, "col_var", "exp_avg_sq_col")
            if columns is None:
                raise ArgumentError(
                    f"optimizer must have second moments of {parameter.name}, got rows alone"
                )
            rows, columns = rows.double().flatten(), columns.double().flatten()
            left = (rows / rows.mean().clamp(min=1e-30)).sqrt() + epsilon
            factored[parameter.name] = left.float(), (columns.sqrt() + epsilon).float()
        elif (variance := _first(state, "variance", "exp_avg_sq")) is not None:
            whole[parameter.name] = (variance.double().sqrt() + epsilon).float()
        else:
            raise ArgumentError(
                f"optimizer must have second moments of {parameter.name}, got none: it is not of "
                "Adam's or Adafactor's kind, or has made no step yet"
            )
    return Moments(whole, factored)


def _first(state: Mapping[str, Any], *names: str) -> Tensor | None:
    return next((state[name] for name in names if isinstance(state.get(name), Tensor)), None)


class Divided:
    """A sketch of gradients that were divided by second moments.

    Args:
        sketch: The sketch.
        moments: What gradients are divided by; those of other parameters are taken as they are.
    """

    def __init__(self, sketch: Sketch, moments: Moments) -> None:
        self.sketch = sketch
        self.whole = {name: 1 / each.cpu().flatten() for name, each in moments.whole.items()}
        self.factored = {
            name: (1 / left.cpu(), 1 / right.cpu())
            for name, (left, right) in moments.factored.items()
        }

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
            found += self.add(bias[0], bias[1], left.sum(1), bias[2])
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
