"""Examples by their ids, and which of them pass a filter."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from whence import _arrays
from whence._arrays import Ids, describe, distinct
from whence._interrupts import interruptible
from whence.errors import ArgumentError, DtypeError, IdError, ShapeError

Columns = Mapping[str, NDArray[Any]]


class Places:
    """Where each id is among others.

    Args:
        ids: [examples] distinct int64 or str.
    """

    def __init__(self, ids: Ids) -> None:
        self._order = interruptible(np.argsort, ids, kind="stable")
        self._ordered = ids[self._order]

    def of(self, name: str, ids: Ids) -> NDArray[np.int64]:
        """[ids] the number of the example of each id.

        Raises:
            IdError: If an id is of the wrong kind, or not there.
        """
        ordered = self._ordered
        if ids.dtype.kind != ordered.dtype.kind:
            kind = _arrays.kind_of_array(ordered)
            raise IdError(f"{name} must be {kind} as in the store, got {describe(ids)}")
        at = interruptible(np.searchsorted, ordered, ids).clip(max=max(len(ordered) - 1, 0))
        known = ordered[at] == ids if len(ordered) else np.zeros(len(ids), np.bool_)
        if not known.all():
            raise IdError(f"{name} must be in the store, got {ids[~known][0].item()!r}")
        found: NDArray[np.int64] = self._order[at]
        return found


def eligible(
    where: Any,
    count: int,
    columns: Columns,
    kinds: Mapping[str, str],
    positions: Callable[[str, Ids], NDArray[np.int64]],
    argument: str = "where",
) -> NDArray[np.bool_]:
    """[examples] whether each passes a filter.

    Args:
        where: None for all; a dict of column name to a value or a list of values, all of which
            must hold; [examples] bool; or ids, as a list, an array or a set.
        count: How many examples there are.
        columns: name -> [examples].
        kinds: name -> the type of the column.
        positions: Name of the argument and ids -> the numbers of their examples.
        argument: The name of `where`, for an error.

    Raises:
        ArgumentError: If a column is not there.
        DtypeError: If `where` is something else, or a value of another type than its column.
        IdError: If an id is not there.
    """
    if where is None:
        return np.ones(count, np.bool_)
    if isinstance(where, Mapping):
        keep = np.ones(count, np.bool_)
        for name, wanted in where.items():
            if name not in columns:
                raise ArgumentError(
                    f"{argument} must name columns of {sorted(columns)}, got {name!r}"
                )
            found = _wanted(f"{argument}[{name!r}]", wanted, kinds[name])
            if kinds[name] == "str":  # which numpy would compare each with each
                allowed = set(found.tolist())
                texts = columns[name].tolist()
                keep &= np.fromiter((text in allowed for text in texts), np.bool_, count)
            else:
                keep &= np.isin(columns[name], found)
        return keep
    if isinstance(where, (set, frozenset)):
        where = list(where)
    must = f"a dict of columns, [{count}] bool or a list of ids"
    try:
        found = _arrays.column(argument, where, _arrays.array(argument, where).size)
    except (DtypeError, ShapeError):
        raise DtypeError(f"{argument} must be {must}, got {describe(where)}") from None
    if found.dtype == np.bool_:
        if len(found) != count:
            raise DtypeError(f"{argument} must be {must}, got {describe(where)}")
        return found.copy()
    keep = np.zeros(count, np.bool_)
    if len(found):
        # Texts are objects here, whose order Python finds, and nobody can interrupt it.
        once = list(dict.fromkeys(found.tolist())) if found.dtype == object else distinct(found)
        keep[positions(argument, _arrays.ids(argument, once))] = True
    return keep


def _wanted(name: str, wanted: Any, kind: str) -> NDArray[Any]:
    """The values that a filter allows in a column, in the column's type."""
    found = _arrays.values(name, wanted)
    got = _arrays.kind_of_array(found)
    if got != kind and {got, kind} != {"int64", "float64"}:
        raise DtypeError(f"{name} must be {kind}, got {got}")
    if got == kind:
        return found
    # A number that the column's type cannot hold equals none in it.
    with np.errstate(invalid="ignore"):
        cast = found.astype(kind)
    same = [
        int(one) == two if one == one and abs(one) < np.inf else False
        for one, two in zip(found.tolist(), cast.tolist(), strict=True)
    ]
    return cast[np.array(same, np.bool_)]
