"""The quantised bag that trains, against a table quantised by a plain loop and `F.embedding_bag` over it."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from quantized_by_loop import BITS, LENGTHS, jagged, loop_quantized, settings_of, weights_like
from torch import nn

from slipstream.embedding.quantized import SWEEP_ROWS_PER_STEP, QuantizedEmbeddingBag
from slipstream.embedding.quantized.abs_max import PENDING_ROWS, AbsMaxTracker

# -- the bag: forward and gradients -------------------------------------------------------------------------


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


def test_only_looked_up_rows_are_in_the_sparse_gradient_and_padding_is_not() -> None:
    bag = QuantizedEmbeddingBag(1000, 4, padding_idx=7)
    bag(torch.tensor([[7, 3], [900, 3]])).sum().backward()
    assert bag.weight.grad.coalesce().indices().tolist() == [[3, 900]]


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


def test_rows_of_forwards_whose_gradients_accumulate_are_all_read() -> None:
    num_rows = SWEEP_ROWS_PER_STEP * 8
    bag = QuantizedEmbeddingBag(num_rows, 2, period=1, sparse=True, _weight=torch.ones(num_rows, 2))
    optimizer = torch.optim.SGD(bag.parameters(), lr=1.0)
    for row, slope in ((num_rows - 1, -9.0), (0, 1.0), (2, 1.0)):
        (bag(torch.tensor([[row]])) * slope).sum().backward()
    optimizer.step()
    bag(torch.tensor([[1]]))
    assert bag.scale == 10 / np.float32(7)


def test_an_int8_master_uses_its_largest_level() -> None:
    values = torch.tensor([[127.0, 1.0], [-127.0, 3.0], [63.5, 0.5], [128.0, 2.0]])
    assert torch.equal(QuantizedEmbeddingBag(4, 2, master_dtype="int8", _weight=values).master_rows(), values)


def test_a_weight_whose_values_were_put_elsewhere_is_read_anew() -> None:
    num_rows = SWEEP_ROWS_PER_STEP * 8
    bag = QuantizedEmbeddingBag(num_rows, 2, period=1, sparse=True, _weight=torch.ones(num_rows, 2))
    ids = torch.zeros(1, 1, dtype=torch.int64)
    bag(ids)
    assert bag.scale == 1 / np.float32(7)
    bag.weight.data = torch.full((num_rows, 2), 7.0)
    bag(ids)
    assert bag.scale == 1


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


@pytest.mark.parametrize("rule", ["sgd", "rowwise_adagrad", "adam"])
def test_fused_updates_of_an_int8_master_follow_the_formula(rule: str) -> None:
    weight = weights_like(0, 12, 8)
    bag = QuantizedEmbeddingBag(12, 8, master_dtype="int8", bits=8, _weight=weight)
    reference = bag.master_rows().clone()
    sums, first, second = torch.zeros(12), torch.zeros(12, 8), torch.zeros(12, 8)
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
        moved = table.grad * factor
        if rule == "adam":
            used = ids.unique()
            first[used] = 0.9 * first[used] + 0.1 * table.grad[used]
            second[used] = 0.999 * second[used] + 0.001 * table.grad[used] ** 2
            scale = 0.1 * (1 - 0.999 ** (step + 1)) ** 0.5 / (1 - 0.9 ** (step + 1))
            moved = torch.zeros(12, 8).index_copy(0, used, scale * first[used] / (second[used].sqrt() + 1e-8))
            # rows and state survive a copy
            state = bag.state_dict()
            bag = QuantizedEmbeddingBag(12, 8, master_dtype="int8", bits=8)
            bag.load_state_dict(state)
        reference = before - moved
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


# -- errors: expected, found, remedy ------------------------------------------------------------------------


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


@pytest.mark.parametrize("scale_per", ["table", "row"])
def test_weights_without_end_are_refused_where_they_are_met(scale_per: str) -> None:
    bag = QuantizedEmbeddingBag(4, 2, scale_per=scale_per, period=1)
    bag.weight.data[1] = torch.inf
    with pytest.raises(ValueError, match="expected finite values"):
        bag(torch.tensor([[1]]))


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
    with pytest.raises(ValueError, match=r"one of sgd, .*, found 'adamw'"):
        bag.apply_gradients(lr=1.0, rule="adamw")
    assert torch.equal(bag.master, before)
    with pytest.raises(ValueError, match="expected an int8 master"):
        QuantizedEmbeddingBag(10, 2).apply_gradients(lr=1.0)
