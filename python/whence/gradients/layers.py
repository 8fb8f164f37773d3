"""One rule per layer type: from its input and its output's gradient to per-sample gradients.

With a the input and δ the gradient of the loss in the output, sample b's gradient is, for

    Linear, Conv     W: Σ_t δ_bt a_btᵀ        bias: Σ_t δ_bt
    Embedding        row i: Σ over t with index i of δ_bt
    norms            weight: Σ_t δ_bt ⊙ x̂_bt   bias: Σ_t δ_bt

(Goodfellow, "Efficient per-example gradient computations", arXiv 1510.01799, and its
generalisation to sums over positions t.) A rule never forms the gradient of a weight matrix; it
hands factors to a `Sink`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol, TypeAlias, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from whence import _core
from whence.errors import ArgumentError, LayerError

UserRule: TypeAlias = Callable[[Any, tuple[Any, ...], Tensor], dict[str, Tensor]]
"""(module, inputs, gradient of the output) -> {parameter: [batch, *shape]}."""

UNFOLDED_VALUES = 1 << 24
"""Convolutions are unfolded for as many samples at a time as fit in 64 MiB."""


class Sink(Protocol):
    """Takes the per-sample gradients of one layer."""

    batch: int

    def wants(self, name: str) -> bool:
        """Whether this parameter is recorded."""

    def flat(self, name: str, values: Tensor, start: int = 0) -> None:
        """Takes [batch, ...] gradients of the coordinates from `start` on."""

    def outer(self, name: str, left: Tensor, right: Tensor, start: int = 0, first: int = 0) -> None:
        """Takes Σ_t left[t] right[t]ᵀ of the samples from `first` on."""

    def linear(
        self, left: Tensor, right: Tensor, weight: str, bias: str, start: int = 0, row: int = 0
    ) -> None:
        """Takes Σ_t left[t] right[t]ᵀ of a weight, and Σ_t left[t] of a bias, as far as wanted."""

    def lookup(self, name: str, indices: Tensor, values: Tensor, ignored: int | None) -> None:
        """Takes values[t] for row indices[t]."""


@dataclass(frozen=True)
class Rule:
    """How the per-sample gradients of a layer type are computed.

    Attributes:
        kind: Its name in manifests.
        names: module -> names of the parameters that the rule accounts for.
        add: (sink, module, inputs, gradient of the output) -> None.
    """

    kind: str
    names: Callable[[nn.Module], Sequence[str]]
    add: Callable[[Sink, Any, tuple[Any, ...], Tensor], None]


_RULES: dict[type, Rule] = {}
_RULES_BY_CLASS_NAME: dict[str, Rule] = {}
_USER_RULES: dict[type, Rule] = {}

Add = TypeVar("Add", bound=Callable[..., None])


def _rule(kind: str, *classes: type | str) -> Callable[[Add], Add]:
    """Registers a rule for the `weight` and `bias` of these classes."""

    def register(add: Add) -> Add:
        rule = Rule(kind, lambda module: ("weight", "bias"), add)
        for each in classes:
            if isinstance(each, str):
                _RULES_BY_CLASS_NAME[each] = rule
            else:
                _RULES[each] = rule
        return add

    return register


UserRuleType = TypeVar("UserRuleType", bound=UserRule)


def register_layer(
    layer: type, rule: UserRuleType | None = None
) -> UserRuleType | Callable[[UserRuleType], UserRuleType]:
    """Teaches whence a layer type of your own; usable as a decorator.

    Args:
        layer: A subclass of nn.Module; instances of subclasses that keep its `forward` are meant
            too.
        rule: (module, inputs, output_gradient) -> {name: [batch, *shape]}: for every parameter
            that the module itself owns the gradient of each sample, not averaged. `inputs` are
            the arguments of `forward`, detached: the positional ones, or if there are none the
            keyword ones; `output_gradient` has the shape of its output.

    Returns:
        The rule, or as a decorator what takes the rule.

    Raises:
        ArgumentError: If `layer` is not a subclass of nn.Module.

    Examples:
        >>> @whence.register_layer(Scale)  # doctest: +SKIP
        ... def scale(module, inputs, output_gradient):
        ...     return {"weight": (output_gradient * inputs[0]).sum(1)}
    """
    if not (isinstance(layer, type) and issubclass(layer, nn.Module)):
        raise ArgumentError(f"layer must be a subclass of nn.Module, got {layer!r}")

    def register(rule: UserRuleType) -> UserRuleType:
        def add(sink: Sink, module: nn.Module, inputs: tuple[Any, ...], delta: Tensor) -> None:
            for name, values in rule(module, inputs, delta).items():
                wanted = (sink.batch, *getattr(module, name).shape)
                if tuple(values.shape) != wanted:
                    raise LayerError(
                        f"the rule of {layer.__name__} must return {name} of shape "
                        f"{list(wanted)}, got {list(values.shape)}"
                    )
                if sink.wants(name):
                    sink.flat(name, values)

        def names(module: nn.Module) -> list[str]:
            return [name for name, _ in module.named_parameters(recurse=False)]

        _USER_RULES[layer] = Rule(f"registered:{layer.__name__}", names, add)
        return rule

    return register if rule is None else register(rule)


def rule_of(module: nn.Module) -> Rule | None:
    """The rule of a module, if there is one.

    A subclass shares its parent's rule only if it shares its `forward`.
    """
    for rules in (_USER_RULES, _RULES):
        for parent in type(module).__mro__:
            rule = rules.get(parent)
            if rule is not None and type(module).forward is parent.forward:  # type: ignore[attr-defined]
                return rule
    for parent in type(module).__mro__:
        rule = _RULES_BY_CLASS_NAME.get(parent.__name__)
        if rule is not None and type(module).forward is parent.forward:  # type: ignore[attr-defined]
            return rule if rule.kind != "conv1d_transposed" or hasattr(module, "nf") else None
    return None


@_rule("linear", nn.Linear)
def _linear(sink: Sink, module: nn.Linear, inputs: tuple[Any, ...], delta: Tensor) -> None:
    if inputs[0].dim() < 2:
        raise LayerError(
            "a Linear must be called with a batch in dimension 0, got an input of "
            f"shape {list(inputs[0].shape)}"
        )
    values = inputs[0].reshape(sink.batch, -1, module.in_features)
    delta = delta.reshape(sink.batch, -1, module.out_features)
    sink.linear(delta, values, "weight", "bias")


@_rule("conv1d_transposed", "Conv1D")
def _transposed(sink: Sink, module: Any, inputs: tuple[Any, ...], delta: Tensor) -> None:
    """Hugging Face's Conv1D: a Linear whose weight is [in, out]."""
    delta = delta.reshape(sink.batch, -1, delta.shape[-1])
    if sink.wants("weight"):
        sink.outer("weight", inputs[0].reshape(sink.batch, -1, inputs[0].shape[-1]), delta)
    if sink.wants("bias"):
        sink.flat("bias", delta.sum(1, dtype=torch.float32))


@_rule("conv", nn.Conv1d, nn.Conv2d, nn.Conv3d)
def _conv(sink: Sink, module: Any, inputs: tuple[Any, ...], delta: Tensor) -> None:
    if inputs[0].dim() != module.weight.dim():
        raise LayerError(
            "a convolution must be called with a batch in dimension 0, got an input "
            f"of shape {list(inputs[0].shape)}"
        )
    delta = delta.flatten(2)  # [batch, out channels, positions]
    if sink.wants("bias"):
        sink.flat("bias", delta.sum(2, dtype=torch.float32))
    if not sink.wants("weight"):
        return
    values, groups = inputs[0], module.groups
    inside = values.shape[1] // groups
    outside = module.out_channels // groups
    patch = inside * module.weight[0, 0].numel()
    per_sample = patch * groups * max(delta.shape[2], 1)
    step = max(1, UNFOLDED_VALUES // per_sample)
    for first in range(0, sink.batch, step):
        patches = unfold(module, values[first : first + step])
        for group in range(groups):
            sink.outer(
                "weight",
                delta[first : first + step, group * outside : (group + 1) * outside].mT,
                patches[:, :, group * patch : (group + 1) * patch],
                start=group * outside * patch,
                first=first,
            )


def unfold(module: Any, values: Tensor) -> Tensor:
    """[batch, positions, channels * kernel]: what each output position of a convolution sees."""
    padding = module._reversed_padding_repeated_twice
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    if any(padding):
        values = F.pad(values, padding, mode=mode)
    kernel, stride, dilation = module.kernel_size, module.stride, module.dilation
    sizes = [
        (size - d * (k - 1) - 1) // s + 1
        for size, k, s, d in zip(values.shape[2:], kernel, stride, dilation, strict=True)
    ]
    batch, channels, *steps = values.stride()
    windows = values.as_strided(
        (values.shape[0], *sizes, values.shape[1], *kernel),
        (
            batch,
            *(step * s for step, s in zip(steps, stride, strict=True)),
            channels,
            *(step * d for step, d in zip(steps, dilation, strict=True)),
        ),
        values.storage_offset(),
    )
    positions = 1
    for size in sizes:
        positions *= size
    return windows.reshape(values.shape[0], positions, -1)


@_rule("embedding", nn.Embedding)
def _embedding(sink: Sink, module: nn.Embedding, inputs: tuple[Any, ...], delta: Tensor) -> None:
    if module.max_norm is not None:
        raise LayerError(
            "an Embedding must have max_norm=None, got one that changes its weights "
            "in the forward pass"
        )
    if module.scale_grad_by_freq:
        raise LayerError(
            "an Embedding must have scale_grad_by_freq=False, got one whose "
            "gradient depends on who else is in the batch"
        )
    sink.lookup(
        "weight",
        inputs[0].reshape(sink.batch, -1),
        delta.reshape(sink.batch, -1, module.embedding_dim),
        module.padding_idx,
    )


def _affine(sink: Sink, normalised: Tensor, delta: Tensor, dims: int) -> None:
    """The elementwise weight and bias of a norm over the last `dims` dimensions."""
    shape = (sink.batch, -1, *delta.shape[delta.dim() - dims :])
    delta = delta.float()
    if sink.wants("weight"):
        sink.flat("weight", (delta * normalised.float()).reshape(shape).sum(1))
    if sink.wants("bias"):
        sink.flat("bias", delta.reshape(shape).sum(1))


def _on_processor(*tensors: Tensor) -> bool:
    """Whether all are float32 in the memory of the processor."""
    return all(each.device.type == "cpu" and each.dtype == torch.float32 for each in tensors)


def _last_dimension(
    sink: Sink, values: Tensor, delta: Tensor, epsilon: float, *, centred: bool
) -> None:
    """The weight and bias of a norm over the last dimension, in one pass over its input."""
    shape = (sink.batch, -1, delta.shape[-1])
    arrays = [np.ascontiguousarray(each.reshape(shape).numpy()) for each in (values, delta)]
    sums = _core.norm_gradients(arrays[0], arrays[1], epsilon, centred, torch.get_num_threads())
    for name, each in zip(("weight", "bias"), sums, strict=True):
        if sink.wants(name):
            sink.flat(name, torch.from_numpy(each))


@_rule("layer_norm", nn.LayerNorm)
def _layer_norm(sink: Sink, module: nn.LayerNorm, inputs: tuple[Any, ...], delta: Tensor) -> None:
    shape = list(module.normalized_shape)
    if len(shape) == 1 and _on_processor(inputs[0], delta):
        _last_dimension(sink, inputs[0], delta, module.eps, centred=True)
    else:
        _affine(sink, F.layer_norm(inputs[0].float(), shape, eps=module.eps), delta, len(shape))


@cache
def _default_epsilon(dtype: torch.dtype) -> float:
    """What an RMSNorm adds where eps is None: of 16 bits, torch's versions differ."""
    value = torch.tensor([2.0**-10], dtype=dtype)
    found = F.rms_norm(value, [1]).item()
    known = (torch.finfo(dtype).eps, torch.finfo(torch.float32).eps)
    return min(known, key=lambda each: abs(found - 2.0**-10 / (2.0**-20 + each) ** 0.5))


@_rule("rms_norm", *([nn.RMSNorm] if hasattr(nn, "RMSNorm") else []))
def _rms_norm(sink: Sink, module: Any, inputs: tuple[Any, ...], delta: Tensor) -> None:
    shape = list(module.normalized_shape)
    eps = module.eps if module.eps is not None else _default_epsilon(inputs[0].dtype)
    if len(shape) == 1 and _on_processor(inputs[0], delta):
        _last_dimension(sink, inputs[0], delta, eps, centred=False)
        return
    _affine(sink, F.rms_norm(inputs[0].float(), shape, eps=eps), delta, len(shape))


@_rule("group_norm", nn.GroupNorm)
def _group_norm(sink: Sink, module: nn.GroupNorm, inputs: tuple[Any, ...], delta: Tensor) -> None:
    normalised = F.group_norm(inputs[0].float(), module.num_groups, eps=module.eps)
    _channels(sink, normalised, delta)


@_rule("batch_norm", nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
def _batch_norm(sink: Sink, module: Any, inputs: tuple[Any, ...], delta: Tensor) -> None:
    """In evaluation mode only: the recorder refuses training mode."""
    values = inputs[0].float()
    normalised = F.batch_norm(values, module.running_mean, module.running_var, eps=module.eps)
    _channels(sink, normalised, delta)


def _channels(sink: Sink, normalised: Tensor, delta: Tensor) -> None:
    """Weight and bias of one value per channel, dimension 1."""
    _affine(sink, normalised.movedim(1, -1), delta.movedim(1, -1), 1)


def _no_add(sink: Sink, module: Any, inputs: tuple[Any, ...], delta: Tensor) -> None:
    raise LayerError("this layer is recorded from inside, not from its output")


def _attention_names(module: nn.Module) -> list[str]:
    names = ["in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight", "in_proj_bias"]
    found = [name for name in names if getattr(module, name) is not None]
    found += ["out_proj.weight"]
    return found + (["out_proj.bias"] if module.out_proj.bias is not None else [])  # type: ignore[union-attr]


ATTENTION = Rule("attention", _attention_names, _no_add)
"""MultiheadAttention: see `whence.gradients.attention`."""
_RULES[nn.MultiheadAttention] = ATTENTION


def _functional(sink: Sink, module: Any, inputs: tuple[Any, ...], delta: Tensor) -> None:
    raise LayerError("the functional rule needs the layer's whole call")


FUNCTIONAL = Rule(
    "functional",
    lambda module: [name for name, _ in module.named_parameters(recurse=False)],
    _functional,
)
"""Any module, by a vector-Jacobian product per sample: slow, and holds [batch, parameters]."""
