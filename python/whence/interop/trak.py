"""trak: the features and targets in a `save_dir` of `trak.TRAKer`.

What `trak.savers.MmapSaver` of trak 0.3.2 writes, read off its source:

    metadata.json          "JL dimension", "train set size", "JL matrix type"
    id_<m>.json            {"<m>": {"is_featurized": 0 or 1, "is_finalized": 0 or 1}}
    experiments.json       name -> {"num_targets", "scores_path", "scores_finalized"}
    <m>/features.mmap      [examples, dim] of model m, when it is finalized
    <m>/out_to_loss.mmap   [examples, 1]
    <m>/<name>_grads.mmap  [targets, dim] of an experiment
    scores/<name>.mmap     [examples, targets], when the scores are finalized

All arrays are `.npy` files by another name, of float16, or float32 with `use_half_precision=False`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from whence import _arrays, _core
from whence.errors import ArgumentError, DtypeError, MismatchError, NotFiniteError, StoreError
from whence.interop.folders import counted, folder, npy, read_all, read_object, width
from whence.interop.rows import Imported

UNIT = (
    "what training on the example adds to the query's model output (trak's margin), up to one "
    "factor: trak divides each model's inverse by the mean size of its entries"
)
"""The unit of a score."""

ROUNDING = 4 * float(np.finfo(np.float32).eps)
"""How far below zero 1 − p comes where p is 1 and was rounded up; that counts as zero."""


def from_trak(
    save_dir: str | os.PathLike[str],
    *,
    model_ids: int | Sequence[int] | None = None,
    ids: Any = None,
    columns: Mapping[str, Any] | None = None,
) -> TrakFeatures:
    """The features of trak's models, whose scores for trak's targets are those of trak.

    trak keeps of each model m projected gradients G_m of the model output f, [examples, dim], as
    features Φ_m = G_m (G_mᵀ G_m + λ I)⁻¹ / c_m with c_m the mean size of the inverse's entries, and
    Q_m = |∂L/∂f|, which is 1 − p for its classifiers. The score of example i for a target with
    projected gradients g_m is, over M models,

        (1/M Σ_m Q_m[i]) · (1/M Σ_m Φ_m[i] · g_m)

    (Park et al., "TRAK: attributing model behavior at scale", arXiv 2303.14186, section 3;
    `finalize_scores` of trak 0.3.2). Rows here are the features times the first factor.

    trak's sign is that of the target's output: positive where training on the example raises its
    margin, and so lowers its loss. That is positive = helpful, and kept, as long as `out_to_loss`
    is nowhere negative; where it holds the derivative with its sign, and that is negative
    everywhere, scores are turned around (`TrakFeatures.sign` is −1). trak computes in the precision
    it stores, here products of stored values are summed in float32: with float16 trak's own
    rounding is the difference.

    Args:
        save_dir: The folder that `TRAKer` was given.
        model_ids: The models to take; None for all that are finalized, as `finalize_scores` does.
        ids: [examples] int64 or str, distinct; None for trak's: the numbers of the examples.
        columns: name -> [examples] bool, int64, float64 or str, for filters and reports.

    Raises:
        ArgumentError: If `model_ids` is empty, or names a model twice.
        DtypeError: If an argument is of another type.
        ShapeError: If `ids` or `columns` do not have one value each.
        IdError: If ids repeat, or are of no one kind.
        StoreError: If the folder is none of trak's or damaged, or a model is not there or not
            finalized.
        MismatchError: If `out_to_loss` has both signs, so that no sign of a score means helpful.
        NotFiniteError: If `out_to_loss` holds a NaN or an infinity.

    O(models · examples) time and memory; features stay in their files.

    Examples:
        >>> trak = whence.interop.from_trak("trak_results")  # doctest: +SKIP
        >>> hits = trak.search(trak.queries("test"), k=10)  # doctest: +SKIP
    """
    return TrakFeatures(save_dir, model_ids, ids, columns)


class TrakFeatures(Imported):
    """The features of trak's models, open for search; as `from_trak` says.

    Attributes:
        model_ids: The models.
        sign: What trak's scores are multiplied with so that positive = helpful: 1 or −1.
    """

    model_ids: list[int]
    sign: int

    def __init__(
        self,
        save_dir: str | os.PathLike[str],
        model_ids: int | Sequence[int] | None = None,
        ids: Any = None,
        columns: Mapping[str, Any] | None = None,
    ) -> None:
        path = folder("save_dir", save_dir, "trak", "metadata.json")
        metadata = path / "metadata.json"
        described = read_object(metadata)
        count = counted(metadata, described, "train set size", 1)
        dim = counted(metadata, described, "JL dimension", 1)
        self.model_ids = _models(path, model_ids)
        width(metadata, dim)
        self.model_ids = _models(path, model_ids)
        folders = [path / str(model) for model in self.model_ids]
        rows = [(at / "features.mmap", *npy(at / "features.mmap", (count, dim))) for at in folders]
        factors = [
            (at / "out_to_loss.mmap", *npy(at / "out_to_loss.mmap", (count, 1))) for at in folders
        ]
        kinds = sorted({kind for _, kind, _ in rows})
        if len(kinds) > 1:
            raise StoreError(f"{path} must hold features of one type, got {kinds}")
        total = np.zeros(count)
        for file, kind, offset in factors:
            total += read_all(file, offset, (count, 1), kind)[:, 0]
        mean = total / len(folders)
        self.sign = _sign(path, mean)
        scales = np.maximum(self.sign * mean, 0).astype(np.float32)
        files: list[Any] = [(file, offset, count, None) for file, _, offset in rows]
        many = len(folders)
        super().__init__(
            path,
            _core.Rows(files, dim, kinds[0], np.tile(scales, many)),
            [file for file, _, _ in rows],
            count,
            dim,
            checkpoints=[str(model) for model in self.model_ids],
            method=f"TRAK, by trak's features of {many} model{'s' * (many > 1)}",
            unit=UNIT,
            ids=ids,
            columns=columns,
        )

    def __repr__(self) -> str:
        return (
            f"<trak features {str(self.path)!r}: {len(self)} examples of {self.dim}, "
            f"models {self.model_ids}>"
        )

    @property
    def experiments(self) -> list[str]:
        """The names of trak's experiments, each a set of targets.

        Raises:
            StoreError: If they cannot be read.
        """
        return list(self._experiments())

    def queries(self, experiment: str) -> NDArray[np.float32]:
        """[models, targets, dim] the projected gradients of an experiment's targets.

        A target that trak has not got to, or that has no gradient, is a row of zeros.

        Raises:
            ArgumentError: If there is no such experiment.
            StoreError: If a model has no targets of it, or their file is damaged.
        """
        shape = (self._targets(experiment), self.dim)
        files = [self.path / name / f"{experiment}_grads.mmap" for name in self.checkpoints]
        found = [(file, *npy(file, shape)) for file in files]
        return np.stack([read_all(file, offset, shape, kind) for file, kind, offset in found])

    def saved_scores(self, experiment: str) -> NDArray[np.float32]:
        """[examples, targets] the scores that trak has saved, turned where `sign` is −1.

        They are the mean over the models that trak was asked for then.

        Raises:
            ArgumentError: If there is no such experiment.
            StoreError: If it has not been finalized, or the file is damaged.
        """
        shape = (len(self), self._targets(experiment))
        if self._experiments()[experiment].get("scores_finalized") != 1:
            raise StoreError(f"{experiment!r} must have been finalized by trak, and is not")
        file = self.path / "scores" / f"{experiment}.mmap"
        kind, offset = npy(file, shape)
        scores = read_all(file, offset, shape, kind)
        return -scores if self.sign < 0 else scores

    def _experiments(self) -> dict[str, dict[str, Any]]:
        file = self.path / "experiments.json"
        if not file.exists():
            return {}
        found = read_object(file)
        for name, described in found.items():
            if not isinstance(described, dict):
                raise StoreError(f"{file} must describe {name!r}, got {described!r}")
        return found

    def _targets(self, experiment: str) -> int:
        """How many targets an experiment has."""
        experiments = self._experiments()
        _arrays.choice("experiment", experiment, experiments)
        return counted(self.path / "experiments.json", experiments[experiment], "num_targets", 1)


def _models(path: Path, model_ids: int | Sequence[int] | None) -> list[int]:
    """The models asked for, which are all finalized.

    Raises:
        WhenceError: As `from_trak`.
    """
    finalized = {}
    for file in sorted(path.glob("id_*.json")):
        for name, described in read_object(file).items():
            number = name.isascii() and name.isdecimal() and len(name) < 19
            if not number or not isinstance(described, dict):
                raise StoreError(f"{file} must describe models by their numbers, got {name!r}")
            finalized[int(name)] = described.get("is_finalized") == 1
    if model_ids is None:
        found = sorted(model for model, done in finalized.items() if done)
        if not found:
            raise StoreError(f"{path} must have a finalized model, got {sorted(finalized)} without")
        return found
    asked = [model_ids] if isinstance(model_ids, (int, np.integer)) else model_ids
    if not _arrays.is_list(asked):
        raise DtypeError(f"model_ids must be a list of integers, got {_arrays.describe(asked)}")
    found = [_arrays.integer("model_ids", model, 0) for model in asked]
    if not found or len(set(found)) < len(found):
        raise ArgumentError(f"model_ids must name models once each, got {found}")
    for model in found:
        if not finalized.get(model, False):
            ready = sorted(model for model, done in finalized.items() if done)
            raise StoreError(f"model {model} must be one that is finalized in {path}, got {ready}")
    return found


def _sign(path: Path, factors: NDArray[np.float64]) -> int:
    """What makes trak's scores positive = helpful, by the factors of its examples.

    Raises:
        NotFiniteError: If a factor is NaN or infinite.
        MismatchError: If factors have both signs.
    """
    if not np.isfinite(factors).all():
        example = int(np.flatnonzero(~np.isfinite(factors))[0])
        raise NotFiniteError(
            f"out_to_loss in {path} must be finite, got {factors[example]} at {example}"
        )
    low, high = float(factors.min()), float(factors.max())
    if low >= -ROUNDING:
        return 1
    if high <= ROUNDING:
        return -1
    raise MismatchError(
        f"out_to_loss in {path} must have one sign, so that a score's sign can mean helpful, got "
        f"values from {low:.3g} to {high:.3g}"
    )
