"""What the model sees of looked-up rows: fp32 rows as they are, rows on a grid, or products of tensor-train cores.

Rows of dense, int8 and int4 tables live in tiers, and all placements treat them alike; what differs is what happens
between the lookup and the model. Tables of cores have no rows, so nothing of them is staged: they are looked up, and
updated by their own fused optimizer, where the model is.

Shape suffixes: B batch, C columns, K columns of tables in tiers, J columns of tables of cores, P columns that may hold
padding, F fields: columns and bags of columns, D embedding_dim.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from slipstream.embedding.quantized.abs_max import CHUNK_ROWS
from slipstream.embedding.quantized.grids import RowGrids
from slipstream.embedding.tiers.padding import PaddedColumns
from slipstream.embedding.tiers.rows import TieredRows
from slipstream.embedding.tt.bag import TTEmbeddingBag
from slipstream.schema import BITS, Bag, Representation, TableScale
from slipstream.training.pooling import Pooling, pad_columns
from slipstream.training.slot_layout import SlotLayout


@dataclass(frozen=True, kw_only=True, slots=True)
class TableSpec:
    """How one table is held."""

    name: str
    num_rows: int
    representation: Representation = "dense"
    scale_per: TableScale = "table"
    period: int = 200
    """Steps between refreshes of a scale per table."""
    tt_ranks: tuple[int, ...] = (16, 16)

    @property
    def bits(self) -> int:
        """Bits of a row's values, 0 for fp32; tensor-train cores have no rows."""
        return BITS[self.representation]


class Representations:
    """How the tables of a run are held; where all are plain fp32 rows, that does nothing and costs nothing.

    Args:
        specs: One per table, in the order of the layout.
        layout: Slots of the tables in tiers.
        embedding_dim: D.
        optimizer: Of rows, and of cores.
        eps: Of its rule.
        seed: Of the cores' initial values.
        device: Where the model is.
        bags: Columns whose rows are pooled.
        padding_rows: Tables with a row that stands for padding, and that row; those of all bags among them.
    """

    def __init__(
        self,
        specs: Sequence[TableSpec],
        *,
        layout: SlotLayout,
        embedding_dim: int,
        optimizer: str,
        eps: float,
        seed: int,
        device: torch.device,
        bags: Sequence[Bag] = (),
        padding_rows: Mapping[str, int] | None = None,
    ) -> None:
        padding_rows = padding_rows or {}
        self.pooling = Pooling(bags, num_columns=len(layout.column_tables), device=device)
        self.padded = _find_padded(layout, bags, padding_rows)
        self.specs, self.layout = list(specs), layout
        tiered = [spec for spec in specs if spec.representation != "tt"]
        self.grids: RowGrids | None = None
        if any(spec.bits for spec in tiered):
            self.grids = RowGrids(
                bits=[spec.bits for spec in tiered],
                periods=[spec.period for spec in tiered],
                scales_per=[spec.scale_per for spec in tiered],
                table_of_column=[layout.tiered.index(layout.column_tables[at]) for at in layout.columns],
                device=device,
            )
        self.bags: dict[str, TTEmbeddingBag] = {
            spec.name: TTEmbeddingBag(
                spec.num_rows,
                embedding_dim,
                spec.tt_ranks,
                optimizer=optimizer,
                eps=eps,
                device=device,
                generator=torch.Generator().manual_seed(_seed_of_table(seed, at)),
            )
            for at, spec in enumerate(specs)
            if spec.representation == "tt"
        }
        self._tierless_columns = np.delete(np.arange(len(layout.column_tables)), layout.columns)
        names = [layout.column_tables[at] for at in self._tierless_columns]
        self._tierless_bags = [self.bags[name] for name in names]
        self._tierless_padding = [padding_rows.get(name) for name in names]
        self._first_rows = torch.tensor([layout.first_row[name] for name in names], device=device)
        # columns of the tables in tiers come first, then those of cores; this brings them back
        self._column_order = torch.tensor(np.argsort([*layout.columns, *self._tierless_columns]), device=device)

    @classmethod
    def plain(cls, layout: SlotLayout, *, embedding_dim: int, device: torch.device) -> Representations:
        """Hold every table as fp32 rows."""
        specs = [TableSpec(name=name, num_rows=len(layout.slot_maps[name])) for name in layout.tables]
        return cls(specs, layout=layout, embedding_dim=embedding_dim, optimizer="sgd", eps=0.0, seed=0, device=device)

    @property
    def by_table(self) -> dict[str, Representation]:
        """How each table is held."""
        return {spec.name: spec.representation for spec in self.specs}

    @property
    def has_cores(self) -> bool:
        """Whether a table has no rows; its lookups wait for the device, so no graph can hold them."""
        return bool(self.bags)

    def begin_step(self, lr: float) -> None:
        """Get ready for a training step: refresh scales that are due, set the learning rate of cores."""
        if self.grids is not None:
            self.grids.begin_step()
        for bag in self.bags.values():
            bag.set_learning_rate(lr)

    def train(self, looked_up_BKD: Tensor, tierless_BJ: Tensor | None, is_value_BP: Tensor | None = None) -> Tensor:
        """Say what the model trains on. Shape (B, F, D).

        Args:
            looked_up_BKD: Rows of the tables in tiers.
            tierless_BJ: Slots of the others' lookups, int64; None when all tables live in tiers.
            is_value_BP: Which lookups of padded columns are values, bool; None where nothing is pooled.
        """
        if self.grids is not None:
            looked_up_BKD = self.grids.train(looked_up_BKD)
        return self.pooling.pool(self._with_cores(looked_up_BKD, tierless_BJ), is_value_BP)

    def look_up(self, rows: TieredRows, slots_BC: np.ndarray) -> Tensor:
        """Say what the model predicts from: nothing is noted, and rows may be anywhere. Shape (B, F, D).

        Args:
            rows: The tiers, flushed.
            slots_BC: Slots of the layout.
        """
        tiered = np.ascontiguousarray(slots_BC if self.layout.is_whole else slots_BC[:, self.layout.columns])
        looked_up = rows.gather(torch.from_numpy(tiered.ravel())).view(*tiered.shape, rows.embedding_dim)
        if self.grids is not None:
            looked_up = self.grids.round(looked_up)
        tierless = None
        if self.bags:
            tierless = torch.from_numpy(slots_BC[:, self._tierless_columns].astype(np.int64)).to(rows.device)
        is_value = None
        if self.pooling.bags and self.padded is not None:
            is_value = torch.from_numpy(self.padded.find_values(slots_BC)).to(rows.device)
        return self.pooling.pool(self._with_cores(looked_up, tierless), is_value)

    def set_exact_scales(self, rows: TieredRows) -> None:
        """Set every scale from its whole table, exactly. One pass over the rounded tables; the tiers are flushed."""
        if self.grids is None:
            return
        largest = []
        for name, is_scaled in zip(self.layout.tiered, self.grids.is_scaled_as_a_whole, strict=True):
            slots = torch.from_numpy(self.layout.slot_maps[name])
            parts = [rows.gather(part).abs().amax() for part in slots.split(CHUNK_ROWS)] if is_scaled else []
            largest.append(torch.stack(parts).amax() if parts else torch.zeros((), device=rows.device))
        self.grids.set_abs_max(torch.stack(largest))

    @contextmanager
    def exact_scales(self, rows: TieredRows) -> Iterator[None]:
        """Have every scale exact for as long as this is entered; the tiers are flushed."""
        if self.grids is None:
            yield
            return
        kept = self.grids.scale.clone(), self.grids.peak.clone()
        self.set_exact_scales(rows)
        try:
            yield
        finally:
            self.grids.scale.copy_(kept[0])
            self.grids.peak.copy_(kept[1])

    def scale_of(self, name: str) -> Tensor | None:
        """Step between two levels of a table on few bits, in force, shape (); None where each row has its own."""
        assert self.grids is not None, name
        table = self.layout.tiered.index(name)
        return self.grids.scale[table] if self.grids.is_scaled_as_a_whole[table] else None

    def cores(self) -> list[Tensor]:
        """Every tensor-train core of every table."""
        return [core for bag in self.bags.values() for core in bag.tt_cores]

    def core_bytes(self) -> int:
        """Bytes of all cores, optimizer state included, and of the renumbered slots."""
        return sum(sum(bag.memory_bytes().values()) for bag in self.bags.values()) + self.layout.nbytes()

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Everything a resumed run needs, beside the tiers: plain values, and tensors."""
        plain: dict[str, Any] = {}
        tensors: dict[str, Tensor] = {}
        if self.grids is not None:
            plain["num_steps"] = self.grids.num_steps
            tensors |= {"scale": self.grids.scale, "peak": self.grids.peak}
        for name, bag in self.bags.items():
            tensors |= {f"cores.{name}.{key}": value for key, value in bag.state_dict().items()}
        return plain, tensors

    def restore(self, plain: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Take over what `state` gave."""
        if self.grids is not None:
            self.grids.num_steps = plain["num_steps"]
            self.grids.scale.copy_(tensors["scale"])
            self.grids.peak.copy_(tensors["peak"])
        for name, bag in self.bags.items():
            prefix = f"cores.{name}."
            bag.load_state_dict({k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)})

    def _with_cores(self, looked_up_BKD: Tensor, tierless_BJ: Tensor | None) -> Tensor:
        if tierless_BJ is None:
            return looked_up_BKD
        rows_BJ = tierless_BJ - self._first_rows
        columns = [
            bag(rows_BJ[:, at : at + 1]) if padding is None else _look_up_values(bag, rows_BJ[:, at], padding)
            for at, (bag, padding) in enumerate(zip(self._tierless_bags, self._tierless_padding, strict=True))
        ]
        together = torch.cat([looked_up_BKD, torch.stack(columns, dim=1)], dim=1)
        return together.index_select(1, self._column_order)


def _look_up_values(bag: TTEmbeddingBag, rows: Tensor, padding_row: int) -> Tensor:
    """Look up a column and leave padding out: zeros, and no core slice is touched for it. Shape (B,) to (B, D)."""
    is_value = rows != padding_row
    # every sample is a bag of one value or none, which begins after the values of the samples before it
    return bag(rows[is_value], is_value.cumsum(0) - is_value.long())  # type: ignore[no-any-return]


def _find_padded(layout: SlotLayout, bags: Sequence[Bag], padding_rows: Mapping[str, int]) -> PaddedColumns | None:
    """Find the columns that may hold padding, those of bags first; None where there are none."""
    columns = pad_columns(bags, layout.column_tables, padding_rows)
    if not columns:
        return None
    names = [layout.column_tables[column] for column in columns]
    slots = [int(layout.slot_maps[name][padding_rows[name]]) for name in names]
    return PaddedColumns(columns=np.array(columns), slots=np.array(slots), is_pooled=bool(bags))


def _seed_of_table(seed: int, table: int) -> int:
    return int(np.random.SeedSequence([seed, table]).generate_state(1)[0])
