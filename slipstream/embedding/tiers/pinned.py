"""Page-locked memory that copies between host and device go through: allocated once, its slabs take turns.

A copy from ordinary memory makes the host wait until the device is done with everything before it, and allocating
page-locked memory makes the device wait; so neither may happen for every chunk of batches.
"""

from __future__ import annotations

import torch
from torch import Tensor

NUM_SLABS = 4
"""So that the host fills one while copies read the others."""
SLAB_BYTES = 8 << 20
"""Copies of this size reach the full rate of the bus; a batch of 16,384 samples takes a third of it."""


class Slab:
    """One piece of page-locked memory, and the event after which nothing reads or writes it any more."""

    def __init__(self, num_bytes: int) -> None:
        self._bytes = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)
        self._done = torch.cuda.Event(blocking=True)  # a thread that waits sleeps: others need its core
        self._is_busy = False

    def take(self) -> Slab:
        """Wait until it is free."""
        if self._is_busy:
            self._done.synchronize()
            self._is_busy = False
        return self

    def view(self, dtype: torch.dtype, *shape: int) -> Tensor:
        """Its first bytes as a tensor."""
        num_bytes = dtype.itemsize
        for length in shape:
            num_bytes *= length
        return self._bytes[:num_bytes].view(dtype).view(shape)

    def mark_busy(self, stream: torch.cuda.Stream) -> None:
        """Count as in use until the stream has done what it was given so far."""
        self._done.record(stream)
        self._is_busy = True


class PinnedRing:
    """Slabs that take turns. One thread at a time.

    Args:
        num_slabs: How many.
        slab_bytes: Of each.
    """

    def __init__(self, num_slabs: int = NUM_SLABS, slab_bytes: int = SLAB_BYTES) -> None:
        self.slab_bytes = slab_bytes
        self._slabs = [Slab(slab_bytes) for _ in range(num_slabs)]
        self._next = 0

    def __len__(self) -> int:
        """Count the slabs."""
        return len(self._slabs)

    def take(self) -> Slab:
        """Give the slab whose turn it is, once no copy uses it."""
        slab = self._slabs[self._next].take()
        self._next = (self._next + 1) % len(self._slabs)
        return slab
