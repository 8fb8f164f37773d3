"""Factors against their definition, computed example by example with torch.func."""

import errno
import os
import shutil
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from curvature_oracle import (
    NAMES,
    ByHand,
    Conv1D,
    Shared,
    batches,
    block_gradients,
    case,
    covariances,
    dense,
    exact_gradients,
    positions,
    rotated_gradients,
    squares,
    tokens,
    wide,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from oracle import per_sample_gradients
from torch import nn
from torch.func import functional_call, jacrev

import whence
from whence import errors
from whence.curvature.basis import Leading, bases
from whence.curvature.factors import STAGES
from whence.curvature.labels import DrawnLabels
from whence.curvature.spectra import eigh
from whence.store.files import read_json, write_array, write_json


def fit(model, loader, loss=squares, **options):
    options = {"labels": "empirical", "sample": 9, "progress": False, **options}
    return whence.fit_factors(model, loader, lambda *batch: loss(model, *batch), **options)


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


# Labels


def moment(values, loss, draws=100_000):
    """[outputs, outputs] mean of δ δᵀ over drawn labels, for one example's outputs."""
    out = values.expand(draws, *values.shape).clone().requires_grad_()
    with DrawnLabels(0):
        total = loss(out)
    delta = torch.autograd.grad(total, out)[0].flatten(1).double()
    return delta.T @ delta / draws


def hessian(loss, values):
    return jacrev(jacrev(loss))(values.double()).reshape(values.numel(), values.numel())


def negative_log_likelihood(values):
    return -values.log_softmax(0)[0].sum()


CLASSES = torch.zeros(100_000, dtype=torch.long)
NUMBERS = torch.zeros(100_000, 4)
DRAWS = {
    "cross_entropy": (
        lambda out: F.cross_entropy(out, CLASSES, reduction="sum"),
        lambda out: F.cross_entropy(out[None], CLASSES[:1]),
    ),
    "cross_entropy of label smoothing": (
        lambda out: F.cross_entropy(out, CLASSES, reduction="sum", label_smoothing=0.3),
        lambda out: F.cross_entropy(out[None], CLASSES[:1]),
    ),
    "cross_entropy of probabilities": (
        lambda out: F.cross_entropy(out, NUMBERS + 0.25, reduction="sum"),
        lambda out: F.cross_entropy(out[None], CLASSES[:1]),
    ),
    "the module": (
        lambda out: nn.CrossEntropyLoss(reduction="sum")(out, CLASSES),
        lambda out: F.cross_entropy(out[None], CLASSES[:1]),
    ),
    "nll_loss": (
        lambda out: F.nll_loss(out.log_softmax(-1), CLASSES, reduction="sum"),
        lambda out: F.cross_entropy(out[None], CLASSES[:1]),
    ),
    "binary_cross_entropy_with_logits": (
        lambda out: F.binary_cross_entropy_with_logits(out, NUMBERS, reduction="sum"),
        lambda out: F.binary_cross_entropy_with_logits(out, 0 * out, reduction="sum"),
    ),
    "binary_cross_entropy": (
        lambda out: F.binary_cross_entropy(out.sigmoid(), NUMBERS, reduction="sum"),
        lambda out: F.binary_cross_entropy_with_logits(out, 0 * out, reduction="sum"),
    ),
    "mse_loss, summed": (
        lambda out: F.mse_loss(out, NUMBERS, reduction="sum"),
        lambda out: F.mse_loss(out, 0 * out, reduction="sum"),
    ),
    "mse_loss of the label first": (
        lambda out: F.mse_loss(NUMBERS, out, reduction="sum"),
        lambda out: F.mse_loss(out, 0 * out, reduction="sum"),
    ),
    "mse_loss, the mean over outputs": (
        lambda out: len(out) * F.mse_loss(out, NUMBERS),
        lambda out: F.mse_loss(out, 0 * out),
    ),
}


@pytest.mark.parametrize("name", DRAWS)
def test_drawn_labels_give_the_gauss_newton_matrix(name):
    many, one = DRAWS[name]
    values = torch.tensor([0.3, -1.2, 0.8, 0.1])
    expected = hessian(one, values)  # of the loss in the outputs: JᵀHJ is the Gauss-Newton matrix
    assert float((moment(values, many) - expected).abs().max()) < 0.02 * float(expected.max())


def test_factors_of_drawn_labels_are_those_of_the_gauss_newton_matrix():
    torch.manual_seed(5)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    x = torch.randn(5, 3).double()
    many = x.repeat(4000, 1)
    loader = [(many, torch.zeros(len(many), dtype=torch.long))]
    factors = fit(model, loader, lambda m, x, y: F.cross_entropy(m(x), y), labels="sampled")
    weights = dict(model.named_parameters())
    for key, each in known(factors).items():
        name = key[0].removesuffix("weight")
        own = {part: weights[name + part].detach() for part in ("weight", "bias")}
        exact = 0.0
        for example in x:

            def outputs(own, name=name, example=example):
                weights = {name + part: value for part, value in own.items()}
                return functional_call(model, weights, (example[None],))[0]

            jacobian = jacrev(outputs)(own)
            joined = torch.cat([jacobian["weight"], jacobian["bias"][..., None]], 2).flatten(1)
            exact = exact + joined.T @ hessian(negative_log_likelihood, outputs(own)) @ joined
        block = each.block
        vectors = torch.kron(dense(block.left, block.shape[0]), dense(block.right, block.shape[1]))
        values = (vectors.T @ (exact.detach() / len(x)) @ vectors).diagonal()
        assert close(factors.eigenvalues()[key].flatten(), values, 0.05)


def test_ignored_positions_stay_ignored():
    out = torch.randn(2, 3, 4, requires_grad=True)
    y = torch.tensor([[0, -1, 2, 1], [-1, -1, 0, 0]])
    with DrawnLabels(0):
        F.cross_entropy(out, y, ignore_index=-1, reduction="sum").backward()
    assert torch.equal((out.grad == 0).all(1), y == -1)


@pytest.mark.parametrize(
    "shape", [((4,), ()), ((5, 4), (5,)), ((5, 4, 3), (5, 3)), ((5, 4, 3, 2), (5, 3, 2))]
)
def test_classes_are_drawn_for_every_position(shape):
    values = torch.full(shape[0], -50.0)
    likely = torch.randint(0, 4, shape[1])
    classes = min(1, values.dim() - 1)
    values.scatter_(classes, likely.unsqueeze(classes), 50.0)
    with DrawnLabels(0):
        found = F.cross_entropy(values, torch.zeros(shape[1], dtype=torch.long))
    assert found == 0  # the class that was drawn is the one of probability one


def test_empirical_labels_are_the_true_ones():
    torch.manual_seed(6)
    model = nn.Linear(4, 3).double()
    x, y = torch.randn(9, 4).double(), torch.randint(0, 3, (9,))
    factors = fit(model, batches(x, y), lambda m, x, y: F.cross_entropy(m(x), y))
    delta = model(x).detach().softmax(1) - F.one_hot(y, 3)
    assert close(known(factors)["weight", 0, "outer"].left.sums[0], delta.T @ delta, 1e-12)


def test_the_same_seed_draws_the_same_labels_whatever_was_drawn_before():
    model, x = nn.Linear(4, 3), torch.randn(9, 4)
    loader = batches(x, torch.zeros(9, dtype=torch.long))

    def found(seed):
        torch.rand(seed + 3)
        before = torch.get_rng_state()
        factors = fit(
            model,
            loader,
            lambda m, x, y: F.cross_entropy(m(x), y),
            labels="sampled",
            seed=seed,
        )
        assert torch.equal(torch.get_rng_state(), before)
        return factors.eigenvalues()["weight", 0, "outer"]

    assert torch.equal(found(1), found(1))
    assert not torch.equal(found(1), found(2))


@pytest.mark.parametrize(
    ("what", "loss"),
    [
        ("another", lambda m, x, y: -m(x).log_softmax(1)[:, 0].mean()),
        ("weight", lambda m, x, y: F.cross_entropy(m(x), y, weight=torch.ones(3))),
        (
            "pos_weight",
            lambda m, x, y: F.binary_cross_entropy_with_logits(
                m(x), m(x).detach(), pos_weight=torch.ones(3)
            ),
        ),
    ],
)
def test_a_loss_whose_labels_cannot_be_drawn_is_named(what, loss):
    loader = batches(torch.randn(9, 4), torch.zeros(9, dtype=torch.long))
    with pytest.raises(errors.LayerError, match=f"{what}.*labels='empirical'"):
        fit(nn.Linear(4, 3), loader, loss, labels="sampled")


@pytest.mark.parametrize(
    "loss",
    [
        lambda m, x, y: F.cross_entropy(m(x), y),
        lambda m, x, y: F.mse_loss(m(x), torch.zeros(len(x), 3)),
        lambda m, x, y: F.binary_cross_entropy_with_logits(m(x), torch.zeros(len(x), 3)),
    ],
)
@pytest.mark.parametrize("labels", ["sampled", "empirical"])
def test_what_is_not_finite_is_named(loss, labels):
    x = torch.randn(9, 4)
    x[4] = torch.nan
    loader = batches(x, torch.zeros(9, dtype=torch.long))
    with pytest.raises(errors.NotFiniteError, match="example 1 of a batch"):
        fit(nn.Linear(4, 3), loader, loss, labels=labels)


# What is made of factors


def test_linear_regression_of_unit_residuals_is_solved_exactly():
    torch.manual_seed(7)
    x = torch.randn(40, 6).double()
    model = nn.Linear(6, 1).double()
    y = model(x).detach() + torch.randint(0, 2, (40, 1)) * 2 - 1
    loader = batches(x, y, sizes=(13, 20, 7))
    factors = fit(model, loader, lambda m, x, y: 0.5 * F.mse_loss(m(x), y))
    joined = torch.cat([x, torch.ones(40, 1, dtype=x.dtype)], 1)
    curvature = joined.T @ joined / 40
    [(values, damping)] = factors.damped().values()
    assert damping == pytest.approx(0.1 * float(curvature.trace()) / 7, rel=1e-12)
    exact = torch.linalg.solve(curvature + damping * torch.eye(7, dtype=x.dtype), joined.T)
    block = next(iter(known(factors).values())).block
    rotated = joined @ dense(block.right, 6) * float(dense(block.left, 1))
    found = rotated / (values + damping) @ rotated.T
    assert float((found - joined @ exact).abs().max()) < 1e-10


def test_damping_is_a_share_of_the_mean_eigenvalue_of_each_block():
    model, loss, x = case("layer norm")
    for damping in (0.1, 0.03):
        factors = fit(model, batches(x), loss, damping=damping)
        exact = exact_gradients(model, loss, x)
        for key, (values, added) in factors.damped().items():
            gradients = block_gradients(exact[key[2]], known(factors)[key].block)
            mean = float(gradients.square().sum((1, 2)).mean()) / values.numel()
            assert added == pytest.approx(damping * mean, rel=1e-5)


def chosen(factors):
    """{(block's key, left, right)} that are kept, by the scales that name them."""
    found = set()
    for choice in factors.maps[0].choices:
        values, damping = factors.damped()[choice.block.key]
        scales = (values + damping).rsqrt().float()
        for scale in choice.scales:
            place = torch.nonzero(scales == scale)
            assert len(place) == 1
            found.add((choice.block.key, *place[0].tolist()))
    return found


@pytest.mark.parametrize("corrected", [True, False])
@pytest.mark.parametrize("name", ["perceptron", "conv2d grouped", "layer norm"])
def test_the_coordinates_of_largest_share_are_kept(name, corrected):
    model, loss, x = case(name)
    factors = fit(model, batches(x), loss, coordinates=17, corrected=corrected)
    shares = {
        (key, *place): float(share)
        for key, (values, damping) in factors.damped().items()
        for place, share in np.ndenumerate((values / (values + damping)).numpy())
    }
    found = chosen(factors)
    assert len(found) == factors.maps[0].width == 17
    assert min(shares[each] for each in found) >= max(
        share for each, share in shares.items() if each not in found
    )


def test_only_leading_eigenvectors_of_weights_are_used():
    model, loss, x = case("perceptron")
    factors = fit(model, batches(x), loss, coordinates=1000, leading=0.5)
    found = chosen(factors)
    sizes = {key: each.shape for key, each in factors.eigenvalues().items()}
    expected = {
        (key, row, column)
        for key, (rows, columns) in sizes.items()
        for row in range(round(rows / 2))
        for column in range(round(columns / 2))
        if factors.eigenvalues()[key][row, column] > 0
    }
    assert found == expected


@pytest.mark.parametrize("name", ["linear over positions", "conv2d", "conv1d transposed"])
@pytest.mark.parametrize("longest", [1, 2, 3])
def test_long_sides_are_cut_in_stretches(name, longest):
    model, loss, x = case(name)
    factors = fit(model, batches(x), loss, longest=longest)
    observed = positions(model, loss, x)
    exact = exact_gradients(model, loss, x)
    for key, each in known(factors).items():
        block = each.block
        outputs, inputs, _ = covariances(observed[key], bias=block.bias is not None)
        left, right = (outputs, inputs) if block.ones == "right" else (inputs, outputs)
        for side, length, whole in (
            (block.left, block.shape[0], left),
            (block.right, block.shape[1], right),
        ):
            assert [end - first for first, end, _ in side.parts] <= [longest] * len(side.parts)
            assert len(side.parts) == -(-length // longest)
            diagonal = torch.zeros_like(whole)  # the blocks, the constant one with the last
            for first, end, _ in side.parts:
                end = len(whole) if end == length else end
                diagonal[first:end, first:end] = whole[first:end, first:end]
            vectors = dense(side, length)
            values = vectors.T @ diagonal @ vectors
            assert close(vectors.T @ vectors, torch.eye(len(vectors), dtype=torch.float64), 1e-9)
            assert close(values, torch.diag(values.diagonal()), 1e-9)
        gradients = rotated_gradients(exact["outer"], block)
        assert close(factors.eigenvalues()[key], gradients.square().mean(0))


def test_weights_of_checkpoints_are_shares():
    model, loss, x = case("perceptron")
    states = {name: wide(case("perceptron")[0]).state_dict() for name in "ab"}
    factors = fit(model, batches(x), loss, states=states, weights={"b": 3, "a": 1.0})
    assert [(at.name, at.weight) for at in factors.checkpoints] == [("a", 0.25), ("b", 0.75)]
    for index, name in enumerate("ab"):
        model.load_state_dict(states[name])
        alone = fit(model, batches(x), loss)
        found = factors.eigenvalues(index)
        assert all(torch.equal(each, found[key]) for key, each in alone.eigenvalues().items())


def test_the_model_is_afterwards_as_before():
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Dropout(0.5)).train()
    x = torch.randn(9, 4)
    model(x).sum().backward()
    before = [each.clone() for each in model.state_dict().values()]
    gradients = [each.grad.clone() for each in model.parameters()]
    states = {
        name: wide(nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))).float() for name in "ab"
    }
    random = torch.get_rng_state()
    fit(model, batches(x), states={name: each.state_dict() for name, each in states.items()})
    assert all(map(torch.equal, before, model.state_dict().values()))
    assert all(map(torch.equal, gradients, (each.grad for each in model.parameters())))
    assert torch.equal(random, torch.get_rng_state())
    assert model.training
    assert not model[0]._forward_hooks
    assert model[2].training


# Shards


def same_directions(one, other):
    assert (one.total, one.examples, one.widest) == (other.total, other.examples, other.widest)
    assert torch.equal(one.values, other.values)
    assert (one.moment is None) == (other.moment is None)
    assert one.moment is None or torch.equal(one.moment, other.moment)
    return all(map(torch.equal, one.matrices, other.matrices))


def same(one, other):
    """Whether all arrays of two factors are the same, bit for bit."""
    for first, second in zip(one.checkpoints, other.checkpoints, strict=True):
        assert (first.name, first.digest, first.weight) == (
            second.name,
            second.digest,
            second.weight,
        )
        assert first.statistics.examples == second.statistics.examples
        assert first.statistics.pairs == second.statistics.pairs
        assert list(first.statistics.known) == list(second.statistics.known)
        for mine, its in zip(known(one).values(), known(other).values(), strict=True):
            assert mine.terms == its.terms
            for name in ("left", "right"):
                sides = [getattr(each, name) for each in (mine, its)]
                assert (sides[0] is None) == (sides[1] is None)
                if sides[0] is not None:
                    assert sides[0].ranges == sides[1].ranges
                    assert all(map(torch.equal, sides[0].sums, sides[1].sums))
                vectors = [getattr(each.block, name) for each in (mine, its)]
                assert (vectors[0] is None) == (vectors[1] is None)
                if vectors[0] is not None:
                    for (_, _, a), (_, _, b) in zip(
                        vectors[0].parts, vectors[1].parts, strict=True
                    ):
                        assert torch.equal(a, b)
                        assert a.dtype == b.dtype
                    assert (vectors[0].ones is None) == (vectors[1].ones is None)
                    assert vectors[0].ones is None or torch.equal(vectors[0].ones, vectors[1].ones)
            for name in ("kronecker", "squares"):
                values = [getattr(each, name) for each in (mine, its)]
                assert (values[0] is None) == (values[1] is None)
                assert values[0] is None or torch.equal(*values)
    assert (one.directions is None) == (other.directions is None)
    if one.directions is not None:
        assert same_directions(one.directions, other.directions)
    return (one.model, one.reduction, one.labels, one.settings, one.stage) == (
        other.model,
        other.reduction,
        other.labels,
        other.settings,
        other.stage,
    )


@pytest.mark.parametrize("name", ["perceptron", "embedding", "layer norm", "tied"])
def test_merged_shards_are_as_one_fit(name):
    model, loss, x = case(name)
    whole = fit(model, batches(x), loss)
    shards = [batches(x[:3], sizes=(3,)), batches(x[3:], sizes=(4, 2))]
    merged = None
    for stage in ("covariance", "eigenvalues"):
        parts = [fit(model, shard, loss, start=merged, until=stage) for shard in shards]
        merged = whence.Factors.merge(parts)
        assert merged.stage == stage
    merged = fit(model, batches(x), loss, start=merged)
    for key, each in known(whole).items():
        assert known(merged)[key].terms == each.terms
        assert close(merged.eigenvalues()[key], whole.eigenvalues()[key])
    assert merged.checkpoints[0].statistics.examples == [9, 9]
    assert close(merged.directions.values, whole.directions.values, 1e-3)


def test_a_merge_changes_none_of_its_parts():
    model, loss, x = case("perceptron")
    parts = [fit(model, [(half,)], loss, until="covariance") for half in (x[:4], x[4:])]
    before = known(parts[0])["0.weight", 0, "outer"].left.sums[0].clone()
    merged = whence.Factors.merge(parts)
    fit(model, batches(x), loss, start=merged)
    assert torch.equal(known(parts[0])["0.weight", 0, "outer"].left.sums[0], before)
    assert known(merged)["0.weight", 0, "outer"].squares is None


def other_model():
    return nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 3)).double()


OTHERS = {
    "model": lambda m, x: fit(m, batches(x), until="covariance", layers="0"),
    "labels": lambda m, x: fit(
        m, batches(x), lambda m, x: F.mse_loss(m(x), m(x)), until="covariance", labels="sampled"
    ),
    "reduction": lambda m, x: fit(m, batches(x), until="covariance", reduction="sum"),
    "longest": lambda m, x: fit(m, batches(x), until="covariance", longest=2),
    "weights": lambda m, x: fit(wide(m), batches(x), until="covariance"),
    "settings": lambda m, x: fit(m, batches(x), until="covariance", damping=0.2),
    "stage": lambda m, x: fit(m, batches(x), until="eigenvalues"),
}


@pytest.mark.parametrize("what", OTHERS)
def test_parts_of_other_models_and_settings_do_not_merge(what):
    model, _, x = case("perceptron")
    parts = [fit(model, batches(x), until="covariance"), OTHERS[what](model, x)]
    with pytest.raises(errors.MismatchError, match=f"parts must .*{what}"):
        whence.Factors.merge(parts)


def test_parts_of_other_eigenbases_do_not_merge():
    model, _, x = case("perceptron")
    parts = [fit(model, [(half,)], until="eigenvalues") for half in (x[:4], x[4:])]
    with pytest.raises(errors.ArgumentError, match="one eigenbasis"):
        whence.Factors.merge(parts)
    merged = whence.Factors.merge(
        [fit(model, [(each,)], until="covariance") for each in (x[:4], x[4:])]
    )
    parts = [fit(model, [(half,)], start=merged) for half in (x[:4], x[4:])]
    with pytest.raises(errors.ArgumentError, match="comes of one sample"):
        whence.Factors.merge(parts)
    with pytest.raises(errors.ArgumentError, match="parts must be at least one"):
        whence.Factors.merge([])


@pytest.mark.parametrize("what", ["model", "labels", "reduction", "longest", "weights"])
def test_a_start_of_another_model_or_setting_is_refused(what):
    model, _, x = case("perceptron")
    state = {name: value.clone() for name, value in model.state_dict().items()}
    start = OTHERS[what](model, x)
    model.load_state_dict(state)
    with pytest.raises(errors.MismatchError, match=f"start must .*{what}"):
        fit(model, batches(x), start=start)


def test_a_start_without_the_checkpoint_is_refused():
    model, _, x = case("perceptron")
    start = fit(model, batches(x), until="covariance")
    with pytest.raises(errors.CheckpointError, match="'late'"):
        fit(model, batches(x), start=start, states={"late": model.state_dict()})


def test_a_start_that_went_further_is_refused():
    model, _, x = case("perceptron")
    start = fit(model, batches(x), until="eigenvalues")
    with pytest.raises(errors.ArgumentError, match="'covariance' at most"):
        fit(model, batches(x), start=start, until="covariance")


# Files


@pytest.mark.parametrize("name", [*NAMES, "no coordinates of a block"])
@pytest.mark.parametrize("until", ["covariance", "eigenvalues", "basis"])
def test_saved_factors_are_read_as_they_were(tmp_path, name, until):
    model, loss, x = case("perceptron" if name not in NAMES else name)
    factors = fit(model, batches(x), loss, until=until, coordinates=1 if name not in NAMES else 99)
    assert factors.save(tmp_path / "factors") == tmp_path / "factors"
    assert same(whence.Factors.load(tmp_path / "factors"), factors)


def test_saving_never_overwrites(tmp_path):
    model, loss, x = case("perceptron")
    factors = fit(model, batches(x), loss)
    factors.save(tmp_path / "factors")
    with pytest.raises(errors.StoreError, match="path must be new"):
        factors.save(tmp_path / "factors")
    with pytest.raises(errors.StoreError, match=f"saved factors, got {tmp_path} without a factors"):
        whence.Factors.load(tmp_path)
    with pytest.raises(errors.StoreError, match="saved factors"):
        whence.Factors.load(tmp_path / "nothing")


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.data())
def test_damaged_factors_are_named(saved, data):
    files = sorted(saved.iterdir())
    path = data.draw(st.sampled_from(files))
    content = path.read_bytes()
    kind = data.draw(st.sampled_from(["bit", "cut", "gone", "longer"]))
    place = data.draw(st.integers(0, len(content) - 1))
    damaged = {
        "bit": content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :],
        "cut": content[:place],
        "longer": content + b"\0",
    }
    try:
        if kind == "gone":
            path.unlink()
        else:
            path.write_bytes(damaged[kind])
        with pytest.raises(errors.StoreError, match=path.parent.name):
            whence.Factors.load(saved)
    finally:
        path.write_bytes(content)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    model, loss, x = case("perceptron")
    return fit(model, batches(x), loss).save(tmp_path_factory.mktemp("saved") / "factors")


def put(body, place, value):
    """Puts a value at a place in nested lists and dicts."""
    *holders, last = place
    for each in holders:
        body = body[each]
    body[last] = value


AT = ("checkpoints", 0)
BLOCK = (*AT, "blocks", 0)
LEFT = (*BLOCK, "sides", "left")


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("stage",), "covariance"),
        (("stage",), "eigenvalues"),
        (("stage",), "soon"),
        (("reduction",), None),
        (("labels",), "true"),
        (("settings", "damping"), 10**400),
        (("settings", "leading"), 2),
        (("settings", "unheard of"), 1),
        (("model",), []),
        (("model", "parameters", 0, "name"), [1]),
        (("model", "parameters", 1, "shape"), [1, 1]),
        (("checkpoints",), []),
        ((*AT, "name"), 3),
        ((*AT, "weight"), 0),
        ((*AT, "weight"), 10**400),
        ((*AT, "longest"), None),
        ((*AT, "pairs"), {"0.weight": ["0.bias", "up"]}),
        ((*AT, "pairs"), {"0.weight": [[], "left"]}),
        ((*AT, "examples"), [9]),
        ((*AT, "examples"), [9, -1]),
        ((*AT, "examples"), [9, True]),
        ((*AT, "examples"), [9, 10**400]),
        ((*AT, "examples"), [0, 9]),
        ((*AT, "examples"), [9, 0]),
        ((*AT, "name"), "a\0b"),
        ((*AT, "weight"), 1.5),
        ((*AT, "pairs"), {"0.weight": ["nowhere", "left"]}),
        ((*AT, "pairs"), {"nowhere": ["0.bias", "left"]}),
        ((*BLOCK, "terms"), -5),
        ((*AT, "wide"), 1),
        ((*AT, "wide"), None),
        ((*AT, "blocks"), []),
        ((*BLOCK, "parameter"), "0.bias"),
        ((*BLOCK, "parameter"), []),
        ((*BLOCK, "start"), 10**6),
        ((*BLOCK, "kind"), "lookup"),
        ((*BLOCK, "shape"), [3, 4, 1]),
        ((*BLOCK, "shape"), [3.0, 4]),
        ((*BLOCK, "bias"), None),
        ((*BLOCK, "bias"), ["0.bias", 0, 1]),
        ((*BLOCK, "bias"), ["0.bias", 9, 5]),
        ((*BLOCK, "ones"), "left"),
        ((*BLOCK, "terms"), None),
        ((*BLOCK, "terms"), 10**400),
        ((*BLOCK, "sides"), {}),
        ((*LEFT, "ranges"), []),
        ((*LEFT, "ranges"), [[0, 10**400]]),
        ((*LEFT, "ranges"), [[0, "x"]]),
        ((*LEFT, "ranges"), [[0, 0], [0, 5]]),
        ((*LEFT, "ranges"), [[0, 5.0]]),
        ((*LEFT, "ranges"), [[1, 5]]),
        ((*LEFT, "ranges", 0), [0]),
        ((*LEFT, "one"), 0),
        ((*LEFT, "one"), True),
        (("directions",), None),
        (("directions", "total"), 0),
        (("directions", "examples"), 1),
        (("directions", "widest"), 10**400),
        (("arrays", "directions-0", 0), "(,)i4, i4"),
        (("arrays", "directions-0", 1), [-1, -1]),
    ],
    ids=repr,
)
def test_what_no_fit_describes_is_refused(tmp_path, saved, place, value):
    path = shutil.copytree(saved, tmp_path / "factors") / "factors.json"
    body = read_json(path)
    put(body, place, value)
    write_json(path, body)
    with pytest.raises(errors.StoreError, match=r"factors\.json is damaged|must hold values of a"):
        whence.Factors.load(path.parent)


@pytest.mark.parametrize(
    ("name", "value", "match"),
    [
        ("0-squares", np.nan, r"block-0-squares\.npy must be finite, got nan at \[0, 1\]"),
        ("0-left-0", -np.inf, r"block-0-left-0\.npy must be finite, got -inf at \[0, 1\]"),
        ("1-kronecker", -1.0, r"block-1-kronecker\.npy must be at least 0, got -1\.0"),
    ],
)
def test_values_that_no_fit_finds_are_named_by_their_file(tmp_path, saved, name, value, match):
    path = change_array(shutil.copytree(saved, tmp_path / "factors"), name, 1, value)
    with pytest.raises(errors.StoreError, match=match):
        whence.Factors.load(path)


@pytest.mark.parametrize(
    ("name", "change", "match"),
    [
        ("values", lambda it: it[::-1], "must fall"),
        ("moment", lambda it: -it, "a diagonal of at least 0"),
        ("moment", np.triu, "must be symmetric"),
    ],
)
def test_directions_that_no_fit_finds_are_refused(tmp_path, name, change, match):
    model, x = nn.Linear(4, 3), torch.randn(8, 4)
    data = [(x, torch.arange(8) % 3)]
    path = whence.fit_factors(model, data, lambda x, y: F.cross_entropy(model(x), y)).save(
        tmp_path / "factors"
    )
    whence.Factors.load(path)
    array = np.load(path / f"directions-{name}.npy")
    put_array(path, f"directions-{name}", np.ascontiguousarray(change(array)))
    with pytest.raises(errors.StoreError, match=match):
        whence.Factors.load(path)


def change_array(path, name, place, value):
    """Puts a value into an array of the first checkpoint, and makes its checksum fit."""
    name = f"checkpoint-0-block-{name}"
    array = np.load(path / f"{name}.npy")
    array.flat[place] = value
    put_array(path, name, array)
    return path


def put_array(path, name, array):
    """Writes an array anew, and makes its checksum fit."""
    body = read_json(path / "factors.json")
    body["files"][name] = write_array(path / f"{name}.npy", array)
    write_json(path / "factors.json", body)


def test_eigenvectors_that_overflow_are_an_error_of_ours(tmp_path):
    model, loss, x = case("perceptron")
    model, x = model.float(), x.float()
    fit(model, batches(x), loss, path=tmp_path / "fit")
    change_array(tmp_path / "fit" / "checkpoint-0000-eigenvalues", "0-left-vectors-0", 0, 3e38)
    with pytest.raises(errors.NotFiniteError, match="products of sampled rows must be finite, got"):
        fit(model, batches(x), loss, path=tmp_path / "fit")


@pytest.mark.parametrize(
    ("matrix", "match"),
    [
        (torch.full((1, 1), torch.nan), r"^it must be finite, got nan at \[0, 0\]"),
        (torch.full((2, 2), torch.inf), r"^it must be finite, got inf at \[0, 0\]"),
        (torch.full((9, 9), torch.nan), r"^it must be finite, got nan at \[0, 0\]"),
        (torch.full((40, 40), 3e38), r"^eigenvalues of it must be finite, got inf at \[39\]"),
    ],
)
def test_eigenvalues_that_are_not_finite_are_named(matrix, match):
    with pytest.raises(errors.NotFiniteError, match=match):
        eigh("it", matrix)


def test_eigenvalues_that_are_not_found_are_an_error_of_ours(monkeypatch):
    def lost(matrix):
        raise torch.linalg.LinAlgError("did not converge")

    monkeypatch.setattr(torch.linalg, "eigh", lost)
    with pytest.raises(errors.NotFiniteError, match="eigenvalues of it must be finite, got none"):
        eigh("it", torch.eye(2))


def test_a_folder_begun_by_something_else_is_refused(tmp_path):
    model, loss, x = case("perceptron")
    (tmp_path / "fit").mkdir()
    write_json(tmp_path / "fit" / "fit.json", ["longest"])
    with pytest.raises(errors.StoreError, match=r"fit\.json must hold a JSON object"):
        fit(model, batches(x), loss, path=tmp_path / "fit")


def test_a_killed_fit_goes_on(tmp_path):
    model, loss, x = case("perceptron")
    states = {name: wide(case("perceptron")[0]).state_dict() for name in "abc"}
    whole = fit(model, batches(x), loss, states=states)
    runs = []

    class Killed(Exception):
        pass

    def counted(model, x):
        runs.append(1)
        if len(runs) == 14:  # in the third checkpoint: two passes of three batches a checkpoint
            raise Killed
        return loss(model, x)

    with pytest.raises(Killed):
        fit(model, batches(x), counted, states=states, path=tmp_path / "fit")
    again = fit(model, batches(x), counted, states=states, path=tmp_path / "fit")
    assert len(runs) == 14 + 6 + 9  # the third once more, and a sample at each
    assert same(again, whole)
    third = fit(model, batches(x), counted, states=states, path=tmp_path / "fit")
    assert len(runs) == 14 + 6 + 9 + 9
    assert same(third, whole)


def test_what_a_kill_left_of_a_checkpoint_is_in_nobodys_way(tmp_path):
    model, loss, x = case("perceptron")
    part = tmp_path / "fit" / "checkpoint-0000-eigenvalues.part"
    part.mkdir(parents=True)
    (part / "factors.json").write_text("half")
    assert same(fit(model, batches(x), loss, path=tmp_path / "fit"), fit(model, batches(x), loss))
    assert not part.exists()


@pytest.mark.parametrize(
    "options",
    [
        {"layers": "0"},
        {"reduction": "sum"},
        {"damping": 0.2},
        {"coordinates": 5},
        {"leading": 0.5},
        {"corrected": False},
        {"longest": 2},
        {"examples": 3},
        {"sample": 5},
        {"seed": 1},
    ],
    ids=lambda options: next(iter(options)),
)
def test_a_fit_of_other_settings_does_not_go_on(tmp_path, options):
    model, loss, x = case("perceptron")
    fit(model, batches(x), loss, path=tmp_path / "fit")
    with pytest.raises(errors.MismatchError, match="path must be new or of the same"):
        fit(model, batches(x), loss, path=tmp_path / "fit", **options)


def test_a_fit_at_other_weights_does_not_go_on(tmp_path):
    model, loss, x = case("perceptron")
    fit(model, batches(x), loss, path=tmp_path / "fit")
    with pytest.raises(errors.MismatchError, match="path must be new or of the same weights"):
        fit(wide(model), batches(x), loss, path=tmp_path / "fit")


# Parameters in several places, and layers that were not seen


def in_several_places():
    numbers, indices = torch.randn(9, 4), torch.randint(0, 11, (9, 6))
    return {
        "one weight, two biases": (Shared("weight"), squares, numbers),
        "one bias, two weights": (Shared("bias"), squares, numbers),
        "one bias of convolutions": (Shared("bias", conv=True), squares, torch.randn(9, 2, 3, 3)),
        "a table used by hand": (ByHand(nn.Embedding(11, 5)), tokens, indices),
        "a weight used by hand": (ByHand(nn.Linear(4, 4, bias=False)), squares, numbers),
        "a weight without its bias": (frozen(nn.Linear(6, 5)), squares, torch.randn(9, 6)),
        "a transposed one without its bias": (frozen(Conv1D(5, 6)), squares, torch.randn(9, 6)),
        "a bias without its weight": (frozen(nn.Linear(6, 5), 0), squares, torch.randn(9, 6)),
    }


def frozen(layer, which=1):
    list(layer.parameters())[which].requires_grad_(False)
    return layer


@pytest.mark.parametrize("name", in_several_places())
def test_saved_factors_of_shared_parameters_are_read_as_they_were(tmp_path, name):
    model, loss, x = in_several_places()[name]
    factors = fit(model, batches(x), loss, uncovered="functional", longest=2)
    assert same(whence.Factors.load(factors.save(tmp_path / "factors")), factors)


@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("name", in_several_places())
def test_each_value_of_a_gradient_is_in_one_block(name, first):
    model, loss, x = in_several_places()[name]
    model = wide(model)
    if first and isinstance(model, Shared):  # the other order in the model
        model._modules = dict(reversed(model._modules.items()))
    x = x.double() if x.is_floating_point() else x
    factors = fit(model, batches(x), loss, uncovered="functional")
    exact = per_sample_gradients(model, loss, x)
    total = sum(float(each.flatten(1).square().sum(1).mean()) for each in exact.values())
    found = sum(float(each.sum()) for each in factors.eigenvalues().values())
    assert found == pytest.approx(total, rel=1e-5)
    for key, values in factors.eigenvalues().items():
        gradients = rotated_gradients(exact, known(factors)[key].block)
        assert close(values, gradients.square().mean(0))


def test_batches_of_any_size_weigh_as_much_as_their_examples():
    torch.manual_seed(8)
    for model in (frozen(Conv1D(5, 6)), Conv1D(5, 6), nn.Linear(6, 5)):
        model, x = wide(model), torch.randn(9, 6).double()
        one, other = (fit(model, batches(x, sizes=sizes)) for sizes in ((9,), (1, 8)))
        for key in known(one):
            for name in ("left", "right"):
                sums = [getattr(known(factors)[key], name).sums[0] for factors in (one, other)]
                assert close(sums[1], sums[0], 1e-9)


class Sometimes(nn.Module):
    """A second layer that only some examples reach, and attention in one form or another."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 8)
        self.second = nn.Linear(8, 8)
        self.table = nn.Embedding(3, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.scale = nn.LayerNorm(8)

    def forward(self, x, how):
        x = self.first(x)
        if how == "second":
            return self.second(x)
        if how == "table":
            return x + self.table(torch.zeros(len(x), dtype=torch.long))
        if how == "scale":
            return self.scale(x)
        x = x[:, None].expand(-1, 3, -1)
        other = {"self": x, "cross": x + 1}.get(how)
        return x if other is None else self.attention(x, other, other, need_weights=False)[0]


@pytest.mark.parametrize(
    ("before", "now"),
    [
        ("none", "second"),
        ("none", "table"),
        ("none", "scale"),
        ("self", "cross"),
        ("cross", "self"),
    ],
)
def test_layers_that_were_not_seen_before_are_named(tmp_path, before, now):
    torch.manual_seed(9)
    model, x = Sometimes(), torch.randn(9, 4)

    def loss(model, x, how):
        return model(x, how).square().sum() / len(x)

    name = {"second": "second.(weight|bias)", "table": "table", "scale": "scale"}.get(
        now, "in_proj"
    )
    first = fit(model, [(x, before)], loss)
    for run in (
        lambda: fit(
            model, [(x, now)], loss, start=fit(model, [(x, before)], loss, until=STAGES[0])
        ),
        lambda: fit(
            model, [(x, now)], loss, start=fit(model, [(x, before)], loss, until=STAGES[1])
        ),
        lambda: record_one(tmp_path / "store", model, first, lambda: loss(model, x, now)),
    ):
        with pytest.raises(errors.CoverageError, match=name):
            run()


def record_one(path, model, factors, closure):
    options = {"rotate": False, "precondition": factors, "dtype": "float32"}
    with whence.record(model, path, **options) as rec, rec.batch(range(9)):
        closure().backward()


# The sample


def gathered(monkeypatch):
    """The rows that directions are found of, at the first checkpoint, part by part."""
    seen = []

    class Watched(Leading):
        def add(self, samples):
            seen.append(samples[0])
            super().add(samples)

    monkeypatch.setattr("whence.curvature.fit.Leading", Watched)
    return seen


def test_the_sample_is_spread_evenly(monkeypatch):
    seen = gathered(monkeypatch)
    torch.manual_seed(10)
    model, x = nn.Linear(4, 3).double(), torch.randn(60, 4).double()
    loader = batches(x, sizes=[3] * 20)
    fit(model, loader, sample=60)
    whole = seen.pop()
    assert len(whole) == 60
    for sample in (3, 9, 20, 31, 59):
        assert fit(model, loader, sample=sample).directions.examples == sample
        found = seen.pop()
        assert len(found) == sample
        places = [int((whole - row).square().sum(1).argmin()) for row in found]
        gaps = np.diff([0, *places, 60])
        assert gaps.max() <= 60 / (sample / 3) + 6  # whole batches, and the last cut off


@pytest.mark.parametrize("sizes", [[30, 1, 1, 1], [1, 1, 1, 30], [5, 0, 28]])
def test_all_is_sampled_where_there_is_no_more(sizes):
    torch.manual_seed(10)
    model, x = nn.Linear(4, 3), torch.randn(sum(sizes), 4)
    factors = fit(model, batches(x, sizes=[size for size in sizes if size]), sample=40)
    assert factors.directions.examples == len(x)


def test_a_loader_without_a_length_is_sampled_as_well():
    class Loader:
        def __iter__(self):
            return iter(batches(x, sizes=[2] * 20))

    torch.manual_seed(10)
    model, x = nn.Linear(4, 3), torch.randn(40, 4)
    one, other = (
        fit(model, loader, sample=6, examples=20)
        for loader in (Loader(), batches(x, sizes=[2] * 20))
    )
    assert same_directions(one.directions, other.directions)


def test_the_first_passes_see_as_many_examples_as_asked():
    model, x = nn.Linear(4, 3).double(), torch.randn(30, 4).double()
    factors = fit(model, batches(x, sizes=[5] * 6), examples=10, sample=30)
    assert factors.checkpoints[0].statistics.examples == [10, 10]
    alone = fit(model, batches(x[:10], sizes=[5] * 2), sample=10)
    assert torch.equal(
        factors.eigenvalues()["weight", 0, "outer"], alone.eigenvalues()["weight", 0, "outer"]
    )


# Directions


def falling(count, sizes, decay, seed=0):
    """Rows of some checkpoints, whose directions matter less and less."""
    torch.manual_seed(seed)
    whole = torch.randn(count, sum(sizes)) * decay ** torch.arange(sum(sizes))
    return list((whole @ torch.linalg.qr(torch.randn(sum(sizes), sum(sizes)))[0]).split(sizes, 1))


def by_definition(samples, weights):
    """[examples, coordinates] rows side by side, over the root of their norm, in float64."""
    pairs = zip(samples, weights, strict=True)
    rows = torch.cat([sample.double() * weight**0.5 for sample, weight in pairs], 1)
    return rows, rows * rows.norm(dim=1).clamp(min=1e-30).rsqrt()[:, None]


@pytest.mark.parametrize("parts", [1, 2, 9])
def test_directions_are_the_right_singular_vectors(parts, monkeypatch):
    monkeypatch.setattr("whence.curvature.basis.ALONE", 10)
    samples, weights = falling(80, (30, 20), 0.6), (0.3, 0.7)
    samples = [torch.cat([sample, torch.zeros(1, sample.shape[1])]) for sample in samples]
    leading = Leading(20, weights)
    for part in zip(*(sample.tensor_split(parts) for sample in samples), strict=True):
        leading.add(part)
    found = leading.directions()
    rows, scaled = by_definition(samples, weights)
    _, values, vectors = torch.linalg.svd(scaled, full_matrices=False)
    kept = len(found.values)
    assert 10 <= kept <= 20
    assert close(found.values.double(), values[:kept].square(), 1e-4)
    assert found.examples == 81
    assert found.total == pytest.approx(float(values.square().sum()), rel=1e-5)
    assert found.energy(3) == pytest.approx(
        float(values[:3].square().sum() / values.square().sum()), rel=1e-5
    )
    # Up to the sign of each: what rows are in the leading directions.
    projected = sum(sample @ matrix for sample, matrix in zip(samples, found.matrices, strict=True))
    wanted = rows @ vectors[:6].T
    assert close((projected[:, :6].double() * wanted).sum(0).abs(), wanted.square().sum(0), 1e-3)
    assert close(projected[:, :6].double().abs(), wanted.abs(), 1e-2)


def test_directions_that_were_cut_hold_what_fits_best(monkeypatch):
    """Of rows that never end in few directions, the kept ones still hold nearly the most."""
    monkeypatch.setattr("whence.curvature.basis.ALONE", 10)
    samples = falling(400, (60,), 0.93)
    leading = Leading(16, (1.0,))
    leading.add(samples)
    found = leading.directions()
    _, scaled = by_definition(samples, (1.0,))
    most = torch.linalg.svdvals(scaled).square()
    basis = torch.linalg.qr(found.matrices[0].double())[0]
    for dim in (4, 8, 16):
        held = float((scaled @ basis[:, :dim]).square().sum())
        assert 0.97 * float(most[:dim].sum()) <= held <= 1.0001 * float(most[:dim].sum())
    assert found.energy(16) <= float(most[:16].sum() / most.sum()) * 1.0001


def test_rows_are_damped_by_the_curvature_that_is_left():
    """A turned basis times P, of P Pᵀ = (1 + M / r)^-1 with r = tr M³ / tr M²."""
    leading = Leading(8, (1.0,))
    leading.add(falling(50, (12,), 0.7))
    found = leading.directions()
    moment = torch.randn(8, 20) * torch.tensor([9.0, 5, 3, 2, 1, 1, 1, 1])[:, None]
    moment = moment @ moment.T / 20
    refined = replace(found, moment=moment)
    for dim in (3, 8):
        part = moment[:dim, :dim].double()
        ridge = torch.trace(part @ part @ part) / torch.trace(part @ part)
        middle = torch.linalg.inv(torch.eye(dim) + part / ridge)
        matrix = found.matrices[0][:, :dim].double()
        for turn in (None, 0, 7):
            (basis,) = map(torch.from_numpy, bases(refined, dim, turn))
            assert close((basis @ basis.T).double(), matrix @ middle @ matrix.T, 1e-4)
        (plain,) = bases(found, dim, None)
        assert np.array_equal(plain, found.matrices[0][:, :dim].numpy())


def test_more_directions_than_were_kept_are_refused():
    leading = Leading(8, (1.0,))
    leading.add(falling(50, (12,), 0.7))
    found = leading.directions()
    assert bases(found, 8, None)[0].shape == (12, 8)
    with pytest.raises(errors.ArgumentError, match=r"dim must be at most 8, .*larger widest"):
        bases(found, 9, None)


def test_directions_of_zeros_are_refused():
    leading = Leading(8, (1.0,))
    leading.add([torch.zeros(5, 12)])
    with pytest.raises(errors.ArgumentError, match="got only zeros"):
        leading.directions()


@pytest.mark.parametrize("labels", ["sampled", "empirical"])
def test_stretches_of_the_sample_change_nothing(monkeypatch, labels):
    torch.manual_seed(3)
    model, x = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)), torch.randn(30, 4)
    loader = [(part, torch.arange(len(part)) % 3) for part in x.split(4)]
    states = {
        name: {key: value * scale for key, value in model.state_dict().items()}
        for name, scale in (("a", 1.0), ("b", 1.5))
    }

    def loss(model, x, y):
        return F.cross_entropy(model(x), y)

    def found():
        return fit(model, loader, loss, labels=labels, residuals="averaged", states=states)

    whole = found().directions
    assert (whole.moment is None) == (labels == "empirical")
    monkeypatch.setattr("whence.curvature.fit.RESIDUAL_BYTES", 100)
    parts = found().directions
    if labels == "sampled":  # a sum over parts
        assert close(parts.moment, whole.moment)
        parts = replace(parts, moment=whole.moment)
    assert same_directions(parts, whole)
    if labels == "empirical":  # other draws otherwise
        monkeypatch.setattr("whence.curvature.fit.TOGETHER", 9)
        assert same_directions(found().directions, whole)


def test_a_loss_that_fails_anywhere_leaves_the_model_as_it_was():
    torch.manual_seed(3)
    model, x = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)), torch.randn(12, 4)
    model.train()
    loader = [(part, torch.arange(len(part)) % 3) for part in x.split(6)]
    states = {
        name: {key: value * scale for key, value in model.state_dict().items()}
        for name, scale in (("a", 1.5), ("b", 2.0))
    }
    calls = 0

    def loss(model, x, y):
        nonlocal calls
        calls += 1
        if calls == last:
            raise KeyboardInterrupt
        return F.cross_entropy(model(x), y)

    last = -1
    fit(model, loader, loss, labels="sampled", states=states)
    every = calls
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for last in range(1, every + 1):
        calls = 0
        try:
            fit(model, loader, loss, labels="sampled", states=states)
        except KeyboardInterrupt:  # while the exception lives
            assert all(torch.equal(value, before[name]) for name, value in model.named_parameters())
            assert model.training
            assert not any(module._forward_hooks for module in model.modules())
        else:
            raise AssertionError(f"call {last} must fail")


def test_the_random_state_is_as_before():
    dataset = torch.utils.data.TensorDataset(torch.randn(30, 4))
    loader = torch.utils.data.DataLoader(dataset, batch_size=7)
    model = nn.Linear(4, 3)
    before = torch.get_rng_state()
    whence.fit_factors(
        model, loader, lambda x: F.mse_loss(model(x), torch.zeros(len(x), 3)), progress=False
    )
    assert torch.equal(torch.get_rng_state(), before)


def test_the_sample_is_the_same_after_a_kill(tmp_path, monkeypatch):
    seen = gathered(monkeypatch)
    torch.manual_seed(10)
    model, x = nn.Linear(4, 3), torch.randn(110, 4)
    loader = batches(x, sizes=[50, 20, 40])
    fit(model, loader, sample=120, path=tmp_path / "fit")
    fit(model, loader, sample=120, path=tmp_path / "fit")
    assert [len(each) for each in seen] == [110, 110]


def test_rows_wider_than_the_sample_are_refused_though_some_are_equal():
    torch.manual_seed(10)
    model, x = nn.Linear(7, 8), torch.randn(40, 7)
    x[1] = x[0]
    factors = fit(model, batches(x, sizes=[40]), sample=40)
    with pytest.raises(errors.ArgumentError, match="dim must be at most 40"):
        factors.prepared(60, None, None, turned=False)
    assert f"{factors.rank} columns 100%" in factors.explain()


def test_an_empty_batch_is_named():
    model, x = nn.Linear(4, 3), torch.randn(6, 4)
    with pytest.raises(errors.ArgumentError, match="loader must give batches of at least one"):
        fit(model, [(x,), (x[:0],)])


def test_rows_of_any_size_have_directions():
    for scale in (1e-20, 1e20):
        leading = Leading(8, (1.0,))
        leading.add([falling(50, (12,), 0.7)[0] * scale])
        plain = Leading(8, (1.0,))
        plain.add(falling(50, (12,), 0.7))
        one, other = leading.directions(), plain.directions()
        assert close(one.values / scale, other.values, 1e-4)


# Models as people have them


class Positions(nn.Module):
    """Positions by arange, a tied head, and a loss of its own if it is given labels."""

    def __init__(self):
        super().__init__()
        self.token = nn.Embedding(13, 8)
        self.position = nn.Embedding(6, 8)
        self.middle = nn.Linear(8, 8)
        self.head = nn.Linear(8, 13, bias=False)
        self.head.weight = self.token.weight

    def forward(self, x, y=None):
        h = self.token(x) + self.position(torch.arange(x.shape[1]))
        out = self.head(torch.tanh(self.middle(h)))
        return out if y is None else F.cross_entropy(out.transpose(1, 2), y)


def test_labels_are_drawn_where_a_model_computes_its_own_loss():
    torch.manual_seed(11)
    model = Positions()
    x, y = torch.randint(0, 13, (9, 6)), torch.randint(0, 13, (9, 6))
    inside, outside, told = (
        fit(model, batches(x, y), loss, labels="sampled", unbatched=unbatched)
        for loss, unbatched in (
            (lambda m, x, y: m(x, y), ()),
            (lambda m, x, y: F.cross_entropy(m(x).transpose(1, 2), y), ()),
            # With which the model is not run a second time to see what positions are.
            (lambda m, x, y: m(x, y), ["position"]),
        )
    )
    assert same(inside, outside)
    assert same(inside, told)


@pytest.mark.parametrize("reduction", ["mean", "sum", "token_mean"])
def test_every_reduction_gives_the_factors_of_own_losses(reduction):
    model, _, x = case("tied")
    y = x.clone()
    y[1, 3:] = y[4, 2:] = -100
    counts = (y != -100).sum(1)

    def loss(model, x, y):
        each = F.cross_entropy(model(x).transpose(1, 2), y, reduction="none").sum(1)
        if reduction == "token_mean":
            return each.sum() / (y != -100).sum()
        return each.mean() if reduction == "mean" else each.sum()

    tokens = (lambda x, y: (y != -100).sum(1)) if reduction == "token_mean" else None
    assert counts.min() < counts.max()
    factors = fit(model, batches(x, y), loss, reduction=reduction, tokens=tokens)

    def own(model, x, y):
        return F.cross_entropy(model(x).transpose(1, 2), y, reduction="sum")

    exact = exact_gradients(model, own, x, y)
    for key, values in factors.eigenvalues().items():
        gradients = rotated_gradients(exact[key[2]], known(factors)[key].block)
        assert close(values, gradients.square().mean(0))


def test_a_batch_is_unpacked_if_it_is_a_list_or_tuple():
    model, loss, x = case("perceptron")
    wanted = fit(model, batches(x), loss)
    dicts = [{"x": part} for (part,) in batches(x)]
    assert same(fit(model, dicts, lambda m, batch: loss(m, batch["x"])), wanted)
    alone = [part for (part,) in batches(x)]
    assert same(fit(model, alone, loss), wanted)
    rows = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x), batch_size=3)
    assert same(fit(model, rows, loss), fit(model, batches(x, sizes=(3, 3, 3)), loss))


def test_states_may_be_files(tmp_path):
    model, loss, x = case("perceptron")
    states = {name: wide(case("perceptron")[0]).state_dict() for name in "ab"}
    for name, state in states.items():
        torch.save(state, tmp_path / name)
    paths = {name: tmp_path / name for name in states}
    assert same(
        fit(model, batches(x), loss, states=paths), fit(model, batches(x), loss, states=states)
    )


def test_what_fails_leaves_the_model_as_it_was():
    model, loss, x = case("perceptron")
    model.train()
    before = [value.clone() for value in model.state_dict().values()]
    calls = []

    def failing(model, x):
        calls.append(1)
        if len(calls) == 5:
            raise KeyError("the user's own")
        return loss(model, x)

    states = {"a": wide(case("perceptron")[0]).state_dict()}
    with pytest.raises(KeyError, match="the user's own"):
        fit(model, batches(x), failing, states=states)
    assert all(map(torch.equal, before, model.state_dict().values()))
    assert model.training
    assert not model[0]._forward_hooks
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_parts_of_a_batch_give_the_same(monkeypatch):
    model, loss, x = case("conv2d grouped")
    wanted = fit(model, batches(x), loss)
    monkeypatch.setattr("whence.curvature.statistics.PRODUCTS", 1)
    monkeypatch.setattr("whence.gradients.coordinates.FORMED_VALUES", 1)
    monkeypatch.setattr("whence.gradients.layers.UNFOLDED_VALUES", 1)
    found = fit(model, batches(x), loss)
    for key, values in found.eigenvalues().items():
        assert close(values, wanted.eigenvalues()[key], 1e-6)
    assert close(found.directions.values, wanted.directions.values, 1e-4)


@pytest.mark.parametrize(
    ("options", "kind", "match"),
    [
        ({"damping": 0}, errors.ArgumentError, "damping must be"),
        ({"damping": float("nan")}, errors.ArgumentError, "damping must be"),
        ({"damping": "much"}, errors.DtypeError, "damping must be"),
        ({"coordinates": 0}, errors.ArgumentError, "coordinates must be"),
        ({"leading": 0}, errors.ArgumentError, "leading must be"),
        ({"leading": 1.5}, errors.ArgumentError, "leading must be at most 1"),
        ({"corrected": 1}, errors.DtypeError, "corrected must be"),
        ({"longest": 0}, errors.ArgumentError, "longest must be"),
        ({"examples": 0}, errors.ArgumentError, "examples must be"),
        ({"sample": 1}, errors.ArgumentError, "sample must be"),
        ({"seed": -1}, errors.ArgumentError, "seed must be"),
        ({"seed": 1 << 64}, errors.ArgumentError, "seed must be"),
        ({"until": "the end"}, errors.ArgumentError, "until must be one of"),
        ({"labels": "guessed"}, errors.ArgumentError, "labels must be one of"),
        ({"reduction": "max"}, errors.ArgumentError, "reduction must be one of"),
        ({"reduction": "token_mean"}, errors.ArgumentError, "tokens must be a function"),
        ({"tokens": lambda x: x}, errors.ArgumentError, "tokens must be a function"),
        ({"states": {}}, errors.DtypeError, "states must be"),
        ({"states": {"a": {}}}, errors.CheckpointError, "must fit the model"),
        ({"states": {1: {}}}, errors.ArgumentError, "states must be named"),
        ({"weights": {"0": 0}}, errors.ArgumentError, "positive"),
        ({"weights": {"a": 1}}, errors.CheckpointError, "weights must be one for each"),
        ({"layers": "zzz"}, errors.ArgumentError, "layers must each match"),
        ({"uncovered": "keep"}, errors.ArgumentError, "uncovered must be"),
        ({"unbatched": 3}, errors.DtypeError, "unbatched must be"),
        ({"start": 3}, errors.DtypeError, "start must be Factors"),
        ({"path": 3}, errors.DtypeError, "path must be a path"),
        ({"loader": None}, errors.DtypeError, "loader must be batches"),
        ({"loader": iter([])}, errors.DtypeError, "loader must be batches"),
        ({"loader": []}, errors.ArgumentError, "at least one batch"),
        ({"model": "model"}, errors.DtypeError, "model must be an nn.Module"),
        ({"loss": "loss"}, errors.DtypeError, "loss must be a function"),
        ({"loss": lambda x: None}, errors.DtypeError, "loss must return the loss"),
        ({"loss": lambda x: x.sum()}, errors.LayerError, "loss must return a loss of the"),
    ],
    ids=lambda value: str(value)[:30] if isinstance(value, dict) else "",
)
def test_wrong_arguments_are_named(options, kind, match):
    model, loss, x = case("perceptron")
    arguments = {
        "model": model,
        "loader": batches(x),
        "loss": lambda x: loss(model, x),
        "labels": "empirical",
        "progress": False,
        **options,
    }
    with pytest.raises(kind, match=match):
        whence.fit_factors(**arguments)


@pytest.mark.parametrize(
    "sampler",
    [
        lambda data: {"shuffle": True},
        lambda data: {"sampler": torch.utils.data.SubsetRandomSampler(range(len(data)))},
        lambda data: {"sampler": torch.utils.data.WeightedRandomSampler([1.0] * len(data), 9)},
        lambda data: {
            "batch_sampler": torch.utils.data.BatchSampler(
                torch.utils.data.RandomSampler(data), 3, drop_last=False
            )
        },
    ],
)
def test_loaders_of_another_order_each_time_are_refused(sampler):
    model, loss, x = case("perceptron")
    data = torch.utils.data.TensorDataset(x)
    with pytest.raises(errors.ArgumentError, match="in one order"):
        fit(model, torch.utils.data.DataLoader(data, **sampler(data)), loss)


def test_a_loss_of_no_gradient_has_no_factors():
    model, _, x = case("perceptron")
    with pytest.raises(errors.ArgumentError, match="eigenvalues above zero"):
        fit(model, batches(x), lambda m, x: (m(x) * 0).sum())


def test_what_was_not_fitted_is_not_there():
    model, loss, x = case("perceptron")
    factors = fit(model, batches(x), loss, until="covariance")
    with pytest.raises(errors.ArgumentError, match="up to 'eigenvalues'"):
        factors.eigenvalues()
    factors = fit(model, batches(x), loss, until="eigenvalues")
    with pytest.raises(errors.ArgumentError, match="up to 'basis'"):
        factors.energy(3)
    with pytest.raises(errors.ArgumentError, match="checkpoint must be"):
        factors.eigenvalues(1)
    with pytest.raises(errors.DtypeError, match="parts must be a list"):
        whence.Factors.merge(factors)


@pytest.mark.parametrize(
    ("dtype", "row"),
    [("float32", 404), ("float16", 204), ("int8", 104), ("int4", 54), ("int1", 17)],
)
def test_the_cost_of_rows_is_what_they_take(tmp_path, dtype, row):
    model, loss, x = case("perceptron")
    factors = fit(model.float(), batches(x.float()), loss)
    cost = factors.cost(100, dtype)
    assert cost.row == row
    assert cost.each(1000) == pytest.approx(row + cost.shared / 1000)
    with pytest.raises(errors.ArgumentError, match="dtype must be"):
        factors.cost(100, "int3")
    with pytest.raises(errors.ArgumentError, match="dim must be"):
        factors.cost(0)


def test_the_shared_cost_is_what_a_store_keeps_of_its_map(tmp_path):
    model, loss, x = case("perceptron")
    model, x = model.float(), x.float()
    factors = fit(model, batches(x), loss, states={name: model.state_dict() for name in "ab"})
    whence.record_checkpoints(
        model,
        tmp_path / "s",
        batches(x),
        lambda x: loss(model, x),
        precondition=factors,
        states={name: model.state_dict() for name in "ab"},
        dim=5,
        dtype="float32",
        progress=False,
    )
    arrays = [np.load(path) for path in (tmp_path / "s").glob("map-*/*.npy")]
    assert factors.cost(5).shared == sum(array.nbytes for array in arrays)


def test_second_moments_that_overflow_are_an_error_that_names_the_layer(tmp_path):
    """Gradients and covariances are finite in float32, and products of squares are not."""
    torch.manual_seed(0)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.large, self.small = nn.Linear(4, 3), nn.Linear(4, 3)

        def forward(self, x):
            return self.large(x) * 1e10 + self.small(x / 1e10)

    model = Model()
    batches = [(torch.randn(8, 4) * 1e10, torch.randn(8, 3)) for _ in range(4)]

    def loss(x, y):
        return (model(x) * y).mean()

    for _ in range(2):
        with pytest.raises(
            errors.NotFiniteError, match=r"second moments of large\.weight must be f"
        ):
            whence.fit_factors(model, batches, loss, labels="empirical", path=tmp_path / "fit")


def test_a_checkpoint_is_named_as_records_can_be(tmp_path):
    model, loss, x = case("perceptron")
    with pytest.raises(errors.ArgumentError, match="states must be named by a non-empty str with"):
        whence.fit_factors(model, [(x,)], loss, states={"a\0b": model.state_dict()})


def test_a_full_disk_leaves_nothing_of_factors(tmp_path, monkeypatch):
    model, loss, x = case("perceptron")
    factors = fit(model, batches(x), loss)

    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr("whence.store.files.NewFile._put", full)
        with pytest.raises(errors.StoreError, match="No space left"):
            factors.save(tmp_path / "f")
    assert not list(tmp_path.iterdir())
    assert [each.name for each in factors.save(tmp_path / "f").parent.iterdir()] == ["f"]
