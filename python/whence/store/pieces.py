"""Rows of stores, piece by piece: as they are copied, merged and exported."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from whence._arrays import Ids
from whence._interrupts import interruptible
from whence.errors import IdError, StoreError
from whence.store.files import PIECE
from whence.store.gone import kept_rows
from whence.store.manifest import Manifest
from whence.store.reader import (
    Reader,
    read_column,
    read_ids,
    read_scales,
    stored_rows,
)
from whence.store.shards import Description, Shard

ROWS = 1 << 14
"""Rows of a piece at most; there are fewer if they are wide."""


class Batch(NamedTuple):
    """Rows of one checkpoint, and what stands beside them.

    Attributes:
        checkpoint: Its number.
        stored: [rows, width] as they are stored.
        scales: [rows] float32.
        ids: [rows] int64 or str.
        columns: [rows] each.
    """

    checkpoint: int
    stored: NDArray[Any]
    scales: NDArray[np.float32]
    ids: Ids
    columns: Sequence[NDArray[Any]] = ()


@dataclass(frozen=True)
class Field:
    """What a column of an exported store holds.

    Attributes:
        key: The name of its array.
        name: The name of its column in a table.
        kind: What `.npy` calls its type; "str" for texts.
        width: Values of a row, if it is of rows.
        is_plain: Whether rows are numbers for other programs, and not as they are stored.
    """

    key: str
    name: str
    kind: str
    width: int | None = None
    is_plain: bool = False

    @property
    def size(self) -> int:
        """Bytes of a value; of a text at least."""
        return 4 if self.kind == "str" else np.dtype(self.kind).itemsize * (self.width or 1)


def step_of(fields: Sequence[Field]) -> int:
    """How many rows of columns are read at a time."""
    return max(min(ROWS, PIECE // max(field.size for field in fields)), 1)


@dataclass(frozen=True)
class Piece:
    """Rows of a shard.

    Attributes:
        folder: Of the store, or of the writer, that the shard is of.
        manifest: Of that.
        shard: As that manifest names it.
        checkpoint: The number of its checkpoint where the rows go.
        kept: [rows of the shard] which of them; None for all.
    """

    folder: Path
    manifest: Manifest
    shard: Shard
    checkpoint: int
    kept: NDArray[np.bool_] | None

    def __len__(self) -> int:
        return self.shard.rows if self.kept is None else int(self.kept.sum())

    @property
    def bytes(self) -> int:
        """Of all rows of the shard."""
        return self.shard.rows * self.manifest.row_bytes

    @cached_property
    def described(self) -> Description:
        """What is in the shard.

        Raises:
            StoreError: If its description is damaged.
        """
        return Description.read(self.folder, self.shard)

    def only(self, chosen: NDArray[np.bool_]) -> Piece:
        """Some of its rows.

        Args:
            chosen: [rows] whether each of them.
        """
        if chosen.all():
            return self
        kept = np.ones(self.shard.rows, np.bool_) if self.kept is None else self.kept.copy()
        kept[kept] = chosen
        return replace(self, kept=kept)

    def rows(self) -> Iterator[NDArray[Any]]:
        """[rows, width] as they are stored, some at a time.

        Raises:
            StoreError: If they are damaged.
        """
        if not len(self):
            return
        for first, stored in stored_rows(self._files, self.described, self.manifest):
            if self.kept is not None:
                stored = stored[self.kept[first : first + len(stored)]]
            for start in range(0, len(stored), ROWS):
                yield stored[start : start + ROWS]

    def scales(self) -> NDArray[np.float32]:
        """[rows].

        Raises:
            StoreError: If they are damaged.
        """
        return self._kept(read_scales(self._files, self.described))

    def ids(self) -> Ids:
        """[rows].

        Raises:
            StoreError: If they are damaged.
        """
        return self._kept(read_ids(self._files, self.described, self.manifest))

    def column(self, name: str) -> NDArray[Any]:
        """[rows].

        Raises:
            StoreError: If it is damaged.
        """
        kinds = self.manifest.columns or {}
        stem = f"column-{list(kinds).index(name)}"
        return self._kept(read_column(self._files, self.described, stem, kinds[name]))

    def batches(
        self, columns: Sequence[str], rows: Iterator[NDArray[Any]] | None = None
    ) -> Iterator[Batch]:
        """All of them, some at a time.

        Args:
            columns: The names of those that are asked for.
            rows: What is taken for the rows; None for what is stored.

        Raises:
            StoreError: If they are damaged.
        """
        if not len(self):
            return
        scales, ids = self.scales(), self.ids()
        beside = [self.column(name) for name in columns]
        start = 0
        for stored in self.rows() if rows is None else rows:
            here = slice(start, start + len(stored))
            others = [column[here] for column in beside]
            yield Batch(self.checkpoint, stored, scales[here], ids[here], others)
            start += len(stored)

    @property
    def _files(self) -> Path:
        return self.shard.folder(self.folder)

    def _kept(self, array: NDArray[Any]) -> NDArray[Any]:
        return array if self.kept is None else array[self.kept]


def pieces_of(
    path: Path,
    found: Mapping[str, Manifest],
    whole: Manifest,
    gone_of: Mapping[str, NDArray[np.int64]],
) -> list[Piece]:
    """The rows of stores that are not gone, in order.

    Args:
        path: The folder that they lie in.
        found: The name of the folder of each -> what it says about itself.
        whole: What they say about themselves as one.
        gone_of: The name of the folder of each that rows are gone from -> [rows, 2] shard and row.

    Raises:
        StoreError: If rows are gone that never were there.
    """
    pieces: list[Piece] = []
    for name, manifest in found.items():
        folder = path / name
        gone = gone_of.get(name, np.empty((0, 2), np.int64))
        for shard in manifest.shards:
            checkpoint = whole.shards[len(pieces)].checkpoint
            kept = kept_rows(gone, shard.number, shard.rows)
            pieces.append(Piece(folder, manifest, shard, checkpoint, kept))
    return pieces


def pieces_in(reader: Reader) -> list[Piece]:
    """The rows of a store that are not gone, in order.

    Raises:
        StoreError: If rows are gone that never were there.
    """
    return pieces_of(reader.path, reader.parts, reader.manifest, reader.gone)


def without_doubles(pieces: list[Piece], names: Sequence[str], *, first: bool) -> list[Piece]:
    """The pieces, without rows of an id that an earlier store has at the same checkpoint.

    Args:
        pieces: Of all stores.
        names: Of the checkpoints.
        first: Whether there may be any.

    Raises:
        IdError: If there are, and must not be; says where.
        StoreError: If a store has an id twice at a checkpoint.
    """
    found = list(pieces)
    numbers: dict[Path, int] = {}
    folders = np.array([numbers.setdefault(each.folder, len(numbers)) for each in pieces])
    for checkpoint, name in enumerate(names):
        places = [at for at, piece in enumerate(pieces) if piece.checkpoint == checkpoint]
        if not places:
            continue
        held = [pieces[at].ids() for at in places]
        ids = np.concatenate(held)
        owners = np.repeat(places, [len(each) for each in held])
        order = interruptible(np.argsort, ids, kind="stable")
        same = np.flatnonzero(ids[order][1:] == ids[order][:-1])
        if not len(same):
            continue
        before, after = (folders[owners[order[at]]] for at in (same, same + 1))
        if (before == after).any():
            folder = pieces[owners[order[same[before == after][0]]]].folder
            raise StoreError(f"{folder} is damaged: ids must be distinct in a checkpoint")
        if not first:
            one, two = (pieces[owners[order[at]]].folder for at in (same[0], same[0] + 1))
            raise IdError(
                f"ids must be of one store each at checkpoint {name!r}, got "
                f"{ids[order[same[0]]].item()!r} of {one} and of {two}; with on_duplicate='first' "
                "the first row is taken"
            )
        keep = np.ones(len(ids), np.bool_)
        keep[order[same + 1]] = False
        ends = np.cumsum([len(each) for each in held])[:-1]
        for at, chosen in zip(places, np.split(keep, ends), strict=True):
            found[at] = pieces[at].only(chosen)
    return found
