"""Pooling, against `F.embedding_bag` over a table quantised by a plain loop."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from quantized_by_loop import BITS, LENGTHS, jagged, loop_quantized, settings_of, weights_like
from torch import Tensor

from slipstream.embedding.quantized import PackedEmbeddingBag, QuantizedEmbeddingBag


@given(
    lengths=st.lists(st.integers(0, 6), min_size=1, max_size=12),
    num_rows=st.integers(1, 60),
    seed=st.integers(0, 1000),
    mode=st.sampled_from(["sum", "mean", "max"]),
    bits=st.sampled_from(BITS),
    padded=st.booleans(),
)
@settings(max_examples=80, deadline=None)
def test_any_ragged_batch_pools_like_the_reference(
    lengths: list[int], num_rows: int, seed: int, mode: str, bits: int, padded: bool
) -> None:
    weight = weights_like(seed, num_rows, 4)
    bag = QuantizedEmbeddingBag(
        num_rows,
        4,
        bits=bits,
        mode=mode,
        padding_idx=num_rows // 2 if padded else None,
        _weight=weight.clone(),
    )
    values, offsets = jagged(seed, num_rows, lengths, include_last=False)
    table = loop_quantized(weight, bits, "table").requires_grad_()
    expected = F.embedding_bag(values, table, offsets, mode=mode, padding_idx=bag.padding_idx)
    pooled = bag(values.to(torch.int32), offsets.to(torch.int32))
    torch.testing.assert_close(pooled, expected)
    expected.sum().backward()
    pooled.sum().backward()
    torch.testing.assert_close(bag.weight.grad.to_dense(), table.grad)


@pytest.mark.parametrize("num_rows", [5, 400])
def test_bags_of_one_row_and_two_dimensional_input_equal_the_reference(num_rows: int) -> None:
    weight = weights_like(0, num_rows, 4)
    table = loop_quantized(weight, 4, "table").requires_grad_()
    generator = torch.Generator().manual_seed(0)
    for padding_idx in (None, 3):
        for width in (1, 3):
            ids = torch.randint(0, num_rows, (40, width), generator=generator)
            ids[0, 0] = 3
            bag = QuantizedEmbeddingBag(num_rows, 4, padding_idx=padding_idx, _weight=weight.clone())
            expected = F.embedding_bag(ids, table, mode="sum", padding_idx=padding_idx)
            upstream = weights_like(1, 40, 4)
            (gradient,) = torch.autograd.grad(expected, table, upstream)
            pooled = bag(ids)
            assert torch.equal(pooled, expected)
            pooled.backward(upstream)
            torch.testing.assert_close(bag.weight.grad.to_dense(), gradient)


@pytest.mark.parametrize("include_last", [True, False])
def test_per_sample_weights_scale_lookups_and_get_their_gradient(include_last: bool) -> None:
    weight = weights_like(0, 11, 4, torch.float64)
    for lengths in (LENGTHS, [1] * 6):
        values, offsets = jagged(1, 11, lengths, include_last=include_last)
        factors = weights_like(2, 1, len(values), torch.float64)[0]
        table = loop_quantized(weight, 4, "row").requires_grad_()
        expected_factors = factors.clone().requires_grad_()
        bag = QuantizedEmbeddingBag(
            11, 4, scale_per="row", include_last_offset=include_last, padding_idx=5, _weight=weight.clone()
        )
        expected = F.embedding_bag(values, table, offsets, per_sample_weights=expected_factors, **settings_of(bag))
        factors.requires_grad_()
        pooled = bag(values, offsets, factors)
        torch.testing.assert_close(pooled, expected)
        upstream = weights_like(3, len(lengths), 4, torch.float64)
        expected.backward(upstream)
        pooled.backward(upstream)
        torch.testing.assert_close(bag.weight.grad.to_dense(), table.grad)
        torch.testing.assert_close(factors.grad, expected_factors.grad)


def test_rows_are_quantised_before_they_are_pooled() -> None:
    weight = torch.tensor([[0.4, 0.0], [0.4, 7.0]])
    bag = QuantizedEmbeddingBag(2, 2, bits=4, _weight=weight)
    # 0.4 rounds to 0 on a grid of step 1, while the pooled 0.8 would round to 1
    assert bag(torch.tensor([[0, 1]])).tolist() == [[0.0, 7.0]]


@pytest.mark.parametrize("lengths", [[0, 2, 1], [2, 1, 0], [1, 2, 0], [1, 1, 1]])
@pytest.mark.parametrize("include_last", [True, False])
def test_as_many_bags_as_lookups_are_not_taken_for_bags_of_one_row(lengths: list[int], include_last: bool) -> None:
    bag = QuantizedEmbeddingBag(20, 4, include_last_offset=include_last)
    values, offsets = jagged(0, 20, lengths, include_last=include_last)
    table = loop_quantized(bag.weight, 4, "table")
    assert torch.equal(bag(values, offsets), F.embedding_bag(values, table, offsets, **settings_of(bag)))


def test_empty_batches_give_empty_or_zero_outputs() -> None:
    bag = QuantizedEmbeddingBag(6, 4)
    nothing = torch.zeros(0, dtype=torch.int64)
    assert torch.equal(bag(nothing, torch.zeros(3, dtype=torch.int64)), torch.zeros(3, 4))
    assert bag(nothing, nothing).shape == (0, 4)


IDS = torch.tensor([0, 1, 2])


@pytest.mark.parametrize(
    ("lookup", "error", "message"),
    [
        ((torch.tensor([10]), torch.tensor([0])), IndexError, r"within \[0, 10\), found 10; map unknown"),
        ((torch.tensor([[-1]]),), IndexError, "found -1"),
        ((IDS.float(), torch.tensor([0])), ValueError, "int32 or int64 rows, found torch.float32"),
        ((IDS,), ValueError, "found None; give bag starts"),
        ((IDS, torch.tensor([1, 2])), ValueError, "first to be 0, found 1"),
        ((IDS, torch.tensor([0, 4])), ValueError, "at most the number of lookups, 3, found 4"),
        ((IDS, torch.tensor([0, 3, 1])), ValueError, r"ascending starts, found \[3, 1\] at 1"),
        ((IDS, torch.tensor([], dtype=torch.int64)), ValueError, "starting with 0, found none"),
        ((IDS[None], torch.tensor([0])), ValueError, "expected None for a 2-D input"),
        ((IDS[None, None],), ValueError, "1 or 2 dimensions, found 3"),
        ((IDS[None], None, torch.ones(1, 2)), ValueError, r"shape \(1, 3\).*found \(1, 2\)"),
        ((IDS[None], None, torch.ones(1, 3).double()), ValueError, "found.*torch.float64"),
    ],
)
def test_a_lookup_refuses_bad_input(lookup: tuple[Tensor, ...], error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        QuantizedEmbeddingBag(10, 4)(*lookup)
    with pytest.raises(error, match=message):
        PackedEmbeddingBag(10, 4)(*lookup)


def test_weighted_lookups_and_last_offsets_are_checked_against_the_bag() -> None:
    with pytest.raises(ValueError, match="expected mode 'sum', found 'mean'"):
        QuantizedEmbeddingBag(10, 4, mode="mean")(IDS[None], None, torch.ones(1, 3))
    with pytest.raises(ValueError, match="exactly the number of lookups, 3, found 2"):
        QuantizedEmbeddingBag(10, 4, include_last_offset=True)(IDS, torch.tensor([0, 2]))
