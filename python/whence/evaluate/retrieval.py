"""Whether the examples that are known to matter are found."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from whence import _arrays
from whence.errors import ArgumentError, IdError, ShapeError
from whence.evaluate.measures import PerQuery
from whence.search import Hits


def recall_at_k(found: Any, relevant: Sequence[Any], k: int) -> PerQuery:
    """The share of each query's relevant examples that are among its k most helpful.

    Args:
        found: Hits, of which the helpful side counts; or [queries, width] ids, best first.
        relevant: For each query the ids that should be found, such as those of documents that
            state the fact asked for.
        k: How many of the found count, at most `width`.

    Returns:
        From 0 to 1 for each query. O(queries · width).

    Raises:
        ShapeError: If `relevant` is not one list for each query.
        IdError: If ids are of several kinds, or one is twice in a list.
        ArgumentError: If k is out of range, or a query has no relevant example.
    """
    known = _known(found, relevant)
    k = _arrays.integer("k", k, 1, known.shape[1])
    totals = np.array([len(each) for each in relevant])
    return PerQuery(known[:, :k].sum(axis=1) / totals, f"recall@{k}")


def mean_reciprocal_rank(found: Any, relevant: Sequence[Any]) -> PerQuery:
    """One over the rank, from 1, of the first relevant example of each query; 0 if none is found.

    Args:
        found: As in `recall_at_k`; what lies beyond its width counts as not found.
        relevant: As in `recall_at_k`.

    Returns:
        From 0 to 1 for each query; `mean` is the mean reciprocal rank. O(queries · width).

    Raises:
        WhenceError: As `recall_at_k`.
    """
    known = _known(found, relevant)
    rank = known.argmax(axis=1) + 1
    return PerQuery(np.where(known.any(axis=1), 1 / rank, 0.0), "reciprocal rank")


def ranked(found: Any) -> NDArray[Any]:
    """[queries, width] ids, best first.

    Raises:
        ShapeError: If they are not, or the helpful side of hits was not asked for.
        IdError: If ids are of several kinds, or one is twice in a list.
    """
    ids = found.helpful.ids if isinstance(found, Hits) else _arrays.array("found", found)
    if ids.ndim != 2 or 0 in ids.shape:
        raise ShapeError(
            f"found must be hits with a helpful side or [queries, width] ids, got {list(ids.shape)}"
        )
    return np.stack([_arrays.ids(f"found[{query}]", each) for query, each in enumerate(ids)])


def _known(found: Any, relevant: Sequence[Any]) -> NDArray[np.bool_]:
    """[queries, width] whether each found id is relevant."""
    ids = ranked(found)
    if not _arrays.is_list(relevant) or len(relevant) != len(ids):
        raise ShapeError(
            f"relevant must be one list of ids for each of {len(ids)} queries, got "
            f"{_arrays.describe(relevant)}"
        )
    known = np.empty(ids.shape, np.bool_)
    for query, listed in enumerate(relevant):
        name = f"relevant[{query}]"
        if not _arrays.is_list(listed) or not len(listed):
            raise ArgumentError(
                f"{name} must be a list of at least one id, got {_arrays.describe(listed)}"
            )
        wanted = _arrays.ids(name, listed)
        if wanted.dtype.kind != ids.dtype.kind:
            raise IdError(
                f"{name} must be {_arrays.kind_of_array(ids)} as the found, got "
                f"{_arrays.kind_of_array(wanted)}"
            )
        known[query] = np.isin(ids[query], wanted)
    return known
