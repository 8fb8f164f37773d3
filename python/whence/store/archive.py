"""Exported stores as `.npz`: arrays in a zip archive, which `numpy.load` opens.

Entries lie in the archive as they are: what is compressed can be a thousand times larger than its
file says, and stored rows do not shrink.
"""

from __future__ import annotations

import math
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from whence._arrays import MAX_ID
from whence.errors import StoreError
from whence.store.files import MAX_JSON, PIECE, header
from whence.store.pieces import ROWS, Field

DESCRIPTION = "whence"
"""The array with the description."""

_LETTER = 4
"""Bytes of a character of numpy's texts of one width."""


@dataclass(frozen=True)
class Texts:
    """What has to be known of texts before they are written.

    Attributes:
        longest: Characters of the longest.
        bytes: Of all of them, as UTF-8.
    """

    longest: int = 0
    bytes: int = 0

    @property
    def are_wide(self) -> bool:
        """Whether they become an array of one width, as users expect; too long ones do not."""
        return self.longest <= MAX_ID


class _NewArchive(zipfile.ZipFile):
    """An archive that is written; to one that is not finished nothing more is written.

    A zipfile's own end asks for an entry that an interrupt has left open, and for the file.
    """

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is None:
            self.close()

    def __del__(self) -> None:
        """Nothing."""


def write_archive(
    file: IO[bytes],
    description: str,
    fields: Sequence[tuple[Field, Texts | None, Callable[[], Iterable[NDArray[Any]]]]],
    rows: int,
    others: Iterable[tuple[str, Iterable[bytes]]],
) -> None:
    """Writes an archive.

    Args:
        file: Open for writing.
        description: In ASCII.
        fields: What each array holds, what is known of it if it is of texts, and what gives its
            values in parts; asked for one array after the other, twice for long texts.
        rows: How many values each array has.
        others: Names and contents of other files.

    Raises:
        OSError: If the system refuses.
    """
    with _NewArchive(file, "w", zipfile.ZIP_STORED) as archive:
        text = np.array(description)
        _put(archive, f"{DESCRIPTION}.npy", [header(text.dtype.str, ()), text.tobytes()])
        for field, texts, parts in fields:
            if texts is None:
                kind = field.kind
                shape = (rows,) if field.width is None else (rows, field.width)
                _put(archive, f"{field.key}.npy", _values(kind, shape, parts()))
            elif texts.are_wide:
                kind = f"<U{max(texts.longest, 1)}"
                _put(archive, f"{field.key}.npy", _values(kind, (rows,), _wide(kind, parts())))
            else:
                encoded = (_encoded(part) for part in parts())
                _put(archive, f"bytes/{field.key}.npy", _bytes(texts.bytes, encoded))
                encoded = (_encoded(part) for part in parts())
                _put(archive, f"offsets/{field.key}.npy", _offsets(rows, encoded))
        for name, parts_of_file in others:
            _put(archive, name, parts_of_file)


def _put(archive: zipfile.ZipFile, name: str, parts: Iterable[Any]) -> None:
    # One time for all, so that the same store makes the same file.
    entry = zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0))
    with archive.open(entry, "w", force_zip64=True) as file:
        for part in parts:
            file.write(part)


def _values(kind: str, shape: tuple[int, ...], parts: Iterable[NDArray[Any]]) -> Iterator[Any]:
    yield header(kind, shape)
    for part in parts:
        yield np.ascontiguousarray(part).reshape(-1).view(np.uint8).data


def _wide(kind: str, parts: Iterable[NDArray[Any]]) -> Iterator[NDArray[Any]]:
    for part in parts:
        for start in range(0, len(part), ROWS):
            yield part[start : start + ROWS].astype(kind)


def _encoded(part: NDArray[Any]) -> list[bytes]:
    return [text.encode("utf-8", "surrogatepass") for text in part.tolist()]


def _bytes(total: int, parts: Iterable[list[bytes]]) -> Iterator[bytes]:
    yield header("|u1", (total,))
    for part in parts:
        yield b"".join(part)


def _offsets(rows: int, parts: Iterable[list[bytes]]) -> Iterator[bytes]:
    yield header("<i8", (rows + 1,))
    end = np.zeros(1, "<i8")
    yield end.tobytes()
    for part in parts:
        offsets = end + np.cumsum([len(text) for text in part], dtype="<i8")
        end = offsets[-1:]
        yield offsets.tobytes()


class Archive:
    """An archive that is not trusted.

    Args:
        path: Of the file.
        file: Open for reading.
        length: Of the file.

    Raises:
        StoreError: If it is damaged, has compressed or encrypted entries, or such as lie over each
            other.
        Exception: As `zipfile` raises it, for what is no archive.
    """

    def __init__(self, path: Path, file: IO[bytes], length: int) -> None:
        self._path = path
        self._archive = zipfile.ZipFile(file)
        self._entries: dict[str, zipfile.ZipInfo] = {}
        for entry in self._archive.infolist():
            if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1:
                raise StoreError(
                    f"{path} must have entries that are neither compressed nor encrypted, got "
                    f"{entry.filename!r:.80}"
                )
            if entry.filename in self._entries:
                raise StoreError(f"{path} is damaged: it has {entry.filename!r:.80} twice")
            self._entries[entry.filename] = entry
        entries = self._entries.values()
        if sum(entry.file_size for entry in entries) > length or any(
            entry.file_size != entry.compress_size for entry in entries
        ):
            raise StoreError(f"{path} is damaged: its entries are larger than it is")

    def description(self) -> bytes:
        """What the archive says about itself.

        Raises:
            StoreError: If it says nothing, or not as it must.
        """
        name = f"{DESCRIPTION}.npy"
        size = self._entry(name).file_size - len(header("<U1", ()))
        if size > MAX_JSON * _LETTER:
            raise StoreError(f"{self._path}: {name} must be at most {MAX_JSON} characters long")
        with self._archive.open(name) as stream:
            self._check_header(name, stream, f"<U{size // _LETTER}", ())
            return self._exactly(name, stream, size).decode("utf-32-le").encode("ascii")

    def read(self, fields: Sequence[Field], rows: int) -> Iterator[list[NDArray[Any]]]:
        """The values of the arrays, some rows at a time; texts are objects.

        Raises:
            StoreError: If an array is missing, damaged, or of another type or shape.
        """
        with ExitStack() as stack:
            columns = [self._column(stack, field, rows) for field in fields]
            widest = max(column.size for column in columns)
            step = max(min(ROWS, PIECE // widest), 1)
            for start in range(0, rows, step):
                yield [column.next(min(step, rows - start)) for column in columns]
            for column in columns:
                column.end()

    def file(self, name: str, length: int) -> Iterator[bytes]:
        """The content of another file, in parts.

        Raises:
            StoreError: If it is not there, or of another length.
        """
        if self._entry(name).file_size != length:
            raise StoreError(f"{self._path}: {name!r:.80} must be {length} bytes long")
        with self._archive.open(name) as stream:
            for start in range(0, length, PIECE):
                yield self._exactly(name, stream, min(PIECE, length - start))
            self._at_end(name, stream)

    def _entry(self, name: str) -> zipfile.ZipInfo:
        if name not in self._entries:
            raise StoreError(f"{self._path} must have {name!r:.80}, and has not")
        return self._entries[name]

    def _column(self, stack: ExitStack, field: Field, rows: int) -> _Values | _Words:
        if field.kind != "str":
            shape = (rows,) if field.width is None else (rows, field.width)
            return _Values(self, self._open(stack, field.key, field.kind, shape), field)
        if f"{field.key}.npy" in self._entries:
            room = self._entries[f"{field.key}.npy"].file_size - len(header("<U1", (rows,)))
            width = max(room // (_LETTER * max(rows, 1)), 1)
            kind = f"<U{width}"
            return _Values(self, self._open(stack, field.key, kind, (rows,)), field, width)
        content = self._entry(f"bytes/{field.key}.npy").file_size - len(header("|u1", (0,)))
        return _Words(
            self,
            self._open(stack, f"offsets/{field.key}", "<i8", (rows + 1,)),
            self._open(stack, f"bytes/{field.key}", "|u1", (content,)),
            content,
        )

    def _open(
        self, stack: ExitStack, key: str, kind: str, shape: tuple[int, ...]
    ) -> tuple[str, IO[bytes]]:
        """An array, open at its values."""
        name = f"{key}.npy"
        wanted = len(header(kind, shape)) + math.prod(shape) * np.dtype(kind).itemsize
        if self._entry(name).file_size != wanted:
            raise StoreError(
                f"{self._path}: {name!r:.80} must hold {kind} of shape {list(shape)}, in {wanted} "
                f"bytes, got {self._entries[name].file_size}"
            )
        stream = stack.enter_context(self._archive.open(name))
        self._check_header(name, stream, kind, shape)
        return name, stream

    def _check_header(
        self, name: str, stream: IO[bytes], kind: str, shape: tuple[int, ...]
    ) -> None:
        wanted = header(kind, shape)
        if self._exactly(name, stream, len(wanted)) != wanted:
            raise StoreError(
                f"{self._path}: {name!r:.80} must hold {kind} of shape {list(shape)} in C order"
            )

    def _exactly(self, name: str, stream: IO[bytes], size: int) -> bytes:
        parts, left = [], size
        while left:
            part = stream.read(left)
            if not part:
                raise StoreError(f"{self._path} is damaged: {name!r:.80} ends too early")
            parts.append(part)
            left -= len(part)
        return b"".join(parts)

    def _at_end(self, name: str, stream: IO[bytes]) -> None:
        """Nothing, if all was read; what was read is then compared with its checksum."""
        if stream.read(1):
            raise StoreError(f"{self._path} is damaged: {name!r:.80} goes on")


class _Values:
    """An array of values of one size, read from its begin on."""

    def __init__(
        self,
        archive: Archive,
        opened: tuple[str, IO[bytes]],
        field: Field,
        letters: int | None = None,
    ) -> None:
        self._archive, (self._name, self._stream) = archive, opened
        self._field, self._letters = field, letters
        kind = field.kind if letters is None else "<u4"
        self._shape = () if field.width is None else (field.width,)
        self._kind, self._count = np.dtype(kind), (field.width or 1) * (letters or 1)
        self.size = self._kind.itemsize * self._count

    def next(self, rows: int) -> NDArray[Any]:
        content = self._archive._exactly(self._name, self._stream, rows * self.size)
        found = np.frombuffer(content, self._kind)
        if self._letters is None:
            return found.reshape(rows, *self._shape)
        if (found > 0x10FFFF).any():
            raise StoreError(f"{self._archive._path}: {self._name!r:.80} must hold characters")
        return np.frombuffer(content, f"<U{self._letters}").astype(object)

    def end(self) -> None:
        self._archive._at_end(self._name, self._stream)


class _Words:
    """Texts as their bytes, and where each begins."""

    size = 8

    def __init__(
        self,
        archive: Archive,
        offsets: tuple[str, IO[bytes]],
        content: tuple[str, IO[bytes]],
        length: int,
    ) -> None:
        self._archive, self._length, self._at = archive, length, 0
        (self._offsets, self._starts), (self._bytes, self._content) = offsets, content
        if self._next_offset() != 0:
            raise StoreError(f"{archive._path}: {self._offsets!r:.80} must begin with 0")

    def _next_offset(self) -> int:
        return int.from_bytes(self._archive._exactly(self._offsets, self._starts, 8), "little")

    def next(self, rows: int) -> NDArray[Any]:
        content = self._archive._exactly(self._offsets, self._starts, 8 * rows)
        offsets = np.concatenate([[self._at], np.frombuffer(content, "<i8")])
        if (np.diff(offsets) < 0).any() or offsets[-1] > self._length:
            raise StoreError(f"{self._archive._path}: {self._offsets!r:.80} must rise")
        size = int(offsets[-1]) - self._at
        text = self._archive._exactly(self._bytes, self._content, size)
        found = np.empty(rows, object)
        found[:] = [
            text[start:end].decode("utf-8", "surrogatepass")
            for start, end in pairwise((offsets - self._at).tolist())
        ]
        self._at = int(offsets[-1])
        return found

    def end(self) -> None:
        self._archive._at_end(self._offsets, self._starts)
        self._archive._at_end(self._bytes, self._content)
