"""The commands on a store."""

import json
import warnings

import numpy as np
import pytest
from filled import fill, manifest, random_rows

import whence
from whence.cli import main
from whence.store import Checkpoint, Writer


@pytest.fixture
def store(tmp_path):
    path = tmp_path / "a store"
    fill(path, random_rows(20), parts=2, label=np.arange(20))
    return path


def run(capsys, *arguments):
    status = main([str(each) for each in arguments])
    printed = capsys.readouterr()
    return status, printed.out, printed.err


def test_info_prints_figures(store, capsys):
    status, out, _ = run(capsys, "info", store)
    assert status == 0
    assert "20, 20 rows in 2 shards" in out
    assert "'label' (int64)" in out


def test_figures_as_json_are_those_of_the_call(store, capsys):
    found = json.loads(run(capsys, "info", store, "--json")[1])
    assert found["bytes"] == whence.info(store).bytes
    assert json.loads(run(capsys, "verify", store, "--json")[1])["rows"] == 20


def test_verify_ends_with_one_where_there_is_damage(store, capsys):
    assert run(capsys, "verify", store)[0] == 0
    path = store / "shard-00000001" / "rows.npy"
    content = bytearray(path.read_bytes())
    content[300] ^= 4
    path.write_bytes(content)
    status, out, _ = run(capsys, "verify", store)
    assert status == 1
    assert "rows.npy is damaged: block 0" in out


def test_repair_lists_what_is_lost(store, capsys):
    (store / "shard-00000001" / "rows.npy").write_bytes(b"")
    status, out, _ = run(capsys, "repair", store)
    assert status == 0
    assert "10 rows lost" in out
    assert "lost: 3 at checkpoint '0'" in out


def test_delete_and_compact(store, capsys):
    assert "2 rows deleted" in run(capsys, "delete", store, "3", "4")[1]
    assert whence.open(store).ids.tolist() == [each for each in range(20) if each not in (3, 4)]
    assert "18 rows in 1 shard (were 2); 2 rows removed" in run(capsys, "compact", store)[1]


@pytest.mark.parametrize("id_", ["99", "three"])
def test_an_id_that_is_not_there_is_an_error(store, capsys, id_):
    status, _, err = run(capsys, "delete", store, id_)
    assert status == 2
    assert id_ in err
    assert len(whence.open(store)) == 20


def test_ids_that_are_text_are_taken_as_they_are(tmp_path, capsys):
    fill(tmp_path / "s", random_rows(2), ids=["1", "x"])
    assert run(capsys, "delete", tmp_path / "s", "1")[0] == 0
    assert whence.open(tmp_path / "s").ids.tolist() == ["x"]


@pytest.mark.parametrize("command", ["info", "verify", "repair", "compact"])
def test_what_is_no_store_is_named(tmp_path, capsys, command):
    status, _, err = run(capsys, command, tmp_path / "nowhere")
    assert status == 2
    assert "nowhere" in err


def test_merge_makes_one_store_of_two(store, tmp_path, capsys):
    fill(tmp_path / "b", random_rows(5), np.arange(18, 23), label=np.arange(5))
    status, _, error = run(capsys, "merge", store, tmp_path / "b", tmp_path / "m")
    assert (status, "got 18 of" in error) == (2, True)
    status, out, _ = run(
        capsys, "merge", "--on-duplicate", "first", store, tmp_path / "b", tmp_path / "m"
    )
    assert status == 0
    assert "23, 23 rows in 1 shard" in out
    assert whence.open(tmp_path / "m").ids.tolist() == list(range(23))


def test_export_and_import_make_the_same_store(store, tmp_path, capsys):
    file, made = tmp_path / "x.npz", tmp_path / "made"
    found = json.loads(run(capsys, "export", store, file, "--json")[1])
    assert found == {"file": str(file), "bytes": file.stat().st_size}
    assert run(capsys, "import", file, made)[0] == 0
    assert whence.open(made).rows().tobytes() == whence.open(store).rows().tobytes()
    assert run(capsys, "export", store, tmp_path / "y.npz", "--rows", "float32")[0] == 0
    assert np.load(tmp_path / "y.npz")["rows"].tobytes() == whence.open(store).rows().tobytes()
    status, _, error = run(capsys, "import", tmp_path / "y.npz", tmp_path / "z")
    assert (status, "export with rows='stored'" in error) == (2, True)


def test_a_missing_writer_is_told_in_one_line(tmp_path, capsys):
    path = tmp_path / "a\x1bstore"
    writer = Writer(path, manifest(), "2/3")
    writer.set_checkpoint(Checkpoint("0"))
    writer.append(np.arange(5), random_rows(5), {})
    writer.close()
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        status, _, said = run(capsys, "merge", path, tmp_path / "out")
    assert status == 0
    assert said == (
        f"whence: {tmp_path}/a\\x1bstore is without the rows of writers 1/3, 3/3, "
        "of which nothing is there: they have confirmed nothing yet, or it was lost\n"
    )


def test_split_by_columns(tmp_path, capsys):
    path = tmp_path / "s"
    columns = {"label": np.arange(6) % 3, "kind=of": list("abcabc"), "odd": np.arange(6) % 2 == 1}
    fill(path, random_rows(6), **columns)
    split = ("split", path, tmp_path / "t", "--where", "label=1", "--where", "label=2")
    assert "2, 2 rows" in run(capsys, *split, "--where", "odd=true")[1]
    assert whence.open(tmp_path / "t").ids.tolist() == [1, 5]
    run(capsys, "split", path, tmp_path / "v", "--where", "odd=True")  # as Python prints it
    assert whence.open(tmp_path / "v").ids.tolist() == [1, 3, 5]
    error = run(capsys, "split", path, tmp_path / "w", "--where", "odd=1")[2]
    assert "--where odd must be true or false, got '1'" in error
    run(capsys, "split", path, tmp_path / "u", "--where", "kind=of=a")
    assert whence.open(tmp_path / "u").ids.tolist() == [0, 3]


def test_one_row_is_told_as_one(store, capsys):
    assert run(capsys, "delete", store, "--skip-missing", "4", "99")[1].startswith("1 row deleted")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--where", "label"], "--where must be COLUMN=VALUE, got 'label'"),
        (["--where", "label=cat"], "--where label must be a whole number of 64 bits, got 'cat'"),
        (["--where", "label=1_0"], "--where label must be a whole number of 64 bits, got '1_0'"),
        (["--where", f"label={1 << 63}"], "--where label must be a whole number of 64 bits"),
        (["--where", "size=1"], "--where must name columns of ['label'], got 'size=1'"),
    ],
)
def test_a_filter_that_cannot_be_is_named(store, capsys, arguments, says):
    status, _, error = run(capsys, "split", store, store.parent / "t", *arguments)
    assert (status, says in error) == (2, True), error


def test_export_takes_a_format_where_the_name_says_none(store, tmp_path, capsys):
    assert "or format be given" in run(capsys, "export", store, tmp_path / "x")[2]
    assert run(capsys, "export", store, tmp_path / "x", "--format", "npz")[0] == 0
    assert len(np.load(tmp_path / "x")["ids"]) == 20
