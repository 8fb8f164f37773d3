"""Searching a store: against sorting every score."""

import numpy as np
import pytest
from filled import fill, random_rows
from hypothesis import given, settings
from hypothesis import strategies as st

import whence
from whence import errors


def brute_force(rows, queries, k, keep=None):
    """Positions of the k largest and the k smallest scores by a stable sort of all of them."""
    scores = queries.astype(np.float64) @ rows.astype(np.float64).T
    positions = np.arange(len(rows)) if keep is None else np.flatnonzero(keep)
    order = np.argsort(-scores[:, positions], axis=1, kind="stable")[:, :k]
    other = np.argsort(scores[:, positions], axis=1, kind="stable")[:, :k]
    return positions[order], positions[other]


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("dim", [1, 16, 77, 512])
@pytest.mark.parametrize("queries", [1, 5, 33])
@pytest.mark.parametrize("threads", [1, 3])
def test_both_ends_are_those_of_a_full_sort(tmp_path, dtype, dim, queries, threads):
    store = fill(tmp_path / "s", random_rows(700, dim), dtype=dtype, parts=3)
    asked = random_rows(queries, dim, seed=1)
    hits = store.search(asked, k=20, threads=threads)
    helpful, harmful = brute_force(store.rows(), asked, 20)
    # Scores are float32: neighbours in rank may swap where they agree to 1e-6 of the norms.
    for side, expected in ((hits.helpful, helpful), (hits.harmful, harmful)):
        exact = np.take_along_axis(asked.astype("f8") @ store.rows().astype("f8").T, expected, 1)
        assert np.allclose(side.scores, exact, rtol=1e-4, atol=1e-4 * np.abs(exact).max())
        assert (side.positions == expected).mean() > 0.99


@settings(max_examples=60, deadline=None)
@given(
    values=st.lists(st.integers(-3, 3), min_size=4, max_size=400),
    k=st.integers(1, 500),
    queries=st.integers(1, 4),
    threads=st.integers(1, 3),
)
def test_ties_go_to_the_earlier_row(tmp_path_factory, values, k, queries, threads):
    values = values[: len(values) // 4 * 4]
    rows = np.array(values, np.float32).reshape(-1, 4)
    # Unit rows times scale must give the whole numbers back, so rows are multiples of units.
    rows = np.sign(rows) * (np.abs(rows) == np.abs(rows).max(1, keepdims=True))
    rows[:, 1:] = 0
    store = fill(tmp_path_factory.mktemp("t") / "s", rows.astype(np.float32))
    asked = np.ones((queries, 4), np.float32)
    hits = store.search(asked, k=k, threads=threads)
    helpful, harmful = brute_force(rows, asked, k)
    assert hits.helpful.positions.tolist() == helpful.tolist()
    assert hits.harmful.positions.tolist() == harmful.tolist()


def test_several_checkpoints_are_summed_by_id_whatever_their_order(tmp_path):
    first, second = random_rows(50, seed=1), random_rows(50, seed=2)
    order = np.random.default_rng(0).permutation(50)
    fill(tmp_path / "s", first, checkpoint="a", rate=0.5, parts=2)
    store = fill(tmp_path / "s", second[order], ids=order, checkpoint="b", rate=0.25, parts=3)
    asked = np.stack([random_rows(3, seed=3), random_rows(3, seed=4)])
    scores = 0.5 * asked[0] @ first.T + 0.25 * asked[1] @ second.T
    hits = store.search(asked, k=4)
    assert hits.helpful.ids.tolist() == np.argsort(-scores, kind="stable")[:, :4].tolist()
    assert hits.harmful.ids.tolist() == np.argsort(scores, kind="stable")[:, :4].tolist()
    assert "learning rate" in hits.unit
    expected = 0.5 * (first**2).sum(1) + 0.25 * (second**2).sum(1)
    assert np.allclose(store.self_influence(), expected, rtol=1e-5)


def test_learning_rates_for_some_checkpoints_only_are_refused(tmp_path):
    fill(tmp_path / "s", random_rows(5), checkpoint="a", rate=0.5)
    store = fill(tmp_path / "s", random_rows(5), checkpoint="b")
    with pytest.raises(errors.CheckpointError, match="for all checkpoints or none"):
        store.search(np.stack([random_rows(1), random_rows(1)]))


def test_filters_by_column_value_and_mask(tmp_path):
    rows = random_rows(60)
    labels, names = np.arange(60) % 3, [f"g{i % 2}" for i in range(60)]
    store = fill(tmp_path / "s", rows, label=labels, group=names)
    asked = random_rows(2, seed=5)
    for where, keep in (
        ({"label": 1}, labels == 1),
        ({"label": [0, 2], "group": "g1"}, (labels != 1) & (np.arange(60) % 2 == 1)),
        (labels == 2, labels == 2),
    ):
        hits = store.search(asked, k=5, where=where)
        helpful, harmful = brute_force(rows, asked, 5, keep)
        assert hits.helpful.positions.tolist() == helpful.tolist()
        assert hits.harmful.positions.tolist() == harmful.tolist()
        assert hits.eligible.tolist() == [keep.sum()] * 2


def test_each_query_can_leave_itself_out_and_the_width_follows(tmp_path):
    rows = random_rows(8)
    store = fill(tmp_path / "s", rows, ids=[f"r{i}" for i in range(8)])
    hits = store.search(rows[:2], k=99, exclude=[["r0"], ["r1", "r4", "r5"]])
    assert hits.eligible.tolist() == [7, 5]
    assert hits.helpful.ids.shape == (2, 5)
    assert "r0" not in hits.helpful.ids[0]
    assert not {"r1", "r4", "r5"} & set(hits.helpful.ids[1])
    keep = np.ones(8, bool)
    keep[[1, 4, 5]] = False
    assert (
        hits.helpful.positions[1].tolist() == brute_force(rows, rows[1:2], 5, keep)[0][0].tolist()
    )


def test_degenerate_rows_are_defined(tmp_path):
    rows = np.zeros((4, 16), np.float32)
    rows[2, 0] = 1
    store = fill(tmp_path / "s", rows)
    hits = store.search(np.ones((1, 16), np.float32), k=4)
    assert hits.helpful.ids.tolist() == [[2, 0, 1, 3]]
    assert hits.harmful.ids.tolist() == [[0, 1, 3, 2]]
    one = fill(tmp_path / "one", rows[2:3])
    assert one.search(np.ones((3, 16), np.float32), k=7).helpful.ids.tolist() == [[0]] * 3


def test_memory_does_not_grow_with_the_store(tmp_path):
    import subprocess
    import sys

    rows = np.ones((2000, 1024), np.float32)
    for name, copies in (("small", 1), ("large", 20)):
        for part in range(copies):
            fill(tmp_path / name, rows, ids=np.arange(2000) + 2000 * part, dtype="float16")
    script = (
        "import sys, resource, numpy as np, whence\n"
        "store = whence.open(sys.argv[1])\n"
        "store.search(np.ones((1, 1024), np.float32), k=5, threads=1)\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    )
    peaks = [
        int(
            subprocess.run(
                [sys.executable, "-c", script, str(tmp_path / name)],
                capture_output=True,
                text=True,
                check=True,
            ).stdout
        )
        for name in ("small", "large")
    ]
    # 78 MiB more of rows; what grows is ids, scales and numbers: 28 bytes a row.
    assert peaks[1] - peaks[0] < 8 * 1024


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return fill(tmp_path_factory.mktemp("m") / "s", random_rows(10), label=np.arange(10))


ROW = np.ones((1, 16), np.float32)
NAN = np.full((1, 16), np.nan, np.float32)


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda s: s.search(ROW, k=0), errors.ArgumentError, "k must be at least 1, got 0"),
        (lambda s: s.search(ROW, k=2.0), errors.DtypeError, "k must be an integer"),
        (lambda s: s.search(ROW.astype("f8")), errors.DtypeError, "queries must be a float32"),
        (lambda s: s.search(ROW[:, :5]), errors.ShapeError, r"\[rows, 16\], got \[1, 5\]"),
        (lambda s: s.search(ROW[0]), errors.ShapeError, r"got \[16\]"),
        (lambda s: s.search(ROW[:0]), errors.ShapeError, "at least one row"),
        (lambda s: s.search(np.stack([ROW, ROW])), errors.ShapeError, r"\[1, queries, 16\]"),
        (lambda s: s.search(NAN), errors.NotFiniteError, r"queries must be finite, got nan"),
        (lambda s: s.search(ROW * 3e38), errors.NotFiniteError, "scores must be finite"),
        (lambda s: s.search(ROW, threads=0), errors.ArgumentError, "threads"),
        (lambda s: s.search(ROW, missing="no"), errors.ArgumentError, "missing must be one of"),
        (lambda s: s.search(ROW, where={"colour": 1}), errors.ArgumentError, "'colour'"),
        (lambda s: s.search(ROW, where={"label": "a"}), errors.DtypeError, "must be int64"),
        (lambda s: s.search(ROW, where={"label": 99}), errors.ArgumentError, "for query 0"),
        (lambda s: s.search(ROW, where=[True]), errors.DtypeError, r"\[10\] bool"),
        (lambda s: s.search(ROW, exclude=[[1], [2]]), errors.ShapeError, "each of 1 queries"),
        (lambda s: s.search(ROW, exclude=[[77]]), errors.IdError, "got 77"),
        (lambda s: s.search(ROW, exclude=[["a"]]), errors.IdError, "must be int64"),
        (lambda s: s.search(ROW, exclude=[list(range(10))]), errors.ArgumentError, "leave an"),
        (lambda s: s.rows(checkpoint="x"), errors.CheckpointError, "got 'x'"),
    ],
)
def test_wrong_input_is_named(store, call, error, match):
    with pytest.raises(error, match=match):
        call(store)


def test_k_of_any_size_allocates_nothing(store):
    assert store.search(ROW, k=2**62).helpful.ids.shape == (1, 10)


def test_an_empty_store_says_so(tmp_path):
    from filled import manifest

    from whence.store import Writer

    writer = Writer(tmp_path / "s", manifest())
    writer.touch()
    writer.close()
    with pytest.raises(errors.ArgumentError, match="must have rows to search"):
        whence.open(tmp_path / "s").search(ROW)


def test_to_pandas_has_one_row_per_hit(tmp_path):
    store = fill(tmp_path / "s", random_rows(10), label=np.arange(10) * 10, score=np.ones(10))
    hits = store.search(random_rows(2, seed=3), k=3)
    table = hits.to_pandas()
    assert len(table) == 12
    some = table[(table["query"] == 1) & (table["side"] == "harmful")]
    assert some["id"].tolist() == hits.harmful.ids[1].tolist()
    assert some["label"].tolist() == [10 * i for i in hits.harmful.ids[1]]
    assert some["score"].tolist() == hits.harmful.scores[1].tolist()
    assert "column_score" in table
