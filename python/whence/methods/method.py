"""What every method has: `fit`, `scores`, `top_k`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from whence import _arrays
from whence.errors import ArgumentError, ShapeError, WhenceError
from whence.methods.run import Run
from whence.search import Hits, Side

Fitted = TypeVar("Fitted", bound="Method")

Closure = Callable[[], Tensor]
"""() -> loss of the queries, by the user's own lines."""


class Method(ABC):
    """A way to score training examples for queries; positive = helpful.

    Attributes:
        name: In the field's words.
        unit: Of its scores.
    """

    name: str
    unit: str
    _run: Run | None = None

    @property
    def run(self) -> Run:
        """The run it was fitted to.

        Raises:
            WhenceError: If it was not.
        """
        if self._run is None:
            raise WhenceError(f"{type(self).__name__} must be fitted first: call fit(run)")
        return self._run

    def fit(self: Fitted, run: Run) -> Fitted:
        """Learns what it needs of a run; returns itself.

        Raises:
            WhenceError: As `Run`, and whatever the method asks for.
        """
        self._run = run
        self._fit(run)
        return self

    @abstractmethod
    def _fit(self, run: Run) -> None:
        """What `fit` does."""

    @abstractmethod
    def _scores(self, closure: Closure) -> NDArray[np.float32]:
        """[queries, examples]."""

    def scores(self, closure: Closure, *, groups: Any = None) -> NDArray[np.float32]:
        """Every training example's score for every query.

        Args:
            closure: () -> loss of the queries, without backward; run at each checkpoint. For a run
                with reduction="token_mean", () -> (loss, [queries] counted tokens).
            groups: [examples] int64 or str, a group of each example: the scores of a group are
                summed, in the order of the groups' names, np.unique(groups).

        Returns:
            [queries, examples] float32, or [queries, groups]. Positive = helpful.

        Raises:
            ShapeError: If groups are not one for each example.
            WhenceError: If it was not fitted; and whatever the run raises.
        """
        found = self._scores(closure)
        if groups is None:
            return found
        names = _arrays.values("groups", groups)
        if len(names) != found.shape[1]:
            raise ShapeError(
                f"groups must be one for each of {found.shape[1]} examples, got {len(names)}"
            )
        _, numbers = np.unique(names, return_inverse=True)
        summed = np.zeros((numbers.max() + 1, len(found)))
        np.add.at(summed, numbers.reshape(-1), found.T.astype(np.float64))
        return np.ascontiguousarray(summed.T.astype(np.float32))

    def top_k(self, closure: Closure, k: int = 10) -> Hits:
        """The k most helpful and the k most harmful examples of each query.

        Raises:
            ArgumentError: If k is below 1.
            WhenceError: As `scores`.
        """
        k = _arrays.integer("k", k, 1)
        return hits_of(self, self.scores(closure), k)


def hits_of(
    method: Method,
    scores: NDArray[np.float32],
    k: int,
    candidates: Sequence[NDArray[np.int64]] | None = None,
) -> Hits:
    """Both ends of some scores.

    Args:
        method: Whose scores they are.
        scores: [queries, examples].
        k: How many at each end.
        candidates: For each query the examples that are ranked; None for all.
    """
    if not scores.shape[1]:
        raise ArgumentError("scores must be of at least one example, got none")
    ids = method.run.ids
    ends: dict[str, list[NDArray[np.int64]]] = {"helpful": [], "harmful": []}
    for query, row in enumerate(scores):
        allowed = np.arange(len(row)) if candidates is None else np.sort(candidates[query])
        for end, sign in (("helpful", -1), ("harmful", 1)):
            order = allowed[np.argsort(sign * row[allowed].astype(np.float64), kind="stable")]
            ends[end].append(order[:k])
    sides = {}
    for end, rows in ends.items():
        positions = np.stack(rows)
        found = np.take_along_axis(scores, positions, axis=1)
        sides[end] = Side(ids[positions], found, positions)
    counts = [scores.shape[1]] * len(scores) if candidates is None else map(len, candidates)
    eligible = np.array(list(counts), np.int64)
    exact = np.full(len(scores), candidates is None)
    return Hits(sides["helpful"], sides["harmful"], eligible, method.name, method.unit, {}, exact)
