"""A cold tier larger than memory: a mapped file, of which the page cache holds what is used.

    file   [C + P, W]   row of slot H + i at i: its values, the optimizer's state, its lead, side by side

What travels with a row lies beside it, so that one page fault brings all of it, and rows are ranked by how often they
are used, so that those in use share pages. A page that is not in memory is waited for, so rows are read by several
threads, which wait at the same time. Changed pages are the kernel's to write, when it likes: the file is no checkpoint.

The file has no name. It belongs to this process alone and is gone with it, however that ends.

Shape suffixes: H hot rows, C cold rows, P spare ones, W values of a row with all that travels with it.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import math
import mmap
import os
import shutil
import tempfile
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from slipstream.embedding.tiers.home import Home
from slipstream.embedding.tiers.rows import TieredRows

NUM_THREADS = 16
"""That wait for pages at the same time: five times as many rows a second as one of them, and 32 bring no more."""
_FEW_ROWS = 256
"""For which no other thread is asked."""
_FICLONE = 0x40049409
"""Number of the request that lets two files share their blocks until one of them is changed (Linux)."""
_CANNOT_CLONE = {errno.EOPNOTSUPP, errno.ENOTTY, errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EPERM}


class RecordFile:
    """Records of one size in a mapped file without a name, all zeros at first.

    Args:
        folder: On whose file system it is; made where it is missing.
        num_records: n.
        width: W.
        dtype: Of the values.

    Raises:
        OSError: The folder cannot be written, or there is no room for the file.
    """

    def __init__(self, folder: Path, num_records: int, width: int, dtype: torch.dtype) -> None:
        self.nbytes = num_records * width * dtype.itemsize
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            os.posix_fallocate(file.fileno(), 0, self.nbytes)  # here or never: a page without a block is a SIGBUS later
            self._map = mmap.mmap(file.fileno(), self.nbytes)
            self._descriptor = os.dup(file.fileno())
        weakref.finalize(self, os.close, self._descriptor)
        self._map.madvise(mmap.MADV_RANDOM)  # neighbours of a page are not wanted with it
        self.records = torch.frombuffer(self._map, dtype=dtype).view(num_records, width)
        """Shape (n, W)."""
        self._threads = ThreadPoolExecutor(NUM_THREADS, thread_name_prefix="cold-rows")

    def gather(self, numbers: np.ndarray, out: np.ndarray) -> None:
        """Read records; ascending numbers are read fastest. Shapes (k,) and (k, W)."""
        records = self.records.numpy()

        def take(part: slice) -> None:
            # `clip` writes to `out` directly, and looks at no number twice; the threads wait without the interpreter
            np.take(records, numbers[part], axis=0, out=out[part], mode="clip")

        self._share_out(take, len(numbers))

    def scatter(self, numbers: np.ndarray, values: np.ndarray) -> None:
        """Write records with distinct numbers. Shapes (k,) and (k, W)."""
        records = self.records.numpy()

        def put(part: slice) -> None:
            records[numbers[part]] = values[part]

        self._share_out(put, len(numbers))

    def read(self, start: int, stop: int) -> np.ndarray:
        """Read records that follow each other, as a file is read: the kernel reads ahead. Shape (stop - start, W)."""
        block = np.empty_like(self.records.numpy()[start:stop])
        target, offset = block.reshape(-1).view(np.uint8).data, start * block.strides[0]
        while target:
            count = os.preadv(self._descriptor, [target], offset)
            target, offset = target[count:], offset + count
        return block

    def clone_to(self, path: Path) -> bool:
        """Make a file that shares its blocks with this one until either changes; whether the file system can.

        It is not made where the disk could not hold both once they have nothing in common: a mapped page that finds no
        block ends the process.
        """
        if shutil.disk_usage(path.parent).free < self.nbytes:
            return False
        try:
            with path.open("wb") as target:
                fcntl.ioctl(target, _FICLONE, self._descriptor)
        except OSError as exc:
            path.unlink(missing_ok=True)
            if exc.errno not in _CANNOT_CLONE:
                raise
            return False
        return True

    def close(self) -> None:
        """Give the disk its blocks back now; what is left of the map reads as zeros."""
        self._threads.shutdown()
        with contextlib.suppress(OSError):  # where a file cannot have holes, its blocks go when nobody has the map
            self._map.madvise(mmap.MADV_REMOVE)

    def _share_out(self, work: Callable[[slice], None], count: int) -> None:
        """Let threads do parts of what there is to do for so many rows."""
        if count <= _FEW_ROWS:
            work(slice(0, count))
            return
        size = -(-count // NUM_THREADS)
        parts = (slice(start, min(start + size, count)) for start in range(0, count, size))
        for done in [self._threads.submit(work, part) for part in parts]:
            done.result()


class Records(Home):
    """The file, and the tensors of the buffer whose rows make up a record.

    Args:
        file: The file.
        host: Its records, without spare ones. Shape (C, W).
        buffers: In the order in which they stand in a record. Shapes (positions, …).
    """

    def __init__(self, file: RecordFile, host: Tensor, buffers: Sequence[Tensor]) -> None:
        super().__init__(host, buffers)
        self._file = file
        self._widths = [math.prod(buffer.shape[1:]) for buffer in buffers]

    def gather(self, numbers: Tensor, out: Tensor | None = None) -> Tensor:
        """Read records. (n,) int64 -> (n, W)."""
        records = self.host.new_empty(len(numbers), self.host.shape[1]) if out is None else out
        self._file.gather(numbers.numpy(), records.numpy())
        return records

    def scatter(self, numbers: Tensor, values: Tensor) -> None:
        """Write records. Distinct (n,) int64; (n, W)."""
        self._file.scatter(numbers.numpy(), values.numpy())

    def read(self, start: int, stop: int) -> Tensor:
        """Copy records that follow each other; others may be writing some of them."""
        return torch.from_numpy(self._file.read(start, stop))

    def take(self, positions: Tensor) -> Tensor:
        """Read rows of the buffer as records. (n,) int64 on the device -> (n, W) there."""
        rows = (buffer.index_select(0, positions) for buffer in self.buffers)
        return torch.cat([part.view(len(part), width) for part, width in zip(rows, self._widths, strict=True)], dim=1)

    def put(self, positions: Tensor, values: Tensor) -> None:
        """Write rows of the buffer. (n,) int64 and (n, W), both on the device."""
        for buffer, part in zip(self.buffers, values.split(self._widths, dim=1), strict=True):
            buffer.index_copy_(0, positions, part.reshape(len(positions), *buffer.shape[1:]))


class DiskRows(TieredRows):
    """All rows of all tables, the cold ones in a mapped file.

    Args:
        folder: On whose file system the file is.
        **options: Of `TieredRows`.

    Raises:
        OSError: As `RecordFile`.
    """

    def __init__(self, *, folder: Path, **options: Any) -> None:
        self._folder = folder
        super().__init__(**options)

    def make_host(self, shapes: Sequence[tuple[int, ...]]) -> list[Tensor]:
        """Make the file, and give its columns."""
        widths = [math.prod(shape[1:]) for shape in shapes]
        self._file: RecordFile | None = None
        if torch.get_default_device().type != "cpu":  # a forecast: no file at all
            records = torch.zeros(shapes[0][0], sum(widths))
        else:
            self._file = RecordFile(self._folder, shapes[0][0], sum(widths), torch.get_default_dtype())
            records = self._file.records
        self._records = records[: self.num_cold]
        columns = records.split(widths, dim=1)
        return [column.squeeze(1) if len(shape) == 1 else column for column, shape in zip(columns, shapes, strict=True)]

    @property
    def homes(self) -> list[Home]:
        """Where cold rows lie: each with all that travels with it."""
        assert self._file is not None
        return [Records(self._file, self._records, [buffer for buffer, _ in self.pairs])]

    def close(self) -> None:
        """Give up the file; rows cannot be read any more."""
        assert self._file is not None
        self._file.close()

    def bytes_per_tier(self) -> dict[str, int]:
        """Bytes of the hot rows, of staging and of the file."""
        tiers = super().bytes_per_tier()
        return {**tiers, "cold": 0, "disk": tiers["cold"]}

    def order_moves(self, cold: np.ndarray, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Give (cold rows, positions) in the order of the file: those of one page follow each other."""
        order = np.argsort(cold)
        return cold[order], positions[order]

    def clone_cold(self, path: Path, staged: tuple[np.ndarray, np.ndarray]) -> bool:
        """Have the file system keep the cold tier as it is now, in a file; as in `TieredRows`."""
        assert self._file is not None
        cold, positions = staged
        (home,) = self.homes
        at = torch.from_numpy(positions.astype(np.int64, copy=False)).to(self.device)
        # they are written again when they leave the buffer
        home.scatter(torch.from_numpy(cold.astype(np.int64, copy=False)), home.take(at).cpu())
        return self._file.clone_to(path)

    def read_cold(self, host: Tensor, cold: Tensor) -> Tensor:
        """Read rows of the cold tier, or what travels with them. (n,) integer -> (n, …)."""
        numbers, inverse = np.unique(cold.numpy(), return_inverse=True)
        records = self.homes[0].gather(torch.from_numpy(numbers.astype(np.int64, copy=False)))
        start, width = host.storage_offset(), math.prod(host.shape[1:])
        rows = records[:, start : start + width].reshape(len(numbers), *host.shape[1:])
        return rows.index_select(0, torch.from_numpy(inverse))
