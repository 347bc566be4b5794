"""A cached bag under the names and calls of ColossalAI's CachedEmbedding, so that only an import line has to change.

    from slipstream.embedding.cached.colossal import CachedEmbeddingBag, EvictionStrategy

A bag is its own `cache_weight_mgr`. Whatever is not supported, such as the other classes and lookups by cache position,
ends in an error that says what to do instead.

Source: hpcaitech/ColossalAI, legacy cache_embedding: the signatures, and hit and miss counts after each batch.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum
from typing import Any

import torch
from torch import Tensor

from slipstream.embedding.cached import bag
from slipstream.embedding.cached.bag import EvictStrategy, Mode

__all__ = ["CachedEmbeddingBag", "EvictionStrategy"]


class EvictionStrategy(Enum):
    """Who leaves the cache first."""

    LFU = 1
    """The row least looked up since it came."""
    DATASET = 2
    """The row least used in the training data."""


_STRATEGIES: dict[EvictionStrategy, EvictStrategy] = {
    EvictionStrategy.LFU: "lfu",
    EvictionStrategy.DATASET: "dataset",
}


_ABSENT_CLASSES = {
    "CachedParamMgr": "a bag is its own manager: make a CachedEmbeddingBag",
    "ParallelCachedEmbeddingBag": "a table is never cut here: make a CachedEmbeddingBag in one process",
    "ParallelCachedEmbeddingBagTablewise": "a cache serves one table: make a CachedEmbeddingBag for each",
    "ParallelCachedEmbeddingBagTablewiseSpiltCache": "a cache serves one table: make a CachedEmbeddingBag for each",
    "TablewiseEmbeddingBagConfig": "a cache serves one table: make a CachedEmbeddingBag for each",
}
_ABSENT_MEMBERS = {
    "prepare_ids": "forward finds the positions of rows itself; prefetch(batches) makes rows resident ahead of it",
    "reorder": "pass ids_freq_mapping and warmup_ratio when the bag is made",
    "print_comm_stats": "read bytes_to_device and bytes_to_host",
    "print_comm_stats_": "read bytes_to_device and bytes_to_host",
    "swap_in_bandwidth": "read bytes_to_device; copies are not timed, for that would make each wait for the last",
    "swap_out_bandwidth": "read bytes_to_host; copies are not timed, for that would make each wait for the last",
}


def __getattr__(name: str) -> Any:
    if name in _ABSENT_CLASSES:
        raise ImportError(f"expected CachedEmbeddingBag or EvictionStrategy, found {name}: {_ABSENT_CLASSES[name]}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


class CachedEmbeddingBag(bag.CachedEmbeddingBag):
    """`slipstream.embedding.CachedEmbeddingBag` with ColossalAI's calls.

    Args:
        num_embeddings: Rows of the table.
        embedding_dim: Width of a row.
        padding_idx: Row whose lookups count for nothing.
        max_norm: Must be None: rows are never scaled down.
        norm_type: Of no effect without max_norm.
        scale_grad_by_freq: Must be False.
        sparse: Whether gradients of the cache are sparse.
        _weight: Starting table; None draws it from uniform(-1/N, 1/N), as there.
        mode: How a bag becomes one vector.
        include_last_offset: As in `nn.EmbeddingBag`.
        dtype: Of the table.
        device: Where the cache lives.
        cache_ratio: Share of the rows the cache holds.
        ids_freq_mapping: Accesses of every row.
        warmup_ratio: Share of the cache filled before training.
        buffer_size: Rows per staged copy; 0 is one copy of all.
        pin_weight: Whether the host table is page-locked.
        evict_strategy: Who leaves first.

    Raises:
        ValueError: An option that cannot be honoured is set, or one is out of range.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        sparse: bool = False,
        _weight: Tensor | None = None,
        mode: Mode = "mean",
        include_last_offset: bool = False,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        cache_ratio: float = 0.01,
        ids_freq_mapping: Any = None,
        warmup_ratio: float = 0.7,
        buffer_size: int = 0,
        pin_weight: bool = False,
        evict_strategy: EvictionStrategy = EvictionStrategy.LFU,
    ) -> None:
        if max_norm is not None or scale_grad_by_freq:
            raise ValueError(
                f"expected max_norm=None and scale_grad_by_freq=False, found {max_norm} and {scale_grad_by_freq}: "
                "neither is known here"
            )
        if _weight is None:
            bound = 1 / num_embeddings
            _weight = torch.empty(num_embeddings, embedding_dim, dtype=dtype).uniform_(-bound, bound)
            if padding_idx is not None:
                _weight[padding_idx] = 0.0
        super().__init__(
            num_embeddings,
            embedding_dim,
            padding_idx=padding_idx,
            sparse=sparse,
            mode=mode,
            include_last_offset=include_last_offset,
            dtype=dtype,
            device=device,
            cache_ratio=cache_ratio,
            ids_freq_mapping=ids_freq_mapping,
            warmup_ratio=warmup_ratio,
            buffer_size=buffer_size,
            pin_weight=pin_weight,
            evict_strategy=_STRATEGIES[evict_strategy],
            ageing_lookups=0.0,
            _weight=_weight,
        )
        self.norm_type = norm_type
        self.num_hits_history: list[int] = []
        """Distinct rows that were in the cache already, of each training batch."""
        self.num_miss_history: list[int] = []
        """Distinct rows that had to be fetched, of each training batch."""
        self.num_write_back_history: list[int] = []
        """Changed rows that left for the host table to make room, of each training batch."""

    @classmethod
    def from_pretrained(
        cls,
        embedding: Tensor,
        freeze: bool = True,
        padding_idx: int | None = None,
        *,
        cuda_row_num: int | None = None,
        **options: Any,
    ) -> CachedEmbeddingBag:
        """Make a bag over a trained table.

        Args:
            embedding: The table, shape (N, D).
            freeze: Whether it stays as it is: the bag is in evaluation mode then, where nothing moves or learns.
            padding_idx: Row whose lookups count for nothing.
            cuda_row_num: Rows that the cache holds, at most all; in place of cache_ratio.
            **options: As for the constructor.

        Raises:
            ValueError: The table is not a matrix, or an option is out of range.
        """
        if embedding.dim() != 2:
            raise ValueError(f"expected a table of shape (N, D), found {tuple(embedding.shape)}")
        num_embeddings, embedding_dim = embedding.shape
        if cuda_row_num is not None:
            # half a row more, so that the way back from the share to rows cannot round one off
            options["cache_ratio"] = min(1.0, (cuda_row_num + 0.5) / num_embeddings)
        weight = embedding.detach().clone()
        made = cls(num_embeddings, embedding_dim, padding_idx=padding_idx, _weight=weight, **options)
        return made.train(not freeze).requires_grad_(not freeze)

    def forward(
        self,
        input: Tensor,  # noqa: A002 - the name nn.EmbeddingBag gives it
        offsets: Tensor | None = None,
        per_sample_weights: Tensor | None = None,
        shape_hook: Callable[[Tensor], Tensor] | None = None,
    ) -> Tensor:
        """Pool the rows of every bag, then let `shape_hook` change the result."""
        stats = self.row_cache.stats
        hits, misses, write_backs = stats.hits, stats.misses, stats.write_backs
        pooled = super().forward(input, offsets, per_sample_weights)
        if self.training:
            self.num_hits_history.append(stats.hits - hits)
            self.num_miss_history.append(stats.misses - misses)
            self.num_write_back_history.append(stats.write_backs - write_backs)
        return pooled if shape_hook is None else shape_hook(pooled)

    @property
    def cache_weight_mgr(self) -> CachedEmbeddingBag:
        """What keeps the cache: the bag itself."""
        return self

    @property
    def cuda_available_row_num(self) -> int:
        """Rows that the cache has room for before one must leave."""
        return self.row_cache.capacity - self.row_cache.num_resident

    def cpu_weight_data(self, row_idx: int) -> Tensor:
        """Give one row as the host table has it after a flush. Shape (D,)."""
        return self.weight[row_idx]

    def set_cache_op(self, cache_op: bool = True) -> None:
        """Say whether lookups are by row number, as they always are here.

        Raises:
            ValueError: They are to be by cache position.
        """
        if not cache_op:
            raise ValueError(
                "expected set_cache_op(True), found False: lookups are by row number; prefetch(batches) makes the rows "
                "of several batches resident at once, and their forwards move nothing"
            )

    def set_cache_mgr_async_copy(self, flag: bool) -> None:
        """Have no effect: copies to and from a device wait for nothing but the buffer they need."""

    def __getattr__(self, name: str) -> Any:
        if name in _ABSENT_MEMBERS:
            raise AttributeError(f"{name} is not known here: {_ABSENT_MEMBERS[name]}")
        return super().__getattr__(name)
