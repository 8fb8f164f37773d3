"""A recorded store, open for search."""

from __future__ import annotations

import os
from collections.abc import Sequence
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from whence._plain import counted, line
from whence.errors import CheckpointError, NotFiniteError
from whence.factored import Factored
from whence.search.hits import COSINE, METHOD, Hits
from whence.search.source import Source
from whence.store import COMBINED, SECOND_MOMENTS, Reader

ROUNDING = 1.001
"""How much longer than 1 a stored unit row can be: a step of float16 and what is subnormal.

The norms of quantised rows are read from what is stored, and only a sum of them is rounded.
"""


INFLUENCE = (
    "loss times examples: divided by the number of training examples, about what the query's loss "
    "would rise by without the example"
)
"""The unit of a preconditioned score."""

RATIO = "a pure number: the product of two gradients, value by value over the optimizer's moments"
"""The unit of a product of divided gradients."""


class Store(Reader, Source):
    """A store, open for reading: a snapshot of what was committed when it was opened.

    See `whence.open`. Used with `with`, it is closed at the end.
    """

    def __enter__(self) -> Store:
        _ = self.manifest  # a closed store has none
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def method(self) -> str:  # type: ignore[override]
        """How its scores are computed."""
        if not self.manifest.is_preconditioned:
            return METHOD
        kind = self.manifest.sketch.get("method", "EK-FAC")
        if kind == SECOND_MOMENTS:
            return "gradient products, both sides divided by the roots of the optimizer's moments"
        names = [checkpoint.name for checkpoint in self.manifest.checkpoints]
        over = f", over checkpoints {', '.join(names)}" if len(names) > 1 else ""
        return line(
            f"{kind} influence: gradient products, preconditioned by the loss's curvature{over}"
        )

    def __repr__(self) -> str:
        if self.closed:
            return line(f"<whence store {str(self.path)!r}, closed>")
        sketch = self.manifest.sketch
        names = [checkpoint.name for checkpoint in self.manifest.checkpoints]
        combined = self.manifest.rows == COMBINED
        what = "factored"
        if self.manifest.is_preconditioned:
            what = (
                f"preconditioned dim {sketch['dim']} of at most {sketch['coordinates']:,} "
                "coordinates"
            )
        elif not self.manifest.is_factored:
            what = f"{sketch['kind']} dim {sketch['dim']} seed {sketch['seed']}"
        error = self.quantisation_error
        lost = "" if error is None else f", relative error {error:.3f}"
        return line(
            f"<whence store {str(self.path)!r}: {counted(len(self), 'example')}, "
            f"{counted(len(names), 'checkpoint')} {names}{' combined' * combined}, {what}, "
            f"{self.manifest.dtype}{lost}>"
        )

    def search(
        self,
        queries: Any,
        k: int = 10,
        *,
        where: Any = None,
        exclude: Sequence[Sequence[Any]] | None = None,
        missing: str = "error",
        side: str = "both",
        threads: int | None = None,
    ) -> Hits:
        """The k most helpful and the k most harmful examples of each query row, exactly.

        The score is the inner product of the stored row and the query row; with several
        checkpoints the sum over them, weighted by their learning rates (TracInCP; Pruthi et al.,
        "Estimating training data influence by tracing gradient descent", NeurIPS 2020). Reads the
        rows from the files each time; a `whence.Index` is quicker for many questions.

        Args:
            queries: [queries, dim] float32 rows from the same sketch; [checkpoints, queries, dim]
                for a store of several checkpoints.
            k: How many to return at each end.
            where: Only examples that pass: a dict of column name to a value or a list of values,
                [examples] bool, or a list of ids.
            exclude: For each query the ids that it must not return, such as its own.
            missing: What to do with an id that lacks a checkpoint: "error", or "drop" to leave it
                out.
            side: "both", or only "helpful" or "harmful"; the other side then has width 0.
            threads: How many threads to use; None means all processors.

        Returns:
            Hits. O(checkpoints · examples · queries · dim) time at most, in a working set that
            does not grow with the store's rows; where norms differ much, as those of gradients of
            a trained model do, a few percent of that.

        Raises:
            ArgumentError: If k is below 1, side is another word, or no example is eligible.
            DtypeError: If queries are not float32.
            ShapeError: If queries have another shape.
            NotFiniteError: If a query holds a NaN or an infinity, or a score that matters
                overflows.
            IdError: If an id lacks a checkpoint, or an id of `where` or `exclude` is not in the
                store.
            StoreError: If the store is empty or damaged.
            MismatchError: If the store holds factors.
        """
        return self.find(
            self.query_rows(queries),
            k,
            where=where,
            exclude=exclude,
            missing=missing,
            side=side,
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
        side: str = "both",
        threads: int | None = None,
    ) -> Hits:
        """As `search`, for [checkpoints, queries, width] rows that `whence.query` made.

        Raises:
            WhenceError: As `search`.
        """
        asked = self.ask(
            rows, k, where=where, exclude=exclude, missing=missing, side=side, threads=threads
        )
        return self.scan(asked)

    def self_influence(self) -> NDArray[np.float64]:
        """[examples] the score of each example for itself: high for mislabelled and odd ones.

        The squared norm of its row, summed over checkpoints weighted by their learning rates; never
        negative. NaN for an example that lacks a checkpoint. In float64, which no norm overflows.

        Raises:
            CheckpointError: If some checkpoints have a learning rate and others not.
        """
        rates, _ = self.weights()
        norms = np.stack([self.norms(name) for name in self.checkpoints]).astype(np.float64)
        total: NDArray[np.float64] = (rates[:, None].astype(np.float64) * norms**2).sum(axis=0)
        return total

    def bounds(self, weights: NDArray[np.float32]) -> NDArray[np.float32] | None:
        """[examples] no less than the norm of the rows of each, side by side, times these weights.

        None for factored rows, whose scores norms do not bound in the same way.
        """
        if self.manifest.is_factored:
            return None
        numbers = self.row_numbers(missing="keep")
        norms = np.where(numbers < 0, 0, self.row_norms.astype(np.float64)[numbers])
        norms *= weights[:, None].astype(np.float64)
        with np.errstate(over="ignore"):
            found: NDArray[np.float32] = np.sqrt((norms**2).sum(axis=0)).astype(np.float32)
            return found * np.float32(ROUNDING)

    def check_unchanged(self) -> None:
        """Nothing: what was committed stays as it is."""

    @property
    def places(self) -> list[tuple[int, int]]:
        """The parts of factored rows, as the search engine takes them."""
        if not self.manifest.is_factored:
            return []
        return Factored.from_spec(self.manifest.sketch).places

    def weighted(self, rows: NDArray[np.float32]) -> NDArray[np.float32]:
        """[checkpoints, queries, width] query rows, each times the weight of its checkpoint."""
        if not self.manifest.is_factored:
            return super().weighted(rows)
        rates, _ = self.weights()
        factored = Factored.from_spec(self.manifest.sketch)
        return factored.weighted(rows, np.broadcast_to(rates[:, None], rows.shape[:2]))

    def weights(self) -> tuple[NDArray[np.float32], str]:
        """[checkpoints] weight of each in the sum, and the unit of the score.

        Raises:
            CheckpointError: If some checkpoints have a learning rate and others not.
            NotFiniteError: If a learning rate is infinite, or 0, in float32, in which scores are.
        """
        if self.manifest.rows == COMBINED:
            return np.ones(1, np.float32), INFLUENCE
        rates = [checkpoint.learning_rate for checkpoint in self.manifest.checkpoints]
        divided = self.manifest.sketch.get("method") == SECOND_MOMENTS
        if self.manifest.is_preconditioned and not divided:
            # Curvature has taken the learning rate's place; several checkpoints are averaged.
            return np.full(len(rates), 1 / len(rates), np.float32), INFLUENCE
        normalized = self.manifest.sketch.get("normalize", False)
        if all(rate is None for rate in rates):
            if divided:
                return np.ones(len(rates), np.float32), RATIO
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
        with np.errstate(over="ignore", under="ignore"):
            found = np.array(rates, np.float32)
        odd = ~np.isfinite(found) | (found == 0)
        if odd.any():
            raise NotFiniteError(
                "learning_rate must be finite and above zero in float32, in which scores are, got "
                f"{np.array(rates)[odd][0]:g}"
            )
        if divided:
            return found, f"{RATIO}, each times its learning rate"
        if normalized:
            return found, f"{COSINE}, each times its learning rate"
        return found, (
            "loss: what one step of gradient descent on the example at each checkpoint's learning "
            "rate takes off the query's loss, to first order"
        )


def open(path: str | os.PathLike[str], *, memory_map: bool = False) -> Store:
    """The store at `path`, open for reading: a snapshot of what is committed. Needs numpy only.

    What it holds is checked against its checksums: how it is built at once, data when they are
    first read.

    Args:
        path: The store's folder.
        memory_map: Reads rows through a map of their files instead of into buffers. Quicker where
            the same rows are read again and again from a large store. If another program cuts a
            mapped file short, the system kills this process (SIGBUS) when it reads there; nothing
            can catch that, and so it is not the default. whence itself never shortens a file.

    Raises:
        StoreError: If there is no store, or it is damaged.
        MismatchError: If its writers did not record the same.
        IdError: If an id is of two of its writers.

    Warns:
        MissingWritersWarning: If some of its writers have confirmed nothing yet.

    Examples:
        >>> store = whence.open("runs/digits")  # doctest: +SKIP
        >>> store.search(rows, k=10).helpful.ids  # doctest: +SKIP
        >>> 17 in store  # doctest: +SKIP
        >>> store.close()  # or: with whence.open("runs/digits") as store  # doctest: +SKIP
    """
    return Store(path, memory_map=memory_map)
