"""Hot sets of any size, told from counts: against sets that are chosen and measured."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import count_tables

from slipstream.ops.hit_curve import HitCurve
from slipstream.ops.hot_set import CurvePoint, choose_hot_rows, measure_hot_set, table_offsets

SIZES = [400, 2000, 3, 5000]
OFFSETS = table_offsets(SIZES)
MEASURED = [40, 80, 160, 320, 640]


def draw_samples(rng: np.random.Generator, num_samples: int) -> np.ndarray:
    """Global rows of samples whose columns hang together, each by Zipf's law: who is popular in one, is in all."""
    popularity = 0.7 * rng.random((num_samples, 1)) + 0.3 * rng.random((num_samples, len(SIZES)))
    return (np.array(SIZES) ** popularity).astype(np.int64) - 1 + OFFSETS[:-1]


def measure(policy: str, counts: np.ndarray, samples: np.ndarray, num_rows: int) -> CurvePoint:
    chosen = choose_hot_rows(policy, counts, OFFSETS[:-1], lambda: [samples], num_rows=num_rows, power=4.0, rounds=3)
    return measure_hot_set(chosen, [samples], row_share=num_rows / len(counts))


@pytest.fixture(scope="module")
def samples() -> np.ndarray:
    return draw_samples(np.random.default_rng(0), 20_000)


@pytest.fixture(scope="module")
def counts(samples: np.ndarray) -> np.ndarray:
    return np.bincount(samples.ravel(), minlength=OFFSETS[-1])


@given(count_tables(), st.data())
def test_lookups_and_threshold_are_those_of_the_set_that_would_be_chosen(drawn: tuple, data: st.DataObject):
    rows_per_table, counts = drawn
    offsets = table_offsets(rows_per_table)
    num_rows = data.draw(st.integers(len(rows_per_table), len(counts)))
    served = HitCurve(counts, offsets, range(len(rows_per_table)), {"frequency": []}).at("frequency", num_rows)
    chosen = choose_hot_rows("frequency", counts, offsets[:-1], list, num_rows=num_rows, power=1, rounds=1)
    assert served.hot_rows == chosen.num_hot
    assert served.access_threshold == chosen.access_threshold
    if counts.any():
        assert served.hit_ratio == pytest.approx(counts[chosen.is_hot].sum() / counts.sum())


@given(count_tables(), st.data())
def test_hot_rows_by_table_are_those_of_the_set_that_would_be_chosen(drawn: tuple, data: st.DataObject):
    rows_per_table, counts = drawn
    offsets = table_offsets(rows_per_table)
    num_rows = data.draw(st.integers(len(rows_per_table), len(counts)))
    curve = HitCurve(counts, offsets, range(len(rows_per_table)), {"frequency": []})
    chosen = choose_hot_rows("frequency", counts, offsets[:-1], list, num_rows=num_rows, power=1, rounds=1)
    by_table = [int(part.sum()) for part in np.split(chosen.is_hot, offsets[1:-1])]
    assert curve.hot_rows_by_table(num_rows).tolist() == by_table


@pytest.mark.parametrize("policy", ["frequency", "sample-aware"])
def test_what_was_measured_is_told_as_measured(policy: str, counts: np.ndarray, samples: np.ndarray):
    points = [measure(policy, counts, samples, num_rows) for num_rows in MEASURED]
    curve = HitCurve(counts, OFFSETS, range(len(SIZES)), {"frequency": [], policy: points})
    for point in points:
        served = curve.at(policy, point.hot_rows)
        assert served.hit_ratio == pytest.approx(point.hit_ratio)
        assert served.hot_sample_share == pytest.approx(point.hot_sample_share)
        assert served.is_within_curve


@pytest.mark.parametrize("policy", ["frequency", "sample-aware"])
def test_between_two_measured_sizes_it_is_near_what_would_be_measured(
    policy: str, counts: np.ndarray, samples: np.ndarray
):
    points = [measure(policy, counts, samples, num_rows) for num_rows in MEASURED]
    curve = HitCurve(counts, OFFSETS, range(len(SIZES)), {"frequency": [], policy: points})
    independent = HitCurve(counts, OFFSETS, range(len(SIZES)), {"frequency": [], policy: []})
    for num_rows in (57, 230, 450):
        truth, told = measure(policy, counts, samples, num_rows), curve.at(policy, num_rows)
        assert told.hit_ratio == pytest.approx(truth.hit_ratio, abs=0.01)
        assert told.hot_sample_share == pytest.approx(truth.hot_sample_share, abs=0.01)
        without_points = independent.at(policy, num_rows)
        assert abs(without_points.hot_sample_share - truth.hot_sample_share) > 0.05, "columns hang together here"


@pytest.mark.parametrize("policy", ["frequency", "sample-aware"])
@pytest.mark.parametrize("share", [0.3, 0.8, 0.99, 1.0])
def test_the_rows_for_a_share_are_the_fewest_that_serve_it(
    policy: str, share: float, counts: np.ndarray, samples: np.ndarray
):
    points = {name: [measure(name, counts, samples, n) for n in (40, 640)] for name in ("frequency", "sample-aware")}
    curve = HitCurve(counts, OFFSETS, range(len(SIZES)), points)
    num_rows = curve.rows_for_hits(policy, share)
    assert curve.at(policy, num_rows).hit_ratio >= share
    assert num_rows == len(SIZES) or curve.at(policy, num_rows - 1).hit_ratio < share
    num_rows = curve.rows_for_hot_samples(policy, share)
    assert curve.at(policy, num_rows).hot_sample_share >= share
    assert num_rows == len(SIZES) or curve.at(policy, num_rows - 1).hot_sample_share < share


def test_beyond_what_was_measured_it_says_so(counts: np.ndarray, samples: np.ndarray):
    points = [measure("frequency", counts, samples, num_rows) for num_rows in (40, 640)]
    curve = HitCurve(counts, OFFSETS, range(len(SIZES)), {"frequency": points})
    sizes = [points[0].hot_rows - 1, points[0].hot_rows, points[1].hot_rows, points[1].hot_rows + 1]
    assert [curve.at("frequency", size).is_within_curve for size in sizes] == [False, True, True, False]


def test_columns_that_share_a_table_hit_as_often_as_it():
    counts = np.array([0, 6, 2])  # one table looked up by two columns of four samples
    curve = HitCurve(counts, np.array([0, 3]), [0, 0], {"frequency": []})
    served = curve.at("frequency", 2)
    assert (served.hit_ratio, served.hot_sample_share) == pytest.approx((0.75, 0.75**2))


def test_rows_that_move_are_those_of_chunks_drawn_one_by_one(rng: np.random.Generator):
    # one table of 300 rows: a share of 1 / (r + 1) each
    weights = 1 / np.arange(1, 301)
    counts = np.round(20_000 * weights / weights.sum()).astype(np.int64)
    curve = HitCurve(np.concatenate([[0], counts]), np.array([0, 301]), [0], {"frequency": []})
    hot, per_chunk, num_chunks = 20, 50, 4000
    drawn = rng.choice(300, size=(num_chunks, per_chunk), p=counts / counts.sum())
    cold = [np.unique(chunk[chunk >= hot - 1]) for chunk in drawn]
    fetched = [len(np.setdiff1d(now, before)) for before, now in pairwise(cold)]
    moves = curve.moves("frequency", hot, samples_per_chunk=per_chunk, num_samples=int(counts.sum()))
    assert moves.staged == pytest.approx(np.mean([len(rows) for rows in cold]), rel=0.01)
    assert moves.fetched == pytest.approx(np.mean(fetched), rel=0.01)


def test_nothing_moves_where_all_rows_are_hot(counts: np.ndarray):
    curve = HitCurve(counts, OFFSETS, range(len(SIZES)), {"frequency": []})
    moves = curve.moves("frequency", len(counts), samples_per_chunk=1000, num_samples=20_000)
    assert (moves.fetched, moves.staged) == (0, 0)
