"""Appending rows to a store."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from whence import _arrays, _core
from whence._arrays import Ids
from whence.errors import (
    ArgumentError,
    CheckpointError,
    DtypeError,
    IdError,
    MismatchError,
    StoreError,
)
from whence.store.files import Written, store_errors, sync_directory, write_array, write_strings
from whence.store.lock import Lock
from whence.store.manifest import BITS, DTYPES, Checkpoint, Manifest, Shard
from whence.store.maps import StoredMap, next_number, write_map
from whence.store.reader import read_ids

SHARD_BYTES = 64 << 20
"""Rows are committed at the latest when this many bytes of them wait."""

COMMIT_SECONDS = 10.0
"""... or when so much time has passed since the last commit."""

_OURS = ("shard-", "map-", "manifest-", "lock")
"""How the names in a store begin."""


_Floats = NDArray[np.float32]
_Batch = tuple[Ids, NDArray[Any], _Floats, _Floats | None, dict[str, Any]]


@dataclass(frozen=True)
class _State:
    """What is confirmed, and what waits; replaced whole, so that an interrupt finds it whole.

    Attributes:
        manifest: As last committed, but for what later rows will add.
        number: Of the manifest on disk; 0 if there is none.
        waiting: (ids, stored rows, scales, errors, columns) of batches that are not confirmed.
    """

    manifest: Manifest
    number: int
    waiting: tuple[_Batch, ...] = ()


class Writer:
    """The one writer of a store.

    Args:
        path: The store's folder; made if it is not there.
        wanted: What a new store is to be; an existing one must agree in sketch, dtype, reduction
            and model.

    Raises:
        ArgumentError: If the type of its rows is not known.
        LockedError: If another writer has it open.
        MismatchError: If the store is of another model, sketch or setting.
        StoreError: If `path` is a file, a folder of something else, damaged, or not writable.
    """

    def __init__(self, path: Path, wanted: Manifest) -> None:
        self.path = path = _arrays.path("path", path)
        _arrays.choice("dtype", wanted.dtype, DTYPES)
        with store_errors(path):
            if path.exists() and not path.is_dir():
                raise StoreError(f"path must be a folder, got the file {path}")
            if not Manifest.exists(path) and path.is_dir():
                _check_empty(path)
            path.mkdir(parents=True, exist_ok=True)
            sync_directory(path.parent)
        self._lock = Lock(path)
        try:
            if Manifest.exists(path):
                self._state = _State(*Manifest.load(path))
                _check_same(path, self.manifest, wanted)
            else:
                self._state = _State(wanted, 0)
            self._next_shard = 1 + _last_shard(path)
            self._known = [
                _KnownIds(
                    read_ids(path, shard, self.manifest)
                    for shard in self.manifest.shards
                    if shard.checkpoint == index
                )
                for index in range(len(self.manifest.row_sets))
            ]
        except BaseException:
            self._lock.close()
            raise
        # The last attempt to commit: number, shards, how many waiting batches it covers.
        self._attempt: tuple[int, list[Shard], int] = (0, [], 0)
        self._waiting_bytes = 0
        # Where waiting rows lie, and how many bytes of it are taken.
        self._memory, self._taken = np.empty(SHARD_BYTES, np.uint8), 0
        self._checkpoint = max(len(self.manifest.row_sets) - 1, 0)
        self._last_commit = time.monotonic()
        self._changed = False

    @property
    def manifest(self) -> Manifest:
        """What the store says about itself, with what the next commit will add."""
        return self._state.manifest

    @property
    def rows(self) -> int:
        """Rows that are confirmed: they are there after a crash."""
        return sum(shard.rows for shard in self.manifest.shards)

    @property
    def checkpoint(self) -> Checkpoint | None:
        """The checkpoint that rows are appended to."""
        found = self.manifest.checkpoints
        return found[self._checkpoint] if found else None

    @property
    def left_out(self) -> set[int | str]:
        """Ids of the current checkpoint that were left out."""
        return {id_ for index, id_ in self.manifest.skipped if index == self._checkpoint}

    def set_checkpoint(self, checkpoint: Checkpoint) -> Checkpoint:
        """Appends to this checkpoint from now on; to the one of its name if there is one.

        Raises:
            CheckpointError: If the one there is has another learning rate.
        """
        names = [each.name for each in self.manifest.checkpoints]
        if checkpoint.name in names:
            found = self.manifest.checkpoints[names.index(checkpoint.name)]
            if found.learning_rate != checkpoint.learning_rate:
                raise CheckpointError(
                    f"learning_rate must be {found.learning_rate} as checkpoint {found.name!r} "
                    f"has, got {checkpoint.learning_rate}"
                )
        self.commit()
        if checkpoint.name in names:
            self._checkpoint = names.index(checkpoint.name)
        else:
            self.manifest.checkpoints.append(checkpoint)
            self._known.append(_KnownIds([]))
            self._checkpoint = len(names)
        return self.manifest.checkpoints[self._checkpoint]

    def write_map(
        self, identity: dict[str, Any], described: Any, arrays: dict[str, NDArray[Any]]
    ) -> StoredMap:
        """Writes a map of rows into the store, for a checkpoint to name.

        Raises:
            StoreError: If it cannot.
        """
        return write_map(self.path, next_number(self.path), identity, described, arrays)

    def has(self, ids: Ids) -> NDArray[np.bool_]:
        """[ids] whether each is recorded in the current checkpoint, confirmed or waiting.

        Raises:
            IdError: If they are not of the store's kind.
        """
        kind = _arrays.kind_of_array(ids)
        if self.manifest.ids not in (None, kind):
            raise IdError(f"ids must be {self.manifest.ids} as in the store, got {kind}")
        if not self._known:
            return np.zeros(len(ids), np.bool_)
        return self._known[self._checkpoint].has(ids)

    def check_columns(self, columns: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """The columns, in the order and types that the first batch fixed.

        Raises:
            ArgumentError: If a column is missing, or was not there in the first batch.
            DtypeError: If a column is of another type.
        """
        wanted = self.manifest.columns
        if wanted is None:
            return columns
        if set(columns) != set(wanted):
            raise ArgumentError(
                f"columns must be {sorted(wanted)} as in the first batch, got {sorted(columns)}"
            )
        found = {}
        for name, there in wanted.items():
            kind = _arrays.kind_of_array(columns[name])
            if kind != there and not (kind == "int64" and there == "float64"):
                raise DtypeError(f"{name} must be {there} as in the first batch, got {kind}")
            found[name] = columns[name].astype(np.float64) if kind != there else columns[name]
        return found

    def append(
        self,
        ids: Ids,
        rows: NDArray[np.float32],
        columns: dict[str, NDArray[Any]],
        scales: NDArray[np.float32] | None = None,
    ) -> None:
        """Takes rows of the current checkpoint; commits now and then.

        Args:
            ids: [rows] new ids.
            rows: [rows, dim] finite values of finite norm.
            columns: [rows] each, as `check_columns` returned them.
            scales: [rows] what the rows are to be multiplied with, if they are scaled already.

        Raises:
            NotFiniteError: If a value, or the norm of a row, is not finite.
        """
        if not len(ids):
            return
        dtype, errors = self.manifest.dtype, None
        if scales is not None:
            stored = rows.astype(dtype, copy=False)
        elif self.manifest.is_quantised:
            stored, scales, errors = _core.quantise(rows, BITS[dtype])
        else:
            stored, scales = _core.encode(rows, dtype == "float16")
        if self.manifest.ids is None:
            self.manifest.ids = _arrays.kind_of_array(ids)
        if self.manifest.columns is None:
            kinds = {name: _arrays.kind_of_array(column) for name, column in columns.items()}
            self.manifest.columns = kinds
        stored = self._kept(stored)
        # Known first: an interrupt here loses the rows, as any before the commit does; the other
        # way round it would let them in twice.
        self._known[self._checkpoint].add(ids)
        self._state = replace(
            self._state, waiting=(*self._state.waiting, (ids, stored, scales, errors, columns))
        )
        self._waiting_bytes += stored.nbytes
        elapsed = time.monotonic() - self._last_commit
        if self._waiting_bytes >= SHARD_BYTES or elapsed >= COMMIT_SECONDS:
            self.commit()

    def _kept(self, stored: NDArray[Any]) -> NDArray[Any]:
        """A copy in memory that serves again after every commit; itself, where there is no room.

        Fresh memory for each batch costs several times what the copy does.
        """
        if not self._state.waiting:
            self._taken = 0
        place = self._memory[self._taken : self._taken + stored.nbytes]
        if place.nbytes < stored.nbytes:
            return stored
        self._taken += stored.nbytes  # at once: an interrupt wastes the place, and no more
        found = place.view(stored.dtype).reshape(stored.shape)
        found[:] = stored
        return found

    def skip(self, ids: Ids) -> None:
        """Notes ids that were left out because their gradient is not finite."""
        if self.manifest.ids is None:
            self.manifest.ids = _arrays.kind_of_array(ids)
        noted = self.left_out
        for id_ in ids.tolist():
            if id_ not in noted:
                self.manifest.skipped.append((self._checkpoint, id_))
        self._changed = True

    def touch(self) -> None:
        """Says that the manifest has changed, so that the next commit writes it."""
        self._changed = True

    def commit(self) -> None:
        """Confirms all rows taken so far: when it returns, a crash or power cut keeps them.

        Raises:
            StoreError: If it cannot; the rows stay in memory, and the next commit tries again.
        """
        self._settle()
        if not self._state.waiting and not self._changed:
            return
        before = self._state
        shards = list(before.manifest.shards)
        if before.waiting:
            with store_errors(self.path):
                shards.append(self._write_shard(before.waiting))
        self._attempt = (before.number + 1, shards, len(before.waiting))
        replace(before.manifest, shards=shards).save(self.path, before.number + 1)
        self._settle()
        Manifest.prune(self.path, self._state.number)

    def close(self) -> None:
        """Commits and lets go of the store."""
        try:
            self.commit()
        finally:
            self._lock.close()

    def _settle(self) -> None:
        """Takes over the last attempt to commit, if its manifest is there.

        An attempt can fail, or be interrupted, after its manifest has appeared: then its rows are
        confirmed, and must not be committed again.
        """
        number, shards, covered = self._attempt
        state = self._state
        if number <= state.number or not Manifest.path(self.path, number).exists():
            return
        self._state = _State(
            replace(state.manifest, shards=shards), number, state.waiting[covered:]
        )
        self._waiting_bytes = sum(stored.nbytes for _, stored, *_ in self._state.waiting)
        self._changed = False
        self._last_commit = time.monotonic()

    def _write_shard(self, waiting: tuple[_Batch, ...]) -> Shard:
        """Writes rows to a folder of a name that was never used."""
        name = f"shard-{self._next_shard:08}"
        self._next_shard += 1
        folder = self.path / name
        folder.mkdir()
        ids, stored, scales, errors, columns = zip(*waiting, strict=True)
        files: dict[str, Written] = {
            "rows.npy": write_array(folder / "rows.npy", *stored),
            "scales.npy": write_array(folder / "scales.npy", np.concatenate(scales)),
        }
        files |= _write_column(folder, "ids", np.concatenate(ids))
        for index, column in enumerate(self.manifest.columns or {}):
            joined = np.concatenate([each[column] for each in columns])
            files |= _write_column(folder, f"column-{index}", joined)
        sync_directory(folder)
        sync_directory(self.path)
        error = None
        if self.manifest.is_quantised:
            error = float(np.concatenate(errors).mean(dtype=np.float64))
        return Shard(name, self._checkpoint, sum(map(len, ids)), files, error)


class _KnownIds:
    """The ids of one checkpoint: sorted runs, merged so that there are few."""

    def __init__(self, parts: Any) -> None:
        parts = list(parts)
        self._runs: list[Ids] = [np.unique(np.concatenate(parts))] if parts else []

    def has(self, ids: Ids) -> NDArray[np.bool_]:
        found = np.zeros(len(ids), np.bool_)
        numbers = ids.dtype.kind == "i" and len(ids) > 0
        first, last = (ids.min(), ids.max()) if numbers else (None, None)
        for run in self._runs:
            if numbers and (run[-1] < first or last < run[0]):  # as where a loop counts up
                continue
            at = np.searchsorted(run, ids).clip(max=len(run) - 1)
            found |= run[at] == ids
        return found

    def add(self, ids: Ids) -> None:
        self._runs.append(np.sort(ids))
        while len(self._runs) > 1 and len(self._runs[-2]) < 2 * len(self._runs[-1]):
            last = self._runs.pop()
            self._runs[-1] = np.sort(np.concatenate([self._runs[-1], last]))


def _write_column(folder: Path, stem: str, column: NDArray[Any]) -> dict[str, Written]:
    if _arrays.kind_of_array(column) == "str":
        return write_strings(folder, stem, column)
    return {f"{stem}.npy": write_array(folder / f"{stem}.npy", column)}


def _check_empty(path: Path) -> None:
    """Nothing, if a folder without a manifest may become a store.

    Raises:
        StoreError: If it holds something else, or rows that no manifest names, which a later
            manifest may.
    """
    names = sorted(each.name for each in path.iterdir())
    strangers = [name for name in names if not name.startswith(_OURS)]
    if strangers:
        raise StoreError(
            f"path must be a store or an empty folder, got {path} with {strangers[0]!r} in it"
        )
    if _last_shard(path) > 1:  # a writer that was killed in its first commit leaves one
        raise StoreError(
            f"path must be a store with its manifest, got {path} with rows that no manifest names"
        )


def _last_shard(path: Path) -> int:
    """The highest number of a shard's folder, named in a manifest or left by a killed writer."""
    with store_errors(path):
        numbers = [each.name.removeprefix("shard-") for each in path.iterdir()]
    return max((int(number) for number in numbers if number.isdecimal()), default=0)


def _check_same(path: Path, found: Manifest, wanted: Manifest) -> None:
    """Nothing, if a store is what a recording wants it to be.

    Raises:
        MismatchError: If it is not; says in what.
    """
    for name in ["layout", *found.sketch, *wanted.sketch]:
        there, here = (
            repr(each.sketch[name]) if name in each.sketch else "the default"
            for each in (found, wanted)
        )
        if here != there:
            raise MismatchError(f"{name} must be {there} as in the store {path}, got {here}")
    if wanted.dtype not in DTYPES or found.dtype != wanted.dtype:
        raise MismatchError(
            f"dtype must be {found.dtype!r} as in the store {path}, got {wanted.dtype!r}"
        )
    if found.reduction != wanted.reduction:
        raise MismatchError(
            f"reduction must be {found.reduction!r} as in the store {path}, "
            f"got {wanted.reduction!r}"
        )
    if found.rows != wanted.rows:
        raise MismatchError(
            f"rows must be {found.rows} as in the store {path}, got {wanted.rows}: stores of "
            "whence.record and of whence.record_checkpoints do not mix"
        )
    check_model(path, found, wanted.model)


def check_model(path: Path, found: Manifest, model: dict[str, Any]) -> None:
    """Nothing, if the model has the structure that the store was recorded with.

    Raises:
        MismatchError: If it has not; names the first difference.
    """
    if found.model["digest"] == model["digest"]:
        return
    there = {each["name"]: each for each in found.model["parameters"]}
    here = {each["name"]: each for each in model["parameters"]}
    what = "the same parameters in other layers"
    for name in [*there, *here]:
        if there.get(name) != here.get(name):
            what = f"{_describe(name, here.get(name))} where the store has " + (
                _describe(name, there.get(name))
            )
            break
    raise MismatchError(f"model must be that of the store {path}, got {what}")


def _describe(name: str, parameter: dict[str, Any] | None) -> str:
    if parameter is None:
        return f"no {name}"
    return f"{name} of shape {parameter['shape']} in {parameter['kind']}"
