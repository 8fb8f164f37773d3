"""Folders of other libraries: JSON, and arrays in files as long as their description says."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from whence import _arrays, _core
from whence.errors import StoreError
from whence.store.files import npy_header, store_errors

BLOCK = 1 << 22
"""How many values are read at a time."""


def folder(name: str, value: str | os.PathLike[str], library: str, *files: str) -> Path:
    """`value` as the path of a library's folder, which has these files.

    Raises:
        DtypeError: If it is not a path.
        StoreError: If it is no folder, or lacks one of them.
    """
    path = _arrays.path(name, value)
    with store_errors(path):
        if not path.is_dir():
            got = f"the file {path}" if path.exists() else f"{path}, which does not exist"
            raise StoreError(f"{name} must be a folder of {library}, got {got}")
        for file in files:
            if not (path / file).is_file():
                raise StoreError(f"{name} must be a folder of {library}, got {path} without {file}")
    return path


def read_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        StoreError: If it cannot be read, or is none.
    """
    with store_errors(path):
        content = path.read_bytes()
    try:
        found = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise StoreError(f"{path} is damaged: {type(error).__name__}: {error}") from None
    if not isinstance(found, dict):
        raise StoreError(f"{path} must hold a JSON object, got {_arrays.describe(found)}")
    return found


def counted(path: Path, found: dict[str, Any], key: str, low: int = 0) -> int:
    """The whole number under a key of the object that was read from `path`.

    Raises:
        StoreError: If there is none, or it is below `low`.
    """
    value = found.get(key)
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise StoreError(
            f"{path} must give {key!r} as a whole number of at least {low}, "
            f"got {_arrays.describe(value)}"
        )
    return value


def width(path: Path, dim: int) -> None:
    """Nothing, if rows of so many values can be searched.

    Raises:
        StoreError: If they cannot.
    """
    if not 1 <= dim <= _core.MAX_DIM:
        raise StoreError(f"{path} must be of rows of 1 to {_core.MAX_DIM} values, got {dim}")


def npy(path: Path, shape: tuple[int, int]) -> tuple[str, int]:
    """The type and the offset of the values of a `.npy` file, which fill the rest of it.

    Raises:
        StoreError: If they are not float16 or float32 of this shape.
    """
    found, dtype, offset = npy_header(path)
    if found != shape or dtype.str not in ("<f2", "<f4"):
        raise StoreError(
            f"{path} must hold float16 or float32 of shape {list(shape)}, "
            f"got {dtype} of shape {list(found)}"
        )
    filled(path, offset, shape, dtype.itemsize)
    return dtype.name, offset


def filled(path: Path, offset: int, shape: tuple[int, int], itemsize: int) -> None:
    """Nothing, if values of this shape fill a file from `offset` on.

    Raises:
        StoreError: If they do not.
    """
    with store_errors(path):
        length = path.stat().st_size
    needed = offset + shape[0] * shape[1] * itemsize
    if length != needed:
        raise StoreError(
            f"{path} is damaged: values of shape {list(shape)} need {needed} bytes, it has {length}"
        )


def blocks(
    path: Path, offset: int, shape: tuple[int, int], dtype: str
) -> Iterator[tuple[int, NDArray[np.float32]]]:
    """(first row, [rows, width] float32) of all rows of a file, some at a time.

    Args:
        path: The file, whose length was checked.
        offset: Where its values begin.
        shape: Of the values.
        dtype: Of the values: float16, float32, float64 or bfloat16.

    Raises:
        StoreError: If it cannot be read, or has got shorter.
    """
    rows, width = shape
    stored = np.dtype({"bfloat16": "<u2"}.get(dtype, dtype))
    step = max(1, BLOCK // width)
    with store_errors(path), path.open("rb") as file:
        file.seek(offset)
        for first in range(0, rows, step):
            count = min(step, rows - first)
            values = np.fromfile(file, stored, count * width)
            if values.size != count * width:
                raise StoreError(f"{path} must stay as it was opened, got one that is shorter")
            if dtype == "bfloat16":  # the upper half of a float32
                values = (values.astype(np.uint32) << np.uint32(16)).view(np.float32)
            with np.errstate(over="ignore"):  # infinity, which is reported where it is used
                yield first, values.reshape(count, width).astype(np.float32, copy=False)


def read_all(path: Path, offset: int, shape: tuple[int, int], dtype: str) -> NDArray[np.float32]:
    """[rows, width] all that `blocks` gives."""
    found = np.empty(shape, np.float32)
    for first, block in blocks(path, offset, shape, dtype):
        found[first : first + len(block)] = block
    return found
