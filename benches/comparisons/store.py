"""What it costs that nothing a store has confirmed is lost, and nothing damaged is believed."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np

import whence
from comparisons.shared import Row, bench, compared_rates, take_turns
from whence.store import Checkpoint, Manifest, Writer

BATCH = 128
"""Rows that are appended at a time, as a training loop does."""

SHAPES = ((40_000, 4096, "float16"), (160_000, 512, "float32"))
"""Examples, width and type of what is stored: about 320 MiB each."""

COMMIT = 64 << 20
"""Bytes that are confirmed together."""

READ = 1 << 20
"""Bytes that a plain reader takes at a time."""

SECONDS = 40.0


@bench
def store(folder: Path) -> Iterator[Row]:
    """Appending and committing beside writing and syncing, verifying beside reading."""
    for examples, dim, dtype in SHAPES:
        rows = np.random.default_rng(0).standard_normal((4096, dim), np.float32)
        path, plain = folder / "store", folder / "plain"
        size = examples * dim * np.dtype(dtype).itemsize
        _append(path, rows, examples, dtype)
        _check(path, rows, examples, dtype)
        what = f"{examples:,} × {dim} {dtype}"
        times = take_turns(
            {
                "ours": lambda p=path, r=rows, n=examples, d=dtype: _append(p, r, n, d),
                "plain": lambda p=plain, s=size: _write(p, s),
            },
            SECONDS,
        )
        yield compared_rates(
            f"append with commits, {what} ÷ raw write and fsync of the rows' bytes",
            times["ours"],
            times["plain"],
            0.7,
            unit="MB/s",
            amounts=(size / 1e6, size / 1e6),
        )
        files = [each for each in sorted(path.rglob("*")) if each.is_file()]
        total = sum(each.stat().st_size for each in files)
        for cached in (False, True):
            times = take_turns(
                {
                    "ours": lambda p=path, f=files, c=cached: (_drop(f, c), _verify(p)),
                    "plain": lambda f=files, c=cached: (_drop(f, c), _read(f)),
                },
                SECONDS / 2,
            )
            where = "from the system's cache" if cached else "from the disk"
            yield compared_rates(
                f"verify, {what}, {where} ÷ reading the same bytes",
                times["ours"],
                times["plain"],
                0.7,
                unit="MB/s",
                amounts=(total / 1e6, total / 1e6),
            )
        shutil.rmtree(path)
        shutil.rmtree(plain)


def _append(path: Path, rows: np.ndarray, examples: int, dtype: str) -> None:
    shutil.rmtree(path, ignore_errors=True)
    spec = whence.Sketch(dim=rows.shape[1]).spec
    writer = Writer(path, Manifest(spec, dtype, "mean", {"digest": "none", "parameters": []}))
    writer.set_checkpoint(Checkpoint("0"))
    for start in range(0, examples, BATCH):
        count = min(BATCH, examples - start)
        at = start % len(rows)
        writer.append(np.arange(start, start + count), rows[at : at + count], {})
    writer.close()


def _write(path: Path, size: int) -> None:
    """The same bytes in as many files, each synced."""
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir()
    block = np.random.default_rng(1).bytes(READ)
    for number in range(-(-size // COMMIT)):
        with (path / f"{number}").open("wb", buffering=0) as file:
            left = min(COMMIT, size - number * COMMIT)
            while left:
                left -= file.write(block[:left])
            os.fsync(file.fileno())


def _verify(path: Path) -> None:
    if not whence.verify(path, progress=False).is_sound:
        sys.exit("the store must be sound")


def _read(files: list[Path]) -> None:
    buffer = bytearray(READ)
    for each in files:
        with each.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def _drop(files: list[Path], cached: bool) -> None:
    """Lets go of what the system has cached of files, unless it is to stay."""
    if cached:
        return
    for each in files:
        handle = os.open(each, os.O_RDONLY)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)


def _check(path: Path, rows: np.ndarray, examples: int, dtype: str) -> None:
    """The store must hold the rows that were given, before anything is timed."""
    found = whence.open(path)
    some = np.linspace(0, examples - 1, 50).astype(np.int64)
    wanted = rows[some % len(rows)]
    near = np.allclose(found.rows(some), wanted, rtol=2e-3, atol=2e-3 if dtype == "float16" else 0)
    if len(found) != examples or not near:
        sys.exit("the store must hold what was appended")
