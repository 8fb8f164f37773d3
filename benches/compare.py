"""Times whence beside its peers, in one run, after checking that they give the same answer.

    python benches/compare.py record
    python benches/compare.py search --json search.json

All on one thread. Ours and the peers take turns, A B A B, so that a machine that slows down for a
while slows down all; a row is the median of each, and their ratio, ours ÷ peer.
"""

from __future__ import annotations

import os

# Read once, when a library is loaded: so before the imports that load one.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["MKL_NUM_THREADS"] = "1"
os.environ["OPENBLAS_NUM_THREADS"] = "1"

import argparse
import copy
import importlib
import itertools
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import whence
from whence.store import Checkpoint, Manifest, Writer

SECONDS = 12.0
"""Time given to each comparison, for all who take part together."""

ROUNDS = (5, 60)
"""Fewest and most rounds of a comparison."""


@dataclass(frozen=True)
class Times:
    """Measured times of one who takes part, in milliseconds."""

    values: list[float]

    @property
    def median(self) -> float:
        """The median."""
        return float(np.median(self.values))

    def __str__(self) -> str:
        return f"{min(self.values):.4g} to {max(self.values):.4g}"


@dataclass(frozen=True)
class Row:
    """One comparison.

    Attributes:
        name: What was compared.
        ours: Our figure.
        peer: The peer's; None if there is none to compare with.
        unit: Of both.
        goal: What the ratio is to be; None if nothing was promised.
        lower_is_better: Whether the ratio is to be at most the goal, or at least.
        spread: The least and the most measured, for the reader.
    """

    name: str
    ours: float
    peer: float | None
    unit: str
    goal: float | None = None
    lower_is_better: bool = True
    spread: str = ""

    @property
    def ratio(self) -> float | None:
        """Ours ÷ peer."""
        return None if self.peer is None else self.ours / self.peer

    @property
    def met(self) -> bool | None:
        """Whether the goal is met; None if there is none."""
        if self.goal is None or self.ratio is None:
            return None
        return self.ratio <= self.goal if self.lower_is_better else self.ratio >= self.goal

    def as_json(self) -> dict[str, Any]:
        """The row as it is written."""
        return {
            "name": self.name,
            "ours": self.ours,
            "peer": self.peer,
            "unit": self.unit,
            "ratio": self.ratio,
            "goal": self.goal,
            "met": self.met,
        }


Bench = Callable[[Path], Iterator[Row]]
"""An empty folder -> rows."""

BENCHES: dict[str, Bench] = {}
"""Every comparison by its name on the command line."""


def bench(function: Bench) -> Bench:
    """Registers a comparison under the name of its function."""
    BENCHES[function.__name__] = function
    return function


def peer(module: str) -> Any:
    """A peer that may not be installed; None, said by name, if it is not."""
    try:
        return importlib.import_module(module)
    except ImportError:
        print(f"skipped: {module} is not installed", file=sys.stderr)
        return None


def take_turns(
    actions: dict[str, Callable[[], object]], seconds: float = SECONDS
) -> dict[str, Times]:
    """Times of each action, which take turns; each should have run once before."""
    found: dict[str, list[float]] = {name: [] for name in actions}
    begin = time.perf_counter()
    fewest, most = ROUNDS
    for done in range(most):
        if done >= fewest and time.perf_counter() - begin > seconds:
            break
        for name, action in actions.items():
            start = time.perf_counter()
            action()
            found[name].append(1e3 * (time.perf_counter() - start))
    return {name: Times(values) for name, values in found.items()}


def compared(name: str, ours: Times, theirs: Times, goal: float | None = None) -> Row:
    """A row of two measured times."""
    spread = f"ours {ours}, peer {theirs}, {len(ours.values)} rounds"
    return Row(name, ours.median, theirs.median, "ms", goal, spread=spread)


# ---- record: what it costs to collect gradients ------------------------------------------------

VOCABULARY, LENGTH, DIM = 65, 128, 4096


class Block(nn.Module):
    """A pre-norm transformer block: causal attention, and a hidden layer of four widths."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.heads = width // 64
        self.norms = nn.ModuleList([nn.LayerNorm(width), nn.LayerNorm(width)])
        self.project = nn.Linear(width, 3 * width)
        self.output = nn.Linear(width, width)
        self.widen = nn.Linear(width, 4 * width)
        self.narrow = nn.Linear(4 * width, width)

    def forward(self, values: Tensor) -> Tensor:
        """[batch, length, width]."""
        parts = self.project(self.norms[0](values)).unflatten(-1, (3, self.heads, -1))
        query, key, value = parts.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        values = values + self.output(mixed.transpose(1, 2).flatten(2))
        return values + self.narrow(F.gelu(self.widen(self.norms[1](values))))


class Transformer(nn.Module):
    """A character transformer with learned positions and a head of its own (untied)."""

    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, width)
        self.position = nn.Embedding(LENGTH, width)
        self.blocks = nn.Sequential(*(Block(width) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, VOCABULARY)

    def forward(self, tokens: Tensor) -> Tensor:
        """[batch, classes, length] scores, as cross_entropy takes them."""
        values = self.embedding(tokens) + self.position(torch.arange(tokens.shape[1]))
        return self.head(self.norm(self.blocks(values))).mT


@bench
def record(folder: Path) -> Iterator[Row]:
    """Collecting rows, and training while recording, beside the plain loop."""
    for width, layers in ((128, 4), (768, 2)):
        torch.manual_seed(0)
        tokens = torch.randint(VOCABULARY, (16, LENGTH + 1))
        yield from _recorded(
            folder / f"transformer-{width}",
            f"transformer {width} × {layers}, batch 16, T {LENGTH}",
            Transformer(width, layers),
            tokens[:, :-1],
            tokens[:, 1:],
            goal=1.5,
        )
    torch.manual_seed(0)
    perceptron = nn.Sequential(
        nn.Linear(784, 512), nn.ReLU(), nn.Linear(512, 256), nn.ReLU(), nn.Linear(256, 10)
    )
    yield from _recorded(
        folder / "perceptron",
        "MLP 784-512-256-10, batch 64",
        perceptron,
        torch.randn(64, 784),
        torch.randint(10, (64,)),
        goal=None,
    )


def _recorded(
    folder: Path, name: str, model: nn.Module, values: Tensor, targets: Tensor, goal: float | None
) -> Iterator[Row]:
    """The rows of one model; the peer is a copy of it, which bears no hooks."""
    plain = copy.deepcopy(model)
    batch = len(values)
    firsts = itertools.count(0, batch)  # every batch has new ids, so that all rows are appended

    def plain_pass() -> None:
        plain.zero_grad()
        F.cross_entropy(plain(values), targets).backward()

    def recorded_pass(recorder: whence.Recorder) -> whence.Batch:
        first = next(firsts)
        with recorder.batch(np.arange(first, first + batch)) as recorded:
            F.cross_entropy(model(values), targets).backward()
        return recorded

    settings = {"dim": DIM, "threads": 1}
    with whence.record(model, folder / "collect", weight_gradients=False, **settings) as recorder:
        # The first batch, which is this one, also compares its sum with autograd's: not timed.
        _check_rows(recorded_pass(recorder).rows, plain, values, targets)
        plain_pass()
        times = take_turns({"ours": lambda: recorded_pass(recorder), "peer": plain_pass})
    what = "collecting ÷ forward and backward"
    yield compared(f"{name}: {what}", times["ours"], times["peer"], goal)

    optimizers = {each: torch.optim.Adam(each.parameters(), lr=1e-4) for each in (model, plain)}

    def plain_step() -> None:
        plain_pass()
        optimizers[plain].step()

    def recorded_step(recorder: whence.Recorder) -> None:
        model.zero_grad()
        recorded_pass(recorder)
        optimizers[model].step()

    with whence.record(model, folder / "train", **settings) as recorder:
        recorded_step(recorder)
        plain_step()
        times = take_turns({"ours": lambda: recorded_step(recorder), "peer": plain_step})
    yield compared(f"{name}: training step recorded ÷ not", times["ours"], times["peer"])


def _check_rows(
    rows: np.ndarray, model: nn.Module, values: Tensor, targets: Tensor, examples: int = 2
) -> None:
    """Nothing, if the first rows are the sketches of the examples' own gradients by autograd."""
    sketch = whence.Sketch(dim=DIM, threads=1)
    for example in range(examples):
        one = slice(example, example + 1)
        loss = F.cross_entropy(model(values[one]), targets[one])
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        names = [name for name, _ in model.named_parameters()]
        exact = sketch({name: g[None] for name, g in zip(names, gradients, strict=True)})[0]
        difference = np.linalg.norm(rows[example] - exact) / np.linalg.norm(exact)
        if not difference <= 1e-5:
            sys.exit(f"a row must be the sketch of the gradient to 1e-5, got {difference:.2g}")


# ---- search: the ends of a ranking -------------------------------------------------------------

K = 10


@bench
def search(folder: Path) -> Iterator[Row]:
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
            index = faiss.IndexFlatIP(dim)
            index.add(matrix)
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


# ---- the command -------------------------------------------------------------------------------


def table(rows: Sequence[Row]) -> str:
    """Rows for a terminal, one a line and its spread below it."""
    lines = []
    for row in rows:
        ratio = "" if row.ratio is None else f"{row.ratio:.3f}"
        other = "none" if row.peer is None else f"{row.peer:.4g}"
        goal = ""
        if row.goal is not None:
            sign = "<=" if row.lower_is_better else ">="
            goal = f"goal {sign} {row.goal:g}: {'met' if row.met else 'NOT MET'}"
        lines.append(f"{row.name}")
        lines.append(f"    {ratio:>7}  {row.ours:.4g} ÷ {other} {row.unit}  {goal}")
        if row.spread:
            lines.append(f"             {row.spread}")
    return "\n".join(lines)


MARKS = "<!-- results -->\n", "<!-- /results -->"
"""What stands before and after the table in a README."""


def write_table(path: Path, rows: Sequence[Row]) -> None:
    """Puts the rows, as a Markdown table, between the marks of a README."""
    text = path.read_text(encoding="utf-8")
    before, mark, rest = text.partition(MARKS[0])
    _, end, after = rest.partition(MARKS[1])
    if not (mark and end):
        sys.exit(f"{path} must hold {MARKS[0].strip()} and {MARKS[1]}, got a file without them")
    lines = ["| what | ours | peer | ratio | goal |", "|---|---|---|---|---|"]
    for row in rows:
        other = "–" if row.peer is None else f"{row.peer:.3g} {row.unit}"
        ratio = "–" if row.ratio is None else f"{row.ratio:.2f}"
        goal = "–"
        if row.goal is not None:
            sign = "≤" if row.lower_is_better else "≥"
            goal = f"{sign} {row.goal:g}, {'met' if row.met else '**missed**'}"
        lines.append(f"| {row.name} | {row.ours:.3g} {row.unit} | {other} | {ratio} | {goal} |")
    table = "\n".join(lines)
    path.write_text(f"{before}{mark}{table}\n{end}{after}", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", choices=[*BENCHES, "all"], help="what to compare")
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    parser.add_argument("--readme", type=Path, help="also write them as a table into this file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for name in BENCHES if options.name == "all" else [options.name]:
        with tempfile.TemporaryDirectory() as folder:
            for row in BENCHES[name](Path(folder)):
                print(table([row]), flush=True)
                rows.append(row)
    if options.json:
        options.json.write_text(json.dumps([row.as_json() for row in rows], indent=1) + "\n")
    if options.readme:
        write_table(options.readme, rows)


if __name__ == "__main__":
    main()
