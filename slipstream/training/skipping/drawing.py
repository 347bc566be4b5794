"""Draws of samples by what they are worth, so that as many stay as are meant to."""

from __future__ import annotations

import numpy as np


def share_ties(statistic: np.ndarray, threshold: float, *, num_drop: int, rng: np.random.Generator) -> np.ndarray:
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
    """Give the worth from which samples are kept for certain, so that probabilities ∝ worth sum to a number.

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


def draw_by_worth(
    worth: np.ndarray, *, num_drop: int, floor: float, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Keep samples with probability ∝ worth, all but a number of them.

    Args:
        worth: At least 0; infinity is kept for certain. Shape (n,).
        num_drop: Number to drop, give or take one.
        floor: Least probability.
        rng: Draws.

    Returns:
        (which to keep, inverse of the probability with which each is kept), shapes (n,), bool and float32.
    """
    certain = find_certain_worth(worth, num_keep=len(worth) - num_drop, floor=floor)
    return draw_by_certain_worth(worth, certain, floor=floor, rng=rng)


def draw_by_certain_worth(
    worth: np.ndarray, certain_worth: float, *, floor: float, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Keep samples with probability ∝ worth, those from `certain_worth` on for certain; returns as `draw_by_worth`."""
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
    return drawn
