"""Blindly among samples without a click; those that stay count for the others too: the habit of the industry."""

from __future__ import annotations

import numpy as np

from slipstream.training.skipping.criterion import Candidates, Choice, Criterion
from slipstream.training.skipping.drawing import draw_by_worth


class Negative(Criterion):
    """Drops negatives and keeps every positive."""

    def choose(self, candidates: Candidates, *, rng: np.random.Generator) -> Choice:
        """Draw the share D among the negatives, exact over all rounds."""
        worth = np.where(candidates.labels() > 0.5, np.inf, 1.0)
        num_drop = candidates.num_drop(self.rule.target_drop)
        keep, weights = draw_by_worth(worth, num_drop=num_drop, floor=0.0, rng=rng)
        return Choice(keep=keep, weights=weights)
