"""Exported stores as tables, in Arrow's file format and in Parquet.

They are written through pyarrow. Nothing in them is compressed, nor coded by dictionaries: a table
can then hold no more than its file is long, which a reader that does not trust it can compare.
What the readers of both have in common is here too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from whence._optional import imported
from whence.errors import StoreError
from whence.store.pieces import Field

_CALLER, _PACKAGE = "whence.export_store to a table", "'whence[arrow]'"

DESCRIPTION = b"whence"
"""The key of the description in a table's metadata."""

GROUP = 16 << 20
"""Bytes of rows of a group of a Parquet file, about; readers want groups that are large."""


def pyarrow() -> Any:
    """The module.

    Raises:
        MissingDependencyError: If it is not installed.
    """
    return imported("pyarrow", _CALLER, _PACKAGE)


def write_table(
    file: IO[bytes],
    form: str,
    description: str,
    fields: Sequence[Field],
    batches: Iterable[list[NDArray[Any]]],
) -> None:
    """Writes a table.

    Args:
        file: Open for writing.
        form: "arrow" or "parquet".
        description: In ASCII.
        fields: What each column holds.
        batches: Their values, some rows at a time.

    Raises:
        OSError: If the system refuses.
    """
    pa = pyarrow()
    schema = _schema(pa, fields).with_metadata({DESCRIPTION: description.encode()})
    with _writer(pa, file, form, schema) as writer:
        held, size = [], 0
        for batch in batches:
            columns = [_array(pa, field, each) for field, each in zip(fields, batch, strict=True)]
            held.append(pa.record_batch(columns, schema=schema))
            size += held[-1].nbytes
            if form == "arrow" or size >= GROUP:
                writer.write_table(pa.Table.from_batches(held))
                held, size = [], 0
        if held:
            writer.write_table(pa.Table.from_batches(held))


def _writer(pa: Any, file: IO[bytes], form: str, schema: Any) -> Any:
    if form == "arrow":
        return pa.ipc.new_file(file, schema)
    pq = imported("pyarrow.parquet", _CALLER, _PACKAGE)
    # Of rows the smallest and the largest say nothing.
    told = [name for name in schema.names if name != "row"]
    return pq.ParquetWriter(
        file, schema, compression="NONE", use_dictionary=False, write_statistics=told
    )


def _schema(pa: Any, fields: Sequence[Field]) -> Any:
    return pa.schema([pa.field(each.name, _kind(pa, each), nullable=False) for each in fields])


def _kind(pa: Any, field: Field) -> Any:
    if field.width is not None:
        if field.is_plain:
            return pa.list_(pa.float32(), field.width)
        return pa.binary(field.width * np.dtype(field.kind).itemsize)
    return {
        "str": pa.string(),
        "<i8": pa.int64(),
        "<f8": pa.float64(),
        "<f4": pa.float32(),
        "|b1": pa.bool_(),
    }[field.kind]


def _array(pa: Any, field: Field, values: NDArray[Any]) -> Any:
    if field.width is None:
        return pa.array(values.tolist() if field.kind == "str" else values, _kind(pa, field))
    flat = np.ascontiguousarray(values).reshape(-1)
    if field.is_plain:
        return pa.FixedSizeListArray.from_arrays(pa.array(flat), field.width)
    buffers = [None, pa.py_buffer(flat.view(np.uint8))]
    return pa.Array.from_buffers(_kind(pa, field), len(values), buffers)


class TableFile:
    """A file with a table that `write_table` wrote, or one that says so: what any format has.

    Args:
        path: Of the file.
        read: Bytes of it: where they begin, how many -> themselves.
        length: Of the file.
    """

    def __init__(self, path: Path, read: Callable[[int, int], bytes], length: int) -> None:
        self.path, self.length = path, length
        self._read, self._taken = read, 0

    def part(self, at: int, size: int) -> bytes:
        """Bytes of the file.

        Raises:
            StoreError: If it ends before.
        """
        if at < 0 or size > self.length - at:
            raise StoreError(f"{self.path} is damaged: it ends too early")
        return self._read(at, size)

    def values(self, at: int, size: int) -> bytes:
        """Bytes of values; what columns share is not read again and again.

        Raises:
            StoreError: If the file ends before, or more was read than it holds.
        """
        self._taken += size
        if self._taken > 2 * self.length:
            raise StoreError(f"{self.path} is damaged: it holds more than it is long")
        return self.part(at, size)

    def _no_export(self) -> StoreError:
        """The error of a table that has no description."""
        return StoreError(f"{self.path} must be an export of a store, got another table")

    def _check_count(self, found: int, fields: Sequence[Field]) -> None:
        """Nothing, if the schema has as many columns as are wanted.

        Raises:
            StoreError: If it has not.
        """
        if found != len(fields):
            names = ", ".join(field.name for field in fields)
            raise StoreError(f"{self.path} must have the columns {names:.300}, got {found} columns")

    def _check_columns(self, found: list[tuple[Any, ...]], wanted: list[tuple[Any, ...]]) -> None:
        """Nothing, if the schema has the columns that are wanted: the name, and the type of each.

        Raises:
            StoreError: If it has others.
        """
        if found != wanted:
            there, here = (b", ".join(name for name, *_ in each) for each in (found, wanted))
            raise StoreError(
                f"{self.path} must have the columns {here.decode():.300}, of their types, got "
                f"{there.decode(errors='replace'):.300}"
            )
