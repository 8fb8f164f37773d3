"""`HashIndex`: candidates by code, rescored exactly."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from whence import _arrays, _core
from whence.errors import ArgumentError, ShapeError
from whence.hashing.families import Family, SignHash, family_of, rows_of

ENDS = ("largest", "smallest")
"""Which end of the scores is wanted."""


@dataclass(frozen=True, eq=False)
class Neighbours:
    """What a search found.

    Attributes:
        positions: [queries, width] int64 numbers of rows, the most extreme score first, of equal
            scores the lower number.
        scores: [queries, width] float32, exact.
        rescored: [queries] int64, how many rows were scored exactly.
    """

    positions: NDArray[np.int64]
    scores: NDArray[np.float32]
    rescored: NDArray[np.int64]


class HashIndex:
    """Rows, their codes, and if asked for buckets of parts of the codes.

    Rows are ranked by an estimate of their scores from the query's own projections and the rows'
    codes, so only one side is rounded (Dong, Charikar and Li, "Asymmetric distance estimation with
    sketches for similarity search in high-dimensional spaces", SIGIR 2008); the first of them are
    scored exactly. With `SignHash` the score is the inner product. Signs say nothing of lengths, so
    candidates are found best among rows of one length, such as those of a sketch with
    `normalize=True`. With `PStableHash` it is minus the Euclidean distance.

    Args:
        rows: [rows, dim] float32. Kept as they are, without a copy if they are C-contiguous; they
            must not change.
        family: The hash functions; None means `SignHash(256)`.
        band: How many hashes are the key of a bucket, at most 64 bits or 32 cells: each `band`
            hashes in order make a table. None makes no buckets; a search then estimates all rows.
        threads: How many threads to use; None means all processors.

    Takes hashes / 8 bytes a row for sign codes, 4 · hashes for cells, and 12 to 28 for each table.

    Raises:
        ArgumentError: If band is out of range, or a cell does not fit 32 bits.
        DtypeError: If rows are not float32, or family is none.
        ShapeError: If rows are not [rows, dim], at least one of each.
        NotFiniteError: If rows hold a NaN or an infinity, or a projection overflows.

    Examples:
        >>> import numpy as np
        >>> from whence.hashing import HashIndex
        >>> index = HashIndex(np.eye(4, dtype=np.float32))
        >>> index.search(np.eye(4, dtype=np.float32)[2:3], k=1, candidates=4).positions
        array([[2]])
    """

    def __init__(
        self,
        rows: Any,
        family: Family | None = None,
        *,
        band: int | None = None,
        threads: int | None = None,
    ) -> None:
        self._threads = _arrays.threads(threads)
        self.family = family_of(family)
        if band is not None:
            most = 64 if isinstance(self.family, SignHash) else 32
            band = _arrays.integer("band", band, 1, min(most, self.family.hashes))
        self.rows = rows_of("rows", rows)
        self._core = _core.HashIndex(
            self.family.core(self.rows.shape[1]), self.rows, band, self._threads
        )

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def codes(self) -> NDArray[Any]:
        """The codes of the rows, as `family.codes` returns them."""
        return self._core.codes()

    @property
    def tables(self) -> int:
        """How many tables of buckets there are."""
        return self._core.tables

    def search(
        self,
        queries: Any,
        k: int = 10,
        *,
        candidates: int = 100,
        probes: int | None = None,
        end: str = "largest",
    ) -> Neighbours:
        """The k rows with the largest, or smallest, scores among each query's candidates.

        Args:
            queries: [queries, dim] float32.
            k: How many rows to return.
            candidates: How many rows are scored exactly, at least k.
            probes: How many buckets to look up for each query, 1 to 65,536, over all tables by the
                cost of what has to change in the query's own keys: the sum of the squared distances
                of its projections from the borders that are crossed (Lv et al., "Multi-probe LSH",
                VLDB 2007). Only rows in them are candidates. None: all rows are. A query whose
                buckets hold fewer than k rows is answered as with None.
            end: "largest", or "smallest": the rows most opposed to the query, or farthest.

        Returns:
            Neighbours, min(k, rows) wide. Each query takes O(rows · hashes / 8) table look-ups for
            sign codes, O(rows · hashes) for cells, or what the probed buckets hold of that; and
            O(candidates · dim).

        Raises:
            ArgumentError: If an argument is out of range, candidates are fewer than k, or probes
                are given to an index without band, or for end="smallest" with `PStableHash`.
            DtypeError: If queries are not float32.
            ShapeError: If queries have another shape.
            NotFiniteError: If a query holds a NaN or an infinity, or a score overflows.
        """
        k = _arrays.integer("k", k, 1)
        candidates = _arrays.integer("candidates", candidates, 1)
        if candidates < k:
            raise ArgumentError(f"candidates must be at least k = {k}, got {candidates}")
        if probes is not None:
            probes = _arrays.integer("probes", probes, 1, _core.MAX_PROBES)
        smallest = _arrays.choice("end", end, ENDS) == "smallest"
        queries = _arrays.float_rows("queries", queries, self.rows.shape[1])
        if not len(queries):
            raise ShapeError(f"queries must have at least one row, got {list(queries.shape)}")
        k, candidates = min(k, len(self)), min(candidates, len(self))
        positions, scores, rescored = self._core.search(
            self.rows, queries, k, candidates, probes, smallest, self._threads
        )
        return Neighbours(positions.astype(np.int64), scores, rescored.astype(np.int64))
