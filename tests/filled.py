"""Stores filled with rows that need no model."""

import numpy as np

import whence
from whence import errors
from whence.store import Checkpoint, Manifest, Writer


def manifest(dim=16, dtype="float32"):
    spec = whence.Sketch(dim=dim).spec
    return Manifest(spec, dtype, "mean", {"digest": "none", "parameters": []})


def random_rows(count, dim=16, seed=0):
    """Rows whose norms span decades."""
    generator = np.random.default_rng(seed)
    rows = generator.normal(size=(count, dim)) * 10 ** generator.uniform(-3, 2, size=(count, 1))
    return rows.astype(np.float32)


def column(values):
    """Strings as objects, as the store takes them."""
    values = np.asarray(values)
    return values.astype(object) if values.dtype.kind == "U" else values


def appears_and_fails(monkeypatch, error):
    """The next manifest appears, and its commit ends in an error."""
    save = Manifest.save

    def failing(self, folder, number):
        save(self, folder, number)
        monkeypatch.setattr(Manifest, "save", save)
        raise error

    monkeypatch.setattr(Manifest, "save", failing)


LATE = [KeyboardInterrupt(), errors.StoreError("no name could be made durable")]
"""What can end a commit whose manifest is there."""


def fill(path, rows, ids=None, *, checkpoint="0", rate=None, dtype="float32", parts=1, **columns):
    """Appends rows to a store in several shards."""
    columns = {name: np.asarray(column(value)) for name, value in columns.items()}
    writer = Writer(path, manifest(rows.shape[1], dtype))
    writer.set_checkpoint(Checkpoint(checkpoint, rate))
    ids = np.arange(len(rows)) if ids is None else np.asarray(ids)
    for part in np.array_split(np.arange(len(rows)), parts):
        writer.append(ids[part], rows[part], {k: v[part] for k, v in columns.items()})
        writer.commit()
    writer.close()
    return whence.open(path)
