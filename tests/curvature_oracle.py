"""Curvature by its definition, example by example in float64, and models to try it on."""

import math
from itertools import pairwise

import numpy as np
import torch
import torch.nn.functional as F
from oracle import per_sample_gradients
from torch import nn


def squares(model, x):
    """A loss that is the mean over examples of a sum of uneven squares."""
    out = model(x).flatten(1)
    weights = torch.linspace(0.5, 1.5, out.shape[1], dtype=out.dtype)
    return ((out - 0.3).square() * weights).sum(1).mean()


def tokens(model, x):
    """Each token from those before it; an example's own loss is the mean over its tokens."""
    return F.cross_entropy(model(x)[:, :-1].transpose(1, 2), x[:, 1:])


class Conv1D(nn.Module):
    """As Hugging Face has it: a Linear whose weight is [in, out]."""

    def __init__(self, nf, nx):
        super().__init__()
        self.nf = nf
        self.weight = nn.Parameter(torch.randn(nx, nf) / 2)
        self.bias = nn.Parameter(torch.randn(nf) / 2)

    def forward(self, x):
        return x @ self.weight + self.bias


class Twice(nn.Module):
    """A layer that is used twice in one forward pass."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(5, 5)

    def forward(self, x):
        return self.layer(torch.tanh(self.layer(x)))


class Table(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.table = nn.Embedding(11, 5, **options)

    def forward(self, x):
        return self.table(x).sin()


class Tied(nn.Module):
    """A table whose weight is that of the last layer as well."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(11, 5)
        self.middle = nn.Linear(5, 5)
        self.head = nn.Linear(5, 11, bias=False)
        self.head.weight = self.table.weight

    def forward(self, x):
        return self.head(torch.tanh(self.middle(self.table(x))))


class Shared(nn.Module):
    """Two layers that have one weight, or one bias."""

    def __init__(self, what, *, conv=False):
        super().__init__()
        self.one, self.other = (nn.Conv2d(2, 2, 1) if conv else nn.Linear(4, 4) for _ in range(2))
        setattr(self.other, what, getattr(self.one, what))

    def forward(self, x):
        return self.other(torch.tanh(self.one(x)))


class Head(nn.Module):
    """A last layer of no class that has a rule."""

    def __init__(self, weight):
        super().__init__()
        self.weight = weight

    def forward(self, x):
        return x @ self.weight.T


class ByHand(nn.Module):
    """A first layer, or a table, whose weight is that of a last layer as well."""

    def __init__(self, first):
        super().__init__()
        self.first = first
        self.head = Head(first.weight)

    def forward(self, x):
        return self.head(torch.tanh(self.first(x)))


class Attention(nn.Module):
    """Attention, and the same by hand with what its projections see and return."""

    def __init__(self, form, **options):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True, **options)
        self.form = form

    def sources(self, x):
        other = x.flip(1) * 0.5
        return {"self": (x, x, x), "cross": (x, other, other), "three": (x, other, other + 1)}[
            self.form
        ]

    def forward(self, x):
        return self.attention(*self.sources(x), need_weights=False)[0]

    def by_hand(self, x):
        """[T, width] of one example to the output, and [(parameter, first value, in, out)]."""
        module = self.attention
        parts = {
            "self": [(0, 24)],
            "cross": [(0, 8), (8, 24)],
            "three": [(0, 8), (8, 16), (16, 24)],
        }
        seen, outputs = [], []
        inputs = self.sources(x[None])
        for (first, end), values in zip(parts[self.form], inputs, strict=False):
            bias = None if module.in_proj_bias is None else module.in_proj_bias[first:end]
            out = F.linear(values[0], module.in_proj_weight[first:end], bias)
            seen.append(("attention.in_proj_weight", first * 8, values[0], out))
            outputs.append(out)
        query, key, value = torch.cat(outputs, 1).split(8, 1)
        heads = [each.reshape(len(x), 2, 4).transpose(0, 1) for each in (query, key, value)]
        weights = (heads[0] @ heads[1].mT / math.sqrt(4)).softmax(-1)
        mixed = (weights @ heads[2]).transpose(0, 1).reshape(len(x), 8)
        out = F.linear(mixed, module.out_proj.weight, module.out_proj.bias)
        seen.append(("attention.out_proj.weight", 0, mixed, out))
        return out, seen


def _positions_of(name, module, values, output):
    """[(parameter, first value, inputs, outputs)] of one call, outputs as [positions, width]."""
    weight = f"{name}.weight" if name else "weight"
    if isinstance(module, nn.Conv2d):
        inside, outside = module.in_channels // module.groups, module.out_channels // module.groups
        patches = F.unfold(
            values, module.kernel_size, module.dilation, module.padding, module.stride
        )
        size = inside * math.prod(module.kernel_size)
        return [
            (
                weight,
                group * outside * size,
                patches[0, group * size : (group + 1) * size].T,
                (
                    output,
                    lambda d, group=group: d[0].flatten(1).T[:, group * outside :][:, :outside],
                ),
            )
            for group in range(module.groups)
        ]
    width = output.shape[-1]
    if isinstance(module, nn.Embedding):
        left_out = -1 if module.padding_idx is None else module.padding_idx
        counted = (values.reshape(-1, 1) != left_out).to(output.dtype)
        shape = (output, lambda d: d.reshape(-1, width) * counted)
        return [(weight, 0, values.reshape(-1, 1), shape)]
    return [
        (weight, 0, values.reshape(-1, values.shape[-1]), (output, lambda d: d.reshape(-1, width)))
    ]


def positions(model, loss, *batch):
    """(parameter, first value) -> of each example, [positions, in] and [positions, out].

    The inputs of a weight, or the indices of a table, and the gradient of the example's own loss
    in the outputs; from plain hooks, one example at a time.
    """
    found = {}
    first_names = {}
    for name, value in model.named_parameters(remove_duplicate=False):
        first_names[id(value)] = min(name, first_names.get(id(value), name))
    canonical = {
        name: first_names[id(value)]
        for name, value in model.named_parameters(remove_duplicate=False)
    }
    for index in range(len(batch[0])):
        example = tuple(each[index : index + 1] for each in batch)
        calls = []
        if isinstance(model, Attention):
            out, seen = model.by_hand(example[0][0])
            total = loss(lambda _, out=out: out[None], *example)
            gradients = torch.autograd.grad(total, [each[3] for each in seen])
            calls = [
                (parameter, first, values, delta)
                for (parameter, first, values, _), delta in zip(seen, gradients, strict=True)
            ]
        else:
            seen = []
            handles = [
                module.register_forward_hook(
                    lambda module, args, output, name=name, seen=seen: seen.extend(
                        _positions_of(name, module, args[0], output)
                    )
                )
                for name, module in model.named_modules()
                if isinstance(module, (nn.Linear, nn.Conv2d, nn.Embedding, Conv1D))
            ]
            total = loss(model, *example)
            for handle in handles:
                handle.remove()
            gradients = torch.autograd.grad(total, [each[3][0] for each in seen])
            calls = [
                (parameter, first, values, shape(delta))
                for (parameter, first, values, (_, shape)), delta in zip(
                    seen, gradients, strict=True
                )
            ]
        one = {}
        for parameter, first, values, delta in calls:
            parameter = canonical[parameter]
            kind = "lookup" if not values.is_floating_point() else "outer"
            one.setdefault((parameter, first, kind), []).append((values, delta))
        for key, parts in one.items():
            joined = [torch.cat(part).detach() for part in zip(*parts, strict=True)]
            found.setdefault(key, []).append(joined)
    return found


def covariances(observed, *, bias):
    """Sums over positions of x xᵀ for output gradients and for inputs, and how many positions."""
    outputs = inputs = terms = 0
    for values, delta in observed:
        for a, d in zip(values.double(), delta.double(), strict=True):
            if not bool((d != 0).any()):
                continue
            a = torch.cat([a, torch.ones(1, dtype=a.dtype)]) if bias else a
            outputs = outputs + torch.outer(d, d)
            inputs = inputs + torch.outer(a, a)
            terms += 1
    return outputs, inputs, terms


def dense(side, length):
    """[length, columns] the eigenvectors of a side; with the bias's row, if it has one, last."""
    found = torch.zeros(length + (side.ones is not None), side.columns, dtype=torch.float64)
    at = 0
    for first, end, matrix in side.parts:
        found[first:end, at : at + matrix.shape[1]] = matrix.double()
        at += matrix.shape[1]
    if side.ones is not None:
        found[-1] = side.ones.double()
    return found


def block_gradients(gradients, block):
    """[examples, rows, columns] of a block; the bias's gradient as one column or row more."""
    whole = gradients[block.parameter].double()
    rows, columns = block.shape
    found = whole.flatten(1)[:, block.start : block.start + rows * columns]
    found = found.reshape(-1, rows, columns)
    if block.bias is not None:
        name, first, length = block.bias
        bias = gradients[name].double()[:, first : first + length]
        axis = 2 if block.ones == "right" else 1
        found = torch.cat([found, bias.unsqueeze(axis)], axis)
    return found


def rotated_gradients(gradients, block):
    """[examples, left, right] the same in the block's eigenbasis."""
    found = block_gradients(gradients, block)
    if block.kind == "lookup":
        return (found @ dense(block.left, block.shape[1])).mT
    if block.left is not None:
        found = dense(block.left, block.shape[0]).T @ found
    if block.right is not None:
        found = found @ dense(block.right, block.shape[1])
    return found


def exact_gradients(model, loss, *batch):
    """(kind) -> name -> [examples, *shape]: exact gradients, a table's apart from a weight's."""
    if not isinstance(model, Tied):
        found = per_sample_gradients(model, loss, *batch)
        for name, module in model.named_modules():
            if isinstance(module, nn.Embedding) and module.padding_idx is not None:
                found[f"{name}.weight"][:, module.padding_idx] = 0  # torch.func does not know it
        return {"outer": found, "lookup": found, "vector": found}
    apart = Tied().to(model.head.weight.dtype)
    apart.head = nn.Linear(5, 11, bias=False, dtype=model.head.weight.dtype)
    apart.load_state_dict(model.state_dict())
    found = per_sample_gradients(apart, loss, *batch)
    table = {**found, "head.weight": found["table.weight"]}
    return {"outer": found, "lookup": table, "vector": found}


def batches(*columns, sizes=(3, 4, 2)):
    """Batches of these sizes, as tuples."""
    edges = np.cumsum([0, *sizes])
    return [tuple(each[first:end] for each in columns) for first, end in pairwise(edges)]


def wide(model):
    """The model in float64, with weights that are not small."""
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5)
    return model.double()


def cases():
    """name -> (model, loss, inputs of nine examples)."""
    indices = torch.randint(0, 11, (9, 6))
    indices[:, 1] = indices[:, 0]  # a row that is looked up twice
    indices[0] = 0
    return {
        "linear": (nn.Linear(6, 5), squares, torch.randn(9, 6)),
        "linear without bias": (nn.Linear(6, 5, bias=False), squares, torch.randn(9, 6)),
        "linear over positions": (nn.Linear(6, 5), squares, torch.randn(9, 4, 6)),
        "perceptron": (
            nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)),
            squares,
            torch.randn(9, 6),
        ),
        "conv2d": (nn.Conv2d(3, 4, (3, 2), padding=(1, 2)), squares, torch.randn(9, 3, 5, 4)),
        "conv2d without bias": (nn.Conv2d(2, 3, 2, bias=False), squares, torch.randn(9, 2, 4, 4)),
        "conv2d grouped": (
            nn.Conv2d(4, 6, 3, stride=2, dilation=2, groups=2, padding=(2, 1)),
            squares,
            torch.randn(9, 4, 9, 8),
        ),
        "conv1d transposed": (
            nn.Sequential(Conv1D(5, 6), nn.Tanh(), Conv1D(3, 5)),
            squares,
            torch.randn(9, 4, 6),
        ),
        "embedding": (Table(), squares, indices),
        "embedding with padding": (Table(padding_idx=0), squares, indices),
        "twice": (Twice(), squares, torch.randn(9, 5)),
        "tied": (Tied(), tokens, indices),
        "attention": (Attention("self"), squares, torch.randn(9, 5, 8)),
        "attention without bias": (Attention("self", bias=False), squares, torch.randn(9, 5, 8)),
        "attention to another sequence": (Attention("cross"), squares, torch.randn(9, 5, 8)),
        "attention with three inputs": (Attention("three"), squares, torch.randn(9, 5, 8)),
        "layer norm": (
            nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5), nn.Linear(5, 2)),
            squares,
            torch.randn(9, 3, 6),
        ),
    }


NAMES = list(cases())


def case(name):
    """A model in float64, its loss, its inputs."""
    torch.manual_seed(3)
    model, loss, x = cases()[name]
    return wide(model), loss, x.double() if x.is_floating_point() else x
