"""Look-ahead: fetch the cold rows of the next chunk of batches while the current one computes.

The batch order is known, so a chunk's cold rows are known before it starts. While chunk k - 1 computes, the host
thread writes back the rows that left with chunk k - 2 and gathers the rows of chunk k. A row that both k - 1 and k
use stays on the device. So no row is ever read stale: the result equals the plain loop, to the bit on CPU, for any
chunk length, staging size and placement.

    finders          cold rows of the batches of k+1, k+2
    host thread      write back k-2 | gather k          | write back k-1 | gather k+1
    device           compute k-1                        | forward k-1 -> k, compute k

Shape suffixes: B batch, T tables, L = B·T lookups, U distinct positions, C distinct cold rows.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator, Mapping
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from slipstream.embedding.duplicates import Distinct, SortedLookups, find_distinct, sort_lookups
from slipstream.embedding.tiers.batch_plan import RowsInPlace
from slipstream.embedding.tiers.frozen import FrozenTiers
from slipstream.embedding.tiers.padding import PaddedColumns
from slipstream.embedding.tiers.placement import Placement, Plan, Request
from slipstream.embedding.tiers.rows import TieredRows
from slipstream.embedding.tiers.transfer import RowMover
from slipstream.ops.parallel import in_order

_NUM_FINDERS = 4
"""Threads that look for cold rows in the batches to come, where there is a GPU to be kept busy."""


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
    weights: np.ndarray | None = None
    """Weight of each sample in the loss; None is 1 for all. Shape (B,), float32."""
    divisor: int | None = None
    """What the sum of the losses is divided by, where it is not the size of full batches."""

    def __len__(self) -> int:
        """B."""
        return len(self.labels)


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchPart:
    """What all ranks together look up in a batch of which each computes a part."""

    num_samples: int
    """Of the whole batch."""
    rows: Tensor
    """Distinct positions of all ranks. Shape (U,), int64."""
    places: list[Tensor]
    """Where the distinct positions of each rank stand in `rows`. Shapes (u,), int32."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StagedBatch:
    """A batch whose slots are positions in the device buffer: as they are, or as distinct ones."""

    dense: Tensor
    labels: Tensor
    is_hot: bool
    positions: Tensor | None = None
    """Of each lookup, sample by sample, where the device finds the duplicates. Shape (L,), int32 or int64."""
    distinct: Distinct | None = None
    """The distinct positions, where the host found them."""
    in_place: RowsInPlace | None = None
    """The rows of the batch, where the device finds and fetches them by itself."""
    weights: Tensor | None = None
    tierless: Tensor | None = None
    """Slots of the columns whose rows have no tier. Shape (B, J), int64."""
    divisor: int | None = None
    """As of the batch."""
    part: BatchPart | None = None
    """Of what this is a part; None where it is a whole batch."""
    is_value: Tensor | None = None
    """Which lookups of the padded columns are values, where rows are pooled. Shape (B, P), bool."""
    ranges: Tensor | None = None
    """Range of its table that the row of each lookup in tiers is in, where rows differ in bits. Shape (B, K), uint8."""

    def __len__(self) -> int:
        """B; of a part, its own samples."""
        return len(self.labels)

    @property
    def num_samples(self) -> int:
        """Samples of the whole batch."""
        return len(self) if self.part is None else self.part.num_samples

    def num_lookups(self) -> int:
        """L."""
        if self.in_place is not None:
            return len(self) * self.in_place.num_columns
        found = self.positions if self.distinct is None else self.distinct.inverse
        return 0 if found is None else len(found)

    def find_distinct(self, *, padding: Tensor) -> Distinct:
        """Give the distinct positions: those the host found, or else found here, filled up from `padding`."""
        if self.distinct is not None:
            return self.distinct
        assert self.positions is not None
        return find_distinct(self.positions, padding=padding)

    def find_positions(self) -> Tensor:
        """Give the positions looked up, once or more often each. Shape (U,) or (L,)."""
        if self.in_place is not None:
            return self.in_place.plan.padded_positions()
        positions = self.positions if self.distinct is None else self.distinct.rows
        assert positions is not None
        return positions

    def tensors(self) -> list[Tensor]:
        """Everything that went to the device."""
        found = self.distinct
        of_distinct = () if found is None else (found.rows, found.inverse, found.order, found.starts)
        own = (self.dense, self.labels, self.positions, self.weights, self.tierless, self.is_value, self.ranges)
        given = (*own, *of_distinct)
        return [value for value in given if value is not None]


@dataclass(frozen=True, slots=True)
class BatchLookups:
    """A batch whose cold rows are known."""

    batch: Batch
    slots: np.ndarray
    """Of every lookup, or the distinct ones where `sorted` has them. Shape (L,) or (U,)."""
    cold_places: slice | np.ndarray
    """Where in `slots` the cold ones are."""
    cold: np.ndarray
    """Distinct cold rows, ascending. Shape (C,)."""
    cold_counts: np.ndarray
    """How often each of them is looked up. Shape (C,)."""
    cold_inverse: np.ndarray | None
    """Index into `cold` of each of `cold_places`; None where they are distinct already."""
    sorted: SortedLookups | None


@dataclass(frozen=True, slots=True)
class _Chunk:
    """Batches in positions, and the moves that belong to them."""

    plan: Plan
    batches: list[StagedBatch]
    forwarded: list[Tensor] | None
    """The plan's positions from and to, on the device; None where no row stays."""
    moved: torch.cuda.Event | None
    """The end of every move that the chunk needs; None where moves are over when they return."""


class LookAhead:
    """Runs batches through a step with their rows on the device.

    Args:
        rows: The tiers.
        placement: Decides where cold rows sit.
        chunk_batches: Batches per chunk, at most; a chunk that does not fit is split.
        columns: Columns of a batch's slots whose rows have tiers; None for all. The others only travel along.
        padding: Columns that may hold padding, which counts as no lookup; None for none.
        range_of_slot: Range of its table that each row is in, if steps must know. Shape (num_rows,), uint8.
        in_thread: Whether moves are made by a thread of their own, and cold rows found by a few more; None where the
            device is no CPU. On a CPU they take their time from the computation, and a step's threads wait.
        sorts_all: Whether the host finds the distinct positions of a batch, not only its cold rows; None on a CPU.
        mover: Moves the rows; None makes one.
    """

    def __init__(
        self,
        rows: TieredRows,
        placement: Placement,
        *,
        chunk_batches: int,
        columns: np.ndarray | None = None,
        padding: PaddedColumns | None = None,
        range_of_slot: np.ndarray | None = None,
        in_thread: bool | None = None,
        sorts_all: bool | None = None,
        mover: RowMover | None = None,
    ) -> None:
        if chunk_batches < 1:
            raise ValueError(f"expected chunks of at least 1 batch, found {chunk_batches}")
        on_cpu = rows.device.type == "cpu"
        self._in_thread = not on_cpu if in_thread is None else in_thread
        self._sorts_all = on_cpu if sorts_all is None else sorts_all
        self._rows, self._placement, self._chunk_batches = rows, placement, chunk_batches
        self._columns, self._padding, self._range_of_slot = columns, padding, range_of_slot
        self._mover = RowMover(rows) if mover is None else mover
        self._frozen: FrozenTiers | None = None
        self.lookups = 0
        """Lookups of all batches so far."""
        self.cold_lookups = 0
        """Those that went to rows of the cold tier."""
        self.move_seconds = 0.0
        """Seconds that whoever called `run` spent on finding, moving and staging rows, or waited for them."""
        self.compute_seconds = 0.0
        """Seconds it spent in `step`."""

    @property
    def bytes_to_device(self) -> int:
        """Bytes of rows fetched so far."""
        return self._mover.bytes_to_device

    @property
    def bytes_to_host(self) -> int:
        """Bytes of rows written back so far."""
        return self._mover.bytes_to_host

    def run(
        self,
        batches: Iterator[Batch],
        step: Callable[[StagedBatch], None],
        *,
        between_chunks: Callable[[], None] = lambda: None,
    ) -> None:
        """Call `step` with every batch in order, its rows staged.

        Rows stay staged between calls until `flush`. All batches must be known when asked for: none may
        depend on a step of the same call. The first chunks are short, so that the first step does not wait long.

        Args:
            batches: In training order.
            step: Reads and changes `rows.buffer` at the batch's positions.
            between_chunks: Called before each chunk while nothing moves; may call `freeze`.

        Raises:
            StagingOverflowError: A single batch has more cold rows than fit.
        """
        # closed here, whatever a step raises: a pool must not be left to whichever thread collects garbage
        with closing(self._find_all_cold(batches)) as found, self._make_host() as host:
            self._mover.mark_computed()  # the buffer as it is now: filled, trained on, read
            pending = _Pending(found)
            began = time.perf_counter()
            following = host.submit(self._prepare, pending, 1)
            for chunk_batches in self._chunk_sizes():
                if (chunk := following.result()) is None:
                    break
                self._mover.await_moved(chunk.moved)
                self.move_seconds += time.perf_counter() - began
                between_chunks()
                began = time.perf_counter()
                self._activate(chunk)
                following = host.submit(self._leave_and_prepare, chunk.plan, pending, chunk_batches)
                staged = time.perf_counter()
                for batch in chunk.batches:
                    if self._frozen is not None:
                        self._frozen.keep_hot(batch.find_positions)
                    step(batch)
                self.move_seconds += staged - began
                began = time.perf_counter()
                self.compute_seconds += began - staged
            self.move_seconds += time.perf_counter() - began

    def flush(self) -> None:
        """Write back every row that changed; afterwards the tiers hold the whole model."""
        self._mover.mark_computed()
        self._mover.write_back(*self._placement.release())

    def counters(self) -> dict[str, float]:
        """Say what it counted so far, for a checkpoint."""
        return {
            "lookups": self.lookups,
            "cold_lookups": self.cold_lookups,
            "bytes_to_device": self.bytes_to_device,
            "bytes_to_host": self.bytes_to_host,
            "move_seconds": self.move_seconds,
            "compute_seconds": self.compute_seconds,
        }

    def restore_counters(self, counters: Mapping[str, float]) -> None:
        """Go on counting from a checkpoint."""
        self.lookups, self.cold_lookups = int(counters["lookups"]), int(counters["cold_lookups"])
        self._mover.bytes_to_device = int(counters["bytes_to_device"])
        self._mover.bytes_to_host = int(counters["bytes_to_host"])
        # checkpoints of older versions did not measure them
        self.move_seconds = counters.get("move_seconds", 0.0)
        self.compute_seconds = counters.get("compute_seconds", 0.0)

    def freeze(self, clone_to: Path | None = None) -> FrozenTiers:
        """All rows as they are now, to be read while training goes on, until `thaw`; between chunks only.

        Args:
            clone_to: As in `FrozenTiers`.
        """
        self._frozen = FrozenTiers(self._rows, self._placement.unwritten(), clone_to)
        self._mover.before_write = self._frozen.keep_cold
        return self._frozen

    def thaw(self) -> None:
        """Forget what `freeze` gave."""
        if self._frozen is not None:
            self._frozen.close()
        self._frozen = self._mover.before_write = None

    def _chunk_sizes(self) -> Iterator[int]:
        """Batches of the second chunk and of those after it."""
        size = 1
        while True:
            size = min(2 * size, self._chunk_batches)
            yield size

    def _make_host(self) -> Executor:
        return ThreadPoolExecutor(max_workers=1, thread_name_prefix="look-ahead") if self._in_thread else _SameThread()

    # --- host thread ---

    def _find_all_cold(self, batches: Iterator[Batch]) -> Generator[BatchLookups, None, None]:
        if self._in_thread:
            yield from in_order(self._find_cold, batches, _NUM_FINDERS)
        else:
            yield from map(self._find_cold, batches)

    def _find_cold(self, batch: Batch) -> BatchLookups:
        slots = (batch.slots if self._columns is None else batch.slots[:, self._columns]).ravel()
        num_hot = self._rows.num_hot
        if self._sorts_all:
            found = sort_lookups(slots)
            places = slice(int(np.searchsorted(found.unique, num_hot)), None)
            cold_rows, counts = found.unique[places] - num_hot, found.counts()[places]
            self._count_no_padding(cold_rows, counts)
            return BatchLookups(batch, found.unique, places, cold_rows, counts, None, found)
        at = np.flatnonzero(slots >= num_hot)
        cold = sort_lookups(slots[at] - slots.dtype.type(num_hot))
        counts = cold.counts()
        self._count_no_padding(cold.unique, counts)
        return BatchLookups(batch, slots, at, cold.unique, counts, cold.inverse, None)

    def _count_no_padding(self, cold_rows: np.ndarray, counts: np.ndarray) -> None:
        """Set the counts of padding rows among distinct cold rows to 0."""
        if self._padding is None:
            return
        padding_rows = np.unique(self._padding.slots) - self._rows.num_hot
        counts[np.isin(cold_rows, padding_rows, assume_unique=True)] = 0

    def _leave_and_prepare(self, current: Plan, pending: _Pending, chunk_batches: int) -> _Chunk | None:
        self._mover.write_back(*current.leaving)
        return self._prepare(pending, chunk_batches)

    def _prepare(self, pending: _Pending, chunk_batches: int) -> _Chunk | None:
        offered = self._complete(pending.take(chunk_batches))
        if not offered:
            return None
        plan = self._placement.plan(self._request(offered))
        pending.put_back(offered[plan.num_batches :])
        self._mover.write_back(*plan.evicted)
        self._mover.fetch(*plan.fetched)
        forwarded = self._mover.to_device(plan.forwarded) if len(plan.forwarded[0]) else None
        batches = [self._stage(lookups) for lookups in offered[: plan.num_batches]]
        return _Chunk(plan, batches, forwarded, self._mover.mark_moved())

    def _complete(self, offered: list[BatchLookups]) -> list[BatchLookups]:
        """Add what others know of batches; here, nobody."""
        return offered

    def _request(self, offered: list[BatchLookups]) -> Request:
        # The rows of the chunk, each once, in the order in which the batches first ask for them; so the first so many
        # of them are what the first so many batches need: as many as were first seen before those batches end.
        cold = [lookups.cold for lookups in offered]
        counts = [lookups.cold_counts for lookups in offered]
        chunk = sort_lookups(np.concatenate(cold))
        first_sights = chunk.order[chunk.starts]
        by_first_sight = np.argsort(first_sights)
        needed = np.searchsorted(first_sights[by_first_sight], np.cumsum([len(rows) for rows in cold]))
        return Request(rows=chunk.unique[by_first_sight], needed=needed, rows_of_batch=cold, lookups_of_batch=counts)

    def _stage(self, lookups: BatchLookups) -> StagedBatch:
        batch, found = lookups.batch, lookups.sorted
        fits_32_bits = found is None and self._rows.positions_fit_32_bits
        positions = lookups.slots.astype(np.int32 if fits_32_bits else np.int64)
        cold_positions = self._placement.positions_of(lookups.cold)
        inverse = lookups.cold_inverse
        positions[lookups.cold_places] = cold_positions if inverse is None else cold_positions[inverse]
        self.lookups += len(lookups.slots if found is None else found.order)
        self.cold_lookups += int(lookups.cold_counts.sum())
        is_value = self._leave_out_padding(batch)
        arrays = {"dense": batch.dense, "labels": batch.labels, "positions": positions}
        if batch.weights is not None:
            arrays["weights"] = batch.weights
        if self._columns is not None:
            arrays["tierless"] = tierless_slots(batch.slots, self._columns)
        if is_value is not None:
            arrays["is_value"] = is_value
        if self._range_of_slot is not None:
            arrays["ranges"] = find_ranges(self._range_of_slot, batch.slots, self._columns)
        if found is not None:
            arrays |= {"inverse": found.inverse, "order": found.order, "starts": found.starts}
        there = dict(zip(arrays, self._mover.to_device(list(arrays.values())), strict=True))
        distinct = None
        if found is not None:
            distinct = Distinct(there.pop("positions"), there["inverse"], there["order"], there["starts"])
        return StagedBatch(
            dense=there["dense"],
            labels=there["labels"],
            is_hot=batch.is_hot,
            positions=there.get("positions"),
            distinct=distinct,
            weights=there.get("weights"),
            tierless=there.get("tierless"),
            divisor=batch.divisor,
            is_value=there.get("is_value"),
            ranges=there.get("ranges"),
        )

    def _leave_out_padding(self, batch: Batch) -> np.ndarray | None:
        """Take padding out of the counts; say which lookups are values, if steps must know. Shape (B, P), bool."""
        if self._padding is None:
            return None
        is_value = self._padding.find_values(batch.slots)
        self.lookups -= self._padding.count(is_value, stop=self._rows.num_rows)
        return is_value if self._padding.is_pooled else None

    # --- main thread ---

    def _activate(self, chunk: _Chunk) -> None:
        if chunk.forwarded is not None:
            self._mover.hand_over(chunk.forwarded)
            self._mover.forward(*chunk.forwarded)
        self._mover.mark_computed()
        for batch in chunk.batches:
            self._mover.hand_over(batch.tensors())


def tierless_slots(slots: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Give the slots of the columns that look up no row in tiers. Shape (B, J), int64."""
    return np.delete(slots, columns, axis=1).astype(np.int64)


def find_ranges(range_of_slot: np.ndarray, slots: np.ndarray, columns: np.ndarray | None) -> np.ndarray:
    """Say which range of its table the row of each lookup in tiers is in. Shape (B, K), uint8."""
    ranges: np.ndarray = range_of_slot[slots if columns is None else slots[:, columns]]
    return ranges


class _SameThread(Executor):
    """Does what it is given at once; what goes wrong comes out with the result, as from a thread."""

    def submit(self, work: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        done: Future[Any] = Future()
        try:
            done.set_result(work(*args, **kwargs))
        except Exception as exc:
            done.set_exception(exc)
        return done


class _Pending:
    """Batches not yet planned; those a full staging half turned away come first."""

    def __init__(self, batches: Iterator[BatchLookups]) -> None:
        self._batches = batches
        self._returned: list[BatchLookups] = []

    def take(self, count: int) -> list[BatchLookups]:
        """Up to `count` batches."""
        taken, self._returned = self._returned[:count], self._returned[count:]
        while len(taken) < count and (batch := next(self._batches, None)) is not None:
            taken.append(batch)
        return taken

    def put_back(self, batches: list[BatchLookups]) -> None:
        """Return batches to the front."""
        self._returned = batches + self._returned
