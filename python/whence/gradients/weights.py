"""Digests of weights, and loading other weights for a while."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from whence.errors import CheckpointError, StoreError
from whence.sketch import canonical_name

State: TypeAlias = Mapping[str, Any] | str | os.PathLike[str]
"""A state dict, or the path of one saved by torch.save."""

BLOCK = 1 << 24
"""Bytes of a digest between two looks at signals."""


def digest(model: nn.Module) -> str:
    """A digest of all parameters and saved buffers under their canonical names. O(weights).

    Buffers that are one whole number are counters, and left out.
    """
    total = hashlib.blake2b(digest_size=16)
    for name, tensor in _tensors(model):
        if tensor.dim() == 0 and not (tensor.is_floating_point() or tensor.is_complex()):
            continue
        value = tensor.detach().to("cpu").contiguous()
        total.update(f"{name} {value.dtype} {list(value.shape)}\n".encode())
        content = value.reshape(-1).view(torch.uint8).numpy().data
        for first in range(0, len(content), BLOCK):
            total.update(content[first : first + BLOCK])
    return total.hexdigest()


def versions(model: nn.Module) -> int:
    """A number that grows whenever an optimizer changes a parameter in place. O(parameters)."""
    return sum(parameter._version for parameter in parameters_of(model))


def modules_of(model: nn.Module) -> list[nn.Module]:
    """All modules, each once: `model.modules()`, for what is asked in every batch."""
    found = {id(model): model}
    waiting = [model]
    while waiting:
        for module in waiting.pop()._modules.values():
            if module is not None and id(module) not in found:
                found[id(module)] = module
                waiting.append(module)
    return list(found.values())


def parameters_of(model: nn.Module) -> list[nn.Parameter]:
    """All parameters, each once: `model.parameters()`, for what is asked in every batch."""
    found = {}
    for module in modules_of(model):
        for parameter in module._parameters.values():
            if parameter is not None:
                found[id(parameter)] = parameter
    return list(found.values())


def signature(model: nn.Module) -> list[tuple[str, int, bool]]:
    """Each parameter's name in its module, identity, and whether it takes a gradient."""
    return [
        (name, id(parameter), parameter.requires_grad)
        for module in modules_of(model)
        for name, parameter in module._parameters.items()
        if parameter is not None
    ]


def _tensors(model: nn.Module) -> list[tuple[str, Tensor]]:
    state = model.state_dict()
    return sorted(
        (canonical_name(name), value) for name, value in state.items() if isinstance(value, Tensor)
    )


def load(name: str, state: State) -> dict[str, Tensor]:
    """A state dict under canonical names.

    Raises:
        StoreError: If the file cannot be read.
        CheckpointError: If it is not a state dict.
    """
    if isinstance(state, (str, os.PathLike)):
        path = Path(state)
        if not path.is_file():
            raise StoreError(
                f"states[{name!r}] must be a state dict or its file, got {path}, which is no file"
            )
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:
            raise StoreError(
                f"states[{name!r}] must be a file of torch.save, got {path}: "
                f"{str(error).splitlines()[0]}"
            ) from error
    if not isinstance(state, Mapping) or not all(
        isinstance(key, str) and isinstance(value, Tensor) for key, value in state.items()
    ):
        raise CheckpointError(
            f"states[{name!r}] must be a state dict of tensors, got {type(state).__name__}"
        )
    return {canonical_name(key): value for key, value in state.items()}


@contextmanager
def preserved(model: nn.Module, *, weights: bool) -> Iterator[None]:
    """Puts buffers, modes, `.grad`, random state and, if asked, weights back, whatever happens."""
    modes = {module: module.training for module in model.modules()}
    gradients = [(parameter, parameter.grad) for parameter in model.parameters()]
    changing = [*(model.parameters() if weights else ()), *model.buffers()]
    kept = [(tensor, tensor.detach().clone()) for tensor in changing]
    names = [(module, dict(module._buffers)) for module in model.modules()]
    state = torch.get_rng_state()
    device_states = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else None
    try:
        yield
    finally:
        for module, buffers in names:  # a forward pass may have put other tensors there
            module._buffers.update(buffers)
        with torch.no_grad():
            for tensor, value in kept:
                if not torch.equal(tensor, value):
                    tensor.copy_(value)
        for module, training in modes.items():
            module.training = training
        for parameter, gradient in gradients:
            parameter.grad = gradient
        torch.set_rng_state(state)
        if device_states is not None:
            torch.cuda.set_rng_state_all(device_states)


def put(model: nn.Module, name: str, state: Mapping[str, Tensor]) -> None:
    """Copies a state into the model in place.

    Raises:
        CheckpointError: If a tensor is missing, unknown, or of another shape.
    """
    mine = dict(_tensors(model))
    if set(mine) != set(state):
        odd = min(set(mine) ^ set(state))
        where = "is missing" if odd in mine else "is not in the model"
        raise CheckpointError(
            f"states[{name!r}] must fit the model, got one in which {odd} {where}"
        )
    with torch.no_grad():
        for key, value in state.items():
            if mine[key].shape != value.shape:
                raise CheckpointError(
                    f"states[{name!r}] must fit the model, got {key} of shape {list(value.shape)} "
                    f"instead of {list(mine[key].shape)}"
                )
            mine[key].copy_(value)
