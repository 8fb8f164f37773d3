"""Evaluations that run a model: steps on what was found, and what must hold of any scores."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from filled import fill, random_rows
from torch import nn

import whence
from whence import errors, evaluate
from whence.evaluate.sanity_checks import Asked, stored_queries

# Tail-patch


def model_of(*extra):
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), *extra, nn.Linear(8, 3))


@pytest.fixture
def data():
    torch.manual_seed(2)
    return torch.randn(30, 5), torch.randint(0, 3, (30,))


def patch(model, data, found, optimizer=None, **given):
    """Steps on training examples; query i is example 20 + i."""
    x, y = data
    return evaluate.tail_patch(
        model,
        found,
        lambda id_: F.cross_entropy(model(x[id_ : id_ + 1]), y[id_ : id_ + 1]),
        lambda query: model(x[20 + query])[None].log_softmax(1)[0, y[20 + query]],
        optimizer or (lambda parameters: torch.optim.SGD(parameters, lr=0.5)),
        **given,
    )


def by_hand(data, found, step):
    """The same with a fresh model for each step."""
    x, y = data
    changes = np.empty(np.shape(found))
    for query, ids in enumerate(found):
        at = 20 + query
        for place, id_ in enumerate(ids):
            model = model_of()
            before = -F.cross_entropy(model(x[at : at + 1]), y[at : at + 1]).item()
            loss = F.cross_entropy(model(x[id_ : id_ + 1]), y[id_ : id_ + 1])
            gradients = torch.autograd.grad(loss, list(model.parameters()))
            with torch.no_grad():
                for parameter, gradient in zip(model.parameters(), gradients, strict=True):
                    parameter -= step(gradient)
            after = -F.cross_entropy(model(x[at : at + 1]), y[at : at + 1]).item()
            changes[query, place] = after - before
    return changes


SEEN = [[3, 4], [4, 7], [9, 3]]


def test_each_example_is_stepped_on_alone(data):
    found = patch(model_of(), data, SEEN)
    assert found.changes == pytest.approx(by_hand(data, SEEN, lambda g: 0.5 * g), abs=1e-6)
    assert found.per_query == pytest.approx(found.changes.mean(axis=1))
    assert found.measure == "tail-patch"


def test_a_new_adam_steps_by_its_learning_rate(data):
    found = patch(model_of(), data, SEEN, lambda p: torch.optim.Adam(p, lr=0.01, eps=0))
    expected = by_hand(data, SEEN, lambda g: 0.01 * torch.sign(g))
    assert found.changes == pytest.approx(expected, abs=1e-6)


def test_an_example_of_several_queries_is_stepped_on_once(data):
    x, y = data
    model, steps = model_of(), []

    def loss(id_):
        steps.append(id_)
        return F.cross_entropy(model(x[id_ : id_ + 1]), y[id_ : id_ + 1])

    evaluate.tail_patch(model, SEEN, loss, lambda query: 0.0, lambda p: torch.optim.SGD(p, lr=0.1))
    assert sorted(steps) == [3, 4, 7, 9]


def test_only_the_first_k_are_stepped_on(data):
    whole, first = patch(model_of(), data, SEEN), patch(model_of(), data, SEEN, k=1)
    assert np.array_equal(first.changes, whole.changes[:, :1])
    with pytest.raises(errors.ArgumentError, match="k must be from 1 to 2"):
        patch(model_of(), data, SEEN, k=3)


def test_scores_of_a_store_say_which_steps_help(data, tmp_path):
    x, y = data
    model = model_of()
    recorder = whence.record(model, tmp_path / "s", dim=4096, dtype="float32")
    with recorder as rec, rec.batch(range(20)):
        F.cross_entropy(model(x[:20]), y[:20]).backward()
    hits = whence.query(
        model, tmp_path / "s", lambda: F.cross_entropy(model(x[20:23]), y[20:23]), k=20
    )
    rate = 1e-3
    model.double()
    given = (x.double(), y)
    found = patch(model, given, hits, lambda p: torch.optim.SGD(p, lr=rate))
    # To first order a step takes its length times the score off the loss; a sketch of this width
    # has a product right to about a 64th of both norms.
    norms = whence.open(tmp_path / "s").norms()
    slack = 5 * norms.max() * np.sqrt(np.abs(hits.helpful.scores).max() + norms.max() ** 2) / 64
    assert np.abs(found.changes / rate - hits.helpful.scores).max() < slack
    assert found.changes[:, 0].min() > 0 > found.changes[:, -1].max()


@pytest.mark.parametrize("failing", [False, True])
def test_the_model_is_put_back(data, failing):
    model = model_of(nn.Dropout(0.5), nn.BatchNorm1d(8))
    model.train()
    x, y = data
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    model[0].bias.requires_grad_(False)
    torch.manual_seed(5)
    before = (
        {key: each.clone() for key, each in model.state_dict().items()},
        [parameter.grad for parameter in model.parameters()],
        [module.training for module in model.modules()],
        torch.get_rng_state(),
    )

    def target(query):
        if failing and not torch.equal(before[0]["0.weight"], model[0].weight):
            raise ZeroDivisionError
        return -F.cross_entropy(model(x[20:]), y[20:])

    def run():
        return evaluate.tail_patch(
            model,
            SEEN,
            lambda id_: F.cross_entropy(model(x[:4]), y[:4]) * id_,
            target,
            lambda p: torch.optim.SGD(p, lr=0.5),
        )

    if failing:
        with pytest.raises(ZeroDivisionError):
            run()
    else:
        assert np.abs(run().changes).min() > 0
    assert all(torch.equal(before[0][key], each) for key, each in model.state_dict().items())
    gradients = [parameter.grad for parameter in model.parameters()]
    assert all(one is two for one, two in zip(gradients, before[1], strict=True))
    assert all((gradient == 1).all() for gradient in gradients)
    assert [module.training for module in model.modules()] == before[2]
    assert torch.equal(torch.get_rng_state(), before[3])


def test_steps_and_targets_see_the_same_masks_of_dropout(data):
    model = model_of(nn.Dropout(0.5)).train()
    found = patch(model, data, [[3], [3]], lambda p: torch.optim.SGD(p, lr=0.0))
    assert found.changes.tolist() == [[0], [0]]


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"model": 3}, errors.DtypeError, "model must be an nn.Module"),
        ({"loss": 3}, errors.DtypeError, "loss must be a function of an id"),
        ({"loss": lambda id_: 3.0}, errors.DtypeError, "loss must return a tensor .* for 1"),
        ({"loss": lambda id_: torch.zeros(())}, errors.LayerError, "without a graph for 1"),
        (
            {"loss": lambda id_: torch.full((), torch.nan, requires_grad=True) * 1},
            errors.NotFiniteError,
            r"loss\(1\) must be finite",
        ),
        (
            {"log_probability": lambda query: torch.tensor(-torch.inf)},
            errors.NotFiniteError,
            r"log_probability\(0\) must be finite, got -inf",
        ),
        (
            {"log_probability": lambda query: torch.zeros(2)},
            errors.DtypeError,
            r"log_probability\(0\) must be a number",
        ),
        ({"optimizer": lambda p: None}, errors.DtypeError, "optimizer must return a torch"),
        ({"found": [1]}, errors.ShapeError, "found must be hits"),
    ],
)
def test_what_cannot_be_stepped_on_is_refused(change, error, match):
    model = nn.Linear(2, 1)
    given = {
        "model": model,
        "found": [[1]],
        "loss": lambda id_: model(torch.ones(2)).sum(),
        "log_probability": lambda query: 0.0,
        "optimizer": lambda p: torch.optim.SGD(p, lr=0.1),
    }
    with pytest.raises(error, match=match):
        evaluate.tail_patch(**{**given, **change})


# Sanity


def classes(count=300, dim=64, seed=0):
    """Rows that point along the direction of their class, and the classes."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 5, count)
    rows = rng.standard_normal((5, dim))[labels] + 0.5 * rng.standard_normal((count, dim))
    return rows.astype(np.float32), labels


def test_rows_of_classes_pass():
    rows, labels = classes()
    found = evaluate.sanity(whence.Matrix(rows, columns={"label": labels}))
    assert found.passed
    assert [check.outcome for check in found.checks] == ["pass"] * 2 + ["not checked"] * 3
    assert "batch invariance" in str(found)


def by_brute_force(rows, labels, queries, k):
    scores = rows[queries].astype(np.float64) @ rows.T.astype(np.float64)
    below, excess = [], []
    for number, query in enumerate(queries):
        others = np.delete(scores[number], query)
        below.append(np.mean(others < scores[number, query]))
        best = np.delete(np.arange(len(rows)), query)[np.argsort(-others, kind="stable")[:k]]
        same = np.delete(labels, query) == labels[query]
        excess.append(np.mean(labels[best] == labels[query]) - same.mean())
    return np.mean(below), np.mean(excess)


def test_the_numbers_are_those_of_a_full_ranking():
    rows, labels = classes(120, seed=3)
    rows *= np.random.default_rng(1).lognormal(size=(120, 1)).astype(np.float32)
    found = evaluate.sanity(
        whence.Matrix(rows, columns={"kind": labels}), label="kind", sample=120, k=7
    )
    below, excess = by_brute_force(rows, labels, np.arange(120), 7)
    assert found["own rank"].value == pytest.approx(below)
    assert found["same label"].value == pytest.approx(excess)


def test_labels_that_have_nothing_to_do_with_rows_fail():
    rows, labels = classes(2000)
    mixed = np.random.default_rng(5).permutation(labels)
    found = evaluate.sanity(whence.Matrix(rows, columns={"label": mixed}))
    assert found["same label"].outcome == "fail"
    assert not found.passed


def test_rows_that_one_direction_dominates_do_not_rank_themselves_first():
    rows, labels = classes()
    common = np.full((300, 64), 10, np.float32)
    common *= np.random.default_rng(0).lognormal(size=(300, 1)).astype(np.float32)
    found = evaluate.sanity(whence.Matrix(rows + common, columns={"label": labels}))
    assert found["own rank"].outcome == "fail"
    assert "common direction" in found["own rank"].meaning


def test_equal_rows_rank_in_the_middle():
    found = evaluate.sanity(whence.Matrix(np.ones((50, 8), np.float32)))
    assert found["own rank"].value == 0.5


@pytest.mark.parametrize(
    ("columns", "why"),
    [
        ({}, "there is no column 'label'"),
        ({"label": np.arange(300)}, "300 values, which are no classes"),
        ({"label": np.zeros(300, int)}, "1 values, which are no classes"),
        ({"label": np.arange(300) / 2}, "holds float64"),
    ],
)
def test_what_is_no_label_is_not_checked(columns, why):
    found = evaluate.sanity(whence.Matrix(classes()[0], columns=columns))["same label"]
    assert found.outcome == "not checked"
    assert why in found.meaning


def test_strings_are_labels_too():
    rows, labels = classes()
    named = np.array(["zero", "one", "two", "three", "four"])[labels]
    of_text = evaluate.sanity(whence.Matrix(rows, columns={"label": named}))
    of_numbers = evaluate.sanity(whence.Matrix(rows, columns={"label": labels}))
    assert of_text["same label"].value == of_numbers["same label"].value


def test_checkpoints_are_summed_and_incomplete_examples_left_out(tmp_path):
    rows, labels = classes(90)
    fill(tmp_path / "s", rows, checkpoint="one", rate=0.5, label=labels)
    store = fill(tmp_path / "s", -rows[:80], checkpoint="two", rate=2.0, label=labels[:80])
    found = evaluate.sanity(store, sample=90, k=5)
    # Both checkpoints have the same products; the ten that lack one are in nothing.
    below, excess = by_brute_force(rows[:80], labels[:80], np.arange(80), 5)
    assert found["own rank"].value == pytest.approx(below)
    assert found["same label"].value == pytest.approx(excess)


def test_sanity_needs_no_torch(tmp_path):
    import subprocess
    import sys

    rows, labels = classes()
    fill(tmp_path / "s", rows, label=labels)
    code = (
        "import sys; sys.modules['torch'] = None\n"
        f"import whence; print(whence.evaluate.sanity({str(tmp_path / 's')!r}).passed)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["True"], done.stderr


class Recorded:
    """A model, its store and its data."""

    def __init__(self, path, model=None, loss=None, **given):
        torch.manual_seed(3)
        self.y = torch.randint(0, 3, (60,))
        self.x = torch.randn(3, 5)[self.y] * 2 + torch.randn(60, 5)
        self.model = model or model_of()
        self.loss = loss or (lambda x, y: F.cross_entropy(self.model(x), y))
        with whence.record(self.model, path, weight_gradients=False, **given) as rec:
            for first in range(0, 60, 20):
                part = slice(first, first + 20)
                with rec.batch(range(first, first + 20), label=self.y[part]):
                    self.loss(self.x[part], self.y[part]).backward()
        self.store = whence.open(path)

    def check(self, **given):
        batch = (self.x[:10], self.y[:10])
        return evaluate.sanity(self.store, self.model, self.loss, batch, **given)


@pytest.mark.parametrize("layout", ["global", "per_layer", "factored"])
def test_a_model_and_its_store_pass(tmp_path, layout):
    found = Recorded(tmp_path / "s", layout=layout).check(ids=range(10))
    assert found.passed, str(found)
    for name in ("batch invariance", "recorded rows"):
        assert found[name].outcome == "pass", str(found)


def test_stored_factors_as_queries_score_as_themselves(tmp_path):
    store = Recorded(tmp_path / "s", layout="factored", dtype="float32").store
    places = np.arange(60)
    scores = Asked(store, places, 1).scores(stored_queries(store, places))
    assert np.diag(scores) == pytest.approx(store.self_influence(), rel=1e-5)
    assert scores == pytest.approx(scores.T, rel=1e-4, abs=1e-6)


def test_ids_of_others_fail(tmp_path):
    found = Recorded(tmp_path / "s").check(ids=range(1, 11))
    assert found["recorded rows"].outcome == "fail"


class Centred(nn.Module):
    """What no example should see of the others."""

    def forward(self, x):
        return x - x.mean(0) if len(x) > 1 else x


def test_a_batch_that_examples_can_see_fails(tmp_path):
    torch.manual_seed(1)
    model = nn.Sequential(Centred(), nn.Linear(5, 3))
    found = Recorded(tmp_path / "s", model).check()
    assert found["batch invariance"].outcome == "fail"


def test_scores_that_see_no_weights_fail(tmp_path):
    # The loss is linear in the weights: its gradient is the same for all of them.
    model = nn.Linear(5, 1)

    def loss(x, y):
        return (model(x)[:, 0] * (y + 1)).mean()

    found = Recorded(tmp_path / "s", model, loss).check(ids=range(10))
    assert found["randomised model"].value == pytest.approx(1)
    assert found["randomised model"].outcome == "fail"


def test_random_weights_have_the_mean_and_spread_of_the_model(tmp_path, monkeypatch):
    recorded = Recorded(tmp_path / "s", nn.Sequential(nn.Linear(5, 400), nn.Linear(400, 3)))
    seen = []
    forward = nn.Linear.forward

    def watched(self, x):
        seen.append(self.weight.detach().clone())
        return forward(self, x)

    monkeypatch.setattr(nn.Linear, "forward", watched)
    recorded.check()
    weight, drawn = recorded.model[0].weight, seen[-2]
    assert not torch.equal(weight, drawn)
    assert drawn.std().item() == pytest.approx(weight.std().item(), rel=0.1)
    assert drawn.mean().item() == pytest.approx(weight.mean().item(), abs=0.03)


def test_a_loss_by_counted_tokens_is_checked_with_them(tmp_path):
    torch.manual_seed(1)
    model = nn.Linear(4, 5)
    x, y = torch.randn(20, 6, 4), torch.randint(0, 5, (20, 6))
    for example in range(20):
        y[example, 1 + example % 5 :] = -100
    tokens = (y >= 0).sum(1)

    def loss(x, y):
        return F.cross_entropy(model(x).flatten(0, 1), y.flatten(), ignore_index=-100)

    recorder = whence.record(model, tmp_path / "s", reduction="token_mean")
    with recorder as rec, rec.batch(range(20), tokens=tokens):
        loss(x, y).backward()
    found = evaluate.sanity(tmp_path / "s", model, loss, (x, y), ids=range(20), tokens=tokens)
    assert found["batch invariance"].outcome == "pass"
    assert found["recorded rows"].outcome == "pass"


def test_states_of_checkpoints_are_used(tmp_path):
    model = model_of(nn.Dropout(0.5))
    x, y = torch.randn(30, 5), torch.randint(0, 3, (30,))
    states = {}
    with whence.record(model.eval(), tmp_path / "s") as rec:
        for name in ("one", "two"):
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(torch.randn_like(parameter), alpha=0.3)
            rec.checkpoint(name)
            states[name] = {key: each.clone() for key, each in model.state_dict().items()}
            with rec.batch(range(30)):
                F.cross_entropy(model(x), y).backward()
    with torch.no_grad():
        model[0].weight.zero_()
    model.train()
    kept = {key: each.clone() for key, each in model.state_dict().items()}

    def loss(x, y):
        return F.cross_entropy(model(x), y)

    found = evaluate.sanity(tmp_path / "s", model, loss, (x, y), ids=range(30), states=states)
    assert found["recorded rows"].outcome == "pass"
    assert all(torch.equal(kept[key], each) for key, each in model.state_dict().items())
    assert model.training
    assert model[2].training
    with pytest.raises(errors.CheckpointError, match="states must have the weights"):
        evaluate.sanity(tmp_path / "s", model, loss, (x, y))


def test_other_weights_than_those_recorded_are_an_error(tmp_path):
    recorded = Recorded(tmp_path / "s")
    with torch.no_grad():
        recorded.model[0].weight += 1
    with pytest.raises(errors.WeightsError):
        recorded.check()


def test_the_same_seed_gives_the_same_checks(tmp_path):
    recorded = Recorded(tmp_path / "s")
    one, same, other = (recorded.check(seed=seed, sample=20) for seed in (1, 1, 2))
    assert one == same
    assert one["randomised model"].value != other["randomised model"].value
    assert one["own rank"].value != other["own rank"].value


def test_threads_change_nothing():
    rows, labels = classes(500)
    source = whence.Matrix(rows, columns={"label": labels})
    one, two = (evaluate.sanity(source, threads=threads) for threads in (1, 2))
    assert one.checks[:2] == two.checks[:2]


def test_many_examples_are_ranked_against_some(monkeypatch):
    monkeypatch.setattr("whence.evaluate.sanity_checks.CANDIDATES", 50)
    rows, labels = classes(400)
    found = evaluate.sanity(whence.Matrix(rows, columns={"label": labels}), sample=80)
    assert "% of 49 others" in found["own rank"].meaning
    assert "of 50:" in found["own rank"].meaning


def test_an_index_is_asked_as_its_store(tmp_path):
    rows, labels = classes()
    store = fill(tmp_path / "s", rows, label=labels)
    assert evaluate.sanity(whence.Index(store)).checks[:2] == evaluate.sanity(store).checks[:2]


def test_a_check_is_found_by_its_name():
    found = evaluate.sanity(whence.Matrix(random_rows(9)))
    assert found["own rank"] is found.checks[0]
    with pytest.raises(KeyError, match="rank"):
        found["rank"]


@pytest.mark.parametrize(
    ("given", "error", "match"),
    [
        ({"sample": 0}, errors.ArgumentError, "sample must be at least 1"),
        ({"k": 0}, errors.ArgumentError, "k must be at least 1"),
        ({"label": 3}, errors.DtypeError, "label must be the name of a column"),
        ({"model": nn.Linear(1, 1)}, errors.ArgumentError, "got no closure and no batch"),
        (
            {"model": nn.Linear(1, 1), "closure": print, "batch": ()},
            errors.MismatchError,
            "store must be a store of a model",
        ),
    ],
)
def test_what_cannot_be_checked_is_refused(given, error, match):
    with pytest.raises(error, match=match):
        evaluate.sanity(whence.Matrix(random_rows(9)), **given)


def test_a_store_of_two_examples_says_nothing():
    with pytest.raises(errors.ArgumentError, match="at least three complete examples, got 2"):
        evaluate.sanity(whence.Matrix(random_rows(2)))


@pytest.mark.parametrize(
    ("given", "error", "match"),
    [
        ({"model": 3}, errors.DtypeError, "model must be an nn.Module"),
        ({"closure": 3}, errors.DtypeError, "closure must be a function of the batch"),
        ({"batch": (torch.zeros(1, 5),)}, errors.ArgumentError, "at least two examples, got 1"),
        ({"ids": [1, 2]}, errors.ArgumentError, "one for each of the 10 examples"),
        ({"ids": range(90, 100)}, errors.IdError, "ids must be in the store, got 90"),
    ],
)
def test_a_batch_that_does_not_fit_is_refused(tmp_path, given, error, match):
    recorded = Recorded(tmp_path / "s")
    batch = (recorded.x[:10], recorded.y[:10])
    usual = {"model": recorded.model, "closure": recorded.loss, "batch": batch}
    with pytest.raises(error, match=match):
        evaluate.sanity(recorded.store, **{**usual, **given})
