"""The store on disk: what is confirmed is there, what is damaged is refused."""

import contextlib
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import warnings
import zlib
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from filled import LATE, appears_and_fails, fill, manifest, random_rows
from hypothesis import given, settings
from hypothesis import strategies as st

import whence
from whence import errors
from whence._background import Background
from whence.store import Checkpoint, Manifest, Writer, files
from whence.store.files import NewFile
from whence.store.shards import ShardWriter


def test_rows_are_plain_npy_beside_their_scales(tmp_path):
    rows = random_rows(20)
    fill(tmp_path / "s", rows, dtype="float16", parts=2)
    found = []
    for shard in sorted((tmp_path / "s").glob("shard-*")):
        unit, scales = np.load(shard / "rows.npy"), np.load(shard / "scales.npy")
        assert (unit.dtype, scales.dtype) == (np.float16, np.float32)
        found.append(unit.astype(np.float32) * scales[:, None])
    assert np.allclose(np.concatenate(found), rows, rtol=2e-3, atol=1e-4 * np.abs(rows).max())


def test_appending_goes_on_after_reopening(tmp_path):
    rows = random_rows(20)
    fill(tmp_path / "s", rows[:8])
    store = fill(tmp_path / "s", rows[8:], ids=np.arange(8, 20))
    assert store.ids.tolist() == list(range(20))
    assert np.allclose(store.rows(), rows, rtol=1e-6)
    assert np.allclose(store.rows(np.array([13, 2])), rows[[13, 2]], rtol=1e-6)
    assert np.allclose(store.norms(), np.linalg.norm(rows, axis=1), rtol=1e-6)


def test_a_reader_keeps_its_snapshot_while_rows_are_added(tmp_path):
    before = fill(tmp_path / "s", random_rows(5))
    assert fill(tmp_path / "s", random_rows(5), ids=np.arange(5, 10)).ids.tolist() == list(
        range(10)
    )
    assert before.ids.tolist() == list(range(5))
    assert before.search(random_rows(1), k=99).helpful.ids.shape == (1, 5)


def test_what_was_not_committed_is_not_there(tmp_path):
    fill(tmp_path / "s", random_rows(5))
    writer = Writer(tmp_path / "s", manifest())
    writer.append(np.array([7]), random_rows(1), {})
    assert whence.open(tmp_path / "s").ids.tolist() == list(range(5))
    assert writer.has(np.array([7, 8])).tolist() == [True, False]
    writer.close()
    assert whence.open(tmp_path / "s").ids.tolist() == [0, 1, 2, 3, 4, 7]


def test_a_failed_commit_is_an_error_and_loses_nothing(tmp_path, monkeypatch):
    fill(tmp_path / "s", random_rows(5))
    writer = Writer(tmp_path / "s", manifest())
    writer.append(np.array([7]), random_rows(1), {})

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("whence.store.files.sync", full)
        with pytest.raises(errors.StoreError, match="No space left"):
            writer.commit()
        assert whence.open(tmp_path / "s").ids.tolist() == list(range(5))
    writer.commit()
    assert whence.open(tmp_path / "s").ids.tolist() == [0, 1, 2, 3, 4, 7]
    writer.close()


def test_what_a_killed_writer_left_is_never_read_or_reused(tmp_path):
    fill(tmp_path / "s", random_rows(5))
    stray = tmp_path / "s" / "shard-00000002"
    stray.mkdir()
    (stray / "rows.npy").write_bytes(b"half")
    (tmp_path / "s" / "manifest-00000009.part").write_bytes(b"{")
    store = fill(tmp_path / "s", random_rows(3), ids=[10, 11, 12])
    assert store.ids.tolist() == [0, 1, 2, 3, 4, 10, 11, 12]
    assert (stray / "rows.npy").read_bytes() == b"half"


def test_rows_whose_manifest_is_lost_are_not_written_over(tmp_path):
    fill(tmp_path / "s", random_rows(6), parts=3)
    for path in [*(tmp_path / "s").glob("manifest-*"), *(tmp_path / "s").glob("committed-*")]:
        path.unlink()
    with pytest.raises(errors.StoreError, match="rows that no manifest names"):
        Writer(tmp_path / "s", manifest())
    assert len(list((tmp_path / "s").glob("shard-*"))) == 3


@pytest.mark.parametrize("moment", ["before", "after"])
def test_an_interrupted_commit_is_neither_lost_nor_done_twice(tmp_path, monkeypatch, moment):
    fill(tmp_path / "s", random_rows(5))
    writer = Writer(tmp_path / "s", manifest())
    writer.append(np.array([7]), random_rows(1), {})
    save = Manifest.save

    def interrupted(self, folder, number):
        if moment == "after":
            save(self, folder, number)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Manifest, "save", interrupted)
        with pytest.raises(KeyboardInterrupt):
            writer.commit()
    writer.append(np.array([8]), random_rows(1), {})
    writer.close()
    assert whence.open(tmp_path / "s").ids.tolist() == [0, 1, 2, 3, 4, 7, 8]


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@settings(max_examples=30, deadline=None)
@given(steps=st.lists(st.sampled_from([1, 2, 5, "commit", "fail", "lost answer"]), max_size=25))
def test_waiting_rows_stay_what_they_were(tmp_path_factory, dtype, steps):
    path, wanted = tmp_path_factory.mktemp("store") / "s", []
    with mock.patch("whence.store.writer.SHARD_BYTES", 400):  # six rows of 16 floats and some
        writer = Writer(path, manifest(dim=16, dtype=dtype))
        writer.set_checkpoint(Checkpoint("0"))
        for step in steps:
            if step == "commit":
                writer.commit()
            elif step in ("fail", "lost answer"):
                # Before the manifest appears, or after: the caller sees an error in both.
                name = "replace" if step == "fail" else "settle"
                owner = Path if step == "fail" else Manifest
                broken = mock.patch.object(owner, name, side_effect=OSError(28, "full"))
                with broken, contextlib.suppress(OSError, errors.StoreError):
                    writer.commit()
            else:
                rows = random_rows(step, 16, seed=len(wanted))
                with contextlib.suppress(OSError, errors.StoreError):
                    writer.append(np.arange(len(wanted), len(wanted) + step), rows, {})
                wanted += list(rows)
        writer.close()
    if wanted:
        assert np.allclose(whence.open(path).rows(), wanted, rtol=2e-3, atol=1e-2)


def test_columns_keep_their_names_in_any_order(tmp_path):
    writer = Writer(tmp_path / "s", manifest())
    writer.set_checkpoint(Checkpoint("0"))
    for id_, columns in ((0, {"a": ["a0"], "b": ["b0"]}), (1, {"b": ["b1"], "a": ["a1"]})):
        arrays = {name: np.array(value, object) for name, value in columns.items()}
        writer.append(np.array([id_]), random_rows(1), writer.check_columns(arrays))
        writer.commit()
    writer.close()
    store = whence.open(tmp_path / "s")
    assert store.columns["a"].tolist() == ["a0", "a1"]
    assert store.columns["b"].tolist() == ["b0", "b1"]


def test_a_relative_path_does_not_move_with_the_process(tmp_path, monkeypatch):
    fill(tmp_path / "s", random_rows(4))
    monkeypatch.chdir(tmp_path)
    store = whence.open("s")
    monkeypatch.chdir("/")
    assert store.search(random_rows(1)).helpful.ids.shape == (1, 4)


@settings(max_examples=25, deadline=None)
@given(
    st.lists(
        st.tuples(st.text(max_size=6).filter(lambda text: "\0" not in text), st.floats(-1e9, 1e9)),
        min_size=1,
        max_size=20,
        unique_by=lambda pair: pair[0],
    )
)
def test_any_text_comes_back(tmp_path_factory, pairs):
    ids = np.array([text for text, _ in pairs], np.str_)
    values = np.array([value for _, value in pairs])
    store = fill(
        tmp_path_factory.mktemp("t") / "s", random_rows(len(ids)), ids=ids, value=values, text=ids
    )
    assert store.ids.tolist() == [text for text, _ in pairs]
    assert store.columns["text"].tolist() == store.ids.tolist()
    assert store.columns["value"].tolist() == values.tolist()


def use(path):
    """Reads everything of a store."""
    store = whence.open(path)
    store.search(np.ones((1, store.dim), np.float32), k=3)
    return store.ids.tolist(), {k: v.tolist() for k, v in store.columns.items()}, store.scales


def test_damage_to_metadata_is_an_error_that_names_the_file(tmp_path):
    fill(tmp_path / "s", random_rows(6), ids=list("abcdef"), label=np.arange(6))
    files = [p for p in (tmp_path / "s").rglob("*") if p.is_file() and p.stat().st_size]
    generator = np.random.default_rng(0)
    for path in files:
        if path.name in ("lock", "rows.npy") or "00000001.json" in path.name:
            continue
        original = path.read_bytes()
        for _ in range(20):
            at, bit = generator.integers(len(original)), 1 << generator.integers(8)
            path.write_bytes(original[:at] + bytes([original[at] ^ bit]) + original[at + 1 :])
            with pytest.raises(errors.StoreError, match=path.name):
                use(tmp_path / "s")
        for length in (0, len(original) // 2, len(original) - 1):
            path.write_bytes(original[:length])
            with pytest.raises(errors.StoreError, match=path.name):
                use(tmp_path / "s")
        path.unlink()
        if not path.name.startswith("manifest"):
            with pytest.raises(errors.StoreError, match=path.name):
                use(tmp_path / "s")
        path.write_bytes(original)
    use(tmp_path / "s")


def test_rows_of_another_length_or_type_are_refused(tmp_path):
    fill(tmp_path / "s", random_rows(6))
    path = next((tmp_path / "s").rglob("rows.npy"))
    original = path.read_bytes()
    for content in (
        original[:-1],
        original + b"\0",
        b"",
        original[:40],
        b"\x93NUMPY\x09" + original,
    ):
        path.write_bytes(content)
        with pytest.raises(errors.StoreError, match=r"rows\.npy"):
            use(tmp_path / "s")
    np.save(path, np.zeros((6, 16), np.float64))
    with pytest.raises(errors.StoreError, match="must be 512 bytes long, got 896"):
        use(tmp_path / "s")


def rewrite(path, change):
    """Changes a manifest and makes its checksum fit."""
    newest = max(path.glob("manifest-*.json"))
    body = json.loads(newest.read_text().splitlines()[0])
    change(body)
    text = json.dumps(body).encode()
    newest.write_bytes(text + f"\n{zlib.crc32(text):08x}\n".encode())


def rewrite_shard(path, number, change):
    """Changes what describes a shard, and makes its checksums fit."""
    folder = path / f"shard-{number:08}"
    body = json.loads((folder / "shard.json").read_text().splitlines()[0])
    change(body)
    text = json.dumps(body).encode()
    text += f"\n{zlib.crc32(text):08x}\n".encode()
    (folder / "shard.json").write_bytes(text)

    def vouch(manifest_):
        for entry in manifest_["shards"]:
            if entry[0] == folder.name:
                entry[3:] = [len(text), f"{zlib.crc32(text):08x}"]

    rewrite(path, vouch)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda body: body.update(version=99), "version must be 1, got 99"),
        (lambda body: body.update(format="x"), "format"),
        (lambda body: body["shards"][0].__setitem__(0, "../../etc"), "a shard's name"),
        (lambda body: body["shards"][0].__setitem__(2, 10**15), "1000000000000000 rows"),
        (lambda body: body["shards"][0].__setitem__(2, -1), "rows"),
        (lambda body: body["shards"][0].__setitem__(1, 7), "checkpoint"),
        (lambda body: body["shards"][0].__setitem__(4, ""), "checksum"),
        (lambda body: body.update(requires=["delta"]), "requires must be .* got 'delta'"),
        (lambda body: body.update(number=7), "number must be 1"),
        (lambda body: body.update(dtype="complex"), "dtype"),
        (lambda body: body["sketch"].update(dim=2**62), "rows must be from 1"),
        (lambda body: body.pop("sketch"), "sketch"),
        (lambda body: body["sketch"].pop("kind"), "sketch must say its kind and seed"),
        (lambda body: body["sketch"].pop("seed"), "sketch must say its kind and seed"),
        (lambda body: body.update(ids="bytes"), "ids"),
        (lambda body: body["model"].pop("digest"), "digest"),
        (lambda body: body["model"].update(parameters=[{"name": "a", "kind": "b"}]), "shape"),
        (
            lambda body: body["checkpoints"][0].update(learning_rate=10**400),
            "learning_rate must be a positive finite number",
        ),
    ],
)
def test_a_hostile_manifest_is_refused(tmp_path, change, match):
    fill(tmp_path / "s", random_rows(6))
    rewrite(tmp_path / "s", change)
    with pytest.raises(errors.StoreError, match=match):
        use(tmp_path / "s")


def test_paths_that_are_no_store_are_named(tmp_path):
    file = tmp_path / "file"
    file.write_text("x")
    full = tmp_path / "full"
    full.mkdir()
    (full / "thesis.txt").write_text("x")
    with pytest.raises(errors.StoreError, match="does not exist"):
        whence.open(tmp_path / "nowhere")
    with pytest.raises(errors.StoreError, match="got the file"):
        whence.open(file)
    with pytest.raises(errors.StoreError, match="no manifest"):
        whence.open(full)
    with pytest.raises(errors.StoreError, match="got the file"):
        Writer(file, manifest())
    with pytest.raises(errors.StoreError, match=r"thesis\.txt"):
        Writer(full, manifest())
    with pytest.raises(errors.StoreError):
        Writer(file / "inside", manifest())


def test_paths_with_spaces_and_other_letters_work(tmp_path):
    store = fill(tmp_path / "ein Lauf ü 日本", random_rows(4))
    assert store.search(random_rows(1)).helpful.ids.shape == (1, 4)


def test_a_read_only_copy_can_be_read(tmp_path):
    fill(tmp_path / "s", random_rows(4))
    copy = shutil.copytree(tmp_path / "s", tmp_path / "copy")
    for path in [*copy.rglob("*"), copy]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    try:
        assert len(use(copy)[0]) == 4
    finally:
        for path in [copy, *copy.rglob("*")]:
            path.chmod(0o755)


def test_old_manifests_are_cleared_but_for_a_few(tmp_path):
    fill(tmp_path / "s", random_rows(20), parts=10)
    assert 1 <= len(list((tmp_path / "s").glob("manifest-*.json"))) <= 4
    assert Manifest.load(tmp_path / "s")[1] == 10


def test_rows_written_ahead_are_those_of_one_commit(tmp_path, monkeypatch):
    rows = random_rows(90)
    fill(tmp_path / "at once", rows)
    monkeypatch.setattr("whence.store.writer.AHEAD_BYTES", 256)
    writer = Writer(tmp_path / "ahead", manifest())
    writer.set_checkpoint(Checkpoint("0"))
    for first in range(0, 90, 3):
        writer.append(np.arange(first, first + 3), rows[first : first + 3], {})
    writer.close()
    one, other = (
        {each.name: each.read_bytes() for each in (tmp_path / name / "shard-00000001").iterdir()}
        for name in ("at once", "ahead")
    )
    assert one == other


def test_rows_that_could_not_be_written_ahead_are_written_by_the_commit(tmp_path, monkeypatch):
    monkeypatch.setattr("whence.store.writer.AHEAD_BYTES", 256)
    rows, append, calls = random_rows(40), ShardWriter.append, []

    def failing(shard, stored):
        calls.append(shard)
        if len(calls) == 3:
            raise errors.StoreError("no room")
        append(shard, stored)

    monkeypatch.setattr(ShardWriter, "append", failing)
    writer = Writer(tmp_path / "s", manifest())
    writer.set_checkpoint(Checkpoint("0"))
    for first in range(0, 40, 5):
        writer.append(np.arange(first, first + 5), rows[first : first + 5], {})
    writer.close()
    store = whence.open(tmp_path / "s")
    assert store.ids.tolist() == list(range(40))
    assert np.allclose(store.rows(), rows, rtol=1e-6)
    assert len(list((tmp_path / "s").glob("shard-*"))) == 1


def test_a_full_disk_leaves_no_folder_behind(tmp_path, monkeypatch):
    monkeypatch.setattr("whence.store.writer.AHEAD_BYTES", 256)

    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    writer = Writer(tmp_path / "s", manifest())
    writer.set_checkpoint(Checkpoint("0"))
    rows = random_rows(40)
    with monkeypatch.context() as patch:
        patch.setattr(NewFile, "_put", full)
        for first in range(0, 40, 5):
            writer.append(np.arange(first, first + 5), rows[first : first + 5], {})
        with pytest.raises(errors.StoreError, match="No space left"):
            writer.commit()
    assert [each.name for each in (tmp_path / "s").iterdir()] == ["lock"]
    writer.release()  # as if it were killed
    again = Writer(tmp_path / "s", manifest())
    again.set_checkpoint(Checkpoint("0"))
    again.append(np.arange(40), rows, {})
    again.close()
    assert np.allclose(whence.open(tmp_path / "s").rows(), rows, rtol=1e-6)


@pytest.mark.parametrize("error", LATE, ids=["interrupt", "error"])
def test_what_changes_after_a_commit_whose_manifest_appeared_is_kept(tmp_path, monkeypatch, error):
    writer = Writer(tmp_path / "s", manifest())
    writer.set_checkpoint(Checkpoint("0"))
    writer.append(np.arange(4), random_rows(4), {})
    appears_and_fails(monkeypatch, error)
    with pytest.raises(type(error)):
        writer.commit()
    writer.skip(np.array([77]))
    writer.close()
    store = whence.open(tmp_path / "s")
    assert store.skipped == [("0", 77)]
    assert store.ids.tolist() == [0, 1, 2, 3]


def test_a_manifest_that_could_not_be_made_durable_is_so_before_it_counts(tmp_path, monkeypatch):
    writer = Writer(tmp_path / "s", manifest())
    writer.set_checkpoint(Checkpoint("0"))
    writer.append(np.arange(4), random_rows(4), {})
    wanted, sync = Manifest.path(tmp_path / "s", 1), files.sync_directory

    def failing(path):
        if wanted.exists():
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        sync(path)

    for owner in ("whence.store.files", "whence.store.writer"):
        monkeypatch.setattr(f"{owner}.sync_directory", failing)
    for _ in range(2):
        with pytest.raises(errors.StoreError, match="Input/output"):
            writer.commit()
    monkeypatch.undo()
    writer.close()
    assert len(whence.open(tmp_path / "s")) == 4
    assert len(list((tmp_path / "s").glob("shard-*"))) == 1


@pytest.mark.parametrize("error", LATE, ids=["interrupt", "error"])
def test_what_is_written_ahead_after_a_late_failure_is_committed_once(tmp_path, monkeypatch, error):
    monkeypatch.setattr("whence.store.writer.AHEAD_BYTES", 64)
    writer, rows = Writer(tmp_path / "s", manifest()), random_rows(16)
    writer.set_checkpoint(Checkpoint("0"))
    for first in (0, 4):
        writer.append(np.arange(first, first + 4), rows[first : first + 4], {})
    appears_and_fails(monkeypatch, error)
    with pytest.raises(type(error)):
        writer.commit()
    for first in (8, 12):
        writer.append(np.arange(first, first + 4), rows[first : first + 4], {})
    writer.close()
    store = whence.open(tmp_path / "s")
    assert store.ids.tolist() == list(range(16))
    assert np.allclose(store.rows(), rows, rtol=1e-6)
    assert whence.verify(tmp_path / "s").is_sound


def test_a_folder_that_an_interrupt_has_left_is_in_nobodys_way(tmp_path):
    writer, rows = Writer(tmp_path / "s", manifest()), random_rows(4)
    writer.set_checkpoint(Checkpoint("0"))
    for number in (1, 2):
        (tmp_path / "s" / f"shard-{number:08}").mkdir()
    writer.append(np.arange(4), rows, {})
    writer.close()
    assert np.allclose(whence.open(tmp_path / "s").rows(), rows, rtol=1e-6)
    whence.compact(tmp_path / "s")
    assert [each.name for each in (tmp_path / "s").glob("shard-*")] == ["shard-00000003"]


def test_what_failed_behind_and_was_interrupted_is_written_anew(tmp_path, monkeypatch):
    monkeypatch.setattr("whence.store.writer.AHEAD_BYTES", 256)
    rows, put, drain = random_rows(12), NewFile._put, Background.drain

    def full(file, part, *, counted=True):
        if threading.current_thread() is not threading.main_thread():
            put(file, bytes(part)[:7], counted=counted)  # a part of it
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        put(file, part, counted=counted)

    def interrupted(background):
        raise KeyboardInterrupt

    def interrupted_too(background):
        drain(background)
        raise KeyboardInterrupt

    writer = Writer(tmp_path / "s", manifest())
    writer.set_checkpoint(Checkpoint("0"))
    with monkeypatch.context() as patch:
        patch.setattr(NewFile, "_put", full)
        writer.append(np.arange(8), rows[:8], {})
        patch.setattr(Background, "wait", interrupted)
        patch.setattr(Background, "drain", interrupted_too)
        with pytest.raises(KeyboardInterrupt):
            writer.commit()
    writer.append(np.arange(8, 12), rows[8:], {})
    writer.close()
    assert whence.verify(tmp_path / "s").is_sound
    assert np.allclose(whence.open(tmp_path / "s").rows(), rows, rtol=1e-6)


def test_a_shard_of_other_counts_is_refused(tmp_path):
    shard = ShardWriter(tmp_path, 1, 0, "<f4", 16)
    shard.append(random_rows(3))
    with pytest.raises(errors.StoreError, match="as many rows as scales and ids, got 3, 4 and 4"):
        shard.finish(np.ones(4, np.float32), np.arange(4), [])


def test_rows_are_committed_while_python_ends(tmp_path):
    script = """
        import atexit, sys
        import numpy as np
        from filled import manifest, random_rows
        from whence.store import Checkpoint, Writer

        writer = Writer(sys.argv[1], manifest())
        writer.set_checkpoint(Checkpoint("0"))
        atexit.register(writer.close)
        writer.append(np.arange(4), random_rows(4), {})
    """
    subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), tmp_path / "s"],
        check=True,
        cwd=Path(__file__).parent,
        timeout=120,
    )
    assert len(whence.open(tmp_path / "s")) == 4


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_killed_writers_lock_is_free_though_its_forked_child_lives(tmp_path):
    script = """
        import os, sys, time
        from filled import manifest
        from whence.store import Writer

        writer = Writer(sys.argv[1], manifest())
        if not os.fork():
            print("forked", flush=True)
            time.sleep(60)
            os._exit(0)
        time.sleep(60)
    """
    parent = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script), tmp_path / "s"],
        cwd=Path(__file__).parent,
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    try:
        assert parent.stdout.readline() == b"forked\n"
        with pytest.raises(errors.LockedError):
            Writer(tmp_path / "s", manifest())
        parent.kill()
        parent.wait()
        Writer(tmp_path / "s", manifest()).close()
    finally:
        os.killpg(parent.pid, signal.SIGKILL)
        parent.stdout.close()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_forked_child_can_neither_write_nor_let_go_of_the_store(tmp_path):
    writer = Writer(tmp_path / "s", manifest())
    writer.set_checkpoint(Checkpoint("0"))
    writer.append(np.arange(5), random_rows(5), {})
    child = os.fork()
    if child == 0:
        refused = []
        for call in (
            lambda: writer.append(np.array([9]), random_rows(1), {}),
            lambda: writer.skip(np.array([9])),
            writer.commit,
        ):
            try:
                call()
            except errors.StoreError as error:
                refused.append(f"got {os.getpid()}" in str(error))
        writer.close()
        os._exit(0 if refused == [True] * 3 else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert not list((tmp_path / "s").glob("manifest-*"))
    with pytest.raises(errors.LockedError):
        Writer(tmp_path / "s", manifest())
    writer.close()
    assert whence.open(tmp_path / "s").ids.tolist() == list(range(5))


@pytest.mark.parametrize("exchanged", ["folder", "lock"])
def test_a_writer_leaves_a_store_alone_that_lies_in_the_place_of_its_own(tmp_path, exchanged):
    writer = Writer(tmp_path / "s", manifest())
    writer.set_checkpoint(Checkpoint("0"))
    writer.append(np.arange(3), random_rows(3), {})
    writer.commit()
    writer.append(np.arange(3, 6), random_rows(3), {})
    writer._write_ahead()
    writer._background.wait()  # else its last bytes may come after `before`
    if exchanged == "folder":
        (tmp_path / "s").rename(tmp_path / "moved")
        fill(tmp_path / "s", random_rows(8), parts=2)  # with a shard of that name too
    else:
        (tmp_path / "s" / "lock").unlink()
    before = {each: each.read_bytes() for each in (tmp_path / "s").rglob("*") if each.is_file()}
    for call in (writer.commit, writer.close):
        with pytest.raises(errors.StoreError, match="must keep its lock while it is written"):
            call()
    after = {each: each.read_bytes() for each in (tmp_path / "s").rglob("*") if each.is_file()}
    assert after == before
    kept = whence.open(tmp_path / ("moved" if exchanged == "folder" else "s"))
    assert kept.ids.tolist() == [0, 1, 2]


def test_a_closed_store_says_so(tmp_path):
    rows = random_rows(4)
    fill(tmp_path / "s", rows, label=np.arange(4))
    with whence.open(tmp_path / "s", memory_map=True) as store:
        hits = store.search(rows[:1], k=2)
    assert store.closed
    assert "closed" in repr(store)
    for use in (
        lambda: store.search(rows[:1]),
        lambda: store.ids,
        lambda: store.columns["label"],
        lambda: store.rows([1]),
        lambda: len(store),
        lambda: 1 in store,
        lambda: store.self_influence(),
        lambda: store.__enter__(),
    ):
        with pytest.raises(errors.StoreError, match="store must be open, got"):
            use()
    store.close()
    assert hits.columns["label"].tolist() == [0, 1, 2, 3]


def test_closing_lets_go_of_the_rows(tmp_path):
    fill(tmp_path / "s", random_rows(4))
    store = whence.open(tmp_path / "s", memory_map=True)
    store.rows()
    core = store.core
    before = sys.getrefcount(core)
    store.close()
    assert sys.getrefcount(core) == before - 1


@pytest.mark.parametrize(
    ("ids", "others"), [([3, 5], [4, "3", True, 3.0, None, [3]]), (["a", "b"], ["c", 0])]
)
def test_an_id_is_in_the_store_or_not(tmp_path, ids, others):
    store = fill(tmp_path / "s", random_rows(2), ids)
    assert all(id_ in store for id_ in ids)
    assert np.array(ids)[0] in store
    assert not any(id_ in store for id_ in others)


def test_names_with_a_point_in_front_are_nobodys(tmp_path):
    for name in ("s", "merged", "imported"):
        (tmp_path / name).mkdir()
        (tmp_path / name / ".DS_Store").write_bytes(b"x")
    fill(tmp_path / "s", random_rows(2))
    whence.merge([tmp_path / "s"], tmp_path / "merged")
    whence.export_store(tmp_path / "s", tmp_path / "x.npz")
    whence.import_store(tmp_path / "x.npz", tmp_path / "imported")
    whence.compact(tmp_path / "s")
    for name in ("s", "merged", "imported"):
        assert len(whence.open(tmp_path / name)) == 2
        assert (tmp_path / name / ".DS_Store").read_bytes() == b"x"


def test_a_link_to_nothing_is_named(tmp_path):
    fill(tmp_path / "s", random_rows(2))
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    with pytest.raises(errors.StoreError, match="path must be a folder, got the link to nothing"):
        Writer(tmp_path / "dangling", manifest())
    with pytest.raises(errors.StoreError, match="out must be a new folder, got the link to"):
        whence.merge([tmp_path / "s"], tmp_path / "dangling")


@pytest.mark.parametrize("rate", [1e308, 1e-50])
def test_a_learning_rate_beyond_float32_is_named(tmp_path, rate):
    store = fill(tmp_path / "s", random_rows(2), rate=rate)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(errors.NotFiniteError, match="learning_rate must be finite and above"):
            store.search(random_rows(1))


def test_one_thing_is_told_as_one(tmp_path):
    store = fill(tmp_path / "s", random_rows(1))
    assert "1 example, 1 checkpoint ['0']" in repr(store)
    assert "1, 1 row in 1 shard\n" in str(whence.info(tmp_path / "s"))
