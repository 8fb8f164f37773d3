"""The sketch as Python sees it."""

import copy
import pickle

import numpy as np
import pytest
import torch
from definitions import bucket
from hypothesis import given, settings
from hypothesis import strategies as st

import whence
from whence import errors
from whence._core import Sketch as CoreSketch
from whence.sketch import KINDS, canonical_name


def defined(gradients, dim, seed):
    """The map, coordinate by coordinate, from its slots."""
    core = CoreSketch("chunked_sjlt", dim, seed)
    rows = np.zeros((len(next(iter(gradients.values()))), dim))
    for name, values in gradients.items():
        offsets, signs = core.slots(name, list(values.shape[1:]))
        flat = values.reshape(len(values), -1).astype(np.float64)
        for index in range(flat.shape[1]):
            chunk, lane = divmod(index, 16)
            sign = -1 if signs[chunk] >> lane & 1 else 1
            rows[:, bucket(int(offsets[chunk]), lane, dim)] += sign * flat[:, index]
    return rows


@settings(max_examples=40, deadline=None)
@given(
    shapes=st.lists(st.lists(st.integers(1, 7), max_size=3), min_size=1, max_size=4),
    dim=st.integers(1, 100),
    seed=st.integers(0, 2**64 - 1),
)
def test_a_row_is_what_the_definition_says(shapes, dim, seed):
    generator = np.random.default_rng(0)
    gradients = {
        f"layer{i}.weight": generator.normal(size=(3, *shape)).astype(np.float32)
        for i, shape in enumerate(shapes)
    }
    found = whence.Sketch(dim=dim, seed=seed)(gradients)
    assert found.dtype == np.float32
    assert np.allclose(found, defined(gradients, dim, seed), rtol=1e-5, atol=1e-4)


def gradients(batch=5):
    generator = np.random.default_rng(1)
    return {
        "b.weight": generator.normal(size=(batch, 33, 70)).astype(np.float32),
        "a.bias": generator.normal(size=(batch, 33)).astype(np.float32),
        "c": generator.normal(size=(batch, 4099)).astype(np.float32),
    }


def test_flat_with_a_layout_is_the_same_bits_in_any_order():
    parts = gradients()
    expected = whence.Sketch(dim=512)(parts)
    for order in (["b.weight", "a.bias", "c"], ["c", "b.weight", "a.bias"]):
        flat = np.concatenate([parts[name].reshape(5, -1) for name in order], axis=1)
        layout = [(name, parts[name].shape[1:]) for name in order]
        assert np.array_equal(whence.Sketch(dim=512)(flat, layout), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_bits_of_every_kind_are_the_same_however_the_work_is_split(kind):
    generator = np.random.default_rng(2)
    parts = {
        "a.weight": generator.normal(size=(19, 40, 70)).astype(np.float32),
        "a.bias": generator.normal(size=(19, 40)).astype(np.float32),
    }
    flat = np.concatenate([part.reshape(19, -1) for part in parts.values()], axis=1)
    layout = [(name, part.shape[1:]) for name, part in parts.items()]
    expected = whence.Sketch(kind, dim=96, threads=1)(parts)
    for threads in (1, 2, 3, 8):
        sketch = whence.Sketch(kind, dim=96, threads=threads)
        assert np.array_equal(sketch(flat, layout), expected)
        for cut in (1, 4, 18):
            some = [sketch({k: v[:cut] for k, v in parts.items()}), sketch(flat[cut:], layout)]
            assert np.array_equal(np.concatenate(some), expected)
    halves = {name: part.astype(np.float16) for name, part in parts.items()}
    wide = {name: part.astype(np.float32) for name, part in halves.items()}
    assert np.array_equal(sketch(halves), sketch(wide))


@pytest.mark.parametrize("threads", [1, 2, 3, 8])
def test_bits_do_not_depend_on_threads_or_batch_split(threads):
    generator = np.random.default_rng(1)
    big = generator.normal(size=(4, 1_100_000)).astype(np.float32)
    expected = whence.Sketch(dim=256, threads=1)(big)
    sketch = whence.Sketch(dim=256, threads=threads)
    assert np.array_equal(sketch(big), expected)
    assert np.array_equal(np.concatenate([sketch(big[:1]), sketch(big[1:])]), expected)


def test_bits_are_the_same_for_every_instruction_set():
    import os
    import subprocess
    import sys

    script = (
        "import numpy as np, hashlib, whence\nfrom whence.sketch import KINDS\n"
        "g = np.random.default_rng(0).normal(size=(3, 50_000)).astype(np.float32)\n"
        "rows = [whence.Sketch(dim=1000)(g), whence.Sketch(dim=1000)(g.astype(np.float16))]\n"
        "rows += [whence.Sketch(k, dim=100)(g[:, :600].reshape(3, 20, 30)) for k in KINDS]\n"
        "print(hashlib.sha256(b''.join(map(bytes, rows))).hexdigest())"
    )
    found = {
        subprocess.run(
            [sys.executable, "-c", script],
            env={**os.environ, "WHENCE_INSTRUCTION_SET": name},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for name in ("scalar", "avx2", "avx512", "")
    }
    assert len(found) == 1


def test_other_layers_do_not_change_a_layers_hash():
    parts = gradients()
    sketch = whence.Sketch(dim=512)
    alone = [sketch({name: value}) for name, value in parts.items()]
    assert np.allclose(sum(alone), sketch(parts), rtol=1e-5, atol=1e-4)


def test_a_bare_array_is_one_parameter_without_a_name():
    values = gradients()["b.weight"]
    sketch = whence.Sketch(dim=64)
    assert np.array_equal(sketch(values), sketch({"": values}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_tensors_of_16_bits_give_the_sketch_of_their_values(dtype):
    values = torch.randn(3, 5000).to(dtype)
    sketch = whence.Sketch(dim=128)
    assert np.array_equal(sketch(values), sketch(values.float()))


class Foreign:
    """An array of another library, which offers DLPack."""

    def __init__(self, array):
        self.array = array

    def __dlpack__(self, **options):
        return self.array.__dlpack__(**options)

    def __dlpack_device__(self):
        return self.array.__dlpack_device__()


def test_arrays_of_other_libraries_are_taken_by_dlpack_and_the_buffer_protocol():
    values = np.random.default_rng(0).normal(size=(3, 500)).astype(np.float32)
    sketch = whence.Sketch(dim=64)
    assert np.array_equal(sketch(Foreign(values)), sketch(values))
    assert np.array_equal(sketch(memoryview(values)), sketch(values))


def test_a_sketch_can_be_pickled_and_copied():
    sketch = whence.Sketch("sjlt", dim=64, seed=5, nonzeros=4, normalize=True, threads=2)
    values = np.random.default_rng(0).normal(size=(3, 500)).astype(np.float32)
    for copied in (pickle.loads(pickle.dumps(sketch)), copy.deepcopy(sketch)):
        assert copied.spec == sketch.spec
        assert np.array_equal(copied(values), sketch(values))


def test_strided_arrays_are_taken_as_they_read():
    values = np.random.default_rng(0).normal(size=(50, 6)).astype(np.float32)
    sketch = whence.Sketch(dim=64)
    assert np.array_equal(sketch(values.T), sketch(np.ascontiguousarray(values.T)))
    assert np.array_equal(sketch(values[::-2]), sketch(values[::-2].copy()))


@pytest.mark.parametrize(
    ("name", "canonical"),
    [
        ("fc.weight", "fc.weight"),
        ("module.fc.weight", "fc.weight"),
        ("_orig_mod.module.fc.weight", "fc.weight"),
        ("a._fsdp_wrapped_module.b._checkpoint_wrapped_module.weight", "a.b.weight"),
        ("submodule.weight", "submodule.weight"),
        ("", ""),
    ],
)
def test_wrappers_are_not_part_of_a_name(name, canonical):
    assert canonical_name(name) == canonical
    values = np.ones((1, 20), np.float32)
    sketch = whence.Sketch(dim=64)
    assert np.array_equal(sketch({name: values}), sketch({canonical: values}))


def test_expected_error_is_what_is_measured():
    generator = np.random.default_rng(0)
    x, y = generator.normal(size=(2, 400)).astype(np.float32)
    y = (0.6 * x + 0.8 * y).astype(np.float32)
    norms = np.linalg.norm(x) * np.linalg.norm(y)
    cosine = float(x @ y / norms)
    errors_ = []
    for seed in range(3000):
        rows = whence.Sketch(dim=64, seed=seed)(np.stack([x, y]))
        errors_.append((rows[0] @ rows[1] - x @ y) / norms)
    expected = whence.Sketch(dim=64).expected_error(cosine)
    # 3,000 draws: the mean scatters by 1/55 of a deviation, the deviation by about 2 %.
    assert abs(np.mean(errors_)) < 4 * expected / np.sqrt(3000)
    assert 0.85 < np.std(errors_) / expected < 1.05


NAN = float("nan")


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: whence.Sketch("jl"), errors.ArgumentError, "kind must be one of chunked_sjlt"),
        (
            lambda: whence.Sketch(dim=0),
            errors.ArgumentError,
            "dim must be from 1 to 1048576, got 0",
        ),
        (lambda: whence.Sketch(dim=2**62), errors.ArgumentError, f"got {2**62}"),
        (lambda: whence.Sketch(dim=True), errors.DtypeError, "dim must be an integer, got bool"),
        (lambda: whence.Sketch(dim=8.0), errors.DtypeError, "dim must be an integer"),
        (lambda: whence.Sketch(seed=-1), errors.ArgumentError, "seed must be from 0"),
        (lambda: whence.Sketch(seed=2**64), errors.ArgumentError, "seed must be from 0"),
        (lambda: whence.Sketch(threads=0), errors.ArgumentError, "threads must be at least 1"),
        (lambda: sketch(np.ones((2, 3))), errors.DtypeError, r"float64 of shape \[2, 3\]"),
        (lambda: sketch([[1.0]]), errors.DtypeError, r"got list \[\[1.0\]\]"),
        (lambda: sketch(np.ones((0, 3), "f4")), errors.ShapeError, "at least one row"),
        (lambda: sketch(np.float32(1)), errors.DtypeError, "gradients must be float32"),
        (lambda: sketch(np.ones((), "f4")), errors.ShapeError, "at least one row"),
        (lambda: sketch({}), errors.ArgumentError, "at least one parameter"),
        (
            lambda: sketch({"a": np.ones((2, 3), "f4"), "b": np.ones((3, 3), "f4")}),
            errors.ShapeError,
            "a has 2, b has 3",
        ),
        (
            lambda: sketch({"a": np.ones((2, 3), "f4"), "module.a": np.ones((2, 3), "f4")}),
            errors.ArgumentError,
            "distinct, got 'a' twice",
        ),
        (
            lambda: sketch({"a": np.ones((2, 3), "f4")}, [("a", (3,))]),
            errors.ArgumentError,
            "layout must be None",
        ),
        (
            lambda: sketch(np.ones((2, 3), "f4"), [("a", (4,))]),
            errors.ShapeError,
            r"\[batch, 4\]",
        ),
        (
            lambda: sketch(np.ones((2, 3), "f4"), [("a", (-3,))]),
            errors.ArgumentError,
            "layout sizes must be from 0",
        ),
        (
            lambda: sketch({"w": np.array([[1.0], [NAN]], "f4")}),
            errors.NotFiniteError,
            r"gradients\['w'\] must be finite, .* \[1\]",
        ),
        (lambda: sketch.expected_error(2), errors.ArgumentError, "from -1 to 1"),
    ],
)
def test_wrong_input_is_named(call, error, match):
    with pytest.raises(error, match=match):
        call()


sketch = whence.Sketch(dim=8)


def test_a_row_that_exceeds_float32_is_reported():
    huge = np.full((1, 64), 3e38, np.float32)
    with pytest.raises(errors.NotFiniteError):
        whence.Sketch(dim=1)(np.concatenate([huge] * 40, axis=1))


def test_a_zero_sized_parameter_adds_nothing():
    values = np.ones((2, 20), np.float32)
    both = {"a": values, "b": np.ones((2, 0), np.float32)}
    assert np.array_equal(sketch(both), sketch({"a": values}))
