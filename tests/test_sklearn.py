"""The scikit-learn transformer: scikit-learn's own checks, and the rows of `whence.Sketch`."""

import copy
import pickle
import subprocess
import sys

import joblib
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import sklearn
from sklearn.base import clone
from sklearn.datasets import load_digits
from sklearn.exceptions import NotFittedError
from sklearn.linear_model import RidgeClassifier
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.utils.estimator_checks import parametrize_with_checks

import whence
import whence.sklearn
from whence import errors
from whence.sketch import KINDS
from whence.sklearn import GradientSketch


def normal(samples=20, features=300, seed=0):
    return np.random.default_rng(seed).normal(size=(samples, features)).astype(np.float32)


@parametrize_with_checks(
    [GradientSketch(n_components=32), GradientSketch(n_components=32, normalize=True)]
)
def test_scikit_learns_own_checks(estimator, check):
    check(estimator)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("seed", [0, 7, 2**64 - 1])
def test_rows_are_those_of_sketch(kind, seed, normalize):
    sketch = GradientSketch(100, kind=kind, random_state=seed, normalize=normalize)
    found = sketch.fit_transform(normal())
    expected = whence.Sketch(kind, dim=100, seed=seed, normalize=normalize)(normal())
    assert found.dtype == np.float32
    assert np.array_equal(found, expected)


@pytest.mark.parametrize("dtype", [np.float64, np.float16, np.int64, np.uint8, np.bool_])
def test_other_types_are_rounded_to_float32(dtype):
    x = (10 * np.abs(normal())).astype(dtype)
    sketch = GradientSketch(64, random_state=0).fit(x)
    found = sketch.transform(x)
    assert found.dtype == np.float32
    assert np.array_equal(found, sketch.sketch_(x.astype(np.float32)))


def test_normalized_rows_are_of_norm_1():
    found = GradientSketch(64, random_state=0, normalize=True).fit_transform(normal())
    assert np.allclose(np.linalg.norm(found.astype(np.float64), axis=1), 1, atol=1e-6)


def test_inner_products_scatter_as_predicted():
    x = normal(2, 400)
    x[1] = 0.6 * x[0] + 0.8 * x[1]
    norms = np.linalg.norm(x, axis=1).prod()
    exact = float(x[0] @ x[1]) / norms
    found = []
    for seed in range(1000):
        rows = GradientSketch(64, random_state=seed).fit_transform(x)
        found.append(rows[0] @ rows[1] / norms - exact)
    expected = GradientSketch(64).fit(x).sketch_.expected_error(exact)
    # 1,000 draws: the mean scatters by 1/32 of a deviation, the deviation by about 3 %.
    assert abs(np.mean(found)) < 4 * expected / np.sqrt(1000)
    assert 0.8 < np.std(found) / expected < 1.1


@pytest.mark.parametrize("form", ["csr_matrix", "csr_array", "csc_array", "coo_array"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int64])
@pytest.mark.parametrize("normalize", [False, True])
def test_sparse_is_the_same_bits_as_dense(form, dtype, normalize):
    dense = np.where(normal(seed=1) > 1, 10 * normal(), 0).astype(dtype)
    sketch = GradientSketch(50, random_state=0, normalize=normalize).fit(dense)
    assert np.array_equal(sketch.transform(getattr(sp, form)(dense)), sketch.transform(dense))


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("dense", [True, False])
@pytest.mark.parametrize(("block", "most"), [(1, 1), (8 * 50 + 4 * 300, 4), (2**26, 20)])
def test_blocks_change_no_bit_and_stay_within_their_size(
    monkeypatch, block, most, dense, normalize
):
    x = normal()
    sketch = GradientSketch(50, random_state=0, normalize=normalize).fit(x)
    expected, sizes, call = sketch.transform(x), [], whence.Sketch.__call__
    monkeypatch.setattr(whence.sklearn, "_BLOCK", block)
    monkeypatch.setattr(
        whence.Sketch, "__call__", lambda self, part: (sizes.append(len(part)), call(self, part))[1]
    )
    assert np.array_equal(sketch.transform(x if dense else sp.csr_array(x)), expected)
    assert sum(sizes) == 20
    assert max(sizes) <= most


def test_a_sparse_array_is_never_dense_as_a_whole(monkeypatch):
    # 2**40 values, 4 TiB if dense: only its first rows are asked for.
    class Enough(Exception):
        pass

    def first(self, part):
        assert part.nbytes + 8 * len(part) * 64 <= whence.sklearn._BLOCK
        raise Enough

    x = sp.csr_array(([1.0], ([0], [5])), shape=(2**20, 2**20))
    sketch = GradientSketch(64, random_state=0).fit(x)
    monkeypatch.setattr(whence.Sketch, "__call__", first)
    with pytest.raises(Enough):
        sketch.transform(x)


def test_a_number_is_the_seed_and_anything_else_draws_one():
    x = normal()
    assert GradientSketch(random_state=np.int64(3)).fit(x).seed_ == 3
    state = np.random.RandomState(0)
    first, second = (GradientSketch(8, random_state=state).fit(x) for _ in range(2))
    assert first.seed_ != second.seed_
    assert first.seed_ == GradientSketch(8, random_state=np.random.RandomState(0)).fit(x).seed_
    again = GradientSketch(8, random_state=first.seed_).fit(x)
    assert np.array_equal(again.transform(x), first.transform(x))
    drawn = GradientSketch(8).fit(x)
    assert drawn.seed_ != GradientSketch(8).fit(x).seed_
    assert np.array_equal(drawn.transform(x), drawn.transform(x))


def test_threads_are_n_jobs_as_scikit_learn_counts_and_change_no_bit():
    x = normal()
    expected = GradientSketch(64, random_state=0).fit_transform(x)
    for n_jobs, threads in ((None, 1), (3, 3), (-1, joblib.effective_n_jobs(-1))):
        sketch = GradientSketch(64, random_state=0, n_jobs=n_jobs).fit(x)
        assert sketch.sketch_._threads == threads
        assert np.array_equal(sketch.transform(x), expected)
    with joblib.parallel_config(backend="threading", n_jobs=2):
        assert GradientSketch(64).fit(x).sketch_._threads == 2


def test_a_parameter_set_later_counts_from_the_next_fit():
    x = normal()
    sketch = GradientSketch(64, random_state=0).fit(x)
    expected = sketch.transform(x)
    sketch.set_params(n_components=8, random_state=1, normalize=True)
    assert np.array_equal(sketch.transform(x), expected)
    assert np.array_equal(pickle.loads(pickle.dumps(sketch)).transform(x), expected)
    assert sketch.fit(x).transform(x).shape == (20, 8)


@pytest.mark.parametrize("copied", [lambda it: pickle.loads(pickle.dumps(it)), copy.deepcopy])
@pytest.mark.parametrize("normalize", [False, True])
def test_a_copy_gives_the_same_rows(copied, normalize):
    x = normal()
    sketch = GradientSketch(64, normalize=normalize, n_jobs=2).fit(x)
    other = copied(sketch)
    assert other.seed_ == sketch.seed_
    assert np.array_equal(other.transform(x), sketch.transform(x))
    assert isinstance(sketch.sketch_, whence.Sketch)
    with pytest.raises(NotFittedError):
        copied(clone(sketch)).transform(x)


def test_a_pickle_of_another_definition_of_randomness_is_refused(monkeypatch):
    sketch = GradientSketch(64).fit(normal())
    with monkeypatch.context() as patch:
        patch.setattr(whence.sketch, "HASH_VERSION", whence.HASH_VERSION + 1)
        data = pickle.dumps(sketch)
    with pytest.raises(errors.MismatchError, match="hash_version"):
        pickle.loads(data)


def test_clone_is_unfitted_with_the_same_parameters():
    sketch = GradientSketch(64, random_state=5, normalize=True, n_jobs=2).fit(normal())
    other = clone(sketch)
    assert other.get_params() == sketch.get_params()
    with pytest.raises(NotFittedError, match="GradientSketch"):
        other.transform(normal())


def test_grid_search_over_a_pipeline_finds_that_wider_is_better():
    x, y = load_digits(return_X_y=True)
    steps = make_pipeline(GradientSketch(random_state=0), RidgeClassifier())
    search = GridSearchCV(steps, {"gradientsketch__n_components": [2, 128]}, cv=2).fit(x, y)
    assert search.best_params_ == {"gradientsketch__n_components": 128}
    assert search.best_estimator_[0].transform(x).shape == (len(x), 128)
    assert search.best_score_ > search.cv_results_["mean_test_score"].min() + 0.2


def test_a_frame_in_and_a_frame_out():
    frame = pd.DataFrame(normal(features=3), columns=["a", "b", "c"], index=range(5, 25))
    sketch = GradientSketch(4, random_state=0).set_output(transform="pandas").fit(frame)
    found = sketch.transform(frame)
    assert sketch.feature_names_in_.tolist() == ["a", "b", "c"]
    assert found.columns.tolist() == [f"gradientsketch{i}" for i in range(4)]
    assert found.columns.tolist() == sketch.get_feature_names_out().tolist()
    assert found.index.equals(frame.index)
    assert np.array_equal(found.to_numpy(), whence.Sketch(dim=4)(frame.to_numpy()))
    with pytest.raises(ValueError, match="feature names"):
        sketch.transform(frame.rename(columns={"a": "z"}))


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"n_components": 0}, errors.ArgumentError, "n_components must be from 1 to 1048576"),
        ({"n_components": "auto"}, errors.DtypeError, "n_components must be an integer"),
        ({"kind": "nothing"}, errors.ArgumentError, f"kind must be one of {', '.join(KINDS)}"),
        ({"random_state": -1}, errors.ArgumentError, "random_state must be from 0"),
        ({"random_state": 2**64}, errors.ArgumentError, "random_state must be from 0"),
        ({"random_state": True}, errors.DtypeError, "random_state must be an integer"),
        ({"random_state": "a"}, ValueError, "'a' cannot be used to seed"),
        ({"normalize": "l2"}, errors.DtypeError, "normalize must be"),
        ({"n_jobs": 1.5}, errors.DtypeError, "n_jobs must be an integer or None, got float 1.5"),
        ({"n_jobs": 0}, ValueError, "n_jobs == 0"),
    ],
)
def test_a_wrong_argument_is_named_in_fit(arguments, error, match):
    sketch = GradientSketch(**arguments)
    with pytest.raises(error, match=match):
        sketch.fit(normal())
    assert not hasattr(sketch, "n_features_in_")


@pytest.mark.parametrize(
    ("x", "match"),
    [
        (np.full((2, 3), np.nan), "Input X contains NaN"),
        (np.full((2, 3), np.inf), "Input X contains infinity"),
        (np.full((2, 3), 1e300), "Input X contains infinity or a value too large"),
        (sp.csr_array([[0, np.nan, 1]]), "Input X contains NaN"),
        (sp.csr_array([[0, 1e300, 1]]), "Input X contains infinity or a value too large"),
        (np.ones((2, 4)), "X has 4 features, but GradientSketch is expecting 3"),
        (sp.csr_array(np.ones((2, 4))), "X has 4 features, but GradientSketch is expecting 3"),
        (np.ones((0, 3)), "0 sample"),
        (np.ones(3), "Expected 2D array"),
        (np.ones((2, 3), complex), "Complex data not supported"),
        ([["a", "b", "c"]], "could not convert string to float"),
    ],
)
def test_a_wrong_x_is_refused_by_scikit_learn(x, match):
    with pytest.raises(ValueError, match=match):
        GradientSketch(8, random_state=0).fit(np.ones((2, 3))).transform(x)


def test_a_row_beyond_float32_is_reported_with_its_block(monkeypatch):
    x = np.ones((6, 2000), np.float32)
    x[5] = 3e38
    monkeypatch.setattr(whence.sklearn, "_BLOCK", 2 * 8)
    with pytest.raises(errors.NotFiniteError, match=r"X must have .* from rows 4 to 5"):
        GradientSketch(1, random_state=0).fit_transform(x)


def run(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)


def test_scikit_learn_comes_only_when_asked_for_and_torch_not_at_all():
    done = run(
        "import sys, whence; print('sklearn' in sys.modules)\n"
        "import whence.sklearn; print('torch' in sys.modules)"
    )
    assert done.stdout.split() == ["False", "False"]


@pytest.mark.parametrize(
    "without",
    [
        "sys.modules['sklearn'] = None",
        "import sklearn.utils.validation as v; del v.validate_data  # as before 1.6",
    ],
)
def test_a_missing_or_old_scikit_learn_is_named(without):
    done = run(
        f"import sys, whence\n{without}\n"
        "try:\n    import whence.sklearn\n"
        "except whence.errors.MissingDependencyError as error:\n    print(error)"
    )
    expected = "whence.sklearn needs scikit-learn: pip install 'scikit-learn>=1.6'"
    assert done.stdout.strip() == expected


@pytest.mark.parametrize("rows", [10, 4000])
def test_the_callers_configuration_holds_whatever_the_size(rows):
    x = np.ones((rows, 300), np.float32)
    x[3, 3] = np.nan
    with sklearn.config_context(assume_finite=True):
        assert GradientSketch(8, random_state=0).fit(x).n_features_in_ == 300
    with pytest.raises(ValueError, match="NaN"):
        GradientSketch(8, random_state=0).fit(x)


def test_names_of_features_are_learnt_and_forgotten():
    frame = pd.DataFrame(np.ones((4000, 300), np.float32)).rename(columns="feature {}".format)
    sketch = GradientSketch(8, random_state=0).fit(frame)
    assert sketch.feature_names_in_[2] == "feature 2"
    sketch.fit(np.ones((4000, 299), np.float32))
    assert not hasattr(sketch, "feature_names_in_")
    assert sketch.n_features_in_ == 299
