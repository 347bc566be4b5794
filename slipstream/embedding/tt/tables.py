"""What every tensor-train embedding bag is made of: cores, fused optimizer, cache.

**T** tables, **N** rows of a table, **D** embedding_dim, **U** distinct ids, **C** cached rows. An *id* is
row + table · prod(p), so that all tables share one range.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, Literal, Self, TypedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slipstream.embedding.rules import OPTIMIZERS, require_one_process
from slipstream.embedding.tt.counts import IdCounter, tensor_bytes
from slipstream.embedding.tt.kernels import (
    Plan,
    contract,
    contract_backward,
    plan_contraction,
    segment_sum,
)
from slipstream.embedding.tt.shapes import (
    WeightDist,
    check_tt_shapes,
    draw_cores,
    entry_variance,
    tt_to_dense,
)

CacheGradient = Literal["cores", "rows"]
Mode = Literal["sum", "mean", "max"]

_CHUNK_ROWS = 16_384


class TTOptions(TypedDict, total=False):
    """What every tensor-train bag takes by name; `TTEmbeddingBag` says what each means."""

    optimizer: str
    learning_rate: float
    eps: float
    sparse: bool
    use_cache: bool
    cache_size: int
    hashtbl_size: int
    cache_gradient: CacheGradient
    weight_dist: WeightDist
    mode: Mode
    dtype: torch.dtype | None
    device: torch.device | str | None
    generator: torch.Generator | None


class TTTables(nn.Module):
    """Cores, fused optimizer and cache of tables of one shape; `TTEmbeddingBag` says what the arguments mean."""

    cache_ids: Tensor
    cache_weight: Tensor
    cache_lookups: Tensor
    num_updates: Tensor | None
    """Updates so far, where the rule counts them. Shape (), int64."""

    def __init__(
        self,
        num_tables: int,
        num_embeddings: int,
        embedding_dim: int,
        tt_ranks: Sequence[int],
        tt_p_shapes: Sequence[int] | None = None,
        tt_q_shapes: Sequence[int] | None = None,
        *,
        optimizer: str = "sgd",
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
            ("optimizer", optimizer, OPTIMIZERS.names()),
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
        self.optimizer, self.learning_rate, self.sparse = optimizer, learning_rate, sparse
        rule = OPTIMIZERS.get(optimizer)
        self._core_rule, self._cache_rule = rule.elementwise()(eps=eps), rule(eps=eps)
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
        # names of the buffers that hold what the rule keeps: of each core, then of the cache
        self._states: list[list[str]] = [[] for _ in range(len(shapes) + 1)]
        if sparse:
            for k, core in enumerate(placed):
                for name in self._core_rule.state:
                    self._keep(k, f"core_{name}_{k}", torch.zeros_like(core))
        counted = torch.zeros((), dtype=torch.int64, device=device) if sparse and rule.counts_steps else None
        self.register_buffer("num_updates", counted)

        self.counter: IdCounter | None = None
        if use_cache:
            self._make_cache(cache_size, hashtbl_size, placed[0])
        self._pending: dict[int, list[tuple[int, Tensor, Tensor]]] = {}

    def _make_cache(self, cache_size: int, hashtbl_size: int, like: Tensor) -> None:
        num_ids = self.num_tables * self.num_embeddings
        self.cache_size = min(cache_size, num_ids) if cache_size > 0 else max(1, num_ids // 10)
        if 0 < hashtbl_size < self.cache_size:
            raise ValueError(
                f"expected hashtbl_size >= cache_size = {self.cache_size}, or 0 for exact counts, found "
                f"{hashtbl_size}: ids that are not counted cannot be cached; enlarge it"
            )
        self.counter = IdCounter(max(hashtbl_size, 0)).to(like.device)
        # unused slots hold an id above all others, so that the ids stay sorted
        empty = torch.full((self.cache_size,), self.num_tables * self._table_size, device=like.device)
        self.register_buffer("cache_ids", empty)
        self.register_buffer("cache_lookups", torch.zeros(2, dtype=torch.int64, device=like.device))
        weight = like.new_zeros((self.cache_size, self.embedding_dim))
        if self.cache_gradient == "rows":
            self.cache_weight = nn.Parameter(weight)
            for name, shape in self._cache_rule.state_shapes(weight.shape).items() if self.sparse else ():
                self._keep(-1, f"cache_{name}", weight.new_zeros(shape))
            return
        self.register_buffer("cache_weight", weight, persistent=False)
        # row i is fresh when row_clock[i] is no older than the clocks of the core slices it is made of
        self._clock = 1
        self.register_buffer("_row_clock", torch.zeros_like(empty), persistent=False)
        for k, core in enumerate(self.tt_cores):
            ones = torch.ones(core.shape[0] * core.shape[1], dtype=torch.int64, device=like.device)
            self.register_buffer(f"_slice_clock_{k}", ones, persistent=False)
        self._versions = [core._version for core in self.tt_cores]

    def _keep(self, index: int, name: str, state: Tensor) -> None:
        self._states[index].append(name)
        self.register_buffer(name, state)

    def _kept(self, index: int) -> list[Tensor]:
        """Say what the rule keeps of one core, or of the cache. Core k: shape (T, p, r, q, r')."""
        return [self.get_buffer(name) for name in self._states[index]]

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
        padding_row = None
        if padding is not None:
            found = (unique == padding).nonzero()
            padding_row = int(found) if found.numel() else None
        if self.counter is None:
            rows, position = self._contracted_rows(unique)
        else:
            counts = torch.bincount(inverse.flatten(), minlength=unique.numel())
            if padding_row is not None:
                counts[padding_row] = 0
            self.counter.add(unique, counts)
            rows, position = self._cached_rows(unique, counts)
        if padding_row is not None and position is not None:
            padding_row = int(position[padding_row])
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
        rows: Tensor = _ContractedRows.apply(self, plan, *self.tt_cores)
        return rows, plan.position

    @torch.no_grad()
    def _table_rows(self, ids: Tensor) -> Tensor:
        """Rows of ascending distinct ids, in their order, a chunk at a time: partial products are large."""
        chunks = []
        for chunk in ids.split(_CHUNK_ROWS):
            rows, position = self._contracted_rows(chunk)
            chunks.append(rows if position is None else rows[position])
        return torch.cat(chunks)

    # ---- cache

    def _cached_rows(self, ids: Tensor, counts: Tensor) -> tuple[Tensor, Tensor | None]:
        trains_cores = torch.is_grad_enabled() and any(core.requires_grad for core in self.tt_cores)
        if trains_cores and self.cache_gradient == "cores":
            return self._contracted_rows(ids)
        # Cached ids are ascending, so a search gives the slot where an id would stand: a hit if it does stand there.
        # Contracted rows come first in the result and cached ones after them; `position` says where each id's row is.
        slots = torch.searchsorted(self.cache_ids, ids).clamp_(max=self.cache_size - 1)
        hit = self.cache_ids[slots] == ids
        self.cache_lookups += torch.stack([counts.sum(), (counts * hit).sum()])
        if not bool(hit.any()):
            return self._contracted_rows(ids)
        missed, slots = (~hit).nonzero().squeeze(1), slots[hit]
        if self.cache_gradient == "cores":
            self._refresh(slots)
            cached = self.cache_weight.index_select(0, slots)
        elif self.sparse:
            cached = _TrainedRows.apply(self, slots, self.cache_weight)
        else:
            if trains_cores:
                require_one_process("the cache of a TTEmbeddingBag", remedy="use cache_gradient='cores' or no cache")
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
        learnt and their optimizer state, new ones start from the cores with a state of 0, and **rows that
        leave fall back to what the cores say**: populate early and seldom. An optimizer of yours
        (`sparse=False`) knows nothing of the change: start it afresh.

        Returns:
            Rows cached now.

        Raises:
            ValueError: The module was built without a cache.
        """
        if self.counter is None:
            raise ValueError("expected a module with a cache, found use_cache=False: pass use_cache=True")
        # rows that were cached before and still are keep what they learnt: they move to the slots of the new order
        ids = self.counter.top(self.cache_size)
        slots = torch.searchsorted(self.cache_ids, ids).clamp_(max=self.cache_size - 1)
        stays = self.cache_ids[slots] == ids
        for index, tensor in enumerate([self.cache_weight, *self._kept(-1)]):
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
        """Empty the cache, forget counts and hits; with `cache_gradient="rows"` also what its rows learnt."""
        if self.counter is None:
            return
        self.counter.reset()
        self.cache_populate()
        self.cache_lookups.zero_()

    @property
    def hit_ratio(self) -> float:
        """Share of lookups the cache served, in [0, 1], since the last reset, over passes that read it."""
        if self.counter is None or int(self.cache_lookups[0]) == 0:
            return 0.0
        return int(self.cache_lookups[1]) / int(self.cache_lookups[0])

    # ---- fused optimizer

    def _queue_update(self, index: int, touched: Tensor, grad: Tensor) -> None:
        """Keep a gradient until the running backward pass ends; then all are summed and applied at once."""
        require_one_process(
            "a TTEmbeddingBag with sparse=True", remedy="sparse=False leaves gradients that DDP averages"
        )
        task = torch._C._current_graph_task_id()
        if task not in self._pending:
            # leftovers of a pass that failed half-way must not leak into this one
            self._pending[task] = []
            engine = torch.autograd.Variable._execution_engine
            engine.queue_callback(partial(self._apply_updates, task))
        self._pending[task].append((index, touched, grad))

    @torch.no_grad()
    def _apply_updates(self, task: int) -> None:
        pending = self._pending.pop(task)
        if self._mirrors_cores() and self._versions != [core._version for core in self.tt_cores]:
            self._age_all()
        if self.num_updates is not None:
            self.num_updates += 1
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
        rule = self._cache_rule if is_cache else self._core_rule
        state = self._kept(-1) if is_cache else [kept.flatten(0, 1) for kept in self._kept(index)]
        num_updates = None if self.num_updates is None else self.num_updates.double()
        # a gradient may be shared with the graph, and rules use theirs up
        directions = rule.row_directions(state, touched, grad.clone(), num_steps=num_updates)
        # duplicates are summed already, so that the order of this scatter does not matter
        weight.index_add_(0, touched, directions, alpha=-self.learning_rate)

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
        """Give the bytes in use now, nothing left out.

        Returns:
            "cores", "optimizer_state", "cache" (rows, their ids, state and clocks) and "counts".
        """
        cache = self._kept(-1)
        states = [state for k in range(len(self.tt_cores)) for state in self._kept(k)]
        if self.counter is not None:
            cache += [self.cache_ids, self.cache_weight, self.cache_lookups]
        if self._mirrors_cores():
            cache += [self.get_buffer("_row_clock"), *map(self._slice_clock, range(len(self.tt_cores)))]
        return {
            "cores": sum(map(tensor_bytes, self.tt_cores)),
            "optimizer_state": sum(map(tensor_bytes, states)),
            "cache": sum(map(tensor_bytes, cache)),
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
            raise ValueError(f"expected int64 or int32 indices, found {indices.dtype}: convert them with .long()")
        if indices.numel() == 0:
            return
        low, high = (int(bound) for bound in torch.aminmax(indices))
        if low < 0 or high >= self.num_embeddings:
            found = low if low < 0 else high
            raise IndexError(
                f"expected indices in 0..{self.num_embeddings - 1}, found {found}: map unknown values to a "
                "row of the table, or enlarge num_embeddings"
            )

    def extra_repr(self) -> str:
        """Give sizes, shapes and the settings that matter."""
        tables = f"{self.num_tables} x " if self.num_tables > 1 else ""
        update = f"fused {self.optimizer}, learning_rate={self.learning_rate}" if self.sparse else "gradients"
        cache = "" if self.counter is None else f", cache_size={self.cache_size}, gradient to {self.cache_gradient}"
        dense = self.num_tables * self.num_embeddings * self.embedding_dim
        ratio = dense / sum(core.numel() for core in self.tt_cores)
        return (
            f"{tables}{self.num_embeddings}, {self.embedding_dim}, tt_ranks={self.tt_ranks[1:-1]}, "
            f"tt_p_shapes={self.tt_p_shapes}, tt_q_shapes={self.tt_q_shapes}, mode={self.mode!r}, "
            f"{update}{cache}, {ratio:.1f}x smaller"
        )


class _ContractedRows(torch.autograd.Function):
    """Rows of a plan; the gradient goes to the cores, or straight into their update."""

    @staticmethod
    def forward(ctx: Any, module: TTTables, plan: Plan, *cores: Tensor) -> Tensor:
        rows, lefts = contract(plan, [core.flatten(0, 1) for core in cores])
        ctx.save_for_backward(*cores, *lefts)
        ctx.module, ctx.plan = module, plan
        return rows

    @staticmethod
    @torch.autograd.function.once_differentiable
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
    def forward(ctx: Any, module: TTTables, slots: Tensor, weight: Tensor) -> Tensor:
        ctx.module, ctx.slots = module, slots
        return weight.index_select(0, slots)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_rows: Tensor) -> tuple[None, None, None]:
        ctx.module._queue_update(len(ctx.module.tt_cores), ctx.slots, grad_rows)
        return None, None, None
