"""The learning rate over the course of training."""

from __future__ import annotations


def learning_rate(progress: float, *, lr: float, warmup: float, decay: str) -> float:
    """Compute the learning rate after a share of training.

    Args:
        progress: Share done, in [0, 1].
        lr: The largest.
        warmup: Share of training over which it rises from zero.
        decay: `linear` lowers it to zero at the end; `none` leaves it.
    """
    warm = min(1.0, progress / warmup) if warmup else 1.0
    return lr * warm * (1.0 - progress if decay == "linear" else 1.0)
