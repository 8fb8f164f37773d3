"""Methods on random sketches of gradients: TRAK, and influence with a damped Gram matrix."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from whence import _arrays
from whence._interrupts import interruptible
from whence.methods.margins import Margins, joined
from whence.methods.method import Closure, Method
from whence.methods.run import Run
from whence.search.store import INFLUENCE
from whence.sketch import Sketch


class DampedGram(Method):
    """Influence with the empirical Fisher matrix of sketched gradients, s_tᵀ (SᵀS/N + λ)⁻¹ s_i.

    The mean over the run's checkpoints. A ridge of the mean eigenvalue by default, which does not
    collapse as `dim` nears the number of examples, as none does.

    Time O(examples · dim²) to fit and O(examples · dim) a query; memory O(examples · dim)
    float32 a checkpoint.

    Args:
        dim: Width of a sketch.
        seed: Of the sketch.
        damping: λ as a share of the mean eigenvalue of SᵀS/N.
        sketch: Its kind, or a `Sketch` with all its settings.
    """

    name = "damped Gram influence: sketched gradients, empirical Fisher matrix"
    unit = INFLUENCE

    def __init__(
        self,
        dim: int = 512,
        *,
        seed: int = 0,
        damping: float = 1.0,
        sketch: str | Sketch = "chunked_sjlt",
    ) -> None:
        if not isinstance(sketch, Sketch):
            sketch = Sketch(sketch, dim=dim, seed=seed)
        self._sketch = sketch
        self._damping = _arrays.number("damping", damping, positive=True)
        self._rows: list[NDArray[np.float32]] = []
        self._inverses: list[NDArray[np.float64]] = []

    def _fit(self, run: Run) -> None:
        self._rows, self._inverses = [], []
        for name in run.states:
            with run.at(name):
                rows = self._training(run)
            self._rows.append(rows)
            self._inverses.append(interruptible(_inverse, rows, self._damping))

    def _training(self, run: Run) -> NDArray[np.float32]:
        """[examples, dim] at the present weights."""
        map_ = self._map(run)
        rows = [seen.capture.rows(seen.factor)[0] for seen in run.training(map_)]
        return np.concatenate(rows)

    def _query(self, closure: Closure) -> NDArray[np.float32]:
        """[queries, dim] at the present weights."""
        seen = self.run.queries(self._map(self.run), closure)
        rows: NDArray[np.float32] = seen.capture.rows(seen.factor)[0]
        return rows

    def _map(self, run: Run) -> Sketch:
        return self._sketch.resolved(run.structure.parameters)

    def _scores(self, closure: Closure) -> NDArray[np.float32]:
        found: list[NDArray[Any]] = []
        for name, rows, inverse in zip(self.run.states, self._rows, self._inverses, strict=True):
            with self.run.at(name):
                queries = self._query(closure)
            queries = interruptible(_arrays.matmul, queries.astype(np.float64), inverse)
            found.append(interruptible(_arrays.matmul, queries, rows.T))
        mean: NDArray[np.float32] = np.mean(found, axis=0).astype(np.float32)
        return mean


def _inverse(rows: NDArray[np.float32], damping: float) -> NDArray[np.float64]:
    """[dim, dim] (SᵀS/N + λ)⁻¹, with λ a share of the mean eigenvalue."""
    wide = rows.astype(np.float64)
    gram = _arrays.matmul(wide.T, wide) / len(wide)
    ridge = damping * float(np.trace(gram)) / len(gram)
    if ridge == 0:
        return np.zeros_like(gram)
    found: NDArray[Any] = np.linalg.inv(gram + ridge * np.eye(len(gram)))
    return found


class Trak(DampedGram):
    """TRAK: sketched gradients of the margin, their damped Gram matrix, and 1 − p of each example.

        mean over models of Φ (ΦᵀΦ/N + λ)⁻¹ φ_t   ×   mean over models of 1 − p_i

    Park et al., "TRAK: attributing model behavior at scale", arXiv 2303.14186, with two changes:
    the margin is computed stably, and λ is a share of the mean eigenvalue instead of 0. The run's
    checkpoints are the ensemble; they may be of several trainings. For classification with
    `cross_entropy`. A positive score raises the query's margin, and so lowers its loss.

    Time and memory as `DampedGram`.

    Args:
        dim: Width of a sketch.
        seed: Of the sketch.
        damping: λ as a share of the mean eigenvalue.
        sketch: Its kind, or a `Sketch` with all its settings.
    """

    name = "TRAK: sketched gradients of the margin"
    unit = "margin times examples, as TRAK scales it"

    def _fit(self, run: Run) -> None:
        self._doubts: list[NDArray[np.float64]] = []
        super()._fit(run)

    def _training(self, run: Run) -> NDArray[np.float32]:
        modes: list[Margins] = []

        def mode(_: int) -> Margins:
            modes.append(Margins())
            return modes[-1]

        map_ = self._map(run)
        rows = [seen.capture.rows(seen.factor)[0] for seen in run.training(map_, mode)]
        self._doubts.append(joined(modes).double().numpy())
        return np.concatenate(rows)

    def _query(self, closure: Closure) -> NDArray[np.float32]:
        mode = Margins()
        seen = self.run.queries(self._map(self.run), closure, mode)
        mode.check()
        rows: NDArray[np.float32] = seen.capture.rows(seen.factor)[0]
        return rows

    def _scores(self, closure: Closure) -> NDArray[np.float32]:
        doubts = np.mean(self._doubts, axis=0)
        scores: NDArray[np.float32] = (super()._scores(closure) * doubts).astype(np.float32)
        return scores
