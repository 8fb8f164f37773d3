"""The manifest: what a store holds, and how it came about."""

from __future__ import annotations

import contextlib
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from whence import _core
from whence.errors import StoreError
from whence.store.files import Written, parse_json, store_errors, write_json
from whence.store.maps import StoredMap, checked_map

FORMAT = "whence store"
VERSION = 0
READ_ATTEMPTS = 8
"""How often a reader looks again when a manifest is gone before it was read."""

KEPT = 2
"""Older manifests kept for readers that are just opening one."""

DTYPES = {
    "float16": "<f2",
    "float32": "<f4",
    "int8": "|i1",
    "int4": "|u1",
    "int2": "|u1",
    "int1": "|u1",
}
"""Types of stored rows, and what `.npy` calls them."""

BITS = {"int8": 8, "int4": 4, "int2": 2, "int1": 1}
"""Types of quantised rows, and the bits of a value.

A value is its level times the scale of its row. Levels of int8 are the whole numbers from -127 to
127, and lie there as they are. Those of the others are odd, `2 c - (2**bits - 1)` of the code c:
-15, -13, ..., 15; -3, -1, 1, 3; -1, 1. The codes of a row lie in ceil(dim · bits / 8) bytes, the
first in the lowest bits of the first byte; what is left of the last byte is 0. The scale is that of
the least squared error, and 0 for a row of zeros.
"""

COLUMN_KINDS = {"bool": "|b1", "int64": "<i8", "float64": "<f8", "str": ""}
"""Types of columns, and what `.npy` calls them; strings have a form of their own."""

COMBINED = "combined"
"""The name of rows that are sums over checkpoints."""

SECOND_MOMENTS = "second moments"
"""The method of rows of gradients that were divided by an optimizer's second moments."""

_NAME = re.compile(r"manifest-(\d{8})\.json")


@dataclass
class Checkpoint:
    """A point of training at which gradients were taken.

    Attributes:
        name: Its name.
        learning_rate: The step size in use, or None if not said.
        weights: "fixed" if no weight changed while rows were recorded, else "moving".
        first: Digest of the weights at the first row.
        last: Digest of the weights when recording last ended; None if it never ended in order.
        weight: Its share in the score of combined rows; None for rows of its own.
        map: The map of its rows, where checkpoints have one each.
    """

    name: str
    learning_rate: float | None = None
    weights: str = "fixed"
    first: str | None = None
    last: str | None = None
    weight: float | None = None
    map: StoredMap | None = None


@dataclass
class Shard:
    """Rows of one checkpoint that were committed together.

    Attributes:
        name: Of its folder.
        checkpoint: The number of the checkpoint.
        rows: How many.
        files: name -> length and checksum.
        error: Mean relative error of quantised rows; None for others, or if not known.
    """

    name: str
    checkpoint: int
    rows: int
    files: dict[str, Written]
    error: float | None = None


@dataclass
class Manifest:
    """All that a store says about itself.

    Attributes:
        sketch: The map of the rows: kind, dim, seed, hash_version and what else is not the
            default; for a map with a part of the row for each layer also their names; or
            layout="factored" and the segments of a row.
        dtype: "float16" or "float32", the type of stored unit rows; "int8", "int4", "int2" or
            "int1" for quantised ones.
        reduction: How the recorded loss combined its examples.
        model: digest and parameters of the recorded model.
        ids: "int64" or "str"; None until the first rows.
        columns: name -> "bool", "int64", "float64" or "str"; None until the first rows.
        checkpoints: In the order they were recorded.
        shards: In the order they were committed.
        skipped: [checkpoint, id] of examples left out because their gradient was not finite.
        rows: "per_checkpoint": an example has a row in each checkpoint it was recorded in;
            "combined": it has one, the weighted sum over all of them.
    """

    sketch: dict[str, Any]
    dtype: str
    reduction: str
    model: dict[str, Any]
    ids: str | None = None
    columns: dict[str, str] | None = None
    checkpoints: list[Checkpoint] = field(default_factory=list)
    shards: list[Shard] = field(default_factory=list)
    skipped: list[tuple[int, int | str]] = field(default_factory=list)
    rows: str = "per_checkpoint"

    @property
    def row_sets(self) -> list[str]:
        """Names of the rows that an example can have."""
        if self.rows == "combined":
            return [COMBINED]
        return [checkpoint.name for checkpoint in self.checkpoints]

    @property
    def is_preconditioned(self) -> bool:
        """Whether rows are whitened coordinates, whose maps the checkpoints name."""
        return self.sketch.get("layout") == "preconditioned"

    @property
    def dim(self) -> int:
        """The width of a row."""
        if self.is_factored:
            return sum(segment["left"] + segment["right"] for segment in self.sketch["segments"])
        return int(self.sketch["dim"]) * len(self.sketch.get("layers", [""]))

    @property
    def is_factored(self) -> bool:
        """Whether rows hold factors of gradients instead of sketches."""
        return self.sketch.get("layout") == "factored"

    @property
    def is_quantised(self) -> bool:
        """Whether rows hold levels of few bits instead of unit rows."""
        return self.dtype in BITS

    @property
    def row_width(self) -> int:
        """How many values of its `.npy` type a stored row has."""
        return -(-self.dim * BITS[self.dtype] // 8) if self.is_quantised else self.dim

    def save(self, folder: Path, number: int) -> None:
        """Commits: the manifest appears whole, or not at all."""
        body = {"format": FORMAT, "version": VERSION, **asdict(self)}
        for shard in body["shards"]:
            if shard["error"] is None:
                del shard["error"]
        write_json(self.path(folder, number), body)

    @staticmethod
    def path(folder: Path, number: int) -> Path:
        """Where the manifest of a number stands."""
        return folder / f"manifest-{number:08}.json"

    @staticmethod
    def prune(folder: Path, number: int) -> None:
        """Removes manifests that no reader can be opening any more; as far as it can."""
        with contextlib.suppress(OSError):
            for old, path in _numbered(folder):
                if old < number - KEPT:
                    path.unlink(missing_ok=True)

    @classmethod
    def load(cls, folder: Path) -> tuple[Manifest, int]:
        """The newest manifest of a store, and its number.

        Raises:
            StoreError: If there is none, or it is damaged or of another format.
        """
        for attempt in range(READ_ATTEMPTS):
            with store_errors(folder):
                numbered = _numbered(folder)
                if not numbered:
                    got = "one" if (folder / "lock").exists() else "a folder"
                    raise StoreError(
                        f"{folder} must be a whence store with rows, got {got} with no manifest: "
                        "nothing was ever confirmed in it"
                    )
                number, path = max(numbered)
                try:
                    content = path.read_bytes()
                    break
                except FileNotFoundError:  # a writer has committed and pruned meanwhile
                    if attempt == READ_ATTEMPTS - 1:
                        raise
        body = parse_json(path, content)
        try:
            return cls._from_json(body), number
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise StoreError(f"{path} is damaged: {type(error).__name__}: {error}") from None

    @classmethod
    def exists(cls, folder: Path) -> bool:
        """Whether the folder has a manifest."""
        with store_errors(folder):
            return folder.is_dir() and bool(_numbered(folder))

    @classmethod
    def _from_json(cls, body: dict[str, Any]) -> Manifest:
        if body.pop("format") != FORMAT:
            raise ValueError("format must be a whence store")
        if (version := body.pop("version")) != VERSION:
            raise ValueError(f"version must be {VERSION}, got {version}")
        manifest = cls(**body)
        manifest.checkpoints = [
            Checkpoint(
                **{**each, "map": None if (it := each.get("map")) is None else checked_map(it)}
            )
            for each in body["checkpoints"]
        ]
        manifest.shards = [
            Shard(
                name=each["name"],
                checkpoint=each["checkpoint"],
                rows=each["rows"],
                files={name: Written(*written) for name, written in each["files"].items()},
                error=each.get("error"),
            )
            for each in body["shards"]
        ]
        manifest.skipped = [(checkpoint, id_) for checkpoint, id_ in body["skipped"]]
        manifest._check()
        return manifest

    def _check(self) -> None:
        """Nothing, if every value is one that a writer may have written.

        Raises:
            ValueError: If one is not.
        """
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {list(DTYPES)}, got {self.dtype!r}")
        if self.is_quantised and self.is_factored:
            raise ValueError(f"dtype must be a float for rows of factors, got {self.dtype!r}")
        if not 1 <= self.dim <= _core.MAX_DIM:
            raise ValueError(f"rows must be from 1 to {_core.MAX_DIM} wide, got {self.dim}")
        if self.is_preconditioned and not {"basis", "coordinates"} <= set(self.sketch):
            raise ValueError("sketch must say how rows are preconditioned")
        if self.ids not in (None, "int64", "str"):
            raise ValueError(f"ids must be int64 or str, got {self.ids!r}")
        for name, kind in (self.columns or {}).items():
            if kind not in COLUMN_KINDS:
                raise ValueError(f"column {name!r} must be of a known type, got {kind!r}")
        if len({checkpoint.name for checkpoint in self.checkpoints}) < len(self.checkpoints):
            raise ValueError("checkpoints must have distinct names")
        for checkpoint in self.checkpoints:
            rate = checkpoint.learning_rate
            if checkpoint.weights not in ("fixed", "moving") or not (
                rate is None or (isinstance(rate, (int, float)) and 0 < rate < float("inf"))
            ):
                raise ValueError(f"{checkpoint} must be one that a recorder writes")
            if checkpoint.first and (checkpoint.map is None) == self.is_preconditioned:
                raise ValueError(f"{checkpoint.name} must have a map if rows are preconditioned")
            weight = checkpoint.weight
            if (weight is None) != (self.rows == "per_checkpoint") or not (
                weight is None or (isinstance(weight, (int, float)) and 0 < weight < float("inf"))
            ):
                raise ValueError(f"{checkpoint.name} must have a weight if rows are combined")
        if self.rows not in ("per_checkpoint", COMBINED):
            raise ValueError(f"rows must be per_checkpoint or combined, got {self.rows!r}")
        if len({shard.name for shard in self.shards}) < len(self.shards):
            raise ValueError("shards must have distinct names")
        for shard in self.shards:
            if not re.fullmatch(r"shard-\d{8}", shard.name):
                raise ValueError(f"a shard's name must be shard-N, got {shard.name!r}")
            if type(shard.rows) is not int or shard.rows < 1:
                raise ValueError(f"{shard.name} must have rows, got {shard.rows!r}")
            if shard.error is not None and not (
                isinstance(shard.error, (int, float)) and 0 <= shard.error <= 1
            ):
                raise ValueError(f"{shard.name}'s error must be from 0 to 1, got {shard.error!r}")
        known = range(len(self.row_sets))
        for index in [shard.checkpoint for shard in self.shards] + [at for at, _ in self.skipped]:
            if type(index) is not int or index not in known:
                raise ValueError(f"rows must be of a known checkpoint, got {index!r}")
        for parameter in self.model["parameters"]:
            if not isinstance(parameter["name"], str) or not isinstance(parameter["kind"], str):
                raise ValueError("parameters must have names and kinds")


def _numbered(folder: Path) -> list[tuple[int, Path]]:
    found = ((_NAME.fullmatch(path.name), path) for path in folder.iterdir())
    return [(int(match[1]), path) for match, path in found if match]
