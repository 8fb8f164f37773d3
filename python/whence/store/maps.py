"""Maps of rows that are too large for a manifest: eigenvectors and bases, in folders of a store."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from whence.errors import StoreError
from whence.store.files import (
    WRONG,
    NewFile,
    Written,
    array_name,
    check_folder,
    json_bytes,
    read_array,
    read_json,
    store_errors,
    sync_directory,
    write,
    write_array,
)

PREFIX = "map-"
"""How the names of their folders begin."""

_KINDS = {"<f4", "<i8"}
"""What `.npy` calls the types of their arrays."""


@dataclass
class StoredMap:
    """A map in a folder of the store.

    Attributes:
        name: Of the folder.
        identity: What the map was made of and how, by which a recording that goes on knows it.
        files: Name -> length and checksum.
    """

    name: str
    identity: dict[str, Any]
    files: dict[str, Written]


def write_map(
    path: Path,
    number: int,
    identity: dict[str, Any],
    described: Any,
    arrays: Mapping[str, NDArray[Any]],
) -> StoredMap:
    """Writes a map to a new folder of the store at `path`.

    Args:
        path: The store's folder.
        number: Of the map; none of the store has it.
        identity: See `StoredMap`.
        described: What JSON holds of it.
        arrays: Name -> float32 or int64 values.

    Raises:
        StoreError: If the system refuses.
    """
    folder = path / f"{PREFIX}{number:08}"
    with store_errors(folder):
        folder.mkdir()
        files = {
            f"{name}.npy": write_array(folder / f"{name}.npy", array)
            for name, array in arrays.items()
        }
        shapes = {name: [array.dtype.str, list(array.shape)] for name, array in arrays.items()}
        text = json_bytes({"map": described, "arrays": shapes})
        files["map.json"] = write(folder / "map.json", text)
        sync_directory(folder)
        sync_directory(path)
    return StoredMap(folder.name, identity, files)


def read_map(path: Path, stored: StoredMap) -> tuple[Any, dict[str, NDArray[Any]]]:
    """What `write_map` was given: description and arrays.

    Raises:
        StoreError: If a file is damaged.
    """
    folder = path / stored.name
    check_folder(folder)
    try:
        body = read_json(folder / "map.json", stored.files["map.json"])
        arrays = {}
        for name, (kind, shape) in body["arrays"].items():
            if kind not in _KINDS:
                raise ValueError(f"{name} must be an array of a known type, got {kind!r:.80}")
            file = f"{name}.npy"
            arrays[name] = read_array(folder / file, stored.files[file], kind, tuple(shape))
        for name, array in arrays.items():
            if array.dtype.kind == "f" and not np.isfinite(array).all():
                raise ValueError(f"{name} must be finite")
        return body["map"], arrays
    except WRONG as error:
        raise StoreError(f"{folder} is damaged: {type(error).__name__}: {error}") from None


def put_map(
    path: Path,
    number: int,
    stored: StoredMap,
    parts: Callable[[str, Written], Iterable[bytes]],
) -> StoredMap:
    """Writes the files of a map of elsewhere to a new folder of the store at `path`.

    Args:
        path: The store's folder.
        number: Of the map; none of the store has it.
        stored: The map, as it is known elsewhere.
        parts: The name of a file, and what is known of it -> its bytes.

    Raises:
        StoreError: If a file is another, or the system refuses.
    """
    folder = path / f"{PREFIX}{number:08}"
    with store_errors(folder):
        folder.mkdir()
        for name, written in stored.files.items():
            file = NewFile(folder / name)
            try:
                for part in parts(name, written):
                    file.write(part)
                if file.seal() != written:
                    raise StoreError(f"{stored.name}/{name} is damaged: it is not as was said")
                file.sync()
            finally:
                file.close()
        sync_directory(folder)
        sync_directory(path)
    return replace(stored, name=folder.name)


def checked_map(body: Any) -> StoredMap:
    """A map as a manifest names it.

    Raises:
        ValueError: If it is none.
    """
    name = body["name"]
    if not isinstance(name, str) or not re.fullmatch(PREFIX + r"[0-9]{8}", name):
        raise ValueError(f"a map's name must be {PREFIX}N, got {name!r}")
    files = {each: Written.of(written) for each, written in body["files"].items()}
    for each in files:
        if each != "map.json":
            array_name(each)
    return StoredMap(name, dict(body["identity"]), files)
