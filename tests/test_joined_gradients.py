"""Rows and weight gradients in one pass: `.grad` is that of plain autograd, whatever a loop does.

In batches that are not 1, 2, 4, 8 and so on, a linear layer's weight gradient is summed from its
samples'; norm layers' gradients come from the core in every batch.
"""

import copy
import io
from contextlib import ExitStack

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from oracle import per_sample_gradients
from torch import nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

import whence
from whence import errors
from whence._core import norm_gradients

DIM = 64


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """Models of this size only wait for threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def third(tmp_path):
    """Begins to record a model, and leaves the recorder at its third batch."""
    with ExitStack() as stack:

        def begin(model, loss, *batch, **options):
            options = {"dim": DIM, "dtype": "float32", **options}
            rec = stack.enter_context(whence.record(model, tmp_path / "store", **options))
            count = len(batch[0])
            for first in (-count, -2 * count):
                with rec.batch(range(first, first + count)):
                    loss(model, *batch).backward()
            model.zero_grad()
            return rec

        yield begin


def squares(model, x):
    out = model(x).flatten(1)
    return (out.square() * torch.linspace(0.5, 1.5, out.shape[1])).sum(1).mean()


def mlp():
    return nn.Sequential(nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 3))


def data(count=5, positions=9):
    return torch.randn(count, positions, 6)


def gradients(model):
    return {
        name: None if each.grad is None else each.grad.detach().clone()
        for name, each in model.named_parameters()
    }


def plain(model, loss, *batch):
    """What autograd makes of a copy of the model that nothing watches."""
    model = copy.deepcopy(model)
    model.zero_grad()
    loss(model, *batch).backward()
    return gradients(model)


def same(found, exact, tolerance=1e-6):
    assert found.keys() == exact.keys()
    for name, each in exact.items():
        if each is None:
            assert found[name] is None
        else:
            assert found[name].shape == each.shape
            assert (found[name] - each).norm() <= tolerance * each.norm(), name


def close(found, exact, tolerance=1e-5):
    return np.linalg.norm(found - exact) <= tolerance * np.linalg.norm(exact)


def assert_as_plain(third, model, loss, *batch, **options):
    """`.grad` and rows of a third batch are those of autograd and of torch.func."""
    exact = plain(model, loss, *batch)
    rec = third(model, loss, *batch, **options)
    with rec.batch(range(len(batch[0]))) as done:
        loss(model, *batch).backward()
    same(gradients(model), exact)
    sketch = whence.Sketch(options.get("sketch", "chunked_sjlt"), dim=DIM)
    bare = getattr(model, "module", model)
    assert close(done.rows, sketch(per_sample_gradients(bare, loss, *batch)))


# --- layers ---------------------------------------------------------------------------------------


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 6)

    def forward(self, x):
        return self.layer(torch.tanh(self.layer(x)))


class Tied(nn.Module):
    def __init__(self, biases=False):
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)
        self.second.weight = self.first.weight
        if biases:
            self.second.bias = self.first.bias

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


class Words(nn.Module):
    """A head whose weight is the table's."""

    def __init__(self):
        super().__init__()
        self.table, self.head = nn.Embedding(6, 4), nn.Linear(4, 6)
        self.head.weight = self.table.weight

    def forward(self, x):
        return self.head(self.table((x * 10).long()[..., 0] % 6).sin())


class Branches(nn.Module):
    """The output of one layer does not reach the loss."""

    def __init__(self):
        super().__init__()
        self.first, self.idle = nn.Linear(6, 4), nn.Linear(6, 4)

    def forward(self, x):
        self.idle(x)
        return self.first(x)


class ByName(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 4)

    def forward(self, x):
        return self.layer(input=x)


class Mixed(nn.Module):
    """Some of its layers see positions, one sees none."""

    def __init__(self):
        super().__init__()
        self.first, self.norm = nn.Linear(6, 8), nn.LayerNorm(8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True, bias=False)
        self.last = nn.Linear(8, 3)

    def forward(self, x):
        h = self.norm(torch.tanh(self.first(x)))
        return self.last((h + self.attention(h, h, h)[0]).mean(1))


def with_frozen(*names):
    model = mlp()
    for name in names:
        model.get_parameter(name).requires_grad_(False)
    return model


def with_transposed_weight():
    model = mlp()
    model[0].weight = nn.Parameter(model[0].weight.detach().t().contiguous().t())
    return model


LAYERS = {
    "mlp": mlp,
    "one layer": lambda: nn.Linear(6, 4),
    "without bias": lambda: nn.Sequential(
        nn.Linear(6, 7, bias=False), nn.Tanh(), nn.Linear(7, 3, bias=False)
    ),
    "a frozen bias": lambda: with_frozen("0.bias", "2.bias"),
    "a frozen weight": lambda: with_frozen("0.weight"),
    "a frozen layer": lambda: with_frozen("0.weight", "0.bias"),
    "wide and odd": lambda: nn.Sequential(nn.Linear(6, 130), nn.ReLU(), nn.Linear(130, 33)),
    "a transposed weight": with_transposed_weight,
    "one that runs twice": Twice,
    "tied weights": Tied,
    "tied weights and biases": lambda: Tied(biases=True),
    "tied with a table": Words,
    "one that does not reach the loss": Branches,
    "called by name": ByName,
    "beside attention": Mixed,
}


@pytest.mark.parametrize("name", LAYERS)
def test_grad_and_rows_are_those_of_plain_autograd(third, name):
    assert_as_plain(third, LAYERS[name](), squares, data())


@pytest.mark.parametrize("shape", [(5, 8, 6), (5, 7, 6), (1, 9, 6), (5, 2, 4, 6), (3, 8, 1, 6)])
def test_for_any_number_of_dimensions_and_positions(third, shape):
    assert_as_plain(third, mlp(), squares, torch.randn(shape))


@pytest.mark.parametrize("kind", [*whence.sketch.KINDS])
def test_for_every_kind_of_sketch(third, kind):
    assert_as_plain(third, mlp(), squares, data(), sketch=kind)


def sum_of_all(model, x):
    return model(x).sum()


def transposed(model, x):
    return (model(x).transpose(1, 2).contiguous().sin().flatten(1)).sum(1).mean()


def one_position(model, x):
    return model(x)[:, 3].square().sum(1).mean()


def every_other(model, x):
    return model(x)[:, ::2, ::2].exp().flatten(1).sum(1).mean()


def split(model, x):
    first, second = model(x).split([1, 2], -1)
    return (first * second.sigmoid()).flatten(1).sum(1).mean()


def of_a_transposed_input(model, x):
    return squares(model, x.transpose(1, 2).contiguous().transpose(1, 2))


def of_an_expanded_input(model, x):
    return squares(model, x[:, :1].expand(-1, 9, -1))


def of_a_part_of_the_input(model, x):
    return squares(model, torch.cat([x, x], -1)[..., 3:9])


LOSSES = [
    sum_of_all,
    transposed,
    one_position,
    every_other,
    split,
    of_a_transposed_input,
    of_an_expanded_input,
    of_a_part_of_the_input,
]


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.__name__)
def test_for_gradients_and_inputs_of_any_strides(third, loss):
    reduction = "sum" if loss is sum_of_all else "mean"
    assert_as_plain(third, mlp(), loss, data(), reduction=reduction)


# --- what happens around a layer ------------------------------------------------------------------


class ChangedInPlace(nn.Module):
    def __init__(self, change):
        super().__init__()
        self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 3)
        self.change = change

    def forward(self, x):
        return self.last(self.change(self.first(x)))


IN_PLACE = {
    "relu": nn.ReLU(inplace=True),
    "added to": lambda h: h.add_(1),
    "multiplied": lambda h: h.mul_(2).sin(),
    "with another": lambda h: h.__iadd__(h.detach().cos()),
    "a part": lambda h: h[..., :3].relu_().sum(-1, keepdim=True) + h,
    "masked": lambda h: h.masked_fill_(h > 0.5, 0.0),
}


@pytest.mark.parametrize("name", IN_PLACE)
def test_an_output_may_be_changed_in_place(third, name):
    assert_as_plain(third, ChangedInPlace(IN_PLACE[name]), squares, data())


def test_an_input_changed_in_place_is_found_out(third):
    model, x = mlp(), data()
    rec = third(model, squares, x)
    changed = x.clone()

    def change():
        loss = squares(model, changed)
        changed.zero_()
        loss.backward()

    with pytest.raises((errors.LayerError, RuntimeError), match=r"in.?place"), rec.batch(range(5)):
        change()
    assert rec.pending(range(5)) == list(range(5))


def test_an_input_changed_after_the_batch_is_found_out_as_by_torch(third):
    model, x = mlp(), data()
    rec = third(model, squares, x)
    changed = x.clone()
    with rec.batch(range(5)):
        later = squares(model, changed)
        squares(model, x).backward()
    changed.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        later.backward()


def test_gradients_of_the_input_are_those_of_plain_autograd(third):
    model, x = mlp(), data()
    rec = third(model, squares, x)
    exact = x.clone().requires_grad_()
    squares(copy.deepcopy(model), exact).backward()
    found = x.clone().requires_grad_()
    with rec.batch(range(5)):
        squares(model, found).backward()
    assert (found.grad - exact.grad).norm() <= 1e-6 * exact.grad.norm()


def test_two_backward_passes_and_two_batches_add_up(third):
    model, x, y = mlp(), data(), data()
    one, other = plain(model, squares, x), plain(model, squares, y)
    rec = third(model, squares, x)
    with rec.batch(range(5)) as done:
        squares(model, x).backward()
        squares(model, y).backward()
    same(gradients(model), {name: one[name] + other[name] for name in one})
    both = [whence.Sketch(dim=DIM)(per_sample_gradients(model, squares, z)) for z in (x, y)]
    assert close(done.rows, both[0] + both[1])
    with rec.batch(range(5, 10)):  # the fourth, which is compared layer by layer
        squares(model, x).backward()
    with rec.batch(range(10, 15)):
        squares(model, x).backward()
    same(gradients(model), {name: 3 * one[name] + other[name] for name in one})


def test_a_graph_that_is_kept_gives_its_gradients_twice(third):
    model, x = mlp(), data()
    exact = plain(model, squares, x)
    rec = third(model, squares, x)
    with rec.batch(range(5)) as done:
        loss = squares(model, x)
        loss.backward(retain_graph=True)
        loss.backward()
    same(gradients(model), {name: 2 * each for name, each in exact.items()})
    assert close(done.rows, 2 * whence.Sketch(dim=DIM)(per_sample_gradients(model, squares, x)))


@pytest.mark.parametrize("model", [lambda: nn.Linear(6, 4), mlp], ids=["one layer", "mlp"])
def test_a_graph_that_is_not_kept_is_gone_as_in_plain_autograd(third, model):
    model, x = model(), data()
    rec = third(model, sum_of_all, x)

    def twice():
        loss = sum_of_all(model, x)
        loss.backward()
        loss.backward()

    with pytest.raises(RuntimeError, match="second time"), rec.batch(range(5)):
        twice()


def test_backward_after_the_batch_is_plain(third):
    model, x = mlp(), data()
    exact = plain(model, squares, x)
    rec = third(model, squares, x)
    with rec.batch(range(5)):
        later = squares(model, x)
        squares(model, x).backward()
    model.zero_grad()
    later.backward()
    same(gradients(model), exact)


def test_gradients_taken_after_the_batch_are_plain(third):
    model, x = mlp(), data()
    exact = plain(model, squares, x)
    rec = third(model, squares, x)
    with rec.batch(range(5)):
        later = squares(model, x)
        squares(model, x).backward()
    model.zero_grad()
    chosen = [model[2].weight, model[0].bias]
    found = torch.autograd.grad(later, chosen)
    same(dict(zip("ab", found, strict=True)), {"a": exact["2.weight"], "b": exact["0.bias"]})
    assert all(each.grad is None for each in model.parameters())


@pytest.mark.parametrize("of", ["the input", "a weight", "all weights"])
def test_a_second_gradient_inside_the_batch_is_found_out(third, of):
    model, x = mlp(), data().requires_grad_()
    rec = third(model, squares, x)
    inputs = {
        "the input": [x],
        "a weight": [model[0].weight],
        "all weights": list(model.parameters()),
    }[of]

    def both():
        loss = squares(model, x)
        torch.autograd.grad(loss, inputs, retain_graph=True)
        loss.backward()

    with pytest.raises(errors.CoverageError, match="must add up"), rec.batch(range(5)):
        both()


def test_gradients_of_gradients_are_refused(third):
    model, x = mlp(), data()
    rec = third(model, squares, x)
    with pytest.raises(errors.LayerError, match="create_graph=True"), rec.batch(range(5)):
        squares(model, x).backward(create_graph=True)


def test_hooks_of_parameters_see_the_gradient_once(third):
    model, x = mlp(), data()
    exact = plain(model, squares, x)
    rec = third(model, squares, x)
    seen, accumulated = {}, {}
    for name, each in model.named_parameters():
        each.register_hook(lambda grad, name=name: seen.setdefault(name, []).append(grad.clone()))
        each.register_post_accumulate_grad_hook(
            lambda each, name=name: accumulated.setdefault(name, []).append(each.grad.clone())
        )
    with rec.batch(range(5)):
        squares(model, x).backward()
    for found in (seen, accumulated):
        assert all(len(each) == 1 for each in found.values())
        same({name: each[0] for name, each in found.items()}, exact)


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
def test_hooks_of_modules_see_the_layers_gradients(third):
    model, x = mlp(), data()
    found, exact = {}, {}

    def watch(model, into):
        for name, each in model.named_children():
            each.register_full_backward_hook(
                lambda module, inputs, outputs, name=name: into.update(
                    {f"{name} in": inputs[0], f"{name} out": outputs[0]}
                )
            )

    bare = copy.deepcopy(model)
    watch(bare, exact)
    squares(bare, x.clone().requires_grad_()).backward()
    rec = third(model, squares, x)
    watch(model, found)
    with rec.batch(range(5)):
        squares(model, x.clone().requires_grad_()).backward()
    same(found, exact)


def test_an_optimizer_may_step_while_gradients_come(third):
    """One step fused into the backward pass, so that no gradient need be kept."""

    def fuse(model):
        for each in model.parameters():
            optimizer = torch.optim.SGD([each], lr=0.05)

            def step(_, optimizer=optimizer):
                optimizer.step()
                optimizer.zero_grad()

            each.register_post_accumulate_grad_hook(step)

    model, x = mlp(), data()
    bare = copy.deepcopy(model)
    fuse(bare)
    for _ in range(4):
        squares(bare, x).backward()
    fuse(model)
    rec = third(model, squares, x)
    for first in (0, 5):
        with rec.batch(range(first, first + 5)):
            squares(model, x).backward()
    for name, each in model.named_parameters():
        assert (each - bare.get_parameter(name)).norm() <= 1e-5 * each.norm()


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_is_that_of_plain_autograd(third, reentrant):
    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(6, 6), nn.Linear(6, 3)
            self.inner = nn.Sequential(nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 6))
            self.on = True

        def forward(self, x):
            h = torch.tanh(self.first(x))
            h = checkpoint(self.inner, h, use_reentrant=reentrant) if self.on else self.inner(h)
            return self.last(h)

    model, x = Checkpointed(), data()
    exact = plain(model, squares, x)
    rec = third(model, squares, x)
    with rec.batch(range(5)) as done:
        squares(model, x).backward()
    same(gradients(model), exact)
    model.on = False
    assert close(done.rows, whence.Sketch(dim=DIM)(per_sample_gradients(model, squares, x)))


def test_under_autocast_grad_is_that_of_autocast(third):
    def rounded(model, x):
        with torch.autocast("cpu", torch.bfloat16):
            out = model(x)
        return out.float().square().flatten(1).sum(1).mean()

    model, x = mlp(), data()
    exact = plain(model, rounded, x)
    rec = third(model, rounded, x)
    with rec.batch(range(5)):
        rounded(model, x).backward()
    assert all(torch.equal(each, exact[name]) for name, each in gradients(model).items())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_models_of_other_types_keep_theirs(third, dtype):
    model, x = mlp().to(dtype), data().to(dtype)
    exact = plain(model, squares, x)
    rec = third(model, squares, x)
    with rec.batch(range(5)):
        squares(model, x).backward()
    assert all(each.dtype == dtype for each in gradients(model).values())
    assert all(torch.equal(each, exact[name]) for name, each in gradients(model).items())


def test_copies_made_in_the_batch_are_plain_models(third):
    model, x = mlp(), data()
    exact = plain(model, squares, x)
    rec = third(model, squares, x)
    with rec.batch(range(5)) as done:
        loss = squares(model, x)
        buffer = io.BytesIO()
        torch.save(model, buffer)
        copies = [
            copy.deepcopy(model),
            torch.load(io.BytesIO(buffer.getvalue()), weights_only=False),
        ]
        for each in copies:
            squares(each, x).backward()
            same(gradients(each), exact)
        loss.backward()
    same(gradients(model), exact)
    assert close(done.rows, whence.Sketch(dim=DIM)(per_sample_gradients(model, squares, x)))


class Wrapper(nn.Module):
    """Calls its module in a closure of its own, as wrappers for many devices do."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, *args, **kwargs):
        return self.module(*(each.clone() for each in args), **kwargs)


@pytest.mark.parametrize("wrap", [Wrapper, nn.DataParallel])
def test_wrapped_models_are_as_bare_ones(third, wrap):
    assert_as_plain(third, wrap(mlp()), squares, data())


@pytest.mark.parametrize("size", [(5, 9, 6), (16, 40, 60)])
def test_grad_is_the_same_bits_for_any_number_of_threads(tmp_path, size):
    model, x = (
        nn.Sequential(nn.Linear(size[2], 70), nn.Tanh(), nn.Linear(70, 33)),
        torch.randn(size),
    )
    found = []
    for threads in (1, 2, 3, 8):
        with whence.record(model, tmp_path / f"{threads}", dim=DIM, threads=threads) as rec:
            for first in range(3):
                model.zero_grad()
                with rec.batch(range(first * size[0], (first + 1) * size[0])):
                    squares(model, x).backward()
        found.append((gradients(model), whence.open(tmp_path / f"{threads}").rows()))
    for grads, rows in found[1:]:
        assert all(torch.equal(each, found[0][0][name]) for name, each in grads.items())
        assert np.array_equal(rows, found[0][1])
    same(found[0][0], plain(model, squares, x))


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=1e-3),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01, eps=1e-4),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, eps=1e-4),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.005, eps=1e-3),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_training_goes_as_without_recording(tmp_path, name):
    model = Mixed()
    bare = copy.deepcopy(model)
    optimizer, other = (OPTIMIZERS[name](each.parameters()) for each in (model, bare))
    with whence.record(model, tmp_path / "s", dim=DIM) as rec:
        for step in range(7):  # two of which are closely checked after the first
            x = data()
            with rec.batch(range(5 * step, 5 * step + 5)):
                squares(model, x).backward()
            squares(bare, x).backward()
            for each in (optimizer, other):
                each.step()
                each.zero_grad(set_to_none=step % 2 == 0)
    for key, each in model.named_parameters():
        assert (each - bare.get_parameter(key)).norm() <= 1e-5 * each.norm()


# --- weights during and outside a layer -----------------------------------------------------------


def test_weights_ask_for_no_gradient_in_their_layer_alone(third):
    model, x = mlp(), data()
    rec = third(model, squares, x)
    inside = []
    for each in (model[0], model[2]):
        each.register_forward_pre_hook(
            lambda module, args: inside.append(module.weight.requires_grad)
        )
    with rec.batch(range(5)):
        out = model(x)
        assert all(each.requires_grad for each in model.parameters())
        out.square().flatten(1).sum(1).mean().backward()
    assert inside == [False, False]
    model(x)
    assert inside[2:] == [True, True]


def test_weights_ask_for_gradients_again_when_a_layer_fails(third):
    model, x = mlp(), data()
    rec = third(model, squares, x)
    with pytest.raises(RuntimeError, match="shapes"), rec.batch(range(5)):
        model(torch.randn(5, 9, 5))
    assert all(each.requires_grad for each in model.parameters())
    exact = plain(mlp_like(model), squares, x)
    with rec.batch(range(5)):
        squares(model, x).backward()
    same(gradients(model), exact)


def mlp_like(model):
    found = mlp()
    found.load_state_dict(model.state_dict())
    return found


def test_what_runs_without_gradients_in_a_batch_leaves_no_trace(third):
    model, x = mlp(), data()
    exact = plain(model, squares, x)
    rec = third(model, squares, x)
    with rec.batch(range(5)) as done:
        with torch.no_grad():
            before = model(x * 3)
        loss = squares(model, x)
        with torch.no_grad():
            assert torch.equal(model(x * 3), before)
        loss.backward()
    same(gradients(model), exact)
    assert close(done.rows, whence.Sketch(dim=DIM)(per_sample_gradients(model, squares, x)))


def penalty(model, x):
    return squares(model, x) + 0.1 * model[0].weight.square().sum()


def by_hand(model, x):
    h = torch.tanh(model[0](x))
    return squares(model, x) + F.linear(h, model[2].weight).square().sum(2).mean()


def bias_by_hand(model, x):
    return squares(model, x) + (x[..., :3] * model[2].bias).sum(2).mean()


def with_other_weights(model, x):
    others = {name: 2 * each.detach() for name, each in model.named_parameters()}
    return squares(model, x) + functional_call(model, others, (x,)).square().mean()


OUTSIDE = [penalty, by_hand, bias_by_hand, with_other_weights]


@pytest.mark.parametrize("loss", OUTSIDE, ids=lambda loss: loss.__name__)
def test_a_use_outside_the_layer_is_found_out(third, loss):
    model, x = mlp(), data()
    rec = third(model, squares, x)
    with pytest.raises(errors.CoverageError, match="must add up"), rec.batch(range(5)):
        loss(model, x).backward()
    assert rec.pending(range(5)) == list(range(5))


@pytest.mark.parametrize("loss", OUTSIDE, ids=lambda loss: loss.__name__)
def test_a_use_outside_the_layer_has_its_gradient_nevertheless(third, loss):
    model, x = mlp(), data()
    exact = plain(model, loss, x)
    rec = third(model, squares, x)
    try:
        with rec.batch(range(5)):
            loss(model, x).backward()
    except errors.CoverageError:
        pass
    same(gradients(model), exact)


def test_nan_is_named_and_grad_is_as_in_plain_autograd(third):
    model, x = mlp(), data()
    rec = third(model, squares, x)
    broken = x.clone()
    broken[2, 4, 1] = float("nan")
    with (
        pytest.raises(errors.NotFiniteError, match=r"for id 2 in (0|2)$"),
        rec.batch(range(5)),
    ):
        squares(model, broken).backward()
    exact = plain(mlp_like(model), squares, broken)
    for name, each in gradients(model).items():
        assert torch.equal(each.isnan(), exact[name].isnan())


# --- norms ----------------------------------------------------------------------------------------

NORMS = {
    "layer norm": lambda: nn.LayerNorm(6),
    "layer norm without bias": lambda: nn.LayerNorm(6, bias=False),
    "layer norm with a large epsilon": lambda: nn.LayerNorm(6, eps=0.5),
    "layer norm with a frozen weight": lambda: nn.LayerNorm(6),
    "rms norm": lambda: nn.RMSNorm(6),
    "rms norm with an epsilon": lambda: nn.RMSNorm(6, eps=0.25),
}

INPUTS = {
    "[batch, width]": lambda: torch.randn(5, 6),
    "[batch, positions, width]": lambda: torch.randn(5, 3, 6),
    "[batch, ., ., width]": lambda: torch.randn(5, 2, 3, 6),
    "transposed": lambda: torch.randn(5, 6, 4).transpose(1, 2),
    "a part": lambda: torch.randn(5, 4, 15)[:, 1:, 2:14:2],
    "expanded": lambda: torch.randn(5, 1, 6).expand(5, 4, 6),
    "far from zero": lambda: torch.randn(5, 3, 6) + 300,
    "tiny": lambda: torch.randn(5, 3, 6) * 1e-20,
    "huge": lambda: torch.randn(5, 3, 6) * 1e15,
    "constant": lambda: torch.ones(5, 3, 6),
}


def uneven(model, x):
    out = model(x).flatten(1)
    return (out.sin() * torch.linspace(0.5, 1.5, out.shape[1]).to(out.dtype)).sum(1).mean()


@pytest.mark.parametrize("given", INPUTS)
@pytest.mark.parametrize("name", NORMS)
def test_rows_of_norms_are_those_of_exact_gradients(tmp_path, name, given):
    model, x = NORMS[name](), INPUTS[given]()
    for each in model.parameters():
        nn.init.normal_(each)
    if "frozen" in name:
        model.weight.requires_grad_(False)
    with (
        whence.record(model, tmp_path / "s", dim=DIM, dtype="float32") as rec,
        rec.batch(range(5)) as done,
    ):
        uneven(model, x).backward()
    wide = copy.deepcopy(model).double()
    wide.eps = model.eps or torch.finfo(x.dtype).eps  # of the type that it is not any more
    exact = per_sample_gradients(wide, uneven, x.double())
    exact = whence.Sketch(dim=DIM)({name: each.float() for name, each in exact.items()})
    # The mean and the deviation of values far from zero have few digits, in torch as here.
    assert close(done.rows, exact, 1e-3 if given == "far from zero" else 1e-5)


@pytest.mark.parametrize("expand", [False, True], ids=["of its own", "shared by all values"])
@pytest.mark.parametrize("norm", [nn.LayerNorm, nn.RMSNorm])
def test_norms_take_output_gradients_of_any_strides(tmp_path, norm, expand):
    model, x = norm(6), torch.randn(5, 6, 4)

    def loss(model, x):
        out = model(x.transpose(1, 2))
        return (out if expand else out.transpose(1, 2).sin()).flatten(1).sum(1).sum()

    options = {"dim": DIM, "dtype": "float32", "reduction": "sum"}
    with whence.record(model, tmp_path / "s", **options) as rec, rec.batch(range(5)) as done:
        loss(model, x).backward()
    assert close(done.rows, whence.Sketch(dim=DIM)(per_sample_gradients(model, loss, x)))


@pytest.mark.parametrize("scale", [1.0, 0.02])
@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.float64, 1e-5), (torch.bfloat16, 3e-2), (torch.float16, 4e-3)]
)
@pytest.mark.parametrize("norm", [nn.LayerNorm, nn.RMSNorm])
def test_norms_of_other_types_are_those_of_autograd_example_by_example(
    tmp_path, norm, dtype, bound, scale
):
    model, x = norm(16).to(dtype), (torch.randn(5, 3, 16) * scale).to(dtype)
    exact = [plain(model, uneven, x[i : i + 1]) for i in range(5)]
    stacked = {name: torch.stack([each[name] for each in exact]).float() for name in exact[0]}
    with (
        whence.record(model, tmp_path / "s", dim=DIM, dtype="float32") as rec,
        rec.batch(range(5)) as done,
    ):
        uneven(model, x).backward()
    assert close(done.rows, whence.Sketch(dim=DIM)(stacked), bound)


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 2, 5), (4, 1, 16), (2, 7, 33), (5, 3, 257)])
def test_the_cores_norm_gradients_are_what_the_definition_says(shape, centred, threads):
    generator = np.random.default_rng(0)
    values, delta = generator.normal(1, 2, size=(2, *shape)).astype(np.float32)
    weight, bias = norm_gradients(values, delta, 1e-3, centred, threads)
    x = values.astype(np.float64)
    if centred:
        x = x - x.mean(2, keepdims=True)
    x = x / np.sqrt((x**2).mean(2, keepdims=True) + 1e-3)
    assert weight.shape == bias.shape == (shape[0], shape[2])
    assert np.allclose(weight, (delta * x).sum(1), rtol=1e-5, atol=1e-5)
    assert np.allclose(bias, delta.sum(1, dtype=np.float64), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("values", "delta"),
    [((2, 3, 4), (2, 3, 5)), ((2, 3, 4), (1, 3, 4)), ((2, 3, 0), (2, 3, 0))],
)
def test_norm_gradients_of_shapes_that_do_not_fit_are_refused(values, delta):
    arrays = [np.zeros(shape, np.float32) for shape in (values, delta)]
    with pytest.raises(errors.WhenceError):
        norm_gradients(*arrays, 1e-5, True, 1)
