"""Which rows are hot.

Rows of all tables are numbered as one list here, `global row` = rows of the tables before + row, because one
budget serves all tables. The OOV row of every table is always hot, and so is a row that stands for padding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

_SCORED_AT_ONCE = 16_384
"""Samples whose weights are in memory together."""


@dataclass(frozen=True, kw_only=True, slots=True)
class HotSet:
    """A choice of hot rows, and how it was limited."""

    is_hot: np.ndarray
    """Whether each global row is hot. Shape (V,), bool."""
    access_threshold: int
    """Λ: the access count of the least used hot row, OOV and padding aside; 0 when there is none."""

    @property
    def num_hot(self) -> int:
        """H."""
        return int(np.count_nonzero(self.is_hot))


@dataclass(frozen=True, kw_only=True, slots=True)
class CurvePoint:
    """What one budget buys."""

    row_share: float
    """Hot rows over all rows, as asked."""
    hot_rows: int
    access_threshold: int
    """Λ at this budget."""
    hit_ratio: float
    """Lookups that find a hot row."""
    hot_sample_share: float
    """Samples whose every lookup finds a hot row."""


def table_offsets(rows_per_table: Sequence[int]) -> np.ndarray:
    """Global row of each table's row 0, and V at the end. Shape (T + 1,), int64."""
    return np.concatenate([[0], np.cumsum(rows_per_table)]).astype(np.int64)


def rank_rows(counts: np.ndarray, always_hot: np.ndarray, scores: np.ndarray | None = None) -> np.ndarray:
    """Order global rows from the hottest on: those that are always hot, then by score, then count, then table and row.

    Args:
        counts: Accesses per global row. Shape (V,), integer, >= 0.
        always_hot: Global rows that are hot whatever they count: those of OOV and padding. Shape (A,).
        scores: What to rank by instead of counts. Shape (V,), float.

    Returns:
        Global rows, hottest first. Shape (V,), int64.

    Raises:
        ValueError: A count is negative.

    Source: FAE ranks all tables in one list by count; the tie rule is ours, so the answer does not depend on
        the sort algorithm.
    """
    if counts.size and int(counts.min()) < 0:
        raise ValueError(f"expected counts of at least 0, found {int(counts.min())}")
    keys = counts.astype(np.float64) if scores is None else scores.copy()
    keys[always_hot] = np.inf
    order = np.argsort(-counts, kind="stable") if scores is not None else np.arange(len(counts))
    return order[np.argsort(-keys[order], kind="stable")]


def take_hot_rows(ranked: np.ndarray, counts: np.ndarray, *, num_rows: int, num_always: int) -> HotSet:
    """Make the first `num_rows` of a ranking hot; rows never accessed stay cold even if they fit.

    Args:
        ranked: Global rows, hottest first, those that are always hot leading. Shape (V,).
        counts: Accesses per global row. Shape (V,).
        num_rows: H asked for, at least `num_always`.
        num_always: A, how many are always hot.

    Raises:
        ValueError: `num_rows` is below `num_always` or above V.
    """
    if not num_always <= num_rows <= len(ranked):
        raise ValueError(f"expected {num_always} to {len(ranked)} hot rows, found {num_rows}")
    chosen = ranked[:num_rows]
    others = chosen[num_always:][counts[chosen[num_always:]] > 0]
    is_hot = np.zeros(len(ranked), bool)
    is_hot[ranked[:num_always]] = True
    is_hot[others] = True
    threshold = int(counts[others].min()) if others.size else 0
    return HotSet(is_hot=is_hot, access_threshold=threshold)


def take_all_rows(counts: np.ndarray, always_hot: np.ndarray) -> HotSet:
    """Make every row hot, those never accessed too."""
    others = np.delete(counts, always_hot)
    return HotSet(is_hot=np.ones(len(counts), bool), access_threshold=int(others.min()) if others.size else 0)


def take_above_threshold(counts: np.ndarray, always_hot: np.ndarray, *, access_threshold: int) -> HotSet:
    """Make every row counted at least Λ times hot, and those that always are."""
    is_hot = counts >= max(access_threshold, 1)
    is_hot[always_hot] = True
    return HotSet(is_hot=is_hot, access_threshold=access_threshold)


def choose_hot_rows(
    policy: str,
    counts: np.ndarray,
    always_hot: np.ndarray,
    samples: Callable[[], Iterable[np.ndarray]],
    *,
    num_rows: int,
    power: float,
    rounds: int,
) -> HotSet:
    """Choose the hot rows by a policy; where all rows fit, all are hot.

    Args:
        policy: `frequency` or `sample-aware`.
        counts: Accesses per global row. Shape (V,), integer.
        always_hot: Global rows that are hot whatever they count: those of OOV and padding. Shape (A,).
        samples: For `sample-aware`, as `select_sample_aware` takes them; not called for `frequency`.
        num_rows: H asked for, from A to V.
        power: For `sample-aware`.
        rounds: For `sample-aware`.
    """
    if num_rows == len(counts):
        return take_all_rows(counts, always_hot)
    if policy == "frequency":
        return take_hot_rows(rank_rows(counts, always_hot), counts, num_rows=num_rows, num_always=len(always_hot))
    return select_sample_aware(counts, always_hot, samples, num_rows=num_rows, power=power, rounds=rounds)


def select_sample_aware(
    counts: np.ndarray,
    always_hot: np.ndarray,
    samples: Callable[[], Iterable[np.ndarray]],
    *,
    num_rows: int,
    power: float,
    rounds: int,
) -> HotSet:
    """Prefer rows whose companions are hot too, so that more samples are hot under the same budget.

    A row scores the sum over its samples of (1 + c)^-power, where c counts the sample's other lookups that
    are cold now. Scores and hot set are refined in turn; the set with the most hot samples is kept, so the
    result is never worse on these samples than ranking by count.

    Args:
        counts: Accesses per global row. Shape (V,), integer.
        always_hot: Global rows that are hot whatever they count: those of OOV and padding. Shape (A,).
        samples: Called once a round; yields blocks of global rows, each of shape (n, T).
        num_rows: H.
        power: How fast a sample loses weight with its cold lookups, > 0.
        rounds: Passes over the samples, >= 1.
    """
    num_always = len(always_hot)
    scores: np.ndarray | None = None
    best: tuple[int, HotSet] | None = None
    for last in (*([False] * rounds), True):
        ranked = rank_rows(counts, always_hot, scores)
        candidate = take_hot_rows(ranked, counts, num_rows=num_rows, num_always=num_always)
        scores = np.zeros(len(counts))
        num_hot_samples = 0
        for block in samples():
            is_cold = ~candidate.is_hot[block]
            cold_lookups = is_cold.sum(axis=1, dtype=np.int32)
            num_hot_samples += int(np.count_nonzero(cold_lookups == 0))
            if not last:
                for start in range(0, len(block), _SCORED_AT_ONCE):
                    piece = slice(start, start + _SCORED_AT_ONCE)
                    _add_scores(scores, block[piece], is_cold[piece], cold_lookups[piece], power)
        if best is None or num_hot_samples > best[0]:
            best = (num_hot_samples, candidate)
    assert best is not None
    return best[1]


def _add_scores(
    scores: np.ndarray, block: np.ndarray, is_cold: np.ndarray, cold_lookups: np.ndarray, power: float
) -> None:
    worth = (1.0 + np.arange(block.shape[1] + 1)) ** -power
    # a cold row does not count itself among the cold companions
    weights = np.where(is_cold, worth[cold_lookups - 1][:, None], worth[cold_lookups][:, None])
    # as fast as bincount, which would make an array of all rows for every block; and added one by one, in order, the
    # sums do not depend on how samples were cut into blocks
    np.add.at(scores, block.ravel(), weights.ravel())


def assign_slots(is_hot: np.ndarray) -> np.ndarray:
    """Slot of each global row: hot rows first, then cold rows, each in table then row order.

    Returns:
        Shape (V,), int32 while V < 2^31, int64 beyond.
    """
    dtype = np.int32 if len(is_hot) < 2**31 else np.int64
    slots = np.empty(len(is_hot), dtype)
    num_hot = int(np.count_nonzero(is_hot))
    slots[is_hot] = np.arange(num_hot, dtype=dtype)
    slots[~is_hot] = np.arange(num_hot, len(is_hot), dtype=dtype)
    return slots


def measure_hot_set(
    hot_set: HotSet, blocks: Iterable[np.ndarray], *, row_share: float, padding_rows: np.ndarray | None = None
) -> CurvePoint:
    """Measure hit ratio and hot-sample share of a hot set.

    Args:
        hot_set: The hot rows.
        blocks: Global rows of samples. Each of shape (n, T).
        row_share: What the set was asked to be.
        padding_rows: Global rows that stand for padding, all of them hot: no lookups. None for none.
    """
    num_samples = hits = lookups = num_hot_samples = 0
    is_padding = None
    if padding_rows is not None and len(padding_rows):
        is_padding = np.zeros(len(hot_set.is_hot), bool)
        is_padding[padding_rows] = True
    for block in blocks:
        found = hot_set.is_hot[block]
        num_padding = 0 if is_padding is None else int(np.count_nonzero(is_padding[block]))
        num_samples += len(block)
        lookups += block.size - num_padding
        hits += int(np.count_nonzero(found)) - num_padding
        num_hot_samples += int(np.count_nonzero(found.all(axis=1)))
    return CurvePoint(
        row_share=row_share,
        hot_rows=hot_set.num_hot,
        access_threshold=hot_set.access_threshold,
        hit_ratio=hits / max(lookups, 1),
        hot_sample_share=num_hot_samples / max(num_samples, 1),
    )
