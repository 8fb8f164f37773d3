"""Batches, importance and what is selected by it."""

import math
from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from whence import errors
from whence.hashing import (
    distance_graph,
    select_instances,
    softmax_importance,
    stratified_batches,
)
from whence.hashing.gat import gat_importance
from whence.hashing.graph import Graph


def normal(rows, dim, seed=0):
    return np.random.default_rng(seed).standard_normal((rows, dim)).astype(np.float32)


@settings(max_examples=100, deadline=None)
@given(
    labels=st.lists(st.integers(0, 5), min_size=1, max_size=200),
    batch=st.integers(1, 60),
    seed=st.integers(0, 2**64 - 1),
)
def test_batches_have_one_size_and_one_mixture_of_classes_to_within_one(labels, batch, seed):
    batches = stratified_batches(labels, batch, seed=seed)
    assert len(batches) == -(-len(labels) // batch)
    assert sorted(np.concatenate(batches).tolist()) == list(range(len(labels)))
    sizes = [len(each) for each in batches]
    assert max(sizes) - min(sizes) <= 1
    assert max(sizes) <= batch
    for label in set(labels):
        counts = [sum(labels[row] == label for row in each) for each in batches]
        assert max(counts) - min(counts) <= 1


def test_a_class_of_few_rows_is_spread():
    labels = ["rare"] * 4 + ["common"] * 996
    batches = stratified_batches(labels, 100)
    assert sorted((each < 4).sum() for each in batches) == [0] * 6 + [1] * 4


def test_which_rows_are_together_depends_on_the_seed():
    first, again, other = (stratified_batches([0] * 50, 10, seed=seed) for seed in (1, 1, 2))
    assert [each.tolist() for each in first] == [each.tolist() for each in again]
    assert [each.tolist() for each in first] != [each.tolist() for each in other]


def graph_of(lists):
    starts = np.cumsum([0] + [len(each) for each in lists])
    pairs = [pair for each in lists for pair in each]
    return Graph(
        starts.astype(np.int64),
        np.array([row for row, _ in pairs], np.int64),
        np.array([weight for _, weight in pairs], np.float32),
    )


LISTS = [[(1, 0.5), (2, 0.25)], [(2, 1.0)], [], [(2, 0.0), (0, 0.125)]]


@pytest.mark.parametrize("beta", [-3.0, 0.0, 1.0, 5.0, 1e4, -1e4])
def test_importance_is_the_attention_received_as_a_source(beta):
    expected = [0.0] * 4
    for target, sources in enumerate(LISTS):
        edges = [*sources, (target, 1.0)]
        # Over the largest exponent, which leaves the shares as they are.
        largest = max(beta * weight for _, weight in edges)
        given_ = [math.exp(beta * weight - largest) for _, weight in edges]
        for (source, _), part in zip(edges, given_, strict=True):
            expected[source] += part / sum(given_)
    found = softmax_importance(graph_of(LISTS), beta=beta)
    assert found == pytest.approx(expected)
    assert found.sum() == pytest.approx(4)


def test_the_most_important_rows_of_each_class_are_kept():
    labels = ["b"] * 10 + ["a"] * 50
    importance = np.arange(60) % 25 * 1.0
    graph = graph_of([[] for _ in range(60)])
    found = select_instances(
        graph, normal(60, 2), labels, reduction=0.9, scorer=lambda *_: importance
    )
    # One of the 10 and 5 of the 50; 24, 24, 23, 23 and the first of two equal rows of 22.
    assert found.indices.tolist() == [9, 22, 23, 24, 48, 49]
    assert found.importance.tolist() == importance.tolist()
    assert found.graph is graph


@pytest.mark.parametrize(
    ("reduction", "sizes"), [(0, [3, 50]), (1, [1, 1]), (0.96, [1, 2]), (0.5, [2, 25])]
)
def test_each_class_keeps_its_share_and_at_least_one(reduction, sizes):
    labels = np.array([0] * 3 + [1] * 50)
    graph = graph_of([[] for _ in labels])
    kept = select_instances(graph, normal(53, 2), labels, reduction=reduction).indices
    assert np.bincount(labels[kept]).tolist() == sizes


@pytest.fixture(scope="module")
def digits():
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    spread = x.std(0)
    x = (x - x.mean(0)) / np.where(spread > 0, spread, 1)
    return x.astype(np.float32), y


def accuracy(x, y, kept, others):
    """Of the nearest kept row's class."""
    squares = ((x[others][:, None] - x[kept]) ** 2).sum(-1)
    return (y[kept][squares.argmin(1)] == y[others]).mean()


def test_selection_by_importance_beats_random_on_most_seeds(digits):
    x, y = digits
    wins = 0
    for seed in range(5):
        order = np.random.default_rng(seed).permutation(len(x))
        part, others = order[:1257], order[1257:]
        rows, labels = x[part], y[part]
        graph = distance_graph(rows, stratified_batches(labels, 256, seed=seed))
        ours = select_instances(graph, rows, labels).indices
        assert 40 <= len(ours) <= 60
        random = []
        for draw in range(10):
            number = np.random.default_rng([seed, draw]).random(len(part))
            chosen = select_instances(graph, rows, labels, scorer=lambda *_, n=number: n).indices
            random.append(accuracy(x, y, part[chosen], others))
        wins += accuracy(x, y, part[ours], others) > np.mean(random)
    assert wins >= 3


@pytest.fixture
def one_torch_thread():
    """Threads wait for each other longer than these small products take."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_the_network_learns_and_is_the_same_for_one_seed(one_torch_thread):
    # Two classes apart, and rows between them that are neighbours of both.
    x = normal(60, 4)
    labels = np.arange(60) % 2
    x[:, 0] += 6 * labels
    graph = distance_graph(x, [range(60)], k=8)
    found = gat_importance(graph, x, labels, epochs=25)
    assert found.shape == (60,)
    assert found.sum() == pytest.approx(60, rel=1e-5)
    assert (found > 0).all()
    assert (gat_importance(graph, x, labels, epochs=25) == found).all()
    assert (gat_importance(graph, x, labels, epochs=25, seed=1) != found).any()
    scorer = partial(gat_importance, epochs=5)
    kept = select_instances(graph, x, labels, reduction=0.9, scorer=scorer).indices
    assert np.bincount(labels[kept]).tolist() == [3, 3]
    # What other rows get changes as the network learns; untrained it hardly prefers any.
    assert not np.allclose(found, gat_importance(graph, x, labels, epochs=0), rtol=0.05)


def test_a_layer_of_the_network_is_the_softmax_of_its_scores():
    import torch

    from whence.hashing.gat import _Attention

    layer = _Attention.drawn(3, 2, 4, torch.Generator().manual_seed(0))
    values = torch.from_numpy(normal(5, 3))
    sources, targets = torch.tensor([1, 2, 0, 3, 4, 0, 1]), torch.tensor([0, 0, 0, 1, 1, 3, 3])
    sums, attention = layer(values, sources, targets)
    mapped = (values @ layer.weight).view(5, 2, 4)
    sent, met = (mapped * layer.source).sum(-1), (mapped * layer.target).sum(-1)
    for target in range(5):
        edges = torch.nonzero(targets == target)[:, 0]
        if not len(edges):
            assert (sums[target] == 0).all()
            continue
        scores = torch.stack([sent[sources[e]] + met[target] for e in edges])
        expected = torch.softmax(torch.where(scores > 0, scores, 0.2 * scores), 0)
        assert torch.allclose(attention[edges], expected, atol=1e-6)
        whole = sum(expected[i, :, None] * mapped[sources[e]] for i, e in enumerate(edges))
        assert torch.allclose(sums[target], whole.flatten(), atol=1e-5)


def test_classes_of_any_numbers_are_taken():
    found = gat_importance(GRAPH, ROWS, [2**62, -5, 2**62, 0], epochs=1)
    assert (found == gat_importance(GRAPH, ROWS, ["c", "a", "c", "b"], epochs=1)).all()
    assert found.sum() == pytest.approx(4, rel=1e-5)


GRAPH = graph_of(LISTS)
ROWS = normal(4, 3)
ZEROS = np.zeros(4, np.int64)


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: stratified_batches([], 3), errors.ShapeError, "non-empty list"),
        (lambda: stratified_batches(5, 3), errors.ShapeError, "non-empty list"),
        (lambda: stratified_batches([0.5, 1.5], 3), errors.DtypeError, "got float64"),
        (lambda: stratified_batches([0, "a"], 3), errors.DtypeError, "labels"),
        (lambda: stratified_batches([0, 1], 0), errors.ArgumentError, "batch must be at least 1"),
        (lambda: stratified_batches([0, 1], 2, seed=-1), errors.ArgumentError, "seed"),
        (lambda: softmax_importance(GRAPH, beta=math.inf), errors.ArgumentError, "beta"),
        (lambda: select_instances(GRAPH, ROWS[:3], [0] * 4), errors.ShapeError, "rows must be the"),
        (lambda: select_instances(GRAPH, ROWS, [0] * 3), errors.ShapeError, "labels must be the 4"),
        (
            lambda: select_instances(GRAPH, ROWS, [0] * 4, reduction=1.1),
            errors.ArgumentError,
            "reduction must be from 0 to 1",
        ),
        (
            lambda: select_instances(GRAPH, ROWS, [0] * 4, scorer=lambda *_: np.ones(3)),
            errors.ShapeError,
            "importance must be",
        ),
        (
            lambda: select_instances(GRAPH, ROWS, [0] * 4, scorer=lambda *_: np.full(4, np.nan)),
            errors.NotFiniteError,
            "importance must be finite",
        ),
        (
            lambda: gat_importance(GRAPH, ROWS, np.zeros(4, int), heads=0),
            errors.ArgumentError,
            "hea",
        ),
        (lambda: gat_importance(GRAPH, ROWS[:3], np.zeros(3, int)), errors.ShapeError, "the 4 of"),
        (lambda: gat_importance(GRAPH, ROWS, ZEROS[:3]), errors.ShapeError, "labels must be the 4"),
        (lambda: gat_importance(GRAPH, ROWS, ZEROS * 0.5), errors.DtypeError, "labels must be"),
        (
            lambda: gat_importance(GRAPH, ROWS, np.zeros(4, int), epochs=-1),
            errors.ArgumentError,
            "ep",
        ),
    ],
)
def test_wrong_input_is_named(call, error, match):
    with pytest.raises(error, match=match):
        call()
