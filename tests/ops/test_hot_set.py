"""The hot set against plain loops, and the properties it promises."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import count_tables, lookups

from slipstream.ops.counting import count_accesses
from slipstream.ops.hot_set import (
    assign_slots,
    choose_hot_rows,
    measure_hot_set,
    rank_rows,
    select_sample_aware,
    table_offsets,
    take_above_threshold,
    take_hot_rows,
)


def plain_ranking(counts: np.ndarray, oov_rows: np.ndarray, scores: np.ndarray | None = None) -> list[int]:
    oov = set(oov_rows.tolist())

    def key(row: int) -> tuple[float, ...]:
        count = int(counts[row])
        if scores is None:
            return (row not in oov, -count, row) if row not in oov else (False, 0, row)
        return (row not in oov, 0 if row in oov else -scores[row], -count, row)

    return sorted(range(len(counts)), key=key)


def plain_scores(rows: np.ndarray, is_hot: np.ndarray, power: float) -> np.ndarray:
    worth = (1.0 + np.arange(rows.shape[1] + 1)) ** -power
    scores = np.zeros(len(is_hot))
    for sample in rows:
        for place, row in enumerate(sample):
            others = sum(not is_hot[other] for at, other in enumerate(sample) if at != place)
            scores[row] += worth[others]
    return scores


def plain_sample_aware(rows: np.ndarray, counts: np.ndarray, oov_rows: np.ndarray, num_rows: int, rounds: int):
    best, most, scores = None, -1, None
    for _ in range(rounds + 1):
        is_hot = np.zeros(len(counts), bool)
        for place, row in enumerate(plain_ranking(counts, oov_rows, scores)[:num_rows]):
            is_hot[row] = place < len(oov_rows) or counts[row] > 0
        num_hot_samples = sum(all(is_hot[row] for row in sample) for sample in rows)
        if num_hot_samples > most:
            best, most = is_hot, num_hot_samples
        scores = plain_scores(rows, is_hot, 2.0)
    return best, most


@given(count_tables())
def test_rows_are_ranked_by_count_with_ties_by_table_and_row(drawn):
    rows_per_table, counts = drawn
    oov_rows = table_offsets(rows_per_table)[:-1]
    assert rank_rows(counts, oov_rows).tolist() == plain_ranking(counts, oov_rows)


@given(count_tables(), st.data())
def test_scores_come_before_counts_and_counts_before_row_numbers(drawn, data):
    rows_per_table, counts = drawn
    oov_rows = table_offsets(rows_per_table)[:-1]
    scores = np.array(data.draw(st.lists(st.integers(0, 2), min_size=len(counts), max_size=len(counts))), float)
    assert rank_rows(counts, oov_rows, scores).tolist() == plain_ranking(counts, oov_rows, scores)


def test_negative_counts_are_refused():
    with pytest.raises(ValueError, match="at least 0, found -2"):
        rank_rows(np.array([3, -2]), np.array([0]))


@given(count_tables(), st.data())
def test_a_larger_budget_keeps_every_hot_row(drawn, data):
    rows_per_table, counts = drawn
    oov_rows = table_offsets(rows_per_table)[:-1]
    ranked = rank_rows(counts, oov_rows)
    small, large = sorted(
        data.draw(st.lists(st.integers(len(oov_rows), len(counts)), min_size=2, max_size=2), label="budgets")
    )
    fewer, more = (take_hot_rows(ranked, counts, num_rows=n, num_always=len(oov_rows)) for n in (small, large))
    assert not (fewer.is_hot & ~more.is_hot).any()
    assert fewer.num_hot <= small
    assert fewer.is_hot[oov_rows].all()


@given(count_tables(), st.data())
def test_no_cold_row_is_used_more_than_a_hot_one_and_lambda_is_the_least_count(drawn, data):
    rows_per_table, counts = drawn
    oov_rows = table_offsets(rows_per_table)[:-1]
    num_rows = data.draw(st.integers(len(oov_rows), len(counts)))
    chosen = take_hot_rows(rank_rows(counts, oov_rows), counts, num_rows=num_rows, num_always=len(oov_rows))
    is_oov = np.isin(np.arange(len(counts)), oov_rows)
    hot, cold = counts[chosen.is_hot & ~is_oov], counts[~chosen.is_hot & ~is_oov]
    assert (hot > 0).all()
    assert chosen.access_threshold == (hot.min() if hot.size else 0)
    if hot.size and cold.size:
        assert cold.max() <= hot.min()
    if chosen.num_hot < num_rows:
        assert (cold == 0).all()


@pytest.mark.parametrize("num_rows", [1, 7])
def test_a_hot_set_holds_at_least_the_oov_rows_and_at_most_all(num_rows: int):
    counts = np.array([0, 2, 1, 0, 5, 1])
    with pytest.raises(ValueError, match="expected 2 to 6 hot rows"):
        take_hot_rows(rank_rows(counts, np.array([0, 3])), counts, num_rows=num_rows, num_always=2)


@given(count_tables(), st.integers(1, 6))
def test_a_threshold_by_hand_takes_every_row_counted_as_often(drawn, threshold: int):
    rows_per_table, counts = drawn
    oov_rows = table_offsets(rows_per_table)[:-1]
    chosen = take_above_threshold(counts, oov_rows, access_threshold=threshold)
    expected = [bool(count >= threshold or row in oov_rows) for row, count in enumerate(counts)]
    assert chosen.is_hot.tolist() == expected
    assert chosen.access_threshold == threshold


@given(lookups(), st.data())
def test_sample_aware_agrees_with_a_plain_loop(drawn, data):
    rows_per_table, rows = drawn
    offsets = table_offsets(rows_per_table)
    counts = count_accesses([rows], num_rows=int(offsets[-1]))
    num_rows = data.draw(st.integers(len(rows_per_table), int(offsets[-1])))
    rounds = data.draw(st.integers(1, 3))
    chosen = select_sample_aware(counts, offsets[:-1], lambda: [rows], num_rows=num_rows, power=2.0, rounds=rounds)
    expected, _ = plain_sample_aware(rows, counts, offsets[:-1], num_rows, rounds)
    assert chosen.is_hot.tolist() == expected.tolist()


@given(lookups(max_samples=60), st.data())
def test_sample_aware_never_has_fewer_hot_samples_than_frequency(drawn, data):
    rows_per_table, rows = drawn
    offsets = table_offsets(rows_per_table)
    counts = count_accesses([rows], num_rows=int(offsets[-1]))
    num_rows = data.draw(st.integers(len(rows_per_table), int(offsets[-1])))
    power = data.draw(st.sampled_from([0.5, 2.0, 4.0]))
    by_count = take_hot_rows(rank_rows(counts, offsets[:-1]), counts, num_rows=num_rows, num_always=len(rows_per_table))
    aware = select_sample_aware(counts, offsets[:-1], lambda: [rows], num_rows=num_rows, power=power, rounds=4)
    assert aware.num_hot <= num_rows
    assert aware.is_hot[rows].all(axis=1).sum() >= by_count.is_hot[rows].all(axis=1).sum()


def test_sample_aware_prefers_rows_whose_companions_are_hot():
    # rows: table 0 {0 oov, 1, 2}, table 1 {3 oov, 4, 5, 6, 7}; row 2 is used most, but with ever new companions
    rows = np.array([[2, 5], [2, 6], [2, 7], [1, 3], [1, 3]])
    counts = np.bincount(rows.ravel(), minlength=8)
    oov_rows = np.array([0, 3])
    by_count = take_hot_rows(rank_rows(counts, oov_rows), counts, num_rows=3, num_always=2)
    aware = select_sample_aware(counts, oov_rows, lambda: [rows], num_rows=3, power=4.0, rounds=3)
    assert (by_count.is_hot[2], by_count.is_hot[rows].all(axis=1).sum()) == (True, 0)
    assert (aware.is_hot[1], aware.is_hot[rows].all(axis=1).sum()) == (True, 2)


@given(lookups(max_tables=2), st.data())
def test_sample_aware_does_not_depend_on_blocks(drawn, data):
    rows_per_table, rows = drawn
    offsets = table_offsets(rows_per_table)
    counts = count_accesses([rows], num_rows=int(offsets[-1]))
    num_rows = data.draw(st.integers(len(rows_per_table), int(offsets[-1])))
    cut = data.draw(st.integers(0, len(rows)))
    # two tables at power 2: scores are sums of 1 and 1/4, exact in any order
    whole, halves = (
        select_sample_aware(counts, offsets[:-1], samples, num_rows=num_rows, power=2.0, rounds=3)
        for samples in (lambda: [rows], lambda: [rows[cut:], rows[:cut]])
    )
    assert whole.is_hot.tolist() == halves.is_hot.tolist()


@pytest.mark.parametrize("policy", ["frequency", "sample-aware"])
def test_where_all_rows_fit_all_are_hot_without_a_look_at_samples(policy: str):
    counts = np.array([0, 5, 0, 0, 3])
    hot_set = choose_hot_rows(policy, counts, np.array([0, 3]), forbidden, num_rows=5, power=4.0, rounds=2)
    assert hot_set.is_hot.all()


def test_frequency_needs_no_samples():
    counts = np.array([0, 5, 0, 0, 3])
    hot_set = choose_hot_rows("frequency", counts, np.array([0, 3]), forbidden, num_rows=3, power=4.0, rounds=2)
    assert np.flatnonzero(hot_set.is_hot).tolist() == [0, 1, 3]


def forbidden() -> list[np.ndarray]:
    pytest.fail("samples are read")


@given(st.lists(st.booleans(), min_size=1, max_size=30))
def test_slots_number_hot_rows_first_and_keep_their_order(is_hot: list[bool]):
    slots = assign_slots(np.array(is_hot))
    expected = [row for row, hot in enumerate(is_hot) if hot] + [row for row, hot in enumerate(is_hot) if not hot]
    assert slots.dtype == np.int32
    assert np.argsort(slots).tolist() == expected
    assert sorted(slots.tolist()) == list(range(len(is_hot)))


@given(lookups(), st.data())
def test_the_curve_counts_hits_and_hot_samples_like_a_plain_loop(drawn, data):
    rows_per_table, rows = drawn
    offsets = table_offsets(rows_per_table)
    counts = count_accesses([rows], num_rows=int(offsets[-1]))
    num_rows = data.draw(st.integers(len(rows_per_table), int(offsets[-1])))
    chosen = take_hot_rows(rank_rows(counts, offsets[:-1]), counts, num_rows=num_rows, num_always=len(rows_per_table))
    cut = data.draw(st.integers(0, len(rows)))
    point = measure_hot_set(chosen, [rows[:cut], rows[cut:]], row_share=0.5)
    hits = sum(bool(chosen.is_hot[row]) for sample in rows for row in sample)
    hot_samples = sum(all(chosen.is_hot[row] for row in sample) for sample in rows)
    assert point.hit_ratio == (hits / rows.size if rows.size else 0)
    assert point.hot_sample_share == (hot_samples / len(rows) if len(rows) else 0)
    assert (point.hot_rows, point.row_share) == (chosen.num_hot, 0.5)
