"""`whence.estimate`: what it foretells is what a recording takes, and it leaves nothing behind."""

import random
import re
import sys

import estimates as trial
import numpy as np
import pytest
import torch
from filled import random_rows
from torch import nn

import whence
from whence import errors
from whence.gradients import estimates
from whence.gradients.memory import Held
from whence.gradients.recorder import is_compared
from whence.store import writer

loss_fn = nn.CrossEntropyLoss()
WORDS = [f"document-{number}" for number in range(90)]
TEXTS = ["short", "a longer text than that", "größer"] * 30


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    """A pass of each kind is enough, and models of this size only wait for threads."""
    monkeypatch.setattr(estimates, "PASS_SECONDS", 0.0)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def model_of(features=6, classes=3):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(features, 5), nn.Tanh(), nn.Linear(5, classes))


def data(count=90):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, 6, generator=generator), torch.arange(count) % 3


def recorded(path, model, *, ids=None, columns=None, checkpoints=1, size=10, **settings):
    """Records all data at each checkpoint, and says how many bytes the files have."""
    x, y = data()
    ids = list(range(len(x))) if ids is None else ids
    with whence.record(model, path, **settings) as rec:
        for number in range(checkpoints):
            rec.checkpoint(f"{number}")
            for i in range(0, len(x), size):
                given = {name: values[i : i + size] for name, values in (columns or {}).items()}
                with rec.batch(ids[i : i + size], **given):
                    loss_fn(model(x[i : i + size]), y[i : i + size]).backward()
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def foretold(model, **settings):
    checkpoints = settings.get("checkpoints", 1)
    return whence.estimate(model, 90 * checkpoints, **settings)


def with_batch(model, count=10):
    x, y = data(count)
    return {"closure": lambda x, y: loss_fn(model(x), y), "batch": (x, y)}


SETTINGS = {
    **{dtype: {"dim": 64, "dtype": dtype} for dtype in ("float32", "float16")},
    **{dtype: {"dim": 65, "dtype": dtype} for dtype in ("int8", "int4", "int2", "int1")},
    "texts": {"dim": 64, "ids": WORDS, "columns": {"text": TEXTS}},
    "columns": {
        "dim": 64,
        "columns": {"label": [1, 2] * 45, "loss": [0.5] * 90, "good": [True, False] * 45},
    },
    "checkpoints": {"dim": 64, "checkpoints": 4},
    "parts": {"dim": 16, "layout": "per_layer"},
    "factors": {"layout": "factored", "dtype": "float32"},
    "some layers": {"dim": 64, "layers": ["2"]},
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_the_disk_is_that_of_a_recorded_store(tmp_path, settings):
    disk = recorded(tmp_path / "store", model_of(), **settings)
    assert foretold(model_of(), **settings).disk == pytest.approx(disk, rel=0.01)


def test_the_disk_of_preconditioned_rows_has_their_maps(tmp_path):
    model, (x, y) = model_of(), data()
    loader = [(x[:45], y[:45]), (x[45:], y[45:])]
    factors = whence.fit_factors(
        model, loader, lambda x, y: loss_fn(model(x), y), labels="empirical", progress=False
    )
    settings = {"precondition": factors, "dim": 8, "dtype": "int4"}
    disk = recorded(tmp_path / "store", model, **settings)
    assert foretold(model, **settings).disk == pytest.approx(disk, rel=0.01)
    maps = sum(file.stat().st_size for file in (tmp_path / "store").rglob("map-*/*"))
    assert maps > 0.1 * disk


def test_the_disk_of_more_than_is_tried_lies_on_a_straight_line(tmp_path, monkeypatch):
    monkeypatch.setattr(estimates, "EXAMPLES", 16)
    monkeypatch.setattr(estimates, "CHECKPOINTS", 3)
    settings = {"dim": 512, "checkpoints": 6, "ids": WORDS, "columns": {"text": TEXTS}}
    disk = recorded(tmp_path / "store", model_of(), **settings)
    assert foretold(model_of(), **settings).disk == pytest.approx(disk, rel=0.03)


def test_rows_are_committed_as_often_as_the_writer_does(tmp_path, monkeypatch):
    # 20 rows of 1,024 bytes, of 90: five commits.
    for module in (writer, estimates):
        monkeypatch.setattr(module, "SHARD_BYTES", 20 * 1024)
    disk = recorded(tmp_path / "store", model_of(), dim=512)
    assert len(list((tmp_path / "store").glob("shard-*"))) == 5
    found = foretold(model_of(), dim=512)
    assert found["write"].what == "files, in 5 commits"
    assert found.disk == pytest.approx(disk, rel=0.01)
    assert found["write"].ram < 40 * 1024


def test_what_is_held_is_that_of_tensors_and_arrays():
    # 4 MB and 8 MB at once, then 4 MB, then 4 MB and 2 MB of an array.
    with Held() as held:
        one = torch.ones(1_000_000)
        two = torch.ones(1_000_000, dtype=torch.float64)
        view = one.view(1000, 1000).T
        del two, one
        array = np.ones(250_000)
    assert held.most == pytest.approx(12e6, rel=0.01)
    del view, array
    given = torch.ones(1_000_000)
    with Held() as held:
        given.mul_(2)
        array = np.ones(1_000_000)
        result = given + 1
    assert held.most == pytest.approx(8e6 + 4e6, rel=0.01)
    assert len(array) == len(result)


def test_what_passes_hold_is_what_their_layers_and_rows_are():
    model = nn.Sequential(nn.Linear(6, 1000), nn.ReLU(), nn.Linear(1000, 3))
    found = foretold(model, dim=4096, **with_batch(model, 80))
    # What ReLU gives, and its gradient; with room for that before it, and for all weights'.
    assert 2 * 80 * 1000 * 4 < found["train"].ram < 4 * 80 * 1000 * 4
    # Sums in float64, of all and of each parameter, and rows in float32; with some room.
    assert 80 * 4096 * (5 * 8 + 4) < found["sketch"].ram < 1.2 * 80 * 4096 * (5 * 8 + 4)


@pytest.mark.skipif(sys.platform != "linux", reason="peaks are set back on Linux alone")
def test_disk_and_ram_of_the_demo_are_within_20_percent():
    outcome = trial.run(0, seed=0)
    assert outcome.reached, str(outcome)
    assert len(outcome.counts) == 4
    assert outcome.counts["of disk 1.00"] == 1


def test_passes_are_not_known_without_a_batch():
    found = foretold(model_of(), dim=64)
    assert [stage.name for stage in found.stages] == ["train", "sketch", "write", "search"]
    for name in ("train", "sketch"):
        assert (found[name].seconds, found[name].ram) == (None, None)
    assert found["write"].seconds > 0
    assert found["search"].seconds > 0
    assert found.seconds is None
    assert "what passes take is known with closure= and batch=" in str(found)


def test_with_a_batch_everything_is_known_and_added_up():
    model = model_of()
    found = foretold(model, dim=64, **with_batch(model))
    seconds, ram, disk = zip(*((s.seconds, s.ram, s.disk) for s in found.stages), strict=True)
    assert found.seconds == sum(seconds)
    assert found.disk == sum(disk) == disk[2]
    assert found.ram == max(sum(ram[:3]), ram[3])
    assert "not known" not in str(found)


def test_a_recorded_pass_takes_what_its_kinds_take():
    took = estimates._Passes(10, 1.0, 2.0, 3.0, 0.0, 0, 0)
    for batches in range(1, 70):
        expected = sum(3 if number in (1, 2, 4, 8, 16, 32, 64) else 2 for number in range(1, 70))
        expected -= sum(3 if is_compared(number) else 2 for number in range(batches + 1, 70))
        assert took.recorded(batches) == expected


def test_seconds_are_those_of_all_passes_commits_and_digests(monkeypatch):
    def seconds(work, devices=()):
        work()
        return 1.0

    monkeypatch.setattr(estimates, "_seconds", seconds)
    model = model_of()
    found = whence.estimate(model, 270, 64, checkpoints=3, **with_batch(model))
    assert found["train"].seconds == 27  # batches of ten
    # A recorded pass takes one second, all of it in the writer; there are two digests a checkpoint.
    assert found["sketch"].seconds == 3 * 2 - 27
    # At each checkpoint its beginning, nine batches and the commit.
    assert found["write"].seconds == pytest.approx(3 * (1 + 9 + 1))
    assert found["search"].seconds == pytest.approx(1)
    monkeypatch.setattr(estimates, "EXAMPLES", 30)
    line = whence.estimate(model, 270, 64, checkpoints=3, **with_batch(model))
    assert line["write"].seconds == pytest.approx(3 * (1 + (1 + 2 * 89 / 29) + 1))


@pytest.mark.parametrize(
    "settings",
    [
        {"dtype": "int1", "dim": 64},
        {"layout": "factored"},
        {"layout": "per_layer", "dim": 16},
        {"sketch": whence.Sketch("srht", dim=64)},
        {"reduction": "sum", "dim": 64},
        {"reduction": "token_mean", "dim": 64, "tokens": [1] * 10},
        {"weight_gradients": False, "dim": 64},
        {"ids": ["a", "b"], "columns": {"label": [1], "text": ["x", "y"]}, "dim": 64},
        {"checkpoints": 3, "dim": 64, "queries": 5},
    ],
)
def test_every_setting_of_record_is_measured(settings):
    model = model_of()
    model[0].bias.requires_grad_(False)
    found = foretold(model, **settings, **with_batch(model))
    assert found["train"].seconds > 0
    assert found["sketch"].ram > 0


class Odd(nn.Module):
    """Draws numbers everywhere, counts its calls, and stands in training mode."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(6, 3)
        self.dropout = nn.Dropout(0.5)
        self.register_buffer("calls", torch.zeros(3))

    def forward(self, x):
        self.calls += 1 + random.random() + np.random.random()  # noqa: NPY002
        return self.linear(self.dropout(x))


def state_of(model):
    """All that a model and the random generators hold."""
    return [
        {name: value.clone() for name, value in model.state_dict().items()},
        {name: parameter.grad for name, parameter in model.named_parameters()},
        [module.training for module in model.modules()],
        [parameter._version for parameter in model.parameters()],
        [len(parameter._backward_hooks or ()) for parameter in model.parameters()],
        [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()],
        torch.get_rng_state(),
        random.getstate(),
        str(np.random.get_state()),  # noqa: NPY002
    ]


def same(one, other):
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    return one == other


@pytest.mark.parametrize("fails", [False, True])
def test_nothing_is_left_behind(tmp_path, monkeypatch, fails):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    model, (x, y) = Odd(), data(10)
    loss_fn(model(x), y).backward()
    gradient = model.linear.weight.grad
    values = gradient.clone()
    calls = 0

    def closure(x, y):
        nonlocal calls
        calls += 1
        if fails and calls == 3:
            raise RuntimeError("no third pass")
        return loss_fn(model(x), y)

    before = state_of(model)
    if fails:
        with pytest.raises(RuntimeError, match="no third pass"):
            whence.estimate(model, 100, 64, closure=closure, batch=(x, y))
    else:
        whence.estimate(model, 100, 64, closure=closure, batch=(x, y))
    assert calls >= 3
    assert all(same(*each) for each in zip(before, state_of(model), strict=True))
    assert model.linear.weight.grad is gradient
    assert torch.equal(gradient, values)
    assert list(tmp_path.iterdir()) == []


def test_the_store_itself_is_not_made(tmp_path, monkeypatch):
    seen = []
    small = estimates._small_store

    def watched(*args):
        seen.append(args[-2])
        return small(*args)

    monkeypatch.setattr(estimates, "_small_store", watched)
    whence.estimate(model_of(), 10, 16, path=tmp_path / "runs" / "store")
    assert {path.parent.parent for path in seen} == {tmp_path}
    assert list(tmp_path.iterdir()) == []


def test_a_recording_goes_on_after_an_estimate(tmp_path):
    model, (x, y) = model_of(), data(10)
    with whence.record(model, tmp_path / "store", dim=64) as rec:
        with rec.batch(range(5)):
            loss_fn(model(x[:5]), y[:5]).backward()
        whence.estimate(model, 100, 64, **with_batch(model))
        with rec.batch(range(5, 10)):
            loss_fn(model(x[5:]), y[5:]).backward()
    assert len(whence.open(tmp_path / "store")) == 10


def test_a_trace_of_memory_that_runs_goes_on():
    import tracemalloc

    tracemalloc.start()
    try:
        foretold(model_of(), dim=16)
        assert tracemalloc.is_tracing()
    finally:
        tracemalloc.stop()
    foretold(model_of(), dim=16)
    assert not tracemalloc.is_tracing()


def test_the_table_has_a_line_for_each_stage():
    model = model_of()
    text = str(whence.estimate(model, 6000, 64, checkpoints=2, **with_batch(model)))
    lines = text.splitlines()
    assert lines[0] == "6,000 rows of 64 float16 values, 2 checkpoints"
    assert [line.split()[0] for line in lines[1:]] == [
        "stage",
        "train",
        "sketch",
        "write",
        "search",
        "all",
    ]
    assert text.isascii()


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "not known"),
        (0, "0 B"),
        (1023, "1,023 B"),
        (1536, "1.5 KiB"),
        (3 << 20, "3.0 MiB"),
        (5 << 40, "5.0 TiB"),
        (5000 << 40, "5,000.0 TiB"),
        (-2048, "-2.0 KiB"),
    ],
)
def test_bytes_are_written_for_people(value, text):
    assert estimates._size(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "not known"),
        (0.0123, "12.3 ms"),
        (-0.0123, "-12.3 ms"),
        (12.34, "12.3 s"),
        (600, "10.0 min"),
        (36_000_000, "10,000.0 h"),
    ],
)
def test_seconds_are_written_for_people(value, text):
    assert estimates._duration(value) == text


def wrong(**settings):
    model = model_of()
    given = {"rows": 10, "dim": 16, **settings}
    if given.pop("passes", False):
        given = {**with_batch(model), **given}
    return lambda: whence.estimate(model, **given)


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (wrong(rows=0), errors.ArgumentError, "rows must be at least 1, got 0"),
        (wrong(rows=1.5), errors.DtypeError, "rows must be an integer, got float 1.5"),
        (wrong(checkpoints=11), errors.ArgumentError, "checkpoints must be from 1 to 10, got 11"),
        (wrong(queries=0), errors.ArgumentError, "queries must be at least 1, got 0"),
        (wrong(dtype="int3"), errors.ArgumentError, "dtype must be one of"),
        (wrong(dim=0), errors.ArgumentError, "dim must be from 1 to"),
        (
            wrong(closure=print),
            errors.ArgumentError,
            "batch must be given with closure, got None",
        ),
        (wrong(batch=()), errors.ArgumentError, "closure must be given with batch, got None"),
        (wrong(tokens=[1]), errors.ArgumentError, "tokens must be None without closure and batch"),
        (
            wrong(passes=True, closure=3),
            errors.DtypeError,
            "closure must be a function of the batch, got int 3",
        ),
        (
            wrong(passes=True, batch=(3,)),
            errors.ArgumentError,
            "batch must hold tensors of at least one example, got none",
        ),
        (
            wrong(passes=True, closure=lambda x, y: x),
            errors.DtypeError,
            "closure must return the loss, a tensor without dimensions, got",
        ),
        (
            wrong(passes=True, reduction="token_mean"),
            errors.ArgumentError,
            "tokens must be",
        ),
        (wrong(ids=[1, 1]), errors.IdError, "ids must be distinct, got 1 twice"),
        (wrong(columns=[1]), errors.DtypeError, "columns must be a dict of name to values, got"),
        (
            wrong(columns={"tokens": [1]}),
            errors.ArgumentError,
            "columns must be named by a str of their own, got 'tokens'",
        ),
        (
            wrong(columns={1: [1]}),
            errors.ArgumentError,
            "columns must be named by a str of their own, got 1",
        ),
        (
            wrong(columns={"label": []}),
            errors.ArgumentError,
            "columns['label'] must have a value, got none",
        ),
        (wrong(path=3), errors.DtypeError, "path must be a path, got int 3"),
        (
            wrong(layout="factored"),
            errors.ArgumentError,
            "dim must be None for layout='factored'",
        ),
    ],
)
def test_wrong_arguments_are_named(call, error, text):
    with pytest.raises(error, match="^" + re.escape(text)):
        call()


def test_a_closure_that_trains_is_refused():
    model, (x, y) = model_of(), data(10)

    def closure(x, y):
        with torch.no_grad():
            model[0].bias.add_(1)
        return loss_fn(model(x), y)

    with pytest.raises(errors.WeightsError, match=r"^closure must leave the weights as they are"):
        whence.estimate(model, 10, 16, closure=closure, batch=(x, y))


def test_a_model_that_cannot_be_recorded_is_refused_as_record_does():
    with pytest.raises(errors.DtypeError, match=r"^model must be an nn.Module"):
        whence.estimate(random_rows(3), 10)
    model = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 3))
    with pytest.raises(errors.LayerError, match="must be in evaluation mode"):
        whence.estimate(model, 10, 16, **with_batch(model))


def test_what_fails_in_the_closure_is_not_renamed():
    def closure(x, y):
        raise FileNotFoundError("data.bin")

    x, y = data(10)
    with pytest.raises(FileNotFoundError, match=r"data\.bin"):
        whence.estimate(model_of(), 10, 16, closure=closure, batch=(x, y))


def test_a_folder_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    def refused(*_, **__):
        raise PermissionError(13, "Permission denied", str(tmp_path))

    monkeypatch.setattr("tempfile.mkdtemp", refused)
    with pytest.raises(errors.StoreError, match="Permission denied"):
        whence.estimate(model_of(), 10, 16, path=tmp_path / "store")


def test_a_tensor_is_a_batch_of_one_argument():
    model, (x, _) = model_of(), data(10)
    found = foretold(model, closure=lambda x: model(x).mean(), batch=x)
    assert found["train"].seconds > 0
