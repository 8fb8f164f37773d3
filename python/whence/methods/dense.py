"""Influence with the whole Gauss-Newton matrix: for models so small that it can be inverted."""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from whence import _arrays
from whence._interrupts import interruptible
from whence.errors import ArgumentError, LayerError
from whence.gradients.passes import pairs_of
from whence.gradients.residuals import Calls
from whence.methods.gradient import LONGEST
from whence.methods.method import Closure, Method
from whence.methods.products import Whole, WholeAccumulator
from whence.methods.run import Run, Seen
from whence.search.store import INFLUENCE

MOST = 10_000
"""Parameters at most: their matrix takes 800 MB."""


class GaussNewton(Method):
    """g_tᵀ (G + penalty + damping)⁻¹ g_i with the whole Gauss-Newton matrix G of the mean loss.

    Of a cross-entropy, the labels' expectation is summed over classes, not sampled: for a linear
    model G is the Hessian. Exact for convex models at their minimum but for the step to second
    order (Koh and Liang, "Understanding black-box predictions via influence functions", ICML 2017).

    At the last checkpoint. Time O(examples · classes · parameters² + parameters³), memory
    O(parameters²) float64; for at most `MOST` parameters.

    Args:
        penalty: λ of a penalty λ/2 |W|² that was added to the mean loss in training.
        damping: What is added on top, as a share of G's mean eigenvalue.
    """

    name = "influence, exact: whole Gauss-Newton matrix"
    unit = INFLUENCE

    def __init__(self, *, penalty: float = 0.0, damping: float = 0.0) -> None:
        self._penalty = _arrays.number("penalty", penalty)
        self._damping = _arrays.number("damping", damping)
        if self._penalty < 0 or self._damping < 0:
            raise ArgumentError(
                f"penalty and damping must be at least 0, got {penalty} and {damping}"
            )
        self._inverse: NDArray[np.float64] | None = None

    def _fit(self, run: Run) -> None:
        size = sum(parameter.tensor.numel() for parameter in run.structure.parameters.values())
        if size > MOST:
            raise ArgumentError(
                f"model must have at most {MOST:,} recorded parameters for the whole matrix, got "
                f"{size:,}; use Ekfac"
            )
        total = np.zeros((size, size))
        examples = 0
        with run.at(run.last):
            label = classes = 0
            while not classes or label < classes:
                modes: list[_Label] = []

                def mode(_: int, label: int = label, modes: list[_Label] = modes) -> _Label:
                    modes.append(_Label(label))
                    return modes[-1]

                examples = 0
                for seen in run.training(self._map(run), mode, f"label {label}"):
                    shares = modes[-1].check()
                    classes = modes[-1].classes
                    flat = self._flat(seen)
                    if len(shares) != len(flat):
                        raise ArgumentError(
                            "GaussNewton must be used with one class an example, got "
                            f"{len(shares)} labels for {len(flat)} examples"
                        )
                    rows = flat * np.sqrt(shares.numpy())[:, None]
                    total += interruptible(_arrays.matmul, rows.T, rows)
                    examples += len(rows)
                label += 1
        total /= examples
        ridge = self._penalty + self._damping * float(np.trace(total)) / size
        total[np.diag_indices(size)] += ridge
        try:
            inverse: NDArray[Any] = interruptible(np.linalg.inv, total)
        except np.linalg.LinAlgError:
            raise ArgumentError(
                "penalty or damping must be above 0 where the Gauss-Newton matrix has no inverse, "
                "got 0"
            ) from None
        self._inverse = inverse

    def _scores(self, closure: Closure) -> NDArray[np.float32]:
        if self._inverse is None:
            raise ArgumentError("the matrix must be fitted, got None")
        run = self.run
        with run.at(run.last):
            queries = self._flat(run.queries(self._map(run), closure))
            queries = interruptible(_arrays.matmul, queries, self._inverse)
            found = [
                interruptible(_arrays.matmul, queries, self._flat(seen).T)
                for seen in run.training(self._map(run))
            ]
        return np.concatenate(found, axis=1).astype(np.float32)

    @staticmethod
    def _map(run: Run) -> Whole:
        return Whole(LONGEST, dict(pairs_of(run.structure.layers)))

    @staticmethod
    def _flat(seen: Seen) -> NDArray[np.float64]:
        """[batch, parameters] the gradients of own losses, in one order."""
        found = seen.capture.accumulator
        if not isinstance(found, WholeAccumulator):
            raise TypeError("gradients must be kept whole")
        parts = [found.weights[key].flatten(1) for key in sorted(found.weights)]
        parts += [found.biases[key].flatten(1) for key in sorted(found.biases)]
        flat: NDArray[np.float64] = torch.cat(parts, 1).double().numpy()
        return flat * seen.factor


class _Label(Calls):
    """While it is entered, cross_entropy sees one label for all examples."""

    def __init__(self, label: int) -> None:
        super().__init__()
        self.classes = 0
        self._label = label
        self._shares: list[Tensor] = []

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if function is not F.cross_entropy:
            return function(*args, **(kwargs or {}))
        call = inspect.signature(function).bind(*args, **(kwargs or {}))
        logits: Tensor = call.arguments["input"]
        if logits.dim() != 2:
            raise ArgumentError(
                "GaussNewton must be used with one class an example, cross_entropy of [batch, "
                f"classes], got {list(logits.shape)}"
            )
        self.classes = logits.shape[1]
        del self._shares[self.calls :]
        self.calls += 1
        shares = logits.detach().double().softmax(1)[:, self._label]
        given = call.arguments["target"]
        if not given.is_floating_point():  # what is ignored has no loss, and no curvature
            shares = shares * (given != call.arguments.get("ignore_index", -100))
        self._shares.append(shares)
        call.arguments["target"] = torch.full((len(logits),), self._label, device=logits.device)
        return function(*call.args, **call.kwargs)

    def check(self) -> Tensor:
        """[batch] the label's probabilities.

        Raises:
            LayerError: If the loss is no cross-entropy.
        """
        if self.calls != 1:
            raise LayerError(
                f"loss must call torch's cross_entropy once for GaussNewton, got {self.calls} calls"
            )
        return self._shares[0].cpu()
