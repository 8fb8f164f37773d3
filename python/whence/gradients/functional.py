"""Per-sample gradients of any module by torch.func: slow, exact, [batch, parameters] of memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vjp, vmap
from torch.utils._pytree import tree_flatten, tree_unflatten

from whence.errors import LayerError
from whence.gradients.layers import Sink


@dataclass
class Call:
    """The arguments of one call of a module, and the autocast it ran under.

    Attributes:
        args: Positional arguments.
        kwargs: Keyword arguments.
        device: Type of the device it ran on.
        enabled: Whether autocast was on.
        dtype: The type that autocast used.
        sampled: [leaves] which of the arguments' tensors have the batch in dimension 0.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    device: str
    enabled: bool
    dtype: torch.dtype
    sampled: list[bool]

    @classmethod
    def of(cls, args: tuple[Any, ...], kwargs: dict[str, Any], device: str, batch: int) -> Call:
        """The call that is being made now."""
        leaves, _ = tree_flatten((args, kwargs))
        sampled = [
            isinstance(leaf, Tensor) and leaf.dim() > 0 and leaf.shape[0] == batch
            for leaf in leaves
        ]
        enabled = torch.is_autocast_enabled(device)
        return cls(args, kwargs, device, enabled, torch.get_autocast_dtype(device), sampled)


def add_functional(sink: Sink, layer: Any, call: Call, delta: Tensor) -> None:
    """Adds the vector-Jacobian product of each sample's output gradient.

    Raises:
        LayerError: If the module draws random numbers, or torch.func cannot run it.
    """
    module: nn.Module = layer.module
    for name, child in module.named_modules():
        if isinstance(child, nn.modules.dropout._DropoutNd) and child.training and child.p > 0:
            raise LayerError(
                f"{layer.name} must be free of active dropout for "
                f"uncovered='functional', got {name or 'itself'} in training mode"
            )
    parameters = {name: module.get_parameter(name).detach() for name in layer.parameters}
    leaves, spec = tree_flatten((call.args, call.kwargs))
    leaves = [leaf.detach() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
    sampled = call.sampled
    tensors = tuple(leaf for leaf, each in zip(leaves, sampled, strict=True) if each)

    def one(delta: Tensor, *values: Tensor) -> dict[str, Tensor]:
        mine = iter(values)
        full = [
            next(mine).unsqueeze(0) if each else leaf
            for leaf, each in zip(leaves, sampled, strict=True)
        ]
        args, kwargs = tree_unflatten(full, spec)
        pull = vjp(lambda values: functional_call(module, values, args, kwargs), parameters)[1]
        gradients: dict[str, Tensor] = pull(delta.unsqueeze(0))[0]
        return gradients

    autocast = torch.autocast(call.device, call.dtype, enabled=call.enabled)
    try:
        with torch.enable_grad(), autocast:
            gradients = vmap(one)(delta, *tensors)
    except (RuntimeError, ValueError) as error:
        raise LayerError(
            f"{layer.name} must run under torch.func for uncovered='functional', "
            f"got: {str(error).splitlines()[0]}"
        ) from error
    for name, values in gradients.items():
        sink.flat(name, values)
