"""Numbers on few bits: quantise, pack, round at random.

One symmetric uniform quantiser serves the whole project: with n = 2^(bits-1) - 1,

    scale = max|w| / n        q = clamp(round(w / scale), -n - 1, n)        w' = q * scale

Everything here is a pure function on tensors.

Shape suffixes: N rows of a table, D embedding_dim, U unique rows of a lookup.

Source: DQRM (Zhou et al., 2024), the quantiser of its released code; its article writes an asymmetric scale.
"""

from collections.abc import Mapping
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from slipstream.embedding.quantized.abs_max import abs_max_of_rows

Bits = Literal[16, 8, 4, 2]
BITS: tuple[int, ...] = get_args(Bits)

SMALLEST_ABS_MAX = 1e-8
"""Floor under max|w|, so that a table of zeros has a usable scale."""


def check_bits(bits: int) -> None:
    """Refuse a width the quantiser does not have.

    Args:
        bits: Bits per weight.

    Raises:
        ValueError: `bits` is not 16, 8, 4 or 2.
    """
    if bits not in BITS:
        raise ValueError(f"bits: expected one of 16, 8, 4, 2, found {bits!r}; use 8 or 4 if in doubt")


def check_finite(x: Tensor, name: str) -> None:
    """Refuse NaN and infinity, which have no place on a grid of integers.

    Args:
        x: Any float tensor.
        name: What to call it in the message.

    Raises:
        ValueError: `x` holds NaN or infinity; the message has the number and the first position.
    """
    finite = torch.isfinite(x)
    if not bool(finite.all()):
        bad = (~finite).nonzero()
        raise ValueError(
            f"{name}: expected finite values, found {bad.shape[0]} NaN or infinite, the first at "
            f"{tuple(bad[0].tolist())}; lower the learning rate or go back to the last good checkpoint"
        )


def check_divides(embedding_dim: int, bits: int) -> None:
    """Refuse a row width whose packed values would not fill whole bytes.

    Args:
        embedding_dim: Columns of the table.
        bits: 16, 8, 4 or 2.

    Raises:
        ValueError: The width is odd at 4 bits, or no multiple of 4 at 2 bits.
    """
    per_byte = values_per_byte(bits)
    if embedding_dim % per_byte:
        raise ValueError(
            f"embedding_dim: expected a multiple of {per_byte} to pack {bits} bits, found {embedding_dim}; "
            f"use {embedding_dim + -embedding_dim % per_byte} columns, or 8 bits"
        )


def values_per_byte(bits: int) -> int:
    """Count the packed values that share one byte: 2 at 4 bits, 4 at 2 bits, else 1.

    Args:
        bits: 16, 8, 4 or 2.

    Returns:
        Values per byte, 1 where a value takes a byte or more.
    """
    return max(1, 8 // bits)


def max_level(bits: int) -> int:
    """Give n = 2^(bits-1) - 1, the largest integer of the grid.

    Args:
        bits: 16, 8, 4 or 2.

    Returns:
        32767, 127, 7 or 1.

    Raises:
        ValueError: `bits` is not in the set.

    Example:
        >>> max_level(4)
        7
    """
    check_bits(bits)
    return (1 << (bits - 1)) - 1


def scale_for(abs_max: Tensor, bits: int) -> Tensor:
    """Turn max|w| into the step between two levels.

    Args:
        abs_max: Largest absolute weight, of a table or of each row. Any shape, float, >= 0.
        bits: 16, 8, 4 or 2.

    Returns:
        Scale of the same shape, float32, > 0.

    Raises:
        ValueError: `bits` is not in the set.
    """
    return (abs_max.clamp(min=SMALLEST_ABS_MAX) / max_level(bits)).to(torch.float32)


def row_scales(rows: Tensor, bits: int) -> Tensor:
    """Compute the exact scale of each row.

    Args:
        rows: Shape (U, D), float32 or float64.
        bits: 16, 8, 4 or 2.

    Returns:
        Shape (U,), float32.

    Raises:
        ValueError: A weight is NaN or infinite, or `bits` is not in the set.
    """
    abs_max = abs_max_of_rows(rows)
    if not bool(torch.isfinite(abs_max).all()):
        check_finite(rows, "weights")
    return scale_for(abs_max, bits)


def table_scale(table: Tensor, bits: int) -> Tensor:
    """Compute the exact scale of a whole table or matrix.

    Args:
        table: Any shape with at least one element, float32 or float64.
        bits: 16, 8, 4 or 2.

    Returns:
        Scalar tensor, float32.

    Raises:
        ValueError: A weight is NaN or infinite, or `bits` is not in the set.
    """
    abs_max = torch.maximum(table.amax(), -table.amin())
    if not bool(torch.isfinite(abs_max)):
        check_finite(table, "weights")
    return scale_for(abs_max, bits)


def quantize(x: Tensor, scale: Tensor | float, bits: int) -> Tensor:
    """Map weights to the nearest integers of the grid: clamp(round(x / scale), -n - 1, n).

    Ties round to even, as `torch.round` does. Values beyond the grid saturate.

    Args:
        x: Weights. Any shape, float32 or float64.
        scale: Step. A number, a scalar tensor, or one per row of `x` with shape (U,).
        bits: 16, 8, 4 or 2.

    Returns:
        Integers of the shape of `x`; int16 at 16 bits, else int8.

    Raises:
        ValueError: `bits` is not in the set, the shape of `scale` does not fit, or a weight is not finite.

    Example:
        >>> quantize(torch.tensor([0.26, -9.0]), 0.5, 4)
        tensor([ 1, -8], dtype=torch.int8)

    Source: DQRM's symmetric quantiser.
    """
    levels = _levels(x, _along_rows(scale, x), bits)
    if not bool(torch.isfinite(levels).all()):
        check_finite(x, "weights")
    return levels.to(torch.int16 if bits == 16 else torch.int8)


def dequantize(q: Tensor, scale: Tensor | float, dtype: torch.dtype = torch.float32) -> Tensor:
    """Map integers of the grid back to weights: q * scale.

    Args:
        q: Integers, any shape.
        scale: Step. A number, a scalar tensor, or one per row of `q` with shape (U,).
        dtype: float32 or float64.

    Returns:
        Weights of the shape of `q` and of `dtype`.

    Raises:
        ValueError: The shape of `scale` does not fit.
    """
    x = q.to(dtype)
    return x.mul_(_along_rows(scale, x))


def fake_quantize_rows(rows: Tensor, scale: Tensor | float, bits: int) -> Tensor:
    """Quantise and dequantise rows, and let gradients pass as if nothing had happened.

    For a trainer that gathers rows itself. The result equals `dequantize(quantize(rows))` to the bit. The
    straight-through gradient is the identity, also where a value saturates: there is no clipping mask.
    Nothing is copied to the host, so NaN is not refused but passed on, and the call can be captured in a CUDA
    graph.

    Args:
        rows: Shape (U, D), float32 or float64.
        scale: Step. A number, a scalar tensor, or one per row with shape (U,). Gets no gradient.
        bits: 16, 8, 4 or 2.

    Returns:
        Rows on the grid, same shape and dtype.

    Raises:
        ValueError: `bits` is not in the set or the shape of `scale` does not fit.

    Source: DQRM, Bengio et al. 2013 for the straight-through gradient.
    """
    return cast(Tensor, _StraightThrough.apply(rows, _along_rows(scale, rows), bits))


class _StraightThrough(torch.autograd.Function):
    """Fake quantisation forward, identity backward."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, scale: Tensor, bits: int) -> Tensor:
        return on_grid(rows, scale, bits)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad, None, None


def on_grid(x: Tensor, scale: Tensor, bits: int) -> Tensor:
    """Quantise and dequantise, without gradient and without checks.

    The kernel under every fake quantiser here.

    Args:
        x: Weights, any shape, float32 or float64.
        scale: Step, broadcastable to `x`.
        bits: 16, 8, 4 or 2.

    Returns:
        Weights on the grid, equal to the bit to those of `dequantize(quantize(x))`.
    """
    # the last addition turns -0.0, which an integer cannot hold, into 0.0
    return _levels(x, scale, bits).mul_(scale).add_(0.0)


def on_grids(x: Tensor, scale: Tensor, largest: Tensor) -> Tensor:
    """Do as `on_grid`, with bits that differ from row to row.

    Args:
        x: Weights, any shape, float32 or float64.
        scale: Step, broadcastable to `x`.
        largest: n = 2^(bits-1) - 1, likewise, of the dtype of `x`.

    Returns:
        Weights on the grid, equal to the bit to those of `on_grid` with the bits of each.
    """
    return torch.div(x, scale).round_().clamp_(-largest - 1, largest).mul_(scale).add_(0.0)


def _levels(x: Tensor, scale: Tensor, bits: int) -> Tensor:
    n = max_level(bits)
    return torch.div(x, scale).round_().clamp_(-n - 1, n)


def _along_rows(scale: Tensor | float, x: Tensor) -> Tensor:
    """Shape a scale so that it broadcasts over the rows of `x`."""
    scale = torch.as_tensor(scale, dtype=torch.float32, device=x.device)
    if scale.ndim == 0 or (scale.ndim == x.ndim and scale.shape[:1] == x.shape[:1] and scale[:1].numel() == 1):
        return scale
    if scale.ndim == 1 and x.ndim > 1 and scale.shape[0] == x.shape[0]:
        return scale.view(-1, *(1,) * (x.ndim - 1))
    raise ValueError(
        f"scale: expected a scalar or one step per row, shape ({x.shape[0] if x.ndim else 1},), found shape "
        f"{tuple(scale.shape)}; gather the scales of the same rows as the weights"
    )


def pack_int4(q: Tensor) -> Tensor:
    """Put two 4-bit integers in a byte; the even column takes the low half.

    Args:
        q: Integers in [-8, 7]. Shape (..., D), int8, D even.

    Returns:
        Shape (..., D / 2), uint8.

    Raises:
        ValueError: D is odd, the dtype is not int8, or a value is outside [-8, 7].

    Example:
        >>> pack_int4(torch.tensor([1, -1], dtype=torch.int8))
        tensor([241], dtype=torch.uint8)
    """
    return _pack(q, 4)


def unpack_int4(packed: Tensor) -> Tensor:
    """Undo `pack_int4`.

    Args:
        packed: Shape (..., D / 2), uint8.

    Returns:
        Integers in [-8, 7]. Shape (..., D), int8.

    Raises:
        ValueError: The dtype is not uint8.
    """
    return _unpack(packed, 4)


def _pack(q: Tensor, bits: int) -> Tensor:
    if q.dtype != torch.int8:
        raise ValueError(f"expected int8 to pack {bits} bits, found {q.dtype}; call quantize first")
    check_divides(q.shape[-1], bits)
    n = max_level(bits)
    if q.numel() and (int(q.min()) < -n - 1 or int(q.max()) > n):
        raise ValueError(
            f"expected values in [{-n - 1}, {n}] to pack {bits} bits, found {int(q.min())} to {int(q.max())}; "
            f"quantize with bits={bits}"
        )
    per_byte = values_per_byte(bits)
    parts = q.view(torch.uint8).unflatten(-1, (-1, per_byte)) & (2**bits - 1)
    packed: Tensor = parts[..., 0].clone()
    for k in range(1, per_byte):
        packed |= parts[..., k] << (bits * k)
    return packed


def _unpack(packed: Tensor, bits: int) -> Tensor:
    if packed.dtype != torch.uint8:
        raise ValueError(f"expected uint8 that holds {bits} bits a value, found {packed.dtype}; pass what pack gave")
    signed = packed.view(torch.int8)
    # shifted up, the sign bit of the part is the sign bit of the byte; the shift down then extends it
    parts = [(signed << (8 - bits * (k + 1))) >> (8 - bits) for k in range(values_per_byte(bits))]
    return torch.stack(parts, dim=-1).flatten(-2)


def pack(q: Tensor, bits: int) -> Tensor:
    """Give integers of any width their storage form: packed bytes at 4 and 2 bits, as they are at 8 and 16.

    Args:
        q: What `quantize` returned for these bits. Shape (..., D).
        bits: 16, 8, 4 or 2.

    Returns:
        Shape (..., D * bits / 8) uint8 at 4 and 2 bits; shape (..., D) int8 or int16 otherwise.

    Raises:
        ValueError: D does not fill whole bytes, or the values do not fit the bits.
    """
    check_bits(bits)
    return _pack(q, bits) if bits < 8 else q


def unpack(packed: Tensor, bits: int) -> Tensor:
    """Undo `pack`.

    Args:
        packed: Storage form of these bits.
        bits: 16, 8, 4 or 2.

    Returns:
        Integers, shape (..., D); int16 at 16 bits, else int8.

    Raises:
        ValueError: `bits` is not in the set or the dtype does not belong to it.
    """
    check_bits(bits)
    return _unpack(packed, bits) if bits < 8 else packed


def stochastic_round(x: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
    """Round up with a probability equal to the fraction, so that the mean of the result is x.

    The fraction is compared with a uniform number, rather than added to it: adding loses low bits of x and
    with them the unbiasedness. Integers stay what they are. Draws happen on the device of the generator.

    Args:
        x: Any shape, float32 or float64.
        generator: Source of randomness; None is torch's global one.

    Returns:
        Whole numbers of the shape and dtype of `x`; each is floor(x) or floor(x) + 1.

    Example:
        >>> stochastic_round(torch.tensor([2.0, -3.0]))
        tensor([ 2., -3.])

    Source: Gupta et al. 2015; ALPT (Li et al. 2022) for embedding tables.
    """
    device = x.device if generator is None else generator.device
    uniform = torch.rand(x.shape, dtype=x.dtype, device=device, generator=generator).to(x.device)
    low = x.floor()
    return torch.where(uniform < x - low, low + 1, low)


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Refuse an option that is not in its set."""
    if value not in choices:
        raise ValueError(
            f"{name}: expected one of {', '.join(choices)}, found {value!r}; use {choices[0]!r} if in doubt"
        )


def check_stored_dtype(state_dict: Mapping[str, Any], prefix: str, bits: int, args: tuple[Any, ...]) -> None:
    """Report integers of another width, which torch would convert without a word."""
    stored = state_dict.get(prefix + "packed")
    if stored is not None and stored.dtype != storage_dtype(bits):
        error_messages = args[-1]
        error_messages.append(
            f"{prefix}packed: expected {storage_dtype(bits)} for {bits} bits, found {stored.dtype}; "
            "construct the module with the bits it was saved with"
        )


def float_dtype(dtype: torch.dtype | None) -> torch.dtype:
    """float32 or float64; None is torch's default."""
    dtype = torch.get_default_dtype() if dtype is None else dtype
    if dtype not in (torch.float32, torch.float64):
        raise ValueError(f"dtype: expected float32 or float64, found {dtype}; the grid, not the dtype, sets the size")
    return dtype


def storage_dtype(bits: int) -> torch.dtype:
    """Of packed integers."""
    return {16: torch.int16, 8: torch.int8}.get(bits, torch.uint8)
