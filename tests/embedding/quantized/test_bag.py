"""Quantised bags and layers, against a table quantised by a plain loop and `F.embedding_bag` over it."""

import copy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from slipstream.embedding.quantized import (
    SWEEP_ROWS_PER_STEP,
    PackedEmbeddingBag,
    PackedLinear,
    QuantizedEmbeddingBag,
    QuantizedLinear,
    quantize_linears,
    quantize_table,
)
from slipstream.embedding.quantized.abs_max import BLOCK_ROWS, LEAST_REREADS, PENDING_ROWS, AbsMaxTracker
from slipstream.embedding.quantized.numbers import (
    dequantize,
    fake_quantize_rows,
    max_level,
    pack_int2,
    pack_int4,
    quantize,
    row_scales,
    stochastic_round,
    table_scale,
    unpack_int2,
    unpack_int4,
)

BITS = (16, 8, 4, 2)
BENCHMARK = Path(__file__).parents[3] / "benchmarks" / "bench_quantized.py"


# -- the reference: every step written out ------------------------------------------------------------------


def loop_scale(weight: np.ndarray, bits: int) -> np.float32:
    return np.float32(max(np.abs(weight).max(), weight.dtype.type(1e-8)) / (2 ** (bits - 1) - 1))


def loop_quantized(weight: Tensor, bits: int, scale_per: str, scale: float | None = None) -> Tensor:
    """The fake-quantised table, number by number."""
    w = weight.detach().numpy()
    n = 2 ** (bits - 1) - 1
    out = np.empty_like(w)
    table = loop_scale(w, bits) if scale is None else np.float32(scale)
    for i in range(w.shape[0]):
        step = w.dtype.type(table if scale_per == "table" else loop_scale(w[i], bits))
        for j in range(w.shape[1]):
            q = min(max(int(np.round(w[i, j] / step)), -n - 1), n)
            out[i, j] = w.dtype.type(q) * step
    return torch.from_numpy(out)


def jagged(seed: int, num_rows: int, lengths: list[int], *, include_last: bool) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(0, num_rows, (sum(lengths),), generator=generator)
    ends = torch.tensor([0, *lengths]).cumsum(0)
    return values, ends if include_last else ends[:-1]


def weights_like(seed: int, num_rows: int, dim: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(num_rows, dim, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def settings_of(bag: QuantizedEmbeddingBag | PackedEmbeddingBag) -> dict[str, object]:
    return {
        "mode": bag.mode,
        "padding_idx": bag.padding_idx,
        "include_last_offset": bag.include_last_offset,
    }


# -- pure functions -----------------------------------------------------------------------------------------


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
    packed = pack_int2(q)
    assert packed.shape == (len(values), 1)
    assert torch.equal(unpack_int2(packed), q)


def test_stochastic_rounding_is_unbiased_and_leaves_integers_alone() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.tensor([-126.75, -3.5, -0.01, 0.0, 0.2, 1.0, 100.999, 126.5])
    draws = torch.stack([stochastic_round(x, generator=generator) for _ in range(20_000)])
    assert ((draws == x.floor()) | (draws == x.floor() + 1)).all()
    fraction = x - x.floor()
    standard_error = (fraction * (1 - fraction) / 20_000).sqrt()
    assert ((draws.double().mean(0) - x).abs() <= 4.5 * standard_error).all()
    assert (draws[:, [3, 5]] == x[[3, 5]]).all()


# -- the largest weight, without reading the table ----------------------------------------------------------


@given(st.integers(0, 10_000), st.integers(1, 20_000), st.sampled_from([1, 256, 700]))
@settings(max_examples=25, deadline=None)
def test_the_tracked_maximum_equals_the_exact_one_when_changed_rows_are_noted(
    seed: int, num_rows: int, rows_per_refresh: int
) -> None:
    rng = np.random.default_rng(seed)
    table = torch.from_numpy(rng.normal(size=(num_rows, 2)))
    tracker = AbsMaxTracker(num_rows, rows_per_refresh)
    for _ in range(6):
        # the largest weight of the table lives and dies: one row rises far above the others, then falls
        rows = torch.from_numpy(np.unique(rng.integers(0, num_rows, size=12)))
        tracker.note(rows)
        table[rows] = torch.from_numpy(rng.normal(size=(len(rows), 2)))
        table[rows[0]] *= 100
        assert tracker.maximum(table.__getitem__) == table.abs().max()
        tracker.note(rows[:1])
        table[rows[0]] *= 0.001
        assert tracker.maximum(table.__getitem__) == table.abs().max()


def test_a_tracked_maximum_that_runs_out_of_reads_is_an_upper_bound_and_recovers() -> None:
    num_blocks = 40
    table = torch.ones(num_blocks * BLOCK_ROWS, 2)
    table[::BLOCK_ROWS] = torch.arange(10.0, 10.0 + num_blocks).unsqueeze(1)
    tracker = AbsMaxTracker(len(table), 2 * BLOCK_ROWS)
    assert tracker.maximum(table.__getitem__) == 49
    tracker.note(torch.arange(0, len(table), BLOCK_ROWS))
    table[::BLOCK_ROWS] = 1
    answers = [float(tracker.maximum(table.__getitem__)) for _ in range(num_blocks // 2)]
    assert all(answer >= 1 for answer in answers)
    assert answers[0] > 1
    assert answers == sorted(answers, reverse=True)
    assert answers[-1] == 1


def test_a_row_changed_without_notice_is_seen_within_one_sweep() -> None:
    table = torch.ones(50 * BLOCK_ROWS, 2)
    for row in (3, len(table) - 1):
        tracker = AbsMaxTracker(len(table), 4 * BLOCK_ROWS)
        tracker.maximum(table.__getitem__)
        table[row, 1] = -7
        answers = [float(tracker.maximum(table.__getitem__)) for _ in range(-(-50 // 4))]
        assert answers[-1] == 7
        table[row, 1] = 1


def test_the_cost_of_a_refresh_does_not_grow_with_the_table() -> None:
    reads = []
    for num_rows in (20_000, 200_000, 1_000_000):
        table = weights_like(0, num_rows, 2)
        tracker = AbsMaxTracker(num_rows, 1024)
        tracker.maximum(table.__getitem__)
        built = tracker.rows_read
        for step in range(5):
            tracker.note(torch.arange(step, num_rows, num_rows // 100))
            tracker.maximum(table.__getitem__)
        reads.append(tracker.rows_read - built)
        assert built == num_rows
    assert max(reads) <= 5 * (1024 + LEAST_REREADS * BLOCK_ROWS + 101)


def test_noted_rows_wait_for_the_optimizer_when_gradients_accumulate() -> None:
    table = torch.ones(10 * BLOCK_ROWS, 2)
    tracker = AbsMaxTracker(len(table), 1)
    tracker.maximum(table.__getitem__, version=0)
    tracker.note(torch.tensor([2000]), version=0)
    tracker.maximum(table.__getitem__, version=0)
    table[2000] = 9
    assert tracker.maximum(table.__getitem__, version=1) == 9


def test_nan_in_a_tracked_table_is_an_error_that_says_what_to_do() -> None:
    table = torch.ones(10 * BLOCK_ROWS, 2)
    tracker = AbsMaxTracker(len(table), 1)
    tracker.maximum(table.__getitem__)
    tracker.note(torch.tensor([1700]))
    table[1700, 1] = torch.nan
    with pytest.raises(ValueError, match=r"expected finite values.*learning rate"):
        tracker.maximum(table.__getitem__)


# -- the bag: forward and gradients -------------------------------------------------------------------------

LENGTHS = [3, 0, 1, 5, 2, 0, 7, 1, 0]


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("scale_per", ["table", "row"])
@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_forward_and_gradient_equal_a_bag_over_the_quantised_table(
    bits: int, scale_per: str, mode: str, dtype: torch.dtype
) -> None:
    weight = weights_like(bits, 13, 4, dtype)
    for sparse in (True, False):
        for padding_idx in (None, 2, -1):
            for include_last in (True, False):
                bag = QuantizedEmbeddingBag(
                    13,
                    4,
                    bits=bits,
                    scale_per=scale_per,
                    mode=mode,
                    sparse=sparse,
                    padding_idx=padding_idx,
                    include_last_offset=include_last,
                    _weight=weight.clone(),
                )
                values, offsets = jagged(7, 13, LENGTHS, include_last=include_last)
                table = loop_quantized(weight, bits, scale_per).requires_grad_()
                expected = F.embedding_bag(values, table, offsets, **settings_of(bag))
                pooled = bag(values, offsets)
                torch.testing.assert_close(pooled, expected)
                upstream = weights_like(9, len(LENGTHS), 4, dtype)
                expected.backward(upstream)
                pooled.backward(upstream)
                assert bag.weight.grad.is_sparse == sparse
                torch.testing.assert_close(bag.weight.grad.to_dense(), table.grad)


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


def test_only_looked_up_rows_are_in_the_sparse_gradient_and_padding_is_not() -> None:
    bag = QuantizedEmbeddingBag(1000, 4, padding_idx=7)
    bag(torch.tensor([[7, 3], [900, 3]])).sum().backward()
    assert bag.weight.grad.coalesce().indices().tolist() == [[3, 900]]


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


# torch's Adagrad makes sparse tensors without saying whether to check them
@pytest.mark.filterwarnings("ignore:Sparse invariant checks:UserWarning")
@pytest.mark.parametrize("optimizer", ["sgd", "sparse_adam", "adagrad"])
@pytest.mark.parametrize("scale_per", ["table", "row"])
def test_k_steps_of_a_torch_optimizer_equal_training_through_the_quantised_table(
    optimizer: str, scale_per: str
) -> None:
    make = {
        "sgd": lambda p: torch.optim.SGD(p, lr=0.3),
        "sparse_adam": lambda p: torch.optim.SparseAdam(p, lr=0.05),
        "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1),
    }[optimizer]
    weight = weights_like(0, 17, 4, torch.float64)
    bag = QuantizedEmbeddingBag(17, 4, period=1, scale_per=scale_per, _weight=weight.clone())
    reference = nn.Parameter(weight.clone())
    ours, theirs = make(list(bag.parameters())), make([reference])
    for step in range(6):
        values, offsets = jagged(step, 17, LENGTHS, include_last=False)
        target = weights_like(100 + step, len(LENGTHS), 4, torch.float64)
        ours.zero_grad()
        F.mse_loss(bag(values, offsets), target).backward()
        ours.step()
        # straight through: the gradient with respect to the quantised table, applied to the master
        table = loop_quantized(reference, 4, scale_per).requires_grad_()
        F.mse_loss(F.embedding_bag(values, table, offsets, mode="sum"), target).backward()
        rows = values.unique()
        reference.grad = torch.sparse_coo_tensor(rows[None], table.grad[rows], table.shape, check_invariants=True)
        theirs.step()
        torch.testing.assert_close(bag.weight, reference)


# -- the scale and its period -------------------------------------------------------------------------------


def test_the_scale_changes_on_steps_0_and_period_and_nowhere_else() -> None:
    bag = QuantizedEmbeddingBag(10, 4, period=3)
    ids = torch.tensor([[0, 1]])
    seen = []
    for step in range(8):
        with torch.no_grad():
            bag.weight.fill_(float(step + 1))
        bag(ids)
        seen.append(round(float(bag.scale) * 7))
        bag.eval()
        bag(ids)
        bag(ids)
        bag.train()
    assert seen == [1, 1, 1, 4, 4, 4, 7, 7]


def test_between_refreshes_a_weight_that_outgrew_the_range_saturates() -> None:
    bag = QuantizedEmbeddingBag(10, 2, period=5, _weight=torch.ones(10, 2))
    bag(torch.tensor([[0]]))
    with torch.no_grad():
        bag.weight[0] = 50.0
    assert torch.equal(bag(torch.tensor([[0]])), loop_quantized(bag.weight, 4, "table", float(bag.scale))[:1])
    assert bag(torch.tensor([[0]])).max() <= 1.01


def test_a_row_scale_is_exact_in_training_and_evaluation() -> None:
    bag = QuantizedEmbeddingBag(10, 4, scale_per="row", period=1000)
    for factor in (1.0, 30.0, 0.01):
        with torch.no_grad():
            bag.weight.mul_(factor)
        expected = loop_quantized(bag.weight, 4, "row")
        assert torch.equal(bag(torch.arange(10)[:, None]), expected)
        assert torch.equal(bag.eval()(torch.arange(10)[:, None]), expected)
        bag.train()


@pytest.mark.parametrize("period", [1, 3])
def test_the_scale_of_a_large_table_follows_sgd_exactly(period: int) -> None:
    num_rows = SWEEP_ROWS_PER_STEP * 12
    bag = QuantizedEmbeddingBag(num_rows, 2, period=period, _weight=weights_like(0, num_rows, 2))
    optimizer = torch.optim.SGD(bag.parameters(), lr=1.0)
    generator = torch.Generator().manual_seed(0)
    before = []
    for step in range(18):
        if step % period == 0:
            before.append(float(bag.weight.detach().abs().max()))
        largest = int(bag.weight.detach().abs().max(1).values.argmax())
        ids = torch.randint(0, num_rows, (20, 1), generator=generator)
        ids[0] = largest
        pooled = bag(ids)
        if step % period == 0:
            assert bag.scale == np.float32(before[-1]) / np.float32(7)
        # pull the largest row to 0, push some others about: the maximum must shrink as well as grow
        optimizer.zero_grad()
        (pooled[0] @ bag.weight.detach()[largest] / 1.0 + pooled[1:].sum() * 0.05 * (-1) ** step).backward()
        optimizer.step()
    assert min(before) < before[0] * 0.95


def test_the_scale_of_a_large_int8_master_follows_its_updates_exactly() -> None:
    num_rows = SWEEP_ROWS_PER_STEP * 8
    generator = torch.Generator().manual_seed(0)
    bag = QuantizedEmbeddingBag(num_rows, 2, period=1, master_dtype="int8", generator=generator)
    for step in range(10):
        largest = bag.master_rows().abs().max()
        row = int(bag.master_rows().abs().max(1).values.argmax())
        bag(torch.tensor([[row], [step]])).sum().backward()
        assert bag.scale == largest / 7
        bag.apply_gradients(lr=0.05 * (-1) ** step)
        if step % 3 == 0:
            bag.apply_update(torch.tensor([num_rows - 1 - step, row]), torch.ones(2, 2))
        elif step % 3 == 1:
            bag.apply_update(torch.tensor([row]), -bag.master_rows(torch.tensor([row])))


def test_rows_of_many_steps_between_refreshes_are_read_before_they_pile_up() -> None:
    num_rows = 3 * PENDING_ROWS
    bag = QuantizedEmbeddingBag(num_rows, 2, period=50, _weight=torch.ones(num_rows, 2))
    bag._tracker = AbsMaxTracker(num_rows, 256)  # as if the table were too large to be read whole
    bag._tracked_address = bag.weight.data_ptr()
    optimizer = torch.optim.SGD(bag.parameters(), lr=1.0)
    ids = torch.arange(PENDING_ROWS // 4)[:, None]
    for step in range(51):
        optimizer.zero_grad()
        (bag(ids + 256) * (-1 if step == 7 else 0)).sum().backward()
        optimizer.step()
        assert sum(rows.numel() for rows, _ in bag._tracker._noted) <= PENDING_ROWS
    assert bag._tracker.rows_read < num_rows + 70 * len(ids)
    assert bag.scale == 2 / np.float32(7)


def test_changes_behind_the_back_of_the_bag_are_seen_after_one_sweep_or_at_a_refresh_by_hand() -> None:
    num_rows = SWEEP_ROWS_PER_STEP * 5
    bag = QuantizedEmbeddingBag(num_rows, 2, period=1, _weight=torch.ones(num_rows, 2))
    bag(torch.tensor([[0]]))
    bag.weight.data[num_rows - 2] = 70.0
    for _ in range(num_rows // SWEEP_ROWS_PER_STEP + 1):
        bag(torch.tensor([[0]]))
    assert bag.scale == 10
    bag.weight.data[0] = 140.0
    bag.refresh_scale()
    assert bag.scale == 20


def test_momentum_on_dense_gradients_is_followed_exactly() -> None:
    num_rows = SWEEP_ROWS_PER_STEP * 3
    bag = QuantizedEmbeddingBag(num_rows, 2, period=2, sparse=False, _weight=weights_like(0, num_rows, 2))
    optimizer = torch.optim.SGD(bag.parameters(), lr=1.0, momentum=0.9)
    for step in range(6):
        largest = bag.weight.detach().abs().max()
        optimizer.zero_grad()
        bag(torch.tensor([[step], [step + 50]])).sum().backward()
        if step % 2 == 0:
            assert bag.scale == largest / 7
        optimizer.step()


# -- storage ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("scale_per", ["table", "row"])
@pytest.mark.parametrize("master_dtype", ["float32", "int8"])
def test_a_packed_bag_has_the_promised_size_and_the_same_bits_after_safetensors(
    bits: int, scale_per: str, master_dtype: str, tmp_path: Path
) -> None:
    for mode in ("sum", "mean", "max"):
        for dtype in (torch.float32, torch.float64):
            bag = QuantizedEmbeddingBag(
                37,
                8,
                bits=bits,
                scale_per=scale_per,
                master_dtype=master_dtype,
                mode=mode,
                padding_idx=4,
                include_last_offset=True,
                dtype=dtype,
                generator=torch.Generator().manual_seed(1),
            )
            values, offsets = jagged(3, 37, [*LENGTHS, 9, 30], include_last=True)
            with torch.no_grad():
                bag.apply_update(torch.arange(37), weights_like(5, 37, 8, dtype))
            bag(values, offsets)  # takes the scale
            bag.apply_update(torch.arange(37), weights_like(6, 37, 8, dtype))
            # from here on the frozen scale is stale, so some weights saturate
            bag.eval()
            packed = bag.pack()
            size = {16: 37 * 16, 8: 37 * 8, 4: 37 * 4, 2: 37 * 2}[bits]
            assert packed.packed.numel() * packed.packed.element_size() == size
            assert packed.memory_bytes() == size + 4 * (37 if scale_per == "row" else 1)
            path = tmp_path / f"{mode}{dtype}.safetensors"
            save_file(packed.state_dict(), path)
            loaded = PackedEmbeddingBag(37, 8, bits=bits, scale_per=scale_per, dtype=dtype, **settings_of(bag))
            loaded.load_state_dict(load_file(path))
            ones, starts = torch.arange(37), torch.arange(38)
            for lookup in ((values, offsets), (values.view(-1, 1),), (ones, starts)):
                expected = bag(*lookup)
                assert expected.dtype == dtype
                for answer in (packed(*lookup), loaded(*lookup)):
                    assert torch.equal(answer, expected)
                    assert torch.equal(torch.signbit(answer), torch.signbit(expected))
            scale = None if scale_per == "row" else float(bag.scale)
            table = loop_quantized(bag.master_rows(), bits, scale_per, scale)
            table[4] = 0  # the padding row
            assert torch.equal(packed(ones[:, None]), table)


def test_a_table_larger_than_one_chunk_packs_whole() -> None:
    weight = weights_like(0, 70_000, 2)
    packed = quantize_table(weight, 8, "table")
    ids = torch.tensor([[0], [65_535], [65_536], [69_999]])
    assert torch.equal(packed(ids), fake_quantize_rows(weight[ids[:, 0]], table_scale(weight, 8), 8))


@pytest.mark.parametrize("scale_per", ["table", "row"])
def test_quantising_after_training_equals_the_plain_loop_and_rows_are_closer(scale_per: str) -> None:
    weight = weights_like(0, 20, 8)
    weight[3] *= 20  # one outlier row sets the scale of the table
    packed = quantize_table(weight, 4, scale_per)
    assert torch.equal(packed(torch.arange(20)[:, None]), loop_quantized(weight, 4, scale_per))
    if scale_per == "row":
        error = (packed(torch.arange(20)[:, None]) - weight).norm()
        assert error < 0.5 * (loop_quantized(weight, 4, "table") - weight).norm()


@pytest.mark.parametrize("master_dtype", ["float32", "int8"])
def test_training_resumes_from_a_checkpoint_as_if_never_interrupted(master_dtype: str) -> None:
    def make() -> QuantizedEmbeddingBag:
        return QuantizedEmbeddingBag(
            3000, 4, period=3, master_dtype=master_dtype, generator=torch.Generator().manual_seed(0)
        )

    def train(bag: QuantizedEmbeddingBag, first: int, last: int) -> None:
        for step in range(first, last):
            bag.generator.manual_seed(step)
            values, offsets = jagged(step, 3000, LENGTHS, include_last=False)
            bag.zero_grad()
            bag(values, offsets).square().sum().backward()
            if bag.weight is None:
                bag.apply_gradients(lr=0.3, rule="rowwise_adagrad")
            else:
                torch.optim.SGD(bag.parameters(), lr=0.3).step()

    straight, resumed, first_half = make(), make(), make()
    train(straight, 0, 11)
    train(first_half, 0, 5)
    resumed.load_state_dict(first_half.state_dict())
    train(resumed, 5, 11)
    left, right = straight.state_dict(), resumed.state_dict()
    assert left.keys() == right.keys()
    assert all(torch.equal(left[key], right[key]) for key in left)


def test_loading_only_the_weight_of_a_plain_bag_sets_the_scale_from_it() -> None:
    plain = nn.EmbeddingBag(10, 4)
    bag = QuantizedEmbeddingBag(10, 4).eval()
    bag.load_state_dict(plain.state_dict(), strict=False)
    assert bag.scale == plain.weight.abs().max() / 7


def test_a_copy_of_a_bag_trains_on_its_own() -> None:
    num_rows = SWEEP_ROWS_PER_STEP * 2
    bag = QuantizedEmbeddingBag(num_rows, 2, period=1, generator=torch.Generator().manual_seed(0))
    bag(torch.tensor([[1]]))
    twin = copy.deepcopy(bag)
    with torch.no_grad():
        twin.weight[5] = 70.0
    twin(torch.tensor([[1]]))
    bag(torch.tensor([[1]]))
    assert twin.scale == 10
    assert bag.scale < 1


# -- the int8 master ----------------------------------------------------------------------------------------


def test_an_int8_master_takes_a_byte_per_weight_and_one_per_row() -> None:
    bag = QuantizedEmbeddingBag(1000, 16, master_dtype="int8", scale_per="row")
    assert bag.memory_bytes() == 1000 * 17
    assert list(bag.parameters()) == []
    full = QuantizedEmbeddingBag(1000, 16, scale_per="row")
    assert full.memory_bytes() / bag.memory_bytes() > 3.7


def test_an_int8_master_is_within_a_127th_of_the_weights_it_was_given() -> None:
    weight = weights_like(0, 40, 8) * torch.logspace(-6, 4, 40)[:, None]
    weight[7] = 0
    bag = QuantizedEmbeddingBag(40, 8, master_dtype="int8", _weight=weight)
    error = (bag.master_rows() - weight).abs().max(1).values
    assert (error <= weight.abs().max(1).values / 127 * 1.01).all()
    assert (bag.master[weight.abs().max(1).values > 0].abs().max(1).values >= 63).all()


def test_updates_of_an_int8_master_are_unbiased_and_repeatable() -> None:
    weight, delta = weights_like(0, 3, 4), weights_like(1, 3, 4) * 0.003  # far below a step of 1/64
    copies, rows = 8000, torch.arange(3 * 8000)
    bags = [
        QuantizedEmbeddingBag(
            3 * copies,
            4,
            master_dtype="int8",
            _weight=weight.repeat(copies, 1),
            generator=torch.Generator().manual_seed(seed),
        )
        for seed in (5, 5, 6)
    ]
    before = bags[0].master_rows()[:3].double()
    for bag in bags:
        bag.apply_update(rows, delta.repeat(copies, 1))
    mean = bags[0].master_rows().view(copies, 3, 4).double().mean(0)
    step = 2.0 ** bags[0].exponent[:3].double().unsqueeze(1)
    assert ((mean - before - delta).abs() <= 4.5 * 0.5 * step / copies**0.5).all()
    assert torch.equal(bags[0].master, bags[1].master)
    assert not torch.equal(bags[0].master, bags[2].master)


def test_rows_without_an_update_and_the_padding_row_keep_their_values() -> None:
    bag = QuantizedEmbeddingBag(20, 4, master_dtype="int8", padding_idx=0, _weight=weights_like(0, 20, 4))
    before = bag.master_rows().clone()
    bag.apply_update(torch.tensor([0, 3, 3]), torch.ones(3, 4))
    bag.apply_update(torch.arange(20), torch.zeros(20, 4))
    after = bag.master_rows()
    untouched = [row for row in range(20) if row != 3]
    assert torch.equal(after[untouched], before[untouched])
    torch.testing.assert_close(after[3], before[3] + 2, atol=0.05, rtol=0)


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_training_leaves_the_padding_row_of_an_int8_master_alone(mode: str) -> None:
    bag = QuantizedEmbeddingBag(5, 4, master_dtype="int8", mode=mode, padding_idx=2)
    bag(torch.tensor([[2, 1], [2, 2], [4, 3]])).sum().backward()
    bag(torch.tensor([[2], [1]])).sum().backward()
    bag.apply_gradients(lr=1.0)
    assert not bag.master_rows()[2].any()
    assert bag.master_rows()[1].abs().min() > 0.5


@pytest.mark.parametrize("rule", ["sgd", "rowwise_adagrad"])
def test_fused_updates_of_an_int8_master_follow_the_formula(rule: str) -> None:
    weight = weights_like(0, 12, 8)
    bag = QuantizedEmbeddingBag(12, 8, master_dtype="int8", bits=8, _weight=weight)
    reference = bag.master_rows().clone()
    sums = torch.zeros(12)
    for step in range(4):
        # two forwards of one step, one of single rows and one of bags: their gradients add up
        ids = torch.randint(0, 12, (6, 1), generator=torch.Generator().manual_seed(step))
        pairs = ids.view(3, 2)
        table = loop_quantized(bag.master_rows(), 8, "table", float(bag.scale))
        upstream, more = weights_like(step, 6, 8), weights_like(step + 50, 3, 8)
        bag(ids).backward(upstream)
        table = table.requires_grad_()
        (F.embedding_bag(ids, table, mode="sum") * upstream).sum().backward()
        bag(pairs).backward(more)
        (F.embedding_bag(pairs, table, mode="sum") * more).sum().backward()
        before = bag.master_rows().clone()
        bag.apply_gradients(lr=0.1, rule=rule)
        sums += table.grad.square().mean(1)
        factor = 0.1 if rule == "sgd" else 0.1 / (sums.sqrt() + 1e-8)[:, None]
        reference = before - table.grad * factor
        step_size = 2.0 ** bag.exponent.float()[:, None]
        assert ((bag.master_rows() - reference).abs() <= step_size * 1.001).all()
    bag.apply_gradients(lr=0.1)  # nothing is left to apply


def test_zero_grad_and_evaluation_leave_nothing_to_apply() -> None:
    bag = QuantizedEmbeddingBag(12, 4, master_dtype="int8")
    before = bag.master.clone()
    bag(torch.tensor([[1]])).requires_grad_().sum().backward()
    bag.zero_grad()
    bag.apply_gradients(lr=1.0)
    assert torch.equal(bag.master, before)
    assert not bag.eval()(torch.tensor([[1]])).requires_grad


def test_training_with_an_int8_master_ends_close_to_fp32() -> None:
    teacher = weights_like(0, 50, 8)

    def train(make_bag: object) -> float:
        bag = make_bag()
        optimizer = None if isinstance(bag, QuantizedEmbeddingBag) else torch.optim.SGD(bag.parameters(), lr=3.0)
        generator = torch.Generator().manual_seed(1)
        losses = []
        for _ in range(300):
            ids = torch.randint(0, 50, (64, 2), generator=generator)
            loss = F.mse_loss(bag(ids), teacher[ids].sum(1))
            loss.backward()
            if optimizer is None:
                bag.apply_gradients(lr=3.0)
            else:
                optimizer.step()
                optimizer.zero_grad()
            losses.append(float(loss.detach()))
        return sum(losses[-20:]) / 20

    start = float((teacher[:, None] + teacher).square().mean())
    full = train(lambda: nn.EmbeddingBag(50, 8, mode="sum", _weight=torch.zeros(50, 8), sparse=True))
    ours = train(
        lambda: QuantizedEmbeddingBag(
            50,
            8,
            bits=8,
            period=1,
            master_dtype="int8",
            _weight=torch.zeros(50, 8),
            generator=torch.Generator().manual_seed(2),
        )
    )
    assert full < 0.01 * start
    assert ours < full + 0.002 * start


# -- linear layers ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("scale_per", ["channel", "matrix"])
@pytest.mark.parametrize("bias", [True, False])
def test_a_quantised_linear_equals_the_reference_and_its_packed_self(
    bits: int, scale_per: str, bias: bool, tmp_path: Path
) -> None:
    for dtype in (torch.float32, torch.float64):
        layer = QuantizedLinear(13, 5, bias, bits=bits, scale_per=scale_per, dtype=dtype)
        x = weights_like(0, 7, 13, dtype)
        per = "row" if scale_per == "channel" else "table"
        weight = loop_quantized(layer.weight, bits, per).requires_grad_()
        expected = F.linear(x, weight, layer.bias)
        out = layer(x)
        assert torch.equal(out, expected)
        upstream = weights_like(1, 7, 5, dtype)
        (gradient,) = torch.autograd.grad(expected, weight, upstream)
        out.backward(upstream)
        torch.testing.assert_close(layer.weight.grad, gradient)
        packed = layer.pack()
        path = tmp_path / f"{dtype}.safetensors"
        save_file(packed.state_dict(), path)
        loaded = PackedLinear(13, 5, bias, bits=bits, scale_per=scale_per, dtype=dtype)
        loaded.load_state_dict(load_file(path))
        assert torch.equal(packed(x), expected)
        assert torch.equal(loaded(x), expected)
        columns = {16: 26, 8: 13, 4: 7, 2: 4}[bits]
        floats = 5 * bias * expected.element_size() + 4 * (5 if scale_per == "channel" else 1)
        assert packed.memory_bytes() == 5 * columns + floats


def test_swapping_the_linears_of_a_model_shares_parameters_and_keeps_the_optimizer() -> None:
    shared = nn.Linear(4, 4)
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Sequential(shared, shared), nn.Linear(4, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    keys, before = list(model.state_dict()), [id(p) for p in model.parameters()]
    assert quantize_linears(model, 4, skip=["3"]) == ["0", "2.0", "2.1"]
    assert [type(m) for m in model] == [QuantizedLinear, nn.ReLU, nn.Sequential, nn.Linear]
    assert model[2][0] is model[2][1]
    assert list(model.state_dict()) == keys
    assert [id(p) for p in model.parameters()] == before
    weight = model[0].weight.detach().clone()
    model(torch.ones(2, 3)).sum().backward()
    optimizer.step()
    assert not torch.equal(model[0].weight, weight)


def test_a_model_of_quantised_parts_learns() -> None:
    torch.manual_seed(0)
    bag = QuantizedEmbeddingBag(30, 8, period=10, generator=torch.Generator().manual_seed(0))
    top = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 1))
    quantize_linears(top, 8)
    optimizer = torch.optim.SGD([*bag.parameters(), *top.parameters()], lr=0.3)
    ids = torch.arange(30)[:, None]
    labels = (torch.arange(30) % 3 == 0).float()
    for _ in range(300):
        optimizer.zero_grad()
        loss = F.binary_cross_entropy_with_logits(top(bag(ids)).squeeze(1), labels)
        loss.backward()
        optimizer.step()
    assert float(loss.detach()) < 0.1
    bag.eval()
    packed_top = nn.Sequential(top[0].pack(), nn.ReLU(), top[2].pack())
    assert torch.equal(packed_top(bag.pack()(ids)), top(bag(ids)))


# -- errors: expected, found, remedy ------------------------------------------------------------------------

IDS = torch.tensor([0, 1, 2])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"bits": 3}, "one of 16, 8, 4, 2.*found 3"),
        ({"period": 0}, "at least 1 step, found 0"),
        ({"mode": "median"}, "one of sum, mean, max, found 'median'"),
        ({"scale_per": "column"}, "one of table, row, found 'column'"),
        ({"master_dtype": "int4"}, "one of float32, int8, found 'int4'"),
        ({"padding_idx": 10}, r"within \[-10, 10\), found 10"),
        ({"dtype": torch.bfloat16}, "float32 or float64, found torch.bfloat16"),
        ({"_weight": torch.zeros(9, 3)}, r"shape \(10, 3\), found \(9, 3\)"),
        ({"_weight": torch.full((10, 3), torch.nan)}, "expected finite values, found 30"),
        ({"_weight": torch.full((10, 3), torch.inf), "master_dtype": "int8"}, "expected finite values"),
    ],
)
def test_a_bag_refuses_bad_arguments(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        QuantizedEmbeddingBag(10, 3, **arguments)


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


def test_packing_refuses_widths_that_do_not_fill_bytes_and_values_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="multiple of 2 to pack 4 bits, found 3; use 4 columns"):
        QuantizedEmbeddingBag(10, 3).pack()
    with pytest.raises(ValueError, match="multiple of 4 to pack 2 bits, found 6"):
        quantize_table(torch.ones(10, 6), 2)
    assert QuantizedEmbeddingBag(10, 3, bits=8).pack().memory_bytes() == 34
    with pytest.raises(ValueError, match=r"values in \[-8, 7\], found 0 to 8"):
        pack_int4(torch.tensor([0, 8], dtype=torch.int8))
    with pytest.raises(ValueError, match=r"expected int8, found torch\.int64"):
        pack_int2(torch.tensor([0, 0, 0, 0]))
    with pytest.raises(ValueError, match=r"expected uint8, found torch\.int8"):
        unpack_int4(torch.tensor([0], dtype=torch.int8))


def test_nan_weights_are_refused_where_they_are_met() -> None:
    bad = torch.tensor([[1.0, torch.nan]])
    for call in (
        lambda: quantize(bad, 1.0, 4),
        lambda: row_scales(bad, 4),
        lambda: table_scale(bad, 4),
        lambda: quantize_table(bad, 4),
    ):
        with pytest.raises(ValueError, match=r"expected finite values, found 1 .* \(0, 1\); lower the learning"):
            call()
    for scale_per in ("table", "row"):
        bag = QuantizedEmbeddingBag(4, 2, scale_per=scale_per, period=1)
        bag.weight.data[1] = torch.inf
        with pytest.raises(ValueError, match="expected finite values"):
            bag(torch.tensor([[1]]))
    layer = QuantizedLinear(2, 2)
    layer.weight.data[0] = torch.nan
    with pytest.raises(ValueError, match="expected finite values"):
        layer.pack()


def test_updates_are_checked_before_anything_changes() -> None:
    bag = QuantizedEmbeddingBag(10, 2, master_dtype="int8")
    before = bag.master.clone()
    with pytest.raises(IndexError, match="found 10"):
        bag.apply_update(torch.tensor([10]), torch.zeros(1, 2))
    with pytest.raises(ValueError, match=r"delta \(U, 2\), found \(1,\) and \(2, 2\)"):
        bag.apply_update(torch.tensor([1]), torch.zeros(2, 2))
    with pytest.raises(ValueError, match="delta: expected finite"):
        bag.apply_update(torch.tensor([1]), torch.full((1, 2), torch.nan))
    bag(torch.tensor([[1]])).mul(torch.inf).sum().backward()
    with pytest.raises(ValueError, match="gradient: expected finite"):
        bag.apply_gradients(lr=1.0)
    with pytest.raises(ValueError, match="one of sgd, rowwise_adagrad, found 'adam'"):
        bag.apply_gradients(lr=1.0, rule="adam")
    assert torch.equal(bag.master, before)
    with pytest.raises(ValueError, match="expected an int8 master"):
        QuantizedEmbeddingBag(10, 2).apply_gradients(lr=1.0)


def test_loading_integers_of_another_width_is_an_error_not_a_conversion() -> None:
    eight = quantize_table(torch.ones(4, 4), 8).state_dict()
    with pytest.raises(RuntimeError, match=r"expected torch\.uint8 for 4 bits, found torch\.int8"):
        PackedEmbeddingBag(4, 8, bits=4, scale_per="row").load_state_dict(eight)


def test_scales_and_layers_refuse_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match=r"one step per row, shape \(3,\), found shape \(2,\)"):
        quantize(torch.ones(3, 4), torch.ones(2), 4)
    with pytest.raises(ValueError, match="found 5"):
        max_level(5)
    with pytest.raises(ValueError, match="one of channel, matrix, found 'row'"):
        QuantizedLinear(2, 2, scale_per="row")
    with pytest.raises(ValueError, match=r"found \['7'\]"):
        quantize_linears(nn.Sequential(nn.Linear(2, 2)), skip=["7"])
    with pytest.raises(ValueError, match="from_linear"):
        quantize_linears(nn.Linear(2, 2))


def test_the_benchmark_runs_at_toy_size() -> None:
    toy = ["--rows", "500", "--dim", "4", "--batch", "16", "--steps", "2", "--tables", "3", "--contender"]
    command = [sys.executable, str(BENCHMARK), *toy, "int8 master"]
    environment = {"PYTHONPATH": str(BENCHMARK.parents[1])}
    answer = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert '"step_seconds"' in answer.stdout.splitlines()[-1]
