from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from slipstream.ops.runs import is_run_start


@given(st.lists(st.integers(-3, 3)))
def test_runs_start_where_numpy_first_sees_a_value(values: list[int]):
    ordered = np.sort(np.array(values, np.int64))
    assert np.flatnonzero(is_run_start(ordered)).tolist() == np.unique(ordered, return_index=True)[1].tolist()
