"""What becomes of a prediction when the examples that helped it most are taken away."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from whence import _arrays, _core
from whence._interrupts import interruptible
from whence.errors import DtypeError, ShapeError
from whence.evaluate.checks import function, numbers, rising, table
from whence.evaluate.retraining import Outputs, Results, Train, retrain, seeds_of
from whence.hashing.families import MAX_SEED
from whence.store.progress import checked, watched

KS = tuple(range(20, 181, 20))
"""How many examples `brittleness` removes unless told otherwise."""


@dataclass(frozen=True, eq=False)
class Brittleness:
    """How few removals change a prediction.

    Attributes:
        smallest: [queries] float64, the smallest number of removals that changed the prediction;
            infinite where none did.
        ks: The numbers that were tried.
    """

    smallest: NDArray[np.float64]
    ks: list[int]

    @property
    def changed(self) -> NDArray[np.float64]:
        """[ks] the share of queries whose prediction has changed after at most k removals."""
        found: NDArray[np.float64] = (self.smallest <= np.array(self.ks)[:, None]).mean(axis=1)
        return found

    @property
    def median(self) -> float:
        """Of `smallest`; infinite if half of the predictions never changed."""
        ordered = np.sort(self.smallest)
        middle = ordered[[(len(ordered) - 1) // 2, len(ordered) // 2]]
        return float(middle.mean())

    def __str__(self) -> str:
        rows = [["removed", "changed"]]
        rows += [[str(k), f"{share:.1%}"] for k, share in zip(self.ks, self.changed, strict=True)]
        return f"predictions of {len(self.smallest)} queries, median {self.median:g}\n" + table(
            rows
        )


@dataclass(frozen=True, eq=False)
class RemovalCurve:
    """Losses after removal, less the losses of the model of all examples.

    Attributes:
        ks: How many examples were removed.
        helpful: [ks, queries] float64, without the k of the largest scores: above zero if they
            helped.
        harmful: [ks, queries] without the k of the smallest scores: below zero if they harmed.
        random: [ks, queries] without k drawn at random, the mean over draws: what counts is how
            far the others are from it.
    """

    ks: list[int]
    helpful: NDArray[np.float64]
    harmful: NDArray[np.float64]
    random: NDArray[np.float64]

    def __str__(self) -> str:
        rows = [["removed", "helpful", "random", "harmful"]]
        for number, k in enumerate(self.ks):
            means = (each[number].mean() for each in (self.helpful, self.random, self.harmful))
            rows.append([str(k), *(f"{mean:+.4g}" for mean in means)])
        return f"change of the loss, mean of {self.helpful.shape[1]} queries\n" + table(rows)


def brittleness(
    scores: Any,
    train: Train,
    predict: Callable[[Any], Any],
    *,
    ks: Sequence[int] = KS,
    seed: int = 0,
    path: Any = None,
    progress: bool | None = None,
) -> Brittleness:
    """The smallest number of removals, most helpful first, that change a query's prediction.

    For each query and each k in turn the model is trained without the k examples of the largest
    scores, until its prediction for the query is not that of the model of all examples and the
    same seed (brittle predictions; Ilyas et al., "Datamodels: Predicting
    Predictions from Training Data", ICML 2022). Fewer is better. A prediction
    near a border also changes with the seed: leave such queries out.

    Args:
        scores: [examples, queries], positive = helpful. Of equal scores the earlier example is
            removed first.
        train: As in `retrain`.
        predict: (model) -> [queries] integers, the class predicted for each.
        ks: How many examples to remove, rising, below their number.
        seed: The seed that `train` gets.
        path: As in `retrain`.
        progress: As in `retrain`; the bar counts queries.

    Returns:
        The smallest of `ks` for each query. At most 1 + queries · len(ks) trainings.

    Raises:
        WhenceError: As `retrain`; DtypeError if predictions are not integers.
    """
    values = numbers("scores", scores, "examples", "queries")
    examples, queries = values.shape
    function("train", train, "of places and a seed")
    function("predict", predict, "of a model")
    ks = rising("ks", ks, examples - 1)
    seed = _arrays.integer("seed", seed, 0)

    def classes(model: Any) -> NDArray[Any]:
        found = _arrays.array("predictions", predict(model))
        if found.dtype.kind not in "iub" or found.shape != (queries,):
            raise DtypeError(
                f"predictions must be [{queries}] integers, got {_arrays.describe(found)}"
            )
        return found.astype(np.int64)

    places = np.arange(examples)
    order = _by_score(values)

    def subset(number: int) -> NDArray[np.int64]:
        """All examples, then for each query in turn those left after each k."""
        if number == 0:
            return places
        query, step = divmod(number - 1, len(ks))
        return _without(examples, order[: ks[step], query])

    checked(progress)
    results = Results(path, 1 + queries * len(ks), subset)
    whole = results.get(0, seed, train, classes)
    smallest = np.full(queries, np.inf)
    for query in watched(range(queries), "brittleness", progress, "query"):
        for step, k in enumerate(ks):
            now = results.get(1 + query * len(ks) + step, seed, train, classes)
            if now[query] != whole[query]:
                smallest[query] = k
                break
    return Brittleness(smallest, ks)


def removal_curve(
    scores: Any,
    train: Train,
    outputs: Outputs,
    ks: Sequence[int],
    *,
    seeds: int | Sequence[int] = 1,
    draws: int = 1,
    seed: int = 0,
    path: Any = None,
    progress: bool | None = None,
) -> RemovalCurve:
    """What removing the most helpful, the most harmful and random examples does to the loss.

    Args:
        scores: [examples, queries], positive = helpful: for each query its own examples are
            removed, and its own loss is read. Or [examples], one ranking for all queries, such as
            the sum of their scores, by which a model trained without its ends is read for all.
        train: As in `retrain`.
        outputs: (model) -> [queries] losses.
        ks: How many examples to remove, rising, below their number.
        seeds: As in `retrain`; changes are means over seeds.
        draws: How many random orders to remove from.
        seed: Seed of the random orders, 0 to 2**64 - 1.
        path: As in `retrain`.
        progress: As in `retrain`.

    Returns:
        Changes of the loss. (1 + len(ks) · (2 rankings + draws)) · seeds trainings, with a ranking
        for each query or one for all.

    Raises:
        WhenceError: As `retrain`; ShapeError if outputs are not one for each column of scores.
    """
    values = _arrays.array("scores", scores)
    own = values.ndim == 2
    values = numbers("scores", values, *(("examples", "queries") if own else ("examples",)))
    examples = len(values)
    ks = rising("ks", ks, examples - 1)
    draws = _arrays.integer("draws", draws, 1)
    seed = _arrays.integer("seed", seed, 0, MAX_SEED)
    seeds = seeds_of(seeds)
    places = np.arange(examples)
    helpful = _by_score(values.reshape(examples, -1))
    harmful = _by_score(-values.reshape(examples, -1).astype(np.float64))
    random = [_core.shuffled(places, seed, f"evaluate.removal.{draw}") for draw in range(draws)]
    orders = [*helpful.T, *harmful.T, *random]
    subsets = [places, *(_without(examples, order[:k]) for order in orders for k in ks)]
    found = retrain(train, subsets, seeds, outputs, path, progress=progress).mean(axis=1)
    changes = (found[1:] - found[0]).reshape(len(orders), len(ks), -1)  # [orders, ks, queries]
    rankings = helpful.shape[1]
    if own and changes.shape[2] != rankings:
        raise ShapeError(
            f"outputs must be of the {rankings} queries of scores, got {changes.shape[2]}"
        )
    query = np.arange(rankings)

    def read(part: NDArray[np.float64]) -> NDArray[np.float64]:
        """[ks, queries] of the changes of each ranking, those of its own query."""
        return part[query, :, query].T if own else part[0]

    return RemovalCurve(
        ks,
        read(changes[:rankings]),
        read(changes[rankings : 2 * rankings]),
        changes[2 * rankings :].mean(axis=0),
    )


def _without(examples: int, removed: NDArray[np.int64]) -> NDArray[np.int64]:
    """The places of all examples but some."""
    kept = np.ones(examples, np.bool_)
    kept[removed] = False
    return np.flatnonzero(kept)


def _by_score(values: NDArray[Any]) -> NDArray[np.int64]:
    """[examples, queries] places, the largest score first; of equal ones the earlier."""
    return interruptible(_falling, values)


def _falling(values: NDArray[Any]) -> NDArray[np.int64]:
    return np.argsort(-values.astype(np.float64), axis=0, kind="stable")
