"""`record_checkpoints`: one row an example, summed over the checkpoints of a run."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from whence import _arrays
from whence._arrays import Ids
from whence.errors import (
    ArgumentError,
    CheckpointError,
    DtypeError,
    IdError,
    ShapeError,
    WeightsError,
)
from whence.gradients.capture import Capture, not_finite
from whence.gradients.coordinates import Coordinates
from whence.gradients.hooks import Hooks, refuse_batch_statistics
from whence.gradients.maps import (
    check_identity,
    map_of_store,
    prepared_maps,
    stored_arrays,
)
from whence.gradients.passes import TOGETHER, Task, evaluating, length_of, reread
from whence.gradients.preconditioned import FittedPreconditioner
from whence.gradients.recorder import patterns
from whence.gradients.residuals import RESIDUAL_BYTES, Residuals
from whence.gradients.structure import Structure, structure_in_store
from whence.gradients.verify import arguments_of
from whence.gradients.weights import State, digest, load, put
from whence.sketch import Sketch
from whence.store import COMBINED, Checkpoint, Manifest, Writer
from whence.store.progress import checked, watched


def record_checkpoints(
    model: nn.Module,
    path: str | os.PathLike[str],
    loader: Iterable[Any],
    loss: Callable[..., Tensor],
    *,
    precondition: FittedPreconditioner,
    states: Mapping[str, State] | None = None,
    ids: Any = None,
    columns: Callable[..., Mapping[str, Any]] | None = None,
    dim: int | None = None,
    seed: int | None = None,
    sketch: str | Sketch | None = None,
    dtype: str = "int4",
    tokens: Callable[..., Any] | None = None,
    unbatched: Sequence[str] = (),
    nonfinite: str = "error",
    writer: str | None = None,
    progress: bool | None = None,
) -> Path:
    """Records each example once, its preconditioned rows summed over the checkpoints of a run.

    y_i = Σ_c w_c z_ic V_c, and y_i · y_j is Σ_c w_c z_ic · z_jc as far as the joint basis V keeps
    it: bytes do not grow with checkpoints. Takes `TOGETHER` examples at a time
    through all checkpoints, sums in float32, rounds once and commits once: a second call goes on
    where the first ended or was killed, and no partial sum is ever seen.

    Args:
        model: The model, as in `record`; its weights are afterwards as before.
        path: The store's folder; made if it is not there.
        loader: Batches of the training data, as in `fit_factors`.
        loss: (*batch) -> loss, as in `fit_factors`.
        precondition: What `whence.fit_factors` found at all checkpoints of `states`.
        states: Checkpoint name -> state dict or file of torch.save, as factors were fitted; None
            for factors of the model as it is.
        ids: (*batch) -> [batch] keys; or all of them in the loader's order; None for numbers from
            0 on.
        columns: (*batch) -> name -> [batch], stored beside the rows; None for none.
        dim: As in `record`, with seed and sketch.
        seed: See dim.
        sketch: See dim.
        dtype: Type of stored rows, as in `record`.
        tokens: As in `fit_factors`, with unbatched.
        unbatched: See tokens.
        nonfinite: As in `record`.
        writer: As in `record`; then with ids, for numbers from 0 on would be of every writer.
        progress: Whether to show a bar; None means if standard error is a terminal.

    Returns:
        The path, for `whence.query(..., states=...)` and `whence.open`.

    Raises:
        ArgumentError: If `writer` is given without ids, or the name of a state has a NUL character.
        CheckpointError: If states are not those of the factors.
        WeightsError: If a state has other weights than the factors were fitted at.
        IdError: If ids repeat, or are of mixed kinds.
        NotFiniteError: If a gradient is NaN or infinite.
        MismatchError: If the store at the path is of another model or setting.
        WhenceError: And whatever `record` raises.
    """
    loader = reread("loader", loader)
    _arrays.choice("nonfinite", nonfinite, ("error", "skip"))
    checked(progress)
    if writer is not None and ids is None:
        raise ArgumentError(f"ids must be given with writer={writer!r:.80}, got None")
    keys = _Keys(ids, columns)
    if not isinstance(model, nn.Module):
        raise DtypeError(f"model must be an nn.Module, got {_arrays.describe(model)}")
    if not hasattr(precondition, "prepared") or not hasattr(precondition, "reduction"):
        raise DtypeError(
            "precondition must be factors of whence.fit_factors, got "
            f"{_arrays.describe(precondition)}"
        )
    structure = structure_in_store(model, precondition.model, path)
    prepared, spec = prepared_maps(
        precondition,
        structure.describe(),
        precondition.reduction,
        dim=dim,
        sketch=sketch,
        seed=seed,
        rotate=True,
        dtype=dtype,
    )
    task = Task(loss, precondition.reduction, tokens, patterns("unbatched", unbatched))
    loaded = _states([each.name for each in prepared], states)
    wanted = Manifest(spec, dtype, precondition.reduction, structure.describe(), rows=COMBINED)
    path = _arrays.path("path", path)
    store = Writer(path, wanted, writer)
    try:
        if not store.manifest.checkpoints:
            for each in prepared:
                described, arrays = stored_arrays(each.map, spec)
                stored = store.write_map(each.identity, described, arrays)
                store.manifest.checkpoints.append(
                    Checkpoint(
                        each.name,
                        first=each.digest,
                        last=each.digest,
                        weight=each.weight,
                        map=stored,
                    )
                )
        found = store.manifest.checkpoints
        if [each.name for each in found] != [each.name for each in prepared]:
            raise CheckpointError(
                f"states must be of the checkpoints {[each.name for each in found]} as in the "
                f"store, got {[each.name for each in prepared]}"
            )
        for checkpoint, each in zip(found, prepared, strict=True):
            check_identity(checkpoint, each)
        threads = torch.get_num_threads()
        maps = [map_of_store(store.path, store.manifest, each, threads) for each in found]
        averaged = spec["residuals"] == "averaged"
        recording = _Recording(model, structure, task, store, loaded, maps, nonfinite, averaged)
        recording.run(loader, keys, progress)
    finally:
        store.close()
    return path


def _states(names: list[str], states: Mapping[str, State] | None) -> dict[str, State | None]:
    """The state of each checkpoint; None for the model as it is."""
    if states is None:
        if len(names) > 1:
            raise CheckpointError(
                f"states must have the weights of each checkpoint {names}, got None"
            )
        return {names[0]: None}
    if not isinstance(states, Mapping):
        raise DtypeError(
            f"states must be a dict of checkpoint name to weights, got {_arrays.describe(states)}"
        )
    if set(states) != set(names):
        raise CheckpointError(
            f"states must be those that the factors were fitted at, {names}, got {list(states)}"
        )
    return {name: states[name] for name in names}


class _Keys:
    """The ids and columns of batches."""

    def __init__(self, ids: Any, columns: Callable[..., Mapping[str, Any]] | None) -> None:
        if columns is not None and not callable(columns):
            raise DtypeError(
                f"columns must be a function of the batch, got {_arrays.describe(columns)}"
            )
        self._function = ids if callable(ids) else None
        self._all = None if ids is None or callable(ids) else _arrays.ids("ids", ids)
        self._columns = columns
        self._seen: set[Any] = set()
        self._at = 0

    @property
    def count(self) -> int:
        """How many examples were given so far."""
        return self._at

    def of(self, batch: Any, count: int) -> tuple[Ids, dict[str, NDArray[Any]]]:
        """[count] ids of a batch, and its columns."""
        arguments = arguments_of(batch)
        first, self._at = self._at, self._at + count
        if self._function is not None:
            ids = _arrays.ids("ids", self._function(*arguments))
            given_ids = set(ids.tolist())
            if twice := given_ids & self._seen:
                raise IdError(f"ids must be distinct, got {min(twice)!r} in two batches")
            self._seen |= given_ids
        elif self._all is not None:
            ids = self._all[first : self._at]
        else:
            ids = np.arange(first, self._at)
        if len(ids) != count:
            raise ShapeError(f"ids must be one for each of {count} examples, got {len(ids)}")
        given = {} if self._columns is None else self._columns(*arguments)
        if not isinstance(given, Mapping):
            raise DtypeError(f"columns must return a dict, got {_arrays.describe(given)}")
        return ids, {name: _arrays.column(name, value, count) for name, value in given.items()}


class _Recording:
    """All checkpoints over one stretch of the data after the other."""

    def __init__(
        self,
        model: nn.Module,
        structure: Structure,
        task: Task,
        writer: Writer,
        states: Mapping[str, State | None],
        maps: Sequence[Any],
        nonfinite: str,
        averaged: bool,
    ) -> None:
        self._averaged = averaged and len(states) > 1
        self._model = model
        self._structure = structure
        self._task = task
        self._writer = writer
        self._states = states
        self._maps: list[Coordinates] = list(maps)
        self._nonfinite = nonfinite
        self._hooks = Hooks(model, structure, strict=False)

    def run(self, loader: Iterable[Any], keys: _Keys, progress: bool | None) -> None:
        """Records what is not recorded yet."""
        together: list[Any] = []
        counted = 0
        moved = any(state is not None for state in self._states.values())
        with evaluating(self._model, weights=moved):
            self._hooks.install()
            try:
                for batch in watched(loader, "recording", progress, "batch"):
                    together.append(batch)
                    counted += length_of(batch)
                    if counted >= TOGETHER:
                        self._record(together, keys)
                        together, counted = [], 0
                if together:
                    self._record(together, keys)
                if not keys.count:
                    raise ArgumentError("loader must give at least one batch, got none")
            finally:
                self._hooks.remove()

    def _record(self, batches: list[Any], keys: _Keys) -> None:
        """The rows of some batches, committed together."""
        kept: list[tuple[int, Ids, dict[str, NDArray[Any]]]] = []
        for place, batch in enumerate(batches):
            ids, columns = keys.of(batch, length_of(batch))
            if not self._known(ids).all():
                kept.append((place, ids, columns))
        if kept:
            self._record_known(batches, kept)

    def _record_known(
        self, batches: list[Any], kept: list[tuple[int, Ids, dict[str, NDArray[Any]]]]
    ) -> None:
        """The rows of batches whose ids are known."""
        sums: dict[int, NDArray[np.float32]] = {}
        bad: dict[int, dict[int, str]] = {place: {} for place, _, _ in kept}
        residuals = Residuals()
        if self._averaged:
            for _ in self._checkpoints(residuals, batches, kept):
                if residuals.nbytes > RESIDUAL_BYTES and len(kept) > 1:
                    middle = kept[len(kept) // 2][0]  # the two halves one after the other
                    self._record_known(batches, [each for each in kept if each[0] < middle])
                    self._record_known(batches, [each for each in kept if each[0] >= middle])
                    return
        for rows in self._checkpoints(None, batches, kept):
            for place, ids, _ in kept:
                capture = Capture(self._structure, rows, None, self._task.unbatched)
                mode = residuals.replaying(place) if self._averaged else None
                capture, factor = self._task.run(self._hooks, capture, batches[place], mode)
                if capture.batch != len(ids):
                    raise ShapeError(
                        f"loader must give batches whose first tensor is as long as the model's, "
                        f"got {len(ids)} and {capture.batch}"
                    )
                found, _ = capture.rows(factor)
                bad[place] |= capture.bad
                sums[place] = found if place not in sums else sums[place] + found
        for place, ids, columns in kept:
            self._append(ids, sums[place], columns, bad[place])
        self._writer.commit()

    def _checkpoints(
        self,
        residuals: Residuals | None,
        batches: list[Any],
        kept: list[tuple[int, Ids, dict[str, NDArray[Any]]]],
    ) -> Iterator[Coordinates]:
        """The model at each checkpoint, and its map; with `residuals` they are gathered there."""
        for (name, state), checkpoint, rows in zip(
            self._states.items(), self._writer.manifest.checkpoints, self._maps, strict=True
        ):
            if state is not None:
                put(self._model, name, load(name, state))
            if checkpoint.first != digest(self._model):
                raise WeightsError(
                    f"states must be those that the factors were fitted at, got other weights at "
                    f"checkpoint {name!r}"
                )
            refuse_batch_statistics(self._model)
            if residuals is not None:
                for place, _, _ in kept:
                    batch, share = batches[place], checkpoint.weight or 1.0
                    arguments = arguments_of(batch)
                    with torch.no_grad(), residuals.collecting(place, share):
                        self._task.loss(*arguments)
            yield rows

    def _known(self, ids: Ids) -> NDArray[np.bool_]:
        """[ids] whether each is recorded, or was left out."""
        left_out = self._writer.left_out
        return self._writer.has(ids) | np.array([id_ in left_out for id_ in ids.tolist()], np.bool_)

    def _append(
        self,
        ids: Ids,
        rows: NDArray[np.float32],
        columns: dict[str, NDArray[Any]],
        bad: dict[int, str],
    ) -> None:
        """Hands the new rows of a batch to the writer."""
        good = ~self._known(ids)
        bad = {row: where for row, where in bad.items() if good[row]}
        if bad and self._nonfinite == "error":
            raise not_finite([f"id {id_!r}" for id_ in ids.tolist()], bad)
        if bad:
            self._writer.skip(ids[sorted(bad)])
            good[sorted(bad)] = False
        checked = self._writer.check_columns(columns)
        self._writer.append(
            ids[good], rows[good], {name: column[good] for name, column in checked.items()}
        )
