"""How much of each row of a table is stored, under one budget of bytes for all tables.

Rows are ranked by use, so what a row deserves falls with its number, and a choice is a few cuts in each table: the
first rows on the most bits, later ones on fewer, then rows of which only some values are stored, for what is used a few
times learns no more; last a tail that is not stored: it shares row 0, that of rare values.

The choice makes Σ uses · error over all rows least. Of a value's variance b bits err by 4^-b, for their step halves
with each bit. A share s of the values leaves out 1 - s^¼ of what a row says, a guess that trials bear out. A row of the
tail errs by all of it. With the sum of bytes as the one constraint a multiplier decides: a row takes the larger of two
formats where uses · error saved / bytes added is above it.

Source: Yang et al., arXiv 2409.20305, for bits by how often a row is used; Ginart et al., arXiv 1909.11810, for fewer
values of rare rows.

Shape suffixes: N rows of a table, J steps: from a place in the tail to a row, and on to wider ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from slipstream.schema import RowFormat, RowRange

_HALVINGS = 200
"""Of the interval in which the multiplier lies: more than doubles can tell apart."""


_Point = tuple[int, float, RowFormat | None]
"""Bytes and error of a row in a format; None in the tail."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Table:
    """A table, and what its rows can be given, one step after the other."""

    falling: np.ndarray
    """Uses of its rows times -1, ascending; -∞ for row 0, which comes first. Shape (N,)."""
    formats: list[RowFormat]
    """After each step."""
    added: np.ndarray
    """Bytes of each step. Shape (J,), int64."""
    gains: np.ndarray
    """Error that each step saves per byte; they fall. Shape (J,)."""
    may_share: bool

    @property
    def most_gained(self) -> float:
        """Largest uses · error saved per byte, row 0 aside."""
        return float(-self.falling[1:].min(initial=0.0) * self.gains[0])

    def count(self, multiplier: float) -> np.ndarray:
        """Count the rows that deserve each step. Shape (J,), int64."""
        wanted = np.searchsorted(self.falling, -multiplier / self.gains)
        if not self.may_share:
            wanted[0] = len(self.falling)
        return wanted

    def weigh(self, counts: np.ndarray) -> int:
        """Give the bytes of so many rows on each step."""
        return int((counts * self.added).sum())

    def cut(self, counts: np.ndarray) -> tuple[RowRange, ...]:
        """Turn numbers of rows on each step or above into ranges, the largest first."""
        ranges, start = [], 0
        for stop, one in zip(counts[::-1].tolist(), reversed(self.formats), strict=True):
            if stop > start:
                ranges.append(RowRange(bits=one.bits, rows=stop - start, values=one.values))
            start = stop
        return tuple(ranges)


def choose_ranges(
    uses: Sequence[np.ndarray],
    *,
    formats: Sequence[RowFormat],
    row_width: int,
    scale_bytes: Sequence[int],
    budget_bytes: int,
    may_share: Sequence[bool],
) -> list[tuple[RowRange, ...]]:
    """Cut tables into ranges of rows in one format each.

    Args:
        uses: Of the rows of each table: the n-th most of those after row 0 count as those of row n. Row 0 is stored in
            the largest format whatever its uses. Shapes (N,), >= 0.
        formats: That rows may have.
        row_width: Values of a row.
        scale_bytes: Of each table, bytes that each row has for a scale of its own.
        budget_bytes: What the rows of all tables may take.
        may_share: Of each table, whether it may have a tail; else each of its rows is stored.

    Returns:
        Ranges of each table, from row 0 on; rows after the last one are its tail.

    Raises:
        ValueError: The budget is too small; says what the least would be.
    """
    tables = [
        _make_table(*one, formats=formats, row_width=row_width)
        for one in zip(uses, scale_bytes, may_share, strict=True)
    ]

    def weigh(counts: Sequence[np.ndarray]) -> int:
        return sum(table.weigh(rows) for table, rows in zip(tables, counts, strict=True))

    def count(multiplier: float) -> list[np.ndarray]:
        return [table.count(multiplier) for table in tables]

    low, high = -1.0, max(table.most_gained for table in tables)
    if weigh(count(low)) <= budget_bytes:
        return [table.cut(table.count(low)) for table in tables]
    if (least := weigh(count(high))) > budget_bytes:
        raise ValueError(f"expected at least {least:,} bytes, found {budget_bytes:,}")
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (low, middle) if weigh(count(middle)) <= budget_bytes else (middle, high)
    counts = count(high)
    room = budget_bytes - weigh(counts)
    for table, rows, wanted in zip(tables, counts, count(low), strict=True):
        room -= _fill_up(rows, wanted, table.added, room)
    return [table.cut(rows) for table, rows in zip(tables, counts, strict=True)]


def _make_table(
    uses: np.ndarray, scale_bytes: int, may_share: bool, *, formats: Sequence[RowFormat], row_width: int
) -> _Table:
    """Leave out formats that a mixture of a smaller and a larger one beats: then gains fall from step to step."""
    kept: list[_Point] = [(0, 1.0, None)]
    for size, error, one in sorted(
        (_point(one, row_width, scale_bytes) for one in formats), key=lambda point: point[:2]
    ):
        if size == kept[-1][0]:
            continue  # as many bytes for a larger error
        found = size, error, one
        while len(kept) > 1 and _gain(kept[-1], found) >= _gain(kept[-2], kept[-1]):
            kept.pop()
        kept.append(found)
    return _Table(
        falling=np.concatenate([[-np.inf], np.sort(-uses[1:].astype(np.float64))]),
        formats=[one for _, _, one in kept if one is not None],
        added=np.diff([size for size, _, _ in kept]),
        gains=np.array([_gain(before, after) for before, after in pairwise(kept)]),
        may_share=may_share,
    )


def _point(one: RowFormat, row_width: int, scale_bytes: int) -> _Point:
    values = row_width if one.values is None else one.values
    kept = (values / row_width) ** 0.25 * (1 - 4.0**-one.bits)
    return scale_bytes + values * one.bits // 8, 1 - kept, one


def _gain(before: _Point, after: _Point) -> float:
    return (before[1] - after[1]) / (after[0] - before[0])


def _fill_up(counts: np.ndarray, wanted: np.ndarray, added: np.ndarray, room: int) -> int:
    """Give rows that deserve a step as much as others do what room is left; changes `counts`, returns bytes given."""
    left = room
    for step, size in enumerate(added.tolist()):
        limit = wanted[step] if step == 0 else min(wanted[step], counts[step - 1])
        more = min(int(limit - counts[step]), left // size)
        counts[step] += more
        left -= more * size
    return room - left
