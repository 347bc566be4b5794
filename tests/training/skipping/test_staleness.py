from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from slipstream.training.skipping.staleness import PADDING, UNTOUCHED, find_threshold, sample_movement, sample_pull

_MOVES = st.one_of(st.sampled_from([0.0, 0.5, 1.0, UNTOUCHED]), st.floats(0, 4, width=32))


@st.composite
def hot_samples(draw: st.DrawFn):
    """(movement of each hot row, slots of hot samples), with ties, zeros, untouched rows and padding."""
    movement = np.array(draw(st.lists(st.one_of(_MOVES, st.just(PADDING)), min_size=1, max_size=12)), np.float32)
    num_samples, num_tables = draw(st.integers(1, 25)), draw(st.integers(1, 6))
    flat = draw(
        st.lists(
            st.integers(0, len(movement) - 1), min_size=num_samples * num_tables, max_size=num_samples * num_tables
        )
    )
    return movement, np.array(flat).reshape(num_samples, num_tables)


def plain_is_dropped(movement: np.ndarray, slots: np.ndarray, *, alpha: float, threshold: float) -> list[bool]:
    """The definition: of the lookups that are not padding, at least a share alpha is stale."""
    counted = [[movement[slot] for slot in sample if not np.isnan(movement[slot])] for sample in slots]
    return [bool(of) and sum(moved < threshold for moved in of) >= alpha * len(of) - 1e-9 for of in counted]


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


def test_a_short_history_is_judged_by_its_events_alone():
    movement = np.array([0.0, 1.0, 2.0, PADDING], np.float32)
    short, long = [3, 3, 3, 1, 2], [0, 0, 0, 1, 2]
    statistic = sample_movement(movement, np.array([short, long, [3] * 5]), alpha=0.6)
    assert statistic.tolist() == [2.0, 0.0, UNTOUCHED]


@given(hot_samples(), st.sampled_from([0.01, 0.25, 0.5, 2 / 3, 1.0]), st.floats(0, 5, width=32), st.data())
def test_asked_by_table_a_sample_is_dropped_when_every_table_has_enough_stale_lookups(drawn, alpha, threshold, data):
    movement, slots = drawn
    tables = data.draw(st.lists(st.integers(0, 2), min_size=slots.shape[1], max_size=slots.shape[1]))
    statistic = sample_movement(movement, slots, alpha=alpha, tables=tables)
    expected = []
    for sample in movement[slots]:
        by_table = [[m for m, of in zip(sample, tables, strict=True) if of == table and m == m] for table in {*tables}]
        asked = [of for of in by_table if of]
        enough = [sum(m < np.float32(threshold) for m in of) >= alpha * len(of) - 1e-9 for of in asked]
        expected.append(bool(asked) and all(enough))
    assert (statistic < np.float32(threshold)).tolist() == expected


def test_four_of_twenty_one_lookups_of_every_table_are_the_published_choice_for_sequences():
    movement = np.array([0.0, 1.0], np.float32)  # a stale row and one that moves
    tables = [0, *(1, 2) * 21]
    of_three, of_four = ([0, *[1] * 42] for _ in range(2))
    for step in range(4):
        of_three[1 + 2 * step] = of_four[1 + 2 * step] = of_four[2 + 2 * step] = 0
        of_three[2 + 2 * step] = int(step == 3)
    statistic = sample_movement(movement, np.array([of_three, of_four]), alpha=4 / 21, tables=tables)
    assert (statistic < 0.5).tolist() == [False, True]
    # taken together they would have enough between them
    assert (sample_movement(movement, np.array([of_three]), alpha=8 / 43) < 0.5).all()


def nearest_count(statistic: np.ndarray, wanted: int) -> int:
    """The count nearest to the one wanted over every threshold there is, by trying them all."""
    finite = sorted(set(statistic[np.isfinite(statistic)].tolist()))
    candidates = [0.0, *finite, *(float(np.nextafter(np.float32(v), np.float32(np.inf))) for v in finite)]
    counts = {int((statistic < threshold).sum()) for threshold in candidates}
    return min(abs(count - wanted) for count in counts)


@given(st.lists(_MOVES, min_size=1, max_size=40), st.floats(0, 0.999))
@example([1.0, 1.25, 1.5, 2.0, 2.0, 2.0, 2.0, 3.0, 3.0, 3.0], 0.4)  # 3 are nearer to 4 than 7
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


_PULLS = st.one_of(st.just(0.0), st.floats(0.125, 4, width=16))


@given(st.data(), st.sampled_from([0.01, 0.5, 2 / 3, 1.0]))
def test_a_samples_pull_is_the_mean_of_its_rows_under_its_own_label(data: st.DataObject, alpha: float):
    num_rows, num_samples, num_tables = (data.draw(st.integers(1, limit)) for limit in (6, 12, 5))
    draw = lambda values, size: data.draw(st.lists(values, min_size=size, max_size=size))  # noqa: E731
    pulls = np.array([draw(_PULLS, num_rows) for _ in range(2)], np.float32)
    slots = np.array([draw(st.integers(0, num_rows - 1), num_tables) for _ in range(num_samples)])
    labels = np.array(draw(st.integers(0, 1), num_samples), np.float32)

    found = sample_pull(pulls, slots, labels, alpha=alpha)

    for sample, label, statistic in zip(slots, labels, found, strict=True):
        known = sorted(float(pulls[int(label), row]) for row in sample if pulls[int(label), row] > 0)
        least = known[: math.ceil(alpha * len(known) - 1e-9)]
        assert statistic == pytest.approx(sum(least) / len(least) if least else UNTOUCHED, rel=1e-5)
