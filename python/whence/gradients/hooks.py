"""Hooks that see each layer's input and output gradient, and feed the layer's rule.

A forward hook keeps the layer's input and hangs a hook on its output tensor; when the backward
pass reaches the output, the rule turns the two into per-sample gradients, which go straight into
the sketch. Hooks on tensors rather than on modules let activations be changed in place, and need
nothing of the loss or the loop.
"""

from __future__ import annotations

import copy
import random
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from fnmatch import fnmatchcase
from typing import Any, Protocol, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from whence.errors import LayerError, WhenceError
from whence.gradients.attention import Projections
from whence.gradients.capture import Capture, LayerSink
from whence.gradients.functional import Call, add_functional
from whence.gradients.layers import ATTENTION, FUNCTIONAL
from whence.gradients.structure import Layer, Parameter, Structure
from whence.gradients.weights import modules_of, parameters_of, preserved

FEW_TERMS = 8
"""Positions a sample below which a batch's weight gradient is not summed from its samples'."""


Feed: TypeAlias = Callable[[tuple[Any, ...], Tensor], None]
"""(inputs of a layer, gradient of its output) -> the rows."""


class _Hook:
    """A hook of one module: a copy of the module, or a saved one, has one that does nothing."""

    def __init__(self, call: Callable[..., Any]) -> None:
        self._call = call

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._call(*args, **kwargs)

    def __deepcopy__(self, memo: Any) -> _Hook:
        return _Hook(_do_nothing)

    def __reduce__(self) -> Any:
        return _Hook, (_do_nothing,)


def _do_nothing(*args: Any, **kwargs: Any) -> None:
    """What a copied hook does."""


class _FromSamples(torch.autograd.Function):
    """A linear layer, whose weight gradient comes with the samples' gradients.

    It stands in the graph for the layer, which has run already, with weights that took no
    gradient: one node for all gradients, as the layer's own, which saves what that saves, so that
    autograd, its hooks and optimizers see what they would without it.
    """

    @staticmethod
    def forward(
        ctx: Any, values: Tensor, weight: Tensor, bias: Any, output: Tensor, gradients: Any
    ) -> Tensor:
        ctx.save_for_backward(values, weight)
        ctx.gradients = gradients
        return output.detach()  # no view, so that it may be changed in place

    @staticmethod
    def backward(ctx: Any, delta: Tensor) -> Any:
        return (*ctx.gradients(ctx, delta), None, None)


class Draws(Protocol):
    """What draws random numbers of its own while a model runs."""

    def state(self) -> Any:
        """Where its random numbers are."""

    def restore(self, state: Any) -> None:
        """Puts them back there."""


class _Before:
    """What a forward pass may change, as it was before: to run the pass once more.

    Args:
        model: The model.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        draws: What else draws meanwhile.
    """

    def __init__(self, model: nn.Module, args: Any, kwargs: Any, draws: Draws | None) -> None:
        self._draws = draws
        self._drawn = None if draws is None else draws.state()
        self.args = tuple(_shallow(each) for each in args)
        self.kwargs = {name: _shallow(each) for name, each in kwargs.items()}
        self._buffers = [
            (module, name, buffer.detach().clone())
            for module in model.modules()
            for name, buffer in module._buffers.items()
            if buffer is not None
        ]
        self._random = torch.get_rng_state(), random.getstate(), np.random.get_state()  # noqa: NPY002

    @contextmanager
    def again(self, model: nn.Module) -> Iterator[None]:
        """Puts it back for a while."""
        now = random.getstate(), np.random.get_state()  # noqa: NPY002
        drawn = None if self._draws is None else self._draws.state()
        try:
            with preserved(model, weights=False), torch.no_grad():
                # Other tensors, not other values: backward may still need those that are there.
                for module, name, buffer in self._buffers:
                    module._buffers[name] = buffer
                torch.set_rng_state(self._random[0])
                random.setstate(self._random[1])
                np.random.set_state(self._random[2])  # noqa: NPY002
                if self._draws is not None:
                    self._draws.restore(self._drawn)
                yield
        finally:
            if self._draws is not None:
                self._draws.restore(drawn)
            random.setstate(now[0])
            np.random.set_state(now[1])  # noqa: NPY002


def _shallow(value: Any) -> Any:
    return copy.copy(value) if isinstance(value, (dict, list)) else value


class Hooks:
    """The hooks of one model, quiet until a capture is set.

    Args:
        model: The model.
        structure: What is recorded of it.
        strict: Whether a gradient in a parameter without a rule is an error.
    """

    def __init__(self, model: nn.Module, structure: Structure, *, strict: bool = True) -> None:
        self._structure = structure
        self._model = model
        self._strict = strict
        self._capture: Capture | None = None
        self._thread = 0  # that captures
        self._stack = ExitStack()
        self._without: bool = False
        self._running: list[tuple[Layer, list[Tensor], Projections | None]] = []
        self._anchor = torch.zeros((), requires_grad=True)
        self._tables = {
            layer.name for layer in structure.layers if isinstance(layer.module, nn.Embedding)
        }
        self._positions: set[str] = set()
        self._harmless: set[str] = set()
        self._batches: set[str] = set()
        self._start: _Before | None = None
        self._draws: Draws | None = None
        self._prints: list[tuple[str, tuple[int, ...], float]] = []
        self._again = False
        self._quiet = False

    def install(self) -> None:
        """Puts the hooks on."""
        for layer in self._structure.layers:
            module = layer.module
            self._keep(module.register_forward_pre_hook(_Hook(self._before(layer))))
            if layer.rule is not ATTENTION:
                after = _Hook(self._after(layer))
                self._keep(module.register_forward_hook(after, with_kwargs=True))
            release = _Hook(self._release(layer))
            self._keep(module.register_forward_hook(release, always_call=True))
        model = self._model
        before = _Hook(self._before_model)
        self._keep(model.register_forward_pre_hook(before, with_kwargs=True))
        self._keep(model.register_forward_hook(_Hook(self._after_model), with_kwargs=True))
        loose = {
            name: Parameter(name, tuple(tensor.shape), tensor)
            for name, tensor in self._structure.uncovered.items()
        }
        for parameter in [
            *self._structure.parameters.values(),
            *(loose.values() if self._strict else ()),
        ]:
            if parameter.tensor.requires_grad:
                self._keep(parameter.tensor.register_hook(self._received(parameter)))
                added = _Hook(self._added(parameter))
                self._keep(parameter.tensor.register_post_accumulate_grad_hook(added))

    def _keep(self, handle: Any) -> None:
        self._stack.callback(handle.remove)

    def remove(self) -> None:
        """Takes all hooks off."""
        self._capture = None
        self._stack.close()

    @contextmanager
    def capturing(
        self, capture: Capture, *, weight_gradients: bool, draws: Draws | None = None
    ) -> Iterator[Capture]:
        """Lets the hooks feed `capture` for a while.

        Args:
            capture: What gathers.
            weight_gradients: Whether the pass computes the batch's own gradients into `.grad`;
                if not, `.grad` is what it was, and their computation is skipped, but for a pass
                that is checked.
            draws: What draws random numbers of its own meanwhile, where the loss is computed inside
                the model: the same again, if the model is run again.

        Raises:
            WhenceError: If this thread is capturing already.
            LayerError: If the forward pass fails on outputs that were given a batch dimension.
        """
        if getattr(_busy, "yes", False):
            raise WhenceError(
                "a batch must not be recorded, verified or queried inside another, got a second "
                "one; call it before or after the batch"
            )
        with ExitStack() as stack:
            stack.enter_context(_without_fast_path())
            stack.enter_context(without_compiled_code(self._model))
            if not weight_gradients:
                stack.enter_context(kept_gradients(self._model))
            self._without = not weight_gradients and capture.check == "no"
            self._thread = threading.get_ident()
            self._capture, self._draws = capture, draws
            _busy.yes = True
            try:
                yield capture
                if unsure := capture.shared - self._harmless:
                    raise _unsure(sorted(unsure), "a batch in which the model itself never ran")
            except (RuntimeError, ValueError, IndexError, TypeError) as error:
                if capture.shared - self._harmless and not isinstance(error, WhenceError):
                    raise _changed(sorted(capture.shared - self._harmless)) from error
                raise
            finally:
                _busy.yes = False
                self._capture = self._start = self._draws = None
                self._prints = []
                while self._running:
                    self._let_go()

    def _live(self) -> Capture | None:
        return self._capture if torch.is_grad_enabled() and not self._quiet else None

    def _before_model(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        """Learns the number of queries from the model's first tensor.

        Raises:
            WhenceError: If the model runs in another thread than the batch's.
        """
        capture = self._live()
        if capture is None:
            return
        # A backward pass that runs the model again does so on a thread of autograd's.
        within = torch._C._current_graph_task_id() != -1
        if self._thread != threading.get_ident() and not within:
            raise WhenceError(
                "the model must run in one thread while a batch is recorded, got a call from "
                "another, whose gradients would be taken for the batch's; give each thread its own "
                "copy of the model, or let them take turns"
            )
        if capture.batch == 0:
            for value in [*args, *kwargs.values()]:
                if isinstance(value, Tensor) and value.dim() > 0:
                    capture.set_batch(value.shape[0])
                    break
        unknown = self._tables - self._harmless - self._batches
        self._start = _Before(module, args, kwargs, self._draws) if unknown else None
        self._prints = []

    def _after_model(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        """Runs the model once more as it is, where outputs were given a batch dimension.

        Raises:
            LayerError: If a layer then answers something else, or it cannot be run again.
        """
        capture = self._live()
        shared = sorted(capture.shared - self._harmless) if capture is not None else []
        if capture is None or self._start is None or not shared:
            return
        found, self._prints, self._again = self._prints, [], True
        try:
            with self.quiet(), self._start.again(self._model):
                plain = module.forward(*self._start.args, **self._start.kwargs)
        except Exception as error:
            what = f"one that fails when run again: {type(error).__name__}: {error}"
            raise _unsure(shared, what) from error
        finally:
            self._again = False
        expected, self._prints = self._prints, []
        found += [_print("", leaf) for leaf in _tensors(output)]
        expected += [_print("", leaf) for leaf in _tensors(plain)]
        tolerance = 1e-2 if capture.rounded else 1e-4
        same = len(found) == len(expected) and all(
            one[:2] == other[:2] and abs(one[2] - other[2]) <= tolerance * abs(other[2])
            for one, other in zip(found, expected, strict=True)
        )
        if not same:
            raise _changed(shared)
        if not any(size for _, _, size in expected):
            raise _unsure(shared, "one whose outputs are all zero")
        self._harmless |= capture.shared

    def _received(self, parameter: Parameter) -> Callable[[Tensor], None]:
        def received(gradient: Tensor) -> None:
            if self._capture is not None and not self._quiet:
                covered = parameter.name in self._structure.parameters
                expected = not (self._without and covered)
                self._capture.receive(parameter, gradient, expected=expected)

        return received

    def _added(self, parameter: Parameter) -> Callable[[Tensor], None]:
        def added(tensor: Tensor) -> None:
            if self._capture is not None and not self._quiet:
                self._capture.added[parameter.name] += 1

        return added

    def _before(self, layer: Layer) -> Callable[[nn.Module, Any], None]:
        """Spares the layer its weight gradients, and watches inside attention.

        The weights ask for no gradient while their own layer runs, and for one elsewhere: so a
        use outside the layer, which no rule sees, still shows.
        """

        def before(module: nn.Module, args: Any) -> None:
            capture = self._live()
            if capture is None:
                return
            spared = self._without or self._joins(capture, layer, module, args)
            tensors: list[Tensor] = [
                parameter.tensor
                for parameter in layer.parameters.values()
                if spared and parameter.tensor.requires_grad
            ]
            projections = None
            if layer.rule is ATTENTION:
                if capture.batch == 0 and args and isinstance(args[0], Tensor):
                    capture.set_batch(args[0].shape[0])
                record = self._record_projection(capture, layer)
                projections = Projections(
                    layer.name,
                    module,  # type: ignore[arg-type]
                    layer.parameters,
                    capture.batch,
                    record,
                )
                projections.start()
            self._running.append((layer, tensors, projections))
            for tensor in tensors:
                tensor.requires_grad_(False)

        return before

    def _release(self, layer: Layer) -> Callable[[nn.Module, Any, Any], None]:
        """Undoes `_before`, also when the layer fails."""

        def release(module: nn.Module, args: Any, output: Any) -> None:
            if self._quiet:
                return
            if self._running and self._running[-1][0] is layer:  # else `_join` has done it
                self._let_go()

        return release

    def _let_go(self) -> None:
        _, tensors, projections = self._running.pop()
        for tensor in tensors:
            tensor.requires_grad_(True)
        if projections is not None:
            projections.stop()

    def _after(self, layer: Layer) -> Callable[..., Tensor | None]:
        def after(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Tensor | None:
            capture = self._live()
            if capture is None:
                if self._again and isinstance(output, Tensor):
                    self._note(layer, output)
                return None
            if not isinstance(output, Tensor):
                raise LayerError(
                    f"{layer.name or 'the model'} must return a tensor to be recorded, got "
                    f"{type(output).__name__}; leave it out with layers=, or freeze it"
                )
            if capture.batch == 0:
                capture.set_batch(output.shape[0])
            if layer.rule is FUNCTIONAL:
                inputs: tuple[Any, ...] = (
                    Call.of(args, kwargs, output.device.type, capture.batch),
                )
                if output._is_view():
                    output = output.clone()  # a view changed in place would lose its hook
            else:
                inputs = args if args else tuple(kwargs.values())
            inputs, output = self._batched(capture, layer, inputs, output)
            if self._start is not None:
                self._note(layer, output)
            if layer.rule is FUNCTIONAL:
                feed = self._functional(capture, layer, inputs[0])
                return self._watch(capture, layer, (), output, feed, saved=False)
            running = [tensors for each, tensors, _ in self._running[-1:] if each is layer]
            if not self._without and running and running[0]:
                return self._join(capture, layer, inputs[0], output)
            inputs = tuple(_kept(each, output) for each in inputs)

            def feed_rule(inputs: tuple[Any, ...], delta: Tensor) -> None:
                layer.rule.add(LayerSink(capture, layer), layer.module, inputs, delta)

            own = not layer.rule.kind.startswith("registered:")
            saved = own and "weight" in layer.parameters
            return self._watch(capture, layer, inputs, output, feed_rule, saved=saved)

        return after

    def _joins(self, capture: Capture, layer: Layer, module: nn.Module, inputs: Any) -> bool:
        """Whether the batch's own weight gradient is taken from the samples' gradients.

        Not where both are compared one by one; nor where a product of all samples at once takes
        less than summing theirs, with few positions a sample.
        """
        values = inputs[0] if inputs else None
        weight = layer.parameters.get("weight")
        return (
            layer.rule.kind == "linear"
            and capture.check == "total"
            and weight is not None
            and weight.tensor.requires_grad
            and module.weight is weight.tensor  # not others, by torch.func.functional_call
            and ("bias" not in layer.parameters or module.bias is layer.parameters["bias"].tensor)
            and isinstance(values, Tensor)
            and capture.device_of(values) is None
            and all(
                each.dtype == torch.float32 and each.device.type == "cpu"
                for each in (values, weight.tensor)
            )
            and not torch.is_autocast_enabled("cpu")
            and values.numel() >= FEW_TERMS * capture.batch * values.shape[-1]
        )

    def _join(self, capture: Capture, layer: Layer, values: Tensor, output: Tensor) -> Tensor:
        """Lets the output's gradient feed the rows and make the weight's gradient, in one pass."""
        self._let_go()
        weight = layer.parameters["weight"].tensor
        bias = layer.parameters["bias"].tensor if "bias" in layer.parameters else None

        def gradients(ctx: Any, delta: Tensor) -> tuple[Any, Any, Any]:
            values, weight = ctx.saved_tensors
            for_values, for_weight, for_bias = ctx.needs_input_grad[:3]
            with torch.no_grad():
                total = torch.zeros_like(weight, memory_format=torch.contiguous_format)
                if capture is self._capture:
                    LayerSink(capture, layer).linear(
                        delta.reshape(capture.batch, -1, weight.shape[0]),
                        values.reshape(capture.batch, -1, weight.shape[1]),
                        "weight",
                        "bias",
                        total=total.numpy(),
                    )
                elif for_weight:
                    total = delta.flatten(0, -2).mT @ values.flatten(0, -2)
                return (
                    delta @ weight if for_values else None,
                    total,
                    delta.flatten(0, -2).sum(0) if for_bias else None,
                )

        guarded = capture.guard(gradients)
        joined: Tensor = _FromSamples.apply(values, weight, bias, output.detach(), guarded)
        return joined

    def _note(self, layer: Layer, output: Tensor) -> None:
        """Keeps a print of an output, by which the model is compared with itself."""
        capture = self._capture
        if capture is not None and layer.name not in capture.shared:
            self._prints.append(_print(layer.name, output.detach()))

    def _functional(self, capture: Capture, layer: Layer, call: Call) -> Feed:
        def feed(_: tuple[Any, ...], delta: Tensor) -> None:
            with self.quiet():
                add_functional(LayerSink(capture, layer), layer, call, delta)

        return feed

    def _record_projection(self, capture: Capture, layer: Layer) -> Callable[..., Tensor]:
        def record(
            values: Tensor,
            output: Tensor,
            weight: str | None,
            row: int,
            bias: str | None,
            value: int,
        ) -> Tensor:
            def feed(kept: tuple[Any, ...], delta: Tensor) -> None:
                sink, values = LayerSink(capture, layer), kept[0]
                # [terms, batch, features], perhaps flattened, to [batch, terms, features]
                delta = delta.reshape(-1, capture.batch, delta.shape[-1]).transpose(0, 1)
                if weight is not None:
                    inputs = values.reshape(-1, capture.batch, values.shape[-1]).transpose(0, 1)
                    columns = layer.parameters[weight].shape[1]
                    sink.linear(delta, inputs, weight, bias or "", row * columns, value)
                elif bias is not None:
                    sink.flat(bias, delta.sum(1, dtype=torch.float32), start=value)

            inputs = (_kept(values, output),)
            return self._watch(capture, layer, inputs, output, feed, saved=weight is not None)

        return record

    def _watch(
        self,
        capture: Capture,
        layer: Layer,
        inputs: tuple[Any, ...],
        output: Tensor,
        feed: Feed,
        *,
        saved: bool,
    ) -> Tensor:
        """Hangs `feed` on the output's gradient; returns the output to go on with.

        Inputs that autograd would have saved for the weight's gradient are let go when it would
        have let them go: the backward pass needs their memory. Without the recording a second pass
        would be an error there.
        """
        if not output.requires_grad:
            # Nothing before this layer takes a gradient: the graph of this pass begins here.
            output = output + self._anchor.to(output.device, output.dtype)
        kept: tuple[Any, ...] | None = inputs
        versions = _versions(inputs)
        capture.rounded |= output.dtype in (torch.float16, torch.bfloat16)

        def backward(delta: Tensor) -> None:
            nonlocal kept
            if capture is not self._capture:
                return
            if kept is None:
                raise LayerError(
                    "backward must be told retain_graph=True to go through a graph twice, got "
                    f"{layer.name or 'the model'} a second time"
                )
            if _versions(kept) != versions:
                raise changed_in_place(layer.name)
            with torch.no_grad():
                feed(kept, delta)
            if saved and not _keeps_graph():
                kept = None

        output.register_hook(capture.guard(backward))  # type: ignore[no-untyped-call]
        return output

    def _batched(
        self, capture: Capture, layer: Layer, inputs: tuple[Any, ...], output: Tensor
    ) -> tuple[tuple[Any, ...], Tensor]:
        """Inputs and output with the batch in dimension 0.

        Only an embedding of positions is given a batch dimension that it does not have.

        Raises:
            LayerError: If dimension 0 is neither the batch nor positions shared by the batch.
        """
        batch = capture.batch
        first = inputs[0] if inputs else None
        if (
            isinstance(layer.module, nn.Embedding)
            and isinstance(first, Tensor)
            and self._is_shared(capture, layer, first)
        ):
            if not _matches(layer.name, capture.unbatched):
                capture.shared.add(layer.name)
            if first.dim() > 1 and first.shape[0] == 1:
                first, output = first[0], output[0]
            wide = first.expand(batch, *first.shape)
            return (wide, *inputs[1:]), output.expand(batch, *output.shape)
        if output.dim() == 0 or output.shape[0] != batch:
            if strange := capture.shared - self._harmless:
                raise _changed(sorted(strange))
            raise LayerError(
                f"dimension 0 must be the batch of {batch} in every recorded layer, got output "
                f"shape {list(output.shape)} from {layer.name or 'the model'} "
                f"({type(layer.module).__name__}); one batch is one forward pass of all its ids "
                "(other passes belong under torch.no_grad); leave a layer that is shared by the "
                "batch out with layers=" + ", or pass queries=" * capture.guessed
            )
        return inputs, output

    def _is_shared(self, capture: Capture, layer: Layer, indices: Tensor) -> bool:
        """Whether an index is one of positions shared by the batch, like arange(T)."""
        said = [pattern[1:] for pattern in capture.unbatched if pattern.startswith("!")]
        if _matches(layer.name, capture.unbatched):
            return True
        row = indices[0] if indices.dim() == 2 and indices.shape[0] == 1 else indices
        # Of one example, [T] can only be positions, but for T = 1, which may be either.
        either = capture.batch == 1 and (row is not indices or len(row) == 1)
        if row.dim() != 1 or either or _matches(layer.name, said):
            self._batches.add(layer.name)
            return False
        counting = bool((row.diff() == 1).all())
        if row is indices and len(row) == capture.batch:
            if counting and layer.name not in self._positions | self._batches:
                raise LayerError(
                    f"the index of {layer.name} must be told apart as a batch or as positions, got "
                    f"{capture.batch} rising numbers, as many as the batch; pass "
                    f"unbatched=[{layer.name!r}] if they are positions that are added to the "
                    f"batch, or unbatched=['!{layer.name}'] if they are one index per example"
                )
            if not counting:
                self._batches.add(layer.name)
            return counting and layer.name in self._positions
        if counting:
            self._positions.add(layer.name)
        return counting

    @contextmanager
    def quiet(self) -> Iterator[None]:
        """Keeps the hooks still while layers are run again."""
        before, self._quiet = self._quiet, True
        try:
            yield
        finally:
            self._quiet = before


def changed_in_place(layer: str) -> LayerError:
    """The error for an input that is not what the layer saw."""
    return LayerError(
        f"the input of {layer} must not be changed in place between forward and backward, got one "
        "that was"
    )


def _versions(values: tuple[Any, ...]) -> list[int]:
    """How often each tensor has been changed in place."""
    return [each._version for each in values if isinstance(each, Tensor)]


def _keeps_graph() -> bool:
    """Whether the backward pass that runs may be followed by another; yes where torch can't say."""
    asked = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return asked is None or bool(asked())


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _tensors(output: Any) -> list[Tensor]:
    """The tensors in what a model returned, as far as they can be seen."""
    leaves = tree_flatten(output)[0]
    return [leaf.detach() for leaf in leaves if isinstance(leaf, Tensor)]


def _print(name: str, output: Tensor) -> tuple[str, tuple[int, ...], float]:
    """Name, shape and norm of an output."""
    return name, tuple(output.shape), float(output.double().norm())


def _unsure(layers: Sequence[str], what: str) -> LayerError:
    names = ", ".join(layers)
    return LayerError(
        f"that the positions of {names} are simply added to the batch must be confirmed by "
        f"running the model once more, got {what}; if they are, pass unbatched={list(layers)!r}, "
        "and it is not run again"
    )


_busy = threading.local()
"""Whether a thread is capturing; `yes`."""


def _changed(layers: Sequence[str]) -> LayerError:
    return LayerError(
        f"positions must be added to a batch as they come from their layer, got a model that does "
        f"something else with those of {', '.join(layers)}, which are given a batch dimension, "
        "[T, width] to [batch, T, width], while they are recorded; look positions up as [1, T] or "
        "[batch, T] (arange(T).expand(batch, T)), without dropout of their own, or leave the layer "
        "out with layers=; if the model answers differently each time for another reason, and "
        f"positions are simply added, pass unbatched={list(layers)!r}"
    )


def _kept(value: Any, output: Tensor) -> Any:
    """An input to keep until the backward pass: detached, and as rounded as autocast used it."""
    if not isinstance(value, Tensor):
        return value
    value = value.detach()
    if value.is_floating_point() and output.dtype in (torch.float16, torch.bfloat16):
        value = value.to(output.dtype)
    return value


@contextmanager
def _without_fast_path() -> Iterator[None]:
    """Keeps transformer layers from a fused inference path that runs no hooks."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


@contextmanager
def without_compiled_code(model: nn.Module) -> Iterator[None]:
    """Runs what torch.compile made as plain Python: compiled code does not see later hooks.

    Raises:
        LayerError: If the model is compiled, and torch is too old to run it plainly.
    """
    if "torch._dynamo" not in sys.modules:  # nothing can have been compiled
        yield
    elif hasattr(torch.compiler, "set_stance"):
        with torch.compiler.set_stance("force_eager"):
            yield
    else:
        for name, module in model.named_modules():
            compiled = type(module).__name__ == "OptimizedModule"
            if compiled or getattr(module, "_compiled_call_impl", None) is not None:
                raise LayerError(
                    f"torch must be 2.6 or newer to record a compiled model, got "
                    f"{torch.__version__} and {name or 'the model'}"
                )
        yield


@contextmanager
def kept_gradients(model: nn.Module) -> Iterator[None]:
    """Leaves `.grad` as it is, whatever is computed meanwhile."""
    before = [(parameter, parameter.grad) for parameter in parameters_of(model)]
    try:
        for parameter, _ in before:
            parameter.grad = None
        yield
    finally:
        for parameter, gradient in before:
            parameter.grad = gradient


def refuse_batch_statistics(model: nn.Module) -> None:
    """Nothing, if no layer mixes the examples of a batch.

    Raises:
        LayerError: If a BatchNorm is in training mode; says why that cannot be.
    """
    if not any(isinstance(each, nn.modules.batchnorm._BatchNorm) for each in modules_of(model)):
        return
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and (
            module.training or module.running_mean is None
        ):
            mode = "training mode" if module.training else "no running statistics"
            raise LayerError(
                f"{name} ({type(module).__name__}) must be in evaluation mode, got {mode}: "
                "its output mixes the examples of a batch, so no example has a gradient "
                "of its own; call .eval() on it, or use GroupNorm or LayerNorm"
            )
