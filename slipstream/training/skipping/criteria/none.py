"""Nothing is left out."""

from __future__ import annotations

import numpy as np

from slipstream.training.skipping.criterion import Candidates, Choice, Criterion


class Nothing(Criterion):
    """Drops nothing."""

    scopes = ("hot",)
    drops = False
    is_published = True

    def choose(self, candidates: Candidates, *, rng: np.random.Generator) -> Choice:
        """Keep all."""
        return Choice(keep=np.ones(len(candidates), bool))
