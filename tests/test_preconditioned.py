"""Preconditioned rows and scores against dense matrices of exact gradients."""

import json
import shutil
import signal
import subprocess
import sys
import textwrap
import zlib
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from curvature_oracle import (
    NAMES,
    Conv1D,
    batches,
    block_gradients,
    case,
    dense,
    exact_gradients,
    rotated_gradients,
    squares,
    wide,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

import whence
from whence import errors
from whence.gradients.blocks import Block
from whence.gradients.coordinates import from_arrays, to_arrays
from whence.sketch import KINDS
from whence.store import Writer


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
    """[examples, coordinates] by the definition: those of largest share, block by block."""
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


@pytest.mark.parametrize("sketch", KINDS)
def test_a_random_sketch_is_a_linear_map_of_the_coordinates(tmp_path, sketch):
    model, loss, x = single("perceptron")
    factors = fitted("perceptron")
    plain = recorded(tmp_path / "plain", model, factors, loss, x, rotate=False).rows()
    store = recorded(
        tmp_path / "s",
        model,
        factors,
        loss,
        x,
        sketch=sketch,
        dim=24,
        seed=3,
        weight_gradients=False,
    )
    random = whence.Sketch(sketch, dim=24, seed=3)({"0": plain})
    assert store.rows().shape == (9, 24)
    assert error(store.rows(), torch.from_numpy(random)) < 1e-5
    whole = whence.Sketch(sketch, dim=24, seed=3)
    again = recorded(tmp_path / "t", model, factors, loss, x, sketch=whole)
    assert np.array_equal(again.rows(), store.rows())


# Scores


def perturbed(model, seed):
    torch.manual_seed(seed)
    found = {
        name: value + 0.3 * torch.randn_like(value) for name, value in model.state_dict().items()
    }
    return found


def at(model, state):
    model.load_state_dict(state)
    return model


MAPS = [
    {"rotate": False},
    {"dim": 9},
    {"sketch": "rademacher", "dim": 2048},
]


@pytest.mark.parametrize("options", MAPS)
@pytest.mark.parametrize("name", ["perceptron", "conv2d", "tied"])
def test_scores_of_queries_are_preconditioned_products(tmp_path, name, options):
    model, loss, x = single(name)
    factors = fitted(name)
    store = recorded(tmp_path / "store", model, factors, loss, x, **options)
    asked = x[2:5]
    hits = whence.query(model, store, lambda: loss(model, asked), k=9)
    z = coordinates(factors, exact_gradients(model, loss, x))
    expected = (z[2:5] @ z.T).numpy()
    tolerance = 0.2 if "sketch" in options else 2e-3
    for query, (ids, scores) in enumerate(zip(hits.helpful.ids, hits.helpful.scores, strict=True)):
        assert np.abs(scores - expected[query, ids]).max() < tolerance * expected.max()
        rows = store.rows()
        assert np.allclose(scores, (rows[ids] @ rows[2 + query]), rtol=1e-4, atol=1e-5)
    assert "influence" in hits.method
    assert "EK-FAC" in hits.method


def checkpoints_of(model, loader, loss, count=2):
    """States of a run, and the factors of each and of all."""
    states = {f"c{number}": perturbed(model, number) for number in range(count)}
    alone = {
        name: fit(at(model, state), loader, loss, states={name: state})
        for name, state in states.items()
    }
    return states, alone


@pytest.mark.parametrize("options", [{"rotate": False}, {"sketch": "gaussian", "dim": 12}])
def test_each_checkpoint_has_a_map_of_its_own(tmp_path, options):
    model, loss, x = single("perceptron")
    states, alone = checkpoints_of(model, batches(x), loss)
    expected = []
    with whence.record(
        model, tmp_path / "s", precondition=alone["c0"], dtype="float32", **options
    ) as rec:
        for name in states:
            at(model, states[name])
            rec.checkpoint(name, precondition=alone[name])
            with rec.batch(range(9)) as done:
                loss(model, x).backward()
            z = coordinates(alone[name], exact_gradients(model, loss, x))
            if "sketch" in options:
                sketch = whence.Sketch("gaussian", dim=12)
                z = torch.from_numpy(sketch({name: z.float().numpy()})).double()
            assert error(done.rows, z) < 2e-4
            expected.append(z)
        at(model, states["c0"])  # and back
        rec.checkpoint("c0", precondition=alone["c0"])
        with rec.batch([9]) as done:
            loss(model, x[:1]).backward()
        assert error(done.rows, expected[0][:1]) < 2e-4
        at(model, states["c1"])
        rec.checkpoint("c1", precondition=alone["c1"])
        with rec.batch([9]):
            loss(model, x[:1]).backward()
    store = whence.open(tmp_path / "s")
    assert store.checkpoints == ["c0", "c1"]
    hits = whence.query(model, store, lambda: loss(model, x[:2]), states=states, k=10)
    scores = sum((z[:2] @ z.T).numpy() / 2 for z in expected)  # averaged over checkpoints
    for query, (ids, found) in enumerate(zip(hits.helpful.ids, hits.helpful.scores, strict=True)):
        assert np.allclose(found, scores[query, np.where(ids == 9, 0, ids)], rtol=1e-3, atol=1e-3)


def test_recording_goes_on_with_the_map_of_the_store(tmp_path):
    model, loss, x = single("perceptron")
    factors = fitted("perceptron")
    options = {"dtype": "float32", "dim": 4, "on_duplicate": "skip"}
    for first in (0, 3):
        with (
            whence.record(model, tmp_path / "s", precondition=factors, **options) as rec,
            rec.batch(range(first, first + 6)),
        ):
            loss(model, x[first : first + 6]).backward()
    store = whence.open(tmp_path / "s")
    whole = recorded(tmp_path / "t", model, factors, loss, x, dim=4)
    assert np.allclose(store.rows(), whole.rows(), rtol=1e-4, atol=1e-5)
    assert len(list((tmp_path / "s").glob("map-*"))) == 1


def test_other_factors_of_a_checkpoint_that_is_there_change_nothing(tmp_path):
    model, loss, x = single("perceptron")
    factors = fitted("perceptron")
    other = fit(model, batches(x[:6], sizes=(3, 3)), loss)
    options = {"dtype": "float32", "sketch": "rademacher", "dim": 16}
    with whence.record(model, tmp_path / "s", precondition=factors, **options) as rec:
        with rec.batch(range(9)) as before:
            loss(model, x).backward()
        rec.checkpoint("0", precondition=other)
        with rec.batch(range(9, 18)) as after:
            loss(model, x).backward()
    assert error(after.rows, torch.from_numpy(before.rows)) < 1e-5


def test_verify_compares_coordinates_with_exact_gradients(tmp_path):
    for name in ("perceptron", "conv2d", "layer norm", "tied", "attention"):
        model, loss, x = single(name)
        factors = fitted(name)
        for options in ({"rotate": False}, {"dim": 3}, {"sketch": "rademacher", "dim": 16}):
            path = tmp_path / f"{name}{len(options)}{options.get('dim')}"
            with whence.record(model, path, precondition=factors, **options) as rec:
                found = rec.verify(lambda x, model=model, loss=loss: loss(model, x), [x[:2]])
                assert found.gradient < 1e-4
                wrong = lambda x, model=model, loss=loss: loss(model, x) * len(x)  # noqa: E731
                with pytest.raises(errors.LayerError, match="reduction must fit the loss"):
                    rec.verify(wrong, [x[:2]])


def test_examples_whose_gradient_is_not_finite_are_named_or_left_out(tmp_path):
    model, loss, x = single("perceptron")
    factors = fitted("perceptron")
    x = x.clone()
    x[4] = torch.inf
    with pytest.raises(errors.NotFiniteError, match="id 4 "):
        recorded(tmp_path / "s", model, factors, loss, x, rotate=False)
    store = recorded(tmp_path / "t", model, factors, loss, x, rotate=False, nonfinite="skip")
    assert store.ids.tolist() == [0, 1, 2, 3, 5, 6, 7, 8]
    assert store.skipped == [("0", 4)]
    with pytest.raises(errors.NotFiniteError, match="query 1 "):
        whence.query(model, store, lambda: loss(model, x[3:6]))


def test_stores_that_are_not_preconditioned_have_no_map(tmp_path):
    model, loss, x = single("perceptron")
    recorded(tmp_path / "s", model, None, loss, x, dim=16)
    found = whence.open(tmp_path / "s")
    assert found.manifest.checkpoints[0].map is None
    assert "EK-FAC" not in found.method


# One row an example for all checkpoints


def together(path, model, factors, loss, loader, **options):
    options = {"dtype": "float32", "progress": False, **options}
    whence.record_checkpoints(
        model, path, loader, lambda *batch: loss(model, *batch), precondition=factors, **options
    )
    return whence.open(path)


def weighted_products(model, loss, x, states, factors):
    """[examples, examples] Σ_c w_c z_ic · z_jc, by the definition."""
    total = 0.0
    for number, point in enumerate(factors.checkpoints):
        at(model, states[point.name])
        z = coordinates(factors, exact_gradients(model, loss, x), number)
        total = total + point.weight * (z @ z.T)
    return total.numpy()


WEIGHTS = [None, {"c0": 1.0, "c1": 3.0}]


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("name", ["perceptron", "conv2d", "embedding"])
def test_rows_of_a_run_give_the_weighted_sum_over_its_checkpoints(tmp_path, name, weights):
    model, loss, x = single(name)
    states, _ = checkpoints_of(model, batches(x), loss)
    factors = fit(model, batches(x), loss, states=states, weights=weights)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    most = factors.rank
    other_order = dict(reversed(states.items()))
    store = together(tmp_path / "s", model, factors, loss, batches(x), states=other_order, dim=most)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    rows = store.rows()
    assert rows.shape == (9, most)
    expected = weighted_products(model, loss, x, states, factors)
    assert np.abs(rows @ rows.T - expected).max() < 5e-3 * np.abs(expected).max()
    hits = whence.query(model, store, lambda: loss(model, x[:2]), states=states, k=9)
    for query, (ids, scores) in enumerate(zip(hits.helpful.ids, hits.helpful.scores, strict=True)):
        assert np.allclose(scores, rows[ids] @ rows[query], rtol=1e-4, atol=1e-4)
    assert "c0, c1" in hits.method


@pytest.mark.parametrize("weights", WEIGHTS)
def test_rows_of_a_run_can_be_sketched(tmp_path, weights):
    model, loss, x = single("perceptron")
    states, _ = checkpoints_of(model, batches(x), loss)
    factors = fit(model, batches(x), loss, states=states, weights=weights)
    store = together(
        tmp_path / "s", model, factors, loss, batches(x), states=states, sketch="gaussian", dim=16
    )
    expected = 0.0
    for number, point in enumerate(factors.checkpoints):
        at(model, states[point.name])
        z = coordinates(factors, exact_gradients(model, loss, x), number).float().numpy()
        sketch = whence.Sketch("gaussian", dim=16)
        expected = expected + point.weight**0.5 * sketch({point.name: z})
    assert error(store.rows(), torch.from_numpy(expected)) < 2e-4


def test_a_run_of_one_checkpoint_is_as_record(tmp_path):
    model, loss, x = single("perceptron")
    factors = fitted("perceptron")
    one = together(tmp_path / "one", model, factors, loss, batches(x), dim=5)
    other = recorded(tmp_path / "other", model, factors, loss, x, dim=5)
    assert error(one.rows(), torch.from_numpy(other.rows())) < 1e-5
    assert one.ids.tolist() == list(range(9))
    assert one.manifest.rows == "combined"


def test_ids_and_columns_of_a_run(tmp_path):
    model, loss, x = single("perceptron")
    factors = fitted("perceptron")
    names = np.array([f"n{i}" for i in range(9)])
    loader = [(part, chosen) for (part,), chosen in zip(batches(x), np.split(names, [3, 7]))]  # noqa: B905

    def own(model, x, names):
        return loss(model, x)

    store = together(
        tmp_path / "s",
        model,
        factors,
        own,
        loader,
        ids=lambda x, names: names,
        columns=lambda x, names: {"first": x[:, 0], "name": list(names)},
    )
    assert store.ids.tolist() == names.tolist()
    assert np.allclose(store.columns["first"], x[:, 0])
    assert store.columns["name"].tolist() == names.tolist()
    listed = together(tmp_path / "t", model, factors, own, loader, ids=list(names))
    assert listed.ids.tolist() == names.tolist()
    assert np.array_equal(listed.rows(), store.rows())


def test_a_second_call_records_what_is_not_there(tmp_path):
    model, loss, x = single("perceptron")
    states, _ = checkpoints_of(model, batches(x), loss)
    factors = fit(model, batches(x), loss, states=states)
    options = {"states": states, "dim": 6}
    whole = together(tmp_path / "whole", model, factors, loss, batches(x), **options)
    runs = []

    def counted(model, x):
        runs.append(1)
        return loss(model, x)

    together(tmp_path / "s", model, factors, counted, batches(x)[:2], **options)
    assert len(runs) == 4
    store = together(tmp_path / "s", model, factors, counted, batches(x), **options)
    assert len(runs) == 6
    assert store.ids.tolist() == list(range(9))
    assert np.array_equal(store.rows(), whole.rows())
    assert len(list((tmp_path / "s").glob("map-*"))) == 2


def test_examples_without_a_finite_gradient_at_every_checkpoint_are_left_out(tmp_path):
    model, loss, x = single("perceptron")
    states, _ = checkpoints_of(model, batches(x), loss)
    factors = fit(model, batches(x), loss, states=states)
    ids = [f"n{i}" for i in [0, 1, 2, 3, 10, 5, 6, 7, 8]]
    options = {"states": states, "dim": 6, "ids": ids}
    with pytest.raises(errors.NotFiniteError, match="'n10'"):
        together(tmp_path / "s", model, factors, naughty(x, states), batches(x), **options)
    options["nonfinite"] = "skip"
    store = together(tmp_path / "t", model, factors, naughty(x, states), batches(x), **options)
    assert store.ids.tolist() == [id_ for id_ in ids if id_ != "n10"]
    assert store.skipped == [("combined", "n10")]
    fine = naughty(x, states, factor=1.0)
    whole = together(tmp_path / "u", model, factors, fine, batches(x), states=states, dim=6)
    good = [place for place in range(9) if place != 4]
    assert error(store.rows(), torch.from_numpy(whole.rows()[good])) < 1e-5
    again = together(tmp_path / "t", model, factors, naughty(x, states), batches(x), **options)
    assert len(again) == 8  # what was left out is not tried again


def test_an_id_is_not_one_that_was_left_out_cut_short(tmp_path):
    model, loss, x = single("perceptron")
    states, _ = checkpoints_of(model, batches(x), loss)
    factors = fit(model, batches(x), loss, states=states)
    options = {"states": states, "dim": 6, "nonfinite": "skip"}
    bad = naughty(x, states)
    together(tmp_path / "s", model, factors, bad, [(x[4:5],)], ids=["n10"], **options)
    store = together(tmp_path / "s", model, factors, bad, [(x[:1],)], ids=["n1"], **options)
    assert store.ids.tolist() == ["n1"]


def naughty(x, states, factor=torch.inf):
    """A loss whose gradient is infinite for the fifth example at the second checkpoint."""

    def loss(model, batch):
        second = torch.equal(model[0].weight.detach(), states["c1"]["0.weight"])
        far = (batch == x[4]).all(1) & second
        out = model(batch)
        return ((out - 0.3).square().sum(1) * torch.where(far, factor, 1.0)).mean()

    return loss


def test_weights_must_stay_what_the_factors_are_of(tmp_path):
    model, loss, x = single("perceptron")
    factors = fitted("perceptron")
    state = {name: value.clone() for name, value in model.state_dict().items()}

    def move():
        with torch.no_grad():
            model[0].weight += 1

    with whence.record(model, tmp_path / "s", precondition=factors, dim=4) as rec:
        with rec.batch(range(3)):
            loss(model, x[:3]).backward()
        move()
        with pytest.raises(errors.WeightsError, match="got others"), rec.batch(range(3, 6)):
            pass
        rec.checkpoint("0")
        with pytest.raises(errors.WeightsError, match="got others"), rec.batch(range(3, 6)):
            pass
        rec.checkpoint("1")
        with (
            pytest.raises(errors.WeightsError, match="precondition must be fitted"),
            rec.batch([3]),
        ):
            pass
        model.load_state_dict(state)
        rec.checkpoint("0")
        with rec.batch(range(3, 6)):
            loss(model, x[3:6]).backward()
    assert whence.open(tmp_path / "s").rows(checkpoint="0").shape == (6, 4)
    move()
    options = {"dim": 4, "weights": "moving"}
    with whence.record(model, tmp_path / "t", precondition=factors, **options) as rec:
        for first in (0, 3):
            with rec.batch(range(first, first + 3)):
                loss(model, x[first : first + 3]).backward()
            move()
    assert len(whence.open(tmp_path / "t")) == 6


# Coordinates of several checkpoints to one short row


@pytest.fixture(scope="module")
def staged(tmp_path_factory):
    """A store of coordinates at two checkpoints, and what they were recorded with."""
    model, loss, x = single("perceptron")
    path = tmp_path_factory.mktemp("staged") / "s"
    loader = batches(x)
    states, alone = checkpoints_of(model, loader, loss)
    options = {"dtype": "float32", "rotate": False}
    with whence.record(model, path, precondition=alone["c0"], **options) as rec:
        for name in states:
            at(model, states[name])
            rec.checkpoint(name, precondition=alone[name])
            for (part,), ids in zip(loader, np.split(np.arange(9), [3, 7]), strict=True):
                with rec.batch(ids, label=ids % 3):
                    loss(model, part).backward()
    return path, model, loss, x, states


def compressed(source, path, **options):
    options = {"dtype": "float32", "dim": 7, "progress": False, **options}
    whence.compress(source, path, **options)
    return whence.open(path)


@pytest.mark.parametrize("weights", WEIGHTS)
def test_compressed_rows_are_those_recorded_together(tmp_path, staged, weights):
    path, model, loss, x, states = staged
    store = compressed(path, tmp_path / "s", weights=weights)
    factors = fit(model, batches(x), loss, states=states, weights=weights)
    at(model, states["c0"])
    whole = together(tmp_path / "t", model, factors, loss, batches(x), states=states, dim=7)
    one, other = store.rows(), whole.rows()
    assert np.abs(one @ one.T - other @ other.T).max() < 1e-4 * np.abs(other @ other.T).max()
    assert store.ids.tolist() == list(range(9))
    assert store.columns["label"].tolist() == [i % 3 for i in range(9)]
    closure = lambda: loss(model, x[4:6])  # noqa: E731
    hits = [
        whence.query(model, each, closure, states=states, k=9).helpful for each in (store, whole)
    ]
    assert np.array_equal(hits[0].ids, hits[1].ids)
    assert np.allclose(hits[0].scores, hits[1].scores, rtol=1e-3, atol=1e-3)
    assert np.allclose(hits[0].scores[0], one[hits[0].ids[0]] @ one[4], rtol=1e-3, atol=1e-3)


def test_a_second_call_compresses_what_is_not_there(tmp_path, staged, monkeypatch):
    whole = compressed(staged[0], tmp_path / "whole")
    monkeypatch.setattr("whence.curvature.compression.CHUNK", 2)
    written = []
    append = Writer.append

    def stopping(self, ids, *rest):
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(ids.tolist())
        append(self, ids, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(Writer, "append", stopping)
        with pytest.raises(KeyboardInterrupt):
            compressed(staged[0], tmp_path / "s")
    assert written == [[0, 1], [2, 3]]
    assert whence.open(tmp_path / "s").ids.tolist() == [0, 1, 2, 3]
    store = compressed(staged[0], tmp_path / "s")
    assert store.ids.tolist() == list(range(9))
    assert error(store.rows(), torch.from_numpy(whole.rows())) < 1e-5
    assert len(list((tmp_path / "s").glob("map-*"))) == 2


def test_examples_that_lack_a_checkpoint_are_named_or_left_out(tmp_path, staged):
    path, model, loss, x, states = staged
    shutil.copytree(path, tmp_path / "lacking")
    at(model, states["c1"])
    factors = fit(model, batches(x), loss, states={"c1": states["c1"]})
    with (
        whence.record(
            model, tmp_path / "lacking", precondition=factors, rotate=False, dtype="float32"
        ) as rec,
        rec.batch([9], label=[0]),
    ):
        loss(model, x[:1]).backward()
    with pytest.raises(errors.IdError, match="got 9 without one"):
        compressed(tmp_path / "lacking", tmp_path / "s")
    store = compressed(tmp_path / "lacking", tmp_path / "s", missing="drop")
    assert store.ids.tolist() == list(range(9))


@pytest.mark.parametrize(
    ("options", "kind", "match"),
    [
        ({"dim": 0}, errors.ArgumentError, "dim must be"),
        ({"dim": 10}, errors.ArgumentError, "dim must be at most 9"),
        ({"dim": 5, "sample": 4}, errors.ArgumentError, "dim must be at most 4"),
        ({"dim": 1.5}, errors.DtypeError, "dim must be an integer"),
        ({"sample": 1}, errors.ArgumentError, "sample must be"),
        ({"seed": -1}, errors.ArgumentError, "seed must be"),
        ({"missing": "keep"}, errors.ArgumentError, "missing must be"),
        ({"dtype": "float64"}, errors.ArgumentError, "dtype must be"),
        ({"weights": {"c0": 1}}, errors.CheckpointError, "weights must be one for each"),
        ({"weights": {"c0": 1, "c1": 0}}, errors.ArgumentError, "positive"),
    ],
)
def test_wrong_arguments_of_compress_leave_no_store(tmp_path, staged, options, kind, match):
    with pytest.raises(kind, match=match):
        compressed(staged[0], tmp_path / "s", **options)
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize(
    "options", [{"dim": 6}, {"weights": {"c0": 1, "c1": 2}}, {"dtype": "float16"}, {"seed": 1}]
)
def test_other_settings_do_not_go_on(tmp_path, staged, options):
    before = compressed(staged[0], tmp_path / "s").rows()
    with pytest.raises(errors.MismatchError):
        compressed(staged[0], tmp_path / "s", **options)
    assert np.array_equal(whence.open(tmp_path / "s").rows(), before)


def test_only_coordinates_as_they_are_can_be_compressed(tmp_path, staged):
    path, model, loss, x, states = staged
    at(model, states["c0"])
    factors = fit(model, batches(x), loss, states={"c0": states["c0"]})
    stores = [
        recorded(tmp_path / "plain", model, None, loss, x, dim=16),
        recorded(tmp_path / "rotated", model, factors, loss, x, dim=4),
        compressed(path, tmp_path / "compressed"),
    ]
    for store in stores:
        with pytest.raises(errors.MismatchError, match="store must hold coordinates"):
            compressed(store, tmp_path / "t")
    other = recorded(tmp_path / "other", model, factors, loss, x, rotate=False)
    compressed(other, tmp_path / "t", dim=4)
    less = fit(model, batches(x[:7], sizes=(3, 4)), loss, states={"c0": states["c0"]})
    other = recorded(tmp_path / "less", model, less, loss, x, rotate=False)
    with pytest.raises(errors.MismatchError, match="path must be new or begun from"):
        compressed(other, tmp_path / "t", dim=4)


# Kills, damage and wrong arguments


@pytest.mark.parametrize("what", ["record_checkpoints", "fit_factors"])
def test_a_killed_run_goes_on(tmp_path, what):
    script = f"""
        import sys
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        import test_preconditioned as tests
        import whence.gradients.combined
        whence.gradients.combined.TOGETHER = 3
        tests.killed({str(tmp_path)!r}, {what!r})
    """
    child = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert child.stdout.readline() == "ready\n"
    child.send_signal(signal.SIGKILL)
    child.communicate()
    model, loss, x, states = run_of_two()
    if what == "fit_factors":
        assert [path.name for path in tmp_path.glob("fit/checkpoint-*")] == [
            "checkpoint-0000-eigenvalues"
        ]
        again = fit(model, batches(x), loss, states=states, path=tmp_path / "fit")
        whole = fit(model, batches(x), loss, states=states)
        for one, other in zip(again.directions.matrices, whole.directions.matrices, strict=True):
            assert torch.equal(one, other)
        return
    assert whence.open(tmp_path / "s").ids.tolist() == list(range(7))
    factors = whence.Factors.load(tmp_path / "factors")
    store = together(tmp_path / "s", model, factors, loss, batches(x), states=states, dim=6)
    whole = together(tmp_path / "whole", model, factors, loss, batches(x), states=states, dim=6)
    assert store.ids.tolist() == list(range(9))
    assert error(store.rows(), torch.from_numpy(whole.rows())) < 1e-6


def run_of_two():
    model, loss, x = single("perceptron")
    states = {f"c{number}": perturbed(model, number) for number in range(2)}
    return model, loss, x, states


def killed(path, what):
    """What a child does until it is killed: in a second checkpoint, with batches still to come."""
    model, loss, x, states = run_of_two()
    last = {"fit_factors": 8, "record_checkpoints": 6}[what]
    runs = []

    def waiting(model, x):
        runs.append(1)
        if len(runs) == last:
            print("ready", flush=True)  # noqa: T201
            sys.stdin.read()
        return loss(model, x)

    if what == "fit_factors":
        fit(model, batches(x), waiting, states=states, path=Path(path) / "fit")
    factors = fit(model, batches(x), loss, states=states)
    factors.save(Path(path) / "factors")
    together(Path(path) / "s", model, factors, waiting, batches(x), states=states, dim=6)


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.data())
def test_damaged_maps_are_named(staged, data):
    path, model, loss, x, states = staged
    files = sorted(path.glob("map-*/*"))
    file = data.draw(st.sampled_from(files))
    content = file.read_bytes()
    kind = data.draw(st.sampled_from(["bit", "cut", "gone", "longer"]))
    place = data.draw(st.integers(0, len(content) - 1))
    damaged = {
        "bit": content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :],
        "cut": content[:place],
        "longer": content + b"\0",
    }
    try:
        if kind == "gone":
            file.unlink()
        else:
            file.write_bytes(damaged[kind])
        with pytest.raises(errors.StoreError, match=file.parent.name):
            whence.query(model, path, lambda: loss(model, x), states=states)
    finally:
        file.write_bytes(content)


@pytest.mark.parametrize(
    "change",
    [
        lambda body: body["checkpoints"][0].update(map=None),
        lambda body: body["checkpoints"][0].update(map={}),
        lambda body: body["checkpoints"][0].update(map=[]),
        lambda body: body["checkpoints"][0]["map"].update(name="../map-00000001"),
        lambda body: body["checkpoints"][0]["map"]["files"].update({"../x.npy": [1, 2]}),
        lambda body: body["checkpoints"][0].update(weight=0.5),
        lambda body: body.update(rows="combined"),
        lambda body: body.update(rows="sideways"),
        lambda body: body.update(checkpoints=[]),
        lambda body: body["sketch"].pop("basis"),
        lambda body: body["sketch"].pop("layout"),
    ],
)
def test_hostile_manifests_of_preconditioned_rows_are_refused(tmp_path, staged, change):
    shutil.copytree(staged[0], tmp_path / "s")
    newest = max((tmp_path / "s").glob("manifest-*.json"))
    body = json.loads(newest.read_text().splitlines()[0])
    change(body)
    text = json.dumps(body).encode()
    newest.write_bytes(text + f"\n{zlib.crc32(text):08x}\n".encode())
    with pytest.raises(errors.StoreError, match="damaged"):
        whence.open(tmp_path / "s")


@pytest.mark.parametrize(
    "change",
    [
        lambda blocks, arrays: blocks[0].update(kind="unheard of"),
        lambda blocks, arrays: blocks[0].update(shape=[3.5, 4]),
        lambda blocks, arrays: blocks[0].update(bias=None),
        lambda blocks, arrays: blocks[0]["sides"].pop("left"),
        lambda blocks, arrays: blocks[0]["sides"].update(left=[[0, 10**6]]),
        lambda blocks, arrays: blocks[0]["sides"].update(left=[[0, "x"]]),
        lambda blocks, arrays: arrays.update({"block-0-left-0": np.zeros((1, 2), np.float32)}),
        lambda blocks, arrays: arrays.update({"block-0-right-ones": np.zeros(1, np.float32)}),
        lambda blocks, arrays: arrays.update({"block-0-rows": arrays["block-0-rows"] + 99}),
        lambda blocks, arrays: arrays.update({"block-0-columns": arrays["block-0-columns"] - 1}),
        lambda blocks, arrays: arrays.update({"block-0-scales": np.zeros(1, np.float32)}),
        lambda blocks, arrays: arrays.update(basis=np.zeros((1, 2), np.float32)),
    ],
)
def test_coordinates_that_do_not_fit_together_are_refused(change):
    blocks, arrays = to_arrays(fitted("perceptron").maps[0])
    assert len(from_arrays(blocks, arrays).choices) == len(blocks)
    change(blocks, arrays)
    with pytest.raises(errors.MismatchError, match="coordinates must be of this version of whence"):
        from_arrays(blocks, arrays)


def test_rows_of_a_table_that_do_not_rise_are_refused():
    blocks, arrays = to_arrays(fitted("embedding").maps[0])
    number = next(at for at, block in enumerate(blocks) if block["kind"] == "lookup")
    arrays[f"block-{number}-columns"] = arrays[f"block-{number}-columns"][::-1]
    with pytest.raises(errors.MismatchError, match=f"block-{number}-columns must rise"):
        from_arrays(blocks, arrays)


def files_of(path):
    return {each: each.read_bytes() for each in sorted(path.rglob("*")) if each.is_file()}


WRONG = [
    ({"precondition": "factors"}, errors.DtypeError, "precondition must be factors"),
    ({"dim": 0}, errors.ArgumentError, "dim must be"),
    ({"dim": 10}, errors.ArgumentError, "dim must be at most 9"),
    ({"dim": 2.5}, errors.DtypeError, "dim must be an integer"),
    ({"seed": -1}, errors.ArgumentError, "seed must be"),
    ({"sketch": "unheard of"}, errors.ArgumentError, "unheard of"),
    ({"sketch": 3}, errors.DtypeError, "sketch must be"),
    ({"sketch": whence.Sketch(dim=4), "dim": 4}, errors.ArgumentError, "dim must be None"),
    ({"sketch": whence.Sketch(dim=4, layout="per_layer")}, errors.ArgumentError, "global"),
    ({"dtype": "float64"}, errors.ArgumentError, "dtype must be"),
    ({"nonfinite": "keep"}, errors.ArgumentError, "nonfinite must be"),
    ({"unbatched": 3}, errors.DtypeError, "unbatched must be"),
]


@pytest.mark.parametrize(
    ("options", "kind", "match"),
    [
        *WRONG,
        ({"rotate": "no"}, errors.DtypeError, "rotate must be"),
        ({"rotate": False, "dim": 4}, errors.ArgumentError, "dim must be None"),
        ({"rotate": False, "seed": 4}, errors.ArgumentError, "seed must be None"),
        ({"rotate": False, "sketch": "gaussian"}, errors.ArgumentError, "sketch must be None"),
        ({"layout": "global"}, errors.ArgumentError, "layout must be None"),
        ({"reduction": "sum"}, errors.MismatchError, "reduction must be 'mean'"),
        ({"layers": "0"}, errors.MismatchError, "precondition must be factors of the recorded"),
        ({"precondition": None, "rotate": False}, errors.ArgumentError, "rotate must be True"),
    ],
)
def test_wrong_arguments_of_record_leave_the_store_as_it_was(tmp_path, options, kind, match):
    model = single("perceptron")[0]
    options = {"precondition": fitted("perceptron"), "dtype": "float32", **options}
    with pytest.raises(kind, match=match):
        whence.record(model, tmp_path / "new", **options)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("options", "kind", "match"),
    [
        *WRONG,
        ({"states": {"0": {}}}, errors.CheckpointError, "states"),
        ({"states": {"1": None}}, errors.CheckpointError, "states must be those"),
        ({"states": [1]}, errors.DtypeError, "states must be a dict"),
        ({"columns": 3}, errors.DtypeError, "columns must be a function"),
        ({"columns": lambda x: 3}, errors.DtypeError, "columns must return a dict"),
        ({"columns": lambda x: {"a": [1]}}, errors.ShapeError, "a must be one value"),
        ({"ids": [1, 1]}, errors.IdError, "distinct"),
        ({"ids": [1, "a"]}, errors.IdError, "all integers or all strings"),
        ({"ids": [1, 2]}, errors.ShapeError, "ids must be one for each"),
        ({"ids": lambda x: range(len(x))}, errors.IdError, "in two batches"),
        ({"ids": lambda x: [1]}, errors.ShapeError, "ids must be one for each"),
        ({"tokens": 3}, errors.DtypeError, "tokens must be a function"),
        ({"tokens": lambda x: x}, errors.ArgumentError, "tokens must be a function"),
        ({"loss": 3}, errors.DtypeError, "loss must be a function"),
        ({"loss": lambda x: x}, errors.DtypeError, "loss must return the loss"),
        ({"loader": []}, errors.ArgumentError, "at least one batch"),
        ({"loader": iter([])}, errors.DtypeError, "read several times"),
        ({"loader": [["a", "b"]]}, errors.ArgumentError, "batches of tensors"),
        ({"loader": [3]}, errors.ArgumentError, "batches of tensors"),
        ({"model": 3}, errors.DtypeError, "model must be an nn.Module"),
        ({"model": nn.Linear(2, 2)}, errors.MismatchError, "model must be"),
    ],
)
@pytest.mark.parametrize("there", [False, True])
def test_wrong_arguments_of_record_checkpoints_leave_the_store_as_it_was(
    tmp_path, there, options, kind, match
):
    model, loss, x = single("perceptron")
    factors = fitted("perceptron")
    path = tmp_path / "s"
    if there:
        together(path, model, factors, loss, batches(x)[:2], dim=4)
    before = files_of(path) if there else {}
    given = {
        "model": model,
        "loader": batches(x),
        "loss": lambda x: loss(model, x),
        "precondition": factors,
        "dim": 4,
        "dtype": "float32",
        "progress": False,
        **options,
    }
    if "sketch" in options and "dim" not in options:
        del given["dim"]
    with pytest.raises(kind, match=match):
        whence.record_checkpoints(path=path, **given)
    if there:
        assert files_of(path).items() >= before.items()
        assert whence.open(path).ids.tolist() == list(range(7))
    else:
        assert not list(path.glob("manifest-*")) if path.exists() else True


def test_several_checkpoints_are_for_record_checkpoints(tmp_path):
    model, loss, x, states = run_of_two()
    factors = fit(model, batches(x), loss, states=states)
    with pytest.raises(errors.ArgumentError, match="record_checkpoints records them all"):
        whence.record(model, tmp_path / "s", precondition=factors)
    with pytest.raises(errors.CheckpointError, match="states must have the weights of each"):
        together(tmp_path / "s", model, factors, loss, batches(x), dim=4)
    wrong = {name: states["c0"] for name in states}
    with pytest.raises(errors.WeightsError, match="checkpoint 'c1'"):
        together(tmp_path / "s", model, factors, loss, batches(x), states=wrong, dim=4)
    store = together(tmp_path / "s", model, factors, loss, batches(x), states=states, dim=4)
    with pytest.raises(errors.WeightsError, match="checkpoint 'c1'"):
        whence.query(model, store, lambda: loss(model, x), states=wrong)
    with pytest.raises(errors.CheckpointError, match="states must have"):
        whence.query(model, store, lambda: loss(model, x))


def test_stores_of_other_rows_do_not_mix(tmp_path):
    model, loss, x = single("perceptron")
    factors = fitted("perceptron")
    together(tmp_path / "s", model, factors, loss, batches(x), dim=4)
    recorded(tmp_path / "t", model, factors, loss, x, dim=4)
    recorded(tmp_path / "u", model, None, loss, x, dim=4)
    before = [files_of(tmp_path / name) for name in "stu"]
    plain = {"precondition": factors, "dim": 4, "dtype": "float32"}
    for name in "su":
        with pytest.raises(errors.MismatchError):
            whence.record(model, tmp_path / name, **plain)
    for name in "tu":
        with pytest.raises(errors.MismatchError):
            together(tmp_path / name, model, factors, loss, batches(x), dim=4)
    for options in ({"dim": 5}, {"dtype": "float16"}, {"seed": 1}, {"dim": None, "rotate": False}):
        with pytest.raises(errors.MismatchError):
            whence.record(model, tmp_path / "t", **{**plain, **options})
    other = fit(model, batches(x), loss, damping=0.3)
    with pytest.raises(errors.MismatchError, match=r"damping must be 0\.1"):
        whence.record(model, tmp_path / "t", **{**plain, "precondition": other})
    with pytest.raises(errors.MismatchError):
        whence.record(model, tmp_path / "t", dim=4, dtype="float32")
    assert [files_of(tmp_path / name) for name in "stu"] == before


def test_checkpoints_with_other_factors_are_refused_and_change_nothing(tmp_path):
    model, loss, x = single("perceptron")
    factors = fitted("perceptron")
    with whence.record(model, tmp_path / "s", precondition=factors, dim=4, dtype="float32") as rec:
        with rec.batch(range(3)):
            loss(model, x[:3]).backward()
        for other, kind in (
            (fit(model, batches(x), loss, damping=0.3), errors.MismatchError),
            (fit(model, batches(x), loss, layers="0"), errors.MismatchError),
            (fit(model, batches(x), loss, until="eigenvalues"), errors.ArgumentError),
            (3, errors.DtypeError),
        ):
            with pytest.raises(kind):
                rec.checkpoint("1", precondition=other)
        with rec.batch(range(3, 9)):
            loss(model, x[3:]).backward()
    store = whence.open(tmp_path / "s")
    assert store.checkpoints == ["0"]
    assert len(store) == 9
    with (
        whence.record(model, tmp_path / "plain", dim=4) as rec,
        pytest.raises(errors.ArgumentError, match="must be given to whence"),
    ):
        rec.checkpoint("1", precondition=factors)


# Together with the rest


def test_an_index_answers_as_the_store(tmp_path, staged):
    path, model, loss, x, states = staged
    for source in (whence.open(path), compressed(path, tmp_path / "s")):
        index = whence.Index(source)
        hits = [
            whence.query(model, each, lambda: loss(model, x[:3]), states=states, k=4)
            for each in (source, index)
        ]
        assert np.array_equal(hits[0].helpful.ids, hits[1].helpful.ids)
        assert np.array_equal(hits[0].harmful.ids, hits[1].harmful.ids)
        assert np.allclose(hits[0].helpful.scores, hits[1].helpful.scores, rtol=1e-5)
        assert hits[0].method == hits[1].method
        assert hits[0].unit == hits[1].unit


def test_self_influence_is_the_product_of_an_example_with_itself(staged):
    path, model, loss, x, states = staged
    store = whence.open(path)
    hits = whence.query(model, store, lambda: loss(model, x), states=states, k=9)
    own = [
        scores[ids.tolist().index(query)]
        for query, (ids, scores) in enumerate(
            zip(hits.helpful.ids, hits.helpful.scores, strict=True)
        )
    ]
    assert np.allclose(store.self_influence(), own, rtol=1e-4)


def test_chosen_layers_are_those_of_the_factors(tmp_path):
    model, loss, x = single("perceptron")
    factors = fit(model, batches(x), loss, layers="2")
    expected = coordinates(factors, exact_gradients(model, loss, x))
    alone = recorded(tmp_path / "s", model, factors, loss, x, rotate=False, layers="2")
    assert error(alone.rows(), expected) < 1e-4
    store = together(tmp_path / "t", model, factors, loss, batches(x), dim=3)
    assert {each["name"] for each in store.manifest.model["parameters"]} == {"2.bias", "2.weight"}
    other = recorded(tmp_path / "u", model, factors, loss, x, dim=3, layers="2")
    assert error(store.rows(), torch.from_numpy(other.rows())) < 1e-5
    for parameter in model.parameters():  # frozen since: what was fitted is recorded
        parameter.requires_grad_(False)
    frozen = together(tmp_path / "v", model, factors, loss, batches(x), dim=3)
    assert error(frozen.rows(), torch.from_numpy(store.rows())) < 1e-6


def test_float16_rows_are_those_of_float32_but_for_rounding(tmp_path):
    model, loss, x = single("perceptron")
    factors = fitted("perceptron")
    one, other = (
        together(tmp_path / dtype, model, factors, loss, batches(x), dim=6, dtype=dtype)
        for dtype in ("float16", "float32")
    )
    assert error(one.rows(), torch.from_numpy(other.rows())) < 1e-3


def test_several_backward_passes_are_summed(tmp_path):
    model, loss, x = single("conv2d")
    factors = fitted("conv2d")
    whole = recorded(tmp_path / "s", model, factors, loss, x, rotate=False)
    options = {"precondition": factors, "rotate": False, "dtype": "float32"}
    with whence.record(model, tmp_path / "t", **options) as rec, rec.batch(range(9)):
        for share in (0.25, 0.75):
            (share * loss(model, x)).backward()
    assert error(whence.open(tmp_path / "t").rows(), torch.from_numpy(whole.rows())) < 1e-5


def test_saved_factors_make_the_same_rows(tmp_path):
    model, loss, x = single("tied")
    factors = fitted("tied", coordinates=40)
    factors.save(tmp_path / "factors")
    again = whence.Factors.load(tmp_path / "factors")
    one, other = (
        together(tmp_path / name, model, each, loss, batches(x), dim=6)
        for name, each in (("s", factors), ("t", again))
    )
    assert np.array_equal(one.rows(), other.rows())
    assert files_of(tmp_path / "s").keys() == {
        tmp_path / "s" / path.relative_to(tmp_path / "t") for path in files_of(tmp_path / "t")
    }


@st.composite
def models(draw):
    """A model of one of several kinds and sizes, and inputs of six examples."""
    torch.manual_seed(draw(st.integers(0, 99)))
    kind = draw(st.sampled_from(["linear", "conv", "transposed", "table"]))
    wide_, narrow, terms = (draw(st.integers(1, 7)) for _ in range(3))
    bias = draw(st.booleans())
    if kind == "linear":
        shape = (6, terms, wide_) if draw(st.booleans()) else (6, wide_)
        model, x = nn.Linear(wide_, narrow, bias=bias), torch.randn(shape)
    elif kind == "conv":
        groups = draw(st.sampled_from([1, 2]))
        model = nn.Conv2d(2 * wide_, 2 * narrow, 2, groups=groups, padding=1, bias=bias)
        x = torch.randn(6, 2 * wide_, terms, 3)
    elif kind == "transposed":
        model, x = Conv1D(narrow, wide_), torch.randn(6, terms, wide_)
    else:
        model = nn.Embedding(wide_ + 1, narrow, padding_idx=0 if bias else None)
        x = torch.randint(0, wide_ + 1, (6, terms))
        x[0] = wide_
    return nn.Sequential(wide(model).float(), nn.Tanh()), x


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    given_model=models(),
    longest=st.integers(1, 9),
    width=st.integers(1, 60),
    corrected=st.booleans(),
    weight_gradients=st.booleans(),
)
def test_rows_of_any_model_are_whitened_coordinates(
    tmp_path_factory, given_model, longest, width, corrected, weight_gradients
):
    model, x = given_model
    factors = fit(
        model,
        batches(x, sizes=(2, 4)),
        longest=longest,
        coordinates=width,
        corrected=corrected,
        sample=6,
    )
    store = recorded(
        tmp_path_factory.mktemp("any") / "s",
        model,
        factors,
        squares,
        x,
        sizes=(1, 2, 3),
        rotate=False,
        weight_gradients=weight_gradients,
    )
    expected = coordinates(factors, exact_gradients(model, squares, x))
    found = torch.from_numpy(store.rows()).double()
    assert found.shape == expected.shape
    # Of equal eigenvalues any order is right, and rounding may choose another.
    whole, other = (each.square().sum(1) for each in (found, expected))
    assert float((whole - other).abs().max()) <= 1e-3 * float(other.max())


def test_a_learning_rate_beside_curvature_is_refused(tmp_path):
    model, _, _ = single("perceptron")
    with (
        whence.record(model, tmp_path / "s", precondition=fitted("perceptron"), dim=5) as rec,
        pytest.raises(errors.ArgumentError, match="learning_rate must be None"),
    ):
        rec.checkpoint("a", learning_rate=0.1)


def test_a_basis_wider_than_the_examples_is_refused(tmp_path):
    model, loss, x = single("perceptron")
    recorded(tmp_path / "s", model, fitted("perceptron"), loss, x, rotate=False)
    with pytest.raises(errors.ArgumentError, match="dim must be at most 9, the examples"):
        whence.compress(tmp_path / "s", tmp_path / "t", dim=12, progress=False)


def test_rows_are_read_by_ids_in_a_list(tmp_path):
    model, loss, x = single("perceptron")
    store = recorded(tmp_path / "s", model, fitted("perceptron"), loss, x, dim=5)
    every = store.rows()
    for ids in ([3, 1], range(4), np.array([5])):
        assert np.array_equal(store.rows(ids), every[list(ids)])
