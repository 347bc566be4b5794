"""What a hot set of any size would serve, from access counts and the few sizes that a profile measured.

Lookups: exact. The rows of a hot set by policy `frequency` are known from the counts alone, and so are the lookups that
find them. Samples: were the columns of a sample independent, the share q of samples that are wholly hot would be the
product of the columns' hit ratios; they are not, so s = q^ρ with a ρ that the profile's points give and that changes
slowly with the size. Policy `sample-aware` is told by its points alone: how many more lookups miss than under
`frequency` at the same size, and its own ρ. Between points both are interpolated over log(rows); beyond them the
nearest holds.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from slipstream.ops.hot_set import CurvePoint
from slipstream.ops.runs import is_run_start

_SMALLEST = 1e-12
"""Shares below are no shares: their logarithms would weigh more than all others."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Served:
    """What a hot set serves."""

    hot_rows: int
    """H: as many as asked for, or fewer where no more rows were ever looked up."""
    access_threshold: int | None
    """Λ: count of the least used hot row, OOV and padding aside, 0 when there is none; known of `frequency` alone."""
    hit_ratio: float
    """Lookups that find a hot row."""
    hot_sample_share: float
    """Samples whose every lookup does."""
    is_within_curve: bool
    """Whether the size lies between sizes that the profile measured; beyond them shares of samples are a guess."""


NOTHING_SERVED = Served(hot_rows=0, access_threshold=None, hit_ratio=0.0, hot_sample_share=0.0, is_within_curve=True)
"""By no hot rows at all, as in mode `baseline`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Moves:
    """Rows that move for a chunk of batches, on average."""

    fetched: float
    """From the host; as many go back."""
    staged: float
    """Distinct cold rows of the chunk: those fetched, and those that the chunk before had too."""


class HitCurve:
    """Answers for hot sets of any size.

    Args:
        counts: Accesses per global row, table by table. Shape (V,), integer.
        offsets: Global row of each table's row 0, the OOV row, and V at the end. Shape (T + 1,).
        column_tables: Table of each column. Length F.
        points: By policy, what the profile measured on training samples; those of `frequency` are needed.
        padded: Tables with a row that stands for padding: it counts nothing and is always hot.
    """

    def __init__(
        self,
        counts: np.ndarray,
        offsets: np.ndarray,
        column_tables: Sequence[int],
        points: Mapping[str, Sequence[CurvePoint]],
        padded: Collection[int] = (),
    ) -> None:
        self.num_rows, self.num_tables = len(counts), len(offsets) - 1
        self._num_padding: np.ndarray = np.array([int(table in padded) for table in range(self.num_tables)])
        self.num_always = self.num_tables + int(self._num_padding.sum())
        """OOV and padding rows, which are always hot."""
        self._column_tables = np.asarray(column_tables)
        tables = [counts[start:stop] for start, stop in pairwise(offsets)]
        self._oov = np.array([table[0] for table in tables], np.int64)
        # of each table the counts beyond OOV, ascending, as searchsorted wants them; rows are ranked, so this is a
        # matter of turning them round; a padding row is one of those at the beginning that count nothing
        self._ascending = [np.sort(table[1:][::-1])[num:] for table, num in zip(tables, self._num_padding, strict=True)]
        self._served = [np.concatenate([[0], np.cumsum(table[::-1])]) for table in self._ascending]
        self._lookups = np.array([own + served[-1] for own, served in zip(self._oov, self._served, strict=True)])
        self.lookups = int(self._lookups.sum())
        """Of all counted samples."""
        values, num = _count_values(self._ascending)
        self._values, self._num = values[::-1], num[::-1]
        """Distinct counts, falling, and how many rows outside OOV have each."""
        self._rows_down_to = np.cumsum(self._num)
        self._used = int(self._num[self._values > 0].sum())
        self._corrections = {policy: self._learn(policy, found) for policy, found in points.items()}

    # --- what a size serves ---

    def at(self, policy: str, num_rows: int) -> Served:
        """Say what the hot set of so many rows serves.

        Args:
            policy: One that points were given for.
            num_rows: H, from T to V.
        """
        num_rows = self._clip(num_rows)
        threshold, hit_ratio, independent = self._by_frequency(num_rows)
        if num_rows == self.num_rows:
            return Served(
                hot_rows=num_rows,
                access_threshold=threshold,
                hit_ratio=1.0,
                hot_sample_share=1.0,
                is_within_curve=True,
            )
        misses, exponents = self._corrections[policy]
        sizes = np.exp(exponents[0])
        missed = (1 - hit_ratio) * _between(*misses, np.log(num_rows))
        share = independent ** _between(*exponents, np.log(num_rows)) if independent > 0 else 0.0
        return Served(
            hot_rows=num_rows,
            access_threshold=threshold if policy == "frequency" else None,
            hit_ratio=float(np.clip(1 - missed, 0.0, 1.0)),
            hot_sample_share=float(np.clip(share, 0.0, 1.0)),
            is_within_curve=bool(len(sizes) and round(sizes[0]) <= num_rows <= round(sizes[-1])),
        )

    def rows_for_hits(self, policy: str, hit_ratio: float) -> int:
        """Give the least H that serves this share of lookups."""
        return self._least(lambda num_rows: self.at(policy, num_rows).hit_ratio >= hit_ratio)

    def rows_for_hot_samples(self, policy: str, share: float) -> int:
        """Give the least H that serves this share of samples wholly."""
        return self._least(lambda num_rows: self.at(policy, num_rows).hot_sample_share >= share)

    def hot_rows_by_table(self, num_rows: int) -> np.ndarray:
        """Say how many rows of each table are hot under policy `frequency`, OOV and padding included. Shape (T,)."""
        num_rows = self._clip(num_rows)
        if num_rows == self.num_rows:
            beyond = np.array([len(table) for table in self._ascending])
        else:
            beyond = self._taken(num_rows)[1]
        found: np.ndarray = 1 + self._num_padding + beyond
        return found

    # --- what has to move ---

    def moves(self, policy: str, num_rows: int, *, samples_per_chunk: float, num_samples: int) -> Moves:
        """Say how many cold rows move for a chunk of batches, were samples drawn one by one by these counts.

        A row with count c is looked up by a chunk of n samples with p = 1 - (1 - c/N)^n. It is fetched where the chunk
        before did not have it, p (1 - p), and goes back as often.

        Args:
            policy: As in `at`; the cold rows of `sample-aware` are taken to be like those that `frequency` leaves cold
                when as many lookups miss.
            num_rows: H.
            samples_per_chunk: n.
            num_samples: N, counted samples.
        """
        num_rows = self._clip(num_rows)
        if num_rows == self.num_rows:
            return Moves(fetched=0.0, staged=0.0)
        if policy != "frequency":
            num_rows = self.rows_for_hits("frequency", self.at(policy, num_rows).hit_ratio)
        # rows outside OOV are taken from the most used on: of each distinct count so many stay cold
        hot = num_rows - self.num_always
        cold = np.clip(self._rows_down_to - hot, 0, self._num)
        used = self._values > 0
        share = np.minimum(self._values[used] / max(num_samples, 1), 1 - 1e-12)
        in_chunk = -np.expm1(samples_per_chunk * np.log1p(-share))
        return Moves(
            fetched=float(np.dot(cold[used], in_chunk * (1 - in_chunk))), staged=float(np.dot(cold[used], in_chunk))
        )

    # --- from counts ---

    def _clip(self, num_rows: int) -> int:
        """Give the rows that a set of this size has: those never looked up stay cold, unless all fit."""
        if num_rows >= self.num_rows:
            return self.num_rows
        return min(max(num_rows, self.num_always), self.num_always + self._used)

    def _taken(self, num_rows: int) -> tuple[int, np.ndarray]:
        """Λ, and the rows of each table beyond OOV that are among the most used `num_rows`. Shape (T,)."""
        beyond = num_rows - self.num_always
        if beyond <= 0:
            return 0, np.zeros(self.num_tables, np.int64)
        threshold = self._values[np.searchsorted(self._rows_down_to, beyond)]
        above = np.array([len(table) - np.searchsorted(table, threshold, "right") for table in self._ascending])
        equal = np.array([len(table) - np.searchsorted(table, threshold, "left") for table in self._ascending]) - above
        # ties are taken table by table: what is left of them when the tables before have had theirs
        before = np.concatenate([[0], np.cumsum(equal)[:-1]])
        return int(threshold), above + np.clip(beyond - above.sum() - before, 0, equal)

    def _by_frequency(self, num_rows: int) -> tuple[int, float, float]:
        """Λ, hit ratio, and the share of wholly hot samples were their columns independent."""
        if num_rows == self.num_rows:
            return int(self._values[-1]) if len(self._values) else 0, 1.0, 1.0
        threshold, taken = self._taken(num_rows)
        hits = self._oov + np.array([served[k] for served, k in zip(self._served, taken, strict=True)])
        by_table = hits / np.maximum(self._lookups, 1)
        return threshold, hits.sum() / max(self.lookups, 1), float(np.prod(by_table[self._column_tables]))

    def _learn(
        self, policy: str, points: Sequence[CurvePoint]
    ) -> tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
        """Set the measured points against counts alone: (log rows, misses over misses), (log rows, ρ)."""
        misses, exponents = [], []
        for point in sorted(points, key=lambda point: point.hot_rows):
            if not self.num_always < point.hot_rows < self.num_rows:
                continue
            _, hit_ratio, independent = self._by_frequency(point.hot_rows)
            at = np.log(point.hot_rows)
            if policy != "frequency" and 1 - hit_ratio > _SMALLEST:  # of that policy the counts know it
                misses.append((at, (1 - point.hit_ratio) / (1 - hit_ratio)))
            if point.hot_sample_share > _SMALLEST and _SMALLEST < independent < 1:
                exponents.append((at, np.log(point.hot_sample_share) / np.log(independent)))
        return _columns(misses), _columns(exponents)

    def _least(self, suffices: Callable[[int], bool]) -> int:
        low, high = self.num_always, self.num_rows
        while low < high:
            middle = (low + high) // 2
            if suffices(middle):
                high = middle
            else:
                low = middle + 1
        return low


def _count_values(tables: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Count the distinct values of sorted arrays: (values, ascending; how often each)."""
    values, num = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
    for table in tables:
        starts = np.flatnonzero(is_run_start(table))
        values.append(table[starts])
        num.append(np.diff(starts, append=len(table)))
    distinct, inverse = np.unique(np.concatenate(values), return_inverse=True)
    return distinct, np.bincount(inverse, np.concatenate(num), len(distinct)).astype(np.int64)


def _columns(pairs: Sequence[tuple[float, float]]) -> tuple[np.ndarray, np.ndarray]:
    array = np.array(pairs, float).reshape(-1, 2)
    return array[:, 0], array[:, 1]


def _between(at: np.ndarray, values: np.ndarray, where: float) -> float:
    """Interpolate, the nearest beyond the ends; 1 where there is nothing."""
    return float(np.interp(where, at, values)) if len(at) else 1.0
