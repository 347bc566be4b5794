"""Which hot samples to leave out of the coming segment."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from slipstream.embedding.staleness import find_threshold, sample_movement

Criterion = Literal["none", "stale", "random"]


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckRecord:
    """One staleness check, for the trace."""

    step: int
    threshold: float
    """T."""
    stale_rows: int
    """Hot rows that moved less than T in the window."""
    untouched_rows: int
    """Hot rows that were not looked up in the window."""


class Skipper:
    """Decides, segment by segment, which hot samples to drop.

    Nothing is dropped before the first check. `stale` compares each sample's statistic with the threshold;
    `random` drops the same share blindly, as the control.

    Args:
        criterion: Rule.
        target_drop: D.
        alpha: Share of lookups that must be stale.
        threshold: T by hand, or None to take the D-quantile.
        sample_size: Hot samples the quantile is taken from.
    """

    def __init__(
        self,
        *,
        criterion: Criterion,
        target_drop: float,
        alpha: float,
        threshold: float | None,
        sample_size: int,
    ) -> None:
        self.criterion: Criterion = criterion
        self.target_drop = target_drop
        self.checks: list[CheckRecord] = []
        self.classified = 0
        """Hot samples that a rule was applied to."""
        self.dropped = 0
        self._alpha, self._given, self._sample_size = alpha, threshold, sample_size
        self._movement: np.ndarray | None = None
        self._threshold: float | None = None
        self._is_active = False

    @property
    def needs_windows(self) -> bool:
        """Whether the rule watches rows move."""
        return self.criterion == "stale"

    @property
    def threshold(self) -> float | None:
        """T in force, None before the first check and for rules without one."""
        return self.checks[-1].threshold if self.checks else None

    def check(self, *, step: int, movement: np.ndarray | None) -> None:
        """Start a new segment with what a window showed. `movement` has shape (H,) for `stale`."""
        self._is_active = self.criterion != "none"
        if self.criterion == "stale":
            self._movement, self._threshold = movement, self._given
            if self._given is not None:
                self._record(step)
            self._step = step

    def keep(self, slots: np.ndarray, *, rng: np.random.Generator) -> np.ndarray:
        """Which of the coming hot samples to train on. `slots` (n, T) -> bool (n,)."""
        if not self._is_active or not len(slots):
            return np.ones(len(slots), bool)
        if self.criterion == "random":
            keep = np.ones(len(slots), bool)
            before, after = self.classified, self.classified + len(slots)
            count = round(after * self.target_drop) - round(before * self.target_drop)
            keep[rng.choice(len(slots), count, replace=False)] = False
        else:
            assert self._movement is not None
            statistic = sample_movement(self._movement, slots, alpha=self._alpha)
            if self._threshold is None:
                self._threshold = self._find(statistic, rng)
                self._record(self._step)
            keep = ~(statistic < self._threshold)
        self.classified += len(slots)
        self.dropped += int(np.count_nonzero(~keep))
        return keep

    def _find(self, statistic: np.ndarray, rng: np.random.Generator) -> float:
        if len(statistic) > self._sample_size:
            statistic = statistic[rng.choice(len(statistic), self._sample_size, replace=False)]
        return find_threshold(statistic, target_drop=self.target_drop)

    def _record(self, step: int) -> None:
        assert self._movement is not None and self._threshold is not None
        self.checks.append(
            CheckRecord(
                step=step,
                threshold=self._threshold,
                stale_rows=int(np.count_nonzero(self._movement < self._threshold)),
                untouched_rows=int(np.count_nonzero(np.isinf(self._movement))),
            )
        )
