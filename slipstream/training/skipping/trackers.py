"""Trackers: what watches the rows of the hot tier over a window of training.

What each of the two measures means, and what is made of it: `staleness.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from slipstream.training.skipping.staleness import PADDING, UNTOUCHED

_NUM_BEYOND = 1024
"""Entries for what lies beyond the hot tier; on a GPU additions to a single one would wait for each other."""


class RowTracker(Protocol):
    """Watches the hot tier over a window."""

    summable: tuple[str, ...]
    """Names of its state that add up over ranks, each of which sees a part of every batch."""

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
        """Say what the window showed of each hot row."""

    def add_up(self, sum_over_ranks: Callable[[Tensor], None]) -> None:
        """Take in what other ranks saw, each in its parts of the batches; when a window closes, on all ranks.

        Args:
            sum_over_ranks: Adds up a tensor of floats over all ranks, in place.
        """

    def state(self) -> dict[str, np.ndarray]:
        """Say what an open window holds, for a checkpoint; nothing when none is open."""

    def restore(self, state: dict[str, np.ndarray]) -> None:
        """Take over what `state` gave."""


class MovementTracker:
    """Net movement between two snapshots.

    Args:
        hot_rows: View of the hot tier. Shape (H, D).
        padding_slots: Rows that stand for no id; None for none. Integer.
    """

    summable: tuple[str, ...] = ("touched",)

    def __init__(self, hot_rows: Tensor, *, padding_slots: np.ndarray | None = None) -> None:
        self._hot_rows, self._padding_slots = hot_rows, padding_slots
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
        """Say what an open window holds, for a checkpoint; nothing when none is open."""
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

    def add_up(self, sum_over_ranks: Callable[[Tensor], None]) -> None:
        """Take in which rows other ranks looked up."""
        touched = self._touched.float()
        sum_over_ranks(touched)
        self._touched.copy_(touched > 0)

    def close_window(self) -> np.ndarray:
        """Movement of each hot row since the window opened: max_j |w2 - w1|.

        UNTOUCHED where not looked up, PADDING where the row stands for no id.

        Returns:
            Shape (H,), float32.
        """
        if self._snapshot is None:
            raise ValueError("expected an open window; call open_window first")
        moved = (self._hot_rows - self._snapshot).abs_().amax(dim=1)
        moved[~self._touched[: len(moved)]] = UNTOUCHED
        self._snapshot = None
        movement: np.ndarray = moved.cpu().numpy()
        if self._padding_slots is not None:
            movement[self._padding_slots] = PADDING
        return movement


class PullTracker:
    """Mean pull of a lookup at each hot row, by the sample's label.

    Args:
        num_hot: H; 16 bytes each.
        device: Of the hot tier.
    """

    summable: tuple[str, ...] = ("pulls",)

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
        """Say what an open window holds, for a checkpoint; nothing when none is open."""
        return {"pulls": self._sums[: self._num_hot].cpu().numpy()} if self._is_open else {}

    def restore(self, state: dict[str, np.ndarray]) -> None:
        """Take over what `state` gave."""
        self._is_open = bool(state)
        if state:
            self._sums[: self._num_hot].copy_(torch.from_numpy(state["pulls"]))

    def observe(self, rows: Tensor, sum_pulls: Callable[[], Tensor]) -> None:
        """Add the pulls of a step."""
        self._sums.index_add_(0, _watched(rows, self._num_hot), sum_pulls())

    def add_up(self, sum_over_ranks: Callable[[Tensor], None]) -> None:
        """Add the pulls that other ranks saw."""
        sum_over_ranks(self._sums)

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


def pulls_of_lookups(gradients: Tensor, labels: Tensor, weights: Tensor | None, *, batch_size: int) -> Tensor:
    """How hard each lookup pulls at its row, by label, in a form that can be summed.

    Args:
        gradients: Of the loss of a batch with regard to each looked-up row, sample by sample. Shape (L, D).
        labels: Shape (B,).
        weights: Of samples in the loss; None is 1. Shape (B,).
        batch_size: What the loss divides by, so that the pull is that of the sample alone.

    Returns:
        Pulls of samples without a click and with one, then how many samples they stand for. Shape (L, 4), float32.
    """
    pulls: Tensor = torch.linalg.vector_norm(gradients, dim=1).view(len(labels), -1) * batch_size
    is_clicked = (labels > 0.5).to(pulls.dtype).unsqueeze(1)
    samples = torch.ones_like(is_clicked) if weights is None else weights.unsqueeze(1)
    summable = pulls.new_empty(*pulls.shape, 4)
    # one column after the other: with the short axis innermost, broadcasting takes three times as long
    for column, of_label in enumerate([1 - is_clicked, is_clicked]):
        torch.mul(pulls, of_label, out=summable[..., column])
        summable[..., 2 + column] = samples * of_label
    return summable.flatten(end_dim=1)
