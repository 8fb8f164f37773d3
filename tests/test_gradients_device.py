"""The sketch by torch on a device, against the core's."""

import contextlib
import gc
import math
from unittest import mock

import numpy as np
import pytest
import torch
from definitions import bucket, parameter_key
from hypothesis import given, settings
from hypothesis import strategies as st

import whence
from whence import errors
from whence._core import MAX_DIM
from whence._core import Sketch as CoreSketch
from whence.gradients import device as module
from whence.gradients.device import DeviceAccumulator, slots, supports
from whence.sketch import Accumulator

CPU = torch.device("cpu")
DIMS = st.one_of(st.integers(1, 40), st.sampled_from([64, 100, 257, 1000, 4096]))
DTYPES = st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.float64])
CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")


def random(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def single(tensor):
    return tensor.to("cpu", torch.float32).numpy()


def sizes(slab=None, values=None):
    """Smaller slabs, so that a small parameter has several."""
    stack = contextlib.ExitStack()
    for name, value in (("SLAB", slab), ("VALUES", values)):
        if value is not None:
            stack.enter_context(mock.patch.object(module, name, value))
    return stack


def assert_same(found, expected, norms):
    """Equal to a millionth of the rows' or, where a narrow row cancels, of the gradients' norms."""
    assert found.dtype == np.float64
    assert found.shape == expected.shape
    norms = np.maximum(np.linalg.norm(expected, axis=1), norms)
    assert (np.linalg.norm(found - expected, axis=1) <= 1e-6 * norms).all()


@contextlib.contextmanager
def deterministic():
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**64 - 1),
    name=st.text(st.characters(exclude_categories=["Cs"]), max_size=20),
    shape=st.lists(st.integers(1, 40), max_size=3),
    dim=st.integers(1, MAX_DIM),
)
def test_offsets_and_signs_are_those_of_the_core(seed, name, shape, dim):
    expected_offsets, expected_signs = CoreSketch("chunked_sjlt", dim, seed).slots(name, shape)
    key = CoreSketch("chunked_sjlt", dim, seed).key(name, shape)
    offsets, signs = slots(key, torch.arange(len(expected_offsets)), dim)
    assert np.array_equal(offsets.numpy(), expected_offsets)
    assert np.array_equal(signs.numpy().view(np.uint16), expected_signs)


def test_hashes_of_a_huge_parameter_are_those_of_whole_numbers():
    mask = 2**64 - 1
    chunks = [0, 2**31 - 1, 2**32, 2**44 - 1]
    key = parameter_key(2**64 - 1, "é.weight", (2**24, 2**24))
    offsets, signs = slots(key, torch.tensor(chunks), MAX_DIM)
    for chunk, offset, sign in zip(chunks, offsets.tolist(), signs.tolist(), strict=True):
        bits = (key + (chunk + 1) * 0x9E3779B97F4A7C15) & mask
        bits = ((bits ^ bits >> 30) * 0xBF58476D1CE4E5B9) & mask
        bits = ((bits ^ bits >> 27) * 0x94D049BB133111EB) & mask
        bits ^= bits >> 31
        assert (offset, sign & 0xFFFF) == ((bits >> 32) * MAX_DIM >> 32, bits & 0xFFFF)


@settings(max_examples=80, deadline=None)
@given(
    batch=st.integers(1, 5),
    start=st.integers(0, 60),
    width=st.integers(0, 3000),
    behind=st.integers(0, 20),
    dim=DIMS,
    dtype=DTYPES,
    slab=st.sampled_from([None, 1, 7, 100, 512]),
    values=st.sampled_from([None, 1, 1000]),
)
def test_flat_gradients_give_the_totals_of_the_core(
    batch, start, width, behind, dim, dtype, slab, values
):
    width = min(width, 40 * (slab or width + 1))  # slabs of one coordinate take a call each
    sketch = whence.Sketch(dim=dim, seed=3)
    gradient = random(batch, width, dtype=dtype)
    shape = (start + width + behind,)
    found, core = DeviceAccumulator(sketch, batch, CPU), Accumulator(sketch, batch)
    with sizes(slab, values):
        found.add("w", shape, gradient, start)
    core.add("w", shape, single(gradient), start)
    assert_same(found.totals(), core.totals, np.linalg.norm(single(gradient), axis=1))
    assert found.bad_rows() == []


@settings(max_examples=80, deadline=None)
@given(
    batch=st.integers(1, 4),
    terms=st.integers(0, 6),
    rows=st.integers(0, 40),
    columns=st.integers(0, 70),
    start=st.integers(0, 40),
    first=st.integers(0, 2),
    dim=DIMS,
    dtypes=st.tuples(DTYPES, DTYPES),
    slab=st.sampled_from([None, 20, 100, 512]),
    values=st.sampled_from([None, 1, 1000]),
)
def test_factors_give_the_totals_of_the_core(
    batch, terms, rows, columns, start, first, dim, dtypes, slab, values
):
    sketch = whence.Sketch(dim=dim, seed=4)
    left = random(batch, terms, rows, seed=1, dtype=dtypes[0])
    right = random(batch, columns, terms, seed=2, dtype=dtypes[1]).mT  # columns are not neighbours
    shape = (start + rows * columns + 3,)
    found, core = (kind(sketch, batch + 2, *at) for kind, at in KINDS)
    with sizes(slab, values):
        found.add_outer("w", shape, left, right, start, first)
    core.add_outer("w", shape, single(left), single(right), start, first)
    norms = np.zeros(batch + 2)
    norms[first : first + batch] = np.linalg.norm(
        single(left.float().mT @ right.float()), axis=(1, 2)
    )
    assert_same(found.totals(), core.totals, norms)


KINDS = ((DeviceAccumulator, (CPU,)), (Accumulator, ()))


@settings(max_examples=80, deadline=None)
@given(
    batch=st.integers(1, 4),
    terms=st.integers(0, 60),
    width=st.one_of(st.integers(0, 50), st.sampled_from([16, 32, 64])),
    table=st.integers(1, 30),
    ignored=st.one_of(st.none(), st.integers(0, 3)),
    dim=DIMS,
    dtype=DTYPES,
    values=st.sampled_from([None, 1, 1000, 5000]),
)
def test_lookups_give_the_totals_of_the_core(
    batch, terms, width, table, ignored, dim, dtype, values
):
    sketch = whence.Sketch(dim=dim, seed=5)
    indices = torch.randint(table, (batch, terms))
    gradient = random(batch, terms, width, dtype=dtype)
    found, core = (kind(sketch, batch, *at) for kind, at in KINDS)
    with sizes(None, values):
        found.add_lookup("w", (table, width), indices.int(), gradient, ignored)
    core.add_lookup("w", (table, width), indices.numpy(), single(gradient), ignored)
    assert_same(found.totals(), core.totals, np.linalg.norm(single(gradient), axis=(1, 2)))


@pytest.mark.parametrize("width", [24, 32])
@pytest.mark.parametrize("dim", [5, 100, 3000])
def test_a_row_that_occurs_a_thousand_times_is_the_dense_gradient(dim, width):
    sketch = whence.Sketch(dim=dim)
    indices = torch.randint(3, (2, 1000)) * 7
    values = random(2, 1000, width).double()
    dense = torch.zeros(2, 20, width, dtype=torch.float64)
    for sample in range(2):
        for term, index in enumerate(indices[sample]):
            dense[sample, index] += values[sample, term].float()
    found, expected = (DeviceAccumulator(sketch, 2, CPU) for _ in range(2))
    found.add_lookup("w", (20, width), indices, values, None)
    expected.add("w", (20, width), dense.flatten(1))
    norms = np.linalg.norm(single(dense), axis=(1, 2))
    assert_same(found.totals(), expected.totals(), norms)


@pytest.mark.parametrize("dim", [13, 512, 40_000, 300_000])
def test_a_parameter_of_several_slabs_gives_the_totals_of_the_core(dim):
    sketch = whence.Sketch(dim=dim)
    shape = (3, 700_001)
    left, right = random(1, 2, 3, seed=1), random(1, 2, 700_001, seed=2)
    dense = torch.einsum("btr,btc->brc", left.double(), right.double())
    norm = np.linalg.norm(dense.numpy().ravel())
    found = DeviceAccumulator(sketch, 1, CPU)
    found.add_outer("w", shape, left, right)
    core = Accumulator(sketch, 1)
    core.add_outer("w", shape, left.numpy(), right.numpy())
    # The core sums 2^20 values in 32 bits, so that a narrow row of it has more of an error.
    tolerance = 1e-6 if dim >= 512 else 1e-4
    assert np.linalg.norm(found.totals() - core.totals) <= tolerance * norm
    found.add("w", shape, -dense.flatten(1))
    assert np.linalg.norm(found.totals()) <= 1e-6 * norm


def everything(sketch, device, seed=0):
    """An accumulator on `device` to which all kinds of gradients were added."""
    found = DeviceAccumulator(sketch, 3, device)
    found.add("flat", (3000,), random(3, 2951, seed=seed).to(device), 49)
    found.add("half", (33,), random(3, 33, seed=seed + 1, dtype=torch.bfloat16).to(device))
    left, right = random(3, 9, 30, seed=seed + 2), random(3, 9, 77, seed=seed + 3)
    found.add_outer("outer", (30, 77), left.to(device), right.to(device))
    found.add_outer("outer", (90, 77), left[:2].to(device), right[:2].to(device), 77, 1)
    indices = torch.arange(3 * 200).view(3, 200) ** 2 % 50
    for width in (16, 21):
        values = random(3, 200, width, seed=seed + 4).to(device)
        found.add_lookup(f"table{width}", (50, width), indices.to(device), values, 4)
    return found


def expected_of_everything(sketch):
    core = Accumulator(sketch, 3)
    core.add("flat", (3000,), random(3, 2951).numpy(), 49)
    core.add("half", (33,), single(random(3, 33, seed=1, dtype=torch.bfloat16)))
    left, right = random(3, 9, 30, seed=2).numpy(), random(3, 9, 77, seed=3).numpy()
    core.add_outer("outer", (30, 77), left, right)
    core.add_outer("outer", (90, 77), left[:2], right[:2], 77, 1)
    indices = np.arange(3 * 200).reshape(3, 200) ** 2 % 50
    for width in (16, 21):
        values = random(3, 200, width, seed=4).numpy()
        core.add_lookup(f"table{width}", (50, width), indices, values, 4)
    return core.totals


@pytest.mark.parametrize("dim", [7, 60, 1000])
def test_nothing_is_refused_as_not_deterministic(dim):
    with sizes(slab=512), deterministic():  # which also fills new memory with NaN
        found = everything(whence.Sketch(dim=dim), CPU)
        assert found.bad_rows() == []
    assert_same(found.totals(), expected_of_everything(whence.Sketch(dim=dim)), 0)


def test_no_function_is_called_that_adds_by_atomic_operations():
    refused = {
        "index_add",
        "scatter",
        "bincount",
        "histc",
        "embedding",
        "index_put",
        "put_",
        "cumsum",
    }
    called = []

    class Calls(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), options=None):
            name = function._schema.name.split("::")[1]
            if name == "cumsum" and not arguments[0].dtype.is_floating_point:
                name = "running count"  # of whole numbers, in which order does not matter
            called.append(name)
            return function(*arguments, **(options or {}))

    with Calls():
        everything(whence.Sketch(dim=60), CPU)
    assert "index_select" in called
    assert [name for name in called if any(word in name for word in refused)] == []


def test_under_autocast_products_are_of_32_bits():
    expected = everything(whence.Sketch(dim=60), CPU).totals()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = everything(whence.Sketch(dim=60), CPU).totals()
    assert np.array_equal(found, expected)


def test_gradients_that_require_a_gradient_are_taken_without_one():
    found = DeviceAccumulator(whence.Sketch(dim=60), 2, CPU)
    values = random(2, 4, 9).requires_grad_()
    with torch.enable_grad():
        found.add("a", (9,), values.sum(1))
        found.add_outer("b", (9, 9), values, values * 2)
        found.add_lookup("c", (5, 9), torch.ones(2, 4, dtype=torch.int64), values, None)
    assert found.bad_rows() == []
    assert not found._totals.requires_grad


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dim", [3, 60, 4096])
def test_rows_that_are_not_finite_are_reported_with_their_first_parameter(bad, dim):
    def with_bad(values, *place):
        values[place] = bad
        return values

    found = DeviceAccumulator(whence.Sketch(dim=dim), 6, CPU)
    found.add("good", (9,), random(6, 9))
    found.add("flat", (700,), with_bad(random(6, 700), 4, 699))
    left = with_bad(random(2, 3, 8), 1, 0, 0)
    found.add_outer("outer", (8, 8), left, random(2, 3, 8), first=1)
    found.add("flat", (700,), with_bad(random(6, 700), 2, 0))
    indices = torch.arange(6 * 5).view(6, 5) % 4
    values = with_bad(with_bad(random(6, 5, 10), 3, 0, 9), 0, 1, 0)
    found.add_lookup("table", (4, 10), indices, values, 1)  # index 1 at [0, 1]: left out
    assert int(indices[0, 1]) == 1
    assert found.bad_rows() == [2, 3, 4]
    assert found.bad_parameters() == {2: "flat", 3: "table", 4: "flat"}
    assert np.isfinite(found.totals()[[0, 1, 5]]).all()


def test_infinities_that_cancel_are_reported():
    found = DeviceAccumulator(whence.Sketch(dim=1), 2, CPU)
    values = torch.zeros(2, 32)
    values[1] = torch.tensor([math.inf, -math.inf]).repeat(16)
    found.add("w", (32,), values)
    assert found.bad_rows() == [1]


def test_the_totals_are_a_copy():
    found = DeviceAccumulator(whence.Sketch(dim=8), 2, CPU)
    assert found.totals().shape == (2, 8)
    before = found.totals()
    found.add("w", (3,), torch.ones(2, 3))
    assert (before == 0).all()
    assert (found.totals() != 0).any()


def test_plans_are_made_once_and_shared_by_the_accumulators_of_a_sketch():
    sketch = whence.Sketch(dim=60)
    with mock.patch.object(module, "slots", wraps=slots) as made:
        for _ in range(3):
            found = DeviceAccumulator(sketch, 2, CPU)
            found.add("a", (4000,), random(2, 4000))
            found.add_outer("b", (8, 30), random(2, 3, 8), random(2, 3, 30))
    assert made.call_count == 2
    plans = module._plans(sketch)
    assert len(plans) == 2
    assert plans is not module._plans(whence.Sketch(dim=60))


def test_plans_of_another_shape_name_or_start_are_other_plans():
    sketch = whence.Sketch(dim=60)
    found = DeviceAccumulator(sketch, 1, CPU)
    core = Accumulator(sketch, 1)
    for name, shape, start in (
        ("a", (40,), 0),
        ("b", (40,), 0),
        ("a", (2, 20), 0),
        ("a", (40,), 3),
    ):
        found.add(name, shape, random(1, 30), start)
        core.add(name, shape, random(1, 30).numpy(), start)
    assert len(module._plans(sketch)) == 4
    assert_same(found.totals(), core.totals, 0)


def test_plans_take_no_more_memory_than_they_may_and_the_oldest_go_first():
    def fill(sketch, names):
        found = DeviceAccumulator(sketch, 1, CPU)
        for name in names:
            found.add(name, (1000,), random(1, 1000))
        return found.totals()

    unlimited = whence.Sketch(dim=50)
    expected = fill(unlimited, "abcab")
    plans = module._plans(unlimited)
    assert plans.bytes == sum(plan.bytes for plan in plans._kept.values())
    limit = int(0.9 * plans.bytes)  # two of three
    with mock.patch.object(module, "CACHE_BYTES", limit):
        sketch = whence.Sketch(dim=50)
        assert np.array_equal(fill(sketch, "abcab"), expected)
        kept = module._plans(sketch)
        assert 0 < kept.bytes <= limit
        fill(sketch, "aba")
        fill(sketch, "c")  # in the place of b, for a was used after it
        assert [key[0] for key in kept._kept] == ["a", "c"]
    with mock.patch.object(module, "CACHE_BYTES", 10):
        sketch = whence.Sketch(dim=50)
        assert np.array_equal(fill(sketch, "abcab"), expected)
        assert (len(module._plans(sketch)), module._plans(sketch).bytes) == (0, 0)


def test_plans_go_with_their_sketch():
    sketch = whence.Sketch(dim=50)
    DeviceAccumulator(sketch, 1, CPU).add("a", (100,), random(1, 100))
    gc.collect()
    before = len(module._PLANS)
    del sketch
    gc.collect()
    assert len(module._PLANS) == before - 1


def test_no_product_is_larger_than_a_slab_of_some_samples():
    with sizes(slab=200, values=500), mock.patch.object(torch, "bmm", wraps=torch.bmm) as products:
        found = DeviceAccumulator(whence.Sketch(dim=50), 9, CPU)
        for columns in (1, 33, 333):
            found.add_outer("a", (40, columns), random(9, 2, 40), random(9, 2, columns))
    for call in products.call_args_list:
        (batch, rows, _), (_, _, columns) = (part.shape for part in call.args)
        assert rows * columns <= 200
        assert batch * rows * columns <= 500


@pytest.mark.parametrize("longest", [1, 8, 9, 300])
@pytest.mark.parametrize("lanes", [1, 16])
@pytest.mark.parametrize("dim", [4, 32, 37])
def test_runs_of_any_length_are_summed(longest, lanes, dim):
    keys = torch.tensor([2] * longest + [0, dim, dim, 2 * dim - 2])
    entries = torch.randint(-9, 9, (2, len(keys) + 1, lanes)).float()
    entries[:, -1] = 0
    found = module._Sums.of(keys, 2, dim, lanes)(entries)
    expected = torch.zeros(2, 2, dim, dtype=torch.float64)
    for place, key in enumerate(keys.tolist()):
        for lane in range(lanes):
            expected[:, key // dim, bucket(key % dim, lane, dim)] += entries[:, place, lane]
    assert torch.equal(found, expected.view(4, dim))


def accumulator(batch=2):
    return DeviceAccumulator(whence.Sketch(dim=8), batch, CPU)


def lookup(indices):
    found = accumulator()
    found.add_lookup("table", (5, 3), torch.tensor([[0, 4], indices]), torch.ones(2, 2, 3), None)
    return found


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (
            lambda: accumulator().add("w", (4,), torch.ones(3, 4)),
            errors.ShapeError,
            r"values must be \[2, any\], got \[3, 4\]",
        ),
        (lambda: accumulator().add("w", (4,), torch.ones(2, 2, 2)), errors.ShapeError, "any"),
        (
            lambda: accumulator().add("w", (4,), torch.ones(2, 4), 1),
            errors.ShapeError,
            "values must be at most 3 wide from coordinate 1, got 4",
        ),
        (lambda: accumulator().add("w", (4,), torch.ones(2, 1), -1), errors.ShapeError, "-1"),
        (
            lambda: accumulator().add("w", (2**25, 2**25), torch.ones(2, 4)),
            errors.ShapeError,
            "at most 281474976710656 values",
        ),
        (
            lambda: accumulator().add("w", (4,), torch.ones(2, 4, dtype=torch.int64)),
            errors.DtypeError,
            "values must be floating, got torch.int64",
        ),
        (
            lambda: accumulator().add("w", (4,), torch.ones(2, 4, device="meta")),
            errors.ArgumentError,
            "values must be on cpu, got meta",
        ),
        (
            lambda: accumulator().add_outer("w", (9,), torch.ones(2, 1, 3), torch.ones(2, 2, 3)),
            errors.ShapeError,
            r"right must be \[2, 1, any\]",
        ),
        (
            lambda: accumulator().add_outer("w", (8,), torch.ones(2, 1, 3), torch.ones(2, 1, 3)),
            errors.ShapeError,
            "at most 8 values from 0, got 3 x 3",
        ),
        (
            lambda: accumulator().add_outer(
                "w", (9,), torch.ones(2, 1, 3), torch.ones(2, 1, 3), first=1
            ),
            errors.ShapeError,
            "at most 1 samples from row 1, got 2",
        ),
        (
            lambda: accumulator().add_lookup(
                "w", (5, 3), torch.ones(2, 2), torch.ones(2, 2, 3), None
            ),
            errors.DtypeError,
            "indices must be integers, got torch.float32",
        ),
        (
            lambda: accumulator().add_lookup(
                "w", (5, 3), torch.ones(2, 2, dtype=torch.int64), torch.ones(2, 2, 4), None
            ),
            errors.ShapeError,
            r"shape must be \[rows, 4\], as values are, got \[5, 3\]",
        ),
        (
            lambda: lookup([2, 5]).totals(),
            errors.ArgumentError,
            "indices of table must be from 0 to below 5, got 5",
        ),
        (lambda: lookup([-1, 2]).bad_rows(), errors.ArgumentError, "got -1"),
    ],
)
def test_wrong_input_is_named(call, error, match):
    with pytest.raises(error, match=match):
        call()


@pytest.mark.parametrize("change", [{"kind": "other"}, {"option": 1}])
def test_another_map_is_refused(change):
    sketch = whence.Sketch(dim=8)
    assert supports(sketch)
    spec = {**sketch.spec, **change}
    changed = mock.Mock(kind=spec["kind"])
    changed.spec = spec
    assert not supports(changed)
    with pytest.raises(errors.ArgumentError, match="sketch must be one that `supports` accepts"):
        DeviceAccumulator(changed, 2, CPU)


def test_an_index_is_remembered_until_it_is_looked_at():
    found = lookup([7, 1])
    found.add_lookup("table", (5, 3), torch.zeros(2, 1, dtype=torch.int64), torch.ones(2, 1, 3), 0)
    with pytest.raises(errors.ArgumentError, match="got 7"):
        found.totals()


@CUDA
@pytest.mark.parametrize("dim", [7, 60, 1000, 4096])
@pytest.mark.parametrize("slab", [512, None])
def test_cuda_gives_the_totals_of_the_core_and_the_same_bits_again(dim, slab, monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    cuda = torch.device("cuda")
    with sizes(slab), deterministic():
        found = everything(whence.Sketch(dim=dim), cuda).totals()
        again = everything(whence.Sketch(dim=dim), cuda).totals()
    assert np.array_equal(found, again)
    assert_same(found, expected_of_everything(whence.Sketch(dim=dim)), 0)


@CUDA
def test_cuda_makes_the_slots_of_the_core():
    expected_offsets, expected_signs = CoreSketch("chunked_sjlt", 1000, 9).slots("w", [300, 70])
    chunks = torch.arange(len(expected_offsets), device="cuda")
    offsets, signs = slots(CoreSketch("chunked_sjlt", 1000, 9).key("w", [300, 70]), chunks, 1000)
    assert np.array_equal(offsets.cpu().numpy(), expected_offsets)
    assert np.array_equal(signs.cpu().numpy().view(np.uint16), expected_signs)


@CUDA
@pytest.mark.parametrize("dim", [512, 40_000])
def test_a_large_matrix_on_cuda_gives_the_totals_of_the_core_and_the_same_bits_again(dim):
    sketch = whence.Sketch(dim=dim)
    left, right = random(4, 8, 1001, seed=1), random(4, 8, 2049, seed=2)
    runs = []
    for _ in range(2):
        found = DeviceAccumulator(sketch, 4, torch.device("cuda"))
        found.add_outer("w", (1001, 2049), left.cuda(), right.cuda())
        runs.append(found.totals())
    core = Accumulator(sketch, 4)
    core.add_outer("w", (1001, 2049), left.numpy(), right.numpy())
    assert np.array_equal(*runs)
    assert_same(runs[0], core.totals, 0)


@CUDA
def test_with_known_plans_the_processor_does_not_wait_for_cuda():
    found = DeviceAccumulator(whence.Sketch(dim=60), 2, torch.device("cuda"))
    values, left, right = random(2, 900).cuda(), random(2, 3, 20).cuda(), random(2, 3, 50).cuda()
    values[1, 0] = math.nan

    def add():
        found.add("flat", (900,), values)
        found.add_outer("outer", (20, 50), left, right)

    add()
    torch.cuda.set_sync_debug_mode("error")
    try:
        add()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert found.bad_rows() == [1]


@CUDA
def test_streams_of_cuda_add_one_after_the_other():
    sketch = whence.Sketch(dim=60)
    found, core = DeviceAccumulator(sketch, 2, torch.device("cuda")), Accumulator(sketch, 2)
    values = random(2, 900)
    on_device = values.cuda()
    torch.cuda.synchronize()
    for stream in [torch.cuda.Stream() for _ in range(4)]:
        with torch.cuda.stream(stream):
            for _ in range(5):
                found.add("flat", (900,), on_device)
        for _ in range(5):
            core.add("flat", (900,), values.numpy())
    assert_same(found.totals(), core.totals, 0)
