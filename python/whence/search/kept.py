"""An index as files.

A folder of `.npy` files and a manifest with the length and checksum of each:

    manifest.json            format, version, basis, seed, what rows it is of; its own checksum
    order.npy reaches.npy directions.npy
    segment-0-upper.npy ...  planes of codes, their scales, and the bounds of 16 bits beside them
    graph-links.npy ...      of an index with a graph

It is written under another name and then renamed: a folder of this name is whole.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np

from whence import _core
from whence.errors import ArgumentError, MismatchError, StoreError, WhenceError
from whence.search.basis import Basis
from whence.search.source import Source
from whence.store.files import (
    Written,
    checksum_of,
    parse_json,
    read_array,
    store_errors,
    sync_directory,
    write_array,
    write_json,
)

FORMAT = "whence index"
VERSION = 0
MANIFEST = "manifest.json"

PLANES = ("upper", "lower")
GRAPH = ("graph-norms", "graph-links", "graph-entries", "graph-deleted")
NUMBERS = ("upper-errors", "errors", "tails")


def save(
    path: Path,
    source: Source,
    codes: _core.Codes,
    graph: _core.Graph | None,
    basis: Basis,
    seed: int,
    built: str,
) -> Path:
    """Writes codes, and a graph over them, into a new folder.

    Raises:
        ArgumentError: If something is at the path.
        StoreError: If it cannot be written.
    """
    if path.exists():
        raise ArgumentError(f"path must be a new folder, got {path}, which exists")
    part = path.with_name(path.name + ".part")
    order, segments, reaches = codes.parts()
    arrays: dict[str, Any] = {
        "order": order,
        "reaches": reaches,
        "directions": basis.directions,
    }
    for index, (_, planes, scales, numbers) in enumerate(segments):
        arrays[f"segment-{index}-scales"] = scales
        for names, parts in ((PLANES, planes), (NUMBERS, numbers)):
            for name, array in zip(names, parts, strict=True):
                arrays[f"segment-{index}-{name}"] = array
    if graph is not None:
        arrays |= zip(GRAPH, graph.parts(), strict=True)
    with store_errors(path):
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        files = {
            name: (*write_array(part / f"{name}.npy", array), array.dtype.str, array.shape)
            for name, array in arrays.items()
        }
        weights, _ = source.weights()
        body = {
            "format": FORMAT,
            "version": VERSION,
            "rows": _rows(source),
            "weights": weights.tolist(),
            "seed": seed,
            "built": built,
            "prefix": basis.prefix,
            "share": basis.share,
            "why": basis.why,
            "widths": [width for width, *_ in segments],
            "files": files,
        }
        write_json(part / MANIFEST, body)
        part.rename(path)
        sync_directory(path.parent)
    return path


def load(path: Path, source: Source) -> tuple[_core.Codes, _core.Graph | None, Basis, int, str]:
    """Codes, graph if there is one, basis, seed and description of the index in a folder.

    Raises:
        StoreError: If there is none, or it is damaged.
        MismatchError: If it is of other rows.
    """
    manifest = path / MANIFEST
    with store_errors(manifest):
        content = manifest.read_bytes()
    body = parse_json(manifest, content)
    try:
        if body["format"] != FORMAT or body["version"] != VERSION:
            raise ValueError(f"format must be {FORMAT} {VERSION}")
        if body["rows"] != _rows(source):
            raise MismatchError(f"rows must be those that {path} was built of, got {source!r}")
        files = {
            name: read_array(path / f"{name}.npy", Written(length, checksum), kind, tuple(shape))
            for name, (length, checksum, kind, shape) in body["files"].items()
        }
        segments: list[Any] = [
            (
                width,
                [files[f"segment-{index}-{name}"] for name in PLANES],
                files[f"segment-{index}-scales"],
                [files[f"segment-{index}-{name}"] for name in NUMBERS],
            )
            for index, width in enumerate(body["widths"])
        ]
        weights = [float(weight) for weight in body["weights"]]
        length = len(weights) * source.dim
        codes = _core.Codes.from_parts(
            length,
            body["prefix"],
            files["directions"],
            body["seed"],
            weights,
            files["order"],
            segments,
            files["reaches"],
        )
        if len(files["order"]) != len(source.ids):
            raise ValueError(f"order must be of {len(source.ids)} examples")
        basis = Basis(body["prefix"], files["directions"], float(body["share"]), str(body["why"]))
        graph = None
        if GRAPH[0] in files:
            graph = _core.Graph.from_parts(codes, *(files[name] for name in GRAPH))
            codes = graph.codes
        return codes, graph, basis, int(body["seed"]), str(body["built"])
    except (MismatchError, StoreError):
        raise
    except (WhenceError, ValueError, KeyError, TypeError, OverflowError) as error:
        raise StoreError(f"{manifest} is damaged: {type(error).__name__}: {error}") from None


def _rows(source: Source) -> dict[str, Any]:
    """What tells rows from others: how many, how long, and checksums of their norms and ids."""
    weights, _ = source.weights()
    bounds = source.bounds(weights)
    ids = source.ids if source.ids.dtype.kind == "i" else "\0".join(source.ids.tolist())
    content = np.ascontiguousarray(ids).data if not isinstance(ids, str) else ids.encode()
    return {
        "examples": len(source.ids),
        "dim": source.dim,
        "checkpoints": source.checkpoints,
        "weights": checksum_of(weights.data),
        "norms": 0 if bounds is None else checksum_of(np.ascontiguousarray(bounds).data),
        "ids": checksum_of(content),
    }
