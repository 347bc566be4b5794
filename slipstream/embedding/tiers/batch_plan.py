"""What a device finds out about a batch from its slots alone, and the moves of rows that follow from it.

All of it in plain PyTorch, in shapes that depend on nothing but the size of a batch, so that a CUDA graph can hold it.
Slots are sorted; then distinct rows stand in ascending order, hot ones before cold ones. The i-th cold one sits at
place i of a staging half for as long as the batch is at work. `slipstream.embedding.tiers.triton_plan` does the
same in Triton without touching what is padding; the two are tested against each other.

Two plans take turns. While the batch of one computes, the other is made for the batch after it, and fetches its cold
rows from the host, except those that the first batch is about to change: these follow within the device, afterwards.

Shape suffixes: V rows of all tables, H hot rows, L lookups of a whole batch, U rows that it can look up at most.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from slipstream.embedding.duplicates import sum_duplicates
from slipstream.embedding.rules import RowOptimizer
from slipstream.embedding.tiers.rows import TieredRows, update_rows


class BatchPlan:
    """Distinct rows of one batch and where each of them is, always in the same memory.

    Args:
        rows: The tiers; their staging area holds two halves of `half_rows(rows, most_distinct)`.
        host: Tensors of `rows.on_host` as the device sees them.
        num_lookups: L.
        most_distinct: U.
        half: Which of the halves is this plan's, 0 or 1.
    """

    def __init__(
        self, rows: TieredRows, host: Sequence[Tensor], *, num_lookups: int, most_distinct: int, half: int
    ) -> None:
        device = rows.device
        slot_type = torch.int32 if rows.num_rows < 2**31 else torch.int64
        self._rows = rows
        leads = [] if rows.buffer_lead is None else [rows.buffer_lead]
        self._pairs = list(zip((rows.buffer, *rows.buffer_state, *leads), host, strict=True))
        self.first_place = rows.num_hot + half * half_rows(rows, most_distinct)
        # one entry more than there can be rows: what is no lookup is sorted behind them all, as if it were one
        length = min(num_lookups, most_distinct) + 1
        self.slots = torch.full((num_lookups,), rows.num_rows, dtype=slot_type, device=device)
        """Of each lookup; V where there is none, behind a batch that is short. Shape (L,)."""
        self.distinct = torch.full((length,), rows.num_rows, dtype=slot_type, device=device)
        """Distinct slots, ascending; V behind the last. Shape (U + 1,)."""
        self.positions = torch.full((length,), rows.first_spare, dtype=torch.int64, device=device)
        """Where in the buffer each of them is. Shape (U + 1,)."""
        self.earlier = torch.full((length,), -1, dtype=torch.int64, device=device)
        """Where a cold row stands among the distinct rows of the batch before; -1 where it was fetched."""
        self.inverse = torch.zeros(num_lookups, dtype=torch.int32, device=device)
        """Which of the distinct rows each lookup is of. Shape (L,)."""
        self.order = torch.zeros(num_lookups, dtype=torch.int64, device=device)
        """Lookups by row, those of one row in batch order; what is none comes last. Shape (L,)."""
        self.starts = torch.zeros(length, dtype=torch.int64, device=device)
        """Where in `order` the lookups of each distinct row begin; the number of lookups behind the last."""
        self.sizes = torch.zeros(4, dtype=torch.int64, device=device)
        """Distinct rows, hot ones among them, lookups, those of hot rows."""
        self.totals = torch.zeros(4, dtype=torch.int64, device=device)
        """Of all batches of this plan so far: lookups, those of cold rows, rows fetched, rows written to the host."""
        self._lookup_numbers = torch.arange(length, device=device)

    def use_on(self, stream: torch.cuda.Stream) -> None:
        """Tell the allocator that another stream works with this plan too."""
        for value in vars(self).values():
            if isinstance(value, Tensor):
                value.record_stream(stream)

    def load(self, slots: Tensor) -> None:
        """Take the slots of a batch: of all its lookups, sample by sample. Shape (lookups,)."""
        self.slots[: len(slots)].copy_(slots)
        if len(slots) < len(self.slots):
            self.slots[len(slots) :].fill_(self._rows.num_rows)

    def clear(self) -> None:
        """Have no batch at all."""
        self.slots.fill_(self._rows.num_rows)
        self.distinct.fill_(self._rows.num_rows)
        self.sizes.zero_()

    def counted(self) -> list[int]:
        """Count what all batches of this plan amounted to, as in `totals`; waits for the device."""
        counted: list[int] = self.totals.cpu().tolist()
        return counted

    def forget_counts(self) -> None:
        """Count from zero on."""
        self.totals.zero_()

    def find(self, before: BatchPlan) -> None:
        """Find the distinct rows, where each of them is to be, and which of them the batch before has."""
        num_rows, num_hot = self._rows.num_rows, self._rows.num_hot
        by_slot, order = torch.sort(self.slots, stable=True)
        self.order.copy_(order)
        is_first = torch.ones_like(by_slot, dtype=torch.bool)
        torch.ne(by_slot[1:], by_slot[:-1], out=is_first[1:])
        ranks = is_first.cumsum(0).sub_(1)
        self.inverse.scatter_(0, order, ranks.int())
        self.distinct.fill_(num_rows).scatter_(0, ranks, by_slot)
        self.starts.copy_(torch.searchsorted(by_slot, self.distinct))
        bounds = torch.stack([(self.distinct < limit).sum() for limit in (num_rows, num_hot)])
        self.sizes[:2] = bounds
        self.sizes[2:] = torch.stack([(self.slots < limit).sum() for limit in (num_rows, num_hot)])
        is_cold = self._is_cold()
        places = self._lookup_numbers - bounds[1] + self.first_place
        elsewhere = torch.where(self.distinct < num_hot, self.distinct.long(), self._rows.first_spare)
        self.positions.copy_(torch.where(is_cold, places, elsewhere))
        at = torch.searchsorted(before.distinct, self.distinct).clamp_(max=len(self.distinct) - 1)
        is_shared = is_cold & (before.distinct.index_select(0, at) == self.distinct)
        self.earlier.copy_(torch.where(is_shared, at, -1))

    def fetch(self) -> None:
        """Read cold rows from the host, those that the batch before does not have."""
        rows = self._rows
        is_needed = self._is_cold() & (self.earlier < 0)
        sources = torch.where(is_needed, self.distinct.long() - rows.num_hot, rows.num_cold)
        targets = torch.where(is_needed, self.positions, rows.first_spare + 1)
        for buffer, host in self._pairs:
            buffer.index_copy_(0, targets, host.index_select(0, sources))
        num_distinct, num_hot, num_lookups, num_hot_lookups = self.sizes
        num_cold = num_distinct - num_hot
        self.totals += torch.stack([num_lookups, num_lookups - num_hot_lookups, is_needed.sum(), num_cold])

    def look_up(self, num_lookups: int) -> Tensor:
        """Give the rows of the first lookups. Shape (num_lookups, D)."""
        values = self._rows.buffer.index_select(0, self.positions)
        return values.index_select(0, self.inverse[:num_lookups])

    def sum_by_row(self, per_lookup: Tensor) -> Tensor:
        """Sum what belongs to lookups by distinct row, in batch order. Shapes (lookups, k) and (U + 1, k)."""
        num_lookups = len(per_lookup)
        return sum_duplicates(
            per_lookup,
            self.inverse[:num_lookups],
            len(self.distinct),
            order=self.order[:num_lookups],
            starts=self.starts,
            deterministic=False,
        )

    def update(
        self,
        rule: RowOptimizer,
        gradients: Tensor,
        *,
        lr: Tensor,
        num_steps: Tensor | None = None,
        sample_weights: Tensor | None = None,
    ) -> None:
        """Sum gradients by row, and change every row in the buffer.

        Args:
            rule: Which way rows move.
            gradients: Of the lookups. Shape (lookups, D).
            lr: Learning rate, without dimensions, on the device.
            num_steps: Steps taken, this one included. Shape (), float64.
            sample_weights: m, the weight of the samples behind each distinct row; None is 1. Shape (U + 1,).
        """
        rows = self._rows
        update_rows(
            rule,
            rows.buffer,
            rows.buffer_state,
            self.positions,
            rows.buffer.index_select(0, self.positions),
            self.sum_by_row(gradients),
            lr=lr,
            num_steps=num_steps,
            sample_weights=sample_weights,
        )

    def write_back(self) -> None:
        """Bring everything that the batch has changed of its cold rows to the host."""
        rows = self._rows
        targets = torch.where(self._is_cold(), self.distinct.long() - rows.num_hot, rows.num_cold + 1)
        for buffer, host in self._pairs:
            host.index_copy_(0, targets, buffer.index_select(0, self.positions))

    def take_over(self, before: BatchPlan) -> None:
        """Copy the rows that the batch before has too, once it has changed them."""
        is_shared = self.earlier >= 0
        spare = self._rows.first_spare
        sources = torch.where(is_shared, before.positions.index_select(0, self.earlier.clamp(min=0)), spare)
        targets = torch.where(is_shared, self.positions, spare)
        for buffer, _ in self._pairs:
            buffer.index_copy_(0, targets, buffer.index_select(0, sources))

    def padded_positions(self) -> Tensor:
        """Give the positions of the distinct rows, and spare ones behind the last. Shape (U + 1,)."""
        return self.positions

    def _is_cold(self) -> Tensor:
        return (self.distinct >= self._rows.num_hot) & (self.distinct < self._rows.num_rows)


class OnDevice(Protocol):
    """Samples that are on the device, in the order of batches."""

    def read(self) -> None:
        """Fill the memory that the batch at work is read from."""

    def read_slots(self, slots: Tensor, *, ahead: int) -> None:
        """Write the slots of the batch that is so many ahead of the one at work."""

    def advance(self) -> None:
        """Have the next batch at work."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class RowsInPlace:
    """The rows of a batch at work, and what is to be done beside it for the batch that follows."""

    plan: BatchPlan
    following: BatchPlan
    side: torch.cuda.Stream | None
    """Computes beside the batch; None where there are no streams."""
    num_columns: int
    """Lookups of each sample."""
    samples: OnDevice | None = None
    """Where the device itself takes its samples from; None where the host sends every batch."""

    def begin(self) -> None:
        """Begin to read ahead; before the batch reads anything."""
        if self.samples is not None:
            self.samples.read()
        if self.side is None:
            self._read_ahead()
            return
        self.side.wait_stream(torch.cuda.current_stream(self.plan.slots.device))
        with torch.cuda.stream(self.side):
            self._read_ahead()

    def end(self) -> None:
        """Bring what changed to the host, and let the following batch have what it shares; after the update."""
        if self.side is not None:
            torch.cuda.current_stream(self.plan.slots.device).wait_stream(self.side)
        self.plan.write_back()
        self.following.take_over(self.plan)
        if self.samples is not None:
            self.samples.advance()

    def _read_ahead(self) -> None:
        if self.samples is not None:
            self.samples.read_slots(self.following.slots, ahead=1)
        self.following.find(self.plan)
        self.following.fetch()


def half_rows(rows: TieredRows, most_distinct: int) -> int:
    """Rows that a staging half needs, so that a batch always fits."""
    return min(most_distinct, rows.num_cold)
