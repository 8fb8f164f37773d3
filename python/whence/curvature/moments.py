"""Second moments of an optimizer as a preconditioner: gradients as the optimizer saw them.

Adam divides a step by √v + ε (Kingma and Ba, arXiv 1412.6980); Adafactor keeps of a matrix the sums
of v over rows and columns alone, v ≈ r cᵀ / Σ r (Shazeer and Stern, arXiv 1804.04235). With the
latter a linear layer's factors are scaled on their own, and no gradient is formed (as in Chang et
al., "Scalable influence and fact tracing", arXiv 2410.17413).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from whence import _arrays
from whence.errors import ArgumentError, DtypeError, MismatchError, NotFiniteError
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

    def _fingerprint(self) -> str:
        """By which the same moments are known again."""
        found = hashlib.sha256()
        for name, each in [*self.whole.items(), *self.factored.items()]:
            found.update(name.encode())
            for side in each if isinstance(each, tuple) else (each,):
                found.update(side.cpu().numpy().tobytes())
        return found.hexdigest()[:16]

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
        identity = {"moments": self._fingerprint(), **spec}
        return [Prepared("0", self.digest, 1.0, divided, identity)], spec


def moments_of(optimizer: torch.optim.Optimizer, model: nn.Module) -> Moments:
    """The second moments in the state of Adam, AdamW, RMSprop or Adafactor.

    What the optimizer's next step would divide by, with its bias correction and its ε: of Adam
    with amsgrad the largest so far, of RMSprop with centered the variance. Adafactor is torch's or
    that of transformers.

    Args:
        optimizer: The user's optimizer, after at least one step.
        model: The model whose parameters it has.

    Raises:
        ArgumentError: If a trainable parameter has no second moment in it.
        DtypeError: If the arguments are something else.
        NotFiniteError: If a second moment is NaN or infinite.
    """
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise DtypeError(
            f"optimizer must be a torch.optim.Optimizer, got {_arrays.describe(optimizer)}"
        )
    if not isinstance(model, nn.Module):
        raise DtypeError(f"model must be an nn.Module, got {_arrays.describe(model)}")
    whole: dict[str, Tensor] = {}
    factored: dict[str, tuple[Tensor, Tensor]] = {}
    groups = {id(each): group for group in optimizer.param_groups for each in group["params"]}
    for parameter in dict.fromkeys(canonical_parameters(model).values()):
        tensor = parameter.tensor
        if not tensor.requires_grad:
            continue
        state, group = optimizer.state.get(tensor, {}), groups.get(id(tensor), {})
        found = _divisor(state, group)
        if found is None:
            raise ArgumentError(
                f"optimizer must have second moments of {parameter.name}, got none: it is not of "
                "Adam's or Adafactor's kind, or has made no step yet"
            )
        for each in found if isinstance(found, tuple) else (found,):
            if not bool(torch.isfinite(each).all()):
                raise NotFiniteError(
                    f"optimizer must have finite second moments, got NaN or infinity for "
                    f"{parameter.name}"
                )
        if isinstance(found, tuple):
            factored[parameter.name] = found
        else:
            whole[parameter.name] = found
    return Moments(digest(model), whole, factored)


def _divisor(
    state: Mapping[str, Any], group: Mapping[str, Any]
) -> Tensor | tuple[Tensor, Tensor] | None:
    """What the gradient of one parameter is divided by, float32; None if that is not there."""
    epsilon = group.get("eps", 1e-8)
    if "row_var" in state:
        return _of_sides(state["row_var"], state["col_var"], _least(epsilon))
    if "exp_avg_sq_row" in state:  # transformers adds its ε to squares as they come
        rows, columns = state["exp_avg_sq_row"], state["exp_avg_sq_col"]
        return _of_sides(rows[..., None], columns[..., None, :], 1e-30)
    if isinstance(state.get("variance"), Tensor):  # of torch's Adafactor, which has no sides
        return _root(state["variance"], least=_least(epsilon))
    if "square_avg" in state:
        moment: Tensor = state["square_avg"].double()
        if group.get("centered"):
            moment = moment - state["grad_avg"].double().square()
        return _root(moment, epsilon)
    name = "max_exp_avg_sq" if group.get("amsgrad") else "exp_avg_sq"
    if not isinstance(state.get(name), Tensor):
        return None
    if isinstance(epsilon, (tuple, list)):
        return _root(state[name], least=1e-30)
    decay = group["betas"][1] if "betas" in group else 0.0
    return _root(state[name].double() / (1 - decay ** float(state.get("step", 1))), epsilon)


def _root(moment: Tensor, epsilon: float = 0.0, least: float = 0.0) -> Tensor:
    return (moment.double().clamp(min=0).sqrt() + epsilon).clamp(min=least).float()


def _of_sides(rows: Tensor, columns: Tensor, least: float) -> Tensor | tuple[Tensor, Tensor]:
    """Of v ≈ r cᵀ / mean r, [..., rows, 1] and [..., 1, columns]: its sides, or the whole.

    The whole where a root is below the least, or an axis comes before the two.
    """
    rows, columns = rows.double(), columns.double()
    rows = rows / rows.mean(-2, keepdim=True).clamp(min=least)
    lowest = (rows.amin(-2) * columns.amin(-1)).sqrt().min()
    if rows.dim() == 2 and float(lowest) >= least:
        return _root(rows.flatten()), _root(columns.flatten())
    return _root(rows * columns, least=least)


def _least(epsilon: Any) -> float:
    """The least root of torch's Adafactor."""
    first = epsilon[0] if isinstance(epsilon, (tuple, list)) else epsilon
    return torch.finfo(torch.float32).eps if first is None else float(first)
