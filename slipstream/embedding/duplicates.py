"""Lookups that share a row: found by one sort, and their gradients summed by one more lookup.

On a CPU the host thread sorts (`sort_lookups`), and so it does for rows that have to move; on a GPU the lookups of a
batch are sorted there, within the step and in fixed shapes (`find_distinct`): 426,000 lookups a batch are a matter of
tens of milliseconds for one host thread.

Sorting the lookups by row shows the distinct rows, how often each is looked up and by which lookups. With that order
at hand the sum of gradients is a lookup itself: the gradient of a row is the bag of the gradients of its lookups. On a
CPU both together take a fifth of the time of PyTorch's own backward of an embedding (2,048 samples, 26 tables,
16 columns, 2 cores: 1.4 ms against 7.2 ms), and need no scratch memory for the rows that are not looked up.

Shape suffixes: L lookups, U distinct rows among them, D embedding_dim.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from slipstream.ops.runs import is_run_start


@dataclass(frozen=True, slots=True)
class SortedLookups:
    """Lookups in the order of their rows."""

    unique: np.ndarray
    """Distinct rows, ascending. Shape (U,)."""
    inverse: np.ndarray
    """Index into `unique` of each lookup. Shape (L,), int32."""
    order: np.ndarray
    """Lookups by row, those of one row in the order given. Shape (L,), int64."""
    starts: np.ndarray
    """Where in `order` the lookups of each distinct row begin. Shape (U,), int64."""

    def counts(self) -> np.ndarray:
        """How often each distinct row is looked up. Shape (U,), int64."""
        return np.diff(self.starts, append=len(self.order))


@dataclass(frozen=True, slots=True)
class Distinct:
    """The distinct rows of a batch, where they are computed with."""

    rows: Tensor
    """Shape (U,), int64."""
    inverse: Tensor
    """Index into `rows` of each lookup. Shape (L,), int32 or int64."""
    order: Tensor | None = None
    """Lookups by row, those of one row in batch order. Shape (L,), int64."""
    starts: Tensor | None = None
    """Where in `order` the lookups of each of `rows` begin. Shape (U,), int64."""


def find_distinct(rows: Tensor, *, padding: Tensor) -> Distinct:
    """Find the distinct rows of lookups in shapes that depend on nothing but L, so that a CUDA graph can hold it.

    Args:
        rows: Of each lookup. Shape (L,), integer.
        padding: Rows that no lookup has; at least as many as there can be distinct rows. Shape (U,), int64.

    Returns:
        Distinct rows, ascending; from their end on, what `padding` has there. Shapes (U,) and (L,), int64 and int32.
    """
    by_row, order = torch.sort(rows, stable=True)
    is_first = torch.ones_like(by_row, dtype=torch.bool)
    torch.ne(by_row[1:], by_row[:-1], out=is_first[1:])
    ranks = is_first.cumsum(0) - 1
    inverse = torch.empty_like(ranks, dtype=torch.int32).scatter_(0, order, ranks.int())
    return Distinct(padding.scatter(0, ranks, by_row.long()), inverse)


def sort_lookups(rows: np.ndarray) -> SortedLookups:
    """Sort lookups by row. `rows` has shape (L,), integer."""
    by_row, order = torch.sort(torch.from_numpy(rows), stable=True)  # a radix sort, five times as fast as numpy's
    ordered = by_row.numpy()
    is_first = is_run_start(ordered)
    starts = np.flatnonzero(is_first)
    inverse = np.empty(len(ordered), np.int32)
    inverse[order.numpy()] = np.cumsum(is_first, dtype=np.int32) - 1
    return SortedLookups(ordered[starts], inverse, order.numpy(), starts)


def sum_duplicates(
    gradients: Tensor,
    inverse: Tensor,
    num_unique: int,
    *,
    order: Tensor | None = None,
    starts: Tensor | None = None,
    deterministic: bool = True,
) -> Tensor:
    """Sum the gradients of each distinct row, in batch order, so the result does not depend on where rows sit.

    Args:
        gradients: One per lookup. Shape (L, D).
        inverse: Distinct row of each lookup. Shape (L,), int32 or int64.
        num_unique: U.
        order: Lookups by row, those of one row in batch order; found here where it is missing. Shape (L,), int64.
        starts: Where in `order` the lookups of each row begin. Shape (U,), int64.
        deterministic: On CUDA, False adds in the order the threads arrive: faster, and it can be captured in a graph.

    Returns:
        Shape (U, D).
    """
    on_cpu = gradients.device.type == "cpu"
    if not on_cpu and not deterministic:
        return gradients.new_zeros(num_unique, gradients.shape[1]).index_add_(0, inverse, gradients)
    if not on_cpu:  # bags there are summed one lookup after the other, and a few rows have most lookups
        summed: Tensor = torch.ops.aten.embedding_dense_backward(gradients, inverse, num_unique, -1, False)
        return summed
    if order is None or starts is None:
        order = torch.sort(inverse, stable=True).indices
        counts = torch.bincount(inverse, minlength=num_unique)
        starts = counts.cumsum(0) - counts
    return embedding_bag(order, gradients, starts, mode="sum")
