"""Which samples to leave out of the coming round: asks the criterion, round by round, and keeps its books.

Nothing is dropped in the first segment. What each criterion goes by stands in `criteria/`.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from slipstream.io.samples import Samples
from slipstream.training.skipping.criterion import Candidates, Finding, Scorer, SkipRule
from slipstream.training.skipping.registry import make_criterion


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckRecord(Finding):
    """One staleness check, for the trace."""

    step: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Selection:
    """Which samples of a group to train on."""

    keep: np.ndarray
    """Shape (n,), bool."""
    weights: np.ndarray | None = None
    """Weights of the kept samples, None for 1. Shape (number kept,), float32."""

    def apply(self, samples: Samples) -> Samples:
        """Give the kept samples with their weights."""
        kept = samples if self.keep.all() else samples.take(self.keep)
        if self.weights is None:
            return kept
        return kept.weighted(self.weights)


class Skipper:
    """Applies a criterion, round by round, and keeps its books.

    Args:
        rule: The criterion's name and settings.
        columns: Columns of slots whose rows are watched; None for all.
    """

    def __init__(self, rule: SkipRule, *, columns: np.ndarray | None = None) -> None:
        self.rule, self._columns = rule, columns
        self.criterion = make_criterion(rule)
        self.checks: list[CheckRecord] = []
        self.classified = 0
        """Samples that the criterion was applied to."""
        self.dropped = 0
        self._step = 0
        self._is_active = False

    @property
    def threshold(self) -> float | None:
        """T in force, None before the first check and for criteria without one."""
        return self.checks[-1].threshold if self.checks else None

    def decides_ahead(self, *, begins_segment: bool) -> bool:
        """Whether the next round can be decided while the one before it trains.

        Args:
            begins_segment: Whether a segment ends between the two.
        """
        if self.criterion.watches_rows and begins_segment:
            return False
        return self.criterion.decides_alone

    def start(self) -> None:
        """Drop from now on: the first segment is over. What watches rows starts with its first check."""
        self._is_active = self.criterion.drops

    def check(self, *, step: int, movement: np.ndarray) -> None:
        """Start a new segment with what a window showed. `movement` has shape (H,), or (2, H) per label."""
        self.start()
        self._step = step
        self._note(self.criterion.watch(movement))

    def select(
        self, hot: Samples | None, cold: Samples | None, *, rng: np.random.Generator, score: Scorer
    ) -> tuple[Selection, Selection]:
        """Decide about the hot and the cold samples of a round.

        Args:
            hot: Hot samples, or None.
            cold: Cold samples, or None.
            rng: Draws.
            score: The model's predictions, for a criterion that asks for them.

        Returns:
            What to keep of the hot and of the cold samples.
        """
        self.criterion.learn([group for group in (hot, cold) if group is not None], rng=rng)
        num_hot, num_cold = (0 if group is None else len(group) for group in (hot, cold))
        everything = Selection(keep=np.ones(num_hot, bool)), Selection(keep=np.ones(num_cold, bool))
        covers_cold = self.rule.scope == "all" and "all" in self.criterion.scopes
        candidates = Candidates(
            groups=[group for group in (hot, cold if covers_cold else None) if group is not None],
            classified=self.classified,
            dropped=self.dropped,
            score=score,
            columns=self._columns,
        )
        if not self._is_active or not len(candidates):
            return everything
        chosen = self.criterion.choose(candidates, rng=rng)
        self._note(chosen.finding)
        self.classified += len(candidates)
        self.dropped += int(np.count_nonzero(~chosen.keep))
        weights = chosen.weights if self.rule.reweight else None
        of_hot = _selection(chosen.keep[:num_hot], None if weights is None else weights[:num_hot])
        if not covers_cold:
            return of_hot, everything[1]
        return of_hot, _selection(chosen.keep[num_hot:], None if weights is None else weights[num_hot:])

    def state(self) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """Everything a resumed run needs: plain values, and arrays."""
        plain, arrays = self.criterion.state()
        books = {
            "checks": [asdict(check) for check in self.checks],
            "classified": self.classified,
            "dropped": self.dropped,
            "step": self._step,
            "is_active": self._is_active,
        }
        return books | {"criterion": plain}, arrays

    def restore(self, plain: dict[str, Any], arrays: dict[str, np.ndarray]) -> None:
        """Take over what `state` gave."""
        self.checks = [CheckRecord(**check) for check in plain["checks"]]
        self.classified, self.dropped = plain["classified"], plain["dropped"]
        self._step, self._is_active = plain["step"], plain["is_active"]
        self.criterion.restore(plain["criterion"], arrays)

    def _note(self, finding: Finding | None) -> None:
        if finding is not None:
            self.checks.append(CheckRecord(step=self._step, **asdict(finding)))


def _selection(keep: np.ndarray, weights: np.ndarray | None) -> Selection:
    return Selection(keep=keep, weights=None if weights is None else weights[keep])
