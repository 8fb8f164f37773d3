"""`GradientSketch`: the sketch as a scikit-learn transformer."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from whence import _arrays, _core
from whence._interrupts import interruptible
from whence.errors import DtypeError, MissingDependencyError, NotFiniteError
from whence.sketch import Sketch

try:
    # joblib comes with scikit-learn, and says what n_jobs means where it stands.
    from joblib import effective_n_jobs  # type: ignore[import-untyped]
    from sklearn import config_context, get_config
    from sklearn.base import BaseEstimator, ClassNamePrefixFeaturesOutMixin, TransformerMixin
    from sklearn.utils import check_random_state
    from sklearn.utils.validation import check_is_fitted, validate_data
except ImportError as error:
    # Not only ModuleNotFoundError: a scikit-learn before 1.6 is there, without `validate_data`.
    if (error.name or "").split(".")[0] not in ("joblib", "sklearn"):
        raise
    raise MissingDependencyError(
        "whence.sklearn needs scikit-learn: pip install 'scikit-learn>=1.6'"
    ) from error

_BLOCK = 2**26
"""Bytes of working memory for the rows that are sketched at a time."""


class GradientSketch(ClassNamePrefixFeaturesOutMixin, TransformerMixin, BaseEstimator):  # type: ignore[misc]
    """`whence.Sketch` of the rows of an array, as a step of a scikit-learn pipeline.

    A random projection, of which no matrix is kept. The inner product of two rows estimates that
    of the samples without bias; `sketch_.expected_error()` says how closely. A row is the one
    that `whence.Sketch` makes of the bare array, to the bit: the features are one parameter with
    the name "" and the shape (n_features,). The source of the map stands there.

    The arguments have the names that scikit-learn gives them, and are checked in `fit`.

    Args:
        n_components: Width of a row, 1 to 1,048,576; `dim` elsewhere in whence.
        kind: The kind of map; `whence.Sketch` says which there are.
        random_state: An integer from 0 to 2**64 - 1 is the seed itself, as in `whence.Sketch`.
            With a RandomState, or None for NumPy's own, each `fit` draws a seed of 32 bits.
        normalize: Whether rows are scaled to norm 1, so that inner products are cosines.
        n_jobs: How many threads `transform` uses: None means 1 unless in a
            `joblib.parallel_config` context, -1 all processors. Rows do not depend on it.

    Attributes:
        seed_: The seed. `transform` depends on nothing else that is random.
        sketch_: The `whence.Sketch`.
        n_features_in_: Number of features seen in `fit`.
        feature_names_in_: Their names, if all are strings.

    Examples:
        >>> import numpy as np
        >>> from whence.sklearn import GradientSketch
        >>> GradientSketch(n_components=256, random_state=0).fit_transform(np.eye(5)).shape
        (5, 256)
    """

    def __init__(
        self,
        n_components: int = 4096,
        *,
        kind: str = "chunked_sjlt",
        random_state: Any = None,
        normalize: bool = False,
        n_jobs: int | None = None,
    ) -> None:
        self.n_components = n_components
        self.kind = kind
        self.random_state = random_state
        self.normalize = normalize
        self.n_jobs = n_jobs

    def fit(self, X: Any, y: Any = None) -> GradientSketch:
        """Chooses the map; of the data only the width and the feature names are used.

        Args:
            X: What `transform` takes: [samples, features].
            y: Not used.

        Returns:
            This object. O(samples · features), to see that X could be transformed.

        Raises:
            ArgumentError: If an argument of the constructor is out of range.
            ValueError: By scikit-learn: for an X that `transform` refuses, another kind of
                random_state, or n_jobs 0.
        """
        width = _arrays.integer("n_components", self.n_components, 1, _core.MAX_DIM)
        if isinstance(self.random_state, (int, np.integer)):
            seed = _arrays.integer("random_state", self.random_state, 0, 2**64 - 1)
        else:
            # 32 bits, so that the seed is a random_state wherever scikit-learn takes one.
            seed = int(check_random_state(self.random_state).randint(2**32, dtype=np.uint64))
        sketch = Sketch(
            self.kind,
            dim=width,
            seed=seed,
            threads=_threads(self.n_jobs),
            normalize=self.normalize,
        )
        self._validated(X, reset=True)
        self.seed_ = seed
        self.sketch_ = sketch
        self._n_features_out = width
        return self

    def transform(self, X: Any) -> NDArray[np.float32]:
        """Rows of `X`.

        Args:
            X: [samples, features] array, data frame or SciPy sparse matrix of real numbers. What
                is not float32 is rounded to it. A sparse matrix is made dense some rows at a
                time, in 64 MiB (or one row, if that is more), and gives the bits of the dense one.

        Returns:
            [samples, n_components] float32, or what `set_output` asked for. O(samples · (features
            + n_components)) for the sparse kinds of map, whether X is sparse or not.

        Raises:
            NotFittedError: By scikit-learn, before `fit`.
            ValueError: By scikit-learn, if X is not two-dimensional, has no rows or another
                number or names of features than in `fit`, holds NaN, infinity or a number beyond
                float32, or is not numeric.
            NotFiniteError: If a row exceeds float32.
        """
        check_is_fitted(self)
        X = self._validated(X, reset=False)
        samples, features = X.shape
        dense = isinstance(X, np.ndarray)
        rows = np.empty((samples, self.sketch_.dim), np.float32)
        # The totals of a row are float64.
        step = max(1, _BLOCK // (8 * self.sketch_.dim + (0 if dense else 4 * features)))
        for start in range(0, samples, step):
            stop = min(start + step, samples)
            block = X[start:stop] if dense else X[start:stop].toarray()
            try:
                rows[start:stop] = self.sketch_(block)
            except NotFiniteError as error:
                raise NotFiniteError(
                    f"X must have sketches within float32, got from rows {start} to {stop - 1}: "
                    f"{error}"
                ) from error
        return rows

    def _validated(self, X: Any, *, reset: bool) -> Any:
        """`X` as a float32 array, or CSR if it is sparse; its width and names learnt if `reset`."""
        # What is learnt is put on a copy: after an interrupt the call goes on.
        learner = object.__new__(type(self))
        learner.__dict__.update(self.__dict__)
        config = get_config()  # of this thread alone

        def validated(given: Any) -> Any:
            # What exceeds float32 becomes an infinity, which scikit-learn refuses by name.
            with config_context(**config), np.errstate(over="ignore"):
                return validate_data(
                    learner, given, accept_sparse="csr", dtype=np.float32, reset=reset
                )

        found = interruptible(validated, X)
        for name in ("n_features_in_", "feature_names_in_") if reset else ():
            self.__dict__.pop(name, None)
            if name in learner.__dict__:
                setattr(self, name, learner.__dict__[name])
        return found

    def __getstate__(self) -> dict[str, Any]:
        """The definition of the map in place of the map, which lives in the Rust core."""
        state = {**super().__getstate__()}
        if "sketch_" in state:
            state["sketch_"] = self.sketch_.spec
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Makes the map again, on the processors of this machine.

        Raises:
            MismatchError: If this version of whence does not have that map.
        """
        if "sketch_" in state:
            sketch = Sketch.from_spec(state["sketch_"], threads=_threads(state["n_jobs"]))
            state = {**state, "sketch_": sketch}
        super().__setstate__(state)

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.sparse = True
        tags.transformer_tags.preserves_dtype = ["float32"]
        return tags


def _threads(n_jobs: Any) -> int:
    """The number of threads that `n_jobs` means here."""
    if n_jobs is not None and not isinstance(n_jobs, (int, np.integer)):
        raise DtypeError(f"n_jobs must be an integer or None, got {_arrays.describe(n_jobs)}")
    return int(effective_n_jobs(n_jobs))
