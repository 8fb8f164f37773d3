"""Reading exported stores in Parquet, which are not trusted.

Only what `write_table` writes is read, by a few lines of our own: flat columns that have no empty
values, whose pages are neither compressed nor coded. A library that reads every file there is
believes lengths, unpacks what is coded, and can end the process.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from whence.errors import StoreError
from whence.store.files import MAX_JSON
from whence.store.pieces import Field, step_of
from whence.store.tables import DESCRIPTION, TableFile

MAGIC = b"PAR1"
"""How a file begins and ends."""

_TAIL = 8
"""Bytes at the end: the length of the footer, and the magic word."""

_WINDOW = 1 << 16
"""Bytes that the header of a page has at most: its statistics can hold texts."""

_DEPTH = 12
"""How deep structures lie in each other at most."""

_TYPES = {"|b1": 0, "<i8": 2, "<f4": 4, "<f8": 5, "str": 6}
"""Types of columns, as the format numbers them."""

_FIXED = 7
"""The type of rows: bytes of one number."""

# Numbers of fields that are read, of parquet.thrift, and those of the structures in them. Of lists
# it is only noted where they lie: of one that is long Python's objects would take many times the
# bytes.
_FOOTER: Mapping[int, Any] = {2: {}, 4: {}, 5: {}}
_ENTRY: Mapping[int, Any] = {1: {}, 2: {}}
_ELEMENT: Mapping[int, Any] = {1: {}, 2: {}, 3: {}, 4: {}, 5: {}}
_GROUP: Mapping[int, Any] = {1: {}, 3: {}}
_COLUMN: Mapping[int, Any] = {1: {}, 3: {1: {}, 4: {}, 5: {}, 7: {}, 9: {}, 11: {}}}
_PAGE: Mapping[int, Any] = {1: {}, 2: {}, 3: {}, 5: {1: {}, 2: {}}}


class _List(NamedTuple):
    """Where a list lies.

    Attributes:
        kind: Of its items.
        size: How many there are.
        at: The first byte of the first.
    """

    kind: int
    size: int
    at: int


class _Thrift:
    """Structures of Thrift's compact protocol.

    https://github.com/apache/thrift/blob/master/doc/specs/thrift-compact-protocol.md

    Args:
        content: The bytes that they lie in.
    """

    def __init__(self, content: bytes) -> None:
        self._content, self.at = content, 0

    def structure(self, wanted: Mapping[int, Any], depth: int = 0) -> dict[int, Any]:
        """The fields that are wanted, by their numbers; others are passed over, as lists are."""
        if depth > _DEPTH:
            raise ValueError("structures must not lie so deep in each other")
        found: dict[int, Any] = {}
        field = 0
        while head := self._byte():
            kind, more = head & 15, head >> 4
            field = field + more if more else self._signed()
            value = self._value(kind, wanted.get(field, {}), depth)
            if field in wanted:
                found[field] = value
        return found

    def structures(self, found: _List, wanted: Mapping[int, Any]) -> Iterator[dict[int, Any]]:
        """Those of a list, one after the other."""
        if found.kind != 12:
            raise ValueError(f"a list must be of structures, got kind {found.kind}")
        self.at = found.at
        for _ in range(found.size):
            yield self.structure(wanted)

    def _value(self, kind: int, wanted: Mapping[int, Any], depth: int) -> Any:
        if kind in (1, 2):
            return kind == 1
        if kind == 3:
            return self._byte()
        if kind in (4, 5, 6):
            return self._signed()
        if kind == 7:
            return self._bytes(8)
        if kind == 8:
            return self._bytes(self._unsigned())
        if kind in (9, 10):
            head = self._byte()
            size, of = head >> 4, head & 15
            if size == 15:
                size = self._unsigned()
            found = _List(of, size, self.at)
            self._pass([of], size, depth)
            return found
        if kind == 11:
            size = self._unsigned()
            of = self._byte() if size else 0
            self._pass([of >> 4, of & 15], size, depth)
            return None
        if kind == 12:
            return self.structure(wanted, depth + 1)
        raise ValueError(f"a field must be of a known kind, got {kind}")

    def _pass(self, kinds: list[int], size: int, depth: int) -> None:
        for _ in range(size):  # of which each takes a byte at least
            for kind in kinds:
                if kind in (1, 2):
                    self._byte()
                else:
                    self._value(kind, {}, depth + 1)

    def _byte(self) -> int:
        if self.at >= len(self._content):
            raise ValueError("a structure must lie in its bytes")
        self.at += 1
        return self._content[self.at - 1]

    def _bytes(self, size: int) -> bytes:
        if size > len(self._content) - self.at:
            raise ValueError("a text must lie in its bytes")
        self.at += size
        return self._content[self.at - size : self.at]

    def _unsigned(self) -> int:
        found = 0
        for shift in range(0, 70, 7):
            byte = self._byte()
            found |= (byte & 127) << shift
            if byte < 128:
                return found
        raise ValueError("a number must have at most 64 bits")

    def _signed(self) -> int:
        found = self._unsigned()
        return found >> 1 ^ -(found & 1)


class ParquetFile(TableFile):
    """A Parquet file; its arguments are those of any `TableFile`.

    Raises:
        StoreError: If it is damaged.
        Exception: Another of Python's, if its footer is none.
    """

    def __init__(self, path: Path, read: Callable[[int, int], bytes], length: int) -> None:
        super().__init__(path, read, length)
        tail = self.part(length - _TAIL, _TAIL)
        size = int.from_bytes(tail[:4], "little")
        if tail[4:] != MAGIC or size > 4 * MAX_JSON:
            raise StoreError(f"{path} is damaged: it ends too early")
        self._content = self.part(length - _TAIL - size, size)
        self._footer = _Thrift(self._content).structure(_FOOTER)

    def description(self) -> bytes:
        """What the table says about itself.

        Raises:
            StoreError: If it says nothing.
        """
        for each in self._list(self._footer.get(5), _ENTRY):
            if each.get(1) == DESCRIPTION:
                return bytes(memoryview(each[2]))  # a text, and nothing else
        raise self._no_export()

    def read(self, fields: Sequence[Field], rows: int) -> Iterator[list[NDArray[Any]]]:
        """The values of the columns, some rows at a time; texts are objects.

        Raises:
            StoreError: If columns are missing, damaged, or of other types, or rows too many.
        """
        self._check(fields)
        left, step = rows, step_of(fields)
        for group in self._list(self._footer.get(4), _GROUP):
            count, chunks = group[3], group[1]
            left -= count
            if count < 0 or left < 0 or chunks.size != len(fields):
                raise StoreError(f"{self.path} is damaged: it must hold {rows} rows")
            columns = [
                _Column(self, field, chunk, count)
                for field, chunk in zip(fields, self._list(chunks, _COLUMN), strict=True)
            ]
            for start in range(0, count, step):
                yield [column.next(min(step, count - start)) for column in columns]
        if left:
            raise StoreError(f"{self.path} is damaged: it must hold {rows} rows")

    def _check(self, fields: Sequence[Field]) -> None:
        """Nothing, if the schema has these columns.

        Raises:
            StoreError: If it has others.
        """
        wanted = [
            (
                field.name.encode(),
                _FIXED if field.width is not None else _TYPES[field.kind],
                field.size if field.width is not None else None,
                0,
            )
            for field in fields
        ]
        self._check_count(self._footer[2].size - 1, fields)
        root, *rest = self._list(self._footer[2], _ELEMENT)
        found = [(each.get(4), each.get(1), each.get(2), each.get(3)) for each in rest]
        self._check_columns(found, wanted)
        self._check_count(root[5], fields)

    def _list(self, found: _List | None, wanted: Mapping[int, Any]) -> Iterator[dict[int, Any]]:
        """The structures of a list of the footer; none if it is not there."""
        return iter(()) if found is None else _Thrift(self._content).structures(found, wanted)


class _Column:
    """The values of a column in a group of rows, from the first on.

    Args:
        file: That it is in.
        field: What it holds.
        chunk: What the footer says of it.
        count: How many values there are.

    Raises:
        StoreError: If it lies elsewhere, is compressed, or has another number of values.
    """

    def __init__(self, file: ParquetFile, field: Field, chunk: dict[int, Any], count: int) -> None:
        self._file, self._field = file, field
        said = chunk[3]
        if said[4] != 0:
            raise StoreError(f"{file.path} must hold columns that are not compressed")
        if 1 in chunk or said[5] != count:
            raise StoreError(f"{file.path} is damaged: a column must have {count} values")
        self._at, self._end = said[9], said[9] + said[7]
        self._left = 0  # values of the page that are not read
        self._page = 0  # where they lie
        self._bit = 0  # of the first byte, for bools
        self._texts = b""  # the page, if it is of texts

    def next(self, rows: int) -> NDArray[Any]:
        """[rows] the next values.

        Raises:
            StoreError: If they are damaged.
        """
        parts: list[NDArray[Any]] = []
        while rows:
            if not self._left:
                self._next_page()
            take = min(rows, self._left)
            parts.append(self._take(take))
            rows, self._left = rows - take, self._left - take
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def _next_page(self) -> None:
        """Goes to the next page that has values.

        Raises:
            StoreError: If there is none, or it is coded.
        """
        path = self._file.path
        if not 0 <= self._at < self._end:
            raise StoreError(f"{path} is damaged: {self._field.name!r:.80} has too few values")
        window = min(_WINDOW, self._end - self._at, self._file.length - self._at)
        thrift = _Thrift(self._file.part(self._at, window))
        head = thrift.structure(_PAGE)
        if head[1] != 0 or head[5][2] != 0:
            raise StoreError(f"{path} must hold plain pages, got coded ones")
        size, count = head[3], head[5][1]
        self._page = self._at + thrift.at
        self._at = self._page + size
        if size < 0 or count < 1 or head[2] != size or self._at > self._end:
            raise StoreError(f"{path} is damaged: a page must lie in its column")
        self._left, self._bit = count, 0
        if self._field.kind == "str":
            self._texts, self._page = self._file.values(self._page, size), 0
        elif size < (-(-count // 8) if self._field.kind == "|b1" else count * self._field.size):
            raise StoreError(f"{path} is damaged: a page must hold {count} values")

    def _take(self, rows: int) -> NDArray[Any]:
        field = self._field
        if field.kind == "str":
            found = np.empty(rows, object)
            found[:] = [self._text() for _ in range(rows)]
            return found
        if field.kind == "|b1":
            size = -(-(self._bit + rows) // 8)
            packed = np.frombuffer(self._file.values(self._page, size), np.uint8)
            bits = np.unpackbits(packed, bitorder="little")[self._bit :][:rows]
            self._page += (self._bit + rows) // 8
            self._bit = (self._bit + rows) % 8
            return bits.astype(np.bool_)
        content = self._file.values(self._page, rows * field.size)
        self._page += rows * field.size
        values = np.frombuffer(content, field.kind)
        return values if field.width is None else values.reshape(rows, field.width)

    def _text(self) -> str:
        start = self._page + 4
        end = start + int.from_bytes(self._texts[self._page : start], "little")
        if end > len(self._texts):
            raise StoreError(f"{self._file.path} is damaged: a text must lie in its page")
        self._page = end
        return self._texts[start:end].decode()
