"""By the error of the model: samples that it predicts badly stay, others stay rarely and count more.

The error is guessed by a linear scorer that learns beside the model, or asked of the model itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from slipstream.training.skipping.criterion import Candidates, Choice, Criterion, SkipRule
from slipstream.training.skipping.drawing import draw_by_worth
from slipstream.training.skipping.linear_scorer import LinearScorer

if TYPE_CHECKING:
    from slipstream.io.samples import Samples


class Importance(Criterion):
    """Keeps samples with probability ∝ |p - y|, at least `skip.floor`."""

    floor = 0.2  # the error is a guess: rarer than that, a sample counts for more than the guess is worth

    def __init__(self, rule: SkipRule) -> None:
        super().__init__(rule)
        self._linear = (
            LinearScorer(rule.num_rows, rule.num_dense, padding=rule.padding_slots) if rule.num_rows else None
        )
        self._guesses: np.ndarray | None = None  # of the round that is being decided
        self.decides_alone = self._linear is not None

    def learn(self, groups: Sequence[Samples], *, rng: np.random.Generator) -> None:
        """Guess all samples of a round, and learn from hot and cold ones in one shuffle."""
        if self._linear is None or not groups:
            return
        from slipstream.io.samples import concat_samples

        both = concat_samples(groups)
        order = rng.permutation(len(both))
        self._guesses = np.empty(len(both), np.float32)
        self._guesses[order] = self._linear.learn(both.take(order))

    def choose(self, candidates: Candidates, *, rng: np.random.Generator) -> Choice:
        """Draw by error, the share D exact over all rounds."""
        guesses, labels = self._guesses, candidates.labels()
        if guesses is None:
            guesses = candidates.predict()
        # hot samples come first, so what was guessed of cold ones that are not classified lies behind
        worth = np.asarray(np.abs(guesses[: len(labels)] - labels))
        num_drop = candidates.num_drop(self.rule.target_drop)
        keep, weights = draw_by_worth(worth, num_drop=num_drop, floor=self.rule.floor, rng=rng)
        return Choice(keep=keep, weights=weights)

    def state(self) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """Give what the linear scorer learned."""
        learned = {} if self._linear is None else self._linear.state()
        return {}, {f"linear.{name}": value for name, value in learned.items()}

    def restore(self, plain: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> None:
        """Take over what `state` gave."""
        if self._linear is not None:
            self._linear.restore({name: arrays[f"linear.{name}"] for name in self._linear.state()})
