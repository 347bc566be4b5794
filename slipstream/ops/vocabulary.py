"""Raw ids to rows: count, rank, cut, look up.

One table at a time; memory is bounded by the distinct raw ids of that table, never by the number of samples.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from slipstream.ops.runs import is_run_start
from slipstream.ops.split import mix64
from slipstream.schema import OOV_ROW


class RawIdCounter:
    """Adds up how often each raw id of one table occurs.

    Counts may come in any order and any number of pieces; the sum does not depend on it. Pieces are merged
    when they outgrow what is merged already, so the cost stays near that of one merge.
    """

    def __init__(self) -> None:
        self._raw_ids = [np.empty(0, np.int64)]
        self._counts = [np.empty(0, np.int64)]
        self._waiting = 0

    def add(self, raw_ids: np.ndarray, counts: np.ndarray) -> None:
        """Add counts of raw ids. Both of shape (n,), int64; zero counts are left out."""
        seen = counts > 0
        self._raw_ids.append(raw_ids[seen])
        self._counts.append(counts[seen])
        self._waiting += len(self._raw_ids[-1])
        if self._waiting > max(len(self._raw_ids[0]), 1 << 20):
            self._merge()

    def result(self) -> tuple[np.ndarray, np.ndarray]:
        """Distinct raw ids in ascending order, and their counts. Both of shape (n,), int64."""
        self._merge()
        return self._raw_ids[0], self._counts[0]

    def _merge(self) -> None:
        raw_ids, counts = np.concatenate(self._raw_ids), np.concatenate(self._counts)
        order = np.argsort(raw_ids)
        raw_ids = raw_ids[order]
        starts = np.flatnonzero(is_run_start(raw_ids))
        self._raw_ids = [raw_ids[starts]]
        self._counts = [np.add.reduceat(counts[order], starts) if starts.size else counts]
        self._waiting = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Vocabulary:
    """The rows of one table: row r > 0 holds `raw_ids[r - 1]`, row 0 everything else."""

    raw_ids: np.ndarray
    """Raw ids of the rows 1, 2, …. Shape (N - 1,), int64."""
    counts: np.ndarray
    """Training lookups of the rows 0, 1, 2, …. Shape (N,), int64; falls from index 1 on."""

    @property
    def num_rows(self) -> int:
        """Rows of the table, row 0 included."""
        return len(self.counts)

    def lookup(self) -> RowLookup:
        """Build the map raw id -> row."""
        order = np.argsort(self.raw_ids, kind="stable")
        return RowLookup(sorted_raw_ids=self.raw_ids[order], rows=(order + 1).astype(np.int32))


@dataclass(frozen=True, kw_only=True, slots=True)
class RowLookup:
    """The map raw id -> row of one table; 12 bytes a row."""

    sorted_raw_ids: np.ndarray
    rows: np.ndarray

    def __call__(self, raw_ids: np.ndarray) -> np.ndarray:
        """Rows of raw ids; unknown ones get row 0. Shape (n,), int32."""
        if not self.sorted_raw_ids.size:
            return np.full(raw_ids.shape, OOV_ROW, np.int32)
        # ids in order walk through memory instead of jumping: three times as fast, the sorting included
        order = np.argsort(raw_ids)
        asked = raw_ids[order]
        places = np.searchsorted(self.sorted_raw_ids, asked)
        places[places == len(self.sorted_raw_ids)] = 0
        rows = np.empty(raw_ids.shape, np.int32)
        rows[order] = np.where(self.sorted_raw_ids[places] == asked, self.rows[places], np.int32(OOV_ROW))
        return rows


def build_vocabulary(
    raw_ids: np.ndarray, counts: np.ndarray, *, freq_threshold: int, max_rows: int, reserved: int | None = None
) -> Vocabulary:
    """Rank raw ids by count and cut the tail.

    Args:
        raw_ids: Distinct raw ids in ascending order. Shape (n,), int64.
        counts: Their training lookups. Shape (n,), int64.
        freq_threshold: Raw ids counted less often share row 0.
        max_rows: Most rows, row 0 included; 0 sets no limit. At least 2 where a raw id is reserved.
        reserved: A raw id that gets a row however rare it is, even when it was never seen.

    Returns:
        Rows by count descending, ties by raw id ascending.
    """
    if reserved is not None and reserved not in raw_ids:
        place = int(np.searchsorted(raw_ids, reserved))
        raw_ids, counts = np.insert(raw_ids, place, reserved), np.insert(counts, place, 0)
    is_reserved = raw_ids == reserved if reserved is not None else np.zeros(len(raw_ids), bool)
    kept = (counts >= freq_threshold) | is_reserved
    ids, uses = raw_ids[kept], counts[kept]
    order = np.argsort(-uses, kind="stable")
    if max_rows and len(order) >= max_rows:
        first = is_reserved[kept][order]
        chosen = np.sort(np.argsort(~first, kind="stable")[: max_rows - 1])
        order = order[chosen]
    ids, uses = ids[order], uses[order]
    rare = counts.sum() - uses.sum()
    return Vocabulary(raw_ids=ids, counts=np.concatenate([[rare], uses]).astype(np.int64))


def hash_to_buckets(raw_ids: np.ndarray, num_buckets: int) -> np.ndarray:
    """Hash raw ids into 0..num_buckets-1; the same on every machine. Shape (n,), int64."""
    return (mix64(raw_ids.view(np.uint64)) % np.uint64(num_buckets)).astype(np.int64)
