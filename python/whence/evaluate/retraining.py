"""Models of one's own, trained again on subsets, with what they gave kept as it is made."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from whence import _arrays, _core
from whence._interrupts import interruptible
from whence.errors import ArgumentError, DtypeError, MismatchError, ShapeError, StoreError
from whence.evaluate.checks import function, numbers, subsets_of
from whence.evaluate.measures import fraction
from whence.hashing.families import MAX_SEED
from whence.store.files import WRONG, read_json, store_errors, write_json
from whence.store.progress import watched

VERSION = 0
"""Of the files of results."""

Train: TypeAlias = Callable[[NDArray[np.int64], int], Any]
"""(places of the training examples, sorted; seed) -> a model, or whatever the outputs are of."""

Outputs: TypeAlias = Callable[[Any], Any]
"""model -> [queries] numbers."""


def subsets(examples: int, count: int, share: float = 0.5, seed: int = 0) -> NDArray[np.int64]:
    """Random subsets of the examples, each drawn without replacement.

    Subset j is the first part of a shuffle of its own (`docs/randomness.md`): a larger `count`
    begins with the same subsets.

    Args:
        examples: How many there are.
        count: How many subsets.
        share: The share of the examples in a subset, between 0 and 1; their number is rounded.
        seed: 0 to 2**64 - 1.

    Returns:
        [count, size] int64 places, sorted. O(count · examples).

    Raises:
        DtypeError: If an argument is of another type.
        ArgumentError: If one is out of range, or a subset would be empty or hold all examples.
    """
    examples = _arrays.integer("examples", examples, 2)
    count = _arrays.integer("count", count, 1)
    seed = _arrays.integer("seed", seed, 0, MAX_SEED)
    size = round(examples * fraction("share", share))
    if not 0 < size < examples:
        raise ArgumentError(
            f"share must leave from 1 to {examples - 1} of {examples} examples, got {size}"
        )
    places = np.arange(examples)
    drawn = [_core.shuffled(places, seed, f"evaluate.subset.{j}")[:size] for j in range(count)]
    return interruptible(np.stack, [np.sort(each) for each in drawn])


def leave_one_out_subsets(examples: int, left_out: Any = None) -> NDArray[np.bool_]:
    """All examples but one, for each of those left out, as `retrain` takes them.

    With outputs [left out, seeds, queries] of these subsets and [1, seeds, queries] of all
    examples, both losses, `outputs.mean(1) - whole.mean(1)` are the changes that `leave_one_out`
    takes, beside `scores[left_out]`.

    Args:
        examples: How many there are.
        left_out: [left out] distinct places; None for each of them.

    Returns:
        [left out, examples] bool. O(left out · examples).

    Raises:
        DtypeError: If an argument is of another type.
        ShapeError: If no example is left out.
        ArgumentError: If a place is not that of an example, or given twice.
    """
    examples = _arrays.integer("examples", examples, 2)
    places = np.arange(examples)
    if left_out is not None:
        places = _arrays.array("left_out", left_out)
        if places.dtype.kind not in "iu":
            raise DtypeError(f"left_out must be integers, got {_arrays.describe(places)}")
        subsets_of("left_out", places[None], examples)
    masks = np.ones((len(places), examples), np.bool_)
    masks[np.arange(len(places)), places] = False
    return masks


def retrain(
    train: Train,
    masks: Any,
    seeds: int | Sequence[int],
    outputs: Outputs,
    path: Any = None,
    *,
    progress: bool | None = None,
) -> NDArray[np.float64]:
    """Trains a model on each subset with each seed, and returns what the models give.

    All subsets are trained with the first seed, then all with the second: an LDS can be had early.

    Args:
        train: (places, seed) -> model; `places` are those of the training examples, [size] int64,
            sorted. All that is random in it must hang on the seed.
        masks: As in `lds`.
        seeds: The seeds, distinct and not negative; or how many, from 0 on.
        outputs: (model) -> [queries] numbers, such as the loss of each query.
        path: A folder in which each result is kept as soon as it is there, so that what was
            interrupted goes on where it stopped, or with more subsets or seeds; a result that was
            not written whole is made again. Several processes may fill one folder, each with
            seeds of its own. The folder knows the subsets, and cannot know whether `train` or the
            data have changed. None keeps nothing.
        progress: Whether to show a bar; None means if standard error is a terminal.

    Returns:
        [subsets, seeds, queries] float64. O(subsets · seeds) trainings.

    Raises:
        DtypeError: If an argument is of another type, or outputs are not numbers.
        ShapeError: If a subset is empty, or models give different numbers of outputs.
        ArgumentError: If places or seeds are out of range or given twice.
        NotFiniteError: If an output is NaN or infinite; says of which subset and seed.
        MismatchError: If the folder holds results of other subsets, or of other queries.
        StoreError: If it is a file, is damaged, or cannot be written.
    """
    function("train", train, "of places and a seed")
    function("outputs", outputs, "of a model")
    drawn = seeds_of(seeds)
    chosen = subsets_of("masks", masks)
    results = Results(path, len(chosen), chosen.__getitem__)
    tasks = [(number, seed) for seed in drawn for number in range(len(chosen))]
    for number, seed in watched(tasks, "retraining", progress, "model"):
        results.get(number, seed, train, outputs)
    return np.stack(
        [[results.held[number, seed] for seed in drawn] for number in range(len(chosen))]
    )


class Results:
    """What models gave, each kept in a file of its own.

    Args:
        path: The folder, or None.
        count: How many subsets there are.
        subset: Number -> the sorted places of the examples of a subset.

    Raises:
        MismatchError: If the folder holds results of other subsets.
        StoreError: If it is a file, or damaged.
    """

    def __init__(self, path: Any, count: int, subset: Callable[[int], NDArray[np.int64]]) -> None:
        self.held: dict[tuple[int, int], NDArray[np.float64]] = {}
        self._count = count
        self._subset = subset
        self._queries: int | None = None
        self._path: Path | None = None if path is None else _arrays.path("path", path)
        if self._path is None:
            return
        with store_errors(self._path):
            if self._path.exists() and not self._path.is_dir():
                raise StoreError(f"path must be a folder, got the file {self._path}")
            self._path.mkdir(parents=True, exist_ok=True)
            for file in sorted(self._path.glob("subset-*.json")):
                self._load(file)

    def get(self, number: int, seed: int, train: Train, outputs: Outputs) -> NDArray[np.float64]:
        """[queries] what the model of this subset and seed gives; trains it if that is not kept.

        Raises:
            WhenceError: As `retrain`.
        """
        if (number, seed) in self.held:
            return self.held[number, seed]
        subset = self._subset(number)
        digest = _digest(subset)
        name = f"outputs of subset {number}, seed {seed}"
        found = numbers(name, outputs(train(subset.copy(), seed)), "queries").astype(np.float64)
        if self._queries not in (None, len(found)):
            error = ShapeError if self._path is None else MismatchError
            raise error(
                f"{name} must be of {self._queries} queries like the others, got {len(found)}"
            )
        self._queries = len(found)
        if self._path is not None:
            body = {
                "version": VERSION,
                "subset": number,
                "digest": digest,
                "seed": seed,
                "outputs": found.tolist(),  # JSON keeps all digits of a float64
            }
            write_json(self._path / f"subset-{number:06d}-seed-{seed}.json", body)
        self.held[number, seed] = found
        return found

    def _load(self, file: Path) -> None:
        body = read_json(file)
        try:
            if body["version"] != VERSION:
                raise MismatchError(f"{file} must be of version {VERSION}, got {body['version']}")
            number, seed, digest = body["subset"], body["seed"], body["digest"]
            outputs = numbers("outputs", body["outputs"], "queries").astype(np.float64)
            if any(type(each) is not int or each < 0 for each in (number, seed)):
                raise ValueError(f"subset and seed must be numbers, got {number!r}, {seed!r:.80}")
        except WRONG as error:
            raise StoreError(f"{file} is damaged: {type(error).__name__}: {error}") from None
        if number >= self._count:  # of an earlier call with more subsets
            return
        if digest != _digest(self._subset(number)):
            raise MismatchError(
                f"path must hold results of these subsets, got {file}, which is of another "
                f"subset {number}"
            )
        if self._queries not in (None, len(outputs)):
            raise MismatchError(
                f"path must hold results of the same queries, got {self._queries} and, in {file}, "
                f"{len(outputs)}"
            )
        self._queries = len(outputs)
        self.held[number, seed] = outputs


def seeds_of(value: int | Sequence[int]) -> list[int]:
    """The seeds, or so many from 0 on.

    Raises:
        DtypeError: If they are not integers.
        ArgumentError: If one is negative or given twice, or there is none.
    """
    if not _arrays.is_list(value):
        return list(range(_arrays.integer("seeds", value, 1)))
    found = [_arrays.integer("seeds", seed, 0) for seed in value]  # type: ignore[union-attr]
    if not found or len(set(found)) < len(found):
        raise ArgumentError(f"seeds must be distinct, at least one, got {found}")
    return found


def _digest(subset: NDArray[np.int64]) -> str:
    return hashlib.blake2b(subset.astype("<i8").tobytes(), digest_size=16).hexdigest()
