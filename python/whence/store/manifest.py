"""The manifest: what a store holds, and how it came about."""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from whence import _arrays, _core
from whence.errors import StoreError
from whence.store.files import WRONG, mark, read_json, reason, store_errors, write_json
from whence.store.gone import Gone
from whence.store.maps import StoredMap, checked_map
from whence.store.shards import PACK, SHARD, Pack, Shard, last_number, read_pack, write_pack

FORMAT = "whence store"
VERSION = 1
REQUIRES: frozenset[str] = frozenset()
"""Words of `requires` that this version knows: what readers must understand beside the format."""

READ_ATTEMPTS = 8
"""How often a reader looks again when a manifest is gone before it was read."""

KEPT = 1
"""Older manifests kept: what `repair` goes back to if the newest is damaged."""

PACKED = 1000
"""Shards whose entries go into a pack, so that a commit does not write those of all again."""

REDUCTIONS = ("mean", "sum", "token_mean")
"""How a loss combines its examples."""

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
        packs: Files with the entries of the first shards, `PACKED` each.
        gone: Rows that were deleted or replaced, and are still in their shards; None for none.
        skipped: [checkpoint, id] of examples left out because their gradient was not finite.
        rows: "per_checkpoint": an example has a row in each checkpoint it was recorded in;
            "combined": it has one, the weighted sum over all of them.
        writer: Which of several writers recorded it, as in "3/8"; None for the only one.
        unknown: What a later version has added, which is kept.
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
    packs: list[Pack] = field(default_factory=list)
    gone: Gone | None = None
    writer: str | None = None
    unknown: dict[str, Any] = field(default_factory=dict)

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

    @property
    def row_bytes(self) -> int:
        """Bytes of a stored row."""
        return self.row_width * {"<f2": 2, "<f4": 4}.get(DTYPES[self.dtype], 1)

    @property
    def stored_bytes(self) -> int:
        """Bytes of all stored rows, also of those that are gone."""
        return self.row_bytes * sum(shard.rows for shard in self.shards)

    def save(self, folder: Path, number: int) -> Manifest:
        """Commits: the manifest appears whole, or not at all.

        Returns:
            The manifest as it stands there: with packs of the entries of older shards.

        Raises:
            StoreError: If it cannot be written.
        """
        packs = list(self.packs)
        packed = sum(pack.shards for pack in packs)
        while len(self.shards) - packed >= PACKED:
            next_pack = 1 + last_number(folder, PACK)
            packs.append(write_pack(folder, next_pack, self.shards[packed : packed + PACKED]))
            packed += PACKED
        saved = replace(self, packs=packs)
        write_json(self.path(folder, number), saved.body(number))
        return saved

    def body(self, number: int) -> dict[str, Any]:
        """What JSON holds of it, as the manifest of a number."""
        body = {"format": FORMAT, "version": VERSION, "requires": [], "number": number}
        body |= {
            each.name: getattr(self, each.name)
            for each in fields(self)
            if each.name not in ("unknown", "columns", "shards", "packs", "gone", "checkpoints")
        }
        packed = sum(pack.shards for pack in self.packs)
        body["columns"] = None if self.columns is None else list(self.columns.items())
        body["checkpoints"] = [asdict(each) for each in self.checkpoints]
        body["shards"] = [shard.entry() for shard in self.shards[packed:]]
        body["packs"] = [asdict(pack) for pack in self.packs]
        body["gone"] = None if self.gone is None else asdict(self.gone)
        return body | self.unknown

    @staticmethod
    def path(folder: Path, number: int) -> Path:
        """Where the manifest of a number stands."""
        return folder / f"manifest-{number:08}.json"

    @staticmethod
    def settle(folder: Path, number: int, kept: int = KEPT, *, every: bool = False) -> None:
        """After a commit: marks its number, and removes what is older; as far as it can.

        The marker says that there was a manifest of this number: without it an older one would
        pass for the newest, were that lost.

        Args:
            folder: The store's.
            number: Of the newest manifest; 0 if there is none.
            kept: How many older ones stay.
            every: Looks for all that are older, in O(names in the folder), instead of for the one
                that this commit makes too old.
        """
        with contextlib.suppress(OSError):
            marker = folder / f"{MARKER}{number:08}"
            if number and not marker.exists():
                mark(marker)
            markers, manifests = [number - 1], [number - kept - 1]
            if every:
                markers = [old for old, _ in _numbered(folder, _MARKER) if old < number]
                manifests = [old for old, _ in _numbered(folder, _NAME) if old < number - kept]
            for old in markers:
                (folder / f"{MARKER}{old:08}").unlink(missing_ok=True)
            for old in manifests:
                Manifest.path(folder, old).unlink(missing_ok=True)

    @classmethod
    def load(cls, folder: Path) -> tuple[Manifest, int]:
        """The newest manifest of a store, and its number.

        Raises:
            StoreError: If there is none, or it is damaged or of another format.
        """
        for attempt in range(READ_ATTEMPTS):
            number = newest(folder)
            try:
                return cls.at(folder, number), number
            except StoreError as error:
                # A writer has committed and pruned meanwhile.
                gone = isinstance(error.__cause__, FileNotFoundError)
                if not gone or attempt == READ_ATTEMPTS - 1:
                    raise
        raise AssertionError("a loop that returns or raises")

    @classmethod
    def at(cls, folder: Path, number: int) -> Manifest:
        """The manifest of a number.

        Raises:
            StoreError: If it is damaged or of another format.
        """
        path = cls.path(folder, number)
        body = read_json(path)
        try:
            return cls.from_json(body, folder, number)
        except WRONG as error:
            raise StoreError(f"{path} is damaged: {reason(error)}") from None

    @classmethod
    def exists(cls, folder: Path) -> bool:
        """Whether the folder has a manifest, or had one."""
        with store_errors(folder):
            return folder.is_dir() and bool(_numbered(folder, _NAME) or _numbered(folder, _MARKER))

    @classmethod
    def from_json(cls, body: Any, folder: Path, number: int) -> Manifest:
        """The manifest of a number, from what JSON holds of it; its packs are read.

        Raises:
            StoreError: If it is of another version, or a pack is damaged.
            ValueError: If it is no manifest; or another error of Python's.
        """
        path = cls.path(folder, number)
        if not isinstance(body, dict) or body.pop("format", None) != FORMAT:
            raise ValueError("format must be a whence store")
        if type(version := body.pop("version")) is not int:
            raise ValueError(f"version must be a number, got {version!r:.80}")
        if version != VERSION:
            why = (
                "a later version of whence can read it"
                if version > VERSION
                else "it is of before the format was fixed, and has to be recorded again"
            )
            raise StoreError(f"{path}: version must be {VERSION}, got {version}; {why}")
        if not isinstance(requires := body.pop("requires"), list):
            raise ValueError(f"requires must be a list, got {requires!r:.80}")
        needed = [word for word in requires if word not in REQUIRES]
        if needed:
            raise StoreError(
                f"{path}: requires must be of {sorted(REQUIRES)}, which this version of whence "
                f"knows, got {needed[0]!r:.80}"
            )
        if body.pop("number") != number:
            raise ValueError(f"number must be {number}, as in its name")
        known = {each.name for each in fields(cls)} - {"unknown"}
        unknown = {name: body.pop(name) for name in set(body) - known}
        for name in ("checkpoints", "shards", "packs", "skipped"):
            if not isinstance(body[name], list):
                raise ValueError(f"{name} must be a list, got {body[name]!r:.80}")
        for name in sorted(known):
            _ = body[name]  # a key that is missing is named
        for name in ("sketch", "model"):
            if not isinstance(body[name], dict):
                raise ValueError(f"{name} must be an object, got {body[name]!r:.80}")
        manifest = cls(**body, unknown=unknown)
        if (columns := body["columns"]) is not None:
            if not _are_pairs(columns):
                raise ValueError(f"columns must be a list of pairs, got {columns!r:.80}")
            manifest.columns = dict(columns)
            if len(manifest.columns) < len(columns):
                raise ValueError("columns must have distinct names")
        manifest.checkpoints = [
            Checkpoint(
                **{**each, "map": None if (it := each.get("map")) is None else checked_map(it)}
            )
            for each in body["checkpoints"]
        ]
        manifest.packs = [Pack.of(each) for each in body["packs"]]
        manifest.gone = None if body["gone"] is None else Gone.of(body["gone"])
        entries = [each for pack in manifest.packs for each in read_pack(folder, pack)]
        manifest.shards = [Shard.of(each) for each in [*entries, *body["shards"]]]
        if not _are_pairs(body["skipped"]):
            raise ValueError(f"skipped must be a list of pairs, got {body['skipped']!r:.80}")
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
        if self.reduction not in REDUCTIONS:
            raise ValueError(f"reduction must be one of {REDUCTIONS}, got {self.reduction!r:.80}")
        if not self.is_factored and type(dim := self.sketch["dim"]) is not int:
            raise ValueError(f"dim must be a whole number, got {dim!r:.80}")
        if not 1 <= self.dim <= _core.MAX_DIM:
            raise ValueError(f"rows must be from 1 to {_core.MAX_DIM} wide, got {self.dim}")
        if self.is_preconditioned and not {"basis", "coordinates"} <= set(self.sketch):
            raise ValueError("sketch must say how rows are preconditioned")
        is_map = not self.is_factored and not self.is_preconditioned
        if is_map and not {"kind", "seed"} <= set(self.sketch):
            raise ValueError("sketch must say its kind and seed")
        if is_map and not isinstance(self.sketch["kind"], str):
            raise ValueError(f"kind must be a text, got {self.sketch['kind']!r:.80}")
        if is_map and type(self.sketch["seed"]) is not int:
            raise ValueError(f"seed must be a whole number, got {self.sketch['seed']!r:.80}")
        if self.rows not in ("per_checkpoint", COMBINED):
            raise ValueError(f"rows must be per_checkpoint or combined, got {self.rows!r:.80}")
        if self.ids not in (None, "int64", "str"):
            raise ValueError(f"ids must be int64 or str, got {self.ids!r}")
        for name, kind in (self.columns or {}).items():
            if not isinstance(name, str) or kind not in COLUMN_KINDS:
                raise ValueError(f"column {name!r:.80} must be of a known type, got {kind!r}")
        for checkpoint in self.checkpoints:
            if not is_name(checkpoint.name):
                raise ValueError(f"a checkpoint must have a name, got {checkpoint.name!r:.80}")
            if checkpoint.weights not in ("fixed", "moving"):
                raise ValueError(f"{checkpoint.name} must be one that a recorder writes")
            for digest in (checkpoint.first, checkpoint.last):
                if not isinstance(digest, (str, type(None))):
                    raise ValueError(f"{checkpoint.name} must have digests, got {digest!r:.80}")
            if checkpoint.first and (checkpoint.map is None) == self.is_preconditioned:
                raise ValueError(f"{checkpoint.name} must have a map if rows are preconditioned")
            if (checkpoint.weight is None) != (self.rows == "per_checkpoint"):
                raise ValueError(f"{checkpoint.name} must have a weight if rows are combined")
            for name in ("learning_rate", "weight"):
                if (value := getattr(checkpoint, name)) is not None:
                    _arrays.number(name, value, positive=True)
        if len({checkpoint.name for checkpoint in self.checkpoints}) < len(self.checkpoints):
            raise ValueError("checkpoints must have distinct names")
        if not isinstance(self.writer, (str, type(None))):
            raise ValueError(f"writer must be as in '3/8', got {self.writer!r:.80}")
        if len({shard.name for shard in self.shards}) < len(self.shards):
            raise ValueError("shards must have distinct names")
        known = range(len(self.row_sets))
        for index in [shard.checkpoint for shard in self.shards] + [at for at, _ in self.skipped]:
            if type(index) is not int or index not in known:
                raise ValueError(f"rows must be of a known checkpoint, got {index!r}")
        for _, id_ in self.skipped:
            if type(id_) is not {"int64": int, "str": str}.get(self.ids or ""):
                raise ValueError(f"skipped ids must be {self.ids}, got {id_!r:.80}")
        sizes_of(self.model)


def sizes_of(model: Any) -> dict[str, int]:
    """Name -> number of values of each parameter of a model, as a manifest describes it.

    Raises:
        ValueError: If it is none; or another error of `WRONG`.
    """
    sizes = {}
    for each in model["parameters"]:
        if not isinstance(each["name"], str) or not isinstance(each["kind"], str):
            raise ValueError("parameters must have names and kinds")
        if not _is_list_of(int, each["shape"]) or not _is_list_of(str, each["places"]):
            raise ValueError(f"{each['name']} must have a shape and places")
        sizes[each["name"]] = math.prod(_arrays.shape_of(each["name"], each["shape"]))
    if not isinstance(model["digest"], str):
        raise ValueError(f"model must have a digest, got {model['digest']!r:.80}")
    return sizes


def is_name(value: Any) -> bool:
    """Whether a checkpoint can have this name: a text, of which an export can be made."""
    return isinstance(value, str) and bool(value) and "\0" not in value


def _is_list_of(kind: type, value: Any) -> bool:
    return isinstance(value, list) and all(type(each) is kind for each in value)


def _are_pairs(value: Any) -> bool:
    return _is_list_of(list, value) and all(len(each) == 2 for each in value)


MARKER = "committed-"
"""How the name of the marker of the newest manifest begins."""

_NAME = re.compile(r"manifest-([0-9]{8,18})\.json")
_MARKER = re.compile(MARKER + r"([0-9]{8,18})")


def newest(folder: Path) -> int:
    """The number of the newest manifest.

    Raises:
        StoreError: If there is none, or the newest that was committed is gone.
    """
    with store_errors(folder):
        numbers = [number for number, _ in _numbered(folder, _NAME)]
        marked = max((number for number, _ in _numbered(folder, _MARKER)), default=0)
        number = max(numbers, default=0)
        if number < marked:
            # A commit may have come between the two looks.
            number = max((found for found, _ in _numbered(folder, _NAME)), default=0)
        if number < marked:
            way = "whence.repair goes back to an older one" if number else "and no other is there"
            lost = Manifest.path(folder, marked)
            raise StoreError(f"{lost} is gone, the newest manifest of the store; {way}")
        if not numbers:
            got = "one" if (folder / "lock").exists() else "a folder"
            why = "nothing was ever confirmed in it"
            if any(folder.glob(f"{SHARD}*")):
                why += ", or its manifests were lost: there are rows that none names"
            raise StoreError(
                f"{folder} must be a whence store with rows, got {got} with no manifest: {why}"
            )
    return number


def manifests(folder: Path) -> list[Path]:
    """All manifests that lie in a folder, the newest last.

    Raises:
        StoreError: If the folder cannot be read.
    """
    with store_errors(folder):
        return [path for _, path in sorted(_numbered(folder, _NAME))]


def number_of(path: Path) -> int:
    """The number of a manifest, by its name."""
    return int(path.stem.removeprefix("manifest-"))


def gone_in(path: Path) -> set[str]:
    """The name of the file of rows that a manifest says are gone, without a look at all it says.

    Raises:
        StoreError: If the manifest is damaged.
    """
    body = read_json(path)
    gone = body.get("gone") if isinstance(body, dict) else None
    return {gone["name"]} if isinstance(gone, dict) and isinstance(gone.get("name"), str) else set()


def last_committed(folder: Path) -> int:
    """The highest number that a manifest has or had; 0 for none.

    Raises:
        StoreError: If the folder cannot be read.
    """
    with store_errors(folder):
        found = [*_numbered(folder, _NAME), *_numbered(folder, _MARKER)]
    return max((number for number, _ in found), default=0)


def _numbered(folder: Path, name: re.Pattern[str]) -> Sequence[tuple[int, Path]]:
    found = ((name.fullmatch(path.name), path) for path in folder.iterdir())
    return [(int(match[1]), path) for match, path in found if match]
