"""GAIS: the most important rows of each class, by the attention that neighbours pay them.

After the abstract of "Scalable Graph Attention-based Instance Selection via Mini-Batch Sampling and
Hierarchical Hashing" (arXiv 2502.20293; AI Open 6, 2025). Its formulas are not public; these are
our reading.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from whence import _arrays, _core
from whence._interrupts import interruptible
from whence.errors import ArgumentError, DtypeError, ShapeError
from whence.hashing.families import MAX_SEED, rows_of
from whence.hashing.graph import Graph, check_graph

Scorer: TypeAlias = Callable[[Graph, NDArray[np.float32], NDArray[np.int64]], NDArray[np.float64]]
"""(graph, [rows, dim] rows, [rows] numbers of classes) -> [rows] importance."""


@dataclass(frozen=True, eq=False)
class Selection:
    """The rows that were kept.

    Attributes:
        indices: [kept] int64, sorted.
        importance: [rows] float64; larger is more important.
        graph: What importance was computed on.
    """

    indices: NDArray[np.int64]
    importance: NDArray[np.float64]
    graph: Graph


def stratified_batches(labels: Any, batch: int, *, seed: int = 0) -> list[NDArray[np.int64]]:
    """Rows in ⌈rows / batch⌉ batches of about one size and one mixture of classes.

    The shuffled rows of each class are dealt to the batches in turn, each class from where the one
    before it stopped: sizes, and how many of a class each batch has, differ by at most one.

    Args:
        labels: [rows] bools, integers or strings.
        batch: The most rows of a batch.
        seed: 0 to 2**64 - 1.

    Returns:
        [about batch] int64 each, sorted. O(rows log rows).

    Raises:
        ArgumentError: If batch or seed is out of range.
        DtypeError: If labels are floats, or of several types.
        ShapeError: If labels are none, or not one-dimensional.
    """
    classes = classes_of(labels)
    batch = _arrays.integer("batch", batch, 1)
    seed = _arrays.integer("seed", seed, 0, MAX_SEED)
    order = _core.shuffled(np.arange(len(classes)), seed, "hash.batches")
    # Class after class, each in the order of the shuffle, dealt without a break.
    dealt = order[interruptible(np.argsort, classes[order], kind="stable")]
    count = -(-len(classes) // batch)
    return [np.sort(dealt[first::count]) for first in range(count)]


def softmax_importance(
    graph: Graph,
    rows: NDArray[np.float32] | None = None,
    labels: NDArray[np.int64] | None = None,
    *,
    beta: float = 5.0,
) -> NDArray[np.float64]:
    """[rows] float64: the attention that each row gets from all rows it is a neighbour of.

    Each row shares an attention of 1 among its neighbours and itself, by the softmax of
    `beta · similarity`, with 1 for its similarity to itself. The sum over rows is their number.

    Args:
        graph: From `hash_graph` or `distance_graph`.
        rows: Not used; as other scorers have it.
        labels: Not used; as other scorers have it.
        beta: How much more a similar neighbour gets; 0 shares equally.

    Raises:
        ArgumentError: If beta is not finite.
        DtypeError: If it is no number, or graph is none.
    """
    check_graph(graph)
    beta = _arrays.number("beta", beta)
    targets, weights = graph.targets, graph.weights.astype(np.float64)
    # Over a row's largest exponent, which is that of the most or the least similar.
    logits = beta * weights
    largest = np.full(len(graph), beta)
    np.maximum.at(largest, targets, logits)
    given = np.exp(logits - largest[targets])
    kept = np.exp(beta - largest)
    whole = kept + np.bincount(targets, given, len(graph))
    received = np.bincount(graph.neighbours, given / whole[targets], len(graph))
    return received + kept / whole


def select_instances(
    graph: Graph,
    rows: Any,
    labels: Any,
    *,
    reduction: float = 0.96,
    scorer: Scorer = softmax_importance,
) -> Selection:
    """The most important rows of each class.

    Args:
        graph: From `hash_graph` or `distance_graph` of the rows.
        rows: [rows, dim] float32, for scorers that look at them.
        labels: [rows] bools, integers or strings.
        reduction: The share of each class that is left out, 0 to 1; a class keeps
            `(1 - reduction) · size` rows to the nearest whole number, halves up, and at least one.
        scorer: `softmax_importance`, or `whence.hashing.gat.gat_importance`, or one of your own.

    Returns:
        Selection; of equal importance the lower rows. O(rows log rows + edges) and the scorer's.

    Raises:
        ArgumentError: If reduction is out of range, or a scorer's importance is not [rows].
        DtypeError: If rows are not float32, labels are floats, or of several types, or graph or
            scorer is none.
        ShapeError: If there are not as many rows and labels as the graph has.
        NotFiniteError: If rows or importance hold a NaN or an infinity.
    """
    check_graph(graph)
    if not callable(scorer):
        raise DtypeError(f"scorer must be a function, got {_arrays.describe(scorer)}")
    rows = rows_of("rows", rows)
    classes = classes_of(labels)
    for name, found in (("rows", len(rows)), ("labels", len(classes))):
        if found != len(graph):
            raise ShapeError(f"{name} must be the {len(graph)} of the graph, got {found}")
    reduction = _arrays.number("reduction", reduction)
    if not 0 <= reduction <= 1:
        raise ArgumentError(f"reduction must be from 0 to 1, got {reduction}")
    importance = np.asarray(scorer(graph, rows, classes), np.float64)
    if importance.shape != (len(graph),):
        got = list(importance.shape)
        raise ShapeError(f"importance must be [{len(graph)}], got {got}")
    _arrays.finite("importance", importance)
    kept = []
    for members in (np.flatnonzero(classes == number) for number in range(classes.max() + 1)):
        count = max(1, int((1 - reduction) * len(members) + 0.5))
        kept.append(members[np.argsort(-importance[members], kind="stable")[:count]])
    return Selection(np.sort(np.concatenate(kept)), importance, graph)


def classes_of(labels: Any) -> NDArray[np.int64]:
    """The number of the class of each row, classes in sorted order.

    Raises:
        DtypeError: If labels are floats, or of several types.
        ShapeError: If there are none, or they are not one-dimensional.
    """
    array = _arrays.to_numpy(labels)
    if not _arrays.is_list(array) or len(array) == 0:
        raise ShapeError(f"labels must be a non-empty list, got {_arrays.describe(labels)}")
    array = _arrays.column("labels", array, len(array))
    if array.dtype.kind == "f":
        raise DtypeError(f"labels must be bools, integers or strings, got {array.dtype}")
    if array.dtype == object:
        return _numbers_of(array.tolist())
    return interruptible(np.unique, array, return_inverse=True)[1].astype(np.int64)


def _numbers_of(texts: list[str]) -> NDArray[np.int64]:
    """The number of each among all of them, sorted, each once.

    A part at a time: numpy sorts texts, and takes lists of numbers, where Ctrl-C is not heard.
    """
    found, part = np.empty(len(texts), np.int64), 1 << 16
    parts = [texts[first : first + part] for first in range(0, len(texts), part)]
    names: set[str] = set()
    for some in parts:
        names.update(some)
    numbers = {text: number for number, text in enumerate(sorted(names))}
    for number, some in enumerate(parts):
        found[number * part :][: len(some)] = [numbers[text] for text in some]
    return found
