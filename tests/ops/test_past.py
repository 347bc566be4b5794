"""What the lines before a line say of it, compared with a plain loop, and searched for leaks."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from slipstream.ops.past import PastCounter, PastCounts, PastEncoding, Seen

Features = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""Values and labels of lines in order -> what each line gets."""


def past_only(values: np.ndarray, labels: np.ndarray) -> np.ndarray:
    distinct, codes = np.unique(values, return_inverse=True)
    return PastCounter(distinct).add(distinct, codes, labels).log_odds(5.0)


def with_its_own_label(values: np.ndarray, labels: np.ndarray) -> np.ndarray:
    distinct, codes = np.unique(values, return_inverse=True)
    seen = PastCounter(distinct).add(distinct, codes, labels)
    leaky = Seen(counts=seen.counts, clicks=seen.clicks + labels, lines=seen.lines, all_clicks=seen.all_clicks)
    return leaky.log_odds(5.0)


def of_all_lines(values: np.ndarray, labels: np.ndarray) -> np.ndarray:
    return np.array([labels[values == value].mean() for value in values])


def find_leak(features: Features, values: np.ndarray, labels: np.ndarray) -> int | None:
    """The first line whose own label, or a later one, changes what it gets; None where there is none."""
    honest = features(values, labels)
    for at in range(len(labels)):
        changed = labels.copy()
        changed[at:] = 1 - changed[at:]
        if not np.array_equal(features(values, changed)[: at + 1], honest[: at + 1]):
            return at
    return None


def test_no_line_knows_its_own_label_or_a_later_one(rng: np.random.Generator):
    values, labels = rng.integers(0, 5, 60), rng.integers(0, 2, 60)
    assert find_leak(past_only, values, labels) is None
    assert find_leak(with_its_own_label, values, labels) == 0  # the search finds what is planted
    assert find_leak(of_all_lines, values, labels) == 0


LINES = st.lists(st.tuples(st.integers(-3, 3), st.integers(0, 1)), max_size=40)


@given(lines=LINES, data=st.data())
def test_what_was_before_is_what_a_loop_counts_however_lines_are_cut(lines: list[tuple[int, int]], data: st.DataObject):
    cut = data.draw(st.integers(0, len(lines)))
    counter = PastCounter(np.arange(-3, 4))
    pieces = []
    for piece in (lines[:cut], lines[cut:]):
        values = np.array([value for value, _ in piece], np.int64)
        distinct, codes = np.unique(values, return_inverse=True)
        # raw ids of a chunk stand in any order, and some belong to other lines
        raw_ids, places = np.append(distinct[::-1], 3), len(distinct) - 1 - codes
        pieces.append(counter.add(raw_ids, places, np.array([label for _, label in piece], np.uint8)))
    for name, expected in (
        ("counts", [sum(v == value for v, _ in lines[:at]) for at, (value, _) in enumerate(lines)]),
        ("clicks", [sum(label for v, label in lines[:at] if v == value) for at, (value, _) in enumerate(lines)]),
        ("lines", list(range(len(lines)))),
        ("all_clicks", [sum(label for _, label in lines[:at]) for at in range(len(lines))]),
    ):
        assert np.concatenate([getattr(piece, name) for piece in pieces]).tolist() == expected
    counts, clicks = counter.result()(np.array([2, 9, -3]))
    assert counts.tolist() == [sum(v == value for v, _ in lines) for value in (2, 9, -3)]
    assert clicks.tolist() == [sum(label for v, label in lines if v == value) for value in (2, 9, -3)]


def test_log_odds_are_those_of_the_smoothed_rate_less_those_of_all_lines():
    seen = Seen(counts=np.array([0, 30]), clicks=np.array([0, 15]), lines=99, all_clicks=19)
    rate, own = 19.5 / 100, (15 + 10 * 0.195) / (30 + 10)
    expected = np.log(own / (1 - own)) - np.log(rate / (1 - rate))
    np.testing.assert_allclose(seen.log_odds(10.0), [0, expected], rtol=1e-6)
    first = Seen(counts=np.array([0]), clicks=np.array([0]), lines=0, all_clicks=0)
    assert first.log_odds(10.0).tolist() == [0.0]


def test_ids_that_nobody_counted_have_nothing():
    empty = np.empty(0, np.int64)
    counts, clicks = PastCounts(sorted_raw_ids=empty, counts=empty, clicks=empty)(np.array([1, 2]))
    assert counts.tolist() == clicks.tolist() == [0, 0]


def test_only_standard_moves_log_odds():
    options = {"count_columns": [4], "target_columns": [1, 4], "prior": 1.0, "num_lines": 9, "num_clicks": 2}
    plain = PastEncoding(transform="nvidia", **options)
    assert (plain.width, plain.columns) == (3, [1, 4])
    assert plain.encode_log_odds(1, np.array([0.25], np.float32)).tolist() == [0.25]
    assert plain.encode_counts(0, np.array([6])).tolist() == [pytest.approx(np.log(8))]
    standard = PastEncoding(transform="standard", means=[1.0, 2.0, 0.5], deviations=[2.0, 1.0, 0.5], **options)
    assert standard.encode_log_odds(1, np.array([0.25], np.float32)).tolist() == [-0.5]
    assert standard.encode_counts(0, np.array([6])).tolist() == [pytest.approx((np.log(7) - 1) / 2)]
