"""Bags against `nn.EmbeddingBag` with a padding index: pooled once, and trained wherever rows live."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from slipstream.embedding.duplicates import sum_duplicates
from slipstream.embedding.row_cache import RowCache
from slipstream.embedding.rules import OPTIMIZERS
from slipstream.embedding.tiers.lookahead import Batch, LookAhead, StagedBatch
from slipstream.embedding.tiers.placement import CachedRows, StagingHalves
from slipstream.embedding.tiers.rows import TieredRows, update_rows
from slipstream.embedding.tt.bag import TTEmbeddingBag
from slipstream.io.samples import Samples
from slipstream.schema import Bag
from slipstream.schema import Pooling as How
from slipstream.training.pooling import Pooling, StoredBags, describe_bags
from slipstream.training.representations import Representations, TableSpec
from slipstream.training.slot_layout import SlotLayout

DIM, LR, EPS, LENGTH = 3, 0.1, 1e-8, 3
SIZES = {"cat_0": 25, "cat_1": 6, "cat_2": 4}
"""A table of single values, then two of lists: columns 1, 3, 4 and 2, 5, 6."""
TABLE_OF_COLUMN = [0, 1, 2, 1, 1, 2, 2]
PADDING_ROWS = {"cat_1": 1, "cat_2": 3}
CPU = torch.device("cpu")


def bags(first: How, second: How) -> tuple[Bag, Bag]:
    return Bag(columns=(1, 3, 4), pooling=first), Bag(columns=(2, 5, 6), pooling=second)


@pytest.fixture(autouse=True)
def doubles() -> Iterator[None]:
    """What is computed here is computed in float64, so that 1e-12 means something."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def draw_rows(rng: np.random.Generator, num_samples: int) -> np.ndarray:
    """Rows of all columns: values first, then padding, as many of each as chance has it. Shape (n, 7)."""
    rows = np.stack([rng.integers(0, list(SIZES.values())[table], num_samples) for table in TABLE_OF_COLUMN], axis=1)
    for bag, padding in zip(bags("sum", "sum"), PADDING_ROWS.values(), strict=True):
        inside = rows[:, bag.columns]
        inside[inside == padding] = 0
        ends = np.arange(LENGTH) >= rng.integers(0, LENGTH + 1, num_samples)[:, None]
        rows[:, bag.columns] = np.where(ends, padding, inside)
    return rows


def pooled_by_torch(tables: list[nn.EmbeddingBag], rows: np.ndarray) -> Tensor:
    """What `nn.EmbeddingBag` makes of the same columns. Shape (n, 3, D)."""
    given = torch.from_numpy(rows)
    single, first, second = tables
    return torch.stack([single(given[:, :1]), first(given[:, [1, 3, 4]]), second(given[:, [2, 5, 6]])], dim=1)


def make_bags(how: tuple[How, How], weights: list[Tensor]) -> list[nn.EmbeddingBag]:
    padding = [None, *PADDING_ROWS.values()]
    return [
        nn.EmbeddingBag(*weight.shape, mode=mode, padding_idx=at, _weight=weight.clone(), sparse=True)
        for weight, mode, at in zip(weights, ("sum", *how), padding, strict=True)
    ]


def initial_weights(seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    weights = [torch.randn(size, DIM, generator=generator) for size in SIZES.values()]
    for weight, row in zip(weights[1:], PADDING_ROWS.values(), strict=True):
        weight[row] = 0.0
    return weights


hows = st.tuples(*[st.sampled_from(["sum", "mean"])] * 2)


@given(how=hows, seed=st.integers(0, 10_000), num_samples=st.integers(1, 9))
def test_bags_pool_as_embedding_bags_do_and_pass_gradients_back_as_they_do(how: Any, seed: int, num_samples: int):
    rows = draw_rows(np.random.default_rng(seed), num_samples)
    weights = initial_weights(seed)
    weights[1][0] = 0.0  # a value whose row is zero is a value
    tables = [weight.clone().requires_grad_() for weight in weights]
    columns = [tables[table][torch.from_numpy(rows[:, at])] for at, table in enumerate(TABLE_OF_COLUMN)]
    described = describe_bags(bags(*how), [list(SIZES)[table] for table in TABLE_OF_COLUMN], PADDING_ROWS)
    stored = StoredBags.of({"bags": described, "column_tables": TABLE_OF_COLUMN})
    assert stored is not None
    assert stored.num_fields == 3
    found = stored.pool(torch.stack(columns, dim=1), torch.from_numpy(rows))
    by_torch = make_bags(how, weights)
    expected = pooled_by_torch(by_torch, rows)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    upstream = torch.randn(found.shape, generator=torch.Generator().manual_seed(seed))
    found.backward(upstream)
    expected.backward(upstream)
    for ours, theirs in zip(tables, by_torch, strict=True):
        assert ours.grad is not None
        assert theirs.weight.grad is not None
        torch.testing.assert_close(ours.grad, theirs.weight.grad.to_dense(), rtol=0, atol=1e-12)


@given(how=hows, seed=st.integers(0, 10_000), num_samples=st.integers(1, 300), length=st.integers(1, 40))
def test_bags_add_up_as_embedding_bags_do_to_the_bit(how: Any, seed: int, num_samples: int, length: int):
    generator = torch.Generator().manual_seed(seed)
    table = torch.randn(50, 16, generator=generator, dtype=torch.float32)
    rows = torch.randint(0, 50, (num_samples, length), generator=generator)
    bag = Bag(columns=tuple(range(length)), pooling=how[0])
    found = Pooling([bag], num_columns=length).pool(table[rows], rows != 7)
    expected = nn.functional.embedding_bag(rows, table, mode=how[0], padding_idx=7)
    assert torch.equal(found[:, 0], expected)


def test_fields_stand_where_their_first_columns_are():
    pooling = Pooling([Bag(columns=(0, 2), pooling="sum")], num_columns=4)
    rows = torch.arange(4.0).view(1, 4, 1)
    assert pooling.num_fields == 3
    assert pooling.pool(rows, torch.ones(1, 2, dtype=torch.bool)).flatten().tolist() == [0 + 2, 1, 3]


def test_without_bags_rows_are_passed_on_themselves():
    rows = torch.rand(2, 4, 3)
    assert Pooling((), num_columns=4).pool(rows, None) is rows


# --- trained, wherever rows live -----------------------------------------------------------------------------


def gradient_of(pooled: Tensor, labels: Tensor) -> Tensor:
    """Depend on what was pooled, so that one wrong row or count shows for good."""
    return pooled * 0.3 + labels.view(-1, 1, 1) * 0.01


def plain_training(how: Any, batches: list[np.ndarray], optimizer: str) -> list[Tensor]:
    """`nn.EmbeddingBag` and torch's optimizers, one step after the other; tables at the end."""
    tables = make_bags(how, initial_weights(7))
    parameters = [table.weight for table in tables]
    sums = [torch.zeros(len(weight)) for weight in parameters]
    made = {
        "sgd": lambda: torch.optim.SGD(parameters, lr=LR),
        "adagrad": lambda: torch.optim.Adagrad(parameters, lr=LR, eps=EPS),
        "adam": lambda: torch.optim.SparseAdam(parameters, lr=LR, eps=EPS),
    }.get(optimizer, lambda: None)()
    for number, rows in enumerate(batches):
        for weight in parameters:
            weight.grad = None
        pooled = pooled_by_torch(tables, rows)
        pooled.backward(gradient_of(pooled.detach(), torch.full((len(rows),), float(number))))
        if made is not None:
            with torch.sparse.check_sparse_tensor_invariants(enable=True):
                made.step()
            continue
        for weight, total in zip(parameters, sums, strict=True):
            assert weight.grad is not None
            dense = weight.grad.to_dense()
            total += dense.square().mean(dim=1)
            weight.data -= LR * dense / (total.sqrt() + EPS).unsqueeze(1)
    return [weight.detach() for weight in parameters]


def trained_in_tiers(
    how: Any, batches: list[np.ndarray], optimizer: str, *, num_hot: int, placement: str, chunk_batches: int, seed: int
) -> list[Tensor]:
    """The same through slots, tiers, look-ahead and representations."""
    num_rows, cuts = sum(SIZES.values()), np.cumsum([0, *SIZES.values()])
    slots = np.random.default_rng(seed).permutation(num_rows).astype(np.int32)
    slot_maps = {name: slots[start:stop] for name, (start, stop) in zip(SIZES, pairwise(cuts), strict=True)}
    layout = SlotLayout(slot_maps, num_hot=num_hot, table_of_column=TABLE_OF_COLUMN)
    rows = TieredRows(
        num_rows=num_rows,
        num_hot=num_hot,
        embedding_dim=DIM,
        num_staged=num_rows - num_hot if placement == "cache" else 2 * (num_rows - num_hot),
        optimizer=optimizer,
        device=CPU,
    )
    for table, weights in zip(slot_maps.values(), initial_weights(7), strict=True):
        rows.load(torch.from_numpy(table), weights)
    representations = Representations(
        [TableSpec(name=name, num_rows=size) for name, size in SIZES.items()],
        layout=layout,
        embedding_dim=DIM,
        optimizer=optimizer,
        eps=EPS,
        seed=0,
        device=CPU,
        bags=bags(*how),
        padding_rows=PADDING_ROWS,
    )
    is_cached = placement == "cache"
    where = CachedRows(rows, RowCache(num_rows, num_rows, policy="lfu")) if is_cached else StagingHalves(rows)
    lookahead = LookAhead(rows, where, chunk_batches=chunk_batches, padding=representations.padded)
    num_steps = torch.zeros(())

    def step(batch: StagedBatch) -> None:
        num_steps.add_(1)
        found = batch.find_distinct(padding=rows.padding(batch.num_lookups()))
        values = rows.buffer[found.rows]
        looked_up = values[found.inverse].requires_grad_()
        pooled = representations.train(looked_up.view(len(batch), -1, DIM), None, batch.is_value)
        pooled.backward(gradient_of(pooled.detach(), batch.labels))
        assert looked_up.grad is not None
        summed = sum_duplicates(looked_up.grad, found.inverse, len(found.rows), order=found.order, starts=found.starts)
        rule = OPTIMIZERS.get(optimizer)(eps=EPS)
        place = (rule, rows.buffer, rows.buffer_state, found.rows, values, summed)
        update_rows(*place, lr=torch.tensor(LR), num_steps=num_steps)

    staged = []
    for number, of_batch in enumerate(batches):
        slots_of = np.stack(
            [slot_maps[list(SIZES)[table]][of_batch[:, at]] for at, table in enumerate(TABLE_OF_COLUMN)], axis=1
        )
        labels = np.full(len(of_batch), float(number))
        staged.append(Batch(dense=np.zeros((len(of_batch), 1)), slots=slots_of, labels=labels, is_hot=False))
    lookahead.run(iter(staged), step)
    lookahead.flush()
    num_values = sum(
        int((of_batch[:, at] != PADDING_ROWS.get(list(SIZES)[table], -1)).sum())
        for of_batch in batches
        for at, table in enumerate(TABLE_OF_COLUMN)
    )
    assert lookahead.lookups == num_values
    if num_hot == 0:
        assert lookahead.cold_lookups == num_values
    looked_up_again = representations.look_up(rows, staged[0].slots)
    tables = [rows.gather(torch.from_numpy(table)) for table in slot_maps.values()]
    torch.testing.assert_close(looked_up_again, pooled_by_torch(make_bags(how, tables), batches[0]), rtol=0, atol=1e-12)
    return tables


@pytest.mark.parametrize("optimizer", OPTIMIZERS.names())
@pytest.mark.parametrize("placement", ["halves", "cache"])
@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(how=hows, sizes=st.lists(st.integers(1, 5), min_size=1, max_size=5), seed=st.integers(0, 10_000), data=st.data())
def test_training_lists_in_tiers_equals_a_plain_loop_over_embedding_bags(
    placement: str, optimizer: str, how: Any, sizes: list[int], seed: int, data: st.DataObject
):
    rng = np.random.default_rng(seed)
    batches = [draw_rows(rng, size) for size in sizes]
    num_rows = sum(SIZES.values())
    num_hot = 0 if placement == "cache" else data.draw(st.integers(0, num_rows), label="hot rows")
    found = trained_in_tiers(
        how,
        batches,
        optimizer,
        num_hot=num_hot,
        placement=placement,
        chunk_batches=data.draw(st.integers(1, 3), label="chunk"),
        seed=seed,
    )
    for ours, theirs in zip(found, plain_training(how, batches, optimizer), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


@pytest.mark.parametrize("optimizer", OPTIMIZERS.names())
def test_cores_learn_from_lists_what_they_learn_from_bags_of_values_alone(optimizer: str):
    """No slice of a core moves for padding, not even by a moment of Adam's."""
    names, cuts = list(SIZES), np.cumsum([0, *SIZES.values()])
    slot_maps = {name: np.arange(start, stop) for name, (start, stop) in zip(names, pairwise(cuts), strict=True)}
    layout = SlotLayout(slot_maps, num_hot=int(cuts[-1]), table_of_column=TABLE_OF_COLUMN, tierless={"cat_1"})
    representations = Representations(
        [
            TableSpec(name=name, num_rows=size, representation="tt" if name == "cat_1" else "dense", tt_ranks=(2,))
            for name, size in SIZES.items()
        ],
        layout=layout,
        embedding_dim=DIM,
        optimizer=optimizer,
        eps=EPS,
        seed=0,
        device=CPU,
        bags=bags("mean", "sum"),
        padding_rows=PADDING_ROWS,
    )
    cores = representations.bags["cat_1"]
    alone = TTEmbeddingBag(SIZES["cat_1"], DIM, [2], optimizer=optimizer, eps=EPS, mode="mean")
    alone.load_state_dict(cores.state_dict())
    rng = np.random.default_rng(5)
    for number in range(6):
        rows = draw_rows(rng, 4)
        if number == 3:
            rows[:, [1, 3, 4]] = PADDING_ROWS["cat_1"]
        samples = Samples(X_int=np.zeros((4, 1)), X_cat=rows + cuts[TABLE_OF_COLUMN], y=np.zeros(4))
        slots = layout.translate(samples).X_cat
        assert representations.padded is not None
        is_value = torch.from_numpy(representations.padded.find_values(slots))
        tierless = torch.from_numpy(np.delete(slots, layout.columns, axis=1))
        representations.begin_step(LR)
        alone.set_learning_rate(LR)
        found = representations.train(torch.zeros(4, len(layout.columns), DIM), tierless, is_value)[:, 1]
        values = [row[row != PADDING_ROWS["cat_1"]] for row in rows[:, [1, 3, 4]]]
        starts = torch.from_numpy(np.cumsum([0, *map(len, values)])[:-1])
        expected = alone(torch.from_numpy(np.concatenate(values)), starts)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
        for pooled in (found, expected):
            pooled.backward(gradient_of(pooled.detach().unsqueeze(1), torch.full((4,), float(number)))[:, 0])
    for ours, theirs in zip(cores.tt_cores, alone.tt_cores, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
