"""On how many bits rows are stored: the best cuts there are, within the budget."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise, product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from slipstream.ops.precision import choose_ranges
from slipstream.schema import RowFormat, RowRange

WIDTH = 8
"""Values of a row: as many bytes at 8 bits."""
BITS = [RowFormat(bits=8), RowFormat(bits=4), RowFormat(bits=2)]


def choose(uses: list[np.ndarray], budget_bytes: int, **options: object) -> list[tuple[RowRange, ...]]:
    given = {"formats": BITS, "scale_bytes": [0] * len(uses), "may_share": [True] * len(uses)}
    return choose_ranges(uses, row_width=WIDTH, budget_bytes=budget_bytes, **(given | options))  # type: ignore[arg-type]


def bytes_of(ranges: list[tuple[RowRange, ...]]) -> int:
    return sum(part.rows * part.bits * WIDTH // 8 for parts in ranges for part in parts)


def error_of(ranges: list[tuple[RowRange, ...]], uses: list[np.ndarray]) -> float:
    """Uses times error of every row but row 0, row by row."""
    total = 0.0
    for parts, of_table in zip(ranges, uses, strict=True):
        bits = np.zeros(len(of_table))
        stored = np.concatenate([np.full(part.rows, part.bits) for part in parts])
        bits[: len(stored)] = stored
        total += float((of_table * 4.0**-bits)[1:].sum())
    return total


@st.composite
def tables(draw: st.DrawFn) -> list[np.ndarray]:
    sizes = draw(st.lists(st.integers(1, 60), min_size=1, max_size=5))
    rng = np.random.default_rng(draw(st.integers(0, 1000)))
    return [np.concatenate([[rng.integers(0, 9)], np.sort(rng.zipf(1.4, size - 1))[::-1]]) for size in sizes]


@given(tables(), st.integers(0, 120))
def test_ranges_begin_with_the_most_used_rows_and_keep_to_the_budget(uses: list[np.ndarray], percent: int):
    budget = WIDTH * (len(uses) + sum(map(len, uses)) * percent // 100)
    ranges = choose(uses, budget)
    assert bytes_of(ranges) <= budget
    assert bytes_of(ranges) > budget - WIDTH // 2 or bytes_of(ranges) == WIDTH * sum(map(len, uses)), "and use it up"
    for parts, of_table in zip(ranges, uses, strict=True):
        assert 0 < sum(part.rows for part in parts) <= len(of_table)
        assert parts[0].bits == 8 and all(first.bits > second.bits for first, second in pairwise(parts))
    assert error_of(choose(uses, budget + 64), uses) <= error_of(ranges, uses)


def test_no_other_cuts_err_less():
    uses = [np.array([3, 900, 80, 7, 1]), np.array([0, 300, 40, 5])]

    def cuts_of(size: int) -> Iterator[tuple[RowRange, ...]]:
        """Every way to give falling numbers of rows 8, 4 and 2 bits; row 0 gets 8."""
        for stops in product(range(1, size + 1), repeat=3):
            if list(stops) == sorted(stops):
                sizes = zip((8, 4, 2), np.diff([0, *stops]).tolist(), strict=True)
                yield tuple(RowRange(bits=bits, rows=rows) for bits, rows in sizes if rows)

    every = [list(both) for both in product(cuts_of(5), cuts_of(4))]
    for budget in range(16, 74, 2):
        found = choose(uses, budget)
        # of all that take as much
        assert error_of(found, uses) == min(error_of(one, uses) for one in every if bytes_of(one) <= bytes_of(found))


def test_a_budget_for_all_gives_every_row_the_most_bits():
    uses = [np.array([0, 5, 4, 0, 0]), np.array([0, 1])]
    assert choose(uses, 7 * WIDTH) == [(RowRange(bits=8, rows=5),), (RowRange(bits=8, rows=2),)]
    assert choose(uses, 7 * WIDTH // 2, formats=BITS[1:2]) == [
        (RowRange(bits=4, rows=5),),
        (RowRange(bits=4, rows=2),),
    ]


def test_a_table_that_may_not_share_keeps_all_its_rows():
    uses = [np.array([0, 9, 9, *[1] * 30]), np.array([0, 9, 9, *[1] * 30])]
    kept, cut = choose(uses, 140, may_share=[False, True])
    assert sum(part.rows for part in kept) == 33 > sum(part.rows for part in cut)


def test_a_scale_of_its_own_counts_for_every_row():
    uses = [np.array([9, *[5] * 63])]
    assert choose(uses, 64 * (WIDTH + 4), scale_bytes=[4]) == [(RowRange(bits=8, rows=64),)]
    (parts,) = choose(uses, 64 * (WIDTH + 4) - 1, scale_bytes=[4])
    assert [part.bits for part in parts] == [8, 4]


def test_a_budget_below_the_first_rows_is_refused():
    with pytest.raises(ValueError, match="expected at least 16 bytes, found 15"):
        choose([np.array([3, 2, 1]), np.array([0])], 15)
