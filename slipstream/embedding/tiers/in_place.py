"""Cold rows read and written in place: the host sends slots, and the device does everything else.

The cold tier is page-locked and mapped, so that kernels reach it. While batch n computes, a second stream finds the
distinct rows of batch n+1 and reads those of them that are cold straight from the host into the half of the staging
area that batch n does not use. Rows that batch n is about to change are left out; they follow within the device, once
it has changed them. An update writes a cold row to both tiers, so the host is never behind.

    host            send n+1                | send n+2
    side stream     find n+1, fetch n+1     | find n+2, fetch n+2
    compute stream  compute n, update n     | take over n -> n+1, compute n+1, update n+1

So no row is ever read stale, and none is read while it is written: batch n+1 fetches rows that batch n does not have.
The result equals that of a plain loop, on a CPU to the bit. Both streams fork and join within a step, in fixed shapes
over fixed memory, so that one CUDA graph holds all of it and the host launches nothing else.

Source: the kernels of FBGEMM read rows of host memory the same way ("managed" tables); they do not read ahead.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from slipstream.embedding.tiers.batch_plan import BatchPlan, RowsInPlace
from slipstream.embedding.tiers.frozen import FrozenTiers
from slipstream.embedding.tiers.lookahead import Batch, LookAhead, StagedBatch, find_ranges, tierless_slots
from slipstream.embedding.tiers.padding import PaddedColumns
from slipstream.embedding.tiers.rows import TieredRows
from slipstream.embedding.tiers.sample_ring import SampleRing
from slipstream.embedding.tiers.transfer import RowMover

_NONE = np.empty(0, np.int64)


@dataclass(frozen=True, slots=True)
class _Sent:
    """A batch on its way to the device."""

    batch: Batch
    tensors: dict[str, Tensor]
    moved: torch.cuda.Event | None


class InPlace:
    """Runs batches through a step whose rows the device finds and fetches by itself.

    Args:
        rows: The tiers, with a staging area of two halves that hold a batch each.
        host: Tensors of `rows.on_host` as the device sees them.
        batch_size: Samples of a batch, at most.
        num_columns: Columns of slots that look up rows in tiers.
        most_distinct: How many distinct rows a batch can look up at most.
        columns: Which columns those are; None for all. The others only travel along.
        make_plan: What finds and moves rows: plain PyTorch, or the same in Triton.
    """

    def __init__(
        self,
        rows: TieredRows,
        host: Sequence[Tensor],
        *,
        batch_size: int,
        num_columns: int,
        most_distinct: int,
        columns: np.ndarray | None = None,
        make_plan: type[BatchPlan] = BatchPlan,
    ) -> None:
        self._rows, self._columns = rows, columns
        num_lookups = batch_size * num_columns
        first, second = (
            make_plan(rows, host, num_lookups=num_lookups, most_distinct=most_distinct, half=half) for half in (0, 1)
        )
        side = torch.cuda.Stream(rows.device) if rows.device.type == "cuda" else None
        self.plans = (first, second)
        """What finds and moves the rows of two batches in turn."""
        if side is not None:
            first.use_on(side)
            second.use_on(side)
        self._turns = tuple(
            RowsInPlace(plan=plan, following=following, side=side, num_columns=num_columns)
            for plan, following in ((first, second), (second, first))
        )
        self.padding: PaddedColumns | None = None
        """Columns that may hold padding, which counts as no lookup."""
        self.range_of_slot: np.ndarray | None = None
        """Range of its table that each row is in, if steps must know. Shape (num_rows,), uint8."""
        self.ring: SampleRing | None = None
        """Where the device keeps samples; None where the host sends every batch."""
        self._mover = RowMover(rows)
        self._frozen: FrozenTiers | None = None
        self._before = {"lookups": 0, "cold_lookups": 0, "bytes_to_device": 0, "bytes_to_host": 0}
        self.move_seconds = 0.0
        """Seconds that whoever called `run` spent on sending batches."""
        self.compute_seconds = 0.0
        """Seconds it spent in `step`."""

    def keep_samples(self, ring: SampleRing) -> None:
        """Have the device take its samples from a ring from now on, to which their windows are brought."""
        self.ring = ring
        self._turns = tuple(replace(turn, samples=ring) for turn in self._turns)
        for turn in self._turns:
            if turn.side is not None:
                for tensor in ring.tensors():
                    tensor.record_stream(turn.side)

    @property
    def lookups(self) -> int:
        """Lookups of all batches so far."""
        return self._counted()["lookups"]

    @property
    def cold_lookups(self) -> int:
        """Those that went to rows of the cold tier."""
        return self._counted()["cold_lookups"]

    @property
    def bytes_to_device(self) -> int:
        """Bytes of rows fetched so far."""
        return self._counted()["bytes_to_device"]

    @property
    def bytes_to_host(self) -> int:
        """Bytes of rows written back so far."""
        return self._counted()["bytes_to_host"]

    def run(
        self,
        batches: Iterator[Batch],
        step: Callable[[StagedBatch], None],
        *,
        between_chunks: Callable[[], None] = lambda: None,
    ) -> None:
        """Call `step` with every batch in order, its rows on the device.

        Args:
            batches: In training order.
            step: Calls `begin` and `end` of the batch's `in_place`, and reads and changes rows in between.
            between_chunks: Called before each batch; may call `freeze`.
        """
        began = time.perf_counter()
        self._mover.mark_computed()
        turn, other = self._turns
        if self.ring is not None:
            known = list(batches)
            if known:
                self.ring.lay_out(known, self._mover)
            batches = iter(known)
        now, following = self._send(batches), self._send(batches)
        if now is None:
            return
        other.plan.clear()
        if self.ring is None:
            self._load(turn.plan, now)
        else:
            self.ring.read_slots(turn.plan.slots, ahead=0)
        turn.plan.find(other.plan)
        turn.plan.fetch()
        while now is not None:
            if self.ring is None:
                self._load(other.plan, following)
            self.move_seconds += time.perf_counter() - began
            between_chunks()
            began = time.perf_counter()
            staged = self._stage(now, turn)
            if self._frozen is not None:
                self._frozen.keep_cold(self._cold_rows(now.batch))
                self._frozen.keep_hot(staged.find_positions)
            sent = time.perf_counter()
            self.move_seconds += sent - began
            step(staged)
            began = time.perf_counter()
            self.compute_seconds += began - sent
            now, following = following, self._send(batches)
            turn, other = other, turn
        self.move_seconds += time.perf_counter() - began

    def flush(self) -> None:
        """Wait until both tiers hold the whole model: the host reads the cold one, and the device still writes it."""
        if self._rows.device.type == "cuda":
            done = torch.cuda.Event(blocking=True)
            done.record()
            done.synchronize()

    def counters(self) -> dict[str, float]:
        """Say what it counted so far, for a checkpoint; waits for the device."""
        return {**self._counted(), "move_seconds": self.move_seconds, "compute_seconds": self.compute_seconds}

    def _counted(self) -> dict[str, int]:
        of_plans = [plan.counted() for plan in self.plans]
        lookups, cold_lookups, num_fetched, num_written = (sum(pair) for pair in zip(*of_plans, strict=True))
        if self.ring is not None:
            num_padding, num_cold_padding = self.ring.padding_counted()
            lookups, cold_lookups = lookups - num_padding, cold_lookups - num_cold_padding
        row_bytes = self._rows.row_bytes
        counted = (lookups, cold_lookups, num_fetched * row_bytes, num_written * row_bytes)
        return {name: before + now for (name, before), now in zip(self._before.items(), counted, strict=True)}

    def restore_counters(self, counters: Mapping[str, float]) -> None:
        """Go on counting from a checkpoint."""
        for plan in self.plans:
            plan.forget_counts()
        if self.ring is not None:
            self.ring.forget_counts()
        self._before = {name: int(counters[name]) for name in self._before}
        self.move_seconds = counters.get("move_seconds", 0.0)
        self.compute_seconds = counters.get("compute_seconds", 0.0)

    def freeze(self, clone_to: Path | None = None) -> FrozenTiers:
        """All rows as they are now, to be read while training goes on, until `thaw`; between batches only.

        Args:
            clone_to: As in `FrozenTiers`.
        """
        self.flush()
        self._frozen = FrozenTiers(self._rows, (_NONE, _NONE), clone_to)
        return self._frozen

    def thaw(self) -> None:
        """Forget what `freeze` gave."""
        if self._frozen is not None:
            self._frozen.close()
        self._frozen = None

    def _slots(self, batch: Batch) -> np.ndarray:
        """Of lookups in tiers, sample by sample. Shape (B·K,)."""
        return (batch.slots if self._columns is None else batch.slots[:, self._columns]).ravel()

    def _cold_rows(self, batch: Batch) -> np.ndarray:
        """Rows of the cold tier that a batch is about to change: nobody else on the host knows them."""
        slots = self._slots(batch)
        return np.unique(slots[slots >= self._rows.num_hot]) - self._rows.num_hot

    def _send(self, batches: Iterator[Batch]) -> _Sent | None:
        batch = next(batches, None)
        if batch is None:
            return None
        if self.ring is not None:
            return _Sent(batch, {}, None)
        arrays = {"slots": self._slots(batch), "dense": batch.dense, "labels": batch.labels}
        if batch.weights is not None:
            arrays["weights"] = batch.weights
        if self._columns is not None:
            arrays["tierless"] = tierless_slots(batch.slots, self._columns)
        if self.padding is not None:
            is_value = self.padding.find_values(batch.slots)
            self._leave_out(self.padding, is_value)
            if self.padding.is_pooled:
                arrays["is_value"] = is_value
        if self.range_of_slot is not None:
            arrays["ranges"] = find_ranges(self.range_of_slot, batch.slots, self._columns)
        tensors = dict(zip(arrays, self._mover.to_device(list(arrays.values())), strict=True))
        return _Sent(batch, tensors, self._mover.mark_moved())

    def _leave_out(self, padding: PaddedColumns, is_value: np.ndarray) -> None:
        """Take lookups of padding out of the counts: the device counts all."""
        num_padding = padding.count(is_value, stop=self._rows.num_rows)
        self._before["lookups"] -= num_padding
        self._before["cold_lookups"] -= num_padding - padding.count(is_value, stop=self._rows.num_hot)

    def _load(self, plan: BatchPlan, sent: _Sent | None) -> None:
        """Put the slots of a batch where the device looks for them; those of no batch at all for None."""
        if sent is None:
            plan.clear()
            return
        self._mover.await_moved(sent.moved)
        self._mover.hand_over(list(sent.tensors.values()))
        plan.load(sent.tensors["slots"])

    def _stage(self, sent: _Sent, turn: RowsInPlace) -> StagedBatch:
        if self.ring is not None:
            return self.ring.stage(sent.batch, turn)
        tensors = sent.tensors
        return StagedBatch(
            dense=tensors["dense"],
            labels=tensors["labels"],
            is_hot=sent.batch.is_hot,
            in_place=turn,
            divisor=sent.batch.divisor,
            weights=tensors.get("weights"),
            tierless=tensors.get("tierless"),
            is_value=tensors.get("is_value"),
            ranges=tensors.get("ranges"),
        )


Runner = LookAhead | InPlace
"""Runs batches through a step, their rows on the device."""
