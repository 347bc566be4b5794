"""Staleness: which hot rows have come to rest, and which samples have nothing left to teach.

Two measures of a row in a window of training:

    net         how far it came between two snapshots of the hot tier: max_j |w2 - w1|. Published. Clicked samples pull
                a row one way and the others the other way, so a row can stand still while each of them still pulls.
    per label   how hard one lookup pulls at it, that is the length of its sample's gradient, as the mean over the
                lookups by clicked samples and that over the others. Nothing cancels, step sizes play no part, and no
                snapshot is needed.

A row that was not looked up moved by nothing, which says nothing: it is untouched, not stale.

By net movement a hot sample is dropped when at least a share α of its lookups are stale, that is when the ⌈α·T⌉-th
smallest movement among its rows is below the threshold. So the threshold for a target drop D is the D-quantile of that
statistic: exact, in one pass, without a search. Per label the statistic is the mean pull of the sample's rows under its
own label, over the share α of them with the least.

Source of net movement: Slipstream (arXiv 2404.04270), whose code searches T by bisection and takes untouched rows for
stale.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from slipstream.ops.hot_set import Movement

UNTOUCHED = float("inf")
"""Movement of a row that was not looked up: above every threshold."""

_NUM_BEYOND = 1024
"""Entries for what lies beyond the hot tier; on a GPU additions to a single one would wait for each other."""

_PIECE = 16_384
"""Samples whose pulls are looked up at a time."""


class RowTracker(Protocol):
    """Watches the hot tier over a window."""

    @property
    def is_open(self) -> bool:
        """Whether a window is open."""

    def open_window(self) -> None:
        """Forget what came before."""

    def observe(self, rows: Tensor, sum_pulls: Callable[[], Tensor]) -> None:
        """Note a step of an open window; the step may be part of a captured graph.

        Args:
            rows: Distinct positions looked up; those beyond the hot tier are left out. Shape (U,), int64.
            sum_pulls: Gives `pulls_of_lookups` summed by row. Shape (U, 4).
        """

    def close_window(self) -> np.ndarray:
        """What the window showed of each hot row."""

    def state(self) -> dict[str, np.ndarray]:
        """What an open window holds, for a checkpoint; nothing when none is open."""

    def restore(self, state: dict[str, np.ndarray]) -> None:
        """Take over what `state` gave."""


def make_tracker(movement: Movement, hot_rows: Tensor) -> RowTracker:
    """What measures the movement of the hot tier. `hot_rows` is a view of it, shape (H, D)."""
    return MovementTracker(hot_rows) if movement == "net" else PullTracker(len(hot_rows), device=hot_rows.device)


class MovementTracker:
    """Net movement between two snapshots.

    Args:
        hot_rows: View of the hot tier. Shape (H, D).
    """

    def __init__(self, hot_rows: Tensor) -> None:
        self._hot_rows = hot_rows
        self._snapshot: Tensor | None = None
        # more than there are rows: positions beyond the hot tier end there, and nobody has to be waited for
        self._touched = torch.zeros(len(hot_rows) + _NUM_BEYOND, dtype=torch.bool, device=hot_rows.device)

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
        touched = self._touched[: len(self._hot_rows)]
        return {"snapshot": self._snapshot.cpu().numpy(), "touched": touched.cpu().numpy()}

    def restore(self, state: dict[str, np.ndarray]) -> None:
        """Take over what `state` gave."""
        self._snapshot = None
        if state:
            device = self._hot_rows.device
            self._snapshot = torch.from_numpy(state["snapshot"]).to(device)
            self._touched[: len(self._hot_rows)] = torch.from_numpy(state["touched"]).to(device)

    def observe(self, rows: Tensor, sum_pulls: Callable[[], Tensor]) -> None:
        """Note which rows a step looked up."""
        self._touched.index_fill_(0, _watched(rows, len(self._hot_rows)), True)

    def close_window(self) -> np.ndarray:
        """Movement of each hot row since the window opened: max_j |w2 - w1|; UNTOUCHED where not looked up.

        Returns:
            Shape (H,), float32.
        """
        if self._snapshot is None:
            raise ValueError("expected an open window; call open_window first")
        moved = (self._hot_rows - self._snapshot).abs_().amax(dim=1)
        moved[~self._touched[: len(moved)]] = UNTOUCHED
        self._snapshot = None
        return moved.cpu().numpy()


class PullTracker:
    """Mean pull of a lookup at each hot row, by the sample's label.

    Args:
        num_hot: H; 16 bytes each.
        device: Of the hot tier.
    """

    def __init__(self, num_hot: int, *, device: torch.device) -> None:
        # the last entries take what lies beyond the hot tier; its place in memory must not change, graphs add to it
        self._num_hot = num_hot
        self._sums = torch.zeros(num_hot + _NUM_BEYOND, 4, device=device)
        self._is_open = False

    @property
    def is_open(self) -> bool:
        """Whether a window is open."""
        return self._is_open

    def open_window(self) -> None:
        """Forget what came before."""
        self._sums.zero_()
        self._is_open = True

    def state(self) -> dict[str, np.ndarray]:
        """What an open window holds, for a checkpoint; nothing when none is open."""
        return {"pulls": self._sums[: self._num_hot].cpu().numpy()} if self._is_open else {}

    def restore(self, state: dict[str, np.ndarray]) -> None:
        """Take over what `state` gave."""
        self._is_open = bool(state)
        if state:
            self._sums[: self._num_hot].copy_(torch.from_numpy(state["pulls"]))

    def observe(self, rows: Tensor, sum_pulls: Callable[[], Tensor]) -> None:
        """Add the pulls of a step."""
        self._sums.index_add_(0, _watched(rows, self._num_hot), sum_pulls())

    def close_window(self) -> np.ndarray:
        """Mean pull of a lookup by samples that were not clicked, and by those that were; 0 where there was none.

        Returns:
            Shape (2, H), float32.
        """
        if not self._is_open:
            raise ValueError("expected an open window; call open_window first")
        self._is_open = False
        pulls, samples = self._sums[: self._num_hot].T.reshape(2, 2, -1)
        means: np.ndarray = (pulls / samples.clamp(min=torch.finfo(torch.float32).tiny)).cpu().numpy()
        return means


def _watched(positions: Tensor, num_hot: int) -> Tensor:
    """Where each position is counted: its own place in the hot tier, and one of the entries after it beyond."""
    return torch.where(positions < num_hot, positions, positions.remainder(_NUM_BEYOND).add_(num_hot))


def pulls_of_lookups(gradients: Tensor, labels: Tensor, weights: Tensor | None) -> Tensor:
    """How hard each lookup pulls at its row, by label, in a form that can be summed.

    Args:
        gradients: Of the mean loss of a batch with regard to each looked-up row, sample by sample. Shape (L, D).
        labels: Shape (B,).
        weights: Of samples in the loss; None is 1. Shape (B,).

    Returns:
        Pulls of samples without a click and with one, then how many samples they stand for. Shape (L, 4), float32.
    """
    pulls: Tensor = torch.linalg.vector_norm(gradients, dim=1).view(len(labels), -1) * len(labels)
    is_clicked = (labels > 0.5).to(pulls.dtype).unsqueeze(1)
    samples = torch.ones_like(is_clicked) if weights is None else weights.unsqueeze(1)
    summable = pulls.new_empty(*pulls.shape, 4)
    # one column after the other: with the short axis innermost, broadcasting takes three times as long
    for column, of_label in enumerate([1 - is_clicked, is_clicked]):
        torch.mul(pulls, of_label, out=summable[..., column])
        summable[..., 2 + column] = samples * of_label
    return summable.flatten(end_dim=1)


def sample_pull(pulls: np.ndarray, slots: np.ndarray, labels: np.ndarray, *, alpha: float) -> np.ndarray:
    """The statistic of each hot sample per label: the mean pull of its rows under the sample's own label.

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


def sample_movement(movement: np.ndarray, slots: np.ndarray, *, alpha: float) -> np.ndarray:
    """The statistic of each hot sample by net movement: the ⌈α·T⌉-th smallest movement among its rows.

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
