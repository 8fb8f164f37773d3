"""A minute's check of whether the scores of a store mean anything."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from whence import _arrays, _core
from whence._interrupts import interruptible
from whence.errors import ArgumentError, DtypeError, MismatchError
from whence.evaluate.checks import function, table
from whence.evaluate.ranks import spearman
from whence.factored import Factored
from whence.hashing.families import MAX_SEED
from whence.search import Index, Source, Store

if TYPE_CHECKING:
    import torch

    from whence.gradients.weights import State

PASS, WARNING, FAIL, SKIPPED = "pass", "warning", "fail", "not checked"

CANDIDATES = 10_000
"""The most stored examples that a query is ranked against."""

OWN = (0.95, 0.75)
"""Mean share of examples that an example must rank above as its own query: pass, and warning."""

EXCESS = (2.0, 0.05)
"""Standard errors that agreement of labels must lie above chance, and by how much to pass."""

SAME = (1e-3, 1e-2)
"""Relative difference of scores that rounding explains: pass, and warning."""

STORED = (1e-2, 1e-1)
"""The same of recorded rows: float16 adds about 2^-11, moved weights more."""

RANDOMISED = (0.5, 0.9)
"""Correlation with the ranking of a randomised model below which to pass, and to warn."""


@dataclass(frozen=True)
class Check:
    """One thing that was checked.

    Attributes:
        name: What.
        outcome: "pass", "warning", "fail" or "not checked".
        value: The number it hangs on; NaN if it was not checked.
        meaning: What the number is, and what it says, in words.
    """

    name: str
    outcome: str
    value: float
    meaning: str


@dataclass(frozen=True)
class Sanity:
    """What `sanity` found.

    Attributes:
        checks: One for each thing, in the order they were made.
    """

    checks: list[Check]

    @property
    def passed(self) -> bool:
        """Whether nothing failed; warnings and what was not checked do not count."""
        return all(check.outcome != FAIL for check in self.checks)

    def __getitem__(self, name: str) -> Check:
        """The check of this name.

        Raises:
            KeyError: If there is none.
        """
        for check in self.checks:
            if check.name == name:
                return check
        raise KeyError(name)

    def __str__(self) -> str:
        rows = [["outcome", "check", "value", "meaning"]]
        for check in self.checks:
            value = "" if check.outcome == SKIPPED else f"{check.value:.3g}"
            rows.append([check.outcome, check.name, value, check.meaning])
        return table(rows)


Scores: TypeAlias = NDArray[np.float32]
"""[queries, candidates]."""


def sanity(
    store: Source | Index | str | os.PathLike[str],
    model: torch.nn.Module | None = None,
    closure: Callable[..., torch.Tensor] | None = None,
    batch: Sequence[Any] | None = None,
    *,
    ids: Any = None,
    states: Mapping[str, State] | None = None,
    tokens: Any = None,
    unbatched: Sequence[str] = (),
    label: str = "label",
    sample: int = 100,
    k: int = 10,
    seed: int = 0,
    threads: int | None = None,
) -> Sanity:
    """Whether the scores of a store mean anything: what must hold of any that do.

    Passing proves little; failing proves that something is wrong. Of the store alone:

    - *own rank*: stored rows as queries. Nothing should score an example higher than the example
      itself does; where others do, rows of large norm or a direction common to all dominate.
      The value is the mean share of the other examples that rank below it.
    - *same label*: the share of an example's k most helpful that have its label, less the share
      that chance gives. Scores of a classifier that do not see labels are noise.

    With a model, a closure and a batch also:

    - *batch invariance*: the scores of two examples in one batch against theirs alone, as the
      largest relative difference; batch statistics, or padding without a mask, differ.
    - *recorded rows*, with `ids`: the scores of the batch's examples against those of their own
      stored rows; ids that are shuffled, another model or other preparation of the data differ.
    - *randomised model*: mean Spearman correlation over the stored examples of a query's scores
      and those of the same model with random weights (each parameter drawn anew, normal, with the
      mean and spread it has). Scores that hardly change say nothing about what was learned
      (Adebayo et al., "Sanity Checks for Saliency Maps", NeurIPS 2018). It is not zero where
      random weights are kept out of it: a classifier's output gradients hang on the label.

    Queries are drawn at random, and so are the stored examples they are ranked against.

    Args:
        store: An open store, its path, or an index of it; or, for the checks without a model, a
            `whence.Matrix`.
        model: The recorded model. It is in evaluation mode while its rows are computed, and
            afterwards as before.
        closure: (*batch) -> loss of the queries, in the way that was recorded, without backward.
        batch: Its arguments; tensors, or containers of tensors, with at least two examples in
            dimension 0. The first `sample` of them are used.
        ids: [batch] the ids of the batch's examples, if they are in the store.
        states: As in `whence.query`.
        tokens: [batch] counted tokens, for reduction="token_mean".
        unbatched: As in `record`.
        label: The column that holds labels.
        sample: How many stored rows to take as queries.
        k: How many of the most helpful examples to look at.
        seed: Seed of what is drawn, 0 to 2**64 - 1.
        threads: How many threads to use; None means all processors.

    Returns:
        The checks. O(sample · min(examples, 10,000) · checkpoints · dim), and with a model a few
        batches.

    Raises:
        DtypeError: If an argument is of another type.
        ArgumentError: If one is out of range, the store has fewer than three complete examples,
            or of model, closure and batch some are missing.
        WhenceError: And whatever `whence.query` raises of model, closure, states and tokens.

    Examples:
        >>> print(whence.evaluate.sanity("runs/first"))  # doctest: +SKIP
    """
    source = store.source if isinstance(store, Index) else store
    if not isinstance(source, Source):
        source = Store(source)
    sample = _arrays.integer("sample", sample, 1)
    k = _arrays.integer("k", k, 1)
    seed = _arrays.integer("seed", seed, 0, MAX_SEED)
    threads = _arrays.threads(threads)
    given = {"model": model, "closure": closure, "batch": batch}
    lacking = [name for name, value in given.items() if value is None]
    if 0 < len(lacking) < len(given):
        raise ArgumentError(
            f"model, closure and batch must be given together, got no {' and no '.join(lacking)}"
        )
    if model is not None and not isinstance(source, Store):
        raise MismatchError(f"store must be a store of a model, got {source!r}")
    complete = np.arange(len(source.ids))
    if source.incomplete is not None:
        complete = np.flatnonzero(~source.incomplete)
    if len(complete) < 3:
        raise ArgumentError(
            f"store must have at least three complete examples, got {len(complete)}"
        )
    drawn = _core.shuffled(complete, seed, "evaluate.sanity")[:CANDIDATES]
    asked = Asked(source, np.sort(drawn), threads)
    queries = np.sort(drawn[: min(sample, len(drawn))])
    scores = asked.scores(stored_queries(source, queries))
    checks = [own_rank(asked, queries, scores), same_label(asked, queries, scores, label, k)]
    if model is None or closure is None or batch is None or not isinstance(source, Store):
        why = "needs model, closure and batch"
        names = ("batch invariance", "recorded rows", "randomised model")
        return Sanity([*checks, *(_skipped(name, why) for name in names)])
    from whence.evaluate.randomised import Rows

    function("closure", closure, "of the batch")
    rows = Rows(model, source, closure, batch, states, tokens, unbatched, sample)
    checks.append(batch_invariance(asked, rows))
    checks.append(recorded_rows(asked, rows, ids))
    checks.append(randomised_model(asked, rows, seed))
    return Sanity(checks)


@dataclass(frozen=True, eq=False)
class Asked:
    """The stored examples that queries are ranked against.

    Attributes:
        source: Where they are.
        candidates: [candidates] their places, rising.
        threads: How many threads to use.
    """

    source: Source
    candidates: NDArray[np.int64]
    threads: int

    def scores(self, rows: NDArray[np.float32]) -> Scores:
        """[queries, candidates] the scores of all candidates."""
        keep = np.zeros(len(self.source.ids), np.bool_)
        keep[self.candidates] = True
        question = self.source.ask(
            rows,
            len(self.candidates),
            where=keep,
            missing="drop",
            side="helpful",
            threads=self.threads,
        )
        side = self.source.scan(question).helpful
        return interruptible(_by_candidate, self.candidates, side.positions, side.scores)


def _by_candidate(
    candidates: NDArray[np.int64], positions: NDArray[np.int64], scores: Scores
) -> Scores:
    """[queries, candidates] scores in the order of candidates, of those in falling order."""
    found = np.empty(scores.shape, np.float32)
    np.put_along_axis(found, np.searchsorted(candidates, positions), scores, axis=1)
    return found


def stored_queries(source: Source, examples: NDArray[np.int64]) -> NDArray[np.float32]:
    """[checkpoints, examples, width] stored rows as a search takes them for queries."""
    rows = source.rows_at(examples)
    if not isinstance(source, Store) or not source.manifest.is_factored:
        return rows
    # Read rows are unit rows times their norms; of factors only one of each pair takes the norm.
    scales = source.scales[source.numbers_of(examples)]
    unit = (rows / np.where(scales > 0, scales, 1)[..., None]).astype(np.float32)
    return Factored.from_spec(source.manifest.sketch).weighted(unit, scales)


def own_rank(asked: Asked, queries: NDArray[np.int64], scores: Scores) -> Check:
    """See `sanity`."""
    own = np.take_along_axis(scores, _places(asked, queries), axis=1)
    others = len(asked.candidates) - 1
    below = (scores < own).sum(axis=1) + ((scores == own).sum(axis=1) - 1) / 2  # ties count half
    first = float(((scores > own).sum(axis=1) == 0).mean())
    value = float((below / others).mean())
    says = "rows tell examples apart"
    if value < OWN[0]:
        says = "large rows or a common direction dominate: normalise, or use preconditioned rows"
    return Check(
        "own rank",
        _graded(value, *OWN),
        value,
        f"an example ranks above {value:.1%} of {others:,} others as its own query, and is first "
        f"in {first:.0%} of {len(queries)}: {says}",
    )


def same_label(
    asked: Asked, queries: NDArray[np.int64], scores: Scores, name: str, k: int
) -> Check:
    """See `sanity`."""
    title, columns = "same label", asked.source.columns
    if not isinstance(name, str):
        raise DtypeError(f"label must be the name of a column, got {_arrays.describe(name)}")
    if name not in columns:
        return _skipped(title, f"there is no column {name!r}")
    column = columns[name][asked.candidates]
    if column.dtype.kind == "f":
        return _skipped(title, f"column {name!r} holds float64, which are no classes")
    _, labels = np.unique(column, return_inverse=True)
    labels = labels.reshape(-1)
    counts = np.bincount(labels)
    if len(counts) == 1 or len(counts) > len(labels) / 2:
        return _skipped(title, f"column {name!r} holds {len(counts)} values, which are no classes")
    own = _places(asked, queries)
    k = min(k, len(labels) - 1)
    ranking = scores.astype(np.float64)
    np.put_along_axis(ranking, own, -np.inf, axis=1)
    best = interruptible(np.argsort, -ranking, axis=1, kind="stable")[:, :k]
    agree = (labels[best] == labels[own]).mean(axis=1)
    chance = (counts[labels[own[:, 0]]] - 1) / (len(labels) - 1)
    excess = agree - chance
    value = float(excess.mean())
    error = float(excess.std() / np.sqrt(len(excess)))
    if value <= EXCESS[0] * error:
        outcome, says = FAIL, "helpful examples are of any class: scores see no labels"
    elif value < EXCESS[1]:
        outcome, says = WARNING, "hardly more than chance"
    else:
        outcome, says = PASS, "helpful examples share the class"
    return Check(
        title,
        outcome,
        value,
        f"{agree.mean():.1%} of the {k} most helpful share {name!r}, and {chance.mean():.1%} by "
        f"chance: {says}",
    )


def batch_invariance(asked: Asked, rows: Any) -> Check:
    """See `sanity`."""
    alone = np.concatenate([asked.scores(rows.of(slice(i, i + 1))) for i in range(2)])
    together = asked.scores(rows.of(slice(0, 2)))
    value = _difference(together, alone)
    says = "rows do not depend on the batch"
    if value > SAME[0]:
        says = "the batch changes rows: batch statistics, padding without a mask, or tokens"
    return Check(
        "batch invariance",
        _graded(-value, -SAME[0], -SAME[1]),
        value,
        f"scores of two examples in a batch differ by {value:.1e} from theirs alone: {says}",
    )


def recorded_rows(asked: Asked, rows: Any, ids: Any) -> Check:
    """See `sanity`."""
    if ids is None:
        return _skipped("recorded rows", "needs ids of the batch")
    array = _arrays.ids("ids", ids)
    if len(array) != rows.given:
        raise ArgumentError(
            f"ids must be one for each of the {rows.given} examples of batch, got {len(array)}"
        )
    places = asked.source.positions("ids", array[: rows.count])
    expected = asked.scores(stored_queries(asked.source, places))
    value = _difference(asked.scores(rows.of(slice(0, rows.count))), expected)
    says = "rows belong to these examples and weights"
    if value > STORED[0]:
        says = "ids, weights, mode or the preparation of the data are not those of the recording"
    return Check(
        "recorded rows",
        _graded(-value, -STORED[0], -STORED[1]),
        value,
        f"scores by the model differ by {value:.1e} from those by the stored rows of the same "
        f"{rows.count} examples: {says}",
    )


def randomised_model(asked: Asked, rows: Any, seed: int) -> Check:
    """See `sanity`."""
    learned = asked.scores(rows.of(slice(0, rows.count)))
    random = asked.scores(rows.randomised(slice(0, rows.count), seed))
    value = float(spearman(learned.T, random.T).mean())
    says = "scores hang on what was learned"
    if value >= RANDOMISED[0]:
        says = "much of the ranking needs no training"
    return Check(
        "randomised model",
        _graded(-abs(value), -RANDOMISED[0], -RANDOMISED[1]),
        value,
        f"rankings correlate to {value:+.2f} with those of random weights: {says}",
    )


def _graded(value: float, good: float, fair: float) -> str:
    """The outcome of a number that should be large."""
    return PASS if value >= good else WARNING if value >= fair else FAIL


def _skipped(name: str, why: str) -> Check:
    return Check(name, SKIPPED, math.nan, why)


def _places(asked: Asked, queries: NDArray[np.int64]) -> NDArray[np.int64]:
    """[queries, 1] which candidate each query is."""
    return np.searchsorted(asked.candidates, queries)[:, None]


def _difference(found: Scores, expected: Scores) -> float:
    """The largest |found - expected| / |expected| over queries."""
    one, other = found.astype(np.float64), expected.astype(np.float64)
    norms = np.maximum(np.linalg.norm(one, axis=1), np.linalg.norm(other, axis=1))
    return float((np.linalg.norm(one - other, axis=1) / np.maximum(norms, 1e-300)).max())
