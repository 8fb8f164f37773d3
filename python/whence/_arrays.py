"""Checks and conversions of arguments, each by the name the caller wrote."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from whence.errors import ArgumentError, DtypeError, IdError, NotFiniteError, ShapeError

Ids: TypeAlias = NDArray[Any]
"""int64 or str ids, one kind in an array."""


def integer(name: str, value: Any, low: int, high: int | None = None) -> int:
    """`value` as an int from `low` to `high`.

    Raises:
        DtypeError: If it is not an integer; a bool is none.
        ArgumentError: If it is out of range.
    """
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, (int, np.integer)):
        raise DtypeError(f"{name} must be an integer, got {describe(value)}")
    if value < low or (high is not None and value > high):
        bounds = f"at least {low}" if high is None else f"from {low} to {high}"
        raise ArgumentError(f"{name} must be {bounds}, got {value}")
    return int(value)


def number(name: str, value: Any, *, positive: bool = False) -> float:
    """`value` as a finite float, above zero if `positive`.

    Raises:
        DtypeError: If it is not a number.
        ArgumentError: If it is not finite, or not positive where it must be.
    """
    if isinstance(value, (bool, np.bool_)) or not isinstance(
        value, (int, float, np.integer, np.floating)
    ):
        raise DtypeError(f"{name} must be a number, got {describe(value)}")
    found = float(value)
    if not np.isfinite(found) or (positive and found <= 0):
        raise ArgumentError(f"{name} must be a {'positive ' * positive}finite number, got {found}")
    return found


def choice(name: str, value: Any, allowed: Iterable[str]) -> str:
    """`value`, if it is one of `allowed`.

    Raises:
        ArgumentError: If it is not.
    """
    allowed = list(allowed)
    if value not in allowed:
        raise ArgumentError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")
    return str(value)


def threads(value: int | None) -> int:
    """The number of threads to use; None means all processors this process may run on.

    Raises:
        ArgumentError: If it is not at least 1.
    """
    if value is not None:
        return integer("threads", value, 1)
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def to_numpy(value: Any) -> Any:
    """A tensor as an array, without importing torch; anything else as it is."""
    if hasattr(value, "detach") and hasattr(value, "cpu"):
        value = value.detach().cpu()
        if str(value.dtype) == "torch.bfloat16":
            value = value.float()
        return value.numpy()
    return value


def float_rows(name: str, value: Any, dim: int) -> NDArray[np.float32]:
    """`value` as a C-contiguous [rows, dim] float32 array.

    Raises:
        DtypeError: If it is not float32; nothing is rounded without being asked to.
        ShapeError: If it is not [rows, dim].
        NotFiniteError: If it holds a NaN or an infinity.
    """
    value = to_numpy(value)
    if not isinstance(value, np.ndarray) or value.dtype != np.float32:
        raise DtypeError(f"{name} must be a float32 array, got {describe(value)}")
    if value.ndim != 2 or value.shape[1] != dim:
        raise ShapeError(f"{name} must be [rows, {dim}], got {list(value.shape)}")
    finite(name, value)
    return np.ascontiguousarray(value)


def finite(name: str, value: NDArray[Any]) -> None:
    """Nothing, if all of `value` is finite.

    Raises:
        NotFiniteError: If it is not; names the first place.
    """
    bad = ~np.isfinite(value)
    if bad.any():
        place = [int(i) for i in np.argwhere(bad)[0]]
        raise NotFiniteError(f"{name} must be finite, got {value[tuple(place)]} at {place}")


def ids(name: str, value: Any) -> Ids:
    """`value` as a one-dimensional array of int64 or str ids.

    Args:
        name: The argument as the caller wrote it.
        value: A list, NumPy array or tensor of integers or strings.

    Raises:
        IdError: If kinds are mixed, an id is neither an integer nor a str, an integer does not
            fit int64, or an id appears twice.
        ShapeError: If it is not one-dimensional, or empty.
    """
    array: Ids = _id_array(name, to_numpy(value))
    if array.ndim != 1 or array.size == 0:
        raise ShapeError(f"{name} must be a non-empty list of ids, got shape {list(array.shape)}")
    unique, counts = np.unique(array, return_counts=True)
    if len(unique) < len(array):
        twice = unique[counts > 1][0]
        raise IdError(f"{name} must be distinct, got {twice.item()!r} twice")
    return array


def _id_array(name: str, value: Any) -> Any:
    if isinstance(value, np.ndarray):
        if value.dtype.kind == "U":
            return value
        if value.dtype.kind in "iu":
            return _int64(name, value)
        if value.dtype.kind != "O":
            raise IdError(f"{name} must be integers or strings, got dtype {value.dtype}")
        value = list(value)
    if isinstance(value, (str, bytes)) or not isinstance(value, Iterable):
        raise IdError(f"{name} must be a list of integers or strings, got {describe(value)}")
    items = [item.item() if hasattr(item, "item") else item for item in value]
    kinds = {kind_of(item) for item in items}
    if not kinds:
        return np.empty(0, np.int64)
    if kinds == {"str"}:
        for item in items:
            if "\0" in item:
                raise IdError(f"{name} must not contain a NUL character, got {item!r}")
        return np.array(items, np.str_)
    if kinds == {"int64"}:
        try:
            return np.array(items, np.int64)
        except OverflowError:
            raise IdError(f"{name} must fit in 64 bits, got {max(items, key=abs)}") from None
    wrong = [item for item in items if kind_of(item) not in ("int64", "str")]
    got = describe(wrong[0]) if wrong else "integers and strings"
    raise IdError(f"{name} must be all integers or all strings, got {got}")


def _int64(name: str, value: NDArray[Any]) -> NDArray[np.int64]:
    if value.dtype == np.uint64 and value.size and value.max() > np.iinfo(np.int64).max:
        raise IdError(f"{name} must fit in 64 bits with a sign, got {value.max()}")
    return value.astype(np.int64)


def kind_of(value: Any) -> str:
    """The kind of a stored scalar: bool, int64, float64, str, or the name of what it is instead."""
    if isinstance(value, (bool, np.bool_)):
        return "bool"
    if isinstance(value, (int, np.integer)):
        return "int64"
    if isinstance(value, (float, np.floating)):
        return "float64"
    if isinstance(value, str):
        return "str"
    return type(value).__name__


def column(name: str, value: Any, rows: int) -> NDArray[Any]:
    """`value` as a column of `rows` bools, int64, float64 or str.

    Raises:
        ShapeError: If it is not one value per example.
        DtypeError: If values are of another type, or of several.
    """
    value = to_numpy(value)
    if isinstance(value, np.ndarray) and value.dtype.kind in "biufU":
        array: NDArray[Any] = value.astype(
            {"b": np.bool_, "U": np.str_, "f": np.float64}.get(value.dtype.kind, np.int64)
        )
    else:
        if isinstance(value, (str, bytes)) or not isinstance(value, Iterable):
            raise ShapeError(f"{name} must be one value per example, got {describe(value)}")
        items = [item.item() if hasattr(item, "item") else item for item in value]
        kinds = {kind_of(item) for item in items}
        if kinds == {"int64", "float64"}:
            kinds = {"float64"}
        if len(kinds) > 1 or not kinds <= {"bool", "int64", "float64", "str"}:
            found = ", ".join(sorted(kinds))
            raise DtypeError(f"{name} must be all numbers or all strings, got {found}")
        kind = kinds.pop() if kinds else "float64"
        try:
            array = np.array(items, np.str_ if kind == "str" else kind)
        except OverflowError:
            raise DtypeError(f"{name} must fit in 64 bits, got {max(items, key=abs)}") from None
    if array.shape != (rows,):
        raise ShapeError(
            f"{name} must be one value for each of {rows} examples, got shape {list(array.shape)}"
        )
    return array


def shape_of(name: str, value: Sequence[Any]) -> list[int]:
    """`value` as a list of sizes.

    Raises:
        DtypeError: If a size is not an integer.
        ArgumentError: If a size is negative.
    """
    return [integer(f"{name} sizes", size, 0) for size in value]


def describe(value: Any) -> str:
    """What `value` is, for an error: its dtype and shape, or its type and a short form."""
    if hasattr(value, "dtype") and hasattr(value, "shape"):
        return f"{value.dtype} of shape {list(value.shape)}"
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 40 else text[:37] + '...'}"
