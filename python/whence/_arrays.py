"""Checks and conversions of arguments, each by the name the caller wrote."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from whence._core import MAX_COORDINATES, MAX_THREADS
from whence._interrupts import interruptible
from whence.errors import ArgumentError, DtypeError, IdError, NotFiniteError, ShapeError

Ids: TypeAlias = NDArray[Any]
"""int64 or str ids, one kind in an array."""

BLOCK = 1 << 20
"""Values that are looked at together."""


MAX_ID = 1024
"""Characters of the longest id: arrays of ids give every one the room of the longest."""


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
    try:
        found = float(value)
    except OverflowError:
        found = math.inf
    if not np.isfinite(found) or (positive and found <= 0):
        raise ArgumentError(f"{name} must be a {'positive ' * positive}finite number, got {found}")
    return found


def choice(name: str, value: Any, allowed: Iterable[str]) -> str:
    """`value`, if it is one of `allowed`.

    Raises:
        ArgumentError: If it is not.
    """
    allowed = list(allowed)
    if not isinstance(value, str) or value not in allowed:
        raise ArgumentError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")
    return str(value)


def boolean(name: str, value: Any) -> bool:
    """`value` as True or False.

    Raises:
        DtypeError: If it is neither.
    """
    if not isinstance(value, (bool, np.bool_)):
        raise DtypeError(f"{name} must be True or False, got {describe(value)}")
    return bool(value)


def is_list(value: Any) -> bool:
    """Whether it has items in order, and is no text."""
    if isinstance(value, (str, bytes)):
        return False
    return isinstance(value, Sequence) or len(getattr(value, "shape", ())) > 0


def threads(value: int | None) -> int:
    """The number of threads to use; None means all processors this process may run on.

    Raises:
        ArgumentError: If it is not at least 1.
    """
    if value is not None:
        return min(integer("threads", value, 1), MAX_THREADS)
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def to_numpy(value: Any) -> Any:
    """A tensor as an array, without importing torch; anything else as it is."""
    if hasattr(value, "detach") and hasattr(value, "cpu"):
        try:
            value = value.detach().cpu()
            if str(value.dtype) == "torch.bfloat16":
                value = value.float()
            return value.numpy()
        except (TypeError, NotImplementedError, RuntimeError) as error:
            # Sparse, without values, or of a type that arrays have not.
            raise DtypeError(f"a tensor must be one that becomes an array, got {error}") from None
    return value


def array(name: str, value: Any) -> NDArray[Any]:
    """`value`, a tensor, an array or nested lists, as an array.

    Raises:
        ShapeError: If lists are of several lengths.
    """
    try:
        return np.asarray(to_numpy(value))
    except ValueError as error:
        raise ShapeError(f"{name} must be an array, got {error}") from None


def matmul(left: NDArray[Any], right: NDArray[Any]) -> NDArray[Any]:
    """`left @ right`, silent about NaN, which is looked for where it matters.

    OpenBLAS computes with numbers beside an array, too, whose results it drops but not their
    floating-point flags: numpy warns of an invalid value where all are finite.
    """
    with np.errstate(invalid="ignore"):
        found: NDArray[Any] = left @ right
    return found


def float_rows(name: str, value: Any, dim: int) -> NDArray[np.float32]:
    """`value` as a C-contiguous [rows, dim] float32 array.

    Raises:
        DtypeError: If it is not float32 (or a bfloat16 tensor, which float32 holds exactly).
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
    parts = np.nditer(
        value, ["external_loop", "buffered", "zerosize_ok"], order="C", buffersize=BLOCK
    )
    before = 0
    for part in parts:
        good = np.isfinite(part)
        if not good.all():
            place = np.unravel_index(before + int(good.argmin()), value.shape)
            raise NotFiniteError(
                f"{name} must be finite, got {value[place]} at {[int(i) for i in place]}"
            )
        before += good.size


def ids(name: str, value: Any) -> Ids:
    """`value` as a one-dimensional array of int64 or str ids.

    Args:
        name: The argument as the caller wrote it.
        value: A list, NumPy array or tensor of integers or strings.

    Raises:
        IdError: If kinds are mixed, an id is neither an integer nor a str, an integer does not
            fit int64, a str is longer than `MAX_ID`, or an id appears twice.
        ShapeError: If it is not one-dimensional, or empty.
    """
    array = _items(name, value, IdError)
    if array.size == 0:
        raise ShapeError(f"{name} must be a non-empty list of ids, got none")
    kind = kind_of_array(array)
    if kind not in ("int64", "str"):
        raise IdError(f"{name} must be all integers or all strings, got {kind}")
    if kind == "str":
        longest = max(len(id_) for id_ in array)
        if longest > MAX_ID:
            raise IdError(f"{name} must be at most {MAX_ID} characters long, got one of {longest}")
        array = array.astype(np.str_)
    ordered = interruptible(np.sort, array)
    same = ordered[1:] == ordered[:-1]
    if same.any():
        raise IdError(f"{name} must be distinct, got {ordered[:-1][same][0].item()!r} twice")
    return array


def distinct(values: NDArray[Any]) -> NDArray[Any]:
    """The values of a list, each once, in order.

    By sorting: `np.unique` hashes integers, in fifteen times the time and with Python's lock. Those
    that rise already, as where a loop counts, are given back as they are.
    """
    return interruptible(_distinct, values)


def _distinct(values: NDArray[Any]) -> NDArray[Any]:
    if (values[:-1] < values[1:]).all():
        return values
    ordered = np.sort(values)
    first = np.ones(len(ordered), np.bool_)
    np.not_equal(ordered[1:], ordered[:-1], out=first[1:])
    found: NDArray[Any] = ordered[first]
    return found


def column(name: str, value: Any, rows: int) -> NDArray[Any]:
    """`value` as a column of `rows` bools, int64, float64 or (as objects) str.

    Raises:
        ShapeError: If it is not one value per example.
        DtypeError: If values are of another type, or of several.
    """
    array = _items(name, value, DtypeError)
    if array.shape != (rows,):
        raise ShapeError(f"{name} must be one value for each of {rows} examples, got {len(array)}")
    return array


def values(name: str, value: Any) -> NDArray[Any]:
    """`value`, a scalar or a list of them, as bools, int64, float64 or (as objects) str.

    Raises:
        DtypeError: If values are of another type, or of several.
    """
    scalar = isinstance(value, (str, int, float, np.generic)) or array(name, value).ndim == 0
    return _items(name, [value] if scalar else value, DtypeError)


def kind_of_array(array: NDArray[Any]) -> str:
    """The word for the type of a column: bool, int64, float64 or str."""
    return {"b": "bool", "i": "int64", "f": "float64", "O": "str", "U": "str"}[array.dtype.kind]


def _items(name: str, value: Any, error: type[ArgumentError]) -> NDArray[Any]:
    """One-dimensional bools, int64, float64 or objects that are str."""
    value = to_numpy(value)
    if isinstance(value, np.ndarray):
        if value.ndim != 1:
            raise ShapeError(f"{name} must have one dimension, got shape {list(value.shape)}")
        kind = value.dtype.kind
        if kind in "iu":
            if kind == "u" and value.size and int(value.max()) > np.iinfo(np.int64).max:
                raise error(f"{name} must fit in 64 bits with a sign, got {value.max()}")
            return value.astype(np.int64)
        if kind in "bf":
            return value.astype(np.bool_ if kind == "b" else np.float64)
        if kind not in "UO":
            raise error(f"{name} must be numbers or strings, got dtype {value.dtype}")
        value = value.tolist()
    if isinstance(value, (str, bytes)) or not isinstance(value, Sequence):
        raise (error if isinstance(value, (set, frozenset)) else ShapeError)(
            f"{name} must be a list, one value per example, got {describe(value)}"
        )
    items = [
        item.item() if hasattr(item, "item") and np.size(to_numpy(item)) == 1 else item
        for item in value
    ]
    kinds = {kind_of(item) for item in items}
    if kinds == {"int64", "float64"}:
        kinds = {"float64"}
    if not kinds:
        return np.empty(0, np.int64)
    if len(kinds) > 1 or not kinds <= {"bool", "int64", "float64", "str"}:
        wrong = [item for item in items if kind_of(item) not in ("bool", "int64", "float64", "str")]
        got = describe(wrong[0]) if wrong else " and ".join(sorted(kinds))
        what = "integers or all strings" if error is IdError else "numbers or all strings"
        raise error(f"{name} must be all {what}, got {got}")
    kind = kinds.pop()
    if kind == "str":
        for item in items:
            if "\0" in item:
                raise error(f"{name} must not contain a NUL character, got {item!r}")
        found = np.empty(len(items), object)
        found[:] = [str(item) for item in items]
        return found
    try:
        return np.array(items, kind)
    except OverflowError:
        raise error(f"{name} must fit in 64 bits, got {max(items, key=abs)}") from None


def kind_of(value: Any) -> str:
    """The kind of a scalar: bool, int64, float64, str, or the name of what it is instead."""
    if isinstance(value, (bool, np.bool_)):
        return "bool"
    if isinstance(value, (int, np.integer)):
        return "int64"
    if isinstance(value, (float, np.floating)):
        return "float64"
    if isinstance(value, str):
        return "str"
    return type(value).__name__


def path(name: str, value: Any) -> Path:
    """`value` as an absolute path, so that a later change of directory does not move it.

    Raises:
        DtypeError: If it is not a path.
    """
    if not isinstance(value, (str, os.PathLike)):
        raise DtypeError(f"{name} must be a path, got {describe(value)}")
    try:
        os.fsencode(value)
    except UnicodeEncodeError as error:
        raise ArgumentError(f"{name} must be a path, got {value!r}: {error}") from None
    if "\0" in os.fsdecode(value):
        raise ArgumentError(f"{name} must not contain a NUL character, got {value!r}")
    return Path(value).absolute()


def shape_of(name: str, value: Sequence[Any]) -> list[int]:
    """`value` as a list of sizes.

    Raises:
        DtypeError: If it is not a list of integers.
        ArgumentError: If a size is negative, or larger than the core allows.
    """
    if isinstance(value, str) or not isinstance(value, Iterable):
        raise DtypeError(f"{name} must hold (name, shape) pairs, got the shape {value!r}")
    return [integer(f"{name} sizes", size, 0, MAX_COORDINATES) for size in value]


def describe(value: Any) -> str:
    """What `value` is, for an error: its dtype and shape, or its type and a short form."""
    if hasattr(value, "dtype") and hasattr(value, "shape"):
        return f"{value.dtype} of shape {list(value.shape)}"
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 40 else text[:37] + '...'}"
