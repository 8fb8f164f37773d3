"""Labels drawn from the model's own output, in the place of those that a loss was given.

The Gauss-Newton matrix of a loss that is a negative log-likelihood is the mean of g gᵀ over labels
drawn from the model (Martens, "New insights and perspectives on the natural gradient method",
arXiv 1412.1193, section 5). With the true labels it is the empirical Fisher matrix, another thing
(Kunstner et al., arXiv 1905.12558).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from whence.errors import LayerError
from whence.gradients.residuals import Calls

LABELS = ("sampled", "empirical")
"""Whose gradients the curvature is made of."""


class DrawnLabels(TorchFunctionMode):
    """While it is entered, losses of torch see labels that are drawn from their input.

    Args:
        seed: Seed of the draws.
    """

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.drawn = 0
        self._seed = seed
        self._generators: dict[torch.device, torch.Generator] = {}

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if function not in _LOSSES:
            return function(*args, **(kwargs or {}))
        drawn = self.draw(function, args, kwargs)
        call = given_labels(function, args, kwargs, drawn)
        self.drawn += 1
        return function(*call.args, **call.kwargs)

    def draw(self, function: Any, args: Any, kwargs: Any) -> Tensor:
        """Labels for a call of one of torch's losses.

        Raises:
            LayerError: If the loss weighs labels.
        """
        call = inspect.signature(function).bind(*args, **(kwargs or {}))
        call.apply_defaults()
        for name in ("weight", "pos_weight"):
            # Of the label drawn, not of the true one: another loss.
            if call.arguments.get(name) is not None:
                raise LayerError(
                    f"loss must be without {name} for labels='sampled', got one; pass "
                    "labels='empirical' to use the true labels"
                )
        given = call.arguments
        swapped = given["target"].requires_grad and not given["input"].requires_grad
        if function is F.mse_loss and swapped:  # which of the two is the label makes no difference
            given["input"], given["target"] = given["target"], given["input"]
        values: Tensor = given["input"]
        with torch.no_grad():
            generator = self._generator(values.device)
            return _LOSSES[function](values.detach(), given, generator)

    def _generator(self, device: torch.device) -> torch.Generator:
        if device not in self._generators:
            self._generators[device] = torch.Generator(device).manual_seed(self._seed)
        return self._generators[device]

    def state(self) -> dict[torch.device, Tensor]:
        """Where the draws are."""
        return {device: each.get_state() for device, each in self._generators.items()}

    def restore(self, state: dict[torch.device, Tensor]) -> None:
        """Puts the draws back."""
        for device in list(self._generators):
            if device in state:
                self._generators[device].set_state(state[device])
            else:
                del self._generators[device]

    def check(self) -> None:
        """Nothing, if labels were drawn.

        Raises:
            LayerError: If not: the loss was computed by other means.
        """
        if not self.drawn:
            raise LayerError(
                "loss must be computed by torch's cross_entropy, nll_loss, mse_loss, "
                "binary_cross_entropy or binary_cross_entropy_with_logits for labels='sampled', "
                "got another; pass labels='empirical' to use the true labels"
            )


def given_labels(function: Any, args: Any, kwargs: Any, labels: Tensor) -> inspect.BoundArguments:
    """A call of one of torch's losses with other labels, which are not smoothed."""
    call = inspect.signature(function).bind(*args, **(kwargs or {}))
    given = call.arguments
    swapped = given["target"].requires_grad and not given["input"].requires_grad
    if function is F.mse_loss and swapped:
        given["input"] = given["target"]
    given["target"] = labels
    if "label_smoothing" in call.arguments:  # has no share in the curvature
        call.arguments["label_smoothing"] = 0.0
    return call


class Mixture:
    """Labels drawn from the mean of a model's distributions over checkpoints.

    The label of each row that a loss is given (an example, or a token where the loss sees tokens
    as rows) is that of one checkpoint, chosen at random: after the n-th, what it draws takes the
    place of what is there with the n-th share of all so far.

    Args:
        seed: Seed of the draws.
    """

    def __init__(self, seed: int) -> None:
        self.targets: dict[int, list[Tensor]] = {}
        self._generator = torch.Generator().manual_seed(seed)
        self._seed = seed

    def drawing(self, batch: int, checkpoint: int) -> _Drawing:
        """While it is entered, losses of a batch draw."""
        draws = DrawnLabels(self._seed + 7919 * (checkpoint + 1) + batch)
        return _Drawing(self.targets.setdefault(batch, []), draws, checkpoint, self._generator)

    def replaying(self, batch: int) -> _Given:
        """While it is entered, losses of a batch see what was drawn."""
        return _Given(self.targets[batch])


class _Given(Calls):
    def __init__(self, targets: list[Tensor]) -> None:
        super().__init__()
        self._targets = targets

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if function not in _LOSSES:
            return function(*args, **(kwargs or {}))
        call = given_labels(function, args, kwargs, self._targets[self.calls])
        self.calls += 1
        return function(*call.args, **call.kwargs)


class _Drawing(Calls):
    def __init__(
        self,
        targets: list[Tensor],
        draws: DrawnLabels,
        checkpoint: int,
        generator: torch.Generator,
    ) -> None:
        super().__init__()
        self._targets = targets
        self._draws = draws
        self._checkpoint = checkpoint
        self._generator = generator

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if function not in _LOSSES:
            return function(*args, **(kwargs or {}))
        drawn = self._draws.draw(function, args, kwargs)
        if self.calls == len(self._targets):
            self._targets.append(drawn)
        else:
            before = self._targets[self.calls]
            examples = torch.rand(len(drawn), generator=self._generator)
            new = (examples < 1 / (self._checkpoint + 1)).to(drawn.device)
            shape = (-1, *([1] * (drawn.dim() - 1)))
            self._targets[self.calls] = torch.where(new.reshape(shape), drawn, before)
        self.calls += 1
        return function(*args, **(kwargs or {}))


def _categories(values: Tensor, given: dict[str, Any], generator: torch.Generator) -> Tensor:
    """Classes by softmax over dimension 1, or 0 of a single example."""
    target, classes = given["target"], min(1, values.dim() - 1)
    probabilities = values.movedim(classes, -1).float().softmax(-1)
    probabilities = probabilities.nan_to_num(1.0)  # whose loss is NaN, and named with its example
    flat = probabilities.reshape(-1, probabilities.shape[-1])
    drawn = torch.multinomial(flat, 1, generator=generator).reshape(probabilities.shape[:-1])
    if target.is_floating_point():  # a probability of each class
        one = F.one_hot(drawn, probabilities.shape[-1]).movedim(-1, classes)
        return one.to(target.dtype)
    return torch.where(target == given["ignore_index"], target, drawn.to(target.dtype))


def _normal(values: Tensor, given: dict[str, Any], generator: torch.Generator) -> Tensor:
    """Of the variance that makes an example's loss its negative log-likelihood."""
    per_example = values.numel() // max(len(values), 1) if values.dim() else 1
    variance = 0.5 * (per_example if given["reduction"] == "mean" else 1)
    noise = torch.empty_like(values).normal_(generator=generator)
    drawn: Tensor = values + noise * variance**0.5
    return drawn.to(given["target"].dtype)


def _coins(values: Tensor, given: dict[str, Any], generator: torch.Generator) -> Tensor:
    """Of probabilities."""
    probabilities = values.float().nan_to_num().clamp(0, 1)  # the loss itself refuses others
    drawn: Tensor = torch.bernoulli(probabilities, generator=generator)
    target: Tensor = given["target"]
    return drawn.to(target.dtype)


def _coins_of_logits(values: Tensor, given: dict[str, Any], generator: torch.Generator) -> Tensor:
    """Of logits."""
    return _coins(values.float().sigmoid(), given, generator)


_LOSSES: dict[Any, Callable[[Tensor, dict[str, Any], torch.Generator], Tensor]] = {
    F.cross_entropy: _categories,
    F.nll_loss: _categories,
    F.mse_loss: _normal,
    F.binary_cross_entropy: _coins,
    F.binary_cross_entropy_with_logits: _coins_of_logits,
}
