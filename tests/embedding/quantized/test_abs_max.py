"""The largest weight of a table, without reading the table."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from quantized_by_loop import weights_like

from slipstream.embedding.quantized.abs_max import BLOCK_ROWS, LEAST_REREADS, AbsMaxTracker


@given(st.integers(0, 10_000), st.integers(1, 20_000), st.sampled_from([1, 256, 700]))
@settings(max_examples=25, deadline=None)
def test_the_tracked_maximum_equals_the_exact_one_when_changed_rows_are_noted(
    seed: int, num_rows: int, rows_per_refresh: int
) -> None:
    rng = np.random.default_rng(seed)
    table = torch.from_numpy(rng.normal(size=(num_rows, 2)))
    tracker = AbsMaxTracker(num_rows, rows_per_refresh)
    for _ in range(6):
        # the largest weight of the table lives and dies: one row rises far above the others, then falls
        rows = torch.from_numpy(np.unique(rng.integers(0, num_rows, size=12)))
        tracker.note(rows)
        table[rows] = torch.from_numpy(rng.normal(size=(len(rows), 2)))
        table[rows[0]] *= 100
        assert tracker.maximum(table.__getitem__) == table.abs().max()
        tracker.note(rows[:1])
        table[rows[0]] *= 0.001
        assert tracker.maximum(table.__getitem__) == table.abs().max()


def test_a_tracked_maximum_that_runs_out_of_reads_is_an_upper_bound_and_recovers() -> None:
    num_blocks = 40
    table = torch.ones(num_blocks * BLOCK_ROWS, 2)
    table[::BLOCK_ROWS] = torch.arange(10.0, 10.0 + num_blocks).unsqueeze(1)
    tracker = AbsMaxTracker(len(table), 2 * BLOCK_ROWS)
    assert tracker.maximum(table.__getitem__) == 49
    tracker.note(torch.arange(0, len(table), BLOCK_ROWS))
    table[::BLOCK_ROWS] = 1
    answers = [float(tracker.maximum(table.__getitem__)) for _ in range(num_blocks // 2)]
    assert all(answer >= 1 for answer in answers)
    assert answers[0] > 1
    assert answers == sorted(answers, reverse=True)
    assert answers[-1] == 1


def test_a_row_changed_without_notice_is_seen_within_one_sweep() -> None:
    table = torch.ones(50 * BLOCK_ROWS, 2)
    for row in (3, len(table) - 1):
        tracker = AbsMaxTracker(len(table), 4 * BLOCK_ROWS)
        tracker.maximum(table.__getitem__)
        table[row, 1] = -7
        answers = [float(tracker.maximum(table.__getitem__)) for _ in range(-(-50 // 4))]
        assert answers[-1] == 7
        table[row, 1] = 1


def test_the_cost_of_a_refresh_does_not_grow_with_the_table() -> None:
    reads = []
    for num_rows in (20_000, 200_000, 1_000_000):
        table = weights_like(0, num_rows, 2)
        tracker = AbsMaxTracker(num_rows, 1024)
        tracker.maximum(table.__getitem__)
        built = tracker.rows_read
        for step in range(5):
            tracker.note(torch.arange(step, num_rows, num_rows // 100))
            tracker.maximum(table.__getitem__)
        reads.append(tracker.rows_read - built)
        assert built == num_rows
    assert max(reads) <= 5 * (1024 + LEAST_REREADS * BLOCK_ROWS + 101)


def test_noted_rows_wait_for_the_optimizer_when_gradients_accumulate() -> None:
    table = torch.ones(10 * BLOCK_ROWS, 2)
    tracker = AbsMaxTracker(len(table), 1)
    tracker.maximum(table.__getitem__, version=0)
    tracker.note(torch.tensor([2000]), version=0)
    tracker.maximum(table.__getitem__, version=0)
    table[2000] = 9
    assert tracker.maximum(table.__getitem__, version=1) == 9


def test_nan_in_a_tracked_table_is_an_error_that_says_what_to_do() -> None:
    table = torch.ones(10 * BLOCK_ROWS, 2)
    tracker = AbsMaxTracker(len(table), 1)
    tracker.maximum(table.__getitem__)
    tracker.note(torch.tensor([1700]))
    table[1700, 1] = torch.nan
    with pytest.raises(ValueError, match=r"expected finite values.*learning rate"):
        tracker.maximum(table.__getitem__)
