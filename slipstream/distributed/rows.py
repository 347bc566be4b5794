"""The cold tier in shards: cold row i lives on the host of rank i mod R, as its row i // R there.

The buffer is the same on every rank. To fetch rows all ranks gather them from their owners; to write them back nothing
is sent, for the owner has them in its own buffer.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from slipstream.distributed.ranks import Ranks
from slipstream.embedding.tiers.frozen import FrozenRows
from slipstream.embedding.tiers.rows import TieredRows
from slipstream.embedding.tiers.transfer import RowMover


class ShardedRows(TieredRows):
    """All rows of all tables: hot ones on every rank, each cold one on one.

    What asks for rows by slot is to be called on all ranks, with the same slots.

    Args:
        ranks: Who shares the cold tier.
        **options: Of `TieredRows`.
    """

    def __init__(self, *, ranks: Ranks, **options: Any) -> None:
        self.ranks = ranks
        super().__init__(**options)

    def count_cold_here(self) -> int:
        """Count the cold rows that live with this process."""
        # of 0 to C - 1, those that leave this rank as the remainder
        return (self.num_cold - self.ranks.rank + self.ranks.size - 1) // self.ranks.size

    def choose_own(self, cold: np.ndarray, *along: np.ndarray) -> tuple[np.ndarray, ...]:
        """Give the cold rows that live here, by their number here, and what goes along with them."""
        own = cold % self.ranks.size == self.ranks.rank
        return cold[own] // self.ranks.size, *(values[own] for values in along)

    def cold_places(self, start: int, stop: int) -> tuple[slice, slice]:
        """Give where rows from `start` to `stop` of the whole cold tier are here, and which of them those are."""
        size = self.ranks.size
        first = start + (self.ranks.rank - start) % size
        count = max(0, -(-(stop - first) // size))
        return slice(first // size, first // size + count), slice(first - start, stop - start, size)

    def load(self, slots: Tensor, weights: Tensor, state: Sequence[Tensor] = ()) -> None:
        """Put rows where they live. No chunk may be at work; as in `TieredRows`."""
        cold = slots - self.num_hot
        is_here = (cold < 0) | (cold % self.ranks.size == self.ranks.rank)
        here = torch.where(cold < 0, slots, self.num_hot + cold // self.ranks.size)[is_here]
        super().load(here, weights[is_here], [values[is_here] for values in state])

    def read_cold(self, host: Tensor, cold: Tensor) -> Tensor:
        """Read rows of the cold tier, or what travels with them, from whichever rank has them; on all ranks at once.

        Args:
            host: This rank's shard.
            cold: Rows of the whole tier, the same on all ranks. Shape (n,), integer.

        Returns:
            Shape (n, …).
        """
        owners = cold % self.ranks.size
        own = (cold[owners == self.ranks.rank] // self.ranks.size).long()
        sizes = torch.bincount(owners, minlength=self.ranks.size).tolist()
        pieces = self.ranks.gather_uneven(host.index_select(0, own), sizes, "rows to predict from", lane="control")
        rows = host.new_empty(len(cold), *host.shape[1:])
        for rank, piece in enumerate(pieces):
            rows[owners == rank] = piece
        return rows


class ShardedMover(RowMover):
    """Moves rows between the replicated buffer and the shards; all ranks make the same moves.

    Args:
        rows: The tiers.
    """

    def __init__(self, rows: ShardedRows) -> None:
        super().__init__(rows)
        self._sharded, self._ranks = rows, rows.ranks

    def fetch(self, cold: np.ndarray, positions: np.ndarray) -> None:
        """Copy cold rows into the buffer, after the computation marked last. Both arguments have shape (n,)."""
        if not len(cold):
            return
        ranks, pairs = self._ranks, self._sharded.pairs
        owners = cold % ranks.size
        by_owner = np.argsort(owners, kind="stable")  # rows arrive owner by owner, those of one in the order given
        own, _ = self._sharded.choose_own(cold, positions)
        mine = torch.from_numpy(own.astype(np.int64, copy=False))
        # a row and its state travel side by side
        widths = [math.prod(host.shape[1:]) for _, host in pairs]
        own_rows = [host.index_select(0, mine) for _, host in pairs]
        rows = torch.cat([one.view(len(mine), width) for one, width in zip(own_rows, widths, strict=True)], dim=1)
        sizes = np.bincount(owners, minlength=ranks.size).tolist()
        arrived = torch.cat(ranks.gather_uneven(rows, sizes, "cold rows", lane="ahead"))
        self.bytes_to_device += len(cold) * self._sharded.row_bytes
        (targets,) = self.to_device([positions[by_owner].astype(np.int64, copy=False)])
        with self.beside_computation():
            for (buffer, _), values in zip(pairs, torch.split(arrived, widths, dim=1), strict=True):
                buffer.index_copy_(0, targets, values.reshape(len(cold), *buffer.shape[1:]).to(buffer.device))

    def write_back(self, cold: np.ndarray, positions: np.ndarray) -> None:
        """Copy those rows of the buffer that live here to the cold tier, as the computation marked last leaves them.

        Args:
            cold: Rows of the cold tier. Shape (n,).
            positions: Where they are in the buffer. Shape (n,).
        """
        super().write_back(*self._sharded.choose_own(cold, positions))


class ShardedTier:
    """The frozen cold tier of all ranks: the first reads it in order, the others send what it asks for.

    Args:
        ranks: Who has it.
        tiers: This rank's shard of every tensor that travels with a row.
        num_rows: Of the whole tier.
    """

    def __init__(self, ranks: Ranks, tiers: Sequence[FrozenRows], num_rows: int) -> None:
        self._ranks, self._tiers, self._num_rows = ranks, tiers, num_rows
        self._most = -(-num_rows // ranks.size)  # rows of the largest shard
        self._left = sum(len(range(0, self._most, frozen.block_rows)) for frozen in tiers)

    def read(self, index: int) -> Iterator[np.ndarray]:
        """Give the rows of a tensor in order, a block at a time; on the first rank, tensor after tensor."""
        ranks = self._ranks
        for start, own in self._blocks(index):
            self._left -= 1
            ranks.hear_from_first(True, "checkpoints", lane="files")
            pieces = ranks.send_to_first(own, "checkpoints", lane="files")
            # row i of rank r is row i · R + r of all: side by side, and then one after the other
            block = torch.stack(pieces, dim=1).flatten(end_dim=1)
            yield block[: self._num_rows - start * ranks.size].numpy()

    def dismiss(self) -> None:
        """Tell the others that nothing more is asked for; on the first rank."""
        if self._left:
            self._ranks.hear_from_first(False, "checkpoints", lane="files")
            self._left = 0

    def serve(self) -> None:
        """Send what the first rank asks for, until it has all or wants no more."""
        for index in range(len(self._tiers)):
            for _, own in self._blocks(index):
                if not self._ranks.hear_from_first(False, "checkpoints", lane="files"):
                    return
                self._ranks.send_to_first(own, "checkpoints", lane="files")

    def _blocks(self, index: int) -> Iterator[tuple[int, Tensor]]:
        """(first row, rows filled up to one shape on all ranks) of each block of a shard."""
        frozen = self._tiers[index]
        own = frozen.blocks()
        for start in range(0, self._most, frozen.block_rows):
            block = torch.zeros(min(frozen.block_rows, self._most - start), *frozen.shape[1:], dtype=frozen.dtype)
            if start < frozen.shape[0]:  # a smaller shard can end a block earlier
                values = next(own)
                block[: len(values)] = torch.from_numpy(values)
            yield start, block
