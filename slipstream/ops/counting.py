"""Access counts per row."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import ArrayLike

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


def most_frequent_rows(row_counts: ArrayLike, count: int) -> np.ndarray:
    """Pick the rows to warm a cache with: the most used first, ties by row number.

    Args:
        row_counts: Accesses per row, shape (N,), integer, >= 0.
        count: How many, in [0, N].

    Returns:
        Row numbers, shape (count,), int64.

    Raises:
        ValueError: There are not so many rows.

    Example:
        >>> most_frequent_rows([5, 0, 9, 5], 3)
        array([2, 0, 3])
    """
    counts = np.asarray(row_counts)
    if not 0 <= count <= counts.size:
        raise ValueError(f"expected 0 <= count <= {counts.size} rows, found {count}")
    if count == 0:
        return np.empty(0, np.int64)
    threshold = np.partition(counts, counts.size - count)[counts.size - count]
    above = np.flatnonzero(counts > threshold)
    tied = np.flatnonzero(counts == threshold)[: count - above.size]
    return np.concatenate([above[np.argsort(-counts[above].astype(np.int64), kind="stable")], tied])
