"""captum: `TracInCPFastRandProj`, which has a vector for each example at the last layer."""

import warnings
from pathlib import Path

import torch
from captum.influence import TracInCPFastRandProj
from captum.influence._utils.nearest_neighbors import NearestNeighbors
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset


class NoIndex(NearestNeighbors):
    """No index: the default one needs annoy, and its time would not be that of the features."""

    def setup(self, data: Tensor) -> None:
        """Nothing."""

    def get_nearest_neighbors(self, query: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Not asked for."""
        raise NotImplementedError


def features(
    model: nn.Sequential, images: Tensor, labels: Tensor, *, dim: int, batch: int, folder: Path
) -> Tensor:
    """At the last layer alone, projected on both sides."""
    checkpoint = folder / "checkpoint.pt"
    torch.save(model.state_dict(), checkpoint)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it keeps all vectors in memory
        tracin = TracInCPFastRandProj(
            model,
            model[-1],
            DataLoader(TensorDataset(images, labels), batch_size=batch),
            [str(checkpoint)],
            loss_fn=nn.CrossEntropyLoss(reduction="sum"),
            nearest_neighbors=NoIndex(),
            projection_dim=dim,
        )
    return tracin.src_intermediate_quantities
