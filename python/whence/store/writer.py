"""Appending rows to a store."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from whence import _core
from whence._arrays import Ids
from whence.errors import ArgumentError, DtypeError, IdError, MismatchError, StoreError
from whence.store.files import Written, store_errors, sync_directory, write_array, write_strings
from whence.store.lock import Lock
from whence.store.manifest import DTYPES, Checkpoint, Manifest, Shard
from whence.store.reader import read_ids

SHARD_BYTES = 64 << 20
"""Rows are committed at the latest when this many bytes of them wait."""

COMMIT_SECONDS = 10.0
"""... or when so much time has passed since the last commit."""


class Writer:
    """The one writer of a store.

    Args:
        path: The store's folder; made if it is not there.
        wanted: What a new store is to be; an existing one must agree in sketch, dtype, reduction
            and model.

    Raises:
        LockedError: If another writer has it open.
        MismatchError: If the store is of another model, sketch or setting.
        StoreError: If `path` is a file, a folder of something else, damaged, or not writable.
    """

    def __init__(self, path: Path, wanted: Manifest) -> None:
        self.path = path
        with store_errors(path):
            if path.exists() and not path.is_dir():
                raise StoreError(f"path must be a folder, got the file {path}")
            exists = Manifest.exists(path)
            if not exists and path.is_dir():
                strangers = [each.name for each in path.iterdir() if not _ours(each.name)]
                if strangers:
                    raise StoreError(
                        f"path must be a store or an empty folder, got {path} "
                        f"with {min(strangers)!r} in it"
                    )
            path.mkdir(parents=True, exist_ok=True)
        self._lock = Lock(path)
        try:
            self.manifest, self._number = (
                Manifest.load(path) if Manifest.exists(path) else (wanted, 0)
            )
            if self._number:
                _check_same(path, self.manifest, wanted)
            self._remove_strays()
            self._known = [
                _KnownIds(
                    read_ids(path, shard, self.manifest)
                    for shard in self.manifest.shards
                    if shard.checkpoint == index
                )
                for index in range(len(self.manifest.checkpoints))
            ]
        except BaseException:
            self._lock.close()
            raise
        self._waiting: list[tuple[Ids, NDArray[Any], NDArray[np.float32], dict[str, Any]]] = []
        self._waiting_bytes = 0
        self._checkpoint = max(len(self.manifest.checkpoints) - 1, 0)
        self._last_commit = time.monotonic()
        self._changed = False

    @property
    def rows(self) -> int:
        """Rows that are confirmed: they are there after a crash."""
        return sum(shard.rows for shard in self.manifest.shards)

    @property
    def checkpoint(self) -> Checkpoint | None:
        """The checkpoint that rows are appended to."""
        found = self.manifest.checkpoints
        return found[self._checkpoint] if found else None

    def set_checkpoint(self, checkpoint: Checkpoint) -> Checkpoint:
        """Appends to this checkpoint from now on; to the one of its name if there is one."""
        self.commit()
        names = [each.name for each in self.manifest.checkpoints]
        if checkpoint.name in names:
            self._checkpoint = names.index(checkpoint.name)
        else:
            self.manifest.checkpoints.append(checkpoint)
            self._known.append(_KnownIds([]))
            self._checkpoint = len(names)
        return self.manifest.checkpoints[self._checkpoint]

    def has(self, ids: Ids) -> NDArray[np.bool_]:
        """[ids] whether each is recorded in the current checkpoint, confirmed or waiting."""
        self.check_ids(ids)
        if not self._known:
            return np.zeros(len(ids), np.bool_)
        return self._known[self._checkpoint].has(ids)

    def check_ids(self, ids: Ids) -> None:
        """Nothing, if the ids are of the store's kind.

        Raises:
            IdError: If they are not.
        """
        kind = "str" if ids.dtype.kind == "U" else "int64"
        if self.manifest.ids not in (None, kind):
            raise IdError(f"ids must be {self.manifest.ids} as in the store, got {kind}")

    def check_columns(self, columns: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """The columns, in the types that the first batch fixed.

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
        for name, column in columns.items():
            kind = column_kind(column)
            if kind == "int64" and wanted[name] == "float64":
                column = column.astype(np.float64)
            elif kind != wanted[name]:
                raise DtypeError(f"{name} must be {wanted[name]} as in the first batch, got {kind}")
            found[name] = column
        return found

    def append(self, ids: Ids, rows: NDArray[np.float32], columns: dict[str, NDArray[Any]]) -> None:
        """Takes rows of the current checkpoint; commits now and then.

        Args:
            ids: [rows] new ids.
            rows: [rows, dim] finite values.
            columns: [rows] each.
        """
        if not len(ids):
            return
        columns = self.check_columns(columns)
        self.check_ids(ids)
        stored, scales = _core.encode(rows, self.manifest.dtype == "float16")
        self.manifest.ids = "str" if ids.dtype.kind == "U" else "int64"
        self.manifest.columns = {name: column_kind(column) for name, column in columns.items()}
        self._known[self._checkpoint].add(ids)
        self._waiting.append((ids, stored, scales, columns))
        self._waiting_bytes += stored.nbytes
        elapsed = time.monotonic() - self._last_commit
        if self._waiting_bytes >= SHARD_BYTES or elapsed >= COMMIT_SECONDS:
            self.commit()

    def skip(self, ids: Ids) -> None:
        """Notes ids that were left out because their gradient is not finite."""
        self.manifest.ids = "str" if ids.dtype.kind == "U" else "int64"
        noted = set(self.manifest.skipped)
        for id_ in ids.tolist():
            if (self._checkpoint, id_) not in noted:
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
        if not self._waiting and not self._changed:
            return
        if self._waiting:
            with store_errors(self.path):
                shard = self._write_shard()
            self.manifest.shards.append(shard)
        try:
            self.manifest.save(self.path, self._number + 1)
        except BaseException:
            if self._waiting:
                self.manifest.shards.pop()
            raise
        self._number += 1
        self._waiting, self._waiting_bytes, self._changed = [], 0, False
        self._last_commit = time.monotonic()

    def close(self) -> None:
        """Commits and lets go of the store."""
        try:
            self.commit()
        finally:
            self._lock.close()

    def _write_shard(self) -> Shard:
        taken = {shard.name for shard in self.manifest.shards}
        number = 1 + max((int(name.removeprefix("shard-")) for name in taken), default=0)
        name = f"shard-{number:08}"
        folder = self.path / name
        if folder.exists():
            shutil.rmtree(folder)  # left by a commit that failed
        folder.mkdir()
        ids, stored, scales, columns = zip(*self._waiting, strict=True)
        files: dict[str, Written] = {
            "rows.npy": write_array(folder / "rows.npy", np.concatenate(stored)),
            "scales.npy": write_array(folder / "scales.npy", np.concatenate(scales)),
        }
        files |= _write_column(folder, "ids", np.concatenate(ids))
        for index, column in enumerate(self.manifest.columns or {}):
            joined = np.concatenate([each[column] for each in columns])
            files |= _write_column(folder, f"column-{index}", joined)
        sync_directory(folder)
        sync_directory(self.path)
        return Shard(name, self._checkpoint, sum(map(len, ids)), files)

    def _remove_strays(self) -> None:
        """Removes what a killed writer left: shards and manifests that were never confirmed."""
        known = {shard.name for shard in self.manifest.shards}
        with store_errors(self.path):
            for path in self.path.iterdir():
                if path.name.startswith("shard-") and path.name not in known and path.is_dir():
                    shutil.rmtree(path)
                elif path.name.startswith("manifest-") and path.suffix == ".part":
                    path.unlink()


class _KnownIds:
    """The ids of one checkpoint: sorted runs, merged so that there are few."""

    def __init__(self, parts: Any) -> None:
        parts = list(parts)
        self._runs: list[Ids] = [np.unique(np.concatenate(parts))] if parts else []

    def has(self, ids: Ids) -> NDArray[np.bool_]:
        found = np.zeros(len(ids), np.bool_)
        for run in self._runs:
            at = np.searchsorted(run, ids).clip(max=len(run) - 1)
            found |= run[at] == ids
        return found

    def add(self, ids: Ids) -> None:
        self._runs.append(np.sort(ids))
        while len(self._runs) > 1 and len(self._runs[-2]) < 2 * len(self._runs[-1]):
            last = self._runs.pop()
            self._runs[-1] = np.sort(np.concatenate([self._runs[-1], last]))


def column_kind(column: NDArray[Any]) -> str:
    """The manifest's word for the type of a column."""
    return {"b": "bool", "i": "int64", "f": "float64", "U": "str"}[column.dtype.kind]


def _write_column(folder: Path, stem: str, column: NDArray[Any]) -> dict[str, Written]:
    if column.dtype.kind == "U":
        return write_strings(folder, stem, column)
    return {f"{stem}.npy": write_array(folder / f"{stem}.npy", column)}


def _ours(name: str) -> bool:
    return name == "lock" or name.startswith(("shard-", "manifest-"))


def _check_same(path: Path, found: Manifest, wanted: Manifest) -> None:
    """Nothing, if a store is what a recording wants it to be.

    Raises:
        MismatchError: If it is not; says in what.
    """
    for name, there in found.sketch.items():
        if wanted.sketch.get(name) != there:
            raise MismatchError(
                f"{name} must be {there!r} as in the store {path}, got {wanted.sketch.get(name)!r}"
            )
    if wanted.dtype not in DTYPES or found.dtype != wanted.dtype:
        raise MismatchError(
            f"dtype must be {found.dtype!r} as in the store {path}, got {wanted.dtype!r}"
        )
    if found.reduction != wanted.reduction:
        raise MismatchError(
            f"reduction must be {found.reduction!r} as in the store {path}, "
            f"got {wanted.reduction!r}"
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
