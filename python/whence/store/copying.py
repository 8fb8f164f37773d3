"""Stores of rows of others: several merged into one, or one split by filters."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from whence import _arrays
from whence._arrays import Ids
from whence.errors import ArgumentError, DtypeError, IdError, StoreError
from whence.store.gone import kept_rows
from whence.store.manifest import Manifest
from whence.store.members import combined, parts, warn_of_missing
from whence.store.new import NewStore
from whence.store.progress import bar
from whence.store.reader import Reader, read_columns, read_ids, read_scales, stored_rows
from whence.store.shards import Description, Shard


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
        DtypeError: If `paths` is no list of paths.
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
        raise DtypeError(f"paths must be a list of paths, got {_arrays.describe(paths)}")
    sources = [_arrays.path(f"paths[{index}]", path) for index, path in enumerate(paths)]
    target = _arrays.path("out", out)
    seen = [source.resolve() for source in sources]
    for index, path in enumerate(seen):
        if path in seen[:index]:
            raise ArgumentError(f"paths must be distinct, got {sources[index]} twice")
    found = []
    for source in sources:
        found += [(str(source / name), manifest) for name, manifest in parts(source)]
        warn_of_missing(source, stacklevel=2)
    whole = combined(Path(), found, "stores that are merged")
    pieces = _without_doubles(list(_pieces(found, whole)), whole, first=on_duplicate == "first")
    whole = replace(whole, skipped=_still_skipped(pieces, whole))
    with (
        bar("merging", sum(piece.bytes for piece in pieces), progress) as shown,
        NewStore("out", target, whole) as new,
    ):
        new.copy_maps(Path())  # which are named by their whole paths here
        for piece in pieces:
            piece.copy(new, shown)
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
        ArgumentError: If a filter names a column that is not there, or lets no example pass.
        DtypeError: If `into` is no dict, or a filter is something else.
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
            f"into must be a dict of a folder to a filter, got {_arrays.describe(into)}"
        )
    reader = Reader(path)
    whole = reader.manifest
    found = [(str(reader.path / name), manifest) for name, manifest in reader.parts.items()]
    pieces = list(_pieces(found, whole))
    plans = []
    for out, where in into.items():
        passes = reader.eligible(where)
        if not passes.any():
            raise ArgumentError(f"into[{str(out)!r}] must let an example pass, got none that does")
        left = {id_ for id_ in reader.ids[passes].tolist()} if whole.skipped else set()
        skipped = [(at, id_) for at, id_ in whole.skipped if id_ in left]
        plans.append((_arrays.path("into", out), passes, replace(whole, skipped=skipped)))
    total = len(plans) * sum(piece.bytes for piece in pieces)
    with bar("splitting", total, progress) as shown, ExitStack() as stack:
        made = []
        for out, passes, manifest in plans:
            new = stack.enter_context(NewStore(f"into[{str(out)!r}]", out, manifest))
            new.copy_maps(reader.path)
            for piece in pieces:
                chosen = passes[reader.positions("ids", piece.ids())]
                piece.only(chosen).copy(new, shown)
            new.finish()
            made.append(new)
        for new in made:
            new.commit()
    return [new.path for new in made]


@dataclass(frozen=True)
class _Piece:
    """Rows of a shard that are to be copied.

    Attributes:
        folder: Of the store, or of the writer, that the shard is of.
        manifest: Of that.
        shard: As that manifest names it.
        checkpoint: The number of its checkpoint in the new store.
        kept: [rows] which of its rows; None for all.
    """

    folder: Path
    manifest: Manifest
    shard: Shard
    checkpoint: int
    kept: NDArray[np.bool_] | None

    @property
    def bytes(self) -> int:
        """Of the shard's rows."""
        return self.shard.rows * self.manifest.row_bytes

    def ids(self) -> Ids:
        """[kept] the ids of its rows.

        Raises:
            StoreError: If they are damaged.
        """
        described = Description.read(self.folder, self.shard)
        ids = read_ids(self.shard.folder(self.folder), described, self.manifest)
        return ids if self.kept is None else ids[self.kept]

    def only(self, chosen: NDArray[np.bool_]) -> _Piece:
        """Some of its rows.

        Args:
            chosen: [kept] whether each of them.
        """
        if chosen.all():
            return self
        kept = np.ones(self.shard.rows, np.bool_) if self.kept is None else self.kept.copy()
        kept[kept] = chosen
        return replace(self, kept=kept)

    def copy(self, new: NewStore, shown: Any) -> None:
        """Appends its rows to a new store.

        Raises:
            StoreError: If they are damaged, or the system refuses.
        """
        if self.kept is None or self.kept.any():
            described = Description.read(self.folder, self.shard)
            folder = self.shard.folder(self.folder)
            columns = dict(
                zip(
                    self.manifest.columns or {},
                    read_columns(folder, described, self.manifest),
                    strict=True,
                )
            )
            beside = [
                read_scales(folder, described),
                read_ids(folder, described, self.manifest),
                *(columns[name] for name in new.manifest.columns or {}),
            ]
            for first, stored in stored_rows(folder, described, self.manifest):
                here = slice(first, first + len(stored))
                scales, ids, *others = (array[here] for array in beside)
                if self.kept is not None:
                    keep = self.kept[here]
                    stored, scales, ids = stored[keep], scales[keep], ids[keep]
                    others = [column[keep] for column in others]
                new.append(self.checkpoint, stored, scales, ids, others, described.error)
        shown.update(self.bytes)


def _pieces(found: list[tuple[str, Manifest]], whole: Manifest) -> Iterator[_Piece]:
    """The rows of stores that are not gone, in order.

    Args:
        found: The folder and the manifest of each.
        whole: What they say about themselves as one.

    Raises:
        StoreError: If what says which rows are gone is damaged.
    """
    checkpoints = iter([shard.checkpoint for shard in whole.shards])
    for name, manifest in found:
        folder = Path(name)
        gone = np.empty((0, 2), np.int64)
        if manifest.gone is not None:
            gone = manifest.gone.read(folder)
        for shard in manifest.shards:
            kept = kept_rows(gone, shard.number, shard.rows)
            yield _Piece(folder, manifest, shard, next(checkpoints), kept)


def _without_doubles(pieces: list[_Piece], whole: Manifest, *, first: bool) -> list[_Piece]:
    """The pieces, without rows of an id that an earlier store has at the same checkpoint.

    Args:
        pieces: Of all stores.
        whole: What they say about themselves as one.
        first: Whether there may be any.

    Raises:
        IdError: If there are, and must not be; says where.
        StoreError: If a store has an id twice at a checkpoint.
    """
    found = list(pieces)
    numbers = {folder: number for number, folder in enumerate({each.folder for each in pieces})}
    folders = np.array([numbers[each.folder] for each in pieces])
    for checkpoint, name in enumerate(whole.row_sets):
        places = [at for at, piece in enumerate(pieces) if piece.checkpoint == checkpoint]
        if not places:
            continue
        held = [pieces[at].ids() for at in places]
        ids = np.concatenate(held)
        owners = np.repeat(places, [len(each) for each in held])
        order = np.argsort(ids, kind="stable")
        same = np.flatnonzero(ids[order][1:] == ids[order][:-1])
        if not len(same):
            continue
        before, after = (folders[owners[order[at]]] for at in (same, same + 1))
        if (before == after).any():
            folder = pieces[owners[order[same[before == after][0]]]].folder
            raise StoreError(f"{folder} is damaged: ids must be distinct in a checkpoint")
        if not first:
            one, two = (pieces[owners[order[at]]].folder for at in (same[0], same[0] + 1))
            raise IdError(
                f"ids must be of one store each at checkpoint {name!r}, got "
                f"{ids[order[same[0]]].item()!r} of {one} and of {two}; with on_duplicate='first' "
                "the first row is taken"
            )
        keep = np.ones(len(ids), np.bool_)
        keep[order[same + 1]] = False
        ends = np.cumsum([len(each) for each in held])[:-1]
        for at, chosen in zip(places, np.split(keep, ends), strict=True):
            found[at] = pieces[at].only(chosen)
    return found


def _still_skipped(pieces: list[_Piece], whole: Manifest) -> list[tuple[int, int | str]]:
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
