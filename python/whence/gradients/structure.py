"""The parameters of a model that are recorded: canonical names, ties, layers, digest."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from whence._arrays import describe
from whence.errors import ArgumentError, CoverageError, DtypeError, MismatchError
from whence.gradients.layers import FUNCTIONAL, Rule, rule_of
from whence.sketch import canonical_name


@dataclass(frozen=True)
class Parameter:
    """A parameter under its canonical name: of several names for a tied one the first sorted."""

    name: str
    shape: tuple[int, ...]
    tensor: nn.Parameter = field(repr=False)


@dataclass(frozen=True)
class Layer:
    """A module with a rule for some of its parameters.

    Attributes:
        name: Canonical name of the module.
        module: The module.
        rule: How its per-sample gradients are computed.
        parameters: Name inside the module -> parameter, the recorded ones.
    """

    name: str
    module: nn.Module
    rule: Rule
    parameters: Mapping[str, Parameter]


@dataclass(frozen=True)
class Structure:
    """What is recorded of a model.

    Attributes:
        layers: In the order the model names them.
        parameters: Canonical name -> parameter, sorted.
        uncovered: Canonical name -> trainable parameter that no rule accounts for.
        total: Number of trainable values in the chosen layers.
    """

    layers: Sequence[Layer]
    parameters: Mapping[str, Parameter]
    uncovered: Mapping[str, nn.Parameter]
    total: int

    def describe(self) -> dict[str, Any]:
        """The manifest's form: a digest, and each parameter with its names and layer kinds."""
        kinds: dict[str, set[str]] = {name: set() for name in self.parameters}
        places: dict[str, set[str]] = {name: set() for name in self.parameters}
        for layer in self.layers:
            for local, parameter in layer.parameters.items():
                kinds[parameter.name].add(layer.rule.kind)
                places[parameter.name].add(f"{layer.name}.{local}" if layer.name else local)
        parameters = [
            {
                "name": name,
                "shape": list(parameter.shape),
                "kind": "+".join(sorted(kinds[name])),
                "places": sorted(places[name]),
            }
            for name, parameter in self.parameters.items()
        ]
        text = json.dumps(parameters, ensure_ascii=True, sort_keys=True).encode()
        return {
            "digest": hashlib.blake2b(text, digest_size=16).hexdigest(),
            "parameters": parameters,
        }


def canonical_parameters(model: nn.Module) -> dict[str, Parameter]:
    """Every name of every parameter, as canonical name -> parameter under its first name.

    Raises:
        ArgumentError: If two different parameters have the same canonical name.
    """
    names: dict[int, list[str]] = {}
    tensors: dict[str, nn.Parameter] = {}
    for name, tensor in model.named_parameters(remove_duplicate=False):
        name = canonical_name(name)
        if name in tensors and tensors[name] is not tensor:
            raise ArgumentError(
                f"model must have distinct names without wrappers' prefixes, got {name!r} twice"
            )
        if name not in tensors:
            tensors[name] = tensor
            names.setdefault(id(tensor), []).append(name)
    return {
        name: Parameter(min(names[id(tensor)]), tuple(tensor.shape), tensor)
        for name, tensor in tensors.items()
    }


def structure_of(
    model: nn.Module,
    layers: str | Sequence[str] | None = None,
    uncovered: str = "error",
    names: Sequence[str] | None = None,
) -> Structure:
    """The layers and parameters of `model` that are recorded.

    Args:
        model: Any module.
        layers: Patterns (`fnmatch`) of canonical layer names; None for all.
        uncovered: "error" or "skip" to leave parameters without a rule out, "functional" to give
            their modules the functional rule.
        names: Exactly these canonical parameters, trainable or not; None for the trainable ones.

    Raises:
        ArgumentError: If `layers` matches no layer, or nothing is trainable.
    """
    patterns = [layers] if isinstance(layers, str) else layers
    if patterns is not None and not (
        isinstance(patterns, Sequence) and all(isinstance(each, str) for each in patterns)
    ):
        raise DtypeError(f"layers must be patterns of layer names, got {describe(patterns)}")
    known = canonical_parameters(model)
    wanted = {
        parameter.name
        for parameter in known.values()
        if (parameter.tensor.requires_grad if names is None else parameter.name in names)
    }
    found: list[Layer] = []
    loose: dict[str, list[str]] = {}
    claimed: set[tuple[str, str]] = set()
    unmatched = set(patterns or ())
    for raw, module in model.named_modules():
        name = canonical_name(raw)
        matching = [pattern for pattern in patterns or () if fnmatchcase(name, pattern)]
        chosen = patterns is None or bool(matching)
        own = {
            local: known[f"{name}.{local}" if name else local]
            for local, _ in module.named_parameters(recurse=False, remove_duplicate=False)
            if (name, local) not in claimed
        }
        rule = rule_of(module)
        if rule is not None:
            for local in rule.names(module):
                child, _, last = local.rpartition(".")
                if child:
                    inner = f"{name}.{child}" if name else child
                    claimed.add((inner, last))
                    own[local] = known[f"{inner}.{last}"]
        if not own or not chosen:
            continue
        unmatched.difference_update(matching)
        covered = {
            local: parameter
            for local, parameter in own.items()
            if parameter.name in wanted and rule is not None and local in rule.names(module)
        }
        if rule is not None and covered:
            found.append(Layer(name, module, rule, covered))
        rest = [
            local
            for local, parameter in own.items()
            if parameter.name in wanted and local not in covered
        ]
        if rest:
            loose[name] = rest
            if uncovered == "functional":
                found.append(Layer(name, module, FUNCTIONAL, {local: own[local] for local in rest}))
    if unmatched:
        raise ArgumentError(
            f"layers must each match a layer with parameters, got {sorted(unmatched)}"
        )
    parameters = {p.name: p for layer in found for p in layer.parameters.values()}
    missing: dict[str, nn.Parameter] = {}
    if uncovered != "functional":
        for name, rest in loose.items():
            for local in rest:
                parameter = known[f"{name}.{local}" if name else local]
                if parameter.name not in parameters:
                    missing[parameter.name] = parameter.tensor
    if not parameters and not missing and names is None:
        raise ArgumentError("model must have trainable parameters in the chosen layers, got none")
    total = sum(p.tensor.numel() for p in parameters.values())
    total += sum(tensor.numel() for tensor in missing.values())
    return Structure(found, dict(sorted(parameters.items())), missing, total)


def structure_in_store(model: nn.Module, described: Mapping[str, Any], path: Any) -> Structure:
    """The part of `model` that a store was recorded with, whatever is trainable now.

    Raises:
        MismatchError: If the model lacks a parameter, or has it in another shape or layer.
    """
    names = [each["name"] for each in described["parameters"]]
    functional = any("functional" in each["kind"].split("+") for each in described["parameters"])
    structure = structure_of(model, None, "functional" if functional else "skip", names)
    if structure.describe()["digest"] == described["digest"]:
        return structure
    here = {each["name"]: each for each in structure.describe()["parameters"]}
    for there in described["parameters"]:
        found = here.get(there["name"])
        if found != there:
            got = (
                f"{there['name']} {found['shape']} in {found['kind']}"
                if found
                else (
                    f"no {there['name']}"
                    if there["name"] not in structure.uncovered
                    else f"{there['name']} in a layer without a rule"
                )
            )
            raise MismatchError(
                f"model must be that of the store {path}, with {there['name']} {there['shape']} "
                f"in {there['kind']}, got {got}"
            )
    raise MismatchError(f"model must be that of the store {path}, got other layers")


def uncovered_error(names: Sequence[str]) -> CoverageError:
    """The error for parameters that received a gradient no rule accounts for."""
    shown = ", ".join(sorted(names)[:8]) + (", ..." if len(names) > 8 else "")
    return CoverageError(
        f"every trainable parameter must be in a layer with a rule, got {shown} without one; "
        "freeze it, choose layers=, pass uncovered='skip' to leave it out or "
        "uncovered='functional' to compute it by torch.func (where its module returns a tensor), "
        "or teach its layer with whence.register_layer"
    )
