"""bergson: its hooks and projections, collected in memory."""

import math
from pathlib import Path

import torch
import torch.nn.functional as F
from bergson import GradientProcessor
from bergson.collector.in_memory_collector import InMemoryCollector
from bergson.config import IndexConfig
from datasets import Dataset
from torch import Tensor, nn


def features(
    model: nn.Module, images: Tensor, labels: Tensor, *, dim: int, batch: int, folder: Path
) -> Tensor:
    """Its default: each layer's gradient projected on both sides, to dim values in all at most."""
    layers = sum(isinstance(layer, nn.Linear) for layer in model.modules())
    side = math.isqrt(dim // layers)
    processor = GradientProcessor(projection_dim=side, include_bias=True)
    return _collected(model, images, labels, batch, folder, processor)


def whole(
    model: nn.Module, images: Tensor, labels: Tensor, *, dim: int, batch: int, folder: Path
) -> Tensor:
    """The whole gradient, by one projection."""
    processor = GradientProcessor(projection_dim=dim, projection_target="global", include_bias=True)
    return _collected(model, images, labels, batch, folder, processor)


def _collected(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    batch: int,
    folder: Path,
    processor: GradientProcessor,
) -> Tensor:
    model.device = torch.device("cpu")  # as a model of transformers has it
    collector = InMemoryCollector(
        model=model,
        data=Dataset.from_dict({"example": range(len(images))}),
        cfg=IndexConfig(run_path=str(folder)),
        processor=processor,
    )
    with collector:
        for first in range(0, len(images), batch):
            part = slice(first, first + batch)
            model.zero_grad()
            # Its hooks want [batch, length, width].
            scores = model(images[part, None])[:, 0]
            losses = F.cross_entropy(scores, labels[part], reduction="none")
            losses.sum().backward()
            indices = list(range(first, first + len(losses)))
            collector.process_batch(indices, losses=losses)
    collector.teardown()
    return torch.cat(list(collector.gradients.values()), dim=1)
