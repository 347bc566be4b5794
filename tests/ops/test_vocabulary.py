from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from slipstream.ops.vocabulary import RawIdCounter, build_vocabulary, hash_to_buckets

_IDS = st.one_of(st.integers(-3, 12), st.integers(-(2**63), 2**63 - 1))
_MASK = 2**64 - 1


def counted(raw_ids: list[int]) -> tuple[np.ndarray, np.ndarray]:
    counts = Counter(raw_ids)
    return np.array(sorted(counts), np.int64), np.array([counts[raw_id] for raw_id in sorted(counts)], np.int64)


def test_what_waits_to_be_merged_is_bounded():
    counter = RawIdCounter()
    counter.add(np.array([7]), np.array([1]))
    for _ in range(4):
        counter.add(np.arange(600_000), np.ones(600_000, np.int64))
    assert sum(map(len, counter._raw_ids)) <= 600_000 + (1 << 20)


@given(st.lists(st.lists(_IDS, max_size=20), max_size=5), st.booleans())
def test_counters_add_up_whatever_the_pieces(pieces: list[list[int]], merges_between: bool):
    counter = RawIdCounter()
    for piece in pieces:
        raw_ids, counts = counted(piece)
        counter.add(np.append(raw_ids, 99), np.append(counts, 0))
        if merges_between:
            counter.result()
    raw_ids, counts = counter.result()
    expected_ids, expected_counts = counted([raw_id for piece in pieces for raw_id in piece])
    assert raw_ids.tolist() == expected_ids.tolist()
    assert counts.tolist() == expected_counts.tolist()


@given(st.lists(_IDS, max_size=60), st.integers(1, 4), st.integers(0, 8))
def test_rows_are_ranked_by_count_then_raw_id_and_row_zero_takes_the_rest(
    raw_ids: list[int], freq_threshold: int, max_rows: int
):
    vocabulary = build_vocabulary(*counted(raw_ids), freq_threshold=freq_threshold, max_rows=max_rows)
    counts = Counter(raw_ids)
    ranked = sorted((-count, raw_id) for raw_id, count in counts.items() if count >= freq_threshold)
    kept = [raw_id for _, raw_id in ranked][: max_rows - 1 if max_rows else None]
    assert vocabulary.raw_ids.tolist() == kept
    assert vocabulary.counts[1:].tolist() == [counts[raw_id] for raw_id in kept]
    assert vocabulary.counts.sum() == len(raw_ids)
    assert vocabulary.num_rows == len(kept) + 1
    assert not max_rows or vocabulary.num_rows <= max_rows


@given(st.lists(_IDS, max_size=60), st.lists(_IDS, max_size=20), st.integers(1, 3))
def test_lookup_agrees_with_a_dictionary_and_gives_row_zero_to_strangers(
    raw_ids: list[int], strangers: list[int], freq_threshold: int
):
    vocabulary = build_vocabulary(*counted(raw_ids), freq_threshold=freq_threshold, max_rows=0)
    expected = {raw_id: row for row, raw_id in enumerate(vocabulary.raw_ids.tolist(), start=1)}
    asked = raw_ids + strangers
    rows = vocabulary.lookup()(np.array(asked, np.int64))
    assert rows.dtype == np.int32
    assert rows.tolist() == [expected.get(raw_id, 0) for raw_id in asked]


@pytest.mark.parametrize("max_rows", [1, 2])
def test_a_table_may_shrink_to_row_zero(max_rows: int):
    vocabulary = build_vocabulary(np.array([4, 9]), np.array([3, 5]), freq_threshold=1, max_rows=max_rows)
    assert vocabulary.counts.tolist() == [[8], [3, 5]][max_rows - 1]


@given(st.lists(_IDS, max_size=30), st.integers(1, 10**6))
def test_buckets_are_the_same_on_every_machine(raw_ids: list[int], num_buckets: int):
    def plain(raw_id: int) -> int:
        word = raw_id & _MASK
        word = ((word ^ (word >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        word = ((word ^ (word >> 27)) * 0x94D049BB133111EB) & _MASK
        return (word ^ (word >> 31)) % num_buckets

    assert hash_to_buckets(np.array(raw_ids, np.int64), num_buckets).tolist() == [plain(i) for i in raw_ids]
