"""`record`: a store that fills while a model trains."""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from whence import _arrays
from whence._arrays import Ids
from whence._background import LOOK
from whence._plain import line
from whence.errors import (
    ArgumentError,
    CheckpointError,
    DtypeError,
    IdError,
    LayerError,
    WeightsError,
    WhenceError,
)
from whence.factored import Factored
from whence.gradients.capture import Capture, not_finite
from whence.gradients.coordinates import Coordinates
from whence.gradients.divided import Divided
from whence.gradients.hooks import Hooks, kept_gradients, refuse_batch_statistics
from whence.gradients.layers import FUNCTIONAL
from whence.gradients.maps import (
    check_identity,
    check_spec,
    map_of,
    map_of_store,
    prepared_maps,
    stored_arrays,
)
from whence.gradients.preconditioned import Preconditioner, Prepared
from whence.gradients.reduction import REDUCTIONS, own_loss_factor, refuse_tokens
from whence.gradients.structure import structure_of
from whence.gradients.verify import Verified, verify
from whence.gradients.weights import digest, signature, versions
from whence.sketch import Sketch
from whence.store import Checkpoint, Manifest, Writer
from whence.store.manifest import DTYPES, is_name

RATES = (float(np.finfo(np.float32).smallest_subnormal), float(np.finfo(np.float32).max))
"""Learning rates: the smallest and the largest float32, which scores are multiplied with."""

DUPLICATES = ("error", "skip", "replace")
"""What can be done with an id that is recorded in the checkpoint."""


@dataclass(frozen=True)
class Coverage:
    """Which of the trainable values in the chosen layers are recorded.

    Attributes:
        share: From 0 to 1.
        recorded: Number of values.
        total: Number of trainable values.
        uncovered: Names of parameters that no rule accounts for.
        silent: Names of recorded parameters that have not received a gradient so far.
    """

    share: float
    recorded: int
    total: int
    uncovered: list[str]
    silent: list[str]

    def __str__(self) -> str:
        text = f"{self.share:.1%} of {self.total:,} trainable values are recorded"
        if self.uncovered:
            text += f"; no rule for {', '.join(self.uncovered)}"
        if self.silent:
            text += f"; no gradient yet in {', '.join(self.silent)}"
        return line(text)


@dataclass
class Batch:
    """One recorded batch.

    Attributes:
        ids: [batch] as given.
        rows: [stored, dim] float32 rows as computed, before they are stored; with
            layout="factored" the factors as stored, of gradients of norm one. None until the end
            of the batch.
        stored: [stored] the ids that were stored: without those skipped.
    """

    ids: Ids
    rows: NDArray[np.float32] | None = None
    stored: Ids | None = None


class Recorder:
    """What `record` returns; see there."""

    def __init__(
        self,
        model: nn.Module,
        path: str | os.PathLike[str],
        *,
        dim: int | None,
        seed: int | None,
        sketch: str | Sketch | None,
        layout: str | None,
        dtype: str,
        reduction: str,
        layers: str | Sequence[str] | None,
        uncovered: str,
        unbatched: Sequence[str],
        weights: str | None,
        weight_gradients: bool,
        nonfinite: str,
        on_duplicate: str,
        precondition: Preconditioner | None,
        rotate: bool,
        writer: str | None,
        threads: int | None,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise DtypeError(f"model must be an nn.Module, got {_arrays.describe(model)}")
        if threads is None:
            threads = torch.get_num_threads()
        self._reduction = _arrays.choice("reduction", reduction, REDUCTIONS)
        self._nonfinite = _arrays.choice("nonfinite", nonfinite, ("error", "skip"))
        self._on_duplicate = _arrays.choice("on_duplicate", on_duplicate, DUPLICATES)
        _arrays.choice("uncovered", uncovered, ("error", "skip", "functional"))
        _arrays.choice("dtype", dtype, DTYPES)
        if weights is not None:
            _arrays.choice("weights", weights, ("fixed", "moving"))
        self._model = model
        self._weights = weights
        if not isinstance(weight_gradients, bool):
            raise DtypeError(
                f"weight_gradients must be a bool, got {_arrays.describe(weight_gradients)}"
            )
        self._weight_gradients = weight_gradients
        self._unbatched = patterns("unbatched", unbatched)
        self._structure = structure_of(model, layers, uncovered)
        self._hooks = Hooks(model, self._structure, strict=uncovered == "error")
        self._fired: set[str] = set()
        self._trainable = trainable(model)
        self._signature = signature(model)
        self._batches = 0
        # Held by the thread that records or changes what is recorded, while it is busy with it.
        self._turn = threading.RLock()
        self._busy = False
        self._open = False
        self._entered = False
        self._versions: int | None = None
        self._mapped: Checkpoint | None = None
        self._prepared: Prepared | None = None
        self._map: Sketch | Factored | Coordinates | Divided
        self._asked: dict[str, Any] = {
            "dim": dim,
            "sketch": sketch,
            "seed": seed,
            "rotate": rotate,
            "dtype": dtype,
        }
        if precondition is None:
            if not _arrays.boolean("rotate", rotate):
                raise ArgumentError("rotate must be True without precondition=, got False")
            self._map, spec = map_of(self._structure, sketch, dim, seed, layout, threads)
        else:
            if layout is not None:
                raise ArgumentError(f"layout must be None with precondition=, got {layout!r}")
            self._prepared, spec = self._prepare(precondition)
            self._map = self._prepared.map
        wanted = Manifest(spec, dtype, reduction, self._structure.describe())
        if wanted.is_factored and wanted.is_quantised:
            raise ArgumentError(
                "dtype must be 'float16' or 'float32' with layout='factored', whose rows are "
                f"factors and no vectors, got {dtype!r}"
            )
        self._path = _arrays.path("path", path)
        self._shared = writer is not None
        self._writer = Writer(self._path, wanted, writer)

    @property
    def path(self) -> Path:
        """The store's folder; of several writers, that of them all."""
        return self._path

    @property
    def rows(self) -> int:
        """Rows that are confirmed, of this writer: they are there after a crash."""
        return self._writer.rows

    def __enter__(self) -> Recorder:
        if self._entered:
            raise WhenceError(
                "a recorder must be entered once, got a second with; call record again"
            )
        self._open = self._entered = True
        self._hooks.install()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        interrupt: BaseException | None = None
        held = False
        try:
            # A batch that another thread is in is waited for; one of this one was left open. In a
            # forked child other threads are no more.
            while not held and self._writer.is_ours:
                held = self._turn.acquire(timeout=LOOK)
        except BaseException as caught:
            interrupt = caught
        try:
            self._close(interrupt if error is None else error)
        finally:
            if held:
                self._turn.release()
        if interrupt is not None:
            raise interrupt

    def _close(self, error: BaseException | None) -> None:
        """Takes the hooks off, and confirms what waits; `error` is what the loop has raised."""
        self._hooks.remove()
        self._open = False
        try:
            try:
                self._end_checkpoint(failing=error is not None)
                if self._shared and error is None:
                    self._writer.touch()  # one of several that has no rows is not missing any more
            finally:
                self._writer.close()
        except WhenceError as second:
            if error is None:
                raise
            # What the loop raised goes on, for who waits for it.
            what = f"rows that were not confirmed are lost: {second}"
            if hasattr(error, "add_note"):
                error.add_note(what)
            else:
                warnings.warn(what, RuntimeWarning, stacklevel=2)

    def coverage(self) -> Coverage:
        """What share of the trainable values is recorded."""
        recorded = {p.name: p.tensor.numel() for p in self._structure.parameters.values()}
        total = self._structure.total
        share = sum(recorded.values()) / total if total else 0.0
        return Coverage(
            share=share,
            recorded=sum(recorded.values()),
            total=total,
            uncovered=sorted(self._structure.uncovered),
            silent=sorted(set(recorded) - self._fired) if self._fired else [],
        )

    def pending(self, ids: Any) -> list[Any]:
        """Those of `ids` that are not recorded in the current checkpoint yet, in order.

        Ids that were left out because their gradient is not finite are not pending.

        Raises:
            IdError: If ids are of another kind than the store's, or appear twice.
        """
        if isinstance(ids, Sequence) and not isinstance(ids, str) and not len(ids):
            return []
        array = _arrays.ids("ids", ids)
        known, left_out = self._writer.has(array), self._writer.left_out
        return [
            id_
            for id_, there in zip(array.tolist(), known, strict=True)
            if not there and id_ not in left_out
        ]

    def checkpoint(
        self,
        name: str,
        learning_rate: float | None = None,
        *,
        precondition: Preconditioner | None = None,
    ) -> None:
        """Records into the checkpoint of this name from now on; starts it if it is new.

        Args:
            name: Its name; `states` of `whence.query` uses the same.
            learning_rate: The step size in use, by which scores of this checkpoint are weighted;
                for all checkpoints of a store or for none. With momentum m a step in effect goes
                1 / (1 - m) times as far; that changes scores, and no ranking if m is constant.
                None for rows preconditioned by factors: the curvature has its place.
            precondition: Factors fitted at these weights, or second moments at them, for a store
                of such rows. To go on with a checkpoint, give those that it was begun with.

        Raises:
            ArgumentError: If the name is empty or has a NUL character, or the learning rate is not
                a positive number of float32, or given beside factors.
            MismatchError: If the factors make other rows than the store's.
            CheckpointError: If the checkpoint there has another learning rate.
            WhenceError: If called inside a batch, of any thread, or on a closed recorder.
        """
        with self._alone("checkpoint"):
            self._start_checkpoint(name, learning_rate, precondition)

    def _start_checkpoint(
        self, name: str, learning_rate: float | None, precondition: Preconditioner | None
    ) -> None:
        if not is_name(name):
            raise ArgumentError(f"name must be a non-empty str without NUL, got {name!r}")
        if learning_rate is not None:
            learning_rate = _arrays.number("learning_rate", learning_rate, positive=True)
            if not RATES[0] <= learning_rate <= RATES[1]:
                raise ArgumentError(
                    f"learning_rate must be from {RATES[0]:g} to {RATES[1]:g}, as float32 has "
                    f"numbers, in which scores are, got {learning_rate:g}"
                )
            if isinstance(self._map, Coordinates):
                raise ArgumentError(
                    "learning_rate must be None for preconditioned rows, whose scores have the "
                    f"curvature in its place, got {learning_rate}"
                )
        prepared = None
        if precondition is not None:
            if self._prepared is None:
                raise ArgumentError(
                    "precondition must be given to whence.record first, got it for a checkpoint of "
                    "plain rows"
                )
            prepared, spec = self._prepare(precondition)
            check_spec(self._path, self._writer.manifest.sketch, spec)
        before, weights = self._writer.checkpoint, self._versions
        self._end_checkpoint()
        try:
            self._writer.set_checkpoint(Checkpoint(name, learning_rate))
        except CheckpointError:
            if before is self._writer.checkpoint:
                self._versions = weights
            raise
        if prepared is not None:
            self._prepared, self._map, self._mapped = prepared, prepared.map, None

    def commit(self) -> None:
        """Confirms all rows so far: when it returns, a crash or power cut keeps them.

        Rows are confirmed on their own every ten seconds or 64 MiB, and at the end.

        Raises:
            StoreError: If they cannot be written; they stay, and the next commit tries again.
            WhenceError: If called inside a batch, of any thread, or on a closed recorder.
        """
        with self._alone("commit"):
            self._writer.commit()

    def verify(
        self, closure: Callable[..., torch.Tensor], batch: Any, *, tokens: Any = None
    ) -> Verified:
        """Compares recorded rows of two examples with their exact gradients. Stores nothing.

        Two things are checked: that a row is the sketch of the gradient of the example's own
        loss, and so the scale that `reduction` stands for; and that an example's row does not
        depend on who else is in the batch. The model is in evaluation mode meanwhile, for masks
        of dropout depend on the place in the batch.

        Args:
            closure: (*batch) -> loss, in the way the training loop computes it.
            batch: Its arguments; tensors, or containers of tensors, with at least two examples in
                dimension 0. The first two are used. What is no tuple or list is its one argument.
            tokens: Counted tokens of the first two examples, for reduction="token_mean".

        Returns:
            The largest relative differences found.

        Raises:
            LayerError: If a difference is larger than rounding explains; says which check failed.
            WhenceError: If called inside a batch, of any thread, or on a closed recorder.
        """
        with self._alone("verify"):
            refuse_batch_statistics(self._model)
            return verify(
                self._model,
                self._structure,
                self._hooks,
                self._map,
                self._reduction,
                closure,
                batch,
                tokens,
                self._unbatched,
            )

    @contextmanager
    def batch(
        self,
        ids: Any = None,
        /,
        loss: Any = None,
        label: Any = None,
        group: Any = None,
        *,
        tokens: Any = None,
        scale: float = 1.0,
        **columns: Any,
    ) -> Iterator[Batch]:
        """Records the forward and backward pass inside it, one row per example.

        Several backward passes inside are summed, as their losses were. What is computed under
        torch.no_grad is not recorded.

        The rows are checked against the batch's own gradient, to which they must add up: always
        with weight_gradients=True, else in batches 1, 2, 4, 8 and so on.

        Args:
            ids: [batch] your own keys, int64 or str, one kind in a store.
            loss: [batch] a column, as are `label`, `group` and any other keyword: one number or
                str per example, stored beside the row. Which columns there are, and their types,
                is fixed by the first batch.
            label: See loss.
            group: See loss.
            tokens: [batch] counted tokens of each example; required for, and only for,
                reduction="token_mean".
            scale: What the loss was multiplied with on top (1 / accumulation steps, the factor of
                a GradScaler); rows are divided by it.
            **columns: See loss. Named otherwise than `ids`, `tokens` and `scale`.

        Yields:
            The batch; its `rows` are filled at the end.

        Raises:
            IdError: If ids are of mixed kinds, appear twice, or are recorded already.
            ArgumentError: If columns or tokens do not fit.
            CoverageError: If a trainable parameter received a gradient that no rule saw.
            LayerError: If dimension 0 of a layer is not the batch, or nothing was recorded.
            NotFiniteError: If a gradient is NaN or infinite; says for which ids, in which layer.
            WeightsError: If weights moved where they must not.
            WhenceError: If called inside a batch, of any thread, or on a closed recorder; or the
                model runs in another thread meanwhile.
        """
        given = {"loss": loss, "label": label, "group": group, **columns}
        with self._alone("batch"), self._batch(ids, given, tokens, scale) as found:
            yield found

    @contextmanager
    def _batch(self, ids: Any, given: dict[str, Any], tokens: Any, scale: float) -> Iterator[Batch]:
        """Records a batch, as `batch` does, which its columns are given to."""
        if ids is None:
            ids = given.pop("ids", None)
        if "ids" in given:
            raise ArgumentError(
                "columns must have other names than 'ids', 'tokens' and 'scale', which are taken, "
                "got 'ids'"
            )
        array = _arrays.ids("ids", ids)
        checked = self._writer.check_columns(
            {
                name: _arrays.column(name, value, len(array))
                for name, value in given.items()
                if value is not None
            }
        )
        refuse_tokens(self._reduction, tokens)
        factor = own_loss_factor(self._reduction, len(array), tokens)
        factor /= _arrays.number("scale", scale, positive=True)
        refuse_batch_statistics(self._model)
        self._refuse_changes()
        self._note_weights()
        there = self._writer.has(array)
        if there.any() and self._on_duplicate == "error":
            twice = array[there][0].item()
            checkpoint = self._writer.checkpoint
            raise IdError(
                f"ids must be new in checkpoint {checkpoint.name if checkpoint else None!r}, got "
                f"{twice!r}, which is recorded; pass on_duplicate='skip' to leave it out or "
                "'replace' to record it again, or start a new checkpoint with rec.checkpoint(name)"
            )
        keep = np.ones_like(there) if self._on_duplicate == "replace" else ~there
        array.flags.writeable = False  # it waits to be written, and stands for what was checked
        batch = Batch(array)
        if not keep.any():
            batch.rows = np.empty((0, self._writer.manifest.dim), np.float32)
            batch.stored = array[:0]
            with nullcontext() if self._weight_gradients else kept_gradients(self._model):
                yield batch
            return
        capture = Capture(
            self._structure, self._map, len(array), self._unbatched, check=self._check()
        )
        with self._hooks.capturing(capture, weight_gradients=self._weight_gradients):
            yield batch
        self._finish(batch, capture, keep, checked, factor)

    def _prepare(self, precondition: Preconditioner) -> tuple[Prepared, dict[str, Any]]:
        """The map of one checkpoint's factors."""
        prepared, spec = prepared_maps(
            precondition, self._structure.describe(), self._reduction, **self._asked
        )
        if len(prepared) > 1:
            raise ArgumentError(
                "precondition must be factors of one checkpoint for whence.record, got those of "
                f"{len(prepared)}; whence.record_checkpoints records them all"
            )
        return prepared[0], spec

    def _note_map(self, checkpoint: Checkpoint, weights: str) -> None:
        """Puts the map of a checkpoint's rows into the store, or takes the one that is there.

        Raises:
            WeightsError: If the factors are of other weights.
            MismatchError: If the store's map was made in another way.
        """
        prepared = self._prepared
        if prepared is None:
            return
        if self._weights != "moving" and prepared.digest != weights:
            raise WeightsError(
                "precondition must be fitted at the weights that are recorded, got factors of "
                "others; fit at each checkpoint, and pass them to rec.checkpoint(name, "
                "precondition=factors), or pass weights='moving'"
            )
        if checkpoint.map is None:
            described, arrays = stored_arrays(prepared.map, self._writer.manifest.sketch)
            checkpoint.map = self._writer.write_map(prepared.identity, described, arrays)
        check_identity(checkpoint, prepared)
        threads = torch.get_num_threads()
        self._map = map_of_store(self._writer.path, self._writer.manifest, checkpoint, threads)

    def _check(self) -> str:
        """How closely to compare this batch's rows with its own gradient.

        A comparison per parameter costs about as much as recording; one of all together next to
        nothing, but for the gradient itself, which weight_gradients=False saves.
        """
        functional = any(layer.rule is FUNCTIONAL for layer in self._structure.layers)
        if functional or is_compared(self._batches + 1):
            return "each"
        if not self._weight_gradients or (isinstance(self._map, Coordinates) and self._map.is_tied):
            return "no"
        return "probe" if isinstance(self._map, Factored) else "total"

    def _finish(
        self,
        batch: Batch,
        capture: Capture,
        keep: NDArray[np.bool_],
        columns: dict[str, NDArray[Any]],
        factor: float,
    ) -> None:
        """Turns what was captured into stored rows."""
        capture.verify()
        rows, scales = capture.rows(factor, self._writer.manifest.dtype)
        bad = [row for row in sorted(capture.bad) if keep[row]]
        if bad and self._nonfinite == "error":
            names = [f"id {id_!r}" for id_ in batch.ids.tolist()]
            raise not_finite(names, {row: capture.bad[row] for row in bad})
        replaces = self._on_duplicate == "replace"
        if bad:
            self._writer.skip(batch.ids[bad], replaces=replaces)
        self._fired |= capture.fired
        self._batches += not capture.bad  # a batch with NaN could not be compared
        good = keep.copy()
        good[bad] = False
        # Copies, for the loop's own arrays may change before they are written.
        batch.stored = batch.ids[good]
        batch.stored.flags.writeable = False
        columns = {name: column[good] for name, column in columns.items()}
        if not good.all():
            rows, scales = rows[good], None if scales is None else scales[good]
        if scales is not None:
            rows.flags.writeable = False  # they wait to be written as they are
        batch.rows = rows
        self._writer.append(batch.stored, rows, columns, scales, replaces=replaces)

    @contextmanager
    def _alone(self, call: str) -> Iterator[None]:
        """Lets nobody else in meanwhile, on this thread or another.

        Raises:
            WhenceError: If somebody is in, or the recorder is closed.
        """
        inside = WhenceError(
            f"{call} must not be called inside a batch, got one that is open; a recorder does one "
            "thing at a time, also where several threads share it"
        )
        if not self._turn.acquire(blocking=False):
            raise inside
        try:
            if self._busy:
                raise inside
            if not self._open:
                raise WhenceError(
                    f"{call} must be called inside `with whence.record(...)`, got a closed recorder"
                )
            try:
                self._busy = True
                yield
            finally:
                self._busy = False
        finally:
            self._turn.release()

    def _refuse_changes(self) -> None:
        """Nothing, if the model is what it was when recording began.

        Raises:
            LayerError: If a parameter came, went, was frozen or unfrozen; names it.
        """
        if signature(self._model) == self._signature:
            return
        now = trainable(self._model)
        if now != self._trainable:
            name = min(
                name
                for name in {*now, *self._trainable}
                if now.get(name) != self._trainable.get(name)
            )
            there, here = self._trainable.get(name), now.get(name)
            what = "new" if there is None else "gone" if here is None else "replaced"
            if there and here and there[0] == here[0]:
                what = "trainable now" if here[1] else "frozen now"
            raise LayerError(
                f"the model's parameters must stay as they were when recording began, got {name}, "
                f"which is {what}; end this recording, and record into another store"
            )

    def _note_weights(self) -> None:
        """At the start of a batch: which weights its rows belong to."""
        if self._writer.checkpoint is None:
            self._writer.set_checkpoint(Checkpoint("0"))
        checkpoint = self._writer.checkpoint
        if checkpoint is None:
            return
        now = versions(self._model)
        if self._versions is None:
            current = digest(self._model)
            if checkpoint.first is None:
                self._note_map(checkpoint, current)
                checkpoint.first = current
                checkpoint.weights = self._weights or "fixed"
                self._mapped = checkpoint
            elif current != checkpoint.first and self._must_stay:
                raise self._moved(checkpoint)
            elif checkpoint.weights == "fixed" and current != checkpoint.first:
                # A run that was killed may have moved the weights after its last commit.
                killed = checkpoint.last is None and self._weights is None
                if self._weights != "moving" and not killed:
                    raise self._moved(checkpoint)
                checkpoint.weights = "moving"
            elif self._weights == "fixed" and checkpoint.weights == "moving":
                raise WeightsError(
                    f"weights must be 'moving' as checkpoint {checkpoint.name!r} "
                    "was recorded, got 'fixed'"
                )
            if self._mapped is not checkpoint:
                self._note_map(checkpoint, current)
                self._mapped = checkpoint
            checkpoint.last = None
            self._versions = now
        elif now != self._versions:
            if self._weights == "fixed" or self._must_stay:
                raise self._moved(checkpoint)
            checkpoint.weights = "moving"
            self._versions = now

    @property
    def _must_stay(self) -> bool:
        """Whether factors must be of all weights that are recorded."""
        return self._prepared is not None and self._weights != "moving"

    def _end_checkpoint(self, *, failing: bool = False) -> None:
        """Notes the last weights of the current checkpoint."""
        checkpoint = self._writer.checkpoint
        if checkpoint is None or self._versions is None:
            return
        self._versions = None
        checkpoint.last = digest(self._model)
        self._writer.touch()
        if checkpoint.weights == "fixed" and checkpoint.last != checkpoint.first:
            if self._weights == "fixed" and not failing:
                raise self._moved(checkpoint)
            checkpoint.weights = "moving"

    @staticmethod
    def _moved(checkpoint: Checkpoint) -> WeightsError:
        return WeightsError(
            f"weights must be those that checkpoint {checkpoint.name!r} was recorded with, got "
            "others; load those, start a new checkpoint with rec.checkpoint(name), or pass "
            "weights='moving' to record along a moving model"
        )


def is_compared(number: int) -> bool:
    """Whether the batch of this number is compared parameter by parameter: 1, 2, 4, 8 and so on."""
    return number & (number - 1) == 0


def patterns(name: str, value: Any) -> list[str]:
    """`value` as a list of patterns.

    Raises:
        DtypeError: If it is neither a str nor a list of them.
    """
    found = [value] if isinstance(value, str) else value
    if not isinstance(found, Sequence) or not all(isinstance(each, str) for each in found):
        raise DtypeError(f"{name} must be patterns of layer names, got {_arrays.describe(value)}")
    return list(found)


def trainable(model: nn.Module) -> dict[str, tuple[int, bool]]:
    """Each parameter's identity, and whether it takes a gradient. O(parameters)."""
    return {
        name: (id(parameter), parameter.requires_grad)
        for name, parameter in model.named_parameters(remove_duplicate=False)
    }


def record(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    dim: int | None = None,
    seed: int | None = None,
    sketch: str | Sketch | None = None,
    layout: str | None = None,
    dtype: str = "float16",
    reduction: str = "mean",
    layers: str | Sequence[str] | None = None,
    uncovered: str = "error",
    unbatched: Sequence[str] = (),
    weights: str | None = None,
    weight_gradients: bool = True,
    nonfinite: str = "error",
    on_duplicate: str = "error",
    precondition: Preconditioner | None = None,
    rotate: bool = True,
    writer: str | None = None,
    threads: int | None = None,
) -> Recorder:
    """Records each example's gradient while your own loop runs.

    Use it as a context manager; hooks are removed at its end, on an exception too. A row is the
    sketch of the gradient of the example's own loss. A second `record` on the same path goes on
    where the first ended, or was killed; it must be of the same model and sketch.

    Args:
        model: Any module whose layers have a rule: Linear, Conv1d/2d/3d, Embedding, LayerNorm,
            RMSNorm, GroupNorm, BatchNorm in evaluation mode, MultiheadAttention with batch_first,
            Hugging Face's Conv1D, and what `register_layer` teaches.
        path: The store's folder; made if it is not there.
        dim: Width of a row; None means 4096.
        seed: Seed of the sketch; None means 0.
        sketch: Kind of the sketch, None for "chunked_sjlt"; or a `Sketch` with all its settings,
            then without dim, seed and layout.
        layout: "global", the default: layers are summed into one row. "per_layer": each layer has
            `dim` columns of its own. "factored": for models of Linear and norm layers that see one
            position an example (multilayer perceptrons), the factors of each gradient are kept
            exactly, inputs + outputs values a layer, and nothing is sketched.
        dtype: "float16" or "float32", the type of stored unit rows, of which float16 adds an error
            of about 2^-12 of the row's norm. Or "int8", "int4", "int2" or "int1", for rows of dim,
            dim / 2, dim / 4 or dim / 8 bytes and a scale of least squared error: of normal values
            they lose about 0.7, 10, 34 and 60 percent of the norm, and
            `Store.quantisation_error` says what they lost. Not with layout="factored".
        reduction: How your loss combines the examples of a batch: "mean", "sum", or "token_mean"
            (mean over all counted tokens; an example's own loss is the sum over its tokens).
        layers: Patterns of layer names to record, as in `fnmatch`; None for all.
        uncovered: What to do with a trainable parameter that receives a gradient without a rule:
            "error", "skip", or "functional" (torch.func per sample; slow).
        unbatched: Patterns of embeddings whose output is positions that are simply added to the
            batch; with "!" in front, of embeddings called with one index per example. Needed
            only where the two cannot be told apart, or where the model cannot be run a second
            time: where an embedding looks like positions, the model is run once more, without
            gradients, to see that giving them a batch dimension changes nothing.
        weights: "fixed": rows of a checkpoint belong to the same weights, and a change is an
            error. "moving": weights change while rows are recorded, as in one epoch of training;
            rows then belong to different points of the path, and a score is an approximation
            that treats the path between the first and the last weights, whose digests are kept,
            as one point. None: fixed if nothing moves them, else moving.
        weight_gradients: False leaves `.grad` as it was and skips computing the batch's own
            weight gradients: collecting then costs about what training costs.
        nonfinite: What to do with an example whose gradient is NaN or infinite: "error", or
            "skip" to leave it out and note its id.
        on_duplicate: What to do with an id that is recorded in this checkpoint: "error"; "skip"
            to leave it out; or "replace", to record it again: its new row takes the place of the
            old one in one commit, and is no other row than that in between. If the new gradient is
            left out by nonfinite="skip", the old row goes too.
        precondition: What `whence.fit_factors` found at these weights: rows are then whitened
            coordinates of the gradient, and a score is EK-FAC influence. They are rotated onto a
            basis learnt from the training data, of `dim` columns, or as many as hold three quarters
            of it for None; with `sketch` they are sketched instead, by a seed and no basis. Or
            second moments, `whence.moments_of(optimizer, model)`: rows are then sketches of
            gradients divided by their roots. Weights that move meanwhile are an error, but for
            weights="moving".
        rotate: False keeps the coordinates as they are, for `whence.compress`; then without dim,
            seed and sketch.
        writer: For a store of several processes, which of them this is: "3/8" for the third of
            eight. Each writes to a folder of its own in `path`, with a lock of its own, so that
            they need not agree on anything while they run; `whence.open(path)` reads them as one
            store. An id must be of one writer, so give each its share of the data, and the same
            share when it goes on. None for the one writer of a store.
        threads: How many threads the sketch uses; None means as many as torch.

    Returns:
        The recorder.

    Raises:
        ArgumentError: If an argument is out of range, or `writer` is not "number/total".
        LockedError: If another process records to the path, as the same writer.
        MismatchError: If the store at the path is of another model, sketch or setting.
        StoreError: If the path is a file, or cannot be written; or is a store of one writer where
            several are meant, of another number of them, or the other way round.

    Examples:
        >>> with whence.record(model, "runs/digits") as rec:  # doctest: +SKIP
        ...     for ids, x, y in loader:
        ...         with rec.batch(ids, label=y):
        ...             loss_fn(model(x), y).backward()
    """
    return Recorder(
        model,
        path,
        dim=dim,
        seed=seed,
        sketch=sketch,
        layout=layout,
        dtype=dtype,
        reduction=reduction,
        layers=layers,
        uncovered=uncovered,
        unbatched=unbatched,
        weights=weights,
        weight_gradients=weight_gradients,
        nonfinite=nonfinite,
        on_duplicate=on_duplicate,
        precondition=precondition,
        rotate=rotate,
        writer=writer,
        threads=threads,
    )
