"""What the model sees of looked-up rows: fp32 rows as they are, rows on a grid, or products of tensor-train cores.

Rows of dense, int8, int4 and mixed tables live in tiers, and all placements treat them alike; what differs is what
happens between the lookup and the model. Tables of cores have no rows, so nothing of them is staged: they are looked
up, and updated by their own fused optimizer, where the model is.

Shape suffixes: B batch, C columns, K columns of tables in tiers, J columns of tables of cores, P columns that may hold
padding, F fields: columns and bags of columns, D embedding_dim.
"""

from __future__ import annotations

from collections import Counter
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
from slipstream.io.figures import MixedFigures
from slipstream.schema import BITS, Bag, Representation, RowRange, TableScale
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
    cuts: tuple[RowRange, ...] = ()
    """Ranges of the rows of a mixed table, in order; those after them share row 0."""

    @property
    def ranges(self) -> tuple[RowRange, ...]:
        """Ranges of the rows that are held, in order; tensor-train cores have no rows."""
        if self.representation == "tt":
            return ()
        if self.representation == "mixed":
            return self.cuts
        return (RowRange(bits=BITS[self.representation], rows=self.num_rows),)

    @property
    def has_several_formats(self) -> bool:
        """Whether rows differ in what is stored of them, or some of their values are not."""
        return len(self.ranges) > 1 or any(part.values is not None for part in self.ranges)

    @property
    def num_held(self) -> int:
        """Rows that are held; the tail after them shares row 0."""
        return sum(part.rows for part in self.ranges)


def lay_out(
    slot_maps: Mapping[str, np.ndarray], specs: Sequence[TableSpec], *, num_hot: int, table_of_column: Sequence[int]
) -> SlotLayout:
    """Give the slots of tables that are held in some way.

    Args:
        slot_maps: Slot of each row, per table, as if all rows were held.
        specs: How.
        num_hot: Slots below this are hot.
        table_of_column: Table, by position, that each column of samples looks up.
    """
    return SlotLayout(
        slot_maps,
        num_hot=num_hot,
        table_of_column=table_of_column,
        tierless={spec.name for spec in specs if spec.representation == "tt"},
        held={spec.name: spec.num_held for spec in specs if 0 < spec.num_held < spec.num_rows},
    )


def weigh_mixed(specs: Sequence[TableSpec], row_width: int) -> MixedFigures | None:
    """Count the rows of mixed tables, and what they are stored in; None where there are none."""
    mixed = [spec for spec in specs if spec.representation == "mixed"]
    if not mixed:
        return None
    nbytes, rows = 0, Counter[tuple[int, int]]()
    for spec in mixed:
        for part in spec.ranges:
            values = part.values or row_width
            rows[values, part.bits] += part.rows
            nbytes += part.rows * part.bits * values // 8 + 4 * (part.rows if spec.scale_per == "row" else 1)
    return MixedFigures(
        rows={f"{values} x {bits}": count for (values, bits), count in sorted(rows.items(), reverse=True)},
        shared=sum(spec.num_rows - spec.num_held for spec in mixed),
        bytes=nbytes,
        fp32_bytes=4 * row_width * sum(spec.num_rows for spec in mixed),
    )


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
        self._of_grid = [(spec, part) for spec in specs for part in spec.ranges]
        self.grids: RowGrids | None = None
        self.range_of_slot: np.ndarray | None = None
        """Range of its table that each row in tiers is in; None where nobody has to know. Shape (num_rows,), uint8."""
        if any(part.bits for _, part in self._of_grid):
            self.grids = self._make_grids(device)
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

    def _make_grids(self, device: torch.device) -> RowGrids:
        layout, several = self.layout, {spec.name for spec in self.specs if spec.has_several_formats}
        names = [spec.name for spec, _ in self._of_grid]
        columns = [layout.column_tables[at] for at in layout.columns]
        if several:
            self.range_of_slot = np.zeros(layout.num_rows, np.uint8)
            for spec in self.specs:
                slots = layout.held_slots(spec.name)
                stops = np.cumsum([part.rows for part in spec.ranges])
                if spec.name in several:
                    self.range_of_slot[slots] = np.searchsorted(stops, np.arange(len(slots)), side="right")
        return RowGrids(
            bits=[part.bits for _, part in self._of_grid],
            periods=[spec.period for spec, _ in self._of_grid],
            scales_per=[spec.scale_per for spec, _ in self._of_grid],
            grid_of_column=[names.index(name) for name in columns],
            columns_with_ranges=[at for at, name in enumerate(columns) if name in several],
            values=[part.values for _, part in self._of_grid],
            device=device,
        )

    def train(
        self,
        looked_up_BKD: Tensor,
        tierless_BJ: Tensor | None,
        is_value_BP: Tensor | None = None,
        ranges_BK: Tensor | None = None,
    ) -> Tensor:
        """Say what the model trains on. Shape (B, F, D).

        Args:
            looked_up_BKD: Rows of the tables in tiers.
            tierless_BJ: Slots of the others' lookups, int64; None when all tables live in tiers.
            is_value_BP: Which lookups of padded columns are values, bool; None where nothing is pooled.
            ranges_BK: Range of its table that each row in tiers is in, uint8; None where no table has several.
        """
        if self.grids is not None:
            looked_up_BKD = self.grids.train(looked_up_BKD, ranges_BK)
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
            ranges = None
            if self.range_of_slot is not None:
                ranges = torch.from_numpy(self.range_of_slot[tiered]).to(rows.device)
            looked_up = self.grids.round(looked_up, ranges)
        tierless = None
        if self.bags:
            tierless = torch.from_numpy(slots_BC[:, self._tierless_columns].astype(np.int64)).to(rows.device)
        is_value = None
        if self.pooling.bags and self.padded is not None:
            is_value = torch.from_numpy(self.padded.find_values(slots_BC)).to(rows.device)
        return self.pooling.pool(self._with_cores(looked_up, tierless), is_value)

    def clear_what_is_not_stored(self, rows: TieredRows) -> None:
        """Set the values of rows that no range stores to zero, where they stay; the tiers are flushed."""
        for spec in self.specs:
            for part, slots in self.slots_by_range(spec):
                if part.values is not None:
                    for block in slots.split(CHUNK_ROWS):
                        weights = rows.gather(block)
                        weights[:, : -part.values] = 0.0
                        rows.load(block, weights)

    def set_exact_scales(self, rows: TieredRows) -> None:
        """Set every scale from all of its rows, exactly. One pass over the rounded tables; the tiers are flushed."""
        if self.grids is None:
            return
        largest = []
        slots_of_grid = [slots for spec in self.specs for _, slots in self.slots_by_range(spec)]
        for slots, is_scaled in zip(slots_of_grid, self.grids.is_scaled_as_a_whole, strict=True):
            is_read = is_scaled and len(slots)
            parts = [rows.gather(part).abs().amax() for part in slots.split(CHUNK_ROWS)] if is_read else []
            largest.append(torch.stack(parts).amax() if parts else torch.zeros((), device=rows.device))
        self.grids.set_abs_max(torch.stack(largest))

    def slots_by_range(self, spec: TableSpec) -> Iterator[tuple[RowRange, Tensor]]:
        """Give the ranges of a table in tiers, and the slots of their rows."""
        slots, start = torch.from_numpy(self.layout.held_slots(spec.name)), 0
        for part in spec.ranges:
            yield part, slots[start : start + part.rows]
            start += part.rows

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

    def scales_of(self, name: str) -> list[Tensor | None]:
        """Give the step between two levels of each range of a table, in force, shape (); None where rows have one."""
        assert self.grids is not None, name
        is_whole = self.grids.is_scaled_as_a_whole
        numbers = [grid for grid, (spec, _) in enumerate(self._of_grid) if spec.name == name]
        return [self.grids.scale[grid] if is_whole[grid] else None for grid in numbers]

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
