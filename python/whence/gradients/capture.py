"""Hooks that see each layer's input and output gradient, and feed the layer's rule.

A forward hook keeps the layer's input and hangs a hook on its output tensor; when the backward
pass reaches the output, the rule turns the two into per-sample gradients, which go straight into
the sketch. Hooks on tensors rather than on modules let activations be changed in place, and need
nothing of the loss or the loop.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from fnmatch import fnmatchcase
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from whence.errors import CoverageError, LayerError, NotFiniteError
from whence.gradients.attention import Projections
from whence.gradients.functional import Call, add_functional
from whence.gradients.layers import ATTENTION, FUNCTIONAL
from whence.gradients.structure import Layer, Parameter, Structure, uncovered_error
from whence.sketch import Accumulator, Sketch

EXACT_TOLERANCE = 1e-3
"""Largest difference between a batch's gradient and its samples' sum, as a share of the sum of
their norms, when all was computed in float32."""

ROUNDED_TOLERANCE = 5e-2
"""The same under autocast, where the batch's own sum is rounded to 8 or 11 bits."""

VISIBLE_SHARE = 0.03
"""The share of all parameters' norms that one parameter's is taken to have at least."""


class Capture:
    """What the hooks gather during one forward and backward pass.

    Args:
        structure: What is recorded.
        sketch: The map.
        batch: Number of samples, if known; else that of the first layer's input.
        unbatched: Patterns of layers whose one-dimensional input is positions, not a batch.
        check: Whether to compare the samples' sum with the batch's own gradient.
    """

    def __init__(
        self,
        structure: Structure,
        sketch: Sketch,
        batch: int | None,
        unbatched: Sequence[str] = (),
        *,
        check: bool = False,
    ) -> None:
        self.structure = structure
        self.sketch = sketch
        self.unbatched = unbatched
        self.batch = 0
        self.fired: set[str] = set()
        self.received: set[str] = set()
        self.bad: dict[int, str] = {}
        self.rounded = False
        self.failure: BaseException | None = None
        self.check = check
        self._sums: dict[str, NDArray[np.float64]] = {}
        self._norms: dict[str, float] = {}
        self._gradients: dict[str, Tensor] = {}
        self._accumulator: Accumulator | None = None
        if batch is not None:
            self.set_batch(batch)

    def set_batch(self, batch: int) -> None:
        """Fixes the number of samples."""
        self.batch = batch
        self._accumulator = Accumulator(self.sketch, batch)

    @property
    def accumulator(self) -> Accumulator:
        """The rows so far."""
        if self._accumulator is None:
            raise LayerError("the model must be called with a batch, got no layer that ran")
        return self._accumulator

    def add(
        self, layer: str, parameter: Parameter, feed: Callable[[Accumulator], list[int]]
    ) -> None:
        """Lets `feed` add to the rows, and keeps the books on it."""
        self.fired.add(parameter.name)
        if self.check:
            part = Accumulator(self.sketch, self.batch)
            bad = feed(part)
            self.accumulator.totals += part.totals
            total = self._sums.setdefault(parameter.name, np.zeros(self.sketch.dim))
            total += part.totals.sum(axis=0)
            norm = float(np.linalg.norm(part.totals, axis=1).sum())
            self._norms[parameter.name] = self._norms.get(parameter.name, 0.0) + norm
        else:
            bad = feed(self.accumulator)
        for row in bad:
            self.bad.setdefault(row, layer)

    def guard(self, hook: Callable[[Tensor], None]) -> Callable[[Tensor], None]:
        """`hook`, whose failure is remembered: rows that it left partial are never stored."""

        def guarded(delta: Tensor) -> None:
            try:
                hook(delta)
            except BaseException as error:
                self.failure = error
                raise

        return guarded

    def receive(self, parameter: Parameter, gradient: Tensor) -> None:
        """Notes that autograd computed the batch's own gradient of a parameter."""
        self.received.add(parameter.name)
        if self.check:
            known = self._gradients.get(parameter.name)
            gradient = gradient.detach()
            gradient = gradient.to_dense() if gradient.is_sparse else gradient
            self._gradients[parameter.name] = (
                gradient.clone() if known is None else known + gradient
            )

    def rows(self) -> NDArray[np.float32]:
        """[batch, dim] the rows, not yet scaled to each sample's own loss.

        Raises:
            CoverageError: If a trainable parameter received a gradient that no rule saw, or only
                a part of which a rule saw.
            LayerError: If no gradient was seen at all.
        """
        if self.failure is not None:  # a rule failed, and the loop went on: the rows are partial
            raise self.failure
        missed = self.received - self.fired
        if missed:
            raise uncovered_error(sorted(missed))
        if not self.fired:
            raise LayerError(
                "loss.backward() must be called inside the batch on a loss of the "
                "recorded model, got no gradient in any layer"
            )
        if self.check and not self.bad:
            self._compare()
        rows = self.accumulator.totals
        with np.errstate(over="ignore", invalid="ignore"):
            return rows.astype(np.float32)

    def _compare(self) -> None:
        """Checks that the samples add up to the batch.

        Raises:
            CoverageError: If not: a parameter is used where its layer's rule cannot see.
        """
        tolerance = ROUNDED_TOLERANCE if self.rounded else EXACT_TOLERANCE
        # Some gradients are zero but for rounding (the bias of attention's keys, to which softmax
        # is blind): a difference also counts only if it is visible beside the whole gradient.
        floor = VISIBLE_SHARE * float(np.linalg.norm(list(self._norms.values())))
        wrong = []
        for name, gradient in self._gradients.items():
            if name not in self._sums:
                continue
            whole = Accumulator(self.sketch, 1)
            whole.add(
                name,
                self.structure.parameters[name].shape,
                gradient.float().cpu().numpy().reshape(1, -1),
            )
            difference = float(np.linalg.norm(whole.totals[0] - self._sums[name]))
            if difference > tolerance * max(
                self._norms[name], float(np.linalg.norm(whole.totals)), floor
            ):
                wrong.append(name)
        if wrong:
            raise CoverageError(
                f"per-sample gradients must add up to the batch's gradient, got a difference in "
                f"{', '.join(wrong)}: a parameter is used outside its own layer (a weight tied by "
                "hand, say), or a layer's forward is not what its class says; use it through a "
                "layer, leave it out with layers=, or teach the layer with whence.register_layer"
            )


class LayerSink:
    """Where one layer's rule puts its gradients; see `layers.Sink`."""

    def __init__(self, capture: Capture, layer: Layer) -> None:
        self.batch = capture.batch
        self._capture = capture
        self._layer = layer

    def wants(self, name: str) -> bool:
        """Whether this parameter is recorded."""
        return name in self._layer.parameters

    def flat(self, name: str, values: Tensor, start: int = 0) -> None:
        """Takes [batch, ...] gradients of the coordinates from `start` on."""
        parameter = self._layer.parameters[name]
        array = to_array(values).reshape(self.batch, -1)
        self._feed(parameter, lambda into: into.add(parameter.name, parameter.shape, array, start))

    def outer(self, name: str, left: Tensor, right: Tensor, start: int = 0, first: int = 0) -> None:
        """Takes Σ_t left[t] right[t]ᵀ of the samples from `first` on."""
        parameter = self._layer.parameters[name]
        arrays = to_array(left), to_array(right)
        self._feed(
            parameter,
            lambda into: into.add_outer(
                parameter.name, parameter.shape, *arrays, start=start, first=first
            ),
        )

    def lookup(self, name: str, indices: Tensor, values: Tensor, ignored: int | None) -> None:
        """Takes values[t] for row indices[t]."""
        parameter = self._layer.parameters[name]
        places = indices.detach().to("cpu", torch.int64).numpy()
        array = to_array(values)
        self._feed(
            parameter,
            lambda into: into.add_lookup(parameter.name, parameter.shape, places, array, ignored),
        )

    def _feed(self, parameter: Parameter, feed: Callable[[Accumulator], list[int]]) -> None:
        self._capture.add(self._layer.name, parameter, feed)


def to_array(values: Tensor) -> NDArray[np.float32]:
    """A tensor as float32 in the memory of the processor, without a copy if it is there."""
    return values.detach().to("cpu", torch.float32).numpy()


class Hooks:
    """The hooks of one model, quiet until a capture is set.

    Args:
        model: The model.
        structure: What is recorded of it.
        strict: Whether a gradient in a parameter without a rule is an error.
    """

    def __init__(self, model: nn.Module, structure: Structure, *, strict: bool = True) -> None:
        self.capture: Capture | None = None
        self._strict = strict
        self._structure = structure
        self._model = model
        self._stack = ExitStack()
        self._running: list[Projections] = []
        self._anchor = torch.zeros((), requires_grad=True)
        self._positions: set[str] = set()
        self._quiet = False

    def install(self) -> None:
        """Puts the hooks on."""
        for layer in self._structure.layers:
            if layer.rule is ATTENTION:
                before = layer.module.register_forward_pre_hook(self._before_attention(layer))
                after = layer.module.register_forward_hook(self._after_attention, always_call=True)
                self._stack.callback(before.remove)
            else:
                after = layer.module.register_forward_hook(self._after(layer), with_kwargs=True)
            self._stack.callback(after.remove)
        before = self._model.register_forward_pre_hook(self._before_model, with_kwargs=True)
        self._stack.callback(before.remove)
        parameters = {p.name: p for p in self._structure.parameters.values()}
        loose = {
            name: Parameter(name, tuple(tensor.shape), tensor)
            for name, tensor in self._structure.uncovered.items()
        }
        for parameter in [*parameters.values(), *(loose.values() if self._strict else ())]:
            if parameter.tensor.requires_grad:
                handle = parameter.tensor.register_hook(self._received(parameter))
                self._stack.callback(handle.remove)

    def remove(self) -> None:
        """Takes all hooks off."""
        self.capture = None
        self._stack.close()

    @contextmanager
    def capturing(self, capture: Capture, *, weight_gradients: bool) -> Iterator[Capture]:
        """Lets the hooks feed `capture` for a while.

        Args:
            capture: What gathers.
            weight_gradients: Whether the pass computes the batch's own gradients into `.grad`;
                if not, `.grad` is what it was, and their computation is skipped.
        """
        with ExitStack() as stack:
            stack.enter_context(_without_fast_path())
            stack.enter_context(_without_compiled_code(self._model))
            if not weight_gradients:
                stack.enter_context(
                    _without_weight_gradients(self._model, self._structure, skip=not capture.check)
                )
            self.capture = capture
            try:
                yield capture
            finally:
                self.capture = None
                while self._running:
                    self._running.pop().stop()

    def _live(self) -> Capture | None:
        return self.capture if torch.is_grad_enabled() and not self._quiet else None

    def _before_model(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        """Learns the number of queries from the model's first tensor."""
        capture = self._live()
        if capture is not None and capture.batch == 0:
            for value in [*args, *kwargs.values()]:
                if isinstance(value, Tensor) and value.dim() > 0:
                    capture.set_batch(value.shape[0])
                    return

    def _received(self, parameter: Parameter) -> Callable[[Tensor], None]:
        def received(gradient: Tensor) -> None:
            if self.capture is not None and not self._quiet:
                self.capture.receive(parameter, gradient)

        return received

    def _after(self, layer: Layer) -> Callable[..., Tensor | None]:
        def after(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Tensor | None:
            capture = self._live()
            if capture is None:
                return None
            if not isinstance(output, Tensor):
                raise LayerError(
                    f"{layer.name} must return a tensor to be recorded, got {type(output).__name__}"
                )
            if layer.rule is FUNCTIONAL:
                inputs: tuple[Any, ...] = (Call(args, kwargs),)
            else:
                inputs = args if args else tuple(kwargs.values())
            if capture.batch == 0:
                capture.set_batch(output.shape[0])
            inputs, shaped = self._batched(capture, layer, inputs, output)
            return self._watch(capture, layer, inputs, shaped)

        return after

    def _watch(
        self, capture: Capture, layer: Layer, inputs: tuple[Any, ...], output: Tensor
    ) -> Tensor:
        """Hangs a hook on the output, which feeds the rule; returns the output to go on with."""
        if not output.requires_grad:
            # Nothing before this layer takes a gradient: the graph of this pass begins here.
            output = output + self._anchor.to(output.device, output.dtype)
        if layer.rule is not FUNCTIONAL:
            inputs = tuple(_kept(each, output) for each in inputs)
        versions = [each._version for each in inputs if isinstance(each, Tensor)]
        capture.rounded |= output.dtype in (torch.float16, torch.bfloat16)

        def backward(delta: Tensor) -> None:
            if capture is not self.capture:
                return
            now = [each._version for each in inputs if isinstance(each, Tensor)]
            if now != versions:
                raise LayerError(
                    f"the input of {layer.name} must not be changed in place between "
                    "forward and backward, got one that was"
                )
            sink = LayerSink(capture, layer)
            with torch.no_grad():
                if layer.rule is FUNCTIONAL:
                    with self.quiet():
                        add_functional(sink, layer, inputs[0], delta)
                else:
                    layer.rule.add(sink, layer.module, inputs, delta)

        output.register_hook(capture.guard(backward))  # type: ignore[no-untyped-call]
        return output

    def _batched(
        self, capture: Capture, layer: Layer, inputs: tuple[Any, ...], output: Tensor
    ) -> tuple[tuple[Any, ...], Tensor]:
        """Inputs and output with the batch in dimension 0.

        Raises:
            LayerError: If dimension 0 is neither the batch nor positions shared by the batch.
        """
        batch = capture.batch
        first = inputs[0] if inputs else None
        if (
            isinstance(layer.module, nn.Embedding)
            and isinstance(first, Tensor)
            and first.dim() == 1
        ):
            if self._are_positions(capture, layer, first):
                shape = (batch, *output.shape)
                return (first.expand(batch, -1), *inputs[1:]), output.expand(shape)
        elif output.dim() > 0 and output.shape[0] == 1 and batch > 1:
            wide = tuple(
                each.expand(batch, *each.shape[1:])
                if isinstance(each, Tensor) and each.dim() and each.shape[0] == 1
                else each
                for each in inputs
            )
            return wide, output.expand(batch, *output.shape[1:])
        if output.dim() == 0 or output.shape[0] != batch:
            raise LayerError(
                f"dimension 0 must be the batch of {batch} in every recorded layer, got output "
                f"shape {list(output.shape)} from {layer.name} ({type(layer.module).__name__})"
            )
        return inputs, output

    def _are_positions(self, capture: Capture, layer: Layer, indices: Tensor) -> bool:
        """Whether a one-dimensional index is positions shared by the batch, like arange(T)."""
        if any(fnmatchcase(layer.name, pattern) for pattern in capture.unbatched):
            return True
        counting = bool((indices.diff() == 1).all())
        if len(indices) != capture.batch:
            if counting:
                self._positions.add(layer.name)
            return counting
        if layer.name in self._positions:
            return True
        if counting and capture.batch > 1:
            raise LayerError(
                f"the index of {layer.name} must be told apart as a batch or as positions, got "
                f"{capture.batch} rising numbers, as many as the batch; if they are positions, "
                f"pass unbatched=[{layer.name!r}], else use another batch size"
            )
        return False

    def _before_attention(self, layer: Layer) -> Callable[[nn.Module, Any], None]:
        def before(module: nn.Module, args: Any) -> None:
            capture = self._live()
            if capture is None:
                return
            if capture.batch == 0 and args and isinstance(args[0], Tensor):
                capture.set_batch(args[0].shape[0])
            projections = Projections(
                layer.name,
                module,  # type: ignore[arg-type]
                layer.parameters,
                capture.batch,
                self._record_projection(capture, layer),
            )
            self._running.append(projections)
            projections.start()

        return before

    def _after_attention(self, module: nn.Module, args: Any, output: Any) -> None:
        if self._running:
            self._running.pop().stop()

    def _record_projection(self, capture: Capture, layer: Layer) -> Callable[..., Tensor]:
        def record(
            values: Tensor,
            output: Tensor,
            weight: str | None,
            row: int,
            bias: str | None,
            value: int,
        ) -> Tensor:
            if not output.requires_grad:
                output = output + self._anchor.to(output.device, output.dtype)
            values = _kept(values, output)
            version = values._version
            capture.rounded |= output.dtype in (torch.float16, torch.bfloat16)

            def backward(delta: Tensor) -> None:
                if capture is not self.capture:
                    return
                if values._version != version:
                    raise LayerError(
                        f"the input of {layer.name} must not be changed in place "
                        "between forward and backward, got one that was"
                    )
                sink = LayerSink(capture, layer)
                with torch.no_grad():
                    delta = delta.transpose(0, 1)
                    if weight is not None:
                        columns = layer.parameters[weight].shape[1]
                        sink.outer(weight, delta, values.transpose(0, 1), start=row * columns)
                    if bias is not None:
                        sink.flat(bias, delta.sum(1, dtype=torch.float32), start=value)

            output.register_hook(capture.guard(backward))  # type: ignore[no-untyped-call]
            return output

        return record

    @contextmanager
    def quiet(self) -> Iterator[None]:
        """Keeps the hooks still while layers are run again."""
        before, self._quiet = self._quiet, True
        try:
            yield
        finally:
            self._quiet = before


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
def _without_compiled_code(model: nn.Module) -> Iterator[None]:
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
def _without_weight_gradients(
    model: nn.Module, structure: Structure, *, skip: bool
) -> Iterator[None]:
    """Leaves `.grad` as it is; with `skip`, the gradients of covered weights are not computed."""
    covered = {id(parameter.tensor) for parameter in structure.parameters.values()}
    before = [(p, p.requires_grad, p.grad) for p in model.parameters()]
    try:
        for parameter, _, _ in before:
            if skip and id(parameter) in covered:
                parameter.requires_grad_(False)
            parameter.grad = None
        yield
    finally:
        for parameter, requires_grad, gradient in before:
            parameter.requires_grad_(requires_grad)
            parameter.grad = gradient


def not_finite(ids: Sequence[Any], bad: dict[int, str]) -> NotFiniteError:
    """The error for gradients that are NaN or infinite."""
    shown = ", ".join(f"id {ids[row]!r} in {bad[row]}" for row in sorted(bad)[:8])
    more = f" and {len(bad) - 8} more" if len(bad) > 8 else ""
    return NotFiniteError(f"gradients must be finite, got NaN or infinity for {shown}{more}")


def refuse_batch_statistics(model: nn.Module) -> None:
    """Nothing, if no layer mixes the examples of a batch.

    Raises:
        LayerError: If a BatchNorm is in training mode; says why that cannot be.
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.training:
            raise LayerError(
                f"{name} ({type(module).__name__}) must be in evaluation mode, got training "
                "mode: its output mixes the examples of a batch, so no example has a gradient "
                "of its own; call .eval() on it, or use GroupNorm or LayerNorm"
            )
