"""The order of copies and computation on CUDA, whatever the timing: streams as vector clocks under the real classes."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from fake_cuda import CUDA, FakeCuda
from strategies import state_of
from torch import Tensor

from slipstream.embedding.row_cache import RowCache
from slipstream.embedding.tiers import pinned
from slipstream.embedding.tiers.lookahead import Batch, LookAhead, StagedBatch
from slipstream.embedding.tiers.on_disk import DiskRows
from slipstream.embedding.tiers.placement import CachedRows, Placement, StagingHalves
from slipstream.embedding.tiers.rows import TieredRows
from slipstream.embedding.tiers.transfer import RowMover

NUM_ROWS, DIM, BATCH, TABLES, NUM_BATCHES = 300, 4, 8, 3, 15
STAGED = 2 * 4 * BATCH * TABLES
MODES = ["resident", "slipstream", "baseline", "rank", "lfu", "on disk"]


def make_rows(mode: str, device: torch.device = CUDA) -> TieredRows:
    kind = partial(DiskRows, folder=Path(tempfile.gettempdir())) if mode == "on disk" else TieredRows
    rows = kind(
        num_rows=NUM_ROWS,
        num_hot={"resident": NUM_ROWS, "slipstream": 40, "on disk": 40}.get(mode, 0),
        embedding_dim=DIM,
        num_staged=0 if mode == "resident" else STAGED,
        optimizer="rowwise_adagrad",
        device=device,
    )
    generator = torch.Generator().manual_seed(0)
    weights, state = torch.randn(NUM_ROWS, DIM, generator=generator), torch.rand(NUM_ROWS, generator=generator)
    rows.load(torch.arange(NUM_ROWS), weights, [state])
    return rows


def place(mode: str, rows: TieredRows) -> Placement:
    if mode not in ("rank", "lfu"):
        return StagingHalves(rows)
    counts = np.arange(NUM_ROWS)[::-1].copy() if mode == "rank" else None
    return CachedRows(rows, RowCache(NUM_ROWS, STAGED, policy=mode, row_counts=counts))  # type: ignore[arg-type]


def make_batches(num_batches: int = NUM_BATCHES) -> Iterator[Batch]:
    rng = np.random.default_rng(1)
    for number in range(num_batches):
        slots = np.minimum(NUM_ROWS ** rng.random((BATCH, TABLES)), NUM_ROWS - 1).astype(np.int32)
        yield Batch(
            dense=rng.random((BATCH, 2), np.float32),
            slots=slots,
            labels=rng.random(BATCH, np.float32),
            is_hot=False,
            weights=rng.random(BATCH, np.float32) if number % 3 else None,
        )


def trainer_of(rows: TieredRows):
    """A step that reads everything of a batch, and whose rows depend on all of it."""

    def step(batch: StagedBatch) -> None:
        found = batch.find_distinct(padding=rows.padding(batch.num_lookups()))
        values = rows.buffer.index_select(0, found.rows)
        per_sample = batch.dense.sum(dim=1) + batch.labels
        if batch.weights is not None:
            per_sample = per_sample * batch.weights
        pulls = per_sample.repeat_interleave(TABLES, output_size=len(found.inverse))
        moved = values.mul(0.9).index_add_(0, found.inverse, pulls.unsqueeze(1).expand(-1, DIM))
        if found.order is not None and found.starts is not None:
            assert len(found.order.add(1)) >= len(found.starts.add(1))
        rows.buffer.index_copy_(0, found.rows, moved)
        rows.buffer_state[0].index_copy_(0, found.rows, moved[:, 0])

    return step


def evaluate(rows: TieredRows) -> list[Tensor]:
    """Everything, as it is read for evaluation and to disk."""
    everything = torch.arange(NUM_ROWS)
    return [rows.gather(everything).cpu(), *state_of(rows, everything)]


def train(mode: str, *, chunk_batches: int, sorts_all: bool, device: torch.device) -> Any:
    """Three runs with checkpoints, the first followed by evaluation, as around the model's scores."""
    rows = make_rows(mode, device)
    lookahead = LookAhead(
        rows, place(mode, rows), chunk_batches=chunk_batches, in_thread=device.type == "cuda", sorts_all=sorts_all
    )
    read: list[list[Tensor]] = []
    batches = make_batches()

    def checkpoint() -> None:
        frozen = lookahead.freeze()
        read.append([torch.from_numpy(block) for part in (*frozen.hot, *frozen.cold) for block in part.blocks()])
        lookahead.thaw()

    for part in range(3):
        pieces = [next(batches) for _ in range(NUM_BATCHES // 3)]
        lookahead.run(iter(pieces), trainer_of(rows), between_chunks=checkpoint)
        if part == 0:
            lookahead.flush()
            read.append(evaluate(rows))
    lookahead.flush()
    read.append(evaluate(rows))
    return SimpleNamespace(rows=rows, lookahead=lookahead, read=read)


@pytest.mark.parametrize(
    ("chunk_batches", "sorts_all"),
    [(1, True), (3, False), (16, True)],
    ids=["single, host sorts", "three, device sorts", "many, host sorts"],
)
@pytest.mark.parametrize("mode", MODES)
def test_whatever_is_read_is_ordered_after_what_wrote_it(
    mode: str, chunk_batches: int, sorts_all: bool, cuda: torch.device
):  # the fixture asserts at the end that nothing was out of order
    on_cpu = train(mode, chunk_batches=chunk_batches, sorts_all=sorts_all, device=torch.device("cpu"))
    there = train(mode, chunk_batches=chunk_batches, sorts_all=sorts_all, device=cuda)

    torch.testing.assert_close(there.read, on_cpu.read, rtol=1e-5, atol=1e-6)
    assert there.lookahead.bytes_to_device == on_cpu.lookahead.bytes_to_device


@pytest.mark.parametrize("mode", MODES)
def test_rows_that_take_several_slabs_arrive_whole(mode: str, cuda: torch.device, monkeypatch: pytest.MonkeyPatch):
    on_cpu = train(mode, chunk_batches=4, sorts_all=False, device=torch.device("cpu"))
    monkeypatch.setattr(pinned.PinnedRing.__init__, "__defaults__", (3, 512))
    there = train(mode, chunk_batches=4, sorts_all=False, device=cuda)
    torch.testing.assert_close(there.read, on_cpu.read, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("mode", MODES)
def test_a_chunk_neither_allocates_pinned_memory_nor_makes_the_host_wait(mode: str, fake_cuda: FakeCuda):
    rows = make_rows(mode)
    lookahead = LookAhead(rows, place(mode, rows), chunk_batches=3)
    assert fake_cuda.pinned_bytes == [pinned.SLAB_BYTES] * pinned.NUM_SLABS
    del fake_cuda.pageable_copies[:]
    lookahead.run(make_batches(), trainer_of(rows))
    lookahead.flush()
    assert len(fake_cuda.pinned_bytes) == pinned.NUM_SLABS
    assert fake_cuda.pageable_copies == []
    assert mode == "resident" or lookahead.bytes_to_device > 0


@pytest.mark.parametrize(
    ("owner", "what_keeps_order"),
    [
        (RowMover, "await_moved"),
        (RowMover, "mark_computed"),
        (RowMover, "_await_computed"),
        (RowMover, "hand_over"),
        (pinned.Slab, "mark_busy"),
    ],
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)
def test_without_what_keeps_order_there_is_none(
    owner: type, what_keeps_order: str, fake_cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(owner, what_keeps_order, lambda *args: None)
    train("slipstream", chunk_batches=3, sorts_all=True, device=CUDA)
    assert fake_cuda.races or fake_cuda.not_handed_over()


def test_the_first_fetch_waits_for_the_buffer_to_be_made(cuda: torch.device):
    rows = TieredRows(
        num_rows=NUM_ROWS, num_hot=0, embedding_dim=DIM, num_staged=STAGED, optimizer="rowwise_adagrad", device=cuda
    )
    LookAhead(rows, StagingHalves(rows), chunk_batches=1).run(make_batches(2), trainer_of(rows))


def test_everything_of_a_batch_is_handed_over():
    rows, seen = make_rows("slipstream", torch.device("cpu")), []
    LookAhead(rows, StagingHalves(rows), chunk_batches=1, sorts_all=True).run(make_batches(2), seen.append)
    for batch in seen:
        found = batch.distinct
        parts = [batch.dense, batch.labels, found.rows, found.inverse, found.order, found.starts]
        parts += [] if batch.weights is None else [batch.weights]
        assert {id(part) for part in parts} == {id(tensor) for tensor in batch.tensors()}
