"""Preconditioned rows and scores against dense matrices of exact gradients."""

from functools import cache

import numpy as np
import pytest
import torch
from curvature_oracle import (
    NAMES,
    batches,
    block_gradients,
    case,
    dense,
    exact_gradients,
    rotated_gradients,
    squares,
    wide,
)
from torch import nn

import whence
from whence.gradients.blocks import Block


def fit(model, loader, loss=squares, **options):
    options = {"labels": "empirical", "sample": 9, "progress": False, **options}
    return whence.fit_factors(model, loader, lambda *batch: loss(model, *batch), **options)


def single(name):
    """A case in float32, in which rows are."""
    model, loss, x = case(name)
    return model.float(), loss, x.float() if x.is_floating_point() else x


@cache
def fitted(name, **options):
    model, loss, x = single(name)
    return fit(model, batches(x), loss, **options)


def recorded(path, model, factors, loss, *columns, sizes=(3, 4, 2), ids=None, **options):
    """Rows of all examples, by ids 0, 1, ..."""
    options = {"dtype": "float32", **options}
    ids = np.arange(len(columns[0])) if ids is None else ids
    with whence.record(model, path, precondition=factors, **options) as rec:
        for part, chosen in zip(
            batches(*columns, sizes=sizes), np.split(ids, np.cumsum(sizes)[:-1]), strict=True
        ):
            with rec.batch(chosen):
                loss(model, *part).backward()
    return whence.open(path)


def coordinates(factors, exact, checkpoint=0):
    """[examples, coordinates] by the definition: of largest share, block by block in order."""
    statistics = factors.checkpoints[checkpoint].statistics
    blocks = {key: each.block for key, each in statistics.known.items()}
    damped = factors.damped(checkpoint)
    shares = [(values / (values + damping)).flatten() for values, damping in damped.values()]
    every = torch.cat(shares)
    order = torch.argsort(every, descending=True, stable=True)[: factors.settings.coordinates]
    taken = torch.zeros(len(every), dtype=torch.bool)
    taken[order[every[order] > 0]] = True
    found = []
    for (key, (values, damping)), mask in zip(
        damped.items(), taken.split([len(each) for each in shares]), strict=True
    ):
        white = rotated_gradients(exact[key[2]], blocks[key]) / (values + damping).sqrt()
        mask = mask.reshape(values.shape)
        if key[2] == "lookup":  # row by row of the table
            white, mask = white.mT, mask.T
        found.append(white[:, mask])
    return torch.cat(found, 1)


def error(found, expected):
    """Largest relative error of a row."""
    found, expected = torch.as_tensor(np.asarray(found)).double(), expected.double()
    assert found.shape == expected.shape
    return float(((found - expected).norm(dim=1) / expected.norm(dim=1)).max())


# Rows


@pytest.mark.parametrize("weight_gradients", [True, False])
@pytest.mark.parametrize("width", [1, 7, 10_000])
@pytest.mark.parametrize("name", NAMES)
def test_rows_are_whitened_coordinates_of_exact_gradients(tmp_path, name, width, weight_gradients):
    model, loss, x = single(name)
    factors = fitted(name, coordinates=width)
    store = recorded(
        tmp_path / "store",
        model,
        factors,
        loss,
        x,
        rotate=False,
        weight_gradients=weight_gradients,
    )
    expected = coordinates(factors, exact_gradients(model, loss, x))
    scale = float(expected.norm(dim=1).max())
    found = torch.from_numpy(store.rows())
    assert found.shape == expected.shape
    assert float((found - expected).norm(dim=1).max()) < 2e-4 * scale


@pytest.mark.parametrize("options", [{"longest": 2}, {"corrected": False}, {"leading": 0.5}])
@pytest.mark.parametrize("name", ["linear over positions", "conv2d grouped", "conv1d transposed"])
def test_rows_of_other_factors(tmp_path, name, options):
    model, loss, x = single(name)
    factors = fitted(name, **options)
    store = recorded(tmp_path / "store", model, factors, loss, x, rotate=False)
    z = torch.from_numpy(store.rows()).double()
    exact = exact_gradients(model, loss, x)["outer"]
    expected = 0.0
    for choice in factors.maps[0].choices:
        values, damping = factors.damped()[choice.block.key]
        whole = factors.checkpoints[0].statistics.known[choice.block.key].block
        kept = torch.zeros_like(values)
        if options.get("leading"):
            rows, columns = (round(size / 2) for size in values.shape)
            kept[:rows, :columns] = 1
        else:
            kept += 1
        gradients = rotated_gradients(exact, whole)
        product = torch.einsum("ilr,lr,jlr->ij", gradients, kept / (values + damping), gradients)
        expected = expected + product
    assert float((z @ z.T - expected).abs().max()) < 1e-4 * float(expected.abs().max())


@pytest.mark.parametrize("name", NAMES)
def test_with_all_coordinates_a_score_is_that_of_the_dense_inverse(tmp_path, name):
    model, loss, x = single(name)
    factors = fitted(name, coordinates=10_000)
    store = recorded(tmp_path / "store", model, factors, loss, x, rotate=False)
    exact = exact_gradients(model, loss, x)
    expected = 0.0
    for key, (values, damping) in factors.damped().items():
        block = factors.checkpoints[0].statistics.known[key].block
        gradients = block_gradients(exact[key[2]], block).flatten(1)
        left = torch.eye(block.shape[0], dtype=torch.float64)
        right = torch.eye(block.shape[1], dtype=torch.float64)
        if key[2] == "lookup":
            right = dense(block.left, block.shape[1])
            diagonal = values.T.flatten()
        else:
            left = left if block.left is None else dense(block.left, block.shape[0])
            right = right if block.right is None else dense(block.right, block.shape[1])
            diagonal = values.flatten()
        vectors = torch.kron(left, right)
        curvature = vectors @ torch.diag(diagonal) @ vectors.T
        damped = curvature + damping * torch.eye(len(curvature), dtype=torch.float64)
        expected = expected + gradients @ torch.linalg.solve(damped, gradients.T)
    z = store.rows().astype(np.float64)
    # Float32 gradients, and eigenvectors that float32 holds to 1e-7.
    assert float((torch.from_numpy(z @ z.T) - expected).abs().max()) < 2e-4 * float(expected.max())


def test_thin_products_and_formed_gradients_give_the_same(tmp_path, monkeypatch):
    torch.manual_seed(4)
    model, x = wide(nn.Conv2d(8, 12, 3)).float(), torch.randn(9, 8, 12, 12)
    formed = []
    plain = Block.formed
    monkeypatch.setattr(Block, "formed", lambda *args: formed.append(1) or plain(*args))
    expected = exact_gradients(model, squares, x)
    for width, way in ((5, False), (10_000, True)):
        factors = fit(model, batches(x), coordinates=width)
        formed.clear()
        store = recorded(
            tmp_path / str(width),
            model,
            factors,
            squares,
            x,
            rotate=False,
            weight_gradients=False,
        )
        assert bool(formed) == way
        assert error(store.rows(), coordinates(factors, expected)) < 1e-4


def test_rows_do_not_depend_on_the_batch(tmp_path):
    for name in ("tied", "conv2d", "attention"):
        model, loss, x = single(name)
        factors = fitted(name)
        one, other = (
            recorded(
                tmp_path / f"{name}{len(sizes)}", model, factors, loss, x, sizes=sizes, rotate=False
            )
            for sizes in ((3, 4, 2), (1,) * 9)
        )
        assert error(one.rows(), torch.from_numpy(other.rows())) < 1e-5


@pytest.mark.parametrize("name", NAMES)
def test_a_rotation_onto_all_directions_keeps_every_product(tmp_path, name):
    model, loss, x = single(name)
    factors = fitted(name)
    most = factors.suggested_dim
    plain = recorded(tmp_path / "plain", model, factors, loss, x, rotate=False).rows()
    rotated = recorded(tmp_path / "rotated", model, factors, loss, x, dim=most).rows()
    assert rotated.shape == (9, most)
    expected = plain @ plain.T
    assert np.abs(rotated @ rotated.T - expected).max() < 2e-3 * np.abs(expected).max()


def test_the_leading_directions_are_those_of_rows_divided_by_the_root_of_their_norm(tmp_path):
    model, loss, x = single("perceptron")
    factors = fitted("perceptron")
    plain = recorded(tmp_path / "plain", model, factors, loss, x, rotate=False).rows()
    root = np.sqrt(np.linalg.norm(plain, axis=1, keepdims=True))
    unit = plain / root
    values = np.linalg.eigvalsh(unit @ unit.T)[::-1]
    for dim in (1, 3, 5):
        rows = recorded(tmp_path / str(dim), model, factors, loss, x, dim=dim).rows()
        unit = rows / root
        kept = np.linalg.eigvalsh(unit @ unit.T)[::-1]
        assert np.allclose(kept[:dim], values[:dim], rtol=1e-3)
        assert factors.energy(dim) == pytest.approx(values[:dim].sum() / values.sum(), rel=1e-3)
