"""Which samples to leave out of the coming round, and how to weight those that stay.

    stale       hot samples whose rows have come to rest: by the net movement of rows they are dropped (Slipstream), by
                the pull of each label on them they are thinned out, and those that stay count more
    random      the same share, blindly: the control of every claim
    negative    blindly among negatives, the rest of them weighted up: the habit of the industry
    importance  by the error a model would make: large errors stay, small ones stay rarely and count more; the error
                is guessed by a linear scorer that learns beside the model, or asked of the model itself

Nothing is dropped in the first segment.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from slipstream.io.samples import Samples, concat_samples
from slipstream.ops.hot_set import Movement
from slipstream.training.skipping.linear_scorer import LinearScorer
from slipstream.training.skipping.staleness import UNTOUCHED, find_threshold, sample_movement, sample_pull

_MOST_DROP = 0.95
"""Most of a round that `stale` drops to make up for earlier rounds."""

Criterion = Literal["none", "stale", "random", "negative", "importance"]
Scope = Literal["hot", "all"]
Scorer = Callable[[Samples], np.ndarray]
"""Click probabilities of samples. Shape (n,)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SkipRule:
    """The settings of a criterion."""

    criterion: Criterion
    target_drop: float
    """D: share of the classified samples to drop."""
    scope: Scope = "hot"
    """Which samples are classified; `stale` knows hot ones only."""
    movement: Movement = "per-label"
    """What `stale` measures."""
    alpha: float = 1.0
    """Share of lookups that must be stale; per label, of those that the mean is over."""
    threshold: float | None = None
    """T by hand for `stale`; None finds it from D."""
    sample_size: int = 65_536
    """Hot samples the quantile is taken from, by net movement."""
    num_rows: int = 0
    """V, for the linear scorer; 0 asks the model for scores instead."""
    num_dense: int = 0
    """Dense columns, for the linear scorer."""
    floor: float = 0.05
    """Least probability to keep a sample, for `importance` and for `stale` per label."""
    reweight: bool = True
    """Weight kept samples by the inverse of their probability to be kept, where it differs between samples."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckRecord:
    """One staleness check, for the trace."""

    step: int
    threshold: float
    """T."""
    stale_rows: int
    """Hot rows that moved less than T in the window; per label, under every label they were looked up with."""
    untouched_rows: int
    """Hot rows that were not looked up in the window."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Selection:
    """Which samples of a group to train on."""

    keep: np.ndarray
    """Shape (n,), bool."""
    weights: np.ndarray | None = None
    """Weights of the kept samples, None for 1. Shape (number kept,), float32."""

    def apply(self, samples: Samples) -> Samples:
        """The kept samples with their weights."""
        kept = samples if self.keep.all() else samples.take(self.keep)
        if self.weights is None:
            return kept
        return Samples(X_int=kept.X_int, X_cat=kept.X_cat, y=kept.y, weights=self.weights)


class Skipper:
    """Applies a rule, round by round, and keeps its books.

    Args:
        rule: The rule.
        columns: Columns of slots whose rows are watched, for `stale`; None for all.
    """

    def __init__(self, rule: SkipRule, *, columns: np.ndarray | None = None) -> None:
        self.rule, self._columns = rule, columns
        self.checks: list[CheckRecord] = []
        self.classified = 0
        """Samples that the rule was applied to."""
        self.dropped = 0
        self._movement: np.ndarray | None = None
        self._threshold: float | None = None
        self._step = 0
        self._is_active = False
        self._linear: LinearScorer | None = None
        if rule.criterion == "importance" and rule.num_rows:
            self._linear = LinearScorer(rule.num_rows, rule.num_dense)

    @property
    def needs_windows(self) -> bool:
        """Whether the rule watches rows move."""
        return self.rule.criterion == "stale"

    @property
    def _is_net(self) -> bool:
        return self.rule.movement == "net"

    @property
    def threshold(self) -> float | None:
        """T in force, None before the first check and for rules without one."""
        return self.checks[-1].threshold if self.checks else None

    def decides_ahead(self, *, begins_segment: bool) -> bool:
        """Whether the next round can be decided while the one before it trains.

        Args:
            begins_segment: Whether a segment ends between the two.
        """
        if self.needs_windows:
            return not begins_segment
        return self.rule.criterion != "importance" or self._linear is not None

    def start(self) -> None:
        """Drop from now on: the first segment is over. A rule that watches rows starts with its first check."""
        self._is_active = self.rule.criterion != "none"

    def check(self, *, step: int, movement: np.ndarray) -> None:
        """Start a new segment with what a window showed. `movement` has shape (H,), or (2, H) per label."""
        self.start()
        self._step, self._movement, self._threshold = step, movement, self.rule.threshold
        if self._threshold is not None:
            self._record()

    def select(
        self, hot: Samples | None, cold: Samples | None, *, rng: np.random.Generator, score: Scorer
    ) -> tuple[Selection, Selection]:
        """Decide about the hot and the cold samples of a round.

        Args:
            hot: Hot samples, or None.
            cold: Cold samples, or None.
            rng: Draws.
            score: The model's predictions; asked by `importance` without a linear scorer.

        Returns:
            What to keep of the hot and of the cold samples.
        """
        guesses = None if self._linear is None else self._guess(self._linear, hot, cold, rng)
        num_hot, num_cold = (0 if group is None else len(group) for group in (hot, cold))
        everything = Selection(keep=np.ones(num_hot, bool)), Selection(keep=np.ones(num_cold, bool))
        covers_cold = self.rule.scope == "all" and not self.needs_windows
        classified = num_hot + (num_cold if covers_cold else 0)
        if not self._is_active or not classified:
            return everything
        groups = [group for group in (hot, cold if covers_cold else None) if group is not None]
        weights: np.ndarray | None
        if self.needs_windows:
            assert hot is not None
            keep, weights = (~self._is_stale(hot, rng), None) if self._is_net else self._thin_stale(hot, rng)
        elif self.rule.criterion == "random":
            keep, weights = self._draw(np.ones(classified), rng)[0], None
        else:
            keep, weights = self._draw(self._worth(groups, guesses, score), rng)
        self.classified += classified
        self.dropped += int(np.count_nonzero(~keep))
        weights = weights if self.rule.reweight else None
        of_hot = _selection(keep[:num_hot], None if weights is None else weights[:num_hot])
        if not covers_cold:
            return of_hot, everything[1]
        return of_hot, _selection(keep[num_hot:], None if weights is None else weights[num_hot:])

    def _worth(self, groups: Sequence[Samples], guesses: np.ndarray | None, score: Scorer) -> np.ndarray:
        """What the probability to keep a sample is proportional to; infinity keeps it for certain."""
        labels = np.concatenate([group.y for group in groups])
        if self.rule.criterion == "negative":
            return np.where(labels > 0.5, np.inf, 1.0)
        if guesses is None:
            guesses = np.concatenate([score(group) for group in groups])
        return np.asarray(np.abs(guesses[: len(labels)] - labels))

    @staticmethod
    def _guess(linear: LinearScorer, hot: Samples | None, cold: Samples | None, rng: np.random.Generator) -> np.ndarray:
        """What the linear scorer thinks of hot samples, then of cold ones, while it learns from both in one shuffle."""
        groups = [group for group in (hot, cold) if group is not None]
        if not groups:
            return np.empty(0, np.float32)
        both = concat_samples(groups)
        order = rng.permutation(len(both))
        guesses = np.empty(len(both), np.float32)
        guesses[order] = linear.learn(both.take(order))
        return guesses

    def state(self) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """Everything a resumed run needs: plain values, and arrays."""
        plain = {
            "checks": [asdict(check) for check in self.checks],
            "classified": self.classified,
            "dropped": self.dropped,
            "threshold": self._threshold,
            "step": self._step,
            "is_active": self._is_active,
        }
        arrays = {} if self._movement is None else {"movement": self._movement}
        if self._linear is not None:
            arrays |= {f"linear.{name}": value for name, value in self._linear.state().items()}
        return plain, arrays

    def restore(self, plain: dict[str, Any], arrays: dict[str, np.ndarray]) -> None:
        """Take over what `state` gave."""
        self.checks = [CheckRecord(**check) for check in plain["checks"]]
        self.classified, self.dropped = plain["classified"], plain["dropped"]
        self._threshold, self._step = plain["threshold"], plain["step"]
        self._is_active = plain["is_active"]
        self._movement = arrays.get("movement")
        if self._linear is not None:
            self._linear.restore({name: arrays[f"linear.{name}"] for name in self._linear.state()})

    def _is_stale(self, hot: Samples, rng: np.random.Generator) -> np.ndarray:
        """Which samples to drop by net movement."""
        assert self._movement is not None
        statistic = sample_movement(self._movement, self._watched(hot), alpha=self.rule.alpha)
        if self.rule.threshold is not None:
            return statistic < self.rule.threshold
        num_drop = self._num_due(len(hot))
        if self._threshold is None:
            drawn = statistic
            if len(drawn) > self.rule.sample_size:
                drawn = drawn[rng.choice(len(drawn), self.rule.sample_size, replace=False)]
            self._threshold = find_threshold(drawn, target_drop=num_drop / len(hot))
            self._record()
        return _share_ties(statistic, self._threshold, num_drop=num_drop, rng=rng)

    def _thin_stale(self, hot: Samples, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Keep samples with probability pull / T, those from T on for certain, and the inverse probabilities."""
        assert self._movement is not None
        statistic = sample_pull(self._movement, self._watched(hot), hot.y, alpha=self.rule.alpha)
        floor = self.rule.floor
        threshold = self.rule.threshold
        if threshold is None:
            threshold = find_certain_worth(statistic, num_keep=len(hot) - self._num_due(len(hot)), floor=floor)
        if self._threshold is None:
            self._threshold = threshold
            self._record()
        return _draw_by_worth(statistic, threshold, floor=floor, rng=rng)

    def _watched(self, samples: Samples) -> np.ndarray:
        """Slots whose rows are watched."""
        return samples.X_cat if self._columns is None else samples.X_cat[:, self._columns]

    def _num_due(self, num_samples: int) -> int:
        """How many of the coming samples to drop; what untouched rows kept earlier ones from is made up for."""
        due = round(self.rule.target_drop * (self.classified + num_samples)) - self.dropped
        return min(max(due, 0), int(_MOST_DROP * num_samples))

    def _draw(self, worth: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Keep samples with probability ∝ worth, the drop exact over all rounds, and the inverse probabilities."""
        after = self.classified + len(worth)
        num_drop = round(after * self.rule.target_drop) - round(self.classified * self.rule.target_drop)
        floor = self.rule.floor if self.rule.criterion == "importance" else 0.0
        certain = find_certain_worth(worth, num_keep=len(worth) - num_drop, floor=floor)
        return _draw_by_worth(worth, certain, floor=floor, rng=rng)

    def _record(self) -> None:
        assert self._movement is not None and self._threshold is not None
        if self._is_net:
            movement = self._movement
        else:
            largest = np.maximum(*self._movement)
            movement = np.where(largest > 0, largest, UNTOUCHED)
        self.checks.append(
            CheckRecord(
                step=self._step,
                threshold=self._threshold,
                stale_rows=int(np.count_nonzero(movement < self._threshold)),
                untouched_rows=int(np.count_nonzero(np.isinf(movement))),
            )
        )


def _selection(keep: np.ndarray, weights: np.ndarray | None) -> Selection:
    return Selection(keep=keep, weights=None if weights is None else weights[keep])


def _share_ties(statistic: np.ndarray, threshold: float, *, num_drop: int, rng: np.random.Generator) -> np.ndarray:
    """Which samples lie below the threshold; of those exactly at it, a random part, so that the number is met.

    Many samples can share one value: that of the fast row they have in common.
    """
    below = statistic < threshold
    missing = num_drop - int(np.count_nonzero(below))
    edge = np.float32(threshold) if missing > 0 else np.nextafter(np.float32(threshold), np.float32(-np.inf))
    ties = np.flatnonzero(statistic == edge)
    moved = rng.choice(ties, min(abs(missing), len(ties)), replace=False)
    below[moved] = missing > 0
    return below


def find_certain_worth(worth: np.ndarray, *, num_keep: int, floor: float) -> float:
    """The worth from which samples are kept for certain, so that probabilities ∝ worth sum to a number.

    Args:
        worth: At least 0; infinity is kept for certain. Shape (n,).
        num_keep: Expected number kept. If it cannot be reached because too many are certain or the floor is
            too high, the sum comes as near as it can.
        floor: Least probability.

    Returns:
        What `keep_probabilities` takes; 0, which keeps all, where nothing is to be dropped.
    """
    finite = _positive(worth[~np.isinf(worth)])
    num_certain = len(worth) - len(finite)
    if not len(finite) or num_keep >= len(worth):
        return 0.0
    low, high = 0.0, 1.0 / finite.min()
    scale = high
    for _ in range(60):
        scaled = finite * scale
        missing = num_keep - num_certain - np.clip(scaled, floor, 1.0).sum()
        if abs(missing) <= 1e-12 * len(worth):
            return float(1.0 / scale)
        low, high = (scale, high) if missing > 0 else (low, scale)
        # only what lies between the limits grows with the scale: go where that makes up the sum, or else halfway
        growing = scaled[(scaled > floor) & (scaled < 1.0)].sum()
        aimed = scale * (1.0 + missing / growing) if growing else low
        scale = aimed if low < aimed < high else (low + high) / 2
    return float(1.0 / high)


def keep_probabilities(worth: np.ndarray, certain_worth: float, *, floor: float) -> np.ndarray:
    """Probabilities ∝ worth, between `floor` and 1.

    Args:
        worth: At least 0. Shape (n,).
        certain_worth: From here on samples are kept for certain; 0 keeps all.
        floor: Least probability.

    Returns:
        Shape (n,), float64.
    """
    if not certain_worth:
        return np.ones(len(worth))
    return np.clip(_positive(worth) / certain_worth, floor, 1.0)


def _positive(worth: np.ndarray) -> np.ndarray:
    return np.maximum(np.asarray(worth, np.float64), 1e-12)


def _draw_by_worth(
    worth: np.ndarray, certain_worth: float, *, floor: float, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Which samples to keep, and the inverse of the probability with which each is kept."""
    probabilities = keep_probabilities(worth, certain_worth, floor=floor)
    keep = draw_systematically(probabilities, rng)
    return keep, (1.0 / np.maximum(probabilities, 1e-12)).astype(np.float32)


def draw_systematically(probabilities: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Draw with the given inclusion probabilities so that the number drawn is their sum, give or take one.

    Source: systematic sampling (Madow, 1949), over a random order so that no two samples are tied together.

    Returns:
        Shape (n,), bool.
    """
    order = rng.permutation(len(probabilities))
    marks = np.floor(np.cumsum(probabilities[order]) + rng.random())
    drawn = np.zeros(len(probabilities), bool)
    drawn[order] = np.diff(marks, prepend=0.0) >= 1
    drawn[order[0]] = marks[0] >= 1
    return drawn
