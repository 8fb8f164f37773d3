"""How fast gradients are sketched, and how exact the sketches are."""

from __future__ import annotations

import itertools
import os
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

import whence
from comparisons.accuracy import accuracy
from comparisons.shared import (
    Row,
    bench,
    compared,
    compared_rates,
    fastest,
    peer,
    take_turns,
)
from whence.sketch import KINDS, Accumulator

BYTES = 1 << 30
"""Size of the gradients that are swept over: many times what caches hold."""

PARAMETERS = 1 << 20
"""Width of a gradient, unless a row says otherwise."""

DIMS = (512, 4096)

Action = Callable[[], object]


class Ring:
    """Gradients of which an action takes the next batch each time, so that none is in a cache.

    Attributes:
        batches: [count, batch, parameters], float32 or a 16-bit type; tensors of bfloat16.
    """

    def __init__(self, values: Any, batch: int, parameters: int) -> None:
        self.batches = values.reshape(-1, batch, parameters)
        self._next = itertools.cycle(range(len(self.batches)))

    def __len__(self) -> int:
        return len(self.batches)

    def each(self, function: Callable[[Any], object], count: int | None = None) -> Action:
        """Calls `function` with the next `count` batches; None: all of them."""
        turns = len(self) if count is None else count

        def run() -> None:
            for _ in range(turns):
                function(self.batches[next(self._next)])

        return run


@bench
def sketch(folder: Path) -> Iterator[Row]:
    """Flat gradients beside the speed of reading them and beside peers; linear layers; errors."""
    values = np.random.default_rng(0).standard_normal(BYTES // 4, np.float32)
    yield from reading(values)
    yield from kinds(values)
    yield from sparse_maps(values)
    yield from dense_maps(values)
    yield from trak_projectors(values)
    del values
    yield from linear_layers()
    yield from accuracy(folder)


# ---- beside reading ------------------------------------------------------------------------------


def reading(values: NDArray[np.float32]) -> Iterator[Row]:
    """Sketching beside the fastest way found to read as many bytes once."""
    shapes = {
        f"batch {batch}, p {parameters:,}": (batch, parameters, goal)
        for batch, parameters, goal in (
            (8, PARAMETERS, 0.8),
            (32, PARAMETERS, 0.8),
            (1, 4 * PARAMETERS, 0.5),
            (1, PARAMETERS, 0.5),
        )
    }
    yield from _beside_reading("float32", values, values, shapes, threads=1)
    half = values[: values.size // 2]
    shapes = {f"batch 8, p {PARAMETERS:,}": (8, PARAMETERS, 0.6)}
    # Bytes are compared with bytes: the readers read half as many values of float32.
    yield from _beside_reading("float16", values.astype(np.float16), half, shapes, threads=1)
    bfloat16 = torch.from_numpy(values).to(torch.bfloat16)
    yield from _beside_reading("bfloat16", bfloat16, half, shapes, threads=1)
    shapes = {f"batch 32, p {PARAMETERS:,}": (32, PARAMETERS, 0.9)}
    if (os.cpu_count() or 1) >= 2:
        yield from _beside_reading("float32", values, values, shapes, threads=2)
    else:
        print("skipped: two threads, on a machine with one processor", file=sys.stderr)


def _beside_reading(
    dtype: str,
    values: Any,
    read: NDArray[np.float32],
    shapes: dict[str, tuple[int, int, float]],
    threads: int,
) -> Iterator[Row]:
    """One row for each shape and dim; all of them, and the readers, take turns."""
    ours: dict[str, Action] = {}
    goals: dict[str, float] = {}
    for name, (batch, parameters, goal) in shapes.items():
        ring = Ring(values, batch, parameters)
        for dim in DIMS:
            map_ = whence.Sketch(dim=dim, threads=threads)
            row = f"{dtype}, {name}, dim {dim}"
            _check(row, ring.batches[0], map_(ring.batches[0]))
            ours[row], goals[row] = ring.each(map_), goal
    with _readers(read, threads) as readers:
        for reader in readers.values():
            reader()
        times = take_turns({**ours, **readers})
    best = fastest(times[name] for name in readers)
    of_reader = ", ".join(
        f"{name} {read.nbytes / times[name].median / 1e6:.3g}" for name in readers
    )
    gigabytes = read.nbytes / 1e9
    for name in ours:
        speed = "reading speed" if threads == 1 else f"reading speed, {threads} threads each"
        yield compared_rates(
            f"{name}: sketching ÷ {speed}",
            times[name],
            best,
            goals[name],
            unit="GB/s",
            amounts=(gigabytes, gigabytes),
            note=f"readers: {of_reader}",
        )


@contextmanager
def _readers(values: NDArray[np.float32], threads: int) -> Iterator[dict[str, Action]]:
    """Ways to read an array once with little else to do, whoever is fastest on a machine.

    The product of a matrix and a vector reads several rows at once, which hides more of the
    latency of memory than an inner product of the whole; the vector stays in the cache.
    """
    vector = np.ones(1 << 16, np.float32)
    tensor, ones = torch.from_numpy(values), torch.from_numpy(vector)
    matrix = values.reshape(-1, len(vector))
    if threads == 1:
        yield {
            "numpy dot": lambda: values @ values,
            "torch dot": lambda: torch.dot(tensor, tensor),
            "torch sum": tensor.sum,
            "numpy matrix-vector": lambda: matrix @ vector,
            "torch matrix-vector": lambda: tensor.view(-1, len(ones)) @ ones,
        }
        return
    parts = np.array_split(matrix, threads)

    def torch_threads(function: Callable[[], object]) -> Action:
        def run() -> None:
            torch.set_num_threads(threads)
            function()
            torch.set_num_threads(1)

        return run

    with ThreadPoolExecutor(threads) as pool:
        yield {
            "numpy dot": lambda: list(pool.map(lambda part: part.ravel() @ part.ravel(), parts)),
            "torch dot": torch_threads(lambda: torch.dot(tensor, tensor)),
            "torch sum": torch_threads(tensor.sum),
            "numpy matrix-vector": lambda: list(pool.map(lambda part: part @ vector, parts)),
            "torch matrix-vector": torch_threads(lambda: tensor.view(-1, len(ones)) @ ones),
        }


def _check(name: str, gradients: Any, rows: Any, deviations: float = 8.0) -> None:
    """Nothing, if inner products of `rows` are those of `gradients` as closely as a sketch's are.

    Every pair's error may be `deviations` standard deviations of an unstructured sketch,
    sqrt((1 + cosine²) / dim). Ours and the peers' maps differ, so this is what they agree in.
    """
    exact, found = _normalised(_gram(gradients), _gram(rows))
    dim = rows.shape[1]
    error = np.abs(found - exact) / np.sqrt((1 + exact**2) / dim)
    if not error.max() <= deviations:
        sys.exit(
            f"{name}: inner products must be those of the gradients to {deviations:g} standard "
            f"deviations, got {error.max():.3g}"
        )


def _gram(vectors: Any) -> NDArray[np.float64]:
    """[batch, batch] inner products, summed in float64."""
    tensor = torch.as_tensor(vectors)
    total = torch.zeros(len(tensor), len(tensor), dtype=torch.float64)
    for part in tensor.split(1 << 18, dim=1):
        wide = part.to(torch.float64)
        total += wide @ wide.T
    return total.numpy()


def _normalised(
    exact: NDArray[np.float64], found: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Both, over the product of the exact norms."""
    norms = np.sqrt(np.diag(exact))
    return exact / np.outer(norms, norms), found / np.outer(norms, norms)


# ---- beside what users write ---------------------------------------------------------------------


def sparse_maps(values: NDArray[np.float32]) -> Iterator[Row]:
    """The same kind of map, one nonzero a column, as users write it with torch and scipy."""
    ring = Ring(values, 32, PARAMETERS)
    first = ring.batches[0]
    for dim in DIMS:
        ours = whence.Sketch(dim=dim, threads=1)
        random = np.random.default_rng(1)
        index = random.integers(dim, size=PARAMETERS)
        signs = random.choice(np.array([-1, 1], np.float32), PARAMETERS)
        ways = {"torch index_add_": _torch_ways(index, signs, dim)}
        if (sparse := peer("scipy.sparse")) is not None:
            ways["scipy sparse product"] = _scipy_ways(sparse, index, signs, dim)
        wanted = ways["torch index_add_"]["[batch, dim]"](first)
        _check(f"torch index_add_, dim {dim}", first, wanted)
        for name, each in ways.items():
            for way, function in each.items():
                # One map in all of these, so they agree up to rounding.
                if not np.allclose(function(first), wanted, atol=1e-2, rtol=1e-3):
                    sys.exit(f"{name}, {way}, must be the same sketch as the others, got another")
            trial = take_turns(
                {way: lambda f=function: f(first) for way, function in each.items()},
                rounds=(2, 2),
            )
            way = min(trial, key=lambda way, trial=trial: trial[way].median)
            times = take_turns({"ours": ring.each(ours), "peer": ring.each(each[way])}, 6)
            samples = len(ring) * 32
            yield compared_rates(
                f"batch 32, p {PARAMETERS:,}, dim {dim}: sketching ÷ {name}",
                times["ours"],
                times["peer"],
                8,
                unit="samples/s",
                amounts=(samples, samples),
                note=f"the faster of its ways: {way}",
            )


Way = Callable[[NDArray[np.float32]], Any]
"""[batch, parameters] -> [batch, dim]."""


def _torch_ways(index: NDArray[np.int64], signs: NDArray[np.float32], dim: int) -> dict[str, Way]:
    at, sign = torch.from_numpy(index), torch.from_numpy(signs)

    def wide(batch: NDArray[np.float32]) -> Tensor:
        return torch.zeros(len(batch), dim).index_add_(1, at, torch.from_numpy(batch) * sign)

    def tall(batch: NDArray[np.float32]) -> Tensor:
        signed = (torch.from_numpy(batch) * sign).T.contiguous()
        return torch.zeros(dim, len(batch)).index_add_(0, at, signed).T

    def view(batch: NDArray[np.float32]) -> Tensor:
        return torch.zeros(dim, len(batch)).index_add_(0, at, (torch.from_numpy(batch) * sign).T).T

    return {"[batch, dim]": wide, "[dim, batch]": tall, "[dim, batch], uncopied": view}


def _scipy_ways(
    sparse: Any, index: NDArray[np.int64], signs: NDArray[np.float32], dim: int
) -> dict[str, Way]:
    size = len(index)
    tall = sparse.csr_matrix((signs, index, np.arange(size + 1)), shape=(size, dim))
    wide = tall.T.tocsr()
    return {
        "CSR [parameters, dim] transposed, times": lambda batch: (tall.T @ batch.T).T,
        "CSR [dim, parameters], times": lambda batch: (wide @ batch.T).T,
        "times CSR [parameters, dim]": lambda batch: batch @ tall,
    }


def dense_maps(values: NDArray[np.float32]) -> Iterator[Row]:
    """A dense Gaussian matrix that is kept: what remains is the product."""
    rows = {512: PARAMETERS, 4096: PARAMETERS // 4}
    ring = Ring(values, 32, PARAMETERS)
    first = torch.from_numpy(ring.batches[0])
    for dim, goal in zip(DIMS, (40, 300), strict=True):
        blocks = PARAMETERS // rows[dim]
        torch.manual_seed(dim)
        entries = torch.randn(rows[dim] * dim)
        tall, wide = entries.view(-1, dim), entries.view(dim, -1).T

        def product(matrix: Tensor, batch: Tensor, blocks: int = blocks) -> Tensor:
            out = torch.zeros(len(batch), matrix.shape[1])
            for part in batch.chunk(blocks, dim=1):
                out.addmm_(part, matrix)
            return out

        # One block of the matrix for all blocks of the gradient sketches the sum of these.
        folded = torch.stack(first.chunk(blocks, dim=1)).sum(0)
        for matrix in (tall, wide):
            _check(f"dense, dim {dim}", folded, product(matrix, first) / dim**0.5)
        trial = take_turns(
            {
                "[parameters, dim]": lambda m=tall, f=product: f(m, first),
                "[dim, parameters]": lambda m=wide, f=product: f(m, first),
            },
            rounds=(2, 2),
        )
        layout = min(trial, key=lambda layout, trial=trial: trial[layout].median)
        matrix = tall if layout == "[parameters, dim]" else wide
        ours = whence.Sketch(dim=dim, threads=1)
        times = take_turns(
            {"ours": ring.each(ours), "peer": lambda m=matrix, f=product: f(m, first)},
            rounds=(3, 60),
        )
        note = f"the matrix is kept as {layout}"
        if blocks > 1:
            note += (
                f"; one block of {rows[dim]:,} rows is used {blocks} times, for a whole matrix "
                f"would take {4 * PARAMETERS * dim / 1e9:.0f} GB"
            )
        yield compared_rates(
            f"batch 32, p {PARAMETERS:,}, dim {dim}: sketching ÷ dense Gaussian product, "
            "matrix kept",
            times["ours"],
            times["peer"],
            goal,
            unit="samples/s",
            amounts=(len(ring) * 32, 32),
            note=note,
        )


def trak_projectors(values: NDArray[np.float32]) -> Iterator[Row]:
    """TRAK's projector on the CPU, which makes its matrix anew in every call."""
    if (projectors := peer("trak.projectors")) is None:
        return
    ring = Ring(values, 8, PARAMETERS)
    first = torch.from_numpy(ring.batches[0])
    for kind, goals in (("rademacher", (500, 3000)), ("normal", (None, None))):
        for dim, goal in zip(DIMS, goals, strict=True):
            ours = whence.Sketch(dim=dim, threads=1)
            theirs = _trak(projectors, kind, PARAMETERS, dim)
            _check(f"TRAK {kind}, dim {dim}", first, theirs(first))
            # A call takes tens of seconds, and the ratio is in the thousands.
            times = take_turns(
                {"ours": ring.each(ours), "peer": lambda f=theirs: f(first)}, rounds=(2, 2)
            )
            yield compared_rates(
                f"batch 8, p {PARAMETERS:,}, dim {dim}: sketching ÷ TRAK BasicProjector, {kind}",
                times["ours"],
                times["peer"],
                goal,
                unit="samples/s",
                amounts=(len(ring) * 8, 8),
                note="after one call that is not timed",
            )


def _trak(projectors: Any, kind: str, parameters: int, dim: int) -> Callable[[Tensor], Tensor]:
    """As TRAKer makes and calls it, in float32, which is faster on a CPU than its float16."""
    projector = projectors.BasicProjector(
        grad_dim=parameters,
        proj_dim=dim,
        seed=0,
        proj_type=projectors.ProjectionType(kind),
        device="cpu",
        dtype=torch.float32,
    )
    # Its rows bear no 1 / sqrt(dim).
    return lambda batch: projector.project(batch, model_id=0) / dim**0.5


# ---- every kind of sketch ------------------------------------------------------------------------

SMALL = (512, 16, 1 << 18)
"""dim, batch and parameters at which every kind is compared: some of them are slow."""


def kinds(values: NDArray[np.float32]) -> Iterator[Row]:
    """Every kind of sketch there is, beside peers' maps of the same kind."""
    dim, batch, parameters = SMALL
    ring = Ring(values, batch, parameters)
    first = ring.batches[0]
    for kind in KINDS:
        ours = whence.Sketch(kind, dim=dim, threads=1)
        _check(kind, first, ours(first))
        row = f"{kind}, batch {batch}, p {parameters:,}, dim {dim}: sketching"
        peers = _same_kind(kind, parameters, dim)
        if not peers:
            times = take_turns({"ours": ring.each(ours, 1)}, 2)["ours"]
            rate = 1e3 * batch / times.median
            yield Row(row, rate, None, "samples/s", spread=f"{times} ms")
        for name, theirs in peers.items():
            _check(f"{kind}, {name}", first, np.asarray(theirs(first)))
            actions = {"ours": ring.each(ours, 1), "peer": ring.each(theirs, 1)}
            times = take_turns(actions, 6, rounds=(2, 60))
            yield compared_rates(
                f"{row} ÷ {name}",
                times["ours"],
                times["peer"],
                unit="samples/s",
                amounts=(batch, batch),
            )


def _same_kind(kind: str, parameters: int, dim: int) -> dict[str, Way]:
    """Peers' maps of the same kind."""
    found: dict[str, Way] = {}
    if kind in ("chunked_sjlt", "sjlt") and (linalg := peer("scipy.linalg")) is not None:
        found["scipy clarkson_woodruff_transform"] = lambda batch: (
            linalg.clarkson_woodruff_transform(batch.T, dim, rng=0).T
        )
    # The sparse one has about one nonzero a column at this size.
    name = {"sjlt": "SparseRandomProjection", "gaussian": "GaussianRandomProjection"}.get(kind)
    if name is not None and (module := peer("sklearn.random_projection")) is not None:
        maker = getattr(module, name)(dim, random_state=0)
        fitted = maker.fit(np.zeros((1, parameters), np.float32))
        found[f"scikit-learn {name}, matrix kept"] = lambda batch: _dense(fitted.transform(batch))
    name = {"rademacher": "rademacher", "gaussian": "normal"}.get(kind)
    if name is not None and (projectors := peer("trak.projectors")) is not None:
        project = _trak(projectors, name, parameters, dim)
        found["TRAK BasicProjector"] = lambda batch: project(torch.from_numpy(batch))
    return found


def _dense(rows: Any) -> NDArray[np.float32]:
    """A matrix that may be sparse, dense."""
    return rows.toarray() if hasattr(rows, "toarray") else rows


# ---- linear layers -------------------------------------------------------------------------------


def linear_layers() -> Iterator[Row]:
    """Sketches of each sample's own weight gradient beside torch's sum of them."""
    dim = 4096
    for batch, terms, wide, tall in ((16, 128, 128, 512), (16, 128, 768, 3072), (4, 16, 512, 512)):
        random = np.random.default_rng(0)
        inputs = random.standard_normal((batch, terms, wide), np.float32)
        outputs = random.standard_normal((batch, terms, tall), np.float32)
        left = torch.from_numpy(outputs).view(-1, tall)
        right = torch.from_numpy(inputs).view(-1, wide)
        map_ = whence.Sketch(dim=dim, threads=1)
        totals = Accumulator(map_, batch)

        def ours(totals: Accumulator = totals, left: Any = outputs, right: Any = inputs) -> None:
            totals.add_outer("weight", [left.shape[2], right.shape[2]], left, right)

        def theirs(left: Tensor = left, right: Tensor = right) -> Tensor:
            return left.T @ right

        ours()
        name = f"linear {wide} -> {tall}, batch {batch}, T {terms}, dim {dim}"
        exact = map_({"weight": theirs()[None]})[0]
        difference = np.linalg.norm(totals.rows().sum(0) - exact) / np.linalg.norm(exact)
        if not difference <= 1e-5:
            sys.exit(f"{name}: rows must add up to the batch's to 1e-5, got {difference:.2g}")
        times = take_turns({"ours": ours, "peer": theirs}, 6)
        yield compared(
            f"{name}: every sample's gradient sketched ÷ torch's weight gradient of the batch",
            times["ours"],
            times["peer"],
        )
