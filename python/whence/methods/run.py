"""`Run`: a model, its training data and its checkpoints, as every method takes them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from whence import _arrays
from whence._arrays import Ids
from whence.errors import ArgumentError, CheckpointError, DtypeError, ShapeError
from whence.gradients.blocks import BlockMap
from whence.gradients.capture import Capture, not_finite
from whence.gradients.divided import Divided
from whence.gradients.hooks import Hooks, refuse_batch_statistics
from whence.gradients.passes import Task, backward, evaluating, length_of, reread, taken
from whence.gradients.recorder import patterns
from whence.gradients.reduction import REDUCTIONS, own_loss_factor
from whence.gradients.residuals import Calls
from whence.gradients.structure import structure_of
from whence.gradients.weights import State, load, put
from whence.sketch import Sketch
from whence.store.progress import checked, watched


@dataclass(frozen=True)
class Seen:
    """What one batch gave.

    Attributes:
        capture: What the hooks gathered.
        factor: What turns its gradients into those of own losses.
        examples: [batch] numbers of its examples.
    """

    capture: Capture
    factor: float
    examples: NDArray[np.int64]


class Run:
    """A model, its training data and its checkpoints.

    Args:
        model: The model, as in `record`; its weights are after every call as before.
        loader: Batches of the training data, as in `fit_factors`.
        loss: (*batch) -> loss, as in `fit_factors`.
        states: Checkpoint name -> state dict or file of torch.save; None for the model as it is.
        learning_rates: Checkpoint name -> step size, for methods that weigh by it; None for equal
            ones.
        ids: [examples] the examples' keys in the loader's order; None for numbers from 0 on.
        reduction: How the loss combines the examples of a batch, as in `record`.
        tokens: (*batch) -> [batch] counted tokens, for reduction="token_mean".
        layers: As in `record`, with uncovered and unbatched.
        uncovered: See layers.
        unbatched: See layers.
        progress: Whether to show bars; None means if standard error is a terminal.

    Raises:
        ArgumentError: If an argument is out of range.
        CheckpointError: If learning rates are not one for each checkpoint.
        DtypeError: If an argument is of another type.
    """

    def __init__(
        self,
        model: nn.Module,
        loader: Iterable[Any],
        loss: Callable[..., Tensor],
        *,
        states: Mapping[str, State] | None = None,
        learning_rates: Mapping[str, float] | None = None,
        ids: Any = None,
        reduction: str = "mean",
        tokens: Callable[..., Any] | None = None,
        layers: str | Sequence[str] | None = None,
        uncovered: str = "error",
        unbatched: Sequence[str] = (),
        progress: bool | None = None,
    ) -> None:
        self.model = model
        self.loader = reread("loader", loader)
        self.task = Task(
            loss,
            _arrays.choice("reduction", reduction, REDUCTIONS),
            tokens,
            patterns("unbatched", unbatched),
        )
        if states is not None and (not isinstance(states, Mapping) or not states):
            raise DtypeError(
                "states must be a dict of checkpoint name to weights with at least one, got "
                f"{_arrays.describe(states)}"
            )
        self.states: dict[str, State | None] = {"0": None} if states is None else dict(states)
        if learning_rates is not None and set(learning_rates) != set(self.states):
            raise CheckpointError(
                f"learning_rates must be one for each of {list(self.states)}, got "
                f"{learning_rates!r}"
            )
        self.learning_rates = {
            name: _arrays.number(f"learning_rates[{name!r}]", rate, positive=True)
            for name, rate in (learning_rates or dict.fromkeys(self.states, 1.0)).items()
        }
        self.layers = layers
        self.uncovered = uncovered
        self.structure = structure_of(model, layers, uncovered)
        self.progress = checked(progress)
        self._ids = None if ids is None else _arrays.ids("ids", ids)
        self._hooks = Hooks(model, self.structure, strict=uncovered == "error")
        self.examples = 0

    @property
    def ids(self) -> Ids:
        """[examples] their keys, once the data has been seen.

        Raises:
            ShapeError: If there are not as many as examples.
        """
        if self._ids is None:
            return np.arange(self.examples)
        if len(self._ids) != self.examples:
            raise ShapeError(
                f"ids must be one for each of {self.examples} examples, got {len(self._ids)}"
            )
        return self._ids

    @property
    def last(self) -> str:
        """The name of the last checkpoint."""
        return list(self.states)[-1]

    @contextmanager
    def at(self, name: str) -> Iterator[None]:
        """The model at a checkpoint, in evaluation mode, with hooks."""
        state = self.states[name]
        with evaluating(self.model, weights=state is not None):
            if state is not None:
                put(self.model, name, load(name, state))
            refuse_batch_statistics(self.model)
            self._hooks.install()
            try:
                yield
            finally:
                self._hooks.remove()

    def training(
        self,
        rows: Sketch | BlockMap | Divided,
        mode: Callable[[int], AbstractContextManager[Any]] | None = None,
        what: str = "training data",
        chosen: NDArray[np.int64] | None = None,
    ) -> Iterator[Seen]:
        """Batch after batch, at the present weights.

        Args:
            rows: What gathers the gradients.
            mode: Number of the batch -> what is entered while its loss runs.
            what: What the bar says.
            chosen: Numbers of the examples that count, rising; None for all.

        Raises:
            NotFiniteError: If a gradient is NaN or infinite.
        """
        seen = 0
        for number, batch, examples in self.batches(chosen, what):
            capture = Capture(self.structure, rows, None, self.task.unbatched)
            entered = None if mode is None else mode(number)
            capture, factor = self.task.run(self._hooks, capture, batch, entered)
            _refuse(capture, "example", int(examples[0]))
            yield Seen(capture, factor, examples)
            seen += capture.batch
        if not seen:
            raise ArgumentError("loader must give at least one batch, got none")

    def batches(
        self, chosen: NDArray[np.int64] | None = None, what: str = "training data"
    ) -> Iterator[tuple[int, Any, NDArray[np.int64]]]:
        """(number, batch, [batch] numbers of its examples), of those that are chosen."""
        first = 0
        for number, batch in enumerate(
            watched(self.loader, what, self.progress, "batch", leave=False)
        ):
            examples = np.arange(first, first + length_of(batch))
            first += len(examples)
            if chosen is not None:
                mine = np.isin(examples, chosen)
                if not mine.any():
                    continue
                batch, examples = taken(batch, np.flatnonzero(mine)), examples[mine]
            yield number, batch, examples
        self.examples = first

    def queries(
        self,
        rows: Sketch | BlockMap | Divided,
        closure: Callable[[], Tensor],
        mode: Calls | None = None,
    ) -> Seen:
        """The queries of a closure, at the present weights.

        Raises:
            DtypeError: If the closure is no function, or returns something else.
            NotFiniteError: If a gradient is NaN or infinite.
        """
        if not callable(closure):
            raise DtypeError(
                "closure must be a function without arguments that returns the loss, got "
                f"{_arrays.describe(closure)}"
            )
        capture = Capture(self.structure, rows, None, self.task.unbatched)

        counts: Any = None

        def run() -> Tensor:
            nonlocal counts
            with mode if mode is not None else nullcontext():
                found, counts = self.asked(closure)
            loss: Tensor = found
            return loss

        state = torch.get_rng_state()
        backward(self._hooks, capture, run, draws=mode)
        torch.set_rng_state(state)
        _refuse(capture, "query", 0)
        none = np.arange(capture.batch)
        return Seen(capture, own_loss_factor(self.task.reduction, capture.batch, counts), none)

    def asked(self, closure: Callable[[], Any]) -> tuple[Any, Any]:
        """What a closure returns: the loss, and for reduction="token_mean" the counted tokens.

        Raises:
            DtypeError: If it is not both.
        """
        found = closure()
        if self.task.reduction != "token_mean":
            return found, None
        if not isinstance(found, tuple) or len(found) != 2:
            raise DtypeError(
                "closure must return the loss and the [queries] counted tokens for "
                f"reduction='token_mean', got {_arrays.describe(found)}"
            )
        return found


def _refuse(capture: Capture, what: str, first: int) -> None:
    if capture.bad:
        names = [f"{what} {first + index}" for index in range(capture.batch)]
        raise not_finite(names, capture.bad)
