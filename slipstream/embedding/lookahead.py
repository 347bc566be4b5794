"""Look-ahead: fetch the cold rows of the next chunk of batches while the current one computes.

The batch order is known, so a chunk's cold rows are known before it starts. While chunk k - 1 computes in one
staging half, the host thread writes back the rows that left with chunk k - 2 and gathers the rows of chunk k
into the other half. A row used by both k - 1 and k is forwarded on the device once k - 1 is done. So no row is
ever read stale: the result equals the plain loop, to the bit on CPU, for any chunk length and staging size.

    host thread      write back k-2 | gather k          | write back k-1 | gather k+1
    device           compute k-1                        | forward k-1 -> k, compute k

Shape suffixes: B batch, T tables, L = B·T lookups, U unique positions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from slipstream.embedding.tiers import TieredRows


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """Samples of one step, on the host."""

    dense: np.ndarray
    """Shape (B, dense columns), float32."""
    slots: np.ndarray
    """Shape (B, T), int32 or int64."""
    labels: np.ndarray
    """Shape (B,), float32."""
    is_hot: bool
    """Whether every slot is a hot one."""

    def __len__(self) -> int:
        """B."""
        return len(self.labels)


@dataclass(frozen=True, kw_only=True, slots=True)
class StagedBatch:
    """A batch whose slots are positions in the device buffer."""

    dense: Tensor
    labels: Tensor
    positions: Tensor
    """Shape (L,), int64, sample by sample."""
    unique: Tensor
    """Distinct positions, in the order of their first lookup. Shape (U,), int64."""
    inverse: Tensor
    """Index into `unique` of each lookup. Shape (L,), int64."""
    is_hot: bool

    def __len__(self) -> int:
        """B."""
        return len(self.labels)


class StagingOverflowError(ValueError):
    """One batch alone has more cold rows than a staging half holds."""

    def __init__(self, needed: int, available: int) -> None:
        super().__init__(f"one batch looks up {needed} cold rows, and a staging half holds {available}")
        self.needed, self.available = needed, available


@dataclass(frozen=True, slots=True)
class _Chunk:
    """A planned chunk: which cold rows it stages, where, and its batches in positions."""

    cold: np.ndarray
    """Cold indices staged, in the order of their places in the half. Shape (n,), int64."""
    half: int
    fetched: np.ndarray
    """Places in the half filled from the host. Shape (f,), int64."""
    forwarded: np.ndarray
    """Places in the half filled from the other half. Shape (n - f,), int64."""
    forwarded_from: np.ndarray
    """Buffer positions they come from."""
    batches: list[StagedBatch]


class _Deduplicator:
    """Finds the distinct keys among many without sorting; 4 bytes of scratch per possible key."""

    def __init__(self, num_keys: int) -> None:
        self._first = np.empty(num_keys, np.int32)

    def __call__(self, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Distinct keys in order of first sight, index of each key's first sight, and the inverse."""
        order = np.arange(len(keys), dtype=np.int32)
        self._first[keys[::-1]] = order[::-1]  # the last write wins: the first sight
        first = self._first[keys]
        is_first = first == order
        rank = np.cumsum(is_first, dtype=np.int32) - 1
        seen_at = np.flatnonzero(is_first)
        return keys[seen_at], seen_at, rank[first]


class LookAhead:
    """Runs batches through a step with their rows on the device.

    Args:
        rows: The tiers.
        chunk_batches: Batches per chunk, at most; a chunk that does not fit its staging half is split.
    """

    def __init__(self, rows: TieredRows, *, chunk_batches: int) -> None:
        if chunk_batches < 1:
            raise ValueError(f"expected chunks of at least 1 batch, found {chunk_batches}")
        self._rows, self._chunk_batches = rows, chunk_batches
        self._distinct_cold = _Deduplicator(rows.num_cold)
        self._distinct_position = _Deduplicator(len(rows.buffer))
        self._position_of_cold = np.full(rows.num_cold, -1, np.int32)
        self._planned: np.ndarray | None = None
        self._staged: _Chunk | None = None
        self._num_chunks = 0
        self.lookups = 0
        """Lookups of all batches so far."""
        self.cold_lookups = 0
        """Those that went to cold rows."""
        self.bytes_to_device = 0
        self.bytes_to_host = 0

    def run(self, batches: Iterator[Batch], step: Callable[[StagedBatch], None], *, update: bool = True) -> None:
        """Call `step` with every batch in order, its rows staged.

        Rows stay staged between calls until `flush`. All batches must be known when asked for: none may
        depend on a step of the same call.

        Args:
            batches: In training order.
            step: Reads and, where `update`, changes `rows.buffer` at the batch's positions.
            update: Whether rows changed and must be written back.

        Raises:
            StagingOverflowError: A single batch has more cold rows than a staging half holds.
        """
        pending = _Pending(batches)
        with ThreadPoolExecutor(max_workers=1, thread_name_prefix="look-ahead") as host:
            following: Future[_Chunk | None] = host.submit(self._prepare, pending)
            while (chunk := following.result()) is not None:
                leaving = self._activate(chunk)
                following = host.submit(self._leave_and_prepare, leaving, update, pending)
                for batch in chunk.batches:
                    step(batch)

    def flush(self) -> None:
        """Write every staged row back to its tier; afterwards the tiers hold the whole model."""
        if self._staged is not None:
            chunk, self._staged = self._staged, None
            positions = self._half_start(chunk.half) + np.arange(len(chunk.cold))
            self._write_back(chunk.cold, positions)
            self._position_of_cold[chunk.cold] = -1
            self._planned = None

    # --- host thread ----------------------------------------------------------------------------------------

    def _leave_and_prepare(
        self, leaving: tuple[np.ndarray, np.ndarray], update: bool, pending: _Pending
    ) -> _Chunk | None:
        if update:
            self._write_back(*leaving)
        return self._prepare(pending)

    def _prepare(self, pending: _Pending) -> _Chunk | None:
        batches = pending.take(self._chunk_batches)
        if not batches:
            return None
        chunk, left = self._plan(batches)
        pending.put_back(left)
        self._fetch(chunk)
        return chunk

    def _plan(self, batches: list[Batch]) -> tuple[_Chunk, list[Batch]]:
        num_hot = self._rows.num_hot
        slots = [batch.slots.ravel() for batch in batches]
        cold_of = [flat[flat >= num_hot] - num_hot for flat in slots]
        ends = np.cumsum([len(cold) for cold in cold_of])
        staged, seen_at, _ = self._distinct_cold(np.concatenate(cold_of))
        needed = np.searchsorted(seen_at, ends)
        fitting = int(np.searchsorted(needed, self._rows.staging_rows, side="right"))
        if fitting == 0:
            raise StagingOverflowError(int(needed[0]), self._rows.staging_rows)
        staged = staged[: needed[fitting - 1]]
        half = self._num_chunks % 2
        self._num_chunks += 1
        places = np.arange(len(staged))
        previous = self._position_of_cold[staged]
        is_new = previous < 0
        if self._planned is not None:
            self._position_of_cold[self._planned] = -1
        self._position_of_cold[staged] = self._half_start(half) + places
        self._planned = staged
        chunk = _Chunk(
            cold=staged,
            half=half,
            fetched=places[is_new],
            forwarded=places[~is_new],
            forwarded_from=previous[~is_new].astype(np.int64),
            batches=[self._stage(batch) for batch in batches[:fitting]],
        )
        return chunk, batches[fitting:]

    def _stage(self, batch: Batch) -> StagedBatch:
        num_hot = self._rows.num_hot
        positions = batch.slots.ravel()
        self.lookups += len(positions)
        is_cold = positions >= num_hot
        if is_cold.any():
            positions = positions.copy()
            positions[is_cold] = self._position_of_cold[positions[is_cold] - num_hot]
            self.cold_lookups += int(np.count_nonzero(is_cold))
        unique, _, inverse = self._distinct_position(positions)
        device = self._rows.device
        return StagedBatch(
            dense=torch.from_numpy(batch.dense).to(device),
            labels=torch.from_numpy(batch.labels).to(device),
            positions=torch.from_numpy(positions.astype(np.int64)).to(device),
            unique=torch.from_numpy(unique.astype(np.int64)).to(device),
            inverse=torch.from_numpy(inverse.astype(np.int64)).to(device),
            is_hot=batch.is_hot,
        )

    def _fetch(self, chunk: _Chunk) -> None:
        if not len(chunk.fetched):
            return
        cold = torch.from_numpy(chunk.cold[chunk.fetched].astype(np.int64))
        positions = torch.from_numpy(self._half_start(chunk.half) + chunk.fetched).to(self._rows.device)
        for device_rows, host_rows in self._rows.pairs:
            device_rows.index_copy_(0, positions, host_rows.index_select(0, cold).to(self._rows.device))
        self.bytes_to_device += len(cold) * self._rows.row_bytes

    def _write_back(self, cold: np.ndarray, positions: np.ndarray) -> None:
        if not len(cold):
            return
        targets = torch.from_numpy(cold.astype(np.int64))
        sources = torch.from_numpy(positions.astype(np.int64)).to(self._rows.device)
        for device_rows, host_rows in self._rows.pairs:
            host_rows.index_copy_(0, targets, device_rows.index_select(0, sources).cpu())
        self.bytes_to_host += len(cold) * self._rows.row_bytes

    # --- main thread ----------------------------------------------------------------------------------------

    def _activate(self, chunk: _Chunk) -> tuple[np.ndarray, np.ndarray]:
        """Forward rows that the chunk shares with the one before; returns the rows that leave, and where."""
        previous, self._staged = self._staged, chunk
        if len(chunk.forwarded):
            sources = torch.from_numpy(chunk.forwarded_from).to(self._rows.device)
            targets = torch.from_numpy(self._half_start(chunk.half) + chunk.forwarded).to(self._rows.device)
            for device_rows, _ in self._rows.pairs:
                device_rows.index_copy_(0, targets, device_rows.index_select(0, sources))
        if previous is None:
            return np.empty(0, np.int64), np.empty(0, np.int64)
        is_leaving = np.ones(len(previous.cold), bool)
        is_leaving[chunk.forwarded_from - self._half_start(previous.half)] = False
        places = np.flatnonzero(is_leaving)
        return previous.cold[places], self._half_start(previous.half) + places

    def _half_start(self, half: int) -> int:
        return self._rows.num_hot + half * self._rows.staging_rows


class _Pending:
    """Batches not yet planned; those a full staging half turned away come first."""

    def __init__(self, batches: Iterator[Batch]) -> None:
        self._batches = batches
        self._returned: list[Batch] = []

    def take(self, count: int) -> list[Batch]:
        """Up to `count` batches."""
        taken, self._returned = self._returned[:count], self._returned[count:]
        while len(taken) < count and (batch := next(self._batches, None)) is not None:
            taken.append(batch)
        return taken

    def put_back(self, batches: list[Batch]) -> None:
        """Return batches to the front."""
        self._returned = batches + self._returned
