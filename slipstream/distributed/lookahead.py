"""Look-ahead on several ranks: each finds the distinct rows of its part, and tells the others ahead of time.

All ranks draw the same batches. Each sorts the lookups of its own part only; the distinct slots travel as int32, once
for the batches of a chunk, before the first of them computes. So every rank knows which cold rows to fetch, and which
rows the gradients that it will receive belong to.

Before the slots, ranks tell each other what batches they mean, as a chain of hashes: one that would train on something
else is found there, not by a collective that never ends.

Shape suffixes: B batch, T tables, U distinct rows of all ranks, u distinct rows of one rank.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
import xxhash

from slipstream.distributed.ranks import Ranks
from slipstream.distributed.rows import ShardedMover, ShardedRows
from slipstream.embedding.duplicates import sort_lookups
from slipstream.embedding.tiers.lookahead import Batch, BatchLookups, BatchPart, LookAhead, StagedBatch
from slipstream.embedding.tiers.padding import PaddedColumns
from slipstream.embedding.tiers.placement import CachedRows, Placement

_HASH_BITS = 63


@dataclass(frozen=True, kw_only=True, slots=True)
class PartLookups(BatchLookups):
    """This rank's part of a batch, whose cold rows are known: `cold` has those of all ranks once `union` is there."""

    num_samples: int
    """Of the whole batch."""
    num_lookups: int
    """Of the whole batch."""
    num_cold_lookups: int = 0
    """Those of them that go to cold rows, once `union` is there."""
    digest: int
    """Of the whole batch."""
    union: np.ndarray | None = None
    """Distinct slots of all ranks, ascending. Shape (U,)."""
    places: tuple[np.ndarray, ...] = ()
    """Where the distinct slots of each rank stand in `union`. Shapes (u,), int32."""


class SharedLookAhead(LookAhead):
    """Runs the parts of batches through a step with the rows of the whole batches on the device.

    Args:
        rows: The tiers.
        placement: Decides where cold rows sit; the same on all ranks, for it is asked the same.
        chunk_batches: Batches per chunk, at most.
        columns: Columns of a batch's slots whose rows have tiers; None for all.
        padding: Columns that may hold padding, which counts as no lookup; None for none.
    """

    def __init__(
        self,
        rows: ShardedRows,
        placement: Placement,
        *,
        chunk_batches: int,
        columns: np.ndarray | None = None,
        padding: PaddedColumns | None = None,
    ) -> None:
        super().__init__(
            rows,
            placement,
            chunk_batches=chunk_batches,
            columns=columns,
            padding=padding,
            sorts_all=True,
            mover=ShardedMover(rows),
        )
        self._ranks: Ranks = rows.ranks
        self._tells_counts = isinstance(placement, CachedRows)  # a cache goes by how often rows are looked up
        self._chain = 0

    def _find_cold(self, batch: Batch) -> PartLookups:
        mine = self._ranks.own_part(len(batch))
        part = replace(
            batch,
            dense=batch.dense[mine],
            slots=batch.slots[mine],
            labels=batch.labels[mine],
            weights=None if batch.weights is None else batch.weights[mine],
        )
        own = super()._find_cold(part)
        num_columns = batch.slots.shape[1] if self._columns is None else len(self._columns)
        return PartLookups(
            own.batch,
            own.slots,
            own.cold_places,
            own.cold,
            own.cold_counts,
            own.cold_inverse,
            own.sorted,
            num_samples=len(batch),
            num_lookups=len(batch) * num_columns - self._count_padding(batch),
            digest=_digest(batch),
        )

    def _complete(self, offered: list[BatchLookups]) -> list[BatchLookups]:
        """Add the distinct rows of the other ranks."""
        parts = [one for one in offered if isinstance(one, PartLookups)]
        known, new = [one for one in parts if one.union is not None], [one for one in parts if one.union is None]
        numbers = self._agree_on(new)
        if not new:
            return [*known]
        every = self._gather_slots(new, sizes=numbers[:, 0])
        cold = numbers[:, 1].sum(axis=0).tolist()
        return [
            *known,
            *(
                self._unite(one, of_ranks, num_cold_lookups=count)
                for one, of_ranks, count in zip(new, every, cold, strict=True)
            ),
        ]

    def _agree_on(self, new: list[PartLookups]) -> np.ndarray:
        """Make sure that all ranks mean the same batches.

        Returns:
            Distinct rows, and lookups of cold ones, of each rank in each batch. Shape (R, 2, batches), int64.

        Raises:
            TrainingError: They do not, on all ranks.
        """
        for one in new:
            self._chain = xxhash.xxh3_64_intdigest(b"%d %d" % (self._chain, one.digest)) >> (64 - _HASH_BITS)
        said = torch.zeros(2 + 2 * self._chunk_batches, dtype=torch.int64)
        said[:2] = torch.tensor([len(new), self._chain])
        of_batches = said[2:].view(2, -1)[:, : len(new)]
        of_batches[0] = torch.tensor([len(one.slots) for one in new], dtype=torch.int64)
        of_batches[1] = torch.tensor([int(one.cold_counts.sum()) for one in new], dtype=torch.int64)
        found = self._ranks.gather(said, "what batches come next", lane="ahead")
        self._ranks.refuse_difference(found[:, :2].tolist(), "samples to train on next")
        return found[:, 2:].view(self._ranks.size, 2, -1)[..., : len(new)].numpy()

    def _gather_slots(
        self, new: list[PartLookups], *, sizes: np.ndarray
    ) -> list[list[tuple[np.ndarray, np.ndarray | None]]]:
        """Give (distinct slots, how often each is looked up or None) of every rank, batch by batch."""
        numbers = [one.slots for one in new]
        if self._tells_counts:
            numbers += [_counts(one).astype(one.slots.dtype) for one in new]
        times = 2 if self._tells_counts else 1
        totals = (times * sizes.sum(axis=1)).tolist()
        mine = torch.from_numpy(np.concatenate(numbers))
        arrived = self._ranks.gather_uneven(mine, totals, "distinct rows", lane="ahead")
        every: list[list[tuple[np.ndarray, np.ndarray | None]]] = [[] for _ in new]
        for of_batches, received in zip(sizes, arrived, strict=True):
            ends = np.cumsum(np.tile(of_batches, times))[:-1]
            pieces = np.split(received.numpy(), ends)
            for at in range(len(new)):
                every[at].append((pieces[at], pieces[len(new) + at] if self._tells_counts else None))
        return every

    def _unite(
        self, one: PartLookups, of_ranks: list[tuple[np.ndarray, np.ndarray | None]], *, num_cold_lookups: int
    ) -> PartLookups:
        # The lists of the ranks end to end, sorted: `inverse` then says of every entry where it stands among the
        # distinct slots, and cut where the lists end it says so rank by rank.
        slots = np.concatenate([slots for slots, _ in of_ranks])
        found = sort_lookups(slots)
        places = np.split(found.inverse, np.cumsum([len(slots) for slots, _ in of_ranks])[:-1])
        first_cold = int(np.searchsorted(found.unique, self._rows.num_hot))
        cold = found.unique[first_cold:] - self._rows.num_hot
        counts = np.ones(len(cold), np.int64)
        if self._tells_counts:
            told = np.concatenate([counts for _, counts in of_ranks if counts is not None])
            counts = np.bincount(found.inverse, weights=told, minlength=len(found.unique))[first_cold:].astype(np.int64)
            self._count_no_padding(cold, counts)
        return replace(
            one,
            cold=cold,
            cold_counts=counts,
            union=found.unique,
            places=tuple(places),
            num_cold_lookups=num_cold_lookups,
        )

    def _count_padding(self, batch: Batch) -> int:
        """Count the lookups of a batch that are none, in tables with tiers."""
        if self._padding is None:
            return 0
        return self._padding.count(self._padding.find_values(batch.slots), stop=self._rows.num_rows)

    def _stage(self, lookups: BatchLookups) -> StagedBatch:
        assert isinstance(lookups, PartLookups) and lookups.union is not None and lookups.sorted is not None
        own_cold = lookups.slots[lookups.cold_places] - self._rows.num_hot
        own_counts = lookups.sorted.counts()[lookups.cold_places]
        counted = self.lookups + lookups.num_lookups, self.cold_lookups + lookups.num_cold_lookups
        part = super()._stage(replace(lookups, cold=own_cold, cold_counts=own_counts))
        self.lookups, self.cold_lookups = counted
        positions = lookups.union.astype(np.int64)
        is_cold = positions >= self._rows.num_hot
        positions[is_cold] = self._placement.positions_of(lookups.cold)
        rows, *places = self._mover.to_device([positions, *lookups.places])
        whole = BatchPart(num_samples=lookups.num_samples, rows=rows, places=places)
        return replace(part, part=whole)


def _counts(one: PartLookups) -> np.ndarray:
    assert one.sorted is not None
    return one.sorted.counts()


def _digest(batch: Batch) -> int:
    digest = xxhash.xxh3_64()
    for array in (batch.slots, batch.labels, batch.weights):
        if array is not None:
            digest.update(np.ascontiguousarray(array).view(np.uint8).data)
    return digest.intdigest()
