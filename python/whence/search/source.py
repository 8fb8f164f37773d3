"""What can be searched, the question that is asked of it, and the scan that answers it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from whence import _arrays, _core
from whence._arrays import Ids
from whence._interrupts import interruptible
from whence.errors import ArgumentError, MismatchError, NotFiniteError, ShapeError
from whence.search.hits import Hits, Side

SIDES = {"both": (True, True), "helpful": (True, False), "harmful": (False, True)}
"""What a caller may ask for, and whether it takes the largest and the smallest scores."""

Held = tuple[_core.Rows, NDArray[np.uint64] | None]
"""Rows, and `[checkpoints, examples]` their numbers; None where they are those of the examples."""

_Found = tuple[NDArray[np.uint64], NDArray[np.float32]]


@dataclass(frozen=True, eq=False)
class Question:
    """A checked question.

    Attributes:
        rows: [checkpoints, queries, width] float32, each times the weight of its checkpoint.
        k: How many hits at each end; at most the fewest examples eligible for any query.
        sides: Whether the largest and the smallest scores are asked for.
        keep: [examples] whether each is eligible; None for all.
        excluded: For each query the examples it must not return, in order; empty for none at all.
        eligible: [queries] how many examples each query may return.
        threads: How many threads to use.
    """

    rows: NDArray[np.float32]
    k: int
    sides: tuple[bool, bool]
    keep: NDArray[np.bool_] | None
    excluded: list[list[int]]
    eligible: NDArray[np.int64]
    threads: int


class Source(ABC):
    """Examples with ids, columns and rows, one row at each checkpoint."""

    method: str
    """How its scores are computed, for people."""

    @property
    @abstractmethod
    def ids(self) -> Ids:
        """[examples] int64 or str."""

    @property
    @abstractmethod
    def columns(self) -> Mapping[str, NDArray[Any]]:
        """[examples] each."""

    @property
    @abstractmethod
    def dim(self) -> int:
        """The width of a row."""

    @property
    @abstractmethod
    def checkpoints(self) -> list[str]:
        """The names of the checkpoints."""

    @property
    @abstractmethod
    def core(self) -> _core.Rows:
        """The rows as the search engine takes them."""

    @abstractmethod
    def bounds(self, weights: NDArray[np.float32]) -> NDArray[np.float32] | None:
        """[examples] no less than the norm of the rows of each, side by side, times these weights.

        None where norms do not bound scores.
        """

    @abstractmethod
    def row_numbers(self, *, missing: str = "error") -> NDArray[np.int64]:
        """[checkpoints, examples] the number of the row of each example; -1 where it has none."""

    @abstractmethod
    def positions(self, name: str, ids: Ids) -> NDArray[np.int64]:
        """[ids] the number of the example of each id."""

    @abstractmethod
    def eligible(self, where: Any) -> NDArray[np.bool_]:
        """[examples] whether each passes a filter."""

    @abstractmethod
    def weights(self) -> tuple[NDArray[np.float32], str]:
        """[checkpoints] the weight of each in a score, and the unit of the score."""

    @property
    def places(self) -> list[tuple[int, int]]:
        """The parts of rows that are factors, as the search engine takes them; none for vectors."""
        return []

    def weighted(self, rows: NDArray[np.float32]) -> NDArray[np.float32]:
        """[checkpoints, queries, width] query rows, each times the weight of its checkpoint."""
        rates, _, plain = self._rates
        if plain:
            return rows
        with np.errstate(over="ignore"):
            weighted = rows * rates[:, None, None]
        if not np.isfinite(weighted).all():
            raise NotFiniteError("queries must be finite times their learning rates, got infinity")
        return weighted

    def query_rows(self, queries: Any) -> NDArray[np.float32]:
        """[checkpoints, queries, dim] checked rows.

        Raises:
            DtypeError: If they are not float32.
            ShapeError: If they have another shape.
            NotFiniteError: If they hold a NaN or an infinity.
            MismatchError: If the source holds factors.
        """
        if self.places:
            raise MismatchError(
                "queries must be asked by whence.query of a store with layout='factored', whose "
                "rows are factors and no vectors, got an array"
            )
        queries = _arrays.to_numpy(queries)
        checkpoints = len(self.checkpoints)
        if isinstance(queries, np.ndarray) and queries.ndim == 3:
            if queries.shape[0] != checkpoints or queries.shape[2] != self.dim:
                raise ShapeError(
                    f"queries must be [{checkpoints}, queries, {self.dim}], one for "
                    f"each checkpoint, got {list(queries.shape)}"
                )
            flat = _arrays.float_rows("queries", queries.reshape(-1, queries.shape[2]), self.dim)
            rows = flat.reshape(queries.shape)
        else:
            rows = _arrays.float_rows("queries", queries, self.dim)[None]
            if checkpoints > 1:
                raise ShapeError(
                    f"queries must be [{checkpoints}, queries, {self.dim}], one for "
                    f"each of {self.checkpoints}, got {list(rows.shape[1:])}"
                )
        if rows.shape[1] == 0:
            raise ShapeError(f"queries must have at least one row, got {list(rows.shape)}")
        return rows

    def ask(
        self,
        rows: NDArray[np.float32],
        k: int,
        *,
        where: Any = None,
        exclude: Sequence[Sequence[Any]] | None = None,
        missing: str = "error",
        side: str = "both",
        threads: int | None = None,
        gone: NDArray[np.bool_] | None = None,
    ) -> Question:
        """The question that a caller's arguments put; as in `Store.search`.

        Of an index also [examples] which are gone from it, if any.

        Raises:
            WhenceError: As `Store.search`.
        """
        k = _arrays.integer("k", k, 1)
        threads = _arrays.threads(threads)
        self.check_unchanged()
        _arrays.choice("missing", missing, ("error", "drop"))
        sides = SIDES[_arrays.choice("side", side, SIDES)]
        count = len(self.ids)
        if not count:
            raise ArgumentError(f"the store must have rows to search, got none in {self!r}")
        keep = None if where is None else self.eligible(where)
        if self.incomplete is not None:
            if missing == "error":
                self.row_numbers()  # raises, and says which
            keep = ~self.incomplete if keep is None else keep & ~self.incomplete
        if gone is not None:
            keep = ~gone if keep is None else keep & ~gone
        left = count if keep is None else int(np.count_nonzero(keep))
        excluded, eligible, fewest = self._excluded(exclude, keep, left, rows.shape[1])
        width = min(k, fewest)
        if width == 0:
            raise ArgumentError(
                "where and exclude must leave an example for every query, got "
                f"none for query {int(eligible.argmin())}"
            )
        rows = np.ascontiguousarray(self.weighted(rows))
        return Question(rows, width, sides, keep, excluded, eligible, threads)

    def _excluded(
        self,
        exclude: Sequence[Sequence[Any]] | None,
        keep: NDArray[np.bool_] | None,
        left: int,
        queries: int,
    ) -> tuple[list[list[int]], NDArray[np.int64], int]:
        """For each query the examples it must not return, and how many of those left it may.

        And the fewest of these.
        """
        if exclude is None:
            return [], np.full(queries, left, np.int64), left
        if not _arrays.is_list(exclude) or len(exclude) != queries:
            raise ShapeError(
                f"exclude must be one list of ids for each of {queries} queries, "
                f"got {_arrays.describe(exclude)}"
            )
        lists = []
        for query, listed in enumerate(exclude):
            found, name = np.empty(0, np.int64), f"exclude[{query}]"
            if not _arrays.is_list(listed):
                raise ShapeError(f"{name} must be a list of ids, got {_arrays.describe(listed)}")
            if len(listed):
                found = np.unique(self.positions(name, _arrays.ids(name, listed)))
            lists.append((found if keep is None else found[keep[found]]).tolist())
        eligible = [left - len(listed) for listed in lists]
        return lists, np.array(eligible, np.int64), min(eligible)

    def scan(self, question: Question, held: Held | None = None) -> Hits:
        """The answer that every other way of searching has to give: all examples scored.

        But those whose norm says that they cannot matter.

        Args:
            question: What is asked.
            held: The rows of all examples, if they are held in memory; None for those in files.

        Raises:
            NotFiniteError: If a score that matters overflows.
            StoreError: If the rows cannot be read.
        """
        core, numbers = (self.core, self.numbers) if held is None else held
        reaches, excluded, examples = self.reaches, question.excluded, None
        if question.keep is not None:
            examples, numbers, reaches = interruptible(_kept, question.keep, numbers, reaches)
            excluded = [np.searchsorted(examples, listed).tolist() for listed in excluded]
        sides = core.ends(
            numbers,
            question.rows,
            question.k,
            question.sides,
            excluded,
            reaches,
            question.threads,
            self.places,
        )
        return self.hits(question, sides, examples)

    def hits(
        self,
        question: Question,
        sides: tuple[_Found, _Found],
        examples: NDArray[np.int64] | None = None,
        margins: NDArray[np.float32] | None = None,
    ) -> Hits:
        """What was found, with ids; `examples` are those that found numbers count, if not all."""
        helpful, harmful = (interruptible(_side, self.ids, *side, examples) for side in sides)
        exact = np.full(len(question.eligible), margins is None)
        _, unit, _ = self._rates
        return Hits(
            helpful,
            harmful,
            question.eligible,
            self.method,
            unit,
            self.columns,
            exact,
            margins,
        )

    @cached_property
    def _rates(self) -> tuple[NDArray[np.float32], str, bool]:
        """What `weights` gives, and whether all weights are 1."""
        rates, unit = self.weights()
        return rates, unit, bool((rates == 1).all())

    @cached_property
    def reaches(self) -> NDArray[np.float32] | None:
        """[examples] no less than the norm of the rows of each over all checkpoints; or None."""
        return self.bounds(np.ones(len(self.checkpoints), np.float32))

    @cached_property
    def incomplete(self) -> NDArray[np.bool_] | None:
        """[examples] whether each lacks a checkpoint; None if none does."""
        lacking: NDArray[np.bool_] = np.any(self.row_numbers(missing="keep") < 0, axis=0)
        return lacking if lacking.any() else None

    @cached_property
    def numbers(self) -> NDArray[np.uint64] | None:
        """[checkpoints, examples] numbers of rows, or None where they are those of the examples.

        Any number for a row that is missing: what lacks a checkpoint is never eligible.
        """
        numbers = self.row_numbers(missing="keep").clip(min=0)
        if len(numbers) == 1 and bool((numbers[0] == np.arange(len(numbers[0]))).all()):
            return None
        return np.ascontiguousarray(numbers, np.uint64)

    def numbers_of(self, examples: NDArray[np.int64]) -> NDArray[np.uint64]:
        """[checkpoints, examples] the numbers of the rows of some examples, as in `numbers`."""
        if self.numbers is None:
            return examples.astype(np.uint64)[None]
        return np.ascontiguousarray(self.numbers[:, examples])

    def rows_at(self, examples: NDArray[np.int64]) -> NDArray[np.float32]:
        """[checkpoints, examples, dim] the rows of some examples.

        Raises:
            StoreError: If they cannot be read.
        """
        rows = [self.core.read(numbers) for numbers in self.numbers_of(examples)]
        return interruptible(np.stack, rows)

    def side_by_side(
        self, examples: NDArray[np.int64], dtype: type[np.floating[Any]] = np.float32
    ) -> NDArray[Any]:
        """[examples, checkpoints · dim] the same, of all checkpoints, each times its weight."""
        weights, _ = self.weights()
        return interruptible(_joined, self.rows_at(examples), weights, dtype)

    def digest(self, count: int, threads: int) -> int:
        """What tells the rows of the first `count` examples from others; reads them all.

        Raises:
            StoreError: If they cannot be read.
        """
        return self.core.digest(self.numbers, count, threads)

    @abstractmethod
    def check_unchanged(self) -> None:
        """Nothing, if rows in files are still those that were opened.

        Raises:
            StoreError: If they are not.
        """

    def held(self) -> Held:
        """All rows in memory, as they are stored.

        Raises:
            StoreError: If they cannot be read.
        """
        if self.numbers is None and self.core.resident:
            return self.core, None
        numbers = self.numbers_of(np.arange(len(self.ids)))
        core = self.core.gathered(numbers.reshape(-1))
        if len(numbers) == 1:
            return core, None
        return core, np.arange(numbers.size, dtype=np.uint64).reshape(numbers.shape)


def _joined(
    rows: NDArray[np.float32], weights: NDArray[np.float32], dtype: type[np.floating[Any]]
) -> NDArray[Any]:
    """[examples, checkpoints · dim] of [checkpoints, examples, dim], each times its weight."""
    weighted: NDArray[Any] = rows.astype(dtype, copy=False) * weights[:, None, None]
    return weighted.swapaxes(0, 1).reshape(rows.shape[1], -1)


def _kept(
    keep: NDArray[np.bool_], numbers: NDArray[np.uint64] | None, reaches: NDArray[Any] | None
) -> tuple[NDArray[np.int64], NDArray[np.uint64], NDArray[Any] | None]:
    """The examples that are kept, the numbers of their rows, and how far their scores reach."""
    examples = np.flatnonzero(keep)
    picked = examples[None] if numbers is None else numbers[:, examples]
    chosen = None if reaches is None else reaches[examples]
    return examples, np.ascontiguousarray(picked, np.uint64), chosen


def _side(
    ids: Ids,
    numbers: NDArray[np.uint64],
    scores: NDArray[np.float32],
    examples: NDArray[np.int64] | None,
) -> Side:
    """One end of the ranking, of numbers of examples; or of places among `examples`."""
    positions = numbers.astype(np.int64) if examples is None else examples[numbers]
    return Side(ids[positions], scores, positions)
