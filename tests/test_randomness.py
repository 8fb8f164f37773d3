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
