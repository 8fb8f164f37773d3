"""Arrays that callers give: what is wrong with them is named, and where."""

import warnings

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from whence import _arrays
from whence.errors import NotFiniteError


@given(st.lists(st.integers(-(2**63), 2**63 - 1)) | st.lists(st.text(max_size=3)))
def test_distinct_values_come_once_each_in_order(values):
    # A list of NUL characters at the end of a text is lost in numpy's own strings.
    values = [value.rstrip("\0") if isinstance(value, str) else value for value in values]
    array = np.array(values) if values else np.empty(0, np.int64)
    assert _arrays.distinct(array).tolist() == sorted(set(values))


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("place", [(0, 0), (1, 7), (2_999, 0), (2_999, 499)])
def test_the_first_value_that_is_not_finite_is_named(place, order):
    values = np.ones((3000, 500), np.float32, order)  # more than are looked at together
    _arrays.finite("rows", values)
    values[2_999, 499] = np.inf
    values[place] = np.nan
    message = rf"^rows must be finite, got nan at \[{place[0]}, {place[1]}\]$"
    with pytest.raises(NotFiniteError, match=message):
        _arrays.finite("rows", values)


def test_no_values_are_finite():
    _arrays.finite("rows", np.empty((0, 3)))
    with pytest.raises(NotFiniteError, match=r"got -inf at \[\]$"):
        _arrays.finite("number", np.float64(-np.inf))


def test_a_product_is_the_product_and_says_nothing_of_nan():
    left = np.arange(6.0).reshape(2, 3)
    left[0, 0] = np.inf
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # also what the tests let pass
        found = _arrays.matmul(left, np.array([[0.0, 1], [1, 2], [3, 4]]))
    assert np.isnan(found[0, 0])
    assert found[1].tolist() == [19.0, 31.0]
