"""Recording: coverage, bad input, resume, checkpoints, weights."""

import contextlib
import copy
import dataclasses
import os
import random
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from oracle import per_sample_gradients
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

import whence
from whence import errors

DIM = 64


def model_of(features=6, classes=3):
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(features, 5), nn.Tanh(), nn.Linear(5, classes))


def data(count=12, features=6, classes=3):
    torch.manual_seed(2)
    return torch.randn(count, features), torch.randint(0, classes, (count,))


def record(model, path, **options):
    return whence.record(model, path, dim=DIM, **options)


def fill(rec, model, x, y, size=4, start=0, offset=0, **columns):
    for first in range(start, len(x), size):
        part = slice(first, first + size)
        ids = [offset + i for i in range(first, min(first + size, len(x)))]
        with rec.batch(ids, label=y[part], **columns):
            F.cross_entropy(model(x[part]), y[part]).backward()


def exact_rows(model, x, y):
    gradients = per_sample_gradients(model, lambda m, x, y: F.cross_entropy(m(x), y), x, y)
    return whence.Sketch(dim=DIM)(gradients)


def close(found, expected, tolerance=1e-3):
    return np.linalg.norm(found - expected) <= tolerance * np.linalg.norm(expected)


# --- hooks and gradients leave no trace ---------------------------------------------------------


def test_inputs_are_let_go_as_the_backward_pass_goes_on(tmp_path):
    hidden, gone = [], []

    class Watched(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(6, 5), nn.Linear(5, 3)

        def forward(self, x):
            values = self.first(x)
            values.register_hook(lambda _: gone.append(hidden[-1].expired()))
            values = values.tanh()
            hidden.append(StorageWeakRef(values.untyped_storage()))
            return self.second(values)

    model, (x, y) = Watched(), data()
    with record(model, tmp_path / "s", weight_gradients=False) as rec:
        for first in (0, 4, 8):  # the third batch is the first that is not compared
            part = slice(first, first + 4)
            with rec.batch(range(first, first + 4)):
                F.cross_entropy(model(x[part]), y[part]).backward()
    assert gone[2]


def test_a_graph_that_is_kept_counts_twice(tmp_path):
    model, (x, y) = model_of(), data()
    with record(model, tmp_path / "s", weight_gradients=False) as rec:
        fill(rec, model, x[:8], y[:8])
        with rec.batch(range(100, 104), label=y[:4]) as batch:
            loss = F.cross_entropy(model(x[:4]), y[:4])
            loss.backward(retain_graph=True)
            loss.backward()
    assert close(batch.rows, 2 * exact_rows(model, x[:4], y[:4]))


def test_a_graph_that_is_let_go_is_not_counted_twice(tmp_path):
    model = nn.Embedding(7, 3)
    with record(model, tmp_path / "s", weight_gradients=False) as rec:
        for first in (0, 4):
            with rec.batch(range(first, first + 4)):
                model(torch.tensor([3, 1, 2, 0])).mean().backward()
        with contextlib.suppress(errors.LayerError), rec.batch(range(8, 12)):
            # Without the recording, autograd has saved the indices, and refuses the second.
            loss = model(torch.tensor([3, 1, 2, 0])).mean()
            loss.backward()
            with pytest.raises(errors.LayerError, match="retain_graph=True"):
                loss.backward()
    assert len(whence.open(tmp_path / "s")) == 8


@pytest.mark.parametrize("weight_gradients", [False, True])
def test_two_losses_may_share_a_layer_of_which_autograd_saves_nothing(tmp_path, weight_gradients):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(6, 5), nn.Linear(5, 3)
            self.first.weight.requires_grad_(False)

        def forward(self, x, y):
            hidden = self.first(x)
            return hidden.square().sum(1).mean(), F.cross_entropy(self.second(hidden), y)

    model, (x, y) = Model(), data()
    with record(model, tmp_path / "s", weight_gradients=weight_gradients) as rec:
        for first in (0, 4, 8):
            part = slice(first, first + 4)
            with rec.batch(range(first, first + 4)) as batch:
                for loss in model(x[part], y[part]):
                    loss.backward()
    exact = per_sample_gradients(model, lambda m, x, y: sum(m(x, y)), x[8:], y[8:])
    assert close(batch.rows, whence.Sketch(dim=DIM)(exact))


def test_ids_that_wait_cannot_be_changed(tmp_path):
    model, (x, y) = model_of(), data()
    with record(model, tmp_path / "s") as rec:
        ids = np.arange(4)
        with rec.batch(ids) as batch:
            F.cross_entropy(model(x[:4]), y[:4]).backward()
        ids[:] = 9
        for array in (batch.ids, batch.stored):
            with pytest.raises(ValueError, match="read-only"):
                array[0] = 9
    assert whence.open(tmp_path / "s").ids.tolist() == [0, 1, 2, 3]


def hook_counts(model):
    return [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()] + [
        len(p._backward_hooks or ()) for p in model.parameters()
    ]


def test_hooks_are_removed_on_exit_and_on_an_exception(tmp_path):
    model, (x, y) = model_of(), data()
    before = hook_counts(model)
    with record(model, tmp_path / "a") as rec:
        fill(rec, model, x, y)
        assert hook_counts(model) != before
    assert hook_counts(model) == before
    with pytest.raises(ZeroDivisionError), record(model, tmp_path / "b") as rec, rec.batch([1]):
        raise ZeroDivisionError
    assert hook_counts(model) == before
    assert len(whence.open(tmp_path / "b")) == 0


def test_weight_gradients_are_those_of_plain_training(tmp_path):
    model, (x, y) = model_of(), data()
    F.cross_entropy(model(x), y).backward()
    plain = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    with record(model, tmp_path / "s") as rec, rec.batch(list(range(12))):
        F.cross_entropy(model(x), y).backward()
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), plain, strict=True))


def test_without_weight_gradients_grad_is_untouched(tmp_path):
    model, (x, y) = model_of(), data()
    marks = [torch.full_like(p, 7.0) for p in model.parameters()]
    for parameter, mark in zip(model.parameters(), marks, strict=True):
        parameter.grad = mark
    with record(model, tmp_path / "s", weight_gradients=False) as rec:
        fill(rec, model, x, y)
    assert all(p.grad is mark for p, mark in zip(model.parameters(), marks, strict=True))
    assert all((mark == 7).all() for mark in marks)
    assert all(p.requires_grad for p in model.parameters())


def test_the_rows_are_the_same_with_and_without_weight_gradients(tmp_path):
    model, (x, y) = model_of(), data()
    for name, on in (("with", True), ("without", False)):
        with record(model, tmp_path / name, weight_gradients=on, dtype="float32") as rec:
            fill(rec, model, x, y)
    rows = [whence.open(tmp_path / name).rows() for name in ("with", "without")]
    assert np.array_equal(*rows)


def test_float16_rows_are_within_their_stated_error(tmp_path):
    model, (x, y) = model_of(), data()
    with record(model, tmp_path / "s") as rec:
        fill(rec, model, x, y)
    rows, exact = whence.open(tmp_path / "s").rows(), exact_rows(model, x, y)
    errors_ = np.linalg.norm(rows - exact, axis=1) / np.linalg.norm(exact, axis=1)
    assert errors_.max() < 2**-11


# --- coverage -----------------------------------------------------------------------------------


class Loose(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(6, 3)
        self.gain = nn.Parameter(torch.ones(3))

    def forward(self, x):
        return self.inner(x) * self.gain


@pytest.mark.parametrize("weight_gradients", [True, False])
def test_a_parameter_without_a_rule_is_named_and_nothing_is_stored(tmp_path, weight_gradients):
    model, (x, y) = Loose(), data()
    with (
        record(model, tmp_path / "s", weight_gradients=weight_gradients) as rec,
        pytest.raises(errors.CoverageError, match=r"got gain without one"),
    ):
        fill(rec, model, x, y)
    assert len(whence.open(tmp_path / "s")) == 0
    if not weight_gradients:
        assert model.gain.grad is None


def test_skip_leaves_it_out_and_coverage_says_so(tmp_path):
    model, (x, y) = Loose(), data()
    with record(model, tmp_path / "s", uncovered="skip") as rec:
        fill(rec, model, x, y)
        found = rec.coverage()
    assert (found.recorded, found.total, found.uncovered) == (21, 24, ["gain"])
    assert found.share == 21 / 24
    gradients = per_sample_gradients(model, lambda m, x, y: F.cross_entropy(m(x), y), x, y)
    del gradients["gain"]
    rows = whence.open(tmp_path / "s").rows()
    assert close(rows, whence.Sketch(dim=DIM)(gradients))


@pytest.mark.parametrize("weight_gradients", [True, False])
def test_a_weight_tied_by_hand_is_found_out(tmp_path, weight_gradients):
    class ByHand(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(9, 4)

        def forward(self, x):
            return F.linear(self.table(x), self.table.weight)

    model, x = ByHand(), torch.randint(0, 9, (4, 5))
    with (
        record(model, tmp_path / "s", weight_gradients=weight_gradients) as rec,
        pytest.raises(errors.CoverageError, match=r"add up .* got a difference in table\.weight"),
        rec.batch([0, 1, 2, 3]),
    ):
        F.cross_entropy(model(x).flatten(0, 1), x.flatten()).backward()


def test_a_subclass_with_another_forward_has_no_rule(tmp_path):
    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    model, (x, y) = Doubled(6, 3), data()
    with (
        record(model, tmp_path / "s") as rec,
        pytest.raises(errors.CoverageError, match="bias, weight"),
    ):
        fill(rec, model, x, y)


def test_layers_are_chosen_by_pattern(tmp_path):
    model, (x, y) = model_of(), data()
    with record(model, tmp_path / "s", layers="2") as rec:
        fill(rec, model, x, y)
    gradients = per_sample_gradients(model, lambda m, x, y: F.cross_entropy(m(x), y), x, y)
    chosen = {name: value for name, value in gradients.items() if name.startswith("2.")}
    assert close(whence.open(tmp_path / "s").rows(), whence.Sketch(dim=DIM)(chosen))
    with pytest.raises(errors.ArgumentError, match=r"layers must each match .* got \['head'\]"):
        record(model, tmp_path / "t", layers=["head"])


# --- the batch dimension ------------------------------------------------------------------------


def test_dimension_0_must_be_the_batch(tmp_path):
    model, (x, y) = model_of(), data()
    with (
        record(model, tmp_path / "s") as rec,
        pytest.raises(errors.LayerError, match=r"dimension 0 must be the batch of 3 .* \[12, 5\]"),
        rec.batch([1, 2, 3]),
    ):
        F.cross_entropy(model(x), y).backward()


def test_attention_with_the_batch_in_dimension_1_is_refused(tmp_path):
    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2)

        def forward(self, x):
            return self.attention(x, x, x)[0]

    model = Wrapped()
    with (
        record(model, tmp_path / "s") as rec,
        pytest.raises(errors.LayerError, match="attention must have batch_first=True"),
        rec.batch([1, 2, 3]),
    ):
        model(torch.randn(3, 5, 8)).sum().backward()
    assert F.linear is torch._C._nn.linear


class Positions(nn.Module):
    def __init__(self):
        super().__init__()
        self.token, self.position = nn.Embedding(7, 4), nn.Embedding(9, 4)

    def forward(self, x):
        return (self.token(x) + self.position(torch.arange(x.shape[1]))).sin()


def test_as_many_positions_as_examples_must_be_told_apart(tmp_path):
    x = torch.randint(0, 7, (5, 5))
    model = Positions()
    with (
        record(model, tmp_path / "s") as rec,
        pytest.raises(errors.LayerError, match=r"unbatched=\['position'\]"),
        rec.batch(list(range(5))),
    ):
        model(x).sum().backward()

    def loss(model, x):
        return model(x).sum((1, 2)).square().mean()

    with (
        record(model, tmp_path / "t", unbatched=["position"]) as rec,
        rec.batch(list(range(5))) as done,
    ):
        loss(model, x).backward()
    exact = whence.Sketch(dim=DIM)(per_sample_gradients(model, loss, x))
    assert close(done.rows, exact, 1e-5)


def test_a_table_of_one_index_per_example_is_a_batch(tmp_path):
    class Users(nn.Module):
        def __init__(self):
            super().__init__()
            self.user = nn.Embedding(9, 4)

        def forward(self, x):
            return self.user(x).sin()

    model, x = Users(), torch.tensor([3, 1, 8, 8])

    def loss(model, x):
        return model(x).sum(1).square().mean()

    with record(model, tmp_path / "t") as rec, rec.batch(list(range(4))) as done:
        loss(model, x).backward()
    assert close(done.rows, whence.Sketch(dim=DIM)(per_sample_gradients(model, loss, x)), 1e-5)


def test_batch_norm_in_training_mode_is_refused_with_the_reason(tmp_path):
    model = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))
    x, y = data()
    with (
        record(model, tmp_path / "s") as rec,
        pytest.raises(errors.LayerError, match=r"1 \(BatchNorm1d\) .* mixes the examples"),
    ):
        fill(rec, model, x, y)
    model.eval()
    with record(model, tmp_path / "s") as rec:
        fill(rec, model, x, y)


def test_an_input_changed_in_place_is_found_out(tmp_path):
    model = nn.Linear(6, 3)
    x, y = data()

    def batch_that_goes_on(rec):
        with rec.batch(list(range(100, 112)), label=y):
            loss = F.cross_entropy(model(x), y)
            x.mul_(2)
            with pytest.raises(errors.LayerError, match="must not be changed in place"):
                loss.backward()
            F.cross_entropy(model(x), y).backward()

    with record(model, tmp_path / "s", weight_gradients=False) as rec:
        fill(rec, model, x, y)  # the first batch is checked against autograd
        with pytest.raises(errors.LayerError, match="must not be changed in place"):
            batch_that_goes_on(rec)
    assert whence.open(tmp_path / "s").ids.tolist() == list(range(12))


def test_a_batch_without_backward_is_an_error(tmp_path):
    model, (x, _) = model_of(), data()
    with record(model, tmp_path / "s") as rec:
        with pytest.raises(errors.LayerError, match="backward"), rec.batch(list(range(12))):
            model(x)
        with pytest.raises(errors.LayerError, match="backward"), rec.batch([1]), torch.no_grad():
            model(x[:1])


# --- the forward pass stays as it is -------------------------------------------------------------


class Plain(nn.Module):
    """A model whose forward is any function of it."""

    def __init__(self, forward):
        super().__init__()
        self.table, self.position = nn.Embedding(7, 8), nn.Embedding(9, 8)
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 3)
        self.register_buffer("shared", torch.randn(1, 8))
        self.run = forward

    def forward(self, x):
        return self.run(self, x)


UNBATCHED = {
    "a shared vector": lambda m, x: m.b(x + m.a(m.shared).sum(0)),
    "one added dimension": lambda m, x: m.b(m.a(x[None])[0]),
    "a mean over it": lambda m, x: m.b(m.a(x[None]).mean(0)),
    "one example at a time": lambda m, x: m.b(torch.stack([m.a(q[None])[0] for q in x])),
    "a task's embedding": lambda m, x: m.b(m.a(x) + m.table(torch.tensor([3]))),
    "a table of all": lambda m, x: m.b(m.a(x)) @ m.table(torch.arange(7))[:3, :3],
}


@pytest.mark.parametrize("name", UNBATCHED)
def test_what_the_batch_shares_is_refused_by_name(tmp_path, name):
    model, x = Plain(UNBATCHED[name]), torch.randn(5, 8)
    model.position.requires_grad_(False)
    with (
        record(model, tmp_path / "s", uncovered="skip") as rec,
        pytest.raises(errors.LayerError, match=r"dimension 0 must be the batch|positions must be"),
        rec.batch(list(range(5))),
    ):
        F.cross_entropy(model(x), torch.zeros(5, dtype=torch.int64)).backward()
    assert len(whence.open(tmp_path / "s")) == 0


POSITIONS = {
    "unsqueezed": lambda m, x: m.table(x) + m.position(torch.arange(x.shape[1])).unsqueeze(0),
    "changed in place": lambda m, x: m.table(x) + m.position(torch.arange(x.shape[1])).mul_(2),
    "averaged": lambda m, x: m.table(x) + m.position(torch.arange(x.shape[1])).mean(0),
}


@pytest.mark.parametrize("name", POSITIONS)
def test_positions_that_are_not_simply_added_are_refused_by_name(tmp_path, name):
    model = Plain(lambda m, x: m.b(m.a(POSITIONS[name](m, x)).tanh().mean(1)))
    x = torch.randint(0, 7, (5, 6))
    with (
        record(model, tmp_path / "s") as rec,
        pytest.raises(errors.LayerError, match=r"positions must be added .* of position"),
        rec.batch(list(range(5))),
    ):
        F.cross_entropy(model(x), torch.zeros(5, dtype=torch.int64)).backward()


def test_positions_as_one_row_are_recorded(tmp_path):
    def forward(m, x):
        return m.b(m.a(m.table(x) + m.position(torch.arange(x.shape[1])[None])).mean(1))

    model, x, y = Plain(forward), torch.randint(0, 7, (5, 6)), torch.randint(0, 3, (5,))
    with record(model, tmp_path / "s") as rec, rec.batch(list(range(5))) as done:
        F.cross_entropy(model(x), y).backward()
    assert close(done.rows, exact_rows(model, x, y), 1e-5)


class Characters(nn.Module):
    """A model with positions, which `extra` makes odd in one way."""

    def __init__(self, extra=None):
        super().__init__()
        self.token, self.position = nn.Embedding(7, 8), nn.Embedding(9, 8)
        self.inner, self.head = nn.Linear(8, 8), nn.Linear(8, 3)
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.register_buffer("running", torch.zeros(8))
        self.extra = extra

    def forward(self, x):
        if isinstance(x, dict):
            x = x.pop("x")
        h = self.inner(self.token(x) + self.position(torch.arange(x.shape[1]))).tanh()
        if self.extra is not None:
            h = self.extra(self, h)
        return self.head(h).mean(1)


def drop_at_random(model, h):
    return h * 2 if random.random() < 0.5 else h


def drop_by_numpy(model, h):
    return h * float(np.random.rand())  # noqa: NPY002


def dropped(model, h):
    return F.dropout(h, 0.5)


def counted(model, h):
    model.steps += 1
    return h * model.steps


def running(model, h):
    with torch.no_grad():
        model.running.mul_(0.9).add_(h.mean((0, 1)), alpha=0.1)
    return h - model.running


ODD = [drop_at_random, drop_by_numpy, dropped, counted, running]


@pytest.mark.parametrize("extra", ODD, ids=lambda extra: extra.__name__)
def test_running_positions_once_more_leaves_no_trace(tmp_path, extra):
    x, y = torch.randint(0, 7, (5, 6)), torch.randint(0, 3, (5,))

    def train(recorder):
        torch.manual_seed(3)
        random.seed(3)
        np.random.seed(3)  # noqa: NPY002
        model = Characters(extra)
        losses = []
        for step_ in range(3):
            with contextlib.nullcontext() if recorder is None else recorder(model, step_):
                loss = F.cross_entropy(model(x), y)
                loss.backward()
            losses.append(loss.item())
        return losses, model.running.tolist(), torch.rand(1).item(), random.random()

    @contextlib.contextmanager
    def recorded(model, step_):
        with record(model, tmp_path / f"{extra.__name__}{step_}") as rec, rec.batch(range(5)):
            yield

    assert train(None) == train(recorded)


def test_a_batch_that_the_model_takes_apart_is_run_once_more(tmp_path):
    model, x, y = Characters(), torch.randint(0, 7, (5, 6)), torch.randint(0, 3, (5,))
    with record(model, tmp_path / "s") as rec, rec.batch(range(5)) as done:
        F.cross_entropy(model({"x": x}), y).backward()
    assert close(done.rows, exact_rows(model, x, y), 1e-5)


@dataclasses.dataclass
class Answer:
    logits: torch.Tensor


class Averaged(Characters):
    """Positions are averaged, not added, and the answer does not show it."""

    def __init__(self, how):
        super().__init__()
        self.how = how
        if how == "a head of zeros":
            nn.init.zeros_(self.head.weight)
            nn.init.zeros_(self.head.bias)

    def features(self, x):
        return self.inner(self.token(x) + self.position(torch.arange(x.shape[1])).mean(0)).tanh()

    def forward(self, x):
        logits = self.head(self.features(x)).mean(1)
        return Answer(logits) if self.how == "an answer of its own" else logits


@pytest.mark.parametrize("how", ["a head of zeros", "an answer of its own", "never called"])
def test_positions_that_are_not_simply_added_are_found_inside(tmp_path, how):
    model, x = Averaged(how), torch.randint(0, 7, (5, 6))

    def loss():
        if how == "never called":
            return model.head(model.features(x)).square().mean()
        answer = model(x)
        return getattr(answer, "logits", answer).square().mean() + 0 * model.features(x).sum()

    with (
        record(model, tmp_path / "s") as rec,
        pytest.raises(errors.LayerError, match="positions"),
        rec.batch(range(5)),
    ):
        loss().backward()


def test_one_position_is_a_position(tmp_path):
    model, y = Characters(), torch.randint(0, 3, (5,))
    with record(model, tmp_path / "s") as rec:
        for first, length in enumerate((6, 1)):
            x = torch.randint(0, 7, (5, length))
            with rec.batch(range(5 * first, 5 * first + 5)) as done:
                F.cross_entropy(model(x), y).backward()
            assert close(done.rows, exact_rows(model, x, y), 1e-5)


def test_one_index_per_example_may_rise(tmp_path):
    class Users(nn.Module):
        def __init__(self):
            super().__init__()
            self.user = nn.Embedding(50, 4)

        def forward(self, x):
            return self.user(x).sin()

    model = Users()
    with (
        record(model, tmp_path / "a") as rec,
        pytest.raises(errors.LayerError, match=r"unbatched=\['!user'\]"),
        rec.batch(range(4)),
    ):
        model(torch.arange(4)).square().mean().backward()
    with record(model, tmp_path / "b", unbatched=["!user"]) as rec, rec.batch(range(4)):
        model(torch.arange(4)).square().mean().backward()
    with record(model, tmp_path / "c") as rec:
        for first, x in enumerate((torch.tensor([3, 1, 8, 8]), torch.arange(4))):
            with rec.batch(range(4 * first, 4 * first + 4)):
                model(x).square().mean().backward()
    assert len(whence.open(tmp_path / "c")) == 8


# --- copies of the model --------------------------------------------------------------------------


@pytest.mark.parametrize("weight_gradients", [True, False])
def test_a_copy_made_while_recording_is_a_plain_model(tmp_path, weight_gradients):
    model, (x, _) = model_of(), data()
    rows = []
    for made in ("copied", "built"):
        name = tmp_path / made
        with record(model, name, weight_gradients=weight_gradients, dtype="float32") as rec:
            teacher = copy.deepcopy(model) if made == "copied" else model_of()
            teacher.load_state_dict(model.state_dict())
            teacher.requires_grad_(False)
            for first in range(0, 12, 4):
                part = slice(first, first + 4)
                with rec.batch(range(first, first + 4)):
                    (model(x[part]) - teacher(2 * x[part])).square().sum(1).mean().backward()
            torch.save(model, tmp_path / "model.pt")
        rows.append(whence.open(name).rows())
    assert np.array_equal(*rows)
    torch.save(teacher, tmp_path / "teacher.pt")
    loaded = torch.load(tmp_path / "model.pt", weights_only=False)
    assert torch.equal(loaded(x), model(x))


def test_counting_calls_does_not_move_weights(tmp_path):
    model, x, y = Characters(), torch.randint(0, 7, (5, 6)), torch.randint(0, 3, (5,))
    with record(model, tmp_path / "s", weights="fixed") as rec:
        for first in (0, 5):
            model.steps += 1
            with rec.batch(range(first, first + 5)):
                F.cross_entropy(model(x), y).backward()
    assert len(whence.open(tmp_path / "s")) == 10


# --- what only later batches do -------------------------------------------------------------------


def penalty(model, x, y):
    return F.cross_entropy(model(x), y) + 0.1 * model[0].weight.square().sum()


def by_hand(model, x, y):
    return F.cross_entropy(F.linear(torch.tanh(model[0](x)), model[2].weight), y)


@pytest.mark.parametrize("weight_gradients", [True, False])
@pytest.mark.parametrize("loss", [penalty, by_hand])
def test_a_use_outside_the_layer_is_found_in_any_batch(tmp_path, loss, weight_gradients):
    model, (x, y) = model_of(), data()
    with record(model, tmp_path / "s", weight_gradients=weight_gradients) as rec:
        fill(rec, model, x, y)  # three batches: the next is not one of 1, 2, 4, 8
        fill(rec, model, x, y, start=8, offset=100)
        fill(rec, model, x, y, start=8, offset=200)
        with (
            pytest.raises(errors.CoverageError, match="must add up"),
            rec.batch([300, 301, 302, 303], label=y[:4]),
        ):
            loss(model, x[:4], y[:4]).backward()


def attacked(model, x, y):
    x = x.clone().requires_grad_()
    loss = F.cross_entropy(model(x), y)
    x = x + torch.autograd.grad(loss, x)[0].sign()
    return F.cross_entropy(model(x.detach()), y)


def smoothed(model, x, y):
    x = x.clone().requires_grad_()
    loss = F.cross_entropy(model(x), y)
    return loss + torch.autograd.grad(loss, x, create_graph=True)[0].square().sum()


@pytest.mark.parametrize(
    ("loss", "match"),
    [(attacked, r"second gradient .*torch\.autograd\.grad"), (smoothed, "create_graph=True")],
)
def test_a_second_gradient_inside_the_batch_is_found_out(tmp_path, loss, match):
    model, (x, y) = model_of(), data()
    with record(model, tmp_path / "s") as rec:
        fill(rec, model, x, y)
        with (
            pytest.raises(errors.LayerError, match=match),
            rec.batch([100, 101, 102, 103], label=y[:4]),
        ):
            loss(model, x[:4], y[:4]).backward()


def test_a_first_batch_with_nan_is_checked_later(tmp_path):
    model, (x, y) = model_of(), data()
    with record(model, tmp_path / "s", nonfinite="skip", weight_gradients=False) as rec:
        with rec.batch([100, 101], label=y[:2]):
            broken = x[:2].clone()
            broken[0] = float("nan")
            F.cross_entropy(model(broken), y[:2]).backward()
        with (
            pytest.raises(errors.CoverageError, match="must add up"),
            rec.batch([200, 201], label=y[:2]),
        ):
            by_hand(model, x[:2], y[:2]).backward()


def unfreeze(model):
    model[0].weight.requires_grad_(True)


def replace(model):
    model[2] = nn.Linear(5, 3)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (unfreeze, r"0\.weight, which is trainable now"),
        (lambda model: model[2].bias.requires_grad_(False), r"2\.bias, which is frozen now"),
        (replace, r"2\.bias, which is replaced"),
        (lambda model: model.append(nn.Linear(3, 3)), r"3\.bias, which is new"),
    ],
)
def test_a_model_that_changes_while_it_is_recorded_is_named(tmp_path, change, match):
    model, (x, y) = model_of(), data()
    model[0].weight.requires_grad_(False)
    with record(model, tmp_path / "s") as rec:
        fill(rec, model, x[:8], y[:8])
        change(model)
        with pytest.raises(errors.LayerError, match=match):
            fill(rec, model, x, y, start=8)
    assert len(whence.open(tmp_path / "s")) == 8


def test_nothing_is_recorded_queried_or_verified_inside_a_batch(tmp_path):
    model, (x, y) = model_of(), data()

    def loss():
        return F.cross_entropy(model(x), y)

    with record(model, tmp_path / "s") as rec:
        fill(rec, model, x, y)
        rec.commit()
        for inner in (
            lambda: whence.query(model, tmp_path / "s", loss),
            lambda: rec.verify(lambda x, y: F.cross_entropy(model(x), y), (x, y)),
            lambda: rec.batch([1]).__enter__(),
        ):
            with pytest.raises(errors.WhenceError, match="inside"), rec.batch([99], label=[0]):
                inner()
    with record(model, tmp_path / "a") as one, record(model, tmp_path / "b") as other:
        with pytest.raises(errors.WhenceError, match="inside another"), one.batch([1]):
            other.batch([1]).__enter__()
        fill(one, model, x, y)
        fill(other, model, x, y)
    rows = [whence.open(tmp_path / name).rows() for name in "ab"]
    assert np.array_equal(*rows)


def test_attention_in_several_threads_leaves_torch_as_it_was(tmp_path):
    import threading

    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, x):
            return self.attention(x, x, x, need_weights=False)[0]

    original, failures = F.linear, []

    def work(name):
        try:
            model = Attention()
            with record(model, tmp_path / name) as rec:
                for first in range(0, 60, 3):
                    with rec.batch([first, first + 1, first + 2]):
                        model(torch.randn(3, 4, 8)).square().sum((1, 2)).mean().backward()
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(f"t{i}",)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert F.linear is original
    assert all(len(whence.open(tmp_path / f"t{i}")) == 60 for i in range(3))


def test_a_residual_added_in_place_to_attention(tmp_path):
    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, x):
            out = self.attention(x, x, x)[0]
            out += x
            return out

    def loss(model, x):
        return model(x).pow(3).sum((1, 2)).mean()

    model, x = Residual(), torch.randn(4, 5, 8)
    with record(model, tmp_path / "s") as rec, rec.batch(list(range(4))) as done:
        loss(model, x).backward()
    exact = whence.Sketch(dim=DIM)(per_sample_gradients(model, loss, x))
    assert close(done.rows, exact, 1e-5)


def test_a_batch_that_is_all_recorded_leaves_grad_alone_too(tmp_path):
    model, (x, y) = model_of(), data()
    options = {"weight_gradients": False, "on_duplicate": "skip"}
    with record(model, tmp_path / "s", **options) as rec:
        fill(rec, model, x, y)
        fill(rec, model, x, y)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_functional_with_an_argument_as_long_as_the_batch_is_found_out(tmp_path):
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.gain = nn.Parameter(torch.randn(6))

        def forward(self, x, scale):
            return torch.einsum("btd,t,d->btd", x, scale, self.gain)

    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = Scaled()

        def forward(self, x):
            return self.inner(x, torch.linspace(1, 2, x.shape[1])).square().sum((1, 2)).mean()

    model = Outer()
    with record(model, tmp_path / "s", uncovered="functional") as rec:
        with rec.batch([1, 2, 3]):
            model(torch.randn(3, 4, 6)).backward()
        with pytest.raises(errors.WhenceError), rec.batch([11, 12, 13, 14]):
            model(torch.randn(4, 4, 6)).backward()


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda m, p: whence.record(m, None), errors.DtypeError, "path must be a path"),
        (lambda m, p: whence.record(m, p, layers=3), errors.DtypeError, "layers must be"),
        (lambda m, p: whence.record(m, p, unbatched=3), errors.DtypeError, "unbatched must be"),
        (lambda m, p: whence.record(m, p, weight_gradients="no"), errors.DtypeError, "a bool"),
        (lambda m, p: whence.record(m, p, layers=["0", "zzz"]), errors.ArgumentError, "'zzz'"),
        (lambda m, p: whence.record(m, p, dim=0), errors.ArgumentError, "dim must be from 1"),
        (lambda m, p: whence.record(m, p, dim=2**62), errors.ArgumentError, "dim must be from 1"),
        (lambda m, p: whence.record(m, p, dtype="int3"), errors.ArgumentError, "dtype must be"),
        (lambda m, p: whence.record("m", p), errors.DtypeError, "model must be an nn.Module"),
        (lambda m, p: whence.record(nn.ReLU(), p), errors.ArgumentError, "trainable parameters"),
    ],
)
def test_arguments_that_cannot_be_are_named(tmp_path, call, error, match):
    with pytest.raises(error, match=match):
        call(model_of(), tmp_path / "s")
    assert not (tmp_path / "s").exists()


def test_a_recorder_is_entered_once(tmp_path):
    model = model_of()
    rec = record(model, tmp_path / "s")
    with rec:
        pass
    with pytest.raises(errors.WhenceError, match="entered once"), rec:
        pass
    for call in (
        lambda: rec.batch([1]).__enter__(),
        lambda: rec.checkpoint("1"),
        lambda: rec.verify(lambda x: model(x).sum(), torch.ones(2, 3)),
        rec.commit,
    ):
        with pytest.raises(errors.WhenceError, match="closed recorder"):
            call()


# --- not finite ---------------------------------------------------------------------------------


def test_nan_names_id_and_layer_and_nothing_is_stored(tmp_path):
    model, (x, y) = model_of(), data()
    x[5, 0] = float("nan")
    with record(model, tmp_path / "s") as rec:
        fill(rec, model, x[:4], y[:4])
        with (
            pytest.raises(errors.NotFiniteError, match=r"for id 11 in 2"),
            rec.batch([10, 11], label=y[4:6]),
        ):
            F.cross_entropy(model(x[4:6]), y[4:6]).backward()
    assert whence.open(tmp_path / "s").ids.tolist() == [0, 1, 2, 3]


def test_skip_notes_which_ids_were_left_out(tmp_path):
    model, (x, y) = model_of(), data()
    x[5, 0] = float("inf")
    with record(model, tmp_path / "s", nonfinite="skip") as rec:
        fill(rec, model, x, y)
        assert rec.pending(range(14)) == [12, 13]
    store = whence.open(tmp_path / "s")
    assert store.skipped == [("0", 5)]
    assert store.ids.tolist() == [0, 1, 2, 3, 4, 6, 7, 8, 9, 10, 11]
    assert store.columns["label"].tolist() == [v for i, v in enumerate(y.tolist()) if i != 5]


# --- ids and columns ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make",
    [list, np.array, torch.tensor, lambda ids: np.array(ids, np.int32)],
    ids=["list", "numpy", "tensor", "int32"],
)
def test_integer_ids_come_back_as_given(tmp_path, make):
    model, (x, y) = model_of(), data()
    given = [5, -3, 2**30, 0]
    with record(model, tmp_path / "s") as rec, rec.batch(make(given)):
        F.cross_entropy(model(x[:4]), y[:4]).backward()
    assert whence.open(tmp_path / "s").ids.tolist() == given


def test_string_ids_and_columns_come_back_as_given(tmp_path):
    model, (x, y) = model_of(), data()
    ids = ["a", "b/ü\n", "", "日本"]
    with (
        record(model, tmp_path / "s") as rec,
        rec.batch(ids, label=["x", "y", "ü", ""], loss=[1.5, 2, 3, 4], odd=[True, False] * 2),
    ):
        F.cross_entropy(model(x[:4]), y[:4]).backward()
    store = whence.open(tmp_path / "s")
    assert store.ids.tolist() == ids
    assert store.columns["label"].tolist() == ["x", "y", "ü", ""]
    assert store.columns["loss"].tolist() == [1.5, 2.0, 3.0, 4.0]
    assert store.columns["odd"].tolist() == [True, False, True, False]


@pytest.mark.parametrize(
    ("ids", "match"),
    [
        ([1, "a"], "all integers or all strings"),
        ([True, False], "bool"),
        ([1.5, 2.0], "float"),
        ([], "non-empty"),
        ([1, 1], "1 twice"),
        ([[1, 2]], "integers or all strings, got list"),
        (7, "must be a list, one value"),
        ("ab", "must be a list, one value"),
        ([2**63], "64 bits"),
        (np.array([1.0, 2.0]), "got float64"),
        ({1, 2}, "must be a list, one value"),
        (np.array([[1, 2]]), r"shape \[1, 2\]"),
        ([None, None], "NoneType"),
        (["a\0", "b"], "NUL"),
    ],
)
def test_ids_that_cannot_be_are_refused(tmp_path, ids, match):
    model = model_of()
    with record(model, tmp_path / "s") as rec, pytest.raises(errors.ArgumentError, match=match):
        rec.batch(ids).__enter__()


def test_one_kind_of_ids_per_store(tmp_path):
    model, (x, y) = model_of(), data()
    with record(model, tmp_path / "s") as rec:
        fill(rec, model, x, y)
        with pytest.raises(errors.IdError, match="must be int64 as in the store, got str"):
            rec.batch(["a"], label=[0]).__enter__()


@pytest.mark.parametrize(
    ("columns", "match"),
    [
        ({}, "columns must be"),
        ({"label": [1, 2], "extra": [1, 2]}, "columns must be"),
        ({"label": ["a", "b"]}, "label must be int64"),
        ({"label": [1.5, 2.5]}, "label must be int64"),
        ({"label": [1, 2, 3]}, "one value for each of 2 examples"),
        ({"label": [1, "a"]}, "all numbers or all strings"),
        ({"label": 3}, "one value per example"),
        ({"label": [1, None]}, "all numbers or all strings"),
    ],
)
def test_columns_are_fixed_by_the_first_batch(tmp_path, columns, match):
    model, (x, y) = model_of(), data()
    with record(model, tmp_path / "s") as rec:
        fill(rec, model, x, y)
        with pytest.raises(errors.ArgumentError, match=match):
            rec.batch([100, 101], **columns).__enter__()


# --- resume -------------------------------------------------------------------------------------


def test_recording_goes_on_where_it_ended(tmp_path):
    model, (x, y) = model_of(), data()
    with record(model, tmp_path / "s") as rec:
        fill(rec, model, x[:8], y[:8])
    with record(model, tmp_path / "s") as rec:
        assert rec.pending(range(12)) == [8, 9, 10, 11]
        fill(rec, model, x, y, start=8)
        assert rec.pending(range(12)) == []
    store = whence.open(tmp_path / "s")
    assert store.ids.tolist() == list(range(12))
    assert close(store.rows(), exact_rows(model, x, y))


def test_an_id_twice_says_what_to_do(tmp_path):
    model, (x, y) = model_of(), data()
    with record(model, tmp_path / "s") as rec:
        fill(rec, model, x, y)
        with pytest.raises(errors.IdError, match=r"got 3, .*on_duplicate='skip'.*checkpoint"):
            rec.batch([100, 3], label=[0, 0]).__enter__()
    with record(model, tmp_path / "s", on_duplicate="skip") as rec:
        with rec.batch([100, 3], label=[0, 0]) as done:
            F.cross_entropy(model(x[:2]), y[:2]).backward()
        assert done.stored.tolist() == [100]
        with rec.batch([100, 3], label=[0, 0]) as done:
            F.cross_entropy(model(x[:2]), y[:2]).backward()
        assert done.rows.shape == (0, DIM)
    assert len(whence.open(tmp_path / "s")) == 13


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"dim": 128}, "dim must be 64 as in the store .* got 128"),
        ({"seed": 1}, "seed must be 0"),
        ({"dtype": "float32"}, "dtype must be 'float16'"),
        ({"reduction": "sum"}, "reduction must be 'mean'"),
        ({"layers": "0"}, r"model must be .* no 2\.bias|model must be .* no 2\.weight"),
    ],
)
def test_another_setting_is_refused_by_name(tmp_path, options, match):
    model, (x, y) = model_of(), data()
    with record(model, tmp_path / "s") as rec:
        fill(rec, model, x, y)
    with pytest.raises(errors.MismatchError, match=match):
        whence.record(model, tmp_path / "s", **{"dim": DIM, **options})
    assert len(whence.open(tmp_path / "s")) == 12


def test_another_model_is_refused_by_name(tmp_path):
    model, (x, y) = model_of(), data()
    with record(model, tmp_path / "s") as rec:
        fill(rec, model, x, y)
    with pytest.raises(errors.MismatchError, match=r"2\.bias of shape \[4\]"):
        record(model_of(classes=4), tmp_path / "s")


def test_wrappers_do_not_change_the_model(tmp_path):
    model, (x, y) = model_of(), data()
    with record(model, tmp_path / "s") as rec:
        fill(rec, model, x[:4], y[:4])
    wrapper = nn.Module()
    wrapper.module = nn.Module()
    wrapper.module._orig_mod = model
    with record(wrapper, tmp_path / "s") as rec:
        fill(rec, model, x, y, start=4)
    assert close(whence.open(tmp_path / "s").rows(), exact_rows(model, x, y))


def test_a_second_writer_is_told_who_holds_the_store(tmp_path):
    model = model_of()
    with (
        record(model, tmp_path / "s"),
        pytest.raises(errors.LockedError, match=f"process {os.getpid()}"),
    ):
        record(model, tmp_path / "s")
    with record(model, tmp_path / "s"):
        pass


def test_committed_rows_survive_kill_9(tmp_path):
    script = f"""
        import sys, torch, whence
        from torch import nn
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        from test_gradients_recorder import data, fill, model_of, record
        model, (x, y) = model_of(), data()
        rec = record(model, {str(tmp_path / "s")!r})
        rec.__enter__()
        fill(rec, model, x[:8], y[:8])
        rec.commit()
        fill(rec, model, x, y, start=8)
        print("ready", flush=True)
        sys.stdin.read()
    """
    child = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert child.stdout.readline() == "ready\n"
    child.send_signal(signal.SIGKILL)
    child.communicate()
    assert whence.open(tmp_path / "s").ids.tolist() == list(range(8))
    model, (x, y) = model_of(), data()
    with record(model, tmp_path / "s") as rec:
        assert rec.pending(range(12)) == [8, 9, 10, 11]
        fill(rec, model, x, y, start=8)
    assert close(whence.open(tmp_path / "s").rows(), exact_rows(model, x, y))


# --- weights and checkpoints --------------------------------------------------------------------


def step(model, rate=0.1):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter -= rate * torch.ones_like(parameter)


def test_still_weights_are_fixed_and_moving_ones_moving(tmp_path):
    model, (x, y) = model_of(), data()
    with record(model, tmp_path / "still") as rec:
        fill(rec, model, x, y)
    (found,) = whence.open(tmp_path / "still").manifest.checkpoints
    assert found.weights == "fixed"
    assert found.first == found.last
    with record(model, tmp_path / "moving") as rec:
        fill(rec, model, x[:4], y[:4])
        step(model)
        fill(rec, model, x, y, start=4)
    (found,) = whence.open(tmp_path / "moving").manifest.checkpoints
    assert found.weights == "moving"
    assert found.first != found.last


def test_weights_that_must_be_fixed_must_not_move(tmp_path):
    model, (x, y) = model_of(), data()
    with record(model, tmp_path / "s", weights="fixed") as rec:
        fill(rec, model, x[:4], y[:4])
        before = {name: value.clone() for name, value in model.state_dict().items()}
        step(model)
        with pytest.raises(errors.WeightsError, match="weights='moving'"):
            fill(rec, model, x, y, start=4)
        model.load_state_dict(before)


def test_a_change_behind_autograds_back_is_found_at_the_end(tmp_path):
    model, (x, y) = model_of(), data()
    rec = record(model, tmp_path / "s", weights="fixed").__enter__()
    fill(rec, model, x, y)
    model[0].weight.data.add_(1)
    with pytest.raises(errors.WeightsError, match="checkpoint '0'"):
        rec.__exit__(None, None, None)


def test_resuming_a_fixed_checkpoint_with_other_weights_is_refused(tmp_path):
    model, (x, y) = model_of(), data()
    with record(model, tmp_path / "s") as rec:
        fill(rec, model, x[:4], y[:4])
    step(model)
    with record(model, tmp_path / "s") as rec:
        with pytest.raises(errors.WeightsError, match="checkpoint '0'"):
            fill(rec, model, x, y, start=4)
        rec.checkpoint("1")
        fill(rec, model, x, y)
    assert whence.open(tmp_path / "s").checkpoints == ["0", "1"]


def test_a_killed_run_may_have_moved_its_weights(tmp_path):
    model, (x, y) = model_of(), data()
    rec = record(model, tmp_path / "s").__enter__()
    fill(rec, model, x[:4], y[:4])
    rec.commit()
    rec._hooks.remove()  # a kill: nothing is closed in order, but the lock is gone
    rec._writer._lock.close()
    step(model)
    with record(model, tmp_path / "s") as rec:
        fill(rec, model, x, y, start=4)
    (found,) = whence.open(tmp_path / "s").manifest.checkpoints
    assert found.weights == "moving"


@pytest.mark.parametrize("name", ["", "a\0", 3])
def test_a_checkpoint_has_a_name_that_an_export_can_say(tmp_path, name):
    wrong = pytest.raises(errors.ArgumentError, match="name must be a non-empty str without NUL")
    with record(model_of(), tmp_path / "s") as rec, wrong:
        rec.checkpoint(name)


def test_checkpoints_are_resumed_by_name(tmp_path):
    model, (x, y) = model_of(), data()
    with record(model, tmp_path / "s") as rec:
        rec.checkpoint("a", learning_rate=0.5)
        fill(rec, model, x[:8], y[:8])
        rec.checkpoint("b", learning_rate=0.25)
        fill(rec, model, x, y)
        rec.checkpoint("a", learning_rate=0.5)
        assert rec.pending(range(12)) == [8, 9, 10, 11]
        with pytest.raises(errors.ArgumentError, match=r"learning_rate must be 0\.5"):
            rec.checkpoint("a", learning_rate=0.1)


# --- verify -------------------------------------------------------------------------------------


def test_verify_agrees_on_a_right_recording(tmp_path):
    model, (x, y) = model_of(), data()
    with record(model, tmp_path / "s") as rec:
        found = rec.verify(lambda x, y: F.cross_entropy(model(x), y), (x, y))
        assert found.gradient < 1e-5
        assert found.batch < 1e-5
        fill(rec, model, x, y)
    assert len(whence.open(tmp_path / "s")) == 12


def test_verify_finds_a_wrong_reduction(tmp_path):
    model, (x, y) = model_of(), data()
    with (
        record(model, tmp_path / "s", reduction="sum") as rec,
        pytest.raises(errors.LayerError, match=r"reduction must fit .* 'sum', .* 0\.5 and 0\.5"),
    ):
        rec.verify(lambda x, y: F.cross_entropy(model(x), y), (x, y))


def test_verify_finds_a_gradient_that_depends_on_the_batch(tmp_path):
    class Mixing(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(6, 3)

        def forward(self, x):
            x = self.layer(x)
            return x - x.mean(0)

    model, (x, y) = Mixing(), data()
    with (
        record(model, tmp_path / "s") as rec,
        pytest.raises(errors.LayerError, match="who else is in the batch"),
    ):
        rec.verify(lambda x, y: model(x).square().sum(1).mean(), (x, y))


def test_verify_checks_token_means(tmp_path):
    model = nn.Linear(6, 3)
    x, y = torch.randn(4, 5, 6), torch.randint(0, 3, (4, 5))
    y[0, 2:] = -100

    def loss(x, y):
        return F.cross_entropy(model(x).flatten(0, 1), y.flatten())

    with record(model, tmp_path / "s", reduction="token_mean") as rec:
        assert rec.verify(loss, (x, y), tokens=[2, 5]).gradient < 1e-5
        with pytest.raises(errors.LayerError):
            rec.verify(loss, (x, y), tokens=[5, 5])


def test_tokens_belong_to_token_mean(tmp_path):
    model = model_of()
    with (
        record(model, tmp_path / "a") as rec,
        pytest.raises(errors.ArgumentError, match="tokens must be None"),
    ):
        rec.batch([1], tokens=[3]).__enter__()
    with record(model, tmp_path / "b", reduction="token_mean") as rec:
        with pytest.raises(errors.ArgumentError, match="tokens must be the counted"):
            rec.batch([1]).__enter__()
        with pytest.raises(errors.ArgumentError, match="at least one above 0"):
            rec.batch([1], tokens=[0]).__enter__()


def test_positions_of_a_batch_of_one_are_positions(tmp_path):
    class Tokens(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.token, self.position = torch.nn.Embedding(9, 6), torch.nn.Embedding(5, 6)
            self.head = torch.nn.Linear(6, 9)

        def forward(self, tokens):
            return self.head(self.token(tokens) + self.position(torch.arange(tokens.shape[1]))).mT

    torch.manual_seed(0)
    model, x, y = Tokens(), torch.randint(9, (9, 5)), torch.randint(9, (9, 5))
    with whence.record(model, tmp_path / "s", dim=64) as rec:
        for ids in ([0, 1, 2, 3], [4, 5, 6, 7], [8]):
            with rec.batch(ids) as batch:
                F.cross_entropy(model(x[ids]), y[ids]).backward()
        rec.verify(lambda x, y: F.cross_entropy(model(x), y), (x, y))
    plain = copy.deepcopy(model)
    gradients = torch.autograd.grad(F.cross_entropy(plain(x[8:]), y[8:]), list(plain.parameters()))
    names = [name for name, _ in plain.named_parameters()]
    exact = whence.Sketch(dim=64)({n: g[None] for n, g in zip(names, gradients, strict=True)})
    assert np.allclose(batch.rows, exact, rtol=1e-4, atol=1e-6)
    whence.query(model, tmp_path / "s", lambda: F.cross_entropy(model(x[:1]), y[:1]))


def test_columns_cannot_have_the_names_of_arguments(tmp_path):
    model, (x, y) = model_of(), data(4)
    with record(model, tmp_path / "s") as rec:
        with pytest.raises(errors.ArgumentError, match="'ids', 'tokens' and 'scale', which are"):
            rec.batch([0, 1, 2, 3], ids=[4, 5, 6, 7]).__enter__()
        with pytest.raises(errors.ArgumentError, match="None for reduction='mean', and is no name"):
            rec.batch([0, 1, 2, 3], tokens=["a", "b", "c", "d"]).__enter__()
        with rec.batch(ids=[0, 1, 2, 3], label=y):
            F.cross_entropy(model(x), y).backward()
    assert whence.open(tmp_path / "s").ids.tolist() == [0, 1, 2, 3]


def test_columns_are_those_of_the_store_when_it_is_gone_on_with(tmp_path):
    model, (x, y) = model_of(), data(4)
    with record(model, tmp_path / "s") as rec:
        fill(rec, model, x, y)
    with record(model, tmp_path / "s") as rec:
        said = r"columns must be \['label'\] as in the first batch of the store, got \['group'\]"
        with pytest.raises(errors.ArgumentError, match=said):
            rec.batch([9], group=[1]).__enter__()


def test_a_closed_recorder_confirms_nothing(tmp_path):
    with record(model_of(), tmp_path / "s") as rec:
        rec.commit()
    with pytest.raises(errors.WhenceError, match="commit must be called inside"):
        rec.commit()


def test_the_kind_of_a_sketch_is_named_as_it_was_given(tmp_path):
    with pytest.raises(errors.ArgumentError, match="sketch must be one of"):
        record(model_of(), tmp_path / "s", sketch="gauss")


def test_a_learning_rate_beyond_float32_is_refused(tmp_path):
    with record(model_of(), tmp_path / "s") as rec:
        rec.checkpoint("a", learning_rate=3.4e38)
        rec.checkpoint("b", learning_rate=1.5e-45)
        for rate in (1e308, 1e-50):
            with pytest.raises(errors.ArgumentError, match="learning_rate must be from 1"):
                rec.checkpoint("c", learning_rate=rate)


# --- several threads ----------------------------------------------------------------------------


def test_while_a_batch_is_open_other_threads_are_refused(tmp_path):
    model, (x, y) = model_of(), data()
    refused = []

    def others():
        for call in (
            lambda: rec.batch([7]).__enter__(),
            lambda: rec.checkpoint("1"),
            lambda: rec.verify(lambda x: model(x).sum(), (x[:2],)),
            rec.commit,
            lambda: F.cross_entropy(model(x), y).backward(),
        ):
            with pytest.raises(errors.WhenceError) as caught:
                call()
            refused.append(str(caught.value))

    with record(model, tmp_path / "s") as rec:
        with rec.batch(range(12)):
            loss = F.cross_entropy(model(x), y)
            thread = threading.Thread(target=others)
            thread.start()
            thread.join()
            loss.backward()
        rec.commit()
    assert all("several threads share it" in each for each in refused[:4])
    assert "the model must run in one thread while a batch is recorded" in refused[4]
    store = whence.open(tmp_path / "s")
    assert store.ids.tolist() == list(range(12))
    assert close(store.rows(), exact_rows(model, x, y))


def test_threads_that_do_not_take_turns_store_right_rows_or_none(tmp_path):
    model, (x, y) = model_of(), data(240)
    odd = []

    def run(first):
        for start in range(first, first + 120, 4):
            part = slice(start, start + 4)
            try:
                with rec.batch(range(start, start + 4)):
                    F.cross_entropy(model(x[part]), y[part]).backward()
            except errors.WhenceError:
                pass
            except BaseException as error:
                odd.append(error)

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with record(model, tmp_path / "s") as rec:
            threads = [threading.Thread(target=run, args=(first,)) for first in (0, 120)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
    finally:
        sys.setswitchinterval(before)
    assert not odd
    store = whence.open(tmp_path / "s")
    assert len(store)
    assert whence.verify(tmp_path / "s").is_sound
    assert close(store.rows(), exact_rows(model, x, y)[store.ids])


def test_the_end_of_recording_waits_for_the_batch_of_another_thread(tmp_path):
    model, (x, y) = model_of(), data()
    begun = threading.Event()

    def run():
        with rec.batch(range(12)):
            begun.set()
            time.sleep(0.2)
            F.cross_entropy(model(x), y).backward()

    thread = threading.Thread(target=run)
    with record(model, tmp_path / "s") as rec:
        thread.start()
        begun.wait(10)
    thread.join()
    assert len(whence.open(tmp_path / "s")) == 12


@pytest.mark.parametrize("left_open", [False, True])
def test_what_the_loop_raises_is_not_hidden_by_what_closing_does(tmp_path, left_open):
    model, (x, y) = model_of(), data()
    batches = []

    def loop():
        with record(model, tmp_path / "s") as rec:
            fill(rec, model, x, y)
            if left_open:
                batches.append(rec.batch([100], label=[0]))
                batches[0].__enter__()
            (tmp_path / "s" / "lock").unlink()
            raise ZeroDivisionError("of the loop")

    with pytest.raises(ZeroDivisionError) as caught:
        loop()
    for batch in batches:
        batch.gen.close()
    if hasattr(caught.value, "__notes__"):
        assert "rows that were not confirmed are lost" in caught.value.__notes__[0]
        assert "must keep its lock" in caught.value.__notes__[0]


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_model_that_the_backward_pass_runs_again_may_run_on_its_thread(tmp_path, reentrant):
    """As on a GPU, where autograd has threads of its own."""
    model, (x, y) = model_of(), data()
    again, failed = x.clone().requires_grad_(reentrant), []

    def backward():
        try:
            loss.backward()
        except BaseException as error:
            failed.append(error)

    with record(model, tmp_path / "s") as rec, rec.batch(range(12)):
        out = torch.utils.checkpoint.checkpoint(model, again, use_reentrant=reentrant)
        loss = F.cross_entropy(out, y)
        thread = threading.Thread(target=backward)
        thread.start()
        thread.join()
    assert not failed
    assert close(whence.open(tmp_path / "s").rows(), exact_rows(model, x, y))


@pytest.mark.skipif(sys.platform == "win32", reason="signals are sent otherwise on Windows")
def test_an_interrupt_of_the_wait_for_another_threads_batch_still_closes(tmp_path):
    model, (x, y) = model_of(), data()
    begun, end, refused = threading.Event(), threading.Event(), []

    def run():
        try:
            with rec.batch([100], label=[0]):
                begun.set()
                end.wait(10)
        except errors.WhenceError as error:
            refused.append(error)

    def loop():
        with rec:
            fill(rec, model, x, y)
            thread.start()
            begun.wait(10)
            threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()

    rec = record(model, tmp_path / "s")
    thread = threading.Thread(target=run)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            loop()
    finally:
        signal.signal(signal.SIGINT, before)
        end.set()
        thread.join()
    assert refused
    assert whence.open(tmp_path / "s").ids.tolist() == list(range(12))
    whence.compact(tmp_path / "s")  # nobody holds it
