"""Moves rows and batches between the device and the host, beside the computation.

On CUDA a copy stream carries them through page-locked memory: gathering and scattering happen on the host thread,
copies overlap with the compute stream, and events order the two; the device is never synchronised.
On CPU the same calls are plain copies, which is how the tests prove the order of moves.

    host thread      fetch, to_device, mark_moved   | write_back: waits for its own copy, asleep
    copy stream      ... after mark_computed        | ... after mark_computed
    compute stream   await_moved, then what uses them
"""

from __future__ import annotations

import collections
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from slipstream.embedding.tiers.home import Home
from slipstream.embedding.tiers.pinned import PinnedRing, Slab
from slipstream.embedding.tiers.rows import TieredRows

_ALIGNMENT = 256
"""Bytes at whose multiples arrays begin on the device, as allocations of their own would."""


class RowMover:
    """Fetches and writes back rows of the cold tier, and brings arrays along.

    `fetch`, `write_back`, `to_device` and `mark_moved` belong to one thread at a time.

    Args:
        rows: The tiers.
    """

    def __init__(self, rows: TieredRows) -> None:
        self._rows = rows
        self._copies: torch.cuda.Stream | None = None
        if rows.device.type == "cuda":
            self._copies = torch.cuda.Stream(rows.device)
            self._ring = PinnedRing()
        self._computed: torch.cuda.Event | None = None
        self.bytes_to_device = 0
        self.bytes_to_host = 0
        self.before_write: Callable[[np.ndarray], None] | None = None
        """Told which rows of the cold tier are about to change."""

    def to_device(self, arrays: Sequence[np.ndarray]) -> list[Tensor]:
        """Bring arrays to the device, all in one copy; they may be used from the next `mark_moved` on.

        On a CPU the tensors share the arrays' memory.
        """
        if self._copies is None:
            return [torch.from_numpy(array) for array in arrays]
        starts, total = [], 0
        for array in arrays:
            starts.append(total)
            total += -(-array.nbytes // _ALIGNMENT) * _ALIGNMENT
        tensors = [torch.from_numpy(np.ascontiguousarray(array)) for array in arrays]
        flat = [tensor.view(-1).view(torch.uint8) for tensor in tensors]
        with torch.cuda.stream(self._copies):
            packed = torch.empty(total, dtype=torch.uint8, device=self._rows.device)
            for window in _pieces(total, self._ring.slab_bytes):
                slab = self._ring.take()
                pinned = slab.view(torch.uint8, window.stop - window.start)
                for values, start in zip(flat, starts, strict=True):
                    # the part of this array inside the window; most often the window holds every array whole
                    first, last = max(start, window.start), min(start + len(values), window.stop)
                    if first < last:
                        pinned[first - window.start : last - window.start] = values[first - start : last - start]
                packed[window].copy_(pinned, non_blocking=True)
                slab.mark_busy(self._copies)
        return [
            packed[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
            for tensor, start in zip(tensors, starts, strict=True)
        ]

    def fetch(self, cold: np.ndarray, positions: np.ndarray) -> None:
        """Copy cold rows into the buffer, after the computation marked last. Both arguments have shape (n,)."""
        if not len(cold):
            return
        cold, positions = self._rows.order_moves(cold, positions)
        sources = torch.from_numpy(cold.astype(np.int64, copy=False))
        self.bytes_to_device += len(cold) * self._rows.row_bytes
        (targets,) = self.to_device([positions.astype(np.int64, copy=False)])
        if self._copies is None:
            for home in self._rows.homes:
                home.put(targets, home.gather(sources))
            return
        with torch.cuda.stream(self._copies):
            self._await_computed(self._copies)
            for home in self._rows.homes:
                for piece in self._pieces_of_rows(home.host, len(cold)):
                    slab = self._ring.take()
                    pinned = slab.view(home.host.dtype, piece.stop - piece.start, *home.host.shape[1:])
                    home.gather(sources[piece], out=pinned)
                    home.put(targets[piece], pinned.to(self._rows.device, non_blocking=True))
                    slab.mark_busy(self._copies)

    def write_back(self, cold: np.ndarray, positions: np.ndarray) -> None:
        """Copy rows of the buffer, as the computation marked last leaves them, to the cold tier; they are there then.

        Args:
            cold: Rows of the cold tier. Shape (n,).
            positions: Where they are in the buffer. Shape (n,).
        """
        if not len(cold):
            return
        cold, positions = self._rows.order_moves(cold, positions)
        targets = torch.from_numpy(cold.astype(np.int64, copy=False))
        if self.before_write is not None:
            self.before_write(cold)
        self.bytes_to_host += len(cold) * self._rows.row_bytes
        (sources,) = self.to_device([positions.astype(np.int64, copy=False)])
        if self._copies is None:
            for home in self._rows.homes:
                home.scatter(targets, home.take(sources))
            return
        arriving: collections.deque[tuple[Home, Tensor, Tensor, Slab]] = collections.deque()
        with torch.cuda.stream(self._copies):
            self._await_computed(self._copies)
            for home in self._rows.homes:
                for piece in self._pieces_of_rows(home.host, len(cold)):
                    if len(arriving) == len(self._ring):  # the slab whose turn it is holds the oldest piece
                        _scatter(*arriving.popleft())
                    slab = self._ring.take()
                    pinned = slab.view(home.host.dtype, piece.stop - piece.start, *home.host.shape[1:])
                    pinned.copy_(home.take(sources[piece]), non_blocking=True)
                    slab.mark_busy(self._copies)
                    arriving.append((home, targets[piece], pinned, slab))
            while arriving:
                _scatter(*arriving.popleft())

    def forward(self, sources: Tensor, targets: Tensor) -> None:
        """Copy rows within the buffer, in order with the computation. Both on the device, of shape (n,), int64."""
        for buffer, _ in self._rows.pairs:
            buffer.index_copy_(0, targets, buffer.index_select(0, sources))

    def mark_moved(self) -> torch.cuda.Event | None:
        """Give the end of all moves so far, for `await_moved`."""
        return None if self._copies is None else self._copies.record_event()

    def await_moved(self, moved: torch.cuda.Event | None) -> None:
        """Let computation enqueued from now on see every move up to a mark."""
        if moved is not None:
            torch.cuda.current_stream(self._rows.device).wait_event(moved)

    def mark_computed(self) -> None:
        """Let moves of rows from now on wait for the computation enqueued so far."""
        if self._copies is not None:
            self._computed = torch.cuda.current_stream(self._rows.device).record_event()

    @contextmanager
    def beside_computation(self) -> Iterator[None]:
        """Enqueue moves of rows that wait for the computation marked last."""
        if self._copies is None:
            yield
            return
        with torch.cuda.stream(self._copies):
            self._await_computed(self._copies)
            yield

    def hand_over(self, tensors: Sequence[Tensor]) -> None:
        """Tell the allocator that tensors made beside the computation are now used by it."""
        if self._copies is not None:
            for tensor in tensors:
                tensor.record_stream(torch.cuda.current_stream(self._rows.device))

    def _await_computed(self, stream: torch.cuda.Stream) -> None:
        if self._computed is not None:
            stream.wait_event(self._computed)

    def _pieces_of_rows(self, host: Tensor, num_rows: int) -> Iterator[slice]:
        """Give runs of rows that fit a slab."""
        return _pieces(num_rows, max(1, self._ring.slab_bytes // (host[:1].numel() * host.element_size())))


def _scatter(home: Home, targets: Tensor, pinned: Tensor, slab: Slab) -> None:
    """Put rows into the cold tier, once they have arrived."""
    slab.take()  # the host thread waits, the device does not
    home.scatter(targets, pinned)


def _pieces(total: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, total)) for start in range(0, total, size))
