"""Rows of gradients divided by an optimizer's second moments, against their definition."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from oracle import per_sample_gradients
from torch import nn

import whence
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
