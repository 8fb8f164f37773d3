"""How right scores are: against retraining, at so many bytes, beside other libraries."""

from __future__ import annotations

import copy
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import nn

import whence
from comparisons import attributors, truths
from comparisons.record import LENGTH, VOCABULARY, Transformer
from comparisons.shared import Curve, Row, bench, peer, take_turns
from comparisons.truths import DATA, Case
from whence.methods import Ekfac, EkfacStored, GradientDot, Run

NUMBERS = (3_000, 100_000, 10_000_000)
"""Training examples among which what is shared is divided."""

DAMPINGS = (0.01, 0.03, 0.1, 0.3, 1.0)


@dataclass
class Scores:
    """The linear datamodeling scores of one way over several runs.

    Attributes:
        values: One a run.
        seconds: Processor time, one a run.
    """

    values: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    @property
    def mean(self) -> float:
        """Over runs."""
        return float(np.mean(self.values))

    def __str__(self) -> str:
        count = len(self.values)
        error = float(np.std(self.values, ddof=1)) / count**0.5 if count > 1 else 0.0
        return f"± {error:.3f} over {count} runs"


def _timed(action: Callable[[], NDArray[Any]]) -> tuple[NDArray[Any], float]:
    begin = time.process_time()
    return action(), time.process_time() - begin


class Runs:
    """Scores of all ways over the runs of a set.

    Args:
        folder: Where stores may be written.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._made = 0
        self.found: dict[str, Scores] = {}
        self.costs: dict[str, Any] = {}

    def add(self, name: str, case: Case, action: Callable[[], NDArray[Any]]) -> None:
        """One run's score of a way."""
        scores, seconds = _timed(action)
        found = self.found.setdefault(name, Scores())
        found.values.append(case.lds(scores))
        found.seconds.append(seconds)

    def new(self) -> Path:
        """A folder that is not there yet."""
        self._made += 1
        return self._folder / f"{self._made}"

    def stored(
        self, name: str, case: Case, factors: Any, dim: int, dtype: str, *, last: bool = False
    ) -> None:
        """A store's scores."""
        method = EkfacStored(self.new(), dim, dtype, factors=factors)
        self.costs[name] = factors.cost(dim, dtype)
        self.add(name, case, lambda: method.fit(case.run(last=last)).scores(case.queries))

    def row(
        self,
        name: str,
        way: str,
        other: str | None = None,
        goal: float | None = None,
        *,
        measure: str = "ours",
    ) -> Row:
        """A way beside another, over the same runs."""
        ours, theirs = self.found[way], self.found.get(other or "")
        spread = str(ours)
        if theirs is not None and len(theirs.values) == len(ours.values):
            differences = np.subtract(ours.values, theirs.values)
            error = float(np.std(differences, ddof=1)) / len(differences) ** 0.5
            spread += f"; difference {differences.mean():+.3f} ± {error:.3f}"
        cost = self.costs.get(way)
        if cost is not None:
            each = ", ".join(f"{cost.each(number):,.0f}" for number in NUMBERS)
            spread += (
                f"; {cost.row:.0f} B a row, shared {cost.shared / 2**20:.1f} MiB: with it {each} B "
                f"at N = 3,000, 10⁵, 10⁷"
            )
        peer_value = None if theirs is None else theirs.mean
        return Row(name, ours.mean, peer_value, "LDS", goal, False, spread, measure)


def _fit(case: Case, **settings: Any) -> Any:
    states = settings.pop("states", case.states)
    return whence.fit_factors(
        case.model, case.loader, case.loss, states=states, progress=False, **settings
    )


@bench
def attribution(folder: Path) -> Iterator[Row | Curve]:
    """Linear datamodeling scores for bytes, and what they cost."""
    yield from _perceptrons(folder / "mlp")
    yield from _ten_thousand(folder / "mlp10k")
    yield from _spellers(folder / "names")
    yield from _digits(folder / "digits")
    yield from _grown(folder / "grown")
    yield from _mislabelled()
    yield from _asked(folder / "asked")
    yield from _recorded(folder / "recorded")


def _perceptrons(folder: Path) -> Iterator[Row | Curve]:
    """The set of 3,000 images."""
    runs = Runs(folder)
    kron, traker = peer("kronfluence"), peer("trak")
    ways = {
        "516": (1024, "int4"),
        "260": (512, "int4"),
        "132": (512, "int2"),
        "68": (256, "int2"),
        "512 f32": (512, "float32"),
        "512 int8": (512, "int8"),
    }
    last: dict[str, Any] = {}
    for seed, case in enumerate(truths.mlp()):
        factors = _fit(case)
        for name, (dim, dtype) in ways.items():
            runs.stored(name, case, factors, dim, dtype)
        one = _fit(case, states=case.last)
        runs.stored("one 260", case, one, 512, "int4", last=True)
        runs.add("exact", case, lambda: Ekfac().fit(case.run(last=True)).scores(case.queries))
        runs.add("plain", case, lambda: GradientDot().fit(case.run(last=True)).scores(case.queries))
        exact = Ekfac(factors)
        runs.add("averaged", case, lambda: exact.fit(case.run()).scores(case.queries))
        runs.stored("any", case, factors, 1024, "float32")
        if seed == 0:
            for damping in DAMPINGS:
                swept = _fit(case, damping=damping)
                runs.stored(f"damping {damping}", case, swept, 512, "int4")
        if kron is not None:
            theirs = attributors.Ekfac(case, runs.new())

            def whole(theirs: attributors.Ekfac = theirs) -> NDArray[Any]:
                theirs.fit()
                return theirs.scores()

            runs.add("kronfluence", case, whole)
        if traker is not None:
            for dim, way in ((64, "trak 64"), (512, "trak"), (2048, "trak 2048")):
                runs.add(
                    way, case, lambda dim=dim: attributors.trak(case, runs.new(), case.last, dim)
                )
            last[f"{seed}"] = next(iter(case.last.values()))
            if len(last) == 5:
                five = dict(last)
                runs.add("trak 5", case, lambda five=five: attributors.trak(case, runs.new(), five))
                last.clear()
    name = "MLP, 3,000 images, one run with its checkpoints"
    for way, goal in (("516", 0.62), ("260", 0.60), ("132", 0.56), ("68", 0.49)):
        dim, dtype = ways[way]
        yield runs.row(f"{name}, {way} B (dim {dim}, {dtype}) beside TRAK-1", way, "trak", goal)
    yield runs.row(f"{name}, 260 B, beside TRAK-5 of five trainings", "260", "trak 5")
    yield runs.row("MLP, one model, 260 B, beside TRAK-1", "one 260", "trak", 0.52)
    yield runs.row(
        "MLP, one model, exact EK-FAC − kronfluence",
        "exact",
        "kronfluence",
        -0.005,
        measure="difference",
    )
    if "kronfluence" in runs.found:
        ours, theirs = (sum(runs.found[each].seconds) for each in ("exact", "kronfluence"))
        yield Row("MLP, exact EK-FAC, factors and scores ÷ kronfluence", ours, theirs, "CPU s", 0.5)
    best = max(("any", "averaged"), key=lambda each: runs.found[each].mean)
    yield runs.row(f"{name}, any storage ({best})", best, "kronfluence", 0.63)
    yield runs.row(f"{name}, exact, residuals averaged", "averaged", "kronfluence")
    yield runs.row(
        "MLP, dim 512: int8 − float32", "512 int8", "512 f32", -0.002, measure="difference"
    )
    yield runs.row("MLP, dim 512: int4 − float32", "260", "512 f32", -0.005, measure="difference")
    yield _damping("MLP", runs)
    recomputed = 4.0 * sum(each.numel() for each in case.model.parameters())
    for label, points in (
        (
            "whence, one run with its checkpoints",
            [(way, None) for way in ("68", "132", "260", "516")],
        ),
        ("whence, one model", [("one 260", None)]),
        ("TRAK-1", [("trak 64", 256.0), ("trak", 2048.0), ("trak 2048", 8192.0)]),
        ("TRAK-5, five trainings", [("trak 5", 10_240.0)]),
        ("EK-FAC of kronfluence, gradients recomputed", [("kronfluence", recomputed)]),
        ("plain gradient products, recomputed", [("plain", recomputed)]),
    ):
        there = [
            (size or float(runs.costs[way].row), runs.found[way].mean)
            for way, size in points
            if way in runs.found
        ]
        if there:
            yield Curve("Accuracy against bytes", label, there)


def _damping(name: str, runs: Runs) -> Row:
    """The default beside the best of a sweep."""
    swept = {damping: runs.found[f"damping {damping}"].mean for damping in DAMPINGS}
    best = max(swept, key=lambda each: swept[each])
    shown = ", ".join(f"{damping:g}: {value:.3f}" for damping, value in swept.items())
    return Row(
        f"{name}: default damping − the best of five ({best:g})",
        swept[0.1],
        swept[best],
        "LDS",
        -0.02,
        False,
        shown,
        "difference",
    )


def _ten_thousand(folder: Path) -> Iterator[Row]:
    """The set of 10,000 images."""
    runs = Runs(folder)
    for seed, case in enumerate(truths.mlp10k()):
        factors = _fit(case)
        for name, dim in (("516", 1024), ("260", 512)):
            runs.stored(name, case, factors, dim, "int4")
        if seed == 0:
            for damping in DAMPINGS:
                runs.stored(f"damping {damping}", case, _fit(case, damping=damping), 512, "int4")
    name = "MLP, 10,000 images, one run with its checkpoints"
    yield runs.row(f"{name}, 516 B", "516", None, 0.44)
    yield runs.row(f"{name}, 260 B", "260", None, 0.41)
    yield _damping("MLP, 10,000 images", runs)


def _spellers(folder: Path) -> Iterator[Row]:
    """The transformer of names."""
    runs = Runs(folder)
    kron = peer("kronfluence")
    trained: list[NDArray[Any]] = []
    for seed, case in enumerate(truths.names()):
        one, factors = _fit(case, states=case.last), _fit(case)
        most = min(960, one.rank), min(960, factors.rank)
        runs.stored("one", case, one, most[0], "float32", last=True)
        runs.stored("any", case, factors, most[1], "float32")
        runs.stored("260", case, factors, 512, "int4")
        runs.add("exact", case, lambda: Ekfac(one).fit(case.run(last=True)).scores(case.queries))
        if seed == 0:
            for damping in DAMPINGS:
                swept = _fit(case, damping=damping)
                runs.stored(f"damping {damping}", case, swept, 512, "int4")
        if kron is not None:
            theirs = attributors.Ekfac(case, runs.new())

            def alone(theirs: attributors.Ekfac = theirs) -> NDArray[Any]:
                theirs.fit()
                trained.append(theirs.scores())
                return trained[-1]

            runs.add("kronfluence", case, alone)
            if len(trained) == 3:
                mean = np.mean(trained, axis=0)
                runs.add("kronfluence 3", case, lambda mean=mean: mean)
                trained.clear()
    name = "names transformer"
    yield runs.row(f"{name}, 1 model, any size, beside kronfluence", "one", "kronfluence", 0.56)
    yield runs.row(f"{name}, 1 model, exact, beside kronfluence", "exact", "kronfluence")
    yield runs.row(f"{name}, one run with its checkpoints, any size", "any", "kronfluence", 0.63)
    yield runs.row(f"{name}, one run with its checkpoints, 260 B", "260", "kronfluence", 0.61)
    yield runs.row(f"{name}, 260 B, beside kronfluence with 3 trainings", "260", "kronfluence 3")
    yield _damping("names", runs)


def _digits(folder: Path) -> Iterator[Row]:
    """Leave-one-out of a logistic regression."""
    file = np.load(DATA / "lds" / "loo_digits_lr.npz")
    model = nn.Linear(62, 10, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.from_numpy(file["W"].T))
    model.double()
    x, y = torch.from_numpy(file["X"]), torch.from_numpy(file["y"])
    test = torch.from_numpy(file["Xt"]), torch.from_numpy(file["yt"])
    penalty = float(file["l2"]) / len(x)
    changes = file["dloss"]

    def loss(inputs: Any, targets: Any) -> Any:
        return F.cross_entropy(model(inputs), targets)

    loader = list(zip(x.split(100), y.split(100), strict=True))
    run = Run(model, loader, loss)
    method = whence.methods.GaussNewton(penalty=penalty)
    scores = method.fit(run).scores(lambda: loss(*test))
    found = whence.evaluate.leave_one_out(scores.T, changes)
    name = "digits, leave-one-out, Pearson"
    yield Row(f"{name}: whole Gauss-Newton matrix", found.mean, None, "r", 0.99, False, "", "ours")
    model.float()
    narrow = [(inputs.float(), targets) for inputs, targets in loader]
    stored = EkfacStored(folder / "digits", 512, "int4")
    stored.fit(Run(model, narrow, loss))
    scores = stored.scores(lambda: loss(test[0].float(), test[1]))
    found = whence.evaluate.leave_one_out(scores.T, changes)
    yield Row(f"{name}: stored, dim 512, 260 B", found.mean, None, "r", 0.90, False, "", "ours")


def _grown(folder: Path) -> Iterator[Row]:
    """260 bytes beside their own unrotated scores, as examples and models grow."""
    cases: list[tuple[str, Callable[[], Case]]] = [
        ("N 1,000", lambda: truths.retrained(truths.small, 1000, 50, 3, folder / "1000")),
        ("N 3,000", lambda: next(truths.mlp(1))),
        ("N 10,000", lambda: next(truths.mlp10k(1))),
        (
            "N 3,000, 10 × the model",
            lambda: truths.retrained(
                lambda: truths.perceptron(196, 640, 320, 64, 10), 3000, 30, 2, folder / "wide"
            ),
        ),
    ]
    for name, make in cases:
        case, runs = make(), Runs(folder / name.replace(" ", "-"))
        factors = _fit(case)
        exact = Ekfac(factors)
        runs.add("exact", case, lambda: exact.fit(case.run()).scores(case.queries))
        for dim in (128, 256, 512, 1024):
            if dim <= factors.rank:
                runs.stored(f"{dim}", case, factors, dim, "int4")
        row = (
            runs.row(
                f"{name}: 260 B − its unrotated, unrounded scores",
                "512",
                "exact",
                -0.05,
                measure="difference",
            )
            if len(runs.found["512"].values) > 1
            else None
        )
        ours, whole = runs.found["512"].mean, runs.found["exact"].mean
        curve = ", ".join(
            f"{dim}: {runs.found[dim].mean:.3f}" for dim in runs.found if dim != "exact"
        )
        yield row or Row(
            f"{name}: 260 B − its unrotated, unrounded scores",
            ours,
            whole,
            "LDS",
            -0.05,
            False,
            f"by dim at 4 bits {curve}",
            "difference",
        )


def _mislabelled() -> Iterator[Row]:
    """Flipped labels found by influence and by the loss, over the same checkpoints."""
    data = np.load(DATA / "fashion_mnist_10k_2k.npz")
    models = np.load(DATA / "lds" / "mlp_noisy_models.npz")
    wrong = np.zeros(3000, bool)
    wrong[models["flipped"]] = True
    x = truths.images(data["x_train"][:3000])
    y = torch.from_numpy(models["y_noisy"])
    ours, baseline = [], []
    for seed in range(5):
        model = truths.small()
        states = truths._states(models, model, (2, 5, 10, 18, 25), seed)
        run = Run(
            model,
            list(zip(x.split(100), y.split(100), strict=True)),
            truths._cross_entropy(model),
            states=states,
        )
        losses = []
        for state in states.values():
            model.load_state_dict(state)
            with torch.no_grad():
                losses.append(F.cross_entropy(model(x), y, reduction="none").numpy())
        mean = np.mean(losses, axis=0)
        suspicion = whence.methods.suspicion(run, mean)
        ours.append(whence.evaluate.mislabel_auc(suspicion, wrong))
        baseline.append(whence.evaluate.mislabel_auc(mean, wrong))
    differences = np.subtract(ours, baseline)
    error = float(np.std(differences, ddof=1)) / len(differences) ** 0.5
    yield Row(
        "flipped labels, AUC: self-influence and loss − mean loss, over the same five checkpoints",
        float(np.mean(ours)),
        float(np.mean(baseline)),
        "AUC",
        0.0,
        False,
        f"difference {differences.mean():+.4f} ± {error:.4f} over 5 runs",
        "difference",
    )


def _asked(folder: Path) -> Iterator[Row]:
    """500 queries among 60,000 and 3,000 examples, beside kronfluence's recomputation."""
    if peer("kronfluence") is None:
        return
    full = np.load(DATA / "fashion_mnist_full.npz")
    for count in (60_000, 3_000):
        case = next(truths.mlp10k(1))
        case.train = (
            truths.images(full["x_train"][:count]),
            torch.from_numpy(full["y_train"][:count]).long(),
        )
        factors = _fit(case, states=case.last, examples=5000)
        method = EkfacStored(folder / f"{count}", 512, "int4", factors=factors)
        method.fit(case.run(last=True))
        method.top_k(case.queries, 10)  # the index is built once
        times = take_turns({"ours": lambda: method.top_k(case.queries, 10)}, seconds=5.0)
        theirs = attributors.Ekfac(case, folder / f"kronfluence-{count}")
        theirs.fit()
        begin = time.perf_counter()
        theirs.scores()
        elapsed = 1e3 * (time.perf_counter() - begin)
        goal = 100.0 if count == 60_000 else None
        yield Row(
            f"500 queries among {count:,}, query gradients included: kronfluence ÷ ours",
            elapsed,
            times["ours"].median,
            "ms",
            goal,
            False,
            f"ours {times['ours']}",
        )


def _recorded(folder: Path) -> Iterator[Row]:
    """Recording coordinates beside the plain loop."""
    for width, layers in ((128, 4), (768, 2)):
        torch.manual_seed(0)
        tokens = torch.randint(VOCABULARY, (16, LENGTH + 1))
        values, targets = tokens[:, :-1], tokens[:, 1:]
        model = Transformer(width, layers)
        plain = copy.deepcopy(model)

        def loss(x: Any, y: Any, model: nn.Module = model) -> Any:
            return F.cross_entropy(model(x), y)

        factors = whence.fit_factors(
            model,
            [(values, targets)],
            loss,
            coordinates=6144,
            leading=0.25,
            until="eigenvalues",
            progress=False,
        )
        firsts = itertools.count(0, 16)

        def plain_pass(plain: nn.Module = plain) -> None:
            plain.zero_grad()
            F.cross_entropy(plain(values), targets).backward()

        with whence.record(
            model,
            folder / f"{width}",
            precondition=factors,
            rotate=False,
            dtype="int4",
            weight_gradients=False,
            threads=1,
        ) as recorder:

            def recorded() -> None:
                first = next(firsts)
                with recorder.batch(np.arange(first, first + 16)):
                    F.cross_entropy(model(values), targets).backward()

            for _ in range(8):  # batches 1, 2, 4 and 8 are compared with autograd, and not timed
                recorded()
            plain_pass()
            times = take_turns({"ours": recorded, "peer": plain_pass})
        yield Row(
            f"transformer {width} × {layers}: recording 6,144 coordinates of the leading quarter "
            "÷ forward and backward",
            times["ours"].median,
            times["peer"].median,
            "ms",
            1.10,
            True,
            f"ours {times['ours']}, peer {times['peer']}",
        )


__all__: Sequence[str] = ["attribution"]
