"""Who is ordered after whom: vector clocks, and memory that remembers who touched which of its rows, and when.

An actor is a thread or a stream. Its clock says how many steps of each actor are over before its own next. An access
is in order when the clock is past the last write of what it touches and, for a write, past the last reads too.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

Clock = dict[str, int]
Units = np.ndarray | slice

_PACKED_UNIT = 256
"""Bytes of plain memory that are watched together."""


def join(clock: Clock, other: Clock) -> None:
    """Know what the other knows."""
    for actor, steps in other.items():
        clock[actor] = max(clock.get(actor, 0), steps)


@dataclass
class Memory:
    """What is known of one storage."""

    storage: StorageWeakRef
    is_pinned: bool
    born: str | None
    """Stream that it was allocated for; None: a graph keeps it, or it is page-locked."""
    unit: int
    """Bytes that are watched together: a row."""
    num_units: int
    writes: dict[str, np.ndarray] = field(default_factory=dict)
    """By actor, its step of the last write of each unit."""
    reads: dict[str, np.ndarray] = field(default_factory=dict)
    used_by: set[str] = field(default_factory=set)
    handed_to: set[str] = field(default_factory=set)

    @classmethod
    def of(cls, tensor: Tensor, *, is_pinned: bool, born: str | None) -> Memory:
        """The storage of a tensor just made; rows are those of the tensor."""
        storage = tensor.untyped_storage()
        unit = tensor.element_size()
        if tensor.dim() > 1:
            unit *= max(1, tensor.stride(0))
        elif tensor.dtype == torch.uint8:
            unit = _PACKED_UNIT
        return cls(StorageWeakRef(storage), is_pinned, born, unit, max(1, -(-storage.nbytes() // unit)))

    def units_of(self, tensor: Tensor, rows: Tensor | None) -> Units:
        """The units that a tensor covers, or some of its rows."""
        first = tensor.storage_offset() * tensor.element_size()
        if rows is not None and tensor.stride(0) * tensor.element_size() == self.unit:
            picked = rows.nonzero() if rows.dtype == torch.bool else rows
            numbers: np.ndarray = torch._C.TensorBase.numpy(picked.reshape(-1))
            return numbers.astype(np.int64) + first // self.unit
        span = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        last = first + (span + 1) * tensor.element_size()
        return slice(first // self.unit, -(-last // self.unit))

    def access(self, actor: str, clock: Clock, units: Units, *, writes: bool) -> list[str]:
        """Remember an access; returns the actors it has no order with."""
        conflicting = [self.writes, self.reads] if writes else [self.writes]
        others = {
            other
            for accesses in conflicting
            for other, steps in accesses.items()
            if (steps[units] > clock.get(other, 0)).any()
        }
        mine = self.writes if writes else self.reads
        mine.setdefault(actor, np.zeros(self.num_units, np.int64))[units] = clock[actor]
        self.used_by.add(actor)
        return sorted(others)
