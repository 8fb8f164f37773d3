"""The stable margin, the model output that TRAK attributes.

    margin = o_y − log Σ_{j ≠ y} exp o_j        1 − p = 1 / (1 + exp margin)

Its gradient in o is +1 at y and minus the softmax over the others elsewhere. Written as log p −
log(1 − p) it is lost where float32 rounds p to 1; this form is not.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from whence.errors import ArgumentError, LayerError
from whence.gradients.residuals import Calls


def stable_margin(logits: Tensor, labels: Tensor) -> Tensor:
    """[batch] margins of [batch, classes] logits; differentiable."""
    own = logits.gather(1, labels[:, None])[:, 0]
    others = logits.scatter(1, labels[:, None], float("-inf"))
    return own - others.logsumexp(1)


class Margins(Calls):
    """While it is entered, cross_entropy is minus the margin, averaged or summed as it would be.

    Attributes:
        doubts: [batch] 1 − p of the label, of each call.
    """

    def __init__(self) -> None:
        super().__init__()
        self.doubts: list[Tensor] = []

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if function is not F.cross_entropy:
            return function(*args, **(kwargs or {}))
        call = inspect.signature(function).bind(*args, **(kwargs or {}))
        call.apply_defaults()
        given = call.arguments
        logits: Tensor = given["input"]
        labels: Tensor = given["target"]
        if logits.dim() != 2 or labels.is_floating_point():
            raise ArgumentError(
                "TRAK must be used with one class an example, cross_entropy of [batch, classes], "
                f"got {list(logits.shape)}"
            )
        if len(labels) and not (int(labels.min()) >= 0 and int(labels.max()) < logits.shape[1]):
            raise ArgumentError(
                f"labels must be classes from 0 to {logits.shape[1] - 1} for TRAK, which has a "
                f"margin of each, got {int(labels.min())} to {int(labels.max())}"
            )
        margins = stable_margin(logits.float(), labels)
        del self.doubts[self.calls :]
        self.calls += 1
        self.doubts.append((-margins.detach()).sigmoid())
        # Minus, as a loss has it: rows then have the loss's sign, and products are the same.
        if given["reduction"] == "mean":
            return -margins.mean()
        return -margins.sum() if given["reduction"] == "sum" else -margins

    def check(self) -> Tensor:
        """[batch] the doubts of the only call.

        Raises:
            LayerError: If the loss is no cross-entropy.
        """
        if len(self.doubts) != 1:
            raise LayerError(
                f"loss must call torch's cross_entropy once for TRAK, got {len(self.doubts)} calls"
            )
        return self.doubts[0]


def joined(modes: list[Margins]) -> Tensor:
    """[examples] doubts of all batches."""
    return torch.cat([mode.check() for mode in modes])
