"""Graphs of nearest neighbours by code or by distance, and groups of near duplicates."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from whence import _arrays, _core
from whence.errors import ArgumentError, DtypeError, ShapeError
from whence.hashing.families import PStableHash, SignHash, rows_of


@dataclass(frozen=True, eq=False)
class Graph:
    """The neighbours of each row, most similar first, as compressed sparse rows.

    Attributes:
        starts: [rows + 1] int64: those of row i lie from starts[i] to starts[i + 1].
        neighbours: [edges] int64 rows, of equal weights the lower first.
        weights: [edges] float32 similarities from 0 to 1.

    Raises:
        DtypeError: If an array is of another type.
        ShapeError: If lists do not begin at 0, follow each other, and end with the edges.
        ArgumentError: If a neighbour is no row.
        NotFiniteError: If a weight is NaN or infinite.
    """

    starts: NDArray[np.int64]
    neighbours: NDArray[np.int64]
    weights: NDArray[np.float32]

    def __post_init__(self) -> None:
        for name, dtype in (("starts", "int64"), ("neighbours", "int64"), ("weights", "float32")):
            array = getattr(self, name)
            if not isinstance(array, np.ndarray) or array.dtype != dtype or array.ndim != 1:
                got = _arrays.describe(array)
                raise DtypeError(f"{name} must be one-dimensional {dtype}, got {got}")
        edges = len(self.neighbours)
        ends = self.starts[[0, -1]].tolist() if len(self.starts) else []
        if ends != [0, edges] or (self.starts[1:] < self.starts[:-1]).any():
            raise ShapeError(f"starts must rise from 0 to {edges}, got {self.starts}")
        if len(self.weights) != edges:
            raise ShapeError(
                f"weights must be one for each of {edges} edges, got {len(self.weights)}"
            )
        wrong = self.neighbours[(self.neighbours < 0) | (self.neighbours >= len(self))]
        if wrong.size:
            raise ArgumentError(f"neighbours must be below {len(self)}, got {wrong[0]}")
        _arrays.finite("weights", self.weights)

    def __len__(self) -> int:
        return len(self.starts) - 1

    @property
    def targets(self) -> NDArray[np.int64]:
        """[edges] int64: the row whose neighbour each is."""
        return np.repeat(np.arange(len(self)), self.starts[1:] - self.starts[:-1])

    @property
    def edges(self) -> NDArray[np.int64]:
        """[edges, 2] int64: each row with each of its neighbours."""
        return np.stack([self.targets, self.neighbours], axis=1)


def check_graph(graph: Any) -> None:
    """Nothing, if it is a graph.

    Raises:
        DtypeError: If it is not.
    """
    if not isinstance(graph, Graph):
        raise DtypeError(f"graph must be a whence.hashing.Graph, got {_arrays.describe(graph)}")


def hash_graph(
    rows: Any,
    *,
    hashes: int = 16,
    width: float = 8.0,
    levels: int = 1,
    views: int = 1,
    features: int | None = None,
    band: int = 4,
    cap: int = 256,
    k: int = 10,
    seed: int = 0,
    threads: int | None = None,
) -> Graph:
    """The k rows most similar to each by p-stable codes, among those that share a bucket with it.

    The similarity is the mean over views of `Σ_l 2^-l m_l / Σ_l 2^-l`, m_l the share of a view's
    hashes whose cells, of width `width · 2**l`, both rows share. With one level and one view it is
    m_0. After the abstract of "Scalable Graph Attention-based Instance Selection via Mini-Batch
    Sampling and Hierarchical Hashing" (arXiv 2502.20293), which has single-level, multi-level and
    multi-view hashing; its formulas are not public, these are ours.

    Args:
        rows: [rows, dim] float32, features of comparable scale.
        hashes: How many hashes a view has.
        width: Width of a cell at level 0, in units of the rows.
        levels: How many levels count.
        views: How many views there are, each of hashes and features of its own.
        features: How many features, drawn at random, a view sees. None means all for one view and
            half of them for several.
        band: How many hashes are the key of a bucket; each `band` hashes in order make a table at
            each level.
        cap: How many pairs to take from a bucket, at random if it has more; at most 65,536.
        k: How many neighbours to keep.
        seed: 0 to 2**64 - 1.
        threads: How many threads to use; None means all processors.

    Returns:
        A graph in which a row that shares no bucket has no neighbours, and none its own.
        O(rows · views · hashes · features) time, O(views · levels · hashes) for each pair, and
        O(pairs) memory.

    Raises:
        ArgumentError: If an argument is out of range.
        DtypeError: If rows are not float32, or an argument is no number.
        ShapeError: If rows are not [rows, dim], at least one of each.
        NotFiniteError: If rows hold a NaN or an infinity, or a projection overflows.
    """
    rows = rows_of("rows", rows)
    views = _arrays.integer("views", views, 1, _core.MAX_VIEWS)
    dim = rows.shape[1]
    if features is None:
        features = dim if views == 1 else max(1, dim // 2)
    features = _arrays.integer("features", features, 1, dim)
    families = [
        PStableHash(hashes, width=width, levels=levels, seed=seed, view=view, threads=threads)
        for view in range(views)
    ]
    band = _arrays.integer("band", band, 1, families[0].hashes)
    cap = _arrays.integer("cap", cap, 1, _core.MAX_PAIRS)
    k = min(_arrays.integer("k", k, 1), len(rows))
    codes = []
    for view, family in enumerate(families):
        seen = np.sort(_core.shuffled(np.arange(dim), seed, f"hash.view.{view}")[:features])
        codes.append(family.codes(np.ascontiguousarray(rows[:, seen])))
    starts, neighbours, weights = _core.graph_by_codes(
        codes, levels, band, cap, k, seed, _arrays.threads(threads)
    )
    return Graph(starts.astype(np.int64), neighbours.astype(np.int64), weights)


def distance_graph(
    rows: Any,
    batches: Sequence[Any],
    *,
    k: int | None = 10,
    threshold: float | None = None,
    threads: int | None = None,
) -> Graph:
    """The rows nearest to each within its batch, exactly.

    The similarity is `exp(-|x - y|² / 2σ²)`, σ the median distance of the batch's pairs; where that
    is 0 it is 1 for equal rows and 0 for others.

    Args:
        rows: [rows, dim] float32.
        batches: Lists of rows that together hold every row once, at most 8,192 each, as
            `stratified_batches` makes them.
        k: How many neighbours to keep; None means all that `threshold` lets pass.
        threshold: The least similarity of a neighbour, above 0 and at most 1; None means any.
        threads: How many threads to use; None means all processors.

    Returns:
        The graph. O(rows · batch · dim) time and O(batch²) memory for each thread.

    Raises:
        ArgumentError: If an argument is out of range, batches do not hold every row once, or both
            k and threshold are None.
        DtypeError: If rows are not float32, batches not integers, or an argument no number.
        ShapeError: If rows are not [rows, dim], at least one of each.
        NotFiniteError: If rows hold a NaN or an infinity, or a distance overflows.
    """
    rows = rows_of("rows", rows)
    if k is None and threshold is None:
        raise ArgumentError("k must be an integer where threshold is None, got None")
    k = len(rows) if k is None else min(_arrays.integer("k", k, 1), len(rows))
    radius = math.inf
    if threshold is not None:
        threshold = _arrays.number("threshold", threshold, positive=True)
        if threshold > 1:
            raise ArgumentError(f"threshold must be at most 1, got {threshold}")
        radius = math.sqrt(-2 * math.log(threshold))
    if not _arrays.is_list(batches):
        raise ShapeError(f"batches must be lists of rows, got {_arrays.describe(batches)}")
    lists = [_batch(f"batches[{number}]", batch, len(rows)) for number, batch in enumerate(batches)]
    (ends, neighbours, squares), medians = _core.graph_within_batches(
        rows, [batch.tolist() for batch in lists], k, radius, _arrays.threads(threads)
    )
    scale = np.zeros(len(rows))
    for batch, median in zip(lists, medians, strict=True):
        scale[batch] = 2 * median**2
    starts = ends.astype(np.int64)
    scale = np.repeat(scale, starts[1:] - starts[:-1])
    # Any positive scale makes 1 of a distance of 0.
    ratio = np.divide(squares, scale, out=np.where(squares > 0, np.inf, 0.0), where=scale > 0)
    weights = np.exp(-ratio).astype(np.float32)
    return Graph(starts, neighbours.astype(np.int64), weights)


def near_duplicates(
    rows: Any,
    *,
    threshold: float = 0.95,
    hashes: int = 256,
    band: int = 16,
    cap: int = 256,
    seed: int = 0,
    threads: int | None = None,
) -> NDArray[np.int64]:
    """For each row the lowest number in its group of near duplicates; its own if it has none.

    Groups are the connected components of pairs whose cosine is at least `threshold`, among those
    that share a bucket of `band` signs. Cosines are exact, so no pair is made up; a pair at the
    angle t is compared with probability `1 - (1 - (1 - t/π)^band)^(hashes // band)`, 0.96 for the
    defaults and a cosine of 0.95, less in buckets of more than `cap` pairs. Equal rows
    are always together. The cosine of two rows of zeros is 1, of one and another row 0.

    Args:
        rows: [rows, dim] float32.
        threshold: The least cosine, above 0 and at most 1.
        hashes: How many bits the codes have.
        band: How many bits are the key of a bucket, at most 64; fewer compare more pairs.
        cap: How many pairs to compare of a bucket, at random if it has more; at most 65,536.
        seed: 0 to 2**64 - 1.
        threads: How many threads to use; None means all processors.

    Returns:
        [rows] int64. O(pairs · dim) time and O(pairs) memory.

    Raises:
        ArgumentError: If an argument is out of range.
        DtypeError: If rows are not float32, or an argument is no number.
        ShapeError: If rows are not [rows, dim], at least one of each.
        NotFiniteError: If rows hold a NaN or an infinity, or a product overflows.
    """
    rows = rows_of("rows", rows)
    family = SignHash(hashes, seed=seed)
    threshold = _arrays.number("threshold", threshold, positive=True)
    if threshold > 1:
        raise ArgumentError(f"threshold must be at most 1, got {threshold}")
    band = _arrays.integer("band", band, 1, min(64, family.hashes))
    cap = _arrays.integer("cap", cap, 1, _core.MAX_PAIRS)
    core = family.core(rows.shape[1])
    groups = _core.duplicate_groups(
        core, rows, band, threshold, cap, seed, _arrays.threads(threads)
    )
    return groups.astype(np.int64)


def _batch(name: str, value: Any, rows: int) -> NDArray[np.int64]:
    """`value` as a list of numbers of rows.

    Raises:
        DtypeError: If they are not integers.
        ArgumentError: If a row is not there, or there are none, or too many.
        ShapeError: If they are lists of several lengths.
    """
    array = _arrays.array(name, value)
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise DtypeError(f"{name} must be a list of integers, got {_arrays.describe(array)}")
    if not 1 <= len(array) <= _core.MAX_BATCH:
        raise ArgumentError(f"{name} must have 1 to {_core.MAX_BATCH} rows, got {len(array)}")
    wrong = array[(array < 0) | (array >= rows)]
    if wrong.size:
        raise ArgumentError(f"{name} must be rows from 0 to {rows - 1}, got {wrong[0]}")
    return array.astype(np.int64)
