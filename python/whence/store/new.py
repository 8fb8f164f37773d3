"""A store that is made whole: no row of it is there before all are."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from whence.errors import StoreError
from whence.store.files import Written, mark, store_errors, sync_directory, unfinished
from whence.store.lifecycle import mean_error
from whence.store.lock import Lock
from whence.store.manifest import DTYPES, MARKER, Checkpoint, Manifest
from whence.store.maps import PREFIX as MAP
from whence.store.maps import StoredMap, put_map
from whence.store.members import members
from whence.store.pieces import Batch
from whence.store.shards import PACK, SHARD, Shard, ShardWriter
from whence.store.writer import SHARD_BYTES

FIRST = 1
"""The number of its manifest."""

_TEXT = 64
"""About as many bytes as Python takes for a short str, beside its letters."""


class NewStore:
    """A store that is written from its first row to its last, and appears with `commit`.

    Nobody else writes there before it is closed.

    Until then the file that becomes its manifest is there, empty: a folder that has it and no
    manifest never was a store, so that what a killed process left can be begun anew.

    Args:
        name: The argument that `path` is of, for an error.
        path: The store's folder: a new or empty one, or one that was begun so.
        manifest: What the store is; ids and columns have their types. Its shards do not matter.

    Attributes:
        path: The store's folder.
        manifest: What the store will say about itself, but for its shards.
        shards: Those that are written.

    Raises:
        LockedError: If another process writes there.
        StoreError: If there is something else, or the folder cannot be made.
    """

    def __init__(self, name: str, path: Path, manifest: Manifest) -> None:
        self.path = path
        self.manifest = manifest
        self.shards: list[Shard] = []
        self._open: ShardWriter | None = None
        self._beside: list[tuple[NDArray[Any], ...]] = []
        self._errors: list[tuple[float | None, int]] = []
        self._checkpoint, self._bytes = 0, 0
        with store_errors(path):
            _check(name, path)  # before a lock is left in a folder of something else
            self._made_folder = not path.exists()
            path.mkdir(parents=True, exist_ok=True)
            sync_directory(path.parent)
        self._lock = Lock(path)
        try:
            with store_errors(path):
                _check(name, path)
                self._clear()
                mark(self._mark)
                sync_directory(path)
        except BaseException:
            self._lock.close()
            raise

    def take_maps(self, parts: Callable[[StoredMap, str, Written], Iterable[bytes]]) -> None:
        """Writes the maps of its checkpoints, which are of elsewhere.

        Args:
            parts: A map, the name of one of its files, and what is known of that -> its bytes.

        Raises:
            StoreError: If a file is another, or the system refuses.
        """
        taken: list[Checkpoint] = []
        for number, each in enumerate(self.manifest.checkpoints, 1):
            if each.map is not None:
                stored = put_map(self.path, number, each.map, partial(parts, each.map))
                each = replace(each, map=stored)
            taken.append(each)
        self.manifest = replace(self.manifest, checkpoints=taken)

    def append(self, batch: Batch, error: float | None = None) -> None:
        """Takes rows, which are checked already.

        Args:
            batch: The rows; none of the ids has one at its checkpoint.
            error: Mean relative error of quantised rows, if it is known.

        Raises:
            StoreError: If the system refuses.
        """
        if not len(batch.ids):
            return
        if batch.checkpoint != self._checkpoint or self._bytes >= SHARD_BYTES:
            self.finish()
        if self._open is None:
            number = len(self.shards) + 1
            kind, width = DTYPES[self.manifest.dtype], self.manifest.row_width
            self._open = ShardWriter(self.path, number, batch.checkpoint, kind, width)
        self._checkpoint = batch.checkpoint
        self._open.append(batch.stored)
        # Copies, for a view would keep what was read with it.
        beside = tuple(np.array(each) for each in (batch.scales, batch.ids, *batch.columns))
        self._beside.append(beside)
        self._errors.append((error, len(batch.ids)))
        self._bytes += batch.stored.nbytes + sum(map(_size, beside))

    def commit(self) -> None:
        """Makes the store appear, whole: when it returns, a crash or power cut keeps it.

        Raises:
            StoreError: If the system refuses.
        """
        self.finish()
        whole = replace(self.manifest, shards=self.shards, packs=[], gone=None)
        whole.save(self.path, FIRST)
        Manifest.settle(self.path, FIRST)

    def withdraw(self) -> None:
        """Removes what `commit` has made, as far as it can, before it is closed.

        Killed meanwhile it leaves the store whole, or a folder that never was one.
        """
        with contextlib.suppress(OSError):
            (self.path / f"{MARKER}{FIRST:08}").unlink(missing_ok=True)
            with contextlib.suppress(FileNotFoundError):  # of one that was not committed yet
                Manifest.path(self.path, FIRST).replace(self._mark)  # which takes no room
            sync_directory(self.path)
            self._clear()

    def close(self) -> None:
        """Lets go of it, and removes what was written unless it was committed; its folder, too."""
        if self._open is not None:
            self._open.close()
        if self._lock.is_held:
            with contextlib.suppress(OSError):
                if not Manifest.exists(self.path):  # an interrupted commit may have made it
                    self._clear()
                    if self._made_folder and [each.name for each in self.path.iterdir()] == [
                        "lock"
                    ]:
                        shutil.rmtree(self.path)
        self._lock.close()

    def __enter__(self) -> NewStore:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def _mark(self) -> Path:
        return unfinished(Manifest.path(self.path, FIRST))

    def finish(self) -> None:
        """Writes what stands beside the rows of the shard that is open, if there is one.

        Raises:
            StoreError: If the system refuses.
        """
        if self._open is None:
            return
        scales, ids, *columns = (np.concatenate(each) for each in zip(*self._beside, strict=True))
        shard = self._open.finish(scales, ids, columns, mean_error(self._errors))
        self.shards.append(shard)
        self._open, self._beside, self._errors, self._bytes = None, [], [], 0

    def _clear(self) -> None:
        """Removes what was written, the mark last."""
        for each in sorted(self.path.iterdir()):
            if each.name.startswith((SHARD, MAP)) and each.is_dir() and not each.is_symlink():
                shutil.rmtree(each)
            elif each.name.startswith(PACK):
                each.unlink()
        self._mark.unlink(missing_ok=True)


def _check(name: str, path: Path) -> None:
    """Nothing, if a store may be made in a folder.

    Raises:
        StoreError: If there is something else.
    """
    if not path.exists() and not path.is_symlink():
        return
    if not path.is_dir():
        got = "the link to nothing" if path.is_symlink() and not path.exists() else "the file"
        raise StoreError(f"{name} must be a new folder, got {got} {path}")
    if Manifest.exists(path) or members(path):
        raise StoreError(f"{name} must be a new folder, got the store {path}")
    mark = unfinished(Manifest.path(path, FIRST)).name
    names = {each.name for each in path.iterdir()}
    ours = (SHARD, MAP, PACK) if mark in names else ()
    # Names with a point in front are nobody's: a file manager leaves them behind.
    strangers = sorted(each for each in names - {mark, "lock"} if not each.startswith((".", *ours)))
    if strangers:
        raise StoreError(f"{name} must be a new folder, got {path} with {strangers[0]!r} in it")


def _size(array: NDArray[Any]) -> int:
    """About as many bytes as it takes in memory."""
    if array.dtype.kind != "O":
        return array.nbytes
    return sum(map(len, array.tolist())) + len(array) * (_TEXT + array.itemsize)
