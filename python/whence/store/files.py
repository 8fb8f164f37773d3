"""Writing and reading the files of a store: synced, checksummed, never pickled."""

from __future__ import annotations

import io
import json
import math
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from tokenize import TokenError
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from whence import _core
from whence.errors import StoreError

NO_HEADER = (SyntaxError, TokenError, TypeError, ValueError)
"""What numpy's parser ends in where there is no header of a `.npy` file."""


class Written(NamedTuple):
    """What a manifest says of a file: its length in bytes and the CRC-32 of all of them."""

    length: int
    checksum: int


@contextmanager
def store_errors(path: Path) -> Iterator[None]:
    """Turns what the system says about `path` into a `StoreError` that names it."""
    try:
        yield
    except OSError as error:
        if isinstance(error, StoreError):
            raise
        raise StoreError(f"{error.filename or path}: {error.strerror or error}") from error


def write(path: Path, *parts: bytes | memoryview) -> Written:
    """Writes and syncs a new file."""
    length, checksum = 0, 0
    with path.open("wb") as file:
        for part in parts:
            file.write(part)
            checksum = checksum_of(part, checksum)
            length += memoryview(part).nbytes
        file.flush()
        sync(file.fileno())
    return Written(length, checksum)


def write_json(path: Path, body: dict[str, Any]) -> None:
    """Writes a JSON object and its checksum on a line of its own; it appears whole, or not at all.

    Raises:
        StoreError: If the system refuses.
    """
    text = json.dumps(body, ensure_ascii=True, allow_nan=False).encode()
    temporary = path.with_suffix(".part")
    with store_errors(path):
        write(temporary, text, f"\n{checksum_of(text):08x}\n".encode())
        temporary.replace(path)
        sync_directory(path.parent)


def parse_json(path: Path, content: bytes) -> Any:
    """What `write_json` wrote at `path`, from its content.

    Raises:
        StoreError: If it is damaged.
    """
    text, _, checksum = content.rstrip(b"\n").rpartition(b"\n")
    if checksum != f"{checksum_of(text):08x}".encode():
        raise StoreError(f"{path} is damaged: its checksum does not fit its text")
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise StoreError(f"{path} is damaged: {type(error).__name__}: {error}") from None


def checksum_of(content: bytes | memoryview, before: int = 0) -> int:
    """The CRC-32 of `content`, after bytes whose CRC-32 is `before`."""
    return _core.crc32(np.frombuffer(content, np.uint8), before)


def sync(handle: int) -> None:
    """Makes what was written durable; on macOS fsync alone leaves it in the drive's cache."""
    if sys.platform == "darwin":
        import fcntl

        fcntl.fcntl(handle, fcntl.F_FULLFSYNC)
    else:
        os.fsync(handle)


def write_array(path: Path, *parts: NDArray[Any]) -> Written:
    """Writes and syncs a new `.npy` file of arrays that follow each other, of one type."""
    arrays = [np.ascontiguousarray(part) for part in parts]
    described = np.lib.format.header_data_from_array_1_0(arrays[0])
    described["shape"] = (sum(map(len, arrays)), *arrays[0].shape[1:])
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, described)
    return write(
        path, header.getvalue(), *(array.reshape(-1).view(np.uint8).data for array in arrays)
    )


def write_strings(folder: Path, stem: str, array: NDArray[Any]) -> dict[str, Written]:
    """Writes strings as their UTF-8 bytes and [rows + 1] offsets, both `.npy`."""
    encoded = [str(text).encode("utf-8", "surrogatepass") for text in array]
    offsets = np.zeros(len(encoded) + 1, np.int64)
    np.cumsum([len(text) for text in encoded], out=offsets[1:])
    bytes_name, offsets_name = f"{stem}.npy", f"{stem}-offsets.npy"
    return {
        bytes_name: write_array(folder / bytes_name, np.frombuffer(b"".join(encoded), np.uint8)),
        offsets_name: write_array(folder / offsets_name, offsets),
    }


def sync_directory(path: Path) -> None:
    """Makes the names in a directory durable, where the system can."""
    if os.name == "posix":
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def read(path: Path, written: Written) -> bytes:
    """The bytes of a file, once length and checksum agree with the manifest.

    Raises:
        StoreError: If they do not, or the file cannot be read.
    """
    with store_errors(path):
        length = path.stat().st_size
        if length != written.length:
            raise StoreError(
                f"{path} is damaged: it must be {written.length} bytes long, got {length}"
            )
        content = path.read_bytes()
    checksum = checksum_of(content)
    if checksum != written.checksum:
        raise StoreError(
            f"{path} is damaged: its checksum must be {written.checksum:#010x}, "
            f"got {checksum:#010x}"
        )
    return content


def read_array(path: Path, written: Written, kind: str, shape: tuple[int, ...]) -> NDArray[Any]:
    """The array of a checked `.npy` file.

    Raises:
        StoreError: If it is damaged, or of another type or shape than asked for.
    """
    content = read(path, written)
    offset = _npy_header(path, io.BytesIO(content), kind, shape)
    array = np.frombuffer(content, np.dtype(kind), offset=offset)
    if array.size != math.prod(shape):
        raise StoreError(
            f"{path} is damaged: it must hold {math.prod(shape)} values, got {array.size}"
        )
    return array.reshape(shape)


def read_strings(folder: Path, stem: str, files: dict[str, Written], rows: int) -> NDArray[Any]:
    """The strings that `write_strings` wrote, as objects."""
    offsets_path, path = folder / f"{stem}-offsets.npy", folder / f"{stem}.npy"
    offsets = read_array(offsets_path, _of(files, offsets_path), "<i8", (rows + 1,))
    total = int(offsets[-1])
    if offsets[0] != 0 or np.any(np.diff(offsets) < 0) or total > _of(files, path).length:
        raise StoreError(f"{offsets_path} is damaged: offsets must rise from 0")
    content = read_array(path, _of(files, path), "|u1", (total,)).tobytes()
    try:
        texts = [
            content[start:end].decode("utf-8", "surrogatepass") for start, end in pairwise(offsets)
        ]
    except UnicodeDecodeError as error:
        raise StoreError(f"{path} is damaged: {error}") from None
    found = np.empty(rows, object)
    found[:] = texts
    return found


def data_offset(path: Path, kind: str, shape: tuple[int, ...]) -> int:
    """The byte at which the values of a `.npy` file begin.

    Raises:
        StoreError: If its header does not announce this type and shape, in C order.
    """
    with store_errors(path), path.open("rb") as file:
        return _npy_header(path, file, kind, shape)


def stamp(path: Path) -> tuple[int, int, int]:
    """What changes when a file does."""
    with store_errors(path):
        found = path.stat()
    return found.st_ino, found.st_size, found.st_mtime_ns


def npy_header(path: Path) -> tuple[tuple[int, ...], np.dtype[Any], int]:
    """Shape, type and offset of the values of a `.npy` file.

    Raises:
        StoreError: If it is none, or not in C order.
    """
    with store_errors(path), path.open("rb") as file:
        try:
            version = np.lib.format.read_magic(file)
            read = {
                (1, 0): np.lib.format.read_array_header_1_0,
                (2, 0): np.lib.format.read_array_header_2_0,
            }.get(version)
            if read is None:
                raise ValueError(f"npy version must be 1.0 or 2.0, got {version}")
            shape, fortran, dtype = read(file)
        except NO_HEADER as error:
            raise StoreError(f"{path} must be a .npy file, got another: {error}") from None
        if fortran and min(shape, default=0) > 1:
            raise StoreError(f"{path} must be in C order, got Fortran order")
        size = math.prod(shape) * dtype.itemsize
        if min(shape, default=0) < 0 or size > path.stat().st_size - file.tell():
            raise StoreError(f"{path} is damaged: {shape} values of {dtype} are not in it")
        return shape, dtype, file.tell()


def _npy_header(path: Path, file: BinaryIO, kind: str, shape: tuple[int, ...]) -> int:
    """Where the header of a `.npy` file ends, once it says what it should."""
    try:
        version = np.lib.format.read_magic(file)
        if version != (1, 0):
            raise StoreError(f"{path} is damaged: npy version must be 1.0, got {version}")
        found, fortran, dtype = np.lib.format.read_array_header_1_0(file)
    except NO_HEADER as error:
        raise StoreError(f"{path} is damaged: {error}") from None
    if dtype.str != kind or found != shape or fortran:
        raise StoreError(
            f"{path} is damaged: it must hold {kind} of shape {list(shape)} in C order, "
            f"got {dtype.str} of shape {list(found)}{' in Fortran order' * fortran}"
        )
    return file.tell()


def _of(files: dict[str, Written], path: Path) -> Written:
    if path.name not in files:
        raise StoreError(f"{path} must be named in the manifest, and is not")
    return files[path.name]
