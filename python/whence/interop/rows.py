"""Rows that another library has written, open for search."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from whence import _arrays, _core
from whence._interrupts import interruptible
from whence.errors import NotFiniteError, StoreError
from whence.search import Hits, Numbered
from whence.store.files import stamp

HELD = 1 << 25
"""How many scores are held beside those that are returned."""

ROUNDING = 1 + 1e-6
"""By how much norms over several checkpoints are raised, so that rounding leaves them bounds."""


class Imported(Numbered):
    """Rows of another library: of each checkpoint one for each example, in the same order.

    Args:
        path: The folder they come from.
        core: The rows as the search engine takes them, one checkpoint after the other.
        files: Where they are read from, beside the memory; they must stay as they are.
        count: How many examples there are.
        dim: The width of a row.
        checkpoints: The names of the checkpoints.
        method: How scores are computed, for people.
        unit: What a score of 1 means.
        ids: As of `whence.Matrix`.
        columns: As of `whence.Matrix`.

    Raises:
        WhenceError: As `whence.Matrix`, of `ids` and `columns`.
    """

    def __init__(
        self,
        path: Path,
        core: _core.Rows,
        files: Sequence[Path],
        count: int,
        dim: int,
        *,
        checkpoints: list[str],
        method: str,
        unit: str,
        ids: Any,
        columns: Mapping[str, Any] | None,
    ) -> None:
        super().__init__(count, ids, columns)
        self.path, self.method = path, method
        self._core, self._dim, self._checkpoints, self._unit = core, dim, checkpoints, unit
        self._stamps = {file: stamp(file) for file in files}

    @property
    def dim(self) -> int:
        """The width of a row."""
        return self._dim

    @property
    def checkpoints(self) -> list[str]:
        """The names of the checkpoints."""
        return self._checkpoints

    @property
    def core(self) -> _core.Rows:
        """The rows as the search engine takes them."""
        return self._core

    def weights(self) -> tuple[NDArray[np.float32], str]:
        """[checkpoints] one over their number, for the mean over them; and the unit of a score."""
        count = len(self._checkpoints)
        return np.full(count, 1 / count, np.float32), self._unit

    def row_numbers(self, *, missing: str = "error") -> NDArray[np.int64]:
        """[checkpoints, examples] the numbers of the rows; none is missing."""
        count = len(self._checkpoints)
        return np.arange(count * len(self), dtype=np.int64).reshape(count, len(self))

    def bounds(self, weights: NDArray[np.float32]) -> NDArray[np.float32]:
        """[examples] no less than the norm of the rows of each, side by side, times these weights.

        Reads all rows the first time.

        Raises:
            NotFiniteError: If a row holds a NaN or an infinity, or a norm overflows.
            StoreError: If the rows cannot be read.
        """
        if len(weights) == 1 and weights[0] == 1:
            only: NDArray[np.float32] = self._norms[0]
            return only
        norms = self._norms * weights[:, None].astype(np.float64)
        with np.errstate(over="ignore"):
            total: NDArray[np.float64] = np.sqrt((norms**2).sum(axis=0)) * ROUNDING
            found = total.astype(np.float32)
        if not np.isfinite(found).all():
            raise NotFiniteError(f"norms must be finite, got infinity in {self!r}")
        return found

    @cached_property
    def _norms(self) -> NDArray[np.float32]:
        norms: NDArray[np.float32] = self.core.norms(_arrays.threads(None))
        return norms.reshape(len(self._checkpoints), len(self))

    def check_unchanged(self) -> None:
        """Nothing, if the files are still those that were opened.

        Raises:
            StoreError: If one is not: of another size, or written since.
        """
        for file, before in self._stamps.items():
            if stamp(file) != before:
                raise StoreError(f"{file} must stay as it was opened, got one written since")

    def search(
        self,
        queries: Any,
        k: int = 10,
        *,
        where: Any = None,
        exclude: Sequence[Sequence[Any]] | None = None,
        side: str = "both",
        threads: int | None = None,
    ) -> Hits:
        """The k most helpful and the k most harmful examples of each query, exactly.

        A `whence.Index` of this gives the same hits, and is quicker for many questions.

        Args:
            queries: [queries, dim] float32 rows; [checkpoints, queries, dim] of several
                checkpoints.
            k: How many to return at each end.
            where: As in `Store.search`.
            exclude: As in `Store.search`.
            side: As in `Store.search`.
            threads: As in `Store.search`.

        Returns:
            Hits. O(checkpoints · examples · queries · dim) time, in a working set that does not
            grow with the rows in files.

        Raises:
            WhenceError: As `Store.search`.
        """
        rows = self.query_rows(queries)
        asked = self.ask(rows, k, where=where, exclude=exclude, side=side, threads=threads)
        return self.scan(asked)

    def scores(self, queries: Any, *, threads: int | None = None) -> NDArray[np.float32]:
        """[examples, queries] all scores, positive = helpful, as `whence.evaluate` takes them.

        Args:
            queries: As in `search`.
            threads: As in `search`.

        Raises:
            WhenceError: As `search`.

        O(checkpoints · examples · queries · dim) time; what is returned and `HELD` scores more in
        memory, for which the rows are read several times if need be.
        """
        rows = self.query_rows(queries)
        found = np.empty((len(self), rows.shape[1]), np.float32)
        step = max(1, HELD // max(1, len(self)))
        for first in range(0, rows.shape[1], step):
            asked = self.ask(
                rows[:, first : first + step], max(1, len(self)), side="helpful", threads=threads
            )
            side = self.scan(asked).helpful
            here = found[:, first : first + step]
            interruptible(np.put_along_axis, here, side.positions.T, side.scores.T, axis=0)
        return found
