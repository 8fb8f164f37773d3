"""layout="factored": scores are those of exact gradients, or the model is refused by name."""

import contextlib
import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from oracle import per_sample_gradients
from torch import nn

import whence
from whence import errors
from whence._core import MAX_DIM
from whence.factored import Factored, Segment

EXACT = 3e-6
"""Largest error of a score beside the product of the norms, with rows of 32 bits."""

HALF = 2e-3
"""The same with rows of 16 bits: twice the rounding of a factor, 2^-11, and some more."""


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """Models of this size only wait for threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Conv1D(nn.Module):
    """The layer of that name in Hugging Face's GPT-2: a Linear whose weight is [in, out]."""

    def __init__(self, nf, nx):
        super().__init__()
        self.nf = nf
        self.weight = nn.Parameter(torch.randn(nx, nf) * 0.3)
        self.bias = nn.Parameter(torch.randn(nf) * 0.3)

    def forward(self, x):
        shape = (*x.shape[:-1], self.nf)
        return torch.addmm(self.bias, x.view(-1, x.shape[-1]), self.weight).view(shape)


class Gain(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.gain = nn.Parameter(torch.rand(width) + 0.5)
        self.shift = nn.Parameter(torch.randn(width))

    def forward(self, x):
        return x * self.gain + self.shift


@pytest.fixture
def gain_is_registered():
    from whence.gradients import layers

    @whence.register_layer(Gain)
    def gain(module, inputs, output_gradient):
        return {"gain": output_gradient * inputs[0], "shift": output_gradient}

    yield
    del layers._USER_RULES[Gain]


class Branches(nn.Module):
    """One layer is silent in some batches."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(6, 3), nn.Linear(6, 3)
        self.both = True

    def forward(self, x):
        return self.first(x) + (self.second(x).tanh() if self.both else 0)


class Pooled(nn.Module):
    """Norms see positions, linear layers do not."""

    def __init__(self):
        super().__init__()
        self.norm, self.scale, self.head = nn.LayerNorm(3), nn.RMSNorm(3), nn.Linear(3, 3)

    def forward(self, x):
        return self.head(self.scale(self.norm(x.reshape(-1, 2, 3)).tanh()).sin().sum(1))


def frozen(*names):
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
    for name in names:
        model.get_parameter(name).requires_grad_(False)
    return model


def evaluated_batch_norm():
    norm = nn.BatchNorm1d(5).eval()
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2)
    return nn.Sequential(nn.Linear(6, 5), norm, nn.Tanh(), nn.Linear(5, 3))


MODELS = {
    "one layer": lambda: nn.Linear(6, 3),
    "mlp": lambda: nn.Sequential(nn.Linear(6, 9), nn.ReLU(inplace=True), nn.Linear(9, 3)),
    "without bias": lambda: nn.Sequential(
        nn.Linear(6, 9, bias=False), nn.Tanh(), nn.Linear(9, 3, bias=False)
    ),
    "a frozen weight": lambda: frozen("0.weight"),
    "a frozen bias": lambda: frozen("2.bias"),
    "a frozen layer": lambda: frozen("0.weight", "0.bias"),
    "only a bias": lambda: frozen("0.weight", "0.bias", "2.weight"),
    "one wide, one narrow": lambda: nn.Sequential(
        nn.Linear(6, 129), nn.Tanh(), nn.Linear(129, 1), nn.Linear(1, 17), nn.Linear(17, 3)
    ),
    "conv1d": lambda: nn.Sequential(Conv1D(9, 6), nn.Tanh(), Conv1D(3, 9)),
    "norms": lambda: nn.Sequential(
        nn.Linear(6, 8),
        nn.LayerNorm(8),
        nn.GELU(),
        nn.RMSNorm(8),
        nn.GroupNorm(2, 8),
        nn.Linear(8, 3),
    ),
    "batch norm in evaluation": evaluated_batch_norm,
    "norms over positions": Pooled,
    "registered": lambda: nn.Sequential(nn.Linear(6, 4), Gain(4), nn.Tanh(), nn.Linear(4, 3)),
    "branches": Branches,
}


def loss(model, x, y):
    return F.cross_entropy(model(x), y)


def data(count):
    return torch.randn(count, 6), torch.randint(0, 3, (count,))


def exact_rows(model, x, y, loss=loss):
    """[examples, parameters] float64 gradients, by torch.func in float64."""
    model = copy.deepcopy(model).double()
    gradients = per_sample_gradients(model, loss, x.double(), y)
    return torch.cat([gradients[name].flatten(1) for name in sorted(gradients)], 1).numpy()


def recorded(model, path, x, y, *, loss=loss, size=7, **options):
    options = {"layout": "factored", "dtype": "float32", **options}
    with whence.record(model, path, **options) as rec:
        for first in range(0, len(x), size):
            part = slice(first, first + size)
            with rec.batch(range(first, min(first + size, len(x))), label=y[part]):
                loss(model, x[part], y[part]).backward()
    return whence.open(path)


def scores(hits):
    """[queries, examples] in the order of ids 0, 1, 2, ..."""
    assert np.array_equal(np.sort(hits.helpful.ids, axis=1), np.sort(hits.harmful.ids, axis=1))
    return np.take_along_axis(hits.helpful.scores, np.argsort(hits.helpful.ids, axis=1), 1)


def error(found, queries, rows):
    """The largest error of a score, as a share of the product of the norms."""
    norms = np.linalg.norm(queries, axis=1)[:, None] * np.linalg.norm(rows, axis=1)
    return (np.abs(found - queries @ rows.T) / norms).max()


@pytest.mark.usefixtures("gain_is_registered")
@pytest.mark.parametrize(("dtype", "bound"), [("float32", EXACT), ("float16", HALF)])
@pytest.mark.parametrize("name", MODELS)
def test_scores_are_products_of_exact_gradients(tmp_path, name, dtype, bound):
    model, (x, y), (q, z) = MODELS[name](), data(21), data(3)
    store = recorded(model, tmp_path / "s", x, y, dtype=dtype)
    hits = whence.query(model, store, lambda: loss(model, q, z), k=21)
    rows, queries = exact_rows(model, x, y), exact_rows(model, q, z)
    assert error(scores(hits), queries, rows) < bound
    assert (np.diff(hits.helpful.scores, axis=1) <= 0).all()
    assert (np.diff(hits.harmful.scores, axis=1) >= 0).all()
    norms = np.linalg.norm(rows, axis=1)
    assert np.allclose(store.norms(), norms, rtol=1e-5)
    assert np.allclose(store.self_influence(), norms**2, rtol=1e-5)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("widths", [(1, 1), (2, 1), (1, 2), (15, 16), (16, 17), (33, 31)])
def test_factors_of_any_width_multiply_to_the_gradient(tmp_path, widths, dtype):
    first, last = widths
    model = nn.Sequential(nn.Linear(6, first), nn.Sigmoid(), nn.Linear(first, last))
    x, q = torch.randn(5, 6), torch.randn(2, 6)

    def squares(model, x, _):
        return model(x).square().sum(1).mean()

    store = recorded(model, tmp_path / "s", x, torch.arange(5), loss=squares, dtype=dtype)
    hits = whence.query(model, store, lambda: squares(model, q, None), k=5)
    rows, queries = (exact_rows(model, each, torch.arange(5), squares) for each in (x, q))
    assert error(scores(hits), queries, rows) < (EXACT if dtype == "float32" else HALF)


def test_checkpoints_are_summed_with_their_learning_rates(tmp_path):
    model, (x, y), (q, z) = MODELS["norms"](), data(10), data(3)
    states, exact, influence = {}, 0, 0
    with whence.record(model, tmp_path / "s", layout="factored", dtype="float32") as rec:
        for name, rate in (("one", 0.5), ("two", 0.125), ("three", 2.0)):
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(torch.randn_like(parameter), alpha=0.3)
            rec.checkpoint(name, learning_rate=rate)
            states[name] = copy.deepcopy(model.state_dict())
            for part in (slice(0, 4), slice(4, 10)):
                with rec.batch(list(range(10))[part]):
                    loss(model, x[part], y[part]).backward()
            rows = exact_rows(model, x, y)
            exact = exact + rate * exact_rows(model, q, z) @ rows.T
            influence = influence + rate * np.linalg.norm(rows, axis=1) ** 2
    store = whence.open(tmp_path / "s")
    hits = whence.query(model, store, lambda: loss(model, q, z), k=10, states=states)
    assert np.linalg.norm(scores(hits) - exact) < 1e-5 * np.linalg.norm(exact)
    assert np.allclose(store.self_influence(), influence, rtol=1e-5)


def test_filters_and_exclusions_leave_out_what_they_say(tmp_path):
    model, (x, y) = MODELS["mlp"](), data(12)
    store = recorded(model, tmp_path / "s", x, y)
    rows = exact_rows(model, x, y)
    exclude = [[0, 3], []]
    hits = whence.query(
        model,
        store,
        lambda: loss(model, x[:2], y[:2]),
        k=12,
        where={"label": [0, 2]},
        exclude=exclude,
    )
    fewest = int(hits.eligible.min())
    for query in range(2):
        left = [i for i in range(12) if y[i] in (0, 2) and i not in exclude[query]]
        exact = rows[query] @ rows[left].T
        assert hits.eligible[query] == len(left)
        assert hits.helpful.ids[query].tolist() == [left[i] for i in np.argsort(-exact)[:fewest]]
        assert hits.harmful.ids[query].tolist() == [left[i] for i in np.argsort(exact)[:fewest]]


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("scale", [1e-20, 1e15])
def test_tiny_and_huge_gradients_keep_their_digits(tmp_path, scale, dtype):
    model, (x, y) = MODELS["norms"](), data(10)

    def scaled(model, x, y):
        return loss(model, x, y) * scale

    store = recorded(model, tmp_path / "s", x, y, loss=scaled, dtype=dtype)
    hits = whence.query(model, store, lambda: loss(model, x, y), k=10)
    rows = exact_rows(model, x, y)
    assert error(scores(hits).astype(np.float64) / scale, rows, rows) < (
        EXACT if dtype == "float32" else HALF
    )
    assert np.allclose(store.norms() / scale, np.linalg.norm(rows, axis=1), rtol=1e-5)
    hits = whence.query(model, store, lambda: scaled(model, x, y) / 1e3, k=10)
    assert np.isfinite(hits.helpful.scores).all()


def test_a_layer_of_small_gradients_keeps_its_digits_beside_a_large_one(tmp_path):
    model, (x, y) = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)), data(10)
    with torch.no_grad():
        model[2].weight *= 1e-3
    store = recorded(model, tmp_path / "s", x, y, dtype="float16")
    stored = np.load(next(store.path.glob("shard-*/rows.npy"))).astype(np.float32)
    shapes = {name: tuple(each.shape) for name, each in model.named_parameters()}
    exact, sketch = per_sample_gradients(model, loss, x, y), whence.Sketch(dim=2048)
    sizes, at = [], 0
    for segment in Factored.from_spec(store.manifest.sketch).segments:
        rows = stored[:, at : at + segment.width]
        at += segment.width
        found = Factored([segment]).sketched(rows, shapes, sketch) * store.scales[:, None]
        layer = sketch({name: exact[name] for name in (segment.parameter, segment.bias)})
        sizes.append(np.linalg.norm(layer))
        assert np.linalg.norm(found - layer) < HALF * sizes[-1]
    assert sizes[0] < 5e-3 * sizes[1]


def test_an_example_without_a_gradient_scores_zero(tmp_path):
    model, (x, y) = MODELS["mlp"](), data(6)
    share = torch.tensor([1.0, 0, 1, 0, 1, 1])

    def weighted(model, x, y):
        return (F.cross_entropy(model(x), y, reduction="none") * share[: len(x)]).mean()

    store = recorded(model, tmp_path / "s", x, y, loss=weighted)
    assert (store.norms() == 0).tolist() == (share == 0).tolist()
    assert (store.self_influence() == 0).tolist() == (share == 0).tolist()
    found = scores(whence.query(model, store, lambda: loss(model, x, y), k=6))
    rows = exact_rows(model, x, y)
    assert (found[:, [1, 3]] == 0).all()
    some = [0, 2, 4, 5]
    assert error(found[:, some], rows, rows[some]) < EXACT
    none = whence.query(model, store, lambda: weighted(model, x, y) * 0, k=6)
    assert (none.helpful.scores == 0).all()


def test_a_layer_that_did_not_run_has_no_gradient(tmp_path):
    model, (x, y) = Branches(), data(8)
    exact = []
    with whence.record(model, tmp_path / "s", layout="factored", dtype="float32") as rec:
        for part, both in ((slice(0, 4), True), (slice(4, 8), False)):
            model.both = both
            with rec.batch(list(range(8))[part]):
                loss(model, x[part], y[part]).backward()
            exact.append(exact_rows(model, x[part], y[part]))
    rows = np.concatenate(exact)
    model.both = True
    found = scores(whence.query(model, tmp_path / "s", lambda: loss(model, x, y), k=8))
    assert error(found, exact_rows(model, x, y), rows) < EXACT


@pytest.mark.parametrize("weight_gradients", [True, False])
def test_weight_gradients_are_those_of_plain_training_or_none(tmp_path, weight_gradients):
    model, (x, y) = MODELS["norms"](), data(7)
    loss(model, x, y).backward()
    plain = {name: each.grad.clone() for name, each in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = None
    options = {"layout": "factored", "weight_gradients": weight_gradients}
    with whence.record(model, tmp_path / "s", **options) as rec:
        for first in range(0, 28, 7):
            model.zero_grad()
            with rec.batch(range(first, first + 7)):
                loss(model, x, y).backward()
            for name, each in model.named_parameters():
                if weight_gradients:
                    assert torch.allclose(each.grad, plain[name], rtol=1e-5, atol=1e-7)
                else:
                    assert each.grad is None
    norms = whence.open(tmp_path / "s").norms().reshape(4, 7)
    assert np.array_equal(norms, np.tile(norms[:1], (4, 1)))


@pytest.mark.parametrize(("reduction", "scale"), [("sum", 1.0), ("mean", 512.0)])
def test_rows_are_of_the_examples_own_loss(tmp_path, reduction, scale):
    model, (x, y) = MODELS["mlp"](), data(7)
    options = {"layout": "factored", "dtype": "float32", "reduction": reduction}
    with whence.record(model, tmp_path / "s", **options) as rec, rec.batch(range(7), scale=scale):
        (F.cross_entropy(model(x), y, reduction=reduction) * scale).backward()
    rows = exact_rows(model, x, y)
    assert np.allclose(whence.open(tmp_path / "s").norms(), np.linalg.norm(rows, axis=1), rtol=1e-5)
    found = whence.query(model, tmp_path / "s", lambda: loss(model, x, y), 7, reduction="mean")
    assert error(scores(found), rows, rows) < EXACT


def test_chosen_layers_alone_are_recorded(tmp_path):
    torch.manual_seed(4)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3))
    x, y = torch.randn(6, 1, 4, 4), torch.randint(0, 3, (6,))
    store = recorded(model, tmp_path / "s", x, y, layers="3")
    head = copy.deepcopy(model)
    head[0].requires_grad_(False)
    rows = exact_rows(head, x, y)
    assert store.dim == 3 + 16 + 1
    found = whence.query(model, store, lambda: loss(model, x, y), k=6)
    assert error(scores(found), rows, rows) < EXACT


def test_under_autocast_scores_are_as_rounded_as_its_layers(tmp_path):
    model, (x, y) = MODELS["mlp"](), data(7)

    def rounded(model, x, y):
        with torch.autocast("cpu", torch.bfloat16):
            out = model(x)
        return F.cross_entropy(out.float(), y)

    store = recorded(model, tmp_path / "s", x, y, loss=rounded)
    rows = exact_rows(model, x, y)
    found = scores(whence.query(model, store, lambda: rounded(model, x, y), k=7))
    assert error(found, rows, rows) < 0.03


def test_rows_do_not_change_with_what_the_loop_does_to_its_tensors_later(tmp_path):
    model, (x, y) = MODELS["mlp"](), data(7)
    rows, buffer = exact_rows(model, x, y), x.clone()
    options = {"layout": "factored", "dtype": "float32"}
    with whence.record(model, tmp_path / "s", **options) as rec, rec.batch(range(7)):
        loss(model, buffer, y).backward()
        buffer.fill_(5)  # as a loop with one buffer does, when it is done with a batch
    found = whence.query(model, tmp_path / "s", lambda: loss(model, x, y), k=7)
    assert error(scores(found), rows, rows) < EXACT


def test_rows_do_not_change_with_gradients_cleared_in_the_batch(tmp_path):
    class Shift(nn.Module):
        def __init__(self):
            super().__init__()
            self.shift = nn.Parameter(torch.randn(3))

        def forward(self, x):
            return x + self.shift

    from whence.gradients import layers

    whence.register_layer(Shift, lambda module, inputs, delta: {"shift": delta})
    model, (x, y) = nn.Sequential(Shift()), data(5)
    x = x[:, :3].clone().requires_grad_()
    rows = exact_rows(model, x.detach(), y)
    try:
        options = {"layout": "factored", "dtype": "float32"}
        with whence.record(model, tmp_path / "s", **options) as rec, rec.batch(range(5)):
            loss(model, x, y).backward()
            x.grad.zero_()
    finally:
        del layers._USER_RULES[Shift]
    assert np.allclose(whence.open(tmp_path / "s").norms(), np.linalg.norm(rows, axis=1), rtol=1e-5)


# --- what is refused ------------------------------------------------------------------------------


class Tied(nn.Module):
    def __init__(self, name):
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)
        setattr(self.b, name, getattr(self.a, name))

    def forward(self, x):
        return self.b(torch.tanh(self.a(x)))


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 6)

    def forward(self, x):
        return self.layer(torch.tanh(self.layer(x)))


class Loose(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.gain = nn.Linear(6, 6), nn.Parameter(torch.ones(6))

    def forward(self, x):
        return self.inner(x) * self.gain


REFUSED = {
    "an embedding": (
        lambda: nn.Sequential(nn.Linear(6, 6), nn.Embedding(7, 6)),
        errors.LayerError,
        r"1 \(Embedding\)",
    ),
    "a convolution": (
        lambda: nn.Sequential(nn.Conv1d(6, 6, 1), nn.Linear(6, 6)),
        errors.LayerError,
        r"0 \(Conv1d\)",
    ),
    "attention": (
        lambda: nn.Sequential(nn.Linear(6, 6), nn.MultiheadAttention(6, 2, batch_first=True)),
        errors.LayerError,
        r"1 \(MultiheadAttention\)",
    ),
    "one that is the whole model": (
        lambda: nn.Embedding(7, 6),
        errors.LayerError,
        r"the model \(Embedding\)",
    ),
    "a tied weight": (lambda: Tied("weight"), errors.MismatchError, r"a\.weight in two layers"),
    "a tied bias": (lambda: Tied("bias"), errors.MismatchError, "tied parameters, got .*bias"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_factors_is_refused_by_name(tmp_path, name):
    make, kind, match = REFUSED[name]
    with pytest.raises(kind, match=rf"layout='factored' must be used with.*{match}"):
        whence.record(make(), tmp_path / "s", layout="factored")
    assert not (tmp_path / "s").exists()


def test_a_functional_layer_is_refused_by_name(tmp_path):
    with pytest.raises(errors.LayerError, match=r"got the model \(Loose\)"):
        whence.record(Loose(), tmp_path / "s", layout="factored", uncovered="functional")


def positions(model, x):
    return model(x[:, None].expand(-1, 3, -1)).square().mean()


def twice_forward(model, x):
    return (model(x).square() + model(x * 2)).mean()


IN_BATCH = {
    "several positions": (lambda: nn.Linear(6, 6), positions, "got 3 in weight"),
    "a layer that runs twice": (Twice, lambda m, x: m(x).mean(), r"second use of layer\.weight"),
    "a model that runs twice": (lambda: frozen(), twice_forward, r"second use of 2\.weight"),
    "a norm that runs twice": (
        lambda: nn.LayerNorm(6),
        lambda m, x: m(m(x).sin()).square().mean(),
        "second use of weight",
    ),
}


@pytest.mark.parametrize("weight_gradients", [True, False])
@pytest.mark.parametrize("name", IN_BATCH)
def test_what_one_pair_of_factors_does_not_hold_is_refused_by_name(
    tmp_path, name, weight_gradients
):
    make, loss, match = IN_BATCH[name]
    model = make()
    options = {"layout": "factored", "weight_gradients": weight_gradients}
    with whence.record(model, tmp_path / "s", **options) as rec:
        with pytest.raises(errors.LayerError, match=match), rec.batch(range(4)):
            loss(model, torch.randn(4, 6)).backward()
        assert rec.pending([0, 1]) == [0, 1]
    assert len(whence.open(tmp_path / "s")) == 0


def test_two_backward_passes_in_a_batch_are_refused_by_name(tmp_path):
    model, (x, y) = frozen(), data(4)

    def both():
        for _ in range(2):
            loss(model, x, y).backward()

    with (
        whence.record(model, tmp_path / "s", layout="factored") as rec,
        pytest.raises(errors.LayerError, match=r"second use of 2\.weight"),
        rec.batch(range(4)),
    ):
        both()


def test_a_refusal_that_the_loop_swallows_still_stores_nothing(tmp_path):
    model, (x, y) = frozen(), data(4)

    def swallowed():
        loss(model, x, y).backward()
        with contextlib.suppress(errors.LayerError):
            loss(model, x, y).backward()

    with (
        whence.record(model, tmp_path / "s", layout="factored") as rec,
        pytest.raises(errors.LayerError, match="second use"),
        rec.batch(range(4)),
    ):
        swallowed()
    assert len(whence.open(tmp_path / "s")) == 0


def test_a_query_of_several_positions_is_refused_by_name(tmp_path):
    model = nn.Linear(6, 3)
    recorded(model, tmp_path / "s", *data(4))
    with pytest.raises(errors.LayerError, match="got 3 in weight"):
        whence.query(model, tmp_path / "s", lambda: positions(model, torch.randn(4, 6)))


def test_arrays_neither_ask_nor_leave_a_store_of_factors(tmp_path):
    store = recorded(nn.Linear(6, 3), tmp_path / "s", *data(4))
    with pytest.raises(errors.MismatchError, match=r"queries must be asked by whence\.query"):
        store.search(np.zeros((1, store.dim), np.float32))
    with pytest.raises(errors.MismatchError, match="rows must be read from a store of sketches"):
        store.rows()
    with pytest.raises(errors.MismatchError, match="rows must be read"):
        store.rows(np.array([1]))
    assert "factored" in repr(store)


def test_another_model_is_refused_by_name(tmp_path):
    recorded(frozen(), tmp_path / "s", *data(4))
    other = frozen("2.bias")
    with pytest.raises(errors.MismatchError, match=r"^segments must be"):
        whence.record(other, tmp_path / "s", layout="factored", dtype="float32")
    wide = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4))
    with pytest.raises(errors.MismatchError, match=r"2\.bias \[3\] in linear, got 2\.bias \[4\]"):
        whence.query(wide, tmp_path / "s", lambda: loss(wide, *data(4)))


def test_rows_wider_than_a_store_holds_are_refused():
    assert Factored([Segment("weight", 1, MAX_DIM - 1)]).width == MAX_DIM
    with pytest.raises(errors.MismatchError, match=f"from 1 to {MAX_DIM} wide, got {MAX_DIM + 1}"):
        Factored([Segment("weight", 1, MAX_DIM)])


@pytest.mark.parametrize("spec", [{}, {"segments": [{"other": 1}]}, {"segments": [3]}])
def test_segments_of_another_version_are_refused(spec):
    with pytest.raises(errors.MismatchError, match="segments must be of this version"):
        Factored.from_spec({"layout": "factored", **spec})


# --- checks ---------------------------------------------------------------------------------------


@pytest.mark.usefixtures("gain_is_registered")
@pytest.mark.parametrize("name", [*MODELS])
def test_verify_agrees_and_finds_a_wrong_reduction(tmp_path, name):
    model, (x, y) = MODELS[name](), data(4)
    closure = lambda x, y: loss(model, x, y)  # noqa: E731
    with whence.record(model, tmp_path / "a", layout="factored") as rec:
        found = rec.verify(closure, (x, y))
        assert found.gradient < 1e-5
        assert found.batch < 1e-5
    with (
        whence.record(model, tmp_path / "b", layout="factored", reduction="sum") as rec,
        pytest.raises(errors.LayerError, match="reduction must fit the loss, got 'sum'"),
    ):
        rec.verify(closure, (x, y))


def test_verify_finds_a_gradient_that_depends_on_the_batch(tmp_path):
    class Centred(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(6, 3)

        def forward(self, x):
            return self.layer(x - x.mean(0) / 2)

    model, (x, y) = Centred(), data(4)
    with (
        whence.record(model, tmp_path / "s", layout="factored") as rec,
        pytest.raises(errors.LayerError, match="who else is in the batch"),
    ):
        rec.verify(lambda x, y: loss(model, x, y), (x, y))


def penalty(model, x, y):
    return loss(model, x, y) + 0.1 * model[0].weight.square().sum()


def by_hand(model, x, y):
    return F.cross_entropy(F.linear(torch.tanh(model[0](x)), model[2].weight), y)


@pytest.mark.parametrize("weight_gradients", [True, False])
@pytest.mark.parametrize("before", [0, 2, 4])
@pytest.mark.parametrize("other", [penalty, by_hand])
def test_a_use_outside_the_layer_is_found_in_any_batch(tmp_path, other, before, weight_gradients):
    model, (x, y) = frozen(), data(4)
    options = {"layout": "factored", "weight_gradients": weight_gradients}
    with whence.record(model, tmp_path / "s", **options) as rec:
        for first in range(0, 4 * before, 4):
            with rec.batch(range(first, first + 4)):
                loss(model, x, y).backward()
        with (
            pytest.raises(errors.CoverageError, match="must add up"),
            rec.batch(range(100, 104)),
        ):
            other(model, x, y).backward()
    assert len(whence.open(tmp_path / "s")) == 4 * before


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("before", [0, 2])
def test_what_is_not_finite_names_id_and_layer(tmp_path, value, before):
    model, (x, y) = frozen(), data(4)
    with whence.record(model, tmp_path / "s", layout="factored") as rec:
        for first in range(0, 4 * before, 4):
            with rec.batch(range(first, first + 4)):
                loss(model, x, y).backward()
        broken = x.clone()
        broken[2, 1] = value
        with (
            pytest.raises(errors.NotFiniteError, match=r"for id 102 in (0|2)$"),
            rec.batch(range(100, 104)),
        ):
            loss(model, broken, y).backward()
    assert len(whence.open(tmp_path / "s")) == 4 * before


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_skip_leaves_out_what_is_not_finite_and_nothing_else(tmp_path, value):
    model, (x, y) = frozen(), data(6)
    broken = x.clone()
    broken[[1, 4], 0] = value
    options = {"layout": "factored", "dtype": "float32", "nonfinite": "skip"}
    with whence.record(model, tmp_path / "s", **options) as rec:
        with rec.batch(range(6), label=y) as done:
            loss(model, broken, y).backward()
        assert done.stored.tolist() == [0, 2, 3, 5]
        assert len(done.rows) == 4
        assert rec.pending(range(6)) == []
    store = whence.open(tmp_path / "s")
    assert store.skipped == [("0", 1), ("0", 4)]
    rows = exact_rows(model, x, y)
    kept = [0, 2, 3, 5]
    hits = whence.query(model, store, lambda: loss(model, x, y), k=4)
    assert error(scores(hits), rows, rows[kept]) < EXACT


def test_a_query_that_is_not_finite_is_named(tmp_path):
    model, (x, y) = frozen(), data(4)
    recorded(model, tmp_path / "s", x, y)
    x = x.clone()
    x[2] = float("nan")
    with pytest.raises(errors.NotFiniteError, match="query 2"):
        whence.query(model, tmp_path / "s", lambda: loss(model, x, y))


def test_recorded_twice_is_left_out(tmp_path):
    model, (x, y) = frozen(), data(6)
    options = {"layout": "factored", "dtype": "float32", "on_duplicate": "skip"}
    with whence.record(model, tmp_path / "s", **options) as rec:
        with rec.batch(range(4)):
            loss(model, x[:4], y[:4]).backward()
        with rec.batch([2, 3, 4, 5]) as done:
            loss(model, x[2:] * 2, y[2:]).backward()
        assert done.stored.tolist() == [4, 5]
        with rec.batch([4, 5]) as done:
            loss(model, x[4:], y[4:]).backward()
        assert done.rows.shape == (0, 5 + 6 + 1 + 3 + 5 + 1)
    rows = np.concatenate([exact_rows(model, x[:4], y[:4]), exact_rows(model, x[4:] * 2, y[4:])])
    queries = exact_rows(model, x, y)
    found = scores(whence.query(model, tmp_path / "s", lambda: loss(model, x, y), k=6))
    assert error(found, queries, rows) < EXACT
