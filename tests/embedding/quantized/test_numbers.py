"""Numbers on a grid: against a plain loop, packed and back."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from quantized_by_loop import BITS, loop_quantized, weights_like
from torch import Tensor

from slipstream.embedding.quantized.numbers import (
    dequantize,
    fake_quantize_rows,
    max_level,
    pack,
    pack_int4,
    quantize,
    row_scales,
    stochastic_round,
    table_scale,
    unpack,
    unpack_int4,
)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_quantize_and_dequantize_equal_the_plain_loop(bits: int, dtype: torch.dtype) -> None:
    weight = weights_like(0, 9, 6, dtype)
    for per, scale in (("table", table_scale(weight, bits)), ("row", row_scales(weight, bits))):
        expected = loop_quantized(weight, bits, per)
        q = quantize(weight, scale, bits)
        assert q.dtype == (torch.int16 if bits == 16 else torch.int8)
        assert torch.equal(dequantize(q, scale, dtype), expected)
        assert torch.equal(fake_quantize_rows(weight, scale, bits), expected)


def test_the_grid_saturates_at_both_ends_and_rounds_ties_to_even() -> None:
    x = torch.tensor([-100.0, -8.5, -0.5, 0.5, 1.5, 7.4, 100.0])
    assert quantize(x, 1.0, 4).tolist() == [-8, -8, 0, 0, 2, 7, 7]
    assert quantize(x, 1.0, 2).tolist() == [-2, -2, 0, 0, 1, 1, 1]


def test_the_error_is_half_a_step_at_most_and_a_zero_table_stays_zero() -> None:
    weight = weights_like(1, 50, 8)
    for bits in BITS:
        scale = table_scale(weight, bits)
        assert (fake_quantize_rows(weight, scale, bits) - weight).abs().max() <= scale * 0.5001
    zeros = torch.zeros(3, 4)
    assert torch.equal(fake_quantize_rows(zeros, row_scales(zeros, 4), 4), zeros)


def test_the_straight_through_gradient_is_the_identity_even_where_a_value_saturates() -> None:
    rows = weights_like(2, 5, 4).mul_(10).requires_grad_()
    upstream = weights_like(3, 5, 4)
    fake_quantize_rows(rows, 0.5, 4).backward(upstream)
    assert torch.equal(rows.grad, upstream)


def test_fake_quantisation_holds_no_negative_zero() -> None:
    out = fake_quantize_rows(torch.tensor([[-0.1, 0.1]]), 1.0, 4)
    assert not torch.signbit(out).any()


@given(st.lists(st.integers(-8, 7), min_size=2, max_size=40).filter(lambda v: len(v) % 2 == 0))
@settings(max_examples=50, deadline=None)
def test_four_bits_survive_packing_and_take_half_a_byte(values: list[int]) -> None:
    q = torch.tensor(values, dtype=torch.int8)
    packed = pack_int4(q)
    assert packed.numel() == len(values) // 2
    assert packed.tolist() == [(a & 15) | ((b & 15) << 4) for a, b in zip(values[::2], values[1::2], strict=True)]
    assert torch.equal(unpack_int4(packed), q)


@given(st.lists(st.tuples(*[st.integers(-2, 1)] * 4), min_size=1, max_size=20))
@settings(max_examples=50, deadline=None)
def test_two_bits_survive_packing_and_take_a_quarter_byte(values: list[tuple[int, ...]]) -> None:
    q = torch.tensor(values, dtype=torch.int8)
    packed = pack(q, 2)
    assert packed.shape == (len(values), 1)
    assert torch.equal(unpack(packed, 2), q)


def test_stochastic_rounding_is_unbiased_and_leaves_integers_alone() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.tensor([-126.75, -3.5, -0.01, 0.0, 0.2, 1.0, 100.999, 126.5])
    draws = torch.stack([stochastic_round(x, generator=generator) for _ in range(20_000)])
    assert ((draws == x.floor()) | (draws == x.floor() + 1)).all()
    fraction = x - x.floor()
    standard_error = (fraction * (1 - fraction) / 20_000).sqrt()
    assert ((draws.double().mean(0) - x).abs() <= 4.5 * standard_error).all()
    assert (draws[:, [3, 5]] == x[[3, 5]]).all()


def test_packing_refuses_values_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match=r"values in \[-8, 7\] to pack 4 bits, found 0 to 8"):
        pack_int4(torch.tensor([0, 8], dtype=torch.int8))
    with pytest.raises(ValueError, match=r"expected int8 to pack 2 bits, found torch\.int64"):
        pack(torch.tensor([0, 0, 0, 0]), 2)
    with pytest.raises(ValueError, match=r"expected uint8 .* found torch\.int8"):
        unpack_int4(torch.tensor([0], dtype=torch.int8))


@pytest.mark.parametrize(
    "read", [lambda x: quantize(x, 1.0, 4), lambda x: row_scales(x, 4), lambda x: table_scale(x, 4)]
)
def test_nan_has_no_place_on_a_grid(read: Callable[[Tensor], Tensor]) -> None:
    with pytest.raises(ValueError, match=r"expected finite values, found 1 .* \(0, 1\); lower the learning"):
        read(torch.tensor([[1.0, torch.nan]]))


def test_scales_and_widths_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match=r"one step per row, shape \(3,\), found shape \(2,\)"):
        quantize(torch.ones(3, 4), torch.ones(2), 4)
    with pytest.raises(ValueError, match="found 5"):
        max_level(5)
