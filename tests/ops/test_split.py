from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from slipstream.ops.split import (
    TEST,
    TRAIN,
    VAL,
    assign_by_bounds,
    assign_by_day,
    assign_randomly,
    chronological_bounds,
    hash_positions,
)

_MASK = 2**64 - 1


def plain_hash(position: int, seed: int) -> int:
    word = (position + (seed + 1) * 0x9E3779B97F4A7C15) & _MASK
    word = ((word ^ (word >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    word = ((word ^ (word >> 27)) * 0x94D049BB133111EB) & _MASK
    return word ^ (word >> 31)


def dlrm_split(num_samples: int) -> list[int]:
    """The reference's rule: seven days by `divmod`, the last one halved by `array_split` into test and val."""
    *_, last_day = np.array_split(np.arange(num_samples), 7)
    test, val = np.array_split(last_day, 2)
    codes = np.full(num_samples, TRAIN)
    codes[test], codes[val] = TEST, VAL
    return codes.tolist()


@given(st.integers(0, 3000))
def test_the_chronological_split_is_the_one_of_dlrm(num_samples: int):
    codes = assign_by_bounds(0, num_samples, *chronological_bounds(num_samples))
    assert codes.tolist() == dlrm_split(num_samples)


@given(st.integers(0, 500), st.data())
def test_a_block_is_assigned_as_in_the_whole(num_samples: int, data):
    cuts = sorted(data.draw(st.lists(st.integers(0, num_samples), max_size=4)))
    spans = list(zip([0, *cuts], [*cuts, num_samples], strict=True))
    bounds = chronological_bounds(num_samples)
    by_time = np.concatenate([assign_by_bounds(*span, *bounds) for span in spans])
    by_chance = np.concatenate([assign_randomly(*span, seed=3) for span in spans])
    assert by_time.tolist() == assign_by_bounds(0, num_samples, *bounds).tolist()
    assert by_chance.tolist() == assign_randomly(0, num_samples, seed=3).tolist()


def test_the_random_split_has_the_shares_of_the_chronological_one():
    shares = np.bincount(assign_randomly(0, 140_000, seed=5), minlength=3) / 140_000
    np.testing.assert_allclose(shares[[TRAIN, VAL, TEST]], [12 / 14, 1 / 14, 1 / 14], atol=0.003)
    assert (assign_randomly(0, 1000, seed=5) != assign_randomly(0, 1000, seed=6)).any()


@given(st.lists(st.integers(1, 4), min_size=1, max_size=60))
def test_by_day_halves_the_last_day_and_trains_on_the_rest(drawn: list[int]):
    days = np.array(drawn)
    last_day = days.max()
    last_count = int((days == last_day).sum())
    ranks = np.cumsum(days == last_day) - 1
    codes = assign_by_day(days, ranks, last_day=last_day, last_count=last_count)
    assert (codes[days != last_day] == TRAIN).all()
    test, val = np.array_split(np.flatnonzero(days == last_day), 2)
    assert np.flatnonzero(codes == TEST).tolist() == test.tolist()
    assert np.flatnonzero(codes == VAL).tolist() == val.tolist()


@pytest.mark.parametrize("seed", [0, 1, 2**32 - 1])
def test_the_hash_of_a_position_is_splitmix(seed: int):
    start = 2**40 - 3
    expected = [plain_hash(position, seed) for position in range(start, start + 6)]
    assert hash_positions(start, start + 6, seed=seed).tolist() == expected
