from os import PathLike
from typing import Any, Final, final

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "HASH_VERSION",
    "MAX_COORDINATES",
    "MAX_DIM",
    "MAX_THREADS",
    "Codes",
    "Rows",
    "Sketch",
    "crc32",
    "encode",
    "encode_factors",
    "instruction_set",
    "norm_gradients",
]

HASH_VERSION: Final[int]
"""Version of the definition of randomness; rows of different versions do not compare."""
MAX_COORDINATES: Final[int]
"""The most coordinates a parameter may have."""
MAX_DIM: Final[int]
"""The widest row a sketch makes."""
MAX_THREADS: Final[int]
"""The most threads a call starts, whatever it was asked for."""

def instruction_set() -> str:
    """The instruction set the kernels use on this machine."""

def encode(rows: NDArray[np.float32], half: bool) -> tuple[NDArray[Any], NDArray[np.float32]]:
    """Unit rows, float16 if `half` else float32, and the scale of each row."""

def encode_factors(
    parts: list[tuple[NDArray[np.float32] | None, NDArray[np.float32], tuple[bool, bool]]],
    half: bool,
) -> tuple[NDArray[Any], NDArray[np.float32]]:
    """Rows of factors of unit gradients, and the gradients' norms."""

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
_Segment = tuple[int, list[NDArray[np.uint8]], list[NDArray[np.uint16]]]

@final
class Rows:
    """Stored rows in files or in memory, numbered through."""

    def __new__(
        cls,
        files: list[tuple[str | PathLike[str], int, int]],
        dim: int,
        dtype: str,
        scales: NDArray[np.float32],
    ) -> Rows: ...
    @staticmethod
    def of(matrix: NDArray[Any]) -> Rows: ...
    @property
    def bytes(self) -> int: ...
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
    ) -> Codes: ...
    def parts(self) -> tuple[NDArray[np.uint32], list[_Segment], NDArray[np.float32]]: ...
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
