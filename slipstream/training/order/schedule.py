"""How an epoch is cut: into segments between staleness checks, segments into rounds, rounds into batches."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Schedule:
    """How an epoch is cut."""

    epochs: int
    batch_size: int
    order: str
    """`interleaved` or `mixed`."""
    segment_steps: int
    """Steps between staleness checks."""
    round_samples: int
    """Most samples of a round; two rounds are in memory at once."""
    warmup_steps: int = 0
    """Steps before the first window opens."""
    window_steps: int = 0
    """Length of a window that ends with its segment; 0 is the whole segment."""
    smaller_by: float = 0.0
    """Share by which batches are smaller while samples of their kind are dropped."""
    positive_weight: float = 1.0
    """Samples that one with label 1 counts as."""
    seed: int = 0
    """Draws the order of batches and what is dropped."""


def default_segment_steps(num_samples: int, batch_size: int) -> int:
    """Give steps per segment that make seven segments an epoch: one window, then six re-checks."""
    return max(1, math.ceil(num_samples / batch_size / 7))
