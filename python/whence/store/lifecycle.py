"""Deleting examples, and writing a store anew without what is gone from it."""

from __future__ import annotations

import os
import re
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from whence import _arrays
from whence._plain import counted
from whence.errors import ArgumentError, IdError, StoreError
from whence.store.files import store_errors
from whence.store.gone import GONE, kept_rows
from whence.store.lock import Lock
from whence.store.manifest import DTYPES, Manifest, gone_in, last_committed, manifests
from whence.store.maps import PREFIX as MAP
from whence.store.members import members, parts
from whence.store.progress import bar
from whence.store.reader import Reader, read_columns, read_ids, read_scales, stored_rows
from whence.store.shards import PACK, SHARD, Description, Shard, ShardWriter, last_number
from whence.store.writer import OURS, SHARD_BYTES, Writer


@dataclass(frozen=True)
class Compacted:
    """What `compact` did.

    Attributes:
        rows: That are in the store.
        removed: Rows that were gone, whose bytes are off the disk now.
        shards: How many there were, and are.
        freed: Bytes.
    """

    rows: int
    removed: int
    shards: tuple[int, int]
    freed: int

    def __str__(self) -> str:
        return (
            f"{counted(self.rows, 'row')} in {counted(self.shards[1], 'shard')} "
            f"(were {self.shards[0]:,}); {counted(self.removed, 'row')} removed, "
            f"{counted(self.freed, 'byte')} freed"
        )


def delete(
    path: str | os.PathLike[str], ids: Any = None, *, where: Any = None, missing: str = "error"
) -> int:
    """Deletes examples: their rows at all checkpoints are hidden at once.

    Their bytes stay on the disk until `compact` writes the store anew without them; a request to
    forget somebody needs both. Readers that are open go on with what they opened.

    Args:
        path: The store's folder.
        ids: Of the examples; distinct. Of an empty list none is deleted.
        where: In their place, which examples: a non-empty dict of columns, [examples] bool, or
            ids, as `where` in `Store.search`. If none passes, none is deleted.
        missing: What to do with one of `ids` that is not in the store: "error" or "skip".

    Returns:
        How many rows were deleted. O(rows) time.

    Raises:
        ArgumentError: If not one of `ids` and `where` is given, `missing` is another word, or
            `where` is an empty dict, which all would pass, or names a column that is not there.
        DtypeError: If `where` is something else.
        IdError: If an id is of the wrong kind, appears twice, or is not in the store, or `ids` is a
            set; nothing is deleted then.
        LockedError: If a writer has the store open.
        ShapeError: If `ids` is no list, or has more than one dimension.
        StoreError: If there is no store, it is damaged, or cannot be written.

    Examples:
        >>> whence.delete("runs/digits", ["user-17/0", "user-17/1"])  # doctest: +SKIP
        >>> whence.delete("runs/digits", where={"user": 17})  # doctest: +SKIP
        >>> whence.compact("runs/digits")  # doctest: +SKIP
    """
    _arrays.choice("missing", missing, ("error", "skip"))
    if (ids is None) == (where is None):
        got = "neither" if ids is None else "both"
        raise ArgumentError(f"one of ids and where must be given, got {got}")
    if isinstance(where, Mapping) and not where:
        raise ArgumentError("where must say which examples are deleted, got {}, which all pass")
    if where is not None and missing != "error":
        raise ArgumentError(f"missing must be 'error' with where, got {missing!r}")
    path = _arrays.path("path", path)
    none = _arrays.is_list(ids) and not len(ids)
    array = None if where is not None or none else _arrays.ids("ids", ids)
    with writers(path) as found:
        if where is not None:
            array = _passing(path, where)
        if array is None or not len(array):
            return 0
        held = [writer.holds(array) for writer in found]
        lacking = ~np.any(held, axis=0)
        if missing == "error" and lacking.any():
            raise IdError(f"ids must be in the store, got {array[lacking][0].item()!r}")
        removed = 0
        for writer, here in zip(found, held, strict=True):
            if here.any():
                removed += writer.delete(array[here])
                writer.commit()
    return removed


def _passing(path: Path, where: Any) -> NDArray[Any]:
    """The ids of a store's examples that pass a filter."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # writers that have confirmed nothing have nothing to go
        reader = Reader(path)
    return reader.ids[reader.eligible(where)]


def compact(path: str | os.PathLike[str], *, progress: bool | None = None) -> Compacted:
    """Writes a store anew without what is gone from it, and joins small shards.

    Rows that were deleted or replaced are off the disk when it returns, as far as the file system
    takes bytes off it, and so is what a killed writer has left. Stored values are copied as they
    are. A reader that is open cannot read what was written anew, says so, and has to open the store
    again. Killed at any moment, it leaves the store as it was or as it will be.

    Args:
        path: The store's folder.
        progress: Whether to show a bar; None means if standard error is a terminal.

    Returns:
        What it did. O(bytes that are written anew) time; memory for a few MiB of rows, and the ids
        and columns of a shard.

    Raises:
        LockedError: If a writer has the store open.
        StoreError: If there is no store, it is damaged, or cannot be written.
    """
    done = []
    with writers(_arrays.path("path", path)) as found:
        total = sum(writer.manifest.stored_bytes for writer in found)
        with bar("compacting", total, progress) as shown:
            for writer in found:
                done.append(_compact(writer, shown))
    return Compacted(
        sum(each.rows for each in done),
        sum(each.removed for each in done),
        (sum(each.shards[0] for each in done), sum(each.shards[1] for each in done)),
        sum(each.freed for each in done),
    )


@contextmanager
def writers(path: Path) -> Iterator[list[Writer]]:
    """The writers of a store, one or several, all of them open.

    Raises:
        LockedError: If another writer has one of them open.
        StoreError: If there is no store, or it is damaged.
    """
    with store_errors(path):
        try:
            names = [name for name, _ in parts(path)]
        except StoreError:
            _refuse_held(path)
            raise
    with ExitStack() as stack:
        found = []
        for name in names:
            writer = Writer(path, None, name) if name else Writer(path, None)
            stack.callback(writer.release)
            found.append(writer)
        yield found


def _refuse_held(path: Path) -> None:
    """Nothing, unless a writer that has confirmed nothing yet has a folder open.

    Raises:
        LockedError: If one has; says which.
    """
    if not path.is_dir():
        return
    for folder in (path, *(path / name for name in members(path))):
        # In a folder of something else a file of this name is not for us to open.
        ours = all(each.name.startswith((".", *OURS)) for each in folder.iterdir())
        if ours and (folder / "lock").is_file() and not Manifest.exists(folder):
            Lock(folder).close()


def _compact(writer: Writer, shown: Any) -> Compacted:
    path, before = writer.path, writer.manifest
    held = _bytes_in(path)
    rows = writer.rows
    shards, number = [], last_number(path, SHARD)
    made: list[ShardWriter] = []
    with removed_unless_committed(path, made):
        for group in _groups(before, writer.gone):
            if len(group) == 1 and group[0][1] is None:
                shards.append(group[0][0])
            elif any(kept is None or kept.any() for _, kept in group):
                number += 1
                shards.append(_joined(path, before, number, group, made))
            shown.update(sum(shard.rows for shard, _ in group) * before.row_bytes)
        if shards != before.shards:
            writer.replace_shards(shards)
    clear(path, writer.manifest)
    left = sum(shard.rows for shard in shards)
    return Compacted(
        left, rows - left, (len(before.shards), len(shards)), max(held - _bytes_in(path), 0)
    )


@contextmanager
def removed_unless_committed(path: Path, made: list[ShardWriter]) -> Iterator[None]:
    """Writes shards and commits them; if it fails before they are the store's, they are removed.

    A commit can fail, or be interrupted, after its manifest has appeared.

    Args:
        path: The store's folder.
        made: The shards, as they come.
    """
    before = last_committed(path)
    try:
        yield
    except BaseException:
        with suppress(StoreError):  # of a folder that cannot be read nothing is removed
            if last_committed(path) == before:
                for each in made:
                    each.abandon()
        raise


_Group = list[tuple[Shard, NDArray[np.bool_] | None]]
"""Shards that become one, each with [rows] which of its rows are kept; None for all."""


def _groups(manifest: Manifest, gone: NDArray[np.int64]) -> Iterator[_Group]:
    """The shards, those together that become one: neighbours of a checkpoint, up to a full one."""
    group: _Group = []
    filled = 0
    for shard in manifest.shards:
        kept = kept_rows(gone, shard.number, shard.rows)
        size = (shard.rows if kept is None else int(kept.sum())) * manifest.row_bytes
        if group and (shard.checkpoint != group[0][0].checkpoint or filled + size > SHARD_BYTES):
            yield group
            group, filled = [], 0
        group.append((shard, kept))
        filled += size
    if group:
        yield group


def _joined(
    path: Path, manifest: Manifest, number: int, group: _Group, made: list[ShardWriter]
) -> Shard:
    """Writes the kept rows of shards into one."""
    first = group[0][0]
    target = ShardWriter(path, number, first.checkpoint, DTYPES[manifest.dtype], manifest.row_width)
    made.append(target)
    beside: list[list[NDArray[Any]]] = []
    errors = []
    for shard, kept in group:
        folder, described = shard.folder(path), Description.read(path, shard)
        for start, stored in stored_rows(folder, described, manifest):
            target.append(stored if kept is None else stored[kept[start : start + len(stored)]])
        arrays = [
            read_scales(folder, described),
            read_ids(folder, described, manifest),
            *read_columns(folder, described, manifest),
        ]
        beside.append(arrays if kept is None else [array[kept] for array in arrays])
        errors.append((described.error, len(beside[-1][0])))
    scales, ids, *columns = (np.concatenate(each) for each in zip(*beside, strict=True))
    return target.finish(scales, ids, columns, mean_error(errors))


def mean_error(errors: list[tuple[float | None, int]]) -> float | None:
    """The mean error of shards joined, each with as many rows; None if one's is not known."""
    known = [(error, rows) for error, rows in errors if error is not None and rows]
    if len(known) < sum(rows > 0 for _, rows in errors) or not known:
        return None
    return sum(error * rows for error, rows in known) / sum(rows for _, rows in known)


def clear(path: Path, manifest: Manifest) -> None:
    """Removes what no manifest names: older ones, and what a killed or repaired store has left.

    Raises:
        StoreError: If it cannot.
    """
    Manifest.settle(path, last_committed(path), kept=0, every=True)
    with store_errors(path):
        for each in leftovers(path, manifest):
            if each.is_dir() and not each.is_symlink():
                shutil.rmtree(each)
            else:
                each.unlink()


_NUMBER = "[0-9]{8,18}"
_OURS = re.compile(
    rf"({SHARD}|{MAP}){_NUMBER}|{PACK}{_NUMBER}\.json|{GONE}{_NUMBER}\.npy"
    rf"|({PACK}|manifest-){_NUMBER}\.part"
)
"""What writers make; a name that only begins so is somebody else's, and not ours to remove."""


def leftovers(path: Path, manifest: Manifest) -> list[Path]:
    """What lies in a store's folder under names of ours, and is named nowhere.

    Rows that an older manifest says are gone stay with it, for `repair` may go back to it.
    """
    named = {shard.name for shard in manifest.shards}
    named |= {pack.name for pack in manifest.packs}
    named |= {each.map.name for each in manifest.checkpoints if each.map is not None}
    if manifest.gone is not None:
        named.add(manifest.gone.name)
    for older in manifests(path)[:-1]:
        with suppress(StoreError):
            named |= gone_in(older)
    return [
        each
        for each in sorted(path.iterdir())
        if _OURS.fullmatch(each.name) and each.name not in named
    ]


def _bytes_in(path: Path) -> int:
    with store_errors(path):
        return sum(each.lstat().st_size for each in path.rglob("*") if each.is_file())
