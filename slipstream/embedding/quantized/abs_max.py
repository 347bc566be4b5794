"""The largest weight of a table that is too large to read again, and of rows at hand.

Shape suffixes: N rows of a table, D embedding_dim, U unique rows of a lookup.
"""

from collections.abc import Callable

import torch
from torch import Tensor

BLOCK_ROWS = 256
"""Rows that share one bound in `AbsMaxTracker`: 4 bytes per block, 0.1 % of a table of 16 columns over 4."""

FANOUT = 64
"""Children of a node in the tree of bounds."""

LEAST_REREADS = 16
"""Blocks that a search for the largest weight may re-read, however short the period."""

PENDING_ROWS = 32_768
"""Rows noted before they are read in one go: few enough to be in the cache, enough to spread the cost."""

MOST_PENDING_ROWS = 4 * PENDING_ROWS
"""Rows kept while their change is still to come, as gradients accumulate over several forwards."""

CHUNK_ROWS = 65_536
"""Rows a full pass over a table handles at once, so that its temporaries stay small."""


def abs_max_of_rows(x: Tensor) -> Tensor:
    """Largest absolute value of each row; NaN wins."""
    return torch.maximum(x.amax(1), x.amin(1).neg_())


class AbsMaxTracker:
    """The largest |w| of a table, kept up to date at a cost that does not grow with the table.

    Rows are grouped in blocks of 256. Each block has an upper bound on its |w|, and a tree of maxima with 64
    children per node stands over the bounds. `maximum`

    1. reads the rows noted since last time (they are the ones an optimizer changed) and *raises* the bounds;
    2. re-reads `rows_per_refresh` rows from a cursor that goes round the table, making those bounds exact;
    3. looks at the block with the largest bound: exact, then it is the answer; else it is re-read and the
       search goes on, for R = max(rows_per_refresh / 256, 16) blocks at most.

    So the maximum also shrinks, at once and without reading the table. **Exactness**: if only noted rows
    change, the answer is never below max|w|, and it is max|w| unless step 3 ran out of blocks, that is unless
    R or more blocks once had a larger weight than any there is now and were not read since. Gradients may
    accumulate over forwards of 131,072 looked-up rows before the optimizer steps. **Staleness**: a change of
    a row that was not noted (momentum moving rows without a lookup, a write into the tensor) is seen when the
    cursor comes by, within ceil(num_rows / rows_per_refresh) calls. **Cost** of a call: the noted rows,
    rows_per_refresh rows and at most R blocks of 256 rows, plus O(log num_rows). The first call reads the
    table once; memory is about 5 bytes per block.

    A table of at most `rows_per_refresh` rows is read whole every time: no bounds, always exact.

    Args:
        num_rows: N.
        rows_per_refresh: Rows a call may sweep, and re-read, > 0. Rounded up to whole blocks.
    """

    def __init__(self, num_rows: int, rows_per_refresh: int) -> None:
        self.num_rows = num_rows
        self.blocks_per_refresh = -(-rows_per_refresh // BLOCK_ROWS)
        self.is_exhaustive = num_rows <= rows_per_refresh
        self.rows_read = 0
        self._num_blocks = -(-num_rows // BLOCK_ROWS)
        self._cursor = 0
        self._bounds: list[Tensor] = []
        self._is_exact = torch.empty(0, dtype=torch.bool)
        self._noted: list[tuple[Tensor, int]] = []

    def note(self, rows: Tensor, version: int = -1) -> bool:
        """Remember rows that an optimizer is about to change or has changed.

        Args:
            rows: Row numbers, shape (U,), int64.
            version: Version of the weight now, if the change is still to come. The rows are then kept until
                they were read at a later version, so that forwards whose gradients accumulate are not
                forgotten.

        Returns:
            Whether so many rows are waiting that `read_noted` should be called.
        """
        if self.is_exhaustive:
            return False
        self._noted.append((rows, version))
        changed = sum(noted.numel() for noted, at in self._noted if at != version or version < 0)
        return changed >= PENDING_ROWS

    def read_noted(self, read: Callable[[Tensor | slice], Tensor], version: int) -> None:
        """Read the noted rows and raise the bounds of their blocks.

        Args:
            read: Gives the current values of rows, shape (U, D).
            version: Version of the weight now.
        """
        if self._noted and self._bounds:
            self._raise_bounds(read)
        self._noted = [entry for entry in self._noted if entry[1] == version]
        while sum(noted.numel() for noted, _ in self._noted[1:]) > MOST_PENDING_ROWS:
            del self._noted[0]

    def _raise_bounds(self, read: Callable[[Tensor | slice], Tensor]) -> None:
        rows = torch.cat([noted for noted, _ in self._noted])
        self.rows_read += rows.numel()
        abs_max = abs_max_of_rows(read(rows))
        nodes = torch.div(rows, BLOCK_ROWS, rounding_mode="floor")
        self._is_exact[nodes] = False
        for level in self._bounds:
            level.scatter_reduce_(0, nodes, abs_max, "amax")
            nodes = torch.div(nodes, FANOUT, rounding_mode="floor")

    def maximum(self, read: Callable[[Tensor | slice], Tensor], version: int = 0) -> Tensor:
        """Give max|w|, or an upper bound on it as the class explains.

        Args:
            read: Gives the current values of rows, by row numbers or by slice. Shape (U, D), float.
            version: Version of the weight now.

        Returns:
            Scalar tensor of the dtype that `read` gives.

        Raises:
            ValueError: A weight is NaN or infinite.
        """
        if self.is_exhaustive:
            largest = self._read_blocks(read, 0, self._num_blocks).amax()
        else:
            self.read_noted(read, version)
            if self._bounds:
                self._sweep(read)
            else:
                self._build(read)
            largest = self._search(read)
        if not bool(torch.isfinite(largest)):
            raise ValueError(
                f"weights: expected finite values, found a largest |w| of {float(largest)}; "
                "lower the learning rate or go back to the last good checkpoint"
            )
        return largest

    def _build(self, read: Callable[[Tensor | slice], Tensor]) -> None:
        bounds = self._read_blocks(read, 0, self._num_blocks)
        self._is_exact = torch.ones(self._num_blocks, dtype=torch.bool, device=bounds.device)
        while True:
            padding = -bounds.numel() % FANOUT if bounds.numel() > 1 else 0
            self._bounds.append(torch.cat([bounds, bounds.new_zeros(padding)]))
            if bounds.numel() == 1:
                return
            bounds = self._bounds[-1].view(-1, FANOUT).amax(1)

    def _sweep(self, read: Callable[[Tensor | slice], Tensor]) -> None:
        stop = min(self._cursor + self.blocks_per_refresh, self._num_blocks)
        self._make_exact(read, self._cursor, stop)
        self._cursor = 0 if stop == self._num_blocks else stop

    def _search(self, read: Callable[[Tensor | slice], Tensor]) -> Tensor:
        for _ in range(max(self.blocks_per_refresh, LEAST_REREADS)):
            block = 0
            for level in reversed(self._bounds[:-1]):
                children = level[block * FANOUT : (block + 1) * FANOUT]
                block = block * FANOUT + int(children.argmax())
            if self._is_exact[block]:
                break
            self._make_exact(read, block, block + 1)
        return self._bounds[-1][0].clone()

    def _make_exact(self, read: Callable[[Tensor | slice], Tensor], first: int, stop: int) -> None:
        self._bounds[0][first:stop] = self._read_blocks(read, first, stop)
        self._is_exact[first:stop] = True
        for children, parents in zip(self._bounds, self._bounds[1:], strict=False):
            first, stop = first // FANOUT, (stop - 1) // FANOUT + 1
            parents[first:stop] = children[first * FANOUT : stop * FANOUT].view(-1, FANOUT).amax(1)

    def _read_blocks(self, read: Callable[[Tensor | slice], Tensor], first: int, stop: int) -> Tensor:
        """Largest absolute value of each block in [first, stop)."""
        parts = []
        for start in range(first * BLOCK_ROWS, min(stop * BLOCK_ROWS, self.num_rows), CHUNK_ROWS):
            values = read(slice(start, min(start + CHUNK_ROWS, stop * BLOCK_ROWS, self.num_rows)))
            self.rows_read += values.shape[0]
            whole = values.shape[0] // BLOCK_ROWS * BLOCK_ROWS
            if whole:
                parts.append(abs_max_of_rows(values[:whole].reshape(whole // BLOCK_ROWS, -1)))
            if whole < values.shape[0]:
                parts.append(abs_max_of_rows(values[whole:].reshape(1, -1)))
        return torch.cat(parts)
