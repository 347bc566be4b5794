"""Tables trained on the grid they will be stored on, while their rows live in tiers.

Each table on few bits has one symmetric scale, or one per row. Looked-up rows are rounded to the grid before the model
sees them, and gradients pass straight through to the fp32 master rows, which stay in the tiers. So the scheme knows
nothing of placement, and all placements still give the same model.

**A scale per row** is max|w| / n of the row, n = 2^(bits-1) - 1, computed at every lookup: always exact.

**A scale per table** is max|w| / n of the table. Reading a table of a billion rows every 200 steps is no option, nor is
reading rows that are on their way between tiers. Therefore

    before training and after it   max|w| is that of the whole table, exactly, from one pass over it
    every `period` steps           max|w| is the largest weight seen so far: of the whole table at the start, and
                                   since then of every row at every lookup
    before steps 1, 2, 4, 8, ...   the same, until the period is over: weights outgrow their initial values within a
                                   few steps, and would saturate until the first refresh

So at a refresh no row saturates at the value it was last looked up with; what its last update added counts from its
next lookup. Seen weights are never forgotten during training: a table whose weights shrink keeps a coarser grid than
it needs until training ends. The cost is that of the lookups, whatever the size of the table.

A table may be cut into ranges of rows with as many grids, each with bits and a scale of its own, and all that is said
of a table here holds for a range. Lookups then bring along which range their row is in. Of the rows of a range perhaps
only the last so many values are stored: the others get no gradient, so they stay at the zero they start at.

Shape suffixes: B batch, K columns, D embedding_dim.

Source: DQRM (Zhou et al., 2024) for the scheme, which reads whole tables.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from slipstream.embedding.quantized.numbers import (
    SMALLEST_ABS_MAX,
    check_bits,
    max_level,
    on_grid,
    on_grids,
    scale_for,
)
from slipstream.schema import TableScale

Bits = int
"""16, 8, 4 or 2, or 0 for a table that is not rounded."""

_SEVERAL: Bits = -1
"""Stands for the bits of a table that has several grids."""


class RowGrids:
    """Scales of tables, and the rounding of what was looked up in them.

    Args:
        bits: Of each grid, that is of each table or range of one, 0 for fp32.
        periods: Training steps between refreshes of each grid's scale, >= 1.
        scales_per: "table" or "row", for each grid.
        grid_of_column: Grid of the table that each column looks up, the first one if it has several. Shape (K,).
        columns_with_ranges: Columns that look up tables with several grids.
        values: How many values of a row each grid stores, the last ones; None for all. Only tables that such columns
            look up may leave some out. Left out, all grids store all.
        device: Where lookups are.
    """

    def __init__(
        self,
        *,
        bits: Sequence[Bits],
        periods: Sequence[int],
        scales_per: Sequence[TableScale],
        grid_of_column: Sequence[int],
        columns_with_ranges: Sequence[int] = (),
        values: Sequence[int | None] = (),
        device: torch.device,
    ) -> None:
        for width in bits:
            if width:
                check_bits(width)
        if min(periods, default=1) < 1:
            raise ValueError(f"expected periods of at least 1 step, found {min(periods)}")
        self.bits = list(bits)
        is_whole = [bool(width) and per == "table" for width, per in zip(bits, scales_per, strict=True)]
        self.is_scaled_as_a_whole = is_whole
        self.num_steps = 0
        self.scale = torch.ones(len(self.bits), device=device)
        """Step between two levels, in force. Shape (grids,)."""
        self.peak = torch.zeros(len(self.bits), device=device)
        """Largest |w| seen. Shape (grids,)."""
        self._levels = torch.tensor([max_level(width) if width else 1 for width in bits], device=device)
        self._grid_of_column = torch.tensor(grid_of_column, dtype=torch.int64, device=device)
        whole = [grid for grid, is_one in enumerate(is_whole) if is_one]
        self._due = {
            period: torch.tensor([grid for grid in whole if periods[grid] == period], device=device)
            for period in {periods[grid] for grid in whole}
        }
        self._most_values: Tensor | None = None
        if any(count is not None for count in values):
            most = torch.iinfo(torch.int32).max
            self._most_values = torch.tensor([most if count is None else count for count in values], device=device)
        # columns whose tables are alike are rounded together; those of several grids are a kind of their own
        kinds = [
            (_SEVERAL if column in columns_with_ranges else bits[grid], is_whole[grid])
            for column, grid in enumerate(grid_of_column)
        ]
        self._columns = {
            kind: torch.tensor([column for column, one in enumerate(kinds) if one == kind], device=device)
            for kind in sorted({kind for kind in kinds if kind[0]})
        }

    def set_abs_max(self, abs_max: Tensor) -> None:
        """Set scales from the largest |w| of every grid's rows, known exactly. Shape (grids,)."""
        self.peak.copy_(abs_max)
        self.scale.copy_(self._scale_for(self.peak, self._levels))

    def begin_step(self) -> None:
        """Count a training step, and refresh the scales that are due before it. Nothing waits for the device."""
        for period in self.due_periods():
            grids = self._due[period]
            peak, levels = self.peak.index_select(0, grids), self._levels.index_select(0, grids)
            self.scale.index_copy_(0, grids, self._scale_for(peak, levels))
        self.num_steps += 1

    def due_periods(self) -> list[int]:
        """Give the periods of the grids whose scale the next step refreshes."""
        number = self.num_steps
        is_power_of_two = number & (number - 1) == 0
        return [
            period for period in self._due if number and (number % period == 0 or (number < period and is_power_of_two))
        ]

    def train(self, looked_up_BKD: Tensor, ranges_BK: Tensor | None = None) -> Tensor:
        """Note the largest weights, and round. The gradient passes as if nothing had happened.

        In place on fixed tensors, so that it can be captured in a CUDA graph.

        Args:
            looked_up_BKD: Rows as they were looked up.
            ranges_BK: Range of its table that each is in, uint8; None where no table has several.
        """
        with torch.no_grad():
            for (width, is_whole), columns in self._columns.items():
                if not is_whole:
                    continue
                rows = self._pick(looked_up_BKD, columns)
                if width == _SEVERAL:
                    largest, grids = _abs_max(rows).flatten(), self._grids_of(ranges_BK, columns).flatten()
                else:
                    flat = rows.reshape(len(rows), -1)
                    largest = torch.maximum(flat.amax(0), flat.amin(0).neg_()).view(len(columns), -1).amax(1)
                    grids = self._grid_of_column.index_select(0, columns)
                self.peak.scatter_reduce_(0, grids, largest, "amax")
        rounded: Tensor = _StraightThrough.apply(looked_up_BKD, ranges_BK, self)
        return rounded

    def round(self, looked_up_BKD: Tensor, ranges_BK: Tensor | None = None) -> Tensor:
        """Give the rows as they would be stored: equal to the bit to quantised and dequantised ones.

        Args:
            looked_up_BKD: As for `train`.
            ranges_BK: As there.
        """
        rounded = looked_up_BKD
        for (width, is_whole), columns in self._columns.items():
            rows = self._pick(looked_up_BKD, columns)
            if width == _SEVERAL:
                part = self._round_each(rows, self._grids_of(ranges_BK, columns), is_whole)
            else:
                part = on_grid(rows, self._scale_of(rows, columns, width, is_whole), width)
            if rows is looked_up_BKD:
                return part
            rounded = rounded.index_copy(1, columns, part)
        return rounded

    def mask_gradient(self, gradient_BKD: Tensor, ranges_BK: Tensor | None) -> Tensor:
        """Leave out the gradient of values that are not stored."""
        if self._most_values is None:
            return gradient_BKD
        dim = gradient_BKD.shape[-1]
        # counted from the end of a row: 1 is its last value
        from_end = torch.arange(dim, 0, -1, device=gradient_BKD.device)
        masked = gradient_BKD.clone()
        for (width, _), columns in self._columns.items():
            if width == _SEVERAL:
                stored = self._most_values[self._grids_of(ranges_BK, columns)]
                part = gradient_BKD.index_select(1, columns).masked_fill(from_end > stored.unsqueeze(-1), 0.0)
                masked.index_copy_(1, columns, part)
        return masked

    def _scale_of(self, rows: Tensor, columns: Tensor, width: int, is_whole: bool) -> Tensor:
        """Give the steps between levels for looked-up rows: (K, 1) of tables, or (B, K, 1) of rows."""
        if is_whole:
            grids = self._grid_of_column.index_select(0, columns)
            return self.scale.index_select(0, grids).unsqueeze(1)
        return scale_for(_abs_max(rows).unsqueeze(-1), width)

    def _round_each(self, rows: Tensor, grids: Tensor, is_whole: bool) -> Tensor:
        """Round rows of several grids, each to its own. (B, K, D) and (B, K) -> (B, K, D)."""
        levels = self._levels[grids]
        scale = self.scale[grids] if is_whole else self._scale_for(_abs_max(rows), levels)
        return on_grids(rows, scale.unsqueeze(-1), levels.unsqueeze(-1).to(rows.dtype))

    def _grids_of(self, ranges_BK: Tensor | None, columns: Tensor) -> Tensor:
        """Give the grid of each lookup of some columns. Shape (B, columns), int64."""
        assert ranges_BK is not None
        return self._grid_of_column.index_select(0, columns) + ranges_BK.index_select(1, columns)

    @staticmethod
    def _pick(looked_up_BKD: Tensor, columns: Tensor) -> Tensor:
        return looked_up_BKD if len(columns) == looked_up_BKD.shape[1] else looked_up_BKD.index_select(1, columns)

    @staticmethod
    def _scale_for(abs_max: Tensor, levels: Tensor) -> Tensor:
        return abs_max.clamp(min=SMALLEST_ABS_MAX) / levels


def _abs_max(rows: Tensor) -> Tensor:
    """Largest |w| of each row. (..., D) -> (...)."""
    return torch.maximum(rows.amax(-1), -rows.amin(-1))


class _StraightThrough(torch.autograd.Function):
    """Rounding forward, identity backward."""

    @staticmethod
    def forward(ctx: Any, looked_up: Tensor, ranges: Tensor | None, grids: RowGrids) -> Tensor:
        ctx.grids, ctx.ranges = grids, ranges
        return grids.round(looked_up, ranges)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return ctx.grids.mask_gradient(gradient, ctx.ranges), None, None
