"""Sorted lookups against numpy's unique, and sums against a plain loop."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from slipstream.embedding.duplicates import find_distinct, sort_lookups, sum_duplicates


@pytest.mark.parametrize("dtype", [np.int32, np.int64])
@given(rows=st.lists(st.integers(0, 2**31 - 1) | st.integers(0, 5), max_size=40))
def test_sorted_lookups_equal_the_unique_rows_of_numpy(dtype: type, rows: list[int]):
    given_rows = np.array(rows, dtype)
    unique, first, inverse, counts = np.unique(given_rows, return_index=True, return_inverse=True, return_counts=True)
    found = sort_lookups(given_rows)
    assert found.unique.tolist() == unique.tolist()
    assert found.inverse.tolist() == inverse.tolist()
    assert found.counts().tolist() == counts.tolist()
    assert found.order[found.starts].tolist() == first.tolist()
    assert found.order.tolist() == np.argsort(given_rows, kind="stable").tolist()


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@given(rows=st.lists(st.integers(0, 6), max_size=30))
def test_distinct_rows_in_fixed_shapes_are_those_of_the_sort(dtype: torch.dtype, rows: list[int]):
    expected = sort_lookups(np.array(rows, np.int64))
    padding = torch.arange(100, 100 + min(len(rows), 7))  # rows are below 7, so there are at most 7 distinct ones
    found = find_distinct(torch.tensor(rows, dtype=dtype), padding=padding)
    assert (found.rows.dtype, found.inverse.dtype) == (torch.int64, torch.int32)
    assert found.rows.tolist() == [*expected.unique.tolist(), *padding[len(expected.unique) :].tolist()]
    assert found.inverse.tolist() == expected.inverse.tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@given(rows=st.lists(st.integers(0, 4), min_size=1, max_size=30))
def test_duplicates_are_summed_in_batch_order(dtype: torch.dtype, rows: list[int]):
    found = sort_lookups(np.array(rows))
    gradients = torch.randn(len(rows), 3, dtype=dtype)
    expected = torch.zeros(len(found.unique), 3, dtype=dtype)
    for rank, gradient in zip(found.inverse.tolist(), gradients, strict=True):
        expected[rank] += gradient
    inverse = torch.from_numpy(found.inverse)
    order, starts = torch.from_numpy(found.order), torch.from_numpy(found.starts)
    assert torch.equal(sum_duplicates(gradients, inverse, len(expected)), expected)
    assert torch.equal(sum_duplicates(gradients, inverse, len(expected), order=order, starts=starts), expected)


def test_rows_without_lookups_sum_to_zero():
    summed = sum_duplicates(torch.ones(2, 3), torch.tensor([2, 2]), 4)
    assert summed.tolist() == [[0.0] * 3, [0.0] * 3, [2.0] * 3, [0.0] * 3]
