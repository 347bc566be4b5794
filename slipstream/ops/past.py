"""What the lines before a line say of its values: how often each was there, and how often it was clicked.

Nothing of the line itself or of later ones gets in. "Before" is the order in which training lines are added; lines that
are not of the training split see all of it, and so do lines that are scored later.

Shape suffixes: n lines, U distinct raw ids.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from slipstream.ops.dense import transform_dense
from slipstream.ops.runs import is_run_start


@dataclass(frozen=True, kw_only=True, slots=True)
class PastEncoding:
    """Which sparse columns give dense ones of what was before: first counts, then click rates."""

    transform: str
    """Of counts, by the name of the dense transform; click rates are log-odds, which only `standard` moves."""
    count_columns: Sequence[int]
    """Sparse columns whose values are counted, ascending."""
    target_columns: Sequence[int]
    """Sparse columns whose values' click rates are taken, ascending."""
    prior: float
    """Lines that the click rate of all lines counts for, beside those of a value; above 0."""
    num_lines: int
    """Training lines."""
    num_clicks: int
    """Those with label 1."""
    means: Sequence[float] = ()
    """Mean over the training split of each column before it is shifted, for `standard`; else empty."""
    deviations: Sequence[float] = ()
    """Their standard deviation, above 0; for `standard`, else empty."""

    @property
    def columns(self) -> list[int]:
        """Sparse columns that are looked at, ascending."""
        return sorted({*self.count_columns, *self.target_columns})

    @property
    def width(self) -> int:
        """Dense columns that come of it."""
        return len(self.count_columns) + len(self.target_columns)

    def encode_counts(self, place: int, counts: np.ndarray) -> np.ndarray:
        """Give the dense column of `count_columns[place]`. Shape (n,), float32."""
        return transform_dense(counts, name=self.transform, **self._moments(place))

    def encode_log_odds(self, place: int, log_odds: np.ndarray) -> np.ndarray:
        """Give the dense column of `target_columns[place]`. Shape (n,), float32."""
        moments = self._moments(len(self.count_columns) + place)
        wide = log_odds.astype(np.float64)
        encoded = (wide - moments["mean"]) / moments["deviation"] if moments else wide
        return encoded.astype(np.float32)

    def _moments(self, place: int) -> dict[str, float]:
        return {"mean": self.means[place], "deviation": self.deviations[place]} if self.means else {}


@dataclass(frozen=True, kw_only=True, slots=True)
class Seen:
    """What was before each of some lines."""

    counts: np.ndarray
    """Lines with the same value. Shape (n,), int64."""
    clicks: np.ndarray
    """Those of them that were clicked. Shape (n,), int64."""
    lines: np.ndarray | int
    """All lines. Shape (n,), int64, or one number for all."""
    all_clicks: np.ndarray | int
    """Those of them that were clicked. Shape (n,), int64, or one number for all."""

    def log_odds(self, prior: float) -> np.ndarray:
        """Say by how much a value's click rate differs from that of all lines, both before.

        The rate of all lines r = (clicks + 1/2) / (lines + 1); that of the value (its clicks + prior · r) / (its lines
        + prior): so a value that was never seen gets 0, and a rare one stays near it.

        Args:
            prior: Lines that r counts for, above 0.

        Returns:
            Log-odds of the value's rate less those of r. Shape (n,), float32.

        Source: smoothing by Micci-Barreca, SIGKDD Explorations 2001; past-only as in CatBoost's ordered statistics.
        """
        rate = np.asarray((self.all_clicks + 0.5) / (self.lines + 1))
        own = (self.clicks + prior * rate) / (self.counts + prior)
        difference: np.ndarray = np.log(own / (1 - own)) - np.log(rate / (1 - rate))
        return difference.astype(np.float32)


class PastCounter:
    """Counts the values of one column line by line, and says what was before each.

    Args:
        raw_ids: Every raw id that will be added, ascending. Shape (U,), int64.
    """

    def __init__(self, raw_ids: np.ndarray) -> None:
        self._raw_ids = raw_ids
        self._counts, self._clicks = np.zeros(len(raw_ids), np.int64), np.zeros(len(raw_ids), np.int64)
        self._lines = self._all_clicks = 0

    def add(self, raw_ids: np.ndarray, codes: np.ndarray, labels: np.ndarray) -> Seen:
        """Add lines in their order.

        Args:
            raw_ids: Distinct raw ids; every one that a code names must be known.
            codes: Place in `raw_ids` of each line's value. Shape (n,).
            labels: 0 or 1. Shape (n,).

        Returns:
            What was before each of them.
        """
        # integers that fit 16 bits are sorted by radix, in a third of the time
        order = np.argsort(codes, kind="stable")
        ordered, clicked = codes[order], labels[order].astype(np.int64)
        starts = np.flatnonzero(is_run_start(ordered))
        lengths = np.diff(np.append(starts, len(ordered)))
        places = np.searchsorted(self._raw_ids, raw_ids[ordered[starts]])
        # lines of a value stand side by side in their order: the k-th has k before it here, and all of earlier calls
        earlier = np.arange(len(ordered)) - np.repeat(starts, lengths)
        clicks_before = np.cumsum(clicked) - clicked
        own_clicks = clicks_before - np.repeat(clicks_before[starts], lengths)
        counts, clicks = np.empty(len(order), np.int64), np.empty(len(order), np.int64)
        counts[order] = earlier + np.repeat(self._counts[places], lengths)
        clicks[order] = own_clicks + np.repeat(self._clicks[places], lengths)
        seen = Seen(
            counts=counts,
            clicks=clicks,
            lines=self._lines + np.arange(len(labels)),
            all_clicks=self._all_clicks + np.cumsum(labels, dtype=np.int64) - labels,
        )
        self._counts[places] += lengths
        self._clicks[places] += np.add.reduceat(clicked, starts) if starts.size else 0
        self._lines += len(labels)
        self._all_clicks += int(labels.sum(dtype=np.int64))
        return seen

    def result(self) -> PastCounts:
        """Say what all lines had."""
        return PastCounts(sorted_raw_ids=self._raw_ids, counts=self._counts, clicks=self._clicks)


@dataclass(frozen=True, kw_only=True, slots=True)
class PastCounts:
    """How often each raw id of a column was in the training split, and how often clicked."""

    sorted_raw_ids: np.ndarray
    """Ascending. Shape (U,), int64."""
    counts: np.ndarray
    """Shape (U,), int64."""
    clicks: np.ndarray
    """Shape (U,), int64."""

    def __call__(self, raw_ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Give counts and clicks of raw ids, 0 for unknown ones. Both of shape (n,), int64."""
        if not self.sorted_raw_ids.size:
            return np.zeros(len(raw_ids), np.int64), np.zeros(len(raw_ids), np.int64)
        places = np.minimum(np.searchsorted(self.sorted_raw_ids, raw_ids), len(self.sorted_raw_ids) - 1)
        is_known = self.sorted_raw_ids[places] == raw_ids
        return np.where(is_known, self.counts[places], 0), np.where(is_known, self.clicks[places], 0)
