"""Searching sketched gradients: speed beside what is found."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

import whence
from comparisons import gradients, graphs, growth, scan
from comparisons.shared import (
    Curve,
    Row,
    bench,
    compared_rates,
    fastest,
    flat_index,
    peer,
    recall_of,
    take_turns,
)
from whence.hashing import HashIndex, SignHash

K = 10
QUERIES = 200
BITS = 256
LIBRARIES = ("numpy", "torch")
CANDIDATES = (10, 20, 50, 100, 200, 500, 1000)

DATA = Path(os.environ.get("WHENCE_DATA", "../shared/data"))
IMAGES, TEXT = DATA / "fashion_mnist_full.npz", DATA / "tinyshakespeare.txt"

Found = NDArray[np.int64]
"""[queries, K] numbers of rows."""


@bench
def search(folder: Path) -> Iterator[Row | Curve]:
    """Exact and approximate answers beside faiss, numpy, torch and graph indexes."""
    yield from scan.rows(folder)
    if IMAGES.exists():
        yield from _images(gradients.fashion(IMAGES, folder))
    else:
        print(f"skipped: rows of Fashion-MNIST, for there is no {IMAGES}")
    if TEXT.exists():
        for name, data in gradients.shakespeare(TEXT, folder).items():
            yield from growth.rows(name, data, folder)
    else:
        print(f"skipped: a million rows of text, for there is no {TEXT}")


def _images(sets: dict[str, gradients.Rows]) -> Iterator[Row | Curve]:
    for name, promised in (
        ("raw", True),
        ("raw, preconditioned", True),
        ("margin, preconditioned", False),
    ):
        yield from _exact(name, sets[name], promised=promised)
    for name, goal in (
        ("raw", 30),
        ("raw, preconditioned", 3.4),
        ("margin", None),
        ("margin, preconditioned", 3.4),
    ):
        yield from _one(name, sets[name], goal)
    yield from _proven_ends("learnt basis", sets["learnt basis"])
    for name in ("raw, preconditioned", "margin, preconditioned"):
        yield from _ends(name, sets[name])
    for name in ("margin", "margin, preconditioned"):
        yield from _hashing(name, sets[name])
        yield from graphs.rows(name, sets[name])
    yield from _memory(sets["raw, preconditioned"])


def _exact(name: str, data: gradients.Rows, *, promised: bool) -> Iterator[Row]:
    """Batches, one sign, against scans of all rows in memory.

    Nothing is promised of unit rows: no norm says there that a row cannot matter.
    """
    faiss = peer("faiss")
    rows = data.rows
    tensor = torch.from_numpy(rows)
    ours = {
        "exact": whence.Index(rows, "exact", threads=1),
        "certified": whence.Index(data.path, "certified", threads=1),
    }
    for batch in (32, 1024):
        queries = data.queries[:batch]
        theirs: dict[str, Callable[[], Found]] = {
            "numpy": lambda q=queries: _numpy(q, rows),
            "torch": lambda q=queries: _torch(q, tensor),
        }
        if faiss is not None:
            faiss.omp_set_num_threads(1)
            index = flat_index(faiss, rows)
            theirs["faiss Flat"] = lambda q=queries, i=index: i.search(q, K)[1]
        actions: dict[str, Callable[[], Any]] = {
            f"ours {method}": lambda q=queries, i=index: (
                i.search(q, K, side="helpful", threads=1).helpful.ids
            )
            for method, index in ours.items()
        }
        actions |= theirs
        wanted = actions["ours exact"]()
        for each, action in actions.items():
            _agree(f"{each}, {name}", action(), wanted, queries, rows)
        times = take_turns(actions)
        for method in ours:
            mine = times[f"ours {method}"]
            beside = {
                32: {"faiss Flat": (("faiss Flat",), 8), "numpy or torch": (LIBRARIES, 1.8)},
                1024: {"faiss, numpy or torch": (("faiss Flat", *LIBRARIES), 1.3)},
            }
            for other, (names, goal) in beside[batch].items():
                there = [times[each] for each in names if each in times]
                if there:
                    yield compared_rates(
                        f"{method}, {name}, batch {batch} ÷ {other}",
                        mine,
                        fastest(there),
                        goal if promised else None,
                        unit="queries/s",
                        amounts=(batch, batch),
                    )


def _one(name: str, data: gradients.Rows, goal: float | None) -> Iterator[Row]:
    """Proven answers one by one, one sign."""
    faiss = peer("faiss")
    if faiss is None:
        return
    rows, queries = data.rows, data.queries[:QUERIES]
    flat = flat_index(faiss, rows)
    index = whence.Index(data.path, "certified", threads=1)
    actions: dict[str, Callable[[], Any]] = {
        "ours": lambda: [
            index.search(q[None], K, side="helpful", threads=1).helpful.ids for q in queries
        ],
        "faiss": lambda: [flat.search(q[None], K)[1] for q in queries[:20]],
    }
    found = np.concatenate(actions["ours"]())
    _agree(f"certified, {name}", found, flat.search(queries, K)[1], queries, rows)
    index.search(queries, K, side="helpful", threads=1)
    scored = index.explain().scored
    times = take_turns(actions, rounds=(5, 20))
    note = f"recall 1, proven; {0 if scored is None else scored.mean():.1f} rows scored a query"
    yield compared_rates(
        f"certified, {name}, batch 1 ÷ faiss Flat",
        times["ours"],
        times["faiss"],
        goal,
        unit="queries/s",
        amounts=(len(queries), 20),
        note=note,
    )


def _proven_ends(name: str, data: gradients.Rows) -> Iterator[Row]:
    """Both ends, proven, one by one."""
    faiss = peer("faiss")
    if faiss is None:
        return
    rows, queries = data.rows, data.queries[:QUERIES]
    flat = flat_index(faiss, rows)
    index = whence.Index(data.path, "certified", threads=1)
    actions: dict[str, Callable[[], Any]] = {
        "ours": lambda: [index.search(q[None], K, threads=1) for q in queries],
        "faiss": lambda: [
            (flat.search(q[None], K), flat.search(-q[None], K)) for q in queries[:10]
        ],
    }
    hits = index.search(queries, K, threads=1)
    _agree(f"certified, {name}", hits.helpful.ids, flat.search(queries, K)[1], queries, rows)
    _agree(f"certified, {name}", hits.harmful.ids, flat.search(-queries, K)[1], -queries, rows)
    scored = index.explain().scored
    times = take_turns(actions, rounds=(5, 20))
    yield compared_rates(
        f"certified, {name}, both ends, batch 1 ÷ faiss Flat twice",
        times["ours"],
        times["faiss"],
        10,
        unit="queries/s",
        amounts=(len(queries), 10),
        note=f"recall 1, proven; {0 if scored is None else scored.mean():.1f} rows scored a query",
    )


def _ends(name: str, data: gradients.Rows) -> Iterator[Row]:
    """Both ends by codes of 4 bits, and what they find."""
    faiss = peer("faiss")
    if faiss is None:
        return
    rows, queries = data.rows, data.queries[:QUERIES]
    flat = flat_index(faiss, rows)
    index = whence.Index(data.path, "certified", bits=4, threads=1)
    actions: dict[str, Callable[[], Any]] = {
        "ours": lambda: [index.search(q[None], K, approximate=True, threads=1) for q in queries],
        "faiss": lambda: [
            (flat.search(q[None], K), flat.search(-q[None], K)) for q in queries[:10]
        ],
    }
    for k in (K, 100):
        recall = index.recall(len(queries), k, queries=queries, approximate=True)
        for side, found in (("helpful", recall.helpful), ("harmful", recall.harmful)):
            yield Row(
                f"4 bits and rescoring, {name}: recall@{k}, {side}",
                found,
                1.0,
                "of the scan's",
                0.999,
                lower_is_better=False,
            )
    actions["ours"]()
    times = take_turns(actions, rounds=(5, 20))
    yield compared_rates(
        f"4 bits and rescoring, {name}, both ends, batch 1 ÷ faiss Flat twice",
        times["ours"],
        times["faiss"],
        7.5,
        unit="queries/s",
        amounts=(len(queries), 10),
    )
    proven = whence.Index(data.path, threads=1)
    for k in (K, 100):
        recall = proven.recall(len(queries), k, queries=queries)
        yield Row(
            f"auto, {name}: recall@{k}, harmful",
            recall.harmful,
            1.0,
            "of the scan's",
            1.0,
            lower_is_better=False,
        )


def _hashing(name: str, data: gradients.Rows) -> Iterator[Row]:
    """What hashing finds among as many candidates as others look at, at as many bits."""
    rows, queries = data.rows, data.queries[:QUERIES]
    wanted = _numpy(queries, rows)
    ours = HashIndex(rows, SignHash(BITS), threads=1)

    def mine(candidates: int) -> float:
        found = ours.search(queries, K, candidates=max(K, candidates)).positions
        return recall_of(found, wanted)

    faiss = peer("faiss")
    if faiss is not None:
        index = faiss.IndexLSH(rows.shape[1], BITS)
        index.train(rows)
        index.add(rows)
        _, ranked = index.search(queries, CANDIDATES[-1])
        for candidates in CANDIDATES:
            theirs = recall_of(_rescored(ranked[:, :candidates], queries, rows), wanted)
            yield Row(
                f"hashing, {BITS} bits, {name}: recall@{K} of {candidates} candidates ÷ IndexLSH",
                mine(candidates),
                theirs,
                "found",
                1.0,
                lower_is_better=False,
            )
    annoy = peer("annoy")
    if annoy is None:
        return
    forest = annoy.AnnoyIndex(rows.shape[1], "angular")
    forest.set_seed(0)
    for number, row in enumerate(rows):
        forest.add_item(number, row)
    forest.build(100, n_jobs=1)
    for nodes in (200, 500, 1000, 3000):
        looked = [forest.get_nns_by_vector(query, len(rows), nodes) for query in queries]
        candidates = round(np.mean([len(each) for each in looked]))
        yield Row(
            f"hashing, {BITS} bits, {name}: recall@{K} of {candidates} candidates ÷ Annoy",
            mine(candidates),
            recall_of([each[:K] for each in looked], wanted),
            "found",
            1.0,
            lower_is_better=False,
        )


def _rescored(candidates: Found, queries: NDArray[np.float32], rows: NDArray[np.float32]) -> Found:
    """The K best of each query's candidates by their exact scores."""
    scores = np.einsum("qcd,qd->qc", rows[candidates], queries)
    order = np.argsort(-scores, axis=1)[:, :K]
    return np.take_along_axis(candidates, order, 1)


def _memory(data: gradients.Rows) -> Iterator[Row]:
    """What an index keeps in memory."""
    for name, bits, goal in (("4 bits", 4, 270), ("certified", 8, 540)):
        index = whence.Index(data.path, "certified", bits=bits)
        yield Row(
            f"{name}: memory for each row of 512, rows on disk ÷ float32 rows",
            index.bytes / len(index),
            4.0 * index.source.dim,
            "bytes",
            goal / (4.0 * index.source.dim),
        )


def _numpy(queries: NDArray[np.float32], rows: NDArray[np.float32]) -> Found:
    scores = queries @ rows.T
    picked = np.argpartition(scores, -K, axis=1)[:, -K:]
    order = np.argsort(-np.take_along_axis(scores, picked, 1), axis=1)
    return np.take_along_axis(picked, order, 1)


def _torch(queries: NDArray[np.float32], rows: torch.Tensor) -> Found:
    return (torch.from_numpy(queries) @ rows.T).topk(K, dim=1).indices.numpy()


def _agree(
    name: str,
    found: Found,
    wanted: Found,
    queries: NDArray[np.float32],
    rows: NDArray[np.float32],
) -> None:
    """Nothing, if both are the same hits, or others of equal scores up to rounding."""
    for query, mine, theirs in zip(queries, found, wanted, strict=True):
        if (mine == theirs).all():
            continue
        scores, expected = rows[mine] @ query, rows[theirs] @ query
        size = np.linalg.norm(rows[theirs], axis=1) * np.linalg.norm(query)
        if (np.abs(scores - expected) > 1e-5 * size).any() or len(set(mine.tolist())) < K:
            raise SystemExit(f"{name} must find the same rows as a scan, got {mine} for {theirs}")
