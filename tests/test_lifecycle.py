"""Deleting examples, and stores that are written anew without them."""

import numpy as np
import pytest
from filled import LATE, appears_and_fails, fill, manifest, random_rows

import whence
from whence import errors
from whence.store import Checkpoint, Writer


def content(path):
    """Every byte of a store, one file after the other."""
    return b"".join(each.read_bytes() for each in sorted(path.rglob("*")) if each.is_file())


def test_deleted_examples_are_hidden_at_once(tmp_path):
    rows = random_rows(6)
    fill(tmp_path / "s", rows, label=np.arange(6), parts=2)
    assert whence.delete(tmp_path / "s", [1, 4]) == 2
    store = whence.open(tmp_path / "s")
    assert store.ids.tolist() == [0, 2, 3, 5]
    assert store.columns["label"].tolist() == [0, 2, 3, 5]
    assert np.allclose(store.rows(), rows[[0, 2, 3, 5]], rtol=1e-6)
    assert sorted(store.search(rows[:1], k=9).helpful.ids[0].tolist()) == [0, 2, 3, 5]


def test_rows_of_all_checkpoints_are_deleted(tmp_path):
    fill(tmp_path / "s", random_rows(4), checkpoint="a")
    fill(tmp_path / "s", random_rows(4, seed=1), checkpoint="b")
    assert whence.delete(tmp_path / "s", [2]) == 2
    assert whence.open(tmp_path / "s").ids.tolist() == [0, 1, 3]


def test_what_is_not_there_is_named_and_nothing_deleted(tmp_path):
    fill(tmp_path / "s", random_rows(4))
    with pytest.raises(errors.IdError, match="got 9"):
        whence.delete(tmp_path / "s", [1, 9])
    with pytest.raises(errors.IdError, match="must be int64"):
        whence.delete(tmp_path / "s", ["1"])
    assert len(whence.open(tmp_path / "s")) == 4
    assert whence.delete(tmp_path / "s", [1, 9], missing="skip") == 1


def test_the_bytes_of_deleted_rows_are_gone_after_compact(tmp_path):
    rows = random_rows(50)
    texts = np.array([f"secret of number {n:03}" for n in range(50)])
    path = tmp_path / "s"
    store = fill(path, rows, ids=texts, text=texts, parts=5)
    secret = store.rows(np.array([texts[17]]))[0] / np.float32(store.norms()[17])
    assert content(path).count(texts[17].encode()) == 2
    whence.delete(path, [texts[17]])
    assert secret.astype("<f4").tobytes() in content(path)
    whence.compact(path)
    assert texts[17].encode() not in content(path)
    assert secret.astype("<f4").tobytes() not in content(path)
    assert texts[18].encode() in content(path)
    assert whence.verify(path).is_sound


@pytest.mark.parametrize("dtype", ["float32", "float16", "int8", "int4", "int1"])
def test_compact_changes_no_value_and_joins_shards(tmp_path, dtype):
    path = tmp_path / "s"
    fill(path, random_rows(40, 21), dtype=dtype, parts=8, label=np.arange(40) % 3)
    whence.delete(path, [0, 7, 8, 9, 39])
    before = whence.open(path)
    wanted = before.rows(), before.ids, before.columns["label"], before.norms()
    done = whence.compact(path)
    after = whence.open(path)
    found = after.rows(), after.ids, after.columns["label"], after.norms()
    assert all(np.array_equal(one, other) for one, other in zip(wanted, found, strict=True))
    assert (done.rows, done.removed, done.shards) == (35, 5, (8, 1))
    assert len(list(path.glob("shard-*"))) == 1


def test_compact_of_a_store_without_rows_left(tmp_path):
    fill(tmp_path / "s", random_rows(3))
    whence.delete(tmp_path / "s", [0, 1, 2])
    whence.compact(tmp_path / "s")
    assert len(whence.open(tmp_path / "s")) == 0
    assert fill(tmp_path / "s", random_rows(1)).ids.tolist() == [0]


def test_an_open_reader_keeps_what_is_deleted_and_misses_what_is_compacted(tmp_path):
    reader = fill(tmp_path / "s", random_rows(4), parts=2)
    whence.delete(tmp_path / "s", [1])
    assert reader.ids.tolist() == [0, 1, 2, 3]
    assert reader.rows().shape == (4, 16)
    late = whence.open(tmp_path / "s")
    whence.compact(tmp_path / "s")
    with pytest.raises(errors.StoreError, match="open it again"):
        _ = late.ids


def test_compact_removes_what_a_killed_writer_left(tmp_path):
    path = tmp_path / "s"
    fill(path, random_rows(4))
    stray = path / "shard-00000007"
    stray.mkdir()
    (stray / "rows.npy").write_bytes(b"half")
    (path / "map-00000003").mkdir()
    (path / "manifest-00000009.part").write_bytes(b"{")
    mine = path / "notes.txt"
    mine.write_text("mine")
    assert whence.info(path).leftovers > 0
    whence.compact(path)
    assert not stray.exists()
    assert not (path / "map-00000003").exists()
    assert not (path / "manifest-00000009.part").exists()
    assert mine.read_text() == "mine"


def test_compact_removes_nothing_that_only_sounds_like_a_store_s(tmp_path):
    path = tmp_path / "s"
    fill(path, random_rows(4))
    names = ["shard-list.csv", "shard-1", "map-of-it", "pack-1.json", "gone-away.npy", "movie.part"]
    for name in names:
        (path / name).mkdir()
        (path / name / "mine").write_text("mine")
    assert whence.verify(path).leftovers == []
    assert whence.info(path).leftovers == 0
    whence.delete(path, [1])
    whence.compact(path)
    assert [(path / name / "mine").read_text() for name in names] == ["mine"] * len(names)


def test_a_store_that_is_written_to_is_neither_deleted_from_nor_compacted(tmp_path):
    fill(tmp_path / "s", random_rows(4))
    writer = Writer(tmp_path / "s", manifest())
    for call in (
        lambda: whence.delete(tmp_path / "s", [0]),
        lambda: whence.compact(tmp_path / "s"),
    ):
        with pytest.raises(errors.LockedError, match="this process"):
            call()
    writer.close()


def test_a_deleted_id_can_be_recorded_again(tmp_path):
    fill(tmp_path / "s", random_rows(4))
    whence.delete(tmp_path / "s", [2])
    rows = random_rows(1, seed=9)
    store = fill(tmp_path / "s", rows, ids=[2])
    assert store.ids.tolist() == [0, 1, 3, 2]
    assert np.allclose(store.rows(np.array([2])), rows, rtol=1e-6)
    whence.compact(tmp_path / "s")
    assert np.allclose(whence.open(tmp_path / "s").rows(np.array([2])), rows, rtol=1e-6)


def test_an_interrupted_compact_leaves_the_store_as_it_was(tmp_path, monkeypatch):
    path = tmp_path / "s"
    before = fill(path, random_rows(9), parts=3).rows()
    whence.delete(path, [4])

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("whence.store.files.sync", full)
        with pytest.raises(errors.StoreError, match="No space left"):
            whence.compact(path)
    assert np.array_equal(whence.open(path).rows(), np.delete(before, 4, axis=0))
    assert len(list(path.glob("shard-*"))) == 3


def test_examples_that_were_left_out_are_forgotten_too(tmp_path):
    writer = Writer(tmp_path / "s", manifest())
    writer.set_checkpoint(Checkpoint("0"))
    writer.append(np.arange(3), random_rows(3), {})
    writer.skip(np.array([7]))
    writer.close()
    assert whence.open(tmp_path / "s").skipped == [("0", 7)]
    whence.delete(tmp_path / "s", [7])
    assert whence.open(tmp_path / "s").skipped == []


def test_a_store_of_several_writers_is_deleted_from_and_compacted(tmp_path):
    for number in (1, 2):
        writer = Writer(tmp_path / "s", manifest(), f"{number}/2")
        writer.set_checkpoint(Checkpoint("0"))
        writer.append(np.arange(4) + 10 * number, random_rows(4, seed=number), {})
        writer.close()
    assert whence.delete(tmp_path / "s", [11, 20]) == 2
    whence.compact(tmp_path / "s")
    assert whence.open(tmp_path / "s").ids.tolist() == [10, 12, 13, 21, 22, 23]


def test_examples_are_deleted_by_a_filter(tmp_path):
    fill(tmp_path / "s", random_rows(6), user=np.array([1, 2, 1, 2, 3, 3]))
    assert whence.delete(tmp_path / "s", where={"user": [2, 3]}) == 4
    assert whence.open(tmp_path / "s").ids.tolist() == [0, 2]
    assert whence.delete(tmp_path / "s", where={"user": 9}) == 0
    assert whence.delete(tmp_path / "s", where=[False, True]) == 1
    assert whence.open(tmp_path / "s").ids.tolist() == [0]


def test_of_an_empty_list_nothing_is_deleted(tmp_path):
    fill(tmp_path / "s", random_rows(2))
    assert whence.delete(tmp_path / "s", []) == 0
    with pytest.raises(errors.StoreError, match="does not exist"):
        whence.delete(tmp_path / "t", [])


def test_what_to_delete_is_said_once(tmp_path):
    fill(tmp_path / "s", random_rows(2))
    for given, got in (({}, "neither"), ({"ids": [1], "where": [1]}, "both")):
        with pytest.raises(errors.ArgumentError, match=f"ids and where must be given, got {got}"):
            whence.delete(tmp_path / "s", **given)
    with pytest.raises(errors.ArgumentError, match="missing must be 'error' with where"):
        whence.delete(tmp_path / "s", where=[1], missing="skip")
    with pytest.raises(errors.ArgumentError, match="where must say which examples are deleted"):
        whence.delete(tmp_path / "s", where={})
    assert len(whence.open(tmp_path / "s")) == 2


@pytest.mark.parametrize("writer", [None, "2/3"])
def test_who_holds_a_store_that_has_nothing_confirmed_is_named(tmp_path, writer):
    held = Writer(tmp_path / "s", manifest(), writer)
    for call in (
        lambda: whence.delete(tmp_path / "s", [0]),
        lambda: whence.compact(tmp_path / "s"),
    ):
        with pytest.raises(errors.LockedError, match="this process"):
            call()
    held.close()
    with pytest.raises(errors.StoreError, match="nothing was ever confirmed"):
        whence.compact(tmp_path / "s")


def test_a_file_named_lock_of_something_else_stays_as_it_is(tmp_path):
    (tmp_path / "lock").write_text("mine")
    (tmp_path / "notes").write_text("mine")
    with pytest.raises(errors.StoreError, match="no manifest"):
        whence.compact(tmp_path)
    assert (tmp_path / "lock").read_text() == "mine"


@pytest.mark.parametrize("error", LATE, ids=["interrupt", "error"])
def test_a_compacted_store_whose_manifest_appeared_is_whole(tmp_path, monkeypatch, error):
    rows = random_rows(12)
    fill(tmp_path / "s", rows, parts=4)
    whence.delete(tmp_path / "s", [3])
    appears_and_fails(monkeypatch, error)
    with pytest.raises(type(error)):
        whence.compact(tmp_path / "s")
    assert whence.verify(tmp_path / "s").is_sound
    assert np.allclose(whence.open(tmp_path / "s").rows(), np.delete(rows, 3, 0), rtol=1e-6)
    assert whence.compact(tmp_path / "s").rows == 11


def test_a_filter_of_many_texts_passes_those(tmp_path):
    users = np.array([f"user {number % 700}" for number in range(2000)])
    store = fill(tmp_path / "s", random_rows(2000), user=users)
    asked = [f"user {number}" for number in range(0, 1400, 2)]
    assert store.eligible({"user": asked}).tolist() == np.isin(users, asked).tolist()
