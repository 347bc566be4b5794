"""Embedding bags whose table is a tensor train of two to four cores.

A table of N rows is never stored: a lookup multiplies one small slice of each core (`tt_shapes` has the
formula, `tt_kernels` the arithmetic). Each distinct id of a batch is contracted once and ids that begin alike share
their first products; pooling is torch's own, so every convention of `nn.EmbeddingBag` holds.

**B** bags, **T** tables, **N** rows of a table, **D** embedding_dim, **L** lookups in the batch, **U** distinct ids,
**C** cached rows. An *id* below is row + table · prod(p), so that all tables share one range.
"""

from collections.abc import Sequence
from typing import Any, Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slipstream.embedding.tt_kernels import (
    Plan,
    contract,
    contract_backward,
    plan_contraction,
    segment_sum,
)
from slipstream.embedding.tt_shapes import (
    WeightDist,
    check_tt_shapes,
    draw_cores,
    entry_variance,
    tt_svd,
    tt_to_dense,
)

Optimizer = Literal["sgd", "adagrad", "rowwise_adagrad"]
CacheGradient = Literal["cores", "rows"]
Mode = Literal["sum", "mean", "max"]

_MERGE_EVERY = 65_536  # ids an IdCounter gathers before it merges them, at least


class IdCounter(nn.Module):
    """Count how often ids occur, exactly or in bounded memory.

    While no more than `capacity` distinct ids were seen the counts are exact. Beyond that the (capacity + 1)-th
    largest count is taken off all counters and those at 0 are forgotten, so a count is at most
    total / (capacity + 1) too low and every id more frequent than that is among those kept.

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
        """Count ids.

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
        by_count = torch.sort(self.counts, descending=True, stable=True).indices
        return torch.sort(self.ids[by_count[:num_ids]]).values

    def reset(self) -> None:
        """Forget all counts."""
        self._pending = []
        self.ids, self.counts = self.ids[:0].clone(), self.counts[:0].clone()

    def memory_bytes(self) -> int:
        """Give the bytes the counts take now."""
        return sum(_bytes(ids) + _bytes(counts) for ids, counts in [(self.ids, self.counts), *self._pending])

    def get_extra_state(self) -> Tensor:
        """Give ids and counts as one tensor, shape (2, M), int64: their number changes, a buffer's may not."""
        self._merge()
        return torch.stack([self.ids, self.counts])

    def set_extra_state(self, state: Tensor) -> None:
        """Take back what `get_extra_state` gave."""
        self._pending = []
        self.ids, self.counts = state.to(self.ids.device).clone().unbind(0)


class _TTTables(nn.Module):
    """Cores, fused optimizer and cache of one or more tables of one shape; documented at its two public forms."""

    cache_ids: Tensor
    cache_weight: Tensor
    cache_lookups: Tensor

    def __init__(
        self,
        num_tables: int,
        num_embeddings: int,
        embedding_dim: int,
        tt_ranks: Sequence[int],
        tt_p_shapes: Sequence[int] | None = None,
        tt_q_shapes: Sequence[int] | None = None,
        *,
        optimizer: Optimizer = "sgd",
        learning_rate: float = 0.1,
        eps: float = 1e-10,
        sparse: bool = True,
        use_cache: bool = False,
        cache_size: int = 0,
        hashtbl_size: int = 0,
        cache_gradient: CacheGradient = "cores",
        weight_dist: WeightDist = "approx-normal",
        mode: Mode = "sum",
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        for name, value, allowed in (
            ("optimizer", optimizer, ("sgd", "adagrad", "rowwise_adagrad")),
            ("cache_gradient", cache_gradient, ("cores", "rows")),
            ("mode", mode, ("sum", "mean", "max")),
        ):
            if value not in allowed:
                raise ValueError(f"expected {name} in {allowed}, found {value!r}: pass one of these")
        if num_tables < 1:
            raise ValueError(f"expected num_tables >= 1, found {num_tables}: pass how many tables to hold")
        self.num_tables, self.num_embeddings, self.embedding_dim = num_tables, num_embeddings, embedding_dim
        self.tt_p_shapes, self.tt_q_shapes, self.tt_ranks = check_tt_shapes(
            num_embeddings, embedding_dim, tt_ranks, tt_p_shapes, tt_q_shapes
        )
        self.optimizer, self.learning_rate, self.eps, self.sparse = optimizer, learning_rate, eps, sparse
        self.mode, self.weight_dist, self.cache_gradient = mode, weight_dist, cache_gradient
        self._table_size = 1
        for p in self.tt_p_shapes:
            self._table_size *= p

        shapes = [
            (num_tables, p, self.tt_ranks[k], q, self.tt_ranks[k + 1])
            for k, (p, q) in enumerate(zip(self.tt_p_shapes, self.tt_q_shapes, strict=True))
        ]
        variance = entry_variance(weight_dist, num_embeddings, embedding_dim)
        drawn = draw_cores(weight_dist, shapes, variance, generator)
        placed = [core.to(dtype=dtype or torch.get_default_dtype(), device=device) for core in drawn]
        self.tt_cores = nn.ParameterList([nn.Parameter(core) for core in placed])
        self._states: list[str | None] = [None] * (len(shapes) + 1)
        if sparse and optimizer != "sgd":
            for k, core in enumerate(placed):
                self._states[k] = f"core_state_{k}"
                self.register_buffer(f"core_state_{k}", torch.zeros_like(core))

        self.counter: IdCounter | None = None
        if use_cache:
            self._make_cache(cache_size, hashtbl_size, placed[0])
        self._pending: list[tuple[int, Tensor, Tensor]] = []

    def _make_cache(self, cache_size: int, hashtbl_size: int, like: Tensor) -> None:
        num_ids = self.num_tables * self.num_embeddings
        self.cache_size = min(cache_size, num_ids) if cache_size > 0 else max(1, num_ids // 10)
        if 0 < hashtbl_size < self.cache_size:
            raise ValueError(
                f"expected hashtbl_size >= cache_size = {self.cache_size}, or 0 for exact counts, found {hashtbl_size}: "
                "ids that are not counted cannot be cached; enlarge it"
            )
        self.counter = IdCounter(max(hashtbl_size, 0)).to(like.device)
        # unused slots hold an id above all others, so that the ids stay sorted
        empty = torch.full((self.cache_size,), self.num_tables * self._table_size, device=like.device)
        self.register_buffer("cache_ids", empty)
        self.register_buffer("cache_lookups", torch.zeros(2, dtype=torch.int64, device=like.device))
        weight = like.new_zeros((self.cache_size, self.embedding_dim))
        if self.cache_gradient == "rows":
            self.cache_weight = nn.Parameter(weight)
            if self.sparse and self.optimizer != "sgd":
                self._states[-1] = "cache_state"
                state = weight if self.optimizer == "adagrad" else weight[:, 0]
                self.register_buffer("cache_state", torch.zeros_like(state))
            return
        self.register_buffer("cache_weight", weight, persistent=False)
        # row i is fresh when row_clock[i] is no older than the clocks of the core slices it is made of
        self._clock = 1
        self.register_buffer("_row_clock", torch.zeros_like(empty), persistent=False)
        for k, core in enumerate(self.tt_cores):
            ones = torch.ones(core.shape[0] * core.shape[1], dtype=torch.int64, device=like.device)
            self.register_buffer(f"_slice_clock_{k}", ones, persistent=False)
        self._versions = [core._version for core in self.tt_cores]

    # ---- lookup

    def _pool(
        self,
        ids: Tensor,
        offsets: Tensor | None,
        weights: Tensor | None,
        last_offset: bool,
        padding: int | None,
    ) -> Tensor:
        unique, inverse = torch.unique(ids, return_inverse=True)
        if self.counter is not None:
            counts = torch.bincount(inverse.flatten(), minlength=unique.numel())
            self.counter.add(unique, counts)
            rows, position = self._cached_rows(unique, counts)
        else:
            rows, position = self._contracted_rows(unique)
        padding_row = None
        if padding is not None and unique.numel():
            found = int(torch.searchsorted(unique, padding))
            if found < unique.numel() and int(unique[found]) == padding:
                padding_row = found if position is None else int(position[found])
        return F.embedding_bag(
            inverse if position is None else position[inverse],
            rows,
            offsets,
            mode=self.mode,
            per_sample_weights=weights,
            include_last_offset=last_offset,
            padding_idx=padding_row,
        )

    def _contracted_rows(self, ids: Tensor) -> tuple[Tensor, Tensor | None]:
        """Rows of ascending distinct ids, and where each stands among them."""
        plan = plan_contraction(
            ids, self.tt_p_shapes, self.tt_q_shapes, self.tt_ranks, by_slice=ids.device.type == "cpu"
        )
        rows: Tensor = _ContractedRows.apply(self, plan, *self.tt_cores)  # type: ignore[no-untyped-call]
        return rows, plan.position

    def _core_slices(self) -> list[Tensor]:
        return [core.flatten(0, 1) for core in self.tt_cores]

    @torch.no_grad()
    def _table_rows(self, ids: Tensor) -> Tensor:
        """Rows of ascending distinct ids, in their order."""
        rows, position = self._contracted_rows(ids)
        return rows if position is None else rows[position]

    # ---- cache

    def _cached_rows(self, ids: Tensor, counts: Tensor) -> tuple[Tensor, Tensor | None]:
        trains_cores = torch.is_grad_enabled() and any(core.requires_grad for core in self.tt_cores)
        slots = torch.searchsorted(self.cache_ids, ids).clamp_(max=self.cache_size - 1)
        hit = self.cache_ids[slots] == ids
        if self.cache_gradient == "cores" and trains_cores:
            hit = torch.zeros_like(hit)
        self.cache_lookups += torch.stack([counts.sum(), (counts * hit).sum()])
        if not bool(hit.any()):
            return self._contracted_rows(ids)
        missed, slots = (~hit).nonzero().squeeze(1), slots[hit]
        if self.cache_gradient == "cores":
            self._refresh(slots)
            cached = self.cache_weight.index_select(0, slots)
        elif self.sparse:
            cached = _TrainedRows.apply(self, slots, self.cache_weight)  # type: ignore[no-untyped-call]
        else:
            cached = self.cache_weight.index_select(0, slots)
        position = torch.empty_like(ids)
        position[hit] = torch.arange(missed.numel(), ids.numel(), device=ids.device)
        if missed.numel() == 0:
            return cached, position
        contracted, order = self._contracted_rows(ids[missed])
        position[missed] = torch.arange(missed.numel(), device=ids.device) if order is None else order
        return torch.cat([contracted, cached]), position

    def _slice_clock(self, k: int) -> Tensor:
        return self.get_buffer(f"_slice_clock_{k}")

    def _age_all(self) -> None:
        self._clock += 1
        for k in range(len(self.tt_cores)):
            self._slice_clock(k).fill_(self._clock)
        self._versions = [core._version for core in self.tt_cores]

    def _mirrors_cores(self) -> bool:
        return self.counter is not None and self.cache_gradient == "cores"

    @torch.no_grad()
    def _refresh(self, slots: Tensor) -> None:
        """Recompute those of the cached rows whose cores changed since they were computed."""
        if self._versions != [core._version for core in self.tt_cores]:
            self._age_all()
        row_clock = self.get_buffer("_row_clock")
        ids = rest = self.cache_ids[slots]
        newest = torch.zeros_like(ids)
        for k in range(len(self.tt_cores) - 1, -1, -1):
            p = self.tt_p_shapes[k]
            slices = rest % p + ids // self._table_size * p
            newest = torch.maximum(newest, self._slice_clock(k)[slices])
            rest = rest // p
        stale = row_clock[slots] < newest
        if bool(stale.any()):
            self.cache_weight[slots[stale]] = self._table_rows(ids[stale])
            row_clock[slots[stale]] = self._clock

    @torch.no_grad()
    def cache_populate(self) -> int:
        """Cache the rows used most so far, ties to the smaller id; counts go on.

        With `cache_gradient="cores"` the output does not change. With "rows", rows that stay keep what they
        learnt and their optimizer state, new ones start from the cores with a state of 0, and **rows that leave fall
        back to what the cores say**: populate early and seldom. An outside optimizer (`sparse=False`) knows
        nothing of the change: start it afresh.

        Returns:
            Rows cached now.

        Raises:
            ValueError: The module was built without a cache.
        """
        if self.counter is None:
            raise ValueError("expected a module with a cache, found use_cache=False: pass use_cache=True")
        ids = self.counter.top(self.cache_size)
        slots = torch.searchsorted(self.cache_ids, ids).clamp_(max=self.cache_size - 1)
        stays = self.cache_ids[slots] == ids
        held = (
            [self.cache_weight]
            if self._states[-1] is None
            else [self.cache_weight, self.get_buffer("cache_state")]
        )
        for index, tensor in enumerate(held):
            kept = tensor[slots[stays]]
            tensor.zero_()
            if self.cache_gradient == "rows":
                tensor[stays.nonzero().squeeze(1)] = kept
            if index == 0 and self.cache_gradient == "rows" and not bool(stays.all()):
                tensor[(~stays).nonzero().squeeze(1)] = self._table_rows(ids[~stays])
        self.cache_ids.fill_(self.num_tables * self._table_size)
        self.cache_ids[: ids.numel()] = ids
        if self._mirrors_cores():
            self.get_buffer("_row_clock").zero_()
        return ids.numel()

    @torch.no_grad()
    def reset_cache(self) -> None:
        """Empty the cache and forget counts and hits; with `cache_gradient="rows"` what its rows learnt is lost."""
        if self.counter is None:
            return
        self.counter.reset()
        self.cache_populate()
        self.cache_lookups.zero_()

    @property
    def hit_ratio(self) -> float:
        """Lookups served by the cache, in [0, 1], since the last reset."""
        if self.counter is None or int(self.cache_lookups[0]) == 0:
            return 0.0
        return int(self.cache_lookups[1]) / int(self.cache_lookups[0])

    # ---- fused optimizer

    def _queue_update(self, index: int, touched: Tensor, grad: Tensor) -> None:
        """Keep a gradient until the running backward pass ends; then all of them are summed and applied once."""
        if not self._pending:
            torch.autograd.Variable._execution_engine.queue_callback(self._apply_updates)  # type: ignore[attr-defined]
        self._pending.append((index, touched, grad))

    @torch.no_grad()
    def _apply_updates(self) -> None:
        pending, self._pending = self._pending, []
        if self._mirrors_cores() and self._versions != [core._version for core in self.tt_cores]:
            self._age_all()
        for index in sorted({index for index, _, _ in pending}):
            grads = [(touched, grad) for k, touched, grad in pending if k == index]
            touched, grad = grads[0]
            if len(grads) > 1:
                stacked = torch.cat([part.flatten(1) for _, part in grads])
                touched, summed = segment_sum(stacked, torch.cat([part for part, _ in grads]))
                grad = summed.view(-1, *grad.shape[1:])
            self._update(index, touched, grad)
        if self._mirrors_cores():
            self._clock += 1
            for index, touched, _ in pending:
                self._slice_clock(index)[touched] = self._clock
            self._versions = [core._version for core in self.tt_cores]

    def _update(self, index: int, touched: Tensor, grad: Tensor) -> None:
        is_cache = index == len(self.tt_cores)
        weight = self.cache_weight if is_cache else self.tt_cores[index].flatten(0, 1)
        name = self._states[index]
        if name is not None:
            state = self.get_buffer(name)
            by_slice = state if is_cache else state.flatten(0, 1)
            square = grad.square()
            if by_slice.dim() < grad.dim():
                square = square.mean(1)
            total = by_slice.index_select(0, touched).add_(square)
            by_slice.index_copy_(0, touched, total)
            scale = total.sqrt_().add_(self.eps)
            grad = grad / (scale if scale.dim() == grad.dim() else scale.unsqueeze(1))
        # duplicates are summed already, so that the order of this scatter does not matter
        weight.index_add_(0, touched, grad, alpha=-self.learning_rate)

    def set_learning_rate(self, learning_rate: float) -> None:
        """Set the learning rate of the fused optimizer.

        Args:
            learning_rate: The new rate.
        """
        self.learning_rate = learning_rate

    # ---- whole module

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        if self._mirrors_cores():
            self._age_all()  # a new dtype or device replaces the cores without a new version
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        if self._mirrors_cores():
            self._age_all()
            self.get_buffer("_row_clock").zero_()

    def memory_bytes(self) -> dict[str, int]:
        """Give the bytes held now, nothing left out.

        Returns:
            "cores", "optimizer_state", "cache" (rows, their ids, state and clocks) and "counts".
        """
        states = [None if name is None else self.get_buffer(name) for name in self._states]
        cache = [states[-1]] if states[-1] is not None else []
        if self.counter is not None:
            cache += [self.cache_ids, self.cache_weight, self.cache_lookups]
        if self._mirrors_cores():
            cache += [self.get_buffer("_row_clock"), *map(self._slice_clock, range(len(self.tt_cores)))]
        return {
            "cores": sum(map(_bytes, self.tt_cores)),
            "optimizer_state": sum(_bytes(state) for state in states[:-1] if state is not None),
            "cache": sum(map(_bytes, cache)),
            "counts": 0 if self.counter is None else self.counter.memory_bytes(),
        }

    def _dense_tables(self) -> Tensor:
        """All tables as the module would read them, shape (T, N, D)."""
        tables = torch.stack([tt_to_dense(cores) for cores in zip(*self.tt_cores, strict=True)])
        if self.counter is not None and self.cache_gradient == "rows":
            used = self.cache_ids < self.num_tables * self._table_size
            flat = tables.flatten(0, 1).index_copy(0, self.cache_ids[used], self.cache_weight[used])
            tables = flat.view_as(tables)
        return tables[:, : self.num_embeddings]

    def _check_rows(self, indices: Tensor) -> None:
        if indices.dtype not in (torch.int64, torch.int32):
            raise ValueError(
                f"expected int64 or int32 indices, found {indices.dtype}: convert them with .long()"
            )
        if indices.numel() == 0:
            return
        low, high = (int(bound) for bound in torch.aminmax(indices))
        if low < 0 or high >= self.num_embeddings:
            found = low if low < 0 else high
            raise IndexError(
                f"expected indices in 0..{self.num_embeddings - 1}, found {found}: map unknown values to a row of "
                "the table, or enlarge num_embeddings"
            )

    def extra_repr(self) -> str:
        """Give sizes, shapes and the settings that matter."""
        tables = f"{self.num_tables} x " if self.num_tables > 1 else ""
        update = f"fused {self.optimizer}, learning_rate={self.learning_rate}" if self.sparse else "gradients"
        cache = (
            ""
            if self.counter is None
            else f", cache_size={self.cache_size}, gradient to {self.cache_gradient}"
        )
        dense = self.num_tables * self.num_embeddings * self.embedding_dim
        ratio = dense / sum(core.numel() for core in self.tt_cores)
        return (
            f"{tables}{self.num_embeddings}, {self.embedding_dim}, tt_ranks={self.tt_ranks[1:-1]}, "
            f"tt_p_shapes={self.tt_p_shapes}, tt_q_shapes={self.tt_q_shapes}, mode={self.mode!r}, {update}{cache}, "
            f"{ratio:.1f}x smaller"
        )


class TTEmbeddingBag(_TTTables):
    """Sum, mean or maximum of rows of a table that is stored as a tensor train: `nn.EmbeddingBag`, smaller.

    **Training.** With `sparse=True` the backward pass ends with an update of the core slices that were looked up,
    and only those: their gradients are summed over the whole pass first (a module may be used several times
    in one graph), always in the same order. The cores get no `.grad` then, so an outside optimizer leaves
    them alone. With `sparse=False` the cores get ordinary dense gradients.

    **Cache.** `use_cache` counts ids in every forward pass; `cache_populate` then keeps the most used rows
    decompressed. A tensor train cannot take up a change of one row exactly, so two sound schemes exist:

    * `cache_gradient="cores"` (default): cached rows are copies. The gradient goes to the cores, and a
      copy whose core slices changed is recomputed when it is next read. The model is that of a module
      without a cache, whatever the order of steps, populate and reset, up to rounding. Training needs the partial
      products anyway, so that only passes without gradients (evaluation, serving) read the cache.
    * `cache_gradient="rows"` (as in TT-Rec): cached rows are dense rows of their own, trained alone; the cores
      learn from the others. Faster in training and often more accurate, but another model than the uncached
      one, and rows that leave the cache lose what they learnt there: see `cache_populate`.

    Args:
        num_embeddings: Rows of the table, N >= 1.
        embedding_dim: Columns of the table, D >= 1, of any size.
        tt_ranks: Inner ranks, one fewer than cores: 1 to 3 integers >= 1.
        tt_p_shapes: Row factors, one a core, product >= N; None for balanced ones.
        tt_q_shapes: Column factors, one a core, product == D; None for balanced ones.
        optimizer: What `sparse=True` applies: "sgd", "adagrad" (one state per parameter), or "rowwise_adagrad"
            (one state per cached row, where the cache has rows of its own; cores have no rows and keep "adagrad").
        learning_rate: Of the fused optimizer.
        eps: Added to the root of Adagrad's state.
        sparse: Whether to update inside the backward pass.
        use_cache: Whether to count ids and to have a cache.
        cache_size: Rows the cache holds; 0 for a tenth of the table.
        hashtbl_size: Ids whose counts are kept, >= cache_size (see `IdCounter`); 0 counts exactly, in memory
            that grows with the distinct ids seen.
        cache_gradient: Where gradients of cached rows go, see above.
        weight_dist: "uniform", "normal", "approx-uniform", "approx-normal"; see `entry_variance`.
        mode: "sum", "mean" or "max"; "max" on a GPU leaves the order of torch's own backward to torch.
        padding_idx: Row that no bag counts; None for none.
        include_last_offset: Whether offsets end with the number of lookups.
        dtype: Of the cores; None for torch's default.
        device: Of the cores; None for torch's default.
        generator: Source of randomness on the CPU; None for torch's own. The same draw on every device.

    Attributes:
        tt_cores: Core k has shape (1, p_k, r_{k-1}, q_k, r_k).

    Raises:
        ValueError: A shape does not fit or a choice is unknown.

    Example:
        >>> bag = TTEmbeddingBag(1000, 12, [4, 4], generator=torch.Generator().manual_seed(0))
        >>> bag(torch.tensor([1, 2, 4, 5, 4, 3]), torch.tensor([0, 2])).shape
        torch.Size([2, 12])

    Source: TT-Rec (Yin et al., MLSys 2021) and its FBTT-Embedding, whose constructor this follows. Differs: CPU,
    any D, mean and max, weights, padding, ids and prefixes contracted once, updates of touched slices only,
    bit-for-bit repeatable sums, a cache that stays true.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        tt_ranks: Sequence[int],
        tt_p_shapes: Sequence[int] | None = None,
        tt_q_shapes: Sequence[int] | None = None,
        *,
        optimizer: Optimizer = "sgd",
        learning_rate: float = 0.1,
        eps: float = 1e-10,
        sparse: bool = True,
        use_cache: bool = False,
        cache_size: int = 0,
        hashtbl_size: int = 0,
        cache_gradient: CacheGradient = "cores",
        weight_dist: WeightDist = "approx-normal",
        mode: Mode = "sum",
        padding_idx: int | None = None,
        include_last_offset: bool = False,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(
            1,
            num_embeddings,
            embedding_dim,
            tt_ranks,
            tt_p_shapes,
            tt_q_shapes,
            optimizer=optimizer,
            learning_rate=learning_rate,
            eps=eps,
            sparse=sparse,
            use_cache=use_cache,
            cache_size=cache_size,
            hashtbl_size=hashtbl_size,
            cache_gradient=cache_gradient,
            weight_dist=weight_dist,
            mode=mode,
            dtype=dtype,
            device=device,
            generator=generator,
        )
        if padding_idx is not None and not -num_embeddings <= padding_idx < num_embeddings:
            raise ValueError(
                f"expected padding_idx in {-num_embeddings}..{num_embeddings - 1}, found {padding_idx}: name a row of "
                "the table, or None"
            )
        self.padding_idx = padding_idx % num_embeddings if padding_idx is not None else None
        self.include_last_offset = include_last_offset

    @classmethod
    def from_dense(
        cls,
        weight: Tensor,
        tt_ranks: Sequence[int],
        tt_p_shapes: Sequence[int] | None = None,
        tt_q_shapes: Sequence[int] | None = None,
        **options: Any,
    ) -> Self:
        """Compress a dense table, for example one trained before.

        Args:
            weight: The table, shape (N, D), finite; its dtype and device are taken over unless `options` say other.
            tt_ranks: As in the constructor. Full ranks reproduce the table up to rounding.
            tt_p_shapes: As in the constructor.
            tt_q_shapes: As in the constructor.
            **options: Other arguments of the constructor.

        Returns:
            A new module.

        Raises:
            ValueError: The weight is not a finite matrix, or a shape does not fit.
        """
        if weight.dim() != 2:
            raise ValueError(
                f"expected a weight of shape (N, D), found {tuple(weight.shape)}: pass one table"
            )
        options = {"dtype": weight.dtype, "device": weight.device, **options}
        bag = cls(weight.shape[0], weight.shape[1], tt_ranks, tt_p_shapes, tt_q_shapes, **options)
        cut = tt_svd(weight, bag.tt_p_shapes, bag.tt_q_shapes, bag.tt_ranks)
        with torch.no_grad():
            for core, value in zip(bag.tt_cores, cut, strict=True):
                core.copy_(value)
        return bag

    def forward(
        self, input: Tensor, offsets: Tensor | None = None, per_sample_weights: Tensor | None = None
    ) -> Tensor:
        """Look up bags of rows and pool them.

        Args:
            input: Rows, int64 or int32: all bags one after another, shape (L,), with `offsets`; or bags of one
                size, shape (B, L / B), without.
            offsets: Where each bag starts, shape (B,), or (B + 1,) with `include_last_offset`; int64 or int32.
            per_sample_weights: Factor of each lookup, shape of `input`, only with mode "sum". Differentiable.

        Returns:
            Pooled rows, shape (B, D); 0 for an empty bag.

        Raises:
            ValueError: Shapes or dtypes do not fit, or offsets are not monotone.
            IndexError: A row lies outside the table.
        """
        self._check_rows(input)
        if input.dim() == 1 and offsets is not None:
            _check_offsets(offsets, input.numel(), self.include_last_offset)
            offsets = offsets.long()
        elif input.dim() != 2 or offsets is not None:
            raise ValueError(
                f"expected 1-D input with offsets or 2-D input without, found {input.dim()}-D input "
                f"{'without' if offsets is None else 'with'} offsets: pass one of the two"
            )
        if per_sample_weights is not None:
            if self.mode != "sum" or per_sample_weights.shape != input.shape:
                raise ValueError(
                    f'expected per_sample_weights of shape {tuple(input.shape)} and mode "sum", found shape '
                    f"{tuple(per_sample_weights.shape)} and mode {self.mode!r}: give each lookup a weight, or none"
                )
            per_sample_weights = per_sample_weights.to(self.tt_cores[0].dtype)
        last_offset = self.include_last_offset and offsets is not None
        return self._pool(input.long(), offsets, per_sample_weights, last_offset, self.padding_idx)

    def update_cache(self, indices: Tensor) -> None:
        """Count rows without looking them up, as a forward pass over them would.

        Args:
            indices: Rows, any shape, int64 or int32.

        Raises:
            ValueError: The module was built without a cache.
            IndexError: A row lies outside the table.
        """
        if self.counter is None:
            raise ValueError("expected a module with a cache, found use_cache=False: pass use_cache=True")
        self._check_rows(indices)
        self.counter.add(*torch.unique(indices.long(), return_counts=True))

    def full_weight(self) -> Tensor:
        """Give the whole table as the module would read it, shape (N, D), differentiable."""
        return self._dense_tables()[0]


class BatchedTTEmbeddingBags(_TTTables):
    """Several tables of one shape, looked up together: every product of all tables in the same batched calls.

    Args:
        num_tables: How many tables, T >= 1.
        num_embeddings: Rows of each table.
        embedding_dim: Columns of each table.
        tt_ranks: Inner ranks of each table.
        tt_p_shapes: Row factors of each table.
        tt_q_shapes: Column factors of each table.
        **options: As for `TTEmbeddingBag`, without padding_idx and include_last_offset; one cache serves all tables.

    Attributes:
        tt_cores: Core k has shape (T, p_k, r_{k-1}, q_k, r_k).

    Source: FBTT-Embedding, `TableBatchedTTEmbeddingBag`; differs in that several tables may have a cache.
    """

    def forward(self, indices: Tensor, offsets: Tensor, per_sample_weights: Tensor | None = None) -> Tensor:
        """Look up and pool bags of all tables.

        Args:
            indices: Rows, shape (L,), int64 or int32: all bags of the first table, then those of the second, ….
            offsets: Where each bag starts, with the end of the last, shape (T · B + 1,), int64 or int32.
            per_sample_weights: Factor of each lookup, shape (L,), only with mode "sum".

        Returns:
            Pooled rows, shape (T, B, D).

        Raises:
            ValueError: Shapes or dtypes do not fit, or offsets are not monotone.
            IndexError: A row lies outside its table.
        """
        self._check_rows(indices)
        if indices.dim() != 1 or (offsets.numel() - 1) % self.num_tables:
            raise ValueError(
                f"expected 1-D indices and {self.num_tables} x bags + 1 offsets, found {indices.dim()}-D indices and "
                f"{offsets.numel()} offsets: give every table the same number of bags, and the end of the last"
            )
        _check_offsets(offsets, indices.numel(), True)
        if per_sample_weights is not None and (
            self.mode != "sum" or per_sample_weights.shape != indices.shape
        ):
            raise ValueError(
                f'expected per_sample_weights of shape {tuple(indices.shape)} and mode "sum", found shape '
                f"{tuple(per_sample_weights.shape)} and mode {self.mode!r}: give each lookup a weight, or none"
            )
        num_bags = (offsets.numel() - 1) // self.num_tables
        offsets = offsets.long()
        per_table = offsets[:: max(num_bags, 1)][: self.num_tables + 1].diff()
        first_ids = torch.arange(self.num_tables, device=indices.device) * self._table_size
        ids = indices.long()
        if num_bags:
            ids = ids + torch.repeat_interleave(first_ids, per_table)
        pooled = self._pool(ids, offsets, per_sample_weights, True, None)
        return pooled.view(self.num_tables, num_bags, self.embedding_dim)

    def full_weight(self) -> Tensor:
        """Give all tables as the module would read them, shape (T, N, D), differentiable."""
        return self._dense_tables()


class _ContractedRows(torch.autograd.Function):
    """Rows of a plan; the gradient goes to the cores, or straight into their update."""

    @staticmethod
    def forward(ctx: Any, module: _TTTables, plan: Plan, *cores: Tensor) -> Tensor:
        rows, lefts = contract(plan, [core.flatten(0, 1) for core in cores])
        ctx.save_for_backward(*cores, *lefts)
        ctx.module, ctx.plan = module, plan
        return rows

    @staticmethod
    @torch.autograd.function.once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad_rows: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        num_cores = len(ctx.plan.levels)
        cores, lefts = saved[:num_cores], saved[num_cores:]
        slices = [core.flatten(0, 1) for core in cores]
        grads = contract_backward(ctx.plan, slices, lefts, grad_rows)
        if ctx.module.sparse:
            for k, (touched, grad) in enumerate(grads):
                if ctx.needs_input_grad[2 + k]:
                    ctx.module._queue_update(k, touched, grad)
            return (None, None, *[None] * num_cores)
        dense = [
            torch.zeros_like(core).index_copy_(0, touched, grad).view_as(whole)
            for whole, core, (touched, grad) in zip(cores, slices, grads, strict=True)
        ]
        return (None, None, *dense)


class _TrainedRows(torch.autograd.Function):
    """Cached rows that are trained themselves; the gradient goes straight into their update."""

    @staticmethod
    def forward(ctx: Any, module: _TTTables, slots: Tensor, weight: Tensor) -> Tensor:
        ctx.module, ctx.slots = module, slots
        return weight.index_select(0, slots)

    @staticmethod
    @torch.autograd.function.once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad_rows: Tensor) -> tuple[None, None, None]:
        ctx.module._queue_update(len(ctx.module.tt_cores), ctx.slots, grad_rows)
        return None, None, None


def _check_offsets(offsets: Tensor, num_lookups: int, include_last_offset: bool) -> None:
    if offsets.dim() != 1 or offsets.dtype not in (torch.int64, torch.int32):
        raise ValueError(
            f"expected 1-D int64 or int32 offsets, found {offsets.dim()}-D {offsets.dtype}: pass where each bag starts"
        )
    if offsets.numel() == 0:
        if include_last_offset:
            raise ValueError(
                "expected at least one offset, found none: pass the end of the last bag, 0 without bags"
            )
        return
    steps_back = bool((offsets.diff() < 0).any())
    first, last = int(offsets[0]), int(offsets[-1])
    if steps_back or first != 0 or last > num_lookups or (include_last_offset and last != num_lookups):
        ending = f"ending at {num_lookups}" if include_last_offset else f"ending at {num_lookups} or below"
        raise ValueError(
            f"expected offsets that start at 0 and never fall, {ending}, found {first} to {last}"
            f"{', falling in between' if steps_back else ''}: pass the running sum of the bag sizes"
        )


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
