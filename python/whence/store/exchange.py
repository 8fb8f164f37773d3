"""Stores as one file of numpy's, Arrow's or Parquet's, and back."""

from __future__ import annotations

import os
import re
import secrets
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import IO, Any
from urllib.parse import quote

import numpy as np
from numpy.typing import NDArray

from whence import _arrays
from whence._files import named
from whence.errors import ArgumentError, MismatchError, StoreError, WhenceError
from whence.store.archive import Archive, Texts, write_archive
from whence.store.arrow import MAGIC as ARROW
from whence.store.arrow import ArrowFile
from whence.store.files import (
    PIECE,
    Written,
    check_folder,
    checksum_of,
    json_bytes,
    parse_json,
    read_part,
    read_parts,
    regular,
    store_errors,
    sync,
    sync_directory,
)
from whence.store.manifest import BITS, COLUMN_KINDS, DTYPES, Manifest
from whence.store.maps import PREFIX as MAP
from whence.store.maps import StoredMap, read_map
from whence.store.new import NewStore
from whence.store.parquet import MAGIC as PARQUET
from whence.store.parquet import ParquetFile
from whence.store.pieces import ROWS, Batch, Field, Piece, pieces_in, without_doubles
from whence.store.progress import bar
from whence.store.reader import Reader
from whence.store.tables import TableFile, pyarrow, write_table

FORMAT = "whence export"
VERSION = 1

FORMATS = {".npz": "npz", ".arrow": "arrow", ".feather": "arrow", ".parquet": "parquet"}
"""How names of files end -> what they hold."""

UNIT = 1.001
"""How long a stored unit row can be, which rounding makes longer than 1.

Searches take a row's scale for a bound of its norm.
"""

_RESERVED = re.compile(r"(checkpoint|id|row|scale)|column\..*", re.DOTALL)
"""Names of columns of a table that are not free for those of a store."""

_ALONE = "format must be 'npz' for texts with half a surrogate pair, got {!r}"

_LONGEST = 60_000
"""Bytes of the name of an entry of a zip archive; it can hold a few more."""


def export_store(
    path: str | os.PathLike[str],
    file: str | os.PathLike[str],
    *,
    format: str | None = None,
    rows: str = "stored",
    progress: bool | None = None,
) -> Path:
    """Writes a store into one file, for another program, or to be imported elsewhere.

    The file is a table with a row for each example and checkpoint, in the order of the store;
    deleted ones are left out. `import_store` makes the same store of it, to the bit, unless rows
    are exported as numbers.

    In a `.npz` the table is arrays of equal length, for `numpy.load(file)`: `checkpoints` (names),
    `ids`, `rows`, `scales`, and `columns/NAME` for each column. A row is its scale times what
    `rows` says; `rows` is as in the store's own files, so that numbers of 4, 2 and 1 bits lie
    packed in bytes. Texts are arrays of one width; a column with one of more than 1,024 characters
    is `bytes/columns/NAME` in UTF-8 and `offsets/columns/NAME` instead. `maps/N/...` are the maps
    of preconditioned rows.

    In an `.arrow` (or `.feather`) and a `.parquet` file the columns are `checkpoint`, `id`, `row`
    (the bytes of the stored row), `scale`, and those of the store by their names. A store's column
    by one of these four names is `column.NAME`. Nothing is compressed: stored rows do not shrink.
    Maps of preconditioned rows have no place in a table; such rows are exported to a `.npz`, or as
    numbers.

    Args:
        path: The store's folder.
        file: The file, which is replaced if it is there.
        format: "npz", "arrow" or "parquet"; None for what the name ends in.
        rows: "stored", or "float32" for the rows as numbers: `rows` is then [rows, dim], or `row` a
            list of so many, without scales. What is exported so cannot be imported.
        progress: Whether to show a bar; None means if standard error is a terminal.

    Returns:
        `file`, as an absolute path. It appears when it is whole, and is until then beside it, as
        `.whence-….part`. O(bytes) time, reading the store twice; memory for some MiB of rows, and
        what stands beside the rows of a shard.

    Raises:
        ArgumentError: If `format` or `rows` is another word, the name says no format, the format
            cannot hold the store, or the file lies in its folder.
        DtypeError: If an argument is of another type.
        MismatchError: If rows of factors are asked for as numbers.
        MissingDependencyError: If the format needs pyarrow, and it is not installed.
        StoreError: If the store is missing or damaged, or the file cannot be written.

    Warns:
        MissingWritersWarning: If some writers of the store have confirmed nothing yet.

    Examples:
        >>> whence.export_store("runs/digits", "digits.npz")  # doctest: +SKIP
        >>> whence.export_store("runs/digits", "digits.parquet", rows="float32")  # doctest: +SKIP
    """
    target = _arrays.path("file", file)
    form = _format(target, format)
    with store_errors(target):
        if target.exists() and not target.is_file():  # a device is not for us to replace
            raise StoreError(f"file must be new or a regular file, got another kind: {target}")
    plain = _arrays.choice("rows", rows, ("stored", "float32")) == "float32"
    if form != "npz":
        pyarrow()
    reader = Reader(path)
    if reader.path.resolve() in target.resolve().parents:  # it might be one of its own files
        raise ArgumentError(f"file must lie outside of the store, got {target}")
    source = _Source(reader, plain=plain)
    source.check(form)
    with bar("exporting", 2 * sum(piece.bytes for piece in source.pieces), progress) as shown:
        found = _Sums(reader.path, source.fields)
        for values in source.batches(shown):
            found.add(values)
        if form != "npz" and not found.is_unicode:
            raise ArgumentError(_ALONE.format(form))
        description = json_bytes(source.describe(found)).decode()
        with _whole(target) as out:
            if form == "npz":
                fields = [
                    (each, found.texts.get(each.key), partial(source.parts, each.key, shown))
                    for each in source.fields
                ]
                write_archive(out, description, fields, found.rows, source.map_files())
            else:
                write_table(out, form, description, source.fields, source.batches(shown))
    return target


def import_store(
    file: str | os.PathLike[str],
    path: str | os.PathLike[str],
    *,
    progress: bool | None = None,
) -> Path:
    """Makes a new store of a file that `export_store` wrote, with the same rows, to the bit.

    The file need not be trusted: lengths are compared with the file's before memory is taken, and
    every value is checked before the store appears. Nothing in it is run. Who wrote it can still
    have written other rows.

    A matrix of your own is no export, for nothing says what its rows are made by: search it with
    `whence.Index` or `whence.Matrix`.

    Args:
        file: The file; its first bytes say what it is.
        path: The folder of the new store.
        progress: Whether to show a bar; None means if standard error is a terminal.

    Returns:
        `path`, as an absolute path. O(bytes) time; memory for all ids, and some MiB of rows.

    Raises:
        DtypeError: If an argument is of another type.
        LockedError: If another process writes to `path`.
        StoreError: If the file is missing, damaged, or no export that can be imported, or `path` is
            not new or cannot be written.

    Examples:
        >>> whence.import_store("digits.npz", "runs/digits")  # doctest: +SKIP
    """
    source = _arrays.path("file", file)
    target = _arrays.path("path", path)
    with store_errors(source):
        real = source.resolve()  # a link is the caller's own
        if not real.exists():
            raise StoreError(
                f"file must be an export of a store, got {source}, which does not exist"
            )
    with _as_damage(source), _opened(real) as (found, length):
        said = _Description.parse(source, found.description(), length)
        with (
            bar("importing", said.rows * said.manifest.row_bytes, progress) as shown,
            NewStore("path", target, said.manifest) as new,
        ):
            _take_maps(source, new, found)
            sums = _Sums(source, said.fields)
            for values in found.read(said.fields, said.rows):
                sums.add(values)
                for batch in said.batches(values):
                    new.append(batch, said.error)
                shown.update(len(values[0]) * said.manifest.row_bytes)
            if (sums.rows, sums.body()) != (said.rows, said.checksums):
                raise StoreError(f"{source} is damaged: its values do not fit its checksums")
            new.finish()
            made = [
                Piece(new.path, new.manifest, shard, shard.checkpoint, None) for shard in new.shards
            ]
            try:
                without_doubles(made, new.manifest.row_sets, first=False)
            except StoreError:
                raise StoreError(f"{source} must have an id once at a checkpoint") from None
            new.commit()
    return target


def _format(file: Path, format: str | None) -> str:
    if format is not None:
        return _arrays.choice("format", format, sorted(set(FORMATS.values())))
    if file.suffix.lower() not in FORMATS:
        raise ArgumentError(
            f"file must end in one of {', '.join(FORMATS)}, or format be given, got {file.name!r}"
        )
    return FORMATS[file.suffix.lower()]


def _fields(manifest: Manifest, *, plain: bool) -> list[Field]:
    """What the columns of an export hold, in order."""
    kinds = {"str": "str"} | {kind: code for kind, code in COLUMN_KINDS.items() if code}
    width = manifest.dim if plain else manifest.row_width
    found = [
        Field("checkpoints", "checkpoint", "str"),
        Field("ids", "id", kinds[manifest.ids or "int64"]),
        Field("rows", "row", "<f4" if plain else DTYPES[manifest.dtype], width, plain),
    ]
    if not plain:
        found.append(Field("scales", "scale", "<f4"))
    for name, kind in (manifest.columns or {}).items():
        # Quoted, so that a name is no path.
        key = f"columns/{quote(name, safe=' ', errors='surrogatepass')}"
        free = not _RESERVED.fullmatch(name)
        found.append(Field(key, name if free else f"column.{name}", kinds[kind]))
    return found


class _Source:
    """A store that is exported.

    Args:
        reader: Of the store.
        plain: Whether rows are exported as numbers.
    """

    def __init__(self, reader: Reader, *, plain: bool) -> None:
        self.reader, self.manifest, self.plain = reader, reader.manifest, plain
        self.fields = _fields(self.manifest, plain=plain)
        self.pieces = pieces_in(reader)
        self._columns = list(self.manifest.columns or {})

    def check(self, form: str) -> None:
        """Nothing, if a format can hold the store.

        Raises:
            ArgumentError: If it cannot.
            MismatchError: If rows of factors are asked for as numbers.
        """
        if self.plain and self.manifest.is_factored:
            raise MismatchError(
                "rows must be 'stored' for a store with layout='factored', whose rows are factors, "
                "got 'float32'"
            )
        if form == "npz":
            if any(len(each.key) > _LONGEST for each in self.fields):
                raise ArgumentError(
                    "format must be 'arrow' or 'parquet' for a column's name of more than "
                    f"{_LONGEST} bytes, got {form!r}"
                )
            return
        if not self.plain and any(each.map is not None for each in self.manifest.checkpoints):
            raise ArgumentError(
                "format must be 'npz' for preconditioned rows, whose maps have no place in a table "
                f"(or rows='float32'), got {form!r}"
            )
        if not _is_unicode("".join(each.name for each in self.fields)):
            raise ArgumentError(_ALONE.format(form))

    def describe(self, found: _Sums) -> dict[str, Any]:
        """What the file says about itself."""
        checkpoints = [
            each
            if each.map is None
            else replace(each, map=replace(each.map, name=f"{MAP}{number:08}"))
            for number, each in enumerate(self.manifest.checkpoints, 1)
        ]
        told = replace(
            self.manifest, checkpoints=checkpoints, shards=[], packs=[], gone=None, writer=None
        )
        return {
            "format": FORMAT,
            "version": VERSION,
            "values": "float32" if self.plain else "stored",
            "rows": found.rows,
            "checksums": found.body(),
            "error": self.reader.quantisation_error,
            "manifest": told.body(0),
        }

    def batches(self, shown: Any) -> Iterator[list[NDArray[Any]]]:
        """The values of the fields, some rows at a time."""
        for piece, numbers in self._numbered():
            for batch in piece.batches(self._columns, self._rows(piece, numbers)):
                names = np.full(len(batch.ids), self._name(piece), object)
                scales = [] if self.plain else [batch.scales]
                yield [names, batch.ids, batch.stored, *scales, *batch.columns]
            shown.update(piece.bytes)

    def parts(self, key: str, shown: Any) -> Iterator[NDArray[Any]]:
        """The values of one field, some at a time."""
        columns = {each.key: name for each, name in zip(self._others, self._columns, strict=True)}
        for piece, numbers in self._numbered():
            if key == "rows":
                yield from self._rows(piece, numbers)
                shown.update(piece.bytes)
            elif not len(piece):
                continue
            elif key == "checkpoints":
                yield np.full(len(piece), self._name(piece), object)
            elif key == "ids":
                yield piece.ids()
            elif key == "scales":
                yield piece.scales()
            else:
                yield piece.column(columns[key])

    def map_files(self) -> Iterator[tuple[str, Iterator[bytes]]]:
        """The names and contents of the files of maps."""
        for number, each in enumerate(self.manifest.checkpoints, 1):
            if each.map is not None:
                folder = self.reader.path / each.map.name
                check_folder(folder)
                for name, written in each.map.files.items():
                    yield _map_file(f"{MAP}{number:08}", name), read_parts(folder / name, written)

    @property
    def _others(self) -> list[Field]:
        """The fields of the store's columns."""
        return self.fields[len(self.fields) - len(self._columns) :]

    def _name(self, piece: Piece) -> str:
        return self.manifest.row_sets[piece.checkpoint]

    def _numbered(self) -> Iterator[tuple[Piece, NDArray[np.uint64]]]:
        """The pieces, and the numbers of their rows in the store."""
        first = 0
        for piece in self.pieces:
            numbers = np.arange(first, first + piece.shard.rows, dtype=np.uint64)
            yield piece, numbers if piece.kept is None else numbers[piece.kept]
            first += piece.shard.rows

    def _rows(self, piece: Piece, numbers: NDArray[np.uint64]) -> Iterator[NDArray[Any]]:
        if not self.plain:
            yield from piece.rows()
            return
        step = max(min(ROWS, PIECE // (4 * self.manifest.dim)), 1)
        for start in range(0, len(numbers), step):
            yield self.reader.core.read(numbers[start : start + step])


class _Sums:
    """Checksums of the values of fields, however they come, and what is known of texts.

    A text is taken with a character 0 behind it, which none contains.
    """

    def __init__(self, path: Path, fields: Sequence[Field]) -> None:
        self._path, self.rows = path, 0
        self.texts = {each.key: Texts() for each in fields if each.kind == "str"}
        self.is_unicode = True
        self._sums = {each.key: 0 for each in fields}

    def add(self, values: Sequence[NDArray[Any]]) -> None:
        """Takes the values of all fields for some rows.

        Raises:
            StoreError: If a text contains a character 0.
        """
        for key, array in zip(self._sums, values, strict=True):
            if key in self.texts:
                content: Any = self._text(key, array.tolist())
            else:
                content = np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
            self._sums[key] = checksum_of(content, self._sums[key])
        self.rows += len(values[0])

    def _text(self, key: str, texts: list[str]) -> bytes:
        joined = "\0".join([*texts, ""])
        if joined.count("\0") != len(texts):
            raise StoreError(f"{self._path} is damaged: {key} has a text with a NUL character")
        content = joined.encode("utf-8", "surrogatepass")
        self.is_unicode = self.is_unicode and _is_unicode(joined)
        before = self.texts[key]
        longest = max(before.longest, *map(len, texts))
        self.texts[key] = Texts(longest, before.bytes + len(content) - len(texts))
        return content

    def body(self) -> dict[str, str]:
        """As JSON has them."""
        return {key: f"{value:08x}" for key, value in self._sums.items()}


@dataclass(frozen=True)
class _Description:
    """What an export says about itself.

    Attributes:
        path: Of the file.
        manifest: What the store is.
        rows: How many there are.
        checksums: Of the fields.
        error: Mean relative error of quantised rows, if it is known.
    """

    path: Path
    manifest: Manifest
    rows: int
    checksums: dict[str, str]
    error: float | None

    @property
    def fields(self) -> list[Field]:
        """What its columns hold."""
        return _fields(self.manifest, plain=False)

    @classmethod
    def parse(cls, path: Path, content: bytes, length: int) -> _Description:
        """The description of a file of a length.

        Raises:
            StoreError: If it cannot be one, or not be imported.
        """
        body = parse_json(path, content)
        if not isinstance(body, dict) or body.get("format") != FORMAT:
            raise StoreError(f"{path} must be an export of a store, got another file")
        if (version := body["version"]) != VERSION:
            raise StoreError(f"{path}: version must be {VERSION}, got {version!r:.80}")
        if (values := body["values"]) != "stored":
            raise StoreError(
                f"{path} must hold rows as they are stored, got {values!r:.80}: export with "
                "rows='stored'"
            )
        told, rows, error = body["manifest"], body["rows"], body["error"]
        if told["shards"] or told["packs"] or told["gone"] is not None:
            raise StoreError(f"{path} is damaged: a new store has no shards")
        manifest = replace(Manifest.from_json(told, path, 0), writer=None)
        if type(rows) is not int or not 0 <= rows <= length // manifest.row_bytes:
            raise StoreError(
                f"{path} must hold {rows!r:.80} rows that are not compressed, got {length} bytes"
            )
        if rows and (manifest.ids is None or manifest.columns is None):
            raise StoreError(f"{path} is damaged: rows must have ids and columns of known types")
        if error is not None and not (
            manifest.is_quantised and type(error) in (int, float) and 0 <= error <= 1
        ):
            raise StoreError(f"{path} is damaged: error must be from 0 to 1, got {error!r:.80}")
        return cls(path, manifest, rows, body["checksums"], error)

    def batches(self, values: Sequence[NDArray[Any]]) -> Iterator[Batch]:
        """Rows of one checkpoint each, once they were checked.

        Args:
            values: Of the fields, for some rows.

        Raises:
            StoreError: If a value is none that a store can have.
        """
        names, ids, stored, scales, *columns = values
        places = {name: number for number, name in enumerate(self.manifest.row_sets)}
        for name in set(names.tolist()):
            if name not in places:
                raise StoreError(f"{self.path} must have rows of its checkpoints, got {name!r:.80}")
        if not np.isfinite(scales).all() or (scales < 0).any():
            raise StoreError(f"{self.path} must have scales that are finite and not negative")
        if self.manifest.ids == "str" and max(map(len, ids)) > _arrays.MAX_ID:
            raise StoreError(f"{self.path} must have ids of at most {_arrays.MAX_ID} characters")
        for column in columns:
            if column.dtype.kind == "b" and (column.view(np.uint8) > 1).any():
                raise StoreError(f"{self.path} must have bools that are 0 or 1")
        self._check_rows(stored)
        numbers = np.array([places[name] for name in names.tolist()])
        ends = [*(np.flatnonzero(np.diff(numbers)) + 1).tolist(), len(numbers)]
        for start, end in pairwise([0, *ends]):
            here = slice(start, end)
            others = [column[here] for column in columns]
            yield Batch(int(numbers[start]), stored[here], scales[here], ids[here], others)

    def _check_rows(self, stored: NDArray[Any]) -> None:
        dtype = self.manifest.dtype
        if dtype == "int8":
            wrong = bool((stored == -128).any())
        elif dtype in BITS:
            left = stored.shape[1] * 8 - self.manifest.dim * BITS[dtype]
            wrong = bool((stored[:, -1] >> (8 - left)).any()) if left else False
        else:
            wrong = not np.isfinite(stored).all()
            if not wrong and not self.manifest.is_factored:
                squares = np.einsum("ij,ij->i", stored, stored, dtype=np.float64)
                wrong = bool((squares > UNIT**2).any())
        if wrong:
            raise StoreError(f"{self.path} must have rows as a store of {dtype} has them")


def _take_maps(path: Path, new: NewStore, found: Archive | TableFile) -> None:
    """Writes the maps of an export, once they were checked.

    Raises:
        StoreError: If one is damaged, or the file cannot have any.
    """
    if not any(each.map is not None for each in new.manifest.checkpoints):
        return
    if not isinstance(found, Archive):
        raise StoreError(f"{path} must hold no maps, for which a table has no place")

    def parts(stored: StoredMap, name: str, written: Written) -> Iterator[bytes]:
        return found.file(_map_file(stored.name, name), written.length)

    new.take_maps(parts)
    for each in new.manifest.checkpoints:
        if each.map is not None:
            read_map(new.path, each.map)


def _map_file(stored: str, name: str) -> str:
    """The name of a map's file in an archive."""
    return f"maps/{int(stored.removeprefix(MAP))}/{name}"


def _is_unicode(text: str) -> bool:
    """Whether it has no half of a surrogate pair, which UTF-8 has no bytes for."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


@contextmanager
def _whole(path: Path) -> Iterator[IO[bytes]]:
    """A file that is written, and appears when it is whole.

    Raises:
        StoreError: If the system refuses.
    """
    # A name of its own: of two writers the later one wins, and no file is half of each.
    temporary = path.with_name(f".whence-{secrets.token_hex(8)}.part")
    with store_errors(path), named(path):
        try:
            with temporary.open("xb") as file:  # through no link
                yield file
                file.flush()
                sync(file.fileno())
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        sync_directory(path.parent)


@contextmanager
def _as_damage(path: Path) -> Iterator[None]:
    """Turns what parsers raise for a file into a `StoreError` that names it."""
    try:
        with store_errors(path):
            yield
    except WhenceError:
        raise
    except Exception as error:
        what = f"{type(error).__name__}: {error}"
        raise StoreError(f"{path} is damaged: {what:.300}") from error


@contextmanager
def _opened(path: Path) -> Iterator[tuple[Archive | ArrowFile | ParquetFile, int]]:
    """An export, and the length of its file.

    Raises:
        StoreError: If it is no export.
    """
    with regular(path) as (handle, length):
        read = partial(read_part, path, handle)
        begin = read(0, min(len(ARROW), length))
        if begin.startswith(b"PK"):
            with os.fdopen(os.dup(handle), "rb") as file:
                yield Archive(path, file, length), length
        elif begin == ARROW:
            yield ArrowFile(path, read, length), length
        elif begin.startswith(PARQUET):
            yield ParquetFile(path, read, length), length
        else:
            raise StoreError(f"{path} must be a .npz, .arrow or .parquet file, got another")
