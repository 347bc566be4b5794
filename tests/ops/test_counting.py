from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import lookups

from slipstream.ops.counting import count_accesses, most_frequent_rows, sample_positions


@given(lookups(), st.randoms(use_true_random=False), st.integers(1, 5))
def test_counts_equal_a_plain_counter_whatever_the_blocks_and_their_order(drawn, random, num_blocks: int):
    rows_per_table, rows = drawn
    blocks = np.array_split(rows, num_blocks)
    random.shuffle(blocks)
    counts = count_accesses(blocks, num_rows=sum(rows_per_table))
    expected = Counter(rows.ravel().tolist())
    assert counts.tolist() == [expected[row] for row in range(sum(rows_per_table))]
    assert counts.sum() == rows.size


@given(st.integers(0, 10**12), st.integers(0, 200), st.integers(0, 2**32 - 1))
def test_a_ratio_of_one_takes_every_sample(start: int, length: int, seed: int):
    assert sample_positions(start, start + length, ratio=1.0, seed=seed).all()


@given(st.integers(0, 10**9), st.integers(0, 300), st.floats(0.01, 1), st.integers(0, 2**32 - 1), st.data())
def test_a_draw_does_not_depend_on_blocks(start: int, length: int, ratio: float, seed: int, data):
    cut = start + data.draw(st.integers(0, length))
    whole = sample_positions(start, start + length, ratio=ratio, seed=seed)
    parts = [sample_positions(*span, ratio=ratio, seed=seed) for span in ((start, cut), (cut, start + length))]
    assert whole.tolist() == np.concatenate(parts).tolist()


@pytest.mark.parametrize("ratio", [0.01, 0.1, 0.5, 0.9])
def test_a_draw_takes_about_its_share_and_a_larger_one_contains_it(ratio: float):
    drawn = sample_positions(0, 100_000, ratio=ratio, seed=7)
    spread = (ratio * (1 - ratio) / 100_000) ** 0.5
    assert abs(drawn.mean() - ratio) < 4 * spread
    assert not (drawn & ~sample_positions(0, 100_000, ratio=min(1.0, ratio * 1.1), seed=7)).any()


def test_seeds_draw_differently():
    first, second = (sample_positions(0, 10_000, ratio=0.5, seed=seed) for seed in (1, 2))
    assert 0.45 < (first == second).mean() < 0.55


@given(st.lists(st.integers(0, 4), min_size=1, max_size=12), st.data())
def test_the_most_frequent_rows_are_a_prefix_of_the_ranking(counts: list[int], data: st.DataObject) -> None:
    count = data.draw(st.integers(0, len(counts)))
    ranking = sorted(range(len(counts)), key=lambda row: (-counts[row], row))
    assert most_frequent_rows(counts, count).tolist() == ranking[:count]


def test_more_warm_rows_than_the_table_has_are_refused() -> None:
    with pytest.raises(ValueError, match="expected 0 <= count"):
        most_frequent_rows([1, 2], 3)
