"""Embedding bags and linear layers that are trained on the few bits they will be served with.

A master copy learns; every forward sees it rounded to a grid of 16, 8, 4 or 2 bits, and gradients pass
straight through the rounding. `pack` then keeps only the integers and gives the same outputs to the bit.

What differs from the published DQRM code, on purpose: **rows are rounded before they are pooled**, so a bag
of many rows means the same in training and when packed; only looked-up rows are rounded, each once; the scale
follows the table every `period` steps at a cost that does not grow with the table; per-row scales can be
trained; an int8 master with stochastic rounding saves training memory, not only storage; packed files exist
and load.

Shapes: **N** rows of a table, **D** embedding_dim, **B** bags, **L** lookups, **U** unique rows among them.

Source: DQRM (Zhou et al. 2024) for the scheme; ALPT (Li et al. 2022) for training in low precision.
"""

from collections.abc import Collection, Iterator, Mapping
from functools import partial
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from slipstream.embedding.quantization import (
    CHUNK_ROWS,
    AbsMaxTracker,
    check_bits,
    check_divides,
    check_finite,
    dequantize,
    fake_quantize_rows,
    on_grid,
    pack,
    quantize,
    row_scales,
    scale_for,
    stochastic_round,
    table_scale,
    unpack,
    values_per_byte,
)

Mode = Literal["sum", "mean", "max"]
TableScale = Literal["table", "row"]
LinearScale = Literal["channel", "matrix"]
MasterDtype = Literal["float32", "int8"]
UpdateRule = Literal["sgd", "rowwise_adagrad"]

SWEEP_ROWS_PER_STEP = 1024
"""Rows re-read per training step, on average, for max|w|: half the lookups of a batch of 2048."""

MASK_ROWS_PER_LOOKUP = 4
"""Up to this many rows per lookup a bitmap of the table finds the unique rows faster than a sort."""

SMALLEST_EXPONENT, LARGEST_EXPONENT = -126, 120
"""Range of the power of two that scales a row of an int8 master."""


class _Bag(nn.Module):
    """What a training bag and a packed bag share: arguments, checks, deduplication and pooling."""

    scale: Tensor

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        *,
        bits: int,
        scale_per: TableScale,
        mode: Mode,
        padding_idx: int | None,
        include_last_offset: bool,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        check_bits(bits)
        _check_choice("scale_per", scale_per, ("table", "row"))
        _check_choice("mode", mode, ("sum", "mean", "max"))
        if num_embeddings < 1 or embedding_dim < 1:
            raise ValueError(
                f"table: expected at least one row and one column, found {num_embeddings} x {embedding_dim}; "
                "keep row 0 for unknown values even if a feature is empty"
            )
        if padding_idx is not None and not -num_embeddings <= padding_idx < num_embeddings:
            raise ValueError(
                f"padding_idx: expected within [{-num_embeddings}, {num_embeddings}), found {padding_idx}; "
                "use None for no padding"
            )
        self.num_embeddings = num_embeddings
        self.embedding_dim = embedding_dim
        self.bits = bits
        self.scale_per = scale_per
        self.mode = mode
        self.padding_idx = None if padding_idx is None else padding_idx % num_embeddings
        self.include_last_offset = include_last_offset
        self.dtype = _float_dtype(dtype)

    def _rows_on_grid(self, rows: Tensor, *, is_unique: bool) -> Tensor:
        """Values that the forward sees for rows. Shape (U, D)."""
        raise NotImplementedError

    def _before_lookup(self, rows: Tensor) -> None:
        """Do what a step needs before its rows are read."""

    # the name is that of nn.EmbeddingBag
    def forward(
        self,
        input: Tensor,  # noqa: A002
        offsets: Tensor | None = None,
        per_sample_weights: Tensor | None = None,
    ) -> Tensor:
        """Look up, dequantise and pool. The call of `nn.EmbeddingBag`.

        Args:
            input: Row numbers, int32 or int64. Shape (B, n) for bags of equal size, or (L,) with `offsets`.
            offsets: Start of each bag, shape (B,), or (B + 1,) ending in L with `include_last_offset`. The
                first is 0 and none is smaller than the one before. Empty bags are allowed and give zeros.
            per_sample_weights: Factor of each lookup, shape of `input`; mode "sum" only.

        Returns:
            Pooled rows, shape (B, D).

        Raises:
            IndexError: A row is outside [0, num_embeddings).
            ValueError: Offsets, weights or shapes do not fit, or a looked-up weight is not finite.
        """
        values, offsets, weights, is_single = _check_lookup(self, input, offsets, per_sample_weights)
        if is_single and (self.padding_idx is None or not bool((values == self.padding_idx).any())):
            # one row per bag, as in click logs: nothing to pool, and to find duplicates would cost more than
            # to round them twice
            self._before_lookup(values)
            table = self._rows_on_grid(values, is_unique=False)
            return table if weights is None else table * weights.unsqueeze(1)
        rows, inverse = _unique_rows(values, self.num_embeddings)
        self._before_lookup(rows)
        table = self._rows_on_grid(rows, is_unique=True)
        padding = None if self.padding_idx is None else _position(rows, self.padding_idx)
        include_last = self.include_last_offset and input.ndim == 1
        if self.mode == "max" or not torch.is_grad_enabled():
            return _pooled(table, inverse, offsets, weights, self.mode, include_last, padding)
        return cast(Tensor, _Pool.apply(table, inverse, offsets, weights, self.mode, include_last, padding))

    def extra_repr(self) -> str:
        """Describe the bag in one line.

        Returns:
            Size, bits, scale and mode.
        """
        size = f"{self.num_embeddings}, {self.embedding_dim}"
        return f"{size}, bits={self.bits}, scale_per={self.scale_per}, mode={self.mode}"


class QuantizedEmbeddingBag(_Bag):
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
        bits: 16, 8, 4 or 2.
        scale_per: One scale per "table" or per "row".
        period: Training steps between two refreshes of a table's scale, >= 1.
        master_dtype: "float32" (dtype may make it float64) or "int8".
        mode: "sum", "mean" or "max". The default is "sum", that of nn.EmbeddingBag is "mean".
        padding_idx: Row whose lookups count for nothing and which is never updated; zero at the start.
        include_last_offset: Whether offsets end with L.
        sparse: Whether the gradient of the weight is sparse.
        _weight: Initial weights, shape (N, D); a float32 master shares them. Default: uniform in
            +-sqrt(1 / N), as DLRM.
        dtype: float32 or float64, of the output and of a float master. Default: that of `_weight`, else
            torch's.
        device: Where to put the table.
        generator: Randomness of initial weights and of stochastic rounding; None is torch's global generator.

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
    adagrad_sum: Tensor | None
    num_steps: Tensor
    _powers: Tensor | None

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        *,
        bits: int = 4,
        scale_per: TableScale = "table",
        period: int = 200,
        master_dtype: MasterDtype = "float32",
        mode: Mode = "sum",
        padding_idx: int | None = None,
        include_last_offset: bool = False,
        sparse: bool = True,
        _weight: Tensor | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(
            num_embeddings,
            embedding_dim,
            bits=bits,
            scale_per=scale_per,
            mode=mode,
            padding_idx=padding_idx,
            include_last_offset=include_last_offset,
            dtype=dtype if dtype is not None or _weight is None else _weight.dtype,
        )
        _check_choice("master_dtype", master_dtype, ("float32", "int8"))
        if period < 1:
            raise ValueError(f"period: expected at least 1 step, found {period}; 200 costs next to nothing")
        if _weight is not None:
            _check_table(_weight, (num_embeddings, embedding_dim))
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
        if scale_per == "table":
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
        self.register_buffer("adagrad_sum", None)
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
        for part in _chunks(n):
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
                tracker.settle(self.master_rows, version)
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
        """The frozen scale of the table, or None where each row has its own."""
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
        _check_rows(rows, self.num_embeddings)
        if rows.ndim != 1 or delta.shape != (rows.shape[0], self.embedding_dim):
            raise ValueError(
                f"apply_update: expected rows (U,) and delta (U, {self.embedding_dim}), found "
                f"{tuple(rows.shape)} and {tuple(delta.shape)}; give one delta per row"
            )
        check_finite(delta, "delta")
        rows, inverse = _unique_rows(rows.to(torch.int64), self.num_embeddings)
        delta = delta.new_zeros(rows.shape[0], self.embedding_dim).index_add_(0, inverse, delta)
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
                tracker.settle(self.master_rows, self._weight_version())

    @torch.no_grad()
    def apply_gradients(self, *, lr: float, rule: UpdateRule = "sgd", eps: float = 1e-8) -> None:
        """Update an int8 master from the gradients of the backward passes since the last call.

        Gradients of a row looked up in several forwards are summed first. Row-wise Adagrad keeps one float32
        sum per row: sum += mean_j g_j^2, then w -= lr * g / (sqrt(sum) + eps); it adds 4 bytes per row at its
        first use.

        Args:
            lr: Learning rate.
            rule: "sgd" or "rowwise_adagrad".
            eps: Small number in Adagrad's denominator.

        Raises:
            ValueError: The master is not int8, the rule is unknown, or a gradient is NaN or infinite; the
                master is unchanged then.

        Source: row-wise Adagrad as in FBGEMM's fused optimizers.
        """
        _check_choice("rule", rule, ("sgd", "rowwise_adagrad"))
        if self.weight is not None:
            raise ValueError(
                "apply_gradients: expected an int8 master, found a float one; use a torch optimizer on "
                "parameters(), or apply_update"
            )
        if not self._gradients:
            return
        looked_up, grads = (torch.cat(parts) for parts in zip(*self._gradients, strict=True))
        rows, inverse = _unique_rows(looked_up, self.num_embeddings)
        grad = grads.new_zeros(rows.shape[0], self.embedding_dim).index_add_(0, inverse, grads)
        self._gradients.clear()
        check_finite(grad, "gradient")
        if rule == "sgd":
            delta = grad * -lr
        else:
            if self.adagrad_sum is None:
                self.adagrad_sum = torch.zeros(self.num_embeddings, dtype=torch.float32, device=grad.device)
            self.adagrad_sum.index_add_(0, rows, grad.square().mean(1).to(torch.float32))
            root = self.adagrad_sum.index_select(0, rows).sqrt_().add_(eps)
            delta = grad * (-lr / root).unsqueeze(1)
        self._add_to_master(rows, delta)

    # -- storage ------------------------------------------------------------------------------------------

    def memory_bytes(self) -> int:
        """Count the bytes that training keeps for the table, optimizer state of `apply_gradients` included.

        Returns:
            Bytes; gradients and the state of a torch optimizer are not in it.
        """
        kept = (self.weight, self.master, self.exponent, self.adagrad_sum, getattr(self, "scale", None))
        return sum(t.numel() * t.element_size() for t in kept if t is not None)

    def pack(self) -> "PackedEmbeddingBag":
        """Keep only the integers, with the scale evaluation uses now.

        Returns:
            A bag on the same device whose outputs equal those of this one in evaluation, to the bit.

        Raises:
            ValueError: `embedding_dim` does not fill whole bytes at these bits, or a weight is not finite.
        """
        packed = PackedEmbeddingBag(
            self.num_embeddings,
            self.embedding_dim,
            bits=self.bits,
            scale_per=self.scale_per,
            mode=self.mode,
            padding_idx=self.padding_idx,
            include_last_offset=self.include_last_offset,
            dtype=self.dtype,
            device=self._table().device,
        )
        for part in _chunks(self.num_embeddings):
            packed.write_rows(part, self.master_rows(part), self._table_scale())
        return packed

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        self.num_steps.fill_(self._steps_taken)
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        if self.adagrad_sum is None and prefix + "adagrad_sum" in state_dict and self.weight is None:
            self.adagrad_sum = torch.zeros(self.num_embeddings, dtype=torch.float32, device=self._table().device)
        super()._load_from_state_dict(state_dict, prefix, *args)
        self._steps_taken = int(self.num_steps)
        self._tracker = None
        if self.scale_per == "table" and prefix + "scale" not in state_dict:
            self.refresh_scale()


class PackedEmbeddingBag(_Bag):
    """A table for inference, stored on the bits it has.

    `packed` takes exactly N * D * bits / 8 bytes (uint8 at 4 and 2 bits, int8, int16) and `scale` 4 bytes per
    table or per row. Only looked-up rows are unpacked. To load one, construct it with the same arguments and
    call `load_state_dict`, for instance on what `safetensors.torch.load_file` returned.

    Args:
        num_embeddings: N.
        embedding_dim: D. Even at 4 bits, a multiple of 4 at 2 bits.
        bits: 16, 8, 4 or 2.
        scale_per: "table" or "row".
        mode: "sum", "mean" or "max".
        padding_idx: Row whose lookups count for nothing.
        include_last_offset: Whether offsets end with L.
        dtype: float32 or float64, of the output.
        device: Where to put the table.

    Raises:
        ValueError: An option is not in its set, or D does not fill whole bytes.
    """

    packed: Tensor

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        *,
        bits: int = 4,
        scale_per: TableScale = "table",
        mode: Mode = "sum",
        padding_idx: int | None = None,
        include_last_offset: bool = False,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(
            num_embeddings,
            embedding_dim,
            bits=bits,
            scale_per=scale_per,
            mode=mode,
            padding_idx=padding_idx,
            include_last_offset=include_last_offset,
            dtype=dtype,
        )
        check_divides(embedding_dim, bits)
        columns = embedding_dim // values_per_byte(bits)
        scales = (num_embeddings,) if scale_per == "row" else ()
        self.register_buffer("packed", torch.zeros(num_embeddings, columns, dtype=_storage_dtype(bits), device=device))
        self.register_buffer("scale", torch.ones(scales, dtype=torch.float32, device=device))

    @torch.no_grad()
    def write_rows(self, rows: slice, values: Tensor, table_scale: Tensor | None = None) -> None:
        """Quantise and store rows.

        Args:
            rows: Which rows.
            values: Their weights, shape (U, D), float.
            table_scale: Scale of the whole table, scalar; None computes a scale for each row.

        Raises:
            ValueError: A weight is not finite.
        """
        scale = row_scales(values, self.bits) if table_scale is None else table_scale
        self.packed[rows] = pack(quantize(values, scale, self.bits), self.bits)
        if self.scale_per == "row":
            self.scale[rows] = scale
        else:
            self.scale.copy_(scale)

    def _rows_on_grid(self, rows: Tensor, *, is_unique: bool) -> Tensor:
        scale = self.scale.to(torch.float32)
        scale = scale.index_select(0, rows) if self.scale_per == "row" else scale
        return dequantize(unpack(self.packed.index_select(0, rows), self.bits), scale, self.dtype)

    def memory_bytes(self) -> int:
        """Count the bytes of the integers and the scales.

        Returns:
            N * D * bits / 8 + 4 per table or per row.
        """
        return self.packed.numel() * self.packed.element_size() + self.scale.numel() * 4

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        _check_stored_dtype(state_dict, prefix, self.bits, args)
        super()._load_from_state_dict(state_dict, prefix, *args)


def quantize_table(
    weight: Tensor,
    bits: int,
    scale_per: TableScale = "row",
    *,
    mode: Mode = "sum",
    padding_idx: int | None = None,
    include_last_offset: bool = False,
) -> PackedEmbeddingBag:
    """Quantise a trained table after the fact, to compare with training on the grid.

    Args:
        weight: Shape (N, D), float32 or float64.
        bits: 16, 8, 4 or 2.
        scale_per: One exact scale per "table" or per "row".
        mode: "sum", "mean" or "max".
        padding_idx: Row whose lookups count for nothing.
        include_last_offset: Whether offsets end with L.

    Returns:
        A bag on the device of `weight`.

    Raises:
        ValueError: An option is not in its set, D does not fill whole bytes, or a weight is not finite.

    Source: post-training quantisation as in the DLRM reference (`--quantize-emb-with-bit`), but symmetric.
    """
    _check_table(weight, tuple(weight.shape))
    weight = weight.detach()
    packed = PackedEmbeddingBag(
        weight.shape[0],
        weight.shape[1],
        bits=bits,
        scale_per=scale_per,
        mode=mode,
        padding_idx=padding_idx,
        include_last_offset=include_last_offset,
        dtype=weight.dtype,
        device=weight.device,
    )
    scale = table_scale(weight, bits) if scale_per == "table" else None
    for part in _chunks(weight.shape[0]):
        packed.write_rows(part, weight[part], scale)
    return packed


class QuantizedLinear(nn.Linear):
    """An `nn.Linear` whose weight is rounded to the grid at every forward.

    One scale per output channel or for the whole matrix, exact at every call, in training and evaluation. The
    bias stays float: it is a vector, and rounding it gains nothing. Straight-through gradients reach the
    float weight, which any torch optimizer updates. NaN weights are not refused here (that would make a GPU
    wait at each step): they give NaN outputs, and `pack` refuses them.

    Args:
        in_features: Width of the input.
        out_features: Width of the output.
        bias: Whether to add a bias.
        bits: 16, 8, 4 or 2.
        scale_per: "channel" (one per output) or "matrix".
        device: Where to put the parameters.
        dtype: float32 or float64.

    Raises:
        ValueError: An option is not in its set.

    Source: DQRM section 3, the linear layers; its integer bias and activations are left out.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        bits: int = 4,
        scale_per: LinearScale = "channel",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_bits(bits)
        _check_choice("scale_per", scale_per, ("channel", "matrix"))
        super().__init__(in_features, out_features, bias, device=device, dtype=_float_dtype(dtype))
        self.bits = bits
        self.scale_per = scale_per

    @classmethod
    def from_linear(cls, linear: nn.Linear, *, bits: int = 4, scale_per: LinearScale = "channel") -> "QuantizedLinear":
        """Wrap the parameters of a linear layer, without copying them.

        Args:
            linear: The layer; its parameters are shared.
            bits: 16, 8, 4 or 2.
            scale_per: "channel" or "matrix".

        Returns:
            A layer in the same training mode.

        Raises:
            ValueError: An option is not in its set.
        """
        layer = cls(
            linear.in_features,
            linear.out_features,
            linear.bias is not None,
            bits=bits,
            scale_per=scale_per,
            device="meta",
            dtype=linear.weight.dtype,
        )
        layer.weight, layer.bias = linear.weight, linear.bias
        return layer.train(linear.training)

    def _scale(self) -> Tensor:
        weight = self.weight.detach()
        if self.scale_per == "channel":
            return scale_for(torch.maximum(weight.amax(1), -weight.amin(1)), self.bits)
        return scale_for(torch.maximum(weight.amax(), -weight.amin()), self.bits)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  (the name is that of nn.Linear)
        """Multiply with the rounded weight and add the bias.

        Args:
            input: Shape (..., in_features).

        Returns:
            Shape (..., out_features).
        """
        return F.linear(input, fake_quantize_rows(self.weight, self._scale(), self.bits), self.bias)

    def pack(self) -> "PackedLinear":
        """Keep only the integers.

        Returns:
            A layer with a copy of the bias, whose outputs equal those of this one to the bit.

        Raises:
            ValueError: A weight is not finite.
        """
        weight = self.weight.detach()
        check_finite(weight, "weights")
        packed = PackedLinear(
            self.in_features,
            self.out_features,
            self.bias is not None,
            bits=self.bits,
            scale_per=self.scale_per,
            device=weight.device,
            dtype=weight.dtype,
        )
        scale = self._scale()
        q = quantize(weight, scale, self.bits)
        packed.packed.copy_(pack(F.pad(q, (0, -self.in_features % values_per_byte(self.bits))), self.bits))
        packed.scale.copy_(scale)
        if packed.bias is not None:
            packed.bias.copy_(self.bias.detach())
        return packed

    def extra_repr(self) -> str:
        """Describe the layer in one line.

        Returns:
            The line of nn.Linear, bits and scale.
        """
        return f"{super().extra_repr()}, bits={self.bits}, scale_per={self.scale_per}"


class PackedLinear(nn.Module):
    """A linear layer for inference, its weight stored on the bits it has.

    The weight takes out_features * ceil(in_features * bits / 8) bytes: unlike a table's, the last byte of a
    row may be part empty, since 13 dense features are what they are. It is unpacked at every call, so this
    saves memory, not time.

    Args:
        in_features: Width of the input.
        out_features: Width of the output.
        bias: Whether there is a bias (float).
        bits: 16, 8, 4 or 2.
        scale_per: "channel" or "matrix".
        device: Where to put it.
        dtype: float32 or float64, of the output.

    Raises:
        ValueError: An option is not in its set.
    """

    packed: Tensor
    scale: Tensor
    bias: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        bits: int = 4,
        scale_per: LinearScale = "channel",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_bits(bits)
        _check_choice("scale_per", scale_per, ("channel", "matrix"))
        self.in_features = in_features
        self.out_features = out_features
        self.bits = bits
        self.dtype = _float_dtype(dtype)
        columns = -(-in_features // values_per_byte(bits))
        scales = (out_features,) if scale_per == "channel" else ()
        packed = torch.zeros(out_features, columns, dtype=_storage_dtype(bits), device=device)
        self.register_buffer("packed", packed)
        self.register_buffer("scale", torch.ones(scales, dtype=torch.float32, device=device))
        self.register_buffer("bias", torch.zeros(out_features, dtype=self.dtype, device=device) if bias else None)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  (the name is that of nn.Linear)
        """Unpack the weight, multiply and add the bias.

        Args:
            input: Shape (..., in_features).

        Returns:
            Shape (..., out_features).
        """
        q = unpack(self.packed, self.bits)[:, : self.in_features]
        return F.linear(input, dequantize(q, self.scale.to(torch.float32), self.dtype), self.bias)

    def memory_bytes(self) -> int:
        """Count the bytes of integers, scales and bias.

        Returns:
            Bytes.
        """
        return sum(t.numel() * t.element_size() for t in self.buffers())

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        _check_stored_dtype(state_dict, prefix, self.bits, args)
        super()._load_from_state_dict(state_dict, prefix, *args)


def quantize_linears(
    module: nn.Module,
    bits: int = 4,
    *,
    scale_per: LinearScale = "channel",
    skip: Collection[str] = (),
) -> list[str]:
    """Put a `QuantizedLinear` in the place of every `nn.Linear` inside a module.

    Parameters are shared, not copied, so an optimizer made before goes on working and state dicts keep their
    keys. Subclasses of `nn.Linear` are left alone: their owners rely on what they are. A layer that occurs
    twice in the module is replaced by one layer that occurs twice.

    Args:
        module: Changed in place.
        bits: 16, 8, 4 or 2.
        scale_per: "channel" or "matrix".
        skip: Names, as `named_modules` gives them, of layers to leave in float.

    Returns:
        Names of the layers that were replaced.

    Raises:
        ValueError: An option is not in its set, `module` is itself an `nn.Linear`, or a name in `skip` is not
            that of a linear layer inside it. Nothing is changed then.
    """
    check_bits(bits)
    _check_choice("scale_per", scale_per, ("channel", "matrix"))
    if type(module) is nn.Linear:
        raise ValueError(
            "quantize_linears: expected a module that contains nn.Linear layers, found an nn.Linear; "
            "use QuantizedLinear.from_linear"
        )
    found = {name: layer for name, layer in module.named_modules(remove_duplicate=False) if type(layer) is nn.Linear}
    unknown = sorted(set(skip) - set(found))
    if unknown:
        raise ValueError(f"skip: expected names of linear layers, {sorted(found)}, found {unknown}; fix the names")
    replaced: dict[nn.Linear, QuantizedLinear] = {}
    for name, linear in found.items():
        if name in skip:
            continue
        if linear not in replaced:
            replaced[linear] = QuantizedLinear.from_linear(linear, bits=bits, scale_per=scale_per)
        parent, _, attribute = name.rpartition(".")
        setattr(module.get_submodule(parent), attribute, replaced[linear])
    return [name for name in found if name not in skip]


# -- autograd -----------------------------------------------------------------------------------------------


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
        if ctx.is_unique and ctx.padding_idx is not None and _position(rows, ctx.padding_idx) is not None:
            keep = rows != ctx.padding_idx
            rows, grad = rows[keep], grad[keep]
        if ctx.sparse:
            gradient = torch.sparse_coo_tensor(
                rows.unsqueeze(0), grad, ctx.shape, is_coalesced=ctx.is_unique, check_invariants=False
            )
        else:
            gradient = grad.new_zeros(ctx.shape).index_add_(0, rows, grad)
        return gradient, None, None, None, None, None, None


class _Pool(torch.autograd.Function):
    """Sum or mean of the rows of each bag; the backward is several times faster than torch's own."""

    @staticmethod
    def forward(
        ctx: Any,
        table: Tensor,
        inverse: Tensor,
        offsets: Tensor,
        weights: Tensor | None,
        mode: Mode,
        include_last_offset: bool,
        padding: int | None,
    ) -> Tensor:
        ctx.save_for_backward(table, inverse, offsets, weights)
        ctx.mode, ctx.include_last_offset, ctx.padding = mode, include_last_offset, padding
        return _pooled(table, inverse, offsets, weights, mode, include_last_offset, padding)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, None, Tensor | None, None, None, None]:
        table, inverse, offsets, weights = ctx.saved_tensors
        num_lookups = inverse.shape[0]
        ends = offsets.new_full((1,), num_lookups)
        lengths = (offsets if ctx.include_last_offset else torch.cat([offsets, ends])).diff()
        bag = torch.repeat_interleave(lengths, output_size=num_lookups)
        counts_for = None if ctx.padding is None else inverse != ctx.padding
        if ctx.mode == "mean":
            if counts_for is not None:
                lengths = torch.zeros_like(lengths).index_add_(0, bag, counts_for.to(lengths.dtype))
            grad = grad / lengths.clamp(min=1).unsqueeze(1)
        per_lookup = grad.index_select(0, bag)
        grad_weights = None
        if weights is not None and ctx.needs_input_grad[3]:
            grad_weights = (per_lookup * table.index_select(0, inverse)).sum(1)
            grad_weights = grad_weights if counts_for is None else grad_weights * counts_for
        if not ctx.needs_input_grad[0]:
            return None, None, None, grad_weights, None, None, None
        if weights is not None:
            per_lookup = per_lookup * weights.unsqueeze(1)
        grad_table = torch.zeros_like(table).index_add_(0, inverse, per_lookup)
        if ctx.padding is not None:
            grad_table[ctx.padding] = 0
        return grad_table, None, None, grad_weights, None, None, None


def _pooled(
    table: Tensor,
    inverse: Tensor,
    offsets: Tensor,
    weights: Tensor | None,
    mode: Mode,
    include_last_offset: bool,
    padding: int | None,
) -> Tensor:
    """The one call that pools, in training and packed alike, so that both give the same bits."""
    return F.embedding_bag(
        inverse,
        table,
        offsets,
        mode=mode,
        per_sample_weights=weights,
        include_last_offset=include_last_offset,
        padding_idx=padding,
    )


# -- lookups ------------------------------------------------------------------------------------------------


def _unique_rows(values: Tensor, num_embeddings: int) -> tuple[Tensor, Tensor]:
    """Unique rows, ascending, and the position of each value among them; the work does not grow with N."""
    if num_embeddings > MASK_ROWS_PER_LOOKUP * values.numel():
        rows, inverse = torch.unique(values, return_inverse=True)
        return rows, inverse
    seen = torch.zeros(num_embeddings, dtype=torch.bool, device=values.device)
    seen[values] = True
    return seen.nonzero().flatten(), (torch.cumsum(seen, 0) - 1).index_select(0, values)


def _position(rows: Tensor, row: int) -> int | None:
    """Where `row` stands in ascending `rows`."""
    position = int(torch.searchsorted(rows, row))
    return position if position < rows.shape[0] and int(rows[position]) == row else None


def _check_lookup(
    bag: _Bag, values: Tensor, offsets: Tensor | None, weights: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None, bool]:
    """Bring both forms of a lookup to flat int64 values and offsets; say whether all bags hold one row."""
    if values.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"input: expected int32 or int64 rows, found {values.dtype}; cast the ids")
    if weights is not None:
        _check_sample_weights(bag, values, weights)
        weights = weights.flatten()
    if values.ndim == 2:
        if offsets is not None:
            raise ValueError("offsets: expected None for a 2-D input, found a tensor; its rows are the bags already")
        offsets = torch.arange(values.shape[0], device=values.device) * values.shape[1]
        is_single = values.shape[1] == 1
    elif values.ndim == 1:
        offsets, is_single = _check_offsets(bag, offsets, values.shape[0])
    else:
        raise ValueError(f"input: expected 1 or 2 dimensions, found {values.ndim}; flatten it and give offsets")
    _check_rows(values, bag.num_embeddings)
    return values.flatten().to(torch.int64), offsets, weights, is_single and values.numel() > 0


def _check_sample_weights(bag: _Bag, values: Tensor, weights: Tensor) -> None:
    if bag.mode != "sum":
        raise ValueError(f"per_sample_weights: expected mode 'sum', found {bag.mode!r}; construct the bag with it")
    if weights.shape != values.shape or weights.dtype != bag.dtype:
        raise ValueError(
            f"per_sample_weights: expected shape {tuple(values.shape)} and {bag.dtype}, found "
            f"{tuple(weights.shape)} and {weights.dtype}; give one weight per lookup, in the dtype of the bag"
        )


def _check_offsets(bag: _Bag, offsets: Tensor | None, num_lookups: int) -> tuple[Tensor, bool]:
    shape = "(B + 1,)" if bag.include_last_offset else "(B,)"
    if offsets is None or offsets.ndim != 1 or offsets.dtype not in (torch.int64, torch.int32):
        found = "None" if offsets is None else f"{tuple(offsets.shape)} {offsets.dtype}"
        raise ValueError(f"offsets: expected integers of shape {shape} for a 1-D input, found {found}; give bag starts")
    offsets = offsets.to(torch.int64)
    if not offsets.numel():
        if bag.include_last_offset or num_lookups:
            raise ValueError(f"offsets: expected shape {shape} starting with 0, found none; give bag starts")
        return offsets, False
    first, last = int(offsets[0]), int(offsets[-1])
    if first != 0:
        raise ValueError(f"offsets: expected the first to be 0, found {first}; offsets are starts, not lengths")
    if last > num_lookups or (bag.include_last_offset and last != num_lookups):
        most = "exactly" if bag.include_last_offset else "at most"
        raise ValueError(
            f"offsets: expected the last to be {most} the number of lookups, {num_lookups}, found {last}; "
            "see include_last_offset"
        )
    steps = offsets.diff()
    smallest = int(steps.min()) if steps.numel() else 1
    if smallest < 0:
        at = int((steps < 0).nonzero()[0])
        raise ValueError(
            f"offsets: expected ascending starts, found {offsets[at : at + 2].tolist()} at {at}; "
            "use the cumulative sum of the lengths"
        )
    # as many bags as lookups: each has one if no start is met twice and the last start is the last lookup
    num_bags = offsets.shape[0] - bag.include_last_offset
    last_start = num_lookups - 1 + bag.include_last_offset
    return offsets, num_bags == num_lookups and smallest == 1 and last == last_start


def _check_rows(rows: Tensor, num_embeddings: int) -> None:
    if not rows.numel():
        return
    low, high = (int(t) for t in rows.aminmax())
    if low < 0 or high >= num_embeddings:
        raise IndexError(
            f"rows: expected within [0, {num_embeddings}), found {low if low < 0 else high}; "
            "map unknown values to row 0, or make the table larger"
        )


def _check_table(weight: Tensor, shape: tuple[int, ...]) -> None:
    if weight.ndim != 2 or tuple(weight.shape) != shape or not weight.numel():
        raise ValueError(
            f"weights: expected shape {shape if len(shape) == 2 else '(N, D)'}, found {tuple(weight.shape)}; "
            "give one row per embedding"
        )
    _float_dtype(weight.dtype)
    for part in _chunks(weight.shape[0]):
        check_finite(weight.detach()[part], "weights")


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(
            f"{name}: expected one of {', '.join(choices)}, found {value!r}; use {choices[0]!r} if in doubt"
        )


def _check_stored_dtype(state_dict: Mapping[str, Any], prefix: str, bits: int, args: tuple[Any, ...]) -> None:
    """Report integers of another width, which torch would convert without a word."""
    stored = state_dict.get(prefix + "packed")
    if stored is not None and stored.dtype != _storage_dtype(bits):
        error_messages = args[-1]
        error_messages.append(
            f"{prefix}packed: expected {_storage_dtype(bits)} for {bits} bits, found {stored.dtype}; "
            "construct the module with the bits it was saved with"
        )


def _float_dtype(dtype: torch.dtype | None) -> torch.dtype:
    dtype = torch.get_default_dtype() if dtype is None else dtype
    if dtype not in (torch.float32, torch.float64):
        raise ValueError(f"dtype: expected float32 or float64, found {dtype}; the grid, not the dtype, sets the size")
    return dtype


def _storage_dtype(bits: int) -> torch.dtype:
    return {16: torch.int16, 8: torch.int8}.get(bits, torch.uint8)


def _chunks(num_rows: int) -> Iterator[slice]:
    """Cut the rows of a table into parts whose temporaries stay small."""
    for start in range(0, num_rows, CHUNK_ROWS):
        yield slice(start, min(start + CHUNK_ROWS, num_rows))
