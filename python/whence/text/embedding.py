"""Cosines of embeddings."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from whence import _arrays
from whence._arrays import Ids
from whence.errors import ArgumentError, ShapeError
from whence.hashing.families import rows_of
from whence.search import Hits, Index, Matrix
from whence.text.baseline import Baseline, ids_of

STEP = 1 << 14
"""Rows that are divided by their norms together, in float64."""


class Embedding(Baseline):
    """Cosines of embeddings that the caller brings.

    Such as the mean over tokens of a model's last hidden states, or the output of an encoder of
    sentences: similarity of representations is the baseline that gradients have to beat.

    Args:
        vectors: [documents, width] float32.
        ids: [documents] int64 or str, distinct; None for the numbers of the documents.
        threads: How many threads to build with; None means all processors.

    Raises:
        ArgumentError: If a vector is all zeros, which has no cosine.
        DtypeError: If vectors are not float32.
        IdError: If ids repeat, or are of no one kind.
        NotFiniteError: If a vector holds a NaN or an infinity.
        ShapeError: If vectors are not [documents, width], at least one of each, or ids are not one
            for each.

    Keeps a `whence.Index` of the vectors divided by their norms: 4 bytes a coordinate, and a byte
    more for many documents.

    Examples:
        >>> import numpy as np
        >>> from whence.text import Embedding
        >>> index = Embedding(np.array([[1, 1], [0, 3], [-2, 0]], np.float32))
        >>> index.search(np.array([[0, 1]], np.float32), k=2).helpful.ids
        array([[1, 0]])
    """

    method = (
        "cosine of embeddings, a baseline without gradients: what is most similar is taken for "
        "the most helpful"
    )
    unit = "cosine, no loss: 1 for the same direction"

    def __init__(self, vectors: Any, ids: Any = None, *, threads: int | None = None) -> None:
        rows = _unit("vectors", rows_of("vectors", vectors))
        self._index = Index(Matrix(rows, ids_of(ids, len(rows))), threads=threads)
        self._width = rows.shape[1]

    def __repr__(self) -> str:
        return f"<whence Embedding of {len(self)} documents, {self._width} wide>"

    @property
    def ids(self) -> Ids:
        """[documents] int64 or str."""
        return self._index.source.ids

    def search(
        self, queries: Any, k: int = 10, *, where: Any = None, threads: int | None = None
    ) -> Hits:
        """The k documents whose vectors have the largest cosine with each query's.

        Args:
            queries: [queries, width] float32.
            k: How many to return.
            where: Only documents that pass: [documents] bool, or a list of ids.
            threads: How many threads to use; None means all processors. Scores have the same bits
                for any number.

        Returns:
            Hits, min(k, eligible documents) wide; the harmful side has width 0. O(documents ·
            queries · width) time at most; see `whence.Index`.

        Raises:
            ArgumentError: If k is below 1, no document is eligible, or a query is all zeros.
            DtypeError: If queries are not float32.
            IdError: If an id of `where` is not there.
            NotFiniteError: If a query holds a NaN or an infinity.
            ShapeError: If queries are not [queries, width], or there is none.
        """
        queries = _arrays.float_rows("queries", queries, self._width)
        if not len(queries):
            raise ShapeError(f"queries must have at least one row, got {list(queries.shape)}")
        rows = _unit("queries", queries)
        hits = self._index.search(rows, k, where=where, side="helpful", threads=threads)
        return replace(hits, method=self.method, unit=self.unit)

    def scores(self, queries: Any, *, threads: int | None = None) -> NDArray[np.float64]:
        """[queries, documents] all cosines, those of `search`, of float32 precision.

        Raises:
            WhenceError: As `search`.

        O(documents · queries · (width + log documents)) time.
        """
        side = self.search(queries, len(self), threads=threads).helpful
        scores = np.empty(side.scores.shape)
        np.put_along_axis(scores, side.positions, side.scores.astype(np.float64), axis=1)
        return scores


def _unit(name: str, vectors: NDArray[np.float32]) -> NDArray[np.float32]:
    """[rows, width] vectors divided by their norms.

    Raises:
        ArgumentError: If one is all zeros.
    """
    unit = np.empty_like(vectors)
    for start in range(0, len(vectors), STEP):
        rows = vectors[start : start + STEP].astype(np.float64)  # whose norms do not overflow
        norms = np.sqrt(np.square(rows).sum(axis=1, keepdims=True))
        if not norms.all():
            row = start + int(norms.argmin())
            raise ArgumentError(f"{name} must have norms above 0, got zeros in row {row}")
        unit[start : start + STEP] = rows / norms
    return unit
