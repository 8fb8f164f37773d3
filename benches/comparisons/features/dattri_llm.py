"""dattri-llm: what its hooks capture while the model runs, left in memory."""

import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from dattri_llm import REGISTER_ALL, HookManager, HookManagerConfig
from dattri_llm.gradient.callbacks.capture_callback import CaptureCallback
from dattri_llm.gradient.gradient import Gradient
from torch import Tensor, nn


def features(
    model: nn.Module, images: Tensor, labels: Tensor, *, dim: int, batch: int, folder: Path
) -> Tensor:
    """LoGra: each layer's gradient projected on both sides, to dim values in all at most.

    Its one-sided style projects an identity matrix as wide as the layer has weights to get its
    matrix, which here is more than memory holds.
    """
    layers = sum(isinstance(layer, nn.Linear) for layer in model.modules())
    side = math.isqrt(dim // layers)
    projection = {"style": "logra", "proj_dim": side, "proj_type": "normal"}
    config = HookManagerConfig(
        linear_io=REGISTER_ALL,
        capture_style="materialized",
        projection_kwargs={"__default__": {**projection, "proj_max_batch_size": 32}},
    )
    return _collected(model, images, labels, batch, config, _flat)


def factors(
    model: nn.Module, images: Tensor, labels: Tensor, *, dim: int, batch: int, folder: Path
) -> Tensor:
    """Its default: inputs and output gradients of every layer, exact and not projected."""
    config = HookManagerConfig(linear_io=REGISTER_ALL)
    return _collected(model, images, labels, batch, config, _factors)


def _collected(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    batch: int,
    config: HookManagerConfig,
    taken: Any,
) -> Tensor:
    capture = CaptureCallback()
    manager = HookManager(model, config=config, callbacks=[capture])
    rows = []
    with manager.collect(deregister_on_exit=True):
        for first in range(0, len(images), batch):
            part = slice(first, first + batch)
            model.zero_grad()
            F.cross_entropy(model(images[part]), labels[part], reduction="sum").backward()
            rows.append(taken(capture.record.gradient))
    return torch.cat(rows)


def _flat(gradient: Gradient) -> Tensor:
    return torch.cat([gradient.data[name].flatten(1) for name in sorted(gradient.data)], dim=1)


def _factors(gradient: Gradient) -> Tensor:
    parts = []
    for name in sorted(gradient.data):
        layer = gradient.data[name]
        parts += [layer.activation.flatten(1), layer.pre_activation_grad.flatten(1)]
    return torch.cat(parts, dim=1)
