"""Each method against a dense computation of its formula."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, grad, vmap

import whence
from whence import errors
from whence.gradients.residuals import Residuals
from whence.methods import (
    DampedGram,
    Ekfac,
    EkfacStored,
    GaussNewton,
    GradientCosine,
    GradientDot,
    Less,
    RepresenterPoints,
    Run,
    TracInCP,
    Trak,
    TwoStage,
    stable_margin,
    suspicion,
)


def perceptron(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3))


def data(count=24, seed=1):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 5, generator=generator)
    return x, torch.randint(3, (count,), generator=generator)


def setting(states=1, **options):
    """A run, the loss of its queries, and what it is made of."""
    model = perceptron()
    x, y = data()
    asked = data(4, seed=2)
    loader = list(zip(x.split(7), y.split(7), strict=True))
    kept = {str(seed): perceptron(seed).state_dict() for seed in range(states)}

    def loss(x, y):
        return F.cross_entropy(model(x), y)

    run = Run(model, loader, loss, states=kept, **options)
    return run, lambda: loss(*asked), (model, kept, (x, y), asked)


def gradients(model, state, x, y, output=lambda logits, y: F.cross_entropy(logits, y)):
    """[examples, parameters] float64, by torch.func, in the order of named_parameters."""
    parameters = {name: state[name].double() for name, _ in model.named_parameters()}

    def one(parameters, x, y):
        return output(functional_call(model, parameters, (x[None],)), y[None])

    found = vmap(grad(one), (None, 0, 0))(parameters, x.double(), y)
    return torch.cat([each.flatten(1) for each in found.values()], 1).numpy()


def pairs(parts, output=None):
    _, states, train, asked = parts
    options = {} if output is None else {"output": output}
    model = perceptron().double()
    return {
        name: (
            gradients(model, state, *train, **options),
            gradients(model, state, *asked, **options),
        )
        for name, state in states.items()
    }


def close(found, expected, tolerance=1e-4):
    assert found.shape == expected.shape
    np.testing.assert_allclose(
        found, expected, rtol=tolerance, atol=tolerance * np.abs(expected).max()
    )


def test_the_gradient_product_and_cosine_are_those_of_torch_func():
    run, queries, parts = setting()
    ((train, asked),) = pairs(parts).values()
    close(GradientDot().fit(run).scores(queries), asked @ train.T)
    norms = np.linalg.norm(asked, axis=1)[:, None] * np.linalg.norm(train, axis=1)
    close(GradientCosine().fit(run).scores(queries), asked @ train.T / norms)


def test_tracin_sums_over_checkpoints_by_learning_rate():
    rates = {"0": 0.5, "1": 0.25}
    run, queries, parts = setting(2, learning_rates=rates)
    expected = sum(rates[name] * (asked @ train.T) for name, (train, asked) in pairs(parts).items())
    close(TracInCP().fit(run).scores(queries), expected)


def test_a_positive_score_lowers_the_querys_loss():
    run, queries, (_, states, (x, y), asked) = setting()
    scores = GradientDot().fit(run).scores(queries)
    step = 1e-3
    for example in (0, 5, 11):
        moved = perceptron()
        moved.load_state_dict(states["0"])
        F.cross_entropy(moved(x[example : example + 1]), y[example : example + 1]).backward()
        before = F.cross_entropy(moved(asked[0]), asked[1], reduction="none")
        with torch.no_grad():
            for parameter in moved.parameters():
                parameter -= step * parameter.grad
        fall = (before - F.cross_entropy(moved(asked[0]), asked[1], reduction="none")) / step
        close(scores[:, example], fall.detach().numpy(), 0.02)


def dense_ekfac(factors, place, size):
    """[parameters, parameters] the damped curvature, in torch's order of parameters."""
    whole = np.zeros((size, size))
    at = 0
    known = factors.checkpoints[place].statistics.known
    for layer, inputs, outputs in (("0", 5, 6), ("2", 6, 3)):
        key = (f"{layer}.weight", 0, "outer")
        block = known[key].block
        values, damping = factors.damped(place)[key]
        left = block.left.parts[0][2].double().numpy()
        right = torch.cat([block.right.parts[0][2], block.right.ones[None]]).double().numpy()
        basis = np.einsum("op,im->oipm", left, right)
        weights = outputs * inputs
        # torch has the weight first and then the bias; the block has the bias as a last column.
        basis = np.concatenate(
            [basis[:, :inputs].reshape(weights, -1), basis[:, inputs].reshape(outputs, -1)]
        )
        part = basis @ np.diag(values.numpy().reshape(-1) + damping) @ basis.T
        whole[at : at + len(part), at : at + len(part)] = part
        at += len(part)
    return whole


def test_exact_ekfac_is_the_dense_solve_with_its_curvature():
    run, queries, parts = setting(2)
    method = Ekfac(residuals="own").fit(run)
    expected = 0
    for place, (train, asked) in enumerate(pairs(parts).values()):
        curvature = dense_ekfac(method.factors, place, train.shape[1])
        expected = expected + asked @ np.linalg.solve(curvature, train.T) / 2
    close(method.scores(queries), expected)


def test_layers_add_up_to_the_whole():
    run, queries, _ = setting(2)
    method = Ekfac().fit(run)
    parts = method.parts(queries)
    assert sorted(parts) == ["0", "2"]
    close(sum(parts.values()), method.scores(queries), 1e-5)


def test_groups_add_up_their_examples():
    run, queries, _ = setting()
    method = GradientDot().fit(run)
    groups = np.array(["b", "a", "c"])[np.arange(24) % 3]
    scores = method.scores(queries)
    found = method.scores(queries, groups=groups)
    close(found, np.stack([scores[:, groups == name].sum(1) for name in "abc"], 1), 1e-5)
    with pytest.raises(errors.ShapeError, match="groups must be one for each of 24"):
        method.scores(queries, groups=groups[:3])


def test_averaged_residuals_are_the_mean_of_each_checkpoints():
    run, queries, (model, states, (x, y), _) = setting(2)
    residuals = []
    for state in states.values():
        model.load_state_dict(state)
        residuals.append((model(x).softmax(1) - F.one_hot(y, 3)).detach())
    mean = sum(residuals) / 2

    def output(logits, places):
        return (logits * mean[places].double()).sum()

    own = pairs((model, states, (x, torch.arange(24)), (x[:1], torch.arange(1))), output)
    asked = pairs((model, states, (x, y), data(4, seed=2)))
    method = Ekfac().fit(run)
    expected = sum(
        asked[name][1]
        @ np.linalg.solve(dense_ekfac(method.factors, place, train.shape[1]), train.T)
        / 2
        for place, (name, (train, _)) in enumerate(own.items())
    )
    close(method.scores(queries), expected)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_residuals_of_log_probabilities_are_those_of_the_logits(reduction):
    torch.manual_seed(3)
    x, y = torch.randn(6, 4), torch.randint(4, (6,))
    for share in (0.25, 1.0):
        found = []
        for lossy in (
            lambda logits: F.cross_entropy(logits, y, reduction=reduction),
            lambda logits: F.nll_loss(logits.log_softmax(1), y, reduction=reduction),
        ):
            kept = Residuals()
            with kept.collecting(0, share), torch.no_grad():
                lossy(x)
            leaf = x.clone().requires_grad_()
            with kept.replaying(0):
                lossy(leaf).backward()
            found.append(leaf.grad)
        size = len(x) if reduction == "mean" else 1
        expected = share * (x.softmax(1) - F.one_hot(y, 4)) / size
        for each in found:
            close(each.numpy(), expected.numpy(), 1e-5)


def test_a_loss_of_its_own_has_no_averaged_residuals(tmp_path):
    model = perceptron()
    x, y = data()
    states = {str(seed): perceptron(seed).state_dict() for seed in range(2)}

    def loss(x, y):
        return -model(x).log_softmax(1)[torch.arange(len(y)), y].mean()

    run = Run(model, [(x, y)], loss, states=states)
    with pytest.raises(errors.LayerError, match="labels='empirical'"):
        Ekfac().fit(run)
    factors = whence.fit_factors(
        model, [(x, y)], loss, states=states, labels="empirical", progress=False
    )
    with pytest.raises(errors.LayerError, match="residuals='own'"):
        Ekfac(factors).fit(run).scores(lambda: loss(x, y))
    assert Ekfac(factors, residuals="own").fit(run).scores(lambda: loss(x, y)).shape == (24, 24)


def test_the_whole_matrix_is_the_dense_hessian_of_a_linear_model():
    torch.manual_seed(0)
    model = nn.Linear(5, 3, bias=False).double()
    x, y = (each.double() if each.is_floating_point() else each for each in data())
    asked = data(4, seed=2)

    def loss(x, y):
        return F.cross_entropy(model(x.double()), y)

    penalty = 0.1

    def whole(weight):
        return F.cross_entropy(x @ weight.reshape(3, 5).T, y) + penalty / 2 * weight.square().sum()

    weight = model.weight.detach().flatten()
    hessian = torch.autograd.functional.hessian(whole, weight).numpy()
    state = {"weight": model.weight.detach()}
    rows, columns = gradients(model, state, *asked), gradients(model, state, x, y)
    method = GaussNewton(penalty=penalty).fit(Run(model, [(x, y)], loss))
    found = method.scores(lambda: loss(*asked))
    np.testing.assert_allclose(found, rows @ np.linalg.solve(hessian, columns.T), rtol=1e-6)


def test_the_whole_matrix_refuses_models_that_are_too_large():
    model = nn.Linear(101, 101)
    run = Run(model, [(torch.randn(2, 101), torch.tensor([0, 1]))], lambda x, y: model(x).sum())
    with pytest.raises(errors.ArgumentError, match="at most 10,000 recorded parameters"):
        GaussNewton(penalty=1.0).fit(run)


def test_the_stable_margin_keeps_what_the_other_form_loses():
    logits = torch.tensor([[40.0, 0.0, 1.0], [2.0, 1.0, 0.5]], requires_grad=True)
    labels = torch.tensor([0, 0])
    found = stable_margin(logits, labels)
    wide = logits.detach().double()
    others = torch.logsumexp(wide[:, 1:], 1)
    assert torch.allclose(found.double(), wide[:, 0] - others, rtol=1e-6)
    found.sum().backward()
    expected = torch.cat([torch.ones(2, 1).double(), -wide[:, 1:].softmax(1)], 1)
    assert torch.allclose(logits.grad.double(), expected, atol=1e-6)


def sketched(sketch, rows, model):
    """[rows, dim] the sketch of dense gradients in torch's order."""
    layout = [(name, parameter.shape) for name, parameter in model.named_parameters()]
    return sketch(rows.astype(np.float32), layout).astype(np.float64)


def test_trak_is_its_formula_on_margins():
    run, queries, parts = setting(2)
    sketch = whence.Sketch("gaussian", dim=16, seed=3)
    found = Trak(sketch=sketch, damping=0.5).fit(run).scores(queries)
    model, states, (x, y), _ = parts
    total, doubts = 0, 0
    margins = pairs(parts, lambda logits, y: stable_margin(logits, y).sum())
    for name, (train, asked) in margins.items():
        rows, columns = sketched(sketch, train, model), sketched(sketch, asked, model)
        gram = rows.T @ rows / 24
        ridge = 0.5 * np.trace(gram) / 16
        total = total + columns @ np.linalg.solve(gram + ridge * np.eye(16), rows.T) / 2
        model.load_state_dict(states[name])
        with torch.no_grad():
            own = model(x).softmax(1)[torch.arange(24), y]
        doubts = doubts + (1 - own).numpy() / 2
    close(found, total * doubts)


def test_the_damped_gram_is_the_dense_solve():
    run, queries, parts = setting()
    sketch = whence.Sketch("gaussian", dim=16, seed=3)
    ((train, asked),) = pairs(parts).values()
    rows, columns = (sketched(sketch, each, parts[0]) for each in (train, asked))
    gram = rows.T @ rows / 24
    ridge = np.trace(gram) / 16
    expected = columns @ np.linalg.solve(gram + ridge * np.eye(16), rows.T)
    close(DampedGram(sketch=sketch).fit(run).scores(queries), expected)


def test_damping_keeps_an_index_as_wide_as_its_examples_from_collapsing():
    run, queries, parts = setting()
    ((train, asked),) = pairs(parts).values()
    exact = asked @ train.T
    wide = DampedGram(24).fit(run).scores(queries)
    narrow = DampedGram(12).fit(run).scores(queries)
    correlation = [np.corrcoef(each.ravel(), exact.ravel())[0, 1] for each in (wide, narrow)]
    assert correlation[0] > 0.9 * correlation[1]


def test_representer_points_are_shares_of_the_logits():
    run, queries, (model, _, (x, y), asked) = setting()
    found = RepresenterPoints("2", weight_decay=0.01).fit(run).scores(queries)
    with torch.no_grad():
        features, wanted = model[:2](x), model[:2](asked[0])
        alpha = -(model(x).softmax(1) - F.one_hot(y, 3)) / (2 * 0.01 * 24)
        downhill = -(model(asked[0]).softmax(1) - F.one_hot(asked[1], 3))
    close(found, ((downhill @ alpha.T) * (wanted @ features.T)).numpy())


def test_less_is_the_cosine_with_the_adam_step():
    model = perceptron()
    x, y = data()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(3):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    moments = whence.moments_of(optimizer, model)
    asked = data(4, seed=2)

    def loss(x, y):
        return F.cross_entropy(model(x), y)

    run = Run(model, [(x[:10], y[:10]), (x[10:], y[10:])], loss)
    found = Less({"0": moments}, dim=32).fit(run).scores(lambda: loss(*asked))
    state = model.state_dict()
    wide = perceptron().double()
    divisor = []
    for name, parameter in model.named_parameters():
        kept = optimizer.state[parameter]
        divisor.append((kept["exp_avg_sq"] / (1 - 0.999 ** kept["step"])).sqrt().flatten() + 1e-8)
        assert torch.allclose(moments.whole[name].flatten(), divisor[-1], rtol=1e-5)
    steps = gradients(wide, state, x, y) / torch.cat(divisor).double().numpy()
    sketch = whence.Sketch("chunked_sjlt", dim=32, seed=0)
    rows = sketched(sketch, steps, model)
    columns = sketched(sketch, gradients(wide, state, *asked), model)
    rows, columns = (each / np.linalg.norm(each, axis=1)[:, None] for each in (rows, columns))
    close(found, columns @ rows.T, 1e-3)


def test_an_optimizer_without_second_moments_is_named():
    model = perceptron()
    with pytest.raises(errors.ArgumentError, match="optimizer must have second moments"):
        whence.moments_of(torch.optim.SGD(model.parameters(), lr=0.1), model)


def test_adafactor_divides_by_rows_and_columns():
    model = nn.Linear(4, 3)
    optimizer = torch.optim.Adafactor(model.parameters(), lr=0.01)
    model(torch.randn(5, 4)).square().sum().backward()
    optimizer.step()
    moments = whence.moments_of(optimizer, model)
    state = optimizer.state[model.weight]
    rows, columns = state["row_var"].flatten(), state["col_var"].flatten()
    expected = torch.outer(rows, columns) / rows.mean()
    left, right = moments.factored["weight"]
    assert torch.allclose(torch.outer(left, right).square(), expected, rtol=0.05)


def test_stored_rows_of_full_width_are_the_exact_scores_in_another_curvature(tmp_path):
    run, queries, _ = setting(2)
    factors = whence.fit_factors(
        run.model, run.loader, run.task.loss, states=run.states, labels="empirical", progress=False
    )
    stored = EkfacStored(tmp_path / "store", factors.rank, "float32", factors=factors).fit(run)
    exact = Ekfac(factors, residuals="own").fit(run)
    expected = exact.scores(queries)
    correlation = np.corrcoef(stored.scores(queries).ravel(), expected.ravel())[0, 1]
    assert correlation > 0.99


def test_stored_rows_have_averaged_residuals(tmp_path):
    run, queries, _ = setting(3)
    factors = whence.fit_factors(
        run.model, run.loader, run.task.loss, states=run.states, progress=False
    )
    factors.directions = replace(
        factors.directions, moment=None
    )  # without the second curvature, which the exact method does not have
    stored = EkfacStored(tmp_path / "store", factors.rank, "float32", factors=factors).fit(run)
    # The basis spans the training examples' rows, and so keeps their products with anything.
    close(stored.scores(queries), Ekfac(factors).fit(run).scores(queries), 1e-3)


def test_stretches_of_residuals_that_take_too_much_memory_are_halved(tmp_path, monkeypatch):
    run, _, _ = setting(2)
    factors = whence.fit_factors(
        run.model, run.loader, run.task.loss, states=run.states, progress=False
    )
    whole = EkfacStored(tmp_path / "whole", 8, "float32", factors=factors).fit(run)
    monkeypatch.setattr("whence.gradients.combined.RESIDUAL_BYTES", 40)
    halved = EkfacStored(tmp_path / "halved", 8, "float32", factors=factors).fit(run)
    close(halved.store.rows(), whole.store.rows(), 1e-5)


def test_what_is_chosen_is_explained():
    run, _, _ = setting(2)
    factors = whence.fit_factors(
        run.model, run.loader, run.task.loss, states=run.states, coordinates=20, progress=False
    )
    text = factors.explain()
    assert "0 (weight 0.5), 1 (weight 0.5)" in text
    assert "averaged over checkpoints" in text
    held = []
    for place in range(2):
        values = torch.cat([(v / (v + d)).flatten() for v, d in factors.damped(place).values()])
        held.append(float(values.sort(descending=True).values[:20].sum() / values.sum()))
    assert f"20, which hold {min(held):.0%} to {max(held):.0%}" in text


@pytest.mark.parametrize("seed", range(3))
def test_suspicion_finds_flipped_labels(seed):
    torch.manual_seed(seed)
    x = torch.randn(200, 5)
    truth = (x[:, :3] * 3).argmax(1)
    wrong = torch.rand(200) < 0.1
    y = torch.where(wrong, (truth + 1) % 3, truth)
    model = perceptron(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(60):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    losses = F.cross_entropy(model(x), y, reduction="none").detach().numpy()
    run = Run(model, [(x, y)], lambda x, y: F.cross_entropy(model(x), y))
    found = suspicion(run, losses)
    assert found.mean() == pytest.approx(2)
    assert whence.evaluate.mislabel_auc(found, wrong.numpy()) > 0.9


def test_two_stages_rank_candidates_as_the_exact_method(tmp_path):
    run, queries, _ = setting(2)
    exact = Ekfac()
    method = TwoStage(EkfacStored(tmp_path / "store", 8, "float32"), exact, candidates=12).fit(run)
    found = method.top_k(queries, 3)
    expected = exact.top_k(queries, 3)
    assert not found.exact.any()
    for side in ("helpful", "harmful"):  # twelve at each end of 24 are all
        np.testing.assert_array_equal(getattr(found, side).ids, getattr(expected, side).ids)
        close(getattr(found, side).scores, getattr(expected, side).scores, 1e-4)
    close(method.scores(queries), exact.scores(queries))


class Speller(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(4)
        self.table, self.hidden, self.head = nn.Embedding(7, 6), nn.Linear(6, 5), nn.Linear(5, 7)

    def forward(self, tokens):
        return self.head(self.hidden(self.table(tokens)).tanh()).mT


def spelled():
    model = Speller()
    tokens = torch.randint(7, (9, 5), generator=torch.Generator().manual_seed(5))

    def loss(x, y):
        return F.cross_entropy(model(x), y, reduction="sum") / len(x)

    loader = [(tokens[:5, :4], tokens[:5, 1:]), (tokens[5:, :4], tokens[5:, 1:])]
    return Run(model, loader, loss), lambda: loss(tokens[:3, :4], tokens[:3, 1:])


def test_positions_of_training_examples_add_up():
    run, queries = spelled()
    method = Ekfac().fit(run)
    found = method.by_token(queries)
    assert len(found) == 9
    assert found[0].shape == (3, 4)
    close(np.stack([each.sum(1) for each in found], 1), method.scores(queries))


def test_positions_of_queries_add_up():
    run, queries = spelled()
    method = Ekfac().fit(run)
    found = method.by_query_token(queries)
    assert found.shape == (3, 4, 9)
    close(found.sum(1), method.scores(queries))


def test_queries_of_low_rank_are_nearly_the_whole():
    run, queries = spelled()
    factors = Ekfac().fit(run).factors
    whole = Ekfac(factors).fit(run).scores(queries)
    close(Ekfac(factors, rank=5).fit(run).scores(queries), whole)
    cut = Ekfac(factors, rank=2).fit(run).scores(queries)
    assert np.corrcoef(cut.ravel(), whole.ravel())[0, 1] > 0.9


def test_what_was_not_fitted_says_so():
    with pytest.raises(errors.WhenceError, match="GradientDot must be fitted first"):
        GradientDot().scores(lambda: None)


def test_a_run_refuses_what_does_not_fit():
    model, (x, y) = perceptron(), data()

    def loss(x, y):
        return F.cross_entropy(model(x), y)

    with pytest.raises(errors.DtypeError, match="loader must be batches that can be read"):
        Run(model, iter([(x, y)]), loss)
    with pytest.raises(errors.CheckpointError, match="learning_rates must be one for each"):
        Run(model, [(x, y)], loss, learning_rates={"a": 1.0})
    with pytest.raises(errors.ShapeError, match="ids must be one for each of 24"):
        GradientDot().fit(Run(model, [(x, y)], loss, ids=[1, 2])).top_k(lambda: loss(x, y))
    with pytest.raises(errors.ArgumentError, match="loader must give at least one batch"):
        GradientDot().fit(Run(model, [], loss)).scores(lambda: loss(x, y))


def test_suggested_checkpoints_cut_the_fall_of_the_loss_into_equal_parts():
    losses = {str(epoch): 0.5**epoch for epoch in range(9)}
    assert whence.suggest_checkpoints(losses, 5) == ["2", "4", "6", "8"] or (
        whence.suggest_checkpoints(losses, 5) == ["0", "2", "4", "6", "8"]
    )
    assert whence.suggest_checkpoints(losses, 1) == ["8"]
    with pytest.raises(errors.ArgumentError, match="losses must be of at least one"):
        whence.suggest_checkpoints({})


def test_averaged_residuals_of_probabilities_are_those_of_logits(tmp_path):
    """binary_cross_entropy of a sigmoid is the same loss as that of its logits."""
    model, states = nn.Linear(5, 1), {}
    for seed in range(3):
        torch.manual_seed(seed)
        states[str(seed)] = {
            name: torch.randn_like(each) for name, each in model.state_dict().items()
        }
    x, y = data()
    y = (y > 0).float()[:, None]
    found = []
    for loss in (
        lambda x, y: F.binary_cross_entropy(model(x).sigmoid(), y),
        lambda x, y: F.binary_cross_entropy_with_logits(model(x), y),
    ):
        run = Run(model, list(zip(x.split(7), y.split(7), strict=True)), loss, states=states)
        factors = whence.fit_factors(
            model,
            run.loader,
            loss,
            states=states,
            labels="empirical",
            residuals="averaged",
            progress=False,
        )
        found.append(Ekfac(factors).fit(run).scores(lambda loss=loss: loss(x[:4], y[:4])))
    close(found[0], found[1], 1e-4)


@pytest.mark.parametrize(
    "make",
    [
        lambda path: GradientDot(),
        lambda path: TracInCP(),
        lambda path: Ekfac(),
        lambda path: EkfacStored(path / "s", 20, "float32"),
    ],
)
def test_queries_of_a_mean_over_tokens_say_how_many(tmp_path, make):
    """As a run whose loss is a sum over examples of mean losses times tokens."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(7, 5), nn.Linear(5, 7))
    words = torch.randint(7, (24, 6))
    words[:, 4:] = torch.where(torch.rand(24, 2) < 0.5, -1, words[:, 4:])

    def total(words):
        logits = model(words[:, :-1].clamp(min=0))
        return F.cross_entropy(logits.mT, words[:, 1:], ignore_index=-1, reduction="sum")

    def counted(words):
        return (words[:, 1:] >= 0).sum(1)

    def mean(words):
        return total(words) / counted(words).sum()

    loader = [(each,) for each in words.split(6)]
    asked = words[:3]
    by_tokens = Run(model, loader, mean, reduction="token_mean", tokens=counted)
    by_sum = Run(model, loader, total, reduction="sum")
    one = make(tmp_path / "a").fit(by_tokens).scores(lambda: (mean(asked), counted(asked)))
    other = make(tmp_path / "b").fit(by_sum).scores(lambda: total(asked))
    close(one, other, 1e-3)
    with pytest.raises(errors.DtypeError, match="closure must return the loss and"):
        make(tmp_path / "c").fit(by_tokens).scores(lambda: mean(asked))


def test_labels_that_are_ignored_have_no_curvature():
    model = nn.Linear(5, 3)
    x, y = data()
    ignoring = torch.where(torch.arange(24) % 3 == 0, -100, y)
    kept = ignoring >= 0

    def loss(x, y):
        return F.cross_entropy(model(x), y, reduction="sum")

    some = Run(model, [(x[:10], ignoring[:10]), (x[10:], ignoring[10:])], loss, reduction="sum")
    without = Run(model, [(x[kept], y[kept])], loss, reduction="sum")
    method = GaussNewton(damping=1e-3)
    found = method.fit(some).scores(lambda: loss(x[:4], y[:4]))
    wanted = method.fit(without).scores(lambda: loss(x[:4], y[:4]))
    assert np.allclose(found[:, ~kept.numpy()], 0, atol=1e-6)
    close(found[:, kept.numpy()] * (len(y[kept]) / len(y)), wanted, 1e-5)


def test_labels_that_are_no_classes_are_refused_by_trak():
    model = perceptron()
    x, y = data()
    y[3] = -100
    run = Run(model, [(x, y)], lambda x, y: F.cross_entropy(model(x), y))
    with pytest.raises(errors.ArgumentError, match="labels must be classes from 0 to 2"):
        Trak(dim=8).fit(run)


def test_several_labels_an_example_are_refused_by_gauss_newton():
    model = nn.Linear(5, 3)
    x = torch.randn(4, 6, 5)
    y = torch.randint(3, (4, 6))
    run = Run(model, [(x, y)], lambda x, y: F.cross_entropy(model(x).flatten(0, 1), y.flatten()))
    with pytest.raises(errors.ArgumentError, match="24 labels for 4 examples"):
        GaussNewton(damping=0.1).fit(run)
