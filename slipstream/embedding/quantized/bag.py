"""An embedding bag that is trained on the few bits it will be served with.

A master copy learns; every forward sees it rounded to a grid of 16, 8, 4 or 2 bits, and gradients pass
straight through the rounding.

What differs from the published DQRM code, on purpose: **rows are rounded before they are pooled**, so a bag
of many rows means the same in training and when packed; only looked-up rows are rounded, each once; the scale
follows the table every `period` steps at a cost that does not grow with the table; per-row scales can be
trained; an int8 master with stochastic rounding saves training memory, not only storage.

Shape suffixes: N rows of a table, D embedding_dim, B bags, L lookups, U unique rows among them.

Source: DQRM (Zhou et al. 2024) for the scheme; ALPT (Li et al. 2022) for training in low precision.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any, Literal, Unpack, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from slipstream.embedding.duplicates import sum_duplicates
from slipstream.embedding.quantized.abs_max import AbsMaxTracker
from slipstream.embedding.quantized.base import (
    Bag,
    BagOptions,
    check_rows,
    check_table,
    position_of,
    row_chunks,
    unique_rows,
)
from slipstream.embedding.quantized.numbers import (
    check_choice,
    check_finite,
    on_grid,
    row_scales,
    scale_for,
    stochastic_round,
)
from slipstream.embedding.quantized.packed import PackedEmbeddingBag
from slipstream.embedding.rules import OPTIMIZERS, RowOptimizer, require_one_process

MasterDtype = Literal["float32", "int8"]

_STATE = "optimizer_"
"""Begins the names of buffers that hold what a rule keeps of the rows."""

SWEEP_ROWS_PER_STEP = 1024
"""Rows re-read per training step, on average, for max|w|: half the lookups of a batch of 2048."""

SMALLEST_EXPONENT, LARGEST_EXPONENT = -126, 120
"""Range of the power of two that scales a row of an int8 master."""


class QuantizedEmbeddingBag(Bag):
    """An `nn.EmbeddingBag` trained on the grid it will be stored on.

    **Forward.** Looked-up rows are gathered (each once, except where every bag holds a single row), rounded
    (`q = clamp(round(w / scale), -n - 1, n)`, n = 2^(bits-1) - 1), dequantised, then pooled. Straight-through
    gradient: the gradient of the master weight is that of the dequantised rows, unclipped. With `sparse` it
    is a sparse tensor of the looked-up rows (padding left out), so `torch.optim.SGD` and `SparseAdam` work;
    mode "max" may be sparse too.

    **Scale per row** is computed from each looked-up row at each call: always exact, in training and
    evaluation; `period` has no meaning then.

    **Scale per table** is max|w| / n, refreshed on training forwards 0, period, 2 * period, ..., before
    rounding; evaluation never changes it. Between refreshes a weight that outgrew the range saturates. Tables
    of at most `1024 * period` rows are re-read whole at a refresh: always exact. Larger ones use an
    `AbsMaxTracker`, which reads the rows looked up since the last refresh, 1024 * period others in turn, and
    at most R = max(4 * period, 16) blocks of 256 rows, whatever the size of the table. The scale is then
    exact for any optimizer that changes looked-up rows only (SGD, SparseAdam, Adagrad on sparse gradients),
    unless R or more blocks have shrunk from above the present maximum since they were last read: then it is
    an upper bound, so nothing saturates at a refresh. Changes of other rows (momentum buffers, a second
    module sharing the weight, writes by hand) are seen within ceil(N / (1024 * period)) refreshes, that is
    about N / 1024 + period steps; `refresh_scale` sees them at once. With `sparse=False` a step costs O(N)
    anyway, so each refresh reads all rows. A step is one forward in training mode.

    **int8 master.** The table itself is N * (D + 1) bytes: int8 values and, per row, a power of two as an
    int8 exponent, refitted at each update so that the largest |value| is 64 to 127 steps. A power of two
    makes growing rare and shrinking exact, so a row that gets no update keeps its value. There is no `weight`
    parameter; after `backward` call `apply_gradients`, or `apply_update` with deltas of your own. Updates are
    rounded stochastically without bias. `generator` makes them repeatable; its state is yours to save.

    **Checkpoints** hold the master, the scale and the step count, so training resumes as if never interrupted
    (the sweep of a large table starts anew, with exact bounds).

    Args:
        num_embeddings: N.
        embedding_dim: D. Even to pack 4 bits, a multiple of 4 to pack 2.
        period: Training steps between two refreshes of a table's scale, >= 1.
        master_dtype: "float32" (dtype may make it float64) or "int8".
        sparse: Whether the gradient of the weight is sparse.
        _weight: Initial weights, shape (N, D); a float32 master shares them. Default: uniform in
            +-sqrt(1 / N), as DLRM.
        device: Where to put the table.
        generator: Randomness of initial weights and of stochastic rounding; None is torch's global generator.
        **options: Those of every bag of quantised rows: see `Bag`. The padding row is never updated, and zero at the
            start; `dtype` is also that of a float master, and unless given that of `_weight`.

    Raises:
        ValueError: An option is not in its set, `period` < 1, or the weights have the wrong shape or are not
            finite.

    Example:
        >>> bag = QuantizedEmbeddingBag(10, 4, bits=4)
        >>> bag(torch.tensor([[1, 2], [3, 3]])).shape
        torch.Size([2, 4])

    Source: DQRM section 3; differs as the module's first lines say. Master in int8: ALPT.
    """

    weight: nn.Parameter | None
    master: Tensor | None
    exponent: Tensor | None
    num_updates: Tensor
    num_steps: Tensor
    _powers: Tensor | None

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        *,
        period: int = 200,
        master_dtype: MasterDtype = "float32",
        sparse: bool = True,
        _weight: Tensor | None = None,
        device: torch.device | str | None = None,
        generator: torch.Generator | None = None,
        **options: Unpack[BagOptions],
    ) -> None:
        if _weight is not None and options.get("dtype") is None:
            options["dtype"] = _weight.dtype
        super().__init__(num_embeddings, embedding_dim, **options)
        check_choice("master_dtype", master_dtype, ("float32", "int8"))
        if period < 1:
            raise ValueError(f"period: expected at least 1 step, found {period}; 200 costs next to nothing")
        if _weight is not None:
            check_table(_weight, (num_embeddings, embedding_dim))
        self.period = period
        self.master_dtype = master_dtype
        self.sparse = sparse
        self.generator = generator
        self._steps_taken = 0
        self._gradients: list[tuple[Tensor, Tensor]] = []
        self._tracker: AbsMaxTracker | None = None
        self._tracked_address = 0
        self.register_buffer("num_steps", torch.zeros((), dtype=torch.int64))
        self._create_master(_weight, device)
        if self.scale_per == "table":
            self.register_buffer("scale", torch.ones((), dtype=torch.float32, device=device))
            self.refresh_scale()

    def _create_master(self, weight: Tensor | None, device: torch.device | str | None) -> None:
        n, d = self.num_embeddings, self.embedding_dim
        is_int8 = self.master_dtype == "int8"
        self.register_parameter("weight", None)
        self.register_buffer("master", torch.zeros(n, d, dtype=torch.int8, device=device) if is_int8 else None)
        self.register_buffer(
            "exponent",
            torch.full((n,), SMALLEST_EXPONENT, dtype=torch.int8, device=device) if is_int8 else None,
        )
        self.register_buffer("num_updates", torch.zeros((), dtype=torch.int64, device=device) if is_int8 else None)
        powers = torch.tensor([2.0**e for e in range(SMALLEST_EXPONENT, LARGEST_EXPONENT + 1)], device=device)
        self.register_buffer("_powers", powers if is_int8 else None, persistent=False)
        if not is_int8:
            if weight is None:
                weight = self._initial_rows(n, device)
                if self.padding_idx is not None:
                    weight[self.padding_idx] = 0
            is_shared = isinstance(weight, nn.Parameter) and weight.dtype == self.dtype
            self.weight = cast(nn.Parameter, weight) if is_shared else nn.Parameter(weight.to(device, self.dtype))
            return
        for part in row_chunks(n):
            size = part.stop - part.start
            values = self._initial_rows(size, device) if weight is None else weight[part].to(device, self.dtype)
            self._write_master(part, values.detach(), is_random=False)
        if self.padding_idx is not None and weight is None:
            cast(Tensor, self.master)[self.padding_idx] = 0

    def _initial_rows(self, num_rows: int, device: torch.device | str | None) -> Tensor:
        bound = self.num_embeddings**-0.5
        on = self.generator.device if self.generator is not None else device
        rows = torch.empty(num_rows, self.embedding_dim, dtype=self.dtype, device=on)
        return rows.uniform_(-bound, bound, generator=self.generator).to(device or rows.device)

    # -- forward ------------------------------------------------------------------------------------------

    def _before_lookup(self, rows: Tensor) -> None:
        if not self.training:
            return
        if self.scale_per == "table":
            tracker = self._current_tracker()
            version = self._weight_version()
            if self._steps_taken % self.period == 0:
                self._set_scale(tracker.maximum(self.master_rows, version))
            # an int8 master is only changed by `apply_update`, which notes its rows itself
            if self.weight is not None and tracker.note(rows, version):
                tracker.read_noted(self.master_rows, version)
        self._steps_taken += 1

    def _rows_on_grid(self, rows: Tensor, *, is_unique: bool) -> Tensor:
        if self.weight is not None:
            scale, padding = self._table_scale(), self.padding_idx
            table = _GatherOnGrid.apply(self.weight, rows, scale, self.bits, self.sparse, is_unique, padding)
            return cast(Tensor, table)
        values = self.master_rows(rows)
        table = on_grid(values, self._scale_of(values), self.bits)
        if self.training and torch.is_grad_enabled():
            table.requires_grad_().register_hook(partial(self._keep_gradient, rows))
        return table

    def _table_scale(self) -> Tensor | None:
        """Give the frozen scale of the table, or None where each row has its own."""
        return self.scale.to(torch.float32) if self.scale_per == "table" else None

    def _scale_of(self, values: Tensor) -> Tensor:
        scale = self._table_scale()
        return row_scales(values, self.bits).unsqueeze(1) if scale is None else scale

    # -- scale --------------------------------------------------------------------------------------------

    def refresh_scale(self) -> None:
        """Set the table's scale from all rows, now.

        For weights that were changed by hand. Reads the whole table; training refreshes the scale by itself.
        Without effect where each row has its own scale, which is always exact.

        Raises:
            ValueError: A weight is NaN or infinite.
        """
        self._tracker = None
        if self.scale_per == "table":
            self._set_scale(AbsMaxTracker(self.num_embeddings, self.num_embeddings).maximum(self.master_rows))

    def _set_scale(self, abs_max: Tensor) -> None:
        self.scale.copy_(scale_for(abs_max, self.bits))

    def _current_tracker(self) -> AbsMaxTracker:
        table = self._table()
        if self._tracker is None or self._tracked_address != table.data_ptr():
            is_read_whole = self.weight is not None and not self.sparse
            rows = self.num_embeddings if is_read_whole else SWEEP_ROWS_PER_STEP * self.period
            self._tracker = AbsMaxTracker(self.num_embeddings, rows)
            self._tracked_address = table.data_ptr()
        return self._tracker

    def _weight_version(self) -> int:
        return 0 if self.weight is None else self.weight._version

    # -- master -------------------------------------------------------------------------------------------

    def _table(self) -> Tensor:
        return cast(Tensor, self.weight if self.weight is not None else self.master)

    def master_rows(self, rows: Tensor | slice = slice(None)) -> Tensor:
        """Read rows of the master, not rounded to the grid of `bits`.

        Args:
            rows: Row numbers, shape (U,), integer; or a slice. Default: all rows.

        Returns:
            Shape (U, D), the module's dtype, without gradient. A view of a float master if `rows` is a slice.
        """
        if self.weight is not None:
            weight = self.weight.detach()
            return weight[rows] if isinstance(rows, slice) else weight.index_select(0, rows)
        master, exponent = cast(Tensor, self.master), cast(Tensor, self.exponent)
        q, e = (t[rows] if isinstance(rows, slice) else t.index_select(0, rows) for t in (master, exponent))
        return q.to(self.dtype).mul_(self._power(e))

    def _power(self, exponent: Tensor) -> Tensor:
        """2^exponent, exactly. Shape (U, 1)."""
        return cast(Tensor, self._powers)[exponent.to(torch.int64) - SMALLEST_EXPONENT].unsqueeze(1)

    def _write_master(self, rows: Tensor | slice, values: Tensor, *, is_random: bool) -> None:
        """Fit an exponent to each row and round the row to it. Rows must be unique."""
        abs_max = torch.maximum(values.amax(1), -values.amin(1))
        mantissa, exponent = torch.frexp(abs_max)
        # 127 * 2^e = 127/128 * 2^(e+7) is the largest value of exponent e
        exponent = torch.where(mantissa <= 127 / 128, exponent - 7, exponent - 6)
        exponent = exponent.masked_fill(abs_max == 0, SMALLEST_EXPONENT)
        exponent = exponent.clamp(SMALLEST_EXPONENT, LARGEST_EXPONENT).to(torch.int8)
        levels = values / self._power(exponent)
        levels = stochastic_round(levels, generator=self.generator) if is_random else levels.round_()
        cast(Tensor, self.master)[rows] = levels.clamp_(-127, 127).to(torch.int8)
        cast(Tensor, self.exponent)[rows] = exponent

    # -- update -------------------------------------------------------------------------------------------

    def _keep_gradient(self, rows: Tensor, grad: Tensor) -> None:
        self._gradients.append((rows, grad))

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget gradients, those that wait for `apply_gradients` included.

        Args:
            set_to_none: As in `nn.Module.zero_grad`.
        """
        self._gradients.clear()
        super().zero_grad(set_to_none)

    @torch.no_grad()
    def apply_update(self, rows: Tensor, delta: Tensor) -> None:
        """Add deltas to rows of the master, with stochastic rounding if it is int8.

        Deltas of a row given more than once are summed first. The padding row is left alone.

        Args:
            rows: Row numbers, shape (U,), integer.
            delta: What to add. Shape (U, D), float.

        Raises:
            IndexError: A row is outside [0, num_embeddings).
            ValueError: Shapes do not fit or a delta is NaN or infinite; the master is unchanged then.
        """
        check_rows(rows, self.num_embeddings)
        if rows.ndim != 1 or delta.shape != (rows.shape[0], self.embedding_dim):
            raise ValueError(
                f"apply_update: expected rows (U,) and delta (U, {self.embedding_dim}), found "
                f"{tuple(rows.shape)} and {tuple(delta.shape)}; give one delta per row"
            )
        check_finite(delta, "delta")
        rows, inverse = unique_rows(rows.to(torch.int64), self.num_embeddings)
        delta = sum_duplicates(delta, inverse, rows.shape[0])
        if self.padding_idx is not None:
            keep = rows != self.padding_idx
            rows, delta = rows[keep], delta[keep]
        self._add_to_master(rows, delta)

    def _add_to_master(self, rows: Tensor, delta: Tensor) -> None:
        if not rows.numel():
            return
        if self.weight is not None:
            self.weight.index_add_(0, rows, delta.to(self.dtype))
        else:
            self._write_master(rows, self.master_rows(rows).add_(delta), is_random=True)
        if self.scale_per == "table":
            tracker = self._current_tracker()
            if tracker.note(rows):
                tracker.read_noted(self.master_rows, self._weight_version())

    @torch.no_grad()
    def apply_gradients(self, *, lr: float, rule: str = "sgd", eps: float = 1e-8) -> None:
        """Update an int8 master from the gradients of the backward passes since the last call.

        Gradients of a row looked up in several forwards are summed first. What a rule keeps of the rows is float32 and
        is there from its first use on.

        Args:
            lr: Learning rate.
            rule: A name in `slipstream.embedding.rules.OPTIMIZERS`, where the formulas stand; the same at every call.
            eps: Small number in the denominator of Adagrad and Adam.

        Raises:
            ValueError: The master is not int8, the rule is unknown, or a gradient is NaN or infinite; the
                master is unchanged then.
        """
        check_choice("rule", rule, OPTIMIZERS.names())
        if self.weight is not None:
            raise ValueError(
                "apply_gradients: expected an int8 master, found a float one; use a torch optimizer on "
                "parameters(), or apply_update"
            )
        if not self._gradients:
            return
        require_one_process("a QuantizedEmbeddingBag with an int8 master", remedy="use a float32 master with DDP")
        looked_up, grads = (torch.cat(parts) for parts in zip(*self._gradients, strict=True))
        rows, inverse = unique_rows(looked_up, self.num_embeddings)
        grad = sum_duplicates(grads, inverse, rows.shape[0])
        self._gradients.clear()
        check_finite(grad, "gradient")
        optimizer = OPTIMIZERS.get(rule)(eps=eps)
        state = self._state_of(optimizer)
        self.num_updates += 1
        directions = optimizer.row_directions(
            state, rows, grad.float() if state else grad, num_steps=self.num_updates.double()
        )
        self._add_to_master(rows, directions.to(grad.dtype) * -lr)

    def _state_of(self, optimizer: RowOptimizer) -> list[Tensor]:
        """Say what a rule keeps, made when it is first asked for."""
        shapes = optimizer.state_shapes((self.num_embeddings, self.embedding_dim))
        for name, shape in shapes.items():
            key = _STATE + name
            if key not in self._buffers:
                self.register_buffer(key, torch.zeros(shape, dtype=torch.float32, device=self._table().device))
            elif self.get_buffer(key).shape != shape:
                raise ValueError("expected the rule of the calls before, found another: keep to one")
        return [self.get_buffer(_STATE + name) for name in shapes]

    # -- storage ------------------------------------------------------------------------------------------

    def memory_bytes(self) -> int:
        """Count the bytes that training keeps for the table, optimizer state of `apply_gradients` included.

        Returns:
            Bytes; gradients and the state of a torch optimizer are not in it.
        """
        state = [buffer for name, buffer in self._buffers.items() if name.startswith(_STATE)]
        kept = (self.weight, self.master, self.exponent, *state, getattr(self, "scale", None))
        return sum(t.numel() * t.element_size() for t in kept if t is not None)

    def pack(self) -> "PackedEmbeddingBag":
        """Keep only the integers, with the scale evaluation uses now.

        Returns:
            A bag on the same device whose outputs equal those of this one in evaluation, to the bit.

        Raises:
            ValueError: `embedding_dim` does not fill whole bytes at these bits, or a weight is not finite.
        """
        size, device = (self.num_embeddings, self.embedding_dim), self._table().device
        packed = PackedEmbeddingBag(*size, device=device, **self.options())
        for part in row_chunks(self.num_embeddings):
            packed.write_rows(part, self.master_rows(part), self._table_scale())
        return packed

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        self.num_steps.fill_(self._steps_taken)
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        for key, value in state_dict.items():  # what a rule keeps is there from its first use on only
            name = key.removeprefix(prefix)
            if key.startswith(prefix + _STATE) and name not in self._buffers and self.weight is None:
                self.register_buffer(name, torch.zeros_like(value, device=self._table().device))
        super()._load_from_state_dict(state_dict, prefix, *args)
        self._steps_taken = int(self.num_steps)
        self._tracker = None
        if self.scale_per == "table" and prefix + "scale" not in state_dict:
            self.refresh_scale()


class _GatherOnGrid(torch.autograd.Function):
    """Gather rows and round them; the gradient goes to the rows of the master as it came."""

    @staticmethod
    def forward(
        ctx: Any,
        weight: Tensor,
        rows: Tensor,
        scale: Tensor | None,
        bits: int,
        sparse: bool,
        is_unique: bool,
        padding_idx: int | None,
    ) -> Tensor:
        ctx.save_for_backward(rows)
        ctx.shape, ctx.sparse, ctx.is_unique, ctx.padding_idx = weight.shape, sparse, is_unique, padding_idx
        values = weight.index_select(0, rows)
        return on_grid(values, row_scales(values, bits).unsqueeze(1) if scale is None else scale, bits)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None, None, None]:
        (rows,) = ctx.saved_tensors
        # bags of one row come here only without padding
        if ctx.is_unique and ctx.padding_idx is not None and position_of(rows, ctx.padding_idx) is not None:
            keep = rows != ctx.padding_idx
            rows, grad = rows[keep], grad[keep]
        if ctx.sparse:
            gradient = torch.sparse_coo_tensor(
                rows.unsqueeze(0), grad, ctx.shape, is_coalesced=ctx.is_unique, check_invariants=False
            )
        else:
            gradient = grad.new_zeros(ctx.shape).index_add_(0, rows, grad)
        return gradient, None, None, None, None, None, None
