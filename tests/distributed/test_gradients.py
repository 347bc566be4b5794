"""Sums of gradients over two ranks that stand side by side in one process."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from slipstream.distributed.compression import Compression
from slipstream.distributed.gradients import GradientSums
from slipstream.embedding.tiers.lookahead import BatchPart

SMALLEST = {"none": 1e-6, "fp16": 2**-10, "int8": 1 / 127, "int4": 1 / 7}
"""Step between two values, over the largest."""


class Mirrored(SimpleNamespace):
    """One of two ranks, of which the other always says the same."""

    rank, size, device = 0, 2, torch.device("cpu")

    def sum(self, values: Tensor, what: str) -> None:
        values.mul_(2)

    def gather(self, values: Tensor, what: str) -> Tensor:
        return torch.stack([values, values])

    def gather_uneven(self, values: Tensor, sizes: list[int], what: str) -> list[Tensor]:
        assert [len(values)] * 2 == sizes
        return [values, values]


def sums_of(**options: Any) -> GradientSums:
    return GradientSums(cast(Any, Mirrored()), **options)


@pytest.mark.parametrize("way", SMALLEST)
def test_what_rounding_takes_from_dense_gradients_is_given_back_later(way: Compression):
    sums, generator = sums_of(compress_dense=way), torch.Generator().manual_seed(3)
    gradients = [torch.randn(300, generator=generator), torch.randn(7, 11, generator=generator)]
    total, num_steps = [torch.zeros_like(one) for one in gradients], 50
    for _ in range(num_steps):
        received = [one.clone() for one in gradients]
        assert torch.equal(sums.sum_dense(received, torch.tensor([1.5, 2.0])), torch.tensor([3.0, 4.0]))
        for so_far, one in zip(total, received, strict=True):
            so_far += one
    largest = max(float(one.abs().max()) for one in gradients)
    for so_far, one in zip(total, gradients, strict=True):
        # twice, for two ranks, one step between two values is all that is still owed after any number of steps
        assert float((so_far - 2 * num_steps * one).abs().max()) < 2 * 1.2 * SMALLEST[way] * largest + 1e-3


@pytest.mark.parametrize("way", SMALLEST)
def test_gradients_of_rows_are_added_where_each_rank_has_them(way: Compression):
    sums = sums_of(compress_rows=way)
    part = BatchPart(
        num_samples=4, rows=torch.arange(3), places=[torch.tensor([2, 0]).int(), torch.tensor([1, 2]).int()]
    )
    gradients, beside = torch.tensor([[1.0, -2.0], [0.5, 4.0]]), torch.tensor([[10.0], [20.0]])
    total = sums.sum_rows(gradients, beside, part, step=1)
    expected = torch.tensor([[0.5, 4.0, 20.0], [1.0, -2.0, 10.0], [1.5, 2.0, 30.0]])
    assert float((total - expected).abs().max()) <= 2 * 1.2 * SMALLEST[way] * 4
    assert torch.equal(total[:, 2], expected[:, 2])
    again = sums_of(compress_rows=way).sum_rows(gradients, beside, part, step=1)
    assert torch.equal(total, again), "a step draws the same, whatever was drawn before"


def test_feedback_is_taken_along():
    sums, other = sums_of(compress_dense="int4"), sums_of(compress_dense="int4")
    gradient = torch.randn(40, generator=torch.Generator().manual_seed(0))
    sums.sum_dense([gradient.clone()], torch.zeros(1))
    other.restore(sums.state())
    first, second = gradient.clone(), gradient.clone()
    sums.sum_dense([first], torch.zeros(1))
    other.sum_dense([second], torch.zeros(1))
    assert torch.equal(first, second)
