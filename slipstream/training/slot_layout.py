"""Slots of a run in which some rows are not held: those of tensor-train cores, and tails that share row 0.

Segregate numbers the rows of all tables. Rows of a table of cores need no tier, and rows of a tail are looked up as the
row of rare values, so slots are renumbered: first the hot slots of the rows in tiers, then their cold ones, in their
old order, and last the rows of the tables without tiers, table by table. A slot is still one number over all tables,
a tail has that of its row 0, and what is not held costs no byte of a tier.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import numpy as np

from slipstream.io.samples import Samples
from slipstream.schema import OOV_ROW


class SlotLayout:
    """Which slots have tiers, and where the others begin.

    Args:
        slot_maps: Slot of each row, per table.
        num_hot: Slots below this are hot.
        table_of_column: Table, by position, that each column of samples looks up.
        tierless: Tables whose rows have no tier.
        held: Tables whose tail shares row 0, which is hot, and how many rows are before it.
    """

    def __init__(
        self,
        slot_maps: Mapping[str, np.ndarray],
        *,
        num_hot: int,
        table_of_column: Sequence[int],
        tierless: Collection[str] = (),
        held: Mapping[str, int] | None = None,
    ) -> None:
        self.num_slots = sum(map(len, slot_maps.values()))
        """V, rows without a tier included."""
        self.tables = list(slot_maps)
        self.tiered = [name for name in self.tables if name not in tierless]
        """Tables whose rows live in tiers."""
        self.column_tables = [self.tables[table] for table in table_of_column]
        """Table of each column."""
        self.columns = np.array([at for at, name in enumerate(self.column_tables) if name not in tierless], np.int64)
        """Columns of samples that look up tables in tiers."""
        self.is_whole = not tierless
        """Whether every table lives in tiers."""
        self._num_held = dict(held or {})
        self._codes: np.ndarray | None = None
        if not tierless and not held:
            self.slot_maps, self.num_hot, self.num_rows = dict(slot_maps), num_hot, self.num_slots
        else:
            self._renumber(slot_maps, num_hot, [name for name in self.tables if name in tierless])
        self.first_row = {
            name: int(slots[0]) for name, slots in self.slot_maps.items() if name in tierless and len(slots)
        }
        """First slot of each table without tiers; its rows follow in order."""

    def held_slots(self, name: str) -> np.ndarray:
        """Slots of the rows of a table that are held: all of them, or those before its tail."""
        return self.slot_maps[name][: self._num_held.get(name)]

    def translate(self, samples: Samples) -> Samples:
        """Give samples with the slots of this layout."""
        if self._codes is None:
            return samples
        return Samples(X_int=samples.X_int, X_cat=self._codes[samples.X_cat], y=samples.y, weights=samples.weights)

    def counts_by_slot(self, counts: np.ndarray) -> np.ndarray:
        """Access counts of the rows in tiers, by slot, those of a tail at row 0. Shape (num_rows,).

        Args:
            counts: Per row of all tables, table by table. Shape (V,).
        """
        by_slot = np.zeros(self.num_slots, np.int64)
        np.add.at(by_slot, np.concatenate([self.slot_maps[name] for name in self.tables]), counts)
        return by_slot[: self.num_rows]

    def most_distinct(self, num_samples: int) -> int:
        """How many distinct rows with tiers that many samples can look up at most."""
        return sum(
            min(num_samples * self.column_tables.count(name), len(self.held_slots(name))) for name in self.tiered
        )

    def nbytes(self) -> int:
        """Bytes of the renumbering."""
        return 0 if self._codes is None else self._codes.nbytes

    def _renumber(self, slot_maps: Mapping[str, np.ndarray], num_hot: int, tierless: list[str]) -> None:
        dtype = next(iter(slot_maps.values())).dtype
        is_tiered = np.ones(self.num_slots, bool)
        for name in tierless:
            is_tiered[slot_maps[name]] = False
        for name, num_held in self._num_held.items():
            is_tiered[slot_maps[name][num_held:]] = False
        codes = np.cumsum(is_tiered, dtype=dtype) - dtype.type(1)
        for name, num_held in self._num_held.items():
            codes[slot_maps[name][num_held:]] = codes[slot_maps[name][OOV_ROW]]
        self.num_hot, self.num_rows = int(np.count_nonzero(is_tiered[:num_hot])), int(np.count_nonzero(is_tiered))
        first = self.num_rows
        for name in tierless:
            slots = slot_maps[name]
            codes[slots] = np.arange(first, first + len(slots), dtype=dtype)
            first += len(slots)
        self._codes = codes
        self.slot_maps = {name: codes[slots] for name, slots in slot_maps.items()}
