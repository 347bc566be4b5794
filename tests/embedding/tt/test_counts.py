"""Ids are counted exactly, or too low by a bounded part."""

import collections

import torch
from hypothesis import given
from hypothesis import strategies as st
from tt_by_einsum import few

from slipstream.embedding.tt.counts import IdCounter


@few
@given(st.lists(st.lists(st.integers(0, 30), max_size=20), max_size=8), st.integers(0, 12))
def test_counts_are_exact_or_low_by_a_bounded_part(batches, capacity):
    counter = IdCounter(capacity)
    truth = collections.Counter()
    for batch in batches:
        counter.add(*torch.unique(torch.tensor(batch, dtype=torch.int64), return_counts=True))
        truth.update(batch)
        counter._merge()
    counts = dict(zip(counter.ids.tolist(), counter.counts.tolist(), strict=True))
    if capacity == 0 or len(truth) <= capacity:
        assert counts == truth
    assert capacity == 0 or len(counts) <= capacity
    slack = sum(truth.values()) / (capacity + 1) if capacity else 0
    assert all(count - slack <= counts.get(i, 0) <= count for i, count in truth.items())
    ranked = sorted(counts, key=lambda i: (-counts[i], i))
    assert counter.top(5).tolist() == sorted(ranked[:5])
