"""CachedEmbeddingBag: a table in host memory behind a small cache of rows on the device.

`RowCache` decides which row sits where; this module moves the rows and does the arithmetic. A row is changed
in the cache only, and goes home when it is evicted or at `flush`, so training equals a plain
`nn.EmbeddingBag`.

Keeps   a row never leaves between its forward and the optimizer step that updates it
        optimizer state travels with its row
        evaluation moves nothing: absent rows are read from the host table
Costs   on a device, no synchronisation but a wait for the previous copy out of (or into) the same host buffer

Shape suffixes: N rows of the table, S positions of the cache, D embedding_dim, L lookups of a batch, U distinct rows.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor, nn
from torch.nn import functional

from slipstream.embedding.cached.checks import as_counts, check_choice, refuse_several_processes, too_many_rows
from slipstream.embedding.cached.host_tables import HostTables, Tables, index_on
from slipstream.embedding.cached.pending import PendingForward, sum_gradients, update_dtype
from slipstream.embedding.row_cache import CachePlan, RowCache
from slipstream.embedding.rules import OPTIMIZERS
from slipstream.errors import CapacityError
from slipstream.ops.counting import most_frequent_rows

Mode = Literal["sum", "mean", "max"]
EvictStrategy = Literal["lfu", "dataset"]


class CachedEmbeddingBag(nn.Module):
    """`nn.EmbeddingBag` whose rows live in host memory, with a cache of `cache_ratio` of them on the device.

    The numbers are those of `nn.EmbeddingBag`: on CPU to the bit, in the forward and with sparse gradients
    (dense ones differ in the last bit, since torch sums duplicates in an order that depends on row numbers).

    Two ways to update. With `optimizer=None`, `parameters()` yields the cache tensor: plain `torch.optim.SGD`
    (no momentum, no weight decay) is right; anything with state per row is not, since a position changes its
    row. With `optimizer="..."`, call `step()` after `backward()`: duplicates are summed, each row looked up
    since the last step is updated once, its state moves with it, and `parameters()` is empty so that nothing
    updates it twice. Either way one step answers for all forwards before it; their rows stay until then.

    The cache must hold the distinct rows of a training batch. Ids are best handed over on the CPU, where the
    bookkeeping happens. In eval mode the table is frozen: no row moves, nothing counts and no gradient
    reaches it.

    Args:
        num_embeddings: Rows of the table, N.
        embedding_dim: Width of a row, D.
        cache_ratio: Share of the rows the cache holds, in (0, 1]; at least one row.
        ids_freq_mapping: Accesses of every row in the training data, shape (N,), integer, >= 0. Decides what
            the cache starts with, and for `evict_strategy="dataset"` who leaves. None: row 0 is the most
            used.
        warmup_ratio: Share of the cache filled before training, in [0, 1].
        buffer_size: Rows per staged copy, which bounds the (pinned) staging memory; 0: one copy for all.
        pin_weight: Page-lock the whole host table. Only where there is CUDA.
        evict_strategy: `"lfu"`: the row least looked up since it came leaves; `"dataset"`: the row least used
            in the training data.
        ageing_lookups: Halve the LFU counts after so many lookups per cached row; 0: never, as published.
        mode: How a bag becomes one vector.
        padding_idx: Row number whose lookups count for nothing and which is never updated.
        include_last_offset: As in `nn.EmbeddingBag`.
        sparse: Gradients of `parameters()` are sparse; with `optimizer=None` only.
        optimizer: Row optimizer applied by `step()`, by its name in `slipstream.embedding.rules.OPTIMIZERS`; None:
            leave updates to `torch.optim.SGD`.
        lr: Learning rate of `step()`; also an attribute, for schedules.
        eps: Added to the denominator; None: the optimizer's own, 1e-10 for Adagrad, 1e-8 for Adam.
        betas: Decay of Adam's moments.
        dtype: Floating dtype of the table.
        device: Where the cache lives; `.to()` moves it later. The table itself stays in host memory.
        _weight: Starting table, shape (N, D). A contiguous CPU tensor of the right dtype is taken over, not
            copied. None: normal(0, 1), with a zero row at `padding_idx`.

    Raises:
        ValueError: An option is out of range or does not go with another.

    Example:
        >>> bag = CachedEmbeddingBag(1000, 4, cache_ratio=0.01, mode="sum", optimizer="sgd", lr=0.1)
        >>> bag(torch.tensor([3, 999, 3]), torch.tensor([0, 2])).sum().backward()
        >>> bag.step()
        >>> bag.misses, bag.row_cache.num_resident
        (1, 8)

    Source: CachedEmbedding (arXiv 2208.05321), class and options of the same names. Ours: dirty rows,
    optimizer state, look-ahead over bags of any length, evaluation that moves nothing, a complete state dict.
    """

    cache_weight: Tensor

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        *,
        cache_ratio: float = 0.01,
        ids_freq_mapping: ArrayLike | Tensor | None = None,
        warmup_ratio: float = 0.7,
        buffer_size: int = 0,
        pin_weight: bool = False,
        evict_strategy: EvictStrategy = "lfu",
        ageing_lookups: float = 20.0,
        mode: Mode = "mean",
        padding_idx: int | None = None,
        include_last_offset: bool = False,
        sparse: bool = False,
        optimizer: str | None = None,
        lr: float = 0.01,
        eps: float | None = None,
        betas: tuple[float, float] = (0.9, 0.999),
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        _weight: Tensor | None = None,
    ) -> None:
        super().__init__()
        check_choice("mode", mode, ("sum", "mean", "max"))
        check_choice("evict_strategy", evict_strategy, ("lfu", "dataset"))
        check_choice("optimizer", optimizer, (None, *OPTIMIZERS.names()))
        if num_embeddings < 1 or embedding_dim < 1:
            raise ValueError(f"expected a table of at least 1 x 1, found {num_embeddings} x {embedding_dim}")
        if not 0.0 < cache_ratio <= 1.0 or not 0.0 <= warmup_ratio <= 1.0:
            raise ValueError(
                f"expected cache_ratio in (0, 1], warmup_ratio in [0, 1], found {cache_ratio}, {warmup_ratio}"
            )
        if buffer_size < 0:
            raise ValueError(f"expected buffer_size >= 0 rows, found {buffer_size}")
        if padding_idx is not None and not -num_embeddings <= padding_idx < num_embeddings:
            raise ValueError(f"expected padding_idx within {num_embeddings} rows, found {padding_idx}")
        if sparse and (optimizer is not None or mode == "max"):
            raise ValueError("expected sparse=False: it is for optimizer=None and mode 'sum' or 'mean' only")
        self.num_embeddings = num_embeddings
        self.embedding_dim = embedding_dim
        self.cache_ratio = cache_ratio
        self.buffer_size = buffer_size
        self.mode: Mode = mode
        self.padding_idx = None if padding_idx is None else padding_idx % num_embeddings
        self.include_last_offset = include_last_offset
        self.sparse = sparse
        self.optimizer = optimizer
        self.lr = lr
        self.rule = None if optimizer is None else OPTIMIZERS.get(optimizer)(eps=eps, betas=betas)
        self._num_steps = torch.zeros((), dtype=torch.float64)
        counts = as_counts(ids_freq_mapping, num_embeddings)
        capacity = max(1, int(num_embeddings * cache_ratio))
        ranking = counts if evict_strategy == "dataset" else None
        self.row_cache = RowCache(
            num_embeddings,
            capacity,
            policy="rank" if evict_strategy == "dataset" else "lfu",
            row_counts=ranking,
            ageing_lookups=ageing_lookups,
        )
        self._ranking_bytes = 0 if ranking is None else ranking.nbytes
        self._init_tables(_weight, pin_weight, dtype, torch.device("cpu" if device is None else device))
        self._pending: list[PendingForward] = []
        self._pending_admit = 0  # the admit that the first pending forward came from
        self._pending_version = 0  # of the cache tensor, at the first pending forward
        self._num_announced = 0
        self._warm(counts, math.ceil(capacity * warmup_ratio))

    def _init_tables(
        self, weight: Tensor | None, pin_weight: bool, dtype: torch.dtype | None, device: torch.device
    ) -> None:
        shape = (self.num_embeddings, self.embedding_dim)
        if weight is None:
            weight = torch.empty(shape, dtype=dtype).normal_()
            if self.padding_idx is not None:
                weight[self.padding_idx].zero_()
        elif tuple(weight.shape) != shape:
            raise ValueError(f"expected _weight of shape {shape}, found {tuple(weight.shape)}")
        weight = weight.detach().to(device="cpu", dtype=dtype).contiguous()
        if not weight.is_floating_point():
            raise ValueError(f"expected a floating dtype, found {weight.dtype}")
        tables = {"weight": weight}
        for name, state_shape in ({} if self.rule is None else self.rule.state_shapes(shape)).items():
            tables[name] = torch.zeros(state_shape, dtype=update_dtype(weight.dtype))
        if pin_weight and torch.cuda.is_available():
            tables = {name: table.pin_memory() for name, table in tables.items()}
        self._host = HostTables(tables, self.buffer_size)
        # One position more when there is a padding row: its lookups all go there, in no row's way.
        num_positions = self.row_cache.capacity + (self.padding_idx is not None)
        for name, table in tables.items():
            near = torch.zeros((num_positions, *table.shape[1:]), dtype=table.dtype, device=device)
            if self.optimizer is None:
                self.register_parameter(f"cache_{name}", nn.Parameter(near))
            else:
                self.register_buffer(f"cache_{name}", near, persistent=False)

    def _warm(self, counts: np.ndarray | None, num_rows: int) -> None:
        if counts is None:
            rows, positions = self.row_cache.warm(np.arange(num_rows))
        else:
            most_used = most_frequent_rows(counts, num_rows)
            rows, positions = self.row_cache.warm(most_used, counts[most_used])
        self._host.fetch(rows, positions, self._near())

    def forward(
        self,
        input: Tensor,  # noqa: A002 - the name nn.EmbeddingBag gives it
        offsets: Tensor | None = None,
        per_sample_weights: Tensor | None = None,
    ) -> Tensor:
        """Pool the rows of every bag: in training made resident first, in eval mode wherever they are.

        Args:
            input: Row numbers, shape (L,) with `offsets` or (B, L / B) without; int64 or int32.
            offsets: Start of every bag, shape (B,), or (B + 1,) with `include_last_offset`.
            per_sample_weights: Weight of every lookup, shape of `input`; mode `"sum"` only.

        Returns:
            Pooled rows, shape (B, D), on the device of the cache.

        Raises:
            ValueError: A row is out of range, or the arguments break the conventions of `nn.EmbeddingBag`.
            CapacityError: In training, the batch has more distinct rows than the cache positions.
        """
        ids = input.detach().cpu().numpy()
        is_real = None if self.padding_idx is None else ids != self.padding_idx
        rows = ids.reshape(-1) if is_real is None else ids[is_real]
        if self.training:
            refuse_several_processes()
        positions, weight = self._resident_view(rows) if self.training else self._frozen_view(rows)
        padding_position = weight.shape[0] - 1
        if is_real is not None:
            everywhere = np.full(ids.shape, padding_position, positions.dtype)
            everywhere[is_real] = positions
            positions = everywhere
        pooled: Tensor = functional.embedding_bag(
            index_on(weight.device, positions.reshape(ids.shape)),
            weight,
            None if offsets is None else offsets.to(weight.device, torch.int64, non_blocking=True),
            mode=self.mode,
            sparse=weight.requires_grad and self.mode != "max" and (self.sparse or self.optimizer is not None),
            per_sample_weights=None
            if per_sample_weights is None
            else per_sample_weights.to(weight.device, non_blocking=True),
            include_last_offset=self.include_last_offset,
            padding_idx=None if is_real is None else padding_position,
        )
        return pooled

    def prefetch(self, batches: Iterable[Tensor]) -> int:
        """Make the rows of several batches resident at once; their forwards move nothing then.

        One request instead of several: each row is fetched once, and the host works once for all of them.

        Args:
            batches: Ids of the coming batches, in the order of their forwards; any shapes.

        Returns:
            How many of the first batches are covered, at least 1 unless there are none: as many as fit
            the cache together. Ask again for the others after the forwards of these.

        Raises:
            ValueError: A row is out of range, or the module is in eval mode.
            CapacityError: Not even the first batch fits.
        """
        if not self.training:
            raise ValueError("expected training mode, found eval mode, where no row moves")
        requests = [self._real_rows(batch) for batch in batches]
        if not requests:
            return 0
        self._forget_updated()
        num_covered = max(1, self.row_cache.num_fitting(requests, keep_admits=self._keep_admits()))
        self._admit(np.concatenate(requests[:num_covered]))
        self._num_announced = num_covered
        return num_covered

    def step(self) -> None:
        """Update every row looked up since the last step with the gradients that arrived, duplicates summed.

        Lookups whose backward has not run count for nothing. What the optimizers do, and where they are from, stands
        in `slipstream.embedding.rules`.

        Raises:
            ValueError: The module was made with `optimizer=None`.
        """
        if self.optimizer is None:
            raise ValueError("expected a row optimizer; with optimizer=None step a torch.optim.SGD instead")
        pending = [p for p in self._pending if p.leaf is not None and p.leaf.grad is not None]
        self._pending.clear()
        if not pending:
            return
        with torch.no_grad():
            positions, gradient = sum_gradients(pending, self._near()["weight"], self.row_cache)
            self._num_steps += 1
            self._update(self._near(), index_on(gradient.device, positions), gradient)
        self.row_cache.mark_dirty(positions)

    def flush(self, *, empty: bool = False) -> None:
        """Write every changed row back to the host table.

        Args:
            empty: Also forget what is in the cache. By default it stays warm.

        Raises:
            ValueError: `empty` between a forward and the step that updates its rows.
        """
        self._forget_updated()
        if empty and self._pending:
            raise ValueError("expected the optimizer step of every forward before flush(empty=True)")
        rows, positions = self.row_cache.take_dirty()
        self._host.write_back(rows, positions, self._near())
        self._host.land()
        for pending in self._pending:  # their update is still to come
            if self.optimizer is None:
                self.row_cache.mark_dirty(pending.positions)
        if empty:
            self.row_cache.drop_all()

    @property
    def weight(self) -> Tensor:
        """The whole table, shape (N, D), in host memory, after a `flush`. Read it; writes may not be seen."""
        self.flush()
        return self._host.tables["weight"]

    @property
    def num_steps(self) -> int:
        """Calls of `step` that updated something."""
        return int(self._num_steps)

    @property
    def hits(self) -> int:
        """Training lookups whose row was in the cache already."""
        return self.row_cache.stats.hit_lookups

    @property
    def misses(self) -> int:
        """Training lookups whose row had to be fetched."""
        return self.row_cache.stats.miss_lookups

    @property
    def hit_ratio(self) -> float:
        """Share of training lookups served by the cache, in [0, 1]; those of `prefetch` count once."""
        return self.row_cache.stats.hit_ratio

    @property
    def bytes_to_device(self) -> int:
        """Bytes of rows and optimizer state copied into the cache, the warm-up included."""
        return self._host.bytes_to_device

    @property
    def bytes_to_host(self) -> int:
        """Bytes of rows and optimizer state written back."""
        return self._host.bytes_to_host

    def memory_bytes(self) -> dict[str, int]:
        """Count the bytes this module holds.

        Returns:
            `cache`: rows and optimizer state on the device; `maps`: the bookkeeping, in host memory; `host`:
            the table and its optimizer state; `staging`: host buffers of the copies.
        """
        return {
            "cache": sum(table.nbytes for table in self._near().values()),
            "maps": self.row_cache.index_bytes + self._ranking_bytes,
            "host": sum(table.nbytes for table in self._host.tables.values()),
            "staging": self._host.staging_bytes,
        }

    def extra_repr(self) -> str:
        """Summarise the options."""
        return (
            f"{self.num_embeddings}, {self.embedding_dim}, cached={self.row_cache.capacity}, "
            f"policy={self.row_cache.policy!r}, mode={self.mode!r}, optimizer={self.optimizer!r}"
        )

    def _near(self) -> Tables:
        """Give the cache tensors, writable without autograd or its version counter taking notice."""
        return {name: getattr(self, f"cache_{name}").data for name in self._host.tables}

    def _real_rows(self, ids: Tensor) -> np.ndarray:
        rows: np.ndarray = ids.detach().cpu().numpy().reshape(-1)
        return rows if self.padding_idx is None else rows[rows != self.padding_idx]

    def _resident_view(self, rows: np.ndarray) -> tuple[np.ndarray, Tensor]:
        """Make rows resident: their positions, and the cache tensor to look them up in."""
        self._forget_updated()
        plan = self._admit(rows, is_announced=self._num_announced > 0)
        self._num_announced = max(0, self._num_announced - 1)
        weight = self.cache_weight
        leaf = None
        if self.optimizer is not None:
            weight = leaf = weight.detach().requires_grad_(torch.is_grad_enabled())
        if torch.is_grad_enabled() and weight.requires_grad:
            if not self._pending:
                self._pending_admit = self.row_cache.num_admits
                self._pending_version = self.cache_weight._version
            self._pending.append(PendingForward(plan.distinct_positions, leaf))
            if self.optimizer is None:  # we do not see that update happen; step() marks its own
                self.row_cache.mark_dirty(plan.distinct_positions)
        return plan.positions, weight

    def _frozen_view(self, rows: np.ndarray) -> tuple[np.ndarray, Tensor]:
        """Find rows where they are: positions in the cache, or in a small table that mixes both places."""
        positions, is_missing = self.row_cache.lookup(rows)
        near = self._near()["weight"]
        if not is_missing.any():
            return positions, near
        distinct, inverse = np.unique(rows, return_inverse=True)
        positions, is_missing = self.row_cache.lookup(distinct)
        mixed = near.new_zeros((distinct.size + (self.padding_idx is not None), self.embedding_dim))
        is_near = index_on(near.device, np.flatnonzero(~is_missing))
        mixed[is_near] = near.index_select(0, index_on(near.device, positions[~is_missing]))
        absent = self._host.read(distinct[is_missing])
        mixed[index_on(near.device, np.flatnonzero(is_missing))] = absent.to(near.device)
        return inverse.astype(np.int32), mixed

    def _admit(self, rows: np.ndarray, *, is_announced: bool = False) -> CachePlan:
        try:
            plan = self.row_cache.admit(rows, keep_admits=self._keep_admits(), is_announced=is_announced)
        except CapacityError as error:
            raise too_many_rows(
                np.unique(rows).size,
                capacity=self.row_cache.capacity,
                num_embeddings=self.num_embeddings,
                cache_ratio=self.cache_ratio,
                num_waiting=len(self._pending),
            ) from error
        if plan.fetch_rows.size:
            near = self._near()
            self._host.land()  # what is fetched may have been evicted by the admit before
            self._host.write_back(plan.evict_rows, plan.evict_positions, near)
            self._host.fetch(plan.fetch_rows, plan.fetch_positions, near)
        return plan

    def _keep_admits(self) -> int:
        return self.row_cache.num_admits - self._pending_admit + 1 if self._pending else 0

    def _forget_updated(self) -> None:
        """With an optimizer of yours: a new version of the cache tensor means that its step has been taken."""
        if self.optimizer is None and self.cache_weight._version != self._pending_version:
            self._pending.clear()

    def _update(self, near: Tables, index: Tensor, gradient: Tensor) -> None:
        assert self.rule is not None
        state = [near[name] for name in self.rule.state]
        rows = near["weight"].index_select(0, index).to(gradient.dtype)
        directions = self.rule.row_directions(state, index, gradient, num_steps=self._num_steps)
        rows.add_(directions, alpha=-self.lr)
        near["weight"].index_copy_(0, index, rows.to(near["weight"].dtype))

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> "CachedEmbeddingBag":
        """Move or cast the cache, as every module does; the host tables follow in dtype, not in place."""
        self.flush()
        self._pending.clear()
        super()._apply(fn, recurse)
        self._host.cast({name: near.dtype for name, near in self._near().items()})
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        self.flush()
        for name, table in self._host.tables.items():
            destination[prefix + _state_key(name)] = table
        if self.optimizer is not None:
            destination[prefix + "optimizer.num_steps"] = torch.tensor(self.num_steps)

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        self._host.land()
        self._pending.clear()
        self._num_announced = 0
        expected = {prefix + _state_key(name): table for name, table in self._host.tables.items()}
        steps_key = prefix + "optimizer.num_steps"
        for key, table in expected.items():
            if key not in state_dict:
                missing_keys.append(key)
            elif state_dict[key].shape != table.shape:
                found = tuple(state_dict[key].shape)
                error_msgs.append(f"size mismatch for {key}: expected {tuple(table.shape)}, found {found}.")
            else:
                table.copy_(state_dict[key].detach())
        if self.optimizer is not None and steps_key in state_dict:
            self._num_steps.fill_(int(state_dict[steps_key]))
        elif self.optimizer is not None:
            missing_keys.append(steps_key)
        if strict:
            known = {*expected, steps_key} if self.optimizer is not None else set(expected)
            unexpected_keys.extend(key for key in state_dict if key.startswith(prefix) and key not in known)
        self.row_cache.take_dirty()  # what is in the cache is replaced, not written back
        rows = self.row_cache.resident_rows()
        self._host.fetch(rows, np.arange(rows.size), self._near())


def _state_key(name: str) -> str:
    return name if name == "weight" else f"optimizer.{name}"
