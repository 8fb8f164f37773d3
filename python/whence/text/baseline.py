"""What every similarity of texts can be asked."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from whence import _arrays
from whence._arrays import Ids
from whence.errors import ShapeError
from whence.search import Hits


class Baseline(ABC):
    """Documents with ids, and their similarity to queries."""

    method: str
    """How its scores are computed, for people."""

    unit: str
    """What a score of 1 means."""

    @property
    @abstractmethod
    def ids(self) -> Ids:
        """[documents] int64 or str."""

    def __len__(self) -> int:
        return len(self.ids)

    @abstractmethod
    def search(
        self, queries: Any, k: int = 10, *, where: Any = None, threads: int | None = None
    ) -> Hits:
        """The k documents most similar to each query, as the helpful side of hits."""

    @abstractmethod
    def scores(self, queries: Any, *, threads: int | None = None) -> NDArray[np.float64]:
        """[queries, documents] all scores."""

    def candidates(
        self, queries: Any, k: int = 10_000, *, where: Any = None, threads: int | None = None
    ) -> list[list[Any]]:
        """The ids of the k documents most similar to each query, the most similar first.

        They are what `where` of `whence.query` takes, one query at a time. A filter biases what
        is found: what influences the query without being similar to it is never scored.

        Args:
            queries: As in `search`.
            k: How many to return; 10,000 are those of Grosse et al.
            where: As in `search`.
            threads: As in `search`.

        Returns:
            For each query at most k ids; fewer if fewer are eligible or, for `TfIdf` and `Bm25`,
            share a token with it. None at all for a query that shares none with any.

        Raises:
            WhenceError: As `search`.
        """
        side = self.search(queries, k, where=where, threads=threads).helpful
        return [
            ids[kept].tolist()
            for ids, kept in zip(side.ids, self._similar(side.scores), strict=True)
        ]

    def _similar(self, scores: NDArray[np.float32]) -> NDArray[np.bool_]:
        """Whether scores say that there is a similarity at all."""
        return np.ones(scores.shape, np.bool_)


def ids_of(ids: Any, count: int, first: int = 0) -> Ids:
    """The ids of so many documents: those given, or their numbers from `first` on.

    Raises:
        IdError: If ids repeat, or are of no one kind.
        ShapeError: If there are not as many.
    """
    if ids is None:
        return np.arange(first, first + count, dtype=np.int64)
    found = _arrays.ids("ids", ids)
    if len(found) != count:
        raise ShapeError(f"ids must be one for each of {count} documents, got {len(found)}")
    return found
