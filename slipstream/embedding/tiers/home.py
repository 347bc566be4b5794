"""Where cold rows lie on the host, and how they get there from the buffer and back."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class Home:
    """A tensor of the cold tier, and the tensors of the buffer whose rows travel to it and from it.

    Args:
        host: One entry per cold row. Shape (C, …).
        buffers: What a row is on the device, side by side in an entry. Shapes (P, …).
    """

    def __init__(self, host: Tensor, buffers: Sequence[Tensor]) -> None:
        self.host, self.buffers = host, list(buffers)

    def gather(self, numbers: Tensor, out: Tensor | None = None) -> Tensor:
        """Read entries. (n,) int64 -> (n, …)."""
        return torch.index_select(self.host, 0, numbers, out=out)

    def scatter(self, numbers: Tensor, values: Tensor) -> None:
        """Write entries. Distinct (n,) int64; (n, …)."""
        self.host.index_copy_(0, numbers, values)

    def take(self, positions: Tensor) -> Tensor:
        """Read rows of the buffer, as entries are. (n,) int64 on the device -> (n, …) there."""
        return self.buffers[0].index_select(0, positions)

    def put(self, positions: Tensor, values: Tensor) -> None:
        """Write rows of the buffer. (n,) int64 and (n, …), both on the device."""
        self.buffers[0].index_copy_(0, positions, values)
