"""Models, data and retrained ground truth by which scores are judged."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

import whence
from whence.methods import Run

DATA = Path(os.environ.get("WHENCE_DATA", "../shared/data"))
BATCH = 100


@dataclass
class Case:
    """One training run, its data, and what retraining on halves of it did to the test losses.

    Attributes:
        model: The network.
        states: Checkpoint -> weights, the last one last.
        train: Inputs and targets of the training examples.
        test: The same of the queries.
        loss: (inputs, targets) -> mean loss of a batch.
        masks: [subsets, examples] int training examples of each half.
        losses: [subsets, seeds, queries] test losses of the models trained on them.
    """

    model: nn.Module
    states: dict[str, dict[str, Tensor]]
    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    loss: Callable[[Tensor, Tensor], Tensor]
    masks: NDArray[np.int32]
    losses: NDArray[np.float32]

    @property
    def loader(self) -> list[tuple[Tensor, Tensor]]:
        """The training data in batches."""
        return list(zip(self.train[0].split(BATCH), self.train[1].split(BATCH), strict=True))

    def run(self, *, last: bool = False) -> Run:
        """All checkpoints, or the last one alone."""
        return Run(self.model, self.loader, self.loss, states=self.last if last else self.states)

    @property
    def last(self) -> dict[str, dict[str, Tensor]]:
        """The last checkpoint."""
        return dict(list(self.states.items())[-1:])

    def queries(self) -> Tensor:
        """The queries' loss."""
        return self.loss(*self.test)

    def lds(self, scores: NDArray[Any]) -> float:
        """The linear datamodeling score of [queries, examples] scores."""
        return whence.evaluate.lds(scores.T, self.masks, self.losses).mean


def images(raw: NDArray[np.uint8]) -> Tensor:
    """[images, 196] of [images, 28, 28]: halved, and scaled as the models were trained."""
    pooled = raw.reshape(-1, 14, 2, 14, 2).astype(np.float32).mean((2, 4)).reshape(len(raw), 196)
    return torch.from_numpy((pooled / 255 - 0.2860) / 0.3530)


def perceptron(*widths: int) -> nn.Sequential:
    """Linear layers of these widths with ReLU between."""
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(widths):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def small() -> nn.Sequential:
    """The network of the public sets."""
    return perceptron(196, 128, 64, 10)


def _cross_entropy(model: nn.Module) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda x, y: F.cross_entropy(model(x), y)


def _states(file: Any, model: nn.Module, epochs: tuple[int, ...], seed: int) -> dict[str, Any]:
    names = [name for name, _ in model.named_parameters()]
    return {
        str(epoch): {
            name: torch.from_numpy(file[f"e{epoch}_p{index}"][seed].copy())
            for index, name in enumerate(names)
        }
        for epoch in epochs
    }


def mlp(seeds: int = 10) -> Iterator[Case]:
    """3,000 images of Fashion-MNIST, 25 epochs; test columns 0 to 249."""
    data = np.load(DATA / "fashion_mnist_10k_2k.npz")
    truth = np.load(DATA / "lds" / "mlp_gt_public.npz")
    models = np.load(DATA / "lds" / "mlp_full_models.npz")
    train = images(data["x_train"][:3000]), torch.from_numpy(data["y_train"][:3000]).long()
    test = images(data["x_test"][:250]), torch.from_numpy(data["y_test"][:250]).long()
    for seed in range(seeds):
        model = small()
        states = _states(models, model, (2, 5, 10, 18, 25), seed)
        model.load_state_dict(states["25"])
        loss = _cross_entropy(model)
        yield Case(model, states, train, test, loss, truth["masks"], truth["loss"][:, :, :250])


def mlp10k(seeds: int = 5) -> Iterator[Case]:
    """10,000 images of Fashion-MNIST, 25 epochs; all test columns."""
    data = np.load(DATA / "fashion_mnist_full.npz")
    truth = np.load(DATA / "lds" / "mlp10k_gt_public.npz")
    models = np.load(DATA / "lds" / "mlp10k_full_models.npz")
    chosen = slice(20000, 30000)
    train = images(data["x_train"][chosen]), torch.from_numpy(data["y_train"][chosen]).long()
    test = images(data["x_test"][:500]), torch.from_numpy(data["y_test"][:500]).long()
    for seed in range(seeds):
        model = small()
        states = _states(models, model, (4, 8, 16, 25), seed)
        model.load_state_dict(states["25"])
        yield Case(model, states, train, test, _cross_entropy(model), truth["masks"], truth["loss"])


class Speller(nn.Module):
    """A character transformer of one block, with separate projections."""

    def __init__(self) -> None:
        super().__init__()
        self.emb, self.pos = nn.Embedding(27, 32), nn.Embedding(9, 32)
        self.ln1, self.ln2, self.lnf = nn.LayerNorm(32), nn.LayerNorm(32), nn.LayerNorm(32)
        self.q, self.k, self.v, self.o = (nn.Linear(32, 32) for _ in range(4))
        self.f1, self.f2 = nn.Linear(32, 128), nn.Linear(128, 32)
        self.head = nn.Linear(32, 27)

    def forward(self, tokens: Tensor) -> Tensor:
        """[batch, classes, length] scores."""
        hidden = self.emb(tokens) + self.pos(torch.arange(tokens.shape[1]))
        normal = self.ln1(hidden)
        query, key, value = (
            each(normal).unflatten(2, (2, 16)).transpose(1, 2) for each in (self.q, self.k, self.v)
        )
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        hidden = hidden + self.o(mixed.transpose(1, 2).flatten(2))
        hidden = hidden + self.f2(F.relu(self.f1(self.ln2(hidden))))
        return self.head(self.lnf(hidden)).mT


def spelled() -> tuple[Tensor, Tensor]:
    """[1200, 9] inputs and targets of the names that the public set has."""
    names = [
        name
        for line in (DATA / "names.txt").read_text().splitlines()
        if 3 <= len(name := line.strip()) <= 8
    ]
    chosen = np.random.default_rng(0).permutation(len(names))[:1200]
    inputs, targets = torch.zeros(1200, 9).long(), torch.full((1200, 9), -1)
    for row, place in enumerate(chosen):
        letters = torch.tensor([ord(letter) - 96 for letter in names[place]])
        length = len(letters)
        inputs[row, 1 : length + 1] = letters
        targets[row, :length] = letters
        targets[row, length] = 0
    return inputs, targets


def names(seeds: int = 6) -> Iterator[Case]:
    """1,000 names, 15 epochs; the unit is a name, whose loss is summed over its letters."""
    truth = np.load(DATA / "lds" / "names_gt_public.npz")
    models = np.load(DATA / "lds" / "names_full_models.npz")
    inputs, targets = spelled()
    for seed in range(seeds):
        model = Speller()
        states = {
            str(epoch): {
                name: torch.from_numpy(models[f"e{epoch}|{name}"][seed].copy())
                for name in model.state_dict()
            }
            for epoch in (2, 5, 9, 15)
        }
        model.load_state_dict(states["15"])

        def loss(x: Tensor, y: Tensor, model: nn.Module = model) -> Tensor:
            total = F.cross_entropy(model(x), y, ignore_index=-1, reduction="sum")
            return total / len(x)

        yield Case(
            model,
            states,
            (inputs[:1000], targets[:1000]),
            (inputs[1000:], targets[1000:]),
            loss,
            truth["masks"],
            truth["loss"],
        )


def trained(
    make: Callable[[], nn.Module],
    train: tuple[Tensor, Tensor],
    chosen: NDArray[np.int64],
    seed: int,
    epochs: int = 25,
    kept: tuple[int, ...] = (),
) -> tuple[nn.Module, dict[str, dict[str, Tensor]]]:
    """A network trained as those of the public sets were, and its weights at some epochs."""
    torch.manual_seed(seed)
    model = make()
    for layer in model:  # type: ignore[attr-defined]
        if isinstance(layer, nn.Linear):
            bound = layer.in_features**-0.5
            nn.init.uniform_(layer.weight, -bound, bound)
            nn.init.uniform_(layer.bias, -bound, bound)
    x, y = train[0][chosen], train[1][chosen]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.03, momentum=0.9, weight_decay=5e-4)
    per_epoch = len(x) // 64
    total, step, states = epochs * per_epoch, 0, {}
    for epoch in range(1, epochs + 1):
        order = torch.randperm(len(x))
        for batch in order[: per_epoch * 64].split(64):
            step += 1
            for group in optimizer.param_groups:
                group["lr"] = 0.03 * min(1.0, 2 * (1 - step / (total + 1)))
            optimizer.zero_grad()
            F.cross_entropy(model(x[batch]), y[batch]).backward()
            optimizer.step()
        if epoch in kept:
            states[str(epoch)] = {
                name: value.detach().clone() for name, value in model.state_dict().items()
            }
    return model, states


def retrained(
    make: Callable[[], nn.Module], examples: int, subsets: int, seeds: int, folder: Path
) -> Case:
    """A case of our own: images that are in no public set's training data."""
    data = np.load(DATA / "fashion_mnist_full.npz")
    chosen = slice(40000, 40000 + examples)
    train = images(data["x_train"][chosen]), torch.from_numpy(data["y_train"][chosen]).long()
    test = images(data["x_test"][1000:1250]), torch.from_numpy(data["y_test"][1000:1250]).long()
    masks = whence.evaluate.subsets(examples, subsets, seed=1)

    def losses(model: nn.Module) -> NDArray[Any]:
        with torch.no_grad():
            return F.cross_entropy(model(test[0]), test[1], reduction="none").numpy()

    found = whence.evaluate.retrain(
        lambda mine, seed: trained(make, train, np.asarray(mine), seed)[0],
        masks,
        seeds,
        losses,
        folder / "retrained",
        progress=False,
    )
    epochs = (2, 5, 10, 18, 25)
    model, states = trained(make, train, np.arange(examples), 1000, kept=epochs)
    return Case(model, states, train, test, _cross_entropy(model), masks, found)
