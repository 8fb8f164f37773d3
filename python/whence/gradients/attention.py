"""The projections inside `nn.MultiheadAttention`.

The module hands its projection weights to one function and never calls `out_proj`, so a hook on a
module sees neither input nor output of a projection. While such a module runs, the `linear` that
this function calls is replaced by one that also records calls with the module's own weights; all
else passes through unchanged.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from whence.errors import LayerError

Record = Callable[[Tensor, Tensor, "str | None", int, "str | None", int], Tensor]
"""(input, output, weight, first row, bias, first value) -> output; input and output are
[terms, batch, features], or flattened to [terms * batch, features]."""


class Projections:
    """Records the projections of one call of a module.

    Args:
        name: Canonical name of the module.
        module: The module.
        names: Its recorded parameters.
        batch: Number of samples.
        record: What to do with each projection.
    """

    def __init__(
        self,
        name: str,
        module: nn.MultiheadAttention,
        names: Mapping[str, Any],
        batch: int,
        record: Record,
    ) -> None:
        if not module.batch_first:
            raise LayerError(
                f"{name} must have batch_first=True, since dimension 0 is the batch, "
                "got batch_first=False"
            )
        self._batch = batch
        self._record = record
        self._name = name
        self._parameters = {local: module.get_parameter(local) for local in names}

    def start(self) -> None:
        """Begins to watch what this thread calls."""
        _stack().append(self)
        _patch(+1)

    def stop(self) -> None:
        """Ends to watch."""
        if self in _stack():
            _stack().remove(self)
            _patch(-1)

    def linear(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The projection, recorded if its weight or bias is the module's own."""
        output = _original(input, weight, bias)
        weight_name, row = self._locate(weight)
        bias_name, value = self._locate(bias)
        if weight_name is None and bias_name is None:
            return output
        # The function keeps terms first; before the last projection it flattens terms and batch.
        terms = output.numel() // output.shape[-1] // self._batch
        fits = output.dim() == 2 or (output.dim() == 3 and output.shape[1] == self._batch)
        if not fits or terms * self._batch * output.shape[-1] != output.numel():
            raise LayerError(
                f"{self._name} must be called with a batch of {self._batch} in dimension 0, got "
                f"projections of shape {list(output.shape)}"
            )
        return self._record(input, output, weight_name, row, bias_name, value)

    def _locate(self, part: Tensor | None) -> tuple[str | None, int]:
        """Which parameter `part` is, or a run of whose rows it is, and the first of them."""
        if part is None:
            return None, 0
        for local, parameter in self._parameters.items():
            if part is parameter or part._base is parameter:
                offset = part.storage_offset() - parameter.storage_offset()
                return local, int(offset // parameter.stride(0))
        return None, 0


_original: Callable[..., Tensor] = F.linear
_lock = threading.Lock()
_watching = 0
_local = threading.local()


def _stack() -> list[Projections]:
    """The modules that run in this thread, innermost last."""
    if not hasattr(_local, "stack"):
        _local.stack = []
    found: list[Projections] = _local.stack
    return found


def _watched(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """What stands for `torch.nn.functional.linear` while a module is watched in any thread."""
    stack = _stack()
    if stack:
        return stack[-1].linear(input, weight, bias)
    return _original(input, weight, bias)


def _patch(change: int) -> None:
    """Replaces the function for the first watcher, and puts it back after the last."""
    global _watching, _original
    with _lock:
        if _watching == 0:
            _original = F.linear
            F.linear = _watched
        _watching += change
        if _watching == 0:
            F.linear = _original
