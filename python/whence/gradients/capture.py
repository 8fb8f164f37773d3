"""What one forward and backward pass gathers: rows, and the books that show they are whole."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from whence.errors import CoverageError, LayerError, NotFiniteError
from whence.factored import Factored, FactoredAccumulator
from whence.gradients.blocks import BlockAccumulator, BlockMap
from whence.gradients.coordinates import Coordinates, CoordinatesAccumulator
from whence.gradients.device import DeviceAccumulator, supports
from whence.gradients.divided import Divided, DividedAccumulator
from whence.gradients.structure import Layer, Parameter, Structure, uncovered_error
from whence.sketch import Accumulator, Sketch, layer_of

Guarded = TypeVar("Guarded")

Gatherer: TypeAlias = Accumulator | FactoredAccumulator | BlockAccumulator | DividedAccumulator
"""What takes the gradients of a batch."""

Totals: TypeAlias = Accumulator | DeviceAccumulator | CoordinatesAccumulator | DividedAccumulator
"""Running totals, on the processor or on another device."""

DEVICES = ("cuda",)
"""Types of devices that sketch the gradients that are on them."""

EXACT_TOLERANCE = 1e-3
"""Largest difference between a batch's gradient and its samples' sum, as a share of the sum of
their norms, when all was computed in float32."""

ROUNDED_TOLERANCE = 5e-2
"""The same under autocast, where the batch's own sum is rounded to 8 or 11 bits."""

CHECKED = 512
"""Width of the sketches by which factored rows are compared with the batch."""

VISIBLE_SHARE = 0.03
"""The share of all parameters' norms that one parameter's is taken to have at least."""


class Capture:
    """What the hooks gather during one forward and backward pass.

    Args:
        structure: What is recorded.
        rows: The map to rows.
        batch: Number of samples, if known; else that of the model's first tensor.
        unbatched: Patterns of embeddings whose output is shared by the batch.
        check: Whether to compare the samples' sums with the batch's own gradients: "no", "total"
            for all parameters together, "each", or "probe" for factored rows along one direction.
    """

    def __init__(
        self,
        structure: Structure,
        rows: Sketch | Factored | BlockMap | Divided,
        batch: int | None,
        unbatched: Sequence[str] = (),
        *,
        check: str = "no",
    ) -> None:
        self.structure = structure
        self.unbatched = unbatched
        self.batch = 0
        self.guessed = batch is None
        self.fired: set[str] = set()
        self.bad: dict[int, str] = {}
        self.rounded = False
        self.shared: set[str] = set()
        self.failure: BaseException | None = None
        self.check = check
        self._map = rows
        # What samples and batch are compared by; factors of a batch cannot be, and coordinates of
        # one parameter say little.
        self._checking: Sketch | Coordinates | Divided = Sketch(
            "tensorsketch", dim=CHECKED, threads=1
        )
        if isinstance(rows, Sketch) or (
            isinstance(rows, (Coordinates, Divided)) and check == "total"
        ):
            self._checking = rows
        self._received: Counter[str] = Counter()
        self.added: Counter[str] = Counter()
        self._outside: set[str] = set()
        self._samples: dict[tuple[str, torch.device | None], Totals] = {}
        self._whole: dict[tuple[str, torch.device | None], Totals] = {}
        self._devices: dict[torch.device, DeviceAccumulator] = {}
        self._probed: dict[str, Any] = {}
        self._layers: dict[str, str] = {}
        self._accumulator: Gatherer | None = None
        if batch is not None:
            self.set_batch(batch)

    def set_batch(self, batch: int) -> None:
        """Fixes the number of samples."""
        self.batch = batch
        self._accumulator = self._map.accumulator(batch, self.structure.parameters)

    @property
    def accumulator(self) -> Gatherer:
        """The rows so far."""
        if self._accumulator is None:
            raise LayerError("the model must be called with a batch, got no layer that ran")
        return self._accumulator

    @property
    def _sketch(self) -> Sketch:
        """What compares batches, where that is a sketch."""
        if not isinstance(self._checking, Sketch):
            raise TypeError("rows on a device must be sketches")
        return self._checking

    @property
    def _linear(self) -> Accumulator | CoordinatesAccumulator | DividedAccumulator:
        """The rows so far, of a linear map."""
        found = self.accumulator
        if not isinstance(found, (Accumulator, CoordinatesAccumulator, DividedAccumulator)):
            raise TypeError(f"rows must be of a linear map, got {type(found).__name__}")
        return found

    def add(
        self,
        layer: str,
        parameter: Parameter,
        feed: Callable[[Any], list[int] | None],
        *others: Parameter,
        device: torch.device | None = None,
    ) -> None:
        """Lets `feed` add to the rows, and keeps the books on it and on `others` it adds too.

        Args:
            layer: Name of the layer.
            parameter: The parameter.
            feed: Adds to what it is given; returns the rows that are not finite, or None.
            *others: Parameters that it adds to as well.
            device: Where the sums are computed; None for the processor.
        """
        self.fired.update(each.name for each in (parameter, *others))
        into = self.accumulator if device is None else self._on(device)
        for row in feed(into) or ():
            self.bad.setdefault(row, layer or "the model")
        self._layers.update((each.name, layer) for each in (parameter, *others))
        if self.check == "each":
            if (parameter.name, device) not in self._samples:
                self._samples[parameter.name, device] = self._checked(
                    parameter.name, self.batch, device
                )
            feed(self._samples[parameter.name, device])

    def array(self, values: Tensor) -> NDArray[Any]:
        """A gradient in the memory of the processor; float64 for maps that keep it."""
        if values.dtype == torch.float64 and isinstance(self._map, BlockMap) and self._map.wide:
            return values.detach().cpu().numpy()
        return to_array(values)

    def guard(self, hook: Callable[..., Guarded]) -> Callable[..., Guarded]:
        """`hook`, whose failure is remembered: rows that it left partial are never stored."""

        def guarded(delta: Tensor, *rest: Any) -> Guarded:
            try:
                if torch.is_grad_enabled():
                    raise LayerError(
                        "backward must be without create_graph=True inside a batch, got gradients "
                        "of gradients, which are not recorded"
                    )
                return hook(delta, *rest)
            except BaseException as error:
                self.failure = error
                raise

        return guarded

    def receive(self, parameter: Parameter, gradient: Tensor, *, expected: bool) -> None:
        """Notes that autograd computed the batch's own gradient of a parameter.

        Args:
            parameter: The parameter.
            gradient: Its gradient in this backward pass.
            expected: False where the layer's own use of the parameter takes no gradient.
        """
        self._received[parameter.name] += 1
        if not expected:
            self._outside.add(parameter.name)
        elif self.check != "no" and parameter.name in self.structure.parameters:
            name = parameter.name if self.check == "each" else ""
            gradient = gradient.detach()
            factored = self._accumulator
            if self.check == "probe" and isinstance(factored, FactoredAccumulator):
                probed = factored.probe(parameter.name, to_array(gradient))
                self._probed[parameter.name] = self._probed.get(parameter.name, 0) + probed
                return
            device = None if gradient.is_sparse else self.device_of(gradient)
            if (name, device) not in self._whole:
                self._whole[name, device] = self._checked(name or None, 1, device)
            whole = self._whole[name, device]
            if isinstance(whole, DeviceAccumulator):
                whole.add(parameter.name, parameter.shape, gradient.reshape(1, -1))
            elif gradient.is_sparse:
                gradient = gradient.coalesce()
                indices = gradient.indices().cpu().numpy()
                values = to_array(gradient.values())[None]
                whole.add_lookup(parameter.name, parameter.shape, indices, values, None)
            else:
                whole.add(parameter.name, parameter.shape, to_array(gradient).reshape(1, -1))

    def verify(self) -> None:
        """Nothing, if the rows are whole.

        Raises:
            CoverageError: If a trainable parameter received a gradient that no rule saw, or only
                a part of which a rule saw.
            LayerError: If no gradient was seen at all.
        """
        self._gather()
        if self.failure is not None:  # a rule failed, and the loop went on: the rows are partial
            raise self.failure
        missed = self._received.keys() - self.fired
        if uncovered := missed - set(self.structure.parameters):
            raise uncovered_error(sorted(uncovered))
        if outside := missed | self._outside:
            raise self._difference(sorted(outside))
        # One that autograd computed for someone else than `.grad`, and once more for that.
        again = [name for name, times in self.added.items() if self._received[name] > times]
        if again:
            raise self._difference(sorted(again))
        if not self.fired:
            raise LayerError(
                "loss.backward() must be called inside the batch on a loss of the recorded model, "
                "got no gradient in any layer"
            )
        if self.check != "no":
            self._name_bad()
        if not self.bad:
            self._compare()

    def rows(
        self, factor: float, dtype: str = "float32"
    ) -> tuple[NDArray[Any], NDArray[np.float32] | None]:
        """The rows times `factor`; those that float32 does not hold go to `bad`.

        Args:
            factor: What turns a row into the gradient of its own loss.
            dtype: Type of the rows, if they are factors.

        Returns:
            [batch, width] rows, and [batch] the scales of rows that are factors, else None.
        """
        scales = None
        with np.errstate(over="ignore", invalid="ignore"):
            if isinstance(self.accumulator, FactoredAccumulator):
                rows, norms = self.accumulator.rows(factor, dtype)
                scales = norms.astype(np.float32)
            else:
                totals: NDArray[Any] = self._linear.totals
                if factor != 1.0:
                    totals *= factor
                norms = np.sqrt(np.einsum("ij,ij->i", totals, totals))
                rows = self._linear.finish(totals)
        beyond = np.flatnonzero(~(norms <= np.finfo(np.float32).max))
        if len(beyond):
            self._name_bad()
        for row in beyond:
            self.bad.setdefault(int(row), "the sum of all layers")
        return rows, scales

    def coordinates(self) -> NDArray[Any]:
        """[batch, coordinates] the rows before they are rotated, not multiplied with anything."""
        return self._linear.totals

    def weighted(
        self, rows: NDArray[np.float32], norms: NDArray[np.float32]
    ) -> NDArray[np.float32]:
        """Factored rows whose products are multiplied with their norms."""
        return self._map.weighted(rows, norms) if isinstance(self._map, Factored) else rows

    def sketched(self, sketch: Sketch | Coordinates | Divided) -> NDArray[Any]:
        """[batch, dim] the totals, as `sketch` has them: factored rows are sketched first."""
        if not isinstance(self.accumulator, FactoredAccumulator) or not isinstance(sketch, Sketch):
            return self._linear.totals
        rows, norms = self.accumulator.rows()
        shapes = {name: each.shape for name, each in self.structure.parameters.items()}
        return self.accumulator.map.sketched(rows, shapes, sketch) * norms[:, None]

    def is_fused(self, weight: str, bias: str) -> bool:
        """Whether a bias may be summed where its weight is: if both have one map, in one part."""
        if self.check == "each":  # which compares them one by one
            return False
        return not isinstance(self._map, Sketch) or (
            self._map.kind_of(weight) == self._map.kind_of(bias)
            and (self._map.layout == "global" or layer_of(weight) == layer_of(bias))
        )

    def device_of(self, values: Tensor) -> torch.device | None:
        """Where a gradient is sketched, if that is where it is; None for the processor."""
        here = values.device.type in DEVICES and isinstance(self._map, Sketch)
        checking = self._checking
        return (
            values.device if here and isinstance(checking, Sketch) and supports(checking) else None
        )

    def _on(self, device: torch.device) -> DeviceAccumulator:
        if device not in self._devices:
            self._devices[device] = DeviceAccumulator(self._sketch, self.batch, device)
        return self._devices[device]

    def _name_bad(self) -> None:
        """Notes the layers of factors that are not finite."""
        if isinstance(self.accumulator, FactoredAccumulator):
            self._note_bad(self.accumulator)

    def _note_bad(self, accumulator: FactoredAccumulator | DeviceAccumulator) -> None:
        """Notes the rows that are not finite, by the layer where each first was."""
        for row, name in accumulator.bad_parameters().items():
            self.bad.setdefault(row, self._layers.get(name) or "the model")

    def _gather(self) -> None:
        """Brings what was summed on devices to the rows."""
        for accumulator in self._devices.values():
            self._note_bad(accumulator)
            if isinstance(self.accumulator, Accumulator):
                self.accumulator.totals += accumulator.totals()
        self._devices.clear()

    def _checked(self, name: str | None, batch: int, device: torch.device | None) -> Totals:
        """Totals of one parameter, or of all if it is None, for a comparison."""
        if device is not None:
            return DeviceAccumulator(self._sketch, batch, device)
        names = self.structure.parameters if name is None else [name]
        return self._checking.accumulator(batch, names)

    def _compare(self) -> None:
        """Checks that the samples add up to the batch.

        Raises:
            CoverageError: If not: a parameter is used where its layer's rule cannot see.
        """
        tolerance = ROUNDED_TOLERANCE if self.rounded else EXACT_TOLERANCE
        samples: dict[str, NDArray[Any]] = _by_name(self._samples)
        if self.check == "total":
            samples = {"": self._linear.totals}
        wholes = _by_name(self._whole)
        if self.check == "probe" and isinstance(self.accumulator, FactoredAccumulator):
            samples, wholes = self.accumulator.probes(), self._probed
        norms = {name: np.linalg.norm(each, axis=1).sum() for name, each in samples.items()}
        # Some gradients are zero but for rounding (the bias of attention's keys, to which softmax
        # is blind): a difference also counts only if it is visible beside the whole gradient.
        floor = VISIBLE_SHARE * float(np.linalg.norm(list(norms.values())))
        wrong = []
        for name, whole in wholes.items():
            if name in samples:
                difference = np.linalg.norm(whole[0] - samples[name].sum(axis=0))
                size = max(norms[name], float(np.linalg.norm(whole)), floor)
                if difference > tolerance * size:
                    wrong.append(name)
        if wrong:
            raise self._difference(wrong)

    @staticmethod
    def _difference(names: Sequence[str]) -> CoverageError:
        where = f" in {', '.join(names)}" if any(names) else ""
        return CoverageError(
            f"per-sample gradients must add up to the batch's gradient, got a difference{where}: "
            "a parameter is used outside its own layer (a weight tied by hand, a penalty on "
            "weights in the loss), a second gradient is taken inside the batch "
            "(torch.autograd.grad), or a layer's forward is not what its class says; take what is "
            "not the examples' loss out of the batch, leave the layer out with layers=, or teach "
            "it with whence.register_layer"
        )


def _by_name(
    accumulators: Mapping[tuple[str, torch.device | None], Totals],
) -> dict[str, NDArray[Any]]:
    """Name -> totals, summed over devices."""
    found: dict[str, NDArray[Any]] = {}
    for (name, _), each in accumulators.items():
        totals: NDArray[Any] = each.totals() if isinstance(each, DeviceAccumulator) else each.totals
        found[name] = found[name] + totals if name in found else totals
    return found


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
        device = self._capture.device_of(values)
        if device is not None:
            flat = values.detach().reshape(self.batch, -1)
            self._feed(
                parameter,
                lambda into: into.add(parameter.name, parameter.shape, flat, start),
                device,
            )
            return
        array = self._capture.array(values).reshape(self.batch, -1)
        self._feed(parameter, lambda into: into.add(parameter.name, parameter.shape, array, start))

    def outer(
        self,
        name: str,
        left: Tensor,
        right: Tensor,
        start: int = 0,
        first: int = 0,
        *,
        total: NDArray[np.float32] | None = None,
    ) -> None:
        """Takes Σ_t left[t] right[t]ᵀ of the samples from `first` on."""
        parameter = self._layer.parameters[name]
        device = self._capture.device_of(left)
        if device is not None:
            pair = left.detach(), right.detach()
            self._feed(
                parameter,
                lambda into: into.add_outer(parameter.name, parameter.shape, *pair, start, first),
                device,
            )
            return
        arrays = self._capture.array(left), self._capture.array(right)
        self._feed(
            parameter,
            lambda into: into.add_outer(
                parameter.name, parameter.shape, *arrays, start=start, first=first, total=total
            ),
        )

    def linear(
        self,
        left: Tensor,
        right: Tensor,
        weight: str,
        bias: str,
        start: int = 0,
        row: int = 0,
        *,
        total: NDArray[np.float32] | None = None,
    ) -> None:
        """Takes Σ_t left[t] right[t]ᵀ of a weight, and Σ_t left[t] of a bias, as far as wanted.

        The sum of all samples' matrices is added to `total`.
        """
        parameters = self._layer.parameters
        on_processor = self._capture.device_of(left) is None
        if (
            on_processor
            and weight in parameters
            and bias in parameters
            and self._capture.is_fused(parameters[weight].name, parameters[bias].name)
        ):
            one, other = parameters[weight], parameters[bias]
            arrays = self._capture.array(left), self._capture.array(right)
            beside = (other.name, list(other.shape), row)
            self._capture.add(
                self._layer.name,
                one,
                lambda into: into.add_outer(
                    one.name, one.shape, *arrays, start, total=total, bias=beside
                ),
                other,
            )
            return
        if weight in parameters:
            self.outer(weight, left, right, start, total=total)
        if bias in parameters:
            self.flat(bias, left.sum(1, dtype=torch.float32), row)

    def lookup(self, name: str, indices: Tensor, values: Tensor, ignored: int | None) -> None:
        """Takes values[t] for row indices[t]."""
        parameter = self._layer.parameters[name]
        device = self._capture.device_of(values)
        if device is not None:
            rows, found = indices.detach(), values.detach()
            self._feed(
                parameter,
                lambda into: into.add_lookup(parameter.name, parameter.shape, rows, found, ignored),
                device,
            )
            return
        places = indices.detach().to("cpu", torch.int64).numpy()
        array = self._capture.array(values)
        self._feed(
            parameter,
            lambda into: into.add_lookup(parameter.name, parameter.shape, places, array, ignored),
        )

    def _feed(
        self,
        parameter: Parameter,
        feed: Callable[[Any], list[int] | None],
        device: torch.device | None = None,
    ) -> None:
        self._capture.add(self._layer.name, parameter, feed, device=device)


def to_array(values: Tensor) -> NDArray[np.float32]:
    """A tensor as float32 in the memory of the processor, without a copy if it is there."""
    return values.detach().to("cpu", torch.float32).numpy()


def not_finite(ids: Sequence[str], bad: dict[int, str]) -> NotFiniteError:
    """The error for gradients that are NaN or infinite, with what to call each row."""
    shown = ", ".join(f"{ids[row]} in {bad[row]}" for row in sorted(bad)[:8])
    more = f" and {len(bad) - 8} more" if len(bad) > 8 else ""
    return NotFiniteError(f"gradients must be finite, got NaN or infinity for {shown}{more}")
