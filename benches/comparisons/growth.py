"""What a query costs as rows become more: from ten thousand to a million."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import whence
from comparisons import gradients
from comparisons.shared import Curve, Row, compared_rates, flat_index, peer, take_turns

K = 10
SIZES = (10_000, 30_000, 100_000, 300_000, 1_000_000)
RESIDENT = 512.0
"""MiB that a process may take with a million rows on disk."""

ASK = """
import sys, numpy, whence
index = whence.Index.load(sys.argv[1], sys.argv[2])
for query in numpy.load(sys.argv[3]):
    assert index.search(query[None], 10, threads=1).exact.all()
with open("/proc/self/status") as status:
    print(next(line.split()[1] for line in status if line.startswith("VmRSS")))
"""
"""A process that does nothing but search."""


def rows(name: str, data: gradients.Rows, folder: Path) -> Iterator[Row | Curve]:
    """Proven answers of both ends, one query at a time, beside faiss Flat.

    Each size is the first so many rows of the same file, which are in no order.
    """
    faiss = peer("faiss")
    matrix, queries = np.load(data.path, mmap_mode="r"), data.queries
    few = queries[:10]
    lines = {"4 bits": "whence, proven from 4 bits", "8 bits": "whence, proven from 8 bits"}
    lines["faiss"] = "faiss Flat, asked twice"
    costs: dict[str, list[tuple[float, float]]] = {each: [] for each in lines}
    for size in SIZES:
        path = data.path if size == len(matrix) else folder / f"first-{size}.npy"
        if size < len(matrix):
            np.save(path, matrix[:size])
        indexes = {bits: whence.Index(path, "certified", bits=bits, threads=2) for bits in (4, 8)}
        actions: dict[str, Callable[[], Any]] = {
            f"{bits} bits": lambda index=index: [
                index.search(q[None], K, threads=1) for q in queries
            ]
            for bits, index in indexes.items()
        }
        hits = [index.search(queries, K, threads=1) for index in indexes.values()]
        assert (hits[0].helpful.scores == hits[1].helpful.scores).all()
        if faiss is not None:
            faiss.omp_set_num_threads(1)
            flat = flat_index(faiss, matrix[:size])
            actions["faiss"] = lambda flat=flat: [
                (flat.search(q[None], K), flat.search(-q[None], K)) for q in few
            ]
            _agree(hits[0].helpful.scores[:10], flat.search(few, K)[0], size)
            _agree(-hits[0].harmful.scores[:10], flat.search(-few, K)[0], size)
        times = take_turns(actions, 6.0, rounds=(3, 20))
        for each, measured in times.items():
            asked = len(few) if each == "faiss" else len(queries)
            costs[each].append((size, measured.median / asked))
        if size == SIZES[-1]:
            if faiss is not None:
                yield compared_rates(
                    f"certified, {name}, {size:,} rows, both ends, batch 1 ÷ faiss Flat twice",
                    times["8 bits"],
                    times["faiss"],
                    unit="queries/s",
                    amounts=(len(queries), len(few)),
                )
            yield _resident(name, indexes[4], path, queries, folder)
    for each, points in costs.items():
        if points:
            yield Curve(f"growth, {name}", lines[each], points)
    for each in ("4 bits", "8 bits"):
        points = costs[each]
        yield Row(
            f"certified, {each}, {name}: a query of {SIZES[-1]:,} rows ÷ one of {SIZES[0]:,}, "
            f"beside {SIZES[-1] // SIZES[0]} times the rows",
            points[-1][1] / points[0][1],
            SIZES[-1] / SIZES[0],
            "times",
            1.0,
            spread=", ".join(f"{size:,.0f}: {cost:.3g} ms" for size, cost in points),
        )


def _agree(found: NDArray[np.float32], wanted: NDArray[np.float32], size: int) -> None:
    """Nothing, if both are the same scores up to rounding."""
    if not np.allclose(found, wanted, rtol=1e-4, atol=1e-5 * np.abs(wanted).max()):
        raise SystemExit(f"answers of {size:,} rows must be those of faiss Flat, got others")


def _resident(
    name: str, index: whence.Index, path: Path, queries: NDArray[np.float32], folder: Path
) -> Row:
    """What a process takes that has loaded the index, with its rows on disk, and searched it."""
    saved, asked = folder / f"{name}-index", folder / f"{name}-asked.npy"
    index.save(saved)
    np.save(asked, queries)
    command = [sys.executable, "-c", ASK, str(saved), str(path), str(asked)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return Row(
        f"certified, 4 bits, {name}: memory of a process that searches {len(index):,} rows on disk",
        int(done.stdout) / 1024,
        RESIDENT,
        "MiB",
        1.0,
        spread=f"the index itself {index.bytes / 2**20:.1f} MiB",
    )
