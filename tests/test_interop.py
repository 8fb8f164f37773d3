"""Folders of trak and bergson give the scores of trak and bergson.

The folders are written here as those libraries write them (read off `trak/savers.py` of traker
0.3.2, and `bergson/data.py`, `builder.py` and `gradients.py` of bergson 2.5.1), and the scores are
their formulas in plain numpy (`trak/score_computers.py` and `finalize_scores`;
`bergson/query/attributor.py` and `hessians/inversion.py`). `benches/test_interop.py` compares with
the libraries themselves.
"""

import contextlib
import json
import subprocess
import sys
import tracemalloc

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import whence
from whence import errors
from whence.interop import from_bergson, from_trak
from whence.interop.hessian import INVERSIONS, Hessian


def close(found, expected, relative=2e-6):
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() <= relative * np.abs(expected).max()


# trak

EXAMPLES, TARGETS, DIM, MODELS = 90, 7, 12, 3


def mmap(path, values):
    """As trak's saver: a `.npy` file by another name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    array = np.lib.format.open_memmap(path, mode="w+", dtype=values.dtype, shape=values.shape)
    array[:] = values
    array.flush()


def features_of(grads, ridge=0.1):
    """`get_x_xtx_inv` of trak, which divides the inverse by the mean size of its entries."""
    inverse = np.linalg.inv(grads.T @ grads + ridge * np.eye(grads.shape[1]))
    return grads @ (inverse / np.abs(inverse).mean())


def write_trak(path, dtype="float32", weights=None, seed=0, finalized=(1, 1, 1)):
    """A `save_dir` after `finalize_scores`; the arrays that are in it, in float64."""
    generator = np.random.default_rng(seed)
    kept = {"features": [], "targets": [], "weights": []}
    described = {"JL dimension": DIM, "JL matrix type": "normal", "train set size": EXAMPLES}
    path.mkdir(parents=True)
    (path / "metadata.json").write_text(json.dumps(described))
    for model in range(MODELS):
        grads = generator.normal(size=(EXAMPLES, DIM)) * generator.lognormal(size=(EXAMPLES, 1))
        arrays = {
            "grads": grads,
            "features": features_of(grads),
            "targets": generator.normal(size=(TARGETS, DIM)),
            "weights": generator.uniform(0, 1, (EXAMPLES, 1)) if weights is None else weights,
        }
        arrays = {name: np.asarray(array).astype(dtype) for name, array in arrays.items()}
        mmap(path / str(model) / "grads.mmap", arrays["grads"])
        mmap(path / str(model) / "features.mmap", arrays["features"])
        mmap(path / str(model) / "out_to_loss.mmap", arrays["weights"])
        mmap(path / str(model) / "_is_featurized.mmap", np.ones(EXAMPLES, np.int32))
        mmap(path / str(model) / "test_grads.mmap", arrays["targets"])
        done = {str(model): {"is_featurized": 1, "is_finalized": finalized[model]}}
        (path / f"id_{model}.json").write_text(json.dumps(done))
        for name, arrays_so_far in kept.items():
            arrays_so_far.append(arrays[name].astype(np.float64))
    mmap(path / "scores" / "test.mmap", trak_scores(kept).astype(dtype))
    experiment = {"num_targets": TARGETS, "scores_path": "/elsewhere", "scores_finalized": 1}
    (path / "experiments.json").write_text(json.dumps({"test": experiment}))
    return kept


def trak_scores(kept, models=range(MODELS)):
    """`finalize_scores` of trak."""
    products = [kept["features"][model] @ kept["targets"][model].T for model in models]
    weights = [kept["weights"][model] for model in models]
    return np.mean(products, axis=0) * np.mean(weights, axis=0)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_scores_are_those_of_trak(tmp_path, dtype):
    kept = write_trak(tmp_path / "t", dtype)
    trak = from_trak(tmp_path / "t")
    assert (trak.model_ids, trak.sign, trak.experiments) == ([0, 1, 2], 1, ["test"])
    close(trak.scores(trak.queries("test")), trak_scores(kept))


@pytest.mark.parametrize("models", [1, [2, 0], np.array([1, 2])])
def test_scores_are_those_of_the_models_asked_for(tmp_path, models):
    kept = write_trak(tmp_path / "t")
    trak = from_trak(tmp_path / "t", model_ids=models)
    assert trak.queries("test").shape == (np.size(models), TARGETS, DIM)
    close(trak.scores(trak.queries("test")), trak_scores(kept, np.atleast_1d(models)))


@pytest.mark.parametrize("method", ["exact", "certified"])
def test_an_index_of_trak_ranks_as_its_formula(tmp_path, method):
    kept = write_trak(tmp_path / "t")
    trak = from_trak(tmp_path / "t")
    expected, queries = trak_scores(kept).T, trak.queries("test")
    hits = whence.Index(trak, method).search(queries, 6)
    assert hits.helpful.ids.tolist() == np.argsort(-expected)[:, :6].tolist()
    assert hits.harmful.ids.tolist() == np.argsort(expected)[:, :6].tolist()
    scanned = trak.search(queries, 6)
    assert hits.helpful.scores.tobytes() == scanned.helpful.scores.tobytes()
    assert hits.harmful.ids.tolist() == scanned.harmful.ids.tolist()


def test_an_index_of_trak_is_saved_without_its_rows(tmp_path):
    write_trak(tmp_path / "t")
    trak = from_trak(tmp_path / "t")
    queries = trak.queries("test")
    whence.Index(trak, "certified").save(tmp_path / "index")
    loaded = whence.Index.load(tmp_path / "index", from_trak(tmp_path / "t"))
    assert (
        loaded.search(queries, 4).helpful.ids.tolist()
        == trak.search(queries, 4).helpful.ids.tolist()
    )
    with pytest.raises(errors.MismatchError):
        whence.Index.load(tmp_path / "index", from_trak(tmp_path / "t", model_ids=0))


def test_many_queries_are_scored_as_few(tmp_path, monkeypatch):
    write_trak(tmp_path / "t")
    trak = from_trak(tmp_path / "t")
    queries = trak.queries("test")
    at_once = trak.scores(queries)
    monkeypatch.setattr("whence.interop.rows.HELD", 2 * EXAMPLES + 1)
    assert trak.scores(queries).tobytes() == at_once.tobytes()


def test_ids_and_columns_are_the_callers(tmp_path):
    kept = write_trak(tmp_path / "t")
    ids, label = [f"row {i}" for i in range(EXAMPLES)], np.arange(EXAMPLES) % 4
    trak = from_trak(tmp_path / "t", ids=ids, columns={"label": label})
    hits = trak.search(trak.queries("test"), 3, where={"label": 2}, exclude=[["row 2"]] * TARGETS)
    left = np.flatnonzero(label == 2)[1:]
    best = left[np.argsort(-trak_scores(kept)[left], axis=0)[:3].T]
    assert hits.helpful.ids.tolist() == [[f"row {i}" for i in row] for row in best]


def test_models_that_are_not_finalized_are_left_out_but_when_named(tmp_path):
    kept = write_trak(tmp_path / "t", finalized=(1, 0, 1))
    trak = from_trak(tmp_path / "t")
    assert trak.checkpoints == ["0", "2"]
    close(trak.scores(trak.queries("test")), trak_scores(kept, [0, 2]))
    with pytest.raises(errors.StoreError, match=r"model 1 must be one .*\[0, 2\]"):
        from_trak(tmp_path / "t", model_ids=[0, 1])
    write_trak(tmp_path / "u", finalized=(0, 0, 0))
    with pytest.raises(errors.StoreError, match="must have a finalized model"):
        from_trak(tmp_path / "u")


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_saved_scores_are_those_in_the_file(tmp_path, dtype):
    kept = write_trak(tmp_path / "t", dtype)
    saved = from_trak(tmp_path / "t").saved_scores("test")
    assert saved.tobytes() == trak_scores(kept).astype(dtype).astype(np.float32).tobytes()


def test_derivatives_with_their_sign_turn_scores_to_positive_helpful(tmp_path):
    weights = -np.random.default_rng(1).uniform(0, 1, (EXAMPLES, 1))
    kept = write_trak(tmp_path / "t", weights=weights)
    trak = from_trak(tmp_path / "t")
    assert trak.sign == -1
    close(trak.scores(trak.queries("test")), -trak_scores(kept))
    close(trak.saved_scores("test"), -trak_scores(kept))


def test_factors_of_both_signs_have_no_sign_that_is_helpful(tmp_path):
    write_trak(tmp_path / "t", weights=np.linspace(-1e-3, 1, EXAMPLES)[:, None])
    with pytest.raises(errors.MismatchError, match=r"must have one sign.* from -0\.001 to 1"):
        from_trak(tmp_path / "t")


def test_a_factor_that_rounding_took_below_zero_is_zero(tmp_path):
    weights = np.linspace(0, 1, EXAMPLES)[:, None]
    weights[0] = -1.2e-7  # 1 − p of p = 1 + ε
    kept = write_trak(tmp_path / "t", weights=weights)
    trak = from_trak(tmp_path / "t")
    found = trak.scores(trak.queries("test"))
    assert (found[0] == 0).all()
    close(found, trak_scores(kept))


def test_a_helpful_step_lowers_the_loss_by_traks_sign(tmp_path):
    """A logistic model, whose margin is y θᵀx: one step of Newton's kind on each example."""
    generator = np.random.default_rng(3)
    theta = generator.normal(size=DIM)
    x, y = generator.normal(size=(EXAMPLES, DIM)), generator.choice([-1.0, 1.0], EXAMPLES)
    asked = generator.normal(size=(TARGETS, DIM))
    grads = y[:, None] * x
    missed = 1 / (1 + np.exp(grads @ theta))  # 1 − p
    write_trak(tmp_path / "t")
    for model in range(MODELS):
        folder = tmp_path / "t" / str(model)
        mmap(folder / "features.mmap", features_of(grads).astype(np.float32))
        mmap(folder / "out_to_loss.mmap", missed[:, None].astype(np.float32))
        mmap(folder / "test_grads.mmap", asked.astype(np.float32))
    trak = from_trak(tmp_path / "t")
    scores = trak.scores(trak.queries("test"))
    metric = np.linalg.inv(grads.T @ grads + 0.1 * np.eye(DIM))
    for i in range(0, EXAMPLES, 9):
        moved = theta + 1e-3 * missed[i] * metric @ grads[i]
        gained = np.logaddexp(0, -asked @ theta) - np.logaddexp(0, -asked @ moved)
        assert (np.sign(gained) == np.sign(scores[i])).all()


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_values_that_are_not_finite_are_reported(tmp_path, value):
    write_trak(tmp_path / "t")
    features = np.load(tmp_path / "t" / "1" / "features.mmap")
    features[5, 2] = value
    mmap(tmp_path / "t" / "1" / "features.mmap", features)
    trak = from_trak(tmp_path / "t")
    with pytest.raises(errors.NotFiniteError, match=f"row {EXAMPLES + 5}"):
        trak.search(trak.queries("test"))
    weights = np.full((EXAMPLES, 1), 0.5, np.float32)
    weights[4] = value
    mmap(tmp_path / "t" / "2" / "out_to_loss.mmap", weights)
    with pytest.raises(errors.NotFiniteError, match=r"out_to_loss in .* at 4"):
        from_trak(tmp_path / "t")


def edited(name, change):
    def damage(path):
        file = path / name
        body = json.loads(file.read_text())
        change(body)
        file.write_text(json.dumps(body))

    return damage


def replaced(name, content):
    return lambda path: (path / name).write_bytes(content)


def removed(name):
    return lambda path: (path / name).unlink()


def shortened(name, by=1):
    def damage(path):
        content = (path / name).read_bytes()
        (path / name).write_bytes(content[:-by])

    return damage


def saved(name, array):
    return lambda path: mmap(path / name, array)


def objects(name):
    def damage(path):
        with (path / name).open("wb") as file:
            np.save(file, np.full((EXAMPLES, DIM), None))

    return damage


DAMAGED_TRAK = {
    "no metadata": (removed("metadata.json"), "without metadata.json"),
    "no json": (replaced("metadata.json", b"{"), "metadata.json is damaged"),
    "deep json": (replaced("metadata.json", b"[" * 100_000), "metadata.json is damaged"),
    "a list": (replaced("metadata.json", b"[]"), "must hold a JSON object"),
    "no size": (edited("metadata.json", lambda b: b.pop("train set size")), "'train set size'"),
    "half an example": (
        edited("metadata.json", lambda b: b.update({"train set size": 89.5})),
        "whole number of at least 1, got float 89.5",
    ),
    "a huge size": (
        edited("metadata.json", lambda b: b.update({"train set size": 10**15})),
        r"must hold float16 or float32 of shape \[1000000000000000, 12\]",
    ),
    "a huge width": (
        edited("metadata.json", lambda b: b.update({"JL dimension": 10**15})),
        "must be of rows of 1 to 1048576 values",
    ),
    "a model by name": (
        replaced("id_0.json", b'{"best": {"is_finalized": 1}}'),
        "must describe models by their numbers, got 'best'",
    ),
    "a model that is no number": (
        replaced("id_0.json", b'{"' + b"9" * 5000 + b'": {"is_finalized": 1}}'),
        "must describe models by their numbers",
    ),
    "no features": (removed("1/features.mmap"), "features.mmap: No such file"),
    "short features": (shortened("1/features.mmap"), "features.mmap is damaged"),
    "other features": (
        saved("1/features.mmap", np.zeros((EXAMPLES, DIM + 1), np.float32)),
        r"shape \[90, 12\], got float32 of shape \[90, 13\]",
    ),
    "features of objects": (objects("1/features.mmap"), "float16 or float32|values of object"),
    "features of two types": (
        saved("1/features.mmap", np.zeros((EXAMPLES, DIM), np.float16)),
        r"features of one type, got \['float16', 'float32'\]",
    ),
    "features of 64 bits": (
        saved("1/features.mmap", np.zeros((EXAMPLES, DIM), np.float64)),
        "got float64",
    ),
    "no header": (replaced("1/features.mmap", b"\0" * 5000), "must be a .npy file"),
    "no weights": (removed("2/out_to_loss.mmap"), "out_to_loss.mmap: No such file"),
    "short weights": (shortened("2/out_to_loss.mmap", 4), "out_to_loss.mmap is damaged"),
}


@pytest.mark.parametrize("damage", DAMAGED_TRAK)
def test_damaged_folders_of_trak_are_named(tmp_path, damage):
    write_trak(tmp_path / "t")
    change, message = DAMAGED_TRAK[damage]
    change(tmp_path / "t")
    with pytest.raises(errors.StoreError, match=message):
        from_trak(tmp_path / "t")


def test_experiments_are_checked_when_they_are_read(tmp_path):
    write_trak(tmp_path / "t")
    trak, path = from_trak(tmp_path / "t"), tmp_path / "t"
    with pytest.raises(errors.ArgumentError, match="experiment must be one of test, got 'other'"):
        trak.queries("other")
    edited("experiments.json", lambda b: b["test"].update(scores_finalized=0))(path)
    with pytest.raises(errors.StoreError, match="'test' must have been finalized"):
        trak.saved_scores("test")
    edited("experiments.json", lambda b: b["test"].update(num_targets=TARGETS + 1))(path)
    with pytest.raises(errors.StoreError, match=r"test_grads.mmap must hold .* \[8, 12\]"):
        trak.queries("test")
    (path / "2" / "test_grads.mmap").unlink()
    edited("experiments.json", lambda b: b["test"].update(num_targets=TARGETS))(path)
    with pytest.raises(errors.StoreError, match=r"test_grads\.mmap: No such file"):
        trak.queries("test")
    (path / "experiments.json").unlink()
    assert trak.experiments == []


def test_arguments_of_trak_are_checked(tmp_path):
    write_trak(tmp_path / "t")
    for models, error in (([], errors.ArgumentError), ([1, 1], errors.ArgumentError)):
        with pytest.raises(error, match="model_ids must name models once each"):
            from_trak(tmp_path / "t", model_ids=models)
    with pytest.raises(errors.DtypeError, match="model_ids"):
        from_trak(tmp_path / "t", model_ids="1")
    with pytest.raises(errors.DtypeError, match="save_dir must be a path"):
        from_trak(3)
    with pytest.raises(errors.StoreError, match=r"save_dir must be a folder of trak.*not exist"):
        from_trak(tmp_path / "nothing")
    with pytest.raises(errors.ShapeError, match="ids must be one for each of 90 rows"):
        from_trak(tmp_path / "t", ids=[1, 2])


def test_files_written_since_they_were_opened_are_refused(tmp_path):
    write_trak(tmp_path / "t")
    trak = from_trak(tmp_path / "t")
    shortened("0/features.mmap")(tmp_path / "t")
    with pytest.raises(errors.StoreError, match="must stay as it was opened"):
        trak.search(trak.queries("test"))


# bergson

SIZES = {"layers.0.up": 8, "layers.0.down": 6, "head": 10}
ROWS, WIDTH = 70, sum(SIZES.values())

PROCESSOR = """\
projection_dim: 4
reshape_to_square: false
projection_type: rademacher
projection_target: per_module
projection_scale: jl
include_bias: false
projection_seed: {seed}
projection_version: 2
"""

CONFIG = """\
steps:
- build:
    index_cfg:
      run_path: runs/index
      hessian_path: not this one
    preprocess_cfg:
      unit_normalize: false
      hessian_path: {hessian}
      inversion_cfg:
        inversion: damped_inverse
metadata:
  bergson_version: 2.5.1
"""


def drawn(rows=ROWS, seed=0, width=WIDTH):
    generator = np.random.default_rng(seed)
    return generator.normal(size=(rows, width)) * generator.lognormal(size=(rows, 1))


def stored_as(values, dtype):
    """Bytes of a type, and the values they stand for, in float64."""
    if dtype == "bfloat16":
        upper = (values.astype("<f4").view("<u4") >> 16).astype("<u2")
        return upper.tobytes(), (upper.astype("<u4") << 16).view("<f4").astype(np.float64)
    rounded = values.astype(dtype)
    return rounded.tobytes(), rounded.astype(np.float64)


def write_bergson(path, values, stored="float32", sizes=SIZES, hessian=None, seed="null", **info):
    """An index as `create_index` describes it; the values that are in it, in float64."""
    path.mkdir(parents=True)
    content, kept = stored_as(values, stored)
    (path / "gradients.bin").write_bytes(content)
    described = {
        "attribute_tokens": False,
        "num_items": len(values),
        "num_grads": len(values),
        "grad_sizes": sizes,
        "base_dtype": stored,
    } | info
    described = {key: value for key, value in described.items() if value is not None}
    (path / "info.json").write_text(json.dumps(described, indent=2))
    (path / "processor_config.yaml").write_text(PROCESSOR.format(seed=seed))
    (path / "config.yaml").write_text(CONFIG.format(hessian=hessian or "null"))
    return kept


def pair(tmp_path, stored="float32", **info):
    """An index and a query index with the values in them."""
    kept = write_bergson(tmp_path / "index", drawn(), stored, **info)
    asked = write_bergson(tmp_path / "query", drawn(5, seed=1), stored)
    return kept, asked


def unit(rows):
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_scores_are_those_of_bergson(tmp_path, dtype):
    kept, asked = pair(tmp_path, dtype)
    index = from_bergson(tmp_path / "index")
    close(index.scores(index.queries(tmp_path / "query")), kept @ asked.T)
    index = from_bergson(tmp_path / "index", unit_norm=True)
    found = index.scores(index.queries(tmp_path / "query"))
    close(found, unit(kept) @ unit(asked).T)


OLD = {"formats": [f"({size},)<f2" for size in SIZES.values()], "names": list(SIZES)}


@pytest.mark.parametrize(
    ("dtype", "info"),
    [
        ("float16", {"base_dtype": "<f2"}),
        ("bfloat16", {"base_dtype": "<V2"}),
        ("float16", {"base_dtype": None, "dtype": OLD | {"itemsize": 2 * WIDTH}}),
    ],
)
def test_earlier_versions_of_bergson_are_read(tmp_path, dtype, info):
    kept, asked = pair(tmp_path, dtype, attribute_tokens=None, num_items=None, **info)
    index = from_bergson(tmp_path / "index")
    close(index.scores(index.queries(tmp_path / "query")), kept @ asked.T)


@pytest.mark.parametrize("method", ["exact", "certified"])
@pytest.mark.parametrize("unit_norm", [False, True])
def test_an_index_of_bergson_ranks_as_its_formula(tmp_path, method, unit_norm):
    kept, asked = pair(tmp_path, "float16")
    source = from_bergson(tmp_path / "index", unit_norm=unit_norm)
    queries = source.queries(tmp_path / "query")
    expected = unit(asked) @ unit(kept).T if unit_norm else asked @ kept.T
    hits = whence.Index(source, method).search(queries, 6)
    assert hits.helpful.ids.tolist() == np.argsort(-expected)[:, :6].tolist()
    assert hits.harmful.ids.tolist() == np.argsort(expected)[:, :6].tolist()
    assert hits.helpful.scores.tobytes() == source.search(queries, 6).helpful.scores.tobytes()


@pytest.mark.parametrize("unit_norm", [False, True])
def test_modules_are_summed_of_rows_normed_over_all(tmp_path, unit_norm):
    kept, asked = pair(tmp_path)
    index = from_bergson(tmp_path / "index", unit_norm=unit_norm, modules=["head", "layers.0.up"])
    if unit_norm:
        kept, asked = unit(kept), unit(asked)
    there = np.r_[:8, 14:24]
    found = index.scores(index.queries(tmp_path / "query"))
    close(found, kept[:, there] @ asked[:, there].T)
    assert index.modules == ["layers.0.up", "head"]


def test_a_short_query_is_divided_by_its_norm_and_epsilon(tmp_path):
    kept = write_bergson(tmp_path / "index", drawn())
    index = from_bergson(tmp_path / "index", unit_norm=True)
    query = np.full((1, WIDTH), 1e-8, np.float32)
    expected = unit(kept) @ (query / (np.linalg.norm(query) + 2**-23)).T
    close(index.scores(query), expected)


def test_rows_of_zeros_have_cosine_zero(tmp_path):
    values = drawn()
    values[7] = 0
    write_bergson(tmp_path / "index", values)
    found = from_bergson(tmp_path / "index", unit_norm=True).scores(drawn(3).astype(np.float32))
    assert (found[7] == 0).all()
    assert (np.delete(found, 7, axis=0) != 0).all()


@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
@pytest.mark.parametrize("unit_norm", [False, True])
def test_converted_rows_are_a_npy_file_with_the_same_scores(tmp_path, dtype, unit_norm):
    kept, _ = pair(tmp_path, dtype)
    file = tmp_path / "rows.npy"
    index = from_bergson(tmp_path / "index", unit_norm=unit_norm, converted=file)
    assert np.load(file).tobytes() == kept.astype(np.float32).tobytes()
    queries = index.queries(tmp_path / "query")
    held = from_bergson(tmp_path / "index", unit_norm=unit_norm)
    close(index.scores(queries), held.scores(queries))
    with pytest.raises(errors.ArgumentError, match=r"must be a new file, got .*rows\.npy"):
        from_bergson(tmp_path / "index", converted=file)
    with pytest.raises(errors.StoreError, match="No such file"):
        from_bergson(tmp_path / "index", converted=tmp_path / "no" / "rows.npy")
    assert {path.name for path in tmp_path.iterdir()} == {"index", "query", "rows.npy"}


def test_rows_are_read_in_blocks_of_any_length(tmp_path, monkeypatch):
    pair(tmp_path, "bfloat16")
    index = from_bergson(tmp_path / "index", unit_norm=True)
    queries = index.queries(tmp_path / "query")
    expected = index.scores(queries)
    for block in (1, WIDTH, 13 * WIDTH + 5):
        monkeypatch.setattr("whence.interop.folders.BLOCK", block)
        index = from_bergson(tmp_path / "index", unit_norm=True)
        assert index.scores(index.queries(tmp_path / "query")).tobytes() == expected.tobytes()


def test_opening_reads_no_rows(tmp_path):
    write_bergson(tmp_path / "index", drawn(1, width=2**15), sizes={"all": 2**15}, num_grads=2**13)
    with (tmp_path / "index" / "gradients.bin").open("r+b") as file:
        file.truncate(2**30)
    tracemalloc.start()
    index = from_bergson(tmp_path / "index")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(index) == 2**13
    assert peak < 2**21


def test_modules_of_a_query_may_lie_in_another_order(tmp_path):
    kept = write_bergson(tmp_path / "index", drawn())
    index = from_bergson(tmp_path / "index")
    turned = {name: SIZES[name] for name in ["head", "layers.0.up", "layers.0.down"]}
    asked = write_bergson(tmp_path / "query", drawn(5, seed=1), sizes=turned)
    queries = index.queries(tmp_path / "query")
    close(index.scores(queries), kept @ asked[:, np.r_[10:24, :10]].T)


def test_queries_of_other_modules_or_projections_are_refused(tmp_path):
    write_bergson(tmp_path / "index", drawn())
    index = from_bergson(tmp_path / "index")
    write_bergson(tmp_path / "a", drawn(2, width=14), sizes={"layers.0.up": 8, "layers.0.down": 6})
    with pytest.raises(errors.MismatchError, match="10 values of module 'head', got None"):
        index.queries(tmp_path / "a")
    write_bergson(tmp_path / "b", drawn(2), seed="7")
    with pytest.raises(errors.MismatchError, match="projection_seed 7 where the index has null"):
        index.queries(tmp_path / "b")
    write_bergson(tmp_path / "c", drawn(2))
    (tmp_path / "c" / "processor_config.yaml").unlink()
    with pytest.raises(errors.MismatchError, match="projection_dim unknown where the index has 4"):
        index.queries(tmp_path / "c")


def test_what_is_not_said_of_a_projection_is_what_bergson_takes(tmp_path):
    write_bergson(tmp_path / "index", drawn())
    write_bergson(tmp_path / "query", drawn(2))
    (tmp_path / "index" / "processor_config.yaml").write_text("projection_dim: null\n")
    (tmp_path / "query" / "processor_config.yaml").write_text(
        "projection_dim: 0\nprojection_seed: 3\n"
    )
    index = from_bergson(tmp_path / "index")
    assert index.queries(tmp_path / "query").shape == (2, WIDTH)
    (tmp_path / "query" / "processor_config.yaml").unlink()
    assert index.queries(tmp_path / "query").shape == (2, WIDTH)


# With a Hessian


def second_moments(values, sizes=SIZES):
    """As bergson's autocorrelation: of each module, or one of all."""
    ends = np.cumsum(list(sizes.values()))
    parts = np.split(values, ends[:-1], axis=1)
    return {name: part.T @ part / len(values) for name, part in zip(sizes, parts, strict=True)}


def write_hessian(path, matrices, seed="null"):
    import torch

    path.mkdir(parents=True, exist_ok=True)
    tensors = {name: torch.tensor(matrix) for name, matrix in matrices.items()}
    torch.save(tensors, path / "hessians.pth")
    (path / "processor_config.yaml").write_text(PROCESSOR.format(seed=seed))


def block_diagonal(matrices, sizes=SIZES):
    found, first = np.zeros((WIDTH, WIDTH)), 0
    for name, size in sizes.items():
        found[first : first + size, first : first + size] = matrices.get(name, np.eye(size))
        first += size
    return found


def inverted(matrix, inversion, damping):
    """The definitions of bergson's inversions, without eigenvalues but for their mean."""
    size, mean = len(matrix), np.trace(matrix) / len(matrix)
    if inversion == "absolute_damped_inverse":
        return np.linalg.inv(matrix + damping * np.eye(size))
    if inversion == "pseudoinverse":
        return np.linalg.pinv(matrix, damping * mean / np.linalg.norm(matrix, 2))
    if inversion == "tikhonov_filtered":
        return np.linalg.inv(matrix @ matrix + (damping * mean) ** 2 * np.eye(size)) @ matrix
    return np.linalg.inv(matrix + damping * mean * np.eye(size))


@pytest.mark.parametrize("inversion", INVERSIONS)
@pytest.mark.parametrize("kind", ["modules", "joint", "some"])
def test_scores_with_a_hessian_are_those_of_bergson(tmp_path, inversion, kind):
    kept, asked = pair(tmp_path)
    matrices = {"joint": kept.T @ kept / ROWS} if kind == "joint" else second_moments(kept)
    if kind == "some":
        del matrices["layers.0.down"]
    write_hessian(tmp_path / "hessian", matrices)
    inverse = {name: inverted(matrix, inversion, 0.3) for name, matrix in matrices.items()}
    metric = inverse["joint"] if kind == "joint" else block_diagonal(inverse)
    options = {"hessian": tmp_path / "hessian", "inversion": inversion, "damping_factor": 0.3}
    products = kept @ metric @ asked.T
    index = from_bergson(tmp_path / "index", **options)
    close(index.scores(index.queries(tmp_path / "query")), products, 1e-5)
    index = from_bergson(tmp_path / "index", unit_norm=True, **options)
    lengths = [np.sqrt(np.einsum("ij,jk,ik->i", rows, metric, rows)) for rows in (kept, asked)]
    expected = products / lengths[0][:, None] / lengths[1]
    close(index.scores(index.queries(tmp_path / "query")), expected, 1e-5)


def test_modules_are_summed_between_the_roots(tmp_path):
    kept, asked = pair(tmp_path)
    matrices = second_moments(kept)
    write_hessian(tmp_path / "hessian", matrices)
    metric = block_diagonal(
        {name: inverted(m, "damped_inverse", 0.1) for name, m in matrices.items()}
    )
    lengths = [np.sqrt(np.einsum("ij,jk,ik->i", rows, metric, rows)) for rows in (kept, asked)]
    index = from_bergson(
        tmp_path / "index", unit_norm=True, hessian=tmp_path / "hessian", modules=["head"]
    )
    expected = kept[:, 14:] @ metric[14:, 14:] @ asked[:, 14:].T
    found = index.scores(index.queries(tmp_path / "query"))
    close(found, expected / lengths[0][:, None] / lengths[1], 1e-5)


def test_a_root_times_itself_is_the_inverse():
    rows = drawn()
    hessian = Hessian([(3, rows.T @ rows)], "damped_inverse", 0.1)
    asked = drawn(4, seed=2, width=WIDTH + 5)
    np.testing.assert_allclose(hessian.root(hessian.root(asked)), hessian.inverse(asked), rtol=1e-9)
    assert np.array_equal(hessian.root(asked)[:, np.r_[:3, -2:0]], asked[:, np.r_[:3, -2:0]])


def test_hessians_that_do_not_fit_are_refused(tmp_path):
    kept, _ = pair(tmp_path)
    index, path = tmp_path / "index", tmp_path / "hessian"
    with pytest.raises(errors.StoreError, match=r"without hessians\.pth"):
        from_bergson(index, hessian=index)
    write_hessian(path, {})
    with pytest.raises(errors.StoreError, match="a matrix for each module, got none"):
        from_bergson(index, hessian=path)
    write_hessian(path, {"other": np.eye(3)})
    with pytest.raises(errors.MismatchError, match="modules of the index, got 'other'"):
        from_bergson(index, hessian=path)
    write_hessian(path, {"head": np.eye(3)})
    with pytest.raises(errors.MismatchError, match=r"hessian of 'head' must be \[10, 10\]"):
        from_bergson(index, hessian=path)
    write_hessian(path, {"head": np.full((10, 10), np.nan)})
    with pytest.raises(errors.NotFiniteError, match="hessian of coordinates 14 to 24"):
        from_bergson(index, hessian=path)
    write_hessian(path, {"head": np.zeros((10, 10))})
    with pytest.raises(errors.NotFiniteError, match=r"inverse of the hessian .*factor=0\.1"):
        from_bergson(index, hessian=path)
    write_hessian(path, second_moments(kept), seed="3")
    with pytest.raises(errors.MismatchError, match="hessian must be projected as the index"):
        from_bergson(index, hessian=path)
    shortened("hessians.pth", 100)(path)
    with pytest.raises(errors.StoreError, match=r"hessians\.pth is damaged"):
        from_bergson(index, hessian=path)
    (path / "eigen_activation_sharded").mkdir()
    with pytest.raises(errors.MismatchError, match="hessian must be dense"):
        from_bergson(index, hessian=path)


def test_code_in_a_hessian_is_not_run(tmp_path):
    import pickle

    write_bergson(tmp_path / "index", drawn())

    class Code:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    (tmp_path / "index" / "hessians.pth").write_bytes(pickle.dumps({"head": Code()}))
    with pytest.raises(errors.StoreError, match=r"hessians\.pth is damaged"):
        from_bergson(tmp_path / "index", hessian=tmp_path / "index")
    assert not (tmp_path / "ran").exists()


def test_nothing_is_preconditioned_twice(tmp_path):
    kept = write_bergson(tmp_path / "index", drawn())
    write_hessian(tmp_path / "hessian", second_moments(kept))
    write_bergson(tmp_path / "done", drawn(3), hessian="runs/hessian")
    with pytest.raises(errors.MismatchError, match=r"by runs/hessian, got .*hessian"):
        from_bergson(tmp_path / "done", hessian=tmp_path / "hessian")
    index = from_bergson(tmp_path / "index", hessian=tmp_path / "hessian")
    with pytest.raises(errors.MismatchError, match="with that of runs/hessian"):
        index.queries(tmp_path / "done")
    assert from_bergson(tmp_path / "index").queries(tmp_path / "done").shape == (3, WIDTH)


# Tokens, signs, and what is wrong


def write_tokens(path, lengths):
    kept = write_bergson(
        path,
        drawn(sum(lengths)),
        attribute_tokens=True,
        num_items=len(lengths),
        num_grads=sum(lengths),
    )
    np.save(path / "offsets.npy", np.cumsum([0, *lengths]))
    return kept


def test_a_row_for_each_token_knows_its_document(tmp_path):
    kept = write_tokens(tmp_path / "index", [3, 0, 4, 1])
    index = from_bergson(tmp_path / "index", columns={"kind": list("abababab")})
    assert index.columns["document"].tolist() == [0, 0, 0, 2, 2, 2, 2, 3]
    assert index.columns["token"].tolist() == [0, 1, 2, 0, 1, 2, 3, 0]
    query = drawn(1, seed=4).astype(np.float32)
    hits = index.search(query, 9, where={"document": 2})
    assert hits.helpful.ids[0].tolist() == (3 + np.argsort(-kept[3:7] @ query[0])).tolist()
    with pytest.raises(errors.ArgumentError, match="columns must not have 'token'"):
        from_bergson(tmp_path / "index", columns={"token": [0] * 8})


@pytest.mark.parametrize(
    "offsets",
    [
        np.array([0, 3, 2, 7, 8]),
        np.array([0, 3, 3, 7, 9]),
        np.array([1, 3, 3, 7, 8]),
        np.array([0, 3, 7, 8]),
        np.array([0, 3, 3, 7, 8], np.int32),
    ],
)
def test_offsets_that_do_not_fit_are_refused(tmp_path, offsets):
    write_tokens(tmp_path / "index", [3, 0, 4, 1])
    np.save(tmp_path / "index" / "offsets.npy", offsets)
    with pytest.raises(errors.StoreError, match=r"offsets\.npy"):
        from_bergson(tmp_path / "index")


def test_a_helpful_step_lowers_the_loss_by_bergsons_sign(tmp_path):
    """Gradients of squared errors of a linear model: one step of descent on each example."""
    generator = np.random.default_rng(2)
    theta, x, y = generator.normal(size=WIDTH), drawn(), generator.normal(size=ROWS)
    asked, wanted = drawn(5, seed=3), generator.normal(size=5)
    grads, of_asked = (x @ theta - y)[:, None] * x, (asked @ theta - wanted)[:, None] * asked
    write_bergson(tmp_path / "index", grads)
    scores = from_bergson(tmp_path / "index").scores(of_asked.astype(np.float32))
    for i in range(0, ROWS, 7):
        moved = theta - 1e-9 * grads[i]
        gained = (asked @ theta - wanted) ** 2 - (asked @ moved - wanted) ** 2
        assert (np.sign(gained) == np.sign(scores[i])).all()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gradients_that_are_not_finite_are_reported(tmp_path, dtype):
    values = drawn()
    values[11, 3] = np.nan
    write_bergson(tmp_path / "index", values, dtype)
    index = from_bergson(tmp_path / "index")
    with pytest.raises(errors.NotFiniteError, match="row 11"):
        index.search(drawn(1).astype(np.float32))
    with pytest.raises(errors.NotFiniteError, match="row 11"):
        from_bergson(tmp_path / "index", unit_norm=True)


def info(change):
    return edited("info.json", change)


DAMAGED_BERGSON = {
    "no description": (removed("info.json"), r"without info\.json"),
    "no gradients": (removed("gradients.bin"), r"without gradients\.bin"),
    "no json": (replaced("info.json", b"{"), r"info\.json is damaged"),
    "other json": (replaced("info.json", b'"a"'), "must hold a JSON object"),
    "short": (shortened("gradients.bin"), r"gradients\.bin is damaged"),
    "long": (
        lambda path: (path / "gradients.bin").write_bytes(b"\0" * (4 * ROWS * WIDTH + 1)),
        r"gradients\.bin is damaged",
    ),
    "no rows": (info(lambda b: b.update(num_grads=0)), "at least 1, got int 0"),
    "huge": (info(lambda b: b.update(num_grads=10**18)), "bytes, it has 6720"),
    "no modules": (info(lambda b: b.update(grad_sizes={})), "rows of 1 to 1048576 values, got 0"),
    "no sizes": (info(lambda b: b.pop("grad_sizes")), "must give 'grad_sizes'"),
    "half a size": (info(lambda b: b["grad_sizes"].update(head=9.5)), "'head' as a whole number"),
    "a huge size": (info(lambda b: b["grad_sizes"].update(head=10**30)), "rows of 1 to 1048576"),
    "no type": (info(lambda b: b.pop("base_dtype")), "'base_dtype' as one of"),
    "another type": (info(lambda b: b.update(base_dtype="object")), "'base_dtype' as one of"),
    "another old type": (
        info(lambda b: (b.pop("base_dtype"), b.update(dtype={"formats": [3]}))),
        "'base_dtype' as one of",
    ),
    "tokens": (info(lambda b: b.update(attribute_tokens=True)), r"offsets\.npy: No such file"),
    "text": (replaced("processor_config.yaml", b"\xff"), r"processor_config\.yaml is damaged"),
}


@pytest.mark.parametrize("damage", DAMAGED_BERGSON)
def test_damaged_folders_of_bergson_are_named(tmp_path, damage):
    write_bergson(tmp_path / "index", drawn())
    change, message = DAMAGED_BERGSON[damage]
    change(tmp_path / "index")
    with pytest.raises(errors.StoreError, match=message):
        from_bergson(tmp_path / "index")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    key=st.sampled_from(["num_grads", "grad_sizes", "base_dtype", "dtype", "attribute_tokens"]),
    value=JSON,
)
def test_any_description_is_read_or_refused(tmp_path, key, value):
    folder = tmp_path / "index"
    if not folder.exists():
        write_bergson(folder, drawn())
    described = {"num_grads": ROWS, "grad_sizes": SIZES, "base_dtype": "float32"} | {key: value}
    (folder / "info.json").write_text(json.dumps(described))
    with contextlib.suppress(errors.StoreError):
        assert from_bergson(folder).dim == WIDTH


def test_arguments_of_bergson_are_checked(tmp_path):
    write_bergson(tmp_path / "index", drawn())
    for options, error, message in (
        ({"unit_norm": 1}, errors.DtypeError, "unit_norm"),
        ({"modules": []}, errors.ArgumentError, "modules must be a list of names"),
        ({"modules": "head"}, errors.ArgumentError, "modules must be a list of names"),
        ({"modules": ["tail"]}, errors.ArgumentError, "modules must be one of .*, got 'tail'"),
        ({"inversion": "exact"}, errors.ArgumentError, "inversion must be one of"),
        ({"damping_factor": -1}, errors.ArgumentError, "damping_factor must not be negative"),
        ({"damping_factor": "much"}, errors.DtypeError, "damping_factor must be a number"),
        ({"hessian": tmp_path / "no"}, errors.StoreError, "hessian must be a folder of bergson"),
        ({"ids": [1]}, errors.ShapeError, "ids must be one for each of 70 rows"),
        ({"columns": 3}, errors.DtypeError, "columns must be a dict"),
    ):
        with pytest.raises(error, match=message):
            from_bergson(tmp_path / "index", **options)
    with pytest.raises(errors.StoreError, match="path must be a folder of bergson"):
        from_bergson(tmp_path / "index" / "info.json")
    index = from_bergson(tmp_path / "index")
    with pytest.raises(errors.ShapeError, match=r"queries must be \[rows, 24\]"):
        index.search(np.ones((1, 3), np.float32))
    with pytest.raises(errors.NotFiniteError, match="queries"):
        index.search(np.full((1, WIDTH), np.nan, np.float32))


def test_neither_torch_nor_the_libraries_are_needed(tmp_path):
    write_bergson(tmp_path / "index", drawn())
    write_trak(tmp_path / "t")
    code = (
        "import sys\n"
        "for name in ('torch', 'trak', 'bergson', 'yaml', 'ml_dtypes'): sys.modules[name] = None\n"
        "import whence\n"
        f"index = whence.interop.from_bergson({str(tmp_path / 'index')!r}, unit_norm=True)\n"
        f"print(index.scores(index.queries({str(tmp_path / 'index')!r})).shape)\n"
        f"trak = whence.interop.from_trak({str(tmp_path / 't')!r})\n"
        "print(trak.scores(trak.queries('test')).shape)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.splitlines() == ["(70, 70)", "(90, 7)"], done.stderr
