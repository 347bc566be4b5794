"""The host side of a cached table: rows at home, and the copies to the cache and back.

Shape suffixes: N rows of the table, S positions of the cache, D embedding_dim.
"""

import numpy as np
import torch
from torch import Tensor

Tables = dict[str, Tensor]


class HostTables:
    """The rows at home, weights and optimizer state alike, and their way to the cache and back.

    A write-back is begun at once and lands in the tables at `land`, which comes before the next read of
    those rows: so on a device the copy out runs beside the step.
    """

    def __init__(self, tables: Tables, buffer_size: int) -> None:
        self.tables = tables
        self.bytes_to_device = 0
        self.bytes_to_host = 0
        self._buffer_size = buffer_size
        self._outward: dict[str, _Staging] = {}
        self._homeward: dict[str, _Staging] = {}
        self._landing: tuple[Tensor, Tables] | None = None

    @property
    def staging_bytes(self) -> int:
        """Bytes of the staging buffers."""
        return sum(s.buffer.nbytes for s in (*self._outward.values(), *self._homeward.values()))

    def read(self, rows: np.ndarray) -> Tensor:
        """Copy weights out, for rows that are not in the cache."""
        self.land()
        return self.tables["weight"].index_select(0, torch.from_numpy(rows.astype(np.int64)))

    def fetch(self, rows: np.ndarray, positions: np.ndarray, near: Tables) -> None:
        """Copy rows and their state into the cache; none of them may be under way home."""
        for part in self._parts(rows.size):
            index = torch.from_numpy(rows[part])
            target = index_on(near["weight"].device, positions[part])
            for name, table in self.tables.items():
                staging = self._outward.setdefault(name, _Staging(table, near[name].device))
                staged = staging.take(index.shape[0])
                torch.index_select(table, 0, index, out=staged)
                near[name].index_copy_(0, target, staged.to(near[name].device, non_blocking=True))
                staging.mark_in_use()
                self.bytes_to_device += staged.nbytes

    def write_back(self, rows: np.ndarray, positions: np.ndarray, near: Tables) -> None:
        """Begin copying rows and their state home."""
        for part in self._parts(rows.size):
            self.land()  # the buffers are free again
            source = index_on(near["weight"].device, positions[part])
            staged_tables = {}
            for name, table in self.tables.items():
                staging = self._homeward.setdefault(name, _Staging(table, near[name].device))
                staged = staging.take(source.shape[0])
                if staged.device == near[name].device:
                    torch.index_select(near[name], 0, source, out=staged)
                else:
                    staged.copy_(near[name].index_select(0, source), non_blocking=True)
                staging.mark_in_use()
                staged_tables[name] = staged
                self.bytes_to_host += staged.nbytes
            self._landing = torch.from_numpy(rows[part]), staged_tables

    def land(self) -> None:
        """Let the write-back that is under way land in the tables."""
        if self._landing is None:
            return
        rows, staged_tables = self._landing
        self._landing = None
        for name, staged in staged_tables.items():
            self._homeward[name].wait()
            self.tables[name].index_copy_(0, rows, staged)

    def cast(self, dtypes: dict[str, torch.dtype]) -> None:
        """Change dtypes and forget the staging buffers, after the cache was moved or cast."""
        self.land()
        self.tables = {name: table.to(dtypes[name]) for name, table in self.tables.items()}
        self._outward.clear()
        self._homeward.clear()

    def _parts(self, num_rows: int) -> list[slice]:
        size = self._buffer_size or max(1, num_rows)
        return [slice(start, start + size) for start in range(0, num_rows, size)]


class _Staging:
    """A host buffer kept across steps, page-locked for CUDA, that waits for its last copy before reuse."""

    def __init__(self, table: Tensor, device: torch.device) -> None:
        self.buffer = table.new_empty((0, *table.shape[1:]))
        self._device = device
        self._copied: torch.cuda.Event | None = None

    def take(self, num_rows: int) -> Tensor:
        """Hand out the first rows of the buffer, grown if it must be."""
        self.wait()
        if self.buffer.shape[0] < num_rows:
            shape = (num_rows + num_rows // 4, *self.buffer.shape[1:])
            self.buffer = torch.empty(shape, dtype=self.buffer.dtype, pin_memory=self._device.type == "cuda")
        return self.buffer[:num_rows]

    def mark_in_use(self) -> None:
        """Note that a copy from or to the buffer was queued on the current stream."""
        if self._device.type == "cuda":
            self._copied = torch.cuda.Event()
            self._copied.record(torch.cuda.current_stream(self._device))

    def wait(self) -> None:
        """Wait until that copy is done."""
        if self._copied is not None:
            self._copied.synchronize()
            self._copied = None


def index_on(device: torch.device, positions: np.ndarray) -> Tensor:
    """Positions as an index on a device, without waiting for the copy."""
    index = torch.from_numpy(positions.astype(np.int64))
    if device.type == "cuda":
        return index.pin_memory().to(device, non_blocking=True)
    return index.to(device)
