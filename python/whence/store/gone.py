"""Rows that were deleted or replaced: hidden at once, and still in their shards until `compact`."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from whence.errors import StoreError
from whence.store.files import (
    Written,
    names_of,
    read_array,
    store_errors,
    sync_directory,
    write_array,
)

GONE = "gone-"
"""How the names of their files begin."""

_NAME = re.compile(GONE + r"[0-9]{8,18}\.npy")


def gone_files(folder: Path) -> list[Path]:
    """Those of them that lie in a store's folder, in order; no file that only begins so.

    Raises:
        StoreError: If the folder cannot be read.
    """
    return [folder / name for name in names_of(folder, GONE) if _NAME.fullmatch(name)]


@dataclass(frozen=True)
class Gone:
    """The file that names them: int64 [rows, 2], the number of a shard and of the row in it.

    Attributes:
        name: Of the file.
        rows: How many.
        length: Of the file, in bytes.
        checksums: Of its blocks.
    """

    name: str
    rows: int
    length: int
    checksums: str

    @classmethod
    def of(cls, body: Any) -> Gone:
        """What a manifest says of it.

        Raises:
            ValueError: If it cannot be so.
        """
        found = cls(**body)
        Written.of((found.length, found.checksums))
        if not _NAME.fullmatch(found.name) or type(found.rows) is not int or found.rows < 1:
            raise ValueError(f"gone must have a name and rows, got {found.name!r:.80}")
        return found

    def read(self, folder: Path) -> NDArray[np.int64]:
        """[rows, 2] shard and row, in order.

        Raises:
            StoreError: If the file is damaged.
        """
        path = folder / self.name
        found = read_array(path, Written(self.length, self.checksums), "<i8", (self.rows, 2))
        shards, rows = found.T
        after = (np.diff(shards) > 0) | ((np.diff(shards) == 0) & (np.diff(rows) > 0))
        if (found < 0).any() or (found >= 1 << 31).any() or not after.all():
            raise StoreError(f"{path} is damaged: shards and rows must rise")
        return found


def write_gone(folder: Path, number: int, rows: NDArray[np.int64]) -> Gone | None:
    """Writes the rows that are gone, [rows, 2] in any order; None for none.

    Raises:
        StoreError: If it cannot.
    """
    if not len(rows):
        return None
    rows = np.unique(rows, axis=0)
    name = f"{GONE}{number:08}.npy"
    with store_errors(folder / name):
        written = write_array(folder / name, rows)
        sync_directory(folder)  # or its name may be lost where that of the manifest is not
    return Gone(name, len(rows), *written)


def kept_rows(gone: NDArray[np.int64], number: int, rows: int) -> NDArray[np.bool_] | None:
    """[rows] whether each row of a shard is left; None if all are.

    Args:
        gone: [gone, 2] shard and row, in order.
        number: Of the shard.
        rows: How many it has.

    Raises:
        StoreError: If rows are gone that it does not have.
    """
    here = gone[slice(*np.searchsorted(gone[:, 0], [number, number + 1])), 1]
    if not len(here):
        return None
    if here[-1] >= rows:
        raise StoreError(f"row {here[-1]} of shard {number} is gone, which has {rows} rows")
    kept = np.ones(rows, np.bool_)
    kept[here] = False
    return kept


def keys(rows: NDArray[np.int64]) -> NDArray[np.int64]:
    """[rows] one number for each (shard, row)."""
    found: NDArray[np.int64] = rows[:, 0] << 32 | rows[:, 1]
    return found
