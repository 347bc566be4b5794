"""Rows read and written in place: equal to a plain loop to the bit, ordered on every stream, safe beside a reader."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from fake_cuda import FakeCuda
from hypothesis import given
from hypothesis import strategies as st
from strategies import slot_batches, state_of
from torch import Tensor

from slipstream.embedding.duplicates import sort_lookups, sum_duplicates
from slipstream.embedding.rules import OPTIMIZERS
from slipstream.embedding.tiers.batch_plan import BatchPlan, RowsInPlace
from slipstream.embedding.tiers.in_place import InPlace
from slipstream.embedding.tiers.lookahead import Batch, StagedBatch
from slipstream.embedding.tiers.mapped import CannotMapError, map_to_device, zeros_in_own_pages
from slipstream.embedding.tiers.rows import TieredRows

CPU, DIM = torch.device("cpu"), 3


def make_rows(num_rows: int, num_hot: int, lookups: int, *, optimizer: str, device: torch.device = CPU) -> TieredRows:
    rows = TieredRows(
        num_rows=num_rows,
        num_hot=num_hot,
        embedding_dim=DIM,
        num_staged=2 * min(lookups, num_rows - num_hot),
        optimizer=optimizer,
        device=device,
    )
    weights = torch.randn(num_rows, DIM, generator=torch.Generator().manual_seed(0))
    state = [torch.full((num_rows, *held.shape[1:]), 0.25) for held in rows.cold_state]
    rows.load(torch.arange(num_rows), weights, state)
    return rows


def make_in_place(rows: TieredRows, *, batch_size: int, num_columns: int, **options: Any) -> InPlace:
    return InPlace(
        rows,
        map_to_device(rows.on_host, rows.device),
        batch_size=batch_size,
        num_columns=num_columns,
        most_distinct=batch_size * num_columns,
        **options,
    )


def make_batches(slots: list[np.ndarray], *, weighted: bool = False) -> Iterator[Batch]:
    rng = np.random.default_rng(7)
    for one in slots:
        yield Batch(
            dense=rng.random((len(one), 2), np.float32),
            slots=one,
            labels=rng.random(len(one), np.float32),
            is_hot=False,
            weights=rng.random(len(one), np.float32) + 0.5 if weighted else None,
        )


def gradients_of(looked_up: Tensor, dense: Tensor, labels: Tensor, weights: Tensor | None) -> Tensor:
    """What depends on every row, every sample and every weight."""
    per_sample = dense.sum(dim=1) - labels
    per_sample = per_sample if weights is None else per_sample * weights
    per_lookup = per_sample.repeat_interleave(len(looked_up) // len(labels), output_size=len(looked_up))
    return torch.sin(looked_up) * per_lookup.unsqueeze(1)


class Stepper:
    """Updates the rows of every batch in place."""

    def __init__(self, rows: TieredRows) -> None:
        self._rule = rows.rule(eps=1e-6)
        self._lr = torch.full((), 0.1, device=rows.device)
        self._num_steps = torch.zeros((), dtype=torch.float64, device=rows.device)

    def __call__(self, batch: StagedBatch) -> None:
        in_place = batch.in_place
        assert in_place is not None
        self._num_steps += 1
        in_place.begin()
        looked_up = in_place.plan.look_up(batch.num_lookups())
        gradients = gradients_of(looked_up, batch.dense, batch.labels, batch.weights)
        weights = None
        if batch.weights is not None:
            of_lookups = batch.weights.repeat_interleave(in_place.num_columns, output_size=len(looked_up))
            sums = in_place.plan.sum_by_row(torch.stack([of_lookups, of_lookups.square()], dim=1))
            weights = (sums[:, 1] / sums[:, 0]).nan_to_num(1.0)
        options = {"lr": self._lr, "num_steps": self._num_steps, "sample_weights": weights}
        in_place.plan.update(self._rule, gradients, **options)
        in_place.end()


def train_plainly(rows: TieredRows, batches: Iterator[Batch]) -> list[Tensor]:
    """The same over one tensor of all rows, one batch after the other."""
    rule = rows.rule(eps=1e-6)
    everything = torch.arange(rows.num_rows)
    weights, state = rows.gather(everything).cpu(), state_of(rows, everything)
    for number, batch in enumerate(batches, start=1):
        found = sort_lookups(batch.slots.ravel())
        order, starts, inverse = (torch.from_numpy(part) for part in (found.order, found.starts, found.inverse))
        distinct = torch.from_numpy(found.unique.astype(np.int64))

        def sum_by_row(values: Tensor, order=order, starts=starts, inverse=inverse) -> Tensor:
            return sum_duplicates(values, inverse, len(starts), order=order, starts=starts)

        given_weights = None if batch.weights is None else torch.from_numpy(batch.weights)
        dense, labels = torch.from_numpy(batch.dense), torch.from_numpy(batch.labels)
        gradients = gradients_of(weights[distinct][inverse], dense, labels, given_weights)
        behind = None
        if given_weights is not None:
            of_lookups = given_weights.repeat_interleave(batch.slots.shape[1])
            sums = sum_by_row(torch.stack([of_lookups, of_lookups.square()], dim=1))
            behind = sums[:, 1] / sums[:, 0]
        taken = torch.tensor(float(number), dtype=torch.float64)
        moves = rule.row_directions(state, distinct, sum_by_row(gradients), num_steps=taken, sample_weights=behind)
        weights[distinct] -= 0.1 * moves
    return [weights, *state]


def everything_of(rows: TieredRows) -> list[Tensor]:
    every = torch.arange(rows.num_rows)
    return [rows.gather(every).cpu(), *state_of(rows, every)]


@given(
    drawn=slot_batches(),
    hot_share=st.sampled_from([0.0, 0.3, 1.0]),
    optimizer=st.sampled_from(OPTIMIZERS.names()),
    weighted=st.booleans(),
    cut=st.integers(0, 12),
)
def test_rows_in_place_end_as_in_a_plain_loop_to_the_bit(
    drawn: tuple[int, list[np.ndarray]], hot_share: float, optimizer: str, weighted: bool, cut: int
):
    num_rows, slots = drawn
    batch_size, num_columns = max(map(len, slots)), slots[0].shape[1]
    rows = make_rows(num_rows, round(hot_share * num_rows), batch_size * num_columns, optimizer=optimizer)
    expected = train_plainly(rows, make_batches(slots, weighted=weighted))

    in_place, step = make_in_place(rows, batch_size=batch_size, num_columns=num_columns), Stepper(rows)
    assert not any(in_place.counters().values())
    batches = list(make_batches(slots, weighted=weighted))
    in_place.run(iter(batches[:cut]), step)
    in_place.run(iter(batches[cut:]), step)
    in_place.flush()

    for found, wanted in zip(everything_of(rows), expected, strict=True):
        assert torch.equal(found, wanted)
    lookups = np.concatenate([one.ravel() for one in slots])
    counters = in_place.counters()
    assert counters["lookups"] == len(lookups)
    assert counters["cold_lookups"] == np.count_nonzero(lookups >= rows.num_hot)
    num_cold = [len(np.unique(one[one >= rows.num_hot])) for one in slots]
    assert counters["bytes_to_host"] == sum(num_cold) * rows.row_bytes


def test_rows_that_two_batches_share_are_not_fetched_again():
    rows = make_rows(20, 5, 4, optimizer="sgd")
    slots = [[[6, 7], [8, 0]], [[7, 8], [9, 7]], [[1, 2], [3, 4]], [[7, 7], [7, 7]]]
    in_place = make_in_place(rows, batch_size=2, num_columns=2)
    in_place.run(make_batches([np.array(one, np.int32) for one in slots]), Stepper(rows))
    assert in_place.bytes_to_device == (3 + 1 + 0 + 1) * rows.row_bytes
    assert in_place.bytes_to_host == (3 + 3 + 0 + 1) * rows.row_bytes


# --- in order --------------------------------------------------------------------------------------------------

NUM_ROWS, BATCH, COLUMNS = 300, 8, 3
HOT_ROWS = {"resident": NUM_ROWS, "slipstream": 40, "baseline": 0}


def draw_slots(num_batches: int) -> list[np.ndarray]:
    """Popular rows are in every batch, hot and cold; every fifth batch is short."""
    rng = np.random.default_rng(1)
    sizes = [BATCH - 3 * (number % 5 == 4) for number in range(num_batches)]
    drawn = [NUM_ROWS ** rng.random((size, COLUMNS)) for size in sizes]
    return [np.minimum(one, NUM_ROWS - 1).astype(np.int32) for one in drawn]


def train(mode: str, device: torch.device, *, read_beside: bool = True) -> Any:
    """Several runs; a checkpoint is read block by block between the steps of the second, and the rest evaluated."""
    rows = make_rows(NUM_ROWS, HOT_ROWS[mode], BATCH * COLUMNS, optimizer="rowwise_adagrad", device=device)
    in_place, step = make_in_place(rows, batch_size=BATCH, num_columns=COLUMNS), Stepper(rows)
    batches = list(make_batches(draw_slots(16), weighted=True))
    read: list[Any] = []
    readers: list[Iterator[np.ndarray]] = []

    def checkpoint() -> None:
        if read_beside and not readers:
            frozen = in_place.freeze()
            read.append(everything_of(rows))
            for part in (*frozen.hot, *frozen.cold):
                part.block_rows = 30
                readers.append(part.blocks())
        for reader in readers:
            read.append(next(reader, None))

    in_place.run(iter(batches[:4]), step)
    in_place.run(iter(batches[4:13]), step, between_chunks=checkpoint)
    in_place.thaw()
    in_place.flush()
    read.append([rows.cold.clone(), *everything_of(rows)])
    in_place.run(iter(batches[13:]), step)
    in_place.flush()
    counted = {name: count for name, count in in_place.counters().items() if not name.endswith("seconds")}
    return [everything_of(rows), counted, read]


@pytest.mark.parametrize("mode", HOT_ROWS)
def test_whatever_is_read_in_place_is_ordered_after_what_wrote_it(mode: str, cuda: torch.device):
    on_cpu, there = train(mode, CPU), train(mode, cuda)
    torch.testing.assert_close(there[0], on_cpu[0], rtol=1e-5, atol=1e-6)
    assert there[1] == on_cpu[1]


@pytest.mark.parametrize("mode", HOT_ROWS)
def test_a_checkpoint_read_beside_training_is_of_one_moment(mode: str):
    rows = make_rows(NUM_ROWS, HOT_ROWS[mode], BATCH * COLUMNS, optimizer="rowwise_adagrad")
    in_place = make_in_place(rows, batch_size=BATCH, num_columns=COLUMNS)
    pieces: list[list[np.ndarray]] = []
    readers: list[Iterator[np.ndarray]] = []
    then: list[Tensor] = []

    def checkpoint() -> None:
        if not readers:
            then.extend(everything_of(rows))
            frozen = in_place.freeze()
            for part in (*frozen.hot, *frozen.cold):
                part.block_rows = 30
                readers.append(part.blocks())
                pieces.append([])
        for piece, reader in zip(pieces, readers, strict=True):
            piece.extend(block for block in [next(reader, None)] if block is not None)

    in_place.run(make_batches(draw_slots(16)), Stepper(rows), between_chunks=checkpoint)
    for piece, reader in zip(pieces, readers, strict=True):
        piece.extend(reader)
    half = len(pieces) // 2
    for hot, cold, wanted in zip(pieces[:half], pieces[half:], then, strict=True):
        assert np.array_equal(np.concatenate([*hot, *cold]), wanted.numpy())
    assert not torch.equal(everything_of(rows)[0], then[0])


def test_what_was_frozen_is_closed_once():
    rows = make_rows(NUM_ROWS, HOT_ROWS["slipstream"], BATCH * COLUMNS, optimizer="sgd")
    in_place, closed = make_in_place(rows, batch_size=BATCH, num_columns=COLUMNS), []
    in_place.freeze().close = lambda: closed.append("now")  # type: ignore[method-assign]
    in_place.thaw()
    in_place.thaw()
    assert closed == ["now"]


@pytest.mark.parametrize(
    ("owner", "what_keeps_order"),
    [(RowsInPlace, "begin"), (RowsInPlace, "end"), (InPlace, "flush"), (BatchPlan, "take_over")],
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)
def test_without_what_keeps_order_there_is_none(
    owner: type, what_keeps_order: str, fake_cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch
):
    def begin(one: RowsInPlace) -> None:
        with torch.cuda.stream(one.side):
            one._read_ahead()

    broken = {
        "begin": begin,
        "end": lambda one: (one.plan.write_back(), one.following.take_over(one.plan)),
        "flush": lambda one: None,
        "take_over": lambda one, before: None,
    }
    expected = train("slipstream", CPU)
    monkeypatch.setattr(owner, what_keeps_order, broken[what_keeps_order])
    found = train("slipstream", torch.device("cuda"))
    is_off = not all(torch.allclose(a, b, rtol=1e-4) for a, b in zip(found[0], expected[0], strict=True))
    assert fake_cuda.races or is_off
    assert (what_keeps_order == "take_over") == is_off


# --- memory that the device reads --------------------------------------------------------------------------------


def test_the_host_neither_waits_nor_allocates_pinned_memory_for_a_batch(fake_cuda: FakeCuda):
    rows = make_rows(NUM_ROWS, 40, BATCH * COLUMNS, optimizer="sgd", device=torch.device("cuda"))
    in_place, step = make_in_place(rows, batch_size=BATCH, num_columns=COLUMNS), Stepper(rows)
    del fake_cuda.pageable_copies[:], fake_cuda.pinned_bytes[:]
    in_place.run(make_batches(draw_slots(12)), step)
    assert fake_cuda.pageable_copies == fake_cuda.pinned_bytes == fake_cuda.spins == []


def test_host_rows_are_locked_where_they_lie_and_let_go_with_the_last_view(fake_cuda: FakeCuda):
    host = [zeros_in_own_pages((5, DIM)), zeros_in_own_pages((5,))]
    views = map_to_device(host, torch.device("cuda"))
    assert fake_cuda.locked == {tensor.data_ptr(): tensor.nbytes for tensor in host}
    assert [view.data_ptr() for view in views] == [tensor.data_ptr() for tensor in host]
    assert len({tensor.data_ptr() // 4096 for tensor in host}) == 2  # no page is shared
    views.pop()
    assert fake_cuda.locked == {host[0].data_ptr(): host[0].nbytes}
    views.pop()
    assert not fake_cuda.locked


def test_memory_that_cannot_be_locked_is_said_and_none_stays_locked(fake_cuda: FakeCuda):
    host = [zeros_in_own_pages((5, DIM)), zeros_in_own_pages((5,))]
    lock, fake_cuda.lock_error = fake_cuda.cudaHostRegister, 2
    with pytest.raises(CannotMapError, match=r"60 bytes of host memory cannot be mapped.*answers 2"):
        map_to_device(host, torch.device("cuda"))
    fake_cuda.lock_error = 0
    answers = iter([0, 2])
    fake_cuda.cudaHostRegister = lambda *given: lock(*given) or next(answers)  # type: ignore[method-assign]
    fake_cuda.locked[host[1].data_ptr()] = 0
    with pytest.raises(CannotMapError, match="20 bytes"):
        map_to_device(host, torch.device("cuda"))
    assert host[0].data_ptr() not in fake_cuda.locked
