from os import PathLike
from typing import Any, Final, final

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "BLOCK",
    "HASH_VERSION",
    "MAX_BATCH",
    "MAX_COORDINATES",
    "MAX_DIM",
    "MAX_HASHES",
    "MAX_LEVELS",
    "MAX_PAIRS",
    "MAX_PROBES",
    "MAX_THREADS",
    "MAX_VIEWS",
    "Codes",
    "Graph",
    "Hash",
    "HashIndex",
    "InvertedIndex",
    "Rows",
    "Sketch",
    "block_checksums",
    "check_file",
    "code_similarities",
    "crc32",
    "duplicate_groups",
    "encode",
    "encode_factors",
    "graph_by_codes",
    "graph_within_batches",
    "instruction_set",
    "norm_gradients",
    "quantise",
    "shuffled",
]

BLOCK: Final[int]
"""Bytes of a block of a file, each of which has a checksum; the last may be shorter."""
HASH_VERSION: Final[int]
"""Version of the definition of randomness; rows of different versions do not compare."""
MAX_BATCH: Final[int]
"""The most rows of a batch whose pairs are all compared."""
MAX_COORDINATES: Final[int]
"""The most coordinates a parameter may have."""
MAX_DIM: Final[int]
"""The widest row a sketch makes."""
MAX_HASHES: Final[int]
"""The most hashes of a code."""
MAX_LEVELS: Final[int]
"""The most levels of a p-stable code."""
MAX_PAIRS: Final[int]
"""The most pairs that may be taken from one bucket."""
MAX_PROBES: Final[int]
"""The most buckets that are looked up for a query."""
MAX_THREADS: Final[int]
"""The most threads a call starts, whatever it was asked for."""
MAX_VIEWS: Final[int]
"""The most views of a graph."""

def instruction_set() -> str:
    """The instruction set the kernels use on this machine."""

def encode(rows: NDArray[np.float32], stored: NDArray[Any]) -> NDArray[np.float32]:
    """The scale of each row; unit rows go into `stored`, float16 or float32 of the same shape."""

def encode_factors(
    parts: list[tuple[NDArray[np.float32] | None, NDArray[np.float32], tuple[bool, bool]]],
    half: bool,
) -> tuple[NDArray[Any], NDArray[np.float32]]:
    """Rows of factors of unit gradients, and the gradients' norms."""

def quantise(
    rows: NDArray[np.float32], bits: int
) -> tuple[NDArray[Any], NDArray[np.float32], NDArray[np.float32]]:
    """[rows, bytes] codes, int8 or packed uint8; the scale and the relative error of each row."""

def norm_gradients(
    values: NDArray[np.float32],
    delta: NDArray[np.float32],
    epsilon: float,
    centred: bool,
    threads: int,
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """[batch, width] gradients of the weight and of the bias of a norm over the last dimension."""

def crc32(bytes: NDArray[np.uint8], before: int) -> int:
    """The CRC-32 of bytes that follow others; before is 0 for the first."""

def block_checksums(bytes: NDArray[np.uint8]) -> NDArray[np.uint32]:
    """The CRC-32 of each block of bytes; none of no bytes."""

def check_file(
    path: str | PathLike[str], length: int, checksums: NDArray[np.uint32], threads: int
) -> list[int]:
    """The blocks of a regular file of `length` bytes that have other checksums, in order."""

@final
class Sketch:
    """A random map; adds to `dim` columns, from `first` on, of running float64 totals."""

    def __new__(cls, kind: str, dim: int, seed: int, nonzeros: int = 1) -> Sketch: ...
    @property
    def dim(self) -> int: ...
    def add_flat(
        self,
        name: str,
        shape: list[int],
        start: int,
        values: NDArray[Any],
        totals: NDArray[np.float64],
        threads: int,
        first: int = 0,
        *,
        bfloat16: bool = False,
    ) -> list[int]: ...
    def add_outer(
        self,
        name: str,
        shape: list[int],
        start: int,
        left: NDArray[np.float32],
        right: NDArray[np.float32],
        totals: NDArray[np.float64],
        threads: int,
        first: int = 0,
        sum: NDArray[np.float32] | None = None,
        bias: tuple[str, list[int], int] | None = None,
    ) -> list[int]: ...
    def add_lookup(
        self,
        name: str,
        shape: list[int],
        indices: NDArray[np.int64],
        values: NDArray[np.float32],
        ignored: int | None,
        totals: NDArray[np.float64],
        threads: int,
        first: int = 0,
    ) -> list[int]: ...
    def key(self, name: str, shape: list[int]) -> int: ...
    def slots(
        self, name: str, shape: list[int]
    ) -> tuple[NDArray[np.uint32], NDArray[np.uint16]]: ...

_Side = tuple[NDArray[np.uint64], NDArray[np.float32]]
_Segment = tuple[int, list[NDArray[np.uint8]], NDArray[np.float32], list[NDArray[np.uint16]]]

@final
class Rows:
    """Stored rows in files or in memory, numbered through.

    A file is its path, where rows begin, their number, and the checksums of its blocks, by which
    each is checked when it is first read; None for a file that has none, which may be a link.
    With `memory_map` files are looked at where the system keeps them: for such as nobody writes,
    since a process that looks behind the end of one that has been cut is ended (SIGBUS).
    """

    def __new__(
        cls,
        files: list[tuple[str | PathLike[str], int, int, NDArray[np.uint32] | None]],
        dim: int,
        dtype: str,
        scales: NDArray[np.float32],
        memory_map: bool = False,
    ) -> Rows: ...
    @staticmethod
    def of(matrix: NDArray[Any]) -> Rows: ...
    @property
    def bytes(self) -> int: ...
    def digest(self, numbers: NDArray[np.uint64] | None, count: int, threads: int) -> int: ...
    @property
    def resident(self) -> bool: ...
    def read(self, numbers: NDArray[np.uint64]) -> NDArray[np.float32]: ...
    def gathered(self, numbers: NDArray[np.uint64]) -> Rows: ...
    def norms(self, threads: int) -> NDArray[np.float32]: ...
    def ends(
        self,
        rows: NDArray[np.uint64] | None,
        queries: NDArray[np.float32],
        k: int,
        sides: tuple[bool, bool],
        excluded: list[list[int]],
        norms: NDArray[np.float32] | None,
        threads: int,
        segments: list[tuple[int, int]] = ...,
    ) -> tuple[_Side, _Side]: ...

@final
class Codes:
    """Codes of rows, whose bounds prove what a scan would find."""

    def __new__(
        cls,
        rows: Rows,
        numbers: NDArray[np.uint64] | None,
        weights: list[float],
        norms: NDArray[np.float32],
        prefix: list[int],
        directions: NDArray[np.float64],
        seed: int,
        bits: int,
        threads: int,
    ) -> Codes: ...
    @staticmethod
    def from_parts(
        length: int,
        prefix: list[int],
        directions: NDArray[np.float64],
        seed: int,
        weights: list[float],
        order: NDArray[np.uint32],
        segments: list[_Segment],
        reaches: NDArray[np.float32],
        digest: int,
    ) -> Codes: ...
    def parts(self) -> tuple[NDArray[np.uint32], list[_Segment], NDArray[np.float32]]: ...
    def appended(self, more: Codes) -> Codes: ...
    @property
    def digest(self) -> int: ...
    @property
    def bytes(self) -> int: ...
    def search(
        self,
        rows: Rows,
        numbers: NDArray[np.uint64] | None,
        queries: NDArray[np.float32],
        k: int,
        sides: tuple[bool, bool],
        eligible: NDArray[np.bool_] | None,
        excluded: list[list[int]],
        candidates: int | None,
        threads: int,
    ) -> tuple[_Side, _Side, NDArray[np.uint64], NDArray[np.float32]]: ...

@final
class Graph:
    """Examples linked to near ones by their codes, for approximate search.

    Not for the smallest scores, for norms that differ widely (`norm_spread` far above 1), for
    filters that few examples pass, for many hits or for few examples: there `codes.search` does
    better, whose answer is proven. The same graph for any number of threads.
    """

    def __new__(
        cls, codes: Codes, norms: NDArray[np.float32], seed: int, threads: int
    ) -> Graph: ...
    @staticmethod
    def from_parts(
        codes: Codes,
        norms: NDArray[np.float32],
        links: NDArray[np.uint32],
        entries: NDArray[np.uint32],
    ) -> Graph: ...
    def parts(self) -> tuple[NDArray[np.float32], NDArray[np.uint32], NDArray[np.uint32]]: ...
    def search(
        self,
        rows: Rows,
        numbers: NDArray[np.uint64] | None,
        queries: NDArray[np.float32],
        k: int,
        width: int,
        eligible: NDArray[np.bool_] | None,
        excluded: list[list[int]],
        candidates: int | None,
        threads: int,
    ) -> tuple[_Side, _Side, NDArray[np.uint64], NDArray[np.float32]]: ...
    def grown(self, codes: Codes, norms: NDArray[np.float32], seed: int, threads: int) -> Graph: ...
    @property
    def codes(self) -> Codes: ...
    @property
    def bytes(self) -> int: ...
    @property
    def norm_spread(self) -> float: ...
    def digest(self) -> int: ...

@final
class Hash:
    """Hash functions of one family, sign or p_stable, for rows of one width."""

    def __new__(
        cls,
        family: str,
        dim: int,
        hashes: int,
        seed: int,
        view: int = 0,
        width: float = 1.0,
        levels: int = 1,
    ) -> Hash: ...
    def project(self, rows: NDArray[np.float32], threads: int) -> NDArray[np.float32]: ...
    def codes(self, rows: NDArray[np.float32], threads: int) -> NDArray[Any]: ...

@final
class HashIndex:
    """Codes of rows, and buckets of parts of the codes."""

    def __new__(
        cls, hash: Hash, rows: NDArray[np.float32], band: int | None, threads: int
    ) -> HashIndex: ...
    @property
    def tables(self) -> int: ...
    def codes(self) -> NDArray[Any]: ...
    def search(
        self,
        rows: NDArray[np.float32],
        queries: NDArray[np.float32],
        k: int,
        candidates: int,
        probes: int | None,
        smallest: bool,
        threads: int,
    ) -> tuple[NDArray[np.uint64], NDArray[np.float32], NDArray[np.uint64]]: ...

def code_similarities(
    codes: NDArray[Any], hashes: int, level: int, pairs: NDArray[np.uint64]
) -> NDArray[np.float32]:
    """The share of hashes on which each pair of rows agrees."""

def graph_by_codes(
    views: list[NDArray[np.int32]],
    levels: int,
    band: int,
    cap: int,
    k: int,
    seed: int,
    threads: int,
) -> tuple[NDArray[np.uint64], NDArray[np.uint32], NDArray[np.float32]]:
    """Starts, neighbours and similarities of the most similar rows that share a bucket."""

def graph_within_batches(
    rows: NDArray[np.float32],
    batches: list[list[int]],
    k: int,
    radius: float,
    threads: int,
) -> tuple[tuple[NDArray[np.uint64], NDArray[np.uint32], NDArray[np.float64]], NDArray[np.float64]]:
    """Starts, neighbours and squared distances within batches; each batch's median distance."""

def duplicate_groups(
    hash: Hash,
    rows: NDArray[np.float32],
    band: int,
    threshold: float,
    cap: int,
    seed: int,
    threads: int,
) -> NDArray[np.uint32]:
    """For each row the lowest row of its group."""

def shuffled(numbers: NDArray[np.int64], seed: int, name: str) -> NDArray[np.int64]:
    """Numbers in a random order."""

@final
class InvertedIndex:
    """Which documents hold a token, and scores by it: of TF-IDF, or of BM25 with (k1, b).

    Documents and queries are tokens one behind the other, with `starts`, [texts + 1], where each
    begins and the last ends.
    """

    def __new__(cls, bm25: tuple[float, float] | None) -> InvertedIndex: ...
    def appended(
        self, tokens: NDArray[np.uint32], starts: NDArray[np.uint64], threads: int
    ) -> InvertedIndex: ...
    def __len__(self) -> int: ...
    @property
    def bytes(self) -> int: ...
    def search(
        self,
        tokens: NDArray[np.uint32],
        starts: NDArray[np.uint64],
        k: int,
        eligible: NDArray[np.bool_] | None,
        threads: int,
    ) -> tuple[NDArray[np.uint64], NDArray[np.float32]]: ...
    def scores(
        self, tokens: NDArray[np.uint32], starts: NDArray[np.uint64], threads: int
    ) -> NDArray[np.float64]: ...
