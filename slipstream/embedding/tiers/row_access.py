"""How a step gets at the rows of its batch: looks them up, sums what belongs to them, and changes them."""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType
from typing import Protocol

from torch import Tensor

from slipstream.embedding.duplicates import Distinct, sum_duplicates
from slipstream.embedding.rules import RowOptimizer
from slipstream.embedding.tiers.rows import TieredRows, update_rows


class RowAccess(Protocol):
    """The distinct rows of one batch."""

    def padded_positions(self) -> Tensor:
        """Give the position of each in the buffer; behind the last there may be spare ones. Shape (U,), int64."""
        ...

    def look_up(self, num_lookups: int) -> Tensor:
        """Give the rows of all lookups, of which the batch has so many. Shape (L, D)."""
        ...

    def sum_by_row(self, per_lookup: Tensor) -> Tensor:
        """Sum what belongs to lookups by distinct row, in batch order. Shapes (L, k) and (U, k)."""
        ...

    def update(
        self,
        rule: RowOptimizer,
        gradients: Tensor,
        *,
        lr: Tensor,
        num_steps: Tensor | None = None,
        sample_weights: Tensor | None = None,
    ) -> None:
        """Sum gradients by row, and change every row.

        Args:
            rule: Which way rows move.
            gradients: Of the lookups. Shape (L, D).
            lr: Learning rate, without dimensions, where the rows are.
            num_steps: Steps taken, this one included. Shape (), float64.
            sample_weights: m, the weight of the samples behind each distinct row; None is 1. Shape (U,).
        """
        ...


@dataclass(kw_only=True, slots=True)
class StagedAccess:
    """Rows that are all in the buffer, moved there ahead of time.

    Args:
        rows: The tiers.
        distinct: Distinct positions of the batch, and which of them each lookup is of.
        kernels: `slipstream.embedding.tiers.kernels`, or None for plain PyTorch.
        deterministic: As in `sum_duplicates`.
    """

    rows: TieredRows
    distinct: Distinct
    kernels: ModuleType | None = None
    deterministic: bool = True
    _values: Tensor | None = None

    def padded_positions(self) -> Tensor:
        """Give the distinct positions, those of spare rows included."""
        return self.distinct.rows

    def look_up(self, num_lookups: int) -> Tensor:
        """Give the rows of all lookups."""
        buffer, distinct = self.rows.buffer, self.distinct
        if self.kernels is not None:
            looked_up: Tensor = self.kernels.gather_rows(buffer, distinct.rows, distinct.inverse)
            return looked_up
        self._values = buffer.index_select(0, distinct.rows)
        return self._values.index_select(0, distinct.inverse)

    def sum_by_row(self, per_lookup: Tensor) -> Tensor:
        """Sum what belongs to lookups by distinct row."""
        distinct = self.distinct
        return sum_duplicates(
            per_lookup,
            distinct.inverse,
            len(distinct.rows),
            order=distinct.order,
            starts=distinct.starts,
            deterministic=self.deterministic,
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
        """Sum gradients by row, and change every row in the buffer."""
        change_rows(
            self.rows,
            self.distinct.rows,
            self.sum_by_row(gradients),
            rule,
            kernels=self.kernels,
            values=self._values,
            lr=lr,
            num_steps=num_steps,
            sample_weights=sample_weights,
        )


def change_rows(
    rows: TieredRows,
    positions: Tensor,
    summed: Tensor,
    rule: RowOptimizer,
    *,
    kernels: ModuleType | None,
    lr: Tensor,
    values: Tensor | None = None,
    num_steps: Tensor | None = None,
    sample_weights: Tensor | None = None,
) -> None:
    """Change rows of the buffer, by kernels or plainly.

    Args:
        rows: The tiers.
        positions: Distinct, but for spare ones. Shape (U,), int64.
        summed: Their gradients; used up. Shape (U, D).
        rule: Which way rows move.
        kernels: `slipstream.embedding.tiers.kernels`, or None for plain PyTorch.
        lr: Learning rate, without dimensions, where the rows are.
        values: Their weights, if they were read already; used up. Shape (U, D).
        num_steps: Steps taken, this one included. Shape (), float64.
        sample_weights: As in `RowAccess.update`.
    """
    place = (rule, rows.buffer, rows.buffer_state, positions)
    if kernels is not None:
        kernels.update_rows(*place, summed, lr=lr, sample_weights=sample_weights, first_spare=rows.first_spare)
        return
    values = rows.buffer.index_select(0, positions) if values is None else values
    update_rows(*place, values, summed, lr=lr, num_steps=num_steps, sample_weights=sample_weights)
