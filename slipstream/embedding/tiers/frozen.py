"""Rows as they were at one moment, read a block at a time while training changes them.

A checkpoint must hold all rows of one moment, and copying them at once would stop training and double their memory.
Here nothing is copied at first. A reader takes the rows block by block, and who is about to change a row that was not
read yet has its old value kept; the reader puts kept values into their block. So memory grows by the rows that change
before they are read, and by no more than a share of all: who wants to keep more waits for the reader.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Condition

import numpy as np
import torch
from torch import Tensor

from slipstream.embedding.tiers.on_disk import Records
from slipstream.embedding.tiers.rows import TieredRows

_BLOCK_BYTES = 8 << 20
_MOST_KEPT = 4
"""One in so many rows may be kept beside those that were newer elsewhere from the start."""
_ALWAYS_KEPT = 1 << 16
"""So many rows may always be kept."""
_KEPT_BYTES = 64 << 20
"""Of rows of a file that may be kept."""


class FrozenRows:
    """One tensor of rows, as it was when this was made.

    Args:
        rows: On the host; others may change it, but only after `keep`. Shape (n, …).
        records: Reads them from the file that they are mapped from; None where they are in memory.
    """

    def __init__(self, rows: Tensor, records: Records | None = None) -> None:
        self._rows, self._records = rows, records
        row_bytes = max(1, rows.element_size() * math.prod(rows.shape[1:]))
        self.block_rows = max(1, _BLOCK_BYTES // row_bytes)
        """Rows of a block; the last has what is left."""
        self._kept: dict[int, list[tuple[np.ndarray, Tensor]]] = {}
        self._is_kept = np.zeros(len(rows), bool)
        self._num_kept = 0
        # of a table that is larger than memory a share of all would be too many
        share = len(rows) // _MOST_KEPT if records is None else _KEPT_BYTES // row_bytes
        self._room = max(share, _ALWAYS_KEPT)
        self._num_read = 0
        self._changed = Condition()

    @property
    def shape(self) -> tuple[int, ...]:
        """(n, …)."""
        return tuple(self._rows.shape)

    @property
    def dtype(self) -> torch.dtype:
        """Of their values."""
        return self._rows.dtype

    def replace(self, numbers: np.ndarray, values: Tensor) -> None:
        """Say that rows have their value elsewhere, before anything else is done.

        Args:
            numbers: Distinct rows. Shape (k,), integer.
            values: On the host. Shape (k, …).
        """
        with self._changed:
            self._keep(numbers.astype(np.int64, copy=False), values)
            self._room += len(numbers)

    def keep(self, numbers: np.ndarray) -> None:
        """Keep the values of rows that are about to change.

        Args:
            numbers: Distinct rows. Shape (k,), integer.
        """
        with self._changed:
            wanted = numbers[numbers >= self._num_read].astype(np.int64, copy=False)
            wanted = wanted[~self._is_kept[wanted]]
            if len(wanted):
                self._keep(wanted, self._gather(torch.from_numpy(wanted)))
                self._changed.wait_for(lambda: self._num_kept <= self._room)

    def blocks(self) -> Iterator[np.ndarray]:
        """Give the rows in order, a block at a time; once."""
        for start in range(0, len(self._rows), self.block_rows):
            with self._changed:
                stop = min(start + self.block_rows, len(self._rows))
                if self._num_read > start:
                    return  # closed
                block = self._read(start, stop)
                for numbers, values in self._kept.pop(start // self.block_rows, ()):
                    block[torch.from_numpy(numbers - start)] = values
                    self._num_kept -= len(numbers)
                self._num_read = stop
                self._changed.notify_all()
            yield block.numpy()

    def _read(self, start: int, stop: int) -> Tensor:
        """Give rows as they are, but for those that were kept: somebody may be writing these now."""
        if self._records is not None:
            return self._records.read(start, stop)  # all in one go: what was kept is put over it
        is_kept = self._is_kept[start:stop]
        if not is_kept.any():
            return self._rows[start:stop].clone()
        block = torch.zeros(stop - start, *self.shape[1:], dtype=self._rows.dtype)
        unchanged = torch.from_numpy(np.flatnonzero(~is_kept))
        return block.index_copy_(0, unchanged, self._rows.index_select(0, unchanged + start))

    def close(self) -> None:
        """Stop keeping rows: nobody reads on."""
        with self._changed:
            self._num_read, self._num_kept = len(self._rows), 0
            self._kept.clear()
            self._changed.notify_all()

    def _gather(self, numbers: Tensor) -> Tensor:
        return self._rows.index_select(0, numbers) if self._records is None else self._records.gather(numbers)

    def _keep(self, numbers: np.ndarray, values: Tensor) -> None:
        """Sort rows into the blocks they will be read with."""
        if not len(numbers):
            return
        order = np.argsort(numbers, kind="stable")
        numbers = numbers[order]
        values = values[torch.from_numpy(order)]
        blocks = numbers // self.block_rows
        starts = np.flatnonzero(np.diff(blocks, prepend=-1))
        for start, stop in zip(starts, [*starts[1:], len(numbers)], strict=True):
            self._kept.setdefault(int(blocks[start]), []).append((numbers[start:stop], values[start:stop]))
        self._is_kept[numbers] = True
        self._num_kept += len(numbers)


class FrozenTiers:
    """The rows of both tiers, and their optimizer state, as they were at one moment.

    Args:
        rows: The tiers, while no row moves.
        staged: (cold rows, positions) of rows that are newer in the buffer than in the cold tier.
        clone_to: File for a copy of the cold tier, where the file system makes one at once; None to read the tier.
    """

    def __init__(self, rows: TieredRows, staged: tuple[np.ndarray, np.ndarray], clone_to: Path | None = None) -> None:
        self.clone = clone_to if clone_to is not None and rows.clone_cold(clone_to, staged) else None
        """The file with the cold rows, which no step changes; None where `cold` has them."""
        cold, positions = rows.choose_own(*staged)
        self._num_hot, self.num_cold = rows.num_hot, rows.num_cold
        self._keeps_hot = rows.device.type == "cpu"
        self.hot: list[FrozenRows] = []
        """One for each tensor that travels with a row."""
        self.cold: list[FrozenRows] = []
        """One for each home of cold rows."""
        self.cold_names: list[str] = []
        """What each of them is called."""
        for buffer, _ in rows.pairs:
            # the hot tier of a GPU is changed by kernels that tell nobody which rows; the host has room for a copy
            self.hot.append(FrozenRows(buffer[: rows.num_hot].cpu()))
        for index, home in enumerate(rows.homes if self.clone is None else ()):
            records = home if isinstance(home, Records) else None
            self.cold.append(FrozenRows(home.host, records))
            self.cold[-1].replace(cold, home.take(torch.from_numpy(positions).to(rows.device)).cpu())
            self.cold_names.append(str(index) if records is None else "records")

    def keep_cold(self, cold: np.ndarray) -> None:
        """Keep rows of the cold tier that are about to change. Distinct, shape (n,), integer."""
        for frozen in self.cold:
            frozen.keep(cold)

    def keep_hot(self, find_positions: Callable[[], Tensor]) -> None:
        """Keep the rows that a step is about to change, given by their positions, hot ones among them. Shape (L,)."""
        if self._keeps_hot:
            positions = np.unique(find_positions().numpy())
            hot = positions[: np.searchsorted(positions, self._num_hot)]
            for frozen in self.hot:
                frozen.keep(hot)

    def close(self) -> None:
        """Let go of everything that was kept."""
        for frozen in (*self.hot, *self.cold):
            frozen.close()
