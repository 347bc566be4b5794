"""What `BatchPlan` does, in Triton: nothing is done for padding, and every distinct row is read and written once.

A cold row is read from page-locked host memory and written to it like any other memory; a few programs are enough to
fill the bus, and leave the rest of the device to the matrix products. No two programs write the same place, so there
are no atomic operations, and results repeat to the bit.

Shape suffixes: L lookups, U distinct rows, D embedding_dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from slipstream.embedding.rules import SGD, Adagrad, Adam, RowOptimizer, RowwiseAdagrad
from slipstream.embedding.tiers import finding_kernels, summing_kernels
from slipstream.embedding.tiers.batch_plan import BatchPlan
from slipstream.embedding.tiers.rows import TieredRows

_RULES: dict[type[RowOptimizer], int] = {SGD: 0, RowwiseAdagrad: 1, Adagrad: 2, Adam: 3}
_NUMBERS = {"enable_fp_fusion": False}
"""Products are rounded before they are added, as in plain PyTorch."""
_BLOCK = 1024
_MOVERS = 32
"""Programs that bring rows over the bus: with eight rows each under way, more bytes than it has in flight."""
_UPDATERS = 4096
"""Programs that sum and update, one warp each: as many as a large device holds at once."""
_FEW = 16
"""Lookups that one warp adds at a time."""


def has_kernel(rule: type[RowOptimizer]) -> bool:
    """Whether a rule is among those written here."""
    return rule in _RULES


class TritonPlan(BatchPlan):
    """A `BatchPlan` whose work is proportional to lookups and distinct rows.

    Args:
        rows: As in `BatchPlan`.
        host: As there.
        num_lookups: As there.
        most_distinct: As there.
        half: As there.
    """

    def __init__(
        self, rows: TieredRows, host: Sequence[Tensor], *, num_lookups: int, most_distinct: int, half: int
    ) -> None:
        super().__init__(rows, host, num_lookups=num_lookups, most_distinct=most_distinct, half=half)
        self._fetched_by = torch.zeros(_MOVERS, dtype=torch.int64, device=rows.device)
        self._by_slot = torch.empty_like(self.slots)
        self._partial = self._room_for_partial_sums(rows.embedding_dim)

    def counted(self) -> list[int]:
        """Count what all batches of this plan amounted to; waits for the device."""
        lookups, cold_lookups, _, num_written = super().counted()
        return [lookups, cold_lookups, int(self._fetched_by.sum().cpu()), num_written]

    def forget_counts(self) -> None:
        """Count from zero on."""
        super().forget_counts()
        self._fetched_by.zero_()

    def find(self, before: BatchPlan) -> None:
        """Find the distinct rows, where each of them is to be, and which of them the batch before has."""
        num_lookups = len(self.slots)
        torch.sort(self.slots, stable=True, out=(self._by_slot, self.order))
        by_slot = self._by_slot
        is_new = torch.ne(by_slot[1:], by_slot[:-1])
        ranks = is_new.cumsum(0, dtype=torch.int32)
        finding_kernels.note_runs[(triton.cdiv(num_lookups + 1, _BLOCK),)](
            by_slot,
            self.order,
            ranks,
            self.inverse,
            self.distinct,
            self.starts,
            self.sizes,
            num_lookups,
            self._rows.num_rows,
            self._rows.num_hot,
            BLOCK=_BLOCK,
            **_NUMBERS,
        )
        finding_kernels.place[(min(_UPDATERS, triton.cdiv(len(self.distinct), _BLOCK)),)](
            self.distinct,
            self.sizes,
            before.distinct,
            before.sizes,
            self.positions,
            self.earlier,
            self._rows.num_hot,
            self.first_place,
            STEPS=len(self.distinct).bit_length(),
            BLOCK=_BLOCK,
            **_NUMBERS,
        )

    def fetch(self) -> None:
        """Read cold rows from the host, those that the batch before does not have."""
        for at, (buffer, host) in enumerate(self._pairs):
            dim, block, width = _shape_of_rows(buffer)
            finding_kernels.fetch[(_MOVERS,)](
                host,
                buffer,
                self.distinct,
                self.positions,
                self.earlier,
                self.sizes,
                self.totals,
                self._fetched_by,
                self._rows.num_hot,
                dim,
                COUNTS=at == 0,
                ROWS=block,
                WIDTH=width,
                **_NUMBERS,
            )

    def look_up(self, num_lookups: int) -> Tensor:
        """Give the rows of the first lookups. Shape (num_lookups, D)."""
        buffer = self._rows.buffer
        looked_up = buffer.new_empty(num_lookups, buffer.shape[1])
        dim, _, width = _shape_of_rows(buffer)
        block = max(1, 2048 // width)
        summing_kernels.spread[(triton.cdiv(num_lookups, block),)](
            buffer,
            self.order,
            self.inverse,
            self.positions,
            self.sizes,
            looked_up,
            dim,
            ROWS=block,
            WIDTH=width,
            **_NUMBERS,
        )
        return looked_up

    def sum_by_row(self, per_lookup: Tensor) -> Tensor:
        """Sum what belongs to lookups by distinct row; rows behind the last are undefined. Shape (U + 1, k)."""
        summed = per_lookup.new_empty(len(self.distinct), per_lookup.shape[1])
        partial = self._room_for_partial_sums(per_lookup.shape[1])
        self._sum_long_runs(per_lookup, partial)
        dim, _, width = _shape_of_rows(per_lookup)
        summing_kernels.sum_runs[(self._num_updaters(),)](
            per_lookup,
            partial,
            self.order,
            self.starts,
            self.sizes,
            summed,
            dim,
            TILE=_tile(dim),
            FEW=_FEW,
            WIDTH=width,
            num_warps=1,
            **_NUMBERS,
        )
        return summed

    def update(
        self,
        rule: RowOptimizer,
        gradients: Tensor,
        *,
        lr: Tensor,
        num_steps: Tensor | None = None,
        sample_weights: Tensor | None = None,
    ) -> None:
        """Sum gradients by row, and change every row where it lives, on the device and on the host.

        Args:
            rule: One of those that `has_kernel` knows.
            gradients: Of the lookups. Shape (lookups, D).
            lr: Learning rate, without dimensions, on the device.
            num_steps: Steps taken, this one included. Shape (), float64.
            sample_weights: As in `BatchPlan.update`.
        """
        gradients = gradients.contiguous()
        self._sum_long_runs(gradients, self._partial)
        buffers, hosts = zip(*self._pairs, strict=True)
        dim, _, width = _shape_of_rows(gradients)
        nothing: Any = gradients
        correction = nothing
        if isinstance(rule, Adam):
            assert num_steps is not None
            correction = rule.correction(num_steps).float()
        num_kept = len(self._rows.buffer_state)
        device_state, host_state = ([*tensors[1 : 1 + num_kept], nothing, nothing] for tensors in (buffers, hosts))
        summing_kernels.sum_and_update[(self._num_updaters(),)](
            gradients,
            self._partial,
            self.order,
            self.starts,
            self.sizes,
            self.distinct,
            self.positions,
            buffers[0],
            hosts[0],
            device_state[0],
            host_state[0],
            device_state[1],
            host_state[1],
            nothing if sample_weights is None else sample_weights,
            lr,
            correction,
            self._rows.num_hot,
            dim,
            rule.eps,
            1 - rule.betas[0],
            1 - rule.betas[1],
            RULE=_RULES[type(rule)],
            HAS_WEIGHTS=sample_weights is not None,
            TILE=_tile(dim),
            FEW=_FEW,
            WIDTH=width,
            num_warps=1,
            **_NUMBERS,
        )

    def write_back(self) -> None:
        """Bring what `update` knows nothing of to the host: the leads of rows over their means."""
        for buffer, host in self._pairs[1 + len(self._rows.buffer_state) :]:
            dim, block, width = _shape_of_rows(buffer)
            finding_kernels.write_back[(_MOVERS,)](
                buffer,
                host,
                self.distinct,
                self.positions,
                self.sizes,
                self._rows.num_hot,
                dim,
                ROWS=block,
                WIDTH=width,
                **_NUMBERS,
            )

    def take_over(self, before: BatchPlan) -> None:
        """Copy the rows that the batch before has too, once it has changed them."""
        for buffer, _ in self._pairs:
            dim, block, width = _shape_of_rows(buffer)
            finding_kernels.take_over[(_MOVERS,)](
                buffer,
                self.positions,
                self.earlier,
                self.sizes,
                before.positions,
                dim,
                ROWS=block,
                WIDTH=width,
                **_NUMBERS,
            )

    def padded_positions(self) -> Tensor:
        """Give the positions of the distinct rows, and spare ones behind the last. Shape (U + 1,)."""
        return torch.where(self._lookup_numbers < self.sizes[0], self.positions, self._rows.first_spare)

    def _sum_long_runs(self, per_lookup: Tensor, partial: Tensor) -> None:
        dim, _, width = _shape_of_rows(per_lookup)
        tile = _tile(dim)
        summing_kernels.sum_tiles[(triton.cdiv(len(per_lookup), tile),)](
            per_lookup,
            partial,
            self.order,
            self.inverse,
            self.starts,
            self.sizes,
            dim,
            TILE=tile,
            WIDTH=width,
            **_NUMBERS,
        )

    def _room_for_partial_sums(self, dim: int) -> Tensor:
        return torch.empty(2 * triton.cdiv(len(self.slots), _tile(dim)), dim, device=self.slots.device)

    def _num_updaters(self) -> int:
        return min(_UPDATERS, len(self.distinct))


def _tile(dim: int) -> int:
    """Sorted lookups that are summed together, a power of two."""
    width: int = triton.next_power_of_2(dim)
    return min(64, max(16, 8192 // width))


def _shape_of_rows(rows: Tensor) -> tuple[int, int, int]:
    """(columns, rows that one program moves at a time, columns rounded up to a power of two)."""
    dim = rows.shape[1] if rows.dim() > 1 else 1
    width = triton.next_power_of_2(dim)
    return dim, 8 if width > 1 else 128, width
