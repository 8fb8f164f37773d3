"""Stores of several writers: one folder for each, read as one store.

Each process of a job records with `writer="3/8"` into `writer-3-of-8`, a store of its own with its
own lock, shards and manifest. Nothing is shared between them, so nothing has to be agreed upon
while they run; what does not go together is refused when they are opened as one.
"""

from __future__ import annotations

import re
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from whence._plain import line
from whence.errors import (
    ArgumentError,
    DtypeError,
    MismatchError,
    MissingWritersWarning,
    StoreError,
)
from whence.store.files import check_folder, store_errors
from whence.store.manifest import COMBINED, Checkpoint, Manifest
from whence.store.maps import StoredMap, read_map

PREFIX = "writer-"
"""How the names of the folders of writers begin."""

MAP_ROUNDING = 1e-4
"""How far maps of writers may differ, as a share of their norm: other processors sum in other
orders."""

_FOLDER = re.compile(PREFIX + r"([1-9][0-9]{0,3})-of-([1-9][0-9]{0,3})")
_ASKED = re.compile(r"([0-9]{1,4})/([0-9]{1,4})")


def member_of(writer: str) -> str:
    """The name of the folder of the writer "3/8": the third of eight.

    Raises:
        DtypeError: If it is no str.
        ArgumentError: If it is not of this form, or the number is not from 1 to the total.
    """
    if not isinstance(writer, str):
        raise DtypeError(f"writer must be a str such as '3/8', got {writer!r:.80}")
    match = _ASKED.fullmatch(writer) or _FOLDER.fullmatch(writer)
    if match is None or not 1 <= int(match[1]) <= int(match[2]):
        raise ArgumentError(f"writer must be 'number/total' from '1/total' on, got {writer!r:.80}")
    return f"{PREFIX}{int(match[1])}-of-{int(match[2])}"


def writer_of(member: str) -> str:
    """The writer, as in "3/8", of the folder of this name."""
    return member.removeprefix(PREFIX).replace("-of-", "/")


def members(path: Path) -> dict[str, int]:
    """The folders of writers in a store: name -> number; none for a store of one writer.

    Raises:
        StoreError: If they are of jobs of different sizes, or beside a store of one writer, or one
            is named as none can be: it may hold rows.
    """
    with store_errors(path):
        names = sorted(each.name for each in path.iterdir() if each.name.startswith(PREFIX))
    found = {}
    for name in names:
        match = _FOLDER.fullmatch(name)
        if match is None or int(match[1]) > int(match[2]):
            raise StoreError(f"{path / name} must be named {PREFIX}N-of-M, with N up to M")
        found[name] = match
    totals = {match[2] for match in found.values()}
    if len(totals) > 1:
        of = " and of ".join(sorted(totals, key=int))
        raise StoreError(f"{path} must be of writers of one job, got writers of {of}")
    if found and Manifest.exists(path):
        raise StoreError(f"{path} must be of one writer or of several, got a manifest beside them")
    numbers = {name: int(match[1]) for name, match in found.items()}
    return dict(sorted(numbers.items(), key=lambda each: each[1]))


def missing(path: Path) -> list[str]:
    """The writers, as in "3/8", that have confirmed nothing yet; none for a store of one writer."""
    found = members(path)
    if not found:
        return []
    total = int(next(iter(found)).rsplit("-", 1)[1])
    there = {number for name, number in found.items() if Manifest.exists(path / name)}
    return [f"{number}/{total}" for number in range(1, total + 1) if number not in there]


def warn_of_missing(path: Path, stacklevel: int) -> list[str]:
    """The `missing` writers, of which the caller is warned.

    Args:
        path: The store's folder.
        stacklevel: How many calls above this one the warning is for.

    Warns:
        MissingWritersWarning: If there are any.
    """
    found = missing(path)
    if found:
        warnings.warn(
            line(
                f"{path} is without the rows of writers {', '.join(found)}, of which nothing is "
                "there: they have confirmed nothing yet, or it was lost"
            ),
            MissingWritersWarning,
            stacklevel=stacklevel + 1,
        )
    return found


def check_there(path: Path) -> None:
    """Nothing, if a path is a folder.

    Raises:
        StoreError: If it is not.
    """
    with store_errors(path):
        if not path.is_dir():
            got = f"the file {path}" if path.exists() else f"{path}, which does not exist"
            raise StoreError(f"path must be the folder of a store, got {got}")


def check_writer(folder: Path, manifest: Manifest) -> None:
    """Nothing, if a manifest is of the writer whose folder it lies in.

    Raises:
        StoreError: If it is of another.
    """
    if manifest.writer != writer_of(folder.name):
        raise StoreError(
            f"{folder} must be of writer {writer_of(folder.name)}, got the folder of "
            f"{manifest.writer}"
        )


def parts(path: Path) -> list[tuple[str, Manifest]]:
    """The stores that make up the one at `path`, by the names of their folders; "" for itself.

    Raises:
        StoreError: If there is none, or one is damaged.
    """
    check_there(path)
    found = []
    for name in members(path):
        check_folder(path / name)
        if Manifest.exists(path / name):
            manifest, _ = Manifest.load(path / name)
            check_writer(path / name, manifest)
            found.append((name, manifest))
    return found or [("", Manifest.load(path)[0])]


def combined(path: Path, found: list[tuple[str, Manifest]], among: str) -> Manifest:
    """What several stores say about themselves as one.

    Args:
        path: The folder that they lie in.
        found: The name of the folder and the manifest of each. Shards and maps of the whole are
            named with them, unless it is one in no folder of its own.
        among: What they are, for an error.

    Raises:
        MismatchError: If they did not record the same: names the folder and the difference.
        StoreError: If maps that are to be compared are damaged.
    """
    first_name, first = found[0]
    if not first_name:
        return first
    whole = replace(
        first,
        checkpoints=[],
        shards=[],
        skipped=[],
        packs=[],
        gone=None,
        ids=None,
        columns=None,
        writer=None,
    )
    for name, manifest in found:
        for what in ("sketch", "dtype", "reduction", "rows"):
            _same(among, what, first_name, getattr(first, what), name, getattr(manifest, what))
        _same(among, "model", first_name, first.model["digest"], name, manifest.model["digest"])
        for what in ("ids", "columns"):
            there, here = getattr(whole, what), getattr(manifest, what)
            if there is None:
                setattr(whole, what, here)
            elif here is not None:
                _same(among, what, first_name, there, name, here)
        if manifest.rows == COMBINED and whole.checkpoints and manifest.checkpoints:
            there, here = ([each.name for each in it.checkpoints] for it in (whole, manifest))
            _same(among, "checkpoints", first_name, there, name, here)
        places = [_place(path, among, whole, name, each) for each in manifest.checkpoints]
        if manifest.rows == COMBINED:
            places = [0]
        whole.shards += [
            replace(shard, checkpoint=places[shard.checkpoint], member=name)
            for shard in manifest.shards
        ]
        whole.skipped += [(places[at], id_) for at, id_ in manifest.skipped]
    return whole


def _place(path: Path, among: str, whole: Manifest, name: str, found: Checkpoint) -> int:
    """The number of a writer's checkpoint among those of all, to which it is added if it is new."""
    if found.map is not None:
        found = replace(found, map=replace(found.map, name=f"{name}/{found.map.name}"))
    for index, there in enumerate(whole.checkpoints):
        if there.name != found.name:
            continue
        for what in ("learning_rate", "weight"):
            _same(among, what, there.name, getattr(there, what), name, getattr(found, what))
        if there.first is None or found.first is None:
            whole.checkpoints[index] = there if found.first is None else found
            return index
        if there.map is not None and found.map is not None:
            _same(among, "map", there.name, there.map.identity, name, found.map.identity)
            _check_maps(path, among, there, there.map, found.map)
        moving = "moving" in (there.weights, found.weights)
        if not moving:
            _same(among, "weights", there.name, there.first, name, found.first)
        whole.checkpoints[index] = replace(there, weights="moving" if moving else "fixed")
        return index
    whole.checkpoints.append(found)
    return len(whole.checkpoints) - 1


def _check_maps(
    path: Path, among: str, checkpoint: Checkpoint, one: StoredMap, other: StoredMap
) -> None:
    """Nothing, if two maps make the same rows, but for rounding.

    Factors that two processes have fitted each for itself need not: their rows would lie in
    different bases, and their products would mean nothing.

    Raises:
        MismatchError: If they do not.
        StoreError: If one is damaged.
    """
    if one.files == other.files:
        return
    (said, mine), (says, theirs) = (read_map(path, each) for each in (one, other))
    if said == says and mine.keys() == theirs.keys():
        pairs = [(mine[name], theirs[name]) for name in mine]
        if all(a.shape == b.shape and a.dtype == b.dtype and _close(a, b) for a, b in pairs):
            return
    raise MismatchError(
        f"map must be the same for all {among}, got others in {one.name} and "
        f"{other.name} of checkpoint {checkpoint.name!r}; fit factors once, save them, and load "
        "them in each process"
    )


def _close(one: NDArray[Any], other: NDArray[Any]) -> bool:
    if one.dtype.kind != "f":
        return np.array_equal(one, other)
    difference = np.linalg.norm(one.astype(np.float64) - other)
    return bool(difference <= MAP_ROUNDING * np.linalg.norm(one.astype(np.float64)))


def _same(among: str, what: str, first: str, there: Any, name: str, here: Any) -> None:
    if there != here:
        if isinstance(there, dict) and isinstance(here, dict):  # the rest would only hide it
            there, here = _without(there, here), _without(here, there)
        raise MismatchError(
            f"{what} must be the same for all {among}, got {there!r:.80} in {first} and "
            f"{here!r:.80} in {name}"
        )


def _without(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """The entries of one that are not in the other."""
    return {key: each for key, each in one.items() if key not in other or other[key] != each}
