"""`estimate`: what recording will take, measured in miniature before any work."""

from __future__ import annotations

import math
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from whence import _arrays
from whence._arrays import Ids
from whence._plain import counted
from whence.errors import ArgumentError, DtypeError, WeightsError
from whence.gradients.hooks import kept_gradients, without_compiled_code
from whence.gradients.maps import stored_arrays
from whence.gradients.memory import Held, traced
from whence.gradients.preconditioned import Preconditioner
from whence.gradients.recorder import Recorder, is_compared, record
from whence.gradients.verify import batch_size, loss_of
from whence.gradients.weights import digest, preserved, versions
from whence.search import open as open_store
from whence.sketch import Sketch
from whence.store import Checkpoint, Manifest, Writer
from whence.store.files import store_errors
from whence.store.manifest import DTYPES
from whence.store.writer import COMMIT_SECONDS, SHARD_BYTES

PASS_SECONDS = 1.5
"""How long passes are timed, if one of each kind does not take longer."""

VALUES = 1 << 23
"""Values of rows that a miniature holds at most, if a row is not longer: 16 MiB of float16."""

EXAMPLES = 1 << 14
"""Examples that it holds at most, which matters where rows are short."""

CHECKPOINTS = 8
"""Checkpoints that it has at most."""

BATCH = 256
"""Examples that are appended to it together, where no batch is given."""

CORE_BYTES = 32
"""What the core holds for a row while it searches, beside the arrays that Python holds."""

K = 10
"""Hits at each end of the search that is measured."""

SEARCHES = 3
"""How often it is."""


@dataclass(frozen=True)
class Stage:
    """What one part of the work takes; None where that is not known.

    Attributes:
        name: "train", "sketch", "write" or "search".
        seconds: By the clock.
        ram: Bytes that tensors and arrays hold for it at most.
        disk: Bytes of the files that it leaves.
        what: The work, in words.
    """

    name: str
    seconds: float | None
    ram: int | None
    disk: int
    what: str


@dataclass(frozen=True)
class Estimate:
    """What `whence.estimate` found.

    Attributes:
        rows: How many rows will be stored.
        checkpoints: Among how many checkpoints they are divided.
        width: Values of a row.
        dtype: Type of the stored rows.
        stages: In the order of the work.
    """

    rows: int
    checkpoints: int
    width: int
    dtype: str
    stages: tuple[Stage, ...]

    def __getitem__(self, name: str) -> Stage:
        """The stage of this name.

        Raises:
            KeyError: If there is none.
        """
        return {stage.name: stage for stage in self.stages}[name]

    @property
    def disk(self) -> int:
        """Bytes of all files of the store."""
        return sum(stage.disk for stage in self.stages)

    @property
    def ram(self) -> int:
        """Bytes that are held at once at most, beyond the model, for the stages that are known.

        Training, sketching and writing go on together; a search comes after them.
        """
        together = sum(stage.ram or 0 for stage in self.stages if stage.name != "search")
        return max(together, self["search"].ram or 0)

    @property
    def seconds(self) -> float | None:
        """Of all stages; None if one is not known."""
        known = [stage.seconds for stage in self.stages if stage.seconds is not None]
        return sum(known) if len(known) == len(self.stages) else None

    def __str__(self) -> str:
        total = Stage("all", self.seconds, self.ram, self.disk, "RAM: held at once at most")
        known = all(stage.ram is not None for stage in self.stages)
        return "\n".join(
            [
                f"{self.rows:,} rows of {self.width:,} {self.dtype} values, "
                f"{self.checkpoints:,} checkpoint{'s' * (self.checkpoints > 1)}",
                f"{'stage':<7}{'time':>10}{'RAM':>12}{'disk':>12}   what it is",
                *(
                    f"{each.name:<7}{_duration(each.seconds):>10}{_size(each.ram):>12}"
                    f"{_size(each.disk) if each.disk else '-':>12}   {each.what}"
                    for each in (*self.stages, total)
                ),
                *([] if known else ["what passes take is known with closure= and batch="]),
            ]
        )


def estimate(
    model: nn.Module,
    rows: int,
    dim: int | None = None,
    dtype: str = "float16",
    *,
    checkpoints: int = 1,
    closure: Callable[..., Tensor] | None = None,
    batch: Any = None,
    tokens: Any = None,
    ids: Any = None,
    columns: Mapping[str, Any] | None = None,
    queries: int = 1,
    path: str | os.PathLike[str] | None = None,
    sketch: str | Sketch | None = None,
    layout: str | None = None,
    reduction: str = "mean",
    layers: str | Sequence[str] | None = None,
    uncovered: str = "error",
    unbatched: Sequence[str] = (),
    weight_gradients: bool = True,
    precondition: Preconditioner | None = None,
    threads: int | None = None,
) -> Estimate:
    """What recording a store and searching it will take: time, RAM and disk of each stage.

    Disk and the time of writing and searching come from stores in miniature, of random rows as wide
    as the model's, in a temporary folder: one of a single example and one of many, and a straight
    line through both. Passes are measured with a batch of yours; without one, what they take is
    not known, and None. Takes one to three seconds, or about ten passes if those are longer.

    Leaves nothing behind: weights, buffers, modes, `.grad` and random states are as before.

    Args:
        model: The model, as it will be recorded: on its device, in its mode.
        rows: How many rows will be stored: examples times checkpoints.
        dim: As in `record`, with dtype, sketch, layout, reduction, layers, uncovered, unbatched,
            weight_gradients, precondition and threads.
        dtype: See dim.
        checkpoints: Among how many checkpoints the rows are divided.
        closure: (*batch) -> loss, in the way the training loop computes it, and nothing else.
        batch: Its arguments; tensors, or containers of tensors, of a batch as large as yours are.
            What is no tuple or list is its one argument.
        tokens: [batch] counted tokens, for reduction="token_mean".
        ids: Some of your keys, whose lengths are taken for those of all; None for whole numbers.
        columns: Name -> some of its values, whose lengths are taken for those of all; None for no
            columns.
        queries: How many query rows a search has.
        path: Where the store will lie. The miniatures stand beside it, so that it is the speed of
            its disk that is measured; None for the system's temporary folder.
        sketch: See dim.
        layout: See dim.
        reduction: See dim.
        layers: See dim.
        uncovered: See dim.
        unbatched: See dim.
        weight_gradients: See dim.
        precondition: See dim; of one checkpoint, whose map every checkpoint is taken to have.
        threads: See dim.

    Returns:
        The estimate, which prints as a table. Its stages are "train", forward and backward passes
        as they are without recording, and without an optimizer; "sketch", what rows add to them,
        which is below zero where weight_gradients=False saves more than they take; "write", the
        files of all commits, and the rows that wait for one; "search", one search for ten examples
        at either end, from the opening of a store that the system holds in its cache, every row
        scored: where norms differ much it is quicker.

        RAM is what tensors and arrays hold beyond the model, on the processor and on other
        devices. Neither what libraries take when they are first used nor what an operation needs
        for itself while it runs is in it; nor are factors and data.

    Raises:
        ArgumentError: If an argument is out of range, or one of closure and batch is missing.
        DtypeError: If an argument is of another type.
        StoreError: If the miniatures cannot be written.
        WeightsError: If the closure changes weights.
        WhenceError: And whatever `record` and its batches raise.

    Examples:
        >>> print(whence.estimate(model, 1_000_000, dim=4096))  # doctest: +SKIP
    """
    rows = _arrays.integer("rows", rows, 1)
    checkpoints = _arrays.integer("checkpoints", checkpoints, 1, rows)
    queries = _arrays.integer("queries", queries, 1)
    if (closure is None) != (batch is None):
        missing, there = ("closure", "batch") if closure is None else ("batch", "closure")
        raise ArgumentError(f"{missing} must be given with {there}, got None")
    if tokens is not None and closure is None:
        raise ArgumentError("tokens must be None without closure and batch, got tokens")
    sample = _Sample(ids, columns)
    with _folder(path) as folder:
        recorder = record(
            model,
            folder / "recorded",
            dim=dim,
            dtype=dtype,
            sketch=sketch,
            layout=layout,
            reduction=reduction,
            layers=layers,
            uncovered=uncovered,
            unbatched=unbatched,
            weights="moving",  # factors of other weights make rows of the same size
            weight_gradients=weight_gradients,
            precondition=precondition,
            threads=threads,
        )
        with recorder:
            passes = None
            if closure is not None and batch is not None:
                passes = _passes(recorder, model, closure, batch, tokens, sample)
        return _estimate(recorder, folder, rows, checkpoints, queries, passes, sample)


def _estimate(
    recorder: Recorder,
    folder: Path,
    rows: int,
    checkpoints: int,
    queries: int,
    passes: _Passes | None,
    sample: _Sample,
) -> Estimate:
    """The estimate, once passes are measured."""
    manifest = recorder._writer.manifest
    row_bytes = manifest.row_width * np.dtype(DTYPES[manifest.dtype]).itemsize
    examples = -(-rows // checkpoints)
    # Rows wait until they are many bytes, or for some seconds, or for the end of a checkpoint.
    waiting = min(examples, -(-SHARD_BYTES // row_bytes))
    train = sketch = train_bytes = sketch_bytes = None
    if passes is not None:
        batches = -(-rows // passes.examples)
        recorded = passes.recorded(batches)
        in_time = math.floor(COMMIT_SECONDS * rows / max(recorded, 1e-9))
        waiting = min(waiting, max(passes.examples, in_time))
        train = passes.plain * batches
        sketch = recorded - train + 2 * checkpoints * passes.digest
        train_bytes = passes.plain_bytes
        sketch_bytes = passes.bytes - train_bytes + _map_bytes(recorder)
    commits = checkpoints * -(-examples // waiting)
    together = BATCH if passes is None else passes.examples
    disk, write, search, opening, held = _store(
        recorder, folder, sample, queries, together, checkpoints, examples, commits
    )
    write_bytes = waiting * (row_bytes + 2 * sample.row_bytes) + 2 * rows * sample.id_bytes
    return Estimate(
        rows,
        checkpoints,
        manifest.dim,
        manifest.dtype,
        (
            Stage("train", train, train_bytes, 0, "forward and backward passes"),
            Stage("sketch", sketch, sketch_bytes, 0, "what rows add to them"),
            Stage(
                "write",
                float(write),
                round(write_bytes),
                round(disk),
                f"files, in {counted(commits, 'commit')}",
            ),
            Stage(
                "search",
                float(search),
                round(max(opening, held + CORE_BYTES * rows)),
                0,
                f"one search for {counted(queries, 'query', 'queries')}, every row scored",
            ),
        ),
    )


@dataclass(frozen=True)
class _Passes:
    """What passes over one batch take.

    Attributes:
        examples: Of the batch.
        plain: Seconds of one that is not recorded.
        usual: Seconds of a recorded one.
        compared: Seconds of a recorded one that is compared with the batch's own gradient.
        digest: Seconds of a digest of the weights; each checkpoint has two.
        plain_bytes: What is held at most in a pass that is not recorded.
        bytes: The same in a recorded one.
    """

    examples: int
    plain: float
    usual: float
    compared: float
    digest: float
    plain_bytes: int
    bytes: int

    def recorded(self, batches: int) -> float:
        """Seconds of so many recorded passes, from the first of a recording on."""
        compared = batches.bit_length()
        return compared * self.compared + (batches - compared) * self.usual


def _passes(
    recorder: Recorder,
    model: nn.Module,
    closure: Callable[..., Tensor],
    batch: Any,
    tokens: Any,
    sample: _Sample,
) -> _Passes:
    """Passes over one batch, plain and recorded in turns.

    Raises:
        ArgumentError: If the batch holds no example.
        DtypeError: If the closure is no function, or does not return a loss.
        WeightsError: If it changes weights.
    """
    if not callable(closure):
        raise DtypeError(
            f"closure must be a function of the batch, got {_arrays.describe(closure)}"
        )
    examples = batch_size(batch)
    if not examples:
        raise ArgumentError("batch must hold tensors of at least one example, got none")
    columns: dict[str, Any] = dict(sample.columns(examples))
    before, number = versions(model), 0
    writer, appending = recorder._writer, 0.0

    def append(*given: Any, **options: Any) -> None:
        nonlocal appending
        appending += _seconds(partial(Writer.append, writer, *given, **options))

    writer.append = append  # type: ignore[method-assign]  # for what it takes is of another stage

    def plain() -> None:
        with torch.enable_grad():
            loss_of(closure, batch).backward()  # type: ignore[no-untyped-call]
        if versions(model) != before:
            raise WeightsError("closure must leave the weights as they are, got others after it")

    def recorded() -> None:
        nonlocal number
        number += 1
        with recorder.batch(sample.ids(number * examples, examples), tokens=tokens, **columns):
            plain()

    def seconds(work: Callable[[], None]) -> float:
        model.zero_grad()
        return _seconds(work, [parameter.device for parameter in model.parameters()])

    def held(work: Callable[[], None]) -> int:
        model.zero_grad()
        with Held() as found:
            work()
        return found.most

    plain_seconds: list[float] = []
    recorded_seconds: dict[bool, list[float]] = {True: [], False: []}
    with _untouched(model):
        seconds(plain)  # the first of each loads libraries, and is not counted
        seconds(recorded)
        with without_compiled_code(model):
            plain_bytes = held(plain)
        recorded_bytes = held(recorded)  # the second is compared, and holds more than others
        until = time.perf_counter() + PASS_SECONDS / 2
        while not plain_seconds or time.perf_counter() < until:
            plain_seconds.append(seconds(plain))
        until = time.perf_counter() + PASS_SECONDS / 2
        while not all(recorded_seconds.values()) or time.perf_counter() < until:
            appending = 0.0
            found = seconds(recorded) - appending
            recorded_seconds[is_compared(number)].append(found)
        fingerprint = _seconds(lambda: digest(model))
    return _Passes(
        examples,
        plain=median(plain_seconds),
        usual=median(recorded_seconds[False]),
        compared=median(recorded_seconds[True]),
        digest=fingerprint,
        plain_bytes=plain_bytes,
        bytes=recorded_bytes,
    )


def _store(
    recorder: Recorder,
    folder: Path,
    sample: _Sample,
    queries: int,
    together: int,
    checkpoints: int,
    examples: int,
    commits: int,
) -> NDArray[np.float64]:
    """Bytes on disk, seconds of all commits and of a search, bytes held as it opens and searches.

    On the straight line through two small stores, of one example and of many.
    """
    few = min(checkpoints, CHECKPOINTS)
    many = max(1, min(examples, EXAMPLES, VALUES // (few * recorder._writer.manifest.dim)))
    small = partial(_small_store, recorder, sample, queries, together, few)
    one, further = small(folder / "one", 1)
    large, _ = small(folder / "many", many)
    each = (large - one) / max(many - 1, 1)
    whole: NDArray[np.float64] = (one + each * (examples - 1)) * (checkpoints / few)
    whole[:2] += (commits - checkpoints) * (further - each[:2] / few)  # which has a row in it
    return whole


def _small_store(
    recorder: Recorder,
    sample: _Sample,
    queries: int,
    together: int,
    checkpoints: int,
    path: Path,
    examples: int,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """What `_store` finds, of random rows; and bytes and seconds of one commit more."""
    there = recorder._writer.manifest
    stored_map = _map(recorder)
    writer = Writer(path, replace(there, ids=None, columns=None, checkpoints=[], shards=[]))

    def begin(name: str) -> None:
        checkpoint = writer.set_checkpoint(Checkpoint(name))
        checkpoint.first = checkpoint.last = there.model["digest"]  # as long as one of weights
        if stored_map is not None:
            checkpoint.map = writer.write_map(*stored_map)

    def commit(first: int, count: int) -> float:
        seconds = 0.0
        for start in range(first, first + count, together):
            size = min(together, first + count - start)
            ids, columns = sample.ids(start, size), sample.columns(size)
            rows, scales = _random_rows(there, size)
            seconds += _seconds(partial(writer.append, ids, rows, columns, scales))
        return seconds + _seconds(writer.commit)

    try:
        write = 0.0
        for number in range(checkpoints):
            write += _seconds(partial(begin, str(number))) + commit(0, examples)
        disk = _length(path)
        search, opening, held = _searched(path, checkpoints, queries)
        for number in range(3):  # until there are as many manifests as are kept
            before, seconds = _length(path), commit(examples + number, 1)
    finally:
        writer.release()
    return np.array([disk, write, search, opening, held]), np.array(
        [_length(path) - before, seconds]
    )


def _random_rows(manifest: Manifest, count: int) -> tuple[NDArray[Any], NDArray[np.float32] | None]:
    """[count, dim] rows of about one norm as a writer takes them, and the scales of factors."""
    rows = np.random.default_rng(0).standard_normal((count, manifest.dim), np.float32)
    if manifest.is_factored:
        return rows.astype(manifest.dtype), np.ones(count, np.float32)
    return rows, None


def _searched(path: Path, checkpoints: int, queries: int) -> tuple[float, int, int]:
    """Seconds of a search of a store, with its opening, and the bytes held at most in each."""

    def search() -> None:
        open_store(path).find(asked, K)

    dim = open_store(path).dim
    asked = np.random.default_rng(1).standard_normal((checkpoints, queries, dim), np.float32)
    with traced() as held:
        store = open_store(path)
        _ = store.ids  # before the core holds anything
        opening = held()
        store.find(asked, K)
        most = held()
    return median(_seconds(search) for _ in range(SEARCHES)), opening, most


def _map(recorder: Recorder) -> tuple[dict[str, Any], Any, dict[str, NDArray[Any]]] | None:
    """What a store keeps of the map of preconditioned rows, as its writer takes it."""
    prepared = recorder._prepared
    if prepared is None:
        return None
    return prepared.identity, *stored_arrays(prepared.map, recorder._writer.manifest.sketch)


def _map_bytes(recorder: Recorder) -> int:
    described = _map(recorder)
    return 0 if described is None else sum(array.nbytes for array in described[2].values())


class _Sample:
    """Ids and columns as long as the caller's.

    Args:
        ids: Some ids, or None for whole numbers.
        columns: Name -> some values; or None.

    Raises:
        ArgumentError: If there are none of a column, or a column cannot have its name.
        DtypeError: If they are of another type.
        IdError: If ids are of mixed kinds, or appear twice.
    """

    def __init__(self, ids: Any, columns: Mapping[str, Any] | None) -> None:
        self._lengths: list[int] | None = None
        if ids is not None and _arrays.kind_of_array(given := _arrays.ids("ids", ids)) == "str":
            self._lengths = [len(_encoded(text)) for text in given]
        if columns is not None and not isinstance(columns, Mapping):
            raise DtypeError(
                f"columns must be a dict of name to values, got {_arrays.describe(columns)}"
            )
        self._columns: dict[str, NDArray[Any]] = {}
        for name, values in (columns or {}).items():
            if not isinstance(name, str) or name in ("ids", "tokens", "scale"):
                raise ArgumentError(f"columns must be named by a str of their own, got {name!r}")
            self._columns[name] = _arrays.values(f"columns[{name!r}]", values)
            if not len(self._columns[name]):
                raise ArgumentError(f"columns[{name!r}] must have a value, got none")

    def ids(self, first: int, count: int) -> Ids:
        """[count] ids, other ones for each number."""
        numbers = range(first, first + count)
        if self._lengths is None:
            return np.array(numbers, np.int64)
        lengths = self._lengths
        return np.array([f"{number:0{lengths[number % len(lengths)]}}" for number in numbers])

    def columns(self, count: int) -> dict[str, NDArray[Any]]:
        """Name -> [count] values."""
        return {name: np.resize(values, count) for name, values in self._columns.items()}

    @property
    def id_bytes(self) -> int:
        """What an id takes in memory."""
        return self.ids(0, len(self._lengths or [0])).itemsize

    @property
    def row_bytes(self) -> float:
        """What scale, id and columns of a row take in memory."""
        columns = 0.0
        for values in self._columns.values():
            texts = [sys.getsizeof(text) for text in values] if values.dtype == object else [0]
            columns += values.itemsize + float(np.mean(texts))
        return 4 + self.id_bytes + columns


def _encoded(text: str) -> bytes:
    return str(text).encode("utf-8", "surrogatepass")


@contextmanager
def _folder(path: str | os.PathLike[str] | None) -> Iterator[Path]:
    """A folder on the disk of `path` for a while.

    Raises:
        StoreError: If there can be none.
    """
    near = Path(tempfile.gettempdir())
    if path is not None:
        near = next(each for each in _arrays.path("path", path).parents if each.is_dir())
    with store_errors(near):
        made = tempfile.TemporaryDirectory(prefix=".whence-", dir=near)
    with made as folder:
        yield Path(folder)


@contextmanager
def _untouched(model: nn.Module) -> Iterator[None]:
    """Puts back what passes change, whatever happens: but for weights."""
    states = random.getstate(), np.random.get_state()  # noqa: NPY002
    try:
        with preserved(model, weights=False), kept_gradients(model):
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])  # noqa: NPY002


def _seconds(work: Callable[[], Any], devices: Iterable[torch.device] = ()) -> float:
    """By the clock, until the devices are done."""
    waited = {device for device in devices if device.type == "cuda"}
    for device in waited:
        torch.cuda.synchronize(device)
    began = time.perf_counter()
    work()
    for device in waited:
        torch.cuda.synchronize(device)
    return time.perf_counter() - began


def _length(folder: Path) -> int:
    """Bytes of all files in a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _size(value: int | None) -> str:
    """Bytes for people."""
    if value is None:
        return "not known"
    size, units = float(value), ["B", "KiB", "MiB", "GiB", "TiB"]
    while abs(size) >= 1024 and len(units) > 1:
        size /= 1024
        del units[0]
    return f"{size:,.{0 if units[0] == 'B' else 1}f} {units[0]}"


def _duration(seconds: float | None) -> str:
    """Seconds for people."""
    if seconds is None:
        return "not known"
    size = abs(seconds)
    if size < 1:
        return f"{seconds * 1000:.1f} ms"
    if size < 120:
        return f"{seconds:.1f} s"
    if size < 7200:
        return f"{seconds / 60:.1f} min"
    return f"{seconds / 3600:,.1f} h"
