"""Reading a store: a snapshot of what was committed when it was opened."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from whence import _arrays, _core
from whence._arrays import Ids
from whence.errors import (
    CheckpointError,
    IdError,
    MismatchError,
    StoreError,
)
from whence.store.examples import Places, eligible
from whence.store.files import data_offset, read_array, read_strings, store_errors
from whence.store.manifest import COLUMN_KINDS, DTYPES, Manifest, Shard


class Reader:
    """The rows of a store with their ids and columns.

    An *example* is an id; it has one row in each checkpoint it was recorded in. Examples are
    numbered in the order their ids were first recorded.

    Args:
        path: The store's folder.

    Raises:
        StoreError: If there is no store, or it is damaged.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = path = _arrays.path("path", path)
        with store_errors(path):
            if not path.is_dir():
                got = f"the file {path}" if path.exists() else f"{path}, which does not exist"
                raise StoreError(f"path must be the folder of a store, got {got}")
        self.manifest, _ = Manifest.load(path)

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
        parts = [
            read_array(
                self.path / shard.name / "scales.npy",
                _file(self.path, shard, "scales.npy"),
                "<f4",
                (shard.rows,),
            )
            for shard in self.manifest.shards
        ]
        scales = np.concatenate(parts) if parts else np.empty(0, np.float32)
        if not np.isfinite(scales).all() or (scales < 0).any():
            raise StoreError(f"{self.path} is damaged: scales must be finite and not negative")
        return scales

    @cached_property
    def core(self) -> _core.Rows:
        """The rows as the search engine takes them."""
        files: list[Any] = []
        for shard in self.manifest.shards:
            path = self.path / shard.name / "rows.npy"
            shape = (shard.rows, self.manifest.row_width)
            offset = data_offset(path, DTYPES[self.manifest.dtype], shape)
            files.append((path, offset, shard.rows, None))
        return _core.Rows(files, self.dim, self.manifest.dtype, self.scales)

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
        shards = self.manifest.shards
        errors = [shard.error for shard in shards if shard.error is not None]
        if not shards or len(errors) < len(shards):
            return None
        return float(np.average(errors, weights=[shard.rows for shard in shards]))

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

    def eligible(self, where: Any) -> NDArray[np.bool_]:
        """[examples] whether each passes a filter.

        Args:
            where: None for all; a dict of column name to a value or a list of values, all of
                which must hold; [examples] bool; or ids.

        Raises:
            ArgumentError: If a column is not in the store.
            DtypeError: If `where` is something else.
            IdError: If an id is not in the store.
        """
        return eligible(where, len(self), self.columns, self.manifest.columns or {}, self.positions)

    def _read_examples(self, name: str) -> NDArray[Any]:
        """[examples] a column, at the first checkpoint that each example has."""
        kinds = self.manifest.columns or {}
        stem, kind = f"column-{list(kinds).index(name)}", kinds[name]
        first = np.full(len(self), -1, np.int64)
        for rows in self._order[1][::-1]:
            first = np.where(rows >= 0, rows, first)
        parts = [read_column(self.path, shard, stem, kind) for shard in self.manifest.shards]
        found: NDArray[Any] = np.concatenate(parts)[first] if parts else np.empty(0)
        return found

    @cached_property
    def _places(self) -> Places:
        return Places(self.ids)

    @cached_property
    def _order(self) -> tuple[Ids, NDArray[np.int64]]:
        """Ids in order of first appearance; [checkpoints, examples] numbers of their rows."""
        shards = self.manifest.shards
        parts = [read_ids(self.path, shard, self.manifest) for shard in shards]
        if not parts:
            return np.empty(0, np.int64), np.empty((len(self.checkpoints), 0), np.int64)
        all_ids = np.concatenate(parts)
        checkpoint = np.repeat(
            [shard.checkpoint for shard in shards], [shard.rows for shard in shards]
        )
        if len(self.checkpoints) == 1:
            numbers = np.arange(len(all_ids), dtype=np.int64)[None]
            if len(np.unique(all_ids)) < len(all_ids):
                raise StoreError(f"{self.path} is damaged: ids must be distinct in a checkpoint")
            return all_ids, numbers
        unique, first, inverse = np.unique(all_ids, return_index=True, return_inverse=True)
        by_appearance = np.argsort(first, kind="stable")
        rank = np.empty(len(unique), np.int64)
        rank[by_appearance] = np.arange(len(unique))
        numbers = np.full((len(self.checkpoints), len(unique)), -1, np.int64)
        example = rank[inverse.reshape(-1)]
        numbers[checkpoint, example] = np.arange(len(all_ids))
        if (numbers >= 0).sum() < len(all_ids):
            raise StoreError(f"{self.path} is damaged: ids must be distinct in a checkpoint")
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

    def __iter__(self) -> Iterator[str]:
        return iter(self._reader.manifest.columns or {})

    def __len__(self) -> int:
        return len(self._reader.manifest.columns or {})


def read_column(path: Path, shard: Shard, stem: str, kind: str) -> NDArray[Any]:
    """A column of a shard."""
    folder = path / shard.name
    if kind == "str":
        return read_strings(folder, stem, shard.files, shard.rows)
    name = f"{stem}.npy"
    written = _file(path, shard, name)
    return read_array(folder / name, written, COLUMN_KINDS[kind], (shard.rows,))


def read_ids(path: Path, shard: Shard, manifest: Manifest) -> Ids:
    """The ids of a shard."""
    if manifest.ids not in ("int64", "str"):
        raise StoreError(f"{path} is damaged: ids must be int64 or str, got {manifest.ids}")
    ids = read_column(path, shard, "ids", manifest.ids)
    return ids.astype(np.str_) if manifest.ids == "str" else ids


def _file(path: Path, shard: Shard, name: str) -> Any:
    if name not in shard.files:
        raise StoreError(f"{path / shard.name / name} must be named in the manifest, and is not")
    return shard.files[name]
