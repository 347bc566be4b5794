"""Where rows live: a hot tier on the device, a cold tier on the host, and a staging area between them.

Every row has one owner. Hot rows live in the hot tier only, cold rows in the cold tier, except while batches that
use them are at work: then they sit in the staging area of the device buffer.

    buffer  [H+S+P, D]    0 .. H-1      hot rows, position = slot
                          H .. H+S-1    staging area: two halves that take turns, or a cache
                          H+S ..        spare rows that no slot has: fixed-shape steps send their padding there
    cold    [V - H, D]    row of slot H + i at i, and spare rows after the last

A batch's slots become positions in the buffer, so a lookup is one gather and an update one scatter, whatever
the batch. Optimizer state has the same layout and travels with its row.

Shape suffixes: V rows of all tables, H hot rows, S staged rows, P spare rows, D embedding_dim, U unique positions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from slipstream.embedding.rules import OPTIMIZERS, RowOptimizer
from slipstream.embedding.tiers.home import Home
from slipstream.embedding.tiers.mapped import zeros_in_own_pages

NUM_SPARE = 1024
"""P. More than one: hundreds of thousands of stores to a single row would wait for each other on a GPU."""
NUM_SPARE_COLD = 2
"""Rows after the last cold one: where fixed shapes ask for a row, one is read and another written."""


class TieredRows:
    """All rows of all tables, split over device and host.

    Args:
        num_rows: V.
        num_hot: H; V keeps everything on the device, 0 everything on the host.
        embedding_dim: D.
        num_staged: S.
        optimizer: Name of the rule that rows are updated by, whose state travels with them.
        device: Where the buffer lives.
        keeps_lead: Whether a row has its lead beside it, for the mean over steps (`training/averaging.py`).
    """

    def __init__(
        self,
        *,
        num_rows: int,
        num_hot: int,
        embedding_dim: int,
        num_staged: int,
        optimizer: str,
        device: torch.device,
        keeps_lead: bool = False,
    ) -> None:
        if not 0 <= num_hot <= num_rows:
            raise ValueError(f"expected 0 to {num_rows} hot rows, found {num_hot}")
        self.num_rows, self.num_hot, self.embedding_dim = num_rows, num_hot, embedding_dim
        self.num_cold = num_rows - num_hot
        self.num_staged = num_staged
        self.optimizer, self.rule = optimizer, OPTIMIZERS.get(optimizer)
        self.device = device
        num_positions = num_hot + num_staged + NUM_SPARE
        self.buffer = torch.zeros(num_positions, embedding_dim, device=device)
        host_shape = (self.count_cold_here() + NUM_SPARE_COLD, embedding_dim)
        shapes = self.rule.state_shapes(self.buffer.shape), self.rule.state_shapes(host_shape)
        self.buffer_state = [torch.zeros(shape, device=device) for shape in shapes[0].values()]
        """What the rule keeps, in its order, of every position."""
        self.buffer_lead = torch.zeros_like(self.buffer) if keeps_lead else None
        """n times what the row at a position is ahead of its mean over n steps. Shape of `buffer`."""
        leads = [host_shape] if keeps_lead else []
        self.on_host = self.make_host([host_shape, *shapes[1].values(), *leads])
        """Everything of the cold rows that has a pair on the device, each with its spare rows."""
        self.cold, *rest = (tensor[: self.count_cold_here()] for tensor in self.on_host)
        self.cold_state = rest[: len(shapes[1])]
        """What the rule keeps of every cold row."""
        self.cold_lead = rest[-1] if keeps_lead else None
        """The lead of every cold row."""
        self.mean_over = 0
        """Steps that rows are given the mean over by `gather`; 0 gives them as they are."""

    def make_host(self, shapes: Sequence[tuple[int, ...]]) -> list[Tensor]:
        """Make the tensors of the cold tier, of the shapes given, all zeros."""
        return [zeros_in_own_pages(shape) for shape in shapes]

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
        travelling = [(self.buffer, self.cold), *self._state_pairs]
        if self.buffer_lead is not None and self.cold_lead is not None:
            travelling.append((self.buffer_lead, self.cold_lead))
        return travelling

    @property
    def homes(self) -> list[Home]:
        """Where cold rows lie on the host: every tensor that travels with a row by itself."""
        return [Home(host, [buffer]) for buffer, host in self.pairs]

    def split_records(self, records: Tensor) -> list[Tensor]:
        """Give the parts of records, which are rows with all that travels with them. (n, W) -> each (n, …)."""
        shapes = [host.shape[1:] for _, host in self.pairs]
        parts = records.split([math.prod(shape) for shape in shapes], dim=1)
        return [part.reshape(len(records), *shape) for part, shape in zip(parts, shapes, strict=True)]

    @property
    def record_width(self) -> int:
        """W, the values of a row with all that travels with it."""
        return sum(math.prod(host.shape[1:]) for _, host in self.pairs)

    @property
    def _state_pairs(self) -> list[tuple[Tensor, Tensor]]:
        return list(zip(self.buffer_state, self.cold_state, strict=True))

    @property
    def row_bytes(self) -> int:
        """Bytes that move when a row moves."""
        return self.record_width * self.cold.element_size() if self.num_cold else 0

    def count_cold_here(self) -> int:
        """Count the cold rows that live with this process."""
        return self.num_cold

    def choose_own(self, cold: np.ndarray, *along: np.ndarray) -> tuple[np.ndarray, ...]:
        """Give the cold rows that live here, by their number here, and what goes along with them."""
        return cold, *along

    def order_moves(self, cold: np.ndarray, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Give (cold rows, positions) in the order in which they are best moved."""
        return cold, positions

    def clone_cold(self, path: Path, staged: tuple[np.ndarray, np.ndarray]) -> bool:
        """Have the file system keep the cold tier as it is now, in a file; whether it can. No row may move.

        Args:
            path: The file.
            staged: (cold rows, positions) of rows that are newer in the buffer.
        """
        return False

    def close(self) -> None:
        """Give up what does not end with the object; rows cannot be read any more."""

    def cold_places(self, start: int, stop: int) -> tuple[slice, slice]:
        """Give where rows from `start` to `stop` of the whole cold tier are here, and which of them those are."""
        return slice(start, stop), slice(None)

    def bytes_per_tier(self) -> dict[str, int]:
        """Bytes of the hot rows, of staging and of the cold rows, with all that travels with a row."""
        leads = 0 if self.buffer_lead is None else 1
        per_row = 4 * self.embedding_dim * (1 + leads) + self.rule.state_bytes(self.embedding_dim)
        return {
            "hot": self.num_hot * per_row,
            "staging": self.num_staged * per_row,
            "cold": self.num_cold * per_row,
        }

    def load(self, slots: Tensor, weights: Tensor, state: Sequence[Tensor] = ()) -> None:
        """Put rows where they live. No chunk may be at work.

        Args:
            slots: Shape (n,), integer.
            weights: Shape (n, D).
            state: What the rule keeps, in its order; none leaves it. Shapes (n,) per row, (n, D) per element.
        """
        is_hot = slots < self.num_hot
        hot, cold = slots[is_hot], slots[~is_hot] - self.num_hot
        pairs = [(self.buffer, self.cold), *(self._state_pairs if state else [])]
        for (buffer, host), values in zip(pairs, (weights, *state), strict=True):
            buffer[hot.to(self.device)] = values[is_hot].to(self.device)
            host[cold] = values[~is_hot]

    def gather(self, slots: Tensor) -> Tensor:
        """Rows wherever they live, on the device, or their means where `mean_over` says so. No chunk may be at work.

        Args:
            slots: On the host. Shape (n,), integer.

        Returns:
            Shape (n, D).
        """
        rows = self._gather(self.buffer, self.cold, slots)
        if self.mean_over:
            assert self.buffer_lead is not None and self.cold_lead is not None
            rows.sub_(self._gather(self.buffer_lead, self.cold_lead, slots).div_(self.mean_over))
        return rows

    def _gather(self, buffer: Tensor, host: Tensor, slots: Tensor) -> Tensor:
        is_hot = slots < self.num_hot
        if bool(is_hot.all()):
            return buffer.index_select(0, slots.to(self.device))
        rows = torch.empty(len(slots), self.embedding_dim, device=self.device)
        rows[is_hot.to(self.device)] = buffer[slots[is_hot].to(self.device)]
        rows[~is_hot.to(self.device)] = self.read_cold(host, slots[~is_hot] - self.num_hot).to(self.device)
        return rows

    def read_cold(self, host: Tensor, cold: Tensor) -> Tensor:
        """Read rows of the cold tier, or what travels with them. (n,) integer -> (n, …)."""
        return host[cold]


def update_rows(
    rule: RowOptimizer,
    weights: Tensor,
    state: Sequence[Tensor],
    positions: Tensor,
    values: Tensor,
    gradients: Tensor,
    *,
    lr: Tensor,
    num_steps: Tensor | None = None,
    sample_weights: Tensor | None = None,
) -> None:
    """Apply one sparse step in place.

    Args:
        rule: Which way rows move.
        weights: Shape (P, D).
        state: What the rule keeps. Shapes (P,) per row, (P, D) per element.
        positions: Distinct rows to change. Shape (U,), int64.
        values: Their weights, as the step has read them already; used up. Shape (U, D).
        gradients: Summed over duplicates; used up. Shape (U, D).
        lr: Learning rate, without dimensions, on the same device.
        num_steps: Steps taken, this one included. Shape (), float64.
        sample_weights: m, the weight of the samples behind each gradient; None is 1. Shape (U,).
    """
    moves = rule.row_directions(state, positions, gradients, num_steps=num_steps, sample_weights=sample_weights)
    weights.index_copy_(0, positions, values.sub_(moves.mul_(lr)))
