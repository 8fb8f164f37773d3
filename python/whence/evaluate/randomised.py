"""Query rows of a model as it is, and with random weights. Imports torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from whence import _arrays
from whence.attribution import query_rows
from whence.errors import ArgumentError, DtypeError
from whence.gradients.verify import batch_size, evaluating, sliced
from whence.gradients.weights import State, load
from whence.search import Store
from whence.sketch import canonical_name


class Rows:
    """The rows of the examples of a batch.

    Args:
        model: The recorded model.
        store: Its store.
        closure: (*batch) -> loss.
        batch: Its arguments.
        states: Checkpoint -> weights; None for the model as it is.
        tokens: [batch] counted tokens, or None.
        unbatched: As in `record`.
        most: How many examples of the batch to use at most.

    Raises:
        DtypeError: If the model is no module.
        ArgumentError: If the batch has fewer than two examples.
    """

    def __init__(
        self,
        model: nn.Module,
        store: Store,
        closure: Callable[..., Tensor],
        batch: Sequence[Any],
        states: Mapping[str, State] | None,
        tokens: Any,
        unbatched: Sequence[str],
        most: int,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise DtypeError(f"model must be an nn.Module, got {_arrays.describe(model)}")
        self.given = batch_size(batch)
        if self.given < 2:
            raise ArgumentError(
                f"batch must hold tensors of at least two examples, got {self.given}"
            )
        self.count = max(2, min(self.given, most))
        self._model = model
        self._store = store
        self._closure = closure
        self._batch = batch
        self._states = states
        self._unbatched = unbatched
        self._tokens = None if tokens is None else _arrays.column("tokens", tokens, self.given)

    def of(self, part: slice, states: Mapping[str, State] | None = None) -> NDArray[np.float32]:
        """[checkpoints, queries, width] of a part of the batch, as `Store.find` takes them."""
        batch = sliced(self._batch, part.start, part.stop)
        with evaluating(self._model):
            return query_rows(
                self._model,
                self._store,
                lambda: self._closure(*batch),
                states=self._states if states is None else states,
                tokens=None if self._tokens is None else self._tokens[part],
                unbatched=self._unbatched,
                recorded_weights=states is None,
            )

    def randomised(self, part: slice, seed: int) -> NDArray[np.float32]:
        """The same by random weights."""
        names = self._store.checkpoints
        generator = torch.Generator().manual_seed(seed & 2**63 - 1)
        trained = self._states or dict.fromkeys(names, self._model.state_dict())
        parameters = {
            canonical_name(name) for name, _ in self._model.named_parameters(remove_duplicate=False)
        }
        return self.of(
            part,
            {
                name: {
                    key: _like(value, generator) if key in parameters else value
                    for key, value in load(name, trained[name]).items()
                }
                for name in names
            },
        )


def _like(value: Tensor, generator: torch.Generator) -> Tensor:
    """Normal values of the mean and spread of these."""
    if not value.is_floating_point() or not value.numel():
        return value
    wide = value.detach().to("cpu", torch.float32)
    drawn = torch.randn(wide.shape, generator=generator)
    found = wide.mean() + wide.std(correction=0) * drawn
    return found.to(value.dtype)
