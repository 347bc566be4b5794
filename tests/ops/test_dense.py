from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from slipstream.ops.dense import Moments, logarithms, transform_dense

FORMULAS: dict[str, Callable[[int, int], float]] = {
    "dlrm": lambda x, minimum: math.log(max(x, 0) + 1),
    "standard": lambda x, minimum: (math.log(max(x, 0) + 1) - 1.25) / 0.8,
    "torchrec": lambda x, minimum: math.log(max(x - minimum, 0) + 2),
    "nvidia": lambda x, minimum: math.log(max(x, -1) + 2),
    "none": lambda x, minimum: float(x),
}


@pytest.mark.parametrize("name", FORMULAS)
@given(values=st.lists(st.integers(-(2**31), 2**40), max_size=20), minimum=st.integers(-1000, 0))
def test_each_transform_is_its_formula(name: str, values: list[int], minimum: int):
    got = transform_dense(np.array(values, np.int64), name=name, minimum=minimum, mean=1.25, deviation=0.8)
    assert got.dtype == np.float32
    assert np.isfinite(got).all()
    np.testing.assert_allclose(got, [FORMULAS[name](value, minimum) for value in values], rtol=1e-6, atol=1e-7)


def test_a_missing_value_becomes_zero_under_dlrm():
    assert transform_dense(np.array([0]), name="dlrm", minimum=-5).tolist() == [0.0]


def test_an_unknown_transform_is_named():
    with pytest.raises(ValueError, match="found 'sqrt'"):
        transform_dense(np.array([1]), name="sqrt", minimum=0)


@given(values=st.lists(st.integers(-(2**31), 2**40), min_size=1, max_size=50), data=st.data())
def test_moments_are_numpys_and_do_not_depend_on_how_a_column_is_cut(values: list[int], data: st.DataObject):
    whole, cut = Moments(), Moments()
    whole.add(logarithms(np.array(values)))
    at = data.draw(st.integers(0, len(values)))
    for piece in (values[at:], values[:at]):
        cut.add(logarithms(np.array(piece, np.int64)))
    assert cut.result() == whole.result()
    logs = np.log1p(np.maximum(np.array(values, float), 0))
    mean, deviation = whole.result()
    assert mean == pytest.approx(logs.mean(), abs=1e-6)
    assert deviation == pytest.approx(logs.std() if logs.std() > 1e-3 else 1.0, rel=1e-3)


def test_moments_of_nothing_change_nothing():
    assert Moments().result() == (0.0, 1.0)
