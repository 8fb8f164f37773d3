"""Second moments of an optimizer as a preconditioner: gradients as the optimizer saw them.

Adam divides a step by √v + ε (Kingma and Ba, arXiv 1412.6980); Adafactor keeps of a matrix the sums
of v over rows and columns alone, v ≈ r cᵀ / Σ r (Shazeer and Stern, arXiv 1804.04235). With the
latter a linear layer's factors are scaled on their own, and no gradient is formed (as in Chang et
al., "Scalable influence and fact tracing", arXiv 2410.17413).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from whence.errors import ArgumentError, MismatchError
from whence.gradients.divided import Divided
from whence.gradients.preconditioned import LAYOUT, Prepared
from whence.gradients.structure import canonical_parameters
from whence.gradients.weights import digest
from whence.sketch import Sketch
from whence.store import SECOND_MOMENTS

WIDTH = 4096
"""Of rows, where none is asked for."""


@dataclass(frozen=True, eq=False)
class Moments:
    """What gradients are divided by, for `record(..., precondition=moments)` and `Less`.

    Of both the query's and the example's gradient, so that a score is Σ g g' / (√v + ε)².

    Attributes:
        digest: Of the weights that the optimizer had come to.
        whole: Parameter -> [shape] divisors.
        factored: Parameter -> ([rows], [columns]) divisors of a matrix, whose products they are.
    """

    digest: str
    whole: Mapping[str, Tensor]
    factored: Mapping[str, tuple[Tensor, Tensor]]

    def __repr__(self) -> str:
        return (
            f"<second moments of {len(self.whole)} parameters, and of rows and columns of "
            f"{len(self.factored)} matrices>"
        )

    def check(self, model: Mapping[str, Any], reduction: str) -> None:
        """Nothing, if there is a divisor of each recorded value; see `Preconditioner`.

        Raises:
            MismatchError: If not.
        """
        for parameter in model["parameters"]:
            name, shape = parameter["name"], list(parameter["shape"])
            there: list[int] | None = None
            if name in self.whole:
                there = list(self.whole[name].shape)
            elif name in self.factored:
                there = [len(side) for side in self.factored[name]]
            if there != shape:
                raise MismatchError(
                    f"precondition must have second moments of {name}, {shape}, got "
                    f"{'none' if there is None else there}"
                )

    def prepared(
        self, dim: int | None, sketch: str | Sketch | None, seed: int | None, *, turned: bool
    ) -> tuple[list[Prepared], dict[str, Any]]:
        """The map, and what a manifest says of it; see `Preconditioner`.

        Raises:
            ArgumentError: If coordinates are asked for as they are.
        """
        if dim == 0:
            raise ArgumentError("rotate must be True with second moments, got False")
        if not isinstance(sketch, Sketch):
            kind = "chunked_sjlt" if sketch is None else sketch
            sketch = Sketch(
                kind, dim=WIDTH if dim is None else dim, seed=0 if seed is None else seed
            )
        divided = Divided(sketch, self.whole, self.factored)
        spec: dict[str, Any] = {"layout": LAYOUT, "method": SECOND_MOMENTS, "dim": sketch.dim}
        spec |= {"basis": "random", "sketch": sketch.spec, "coordinates": divided.width}
        identity = {"weights": self.digest, **spec}
        return [Prepared("0", self.digest, 1.0, divided, identity)], spec


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
    return Moments(digest(model), whole, factored)


def _first(state: Mapping[str, Any], *names: str) -> Tensor | None:
    return next((state[name] for name in names if isinstance(state.get(name), Tensor)), None)
