"""The mean of weights, against copies of all of them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from slipstream.embedding.tiers.rows import TieredRows
from slipstream.training.averaging import WeightAverage

ROWS, HOT, DIM = 6, 4, 3
CPU = torch.device("cpu")


def make_rows(*, keeps_lead: bool = True) -> TieredRows:
    rows = TieredRows(
        num_rows=ROWS,
        num_hot=HOT,
        embedding_dim=DIM,
        num_staged=0,
        optimizer="sgd",
        device=CPU,
        keeps_lead=keeps_lead,
    )
    rows.load(torch.arange(ROWS), torch.randn(ROWS, DIM, generator=torch.Generator().manual_seed(3)))
    return rows


def move(rows: TieredRows, average: WeightAverage, layers: list[Tensor], looked_up: set[int], seed: int) -> None:
    """One averaged step, which moves some hot rows and every layer."""
    positions = torch.tensor(sorted(looked_up), dtype=torch.int64)
    generator = torch.Generator().manual_seed(seed)
    before = rows.buffer.index_select(0, positions)
    rows.buffer.index_add_(0, positions, torch.randn(len(positions), DIM, generator=generator))
    for layer in layers:
        layer.add_(torch.randn(layer.shape, generator=generator))
    average.follow_rows(positions, before)
    average.count()


@given(steps=st.lists(st.sets(st.integers(0, HOT - 1)), max_size=30))
def test_the_mean_is_that_of_copies_after_every_step(steps: list[set[int]]) -> None:
    rows, layers, everything = make_rows(), [torch.ones(2, 2), torch.zeros(3)], torch.arange(ROWS)
    average = WeightAverage(rows, layers)
    copies = []
    for seed, looked_up in enumerate(steps):
        move(rows, average, layers, looked_up, seed)
        copies.append([rows.gather(everything).double(), *(layer.double() for layer in layers)])
    last = [rows.gather(everything), *(layer.clone() for layer in layers)]

    with average.in_place():
        for at, served in enumerate([rows.gather(everything), *layers]):
            expected = torch.stack([one[at] for one in copies]).mean(dim=0).float() if copies else last[at]
            torch.testing.assert_close(served, expected, rtol=1e-5, atol=1e-5)

    for left, right in zip(last, [rows.gather(everything), *layers], strict=True):
        assert torch.equal(left, right)
    assert average.num_steps() == len(steps)


def test_a_step_visits_no_row_that_it_does_not_look_up() -> None:
    rows, layers = make_rows(), [torch.zeros(2)]
    average = WeightAverage(rows, layers)
    move(rows, average, layers, {0, 1, 2, 3}, seed=0)
    rows.buffer[3], rows.buffer_lead[3] = torch.nan, torch.nan  # type: ignore[index]
    for seed in range(3):
        move(rows, average, layers, {0, 2}, seed)
    assert rows.buffer_lead is not None
    assert torch.isfinite(rows.buffer_lead[:3]).all()
    assert not rows.buffer_lead[1].any()


def test_what_is_served_comes_back_also_when_serving_fails() -> None:
    rows, layers = make_rows(), [torch.ones(2)]
    average = WeightAverage(rows, layers)
    for seed in range(3):
        move(rows, average, layers, {1}, seed)
    last = [rows.gather(torch.arange(ROWS)), layers[0].clone()]
    with pytest.raises(RuntimeError, match="in the middle"), average.in_place():
        raise RuntimeError("in the middle")
    assert torch.equal(last[0], rows.gather(torch.arange(ROWS))) and torch.equal(last[1], layers[0])


def test_rows_without_a_lead_cannot_be_averaged() -> None:
    with pytest.raises(ValueError, match="keeps_lead"):
        WeightAverage(make_rows(keeps_lead=False), [torch.zeros(2)])
