"""kronfluence: EK-FAC factors, and scores; it has no features of examples."""

import logging
from pathlib import Path

import torch
import torch.nn.functional as F
from kronfluence.analyzer import Analyzer, prepare_model
from kronfluence.task import Task
from torch import Tensor, nn
from torch.utils.data import TensorDataset

QUERIES = 16


class Classification(Task):
    """Cross-entropy, as the loss and as what is measured."""

    def compute_train_loss(
        self, batch: list[Tensor], model: nn.Module, sample: bool = False
    ) -> Tensor:
        """The loss, on labels drawn from the model's own prediction if `sample`."""
        images, labels = batch
        scores = model(images)
        if sample:
            labels = torch.multinomial(scores.detach().softmax(-1), 1).flatten()
        return F.cross_entropy(scores, labels, reduction="sum")

    def compute_measurement(self, batch: list[Tensor], model: nn.Module) -> Tensor:
        """The loss."""
        return self.compute_train_loss(batch, model)


def features(
    model: nn.Module, images: Tensor, labels: Tensor, *, dim: int, batch: int, folder: Path
) -> Tensor:
    """[examples, QUERIES] scores of the first QUERIES examples."""
    task = Classification()
    data = TensorDataset(images, labels)
    analyzer = Analyzer(
        "bench",
        prepare_model(model, task),
        task,
        cpu=True,
        disable_tqdm=True,
        output_dir=str(folder),
        log_level=logging.ERROR,
    )
    analyzer.fit_all_factors("factors", data, per_device_batch_size=batch)
    analyzer.compute_pairwise_scores(
        "scores",
        "factors",
        query_dataset=TensorDataset(images[:QUERIES], labels[:QUERIES]),
        train_dataset=data,
        per_device_query_batch_size=QUERIES,
        per_device_train_batch_size=batch,
    )
    return analyzer.load_pairwise_scores("scores")["all_modules"].T
