"""Methods that ask a store: short preconditioned rows, alone or before an exact second stage."""

from __future__ import annotations

import os

import numpy as np
import torch
from numpy.typing import NDArray

from whence import _arrays
from whence._interrupts import interruptible
from whence.attribution import query_rows
from whence.curvature import Factors
from whence.gradients import record_checkpoints
from whence.methods.ekfac import Ekfac, fitted_factors
from whence.methods.method import Closure, Method, hits_of
from whence.methods.run import Run
from whence.search import Hits, Index, Store
from whence.search.store import INFLUENCE


class EkfacStored(Method):
    """EK-FAC influence from a store of short rows: what `record_checkpoints` writes.

    Whitened coordinates of largest eigenvalue, rotated onto a learnt basis, summed over the run's
    checkpoints and rounded. Time O(examples · dim) a query once it is recorded.

    Args:
        path: The store's folder; one that is there is gone on with.
        dim: Width of a row; None for one that suits the data.
        dtype: Type of stored rows, as in `record`.
        factors: What `fit_factors` found at the run's checkpoints; None to find them in `fit`.
        seed: Of the turn of the basis.
    """

    name = "EK-FAC influence, stored: whitened, chosen and rotated coordinates"
    unit = INFLUENCE

    def __init__(
        self,
        path: str | os.PathLike[str],
        dim: int | None = None,
        dtype: str = "int4",
        *,
        factors: Factors | None = None,
        seed: int = 0,
    ) -> None:
        self.path = _arrays.path("path", path)
        self.factors = factors
        self._given = factors
        self._dim = dim
        self._dtype = dtype
        self._seed = seed
        self._store: Store | None = None
        self._index: Index | None = None

    def _fit(self, run: Run) -> None:
        states = {name: state for name, state in run.states.items() if state is not None} or None
        self.factors = self._given
        if self.factors is None:
            self.factors = fitted_factors(run)
        run.examples = run.examples or sum(1 for _, _, each in run.batches() for _ in each)
        record_checkpoints(
            run.model,
            self.path,
            run.loader,
            run.task.loss,
            precondition=self.factors,
            states=states,
            ids=run.ids,
            dim=self._dim,
            seed=self._seed,
            dtype=self._dtype,
            tokens=run.task.tokens,
            unbatched=run.task.unbatched,
            progress=run.progress,
        )
        self._store = Store(self.path)
        self._index = None

    @property
    def store(self) -> Store:
        """The store, once it is recorded."""
        _ = self.run
        if self._store is None:
            self._store = Store(self.path)
        return self._store

    def query_rows(self, closure: Closure) -> NDArray[np.float32]:
        """[queries, dim] the queries in the store's map."""
        states = {name: state for name, state in self.run.states.items() if state is not None}
        tokens = None
        if self.run.task.reduction == "token_mean":
            with self.run.at(self.run.last), torch.no_grad():
                _, tokens = self.run.asked(closure)
        rows = query_rows(
            self.run.model,
            self.store,
            lambda: self.run.asked(closure)[0],
            states=states or None,
            tokens=tokens,
        )
        found: NDArray[np.float32] = rows[0]
        return found

    def _scores(self, closure: Closure) -> NDArray[np.float32]:
        rows = self.store.rows(self.run.ids)
        return interruptible(_arrays.matmul, self.query_rows(closure), rows.T)

    def top_k(self, closure: Closure, k: int = 10) -> Hits:
        """The k most helpful and the k most harmful examples, by an index of the store."""
        k = _arrays.integer("k", k, 1)
        if self._index is None:
            self._index = Index(self.store)
        return self._index.search(self.query_rows(closure), k)


class TwoStage(Method):
    """Candidates from a store, scored again exactly.

    The `candidates` most helpful and most harmful examples by short rows, of which gradients are
    recomputed: the answer is the exact method's as far as its best are among them.

    Args:
        stored: The first stage.
        exact: The second.
        candidates: How many at each end, for each query.
    """

    name = "EK-FAC influence, two stages: short rows for candidates, exact scores for those"
    unit = INFLUENCE

    def __init__(self, stored: EkfacStored, exact: Ekfac, candidates: int = 300) -> None:
        self._stored = stored
        self._exact = exact
        self._candidates = _arrays.integer("candidates", candidates, 1)

    def _fit(self, run: Run) -> None:
        self._stored.fit(run)
        self._exact.fit(run)

    def _chosen(self, closure: Closure) -> list[NDArray[np.int64]]:
        """The candidates of each query, by their numbers in the loader."""
        hits = self._stored.top_k(closure, min(self._candidates, self.run.examples))
        ids = self.run.ids
        order = np.argsort(ids, kind="stable")
        both = np.concatenate([hits.helpful.ids, hits.harmful.ids], axis=1)
        return [
            np.unique(order[np.searchsorted(ids, row, sorter=order)]).astype(np.int64)
            for row in both
        ]

    def _scores(self, closure: Closure) -> NDArray[np.float32]:
        """Exact for the candidates; for all others the first stage's, brought to the same scale."""
        found = self._stored.scores(closure)
        chosen = self._chosen(closure)
        every = np.unique(np.concatenate(chosen))
        exact = self._exact.chosen_scores(closure, every)
        for query, mine in enumerate(chosen):
            before, after = found[query, mine], exact[query, np.searchsorted(every, mine)]
            square = float(before @ before)
            if square > 0:  # short rows miss a part of every score: both stages on one scale
                found[query] *= float(before @ after) / square
            found[query, mine] = after
        return found

    def top_k(self, closure: Closure, k: int = 10) -> Hits:
        """The k best of the candidates at either end, by exact scores."""
        k = _arrays.integer("k", k, 1, self._candidates)
        chosen = self._chosen(closure)
        every = np.unique(np.concatenate(chosen))
        exact = np.zeros((len(chosen), self.run.examples), np.float32)
        exact[:, every] = self._exact.chosen_scores(closure, every)
        return hits_of(self, exact, k, chosen)
