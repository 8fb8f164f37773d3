"""Rows of few bits: what is stored, how much is lost, and that searches find what is there."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from filled import fill, manifest, random_rows
from hypothesis import given, settings
from hypothesis import strategies as st
from test_store import rewrite, rewrite_shard

import whence
from whence import _core, errors
from whence.store import Checkpoint, Writer

BITS = {"int8": 8, "int4": 4, "int2": 2, "int1": 1}
TOP = {8: 127, 4: 15, 2: 3, 1: 1}
DTYPES = list(BITS)


def levels_of(packed, dim, bits):
    """[rows, dim] the levels of codes, by the format's words."""
    if bits == 8:
        return packed.astype(np.float64)
    stream = np.unpackbits(packed, axis=1, bitorder="little")[:, : dim * bits]
    codes = stream.reshape(len(packed), dim, bits) @ (1 << np.arange(bits))
    return 2.0 * codes - (2**bits - 1)


def nearest(values, scale, bits):
    """The levels that are nearest to values."""
    if bits == 8:
        return np.clip(np.rint(values / scale), -127, 127)
    return np.clip(2 * np.floor(values / scale / 2) + 1, -TOP[bits], TOP[bits])


def stored(path, dim, bits):
    """[rows, dim] the rows of a store, read with numpy."""
    found = []
    for shard in sorted(path.glob("shard-*")):
        packed, scales = np.load(shard / "rows.npy"), np.load(shard / "scales.npy")
        assert packed.dtype == (np.int8 if bits == 8 else np.uint8)
        assert packed.shape == (len(scales), -(-dim * bits // 8))
        found.append(levels_of(packed, dim, bits) * scales[:, None].astype(np.float64))
    return np.concatenate(found)


def drawn(kind, count, dim, seed=0):
    """[count, dim] rows of a kind, in float32."""
    generator = np.random.default_rng(seed)
    rows = generator.laplace(size=(count, dim)) if kind == "laplace" else None
    rows = generator.normal(size=(count, dim)) if rows is None else rows
    if kind == "sparse":
        rows *= generator.random((count, dim)) < 0.1
        rows[:, 0] = 1.0  # of no row nothing is left
    if kind == "tiny":
        rows *= 1e-36
    return rows.astype(np.float32)


def least(row, bits, clips=2000):
    """The least squared error over many clipping values, each with its best scale."""
    row = row.astype(np.float64)
    scales = np.linspace(0, np.abs(row).max(), clips + 1)[1:] / TOP[bits]
    levels = nearest(row[None], scales[:, None], bits)
    along, square = levels @ row, (levels**2).sum(axis=1)
    gained = np.divide(along**2, square, out=np.zeros(clips), where=square > 0)
    return (row**2).sum() - gained.max()


@pytest.mark.parametrize("bits", BITS.values())
@settings(max_examples=40, deadline=None)
@given(
    kind=st.sampled_from(["normal", "laplace", "sparse", "tiny"]),
    dim=st.sampled_from([64, 100, 256, 777]),
    seed=st.integers(0, 2**32),
)
def test_no_clipping_value_loses_a_percent_less(bits, kind, dim, seed):
    rows = drawn(kind, 1, dim, seed)
    packed, scales, found = _core.quantise(rows, bits)
    back = levels_of(packed, dim, bits) * scales.astype(np.float64)[:, None]
    lost = ((rows - back) ** 2).sum()
    square = (rows.astype(np.float64) ** 2).sum()
    assert lost <= 1.01 * least(rows[0], bits) + 1e-9 * square
    assert found[0] == pytest.approx(np.sqrt(lost / square), rel=1e-5)


def test_normal_rows_lose_what_a_uniform_quantiser_of_normal_values_does():
    # Max, "Quantizing for minimum distortion", 1960, table II: 0.3634, 0.1188, 0.01154 of the
    # power at 2, 4 and 16 levels; few values clip less, and lose a little less.
    rows = drawn("normal", 20, 20_000)
    for bits, power in ((1, 0.3634), (2, 0.1188), (4, 0.01154)):
        error = _core.quantise(rows, bits)[2]
        assert np.square(error).mean() == pytest.approx(power, rel=0.01)


@pytest.mark.parametrize("bits", BITS.values())
def test_codes_are_those_of_the_nearest_levels(bits):
    rows = drawn("normal", 30, 333)
    packed, scales, _ = _core.quantise(rows, bits)
    wide = rows.astype(np.float64)
    assert np.array_equal(
        levels_of(packed, 333, bits), nearest(wide, scales[:, None].astype(np.float64), bits)
    )
    # What is left of a row's last byte is 0.
    left = np.unpackbits(packed.view(np.uint8), axis=1, bitorder="little")[:, 333 * bits :]
    assert not left.any()


@pytest.mark.parametrize("bits", BITS.values())
def test_every_instruction_set_gives_the_same_bits(bits, tmp_path):
    script = f"""
import numpy as np
from whence import _core
rows = np.random.default_rng(0).standard_normal((20, 777), np.float32)
packed, scales, errors = _core.quantise(rows, {bits})
print(hash((packed.tobytes(), scales.tobytes(), errors.tobytes())))
"""
    found = {
        subprocess.run(
            [sys.executable, "-c", script],
            env={**os.environ, "PYTHONHASHSEED": "0", "WHENCE_INSTRUCTION_SET": name},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for name in ("scalar", _core.instruction_set())
    }
    assert len(found) == 1


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [1, 13, 64])
def test_rows_on_disk_are_levels_times_scales(tmp_path, dtype, dim):
    rows = random_rows(50, dim)
    rows[7] = 0
    store = fill(tmp_path / "s", rows, dtype=dtype, parts=3)
    expected = stored(tmp_path / "s", dim, BITS[dtype])
    assert np.array_equal(store.rows(), expected.astype(np.float32))
    some = np.array([30, 7, 2, 49])
    assert np.array_equal(store.rows(some), expected[some].astype(np.float32))
    assert np.allclose(store.norms(), np.linalg.norm(expected, axis=1), rtol=1e-6)
    assert np.allclose(store.self_influence(), (expected**2).sum(axis=1), rtol=1e-6)
    assert not store.rows(np.array([7])).any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_mean_relative_error_is_kept(tmp_path, dtype):
    rows = random_rows(50, 40)
    rows[3] = 0
    fill(tmp_path / "s", rows[:9], dtype=dtype, parts=2)
    store = fill(tmp_path / "s", rows[9:], ids=np.arange(9, 50), dtype=dtype)  # goes on
    assert store.ids.tolist() == list(range(50))
    lost = np.linalg.norm(rows - stored(tmp_path / "s", 40, BITS[dtype]), axis=1)
    norms = np.linalg.norm(rows.astype(np.float64), axis=1)
    expected = np.divide(lost, norms, out=np.zeros(50), where=norms > 0).mean()
    assert store.quantisation_error == pytest.approx(expected, rel=1e-5)
    assert repr(store).endswith(f"{dtype}, relative error {expected:.3f}>")


def test_stores_of_floats_say_nothing_of_an_error(tmp_path):
    store = fill(tmp_path / "s", random_rows(5), dtype="float16")
    assert store.quantisation_error is None
    assert "error" not in repr(store)
    newest = max((tmp_path / "s").glob("manifest-*.json"))
    assert "error" not in json.loads(newest.read_text().splitlines()[0])["shards"][0]


def test_a_shard_that_does_not_know_the_error_opens(tmp_path):
    rows = random_rows(9)
    fill(tmp_path / "s", rows, dtype="int4", parts=2)
    rewrite_shard(tmp_path / "s", 2, lambda body: body.pop("error"))
    store = whence.open(tmp_path / "s")
    assert store.quantisation_error is None
    assert store.search(rows[:1], 9).helpful.ids.shape == (1, 9)


def best(scores, k):
    """Numbers of the k largest and the k smallest of each row; of equal ones the lower first."""
    return np.argsort(-scores, axis=1, kind="stable")[:, :k], np.argsort(
        scores, axis=1, kind="stable"
    )[:, :k]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("queries", [1, 40])
def test_a_search_finds_what_numpy_finds_in_the_stored_rows(tmp_path, dtype, queries):
    store = fill(tmp_path / "s", random_rows(3000, 77), dtype=dtype, parts=3)
    asked = random_rows(queries, 77, seed=1)
    scores = asked.astype(np.float64) @ stored(tmp_path / "s", 77, BITS[dtype]).T
    hits = store.search(asked, 12)
    helpful, harmful = best(scores, 12)
    assert np.array_equal(hits.helpful.ids, helpful)
    assert np.array_equal(hits.harmful.ids, harmful)
    expected = np.take_along_axis(scores, helpful, axis=1)
    assert np.allclose(hits.helpful.scores, expected, rtol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_scores_of_whole_numbers_are_exact_and_ties_in_order(tmp_path, dtype):
    generator = np.random.default_rng(0)
    top = min(TOP[BITS[dtype]], 15)
    rows = generator.integers(0, top + 1, (2500, 9)) * 2 - top  # ties are everywhere
    rows[:, 0] = top
    rows = (rows * 0.5).astype(np.float32)
    store = fill(tmp_path / "s", rows, dtype=dtype, parts=2)
    assert np.array_equal(store.rows(), rows)
    asked = generator.integers(-3, 4, (5, 9)).astype(np.float32)
    helpful, harmful = best(asked @ rows.T, 20)
    for index in (store, whence.Index(store, "exact"), whence.Index(store, "certified")):
        hits = index.search(asked, 20)
        assert np.array_equal(hits.helpful.ids, helpful)
        assert np.array_equal(hits.harmful.ids, harmful)
        scores = np.take_along_axis(asked @ rows.T, harmful, axis=1)
        assert np.array_equal(hits.harmful.scores, scores)


def same(found, expected):
    for mine, theirs in ((found.helpful, expected.helpful), (found.harmful, expected.harmful)):
        assert mine.ids.tolist() == theirs.ids.tolist()
        assert mine.scores.tobytes() == theirs.scores.tobytes()


@pytest.mark.parametrize("method", ["exact", "certified", "hnsw"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_an_index_answers_as_the_stored_rows_do(tmp_path, method, dtype):
    store = fill(tmp_path / "s", random_rows(2600, 130), dtype=dtype, parts=3)
    asked = random_rows(9, 130, seed=1)
    scores = asked.astype(np.float64) @ stored(tmp_path / "s", 130, BITS[dtype]).T
    helpful, harmful = best(scores, 15)
    index = whence.Index(store, method, threads=2)
    hits = index.search(asked, 15, threads=2)
    assert hits.exact.all()
    assert np.array_equal(hits.helpful.ids, helpful)
    assert np.array_equal(hits.harmful.ids, harmful)
    same(hits, store.search(asked, 15))
    keep = np.arange(2600) % 3 == 0
    same(index.search(asked, 5, where=keep), store.search(asked, 5, where=keep))


@pytest.mark.parametrize("method", ["certified", "hnsw"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_approximate_answers_are_as_good_as_of_the_same_rows_in_float32(tmp_path, method, dtype):
    generator = np.random.default_rng(0)
    rows = generator.normal(size=(2600, 48))
    rows = (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)
    store = fill(tmp_path / "s", rows, dtype=dtype, parts=2)
    asked = generator.normal(size=(30, 48)).astype(np.float32)
    index = whence.Index(store, method)
    found = index.search(asked, 10, side="helpful", approximate=True)
    assert not found.exact.any()
    if method == "hnsw":
        assert "a walk over the graph" in str(index.explain())
    products = asked.astype(np.float64) @ stored(tmp_path / "s", 48, BITS[dtype]).T
    taken = np.take_along_axis(products, found.helpful.ids, axis=1)
    assert np.allclose(found.helpful.scores, taken, rtol=1e-4, atol=1e-6)
    expected = best(products, 10)[0]

    def recall(hits):
        pairs = zip(hits.helpful.ids, expected, strict=True)
        return np.mean([len(np.intersect1d(*pair)) for pair in pairs]) / 10

    plain = whence.Index(store.rows(), method)
    other = plain.search(asked, 10, side="helpful", approximate=True)
    assert recall(found) > max(0.8, recall(other) - 0.05)


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_exact_index_keeps_rows_packed(tmp_path, dtype):
    store = fill(tmp_path / "s", random_rows(500, 64), dtype=dtype, parts=2)
    size = whence.Index(store, "exact").explain().bytes
    assert size <= 500 * (8 * BITS[dtype] + 4) + 100


@pytest.mark.parametrize("method", ["exact", "certified"])
def test_several_checkpoints_with_rates_are_one_score(tmp_path, method):
    first, second = random_rows(2500, 20, seed=1), random_rows(2500, 20, seed=2)
    order = np.random.default_rng(0).permutation(2500)
    fill(tmp_path / "s", first, checkpoint="a", rate=0.5, dtype="int4")
    store = fill(tmp_path / "s", second[order], order, checkpoint="b", rate=0.01, dtype="int4")
    rows = stored(tmp_path / "s", 20, 4)
    back = np.empty((2500, 20))
    back[order] = rows[2500:]
    asked = np.stack([random_rows(7, 20, seed=3), random_rows(7, 20, seed=4)])
    scores = 0.5 * (asked[0] @ rows[:2500].T) + np.float32(0.01) * (asked[1] @ back.T)
    hits = whence.Index(store, method).search(asked, 9)
    assert np.array_equal(hits.helpful.ids, best(scores, 9)[0])
    same(hits, store.search(asked, 9))
    norms = np.sqrt((rows[:2500] ** 2).sum(axis=1) + (back**2).sum(axis=1))
    assert (store.reaches >= norms).all()
    assert np.allclose(store.reaches, norms, rtol=2e-3)


def test_an_index_of_a_quantised_store_is_saved_and_grows(tmp_path):
    rows = random_rows(3000, 40)
    store = fill(tmp_path / "s", rows[:2500], dtype="int2")
    whence.Index(store, "certified").save(tmp_path / "index")
    store = fill(tmp_path / "s", rows[2500:], ids=np.arange(2500, 3000), dtype="int2")
    index = whence.Index.load(tmp_path / "index", store)
    asked = random_rows(5, 40, seed=1)
    same(index.search(asked, 10), store.search(asked, 10))
    other = fill(tmp_path / "other", rows, dtype="int4")
    with pytest.raises(errors.MismatchError):
        whence.Index.load(tmp_path / "index", other)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_of_another_length_shape_or_type_are_refused(tmp_path, dtype):
    fill(tmp_path / "s", random_rows(6, 13), dtype=dtype)
    path = next((tmp_path / "s").rglob("rows.npy"))
    original, array = path.read_bytes(), np.load(path)
    for content in (original[:-1], original + b"\0", b"", original[:40]):
        path.write_bytes(content)
        with pytest.raises(errors.StoreError, match=r"rows\.npy"):
            whence.open(tmp_path / "s").search(random_rows(1, 13))
    for wrong in (array[:, :-1], array[:-1], array.astype("i2"), array.view("?"), array.T.copy()):
        np.save(path, wrong)
        with pytest.raises(errors.StoreError, match=r"rows\.npy is damaged"):
            whence.open(tmp_path / "s").search(random_rows(1, 13))


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda body: body.update(dtype="int2"), r"shape \[6, 4\]"),
        (lambda body: body.update(dtype="int8"), r"must hold \|i1"),
        (lambda body: body.update(dtype="int3"), "dtype must be one of"),
        (lambda body: body["sketch"].update(layout="factored"), "float for rows of factors"),
    ],
)
def test_a_hostile_manifest_is_refused(tmp_path, change, match):
    fill(tmp_path / "s", random_rows(6), dtype="int4")
    rewrite(tmp_path / "s", change)
    with pytest.raises(errors.StoreError, match=match):
        whence.open(tmp_path / "s").search(random_rows(1))


def test_a_store_of_another_type_is_not_appended_to(tmp_path):
    fill(tmp_path / "s", random_rows(6), dtype="int4")
    with pytest.raises(errors.MismatchError, match=r"dtype must be 'int4'.* got 'int8'"):
        Writer(tmp_path / "s", manifest(dtype="int8"))


@pytest.mark.parametrize("value", [np.nan, np.inf, 3e38])
def test_what_is_not_finite_is_refused_and_nothing_of_it_stored(tmp_path, value):
    rows = random_rows(4)
    rows[2, 5:8] = value
    writer = Writer(tmp_path / "s", manifest(dtype="int4"))
    writer.set_checkpoint(Checkpoint("0"))
    with pytest.raises(errors.NotFiniteError, match="row 2"):
        writer.append(np.arange(4), rows, {})
    writer.append(np.arange(4, 6), rows[:2], {})
    writer.close()
    assert whence.open(tmp_path / "s").ids.tolist() == [4, 5]


def recorded(path, **settings):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))
    x, y = torch.randn(12, 6), torch.arange(12) % 3
    with whence.record(model, path, **settings) as rec, rec.batch(range(12)):
        torch.nn.functional.cross_entropy(model(x), y).backward()
    return whence.open(path), lambda: torch.nn.functional.cross_entropy(model(x[:2]), y[:2]), model


@pytest.mark.parametrize("layout", ["global", "per_layer"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_recorded_rows_are_the_quantised_sketches(tmp_path, dtype, layout):
    plain, _, _ = recorded(tmp_path / "plain", dim=64, dtype="float32", layout=layout)
    store, closure, model = recorded(tmp_path / "s", dim=64, dtype=dtype, layout=layout)
    error = np.linalg.norm(store.rows() - plain.rows(), axis=1) / plain.norms()
    assert store.quantisation_error == pytest.approx(error.mean(), abs=1e-5)
    # Zeros, of which these rows have many, are no level of 4 bits and fewer.
    assert error.max() < {"int8": 0.02, "int4": 0.4, "int2": 0.75, "int1": 0.95}[dtype]
    hits = whence.query(model, store, closure, k=3)
    assert hits.helpful.ids.shape == (2, 3)


def test_factors_are_not_quantised(tmp_path):
    with pytest.raises(errors.ArgumentError, match="dtype must be 'float16' or 'float32' with"):
        recorded(tmp_path / "s", layout="factored", dtype="int4")
    assert not (tmp_path / "s").exists()


def test_a_type_that_does_not_exist_is_refused(tmp_path):
    with pytest.raises(errors.ArgumentError, match="dtype must be one of float16, float32, int8"):
        recorded(tmp_path / "s", dtype="int3")


@pytest.mark.parametrize(
    ("error", "match"), [(-0.5, "got -0.5"), ("x", "got 'x'"), (10**400, "got 1000")]
)
def test_a_hostile_error_is_refused(tmp_path, error, match):
    fill(tmp_path / "s", random_rows(6), dtype="int4")
    rewrite_shard(tmp_path / "s", 1, lambda body: body.update(error=error))
    with pytest.raises(errors.StoreError, match=f"error must be from 0 to 1, {match}"):
        whence.open(tmp_path / "s")
