from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from slipstream.training.skipping.drawing import draw_systematically, find_certain_worth, keep_probabilities


@given(
    st.lists(st.one_of(st.floats(0, 5), st.just(float("inf"))), min_size=1, max_size=40),
    st.floats(0, 1),
    st.sampled_from([0.0, 0.05, 0.3]),
)
def test_probabilities_sum_to_the_number_kept_between_their_limits(worth, share: float, floor: float):
    values = np.array(worth)
    num_keep = round(share * len(worth))
    certain_worth = find_certain_worth(values, num_keep=num_keep, floor=floor)
    probabilities = keep_probabilities(values, certain_worth, floor=floor)
    certain, finite = np.isinf(values), values[~np.isinf(values)]
    assert (probabilities[certain] == 1).all()
    assert (probabilities >= floor).all() and (probabilities <= 1).all()
    assert (probabilities[values >= certain_worth] == 1).all() or certain_worth == 0
    least = certain.sum() + floor * len(finite)
    if least <= num_keep:
        assert probabilities.sum() == pytest.approx(num_keep, abs=1e-4)
    else:
        assert probabilities.sum() == pytest.approx(least, abs=1e-4)
    order = np.argsort(values, kind="stable")
    assert (np.diff(probabilities[order]) >= -1e-12).all()


@given(st.lists(st.floats(0, 1), min_size=1, max_size=50), st.integers(0, 100))
def test_a_systematic_draw_takes_the_sum_give_or_take_one(probabilities: list[float], seed: int):
    values = np.array(probabilities)
    drawn = draw_systematically(values, np.random.default_rng(seed))
    assert abs(drawn.sum() - values.sum()) < 1 + 1e-9
    assert not drawn[values == 0].any()
    assert drawn[values == 1].all()


def test_a_systematic_draw_includes_each_with_its_probability():
    probabilities = np.array([0.1, 0.5, 0.9, 0.3, 0.7])
    rng = np.random.default_rng(0)
    share = np.mean([draw_systematically(probabilities, rng) for _ in range(4000)], axis=0)
    np.testing.assert_allclose(share, probabilities, atol=0.03)
