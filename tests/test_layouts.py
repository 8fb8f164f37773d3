"""A `Sketch` with settings: recorded, resumed and asked, against sketches of single parameters."""

import copy

import numpy as np
import pytest
import torch
from oracle import per_sample_gradients
from torch import nn

import whence
from whence import errors
from whence._core import MAX_DIM
from whence.sketch import KINDS

DIM = 40
CLASSES = 4


class Net(nn.Module):
    """A layer of each kind of rule, with enough positions for every way of summing."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(11, 8)
        self.conv = nn.Conv1d(8, 8, 3, padding=1, groups=2)
        self.norm = nn.LayerNorm(8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.middle = nn.Linear(8, 20)
        self.scale = nn.RMSNorm(20)
        self.head = nn.Linear(20, 5)

    def forward(self, x):
        h = self.table(x)
        h = self.norm(h + self.conv(h.transpose(1, 2)).transpose(1, 2))
        h = h + self.attention(h, h, h)[0]
        return self.head(self.scale(torch.tanh(self.middle(h))))


LAYERS = [
    "attention",
    "attention.out_proj",
    "conv",
    "head",
    "middle",
    "norm",
    "scale",
    "table",
]


def squares_of_each(model, x):
    out = model(x).flatten(1)
    return (out.square() * torch.linspace(0.5, 1.5, out.shape[1])).sum(1)


def squares(model, x):
    return squares_of_each(model, x).mean()


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """Models of this size only wait for threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def known():
    """A model, a batch, and the exact gradients."""
    torch.manual_seed(3)
    model, x = Net(), torch.randint(0, 11, (4, 9))
    return model, x, per_sample_gradients(model, squares, x)


def mlp():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))


def expected(gradients, kind_of, *, layout="global", normalize=False, nonzeros=None):
    """Rows from one sketch of one kind for each parameter, added and divided by hand."""
    layers = sorted({name.rpartition(".")[0] for name in gradients})
    count = len(next(iter(gradients.values())))
    parts = np.zeros((count, len(layers), DIM))
    for name, values in gradients.items():
        kind = kind_of(name)
        options = {"nonzeros": nonzeros} if kind == "sjlt" else {}
        row = whence.Sketch(kind, dim=DIM, seed=7, **options)({name: values})
        parts[:, layers.index(name.rpartition(".")[0])] += row
    rows = parts.sum(1) if layout == "global" else parts.reshape(count, -1)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True) if normalize else rows


def by_end(name):
    """What `kinds` of the case below says, in other words."""
    if name.endswith(".bias"):
        return "sjlt"
    return "rademacher" if name in ("head.weight", "middle.weight") else "chunked_sjlt"


MIXED = {"*.bias": "sjlt", "head.*": "rademacher", "middle.weight": "rademacher"}

# Name -> arguments of the Sketch, and the kind of each parameter.
SETTINGS = {
    "per layer": ({"layout": "per_layer"}, lambda name: "chunked_sjlt"),
    "normalized": ({"normalize": True}, lambda name: "chunked_sjlt"),
    "kinds": ({"kinds": MIXED, "nonzeros": 4}, by_end),
    "all": (
        {"kinds": MIXED, "nonzeros": 2, "layout": "per_layer", "normalize": True},
        by_end,
    ),
}
# Every kind through every rule.
SETTINGS |= {f"only {kind}": ({"kind": kind}, lambda name, kind=kind: kind) for kind in KINDS}


def sketch_of(name):
    return whence.Sketch(dim=DIM, seed=7, **SETTINGS[name][0])


def rows_of(name, gradients):
    options, kind_of = SETTINGS[name]
    rest = {key: value for key, value in options.items() if key not in ("kind", "kinds")}
    return expected(gradients, kind_of, **rest)


def close(found, exact, tolerance=2e-6):
    return np.linalg.norm(found - exact) <= tolerance * np.linalg.norm(exact)


@pytest.mark.parametrize("weight_gradients", [True, False])
@pytest.mark.parametrize("name", SETTINGS)
def test_a_row_is_the_sum_of_its_parameters_sketches(tmp_path, known, name, weight_gradients):
    model, x, gradients = known
    exact = rows_of(name, gradients)
    options = {"sketch": sketch_of(name), "weight_gradients": weight_gradients}
    with whence.record(model, tmp_path / "s", dtype="float32", **options) as rec:
        for first in (0, 4, 8):  # the third batch is compared otherwise, and summed otherwise
            with rec.batch(range(first, first + 4)) as done:
                squares(model, x).backward()
            assert close(done.rows, exact)
    assert close(whence.open(tmp_path / "s").rows(), np.tile(exact, (3, 1)))


@pytest.mark.parametrize("name", ["per layer", "normalized", "kinds", "all"])
def test_a_score_is_the_product_of_such_rows_over_checkpoints(tmp_path, name):
    model, x, q = Net(), torch.randint(0, 11, (6, 5)), torch.randint(0, 11, (2, 5))
    states, exact = {}, 0
    options = {"sketch": sketch_of(name), "dtype": "float32"}
    with whence.record(model, tmp_path / "s", **options) as rec:
        for label, rate in (("one", 0.5), ("two", 0.125)):
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(torch.randn_like(parameter), alpha=0.2)
            rec.checkpoint(label, learning_rate=rate)
            states[label] = copy.deepcopy(model.state_dict())
            with rec.batch(range(6)):
                squares(model, x).backward()
            train, asked = (
                rows_of(name, per_sample_gradients(model, squares, each)) for each in (x, q)
            )
            exact = exact + rate * asked @ train.T
    hits = whence.query(model, tmp_path / "s", lambda: squares(model, q), k=6, states=states)
    found = np.take_along_axis(hits.helpful.scores, np.argsort(hits.helpful.ids, axis=1), 1)
    assert close(found, exact, 1e-5)


@pytest.mark.parametrize("name", ["per layer", "normalized", "kinds", "all"])
def test_a_store_is_searched_with_rows_of_the_same_sketch(tmp_path, known, name):
    model, x, gradients = known
    sketch = sketch_of(name)
    with (
        whence.record(model, tmp_path / "s", sketch=sketch, dtype="float32") as rec,
        rec.batch(range(4)),
    ):
        squares(model, x).backward()
    rows = sketch(gradients)
    hits = whence.open(tmp_path / "s").search(rows, k=4)
    found = np.take_along_axis(hits.helpful.scores, np.argsort(hits.helpful.ids, axis=1), 1)
    assert close(found, rows.astype(np.float64) @ rows.T, 1e-5)


@pytest.mark.parametrize("name", ["per layer", "normalized", "kinds", "all"])
def test_the_manifest_says_how_the_rows_were_made(tmp_path, known, name):
    model, x, gradients = known
    with (
        whence.record(model, tmp_path / "s", sketch=sketch_of(name), dtype="float32") as rec,
        rec.batch(range(4)),
    ):
        squares(model, x).backward()
    store = whence.open(tmp_path / "s")
    said = store.manifest.sketch
    options, kind_of = SETTINGS[name]
    names = [each["name"] for each in store.manifest.model["parameters"]]
    others = {each: kind_of(each) for each in names if kind_of(each) != "chunked_sjlt"}
    assert said.get("kinds", {}) == others
    assert said.get("normalize", False) == options.get("normalize", False)
    assert said.get("nonzeros") == options.get("nonzeros")
    assert said.get("layout", "global") == options.get("layout", "global")
    assert said.get("layers") == (LAYERS if "layout" in options else None)
    assert store.dim == DIM * (len(LAYERS) if "layout" in options else 1)
    assert close(whence.Sketch.from_spec(said)(gradients), store.rows())


def test_a_manifest_of_the_defaults_is_that_of_a_plain_sketch(tmp_path):
    plain = {"kind": "chunked_sjlt", "dim": 4096, "seed": 0, "hash_version": whence.HASH_VERSION}
    same = whence.Sketch(kinds={"*": "chunked_sjlt"})
    for name, options in (("a", {}), ("b", {"sketch": same})):
        fill(tmp_path / name, **options)
        assert whence.open(tmp_path / name).manifest.sketch == plain


def test_kinds_that_fit_no_parameter_are_refused(tmp_path):
    sketch = whence.Sketch(kinds={"*.bias": "sjlt", "none.*": "srht"})
    with pytest.raises(errors.ArgumentError, match=r"kinds must each match .* got \['none.\*'\]"):
        whence.record(mlp(), tmp_path / "s", sketch=sketch)


# --- going on -------------------------------------------------------------------------------------


def fill(path, **options):
    model = mlp()
    with whence.record(model, path, **options) as rec, rec.batch([1, 2]):
        squares(model, torch.ones(2, 6)).backward()


def with_settings(**options):
    return {"sketch": whence.Sketch(dim=16, **options)}


SAME = {
    "per layer": (with_settings(layout="per_layer"), {"layout": "per_layer", "dim": 16}),
    "kinds by pattern and by name": (
        with_settings(kinds={"2.*": "sjlt"}),
        with_settings(kinds={"2.bias": "sjlt", "2.weight": "sjlt"}),
    ),
    "kinds that shadow others": (
        with_settings(kinds={"0.*": "srht"}),
        with_settings(kinds={"0.*": "srht", "0.bias": "sjlt"}),
    ),
    "nonzeros": (with_settings(kind="sjlt", nonzeros=4), with_settings(kind="sjlt", nonzeros=4)),
    "nonzeros of no parameter": (
        with_settings(kinds={"*": "chunked_sjlt", "0.*": "sjlt"}, nonzeros=8),
        with_settings(),
    ),
    "one nonzero": (with_settings(kind="sjlt"), with_settings(kind="sjlt", nonzeros=1)),
    "threads": (with_settings(threads=1), with_settings(threads=3)),
    "factored": ({"layout": "factored"}, {"layout": "factored"}),
}


@pytest.mark.parametrize("name", SAME)
def test_the_same_setting_in_other_words_goes_on(tmp_path, name):
    first, second = SAME[name]
    fill(tmp_path / "s", **first)
    model = mlp()
    with whence.record(model, tmp_path / "s", **second) as rec:
        assert rec.pending([1, 2, 3]) == [3]
        with rec.batch([3]):
            squares(model, torch.ones(1, 6)).backward()
    assert len(whence.open(tmp_path / "s")) == 3


FACTORED = {"layout": "factored"}
OTHERS = {
    "layout": (with_settings(), with_settings(layout="per_layer")),
    "layout back": (with_settings(layout="per_layer"), with_settings()),
    "layout to factors": (with_settings(), FACTORED),
    "layout per layer to factors": (with_settings(layout="per_layer"), FACTORED),
    "layout of factors": (FACTORED, with_settings()),
    "layout of factors per layer": (FACTORED, with_settings(layout="per_layer")),
    "normalize": (with_settings(), with_settings(normalize=True)),
    "normalize back": (with_settings(normalize=True), with_settings()),
    "kinds": (with_settings(), with_settings(kinds={"0.*": "sjlt"})),
    "kinds back": (with_settings(kinds={"0.*": "sjlt"}), with_settings()),
    "kinds of others": (
        with_settings(kinds={"0.*": "sjlt"}),
        with_settings(kinds={"2.*": "sjlt"}),
    ),
    "nonzeros": (with_settings(kind="sjlt"), with_settings(kind="sjlt", nonzeros=2)),
    "kind": (with_settings(), with_settings(kind="sjlt")),
    "dim per layer": (
        {"layout": "per_layer", "dim": 8},
        {"layout": "per_layer", "dim": 16},
    ),
    "layers": (
        {"layout": "per_layer", "dim": 8},
        {"layout": "per_layer", "dim": 8, "layers": "2"},
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_another_setting_is_refused_by_its_name(tmp_path, name):
    first, second = OTHERS[name]
    fill(tmp_path / "s", **first)
    before = whence.open(tmp_path / "s").manifest
    with pytest.raises(errors.MismatchError, match=rf"^{name.split()[0]} must be"):
        whence.record(mlp(), tmp_path / "s", **second)
    assert whence.open(tmp_path / "s").manifest == before


SKETCH = whence.Sketch(dim=16)


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"sketch": SKETCH, "dim": 16}, errors.ArgumentError, "dim must be None .* got 16"),
        ({"sketch": SKETCH, "seed": 0}, errors.ArgumentError, "seed must be None .* got 0"),
        ({"sketch": SKETCH, "layout": "global"}, errors.ArgumentError, "layout must be None"),
        ({"sketch": SKETCH, "layout": "factored"}, errors.ArgumentError, "sketch must be None"),
        ({"dim": 8, "layout": "factored"}, errors.ArgumentError, "dim must be None .* got 8"),
        ({"seed": 1, "layout": "factored"}, errors.ArgumentError, "seed must be None .* got 1"),
        ({"sketch": "sjlt", "layout": "factored"}, errors.ArgumentError, "got 'sjlt'"),
        ({"layout": "rows"}, errors.ArgumentError, "layout must be one of global, per_layer"),
        ({"sketch": 3}, errors.DtypeError, "sketch must be .* got int 3"),
        ({"sketch": "other"}, errors.ArgumentError, "sketch must be one of"),
    ],
)
def test_settings_that_do_not_go_together_are_named(tmp_path, options, error, match):
    with pytest.raises(error, match=match):
        whence.record(mlp(), tmp_path / "s", **options)
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"layout": "factored"}, errors.ArgumentError, "layout must be one of global, per_layer"),
        ({"nonzeros": 2}, errors.ArgumentError, "nonzeros must be None for kind='chunked_sjlt'"),
        ({"kind": "sjlt", "nonzeros": 0}, errors.ArgumentError, "nonzeros must be from 1"),
        ({"kind": "sjlt", "nonzeros": 3}, errors.ArgumentError, "nonzeros"),
        ({"kinds": {"a": "b"}}, errors.ArgumentError, r"kinds\['a'\] must be one of"),
        ({"kinds": ["sjlt"]}, errors.DtypeError, "kinds must be a dict"),
        ({"kinds": {1: "sjlt"}}, errors.DtypeError, "kinds must be a dict"),
        ({"normalize": 1}, errors.DtypeError, "normalize must be a bool"),
    ],
)
def test_arguments_of_a_sketch_are_named(options, error, match):
    with pytest.raises(error, match=match):
        whence.Sketch(dim=16, **options)


def test_rows_wider_than_a_store_holds_are_refused_before_recording(tmp_path):
    with pytest.raises(errors.WhenceError, match=f"{MAX_DIM}"):
        whence.record(mlp(), tmp_path / "s", layout="per_layer", dim=MAX_DIM // 2 + 1)


# --- columns per layer ----------------------------------------------------------------------------


class Tied(nn.Module):
    """The head's weight is the table's; its bias is its own."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.head = nn.Linear(4, 7)
        self.head.weight = self.embed.weight

    def forward(self, x):
        return self.head(self.embed(x))


@pytest.mark.parametrize("weight_gradients", [True, False])
@pytest.mark.parametrize("positions", [3, 9])
def test_a_bias_stays_in_its_layers_columns_where_the_weight_is_another_layers(
    tmp_path, weight_gradients, positions
):
    model, x = Tied(), torch.randint(0, 7, (5, positions))
    sketch = whence.Sketch(dim=DIM, layout="per_layer")
    exact = sketch(per_sample_gradients(model, squares, x))
    assert exact.shape == (5, 2 * DIM)
    options = {"sketch": sketch, "dtype": "float32", "weight_gradients": weight_gradients}
    with whence.record(model, tmp_path / "s", **options) as rec:
        for first in (0, 5, 10):
            with rec.batch(range(first, first + 5)) as done:
                squares(model, x).backward()
            assert close(done.rows, exact)
    hits = whence.query(model, tmp_path / "s", lambda: squares(model, x), k=5)
    best = np.sort(np.tile(exact @ exact.T.astype(np.float64), 3), axis=1)[:, ::-1][:, :5]
    assert close(hits.helpful.scores, best, 1e-5)


def test_chosen_layers_alone_have_columns(tmp_path):
    model, x = mlp(), torch.randn(4, 6)
    options = {"layout": "per_layer", "dim": DIM, "dtype": "float32", "layers": "2"}
    with whence.record(model, tmp_path / "s", **options) as rec, rec.batch(range(4)):
        squares(model, x).backward()
    store = whence.open(tmp_path / "s")
    gradients = per_sample_gradients(model, squares, x)
    chosen = {name: each for name, each in gradients.items() if name.startswith("2.")}
    assert store.manifest.sketch["layers"] == ["2"]
    assert close(store.rows(), whence.Sketch(dim=DIM)(chosen))


def test_a_model_that_is_one_layer_has_its_columns(tmp_path):
    model, x = nn.Linear(6, 3), torch.randn(4, 6)
    options = {"layout": "per_layer", "dim": DIM, "dtype": "float32"}
    with whence.record(model, tmp_path / "s", **options) as rec, rec.batch(range(4)):
        squares(model, x).backward()
    exact = whence.Sketch(dim=DIM)(per_sample_gradients(model, squares, x))
    assert close(whence.open(tmp_path / "s").rows(), exact)


@pytest.mark.parametrize("layout", ["global", "per_layer"])
def test_recorded_twice_is_skipped_with_rows_of_the_right_width(tmp_path, layout):
    model = mlp()
    with whence.record(model, tmp_path / "s", dim=8, layout=layout, on_duplicate="skip") as rec:
        for _ in range(2):
            with rec.batch([1, 2]) as done:
                squares(model, torch.randn(2, 6)).backward()
    assert done.rows.shape == (0, 8 if layout == "global" else 16)


# --- normalized rows ------------------------------------------------------------------------------


def test_normalized_rows_have_norm_1_and_zeros_stay_zeros(tmp_path):
    model, x = mlp(), torch.randn(5, 6)
    share = torch.tensor([1.0, 0.0, 1e-12, 1e12, 1.0])

    def loss(model, x, share):
        return (squares_of_each(model, x) * share).mean()

    options = {"sketch": whence.Sketch(dim=DIM, normalize=True), "dtype": "float32"}
    with whence.record(model, tmp_path / "s", **options) as rec, rec.batch(range(5)):
        loss(model, x, share).backward()
    store = whence.open(tmp_path / "s")
    assert np.allclose(store.norms(), [1, 0, 1, 1, 1], rtol=1e-6)
    assert np.allclose(store.self_influence(), [1, 0, 1, 1, 1], rtol=1e-6)
    plain = whence.Sketch(dim=DIM)(per_sample_gradients(model, squares, x))
    exact = plain / np.linalg.norm(plain, axis=1, keepdims=True)
    assert close(store.rows()[[0, 2, 3, 4]], exact[[0, 2, 3, 4]])


def test_scores_of_normalized_rows_say_that_they_are_cosines(tmp_path):
    fill(tmp_path / "s", sketch=whence.Sketch(dim=16, normalize=True))
    store = whence.open(tmp_path / "s")
    hits = store.search(store.rows(), k=2)
    assert np.allclose(hits.helpful.scores, 1, rtol=1e-3)
    assert "cosine" in hits.unit


@pytest.mark.parametrize("name", ["per layer", "normalized", "kinds", "all"])
def test_verify_agrees_and_finds_a_wrong_reduction(tmp_path, known, name):
    model, x, _ = known
    with whence.record(model, tmp_path / "a", sketch=sketch_of(name)) as rec:
        found = rec.verify(lambda x: squares(model, x), (x,))
        assert found.gradient < 1e-5
        assert found.batch < 1e-5
    with (
        whence.record(model, tmp_path / "b", sketch=sketch_of(name), reduction="sum") as rec,
        pytest.raises(errors.LayerError, match="reduction must fit the loss, got 'sum'"),
    ):
        rec.verify(lambda x: squares(model, x), (x,))


@pytest.mark.parametrize("options", [{}, {"layout": "factored"}], ids=["sketched", "factored"])
def test_verify_does_not_agree_on_what_is_not_a_number(tmp_path, options):
    model, x = mlp(), torch.full((2, 6), float("nan"))
    with (
        whence.record(model, tmp_path / "s", **options) as rec,
        pytest.raises(errors.WhenceError),
    ):
        rec.verify(lambda x: squares(model, x), (x,))
