"""`SignHash` and `PStableHash`: codes of rows by random projections."""

from __future__ import annotations

import math
from dataclasses import KW_ONLY, dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from whence import _arrays, _core
from whence.errors import ArgumentError, DtypeError, ShapeError

MAX_SEED = 2**64 - 1
"""The largest seed, and the largest number of a view."""


def rows_of(name: str, value: Any) -> NDArray[np.float32]:
    """`value` as a C-contiguous [rows, dim] float32 array with at least one row.

    Raises:
        DtypeError: If it is not float32 (or a bfloat16 tensor).
        ShapeError: If it is not [rows, dim], at least one of each.
        NotFiniteError: If it holds a NaN or an infinity.
    """
    shape = list(getattr(value, "shape", [1, 1]))
    if len(shape) != 2 or 0 in shape:
        raise ShapeError(f"{name} must be [rows, dim], at least one of each, got {shape}")
    return _arrays.float_rows(name, value, int(shape[1]))


def pairs_of(pairs: Any, rows: int) -> NDArray[np.uint64]:
    """`pairs` as numbers of rows, [pairs, 2].

    Raises:
        DtypeError: If they are not integers.
        ShapeError: If they are not [pairs, 2].
        ArgumentError: If a row is not there.
    """
    array = _arrays.array("pairs", pairs)
    if array.shape == (0,):
        return np.empty((0, 2), np.uint64)
    if array.dtype.kind not in "iu":
        raise DtypeError(f"pairs must be integers, got {_arrays.describe(array)}")
    if array.ndim != 2 or array.shape[1] != 2:
        raise ShapeError(f"pairs must be [pairs, 2], got {list(array.shape)}")
    wrong = array[(array < 0) | (array >= rows)]
    if wrong.size:
        raise ArgumentError(f"pairs must be rows from 0 to {rows - 1}, got {wrong[0]}")
    return np.ascontiguousarray(array, np.uint64)


@dataclass(frozen=True)
class SignHash:
    """Sides of random hyperplanes: bit `[a·x >= 0]`.

    Two rows at the angle t agree on a bit with probability `1 - t/π` (Charikar, "Similarity
    estimation techniques from rounding algorithms", STOC 2002). The `a` are rows of random
    rotations, three rounds of random signs and a Walsh-Hadamard transform (Andoni et al.,
    "Practical and optimal LSH for angular distance", NIPS 2015): hashes of one rotation are
    orthogonal and together tell angles better than independent ones. A row of zeros has all bits
    set.

    A code of whole words can be nested: `codes >> l` drops the lowest l hashes of each word.

    Args:
        hashes: How many bits a code has, 1 to 4096.
        seed: 0 to 2**64 - 1.
        view: A number for each of several independent sets of hashes of one seed.
        threads: How many threads a call uses; None means all processors.

    Raises:
        ArgumentError: If an argument is out of range.
        DtypeError: If one is no integer.
    """

    hashes: int = 256
    _: KW_ONLY
    seed: int = 0
    view: int = 0
    threads: int | None = None

    name: ClassVar[str] = "sign"

    def __post_init__(self) -> None:
        _check(self)

    def core(self, dim: int) -> _core.Hash:
        """The compiled functions, for rows of this width."""
        return _core.Hash("sign", dim, self.hashes, self.seed, self.view)

    def project(self, rows: Any) -> NDArray[np.float32]:
        """[rows, hashes]: a·x, each `a` of the length that rotates x, padded, into the code.

        Args:
            rows: [rows, dim] float32.

        Returns:
            The projections, normal of variance |x|² over seeds. O(dim log dim) a row for each
            rotation, of max(256, dim to the next power of two) hashes.

        Raises:
            DtypeError, ShapeError, NotFiniteError: If rows are not finite float32 rows, or a
                projection overflows.
        """
        rows = rows_of("rows", rows)
        return self.core(rows.shape[1]).project(rows, _arrays.threads(self.threads))

    def codes(self, rows: Any) -> NDArray[np.uint64]:
        """[rows, ⌈hashes / 64⌉] uint64: bit h mod 64 of word h // 64 is hash h.

        Costs and raises what `project` does.
        """
        rows = rows_of("rows", rows)
        return self.core(rows.shape[1]).codes(rows, _arrays.threads(self.threads))

    def similarity(self, codes: Any, pairs: Any) -> NDArray[np.float32]:
        """[pairs]: the share of hashes on which both rows of each pair agree.

        Args:
            codes: What `codes` returned.
            pairs: [pairs, 2] numbers of rows.

        Raises:
            ArgumentError: If a pair names a row that is not there.
            DtypeError, ShapeError: If codes or pairs are of another type or shape.
        """
        codes = _codes(codes, np.dtype(np.uint64), -(-self.hashes // 64))
        return _core.code_similarities(codes, self.hashes, 0, pairs_of(pairs, len(codes)))

    def collision_probability(self, angle: float) -> float:
        """With which probability two rows at this angle, 0 to π in radians, agree on a hash.

        Raises:
            ArgumentError: If it is out of range.
            DtypeError: If it is no number.
        """
        angle = _arrays.number("angle", angle)
        if not 0 <= angle <= math.pi:
            raise ArgumentError(f"angle must be from 0 to pi, got {angle}")
        return 1 - angle / math.pi


@dataclass(frozen=True)
class PStableHash:
    """Cells of random lines: `⌊(a·x + b) / width⌋`, a of independent normals.

    Rows at the Euclidean distance c share a cell with the probability of Datar, Immorlica, Indyk
    and Mirrokni ("Locality-sensitive hashing scheme based on p-stable distributions", SCG 2004):
    `1 - 2Φ(-w/c) - 2c/(√(2π)w) (1 - exp(-w²/2c²))`. Level l of a code is `codes >> l`, of the
    signed number: the code of width `width · 2**l`, for b is uniform in
    [0, width · 2**(levels - 1)).

    Args:
        hashes: How many cells a code has, 1 to 4096, and at most 2**26 / dim.
        width: Width of a cell at level 0, in the units of the rows.
        levels: How many levels keep the law, 1 to 16.
        seed: 0 to 2**64 - 1.
        view: A number for each of several independent sets of hashes of one seed.
        threads: How many threads a call uses; None means all processors.

    Raises:
        ArgumentError: If an argument is out of range.
        DtypeError: If one is no number, or no integer where it must be.
    """

    hashes: int = 16
    _: KW_ONLY
    width: float = 8.0
    levels: int = 1
    seed: int = 0
    view: int = 0
    threads: int | None = None

    name: ClassVar[str] = "p_stable"

    def __post_init__(self) -> None:
        _check(self)
        _arrays.number("width", self.width, positive=True)
        _arrays.integer("levels", self.levels, 1, _core.MAX_LEVELS)

    def core(self, dim: int) -> _core.Hash:
        """The compiled functions, for rows of this width."""
        return _core.Hash(
            "p_stable", dim, self.hashes, self.seed, self.view, self.width, self.levels
        )

    def project(self, rows: Any) -> NDArray[np.float32]:
        """[rows, hashes]: (a·x + b) / width, whose floor is the code.

        Args:
            rows: [rows, dim] float32.

        Returns:
            The positions in cells. O(dim · hashes) a row.

        Raises:
            DtypeError, ShapeError, NotFiniteError: If rows are not finite float32 rows, or a
                position overflows.
            ArgumentError: If there are more than 2**26 / dim hashes.
        """
        rows = rows_of("rows", rows)
        return self.core(rows.shape[1]).project(rows, _arrays.threads(self.threads))

    def codes(self, rows: Any) -> NDArray[np.int32]:
        """[rows, hashes] int32: the cells at level 0; `codes >> l` are those at level l.

        Costs and raises what `project` does, and ArgumentError if a cell does not fit 32 bits.
        """
        rows = rows_of("rows", rows)
        return self.core(rows.shape[1]).codes(rows, _arrays.threads(self.threads))

    def similarity(self, codes: Any, pairs: Any, level: int = 0) -> NDArray[np.float32]:
        """[pairs]: the share of hashes whose cells at a level both rows of each pair share.

        Args:
            codes: What `codes` returned.
            pairs: [pairs, 2] numbers of rows.
            level: Of width `width · 2**level`.

        Raises:
            ArgumentError: If a pair names a row that is not there, or the level is not.
            DtypeError, ShapeError: If codes or pairs are of another type or shape.
        """
        level = _arrays.integer("level", level, 0, self.levels - 1)
        codes = _codes(codes, np.dtype(np.int32), self.hashes)
        return _core.code_similarities(codes, self.hashes, level, pairs_of(pairs, len(codes)))

    def collision_probability(self, distance: float, level: int = 0) -> float:
        """With which probability two rows at this distance, at least 0, share a cell of a level.

        Raises:
            ArgumentError: If the distance is negative or the level out of range.
            DtypeError: If one is no number.
        """
        level = _arrays.integer("level", level, 0, self.levels - 1)
        distance = _arrays.number("distance", distance)
        if distance < 0:
            raise ArgumentError(f"distance must be at least 0, got {distance}")
        if distance == 0:
            return 1.0
        ratio = float(self.width * 2**level / distance)
        outside = math.erfc(ratio / math.sqrt(2))
        return 1 - outside + math.sqrt(2 / math.pi) / ratio * math.expm1(-ratio * ratio / 2)


Family = SignHash | PStableHash
"""Either family."""


def family_of(value: Any) -> Family:
    """`value`, if it is of a family; `SignHash()` for None.

    Raises:
        DtypeError: If it is not.
    """
    if value is None:
        return SignHash()
    if isinstance(value, (SignHash, PStableHash)):
        return value
    raise DtypeError(f"family must be a SignHash or a PStableHash, got {_arrays.describe(value)}")


def _check(family: Family) -> None:
    """What both families ask of their arguments."""
    _arrays.integer("hashes", family.hashes, 1, _core.MAX_HASHES)
    _arrays.integer("seed", family.seed, 0, MAX_SEED)
    _arrays.integer("view", family.view, 0, MAX_SEED)
    _arrays.threads(family.threads)


def _codes(value: Any, dtype: np.dtype[Any], width: int) -> NDArray[Any]:
    """`value`, if it is a [rows, width] array of codes."""
    if not isinstance(value, np.ndarray) or value.dtype != dtype:
        raise DtypeError(f"codes must be a {dtype} array, got {_arrays.describe(value)}")
    if value.ndim != 2 or value.shape[1] != width:
        raise ShapeError(f"codes must be [rows, {width}], got {list(value.shape)}")
    return np.ascontiguousarray(value)
