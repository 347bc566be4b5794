"""Hot samples that hardly pull at their rows any more, or whose rows have come to rest.

By the net movement of rows they are dropped (Slipstream); by the pull of each label on them they are thinned out, and
those that stay count more. See `staleness.py`.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from slipstream.training.skipping.criterion import Candidates, Choice, Criterion, Finding, SkipRule
from slipstream.training.skipping.drawing import draw_by_certain_worth, find_certain_worth, share_ties
from slipstream.training.skipping.staleness import UNTOUCHED, find_threshold, sample_movement, sample_pull

if TYPE_CHECKING:
    from torch import Tensor

    from slipstream.io.samples import Samples
    from slipstream.training.skipping.trackers import RowTracker

MOST_DROP = 0.95
"""Most of a round that is dropped to make up for earlier rounds."""


class Stale(Criterion):
    """What both ways to see rows move have in common: windows, and a threshold for each."""

    scopes = ("hot",)
    is_published = True
    watches_rows = True

    def __init__(self, rule: SkipRule) -> None:
        super().__init__(rule)
        self._movement: np.ndarray | None = None
        self._threshold: float | None = None

    @classmethod
    def of(cls, rule: SkipRule) -> Criterion:
        """Make the one that measures what `skip.movement` says."""
        return NetStale(rule) if rule.movement == "net" else PulledStale(rule)

    def watch(self, shown: np.ndarray) -> Finding | None:
        """Go by what a window showed; a threshold given by hand needs no samples."""
        self._movement, self._threshold = shown, self.rule.threshold
        return None if self._threshold is None else self._finding()

    def choose(self, candidates: Candidates, *, rng: np.random.Generator) -> Choice:
        """Decide about hot samples by the window; the first after it set its threshold."""
        (hot,) = candidates.groups
        due = candidates.num_due(self.rule.target_drop)
        is_new = self._threshold is None
        keep, weights = self._decide(hot, candidates.watched_slots(), min(max(due, 0), int(MOST_DROP * len(hot))), rng)
        return Choice(keep=keep, weights=weights, finding=self._finding() if is_new else None)

    @abstractmethod
    def _decide(
        self, hot: Samples, slots: np.ndarray, num_drop: int, rng: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """Say which hot samples stay, and with what weights; sets the threshold where there is none."""

    @abstractmethod
    def _most_moved(self) -> np.ndarray:
        """Movement of each hot row as it is compared with the threshold. Shape (H,)."""

    def _finding(self) -> Finding:
        assert self._threshold is not None
        movement = self._most_moved()
        return Finding(
            threshold=self._threshold,
            stale_rows=int(np.count_nonzero(movement < self._threshold)),
            untouched_rows=int(np.count_nonzero(np.isinf(movement))),
        )

    def state(self) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """Give what the last window showed, and its threshold."""
        return {"threshold": self._threshold}, {} if self._movement is None else {"movement": self._movement}

    def restore(self, plain: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> None:
        """Take over what `state` gave."""
        self._threshold, self._movement = plain["threshold"], arrays.get("movement")


class NetStale(Stale):
    """By net movement: a hot sample is dropped when the share α of its lookups are stale."""

    def tracker_bytes(self, *, embedding_dim: int) -> int:
        """Count a snapshot of the row, and one byte that says whether it was looked up."""
        return embedding_dim * 4 + 1

    def make_tracker(self, hot_rows: Tensor, *, padding_slots: np.ndarray | None = None) -> RowTracker:
        """Make what takes the snapshots."""
        from slipstream.training.skipping.trackers import MovementTracker

        return MovementTracker(hot_rows, padding_slots=padding_slots)

    def _decide(
        self, hot: Samples, slots: np.ndarray, num_drop: int, rng: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray | None]:
        assert self._movement is not None
        statistic = sample_movement(self._movement, slots, alpha=self.rule.alpha, tables=self.rule.alpha_tables)
        if self.rule.threshold is not None:
            return statistic >= self.rule.threshold, None
        if self._threshold is None:
            drawn = statistic
            if len(drawn) > self.rule.sample_size:
                drawn = drawn[rng.choice(len(drawn), self.rule.sample_size, replace=False)]
            self._threshold = find_threshold(drawn, target_drop=num_drop / len(hot))
        return ~share_ties(statistic, self._threshold, num_drop=num_drop, rng=rng), None

    def _most_moved(self) -> np.ndarray:
        assert self._movement is not None
        return self._movement


class PulledStale(Stale):
    """Per label: a hot sample stays with probability pull / T, from T on for certain."""

    def tracker_bytes(self, *, embedding_dim: int) -> int:
        """Count two sums and two counts, one of each per label."""
        return 16

    def make_tracker(self, hot_rows: Tensor, *, padding_slots: np.ndarray | None = None) -> RowTracker:
        """Make what sums the pulls; no lookup pulls at padding, so that nothing is known of it."""
        from slipstream.training.skipping.trackers import PullTracker

        return PullTracker(len(hot_rows), device=hot_rows.device)

    def _decide(
        self, hot: Samples, slots: np.ndarray, num_drop: int, rng: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray | None]:
        assert self._movement is not None
        statistic = sample_pull(self._movement, slots, hot.y, alpha=self.rule.alpha)
        floor, threshold = self.rule.floor, self.rule.threshold
        if threshold is None:
            threshold = find_certain_worth(statistic, num_keep=len(hot) - num_drop, floor=floor)
        if self._threshold is None:
            self._threshold = threshold
        return draw_by_certain_worth(statistic, threshold, floor=floor, rng=rng)

    def _most_moved(self) -> np.ndarray:
        assert self._movement is not None
        largest = np.maximum(*self._movement)
        return np.where(largest > 0, largest, UNTOUCHED)
