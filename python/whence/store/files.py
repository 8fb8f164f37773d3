"""Writing and reading the files of a store: synced, checksummed block by block, never pickled."""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import re
import stat
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from io import BytesIO
from itertools import pairwise
from pathlib import Path
from tokenize import TokenError
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from whence import _core
from whence.errors import StoreError

BLOCK: int = _core.BLOCK
"""Bytes under one checksum; the last block of a file may be shorter."""

MAX_JSON = 64 << 20
"""Bytes of the longest JSON file that is read: Python's objects take many times its length."""

PIECE = 4 << 20
"""Bytes of a file that are read or written at a time: no more keep Ctrl-C waiting."""

SYNCS = 8
"""How many files are synced at a time: one journal commit of the file system serves several."""

KINDS = ("|b1", "|i1", "|u1", "<u2", "<u4", "<i8", "<f2", "<f4", "<f8")
"""What `.npy` calls the types of values."""

WRONG = (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError)
"""What Python ends in where JSON holds other things than were written there."""

NO_HEADER = (SyntaxError, TokenError, TypeError, ValueError)
"""What numpy's parser ends in where there is no header of a `.npy` file."""

_ARRAY = re.compile(r"[a-z][a-z0-9-]{0,63}\.npy")

_DIGITS = re.compile("[0-9a-f]*")

_ALIGN = 64
"""The header of a `.npy` file is a multiple of this long, and at least twice it."""

_READ = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
_WRITE = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | getattr(os, "O_NOFOLLOW", 0)
_SYSTEM = getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)

Part: TypeAlias = bytes | bytearray | memoryview


class Written(NamedTuple):
    """What is known of a file that was written.

    Attributes:
        length: In bytes.
        checksums: The CRC-32 of each of its blocks of `BLOCK` bytes, 8 hexadecimal digits each.
    """

    length: int
    checksums: str

    @classmethod
    def of(cls, body: Any) -> Written:
        """What a JSON file says of another.

        Raises:
            ValueError: If it cannot be so.
        """
        length, checksums = body
        if type(length) is not int or length < 0 or not isinstance(checksums, str):
            raise ValueError(f"a file must have a length and checksums, got {body!r:.80}")
        if len(checksums) != 8 * -(-length // BLOCK) or not _DIGITS.fullmatch(checksums):
            raise ValueError(f"{length} bytes must have a checksum for each {BLOCK} of them")
        return cls(length, checksums)

    @property
    def blocks(self) -> NDArray[np.uint32]:
        """[blocks] the checksum of each."""
        return np.frombuffer(bytes.fromhex(self.checksums), ">u4").astype(np.uint32)


def array_name(name: str) -> str:
    """The name of an array's file, once it is one that lies in the folder it is said to lie in.

    Raises:
        ValueError: If it is not.
    """
    if not _ARRAY.fullmatch(name):
        raise ValueError(f"a file must lie in its folder, got {name!r:.80}")
    return name


@contextmanager
def store_errors(path: Path) -> Iterator[None]:
    """Turns what the system says about `path` into a `StoreError` that names it."""
    try:
        yield
    except OSError as error:
        if isinstance(error, StoreError):
            raise
        raise StoreError(f"{error.filename or path}: {error.strerror or error}") from error


class NewFile:
    """A file that is being written: it grows, is sealed, and then synced.

    Args:
        path: Where it appears at once, in place of what is there.
        head: How many of its first bytes are given last, to `seal`.
    """

    def __init__(self, path: Path, head: int = 0) -> None:
        self.path = path
        self._handle = os.open(path, _WRITE | _SYSTEM, 0o666)
        self._head = head
        self._sums: list[NDArray[np.uint32]] = []
        self._rest = bytearray(head)  # what does not fill a block yet
        self._first: bytes | None = None  # the first block, while its head is not known
        self.length = self._started = 0
        try:
            self._put(bytes(head))
        except BaseException:
            self.close()
            raise

    def write(self, part: Part) -> None:
        """Appends bytes."""
        self._put(part)
        view = memoryview(part).cast("B")
        if self._rest:
            fits = BLOCK - len(self._rest)
            self._rest += view[:fits]
            view = view[fits:]
            if len(self._rest) < BLOCK:
                return
            self._take(self._rest)
            self._rest = bytearray()
        whole = len(view) // BLOCK * BLOCK
        if whole:
            self._take(view[:whole])
        self._rest += view[whole:]

    def seal(self, head: bytes = b"") -> Written:
        """Ends it, and says what it holds; `sync` makes it durable.

        Args:
            head: Its first bytes, as many as were left out.
        """
        if len(head) != self._head:
            raise ValueError(f"head must be {self._head} bytes, got {len(head)}")
        if self._rest:
            self._take(self._rest)
        if self._first is not None:
            os.lseek(self._handle, 0, os.SEEK_SET)
            self._put(head, counted=False)
            self._sums[0][0] = _checksums(head + self._first[self._head :])[0]
        sums = np.concatenate(self._sums) if self._sums else np.empty(0, np.uint32)
        return Written(self.length, sums.astype(">u4").tobytes().hex())

    def start(self) -> None:
        """Lets the system begin to write what was appended, if it can; waits for nothing."""
        if hasattr(os, "posix_fadvise"):
            with contextlib.suppress(OSError):
                # On Linux this writes dirty pages, and keeps them: it drops only what is written.
                done, new = self._started, self.length - self._started
                os.posix_fadvise(self._handle, done, new, os.POSIX_FADV_DONTNEED)
                self._started = self.length

    def sync(self) -> None:
        """Makes its bytes durable."""
        sync(self._handle)

    def close(self) -> None:
        """Lets go of it; as often as one likes."""
        if self._handle >= 0:
            handle, self._handle = self._handle, -1
            os.close(handle)

    def _put(self, part: Part, *, counted: bool = True) -> None:
        view = memoryview(part).cast("B")
        while view:
            done = os.write(self._handle, view[:PIECE])
            view = view[done:]
            self.length += done if counted else 0

    def _take(self, blocks: Part) -> None:
        sums = _checksums(blocks)
        if self._head and not self._sums:
            self._first, sums = bytes(memoryview(blocks)[:BLOCK]), sums.copy()
        self._sums.append(sums)


def write(path: Path, *parts: Part) -> Written:
    """Writes and syncs a new file."""
    file = NewFile(path)
    try:
        for part in parts:
            file.write(part)
        written = file.seal()
        file.sync()
    finally:
        file.close()
    return written


def sync_all(files: Iterable[NewFile]) -> None:
    """Makes the bytes of several files durable, at the same time."""
    files = list(files)
    try:
        with ThreadPoolExecutor(min(SYNCS, max(len(files), 1))) as pool:
            for _ in pool.map(NewFile.sync, files):
                pass
    except RuntimeError:  # no more threads, or Python is about to end
        for file in files:
            file.sync()


def json_bytes(body: dict[str, Any]) -> bytes:
    """A JSON object on one line, and its checksum on the next."""
    text = json.dumps(body, ensure_ascii=True, allow_nan=False).encode()
    return text + _tail(text)


_TAIL = 10
"""Bytes after the text of a JSON file: the end of its line, and its checksum on a line."""


def _tail(text: bytes) -> bytes:
    return f"\n{checksum_of(text):08x}\n".encode()


def _no_number(word: str) -> None:
    raise ValueError(f"{word} is no number in JSON")


def reason(error: Exception) -> str:
    """What is wrong with what was read, as a reader of it would say, not as Python does."""
    if isinstance(error, KeyError):
        return f"it has no {error}"
    if isinstance(error, ValueError):
        return str(error)
    return "a value in it is of a type that it cannot be of"


def unfinished(path: Path) -> Path:
    """Where a file of JSON lies until it is whole."""
    return path.with_suffix(".part")


def write_json(path: Path, body: dict[str, Any]) -> Written:
    """Writes a JSON object and its checksum; the file appears whole, or not at all.

    Raises:
        StoreError: If the system refuses, or it is longer than one that is read.
    """
    temporary, content = unfinished(path), json_bytes(body)
    if len(content) > MAX_JSON:
        raise StoreError(f"{path} must be at most {MAX_JSON} bytes long, got {len(content)}")
    with store_errors(path):
        written = write(temporary, content)
        temporary.replace(path)
        sync_directory(path.parent)
    return written


def parse_json(path: Path, content: bytes) -> Any:
    """What `write_json` wrote at `path`, from its content.

    Raises:
        StoreError: If it is damaged.
    """
    text, end = content[:-_TAIL], content[-_TAIL:]
    if end != _tail(text):
        raise StoreError(f"{path} is damaged: its checksum does not fit its text")
    try:
        return json.loads(text, parse_constant=_no_number)
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


def header(kind: str, shape: tuple[int, ...]) -> bytes:
    """The one header that a `.npy` file of this type and shape has here: npy 1.0, in C order."""
    sizes = "".join(f"{size}, " for size in shape)
    shaped = f"({sizes.rstrip()})" if len(shape) == 1 else f"({sizes.removesuffix(', ')})"
    text = f"{{'descr': '{kind}', 'fortran_order': False, 'shape': {shaped}, }}"
    length = max(2 * _ALIGN, -(-(10 + len(text) + 1) // _ALIGN) * _ALIGN)
    padded = text.ljust(length - 11) + "\n"
    return b"\x93NUMPY\x01\x00" + len(padded).to_bytes(2, "little") + padded.encode("latin1")


def array_parts(*arrays: NDArray[Any]) -> Iterator[Part]:
    """The bytes of a `.npy` file of arrays that follow each other, of one type."""
    shape = (sum(map(len, arrays)), *arrays[0].shape[1:])
    yield header(arrays[0].dtype.str, shape)
    for array in arrays:
        yield np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def write_array(path: Path, *arrays: NDArray[Any]) -> Written:
    """Writes and syncs a new `.npy` file of arrays that follow each other, of one type."""
    return write(path, *array_parts(*arrays))


def string_arrays(stem: str, array: NDArray[Any]) -> dict[str, NDArray[Any]]:
    """Strings as files: their UTF-8 bytes, and [rows + 1] offsets."""
    encoded = [str(text).encode("utf-8", "surrogatepass") for text in array]
    offsets = np.zeros(len(encoded) + 1, np.int64)
    np.cumsum([len(text) for text in encoded], out=offsets[1:])
    return {
        f"{stem}.npy": np.frombuffer(b"".join(encoded), np.uint8),
        f"{stem}-offsets.npy": offsets,
    }


def mark(path: Path) -> None:
    """Makes an empty file."""
    os.close(os.open(path, _WRITE | _SYSTEM, 0o666))


def sync_directory(path: Path) -> None:
    """Makes the names in a directory durable, where the system can."""
    if os.name == "posix":
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def names_of(folder: Path, prefix: str) -> list[str]:
    """The names in a folder that begin so, in order.

    Raises:
        StoreError: If the folder cannot be read.
    """
    with store_errors(folder):
        return sorted(each.name for each in folder.iterdir() if each.name.startswith(prefix))


@contextmanager
def regular(path: Path, length: int | None = None) -> Iterator[tuple[int, int]]:
    """A file of a store, open for reading: its handle and its length.

    Args:
        path: Of the file.
        length: What it must be, if that is known.

    Raises:
        StoreError: If it is a link, a pipe or a device, cannot be read, or is of another length.
    """
    with store_errors(path):
        try:
            handle = os.open(path, _READ | _SYSTEM)
        except FileNotFoundError as error:
            raise _is_gone(path) from error
        except OSError as error:
            if error.errno == errno.ELOOP:
                raise StoreError(f"{path} must be a file of the store, got a link") from None
            raise
        try:
            found = os.fstat(handle)
            if not stat.S_ISREG(found.st_mode):
                raise StoreError(f"{path} must be a regular file, got another kind")
            if length is not None and found.st_size != length:
                raise StoreError(
                    f"{path} is damaged: it must be {length} bytes long, got {found.st_size}"
                )
            yield handle, found.st_size
        finally:
            os.close(handle)


def check_length(path: Path, length: int) -> None:
    """Nothing, if a file of a store is there and so long.

    Raises:
        StoreError: If it is not, or is a link, a pipe or a device.
    """
    found = _status(path)
    if not stat.S_ISREG(found.st_mode):
        raise StoreError(f"{path} must be a regular file, got another kind")
    if found.st_size != length:
        raise StoreError(f"{path} is damaged: it must be {length} bytes long, got {found.st_size}")


def check_folder(path: Path) -> None:
    """Nothing, if a folder of a store is one.

    Raises:
        StoreError: If it is not there, or a link or a file.
    """
    if not stat.S_ISDIR(_status(path).st_mode):
        raise StoreError(f"{path} must be a folder of the store, got a link or a file")


def _status(path: Path) -> os.stat_result:
    with store_errors(path):
        try:
            return path.lstat()
        except FileNotFoundError as error:
            raise _is_gone(path) from error


def _is_gone(path: Path) -> StoreError:
    return StoreError(
        f"{path} is gone: the store was compacted or repaired since it was opened (open it again), "
        "or is damaged"
    )


def read_part(path: Path, handle: int, offset: int, length: int) -> bytes:
    """Bytes of an open file.

    They grow as they are read: whatever length is asked for, there is memory for what is there.

    Raises:
        StoreError: If they are not there.
    """
    with store_errors(path):
        found, done = BytesIO(), 0  # whose value is taken without a copy, which nothing interrupts
        while done < length:
            os.lseek(handle, offset + done, os.SEEK_SET)
            part = os.read(handle, min(length - done, PIECE))
            if not part:
                raise StoreError(f"{path} is damaged: it ends at byte {offset + done}")
            if len(part) == length:
                return part
            done += found.write(part)
    return found.getvalue()


def read(path: Path, written: Written) -> bytes:
    """The bytes of a file, once length and checksums are those that were written.

    Raises:
        StoreError: If they are not, or the file cannot be read.
    """
    with regular(path, written.length) as (handle, length):
        content = read_part(path, handle, 0, length)
    check_blocks(path, content, written.blocks)
    return content


def read_range(path: Path, written: Written, start: int, stop: int) -> bytes:
    """Some bytes of a file, once the blocks that they lie in are those that were written.

    Raises:
        StoreError: If they are not, or the file cannot be read.
    """
    first, last = start // BLOCK, -(-stop // BLOCK)
    with regular(path, written.length) as (handle, length):
        end = min(last * BLOCK, length)
        content = read_part(path, handle, first * BLOCK, end - first * BLOCK)
    check_blocks(path, content, written.blocks[first:last], first)
    return content[start - first * BLOCK : stop - first * BLOCK]


def read_parts(path: Path, written: Written) -> Iterator[bytes]:
    """The bytes of a file, some at a time, each once its blocks are those that were written.

    Raises:
        StoreError: If they are not, or the file cannot be read.
    """
    for start in range(0, written.length, PIECE):
        yield read_range(path, written, start, min(start + PIECE, written.length))


def check_blocks(path: Path, content: Part, checksums: NDArray[np.uint32], first: int = 0) -> None:
    """Nothing, if blocks of a file, from the number `first` on, have these checksums.

    Raises:
        StoreError: If one has not; says which.
    """
    found = _checksums(content)
    wrong = np.flatnonzero(found != checksums)
    if len(wrong):
        at = int(wrong[0])
        start = (first + at) * BLOCK
        end = start + min(BLOCK, memoryview(content).nbytes - at * BLOCK) - 1
        raise StoreError(
            f"{path} is damaged: block {first + at} (bytes {start} to {end}): its checksum must be "
            f"{checksums[at]:#010x}, got {found[at]:#010x}"
        )


def read_json(path: Path, written: Written | None = None) -> Any:
    """What `write_json` wrote.

    Raises:
        StoreError: If it is damaged, or not what was written.
    """
    with regular(path) as (handle, length):
        if length > MAX_JSON:
            raise StoreError(f"{path} must be at most {MAX_JSON} bytes long, got {length}")
        if written is not None and length != written.length:
            raise StoreError(
                f"{path} is damaged: it must be {written.length} bytes long, got {length}"
            )
        content = read_part(path, handle, 0, length)
    if written is not None:
        check_blocks(path, content, written.blocks)
    return parse_json(path, content)


def read_array(path: Path, written: Written, kind: str, shape: tuple[int, ...]) -> NDArray[Any]:
    """The array of a checked `.npy` file.

    Raises:
        StoreError: If it is damaged, or of another type or shape than asked for, or than can be.
    """
    if kind not in KINDS or any(type(size) is not int or size < 0 for size in shape):
        raise StoreError(
            f"{path} must hold values of a known type and shape, got {kind!r:.80} and {shape!r:.80}"
        )
    content = read(path, written)
    offset = check_header(path, content, kind, shape)
    size = math.prod(shape) * np.dtype(kind).itemsize
    if len(content) - offset != size:
        raise StoreError(
            f"{path} is damaged: it must hold {size} bytes of values, got {len(content) - offset}"
        )
    return np.frombuffer(content, np.dtype(kind), offset=offset).reshape(shape)


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


def check_header(path: Path, content: bytes, kind: str, shape: tuple[int, ...]) -> int:
    """The byte at which the values of a `.npy` file begin.

    Raises:
        StoreError: If it does not begin with the header of this type and shape.
    """
    wanted = header(kind, shape)
    if content[: len(wanted)] != wanted:
        raise StoreError(
            f"{path} is damaged: it must hold {kind} of shape {list(shape)} in C order, got a file "
            f"that begins with {bytes(content[: len(wanted)]).rstrip()!r:.160}"
        )
    return len(wanted)


def read_header(path: Path, written: Written, kind: str, shape: tuple[int, ...]) -> int:
    """The byte at which the values of a `.npy` file begin, of which no block is checked yet.

    Raises:
        StoreError: If it is not as long as it was, or of another type or shape than asked for.
    """
    with regular(path, written.length) as (handle, length):
        content = read_part(path, handle, 0, min(length, len(header(kind, shape))))
    return check_header(path, content, kind, shape)


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


def _checksums(content: Part) -> NDArray[np.uint32]:
    return _core.block_checksums(np.frombuffer(content, np.uint8))


def _of(files: dict[str, Written], path: Path) -> Written:
    if path.name not in files:
        raise StoreError(f"{path} must be named in the manifest, and is not")
    return files[path.name]
