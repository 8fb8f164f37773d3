"""Asking a store: `open`, `Store.search`, and the `Hits` that come back."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from whence import _arrays
from whence._arrays import Ids
from whence.errors import (
    ArgumentError,
    CheckpointError,
    MismatchError,
    ShapeError,
    WhenceError,
)
from whence.factored import Factored
from whence.store import Reader

if TYPE_CHECKING:
    import pandas

SIGN = "positive = helpful: training on the example lowers the query's loss"
"""What the sign of every score means."""

METHOD = "gradient product (TracIn), the weak baseline: no curvature, no preconditioning"
"""The method of a plain search."""

COSINE = "cosine of both gradients, whatever their lengths, summed over checkpoints"
"""The unit of a score of normalized rows."""

Show: TypeAlias = Callable[[Any], Any]
"""id -> text, or a uint8 image of [height, width] or [height, width, 3]."""


@dataclass(frozen=True, eq=False)
class Side:
    """One end of the ranking.

    Attributes:
        ids: [queries, width] ids, the most extreme first.
        scores: [queries, width] float32.
        positions: [queries, width] numbers of the examples in the store.
    """

    ids: Ids
    scores: NDArray[np.float32]
    positions: NDArray[np.int64]


class Renderer(Protocol):
    """What draws hits; the report module provides it."""

    def text(self, hits: Hits) -> str:
        """For a terminal."""

    def fragment(self, hits: Hits) -> str:
        """HTML for a notebook."""

    def page(
        self,
        hits: Hits,
        path: Path,
        show: Show | None,
        queries: Sequence[Any] | None,
        title: str,
    ) -> None:
        """Writes a page that stands alone."""


@dataclass(frozen=True, eq=False)
class Hits:
    """The most helpful and the most harmful training examples of each query.

    The width of both sides is min(k, fewest examples eligible for any query); they are never
    padded.

    Attributes:
        helpful: The largest scores, largest first; of equal scores the earlier example first.
        harmful: The smallest scores, whatever their sign, smallest first.
        eligible: [queries] how many examples each query could have returned.
        method: How scores were computed.
        unit: What a score of 1 means.
        columns: What was stored beside the rows, [examples] each.
    """

    helpful: Side
    harmful: Side
    eligible: NDArray[np.int64]
    method: str
    unit: str
    columns: Mapping[str, NDArray[Any]] = field(repr=False)

    sign: ClassVar[str] = SIGN
    renderer: ClassVar[Renderer | None] = None

    def __len__(self) -> int:
        return len(self.eligible)

    def __str__(self) -> str:
        return self._drawn().text(self)

    def _repr_html_(self) -> str:
        return self._drawn().fragment(self)

    def to_pandas(self) -> pandas.DataFrame:
        """One row per hit: query, side, rank (from 0), id, score, and the stored columns.

        Raises:
            MissingDependencyError: If pandas is not installed.
        """
        try:
            import pandas
        except ImportError:
            from whence.errors import MissingDependencyError

            raise MissingDependencyError("to_pandas needs pandas: pip install pandas") from None
        frames = []
        for name, side in (("helpful", self.helpful), ("harmful", self.harmful)):
            queries, width = side.scores.shape
            positions = side.positions.reshape(-1)
            frames.append(
                pandas.DataFrame(
                    {
                        "query": np.repeat(np.arange(queries), width),
                        "side": name,
                        "rank": np.tile(np.arange(width), queries),
                        "id": side.ids.reshape(-1),
                        "score": side.scores.reshape(-1),
                        **{
                            column if column not in _TAKEN else f"column_{column}": values[
                                positions
                            ]
                            for column, values in self.columns.items()
                        },
                    }
                )
            )
        table = pandas.concat(frames, ignore_index=True)
        return table.sort_values(
            ["query", "side", "rank"], ascending=[True, False, True], ignore_index=True
        )

    def to_html(
        self,
        path: str | os.PathLike[str],
        show: Show | None = None,
        *,
        queries: Sequence[Any] | None = None,
        title: str = "Which training examples made the model do this?",
    ) -> Path:
        """Writes a page that stands alone: no script from elsewhere, no network, opens offline.

        Args:
            path: The file to write.
            show: id -> text, or a uint8 image of [height, width] or [height, width, 3].
            queries: What to show for each query: texts or images.
            title: Heading of the page.

        Returns:
            The path.

        Raises:
            ShapeError: If there are not as many `queries` as queries.
            DtypeError: If something shown is neither text nor an image.
        """
        if queries is not None and len(queries) != len(self):
            raise ShapeError(f"queries must be {len(self)} texts or images, got {len(queries)}")
        path = Path(path)
        self._drawn().page(self, path, show, queries, title)
        return path

    def _drawn(self) -> Renderer:
        if self.renderer is None:
            raise WhenceError("hits need whence.report to be drawn: import whence first")
        return self.renderer


_TAKEN = ("query", "side", "rank", "id", "score")


class Store(Reader):
    """A store, open for reading: a snapshot of what was committed when it was opened.

    Args:
        path: The store's folder.

    Raises:
        StoreError: If there is no store, or it is damaged.
    """

    def __repr__(self) -> str:
        sketch = self.manifest.sketch
        what = "factored"
        if not self.manifest.is_factored:
            what = f"{sketch['kind']} dim {sketch['dim']} seed {sketch['seed']}"
        return (
            f"<whence store {str(self.path)!r}: {len(self)} examples, "
            f"{len(self.checkpoints)} checkpoints {self.checkpoints}, {what}, "
            f"{self.manifest.dtype}>"
        )

    def search(
        self,
        queries: Any,
        k: int = 10,
        *,
        where: Any = None,
        exclude: Sequence[Sequence[Any]] | None = None,
        missing: str = "error",
        threads: int | None = None,
    ) -> Hits:
        """The k most helpful and the k most harmful examples of each query row, exactly.

        The score is the inner product of the stored row and the query row; with several
        checkpoints the sum over them, weighted by their learning rates (TracInCP; Pruthi et al.,
        "Estimating training data influence by tracing gradient descent", NeurIPS 2020).

        Args:
            queries: [queries, dim] float32 rows from the same sketch; [checkpoints, queries, dim]
                for a store of several checkpoints.
            k: How many to return at each end.
            where: Only examples that pass: a dict of column name to a value or a list of values,
                or [examples] bool.
            exclude: For each query the ids that it must not return, such as its own.
            missing: What to do with an id that lacks a checkpoint: "error", or "drop" to leave it
                out.
            threads: How many threads to use; None means all processors.

        Returns:
            Hits. O(checkpoints · examples · queries · dim) time, in a working set that does not
            grow with the store.

        Raises:
            ArgumentError: If k is below 1 or no example is eligible.
            DtypeError: If queries are not float32.
            ShapeError: If queries have another shape.
            NotFiniteError: If a query holds a NaN or an infinity, or a score overflows.
            IdError: If an id lacks a checkpoint, or an excluded id is not in the store.
            StoreError: If the store is empty or damaged.
        """
        if self.manifest.is_factored:
            raise MismatchError(
                "queries must be asked by whence.query of a store with layout='factored', whose "
                f"rows are factors and no vectors, got an array for {self.path}"
            )
        return self.find(
            self._query_rows(queries),
            k,
            where=where,
            exclude=exclude,
            missing=missing,
            threads=threads,
        )

    def find(
        self,
        rows: NDArray[np.float32],
        k: int = 10,
        *,
        where: Any = None,
        exclude: Sequence[Sequence[Any]] | None = None,
        missing: str = "error",
        threads: int | None = None,
    ) -> Hits:
        """As `search`, for [checkpoints, queries, width] rows that `whence.query` made.

        Raises:
            WhenceError: As `search`.
        """
        k = _arrays.integer("k", k, 1)
        threads = _arrays.threads(threads)
        _arrays.choice("missing", missing, ("error", "drop"))
        if not len(self):
            raise ArgumentError(f"the store must have rows to search, got none in {self.path}")
        keep = self.eligible(where)  # a fresh array, ours to change
        numbers = self.row_numbers(missing="error" if missing == "error" else "keep")
        keep &= (numbers >= 0).all(axis=0)
        examples = np.flatnonzero(keep)
        excluded, eligible = self._excluded(exclude, examples, rows.shape[1])
        width = min(k, int(eligible.min()))
        if width == 0:
            raise ArgumentError(
                "where and exclude must leave an example for every query, got "
                f"none for query {int(eligible.argmin())}"
            )
        rates, unit = self._weights()
        places: list[tuple[int, int]] = []
        if self.manifest.is_factored:
            factored = Factored.from_spec(self.manifest.sketch)
            places = factored.places
            rows = factored.weighted(rows, np.broadcast_to(rates[:, None], rows.shape[:2]))
        else:
            rows = rows * rates[:, None, None]
        sides = self.core.ends(
            np.ascontiguousarray(numbers[:, examples], np.uint64),
            np.ascontiguousarray(rows),
            width,
            (True, True),
            excluded,
            threads,
            places,
        )
        helpful, harmful = (
            Side(self.ids[positions], scores, positions)
            for positions, scores in ((examples[found], scores) for found, scores in sides)
        )
        return Hits(helpful, harmful, eligible, METHOD, unit, self.columns)

    def self_influence(self) -> NDArray[np.float64]:
        """[examples] the score of each example for itself: high for mislabelled and odd ones.

        The squared norm of its row, summed over checkpoints weighted by their learning rates; never
        negative. NaN for an example that lacks a checkpoint. In float64, which no norm overflows.

        Raises:
            CheckpointError: If some checkpoints have a learning rate and others not.
        """
        rates, _ = self._weights()
        norms = np.stack([self.norms(name) for name in self.checkpoints]).astype(np.float64)
        total: NDArray[np.float64] = (rates[:, None].astype(np.float64) * norms**2).sum(axis=0)
        return total

    def _query_rows(self, queries: Any) -> NDArray[np.float32]:
        """[checkpoints, queries, dim] checked rows."""
        queries = _arrays.to_numpy(queries)
        checkpoints = len(self.checkpoints)
        if isinstance(queries, np.ndarray) and queries.ndim == 3:
            if queries.shape[0] != checkpoints or queries.shape[2] != self.dim:
                raise ShapeError(
                    f"queries must be [{checkpoints}, queries, {self.dim}], one for "
                    f"each checkpoint, got {list(queries.shape)}"
                )
            flat = _arrays.float_rows("queries", queries.reshape(-1, queries.shape[2]), self.dim)
            rows = flat.reshape(queries.shape)
        else:
            rows = _arrays.float_rows("queries", queries, self.dim)[None]
            if checkpoints > 1:
                raise ShapeError(
                    f"queries must be [{checkpoints}, queries, {self.dim}], one for "
                    f"each of {self.checkpoints}, got {list(rows.shape[1:])}"
                )
        if rows.shape[1] == 0:
            raise ShapeError(f"queries must have at least one row, got {list(rows.shape)}")
        return rows

    def _weights(self) -> tuple[NDArray[np.float32], str]:
        """[checkpoints] weight of each in the sum, and the unit of the score."""
        rates = [checkpoint.learning_rate for checkpoint in self.manifest.checkpoints]
        normalized = self.manifest.sketch.get("normalize", False)
        if all(rate is None for rate in rates):
            if normalized:
                return np.ones(len(rates), np.float32), COSINE
            return np.ones(len(rates), np.float32), (
                "loss per unit of learning rate: what one step of gradient descent on the example "
                "takes off the query's loss, to first order"
            )
        if any(rate is None for rate in rates):
            named = dict(zip(self.checkpoints, rates, strict=True))
            raise CheckpointError(
                f"learning_rate must be given for all checkpoints or none, got {named}"
            )
        if normalized:
            return np.array(rates, np.float32), f"{COSINE}, each times its learning rate"
        return np.array(rates, np.float32), (
            "loss: what one step of gradient descent on the example at each checkpoint's learning "
            "rate takes off the query's loss, to first order"
        )

    def _excluded(
        self, exclude: Sequence[Sequence[Any]] | None, examples: NDArray[np.int64], queries: int
    ) -> tuple[list[list[int]], NDArray[np.int64]]:
        """For each query the places in `examples` it must not return, and how many are left."""
        if exclude is None:
            return [], np.full(queries, len(examples), np.int64)
        if isinstance(exclude, (str, bytes)) or len(exclude) != queries:
            raise ShapeError(
                f"exclude must be one list of ids for each of {queries} queries, "
                f"got {_arrays.describe(exclude)}"
            )
        place = np.full(len(self), -1, np.int64)
        place[examples] = np.arange(len(examples), dtype=np.int64)
        lists = []
        for query, listed in enumerate(exclude):
            name = f"exclude[{query}]"
            some = len(listed) > 0
            found = place[self.positions(name, _arrays.ids(name, listed))] if some else place[:0]
            lists.append(np.sort(found[found >= 0]).tolist())
        return lists, np.array([len(examples) - len(listed) for listed in lists], np.int64)


def open(path: str | os.PathLike[str]) -> Store:
    """The store at `path`, open for reading. Needs numpy only.

    Raises:
        StoreError: If there is no store, or it is damaged.

    Examples:
        >>> store = whence.open("runs/digits")  # doctest: +SKIP
        >>> store.search(rows, k=10).helpful.ids  # doctest: +SKIP
    """
    return Store(path)
