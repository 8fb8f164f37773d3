"""How a loss combines its examples, and what undoes it."""

from __future__ import annotations

from typing import Any

from whence import _arrays
from whence.errors import ArgumentError, DtypeError
from whence.store import manifest

REDUCTIONS = manifest.REDUCTIONS
"""How a loss combines its examples."""


def refuse_tokens(reduction: str, tokens: Any) -> None:
    """Nothing, if `tokens` may go with `reduction`.

    Raises:
        ArgumentError: If they are given for a reduction that does not count them.
    """
    if reduction != "token_mean" and tokens is not None:
        raise ArgumentError(
            f"tokens must be None for reduction={reduction!r}, and is no name for a column, got "
            f"{_arrays.describe(tokens)}"
        )


def own_loss_factor(reduction: str, count: int, tokens: Any) -> float:
    """What a row of a batch of `count` is multiplied with to be the gradient of its own loss.

    Raises:
        ArgumentError: If tokens are needed and missing, or none is counted.
    """
    if reduction == "token_mean":
        return count_tokens(tokens, count)
    return float(count) if reduction == "mean" else 1.0


def count_tokens(tokens: Any, count: int) -> float:
    """The number of counted tokens in a batch.

    Raises:
        ArgumentError: If they are missing, or none is counted.
    """
    if tokens is None:
        raise ArgumentError(
            "tokens must be the counted tokens of each example for reduction='token_mean', got None"
        )
    counts = _arrays.column("tokens", tokens, count)
    if counts.dtype.kind not in "if":
        raise DtypeError(f"tokens must be numbers, got {_arrays.kind_of_array(counts)}")
    _arrays.finite("tokens", counts)
    if (counts < 0).any() or counts.sum() <= 0:
        raise ArgumentError(f"tokens must be counts, at least one above 0, got {counts.tolist()}")
    return float(counts.sum())
