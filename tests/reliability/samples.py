"""A small but complete sample of every kind of file that is written, and all that it says."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import trial  # noqa: F401 - which knows where filled.py is
from filled import manifest, random_rows

import whence
from whence.store import Checkpoint, Writer, read_map
from whence.store.manifest import DTYPES

COUNT, DIM = 60, 20


@dataclass(frozen=True)
class Sample:
    """Files of one kind.

    Attributes:
        name: Of the kind.
        make: Writes them into a new folder at the path it is given.
        read: Reads all that is in them from there -> what was found.
        store: Where in the folder a store lies that `verify` is to look at.
    """

    name: str
    make: Callable[[Path], Any]
    read: Callable[[Path], Any]
    store: str | None = None


def digest(found: Any) -> str:
    """Two findings have the same digest if and only if they agree in every bit."""
    said = hashlib.sha256()

    def say(each: Any) -> None:
        if isinstance(each, np.ndarray) and each.dtype != object:
            said.update(f"{each.dtype.str}{each.shape}".encode() + each.tobytes())
        elif isinstance(each, (list, tuple, np.ndarray)):
            said.update(f"[{len(each)}".encode())
            for one in each:
                say(one)
        elif isinstance(each, Mapping):
            say(list(each.items()))
        elif hasattr(each, "numpy"):
            say(each.numpy())
        elif hasattr(each, "__dict__"):
            say([type(each).__name__, vars(each)])
        else:
            said.update(f"{type(each).__name__} {each!r}".encode(errors="surrogatepass"))

    say(found)
    return said.hexdigest()


# Stores


def make_store(
    path: Path, dtype: str, *, as_text: bool, count: int = COUNT, dim: int = DIM
) -> None:
    """Two checkpoints in six shards, with columns of each type, gone rows and a skipped id."""
    wanted = manifest(dim, dtype)
    ids = ids_of(np.arange(count), as_text=as_text)
    with mock.patch("whence.store.manifest.PACKED", 2):
        for checkpoint, seed in (("early", 1), ("läte", 2)):
            rows = random_rows(count, dim, seed)
            writer = Writer(path, wanted)
            writer.set_checkpoint(Checkpoint(checkpoint, 0.5 * seed))
            for part in np.array_split(np.arange(count), 3):
                writer.append(ids[part], rows[part], writer.check_columns(columns_of(part)))
                writer.commit()
            writer.skip(ids_of(np.array([count]), as_text=as_text))
            writer.close()
        whence.delete(path, ids[[3, 4, count - 1]])


def ids_of(numbers: np.ndarray, *, as_text: bool) -> np.ndarray:
    return np.array([f"id é{number}" for number in numbers]) if as_text else 7 * numbers


def columns_of(numbers: np.ndarray) -> dict[str, np.ndarray]:
    """A column of each type."""
    texts = np.empty(len(numbers), object)
    texts[:] = [f"text ü {number} " * (number % 3) for number in numbers]
    return {"flag": numbers % 2 == 0, "whole": numbers - 5, "real": numbers / 7, "text": texts}


def read_store(path: Path) -> Any:
    """All that a store says, in every way in which it can be asked."""
    found: list[Any] = []
    for mapped in (False, True):
        store = whence.open(path, memory_map=mapped)
        found += [store.ids, store.columns, store.scales, store.skipped, store.checkpoints]
        found += [store.quantisation_error, store.self_influence()]
        numbers = store.row_numbers()
        found += [store.core.read(each.astype(np.uint64)) for each in numbers]
        queries = random_rows(2 * len(numbers), store.dim, seed=3)
        found.append(store.find(queries.reshape(len(numbers), 2, store.dim), k=3))
    found.append(asdict(replace(store.manifest, shards=[])))
    for checkpoint in store.manifest.checkpoints:
        if checkpoint.map is not None:
            found.append(read_map(path, checkpoint.map))
    return found


def examples(path: Path) -> dict[tuple[str, object], str]:
    """A digest of each row, with the columns of its example, by checkpoint and id."""
    store = whence.open(path)
    ids, columns = store.ids.tolist(), [store.columns[name] for name in store.columns]
    found = {}
    for name, numbers in zip(store.checkpoints, store.row_numbers(missing="keep"), strict=True):
        there = np.flatnonzero(numbers >= 0)
        rows = store.core.read(numbers[there].astype(np.uint64))
        for place, row in zip(there.tolist(), rows, strict=True):
            found[name, ids[place]] = digest([row, [column[place] for column in columns]])
    return found


def make_members(path: Path) -> None:
    """What two processes of a job record side by side."""
    for number in (1, 2):
        writer = Writer(path, manifest(DIM, "float16"), f"{number}/2")
        writer.set_checkpoint(Checkpoint("0"))
        for part in np.split(np.arange(100 * number, 100 * number + 20), 2):
            rows = random_rows(len(part), DIM, seed=int(part[0]))
            writer.append(part, rows, writer.check_columns(columns_of(part)))
            writer.commit()
        writer.close()


# Rows that need a model


def small_model() -> tuple[Any, Any]:
    """A model, and inputs of 9 examples."""
    import torch

    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.Tanh(), torch.nn.Linear(5, 3))
    return model, torch.randn(9, 4)


def factors(**options: Any) -> Any:
    """Those of the model's curvature."""
    model, x = small_model()

    def loss(batch: Any) -> Any:
        return model(batch).square().sum(1).mean()

    options = {"labels": "empirical", "sample": 9, "progress": False, **options}
    return whence.fit_factors(model, [x[:5], x[5:]], loss, **options)


def make_recorded(path: Path, **options: Any) -> None:
    """A store of the model's rows."""
    model, x = small_model()
    with whence.record(model, path, dtype="float32", **options) as recorder:
        for first in (0, 3, 6):
            with recorder.batch(np.arange(first, first + 3)):
                model(x[first : first + 3]).square().sum(1).mean().backward()


def make_factors(path: Path) -> None:
    factors().save(path)


def read_factors(path: Path) -> Any:
    return told_by(whence.Factors.load(path))


def told_by(found: Any) -> Any:
    """All that factors say."""
    statistics = [at.statistics for at in found.checkpoints]
    return [repr(found), found.model, found.settings, statistics, found.directions]


def fit_in(path: Path) -> Any:
    """What a fit says that keeps what it has, and goes on with what it finds."""
    states = {name: small_model()[0].state_dict() for name in ("early", "late")}
    return told_by(factors(path=path, states=states))


# Retrained models


def retrain_in(path: Path) -> Any:
    """What models say that are kept as they are trained, and trained only where they are not."""
    return whence.evaluate.retrain(
        lambda places, seed: places.sum() + seed / 7,
        whence.evaluate.subsets(20, 3),
        2,
        lambda model: np.arange(4) / 3 + model,
        path,
        progress=False,
    )


# Indexes


def make_index(path: Path, method: str) -> None:
    """An index of a store, of which some examples are deleted."""
    make_store(path / "rows", "float32", as_text=True, count=300)
    index = whence.Index(path / "rows", method, seed=5)
    index.delete(ids_of(np.arange(10, 20), as_text=True))
    index.save(path / "index")


def read_index(path: Path) -> Any:
    index = whence.Index.load(path / "index", path / "rows")
    queries = random_rows(6, DIM, seed=3).reshape(2, 3, DIM)
    return [
        index.search(queries, k=3),
        index.search(queries, k=3, approximate=True, side="helpful"),
        index.explain().built,
        len(index),
    ]


# Exported stores


def make_export(path: Path, suffix: str) -> None:
    """A store in one file."""
    path.mkdir()
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        make_store(Path(scratch) / "store", "int4", as_text=True)
        whence.export_store(Path(scratch) / "store", path / f"export{suffix}")


def read_export(path: Path, suffix: str) -> Any:
    """The store that is made of it."""
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        whence.import_store(path / f"export{suffix}", Path(scratch) / "store")
        return digest(read_store(Path(scratch) / "store"))


SAMPLES = [
    *(
        Sample(
            dtype, partial(make_store, dtype=dtype, as_text=number % 2 == 1), read_store, store="."
        )
        for number, dtype in enumerate(DTYPES)
    ),
    Sample(
        "several blocks",
        partial(make_store, dtype="float32", as_text=False, count=900, dim=64),
        read_store,
        store=".",
    ),
    Sample("members", make_members, read_store, store="."),
    Sample("factored", partial(make_recorded, layout="factored"), read_store, store="."),
    Sample(
        "preconditioned",
        lambda path: make_recorded(path, precondition=factors(), dim=6),
        read_store,
        store=".",
    ),
    Sample("index of codes", partial(make_index, method="certified"), read_index, store="rows"),
    Sample("index with a graph", partial(make_index, method="hnsw"), read_index, store="rows"),
    Sample("factors", make_factors, read_factors),
    *(
        Sample(
            f"export{suffix}",
            partial(make_export, suffix=suffix),
            partial(read_export, suffix=suffix),
        )
        for suffix in (".npz", ".arrow", ".parquet")
    ),
    Sample("fit under way", fit_in, fit_in),
    Sample("retrained models", retrain_in, retrain_in),
]
