from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from slipstream.ops.dense import transform_dense

FORMULAS: dict[str, Callable[[int, int], float]] = {
    "dlrm": lambda x, minimum: math.log(max(x, 0) + 1),
    "torchrec": lambda x, minimum: math.log(max(x - minimum, 0) + 2),
    "nvidia": lambda x, minimum: math.log(max(x, -1) + 2),
    "none": lambda x, minimum: float(x),
}


@pytest.mark.parametrize("name", FORMULAS)
@given(values=st.lists(st.integers(-(2**31), 2**40), max_size=20), minimum=st.integers(-1000, 0))
def test_each_transform_is_its_formula(name: str, values: list[int], minimum: int):
    got = transform_dense(np.array(values, np.int64), name=name, minimum=minimum)
    assert got.dtype == np.float32
    assert np.isfinite(got).all()
    np.testing.assert_allclose(got, [FORMULAS[name](value, minimum) for value in values], rtol=1e-6)


def test_a_missing_value_becomes_zero_under_dlrm():
    assert transform_dense(np.array([0]), name="dlrm", minimum=-5).tolist() == [0.0]


def test_an_unknown_transform_is_named():
    with pytest.raises(ValueError, match="found 'sqrt'"):
        transform_dense(np.array([1]), name="sqrt", minimum=0)
