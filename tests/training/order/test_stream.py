from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import make_samples, sample_numbers

from slipstream.training.order.stream import SampleStream


@pytest.fixture(scope="module")
def workers() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(max_workers=2) as pool:
        yield pool


def open_stream(sizes: list[int], *, seed: int, window_samples: int, workers: ThreadPoolExecutor) -> SampleStream:
    starts = np.cumsum([0, *sizes])
    shards = [make_samples(np.zeros((size, 1), int), start=start) for size, start in zip(sizes, starts, strict=False)]
    loaders = [lambda shard=shard: shard for shard in shards]
    return SampleStream(loaders, sizes, seed=(seed, 0), window_samples=window_samples, workers=workers)


def drain(stream: SampleStream, counts: list[int]) -> list[list[int]]:
    taken = []
    for count in counts:
        samples = stream.take(count)
        taken.append([] if samples is None else sample_numbers(samples))
    return taken


@given(
    st.lists(st.integers(1, 9), max_size=6),
    st.integers(1, 30),
    st.integers(0, 5),
    st.lists(st.integers(0, 12), max_size=8),
)
def test_every_sample_comes_once_and_counts_are_met(workers, sizes, window_samples: int, seed: int, counts):
    stream = open_stream(sizes, seed=seed, window_samples=window_samples, workers=workers)
    left = sum(sizes)
    for count, taken in zip(counts, drain(stream, counts), strict=True):
        assert len(taken) == min(count, left)
        left -= len(taken)
    assert stream.remaining == left
    rest = drain(stream, [left + 5])[0]
    assert len(rest) == left
    assert stream.take(1) is None


@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.integers(1, 30), st.lists(st.integers(1, 9), max_size=5))
def test_the_order_does_not_depend_on_how_it_is_taken(workers, sizes, window_samples: int, counts):
    total = sum(sizes)
    whole = open_stream(sizes, seed=1, window_samples=window_samples, workers=workers)
    pieces = open_stream(sizes, seed=1, window_samples=window_samples, workers=workers)
    expected = drain(whole, [total])[0]
    assert [number for taken in drain(pieces, [*counts, total]) for number in taken] == expected
    assert sorted(expected) == list(range(total))


@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.integers(1, 30), st.integers(0, 60), st.integers(1, 9))
def test_skipping_is_taking_without_reading_what_was_passed(workers, sizes, window_samples: int, passed: int, count):
    whole = open_stream(sizes, seed=1, window_samples=window_samples, workers=workers)
    expected = drain(whole, [sum(sizes)])[0][passed:]
    read: list[int] = []
    starts = np.cumsum([0, *sizes])

    def load(index: int):
        read.append(index)
        return make_samples(np.zeros((sizes[index], 1), int), start=int(starts[index]))

    loaders = [lambda index=index: load(index) for index in range(len(sizes))]
    stream = SampleStream(loaders, sizes, seed=(1, 0), window_samples=window_samples, workers=workers)
    stream.skip(passed)
    assert stream.remaining == len(expected)
    found = [number for taken in drain(stream, [count] * sum(sizes)) for number in taken]
    assert found == expected
    assert len(read) == len(set(read))
    if window_samples <= min(sizes):  # windows of one shard: only those with samples to come are read
        assert set(read) == {int(np.searchsorted(starts, number, side="right")) - 1 for number in expected}


def test_a_stream_is_skipped_from_its_beginning_only(workers: ThreadPoolExecutor):
    stream = open_stream([3], seed=0, window_samples=3, workers=workers)
    stream.take(1)
    with pytest.raises(ValueError, match="nothing was taken"):
        stream.skip(1)


def test_seeds_and_windows_shuffle(workers: ThreadPoolExecutor):
    def order(seed: int, window_samples: int) -> list[int]:
        return drain(open_stream([50] * 4, seed=seed, window_samples=window_samples, workers=workers), [200])[0]

    assert order(1, 200) == order(1, 200) != order(2, 200)
    within = order(1, 50)
    for start in range(0, 200, 50):  # windows of one shard keep shards together, in some order
        assert len({number // 50 for number in within[start : start + 50]}) == 1
    assert len({number // 50 for number in order(1, 200)[:50]}) == 4


@pytest.mark.parametrize(("seconds_per_take", "used_before_loading"), [(5.0, 88), (1.0, 56), (0.0, 4)])
def test_the_next_window_is_loaded_in_time_and_no_sooner(seconds_per_take: float, used_before_loading: int):
    now, taken, loaded_at = [0.0], [0], []

    def load(start: int):
        now[0] += 0.5  # by one worker, the ten shards of a window one after the other
        loaded_at.append(taken[0])
        return make_samples(np.zeros((10, 1), int), start=start)

    loaders = [lambda start=start: load(start) for start in range(0, 200, 10)]
    with ThreadPoolExecutor(max_workers=1) as worker:
        stream = SampleStream(loaders, [10] * 20, seed=(0,), window_samples=100, workers=worker, clock=lambda: now[0])
        for _ in range(25):
            stream.take(4)
            if stream._next is not None:
                stream._next.wait()
            taken[0] += 4
            now[0] += seconds_per_take
    assert loaded_at[:10] == [0] * 10
    assert len(set(loaded_at[10:])) == 1 and loaded_at[10] == used_before_loading


def test_what_was_used_is_given_up(workers: ThreadPoolExecutor):
    stream = open_stream([1000] * 4, seed=0, window_samples=4000, workers=workers)
    held = []
    for _ in range(8):
        stream.take(500)
        held.append(sum(piece.X_cat.nbytes for piece in stream._window._pieces if piece is not None))
    assert held == sorted(held, reverse=True) and held[0] == 7 * held[-2] > 0 == held[-1]


def test_an_error_while_loading_comes_out(workers: ThreadPoolExecutor):
    def fail():
        raise OSError("disk")

    stream = SampleStream([fail], [3], seed=(0,), window_samples=5, workers=workers)
    with pytest.raises(OSError, match="disk"):
        stream.take(1)
