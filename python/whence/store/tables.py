"""Exported stores as tables, in Arrow's file format and in Parquet; through pyarrow.

Nothing in them is compressed, nor coded by dictionaries: a table can then hold no more than its
file is long, which a reader that does not trust it can compare.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from whence._optional import imported
from whence.errors import MissingDependencyError, StoreError
from whence.store.files import MAX_JSON, PIECE
from whence.store.pieces import ROWS, Field

DESCRIPTION = b"whence"
"""The key of the description in a table's metadata."""

GROUP = 16 << 20
"""Bytes of rows of a group of a Parquet file, about; readers want groups that are large."""

ARROW, PARQUET = b"ARROW1", b"PAR1"
"""How the files begin and end."""

_SAFE = 15
"""Of pyarrow's versions the first that is taken: those before 14.0.1 ran code that they read."""

_SCHEMA, _BATCH = 1, 3
"""Kinds of messages of Arrow's."""


def pyarrow(caller: str) -> Any:
    """The module.

    Raises:
        MissingDependencyError: If it is not installed, or too old to read what is not trusted.
    """
    found = imported("pyarrow", caller, "'whence[arrow]'")
    if int(found.__version__.split(".")[0]) < _SAFE:
        raise MissingDependencyError(
            f"{caller} needs pyarrow {_SAFE} or newer, got {found.__version__}: "
            "pip install 'whence[arrow]'"
        )
    return found


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
    pa = pyarrow("whence.export_store")
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
    pq = imported("pyarrow.parquet", "whence.export_store", "'whence[arrow]'")
    return pq.ParquetWriter(file, schema, compression="NONE", use_dictionary=False)


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


class ArrowFile:
    """A file of Arrow's that is not trusted.

    Its messages are read one after the other, and none before its length was compared with the
    file's: pyarrow would believe it, and unpack what is compressed.

    Args:
        path: Of the file.
        read: Bytes of it: offset, length -> content.
        length: Of the file.

    Raises:
        MissingDependencyError: If pyarrow is not installed.
        StoreError: If it is damaged.
        Exception: As pyarrow raises it, for what it cannot read.
    """

    def __init__(self, path: Path, read: Callable[[int, int], bytes], length: int) -> None:
        self._pa = pyarrow("whence.import_store")
        self._path, self._read, self._length = path, read, length
        if read(length - len(ARROW), len(ARROW)) != ARROW:
            raise StoreError(f"{path} is damaged: it ends too early")
        self._messages = self._all()
        kind, content = next(self._messages, (0, b""))
        if kind != _SCHEMA:
            raise StoreError(f"{path} is damaged: it must begin with a schema")
        self._schema = self._pa.ipc.read_schema(self._pa.py_buffer(content))

    def description(self) -> bytes:
        """What the table says about itself.

        Raises:
            StoreError: If it says nothing.
        """
        return _description(self._path, self._schema.metadata)

    def read(self, fields: Sequence[Field], rows: int) -> Iterator[list[NDArray[Any]]]:
        """The values of the columns, some rows at a time; texts are objects.

        Raises:
            StoreError: If columns are missing, damaged, or of other types, or rows too many.
        """
        pa = self._pa
        _check_schema(self._path, self._schema, _schema(pa, fields))
        left = rows
        for kind, content in self._messages:
            if kind != _BATCH:
                raise StoreError(f"{self._path} must hold rows, got another message")
            batch = pa.ipc.read_record_batch(pa.py_buffer(content), self._schema)
            batch.validate(full=True)
            left -= batch.num_rows
            if left < 0:
                break
            for start in range(0, batch.num_rows, ROWS):
                yield _values(self._pa, self._path, fields, batch.slice(start, ROWS))
        if left:
            raise StoreError(f"{self._path} is damaged: it must hold {rows} rows")

    def _all(self) -> Iterator[tuple[int, bytes]]:
        """The kind and the bytes of each message."""
        at = 8
        while True:
            mark, size = struct.unpack("<Ii", self._part(at, 8))
            if mark != 0xFFFFFFFF or size < 0 or size > 2 * MAX_JSON:
                raise StoreError(f"{self._path} is damaged: there must be a message at byte {at}")
            if not size:
                return
            kind, body, is_compressed = _message(self._part(at + 8, size))
            if is_compressed:
                raise StoreError(f"{self._path} must hold rows that are not compressed")
            if body < 0:
                raise StoreError(f"{self._path} is damaged: a message at byte {at} ends early")
            yield kind, self._part(at, 8 + size + body)
            at += 8 + size + body

    def _part(self, at: int, size: int) -> bytes:
        if size > self._length - at:
            raise StoreError(f"{self._path} is damaged: it ends too early")
        return self._read(at, size)


def _message(content: bytes) -> tuple[int, int, bool]:
    """The kind of a message of Arrow's, the length of its body, and whether that is compressed.

    Message.fbs of Arrow's format: a table has the offset of its vtable, which has those of its
    fields, 0 for one that is not there.
    """

    def at(kind: str, place: int) -> int:
        if place < 0:
            raise StoreError("a message must lie in its bytes")
        return int(struct.unpack_from(kind, content, place)[0])

    def field(table: int, number: int) -> int:
        vtable = table - at("<i", table)
        if 4 + 2 * number >= at("<H", vtable):
            return 0
        offset = at("<H", vtable + 4 + 2 * number)
        return table + offset if offset else 0

    message = at("<I", 0)
    kind, header, length = (field(message, number) for number in (1, 2, 3))
    found = at("<B", kind) if kind else 0
    compression = 0
    if found == _BATCH and header:
        compression = field(header + at("<I", header), 3)
    return found, at("<q", length) if length else 0, bool(compression)


class ParquetFile:
    """A Parquet file that is not trusted.

    Args:
        path: Of the file.
        file: Open for reading.
        length: Of the file.

    Raises:
        MissingDependencyError: If pyarrow is not installed.
        StoreError: If columns are compressed.
        Exception: As pyarrow raises it, for what it cannot read.
    """

    def __init__(self, path: Path, file: IO[bytes], length: int) -> None:
        self._pa = pyarrow("whence.import_store")
        self._path, self._file, self._length = path, file, length
        self._whole = self._opened()
        metadata = self._whole.metadata
        for group in range(metadata.num_row_groups):
            for column in range(metadata.num_columns):
                found = metadata.row_group(group).column(column).compression
                if found != "UNCOMPRESSED":
                    raise StoreError(f"{path} must hold columns that are not compressed: {found}")

    def _opened(self, **options: Any) -> Any:
        pq = imported("pyarrow.parquet", "whence.import_store", "'whence[arrow]'")
        limits = {
            "thrift_string_size_limit": min(self._length, 4 * MAX_JSON),
            "thrift_container_size_limit": min(self._length, MAX_JSON),
        }
        return pq.ParquetFile(
            self._file, pre_buffer=False, buffer_size=1 << 20, **limits, **options
        )

    def description(self) -> bytes:
        """What the table says about itself.

        Raises:
            StoreError: If it says nothing.
        """
        return _description(self._path, self._whole.metadata.metadata)

    def read(self, fields: Sequence[Field], rows: int) -> Iterator[list[NDArray[Any]]]:
        """The values of the columns, some rows at a time; texts are objects.

        Raises:
            StoreError: If columns are missing, damaged, or of other types, or rows too many.
        """
        _check_schema(self._path, self._whole.schema_arrow, _schema(self._pa, fields))
        if self._whole.metadata.num_rows != rows:
            raise StoreError(f"{self._path} is damaged: it must hold {rows} rows")
        texts = [field.name for field in fields if field.kind == "str"]
        # As dictionaries: a text that a page names a million times is then in memory once.
        opened = self._opened(read_dictionary=texts)
        compute = imported("pyarrow.compute", "whence.import_store", "'whence[arrow]'")
        widest = max((field.size for field in fields), default=1)
        step = max(min(ROWS, PIECE // widest), 1)
        left, letters = rows, self._length
        for batch in opened.iter_batches(step, use_threads=False):
            batch.validate(full=True)
            left -= batch.num_rows
            for name in texts:
                column = batch.column(batch.schema.get_field_index(name))
                if column.null_count:
                    raise StoreError(f"{self._path} is damaged: {name!r:.80} has empty values")
                lengths = compute.binary_length(column.dictionary).to_numpy()
                letters -= int(lengths[column.indices.to_numpy()].sum(dtype=np.int64))
            if left < 0 or letters < 0:
                raise StoreError(f"{self._path} is damaged: it holds more than it is long")
            yield _values(self._pa, self._path, fields, batch)
        if left:
            raise StoreError(f"{self._path} is damaged: it must hold {rows} rows")


def _description(path: Path, metadata: Any) -> bytes:
    found = (metadata or {}).get(DESCRIPTION)
    if found is None:
        raise StoreError(f"{path} must be an export of a store, got another table")
    return bytes(found)


def _check_schema(path: Path, found: Any, wanted: Any) -> None:
    if not found.equals(wanted, check_metadata=False):
        there, here = (", ".join(str(each) for each in schema) for schema in (found, wanted))
        raise StoreError(f"{path} must have the columns {here:.300}, got {there:.300}")


def _values(pa: Any, path: Path, fields: Sequence[Field], batch: Any) -> list[NDArray[Any]]:
    """The columns of a batch, as numpy's."""
    found: list[NDArray[Any]] = []
    for field, column in zip(fields, batch.columns, strict=True):
        if column.null_count:
            raise StoreError(f"{path} is damaged: {field.name!r:.80} has empty values")
        if field.width is not None:
            start, size = column.offset * field.size, len(column) * field.size
            content = np.frombuffer(column.buffers()[1], np.uint8)[start : start + size]
            found.append(content.view(field.kind).reshape(len(column), field.width))
        elif field.kind == "str":
            texts = np.empty(len(column), object)
            if hasattr(column, "dictionary"):
                used, at = np.unique(column.indices.to_numpy(), return_inverse=True)
                words = np.empty(len(used), object)
                words[:] = column.dictionary.take(pa.array(used)).to_pylist()
                texts[:] = words[at]
            else:
                texts[:] = column.to_pylist()
            found.append(texts)
        else:
            found.append(column.to_numpy(zero_copy_only=False))
    return found
