"""The demo: real digits, a tenth of the training labels flipped, and which scores find them.

Needs torch and scikit-learn, whose bundled digits (1,797 images of 8 by 8 pixels; Alpaydin and
Kaynak, "Optical Recognition of Handwritten Digits", UCI Machine Learning Repository, 1998) are the
data. Everything random hangs on one seed.
"""

from __future__ import annotations

import json
import shutil
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from whence._plain import line
from whence.attribution import query
from whence.curvature import fit_factors
from whence.errors import ArgumentError
from whence.evaluate import mislabel_auc, share_found
from whence.gradients import record, record_checkpoints
from whence.report import chart
from whence.report.html import (
    Card,
    Section,
    beside,
    figure,
    gallery,
    picture,
    table,
    terms,
    write_page,
)
from whence.search import Hits, Store
from whence.store.progress import bar

TRAIN = 1400
FLIPPED = 140
EPOCHS = 10
EVERY = 2  # epochs from one checkpoint to the next
LEARNING_RATE = 0.05
MOMENTUM = 0.9
BATCH = 32
DIM = 2048  # width of a plain stored row; the network has 9,930 trainable values
SHORT = 512  # width of a preconditioned row, of 4 bits a value
INSPECTED = 0.1  # share of the training examples that a person looks at
QUERIES = 4  # test digits shown of each kind: wrongly and rightly predicted
SHOWN = 6  # training digits shown at each end
TOP = 10  # ends of the ranking in which flipped labels are counted
SUSPECTS = 14  # digits shown of the highest self-influence

PAGE, RESULTS, STORE, RIGHT = "index.html", "demo.json", "store", "preconditioned"
MADE_BY = "whence demo"

SELF, TEST, ERRORS = "self-influence", "harm to all test digits", "harm to the wrongly predicted"
PLAIN_SELF, PLAIN_TEST = "self-influence, plain", "harm to all test digits, plain"
LOSS, PATH_LOSS = "last loss (baseline)", "mean loss (baseline)"
DRAWN = (SELF, TEST, PLAIN_SELF, PATH_LOSS, LOSS)  # the curves of the page's picture

Suspicion: TypeAlias = dict[str, NDArray[np.float64]]
"""Ranking -> [TRAIN] numbers, high where a label looks wrong."""


@dataclass(frozen=True)
class Digits:
    """The data, split and partly mislabelled.

    Attributes:
        images: [digits, 8, 8] uint8, ink from 0 to 255.
        truth: [digits] int64 what each shows.
        train: [TRAIN] int64 places of the training digits; their ids.
        test: [rest] int64 places of the test digits.
        labels: [TRAIN] int64 labels that the training uses, some of them flipped.
    """

    images: NDArray[np.uint8]
    truth: NDArray[np.int64]
    train: NDArray[np.int64]
    test: NDArray[np.int64]
    labels: NDArray[np.int64]

    @property
    def wrong(self) -> NDArray[np.bool_]:
        """[TRAIN] whether the label is flipped."""
        found: NDArray[np.bool_] = self.labels != self.truth[self.train]
        return found

    def pixels(self, places: NDArray[np.int64]) -> Tensor:
        """[places, 1, 8, 8] float32 from 0 to 1."""
        return torch.from_numpy(self.images[places].astype(np.float32) / 255)[:, None]


@dataclass(frozen=True)
class Trained:
    """What training leaves behind.

    Attributes:
        model: The network at the end.
        states: Checkpoint -> weights.
        losses: [checkpoints, TRAIN] loss of each training digit under the label it was given.
    """

    model: nn.Module
    states: dict[str, dict[str, Tensor]]
    losses: NDArray[np.float64]


@dataclass(frozen=True)
class Evidence:
    """What the store says about the test digits, and what is known about them.

    Attributes:
        digits: The data.
        predicted: [test] int64 what the network takes each test digit for.
        confidence: [test] the probability it gives to that.
        losses: [test] loss of each test digit under its true label.
        scores: [test, TRAIN] score of each training digit for each test digit.
        suspicion: The rankings of training labels that are compared.
        shown: [queries] places among the test digits of those on the page.
        hits: Their helpful and harmful training digits.
    """

    digits: Digits
    predicted: NDArray[np.int64]
    confidence: NDArray[np.float64]
    losses: NDArray[np.float64]
    scores: NDArray[np.float64]
    suspicion: Suspicion
    shown: NDArray[np.int64]
    hits: Hits

    @property
    def mistaken(self) -> NDArray[np.bool_]:
        """[test] whether the network is wrong."""
        found: NDArray[np.bool_] = self.predicted != self.digits.truth[self.digits.test]
        return found


def run(out: Path, seed: int = 0) -> dict[str, Any]:
    """Trains, records, searches, and writes the store, the page and the figures.

    Args:
        out: A folder that is new, empty, or an earlier demo's, whose output is replaced.
        seed: Seed of the split, the flips, the network and the order of training. The same seed
            gives the same figures on the same machine.

    Returns:
        The figures, as written to demo.json.

    Raises:
        ArgumentError: If the folder holds something else.
        OSError: If it cannot be written.
    """
    prepare(out, seed)
    digits = flipped_digits(seed)
    with _one_thread(), torch.random.fork_rng(devices=[]):
        trained = train_and_record(digits, out / STORE, seed)
        precondition(digits, trained, out / RIGHT)
        evidence = gather(digits, trained, Store(out / STORE), Store(out / RIGHT))
    results = {"made_by": MADE_BY, "finished": True, "seed": seed, **figures(evidence)}
    write(out / PAGE, evidence, results)
    results["page"], results["store"] = str(out / PAGE), str(out / RIGHT)
    _write_results(out, results)
    return results


def prepare(out: Path, seed: int) -> None:
    """Makes the folder, without what an earlier demo left in it.

    Raises:
        ArgumentError: If it is a file, or holds something that is not a demo's.
    """
    if out.exists() and not out.is_dir():
        raise ArgumentError(f"--out must be a folder, got the file {out}")
    if out.is_dir() and any(out.iterdir()) and not _is_demo(out):
        raise ArgumentError(
            f"--out must be a new or empty folder, or an earlier demo's, got {out}, which holds "
            "other files"
        )
    out.mkdir(parents=True, exist_ok=True)
    # Written first, so that the folder of a demo that was interrupted can be used again.
    _write_results(out, {"made_by": MADE_BY, "seed": seed, "finished": False})
    (out / PAGE).unlink(missing_ok=True)
    for store in (out / STORE, out / RIGHT):
        if store.exists():
            shutil.rmtree(store)


def flipped_digits(seed: int) -> Digits:
    """The digits, split, with FLIPPED training labels turned into another digit."""
    bundled = load_digits()
    generator = np.random.default_rng(seed)
    truth = bundled.target.astype(np.int64)
    order = generator.permutation(len(truth))
    train, test = order[:TRAIN], order[TRAIN:]
    labels = truth[train]
    flipped = generator.choice(TRAIN, FLIPPED, replace=False)
    labels[flipped] = (labels[flipped] + generator.integers(1, 10, FLIPPED)) % 10
    # The images have 17 grey levels, 0 to 16.
    images = np.rint(bundled.images * (255 / 16)).astype(np.uint8)
    return Digits(images, truth, train, test, labels)


def network() -> nn.Sequential:
    """A small convolutional network."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),  # [batch, 16, 8, 8]
        nn.ReLU(inplace=True),
        nn.Conv2d(16, 32, 3, padding=1),  # [batch, 32, 8, 8]
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),  # [batch, 32, 4, 4]
        nn.Flatten(),
        nn.Linear(512, 10),  # [batch, 10]
    )


def train_and_record(digits: Digits, path: Path, seed: int) -> Trained:
    """Trains the network and records each training digit's gradient at every checkpoint."""
    torch.manual_seed(seed)
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE, momentum=MOMENTUM)
    images, labels = digits.pixels(digits.train), torch.from_numpy(digits.labels)
    truth = digits.truth[digits.train]
    states, losses = {}, []
    with (
        record(model, path, dim=DIM, seed=seed, weight_gradients=False) as recorder,
        bar("training and recording", EPOCHS, None, "epoch") as progress,
    ):
        for epoch in range(1, EPOCHS + 1):
            for batch in _batches(torch.randperm(TRAIN), BATCH):
                optimizer.zero_grad()
                cross_entropy(model(images[batch]), labels[batch]).backward()  # type: ignore[no-untyped-call]
                optimizer.step()
            progress.update()
            if epoch % EVERY:
                continue
            name = f"epoch {epoch}"
            recorder.checkpoint(name, learning_rate=LEARNING_RATE)
            states[name] = {key: value.clone() for key, value in model.state_dict().items()}
            losses.append(_losses(model, images, labels))
            for batch in _batches(torch.arange(TRAIN), 100):
                with recorder.batch(digits.train[batch], label=labels[batch], shows=truth[batch]):
                    cross_entropy(model(images[batch]), labels[batch]).backward()  # type: ignore[no-untyped-call]
    return Trained(model, states, np.stack(losses))


def precondition(digits: Digits, trained: Trained, path: Path) -> None:
    """Records each training digit once more, with the curvature of the loss: one short row each."""
    images, labels = digits.pixels(digits.train), torch.from_numpy(digits.labels)
    loader = [(images[batch], labels[batch]) for batch in _batches(torch.arange(TRAIN), 100)]

    def loss(images: Tensor, labels: Tensor) -> Tensor:
        return cross_entropy(trained.model(images), labels)

    factors = fit_factors(trained.model, loader, loss, states=trained.states, progress=False)
    record_checkpoints(
        trained.model,
        path,
        loader,
        loss,
        precondition=factors,
        states=trained.states,
        ids=digits.train,
        dim=SHORT,
        columns=lambda _, labels: {"label": labels},
        progress=False,
    )


def gather(digits: Digits, trained: Trained, plain: Store, right: Store) -> Evidence:
    """Asks the stores about every test digit, then one of them about those for the page."""
    images, truth = digits.pixels(digits.test), torch.from_numpy(digits.truth[digits.test])
    with torch.no_grad():
        confidence, predicted = trained.model(images).softmax(1).max(1)
    losses = _losses(trained.model, images, truth)
    mistaken = (predicted != truth).numpy()

    def ask(store: Store, places: NDArray[np.int64], k: int) -> Hits:
        return query(
            trained.model,
            store,
            lambda: cross_entropy(trained.model(images[places]), truth[places]),
            k,
            states=trained.states,
        )

    # With k as large as a store both ends hold every example, and so every score. Stores number
    # their examples in the order they were recorded, which is that of digits.train.
    def all_scores(store: Store) -> NDArray[np.float64]:
        whole = ask(store, np.arange(len(truth)), TRAIN).helpful
        found = np.empty(whole.scores.shape)
        np.put_along_axis(found, whole.positions, whole.scores.astype(np.float64), axis=1)
        return found

    scores = all_scores(right)
    suspicion = {
        SELF: right.self_influence().astype(np.float64),
        TEST: -scores.sum(axis=0),
        ERRORS: -scores[mistaken].sum(axis=0),
        PLAIN_SELF: plain.self_influence().astype(np.float64),
        PLAIN_TEST: -all_scores(plain).sum(axis=0),
        PATH_LOSS: trained.losses.mean(axis=0),
        LOSS: trained.losses[-1],
    }
    if not mistaken.any():
        del suspicion[ERRORS]
    shown = choose(mistaken, losses, truth.numpy())
    return Evidence(
        digits,
        predicted.numpy(),
        confidence.double().numpy(),
        losses,
        scores,
        suspicion,
        shown,
        ask(right, shown, SHOWN),
    )


def choose(
    mistaken: NDArray[np.bool_], losses: NDArray[np.float64], truth: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Which test digits to show: those the network gets most wrong, then some it gets right.

    The first QUERIES have the highest loss, wrongly predicted ones before all others. The rest are
    the first rightly predicted ones, in the random order of the split, that show different digits.
    """
    hard = np.lexsort((-losses, ~mistaken))[:QUERIES]
    right = np.setdiff1d(np.flatnonzero(~mistaken), hard)
    _, first = np.unique(truth[right], return_index=True)
    return np.concatenate([hard, right[np.sort(first)[:QUERIES]]])


def figures(evidence: Evidence) -> dict[str, Any]:
    """The numbers of the demo, as JSON takes them."""
    wrong, mistaken, hits = evidence.digits.wrong, evidence.mistaken, evidence.hits
    inspected = round(TRAIN * INSPECTED)
    rankings = {
        name: {
            "auc": mislabel_auc(scores, wrong),
            "share_found": share_found(scores, wrong, inspected),
        }
        for name, scores in evidence.suspicion.items()
    }
    ends = {
        name: {
            "harmful": flipped_at_the_end(evidence.scores[queries], wrong),
            "helpful": flipped_at_the_end(-evidence.scores[queries], wrong),
        }
        for name, queries in (("wrongly predicted", mistaken), ("rightly predicted", ~mistaken))
        if queries.any()
    }
    return {
        "train": TRAIN,
        "flipped": int(wrong.sum()),
        "test": len(mistaken),
        "wrongly_predicted": int(mistaken.sum()),
        "test_accuracy": float(1 - mistaken.mean()),
        "method": hits.method,
        "sign": hits.sign,
        "unit": hits.unit,
        "inspected": inspected,
        "rankings": rankings,
        "flipped_share_of_top": {"top": TOP, **ends},
        "queries": [_answer(evidence, number) for number in range(len(hits))],
    }


def flipped_at_the_end(scores: NDArray[np.float64], wrong: NDArray[np.bool_]) -> float:
    """The share of flipped labels among the TOP lowest scores of each query, over all queries."""
    return float(wrong[np.argsort(scores, axis=1, kind="stable")[:, :TOP]].mean())


def summary(results: dict[str, Any]) -> str:
    """The figures for a terminal."""
    lines = [
        f"{results['train']:,} real digits to train on, {results['flipped']} of them with a "
        f"flipped label; {results['test']} to test, {results['test_accuracy']:.1%} predicted "
        "rightly",
        "",
        f"which ranking finds the flipped labels       AUC   found by inspecting {INSPECTED:.0%}",
        *(f"  {name:<40} {auc:>6}   {found:>6}" for name, auc, found in _ranked(results)),
        *_wrapped(_verdict(results)),
        "",
        f"flipped among the {TOP} training digits at each end (by chance {_chance(results):.0%})",
    ]
    for name, ends in _ends(results).items():
        lines.append(
            f"  of a {name} test digit: {ends['harmful']:.0%} of the most harmful, "
            f"{ends['helpful']:.0%} of the most helpful"
        )
    lines += ["", f"{'test digit':<28}{'most helpful':<29}most harmful"]
    for answer in results["queries"]:
        asked = f"id {answer['id']}, {answer['shows']} taken for {answer['predicted']}"
        helpful, harmful = _named(answer["helpful"]), _named(answer["harmful"])
        lines.append(f"  {asked:<26}{helpful:<29}{harmful}")
    lines += [
        "",
        f"sign    {results['sign']}",
        f"method  {results['method']}",
        f"unit    {results['unit']}",
        f"store   {line(results['store'])}",
        f"page    {line(results['page'])}",
    ]
    return "\n".join(lines)


def write(path: Path, evidence: Evidence, results: dict[str, Any]) -> None:
    """Writes the page."""
    digits = evidence.digits
    places = digits.test[evidence.shown]
    flipped = set(digits.train[digits.wrong].tolist())
    write_page(
        path,
        evidence.hits,
        title="Which training digits made the network do this?",
        show=lambda id_: digits.images[id_],
        queries=list(digits.images[places]),
        captions=[_caption(evidence, place) for place in evidence.shown],
        badge=lambda id_: "flipped" if id_ in flipped else None,
        lead=[
            f"The data are the {len(digits.truth):,} scanned digits that come with scikit-learn: "
            f"{TRAIN:,} to train a small convolutional network, {results['test']} to test it. "
            f"Before training, {results['flipped']} training labels picked at random were turned "
            f"into another digit. The network predicts {results['test_accuracy']:.1%} of the test "
            "digits rightly.",
            f"The gradient of each training digit was recorded at {EPOCHS // EVERY} checkpoints, "
            "plain, and preconditioned by the curvature of the loss in one short row for all of "
            "them. From these the page tells which training labels look wrong, and which training "
            "digits helped and harmed a prediction.",
        ],
        before=[_labels_section(evidence, results), _suspects_section(evidence)],
    )


def _labels_section(evidence: Evidence, results: dict[str, Any]) -> Section:
    chance = f"{_chance(results):.0%}"
    wrong = evidence.digits.wrong
    drawn = chart.curves(
        {name: _found(evidence.suspicion[name], wrong) for name in DRAWN},
        title="Share of the flipped labels found, by share of the training digits inspected",
        across="share of training digits inspected, most suspicious first",
        up="share of flipped labels found",
        until=0.25,
        guide=INSPECTED,
    )
    ends = " ".join(
        f"For a {name} test digit, {end['harmful']:.0%} of its {TOP} most harmful training digits "
        f"have a flipped label, and {end['helpful']:.0%} of its {TOP} most helpful."
        for name, end in _ends(results).items()
    )
    return Section(
        "Which training labels are wrong?",
        [
            "Each ranking below sorts the training digits by how wrong their label looks. Here it "
            "is known which labels are flipped, so the rankings can be marked.",
            beside(
                table(
                    f"How well each ranking finds the {results['flipped']} flipped labels",
                    ["ranking", "AUC", f"found in first {INSPECTED:.0%}"],
                    [*_ranked(results), ("chance", "0.5000", chance)],
                ),
                figure(
                    drawn,
                    f"A perfect ranking reaches the top at {chance}. The upright line marks "
                    f"{INSPECTED:.0%} inspected.",
                ),
            ),
            _verdict(results, minus="\N{MINUS SIGN}"),
            terms(_meanings(results)),
            f"{ends} By chance it would be {chance}. A wrong label has a large "
            "gradient, which stands at both ends: it helps what looks alike and is labelled so.",
        ],
    )


def _meanings(results: dict[str, Any]) -> dict[str, str]:
    """What each ranking is, in words."""
    meanings = {
        SELF: "the score of each training digit for itself, preconditioned: the squared length "
        "of its row",
        TEST: f"the scores of each training digit for all {results['test']} test digits, summed, "
        "with the sign turned; needs test labels that are right",
        ERRORS: f"the same over the {results['wrongly_predicted']} test digits that the network "
        "gets wrong",
        PLAIN_SELF: "self-influence by plain gradient products, the weak baseline: squared "
        "lengths of gradients, summed over the checkpoints, times the learning rate",
        PLAIN_TEST: "harm to all test digits by plain gradient products, the weak baseline",
        PATH_LOSS: "the loss of each training digit, averaged over the same checkpoints; needs no "
        "gradient",
        LOSS: "the loss of each training digit after the last epoch; needs no gradient",
    }
    return {name: meanings[name] for name in results["rankings"]}


def _suspects_section(evidence: Evidence) -> Section:
    digits, influence = evidence.digits, evidence.suspicion[SELF]
    first = np.argsort(-influence, kind="stable")[:SUSPECTS]
    flipped = int(digits.wrong[first].sum())
    cards = []
    for place in first:
        id_ = int(digits.train[place])
        label, shows = int(digits.labels[place]), int(digits.truth[id_])
        cards.append(
            Card(
                f"id {id_}",
                picture("image", digits.images[id_], f"training digit {id_}, a {shows}"),
                float(influence[place]),
                {"label": label, "shows": shows},
                "flipped" if digits.wrong[place] else None,
            )
        )
    return Section(
        "The most suspicious training digits",
        [
            f"The {SUSPECTS} training digits with the highest self-influence, which is never "
            f"negative. {flipped} of them have a flipped label. “label” is what the network was "
            "trained on, “shows” what the person wrote.",
            gallery(cards),
        ],
    )


def _caption(evidence: Evidence, place: int) -> str:
    id_ = int(evidence.digits.test[place])
    return (
        f"Test digit {id_} shows a {evidence.digits.truth[id_]}. The network says "
        f"{evidence.predicted[place]}, with probability {evidence.confidence[place]:.2f}."
    )


def _answer(evidence: Evidence, number: int) -> dict[str, Any]:
    """One query of the page with the ends of its ranking."""
    digits, place = evidence.digits, evidence.shown[number]
    found: dict[str, Any] = {
        "id": int(digits.test[place]),
        "shows": int(digits.truth[digits.test[place]]),
        "predicted": int(evidence.predicted[place]),
    }
    for name, side in (("helpful", evidence.hits.helpful), ("harmful", evidence.hits.harmful)):
        position = side.positions[number, 0]
        found[name] = {
            "id": int(side.ids[number, 0]),
            "score": float(side.scores[number, 0]),
            "label": int(digits.labels[position]),
            "shows": int(digits.truth[digits.train[position]]),
        }
    return found


def _named(example: dict[str, Any]) -> str:
    shows = "" if example["label"] == example["shows"] else f", shows {example['shows']}"
    return f"{example['score']:<+10.3g}label {example['label']}{shows}"


def _ranked(results: dict[str, Any]) -> list[tuple[str, str, str]]:
    return [
        (name, f"{found['auc']:.4f}", f"{found['share_found']:.1%}")
        for name, found in results["rankings"].items()
    ]


def _ends(results: dict[str, Any]) -> dict[str, dict[str, float]]:
    return {name: ends for name, ends in results["flipped_share_of_top"].items() if name != "top"}


def _chance(results: dict[str, Any]) -> float:
    """The share of flipped labels among all."""
    share: float = results["flipped"] / results["train"]
    return share


def _verdict(results: dict[str, Any], minus: str = "-") -> str:
    """Which ranking came first, and self-influence beside the baseline from the same passes."""
    rankings = results["rankings"]
    best = max(rankings, key=lambda name: rankings[name]["auc"])
    auc, found = (rankings[SELF][key] - rankings[PATH_LOSS][key] for key in ("auc", "share_found"))
    differences = f"AUC {auc:+.4f}, found {100 * found:+.1f} percentage points"
    return (
        f"First by AUC: {best}. Self-influence minus the mean loss: "
        f"{differences.replace('-', minus)}. Scores are EK-FAC influence where nothing else is "
        "said; plain gradient products are the weak baseline. This is one seed on one small data "
        "set."
    )


def _found(scores: NDArray[np.float64], wrong: NDArray[np.bool_]) -> NDArray[np.float64]:
    """[TRAIN + 1] share of the flipped labels found after inspecting 0, 1, … of the highest."""
    order = np.argsort(-scores, kind="stable")
    found: NDArray[np.float64] = np.concatenate([[0], np.cumsum(wrong[order])]) / wrong.sum()
    return found


def _batches(places: Tensor, size: int) -> Iterator[Tensor]:
    for start in range(0, len(places), size):
        yield places[start : start + size]


def _losses(model: nn.Module, images: Tensor, labels: Tensor) -> NDArray[np.float64]:
    with torch.no_grad():
        return cross_entropy(model(images), labels, reduction="none").double().numpy()


def _is_demo(out: Path) -> bool:
    try:
        found = json.loads((out / RESULTS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(found, dict) and found.get("made_by") == MADE_BY


def _write_results(out: Path, results: dict[str, Any]) -> None:
    (out / RESULTS).write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, 96)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Torch on one thread.

    The tensors are so small that more threads cost more than they give, many times more where
    other programs run. It also makes the figures independent of the number of processors.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
