"""Forwards of a cached bag whose update is still to come, and the sum of their gradients.

Shape suffixes: S positions of the cache, D embedding_dim, U distinct positions looked up.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from slipstream.embedding.cached.host_tables import index_on
from slipstream.embedding.duplicates import sum_duplicates
from slipstream.embedding.row_cache import RowCache


@dataclass(frozen=True, slots=True, eq=False)
class PendingForward:
    """A training forward whose update is still to come."""

    positions: np.ndarray
    """Distinct positions it looked up. Shape (U,), int32."""
    leaf: Tensor | None
    """The alias of the cache tensor that its gradient arrives at; None when that is the parameter itself."""


def sum_gradients(pending: Sequence[PendingForward], weight: Tensor, row_cache: RowCache) -> tuple[np.ndarray, Tensor]:
    """Sum the gradients of forwards to one per position.

    Args:
        pending: At least one.
        weight: The cache tensor. Shape (S, D).
        row_cache: Which brings the positions of several forwards together.

    Returns:
        Positions, shape (U,), int32, and gradients, shape (U, D), float32 or float64.
    """
    positions = pending[0].positions
    if len(pending) > 1:
        positions, _ = row_cache.distinct(np.concatenate([one.positions for one in pending]))
    index = index_on(weight.device, positions)
    # where each position of the cache stands in the sum; those that were not looked up are never asked for
    place = torch.empty(weight.shape[0], dtype=torch.int64, device=weight.device)
    place[index] = torch.arange(positions.size, device=weight.device)
    dtype = update_dtype(weight.dtype)
    total = torch.zeros((positions.size, weight.shape[1]), dtype=dtype, device=weight.device)
    for gradient in (one.leaf.grad for one in pending if one.leaf is not None):
        if gradient is None:
            continue
        if gradient.is_sparse:
            total += sum_duplicates(gradient._values().to(dtype), place[gradient._indices()[0]], positions.size)
        else:
            total += gradient.index_select(0, index)
    return positions, total


def update_dtype(dtype: torch.dtype) -> torch.dtype:
    """Give the dtype that rows of a table are updated in: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32
