"""Damage is found and named, and what is whole is kept."""

import shutil
import threading
from dataclasses import replace

import numpy as np
import pytest
from filled import LATE, appears_and_fails, fill, manifest, random_rows

import whence
from whence import errors
from whence.store import Checkpoint, Manifest, Writer
from whence.store.files import BLOCK, read_json, write_json


def damage(path, at):
    """Turns one bit of a file."""
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def large(path, **columns):
    """A store of two shards, each of several blocks."""
    return fill(path, random_rows(2000, 64), parts=2, **columns)


def test_a_sound_store_is_sound(tmp_path):
    large(tmp_path / "s", label=np.arange(2000))
    found = whence.verify(tmp_path / "s")
    on_disk = sum(
        each.stat().st_size
        for each in (tmp_path / "s").rglob("*")
        if each.is_file() and each.name != "lock"
    )
    assert found.is_sound
    assert (found.bytes, found.rows) == (on_disk, 2000)
    assert found.leftovers == []


def test_verify_names_file_and_block(tmp_path):
    large(tmp_path / "s")
    path = tmp_path / "s" / "shard-00000002" / "rows.npy"
    damage(path, 2 * BLOCK + 5)
    found = whence.verify(tmp_path / "s")
    assert [(each.path, each.block) for each in found.damage] == [(path, 2)]
    assert "block 2 (bytes 131072 to 196607)" in str(found)
    with pytest.raises(errors.StoreError, match=r"rows\.npy.*block 2"):
        whence.open(tmp_path / "s").rows()


@pytest.mark.parametrize("ids", ["int", "str"])
def test_repair_drops_the_rows_of_a_bad_block_and_lists_their_ids(tmp_path, ids):
    path = tmp_path / "s"
    names = np.arange(2000) if ids == "int" else np.array([f"id {n}" for n in range(2000)])
    before = fill(path, random_rows(2000, 64), ids=names, parts=2, label=names).rows()
    damage(path / "shard-00000002" / "rows.npy", BLOCK + 5)
    # Rows of 256 bytes behind a header of 128: those that begin before the block's end.
    first, last = (BLOCK - 128) // 256, -(-(2 * BLOCK - 128) // 256)
    gone = np.arange(1000 + first, 1000 + last)
    found = whence.repair(path)
    assert [id_ for _, id_ in found.lost] == names[gone].tolist()
    assert found.unnamed == 0
    after = whence.open(path)
    assert after.ids.tolist() == np.delete(names, gone).tolist()
    assert np.array_equal(after.rows(), np.delete(before, gone, axis=0))
    assert after.columns["label"].tolist() == after.ids.tolist()
    assert whence.verify(path).is_sound


def test_repair_keeps_values_to_the_bit(tmp_path):
    path = tmp_path / "s"
    before = large(path).rows()
    damage(path / "shard-00000001" / "scales.npy", 128 + 4 * 3)
    whence.repair(path)
    after = whence.open(path)
    assert np.array_equal(after.rows(), before[after.ids])
    assert after.ids.tolist() == list(range(1000, 2000))  # all scales lie in one block


def test_rows_whose_ids_are_damaged_are_counted(tmp_path):
    large(tmp_path / "s")
    damage(tmp_path / "s" / "shard-00000001" / "ids.npy", 200)
    found = whence.repair(tmp_path / "s")
    assert (found.lost, found.unnamed) == ([], 1000)
    assert whence.open(tmp_path / "s").ids.tolist() == list(range(1000, 2000))


@pytest.mark.parametrize("name", ["shard.json", "rows.npy", "ids.npy"])
def test_a_shard_without_a_file_is_dropped(tmp_path, name):
    large(tmp_path / "s")
    (tmp_path / "s" / "shard-00000001" / name).unlink()
    assert not whence.verify(tmp_path / "s").is_sound
    whence.repair(tmp_path / "s")
    assert whence.open(tmp_path / "s").ids.tolist() == list(range(1000, 2000))
    assert whence.verify(tmp_path / "s").is_sound


def test_a_truncated_file_loses_only_its_end(tmp_path):
    large(tmp_path / "s")
    path = tmp_path / "s" / "shard-00000001" / "rows.npy"
    path.write_bytes(path.read_bytes()[: 3 * BLOCK])
    found = whence.repair(tmp_path / "s")
    kept = (3 * BLOCK - 128) // 256
    assert [id_ for _, id_ in found.lost] == list(range(kept, 1000))


def test_bytes_that_were_added_to_a_file_lose_nothing(tmp_path):
    before = large(tmp_path / "s").rows()
    path = tmp_path / "s" / "shard-00000001" / "scales.npy"
    path.write_bytes(path.read_bytes() + b"more")
    assert not whence.verify(tmp_path / "s").is_sound
    assert whence.repair(tmp_path / "s").lost == []
    assert whence.verify(tmp_path / "s").is_sound
    assert np.array_equal(whence.open(tmp_path / "s").rows(), before)


@pytest.mark.parametrize("how", ["removed", "damaged"])
def test_a_lost_manifest_is_an_error_and_repair_goes_back(tmp_path, how):
    path = tmp_path / "s"
    large(path)
    newest = max(path.glob("manifest-*"))
    newest.unlink() if how == "removed" else damage(newest, 30)
    with pytest.raises(errors.StoreError, match=newest.name):
        whence.open(path)
    assert not whence.verify(path).is_sound
    found = whence.repair(path)
    assert found.went_back
    assert [id_ for _, id_ in found.lost] == list(range(1000, 2000))
    assert whence.open(path).ids.tolist() == list(range(1000))
    assert whence.verify(path).is_sound
    assert fill(path, random_rows(1, 64), ids=[7000]).ids.tolist() == [*range(1000), 7000]


def test_a_damaged_older_manifest_is_damage_and_repair_removes_it(tmp_path):
    path = tmp_path / "s"
    large(path)
    damage(min(path.glob("manifest-*")), 30)
    assert len(whence.open(path)) == 2000
    assert not whence.verify(path).is_sound
    assert whence.repair(path).lost == []
    assert whence.verify(path).is_sound
    assert len(whence.open(path)) == 2000


def test_repair_does_not_let_deleted_rows_come_back_unasked(tmp_path):
    path = tmp_path / "s"
    large(path)
    whence.delete(path, [3])
    damage(next(path.glob("gone-*")), 140)
    with pytest.raises(errors.StoreError, match="which rows were deleted is not known"):
        whence.repair(path)
    whence.repair(path, undelete=True)
    assert len(whence.open(path)) == 2000


def test_repair_does_not_go_back_before_a_deletion_unasked(tmp_path):
    path = tmp_path / "s"
    large(path)
    whence.delete(path, [3])
    damage(max(path.glob("manifest-*")), 40)
    with pytest.raises(errors.StoreError, match="deleted after the last manifest"):
        whence.repair(path)
    assert whence.repair(path, undelete=True).went_back
    assert len(whence.open(path)) == 2000


def test_folders_of_writers_that_were_exchanged_are_damage(tmp_path):
    for number in (1, 2):
        writer = Writer(tmp_path / "s", manifest(), f"{number}/2")
        writer.set_checkpoint(Checkpoint("0"))
        writer.append(np.array([number]), random_rows(1), {})
        writer.close()
    one, two = (tmp_path / "s" / f"writer-{number}-of-2" for number in (1, 2))
    one.rename(tmp_path / "aside")
    two.rename(one)
    (tmp_path / "aside").rename(two)
    with pytest.raises(errors.StoreError, match="must be of writer 1/2, got the folder of 2/2"):
        whence.open(tmp_path / "s")
    assert not whence.verify(tmp_path / "s").is_sound


def test_deleted_rows_stay_deleted_after_repair(tmp_path):
    path = tmp_path / "s"
    large(path)
    whence.delete(path, [3, 1500])
    damage(path / "shard-00000002" / "rows.npy", BLOCK + 5)
    found = whence.repair(path)
    left = whence.open(path).ids
    assert 3 not in left
    assert 1500 not in left
    assert len(left) + len(found.lost) == 1998


def test_what_is_missing_and_what_is_no_store_is_named(tmp_path):
    def delete(path):
        return whence.delete(path, [1])

    (tmp_path / "file").write_text("x")
    calls = (whence.open, whence.verify, whence.repair, whence.info, whence.compact, delete)
    for call in calls:
        with pytest.raises(errors.StoreError, match=r"path must be the folder .*, which does not"):
            call(tmp_path / "nowhere")
        with pytest.raises(errors.StoreError, match=r"path must be the folder .* got the file"):
            call(tmp_path / "file")
    assert not (tmp_path / "nowhere").exists()
    (tmp_path / "empty").mkdir()
    with pytest.raises(errors.StoreError, match="no manifest"):
        whence.verify(tmp_path / "empty")


def test_info_counts_what_is_there(tmp_path):
    path = tmp_path / "s"
    fill(path, random_rows(20), dtype="int8", checkpoint="a", parts=4, label=list("ab") * 10)
    fill(path, random_rows(20), dtype="int8", checkpoint="b", ids=np.arange(20), label=["c"] * 20)
    whence.delete(path, [5])
    found = whence.info(path)
    assert (found.examples, found.rows, found.gone) == (19, 38, 2)
    assert found.checkpoints == {"a": 19, "b": 19}
    assert found.columns == {"label": "str"}
    assert found.bytes["rows"] == 40 * 16 + 5 * 128
    assert "19, 38 rows in 5 shards" in str(found)


def test_info_counts_every_byte_of_a_store_once(tmp_path):
    path = tmp_path / "s"
    fill(path, random_rows(20), parts=4, label=list("ab") * 10)
    whence.delete(path, [5])
    whence.delete(path, [6])
    for name in ("shard-00000099", "pack-00000007.json", "gone-00000077.npy"):
        (path / name).write_bytes(b"left over")
    files = [each for each in path.rglob("*") if each.is_file() and each.name != "lock"]
    found = whence.info(path)
    assert found.leftovers == 27
    assert sum(found.bytes.values()) + found.leftovers == sum(each.stat().st_size for each in files)


@pytest.mark.parametrize("error", LATE, ids=["interrupt", "error"])
def test_a_repaired_store_whose_manifest_appeared_is_whole(tmp_path, monkeypatch, error):
    large(tmp_path / "s")
    damage(tmp_path / "s" / "shard-00000001" / "rows.npy", BLOCK + 5)
    appears_and_fails(monkeypatch, error)
    with pytest.raises(type(error)):
        whence.repair(tmp_path / "s")
    assert whence.verify(tmp_path / "s").is_sound
    left = len(whence.open(tmp_path / "s"))
    assert 1000 < left < 2000
    assert not whence.repair(tmp_path / "s").shards
    assert len(whence.open(tmp_path / "s")) == left


def test_a_store_that_is_written_to_is_sound_at_any_moment(tmp_path):
    writer = Writer(tmp_path / "s", manifest())
    writer.set_checkpoint(Checkpoint("0"))
    rows, stop = random_rows(4), threading.Event()

    def write():
        for turn in range(300):
            writer.append(4 * (turn % 3) + np.arange(4), rows, {}, replaces=True)
            writer.commit()
            if stop.is_set():
                break

    writer.append(np.arange(4), rows, {})
    writer.commit()
    thread = threading.Thread(target=write)
    thread.start()
    try:
        while thread.is_alive():
            assert str(whence.verify(tmp_path / "s")).endswith("sound")
            assert whence.verify(tmp_path / "s").is_sound
            assert whence.info(tmp_path / "s").examples in (4, 8, 12)
            assert len(whence.open(tmp_path / "s").ids) in (4, 8, 12)
            whence.export_store(tmp_path / "s", tmp_path / "s.npz")
    finally:
        stop.set()
        thread.join()
        writer.close()


def test_an_array_of_another_name_is_counted(tmp_path):
    fill(tmp_path / "s", random_rows(4))
    shard = tmp_path / "s" / "shard-00000001"
    body = read_json(shard / "shard.json")
    body["files"]["extra.npy"] = body["files"]["ids.npy"]
    shutil.copy(shard / "ids.npy", shard / "extra.npy")
    written = write_json(shard / "shard.json", body)
    found, number = Manifest.load(tmp_path / "s")
    found.shards[0] = replace(found.shards[0], described=written)
    found.save(tmp_path / "s", number)
    assert whence.verify(tmp_path / "s").is_sound
    assert whence.info(tmp_path / "s").bytes["others"] == body["files"]["ids.npy"][0]


def test_what_can_be_done_where_manifests_are_gone_is_said(tmp_path):
    fill(tmp_path / "s", random_rows(4), parts=2)
    (tmp_path / "s" / "manifest-00000002.json").unlink()
    with pytest.raises(errors.StoreError, match=r"whence\.repair goes back to an older one"):
        whence.open(tmp_path / "s")
    (tmp_path / "s" / "manifest-00000001.json").unlink()
    for call in (whence.open, whence.repair):
        with pytest.raises(errors.StoreError, match="and no other is there"):
            call(tmp_path / "s")
    (tmp_path / "s" / "committed-00000002").unlink()
    with pytest.raises(errors.StoreError, match="there are rows that none names"):
        whence.open(tmp_path / "s")
