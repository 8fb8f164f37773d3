"""EK-FAC influence: exact, by recomputed gradients, at one checkpoint or averaged over several."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from whence import _arrays
from whence.curvature import Factors, fit_factors
from whence.errors import ArgumentError, CheckpointError
from whence.gradients.residuals import Residuals
from whence.gradients.verify import arguments_of
from whence.methods.method import Closure, Method
from whence.methods.products import (
    Products,
    ProductsAccumulator,
    Whole,
    WholeAccumulator,
    preconditioned,
)
from whence.methods.run import Run, Seen
from whence.search.store import INFLUENCE


class Ekfac(Method):
    """Influence with the loss's damped curvature, g_tᵀ (G + damping)⁻¹ g_i, nothing rounded.

    The gradients of the training data are recomputed for each question: slow, and right. With
    several checkpoints the mean over them, each with its own curvature.

    Grosse et al., "Studying large language model generalization with influence functions", arXiv
    2308.03296. Time O(examples · queries · parameters) a checkpoint; memory O(queries ·
    parameters), or O(queries · rank · (inputs + outputs)) for layers that see many positions.

    Args:
        factors: What `fit_factors` found at the run's checkpoints; None to find them in `fit`.
        rank: Singular vectors that stand for a query's gradient in layers where that is cheaper;
            None for the whole.
        residuals: "averaged": the training examples' residuals are meant over the checkpoints,
            see `whence.gradients.residuals`; "own": those of each checkpoint. The same for one
            checkpoint. Averaged ones of all examples are held in memory.
        damping: As in `fit_factors`, if `factors` is None.
    """

    name = "EK-FAC influence, exact: gradients recomputed"
    unit = INFLUENCE

    def __init__(
        self,
        factors: Factors | None = None,
        *,
        rank: int | None = None,
        residuals: str = "averaged",
        damping: float = 0.1,
    ) -> None:
        self.factors = factors
        self._given = factors
        self._rank = None if rank is None else _arrays.integer("rank", rank, 1)
        self._residuals = _arrays.choice("residuals", residuals, ("averaged", "own"))
        self._damping = _arrays.number("damping", damping, positive=True)
        self._kept: Residuals | None = None

    def _fit(self, run: Run) -> None:
        """Finds the factors, if they were not given, and averages residuals."""
        self.factors = self._given
        if self.factors is None:
            self.factors = fitted_factors(run, damping=self._damping, until="eigenvalues")
        names = [at.name for at in self.factors.checkpoints]
        if names != list(run.states):
            raise CheckpointError(
                f"factors must be of the run's checkpoints {list(run.states)}, got {names}"
            )
        self._kept = None

    def _scores(
        self, closure: Closure, chosen: NDArray[np.int64] | None = None
    ) -> NDArray[np.float32]:
        parts = self.parts(closure, chosen)
        total = sum((each.astype(np.float64) for each in parts.values()), np.zeros(()))
        return np.asarray(total, np.float32)

    def chosen_scores(self, closure: Closure, chosen: NDArray[np.int64]) -> NDArray[np.float32]:
        """[queries, chosen] the scores of some examples, by their numbers, rising.

        Raises:
            WhenceError: As `scores`.
        """
        return self._scores(closure, chosen)

    def parts(
        self, closure: Closure, chosen: NDArray[np.int64] | None = None
    ) -> dict[str, NDArray[np.float32]]:
        """Layer -> [queries, examples] its share of the scores; they add up to the whole.

        Args:
            closure: As in `scores`.
            chosen: Numbers of the examples to score, rising; None for all.

        Raises:
            WhenceError: As `scores`.
        """
        found: dict[str, NDArray[np.float64]] = {}

        def take(seen: ProductsAccumulator, factor: float) -> None:
            for layer, values in seen.parts.items():
                batches.setdefault(layer, []).append(values.double().numpy() * factor)

        self._average(chosen)
        for place in range(len(self.run.states)):
            batches: dict[str, list[NDArray[np.float64]]] = {}
            self._at(place, closure, take, chosen=chosen)
            for layer, each in batches.items():
                joined = np.concatenate(each, 1)
                found[layer] = found[layer] + joined if layer in found else joined
        return {layer: each.astype(np.float32) for layer, each in found.items()}

    def _average(self, chosen: NDArray[np.int64] | None) -> None:
        """Gathers the residuals of the examples that are scored."""
        self._kept = None
        if self._residuals == "averaged" and len(self.run.states) > 1 and self.factors is not None:
            shares = [at.weight for at in self.factors.checkpoints]
            self._kept = averaged_residuals(self.run, shares, chosen)

    def by_token(self, closure: Closure) -> list[NDArray[np.float32]]:
        """Each training example's score, position by position: what of it helped or harmed.

        Returns:
            For each example [queries, positions]; over positions they add up to the scores of the
            layers that see positions: weights and tables, without norms and other vectors.

        Raises:
            ArgumentError: If layers see different numbers of positions.
            WhenceError: As `scores`.
        """
        self._average(None)
        found: list[NDArray[np.float64]] = []
        for place in range(len(self.run.states)):
            rows: list[NDArray[np.float64]] = []

            def take(
                seen: ProductsAccumulator, factor: float, rows: list[NDArray[np.float64]] = rows
            ) -> None:
                if seen.tokens is None:
                    raise ArgumentError("the model must have layers that see positions, got none")
                rows.extend((seen.tokens.double() * factor).numpy().transpose(1, 0, 2))

            self._at(place, closure, take, by_token=True)
            found = rows if not found else [a + b for a, b in zip(found, rows, strict=True)]
        return [each.astype(np.float32) for each in found]

    def by_query_token(self, closure: Closure) -> NDArray[np.float32]:
        """Every score, position by position of the query: which part of it asked for the example.

        Returns:
            [queries, positions, examples]; over positions they add up to the scores of the layers
            that see positions: weights and tables whose biases come with them.

        Raises:
            ArgumentError: If layers see different numbers of positions.
            WhenceError: As `scores`.
        """
        self._average(None)
        total: NDArray[np.float64] | None = None
        for place in range(len(self.run.states)):
            found: list[NDArray[np.float64]] = []

            def take(
                seen: ProductsAccumulator, factor: float, found: list[NDArray[np.float64]] = found
            ) -> None:
                joined = torch.stack(list(seen.parts.values())).double().sum(0)
                found.append(joined.numpy() * factor)

            terms = self._at(place, closure, take, apart=True)
            joined = np.concatenate(found, axis=1)
            joined = joined.reshape(-1, terms, joined.shape[1])
            total = joined if total is None else total + joined
        return np.asarray(total, np.float32)

    def _at(
        self,
        place: int,
        closure: Closure,
        take: Callable[[ProductsAccumulator, float], None],
        *,
        by_token: bool = False,
        apart: bool = False,
        chosen: NDArray[np.int64] | None = None,
    ) -> int:
        """One pass over the training data at a checkpoint; returns the queries' positions."""
        run, factors = self.run, self.factors
        if factors is None:
            raise ArgumentError("factors must be fitted, got None")
        at, name = factors.checkpoints[place], list(run.states)[place]
        with run.at(name):
            whole = Whole(at.statistics.longest, at.statistics.pairs)
            whole.by_token = apart
            asked = run.queries(whole, closure)
            queries = asked.capture.accumulator
            if not isinstance(queries, WholeAccumulator):
                raise TypeError("queries must be kept whole")
            blocks = {key: known.block for key, known in at.statistics.known.items()}
            preconditioned(queries, blocks, factors.damped(place))
            rows = Products(queries, rank=self._rank, by_token=by_token)
            for seen in self._training(rows, chosen):
                found = seen.capture.accumulator
                if not isinstance(found, ProductsAccumulator):
                    raise TypeError("examples must be products")
                take(found, seen.factor * asked.factor * at.weight)
        return queries.terms

    def _training(self, rows: Products, chosen: NDArray[np.int64] | None) -> Iterator[Seen]:
        kept = self._kept
        if kept is None:
            return self.run.training(rows, chosen=chosen)
        return self.run.training(rows, kept.replaying, chosen=chosen)


def fitted_factors(run: Run, **settings: Any) -> Factors:
    """The factors of a run, by `fit_factors` with these settings."""
    states = {name: state for name, state in run.states.items() if state is not None}
    return fit_factors(
        run.model,
        run.loader,
        run.task.loss,
        states=states or None,
        reduction=run.task.reduction,
        tokens=run.task.tokens,
        layers=run.layers,
        uncovered=run.uncovered,
        unbatched=run.task.unbatched,
        progress=run.progress,
        **settings,
    )


def averaged_residuals(
    run: Run, shares: list[float], chosen: NDArray[np.int64] | None = None
) -> Residuals:
    """The residuals of training examples, meant over the checkpoints of a run."""
    kept = Residuals()
    for name, share in zip(run.states, shares, strict=True):
        with run.at(name), torch.no_grad():
            for number, batch, _ in run.batches(chosen, f"{name}: residuals"):
                arguments = arguments_of(batch)
                with kept.collecting(number, share):
                    run.task.loss(*arguments)
    return kept
