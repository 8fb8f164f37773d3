"""Speed of a search in a store of 20,000 examples."""

import numpy as np
import pytest

import whence
from whence.store import Checkpoint, Manifest, Writer

EXAMPLES, DIM = 20_000, 512


@pytest.fixture(scope="module", params=["float16", "int8", "int4"])
def store(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("search") / "store"
    spec = whence.Sketch(dim=DIM).spec
    writer = Writer(path, Manifest(spec, request.param, "mean", {"digest": "", "parameters": []}))
    writer.set_checkpoint(Checkpoint("0"))
    rows = np.random.default_rng(0).standard_normal((EXAMPLES, DIM), np.float32)
    writer.append(np.arange(EXAMPLES), rows, {})
    writer.close()
    return whence.open(path)


@pytest.mark.parametrize("queries", [1, 32])
def test_search(benchmark, store, queries):
    rows = np.random.default_rng(1).standard_normal((queries, DIM), np.float32)
    hits = benchmark(store.search, rows, 10, threads=1)
    assert hits.helpful.ids.shape == (queries, 10)


def test_open_and_search(benchmark, store):
    rows = np.random.default_rng(1).standard_normal((1, DIM), np.float32)
    hits = benchmark(lambda: whence.open(store.path).search(rows, 10, threads=1))
    assert hits.helpful.ids.shape == (1, 10)
