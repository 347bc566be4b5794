from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from slipstream.embedding.staleness import UNTOUCHED, MovementTracker, find_threshold, sample_movement

_MOVES = st.one_of(st.sampled_from([0.0, 0.5, 1.0, UNTOUCHED]), st.floats(0, 4, width=32))


@st.composite
def hot_samples(draw: st.DrawFn):
    """(movement of each hot row, slots of hot samples), with ties, zeros and untouched rows."""
    movement = np.array(draw(st.lists(_MOVES, min_size=1, max_size=12)), np.float32)
    num_samples, num_tables = draw(st.integers(1, 25)), draw(st.integers(1, 6))
    flat = draw(
        st.lists(
            st.integers(0, len(movement) - 1), min_size=num_samples * num_tables, max_size=num_samples * num_tables
        )
    )
    return movement, np.array(flat).reshape(num_samples, num_tables)


def plain_is_dropped(movement: np.ndarray, slots: np.ndarray, *, alpha: float, threshold: float) -> list[bool]:
    """The definition: at least a share alpha of the lookups is stale."""
    return [sum(movement[slot] < threshold for slot in sample) >= alpha * len(sample) - 1e-9 for sample in slots]


@given(hot_samples(), st.sampled_from([0.01, 0.25, 0.5, 2 / 3, 0.75, 1.0]), st.floats(0, 5, width=32))
def test_a_sample_is_dropped_when_enough_of_its_lookups_are_stale(drawn, alpha: float, threshold: float):
    movement, slots = drawn
    statistic = sample_movement(movement, slots, alpha=alpha)
    expected = plain_is_dropped(movement, slots, alpha=alpha, threshold=np.float32(threshold))
    assert (statistic < np.float32(threshold)).tolist() == expected


@given(hot_samples(), st.floats(0.01, 1))
def test_a_threshold_of_zero_drops_none(drawn, alpha: float):
    assert not (sample_movement(*drawn, alpha=alpha) < 0).any()


@given(hot_samples(), st.floats(0.01, 1), st.lists(st.floats(0, 5), min_size=2, max_size=2))
def test_a_larger_threshold_takes_nothing_back(drawn, alpha: float, thresholds: list[float]):
    statistic = sample_movement(*drawn, alpha=alpha)
    low, high = sorted(thresholds)
    assert not ((statistic < low) & ~(statistic < high)).any()


@given(hot_samples(), st.lists(st.floats(0.01, 1), min_size=2, max_size=2))
def test_asking_for_more_stale_lookups_drops_no_more(drawn, alphas: list[float]):
    lenient, strict = (sample_movement(*drawn, alpha=alpha) for alpha in sorted(alphas))
    assert (lenient <= strict).all()


@given(st.integers(1, 6), st.integers(1, 20))
def test_a_sample_with_untouched_rows_alone_is_never_dropped(num_tables: int, num_samples: int):
    movement = np.array([UNTOUCHED, 0.0], np.float32)
    statistic = sample_movement(movement, np.zeros((num_samples, num_tables), int), alpha=0.01)
    assert np.isinf(statistic).all()
    assert find_threshold(statistic, target_drop=0.9) == 0.0


def nearest_count(statistic: np.ndarray, wanted: int) -> int:
    """The count nearest to the one wanted over every threshold there is, by trying them all."""
    finite = sorted(set(statistic[np.isfinite(statistic)].tolist()))
    candidates = [0.0, *finite, *(float(np.nextafter(np.float32(v), np.float32(np.inf))) for v in finite)]
    counts = {int((statistic < threshold).sum()) for threshold in candidates}
    return min(abs(count - wanted) for count in counts)


@given(st.lists(_MOVES, min_size=1, max_size=40), st.floats(0, 0.999))
def test_the_threshold_drops_the_nearest_share_there_is(statistic: list[float], target_drop: float):
    values = np.array(statistic, np.float32)
    threshold = find_threshold(values, target_drop=target_drop)
    wanted = round(target_drop * len(values))
    dropped = int((values < threshold).sum())
    assert abs(dropped - wanted) == nearest_count(values, wanted)
    assert math.isfinite(threshold)
    assert not np.isinf(values[values < threshold]).any()


@pytest.mark.parametrize("target_drop", [0.05, 0.3, 0.5, 0.9])
def test_the_quantile_agrees_with_a_bisection(rng: np.random.Generator, target_drop: float):
    # the published code searches T; on distinct values both must drop the same samples
    statistic = rng.lognormal(size=5000).astype(np.float32)
    low, high = 0.0, float(statistic.max()) * 2
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if (statistic < middle).mean() < target_drop else (low, middle)
    assert (statistic < find_threshold(statistic, target_drop=target_drop)).tolist() == (statistic < high).tolist()


@pytest.mark.parametrize("alpha", [0.5, 0.9, 1.0])
@pytest.mark.parametrize("target_drop", [0.1, 0.3, 0.6])
def test_what_is_achieved_is_near_what_was_asked(rng: np.random.Generator, alpha: float, target_drop: float):
    # 26 tables of 150 hot rows, popularity falling as 1/rank; popular rows move most, rare ones are hardly touched
    popularity = 1 / np.arange(1, 151)
    picks = rng.choice(150, size=(40_000, 26), p=popularity / popularity.sum())
    movement = rng.lognormal(size=(26, 150)) * popularity**0.3
    movement[rng.random((26, 150)) < np.linspace(0, 0.02, 150)] = UNTOUCHED
    statistic = sample_movement(movement.astype(np.float32).ravel(), picks + 150 * np.arange(26), alpha=alpha)
    drawn, others = statistic[:20_000], statistic[20_000:]
    threshold = find_threshold(drawn, target_drop=target_drop)
    assert abs((drawn < threshold).mean() - target_drop) < 0.01
    assert abs((others < threshold).mean() - target_drop) < 0.02


# --- the tracker ---------------------------------------------------------------------------------------------


def test_movement_is_the_largest_change_of_a_coordinate_and_untouched_rows_have_none():
    rows = torch.zeros(4, 3)
    tracker = MovementTracker(rows)
    tracker.open_window()
    rows[0] += torch.tensor([0.5, -2.0, 1.0])
    rows[3] += 1  # moved, yet nobody looked it up: cannot happen, and would not count
    tracker.touch(torch.tensor([0, 1, 7]))
    assert tracker.close_window().tolist() == [2.0, 0.0, UNTOUCHED, UNTOUCHED]
    assert not tracker.is_open


def test_a_window_forgets_what_came_before_it():
    rows = torch.zeros(2, 1)
    tracker = MovementTracker(rows)
    tracker.touch(torch.tensor([1]))
    tracker.open_window()
    tracker.touch(torch.tensor([0]))
    tracker.close_window()
    rows += 5
    tracker.open_window()
    tracker.touch(torch.tensor([1]))
    assert tracker.close_window().tolist() == [UNTOUCHED, 0.0]


def test_a_window_must_be_open_to_be_closed():
    with pytest.raises(ValueError, match="expected an open window"):
        MovementTracker(torch.zeros(1, 1)).close_window()


def test_an_open_window_survives_a_checkpoint():
    rows = torch.zeros(3, 2)
    tracker = MovementTracker(rows)
    assert tracker.state() == {}
    tracker.open_window()
    tracker.touch(torch.tensor([2]))
    kept = {name: np.array(value) for name, value in tracker.state().items()}
    again = MovementTracker(rows)
    again.restore(kept)
    rows[2] += 3
    assert again.close_window().tolist() == tracker.close_window().tolist() == [UNTOUCHED, UNTOUCHED, 3.0]
