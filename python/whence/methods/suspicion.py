"""How wrong an example's label looks: its loss and its preconditioned gradient together."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from whence import _arrays
from whence.curvature import Factors
from whence.errors import ArgumentError, CheckpointError
from whence.methods.ekfac import fitted_factors
from whence.methods.run import Run


def suspicion(run: Run, losses: Any, factors: Factors | None = None) -> NDArray[np.float64]:
    """High for wrong labels: the loss and the root of self-influence, each divided by its mean.

    A wrong label has a high loss, and so has a hard example; a wrong label also has a gradient
    that the curvature of the loss does not expect. Both are averaged over the run's checkpoints,
    and count alike.

    Args:
        run: The run; see `Run`.
        losses: [examples] each one's loss, averaged over the run's checkpoints.
        factors: What `fit_factors` found at the run's checkpoints; None to find them here.

    Returns:
        [examples], at least 0; 2 on average. O(examples · coordinates) a checkpoint.

    Raises:
        ArgumentError: If losses are not one for each example, or negative.
        CheckpointError: If factors are of other checkpoints.
        WhenceError: And whatever `fit_factors` raises.
    """
    if factors is None:
        factors = fitted_factors(run)
    names = [at.name for at in factors.checkpoints]
    if names != list(run.states):
        raise CheckpointError(
            f"factors must be of the run's checkpoints {list(run.states)}, got {names}"
        )
    total: NDArray[np.float64] | None = None
    for name, rows, at in zip(names, factors.maps, factors.checkpoints, strict=True):
        norms = []
        with run.at(name):
            for seen in run.training(rows, what=f"{name}: self-influence"):
                found = seen.capture.coordinates().astype(np.float64)
                norms.append(np.linalg.norm(found, axis=1) * seen.factor)
        joined = np.concatenate(norms) * at.weight
        total = joined if total is None else total + joined
    if total is None:
        raise ArgumentError("factors must be of at least one checkpoint, got none")
    given = _arrays.column("losses", losses, len(total)).astype(np.float64)
    _arrays.finite("losses", given)
    if (given < 0).any():
        raise ArgumentError(f"losses must be at least 0, got {given.min()}")
    return _relative(given) + _relative(total)


def _relative(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Values divided by their mean."""
    mean = float(values.mean())
    return values / mean if mean > 0 else values
