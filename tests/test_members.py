"""Stores of several writers: read as one, and refused where they do not go together."""

import shutil
from dataclasses import replace

import numpy as np
import pytest
from filled import column, fill, manifest, random_rows

import whence
from whence import errors
from whence.store import COMBINED, Checkpoint, Manifest, Writer


def part(path, writer, ids, rows, *, checkpoint=None, like=None, **columns):
    """Appends rows as one of several writers."""
    store = Writer(path, manifest(rows.shape[1]) if like is None else like, writer)
    store.set_checkpoint(Checkpoint("0") if checkpoint is None else checkpoint)
    given = {name: column(value) for name, value in columns.items()}
    store.append(np.asarray(ids), rows, store.check_columns(given))
    store.close()


def two(path, one=None, other=None):
    """A store of two writers, with an example each; more by keyword arguments of each."""
    rows = random_rows(2)
    part(path, "1/2", [0], rows[:1], **(one or {}))
    part(path, "2/2", [1], rows[1:], **(other or {}))
    return path


def test_rows_andcolumns_of_all_writers_stand_by_their_ids(tmp_path):
    rows, labels = random_rows(12), np.arange(12) ** 2
    for number, share in enumerate(np.array_split(np.arange(12)[::-1], 3), start=1):
        part(tmp_path / "s", f"{number}/3", share, rows[share], label=labels[share])
    store = whence.open(tmp_path / "s")
    assert sorted(store.ids.tolist()) == list(range(12))
    assert np.allclose(store.rows(), rows[store.ids], rtol=1e-6)
    assert store.columns["label"].tolist() == labels[store.ids].tolist()


def test_scores_are_those_of_all_rows(tmp_path):
    rows, query = random_rows(12), random_rows(2, seed=1)
    for number in (1, 2):
        share = np.arange(number - 1, 12, 2)
        part(tmp_path / "s", f"{number}/2", share, rows[share])
    hits = whence.open(tmp_path / "s").search(query, k=12)
    scores = query.astype(np.float64) @ rows.T
    for found, expected in zip(hits.helpful.ids, np.argsort(-scores), strict=True):
        assert found.tolist() == expected.tolist()
    best = np.sort(scores)[:, ::-1]
    assert np.allclose(hits.helpful.scores, best, rtol=1e-4, atol=1e-4 * np.abs(best).max())


def test_checkpoints_are_found_by_name_in_whatever_order(tmp_path):
    rows = random_rows(8)
    for number, names in ((1, "ab"), (2, "ba"), (3, "c")):
        for place, name in enumerate(names):
            part(
                tmp_path / "s",
                f"{number}/3",
                [number],
                rows[2 * number + place - 1 :][:1],
                checkpoint=Checkpoint(name, 0.5),
            )
    store = whence.open(tmp_path / "s")
    assert store.checkpoints == ["a", "b", "c"]
    numbers = {
        name: dict(zip(store.ids.tolist(), store.norms(name), strict=True)) for name in "abc"
    }
    norms = np.linalg.norm(rows, axis=1)
    expected = {"a": [norms[1], norms[4], np.nan], "b": [norms[2], norms[3], np.nan]}
    expected["c"] = [np.nan, np.nan, norms[5]]
    for name, values in expected.items():
        found = [numbers[name][id_] for id_ in (1, 2, 3)]
        assert np.allclose(found, values, rtol=1e-6, equal_nan=True)


def testcolumns_are_found_by_their_names_in_whatever_order(tmp_path):
    two(tmp_path / "s", {"x": ["x0"], "y": ["y0"]}, {"y": ["y1"], "x": ["x1"]})
    found = whence.open(tmp_path / "s").columns
    assert {name: found[name].tolist() for name in found} == {"x": ["x0", "x1"], "y": ["y0", "y1"]}


def test_notes_of_what_was_left_out_are_of_all_writers(tmp_path):
    for number, names in ((1, "ab"), (2, "ba")):
        store = Writer(tmp_path / "s", manifest(), f"{number}/2")
        for name in names:
            store.set_checkpoint(Checkpoint(name))
        store.skip(np.array([10 * number]))
        store.close()
    assert whence.open(tmp_path / "s").skipped == [("b", 10), ("a", 20)]


def test_an_id_of_two_writers_is_refused(tmp_path):
    part(tmp_path / "s", "1/3", [1, 2], random_rows(2))
    part(tmp_path / "s", "2/3", [3], random_rows(1))
    part(tmp_path / "s", "3/3", [4, 2], random_rows(2))
    with pytest.raises(errors.IdError, match="got 2 of writer-1-of-3 and of writer-3-of-3"):
        whence.open(tmp_path / "s")


def test_an_id_of_two_writers_is_refused_at_other_checkpoints_too(tmp_path):
    two(tmp_path / "s", other={"checkpoint": Checkpoint("1")})
    part(tmp_path / "s", "2/2", [0], random_rows(1), checkpoint=Checkpoint("1"))
    with pytest.raises(errors.IdError, match="got 0 of writer-1-of-2 and of writer-2-of-2"):
        whence.open(tmp_path / "s")


def test_a_deleted_id_may_be_of_another_writer(tmp_path):
    rows = random_rows(4)
    part(tmp_path / "s", "1/2", [0, 1], rows[:2])
    part(tmp_path / "s", "2/2", [2], rows[2:3])
    store = Writer(tmp_path / "s", manifest(), "1/2")
    store.delete(np.array([1]))
    store.close()
    part(tmp_path / "s", "2/2", [1], rows[3:])
    found = whence.open(tmp_path / "s")
    assert found.ids.tolist() == [0, 2, 1]
    assert np.allclose(found.rows(), rows[[0, 2, 3]], rtol=1e-6)


@pytest.mark.parametrize("number", [1, 2])
def test_a_deleted_row_is_of_its_own_writer_alone(tmp_path, number):
    rows = random_rows(6)
    for writer in (1, 2):
        share = np.arange(6)[3 * writer - 3 : 3 * writer]
        part(tmp_path / "s", f"{writer}/2", share, rows[share])
    store = Writer(tmp_path / "s", manifest(), f"{number}/2")
    store.delete(np.array([3 * number - 3 + 1]))  # the second row of shard 1, which both have
    store.close()
    found = whence.open(tmp_path / "s")
    left = [id_ for id_ in range(6) if id_ != 3 * number - 2]
    assert found.ids.tolist() == left
    assert np.allclose(found.rows(), rows[left], rtol=1e-6)


# --- what does not go together ------------------------------------------------------------------


OTHERS = {
    "sketch": replace(manifest(), sketch=whence.Sketch(dim=16, seed=1).spec),
    "dtype": manifest(dtype="float16"),
    "reduction": replace(manifest(), reduction="sum"),
    "rows": replace(manifest(), rows="combined"),
    "model": replace(manifest(), model={"digest": "another", "parameters": []}),
}


@pytest.mark.parametrize("what", OTHERS)
def test_writers_of_other_settings_are_refused_and_the_setting_named(tmp_path, what):
    rows = random_rows(2)
    part(tmp_path / "s", "1/2", [0], rows[:1])
    weight = 1.0 if what == "rows" else None
    part(
        tmp_path / "s",
        "2/2",
        [1],
        rows[1:],
        like=replace(OTHERS[what]),
        checkpoint=Checkpoint("0", weight=weight),
    )
    with pytest.raises(
        errors.MismatchError,
        match=f"^{what} must be the same for all writers of .*writer-1-of-2 .*writer-2-of-2",
    ):
        whence.open(tmp_path / "s")


@pytest.mark.parametrize(
    ("what", "one", "other"),
    [
        ("ids", {}, {}),
        ("columns", {"a": [1]}, {"b": [1]}),
        ("columns", {"a": [1]}, {"a": [1.5]}),
        ("columns", {"a": [1]}, {}),
        (
            "learning_rate",
            {"checkpoint": Checkpoint("0", 0.1)},
            {"checkpoint": Checkpoint("0", 0.2)},
        ),
        ("learning_rate", {"checkpoint": Checkpoint("0", 0.1)}, {"checkpoint": Checkpoint("0")}),
        (
            "weights",
            {"checkpoint": Checkpoint("0", first="aa", last="aa")},
            {"checkpoint": Checkpoint("0", first="bb", last="bb")},
        ),
    ],
)
def test_writers_of_other_rows_are_refused_and_the_difference_named(tmp_path, what, one, other):
    if what == "ids":
        part(tmp_path / "s", "1/2", [0], random_rows(1))
        part(tmp_path / "s", "2/2", ["a"], random_rows(1))
    else:
        two(tmp_path / "s", one, other)
    with pytest.raises(errors.MismatchError, match=f"^{what} must be the same for all writers"):
        whence.open(tmp_path / "s")


def write_sums(path, writer, ids, *names):
    """A writer's sums of rows over checkpoints of these names."""
    held = Writer(path, replace(manifest(), rows=COMBINED), writer)
    held.manifest.checkpoints += [Checkpoint(name, weight=0.5) for name in names]
    held.touch()
    held.commit()
    held.close()
    held = Writer(path, None, writer)
    held.append(np.array(ids), random_rows(len(ids), seed=ids[0]), {})
    held.close()


def test_sums_over_other_checkpoints_are_refused(tmp_path):
    write_sums(tmp_path / "s", "1/2", [0, 1], "0", "1")
    write_sums(tmp_path / "s", "2/2", [2, 3], "0")
    with pytest.raises(errors.MismatchError, match=r"checkpoints must be .* \['0', '1'\] in"):
        whence.open(tmp_path / "s")


def test_weights_that_moved_may_differ(tmp_path):
    one, other = (Checkpoint("0", None, "moving", digest, digest) for digest in ("aa", "bb"))
    store = whence.open(two(tmp_path / "s", {"checkpoint": one}, {"checkpoint": other}))
    assert store.ids.tolist() == [0, 1]
    assert store.manifest.checkpoints[0].weights == "moving"


def preconditioned(path, writer, id_, matrix, identity):
    """An example whose rows are of a map, which is this matrix."""
    sketch = {"layout": "preconditioned", "basis": "none", "coordinates": 16, "dim": 16}
    like = replace(manifest(), sketch=sketch)
    store = Writer(path, like, writer)
    found = store.write_map({"weights": identity}, [], {"values": matrix})
    store.set_checkpoint(Checkpoint("0", first="aa", last="aa", map=found))
    store.append(np.array([id_]), random_rows(1), {})
    store.close()


def test_writers_may_each_have_fitted_the_same_map_but_for_rounding(tmp_path):
    matrix = np.random.default_rng(0).standard_normal((9, 7)).astype(np.float32)
    preconditioned(tmp_path / "s", "1/2", 0, matrix, "aa")
    preconditioned(tmp_path / "s", "2/2", 1, matrix * np.float32(1 + 1e-6), "aa")
    assert whence.open(tmp_path / "s").ids.tolist() == [0, 1]


@pytest.mark.parametrize(
    ("change", "identity"), [(-1.0, "aa"), (1.01, "aa"), (1.0, "bb")], ids=["sign", "size", "what"]
)
def test_writers_of_other_maps_are_refused(tmp_path, change, identity):
    matrix = np.random.default_rng(0).standard_normal((9, 7)).astype(np.float32)
    other = matrix.copy()
    other[3] *= change
    preconditioned(tmp_path / "s", "1/2", 0, matrix, "aa")
    preconditioned(tmp_path / "s", "2/2", 1, other, identity)
    with pytest.raises(errors.MismatchError, match=r"^map must be the same for all writers"):
        whence.open(tmp_path / "s")


# --- who is there -------------------------------------------------------------------------------


def test_writers_that_have_confirmed_nothing_are_named(tmp_path):
    part(tmp_path / "s", "2/4", [0], random_rows(1))
    waiting = Writer(tmp_path / "s", manifest(), "3/4")
    with pytest.warns(errors.MissingWritersWarning, match="writers 1/4, 3/4, 4/4, of which"):
        store = whence.open(tmp_path / "s")
    assert store.missing_writers == ["1/4", "3/4", "4/4"]
    assert store.ids.tolist() == [0]
    waiting.release()


def test_the_warning_stands_where_the_store_was_opened(tmp_path):
    part(tmp_path / "s", "1/2", [0], random_rows(1))
    with pytest.warns(errors.MissingWritersWarning) as found:
        whence.open(tmp_path / "s")
    assert found[0].filename == __file__


def test_a_store_of_one_writer_misses_none(tmp_path):
    assert fill(tmp_path / "s", random_rows(3)).missing_writers == []


def test_nothing_of_any_writer_is_an_error(tmp_path):
    Writer(tmp_path / "s", manifest(), "1/2").release()
    for call in (whence.open, whence.repair):
        with pytest.raises(errors.StoreError, match="nothing was ever confirmed in it"):
            call(tmp_path / "s")


def test_a_writer_opens_alone(tmp_path):
    rows = random_rows(2)
    two(tmp_path / "s")
    store = whence.open(tmp_path / "s" / "writer-2-of-2")
    assert store.ids.tolist() == [1]
    assert np.allclose(store.rows(), rows[1:], rtol=1e-6)


def test_writers_are_open_at_the_same_time(tmp_path):
    stores = [Writer(tmp_path / "s", manifest(), f"{number}/2") for number in (1, 2)]
    for id_, store in enumerate(stores):
        store.set_checkpoint(Checkpoint("0"))
        store.append(np.array([id_]), random_rows(1), {})
    for store in stores:
        store.close()
    assert whence.open(tmp_path / "s").ids.tolist() == [0, 1]


def test_one_number_has_one_writer_at_a_time(tmp_path):
    store = Writer(tmp_path / "s", manifest(), "1/2")
    with pytest.raises(
        errors.LockedError, match=r"writer-1-of-2 must have one writer, got a second"
    ):
        Writer(tmp_path / "s", manifest(), "1/2")
    store.release()
    Writer(tmp_path / "s", manifest(), "1/2").release()


def test_one_of_several_writers_is_refused_in_a_store_of_one(tmp_path):
    fill(tmp_path / "s", random_rows(1))
    with pytest.raises(errors.StoreError, match="path must be a store of several writers, got"):
        Writer(tmp_path / "s", manifest(), "1/2")
    assert sorted(tmp_path.glob("s/writer-*")) == []


def test_one_writer_is_refused_in_a_store_of_several(tmp_path):
    two(tmp_path / "s")
    with pytest.raises(errors.StoreError, match="path must be a store of one writer, got"):
        Writer(tmp_path / "s", manifest())
    assert not (tmp_path / "s" / "lock").exists()


def test_writers_of_another_number_are_refused(tmp_path):
    part(tmp_path / "s", "1/2", [0], random_rows(1))
    with pytest.raises(errors.StoreError, match="got '2/3' beside writer-1-of-2"):
        Writer(tmp_path / "s", manifest(), "2/3")
    assert [each.name for each in (tmp_path / "s").iterdir()] == ["writer-1-of-2"]


def test_a_folder_of_something_else_is_no_store_of_several(tmp_path):
    (tmp_path / "thesis.txt").write_text("x")
    with pytest.raises(errors.StoreError, match=r"thesis\.txt"):
        Writer(tmp_path, manifest(), "1/2")


def test_writers_of_two_jobs_are_refused(tmp_path):
    part(tmp_path / "a", "1/2", [0], random_rows(1))
    part(tmp_path / "b", "1/10", [1], random_rows(1))
    shutil.move(tmp_path / "b" / "writer-1-of-10", tmp_path / "a" / "writer-1-of-10")
    with pytest.raises(errors.StoreError, match="writers of one job, got writers of 2 and of 10"):
        whence.open(tmp_path / "a")


def test_writers_beside_a_manifest_are_refused(tmp_path):
    fill(tmp_path / "s", random_rows(1))
    two(tmp_path / "t")
    shutil.move(tmp_path / "t" / "writer-1-of-2", tmp_path / "s" / "writer-1-of-2")
    with pytest.raises(errors.StoreError, match="of one writer or of several"):
        whence.open(tmp_path / "s")


@pytest.mark.parametrize("name", ["writer-03-of-8", "writer-9-of-8", "writer-1-of-2 (copy)"])
def test_a_folder_that_may_hold_rows_is_not_passed_over(tmp_path, name):
    two(tmp_path / "s")
    shutil.copytree(tmp_path / "s" / "writer-1-of-2", tmp_path / "s" / name)
    with pytest.raises(errors.StoreError, match="must be named writer-N-of-M"):
        whence.open(tmp_path / "s")


def test_a_link_to_a_writer_is_refused(tmp_path):
    two(tmp_path / "s")
    (tmp_path / "s" / "writer-2-of-2").rename(tmp_path / "elsewhere")
    (tmp_path / "s" / "writer-2-of-2").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(errors.StoreError, match="writer-2-of-2 must be a folder of the store"):
        whence.open(tmp_path / "s")


def test_damage_in_one_writer_names_its_file(tmp_path):
    two(tmp_path / "s")
    path = tmp_path / "s" / "writer-2-of-2" / "shard-00000001" / "ids.npy"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(
        errors.StoreError, match=r"writer-2-of-2/shard-00000001/ids\.npy is damaged"
    ):
        whence.open(tmp_path / "s")


def test_a_writer_goes_on_with_its_own_store(tmp_path):
    rows = random_rows(4)
    for id_ in range(4):
        part(tmp_path / "s", "1/1", [id_], rows[id_ : id_ + 1])
    assert np.allclose(whence.open(tmp_path / "s").rows(), rows, rtol=1e-6)
    assert Manifest.load(tmp_path / "s" / "writer-1-of-1")[1] == 4


def exchange(one, other):
    between = one.with_name("between")
    one.rename(between)
    other.rename(one)
    between.rename(other)


def test_repair_says_that_it_cannot_mend_folders_that_were_exchanged(tmp_path):
    store = two(tmp_path / "s")
    one, other = sorted(store.glob("writer-*"))
    exchange(one, other)
    before = {each: each.read_bytes() for each in store.rglob("*") if each.is_file()}
    for call in (whence.repair, lambda path: Writer(path, None, "1/2")):
        with pytest.raises(
            errors.StoreError, match="writer-1-of-2 must be of writer 1/2, got the folder of 2/2"
        ):
            call(store)
    assert not whence.verify(store).is_sound
    after = {each: each.read_bytes() for each in store.rglob("*") if each.is_file()}
    assert {each for each in before if before[each] != after[each]} <= {one / "lock"}


def committed_twice(path):
    """The folders of two writers of a store, each with two commits of an example."""
    for number in (1, 2):
        for at in (0, 2):
            part(path, f"{number}/2", [number + at], random_rows(1))
    return [path / f"writer-{number}-of-2" for number in (1, 2)]


def test_a_manifest_of_another_writer_is_damage_and_repair_goes_back(tmp_path):
    one, two = committed_twice(tmp_path / "s")
    exchange(one / "manifest-00000002.json", two / "manifest-00000002.json")
    assert not whence.verify(tmp_path / "s").is_sound
    done = whence.repair(tmp_path / "s")
    assert done.went_back
    assert sorted(done.lost) == [("0", 3), ("0", 4)]
    assert whence.verify(tmp_path / "s").is_sound
    assert sorted(whence.open(tmp_path / "s").ids.tolist()) == [1, 2]


def test_an_older_manifest_of_another_writer_is_damage_and_repair_removes_it(tmp_path):
    one, two = committed_twice(tmp_path / "s")
    shutil.copy(two / "manifest-00000001.json", one)
    (found,) = whence.verify(tmp_path / "s").damage
    assert found.path == one / "manifest-00000001.json"
    assert not whence.repair(tmp_path / "s").lost
    assert whence.verify(tmp_path / "s").is_sound
    assert len(whence.open(tmp_path / "s")) == 4
