"""Whether every byte of a store is what was written, and what can be kept if not."""

from __future__ import annotations

import os
import shutil
import warnings
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from whence import _arrays, _core
from whence._plain import line
from whence.errors import MissingWritersWarning, StoreError, WhenceError
from whence.store.files import (
    BLOCK,
    Written,
    header,
    read_json,
    read_part,
    regular,
    store_errors,
)
from whence.store.gone import gone_files, write_gone
from whence.store.lifecycle import leftovers, removed_unless_committed
from whence.store.lock import Lock
from whence.store.manifest import (
    COLUMN_KINDS,
    DTYPES,
    READ_ATTEMPTS,
    Manifest,
    last_committed,
    manifests,
    number_of,
)
from whence.store.members import check_there, check_writer, members, missing, parts
from whence.store.progress import bar
from whence.store.reader import Reader, file_of, read_ids
from whence.store.shards import DESCRIPTION, SHARD, Description, Shard, ShardWriter, last_number


@dataclass(frozen=True)
class Damage:
    """Something in a store that is not what was written.

    Attributes:
        path: Of the file or folder.
        what: Is wrong with it.
        block: The block of the file, of 65,536 bytes, from 0; None where it is not one of them.
    """

    path: Path
    what: str
    block: int | None = None

    def __str__(self) -> str:
        return line(self.what)


@dataclass(frozen=True)
class Verification:
    """What `verify` found.

    Attributes:
        path: The store's folder.
        files: How many were read.
        bytes: How many.
        rows: That are in the store.
        damage: What is not as it was written; none if all is sound.
        leftovers: What lies in the folder and is named nowhere, as a killed writer leaves it; it
            is never read, and `compact` removes it.
        missing_writers: Of a store of several writers, those that have confirmed nothing yet.
    """

    path: Path
    files: int
    bytes: int
    rows: int
    damage: list[Damage]
    leftovers: list[Path] = field(default_factory=list)
    missing_writers: list[str] = field(default_factory=list)

    @property
    def is_sound(self) -> bool:
        """Whether every byte is what was written."""
        return not self.damage

    def __str__(self) -> str:
        lines = [f"{self.files:,} files, {self.bytes:,} bytes, {self.rows:,} rows"]
        lines += [f"damaged: {each}" for each in self.damage]
        if self.leftovers:
            lines.append(f"{len(self.leftovers):,} leftovers, which whence compact removes")
        if self.missing_writers:
            writers = ", ".join(self.missing_writers)
            lines.append(f"nothing is there of writers {writers}: not yet, or it was lost")
        lines.append("sound" if self.is_sound else "not sound: whence repair keeps what is whole")
        return "\n".join(map(line, lines))


def verify(path: str | os.PathLike[str], *, progress: bool | None = None) -> Verification:
    """Reads every byte of a store and compares it with its checksums, and what the bytes say.

    Damage is found, and no error: the errors below are for what cannot be looked at. What a writer
    is adding meanwhile is not looked at.

    Args:
        path: The store's folder.
        progress: Whether to show a bar; None means if standard error is a terminal.

    Returns:
        What was found. O(bytes) time, at about the speed of the disk; memory for the ids.

    Raises:
        StoreError: If `path` is no folder of a store.
    """
    path = _arrays.path("path", path)
    check_there(path)
    checks = [_looked_at(path, folder, progress) for folder in _folders(path)]
    damage = [each for check in checks for each in check.damage]
    return Verification(
        path,
        sum(check.files for check in checks),
        sum(check.bytes for check in checks),
        sum(check.rows for check in checks),
        damage or _meaning(path),
        [each for check in checks for each in check.leftovers],
        missing(path),
    )


def _folders(path: Path) -> list[Path]:
    """Where the manifests of a store lie: in its folder, or in those of its writers."""
    found = [path / name for name in members(path)]
    return [folder for folder in found if Manifest.exists(folder)] if found else [path]


def _looked_at(path: Path, folder: Path, progress: bool | None) -> _Check:
    """What is found in a folder of the store at `path`."""
    for _ in range(READ_ATTEMPTS):
        check = _Check(path, folder)
        number = check.all(progress)
        gone = any(not os.path.lexists(each.path) for each in check.damage)
        if not gone or last_committed(folder) == number:
            break
        # A writer has committed meanwhile, and removed what the manifest named.
    return check


def _meaning(path: Path) -> list[Damage]:
    """What bytes say that they cannot: every id is there once, offsets rise, values are values."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", MissingWritersWarning)  # they are listed
            reader = Reader(path)
        _ = reader.ids, reader.scales, reader.core
        for name in reader.columns:
            _ = reader.columns[name]
    except WhenceError as error:
        return [Damage(path, str(error))]
    return []


class _Check:
    """What was found so far in a folder of the store at `path`: that itself, or a writer's."""

    def __init__(self, path: Path, folder: Path) -> None:
        self._path, self._folder = path, folder
        self.files = self.bytes = self.rows = 0
        self._threads = _arrays.threads(None)
        self.damage: list[Damage] = []
        self.leftovers: list[Path] = []

    def all(self, progress: bool | None) -> int:
        """Looks at all that the newest manifest names, and beside; gives the manifest's number."""
        folder = self._folder
        try:
            manifest, number = Manifest.load(folder)
            _check_own(self._path, folder, manifest)
        except StoreError as error:
            if not Manifest.exists(folder):
                raise
            self._note(folder, error)
            return last_committed(folder)
        self._beside(manifest, number)
        for pack in manifest.packs:  # read with the manifest
            self.files, self.bytes = self.files + 1, self.bytes + pack.length
        gone = 0
        if manifest.gone is not None:
            self.files, self.bytes = self.files + 1, self.bytes + manifest.gone.length
            try:
                gone = len(manifest.gone.read(folder))
            except StoreError as error:
                self._note(folder / manifest.gone.name, error)
        self.rows += sum(shard.rows for shard in manifest.shards) - gone
        with bar("verifying", manifest.stored_bytes, progress) as shown:
            for shard in manifest.shards:
                self._shard(shard)
                shown.update(shard.rows * manifest.row_bytes)
        for checkpoint in manifest.checkpoints:
            if checkpoint.map is not None:
                for name, written in checkpoint.map.files.items():
                    self.file(folder / checkpoint.map.name / name, written)
        return number

    def _beside(self, manifest: Manifest, number: int) -> None:
        """Looks at what lies beside what the newest manifest names."""
        folder = self._folder
        self.leftovers += leftovers(folder, manifest)
        for older in manifests(folder):
            try:
                with store_errors(older):
                    length = older.lstat().st_size
                if older != Manifest.path(folder, number):
                    _check_own(self._path, folder, Manifest.at(folder, number_of(older)))
            except StoreError as error:
                if not os.path.lexists(older):  # a writer has removed it meanwhile
                    continue
                self._note(older, error)
            self.files, self.bytes = self.files + 1, self.bytes + length

    def _shard(self, shard: Shard) -> None:
        folder = self._folder
        self.files, self.bytes = self.files + 1, self.bytes + shard.described.length
        described = shard.folder(folder) / DESCRIPTION
        try:
            files = Description.parse(described, read_json(described, shard.described)).files
        except StoreError as error:
            self._note(described, error)
            return
        for name, written in files.items():
            self.file(shard.folder(folder) / name, written)
        try:
            Description.read(folder, shard)
        except StoreError as error:
            if not any(shard.folder(folder) in each.path.parents for each in self.damage):
                self._note(described, error)

    def file(self, path: Path, written: Written) -> None:
        self.files, self.bytes = self.files + 1, self.bytes + written.length
        try:
            bad = _core.check_file(path, written.length, written.blocks, self._threads)
        except StoreError as error:
            self._note(path, error)
            return
        for block in bad:
            end = min((block + 1) * BLOCK, written.length) - 1
            what = f"{path} is damaged: block {block} (bytes {block * BLOCK} to {end})"
            self.damage.append(Damage(path, what, block))

    def _note(self, path: Path, error: Exception) -> None:
        self.damage.append(Damage(path, str(error)))


@dataclass(frozen=True)
class Repair:
    """What `repair` did.

    Attributes:
        lost: (checkpoint, id) of every row that was lost and whose id could be read.
        unnamed: How many rows were lost whose ids are lost too.
        shards: How many were written anew, or dropped.
        went_back: Whether the newest manifest was lost, and the one before it took its place: what
            the last commit added is lost, and named in `lost` as far as it can be read.
        unmended: What cannot be mended, such as the map of preconditioned rows.
    """

    lost: list[tuple[str, int | str]]
    unnamed: int
    shards: int
    went_back: bool
    unmended: list[Damage]

    def __str__(self) -> str:
        lines = [f"{self.shards:,} shards written anew or dropped"]
        if self.went_back:
            lines.append("the newest manifest was lost: this is the store of the commit before it")
        lines.append(
            f"{len(self.lost) + self.unnamed:,} rows lost, {self.unnamed:,} without a name"
        )
        lines += [f"lost: {id_!r} at checkpoint {name!r}" for name, id_ in self.lost]
        lines += [f"cannot be mended: {each}" for each in self.unmended]
        return "\n".join(map(line, lines))


def repair(
    path: str | os.PathLike[str], *, undelete: bool = False, progress: bool | None = None
) -> Repair:
    """Drops what is damaged in a store, keeps every row that is whole, and lists what is lost.

    A row is whole if every block that holds a part of it, of its id and of what stands beside it is
    whole. What is damaged is removed from the disk; take a copy first if you hope for more.

    Args:
        path: The store's folder.
        undelete: What to do where the list of deleted rows is damaged: False is an error, for which
            rows were deleted is then not known; True lets them come back.
        progress: Whether to show a bar; None means if standard error is a terminal.

    Returns:
        What it did. O(bytes) time; memory for the largest shard.

    Raises:
        LockedError: If a writer has the store open.
        StoreError: If there is no store, no manifest can be read, the list of deleted rows is
            damaged, or the store cannot be written.
    """
    path = _arrays.path("path", path)
    _arrays.boolean("undelete", undelete)
    check_there(path)
    if not (folders := _folders(path)):
        parts(path)  # says what is there
    done = [_repair(path, folder, undelete, progress) for folder in folders]
    return Repair(
        [lost for each in done for lost in each.lost],
        sum(each.unnamed for each in done),
        sum(each.shards for each in done),
        any(each.went_back for each in done),
        [damage for each in done for damage in each.unmended],
    )


def _repair(store: Path, path: Path, undelete: bool, progress: bool | None) -> Repair:
    """Repairs a folder of a store: that itself, or a writer's."""
    with Lock(path):
        manifest, number, went_back = _readable(store, path)
        gone = np.empty((0, 2), np.int64)
        if manifest.gone is not None:
            try:
                gone = manifest.gone.read(path)
            except StoreError as error:
                if not undelete:
                    raise StoreError(
                        f"{error}; which rows were deleted is not known: bring the file back from "
                        "a copy, or pass undelete=True to let them come back"
                    ) from error
        if went_back and not undelete and (later := _later_gone(path, manifest)):
            raise StoreError(
                f"{later} names rows that were deleted after the last manifest that can be read: "
                "bring the newest manifest back from a copy, or pass undelete=True to let them "
                "come back"
            )
        mender = _Mender(path, manifest, gone)
        with removed_unless_committed(path, mender.made):
            with bar("repairing", manifest.stored_bytes, progress) as shown:
                for shard in manifest.shards:
                    mender.shard(shard)
                    shown.update(shard.rows * manifest.row_bytes)
            if went_back:
                mender.note_later()
            changed = mender.shards != manifest.shards or went_back
            if changed or (manifest.gone is not None and not len(gone)):
                number = max(number, last_committed(path)) + 1
                kept = {shard.number for shard in mender.shards}
                left = gone[np.isin(gone[:, 0], list(kept))]
                named = write_gone(path, number, left)
                mended = replace(manifest, shards=mender.shards, packs=[], gone=named)
                mended.save(path, number)
                Manifest.settle(path, number, kept=0, every=True)
                mender.remove_damaged()
            _remove_damaged_manifests(store, path, number)
    check = _Check(store, path)
    for checkpoint in manifest.checkpoints:
        if checkpoint.map is not None:
            for name, written in checkpoint.map.files.items():
                check.file(path / checkpoint.map.name / name, written)
    return Repair(mender.lost, mender.unnamed, len(mender.damaged), went_back, check.damage)


def _check_own(store: Path, folder: Path, manifest: Manifest) -> None:
    """Nothing, if a manifest is of the folder of a store that it lies in.

    Raises:
        StoreError: If it is of another writer.
    """
    if folder != store:
        check_writer(folder, manifest)


def _readable(store: Path, path: Path) -> tuple[Manifest, int, bool]:
    """The newest manifest that can be read, its number, and whether a newer one was lost.

    Raises:
        StoreError: If none can.
    """
    try:
        manifest, number = Manifest.load(path)
        _check_own(store, path, manifest)
        return manifest, number, False
    except StoreError as first:
        for older in reversed(manifests(path)):
            try:
                manifest = Manifest.at(path, number_of(older))
                _check_own(store, path, manifest)
                return manifest, number_of(older), True
            except StoreError:
                continue
        raise first


def _remove_damaged_manifests(store: Path, path: Path, number: int) -> None:
    """Removes older manifests that cannot be read: nobody misses them."""
    for older in manifests(path):
        if older != Manifest.path(path, number):
            try:
                _check_own(store, path, Manifest.at(path, number_of(older)))
            except StoreError:
                with store_errors(older):
                    if older.is_dir() and not older.is_symlink():
                        shutil.rmtree(older)
                    else:
                        older.unlink(missing_ok=True)


def _later_gone(path: Path, manifest: Manifest) -> Path | None:
    """A file of rows that are gone which only a lost manifest named, if there is one."""
    known = "" if manifest.gone is None else manifest.gone.name
    return max((each for each in gone_files(path) if each.name > known), default=None)


class _Mender:
    """Shards, and what is left of those that are damaged."""

    def __init__(self, path: Path, manifest: Manifest, gone: NDArray[np.int64]) -> None:
        self._path, self._manifest, self._gone = path, manifest, gone
        self._next = 1 + last_number(path, SHARD)
        self.made: list[ShardWriter] = []
        self.shards: list[Shard] = []
        self.damaged: list[Path] = []
        self.lost: list[tuple[str, int | str]] = []
        self.unnamed = 0

    def shard(self, shard: Shard) -> None:
        """Takes a shard over, or writes what is whole of it into a new one."""
        folder = shard.folder(self._path)
        gone = self._gone[self._gone[:, 0] == shard.number, 1]
        gone = gone[gone < shard.rows]
        try:
            described = Description.parse(
                folder / DESCRIPTION, read_json(folder / DESCRIPTION, shard.described)
            )
            if (described.checkpoint, described.rows) != (shard.checkpoint, shard.rows):
                raise StoreError(f"{folder / DESCRIPTION} is damaged")
            if shard.rows > sum(_length(folder / name) for name in described.files):
                raise StoreError(f"{folder} must hold {shard.rows} rows, and is too small")
            found = _Salvage(folder, described, self._manifest)
        except StoreError:
            self.unnamed += shard.rows - len(gone)
            self.damaged.append(folder)
            return
        there = np.ones(shard.rows, np.bool_)
        there[gone] = False
        if found.is_whole:
            self.shards.append(shard)
            return
        self.damaged.append(folder)
        self._note(found, shard.checkpoint, there & ~found.whole)
        keep = there & found.whole
        if keep.any():
            self.shards.append(self._written(shard, found, keep, described.error))

    def note_later(self) -> None:
        """Lists the rows of shards that only a lost manifest named, as far as they can be read."""
        known = {shard.name for shard in self._manifest.shards}
        newest = max((shard.number for shard in self._manifest.shards), default=0)
        for folder in sorted(self._path.glob(f"{SHARD}*")):
            number = folder.name.removeprefix(SHARD)
            if folder.name in known or not number.isdecimal() or int(number) <= newest:
                continue
            try:
                found = Description.parse(folder, read_json(folder / DESCRIPTION))
                ids = read_ids(folder, found, self._manifest)
                name = self._manifest.row_sets[found.checkpoint]
            except (StoreError, IndexError):
                continue
            self.lost += [(name, id_) for id_ in ids.tolist()]

    def remove_damaged(self) -> None:
        """Removes what is damaged from the disk, as far as it can."""
        for folder in self.damaged:
            shutil.rmtree(folder, ignore_errors=True)

    def _note(self, found: _Salvage, checkpoint: int, lost: NDArray[np.bool_]) -> None:
        name = self._manifest.row_sets[checkpoint]
        named = lost & found.whole_ids
        self.lost += [(name, id_) for id_ in found.ids(named).tolist()]
        self.unnamed += int((lost & ~found.whole_ids).sum())

    def _written(
        self, shard: Shard, found: _Salvage, keep: NDArray[np.bool_], error: float | None
    ) -> Shard:
        manifest = self._manifest
        target = ShardWriter(
            self._path, self._next, shard.checkpoint, DTYPES[manifest.dtype], manifest.row_width
        )
        self._next += 1
        self.made.append(target)
        target.append(found.rows(keep))
        return target.finish(found.scales(keep), found.ids(keep), found.columns(keep), error)


class _Salvage:
    """What is whole of a shard, read without its checksums' consent.

    Attributes:
        whole: [rows] whether all of a row, its id and its columns is whole.
        whole_ids: [rows] whether its id is.
    """

    def __init__(self, folder: Path, described: Description, manifest: Manifest) -> None:
        self._folder, self._described, self._manifest = folder, described, manifest
        self._count = described.rows
        self._content: dict[str, bytes] = {}
        self._bad: dict[str, NDArray[np.int64]] = {}
        stems = ["ids", *(f"column-{index}" for index in range(len(manifest.columns or {})))]
        for stem in stems:
            file_of(described, folder / f"{stem}.npy")
        for name, written in described.files.items():
            self._content[name], self._bad[name] = _blocks(folder / name, written)
        self.is_whole = not any(len(bad) for bad in self._bad.values()) and all(
            _length(folder / name) == written.length for name, written in described.files.items()
        )
        kind = "<i8" if manifest.ids == "int64" else ""
        self.whole_ids = self._of_column("ids", kind)
        self.whole = self.whole_ids & self._of_values("rows.npy", self._row_kind, self._width)
        self.whole &= self._of_values("scales.npy", "<f4", 1)
        for index, name in enumerate((manifest.columns or {}).values()):
            self.whole &= self._of_column(f"column-{index}", COLUMN_KINDS[name])

    @property
    def _row_kind(self) -> str:
        return DTYPES[self._manifest.dtype]

    @property
    def _width(self) -> int:
        return self._manifest.row_width

    def rows(self, keep: NDArray[np.bool_]) -> NDArray[Any]:
        """[rows, width] some rows, as stored."""
        return self._values("rows.npy", self._row_kind, (self._count, self._width))[keep]

    def scales(self, keep: NDArray[np.bool_]) -> NDArray[np.float32]:
        """[rows] the scales of some rows."""
        found: NDArray[np.float32] = self._values("scales.npy", "<f4", (self._count,))[keep]
        return found

    def ids(self, keep: NDArray[np.bool_]) -> NDArray[Any]:
        """[rows] the ids of some rows."""
        if not keep.any():
            return np.empty(0, np.int64)
        found = self._column("ids", "<i8" if self._manifest.ids == "int64" else "", keep)
        return found.astype(np.str_) if self._manifest.ids == "str" else found

    def columns(self, keep: NDArray[np.bool_]) -> list[NDArray[Any]]:
        """[rows] each, the columns of some rows."""
        kinds = (self._manifest.columns or {}).values()
        return [
            self._column(f"column-{index}", COLUMN_KINDS[kind], keep)
            for index, kind in enumerate(kinds)
        ]

    def _values(self, name: str, kind: str, shape: tuple[int, ...]) -> NDArray[Any]:
        start = len(header(kind, shape))
        size = int(np.prod(shape, dtype=np.int64)) * np.dtype(kind).itemsize
        content = self._content[name][start : start + size].ljust(size, b"\0")
        return np.frombuffer(content, kind).reshape(shape)

    def _column(self, stem: str, kind: str, keep: NDArray[np.bool_]) -> NDArray[Any]:
        if kind:
            return self._values(f"{stem}.npy", kind, (self._count,))[keep]
        offsets = self._offsets(stem)
        start = self._text_start(stem)
        content = self._content[f"{stem}.npy"]
        found = np.empty(int(keep.sum()), object)
        found[:] = [
            content[start + offsets[row] : start + offsets[row + 1]].decode(
                "utf-8", "surrogatepass"
            )
            for row in np.flatnonzero(keep).tolist()
        ]
        return found

    def _offsets(self, stem: str) -> NDArray[np.int64]:
        return self._values(f"{stem}-offsets.npy", "<i8", (self._count + 1,))

    def _text_start(self, stem: str) -> int:
        length = self._described.files[f"{stem}.npy"].length
        return len(header("|u1", (length,)))  # as long for any number that fits

    def _of_column(self, stem: str, kind: str) -> NDArray[np.bool_]:
        """[rows] whether each value of a column is whole."""
        if kind:
            return self._of_values(f"{stem}.npy", kind, 1)
        ends = self._of_values(f"{stem}-offsets.npy", "<i8", 1, self._count + 1)
        whole = ends[:-1] & ends[1:]
        offsets = np.where(ends, self._offsets(stem), 0) + self._text_start(stem)
        return whole & self._untouched(f"{stem}.npy", offsets[:-1], offsets[1:])

    def _of_values(
        self, name: str, kind: str, width: int, count: int | None = None
    ) -> NDArray[np.bool_]:
        """[count] whether each value, or row of values, of a file is whole."""
        file_of(self._described, self._folder / name)
        count = self._count if count is None else count
        shape = (count,) if width == 1 and name != "rows.npy" else (count, width)
        size = width * np.dtype(kind).itemsize
        starts = len(header(kind, shape)) + np.arange(count, dtype=np.int64) * size
        return self._untouched(name, starts, starts + size)

    def _untouched(
        self, name: str, starts: NDArray[np.int64], ends: NDArray[np.int64]
    ) -> NDArray[np.bool_]:
        """Whether no byte from each start to its end lies in a bad block."""
        bad = self._bad[name]
        first = np.searchsorted(bad, starts // BLOCK)
        last = np.searchsorted(bad, (np.maximum(ends, starts + 1) - 1) // BLOCK, side="right")
        found: NDArray[np.bool_] = first == last
        return found


def _length(path: Path) -> int:
    """The bytes of a file; 0 where there is none."""
    try:
        with regular(path) as (_, length):
            return length
    except StoreError:
        return 0


def _blocks(path: Path, written: Written) -> tuple[bytes, NDArray[np.int64]]:
    """What is there of a file, whatever its length; and the numbers of the blocks that are not."""
    try:
        with regular(path) as (handle, length):
            content = read_part(path, handle, 0, min(length, written.length))
    except StoreError:
        content = b""
    sums = written.blocks
    found = _core.block_checksums(np.frombuffer(content, np.uint8))
    same = np.zeros(len(sums), np.bool_)
    same[: len(found)] = found == sums[: len(found)]
    return content, np.flatnonzero(~same)
