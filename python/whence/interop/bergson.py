"""bergson: the gradients in an index, and those of a query index.

What `bergson.data.create_index` and `create_token_index` of bergson 2.5.1 write, read off its
source:

    gradients.bin          [num_grads, Σ grad_sizes], no header: for each row the projected gradient
                           of one module after the other, in the order of `grad_sizes`
    info.json              "num_grads", "grad_sizes", "base_dtype", "num_items", "attribute_tokens"
    offsets.npy            [num_items + 1] where the tokens of each document begin, if there is a
                           row for each token
    processor_config.yaml  how gradients were projected
    hessians.pth           their second moments, where they were collected
    config.yaml            the run: how gradients were processed before they were stored

Earlier versions wrote a structured type as "dtype", whose fields lie in the same way.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from whence import _arrays, _core
from whence.errors import ArgumentError, MismatchError, NotFiniteError, StoreError
from whence.interop.folders import blocks, counted, filled, folder, read_all, read_object, width
from whence.interop.hessian import INVERSIONS, Hessian, read_hessian
from whence.interop.rows import Imported
from whence.store.files import npy_header, store_errors, sync

TYPES = {
    "float16": "float16",
    "<f2": "float16",
    "float32": "float32",
    "<f4": "float32",
    "float64": "float64",
    "<f8": "float64",
    "bfloat16": "bfloat16",
    "<V2": "bfloat16",
    "|V2": "bfloat16",
}
"""The types of stored values, by the names they have been given."""

SIZES = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}

PROJECTION = {
    "projection_dim": "null",
    "projection_type": "normal",
    "projection_scale": "row_norm",
    "projection_seed": "null",
    "projection_target": "per_module",
    "include_bias": "false",
    "projection_version": "1",
}
"""What gradients must agree in to be compared, and what bergson takes for what is not said."""

PLAIN = {"projection_dim": "null"}
"""Of gradients that were not projected."""

INDEX = ("gradients.bin", "info.json")

EPSILON = float(np.finfo(np.float32).eps)
"""What bergson adds to the norm of a query before it divides by it."""

SHORTEST = float(np.finfo(np.float32).tiny)
"""The norm below which a row counts as zero, and has no direction."""

DOT = (
    "loss per unit of learning rate: what one step of gradient descent on the example takes off "
    "the query's loss, to first order, as far as projected gradients show it"
)
PRECONDITIONED = "inner product of gradients, one of them times the inverse of the Hessian"
COSINE = "cosine of both gradients, whatever their lengths"


def from_bergson(
    path: str | os.PathLike[str],
    *,
    unit_norm: bool = False,
    modules: Sequence[str] | None = None,
    hessian: str | os.PathLike[str] | None = None,
    inversion: str = "damped_inverse",
    damping_factor: float = 0.1,
    converted: str | os.PathLike[str] | None = None,
    ids: Any = None,
    columns: Mapping[str, Any] | None = None,
) -> BergsonGradients:
    """The gradients of a bergson index, whose scores are those of bergson's `Attributor`.

    A row is the projected gradients g of all modules side by side, in the order of the index, and a
    query q is laid out alike. Scores are as `bergson.Attributor.search` of bergson 2.5.1 has them
    without faiss, with H the Hessian and its inverse as `inversion` says:

        unit_norm=False:  q · g,  with a Hessian  (H⁻¹ q) · g
        unit_norm=True:   q / (|q| + ε) · g / |g|,  with a Hessian that of H⁻½ q and H⁻½ g

    with ε = 2⁻²³, and sums over `modules` alone where those are given (norms over all). Queries are
    given as they are stored; `search`, `scores` and a `whence.Index` apply to them what is said
    above. (The command `bergson query` has unit_norm=True unless told otherwise.)

    bergson stores gradients of the loss and calls a large inner product influential, which is
    positive = helpful; nothing is turned around. The reverse sign that bergson's score files of
    unrolled training have (`higher_is_better=False`) does not occur in gradients.

    Args:
        path: The folder of the index.
        unit_norm: Whether scores are cosines.
        modules: The modules whose products are summed; None for all.
        hessian: A folder of bergson with a dense Hessian, often that of the index itself; None for
            none. Needs torch.
        inversion: How the Hessian is inverted, by bergson's names: with λ an eigenvalue and c the
            damping factor "damped_inverse", 1 / (λ + c mean λ); "absolute_damped_inverse",
            1 / (λ + c); "pseudoinverse", 1 / λ where λ > c mean λ; "tikhonov_filtered",
            λ / (λ² + (c mean λ)²); "factored_tikhonov", which is "damped_inverse" here.
        damping_factor: c, not negative.
        converted: A new file for the rows of an index in bfloat16 or float64, which are not
            searched as they are: float32 in a `.npy` file. None for memory. Not written for others.
        ids: [rows] int64 or str, distinct; None for bergson's: the numbers of the rows.
        columns: name -> [rows] bool, int64, float64 or str. An index with a row for each token
            (`attribute_tokens`) has the columns "document" and "token" besides.

    Raises:
        ArgumentError: If an argument has another value, a module is not in the index, a column has
            the name of one that is there, or something is at `converted`.
        DtypeError: If an argument is of another type.
        ShapeError: If `ids` or `columns` do not have one value each.
        IdError: If ids repeat, or are of no one kind.
        StoreError: If the folder is none of bergson's or damaged.
        MismatchError: If the Hessian is factored, of other modules or projected otherwise, or the
            index was preconditioned before it was stored.
        MissingDependencyError: If a Hessian is asked for and torch is not installed.
        NotFiniteError: If the Hessian or its inverse is not finite, or with `unit_norm` a row is
            not (bergson takes such a row for zero).

    O(rows) time and memory for float16 and float32, whose gradients stay in their file. One pass
    over them for `unit_norm`, O(rows · dim), times the size of a module with a Hessian, which takes
    the cube of that. bfloat16 and float64 become 4 bytes a value, in memory twice while they do.

    Examples:
        >>> index = whence.interop.from_bergson("runs/index", unit_norm=True)  # doctest: +SKIP
        >>> hits = index.search(index.queries("runs/query"), k=10)  # doctest: +SKIP
    """
    return BergsonGradients(
        path,
        unit_norm=unit_norm,
        modules=modules,
        hessian=hessian,
        inversion=inversion,
        damping_factor=damping_factor,
        converted=converted,
        ids=ids,
        columns=columns,
    )


class _Stored:
    """The gradients in a folder, as their description has them.

    Attributes:
        path: The folder.
        file: That of the gradients.
        sizes: module -> how many values it has in a row, in their order.
        shape: Of the gradients.
        kind: The type of a value.
        offsets: [documents + 1] where each begins, of a row for each token; None of one for each
            example.

    Raises:
        DtypeError: If the path is none.
        StoreError: If the folder is none of bergson's or damaged.
    """

    def __init__(self, name: str, path: str | os.PathLike[str]) -> None:
        self.path = folder(name, path, "bergson", *INDEX)
        self.file = self.path / INDEX[0]
        info = self.path / INDEX[1]
        described = read_object(info)
        sizes = described.get("grad_sizes")
        if not isinstance(sizes, dict):
            raise StoreError(f"{info} must give 'grad_sizes', got {_arrays.describe(sizes)}")
        self.sizes = {module: counted(info, sizes, module, 1) for module in sizes}
        self.shape = (counted(info, described, "num_grads", 1), sum(self.sizes.values()))
        width(info, self.shape[1])
        self.kind = _kind(info, described)
        filled(self.file, 0, self.shape, SIZES[self.kind])
        self.offsets: NDArray[np.int64] | None = None
        if described.get("attribute_tokens", False):
            documents = counted(info, described, "num_items", 1)
            self.offsets = _offsets(self.path / "offsets.npy", documents, self.shape[0])

    def blocks(self) -> Iterator[tuple[int, NDArray[np.float32]]]:
        """(first row, rows) of all rows, some at a time."""
        return blocks(self.file, 0, self.shape, self.kind)

    @property
    def projection(self) -> dict[str, str] | None:
        """How gradients were projected, in the words of the file; None if nothing says so."""
        file = self.path / "processor_config.yaml"
        return _projection(file) if file.exists() else None

    @property
    def preconditioned(self) -> str | None:
        """The Hessian by which gradients were multiplied before they were stored, if any was."""
        file = self.path / "config.yaml"
        if not file.exists():
            return None
        # The block under the first such key, written by yaml.safe_dump: deeper lines follow it.
        block = re.search(r"^( *)(?:- )?preprocess_cfg:\n((?:\1 +.*\n?)*)", _text(file), re.M)
        found = re.search(r"^ *hessian_path: (.+)$", block[2], re.M) if block else None
        return None if found is None or found[1] in ("null", "''") else found[1]


def _kind(info: Path, described: dict[str, Any]) -> str:
    """The type of a value.

    Raises:
        StoreError: If it is none that bergson writes.
    """
    named = described.get("base_dtype")
    if named is None:  # of a structured type, "(16,)<f4" for each module
        formats = described.get("dtype")
        formats = formats.get("formats") if isinstance(formats, dict) else None
        first = formats[0] if isinstance(formats, list) and formats else None
        named = re.sub(r"^\(\d+,\)", "", first) if isinstance(first, str) else None
    if not isinstance(named, str) or named not in TYPES:
        raise StoreError(
            f"{info} must give 'base_dtype' as one of {', '.join(SIZES)}, "
            f"got {_arrays.describe(named)}"
        )
    return TYPES[named]


def _offsets(file: Path, documents: int, rows: int) -> NDArray[np.int64]:
    """[documents + 1] where each begins among so many rows.

    Raises:
        StoreError: If the file is not there, or damaged.
    """
    shape, dtype, offset = npy_header(file)
    if shape != (documents + 1,) or dtype.str != "<i8":
        raise StoreError(
            f"{file} must hold int64 of shape {[documents + 1]}, got {dtype} of shape {list(shape)}"
        )
    with store_errors(file), file.open("rb") as opened:
        opened.seek(offset)
        found = np.fromfile(opened, "<i8", documents + 1)
    if (
        len(found) != documents + 1
        or found[0] != 0
        or found[-1] != rows
        or np.diff(found).min() < 0
    ):
        raise StoreError(f"{file} is damaged: offsets must rise from 0 to {rows}")
    return found


def _text(file: Path) -> str:
    with store_errors(file):
        content = file.read_bytes()
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise StoreError(f"{file} is damaged: {error}") from None


def _projection(file: Path) -> dict[str, str]:
    """How gradients were projected, in the words of the file."""
    said = dict(re.findall(r"^(\w+): (.*)$", _text(file), re.M))
    found = {name: said.get(name, default) for name, default in PROJECTION.items()}
    if found["projection_dim"] in ("0", "null"):
        return dict(PLAIN)  # the others say nothing then
    return found


def _check_projection(name: str, projection: dict[str, str] | None, path: Path) -> None:
    """Nothing, if what lies in a folder was projected as the index was.

    Raises:
        MismatchError: If it was not.
    """
    file = path / "processor_config.yaml"
    other = _projection(file) if file.exists() else None
    if projection == other or all(known in (None, PLAIN) for known in (projection, other)):
        return
    unknown = {"projection_dim": "unknown"}
    mine, theirs = projection or unknown, other or unknown
    said = [key for key in PROJECTION if mine.get(key) != theirs.get(key)]
    differ = ", ".join(
        f"{key} {theirs.get(key)} where the index has {mine.get(key)}" for key in said
    )
    raise MismatchError(f"{name} must be projected as the index is, got {path} with {differ}")


class BergsonGradients(Imported):
    """The gradients of a bergson index, open for search; arguments and errors as `from_bergson`.

    Attributes:
        grad_sizes: module -> how many values it has in a row, in their order.
        modules: Those whose products are summed.
        unit_norm: Whether scores are cosines.
    """

    grad_sizes: Mapping[str, int]
    modules: list[str]
    unit_norm: bool

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        unit_norm: bool = False,
        modules: Sequence[str] | None = None,
        hessian: str | os.PathLike[str] | None = None,
        inversion: str = "damped_inverse",
        damping_factor: float = 0.1,
        converted: str | os.PathLike[str] | None = None,
        ids: Any = None,
        columns: Mapping[str, Any] | None = None,
    ) -> None:
        self.unit_norm = _arrays.boolean("unit_norm", unit_norm)
        _arrays.choice("inversion", inversion, INVERSIONS)
        damping = _arrays.number("damping_factor", damping_factor)
        if damping < 0:
            raise ArgumentError(f"damping_factor must not be negative, got {damping}")
        stored = _Stored("path", path)
        count, dim = stored.shape
        self.grad_sizes = MappingProxyType(stored.sizes)
        self.modules = self._chosen(modules)
        self._keep = np.repeat(
            [name in self.modules for name in stored.sizes], list(stored.sizes.values())
        )
        self._projection, self._hessian = stored.projection, None
        method = f"{'cosine' if self.unit_norm else 'inner product'} of bergson's gradients"
        if hessian is not None:
            self._hessian = self._read_hessian(stored, hessian, inversion, damping)
            method += f", preconditioned by {_arrays.path('hessian', hessian)}"
        if len(self.modules) < len(stored.sizes):
            method += f", of modules {', '.join(self.modules)}"
        scales = self._directions(stored) if self.unit_norm else np.ones(count, np.float32)
        core, files = _rows(stored, scales, converted)
        columns = _with_tokens(columns, stored.offsets)
        unit = COSINE if self.unit_norm else DOT if hessian is None else PRECONDITIONED
        super().__init__(
            stored.path,
            core,
            files,
            count,
            dim,
            checkpoints=["rows"],
            method=method,
            unit=unit,
            ids=ids,
            columns=columns,
        )

    def __repr__(self) -> str:
        return (
            f"<bergson gradients {str(self.path)!r}: {len(self)} rows of {self.dim}, "
            f"{len(self.grad_sizes)} modules{', unit norm' * self.unit_norm}>"
        )

    def queries(self, path: str | os.PathLike[str]) -> NDArray[np.float32]:
        """[queries, dim] the gradients of a query index, its modules in the order of this one.

        Raises:
            DtypeError: If the path is none.
            StoreError: If the folder is none of bergson's or damaged.
            MismatchError: If modules differ, gradients were projected otherwise, or they would be
                preconditioned twice.
        """
        stored = _Stored("path", path)
        for name, size in self.grad_sizes.items():
            if stored.sizes.get(name) != size:
                raise MismatchError(
                    f"queries must have {size} values of module {name!r}, "
                    f"got {stored.sizes.get(name)} in {stored.path}"
                )
        _check_projection("queries", self._projection, stored.path)
        if self._hessian is not None and stored.preconditioned is not None:
            raise MismatchError(
                "queries must be stored without a Hessian to be multiplied by one, got "
                f"{stored.path} with that of {stored.preconditioned}"
            )
        rows = read_all(stored.file, 0, stored.shape, stored.kind)
        if list(stored.sizes) == list(self.grad_sizes):
            return rows
        ends = dict(zip(stored.sizes, np.cumsum(list(stored.sizes.values())), strict=True))
        parts = [rows[:, ends[name] - size : ends[name]] for name, size in self.grad_sizes.items()]
        return np.concatenate(parts, axis=1)

    def query_rows(self, queries: Any) -> NDArray[np.float32]:
        """[1, queries, dim] checked gradients, with what `from_bergson` says applied to them.

        Raises:
            WhenceError: As `Store.search`, of its queries.
        """
        checked = super().query_rows(queries)
        if self._hessian is None and not self.unit_norm and self._keep.all():
            return checked
        rows: NDArray[np.float64] = checked[0].astype(np.float64)
        if self._hessian is not None:
            rows = self._hessian.root(rows) if self.unit_norm else self._hessian.inverse(rows)
        if self.unit_norm:
            rows /= np.linalg.norm(rows, axis=1, keepdims=True) + EPSILON
        rows[:, ~self._keep] = 0
        if self._hessian is not None and self.unit_norm:
            rows = self._hessian.root(rows)  # the root that rows in files have not been given
        with np.errstate(over="ignore"):
            found = rows.astype(np.float32)[None]
        _arrays.finite("queries, preconditioned,", found)
        return found

    def _chosen(self, modules: Sequence[str] | None) -> list[str]:
        """The modules asked for, in the order of the index."""
        if modules is None:
            return list(self.grad_sizes)
        if not _arrays.is_list(modules) or not len(modules):
            raise ArgumentError(f"modules must be a list of names, got {_arrays.describe(modules)}")
        for name in modules:
            _arrays.choice("modules", name, self.grad_sizes)
        return [name for name in self.grad_sizes if name in modules]

    def _read_hessian(
        self, stored: _Stored, hessian: str | os.PathLike[str], inversion: str, damping: float
    ) -> Hessian:
        """The Hessian asked for, which fits the index."""
        if stored.preconditioned is not None:
            raise MismatchError(
                "hessian must be None for gradients that were preconditioned before they were "
                f"stored, as these were by {stored.preconditioned}, got {hessian}"
            )
        path = folder("hessian", hessian, "bergson")
        found = read_hessian(path, self.grad_sizes, inversion, damping)
        _check_projection("hessian", self._projection, path)
        return found

    def _directions(self, stored: _Stored) -> NDArray[np.float32]:
        """[rows] one over the norm of each, preconditioned; 0 of rows of zeros.

        Raises:
            NotFiniteError: If a row is not finite.
        """
        scales = np.empty(stored.shape[0], np.float32)
        for first, block in stored.blocks():
            rows = block.astype(np.float64)
            if self._hessian is not None:
                rows = self._hessian.root(rows)
            norms = np.sqrt(np.einsum("ij,ij->i", rows, rows))
            bad = np.flatnonzero(~np.isfinite(norms))
            if len(bad):
                raise NotFiniteError(
                    f"gradients in {stored.path} must be finite, got {norms[bad[0]]} in row "
                    f"{first + bad[0]}"
                )
            there = norms >= SHORTEST
            scales[first : first + len(rows)] = np.where(there, 1 / np.where(there, norms, 1), 0)
        return scales


def _rows(
    stored: _Stored, scales: NDArray[np.float32], converted: str | os.PathLike[str] | None
) -> tuple[_core.Rows, list[Path]]:
    """Rows times scales, as the search engine takes them, and the files they are read from.

    Raises:
        ArgumentError: If something is at `converted`.
        StoreError: If it cannot be written.
    """
    count, dim = stored.shape
    if stored.kind in ("float16", "float32"):
        return _core.Rows([(stored.file, 0, count, None)], dim, stored.kind, scales), [stored.file]
    if converted is not None:
        path = _arrays.path("converted", converted)
        offset = _convert(stored, path)
        return _core.Rows([(path, offset, count, None)], dim, "float32", scales), [path]
    rows = np.empty(stored.shape, np.float32)
    for first, block in stored.blocks():
        place = slice(first, first + len(block))
        np.multiply(block, scales[place, None], out=rows[place])
    return _core.Rows.of(rows), []


def _convert(stored: _Stored, path: Path) -> int:
    """Writes a new `.npy` file of float32; it appears whole, or not at all. Where values begin."""
    if path.exists():
        raise ArgumentError(f"converted must be a new file, got {path}, which exists")
    temporary = path.with_name(f"{path.name}.part")
    described = {"descr": "<f4", "fortran_order": False, "shape": stored.shape}
    try:
        with store_errors(path), temporary.open("wb") as file:
            np.lib.format.write_array_header_1_0(file, described)
            offset = file.tell()
            for _, block in stored.blocks():
                file.write(block.data)
            file.flush()
            sync(file.fileno())
        with store_errors(path):
            temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return offset


def _with_tokens(
    columns: Mapping[str, Any] | None, offsets: NDArray[np.int64] | None
) -> Mapping[str, Any] | None:
    """Columns, and of a row for each token the numbers of its document and of itself in it.

    Raises:
        ArgumentError: If a column is given that is there.
    """
    if offsets is None or not isinstance(columns, (Mapping, type(None))):
        return columns
    lengths = np.diff(offsets)
    own = {
        "document": np.repeat(np.arange(len(lengths)), lengths),
        "token": np.arange(offsets[-1]) - np.repeat(offsets[:-1], lengths),
    }
    for name in own:
        if name in (columns or {}):
            raise ArgumentError(f"columns must not have {name!r}, which the index has, got it")
    return {**own, **(columns or {})}
