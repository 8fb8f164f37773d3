"""Rows made ready to be asked often."""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from whence import _arrays, _core
from whence._optional import imported
from whence._plain import line
from whence.errors import ArgumentError, MismatchError
from whence.search import basis as bases
from whence.search import diverse as mixtures
from whence.search import kept
from whence.search.hits import Hits, Side
from whence.search.matrix import Matrix
from whence.search.source import Held, Question, Source
from whence.search.store import Store

METHODS = ("auto", "exact", "certified", "hnsw")
BASES = ("auto", "eigen", "rows", "none")

FEW = 2000
"""Examples up to which a scan takes less than what codes could save."""

DEEP = 20
"""The share of examples, one in so many, from which on all of them are scored."""

CANDIDATES = 2.5
"""How many candidates an approximate search scores exactly for each hit."""

WALK = 4
"""How many nodes a walk over the graph keeps in sight for each hit, and at least ten times that."""

WALKED = 1.75
"""How many of those it comes to are scored exactly for each hit."""

DEEPER = 3
"""And at least one in so many of those in sight: who asks for more of them wants to miss less."""

SPREAD = 2.0
"""How much longer than the median the longest row may be for a graph of directions to be used."""

SELECTIVE = 0.15
"""The share of examples that a filter must leave for a graph to be used."""


@dataclass(frozen=True)
class Explanation:
    """What an index is, and how it answered last.

    Attributes:
        method: What it answers with: "exact", "certified" or "hnsw".
        built: What was built, in words.
        why: Why.
        bytes: Bytes it keeps in memory for searching, ids and columns not counted.
        examples: How many examples it has.
        deleted: How many of them were deleted.
        last: How the last question was answered and why, in words; None before the first.
        scored: [queries] how many examples were scored exactly for each query of the last
            question; None before the first.
    """

    method: str
    built: str
    why: str
    bytes: int
    examples: int
    deleted: int
    last: str | None
    scored: NDArray[np.int64] | None

    def __str__(self) -> str:
        each = self.bytes / max(self.examples, 1)
        lines = [
            f"method  {self.method}: {line(self.built)}",
            f"why     {self.why}",
            f"memory  {self.bytes / 2**20:,.1f} MiB, {each:,.0f} bytes an example",
        ]
        if self.deleted:
            lines.append(f"deleted {self.deleted:,} of {self.examples:,} examples")
        if self.last is not None:
            lines.append(f"last    {self.last}")
        return "\n".join(lines)


@dataclass(frozen=True)
class Recall:
    """How many of the scan's hits an index has found.

    Attributes:
        helpful: Mean share of the k most helpful that were found.
        harmful: Mean share of the k most harmful that were found.
        k: How many at each end.
        queries: How many queries were asked.
        approximate: Whether approximate answers were asked for.
    """

    helpful: float
    harmful: float
    k: int
    queries: int
    approximate: bool

    def __str__(self) -> str:
        kind = "approximate" if self.approximate else "proven"
        return (
            f"recall@{self.k} of {self.queries} queries, {kind} answers: "
            f"helpful {self.helpful:.4f}, harmful {self.harmful:.4f}"
        )


@dataclass(frozen=True, eq=False)
class _Answered:
    """How a question was answered.

    Attributes:
        queries: How many queries there were.
        k: How many hits at each end.
        how: In words.
        scored: [queries] how many examples were scored exactly for each; None for all.
        why: Why not in another way, in words, if that needs saying.
    """

    queries: int
    k: int
    how: str
    scored: NDArray[np.int64] | None
    why: str = ""

    def text(self, count: int) -> str:
        """All of it, of an index of so many examples."""
        what = f"{self.queries} queries, top {self.k}: {self.how}"
        if self.scored is not None:
            mean = self.scored.mean()
            what += f", {mean:,.1f} of {count:,} examples scored a query ({mean / count:.2%})"
        return f"{what}{self.why}"


class Index:
    """Rows made ready to be asked often: of a store, a `.npy` file or a matrix.

    "certified" keeps a code of 4 and 4 more bits for each coordinate, with what they lose bounded,
    in falling order of norms; an answer is returned when the bounds prove that it is the scan's,
    and rows are read only for what is left. "exact" keeps the rows themselves and scores all of
    them, but those whose norm says that they cannot matter. Both give the same hits, to the bit.

    Args:
        rows: A `whence.Store`, or its path; a `.npy` file; a matrix; or a `whence.Matrix`.
        method: "certified", "exact", or "auto" for what suits the rows; or "hnsw" for codes of 4
            bits with a graph over them, which only an approximate search of the helpful side
            walks, and only where it finds what it should: not with filters that leave less than 15
            percent, nor where the longest row has over twice the median norm, nor for many hits.
        bits: 8 for codes that are soon certain, 4 for half the memory; None for 8, and 4 with a
            graph.
        basis: What codes begin with: "eigen" for the leading eigenvectors of the rows' Gram matrix,
            "rows" for leading coordinates of rows that come in a basis already, "none", or "auto"
            for what the spectrum suggests.
        missing: What to do with an id that lacks a checkpoint: "error", or "drop".
        seed: Of the rotation of codes, and of samples.
        threads: How many threads to build with; None means all processors.

    Raises:
        ArgumentError: If an argument is out of range, or there are no rows.
        IdError: If an id lacks a checkpoint.
        MismatchError: If codes are asked of a store of factors.
        NotFiniteError: If a row is not finite.
        StoreError: If the rows cannot be read.

    O(examples · length · log length) time to build; 1 byte a coordinate (half of that with 4 bits)
    and about 20 an example in memory.

    Examples:
        >>> index = whence.Index("runs/digits")  # doctest: +SKIP
        >>> hits = index.search(rows, k=10)  # doctest: +SKIP
        >>> print(index.explain())  # doctest: +SKIP
    """

    source: Source
    """The rows."""

    method: str
    """What it answers with."""

    _built: kept.Built | None
    _held: Held | None
    _gone: NDArray[np.bool_] | None
    _clusters: dict[int, NDArray[np.int64]]
    _last: _Answered | None
    _lock: threading.Lock

    def __init__(
        self,
        rows: Source | str | os.PathLike[str] | NDArray[Any],
        method: str = "auto",
        *,
        bits: int | None = None,
        basis: str = "auto",
        missing: str = "error",
        seed: int = 0,
        threads: int | None = None,
    ) -> None:
        self._open(opened(rows), _arrays.choice("missing", missing, ("error", "drop")))
        _arrays.choice("method", method, METHODS)
        if bits is None:
            bits = 4 if method == "hnsw" else 8
        if _arrays.integer("bits", bits, 4, 8) not in (4, 8):
            raise ArgumentError(f"bits must be 4 or 8, got {bits}")
        _arrays.choice("basis", basis, BASES)
        self._seed = _arrays.integer("seed", seed, 0, 2**64 - 1)
        threads = _arrays.threads(threads)
        self._why = f"{method!r} was asked for"
        if method == "auto":
            method, self._why = self._suited(len(self))
        self.method = method
        if method == "exact":
            self._held = self.source.held()
        else:
            self._built = self._code(bits, basis, threads)

    def _open(self, source: Source, missing: str) -> None:
        """Takes rows, and knows nothing of them yet."""
        _check(source, missing)
        self.source, self._missing = source, missing
        self._last, self._clusters, self._gone = None, {}, None
        self._built, self._held = None, None
        self._lock = threading.Lock()

    def _suited(self, count: int) -> tuple[str, str]:
        """A method for so many examples, and why."""
        if self.source.places:
            return "exact", "rows are factors, which have no codes"
        if count <= FEW:
            return "exact", f"a scan of {count:,} examples takes less than codes could save"
        return "certified", f"codes of {count:,} examples are read in a fraction of a scan's time"

    def _code(self, bits: int, basis: str, threads: int) -> kept.Built:
        """Codes of all rows, and a graph over them if that is the method."""
        source = self.source
        if source.places:
            raise MismatchError(
                "method must be 'exact' for a store with layout='factored', whose rows are no "
                f"vectors, got {self.method!r}"
            )
        if self.method == "hnsw" and basis == "auto":
            basis = "none"  # codes of one segment lie together, and are fetched at once
        chosen = bases.choose(source, basis, self._seed)
        codes, bounds = _codes(source, 0, chosen, bits, self._seed, threads)
        graph = None
        if self.method == "hnsw":
            graph = _core.Graph(codes, bounds, self._seed, threads)
            codes = graph.codes
        return kept.Built(codes, graph, chosen, bits, self._seed)

    def add(
        self, rows: Source | str | os.PathLike[str] | NDArray[Any], *, threads: int | None = None
    ) -> None:
        """Takes in examples that came after those the index was built of.

        Codes and links of those before stay as they are: what comes is coded in the same basis,
        and linked to what a walk over the graph finds. Proven answers stay the scan's; where the
        rows to come are of another kind, an index that is built anew can be quicker. No other
        thread may search meanwhile.

        Args:
            rows: What the index was built of with more examples at its end, such as the store
                opened again.
            threads: As to build with.

        Raises:
            IdError: If an id lacks a checkpoint.
            MismatchError: If the rows do not begin with those that the index was built of.
            NotFiniteError: If a row is not finite.
            StoreError: If the rows cannot be read.

        O(added · length · log length) time, and that of a copy of the index in memory.
        """
        threads = _arrays.threads(threads)
        source, before = opened(rows), len(self)
        _check(source, self._missing)
        same = len(source.ids) >= before and source.dim == self.source.dim
        if same:
            digest = kept.fingerprint(source, before, source.digest(before, threads))
            same = digest == kept.fingerprint(self.source, before, self._digest(threads))
        if not same:
            raise MismatchError(
                f"rows must begin with those that the index was built of, {self.source!r}, got "
                f"others: {source!r}; where rows were deleted or replaced, build a new index"
            )
        self._grow(source, before, threads)

    def _digest(self, threads: int) -> int:
        """That of the rows that the index was built of."""
        if self._built is not None:
            return self._built.codes.digest
        core, numbers = self._held or (self.source.core, self.source.numbers)
        return core.digest(numbers, len(self), threads)

    def _grow(self, source: Source, before: int, threads: int) -> None:
        """Takes in what follows the index's examples, the first `before` of the source's."""
        built, gone = self._built, self._gone
        held = None if self._held is None else source.held()
        if built is not None and len(source.ids) > before:
            codes, bounds = _codes(source, before, built.basis, built.bits, built.seed, threads)
            if built.graph is None:
                built = replace(built, codes=built.codes.appended(codes))
            else:
                graph = built.graph.grown(codes, bounds, built.seed, threads)
                built = replace(built, codes=graph.codes, graph=graph)
        self.source, self._held, self._built = source, held, built
        self._last, self._clusters = None, {}
        if gone is not None:
            self._gone = np.concatenate([gone, np.zeros(len(source.ids) - before, np.bool_)])

    def delete(self, ids: Any) -> None:
        """Takes examples out of all answers to come. Rows, codes and links stay where they are.

        Args:
            ids: Of the examples.

        Raises:
            IdError: If an id is not there; none is deleted then.
            ShapeError: If there are no ids.
        """
        places = self.source.positions("ids", _arrays.ids("ids", ids))
        with self._lock:  # of two that delete at once, neither forgets what the other did
            gone = np.zeros(len(self), np.bool_) if self._gone is None else self._gone.copy()
            gone[places] = True
            self._gone = gone

    def __len__(self) -> int:
        return len(self.source.ids)

    def __repr__(self) -> str:
        return f"<whence index, {self.method}, of {self.source!r}>"

    def search(
        self,
        queries: Any,
        k: int = 10,
        *,
        where: Any = None,
        exclude: Sequence[Sequence[Any]] | None = None,
        side: str = "both",
        approximate: bool = False,
        ef: int | None = None,
        diverse: int | None = None,
        threads: int | None = None,
    ) -> Hits:
        """The k most helpful and the k most harmful examples of each query row.

        The hits are those of `Store.search`, to the bit, unless `approximate` is asked for.

        Args:
            queries: As in `Store.search`.
            k: How many to return at each end, up to all.
            where: As in `Store.search`.
            exclude: As in `Store.search`.
            side: As in `Store.search`.
            approximate: Score only the best candidates by codes of 4 bits, `2.5 k` of them at each
                end, and leave out the proof; `Hits.margins` says how clear the answer is.
            ef: How many nodes a walk over a graph keeps in sight: more find more, and take longer.
                At least k counts; None for four times k, and at least 40. For an approximate
                search of an index with a graph only.
            diverse: Into how many clusters the rows are cut for an answer that has examples of all
                that the query has to do with, instead of many of a kind; None for the plain answer.
                The first question for so many cuts them: O(examples · length · diverse).
            threads: As in `Store.search`.

        Returns:
            Hits; `Hits.exact` says of each query whether its answer is proven. O(examples · length)
            operations on codes at most, and a few rows read for each hit.

        Raises:
            WhenceError: As `Store.search`.
        """
        return self.find(
            self.source.query_rows(queries),
            k,
            where=where,
            exclude=exclude,
            side=side,
            approximate=approximate,
            ef=ef,
            diverse=diverse,
            threads=threads,
        )

    def find(
        self,
        rows: NDArray[np.float32],
        k: int = 10,
        *,
        where: Any = None,
        exclude: Sequence[Sequence[Any]] | None = None,
        missing: str = "error",
        side: str = "both",
        approximate: bool = False,
        ef: int | None = None,
        diverse: int | None = None,
        threads: int | None = None,
    ) -> Hits:
        """As `search`, for [checkpoints, queries, width] rows that `whence.query` made.

        `missing` as in `Store.search`; an index with missing="drop" drops whatever it says.

        Raises:
            WhenceError: As `search`.
        """
        asked = self.source.ask(
            rows,
            k,
            where=where,
            exclude=exclude,
            missing="drop" if self._missing == "drop" else missing,
            side=side,
            threads=threads,
            gone=self._gone,
        )
        approximate = _arrays.boolean("approximate", approximate)
        if ef is not None:
            ef = min(_arrays.integer("ef", ef, 1), len(self))
            if self.method != "hnsw" or not approximate:
                raise ArgumentError(
                    "ef must be None but for approximate answers of an index with "
                    f"method='hnsw', got {ef}"
                )
        if diverse is None:
            return self._answer(asked, approximate, ef)
        clusters = self._clustered(_arrays.integer("diverse", diverse, 2, len(self)))
        return mixtures.search(
            asked, clusters, lambda question: self._answer(question, approximate, ef)
        )

    def knn_query(
        self,
        queries: Any,
        k: int = 1,
        *,
        filter: Any = None,
        num_threads: int | None = None,
    ) -> tuple[NDArray[Any], NDArray[np.float32]]:
        """Ids and scores of the k largest inner products, called as hnswlib's `knn_query` is.

        Unlike there, the second array has scores, largest first, and not distances; and `filter` is
        what `where` is in `search`.

        Returns:
            [queries, k] ids, and [queries, k] float32 scores.

        Raises:
            WhenceError: As `search`.
        """
        hits = self.search(queries, k, where=filter, side="helpful", threads=num_threads)
        return hits.helpful.ids, hits.helpful.scores

    def explain(self) -> Explanation:
        """What was built and why, and how the last question was answered."""
        last, scored, count = None, None, len(self)
        if self._last is not None:
            last, scored = self._last.text(count), self._last.scored
            if scored is None:
                scored = np.full(self._last.queries, count)
        built = "rows as they are stored, in memory" if self._built is None else str(self._built)
        deleted = 0 if self._gone is None else int(self._gone.sum())
        return Explanation(self.method, built, self._why, self.bytes, count, deleted, last, scored)

    @property
    def bytes(self) -> int:
        """Bytes kept in memory for searching: codes or rows, scales and numbers of rows."""
        if self._held is not None:
            core, numbers = self._held
            own = core.bytes
        else:
            numbers, own = self.source.numbers, self.source.core.bytes
        if self._built is not None:
            own += (self._built.graph or self._built.codes).bytes
        return own + (0 if numbers is None else numbers.nbytes)

    def recall(
        self,
        sample: int = 200,
        k: int = 10,
        *,
        queries: Any = None,
        approximate: bool = False,
        threads: int | None = None,
    ) -> Recall:
        """How many of the hits of a scan of all examples this index finds.

        Args:
            sample: How many queries to ask.
            k: How many hits at each end.
            queries: Query rows to draw them from; None for rows of the index itself.
            approximate: Whether to ask for approximate answers.
            threads: As in `search`.

        Returns:
            The recall at either end. O(sample) scans.

        Raises:
            WhenceError: As `search`.
        """
        sample = _arrays.integer("sample", sample, 1)
        random = np.random.default_rng(self._seed)
        if queries is None:
            if self.source.places:
                raise MismatchError(
                    "queries must be given for a store with layout='factored', got None"
                )
            there = np.arange(len(self))
            if self.source.incomplete is not None:
                there = there[~self.source.incomplete]
            rows = self.source.rows_at(np.sort(random.permutation(there)[:sample]))
        else:
            rows = self.source.query_rows(queries)
            rows = rows[:, np.sort(random.permutation(rows.shape[1])[:sample])]
        asked = self.source.ask(rows, k, missing=self._missing, threads=threads, gone=self._gone)
        last = self._last
        found, wanted = self._answer(asked, approximate), self.source.scan(asked)
        self._last = last

        def share(want: Side, got: Side) -> float:
            pairs = zip(want.positions, got.positions, strict=True)
            return float(np.mean([np.isin(one, other).mean() for one, other in pairs]))

        helpful, harmful = (
            share(wanted.helpful, found.helpful),
            share(wanted.harmful, found.harmful),
        )
        return Recall(helpful, harmful, asked.k, rows.shape[1], approximate)

    def vectors(self) -> NDArray[np.float32]:
        """[examples, checkpoints · dim] rows whose inner products with query rows are the scores.

        The rows of all checkpoints side by side, each times its weight; a query is its own rows
        side by side. Those of deleted examples are left out. All in memory: for other libraries,
        and for checking.

        Raises:
            IdError: If an id lacks a checkpoint.
            MismatchError: If the source holds factors.
        """
        if self.source.places:
            raise MismatchError("rows must be vectors, got a store with layout='factored'")
        self.source.row_numbers()  # raises if a row is missing
        return self.source.side_by_side(self._left())

    def _left(self) -> NDArray[np.int64]:
        """The examples that were not deleted."""
        return np.arange(len(self)) if self._gone is None else np.flatnonzero(~self._gone)

    def to_faiss(self) -> Any:
        """A `faiss.IndexFlatIP` of `vectors()`, under the ids if they are integers.

        Raises:
            MissingDependencyError: If faiss is not installed.
            WhenceError: As `vectors`.
        """
        faiss = imported("faiss", "to_faiss", "faiss-cpu")
        vectors = self.vectors()
        index = faiss.IndexFlatIP(vectors.shape[1])
        ids = self.source.ids[self._left()]
        if ids.dtype.kind != "i":
            index.add(vectors)
            return index
        named = faiss.IndexIDMap2(index)
        named.add_with_ids(vectors, ids)
        return named

    def to_hnswlib(self, *, M: int = 16, ef_construction: int = 200) -> Any:
        """An `hnswlib.Index` of `vectors()` by inner product, under the ids if they are integers.

        Its graph is built for the largest scores only, and misses some of those; see `search`.

        Args:
            M: As there.
            ef_construction: As there.

        Raises:
            MissingDependencyError: If hnswlib is not installed.
            WhenceError: As `vectors`.
        """
        hnswlib = imported("hnswlib", "to_hnswlib", "hnswlib")
        vectors = self.vectors()
        index = hnswlib.Index(space="ip", dim=vectors.shape[1])
        index.init_index(max_elements=len(vectors), M=M, ef_construction=ef_construction)
        ids = self.source.ids[self._left()]
        labels = ids if ids.dtype.kind == "i" else np.arange(len(vectors))
        index.add_items(vectors, labels)
        return index

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Writes codes and graph into a new folder: `.npy` files and a manifest with checksums.

        Rows, ids and columns stay where they are; `load` asks for them again.

        Returns:
            The path.

        Raises:
            ArgumentError: If the index has no codes, or something is at the path.
            StoreError: If it cannot be written.
        """
        if self._built is None:
            raise ArgumentError(
                "method must be 'certified' or 'hnsw' for an index to be saved, got "
                f"{self.method!r}, which has nothing that is not in its rows"
            )
        return kept.save(_arrays.path("path", path), self.source, self._built, self._gone)

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        rows: Source | str | os.PathLike[str] | NDArray[Any],
        *,
        missing: str = "error",
        threads: int | None = None,
    ) -> Index:
        """The index that was saved at a path.

        Args:
            path: The folder.
            rows: What it was built of; what came after those is added, as by `add`.
            missing: As when it was built.
            threads: As to build with.

        Raises:
            StoreError: If there is no index, or it is damaged.
            MismatchError: If it is of other rows.
        """
        index = cls.__new__(cls)
        index._open(opened(rows), _arrays.choice("missing", missing, ("error", "drop")))
        threads = _arrays.threads(threads)
        source = index.source
        built, index._gone, count = kept.load(_arrays.path("path", path), source, threads)
        index._built, index._seed = built, built.seed
        index.method = "certified" if built.graph is None else "hnsw"
        index._why = "it was saved so"
        if count < len(source.ids):
            index._grow(source, count, threads)
        return index

    def _answer(self, asked: Question, approximate: bool, ef: int | None = None) -> Hits:
        """The answer to a question, and how it came about."""
        if self._built is None or asked.k * DEEP > len(self):
            hits = self.source.scan(asked, self._held)
            why = "no codes were built" if self._built is None else f"k is above 1 / {DEEP} of all"
            self._last = _Answered(len(asked.eligible), asked.k, f"a scan, for {why}", None)
            return hits
        codes, graph = self._built.codes, self._built.graph
        if graph is None:
            return self._answer_by_codes(codes, asked, approximate, "")
        against = self._against_graph(graph, asked, approximate)
        if not against:
            return self._walk(graph, asked, ef)
        return self._answer_by_codes(codes, asked, approximate, against)

    def _answer_by_codes(
        self, codes: _core.Codes, asked: Question, approximate: bool, why: str
    ) -> Hits:
        """The answer of a scan of the codes, and why it was asked of them."""
        candidates = math.ceil(CANDIDATES * asked.k) if approximate else None
        largest, smallest, counts, margins = codes.search(
            self.source.core,
            self.source.numbers,
            asked.rows,
            asked.k,
            asked.sides,
            asked.keep,
            asked.excluded,
            candidates,
            asked.threads,
        )
        how = "proven by the bounds of codes" if candidates is None else "approximate"
        self._last = _Answered(len(asked.eligible), asked.k, how, counts.astype(np.int64), why)
        given = None if candidates is None else margins
        return self.source.hits(asked, (largest, smallest), margins=given)

    def _against_graph(self, graph: _core.Graph, asked: Question, approximate: bool) -> str:
        """Why the graph is not walked for a question; nothing if it is."""
        share = 1.0 if asked.keep is None else float(asked.keep.mean())
        if not approximate:
            return "; the graph proves nothing, and was not walked"
        if asked.sides[1]:
            return "; the graph has no links to the harmful side, and was not walked"
        if graph.norm_spread > SPREAD:
            return (
                "; the graph is of directions, and the longest row has "
                f"{graph.norm_spread:,.1f} times the median norm: it was not walked"
            )
        if share < SELECTIVE:
            return f"; the filter leaves {share:.0%}, and the graph was not walked"
        if len(self) <= FEW:
            return "; there are few examples, and the graph was not walked"
        return ""

    def _walk(self, graph: _core.Graph, asked: Question, ef: int | None) -> Hits:
        """The answer of a walk over the graph."""
        width = max(10 * WALK, WALK * asked.k) if ef is None else max(ef, asked.k)
        candidates = min(width, max(math.ceil(WALKED * asked.k), width // DEEPER))
        largest, smallest, counts, margins = graph.search(
            self.source.core,
            self.source.numbers,
            asked.rows,
            asked.k,
            width,
            asked.keep,
            asked.excluded,
            candidates,
            asked.threads,
        )
        if largest[0].shape[1] < asked.k:  # a walk that came to too few: a scan of the codes
            why = "; a walk over the graph came to too few"
            return self._answer_by_codes(graph.codes, asked, True, why)
        how = "approximate, a walk over the graph"
        self._last = _Answered(len(asked.eligible), asked.k, how, counts.astype(np.int64))
        return self.source.hits(asked, (largest, smallest), margins=margins)

    def _clustered(self, count: int) -> NDArray[np.int64]:
        """[examples] the cluster of each."""
        if count not in self._clusters:
            self._clusters[count] = mixtures.clusters(self.source, count, self._seed)
        return self._clusters[count]


def _check(source: Source, missing: str) -> None:
    """Nothing, if an index can be built of the rows.

    Raises:
        ArgumentError: If there are none.
        IdError: If an id lacks a checkpoint, and `missing` is "error".
    """
    if not len(source.ids):
        raise ArgumentError(f"rows must have at least one, got none in {source!r}")
    if missing == "error" and source.incomplete is not None:
        source.row_numbers()  # raises, and says which


def _codes(
    source: Source, first: int, basis: bases.Basis, bits: int, seed: int, threads: int
) -> tuple[_core.Codes, NDArray[np.float32]]:
    """Codes of a source's examples from `first` on, and what bounds their norms.

    Raises:
        NotFiniteError: If a row is not finite.
    """
    weights, _ = source.weights()
    if (weights < np.finfo(np.float32).tiny).any():
        raise MismatchError(f"learning rates must be at least 1.2e-38 for codes, got {weights}")
    bounds = source.bounds(weights)
    if bounds is None:
        raise MismatchError(f"rows must have norms that bound scores, got {source!r}")
    numbers = source.numbers if first == 0 else source.numbers_of(np.arange(first, len(bounds)))
    codes = _core.Codes(
        source.core,
        numbers,
        weights.tolist(),
        bounds[first:],
        basis.prefix,
        basis.directions,
        seed,
        bits,
        threads,
    )
    return codes, bounds[first:]


def opened(rows: Source | str | os.PathLike[str] | NDArray[Any]) -> Source:
    """What a caller means by rows: a store's folder, a `.npy` file, a matrix, or one of those open.

    Raises:
        WhenceError: As `Store` and `Matrix`.
    """
    if isinstance(rows, Source):
        return rows
    if isinstance(rows, (str, os.PathLike)) and _arrays.path("rows", rows).suffix != ".npy":
        return Store(rows)
    return Matrix(rows)
