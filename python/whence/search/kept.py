"""An index as files.

A folder of `.npy` files and a manifest with the length and checksum of each:

    manifest.json            format, version, basis, seed, what rows it is of; its own checksum
    order.npy reaches.npy directions.npy
    segment-0-upper.npy ...  planes of codes, their scales, and the bounds of 16 bits beside them
    graph-links.npy ...      of an index with a graph
    gone.npy                 which examples were deleted, if any

It is written under a name that nothing has, and then renamed: a folder of its own name is whole.
"""

from __future__ import annotations

import secrets
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from whence import _core
from whence.errors import ArgumentError, MismatchError, StoreError, WhenceError
from whence.search.basis import Basis
from whence.search.source import Source
from whence.store.files import (
    WRONG,
    Written,
    array_name,
    checksum_of,
    read_array,
    read_json,
    store_errors,
    sync_directory,
    write_array,
    write_json,
)

FORMAT = "whence index"
VERSION = 1
MANIFEST = "manifest.json"

GONE = "gone"

PLANES = ("upper", "lower")
GRAPH = ("graph-norms", "graph-links", "graph-entries")
NUMBERS = ("upper-errors", "errors", "tails")


@dataclass(frozen=True, eq=False)
class Built:
    """What an index is made of beside its rows.

    Attributes:
        codes: Of its examples.
        graph: Over them, if there is one.
        basis: What codes begin with.
        bits: 4 or 8, of a code.
        seed: Of the rotation of codes.
    """

    codes: _core.Codes
    graph: _core.Graph | None
    basis: Basis
    bits: int
    seed: int

    def __str__(self) -> str:
        codes = f"codes of {'4' if self.bits == 4 else '4 + 4'} bits, {self.basis.why}"
        return codes if self.graph is None else f"a graph of 32 links an example, {codes}"


def save(path: Path, source: Source, built: Built, gone: NDArray[np.bool_] | None) -> Path:
    """Writes codes, a graph over them, and which examples are gone, into a new folder.

    Raises:
        ArgumentError: If something is at the path.
        StoreError: If it cannot be written.
    """
    if path.exists():
        raise ArgumentError(f"path must be a new folder, got {path}, which exists")
    order, segments, reaches = built.codes.parts()
    arrays: dict[str, Any] = {
        "order": order,
        "reaches": reaches,
        "directions": built.basis.directions,
    }
    for index, (_, planes, scales, numbers) in enumerate(segments):
        arrays[f"segment-{index}-scales"] = scales
        for names, parts in ((PLANES, planes), (NUMBERS, numbers)):
            for name, array in zip(names, parts, strict=True):
                arrays[f"segment-{index}-{name}"] = array
    if built.graph is not None:
        arrays |= zip(GRAPH, built.graph.parts(), strict=True)
    if gone is not None:
        arrays[GONE] = gone
    weights, _ = source.weights()
    body = {
        "format": FORMAT,
        "version": VERSION,
        "rows": fingerprint(source, len(source.ids), built.codes.digest),
        "weights": weights.tolist(),
        "seed": built.seed,
        "bits": built.bits,
        "prefix": built.basis.prefix,
        "share": built.basis.share,
        "why": built.basis.why,
        "widths": [width for width, *_ in segments],
    }
    with store_errors(path):
        part = path.with_name(f"{path.name}.{secrets.token_hex(4)}.part")
        part.mkdir(parents=True)
        try:
            body["files"] = {
                name: (*write_array(part / f"{name}.npy", array), array.dtype.str, array.shape)
                for name, array in arrays.items()
            }
            write_json(part / MANIFEST, body)
            part.rename(path)
        except BaseException:
            shutil.rmtree(part, ignore_errors=True)  # nobody else knows its name
            raise
        sync_directory(path.parent)
    return path


def load(path: Path, source: Source, threads: int) -> tuple[Built, NDArray[np.bool_] | None, int]:
    """What is in a folder, which examples are gone, and of how many of the source's it is.

    Raises:
        StoreError: If there is none, or it is damaged.
        MismatchError: If it is of other rows.
    """
    manifest = path / MANIFEST
    if not manifest.is_file():
        raise StoreError(f"path must be a folder of a saved index, got {path} without a {MANIFEST}")
    body = read_json(manifest)
    try:
        if body["format"] != FORMAT:
            raise ValueError(f"format must be {FORMAT}")
        if body["version"] != VERSION:
            raise StoreError(
                f"{manifest}: version must be {VERSION}, got {body['version']!r:.80}; build the "
                "index again"
            )
        count = int(body["rows"]["examples"])
        if not (
            0 < count <= len(source.ids)
            and body["rows"] == fingerprint(source, count, source.digest(count, threads))
        ):
            raise MismatchError(
                f"rows must be those that {path} was built of, got {source!r}; where rows were "
                "deleted or replaced, a new index must be built"
            )
        files = {}
        for name, (length, checksums, kind, shape) in body["files"].items():
            file, written = array_name(f"{name}.npy"), Written.of((length, checksums))
            files[name] = read_array(path / file, written, kind, tuple(shape))
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
            int(body["rows"]["digest"], 16),
        )
        bits = int(body["bits"])
        if bits not in (4, 8):
            raise ValueError(f"bits must be 4 or 8, got {bits}")
        gone = files[GONE].astype(bool) if GONE in files else None
        if len(files["order"]) != count or (gone is not None and gone.shape != (count,)):
            raise ValueError(f"order and {GONE} must be of {count} examples")
        basis = Basis(body["prefix"], files["directions"], float(body["share"]), str(body["why"]))
        graph = None
        if GRAPH[0] in files:
            graph = _core.Graph.from_parts(codes, *(files[name] for name in GRAPH))
            codes = graph.codes
        return Built(codes, graph, basis, bits, int(body["seed"])), gone, count
    except (MismatchError, StoreError):
        raise
    except (WhenceError, *WRONG) as error:
        raise StoreError(f"{manifest} is damaged: {type(error).__name__}: {error}") from None


def fingerprint(source: Source, count: int, digest: int) -> dict[str, Any]:
    """What tells a source's first examples, whose rows have this digest, from others."""
    weights, _ = source.weights()
    ids = source.ids[:count]
    content = ids.tobytes()
    if ids.dtype.kind != "i":
        content = "\0".join(ids.tolist()).encode(errors="surrogatepass")
    return {
        "examples": count,
        "dim": source.dim,
        "checkpoints": source.checkpoints,
        "weights": checksum_of(weights.data),
        "ids": checksum_of(content),
        "digest": f"{digest:016x}",
    }
