"""Access counts per row."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from slipstream.ops.split import hash_positions

_DRAWS = 2**32


def count_accesses(blocks: Iterable[np.ndarray], *, num_rows: int) -> np.ndarray:
    """Count lookups per global row; blocks may come in any order.

    Args:
        blocks: Global rows, each of shape (n, T), integer.
        num_rows: V.

    Returns:
        Shape (V,), int64; sums to the lookups read.
    """
    counts = np.zeros(num_rows, np.int64)
    for block in blocks:
        # as fast as bincount, which would make an array of all rows for every block
        np.add.at(counts, block.ravel(), 1)
    return counts


def sample_positions(start: int, stop: int, *, ratio: float, seed: int) -> np.ndarray:
    """Whether each sample of start..stop-1 is in a seeded draw of about `ratio`; 1.0 takes every one.

    Returns:
        Shape (stop - start,), bool; the same for a position whatever block it is asked in.
    """
    draws = hash_positions(start, stop, seed=seed) % np.uint64(_DRAWS)
    return draws < np.uint64(round(ratio * _DRAWS))
