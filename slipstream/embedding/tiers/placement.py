"""Which buffer positions the cold rows of a chunk take.

Two answers share one interface. `StagingHalves` gives each chunk one of two halves in turn and forwards rows
that the next chunk needs too; nothing stays longer. `CachedRows` keeps rows until others need their place more.
Both are exact: what a chunk reads is always the latest value of a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from slipstream.embedding.row_cache import RowCache
from slipstream.embedding.tiers.rows import TieredRows

_NONE = np.empty(0, np.int64)


class StagingOverflowError(ValueError):
    """One batch alone has more cold rows than there are places."""

    def __init__(self, needed: int, available: int) -> None:
        super().__init__(f"one batch looks up {needed} cold rows, and there is room for {available}")
        self.needed, self.available = needed, available


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """What has to move for a chunk of batches."""

    num_batches: int
    """How many of the batches offered fit."""
    evicted: tuple[np.ndarray, np.ndarray] = field(default=(_NONE, _NONE))
    """(cold rows, positions) to write back before the fetch."""
    fetched: tuple[np.ndarray, np.ndarray]
    """(cold rows, positions) to bring from the host."""
    forwarded: tuple[np.ndarray, np.ndarray] = field(default=(_NONE, _NONE))
    """(positions from, positions to) inside the buffer, once the chunk before is done."""
    leaving: tuple[np.ndarray, np.ndarray] = field(default=(_NONE, _NONE))
    """(cold rows, positions) of the chunk before that this one does not need: written back after it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """The cold rows that a chunk of batches looks up."""

    rows: np.ndarray
    """Distinct rows of the chunk, in the order of their first lookup. Shape (U,)."""
    needed: np.ndarray
    """How many of them the batches up to each one need. Shape (batches,)."""
    rows_of_batch: Sequence[np.ndarray]
    """Distinct rows of each batch."""
    lookups_of_batch: Sequence[np.ndarray]
    """How often each batch looks each of them up."""

    def count_fitting(self, room: int) -> int:
        """How many leading batches need at most `room` rows.

        Raises:
            StagingOverflowError: Not even the first.
        """
        fitting = int(np.searchsorted(self.needed, room, side="right"))
        if fitting == 0:
            raise StagingOverflowError(int(self.needed[0]), room)
        return fitting


class Placement(Protocol):
    """Decides which cold rows sit where in the buffer."""

    def plan(self, request: Request) -> Plan:
        """Place the cold rows of as many leading batches as fit."""
        ...

    def positions_of(self, cold: np.ndarray) -> np.ndarray:
        """Buffer positions of rows that the last plan placed."""
        ...

    def unwritten(self) -> tuple[np.ndarray, np.ndarray]:
        """(cold rows, positions) that may be newer in the buffer, while the last planned chunk has not started."""
        ...

    def release(self) -> tuple[np.ndarray, np.ndarray]:
        """(cold rows, positions) that are newer in the buffer, when every chunk is done; they count as written."""
        ...


class StagingHalves:
    """Chunks take the two halves of the staging area in turn.

    Args:
        rows: The tiers; all of their staged positions are used.
    """

    def __init__(self, rows: TieredRows) -> None:
        self._num_hot = rows.num_hot
        self._half_rows = rows.num_staged // 2
        self._position = np.full(rows.num_cold, -1, np.int32)
        self._current = _NONE
        self._before: tuple[np.ndarray, np.ndarray] = (_NONE, _NONE)
        self._num_chunks = 0

    def plan(self, request: Request) -> Plan:
        """Place the cold rows of as many leading batches as fit a half.

        Raises:
            StagingOverflowError: Not even the first fits.
        """
        fitting = request.count_fitting(self._half_rows)
        staged = request.rows[: request.needed[fitting - 1]].astype(np.int64)
        start = self._num_hot + (self._num_chunks % 2) * self._half_rows
        self._num_chunks += 1
        places = np.arange(start, start + len(staged))
        places_before = self._position[staged].astype(np.int64)
        self._before = self._staged_now()
        before, before_at = self._before
        self._position[before] = -1
        self._position[staged] = places
        is_leaving = self._position[before] < 0
        self._current = staged
        return Plan(
            num_batches=fitting,
            fetched=(staged[places_before < 0], places[places_before < 0]),
            forwarded=(places_before[places_before >= 0], places[places_before >= 0]),
            leaving=(before[is_leaving], before_at[is_leaving]),
        )

    def positions_of(self, cold: np.ndarray) -> np.ndarray:
        """Buffer positions of rows that the last plan placed."""
        return np.asarray(self._position[cold])

    def unwritten(self) -> tuple[np.ndarray, np.ndarray]:
        """Give the rows of the chunk before the last planned one, where they were."""
        return self._before

    def release(self) -> tuple[np.ndarray, np.ndarray]:
        """Give the rows of the last chunk; afterwards nothing is staged."""
        released = self._staged_now()
        self._position[self._current] = -1
        self._current, self._before = _NONE, (_NONE, _NONE)
        return released

    def _staged_now(self) -> tuple[np.ndarray, np.ndarray]:
        return self._current, self._position[self._current].astype(np.int64)


class CachedRows:
    """Rows stay in the buffer until others need their place more.

    Rows of the chunk that computes are never evicted, so the moves of the next chunk can be made beside it.

    Args:
        rows: The tiers; the staged positions are the cache.
        cache: Its bookkeeping, over cold rows, with one position per staged position.
    """

    def __init__(self, rows: TieredRows, cache: RowCache) -> None:
        if cache.capacity != rows.num_staged or cache.num_rows != rows.num_cold:
            raise ValueError(
                f"expected a cache of {rows.num_staged} positions over {rows.num_cold} rows, "
                f"found {cache.capacity} over {cache.num_rows}"
            )
        self._num_hot, self.cache = rows.num_hot, cache

    def plan(self, request: Request) -> Plan:
        """Admit the rows of as many leading batches as fit half the cache; the other half is the chunk before's.

        Raises:
            StagingOverflowError: Not even the first fits.
        """
        fitting = request.count_fitting(self.cache.capacity // 2)
        rows, lookups = (
            np.concatenate(pieces[:fitting]) for pieces in (request.rows_of_batch, request.lookups_of_batch)
        )
        admitted = self.cache.admit(rows, lookups=lookups, keep_admits=1)
        self.cache.mark_dirty(admitted.distinct_positions)
        return Plan(
            num_batches=fitting,
            evicted=(admitted.evict_rows, admitted.evict_positions + self._num_hot),
            fetched=(admitted.fetch_rows, admitted.fetch_positions + self._num_hot),
        )

    def positions_of(self, cold: np.ndarray) -> np.ndarray:
        """Buffer positions of rows that the last plan placed."""
        return np.asarray(self.cache.lookup(cold)[0] + self._num_hot)

    def unwritten(self) -> tuple[np.ndarray, np.ndarray]:
        """Every cached row."""
        resident = self.cache.resident_rows()
        return resident, np.arange(len(resident)) + self._num_hot

    def release(self) -> tuple[np.ndarray, np.ndarray]:
        """Give the changed rows; they stay cached, now clean."""
        dirty, positions = self.cache.take_dirty()
        return dirty, positions + self._num_hot
