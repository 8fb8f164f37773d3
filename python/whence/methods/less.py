"""LESS: cosines of gradients as Adam sees them, summed over checkpoints."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from whence import _arrays
from whence._interrupts import interruptible
from whence.curvature import Moments
from whence.errors import CheckpointError
from whence.gradients.divided import Divided
from whence.methods.method import Closure, Method
from whence.methods.run import Run
from whence.sketch import Sketch


class Less(Method):
    """The cosine of the query's gradient and the example's Adam step, weighted by learning rates.

    Xia et al., "LESS: selecting influential data for targeted instruction tuning", arXiv
    2402.04333, section 2.2, without the first moment, which all examples share: an example's step
    is its gradient divided by √v + ε.

    Time O(examples · parameters) a checkpoint to fit; memory O(examples · dim) float32.

    Args:
        moments: Checkpoint -> second moments of its optimizer, as `whence.moments_of` reads them.
        dim: Width of a sketch.
        seed: Of the sketch.
    """

    name = "LESS: cosine of the query's gradient and the example's Adam step"
    unit = "cosine, summed over checkpoints, each times its learning rate"

    def __init__(self, moments: Mapping[str, Moments], dim: int = 4096, *, seed: int = 0) -> None:
        self._moments = dict(moments)
        self._sketch = Sketch("chunked_sjlt", dim=dim, seed=seed)
        self._rows: dict[str, NDArray[np.float32]] = {}

    def _fit(self, run: Run) -> None:
        if set(self._moments) != set(run.states):
            raise CheckpointError(
                f"moments must be one for each of {list(run.states)}, got {list(self._moments)}"
            )
        self._rows = {}
        for name in run.states:
            moments = self._moments[name]
            rows = Divided(self._sketch, moments.whole, moments.factored)
            with run.at(name):
                found = [seen.capture.rows(seen.factor)[0] for seen in run.training(rows)]
            self._rows[name] = interruptible(_unit, interruptible(np.concatenate, found))

    def _scores(self, closure: Closure) -> NDArray[np.float32]:
        total = np.zeros(())
        for name, rows in self._rows.items():
            with self.run.at(name):
                seen = self.run.queries(self._sketch, closure)
            queries = interruptible(_unit, seen.capture.rows(seen.factor)[0])
            cosines = interruptible(_arrays.matmul, queries, rows.T).astype(np.float64)
            total = total + self.run.learning_rates[name] * cosines
        return total.astype(np.float32)


def _unit(rows: NDArray[np.float32]) -> NDArray[np.float32]:
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    found: NDArray[np.float32] = np.divide(rows, norms, out=np.zeros_like(rows), where=norms > 0)
    return found
