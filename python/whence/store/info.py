"""What a store holds, in figures."""

from __future__ import annotations

import os
import warnings
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from whence import _arrays
from whence._plain import counted, line
from whence.store.files import store_errors
from whence.store.gone import GONE
from whence.store.lifecycle import leftovers
from whence.store.manifest import VERSION
from whence.store.members import parts
from whence.store.reader import Reader

_KINDS = {"rows": "rows", "scales": "scales", "ids": "ids", "column": "columns", "map": "maps"}


@dataclass(frozen=True)
class Info:
    """What a store holds.

    Attributes:
        path: The store's folder.
        version: Of its format.
        examples: Distinct ids.
        rows: One for each example and checkpoint.
        gone: Rows that were deleted or replaced, and are on the disk until `compact`.
        checkpoints: Name -> rows.
        columns: Name -> type.
        sketch: What made the rows, in words.
        dtype: Of stored rows.
        dim: Of a row.
        shards: How many.
        bytes: Kind of file -> bytes on the disk.
        leftovers: Bytes that are named nowhere, as a killed writer leaves them.
        writers: How many write to it.
        missing_writers: Those that have confirmed nothing yet.
        skipped: Examples that were left out because their gradient was not finite.
    """

    path: Path
    version: int
    examples: int
    rows: int
    gone: int
    checkpoints: dict[str, int]
    columns: dict[str, str]
    sketch: str
    dtype: str
    dim: int
    shards: int
    bytes: dict[str, int]
    leftovers: int
    writers: int
    missing_writers: list[str]
    skipped: int

    def __str__(self) -> str:
        total = sum(self.bytes.values())
        each = f", {total / self.rows:,.1f} a row" if self.rows else ""
        names = ", ".join(f"{name!r} ({rows:,})" for name, rows in self.checkpoints.items())
        columns = ", ".join(f"{name!r} ({kind})" for name, kind in self.columns.items())
        kinds = ", ".join(f"{kind} {size:,}" for kind, size in self.bytes.items() if size)
        lines = {
            "store": repr(str(self.path)),
            "format": f"version {self.version}",
            "examples": (
                f"{self.examples:,}, {counted(self.rows, 'row')} in {counted(self.shards, 'shard')}"
            ),
            "checkpoints": names or "none",
            "sketch": f"{self.sketch}, dim {self.dim:,}, {self.dtype}",
            "columns": columns or "none",
            "bytes": f"{total:,}{each}: {kinds}",
        }
        if self.gone or self.leftovers:
            lines["compact"] = (
                f"would remove {counted(self.gone, 'row')}, "
                f"{counted(self.leftovers, 'byte')} left over"
            )
        if self.skipped:
            lines["skipped"] = f"{counted(self.skipped, 'example')} whose gradient was not finite"
        if self.writers > 1:
            lacking = f"; nothing is there of {', '.join(self.missing_writers)}"
            lines["writers"] = f"{self.writers:,}{lacking if self.missing_writers else ''}"
        width = max(map(len, lines))
        return "\n".join(line(f"{name:<{width}}  {text}") for name, text in lines.items())


def info(path: str | os.PathLike[str]) -> Info:
    """What a store holds, in figures. Reads ids and what describes the rest.

    Args:
        path: The store's folder.

    Returns:
        The figures. O(rows) time.

    Raises:
        StoreError: If there is no store, or it is damaged.
    """
    path = _arrays.path("path", path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # missing writers are among the figures
        reader = Reader(path)
    manifest = reader.manifest
    sizes: Counter[str] = Counter(dict.fromkeys((*_KINDS.values(), "manifests", "gone"), 0))
    for shard, described in reader.shards:
        for name, written in described.files.items():
            sizes[_KINDS.get(name.removesuffix(".npy").split("-")[0], "others")] += written.length
        sizes["manifests"] += shard.described.length
    for checkpoint in manifest.checkpoints:
        if checkpoint.map is not None:
            sizes["maps"] += sum(written.length for written in checkpoint.map.files.values())
    found = parts(path)
    with store_errors(path):
        strays = {path / name: leftovers(path / name, part) for name, part in found}
        left = sum(_size(each) for lying in strays.values() for each in lying)
        for kind, pattern in (("manifests", "*.json"), ("gone", f"{GONE}*.npy")):
            sizes[kind] += sum(
                _size(each)
                for folder, lying in strays.items()
                for each in folder.glob(pattern)
                if each not in lying
            )
    numbers = reader.row_numbers(missing="keep")
    rows = {
        name: int((each >= 0).sum()) for name, each in zip(reader.checkpoints, numbers, strict=True)
    }
    total = sum(shard.rows for shard in manifest.shards)
    spec = manifest.sketch
    sketch = f"{spec['kind']} seed {spec['seed']}" if "kind" in spec else spec.get("layout", "")
    return Info(
        path,
        VERSION,
        len(reader),
        sum(rows.values()),
        total - sum(rows.values()),
        rows,
        dict(manifest.columns or {}),
        str(sketch),
        manifest.dtype,
        manifest.dim,
        len(manifest.shards),
        dict(sizes),
        left,
        max(len([name for name, _ in found if name]) + len(reader.missing_writers), 1),
        reader.missing_writers,
        len(manifest.skipped),
    )


def _size(path: Path) -> int:
    if path.is_dir() and not path.is_symlink():
        return sum(map(_size_of, path.rglob("*")))
    return _size_of(path)


def _size_of(path: Path) -> int:
    try:
        return path.lstat().st_size
    except FileNotFoundError:  # a writer has removed it meanwhile
        return 0
