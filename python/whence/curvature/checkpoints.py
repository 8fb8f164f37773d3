"""Which checkpoints of a run to keep."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from whence import _arrays
from whence.errors import ArgumentError, DtypeError


def suggest_checkpoints(losses: Mapping[str, float], count: int = 5) -> list[str]:
    """The checkpoints at which a run had learnt an equal part of what it learnt, and the last one.

    Gradients say what training did where it did much: the fall of the logarithm of the training
    loss is cut into equal parts, and of each part the checkpoint nearest to its end is taken.

    Args:
        losses: Checkpoint name -> mean training loss there, in the order of training.
        count: How many.

    Returns:
        At most `count` names, in order; the last of `losses` among them.

    Raises:
        ArgumentError: If losses are not positive numbers, or there are none.
        DtypeError: If they are no dict.

    Examples:
        >>> suggest_checkpoints({"1": 2.0, "2": 1.0, "3": 0.8, "4": 0.5, "5": 0.25}, count=3)
        ['2', '4', '5']
    """
    if not isinstance(losses, Mapping):
        raise DtypeError(f"losses must be a dict of checkpoint to loss, got {losses!r}")
    if not losses:
        raise ArgumentError("losses must be of at least one checkpoint, got none")
    count = _arrays.integer("count", count, 1)
    names = list(losses)
    values = [_arrays.number(f"losses[{name!r}]", losses[name], positive=True) for name in names]
    # The path so far, up and down: a loss that rises again has not unlearnt what it learnt.
    path = np.concatenate([[0.0], np.cumsum(np.abs(np.diff(np.log(values))))])
    # What was learnt before the first checkpoint is not known: it counts as one part.
    ends = path[-1] * np.arange(count) / max(count - 1, 1)
    nearest = {int(np.abs(path - end).argmin()) for end in ends[1:] if count > 1}
    nearest.add(len(names) - 1)
    if len(nearest) < count and len(names) > len(nearest):
        nearest.add(0)
    return [names[place] for place in sorted(nearest)]
