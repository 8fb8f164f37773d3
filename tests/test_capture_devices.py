"""Gradients sketched where they are: the way of other devices, walked on the processor.

`DEVICES` is taken to have the processor's type, so that `Capture` adds with torch what the core
adds otherwise; rows, errors and checks must be the same.
"""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from oracle import per_sample_gradients
from torch import nn

import whence
from whence import errors
from whence.gradients import capture, device, hooks

DIM = 64


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """Models of this size only wait for threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def here(monkeypatch):
    """Sketches on the "device"; returns how often each method added something there."""
    monkeypatch.setattr(capture, "DEVICES", ("cpu",))
    # What takes a weight gradient from its samples' adds with the core, on the processor alone.
    monkeypatch.setattr(hooks, "FEW_TERMS", 1 << 40)
    counts = {}

    class Counted(device.DeviceAccumulator):
        def add(self, *args):
            counts["add"] = counts.get("add", 0) + 1
            return super().add(*args)

        def add_outer(self, *args):
            counts["add_outer"] = counts.get("add_outer", 0) + 1
            return super().add_outer(*args)

        def add_lookup(self, *args):
            counts["add_lookup"] = counts.get("add_lookup", 0) + 1
            return super().add_lookup(*args)

    monkeypatch.setattr(capture, "DeviceAccumulator", Counted)
    return counts


class Net(nn.Module):
    """A small transformer with a layer of each rule that there is for devices."""

    def __init__(self, **options):
        super().__init__()
        self.table = nn.Embedding(11, 8, **options)
        self.position = nn.Embedding(9, 8)
        self.conv = nn.Conv1d(8, 8, 3, padding=1, groups=2)
        self.norm, self.scale = nn.LayerNorm(8), nn.RMSNorm(8)
        self.groups, self.batch = nn.GroupNorm(2, 8), nn.BatchNorm1d(8).eval()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        h = self.table(x) + self.position(torch.arange(x.shape[1]))
        h = self.norm(h + self.conv(h.transpose(1, 2)).transpose(1, 2))
        h = self.groups(h.transpose(1, 2))
        h = self.scale(self.batch(h).transpose(1, 2))
        h = h + self.attention(h, h, h)[0]
        return self.head(h.relu_())


def squares(model, x):
    out = model(x).flatten(1)
    return (out.square() * torch.linspace(0.5, 1.5, out.shape[1])).sum(1).mean()


def words(count=4):
    x = torch.randint(0, 11, (count, 7))
    x[0, :3] = 2
    return x


def rows_of(model, path, loss, *batch, batches=3, **options):
    """The rows of several batches of the same examples; and `.grad` after the last."""
    count = len(batch[0])
    found = []
    with whence.record(model, path, dtype="float32", **options) as rec:
        for first in range(0, batches * count, count):
            model.zero_grad()
            with rec.batch(range(first, first + count)) as done:
                loss(model, *batch).backward()
            found.append(done.rows)
    return np.stack(found), [each.grad for each in model.parameters()]


def close(found, exact, tolerance=1e-6):
    return np.linalg.norm(found - exact) <= tolerance * np.linalg.norm(exact)


def mlp():
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))


def data(count=4):
    return torch.randn(count, 6), torch.randint(0, 3, (count,))


def cross_entropy(model, x, y):
    return F.cross_entropy(model(x), y)


@pytest.mark.parametrize("weight_gradients", [True, False])
@pytest.mark.parametrize("dim", [7, DIM, 4096])
def test_rows_are_those_of_the_core_and_of_exact_gradients(tmp_path, here, dim, weight_gradients):
    model, x = Net(), words()
    options = {"dim": dim, "weight_gradients": weight_gradients}
    found, grads = rows_of(model, tmp_path / "here", squares, x, **options)
    assert min(here[each] for each in ("add", "add_outer", "add_lookup")) > 0
    capture.DEVICES = ()
    core, expected = rows_of(model, tmp_path / "core", squares, x, **options)
    exact = whence.Sketch(dim=dim)(per_sample_gradients(model, squares, x))
    for one, other in zip(found, core, strict=True):
        assert close(one, other)
        assert close(one, exact, 1e-5)
    for one, other in zip(grads, expected, strict=True):
        assert (one is None) == (other is None) == (not weight_gradients)
        assert one is None or torch.allclose(one, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "options", [{"padding_idx": 2}, {"sparse": True}], ids=["padding", "sparse"]
)
def test_tables_are_summed_as_by_the_core(tmp_path, here, options):
    model, x = Net(**options), words()
    found, _ = rows_of(model, tmp_path / "here", squares, x, dim=DIM)
    capture.DEVICES = ()
    core, _ = rows_of(model, tmp_path / "core", squares, x, dim=DIM)
    assert close(found, core)


def test_normalized_rows_are_those_of_the_core(tmp_path, here):
    model, x = Net(), words()
    sketch = whence.Sketch(dim=DIM, normalize=True)
    found, _ = rows_of(model, tmp_path / "here", squares, x, sketch=sketch)
    assert here["add_outer"] > 0
    assert np.allclose(np.linalg.norm(found, axis=2), 1)
    assert close(found[0], sketch(per_sample_gradients(model, squares, x)), 1e-5)


SETTINGS = {
    "kinds": {"kinds": {"head.*": "sjlt"}},
    "per layer": {"layout": "per_layer"},
    "another kind": {"kind": "sjlt"},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_maps_that_devices_do_not_have_are_the_cores(tmp_path, here, name):
    model, x = Net(), words()
    sketch = whence.Sketch(dim=DIM, **SETTINGS[name])
    found, _ = rows_of(model, tmp_path / "s", squares, x, sketch=sketch, batches=1)
    assert not here
    assert close(found[0], sketch(per_sample_gradients(model, squares, x)), 1e-5)


def test_factors_are_kept_by_the_core(tmp_path, here):
    model, (x, y) = mlp(), data()
    with (
        whence.record(model, tmp_path / "s", layout="factored") as rec,
        rec.batch(range(4)),
    ):
        cross_entropy(model, x, y).backward()
    # The comparison alone may be made with sketches.
    assert here.get("add_lookup", 0) == 0
    gradients = per_sample_gradients(model, cross_entropy, x, y)
    flat = torch.cat([each.flatten(1) for each in gradients.values()], 1)
    assert np.allclose(whence.open(tmp_path / "s").norms(), flat.norm(dim=1), rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_models_of_other_types_give_the_rows_of_the_core(tmp_path, here, dtype):
    model, (x, _) = mlp().to(dtype), data()
    found, _ = rows_of(model, tmp_path / "here", squares, x.to(dtype), dim=DIM)
    assert here["add_outer"] > 0
    capture.DEVICES = ()
    core, _ = rows_of(model, tmp_path / "core", squares, x.to(dtype), dim=DIM)
    assert close(found, core)


def test_under_autocast_rows_are_those_of_the_core(tmp_path, here):
    def rounded(model, x):
        with torch.autocast("cpu", torch.bfloat16):
            out = model(x)
        return out.float().square().flatten(1).sum(1).mean()

    model, x = Net(), words()
    found, _ = rows_of(model, tmp_path / "here", rounded, x, dim=DIM)
    assert here["add_outer"] > 0
    capture.DEVICES = ()
    core, _ = rows_of(model, tmp_path / "core", rounded, x, dim=DIM)
    assert close(found, core)


def test_several_backward_passes_are_summed(tmp_path, here):
    model, (x, y) = mlp(), data()
    with (
        whence.record(model, tmp_path / "s", dim=DIM, dtype="float32") as rec,
        rec.batch(range(4)) as done,
    ):
        cross_entropy(model, x, y).backward()
        cross_entropy(model, 2 * x, y).backward()
    assert here["add_outer"] > 0
    exact = [
        whence.Sketch(dim=DIM)(per_sample_gradients(model, cross_entropy, each, y))
        for each in (x, 2 * x)
    ]
    assert close(done.rows, exact[0] + exact[1], 1e-5)


def test_registered_and_functional_layers_are_recorded(tmp_path, here):
    class Loose(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.gain = nn.Linear(6, 6), nn.Parameter(torch.rand(6))

        def forward(self, x):
            return self.inner(x).sin() * self.gain

    model, (x, _) = nn.Sequential(Loose(), nn.Linear(6, 3)), data()
    found, _ = rows_of(model, tmp_path / "s", squares, x, dim=DIM, uncovered="functional")
    assert here["add"] > 0
    exact = whence.Sketch(dim=DIM)(per_sample_gradients(model, squares, x))
    assert all(close(each, exact, 1e-5) for each in found)


def test_queries_score_as_with_the_core(tmp_path, here):
    model, x, q = Net(), words(), words(3)
    rows_of(model, tmp_path / "s", squares, x, dim=DIM, batches=1)
    found = whence.query(model, tmp_path / "s", lambda: squares(model, q), k=4)
    assert here["add_lookup"] > 0
    capture.DEVICES = ()
    core = whence.query(model, tmp_path / "s", lambda: squares(model, q), k=4)
    assert np.array_equal(found.helpful.ids, core.helpful.ids)
    assert np.allclose(found.helpful.scores, core.helpful.scores, rtol=1e-5)


def test_verify_agrees_and_finds_a_wrong_reduction(tmp_path, here):
    model, x = Net(), words()
    options = {"dim": DIM, "unbatched": ["position"]}
    with whence.record(model, tmp_path / "a", **options) as rec:
        found = rec.verify(lambda x: squares(model, x), (x,))
        assert here["add_outer"] > 0
        assert max(found.gradient, found.batch) < 1e-5
    with (
        whence.record(model, tmp_path / "b", reduction="sum", **options) as rec,
        pytest.raises(errors.LayerError, match="reduction must fit the loss"),
    ):
        rec.verify(lambda x: squares(model, x), (x,))


# --- what is not finite ---------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("before", [0, 2])
@pytest.mark.parametrize("weight_gradients", [True, False])
def test_what_is_not_finite_names_id_and_layer(tmp_path, here, value, before, weight_gradients):
    model, (x, y) = mlp(), data()
    options = {"dim": DIM, "weight_gradients": weight_gradients}
    with whence.record(model, tmp_path / "s", **options) as rec:
        for first in range(0, 4 * before, 4):
            with rec.batch(range(first, first + 4)):
                cross_entropy(model, x, y).backward()
        broken = x.clone()
        broken[2, 1] = value
        with (
            pytest.raises(errors.NotFiniteError, match=r"for id 102 in (0|2)$"),
            rec.batch(range(100, 104)),
        ):
            cross_entropy(model, broken, y).backward()
    assert here["add_outer"] > 0
    assert len(whence.open(tmp_path / "s")) == 4 * before


def test_the_layer_that_is_named_is_one_whose_gradient_is_not_finite(tmp_path, here):
    class Broken(nn.Module):
        """The gradient of one example is infinite in its second layer alone."""

        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(6, 3), nn.Linear(6, 3)

        def forward(self, x):
            spoiled = x.clone()
            spoiled[1, 0] = float("inf")
            return self.first(x) + self.second(spoiled).clamp(-1, 1)

    model, (x, _) = Broken(), data()
    with (
        whence.record(model, tmp_path / "s", dim=DIM) as rec,
        pytest.raises(errors.NotFiniteError, match=r"for id 1 in second$"),
        rec.batch(range(4)),
    ):
        squares(model, x).backward()
    assert here["add_outer"] > 0


def test_skip_leaves_out_what_is_not_finite_and_nothing_else(tmp_path, here):
    model, (x, y) = mlp(), data(6)
    broken = x.clone()
    broken[[1, 4], 0] = float("nan")
    options = {"dim": DIM, "dtype": "float32", "nonfinite": "skip"}
    with whence.record(model, tmp_path / "s", **options) as rec, rec.batch(range(6)) as done:
        cross_entropy(model, broken, y).backward()
    assert here["add_outer"] > 0
    assert done.stored.tolist() == [0, 2, 3, 5]
    exact = whence.Sketch(dim=DIM)(per_sample_gradients(model, cross_entropy, x, y))
    assert close(done.rows, exact[[0, 2, 3, 5]], 1e-5)


# --- checks ---------------------------------------------------------------------------------------


def penalty(model, x, y):
    return cross_entropy(model, x, y) + 0.1 * model[0].weight.square().sum()


def by_hand(model, x, y):
    return F.cross_entropy(F.linear(torch.tanh(model[0](x)), model[2].weight), y)


def both(model, x, y):
    return cross_entropy(model, x, y) + by_hand(model, x, y)


@pytest.mark.parametrize("weight_gradients", [True, False])
@pytest.mark.parametrize("before", [0, 2])  # then layer by layer, or all together
@pytest.mark.parametrize("loss", [penalty, by_hand, both], ids=lambda loss: loss.__name__)
def test_a_use_outside_the_layer_is_found_out(tmp_path, here, loss, before, weight_gradients):
    model, (x, y) = mlp(), data()
    options = {"dim": DIM, "weight_gradients": weight_gradients}
    with whence.record(model, tmp_path / "s", **options) as rec:
        for first in range(0, 4 * before, 4):
            with rec.batch(range(first, first + 4)):
                cross_entropy(model, x, y).backward()
        with (
            pytest.raises(errors.CoverageError, match="must add up"),
            rec.batch(range(100, 104)),
        ):
            loss(model, x, y).backward()
    assert here["add_outer"] > 0
    assert len(whence.open(tmp_path / "s")) == 4 * before


@pytest.mark.parametrize("before", [0, 2])
def test_a_second_gradient_inside_the_batch_is_found_out(tmp_path, here, before):
    model, (x, y) = mlp(), data()

    def attacked(model, x, y):
        x = x.clone().requires_grad_()
        torch.autograd.grad(cross_entropy(model, x, y), x)
        return cross_entropy(model, x, y)

    with whence.record(model, tmp_path / "s", dim=DIM) as rec:
        for first in range(0, 4 * before, 4):
            with rec.batch(range(first, first + 4)):
                cross_entropy(model, x, y).backward()
        with (
            pytest.raises(errors.CoverageError, match="must add up"),
            rec.batch(range(100, 104)),
        ):
            attacked(model, x, y).backward()
    assert here["add_outer"] > 0


def test_a_parameter_without_a_rule_is_named(tmp_path, here):
    class Loose(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.gain = nn.Linear(6, 3), nn.Parameter(torch.ones(3))

        def forward(self, x):
            return self.inner(x) * self.gain

    model, (x, _) = Loose(), data()
    with (
        whence.record(model, tmp_path / "s", dim=DIM) as rec,
        pytest.raises(errors.CoverageError, match="gain without one"),
        rec.batch(range(4)),
    ):
        squares(model, x).backward()
    assert here["add_outer"] > 0


def test_tied_weights_of_a_table_and_a_head_add_up(tmp_path, here):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.head = nn.Embedding(11, 8), nn.Linear(8, 11)
            self.head.weight = self.table.weight

        def forward(self, x):
            return self.head(self.table(x).sin())

    model, x = Tied(), words()
    found, _ = rows_of(model, tmp_path / "s", squares, x, dim=DIM)
    assert min(here["add_lookup"], here["add_outer"]) > 0
    exact = whence.Sketch(dim=DIM)(per_sample_gradients(model, squares, x))
    assert all(close(each, exact, 1e-5) for each in found)
