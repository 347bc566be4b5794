"""Samples by their numbers are the samples themselves, wherever their windows lie."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from slipstream.ops.picks import FIELDS, FreeRanges, Picks, Window, join, locate, shifts

SIZES = st.lists(st.lists(st.integers(0, 4), min_size=1, max_size=3), min_size=1, max_size=4)
"""Of the pieces of each window."""


def make_windows(sizes: list[list[int]]) -> list[Window]:
    """Windows whose samples are numbered through."""
    windows, number = [], 0
    for pieces in sizes:
        arrays = []
        for size in pieces:
            numbers = np.arange(number, number + size)
            arrays.append((numbers[:, None].astype(np.float32), numbers[:, None] * [1, 10], numbers * np.float32(0.5)))
            number += size
        windows.append(Window(arrays))
    return windows


@given(sizes=SIZES, data=st.data())
def test_picks_are_taken_and_joined_as_arrays_are(sizes: list[list[int]], data: Any):
    parts, expected = [], []
    start = 0
    for at, window in enumerate(make_windows(sizes)):
        weights = np.arange(start, start + len(window), dtype=np.float32) if at % 2 else None
        picks, numbers = Picks.all_of(window, weights), np.arange(start, start + len(window))
        order = np.array(data.draw(st.permutations(range(len(window)))), np.int64)
        keep = order % 3 > 0
        parts.append(picks.take(order).take(keep).take(slice(1, None)))
        expected.append(numbers[order][keep][1:])
        start += len(window)
    joined, wanted = join(parts), np.concatenate(expected)
    order = np.array(data.draw(st.permutations(range(len(joined)))), np.int64)
    joined, wanted = joined.take(order), wanted[order]

    assert joined.numbers.dtype == np.int32
    gathered = dict(zip(FIELDS, map(joined.gather, FIELDS), strict=True))
    assert np.array_equal(gathered["dense"], wanted[:, None])
    assert np.array_equal(gathered["slots"], wanted[:, None] * [1, 10])
    assert np.array_equal(gathered["labels"], wanted * np.float32(0.5))
    if len(parts) > 1:
        has_own = np.concatenate([np.full(len(one), at % 2 == 1) for at, one in enumerate(expected)])[order]
        assert joined.weights is not None
        assert np.array_equal(joined.weights, np.where(has_own, wanted, 1))


@given(sizes=SIZES, data=st.data())
def test_samples_are_found_where_their_windows_lie_in_however_many_ranges(sizes: list[list[int]], data: Any):
    windows = make_windows(sizes)
    free = FreeRanges(3 * sum(map(len, windows)))
    held, lying = [], {}
    for window in windows:  # places taken and given back before leave holes
        held.append(free.take(data.draw(st.integers(0, 3))) if len(free) > 3 + sum(map(len, windows)) else [])
        if held and data.draw(st.booleans()):
            free.give(held.pop(0))
        lying[window] = free.take(len(window))
    row = np.full(3 * sum(map(len, windows)) + 1, -1)
    number = 0
    for window in windows:
        for start, stop in lying[window]:
            assert (row[start:stop] == -1).all()
            row[start:stop] = range(number, number + stop - start)
            number += stop - start
    joined = join([Picks.all_of(window) for window in windows])
    picks = joined.take(np.array(data.draw(st.permutations(range(number))), np.int64))
    found = np.empty(number, np.int32)
    if number:
        locate(picks.numbers, shifts(picks, lambda window: lying[window]), out=found)
    assert np.array_equal(row[found], picks.numbers)


@given(st.lists(st.integers(0, 9), max_size=12), st.data())
def test_places_are_free_until_they_are_taken_and_again_once_they_are_given(counts: list[int], data: Any):
    free, held = FreeRanges(40), []
    taken: set[int] = set()
    for count in counts:
        if count > len(free):
            with pytest.raises(ValueError, match=f"at most {len(free)} places, found {count}"):
                free.take(count)
            continue
        held.append(free.take(count))
        places = [place for start, stop in held[-1] for place in range(start, stop)]
        assert len(places) == count and taken.isdisjoint(places)
        taken.update(places)
        if data.draw(st.booleans()):
            ranges = held.pop(data.draw(st.integers(0, len(held) - 1)))
            free.give(ranges)
            taken -= {place for start, stop in ranges for place in range(start, stop)}
        assert len(free) == 40 - len(taken)
    for ranges in held:
        free.give(ranges)
    assert free.take(40) == [(0, 40)]
