"""Makes the golden files. They are made once, by the first version that writes their format:

    python tests/golden/make.py

What is there stays as it is: a later version must read what an earlier one has written.
"""

import sys
from pathlib import Path
from unittest import mock

import numpy as np

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

import golden_values as values  # noqa: E402

import whence  # noqa: E402
from whence.store import COMBINED, Checkpoint, Manifest, Writer  # noqa: E402

MODEL = {
    "digest": "0f0e0d0c0b0a09080706050403020100",
    "parameters": [
        {"name": "fc.weight", "shape": [3, 4], "kind": "linear", "places": ["fc.weight"]}
    ],
}


def plain(**other):
    """What a store is to be."""
    spec = whence.Sketch(dim=values.DIM, seed=3).spec
    return Manifest(
        **{"sketch": spec, "dtype": "float32", "reduction": "mean", "model": MODEL} | other
    )


def append(writer, numbers, ids=None, *, columns=None, replaces=False, shift=0):
    """Rows of these numbers, committed."""
    found = values.rows([number + shift for number in numbers], writer.manifest.dtype)
    ids = np.array(numbers) if ids is None else np.array([ids[number] for number in numbers])
    columns = {} if columns is None else columns(numbers)
    writer.append(ids, found, writer.check_columns(columns), replaces=replaces)
    writer.commit()


def make_dtype(path, dtype):
    """Five rows of a type."""
    writer = Writer(path, plain(dtype=dtype))
    writer.set_checkpoint(Checkpoint("0"))
    append(writer, range(5))
    writer.close()


def make_columns(path, ids):
    """Two checkpoints of two shards, with columns of all types; the second lacks examples."""
    writer = Writer(path, plain(dtype="float16"))
    for shift, name in enumerate(["first", "second"]):
        writer.set_checkpoint(Checkpoint(name, 0.5**shift, first="ab" * 16, last="ab" * 16))
        append(writer, range(6 + shift, 10), ids, columns=values.columns, shift=shift)
        append(writer, range(4), ids, columns=values.columns, shift=shift)
        writer.skip(np.array([ids[4 + shift]]))
    writer.close()


def make_gone(path):
    """Ten rows in packed shards; some are deleted, and some replaced."""
    with mock.patch("whence.store.manifest.PACKED", 2):
        writer = Writer(path, plain(dtype="int4"))
        writer.set_checkpoint(Checkpoint("0"))
        for first in range(0, 10, 2):
            append(writer, [first, first + 1])
        writer.delete(np.array([3, 8]))
        append(writer, [5, 3], replaces=True, shift=10)
        writer.close()


def make_writers(path):
    """Two of three writers, whose checkpoints and columns come in other orders."""
    for number, names in ((1, ["a", "b"]), (3, ["b", "a"])):
        writer = Writer(path, plain(), f"{number}/3")
        for name in names:
            writer.set_checkpoint(Checkpoint(name, 0.125))
            columns = dict(list(values.columns([number]).items())[:: 2 - number])
            found = values.rows([number + 3 * (name == "b")])
            writer.append(np.array([number]), found, writer.check_columns(columns))
        writer.close()


def make_maps(path):
    """Sums over two checkpoints, with a map each."""
    sketch = {"layout": "preconditioned", "method": "EK-FAC", "dim": values.DIM}
    sketch |= {"coordinates": 20, "basis": "none"}
    writer = Writer(path, plain(sketch=sketch, rows=COMBINED))
    for number in range(2):
        basis = values.matrix(20, 3 + number)
        places = np.arange(7) * (number + 1)
        stored = writer.write_map(
            {"weights": str(number)}, [{"block": number}], {"basis": basis, "rows": places}
        )
        writer.manifest.checkpoints.append(
            Checkpoint(str(number), first="cd" * 16, weight=0.5 + number, map=stored)
        )
    append(writer, range(4))
    writer.close()


def make_layers(path):
    """A part of the row for each of two layers."""
    sketch = whence.Sketch(dim=4, seed=3, layout="per_layer").spec | {"layers": ["fc", "head"]}
    writer = Writer(path, plain(sketch=sketch, dtype="int2"))
    writer.set_checkpoint(Checkpoint("0"))
    writer.append(np.arange(3), values.rows(range(3), "int2", 8), {})
    writer.close()


def make_factored(path):
    """Factors of two parameters, of which one has two sides."""
    segments = [
        {"parameter": "fc.weight", "left": 5, "right": 4, "bias": "fc.bias", "transposed": False},
        {"parameter": "norm.weight", "left": 0, "right": 4, "bias": None, "transposed": False},
    ]
    writer = Writer(path, plain(sketch={"layout": "factored", "segments": segments}))
    writer.set_checkpoint(Checkpoint("0"))
    scales = np.array([4.0, 0.5], np.float32)
    writer.append(np.arange(2), values.rows(range(2)), {}, scales)
    writer.close()


def make_index(path, method):
    """An index of a matrix, two of whose rows were deleted."""
    index = whence.Index(values.matrix(150, 12), method)
    index.delete([3, 77])
    index.save(path)


def make_factors(path):
    """Factors of a small model."""
    values.fitted().save(path)


STORES = {dtype: (make_dtype, dtype) for dtype in ["float32", *values.BITS]}
STORES |= {
    "numbers": (make_columns, values.NUMBERS),
    "texts": (make_columns, values.TEXTS),
    "gone": (make_gone,),
    "writers": (make_writers,),
    "maps": (make_maps,),
    "layers": (make_layers,),
    "factored": (make_factored,),
}
MADE = {f"store-1/{name}": how for name, how in STORES.items()}
MADE |= {"factors-1/linear": (make_factors,)}
MADE |= {f"index-1/{method}": (make_index, method) for method in ("certified", "hnsw")}


def main():
    """Makes what is not there."""
    for name, (make, *arguments) in MADE.items():
        path = HERE / name
        if path.exists():
            continue
        path.parent.mkdir(exist_ok=True)
        make(path, *arguments)
        for lock in path.rglob("lock"):
            lock.unlink()  # it names a process and a machine


if __name__ == "__main__":
    main()
