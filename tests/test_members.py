"""Several writers' stores, read as one: what each recorded, whatever its order was."""

from dataclasses import replace

import numpy as np
import pytest
from filled import manifest, random_rows

import whence
from whence import errors
from whence.store import COMBINED, Checkpoint, Manifest, Writer


def write(path, writer, ids, *names, columns=()):
    """A writer's rows of some ids at checkpoints of these names, with a text in each column."""
    held = Writer(path, manifest(), writer)
    for name in names:
        held.set_checkpoint(Checkpoint(name))
        texts = {each: np.array([f"{each}{id_}" for id_ in ids], object) for each in columns}
        held.append(np.array(ids), random_rows(len(ids), seed=ids[0]), texts)
        held.commit()
    held.close()


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


def test_columns_are_found_by_their_names_in_every_writer(tmp_path):
    write(tmp_path / "s", "1/2", [0, 1], "0", columns=("x", "y"))
    write(tmp_path / "s", "2/2", [2, 3], "0", columns=("y", "x"))
    found = whence.open(tmp_path / "s").columns
    assert {name: found[name].tolist() for name in found} == {
        "x": ["x0", "x1", "x2", "x3"],
        "y": ["y0", "y1", "y2", "y3"],
    }


def test_checkpoints_are_found_by_their_names_in_every_writer(tmp_path):
    write(tmp_path / "s", "1/2", [0, 1], "first", "second")
    write(tmp_path / "s", "2/2", [2, 3], "second", "first")
    store = whence.open(tmp_path / "s")
    for name in ("first", "second"):
        expected = np.concatenate([random_rows(2, seed=0), random_rows(2, seed=2)])
        assert np.allclose(store.rows(checkpoint=name), expected, rtol=1e-6)


def test_sums_over_other_checkpoints_are_refused(tmp_path):
    write_sums(tmp_path / "s", "1/2", [0, 1], "0", "1")
    write_sums(tmp_path / "s", "2/2", [2, 3], "0")
    with pytest.raises(errors.MismatchError, match=r"checkpoints must be .* \['0', '1'\] in"):
        whence.open(tmp_path / "s")


@pytest.mark.parametrize(("change", "fits"), [(1 + 1e-6, True), (-1, False), (1.1, False)])
def test_writers_have_one_map_but_for_rounding(tmp_path, change, fits):
    spec = {"layout": "preconditioned", "basis": "none", "coordinates": 16, "dim": 16}
    basis = random_rows(16)
    for number, factor in ((1, 1), (2, change)):
        wanted = Manifest(spec, "float32", "mean", {"digest": "none", "parameters": []})
        held = Writer(tmp_path / "s", wanted, f"{number}/2")
        arrays = {"basis": (basis * factor).astype(np.float32), "rows": np.arange(3)}
        there = held.write_map({"weights": "x"}, [{"kind": "linear"}], arrays)
        held.set_checkpoint(Checkpoint("0", first="x", map=there))
        held.append(np.array([number]), random_rows(1), {})
        held.close()
    if fits:
        assert whence.open(tmp_path / "s").ids.tolist() == [1, 2]
    else:
        with pytest.raises(errors.MismatchError, match="precondition must be the same for all w"):
            whence.open(tmp_path / "s")
