"""Running a user's own loss over batches, with hooks that feed a map."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.data import (
    DataLoader,
    RandomSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from whence import _arrays
from whence.errors import ArgumentError, DtypeError, LayerError
from whence.gradients.capture import Capture
from whence.gradients.hooks import Draws, Hooks
from whence.gradients.reduction import own_loss_factor
from whence.gradients.verify import arguments_of
from whence.gradients.weights import preserved

TOGETHER = 4096
"""Examples whose batches are kept while all checkpoints see them in turn."""

_SHUFFLING = (RandomSampler, SubsetRandomSampler, WeightedRandomSampler)
"""Samplers that give another order each time."""


def backward(
    hooks: Hooks,
    capture: Capture,
    closure: Callable[[], Tensor],
    name: str = "closure",
    draws: Draws | None = None,
) -> None:
    """Runs a closure and its backward pass, and lets the capture see them.

    Raises:
        DtypeError: If it does not return a tensor without dimensions.
        LayerError: If what it returns cannot be differentiated, or no gradient was seen.
        CoverageError: If a gradient was seen that no rule accounts for.
    """
    capturing = hooks.capturing(capture, weight_gradients=False, draws=draws)
    with capturing, torch.enable_grad():
        loss = closure()
        if not isinstance(loss, Tensor) or loss.dim() != 0:
            raise DtypeError(
                f"{name} must return the loss, a tensor without dimensions, got "
                f"{_arrays.describe(loss)}"
            )
        if not loss.requires_grad:
            raise LayerError(
                f"{name} must return a loss of the recorded model that can be "
                "differentiated, got one without a graph (torch.no_grad, .item or "
                ".detach in it?)"
            )
        loss.backward()  # type: ignore[no-untyped-call]
    capture.verify()


class Task:
    """A user's loss of a batch, and how it combines the batch's examples.

    Args:
        loss: (*batch) -> loss, by the user's own lines; a batch that is no tuple or list is its
            one argument.
        reduction: "mean", "sum" or "token_mean".
        tokens: (*batch) -> [batch] counted tokens, for reduction="token_mean".
        unbatched: As in `record`.
    """

    def __init__(
        self,
        loss: Callable[..., Tensor],
        reduction: str,
        tokens: Callable[..., Any] | None = None,
        unbatched: Sequence[str] = (),
    ) -> None:
        for name, value in (("loss", loss), ("tokens", tokens)):
            if not callable(value) and (name == "loss" or value is not None):
                raise DtypeError(
                    f"{name} must be a function of the batch, got {_arrays.describe(value)}"
                )
        if (tokens is not None) != (reduction == "token_mean"):
            raise ArgumentError(
                "tokens must be a function of the batch for, and only for, "
                f"reduction='token_mean', got {_arrays.describe(tokens)} for {reduction!r}"
            )
        self.loss = loss
        self.reduction = reduction
        self.tokens = tokens
        self.unbatched = unbatched

    def run(
        self, hooks: Hooks, capture: Capture, batch: Any, mode: Any = None
    ) -> tuple[Capture, float]:
        """One forward and backward pass; and what turns its gradients into those of own losses.

        Args:
            hooks: The hooks of the model, installed.
            capture: What gathers.
            batch: What the loader gave.
            mode: Entered while the loss runs, with a place of its own in what it gives; if it has a
                `check`, that is called afterwards.
        """
        arguments = arguments_of(batch)
        if any(isinstance(each, Tensor) and each.shape[:1] == (0,) for each in arguments):
            raise ArgumentError("loader must give batches of at least one example, got one of none")

        def closure() -> Tensor:
            with mode if mode is not None else nullcontext():
                return self.loss(*arguments)

        backward(hooks, capture, closure, "loss", mode)
        if hasattr(mode, "check"):
            mode.check()
        counts = None if self.tokens is None else self.tokens(*arguments)
        return capture, own_loss_factor(self.reduction, capture.batch, counts)


def reread(name: str, loader: Any) -> Iterable[Any]:
    """A loader, once it is sure that it gives the same batches again.

    Raises:
        DtypeError: If it can be read only once, or not at all.
        ArgumentError: If it shuffles.
    """
    if isinstance(loader, Iterator) or not isinstance(loader, Iterable):
        raise DtypeError(
            f"{name} must be batches that can be read several times, such as a list or a "
            f"DataLoader, got {_arrays.describe(loader)}"
        )
    if isinstance(loader, DataLoader):
        samplers = loader.sampler, getattr(loader.batch_sampler, "sampler", None)
        if any(isinstance(each, _SHUFFLING) for each in samplers):
            raise ArgumentError(
                f"{name} must give its examples in one order, got a DataLoader with shuffle=True "
                "or a random sampler"
            )
    return loader


@contextmanager
def evaluating(model: nn.Module, *, weights: bool) -> Iterator[None]:
    """The model in evaluation mode for a while; afterwards all is as before.

    Args:
        model: The model.
        weights: Whether its weights are changed meanwhile.
    """
    with preserved(model, weights=weights):
        model.eval()
        yield


def pairs_of(layers: Iterable[Any]) -> dict[str, tuple[str | None, str]]:
    """Weight -> (bias, side of the inputs), of layers whose rules give the two apart.

    A bias goes with the first weight that has it, and a weight with the first bias: of tied ones,
    the others are on their own.
    """
    sides = {"linear": "right", "conv": "right", "conv1d_transposed": "left"}
    found: dict[str, tuple[str | None, str]] = {}
    taken = set()
    for layer in layers:
        if layer.rule.kind not in sides or "weight" not in layer.parameters:
            continue
        weight, bias = layer.parameters["weight"].name, layer.parameters.get("bias")
        if weight not in found:
            free = bias is not None and bias.name not in taken
            found[weight] = (bias.name if free else None, sides[layer.rule.kind])
            taken.add(found[weight][0])
    return found


def length_of(batch: Any) -> int:
    """The number of examples of a batch: dimension 0 of its first tensor or array.

    Raises:
        ArgumentError: If it has none.
    """
    if isinstance(batch, (Tensor, np.ndarray)) and batch.ndim:
        return int(batch.shape[0])
    if isinstance(batch, Mapping):
        batch = list(batch.values())
    if isinstance(batch, (tuple, list)):
        for each in batch:
            if isinstance(each, (Tensor, np.ndarray, Mapping)):
                return length_of(each)
        if batch and isinstance(batch[0], (tuple, list)):
            return len(batch[0])
    raise ArgumentError(f"loader must give batches of tensors, got {_arrays.describe(batch)}")


def taken(value: Any, places: NDArray[np.int64]) -> Any:
    """The examples at these places of every tensor or array in a batch."""
    if isinstance(value, Tensor) and value.dim():
        return value[torch.from_numpy(places).to(value.device)]
    if isinstance(value, np.ndarray) and value.ndim:
        return value[places]
    if isinstance(value, Mapping):
        found = copy.copy(value)
        for key, each in value.items():
            found[key] = taken(each, places)  # type: ignore[index]
        return found
    if isinstance(value, (list, tuple)):
        if all(isinstance(each, (str, int, float)) for each in value):
            return type(value)(value[place] for place in places)
        parts = [taken(each, places) for each in value]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    return value
