"""Exported stores, read by numpy, pyarrow and pandas, imported again, and forged."""

import io
import json
import os
import pickle
import shutil
import struct
import sys
import tracemalloc
import zipfile
import zlib
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from filled import fill, manifest, random_rows
from hypothesis import given, settings
from hypothesis import strategies as st

import whence
from whence import errors
from whence.store import COMBINED, Checkpoint, Manifest, Writer, exchange
from whence.store.manifest import BITS, DTYPES

SUFFIXES = ["npz", "arrow", "parquet"]

COLUMNS = {
    "truth": [True, False, True, False],
    "number": [-1, 2**62, 0, -(2**63)],
    "value": [0.5, float("nan"), -0.0, float("inf")],
    "text": ["ü日本\n", "", "=cmd", "x" * 30],
}


def stored(path):
    """The stored rows and scales of a store, as numpy reads its files."""
    shards = sorted(path.glob("shard-*"))
    return [
        np.concatenate([np.load(shard / name) for shard in shards]).tobytes()
        for name in ("rows.npy", "scales.npy")
    ]


def told(path):
    """What a manifest says, but for the names of shards and the like."""
    found = Manifest.load(path)[0]
    found = replace(found, shards=[], packs=[], gone=None)
    checkpoints = [
        each if each.map is None else replace(each, map=replace(each.map, name=""))
        for each in found.checkpoints
    ]
    return replace(found, checkpoints=checkpoints)


def check_same(one, other):
    """That two stores are the same to the bit."""
    first, second = whence.open(one), whence.open(other)
    assert first.ids.tolist() == second.ids.tolist()
    assert np.array_equal(
        first.row_numbers(missing="keep") < 0, second.row_numbers(missing="keep") < 0
    )
    assert list(first.columns) == list(second.columns)
    for name in first.columns:
        there, here = first.columns[name], second.columns[name]
        assert there.dtype == here.dtype
        assert there.tolist() == here.tolist() or there.tobytes() == here.tobytes()
    assert told(one) == told(other)
    assert stored(one) == stored(other)
    there, here = first.quantisation_error, second.quantisation_error
    assert (there is None) == (here is None)
    assert there is None or here == pytest.approx(there)
    assert whence.verify(other).is_sound


def there_and_back(path, folder, suffix):
    """A store as one file, and the store that is made of that."""
    file, made = folder / f"export.{suffix}", folder / f"from-{suffix}"
    assert whence.export_store(path, file) == file
    assert whence.import_store(file, made) == made
    return file, made


# --- there and back -----------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_an_imported_store_is_the_same_to_the_bit(tmp_path, dtype, suffix):
    for name, seed, rate in (("begin", 0, 0.1), ("end", 1, None)):
        rows = random_rows(40, 13, seed=seed)  # 13 values of 4 bits do not fill their bytes
        fill(
            tmp_path / "s",
            rows,
            [f"id {number}" for number in range(40)],
            checkpoint=name,
            rate=rate,
            dtype=dtype,
            parts=3,
            **{name: values * 10 for name, values in COLUMNS.items()},
        )
    _, made = there_and_back(tmp_path / "s", tmp_path, suffix)
    check_same(tmp_path / "s", made)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_examples_need_not_have_every_checkpoint(tmp_path, suffix):
    fill(tmp_path / "s", random_rows(3), [5, 1, 9], checkpoint="0")
    fill(tmp_path / "s", random_rows(3, seed=1), [1, 7, 5], checkpoint="1")
    fill(tmp_path / "s", random_rows(1, seed=2), [8], checkpoint="0")
    writer = Writer(tmp_path / "s", None)
    writer.skip(np.array([44]))
    writer.close()
    _, made = there_and_back(tmp_path / "s", tmp_path, suffix)
    check_same(tmp_path / "s", made)
    assert whence.open(made).skipped == whence.open(tmp_path / "s").skipped != []


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_what_was_deleted_is_not_exported(tmp_path, suffix):
    fill(tmp_path / "s", random_rows(9), parts=2)
    unit = np.load(min((tmp_path / "s").glob("shard-*")) / "rows.npy")[3]
    whence.delete(tmp_path / "s", [0, 3, 8])
    file, made = there_and_back(tmp_path / "s", tmp_path, suffix)
    assert unit.tobytes() not in file.read_bytes()
    whence.compact(tmp_path / "s")
    check_same(tmp_path / "s", made)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_writers_are_exported_as_one_store(tmp_path, suffix):
    for number in (1, 2):
        writer = Writer(tmp_path / "job", manifest(), f"{number}/2")
        writer.set_checkpoint(Checkpoint("0"))
        writer.append(np.arange(3) + 10 * number, random_rows(3, seed=number), {})
        writer.close()
    _, made = there_and_back(tmp_path / "job", tmp_path, suffix)
    whence.merge([tmp_path / "job"], tmp_path / "m")
    check_same(tmp_path / "m", made)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_sums_over_checkpoints_are_exported(tmp_path, suffix):
    writer = Writer(tmp_path / "s", replace(manifest(), rows=COMBINED))
    writer.manifest.checkpoints += [Checkpoint(name, weight=0.5) for name in ("a", "b")]
    writer.touch()
    writer.close()
    writer = Writer(tmp_path / "s", None)
    writer._checkpoint = 0
    writer.append(np.arange(4), random_rows(4), {})
    writer.close()
    _, made = there_and_back(tmp_path / "s", tmp_path, suffix)
    check_same(tmp_path / "s", made)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_store_without_rows_is_exported(tmp_path, suffix):
    writer = Writer(tmp_path / "s", manifest())
    writer.touch()
    writer.close()
    _, made = there_and_back(tmp_path / "s", tmp_path, suffix)
    assert told(made) == told(tmp_path / "s")
    assert len(whence.open(made)) == 0


def model_of():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.Tanh(), torch.nn.Linear(5, 2))
    return model, torch.randn(9, 4)


def loss(model, x):
    return model(x).square().sum(1).mean()


def record(path, model, x, **options):
    with whence.record(model, path, **options) as rec, rec.batch(range(len(x))):
        loss(model, x).backward()


def scores(path, model, x):
    hits = whence.query(model, path, lambda: loss(model, x[:2]), k=9)
    return hits.helpful.ids.tolist(), hits.helpful.scores.tolist()


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_rows_of_factors_are_exported(tmp_path, suffix):
    model, x = model_of()
    record(tmp_path / "s", model, x, layout="factored", weight_gradients=False)
    _, made = there_and_back(tmp_path / "s", tmp_path, suffix)
    check_same(tmp_path / "s", made)
    assert scores(made, model, x) == scores(tmp_path / "s", model, x)
    with pytest.raises(errors.MismatchError, match="rows must be 'stored' for a store with layout"):
        whence.export_store(tmp_path / "s", tmp_path / f"x.{suffix}", rows="float32")


def preconditioned(path):
    model, x = model_of()
    factors = whence.fit_factors(
        model, [(x,)], lambda part: loss(model, part), labels="empirical", sample=9, progress=False
    )
    record(path, model, x, precondition=factors, dim=6, dtype="int4")
    return model, x


def test_preconditioned_rows_come_with_their_maps(tmp_path):
    model, x = preconditioned(tmp_path / "s")
    file, made = there_and_back(tmp_path / "s", tmp_path, "npz")
    check_same(tmp_path / "s", made)
    maps = [
        {each.name: each.read_bytes() for each in next(path.glob("map-*")).iterdir()}
        for path in (tmp_path / "s", made)
    ]
    assert maps[0] == maps[1]
    with np.load(file) as arrays:
        assert np.array_equal(
            arrays["maps/1/basis"], np.load(next((tmp_path / "s").glob("map-*")) / "basis.npy")
        )
    wanted = scores(tmp_path / "s", model, x)
    shutil.rmtree(tmp_path / "s")
    assert scores(made, model, x) == wanted


@pytest.mark.parametrize("suffix", ["arrow", "parquet"])
def test_maps_have_no_place_in_a_table(tmp_path, suffix):
    preconditioned(tmp_path / "s")
    with pytest.raises(errors.ArgumentError, match="format must be 'npz' for preconditioned rows"):
        whence.export_store(tmp_path / "s", tmp_path / f"x.{suffix}")
    whence.export_store(tmp_path / "s", tmp_path / f"x.{suffix}", rows="float32")


@settings(max_examples=20, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.text(st.characters(exclude_characters="\0"), max_size=6),
            st.text(st.characters(exclude_characters="\0"), max_size=6),
            st.floats(),
        ),
        min_size=1,
        max_size=12,
        unique_by=lambda each: each[0],
    ),
    st.sampled_from(SUFFIXES),
)
def test_any_text_and_number_comes_back(tmp_path_factory, rows, suffix):
    path = tmp_path_factory.mktemp("any")
    ids, texts, values = zip(*rows, strict=True)
    columns = {"a/../b": np.array(texts, object), "../value": np.array(values)}
    fill(path / "s", random_rows(len(ids)), np.array(ids, np.str_), **columns)
    try:
        _, made = there_and_back(path / "s", path, suffix)
    except errors.ArgumentError as error:
        assert "half a surrogate pair" in str(error)  # noqa: PT017
        assert suffix != "npz"
        return
    check_same(path / "s", made)


def test_texts_of_any_length_come_back(tmp_path):
    texts = ["", "long " * 500, "ü" * 1024, "日本\udc80"]
    fill(
        tmp_path / "s", random_rows(4), ["a", "b", "c", "d" * 1024], text=texts, short=texts[:1] * 4
    )
    file, made = there_and_back(tmp_path / "s", tmp_path, "npz")
    check_same(tmp_path / "s", made)
    with np.load(file) as arrays:
        assert arrays["ids"].dtype == "<U1024"
        assert arrays["columns/short"].tolist() == [""] * 4
        content, ends = arrays["bytes/columns/text"].tobytes(), arrays["offsets/columns/text"]
    found = [content[start:end] for start, end in pairwise(ends)]
    assert found == [text.encode("utf-8", "surrogatepass") for text in texts]


def test_half_a_surrogate_pair_has_no_place_in_a_table(tmp_path):
    fill(tmp_path / "s", random_rows(1), ["a\udc80"])
    fill(tmp_path / "t", random_rows(1), ["a"], **{"a\udc80": [1]})
    for path in (tmp_path / "s", tmp_path / "t"):
        for suffix in ("arrow", "parquet"):
            with pytest.raises(errors.ArgumentError, match="half a surrogate pair, got '"):
                whence.export_store(path, tmp_path / f"x.{suffix}")
    assert not [*tmp_path.glob("x.*"), *tmp_path.glob("*.part")]


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("size", [1 << 20, 1 << 13])
def test_many_rows_in_many_pages_come_back(tmp_path, monkeypatch, suffix, size):
    """Texts fill several pages of Parquet, and bools of a page do not end with a byte."""
    monkeypatch.setattr("whence.store.tables.GROUP", size)
    generator, count = np.random.default_rng(0), 20_011
    fill(
        tmp_path / "s",
        random_rows(count, 3),
        [f"id {number}" for number in range(count)],
        parts=3,
        truth=generator.random(count) < 0.3,
        text=["x" * int(length) for length in generator.integers(0, 300, count)],
        number=generator.integers(-(2**62), 2**62, count),
        value=generator.normal(size=count),
    )
    whence.delete(tmp_path / "s", ["id 7", "id 20000"])
    _, made = there_and_back(tmp_path / "s", tmp_path, suffix)
    whence.compact(tmp_path / "s")
    check_same(tmp_path / "s", made)


# --- read by others -----------------------------------------------------------------------------


def test_numpy_reads_the_arrays(tmp_path):
    rows = random_rows(4)
    fill(tmp_path / "s", rows, list("abcd"), dtype="float16", **COLUMNS)
    whence.export_store(tmp_path / "s", tmp_path / "x.npz")
    with np.load(tmp_path / "x.npz", allow_pickle=False) as arrays:
        assert arrays["ids"].tolist() == list("abcd")
        assert arrays["checkpoints"].tolist() == ["0"] * 4
        assert arrays["rows"].dtype == np.float16
        found = arrays["rows"].astype(np.float32) * arrays["scales"][:, None]
        assert np.allclose(found, rows, rtol=2e-3, atol=1e-4 * np.abs(rows).max())
        for name, values in COLUMNS.items():
            assert arrays[f"columns/{name}"].tolist()[2:] == values[2:]
            assert arrays[f"columns/{name}"].dtype == np.asarray(values).dtype
        assert json.loads(str(arrays["whence"]).splitlines()[0])["rows"] == 4


@pytest.mark.parametrize("dtype", list(BITS))
def test_quantised_values_can_be_decoded_by_their_definition(tmp_path, dtype):
    bits, dim = BITS[dtype], 13
    store = fill(tmp_path / "s", random_rows(6, dim), dtype=dtype)
    whence.export_store(tmp_path / "s", tmp_path / "x.npz")
    with np.load(tmp_path / "x.npz") as arrays:
        packed, scales = arrays["rows"], arrays["scales"]
    if dtype == "int8":
        levels = packed.astype(np.float32)
    else:
        places = np.arange(dim) * bits
        codes = packed[:, places // 8] >> (places % 8) & (1 << bits) - 1
        levels = 2.0 * codes - (2**bits - 1)
    assert np.allclose(levels * scales[:, None], store.rows(), rtol=1e-6)


@pytest.mark.parametrize("dtype", ["float16", "float32", "int8", "int4"])
def test_rows_as_numbers_are_those_of_the_store(tmp_path, dtype):
    fill(tmp_path / "s", random_rows(7), dtype=dtype, label=np.arange(7), parts=2)
    whence.delete(tmp_path / "s", [4])
    store = whence.open(tmp_path / "s")
    for suffix in SUFFIXES:
        whence.export_store(tmp_path / "s", tmp_path / f"x.{suffix}", rows="float32")
    with np.load(tmp_path / "x.npz") as arrays:
        assert arrays["rows"].tobytes() == store.rows().tobytes()
        assert arrays["rows"].shape == (6, 16)
        assert "scales" not in arrays
    for table in (
        pa.ipc.open_file(tmp_path / "x.arrow").read_all(),
        pq.read_table(tmp_path / "x.parquet"),
    ):
        table.validate(full=True)
        rows = np.array(table["row"].to_pylist(), np.float32)
        assert rows.tobytes() == store.rows().tobytes()
        assert table["id"].to_pylist() == table["label"].to_pylist() == store.ids.tolist()
    frame = pd.read_parquet(tmp_path / "x.parquet")
    assert np.stack(frame["row"]).tobytes() == store.rows().tobytes()
    for suffix in SUFFIXES:
        with pytest.raises(errors.StoreError, match=r"export with rows='stored'"):
            whence.import_store(tmp_path / f"x.{suffix}", tmp_path / "y")


@pytest.mark.parametrize("dtype", DTYPES)
def test_pyarrow_reads_the_table(tmp_path, dtype):
    fill(tmp_path / "s", random_rows(4), list("abcd"), dtype=dtype, **COLUMNS)
    for suffix in ("arrow", "feather", "parquet"):
        whence.export_store(tmp_path / "s", tmp_path / f"x.{suffix}")
    for table in (
        pa.ipc.open_file(tmp_path / "x.arrow").read_all(),
        pa.ipc.open_file(tmp_path / "x.feather").read_all(),
        pq.read_table(tmp_path / "x.parquet"),
    ):
        table.validate(full=True)
        assert table.column_names == ["checkpoint", "id", "row", "scale", *COLUMNS]
        content = b"".join(table["row"].to_pylist())
        assert [content, table["scale"].to_numpy().tobytes()] == stored(tmp_path / "s")
        assert table["id"].to_pylist() == list("abcd")
        for name in ("truth", "number", "text"):
            assert table[name].to_pylist() == COLUMNS[name]
        assert np.array_equal(table["value"].to_numpy(), COLUMNS["value"], equal_nan=True)
    assert pd.read_parquet(tmp_path / "x.parquet")["text"].tolist() == COLUMNS["text"]


def test_columns_by_names_that_are_taken_have_others_in_a_table(tmp_path):
    names = ["id", "row", "scale", "checkpoint", "column.id", "ids"]
    writer = Writer(tmp_path / "s", manifest())
    writer.set_checkpoint(Checkpoint("0"))
    columns = {name: np.array([name] * 2, object) for name in names}
    writer.append(np.arange(2), random_rows(2), columns)
    writer.close()
    for suffix in SUFFIXES:
        file, made = there_and_back(tmp_path / "s", tmp_path, suffix)
        check_same(tmp_path / "s", made)
    found = pq.read_table(file)
    assert len(set(found.column_names)) == len(found.column_names)
    assert found["column.id"].to_pylist() == ["id"] * 2
    assert found["column.column.id"].to_pylist() == ["column.id"] * 2
    assert found["ids"].to_pylist() == ["ids"] * 2


def test_names_of_columns_are_no_paths_in_an_archive(tmp_path):
    names = ["../../x", "/etc/passwd", "a\\b", "..", "", "C:x"]
    fill(tmp_path / "s", random_rows(2), **{name: [1, 2] for name in names})
    file, made = there_and_back(tmp_path / "s", tmp_path, "npz")
    check_same(tmp_path / "s", made)
    with zipfile.ZipFile(file) as archive:
        found = {each.filename for each in archive.infolist() if "columns/" in each.filename}
        archive.extractall(tmp_path / "out")
    assert len(found) == len(names)
    assert {each.count("/") for each in found} == {1}
    assert len(list((tmp_path / "out" / "columns").iterdir())) == len(names)


def test_nothing_in_an_archive_is_compressed_and_its_checksums_hold(tmp_path):
    fill(tmp_path / "s", random_rows(30), parts=3)
    whence.export_store(tmp_path / "s", tmp_path / "x.npz")
    with zipfile.ZipFile(tmp_path / "x.npz") as archive:
        assert archive.testzip() is None
        assert {each.compress_type for each in archive.infolist()} == {zipfile.ZIP_STORED}


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_the_same_store_makes_the_same_file(tmp_path, suffix):
    fill(tmp_path / "s", random_rows(30), parts=3)
    for name in ("x", "y"):
        whence.export_store(tmp_path / "s", tmp_path / f"{name}.{suffix}")
    whence.compact(tmp_path / "s")
    whence.export_store(tmp_path / "s", tmp_path / f"z.{suffix}")
    found = {(tmp_path / f"{name}.{suffix}").read_bytes() for name in "xyz"}
    assert len(found) == 1 or suffix != "npz"
    assert (tmp_path / f"x.{suffix}").read_bytes() == (tmp_path / f"y.{suffix}").read_bytes()


# --- files appear whole -------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_an_export_that_fails_leaves_the_file_that_was_there(tmp_path, monkeypatch, suffix):
    fill(tmp_path / "s", random_rows(5))
    file = tmp_path / f"x.{suffix}"
    whence.export_store(tmp_path / "s", file)
    before = file.read_bytes()
    fill(tmp_path / "s", random_rows(5), np.arange(5, 10))
    for error, raised in ((OSError(28, "full"), errors.StoreError), (KeyboardInterrupt(),) * 2):

        def fails(*_, error=error):
            raise error

        with monkeypatch.context() as patch:
            patch.setattr("whence.store.exchange.sync", fails)
            with pytest.raises(raised if isinstance(raised, type) else KeyboardInterrupt):
                whence.export_store(tmp_path / "s", file)
        assert file.read_bytes() == before
        assert [each for each in tmp_path.iterdir() if each.is_file()] == [file]
    whence.export_store(tmp_path / "s", file)
    assert file.read_bytes() != before


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_of_two_exports_into_one_file_the_later_one_wins(tmp_path, monkeypatch, suffix):
    fill(tmp_path / "s", random_rows(5))
    fill(tmp_path / "t", random_rows(5), list("abcde"))
    file, sync = tmp_path / f"x.{suffix}", exchange.sync

    def another(handle):
        """The first export is written, and not there yet: another is made meanwhile."""
        monkeypatch.setattr(exchange, "sync", sync)
        whence.export_store(tmp_path / "s", file)
        whence.import_store(file, tmp_path / "first")
        sync(handle)

    (tmp_path / f"{file.name}.part").write_text("somebody's")
    monkeypatch.setattr(exchange, "sync", another)
    whence.export_store(tmp_path / "t", file)
    whence.import_store(file, tmp_path / "last")
    check_same(tmp_path / "s", tmp_path / "first")
    check_same(tmp_path / "t", tmp_path / "last")
    assert (tmp_path / f"{file.name}.part").read_text() == "somebody's"
    assert {each.name for each in tmp_path.glob("*.part")} == {f"{file.name}.part"}


def test_no_link_is_followed_to_a_file_that_is_written_over(tmp_path):
    fill(tmp_path / "s", random_rows(5))
    (tmp_path / "mine").write_text("mine")
    for name in ("x.npz", "x.npz.part"):
        (tmp_path / name).symlink_to(tmp_path / "mine")
    whence.export_store(tmp_path / "s", tmp_path / "x.npz")
    assert (tmp_path / "mine").read_text() == "mine"
    assert not (tmp_path / "x.npz").is_symlink()


def test_a_damaged_store_is_not_exported(tmp_path):
    fill(tmp_path / "s", random_rows(5))
    path = next((tmp_path / "s").rglob("rows.npy"))
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    for suffix in SUFFIXES:
        with pytest.raises(errors.StoreError, match=r"rows\.npy is damaged: block 0"):
            whence.export_store(tmp_path / "s", tmp_path / f"x.{suffix}")
    assert not [*tmp_path.glob("x.*"), *tmp_path.glob("*.part")]


@pytest.mark.parametrize(
    ("file", "options", "error", "match"),
    [
        ("x.csv", {}, errors.ArgumentError, r"file must end in one of \.npz, \.arrow, .* 'x\.csv'"),
        ("x.npz", {"format": "csv"}, errors.ArgumentError, "format must be one of arrow, npz, p"),
        ("x.npz", {"rows": "float64"}, errors.ArgumentError, "rows must be one of stored, float32"),
        (3, {}, errors.DtypeError, "file must be a path"),
        ("folder.npz", {}, errors.StoreError, "file must be new or a regular file"),
        ("pipe.npz", {}, errors.StoreError, "file must be new or a regular file"),
        ("nowhere/x.npz", {}, errors.StoreError, "No such file"),
        ("x.npz", {"progress": 1}, errors.DtypeError, "progress must be a bool or None"),
    ],
)
def test_what_cannot_be_exported_is_named(tmp_path, monkeypatch, file, options, error, match):
    fill(tmp_path / "s", random_rows(5))
    (tmp_path / "folder.npz").mkdir()
    os.mkfifo(tmp_path / "pipe.npz")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error, match=match):
        whence.export_store("s", file, **options)
    assert sorted(each.name for each in tmp_path.iterdir()) == ["folder.npz", "pipe.npz", "s"]


def test_a_format_may_be_said(tmp_path):
    fill(tmp_path / "s", random_rows(5))
    whence.export_store(tmp_path / "s", tmp_path / "export", format="parquet")
    assert pq.read_table(tmp_path / "export").num_rows == 5
    whence.import_store(tmp_path / "export", tmp_path / "t")
    check_same(tmp_path / "s", tmp_path / "t")


def test_only_writing_tables_needs_pyarrow(tmp_path, monkeypatch):
    fill(tmp_path / "s", random_rows(5))
    for suffix in SUFFIXES:
        whence.export_store(tmp_path / "s", tmp_path / f"x.{suffix}")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(errors.MissingDependencyError, match=r"pip install 'whence\[arrow\]'"):
        whence.export_store(tmp_path / "s", tmp_path / "y.parquet")
    whence.export_store(tmp_path / "s", tmp_path / "y.npz")
    for suffix in SUFFIXES:
        whence.import_store(tmp_path / f"x.{suffix}", tmp_path / f"from-{suffix}")
        check_same(tmp_path / "s", tmp_path / f"from-{suffix}")


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_rows_are_not_all_in_memory_at_once(tmp_path, suffix):
    rows = random_rows(16_000, 1024)
    fill(tmp_path / "s", rows)
    tracemalloc.start()
    whence.export_store(tmp_path / "s", tmp_path / f"x.{suffix}")
    whence.import_store(tmp_path / f"x.{suffix}", tmp_path / "t")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < rows.nbytes / 2
    assert stored(tmp_path / "s") == stored(tmp_path / "t")


def test_a_store_is_made_in_a_new_folder_only(tmp_path):
    fill(tmp_path / "s", random_rows(5))
    whence.export_store(tmp_path / "s", tmp_path / "x.npz")
    with pytest.raises(errors.StoreError, match="path must be a new folder, got the store"):
        whence.import_store(tmp_path / "x.npz", tmp_path / "s")
    (tmp_path / "link.npz").symlink_to(tmp_path / "x.npz")
    whence.import_store(tmp_path / "link.npz", tmp_path / "t")
    check_same(tmp_path / "s", tmp_path / "t")


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(errors.StoreError, match=r"file must be .*, got .*x\.npz, which does not"):
        whence.import_store(tmp_path / "x.npz", tmp_path / "t")
    assert list(tmp_path.iterdir()) == []


def test_no_file_of_the_store_is_written_over(tmp_path):
    fill(tmp_path / "s", random_rows(5))
    (tmp_path / "link").symlink_to(tmp_path / "s")
    before = whence.open(tmp_path / "s").rows()
    for file in ("s/manifest-00000001.json", "link/x.npz", "s/shard-00000001/rows.npy"):
        with pytest.raises(errors.ArgumentError, match="file must lie outside of the store, got"):
            whence.export_store(tmp_path / "s", tmp_path / file, format="npz")
    assert whence.verify(tmp_path / "s").is_sound
    np.testing.assert_array_equal(whence.open(tmp_path / "s").rows(), before)


# --- files that are not trusted -----------------------------------------------------------------


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_what_was_cut_short_is_refused(tmp_path, suffix):
    fill(tmp_path / "s", random_rows(50), list(map(str, range(50))), label=np.arange(50), parts=2)
    file = tmp_path / f"x.{suffix}"
    whence.export_store(tmp_path / "s", file)
    content = file.read_bytes()
    for length in [*range(12), *np.linspace(12, len(content) - 1, 40).astype(int)]:
        file.write_bytes(content[:length])
        with pytest.raises(errors.StoreError, match=file.name):
            whence.import_store(file, tmp_path / "t")
        assert not Manifest.exists(tmp_path / "t")


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_flipped_bit_is_refused_or_changes_nothing(tmp_path, suffix):
    fill(tmp_path / "s", random_rows(20), list(map(str, range(20))), label=np.arange(20), parts=2)
    file = tmp_path / f"x.{suffix}"
    whence.export_store(tmp_path / "s", file)
    content, generator, refused = file.read_bytes(), np.random.default_rng(0), 0
    for number in range(150):
        at, bit = generator.integers(len(content)), 1 << generator.integers(8)
        file.write_bytes(content[:at] + bytes([content[at] ^ bit]) + content[at + 1 :])
        made = tmp_path / f"t{number}"
        try:
            whence.import_store(file, made)
        except errors.StoreError:
            refused += 1
            assert not Manifest.exists(made)
        else:
            check_same(tmp_path / "s", made)
    assert refused > 30


def forge(file, change=None, body=None):
    """Changes arrays of an archive, or what it says, and makes every checksum fit."""
    with np.load(file) as found:
        arrays = {name: found[name] for name in found.files}
    said = json.loads(str(arrays.pop("whence")).splitlines()[0])
    if change is not None:
        change(arrays)
    for key in said["checksums"]:
        array = arrays[key]
        content = array.tobytes()
        if array.dtype.kind == "U":
            content = "".join(f"{text}\0" for text in array.tolist()).encode()
        said["checksums"][key] = f"{zlib.crc32(content):08x}"
    said["rows"] = len(arrays["ids"])
    if body is not None:
        body(said)
    text = json.dumps(said)
    arrays = {"whence": np.array(f"{text}\n{zlib.crc32(text.encode()):08x}\n"), **arrays}
    np.savez(file, **arrays)


def small(tmp_path, **options):
    fill(tmp_path / "s", random_rows(4, 13), list("abcd"), truth=[True, False] * 2, **options)
    return whence.export_store(tmp_path / "s", tmp_path / "x.npz")


def test_a_forgery_that_changes_nothing_is_an_export(tmp_path):
    forge(small(tmp_path))
    whence.import_store(tmp_path / "x.npz", tmp_path / "t")
    check_same(tmp_path / "s", tmp_path / "t")


def _put(key, value, at=0):
    def change(arrays):
        arrays[key][at] = value

    return change


@pytest.mark.parametrize(
    ("dtype", "change", "match"),
    [
        ("float32", _put("scales", np.nan), "scales that are finite and not negative"),
        ("float32", _put("scales", -1), "scales that are finite and not negative"),
        ("float32", _put("scales", np.inf), "scales that are finite and not negative"),
        ("float32", _put("ids", "b"), "must have an id once at a checkpoint"),
        ("float32", _put("checkpoints", "9"), "rows of its checkpoints, got '9'"),
        ("float32", _put("rows", np.nan), "rows as a store of float32"),
        ("float32", _put("rows", 2), "rows as a store of float32"),
        ("float16", _put("rows", np.inf), "rows as a store of float16"),
        ("int8", _put("rows", -128), "rows as a store of int8"),
        ("int4", _put("rows", 255, (0, -1)), "rows as a store of int4"),
        ("int1", _put("rows", 32, (0, -1)), "rows as a store of int1"),
        ("float32", lambda it: it.update(ids=it["ids"][:3]), "must hold"),
        ("float32", lambda it: it.update(rows=it["rows"][:, :5]), "must hold <f4 of shape"),
        ("float32", lambda it: it.update(rows=it["rows"].astype(">f4")), "must hold <f4 of shape"),
        ("float32", lambda it: it.update(rows=np.asfortranarray(it["rows"])), "in C order"),
        ("float32", lambda it: it.update(rows=it["rows"].astype("<i4")), "must hold <f4 of shape"),
        ("float32", lambda it: it.update(ids=np.arange(4)), "must hold"),
        (
            "float32",
            lambda it: it.update(ids=np.array(["a" * 1025, "b", "c", "d"])),
            "ids of at most 1024",
        ),
    ],
)
def test_values_that_no_store_has_are_refused(tmp_path, dtype, change, match):
    forge(small(tmp_path, dtype=dtype), change)
    with pytest.raises(errors.StoreError, match=match):
        whence.import_store(tmp_path / "x.npz", tmp_path / "t")
    assert not Manifest.exists(tmp_path / "t")
    assert not list((tmp_path / "t").rglob("*.npy"))


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (
            lambda body: body.update(rows=10**15),
            "must hold 1000000000000000 rows that are not comp",
        ),
        (lambda body: body.update(rows=-1), "must hold -1 rows"),
        (lambda body: body.update(rows=True), "must hold True rows"),
        (lambda body: body.update(rows=3), "must hold"),
        (lambda body: body.update(version=9), "version must be 1, got 9"),
        (lambda body: body.update(format="x"), "must be an export of a store"),
        (lambda body: body.update(values="pickle"), "rows as they are stored, got 'pickle'"),
        (lambda body: body.update(error=0.5), "error must be from 0 to 1"),
        (lambda body: body.update(checksums={}), "do not fit its checksums"),
        (lambda body: body.update(manifest=[]), "is damaged: TypeError"),
        (lambda body: body.pop("manifest"), "is damaged: KeyError"),
        (lambda body: body["manifest"].update(packs=[{"name": "../x"}]), "has no shards"),
        (
            lambda body: body["manifest"].update(shards=[["shard-00000001", 0, 4, 1, "00000000"]]),
            "has no shards",
        ),
        (lambda body: body["manifest"].update(gone={}), "has no shards"),
        (lambda body: body["manifest"].update(dtype="object"), "dtype must be one of"),
        (lambda body: body["manifest"].update(ids=None), "rows must have ids and columns"),
        (lambda body: body["manifest"].update(columns=[]), "do not fit its checksums|must hold"),
        (lambda body: body["manifest"]["sketch"].update(dim=2**40), "rows must be from 1"),
        (lambda body: body["manifest"].update(requires=["magic"]), "requires must be of"),
    ],
)
def test_what_an_export_says_is_checked(tmp_path, change, match):
    forge(small(tmp_path), body=change)
    with pytest.raises(errors.StoreError, match=match):
        whence.import_store(tmp_path / "x.npz", tmp_path / "t")
    assert not Manifest.exists(tmp_path / "t")


def rewrite(file, change):
    """Writes an archive again, with other entries."""
    with zipfile.ZipFile(file) as archive:
        entries = {each.filename: archive.read(each) for each in archive.infolist()}
    with zipfile.ZipFile(file, "w") as archive:
        change(archive, entries)


def test_compressed_entries_are_refused(tmp_path):
    """4 GiB of zeros take 4 MiB there."""

    def change(archive, entries):
        for name, content in entries.items():
            kind = zipfile.ZIP_DEFLATED if name == "rows.npy" else zipfile.ZIP_STORED
            archive.writestr(name, content, kind)

    rewrite(small(tmp_path), change)
    with pytest.raises(errors.StoreError, match=r"neither compressed nor .*, got 'rows\.npy'"):
        whence.import_store(tmp_path / "x.npz", tmp_path / "t")


def test_no_pickle_is_opened(tmp_path):
    class Boom:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "boom"),)

    array = np.empty(4, object)
    array[0] = Boom()
    content = io.BytesIO()
    np.save(content, array, allow_pickle=True)
    assert b"mkdir" in content.getvalue()

    def change(archive, entries):
        for name, sound in entries.items():
            archive.writestr(name, content.getvalue() if name == "ids.npy" else sound)

    rewrite(small(tmp_path), change)
    with pytest.raises(errors.StoreError, match="must hold"):
        whence.import_store(tmp_path / "x.npz", tmp_path / "t")
    file = tmp_path / "y.npz"
    file.write_bytes(pickle.dumps(Boom()))
    with pytest.raises(errors.StoreError, match=r"must be a \.npz, \.arrow or .parquet file"):
        whence.import_store(file, tmp_path / "t")
    assert not (tmp_path / "boom").exists()


@pytest.mark.parametrize("name", ["rows.npy", "ids.npy", "whence.npy", "columns/truth.npy"])
def test_a_missing_array_is_named(tmp_path, name):
    rewrite(
        small(tmp_path),
        lambda archive, entries: [
            archive.writestr(each, content) for each, content in entries.items() if each != name
        ],
    )
    with pytest.raises(errors.StoreError, match=f"must have '(bytes/)?{name}"):
        whence.import_store(tmp_path / "x.npz", tmp_path / "t")


def test_entries_that_lie_over_each_other_are_refused(tmp_path):
    """Two names for the same bytes: a thousand of them make a bomb without compression."""
    file = small(tmp_path)
    with zipfile.ZipFile(file, "a") as archive:
        for number in range(200):
            twin = zipfile.ZipInfo(f"twin-{number}")
            entry = archive.getinfo("rows.npy")
            for name in ("header_offset", "file_size", "compress_size", "CRC"):
                setattr(twin, name, getattr(entry, name))
            archive.filelist.append(twin)
        archive._didModify = True
    with pytest.raises(errors.StoreError, match=r"entries are larger than it is|damaged"):
        whence.import_store(file, tmp_path / "t")


def test_bools_are_0_or_1(tmp_path):
    def change(arrays):
        arrays["columns/truth"] = np.array([0, 1, 2, 255], np.uint8).view(np.bool_)

    forge(small(tmp_path), change)
    with pytest.raises(errors.StoreError, match="bools that are 0 or 1"):
        whence.import_store(tmp_path / "x.npz", tmp_path / "t")


def test_texts_are_characters(tmp_path):
    def change(archive, entries):
        content = bytearray(entries["ids.npy"])
        content[-4:] = b"\xff\xff\xff\x7f"
        for name, sound in entries.items():
            archive.writestr(name, bytes(content) if name == "ids.npy" else sound)

    rewrite(small(tmp_path), change)
    with pytest.raises(errors.StoreError, match="must hold characters"):
        whence.import_store(tmp_path / "x.npz", tmp_path / "t")


@pytest.mark.parametrize("name", ["../evil", "/etc/evil", "map.json/../../evil", "", "A"])
def test_a_map_has_no_file_outside_of_its_folder(tmp_path, name):
    preconditioned(tmp_path / "s")
    whence.export_store(tmp_path / "s", tmp_path / "x.npz")

    def change(archive, entries):
        said = json.loads(np.load(io.BytesIO(entries["whence.npy"])).item().splitlines()[0])
        files = said["manifest"]["checkpoints"][0]["map"]["files"]
        files[f"{name}.npy"] = files.pop("basis.npy")
        text = json.dumps(said)
        content = io.BytesIO()
        np.save(content, np.array(f"{text}\n{zlib.crc32(text.encode()):08x}\n"))
        entries["whence.npy"] = content.getvalue()
        for each, sound in entries.items():
            archive.writestr(each, sound)

    rewrite(tmp_path / "x.npz", change)
    with pytest.raises(errors.StoreError, match="a file must lie in its folder"):
        whence.import_store(tmp_path / "x.npz", tmp_path / "t")
    assert not list(tmp_path.rglob("*evil*"))


def test_a_map_with_other_values_is_refused(tmp_path):
    preconditioned(tmp_path / "s")
    whence.export_store(tmp_path / "s", tmp_path / "x.npz")

    def change(archive, entries):
        for name, content in entries.items():
            if name == "maps/1/basis.npy":
                content = content[:-4] + b"\0\0\xc0\x7f"
            archive.writestr(name, content)

    rewrite(tmp_path / "x.npz", change)
    with pytest.raises(errors.StoreError, match=r"map-00000001/basis\.npy is damaged"):
        whence.import_store(tmp_path / "x.npz", tmp_path / "t")
    assert not Manifest.exists(tmp_path / "t")


def table_of(tmp_path, suffix):
    fill(tmp_path / "s", random_rows(4, 13), list("abcd"), truth=[True, False] * 2)
    file = whence.export_store(tmp_path / "s", tmp_path / f"x.{suffix}")
    return file, pq.read_table(file) if suffix == "parquet" else pa.ipc.open_file(file).read_all()


def write_table(file, table, **options):
    if file.suffix == ".parquet":
        options = {"compression": "NONE", "use_dictionary": False, **options}
        pq.write_table(table, file, **options)
    else:
        with pa.ipc.new_file(file, table.schema, **options) as writer:
            writer.write_table(table)


@pytest.mark.parametrize("suffix", ["arrow", "parquet"])
def test_tables_that_others_wrote_again_are_exports(tmp_path, suffix):
    file, table = table_of(tmp_path, suffix)
    write_table(file, table)
    whence.import_store(file, tmp_path / "t")
    check_same(tmp_path / "s", tmp_path / "t")


@pytest.mark.parametrize(
    ("suffix", "options"),
    [
        ("parquet", {"compression": "zstd"}),
        ("arrow", {"options": pa.ipc.IpcWriteOptions(compression="lz4")}),
        ("arrow", {"options": pa.ipc.IpcWriteOptions(compression="zstd")}),
    ],
)
def test_compressed_tables_are_refused(tmp_path, suffix, options):
    file, table = table_of(tmp_path, suffix)
    write_table(file, table, **options)
    with pytest.raises(errors.StoreError, match="that are not compressed"):
        whence.import_store(file, tmp_path / "t")


def test_a_table_with_dictionaries_is_refused(tmp_path):
    file, table = table_of(tmp_path, "arrow")
    at = table.schema.get_field_index("id")
    column = table["id"].dictionary_encode()
    write_table(file, table.set_column(at, pa.field("id", column.type, False), column))
    with pytest.raises(errors.StoreError, match="must have the columns"):
        whence.import_store(file, tmp_path / "t")


def test_a_text_that_is_named_a_thousand_times_is_no_bomb(tmp_path):
    """20 KiB of Parquet that would be 20 MiB of texts."""
    ids = np.arange(1000)
    fill(
        tmp_path / "s", random_rows(1000, 4, seed=1), ids, text=["x" * 20_000] * 1000, dtype="int1"
    )
    file = whence.export_store(tmp_path / "s", tmp_path / "x.parquet")
    write_table(file, pq.read_table(file), use_dictionary=["text"])
    assert file.stat().st_size < 100_000
    with pytest.raises(errors.StoreError, match="must hold plain pages, got coded ones"):
        whence.import_store(file, tmp_path / "t")


def _changed(table, name, column, nullable=False):
    at = table.schema.get_field_index(name)
    return table.set_column(at, pa.field(name, column.type, nullable), column)


@pytest.mark.parametrize("suffix", ["arrow", "parquet"])
@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda it: it.drop_columns(["scale"]), "must have the columns"),
        (lambda it: it.append_column("more", pa.array([1] * 4)), "must have the columns"),
        (lambda it: it.select([1, 0, 2, 3, 4]), "must have the columns"),
        (lambda it: it.slice(1), "must hold 4 rows"),
        (lambda it: pa.concat_tables([it, it]), "must hold 4 rows"),
        (lambda it: it.replace_schema_metadata({}), "must be an export of a store, got another t"),
        (lambda it: it.replace_schema_metadata({b"whence": b"{}"}), "does not fit its text"),
        (
            lambda it: _changed(it, "id", pa.array(["a", None, "c", "d"]), True),
            "must have the columns|has empty values",
        ),
        (lambda it: _changed(it, "id", pa.array([1, 2, 3, 4])), "must have the columns"),
        (lambda it: _changed(it, "id", pa.array(list("abcx"))), "do not fit its checksums"),
        (lambda it: _changed(it, "id", pa.array(list("abca"))), "do not fit its checksums"),
        (
            lambda it: _changed(it, "scale", pa.array([1, 2, np.nan, 3], pa.float32())),
            "scales that are finite",
        ),
        (lambda it: _changed(it, "id", pa.array(["a", "b\0", "c", "d"])), "NUL character"),
    ],
)
def test_other_tables_are_refused(tmp_path, suffix, change, match):
    file, table = table_of(tmp_path, suffix)
    write_table(file, change(table))
    with pytest.raises(errors.StoreError, match=match) as caught:
        whence.import_store(file, tmp_path / "t")
    assert file.name in str(caught.value)
    assert not Manifest.exists(tmp_path / "t")


@pytest.mark.parametrize("suffix", ["arrow", "parquet"])
def test_empty_values_are_refused_whatever_the_schema_says(tmp_path, suffix):
    file, table = table_of(tmp_path, suffix)
    schema = table.schema
    column = pa.array(["a", None, "c", "d"])
    columns = [column if name == "id" else table[name].chunk(0) for name in schema.names]
    if suffix == "arrow":
        with pa.ipc.new_file(file, schema) as writer:
            writer.write_batch(pa.RecordBatch.from_arrays(columns, schema=schema))
        with pytest.raises(errors.StoreError, match="it has empty values"):
            whence.import_store(file, tmp_path / "t")
    else:  # a column that is required has no place for them
        with pytest.raises(pa.ArrowInvalid):
            write_table(file, pa.Table.from_arrays(columns, schema=schema))


@pytest.mark.parametrize("make", ["folder", "pipe", "device", "empty", "text", "nothing"])
def test_what_is_no_file_is_refused_at_once(tmp_path, make):
    path = tmp_path / "x.npz"
    if make == "folder":
        path.mkdir()
    elif make == "pipe":
        os.mkfifo(path)
    elif make == "device":
        path.symlink_to("/dev/zero")
    elif make != "nothing":
        path.write_text("" if make == "empty" else "x,y\n1,2\n")
    with pytest.raises(errors.StoreError, match=r"x\.npz|zero"):
        whence.import_store(path, tmp_path / "t")
    assert not (tmp_path / "t").exists()


def test_an_interrupted_import_leaves_nothing_and_can_be_run_again(tmp_path, monkeypatch):
    file = small(tmp_path)

    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Manifest, "save", interrupted)
        with pytest.raises(KeyboardInterrupt):
            whence.import_store(file, tmp_path / "t")
    assert not (tmp_path / "t").exists()
    (tmp_path / "u").mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(Manifest, "save", interrupted)
        with pytest.raises(KeyboardInterrupt):
            whence.import_store(file, tmp_path / "u")
    assert [each.name for each in (tmp_path / "u").iterdir()] == [
        "lock"
    ]  # a folder of the caller's
    whence.import_store(file, tmp_path / "t")
    check_same(tmp_path / "s", tmp_path / "t")


# --- files that would take much more memory than they are long -----------------------------------


class Flat:
    """Bytes of a flatbuffer, whose offsets are put in once the places are known."""

    def __init__(self):
        self.bytes = bytearray()

    def put(self, content, align=4):
        self.bytes += b"\0" * (-len(self.bytes) % align)
        at = len(self.bytes)
        self.bytes += content
        return at

    def point(self, at, to):
        struct.pack_into("<I", self.bytes, at, to - at)

    def table(self, slots):
        """A table of offsets at these field numbers; the places of the offsets."""
        vtable = [0] * (max(slots) + 1)
        for place, slot in enumerate(slots):
            vtable[slot] = 4 + 4 * place
        sizes = (4 + 2 * len(vtable), 4 + 4 * len(slots))
        start = self.put(struct.pack(f"<{2 + len(vtable)}H", *sizes, *vtable))
        at = self.put(b"\0" * (4 + 4 * len(slots)))
        struct.pack_into("<i", self.bytes, at, at - start)
        return at, [at + 4 + 4 * place for place in range(len(slots))]

    def vector(self, count):
        at = self.put(struct.pack("<I", count) + b"\0" * (4 * count))
        return at, [at + 4 + 4 * place for place in range(count)]

    def text(self, content):
        return self.put(struct.pack("<I", len(content)) + content)


def schema_message(fields, entries):
    """A schema whose tables share their texts, as no writer makes it.

    Args:
        fields: The name of all fields, and how many there are.
        entries: (key, value, how many) of the metadata.
    """
    flat = Flat()
    root = flat.put(b"\0" * 4)
    message, (kind, header) = flat.table([1, 2])
    flat.bytes[kind] = 1
    flat.point(root, message)
    schema, (columns, metadata) = flat.table([1, 2])
    flat.point(header, schema)
    vector, places = flat.vector(fields[1])
    flat.point(columns, vector)
    field, (name,) = flat.table([0])
    flat.point(name, flat.text(fields[0]))
    for place in places:
        flat.point(place, field)
    vector, places = flat.vector(sum(count for *_, count in entries))
    flat.point(metadata, vector)
    places = iter(places)
    for key, value, count in entries:
        entry, (first, second) = flat.table([0, 1])
        flat.point(first, flat.text(key))
        flat.point(second, flat.text(value))
        for _ in range(count):
            flat.point(next(places), entry)
    content = bytes(flat.bytes)
    end = struct.pack("<Ii", 0xFFFFFFFF, 0) + b"ARROW1"
    return b"ARROW1\0\0" + struct.pack("<Ii", 0xFFFFFFFF, len(content)) + content + end


def peak_of_import(file, to):
    """The error of importing a file, and the memory that it took at most."""
    tracemalloc.start()
    try:
        with pytest.raises(errors.StoreError) as caught:
            whence.import_store(file, to)
        return str(caught.value), tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("where", ["names", "metadata"])
def test_many_fields_of_one_long_text_are_no_bomb(tmp_path, where):
    """A MiB of Arrow that would be some GiB of texts."""
    fill(tmp_path / "s", random_rows(3))
    made = whence.export_store(tmp_path / "s", tmp_path / "x.arrow")
    description = pa.ipc.open_file(made).schema.metadata[b"whence"]
    long = b"x" * 1_000_000
    names = (long, 10_000) if where == "names" else (b"id", 1)
    entries = [(b"a", long, 10_000)] if where == "metadata" else []
    file = tmp_path / "bomb.arrow"
    file.write_bytes(schema_message(names, [*entries, (b"whence", description, 1)]))
    error, peak = peak_of_import(file, tmp_path / "t")
    assert "must have the columns checkpoint, id, row, scale" in error
    assert peak < 20 << 20


def test_a_footer_of_many_empty_entries_is_no_bomb(tmp_path):
    count = 400_000
    size = bytes([count & 127 | 128, count >> 7 & 127 | 128, count >> 14])
    footer = b"\x29\xfc" + size + b"\0" * count + b"\0"  # a list, field 2, of empty structures
    file = tmp_path / "bomb.parquet"
    file.write_bytes(b"PAR1" + footer + struct.pack("<I", len(footer)) + b"PAR1")
    error, peak = peak_of_import(file, tmp_path / "t")
    assert "must be an export of a store" in error
    assert peak < 8 << 20


def test_errors_of_the_system_name_the_file_that_was_asked_for(tmp_path):
    fill(tmp_path / "s", random_rows(3))
    for file in (tmp_path / "nowhere" / "x.npz", tmp_path / "nowhere" / "x.arrow"):
        with pytest.raises(errors.StoreError) as caught:
            whence.export_store(tmp_path / "s", file)
        assert str(caught.value) == f"{file}: No such file or directory"
