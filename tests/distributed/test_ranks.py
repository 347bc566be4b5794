"""Parts of batches."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from slipstream.distributed.ranks import part_of


@given(num_samples=st.integers(0, 50), size=st.integers(1, 9))
def test_parts_make_up_the_batch_and_differ_by_one_sample_at_most(num_samples: int, size: int):
    parts = [range(num_samples)[part_of(num_samples, rank, size)] for rank in range(size)]
    assert [number for part in parts for number in part] == list(range(num_samples))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
