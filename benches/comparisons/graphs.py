"""Graph indexes of the helpful side: speed at equal recall, and the time to build."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

import whence
from comparisons.gradients import Rows
from comparisons.shared import Curve, Row, Times, compared_rates, peer, recall_of, take_turns

K = 10
TARGETS = (0.985, 0.995)
WIDTHS = (10, 12, 14, 16, 20, 24, 28, 32, 40, 50, 64, 80, 120, 200, 400)
"""How many nodes a search keeps in sight: `ef`."""

ENOUGH = 0.999
"""The recall from which on no larger ef is tried."""


@dataclass(frozen=True)
class Built:
    """A graph that has been built.

    Attributes:
        seconds: How long that took.
        search: Queries and ef -> [queries, K] numbers of rows.
        bytes: What it keeps in memory, if that is known.
    """

    seconds: float
    search: Callable[[NDArray[np.float32], int], NDArray[Any]]
    bytes: int = 0


def rows(name: str, data: Rows) -> Iterator[Row | Curve]:
    """Each library's graph, 16 links a node and 32 on the lowest level, construction width 200."""
    vectors, queries = data.rows, data.queries
    wanted = np.argsort(-(queries @ vectors.T), axis=1, kind="stable")[:, :K]
    builders: dict[str, Callable[[NDArray[np.float32]], Built | None]] = {
        "hnswlib": _hnswlib,
        "faiss HNSW": _faiss,
        "usearch": _usearch,
        "voyager": _voyager,
    }
    ours = _ours(data)
    theirs = {each: built for each, make in builders.items() if (built := make(vectors))}
    tried = {
        each: _tried(built, queries, wanted) for each, built in {"ours": ours, **theirs}.items()
    }
    for each, points in tried.items():
        label = "whence, graph" if each == "ours" else each
        yield Curve(f"graph, {name}", label, [(recall, rate) for _, recall, rate in points])
    for target in TARGETS:
        able = {}
        for each, points in tried.items():
            reached = [(width, recall) for width, recall, _ in points if recall >= target]
            if reached:
                able[each] = reached[0]
            else:
                most = max(recall for _, recall, _ in points)
                print(f"{each} reaches recall {most:.4f} of {target} on {name}")
        if "ours" not in able:
            most = max(recall for _, recall, _ in tried["ours"])
            yield Row(f"graph, {name}: recall@{K}", most, target, "found", 1.0, False)
            continue
        actions: dict[str, Callable[[], object]] = {
            each: lambda built=built, width=able[each][0]: built.search(queries, width)
            for each, built in {"ours": ours, **theirs}.items()
            if each in able
        }
        times = take_turns(actions)
        best = min((each for each in times if each != "ours"), key=lambda each: times[each].median)
        said = ", ".join(
            f"{each} ef {width} {recall:.4f}" for each, (width, recall) in able.items()
        )
        yield compared_rates(
            f"graph, {name}, recall@{K} {target} ÷ the best of the others: {best}",
            times["ours"],
            times[best],
            3,
            unit="queries/s",
            amounts=(len(queries), len(queries)),
            note=said,
        )
    whole = 4.0 * vectors.shape[1]
    yield Row(
        f"graph, {name}: memory for each row of 512, rows on disk ÷ float32 rows",
        ours.bytes / len(vectors),
        whole,
        "bytes",
        420 / whole,
    )
    if "hnswlib" in theirs:
        yield compared_rates(
            f"graph, {name}: building ÷ hnswlib",
            Times([1e3 * ours.seconds]),
            Times([1e3 * theirs["hnswlib"].seconds]),
            5,
            unit="rows/s",
            amounts=(len(vectors), len(vectors)),
        )


def _tried(
    built: Built, queries: NDArray[np.float32], wanted: NDArray[np.int64]
) -> list[tuple[int, float, float]]:
    """Every ef, its recall, and queries a second, until nearly all is found."""
    points = []
    for width in WIDTHS:
        times = []
        for _ in range(3):
            start = time.perf_counter()
            found = built.search(queries, width)
            times.append(time.perf_counter() - start)
        points.append((width, recall_of(found, wanted), len(queries) / min(times)))
        if points[-1][1] >= ENOUGH:
            break
    return points


def _ours(data: Rows) -> Built:
    start = time.perf_counter()
    index = whence.Index(data.path, "hnsw", threads=1)
    seconds = time.perf_counter() - start
    return Built(
        seconds,
        lambda queries, width: (
            index.search(
                queries, K, side="helpful", approximate=True, ef=width, threads=1
            ).helpful.positions
        ),
        index.bytes,
    )


def _hnswlib(vectors: NDArray[np.float32]) -> Built | None:
    hnswlib = peer("hnswlib")
    if hnswlib is None:
        return None
    start = time.perf_counter()
    index = hnswlib.Index(space="ip", dim=vectors.shape[1])
    index.init_index(len(vectors), M=16, ef_construction=200, random_seed=0)
    index.add_items(vectors, num_threads=1)
    seconds = time.perf_counter() - start

    def search(queries: NDArray[np.float32], width: int) -> NDArray[Any]:
        index.set_ef(width)
        return index.knn_query(queries, K, num_threads=1)[0]

    return Built(seconds, search)


def _faiss(vectors: NDArray[np.float32]) -> Built | None:
    faiss = peer("faiss")
    if faiss is None:
        return None
    faiss.omp_set_num_threads(1)
    start = time.perf_counter()
    index = faiss.IndexHNSWFlat(vectors.shape[1], 16, faiss.METRIC_INNER_PRODUCT)
    index.hnsw.efConstruction = 200
    index.add(vectors)
    seconds = time.perf_counter() - start

    def search(queries: NDArray[np.float32], width: int) -> NDArray[Any]:
        index.hnsw.efSearch = width
        return index.search(queries, K)[1]

    return Built(seconds, search)


def _usearch(vectors: NDArray[np.float32]) -> Built | None:
    usearch = peer("usearch.index")
    if usearch is None:
        return None
    start = time.perf_counter()
    index = usearch.Index(
        ndim=vectors.shape[1], metric="ip", dtype="f32", connectivity=16, expansion_add=200
    )
    index.add(np.arange(len(vectors)), vectors, threads=1)
    seconds = time.perf_counter() - start

    def search(queries: NDArray[np.float32], width: int) -> NDArray[Any]:
        index.expansion_search = width
        return index.search(queries, K, threads=1).keys

    return Built(seconds, search)


def _voyager(vectors: NDArray[np.float32]) -> Built | None:
    voyager = peer("voyager")
    if voyager is None:
        return None
    start = time.perf_counter()
    index = voyager.Index(
        voyager.Space.InnerProduct, vectors.shape[1], M=16, ef_construction=200, random_seed=1
    )
    index.add_items(vectors, num_threads=1)
    seconds = time.perf_counter() - start

    def search(queries: NDArray[np.float32], width: int) -> NDArray[Any]:
        return index.query(queries, K, num_threads=1, query_ef=width)[0]

    return Built(seconds, search)
