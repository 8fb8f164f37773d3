"""dattri: the gradients and the projection that its TracIn and TRAK attributors compute."""

from pathlib import Path

import torch
import torch.nn.functional as F
from dattri.func.projection import random_project
from dattri.task import AttributionTask
from torch import Tensor, nn


def features(
    model: nn.Module, images: Tensor, labels: Tensor, *, dim: int, batch: int, folder: Path
) -> Tensor:
    """Of the loss, by the projection that is its default on a CPU (normal)."""

    def loss(parameters: dict[str, Tensor], example: tuple[Tensor, Tensor]) -> Tensor:
        image, label = example
        scores = torch.func.functional_call(model, parameters, image[None])
        return F.cross_entropy(scores, label[None])

    task = AttributionTask(loss, model, model.state_dict())
    gradient = task.get_grad_loss_func(in_dims=(None, 0))
    parameters, _ = task.get_param(ckpt_idx=0)
    rows = []
    for first in range(0, len(images), batch):
        part = slice(first, first + batch)
        found = gradient(parameters, (images[part], labels[part]))
        # A projector for each batch, as in the attributors.
        project = random_project(found, len(found), proj_dim=dim, proj_max_batch_size=32)
        rows.append(project(torch.nan_to_num(found), ensemble_id=0).detach())
    return torch.cat(rows)
