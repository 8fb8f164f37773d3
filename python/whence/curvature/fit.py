"""`fit_factors`: passes over the training data that find the curvature of its loss."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from whence import _arrays
from whence._core import MAX_DIM
from whence._interrupts import interruptible
from whence.curvature.basis import Leading
from whence.curvature.factors import STAGES, Factors, Progress, Settings
from whence.curvature.labels import LABELS, DrawnLabels, Mixture
from whence.curvature.statistics import At, Statistics
from whence.errors import ArgumentError, CheckpointError, DtypeError, MismatchError
from whence.gradients.capture import Capture, not_finite
from whence.gradients.coordinates import Coordinates
from whence.gradients.hooks import Hooks, refuse_batch_statistics
from whence.gradients.passes import (
    TOGETHER,
    Task,
    evaluating,
    length_of,
    pairs_of,
    reread,
    taken,
)
from whence.gradients.recorder import patterns
from whence.gradients.reduction import REDUCTIONS
from whence.gradients.residuals import RESIDUAL_BYTES, Residuals
from whence.gradients.structure import Structure, structure_of
from whence.gradients.verify import arguments_of
from whence.gradients.weights import State, digest, load, put
from whence.store.manifest import is_name
from whence.store.progress import checked, say, watched

MAX_SEED = (1 << 63) - 2
"""The largest seed whose successor torch takes."""


def fit_factors(
    model: nn.Module,
    loader: Iterable[Any],
    loss: Callable[..., Tensor],
    *,
    states: Mapping[str, State] | None = None,
    weights: Mapping[str, float] | None = None,
    reduction: str = "mean",
    tokens: Callable[..., Any] | None = None,
    labels: str = "sampled",
    layers: str | Sequence[str] | None = None,
    uncovered: str = "error",
    unbatched: Sequence[str] = (),
    damping: float = 0.1,
    coordinates: int = 6144,
    leading: float = 1.0,
    corrected: bool = True,
    residuals: str | None = None,
    longest: int = 4096,
    examples: int | None = None,
    sample: int = 16384,
    widest: int = 1024,
    seed: int = 0,
    start: Factors | None = None,
    until: str = "basis",
    path: str | os.PathLike[str] | None = None,
    progress: bool | None = None,
) -> Factors:
    """The curvature of a loss at one or several checkpoints, by which gradients are preconditioned.

    Three passes over the data at each checkpoint, with the model in evaluation mode: covariances of
    each layer's inputs and output gradients (K-FAC; Martens and Grosse, arXiv 1503.05671); second
    moments in their eigenbasis (EK-FAC; George et al., arXiv 1806.03884); and the whitened
    coordinates of a sample, which say what basis rows are best rotated onto. Weights, modes,
    `.grad` and random state are afterwards as before.

    Args:
        model: The model, as in `record`.
        loader: Batches of the training data, in an order that is always the same: a list, or a
            DataLoader without shuffling.
        loss: (*batch) -> loss, by your own lines; a batch that is no tuple or list is its one
            argument.
        states: Checkpoint name -> state dict or file of torch.save; each is loaded into `model` in
            place meanwhile. None for the model as it is.
        weights: Checkpoint name -> its share in a score; None for equal ones. They are divided by
            their sum.
        reduction: How the loss combines the examples of a batch, as in `record`.
        tokens: (*batch) -> [batch] counted tokens, for reduction="token_mean".
        labels: "sampled": curvature of the model's own distribution, the Gauss-Newton matrix:
            while the loss runs, torch's losses see labels drawn from their input. Times a number
            that is one for all, where a loss is not a negative log-likelihood but a mean of several
            (over positions). "empirical": the true labels, for losses of another kind.
        layers: As in `record`, with uncovered and unbatched.
        uncovered: See layers.
        unbatched: See layers.
        damping: What is added to the eigenvalues of a layer, as a share of their mean.
        coordinates: How many whitened coordinates are kept, those of the largest share
            Λ / (Λ + damping).
        leading: The share of the eigenvectors of both sides of weights that may be used: less is
            quicker to record.
        corrected: Whether to use EK-FAC's eigenvalues, or K-FAC's.
        residuals: Whose residuals the training examples' rows have, where there are several
            checkpoints: "averaged" over all, see `whence.gradients.residuals`, or each
            checkpoint's "own". None: averaged for sampled labels, which also needs to see into the
            loss, and own for empirical ones.
        longest: Sides of layers longer than this are cut into stretches with eigenvectors of
            their own: O(longest³) time and O(longest²) memory for each.
        examples: How many examples the first two passes see, the first ones; None for all.
        sample: How many examples the third pass sees, spread evenly; at least as many as a row is
            to be wide. The more, the better the basis fits examples that it has not seen.
        widest: The width of the widest rows that can be asked for. O(sample · widest ·
            coordinates) time at each checkpoint, and widest · coordinates values are kept.
        seed: Of the drawn labels.
        start: Factors to go on from, such as those of several shards that were merged; of the same
            labels, reduction, layers and longest.
        until: "covariance", "eigenvalues" or "basis": where to end.
        path: A folder to save each checkpoint's factors in as they are found, and to go on from
            where an earlier call with the same arguments was killed; None for none.
        progress: Whether to show a bar, and to say at the end what was chosen and why; None means
            if standard error is a terminal.

    Returns:
        Factors, for `record(..., precondition=...)`.

    Raises:
        ArgumentError: If an argument is out of range, or the loader gives nothing.
        CheckpointError: If a state does not fit the model.
        LayerError: If labels cannot be drawn for the loss.
        CoverageError: If a later pass reaches layers that the first did not.
        NotFiniteError: If a gradient is NaN or infinite, or so large that their products are.
        MismatchError: If `start`, or what is at `path`, is of another model or setting.

    Examples:
        >>> factors = whence.fit_factors(  # doctest: +SKIP
        ...     model, loader, lambda ids, x, y: loss_fn(model(x), y)
        ... )
        >>> with whence.record(model, "runs/digits", precondition=factors) as rec:  # doctest: +SKIP
        ...     ...
    """
    if not isinstance(model, nn.Module):
        raise DtypeError(f"model must be an nn.Module, got {_arrays.describe(model)}")
    longest = _arrays.integer("longest", longest, 1)
    examples = None if examples is None else _arrays.integer("examples", examples, 1)
    sample = _arrays.integer("sample", sample, 2)
    widest = _arrays.integer("widest", widest, 1, MAX_DIM)
    seed = _arrays.integer("seed", seed, 0, MAX_SEED)
    fitting = _Fitting(
        model,
        reread("loader", loader),
        Task(
            loss,
            _arrays.choice("reduction", reduction, REDUCTIONS),
            tokens,
            patterns("unbatched", unbatched),
        ),
        structure_of(
            model, layers, _arrays.choice("uncovered", uncovered, ("error", "skip", "functional"))
        ),
        _arrays.choice("labels", labels, LABELS),
        seed,
        longest,
        examples,
        sample,
        uncovered == "error",
        checked(progress),
    )
    if residuals is None:
        residuals = "averaged" if labels == "sampled" else "own"
    settings = Settings.of(damping, coordinates, leading, corrected, residuals)
    _arrays.choice("until", until, STAGES)
    if states is not None and (not isinstance(states, Mapping) or not states):
        raise DtypeError(
            "states must be a dict of checkpoint name to weights with at least one, got "
            f"{_arrays.describe(states)}"
        )
    loaded: dict[str, State | None] = {"0": None} if states is None else dict(states)
    for name in loaded:
        if not is_name(name):
            raise ArgumentError(
                f"states must be named by a non-empty str without NUL, got {name!r}"
            )
    shares = shares_of(weights, list(loaded))
    described = fitting.structure.describe()
    if start is not None:
        _refuse_start(start, Factors(described, reduction, labels, settings, [], until), longest)
    kept = None
    if path is not None:
        asked = {"longest": longest, "examples": examples, "sample": sample, "seed": seed}
        kept = Progress(_arrays.path("path", path), asked)
    stage = until if until == "covariance" else "eigenvalues"
    found = []
    for number, (name, state) in enumerate(loaded.items()):
        before = None if start is None else _before(start, name)
        with fitting.at(name, state):
            at = At(name, digest(model), shares[name], Statistics(longest))
            wanted = Factors(described, reduction, labels, settings, [at], stage)
            saved = None if kept is None else kept.find(number, wanted)
            if saved is None:
                saved = fitting.fit(name, shares[name], before, stage)
                if kept is not None:
                    done = Factors(described, reduction, labels, settings, [saved], stage)
                    kept.keep(number, done)
            found.append(saved)
    factors = Factors(described, reduction, labels, settings, found, stage)
    if until == "basis":
        factors = fitting.basis(factors, loaded, widest)
    say(factors.explain, progress)
    return factors


def shares_of(weights: Mapping[str, float] | None, names: Sequence[str]) -> dict[str, float]:
    """The share of each checkpoint in a score.

    Raises:
        CheckpointError: If `weights` are not one for each.
        ArgumentError: If one is not above 0.
    """
    if weights is None:
        return dict.fromkeys(names, 1 / len(names))
    if not isinstance(weights, Mapping) or set(weights) != set(names):
        raise CheckpointError(f"weights must be one for each of {list(names)}, got {weights!r}")
    given = {
        name: _arrays.number(f"weights[{name!r}]", weights[name], positive=True) for name in names
    }
    return {name: value / sum(given.values()) for name, value in given.items()}


def _refuse_start(start: Any, wanted: Factors, longest: int) -> None:
    """Nothing, if factors can be gone on from.

    Raises:
        DtypeError: If it is something else.
        ArgumentError: If they were fitted further than is asked for.
        MismatchError: If they are of another model or setting.
    """
    if not isinstance(start, Factors):
        raise DtypeError(f"start must be Factors, got {_arrays.describe(start)}")
    if STAGES.index(start.stage) > STAGES.index(wanted.stage):
        raise ArgumentError(
            f"start must be factors up to {wanted.stage!r} at most, got some up to {start.stage!r}"
        )
    pairs = [
        (name, getattr(start, name), getattr(wanted, name)) for name in ("reduction", "labels")
    ]
    pairs += [("longest", at.statistics.longest, longest) for at in start.checkpoints]
    for name, there, here in pairs:
        if there != here:
            raise MismatchError(f"start must be of the same {name}, {here!r}, got {there!r}")
    if start.model != wanted.model:
        raise MismatchError("start must be of the same model and layers, got others")


def _before(start: Factors, name: str) -> At:
    for at in start.checkpoints:
        if at.name == name:
            return at
    raise CheckpointError(f"start must have factors of each checkpoint, got none of {name!r}")


class _Fitting:
    """The passes over the data."""

    def __init__(
        self,
        model: nn.Module,
        loader: Iterable[Any],
        task: Task,
        structure: Structure,
        labels: str,
        seed: int,
        longest: int,
        examples: int | None,
        sample: int,
        strict: bool,
        progress: bool | None,
    ) -> None:
        self.model = model
        self.structure = structure
        self._loader = loader
        self._task = task
        self._labels = labels
        self._seed = seed
        self._longest = longest
        self._examples = examples
        self._sample = sample
        self._progress = progress
        self._hooks = Hooks(model, structure, strict=strict)

    @contextmanager
    def at(self, name: str, state: State | None) -> Iterator[None]:
        """The model at a checkpoint, in evaluation mode."""
        with evaluating(self.model, weights=state is not None):
            if state is not None:
                put(self.model, name, load(name, state))
            refuse_batch_statistics(self.model)
            self._hooks.install()
            try:
                yield
            finally:
                self._hooks.remove()

    def fit(self, name: str, weight: float, before: At | None, until: str) -> At:
        """The factors of a checkpoint."""
        current = digest(self.model)
        if before is not None:
            if before.digest != current:
                raise MismatchError(
                    f"start must be of the same weights at checkpoint {name!r}, got others"
                )
            statistics = before.statistics
        else:
            statistics = Statistics(self._longest, pairs_of(self.structure.layers))
            self._gather(f"{name}: covariances", statistics)
        at = At(name, current, weight, statistics)
        if until == "covariance":
            return at
        if not statistics.is_rotated or not statistics.examples[1]:
            at.statistics = statistics if statistics.is_rotated else statistics.rotated()
            self._gather(f"{name}: eigenvalues", at.statistics)
        for known in at.statistics.known.values():
            if known.squares is not None:  # squares of what is finite need not be
                squares = known.squares.numpy()
                _arrays.finite(f"second moments of {known.block.parameter}", squares)
        return at

    def basis(self, factors: Factors, states: Mapping[str, State | None], widest: int) -> Factors:
        """The same with directions of a sample's rows, and the second moment of drawn labels'."""
        leading = Leading(widest, [at.weight for at in factors.checkpoints])
        for group in self._groups(factors):
            for part, residuals in self._parts("residuals", factors, states, group):
                mode = None if residuals is None else residuals.replaying
                leading.add(self._everywhere("basis", factors, states, part, mode))
        directions = leading.directions()
        if self._labels == "sampled":
            moment = torch.zeros(len(directions.values), len(directions.values))
            for group in self._groups(factors):
                for rows in self._drawn(factors, states, group, directions.matrices):
                    moment += interruptible(torch.matmul, rows.T, rows) / directions.examples
            _arrays.finite("second moments of drawn labels' rows", moment.numpy())
            directions = replace(directions, moment=moment)
        return Factors(
            factors.model,
            factors.reduction,
            factors.labels,
            factors.settings,
            factors.checkpoints,
            "basis",
            directions,
        )

    def _drawn(
        self,
        factors: Factors,
        states: Mapping[str, State | None],
        group: list[tuple[int, Any]],
        matrices: Sequence[Tensor],
    ) -> Iterator[Tensor]:
        """[examples, directions] rows of labels that are drawn from the mean over checkpoints."""
        mixture = Mixture(self._seed + 2)
        for place, (name, state) in enumerate(states.items()):
            with self.at(name, state):
                self._forward(f"{name}: labels", group, partial(mixture.drawing, checkpoint=place))
        if not any(mixture.targets.values()):
            DrawnLabels(0).check()
        parts = self._parts("drawn residuals", factors, states, group, mixture.targets)
        for part, residuals in parts:
            mode = mixture.replaying if residuals is None else residuals.replaying
            found = self._everywhere("curvature", factors, states, part, mode)
            rows = torch.zeros(())
            for each, matrix in zip(found, matrices, strict=True):
                rows = rows + interruptible(torch.matmul, each, matrix)
            yield rows

    def _everywhere(
        self,
        what: str,
        factors: Factors,
        states: Mapping[str, State | None],
        part: list[tuple[int, Any]],
        mode: Callable[[int], Any] | None,
    ) -> list[Tensor]:
        """[examples, coordinates] of batches at each checkpoint."""
        found = []
        for (name, state), chosen in zip(states.items(), factors.maps, strict=True):
            with self.at(name, state):
                found.append(self._coordinates(f"{name}: {what}", part, chosen, mode))
        return found

    def _parts(
        self,
        what: str,
        factors: Factors,
        states: Mapping[str, State | None],
        group: list[tuple[int, Any]],
        targets: dict[int, list[Tensor]] | None = None,
    ) -> Iterator[tuple[list[tuple[int, Any]], Residuals | None]]:
        """Batches with their residuals averaged over checkpoints, as many as there is room for."""
        if factors.settings.residuals != "averaged" or len(states) == 1:
            yield group, None
            return
        residuals = Residuals()
        residuals.targets = targets or {}
        for at, (name, state) in zip(factors.checkpoints, states.items(), strict=True):
            with self.at(name, state):
                mode = partial(residuals.collecting, share=at.weight)
                self._forward(f"{name}: {what}", group, mode)
            if residuals.nbytes > RESIDUAL_BYTES and len(group) > 1:
                middle = len(group) // 2
                for half in (group[:middle], group[middle:]):
                    yield from self._parts(what, factors, states, half, targets)
                return
        yield group, residuals

    def _forward(self, what: str, group: list[tuple[int, Any]], mode: Callable[[int], Any]) -> None:
        """Runs the loss of batches, without gradients."""
        for number, batch in self._batches(what, group):
            with torch.no_grad(), mode(number):
                self._task.loss(*arguments_of(batch))

    def _groups(self, factors: Factors) -> Iterator[list[tuple[int, Any]]]:
        """Numbered batches of the sample, `TOGETHER` examples or a few more at a time."""
        group: list[tuple[int, Any]] = []
        counted = 0
        for number, batch in enumerate(self._sampled(factors)):
            group.append((number, batch))
            counted += length_of(batch)
            if counted >= TOGETHER:
                yield group
                group, counted = [], 0
        if group:
            yield group

    def _sampled(self, factors: Factors) -> Iterator[Any]:
        """Whole batches of some examples, spread evenly over the data; the last one cut."""
        # What is known of factors, and not only of this call: one that goes on sees the same.
        whole = factors.checkpoints[0].statistics.examples[0]
        everything = self._examples is None and whole <= self._sample
        with torch.random.fork_rng(devices=[]):  # from which a DataLoader draws a seed
            number = self._count()
            batches = iter(self._loader)
        seen = 0
        for place, batch in enumerate(batches, 1):
            if seen * number >= self._sample * place and not everything:
                continue
            batch = taken(batch, np.arange(min(length_of(batch), self._sample - seen)))
            yield batch
            seen += length_of(batch)
            if seen >= self._sample:
                break
        if not seen:
            raise ArgumentError("loader must give at least one batch, got none")

    def _gather(self, name: str, statistics: Statistics) -> None:
        """One pass that adds to statistics."""
        mode = (
            DrawnLabels(self._seed + statistics.is_rotated) if self._labels == "sampled" else None
        )
        seen = 0
        for batch in self._batches(name, self._loader):
            if self._examples is not None and seen >= self._examples:
                break
            capture = Capture(self.structure, statistics, None, self._task.unbatched)
            capture, factor = self._task.run(self._hooks, capture, batch, mode)
            self._refuse_bad(capture)
            statistics.fold(capture.accumulator, factor)
            seen += capture.batch
        if not seen:
            raise ArgumentError("loader must give at least one batch, got none")

    def _coordinates(
        self,
        name: str,
        group: list[tuple[int, Any]],
        chosen: Coordinates,
        mode: Callable[[int], Any] | None,
    ) -> Tensor:
        """[examples, coordinates] of a sample."""
        found: list[Tensor] = []
        for number, batch in self._batches(name, group):
            capture = Capture(self.structure, chosen, None, self._task.unbatched)
            entered = None if mode is None else mode(number)
            capture, factor = self._task.run(self._hooks, capture, batch, entered)
            self._refuse_bad(capture)
            found.append(torch.from_numpy(capture.coordinates()) * factor)
        return torch.cat(found)

    def _count(self) -> int:
        """How many batches the loader gives."""
        try:
            return len(self._loader)  # type: ignore[arg-type]
        except TypeError:
            return sum(1 for _ in self._loader)

    def _batches(self, name: str, batches: Iterable[Any]) -> Iterable[Any]:
        return watched(batches, name, self._progress, "batch", leave=False)

    @staticmethod
    def _refuse_bad(capture: Capture) -> None:
        if capture.bad:
            names = [f"example {index} of a batch" for index in range(capture.batch)]
            raise not_finite(names, capture.bad)
