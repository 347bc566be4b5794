"""Look-ahead against a plain loop over one dense table: equal to the bit, whatever moves when."""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import slot_batches, state_of
from torch import Tensor

from slipstream.embedding.duplicates import sum_duplicates
from slipstream.embedding.row_cache import RowCache
from slipstream.embedding.rules import OPTIMIZERS
from slipstream.embedding.tiers.lookahead import Batch, LookAhead, StagedBatch
from slipstream.embedding.tiers.on_disk import DiskRows
from slipstream.embedding.tiers.placement import CachedRows, StagingHalves, StagingOverflowError
from slipstream.embedding.tiers.rows import TieredRows, update_rows

DIM, LR, EPS = 3, torch.tensor(0.1), 1e-8


def make_batches(slots: Sequence[np.ndarray]) -> list[Batch]:
    """Batches whose labels number the samples from 0 on."""
    starts = np.cumsum([0, *map(len, slots)])
    return [
        Batch(
            dense=np.zeros((len(piece), 1), np.float32),
            slots=piece,
            labels=np.arange(start, start + len(piece), dtype=np.float32),
            is_hot=False,
        )
        for piece, start in zip(slots, starts, strict=False)
    ]


def initial_table(num_rows: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(num_rows)
    return torch.randn(num_rows, DIM, generator=generator), torch.rand(num_rows, generator=generator)


def make_tiers(num_rows: int, num_hot: int, num_staged: int, optimizer: str, *, on_disk: bool = False) -> TieredRows:
    kind = partial(DiskRows, folder=Path(tempfile.gettempdir())) if on_disk else TieredRows
    rows = kind(
        num_rows=num_rows,
        num_hot=num_hot,
        embedding_dim=DIM,
        num_staged=num_staged,
        optimizer=optimizer,  # type: ignore[arg-type]
        device=torch.device("cpu"),
    )
    weights, state = initial_table(num_rows)
    rows.load(torch.arange(num_rows), weights, [state] if optimizer == "rowwise_adagrad" else [])
    return rows


def make_lookahead(
    rows: TieredRows,
    *,
    chunk_batches: int,
    placement: str = "halves",
    in_thread: bool = True,
    sorts_all: bool = True,
) -> LookAhead:
    options = {"chunk_batches": chunk_batches, "in_thread": in_thread, "sorts_all": sorts_all}
    if placement == "halves":
        return LookAhead(rows, StagingHalves(rows), **options)  # type: ignore[arg-type]
    cache = RowCache(rows.num_cold, rows.num_staged, policy=placement)  # type: ignore[arg-type]
    return LookAhead(rows, CachedRows(rows, cache), **options)  # type: ignore[arg-type]


def gradients_of(looked_up: Tensor, labels: Tensor) -> Tensor:
    """Depend on the rows as they are and on which sample asks, so that one stale read shows for good."""
    per_sample = len(looked_up) // len(labels)
    return looked_up * 0.3 + labels.repeat_interleave(per_sample).unsqueeze(1) * 0.01


def trainer_of(rows: TieredRows):
    def step(batch: StagedBatch) -> None:
        found = batch.find_distinct(padding=rows.padding(batch.num_lookups()))
        values = rows.buffer[found.rows]
        gradients = gradients_of(values[found.inverse], batch.labels)
        summed = sum_duplicates(gradients, found.inverse, len(found.rows), order=found.order, starts=found.starts)
        update_rows(rows.rule(eps=EPS), rows.buffer, rows.buffer_state, found.rows, values, summed, lr=LR)

    return step


def plain_loop(num_rows: int, batches: Sequence[Batch], optimizer: str) -> tuple[Tensor, Tensor]:
    """The same training on one dense table, one lookup after the other."""
    weights, state = initial_table(num_rows)
    for batch in batches:
        slots = batch.slots.ravel().tolist()
        gradients = gradients_of(weights[slots], torch.from_numpy(batch.labels))
        sums: dict[int, Tensor] = {}
        for slot, gradient in zip(slots, gradients, strict=True):
            sums[slot] = sums[slot] + gradient if slot in sums else gradient
        distinct = torch.tensor(list(sums))
        update_rows(
            OPTIMIZERS.get(optimizer)(eps=EPS),
            weights,
            [state] if optimizer == "rowwise_adagrad" else [],
            distinct,
            weights[distinct],
            torch.stack(list(sums.values())),
            lr=LR,
        )
    return weights, state


def table_of(rows: TieredRows) -> tuple[Tensor, Tensor | None]:
    everything = torch.arange(rows.num_rows)
    return rows.gather(everything), state_of(rows, everything)[0] if rows.buffer_state else None


def as_records(parts: Sequence[Tensor]) -> Tensor:
    """What travels with rows side by side, however it was kept."""
    return torch.cat([part.view(len(part), -1) for part in parts], dim=1) if parts else torch.zeros(0)


def cold_rows_of(batch: Batch, num_hot: int) -> set[int]:
    return {slot for slot in batch.slots.ravel().tolist() if slot >= num_hot}


@pytest.mark.parametrize("placement", ["halves", "rank", "lfu"])
@pytest.mark.parametrize("optimizer", ["sgd", "rowwise_adagrad"])
@settings(max_examples=60)
@given(drawn=slot_batches(), data=st.data())
def test_any_placement_equals_a_plain_loop_to_the_bit(placement: str, optimizer: str, drawn, data):
    num_rows, slots = drawn
    num_hot = data.draw(st.integers(0, num_rows if placement == "halves" else num_rows - 1), label="hot rows")
    batches = make_batches(slots)
    largest = max(len(cold_rows_of(batch, num_hot)) for batch in batches)
    half = data.draw(st.integers(max(largest, 1), max(largest, 1) + 6), label="half")
    num_staged = 2 * half if placement == "halves" else min(2 * half, num_rows - num_hot)
    chunk_batches = data.draw(st.integers(1, 5), label="chunk")
    cut = data.draw(st.integers(0, len(batches)), label="second call from")
    flushes = data.draw(st.booleans(), label="flush between")
    on_disk = data.draw(st.booleans(), label="cold rows in a file")
    rows = make_tiers(num_rows, num_hot, num_staged, optimizer, on_disk=on_disk)
    in_thread = data.draw(st.booleans(), label="in a thread")
    lookahead = make_lookahead(
        rows,
        chunk_batches=chunk_batches,
        placement=placement,
        in_thread=in_thread,
        sorts_all=data.draw(st.booleans(), label="the host sorts all"),
    )
    assert lookahead._in_thread == in_thread
    fits = largest <= rows.num_staged // 2
    try:
        lookahead.run(iter(batches[:cut]), trainer_of(rows))
        if flushes:
            lookahead.flush()
        lookahead.run(iter(batches[cut:]), trainer_of(rows))
        lookahead.flush()
    except StagingOverflowError as exc:
        assert not fits
        assert exc.needed > exc.available == rows.num_staged // 2
        return
    assert fits
    weights, state = plain_loop(num_rows, batches, optimizer)
    got_weights, got_state = table_of(rows)
    assert torch.equal(got_weights, weights)
    assert got_state is None or torch.equal(got_state, state)
    assert lookahead.lookups == sum(batch.slots.size for batch in batches)
    assert lookahead.cold_lookups == sum(int((batch.slots >= num_hot).sum()) for batch in batches)


@pytest.mark.parametrize("placement", ["halves", "rank"])
@given(drawn=slot_batches(), data=st.data())
def test_steps_see_every_batch_once_in_order_and_their_own_rows(placement: str, drawn, data):
    num_rows, slots = drawn
    num_hot = data.draw(st.integers(0, num_rows - 1))
    batches = make_batches(slots)
    rows = make_tiers(num_rows, num_hot, 2 * num_rows if placement == "halves" else num_rows - num_hot, "sgd")
    weights, _ = initial_table(num_rows)
    seen = []

    def look(batch: StagedBatch) -> None:
        slots_of = batches[len(seen)].slots
        seen.append(batch.labels.tolist())
        found = batch.find_distinct(padding=rows.padding(batch.num_lookups()))
        assert torch.equal(rows.buffer[found.rows][found.inverse], weights[slots_of.ravel()])
        distinct = found.rows[found.rows < rows.first_spare]
        assert len(distinct) == len(np.unique(slots_of))
        assert batch.num_lookups() == slots_of.size

    try:
        lookahead = make_lookahead(
            rows,
            chunk_batches=data.draw(st.integers(1, 4)),
            placement=placement,
            sorts_all=data.draw(st.booleans(), label="the host sorts all"),
        )
        lookahead.run(iter(batches), look)
    except StagingOverflowError:
        assert placement == "rank"
        return
    assert seen == [batch.labels.tolist() for batch in batches]


@given(slot_batches(), st.data())
def test_what_only_reads_changes_nothing(drawn, data):
    num_rows, slots = drawn
    rows = make_tiers(num_rows, data.draw(st.integers(0, num_rows)), 2 * num_rows, "rowwise_adagrad")
    lookahead = make_lookahead(rows, chunk_batches=2)
    lookahead.run(iter(make_batches(slots)), lambda batch: None)
    lookahead.flush()
    for got, expected in zip(table_of(rows), initial_table(num_rows), strict=True):
        assert got is not None and torch.equal(got, expected)


@given(slot_batches(), st.data())
def test_a_row_that_the_next_chunk_needs_too_stays_on_the_device(drawn, data):
    num_rows, slots = drawn
    num_hot = data.draw(st.integers(0, num_rows - 1))
    chunk_batches = data.draw(st.integers(1, 4))
    optimizer = data.draw(st.sampled_from(["sgd", "rowwise_adagrad"]))
    batches = make_batches(slots)
    rows = make_tiers(num_rows, num_hot, 2 * num_rows, optimizer)
    lookahead = make_lookahead(rows, chunk_batches=chunk_batches)
    lookahead.run(iter(batches), trainer_of(rows))
    lookahead.flush()
    chunks: list[set[int]] = [set()]
    start, size = 0, 1  # the first chunks are short
    while start < len(batches):
        chunks.append(set().union(*(cold_rows_of(b, num_hot) for b in batches[start : start + size])))
        start, size = start + size, min(2 * size, chunk_batches)
    moved = sum(len(after - before) for before, after in pairwise(chunks))
    row_bytes = 4 * DIM + (4 if optimizer == "rowwise_adagrad" else 0)
    assert rows.row_bytes == row_bytes
    assert lookahead.bytes_to_device == lookahead.bytes_to_host == moved * row_bytes


@pytest.mark.parametrize("placement", ["halves", "lfu"])
@given(drawn=slot_batches(), data=st.data())
def test_between_chunks_the_whole_model_can_be_read(placement: str, drawn, data):
    num_rows, slots = drawn
    num_hot = data.draw(st.integers(0, num_rows - 1))
    batches = make_batches(slots)
    largest = max(len(cold_rows_of(batch, num_hot)) for batch in batches)
    half = max(largest, 1) + data.draw(st.integers(0, 3))
    num_staged = 2 * half if placement == "halves" else min(2 * half, num_rows - num_hot)
    if num_staged // 2 < largest:
        return
    rows = make_tiers(num_rows, num_hot, num_staged, "rowwise_adagrad", on_disk=data.draw(st.booleans()))
    lookahead = make_lookahead(rows, chunk_batches=data.draw(st.integers(1, 3)), placement=placement)
    done = 0
    train = trainer_of(rows)

    def step(batch: StagedBatch) -> None:
        nonlocal done
        train(batch)
        done += 1

    def compare() -> None:
        weights, state = plain_loop(num_rows, batches[:done], "rowwise_adagrad")
        frozen = lookahead.freeze()
        cold = as_records([torch.from_numpy(np.concatenate(list(one.blocks()))) for one in frozen.cold])
        lookahead.thaw()
        assert torch.equal(rows.buffer[:num_hot], weights[:num_hot])
        assert torch.equal(cold, as_records([weights[num_hot:], state[num_hot:]]))

    lookahead.run(iter(batches), step, between_chunks=compare)
    assert done == len(batches)


@pytest.mark.parametrize("placement", ["halves", "lfu"])
@given(drawn=slot_batches(), data=st.data())
def test_the_model_of_a_moment_can_be_read_while_training_goes_on(placement: str, drawn, data):
    num_rows, slots = drawn
    num_hot = data.draw(st.integers(0, num_rows - 1))
    batches = make_batches(slots)
    largest = max(len(cold_rows_of(batch, num_hot)) for batch in batches)
    num_staged = 2 * max(largest, 1) if placement == "halves" else min(2 * max(largest, 1), num_rows - num_hot)
    if num_staged // 2 < largest:
        return
    rows = make_tiers(num_rows, num_hot, num_staged, "rowwise_adagrad", on_disk=data.draw(st.booleans()))
    lookahead = make_lookahead(rows, chunk_batches=data.draw(st.integers(1, 3)), placement=placement)
    train, freeze_at, done = trainer_of(rows), data.draw(st.integers(0, len(batches))), 0
    frozen_at, readers, found = 0, [], []

    def read_some() -> None:
        for reader, pieces in zip(readers, found, strict=True):
            pieces += [block for block in [next(reader, None)] if block is not None]

    def step(batch: StagedBatch) -> None:
        nonlocal done
        train(batch)
        done += 1
        read_some()

    def freeze() -> None:
        nonlocal frozen_at
        if done >= freeze_at and not readers:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr("slipstream.embedding.tiers.frozen._BLOCK_BYTES", 1)  # blocks of one row
                frozen = lookahead.freeze()
            frozen_at = done
            for one in (*frozen.hot, *frozen.cold):
                readers.append(one.blocks())
                found.append([])

    lookahead.run(iter(batches), step, between_chunks=freeze)
    lookahead.flush()
    freeze()
    for reader, pieces in zip(readers, found, strict=True):
        pieces += reader
    weights, state = plain_loop(num_rows, batches[:frozen_at], "rowwise_adagrad")
    read = [found[:2], found[2:]]
    hot, cold = ([torch.from_numpy(np.concatenate(pieces)) for pieces in part if pieces] for part in read)
    assert torch.equal(as_records(hot), as_records([weights[:num_hot], state[:num_hot]][: len(hot)]))
    assert torch.equal(as_records(cold), as_records([weights[num_hot:], state[num_hot:]]))


def test_an_overflow_says_how_much_room_one_batch_needs():
    rows = make_tiers(10, 2, 2 * 3, "sgd")
    batches = make_batches([np.array([[0, 5]]), np.array([[2, 3], [4, 5], [1, 2]])])
    done: list[int] = []
    with pytest.raises(StagingOverflowError, match="one batch looks up 4 cold rows, and there is room for 3") as caught:
        make_lookahead(rows, chunk_batches=4).run(iter(batches), lambda batch: done.append(len(batch)))
    assert (caught.value.needed, caught.value.available, done) == (4, 3, [1])


def test_slots_beyond_32_bits_are_served():
    rows = make_tiers(6, 2, 12, "sgd")
    batches = make_batches([np.array([[0, 5], [5, 3]], np.int64)])
    lookahead = make_lookahead(rows, chunk_batches=1)
    lookahead.run(iter(batches), trainer_of(rows))
    lookahead.flush()
    assert torch.equal(table_of(rows)[0], plain_loop(6, batches, "sgd")[0])


def test_an_error_in_a_step_comes_out_and_ends_the_run():
    rows = make_tiers(6, 0, 12, "sgd")

    def fail(batch: StagedBatch) -> None:
        raise RuntimeError("in the step")

    before = set(threading.enumerate())
    with pytest.raises(RuntimeError, match="in the step") as caught:
        make_lookahead(rows, chunk_batches=1).run(iter(make_batches([np.array([[1]])] * 50)), fail)
    assert caught.tb is not None  # it still refers to everything that was at work
    assert set(threading.enumerate()) == before


def test_chunks_have_at_least_one_batch():
    with pytest.raises(ValueError, match="at least 1 batch, found 0"):
        make_lookahead(make_tiers(3, 1, 4, "sgd"), chunk_batches=0)


@pytest.mark.parametrize(("num_rows", "capacity"), [(9, 4), (8, 3)])
def test_a_cache_of_another_size_than_the_tiers_is_refused(num_rows: int, capacity: int):
    rows = make_tiers(10, 2, 4, "sgd")
    CachedRows(rows, RowCache(8, 4))
    with pytest.raises(ValueError, match=f"4 positions over 8 rows, found {capacity} over {num_rows}"):
        CachedRows(rows, RowCache(num_rows, capacity))
