"""What is random is what `docs/randomness.md` says, by a definition in plain Python."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from definitions import matrix_of, parameter_key, value

import whence
from whence.sketch import KINDS

PAGE = Path(__file__).parents[1] / "docs" / "randomness.md"


def published(name):
    text = PAGE.read_text(encoding="utf-8")
    return json.loads(re.search(rf"<!-- {name} -->\n```json\n(.*?)```", text, re.DOTALL)[1])


def test_the_page_is_of_this_version():
    assert f"`hash_version` {whence.HASH_VERSION}." in PAGE.read_text(encoding="utf-8")


@pytest.mark.parametrize("vector", published("keys"), ids=lambda v: v["name"] or "empty")
def test_published_keys(vector):
    key = parameter_key(vector["seed"], vector["name"], vector["shape"])
    assert format(key, "016x") == vector["key"]
    assert [format(value(key, c), "016x") for c in vector["counters"]] == vector["values"]


def test_every_kind_has_published_rows():
    assert {vector["kind"] for vector in published("rows")} == set(KINDS)


@pytest.mark.parametrize("vector", published("rows"), ids=lambda v: f"{v['kind']}-{v['name']}")
def test_published_rows(vector):
    gradient = np.arange(1, np.prod(vector["shape"]) + 1, dtype=np.float32)
    sketch = whence.Sketch(
        vector["kind"],
        dim=vector["dim"],
        seed=vector["seed"],
        nonzeros=vector.get("nonzeros"),
    )
    row = sketch({vector["name"]: gradient.reshape(1, *vector["shape"])})[0]
    assert np.allclose(row, vector["row"], rtol=1e-6, atol=1e-3)


@pytest.mark.parametrize("dim", [8, 12, 24, 64, 130])
@pytest.mark.parametrize("shape", [(5, 7), (40,), (3, 4, 6), (70, 33)])
@pytest.mark.parametrize("kind", [*KINDS, "sjlt 2", "sjlt 4"])
def test_the_matrix_is_the_defined_one(kind, shape, dim):
    kind, _, nonzeros = kind.partition(" ")
    nonzeros = int(nonzeros or 1)
    if dim % nonzeros:
        dim -= dim % nonzeros
    count = int(np.prod(shape))
    unit = np.eye(count, dtype=np.float32).reshape(count, *shape)
    extra = {"nonzeros": nonzeros} if kind == "sjlt" else {}
    found = whence.Sketch(kind, dim=dim, seed=3, **extra)({"a.weight": unit})
    expected = matrix_of(kind, dim, 3, "a.weight", list(shape), nonzeros)
    assert np.allclose(found, expected, rtol=2e-7, atol=1e-6)


@pytest.mark.parametrize(("kind", "near"), [("chunked_sjlt", 0.0), ("sjlt", 1 / 16)])
def test_two_coordinates_share_a_bucket_as_often_as_the_law_says(kind, near):
    draws, dim = 4000, 16
    unit = np.zeros((4, 48), np.float32)
    unit[range(4), [0, 9, 16, 41]] = 1  # 0 and 9 are in one chunk; 16 and 41 are in others
    together = np.zeros((4, 4))
    signs = np.zeros((4, 4))
    for seed in range(draws):
        rows = whence.Sketch(kind, dim=dim, seed=seed)(unit)
        products = rows @ rows.T
        together += products != 0
        signs += products
    deviation = np.sqrt(draws / dim * (1 - 1 / dim))
    for one, other in ((0, 2), (0, 3), (1, 2), (2, 3)):
        assert abs(together[one, other] - draws / dim) < 4 * deviation
        assert abs(signs[one, other]) < 4 * np.sqrt(draws / dim)
    assert abs(together[0, 1] - draws * near) <= 4 * deviation * (near > 0)


@pytest.mark.parametrize("kind", KINDS)
def test_inner_products_are_unbiased_over_a_thousand_seeds(kind):
    generator = np.random.default_rng(0)
    x, y = generator.normal(size=(2, 24, 40)).astype(np.float32)
    y = (0.6 * x + 0.8 * y).astype(np.float32)
    pair, exact = np.stack([x, y]), float((x * y).sum())
    found = []
    for seed in range(1000):
        rows = whence.Sketch(kind, dim=16, seed=seed, threads=1)({"w": pair})
        found.append(float(rows[0] @ rows[1]))
    assert abs(np.mean(found) - exact) < 3.5 * np.std(found) / np.sqrt(1000)
