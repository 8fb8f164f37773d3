"""Speed of a recorded training step of a small model, beside the same step alone."""

import itertools

import numpy as np
import pytest
import torch
from torch import nn

import whence

BATCH = 32


@pytest.fixture
def model():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    torch.set_num_threads(before)


@pytest.fixture
def backward(model):
    images, labels = torch.randn(BATCH, 64), torch.randint(10, (BATCH,))

    def run():
        nn.functional.cross_entropy(model(images), labels).backward()

    return run


def test_step_alone(benchmark, backward):
    benchmark(backward)


@pytest.mark.parametrize("weight_gradients", [True, False])
def test_step_recorded(benchmark, model, backward, tmp_path, weight_gradients):
    firsts = itertools.count(0, BATCH)

    def run():
        first = next(firsts)
        with recorder.batch(np.arange(first, first + BATCH)):
            backward()

    with whence.record(
        model, tmp_path / "store", threads=1, weight_gradients=weight_gradients
    ) as recorder:
        benchmark(run)
    assert recorder.rows == next(firsts)
