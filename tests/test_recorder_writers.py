"""Recording again in the place of a row, and from several processes."""

import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from oracle import per_sample_gradients
from torch import nn

import whence
from whence import errors
from whence.store import Manifest

DIM = 64


def model_of(seed=1):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))


def data(count=12):
    torch.manual_seed(2)
    return torch.randn(count, 6), torch.randint(0, 3, (count,))


def record(model, path, **options):
    return whence.record(model, path, **{"dim": DIM, "dtype": "float32", **options})


def fill(rec, model, x, y, ids, size=4):
    """Records x and y at `ids`, in batches."""
    for first in range(0, len(ids), size):
        chosen = list(ids[first : first + size])
        with rec.batch(chosen, label=y[chosen]):
            F.cross_entropy(model(x[chosen]), y[chosen]).backward()


def exact_rows(model, x, y):
    gradients = per_sample_gradients(model, lambda m, x, y: F.cross_entropy(m(x), y), x, y)
    return whence.Sketch(dim=DIM)(gradients)


# --- recorded again -----------------------------------------------------------------------------


def test_replaced_rows_are_those_of_the_new_gradients(tmp_path):
    model, (x, y) = model_of(), data()
    with record(model, tmp_path / "s") as rec:
        fill(rec, model, x, y, range(12))
    new, labels = x.clone(), y.clone()
    new[3:7] *= -2
    labels[3:7] = (labels[3:7] + 1) % 3
    with record(model, tmp_path / "s", on_duplicate="replace") as rec:
        fill(rec, model, new, labels, range(3, 7), size=3)
    store = whence.open(tmp_path / "s")
    order = np.argsort(store.ids)
    assert store.ids[order].tolist() == list(range(12))
    assert np.allclose(store.rows()[order], exact_rows(model, new, labels), rtol=1e-3, atol=1e-6)
    assert store.columns["label"][order].tolist() == labels.tolist()


def test_old_and_new_ids_may_come_in_one_batch(tmp_path):
    model, (x, y) = model_of(), data()
    with record(model, tmp_path / "s", on_duplicate="replace") as rec:
        fill(rec, model, x, y, [0, 1, 2])
        fill(rec, model, x, y, [2, 3, 1, 4])  # of which two wait, and are in no shard yet
        assert rec.pending(range(6)) == [5]
    store = whence.open(tmp_path / "s")
    assert sorted(store.ids.tolist()) == [0, 1, 2, 3, 4]
    expected = exact_rows(model, x, y)
    assert np.allclose(store.rows(), expected[store.ids], rtol=1e-3, atol=1e-6)


def test_an_id_may_be_replaced_again_and_again(tmp_path):
    model, (x, y) = model_of(), data()
    with record(model, tmp_path / "s", on_duplicate="replace") as rec:
        for scale in (1.0, 2.0, 3.0):
            fill(rec, model, scale * x, y, range(12))
            fill(rec, model, -scale * x, y, range(12))
    store = whence.open(tmp_path / "s")
    expected = exact_rows(model, -3 * x, y)
    assert np.allclose(store.rows(), expected[store.ids], rtol=1e-3, atol=1e-6)
    assert len(store) == 12


def test_other_checkpoints_keep_their_rows_when_one_is_replaced(tmp_path):
    model, (x, y) = model_of(), data(4)
    with record(model, tmp_path / "s") as rec:
        for name in ("a", "b"):
            rec.checkpoint(name)
            fill(rec, model, x, y, range(4))
    with record(model, tmp_path / "s", on_duplicate="replace") as rec:
        rec.checkpoint("a")
        fill(rec, model, -x, y, [1, 2])
    store = whence.open(tmp_path / "s")
    at = {id_: place for place, id_ in enumerate(store.ids.tolist())}
    order = [at[id_] for id_ in range(4)]
    old, new = exact_rows(model, x, y), exact_rows(model, -x, y)
    assert np.allclose(store.rows(checkpoint="b")[order], old, rtol=1e-3, atol=1e-6)
    mixed = np.stack([old[0], new[1], new[2], old[3]])
    assert np.allclose(store.rows(checkpoint="a")[order], mixed, rtol=1e-3, atol=1e-6)


def test_the_old_row_of_a_gradient_that_is_left_out_goes_too(tmp_path):
    model, (x, y) = model_of(), data(4)
    with record(model, tmp_path / "s") as rec:
        fill(rec, model, x, y, range(4))
    broken = x.clone()
    broken[2] = float("nan")
    with record(model, tmp_path / "s", on_duplicate="replace", nonfinite="skip") as rec:
        fill(rec, model, broken, y, range(4))
        assert rec.pending(range(5)) == [4]
    store = whence.open(tmp_path / "s")
    assert (sorted(store.ids.tolist()), store.skipped) == ([0, 1, 3], [("0", 2)])


def test_who_was_left_out_and_is_recorded_later_is_noted_no_more(tmp_path):
    model, (x, y) = model_of(), data(4)
    broken = x.clone()
    broken[2] = float("nan")
    with record(model, tmp_path / "s", nonfinite="skip") as rec:
        fill(rec, model, broken, y, range(4))
    assert whence.open(tmp_path / "s").skipped == [("0", 2)]
    with record(model, tmp_path / "s") as rec:
        fill(rec, model, x, y, [2])
    store = whence.open(tmp_path / "s")
    assert (store.ids.tolist(), store.skipped) == ([0, 1, 3, 2], [])


def test_deleted_ids_are_pending_and_recorded_again(tmp_path):
    model, (x, y) = model_of(), data(6)
    with record(model, tmp_path / "s") as rec:
        fill(rec, model, x, y, range(6))
    whence.delete(tmp_path / "s", [1, 4])
    with record(model, tmp_path / "s") as rec:
        assert rec.pending(range(6)) == [1, 4]
        fill(rec, model, -x, y, [4])
        assert rec.pending(range(6)) == [1]
    store = whence.open(tmp_path / "s")
    assert store.ids.tolist() == [0, 2, 3, 5, 4]
    expected = exact_rows(model, x, y)
    expected[4] = exact_rows(model, -x, y)[4]
    assert np.allclose(store.rows(), expected[store.ids], rtol=1e-3, atol=1e-6)


def test_a_batch_that_fails_leaves_the_old_rows(tmp_path):
    model, (x, y) = model_of(), data(4)
    with record(model, tmp_path / "s") as rec:
        fill(rec, model, x, y, range(4))
    with record(model, tmp_path / "s", on_duplicate="replace") as rec:
        broken = x.clone()
        broken[2] = float("nan")
        with pytest.raises(errors.NotFiniteError, match="id 2"):
            fill(rec, model, broken, y, range(4))
        with pytest.raises(ZeroDivisionError), rec.batch([1], label=[0]):
            raise ZeroDivisionError
    store = whence.open(tmp_path / "s")
    assert store.ids.tolist() == [0, 1, 2, 3]
    assert np.allclose(store.rows(), exact_rows(model, x, y), rtol=1e-3, atol=1e-6)


def test_the_error_for_a_recorded_id_names_the_ways_out(tmp_path):
    model, (x, y) = model_of(), data()
    with record(model, tmp_path / "s") as rec:
        fill(rec, model, x, y, [3])
        with pytest.raises(errors.IdError, match="'skip' to leave it out or 'replace' to record"):
            fill(rec, model, x, y, [2, 3])
    with pytest.raises(errors.ArgumentError, match="on_duplicate must be one of"):
        record(model, tmp_path / "t", on_duplicate="overwrite")


# --- several writers ----------------------------------------------------------------------------


def test_writers_make_up_one_store(tmp_path):
    model, (x, y) = model_of(), data()
    with (
        record(model, tmp_path / "s", writer="1/2") as one,
        record(model, tmp_path / "s", writer="2/2") as two,
    ):
        fill(one, model, x, y, range(0, 12, 2))
        fill(two, model, x, y, range(1, 12, 2))
        assert one.pending([0, 1]) == [1]
        assert one.path == two.path == tmp_path / "s"
    assert (one.rows, two.rows) == (6, 6)
    store = whence.open(tmp_path / "s")
    assert sorted(store.ids.tolist()) == list(range(12))
    assert np.allclose(store.rows(), exact_rows(model, x, y)[store.ids], rtol=1e-3, atol=1e-6)


def test_queries_are_answered_from_all_writers(tmp_path):
    model, (x, y) = model_of(), data()
    for number in (1, 2, 3):
        with record(model, tmp_path / "s", writer=f"{number}/3") as rec:
            fill(rec, model, x, y, range(number - 1, 12, 3))
    with record(model, tmp_path / "whole") as rec:
        fill(rec, model, x, y, range(12))
    found, expected = (
        whence.query(model, tmp_path / name, lambda: F.cross_entropy(model(x[:2]), y[:2]), k=12)
        for name in ("s", "whole")
    )
    assert found.helpful.ids.tolist() == expected.helpful.ids.tolist()
    assert np.array_equal(found.helpful.scores, expected.helpful.scores)


def test_a_writer_goes_on_where_it_ended(tmp_path):
    model, (x, y) = model_of(), data()
    for _ in range(2):
        with record(model, tmp_path / "s", writer="1/1") as rec:
            fill(rec, model, x, y, rec.pending(range(12))[:6])
    assert whence.open(tmp_path / "s").ids.tolist() == list(range(12))


def test_a_writer_that_ends_without_rows_is_not_missing(tmp_path):
    model, (x, y) = model_of(), data()
    with record(model, tmp_path / "s", writer="1/2") as rec:
        fill(rec, model, x, y, range(12))
    with pytest.warns(errors.MissingWritersWarning, match="without the rows of writers 2/2"):
        whence.open(tmp_path / "s")
    with record(model, tmp_path / "s", writer="2/2"):
        pass
    assert len(whence.open(tmp_path / "s")) == 12


def test_a_writer_that_failed_without_rows_is_missing(tmp_path):
    model, (x, y) = model_of(), data()
    with record(model, tmp_path / "s", writer="1/2") as rec:
        fill(rec, model, x, y, range(12))
    with pytest.raises(ZeroDivisionError), record(model, tmp_path / "s", writer="2/2"):
        raise ZeroDivisionError
    with pytest.warns(errors.MissingWritersWarning, match="2/2"):
        whence.open(tmp_path / "s")


def test_writers_at_other_weights_are_refused_when_opened(tmp_path):
    _, (x, y) = model_of(), data()
    for number in (1, 2):
        model = model_of(seed=number)
        with record(model, tmp_path / "s", writer=f"{number}/2") as rec:
            fill(rec, model, x, y, [number])
    with pytest.raises(errors.MismatchError, match="weights must be the same for all writers"):
        whence.open(tmp_path / "s")


@pytest.mark.parametrize(
    "writer", ["", "0/2", "3/2", "1", "1/2/3", "a/b", "-1/2", "1 / 2", "\uff11/\uff12", "1/2\n"]
)
def test_a_writer_that_is_none_of_a_number_is_refused(tmp_path, writer):
    with pytest.raises(errors.ArgumentError, match="writer must be 'number/total'"):
        record(model_of(), tmp_path / "s", writer=writer)
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize("writer", [3, (1, 2), b"1/2", True])
def test_a_writer_that_is_no_text_is_refused(tmp_path, writer):
    with pytest.raises(errors.DtypeError, match="writer must be a str such as '3/8'"):
        record(model_of(), tmp_path / "s", writer=writer)


def test_a_second_process_as_the_same_writer_is_refused(tmp_path):
    program = """
        import sys, torch, whence
        model = torch.nn.Linear(6, 3)
        with whence.record(model, sys.argv[1], dim=8, writer="1/2") as rec:
            print("ready", flush=True)
            sys.stdin.read()
    """
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(program), tmp_path / "s"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with process:
        assert process.stdout.readline() == "ready\n"
        model = nn.Linear(6, 3)
        with pytest.raises(errors.LockedError, match=f"process {process.pid} on"):
            whence.record(model, tmp_path / "s", dim=8, writer="1/2")
        with whence.record(model, tmp_path / "s", dim=8, writer="2/2") as rec, rec.batch([1, 2]):
            model(torch.randn(2, 6)).square().mean().backward()
        process.stdin.close()
    assert process.returncode == 0
    assert whence.open(tmp_path / "s").ids.tolist() == [1, 2]


# --- rows summed over checkpoints ---------------------------------------------------------------


def combined_in(path, share, writer=None, ids=...):
    model, (x, y) = model_of(), data()
    loss = lambda x, y, ids: F.cross_entropy(model(x), y)  # noqa: E731
    loader = [(x[part], y[part], part) for part in torch.arange(12).split(4)]
    factors = whence.fit_factors(model, loader, loss, labels="empirical", progress=False)
    mine = [(x[part], y[part], part) for part in torch.tensor(share).split(4)]
    return whence.record_checkpoints(
        model,
        path,
        mine,
        loss,
        precondition=factors,
        ids=(lambda x, y, ids: ids) if ids is ... else ids,
        dim=8,
        dtype="float32",
        writer=writer,
        progress=False,
    )


def test_summed_rows_are_those_of_one_writer(tmp_path):
    for number in (1, 2):
        share = list(range(number - 1, 12, 2))
        found = combined_in(tmp_path / "s", share, writer=f"{number}/2")
        assert found == tmp_path / "s"
        assert Manifest.exists(found / f"writer-{number}-of-2")
    store = whence.open(tmp_path / "s")
    whole = whence.open(combined_in(tmp_path / "whole", list(range(12))))
    assert store.checkpoints == ["combined"]
    assert np.allclose(store.rows(whole.ids), whole.rows(), rtol=1e-4, atol=1e-6)


def test_summed_rows_of_a_writer_need_ids(tmp_path):
    with pytest.raises(errors.ArgumentError, match="ids must be given with writer='1/2', got None"):
        combined_in(tmp_path / "s", [0, 1], writer="1/2", ids=None)
    assert not (tmp_path / "s").exists()
