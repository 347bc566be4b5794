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

Shape suffixes: B batch, K columns, D embedding_dim.

Source: DQRM (Zhou et al., 2024) for the scheme, which reads whole tables.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from slipstream.embedding.quantized.numbers import SMALLEST_ABS_MAX, check_bits, max_level, on_grid, scale_for
from slipstream.schema import TableScale

Bits = int
"""16, 8, 4 or 2, or 0 for a table that is not rounded."""


class RowGrids:
    """Scales of tables, and the rounding of what was looked up in them.

    Args:
        bits: Of each table, 0 for fp32.
        periods: Training steps between refreshes of each table's scale, >= 1.
        scales_per: "table" or "row", for each table.
        table_of_column: Table that each column looks up. Shape (K,).
        device: Where lookups are.
    """

    def __init__(
        self,
        *,
        bits: Sequence[Bits],
        periods: Sequence[int],
        scales_per: Sequence[TableScale],
        table_of_column: Sequence[int],
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
        """Step between two levels, in force. Shape (tables,)."""
        self.peak = torch.zeros(len(self.bits), device=device)
        """Largest |w| seen. Shape (tables,)."""
        self._levels = torch.tensor([max_level(width) if width else 1 for width in bits], device=device)
        self._table_of_column = torch.tensor(table_of_column, dtype=torch.int64, device=device)
        whole = [table for table, is_one in enumerate(is_whole) if is_one]
        self._due = {
            period: torch.tensor([table for table in whole if periods[table] == period], device=device)
            for period in {periods[table] for table in whole}
        }
        # columns whose tables are alike are rounded together
        kinds = [(bits[table], is_whole[table]) for table in table_of_column]
        self._columns = {
            kind: torch.tensor([column for column, one in enumerate(kinds) if one == kind], device=device)
            for kind in sorted({kind for kind in kinds if kind[0]})
        }

    def set_abs_max(self, abs_max: Tensor) -> None:
        """Set scales from the largest |w| of every table, known exactly. Shape (tables,)."""
        self.peak.copy_(abs_max)
        self.scale.copy_(self._scale_for(self.peak, self._levels))

    def begin_step(self) -> None:
        """Count a training step, and refresh the scales that are due before it. Nothing waits for the device."""
        for period in self.due_periods():
            tables = self._due[period]
            peak, levels = self.peak.index_select(0, tables), self._levels.index_select(0, tables)
            self.scale.index_copy_(0, tables, self._scale_for(peak, levels))
        self.num_steps += 1

    def due_periods(self) -> list[int]:
        """Give the periods of the tables whose scale the next step refreshes."""
        number = self.num_steps
        is_power_of_two = number & (number - 1) == 0
        return [
            period for period in self._due if number and (number % period == 0 or (number < period and is_power_of_two))
        ]

    def train(self, looked_up_BKD: Tensor) -> Tensor:
        """Note the largest weights, and round. The gradient passes as if nothing had happened.

        In place on fixed tensors, so that it can be captured in a CUDA graph.
        """
        with torch.no_grad():
            for (_, is_whole), columns in self._columns.items():
                if not is_whole:
                    continue
                rows = self._pick(looked_up_BKD, columns)
                flat = rows.reshape(len(rows), -1)
                largest = torch.maximum(flat.amax(0), flat.amin(0).neg_()).view(len(columns), -1).amax(1)
                tables = self._table_of_column.index_select(0, columns)
                self.peak.scatter_reduce_(0, tables, largest, "amax")
        rounded: Tensor = _StraightThrough.apply(looked_up_BKD, self)
        return rounded

    def round(self, looked_up_BKD: Tensor) -> Tensor:
        """Give the rows as they would be stored: equal to the bit to quantised and dequantised ones."""
        rounded = looked_up_BKD
        for (width, is_whole), columns in self._columns.items():
            rows = self._pick(looked_up_BKD, columns)
            part = on_grid(rows, self._scale_of(rows, columns, width, is_whole), width)
            if rows is looked_up_BKD:
                return part
            rounded = rounded.index_copy(1, columns, part)
        return rounded

    def _scale_of(self, rows: Tensor, columns: Tensor, width: int, is_whole: bool) -> Tensor:
        """Give the steps between levels for looked-up rows: (K, 1) of tables, or (B, K, 1) of rows."""
        if is_whole:
            tables = self._table_of_column.index_select(0, columns)
            return self.scale.index_select(0, tables).unsqueeze(1)
        return scale_for(torch.maximum(rows.amax(-1, keepdim=True), -rows.amin(-1, keepdim=True)), width)

    @staticmethod
    def _pick(looked_up_BKD: Tensor, columns: Tensor) -> Tensor:
        return looked_up_BKD if len(columns) == looked_up_BKD.shape[1] else looked_up_BKD.index_select(1, columns)

    @staticmethod
    def _scale_for(abs_max: Tensor, levels: Tensor) -> Tensor:
        return abs_max.clamp(min=SMALLEST_ABS_MAX) / levels


class _StraightThrough(torch.autograd.Function):
    """Rounding forward, identity backward."""

    @staticmethod
    def forward(ctx: Any, looked_up: Tensor, grids: RowGrids) -> Tensor:
        return grids.round(looked_up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None
