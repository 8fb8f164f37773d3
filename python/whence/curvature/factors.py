"""`Factors`: the curvature of a loss at one or several checkpoints, layer by layer."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from whence import _arrays
from whence._plain import line
from whence.curvature.basis import Directions, bases
from whence.curvature.kept import (
    describe_at,
    describe_directions,
    read_arrays,
    read_at,
    read_directions,
)
from whence.curvature.labels import LABELS
from whence.curvature.statistics import At, BlockStatistics, Covariance, Statistics
from whence.errors import ArgumentError, DtypeError, MismatchError, StoreError
from whence.gradients.blocks import LOOKUP, Block, Side
from whence.gradients.coordinates import Choice, Coordinates, to_arrays
from whence.gradients.preconditioned import LAYOUT, Prepared
from whence.gradients.reduction import REDUCTIONS
from whence.sketch import Sketch
from whence.store.files import (
    WRONG,
    read_json,
    store_errors,
    sync_directory,
    write_array,
    write_json,
)
from whence.store.manifest import sizes_of

FORMAT = "whence factors"
VERSION = 1
DESCRIPTION = "factors.json"
ENOUGH = 0.75
"""The share of unit rows' energy that a default basis holds."""

BITS = {"float32": 32, "float16": 16, "int8": 8, "int4": 4, "int2": 2, "int1": 1}
"""Bits of a stored value."""

STAGES = ("covariance", "eigenvalues", "basis")
"""What passes over the data have found, one after the other."""


@dataclass(frozen=True)
class Settings:
    """How factors are made into coordinates.

    Attributes:
        damping: What is added to the eigenvalues of a block, as a share of their mean.
        coordinates: How many are kept at each checkpoint.
        leading: The share of the eigenvectors of both sides of weights that may be used.
        corrected: Whether eigenvalues are EK-FAC's second moments, or K-FAC's products.
        residuals: "averaged" over checkpoints, or each checkpoint's "own".
    """

    damping: float
    coordinates: int
    leading: float = 1.0
    corrected: bool = True
    residuals: str = "averaged"

    @classmethod
    def of(
        cls, damping: Any, coordinates: Any, leading: Any, corrected: Any, residuals: Any
    ) -> Settings:
        """Settings that nobody has looked at yet.

        Raises:
            ArgumentError: If one is out of range.
            DtypeError: If one is of another type.
        """
        found = cls(
            _arrays.number("damping", damping, positive=True),
            _arrays.integer("coordinates", coordinates, 1),
            _arrays.number("leading", leading, positive=True),
            _arrays.boolean("corrected", corrected),
            _arrays.choice("residuals", residuals, ("averaged", "own")),
        )
        if found.leading > 1:
            raise ArgumentError(f"leading must be at most 1, got {leading}")
        return found


class Factors:
    """What `fit_factors` found; see there.

    Attributes:
        model: Digest and parameters of the model, as a store's manifest has them.
        settings: How coordinates are made.
        stage: "covariance", "eigenvalues" or "basis": how far fitting went.
        checkpoints: Factors at each checkpoint.
        directions: What rows are rotated onto; None before the stage "basis".
    """

    def __init__(
        self,
        model: dict[str, Any],
        reduction: str,
        labels: str,
        settings: Settings,
        checkpoints: Sequence[At],
        stage: str,
        directions: Directions | None = None,
    ) -> None:
        self.model = model
        self.reduction = reduction
        self.labels = labels
        self.settings = settings
        self.checkpoints = list(checkpoints)
        self.stage = stage
        self.directions = directions

    def __repr__(self) -> str:
        examples = max((at.statistics.examples[0] for at in self.checkpoints), default=0)
        kind = "EK-FAC" if self.settings.corrected else "K-FAC"
        return (
            f"<{kind} factors of {len(self.checkpoints)} checkpoints "
            f"{[at.name for at in self.checkpoints]} by {examples:,} examples, {self.stage}: "
            f"{self.settings.coordinates:,} coordinates, damping {self.settings.damping:g} of the "
            "mean eigenvalue>"
        )

    def eigenvalues(self, checkpoint: int = 0) -> dict[tuple[str, int, str], Tensor]:
        """Block -> [left, right] float64 eigenvalues Λ, per example.

        Raises:
            ArgumentError: If fitting did not go so far, or there is no checkpoint of this number.
        """
        self._need("eigenvalues")
        _arrays.integer("checkpoint", checkpoint, 0, len(self.checkpoints) - 1)
        statistics = self.checkpoints[checkpoint].statistics
        found = {}
        for key, known in statistics.known.items():
            if known.squares is None:
                raise ArgumentError(f"factors must have eigenvalues, got none of {key[0]}")
            corrected = self.settings.corrected or known.kronecker is None
            squares = known.squares / max(statistics.examples[1], 1)
            found[key] = squares if corrected or known.kronecker is None else known.kronecker
        return found

    def damped(self, checkpoint: int = 0) -> dict[tuple[str, int, str], tuple[Tensor, float]]:
        """Block -> eigenvalues, and what is added to them."""
        return {
            key: (values, self.settings.damping * float(values.mean()))
            for key, values in self.eigenvalues(checkpoint).items()
        }

    @cached_property
    def maps(self) -> list[Coordinates]:
        """The whitened coordinates that are kept, at each checkpoint."""
        return [self._chosen(index) for index in range(len(self.checkpoints))]

    def _chosen(self, checkpoint: int) -> Coordinates:
        """The coordinates of largest Λ / (Λ + damping)."""
        known = self.checkpoints[checkpoint].statistics.known
        damped = self.damped(checkpoint)
        shares = self._shares(checkpoint, damped)
        every = torch.cat([share.flatten() for share in shares])
        taken = torch.zeros(len(every), dtype=torch.bool)
        leading = torch.sort(every, descending=True, stable=True).indices
        taken[leading[: self._count(shares)]] = True
        masks = torch.split(taken, [share.numel() for share in shares])
        return Coordinates(
            [
                _choice(known[key].block, values, damping, mask.reshape(values.shape))
                for (key, (values, damping)), mask in zip(damped.items(), masks, strict=True)
            ]
        )

    def width(self, checkpoint: int = 0) -> int:
        """How many coordinates are kept at a checkpoint.

        Raises:
            ArgumentError: If fitting did not go so far, or none is above zero.
        """
        return self._count(self._shares(checkpoint, self.damped(checkpoint)))

    def _count(self, shares: list[Tensor]) -> int:
        found = sum(int((share > 0).sum()) for share in shares)
        if not found:
            raise ArgumentError("factors must have eigenvalues above zero, got none")
        return min(self.settings.coordinates, found)

    def _shares(
        self, checkpoint: int, damped: Mapping[tuple[str, int, str], tuple[Tensor, float]]
    ) -> list[Tensor]:
        """[left, right] Λ / (Λ + damping) of each block; -1 of coordinates that may not be used."""
        known = self.checkpoints[checkpoint].statistics.known
        shares = []
        for key, (values, damping) in damped.items():
            share = values / (values + damping) if damping > 0 else torch.zeros_like(values)
            within = torch.ones_like(share, dtype=torch.bool)
            if self.settings.leading < 1 and known[key].right is not None:
                for axis, covariance in enumerate((known[key].left, known[key].right)):
                    leading = _leading(covariance, self.settings.leading)
                    within &= leading[:, None] if axis == 0 else leading[None]
            shares.append(torch.where(within, share, -1.0))
        return shares

    def check(self, model: Mapping[str, Any], reduction: str) -> None:
        """Nothing, if they are of these layers and this reduction; see `Preconditioner`.

        Raises:
            MismatchError: If not.
        """
        if self.model["digest"] != model["digest"]:
            there, here = (
                {each["name"] for each in of["parameters"]} for of in (self.model, model)
            )
            odd = sorted(there ^ here)[:4] or "the same parameters in other layers"
            raise MismatchError(f"precondition must be factors of the recorded layers, got {odd}")
        if self.reduction != reduction:
            raise MismatchError(
                f"reduction must be {self.reduction!r} as the factors were fitted, got "
                f"{reduction!r}"
            )

    def prepared(
        self, dim: int | None, sketch: str | Sketch | None, seed: int | None, *, turned: bool
    ) -> tuple[list[Prepared], dict[str, Any]]:
        """The map of each checkpoint, and what a manifest says of them all; see `Preconditioner`.

        Raises:
            ArgumentError: If `dim` is more than was kept or the sample spans, or fitting did not go
                so far.
            NotFiniteError: If what is left in the basis is not finite.
        """
        weights = [at.weight for at in self.checkpoints]
        spec: dict[str, Any] = {"layout": LAYOUT, "method": self.method, **asdict(self.settings)}
        if len(weights) == 1:
            spec["residuals"] = "own"  # which the mean over one checkpoint is
        seed = 0 if seed is None else seed
        matrices: list[NDArray[np.float32] | None] = [None] * len(weights)
        if sketch is not None:
            if not isinstance(sketch, Sketch):
                sketch = Sketch(sketch, dim=4096 if dim is None else dim, seed=seed)
            spec |= {"dim": sketch.dim, "basis": "random", "sketch": sketch.spec}
        elif dim == 0:
            widths = {each.width for each in self.maps}
            if len(widths) > 1:
                raise ArgumentError(
                    f"coordinates must be as many at each checkpoint, got {sorted(widths)}; fit "
                    "with fewer"
                )
            spec |= {"dim": widths.pop(), "basis": "none"}
        else:
            found = self._found
            dim = self.suggested_dim if dim is None else dim
            matrices = list(bases(found, dim, seed if turned else None))
            spec |= {"dim": dim, "basis": "learnt", "seed": seed, "turned": turned}
            spec |= {"refined": found.moment is not None}
        prepared = []
        for at, chosen, basis in zip(self.checkpoints, self.maps, matrices, strict=True):
            identity = {"weights": at.digest, "labels": self.labels, **spec}
            prepared.append(
                Prepared(at.name, at.digest, at.weight, chosen.rotated(basis), identity)
            )
        return prepared, spec

    @property
    def method(self) -> str:
        """By its name in the literature."""
        return "EK-FAC" if self.settings.corrected else "K-FAC"

    @property
    def _found(self) -> Directions:
        """The directions of the sample."""
        self._need("basis")
        if self.directions is None:
            raise ArgumentError("factors must have directions, got none")
        return self.directions

    @property
    def rank(self) -> int:
        """How many directions the sample spans, of those kept: the widest rows that hold more."""
        return len(self._found.values)

    def explain(self) -> str:
        """What was chosen and why, in words: checkpoints, weights, damping, coordinates, width."""
        kept = {"averaged": "averaged over checkpoints", "own": "each checkpoint's own"}
        lines = [
            f"{self.method} factors by {self.checkpoints[0].statistics.examples[0]:,} examples, "
            f"labels {self.labels}, up to {self.stage}",
            "checkpoints  "
            + ", ".join(f"{at.name} (weight {at.weight:.3g})" for at in self.checkpoints),
            f"residuals    {kept[self.settings.residuals if len(self.checkpoints) > 1 else 'own']}",
        ]
        if STAGES.index(self.stage) >= STAGES.index("eigenvalues"):
            held = [self._held(index) for index in range(len(self.checkpoints))]
            dampings = [value for _, value in self.damped(len(held) - 1).values()]
            lines += [
                f"damping      {self.settings.damping:g} of each layer's mean eigenvalue: "
                f"{min(dampings):.3g} to {max(dampings):.3g} at the last checkpoint",
                f"coordinates  {max(each.width for each in self.maps):,}, which hold "
                f"{min(held):.0%} to {max(held):.0%} of the whitened gradients' energy",
            ]
        if self.stage == "basis":
            shares = ", ".join(
                f"{dim} columns {self.energy(dim):.0%}"
                for dim in sorted({128, 256, 512, 1024, 2048, self.rank})
                if dim <= self.rank
            )
            lines.append(
                f"width        {self.suggested_dim} columns by default; of a sample of "
                f"{self._found.examples:,} training examples hold {shares}"
            )
        return "\n".join(map(line, lines))

    def _held(self, checkpoint: int) -> float:
        """The share of Σ Λ / (Λ + damping) that the chosen coordinates hold."""
        damped = self.damped(checkpoint)
        whole = sum(
            float((values / (values + damping)).sum()) for values, damping in damped.values()
        )
        kept = 0.0
        for choice in self.maps[checkpoint].choices:
            _, damping = damped[choice.block.key]
            # A scale is (Λ + damping)^-1/2, so Λ / (Λ + damping) is 1 - damping · scale².
            kept += float((1 - damping * choice.scales.double().square()).sum())
        return kept / whole if whole else 1.0

    def energy(self, dim: int) -> float:
        """The share of the sample, rows divided by the root of their norm, in `dim` directions."""
        return self._found.energy(dim)

    @property
    def suggested_dim(self) -> int:
        """The least of 128, 256, 512, ... whose directions hold three quarters of the sample."""
        most = self.rank
        for dim in (128, 256, 512, 1024, 2048):
            if dim <= most and self.energy(dim) >= ENOUGH:
                return dim
        return min(2048, most)

    def cost(self, dim: int, dtype: str = "int4") -> Cost:
        """What rows of this width take.

        Raises:
            ArgumentError: If `dtype` is not one of rows, or `dim` below 1.
        """
        dim = _arrays.integer("dim", dim, 1)
        bits = BITS[_arrays.choice("dtype", dtype, BITS)]
        shared = staging = 0.0
        for chosen in self.maps:
            arrays = to_arrays(chosen)[1].values()
            shared += sum(array.nbytes for array in arrays) + 4 * chosen.width * dim
            staging += -(-chosen.width * 4 // 8) + 4
        return Cost(-(-dim * bits // 8) + 4, int(shared), staging)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Writes them to a new folder, as plain `.npy` files under a checksummed description.

        Raises:
            StoreError: If the path is there already, or cannot be written.
        """
        return save(self, _arrays.path("path", path))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Factors:
        """Those that `save` wrote.

        Raises:
            StoreError: If there are none, or they are damaged.
        """
        return load(_arrays.path("path", path))

    @classmethod
    def merge(cls, parts: Sequence[Factors]) -> Factors:
        """Factors of all the data, from those of shards of it.

        Sums of covariances, or of second moments in one eigenbasis: first merge what was fitted
        up to "covariance", give it to each shard as `start` to fit up to "eigenvalues", and merge
        again. The basis comes of one sample: fit it with `start` the merged factors.

        Raises:
            ArgumentError: If there are none, or of other eigenvectors or eigenvalues.
            DtypeError: If they are something else.
            MismatchError: If they are of other models, settings or weights.
        """
        return merge(parts)

    def _need(self, stage: str) -> None:
        if STAGES.index(self.stage) < STAGES.index(stage):
            raise ArgumentError(
                f"factors must be fitted up to {stage!r}, got factors up to {self.stage!r}"
            )


class Progress:
    """Factors of single checkpoints in a folder, for a fit that goes on where it was killed.

    Args:
        path: The folder; made if it is not there.
        asked: Arguments that factors themselves do not name, as JSON has them.

    Raises:
        MismatchError: If the folder was begun with others.
        StoreError: If it cannot be written, or is damaged.
    """

    def __init__(self, path: Path, asked: dict[str, Any]) -> None:
        description = path / "fit.json"
        with store_errors(path):
            path.mkdir(parents=True, exist_ok=True)
            there = description.exists()
        if not there:
            write_json(description, asked)
        elif (found := read_json(description)) != asked:
            if not isinstance(found, dict):
                raise StoreError(f"{description} must hold a JSON object, got {found!r:.80}")
            odd = [name for name in asked if found.get(name, ...) != asked[name]]
            raise MismatchError(f"path must be new or of the same {', '.join(odd)}, got {path}")
        self._path = path

    def find(self, number: int, wanted: Factors) -> At | None:
        """The checkpoint of this number, if it is there.

        Raises:
            MismatchError: If it is of another model, setting or weights.
        """
        path = self._at(number, wanted)
        if not path.exists():
            return None
        found = Factors.load(path)
        for name in ("model", "reduction", "labels", "settings"):
            if getattr(found, name) != getattr(wanted, name):
                raise MismatchError(
                    f"path must be new or of the same {name}, got {path} with "
                    f"{_short(getattr(found, name))}"
                )
        there, here = found.checkpoints[0], wanted.checkpoints[0]
        if (there.name, there.digest) != (here.name, here.digest):
            raise MismatchError(f"path must be new or of the same weights, got {path} of others")
        return replace(there, weight=here.weight)

    def keep(self, number: int, factors: Factors) -> None:
        """Saves a checkpoint's factors; they appear whole, or not at all."""
        factors.save(self._at(number, factors))

    def _at(self, number: int, factors: Factors) -> Path:
        return self._path / f"checkpoint-{number:04}-{factors.stage}"


@dataclass(frozen=True)
class Cost:
    """Bytes that preconditioned rows take.

    Attributes:
        row: Of one example, with its scale.
        shared: Of eigenvectors, choices and bases, which do not grow with examples.
        staging: Of one example's coordinates at all checkpoints, where they are kept at 4 bits
            until `compress`.
    """

    row: float
    shared: int
    staging: float

    def each(self, examples: int) -> float:
        """Bytes an example, with its share of what is shared."""
        return self.row + self.shared / examples


def _leading(covariance: Covariance | None, share: float) -> Tensor:
    """[columns] whether each eigenvector is among the leading ones of its stretch."""
    if covariance is None:
        return torch.ones(1, dtype=torch.bool)
    parts = []
    for total in covariance.sums:
        size = len(total)
        parts.append(torch.arange(size) < max(1, round(share * size)))
    return torch.cat(parts)


def _choice(block: Block, values: Tensor, damping: float, mask: Tensor) -> Choice:
    """What is kept of a block, with the eigenvectors that it uses and no others."""
    if block.kind == LOOKUP:  # in the order of the table's rows, by which they are looked up
        columns, rows = torch.nonzero(mask.T, as_tuple=True)
    else:
        rows, columns = torch.nonzero(mask, as_tuple=True)
    scales = (values[rows, columns] + damping).rsqrt().float()
    left, right = block.left, block.right
    if left is not None:
        used, rows = torch.unique(rows, return_inverse=True)
        left = _single(left.chosen(used.numpy()))
    if right is not None:
        used, columns = torch.unique(columns, return_inverse=True)
        right = _single(right.chosen(used.numpy()))
    chosen = replace(block, left=left, right=right)
    return Choice(chosen, rows, columns.contiguous(), scales)


def _single(side: Side) -> Side:
    """The side in float32."""
    parts = [(first, end, matrix.float()) for first, end, matrix in side.parts]
    return Side(parts, None if side.ones is None else side.ones.float())


def merge(parts: Sequence[Factors]) -> Factors:
    """See `Factors.merge`."""
    if not isinstance(parts, Sequence) or not all(isinstance(each, Factors) for each in parts):
        raise DtypeError(f"parts must be a list of Factors, got {_arrays.describe(parts)}")
    if not parts:
        raise ArgumentError("parts must be at least one, got none")
    first = parts[0]
    if first.stage == "basis" and len(parts) > 1:
        raise ArgumentError(
            "parts must be fitted up to 'covariance' or 'eigenvalues', got 'basis'; the basis "
            "comes of one sample: fit it with start= the merged factors"
        )
    for other in parts[1:]:
        for name in ("model", "reduction", "labels", "settings", "stage"):
            if getattr(first, name) != getattr(other, name):
                raise MismatchError(
                    f"parts must have one {name}, got {_short(getattr(first, name))} and "
                    f"{_short(getattr(other, name))}"
                )
        if [(at.name, at.digest) for at in first.checkpoints] != [
            (at.name, at.digest) for at in other.checkpoints
        ]:
            raise MismatchError("parts must be of the same checkpoints and weights, got others")
        lengths = [{at.statistics.longest for at in part.checkpoints} for part in (first, other)]
        if lengths[0] != lengths[1]:
            raise MismatchError(f"parts must have one longest, got {lengths[0]} and {lengths[1]}")
    checkpoints = []
    for ats in zip(*(part.checkpoints for part in parts), strict=True):
        checkpoints.append(replace(ats[0], statistics=_summed([at.statistics for at in ats])))
    return Factors(
        first.model,
        first.reduction,
        first.labels,
        first.settings,
        checkpoints,
        first.stage,
        first.directions,
    )


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _summed(parts: Sequence[Statistics]) -> Statistics:
    """Statistics of all the data."""
    first = parts[0]
    known: dict[tuple[str, int, str], BlockStatistics] = {}
    for part in parts:
        for key, each in part.known.items():
            known[key] = each if key not in known else _added(known[key], each)
    rotated = first.is_rotated
    examples = [part.examples[0] for part in parts]
    return Statistics(
        first.longest,
        dict(first.pairs),
        known,
        # In one eigenbasis, which came of them all, the covariances are those of all already.
        [first.examples[0] if rotated else sum(examples), sum(p.examples[1] for p in parts)],
        first.dtype,
    )


def _added(one: BlockStatistics, other: BlockStatistics) -> BlockStatistics:
    """Two shards' sums of a block."""
    if one.squares is None or other.squares is None:
        if one.squares is not other.squares:
            raise ArgumentError("parts must be of one stage, got some with eigenvalues")
        sides = [
            None
            if mine is None or theirs is None
            else Covariance(
                mine.ranges,
                [a + b for a, b in zip(mine.sums, theirs.sums, strict=True)],
                mine.one,
            )
            for mine, theirs in ((one.left, other.left), (one.right, other.right))
        ]
        return replace(one, left=sides[0], right=sides[1], terms=one.terms + other.terms)
    for mine, theirs in ((one.block.left, other.block.left), (one.block.right, other.block.right)):
        for part, its in zip(
            mine.parts if mine else (), theirs.parts if theirs else (), strict=True
        ):
            if not torch.equal(part[2], its[2]):
                raise ArgumentError(
                    "parts must have one eigenbasis, got others; merge what was fitted up to "
                    "'covariance' first, and fit each shard on with start="
                )
    return replace(one, squares=one.squares + other.squares)


def save(factors: Factors, path: Path) -> Path:
    """See `Factors.save`."""
    if path.exists():
        raise StoreError(f"path must be new, got {path}, which is there already")
    temporary = path.with_name(path.name + ".part")
    arrays: dict[str, Tensor] = {}
    described = [
        describe_at(at, f"checkpoint-{number}", arrays)
        for number, at in enumerate(factors.checkpoints)
    ]
    directions = describe_directions(factors.directions, arrays)
    with store_errors(path), ExitStack() as stack:
        if temporary.exists():
            shutil.rmtree(temporary)
        stack.callback(shutil.rmtree, temporary, ignore_errors=True)  # a full disk
        temporary.mkdir(parents=True)
        files = {
            name: [*write_array(temporary / f"{name}.npy", array.numpy())]
            for name, array in arrays.items()
        }
        body = {
            "format": FORMAT,
            "version": VERSION,
            "model": factors.model,
            "reduction": factors.reduction,
            "labels": factors.labels,
            "settings": asdict(factors.settings),
            "stage": factors.stage,
            "checkpoints": described,
            "directions": directions,
            "files": files,
            "arrays": {
                name: [array.numpy().dtype.str, list(array.shape)] for name, array in arrays.items()
            },
        }
        write_json(temporary / DESCRIPTION, body)
        temporary.rename(path)
        stack.pop_all()
        sync_directory(path.parent)
    return path


def load(path: Path) -> Factors:
    """See `Factors.load`."""
    description = path / DESCRIPTION
    with store_errors(path):
        if not description.is_file():
            raise StoreError(
                f"path must be a folder of saved factors, got {path} without a {DESCRIPTION}"
            )
    body = read_json(description)
    try:
        if body["format"] != FORMAT:
            raise ValueError(f"format must be {FORMAT}")
        if body["version"] != VERSION:
            raise StoreError(
                f"{description}: version must be {VERSION}, got {body['version']!r:.80}; fit the "
                "factors again"
            )
        return _read(body, read_arrays(path, body))
    except WRONG as error:
        raise StoreError(f"{description} is damaged: {type(error).__name__}: {error}") from None


def _read(body: Mapping[str, Any], arrays: dict[str, Tensor]) -> Factors:
    """Factors from what files hold of them, once it is what `save` can have written.

    Raises:
        ValueError: If it is not; or another error of `WRONG`.
    """
    stage = _arrays.choice("stage", body["stage"], STAGES)
    sizes = sizes_of(body["model"])
    checkpoints = [
        read_at(each, f"checkpoint-{number}", arrays, sizes, rotated=stage != STAGES[0])
        for number, each in enumerate(body["checkpoints"])
    ]
    if not checkpoints or len({at.name for at in checkpoints}) < len(checkpoints):
        raise ValueError("checkpoints must be at least one, with distinct names")
    factors = Factors(
        body["model"],
        _arrays.choice("reduction", body["reduction"], REDUCTIONS),
        _arrays.choice("labels", body["labels"], LABELS),
        Settings.of(**body["settings"]),
        checkpoints,
        stage,
    )
    if (body["directions"] is None) == (stage == "basis"):
        raise ValueError(f"directions must be there at the stage 'basis' alone, got {stage!r}")
    if body["directions"] is not None:
        widths = [factors.width(number) for number in range(len(checkpoints))]
        factors.directions = read_directions(body["directions"], arrays, widths)
    if arrays:
        raise ValueError(f"arrays must be those of blocks and directions, got {min(arrays)!r:.80}")
    return factors
