"""Reading exported stores in Arrow's file format, which are not trusted.

Only what `write_table` writes is read, by a few lines of our own: a library that reads every file
there is believes lengths, unpacks what is compressed, and can end the process.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from whence.errors import StoreError
from whence.store.files import MAX_JSON
from whence.store.pieces import Field, step_of
from whence.store.tables import DESCRIPTION, TableFile

MAGIC = b"ARROW1"
"""How a file begins and ends."""

_BEGIN = 8
"""The first byte after the magic word, which is filled to as many."""

_MARK = 0xFFFFFFFF
"""Before each message, and the length of what describes it."""

_SCHEMA, _BATCH = 1, 3
"""Kinds of messages."""

_Reads: TypeAlias = Callable[[int, int], NDArray[Any]]
"""What reads a column: the first row, how many -> the values."""

_TYPES = {"<i8": 2, "<f4": 3, "<f8": 3, "str": 5, "|b1": 6}
"""Types of columns, as a schema numbers them."""

_FIXED = 15
"""The type of rows: bytes of one number."""


@dataclass(frozen=True)
class _Table:
    """A table of a flatbuffer: fields at places that its vtable says.

    https://flatbuffers.dev/internals; the tables are those of Arrow's Schema.fbs and Message.fbs.

    Attributes:
        content: The buffer.
        place: Where the table begins.
    """

    content: bytes
    place: int

    @classmethod
    def root(cls, content: bytes) -> _Table:
        """The first table."""
        return cls(content, _number("<I", content, 0))

    def field(self, number: int) -> int:
        """The place of a field; 0 if it is not there."""
        vtable = self.place - _number("<i", self.content, self.place)
        if 4 + 2 * number >= _number("<H", self.content, vtable):
            return 0
        offset = _number("<H", self.content, vtable + 4 + 2 * number)
        return self.place + offset if offset else 0

    def number(self, number: int, kind: str) -> int:
        """A field that is a number; 0 if it is not there."""
        place = self.field(number)
        return _number(kind, self.content, place) if place else 0

    def table(self, number: int) -> _Table:
        """A field that is a table.

        Raises:
            ValueError: If it is not there.
        """
        place = self._there(number)
        return _Table(self.content, place + _number("<I", self.content, place))

    def tables(self, number: int) -> Iterator[_Table]:
        """A field that is a list of tables; none if it is not there."""
        start, count = self.vector(number)
        for place in range(start, start + 4 * count, 4):
            yield _Table(self.content, place + _number("<I", self.content, place))

    def text(self, number: int, most: int) -> bytes:
        """A field that is a text, or so many bytes of it: many fields can be of one long text.

        Raises:
            ValueError: If it is not there.
        """
        self._there(number)
        start, count = self.vector(number)
        if count > len(self.content) - start:
            raise ValueError("a text must lie in its message")
        return self.content[start : start + min(count, most)]

    def vector(self, number: int) -> tuple[int, int]:
        """The place and the length of a list."""
        place = self.field(number)
        if not place:
            return 0, 0
        place += _number("<I", self.content, place)
        return place + 4, _number("<I", self.content, place)

    def pairs(self, number: int, expected: int) -> list[tuple[int, int]]:
        """A field that is a list of so many pairs of numbers of 64 bits."""
        start, count = self.vector(number)
        if count != expected:
            raise ValueError(f"a list must have {expected} entries, got {count}")
        if 16 * count > len(self.content) - start:
            raise ValueError("a list must lie in its message")
        flat = struct.unpack_from(f"<{2 * count}q", self.content, start)
        return list(zip(flat[::2], flat[1::2], strict=True))

    def _there(self, number: int) -> int:
        place = self.field(number)
        if not place:
            raise ValueError(f"field {number} must be there")
        return place


def _number(kind: str, content: bytes, place: int) -> int:
    if place < 0:
        raise ValueError("a field must lie in its message")
    return int(struct.unpack_from(kind, content, place)[0])


class ArrowFile(TableFile):
    """A file of Arrow's; its arguments are those of any `TableFile`.

    Raises:
        StoreError: If it is damaged.
        Exception: Another of Python's, if a message is none.
    """

    def __init__(self, path: Path, read: Callable[[int, int], bytes], length: int) -> None:
        super().__init__(path, read, length)
        if self.part(length - len(MAGIC), len(MAGIC)) != MAGIC:
            raise StoreError(f"{path} is damaged: it ends too early")
        self._messages = self._all()
        found = next(self._messages, None)
        if found is None or found[0] != _SCHEMA:
            raise StoreError(f"{path} is damaged: it must begin with a schema")
        self._schema = found[1]

    def description(self) -> bytes:
        """What the table says about itself.

        Raises:
            StoreError: If it says nothing.
        """
        for each in self._schema.tables(2):
            if each.text(0, len(DESCRIPTION) + 1) == DESCRIPTION:
                return each.text(1, self.length)
        raise self._no_export()

    def read(self, fields: Sequence[Field], rows: int) -> Iterator[list[NDArray[Any]]]:
        """The values of the columns, some rows at a time; texts are objects.

        Raises:
            StoreError: If columns are missing, damaged, or of other types, or rows too many.
        """
        self._check(fields)
        left, step = rows, step_of(fields)
        for kind, batch, body, size in self._messages:
            if kind != _BATCH:
                raise StoreError(f"{self.path} must hold rows, got another message")
            if batch.field(3):
                raise StoreError(f"{self.path} must hold rows that are not compressed")
            count = batch.number(0, "<q")
            columns = self._columns(fields, batch, count, body, size)
            left -= count
            if left < 0:
                break
            for start in range(0, count, step):
                yield [column(start, min(step, count - start)) for column in columns]
        if left:
            raise StoreError(f"{self.path} is damaged: it must hold {rows} rows")

    def _check(self, fields: Sequence[Field]) -> None:
        """Nothing, if the schema has these columns.

        Raises:
            StoreError: If it has others.
        """
        wanted = [
            (field.name.encode(), _FIXED if field.width is not None else _TYPES[field.kind], 0)
            for field in fields
        ]
        self._check_count(self._schema.vector(1)[1], fields)
        found = [
            (each.text(0, len(name) + 1), each.number(2, "<B"), each.field(4))
            for each, (name, *_) in zip(self._schema.tables(1), wanted, strict=True)
        ]
        self._check_columns(found, wanted)

    def _columns(
        self, fields: Sequence[Field], batch: _Table, count: int, body: int, size: int
    ) -> list[_Reads]:
        """What reads each column of a batch.

        Raises:
            StoreError: If one is damaged.
        """
        nodes = batch.pairs(1, len(fields))
        sizes = [self._sizes(field, count) for field in fields]
        # Before those of a column stands which of its values are empty; none is.
        buffers = iter(batch.pairs(2, sum(1 + len(each) for each in sizes)))
        if count < 0 or nodes != [(count, 0)] * len(fields):
            raise StoreError(f"{self.path} is damaged: it has empty values")
        found: list[_Reads] = []
        for field, needed in zip(fields, sizes, strict=True):
            next(buffers)
            parts = []
            for bytes_of in needed:
                start, length = next(buffers)
                if not 0 <= bytes_of <= length <= size or not 0 <= start <= size - length:
                    raise StoreError(f"{self.path} is damaged: a column must lie in its message")
                parts.append((body + start, length))
            found.append(self._column(field, parts))
        return found

    @staticmethod
    def _sizes(field: Field, count: int) -> list[int]:
        """Bytes that each buffer of a column has at least."""
        if field.kind == "str":
            return [4 * (count + 1) if count else 0, 0]
        return [-(-count // 8) if field.kind == "|b1" else count * field.size]

    def _column(self, field: Field, parts: list[tuple[int, int]]) -> _Reads:
        begin, _ = parts[0]
        if field.kind == "str":
            content, length = parts[1]

            def texts(first: int, rows: int) -> NDArray[Any]:
                ends = np.frombuffer(self.values(begin + 4 * first, 4 * (rows + 1)), "<i4")
                if ends[0] < 0 or (np.diff(ends) < 0).any() or ends[-1] > length:
                    raise StoreError(f"{self.path} is damaged: texts must follow each other")
                text = self.values(content + int(ends[0]), int(ends[-1] - ends[0]))
                places = (ends - ends[0]).tolist()
                found = np.empty(rows, object)
                found[:] = [text[start:end].decode() for start, end in pairwise(places)]
                return found

            return texts
        if field.kind == "|b1":

            def bools(first: int, rows: int) -> NDArray[Any]:
                part = self.values(begin + first // 8, -(-(first % 8 + rows) // 8))
                bits = np.unpackbits(np.frombuffer(part, np.uint8), bitorder="little")
                return bits[first % 8 :][:rows].astype(np.bool_)

            return bools

        def numbers(first: int, rows: int) -> NDArray[Any]:
            part = self.values(begin + first * field.size, rows * field.size)
            found = np.frombuffer(part, field.kind)
            return found if field.width is None else found.reshape(rows, field.width)

        return numbers

    def _all(self) -> Iterator[tuple[int, _Table, int, int]]:
        """Of each message kind, header, where its body begins, and its length."""
        at = _BEGIN
        while True:
            mark, size = struct.unpack("<Ii", self.part(at, 8))
            if mark != _MARK or not 0 <= size <= 2 * MAX_JSON:
                raise StoreError(f"{self.path} is damaged: there must be a message at byte {at}")
            if not size:
                return
            message = _Table.root(self.part(at + 8, size))
            at, body = at + 8 + size, message.number(3, "<q")
            if not 0 <= body <= self.length - at:
                raise StoreError(f"{self.path} is damaged: it ends too early")
            yield message.number(1, "<B"), message.table(2), at, body
            at += body
