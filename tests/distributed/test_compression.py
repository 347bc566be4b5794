"""Gradients in fewer bytes: how many, how wrong, and right on average."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from slipstream.distributed.compression import CODECS

LOSS = {"none": 0.0, "fp16": 2**-10, "int8": 0.5 * 1.01 / 127, "int4": 0.5 * 1.01 / 7}
"""Most that a value may be off, in shares of its line's largest magnitude; a scale may be 1 % more than that."""


def lines_of(num_lines: int, dim: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    magnitudes = 10.0 ** torch.randint(-12, 3, (num_lines, 1), generator=generator)
    return torch.randn(num_lines, dim, generator=generator) * magnitudes


@pytest.mark.parametrize("name", CODECS)
@given(num_lines=st.integers(0, 6), dim=st.integers(1, 9), seed=st.integers(0, 99))
def test_a_line_comes_back_in_the_bytes_that_were_said(name: str, num_lines: int, dim: int, seed: int):
    values, codec = lines_of(num_lines, dim, seed), CODECS[name]
    lines = codec.encode(values)
    assert lines.dtype == torch.uint8
    assert lines.shape == (num_lines, codec.line_bytes(dim, values.dtype))
    back = codec.decode(lines, dim, values.dtype)
    assert back.shape == values.shape
    most = values.abs().amax(dim=1, keepdim=True) * LOSS[name]
    assert bool(((back - values).abs() <= most * 1.01).all())


@pytest.mark.parametrize(("name", "num_bytes"), [("none", 64), ("fp16", 34), ("int8", 18), ("int4", 10)])
def test_bytes_of_a_row_of_sixteen_floats(name: str, num_bytes: int):
    assert CODECS[name].line_bytes(16, torch.float32) == num_bytes


@pytest.mark.parametrize("name", CODECS)
def test_zeros_come_back_as_zeros(name: str):
    lines = CODECS[name].encode(torch.zeros(2, 5))
    assert torch.equal(CODECS[name].decode(lines, 5, torch.float32), torch.zeros(2, 5))


@pytest.mark.parametrize("name", ["int8", "int4"])
def test_drawn_codes_are_right_on_average(name: str):
    values, codec = torch.tensor([[0.3, -1.0, 0.017, 0.0]]), CODECS[name]
    noise = torch.Generator().manual_seed(1)
    many = values.expand(20_000, 4)
    back = codec.decode(codec.encode(many, noise=noise), 4, values.dtype)
    step = float(back.unique().diff().min())
    assert bool(((back - values).abs() < step * 1.01).all())
    assert float((back.mean(dim=0) - values).abs().max()) < step * 0.02
