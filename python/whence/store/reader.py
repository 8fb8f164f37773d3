"""Reading a store: a snapshot of what was committed when it was opened."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from copy import copy
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from whence import _arrays, _core
from whence._arrays import Ids
from whence._interrupts import interruptible
from whence.errors import (
    ArgumentError,
    CheckpointError,
    IdError,
    MismatchError,
    StoreError,
)
from whence.store.examples import Places, eligible
from whence.store.files import (
    PIECE,
    Written,
    header,
    read_array,
    read_header,
    read_range,
    read_strings,
)
from whence.store.gone import keys
from whence.store.manifest import COLUMN_KINDS, DTYPES, READ_ATTEMPTS, Manifest
from whence.store.members import combined, parts, warn_of_missing
from whence.store.shards import Description, Shard


class Reader:
    """The rows of a store with their ids and columns.

    An *example* is an id; it has one row in each checkpoint it was recorded in. Examples are
    numbered in the order their ids were first recorded.

    Args:
        path: The store's folder.
        memory_map: Reads rows through a map of their files instead of into buffers. Quicker where
            the same rows are read again and again from a large store. If another program cuts a
            mapped file short, the system kills this process (SIGBUS) when it reads there; nothing
            can catch that, and so it is not the default. whence itself never shortens a file.

    Attributes:
        path: The store's folder.
        manifest: What the store says about itself.
        parts: The stores that make it up, each what it says about itself, by the names of their
            folders: one for each writer that has confirmed something, or "" for itself.
        gone: Of those of them that rows are gone from, [rows, 2] shard and row.
        missing_writers: Of a store of several writers, those that have confirmed nothing yet.
        closed: Whether `close` was called.

    Raises:
        StoreError: If there is no store, or it is damaged.
        MismatchError: If its writers did not record the same.
        IdError: If an id is of two writers.

    Warns:
        MissingWritersWarning: If some of its writers have confirmed nothing yet.
    """

    closed = False

    def __init__(self, path: str | os.PathLike[str], *, memory_map: bool = False) -> None:
        self.path = path = _arrays.path("path", path)
        self._memory_map = _arrays.boolean("memory_map", memory_map)
        for attempt in range(READ_ATTEMPTS):
            try:
                found = parts(path)
                # Read at once: the next commits take the file away, and `compact` the rows too.
                self.gone = {
                    name: part.gone.read(path / name)
                    for name, part in found
                    if part.gone is not None
                }
                # Of each writer's own entries: its descriptions have its own numbers.
                self._described = [
                    Description.read(path / name, shard)
                    for name, part in found
                    for shard in part.shards
                ]
                break
            except StoreError as error:
                # A writer may have committed and removed meanwhile what the manifest named.
                gone = isinstance(error.__cause__, FileNotFoundError)
                if not gone or attempt == READ_ATTEMPTS - 1:
                    raise
        self.parts = dict(found)
        self.manifest = combined(path, found, f"writers of {path}")
        self.missing_writers = warn_of_missing(path, stacklevel=3)
        if len(found) > 1:
            _ = self._order  # an id that two writers have recorded is refused at once

    def close(self) -> None:
        """Lets go of maps of files and of all that was read; other calls are an error from then on.

        Hits that were found keep their columns. Closed again, it does nothing.
        """
        if self.closed:
            return
        columns = self.__dict__.get("columns")
        if columns is not None:
            columns.leave()
        path = self.path
        self.__dict__.clear()
        self.path, self.closed = path, True

    if not TYPE_CHECKING:  # which would take any name for an attribute

        def __getattr__(self, name: str) -> Any:
            """What a closed store has no more.

            Raises:
                StoreError: If it is closed.
            """
            if self.closed:
                raise StoreError(f"store must be open, got {self.path}, which was closed")
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    @property
    def dim(self) -> int:
        """The width of a row."""
        return self.manifest.dim

    @property
    def checkpoints(self) -> list[str]:
        """The names of the checkpoints, in the order they were recorded; one of combined rows."""
        return self.manifest.row_sets

    @property
    def skipped(self) -> list[tuple[str, int | str]]:
        """(checkpoint, id) of examples left out because their gradient was not finite."""
        return [(self.checkpoints[index], id_) for index, id_ in self.manifest.skipped]

    def __len__(self) -> int:
        return len(self.ids)

    def __contains__(self, id_: object) -> bool:
        """Whether an example has this id; one of another kind than the store's is not there."""
        places = self._places
        try:
            places.of("id", _arrays.ids("id", [id_]))
        except ArgumentError:
            return False
        return True

    @cached_property
    def ids(self) -> Ids:
        """[examples] int64 or str."""
        return self._order[0]

    @cached_property
    def columns(self) -> Columns:
        """[examples] each, as first recorded; read when first asked for."""
        return Columns(self)

    @cached_property
    def scales(self) -> NDArray[np.float32]:
        """[rows] what each stored row is multiplied with, in the order of the shards.

        The norm of the row, unless rows are quantised.
        """
        found = [
            read_scales(shard.folder(self.path), described) for shard, described in self.shards
        ]
        return np.concatenate(found) if found else np.empty(0, np.float32)

    @cached_property
    def core(self) -> _core.Rows:
        """The rows as the search engine takes them."""
        files: list[Any] = []
        kind = DTYPES[self.manifest.dtype]
        for shard, described in self.shards:
            path = shard.folder(self.path) / "rows.npy"
            shape = (shard.rows, self.manifest.row_width)
            offset = read_header(path, file_of(described, path), kind, shape)
            files.append((path, offset, shard.rows, file_of(described, path).blocks))
        return _core.Rows(files, self.dim, self.manifest.dtype, self.scales, self._memory_map)

    @property
    def shards(self) -> list[tuple[Shard, Description]]:
        """The shards and what is in them, in the order in which rows are numbered."""
        return list(zip(self.manifest.shards, self._described, strict=True))

    @cached_property
    def kept(self) -> NDArray[np.bool_] | None:
        """[rows] whether each is there: neither deleted nor replaced. None if all are.

        Raises:
            StoreError: If rows are gone that never were there.
        """
        if not self.gone:
            return None
        every = {name: keys(gone) for name, gone in self.gone.items()}
        kept = np.ones(sum(shard.rows for shard in self.manifest.shards), np.bool_)
        start, left = 0, {name: len(gone) for name, gone in every.items()}
        for shard in self.manifest.shards:
            gone = every.get(shard.member, np.empty(0, np.int64))
            here = gone[
                slice(*np.searchsorted(gone, [shard.number << 32, (shard.number + 1) << 32]))
            ]
            rows = here & 0xFFFFFFFF
            if len(rows) and rows[-1] >= shard.rows:
                raise StoreError(f"{self.path} is damaged: rows are gone that {shard.name} has not")
            kept[start + rows] = False
            start += shard.rows
            left[shard.member] = left.get(shard.member, 0) - len(rows)
        if any(left.values()):
            raise StoreError(f"{self.path} is damaged: rows are gone of shards that are not there")
        return kept

    @cached_property
    def row_norms(self) -> NDArray[np.float32]:
        """[rows] the norm of each row, in the order of the shards.

        Of quantised rows read from them all, once, and rounded up.
        """
        if not self.manifest.is_quantised:
            return self.scales
        return self.core.norms(_arrays.threads(None))

    @property
    def quantisation_error(self) -> float | None:
        """The mean over rows of |row - stored row| / |row|; None unless rows are quantised."""
        errors = [each.error for each in self._described if each.error is not None]
        if not errors or len(errors) < len(self._described):
            return None
        return float(np.average(errors, weights=[each.rows for each in self._described]))

    def row_numbers(self, *, missing: str = "error") -> NDArray[np.int64]:
        """[checkpoints, examples] the number of the row of each example; -1 where it has none.

        Args:
            missing: "error" or "keep", for examples that lack a checkpoint.

        Raises:
            IdError: If an example lacks a checkpoint, and `missing` is "error".
        """
        numbers = self._order[1]
        if missing == "error" and (numbers < 0).any():
            checkpoint, example = np.argwhere(numbers < 0)[0]
            lacking = int((numbers < 0).any(axis=0).sum())
            raise IdError(
                f"every id must have a row in every checkpoint, got {self.ids[example].item()!r} "
                f"without one in {self.checkpoints[checkpoint]!r} ({lacking} such ids); "
                "record them, or leave them out with missing='drop'"
            )
        return numbers

    def positions(self, name: str, ids: Ids) -> NDArray[np.int64]:
        """[ids] the number of the example of each id.

        Raises:
            IdError: If an id is of the wrong kind, or not in the store.
        """
        return self._places.of(name, ids)

    def rows(self, ids: Ids | None = None, checkpoint: str | None = None) -> NDArray[np.float32]:
        """[ids, dim] the rows of these ids, or of all in order, at one checkpoint.

        Raises:
            IdError: If an id is not in the store, or lacks the checkpoint.
            CheckpointError: If the checkpoint is not in the store, or not named and not the only
                one.
            MismatchError: If the store holds factors.
        """
        if self.manifest.is_factored:
            raise MismatchError(
                "rows must be read from a store of sketches, got one with layout='factored', "
                f"whose rows are factors: {self.path}"
            )
        numbers = self.row_numbers(missing="keep")[self.checkpoint_index(checkpoint)]
        if ids is not None:
            numbers = numbers[self.positions("ids", _arrays.ids("ids", ids))]
        if (numbers < 0).any():
            raise IdError(
                f"every id must have a row in the checkpoint, got "
                f"{int((numbers < 0).sum())} without one"
            )
        return self.core.read(np.ascontiguousarray(numbers, np.uint64))

    def norms(self, checkpoint: str | None = None) -> NDArray[np.float32]:
        """[examples] the norm of each row at one checkpoint: the square root of its self-influence.

        NaN for an example that has no row there. Reads quantised rows, once.

        Raises:
            CheckpointError: If the checkpoint is not in the store, or not named and not the only
                one.
        """
        numbers = self.row_numbers(missing="keep")[self.checkpoint_index(checkpoint)]
        norms: NDArray[np.float32] = self.row_norms[numbers]
        norms[numbers < 0] = np.nan
        return norms

    def checkpoint_index(self, name: str | None) -> int:
        """The place of a checkpoint; of the only one if `name` is None.

        Raises:
            CheckpointError: If it is not in the store, or not named and not the only one.
        """
        if name is None:
            if len(self.checkpoints) != 1:
                raise CheckpointError(f"checkpoint must be one of {self.checkpoints}, got None")
            return 0
        if name not in self.checkpoints:
            raise CheckpointError(f"checkpoint must be one of {self.checkpoints}, got {name!r}")
        return self.checkpoints.index(name)

    def eligible(self, where: Any, argument: str = "where") -> NDArray[np.bool_]:
        """[examples] whether each passes a filter.

        Args:
            where: None for all; a dict of column name to a value or a list of values, all of
                which must hold; [examples] bool; or ids.
            argument: The name of `where`, for an error.

        Raises:
            ArgumentError: If a column is not in the store.
            DtypeError: If `where` is something else.
            IdError: If an id is not in the store.
        """
        kinds = self.manifest.columns or {}
        return eligible(where, len(self), self.columns, kinds, self.positions, argument)

    def _read_examples(self, name: str) -> NDArray[Any]:
        """[examples] a column, at the first checkpoint that each example has."""
        kind = (self.manifest.columns or {})[name]
        first = np.full(len(self), -1, np.int64)
        for rows in self._order[1][::-1]:
            first = np.where(rows >= 0, rows, first)
        stems = {  # a writer has its own order
            member: f"column-{list(part.columns).index(name)}"
            for member, part in self.parts.items()
            if part.columns is not None
        }
        read = [
            read_column(shard.folder(self.path), described, stems[shard.member], kind)
            for shard, described in self.shards
        ]
        found: NDArray[Any] = np.concatenate(read)[first] if read else np.empty(0)
        return found

    @cached_property
    def _places(self) -> Places:
        return Places(self.ids)

    @cached_property
    def _order(self) -> tuple[Ids, NDArray[np.int64]]:
        """Ids in order of first appearance; [checkpoints, examples] numbers of their rows."""
        shards = self.manifest.shards
        found = [
            read_ids(shard.folder(self.path), described, self.manifest)
            for shard, described in self.shards
        ]
        if not found:
            return np.empty(0, np.int64), np.empty((len(self.checkpoints), 0), np.int64)
        all_ids, checkpoint, places = interruptible(
            _numbered, found, [shard.checkpoint for shard in shards], self.kept
        )
        self._check_writers(all_ids, places)
        if len(self.checkpoints) == 1 and len(_arrays.distinct(all_ids)) == len(all_ids):
            return all_ids, places[None]
        order = interruptible(_in_order, all_ids, checkpoint, places, len(self.checkpoints))
        if np.count_nonzero(order[1] >= 0) < len(all_ids):
            raise StoreError(f"{self.path} is damaged: ids must be distinct in a checkpoint")
        return order

    def _check_writers(self, ids: Ids, places: NDArray[np.int64]) -> None:
        """Nothing, if every id is of one writer.

        Raises:
            IdError: If one is of two; says of which.
        """
        shards = self.manifest.shards
        names = sorted({shard.member for shard in shards})
        if len(names) < 2:
            return
        members = np.repeat(
            [names.index(shard.member) for shard in shards], [shard.rows for shard in shards]
        )[places]
        order = interruptible(np.argsort, ids, kind="stable")
        same = (ids[order][1:] == ids[order][:-1]) & (members[order][1:] != members[order][:-1])
        if same.any():
            at = order[np.flatnonzero(same)[0] :][:2]
            one, two = (names[members[each]] for each in at)
            raise IdError(
                f"ids must be of one writer each, got {ids[at[0]].item()!r} of {one} and of {two}"
            )


def _numbered(
    ids: list[Ids], checkpoints: list[int], kept: NDArray[np.bool_] | None
) -> tuple[Ids, NDArray[np.int64], NDArray[np.int64]]:
    """The ids of shards, and the checkpoint and place of each row; only rows that are not gone."""
    all_ids = np.concatenate(ids)
    checkpoint = np.repeat(checkpoints, [len(each) for each in ids])
    places = np.arange(len(all_ids), dtype=np.int64)
    if kept is None:
        return all_ids, checkpoint, places
    return all_ids[kept], checkpoint[kept], places[kept]


def _in_order(
    ids: Ids, checkpoint: NDArray[np.int64], places: NDArray[np.int64], checkpoints: int
) -> tuple[Ids, NDArray[np.int64]]:
    """Ids in order of first appearance; [checkpoints, examples] the places of their rows.

    Of an id that a checkpoint has twice one place is left out.
    """
    unique, first, inverse = np.unique(ids, return_index=True, return_inverse=True)
    by_appearance = np.argsort(first, kind="stable")
    rank = np.empty(len(unique), np.int64)
    rank[by_appearance] = np.arange(len(unique))
    numbers = np.full((checkpoints, len(unique)), -1, np.int64)
    numbers[checkpoint, rank[inverse.reshape(-1)]] = places
    return unique[by_appearance], numbers


class Columns(Mapping[str, NDArray[Any]]):
    """The columns of a store: name -> [examples]; strings are objects."""

    def __init__(self, reader: Reader) -> None:
        self._reader = reader
        self._found: dict[str, NDArray[Any]] = {}

    def __getitem__(self, name: str) -> NDArray[Any]:
        if name not in (self._reader.manifest.columns or {}):
            raise KeyError(name)
        if name not in self._found:
            self._found[name] = self._reader._read_examples(name)
        return self._found[name]

    def leave(self) -> None:
        """Reads on by itself, for those who keep it, when the reader is closed."""
        self._reader = copy(self._reader)
        # It holds neither itself nor maps of files, nor what only searches need.
        for name in ("columns", "core", "scales", "row_norms", "_places"):
            self._reader.__dict__.pop(name, None)

    def __iter__(self) -> Iterator[str]:
        return iter(self._reader.manifest.columns or {})

    def __len__(self) -> int:
        return len(self._reader.manifest.columns or {})


def stored_rows(
    folder: Path, described: Description, manifest: Manifest
) -> Iterator[tuple[int, NDArray[Any]]]:
    """The rows of a shard as they are stored, in pieces: the first's number, and [rows, width].

    Raises:
        StoreError: If they are damaged.
    """
    path = folder / "rows.npy"
    written, kind = file_of(described, path), np.dtype(DTYPES[manifest.dtype])
    shape = (described.rows, manifest.row_width)
    head, width = len(header(kind.str, shape)), kind.itemsize * manifest.row_width
    if written.length != head + described.rows * width:
        raise StoreError(
            f"{path} is damaged: it must hold {described.rows} rows of {width} bytes, got "
            f"{written.length} bytes"
        )
    step = max(PIECE // width, 1)
    for first in range(0, described.rows, step):
        rows = min(step, described.rows - first)
        start = head + first * width
        content = read_range(path, written, start, start + rows * width)
        yield first, np.frombuffer(content, kind).reshape(rows, manifest.row_width)


def read_columns(folder: Path, described: Description, manifest: Manifest) -> list[NDArray[Any]]:
    """[rows] each: the columns of a shard, in the manifest's order.

    Raises:
        StoreError: If one is damaged.
    """
    return [
        read_column(folder, described, f"column-{index}", kind)
        for index, kind in enumerate((manifest.columns or {}).values())
    ]


def read_scales(folder: Path, described: Description) -> NDArray[np.float32]:
    """[rows] the scales of a shard.

    Raises:
        StoreError: If they are damaged.
    """
    path = folder / "scales.npy"
    scales = read_array(path, file_of(described, path), "<f4", (described.rows,))
    if not np.isfinite(scales).all() or (scales < 0).any():
        raise StoreError(f"{path} is damaged: scales must be finite and not negative")
    return scales


def read_column(folder: Path, described: Description, stem: str, kind: str) -> NDArray[Any]:
    """[rows] a column of a shard.

    Raises:
        StoreError: If it is damaged.
    """
    if kind == "str":
        return read_strings(folder, stem, described.files, described.rows)
    path = folder / f"{stem}.npy"
    return read_array(path, file_of(described, path), COLUMN_KINDS[kind], (described.rows,))


def read_ids(folder: Path, described: Description, manifest: Manifest) -> Ids:
    """[rows] the ids of a shard.

    Raises:
        StoreError: If they are damaged.
    """
    if manifest.ids not in ("int64", "str"):
        raise StoreError(f"{folder} is damaged: ids must be int64 or str, got {manifest.ids}")
    ids = read_column(folder, described, "ids", manifest.ids)
    if manifest.ids == "str":
        longest = max(map(len, ids))
        if longest > _arrays.MAX_ID:
            raise StoreError(
                f"{folder / 'ids.npy'} must hold ids of at most {_arrays.MAX_ID} characters, got "
                f"one of {longest}"
            )
        return ids.astype(np.str_)
    return ids


def file_of(described: Description, path: Path) -> Written:
    """What is known of a file of a shard.

    Raises:
        StoreError: If the shard's description does not name it.
    """
    if path.name not in described.files:
        raise StoreError(f"{path} must be named in its shard's description, and is not")
    return described.files[path.name]
