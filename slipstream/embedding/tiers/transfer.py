"""Moves rows between the device buffer and the host, beside the computation.

On CUDA a copy stream carries the rows through pinned memory: gathering and scattering happen on the host
thread, copies overlap with the compute stream, and events order the two; the device is never synchronised.
On CPU the same calls are plain copies, which is how the tests prove the order of moves.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from slipstream.embedding.tiers.rows import TieredRows


class RowMover:
    """Fetches and writes back rows of the cold tier. `fetch` and `write_back` belong to one host thread.

    Args:
        rows: The tiers.
    """

    def __init__(self, rows: TieredRows) -> None:
        self._rows = rows
        self._copies = torch.cuda.Stream(rows.device) if rows.device.type == "cuda" else None
        self._pinned: list[list[Tensor]] = [[], []]
        self._pinned_until: list[torch.cuda.Event | None] = [None, None]
        self._turn = 0
        self._computed: torch.cuda.Event | None = None
        self._fetched: torch.cuda.Event | None = None
        self.bytes_to_device = 0
        self.bytes_to_host = 0

    def to_device(self, values: np.ndarray) -> Tensor:
        """Copy an array to the device, in order with fetches."""
        tensor = torch.from_numpy(values)
        if self._copies is None:
            return tensor
        with torch.cuda.stream(self._copies):
            return tensor.pin_memory().to(self._rows.device, non_blocking=True)

    def fetch(self, cold: np.ndarray, positions: np.ndarray) -> None:
        """Copy cold rows into the buffer. `cold` and `positions` have shape (n,)."""
        if not len(cold):
            return
        sources = torch.from_numpy(cold.astype(np.int64, copy=False))
        targets = torch.from_numpy(positions.astype(np.int64, copy=False))
        self.bytes_to_device += len(cold) * self._rows.row_bytes
        if self._copies is None:
            for buffer, host in self._rows.pairs:
                buffer.index_copy_(0, targets, host.index_select(0, sources))
            return
        pinned = self._take_pinned(len(cold))
        with torch.cuda.stream(self._copies):
            if self._computed is not None:
                self._copies.wait_event(self._computed)
            on_device = targets.pin_memory().to(self._rows.device, non_blocking=True)
            for (buffer, host), staged in zip(self._rows.pairs, pinned, strict=True):
                torch.index_select(host, 0, sources, out=staged[: len(cold)])
                buffer.index_copy_(0, on_device, staged[: len(cold)].to(self._rows.device, non_blocking=True))
            self._fetched = self._copies.record_event()
            self._pinned_until[self._turn] = self._fetched

    def write_back(self, cold: np.ndarray, positions: np.ndarray) -> None:
        """Copy rows of the buffer back to the cold tier. `cold` and `positions` have shape (n,)."""
        if not len(cold):
            return
        targets = torch.from_numpy(cold.astype(np.int64, copy=False))
        sources = torch.from_numpy(positions.astype(np.int64, copy=False))
        self.bytes_to_host += len(cold) * self._rows.row_bytes
        if self._copies is None:
            for buffer, host in self._rows.pairs:
                host.index_copy_(0, targets, buffer.index_select(0, sources))
            return
        pinned = self._take_pinned(len(cold))
        with torch.cuda.stream(self._copies):
            if self._computed is not None:
                self._copies.wait_event(self._computed)
            on_device = sources.pin_memory().to(self._rows.device, non_blocking=True)
            for (buffer, _), staged in zip(self._rows.pairs, pinned, strict=True):
                staged[: len(cold)].copy_(buffer.index_select(0, on_device), non_blocking=True)
            arrived = self._copies.record_event()
        arrived.synchronize()  # the host thread waits, the device does not
        for (_, host), staged in zip(self._rows.pairs, pinned, strict=True):
            host.index_copy_(0, targets, staged[: len(cold)])

    def forward(self, sources: np.ndarray, targets: np.ndarray) -> None:
        """Copy rows within the buffer, in order with the computation. Both of shape (n,)."""
        if not len(sources):
            return
        from_positions = torch.from_numpy(sources.astype(np.int64, copy=False)).to(self._rows.device)
        to_positions = torch.from_numpy(targets.astype(np.int64, copy=False)).to(self._rows.device)
        for buffer, _ in self._rows.pairs:
            buffer.index_copy_(0, to_positions, buffer.index_select(0, from_positions))

    def await_fetches(self) -> None:
        """Let computation enqueued from now on see every fetch so far."""
        if self._copies is not None and self._fetched is not None:
            torch.cuda.current_stream(self._rows.device).wait_event(self._fetched)

    def mark_computed(self) -> None:
        """Let moves from now on wait for the computation enqueued so far."""
        if self._copies is not None:
            self._computed = torch.cuda.current_stream(self._rows.device).record_event()

    def hand_over(self, tensors: list[Tensor]) -> None:
        """Tell the allocator that tensors made beside the computation are now used by it."""
        if self._copies is not None:
            for tensor in tensors:
                tensor.record_stream(torch.cuda.current_stream(self._rows.device))

    def _take_pinned(self, count: int) -> list[Tensor]:
        """Pinned memory that no copy is still using; two sets take turns."""
        self._turn = 1 - self._turn
        busy = self._pinned_until[self._turn]
        if busy is not None:
            busy.synchronize()
        held = self._pinned[self._turn]
        if not held or len(held[0]) < count:
            size = max(count, 2 * len(held[0]) if held else 0)
            held = [torch.empty((size, *host.shape[1:]), pin_memory=True) for _, host in self._rows.pairs]
            self._pinned[self._turn] = held
        return held
