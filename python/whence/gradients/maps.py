"""The map from the gradients of a model to rows: chosen once, then read from the store."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from whence import _arrays
from whence._core import MAX_DIM
from whence.errors import ArgumentError, DtypeError, LayerError, MismatchError
from whence.factored import LAYOUT, Factored, Segment
from whence.gradients.coordinates import Coordinates, from_arrays, random_basis, to_arrays
from whence.gradients.divided import Divided, divided_arrays, divided_from
from whence.gradients.preconditioned import Preconditioner, Prepared
from whence.gradients.structure import Structure
from whence.sketch import KINDS, LAYOUTS, Sketch
from whence.store import SECOND_MOMENTS, Checkpoint, Manifest, read_map

FACTORS = ("linear", "conv1d_transposed")
"""Rules of layers whose gradient is one outer product a position."""

_WHOLE = ("layer_norm", "rms_norm", "group_norm", "batch_norm")
"""Rules of layers whose parameters are so small that they are kept as they are."""


def map_of(
    structure: Structure,
    sketch: str | Sketch | None,
    dim: int | None,
    seed: int | None,
    layout: str | None,
    threads: int,
) -> tuple[Sketch | Factored, dict[str, Any]]:
    """The map that `record` was asked for, and what a manifest says of it.

    Raises:
        ArgumentError: If arguments do not go together.
        LayerError: If a layer has no factors, for layout="factored".
        MismatchError: If rows would be wider than the core allows.
    """
    if layout is not None:
        _arrays.choice("layout", layout, (*LAYOUTS, LAYOUT))
    if layout == LAYOUT:
        for name, value in (("sketch", sketch), ("dim", dim), ("seed", seed)):
            if value is not None:
                raise ArgumentError(
                    f"{name} must be None for layout='factored', which keeps factors as they are, "
                    f"got {value!r}"
                )
        factored = Factored(_segments(structure))
        return factored, factored.spec
    if isinstance(sketch, Sketch):
        for name, value in (("dim", dim), ("seed", seed), ("layout", layout)):
            if value is not None:
                raise ArgumentError(
                    f"{name} must be None where sketch is a Sketch, which has its own, "
                    f"got {value!r}"
                )
    elif sketch is None or isinstance(sketch, str):
        sketch = Sketch(
            "chunked_sjlt" if sketch is None else _arrays.choice("sketch", sketch, KINDS),
            dim=4096 if dim is None else dim,
            seed=0 if seed is None else seed,
            layout="global" if layout is None else layout,
        )
    else:
        raise DtypeError(
            f"sketch must be the name of a kind or a Sketch, got {_arrays.describe(sketch)}"
        )
    unused = sketch.unused_kinds(structure.parameters)
    if unused:
        raise ArgumentError(f"kinds must each match a parameter's name, got {unused}")
    sketch = sketch.resolved(structure.parameters).with_threads(threads)
    spec = sketch.spec
    if sketch.layout == "per_layer":
        layers = sketch.layers(structure.parameters)
        if len(layers) * sketch.dim > MAX_DIM:
            raise ArgumentError(
                f"dim must be at most {MAX_DIM // len(layers)} for layout='per_layer' and "
                f"{len(layers)} layers, whose rows are at most {MAX_DIM} wide, got {sketch.dim}"
            )
        spec["layers"] = layers
    return sketch, spec


def map_of_store(
    path: Path, manifest: Manifest, checkpoint: Checkpoint, threads: int
) -> Sketch | Factored | Coordinates | Divided:
    """The map that a store says the rows of a checkpoint were made with.

    Raises:
        MismatchError: If this version of whence does not have that map.
        StoreError: If its files are damaged.
    """
    spec = manifest.sketch
    if manifest.is_factored:
        return Factored.from_spec(spec)
    if not manifest.is_preconditioned:
        return Sketch.from_spec(spec, threads=threads)
    if checkpoint.map is None:
        raise MismatchError(f"checkpoint {checkpoint.name!r} of {path} must have a map, got none")
    described, arrays = read_map(path, checkpoint.map)
    random: Sketch | None = None
    if spec.get("sketch") is not None:
        random = Sketch.from_spec(spec["sketch"], threads=threads)
    if random is not None and spec["method"] == SECOND_MOMENTS:
        return divided_from(random, described, arrays)
    found = from_arrays(described, arrays)
    if random is not None:
        basis = random_basis(random, checkpoint.name, found.width)
        if checkpoint.weight is not None:  # of a sum over checkpoints; a learnt basis has it in it
            basis *= np.float32(checkpoint.weight**0.5)
        found = found.rotated(basis)
    if found.dim != manifest.dim:
        raise MismatchError(
            f"the map of checkpoint {checkpoint.name!r} must have rows of {manifest.dim}, got "
            f"{found.dim}"
        )
    return found


def _segments(structure: Structure) -> list[Segment]:
    """The parts of a factored row, in the order of the parameters.

    Raises:
        LayerError: If a layer is neither linear nor a norm, or a weight is in two places.
        MismatchError: If biases and weights are tied in a way that has no factors.
    """
    found: dict[str, Segment] = {}
    for layer in structure.layers:
        kind = layer.rule.kind
        if kind not in FACTORS and kind not in _WHOLE and not kind.startswith("registered:"):
            raise LayerError(
                "layout='factored' must be used with Linear and norm layers, got "
                f"{layer.name or 'the model'} ({type(layer.module).__name__}); choose layers=, or "
                "use layout='global'"
            )
        weight = layer.parameters.get("weight") if kind in FACTORS else None
        bias = layer.parameters.get("bias") if weight is not None else None
        for parameter in layer.parameters.values():
            if parameter.name in found or (weight and parameter is bias):
                if parameter.name in found:
                    raise MismatchError(
                        "layout='factored' must be used without tied parameters, got "
                        f"{parameter.name} in two layers; use layout='global'"
                    )
                continue
            if parameter is not weight:
                found[parameter.name] = Segment(parameter.name, 0, parameter.tensor.numel())
                continue
            left, right = parameter.shape
            transposed = kind == "conv1d_transposed"
            one = int(bias is not None)
            found[parameter.name] = Segment(
                parameter.name,
                left + one * transposed,
                right + one * (not transposed),
                None if bias is None else bias.name,
                transposed,
            )
    biases = [segment.bias for segment in found.values() if segment.bias is not None]
    if len(set(biases)) < len(biases) or set(biases) & set(found):
        raise MismatchError("layout='factored' must be used without tied parameters, got biases")
    return [found[name] for name in sorted(found)]


def prepared_maps(
    precondition: Preconditioner,
    model: Mapping[str, Any],
    reduction: str,
    *,
    dim: int | None,
    sketch: str | Sketch | None,
    seed: int | None,
    rotate: bool,
    dtype: str,
) -> tuple[list[Prepared], dict[str, Any]]:
    """The maps that `record` was asked for, and what a manifest says of them.

    Raises:
        ArgumentError: If arguments do not go together.
        DtypeError: If they are of another type.
        MismatchError: If the factors are of another model or reduction.
    """
    if not hasattr(precondition, "prepared"):
        raise DtypeError(
            "precondition must be factors of whence.fit_factors or second moments of "
            f"whence.moments_of, got {_arrays.describe(precondition)}"
        )
    precondition.check(model, reduction)
    if not _arrays.boolean("rotate", rotate):
        for name, value in (("dim", dim), ("sketch", sketch), ("seed", seed)):
            if value is not None:
                raise ArgumentError(f"{name} must be None for rotate=False, got {value!r}")
        dim = 0
    elif dim is not None:
        dim = _arrays.integer("dim", dim, 1, MAX_DIM)
    if isinstance(sketch, Sketch):
        for name, value in (("dim", dim), ("seed", seed)):
            if value is not None:
                raise ArgumentError(
                    f"{name} must be None where sketch is a Sketch, which has its own, "
                    f"got {value!r}"
                )
        unused = sketch.unused_kinds(each["name"] for each in model["parameters"])
        if unused:
            raise ArgumentError(f"kinds must each match a parameter's name, got {unused}")
        if sketch.layout != "global" or sketch.spec.get("normalize", False):
            raise ArgumentError("sketch must be global and not normalized for precondition=")
    elif sketch is not None and not isinstance(sketch, str):
        raise DtypeError(
            f"sketch must be the name of a kind or a Sketch, got {_arrays.describe(sketch)}"
        )
    elif sketch is not None:
        _arrays.choice("sketch", sketch, KINDS)
    if seed is not None:
        seed = _arrays.integer("seed", seed, 0)
    turned = dtype not in ("float16", "float32")
    prepared, spec = precondition.prepared(dim, sketch, seed, turned=turned)
    if spec["dim"] > MAX_DIM:
        raise ArgumentError(
            f"coordinates must be at most {MAX_DIM} for rotate=False, got factors of {spec['dim']}"
        )
    return prepared, spec


def stored_arrays(
    coordinates: Coordinates | Divided, spec: Mapping[str, Any]
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """What a store keeps of a map, without a random basis, which its seed says."""
    if isinstance(coordinates, Divided):
        return divided_arrays(coordinates)
    if spec.get("sketch") is not None:
        coordinates = coordinates.rotated(None)
    return to_arrays(coordinates)


def check_identity(checkpoint: Checkpoint, prepared: Prepared) -> None:
    """Nothing, if a store's map was made as this one was.

    Raises:
        MismatchError: If not; says in what.
    """
    there = {} if checkpoint.map is None else checkpoint.map.identity
    for name, value in prepared.identity.items():
        if there.get(name) != value:
            raise MismatchError(
                f"precondition must be as checkpoint {checkpoint.name!r} was recorded, with {name} "
                f"{there.get(name)!r}, got {value!r}"
            )


def check_spec(path: Path, there: Mapping[str, Any], here: Mapping[str, Any]) -> None:
    """Nothing, if factors make the rows that a store has.

    Raises:
        MismatchError: If not; says in what.
    """
    for name in {**there, **here}:
        if there.get(name) != here.get(name):
            raise MismatchError(
                f"{name} must be {there.get(name)!r} as in the store {path}, got {here.get(name)!r}"
            )
