"""Gradients in fewer bytes: each line of a matrix as a scale, and its values on few bits.

    none    the values as they are
    fp16    half precision over the line's largest magnitude
    int8    whole multiples of a 127th of it
    int4    whole multiples of a 7th of it, two to a byte

The scale of a line is its own maximum, rounded up to two bytes (bfloat16), so nothing is ever clipped; with the mean
over ranks, as published, the larger gradients would be. Ranks send codes and scales and add what they decode: sums of
codes would overflow.

Shape suffixes: N lines, D values of a line.

Source: int8 gradients, DQRM (arXiv 2410.20046), whose integers travel as fp32; ours travel packed.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Final, Literal

import torch
from torch import Tensor

Compression = Literal["none", "fp16", "int8", "int4"]

_SCALE_BYTES = 2


class Codec(ABC):
    """A way to write lines of numbers as bytes."""

    @abstractmethod
    def line_bytes(self, dim: int, dtype: torch.dtype) -> int:
        """Count the bytes of a line of so many values."""

    @abstractmethod
    def encode(self, values_ND: Tensor, *, noise: torch.Generator | None = None) -> Tensor:
        """Write lines as bytes.

        Args:
            values_ND: Finite numbers.
            noise: Rounds up or down at random, so that the mean of many is right; None rounds to the nearest.

        Returns:
            Shape (N, line_bytes), uint8.
        """

    @abstractmethod
    def decode(self, lines: Tensor, dim: int, dtype: torch.dtype) -> Tensor:
        """Read lines. Shape (N, line_bytes), uint8 -> (N, dim)."""


class Plain(Codec):
    """The values as they are."""

    def line_bytes(self, dim: int, dtype: torch.dtype) -> int:
        """Count the bytes of a line of so many values."""
        return dim * dtype.itemsize

    def encode(self, values_ND: Tensor, *, noise: torch.Generator | None = None) -> Tensor:
        """Give the bytes of the values; nothing is copied."""
        return values_ND.contiguous().view(torch.uint8)

    def decode(self, lines: Tensor, dim: int, dtype: torch.dtype) -> Tensor:
        """Give the values back."""
        return read_as(lines, dtype)


class _Scaled(Codec):
    """Values over a scale of their line."""

    top: float
    """The largest magnitude over the scale."""

    def line_bytes(self, dim: int, dtype: torch.dtype) -> int:
        """Count the bytes of a line of so many values."""
        return _SCALE_BYTES + self._value_bytes(dim)

    def encode(self, values_ND: Tensor, *, noise: torch.Generator | None = None) -> Tensor:
        """Write the scale of each line, then its values over it."""
        if not len(values_ND):
            dim, dtype = values_ND.shape[1], values_ND.dtype
            return values_ND.new_empty(0, self.line_bytes(dim, dtype), dtype=torch.uint8)
        largest = values_ND.abs().amax(dim=1, keepdim=True).float()
        # two bytes keep 8 bits of a number: a 128th more is never less than it was
        scales = (largest * (1 + 2**-7) / self.top).bfloat16()
        # a line of zeros, or of numbers that two bytes take for zero, has nothing to divide by
        scaled = torch.where(scales > 0, values_ND / scales.to(values_ND.dtype), 0.0)
        return torch.cat([scales.view(torch.uint8), self._pack(scaled, noise)], dim=1)

    def decode(self, lines: Tensor, dim: int, dtype: torch.dtype) -> Tensor:
        """Multiply the values by the scale of their line."""
        scales = read_as(lines[:, :_SCALE_BYTES], torch.bfloat16).to(dtype)
        return self._unpack(lines[:, _SCALE_BYTES:], dim).to(dtype) * scales

    @abstractmethod
    def _value_bytes(self, dim: int) -> int: ...

    @abstractmethod
    def _pack(self, scaled: Tensor, noise: torch.Generator | None) -> Tensor: ...

    @abstractmethod
    def _unpack(self, packed: Tensor, dim: int) -> Tensor: ...


class Half(_Scaled):
    """Half precision; the scale keeps small gradients from vanishing."""

    top = 1.0

    def _value_bytes(self, dim: int) -> int:
        return 2 * dim

    def _pack(self, scaled: Tensor, noise: torch.Generator | None) -> Tensor:
        return scaled.half().view(torch.uint8)

    def _unpack(self, packed: Tensor, dim: int) -> Tensor:
        return read_as(packed, torch.float16)


class Int8(_Scaled):
    """One byte a value."""

    top = 127.0

    def _value_bytes(self, dim: int) -> int:
        return dim

    def _pack(self, scaled: Tensor, noise: torch.Generator | None) -> Tensor:
        return _round(scaled, noise).to(torch.int8).view(torch.uint8)

    def _unpack(self, packed: Tensor, dim: int) -> Tensor:
        return read_as(packed, torch.int8)


class Int4(_Scaled):
    """Half a byte a value: numbers from -7 to 7 are kept as 1 to 15, the first of two in the high half."""

    top = 7.0

    def _value_bytes(self, dim: int) -> int:
        return (dim + 1) // 2

    def _pack(self, scaled: Tensor, noise: torch.Generator | None) -> Tensor:
        codes = (_round(scaled, noise) + 8).to(torch.uint8)
        if codes.shape[1] % 2:
            codes = torch.nn.functional.pad(codes, (0, 1))
        return codes[:, 0::2] << 4 | codes[:, 1::2]

    def _unpack(self, packed: Tensor, dim: int) -> Tensor:
        codes = torch.stack([packed >> 4, packed & 15], dim=2).flatten(start_dim=1)[:, :dim]
        return codes.to(torch.int8) - 8


def read_as(lines: Tensor, dtype: torch.dtype) -> Tensor:
    """Read bytes as numbers. Shape (N, n), uint8 -> (N, n / itemsize)."""
    # strides of a dimension of one are anything, and still called contiguous; a view needs those of a fresh tensor
    is_fresh = len(lines) > 1 and lines.is_contiguous()
    return (lines if is_fresh else lines.clone(memory_format=torch.contiguous_format)).view(dtype)


def _round(values: Tensor, noise: torch.Generator | None) -> Tensor:
    if noise is None:
        return values.round()
    drawn = torch.rand(values.shape, generator=noise, dtype=torch.float32, device=values.device)
    return (values + drawn).floor()


CODECS: Final[dict[str, Codec]] = {"none": Plain(), "fp16": Half(), "int8": Int8(), "int4": Int4()}
"""By `distributed.compress_dense` and `distributed.compress_rows`."""
