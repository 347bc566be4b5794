"""Count ids: which rows of a table are used most."""

import torch
from torch import Tensor, nn

_MERGE_EVERY = 65_536  # ids gathered before they are merged, at least


class IdCounter(nn.Module):
    """Count how often ids occur, exactly or in bounded memory.

    While no more than `capacity` distinct ids were seen the counts are exact. Beyond that the
    (capacity + 1)-th largest count is taken off all counters and those at 0 are forgotten, so a count is at
    most total / (capacity + 1) too low and every id more frequent than that is among those kept.

    Args:
        capacity: Distinct ids to keep, >= 0; 0 keeps all, exactly.

    Source: Agarwal et al., "Mergeable Summaries" (2012), for the bounded form. FBTT-Embedding leaves out ids
    that meet a full neighbourhood of its hash table, whatever their frequency.
    """

    ids: Tensor
    counts: Tensor

    def __init__(self, capacity: int = 0) -> None:
        super().__init__()
        self.capacity = capacity
        self.register_buffer("ids", torch.empty(0, dtype=torch.int64), persistent=False)
        self.register_buffer("counts", torch.empty(0, dtype=torch.int64), persistent=False)
        self._pending: list[tuple[Tensor, Tensor]] = []

    @torch.no_grad()
    def add(self, ids: Tensor, counts: Tensor) -> None:
        """Count ids; a count of 0 adds nothing.

        Args:
            ids: Distinct ids, shape (U,), int64.
            counts: How often each occurred, shape (U,), int64.
        """
        self._pending.append((ids, counts))
        if sum(pending.numel() for pending, _ in self._pending) > max(self.ids.numel(), _MERGE_EVERY):
            self._merge()

    def _merge(self) -> None:
        if not self._pending:
            return
        parts = [(self.ids, self.counts), *self._pending]
        self._pending = []
        ids = torch.cat([part.to(self.ids.device) for part, _ in parts])
        self.ids, inverse = torch.unique(ids, return_inverse=True)
        counts = torch.cat([part.to(self.ids.device) for _, part in parts])
        self.counts = torch.zeros_like(self.ids).index_add_(0, inverse, counts)
        if 0 < self.capacity < self.ids.numel():
            self.counts = self.counts - torch.topk(self.counts, self.capacity + 1).values[-1]
            kept = self.counts > 0
            self.ids, self.counts = self.ids[kept], self.counts[kept]

    @torch.no_grad()
    def top(self, num_ids: int) -> Tensor:
        """Give the most frequent ids, ties to the smaller id.

        Args:
            num_ids: How many at most.

        Returns:
            Ids in ascending order, shape (<= num_ids,), int64.
        """
        self._merge()
        by_count = torch.sort(self.counts, descending=True, stable=True).indices[:num_ids]
        return torch.sort(self.ids[by_count[self.counts[by_count] > 0]]).values

    def reset(self) -> None:
        """Forget all counts."""
        self._pending = []
        self.ids, self.counts = self.ids[:0].clone(), self.counts[:0].clone()

    def memory_bytes(self) -> int:
        """Give the bytes the counts take now."""
        return sum(
            tensor_bytes(ids) + tensor_bytes(counts) for ids, counts in [(self.ids, self.counts), *self._pending]
        )

    def get_extra_state(self) -> Tensor:
        """Give ids and counts as one tensor, shape (2, M), int64; a buffer could not change its size."""
        self._merge()
        return torch.stack([self.ids, self.counts])

    def set_extra_state(self, state: Tensor) -> None:
        """Take back what `get_extra_state` gave."""
        self._pending = []
        self.ids, self.counts = state.to(self.ids.device).clone().unbind(0)


def tensor_bytes(tensor: Tensor) -> int:
    """Give the bytes a tensor's entries take."""
    return tensor.numel() * tensor.element_size()
