"""Evaluations: against loops, closed forms, scipy and scikit-learn, and models of known truth."""

import itertools
import json
import math
import signal
import subprocess
import sys
from fractions import Fraction

import numpy as np
import pytest
from definitions import parameter_key, value
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from sklearn.metrics import roc_auc_score

from whence import errors, evaluate
from whence.evaluate.ranks import average_ranks, subset_sums
from whence.store.files import read_json, write_json


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


def additive(scores, masks):
    """[subsets, queries] losses of models that are nothing but the sum of their examples."""
    return np.stack([-scores[places].sum(axis=0) for places in masks])


# Ranks and sums


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(-3, 3), min_size=1, max_size=30))
def test_equal_values_share_the_mean_of_their_ranks(column):
    expected = [
        sum(other < each for other in column) + (column.count(each) + 1) / 2 for each in column
    ]
    assert average_ranks(np.array(column)).tolist() == expected


def test_ranks_are_taken_along_the_first_axis():
    values = np.random.default_rng(0).integers(0, 4, (9, 2, 3))
    for place in itertools.product(range(2), range(3)):
        column = values[(slice(None), *place)]
        found = average_ranks(values)[(slice(None), *place)]
        assert found.tolist() == stats.rankdata(column).tolist()


def test_sums_over_subsets_do_not_round():
    rng = np.random.default_rng(0)
    scores = rng.standard_normal((200, 3)) * 10.0 ** rng.integers(-9, 9, (200, 3))
    chosen = [np.sort(rng.permutation(200)[: rng.integers(1, 200)]) for _ in range(40)]
    # Two subsets that differ by little in a column of large scores.
    chosen += [np.append(chosen[0], [] if i in chosen[0] else [i]).astype(int) for i in range(40)]
    found = subset_sums(chosen, scores)
    for query in range(3):
        exact = [sum(Fraction(scores[i, query]) for i in places) for places in chosen]
        order = sorted(range(80), key=lambda j: exact[j])
        assert (np.diff(found[order, query]) >= 0).all()
        unit = exact[0] / Fraction(found[0, query])
        assert found[:, query] == pytest.approx([float(each / unit) for each in exact], rel=1e-12)


def test_sums_are_the_same_in_every_order_of_the_examples():
    scores, chosen = normal(500, 4), evaluate.subsets(500, 20)
    order = np.random.default_rng(1).permutation(500)
    places = np.argsort(order)
    moved = subset_sums([places[subset] for subset in chosen], scores[order])
    assert np.array_equal(moved, subset_sums(list(chosen), scores))


@pytest.mark.parametrize("scale", [1e-320, 1e-300, 1.0, 1e300])
def test_no_scale_of_scores_over_or_underflows(scale):
    scores, chosen = normal(30, 2).round(3), evaluate.subsets(30, 12)
    found = evaluate.lds(scores * scale, chosen, additive(scores, chosen))
    assert found.mean > 0.99


# LDS


def lds_by_loops(scores, masks, outputs):
    """One correlation a query, by the formula, with scipy's ranks."""
    means = outputs.mean(axis=1)
    found = []
    for query in range(scores.shape[1]):
        sums = [sum(scores[i, query] for i in places) for places in masks]
        found.append(stats.spearmanr(sums, -means[:, query]).statistic)
    return found


def test_lds_is_the_rank_correlation_of_sums_and_outputs():
    scores, outputs = normal(40, 6), normal(15, 3, 6, seed=1)
    chosen = evaluate.subsets(40, 15, seed=2)
    found = evaluate.lds(scores, chosen, outputs)
    assert found.per_query == pytest.approx(lds_by_loops(scores, chosen, outputs))
    assert found.mean == pytest.approx(np.mean(found.per_query))
    assert found.standard_error == pytest.approx(stats.sem(found.per_query))


def test_lds_with_ties_shares_ranks():
    rng = np.random.default_rng(3)
    scores = rng.integers(-1, 2, (12, 5)).astype(np.float64)
    outputs = rng.integers(0, 3, (20, 1, 5)).astype(np.float64)
    chosen = evaluate.subsets(12, 20, 0.25)
    found = evaluate.lds(scores, chosen, outputs)
    assert found.per_query == pytest.approx(lds_by_loops(scores, chosen, outputs))


def test_a_model_that_is_its_datamodel_has_an_lds_of_one():
    scores, chosen = normal(60, 8), evaluate.subsets(60, 25)
    found = evaluate.lds(scores, chosen, additive(scores, chosen))
    assert found.per_query.tolist() == [1.0] * 8


def test_scores_of_other_examples_have_an_lds_of_about_zero():
    scores, chosen = normal(2000, 400), evaluate.subsets(2000, 50)
    found = evaluate.lds(np.roll(scores, 1, axis=1), chosen, additive(scores, chosen))
    # Of independent columns a correlation over 50 subsets has the standard deviation 1/sqrt(49).
    assert abs(found.mean) < 5 / math.sqrt(49 * 400)
    assert found.standard_error == pytest.approx(1 / math.sqrt(49 * 400), rel=0.2)


def test_all_forms_of_masks_are_the_same_subsets():
    scores, chosen = normal(30, 3), evaluate.subsets(30, 10)
    outputs = normal(10, 3, seed=1)
    member = np.zeros((10, 30), bool)
    np.put_along_axis(member, chosen, True, axis=1)
    expected = evaluate.lds(scores, chosen, outputs).per_query.tolist()
    for masks in (member, chosen[:, ::-1].astype(np.uint16), list(chosen), list(member)):
        assert evaluate.lds(scores, masks, outputs).per_query.tolist() == expected


def test_subsets_may_differ_in_size():
    scores = normal(10, 4)
    chosen = [np.arange(size) for size in (1, 4, 7, 9)]
    found = evaluate.lds(scores, chosen, additive(scores, chosen))
    assert found.per_query.tolist() == [1.0] * 4


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_lds_hangs_on_the_order_of_outputs_alone(seed):
    rng = np.random.default_rng(seed)
    scores = rng.standard_normal((20, 3))
    outputs = rng.integers(-4, 5, (9, 3))
    chosen = evaluate.subsets(20, 9, seed=seed)
    found = evaluate.lds(scores, chosen, outputs).per_query
    moved = evaluate.lds(scores, chosen, np.exp(outputs) + 3.0 * outputs).per_query
    assert found.tolist() == moved.tolist()
    assert evaluate.lds(-scores, chosen, outputs).per_query.tolist() == (-found + 0.0).tolist()
    assert (
        evaluate.lds(scores, chosen, outputs, target="margin").per_query.tolist()
        == (-found + 0.0).tolist()
    )


@pytest.mark.parametrize("side", ["scores", "outputs"])
def test_where_a_side_is_constant_the_lds_is_zero(side):
    scores, outputs, chosen = normal(20, 2), normal(8, 2, seed=1), evaluate.subsets(20, 8)
    (scores if side == "scores" else outputs)[:, 1] = 0.1
    found = evaluate.lds(scores, chosen, outputs).per_query
    assert found[0] != 0
    assert found[1] == 0


def test_tensors_are_taken():
    torch = pytest.importorskip("torch")
    scores, chosen = normal(20, 2), evaluate.subsets(20, 8)
    outputs = additive(scores, chosen)
    found = evaluate.lds(torch.tensor(scores), torch.tensor(chosen), torch.tensor(outputs))
    assert found.per_query.tolist() == [1.0, 1.0]


GOOD = {
    "scores": np.ones((4, 2)),
    "masks": np.array([[0, 1], [1, 2], [2, 3]]),
    "outputs": np.ones((3, 2)),
}


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"scores": np.ones(4)}, errors.ShapeError, r"scores must be \[examples, queries\]"),
        ({"scores": np.ones((4, 0))}, errors.ShapeError, "scores must be"),
        ({"scores": np.full((4, 2), np.nan)}, errors.NotFiniteError, "scores must be finite"),
        ({"scores": np.ones((4, 2)) > 0}, errors.DtypeError, "scores must be numbers"),
        ({"outputs": np.full((3, 2), np.inf)}, errors.NotFiniteError, "outputs must be finite"),
        ({"outputs": np.ones((3, 1, 1, 2))}, errors.ShapeError, "subsets, seeds, queries"),
        ({"outputs": np.ones((2, 2))}, errors.ShapeError, "of 3 subsets and 2 queries"),
        ({"outputs": np.ones((3, 5))}, errors.ShapeError, "of 3 subsets and 2 queries"),
        ({"masks": np.array([[0, 4]])}, errors.ArgumentError, "from 0 to 3, got 4"),
        ({"masks": np.array([[-1, 2]])}, errors.ArgumentError, "from 0 to 3, got -1"),
        ({"masks": np.array([[0, 1, 1, 0]])}, errors.ArgumentError, "got 0 twice"),
        ({"masks": np.ones((3, 4))}, errors.DtypeError, "must be bool or integers, got float64"),
        ({"masks": np.ones((3, 5), bool)}, errors.ShapeError, r"must be \[4\] bool"),
        ({"masks": np.zeros((3, 4), bool)}, errors.ShapeError, "must have an example"),
        ({"masks": np.arange(3)}, errors.ShapeError, "masks must be"),
        ({"masks": [[0]]}, errors.ShapeError, "at least two subsets"),
        ({"masks": []}, errors.ShapeError, "got none"),
        ({"masks": "all"}, errors.DtypeError, "masks must be"),
        ({"target": "accuracy"}, errors.ArgumentError, "target must be one of loss, margin"),
    ],
)
def test_what_has_no_lds_is_refused(change, error, match):
    with pytest.raises(error, match=match):
        evaluate.lds(**{**GOOD, **change})


# The noise ceiling


def test_the_ceiling_is_what_perfect_scores_reach():
    subsets, seeds, queries = 400, 3, 40
    truth = normal(subsets, queries)
    outputs = truth[:, None] + normal(subsets, seeds, queries, seed=1)
    found = evaluate.noise_ceiling(outputs)
    # Signal and noise have the same variance: seeds correlate to 1/2, means of three to
    # sqrt(3/4) with the truth. Of normal values Spearman is 6/pi asin(r/2).
    assert found.agreement == pytest.approx(6 / math.pi * math.asin(0.25), abs=0.01)
    measured = np.mean(
        [stats.spearmanr(truth[:, q], outputs[:, :, q].mean(1)).statistic for q in range(queries)]
    )
    assert found.ceiling == pytest.approx(measured, abs=0.02)
    assert found.with_seeds(1) == pytest.approx(math.sqrt(found.agreement))


def test_the_ceiling_is_the_formula():
    outputs = normal(12, 4, 5) + normal(12, 1, 5, seed=1)
    pairs = [
        stats.spearmanr(outputs[:, one, q], outputs[:, other, q]).statistic
        for q in range(5)
        for one, other in itertools.combinations(range(4), 2)
    ]
    r = np.mean(pairs)
    found = evaluate.noise_ceiling(outputs)
    assert found.agreement == pytest.approx(r)
    assert found.reliability == pytest.approx(4 * r / (1 + 3 * r))
    assert found.ceiling == pytest.approx(math.sqrt(4 * r / (1 + 3 * r)))
    assert "with 4 seeds" in str(found)


def test_seeds_that_disagree_have_a_ceiling_of_zero():
    outputs = np.stack([np.arange(9.0), -np.arange(9.0)], axis=1)[:, :, None]
    assert evaluate.noise_ceiling(outputs).ceiling == 0


@pytest.mark.parametrize("shape", [(5, 1, 3), (1, 5, 3)])
def test_one_seed_or_one_subset_has_no_ceiling(shape):
    with pytest.raises(errors.ShapeError, match="at least two subsets and two seeds"):
        evaluate.noise_ceiling(np.ones(shape))


# Comparisons


def figure(values, measure="LDS"):
    return evaluate.PerQuery(np.asarray(values), measure)


def test_the_interval_is_that_of_the_paired_differences():
    noise = normal(400)
    one, other = normal(400, seed=1) * 5 + noise + 0.1, normal(400, seed=1) * 5
    found = evaluate.compare(figure(one), figure(other))
    error = (one - other).std(ddof=1) / 20
    assert found.difference == pytest.approx((one - other).mean())
    assert found.low == pytest.approx(found.difference - 1.96 * error, abs=0.1 * error)
    assert found.high == pytest.approx(found.difference + 1.96 * error, abs=0.1 * error)
    assert found.probability == pytest.approx(stats.norm.cdf(found.difference / error), abs=0.01)


def test_a_constant_difference_is_certain():
    one = normal(30).round(2)
    found = evaluate.compare(figure(one + 0.5), figure(one), resamples=100)
    assert (found.low, found.high) == pytest.approx((0.5, 0.5))
    assert found.probability == 1
    same = evaluate.compare(figure(one), figure(one), resamples=100)
    assert (same.low, same.high, same.probability) == (0, 0, 0.5)


def test_the_interval_covers_runs_too():
    # Runs differ, queries do not: all that is uncertain is the choice of runs.
    shifts = normal(200)
    ones = [figure(np.full(10, shift)) for shift in shifts]
    others = [figure(np.zeros(10))] * 200
    found = evaluate.compare(ones, others)
    error = shifts.std() / math.sqrt(200)
    assert found.high - found.low == pytest.approx(2 * 1.96 * error, rel=0.05)
    assert "200 runs" in str(found)


def test_runs_are_paired():
    shifts = normal(6) * 100
    ones = [figure(np.arange(4) + shift + 1) for shift in shifts]
    others = [figure(np.arange(4) + shift) for shift in shifts]
    found = evaluate.compare(ones, others)
    assert (found.low, found.high) == pytest.approx((1, 1))


def test_the_other_way_round_is_the_negative():
    one, other = figure(normal(50)), figure(normal(50, seed=1))
    there, back = evaluate.compare(one, other), evaluate.compare(other, one)
    assert back.difference == -there.difference
    assert (back.low, back.high) == pytest.approx((-there.high, -there.low))
    assert back.probability == pytest.approx(1 - there.probability)


def test_the_same_seed_gives_the_same_interval_and_another_another():
    one, other = figure(normal(50)), figure(normal(50, seed=1))
    first = evaluate.compare(one, other, seed=1)
    assert evaluate.compare(one, other, seed=1) == first
    assert evaluate.compare(one, other, seed=2).low != first.low


def test_the_interval_does_not_hang_on_how_much_is_drawn_at_a_time(monkeypatch):
    one, other = figure(normal(50)), figure(np.zeros(50))
    whole = evaluate.compare(one, other, resamples=500)
    monkeypatch.setattr("whence.evaluate.measures.BLOCK", 50)
    assert evaluate.compare(one, other, resamples=500) == whole


@pytest.mark.parametrize(
    ("one", "other", "error", "match"),
    [
        (figure([1, 2]), figure([1.0]), errors.ShapeError, "the same queries"),
        ([figure([1])] * 2, [figure([1])], errors.ShapeError, "as many runs, got 2 and 1"),
        ([], [], errors.ShapeError, "one must have a run"),
        (figure([1]), figure([1], "recall"), errors.ArgumentError, "of one measure"),
        (figure([1]), np.ones(1), errors.DtypeError, "other must be what lds"),
    ],
)
def test_what_does_not_compare_is_refused(one, other, error, match):
    with pytest.raises(error, match=match):
        evaluate.compare(one, other)


@pytest.mark.parametrize("confidence", [0, 1, 95])
def test_a_confidence_is_between_zero_and_one(confidence):
    with pytest.raises(errors.ArgumentError, match="confidence must be between 0 and 1"):
        evaluate.compare(figure([1, 2]), figure([1, 2]), confidence=confidence)


def test_a_single_query_has_no_standard_error():
    assert math.isnan(figure([0.5]).standard_error)


def test_figures_that_are_not_finite_are_refused():
    with pytest.raises(errors.NotFiniteError):
        figure([0.5, np.nan])


# Subsets


def shuffle_of_the_page(count, seed, name):
    key = parameter_key(seed, name, [])
    found = list(range(count))
    for step in range(count):
        other = step + (value(key, step) * (count - step) >> 64)
        found[step], found[other] = found[other], found[step]
    return found


def test_subsets_are_the_first_parts_of_the_shuffles_of_the_page():
    found = evaluate.subsets(21, 4, 0.3, seed=9)
    for number, places in enumerate(found):
        expected = shuffle_of_the_page(21, 9, f"evaluate.subset.{number}")
        assert places.tolist() == sorted(expected[:6])


def test_more_subsets_begin_with_the_same():
    assert np.array_equal(evaluate.subsets(50, 9)[:4], evaluate.subsets(50, 4))


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ((1, 3), "examples must be at least 2"),
        ((10, 0), "count must be at least 1"),
        ((10, 3, 0.0), "share must be between 0 and 1"),
        ((10, 3, 0.01), "from 1 to 9 of 10 examples, got 0"),
        ((10, 3, 0.99), "from 1 to 9 of 10 examples, got 10"),
        ((10, 3, 0.5, -1), "seed must be from 0"),
    ],
)
def test_subsets_that_cannot_be_are_refused(arguments, match):
    with pytest.raises(errors.ArgumentError, match=match):
        evaluate.subsets(*arguments)


def test_leave_one_out_subsets_lack_one_each():
    assert evaluate.leave_one_out_subsets(4).tolist() == (~np.eye(4, dtype=bool)).tolist()
    found = evaluate.leave_one_out_subsets(5, [3, 0])
    assert [np.flatnonzero(~each).tolist() for each in found] == [[3], [0]]
    for wrong in ([5], [1, 1], []):
        with pytest.raises(errors.ArgumentError, match="left_out"):
            evaluate.leave_one_out_subsets(5, wrong)


# Retraining


WEIGHTS = normal(20, 3, seed=8)


def train(places, seed):
    return WEIGHTS[places].sum(axis=0) + seed / 7


def outputs_of(model):
    return model


def test_results_stand_where_subset_and_seed_do():
    chosen = evaluate.subsets(20, 4)
    found = evaluate.retrain(train, chosen, [5, 2], outputs_of)
    assert found.shape == (4, 2, 3)
    for number, places in enumerate(chosen):
        for place, seed in enumerate((5, 2)):
            expected = WEIGHTS[places].sum(axis=0) + seed / 7
            assert found[number, place].tolist() == expected.tolist()


def test_a_number_of_seeds_counts_from_zero():
    chosen = evaluate.subsets(20, 2)
    first = evaluate.retrain(train, chosen, 2, outputs_of)
    assert np.array_equal(first, evaluate.retrain(train, chosen, [0, 1], outputs_of))


class Stopped(Exception):
    pass


class Counting:
    """Trains, and stops after a number of trainings."""

    def __init__(self, most=None):
        self.calls = []
        self.most = most

    def __call__(self, places, seed):
        if len(self.calls) == self.most:
            raise Stopped
        self.calls.append((places.tolist(), seed))
        found = train(places, seed)
        places[:] = 0  # what a caller does to its argument is its own business
        return found


def test_what_was_interrupted_goes_on_and_gives_the_same(tmp_path):
    chosen = evaluate.subsets(20, 5)
    whole = evaluate.retrain(train, chosen, 2, outputs_of)
    with pytest.raises(Stopped):
        evaluate.retrain(Counting(7), chosen, 2, outputs_of, tmp_path / "r")
    rest = Counting()
    again = evaluate.retrain(rest, chosen, 2, outputs_of, tmp_path / "r")
    assert np.array_equal(again, whole)
    assert len(rest.calls) == 3
    none = Counting()
    assert np.array_equal(evaluate.retrain(none, chosen, 2, outputs_of, tmp_path / "r"), whole)
    assert none.calls == []


KILLED = """
import os, signal, sys
sys.path[:0] = {path!r}
import numpy as np
from whence import evaluate

weights, calls = np.load({weights!r}), []

def train(places, seed):
    calls.append(seed)
    if len(calls) == 6:
        os.kill(os.getpid(), signal.SIGKILL)
    return weights[places].sum(axis=0) + seed / 7

evaluate.retrain(train, evaluate.subsets(20, 5), 2, lambda model: model, {folder!r})
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGKILL")
def test_what_was_killed_goes_on(tmp_path):
    np.save(tmp_path / "weights.npy", WEIGHTS)
    code = KILLED.format(
        path=sys.path, weights=str(tmp_path / "weights.npy"), folder=str(tmp_path / "r")
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    rest = Counting()
    chosen = evaluate.subsets(20, 5)
    again = evaluate.retrain(rest, chosen, 2, outputs_of, tmp_path / "r")
    assert len(rest.calls) == 5
    assert np.array_equal(again, evaluate.retrain(train, chosen, 2, outputs_of))


def test_a_result_that_was_not_written_whole_is_made_again(tmp_path):
    chosen = evaluate.subsets(20, 2)
    whole = evaluate.retrain(train, chosen, 1, outputs_of, tmp_path)
    file = tmp_path / "subset-000001-seed-0.json"
    file.rename(file.with_suffix(".part"))  # as a process leaves it that dies while it writes
    rest = Counting()
    assert np.array_equal(evaluate.retrain(rest, chosen, 1, outputs_of, tmp_path), whole)
    assert rest.calls == [(chosen[1].tolist(), 0)]


def test_more_subsets_and_seeds_are_added(tmp_path):
    evaluate.retrain(train, evaluate.subsets(20, 3), 1, outputs_of, tmp_path)
    more = Counting()
    found = evaluate.retrain(more, evaluate.subsets(20, 5), 2, outputs_of, tmp_path)
    assert len(more.calls) == 5 * 2 - 3
    fewer = evaluate.retrain(Counting(0), evaluate.subsets(20, 2), 2, outputs_of, tmp_path)
    assert np.array_equal(fewer, found[:2])


def test_a_folder_of_other_subsets_is_refused_before_any_training(tmp_path):
    evaluate.retrain(train, evaluate.subsets(20, 3), 1, outputs_of, tmp_path)
    with pytest.raises(errors.MismatchError, match="which is of another subset 0"):
        evaluate.retrain(Counting(0), evaluate.subsets(20, 3, seed=1), [7], outputs_of, tmp_path)


def test_a_folder_of_other_queries_is_refused(tmp_path):
    chosen = evaluate.subsets(20, 3)
    evaluate.retrain(train, chosen[:2], 1, outputs_of, tmp_path)
    with pytest.raises(errors.MismatchError, match="subset 2, seed 0 must be of 3 queries"):
        evaluate.retrain(train, chosen, 1, lambda model: model[:2], tmp_path)


def test_a_damaged_result_is_named(tmp_path):
    chosen = evaluate.subsets(20, 2)
    evaluate.retrain(train, chosen, 1, outputs_of, tmp_path)
    file = tmp_path / "subset-000000-seed-0.json"
    file.write_bytes(file.read_bytes().replace(b'"seed": 0', b'"seed": 1'))
    with pytest.raises(errors.StoreError, match=r"subset-000000-seed-0\.json is damaged"):
        evaluate.retrain(train, chosen, 1, outputs_of, tmp_path)


@pytest.mark.parametrize("outputs", [[10**400, 1, 2], [None] * 3, ["1", "2", "3"], [], 1, [[1]]])
def test_what_no_model_gave_is_refused(tmp_path, outputs):
    evaluate.retrain(train, evaluate.subsets(20, 2), 1, outputs_of, tmp_path)
    file = tmp_path / "subset-000000-seed-0.json"
    write_json(file, {**read_json(file), "outputs": outputs})
    with pytest.raises(errors.StoreError, match=r"subset-000000-seed-0\.json is damaged"):
        evaluate.retrain(train, evaluate.subsets(20, 2), 1, outputs_of, tmp_path)


def test_results_can_be_read_by_people(tmp_path):
    evaluate.retrain(train, [[3, 1]], [4], outputs_of, tmp_path)
    text = (tmp_path / "subset-000000-seed-4.json").read_text().splitlines()[0]
    body = json.loads(text)
    assert (body["subset"], body["seed"]) == (0, 4)
    assert body["outputs"] == train([1, 3], 4).tolist()


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"seeds": []}, errors.ArgumentError, "seeds must be distinct, at least one"),
        ({"seeds": [1, 1]}, errors.ArgumentError, "seeds must be distinct"),
        ({"seeds": [-1]}, errors.ArgumentError, "seeds must be at least 0"),
        ({"seeds": 0}, errors.ArgumentError, "seeds must be at least 1"),
        ({"seeds": 1.5}, errors.DtypeError, "seeds must be an integer"),
        ({"train": 3}, errors.DtypeError, "train must be a function"),
        ({"outputs": 3}, errors.DtypeError, "outputs must be a function"),
        (
            {"outputs": lambda model: model * np.nan},
            errors.NotFiniteError,
            "outputs of subset 0, seed 0 must be finite",
        ),
        ({"outputs": lambda model: 1.0}, errors.ShapeError, r"must be \[queries\], got \[\]"),
        ({"masks": [[-1]]}, errors.ArgumentError, "at least 0, got -1"),
        ({"path": __file__}, errors.StoreError, "path must be a folder, got the file"),
        ({"path": 3}, errors.DtypeError, "path must be a path"),
        ({"progress": 1}, errors.DtypeError, "progress must be a bool or None"),
    ],
)
def test_what_cannot_be_retrained_is_refused(change, error, match):
    given_ = {"train": train, "masks": [[0, 1]], "seeds": 1, "outputs": outputs_of}
    with pytest.raises(error, match=match):
        evaluate.retrain(**{**given_, **change})


def test_models_with_different_numbers_of_outputs_are_refused():
    with pytest.raises(errors.ShapeError, match="subset 1, seed 0 must be of 2 queries"):
        evaluate.retrain(lambda places, seed: places, [[0, 1], [0]], 1, lambda places: places)


# Leave one out


def test_leave_one_out_is_pearsons_correlation():
    scores, changes = normal(30, 4), normal(30, 4, seed=1) * 1e-200
    found = evaluate.leave_one_out(scores, changes)
    expected = [stats.pearsonr(scores[:, q], changes[:, q] * 1e200).statistic for q in range(4)]
    assert found.per_query == pytest.approx(expected)


def test_a_constant_column_correlates_to_zero():
    scores, changes = normal(30, 3), normal(30, 3, seed=1)
    scores[:, 0] = 0.1
    changes[:, 1] = 1 / 3
    found = evaluate.leave_one_out(scores, changes).per_query
    assert found[:2].tolist() == [0, 0]
    assert found[2] != 0


def test_changes_by_retraining_are_those_of_a_model_that_is_its_mean():
    points, queries = normal(12), normal(5, seed=1)

    def mean(places, seed):
        return points[places].mean()

    def losses(model):
        return (queries - model) ** 2

    masks = evaluate.leave_one_out_subsets(12)
    without = evaluate.retrain(mean, masks, 1, losses).mean(axis=1)
    whole = evaluate.retrain(mean, [np.arange(12)], 1, losses).mean(axis=1)
    # Without point i the mean moves by (mean - points[i]) / 11.
    move = (points.mean() - points)[:, None] / 11
    exact = move**2 - 2 * move * (queries - points.mean())
    assert without - whole == pytest.approx(exact)
    assert evaluate.leave_one_out(exact, without - whole).per_query == pytest.approx(np.ones(5))


def test_leave_one_out_of_different_shapes_is_refused():
    with pytest.raises(errors.ShapeError, match="changes must be of the examples"):
        evaluate.leave_one_out(np.ones((3, 2)), np.ones((2, 3)))


# Wrong labels


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 4), st.booleans()), min_size=2, max_size=40))
def test_the_auc_counts_pairs(pairs):
    scores = np.array([score for score, _ in pairs], np.float64)
    wrong = np.array([flag for _, flag in pairs])
    if wrong.all() or not wrong.any():
        with pytest.raises(errors.ArgumentError, match="wrong must hold both kinds"):
            evaluate.mislabel_auc(scores, wrong)
        return
    wins = [(a > b) + (a == b) / 2 for a in scores[wrong] for b in scores[~wrong]]
    assert evaluate.mislabel_auc(scores, wrong) == pytest.approx(np.mean(wins))
    assert evaluate.mislabel_auc(scores, wrong) == pytest.approx(roc_auc_score(wrong, scores))


def test_the_share_found_counts_the_highest():
    scores = np.array([5.0, 4.0, 4.0, 1.0])
    wrong = np.array([False, True, False, True])
    assert [evaluate.share_found(scores, wrong, n) for n in (1, 2, 4)] == [0, 0.5, 1]


def detectors(examples=600, flipped=60):
    wrong = np.zeros(examples, bool)
    wrong[:flipped] = True
    shared = normal(examples)
    return wrong, wrong * 1.5 + shared, wrong * 1.2 + shared + normal(examples, seed=1) * 0.5


@pytest.mark.parametrize("block", [1 << 22, 5000])
def test_the_interval_of_two_aucs_is_as_wide_as_delongs(block, monkeypatch):
    monkeypatch.setattr("whence.evaluate.wrong_labels.BLOCK", block)
    wrong, scores, losses = detectors()
    found = evaluate.mislabel(scores, wrong, losses)
    # DeLong, DeLong and Clarke-Pearson (Biometrics 1988): the variance of a difference of AUCs by
    # what each example adds to it.
    placed = [
        (values[wrong][:, None] > values[~wrong]) + (values[wrong][:, None] == values[~wrong]) / 2
        for values in (scores, losses)
    ]
    apart = placed[0] - placed[1]
    variance = sum(apart.mean(axis=axis).var(ddof=1) / apart.shape[1 - axis] for axis in (0, 1))
    error = math.sqrt(variance)
    assert found.auc - found.baseline == pytest.approx(apart.mean())
    assert found.high - found.low == pytest.approx(2 * 1.96 * error, rel=0.1)
    assert found.auc == pytest.approx(roc_auc_score(wrong, scores))
    assert found.baseline == pytest.approx(roc_auc_score(wrong, losses))


def test_scores_that_are_the_loss_are_no_better():
    wrong, scores, _ = detectors()
    found = evaluate.mislabel(scores, wrong, scores * 2, resamples=50)
    assert (found.low, found.high, found.probability) == (0, 0, 0.5)


def test_the_table_has_both_detectors():
    wrong, scores, losses = detectors()
    found = evaluate.mislabel(scores, wrong, losses, inspected=100, resamples=50)
    text = str(found)
    assert f"{found.auc:.3f}" in text
    assert "loss (baseline)" in text
    assert found.found == evaluate.share_found(scores, wrong, 100)
    assert found.baseline_found == evaluate.share_found(losses, wrong, 100)
    assert f"{found.baseline_found:.1%}" in text


def test_losses_that_are_not_finite_are_named():
    wrong, scores, losses = detectors()
    losses[3] = np.nan
    with pytest.raises(errors.NotFiniteError, match="losses must be finite"):
        evaluate.mislabel(scores, wrong, losses)


# Removal


VOTES = np.random.default_rng(4).integers(-3, 4, (25, 8))


def vote(places, seed):
    return VOTES[places].sum(axis=0)


def test_brittleness_is_the_smallest_removal_that_turns_a_vote():
    ks = [1, 2, 3, 5, 8]
    sign = np.where(VOTES.sum(axis=0) >= 0, 1, -1)
    scores = VOTES * sign  # helpful is who votes with the majority

    def predict(model):
        return (model >= 0).astype(np.int64)

    found = evaluate.brittleness(scores, vote, predict, ks=ks)
    expected = []
    for query in range(8):
        ordered = sorted(range(25), key=lambda i: (-scores[i, query], i))
        turned = [
            k for k in ks if (VOTES[ordered[k:], query].sum() >= 0) != (VOTES[:, query].sum() >= 0)
        ]
        expected.append(min(turned, default=math.inf))
    assert found.smallest.tolist() == expected
    assert np.isfinite(found.smallest).any()
    assert not np.isfinite(found.smallest).all()
    assert found.changed.tolist() == [np.mean(found.smallest <= k) for k in ks]
    assert "median" in str(found)


def test_brittleness_stops_at_the_first_change_and_keeps_what_it_trained(tmp_path):
    calls = []

    def training(places, seed):
        calls.append(len(places))
        return len(places)

    def predict(model):
        return np.array([model < 19, model < 16])

    scores = np.zeros((20, 2))
    found = evaluate.brittleness(scores, training, predict, ks=[1, 2, 4, 6], path=tmp_path)
    assert found.smallest.tolist() == [2, 6]
    assert calls == [20, 19, 18, 19, 18, 16, 14]
    evaluate.brittleness(scores, training, predict, ks=[1, 2, 4, 6], path=tmp_path)
    assert len(calls) == 7


def test_the_median_is_infinite_where_half_never_change():
    found = evaluate.Brittleness(np.array([20, math.inf, math.inf]), [20])
    assert found.median == math.inf
    assert evaluate.Brittleness(np.array([20.0, 40, math.inf]), [20, 40]).median == 40


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"ks": [3, 2]}, errors.ArgumentError, "ks must rise"),
        ({"ks": []}, errors.ArgumentError, "ks must rise"),
        ({"ks": [25]}, errors.ArgumentError, "ks must be from 1 to 24"),
        ({"ks": 3}, errors.DtypeError, "ks must be a list"),
        ({"predict": lambda model: model / 2}, errors.DtypeError, r"predictions must be \[8\] int"),
        ({"predict": lambda model: model[:2]}, errors.DtypeError, "predictions must be"),
        ({"scores": np.ones(25)}, errors.ShapeError, "scores must be"),
    ],
)
def test_brittleness_that_cannot_be_is_refused(change, error, match):
    given_ = {"scores": VOTES, "train": vote, "predict": lambda model: model, "ks": [1]}
    with pytest.raises(error, match=match):
        evaluate.brittleness(**{**given_, **change})


def test_brittleness_trains_nothing_where_progress_cannot_be():
    with pytest.raises(errors.DtypeError, match="progress must be a bool or None, got 'no'"):
        evaluate.brittleness(VOTES, pytest.fail, lambda model: model, ks=[1], progress="no")


def test_removing_examples_takes_their_sum_away():
    scores, ks = normal(15, 3), [1, 4, 9]

    def losses(model):
        return -model

    def additive_model(places, seed):
        return scores[places].sum(axis=0) + seed

    found = evaluate.removal_curve(scores, additive_model, losses, ks, seeds=2, draws=3, seed=6)
    ordered = np.sort(scores, axis=0)
    assert found.helpful == pytest.approx(np.array([ordered[-k:].sum(axis=0) for k in ks]))
    assert found.harmful == pytest.approx(np.array([ordered[:k].sum(axis=0) for k in ks]))
    orders = [shuffle_of_the_page(15, 6, f"evaluate.removal.{draw}") for draw in range(3)]
    expected = [np.mean([scores[order[:k]].sum(axis=0) for order in orders], axis=0) for k in ks]
    assert found.random == pytest.approx(np.array(expected))
    assert str(found).splitlines()[1].split() == ["removed", "helpful", "random", "harmful"]


def test_one_ranking_for_all_queries_is_read_for_all():
    own = normal(10, 4)
    ranking = own.sum(axis=1)
    found = evaluate.removal_curve(
        ranking, lambda places, seed: -own[places].sum(axis=0), lambda model: model, [2, 3]
    )
    order = np.argsort(-ranking)
    best = [own[order[:k]].sum(axis=0) for k in (2, 3)]
    worst = [own[order[-k:]].sum(axis=0) for k in (2, 3)]
    assert found.helpful == pytest.approx(np.array(best))
    assert found.harmful == pytest.approx(np.array(worst))


def test_a_removal_curve_goes_on_where_it_stopped(tmp_path):
    given_ = {"outputs": outputs_of, "ks": [1, 2], "path": tmp_path}
    with pytest.raises(Stopped):
        evaluate.removal_curve(normal(20, 3), Counting(5), **given_)
    rest = Counting()
    evaluate.removal_curve(normal(20, 3), rest, **given_)
    assert len(rest.calls) == 1 + 2 * (3 + 3 + 1) - 5


def test_outputs_of_other_queries_than_the_scores_are_refused():
    with pytest.raises(errors.ShapeError, match="of the 2 queries of scores, got 3"):
        evaluate.removal_curve(normal(20, 2), train, outputs_of, [1])


# Retrieval


FOUND = [["a", "b", "c"], ["d", "a", "b"], ["c", "d", "e"]]
RELEVANT = [["b"], ["a", "b", "x", "y"], ["z"]]


def test_recall_is_the_share_of_relevant_ids_among_the_first():
    assert evaluate.recall_at_k(FOUND, RELEVANT, 1).per_query.tolist() == [0, 0, 0]
    assert evaluate.recall_at_k(FOUND, RELEVANT, 2).per_query.tolist() == [1, 0.25, 0]
    found = evaluate.recall_at_k(np.array(FOUND), RELEVANT, 3)
    assert found.per_query.tolist() == [1, 0.5, 0]
    assert found.measure == "recall@3"


def test_the_reciprocal_rank_is_that_of_the_first_relevant():
    found = evaluate.mean_reciprocal_rank(FOUND, RELEVANT)
    assert found.per_query.tolist() == [1 / 2, 1 / 2, 0]
    assert found.mean == pytest.approx(1 / 3)


def test_hits_are_read_by_their_helpful_side():
    from whence import Matrix

    source = Matrix(np.eye(4, dtype=np.float32), ids=[10, 11, 12, 13])
    hits = source.scan(source.ask(np.array([[[1, 3, 2, 0]]], np.float32), 3))
    assert evaluate.mean_reciprocal_rank(hits, [[12]]).per_query.tolist() == [1 / 2]
    assert evaluate.recall_at_k(hits, [[12, 13]], 3).per_query.tolist() == [1 / 2]
    harmful = source.scan(source.ask(np.ones((1, 1, 4), np.float32), 3, side="harmful"))
    with pytest.raises(errors.ShapeError, match="a helpful side"):
        evaluate.recall_at_k(harmful, [[12]], 1)


@pytest.mark.parametrize(
    ("found", "relevant", "k", "error", "match"),
    [
        (FOUND, RELEVANT[:2], 1, errors.ShapeError, "one list of ids for each of 3 queries"),
        (FOUND, [["a"], [], ["b"]], 1, errors.ArgumentError, r"relevant\[1\] must be a list of at"),
        (FOUND, [["a"], [3], ["b"]], 1, errors.IdError, r"relevant\[1\] must be str"),
        (FOUND, [["a"], ["b", "b"], ["b"]], 1, errors.IdError, "got 'b' twice"),
        (FOUND, RELEVANT, 4, errors.ArgumentError, "k must be from 1 to 3"),
        ([["a", "a"]], [["a"]], 1, errors.IdError, r"found\[0\] must be distinct"),
        (["a"], [["a"]], 1, errors.ShapeError, "found must be hits"),
        ([[0.5]], [[1]], 1, errors.IdError, "must be all integers or all strings"),
    ],
)
def test_what_has_no_recall_is_refused(found, relevant, k, error, match):
    with pytest.raises(error, match=match):
        evaluate.recall_at_k(found, relevant, k)
