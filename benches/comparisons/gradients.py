"""Rows to search: sketched gradients of networks trained on images and on text."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

import whence
from whence.attribution.queries import query_rows

DIM = 512
QUERIES = 1024
WIDTH = 32
"""Characters of a window."""

WINDOWS = 1_000_000
DAMPING = 0.1
"""Share of the mean eigenvalue that is added to the Gram matrix."""


@dataclass(frozen=True)
class Rows:
    """Rows of training images in a file, and of test images.

    Attributes:
        path: `.npy` of [examples, DIM] float32.
        queries: [queries, DIM] float32.
    """

    path: Path
    queries: NDArray[np.float32]

    @property
    def rows(self) -> NDArray[np.float32]:
        """[examples, DIM] in memory."""
        found: NDArray[np.float32] = np.load(self.path)
        return found


def fashion(data: Path, folder: Path, queries: int = QUERIES) -> dict[str, Rows]:
    """Loss gradients and margin gradients of unit norm, each plain and preconditioned.

    A perceptron 784-128-10, Adam 1e-3, batch 128, 10 epochs, seed 0; `chunked_sjlt`, seed 0. And
    the rows of preconditioned recording, whitened coordinates in the learnt basis.

    Args:
        data: fashion_mnist_full.npz: x_train, y_train, x_test, y_test.
        folder: Where to put the rows.
        queries: How many test images to ask about.
    """
    torch.manual_seed(0)
    with np.load(data) as images:
        x, y = _images(images["x_train"]), torch.from_numpy(images["y_train"].astype(np.int64))
        asked = _images(images["x_test"][:queries])
        answers = torch.from_numpy(images["y_test"][:queries].astype(np.int64))
    model = nn.Sequential(nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 10))
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    for _ in range(10):
        for batch in torch.randperm(len(x)).split(128):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[batch]), y[batch]).backward()
            optimizer.step()
    found = {}
    for name, loss in (("raw", _loss), ("margin", _margin)):
        path = folder / f"{name}-store"
        with whence.record(model, path, dim=DIM, dtype="float32", reduction="sum") as recorder:
            for batch in torch.arange(len(x)).split(256):
                with recorder.batch(batch):
                    loss(model(x[batch]), y[batch]).backward()
        model.zero_grad()
        store = whence.open(path)
        rows = store.rows()
        ask = query_rows(model, store, lambda loss=loss: loss(model(asked), answers))[0]
        if name == "margin":
            rows, ask = _units(rows), _units(ask)
        whitening = _whitening(rows)
        white, white_ask = rows @ whitening, ask @ whitening
        if name == "margin":
            white, white_ask = _units(white), _units(white_ask)
        for label, matrix, questions in (
            (name, rows, ask),
            (f"{name}, preconditioned", white, white_ask),
        ):
            file = folder / f"{label.replace(', ', '-')}.npy"
            np.save(file, matrix)
            found[label] = Rows(file, np.ascontiguousarray(questions))
    path = folder / "learnt-store"
    loader = list(zip(x.split(500), y.split(500), strict=True))
    factors = whence.fit_factors(
        model, loader, lambda x, y: _loss(model(x), y), reduction="sum", progress=False
    )
    whence.record_checkpoints(
        model,
        path,
        loader,
        lambda x, y: _loss(model(x), y),
        precondition=factors,
        dim=DIM,
        dtype="float32",
        progress=False,
    )
    store = whence.open(path)
    ask = query_rows(model, store, lambda: _loss(model(asked), answers))[0]
    file = folder / "learnt.npy"
    np.save(file, store.rows())
    found["learnt basis"] = Rows(file, np.ascontiguousarray(ask))
    return found


def shakespeare(
    data: Path, folder: Path, count: int = WINDOWS, queries: int = 100
) -> dict[str, Rows]:
    """Loss gradients of a model that guesses the character after each window of 32.

    An embedding of 16, 512-64-65 with ReLU, 38,129 parameters; Adam 2e-3, batch 512, 3,000 steps,
    seed 0; `chunked_sjlt`, seed 0. Windows in random order, the queries others than the rows.

    Args:
        data: tinyshakespeare.txt.
        folder: Where to put the rows.
        count: How many rows.
        queries: How many windows to ask about.
    """
    torch.manual_seed(0)
    text = data.read_bytes()
    alphabet = {byte: number for number, byte in enumerate(sorted(set(text)))}
    coded = torch.tensor([alphabet[byte] for byte in text])
    windows = coded.unfold(0, WIDTH + 1, 1)
    windows = windows[torch.randperm(len(windows))]
    recorded, asked = windows[:count], windows[count : count + queries]
    size = 16
    model = nn.Sequential(
        nn.Embedding(len(alphabet), size),
        nn.Flatten(),
        nn.Linear(WIDTH * size, 64),
        nn.ReLU(),
        nn.Linear(64, len(alphabet)),
    )
    optimizer = torch.optim.Adam(model.parameters(), 2e-3)
    for _ in range(3000):
        batch = recorded[torch.randint(len(recorded), (512,))]
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(batch[:, :-1]), batch[:, -1]).backward()
        optimizer.step()
    path = folder / "shakespeare-store"
    with whence.record(model, path, dim=DIM, dtype="float32", reduction="sum") as recorder:
        for batch in torch.arange(count).split(512):
            with recorder.batch(batch):
                _loss(model(recorded[batch, :-1]), recorded[batch, -1]).backward()
    model.zero_grad()
    store = whence.open(path)
    ask = query_rows(model, store, lambda: _loss(model(asked[:, :-1]), asked[:, -1]))[0]
    rows = store.rows()
    shutil.rmtree(path)
    whitening = _whitening(rows)
    found = {}
    for name in ("raw", "raw, preconditioned"):
        if name != "raw":
            for part in np.array_split(rows, max(1, count // 50_000)):
                part[:] = part @ whitening
            ask = ask @ whitening
        file = folder / f"shakespeare-{name.replace(', ', '-')}.npy"
        np.save(file, rows)
        found[name] = Rows(file, np.ascontiguousarray(ask))
    return found


def _images(pixels: NDArray[np.uint8]) -> Tensor:
    return torch.from_numpy(pixels.reshape(len(pixels), -1).astype(np.float32) / 255)


def _loss(logits: Tensor, labels: Tensor) -> Tensor:
    return nn.functional.cross_entropy(logits, labels, reduction="sum")


def _margin(logits: Tensor, labels: Tensor) -> Tensor:
    """The sum of log(p / (1 - p)), p the probability of the label."""
    mine = torch.arange(logits.shape[1]) == labels[:, None]
    others = logits.masked_fill(mine, -torch.inf).logsumexp(1)
    return (logits[mine] - others).sum()


def _units(rows: NDArray[np.float32]) -> NDArray[np.float32]:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True).clip(min=1e-30)


def _whitening(rows: NDArray[np.float32]) -> NDArray[np.float32]:
    """(Gram matrix + damping)^(-1/2)."""
    gram = np.zeros((rows.shape[1], rows.shape[1]))
    for part in np.array_split(rows, max(1, len(rows) // 50_000)):
        wide = part.astype(np.float64)
        gram += wide.T @ wide
    values, vectors = np.linalg.eigh(gram / len(rows))
    found: NDArray[np.float32] = (
        (vectors * (values + DAMPING * values.mean()) ** -0.5) @ vectors.T
    ).astype(np.float32)
    return found
