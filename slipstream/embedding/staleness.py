"""Staleness: which hot rows stopped moving, and which samples have nothing left to teach.

A row is stale when no coordinate moved by T or more between two snapshots of the hot tier. A row that was not
looked up in between moved by nothing, which says nothing: it is untouched, not stale. A hot sample is dropped
when at least a share α of its lookups are stale, that is when the ⌈α·T⌉-th smallest movement among its rows
is below the threshold. So the threshold for a target drop D is the D-quantile of that statistic: exact, in one
pass, without a search.

Source: Slipstream (arXiv 2404.04270), whose code searches T by bisection and takes untouched rows for stale.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

UNTOUCHED = float("inf")
"""Movement of a row that was not looked up: above every threshold."""


class MovementTracker:
    """Watches the hot tier between two snapshots.

    Args:
        hot_rows: View of the hot tier. Shape (H, D).
    """

    def __init__(self, hot_rows: Tensor) -> None:
        self._hot_rows = hot_rows
        self._snapshot: Tensor | None = None
        # one more than there are rows: positions beyond the hot tier all end there, and nobody has to be waited for
        self._touched = torch.zeros(len(hot_rows) + 1, dtype=torch.bool, device=hot_rows.device)

    @property
    def is_open(self) -> bool:
        """Whether a window is open."""
        return self._snapshot is not None

    def open_window(self) -> None:
        """Take the first snapshot and forget who was touched."""
        self._snapshot = self._hot_rows.clone()
        self._touched.zero_()

    def state(self) -> dict[str, np.ndarray]:
        """What an open window holds, for a checkpoint; nothing when none is open."""
        if self._snapshot is None:
            return {}
        return {"snapshot": self._snapshot.cpu().numpy(), "touched": self._touched[:-1].cpu().numpy()}

    def restore(self, state: dict[str, np.ndarray]) -> None:
        """Take over what `state` gave."""
        self._snapshot = None
        if state:
            device = self._hot_rows.device
            self._snapshot = torch.from_numpy(state["snapshot"]).to(device)
            self._touched[:-1] = torch.from_numpy(state["touched"]).to(device)

    def touch(self, positions: Tensor) -> None:
        """Note the lookups of a step; positions beyond the hot tier are left out. Shape (n,), integer."""
        if self._snapshot is not None:
            self._touched.index_fill_(0, positions.clamp(max=len(self._hot_rows)).long(), True)

    def close_window(self) -> np.ndarray:
        """Movement of each hot row since the window opened: max_j |w2 - w1|; UNTOUCHED where not looked up.

        Returns:
            Shape (H,), float32.
        """
        if self._snapshot is None:
            raise ValueError("expected an open window; call open_window first")
        moved = (self._hot_rows - self._snapshot).abs_().amax(dim=1)
        moved[~self._touched[:-1]] = UNTOUCHED
        self._snapshot = None
        return moved.cpu().numpy()


def sample_movement(movement: np.ndarray, slots: np.ndarray, *, alpha: float) -> np.ndarray:
    """The statistic of each hot sample: the ⌈α·T⌉-th smallest movement among its rows.

    Args:
        movement: Per hot row; UNTOUCHED where unknown. Shape (H,), float32.
        slots: Hot samples. Shape (n, T), integer.
        alpha: Share of lookups that must be stale, in (0, 1].

    Returns:
        Shape (n,), float32. A sample is dropped when it is below the threshold.
    """
    num_tables = slots.shape[1]
    needed = math.ceil(alpha * num_tables - 1e-9)
    moved = movement[slots]
    if needed == num_tables:
        return moved.max(axis=1)  # type: ignore[no-any-return]
    return np.partition(moved, needed - 1, axis=1)[:, needed - 1]


def find_threshold(statistic: np.ndarray, *, target_drop: float) -> float:
    """The threshold that drops a share of samples nearest to the target.

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
    """The published search: halve [0, highest] until the share below T is within `tolerance` of the target.

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
