"""The projections inside `nn.MultiheadAttention`.

The module hands its projection weights to one function and never calls `out_proj`, so a hook on a
module sees neither input nor output of a projection. While such a module runs, the `linear` that
this function calls is replaced by one that also records calls with the module's own weights; all
else passes through unchanged.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from whence.errors import LayerError

Record = Callable[[Tensor, Tensor, "str | None", int, "str | None", int], Tensor]
"""(input, output, weight, first row, bias, first value) -> output; input and output are
[terms, batch, features]."""


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
        self._original: Callable[..., Tensor] | None = None

    def start(self) -> None:
        """Begins to watch."""
        self._original = F.linear
        F.linear = self._linear

    def stop(self) -> None:
        """Ends to watch."""
        if self._original is not None:
            F.linear = self._original
            self._original = None

    def _linear(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if self._original is None:
            return torch._C._nn.linear(input, weight, bias)
        output = self._original(input, weight, bias)
        weight_name, row = self._locate(weight)
        bias_name, value = self._locate(bias)
        if weight_name is None and bias_name is None:
            return output
        # The function keeps terms first; it flattens terms and batch before the last projection.
        shape = (-1, self._batch)
        if output.dim() == 2:
            if output.shape[0] % self._batch:
                raise LayerError(
                    f"{self._name} must be called with a batch of {self._batch}, "
                    f"got {output.shape[0]} terms in all"
                )
            flat = self._record(
                input.reshape(*shape, input.shape[-1]),
                output.reshape(*shape, output.shape[-1]),
                weight_name,
                row,
                bias_name,
                value,
            )
            return flat.flatten(0, 1)
        if output.dim() != 3 or output.shape[1] != self._batch:
            raise LayerError(
                f"{self._name} must be called with a batch of {self._batch} in "
                f"dimension 0, got shape {list(output.transpose(0, 1).shape)}"
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
