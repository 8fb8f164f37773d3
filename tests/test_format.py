"""The files of a store, by docs/format.md: read, checked and written by others than whence."""

import json
import os
import shutil
import warnings
from dataclasses import replace
from pathlib import Path

import format_reader
import format_writer as by_hand
import golden_values as values
import numpy as np
import pytest
import torch
from filled import fill, manifest, random_rows
from hypothesis import given, settings
from hypothesis import strategies as st

import whence
from whence import errors
from whence.store import Checkpoint, Manifest, Writer

GOLDEN = Path(__file__).parent / "golden"
STORES = sorted(path.name for path in (GOLDEN / "store-1").iterdir())
DTYPES = ["float32", "float16", "int8", "int4", "int2", "int1"]


class Content:
    """What a store holds: rows by checkpoint and id, columns by name and id, ids in order."""

    def __init__(self, ids, rows, columns=None, skipped=()):
        self.ids, self.rows, self.skipped = list(ids), rows, list(skipped)
        self.columns = {name: dict(column) for name, column in (columns or {}).items()}

    @property
    def bits(self):
        """All of it, in a form that is equal only if every bit is."""
        rows = {
            (name, id_): np.asarray(row, "<f4").tobytes()
            for name, found in self.rows.items()
            for id_, row in found.items()
        }
        columns = {
            name: {k: repr(v) for k, v in each.items()} for name, each in self.columns.items()
        }
        return self.ids, rows, columns, self.skipped


def opened(path, *, missing=()):
    """What whence finds in a store."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", errors.MissingWritersWarning)
        store = whence.open(path)
    assert store.missing_writers == list(missing)
    rows = {}
    for name, numbers in zip(store.checkpoints, store.row_numbers(missing="keep"), strict=True):
        there = numbers >= 0
        found = store.core.read(numbers[there].astype(np.uint64))
        rows[name] = dict(zip(store.ids[there].tolist(), found, strict=True))
    columns = {
        name: zip(store.ids.tolist(), column.tolist(), strict=True)
        for name, column in store.columns.items()
    }
    return Content(store.ids.tolist(), rows, columns, store.skipped)


def read(path):
    """What the independent reader finds in a store, and that nothing in it is left over."""
    folders = sorted(path.glob("writer-*"), key=lambda each: int(each.name.split("-")[1]))
    parts = [format_reader.Store(folder) for folder in folders or [path]]
    for folder, part in zip(folders, parts, strict=False):
        assert folder.name == f"writer-{part.manifest['writer'].replace('/', '-of-')}"
    assert [part.left for part in parts] == [[]] * len(parts)
    found = Content([], {})
    for part in parts:
        found.ids += part.ids
        for name, rows in part.rows.items():
            found.rows.setdefault(name, {}).update(rows)
        for name, column in part.columns.items():
            found.columns.setdefault(name, {}).update(column)
        found.skipped += [(part.checkpoints[at], id_) for at, id_ in part.manifest["skipped"]]
    return found


def expected(name):
    """What a golden store holds, by the formulas of its rows."""
    if name in ("numbers", "texts"):
        ids = values.NUMBERS if name == "numbers" else values.TEXTS
        order = [6, 7, 8, 9, 0, 1, 2, 3]
        rows = {
            "first": {ids[n]: values.row(n) for n in order},
            "second": {ids[n]: values.row(n + 1) for n in order if n != 6},
        }
        columns = {
            column: zip([ids[n] for n in order], found.tolist(), strict=True)
            for column, found in values.columns(order).items()
        }
        skipped = [("first", ids[4]), ("second", ids[5])]
        return Content([ids[n] for n in order], rows, columns, skipped)
    if name == "gone":
        order = [0, 1, 2, 4, 6, 7, 9, 5, 3]
        numbers = {**dict(zip(order, order, strict=True)), 5: 15, 3: 13}
        return Content(order, {"0": {id_: values.row(n, "int4") for id_, n in numbers.items()}})
    if name == "writers":
        columns = {
            column: zip([1, 3], found.tolist(), strict=True)
            for column, found in values.columns([1, 3]).items()
        }
        rows = {
            "a": {1: values.row(1), 3: values.row(3)},
            "b": {1: values.row(4), 3: values.row(6)},
        }
        return Content([1, 3], rows, columns)
    if name == "layers":
        return Content(range(3), {"0": {n: values.row(n, "int2", 8) for n in range(3)}})
    if name == "factored":
        return Content(range(2), {"0": {0: 4.0 * values.row(0), 1: 0.5 * values.row(1)}})
    if name == "maps":
        return Content(range(4), {"combined": {n: values.row(n) for n in range(4)}})
    return Content(range(5), {"0": {n: values.row(n, name) for n in range(5)}})


# --- golden files -------------------------------------------------------------------------------


def test_there_are_golden_stores_of_every_kind():
    manifests = [
        json.loads(path.read_bytes().split(b"\n")[0])
        for path in (GOLDEN / "store-1").rglob("manifest-*.json")
    ]
    assert {body["dtype"] for body in manifests} == set(DTYPES)
    assert {body["ids"] for body in manifests} == {"int64", "str"}
    assert {kind for body in manifests for _, kind in body["columns"]} == set(
        ["bool", "int64", "float64", "str"]
    )
    assert {body["rows"] for body in manifests} == {"per_checkpoint", "combined"}
    assert {body["sketch"].get("layout", "global") for body in manifests} == {
        "global",
        "per_layer",
        "factored",
        "preconditioned",
    }
    assert any(body["packs"] and body["gone"] for body in manifests)


@pytest.mark.parametrize("name", STORES)
def test_a_golden_store_holds_what_it_was_given(name):
    missing = ["2/3"] if name == "writers" else []
    assert opened(GOLDEN / "store-1" / name, missing=missing).bits == expected(name).bits


@pytest.mark.parametrize("name", STORES)
def test_a_golden_store_is_read_by_the_words_of_the_format(name):
    assert read(GOLDEN / "store-1" / name).bits == expected(name).bits


@pytest.mark.parametrize("name", STORES)
def test_a_golden_store_is_sound(name):
    found = whence.verify(GOLDEN / "store-1" / name, progress=False)
    assert found.damage == []
    assert found.leftovers == []


@pytest.mark.parametrize("name", [name for name in STORES if name not in ("writers", "maps")])
def test_a_golden_store_is_gone_on_with_by_a_writer(tmp_path, name):
    path = shutil.copytree(GOLDEN / "store-1" / name, tmp_path / "s")
    before = opened(path)
    writer = Writer(path, None)
    checkpoint = writer.checkpoint.name
    columns = {"third": [True], "number": [1], "float": [0.5], "text": ["new"]}
    columns = {each: np.array(columns[each], object) for each in before.columns}
    columns = {each: values.columns([1])[each] for each in columns}
    new = "new" if name == "texts" else 99
    dtype, dim = writer.manifest.dtype, writer.manifest.dim
    writer.append(np.array([new]), values.rows([8], dtype, dim), columns)
    writer.delete(np.array([before.ids[0]]))
    writer.close()
    after = opened(path)
    assert after.ids == [*before.ids[1:], new]
    assert np.array_equal(after.rows[checkpoint][new], values.row(8, dtype, dim))
    assert read(path).bits == after.bits


@pytest.mark.parametrize("name", [name for name in STORES if name != "writers"])
def test_a_golden_store_is_compacted_without_a_change(tmp_path, name):
    path = shutil.copytree(GOLDEN / "store-1" / name, tmp_path / "s")
    before = opened(path)
    whence.compact(path)
    assert opened(path).bits == before.bits
    assert read(path).bits == before.bits


@pytest.mark.parametrize("name", ["certified", "hnsw"])
def test_a_golden_index_answers_as_a_scan_does(name):
    rows = values.matrix(150, 12)
    index = whence.Index.load(GOLDEN / "index-1" / name, rows)
    query = values.matrix(4, 12)[1:] + np.float32(0.1)
    scores = query.astype(np.float64) @ rows.T.astype(np.float64)
    scores[:, [3, 77]] = -np.inf
    hits = index.search(query, k=5)
    assert hits.exact.all()
    assert hits.helpful.ids.tolist() == np.argsort(-scores, axis=1)[:, :5].tolist()
    assert np.allclose(hits.helpful.scores, -np.sort(-scores, axis=1)[:, :5], rtol=1e-5)


def test_a_golden_graph_is_walked():
    index = whence.Index.load(GOLDEN / "index-1" / "hnsw", values.matrix(150, 12))
    hits = index.search(values.matrix(4, 12), k=1, side="helpful", approximate=True)
    assert hits.helpful.ids.shape == (4, 1)
    assert "graph" in repr(index) + str(index.explain())


def test_golden_factors_are_those_of_a_new_fit():
    found, fitted = whence.Factors.load(GOLDEN / "factors-1" / "linear"), values.fitted()
    assert found.model == fitted.model
    eigenvalues, expected = found.eigenvalues(), fitted.eigenvalues()
    assert eigenvalues.keys() == expected.keys()
    for key, those in expected.items():
        assert torch.allclose(eigenvalues[key].double(), those.double(), rtol=1e-4, atol=1e-7)
    assert found.maps[0].width == fitted.maps[0].width
    kept = found.directions.values
    assert torch.allclose(kept, fitted.directions.values, rtol=1e-3, atol=1e-6 * float(kept.max()))


# --- what whence writes, read by others ---------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=12, deadline=None)
@given(
    dim=st.sampled_from([1, 2, 3, 8, 13, 100]),
    count=st.integers(1, 40),
    parts=st.integers(1, 4),
    texts=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_what_is_written_is_read_by_the_words_of_the_format(
    tmp_path_factory, dtype, dim, count, parts, texts, seed
):
    path = tmp_path_factory.mktemp("store") / "s"
    generator = np.random.default_rng(seed)
    ids = generator.permutation(count * 3)[:count] - count
    columns = {
        "even": ids % 2 == 0,
        "square": ids * ids,
        "third": ids / 3,
        "text": [chr(0x40 + abs(id_)) * (id_ % 3) for id_ in ids.tolist()],
    }
    if texts:
        ids = np.array([f"{id_}é" for id_ in ids])
    fill(path, random_rows(count, dim, seed), ids, dtype=dtype, parts=min(parts, count), **columns)
    found = opened(path)
    assert found.bits == read(path).bits
    assert found.ids == ids.tolist()
    assert list(found.columns["square"].values()) == columns["square"].tolist()


@pytest.mark.parametrize("dtype", DTYPES)
def test_files_of_several_blocks_are_checked_by_the_words_of_the_format(tmp_path, dtype):
    count = {"float32": 150, "float16": 300, "int8": 600}.get(dtype, 4800)
    texts = np.array([f"{number:050}" for number in range(count)])
    fill(tmp_path / "s", random_rows(count, 128), dtype=dtype, text=texts)
    assert (tmp_path / "s" / "shard-00000001" / "rows.npy").stat().st_size > 65_536
    assert read(tmp_path / "s").bits == opened(tmp_path / "s").bits


def test_what_many_commits_leave_is_read_by_the_words_of_the_format(tmp_path, monkeypatch):
    monkeypatch.setattr("whence.store.manifest.PACKED", 3)
    writer = Writer(tmp_path / "s", manifest())
    for name in "ab":
        writer.set_checkpoint(Checkpoint(name, 0.5))
        for number in range(8):
            rows = random_rows(3, seed=number)
            writer.append(np.arange(3) + 2 * number, rows, {}, replaces=True)
            writer.commit()
            assert read(tmp_path / "s").bits == opened(tmp_path / "s").bits
    writer.delete(np.array([0, 5]))
    writer.skip(np.array([5, 100]))
    writer.close()
    assert read(tmp_path / "s").bits == opened(tmp_path / "s").bits
    assert len(list((tmp_path / "s").glob("pack-*"))) == 5


def test_every_key_of_a_store_is_in_the_words_of_the_format():
    text = (GOLDEN.parent.parent / "docs" / "format.md").read_text(encoding="utf-8")

    def keys(value):
        if isinstance(value, dict):
            for key, each in value.items():
                yield key
                if key not in ("files", "identity", "arrays", "sketch"):  # names, and what is free
                    yield from keys(each)
        elif isinstance(value, list):
            for each in value:
                yield from keys(each)

    for path in (GOLDEN / "store-1").rglob("*.json"):
        body = json.loads(path.read_bytes().split(b"\n")[0])
        body.pop("map", None)  # a description, which is for the one who made it
        assert [
            key for key in keys(body) if f"`{key}`" not in text and f'"{key}"' not in text
        ] == []


def test_any_flipped_byte_is_found_by_both(tmp_path):
    path = shutil.copytree(GOLDEN / "store-1" / "int4", tmp_path / "s")
    files = [file for file in path.rglob("*") if file.is_file() and file.stat().st_size]
    assert len(files) == 5
    for file in files:
        content = file.read_bytes()
        for at in range(len(content)):
            damaged = bytearray(content)
            damaged[at] ^= 1 << at % 8
            file.write_bytes(damaged)
            with pytest.raises((ValueError, UnicodeDecodeError)):
                format_reader.Store(path)
            with pytest.raises(errors.StoreError, match=file.name):
                opened(path)
        file.write_bytes(content)
    opened(path)


# --- what others write, read by whence ----------------------------------------------------------


def made(path, dtype="float32", **others):
    """A store of three rows, written by hand; what it holds."""
    dim, numbers = 13, [4, 0, 6]
    rows = values.rows(numbers, dtype)
    scales = np.array([2.0 ** (n % 7 - 3) for n in numbers], np.float32)
    if dtype not in values.BITS:
        scales *= 8
    entry = by_hand.shard(
        path, 1, rows / scales[:, None], scales, [7, -7, 0], dtype=dtype, **others
    )
    by_hand.manifest(path, 1, [entry], dim, dtype=dtype)
    return Content([7, -7, 0], {"0": dict(zip([7, -7, 0], rows, strict=True))})


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_others_write_opens(tmp_path, dtype):
    content = made(tmp_path, dtype)
    assert opened(tmp_path).bits == content.bits == read(tmp_path).bits
    assert whence.verify(tmp_path, progress=False).is_sound


def test_numbers_of_many_digits_count_as_numbers(tmp_path):
    for number, id_ in ((99_999_999, 1), (100_000_000, 2), (10**17, 3)):
        entry = by_hand.shard(tmp_path, number, np.eye(1, 13), [1.0], [id_])
        by_hand.manifest(tmp_path, number, [entry], 13)
        assert opened(tmp_path).ids == [id_]
    writer = Writer(tmp_path, None)
    writer.append(np.array([4]), values.rows([0]), {})
    writer.close()
    assert opened(tmp_path).ids == [3, 4]
    assert (tmp_path / f"manifest-{10**17 + 1}.json").exists()


def test_packs_and_rows_that_are_gone_may_be_of_others(tmp_path):
    entries = [
        by_hand.shard(tmp_path, n, values.rows([n, n + 3]) / 8, [8.0, 8.0], [n, n + 3])
        for n in range(1, 4)
    ]
    entries = [[*entry] for entry in entries]
    content = by_hand.object_bytes({"shards": entries[:2]})
    length, sums = by_hand.put(tmp_path / "pack-00000007.json", content)
    pack = {"name": "pack-00000007.json", "shards": 2, "length": length, "checksums": sums}
    content = by_hand.array_bytes(np.array([[1, 0], [3, 1]]))
    length, sums = by_hand.put(tmp_path / "gone-00000001.npy", content)
    gone = {"name": "gone-00000001.npy", "rows": 2, "length": length, "checksums": sums}
    by_hand.manifest(tmp_path, 1, entries[2:], 13, packs=[pack], gone=gone)
    assert opened(tmp_path).ids == [4, 2, 5, 3]
    assert opened(tmp_path).bits == read(tmp_path).bits


def test_writers_of_others_are_read_as_one(tmp_path):
    for number in (1, 2):
        folder = tmp_path / f"writer-{number}-of-2"
        entry = by_hand.shard(folder, 1, values.rows([number]) / 8, [8.0], [number])
        by_hand.manifest(folder, 1, [entry], 13, writer=f"{number}/2")
    assert opened(tmp_path).ids == [1, 2]
    assert opened(tmp_path).bits == read(tmp_path).bits


def test_names_that_nothing_knows_are_passed_over(tmp_path):
    content = made(tmp_path)
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / "manifest-00000002.part").write_text("x")
    (tmp_path / "manifest-2.json").write_text("x")
    (tmp_path / "manifest-\u0660\u0660\u0660\u0660\u0660\u0660\u0660\u0662.json").write_text("x")
    (tmp_path / "shard-00000009").mkdir()
    assert opened(tmp_path).bits == content.bits


# --- later versions -----------------------------------------------------------------------------


def test_keys_of_a_later_version_are_kept(tmp_path):
    later = {"colour": {"of": ["the", "sky"], "is": None}, "a": 1.5}
    entry = by_hand.shard(tmp_path, 1, np.eye(1, 13), [1.0], [1])
    by_hand.manifest(tmp_path, 1, [entry], 13, **later)
    writer = Writer(tmp_path, None)
    writer.append(np.array([2]), values.rows([0]), {})
    writer.close()
    whence.delete(tmp_path, [1])
    whence.compact(tmp_path)
    body = format_reader.Store(tmp_path).manifest
    assert {key: body[key] for key in later} == later
    assert body["number"] == 4


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"requires": ["delta rows"]}, r"requires must be of \[\], .* knows, got 'delta rows'"),
        ({"version": 2}, "version must be 1, got 2; a later version of whence can read it"),
        ({"version": 0}, "version must be 1, got 0; it is of before the format was fixed"),
    ],
)
def test_what_cannot_be_understood_is_refused_by_name(tmp_path, change, match):
    by_hand.manifest(tmp_path, 1, [], 13, **change)
    for use in (whence.open, whence.compact, lambda path: Writer(path, None)):
        with pytest.raises(errors.StoreError, match=match):
            use(tmp_path)


@pytest.mark.parametrize("kind", ["index", "factors"])
def test_saved_things_of_another_version_are_refused_by_name(tmp_path, kind):
    name = "manifest.json" if kind == "index" else "factors.json"
    rows = [values.matrix(150, 12)] if kind == "index" else []
    load = whence.Index.load if rows else whence.Factors.load
    body = {"format": f"whence {kind}", "version": 2}
    by_hand.put(tmp_path / name, by_hand.object_bytes(body))
    with pytest.raises(errors.StoreError, match=f"{name}: version must be 1, got 2"):
        load(tmp_path, *rows)


@pytest.mark.parametrize(
    ("kind", "name", "array"),
    [("index-1/certified", "manifest.json", "order"), ("factors-1/linear", "factors.json", None)],
)
def test_files_of_saved_things_lie_in_their_folder(tmp_path, kind, name, array):
    path = shutil.copytree(GOLDEN / kind, tmp_path / "s")
    body = json.loads((path / name).read_bytes()[:-10])
    array = next(iter(body["files"])) if array is None else array
    shutil.copy(path / f"{array}.npy", tmp_path / f"{array}.npy")
    for table in ("files", "arrays"):
        if table in body:
            body[table][f"../{array}"] = body[table][array]
    by_hand.put(path / name, by_hand.object_bytes(body))
    rows = [values.matrix(150, 12)] if name == "manifest.json" else []
    load = whence.Index.load if rows else whence.Factors.load
    with pytest.raises(errors.StoreError, match=r"a file must lie in its folder, got '\.\./"):
        load(path, *rows)


# --- what a reader must refuse ------------------------------------------------------------------


@pytest.mark.parametrize("value", [True, 1.0, "1", None, [1]])
def test_a_version_that_is_no_number_is_refused(tmp_path, value):
    by_hand.manifest(tmp_path, 1, [], 13, version=value)
    with pytest.raises(errors.StoreError, match="version must be a number"):
        whence.open(tmp_path)


def model_of(**changes):
    parameter = {"name": "w", "shape": [2], "kind": "linear", "places": ["w"], **changes}
    return {"digest": "0", "parameters": [parameter]}


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"requires": "none"}, "requires must be a list"),
        ({"columns": [["a", "int64"], ["a", "int64"]]}, "columns must have distinct names"),
        ({"columns": [["a", "int32"]]}, "column 'a' must be of a known type"),
        ({"columns": {"a": "int64"}}, "columns must be a list"),
        ({"ids": "int32"}, "ids must be int64 or str"),
        ({"rows": "some"}, "rows must be per_checkpoint or combined"),
        ({"sketch": {"kind": "sjlt", "dim": 0}}, "rows must be from 1 to 1048576 wide"),
        ({"sketch": {"kind": "sjlt", "dim": 1 << 21}}, "rows must be from 1 to 1048576 wide"),
        ({"checkpoints": []}, "rows must be of a known checkpoint"),
        ({"skipped": [[1, 5]]}, "rows must be of a known checkpoint"),
        ({"skipped": ""}, "skipped must be a list"),
        ({"packs": {}}, "packs must be a list"),
        ({"model": {"digest": None, "parameters": []}}, "model must have a digest"),
        ({"model": 5}, "model must be an object"),
        ({"model": {"digest": ""}}, "it has no 'parameters'"),
        ({"model": model_of(shape=[2.5])}, "w must have a shape and places"),
        ({"model": model_of(places="w")}, "w must have a shape and places"),
        ({"reduction": 3}, "reduction must be one of"),
        ({"sketch": {"kind": "sjlt", "dim": 13.5, "seed": 0}}, "dim must be a whole number"),
        ({"sketch": {"kind": "sjlt", "dim": 13, "seed": "0"}}, "seed must be a whole number"),
        ({"sketch": {"kind": 7, "dim": 13, "seed": 0}}, "kind must be a text"),
        ({"skipped": [3]}, "skipped must be a list of pairs"),
        ({"columns": [["a"]]}, "columns must be a list of pairs"),
        ({"packs": [3]}, "a value in it is of a type"),
    ],
)
def test_a_manifest_that_cannot_be_is_refused(tmp_path, change, match):
    entry = by_hand.shard(tmp_path, 1, np.eye(1, 13), [1.0], [1])
    by_hand.manifest(tmp_path, 1, [entry], 13, **change)
    with pytest.raises(errors.StoreError, match=match):
        whence.open(tmp_path)


@pytest.mark.parametrize("key", ["packs", "gone", "writer", "sketch", "requires"])
def test_a_key_that_is_not_there_is_named(tmp_path, key):
    by_hand.manifest(tmp_path, 1, [], 13)
    path = tmp_path / "manifest-00000001.json"
    body = json.loads(path.read_bytes().splitlines()[0])
    del body[key]
    by_hand.put(path, by_hand.object_bytes(body))
    with pytest.raises(errors.StoreError, match=f"json is damaged: it has no '{key}'"):
        whence.open(tmp_path)


@pytest.mark.parametrize("key", ["first", "last"])
def test_digests_of_weights_are_texts(tmp_path, key):
    by_hand.manifest(tmp_path, 1, [], 13)
    path = tmp_path / "manifest-00000001.json"
    body = json.loads(path.read_bytes().splitlines()[0])
    body["checkpoints"][0][key] = [1]
    by_hand.put(path, by_hand.object_bytes(body))
    with pytest.raises(errors.StoreError, match="must have digests"):
        whence.open(tmp_path)


@pytest.mark.parametrize("name", [None, 5, "", "a\0"])
def test_a_checkpoint_has_a_name_that_an_export_can_say(tmp_path, name):
    entry = by_hand.shard(tmp_path, 1, np.eye(1, 13), [1.0], [1])
    by_hand.manifest(tmp_path, 1, [entry], 13)
    body = json.loads((tmp_path / "manifest-00000001.json").read_bytes().splitlines()[0])
    body["checkpoints"][0]["name"] = name
    by_hand.put(tmp_path / "manifest-00000001.json", by_hand.object_bytes(body))
    with pytest.raises(errors.StoreError, match="a checkpoint must have a name"):
        whence.open(tmp_path)


def test_a_manifest_by_another_name_is_refused(tmp_path):
    made(tmp_path)
    (tmp_path / "manifest-00000001.json").rename(tmp_path / "manifest-00000002.json")
    with pytest.raises(errors.StoreError, match="number must be 2, as in its name"):
        whence.open(tmp_path)


@pytest.mark.parametrize(
    ("place", "value", "match"),
    [
        (0, "shard-1", "a shard's name must be"),
        (0, "shard-00000001/../shard-00000001", "a shard's name must be"),
        (0, "shard-0000000\u0661", "a shard's name must be"),
        (1, -1, "must be of a checkpoint"),
        (2, 0, "must have rows"),
        (2, True, "must have rows"),
        (3, 1 << 60, "must have a checksum for each"),
        (4, "ABCDEF01", "must have a checksum for each"),
        (4, " 1234567", "must have a checksum for each"),
        (4, "1234567", "must have a checksum for each"),
    ],
)
def test_an_entry_that_cannot_be_is_refused(tmp_path, place, value, match):
    entry = by_hand.shard(tmp_path, 1, np.eye(1, 13), [1.0], [1])
    entry[place] = value
    by_hand.manifest(tmp_path, 1, [entry], 13)
    with pytest.raises(errors.StoreError, match=match):
        whence.open(tmp_path)


def test_a_shard_that_occurs_twice_is_refused(tmp_path):
    entry = by_hand.shard(tmp_path, 1, np.eye(1, 13), [1.0], [1])
    by_hand.manifest(tmp_path, 1, [entry, entry], 13)
    with pytest.raises(errors.StoreError, match="shards must have distinct names"):
        whence.open(tmp_path)


UNIT = np.ones((3, 13), "<f4")
WRONG = {
    "another type": {"rows.npy": by_hand.array_bytes(UNIT.astype("<f8"))},
    "another shape": {"rows.npy": by_hand.array_bytes(UNIT.T)},
    "fewer rows": {"rows.npy": by_hand.array_bytes(UNIT[:2])},
    "more bytes": {"rows.npy": by_hand.array_bytes(UNIT) + b"\0"},
    "big-endian": {"rows.npy": by_hand.array_bytes(UNIT.astype(">f4"))},
    "another header": {"rows.npy": by_hand.array_bytes(UNIT).replace(b", }", b",} ", 1)},
    "no rows": {"rows.npy": None},
    "no scales": {"scales.npy": None},
    "no ids": {"ids.npy": None},
    "scales that are negative": {"scales.npy": by_hand.array_bytes(-np.ones(3, "<f4"))},
    "scales that are no numbers": {"scales.npy": by_hand.array_bytes(np.full(3, np.nan, "<f4"))},
    "ids that are floats": {"ids.npy": by_hand.array_bytes(np.ones(3))},
    "an id twice": {"ids.npy": by_hand.array_bytes(np.array([1, 2, 1]))},
}


@pytest.mark.parametrize("what", WRONG)
def test_arrays_that_are_not_as_they_must_be_are_refused(tmp_path, what):
    made(tmp_path, others=WRONG[what])
    with pytest.raises(errors.StoreError):
        opened(tmp_path)
    with pytest.raises((ValueError, KeyError)):
        read(tmp_path)


TEXTS = np.frombuffer(b"abc\xc3\xa9", np.uint8)
OFFSETS = {
    "not from 0": [1, 2, 3, 5],
    "falling": [0, 3, 1, 5],
    "below 0": [0, -1, 3, 5],
    "past the end": [0, 1, 2, 1 << 40],
    "before the end": [0, 1, 2, 3],
    "within a character": [0, 1, 4, 5],
    "too few": [0, 1, 5],
}


@pytest.mark.parametrize("what", OFFSETS)
def test_offsets_that_are_not_as_they_must_be_are_refused(tmp_path, what):
    others = {"ids-offsets.npy": by_hand.array_bytes(np.array(OFFSETS[what]))}
    others["ids.npy"] = by_hand.array_bytes(TEXTS)
    entry = by_hand.shard(tmp_path, 1, UNIT, np.ones(3), ["a", "b", "c"], others=others)
    by_hand.manifest(tmp_path, 1, [entry], 13, ids="str")
    with pytest.raises(errors.StoreError, match=r"shard-00000001/ids.*\.npy"):
        opened(tmp_path)
    with pytest.raises(ValueError, match=r".*"):
        read(tmp_path)


def test_an_id_longer_than_any_is_refused(tmp_path):
    entry = by_hand.shard(tmp_path, 1, UNIT[:1], [1.0], ["x" * 1025])
    by_hand.manifest(tmp_path, 1, [entry], 13, ids="str")
    with pytest.raises(errors.StoreError, match="ids of at most 1024 characters, got one of 1025"):
        opened(tmp_path)


@pytest.mark.parametrize("name", ["../rows.npy", "/etc/passwd", "rows.npy:x", "ROWS.npy", "a.exe"])
def test_a_file_outside_of_its_folder_is_refused(tmp_path, name):
    made(tmp_path)
    path = tmp_path / "shard-00000001" / "shard.json"
    body = json.loads(path.read_bytes().split(b"\n")[0])
    body["files"][name] = body["files"]["rows.npy"]
    entry = ["shard-00000001", 0, 3, *by_hand.put(path, by_hand.object_bytes(body))]
    by_hand.manifest(tmp_path, 1, [entry], 13)
    with pytest.raises(errors.StoreError, match="a file must lie in its folder, got"):
        whence.open(tmp_path)


@pytest.mark.parametrize("what", ["link", "pipe", "folder"])
@pytest.mark.parametrize(
    "name",
    ["manifest-00000001.json"]
    + [f"shard-00000001/{name}" for name in ("shard.json", "rows.npy", "scales.npy", "ids.npy")],
)
def test_what_is_no_file_is_refused_at_once(tmp_path, name, what):
    path = tmp_path / "s"
    made(path)
    (path / name).rename(tmp_path / "elsewhere")
    if what == "link":
        (path / name).symlink_to(tmp_path / "elsewhere")
    elif what == "pipe":
        os.mkfifo(path / name)
    else:
        (path / name).mkdir()
    with pytest.raises(errors.StoreError, match=Path(name).name):
        opened(path)


def test_a_shard_that_is_a_link_is_refused(tmp_path):
    path = tmp_path / "s"
    made(path)
    (path / "shard-00000001").rename(tmp_path / "elsewhere")
    (path / "shard-00000001").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(errors.StoreError, match="shard-00000001 must be a folder of the store"):
        whence.open(path)


def test_a_manifest_of_which_only_the_marker_is_left_is_missed(tmp_path):
    made(tmp_path)
    by_hand.put(tmp_path / "committed-00000002", b"")
    with pytest.raises(errors.StoreError, match=r"manifest-00000002\.json is gone"):
        whence.open(tmp_path)


TEXTS_OF_OBJECTS = {
    "none": lambda content: b"",
    "a line end": lambda content: b"\n",
    "no checksum": lambda content: content[:-10],
    "no last line end": lambda content: content[:-1],
    "a line end too many": lambda content: content + b"\n",
    "another line end": lambda content: content.replace(b"\n", b"\r\n"),
    "capitals": lambda content: content[:-9] + content[-9:].upper(),
    "a list": lambda content: by_hand.object_bytes([]),
    "a text": lambda content: by_hand.object_bytes("x"),
    "no number": lambda content: by_hand.object_bytes(
        json.loads(content[:-10]) | {"later": float("nan")}
    ),
}


@pytest.mark.parametrize("what", TEXTS_OF_OBJECTS)
def test_what_is_no_object_with_its_checksum_is_refused(tmp_path, what):
    number = 0  # of an object whose checksum has letters
    while True:
        by_hand.manifest(tmp_path, 1, [], 13, later=number)
        content = (tmp_path / "manifest-00000001.json").read_bytes()
        if content[-9:].upper() != content[-9:]:
            break
        number += 1
    assert len(whence.open(tmp_path)) == 0
    by_hand.put(tmp_path / "manifest-00000001.json", TEXTS_OF_OBJECTS[what](content))
    with pytest.raises(errors.StoreError, match=r"manifest-00000001\.json is damaged"):
        whence.open(tmp_path)


def test_a_manifest_longer_than_any_is_not_read(tmp_path):
    with (tmp_path / "manifest-00000001.json").open("wb") as file:
        file.truncate((64 << 20) + 1)
    with pytest.raises(
        errors.StoreError, match="must be at most 67108864 bytes long, got 67108865"
    ):
        whence.open(tmp_path)


def test_a_manifest_longer_than_one_that_is_read_is_not_written(tmp_path, monkeypatch):
    store = fill(tmp_path / "s", random_rows(2))
    writer = Writer(tmp_path / "s", manifest())
    writer.append(np.array([5]), random_rows(1), {})
    with monkeypatch.context() as patch:
        patch.setattr("whence.store.files.MAX_JSON", 300)
        with pytest.raises(errors.StoreError, match="must be at most 300 bytes long"):
            writer.commit()
    assert opened(tmp_path / "s").ids == store.ids.tolist() == [0, 1]
    writer.close()
    assert opened(tmp_path / "s").ids == [0, 1, 5]


def test_a_later_map_may_not_lead_elsewhere(tmp_path):
    sketch = {"layout": "preconditioned", "basis": "none", "coordinates": 13, "dim": 13}
    wanted = replace(manifest(13), sketch=sketch)
    writer = Writer(tmp_path / "s", wanted)
    found = writer.write_map({}, [], {"values": np.ones(3, np.float32)})
    found.files["../../x.npy"] = found.files["values.npy"]
    writer.set_checkpoint(Checkpoint("0", first="aa", map=found))
    writer.touch()
    writer.commit()
    writer.release()
    with pytest.raises(errors.StoreError, match="a file must lie in its folder"):
        Manifest.load(tmp_path / "s")
