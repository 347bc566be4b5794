"""Which samples to leave out of the coming round, and how to weight those that stay.

    stale       hot samples whose rows stopped moving (Slipstream)
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

from slipstream.embedding.staleness import find_threshold, sample_movement
from slipstream.io.samples import Samples, concat_samples
from slipstream.training.linear_scorer import LinearScorer

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
    alpha: float = 1.0
    """Share of lookups that must be stale, for `stale`."""
    threshold: float | None = None
    """T by hand for `stale`; None takes the D-quantile."""
    sample_size: int = 65_536
    """Hot samples the quantile is taken from."""
    num_rows: int = 0
    """V, for the linear scorer; 0 asks the model for scores instead."""
    num_dense: int = 0
    """Dense columns, for the linear scorer."""
    floor: float = 0.05
    """Least probability to keep a sample, for `importance`."""
    reweight: bool = True
    """Weight kept samples by the inverse of their probability to be kept, for `negative` and `importance`."""


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
        """Start a new segment with what a window showed. `movement` has shape (H,)."""
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
        if self.needs_windows:
            assert hot is not None
            keep, weights = ~self._is_stale(hot.X_cat, rng), None
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

    def _is_stale(self, slots: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        assert self._movement is not None
        slots = slots if self._columns is None else slots[:, self._columns]
        statistic = sample_movement(self._movement, slots, alpha=self.rule.alpha)
        if self.rule.threshold is not None:
            return statistic < self.rule.threshold
        # what untouched rows kept earlier rounds from dropping is made up for where it can be
        due = self.rule.target_drop * (self.classified + len(slots)) - self.dropped
        target = min(max(due / len(slots), 0.0), _MOST_DROP)
        if self._threshold is None:
            drawn = statistic
            if len(drawn) > self.rule.sample_size:
                drawn = drawn[rng.choice(len(drawn), self.rule.sample_size, replace=False)]
            self._threshold = find_threshold(drawn, target_drop=target)
            self._record()
        return _share_ties(statistic, self._threshold, num_drop=round(target * len(slots)), rng=rng)

    def _draw(self, worth: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Keep samples with probability ∝ worth, the drop exact over all rounds, and the inverse probabilities."""
        after = self.classified + len(worth)
        num_drop = round(after * self.rule.target_drop) - round(self.classified * self.rule.target_drop)
        floor = self.rule.floor if self.rule.criterion == "importance" else 0.0
        probabilities = keep_probabilities(worth, num_keep=len(worth) - num_drop, floor=floor)
        keep = draw_systematically(probabilities, rng)
        return keep, (1.0 / np.maximum(probabilities, 1e-12)).astype(np.float32)

    def _record(self) -> None:
        assert self._movement is not None and self._threshold is not None
        self.checks.append(
            CheckRecord(
                step=self._step,
                threshold=self._threshold,
                stale_rows=int(np.count_nonzero(self._movement < self._threshold)),
                untouched_rows=int(np.count_nonzero(np.isinf(self._movement))),
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


def keep_probabilities(worth: np.ndarray, *, num_keep: int, floor: float) -> np.ndarray:
    """Probabilities ∝ worth, between `floor` and 1, that sum to `num_keep`.

    Args:
        worth: At least 0; infinity is kept for certain. Shape (n,).
        num_keep: Expected number kept. If it cannot be reached because too many are certain or the floor is
            too high, the sum comes as near as it can.
        floor: Least probability.

    Returns:
        Shape (n,), float64.
    """
    worth = np.maximum(np.asarray(worth, np.float64), 1e-12)
    certain = np.isinf(worth)
    probabilities = np.ones(len(worth))
    finite = worth[~certain]
    low, high = 0.0, 1.0 / finite.min() if len(finite) else 0.0
    for _ in range(60):
        scale = (low + high) / 2
        total = certain.sum() + np.clip(finite * scale, floor, 1.0).sum()
        low, high = (scale, high) if total < num_keep else (low, scale)
    probabilities[~certain] = np.clip(finite * high, floor, 1.0)
    return probabilities


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
