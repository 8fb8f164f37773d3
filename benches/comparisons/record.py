"""What it costs to collect gradients."""

from __future__ import annotations

import copy
import fnmatch
import importlib
import itertools
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import whence
from comparisons.shared import Row, bench, compared, compared_rates, peer, take_turns

VOCABULARY, LENGTH, DIM = 65, 128, 4096


class Block(nn.Module):
    """A pre-norm transformer block: causal attention, and a hidden layer of four widths."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.heads = width // 64
        self.norms = nn.ModuleList([nn.LayerNorm(width), nn.LayerNorm(width)])
        self.project = nn.Linear(width, 3 * width)
        self.output = nn.Linear(width, width)
        self.widen = nn.Linear(width, 4 * width)
        self.narrow = nn.Linear(4 * width, width)

    def forward(self, values: Tensor) -> Tensor:
        """[batch, length, width]."""
        parts = self.project(self.norms[0](values)).unflatten(-1, (3, self.heads, -1))
        query, key, value = parts.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        values = values + self.output(mixed.transpose(1, 2).flatten(2))
        return values + self.narrow(F.gelu(self.widen(self.norms[1](values))))


class Transformer(nn.Module):
    """A character transformer with learned positions and a head of its own (untied)."""

    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, width)
        self.position = nn.Embedding(LENGTH, width)
        self.blocks = nn.Sequential(*(Block(width) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, VOCABULARY)

    def forward(self, tokens: Tensor) -> Tensor:
        """[batch, classes, length] scores, as cross_entropy takes them."""
        values = self.embedding(tokens) + self.position(torch.arange(tokens.shape[1]))
        return self.head(self.norm(self.blocks(values))).mT


@bench
def record(folder: Path) -> Iterator[Row]:
    """Collecting rows, and training while recording, beside the plain loop."""
    for width, layers in ((128, 4), (768, 2)):
        torch.manual_seed(0)
        tokens = torch.randint(VOCABULARY, (16, LENGTH + 1))
        yield from _recorded(
            folder / f"transformer-{width}",
            f"transformer {width} × {layers}, batch 16, T {LENGTH}",
            Transformer(width, layers),
            tokens[:, :-1],
            tokens[:, 1:],
            goals=(1.05, 1.3),
        )
    torch.manual_seed(0)
    images, labels = torch.randn(64, 784), torch.randint(10, (64,))
    for number, (what, settings, goal) in enumerate(
        (
            (", factored", {"layout": "factored"}, 1.15),
            (f", dim {DIM}", {"dim": DIM}, None),
            (f", dim {DIM}, tensorsketch", {"dim": DIM, "sketch": "tensorsketch"}, None),
        )
    ):
        yield from _recorded(
            folder / f"perceptron-{number}",
            f"{PERCEPTRON}, batch 64{what}",
            perceptron(),
            images,
            labels,
            goals=(goal, None),
            **settings,
        )
    yield from beside_libraries(folder)


PERCEPTRON = "MLP 784-512-256-10"


def perceptron() -> nn.Sequential:
    """A model of linear layers alone, which every library takes."""
    return nn.Sequential(
        nn.Linear(784, 512), nn.ReLU(), nn.Linear(512, 256), nn.ReLU(), nn.Linear(256, 10)
    )


def _recorded(
    folder: Path,
    name: str,
    model: nn.Module,
    values: Tensor,
    targets: Tensor,
    goals: tuple[float | None, float | None],
    **settings: Any,
) -> Iterator[Row]:
    """The rows of one model; the peer is a copy of it, which bears no hooks."""
    plain = copy.deepcopy(model)
    batch = len(values)
    firsts = itertools.count(0, batch)  # every batch has new ids, so that all rows are appended

    def plain_pass() -> None:
        plain.zero_grad()
        F.cross_entropy(plain(values), targets).backward()

    def recorded_pass(recorder: whence.Recorder) -> whence.Batch:
        first = next(firsts)
        with recorder.batch(np.arange(first, first + batch)) as recorded:
            F.cross_entropy(model(values), targets).backward()
        return recorded

    settings = {"dim": DIM, **settings, "threads": 1}
    if "layout" in settings:
        del settings["dim"]
    with whence.record(model, folder / "collect", weight_gradients=False, **settings) as recorder:
        # The first batch, which is this one, also compares its sum with autograd's: not timed.
        _check_rows(recorder, recorded_pass(recorder), plain, values, targets)
        plain_pass()
        times = take_turns({"ours": lambda: recorded_pass(recorder), "peer": plain_pass})
    what = "collecting ÷ forward and backward"
    yield compared(f"{name}: {what}", times["ours"], times["peer"], goals[0])

    optimizers = {each: torch.optim.Adam(each.parameters(), lr=1e-4) for each in (model, plain)}

    def plain_step() -> None:
        plain_pass()
        optimizers[plain].step()

    def recorded_step(recorder: whence.Recorder) -> None:
        model.zero_grad()
        recorded_pass(recorder)
        optimizers[model].step()

    with whence.record(model, folder / "train", **settings) as recorder:
        recorded_step(recorder)
        plain_step()
        times = take_turns({"ours": lambda: recorded_step(recorder), "peer": plain_step})
    what = "training step recorded ÷ not"
    yield compared(f"{name}: {what}", times["ours"], times["peer"], goals[1])


def _check_rows(
    recorder: whence.Recorder,
    batch: whence.Batch,
    model: nn.Module,
    values: Tensor,
    targets: Tensor,
    examples: int = 2,
) -> None:
    """Nothing, if the first rows are the sketches of the examples' own gradients by autograd.

    Factored rows are compared by their scores for each other.
    """
    recorder.commit()
    store = whence.open(recorder.path)
    if store.manifest.is_factored:
        _check_scores(store, model, values, targets, examples)
        return
    rows = batch.rows
    sketch = whence.Sketch(store.manifest.sketch["kind"], dim=DIM, threads=1)
    for example in range(examples):
        one = slice(example, example + 1)
        loss = F.cross_entropy(model(values[one]), targets[one])
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        names = [name for name, _ in model.named_parameters()]
        exact = sketch({name: g[None] for name, g in zip(names, gradients, strict=True)})[0]
        difference = np.linalg.norm(rows[example] - exact) / np.linalg.norm(exact)
        if not difference <= 1e-5:
            sys.exit(f"a row must be the sketch of the gradient to 1e-5, got {difference:.2g}")


def _check_scores(
    store: whence.Store, model: nn.Module, values: Tensor, targets: Tensor, examples: int
) -> None:
    """Nothing, if scores are the inner products of exact gradients, but for 16 bits."""
    queries = slice(0, examples)
    hits = whence.query(
        model, store, lambda: F.cross_entropy(model(values[queries]), targets[queries]), len(values)
    )
    exact = []
    for value, target in zip(values, targets, strict=True):
        gradients = torch.autograd.grad(F.cross_entropy(model(value), target), model.parameters())
        exact.append(torch.cat([gradient.flatten() for gradient in gradients]))
    wanted = (torch.stack(exact[:examples]) @ torch.stack(exact).T).numpy()
    found = np.empty_like(wanted)
    np.put_along_axis(found, hits.helpful.positions, hits.helpful.scores, 1)
    difference = np.abs(found - wanted).max() / np.abs(wanted).max()
    if not difference <= 2e-3:
        sys.exit(f"a score must be the gradients' inner product to 2e-3, got {difference:.2g}")


# ---- beside other libraries ----------------------------------------------------------------------

EXAMPLES = 512
"""In a batch: best for libraries that make their projection anew for every batch."""

WIDTH = 512
"""Width of a row, and the most values a peer's features have."""


@dataclass(frozen=True)
class Library:
    """A library's way to collect features.

    Attributes:
        name: What it is called in a row.
        module: The file in `comparisons.features`.
        function: The function in it.
        layers: The layers it covers, as `whence.record` takes them, which are ours too then.
        batches: How many batches: more for quick libraries, so that setting up counts less.
        gradients: The parameters whose gradients' inner products its features are to have, as a
            pattern; None if its features are something else.
    """

    name: str
    module: str
    function: str = "features"
    layers: str | None = None
    batches: int = 1
    gradients: str | None = "*"


LIBRARIES = (
    Library("TRAK featurize, normal projection", "trak"),
    Library(
        "captum TracInCPFastRandProj, last layer",
        "captum",
        layers="4",
        gradients="4.weight",
        batches=8,
    ),
    Library("dattri, normal projection", "dattri"),
    Library("dattri-llm, LoGra 13 × 13 a layer", "dattri_llm", batches=8),
    Library(
        "dattri-llm, factors, 2,330 values", "dattri_llm", "factors", gradients=None, batches=8
    ),
    Library("bergson, 13 × 13 a layer", "bergson", batches=8),
    Library("bergson, one projection", "bergson", "whole"),
    Library("kronfluence, EK-FAC factors and 16 queries' scores", "kronfluence", gradients=None),
)


def beside_libraries(folder: Path) -> Iterator[Row]:
    """Examples a second from a model to features of all of them, setting up included."""
    torch.manual_seed(0)
    model = perceptron()
    most = max(library.batches for library in LIBRARIES) * EXAMPLES
    all_images, all_labels = torch.randn(most, 784), torch.randint(10, (most,))
    numbers = itertools.count()

    def ours(library: Library) -> np.ndarray:
        path = folder / f"ours-{next(numbers)}"
        own = copy.deepcopy(model)  # as the others do
        settings = {"threads": 1, "weight_gradients": False, "layers": library.layers}
        if library.gradients is None:  # factors beside factors
            settings["layout"] = "factored"
        else:  # the kind for layers that see one position an example
            settings |= {"dim": WIDTH, "sketch": "tensorsketch"}
        rows = []
        with whence.record(own, path, **settings) as recorder:
            for first in range(0, library.batches * EXAMPLES, EXAMPLES):
                here = slice(first, first + EXAMPLES)
                with recorder.batch(np.arange(first, first + EXAMPLES)) as batch:
                    F.cross_entropy(own(all_images[here]), all_labels[here]).backward()
                rows.append(batch.rows)
        return np.concatenate(rows)

    def theirs(library: Library) -> np.ndarray:
        path = folder / f"{library.module}-{next(numbers)}"
        path.mkdir()
        own = copy.deepcopy(model)  # some of them change it
        count = library.batches * EXAMPLES
        images, labels = all_images[:count], all_labels[:count]
        collect = getattr(importlib.import_module(modules[library.module]), library.function)
        found = collect(own, images, labels, dim=WIDTH, batch=EXAMPLES, folder=path)
        return found.detach().numpy()

    modules = {library.module: f"comparisons.features.{library.module}" for library in LIBRARIES}
    skipped = {name for name, module in modules.items() if peer(module) is None}
    for library in LIBRARIES:
        if library.module in skipped:
            continue
        count = library.batches * EXAMPLES
        images, labels = all_images[:count], all_labels[:count]
        what = f"{WIDTH} values" if library.gradients else "factors"
        row = f"{PERCEPTRON}, {count:,} examples: collecting {what} each ÷ {library.name}"
        checked = _check_features("ours", ours(library), model, images, labels, library)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the libraries', about themselves
            try:
                found = theirs(library)
            except Exception as error:  # whatever a library does on a CPU is a finding
                text = f"{type(error).__name__}: {error}".splitlines()[0]
                print(f"failed: {library.name}: {text}", file=sys.stderr)
                alone = take_turns({"ours": lambda each=library: ours(each)}, 2)["ours"]
                rate = 1e3 * count / alone.median
                yield Row(row, rate, None, "samples/s", spread=f"the peer failed: {text}")
                continue
            note = _check_features(library.name, found, model, images, labels, library)
            times = take_turns(
                {
                    "ours": lambda each=library: ours(each),
                    "peer": lambda each=library: theirs(each),
                },
                rounds=(2, 20),
            )
        yield compared_rates(
            row,
            times["ours"],
            times["peer"],
            5 if library.gradients else None,  # a goal for features of one length
            unit="samples/s",
            amounts=(count, count),
            note=f"{note} (ours {checked.split()[-1]})" if library.gradients else note,
        )


def _check_features(
    name: str,
    features: np.ndarray,
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    library: Library,
    count: int = 64,
) -> str:
    """What was found, if these can be features: one row an example, finite, like gradients.

    Inner products of different examples are to correlate with those of exact gradients.
    """
    if features.shape[0] != len(images) or not np.isfinite(features).all():
        sys.exit(f"{name}: features must be finite and {len(images)}, got {features.shape}")
    text = f"{features.shape[1]} values an example"
    if library.gradients is None:
        return text
    parameters = [
        value
        for parameter, value in model.named_parameters()
        if fnmatch.fnmatch(parameter, library.gradients)
    ]
    exact = []
    for image, label in zip(images[:count], labels[:count], strict=True):
        gradients = torch.autograd.grad(F.cross_entropy(model(image), label), parameters)
        exact.append(torch.cat([gradient.flatten() for gradient in gradients]))
    wanted = torch.stack(exact)
    pairs = np.triu_indices(count, 1)
    correlation = np.corrcoef(
        (wanted @ wanted.T).numpy()[pairs], (features[:count] @ features[:count].T)[pairs]
    )[0, 1]
    if not correlation >= 0.3:
        sys.exit(f"{name}: inner products must be like gradients', got correlation {correlation}")
    return f"{text}, inner products correlate with exact ones {correlation:.2f}"
