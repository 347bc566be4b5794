"""Tables trained on the grid they will be stored on, while their rows live in tiers.

Each table on few bits has one symmetric scale. Looked-up rows are rounded to the grid before the model sees them, and
gradients pass straight through to the fp32 master rows, which stay in the tiers. So the scheme knows nothing of
placement, and all placements still give the same model.

**The scale** is max|w| / n, n = 2^(bits-1) - 1. Reading a table of a billion rows every 200 steps is no option, nor is
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

from slipstream.embedding.quantized.numbers import SMALLEST_ABS_MAX, check_bits, max_level, on_grid

Bits = int
"""16, 8, 4 or 2, or 0 for a table that is not rounded."""


class RowGrids:
    """Scales of tables, and the rounding of what was looked up in them.

    Args:
        bits: Of each table, 0 for fp32.
        periods: Training steps between refreshes of each table's scale, >= 1.
        table_of_column: Table that each column looks up. Shape (K,).
        device: Where lookups are.
    """

    def __init__(
        self,
        *,
        bits: Sequence[Bits],
        periods: Sequence[int],
        table_of_column: Sequence[int],
        device: torch.device,
    ) -> None:
        for width in bits:
            if width:
                check_bits(width)
        if min(periods, default=1) < 1:
            raise ValueError(f"expected periods of at least 1 step, found {min(periods)}")
        self.bits = list(bits)
        self.num_steps = 0
        self.scale = torch.ones(len(self.bits), device=device)
        """Step between two levels, in force. Shape (tables,)."""
        self.peak = torch.zeros(len(self.bits), device=device)
        """Largest |w| seen. Shape (tables,)."""
        self._levels = torch.tensor([max_level(width) if width else 1 for width in bits], device=device)
        self._table_of_column = torch.tensor(table_of_column, dtype=torch.int64, device=device)
        self._due = {
            period: torch.tensor([t for t, p in enumerate(periods) if p == period and bits[t]], device=device)
            for period in {p for t, p in enumerate(periods) if bits[t]}
        }
        self._columns = {
            width: torch.tensor([c for c, t in enumerate(table_of_column) if bits[t] == width], device=device)
            for width in sorted({bits[t] for t in table_of_column} - {0})
        }

    def set_abs_max(self, abs_max: Tensor) -> None:
        """Set scales from the largest |w| of every table, known exactly. Shape (tables,)."""
        self.peak.copy_(abs_max)
        self.scale.copy_(self._scale_for(self.peak, self._levels))

    def begin_step(self) -> None:
        """Count a training step, and refresh the scales that are due before it. Nothing waits for the device."""
        number = self.num_steps
        is_power_of_two = number & (number - 1) == 0
        for period, tables in self._due.items():
            if number and (number % period == 0 or (number < period and is_power_of_two)):
                peak, levels = self.peak.index_select(0, tables), self._levels.index_select(0, tables)
                self.scale.index_copy_(0, tables, self._scale_for(peak, levels))
        self.num_steps += 1

    def train(self, looked_up_BKD: Tensor) -> Tensor:
        """Note the largest weights, and round. The gradient passes as if nothing had happened.

        In place on fixed tensors, so that it can be captured in a CUDA graph.
        """
        with torch.no_grad():
            for columns in self._columns.values():
                rows = self._pick(looked_up_BKD, columns)
                flat = rows.reshape(len(rows), -1)
                largest = torch.maximum(flat.amax(0), flat.amin(0).neg_()).view(len(columns), -1).amax(1)
                tables = self._table_of_column.index_select(0, columns)
                self.peak.scatter_reduce_(0, tables, largest, "amax")
        rounded: Tensor = _StraightThrough.apply(looked_up_BKD, self)
        return rounded

    def round(self, looked_up_BKD: Tensor) -> Tensor:
        """Give the rows as they would be stored: equal to the bit to quantised and dequantised ones."""
        scale = self.scale.index_select(0, self._table_of_column).unsqueeze(1)
        rounded = looked_up_BKD
        for width, columns in self._columns.items():
            if len(columns) == looked_up_BKD.shape[1]:
                return on_grid(looked_up_BKD, scale, width)
            part = on_grid(looked_up_BKD.index_select(1, columns), scale.index_select(0, columns), width)
            rounded = rounded.index_copy(1, columns, part)
        return rounded

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
