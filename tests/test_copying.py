"""Stores merged and split, against numpy's reading of their files and what was put in."""

import json
import shutil
import signal
import subprocess
import sys
import textwrap
import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
import torch
from filled import LATE, fill, manifest, random_rows
from hypothesis import given, settings
from hypothesis import strategies as st

import whence
from whence import errors
from whence.store import COMBINED, Checkpoint, Manifest, Writer, new
from whence.store.files import json_bytes
from whence.store.manifest import DTYPES
from whence.store.shards import ShardWriter


def stored(path):
    """The stored rows and scales of a store, as numpy reads its files."""
    shards = sorted(path.glob("shard-*"))
    return [
        np.concatenate([np.load(shard / name) for shard in shards])
        for name in ("rows.npy", "scales.npy")
    ]


def content(path):
    """Every file below a folder but locks, by its path."""
    return {
        each.relative_to(path).as_posix(): each.read_bytes()
        for each in path.rglob("*")
        if each.is_file() and each.name != "lock"
    }


def held(path):
    """(checkpoint, id) -> row and columns, of a store of float32."""
    store = whence.open(path)
    numbers = store.row_numbers(missing="keep")
    found = {}
    for name, rows in zip(store.checkpoints, numbers, strict=True):
        for example in np.flatnonzero(rows >= 0):
            row = store.core.read(rows[example : example + 1].astype(np.uint64))[0]
            columns = {each: store.columns[each][example] for each in store.columns}
            found[name, store.ids[example].item()] = (row.tolist(), columns)
    return found


def two(tmp_path, **options):
    """Two stores of 7 and 5 rows."""
    fill(tmp_path / "a", random_rows(7, seed=1), np.arange(7), parts=2, **options)
    fill(tmp_path / "b", random_rows(5, seed=2), np.arange(10, 15), **options)
    return [tmp_path / "a", tmp_path / "b"]


# --- merge --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_merged_values_are_those_of_the_stores_to_the_bit(tmp_path, dtype):
    paths = two(tmp_path, dtype=dtype)
    assert whence.merge(paths, tmp_path / "m") == tmp_path / "m"
    for found, one, other in zip(*map(stored, [tmp_path / "m", *paths]), strict=True):
        assert found.dtype == one.dtype
        assert found.tobytes() == one.tobytes() + other.tobytes()
    assert whence.open(tmp_path / "m").ids.tolist() == [*range(7), *range(10, 15)]
    assert whence.verify(tmp_path / "m").is_sound


def test_ids_and_columns_of_every_type_come_along(tmp_path):
    columns = {
        "truth": [True, False, True],
        "number": [-1, 2**62, 0],
        "value": [0.5, float("nan"), -0.0],
        "text": ["ü日本\n", "", "=cmd"],
    }
    fill(tmp_path / "a", random_rows(3), ["a", "b\udc80", "c" * 1000], **columns)
    fill(tmp_path / "b", random_rows(3), ["d", "e", ""], **columns)
    whence.merge([tmp_path / "a", tmp_path / "b"], tmp_path / "m")
    store = whence.open(tmp_path / "m")
    assert store.ids.tolist() == ["a", "b\udc80", "c" * 1000, "d", "e", ""]
    for name, values in columns.items():
        wanted = np.asarray(values * 2)
        assert store.columns[name].tolist() == wanted.tolist() or name == "value"
    assert store.columns["value"].tobytes() == np.array(columns["value"] * 2).tobytes()


def test_stores_of_several_writers_become_one(tmp_path):
    rows = random_rows(9)
    for number, ids in enumerate(np.array_split(np.arange(9), 3), 1):
        writer = Writer(tmp_path / "job", manifest(), f"{number}/3")
        writer.set_checkpoint(Checkpoint("0"))
        writer.append(ids, rows[ids], {})
        writer.close()
    whence.merge([tmp_path / "job"], tmp_path / "m")
    before, after = whence.open(tmp_path / "job"), whence.open(tmp_path / "m")
    assert after.ids.tolist() == before.ids.tolist() == list(range(9))
    assert after.rows().tobytes() == before.rows().tobytes()
    assert not list((tmp_path / "m").glob("writer-*"))
    Writer(tmp_path / "m", manifest()).close()  # one writer may go on


def test_a_writer_is_not_merged_twice(tmp_path):
    writer = Writer(tmp_path / "job", manifest(), "1/1")
    writer.set_checkpoint(Checkpoint("0"))
    writer.append(np.array([1]), random_rows(1), {})
    writer.close()
    paths = [tmp_path / "job", tmp_path / "job" / "writer-1-of-1"]
    with pytest.raises(
        errors.ArgumentError, match=r"paths must be distinct, got .*writer-1-of-1 t"
    ):
        whence.merge(paths, tmp_path / "m")


def test_missing_writers_are_named(tmp_path):
    writer = Writer(tmp_path / "job", manifest(), "1/2")
    writer.set_checkpoint(Checkpoint("0"))
    writer.append(np.array([1]), random_rows(1), {})
    writer.close()
    with pytest.warns(errors.MissingWritersWarning, match="without the rows of writers 2/2"):
        whence.merge([tmp_path / "job"], tmp_path / "m")


def test_checkpoints_and_columns_go_together_by_name(tmp_path):
    """Those of the second store stand in another order."""
    for path, names, order, ids in (
        ("a", "xy", ("left", "right"), [0, 1]),
        ("b", "yzx", ("right", "left"), [2, 3]),
    ):
        for name in names:
            columns = {each: [f"{each}{id_}" for id_ in ids] for each in order}
            rows = np.repeat(ord(name) + np.array(ids, np.float32)[:, None], 16, axis=1)
            fill(tmp_path / path, rows, ids, checkpoint=name, **columns)
    whence.merge([tmp_path / "a", tmp_path / "b"], tmp_path / "m")
    found = held(tmp_path / "m")
    assert whence.open(tmp_path / "m").checkpoints == ["x", "y", "z"]
    assert set(found) == {(name, id_) for name in "xy" for id_ in range(4)} | {("z", 2), ("z", 3)}
    for (name, id_), (row, columns) in found.items():
        assert np.allclose(row, ord(name) + id_)
        assert columns == {"left": f"left{id_}", "right": f"right{id_}"}


def test_what_was_deleted_is_left_behind(tmp_path):
    paths = two(tmp_path)
    whence.delete(paths[0], [2, 5])
    whence.merge(paths, tmp_path / "m")
    assert whence.open(tmp_path / "m").ids.tolist() == [0, 1, 3, 4, 6, *range(10, 15)]
    unit = np.load(min(paths[0].glob("shard-*")) / "rows.npy")[2]
    assert all(unit.tobytes() not in each for each in content(tmp_path / "m").values())
    assert not list((tmp_path / "m").glob("gone-*"))


def test_an_id_of_two_stores_is_refused_or_taken_from_the_first(tmp_path):
    fill(tmp_path / "a", random_rows(4, seed=1), [0, 1, 2, 3])
    fill(tmp_path / "b", random_rows(4, seed=2), [5, 3, 4, 0], parts=2)
    paths = [tmp_path / "b", tmp_path / "a"]
    with pytest.raises(errors.IdError, match=r"at checkpoint '0', got 0 of .*b and of .*a;"):
        whence.merge(paths, tmp_path / "m")
    assert not (tmp_path / "m").exists()
    whence.merge(paths, tmp_path / "m", on_duplicate="first")
    found, first, second = (held(path) for path in (tmp_path / "m", *paths))
    assert found == second | first
    assert whence.open(tmp_path / "m").ids.tolist() == [5, 3, 4, 0, 1, 2]


def test_writers_that_recorded_the_same_id_can_be_merged(tmp_path):
    for number in (1, 2):
        writer = Writer(tmp_path / "job", manifest(), f"{number}/2")
        writer.set_checkpoint(Checkpoint("0"))
        writer.append(np.array([number, 7]), random_rows(2, seed=number), {})
        writer.close()
    with pytest.raises(errors.IdError, match="got 7 of writer-1-of-2 and of writer-2-of-2"):
        whence.open(tmp_path / "job")
    whence.merge([tmp_path / "job"], tmp_path / "m", on_duplicate="first")
    store = whence.open(tmp_path / "m")
    assert store.ids.tolist() == [1, 7, 2]
    wanted = np.concatenate([random_rows(2, seed=1), random_rows(2, seed=2)[:1]])
    assert np.allclose(store.rows(), wanted, rtol=1e-6)


def test_an_id_at_two_checkpoints_is_no_duplicate(tmp_path):
    fill(tmp_path / "a", random_rows(3, seed=1), checkpoint="0")
    fill(tmp_path / "b", random_rows(3, seed=2), checkpoint="1")
    whence.merge([tmp_path / "a", tmp_path / "b"], tmp_path / "m")
    assert held(tmp_path / "m") == held(tmp_path / "a") | held(tmp_path / "b")


def _store(path, change=lambda found: None, rate=None, columns=None, first=None, ids=(5, 6)):
    wanted = manifest()
    change(wanted)
    writer = Writer(path, wanted)
    writer.set_checkpoint(Checkpoint("0", rate, first=first))
    columns = columns or {"label": np.array([1, 2])}
    writer.append(np.array(ids), random_rows(2, wanted.dim), columns)
    writer.close()


@pytest.mark.parametrize(
    ("what", "options"),
    [
        ("sketch", {"change": lambda found: found.sketch.update(seed=7)}),
        ("sketch", {"change": lambda found: found.sketch.update(dim=8)}),
        ("dtype", {"change": lambda found: setattr(found, "dtype", "float16")}),
        ("reduction", {"change": lambda found: setattr(found, "reduction", "sum")}),
        ("model", {"change": lambda found: found.model.update(digest="other")}),
        ("ids", {"ids": ("a", "b")}),
        ("columns", {"columns": {"label": np.array([1.0, 2.0])}}),
        ("columns", {"columns": {"other": np.array([1, 2])}}),
        ("learning_rate", {"rate": 0.1}),
        ("weights", {"first": "other"}),
    ],
)
def test_stores_that_differ_are_refused(tmp_path, what, options):
    _store(tmp_path / "a", first="one", ids=(1, 2))
    _store(tmp_path / "b", **{"first": "one", **options})
    with pytest.raises(errors.MismatchError, match=f"{what} must be the same for all stores that"):
        whence.merge([tmp_path / "a", tmp_path / "b"], tmp_path / "m")
    assert not (tmp_path / "m").exists()


def test_only_what_differs_is_shown(tmp_path):
    def change(seed):
        return lambda found: found.sketch.update(long="x" * 200, seed=seed)

    _store(tmp_path / "a", change(7), ids=(1, 2))
    _store(tmp_path / "b", change(8))
    with pytest.raises(errors.MismatchError, match=r"got {'seed': 7} in .*a and {'seed': 8} in"):
        whence.merge([tmp_path / "a", tmp_path / "b"], tmp_path / "m")


def test_sums_and_rows_of_their_own_do_not_mix(tmp_path):
    fill(tmp_path / "a", random_rows(2))
    writer = Writer(tmp_path / "b", replace(manifest(), rows=COMBINED))
    writer.manifest.checkpoints += [Checkpoint("0", weight=1.0)]
    writer.touch()
    writer.close()
    with pytest.raises(errors.MismatchError, match="rows must be the same"):
        whence.merge([tmp_path / "a", tmp_path / "b"], tmp_path / "m")


@pytest.mark.parametrize("name", ["rows.npy", "scales.npy", "ids.npy", "column-0.npy"])
def test_a_damaged_block_is_found_on_the_way(tmp_path, name):
    paths = [tmp_path / "a", tmp_path / "b"]
    for first, path in enumerate(paths):
        fill(path, random_rows(4), 10 * first + np.arange(4), label=np.arange(4))
    file = next(paths[1].rglob(name))
    sound = file.read_bytes()
    file.write_bytes(sound[:-1] + bytes([sound[-1] ^ 1]))
    with pytest.raises(errors.StoreError, match=f"{name} is damaged: block 0"):
        whence.merge(paths, tmp_path / "m")
    with pytest.raises(errors.StoreError, match=r"nothing was ever confirmed|does not exist"):
        whence.open(tmp_path / "m")
    assert not (tmp_path / "m").exists() or content(tmp_path / "m") == {}
    file.write_bytes(sound)
    whence.merge(paths, tmp_path / "m")
    assert len(whence.open(tmp_path / "m")) == 8


def test_an_interrupted_merge_leaves_nothing(tmp_path, monkeypatch):
    paths = two(tmp_path)

    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Manifest, "save", interrupted)
        with pytest.raises(KeyboardInterrupt):
            whence.merge(paths, tmp_path / "m")
    assert content(tmp_path / "m") == {}
    whence.merge(paths, tmp_path / "m")
    assert len(whence.open(tmp_path / "m")) == 12


def test_a_merge_whose_manifest_appeared_is_done(tmp_path, monkeypatch):
    paths, save = two(tmp_path), Manifest.save

    def interrupted(self, folder, number):
        save(self, folder, number)
        raise KeyboardInterrupt

    monkeypatch.setattr(Manifest, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        whence.merge(paths, tmp_path / "m")
    assert len(whence.open(tmp_path / "m")) == 12
    assert whence.verify(tmp_path / "m").is_sound


def test_a_full_disk_is_an_error_and_leaves_nothing(tmp_path, monkeypatch):
    paths = two(tmp_path)

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("whence.store.files.sync", full)
        with pytest.raises(errors.StoreError, match="No space left"):
            whence.merge(paths, tmp_path / "m")
    assert content(tmp_path / "m") == {}


KILLED = """
    import os, signal, sys
    sys.path.insert(0, {tests!r})
    import whence
    from whence.store import new, shards
    new.SHARD_BYTES = 1
    at, steps = int(sys.argv[1]), 0
    def killed(code):
        def step(*arguments, **named):
            global steps
            steps += 1
            if steps == at:
                os.kill(os.getpid(), signal.SIGKILL)
            return code(*arguments, **named)
        return step
    for name in ("mkdir", "fsync", "rename", "replace", "open"):
        setattr(os, name, killed(getattr(os, name)))
    whence.merge(sys.argv[2:4], sys.argv[4])
"""


def test_a_killed_merge_is_no_store_or_whole_and_is_taken_up_again(tmp_path):
    paths = two(tmp_path)
    wanted = held(paths[0]) | held(paths[1])
    code = textwrap.dedent(KILLED.format(tests=str(tmp_path)))
    outcomes = set()
    for at in (1, 2, 4, 7, 10, 13, 20, 30, 45, 10_000):
        out = tmp_path / f"m{at}"
        done = subprocess.run(
            [sys.executable, "-c", code, str(at), *map(str, paths), str(out)],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == (0 if at == 10_000 else -signal.SIGKILL), done.stderr
        if Manifest.exists(out):
            outcomes.add("whole")
        else:
            outcomes.add("nothing" if not list(out.glob("shard-*")) else "begun")
            with pytest.raises(errors.StoreError):
                whence.open(out)
            whence.merge(paths, out)
        assert held(out) == wanted
        assert whence.verify(out).leftovers == []
    assert outcomes == {"nothing", "begun", "whole"}


def test_out_must_be_new(tmp_path):
    paths = two(tmp_path)
    (tmp_path / "file").write_text("x")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("x")
    lost = shutil.copytree(paths[0], tmp_path / "lost")
    for each in [*lost.glob("manifest-*"), *lost.glob("committed-*")]:
        each.unlink()
    before = content(tmp_path)
    for out, what in (
        ("a", "the store"),
        ("file", "the file"),
        ("full", r".* with 'thesis\.txt' in it"),
        ("lost", r".* with 'shard-00000001' in it"),
    ):
        with pytest.raises(errors.StoreError, match=f"out must be a new folder, got {what}"):
            whence.merge(paths, tmp_path / out)
    assert content(tmp_path) == before
    assert not (tmp_path / "full" / "lock").exists()


def test_an_empty_folder_is_new(tmp_path):
    (tmp_path / "m").mkdir()
    whence.merge(two(tmp_path), tmp_path / "m")
    assert len(whence.open(tmp_path / "m")) == 12


def test_two_merges_into_one_folder_are_refused(tmp_path):
    paths = two(tmp_path)
    with (
        new.NewStore("out", tmp_path / "m", Manifest.load(paths[0])[0]),
        pytest.raises(errors.LockedError, match="must have one writer"),
    ):
        whence.merge(paths, tmp_path / "m")
    assert content(tmp_path / "m") == {}


@pytest.mark.parametrize(
    ("paths", "error", "match"),
    [
        ("a", errors.DtypeError, "paths must be a non-empty list of paths, got"),
        ([], errors.DtypeError, "paths must be a non-empty list of paths"),
        ([3], errors.DtypeError, r"paths\[0\] must be a path"),
        (["a", "./a"], errors.ArgumentError, r"paths must be distinct, got .*a twice"),
        (["a", "nowhere"], errors.StoreError, "nowhere, which does not exist"),
    ],
)
def test_other_paths_are_refused(tmp_path, monkeypatch, paths, error, match):
    two(tmp_path)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error, match=match):
        whence.merge(paths, "m")
    with pytest.raises(errors.ArgumentError, match="on_duplicate must be one of error, first"):
        whence.merge(["a"], "m", on_duplicate="last")
    assert not (tmp_path / "m").exists()


def test_examples_that_were_left_out_are_noted_unless_another_store_has_them(tmp_path):
    for path, ids, left_out in (("a", [0, 1], [7, 8]), ("b", [7, 3], [8, 9])):
        writer = Writer(tmp_path / path, manifest())
        writer.set_checkpoint(Checkpoint("0"))
        writer.append(np.array(ids), random_rows(2), {})
        writer.skip(np.array(left_out))
        writer.close()
    whence.merge([tmp_path / "a", tmp_path / "b"], tmp_path / "m")
    assert whence.open(tmp_path / "m").skipped == [("0", 8), ("0", 9)]


def test_the_error_of_quantised_rows_is_the_mean_over_all(tmp_path):
    paths = two(tmp_path, dtype="int4")
    whence.merge(paths, tmp_path / "m")
    one, other = (whence.open(path).quantisation_error for path in paths)
    found = whence.open(tmp_path / "m").quantisation_error
    assert found == pytest.approx((7 * one + 5 * other) / 12)


def test_small_shards_are_joined_and_full_ones_are_not(tmp_path, monkeypatch):
    fill(tmp_path / "a", random_rows(40), parts=40)
    whence.merge([tmp_path / "a"], tmp_path / "m")
    assert len(list((tmp_path / "m").glob("shard-*"))) == 1
    monkeypatch.setattr(new, "SHARD_BYTES", 10 * (16 * 4 + 4 + 8))
    whence.merge([tmp_path / "a"], tmp_path / "n")
    assert len(list((tmp_path / "n").glob("shard-*"))) == 4
    assert held(tmp_path / "m") == held(tmp_path / "n") == held(tmp_path / "a")


def test_rows_are_not_all_in_memory_at_once(tmp_path):
    rows = random_rows(6000, 2048)
    for name, first in (("a", 0), ("b", 6000)):
        fill(tmp_path / name, rows, np.arange(first, first + 6000))
    tracemalloc.start()
    whence.merge([tmp_path / "a", tmp_path / "b"], tmp_path / "m")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < rows.nbytes / 2
    assert whence.verify(tmp_path / "m").is_sound


@settings(max_examples=15, deadline=None)
@given(st.data())
def test_a_merged_store_is_the_union(tmp_path_factory, data):
    path, wanted, paths = tmp_path_factory.mktemp("union"), {}, []
    ids = iter(np.random.default_rng(0).permutation(1000))
    for store in range(data.draw(st.integers(1, 4), "stores")):
        paths.append(path / str(store))
        for step in range(data.draw(st.integers(1, 3), "steps")):
            count = data.draw(st.integers(1, 6), "rows")
            chosen = np.array([next(ids) for _ in range(count)])
            name = data.draw(st.sampled_from(["x", "y", "z"]), "checkpoint")
            rows = random_rows(count, seed=100 * store + step)
            fill(paths[-1], rows, chosen, checkpoint=name, label=chosen % 3)
            parts = data.draw(st.integers(0, count), "deleted")
            if parts:
                whence.delete(paths[-1], chosen[:parts])
        wanted |= held(paths[-1])
    whence.merge(paths, path / "m")
    assert held(path / "m") == wanted


def trained():
    """A model, its inputs, and factors of its loss."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.Tanh(), torch.nn.Linear(5, 2))
    x = torch.randn(9, 4)
    return model, x


def precondition(model, x, factors, path, ids, **options):
    """Records preconditioned rows of some examples."""
    options = {"precondition": factors, "dtype": "int8", **options}
    with whence.record(model, path, **options) as rec, rec.batch(ids):
        model(x[ids]).square().sum(1).mean().backward()


def fitted(model, x, **options):
    def loss(part):
        return model(part).square().sum(1).mean()

    options = {"labels": "empirical", "progress": False, **options}
    return whence.fit_factors(model, [(x,)], loss, **options)


def test_maps_of_preconditioned_rows_come_along(tmp_path):
    model, x = trained()
    factors = fitted(model, x, sample=9)
    for path, ids in (("whole", range(9)), ("a", range(5)), ("b", range(5, 9))):
        precondition(model, x, factors, tmp_path / path, list(ids), dim=6)
    whence.merge([tmp_path / "a", tmp_path / "b"], tmp_path / "m")
    maps = [content(next((tmp_path / path).glob("map-*"))) for path in ("a", "m")]
    assert maps[0] == maps[1]
    assert len(maps[0]) > 3
    shutil.rmtree(tmp_path / "a")
    hits = [
        whence.query(model, tmp_path / path, lambda: model(x[:2]).square().sum(1).mean(), k=9)
        for path in ("whole", "m")
    ]
    assert hits[0].helpful.ids.tolist() == hits[1].helpful.ids.tolist()
    assert np.allclose(hits[0].helpful.scores, hits[1].helpful.scores, rtol=1e-5)
    assert whence.verify(tmp_path / "m").is_sound


def test_rows_of_other_factors_are_refused(tmp_path):
    model, x = trained()
    for path, ids, seen in (("a", range(5), x), ("b", range(5, 9), x[:6])):
        precondition(model, x, fitted(model, seen), tmp_path / path, list(ids), rotate=False)
    with pytest.raises(errors.MismatchError, match="map must be the same for all stores"):
        whence.merge([tmp_path / "a", tmp_path / "b"], tmp_path / "m")


# --- split --------------------------------------------------------------------------------------


def test_each_new_store_has_what_passes_its_filter(tmp_path):
    rows, label = random_rows(12), np.arange(12) % 3
    fill(tmp_path / "s", rows, parts=5, label=label)
    before = content(tmp_path / "s")
    half = np.arange(12) < 6
    found = whence.split(
        tmp_path / "s",
        {
            tmp_path / "some": {"label": [0, 2]},
            str(tmp_path / "few"): [9, 1, 4],
            tmp_path / "half": half,
        },
    )
    assert found == [tmp_path / name for name in ("some", "few", "half")]
    for path, chosen in zip(
        found, (label != 1, np.isin(np.arange(12), [1, 4, 9]), half), strict=True
    ):
        store = whence.open(path)
        assert store.ids.tolist() == np.flatnonzero(chosen).tolist()
        assert store.columns["label"].tolist() == label[chosen].tolist()
        assert np.allclose(store.rows(), rows[chosen], rtol=1e-6)
        assert whence.verify(path).is_sound
    assert content(tmp_path / "s") == before


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_split_and_merged_is_the_same_to_the_bit(tmp_path, dtype):
    ids = [f"id {number}" for number in range(20)]
    fill(tmp_path / "s", random_rows(20), ids, parts=3, dtype=dtype)
    whence.split(tmp_path / "s", {tmp_path / "a": ids[:7], tmp_path / "b": ids[7:]})
    whence.merge([tmp_path / "a", tmp_path / "b"], tmp_path / "m")
    for found, wanted in zip(stored(tmp_path / "m"), stored(tmp_path / "s"), strict=True):
        assert found.tobytes() == wanted.tobytes()
    assert whence.open(tmp_path / "m").ids.tolist() == ids


def test_an_example_keeps_its_rows_of_all_checkpoints(tmp_path):
    for name in ("x", "y"):
        fill(tmp_path / "s", random_rows(4, seed=ord(name)), checkpoint=name)
    fill(tmp_path / "s", random_rows(2), [10, 11], checkpoint="y")
    whence.delete(tmp_path / "s", [2])
    whence.split(tmp_path / "s", {tmp_path / "a": [1, 10], tmp_path / "b": [0, 3, 11]})
    assert held(tmp_path / "a") | held(tmp_path / "b") == held(tmp_path / "s")
    assert set(held(tmp_path / "a")) == {("x", 1), ("y", 1), ("y", 10)}


def test_a_store_of_several_writers_is_split(tmp_path):
    for number in (1, 2):
        writer = Writer(tmp_path / "job", manifest(), f"{number}/2")
        writer.set_checkpoint(Checkpoint("0"))
        writer.append(np.arange(3) + 10 * number, random_rows(3, seed=number), {})
        writer.close()
    whence.split(tmp_path / "job", {tmp_path / "a": [11, 22]})
    store = whence.open(tmp_path / "a")
    assert store.ids.tolist() == [11, 22]
    wanted = [random_rows(3, seed=1)[1], random_rows(3, seed=2)[2]]
    assert np.allclose(store.rows(), wanted, rtol=1e-6)


def test_none_of_the_new_stores_appears_if_one_cannot(tmp_path, monkeypatch):
    fill(tmp_path / "s", random_rows(6))
    into = {tmp_path / "a": [0, 1], tmp_path / "b": [2, 3]}
    finish, calls = ShardWriter.finish, []

    def fails(self, *arguments):
        calls.append(self)
        if len(calls) == 2:
            raise errors.StoreError("no space")
        return finish(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(ShardWriter, "finish", fails)
        with pytest.raises(errors.StoreError, match="no space"):
            whence.split(tmp_path / "s", into)
    assert content(tmp_path / "a") == content(tmp_path / "b") == {}
    whence.split(tmp_path / "s", into)


@pytest.mark.parametrize("error", LATE, ids=["interrupt", "error"])
def test_none_of_the_new_stores_stays_if_the_last_ends_in_an_error(tmp_path, monkeypatch, error):
    fill(tmp_path / "s", random_rows(6))
    into = {tmp_path / "a": [0, 1], tmp_path / "b": [2, 3]}
    save = Manifest.save

    def failing(self, folder, number):
        save(self, folder, number)
        if folder == tmp_path / "b":
            raise error

    with monkeypatch.context() as patch:
        patch.setattr(Manifest, "save", failing)
        with pytest.raises(type(error)):
            whence.split(tmp_path / "s", into)
    assert content(tmp_path / "a") == content(tmp_path / "b") == {}
    whence.split(tmp_path / "s", into)


def test_none_of_the_new_stores_stays_if_there_is_room_for_nothing_more(tmp_path, monkeypatch):
    fill(tmp_path / "s", random_rows(6))
    save = Manifest.save

    def full(*_):
        raise errors.StoreError("no space")

    def failing(self, folder, number):
        if folder == tmp_path / "b":
            monkeypatch.setattr("whence.store.new.mark", full)
            raise errors.StoreError("no space")
        save(self, folder, number)

    monkeypatch.setattr(Manifest, "save", failing)
    with pytest.raises(errors.StoreError, match="no space"):
        whence.split(tmp_path / "s", {tmp_path / "a": [0, 1], tmp_path / "b": [2, 3]})
    assert not (tmp_path / "a").exists()
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize(
    ("into", "error", "match"),
    [
        ([1, 2], errors.DtypeError, "into must be a non-empty dict of folder to filter, got"),
        ({}, errors.DtypeError, "into must be a non-empty dict"),
        ({"a": {"label": 9}}, errors.ArgumentError, r"into\['a'\] must let an example pass"),
        ({"a": []}, errors.ArgumentError, "must let an example pass"),
        ({"a": [99]}, errors.IdError, r"into\['a'\] must be in the store, got 99"),
        ({"a": {"other": 1}}, errors.ArgumentError, r"into\['a'\] must name columns"),
        ({"a": {"label": "x"}}, errors.DtypeError, r"into\['a'\]\['label'\] must be int64"),
        ({"a": [1], "s": [2]}, errors.StoreError, r"into\['.*s'\] must be a new folder, got the"),
        ({"a": [1], "./a": [2]}, errors.ArgumentError, "into must name distinct folders, got"),
        ({3: [1]}, errors.DtypeError, "into must be a path"),
    ],
)
def test_what_cannot_be_split_is_named_and_nothing_made(tmp_path, monkeypatch, into, error, match):
    fill(tmp_path / "s", random_rows(3), label=[0, 1, 2])
    monkeypatch.chdir(tmp_path)
    before = content(tmp_path)
    with pytest.raises(error, match=match):
        whence.split("s", into)
    assert content(tmp_path) == before


def test_notes_of_examples_that_were_left_out_follow_them(tmp_path):
    fill(tmp_path / "s", random_rows(4), checkpoint="0")
    writer = Writer(tmp_path / "s", manifest())
    writer.set_checkpoint(Checkpoint("1"))
    writer.skip(np.array([1, 2, 9]))
    writer.close()
    whence.split(tmp_path / "s", {tmp_path / "a": [0, 1], tmp_path / "b": [2, 3]})
    assert whence.open(tmp_path / "a").skipped == [("1", 1)]
    assert whence.open(tmp_path / "b").skipped == [("1", 2)]


def test_a_skipped_id_of_another_kind_is_refused(tmp_path):
    fill(tmp_path / "s", random_rows(2))
    newest = max((tmp_path / "s").glob("manifest-*.json"))
    body = json.loads(newest.read_text().splitlines()[0])
    body["skipped"] = [[0, ["x"]]]
    newest.write_bytes(json_bytes(body))
    with pytest.raises(errors.StoreError, match="skipped ids must be int64"):
        whence.open(tmp_path / "s")
