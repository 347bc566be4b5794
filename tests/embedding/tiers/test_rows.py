from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import state_of

from slipstream.embedding.duplicates import sum_duplicates
from slipstream.embedding.rules import OPTIMIZERS
from slipstream.embedding.tiers.rows import NUM_SPARE, TieredRows, update_rows


def make_tiers(num_rows: int, num_hot: int, optimizer: str = "rowwise_adagrad", dim: int = 2) -> TieredRows:
    return TieredRows(
        num_rows=num_rows,
        num_hot=num_hot,
        embedding_dim=dim,
        num_staged=4,
        optimizer=optimizer,  # type: ignore[arg-type]
        device=torch.device("cpu"),
    )


@given(st.integers(1, 20), st.data())
def test_rows_and_state_are_found_wherever_they_live(num_rows: int, data):
    optimizer = data.draw(st.sampled_from(OPTIMIZERS.names()))
    rows = make_tiers(num_rows, data.draw(st.integers(0, num_rows)), optimizer)
    order = torch.tensor(data.draw(st.permutations(range(num_rows))))
    weights = torch.randn(num_rows, 2)
    state = [torch.rand(shape) for shape in rows.rule.state_shapes(weights.shape).values()]
    rows.load(order, weights, state)
    asked = torch.tensor(data.draw(st.lists(st.integers(0, num_rows - 1), max_size=10)), dtype=torch.int64)
    place = torch.empty(num_rows, dtype=torch.int64)
    place[order] = torch.arange(num_rows)
    assert torch.equal(rows.gather(asked), weights[place[asked]])
    for found, kept in zip(state_of(rows, asked), state, strict=True):
        assert torch.equal(found, kept[place[asked]])
    assert len(rows.cold) == num_rows - rows.num_hot
    assert rows.first_spare == rows.num_hot + 4
    assert set(rows.padding(5000).tolist()) == set(range(rows.first_spare, len(rows.buffer)))


@pytest.mark.parametrize("num_hot", [-1, 6])
def test_hot_rows_are_some_of_all_rows(num_hot: int):
    with pytest.raises(ValueError, match="expected 0 to 5 hot rows"):
        make_tiers(5, num_hot)


@pytest.mark.parametrize(("optimizer", "per_row"), [("sgd", 8), ("rowwise_adagrad", 12), ("adam", 24)])
def test_bytes_add_up_over_the_tiers(optimizer: str, per_row: int):
    rows = make_tiers(10, 3, optimizer)
    assert rows.bytes_per_tier() == {"hot": 3 * per_row, "staging": 4 * per_row, "cold": 7 * per_row}
    assert rows.row_bytes == per_row
    tensors = [tensor for pair in rows.pairs for tensor in pair]
    held = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    assert sum(rows.bytes_per_tier().values()) == held - NUM_SPARE * per_row


def test_an_update_reads_and_writes_the_rows_it_names_alone():
    rule = OPTIMIZERS.get("rowwise_adagrad")(eps=1e-8)
    weights, state = torch.randn(6, 4), torch.rand(6)
    before, sums = weights.clone(), state.clone()
    positions, gradients, lr = torch.tensor([4, 1]), torch.randn(2, 4), torch.tensor(0.1)
    update_rows(rule, weights, [state], positions, weights[positions], gradients.clone(), lr=lr)
    sums[positions] += gradients.square().mean(dim=1)
    before[positions] -= lr * (gradients / (sums[positions].sqrt() + 1e-8).unsqueeze(1))
    torch.testing.assert_close(weights, before)
    torch.testing.assert_close(state, sums)
    others = [0, 2, 3, 5]
    assert torch.equal(weights[others], before[others])


def test_sgd_over_tiers_equals_an_embedding_bag_of_torch():
    torch.manual_seed(0)
    bag = torch.nn.EmbeddingBag(9, 4, mode="sum")
    weights = bag.weight.detach().clone()
    slots = torch.tensor([[0, 8], [8, 8], [3, 1]])
    bag(slots).pow(2).sum().backward()
    pooled = weights[slots].sum(dim=1)
    gradients = (2 * pooled).repeat_interleave(2, dim=0)
    unique, inverse = torch.unique(slots.flatten(), return_inverse=True)
    summed = sum_duplicates(gradients, inverse, len(unique))
    update_rows(OPTIMIZERS.get("sgd")(), weights, [], unique, weights[unique], summed, lr=torch.tensor(0.5))
    with torch.no_grad():
        bag.weight -= 0.5 * bag.weight.grad
    torch.testing.assert_close(weights, bag.weight.detach())
