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


def most_in_windows(num_samples: int, *, round_samples: int, window_samples: int) -> int:
    """Count the samples of all windows that two rounds in a row can take from, at most.

    A group's windows follow one another, so those that overlap a range of its samples reach beyond it by less than a
    window on either side; and two rounds belong to no more than two epochs.

    Args:
        num_samples: Of an epoch.
        round_samples: Most samples of a round.
        window_samples: Most samples of a window.
    """
    of_groups = min(num_samples, 2 * window_samples)  # the largest window of hot samples, and that of cold ones
    return min(2 * num_samples, 2 * round_samples + 2 * of_groups)


def default_segment_steps(num_samples: int, batch_size: int) -> int:
    """Give steps per segment that make seven segments an epoch: one window, then six re-checks."""
    return max(1, math.ceil(num_samples / batch_size / 7))
