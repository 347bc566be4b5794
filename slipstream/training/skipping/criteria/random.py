"""Blindly, the same share as the other criteria: the control of every claim."""

from __future__ import annotations

import numpy as np

from slipstream.training.skipping.criterion import Candidates, Choice, Criterion
from slipstream.training.skipping.drawing import draw_by_worth


class Random(Criterion):
    """Drops blindly; all samples are kept with one probability, so there is nothing to weight."""

    def choose(self, candidates: Candidates, *, rng: np.random.Generator) -> Choice:
        """Draw the share D, exact over all rounds."""
        num_drop = candidates.num_drop(self.rule.target_drop)
        keep, _ = draw_by_worth(np.ones(len(candidates)), num_drop=num_drop, floor=0.0, rng=rng)
        return Choice(keep=keep)
