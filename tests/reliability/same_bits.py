"""The same bits at any number of threads, with any instruction set, however work is cut.

Every number that the library computes itself is computed with 1, 2, 3 and 8 threads, by plain code
and by each set of vector instructions that the processor has, of everything at once and of parts:
batches of a sketch, shards of a store, queries of a search. What is compared is every bit, zeros'
signs included, with the plain code on one thread.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from typing import Any

import numpy as np
import trial
from filled import fill

THREADS = (1, 2, 3, 8)
SETS = ("scalar", "avx2", "avx512", "avx512vnni")
PARTS = (1, 2, 7)
"""Into how many parts work is cut."""

DIFFER = "differ"

RESULTS = {}


def result(compute):
    """Enters a result under its name: a function of `Work` that yields arrays."""
    RESULTS[compute.__name__] = compute
    return compute


def named(name, compute):
    compute.__name__ = name
    return result(compute)


class Work:
    """How results are computed, and what of.

    Args:
        threads: How many threads.
        parts: Into how many parts work is cut.
        size: How much there is of it.
        seed: Of the data.
        folder: For files.
    """

    def __init__(self, threads, parts, size, seed, folder):
        self.threads, self.parts, self.size, self.seed = threads, parts, size, seed
        self._folder, self._paths = folder, 0

    def path(self):
        """One that is not there yet."""
        self._paths += 1
        return self._folder / f"{self.threads}-{self.parts}-{self._paths}"

    def store(self, rows, dtype, checkpoints=("0",)):
        """Rows in as many shards as parts; every other checkpoint has them in reverse.

        Threads have no part in writing: those that come later find it there.
        """
        import whence

        content = hashlib.sha256(rows.tobytes()).hexdigest()[:16]
        path = self._folder / f"{content}-{dtype}-{len(checkpoints)}-{self.parts}"
        if not path.exists():
            for place, name in enumerate(checkpoints):
                turned = rows[:: (-1) ** place]
                options = {"dtype": dtype, "parts": self.parts, "rate": 0.1}
                fill(path, turned, checkpoint=name, **options)
        return whence.open(path)

    def drawn(self, *shape):
        """Values whose sizes span decades: the order of a sum matters to them."""
        random = np.random.default_rng(self.seed)
        values = random.standard_normal(shape, np.float32)
        return values * 10 ** random.uniform(-4, 4, shape).astype(np.float32)

    def rows(self, count, dim, seed=0):
        """Rows whose lengths span decades, some of them equal."""
        random = np.random.default_rng((self.seed, seed))
        rows = random.standard_normal((count, dim), np.float32)
        rows *= 10 ** random.uniform(-2, 1, (count, 1)).astype(np.float32)
        rows[count // 2] = rows[count // 3]
        return rows

    def cut(self, count):
        """The places of each part."""
        return np.array_split(np.arange(count), min(self.parts, count))

    def joined(self, compute, *arrays):
        """What a function of parts returns, one after the other."""
        return np.concatenate(
            [compute(*(each[places] for each in arrays)) for places in self.cut(len(arrays[0]))]
        )


# Sketches


def sketches(whence, threads, **options):
    """One of each kind."""
    for kind in whence.sketch.KINDS:
        yield kind, whence.Sketch(kind, dim=192, seed=3, threads=threads, **options)
    yield "sjlt of 4", whence.Sketch("sjlt", dim=192, nonzeros=4, threads=threads, **options)


def flat(layout, normalize, dtype):
    def compute(work):
        import whence

        side = 90 * work.size
        gradients = {
            "a.weight": work.drawn(14, side, 37),
            "a.bias": work.drawn(14, side),
            "b.table": work.drawn(14, 11, 3, 5),
        }
        arrays = [each.astype(dtype) for each in gradients.values()]
        for _, sketch in sketches(whence, work.threads, layout=layout, normalize=normalize):
            yield work.joined(
                lambda *parts, sketch=sketch: sketch(dict(zip(gradients, parts, strict=True))),
                *arrays,
            )

    return named(f"sketch, {layout}{', normalized' * normalize}, {dtype}", compute)


flat("global", False, "float32")
flat("global", True, "float32")
flat("global", False, "float16")
flat("per_layer", False, "float32")


@result
def sketch_of_bfloat16(work):
    import torch

    import whence

    gradients = torch.from_numpy(work.drawn(9, 5000 * work.size)).bfloat16()
    for _, sketch in sketches(whence, work.threads):
        yield work.joined(sketch, gradients)


@result
def sketch_of_long_rows(work):
    """Which threads share: those of one batch, or those of one row."""
    import whence

    for batch in (14, 1):
        gradients = work.drawn(batch, 50_001 * work.size * 14 // batch)
        for kind, sketch in sketches(whence, work.threads):
            dense = kind in ("rademacher", "gaussian")
            yield work.joined(sketch, gradients[:, :10_000] if dense else gradients)


@result
def sketch_of_outer_products(work):
    """As of linear layers, with the sum over samples beside them."""
    import whence

    terms = 250 * work.size
    left, right = work.drawn(9, terms, 33)[:, ::-1], work.drawn(9, terms, 70)
    for _, sketch in sketches(whence, work.threads):
        names = {"w": [33, 70], "b": [33]}

        def rows(left, right, sketch=sketch, names=names):
            totals = sketch.accumulator(len(left), names)
            totals.add_outer("w", names["w"], left, right, bias=("b", names["b"], 0))
            return totals.rows()

        yield work.joined(rows, left, right)


@result
def sum_of_outer_products(work):
    import whence

    left, right = work.drawn(9, 250 * work.size, 33), work.drawn(9, 250 * work.size, 70)
    for _, sketch in sketches(whence, work.threads):
        total = np.zeros((33, 70), np.float32)
        totals = sketch.accumulator(9, ["w"])
        totals.add_outer("w", [33, 70], left, right, total=total)
        yield total


@result
def sketch_of_lookups(work):
    """As of embeddings, some of whose rows come often."""
    import whence

    terms = 5000 * work.size
    indices = np.random.default_rng(work.seed).zipf(1.5, (9, terms)) % 100
    values = work.drawn(9, terms, 24)
    for _, sketch in sketches(whence, work.threads):

        def rows(indices, values, sketch=sketch):
            totals = sketch.accumulator(len(indices), ["t"])
            totals.add_lookup("t", [100, 24], indices, values, 0)
            return totals.rows()

        yield work.joined(rows, indices, values)


@result
def gradients_of_norms(work):
    from whence import _core

    values = work.drawn(7, 2500 * work.size, 65)
    delta = values[::-1]
    for centred in (False, True):
        for which in (0, 1):
            yield work.joined(
                lambda *parts, centred=centred, which=which: _core.norm_gradients(
                    *map(np.ascontiguousarray, parts), 1e-5, centred, work.threads
                )[which],
                values,
                delta,
            )


def recorded(layout, dtype):
    """Of a model in whole numbers, whose gradients no order of sums rounds."""

    def compute(work):
        import torch

        import whence

        torch.manual_seed(work.seed)
        torch.set_num_threads(work.threads)
        model = torch.nn.Sequential(
            torch.nn.Linear(40, 30 * work.size), torch.nn.ReLU(), torch.nn.Linear(30 * work.size, 5)
        )
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(torch.randint(-2, 3, parameter.shape))
        x = torch.randint(-3, 4, (21, 40)).float()
        y = torch.randint(-3, 4, (21, 5)).float()
        options = {"layout": layout} if layout == "factored" else {"dim": 192}
        if layout == "per_layer":
            options = {"sketch": whence.Sketch(dim=192, layout="per_layer")}
        path = work.path()
        with whence.record(
            model, path, reduction="sum", dtype=dtype, threads=work.threads, **options
        ) as recorder:
            for places in work.cut(len(x)):
                with recorder.batch(places):
                    (model(x[places]) * y[places]).sum().backward()
        store = whence.open(path)
        yield store.scales
        yield store.core.read(np.arange(len(store), dtype=np.uint64))

    return named(f"record, {layout}, {dtype}", compute)


recorded("global", "float32")
recorded("global", "int4")
recorded("per_layer", "float16")
recorded("factored", "float32")
recorded("factored", "float16")


# Stores and searches


def found(hits):
    """All that hits hold."""
    for side in (hits.helpful, hits.harmful):
        yield side.positions
        yield side.scores


def asked(work, search, queries, **options):
    """Hits of all queries, asked for in parts."""
    parts = [
        list(found(search(queries[places], threads=work.threads, **options)))
        for places in work.cut(len(queries))
    ]
    yield from map(np.concatenate, zip(*parts, strict=True))


DTYPES = ("float32", "float16", "int8", "int4", "int2", "int1")


def stored(dtype):
    def rows(work):
        store = work.store(work.rows(700 * work.size, 130), dtype)
        yield store.rows()
        yield store.scales
        yield store.core.norms(work.threads)
        yield np.uint64(store.digest(len(store), work.threads))
        yield store.self_influence()

    def search(work):
        count = 700 * work.size
        store = work.store(work.rows(count, 130), dtype)
        queries = work.rows(15, 130, seed=1)
        yield from asked(work, store.search, queries, k=20)
        yield from asked(work, store.search, queries, k=count)
        yield from asked(
            work, store.search, queries, where=np.arange(count) % 3 > 0, side="helpful"
        )

    named(f"rows of a store, {dtype}", rows)
    named(f"Store.search, {dtype}", search)


for dtype in DTYPES:
    stored(dtype)


@result
def search_over_checkpoints(work):
    store = work.store(work.rows(700 * work.size, 130), "float16", ("0", "1", "2"))
    queries = np.stack([work.rows(15, 130, seed=seed) for seed in range(3)])
    parts = [
        list(found(store.search(queries[:, places], k=20, threads=work.threads)))
        for places in work.cut(15)
    ]
    yield from map(np.concatenate, zip(*parts, strict=True))


@result
def search_of_factored_rows(work):
    import whence
    from whence.factored import Factored, Segment
    from whence.store import Checkpoint, Manifest, Writer

    factored = Factored([Segment("w", 30, 61, "b"), Segment("c", 0, 17)])
    left, right = work.rows(700 * work.size, 30), work.rows(700 * work.size, 60, seed=1)
    vector = work.rows(700 * work.size, 17, seed=2)
    path = work.path()
    model = {"digest": "none", "parameters": []}
    writer = Writer(path, Manifest(factored.spec, "float32", "mean", model))
    writer.set_checkpoint(Checkpoint("0", None))
    for places in work.cut(len(left)):
        totals = factored.accumulator(len(places))
        totals.add_outer("w", [30, 60], left[places][:, None], right[places][:, None])
        totals.add("c", [17], vector[places])
        rows, norms = totals.rows()
        writer.append(places, rows, {}, norms.astype(np.float32))
        writer.commit()
    writer.close()
    store = whence.open(path)
    yield store.scales
    queries = store.core.read(np.arange(15, dtype=np.uint64))
    parts = [
        list(found(store.find(queries[None, places], k=20, threads=work.threads)))
        for places in work.cut(15)
    ]
    yield from map(np.concatenate, zip(*parts, strict=True))


def indexed(name, options, *questions):
    def compute(work):
        import whence

        rows = work.rows(900 * work.size, 160)
        if name.startswith("hnsw"):  # which is not walked where norms differ much
            rows /= np.linalg.norm(rows, axis=1, keepdims=True)
        index = whence.Index(work.store(rows, "float32"), threads=work.threads, **options)
        queries = work.rows(15, 160, seed=1)
        for question in questions:
            yield from asked(work, index.search, queries, **question)
        if options["method"] != "exact":
            path = index.save(work.path())
            for file in sorted(path.glob("*.npy")):
                yield np.load(file)

    return named(f"Index, {name}", compute)


indexed("exact", {"method": "exact"}, {"k": 20}, {"k": 200}, {"k": 5, "diverse": 8})
CERTIFIED = ({"k": 20}, {"k": 20, "approximate": True}, {"k": 200, "side": "harmful"})
indexed("certified", {"method": "certified", "basis": "none"}, *CERTIFIED)
indexed("certified by rows", {"method": "certified", "basis": "rows"}, *CERTIFIED)
indexed("certified by eigenvectors", {"method": "certified", "basis": "eigen"}, *CERTIFIED)
indexed("certified of 4 bits", {"method": "certified", "bits": 4, "basis": "none"}, *CERTIFIED)
indexed(
    "hnsw",
    {"method": "hnsw"},
    {"k": 20},
    {"k": 20, "approximate": True, "side": "helpful"},
    {"k": 20, "approximate": True, "side": "helpful", "ef": 200},
)


@result
def index_that_grows(work):
    import whence

    rows = work.rows(900 * work.size, 64)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    for method in ("certified", "hnsw"):
        index = whence.Index(rows[:400], method, basis="none", threads=work.threads)
        index.add(rows, threads=work.threads)
        index.delete([3, 77])
        side = "helpful" if method == "hnsw" else "both"
        options = {"k": 20, "approximate": True, "side": side}
        yield from asked(work, index.search, work.rows(15, 64, seed=1), **options)


# Hashing


def families(whence, threads):
    yield whence.hashing.SignHash(300, seed=5, threads=threads)
    yield whence.hashing.PStableHash(40, width=0.5, levels=3, seed=5, threads=threads)


@result
def hash_codes(work):
    import whence

    rows = work.rows(300 * work.size, 77)
    for family in families(whence, work.threads):
        yield work.joined(family.project, rows)
        codes = work.joined(family.codes, rows)
        yield codes
        pairs = np.random.default_rng(0).integers(0, len(rows), (500, 2))
        yield work.joined(lambda pairs, f=family, codes=codes: f.similarity(codes, pairs), pairs)


@result
def hash_searches(work):
    import whence

    rows, queries = work.rows(600 * work.size, 77), work.rows(15, 77, seed=1)
    for family in families(whence, work.threads):
        for band, probes in ((None, None), (8, None), (8, 5)):
            index = whence.hashing.HashIndex(rows, family, band=band, threads=work.threads)
            yield index.codes
            ends = ("largest",) if probes and family.name != "sign" else ("largest", "smallest")
            for end in ends:
                options = {"k": 9, "candidates": 60, "probes": probes, "end": end}
                parts = [index.search(queries[at], **options) for at in work.cut(len(queries))]
                for field in ("positions", "scores", "rescored"):
                    yield np.concatenate([getattr(part, field) for part in parts])


@result
def hash_graphs(work):
    import whence

    rows = work.rows(500 * work.size, 40)
    labels = np.arange(len(rows)) % 4
    batches = whence.hashing.stratified_batches(labels, 150, seed=2)
    yield from batches
    for graph in (
        whence.hashing.hash_graph(rows, width=2.0, levels=3, views=2, threads=work.threads),
        whence.hashing.distance_graph(rows, batches, k=7, threads=work.threads),
        whence.hashing.distance_graph(rows, batches, k=None, threshold=0.4, threads=work.threads),
    ):
        yield graph.starts
        yield graph.neighbours
        yield graph.weights
        yield whence.hashing.softmax_importance(graph)
        yield whence.hashing.select_instances(graph, rows, labels, reduction=0.9).indices


@result
def near_duplicates(work):
    import whence

    rows = np.repeat(work.rows(100 * work.size, 40), 5, axis=0)
    rows += 0.05 * work.rows(500 * work.size, 40, seed=1)
    for cap in (3, 4096):
        yield whence.hashing.near_duplicates(rows, band=8, cap=cap, threads=work.threads)


# Texts


def texts(name):
    def compute(work):
        import whence

        count = 400 * work.size
        words = np.random.default_rng(work.seed).zipf(1.3, (count, 50)) % 3000
        documents = [row[: 3 + at % 47].tolist() for at, row in enumerate(words)]
        parts = [[documents[at] for at in places] for places in work.cut(count)]
        index = getattr(whence.text, name)(parts[0], threads=work.threads)
        for part in parts[1:]:
            index.add(part, threads=work.threads)
        asked = [[documents[at] for at in places] for places in work.cut(30)]
        yield np.concatenate([index.scores(part, threads=work.threads) for part in asked])
        hits = [index.search(part, k=20, threads=work.threads).helpful for part in asked]
        yield np.concatenate([each.positions for each in hits])
        yield np.concatenate([each.scores for each in hits])

    return named(name, compute)


texts("TfIdf")
texts("Bm25")


@result
def embeddings(work):
    import whence

    vectors, queries = work.rows(500 * work.size, 60), work.rows(15, 60, seed=1)
    index = whence.text.Embedding(vectors, threads=work.threads)
    parts = [index.search(queries[at], k=9, threads=work.threads) for at in work.cut(15)]
    yield np.concatenate([part.helpful.positions for part in parts])
    yield np.concatenate([part.helpful.scores for part in parts])


# The trial


def digest_of(arrays):
    """Of every bit of arrays, their types and shapes."""
    total = hashlib.sha256()
    for array in arrays:
        array = np.asarray(array)
        total.update(f"{array.dtype.str} {array.shape}".encode())
        total.update(np.ascontiguousarray(array).tobytes())
    return total.hexdigest()


CASES = [(threads, parts) for threads in THREADS for parts in PARTS]


def serve(cases: str, size: str, seed: str) -> None:
    """Says the instruction set of this process, and the digest of each result of each case."""
    from whence import _core

    os.fsync = lambda _: None  # no power is cut in this trial
    found = {}
    with trial.scratch() as folder:
        for threads, parts in json.loads(cases):
            work = Work(threads, parts, int(size), int(seed), folder)
            for name, compute in RESULTS.items():
                found[f"{name} | {threads} threads, {parts} parts"] = digest_of(compute(work))
    trial.say(json.dumps({"set": _core.instruction_set(), "found": found}))


def by_set(instructions: str, cases: Any, size: int, seed: int) -> dict[str, str] | None:
    """Result and case -> digest, by an instruction set; None if the processor does not have it."""
    done = subprocess.run(
        [sys.executable, __file__, "--serve", json.dumps(cases), str(size), str(seed)],
        env={**os.environ, "WHENCE_INSTRUCTION_SET": instructions},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    answer = json.loads(done.stdout)
    return answer["found"] if answer["set"] == instructions else None


def run(count: int, seed: int, sets: Any = SETS, cases: Any = CASES) -> trial.Outcome:
    """As much work in each result."""
    outcome = trial.Outcome("same bits", DIFFER)
    expected: dict[str, str] = {}
    for instructions in sets:
        found = by_set(instructions, cases, count, seed)
        if found is None:
            continue
        outcome.counts["combinations"] += len(cases)
        for case, digest in found.items():
            # That of the first set on one thread, of everything at once, is the first there is.
            if expected.setdefault(case.partition(" | ")[0], digest) != digest:
                outcome.miss(DIFFER, f"{case}, {instructions}")
    outcome.counts["results"] = len(expected)
    return outcome


if __name__ == "__main__":
    if sys.argv[1:2] == ["--serve"]:
        serve(*sys.argv[2:])
    else:
        trial.main(run, short=1, full=8)
