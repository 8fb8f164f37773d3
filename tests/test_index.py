"""An index answers as the scan does, whatever it is built of."""

import importlib.util
import json
import os
import pickle
import shutil
import zlib

import numpy as np
import pytest
from filled import fill, random_rows
from hypothesis import given, settings
from hypothesis import strategies as st

import whence
from whence import errors
from whence.search.basis import reflections
from whence.search.diverse import _slots


def same(found, expected):
    for mine, theirs in ((found.helpful, expected.helpful), (found.harmful, expected.harmful)):
        assert mine.ids.tolist() == theirs.ids.tolist()
        assert mine.scores.tobytes() == theirs.scores.tobytes()
        assert mine.positions.tolist() == theirs.positions.tolist()


def steep_rows(count, dim, seed=0):
    """Rows whose energy lies in few directions, of like norms."""
    generator = np.random.default_rng(seed)
    basis = np.linalg.qr(generator.normal(size=(dim, dim)))[0]
    rows = generator.normal(size=(count, dim)) * 0.9 ** np.arange(dim)
    return (rows @ basis).astype(np.float32)


@pytest.mark.parametrize("method", ["exact", "certified"])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("dim", [1, 77, 200])
@pytest.mark.parametrize("queries", [1, 37])
def test_hits_are_those_of_the_store_to_the_bit(tmp_path, method, dtype, dim, queries):
    store = fill(tmp_path / "s", random_rows(3000, dim), dtype=dtype, parts=3)
    asked = random_rows(queries, dim, seed=1)
    index = whence.Index(store, method, threads=2)
    for side in ("both", "helpful", "harmful"):
        hits = index.search(asked, 20, side=side, threads=2)
        same(hits, store.search(asked, 20, side=side))
        assert hits.exact.all()
        assert hits.margins is None
    assert index.search(asked, 20, side="harmful").helpful.ids.shape == (queries, 0)


@pytest.mark.parametrize("basis", ["auto", "eigen", "rows", "none"])
@pytest.mark.parametrize("bits", [4, 8])
def test_any_basis_and_number_of_bits_gives_the_same_hits(basis, bits):
    rows, asked = steep_rows(3000, 300), steep_rows(5, 300, seed=1)
    index = whence.Index(rows, "certified", basis=basis, bits=bits)
    scores = asked.astype(np.float64) @ rows.astype(np.float64).T
    hits = index.search(asked, 15)
    assert hits.helpful.ids.tolist() == np.argsort(-scores, axis=1)[:, :15].tolist()
    assert hits.harmful.ids.tolist() == np.argsort(scores, axis=1)[:, :15].tolist()


def test_a_steep_spectrum_is_found_and_makes_fewer_rows_be_scored():
    rows, asked = steep_rows(6000, 256), steep_rows(10, 256, seed=1)
    with_prefix = whence.Index(rows, bits=4)
    without = whence.Index(rows, bits=4, basis="none")
    assert "leading 64 directions hold" in str(with_prefix.explain())
    assert "no prefix" in str(without.explain())
    same(with_prefix.search(asked), without.search(asked))
    scored = [index.explain().scored.mean() for index in (with_prefix, without)]
    assert scored[0] < 0.8 * scored[1]


def test_several_checkpoints_with_rates_are_one_score(tmp_path):
    first, second = random_rows(2500, seed=1), random_rows(2500, seed=2)
    order = np.random.default_rng(0).permutation(2500)
    fill(tmp_path / "s", first, checkpoint="a", rate=0.5, parts=2)
    store = fill(tmp_path / "s", second[order], ids=order, checkpoint="b", rate=0.01, parts=3)
    asked = np.stack([random_rows(7, seed=3), random_rows(7, seed=4)])
    expected = store.search(asked, 9)
    for method in ("exact", "certified"):
        same(whence.Index(store, method).search(asked, 9), expected)
    vectors = whence.Index(store).vectors()
    scores = np.concatenate(asked, axis=1) @ vectors.T
    assert (np.argsort(-scores, axis=1)[:, :3] == expected.helpful.ids[:, :3]).all()


@pytest.mark.parametrize("method", ["exact", "certified"])
def test_an_id_that_lacks_a_checkpoint_is_an_error_or_never_a_hit(tmp_path, method):
    fill(tmp_path / "s", random_rows(2500, seed=1), checkpoint="a", parts=2)
    rows = random_rows(2400, seed=2)
    store = fill(tmp_path / "s", rows, ids=np.arange(100, 2500), checkpoint="b")
    with pytest.raises(errors.IdError, match="without one in 'b'"):
        whence.Index(store, method)
    index = whence.Index(store, method, missing="drop")
    asked = np.stack([random_rows(3, seed=3)] * 2)
    hits = index.search(asked, 2500)
    same(hits, store.search(asked, 2500, missing="drop"))
    assert hits.helpful.ids.shape == (3, 2400)
    assert hits.helpful.ids.min() >= 100
    same(index.search(asked, 5), store.search(asked, 5, missing="drop"))


@pytest.mark.parametrize("method", ["exact", "certified"])
def test_filters_by_ids_values_and_mask_and_exclusions(tmp_path, method):
    rows = random_rows(3000)
    labels = np.arange(3000) % 7
    store = fill(tmp_path / "s", rows, label=labels)
    index = whence.Index(store, method)
    asked = random_rows(4, seed=5)
    some = np.random.default_rng(1).permutation(3000)[:50]
    exclude = [store.search(asked[i : i + 1], 3).helpful.ids[0].tolist() for i in range(4)]
    for where, keep in (
        (None, np.ones(3000, bool)),
        ({"label": [1, 4]}, np.isin(labels, [1, 4])),
        (labels < 3, labels < 3),
        (some, np.isin(np.arange(3000), some)),
        (set(some.tolist()), np.isin(np.arange(3000), some)),
    ):
        hits = index.search(asked, 12, where=where, exclude=exclude)
        scores = asked.astype(np.float64) @ rows.astype(np.float64).T
        for query in range(4):
            allowed = np.flatnonzero(keep & ~np.isin(np.arange(3000), exclude[query]))
            order = allowed[np.argsort(-scores[query, allowed], kind="stable")]
            assert hits.helpful.ids[query].tolist() == order[:12].tolist()
            assert hits.harmful.ids[query].tolist() == order[::-1][:12].tolist()
            assert hits.eligible[query] == len(allowed)


def test_k_as_large_as_all_returns_all_once():
    rows = random_rows(2100, 40)
    index = whence.Index(rows, "certified")
    hits = index.search(rows[:2], 10**9)
    assert hits.helpful.ids.shape == (2, 2100)
    assert np.sort(hits.helpful.ids, axis=1).tolist() == [list(range(2100))] * 2
    assert "a scan" in str(index.explain())


@settings(max_examples=40, deadline=None)
@given(
    count=st.integers(1, 300),
    dim=st.integers(1, 70),
    k=st.integers(1, 400),
    kind=st.sampled_from(["ties", "equal", "zeros", "huge", "tiny"]),
    bits=st.sampled_from([4, 8]),
    seed=st.integers(0, 2**32),
)
def test_hostile_rows_are_answered_as_a_sort_of_all_scores(count, dim, k, kind, bits, seed):
    random = np.random.default_rng(seed)
    rows = random.integers(-2, 3, (count, dim)).astype(np.float32)
    factor = {"huge": 2.0**90, "tiny": 2.0**-140}.get(kind, 1.0)
    if kind == "equal":
        rows[:] = rows[0]
    if kind == "zeros":
        rows[random.random(count) < 0.7] = 0
    rows *= np.float32(factor)
    asked = random.integers(-2, 3, (3, dim)).astype(np.float32)
    hits = whence.Index(rows, "certified", bits=bits).search(asked, k)
    scores = asked.astype(np.float64) @ rows.astype(np.float64).T  # whole numbers: exact
    width = min(k, count)
    assert hits.helpful.ids.tolist() == np.argsort(-scores, 1, kind="stable")[:, :width].tolist()
    assert hits.harmful.ids.tolist() == np.argsort(scores, 1, kind="stable")[:, :width].tolist()


def test_auto_scans_few_rows_and_codes_many_and_says_why():
    few, many = whence.Index(random_rows(100)), whence.Index(random_rows(4000, 96))
    assert (few.method, many.method) == ("exact", "certified")
    assert "100 examples" in few.explain().why
    assert many.explain().last is None
    many.search(random_rows(2, 96), 5)
    said = str(many.explain())
    assert "proven by the bounds" in said
    assert "2 queries, top 5" in said


def test_an_approximate_answer_says_so_and_how_clear_it_is():
    rows = random_rows(5000, 128)
    index = whence.Index(rows)
    hits = index.search(rows[:20], 10, approximate=True)
    assert not hits.exact.any()
    assert hits.margins.shape == (20, 2)
    assert (index.explain().scored == 50).all()
    recall = index.recall(50, 10, approximate=True)
    assert recall.approximate
    assert recall.helpful > 0.98
    assert recall.harmful > 0.98
    assert "approximate" in str(recall)


def test_recall_is_one_and_counts_what_is_missing():
    rows = random_rows(3000, 64)
    index = whence.Index(rows, "certified")
    assert (index.recall(20).helpful, index.recall(20).harmful) == (1.0, 1.0)
    # An index whose scan is of other rows finds nothing of what that scan wants.
    index.source._core = whence.Matrix(-rows).core
    recall = index.recall(20, 5, queries=rows[:30])
    assert recall.queries == 20
    assert recall.helpful < 0.05


def test_knn_query_is_called_as_hnswlibs():
    rows = random_rows(2500, 32)
    index = whence.Index(rows)
    labels, scores = index.knn_query(rows[:3], 4)
    hits = index.search(rows[:3], 4)
    assert labels.tolist() == hits.helpful.ids.tolist()
    assert scores.tolist() == hits.helpful.scores.tolist()
    filtered, _ = index.knn_query(rows[:3], k=2, filter=np.arange(2500) % 2 == 0)
    assert (filtered % 2 == 0).all()


def test_a_diverse_answer_has_examples_of_every_cluster_that_is_near():
    random = np.random.default_rng(0)
    centres = np.eye(3, 64) * [[1.0], [0.9], [0.8]]
    member = np.repeat([0, 1, 2], [900, 700, 500])
    rows = (centres[member] + 0.02 * random.normal(size=(2100, 64))).astype(np.float32)
    asked = np.ones((1, 64), np.float32)
    index = whence.Index(rows, "certified")
    assert set(member[index.search(asked, 6).helpful.ids[0]]) == {0}
    # Wide enough for the mixture to see them all.
    hits = index.search(asked, 150, diverse=3)
    found = member[hits.helpful.ids[0]]
    assert np.bincount(found, minlength=3).min() > 15
    assert (np.diff(hits.helpful.scores[0]) <= 0).all()
    for cluster in range(3):  # of each the best
        mine = np.flatnonzero(found == cluster)
        scores = (rows[member == cluster] @ asked[0]).astype(np.float64)
        best = np.sort(scores)[::-1][: len(mine)]
        assert np.allclose(hits.helpful.scores[0][mine], best, rtol=1e-5)


@given(st.lists(st.integers(0, 40), min_size=1, max_size=12), st.integers(1, 60))
def test_slots_are_shares_and_never_more_than_there_are(counts, k):
    counts = np.array(counts)
    k = min(k, int(counts.sum()))
    if k == 0:
        return
    slots = _slots(counts, k)
    assert slots.sum() == k
    assert (slots <= counts).all()


def test_reflections_bring_columns_to_the_front():
    columns = np.linalg.qr(np.random.default_rng(0).normal(size=(50, 7)))[0]
    turned = columns.T.copy()
    for direction in reflections(columns):
        turned -= np.outer(turned @ direction, direction) * (2 / (direction @ direction))
    assert np.allclose(np.abs(turned), np.eye(7, 50), atol=1e-12)


def test_a_saved_index_answers_as_before_and_only_of_its_own_rows(tmp_path):
    np.save(tmp_path / "rows.npy", steep_rows(2500, 200))
    index = whence.Index(tmp_path / "rows.npy")
    asked = steep_rows(6, 200, seed=2)
    assert index.save(tmp_path / "index") == tmp_path / "index"
    again = whence.Index.load(tmp_path / "index", tmp_path / "rows.npy")
    same(again.search(asked), index.search(asked))
    assert again.explain().built == index.explain().built
    with pytest.raises(errors.ArgumentError, match="which exists"):
        index.save(tmp_path / "index")
    with pytest.raises(errors.MismatchError, match=r"built of.*a new index must be built"):
        whence.Index.load(tmp_path / "index", steep_rows(2500, 200, seed=1))
    with pytest.raises(errors.StoreError):
        whence.Index.load(tmp_path / "nothing", tmp_path / "rows.npy")


def test_any_damaged_byte_of_a_saved_index_is_found(tmp_path):
    rows = random_rows(2100, 20)
    whence.Index(rows, "certified").save(tmp_path / "index")
    random = np.random.default_rng(0)
    files = sorted((tmp_path / "index").iterdir())
    assert {"manifest.json", "order.npy", "segment-0-upper.npy"} <= {file.name for file in files}
    for file in files:
        content = file.read_bytes()
        for at in random.integers(0, len(content), 8):
            damaged = bytearray(content)
            damaged[at] ^= 1 << int(random.integers(0, 8))
            file.write_bytes(damaged)
            with pytest.raises(errors.StoreError, match="damaged"):
                whence.Index.load(tmp_path / "index", rows)
        file.write_bytes(content[:-5])
        with pytest.raises(errors.StoreError, match="damaged"):
            whence.Index.load(tmp_path / "index", rows)
        file.write_bytes(content)
    whence.Index.load(tmp_path / "index", rows)


def test_a_manifest_that_lies_is_refused(tmp_path):
    from whence.store.files import write_json

    rows = random_rows(2100, 20)
    whence.Index(rows, "certified").save(tmp_path / "index")
    manifest = tmp_path / "index" / "manifest.json"
    body = json.loads(manifest.read_bytes().splitlines()[0])
    for change in (
        {"format": "another"},
        {"version": 99},
        {"widths": []},
        {"widths": [-1]},
        {"prefix": [7]},
        {"prefix": "x"},
        {"seed": -1},
        {"weights": [0.0]},
        {"weights": []},
        {"files": {}},
        {"files": {**body["files"], "order": [1, 2, "<u4", [2**62]]}},
        {"share": "much"},
        {"files": [1]},
        {"bits": 5},
        {"rows": {**body["rows"], "digest": "x"}},
    ):
        write_json(manifest, {**body, **change})
        with pytest.raises(errors.StoreError):
            whence.Index.load(tmp_path / "index", rows)


def test_what_was_left_by_a_killed_save_is_no_index_and_in_nobodys_way(tmp_path):
    rows = random_rows(2100, 20)
    index = whence.Index(rows, "certified")
    (tmp_path / "index.part").mkdir()
    (tmp_path / "index.part" / "order.npy").write_bytes(b"somebody's")
    with pytest.raises(errors.StoreError):
        whence.Index.load(tmp_path / "index", rows)
    index.save(tmp_path / "index")
    assert (tmp_path / "index.part" / "order.npy").read_bytes() == b"somebody's"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["index", "index.part"]


def test_factored_stores_are_scanned_and_have_no_codes(tmp_path):
    torch = pytest.importorskip("torch")
    model = torch.nn.Linear(4, 3)
    x, y = torch.randn(40, 4), torch.randint(0, 3, (40,))
    loss = torch.nn.functional.cross_entropy
    with (
        whence.record(model, tmp_path / "s", layout="factored") as recorder,
        recorder.batch(range(40)),
    ):
        loss(model(x), y).backward()
    index = whence.Index(tmp_path / "s")
    assert index.method == "exact"
    hits = whence.query(model, index, lambda: loss(model(x[:3]), y[:3]), k=5)
    same(hits, whence.query(model, tmp_path / "s", lambda: loss(model(x[:3]), y[:3]), k=5))
    with pytest.raises(errors.MismatchError, match="no vectors"):
        whence.Index(tmp_path / "s", "certified")


def test_query_asks_an_index_as_it_asks_a_store(tmp_path):
    torch = pytest.importorskip("torch")
    model = torch.nn.Linear(4, 3)
    x, y = torch.randn(40, 4), torch.randint(0, 3, (40,))
    loss = torch.nn.functional.cross_entropy
    with whence.record(model, tmp_path / "s", dim=64) as recorder, recorder.batch(range(40)):
        loss(model(x), y).backward()
    index = whence.Index(tmp_path / "s", "certified")
    hits = whence.query(model, index, lambda: loss(model(x[:3]), y[:3]), k=5)
    same(hits, whence.query(model, tmp_path / "s", lambda: loss(model(x[:3]), y[:3]), k=5))
    approximate = whence.query(
        model, index, lambda: loss(model(x[:3]), y[:3]), k=2, approximate=True
    )
    assert not approximate.exact.any()


def test_bad_arguments_are_named():
    rows = random_rows(50)
    index = whence.Index(rows)
    for make, kind, match in (
        (lambda: whence.Index(rows, "fast"), errors.ArgumentError, "method must be one of"),
        (lambda: whence.Index(rows, bits=5), errors.ArgumentError, "bits must be 4 or 8"),
        (lambda: whence.Index(rows, basis="pca"), errors.ArgumentError, "basis must be one of"),
        (lambda: whence.Index(rows, seed=-1), errors.ArgumentError, "seed must be"),
        (lambda: whence.Index(rows[:0]), errors.ArgumentError, "at least one"),
        (lambda: whence.Index(rows.astype(int)), errors.DtypeError, "rows must be one of"),
        (lambda: index.search(rows[:1], 0), errors.ArgumentError, "k must be"),
        (lambda: index.search(rows[:1], side="x"), errors.ArgumentError, "side must be one of"),
        (lambda: index.search(rows[:1, :3]), errors.ShapeError, r"queries must be \[rows, 16\]"),
        (lambda: index.search(rows[:1], diverse=1), errors.ArgumentError, "diverse must be"),
        (lambda: index.search(rows[:1], where=["a"]), errors.IdError, "where must be int64"),
        (lambda: index.search(rows[:1], where=[99]), errors.IdError, "in the store, got 99"),
        (lambda: index.search(rows[:1], where=3.5), errors.DtypeError, "where must be a dict"),
        (lambda: index.search(rows[:1], where=[]), errors.ArgumentError, "leave an example"),
        (lambda: index.search(np.full((1, 16), np.nan, "f4")), errors.NotFiniteError, "queries"),
        (lambda: index.save("x"), errors.ArgumentError, "method must be 'certified' or 'hnsw'"),
        (lambda: index.recall(0), errors.ArgumentError, "sample must be"),
    ):
        with pytest.raises(kind, match=match):
            make()


def test_rows_that_are_not_finite_are_refused_by_name():
    rows = random_rows(3000)
    rows[77, 3] = np.nan
    for method in ("exact", "certified"):
        with pytest.raises(errors.NotFiniteError, match="row 77"):
            whence.Index(rows, method).search(rows[:1])


def test_memory_is_what_the_goals_allow(tmp_path):
    np.save(tmp_path / "rows.npy", random_rows(6000, 512))
    for bits, most in ((8, 540), (4, 270)):
        index = whence.Index(tmp_path / "rows.npy", "certified", bits=bits)
        assert index.bytes / len(index) <= most
        codes = index._built.codes.parts()
        arrays = [codes[0], codes[2], *(a for _, p, s, n in codes[1] for a in (*p, s, *n))]
        assert index.bytes >= sum(array.nbytes for array in arrays)


def test_bits_do_not_depend_on_threads_or_the_instruction_set(tmp_path):
    import subprocess
    import sys

    np.save(tmp_path / "rows.npy", random_rows(2100, 100))
    program = (
        "import sys, zlib, numpy as np, whence\n"
        "index = whence.Index(sys.argv[1], 'certified', basis='none', threads=int(sys.argv[2]))\n"
        "order, segments, reaches = index._built.codes.parts()\n"
        "total = zlib.crc32(order.tobytes() + reaches.tobytes())\n"
        "for _, planes, scales, numbers in segments:\n"
        "    for array in (*planes, scales, *numbers): total = zlib.crc32(array.tobytes(), total)\n"
        "rows = np.load(sys.argv[1])\n"
        "hits = index.search(rows[:9], 4, approximate=True, threads=int(sys.argv[2]))\n"
        "for side in (hits.helpful, hits.harmful):\n"
        "    total = zlib.crc32(side.scores.tobytes() + side.positions.tobytes(), total)\n"
        "print(zlib.crc32(hits.margins.tobytes(), total))\n"
    )
    found = {
        subprocess.run(
            [sys.executable, "-c", program, str(tmp_path / "rows.npy"), threads],
            env={**os.environ, "WHENCE_INSTRUCTION_SET": name},
            check=True,
            capture_output=True,
        ).stdout
        for name, threads in (
            ("scalar", "1"),
            ("avx2", "3"),
            ("avx512", "2"),
            ("avx512vnni", "1"),
            ("", "8"),
        )
    }
    assert len(found) == 1


def test_exports_find_the_same_examples():
    rows, asked = random_rows(2100, 24), random_rows(4, 24, seed=1)
    index = whence.Index(whence.Matrix(rows, ids=np.arange(2100) + 500))
    hits = index.search(asked, 5, side="helpful")
    for name, ask in (
        ("faiss", lambda other: other.search(asked, 5)[1]),
        ("hnswlib", lambda other: other.knn_query(asked, 5)[0]),
    ):
        if importlib.util.find_spec(name) is None:
            with pytest.raises(errors.MissingDependencyError, match=name):
                getattr(index, f"to_{name}")()
            continue
        found = ask(getattr(index, f"to_{name}")())
        assert np.isin(hits.helpful.ids, found).mean() >= (1.0 if name == "faiss" else 0.5)


def test_matrices_are_read_from_files_and_memory_in_three_types(tmp_path):
    rows = np.random.default_rng(0).integers(-100, 100, (2100, 30))
    asked = np.random.default_rng(1).integers(-3, 4, (4, 30)).astype(np.float32)
    scores = asked @ rows.T.astype(np.float32)
    expected = np.argsort(-scores, axis=1, kind="stable")[:, :7].tolist()
    for dtype in ("float32", "float16", "int8"):
        path = tmp_path / f"{dtype}.npy"
        np.save(path, rows.astype(dtype))
        for source in (path, str(path), rows.astype(dtype), whence.Matrix(path)):
            for method in ("exact", "certified"):
                found = whence.Index(source, method).search(asked, 7)
                assert found.helpful.ids.tolist() == expected
                assert "inner product" in found.unit


def test_matrices_have_ids_and_columns_of_ones_own():
    rows = random_rows(30)
    names = [f"row {i}" for i in range(30)]
    matrix = whence.Matrix(rows, ids=names, columns={"label": np.arange(30) % 2})
    hits = whence.Index(matrix).search(rows[:2], 3, where={"label": 1}, exclude=[["row 1"], []])
    assert all(int(name.split()[1]) % 2 for name in hits.helpful.ids.ravel())
    assert "row 1" not in hits.helpful.ids[0]
    assert str(hits).count("label") >= 2
    with pytest.raises(errors.ShapeError, match="one for each of 30"):
        whence.Matrix(rows, ids=names[1:])
    with pytest.raises(errors.IdError, match="distinct"):
        whence.Matrix(rows, ids=[1] * 30)
    with pytest.raises(errors.ShapeError, match="columns"):
        whence.Matrix(rows, columns={"label": [1]})


@pytest.mark.parametrize(
    "wrong",
    [
        b"{'descr': '<f4', 'fortran_order': False, 'shape': (3, 4), ",
        b"{'descr': '<,4', 'fortran_order': False, 'shape': (3, 4), }",
        b"{'descr': '<f4',B'fortran_order': False, 'shape': (3, 4), }",
        b"{'descr': '<f4', 'fortran_order': False, 'shape': (-3, 4), }",
    ],
)
def test_a_header_that_is_none_is_refused(tmp_path, wrong):
    np.save(tmp_path / "rows.npy", np.zeros((3, 4), np.float32))
    content = (tmp_path / "rows.npy").read_bytes()
    header = wrong.ljust(117) + b"\n"
    (tmp_path / "rows.npy").write_bytes(content[:10] + header + content[128:])
    with pytest.raises(errors.StoreError, match=r"rows\.npy"):
        whence.Matrix(tmp_path / "rows.npy")


def test_files_that_are_no_matrix_are_refused(tmp_path):
    (tmp_path / "a.npy").write_bytes(b"nothing")
    np.save(tmp_path / "b.npy", np.zeros(4, np.float32))
    np.save(tmp_path / "c.npy", np.zeros((4, 3)))
    np.save(tmp_path / "d.npy", np.asfortranarray(np.zeros((4, 3), np.float32)))
    np.save(tmp_path / "e.npy", np.zeros((4, 3), ">f4"))
    np.save(tmp_path / "f.npy", np.zeros((4, 3), np.float32))
    with (tmp_path / "f.npy").open("ab") as file:
        file.write(b"more")
    np.save(tmp_path / "g.npy", np.array([{"a": 1}]), allow_pickle=True)
    for name, kind, match in (
        ("a", errors.StoreError, "must be a .npy file"),
        ("b", errors.ShapeError, r"\[examples, dim\]"),
        ("c", errors.DtypeError, "float32, float16, int8, got float64"),
        ("d", errors.StoreError, "C order"),
        ("e", errors.StoreError, "little-endian"),
        ("f", errors.StoreError, "need"),
        ("g", errors.DtypeError, "got object"),
        ("missing", errors.StoreError, "No such file"),
    ):
        with pytest.raises(kind, match=match):
            whence.Matrix(tmp_path / f"{name}.npy")


def test_an_index_outlives_a_store_that_goes_on_growing(tmp_path):
    rows = random_rows(2500)
    store = fill(tmp_path / "s", rows)
    index = whence.Index(store)
    fill(tmp_path / "s", random_rows(100, seed=9), ids=np.arange(5000, 5100))
    same(index.search(rows[:3], 5), store.search(rows[:3], 5))
    shutil.rmtree(tmp_path / "s")
    with pytest.raises(errors.StoreError):
        index.search(rows[:3], 5)


def clustered_units(count, dim=64, seed=0, clusters=40):
    """Directions around some centres, as those of gradients are."""
    generator = np.random.default_rng(seed)
    centres = np.random.default_rng(99).normal(size=(clusters, dim))
    rows = centres[generator.integers(0, clusters, count)] + generator.normal(size=(count, dim))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def test_a_graph_finds_what_a_sort_finds_and_says_what_it_did():
    rows, asked = clustered_units(6000), clustered_units(50, seed=1)
    index = whence.Index(rows, "hnsw")
    hits = index.search(asked, 10, side="helpful", approximate=True)
    assert "a walk over the graph" in index.explain().last
    assert not hits.exact.any()
    scores = asked.astype(np.float64) @ rows.T.astype(np.float64)
    wanted = np.argsort(-scores, axis=1)[:, :10]
    recall = np.mean([np.isin(w, f).mean() for w, f in zip(wanted, hits.helpful.ids, strict=True)])
    assert recall > 0.95
    found = np.take_along_axis(scores, hits.helpful.positions, 1)
    assert np.allclose(hits.helpful.scores, found, rtol=1e-5)
    narrow = index.search(asked, 10, side="helpful", approximate=True, ef=10)
    assert (narrow.helpful.scores[:, -1] <= hits.helpful.scores[:, -1]).mean() > 0.9
    with pytest.raises(errors.ArgumentError, match="ef must be None but"):
        index.search(asked, 10, ef=20)


def test_a_graph_is_not_walked_where_it_would_miss():
    rows, asked = clustered_units(4000), clustered_units(5, seed=1)
    index = whence.Index(rows, "hnsw")
    expected = whence.Index(rows, "exact").search(asked, 10)
    for arguments, said in (
        ({}, "proves nothing"),
        ({"approximate": True}, "no links to the harmful side"),
        ({"approximate": True, "side": "harmful"}, "no links to the harmful side"),
        (
            {"approximate": True, "side": "helpful", "where": np.arange(4000) % 10 == 0},
            "the filter leaves 10%",
        ),
        ({"approximate": True, "side": "helpful", "k": 4000}, "a scan"),
    ):
        hits = index.search(asked, **{"k": 10, **arguments})
        assert said in index.explain().last
        if "where" in arguments:
            assert (hits.helpful.ids % 10 == 0).all()
    same(index.search(asked, 10), expected)
    lengths = np.random.default_rng(0).lognormal(size=(4000, 1)).astype(np.float32)
    heavy = whence.Index(rows * lengths, "hnsw")
    heavy.search(asked, 10, side="helpful", approximate=True)
    assert "times the median norm" in heavy.explain().last


def test_a_graph_obeys_filters_and_exclusions():
    rows, asked = clustered_units(4000), clustered_units(5, seed=1)
    index = whence.Index(rows, "hnsw")
    first = index.search(asked, 5, side="helpful", approximate=True).helpful.ids
    keep = np.arange(4000) % 2 == 0
    hits = index.search(
        asked, 10, side="helpful", approximate=True, where=keep, exclude=first.tolist()
    )
    assert "walk" in index.explain().last
    assert (hits.helpful.ids % 2 == 0).all()
    for query in range(5):
        assert not set(first[query]) & set(hits.helpful.ids[query])


def test_a_graph_is_the_same_for_any_number_of_threads_and_comes_back_from_files(tmp_path):
    np.save(tmp_path / "rows.npy", clustered_units(3000))
    digests = {
        whence.Index(tmp_path / "rows.npy", "hnsw", threads=threads)._built.graph.digest()
        for threads in (1, 2, 8)
    }
    assert len(digests) == 1
    index = whence.Index(tmp_path / "rows.npy", "hnsw")
    index.save(tmp_path / "index")
    again = whence.Index.load(tmp_path / "index", tmp_path / "rows.npy")
    assert again._built.graph.digest() in digests
    asked = clustered_units(5, seed=1)
    for side in ("helpful", "both"):
        same(
            again.search(asked, 5, side=side, approximate=True),
            index.search(asked, 5, side=side, approximate=True),
        )
    assert index.bytes == again.bytes
    for name in ("graph-links", "graph-entries"):
        file = tmp_path / "index" / f"{name}.npy"
        content = bytearray(file.read_bytes())
        content[-3] ^= 0x40
        file.write_bytes(content)
        with pytest.raises(errors.StoreError, match="damaged"):
            whence.Index.load(tmp_path / "index", tmp_path / "rows.npy")
        content[-3] ^= 0x40
        file.write_bytes(content)


def test_a_graph_takes_no_more_memory_than_the_goal(tmp_path):
    np.save(tmp_path / "rows.npy", clustered_units(6000, 512))
    index = whence.Index(tmp_path / "rows.npy", "hnsw")
    assert index.bytes / len(index) <= 420


@pytest.mark.parametrize("kind", ["equal", "zeros", "one", "few"])
def test_a_graph_of_hostile_rows_is_built_and_asked(kind):
    rows = {
        "equal": np.ones((2500, 40), np.float32),
        "zeros": np.zeros((2500, 40), np.float32),
        "one": np.ones((1, 3), np.float32),
        "few": clustered_units(5, 30),
    }[kind]
    index = whence.Index(rows, "hnsw")
    hits = index.search(rows[:1], 7, side="helpful", approximate=True)
    assert hits.helpful.ids.shape == (1, min(7, len(rows)))
    assert len(set(hits.helpful.ids[0].tolist())) == min(7, len(rows))
    same(index.search(rows[:1], 7), whence.Index(rows, "exact").search(rows[:1], 7))


@pytest.mark.parametrize("method", ["exact", "certified", "hnsw"])
@pytest.mark.parametrize("before", [700, 2300])
def test_examples_added_in_turns_are_found_as_if_all_had_been_there(tmp_path, method, before):
    rows = random_rows(3000, 70)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    parts = np.split(rows, [before, before, 2900])
    store = fill(tmp_path / "s", parts[0], ids=np.arange(before))
    index = whence.Index(store, method, threads=2)
    at = before
    for part in parts[1:]:
        if len(part):
            store = fill(tmp_path / "s", part, ids=np.arange(at, at + len(part)))
        at += len(part)
        index.add(whence.open(tmp_path / "s"), threads=2)
        assert len(index) == at
    asked = random_rows(6, 70, seed=1)
    same(index.search(asked, 20), store.search(asked, 20))
    assert index.search(rows[2950:2953], 5).helpful.ids[:, 0].tolist() == [2950, 2951, 2952]
    if method == "hnsw":
        assert index.recall(50, approximate=True).helpful > 0.9
        index.search(asked, side="helpful", approximate=True)
        assert "a walk over the graph" in index.explain().last


def test_codes_of_longer_rows_that_come_later_are_looked_at_and_the_others_left():
    rows = random_rows(6000, 64) * np.geomspace(1, 1e-3, 6000, dtype=np.float32)[:, None]
    late = random_rows(400, 64, seed=2) * np.float32(5)
    index = whence.Index(rows)
    index.add(np.concatenate([rows, late]))
    asked = random_rows(5, 64, seed=1)
    same(index.search(asked), whence.Index(np.concatenate([rows, late]), "exact").search(asked))
    assert index.explain().scored.mean() < 300


def test_rows_that_do_not_begin_with_the_indexs_own_are_not_added(tmp_path):
    rows = random_rows(2500, 40)
    index = whence.Index(rows, "certified")
    for other in (rows[:-1], rows[::-1], np.concatenate([rows[1:], rows]), random_rows(2600, 41)):
        with pytest.raises(errors.MismatchError, match=r"rows must begin with.*build a new index"):
            index.add(np.ascontiguousarray(other))
    more = np.concatenate([rows, np.full((1, 40), np.nan, np.float32)])
    with pytest.raises(errors.NotFiniteError):
        index.add(more)
    assert len(index) == 2500
    same(index.search(rows[:3]), whence.Index(rows, "exact").search(rows[:3]))


@pytest.mark.parametrize("method", ["exact", "certified", "hnsw"])
def test_what_was_deleted_is_in_no_answer(method):
    rows, asked = random_rows(3000, 50), random_rows(5, 50, seed=1)
    index = whence.Index(rows, method)
    first = index.search(asked).helpful.ids[:, 0]
    index.delete(np.unique(first))
    index.delete([int(first[0]), 5])
    kept = np.setdiff1d(np.arange(3000), [*first, 5])
    expected = whence.Index(rows, "exact").search(asked, 12, where=kept)
    same(index.search(asked, 12), expected)
    same(index.search(asked, 12, where=kept), expected)
    hits = index.search(asked, 12, side="helpful", approximate=True)
    assert not np.isin(hits.helpful.ids, first).any()
    assert (hits.eligible == len(kept)).all()
    assert index.search(asked, 3000).helpful.ids.shape == (5, len(kept))
    assert index.recall(20).helpful == 1
    assert f"deleted {3000 - len(kept)} of 3,000" in str(index.explain())
    with pytest.raises(errors.IdError):
        index.delete([7, 3000])
    same(index.search(asked, 12), expected)
    index.delete(kept)
    with pytest.raises(errors.ArgumentError, match="leave an example"):
        index.search(asked)


def test_a_saved_index_of_a_store_that_has_grown_takes_in_the_rest_and_forgets_no_deletion(
    tmp_path,
):
    rows = random_rows(3000, 40)
    fill(tmp_path / "s", rows[:2500], ids=np.arange(2500))
    for method in ("certified", "hnsw"):
        index = whence.Index(whence.open(tmp_path / "s"), method)
        index.delete([3, 2400])
        index.save(tmp_path / method)
    store = fill(tmp_path / "s", rows[2500:], ids=np.arange(2500, 3000))
    asked = random_rows(4, 40, seed=1)
    kept = np.setdiff1d(np.arange(3000), [3, 2400])
    for method in ("certified", "hnsw"):
        index = whence.Index.load(tmp_path / method, tmp_path / "s")
        assert (len(index), index.explain().deleted) == (3000, 2)
        same(index.search(asked, 30), store.search(asked, 30, where=kept))


@pytest.mark.parametrize("method", ["exact", "certified", "hnsw"])
@pytest.mark.parametrize(
    "other",
    [
        lambda rows: -rows,
        lambda rows: rows[:, ::-1].copy(),
        lambda rows: np.roll(rows, 1, axis=1),
        lambda rows: np.roll(rows, 1, axis=0),
        lambda rows: np.where(np.arange(len(rows))[:, None] == 1234, -rows, rows),
    ],
)
def test_other_rows_of_the_same_norms_are_not_taken_for_those_of_the_index(tmp_path, method, other):
    rows = random_rows(2500, 48)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    index = whence.Index(rows, method)
    with pytest.raises(errors.MismatchError):
        index.add(np.concatenate([other(rows), rows[:5]]))
    if method != "exact":
        index.save(tmp_path / "index")
        with pytest.raises(errors.MismatchError):
            whence.Index.load(tmp_path / "index", other(rows))


@pytest.mark.parametrize("method", ["exact", "certified"])
def test_a_file_that_was_written_since_is_an_error_and_no_answer(tmp_path, method):
    rows = random_rows(2500, 48)
    np.save(tmp_path / "rows.npy", rows)
    index = whence.Index(tmp_path / "rows.npy", method)
    index.search(rows[:2])
    np.save(tmp_path / "rows.npy", -rows)
    with pytest.raises(errors.StoreError, match="must stay as it was"):
        index.search(rows[:2])


@pytest.mark.parametrize("dim", [64, 65, 512])
def test_a_graph_of_rows_that_are_alike_to_all_but_their_own_is_built_at_once(dim):
    random = np.random.default_rng(0)
    kinds = np.eye(dim, dtype=np.float32)[random.integers(0, dim, 6000)]
    sparse = (random.random((6000, dim)) < 2 / dim).astype(np.float32)
    for rows in (kinds, kinds * random.choice([-1.0, 2.0], (6000, 1)), sparse):
        rows = rows.astype(np.float32)
        index = whence.Index(rows, "hnsw")
        same(index.search(rows[:3], 5), whence.Index(rows, "exact").search(rows[:3], 5))


def test_a_mixture_is_not_called_the_answer_of_a_scan():
    rows = random_rows(3000, 40)
    hits = whence.Index(rows).search(rows[:2], 5, diverse=10)
    assert not hits.exact.any()
    assert hits.clusters == 10
    assert hits.certainty.startswith("a mixture over 10 clusters")


def test_deletions_at_the_same_time_are_all_kept():
    from concurrent.futures import ThreadPoolExecutor

    index = whence.Index(random_rows(3000, 8))
    with ThreadPoolExecutor(6) as pool:
        list(pool.map(lambda example: index.delete([example]), range(1500)))
    assert index.explain().deleted == 1500


def test_what_was_deleted_is_not_handed_to_others():
    rows = random_rows(100, 8)
    index = whence.Index(rows)
    index.delete([0, 50])
    assert index.vectors().tobytes() == np.delete(rows, [0, 50], axis=0).tobytes()


@pytest.mark.parametrize(
    "ask",
    [
        lambda index, rows: index.search(rows, exclude=5),
        lambda index, rows: index.search(rows, exclude=[1, 2]),
        lambda index, rows: index.search(rows, exclude=[None, []]),
        lambda index, rows: index.search(rows, exclude=iter([[1], [2]])),
        lambda index, rows: index.search(rows, side=np.array(["both", "harmful"])),
        lambda index, rows: index.search(rows, approximate="False"),
        lambda index, rows: index.search(rows, approximate=np.array([True, False])),
        lambda index, rows: index.search(rows, where=[[1], [1, 2]]),
        lambda index, rows: index.search(rows, where={"a": [[1], [1, 2]]}),
        lambda index, rows: whence.Index(rows, np.array([1])),
        lambda index, rows: whence.Index([[1.0], [1.0, 2.0]]),
        lambda index, rows: whence.Matrix(rows.astype(">f4")),
        lambda index, rows: whence.Matrix(rows, columns=5),
        lambda index, rows: whence.Matrix(rows, columns=0),
        lambda index, rows: whence.Matrix("a\0b.npy"),
        lambda index, rows: whence.Matrix("a\udc00b\ud800.npy"),
        lambda index, rows: index.save("a\0b"),
    ],
)
def test_whatever_is_wrong_has_an_error_of_its_own(ask):
    rows = random_rows(2, 8)
    index = whence.Index(whence.Matrix(random_rows(50, 8), columns={"a": np.arange(50)}))
    with pytest.raises(errors.WhenceError, match=r"must|needs"):
        ask(index, rows)


def test_a_header_that_promises_more_than_the_file_has_is_damage(tmp_path):
    np.save(tmp_path / "rows.npy", random_rows(8, 8))
    content = (tmp_path / "rows.npy").read_bytes()
    for shape in (
        b"(-8, 8)",
        b"(10000000000000, 8)",
        b"(4611686018427387904, 4611686018427387904)",
    ):
        text = content[10:128].replace(b"(8, 8)", shape)
        text = text.rstrip(b"\n ").ljust(117) + b"\n"
        (tmp_path / "rows.npy").write_bytes(content[:10] + text + content[128:])
        with pytest.raises(errors.StoreError):
            whence.Matrix(tmp_path / "rows.npy")


def test_numbers_that_a_columns_type_cannot_hold_equal_none_in_it():
    large = 2**53
    matrix = whence.Matrix(
        random_rows(3, 4),
        columns={"whole": [large, large + 1, 7], "real": [float(large), 0.5, 7.0]},
    )
    assert matrix.eligible({"whole": float(large)}).tolist() == [True, False, False]
    assert matrix.eligible({"real": large + 1}).tolist() == [False, False, False]
    assert matrix.eligible({"real": [large, 7]}).tolist() == [True, False, True]
    assert matrix.eligible({"whole": [7.0, 0.5, np.nan, np.inf, 1e300]}).tolist() == [0, 0, 1]


def test_unaligned_rows_are_rows():
    rows = random_rows(40, 8)
    bytes_of = np.frombuffer(b"x" + rows.tobytes(), np.uint8)[1:]
    unaligned = bytes_of.view(np.float32).reshape(rows.shape)
    assert not unaligned.flags.aligned
    same(whence.Index(unaligned).search(rows[:2]), whence.Index(rows).search(rows[:2]))


def test_hits_are_pickled_with_their_columns(tmp_path):
    store = fill(tmp_path / "s", random_rows(50), label=np.arange(50) % 3)
    for source in (store, whence.Matrix(store.rows(), columns={"label": np.arange(50) % 3})):
        hits = whence.Index(source).search(random_rows(2, seed=1), 5)
        found = pickle.loads(pickle.dumps(hits))
        same(found, hits)
        assert found.columns["label"].tolist() == (np.arange(50) % 3).tolist()
        assert str(found) == str(hits)


def mix(state):
    """As docs/randomness.md has it."""
    state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    state = (state ^ state >> 27) * 0x94D049BB133111EB % 2**64
    return state ^ state >> 31


def test_the_digest_of_rows_is_the_one_that_is_described(tmp_path):
    golden = 0x9E3779B97F4A7C15
    fill(tmp_path / "s", random_rows(70, 9), checkpoint="a", rate=0.5, dtype="float32")
    fill(tmp_path / "s", random_rows(70, 9, seed=1), checkpoint="b", rate=0.1, dtype="float32")
    store, matrix = whence.open(tmp_path / "s"), whence.Matrix(random_rows(70, 9))
    for name, source in (("store", store), ("matrix", matrix)):
        whence.Index(source, "certified").save(tmp_path / name)
        manifest = (tmp_path / name / "manifest.json").read_bytes()
        ones = np.ones(70, np.float32)
        scales = ones if name == "matrix" else source.scales
        numbers = source.row_numbers()
        digest = 0
        for example in range(70):
            state = 0
            for number in numbers[:, example]:
                row = source.core.read(np.array([number], np.uint64))[0]
                if name == "store":  # as it is stored, in units of its norm
                    file = np.concatenate(
                        [np.load(path) for path in sorted((tmp_path / "s").glob("*/rows.npy"))]
                    )
                    row = file[number]
                crc = zlib.crc32(row.astype(np.float32).tobytes())
                scale = int(scales[number].view(np.uint32))
                state = mix(((state ^ (crc << 32 | scale)) + golden) % 2**64)
            digest += state * pow(golden, example, 2**64)
        found = json.loads(manifest.splitlines()[0])["rows"]["digest"]
        assert found == f"{digest % 2**64:016x}"


@pytest.mark.parametrize("bits", [4, 8])
def test_saved_codes_mean_what_is_described(tmp_path, bits):
    rows = steep_rows(2100, 200)
    whence.Index(rows, "certified", bits=bits, basis="eigen").save(tmp_path / "index")
    body = json.loads((tmp_path / "index" / "manifest.json").read_bytes().splitlines()[0])

    def array(name):
        return np.load(tmp_path / "index" / f"{name}.npy")

    squares, errors_of = np.zeros(2100), np.zeros(2100)
    widths = body["widths"]
    assert len(widths) == 2
    norms = np.linalg.norm(rows[array("order")].astype(np.float64), axis=1)
    assert (norms[:-1] >= norms[1:] * (1 - 1e-6)).all()
    for number, width in enumerate(widths):
        upper = array(f"segment-{number}-upper").reshape(2100, width)
        scales = array(f"segment-{number}-scales").astype(np.float64)[:, None]
        values = 16 * (np.concatenate([upper & 15, upper >> 4], axis=1) - 7.5)
        errors_name = f"segment-{number}-upper-errors"
        if bits == 8:
            lower = array(f"segment-{number}-lower").reshape(2100, width)
            values = values + np.concatenate([lower & 15, lower >> 4], axis=1) - 7.5
            errors_name = f"segment-{number}-errors"
        lost = (array(errors_name).astype(np.uint32) << 16).view(np.float32)
        squares += ((values * scales) ** 2).sum(axis=1)
        errors_of += lost.astype(np.float64) ** 2
        if number == 0:
            tails = (array("segment-0-tails").astype(np.uint32) << 16).view(np.float32)
            first = np.sqrt(np.maximum(norms**2 - tails.astype(np.float64) ** 2, 0))
            assert (first <= np.sqrt(squares) + lost + 1e-6 * norms).all()
    # The rotation keeps norms, so a row's is within the errors of its code's.
    assert (np.abs(np.sqrt(squares) - norms) <= np.sqrt(errors_of) * (1 + 1e-6)).all()
    reaches = array("reaches")
    assert (reaches >= np.maximum.reduceat(norms, np.arange(0, 2100, 128)) * (1 - 1e-6)).all()


def test_a_save_that_fails_leaves_nothing_behind(tmp_path, monkeypatch):
    index = whence.Index(random_rows(2100, 20), "certified")

    def full(path, body):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("whence.search.kept.write_json", full)
        with pytest.raises(errors.StoreError, match="No space left"):
            index.save(tmp_path / "index")
    assert list(tmp_path.iterdir()) == []
    index.save(tmp_path / "index")
    assert len(whence.Index.load(tmp_path / "index", random_rows(2100, 20))) == 2100
