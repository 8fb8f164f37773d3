"""`Sketch`: per-sample gradients to rows of a fixed width."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from whence import _arrays, _core
from whence.errors import (
    ArgumentError,
    DtypeError,
    MismatchError,
    NotFiniteError,
    ShapeError,
)

KINDS = ("chunked_sjlt",)
"""The kinds of sketch there are."""

HASH_VERSION = _core.HASH_VERSION
"""Version of the definition of randomness; rows of different versions do not compare."""

Layout: TypeAlias = Sequence[tuple[str, Sequence[int]]]
"""Parameters of a flat gradient in order: (name, shape)."""

_WRAPPERS = ("_orig_mod.", "module.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")


def canonical_name(name: str) -> str:
    """`name` without what wrappers put into it, at any depth.

    `torch.compile`, `DataParallel`, FSDP and activation checkpointing each add a component to the
    names of the parameters inside; the canonical name is that of the bare model.

    >>> canonical_name("module.blocks.0._checkpoint_wrapped_module.attention.weight")
    'blocks.0.attention.weight'
    """
    parts = [part for part in name.split(".") if f"{part}." not in _WRAPPERS]
    return ".".join(parts)


class Sketch:
    """A random linear map from gradients to rows of `dim` float32 values.

    The kind `chunked_sjlt` is the sparse Johnson-Lindenstrauss transform with one nonzero a
    column (Kane and Nelson, "Sparser Johnson-Lindenstrauss transforms", JACM 2014; also known as
    CountSketch), hashed by chunks: 16 neighbouring coordinates of a parameter share an offset and
    have a sign each. The inner product of two rows estimates that of the gradients x and y
    without bias and with variance at most `(|x|²|y|² + (x·y)²) / dim`.

    What a coordinate is mapped to depends only on the seed, its parameter's canonical name and
    shape, and its place in the parameter: other layers can come and go. From the same arrays the
    rows are the same bits for any number of threads, batch split and instruction set, and on any
    machine.

    Args:
        kind: "chunked_sjlt".
        dim: Width of a row, 1 to 1,048,576. The standard deviation of a cosine is about
            `sqrt(1 / dim)`: 0.016 at 4096.
        seed: 0 to 2**64 - 1.
        threads: How many threads a call uses; None means all processors.

    Raises:
        ArgumentError: If an argument is out of range.

    Examples:
        >>> import numpy as np, whence
        >>> sketch = whence.Sketch("chunked_sjlt", dim=256, seed=0)
        >>> sketch(np.ones((2, 1000), np.float32)).shape
        (2, 256)
    """

    def __init__(
        self,
        kind: str = "chunked_sjlt",
        *,
        dim: int = 4096,
        seed: int = 0,
        threads: int | None = None,
    ) -> None:
        self._kind = _arrays.choice("kind", kind, KINDS)
        self._dim = _arrays.integer("dim", dim, 1, _core.MAX_DIM)
        self._seed = _arrays.integer("seed", seed, 0, 2**64 - 1)
        self._threads = _arrays.threads(threads)
        self._core = _core.Sketch(self._kind, self._dim, self._seed)

    @classmethod
    def from_spec(cls, spec: dict[str, Any], *, threads: int | None = None) -> Sketch:
        """The map that a store says its rows were made with.

        Raises:
            MismatchError: If this version of whence does not have that map.
        """
        found = cls(spec["kind"], dim=spec["dim"], seed=spec["seed"], threads=threads)
        for name, value in found.spec.items():
            if spec.get(name) != value:
                raise MismatchError(
                    f"{name} of the store's sketch must be {value!r}, as in this version of "
                    f"whence, got {spec.get(name)!r}"
                )
        return found

    @property
    def kind(self) -> str:
        """The kind of map."""
        return self._kind

    @property
    def dim(self) -> int:
        """The width of a row."""
        return self._dim

    @property
    def seed(self) -> int:
        """The seed."""
        return self._seed

    @property
    def spec(self) -> dict[str, Any]:
        """All that defines the map: kind, dim, seed, hash_version."""
        return {
            "kind": self._kind,
            "dim": self._dim,
            "seed": self._seed,
            "hash_version": HASH_VERSION,
        }

    def __repr__(self) -> str:
        return f"Sketch({self._kind!r}, dim={self._dim}, seed={self._seed})"

    def expected_error(self, cosine: float = 0.0) -> float:
        """The standard deviation of an inner product, relative to the product of the norms.

        Args:
            cosine: The cosine of the two gradients, from -1 to 1.

        Returns:
            `sqrt((1 + cosine²) / dim)`.

        Raises:
            ArgumentError: If cosine is not from -1 to 1.
        """
        cosine = _arrays.number("cosine", cosine)
        if not -1 <= cosine <= 1:
            raise ArgumentError(f"cosine must be from -1 to 1, got {cosine}")
        return math.sqrt((1 + cosine**2) / self._dim)

    def __call__(self, gradients: Any, layout: Layout | None = None) -> NDArray[np.float32]:
        """Rows of `gradients`.

        Args:
            gradients: A dict of parameter name to [batch, *shape], a tied parameter under the
                first of its names in sorted order, as in a recorded store; or one
                [batch, parameters] array that `layout` takes apart; or one array [batch, ...], a
                single parameter named "". NumPy arrays or tensors of float32, float16 or
                (tensors) bfloat16.
            layout: For a flat array: (name, shape) of each parameter in the order they lie in.

        Returns:
            [batch, dim] float32, O(batch · parameters) time. Parameters are summed in the order
            of their sorted canonical names, so a dict and a flat array give the same bits.

        Raises:
            DtypeError: If an array is of another type.
            ShapeError: If shapes do not fit, or the batch is empty.
            ArgumentError: If two parameters have the same canonical name, or layout is given
                with a dict.
            NotFiniteError: If a row is not finite.
        """
        parts = self._parts(gradients, layout)
        batch = parts[0][2].shape[0]
        accumulator = Accumulator(self, batch)
        for name, shape, values in parts:
            bad = accumulator.add(name, shape, values)
            if bad:
                argument = f"gradients[{name!r}]" if name else "gradients"
                raise NotFiniteError(
                    f"{argument} must be finite, got NaN or infinity in "
                    f"{'row' if len(bad) == 1 else 'rows'} {bad}"
                )
        return accumulator.rows()

    def _parts(
        self, gradients: Any, layout: Layout | None
    ) -> list[tuple[str, list[int], NDArray[Any]]]:
        """(canonical name, shape, [batch, size]) of each parameter, sorted by name."""
        parts: dict[str, tuple[list[int], NDArray[Any]]] = {}

        def put(name: str, shape: list[int], values: NDArray[Any]) -> None:
            name = canonical_name(name)
            if name in parts:
                raise ArgumentError(f"parameter names must be distinct, got {name!r} twice")
            parts[name] = (shape, values)

        if isinstance(gradients, Mapping):
            if layout is not None:
                raise ArgumentError("layout must be None for a dict of gradients, got a layout")
            for name, value in gradients.items():
                array = _gradient(f"gradients[{name!r}]", value)
                put(str(name), list(array.shape[1:]), array.reshape(len(array), -1))
        else:
            array = _gradient("gradients", gradients)
            if layout is None:
                put("", list(array.shape[1:]), array.reshape(len(array), -1))
            else:
                at = 0
                shapes = [(str(name), _arrays.shape_of("layout", shape)) for name, shape in layout]
                total = sum(math.prod(shape) for _, shape in shapes)
                if array.ndim != 2 or array.shape[1] != total:
                    raise ShapeError(
                        f"gradients must be [batch, {total}] for this layout, "
                        f"got {list(array.shape)}"
                    )
                for name, shape in shapes:
                    size = math.prod(shape)
                    put(name, shape, array[:, at : at + size])
                    at += size
        if not parts:
            raise ArgumentError("gradients must have at least one parameter, got none")
        batches = {name: len(values) for name, (_, values) in parts.items()}
        if len(set(batches.values())) > 1:
            found = ", ".join(f"{name} has {count}" for name, count in batches.items())
            raise ShapeError(f"gradients must have one batch size, but {found}")
        return [(name, *parts[name]) for name in sorted(parts)]


class Accumulator:
    """Running float64 totals of the rows of one batch, to which parts of gradients are added.

    Args:
        sketch: The map.
        batch: How many rows.
    """

    def __init__(self, sketch: Sketch, batch: int) -> None:
        self.totals = np.zeros((batch, sketch.dim), np.float64)
        self._core = sketch._core
        self._threads = sketch._threads

    def add(
        self, name: str, shape: Sequence[int], values: NDArray[Any], start: int = 0
    ) -> list[int]:
        """Adds [batch, width] values at the coordinates from `start` on.

        Returns:
            The rows in which a sum was NaN or infinite.
        """
        bfloat16 = values.dtype == np.uint16
        if values.shape[1] > 1 and values.strides[1] != values.itemsize:
            values = np.ascontiguousarray(values)
        return self._core.add_flat(
            name, list(shape), start, values, self.totals, self._threads, bfloat16=bfloat16
        )

    def add_outer(
        self,
        name: str,
        shape: Sequence[int],
        left: NDArray[np.float32],
        right: NDArray[np.float32],
        start: int = 0,
        first: int = 0,
    ) -> list[int]:
        """Adds, for each sample, the matrix Σ_t left[t] right[t]ᵀ at the coordinates from `start`.

        Args:
            name: Canonical name of the parameter.
            shape: Shape of the parameter.
            left: [batch, terms, rows], any strides.
            right: [batch, terms, columns], any strides.
            start: First coordinate of the matrix in the parameter.
            first: The row of the first sample.

        Returns:
            The rows in which a sum was NaN or infinite.
        """
        totals = self.totals[first : first + len(left)]
        bad = self._core.add_outer(
            name, list(shape), start, left, right, totals, self._threads
        )
        return [first + row for row in bad]

    def add_lookup(
        self,
        name: str,
        shape: Sequence[int],
        indices: NDArray[np.int64],
        values: NDArray[np.float32],
        ignored: int | None,
    ) -> list[int]:
        """Adds, for each sample, values[t] to row indices[t] of a table.

        Args:
            name: Canonical name of the table.
            shape: [rows, width] of the table.
            indices: [batch, terms].
            values: [batch, terms, width].
            ignored: The index whose terms are left out.

        Returns:
            The rows in which a sum was NaN or infinite.
        """
        return self._core.add_lookup(
            name,
            list(shape),
            np.ascontiguousarray(indices),
            np.ascontiguousarray(values),
            ignored,
            self.totals,
            self._threads,
        )

    def rows(self) -> NDArray[np.float32]:
        """The rows so far, rounded to float32.

        Raises:
            NotFiniteError: If one exceeds float32.
        """
        with np.errstate(over="ignore"):
            rows = self.totals.astype(np.float32)
        _arrays.finite("the sketch", rows)
        return rows


def _gradient(name: str, value: Any) -> NDArray[Any]:
    """A gradient as an array of float32, float16, or bfloat16 seen as uint16."""
    if hasattr(value, "detach") and hasattr(value, "cpu"):
        tensor = value.detach().cpu()
        if str(tensor.dtype) == "torch.bfloat16":
            array = tensor.contiguous().view(_uint16(tensor)).numpy()
            return _sized(name, array)
        value = tensor.numpy()
    if not isinstance(value, np.ndarray) or value.dtype not in (np.float32, np.float16):
        raise DtypeError(
            f"{name} must be float32, float16 or bfloat16, got {_arrays.describe(value)}"
        )
    return _sized(name, value)


def _uint16(tensor: Any) -> Any:
    """torch.uint16, without importing torch here: whoever made the tensor has."""
    return sys.modules["torch"].uint16


def _sized(name: str, array: NDArray[Any]) -> NDArray[Any]:
    if array.ndim == 0 or array.shape[0] == 0:
        raise ShapeError(
            f"{name} must be [batch, ...] with at least one row, got {list(array.shape)}"
        )
    return array
