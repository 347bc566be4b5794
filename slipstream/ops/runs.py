"""Runs of equal values in sorted arrays."""

from __future__ import annotations

import numpy as np


def is_run_start(ordered: np.ndarray) -> np.ndarray:
    """Whether each value of a sorted array is the first of its kind. Shape (n,), bool."""
    starts = np.empty(len(ordered), bool)
    starts[:1] = True
    np.not_equal(ordered[1:], ordered[:-1], out=starts[1:])
    return starts
