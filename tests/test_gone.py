"""Rows that were deleted or replaced, as a writer lets them go: all in one commit, or none."""

import contextlib
import shutil
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from filled import fill, manifest, random_rows
from hypothesis import given, settings
from hypothesis import strategies as st

import whence
from whence import errors
from whence.store import Checkpoint, Manifest, Writer
from whence.store.files import write_array


def reopened(path, dim=16, dtype="float32"):
    writer = Writer(path, manifest(dim, dtype))
    writer.set_checkpoint(Checkpoint("0"))
    return writer


def held(path):
    """id -> row, of all that is visible."""
    if not Manifest.exists(path):
        return {}
    store = whence.open(path)
    return dict(zip(store.ids.tolist(), store.rows().tolist(), strict=True)) if len(store) else {}


def same(found, expected):
    """Whether two dicts of rows are equal but for the rounding of float32."""
    return found.keys() == expected.keys() and all(
        np.allclose(found[id_], expected[id_], rtol=1e-5) for id_ in found
    )


# --- deleted ------------------------------------------------------------------------------------


def test_a_writer_forgets_what_it_deletes_at_once_and_readers_with_the_commit(tmp_path):
    fill(tmp_path / "s", random_rows(6), parts=2)
    writer = reopened(tmp_path / "s")
    assert writer.delete(np.array([1, 4])) == 2
    assert writer.has(np.arange(7)).tolist() == [True, False, True, True, False, True, False]
    assert whence.open(tmp_path / "s").ids.tolist() == list(range(6))
    writer.commit()
    assert whence.open(tmp_path / "s").ids.tolist() == [0, 2, 3, 5]
    writer.close()


def test_another_writer_knows_what_was_deleted(tmp_path):
    fill(tmp_path / "s", random_rows(6), parts=2)
    writer = reopened(tmp_path / "s")
    writer.delete(np.array([1, 4]))
    writer.close()
    writer = reopened(tmp_path / "s")
    assert writer.has(np.arange(6)).tolist() == [True, False, True, True, False, True]
    writer.close()


def test_rows_that_wait_are_deleted_too(tmp_path):
    rows = random_rows(4)
    writer = reopened(tmp_path / "s")
    writer.append(np.arange(4), rows, {})
    assert writer.delete(np.array([2])) == 1
    writer.close()
    assert same(held(tmp_path / "s"), {0: rows[0], 1: rows[1], 3: rows[3]})


def test_a_deleted_id_is_recorded_again_in_the_commit_that_deletes_it(tmp_path):
    rows = random_rows(3)
    fill(tmp_path / "s", rows[:2])
    writer = reopened(tmp_path / "s")
    writer.delete(np.array([0]))
    writer.append(np.array([0]), rows[2:], {})
    assert same(held(tmp_path / "s"), {0: rows[0], 1: rows[1]})
    writer.close()
    assert same(held(tmp_path / "s"), {0: rows[2], 1: rows[1]})


def test_ids_that_are_texts_are_deleted(tmp_path):
    ids = np.array(["a", "", "\ud800", "é" * 1024])
    fill(tmp_path / "s", random_rows(4), ids=ids, parts=2)
    writer = reopened(tmp_path / "s")
    assert writer.delete(ids[1:3]) == 2
    writer.close()
    assert whence.open(tmp_path / "s").ids.tolist() == ["a", "é" * 1024]


def test_an_id_that_is_nowhere_is_named_and_nothing_deleted(tmp_path):
    fill(tmp_path / "s", random_rows(3))
    writer = reopened(tmp_path / "s")
    with pytest.raises(errors.IdError, match="ids must be in the store, got 7"):
        writer.delete(np.array([1, 7]))
    assert writer.has(np.array([1])).tolist() == [True]
    writer.close()
    assert whence.open(tmp_path / "s").ids.tolist() == [0, 1, 2]


def test_columns_and_norms_are_those_of_who_is_left(tmp_path):
    rows = random_rows(6)
    fill(tmp_path / "s", rows, parts=3, label=np.arange(6) * 10, text=list("abcdef"))
    whence.delete(tmp_path / "s", [0, 5, 2])
    store = whence.open(tmp_path / "s")
    assert store.columns["label"].tolist() == [10, 30, 40]
    assert store.columns["text"].tolist() == ["b", "d", "e"]
    assert np.allclose(store.norms(), np.linalg.norm(rows[[1, 3, 4]], axis=1), rtol=1e-6)


# --- replaced -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float16", "int8", "int4", "int2", "int1"])
def test_a_replaced_row_is_the_new_one_as_it_would_be_stored_alone(tmp_path, dtype):
    old, new = random_rows(5), random_rows(2, seed=1)
    fill(tmp_path / "s", old, dtype=dtype)
    writer = reopened(tmp_path / "s", dtype=dtype)
    writer.append(np.array([3, 1]), new, {}, replaces=True)
    writer.close()
    store = whence.open(tmp_path / "s")
    assert sorted(store.ids.tolist()) == [0, 1, 2, 3, 4]
    wanted = old.copy()
    wanted[[3, 1]] = new
    alone = fill(tmp_path / "alone", wanted, dtype=dtype)
    assert np.array_equal(store.rows(np.arange(5)), alone.rows())


def test_a_row_that_waits_is_replaced(tmp_path):
    rows = random_rows(6)
    writer = reopened(tmp_path / "s")
    writer.append(np.arange(3), rows[:3], {})
    writer.append(np.array([2, 3]), rows[3:5], {}, replaces=True)
    writer.append(np.array([2]), rows[5:], {}, replaces=True)
    writer.close()
    assert same(held(tmp_path / "s"), {0: rows[0], 1: rows[1], 2: rows[5], 3: rows[4]})


def test_batches_of_other_ids_wait_together(tmp_path):
    fill(tmp_path / "s", random_rows(40))
    writer = reopened(tmp_path / "s")
    for first in range(0, 40, 4):
        writer.append(np.arange(first, first + 4), random_rows(4), {}, replaces=True)
    writer.close()
    assert len(list((tmp_path / "s").glob("shard-*"))) == 2


def test_a_row_is_replaced_at_its_checkpoint_alone(tmp_path):
    rows = random_rows(5)
    for place, name in enumerate("ab"):
        fill(tmp_path / "s", rows[2 * place :][:2], checkpoint=name)
    writer = Writer(tmp_path / "s", manifest())
    writer.set_checkpoint(Checkpoint("a"))
    writer.append(np.array([1]), rows[4:], {}, replaces=True)
    writer.close()
    store = whence.open(tmp_path / "s")
    assert np.allclose(store.rows(np.array([0, 1]), "a"), rows[[0, 4]], rtol=1e-6)
    assert np.allclose(store.rows(np.array([0, 1]), "b"), rows[[2, 3]], rtol=1e-6)


def test_a_row_that_is_left_out_takes_the_old_one_with_it(tmp_path):
    fill(tmp_path / "s", random_rows(3))
    writer = reopened(tmp_path / "s")
    writer.skip(np.array([1, 9]), replaces=True)
    assert writer.has(np.arange(3)).tolist() == [True, False, True]
    writer.close()
    store = whence.open(tmp_path / "s")
    assert (store.ids.tolist(), store.skipped) == ([0, 2], [("0", 1), ("0", 9)])


# --- all or nothing -----------------------------------------------------------------------------


CHANGES = {
    "delete": lambda writer, rows: writer.delete(np.array([0, 3])),
    "replace": lambda writer, rows: writer.append(np.array([0, 3]), rows, {}, replaces=True),
    "replace and add": lambda writer, rows: writer.append(
        np.array([3, 8]), rows, {}, replaces=True
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_at_every_step_of_a_commit_the_store_is_old_or_new(tmp_path, change):
    """Copies of the folder, taken wherever a file is synced, named or removed."""
    path, rows, new = tmp_path / "s", random_rows(4), random_rows(2, seed=1)
    fill(path, rows, parts=2)
    whence.delete(path, [2])
    old = held(path)
    writer = reopened(path)
    CHANGES[change](writer, new)
    copies = []

    def watched(original):
        def call(*arguments, **options):
            for moment in ("before", "after"):
                if moment == "after":
                    found = original(*arguments, **options)
                copies.append(tmp_path / f"copy-{len(copies)}")
                shutil.copytree(path, copies[-1])
            return found

        return call

    with contextlib.ExitStack() as stack:
        for owner, name in (
            ("whence.store.files", "sync"),
            ("whence.store.files", "sync_directory"),
            (Path, "replace"),
            (Path, "unlink"),
        ):
            if owner is Path:
                patch = mock.patch.object(owner, name, autospec=True)
                original = getattr(Path, name)
            else:
                patch = mock.patch(f"{owner}.{name}")
                original = getattr(__import__(owner, fromlist=["_"]), name)
            stack.enter_context(patch).side_effect = watched(original)
        writer.commit()
    writer.close()
    final = held(path)
    assert len(copies) > 8
    assert not same(final, old)
    found = [held(copy) for copy in copies]
    states = ["old" if same(each, old) else "new" if same(each, final) else "?" for each in found]
    assert set(states) == {"old", "new"}
    assert states == sorted(states, key=["old", "new"].index)


@pytest.mark.parametrize("moment", ["before", "after"])
def test_an_interrupted_commit_lets_rows_go_once(tmp_path, moment):
    rows = random_rows(6)
    fill(tmp_path / "s", rows[:4], parts=2)
    writer = reopened(tmp_path / "s")
    writer.append(np.array([0, 3]), rows[4:], {}, replaces=True)
    save = Manifest.save

    def interrupted(self, folder, number):
        if moment == "after":
            save(self, folder, number)
        raise KeyboardInterrupt

    with mock.patch.object(Manifest, "save", interrupted), pytest.raises(KeyboardInterrupt):
        writer.commit()
    new = {0: rows[4], 1: rows[1], 2: rows[2], 3: rows[5]}
    if moment == "before":
        assert same(held(tmp_path / "s"), dict(enumerate(rows[:4])))
    else:
        assert same(held(tmp_path / "s"), new)
    writer.close()
    assert same(held(tmp_path / "s"), new)


def test_a_reader_keeps_what_it_opened(tmp_path):
    rows = random_rows(4)
    before = fill(tmp_path / "s", rows[:3])
    writer = reopened(tmp_path / "s")
    writer.append(np.array([1]), rows[3:], {}, replaces=True)
    writer.delete(np.array([0]))
    writer.close()
    assert before.ids.tolist() == [0, 1, 2]
    assert np.allclose(before.rows(), rows[:3], rtol=1e-6)


_IDS = st.lists(st.integers(0, 9), min_size=1, max_size=4, unique=True)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.one_of(
            st.tuples(st.sampled_from(["new", "replace", "delete", "skip"]), _IDS),
            st.tuples(st.sampled_from(["commit", "reopen", "fail", "lost answer"]), st.none()),
        ),
        max_size=14,
    )
)
def test_any_steps_leave_what_a_dict_would_hold(tmp_path_factory, steps):
    path, wanted, noted = tmp_path_factory.mktemp("store") / "s", {}, []
    writer = reopened(path)
    for number, (step, ids) in enumerate(steps):
        rows = random_rows(10, seed=number)
        if step == "commit":
            writer.commit()
        elif step == "reopen":
            writer.close()
            writer = reopened(path)
        elif step in ("fail", "lost answer"):
            owner, name = (Path, "replace") if step == "fail" else (Manifest, "settle")
            broken = mock.patch.object(owner, name, side_effect=OSError(28, "full"))
            with broken, contextlib.suppress(OSError, errors.StoreError):
                writer.commit()
        elif step == "delete":
            ids = [id_ for id_ in ids if id_ in wanted or id_ in noted]
            if ids:
                assert writer.delete(np.array(ids)) == sum(id_ in wanted for id_ in ids)
            wanted = {id_: row for id_, row in wanted.items() if id_ not in ids}
            noted = [id_ for id_ in noted if id_ not in ids]
        elif step == "skip":
            writer.skip(np.array(ids), replaces=True)
            wanted = {id_: row for id_, row in wanted.items() if id_ not in ids}
            noted += [id_ for id_ in ids if id_ not in noted]
        else:
            if step == "new":
                ids = [id_ for id_ in ids if id_ not in wanted]
            writer.append(np.array(ids, int), rows[ids], {}, replaces=step == "replace")
            wanted |= {id_: rows[id_] for id_ in ids}
            noted = [id_ for id_ in noted if id_ not in ids]
        assert writer.has(np.arange(10)).tolist() == [id_ in wanted for id_ in range(10)]
        assert writer.left_out == set(noted)
    writer.close()
    assert same(held(path), wanted)
    if wanted or noted:
        assert {id_ for _, id_ in whence.open(path).skipped} == set(noted)


# --- the file -----------------------------------------------------------------------------------


def test_the_file_names_shard_and_row(tmp_path):
    fill(tmp_path / "s", random_rows(6), parts=2)
    whence.delete(tmp_path / "s", [5, 1])
    (path,) = (tmp_path / "s").glob("gone-*")
    found = np.load(path)
    assert found.dtype == np.dtype("<i8")
    assert found.tolist() == [[1, 1], [2, 2]]


def test_files_of_older_commits_are_removed_but_for_the_one_before(tmp_path):
    fill(tmp_path / "s", random_rows(8))
    for id_ in range(4):
        whence.delete(tmp_path / "s", [id_])
    writer = reopened(tmp_path / "s")
    for id_ in range(4, 7):
        writer.delete(np.array([id_]))
        writer.commit()
    writer.close()
    names = [path.name for path in sorted((tmp_path / "s").glob("gone-*"))]
    assert names == ["gone-00000007.npy", "gone-00000008.npy"]
    assert whence.open(tmp_path / "s").ids.tolist() == [7]
    assert whence.verify(tmp_path / "s").leftovers == []


def test_a_file_that_a_killed_writer_left_is_written_anew(tmp_path):
    fill(tmp_path / "s", random_rows(4))
    (tmp_path / "s" / "gone-00000002.npy").write_bytes(b"half")
    writer = reopened(tmp_path / "s")
    for id_ in range(3):
        writer.delete(np.array([id_]))
        writer.commit()
        assert whence.open(tmp_path / "s").ids.tolist() == list(range(id_ + 1, 4))
    writer.close()
    assert whence.verify(tmp_path / "s").is_sound


def test_the_manifest_before_still_has_its_own_file(tmp_path):
    """Or what was deleted before would come back where `repair` has to go back to it."""
    fill(tmp_path / "s", random_rows(6))
    whence.delete(tmp_path / "s", [0])
    whence.delete(tmp_path / "s", [1])
    newest = max((tmp_path / "s").glob("manifest-*"))
    newest.write_bytes(b"")
    with pytest.raises(errors.StoreError, match=r"gone-00000003\.npy names rows that were deleted"):
        whence.repair(tmp_path / "s")
    assert whence.repair(tmp_path / "s", undelete=True).went_back
    assert whence.open(tmp_path / "s").ids.tolist() == [1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    ("rows", "match"),
    [
        ([[1, 0], [1, 6]], "rows are gone that shard-00000001 has not"),
        ([[1, 0], [7, 0]], "rows are gone of shards that are not there"),
        ([[1, 1], [1, 0]], "shards and rows must rise"),
        ([[1, 0], [1, 0]], "shards and rows must rise"),
        ([[-1, 0], [1, 0]], "shards and rows must rise"),
        ([[1, -1], [1, 0]], "shards and rows must rise"),
        ([[1, 0], [1, 1 << 40]], "shards and rows must rise"),
    ],
)
def test_rows_that_cannot_be_gone_are_refused(tmp_path, rows, match):
    fill(tmp_path / "s", random_rows(6))
    whence.delete(tmp_path / "s", [0, 1])
    found, number = Manifest.load(tmp_path / "s")
    written = write_array(tmp_path / "s" / found.gone.name, np.array(rows, np.int64))
    for name, value in zip(written._fields, written, strict=True):
        object.__setattr__(found.gone, name, value)
    found.save(tmp_path / "s", number + 1)
    with pytest.raises(errors.StoreError, match=match):
        whence.open(tmp_path / "s").search(random_rows(1))


@pytest.mark.parametrize("what", ["flip", "cut", "none", "link"])
def test_damage_to_the_file_is_an_error_that_names_it(tmp_path, what):
    fill(tmp_path / "s", random_rows(6))
    whence.delete(tmp_path / "s", [0, 1])
    (path,) = (tmp_path / "s").glob("gone-*")
    content = path.read_bytes()
    path.unlink()
    if what == "flip":
        path.write_bytes(content[:-8] + b"\2" + content[-7:])
    elif what == "cut":
        path.write_bytes(content[:-16])
    elif what == "link":
        (tmp_path / "other").write_bytes(content)
        path.symlink_to(tmp_path / "other")
    with pytest.raises(errors.StoreError, match=path.name):
        whence.open(tmp_path / "s")


def test_a_file_that_only_begins_like_ours_is_neither_read_nor_removed(tmp_path):
    fill(tmp_path / "s", random_rows(9))
    stranger = tmp_path / "s" / "gone-with-the-wind.npy"
    stranger.write_bytes(b"a novel")
    for id_ in range(5):
        whence.delete(tmp_path / "s", [id_])
    newest = max((tmp_path / "s").glob("manifest-*.json"))
    newest.write_bytes(newest.read_bytes()[:-1])
    (tmp_path / "s" / f"gone-{newest.stem.removeprefix('manifest-')}.npy").unlink()
    assert whence.repair(tmp_path / "s").went_back
    assert stranger.read_bytes() == b"a novel"
    assert whence.open(tmp_path / "s").ids.tolist() == [4, 5, 6, 7, 8]
