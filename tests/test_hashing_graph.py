"""Graphs by code and by distance, and near duplicates: against all pairs in plain Python."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from whence import errors
from whence.hashing import (
    PStableHash,
    distance_graph,
    hash_graph,
    near_duplicates,
    stratified_batches,
)
from whence.hashing.families import pairs_of
from whence.hashing.graph import Graph


def normal(rows, dim, seed=0):
    return np.random.default_rng(seed).standard_normal((rows, dim)).astype(np.float32)


def lists(graph):
    """The neighbours of each row with their weights."""
    return [
        list(zip(graph.neighbours[a:b].tolist(), graph.weights[a:b].tolist(), strict=True))
        for a, b in zip(graph.starts, graph.starts[1:], strict=False)
    ]


@settings(max_examples=30, deadline=None)
@given(
    rows=st.integers(1, 40),
    levels=st.integers(1, 3),
    hashes=st.integers(1, 9),
    k=st.integers(1, 50),
    seed=st.integers(0, 2**64 - 1),
    threads=st.integers(1, 3),
)
def test_neighbours_by_code_are_those_of_all_pairs(rows, levels, hashes, k, seed, threads):
    values = normal(rows, 4, seed % 997)
    band = 1 + hashes // 3
    graph = hash_graph(
        values,
        hashes=hashes,
        width=1.0,
        levels=levels,
        band=band,
        cap=4096,
        k=k,
        seed=seed,
        threads=threads,
    )
    codes = PStableHash(hashes, width=1.0, levels=levels, seed=seed).codes(values)
    for row, found in enumerate(lists(graph)):
        expected = []
        for other in range(rows):
            same = [(codes[row] >> level) == (codes[other] >> level) for level in range(levels)]
            bands = [each[at : at + band] for each in same for at in range(0, hashes, band)]
            if other != row and any(len(each) == band and each.all() for each in bands):
                weight = sum(each.mean() / 2**level for level, each in enumerate(same))
                expected.append((weight / sum(0.5**level for level in range(levels)), other))
        expected = sorted(expected, key=lambda pair: (-round(pair[0], 9), pair[1]))[:k]
        assert [other for other, _ in found] == [other for _, other in expected]
        assert [weight for _, weight in found] == pytest.approx([weight for weight, _ in expected])


def test_views_see_some_features_each_and_are_averaged():
    rows = normal(60, 9, 3)
    graph = hash_graph(rows, hashes=8, width=2.0, views=3, band=1, cap=65536, k=59, seed=4)
    # Whatever features a view sees, equal rows agree in all and the weights are of 3 * 8 matches.
    assert np.allclose(graph.weights * 24, np.round(graph.weights * 24), atol=1e-5)
    assert not np.allclose(graph.weights * 8, np.round(graph.weights * 8), atol=1e-2)
    changed = rows.copy()
    changed[:, 0] += 100 * normal(60, 1, 5)[:, 0]

    def total(values, seed):
        options = {"hashes": 8, "features": 4, "cap": 65536, "k": 59, "seed": seed}
        return hash_graph(values, **options).weights.sum()

    seen = sum(total(rows, seed) != total(changed, seed) for seed in range(40))
    # Feature 0 is one of 4 out of 9: binomial of 40 times 4/9, three standard deviations.
    assert abs(seen - 40 * 4 / 9) < 3 * math.sqrt(40 * 4 / 9 * 5 / 9)


def test_a_full_bucket_gives_no_more_pairs_than_its_cap():
    rows = np.ones((500, 3), np.float32)
    graph = hash_graph(rows, hashes=4, band=4, cap=100, k=500)
    assert len(graph.neighbours) == 200
    assert (graph.weights == 1).all()
    assert {tuple(edge) for edge in graph.edges} == {tuple(edge[::-1]) for edge in graph.edges}
    other = hash_graph(rows, hashes=4, band=4, cap=100, k=500, seed=1)
    assert other.edges.tolist() != graph.edges.tolist()


def test_threads_change_no_graph():
    rows = normal(300, 12)
    graphs = [
        hash_graph(rows, levels=2, views=2, cap=20, threads=threads, width=3.0)
        for threads in (1, 3)
    ]
    assert len(graphs[0].weights) > 300
    for name in ("starts", "neighbours", "weights"):
        assert (getattr(graphs[0], name) == getattr(graphs[1], name)).all()


@pytest.fixture(scope="module")
def digits():
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    spread = x.std(0)
    x = (x - x.mean(0)) / np.where(spread > 0, spread, 1)
    return x.astype(np.float32), y


def homophily(graph, labels):
    return (labels[graph.targets] == labels[graph.neighbours]).mean()


def test_several_views_join_rows_of_one_class_more_often_than_one(digits):
    x, y = digits
    one, several = [], []
    for seed in range(5):
        part = np.random.default_rng(seed).permutation(len(x))[:1257]
        graphs = [hash_graph(x[part], views=views, seed=seed) for views in (1, 3)]
        # The same budget: as many edges, to within a twentieth.
        assert abs(len(graphs[0].weights) / len(graphs[1].weights) - 1) < 0.05
        one.append(homophily(graphs[0], y[part]))
        several.append(homophily(graphs[1], y[part]))
    assert np.mean(several) > np.mean(one) + 0.1


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 30),
    batch=st.integers(1, 12),
    k=st.none() | st.integers(1, 40),
    threshold=st.none() | st.floats(0.01, 1.0),
    seed=st.integers(0, 1000),
)
def test_neighbours_by_distance_are_those_of_a_sort(rows, batch, k, threshold, seed):
    if k is None and threshold is None:
        k = 3
    values = normal(rows, 3, seed)
    batches = stratified_batches(np.arange(rows) % 3, batch, seed=seed)
    found = lists(distance_graph(values, batches, k=k, threshold=threshold))
    for members in batches:
        inside = values[members].astype(np.float64)
        squares = ((inside[:, None] - inside) ** 2).sum(-1)
        apart = np.sqrt(squares[np.triu_indices(len(members), 1)])
        sigma = np.median(apart) if apart.size else 1.0
        similar = np.exp(-squares / (2 * sigma**2))
        for at, row in enumerate(members):
            order = [i for i in np.argsort(squares[at], kind="stable") if i != at]
            if threshold is not None:
                # Within rounding of the threshold either answer is right.
                assert all(weight > threshold - 1e-5 for _, weight in found[row])
                order = [i for i in order if similar[at, i] > threshold + 1e-5]
                assert len(found[row]) >= len(order[:k])
            expected = members[order[:k]].tolist()
            assert [other for other, _ in found[row]][: len(expected)] == expected
            weights = [weight for _, weight in found[row]][: len(expected)]
            assert weights == pytest.approx(similar[at, order[:k]].tolist(), rel=1e-4)


def test_a_batch_of_equal_rows_is_defined():
    rows = np.ones((5, 2), np.float32)
    graph = distance_graph(rows, [range(5)], k=2)
    assert graph.weights.tolist() == [1.0] * 10
    rows[4] = 7
    graph = distance_graph(rows, [range(5)], k=4)
    assert [weight for _, weight in lists(graph)[4]] == [0.0] * 4
    assert distance_graph(rows, [[row] for row in range(5)]).neighbours.tolist() == []
    # Only what is equal passes a threshold where the median is 0.
    assert [len(each) for each in lists(distance_graph(rows, [range(5)], threshold=0.5))] == [
        3,
        3,
        3,
        3,
        0,
    ]


def components(near):
    """The lowest member of each component, by repeated sweeps."""
    lowest = np.arange(len(near))
    for _ in range(len(near)):
        lowest = np.where(near, lowest, len(near)).min(1)
    return lowest


def test_groups_are_the_components_of_pairs_above_the_threshold():
    kinds = normal(30, 40)
    rows = kinds[np.arange(150) % 30] + 0.1 * normal(150, 40, 1)
    rows[7] = rows[100] = 0
    unit = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-9)
    near = unit @ unit.T >= 0.95
    near[7, 7] = near[100, 100] = near[7, 100] = near[100, 7] = True
    found = near_duplicates(rows.astype(np.float32), threshold=0.95, hashes=512, band=8)
    expected = components(near)
    assert len(set(expected.tolist())) < 60
    assert found.tolist() == expected.tolist()


def test_equal_rows_are_one_group_however_many():
    rows = np.tile(normal(2, 5), (2000, 1))
    assert near_duplicates(rows, threshold=1.0, cap=1).tolist() == [0, 1] * 2000
    # The angle counts, not the length; the opposite is no duplicate.
    scaled = np.stack([rows[0], 3 * rows[0], -rows[0]])
    assert near_duplicates(scaled, threshold=0.999).tolist() == [0, 0, 2]


def test_no_pair_below_the_threshold_is_made_up():
    rows = normal(500, 2)
    found = near_duplicates(rows, threshold=0.9999999, hashes=16, band=1, cap=65536)
    unit = rows.astype(np.float64) / np.linalg.norm(rows, axis=1, keepdims=True)
    for row in np.flatnonzero(found != np.arange(500)):
        assert (unit[row] @ unit.T)[np.arange(500) != row].max() > 0.9999998


def test_a_graph_lists_its_edges():
    graph = Graph(np.array([0, 2, 2, 3]), np.array([1, 2, 0]), np.ones(3, np.float32))
    assert len(graph) == 3
    assert graph.targets.tolist() == [0, 0, 2]
    assert graph.edges.tolist() == [[0, 1], [0, 2], [2, 0]]


@pytest.mark.parametrize(
    ("starts", "neighbours", "weights", "error"),
    [
        ([0, 1.0], [0], [1], errors.DtypeError),
        ([], [], [], errors.DtypeError),
        ([1, 1], [0], [1], errors.ShapeError),
        ([0, 2], [0], [1], errors.ShapeError),
        ([0, 2, 1], [0], [1], errors.ShapeError),
        ([0, 1], [0], [], errors.ShapeError),
        ([0, 1], [1], [1], errors.ArgumentError),
        ([0, 1], [-1], [1], errors.ArgumentError),
        ([0, 1], [0], [np.nan], errors.NotFiniteError),
    ],
)
def test_a_graph_that_is_none_is_refused(starts, neighbours, weights, error):
    with pytest.raises(error, match="must"):
        Graph(np.array(starts), np.array(neighbours, np.int64), np.array(weights, np.float32))


def test_one_row_has_no_neighbours():
    row = normal(1, 4)
    assert hash_graph(row).starts.tolist() == [0, 0]
    assert hash_graph(row, views=2).starts.tolist() == [0, 0]
    assert near_duplicates(row).tolist() == [0]


ROWS = normal(6, 4)


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: hash_graph(ROWS.astype("f8")), errors.DtypeError, "rows must be a float32"),
        (lambda: hash_graph(ROWS[0]), errors.ShapeError, "rows must be"),
        (lambda: hash_graph(ROWS * np.inf), errors.NotFiniteError, "rows must be finite"),
        (lambda: hash_graph(ROWS, views=0), errors.ArgumentError, "views must be from 1"),
        (lambda: hash_graph(ROWS, views=10**9), errors.ArgumentError, "views must be from 1"),
        (lambda: hash_graph(ROWS, levels=0), errors.ArgumentError, "levels"),
        (
            lambda: hash_graph(ROWS, features=5),
            errors.ArgumentError,
            "features must be from 1 to 4",
        ),
        (lambda: hash_graph(ROWS, band=17), errors.ArgumentError, "band must be from 1 to 16"),
        (lambda: hash_graph(ROWS, cap=0), errors.ArgumentError, "cap"),
        (lambda: hash_graph(ROWS, k=0), errors.ArgumentError, "k must be at least 1"),
        (lambda: hash_graph(ROWS, seed=-1), errors.ArgumentError, "seed"),
        (lambda: hash_graph(ROWS, width=1e-20), errors.ArgumentError, "width must be so wide"),
        (lambda: distance_graph(ROWS, [[0, 1]]), errors.ArgumentError, "every row once"),
        (lambda: distance_graph(ROWS, [[0] * 6]), errors.ArgumentError, "every row once"),
        (
            lambda: distance_graph(ROWS, [[0, 9]]),
            errors.ArgumentError,
            r"batches\[0\] must be rows",
        ),
        (lambda: distance_graph(ROWS, [[]]), errors.DtypeError, r"batches\[0\] must be a list"),
        (lambda: distance_graph(ROWS, [[0.5]]), errors.DtypeError, r"batches\[0\] must be a list"),
        (lambda: distance_graph(ROWS, [range(9000)]), errors.ArgumentError, "1 to 8192 rows"),
        (lambda: distance_graph(ROWS, [range(6)], k=None), errors.ArgumentError, "k must be an"),
        (
            lambda: distance_graph(ROWS, [range(6)], threshold=1.5),
            errors.ArgumentError,
            "threshold must be at most 1",
        ),
        (
            lambda: distance_graph(np.sign(ROWS) * np.float32(3e38), [range(6)]),
            errors.NotFiniteError,
            "distances must be finite",
        ),
        (lambda: near_duplicates(ROWS, threshold=0), errors.ArgumentError, "threshold"),
        (lambda: near_duplicates(ROWS, threshold=2), errors.ArgumentError, "at most 1"),
        (lambda: near_duplicates(ROWS, band=65), errors.ArgumentError, "band must be from 1 to 64"),
        (lambda: near_duplicates(ROWS, cap=2**20), errors.ArgumentError, "cap must be from 1"),
    ],
)
def test_wrong_input_is_named(call, error, match):
    with pytest.raises(error, match=match):
        call()


@pytest.mark.parametrize(
    ("pairs", "match"),
    [([[1, 2], [3]], "pairs must be an array"), ([1.5], "pairs must be integers")],
)
def test_pairs_that_are_none_are_refused(pairs, match):
    with pytest.raises(errors.ArgumentError, match=match):
        pairs_of(pairs, 5)


def test_there_may_be_no_pairs():
    assert pairs_of([], 5).shape == (0, 2)
    assert pairs_of([[4, 0]], 5).tolist() == [[4, 0]]
