"""Factors against their definition, computed example by example with torch.func."""

from functools import cache

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from curvature_oracle import (
    NAMES,
    batches,
    block_gradients,
    case,
    covariances,
    dense,
    exact_gradients,
    positions,
    rotated_gradients,
    squares,
    wide,
)
from torch import nn

import whence
from whence import errors


def fit(model, loader, loss=squares, **options):
    given = {"labels": "empirical", "sample": 9, "progress": False, **options}
    return whence.fit_factors(model, loader, lambda *batch: loss(model, *batch), **given)


@cache
def fitted(name, **options):
    """Factors of a case, and the case."""
    model, loss, x = case(name)
    return fit(model, batches(x), loss, **options), model, loss, x


def known(factors, checkpoint=0):
    return factors.checkpoints[checkpoint].statistics.known


def close(found, expected, tolerance=1e-5):
    """Whether they are equal but for rounding; biases and norms of any model are float32."""
    assert found.shape == expected.shape
    return float((found - expected).abs().max()) <= tolerance * float(expected.abs().max())


WITH_POSITIONS = [name for name in NAMES if name != "layer norm"]


@pytest.mark.parametrize("name", NAMES)
def test_covariances_are_sums_over_positions(name):
    factors, model, loss, x = fitted(name)
    observed = positions(model, loss, x)
    mine = {key: each for key, each in known(factors).items() if key[2] != "vector"}
    assert set(mine) == set(observed)
    for key, each in mine.items():
        outputs, inputs, terms = covariances(observed[key], bias=each.block.bias is not None)
        sides = [outputs, inputs] if each.block.ones == "right" else [inputs, outputs]
        assert each.terms == terms
        assert close(each.left.sums[0], sides[0], 1e-12)
        if key[2] == "outer":
            assert close(each.right.sums[0], sides[1], 1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_every_parameter_is_in_one_block(name):
    factors, model, _, _ = fitted(name)
    values = {}
    for each in known(factors).values():
        block = each.block
        values.setdefault((block.parameter, block.kind), []).append(int(np.prod(block.shape)))
        if block.bias is not None:
            values.setdefault((block.bias[0], "bias"), []).append(block.bias[2])
    sizes = {parameter.numel() for parameter in model.parameters()}
    assert {sum(each) for each in values.values()} == sizes
    tied = len(list(model.named_parameters(remove_duplicate=False)))
    assert len(values) == tied


@pytest.mark.parametrize("name", NAMES)
def test_eigenvectors_take_the_covariances_apart(name):
    factors, _, _, _ = fitted(name)
    for each in known(factors).values():
        block = each.block
        for side, covariance, length in (
            (block.left, each.left, block.shape[1 if block.kind == "lookup" else 0]),
            (block.right, each.right, block.shape[1]),
        ):
            if side is None:
                continue
            vectors = dense(side, length)
            assert close(vectors.T @ vectors, torch.eye(len(vectors), dtype=torch.float64), 1e-6)
            values = vectors.T @ covariance.sums[0] @ vectors
            assert close(values, torch.diag(values.diagonal()), 1e-6)
            assert (values.diagonal().diff() <= 1e-6 * values.max()).all()


@pytest.mark.parametrize("name", NAMES)
def test_eigenvalues_are_the_second_moments_of_exact_gradients(name):
    factors, model, loss, x = fitted(name)
    exact = exact_gradients(model, loss, x)
    for key, values in factors.eigenvalues().items():
        gradients = rotated_gradients(exact[key[2]], known(factors)[key].block)
        assert close(values, gradients.square().mean(0))


@pytest.mark.parametrize("name", NAMES)
def test_uncorrected_eigenvalues_are_products(name):
    factors, model, loss, x = fitted(name, corrected=False)
    corrected = fitted(name)[0].eigenvalues()
    observed = positions(model, loss, x)
    for key, values in factors.eigenvalues().items():
        if key[2] != "outer":
            assert torch.equal(values, corrected[key])
            continue
        block = known(factors)[key].block
        outputs, inputs, terms = covariances(observed[key], bias=block.bias is not None)
        outputs, inputs = outputs / len(x), inputs / terms
        left, right = (outputs, inputs) if block.ones == "right" else (inputs, outputs)
        kronecker = torch.kron(left, right)
        vectors = torch.kron(dense(block.left, block.shape[0]), dense(block.right, block.shape[1]))
        assert close(vectors @ torch.diag(values.flatten()) @ vectors.T, kronecker, 1e-6)
