"""TRAK (MadryLab): `TRAKer.featurize`, on the CPU with its own gradients and projector."""

import logging
from pathlib import Path

import torch
from torch import Tensor, nn
from trak import TRAKer


def features(
    model: nn.Module, images: Tensor, labels: Tensor, *, dim: int, batch: int, folder: Path
) -> Tensor:
    """Of the margin, as TRAK defines it, with the projector it takes on a CPU (normal)."""
    traker = TRAKer(
        model=model,
        task="image_classification",
        train_set_size=len(images),
        save_dir=folder,
        device="cpu",
        proj_dim=dim,
        use_half_precision=False,  # the default, float16, is slower on a CPU
        logging_level=logging.ERROR,
    )
    traker.load_checkpoint(model.state_dict(), model_id=0)
    for first in range(0, len(images), batch):
        part = slice(first, first + batch)
        traker.featurize((images[part], labels[part]), num_samples=len(images[part]))
    return torch.from_numpy(traker.saver.current_store["grads"].copy())
