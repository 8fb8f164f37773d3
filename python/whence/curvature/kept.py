"""What files keep of factors: descriptions for JSON, and arrays by name; and back.

What is read is looked at here, once and whole: whoever wrote a file could make its checksums fit.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from whence import _arrays
from whence._core import MAX_DIM
from whence._interrupts import interruptible
from whence.curvature.basis import Directions
from whence.curvature.statistics import At, BlockStatistics, Covariance, Statistics
from whence.gradients.blocks import OUTER, Side
from whence.gradients.coordinates import describe, described_block
from whence.store.files import Written, array_name, read_array
from whence.store.manifest import is_name

MOST = 1 << 53
"""The most examples: each number up to it is a float64."""

ROUNDING = 1e-4
"""How far rounding may take what is symmetric, or sums to 1, from being so."""


# From what fitting found


def describe_at(at: At, stem: str, arrays: dict[str, Tensor]) -> dict[str, Any]:
    """A checkpoint's factors for JSON; what is long goes to `arrays`."""
    statistics = at.statistics
    return {
        "name": at.name,
        "digest": at.digest,
        "weight": at.weight,
        "longest": statistics.longest,
        "pairs": {name: list(pair) for name, pair in statistics.pairs.items()},
        "examples": statistics.examples,
        "wide": statistics.dtype == torch.float64,
        "blocks": [
            _describe_block(known, f"{stem}-block-{number}", arrays)
            for number, known in enumerate(statistics.known.values())
        ],
    }


def _describe_block(known: BlockStatistics, stem: str, arrays: dict[str, Tensor]) -> dict[str, Any]:
    sides: dict[str, Any] = {}
    for name in ("left", "right"):
        covariance: Covariance | None = getattr(known, name)
        if covariance is None:
            continue
        sides[name] = {"ranges": [list(each) for each in covariance.ranges]}
        sides[name]["one"] = covariance.one
        for place, total in enumerate(covariance.sums):
            arrays[f"{stem}-{name}-{place}"] = total
        side: Side | None = getattr(known.block, name)
        if side is not None:
            for place, (_, _, matrix) in enumerate(side.parts):
                arrays[f"{stem}-{name}-vectors-{place}"] = matrix
            if side.ones is not None:
                arrays[f"{stem}-{name}-ones"] = side.ones
    for name in ("kronecker", "squares"):
        if getattr(known, name) is not None:
            arrays[f"{stem}-{name}"] = getattr(known, name)
    return {**describe(known.block), "sides": sides, "terms": known.terms}


def describe_directions(
    directions: Directions | None, arrays: dict[str, Tensor]
) -> dict[str, Any] | None:
    """Directions for JSON, if there are any; what is long goes to `arrays`."""
    if directions is None:
        return None
    arrays["directions-values"] = directions.values
    for number, matrix in enumerate(directions.matrices):
        arrays[f"directions-{number}"] = matrix
    if directions.moment is not None:
        arrays["directions-moment"] = directions.moment
    return {name: getattr(directions, name) for name in ("total", "examples", "widest")}


# From files. Everything raises a ValueError, or another error of `whence.store.files.WRONG`, of
# what cannot have been written by the above.


def read_arrays(path: Path, body: Mapping[str, Any]) -> dict[str, Tensor]:
    """Name -> array of all that a description names, checked and finite.

    Raises:
        StoreError: If a file is damaged.
    """
    found = {}
    for name, (kind, shape) in body["arrays"].items():
        file = path / array_name(f"{name}.npy")
        array = read_array(file, Written.of(body["files"][name]), kind, tuple(shape))
        _arrays.finite(str(file), array)
        found[name] = torch.from_numpy(interruptible(np.copy, array))
    return found


def read_at(
    described: Mapping[str, Any],
    stem: str,
    arrays: dict[str, Tensor],
    sizes: Mapping[str, int],
    *,
    rotated: bool,
) -> At:
    """A checkpoint's factors; its arrays are taken out of `arrays`.

    Args:
        described: What `describe_at` returned.
        stem: How the names of its arrays begin.
        arrays: All that were read.
        sizes: Parameter -> how many values it has.
        rotated: Whether eigenvectors are known.
    """
    wide = _arrays.boolean("wide", described["wide"])
    dtype = torch.float64 if wide else torch.float32
    pairs = {name: (bias, side) for name, (bias, side) in described["pairs"].items()}
    for name, (bias, side) in pairs.items():
        if {name, name if bias is None else bias} - set(sizes) or side not in ("left", "right"):
            raise ValueError(
                "pairs must be of a parameter, a bias and a side, got "
                f"{name!r:.80}, {bias!r:.80}, {side!r:.80}"
            )
    first, second = (_arrays.integer("examples", each, 0, MOST) for each in described["examples"])
    if not first or (rotated and not second):
        raise ValueError(f"examples must be at least 1, got {first} and {second}")
    weight = _arrays.number("weight", described["weight"], positive=True)
    if weight > 1 + ROUNDING:
        raise ValueError(f"weight must be a share of 1, got {weight}")
    known: dict[tuple[str, int, str], BlockStatistics] = {}
    for number, each in enumerate(described["blocks"]):
        found = _read_block(
            each, f"{stem}-block-{number}", arrays, sizes, dtype if rotated else None
        )
        if found.block.key in known:
            raise ValueError(f"blocks must be distinct, got {found.block.key} twice")
        known[found.block.key] = found
    longest = _arrays.integer("longest", described["longest"], 1)
    return At(
        _text("name", described["name"]),
        _text("digest", described["digest"]),
        weight,
        Statistics(longest, pairs, known, [first, second], dtype),
    )


def _read_block(
    described: Mapping[str, Any],
    stem: str,
    arrays: dict[str, Tensor],
    sizes: Mapping[str, int],
    dtype: torch.dtype | None,
) -> BlockStatistics:
    """What is known of a block; with eigenvectors of a type, if they are known."""
    block = described_block(described)
    ranges = [(block.parameter, block.start, math.prod(block.shape))]
    ranges += [] if block.bias is None else [block.bias]
    for name, start, count in ranges:
        if start + count > sizes[name]:
            raise ValueError(f"{name} must have {start + count} values, got {sizes[name]}")
    found: dict[str, tuple[Covariance, Side | None]] = {
        name: _read_side(
            each, f"{stem}-{name}", arrays, block.lengths[name], block.has_one(name), dtype
        )
        for name, each in described["sides"].items()
    }
    (left, first), (right, second) = (found.get(name, (None, None)) for name in ("left", "right"))
    block = replace(block, left=first, right=second)
    if (terms := _arrays.number("terms", described["terms"])) < 0:
        raise ValueError(f"terms must be at least 0, got {terms}")
    if dtype is None:
        return BlockStatistics(block, left, right, terms)
    names = ["squares", *(["kronecker"] if block.kind == OUTER else [])]
    values = {name: _taken(arrays, f"{stem}-{name}", torch.float64, block.values) for name in names}
    for name, each in values.items():
        if (each < 0).any():
            raise ValueError(f"{stem}-{name}.npy must be at least 0, got {float(each.min())}")
    return BlockStatistics(block, left, right, terms, **values)


def _read_side(
    described: Mapping[str, Any],
    stem: str,
    arrays: dict[str, Tensor],
    length: int,
    one: bool,
    dtype: torch.dtype | None,
) -> tuple[Covariance, Side | None]:
    """The covariance of a side of a length, and its eigenvectors of a type, if they are known."""
    ranges = [(first, end) for first, end in described["ranges"]]
    edges = [0, *(end for _, end in ranges)]
    if (
        any(type(each) is not int for part in ranges for each in part)
        or ranges != list(pairwise(edges))
        or any(first >= end for first, end in ranges)
        or edges[-1] != length
    ):
        raise ValueError(f"ranges must follow each other from 0 to {length}, got {ranges!r:.80}")
    if _arrays.boolean("one", described["one"]) != one:
        raise ValueError(f"one must be {one} as there is a bias or not, got {not one}")
    columns = [end - first for first, end in ranges]
    columns[-1] += one
    sums = [
        _taken(arrays, f"{stem}-{place}", torch.float64, (size, size))
        for place, size in enumerate(columns)
    ]
    covariance = Covariance(ranges, sums, one)
    if dtype is None:
        return covariance, None
    parts = [
        (first, end, _taken(arrays, f"{stem}-vectors-{place}", dtype, (end - first, size)))
        for place, ((first, end), size) in enumerate(zip(ranges, columns, strict=True))
    ]
    ones = _taken(arrays, f"{stem}-ones", dtype, (sum(columns),)) if one else None
    return covariance, Side(parts, ones)


def read_directions(
    described: Mapping[str, Any], arrays: dict[str, Tensor], widths: Sequence[int]
) -> Directions:
    """The directions; their arrays are taken out of `arrays`.

    Args:
        described: What `describe_directions` returned.
        arrays: All that were read.
        widths: How many coordinates each checkpoint has.
    """
    examples = _arrays.integer("examples", described["examples"], 1, MOST)
    widest = _arrays.integer("widest", described["widest"], 1, MAX_DIM)
    count = len(arrays["directions-values"])
    if not 1 <= count <= min(examples, widest):
        raise ValueError(f"directions must be from 1 to {min(examples, widest)}, got {count}")
    values = _taken(arrays, "directions-values", torch.float32, (count,))
    if (values <= 0).any():
        raise ValueError(f"directions-values.npy must be above 0, got {float(values.min())}")
    if (values.diff() > 0).any():
        raise ValueError("directions-values.npy must fall, got values that rise")
    moment = None
    if "directions-moment" in arrays:
        moment = _taken(arrays, "directions-moment", torch.float32, (count, count))
        if not torch.allclose(moment, moment.T, ROUNDING, ROUNDING * float(moment.abs().max())):
            raise ValueError("directions-moment.npy must be symmetric")
        if (moment.diagonal() < 0).any():
            raise ValueError("directions-moment.npy must have a diagonal of at least 0")
    matrices = [
        _taken(arrays, f"directions-{number}", torch.float32, (width, count))
        for number, width in enumerate(widths)
    ]
    total = _arrays.number("total", described["total"], positive=True)
    return Directions(values, matrices, total, examples, widest, moment)


def _taken(
    arrays: dict[str, Tensor], name: str, dtype: torch.dtype, shape: tuple[int, ...]
) -> Tensor:
    """Takes an array of this type and shape out of those that were read."""
    array = arrays.pop(name)
    if array.dtype != dtype or array.shape != shape:
        raise ValueError(
            f"{name}.npy must be {dtype} of shape {list(shape)}, got {_arrays.describe(array)}"
        )
    return array


def _text(name: str, value: Any) -> str:
    if not is_name(value):
        raise ValueError(f"{name} must be a str without NUL, got {value!r:.80}")
    return str(value)
