"""Scales of rows in tiers: when they follow the weights, and what passes through."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from slipstream.embedding.quantized.grids import RowGrids
from slipstream.embedding.quantized.numbers import dequantize, quantize, row_scales


def make_grids(**options: Any) -> RowGrids:
    one_table = {"bits": [4], "periods": [3], "scales_per": ["table"], "grid_of_column": [0]}
    return RowGrids(**{**one_table, "device": torch.device("cpu"), **options})


def test_a_scale_follows_the_largest_weight_seen_every_period():
    grids = make_grids(periods=[6])
    grids.set_abs_max(torch.tensor([0.7]))
    used = []
    for largest in (1.4, 0.1, 2.8, 0.1, 0.1, 5.6, 11.2, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1):
        grids.begin_step()
        used.append(round(float(grids.scale), 6))
        grids.train(torch.tensor([[[largest, -0.1]]]))
    # before steps 1, 2, 4, 6 and 12; what a step looks up counts from the next refresh, and is not forgotten
    assert used == [0.1, 0.2, 0.2, 0.2, 0.4, 0.4, 0.8, 0.8, 0.8, 0.8, 0.8, 0.8, 1.6]


def test_predicting_changes_no_scale():
    grids = make_grids(periods=[1])
    grids.set_abs_max(torch.tensor([0.7]))
    grids.round(torch.full((2, 1, 4), 50.0))
    grids.begin_step()
    grids.begin_step()
    assert float(grids.peak) == pytest.approx(0.7) and float(grids.scale) == pytest.approx(0.1)


def test_the_gradient_passes_straight_through_also_where_values_saturate():
    grids = make_grids()
    grids.set_abs_max(torch.tensor([0.7]))
    rows = torch.tensor([[[0.26, 9.0]], [[-9.0, 0.0]]], requires_grad=True)
    rounded = grids.train(rows)
    torch.testing.assert_close(rounded, torch.tensor([[[0.3, 0.7]], [[-0.8, 0.0]]]))
    gradient = torch.randn(2, 1, 2)
    rounded.backward(gradient)
    assert torch.equal(rows.grad, gradient)


def test_columns_of_one_table_share_its_scale():
    grids = make_grids(bits=[4, 0, 8], periods=[1, 1, 1], scales_per=["table"] * 3, grid_of_column=[0, 1, 2, 0])
    looked_up = torch.tensor([[[0.5], [0.123], [1.27], [-1.4]]])
    grids.begin_step()
    grids.train(looked_up)
    grids.begin_step()
    torch.testing.assert_close(grids.scale[[0, 2]], torch.tensor([0.2, 0.01]))
    torch.testing.assert_close(grids.round(looked_up), torch.tensor([[[0.4], [0.123], [1.27], [-1.4]]]))


@pytest.mark.parametrize("width", [8, 4, 2])
def test_a_scale_per_row_rounds_each_row_as_if_it_were_alone(width: int):
    grids = make_grids(bits=[width, 8], periods=[1, 1], scales_per=["row", "table"], grid_of_column=[0, 1, 0])
    grids.set_abs_max(torch.tensor([9.0, 9.0]))  # what a table's largest weight is does not matter
    looked_up = torch.randn(5, 3, 4, generator=torch.Generator().manual_seed(0))
    looked_up[2, 0] = 0.0
    for number in range(3):
        grids.begin_step()
        rounded = grids.train(looked_up * 2.0**number)
        for column in (0, 2):
            rows = looked_up[:, column] * 2.0**number
            steps = row_scales(rows, width)
            assert torch.equal(rounded[:, column], dequantize(quantize(rows, steps, width), steps))
    assert float(grids.peak[0]) == 9.0


def test_periods_below_one_are_refused():
    with pytest.raises(ValueError, match="at least 1 step"):
        make_grids(periods=[0])


@pytest.mark.parametrize("scale_per", ["table", "row"])
def test_a_range_of_rows_is_rounded_as_a_table_would_be(scale_per: str):
    alone = make_grids(bits=[8, 4, 2], periods=[2] * 3, scales_per=[scale_per] * 3, grid_of_column=[0, 1, 2])
    # the second column looks up a table of its own between two of the table that is cut
    cut = make_grids(
        bits=[4, 8, 4, 2],
        periods=[2] * 4,
        scales_per=[scale_per] * 4,
        grid_of_column=[1, 0, 1],
        columns_with_ranges=[0, 2],
    )
    generator = torch.Generator().manual_seed(0)
    for _ in range(7):
        rows = torch.randn(5, 3, 6, generator=generator)
        ranges = torch.randint(3, (5, 3), generator=generator, dtype=torch.uint8)
        for grids in (alone, cut):
            grids.begin_step()
        found = cut.train(rows, ranges)
        expected = torch.empty(5, 2, 6)
        for sample in range(5):
            for place, column in enumerate((0, 2)):
                at = int(ranges[sample, column])
                looked_up = torch.zeros(1, 3, 6)
                looked_up[:, at] = rows[sample, column]
                expected[sample, place] = alone.train(looked_up)[0, at]
        assert torch.equal(found[:, [0, 2]], expected)
        assert torch.equal(cut.round(rows, ranges), found)
    assert torch.equal(cut.peak[1:], alone.peak) and torch.equal(cut.scale[1:], alone.scale)


def test_the_gradient_of_every_range_passes_straight_through():
    grids = make_grids(
        bits=[8, 2], periods=[1, 1], scales_per=["table"] * 2, grid_of_column=[0], columns_with_ranges=[0]
    )
    rows = torch.randn(4, 1, 3, requires_grad=True)
    gradient = torch.randn(4, 1, 3)
    grids.train(rows, torch.tensor([[0], [1], [1], [0]], dtype=torch.uint8)).backward(gradient)
    assert torch.equal(rows.grad, gradient)
