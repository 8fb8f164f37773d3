"""A plain matrix, open for search."""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from whence import _arrays, _core
from whence._arrays import Ids
from whence.errors import DtypeError, ShapeError, StoreError
from whence.search.source import Source
from whence.store import Places, eligible
from whence.store.files import npy_header, stamp

DTYPES = ("float32", "float16", "int8")
"""Types of values that are searched."""


class Numbered(Source):
    """Examples in the order of their rows, with ids and columns that a caller gives.

    Args:
        count: How many examples there are.
        ids: [examples] int64 or str, distinct; None for the numbers of the rows.
        columns: name -> [examples] bool, int64, float64 or str, for filters and reports.

    Raises:
        DtypeError: If columns are no dict, or of another type.
        ShapeError: If `ids` or `columns` do not have one value each.
        IdError: If ids repeat, or are of no one kind.
    """

    def __init__(self, count: int, ids: Any, columns: Mapping[str, Any] | None) -> None:
        self._ids = np.arange(count, dtype=np.int64) if ids is None else _arrays.ids("ids", ids)
        if len(self._ids) != count:
            raise ShapeError(f"ids must be one for each of {count} rows, got {len(self._ids)}")
        if not isinstance(columns, (Mapping, type(None))):
            raise DtypeError(f"columns must be a dict, got {_arrays.describe(columns)}")
        self._columns = MappingProxyType(
            {
                name: _arrays.column(f"columns[{name!r}]", column, count)
                for name, column in (columns or {}).items()
            }
        )

    def __len__(self) -> int:
        return len(self._ids)

    @property
    def ids(self) -> Ids:
        """[examples] int64 or str."""
        return self._ids

    @property
    def columns(self) -> Mapping[str, NDArray[Any]]:
        """[examples] each."""
        return self._columns

    def positions(self, name: str, ids: Ids) -> NDArray[np.int64]:
        """[ids] the number of the example of each id.

        Raises:
            IdError: If an id is of the wrong kind, or not there.
        """
        return self._places.of(name, ids)

    @cached_property
    def _places(self) -> Places:
        return Places(self._ids)

    def eligible(self, where: Any) -> NDArray[np.bool_]:
        """[examples] whether each passes a filter, as in `Store.search`.

        Raises:
            WhenceError: As `Store.search`.
        """
        kinds = {name: _arrays.kind_of_array(column) for name, column in self._columns.items()}
        return eligible(where, len(self), self._columns, kinds, self.positions)


class Matrix(Numbered):
    """The rows of a matrix, whose inner products with queries are the scores.

    Args:
        rows: The path of a `.npy` file, which is read when it is searched and stays where it is; or
            a matrix, of which a copy is kept. [examples, dim] float32, float16 or int8, in C order.
        ids: [examples] int64 or str, distinct; None for the numbers of the rows.
        columns: name -> [examples] bool, int64, float64 or str, for filters and reports.

    Raises:
        DtypeError: If the values are of another type.
        ShapeError: If `rows` is no matrix with at least one column, or `ids` or `columns` do not
            have one value each.
        IdError: If ids repeat, or are of no one kind.
        StoreError: If the file cannot be read.
    """

    method = "inner product of rows"

    def __init__(
        self,
        rows: str | os.PathLike[str] | NDArray[Any],
        ids: Any = None,
        columns: Mapping[str, Any] | None = None,
    ) -> None:
        self.path: Path | None = None
        if isinstance(rows, (str, os.PathLike)):
            self.path = _arrays.path("rows", rows)
            shape, kind, offset = npy_header(self.path)
            self._stamp = stamp(self.path)
        else:
            rows = _arrays.array("rows", rows)
            shape, kind, offset = rows.shape, rows.dtype, 0
        dtype = kind.name
        if dtype not in DTYPES:
            raise DtypeError(f"rows must be one of {', '.join(DTYPES)}, got {dtype}")
        if kind.byteorder == ">":
            error = DtypeError if self.path is None else StoreError
            raise error(f"rows must be little-endian, got {kind.str}")
        if len(shape) != 2 or shape[1] == 0:
            raise ShapeError(f"rows must be [examples, dim], got {list(shape)}")
        count, self._dim = shape
        if self.path is not None:
            scales = np.ones(count, np.float32)
            files: list[Any] = [(self.path, offset, count, None)]
            self._core = _core.Rows(files, self._dim, dtype, scales)
        else:
            self._core = _core.Rows.of(np.require(rows, requirements=["C", "A"]))
        super().__init__(count, ids, columns)

    def __repr__(self) -> str:
        where = "in memory" if self.path is None else repr(str(self.path))
        return f"<whence matrix {where}: {len(self)} examples of {self.dim}>"

    @property
    def dim(self) -> int:
        """The width of a row."""
        return self._dim

    @property
    def checkpoints(self) -> list[str]:
        """One, without a name of its own."""
        return ["rows"]

    @property
    def core(self) -> _core.Rows:
        """The rows as the search engine takes them."""
        return self._core

    def bounds(self, weights: NDArray[np.float32]) -> NDArray[np.float32]:
        """[examples] the norm of each row times the weight; reads them all.

        Raises:
            NotFiniteError: If a row holds a NaN or an infinity, or its norm overflows.
        """
        return self._norms if weights[0] == 1 else self._norms * weights[0]

    @cached_property
    def _norms(self) -> NDArray[np.float32]:
        return self.core.norms(_arrays.threads(None))

    def check_unchanged(self) -> None:
        """Nothing, if the file is still the one that was opened.

        Raises:
            StoreError: If it is not: of another size, or written since.
        """
        if self.path is not None and stamp(self.path) != self._stamp:
            raise StoreError(f"{self.path} must stay as it was opened, got one written since")

    def row_numbers(self, *, missing: str = "error") -> NDArray[np.int64]:
        """[1, examples] the numbers of the rows: those of the examples."""
        return np.arange(len(self), dtype=np.int64)[None]

    def weights(self) -> tuple[NDArray[np.float32], str]:
        """[1] one, and the unit of the score."""
        return np.ones(1, np.float32), "inner product"
