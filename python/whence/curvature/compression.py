"""`compress`: from coordinates that were kept at each checkpoint to one short row an example."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from whence import _arrays
from whence._core import MAX_DIM
from whence.curvature.basis import Leading, bases
from whence.curvature.fit import shares_of
from whence.errors import ArgumentError, IdError, MismatchError
from whence.gradients.coordinates import from_arrays, to_arrays
from whence.search import Store
from whence.store import COMBINED, Checkpoint, Manifest, Writer, read_map
from whence.store.files import Written
from whence.store.progress import bar, checked

CHUNK = 1024
"""Examples that are read, summed and written at a time."""


def compress(
    store: Store | str | os.PathLike[str],
    path: str | os.PathLike[str],
    *,
    dim: int = 512,
    dtype: str = "int4",
    weights: Mapping[str, float] | None = None,
    sample: int = 16384,
    seed: int = 0,
    missing: str = "error",
    progress: bool | None = None,
) -> Path:
    """One row an example, of coordinates that were recorded at several checkpoints.

    The way for runs whose checkpoints are not kept: at each one `fit_factors`, then `record(...,
    precondition=factors, rotate=False, dtype="int4")`; and this once at the end. The rows are those
    of `record_checkpoints`, but for the rounding of what was kept meanwhile.

    Args:
        store: A store of `record(..., precondition=..., rotate=False)`.
        path: The new store's folder; one that was begun is gone on with.
        dim: Width of a row.
        dtype: Type of stored rows, as in `record`.
        weights: As in `fit_factors`.
        sample: How many examples the joint basis is learnt from, spread evenly.
        seed: Of the turn that spreads a row's energy evenly, for rows of few bits.
        missing: What to do with an example that lacks a checkpoint: "error", or "drop" to leave it
            out.
        progress: Whether to show a bar; None means if standard error is a terminal.

    Returns:
        The path. O((sample + examples) · dim · coordinates · checkpoints).

    Raises:
        MismatchError: If the store has other rows, or `path` was begun from another or otherwise.
        IdError: If an example lacks a checkpoint.
        ArgumentError: If an argument is out of range.
        CheckpointError: If weights are not one for each checkpoint.
    """
    source = store if isinstance(store, Store) else Store(store)
    manifest = source.manifest
    if not manifest.is_preconditioned or manifest.sketch["basis"] != "none":
        raise MismatchError(
            "store must hold coordinates as they are, of record(..., precondition=..., "
            f"rotate=False), got {source!r}"
        )
    dim = _arrays.integer("dim", dim, 1, MAX_DIM)
    sample = _arrays.integer("sample", sample, 2)
    seed = _arrays.integer("seed", seed, 0)
    _arrays.choice("missing", missing, ("error", "drop"))
    names = source.checkpoints
    shares = shares_of(weights, names)
    numbers = source.row_numbers(missing="keep")
    complete = np.flatnonzero((numbers >= 0).all(axis=0))
    if len(complete) < numbers.shape[1] and missing == "error":
        lacking = source.ids[(numbers < 0).any(axis=0)][0].item()
        raise IdError(
            f"every id must have a row in each checkpoint, got {lacking!r} without one; pass "
            "missing='drop' to leave it out"
        )
    if not len(complete):
        raise ArgumentError(f"the store must have rows, got none in {source!r}")
    most = min(sample, len(complete))
    if dim > most:
        raise ArgumentError(
            f"dim must be at most {most}, the examples that the basis is learnt from, got {dim}"
        )
    checked(progress)
    turn = None if dtype in ("float16", "float32") else seed
    matrices = _bases(source, numbers, complete, names, shares, dim, sample, turn)
    spec = {
        **manifest.sketch,
        "dim": dim,
        "basis": "learnt",
        "seed": seed,
        "turned": turn is not None,
        "sample": sample,
        "residuals": "own",
        "refined": False,
    }
    wanted = Manifest(spec, dtype, manifest.reduction, manifest.model, rows=COMBINED)
    writer = Writer(_arrays.path("path", path), wanted)
    try:
        if not writer.manifest.checkpoints:
            for each, basis in zip(manifest.checkpoints, matrices, strict=True):
                writer.manifest.checkpoints.append(
                    _rotated(source, writer, each, basis, shares[each.name])
                )
        there = [(each.name, each.weight, _files(each)) for each in writer.manifest.checkpoints]
        here = [(each.name, shares[each.name], _files(each)) for each in manifest.checkpoints]
        if there != here:
            raise MismatchError(
                f"path must be new or begun from {source!r} with these weights, got another there"
            )
        matrices = [
            read_map(writer.path, each.map)[1]["basis"]
            for each in writer.manifest.checkpoints
            if each.map
        ]
        _write(source, writer, numbers, complete, matrices, progress)
    finally:
        writer.close()
    return writer.path


def _bases(
    source: Store,
    numbers: NDArray[np.int64],
    complete: NDArray[np.int64],
    names: list[str],
    shares: Mapping[str, float],
    dim: int,
    sample: int,
    turn: int | None,
) -> list[NDArray[np.float32]]:
    """[coordinates, dim] of each checkpoint, learnt from some examples."""
    places = np.unique(np.linspace(0, len(complete) - 1, min(sample, len(complete))).astype(int))
    chosen = complete[places]
    leading = Leading(2 * dim, [shares[name] for name in names])
    for first in range(0, len(chosen), CHUNK):
        part = chosen[first : first + CHUNK]
        leading.add([torch.from_numpy(_read(source, rows[part])) for rows in numbers])
    return bases(leading.directions(), dim, turn)


def _rotated(
    source: Store,
    writer: Writer,
    checkpoint: Checkpoint,
    basis: NDArray[np.float32],
    weight: float,
) -> Checkpoint:
    """A checkpoint with the map of its coordinates, and their basis."""
    if checkpoint.map is None:
        raise MismatchError(f"checkpoint {checkpoint.name!r} must have a map, got none")
    described, arrays = to_arrays(
        from_arrays(*read_map(source.path, checkpoint.map)).rotated(basis)
    )
    identity = {**checkpoint.map.identity, **writer.manifest.sketch}
    return Checkpoint(
        checkpoint.name,
        weights=checkpoint.weights,
        first=checkpoint.first,
        last=checkpoint.last,
        weight=weight,
        map=writer.write_map(identity, described, arrays),
    )


def _files(checkpoint: Checkpoint) -> dict[str, Written]:
    """The files of a map, with their checksums, without what a basis adds."""
    files = {} if checkpoint.map is None else checkpoint.map.files
    return {name: files[name] for name in files if name not in ("basis.npy", "map.json")}


def _read(source: Store, rows: NDArray[np.int64]) -> NDArray[np.float32]:
    return source.core.read(np.ascontiguousarray(rows, np.uint64))


def _write(
    source: Store,
    writer: Writer,
    numbers: NDArray[np.int64],
    complete: NDArray[np.int64],
    matrices: list[NDArray[Any]],
    progress: bool | None,
) -> None:
    """The rows of all examples that are not written yet."""
    columns = {name: source.columns[name] for name in source.columns}
    with bar("compressing", len(complete), progress, "example") as shown:
        for first in range(0, len(complete), CHUNK):
            part = complete[first : first + CHUNK]
            chosen = part[~writer.has(source.ids[part])]
            if len(chosen):
                total = np.zeros((len(chosen), matrices[0].shape[1]), np.float32)
                for rows, matrix in zip(numbers, matrices, strict=True):
                    total += _arrays.matmul(_read(source, rows[chosen]), matrix)
                kept = {name: column[chosen] for name, column in columns.items()}
                writer.append(source.ids[chosen], total, writer.check_columns(kept))
            shown.update(len(part))
