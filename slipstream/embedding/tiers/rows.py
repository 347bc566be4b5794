"""Where rows live: a hot tier on the device, a cold tier on the host, and a staging area between them.

Every row has one owner. Hot rows live in the hot tier only, cold rows in the cold tier, except while batches that
use them are at work: then they sit in the staging area of the device buffer.

    buffer  [H+S+P, D]    0 .. H-1      hot rows, position = slot
                          H .. H+S-1    staging area: two halves that take turns, or a cache
                          H+S ..        spare rows that no slot has: fixed-shape steps send their padding there
    cold    [V - H, D]    row of slot H + i at i

A batch's slots become positions in the buffer, so a lookup is one gather and an update one scatter, whatever
the batch. Optimizer state has the same layout and travels with its row.

Shape suffixes: V rows of all tables, H hot rows, S staged rows, P spare rows, D embedding_dim, U unique positions.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

RowOptimizer = Literal["sgd", "rowwise_adagrad"]
NUM_SPARE = 1024
"""P. More than one: hundreds of thousands of stores to a single row would wait for each other on a GPU."""


class TieredRows:
    """All rows of all tables, split over device and host.

    Args:
        num_rows: V.
        num_hot: H; V keeps everything on the device, 0 everything on the host.
        embedding_dim: D.
        num_staged: S.
        optimizer: `sgd` has no state; `rowwise_adagrad` one float per row.
        device: Where the buffer lives.
    """

    def __init__(
        self,
        *,
        num_rows: int,
        num_hot: int,
        embedding_dim: int,
        num_staged: int,
        optimizer: RowOptimizer,
        device: torch.device,
    ) -> None:
        if not 0 <= num_hot <= num_rows:
            raise ValueError(f"expected 0 to {num_rows} hot rows, found {num_hot}")
        self.num_rows, self.num_hot, self.embedding_dim = num_rows, num_hot, embedding_dim
        self.num_cold = num_rows - num_hot
        self.num_staged = num_staged
        self.optimizer: RowOptimizer = optimizer
        self.device = device
        num_positions = num_hot + num_staged + NUM_SPARE
        self.buffer = torch.zeros(num_positions, embedding_dim, device=device)
        self.cold = torch.zeros(self.num_cold, embedding_dim)
        self.buffer_state: Tensor | None = None
        self.cold_state: Tensor | None = None
        if optimizer == "rowwise_adagrad":
            self.buffer_state = torch.zeros(num_positions, device=device)
            self.cold_state = torch.zeros(self.num_cold)

    @property
    def first_spare(self) -> int:
        """The position from which on there are only rows that no slot has."""
        return self.num_hot + self.num_staged

    @property
    def positions_fit_32_bits(self) -> bool:
        """Whether every position is an int32: sorting those takes half as long."""
        return len(self.buffer) <= 2**31

    def padding(self, count: int) -> Tensor:
        """Positions of spare rows, each as often as any other. Shape (count,), int64."""
        return torch.arange(count, device=self.device).remainder_(NUM_SPARE).add_(self.first_spare)

    @property
    def pairs(self) -> list[tuple[Tensor, Tensor]]:
        """(device tensor, host tensor) of everything that travels with a row."""
        travelling = [(self.buffer, self.cold)]
        if self.buffer_state is not None and self.cold_state is not None:
            travelling.append((self.buffer_state, self.cold_state))
        return travelling

    @property
    def row_bytes(self) -> int:
        """Bytes that move when a row moves."""
        return sum(host.element_size() * host[:1].numel() for _, host in self.pairs) if self.num_cold else 0

    def bytes_per_tier(self) -> dict[str, int]:
        """Bytes of the hot rows, of staging and of the cold rows, optimizer state included."""
        per_row = 4 * self.embedding_dim + (4 if self.buffer_state is not None else 0)
        return {
            "hot": self.num_hot * per_row,
            "staging": self.num_staged * per_row,
            "cold": self.num_cold * per_row,
        }

    def load(self, slots: Tensor, weights: Tensor, state: Tensor | None = None) -> None:
        """Put rows where they live. No chunk may be at work.

        Args:
            slots: Shape (n,), integer.
            weights: Shape (n, D).
            state: Optimizer state, where there is one. Shape (n,).
        """
        is_hot = slots < self.num_hot
        hot, cold = slots[is_hot], slots[~is_hot] - self.num_hot
        self.buffer[hot.to(self.device)] = weights[is_hot].to(self.device)
        self.cold[cold] = weights[~is_hot]
        if state is not None:
            assert self.buffer_state is not None and self.cold_state is not None
            self.buffer_state[hot.to(self.device)] = state[is_hot].to(self.device)
            self.cold_state[cold] = state[~is_hot]

    def gather(self, slots: Tensor) -> Tensor:
        """Rows wherever they live, on the device. No chunk may be at work.

        Args:
            slots: On the host. Shape (n,), integer.

        Returns:
            Shape (n, D).
        """
        is_hot = slots < self.num_hot
        if bool(is_hot.all()):
            return self.buffer.index_select(0, slots.to(self.device))
        rows = torch.empty(len(slots), self.embedding_dim, device=self.device)
        rows[is_hot.to(self.device)] = self.buffer[slots[is_hot].to(self.device)]
        rows[~is_hot.to(self.device)] = self.cold[slots[~is_hot] - self.num_hot].to(self.device)
        return rows

    def read_state(self, slots: Tensor) -> Tensor:
        """Optimizer state wherever it lives, on the host. Shape (n,)."""
        if self.buffer_state is None or self.cold_state is None:
            raise ValueError(f"expected an optimizer with state, found {self.optimizer}")
        state = torch.empty(len(slots))
        is_hot = slots < self.num_hot
        state[is_hot] = self.buffer_state[slots[is_hot].to(self.device)].cpu()
        state[~is_hot] = self.cold_state[slots[~is_hot] - self.num_hot]
        return state


def update_rows(
    optimizer: RowOptimizer,
    weights: Tensor,
    state: Tensor | None,
    positions: Tensor,
    values: Tensor,
    gradients: Tensor,
    *,
    lr: Tensor,
    eps: float,
    sample_weights: Tensor | None = None,
) -> None:
    """Apply one sparse step in place.

    `sgd` w -= lr g; `rowwise_adagrad` s += mean(g²) / m, w -= lr g / (sqrt(s) + eps).

    Args:
        optimizer: Rule.
        weights: Shape (P, D).
        state: Accumulator of row-wise Adagrad. Shape (P,).
        positions: Distinct rows to change. Shape (U,), int64.
        values: Their weights, as the step has read them already; used up. Shape (U, D).
        gradients: Summed over duplicates; used up. Shape (U, D).
        lr: Learning rate, without dimensions, on the same device.
        eps: Added to the root of the accumulator.
        sample_weights: m, the weight of the samples behind each gradient: one sample of weight m leaves in the
            accumulator what m samples of weight 1 would have left. None is 1. Shape (U,).

    Source: row-wise Adagrad as in FBGEMM's EXACT_ROWWISE_ADAGRAD.
    """
    if optimizer == "rowwise_adagrad":
        assert state is not None
        squares = gradients.square().mean(dim=1)
        if sample_weights is not None:
            squares = squares.div_(sample_weights)
        moved = state.index_select(0, positions).add_(squares)
        state.index_copy_(0, positions, moved)
        gradients = gradients.div_(moved.sqrt_().add_(eps).unsqueeze(1))
    weights.index_copy_(0, positions, values.sub_(gradients.mul_(lr)))
