"""Queries: scores against exact gradient products, states, and what is left behind."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from oracle import per_sample_gradients
from torch import nn

import whence
from whence import errors

DIM = 256


def model_of():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(inplace=True), nn.Dropout(0.5), nn.Linear(8, 3))


def loss(model, x, y):
    return F.cross_entropy(model(x), y)


@pytest.fixture
def data():
    torch.manual_seed(2)
    return torch.randn(30, 6), torch.randint(0, 3, (30,))


def fill(rec, model, x, y):
    for first in range(0, len(x), 10):
        part = slice(first, first + 10)
        with rec.batch([f"n{i}" for i in range(first, first + 10)], label=y[part]):
            loss(model, x[part], y[part]).backward()


def rows(model, x, y):
    return whence.Sketch(dim=DIM)(per_sample_gradients(model, loss, x, y)).astype(np.float64)


@pytest.fixture
def still(tmp_path, data):
    model = model_of().eval()
    with whence.record(model, tmp_path / "still", dim=DIM, dtype="float32") as rec:
        fill(rec, model, *data)
    return model, tmp_path / "still"


@pytest.fixture
def path_of_training(tmp_path, data):
    """Two checkpoints with learning rates, and their weights."""
    model = model_of().eval()
    states = {}
    with whence.record(model, tmp_path / "s", dim=DIM, dtype="float32") as rec:
        for name, rate in (("one", 0.5), ("two", 0.125)):
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(torch.randn_like(parameter), alpha=0.3)
            rec.checkpoint(name, learning_rate=rate)
            fill(rec, model, *data)
            states[name] = {key: value.clone() for key, value in model.state_dict().items()}
    return model, tmp_path / "s", states


def test_scores_are_inner_products_of_the_rows(still, data):
    model, path = still
    x, y = data[0][:4] + 0.1, data[1][:4]
    hits = whence.query(model, path, lambda: loss(model, x, y), k=30)
    exact = rows(model, x, y) @ rows(model, *data).T
    order = np.argsort(-exact, axis=1, kind="stable")
    for query in range(4):
        expected = [f"n{i}" for i in order[query]]
        assert hits.helpful.ids[query].tolist() == expected
        assert hits.harmful.ids[query].tolist() == expected[::-1]
    assert np.allclose(hits.helpful.scores, np.take_along_axis(exact, order, 1), rtol=1e-4)


def test_a_positive_score_means_that_training_on_it_lowers_the_querys_loss(still, data):
    model, path = still
    x, y = data
    hits = whence.query(model, path, lambda: loss(model, x[:1], y[:1]), k=30)
    norms = dict(zip(whence.open(path).ids, whence.open(path).norms(), strict=True))
    query_norm = np.linalg.norm(rows(model, x[:1], y[:1]))
    model, x, rate = model.double(), x.double(), 1e-6
    before = loss(model, x[:1], y[:1]).item()
    start = {key: value.clone() for key, value in model.state_dict().items()}
    for id_, score in zip(hits.helpful.ids[0], hits.helpful.scores[0], strict=True):
        model.load_state_dict(start)
        model.zero_grad()
        index = int(id_[1:])
        loss(model, x[index : index + 1], y[index : index + 1]).backward()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= rate * parameter.grad
        change = (before - loss(model, x[:1], y[:1]).item()) / rate
        deviation = whence.Sketch(dim=DIM).expected_error(1.0) * norms[id_] * query_norm
        assert abs(change - score) < 4 * deviation


def test_checkpoints_are_summed_with_their_learning_rates(path_of_training, data):
    model, path, states = path_of_training
    x, y = data[0][:3] - 0.2, data[1][:3]
    hits = whence.query(model, path, lambda: loss(model, x, y), k=5, states=states)
    exact = 0
    for name, rate in (("one", 0.5), ("two", 0.125)):
        model.load_state_dict(states[name])
        exact = exact + rate * rows(model, x, y) @ rows(model, *data).T
    expected = np.argsort(-exact, axis=1, kind="stable")[:, :5]
    assert hits.helpful.ids.tolist() == [[f"n{i}" for i in row] for row in expected]
    assert np.allclose(
        hits.helpful.scores, np.take_along_axis(exact, expected, 1), rtol=1e-4, atol=1e-6
    )


def test_states_come_from_files_too(path_of_training, data, tmp_path):
    model, path, states = path_of_training
    files = {}
    for name, state in states.items():
        files[name] = tmp_path / f"{name}.pt"
        torch.save(state, files[name])
    closure = lambda: loss(model, data[0][:2], data[1][:2])  # noqa: E731
    first = whence.query(model, path, closure, states=states)
    second = whence.query(model, path, closure, states=files)
    assert np.array_equal(first.helpful.scores, second.helpful.scores)


class Broken(Exception):
    pass


@pytest.mark.parametrize("failing", [False, True])
def test_everything_is_put_back(path_of_training, data, failing):
    model, path, states = path_of_training
    model.train()
    model[0].eval()
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    model[0].weight.requires_grad_(False)
    torch.manual_seed(5)
    before = (
        {key: value.clone() for key, value in model.state_dict().items()},
        [module.training for module in model.modules()],
        [parameter.grad for parameter in model.parameters()],
        [parameter.requires_grad for parameter in model.parameters()],
        torch.get_rng_state(),
        [len(m._forward_hooks) for m in model.modules()],
    )

    def closure():
        model.eval()
        torch.rand(3)
        result = loss(model, data[0][:2], data[1][:2])
        if failing:
            raise Broken
        return result

    if failing:
        with pytest.raises(Broken):
            whence.query(model, path, closure, states=states)
    else:
        whence.query(model, path, closure, states=states)
    assert all(torch.equal(before[0][key], value) for key, value in model.state_dict().items())
    assert [module.training for module in model.modules()] == before[1]
    assert all(
        p.grad is g and (g == 1).all() for p, g in zip(model.parameters(), before[2], strict=True)
    )
    assert [parameter.requires_grad for parameter in model.parameters()] == before[3]
    assert torch.equal(torch.get_rng_state(), before[4])
    assert [len(m._forward_hooks) for m in model.modules()] == before[5]


def test_a_model_frozen_after_training_can_be_asked(still, data):
    model, path = still
    hits = whence.query(model, path, lambda: loss(model, data[0][:2], data[1][:2]))
    model.requires_grad_(False)
    again = whence.query(model, path, lambda: loss(model, data[0][:2], data[1][:2]))
    assert np.array_equal(hits.helpful.scores, again.helpful.scores)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda states: None, "states must have the weights of each checkpoint .* got None"),
        (lambda states: {"one": states["one"]}, r"got none for \['two'\]"),
        (lambda states: {**states, "three": states["one"]}, "got 'three'"),
        (lambda states: {**states, "two": {}}, "odd|is missing"),
        (lambda states: {**states, "two": 3}, "got int"),
        (
            lambda states: {**states, "two": {**states["two"], "0.bias": torch.zeros(9)}},
            r"0\.bias of shape \[9\]",
        ),
    ],
)
def test_states_that_do_not_fit_are_named(path_of_training, data, change, match):
    model, path, states = path_of_training
    before = model.state_dict()["0.weight"].clone()
    with pytest.raises(errors.CheckpointError, match=match):
        whence.query(model, path, lambda: loss(model, *data), states=change(states))
    assert torch.equal(model.state_dict()["0.weight"], before)


def test_a_missing_file_of_states_is_named(path_of_training, data):
    model, path, states = path_of_training
    states = {**states, "one": "nowhere.pt"}
    with pytest.raises(errors.StoreError, match=r"states\['one'\] .* nowhere\.pt"):
        whence.query(model, path, lambda: loss(model, *data), states=states)


def test_a_list_of_models_is_refused(still, data):
    model, path = still
    with pytest.raises(errors.DtypeError, match=r"one nn\.Module, since the closure sees one"):
        whence.query([model, model], path, lambda: loss(model, *data))


def test_other_weights_than_the_fixed_ones_are_refused(still, data):
    model, path = still
    with torch.no_grad():
        model[0].weight += 1
    with pytest.raises(errors.WeightsError, match="checkpoint '0'"):
        whence.query(model, path, lambda: loss(model, *data))


@pytest.mark.parametrize(
    ("closure", "error", "match"),
    [
        (lambda model, x, y: 3.0, errors.DtypeError, "got float 3.0"),
        (lambda model, x, y: model(x), errors.DtypeError, r"shape \[30, 3\]"),
        (lambda model, x, y: loss(model, x, y).detach(), errors.LayerError, "without a graph"),
        (
            lambda model, x, y: torch.ones((), requires_grad=True) * 2,
            errors.LayerError,
            "no gradient in any layer",
        ),
        (
            lambda model, x, y: loss(model, x * float("nan"), y),
            errors.NotFiniteError,
            "query 0",
        ),
    ],
)
def test_a_closure_that_cannot_be_is_refused(still, data, closure, error, match):
    model, path = still
    with pytest.raises(error, match=match):
        whence.query(model, path, lambda: closure(model, *data))


def test_another_model_is_refused_by_name(still, data):
    _, path = still
    other = nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Dropout(), nn.Linear(9, 3))
    with pytest.raises(errors.MismatchError, match=r"0\.bias \[8\] in linear, got 0\.bias \[9\]"):
        whence.query(other, path, lambda: loss(other, *data))


def test_the_stores_reduction_is_used_unless_told_otherwise(still, data):
    model, path = still
    x, y = data[0][:3], data[1][:3]
    mean = whence.query(model, path, lambda: F.cross_entropy(model(x), y))
    summed = whence.query(
        model, path, lambda: F.cross_entropy(model(x), y, reduction="sum"), reduction="sum"
    )
    assert np.allclose(mean.helpful.scores, summed.helpful.scores, rtol=1e-5)


def test_an_id_without_a_checkpoint_is_an_error_or_dropped(tmp_path, data):
    model = model_of().eval()
    x, y = data
    with whence.record(model, tmp_path / "s", dim=DIM) as rec:
        rec.checkpoint("one")
        fill(rec, model, x, y)
        rec.checkpoint("two")
        fill(rec, model, x[10:], y[10:])
    states = dict.fromkeys(("one", "two"), model.state_dict())
    closure = lambda: loss(model, x[:2], y[:2])  # noqa: E731
    with pytest.raises(errors.IdError, match=r"'n[0-9]+' without one in 'two' \(10 such ids"):
        whence.query(model, tmp_path / "s", closure, states=states)
    hits = whence.query(model, tmp_path / "s", closure, k=99, states=states, missing="drop")
    assert hits.helpful.ids.shape == (2, 20)
    assert set(hits.helpful.ids[0]) == {f"n{i}" for i in range(20)}


def test_dropout_draws_the_same_for_every_checkpoint(tmp_path, data):
    model = model_of().eval()
    x, y = data
    with whence.record(model, tmp_path / "s", dim=DIM) as rec:
        for name in ("one", "two"):
            rec.checkpoint(name)
            fill(rec, model, x, y)
    model.train()
    states = dict.fromkeys(("one", "two"), model.state_dict())
    seen = []

    def closure():
        seen.append(torch.rand(1).item())
        return loss(model, x[:2], y[:2])

    whence.query(model, tmp_path / "s", closure, states=states)
    assert seen[0] == seen[1]
