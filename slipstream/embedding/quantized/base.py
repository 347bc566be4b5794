"""What bags of quantised rows share: the call of `nn.EmbeddingBag`, its checks, deduplication and pooling.

Shape suffixes: N rows of a table, D embedding_dim, B bags, L lookups, U unique rows among them.
"""

from collections.abc import Iterator
from typing import Any, Literal, TypedDict, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from slipstream.embedding.duplicates import sum_duplicates
from slipstream.embedding.quantized.abs_max import CHUNK_ROWS
from slipstream.embedding.quantized.numbers import check_bits, check_choice, check_finite, float_dtype
from slipstream.schema import TableScale

Mode = Literal["sum", "mean", "max"]

MASK_ROWS_PER_LOOKUP = 4
"""Up to this many rows per lookup a bitmap of the table finds the unique rows faster than a sort."""


class LookupOptions(TypedDict, total=False):
    """How a bag of quantised rows looks up."""

    mode: Mode
    padding_idx: int | None
    include_last_offset: bool
    dtype: torch.dtype | None


class BagOptions(LookupOptions, total=False):
    """What every bag of quantised rows takes by name: the grid, and how to look up."""

    bits: int
    scale_per: TableScale


class Bag(nn.Module):
    """What a training bag and a packed bag share: arguments, checks, deduplication and pooling.

    Args:
        num_embeddings: N.
        embedding_dim: D.
        bits: 16, 8, 4 or 2.
        scale_per: One scale per "table" or per "row".
        mode: "sum", "mean" or "max". The default is "sum", that of nn.EmbeddingBag is "mean".
        padding_idx: Row whose lookups count for nothing.
        include_last_offset: Whether offsets end with L.
        dtype: float32 or float64, of the output. Default: torch's.

    Raises:
        ValueError: An option is not in its set.
    """

    scale: Tensor

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
    ) -> None:
        super().__init__()
        check_bits(bits)
        check_choice("scale_per", scale_per, ("table", "row"))
        check_choice("mode", mode, ("sum", "mean", "max"))
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
        self.dtype = float_dtype(dtype)

    def options(self) -> BagOptions:
        """Give the options that a bag with the same lookups is made with."""
        return {
            "bits": self.bits,
            "scale_per": self.scale_per,
            "mode": self.mode,
            "padding_idx": self.padding_idx,
            "include_last_offset": self.include_last_offset,
            "dtype": self.dtype,
        }

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
        rows, inverse = unique_rows(values, self.num_embeddings)
        self._before_lookup(rows)
        table = self._rows_on_grid(rows, is_unique=True)
        padding = None if self.padding_idx is None else position_of(rows, self.padding_idx)
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
        grad_table = sum_duplicates(per_lookup, inverse, table.shape[0])
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
    """Give the one call that pools, in training and packed alike, so that both give the same bits."""
    return F.embedding_bag(
        inverse,
        table,
        offsets,
        mode=mode,
        per_sample_weights=weights,
        include_last_offset=include_last_offset,
        padding_idx=padding,
    )


def unique_rows(values: Tensor, num_embeddings: int) -> tuple[Tensor, Tensor]:
    """Give unique rows, ascending, and the position of each value among them; the work does not grow with N."""
    if num_embeddings > MASK_ROWS_PER_LOOKUP * values.numel():
        rows, inverse = torch.unique(values, return_inverse=True)
        return rows, inverse
    seen = torch.zeros(num_embeddings, dtype=torch.bool, device=values.device)
    seen[values] = True
    return seen.nonzero().flatten(), (torch.cumsum(seen, 0) - 1).index_select(0, values)


def position_of(rows: Tensor, row: int) -> int | None:
    """Where `row` stands in ascending `rows`."""
    position = int(torch.searchsorted(rows, row))
    return position if position < rows.shape[0] and int(rows[position]) == row else None


def _check_lookup(
    bag: Bag, values: Tensor, offsets: Tensor | None, weights: Tensor | None
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
    check_rows(values, bag.num_embeddings)
    return values.flatten().to(torch.int64), offsets, weights, is_single and values.numel() > 0


def _check_sample_weights(bag: Bag, values: Tensor, weights: Tensor) -> None:
    if bag.mode != "sum":
        raise ValueError(f"per_sample_weights: expected mode 'sum', found {bag.mode!r}; construct the bag with it")
    if weights.shape != values.shape or weights.dtype != bag.dtype:
        raise ValueError(
            f"per_sample_weights: expected shape {tuple(values.shape)} and {bag.dtype}, found "
            f"{tuple(weights.shape)} and {weights.dtype}; give one weight per lookup, in the dtype of the bag"
        )


def _check_offsets(bag: Bag, offsets: Tensor | None, num_lookups: int) -> tuple[Tensor, bool]:
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


def check_rows(rows: Tensor, num_embeddings: int) -> None:
    """Refuse row numbers outside the table."""
    if not rows.numel():
        return
    low, high = (int(t) for t in rows.aminmax())
    if low < 0 or high >= num_embeddings:
        raise IndexError(
            f"rows: expected within [0, {num_embeddings}), found {low if low < 0 else high}; "
            "map unknown values to row 0, or make the table larger"
        )


def check_table(weight: Tensor, shape: tuple[int, ...]) -> None:
    """Refuse weights of the wrong shape or dtype, and weights that are not finite."""
    if weight.ndim != 2 or tuple(weight.shape) != shape or not weight.numel():
        raise ValueError(
            f"weights: expected shape {shape if len(shape) == 2 else '(N, D)'}, found {tuple(weight.shape)}; "
            "give one row per embedding"
        )
    float_dtype(weight.dtype)
    for part in row_chunks(weight.shape[0]):
        check_finite(weight.detach()[part], "weights")


def row_chunks(num_rows: int) -> Iterator[slice]:
    """Cut the rows of a table into parts whose temporaries stay small."""
    for start in range(0, num_rows, CHUNK_ROWS):
        yield slice(start, min(start + CHUNK_ROWS, num_rows))
