"""Whether a step of training on what was found makes the target more probable."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from whence import _arrays
from whence.errors import DtypeError, LayerError, NotFiniteError
from whence.evaluate.checks import function
from whence.evaluate.measures import PerQuery
from whence.evaluate.retrieval import ranked

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, eq=False, kw_only=True)
class TailPatch(PerQuery):
    """What single steps did to the targets.

    Attributes:
        per_query: [queries] float64, the mean of `changes` over the examples of each.
        measure: "tail-patch".
        changes: [queries, k] float64, the target's log-probability after a step on the example,
            less `before`: above zero if the example teaches the target.
        before: [queries] float64.
    """

    measure: str = "tail-patch"
    changes: NDArray[np.float64]
    before: NDArray[np.float64]


def tail_patch(
    model: torch.nn.Module,
    found: Any,
    loss: Callable[[Any], torch.Tensor],
    log_probability: Callable[[int], Any],
    optimizer: Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer],
    *,
    k: int | None = None,
) -> TailPatch:
    """One step of training on each example found, and what it does to its query's target.

    For each of a query's k most helpful examples alone, from the weights as they are: one step of
    the optimizer on the example's loss, and the change of the log-probability of the query's
    target (Chang et al., "Scalable Influence and Fact Tracing for Large Language Model
    Pretraining", arXiv 2410.17413). Take random examples as the baseline: a step on
    any text of the kind can raise a target. An example that several queries found is stepped on
    once. Weights, buffers, modes, `.grad` and random state are afterwards as before, whatever
    happens; each step and each target sees the buffers and the random state of the beginning.

    Args:
        model: The model, in the mode that the steps and the targets should see.
        found: Hits, of which the helpful side counts; or [queries, width] ids, best first.
        loss: (id) -> the training loss of this example, by your own lines, without backward.
        log_probability: (number of the query) -> the log-probability of its target, a number or a
            tensor without dimensions.
        optimizer: (trainable parameters) -> a new optimizer, such as
            `lambda parameters: torch.optim.SGD(parameters, lr=1e-3)`. A new Adam takes a step of
            its learning rate in every coordinate; give it the training's own moments by its
            `load_state_dict` for the step that the training would have taken.
        k: How many examples of each query to step on; None means all that were found.

    Returns:
        The changes. O(distinct examples) steps and O(queries · k) targets; a copy of the weights.

    Raises:
        DtypeError: If an argument is of another type, or a loss is no tensor without dimensions.
        ShapeError: If `found` is of another shape.
        IdError: If ids are of several kinds, or one is twice in a list.
        ArgumentError: If k is out of range.
        LayerError: If a loss has no graph.
        NotFiniteError: If a loss or a log-probability is NaN or infinite.
    """
    import torch

    from whence.gradients.weights import preserved

    if not isinstance(model, torch.nn.Module):
        raise DtypeError(f"model must be an nn.Module, got {_arrays.describe(model)}")
    function("loss", loss, "of an id")
    function("log_probability", log_probability, "of the number of a query")
    function("optimizer", optimizer, "of parameters")
    ids = ranked(found)
    if k is not None:
        ids = ids[:, : _arrays.integer("k", k, 1, ids.shape[1])]

    def measured(query: int) -> float:
        with preserved(model, weights=False), torch.no_grad():
            return _number(f"log_probability({query})", log_probability(query))

    changes = np.empty(ids.shape)
    before = np.array([measured(query) for query in range(len(ids))])
    for id_ in np.unique(ids).tolist():
        with preserved(model, weights=True):
            with preserved(model, weights=False):
                _step(model, loss, optimizer, id_)
            for query, place in np.argwhere(ids == id_).tolist():
                changes[query, place] = measured(query) - before[query]
    return TailPatch(per_query=changes.mean(axis=1), changes=changes, before=before)


def _step(
    model: torch.nn.Module,
    loss: Callable[[Any], torch.Tensor],
    optimizer: Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer],
    id_: Any,
) -> None:
    """One step on an example."""
    import torch

    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in model.parameters():
        parameter.grad = None
    made = optimizer(parameters)
    if not isinstance(made, torch.optim.Optimizer):
        raise DtypeError(
            f"optimizer must return a torch.optim.Optimizer, got {_arrays.describe(made)}"
        )
    with torch.enable_grad():
        own = loss(id_)
        if not isinstance(own, torch.Tensor) or own.dim() != 0:
            raise DtypeError(
                "loss must return a tensor without dimensions, got "
                f"{_arrays.describe(own)} for {id_!r}"
            )
        if not own.requires_grad:
            raise LayerError(
                "loss must return a loss of the model that can be differentiated, got one "
                f"without a graph for {id_!r} (torch.no_grad, .item or .detach in it?)"
            )
        _number(f"loss({id_!r})", own)
        own.backward()  # type: ignore[no-untyped-call]
    made.step()


def _number(name: str, value: Any) -> float:
    """`value` as a finite number.

    Raises:
        DtypeError: If it is none.
        NotFiniteError: If it is NaN or infinite.
    """
    found = _arrays.array(name, value)
    if found.dtype.kind not in "iuf" or found.ndim:
        raise DtypeError(f"{name} must be a number, got {_arrays.describe(value)}")
    if not np.isfinite(found):
        raise NotFiniteError(f"{name} must be finite, got {found}")
    return float(found)
