"""The ends of a ranking, from the files of a store."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import whence
from comparisons.shared import Row, compared, flat_index, peer, take_turns
from whence.store import Checkpoint, Manifest, Writer

K = 10


def rows(folder: Path) -> Iterator[Row]:
    """The exact ends of the ranking of a float16 store, beside a product with all rows."""
    faiss = peer("faiss")
    for examples, dim, batches in ((60_000, 512, (1, 32, 1024)), (20_000, 4096, (1, 32))):
        path = folder / f"{examples}-{dim}"
        random = np.random.default_rng(0)
        basis = random.standard_normal((32, dim), np.float32)
        _write_store(path, random, basis, examples)
        store = whence.open(path)
        matrix = store.rows()
        tensor = torch.from_numpy(matrix)
        if faiss is not None:
            faiss.omp_set_num_threads(1)
            index = flat_index(faiss, matrix)
        for batch in batches:
            queries = _heavy_tailed(random, basis, batch)
            theirs: dict[str, Callable[[], Ends]] = {
                "numpy, float32 in memory": lambda q=queries, m=matrix: numpy_ends(q @ m.T),
                "torch, float32 in memory": lambda q=queries, m=tensor: torch_ends(q, m),
            }
            if faiss is not None:
                theirs["faiss, float32 in memory"] = lambda q=queries, i=index: (
                    i.search(q, K)[1],
                    i.search(-q, K)[1],
                )
            ours = {"opened before": lambda q=queries, s=store: _our_ends(s, q)}
            from_files = "numpy, float16 from files"
            if batch < 1024:  # else reading the rows is a small part, and the bench is long
                theirs[from_files] = lambda q=queries, s=store: numpy_ends(scores_from_files(q, s))
                ours["opened each time"] = lambda q=queries, p=path: _our_ends(whence.open(p), q)
            scores = queries @ matrix.T
            for name, ends in {**ours, **theirs}.items():
                _check_ends(f"{name}, batch {batch}", ends(), scores)
            del scores
            times = take_turns({**ours, **theirs})
            for name in theirs:
                mine = times["opened each time" if name == from_files else "opened before"]
                yield compared(
                    f"top {K} of {examples:,} × {dim}, batch {batch} ÷ {name}", mine, times[name]
                )


Ends = tuple[np.ndarray, np.ndarray]
"""[queries, K] numbers of the examples with the largest scores, and with the smallest."""


def _our_ends(store: whence.Store, queries: np.ndarray) -> Ends:
    hits = store.search(queries, K, threads=1)
    return hits.helpful.positions, hits.harmful.positions


def numpy_ends(scores: np.ndarray) -> Ends:
    """The usual way: a partition at each end, and a sort of what it leaves."""
    largest = np.argpartition(scores, -K, axis=1)[:, -K:]
    smallest = np.argpartition(scores, K, axis=1)[:, :K]
    down = np.argsort(-np.take_along_axis(scores, largest, 1), axis=1)
    up = np.argsort(np.take_along_axis(scores, smallest, 1), axis=1)
    return np.take_along_axis(largest, down, 1), np.take_along_axis(smallest, up, 1)


def torch_ends(queries: np.ndarray, rows: Tensor) -> Ends:
    """The same with torch."""
    scores = torch.from_numpy(queries) @ rows.T
    largest = scores.topk(K, dim=1).indices
    smallest = scores.topk(K, dim=1, largest=False).indices
    return largest.numpy(), smallest.numpy()


def scores_from_files(queries: np.ndarray, store: whence.Store) -> np.ndarray:
    """All scores, from the float16 rows and float32 norms that the store's files hold."""
    parts = []
    for shard in store.manifest.shards:
        rows = np.load(store.path / shard.name / "rows.npy").astype(np.float32)
        parts.append((queries @ rows.T) * np.load(store.path / shard.name / "scales.npy"))
    return np.concatenate(parts, axis=1)


def _heavy_tailed(random: np.random.Generator, basis: np.ndarray, count: int) -> np.ndarray:
    """Rows like those of gradients: directions in common, and norms over orders of magnitude."""
    rank, dim = basis.shape
    rows = random.standard_normal((count, rank), np.float32) @ basis
    rows += 4 * random.standard_normal((count, dim), np.float32)
    rows *= random.lognormal(sigma=1.0, size=(count, 1)).astype(np.float32)
    return rows


def _write_store(path: Path, random: np.random.Generator, basis: np.ndarray, examples: int) -> None:
    spec = whence.Sketch(dim=basis.shape[1]).spec
    writer = Writer(path, Manifest(spec, "float16", "mean", {"digest": "", "parameters": []}))
    writer.set_checkpoint(Checkpoint("0"))
    for first in range(0, examples, 5000):
        ids = np.arange(first, min(first + 5000, examples))
        writer.append(ids, _heavy_tailed(random, basis, len(ids)), {})
    writer.close()


def _check_ends(name: str, found: Ends, scores: np.ndarray) -> None:
    """Nothing, if these are the ends; equal up to rounding counts as equal.

    Two examples may change places only where their scores differ by less than 1e-5 of the score.
    """
    for got, wanted in zip(found, numpy_ends(scores), strict=True):
        got_scores = np.take_along_axis(scores, got, 1)
        wanted_scores = np.take_along_axis(scores, wanted, 1)
        off = (got != wanted) & (np.abs(got_scores - wanted_scores) > 1e-5 * np.abs(wanted_scores))
        distinct = all(len(set(row)) == K for row in got.tolist())
        if off.any() or not distinct:
            sys.exit(
                f"{name} must find the same examples as numpy, got others for query "
                f"{int(off.any(axis=1).argmax())}"
            )
