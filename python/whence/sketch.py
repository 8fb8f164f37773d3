"""`Sketch`: per-sample gradients to rows of a fixed width."""

from __future__ import annotations

import copy
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from whence import _arrays, _core
from whence._interrupts import interruptible
from whence.errors import (
    ArgumentError,
    DtypeError,
    MismatchError,
    NotFiniteError,
    ShapeError,
)

KINDS = (
    "chunked_sjlt",
    "sjlt",
    "rademacher",
    "gaussian",
    "srht",
    "tensorsketch",
    "kronecker",
    "grass",
    "factgrass",
)
"""The kinds of sketch there are."""

LAYOUTS = ("global", "per_layer")
"""Whether layers are summed into one row, or have a part of it each."""

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
    """A random linear map from gradients to rows of float32 values.

    The inner product of two rows estimates that of the gradients x and y without bias. Where
    nothing else is said, its variance is at most `(|x|²|y|² + (x·y)²) / dim`. Costs are per
    coordinate of a gradient that is there; a matrix parameter has rows, its first size, and
    columns, all others, and is a sum of outer products of factors in a linear layer.

    `chunked_sjlt`, O(1), at the speed of memory
        The sparse Johnson-Lindenstrauss transform with one nonzero a column (Kane and Nelson,
        "Sparser Johnson-Lindenstrauss transforms", JACM 2014; also known as CountSketch), hashed
        by chunks: 16 neighbouring coordinates of a parameter go to 16 neighbouring buckets, in one
        of 16 orders, with a sign each. Variance `(1/dim) Σ (x_i² y_j² + x_i y_i x_j y_j)` over
        i, j in different chunks.
    `sjlt`, O(nonzeros)
        Every coordinate has an offset of its own in each of `nonzeros` equal parts of the row,
        and values ±1/√nonzeros (Kane and Nelson). The same sum over all i ≠ j, for any number of
        nonzeros; with more the tails are lighter, where few coordinates carry a gradient.
    `rademacher`, `gaussian`, O(dim)
        All entries ±1/√dim (Achlioptas, "Database-friendly random projections", JCSS 2003), or
        normal of variance 1/dim (Indyk and Motwani, STOC 1998); the matrix is never stored. The
        same sum over all i ≠ j, and with normal entries the bound itself.
    `srht`, O(log dim)
        Blocks of coordinates get random signs, a Walsh-Hadamard transform, and `dim` of its
        values are kept (Ailon and Chazelle, SIAM J. Comput. 2009; in blocks Balabanov et al., ICML
        2023). The same sum, in which pairs inside a block of n = 2^⌈log2 dim⌉ count
        (n - dim)/(n - 1): nothing if dim is a power of two.
    `tensorsketch`, O(1), and O(dim log dim) a position in a linear layer
        An entry's offset is the sum of those of its row and its column, so that outer products
        are convolutions, by a fast Fourier transform (Pham and Pagh, KDD 2013): for wide layers
        with few positions an example. Up to three times the bound for matrices of rank one.
    `kronecker`, O(√dim)
        Rows and columns are projected by signs to k and dim/k values, k the largest divisor up to
        √dim (LoGra, Choe et al., arXiv 2405.13954; TrackStar, Chang et al., arXiv 2410.17413).
        Cheap on wide layers, and worse where few directions dominate: for matrices of rank one
        whose sides have cosines a and b the variance is up to
        `(a² + (1+a²)/k)(b² + (1+b²)k/dim) - a²b²`. A vector goes the way of `chunked_sjlt`.
    `grass`, `factgrass`, less than O(1)
        4 dim of a parameter's coordinates, or 2√dim of its rows and of its columns, one of each of
        as many equal strata, are kept and scaled, then sketched by a CountSketch, or by chunks (Hu
        et al., "GraSS", arXiv 2505.18976, whose masks are not scaled). The bound and a quarter
        more for evenly spread gradients, and far more for uneven ones. What is not kept is not
        looked at, so a NaN in it is not noticed. A vector goes the way of `grass`.

    What a coordinate is mapped to depends only on the seed, its parameter's canonical name and
    shape, and its place in the parameter: other layers can come and go. From the same arrays the
    rows are the same bits for any number of threads, batch split and instruction set, and on any
    machine.

    Args:
        kind: One of `KINDS`.
        dim: Width of a row, 1 to 1,048,576; with layout="per_layer" that of a layer's part. The
            standard deviation of a cosine is about `sqrt(1 / dim)`: 0.016 at 4096.
        seed: 0 to 2**64 - 1.
        nonzeros: For kind="sjlt": 1 (the default), 2, 4 or 8 nonzeros a column.
        kinds: Patterns (`fnmatch`) of canonical parameter names, each with the kind that its
            parameters have instead of `kind`; the first that fits counts.
        normalize: Whether rows are divided by their norm, so that inner products estimate
            cosines; a row of zeros stays one.
        layout: "global": layers are summed, which at equal length keeps inner products best.
            "per_layer": each layer has `dim` columns of its own, in the order of the layers'
            sorted names.
        threads: How many threads a call uses; None means all processors.

    Raises:
        ArgumentError: If an argument is out of range, or two do not go together.

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
        nonzeros: int | None = None,
        kinds: Mapping[str, str] | None = None,
        normalize: bool = False,
        layout: str = "global",
        threads: int | None = None,
    ) -> None:
        self._kind = _arrays.choice("kind", kind, KINDS)
        self._dim = _arrays.integer("dim", dim, 1, _core.MAX_DIM)
        self._seed = _arrays.integer("seed", seed, 0, 2**64 - 1)
        self._kinds = _kinds(kinds)
        used = {self._kind, *self._kinds.values()}
        if nonzeros is not None and "sjlt" not in used:
            raise ArgumentError(f"nonzeros must be None for kind={kind!r}, got {nonzeros!r}")
        self._nonzeros = 1 if nonzeros is None else _arrays.integer("nonzeros", nonzeros, 1, 8)
        if not isinstance(normalize, bool):
            raise DtypeError(f"normalize must be a bool, got {_arrays.describe(normalize)}")
        self._normalize = normalize
        self._layout = _arrays.choice("layout", layout, LAYOUTS)
        self._threads = _arrays.threads(threads)
        self._cores = {
            each: _core.Sketch(each, self._dim, self._seed, self._nonzeros) for each in sorted(used)
        }

    @classmethod
    def from_spec(cls, spec: Mapping[str, Any], *, threads: int | None = None) -> Sketch:
        """The map that a store says its rows were made with.

        Raises:
            MismatchError: If this version of whence does not have that map.
        """
        if spec.get("hash_version") != HASH_VERSION:
            raise MismatchError(
                f"hash_version of the store's sketch must be {HASH_VERSION!r}, as in this version "
                f"of whence, got {spec.get('hash_version')!r}"
            )
        apart = ("hash_version", "layers")  # layers are those of the model, not of the map
        given = {name: value for name, value in spec.items() if name not in apart}
        try:
            return cls(**given, threads=threads)
        except (TypeError, ArgumentError) as error:
            raise MismatchError(
                f"the store's sketch must be one of this version of whence, got {given}: {error}"
            ) from None

    @property
    def kind(self) -> str:
        """The kind of map."""
        return self._kind

    @property
    def dim(self) -> int:
        """The width of a row, or of a layer's part of it."""
        return self._dim

    @property
    def seed(self) -> int:
        """The seed."""
        return self._seed

    @property
    def layout(self) -> str:
        """One of `LAYOUTS`."""
        return self._layout

    @property
    def normalize(self) -> bool:
        """Whether rows are divided by their norm."""
        return self._normalize

    @property
    def spec(self) -> dict[str, Any]:
        """All that defines the map: the arguments that are not the default, and hash_version."""
        spec: dict[str, Any] = {
            "kind": self._kind,
            "dim": self._dim,
            "seed": self._seed,
            "hash_version": HASH_VERSION,
        }
        if self._nonzeros != 1:
            spec["nonzeros"] = self._nonzeros
        if self._kinds:
            spec["kinds"] = dict(self._kinds)
        if self._normalize:
            spec["normalize"] = True
        if self._layout != "global":
            spec["layout"] = self._layout
        return spec

    def __repr__(self) -> str:
        shown = {name: value for name, value in self.spec.items() if name != "hash_version"}
        kind = shown.pop("kind")
        return f"Sketch({kind!r}, {', '.join(f'{n}={v!r}' for n, v in shown.items())})"

    def __reduce__(self) -> Any:
        return _restored, (self.spec, self._threads)

    def kind_of(self, name: str) -> str:
        """The kind of the parameter of this canonical name."""
        for pattern, kind in self._kinds.items():
            if name == pattern or fnmatchcase(name, pattern):
                return kind
        return self._kind

    def layers(self, names: Iterable[str]) -> list[str]:
        """The layers that have a part of the row each, in order; [""] if all are summed.

        Args:
            names: The canonical names of all parameters.
        """
        if self._layout == "global":
            return [""]
        return sorted({layer_of(name) for name in names})

    def unused_kinds(self, names: Iterable[str]) -> list[str]:
        """The patterns of `kinds` that fit none of these names."""
        names = list(names)
        return [
            pattern
            for pattern in self._kinds
            if not any(name == pattern or fnmatchcase(name, pattern) for name in names)
        ]

    def resolved(self, names: Iterable[str]) -> Sketch:
        """The same map for these parameters, with `kinds` by their names instead of patterns."""
        kinds = {name: self.kind_of(name) for name in sorted(names)}
        kinds = {name: kind for name, kind in kinds.items() if kind != self._kind}
        spec = {**self.spec, "kinds": kinds}
        del spec["hash_version"]
        if "sjlt" not in {self._kind, *kinds.values()}:
            spec.pop("nonzeros", None)
        return Sketch(**spec, threads=self._threads)

    def with_threads(self, threads: int | None) -> Sketch:
        """The same map, computed by as many threads."""
        found = copy.copy(self)
        found._threads = _arrays.threads(threads)
        return found

    def accumulator(self, batch: int, names: Iterable[str]) -> Accumulator:
        """Running totals of a batch, for a model with parameters of these names."""
        return Accumulator(self, batch, self.layers(names))

    def expected_error(self, cosine: float = 0.0) -> float:
        """The standard deviation of an inner product, relative to the product of the norms.

        Args:
            cosine: The cosine of the two gradients, from -1 to 1.

        Returns:
            `sqrt((1 + cosine²) / dim)`. For `kronecker` that of matrices of rank one, the worst
            there is; for `grass` and `factgrass` that of evenly spread gradients, √1.25 times as
            much. With several kinds the largest. For normalized rows it is smaller by
            `(1 - cosine²) / sqrt(1 + cosine²)` (Li and Li, "OPORP: One permutation + one random
            projection", arXiv 2302.03505).

        Raises:
            ArgumentError: If cosine is not from -1 to 1.
        """
        cosine = _arrays.number("cosine", cosine)
        if not -1 <= cosine <= 1:
            raise ArgumentError(f"cosine must be from -1 to 1, got {cosine}")
        square = cosine**2
        variance = max(self._variance(kind, square) for kind in self._cores)
        if self._normalize:
            variance *= (1 - square) ** 2 / (1 + square)
        return math.sqrt(variance)

    def _variance(self, kind: str, square: float) -> float:
        """That of an inner product of unit gradients whose cosine has this square."""
        if kind == "kronecker":
            left = max(k for k in range(1, math.isqrt(self._dim) + 1) if self._dim % k == 0)
            right = self._dim // left
            sides = ((square, 1.0, left, right), (square, 1.0, right, left))
            return max(
                (a + (1 + a) / k) * (b + (1 + b) / other) - square for a, b, k, other in sides
            )
        share = 1.25 if kind in ("grass", "factgrass") else 1.0
        return share * (1 + square) / self._dim

    def _finish(self, totals: NDArray[np.float64]) -> NDArray[np.float32]:
        """Totals as rows: divided by their norm if the map says so, rounded to float32."""
        if self._normalize:
            norms = np.linalg.norm(totals, axis=1, keepdims=True)
            totals = np.divide(totals, norms, out=np.zeros_like(totals), where=norms > 0)
        with np.errstate(over="ignore", invalid="ignore"):
            return totals.astype(np.float32)

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
            [batch, dim] float32, or [batch, layers · dim] with layout="per_layer". Parameters are
            summed in the order of their sorted canonical names, so a dict and a flat array give
            the same bits. O(batch · parameters) time for the sparse kinds.

        Raises:
            DtypeError: If an array is of another type.
            ShapeError: If shapes do not fit, or the batch is empty.
            ArgumentError: If two parameters have the same canonical name, or layout is given
                with a dict.
            NotFiniteError: If a row is not finite.
        """
        parts = self._parts(gradients, layout)
        batch = parts[0][2].shape[0]
        accumulator = Accumulator(self, batch, self.layers(name for name, _, _ in parts))
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


def _restored(spec: dict[str, Any], threads: int) -> Sketch:
    """What was pickled, if this version of whence has it."""
    return Sketch.from_spec(spec, threads=threads)


def layer_of(name: str) -> str:
    """The layer of a parameter: its name without the last part.

    >>> layer_of("blocks.0.attention.weight")
    'blocks.0.attention'
    """
    return name.rpartition(".")[0]


def _kinds(kinds: Any) -> dict[str, str]:
    """Pattern -> kind.

    Raises:
        DtypeError: If it is not a mapping of strings.
        ArgumentError: If a kind is not one of `KINDS`.
    """
    if kinds is None:
        return {}
    if not isinstance(kinds, Mapping) or not all(isinstance(each, str) for each in kinds):
        raise DtypeError(
            f"kinds must be a dict of name pattern to kind, got {_arrays.describe(kinds)}"
        )
    return {name: _arrays.choice(f"kinds[{name!r}]", kinds[name], KINDS) for name in kinds}


class Accumulator:
    """Running float64 totals of the rows of one batch, to which parts of gradients are added.

    Args:
        sketch: The map.
        batch: How many rows.
        layers: The layers that have a part of the row each, as `Sketch.layers` returns them.
    """

    def __init__(self, sketch: Sketch, batch: int, layers: Sequence[str] = ("",)) -> None:
        self.totals = np.zeros((batch, len(layers) * sketch.dim), np.float64)
        self._sketch = sketch
        self._threads = sketch._threads
        self._first = {layer: index * sketch.dim for index, layer in enumerate(layers)}

    def _place(self, name: str) -> tuple[_core.Sketch, int]:
        """The map of a parameter, and the first column of its layer."""
        layer = "" if self._sketch.layout == "global" else layer_of(name)
        return self._sketch._cores[self._sketch.kind_of(name)], self._first[layer]

    def add(
        self, name: str, shape: Sequence[int], values: NDArray[Any], start: int = 0
    ) -> list[int]:
        """Adds [batch, width] values at the coordinates from `start` on.

        Returns:
            The rows in which a sum was NaN or infinite.
        """
        bfloat16 = values.dtype == np.uint16
        if values.shape[1] > 1 and values.strides[1] != values.itemsize:
            values = interruptible(np.ascontiguousarray, values)
        core, column = self._place(name)
        return core.add_flat(
            name, list(shape), start, values, self.totals, self._threads, column, bfloat16=bfloat16
        )

    def add_outer(
        self,
        name: str,
        shape: Sequence[int],
        left: NDArray[np.float32],
        right: NDArray[np.float32],
        start: int = 0,
        first: int = 0,
        total: NDArray[np.float32] | None = None,
        bias: tuple[str, list[int], int] | None = None,
    ) -> list[int]:
        """Adds, for each sample, the matrix Σ_t left[t] right[t]ᵀ at the coordinates from `start`.

        Args:
            name: Canonical name of the parameter.
            shape: Shape of the parameter.
            left: [batch, terms, rows], any strides.
            right: [batch, terms, columns], any strides.
            start: First coordinate of the matrix in the parameter.
            first: The row of the first sample.
            total: [rows, columns], to which the sum of all samples' matrices is added.
            bias: Name, shape and first coordinate of a parameter of the same kind and layer, to
                which Σ_t left[t] is added.

        Returns:
            The rows in which a sum was NaN or infinite.
        """
        totals = self.totals[first : first + len(left)]
        core, column = self._place(name)
        bad = core.add_outer(
            name, list(shape), start, left, right, totals, self._threads, column, total, bias
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
        core, column = self._place(name)
        return core.add_lookup(
            name,
            list(shape),
            np.ascontiguousarray(indices),
            np.ascontiguousarray(values),
            ignored,
            self.totals,
            self._threads,
            column,
        )

    def finish(self, totals: NDArray[np.float64]) -> NDArray[np.float32]:
        """Totals as rows, as the map says."""
        return self._sketch._finish(totals)

    def rows(self) -> NDArray[np.float32]:
        """The rows so far, as float32.

        Raises:
            NotFiniteError: If one exceeds float32.
        """
        rows = self.finish(self.totals)
        _arrays.finite("the sketch", rows)
        return rows


def _gradient(name: str, value: Any) -> NDArray[Any]:
    """A gradient as an array of float32, float16, or bfloat16 seen as uint16; without a copy.

    Raises:
        DtypeError: If it is of another type, or not in the processor's memory.
    """
    if hasattr(value, "detach") and hasattr(value, "cpu"):
        tensor = value.detach().cpu()
        if str(tensor.dtype) == "torch.bfloat16":
            array = tensor.contiguous().view(_uint16(tensor)).numpy()
            return _sized(name, array)
        value = tensor.numpy()
    elif not isinstance(value, (np.ndarray, np.generic, list, tuple, str)):
        value = _foreign(value)
    if isinstance(value, np.ndarray) and value.dtype.name == "bfloat16":  # of ml_dtypes, as jax has
        return _sized(name, np.ascontiguousarray(value).view(np.uint16))
    if not isinstance(value, np.ndarray) or value.dtype not in (np.float32, np.float16):
        raise DtypeError(
            f"{name} must be float32, float16 or bfloat16, got {_arrays.describe(value)}"
        )
    return _sized(name, value)


def _foreign(value: Any) -> Any:
    """An array of another library by DLPack or the buffer protocol; anything else as it is."""
    try:
        if hasattr(value, "__dlpack__"):
            return np.from_dlpack(value)
        return np.asarray(memoryview(value))
    except (TypeError, ValueError, BufferError, RuntimeError):
        return np.asarray(value) if hasattr(value, "__array__") else value


def _uint16(tensor: Any) -> Any:
    """torch.uint16, without importing torch here: whoever made the tensor has."""
    return sys.modules["torch"].uint16


def _sized(name: str, array: NDArray[Any]) -> NDArray[Any]:
    if array.ndim == 0 or array.shape[0] == 0:
        raise ShapeError(
            f"{name} must be [batch, ...] with at least one row, got {list(array.shape)}"
        )
    return array
