"""Shards that are written each by itself; that they are those written one after another is shown on whole stages."""

from __future__ import annotations

from itertools import accumulate
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from slipstream.io.artifacts import Artifact
from slipstream.io.shards import ShardColumns, Sharding, _cut


@given(sizes=st.lists(st.integers(0, 9), max_size=12), samples_per_shard=st.integers(1, 20))
def test_shards_have_every_sample_once_in_order_and_are_full_but_for_the_last(sizes: list[int], samples_per_shard: int):
    sharding = Sharding(
        processed=Artifact(path=Path(), manifest={}),
        columns=ShardColumns(dense=[], tables=[], slots=Path(), bounds=[], padding_slots=[]),
        num_hot=0,
        samples_per_shard=samples_per_shard,
        scratch=Path("scratch"),
    )
    parts = [Path(str(number)) for number in range(len(sizes))]
    shards = list(_cut(sharding, "train", 1, parts, sizes))
    before = dict(zip(parts, accumulate(sizes, initial=0), strict=False))
    numbers = [
        [before[piece.part] + at for piece in shard.pieces for at in range(piece.first, piece.stop)] for shard in shards
    ]
    assert [number for of_shard in numbers for number in of_shard] == list(range(sum(sizes)))
    assert all(len(of_shard) == samples_per_shard for of_shard in numbers[:-1]) and all(numbers)
    assert [shard.path for shard in shards] == [
        Path(f"scratch/cold/part-{number:05d}.npz") for number in range(len(shards))
    ]
