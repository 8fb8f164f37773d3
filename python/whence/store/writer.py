"""Appending rows to a store."""

from __future__ import annotations

import contextlib
import math
import os
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from whence import _arrays, _core
from whence._arrays import MAX_ID, Ids
from whence._background import Background
from whence._interrupts import interruptible
from whence.errors import (
    ArgumentError,
    CheckpointError,
    DtypeError,
    IdError,
    MismatchError,
    StoreError,
)
from whence.store.files import store_errors, sync_directory
from whence.store.gone import GONE, gone_files, keys, write_gone
from whence.store.lock import Lock
from whence.store.manifest import BITS, DTYPES, KEPT, MARKER, Checkpoint, Manifest
from whence.store.maps import PREFIX as MAP
from whence.store.maps import StoredMap, write_map
from whence.store.members import PREFIX as MEMBER
from whence.store.members import check_writer, member_of, members, writer_of
from whence.store.reader import read_ids
from whence.store.shards import PACK, SHARD, Description, Shard, ShardWriter, last_number

SHARD_BYTES = 64 << 20
"""Rows are committed at the latest when this many bytes of them wait."""

AHEAD_BYTES = 4 << 20
"""... and go to their file whenever so many are not in it, while others are computed."""

COMMIT_SECONDS = 10.0
"""... or when so much time has passed since the last commit."""

OURS = (SHARD, MAP, PACK, GONE, MARKER, MEMBER, "manifest-", "lock")
"""How the names in a store begin; those with a point in front are nobody's."""


_Floats = NDArray[np.float32]
_Batch = tuple[Ids, NDArray[Any], _Floats, _Floats | None, dict[str, Any]]
_NONE = np.empty((0, 2), np.int64)


@dataclass(frozen=True)
class _State:
    """What is confirmed, and what waits; replaced whole, so that an interrupt finds it whole.

    Attributes:
        manifest: As last committed, but for what later rows will add.
        number: Of the manifest on disk; 0 if there is none.
        waiting: (ids, stored rows, scales, errors, columns) of batches that are not confirmed.
        gone: [rows, 2] shard and row of what is gone, confirmed.
        going: The same of what the next commit will let go, in parts.
    """

    manifest: Manifest
    number: int
    waiting: tuple[_Batch, ...] = ()
    gone: NDArray[np.int64] = field(default_factory=lambda: _NONE)
    going: tuple[NDArray[np.int64], ...] = ()


@dataclass(frozen=True)
class _Attempt:
    """A commit that was begun: what is confirmed if its manifest is there.

    Attributes:
        number: Of the manifest.
        manifest: Itself.
        gone: As in `_State`.
        waiting: How many of the batches that wait are in it.
        going: How many of the parts that are to go.
        changes: How many changes of what the store says about itself.
    """

    number: int
    manifest: Manifest
    gone: NDArray[np.int64]
    waiting: int
    going: int
    changes: int


class Writer:
    """The one writer of a store.

    Args:
        path: The store's folder; made if it is not there.
        wanted: What a new store is to be; an existing one must agree in sketch, dtype, reduction
            and model. None for whatever is there.
        writer: Of a store of several writers, which of them: "3/8" for the third of eight; or the
            name of its folder.

    Raises:
        ArgumentError: If the type of its rows is not known, or `writer` is none.
        LockedError: If another writer has it open.
        MismatchError: If the store is of another model, sketch or setting.
        StoreError: If `path` is a file, a folder of something else, damaged, or not writable; or
            is of one writer where several are meant, or the other way round.
    """

    def __init__(self, path: Path, wanted: Manifest | None, writer: str | None = None) -> None:
        path = _arrays.path("path", path)
        if wanted is not None:
            _arrays.choice("dtype", wanted.dtype, DTYPES)
        with store_errors(path):
            if path.exists() and not path.is_dir():
                raise StoreError(f"path must be a folder, got the file {path}")
            self.path = path = _own_folder(path, writer)
            if path.is_symlink() and not path.exists():
                raise StoreError(f"path must be a folder, got the link to nothing {path}")
            if wanted is not None:
                path.mkdir(parents=True, exist_ok=True)
                sync_directory(path.parent)
        if wanted is None:
            Manifest.load(path)  # or says what is there
        self._lock = Lock(path)
        try:
            if Manifest.exists(path):
                manifest, number = Manifest.load(path)
                if writer is not None:
                    check_writer(path, manifest)
                gone = _NONE if manifest.gone is None else manifest.gone.read(path)
                self._state = _State(manifest, number, gone=gone)
                if wanted is not None:
                    _check_same(path, manifest, wanted)
            elif wanted is not None:
                named = None if writer is None else writer_of(member_of(writer))
                self._state = _State(replace(wanted, writer=named), 0)
            self._next_shard = 1 + last_number(path, SHARD)
            self._known = [
                _KnownIds(
                    self._kept_ids(shard)
                    for shard in self.manifest.shards
                    if shard.checkpoint == index
                )
                for index in range(len(self.manifest.row_sets))
            ]
            Manifest.settle(path, self._state.number, every=True)
        except BaseException:
            self._lock.close()
            raise
        self._ids: dict[str, _ShardIds] = {}
        # Files of rows that are gone before those of today, by the commit that wrote others.
        self._superseded = [
            (self._state.number, each.name)
            for each in gone_files(path)
            if self.manifest.gone is None or each.name != self.manifest.gone.name
        ]
        self._attempt: _Attempt | None = None
        self._waiting_bytes = 0
        # Where waiting rows lie, and how many bytes of it are taken.
        self._memory, self._taken = np.empty(SHARD_BYTES, np.uint8), 0
        # The shard that waiting rows are written to before their commit, and how many batches are.
        self._ahead: ShardWriter | None = None
        self._written, self._written_bytes = 0, 0
        self._background = Background()
        self._checkpoint = max(len(self.manifest.row_sets) - 1, 0)
        self._last_commit = time.monotonic()
        # Changes of what the store says about itself: all, and those that are confirmed.
        self._changes = self._confirmed_changes = 0

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
            StoreError: If it cannot; as `commit`.
        """
        self._check()
        return write_map(self.path, 1 + last_number(self.path, MAP), identity, described, arrays)

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
        first = "first batch of the store"
        if set(columns) != set(wanted):
            raise ArgumentError(
                f"columns must be {sorted(wanted)} as in the {first}, got {sorted(columns)}"
            )
        found = {}
        for name, there in wanted.items():
            kind = _arrays.kind_of_array(columns[name])
            if kind != there and not (kind == "int64" and there == "float64"):
                raise DtypeError(f"{name} must be {there} as in the {first}, got {kind}")
            found[name] = columns[name].astype(np.float64) if kind != there else columns[name]
        return found

    def append(
        self,
        ids: Ids,
        rows: NDArray[np.float32],
        columns: dict[str, NDArray[Any]],
        scales: NDArray[np.float32] | None = None,
        *,
        replaces: bool = False,
    ) -> None:
        """Takes rows of the current checkpoint; commits now and then.

        Args:
            ids: [rows] new ids; or with `replaces` also such as are there.
            rows: [rows, dim] finite values of finite norm.
            columns: [rows] each, as `check_columns` returned them.
            scales: [rows] what the rows are to be multiplied with, if they are scaled already.
            replaces: Whether rows of ids that are there take the place of those, in one commit.

        Raises:
            IdError: If an id is longer than `_arrays.MAX_ID`: no reader would take it.
            NotFiniteError: If a value, or the norm of a row, is not finite.
            StoreError: If a commit that is due fails; as `commit`.
        """
        self._check()
        if not len(ids):
            return
        if ids.dtype.kind == "U" and (longest := int(np.char.str_len(ids).max())) > MAX_ID:
            raise IdError(f"ids must be at most {MAX_ID} characters long, got one of {longest}")
        going = self._rows_of(ids, self._checkpoint) if replaces else _NONE
        dtype, errors = self.manifest.dtype, None
        if scales is not None:
            stored = self._kept(rows.astype(dtype, copy=False))
        elif self.manifest.is_quantised:
            packed, scales, errors = _core.quantise(rows, BITS[dtype])
            stored = self._kept(packed)
        else:
            stored = self._place(rows.shape, DTYPES[dtype])
            scales = _core.encode(rows, stored)
        if self.manifest.ids is None:
            self.manifest.ids = _arrays.kind_of_array(ids)
        if self.manifest.columns is None:
            kinds = {name: _arrays.kind_of_array(column) for name, column in columns.items()}
            self.manifest.columns = kinds
        self._taken += stored.nbytes  # before it waits: an interrupt wastes the place, and no more
        # Known first: an interrupt here loses the rows, as any before the commit does; the other
        # way round it would let them in twice.
        known = self._known[self._checkpoint]
        new = ids[~known.has(ids)] if len(going) else ids
        if len(new):
            known.add(new)
        manifest = self.manifest
        if manifest.skipped:  # who was left out before is not any more
            now = {(self._checkpoint, id_) for id_ in ids.tolist()}
            left = [each for each in manifest.skipped if each not in now]
            manifest = replace(manifest, skipped=left)
        self._state = replace(
            self._state,
            manifest=manifest,
            waiting=(*self._state.waiting, (ids, stored, scales, errors, columns)),
            going=(*self._state.going, going) if len(going) else self._state.going,
        )
        self._waiting_bytes += stored.nbytes
        elapsed = time.monotonic() - self._last_commit
        if self._waiting_bytes >= SHARD_BYTES or elapsed >= COMMIT_SECONDS:
            self.commit()
        elif self._waiting_bytes - self._written_bytes >= AHEAD_BYTES:
            self._write_ahead()

    @property
    def gone(self) -> NDArray[np.int64]:
        """[rows, 2] shard and row of what was deleted or replaced, in order."""
        return self._state.gone

    def holds(self, ids: Ids) -> NDArray[np.bool_]:
        """[ids] whether each has a row at a checkpoint, or is noted as left out.

        Raises:
            IdError: If they are not of the store's kind.
        """
        noted = {id_ for _, id_ in self.manifest.skipped}
        found = np.array([id_ in noted for id_ in ids.tolist()], np.bool_)
        if self._known:
            self.has(ids)  # checks the kind
        for known in self._known:
            found |= known.has(ids)
        return found

    def delete(self, ids: Ids) -> int:
        """Lets rows of all checkpoints go, with the next commit; their bytes with `compact`.

        Ids that are noted as left out are no longer noted.

        Returns:
            How many rows.

        Raises:
            IdError: If an id is nowhere in the store.
            StoreError: If waiting rows cannot be committed.
        """
        self.commit()
        found = [self._rows_of(ids, index) for index in range(len(self._known))]
        asked, there = set(ids.tolist()), self.holds(ids)
        if not there.all():
            raise IdError(f"ids must be in the store, got {ids[~there][0].item()!r}")
        skipped = [(at, id_) for at, id_ in self.manifest.skipped if id_ not in asked]
        manifest = replace(self._state.manifest, skipped=skipped)
        self._state = replace(self._state, manifest=manifest, going=tuple(found))
        self._changes += 1
        for known in self._known:
            known.drop(ids)
        return sum(map(len, found))

    def _rows_of(self, ids: Ids, checkpoint: int) -> NDArray[np.int64]:
        """[rows, 2] where the rows of these ids are at a checkpoint, of those that have one."""
        there = ids[self._known[checkpoint].has(ids)] if self._known else ids[:0]
        found = self._confirmed(there, checkpoint)
        if len(found) < len(there):  # the others wait, and are in no shard yet
            self.commit()
            found = self._confirmed(there, checkpoint)
        return found

    def _confirmed(self, ids: Ids, checkpoint: int) -> NDArray[np.int64]:
        """[rows, 2] where the rows of these ids are, of those in a shard that are not to go."""
        found = [_NONE]
        if len(ids):
            for shard in self.manifest.shards:
                if shard.checkpoint == checkpoint:
                    rows = self._shard_ids(shard).rows_of(ids)
                    found.append(np.column_stack([np.full(len(rows), shard.number), rows]))
        places = np.concatenate(found)
        hidden = keys(np.concatenate([self._state.gone, *self._state.going]))
        return places[~np.isin(keys(places), hidden)]

    def _shard_ids(self, shard: Shard) -> _ShardIds:
        if shard.name not in self._ids:
            self._ids[shard.name] = _ShardIds(self._read_ids(shard))
        return self._ids[shard.name]

    def _read_ids(self, shard: Shard) -> Ids:
        described = Description.read(self.path, shard)
        return read_ids(shard.folder(self.path), described, self.manifest)

    def _kept_ids(self, shard: Shard) -> Ids:
        """The ids of a shard's rows that are not gone."""
        ids = self._read_ids(shard)
        keep = np.ones(len(ids), np.bool_)
        gone = self._state.gone
        rows = gone[slice(*np.searchsorted(gone[:, 0], [shard.number, shard.number + 1])), 1]
        keep[rows[rows < len(keep)]] = False
        return ids[keep]

    def _place(self, shape: tuple[int, ...], kind: str) -> NDArray[Any]:
        """Where a batch's rows are to lie: in memory that serves again after every commit.

        Fresh memory for each batch, where there is no room, costs more than filling it.
        """
        if not self._state.waiting:
            self._taken = 0
        size = math.prod(shape) * np.dtype(kind).itemsize
        place = self._memory[self._taken : self._taken + size]
        if place.nbytes < size:
            return np.empty(shape, kind)
        return place.view(kind).reshape(shape)

    def _kept(self, stored: NDArray[Any]) -> NDArray[Any]:
        """A copy there."""
        found = self._place(stored.shape, stored.dtype.str)
        found[:] = stored
        return found

    def skip(self, ids: Ids, *, replaces: bool = False) -> None:
        """Notes ids that were left out because their gradient is not finite.

        Args:
            ids: [ids] new ids; or with `replaces` also such as are there.
            replaces: Whether rows of ids that are there go, with the next commit.

        Raises:
            StoreError: If waiting rows cannot be committed; as `commit`.
        """
        self._check()
        if self.manifest.ids is None:
            self.manifest.ids = _arrays.kind_of_array(ids)
        if replaces:
            going = self._rows_of(ids, self._checkpoint)
            if len(going):
                self._state = replace(self._state, going=(*self._state.going, going))
                self._known[self._checkpoint].drop(ids)
        noted = self.left_out
        for id_ in ids.tolist():
            if id_ not in noted:
                self.manifest.skipped.append((self._checkpoint, id_))
        self._changes += 1

    def touch(self) -> None:
        """Says that the manifest has changed, so that the next commit writes it."""
        self._changes += 1

    def commit(self) -> None:
        """Confirms all rows taken so far: when it returns, a crash or power cut keeps them.

        Raises:
            StoreError: If it cannot; the rows stay in memory, and the next commit tries again.
                Also in a process that was forked, and where the store's folder was exchanged.
        """
        self._check()
        self._settle(again=True)
        before = self._state
        changed = self._changes > self._confirmed_changes
        if not before.waiting and not before.going and not changed:
            return
        number = before.number + 1
        shards, gone, named = list(before.manifest.shards), before.gone, before.manifest.gone
        if before.waiting:
            with store_errors(self.path):
                shards.append(self._write_shard(before.waiting))
        if before.going:
            gone = np.unique(np.concatenate([gone, *before.going]), axis=0)
            named = write_gone(self.path, number, gone)
            here = named.name if named else ""  # which a killed writer may have left before
            self._superseded = [each for each in self._superseded if each[1] != here]
        manifest = replace(before.manifest, shards=shards, gone=named)
        self._confirm(manifest, gone, len(before.waiting), len(before.going))
        Manifest.settle(self.path, number)
        if before.manifest.gone is not None and named is not before.manifest.gone:
            self._superseded.append((number, before.manifest.gone.name))
        # Those that an older manifest names stay with it: what was deleted must not come back if
        # `repair` has to go back to that.
        with contextlib.suppress(OSError):
            while self._superseded and self._superseded[0][0] <= number - KEPT:
                (self.path / self._superseded[0][1]).unlink(missing_ok=True)
                del self._superseded[0]

    def replace_shards(self, shards: list[Shard]) -> None:
        """Commits other shards in the place of all: what `compact` and `repair` have written.

        Nothing is gone from them. What was confirmed before is removed from the disk.

        Raises:
            StoreError: If it cannot; the store is then as it was. As `commit`.
        """
        self._check()
        self._settle(again=True)
        named = {shard.name for shard in shards}
        self._confirm(replace(self._state.manifest, shards=shards, packs=[], gone=None), _NONE)
        self._ids = {name: ids for name, ids in self._ids.items() if name in named}
        Manifest.settle(self.path, self._state.number, kept=0, every=True)

    def close(self) -> None:
        """Commits and lets go of the store; in a process that was forked, lets go of it alone."""
        try:
            if self._lock.is_ours:
                self.commit()
        finally:
            self.release()

    def release(self) -> None:
        """Lets go of the store without a commit; for who has changed nothing, or failed."""
        try:
            if self._lock.is_ours:
                self._abandon()
        finally:
            self._lock.close()

    @property
    def is_ours(self) -> bool:
        """Whether this process opened it; one that was forked since cannot write."""
        return self._lock.is_ours

    def _check(self) -> None:
        """Nothing, if this process still is the one writer of the store.

        A child that was forked has a copy of what waits, and would write that a second time. Where
        the folder was moved away, another store may lie in its place.

        Raises:
            StoreError: If it is not.
        """
        if not self._lock.is_ours:
            raise StoreError(
                f"{self.path} must be written by process {self._lock.process}, which opened it, "
                f"got {os.getpid()}, which was forked since"
            )
        if not self._lock.is_in_place:
            raise StoreError(
                f"{self.path} must keep its lock while it is written, got none or another: the "
                "folder was moved, or the lock removed"
            )

    def _confirm(
        self, manifest: Manifest, gone: NDArray[np.int64], waiting: int = 0, going: int = 0
    ) -> None:
        """Commits a manifest; see `_Attempt`.

        Raises:
            StoreError: If it cannot. The manifest may be there nevertheless, which the next commit
                sees.
        """
        number = self._state.number + 1
        self._attempt = _Attempt(number, manifest, gone, waiting, going, self._changes)
        saved = manifest.save(self.path, number)
        self._attempt = replace(self._attempt, manifest=saved)
        self._settle()

    def _settle(self, *, again: bool = False) -> None:
        """Takes over the last attempt to commit, if its manifest is there.

        An attempt can fail, or be interrupted, after its manifest has appeared: then its rows are
        confirmed, and must not be committed again.

        Args:
            again: Whether the attempt has ended so; its manifest is then made durable first.

        Raises:
            StoreError: If it cannot.
        """
        attempt, state = self._attempt, self._state
        if attempt is None or attempt.number <= state.number:
            return
        if not Manifest.path(self.path, attempt.number).exists():
            return
        if again:
            with store_errors(self.path):
                sync_directory(self.path)
            self._abandon()  # what was written ahead since begins with what is confirmed
        found = attempt.manifest
        self._state = _State(
            replace(state.manifest, shards=found.shards, packs=found.packs, gone=found.gone),
            attempt.number,
            state.waiting[attempt.waiting :],
            attempt.gone,
            state.going[attempt.going :],
        )
        self._waiting_bytes = sum(stored.nbytes for _, stored, *_ in self._state.waiting)
        self._confirmed_changes = attempt.changes
        self._last_commit = time.monotonic()

    def _write_ahead(self) -> None:
        """Lets waiting rows go to the file of their shard, as far as they have not, in background.

        The disk then has little left to do when they are committed. They stay in memory too: if
        this fails, the commit writes them again, or says what is wrong.
        """
        try:
            self._background.wait()
            ahead = self._shard()
            waiting = self._state.waiting
            stored = _joined([batch[1] for batch in waiting[self._written :]], self._memory)

            def write() -> None:
                for rows in stored:
                    ahead.append(rows)
                ahead.start()

            self._background.start(write)
            self._written = len(waiting)
            self._written_bytes = self._waiting_bytes
        except StoreError:
            self._abandon()
            self._written_bytes = self._waiting_bytes  # not again for each batch
        except BaseException:
            self._abandon()
            raise

    def _shard(self) -> ShardWriter:
        """The shard that is being written."""
        if self._ahead is None:
            number, manifest = self._next_shard, self.manifest
            if (self.path / f"{SHARD}{number:08}").exists():  # which an interrupt has left
                number = 1 + last_number(self.path, SHARD)
            kind = DTYPES[manifest.dtype]
            self._ahead = ShardWriter(self.path, number, self._checkpoint, kind, manifest.row_width)
            self._next_shard = number + 1
        return self._ahead

    def _shard_of(self, waiting: tuple[_Batch, ...]) -> ShardWriter:
        """The shard that is being written, with the rows of these batches in it."""
        try:
            self._background.wait()
        except StoreError:  # it may be that there is room again
            self._abandon()
        ahead = self._shard()
        for rows in _joined([batch[1] for batch in waiting[self._written :]], self._memory):
            ahead.append(rows)
        return ahead

    def _abandon(self) -> None:
        """Removes the shard that is being written.

        Raises:
            BaseException: What a signal's handler raises meanwhile, once it is removed.
        """
        interrupt: BaseException | None = None
        while self._background.is_busy:  # first: nothing may write to a file that is closed
            try:
                self._background.drain()
            except BaseException as error:
                interrupt = error
        ahead, self._ahead = self._ahead, None
        self._written, self._written_bytes = 0, 0
        if ahead is not None and self._lock.is_in_place:
            ahead.abandon()
        elif ahead is not None:  # what lies there now is not ours to remove
            ahead.close()
        if interrupt is not None:
            raise interrupt

    def _write_shard(self, waiting: tuple[_Batch, ...]) -> Shard:
        """Writes rows to a folder of a name that was never used."""
        ids, _, scales, errors, columns = zip(*waiting, strict=True)
        error = None
        if self.manifest.is_quantised:
            error = float(np.concatenate(errors).mean(dtype=np.float64))
        try:
            shard = self._shard_of(waiting).finish(
                np.concatenate(scales),
                np.concatenate(ids),
                [
                    np.concatenate([each[column] for each in columns])
                    for column in self.manifest.columns or {}
                ],
                error,
            )
            self._ahead, self._written, self._written_bytes = None, 0, 0
        except BaseException:
            self._abandon()
            raise
        return shard


def _joined(parts: list[NDArray[Any]], memory: NDArray[np.uint8]) -> list[NDArray[Any]]:
    """Rows, those that follow each other in `memory` as one array: a file takes many at a time."""
    begin = memory.__array_interface__["data"][0]
    runs: list[list[int]] = []  # where each begins and ends there
    found: list[NDArray[Any]] = []
    for part in parts:
        first = part.__array_interface__["data"][0] - begin
        inside = first >= 0 and first + part.nbytes <= len(memory)
        if inside and found and runs[-1][1] == first:
            runs[-1][1] += part.nbytes
            rows = memory[slice(*runs[-1])].view(part.dtype).reshape(-1, *part.shape[1:])
            found[-1] = rows
        else:
            found.append(part)
            runs.append([first, first + part.nbytes] if inside else [-1, -1])
    return found


class _ShardIds:
    """The ids of a shard, found by id."""

    def __init__(self, ids: Ids) -> None:
        self._order = interruptible(np.argsort, ids, kind="stable")
        self._ordered = ids[self._order]

    def rows_of(self, ids: Ids) -> NDArray[np.int64]:
        """The rows of those of `ids` that are here."""
        ordered = self._ordered
        at = np.searchsorted(ordered, ids).clip(max=len(ordered) - 1)
        found: NDArray[np.int64] = self._order[at[ordered[at] == ids]]
        return found


class _KnownIds:
    """The ids of one checkpoint: sorted runs, merged so that there are few."""

    def __init__(self, parts: Any) -> None:
        parts = [part for part in parts if len(part)]
        self._runs: list[Ids] = [_arrays.distinct(np.concatenate(parts))] if parts else []

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
        self._runs.append(interruptible(np.sort, ids))
        while len(self._runs) > 1 and len(self._runs[-2]) < 2 * len(self._runs[-1]):
            # At once, so that an interrupt loses no run.
            both = np.concatenate(self._runs[-2:])
            self._runs[-2:] = [interruptible(np.sort, both, kind="stable")]  # which merges runs

    def drop(self, ids: Ids) -> None:
        left = (run[~np.isin(run, ids)] for run in self._runs)
        self._runs = [run for run in left if len(run)]


def _own_folder(path: Path, writer: str | None) -> Path:
    """The folder that a writer writes to.

    Raises:
        StoreError: If the store is of one writer where several are meant, or the other way round,
            or the folder is of something else.
    """
    if not path.is_dir():
        return path if writer is None else path / member_of(writer)
    there = members(path)
    if writer is None:
        if there:
            raise StoreError(
                f"path must be a store of one writer, got {path} with {next(iter(there))}; record "
                "with writer='number/total', or whence.merge what is there"
            )
        if not Manifest.exists(path):
            _check_empty(path)
        return path
    name = member_of(writer)
    if Manifest.exists(path):
        raise StoreError(f"path must be a store of several writers, got {path} of one")
    _check_empty(path)
    if there and next(iter(there)).rsplit("-", 1)[1] != name.rsplit("-", 1)[1]:
        raise StoreError(
            f"writer must be of as many as the store {path} has, got {writer!r} beside "
            f"{next(iter(there))}"
        )
    if (path / name).is_dir() and not Manifest.exists(path / name):
        _check_empty(path / name)
    return path / name


def _check_empty(path: Path) -> None:
    """Nothing, if a folder without a manifest may become a store.

    Raises:
        StoreError: If it holds something else, or rows that no manifest names, which a later
            manifest may.
    """
    names = sorted(each.name for each in path.iterdir())
    strangers = [name for name in names if not name.startswith((".", *OURS))]
    if strangers:
        raise StoreError(
            f"path must be a store or an empty folder, got {path} with {strangers[0]!r} in it"
        )
    if last_number(path, SHARD) > 1:  # a writer that was killed in its first commit leaves one
        raise StoreError(
            f"path must be a store with its manifest, got {path} with rows that no manifest names"
        )


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
