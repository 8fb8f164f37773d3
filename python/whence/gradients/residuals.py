"""Averaged residuals: what a loss says of a model's outputs, meant over the checkpoints of a run.

The gradient of an example's loss is its residual (for classes p − y) times the gradient of the
outputs. A model that has fitted the example has hardly a residual left, though one that was trained
without it would: what the example taught is no longer seen. Over a run the residual falls from what
it was before the example was learnt; its mean over checkpoints, in the place of each checkpoint's
own, keeps the examples that were learnt early. TRAK averages its (1 − p) over models for the same
reason (Park et al., arXiv 2303.14186, section 3).
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from whence.errors import LayerError

RESIDUAL_BYTES = 1 << 28
"""Residuals of so many bytes are kept at most; of more, fewer examples go together."""

LOSSES = {
    F.cross_entropy,
    F.nll_loss,
    F.mse_loss,
    F.l1_loss,
    F.smooth_l1_loss,
    F.huber_loss,
    F.binary_cross_entropy,
    F.binary_cross_entropy_with_logits,
}
"""Losses whose residuals are known: functions of an input, the model's output, and a target."""


class Calls(TorchFunctionMode):
    """Counts the losses that are called while it is entered.

    A pass that is run once more from its start, to see that it answers the same, is counted once.

    Attributes:
        calls: How many so far.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def state(self) -> int:
        """Where it is."""
        return self.calls

    def restore(self, state: int) -> None:
        """Puts it back there."""
        self.calls = state


class Residuals:
    """The residuals of batches, summed over checkpoints.

    Attributes:
        targets: Batch -> labels of each loss's call, in the place of those that it is given.
    """

    def __init__(self) -> None:
        self._sums: dict[int, list[Tensor]] = {}
        self.targets: dict[int, list[Tensor]] = {}

    @property
    def nbytes(self) -> int:
        """What is held."""
        return sum(each.nbytes for sums in self._sums.values() for each in sums)

    def collecting(self, batch: int, share: float) -> _Collecting:
        """While it is entered, losses add a share of their residuals to those of a batch."""
        return _Collecting(self._sums.setdefault(batch, []), share, self.targets.get(batch))

    def replaying(self, batch: int) -> _Replaying:
        """While it is entered, losses have the gradient that was gathered for a batch."""
        return _Replaying(self._sums.get(batch, []))


class _Collecting(Calls):
    def __init__(self, sums: list[Tensor], share: float, targets: list[Tensor] | None) -> None:
        super().__init__()
        self._sums = sums
        self._share = share
        self._targets = targets

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if function not in LOSSES:
            return function(*args, **(kwargs or {}))
        call = inspect.signature(function).bind(*args, **(kwargs or {}))
        values: Tensor = call.arguments["input"]
        with torch.enable_grad():
            leaf = values.detach().requires_grad_()
            call.arguments["input"] = leaf
            if self._targets is not None:
                call.arguments["target"] = self._targets[self.calls]
            loss = function(*call.args, **call.kwargs)
            (found,) = torch.autograd.grad(loss.sum(), leaf)
        if function is F.nll_loss:  # of log-probabilities; seen from before the softmax
            classes = min(1, values.dim() - 1)
            found = found - leaf.detach().exp() * found.sum(classes, keepdim=True)
        if function is F.binary_cross_entropy:  # of probabilities; seen from before the sigmoid
            found = found * _slope(values)
        found = found * self._share
        if self.calls == len(self._sums):
            self._sums.append(found)
        else:
            self._sums[self.calls] = self._sums[self.calls] + found
        self.calls += 1
        return loss.detach()


class _Replaying(Calls):
    def __init__(self, sums: list[Tensor]) -> None:
        super().__init__()
        self._sums = sums

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if function not in LOSSES:
            return function(*args, **(kwargs or {}))
        call = inspect.signature(function).bind(*args, **(kwargs or {}))
        values: Tensor = call.arguments["input"]
        if self.calls >= len(self._sums) or self._sums[self.calls].shape != values.shape:
            raise LayerError(
                "loss must call the same losses of torch on the same shapes each time it is run on "
                "a batch, got others; pass residuals='own'"
            )
        residuals = self._sums[self.calls]
        if function is F.binary_cross_entropy:
            residuals = residuals / _slope(values).clamp(min=torch.finfo(values.dtype).tiny)
        found = values * residuals
        self.calls += 1
        # An elementwise loss has its own gradient elementwise; a reduced one sums to it.
        return found if call.arguments.get("reduction") == "none" else found.sum()

    def check(self) -> None:
        """Nothing, if a loss was seen.

        Raises:
            LayerError: If not: the loss was computed by other means.
        """
        if not self.calls:
            raise LayerError(
                "loss must be computed by torch's cross_entropy, nll_loss, mse_loss or another "
                "loss of torch.nn.functional for residuals='averaged', got none; pass "
                "residuals='own'"
            )


def _slope(probabilities: Tensor) -> Tensor:
    """The derivative of the sigmoid, where its value is this."""
    values = probabilities.detach()
    return values * (1 - values)
