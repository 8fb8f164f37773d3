"""Stores of rows of others: several merged into one, or one split by filters."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from whence import _arrays
from whence.errors import ArgumentError, DtypeError
from whence.store.files import Written, check_folder, read_parts
from whence.store.manifest import Manifest
from whence.store.maps import StoredMap
from whence.store.members import combined, parts, warn_of_missing
from whence.store.new import NewStore
from whence.store.pieces import Piece, pieces_in, pieces_of, without_doubles
from whence.store.progress import bar
from whence.store.reader import Reader


def merge(
    paths: Sequence[str | os.PathLike[str]],
    out: str | os.PathLike[str],
    *,
    on_duplicate: str = "error",
    progress: bool | None = None,
) -> Path:
    """Makes one new store of several, which stay as they are.

    Examples are in the order of `paths`, and of each store. Checkpoints go together by their
    names. Stored values are copied as they are, their checksums compared on the way; what was
    deleted is left behind. The new store appears when it is whole: killed before that, `merge`
    leaves a folder that is no store, and that it takes up again.

    Args:
        paths: The folders of the stores; those of several writers too. They must agree in sketch,
            dtype, reduction, model and the types of ids and columns; of checkpoints of one name
            learning rate, weights and map must be the same.
        out: The folder of the new store.
        on_duplicate: What to do with an id that two stores have at one checkpoint: "error", or
            "first" to take the row of the first of them.
        progress: Whether to show a bar; None means if standard error is a terminal.

    Returns:
        `out`, as an absolute path. O(bytes) time; memory for all ids, and for some MiB of rows and
        what stands beside them.

    Raises:
        ArgumentError: If a path is given twice, or `on_duplicate` is another word.
        DtypeError: If `paths` is no list of paths, or empty.
        IdError: If an id is in two stores at one checkpoint.
        LockedError: If another process writes to `out`.
        MismatchError: If the stores do not agree; says in what.
        StoreError: If a store is missing or damaged, or `out` is not new or cannot be written.

    Warns:
        MissingWritersWarning: If some writers of a store have confirmed nothing yet.

    Examples:
        >>> whence.merge(["runs/monday", "runs/tuesday"], "runs/both")  # doctest: +SKIP
    """
    _arrays.choice("on_duplicate", on_duplicate, ("error", "first"))
    if not _arrays.is_list(paths) or not len(paths):
        raise DtypeError(f"paths must be a non-empty list of paths, got {_arrays.describe(paths)}")
    sources = [_arrays.path(f"paths[{index}]", path) for index, path in enumerate(paths)]
    target = _arrays.path("out", out)
    found: dict[str, Manifest] = {}
    for source in sources:
        for name, manifest in parts(source):
            folder = str((source / name).resolve())
            if folder in found:
                raise ArgumentError(f"paths must be distinct, got {folder} twice")
            found[folder] = manifest
        warn_of_missing(source, stacklevel=2)
    whole = combined(Path(), list(found.items()), "stores that are merged")
    gone = {
        folder: manifest.gone.read(Path(folder))
        for folder, manifest in found.items()
        if manifest.gone is not None
    }
    pieces = pieces_of(Path(), found, whole, gone)
    pieces = without_doubles(pieces, whole.row_sets, first=on_duplicate == "first")
    whole = replace(whole, skipped=_still_skipped(pieces, whole))
    with (
        bar("merging", sum(piece.bytes for piece in pieces), progress) as shown,
        NewStore("out", target, whole) as new,
    ):
        new.take_maps(partial(_map_parts, Path()))  # which are named by their whole paths here
        for piece in pieces:
            _copy(piece, new, shown)
        new.commit()
    return target


def split(
    path: str | os.PathLike[str],
    into: Mapping[Any, Any],
    *,
    progress: bool | None = None,
) -> list[Path]:
    """Makes new stores of the examples of one that pass filters; it stays as it is.

    An example has in a new store the rows of all its checkpoints. Filters may overlap, and may
    leave out examples. Values are copied as `merge` copies them. All new stores are written before
    the first appears.

    Args:
        path: The store's folder.
        into: The folder of each new store -> which examples it has: ids, a dict of columns, or
            [examples] bool, as `where` in `Store.search`.
        progress: Whether to show a bar; None means if standard error is a terminal.

    Returns:
        The folders, as absolute paths. O(bytes) time for each; memory as `merge`.

    Raises:
        ArgumentError: If a filter names a column that is not there, or lets no example pass, or a
            folder is given twice.
        DtypeError: If `into` is no dict, or empty, or a filter is something else.
        IdError: If an id is not in the store.
        LockedError: If another process writes to a new store.
        StoreError: If the store is missing or damaged, or a folder is not new or cannot be
            written.

    Warns:
        MissingWritersWarning: If some writers of the store have confirmed nothing yet.

    Examples:
        >>> whence.split("runs/all", {"runs/cats": {"label": 3}})  # doctest: +SKIP
    """
    if not isinstance(into, Mapping) or not into:
        raise DtypeError(
            f"into must be a non-empty dict of folder to filter, got {_arrays.describe(into)}"
        )
    reader = Reader(path)
    whole = reader.manifest
    pieces = pieces_in(reader)
    plans = []
    folders: set[Path] = set()
    for out, where in into.items():
        folder = _arrays.path("into", out)
        if folder.resolve() in folders:
            raise ArgumentError(f"into must name distinct folders, got {folder} twice")
        folders.add(folder.resolve())
        passes = reader.eligible(where, f"into[{str(out)!r}]")
        if not passes.any():
            raise ArgumentError(f"into[{str(out)!r}] must let an example pass, got none that does")
        left = {id_ for id_ in reader.ids[passes].tolist()} if whole.skipped else set()
        skipped = [(at, id_) for at, id_ in whole.skipped if id_ in left]
        plans.append((folder, passes, replace(whole, skipped=skipped)))
    total = len(plans) * sum(piece.bytes for piece in pieces)
    with bar("splitting", total, progress) as shown, ExitStack() as stack:
        made = []
        for out, passes, manifest in plans:
            new = stack.enter_context(NewStore(f"into[{str(out)!r}]", out, manifest))
            new.take_maps(partial(_map_parts, reader.path))
            for piece in pieces:
                chosen = passes[reader.positions("ids", piece.ids())]
                _copy(piece.only(chosen), new, shown)
            new.finish()
            made.append(new)
        try:
            for new in made:
                new.commit()
        except BaseException:  # all of them, or none; the last may be there, too
            for new in made:
                new.withdraw()
            raise
    return [new.path for new in made]


def _map_parts(path: Path, stored: StoredMap, name: str, written: Written) -> Iterator[bytes]:
    """A file of a map of the store at `path`."""
    check_folder(path / stored.name)
    return read_parts(path / stored.name / name, written)


def _copy(piece: Piece, new: NewStore, shown: Any) -> None:
    for batch in piece.batches(list(new.manifest.columns or {})):
        new.append(batch, piece.described.error)
    shown.update(piece.bytes)


def _still_skipped(pieces: list[Piece], whole: Manifest) -> list[tuple[int, int | str]]:
    """Examples that one store has left out and none has a row of, each once."""
    noted = list(dict.fromkeys(whole.skipped))
    if not noted:
        return []
    recorded: set[tuple[int, int | str]] = set()
    asked = set(noted)
    for piece in pieces:
        recorded |= {
            key for id_ in piece.ids().tolist() if (key := (piece.checkpoint, id_)) in asked
        }
    return [key for key in noted if key not in recorded]
