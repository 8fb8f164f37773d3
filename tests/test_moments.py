"""Rows of gradients divided by an optimizer's second moments, against their definition."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from oracle import per_sample_gradients
from torch import nn

import whence
import whence.curvature
from whence import errors


def perceptron():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))


class Words(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(7, 4)
        self.norm = nn.LayerNorm(4)
        self.out = nn.Linear(4, 3)

    def forward(self, words):
        return self.out(self.norm(self.table(words)).tanh().mean(1))


def words():
    torch.manual_seed(0)
    return Words()


def data(model):
    torch.manual_seed(1)
    x = torch.randint(7, (9, 6)) if isinstance(model, Words) else torch.randn(9, 4)
    return x, torch.randint(3, (9,))


OPTIMIZERS = {
    "Adam": lambda of: torch.optim.Adam(of, lr=0.01),
    "Adafactor": lambda of: torch.optim.Adafactor(of, lr=0.01),
    "RMSprop": lambda of: torch.optim.RMSprop(of, lr=0.01),
}


def trained(make, kind):
    """A model after some steps, and its moments."""
    model = make()
    x, y = data(model)
    optimizer = OPTIMIZERS[kind](list(model.parameters()))
    for _ in range(3):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model, whence.moments_of(optimizer, model)


def divisors(moments):
    """Parameter -> [shape] what its gradient is divided by."""
    found = dict(moments.whole)
    for name, (left, right) in moments.factored.items():
        found[name] = torch.outer(left, right)
    return {name: each.double().numpy() for name, each in found.items()}


def recorded(path, model, moments, **options):
    x, y = data(model)
    with whence.record(model, path, precondition=moments, **options) as rec:
        for part in torch.arange(9).split(4):
            with rec.batch(part.numpy()):
                F.cross_entropy(model(x[part]), y[part]).backward()
    return whence.open(path)


def divided(model, moments):
    """[examples, values] of each parameter, divided, in float64."""
    x, y = data(model)
    gradients = per_sample_gradients(model, lambda model, x, y: F.cross_entropy(model(x), y), x, y)
    by = divisors(moments)
    return {name: each.double().numpy() / by[name] for name, each in gradients.items()}


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("make", [perceptron, words])
def test_rows_are_sketches_of_divided_gradients(tmp_path, make, kind):
    model, moments = trained(make, kind)
    store = recorded(tmp_path / "s", model, moments, dim=64, seed=3, dtype="float32")
    gradients = {name: each.astype("f4") for name, each in divided(model, moments).items()}
    wanted = whence.Sketch("chunked_sjlt", dim=64, seed=3)(gradients)
    assert np.allclose(store.rows(), wanted, atol=1e-4 * np.abs(wanted).max())


def test_scores_are_products_over_the_moments(tmp_path):
    model, moments = trained(perceptron, "Adam")
    recorded(tmp_path / "s", model, moments, sketch="gaussian", dim=8192, dtype="float32")
    x, y = data(model)
    hits = whence.query(model, tmp_path / "s", lambda: F.cross_entropy(model(x), y), k=9)
    flat = np.concatenate([each.reshape(9, -1) for each in divided(model, moments).values()], 1)
    for query, (ids, scores) in enumerate(zip(hits.helpful.ids, hits.helpful.scores, strict=True)):
        error = np.abs(scores - flat[ids] @ flat[query]).max()
        assert error < 0.1 * np.linalg.norm(flat[query]) * np.linalg.norm(flat, axis=1).max()
    assert "moments" in hits.method
    assert "influence" not in hits.method


def test_rows_of_divided_gradients_are_verified(tmp_path):
    model, moments = trained(words, "Adafactor")
    x, y = data(model)
    with whence.record(model, tmp_path / "s", precondition=moments, dim=64) as rec:
        found = rec.verify(lambda x, y: F.cross_entropy(model(x), y), (x, y))
    assert found.gradient < 1e-4


def test_a_recording_goes_on_with_the_same_moments_only(tmp_path):
    model, moments = trained(perceptron, "Adam")
    x, y = data(model)
    for first in (0, 5):
        with whence.record(model, tmp_path / "s", precondition=moments, dim=32) as rec:
            part = range(first, min(first + 5, 9))
            with rec.batch(part):
                F.cross_entropy(model(x[list(part)]), y[list(part)]).backward()
    whole = recorded(tmp_path / "whole", model, moments, dim=32)
    assert np.allclose(whence.open(tmp_path / "s").rows(), whole.rows(), atol=1e-6)
    moved, others = trained(perceptron, "RMSprop")
    recorder = whence.record(moved, tmp_path / "s", precondition=others, dim=32, weights="moving")
    with pytest.raises(errors.MismatchError, match="precondition must be"):  # noqa: SIM117
        with recorder as rec, rec.batch(range(20, 25)):
            F.cross_entropy(moved(x[:5]), y[:5]).backward()


def test_each_checkpoint_has_its_own_moments(tmp_path):
    model, first = trained(perceptron, "Adam")
    x, y = data(model)
    states = {"a": {name: each.clone() for name, each in model.state_dict().items()}}
    with whence.record(model, tmp_path / "s", precondition=first, dim=64) as rec:
        rec.checkpoint("a")
        with rec.batch(range(9)):
            F.cross_entropy(model(x), y).backward()
        optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
        optimizer.step()
        second = whence.moments_of(optimizer, model)
        states["b"] = {name: each.clone() for name, each in model.state_dict().items()}
        rec.checkpoint("b", precondition=second)
        with rec.batch(range(9)):
            F.cross_entropy(model(x), y).backward()
    store = whence.open(tmp_path / "s")
    sketch = whence.Sketch("chunked_sjlt", dim=64, seed=0)
    for name, moments in (("a", first), ("b", second)):
        model.load_state_dict(states[name])
        gradients = {key: each.astype("f4") for key, each in divided(model, moments).items()}
        wanted = sketch(gradients)
        assert np.allclose(store.rows(checkpoint=name), wanted, atol=2e-3 * np.abs(wanted).max())
    hits = whence.query(model, store, lambda: F.cross_entropy(model(x), y), states=states, k=3)
    assert hits.helpful.ids.shape == (9, 3)


@pytest.mark.parametrize(
    ("options", "kind", "match"),
    [
        ({"rotate": False}, errors.ArgumentError, "rotate must be True"),
        ({"layout": "global"}, errors.ArgumentError, "layout must be None"),
        ({"reduction": "nothing"}, errors.ArgumentError, "reduction must be"),
    ],
)
def test_what_does_not_go_together_is_refused(tmp_path, options, kind, match):
    model, moments = trained(perceptron, "Adam")
    with pytest.raises(kind, match=match):
        whence.record(model, tmp_path / "s", precondition=moments, **options)
    assert not (tmp_path / "s").exists()


def test_moments_of_other_parameters_are_refused(tmp_path):
    _, moments = trained(perceptron, "Adam")
    with pytest.raises(errors.MismatchError, match="precondition must have second moments of"):
        whence.record(words(), tmp_path / "s", precondition=moments)
    wide = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
    with pytest.raises(errors.MismatchError, match=r"of 0.bias, \[6\], got \[5\]"):
        whence.record(wide, tmp_path / "s", precondition=moments)


def test_moments_are_of_one_checkpoint(tmp_path):
    model, moments = trained(perceptron, "Adam")
    loader = [data(model)]
    with pytest.raises(errors.DtypeError, match="precondition must be factors"):
        whence.record_checkpoints(
            model,
            tmp_path / "s",
            loader,
            lambda x, y: F.cross_entropy(model(x), y),
            precondition=moments,
        )


def steps(model, optimizer, x, count=3):
    for _ in range(count):
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()


@pytest.mark.parametrize(
    ("make", "options"),
    [
        (torch.optim.Adam, {"amsgrad": True}),
        (torch.optim.AdamW, {}),
        (torch.optim.RMSprop, {"centered": True}),
        (torch.optim.RMSprop, {}),
        (torch.optim.Adafactor, {"eps": (1e-3, 1e-3)}),
        (torch.optim.Adafactor, {"eps": (0.5, 1e-3)}),
        (torch.optim.Adafactor, {}),
    ],
)
def test_moments_are_what_the_next_step_divides_by(make, options):
    """By a step from a known gradient: without momentum and decay it is rate · g / divisor."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Flatten(), nn.Linear(12, 2)).double()
    x = torch.randn(5, 2, 4, 4).double()
    options = {"lr": 1e-3, "weight_decay": 0.0, **options}
    if make in (torch.optim.Adam, torch.optim.AdamW):
        options["betas"] = (0.0, 0.9)
    optimizer = make(model.parameters(), **options)
    steps(model, optimizer, x)
    # A step of the optimizer itself changes its moments first: so by those that it has after it.
    optimizer.zero_grad()
    model(x).square().sum().backward()
    before = [each.detach().clone() for each in model.parameters()]
    given = [each.grad.clone() for each in model.parameters()]
    optimizer.step()
    moments = whence.moments_of(optimizer, model)
    by = divisors(moments)
    for number, (name, parameter) in enumerate(model.named_parameters()):
        wanted = given[number] / torch.from_numpy(by[name])
        step = before[number] - parameter.detach()
        if make is torch.optim.Adafactor:  # whose rate depends on the parameter, and cuts steps
            step = step * (wanted.norm() / step.norm())
        else:
            step = step / 1e-3
        assert torch.allclose(step, wanted, rtol=1e-4, atol=1e-6 * float(wanted.abs().max())), name


def test_moments_that_are_not_finite_are_refused():
    model, _ = trained(perceptron, "Adam")
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    steps(model, optimizer, torch.randn(5, 4))
    for bad in (torch.nan, torch.inf):
        optimizer.state[model[0].weight]["exp_avg_sq"][1, 2] = bad
        with pytest.raises(errors.NotFiniteError, match=r"optimizer must have finite .* 0\.weight"):
            whence.moments_of(optimizer, model)


@pytest.mark.parametrize("swap", [(None, 1), (0, None), (1, 0)])
def test_what_is_no_optimizer_or_model_is_refused(swap):
    model = perceptron()
    both = (torch.optim.Adam(model.parameters()), model)
    given = [None if each is None else both[each] for each in swap]
    with pytest.raises(errors.DtypeError, match="must be a"):
        whence.moments_of(*given)


def test_checkpoints_are_weighted_by_their_learning_rates(tmp_path):
    model, moments = trained(perceptron, "Adam")
    x, y = data(model)
    states = {name: model.state_dict() for name in "ab"}
    with whence.record(model, tmp_path / "s", precondition=moments, dim=64) as rec:
        for name, rate in (("a", 0.5), ("b", 2.0)):
            rec.checkpoint(name, learning_rate=rate)
            with rec.batch(range(9)):
                F.cross_entropy(model(x), y).backward()
    weights, unit = whence.open(tmp_path / "s").weights()
    assert weights.tolist() == [0.5, 2.0]
    assert "learning rate" in unit
    hits = whence.query(model, tmp_path / "s", lambda: F.cross_entropy(model(x), y), states=states)
    store = whence.open(tmp_path / "s")
    rows = store.rows(checkpoint="a").astype("f8")
    (best,) = hits.helpful.ids[:1]
    assert np.allclose(hits.helpful.scores[0], 2.5 * rows[best] @ rows[0], rtol=1e-2)


def test_a_recording_with_other_moments_at_the_same_weights_is_refused(tmp_path):
    model, moments = trained(perceptron, "Adam")
    recorded(tmp_path / "s", model, moments, dim=32)
    others = whence.curvature.Moments(
        moments.digest, {name: 2 * each for name, each in moments.whole.items()}, {}
    )
    x, y = data(model)
    recorder = whence.record(model, tmp_path / "s", precondition=others, dim=32)
    with pytest.raises(errors.MismatchError, match="with moments"):  # noqa: SIM117
        with recorder as rec, rec.batch(range(20, 29)):
            F.cross_entropy(model(x), y).backward()


def test_kinds_that_fit_no_parameter_are_refused(tmp_path):
    model, moments = trained(perceptron, "Adam")
    sketch = whence.Sketch(dim=32, kinds={"zzz.*": "srht"})
    with pytest.raises(errors.ArgumentError, match="kinds must each match"):
        whence.record(model, tmp_path / "s", precondition=moments, sketch=sketch)
