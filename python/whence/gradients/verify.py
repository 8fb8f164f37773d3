"""Recorded rows against exact gradients, example by example."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from whence import _arrays
from whence.errors import ArgumentError, DtypeError, LayerError
from whence.factored import Factored
from whence.gradients.capture import CHECKED, Capture, not_finite
from whence.gradients.coordinates import Coordinates
from whence.gradients.divided import Divided
from whence.gradients.hooks import Hooks
from whence.gradients.reduction import own_loss_factor
from whence.gradients.structure import Structure
from whence.gradients.weights import preserved
from whence.sketch import Sketch

EXACT = 1e-4
"""Largest relative difference that float32 rounding explains."""

ROUNDED = 5e-2
"""The same when layers compute in 16 bits."""


@dataclass(frozen=True)
class Verified:
    """What `Recorder.verify` found.

    Attributes:
        gradient: Largest relative difference of a recorded row from the exact gradient's.
        batch: Largest relative difference of an example's row in a batch from its row alone.
    """

    gradient: float
    batch: float

    def __str__(self) -> str:
        return (
            f"recorded rows equal exact gradients to {self.gradient:.1e}, and do not depend "
            f"on the batch to {self.batch:.1e} (relative)"
        )


def verify(
    model: nn.Module,
    structure: Structure,
    hooks: Hooks,
    target: Sketch | Factored | Coordinates | Divided,
    reduction: str,
    closure: Callable[..., Tensor],
    batch: Sequence[Any],
    tokens: Any,
    unbatched: Sequence[str],
) -> Verified:
    """See `Recorder.verify`."""
    if not callable(closure):
        raise DtypeError(
            f"closure must be a function of the batch, got {_arrays.describe(closure)}"
        )
    if isinstance(target, Coordinates) and target.is_tied:
        # Autograd does not tell a weight's gradient from its table's, which have coordinates each.
        target = Sketch("tensorsketch", dim=CHECKED, threads=1)
    # Factored rows are compared as sketches of the gradients that they stand for.
    sketch = (
        Sketch("tensorsketch", dim=CHECKED, threads=1) if isinstance(target, Factored) else target
    )
    counts = np.ones(2)
    if reduction == "token_mean":
        if tokens is None:
            raise ArgumentError(
                "tokens must be the counted tokens of the first two examples for "
                "reduction='token_mean', got None"
            )
        counts = _arrays.column("tokens", tokens, 2).astype(np.float64)
    pair = sliced(batch, 0, 2)
    if batch_size(pair) != 2:
        raise ArgumentError(
            f"batch must hold tensors of at least two examples, got {batch_size(pair)}"
        )
    with evaluating(model):
        exact, own = zip(
            *(_exact(structure, sketch, closure, sliced(batch, i, i + 1)) for i in range(2)),
            strict=True,
        )
    with evaluating(model):
        both, rounded = _recorded(structure, hooks, (target, sketch), closure, pair, 2, unbatched)
        alone, _ = _recorded(
            structure, hooks, (target, sketch), closure, sliced(batch, 0, 1), 1, unbatched
        )
    tolerance = ROUNDED if rounded or any(own) else EXACT
    given = counts if reduction == "token_mean" else None
    rows = both * own_loss_factor(reduction, 2, given)
    exact_rows = np.stack(exact) * (counts[:, None] if reduction == "token_mean" else 1.0)
    gradient = _difference(rows, exact_rows)
    single = alone * own_loss_factor(reduction, 1, None if given is None else given[:1])
    in_batch = _difference(rows[:1], single)
    if gradient > tolerance:
        norms = np.linalg.norm(rows, axis=1) / np.maximum(np.linalg.norm(exact_rows, axis=1), 1e-30)
        parallel = _difference(rows / np.maximum(norms[:, None], 1e-30), exact_rows) <= tolerance
        if parallel:
            raise LayerError(
                f"reduction must fit the loss, got {reduction!r}, by which recorded rows are "
                f"{norms[0]:.6g} and {norms[1]:.6g} times the exact gradients of the two examples"
            )
        if in_batch > tolerance:
            raise LayerError(
                "an example's gradient must not depend on who else is in the batch, got a "
                f"relative difference of {in_batch:.2g} (batch statistics, padding without a "
                "mask, or dimension 0 is not the batch)"
            )
        raise LayerError(
            f"recorded rows must equal the exact gradients, got a relative difference "
            f"of {gradient:.2g}"
        )
    if in_batch > tolerance:
        raise LayerError(
            "an example's gradient must not depend on who else is in the batch, got a "
            f"relative difference of {in_batch:.2g}"
        )
    return Verified(gradient, in_batch)


def _exact(
    structure: Structure,
    sketch: Sketch | Coordinates | Divided,
    closure: Callable[..., Tensor],
    batch: Sequence[Any],
) -> tuple[NDArray[np.float64], bool]:
    """The sketch of the gradient of the loss of one example, by autograd, and if it is 16 bit."""
    parameters = list(structure.parameters.values())
    with torch.enable_grad():
        loss = loss_of(closure, batch)
        gradients = torch.autograd.grad(
            loss, [parameter.tensor for parameter in parameters], allow_unused=True
        )
    accumulator = sketch.accumulator(1, structure.parameters)
    rounded = loss.dtype in (torch.float16, torch.bfloat16)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        if gradient is not None:
            gradient = gradient.to_dense() if gradient.is_sparse else gradient
            accumulator.add(
                parameter.name, parameter.shape, gradient.float().cpu().numpy().reshape(1, -1)
            )
    return accumulator.totals[0].astype(np.float64), rounded


def _recorded(
    structure: Structure,
    hooks: Hooks,
    maps: tuple[Sketch | Factored | Coordinates | Divided, Sketch | Coordinates | Divided],
    closure: Callable[..., Tensor],
    batch: Sequence[Any],
    count: int,
    unbatched: Sequence[str],
) -> tuple[NDArray[np.float64], bool]:
    """What the hooks make of a batch, and whether a layer computed in 16 bits."""
    target, sketch = maps
    capture = Capture(structure, target, count, unbatched, check="each")
    with hooks.capturing(capture, weight_gradients=False), torch.enable_grad():
        loss_of(closure, batch).backward()  # type: ignore[no-untyped-call]
    capture.verify()
    if capture.bad:
        raise not_finite([f"example {index}" for index in range(count)], capture.bad)
    return capture.sketched(sketch).astype(np.float64), capture.rounded


def loss_of(closure: Callable[..., Tensor], batch: Sequence[Any]) -> Tensor:
    """The closure's loss.

    Raises:
        DtypeError: If it is not a tensor without dimensions.
    """
    loss = closure(*arguments_of(batch))
    if not isinstance(loss, Tensor) or loss.dim() != 0:
        raise DtypeError(
            "closure must return the loss, a tensor without dimensions, got "
            f"{_arrays.describe(loss)}"
        )
    return loss


def arguments_of(batch: Any) -> Sequence[Any]:
    """What a closure is called with: a batch that is no tuple or list is its one argument."""
    return batch if isinstance(batch, (tuple, list)) else (batch,)


def sliced(value: Any, start: int, end: int) -> Any:
    """The examples from `start` to `end` in every tensor of a container."""
    if isinstance(value, Tensor):
        return value[start:end] if value.dim() else value
    if isinstance(value, MutableMapping):
        found = copy.copy(value)
        for key, each in value.items():
            found[key] = sliced(each, start, end)
        return found
    if isinstance(value, (list, tuple)):
        parts = [sliced(each, start, end) for each in value]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    return value


def batch_size(value: Any) -> int:
    """Dimension 0 of the first tensor in a container."""
    if isinstance(value, Tensor):
        return value.shape[0] if value.dim() else 0
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        return next((size for each in value if (size := batch_size(each))), 0)
    return 0


def _difference(found: NDArray[np.float64], expected: NDArray[np.float64]) -> float:
    """The largest |found - expected| / |expected| over rows."""
    norms = np.maximum(np.linalg.norm(expected, axis=1), np.linalg.norm(found, axis=1))
    return float((np.linalg.norm(found - expected, axis=1) / np.maximum(norms, 1e-30)).max())


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode for a while: no dropout, whose masks depend on the place."""
    with preserved(model, weights=False):
        model.eval()
        yield
