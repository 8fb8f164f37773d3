"""`gat_importance`: attention learned by a graph attention network. Needs torch."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from whence import _arrays
from whence.errors import ShapeError
from whence.hashing.families import rows_of
from whence.hashing.graph import Graph, check_graph
from whence.hashing.selection import classes_of

MAX_HEADS = MAX_WIDTH = 64
"""The most heads of a layer, and values of a head."""

SLOPE = 0.2
"""Of the leaky rectifier that attention scores go through."""


@dataclass(frozen=True)
class _Attention:
    """One layer: heads of a linear map, and two vectors that score the ends of an edge."""

    weight: torch.Tensor  # [inputs, heads * width]
    source: torch.Tensor  # [heads, width]
    target: torch.Tensor  # [heads, width]

    @classmethod
    def drawn(cls, inputs: int, heads: int, width: int, generator: torch.Generator) -> _Attention:
        """Of Glorot's uniform distribution."""

        def uniform(rows: int, columns: int) -> torch.Tensor:
            bound = math.sqrt(6 / (rows + columns))
            values = torch.empty(rows, columns)
            return values.uniform_(-bound, bound, generator=generator).requires_grad_()

        return cls(uniform(inputs, heads * width), uniform(heads, width), uniform(heads, width))

    def __call__(
        self, values: torch.Tensor, sources: torch.Tensor, targets: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """[rows, heads * width] sums over sources, and the [edges, heads] attention."""
        heads, width = self.source.shape
        mapped = (values @ self.weight).view(-1, heads, width)
        # By index_select, whose gradient is summed in one order; that of indexing is not.
        chosen = mapped.index_select(0, sources)
        score = (mapped * self.source).sum(-1).index_select(0, sources)
        score = score + (mapped * self.target).sum(-1).index_select(0, targets)
        score = torch.nn.functional.leaky_relu(score, SLOPE)
        # Less the largest of each target, so that no exponential overflows.
        place = targets[:, None].expand_as(score)
        largest = torch.full((len(values), heads), -torch.inf)
        largest = largest.scatter_reduce(0, place, score.detach(), "amax")
        given = torch.exp(score - largest.index_select(0, targets))
        whole = torch.zeros(len(values), heads).index_add(0, targets, given)
        attention = given / whole.index_select(0, targets)
        sums = torch.zeros_like(mapped).index_add(0, targets, chosen * attention[..., None])
        return sums.flatten(1), attention


def gat_importance(
    graph: Graph,
    rows: NDArray[np.float32],
    labels: NDArray[np.int64],
    *,
    heads: int = 4,
    width: int = 16,
    epochs: int = 150,
    learning_rate: float = 5e-3,
    seed: int = 0,
) -> NDArray[np.float64]:
    """[rows] float64: the attention that each row gets from all rows it is a neighbour of.

    A graph attention network of two layers (Veličković et al., "Graph attention networks", ICLR
    2018), each row attending to its neighbours and itself, is trained to tell the classes apart by
    Adam on all rows; the attention is the mean over heads and layers. It does not look at the
    graph's weights.

    Args:
        graph: From `hash_graph` or `distance_graph`.
        rows: [rows, dim] float32, features of comparable scale.
        labels: [rows] bools, integers or strings.
        heads: Heads of a layer, at most 64.
        width: Values of a head, at most 64.
        epochs: Steps of Adam.
        learning_rate: Of Adam.
        seed: Of the first weights, 0 to 2**63 - 1.

    Returns:
        The attention received; over all rows it sums to their number. The same on one machine and
        number of threads, not to the bit on others.
        O(epochs · (rows · dim + edges) · heads · width).

    Raises:
        ArgumentError: If an argument is out of range.
        DtypeError: If one is no number, graph is none, rows are not float32, or labels are floats.
        ShapeError: If rows or labels are not as many as the graph has.
        NotFiniteError: If rows hold a NaN or an infinity, or training diverges.
    """
    check_graph(graph)
    heads = _arrays.integer("heads", heads, 1, MAX_HEADS)
    width = _arrays.integer("width", width, 1, MAX_WIDTH)
    epochs = _arrays.integer("epochs", epochs, 0)
    rate = _arrays.number("learning_rate", learning_rate, positive=True)
    seed = _arrays.integer("seed", seed, 0, 2**63 - 1)
    rows = rows_of("rows", rows)
    dim = rows.shape[1]
    classes = classes_of(labels)
    for name, found in (("rows", len(rows)), ("labels", len(classes))):
        if found != len(graph):
            raise ShapeError(f"{name} must be the {len(graph)} of the graph, got {found}")
    itself = torch.arange(len(rows))
    sources = torch.cat([torch.from_numpy(graph.neighbours), itself])
    targets = torch.cat([torch.from_numpy(graph.targets), itself])
    values, wanted = torch.from_numpy(rows), torch.from_numpy(classes)
    generator = torch.Generator().manual_seed(seed)
    first = _Attention.drawn(dim, heads, width, generator)
    second = _Attention.drawn(heads * width, heads, width, generator)
    last = torch.zeros(heads * width, int(classes.max()) + 1, requires_grad=True)
    parameters = [last, *vars(first).values(), *vars(second).values()]
    optimizer = torch.optim.Adam(parameters, lr=rate)

    def forward() -> tuple[torch.Tensor, torch.Tensor]:
        hidden, near = first(values, sources, targets)
        hidden, far = second(torch.nn.functional.elu(hidden), sources, targets)
        return torch.nn.functional.elu(hidden) @ last, (near + far) / 2

    with torch.enable_grad():
        for _ in range(epochs):
            optimizer.zero_grad()
            loss = torch.nn.functional.cross_entropy(forward()[0], wanted)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    with torch.no_grad():
        attention = forward()[1].mean(1).double().numpy()
    importance = np.bincount(sources.numpy(), attention, len(rows)).astype(np.float64)
    _arrays.finite("importance", importance)
    return importance
