"""Checks of what evaluations are given, and tables of what they found."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from whence import _arrays
from whence.errors import ArgumentError, DtypeError, ShapeError


def numbers(name: str, value: Any, *axes: str) -> NDArray[Any]:
    """`value` as an array of finite numbers with these axes, none of them empty.

    Raises:
        DtypeError: If its values are not integers or floats.
        ShapeError: If it has other axes, or an empty one.
        NotFiniteError: If it holds a NaN or an infinity.
    """
    found = _arrays.array(name, value)
    if found.dtype.kind not in "iuf":
        raise DtypeError(f"{name} must be numbers, got {_arrays.describe(found)}")
    if found.ndim != len(axes) or 0 in found.shape:
        raise ShapeError(f"{name} must be [{', '.join(axes)}], got {list(found.shape)}")
    _arrays.finite(name, found)
    return found


def subsets_of(name: str, value: Any, examples: int | None = None) -> list[NDArray[np.int64]]:
    """The sorted places of the examples of each subset.

    Args:
        name: The argument as the caller wrote it.
        value: [subsets, examples] bool, [subsets, size] integers, or a list of arrays of integers,
            which may differ in length.
        examples: How many examples there are, if that is known.

    Raises:
        DtypeError: If its values are neither bool nor integers.
        ShapeError: If it has another shape, or a subset is empty.
        ArgumentError: If a place is not that of an example, or twice in a subset.
    """
    value = _arrays.to_numpy(value)
    must = f"{name} must be [subsets, examples] bool or lists of the places of examples"
    if not isinstance(value, np.ndarray):
        if not _arrays.is_list(value):
            raise DtypeError(f"{must}, got {_arrays.describe(value)}")
        value = [_arrays.array(f"{name}[{number}]", each) for number, each in enumerate(value)]
    elif value.ndim != 2:
        raise ShapeError(f"{must}, got {_arrays.describe(value)}")
    if not len(value):
        raise ShapeError(f"{must}, got none")
    return [_places(f"{name}[{number}]", each, examples) for number, each in enumerate(value)]


def _places(name: str, subset: NDArray[Any], examples: int | None) -> NDArray[np.int64]:
    if subset.dtype.kind not in "biu" or subset.ndim != 1:
        raise DtypeError(f"{name} must be bool or integers, got {_arrays.describe(subset)}")
    if subset.dtype == np.bool_:
        if examples is not None and len(subset) != examples:
            raise ShapeError(f"{name} must be [{examples}] bool, got {list(subset.shape)}")
        found = np.flatnonzero(subset)
    else:
        found = np.sort(subset.astype(np.int64))
    if not len(found):
        raise ShapeError(f"{name} must have an example, got none")
    if found[0] < 0 or (examples is not None and found[-1] >= examples):
        bounds = "at least 0" if examples is None else f"from 0 to {examples - 1}"
        wrong = found[0] if found[0] < 0 else found[-1]
        raise ArgumentError(f"{name} must be places {bounds}, got {wrong}")
    twice = found[1:][found[1:] == found[:-1]]
    if len(twice):
        raise ArgumentError(
            f"{name} must be distinct places (or bool, one for each example), got {twice[0]} twice"
        )
    return found


def function(name: str, value: Any, what: str) -> Callable[..., Any]:
    """`value`, if it can be called.

    Raises:
        DtypeError: If it cannot.
    """
    if not callable(value):
        raise DtypeError(f"{name} must be a function {what}, got {_arrays.describe(value)}")
    found: Callable[..., Any] = value
    return found


def rising(name: str, value: Any, high: int) -> list[int]:
    """`value` as integers from 1 to `high`, each above the one before it.

    Raises:
        DtypeError: If it is no list of integers.
        ArgumentError: If it is empty, out of range, or does not rise.
    """
    if not _arrays.is_list(value):
        raise DtypeError(f"{name} must be a list of integers, got {_arrays.describe(value)}")
    found = [_arrays.integer(name, each, 1, high) for each in value]
    if not found or any(two <= one for one, two in pairwise(found)):
        raise ArgumentError(f"{name} must rise, got {found}")
    return found


def table(rows: Sequence[Sequence[str]]) -> str:
    """The rows as lines, with cells one below the other."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )
