"""Other libraries' scores of a case, by their own ways."""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from comparisons.shared import peer
from comparisons.truths import Case


class Ekfac:
    """kronfluence's EK-FAC, with its recommended damping: factors, then scores.

    Args:
        case: What to score.
        folder: Where it may write.
        per_sample: (logits, targets) -> summed loss, for its training and its measurement.
    """

    def __init__(self, case: Case, folder: Path) -> None:
        from kronfluence.analyzer import Analyzer, prepare_model
        from kronfluence.arguments import FactorArguments, ScoreArguments
        from kronfluence.task import Task
        from torch.utils.data import TensorDataset

        tokens = case.train[1].dim() == 2

        def summed(logits: Tensor, targets: Tensor) -> Tensor:
            return F.cross_entropy(logits, targets, ignore_index=-1, reduction="sum")

        class Own(Task):  # type: ignore[misc]
            def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> Any:
                logits, targets = model(batch[0]), batch[1]
                if sample:
                    with torch.no_grad():
                        flat = logits.mT.flatten(0, 1) if tokens else logits
                        drawn = torch.multinomial(flat.softmax(-1), 1).reshape(targets.shape)
                        targets = torch.where(targets < 0, targets, drawn)
                return summed(logits, targets)

            def compute_measurement(self, batch: Any, model: nn.Module) -> Any:
                return summed(model(batch[0]), batch[1])

        self._case = case
        self._data = TensorDataset(*case.train)
        self._queries = TensorDataset(*case.test)
        self._factor_arguments = FactorArguments(strategy="ekfac")
        self._score_arguments = ScoreArguments(damping_factor=None)
        with quiet():
            model = prepare_model(copy.deepcopy(case.model), Own())
            self._analyzer = Analyzer(
                "case", model, Own(), cpu=True, output_dir=str(folder), disable_tqdm=True
            )

    def fit(self) -> None:
        """Its factors."""
        with quiet():
            self._analyzer.fit_all_factors(
                "factors",
                self._data,
                per_device_batch_size=500,
                factor_args=self._factor_arguments,
                overwrite_output_dir=True,
            )

    def scores(self) -> NDArray[np.float32]:
        """[queries, examples], positive = helpful."""
        with quiet():
            self._analyzer.compute_pairwise_scores(
                "scores",
                factors_name="factors",
                query_dataset=self._queries,
                train_dataset=self._data,
                per_device_query_batch_size=250,
                per_device_train_batch_size=500,
                score_args=self._score_arguments,
                overwrite_output_dir=True,
            )
            found: Tensor = self._analyzer.load_pairwise_scores("scores")["all_modules"]
        return found.float().numpy()


def trak(case: Case, folder: Path, states: dict[str, Any], dim: int = 512) -> NDArray[np.float32]:
    """[queries, examples] traker's scores, with its projector for processors."""
    module = peer("trak")
    from trak.projectors import BasicProjector, ProjectionType

    size = sum(parameter.numel() for parameter in case.model.parameters())
    with quiet():
        projector = BasicProjector(
            grad_dim=size,
            proj_dim=dim,
            seed=0,
            proj_type=ProjectionType.normal,
            device="cpu",
            block_size=min(dim // 2, 128),  # its memory of a single block is freed too early
            dtype=torch.float32,
        )
        traker = module.TRAKer(
            model=case.model,
            task="image_classification",
            train_set_size=len(case.train[0]),
            save_dir=str(folder),
            device="cpu",
            proj_dim=dim,
            projector=projector,
            use_half_precision=False,
        )
        for number, state in enumerate(states.values()):
            traker.load_checkpoint(state, model_id=number)
            for batch in case.loader:
                traker.featurize(batch=batch, num_samples=len(batch[0]))
        traker.finalize_features()
        for number, state in enumerate(states.values()):
            traker.start_scoring_checkpoint("case", state, number, len(case.test[0]))
            traker.score(batch=case.test, num_samples=len(case.test[0]))
        found = traker.finalize_scores("case")
    return np.asarray(found, np.float32).T


@contextlib.contextmanager
def quiet() -> Any:
    """Without the peers' bars, lines and warnings."""
    level = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    nowhere = io.StringIO()
    with (
        warnings.catch_warnings(),
        contextlib.redirect_stdout(nowhere),
        contextlib.redirect_stderr(nowhere),
    ):
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            logging.disable(level)
