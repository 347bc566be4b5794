"""The cold tier in shards, as arithmetic: every row is on one rank, at one place."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from slipstream.distributed.rows import ShardedRows


def shards(num_cold: int, size: int, num_hot: int = 3) -> list[ShardedRows]:
    options: dict[str, Any] = {
        "num_rows": num_hot + num_cold,
        "num_hot": num_hot,
        "embedding_dim": 1,
        "num_staged": 0,
        "optimizer": "sgd",
        "device": torch.device("cpu"),
    }
    return [ShardedRows(ranks=cast(Any, SimpleNamespace(rank=rank, size=size)), **options) for rank in range(size)]


@given(num_cold=st.integers(0, 20), size=st.integers(1, 5))
def test_every_cold_row_is_loaded_on_the_rank_of_its_remainder(num_cold: int, size: int):
    for rank, rows in enumerate(shards(num_cold, size)):
        rows.load(torch.arange(3 + num_cold), torch.arange(3.0 + num_cold).unsqueeze(1))
        assert rows.cold.flatten().tolist() == [3.0 + row for row in range(num_cold) if row % size == rank]
        assert rows.buffer[:3].flatten().tolist() == [0.0, 1.0, 2.0]


@given(num_cold=st.integers(0, 20), size=st.integers(1, 5), data=st.data())
def test_a_block_of_the_whole_tier_falls_apart_into_the_shards(num_cold: int, size: int, data: st.DataObject):
    start = data.draw(st.integers(0, num_cold))
    stop = data.draw(st.integers(start, num_cold))
    block = torch.arange(start, stop)
    for rank, rows in enumerate(shards(num_cold, size)):
        here, of_block = rows.cold_places(start, stop)
        there = torch.arange(num_cold)[rank::size]
        assert torch.equal(there[here], block[of_block])


@given(num_cold=st.integers(1, 20), size=st.integers(1, 5))
def test_own_rows_are_chosen_with_what_goes_along(num_cold: int, size: int):
    cold = np.random.default_rng(num_cold).permutation(num_cold)
    for rank, rows in enumerate(shards(num_cold, size)):
        own, positions = rows.choose_own(cold, cold * 10)
        assert np.array_equal(own * size + rank, positions // 10)
