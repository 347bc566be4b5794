"""Bags: several looked-up columns that become one vector, the sum or the mean of the rows of their values.

What `nn.EmbeddingBag` does with a padding index: padding adds nothing, gets no gradient and does not count in a mean;
an empty bag is a zero vector. Which lookups are values is told by the ids themselves, never by what rows hold: a row
of a value may well be zero on few bits.

Shape suffixes: B batch, C looked-up columns, P columns that may hold padding, F fields: what the model sees, D width
of a row.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from torch import Tensor

from slipstream.schema import Bag


class Pooling:
    """Pools the rows of looked-up columns bag by bag; columns of no bag stay as they are.

    Fields stand in the order of their columns, a bag at the place of its first one.

    Args:
        bags: Bags; no column is in two of them.
        num_columns: C.
        device: Where rows are.
    """

    def __init__(self, bags: Sequence[Bag], *, num_columns: int, device: torch.device | str = "cpu") -> None:
        self.bags = list(bags)
        self.columns = [column for bag in self.bags for column in bag.columns]
        """Columns of all bags, bag by bag."""
        single = [column for column in range(num_columns) if column not in set(self.columns)]
        self.num_fields = len(single) + len(self.bags)
        """F."""
        self._single = torch.tensor(single, dtype=torch.int64, device=device)
        self._columns = [torch.tensor(bag.columns, dtype=torch.int64, device=device) for bag in self.bags]
        # fields are made with single columns first, then the bags; this brings them to where their columns are
        first_columns = [*single, *(bag.columns[0] for bag in self.bags)]
        order = np.argsort(first_columns, kind="stable")
        is_ordered = bool((order == np.arange(self.num_fields)).all())
        self._order = None if is_ordered else torch.tensor(order, device=device)

    def pool(self, rows_BCD: Tensor, is_value_BP: Tensor | None) -> Tensor:
        """Give what the model sees. Shape (B, F, D).

        Args:
            rows_BCD: Rows of all columns.
            is_value_BP: Which lookups of `columns` are values, then perhaps of other columns; not needed without bags.
        """
        if not self.bags:
            return rows_BCD
        assert is_value_BP is not None
        fields = [rows_BCD.index_select(1, self._single)] if len(self._single) else []
        start = 0
        for bag, columns in zip(self.bags, self._columns, strict=True):
            is_value = is_value_BP[:, start : start + len(bag.columns)]
            start += len(bag.columns)
            values = rows_BCD.index_select(1, columns).masked_fill(~is_value.unsqueeze(2), 0.0)
            # one value after the other, as `nn.EmbeddingBag` adds them: the order of `sum` depends on shapes
            pooled, *others = values.unbind(1)
            for value in others:
                pooled = pooled + value
            if bag.pooling == "mean":
                pooled = pooled / is_value.sum(dim=1, keepdim=True).clamp(min=1).to(pooled.dtype)
            fields.append(pooled.unsqueeze(1))
        together = torch.cat(fields, dim=1)
        return together if self._order is None else together.index_select(1, self._order)


class StoredBags:
    """The bags of a stored model, whose columns hold rows of their tables.

    Args:
        bags: Bags.
        padding_rows: Row that stands for padding in the table of each column of the bags, bag by bag.
        num_columns: C.
    """

    def __init__(self, bags: Sequence[Bag], padding_rows: Sequence[int], *, num_columns: int) -> None:
        self._pooling = Pooling(bags, num_columns=num_columns)
        self.num_fields = self._pooling.num_fields
        """F."""
        self._columns = torch.tensor(self._pooling.columns, dtype=torch.int64)
        self._padding_rows = torch.tensor(padding_rows, dtype=torch.int64)

    @classmethod
    def of(cls, description: Mapping[str, Any]) -> StoredBags | None:
        """Read what model.json says of bags; None where it says nothing.

        Raises:
            KeyError, TypeError: It says something else.
        """
        if "bags" not in description:
            return None
        tables: list[str] = description["column_tables"]
        stored = [Bag(columns=tuple(bag["columns"]), pooling=bag["pooling"]) for bag in description["bags"]]
        padding_rows = [bag["padding_row"] for bag in description["bags"] for _ in bag["columns"]]
        return cls(stored, padding_rows, num_columns=len(tables))

    def pool(self, looked_up_BCD: Tensor, rows_BC: Tensor) -> Tensor:
        """Give what the model sees of looked-up rows. Shape (B, F, D).

        Args:
            looked_up_BCD: Rows.
            rows_BC: Their numbers in their tables. int64.
        """
        is_value = rows_BC.index_select(1, self._columns) != self._padding_rows
        return self._pooling.pool(looked_up_BCD, is_value)


def describe_bags(
    bags: Sequence[Bag], table_of_column: Sequence[str], padding_rows: Mapping[str, int]
) -> list[dict[str, Any]]:
    """Say what model.json keeps of bags."""
    return [{**asdict(bag), "padding_row": padding_rows[table_of_column[bag.columns[0]]]} for bag in bags]


def pad_columns(bags: Sequence[Bag], table_of_column: Sequence[str], padded: Collection[str]) -> list[int]:
    """List the columns that may hold padding: those of bags, bag by bag, then others of padded tables.

    Args:
        bags: Bags.
        table_of_column: Table of each column.
        padded: Tables with a row that stands for padding.
    """
    pooled = [column for bag in bags for column in bag.columns]
    others = [at for at, name in enumerate(table_of_column) if name in padded and at not in set(pooled)]
    return [*pooled, *others]
