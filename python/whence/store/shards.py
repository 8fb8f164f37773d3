"""Shards: folders of files that are written once, what describes them, and packs of their entries.

A manifest has an entry for each shard, with the length and checksums of its description; the
description has those of its files. So a commit writes a few hundred bytes about a shard, however
large it is, and every byte is under a checksum that the manifest vouches for.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from whence import _arrays
from whence.errors import StoreError
from whence.store.files import (
    WRONG,
    NewFile,
    Written,
    array_name,
    array_parts,
    check_folder,
    check_length,
    header,
    json_bytes,
    names_of,
    read_json,
    reason,
    store_errors,
    string_arrays,
    sync_all,
    sync_directory,
    write_json,
)

SHARD = "shard-"
"""How the names of the folders of shards begin."""

PACK = "pack-"
"""How the names of packs begin."""

DESCRIPTION = "shard.json"

_SHARD = re.compile(SHARD + r"[0-9]{8,18}")
_PACK = re.compile(PACK + r"[0-9]{8,18}\.json")


@dataclass(frozen=True)
class Shard:
    """Rows of one checkpoint that were committed together, as a manifest names them.

    Attributes:
        name: Of its folder.
        checkpoint: The number of the checkpoint.
        rows: How many.
        described: Length and checksums of its description.
        member: The folder of the writer it is of, in a store of several; else none.
    """

    name: str
    checkpoint: int
    rows: int
    described: Written
    member: str = ""

    @property
    def number(self) -> int:
        """The number in its name."""
        return int(self.name.removeprefix(SHARD))

    def folder(self, path: Path) -> Path:
        """Where it lies in the store at `path`."""
        return path / self.member / self.name if self.member else path / self.name

    def entry(self) -> list[Any]:
        """What a manifest says of it."""
        return [self.name, self.checkpoint, self.rows, *self.described]

    @classmethod
    def of(cls, entry: Any) -> Shard:
        """The shard of an entry.

        Raises:
            ValueError: If there can be none such.
        """
        name, checkpoint, rows, *described = entry
        if not isinstance(name, str) or not _SHARD.fullmatch(name):
            raise ValueError(f"a shard's name must be {SHARD}N, got {name!r:.80}")
        if type(rows) is not int or rows < 1:
            raise ValueError(f"{name} must have rows, got {rows!r:.80}")
        if type(checkpoint) is not int or checkpoint < 0:
            raise ValueError(f"{name} must be of a checkpoint, got {checkpoint!r:.80}")
        return cls(name, checkpoint, rows, Written.of(described))


@dataclass(frozen=True)
class Description:
    """What lies in a shard's folder.

    Attributes:
        checkpoint: The number of the checkpoint.
        rows: How many.
        files: Name -> length and checksums.
        error: Mean relative error of quantised rows; None for others, or if not known.
    """

    checkpoint: int
    rows: int
    files: dict[str, Written]
    error: float | None = None

    def body(self) -> dict[str, Any]:
        """As JSON has it."""
        body: dict[str, Any] = {"checkpoint": self.checkpoint, "rows": self.rows}
        if self.error is not None:
            body["error"] = self.error
        return body | {"files": self.files}

    @classmethod
    def read(cls, path: Path, shard: Shard) -> Description:
        """The description of a shard of the store at `path`.

        Raises:
            StoreError: If it is damaged, or the folder or a file is not what it must be.
        """
        folder = shard.folder(path)
        check_folder(folder)
        found = cls.parse(folder / DESCRIPTION, read_json(folder / DESCRIPTION, shard.described))
        for name, written in found.files.items():
            check_length(folder / name, written.length)
        if (found.checkpoint, found.rows) != (shard.checkpoint, shard.rows):
            raise StoreError(
                f"{folder / DESCRIPTION} must be of {shard.rows} rows of checkpoint "
                f"{shard.checkpoint} as in the manifest, got {found.rows} of {found.checkpoint}"
            )
        return found

    @classmethod
    def parse(cls, path: Path, body: Any) -> Description:
        """A description from its JSON.

        Raises:
            StoreError: If it cannot be one.
        """
        try:
            files = {array_name(name): Written.of(each) for name, each in body["files"].items()}
            checkpoint, rows, error = body["checkpoint"], body["rows"], body.get("error")
            if type(checkpoint) is not int or type(rows) is not int:
                raise ValueError("checkpoint and rows must be numbers")
            if "rows.npy" not in files or not 1 <= rows <= files["rows.npy"].length:
                raise ValueError(f"rows.npy must hold {rows!r:.80} rows")
            if error is not None and not (isinstance(error, (int, float)) and 0 <= error <= 1):
                raise ValueError(f"error must be from 0 to 1, got {error!r:.80}")
            return cls(checkpoint, rows, files, error)
        except WRONG as error:
            raise StoreError(f"{path} is damaged: {reason(error)}") from None


@dataclass(frozen=True)
class Pack:
    """A file with the entries of shards.

    Attributes:
        name: Of the file.
        shards: How many.
        length: Of the file, in bytes.
        checksums: Of its blocks.
    """

    name: str
    shards: int
    length: int
    checksums: str

    @classmethod
    def of(cls, body: Any) -> Pack:
        """What a manifest says of one.

        Raises:
            ValueError: If it cannot be so.
        """
        found = cls(**body)
        Written.of((found.length, found.checksums))
        if not _PACK.fullmatch(found.name) or type(found.shards) is not int or found.shards < 1:
            raise ValueError(f"a pack must have a name and shards, got {found.name!r:.80}")
        return found


def write_pack(folder: Path, number: int, shards: list[Shard]) -> Pack:
    """Writes the entries of shards to a file of their own.

    Raises:
        StoreError: If it cannot.
    """
    name = f"{PACK}{number:08}.json"
    written = write_json(folder / name, {"shards": [shard.entry() for shard in shards]})
    return Pack(name, len(shards), *written)


def read_pack(folder: Path, pack: Pack) -> list[Any]:
    """The entries in a pack.

    Raises:
        StoreError: If it is damaged.
    """
    path = folder / pack.name
    body = read_json(path, Written(pack.length, pack.checksums))
    entries = body.get("shards") if isinstance(body, dict) else None
    if not isinstance(entries, list) or len(entries) != pack.shards:
        raise StoreError(f"{path} is damaged: it must hold {pack.shards} entries")
    return entries


def last_number(folder: Path, prefix: str) -> int:
    """The highest number among names that begin so: named in a manifest or left by a killed writer.

    Raises:
        StoreError: If the folder cannot be read.
    """
    names = names_of(folder, prefix)
    numbers = [name.removeprefix(prefix).split(".")[0].split("-")[0] for name in names]
    return max((int(n) for n in numbers if n.isdecimal() and len(n) <= 18), default=0)


class ShardWriter:
    """A shard that is being written: its rows as they come, the rest at its end.

    Nothing of it counts before a manifest names it.

    Args:
        path: The store's folder.
        number: Of the shard; no name in the store has it.
        checkpoint: The number of the checkpoint.
        kind: What `.npy` calls the type of stored values.
        width: Values of a stored row.

    Raises:
        StoreError: If the folder cannot be made.
    """

    def __init__(self, path: Path, number: int, checkpoint: int, kind: str, width: int) -> None:
        self._path, self._checkpoint, self._kind, self._width = path, checkpoint, kind, width
        self.folder = path / f"{SHARD}{number:08}"
        self._files: list[NewFile] = []
        self.rows = 0
        with store_errors(self.folder):
            self.folder.mkdir()
            try:
                self._rows = self._new("rows.npy", len(header(kind, (1, width))))
            except BaseException:  # a full disk: nothing may stay of it
                self.abandon()
                raise

    def append(self, stored: NDArray[Any]) -> None:
        """Writes stored rows, [rows, width], behind the others.

        Raises:
            StoreError: If it cannot.
        """
        with store_errors(self.folder):
            self._rows.write(np.ascontiguousarray(stored).reshape(-1).view(np.uint8).data)
        self.rows += len(stored)

    def start(self) -> None:
        """Lets the system begin to write the rows so far."""
        self._rows.start()

    def finish(
        self,
        scales: NDArray[np.float32],
        ids: NDArray[Any],
        columns: Sequence[NDArray[Any]],
        error: float | None = None,
    ) -> Shard:
        """Writes what stands beside the rows, and waits until all of it is durable.

        Args:
            scales: [rows]
            ids: [rows]
            columns: [rows] each, in the manifest's order.
            error: Mean relative error of quantised rows, if it is known.

        Raises:
            StoreError: If it cannot, or they are not of as many rows as were written.
        """
        if not self.rows == len(scales) == len(ids):
            raise StoreError(
                f"{self.folder} must have as many rows as scales and ids, got {self.rows}, "
                f"{len(scales)} and {len(ids)}"
            )
        arrays = {"scales.npy": scales} | _files_of("ids", ids)
        for index, column in enumerate(columns):
            arrays |= _files_of(f"column-{index}", column)
        with store_errors(self.folder):
            files = {"rows.npy": self._rows.seal(header(self._kind, (self.rows, self._width)))}
            for name, array in arrays.items():
                files[name] = self._written(name, *array_parts(array))
            body = Description(self._checkpoint, self.rows, files, error).body()
            described = self._written(DESCRIPTION, json_bytes(body))
            sync_all(self._files)
            self.close()
            sync_directory(self.folder)
            sync_directory(self._path)
        return Shard(self.folder.name, self._checkpoint, self.rows, described)

    def close(self) -> None:
        """Lets go of its files; as often as one likes."""
        for file in self._files:
            file.close()

    def abandon(self) -> None:
        """Removes it, as far as it can."""
        self.close()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _new(self, name: str, head: int = 0) -> NewFile:
        file = NewFile(self.folder / name, head)
        self._files.append(file)
        return file

    def _written(self, name: str, *parts: Any) -> Written:
        file = self._new(name)
        for part in parts:
            file.write(part)
        return file.seal()


def _files_of(stem: str, column: NDArray[Any]) -> dict[str, NDArray[Any]]:
    if _arrays.kind_of_array(column) == "str":
        return string_arrays(stem, column)
    return {f"{stem}.npy": column}
