"""`query`: the gradient of a user's own loss, against a store."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from whence import _arrays
from whence.errors import (
    ArgumentError,
    CheckpointError,
    DtypeError,
    MismatchError,
    WeightsError,
)
from whence.gradients.capture import Capture, not_finite
from whence.gradients.hooks import Hooks, refuse_batch_statistics
from whence.gradients.maps import map_of_store
from whence.gradients.passes import backward
from whence.gradients.recorder import patterns
from whence.gradients.reduction import REDUCTIONS, own_loss_factor, refuse_tokens
from whence.gradients.structure import structure_in_store
from whence.gradients.weights import State, digest, load, preserved, put
from whence.search import SIDES, Hits, Index, Source, Store
from whence.store import COMBINED


def query(
    model: nn.Module,
    store: Store | Index | str | os.PathLike[str],
    closure: Callable[[], Tensor],
    k: int = 10,
    *,
    states: Mapping[str, State] | None = None,
    reduction: str | None = None,
    tokens: Any = None,
    queries: int | None = None,
    unbatched: Sequence[str] = (),
    where: Any = None,
    exclude: Sequence[Sequence[Any]] | None = None,
    missing: str = "error",
    side: str = "both",
    approximate: bool = False,
    diverse: int | None = None,
    threads: int | None = None,
) -> Hits:
    """The training examples that helped and harmed a batch of queries most.

    Runs the closure once for each checkpoint, takes the gradient of each query's own loss, and
    searches the store with it. Weights, modes, `.grad` and random state are afterwards as before.

    Args:
        model: The recorded model; one, not a list.
        store: An open store, or its path; or a `whence.Index` of one, for many questions.
        closure: () -> loss of the queries, by your own lines, without backward.
        k: How many to return at each end.
        states: Checkpoint name -> state dict or file of torch.save. Each is loaded into `model` in
            place while the closure runs. None for a store of one checkpoint: the model as it is.
        reduction: How the closure's loss combines the queries: "mean", "sum", "token_mean"; None
            means as recorded.
        tokens: [queries] counted tokens, for reduction="token_mean".
        queries: How many queries there are; None means dimension 0 of the model's first tensor.
        unbatched: As in `record`.
        where: As in `Store.search`, with exclude, missing, side and threads.
        exclude: See where.
        missing: See where.
        side: See where.
        approximate: As in `Index.search`, for an index only, with diverse.
        diverse: See approximate.
        threads: See where.

    Returns:
        Hits, one row per query.

    Raises:
        CheckpointError: If a state is missing, unknown, or does not fit the model.
        MismatchError: If the store is of another model, or the index of no store.
        WeightsError: If the weights are not those of a checkpoint recorded with fixed weights.
        LayerError: If no gradient reached a recorded layer, or dimension 0 is not the batch.
        NotFiniteError: If a query's gradient is NaN or infinite.
        WhenceError: And whatever `Store.search` raises.

    Examples:
        >>> hits = whence.query(model, store, lambda: loss_fn(model(x), y))  # doctest: +SKIP
    """
    index = store if isinstance(store, Index) else None
    source = store.source if isinstance(store, Index) else store
    if index is None and (approximate or diverse is not None):
        raise ArgumentError(
            "store must be a whence.Index for approximate or diverse answers, got "
            f"{_arrays.describe(store)}"
        )
    if isinstance(source, Source):
        if not isinstance(source, Store):
            raise MismatchError(f"store must be an index of a store, got one of {source!r}")
    else:
        source = Store(source)
    _arrays.integer("k", k, 1)
    _arrays.choice("missing", missing, ("error", "drop"))
    _arrays.choice("side", side, SIDES)
    rows = query_rows(
        model,
        source,
        closure,
        states=states,
        reduction=reduction,
        tokens=tokens,
        queries=queries,
        unbatched=unbatched,
    )
    given: dict[str, Any] = {
        "where": where,
        "exclude": exclude,
        "missing": missing,
        "side": side,
        "threads": threads,
    }
    if index is None:
        return source.find(rows, k, **given)
    return index.find(rows, k, **given, approximate=approximate, diverse=diverse)


def query_rows(
    model: nn.Module,
    store: Store,
    closure: Callable[[], Tensor],
    *,
    states: Mapping[str, State] | None = None,
    reduction: str | None = None,
    tokens: Any = None,
    queries: int | None = None,
    unbatched: Sequence[str] = (),
    recorded_weights: bool = True,
) -> NDArray[np.float32]:
    """[checkpoints, queries, dim] the queries' rows in the store's map; arguments as in `query`.

    For a store whose rows are sums over checkpoints, [1, queries, dim].

    For a store with layout="factored", whose `find` takes them, rows of factors. Weights that are
    not those recorded are an error, unless `recorded_weights` is False.

    Raises:
        WhenceError: As `query`.
    """
    if isinstance(model, (list, tuple)):
        raise DtypeError(
            f"model must be one nn.Module, since the closure sees one, got "
            f"{len(model)}; pass the others' weights as states="
        )
    if not isinstance(model, nn.Module):
        raise DtypeError(f"model must be an nn.Module, got {_arrays.describe(model)}")
    if not callable(closure):
        raise DtypeError(
            f"closure must be a function without arguments that returns the loss, "
            f"got {_arrays.describe(closure)}"
        )
    if queries is not None:
        queries = _arrays.integer("queries", queries, 1)
    reduction = _arrays.choice(
        "reduction", store.manifest.reduction if reduction is None else reduction, REDUCTIONS
    )
    refuse_tokens(reduction, tokens)
    loaded = _states(store, states)
    structure = structure_in_store(model, store.manifest.model, store.path)
    manifest = store.manifest
    hooks = Hooks(model, structure, strict=False)
    found = []
    random_state = torch.get_rng_state()
    with preserved(model, weights=loaded is not None):
        hooks.install()
        try:
            for checkpoint in manifest.checkpoints:
                if loaded is not None:
                    put(model, checkpoint.name, load(checkpoint.name, loaded[checkpoint.name]))
                fixed = recorded_weights and checkpoint.weights == "fixed"
                if fixed and checkpoint.first not in (None, digest(model)):
                    name = "weights" if loaded is None else f"states[{checkpoint.name!r}]"
                    way = "load them, or pass them as states=" if loaded is None else "pass those"
                    raise WeightsError(
                        f"{name} must be those that checkpoint {checkpoint.name!r} was recorded "
                        f"with, got others; {way}"
                    )
                torch.set_rng_state(random_state)
                refuse_batch_statistics(model)
                rows = map_of_store(store.path, manifest, checkpoint, torch.get_num_threads())
                found.append(
                    _rows(
                        hooks,
                        Capture(structure, rows, queries, patterns("unbatched", unbatched)),
                        closure,
                        reduction,
                        tokens,
                    )
                )
        finally:
            hooks.remove()
    stacked = np.stack(found)
    if manifest.rows == COMBINED:  # one row a query, as the examples have
        stacked = stacked.astype(np.float64).sum(axis=0, keepdims=True).astype(np.float32)
    return stacked


def _rows(
    hooks: Hooks,
    capture: Capture,
    closure: Callable[[], Tensor],
    reduction: str,
    tokens: Any,
) -> NDArray[np.float32]:
    """[queries, dim] at the model's present weights."""
    backward(hooks, capture, closure)
    rows, norms = capture.rows(own_loss_factor(reduction, capture.batch, tokens))
    if capture.bad:
        raise not_finite([f"query {index}" for index in range(capture.batch)], capture.bad)
    return rows if norms is None else capture.weighted(rows, norms)


def _states(store: Store, states: Mapping[str, State] | None) -> Mapping[str, State] | None:
    """The states, if there is one for each checkpoint and no other."""
    names = [checkpoint.name for checkpoint in store.manifest.checkpoints]
    if states is None:
        if len(names) > 1:
            raise CheckpointError(
                f"states must have the weights of each checkpoint {names}, got None"
            )
        return None
    if not isinstance(states, Mapping):
        raise DtypeError(
            f"states must be a dict of checkpoint name to weights, got {_arrays.describe(states)}"
        )
    lacking = [name for name in names if name not in states]
    if lacking:
        raise CheckpointError(
            f"states must have the weights of each checkpoint {names}, got none for {lacking}"
        )
    unknown = [name for name in states if name not in names]
    if unknown:
        raise CheckpointError(f"states must name checkpoints of {names}, got {unknown[0]!r}")
    return states
