"""Staleness: which hot rows have come to rest, and which samples have nothing left to teach.

Two measures of a row in a window of training:

    net         how far it came between two snapshots of the hot tier: max_j |w2 - w1|. Published. Clicked samples pull
                a row one way and the others the other way, so a row can stand still while each of them still pulls.
    per label   how hard one lookup pulls at it, that is the length of its sample's gradient, as the mean over the
                lookups by clicked samples and that over the others. Nothing cancels, step sizes play no part, and no
                snapshot is needed.

A row that was not looked up moved by nothing, which says nothing: it is untouched, not stale.

By net movement a hot sample is dropped when at least a share α of its lookups are stale, that is when the ⌈α·T⌉-th
smallest movement among its rows is below the threshold, lookups of padding left out; or, where each table is asked by
itself, when that holds in every table. So the threshold for a target drop D is the D-quantile of that statistic:
exact, in one pass, without a search. Per label the statistic is the mean pull of the sample's rows under its own
label, over the share α of them with the least.

Source of net movement: Slipstream (arXiv 2404.04270), whose code searches T by bisection and takes untouched rows for
stale.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

UNTOUCHED = float("inf")
"""Movement of a row that was not looked up: above every threshold."""
PADDING = float("nan")
"""Net movement of a row that stands for no id: it never moves, and its lookups are not counted."""

_PIECE = 16_384
"""Samples whose pulls are looked up at a time."""


def sample_pull(pulls: np.ndarray, slots: np.ndarray, labels: np.ndarray, *, alpha: float) -> np.ndarray:
    """Give the statistic of each hot sample per label: the mean pull of its rows under the sample's own label.

    Args:
        pulls: Of unclicked and of clicked samples at each hot row; 0 where unknown. Shape (2, H), float32.
        slots: Hot samples. Shape (n, T), integer.
        labels: Shape (n,).
        alpha: Share of the sample's known rows that the mean is over, those with the least pull, in (0, 1].

    Returns:
        Mean over the rows that are known; UNTOUCHED where none is. Shape (n,), float32.
    """
    of_both, num_hot = pulls.ravel(), pulls.shape[1]
    starts = np.where(labels > 0.5, num_hot, 0)[:, None]
    statistic = np.empty(len(slots), np.float32)
    for start in range(0, len(slots), _PIECE):
        piece = slice(start, start + _PIECE)
        statistic[piece] = _mean_of_known(of_both[slots[piece] + starts[piece]], alpha)
    return statistic


def _mean_of_known(pulls: np.ndarray, alpha: float) -> np.ndarray:
    """Mean over the share `alpha` of the entries above 0, the least of them. Shape (n, T) to (n,)."""
    num_known = np.count_nonzero(pulls, axis=1)
    if alpha < 1:
        least_first = np.sort(np.where(pulls > 0, pulls, np.inf), axis=1)
        num_known = np.ceil(alpha * num_known - 1e-9).astype(np.intp)
        pulls = np.where(np.arange(pulls.shape[1]) < num_known[:, None], least_first, 0.0)
    means = np.full(len(pulls), UNTOUCHED, np.float32)
    np.divide(pulls.sum(axis=1), num_known, out=means, where=num_known > 0)
    return means


def sample_movement(movement: np.ndarray, slots: np.ndarray, *, alpha: float, tables: Sequence[int] = ()) -> np.ndarray:
    """Give the statistic of each hot sample by net movement: the ⌈α·T⌉-th smallest movement among its rows.

    Args:
        movement: Per hot row; UNTOUCHED where unknown, PADDING where no lookup counts. Shape (H,), float32.
        slots: Hot samples. Shape (n, T), integer.
        alpha: Share of lookups that must be stale, in (0, 1]; of a sample's lookups that are not padding.
        tables: Of each column of `slots`, where each table's lookups are to have that share by themselves; a table
            whose lookups are all padding is not asked. Empty: all lookups are taken together.

    Returns:
        UNTOUCHED where all lookups are padding. Shape (n,), float32. A sample is dropped when it is below the
        threshold.
    """
    if not tables:
        return _movement_of_all(movement[slots], alpha)
    statistic = np.full(len(slots), -np.inf, np.float32)
    for table in set(tables):
        moved = movement[slots[:, np.equal(tables, table)]]
        is_asked = ~np.isnan(moved).all(axis=1)
        np.maximum(statistic, _movement_of_all(moved, alpha), out=statistic, where=is_asked)
    return np.where(np.isneginf(statistic), np.float32(UNTOUCHED), statistic)


def _movement_of_all(moved: np.ndarray, alpha: float) -> np.ndarray:
    """Give the statistic over all lookups of each sample. Shape (n, T) to (n,)."""
    if np.isnan(moved).any():
        return _movement_beside_padding(moved, alpha)
    num_tables = moved.shape[1]
    needed = math.ceil(alpha * num_tables - 1e-9)
    if needed == num_tables:
        return moved.max(axis=1)  # type: ignore[no-any-return]
    return np.partition(moved, needed - 1, axis=1)[:, needed - 1]


def _movement_beside_padding(moved: np.ndarray, alpha: float) -> np.ndarray:
    """Give the same over the lookups of each sample that are not padding. Shape (n, T) to (n,)."""
    num_counted = np.count_nonzero(~np.isnan(moved), axis=1)
    needed = np.maximum(np.ceil(alpha * num_counted - 1e-9).astype(np.intp), 1)
    # padding goes to the end of each sample's list, behind its slowest rows and beside untouched ones
    least_first = np.sort(np.where(np.isnan(moved), np.float32(UNTOUCHED), moved), axis=1)
    return np.take_along_axis(least_first, needed[:, None] - 1, axis=1)[:, 0]


def find_threshold(statistic: np.ndarray, *, target_drop: float) -> float:
    """Give the threshold that drops a share of samples nearest to the target.

    Args:
        statistic: Of a sample of hot inputs. Shape (n,), float32; UNTOUCHED entries cannot be dropped.
        target_drop: D, in [0, 1).

    Returns:
        T: samples whose statistic is below it are dropped. 0 drops none. Ties and untouched rows can keep
        the share from being met; of the shares that can be, the nearest is taken.
    """
    wanted = round(target_drop * len(statistic))
    if wanted == 0:
        return 0.0
    ranked = np.sort(statistic)
    pivot = ranked[wanted - 1]
    below = int(np.searchsorted(ranked, pivot, side="left"))
    up_to = int(np.searchsorted(ranked, pivot, side="right"))
    if np.isinf(pivot):
        return _just_above(ranked[below - 1]) if below else 0.0
    if up_to - wanted <= wanted - below:
        return _just_above(pivot)
    return float(pivot) if below else 0.0


def bisect_threshold(
    statistic: np.ndarray,
    *,
    target_drop: float,
    tolerance: float,
    highest: float = 0.1,
    steps: int = 25,
) -> float:
    """Give the published search: halve [0, highest] until the share below T is within `tolerance` of the target.

    Returns:
        T, or 0, which drops nothing, when no step lands in the band.
    """
    low, high = 0.0, highest
    for _ in range(steps):
        middle = (low + high) / 2
        share = float(np.mean(statistic < middle))
        if abs(share - target_drop) <= tolerance:
            return middle
        low, high = (middle, high) if share < target_drop else (low, middle)
    return 0.0


def _just_above(value: np.float32) -> float:
    return float(np.nextafter(np.float32(value), np.float32(np.inf)))
