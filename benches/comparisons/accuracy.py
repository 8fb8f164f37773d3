"""How exact the inner products of sketches are, on real gradients and on hard inputs.

The yardstick is the standard deviation of a dense Gaussian map, sqrt((1 + cosine²) / dim). The
errors of all pairs are taken together over many seeds, for one seed is one draw of the map.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.functional import cross_entropy

import whence
from comparisons.shared import Row, peer
from whence.sketch import Accumulator

SEEDS = (1000, 16_000)
"""Fewest and most seeds of an input."""

STANDARD_ERROR = 0.015
"""Seeds are added until the RMS error, over the yardstick, is known to this."""

TRAIN, QUERIES = 24, 8
DIMS = (512, 4096)
PARAMETERS = 1 << 16

Vectors = dict[str, NDArray[np.float32]]
"""Parameter -> [TRAIN + QUERIES, *shape]."""


def accuracy(folder: Path) -> Iterator[Row]:
    """RMS error over the yardstick, and its 99th percentile over seeds beside dense Gaussian's."""
    for name, vectors in inputs(folder).items():
        exact = _flat(vectors).astype(np.float64)
        gram = exact @ exact.T
        for dim in DIMS:
            ours, dense = _errors(vectors, gram, dim), _dense_errors(gram, dim)
            control = _rms(dense)
            if not 0.95 <= control <= 1.05:
                sys.exit(f"{name}: a dense Gaussian map must be as exact as theory, got {control}")
            row = f"inner products of {name}, dim {dim}: RMS error"
            spread = (
                f"standard error {_standard_error(ours):.2g}, dense Gaussian {control:.3f}; "
                f"{len(ours):,} seeds, {TRAIN} × {QUERIES} pairs, cosines {_cosines(gram)}"
            )
            yield Row(f"{row} ÷ theory", _rms(ours), 1.0, "× theory", 1.1, spread=spread)
            yield Row(
                f"{row}, 99th percentile of seeds ÷ dense Gaussian's",
                float(np.percentile(np.sqrt(ours), 99)),
                float(np.percentile(np.sqrt(dense), 99)),
                "× theory",
            )


def _rms(squares: NDArray[np.float64]) -> float:
    return float(np.sqrt(squares.mean()))


def _flat(vectors: Vectors) -> NDArray[np.float32]:
    return np.concatenate([each.reshape(len(each), -1) for each in vectors.values()], axis=1)


def _cosines(gram: NDArray[np.float64]) -> str:
    norms = np.sqrt(np.diag(gram))
    cosines = (gram / np.outer(norms, norms))[:TRAIN, TRAIN:]
    return f"{cosines.min():.2f} to {cosines.max():.2f}"


def _standard_error(squares: NDArray[np.float64]) -> float:
    """Of the RMS: errors of pairs under one seed depend on each other, those of seeds do not."""
    return float(squares.std() / len(squares) ** 0.5 / (2 * _rms(squares)))


def _errors(vectors: Vectors, gram: NDArray[np.float64], dim: int) -> NDArray[np.float64]:
    """[seeds] mean squared error of the pairs, over the yardstick's."""
    whole = whence.Sketch(dim=dim, threads=1)
    if not np.allclose(_rows(whole, vectors), whole(vectors), rtol=1e-4, atol=1e-4):
        sys.exit("zeros that are left out must not change a sketch, got other rows")
    fewest, most = SEEDS
    squares: list[float] = []
    while len(squares) < most:
        for seed in range(len(squares), len(squares) + fewest):
            rows = _rows(whence.Sketch(dim=dim, seed=seed, threads=1), vectors)
            squares.append(_squares(rows @ rows.T, gram, dim))
        if _standard_error(np.array(squares)) <= STANDARD_ERROR:
            break
    return np.array(squares)


def _rows(sketch: whence.Sketch, vectors: Vectors) -> NDArray[np.float64]:
    """[vectors, dim]: without the zeros before and after all that is not, which change nothing.

    That makes the input whose errors vary most from seed to seed, a few neighbours, the cheapest.
    """
    totals = Accumulator(sketch, TRAIN + QUERIES)
    for name in sorted(vectors):
        flat = vectors[name].reshape(TRAIN + QUERIES, -1)
        used = np.flatnonzero(flat.any(axis=0))
        first, last = int(used[0]), int(used[-1])
        totals.add(name, vectors[name].shape[1:], flat[:, first : last + 1], first)
    return totals.rows().astype(np.float64)


def _dense_errors(gram: NDArray[np.float64], dim: int) -> NDArray[np.float64]:
    """The same of a dense Gaussian map, drawn without the map.

    With gram = L Lᵀ, the rows of vectors X under a Gaussian map have the distribution of L Z,
    where Z is [vectors, dim] standard normal / sqrt(dim).
    """
    values, directions = np.linalg.eigh(gram)
    root = directions * np.sqrt(np.maximum(values, 0))
    random = np.random.default_rng(0)
    squares = []
    for _ in range(SEEDS[0]):
        rows = root @ random.standard_normal((len(gram), dim)) / np.sqrt(dim)
        squares.append(_squares(rows @ rows.T, gram, dim))
    return np.array(squares)


def _squares(found: NDArray[np.float64], gram: NDArray[np.float64], dim: int) -> float:
    """Mean squared error of the pairs, over the yardstick's."""
    norms = np.sqrt(np.diag(gram))
    scale = np.outer(norms, norms)
    variance = (1 + (gram / scale) ** 2) / dim
    squares = ((found - gram) / scale) ** 2 / variance
    return float(squares[:TRAIN, TRAIN:].mean())


def inputs(folder: Path) -> dict[str, Vectors]:
    """Name -> vectors: TRAIN, then QUERIES."""
    found = {}
    if (gradients := _digits(folder)) is not None:
        found["the gradients of a network trained on digits"] = gradients
    random = np.random.default_rng(0)
    count = TRAIN + QUERIES

    def some(where: slice | NDArray[np.int64]) -> Vectors:
        vectors = np.zeros((count, PARAMETERS), np.float32)
        width = vectors[:, where].shape[1]
        vectors[:, where] = random.standard_normal((count, width), np.float32)
        return {"weight": vectors}

    for step in (16, 64, 512):
        found[f"vectors in every {step}th coordinate"] = some(slice(None, None, step))
    side = int(PARAMETERS**0.5)
    left, right = random.standard_normal((2, count, side), np.float32)
    found["matrices of rank 1"] = {"weight": left[:, :, None] * right[:, None, :]}
    found["vectors in 64 random coordinates"] = some(random.choice(PARAMETERS, 64, replace=False))
    found["vectors in 64 contiguous coordinates"] = some(slice(1000, 1064))
    return found


def _digits(folder: Path) -> Vectors | None:
    """Per-sample gradients of the demo's network after its training."""
    if (demo := peer("whence.demo")) is None:
        return None
    digits = demo.flipped_digits(0)
    model = demo.train_and_record(digits, folder / "digits", 0).model
    places = np.concatenate([digits.train[:TRAIN], digits.test[:QUERIES]])
    images, labels = digits.pixels(places), torch.from_numpy(digits.truth[places])
    each = []
    for image, label in zip(images, labels, strict=True):
        loss = cross_entropy(model(image[None]), label[None])
        each.append(torch.autograd.grad(loss, list(model.parameters())))
    names = [name for name, _ in model.named_parameters()]
    stacked = (torch.stack(parts) for parts in zip(*each, strict=True))
    return {name: values.numpy() for name, values in zip(names, stacked, strict=True)}
