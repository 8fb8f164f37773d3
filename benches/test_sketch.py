"""Speed of the sketch, beside the speed at which the same array can be read."""

import time

import numpy as np
import pytest

import whence
from whence.sketch import Accumulator

BATCH, PARAMETERS = 8, 1 << 20


@pytest.fixture(scope="module")
def gradients():
    return np.random.default_rng(0).standard_normal((BATCH, PARAMETERS), np.float32)


@pytest.fixture(scope="module")
def read_gigabytes(gradients):
    """GB/s at which the array is read, by the fastest of 20 inner products of it with itself."""
    flat = gradients.reshape(-1)
    seconds = []
    for _ in range(20):
        start = time.perf_counter()
        flat @ flat
        seconds.append(time.perf_counter() - start)
    return flat.nbytes / min(seconds) / 1e9


def note_speed(benchmark, gradients, read_gigabytes):
    if benchmark.stats is None:  # --benchmark-disable
        return
    benchmark.extra_info["GB/s"] = gradients.nbytes / benchmark.stats.stats.median / 1e9
    benchmark.extra_info["GB/s read"] = read_gigabytes


@pytest.mark.parametrize("dim", [512, 4096])
def test_flat_gradients_into_running_totals(benchmark, gradients, read_gigabytes, dim):
    totals = Accumulator(whence.Sketch(dim=dim, threads=1), BATCH)
    bad = benchmark(totals.add, "weight", [PARAMETERS], gradients)
    assert bad == []
    note_speed(benchmark, gradients, read_gigabytes)


@pytest.mark.parametrize("dim", [512, 4096])
def test_sketch_call(benchmark, gradients, read_gigabytes, dim):
    rows = benchmark(whence.Sketch(dim=dim, threads=1), gradients)
    assert rows.shape == (BATCH, dim)
    note_speed(benchmark, gradients, read_gigabytes)


def test_fused_linear_layer(benchmark):
    random = np.random.default_rng(0)
    left, right = random.standard_normal((2, BATCH, 128, 256), np.float32)
    totals = Accumulator(whence.Sketch(dim=4096, threads=1), BATCH)
    bad = benchmark(totals.add_outer, "weight", [256, 256], left, right)
    assert bad == []
