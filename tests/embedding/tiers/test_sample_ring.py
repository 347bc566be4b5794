"""Samples on the device: the batches that the host would send, ordered on every stream, in bounded memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from fake_cuda import FakeCuda
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import make_samples
from torch import Tensor

from slipstream.embedding.tiers import pinned
from slipstream.embedding.tiers.in_place import InPlace
from slipstream.embedding.tiers.lookahead import Batch, StagedBatch
from slipstream.embedding.tiers.mapped import map_to_device
from slipstream.embedding.tiers.padding import PaddedColumns
from slipstream.embedding.tiers.rows import TieredRows
from slipstream.embedding.tiers.sample_ring import SampleRing
from slipstream.embedding.tiers.transfer import RowMover
from slipstream.io.samples import Samples
from slipstream.ops.picks import Picks, Window
from slipstream.training.order.rounds import OpenStreams, Position, RoundPreparer
from slipstream.training.order.schedule import Schedule, most_in_windows
from slipstream.training.order.stream import SampleStream
from slipstream.training.skipping.criterion import SkipRule
from slipstream.training.skipping.skipper import Skipper

CPU = torch.device("cpu")
NUM_ROWS, NUM_HOT, COLUMNS, DENSE, DIM, BATCH = 60, 20, 3, 2, 2, 8
SHARD, WINDOW, ROUND = 10, 30, 24
SIZES = {"hot": [SHARD] * 4 + [4], "cold": [SHARD] * 6 + [7]}
"""Of shards: several windows of each group, the last ones short."""
NUM_SAMPLES = sum(map(sum, SIZES.values()))
ONCE = Schedule(epochs=1, batch_size=BATCH, order="interleaved", segment_steps=5, round_samples=ROUND, seed=3)
SCHEDULE = replace(ONCE, epochs=2)
RULES = {
    "none": SkipRule(criterion="none", target_drop=0.3),
    "random": SkipRule(criterion="random", target_drop=0.3, scope="all"),
    "negative": SkipRule(criterion="negative", target_drop=0.3, scope="all"),
    "importance": SkipRule(
        criterion="importance", target_drop=0.4, scope="all", num_rows=NUM_ROWS, num_dense=DENSE, floor=0.1
    ),
}
PADDING = PaddedColumns(columns=np.array([2, 0]), slots=np.array([3, 41]), is_pooled=True)


@pytest.fixture(scope="module")
def workers() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(2) as pool:
        yield pool


def make_shards() -> dict[str, list[Samples]]:
    """Samples that are told apart by their first dense value; some of their lookups are padding."""
    rng, start = np.random.default_rng(0), 0
    shards: dict[str, list[Samples]] = {}
    for group, most in (("hot", NUM_HOT), ("cold", NUM_ROWS)):
        shards[group] = []
        for size in SIZES[group]:
            slots = rng.integers(0, most, (size, COLUMNS))
            if group == "cold":
                slots[::3, 0] = 41
            slots[::4, 2] = 3
            shards[group].append(make_samples(slots, num_dense=DENSE, start=start))
            start += size
    return shards


def open_streams(workers: ThreadPoolExecutor) -> OpenStreams:
    shards = make_shards()
    return lambda epoch: {
        group: SampleStream(
            [lambda one=one: one for one in shards[group]],
            SIZES[group],
            seed=(epoch,),
            window_samples=WINDOW,
            workers=workers,
        )
        for group in ("hot", "cold")
    }


class Reader:
    """A step that keeps what it is given, and moves the rows that it looks up by all of it."""

    def __init__(self) -> None:
        self.read: list[list[Tensor | None]] = []

    def __call__(self, batch: StagedBatch) -> None:
        in_place = batch.in_place
        assert in_place is not None
        in_place.begin()
        plan = in_place.plan
        given = [batch.dense, batch.labels, batch.weights, batch.tierless, batch.is_value]
        self.read.append([None if one is None else one.clone() for one in given])
        moved = plan.look_up(batch.num_lookups()) * 0.9
        moved += (batch.dense.sum(dim=1) + batch.labels).repeat_interleave(
            in_place.num_columns, output_size=batch.num_lookups()
        )[:, None]
        rows = plan._rows
        rows.buffer.index_copy_(0, plan.padded_positions(), plan.sum_by_row(moved))
        in_place.end()


def make_ring(num_samples: int, device: torch.device, **options: Any) -> SampleRing:
    sizes = {"most_samples": ROUND + 2 * BATCH, "batch_size": BATCH, "num_dense": DENSE, "num_columns": COLUMNS}
    return SampleRing(
        num_samples=num_samples, num_rows=NUM_ROWS, num_hot=NUM_HOT, device=device, **{**sizes, **options}
    )


def train(
    device: torch.device,
    *,
    on_device: bool,
    rule: str = "none",
    schedule: Schedule = SCHEDULE,
    columns: np.ndarray | None = None,
    padding: PaddedColumns | None = None,
    num_samples: int = most_in_windows(NUM_SAMPLES, round_samples=ROUND, window_samples=WINDOW),
) -> Any:
    """Train all rounds: (what steps read, rows in the end, what was counted)."""
    num_columns = COLUMNS if columns is None else len(columns)
    rows = TieredRows(
        num_rows=NUM_ROWS, num_hot=NUM_HOT, embedding_dim=DIM, num_staged=80, optimizer="sgd", device=device
    )
    rows.load(torch.arange(NUM_ROWS), torch.randn(NUM_ROWS, DIM, generator=torch.Generator().manual_seed(0)))
    in_place = InPlace(
        rows,
        map_to_device(rows.on_host, device),
        batch_size=BATCH,
        num_columns=num_columns,
        most_distinct=BATCH * COLUMNS,
        columns=columns,
    )
    in_place.padding = padding
    if on_device:
        in_place.keep_samples(make_ring(num_samples, device, columns=columns, padding=padding))
    step, skipper = Reader(), Skipper(RULES[rule])
    with ThreadPoolExecutor(2) as workers:
        preparer = RoundPreparer(
            schedule, skipper, score=lambda samples: np.zeros(len(samples)), position=Position(), ring=in_place.ring
        )
        for prepared in preparer.run(open_streams(workers)):
            in_place.run(iter(prepared.batches), step)
    in_place.flush()
    counted = {name: count for name, count in in_place.counters().items() if not name.endswith("seconds")}
    return step.read, rows.gather(torch.arange(NUM_ROWS)), counted


def assert_same(found: Any, expected: Any) -> None:
    assert len(found[0]) == len(expected[0])
    for mine, theirs in zip(found[0], expected[0], strict=True):
        for one, other in zip(mine, theirs, strict=True):
            assert (one is None) == (other is None)
            assert one is None or torch.equal(one, other)
    assert torch.equal(found[1], expected[1])
    assert found[2] == expected[2]


CRAMPED: dict[str, Any] = {"schedule": ONCE, "num_samples": 102}
"""Little room, so that windows of one epoch take the places of others."""
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "random": {"rule": "random"},
    "weighted": {"rule": "negative"},
    "by error": {"rule": "importance"},
    "mixed": {"rule": "negative", "schedule": replace(SCHEDULE, order="mixed")},
    "smaller": {"rule": "random", "schedule": replace(SCHEDULE, smaller_by=0.3, positive_weight=2.0)},
    "padded": {"padding": PADDING},
    "some columns": {"columns": np.array([2, 0])},
    "counted padding": {"padding": replace(PADDING, is_pooled=False)},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_steps_read_what_the_host_would_have_sent_them(name: str):
    sent = train(CPU, on_device=False, **OPTIONS[name])
    assert_same(train(CPU, on_device=True, **OPTIONS[name]), sent)
    assert len(sent[0]) > 15 and {len(read[1]) for read in sent[0]} > {BATCH}, "short batches too"


@pytest.mark.parametrize("order", ["interleaved", "mixed"])
def test_whatever_is_read_of_samples_is_ordered_after_their_copy_and_before_the_next(order: str, cuda: torch.device):
    cramped = {**CRAMPED, "schedule": replace(ONCE, order=order)}
    there, here = train(cuda, on_device=True, **cramped), train(CPU, on_device=True, **cramped)
    for mine, theirs in zip(there[0], here[0], strict=True):
        for one, other in zip(mine, theirs, strict=True):
            assert one is None or torch.equal(one.cpu(), other)
    torch.testing.assert_close(there[1].cpu(), here[1])
    assert there[2] == here[2]


def copy_unawaited(ring: SampleRing, *given: Any, copy: Callable[..., Any] = SampleRing._copy) -> None:
    copy(ring, *given)


@pytest.mark.parametrize(
    ("owner", "what_keeps_order", "without"),
    [
        (SampleRing, "mark_computed", lambda *given: None),
        (SampleRing, "_copy", copy_unawaited),
        (RowMover, "await_moved", lambda *given: None),
        (RowMover, "hand_over", lambda *given: None),
        (pinned.Slab, "mark_busy", lambda *given: None),
    ],
    ids=lambda value: value if isinstance(value, str) else getattr(value, "__name__", ""),
)
def test_without_what_keeps_order_there_is_none(
    owner: type, what_keeps_order: str, without: Any, fake_cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(pinned.PinnedRing.__init__, "__defaults__", (2, 512))
    monkeypatch.setattr(owner, what_keeps_order, without)
    train(torch.device("cuda"), on_device=True, **CRAMPED)
    assert fake_cuda.races or fake_cuda.not_handed_over()


def test_the_host_sends_windows_in_bulk_and_nothing_for_a_batch(fake_cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch):
    copied: list[int] = []
    monkeypatch.setattr(SampleRing, "_copy", lambda ring, window, ranges: copied.append(len(window)))
    sent: list[int] = []
    to_device = RowMover.to_device

    def watched(mover: RowMover, arrays: list[np.ndarray]) -> list[Tensor]:
        sent.append(sum(array.nbytes for array in arrays))
        return to_device(mover, arrays)

    monkeypatch.setattr(RowMover, "to_device", watched)
    read, _, _ = train(torch.device("cuda"), on_device=True, **CRAMPED)
    assert sum(copied) == NUM_SAMPLES and max(copied) == WINDOW, "once, however many rounds take from a window"
    rounds = -(-NUM_SAMPLES // ROUND)
    assert rounds <= len(sent) < len(read) / 2, "once a round"
    waiting = BATCH * 2 * 4 * (DENSE + COLUMNS + 1)
    assert max(sent) <= 4 * (ROUND + 2 * BATCH) + 4 * (ROUND // BATCH + 6) + waiting


def test_the_host_neither_waits_nor_allocates_pinned_memory(fake_cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch):
    made: list[int] = []
    bring = SampleRing.bring

    def forget_what_was_before(ring: SampleRing, groups: list[Picks]) -> None:
        if not made:
            del fake_cuda.pageable_copies[:], fake_cuda.pinned_bytes[:]
        made.append(len(groups))
        bring(ring, groups)

    monkeypatch.setattr(SampleRing, "bring", forget_what_was_before)
    monkeypatch.setattr(InPlace, "counters", lambda in_place: {})
    monkeypatch.setattr(TieredRows, "gather", lambda rows, slots: slots)
    train(torch.device("cuda"), on_device=True, **CRAMPED)
    assert made
    assert fake_cuda.pageable_copies == fake_cuda.pinned_bytes == fake_cuda.spins == []


@settings(max_examples=25, deadline=None)
@given(
    num_shards=st.tuples(st.integers(0, 9), st.integers(1, 9)),
    short=st.integers(1, 6),
    window_samples=st.integers(1, 30),
    round_samples=st.integers(1, 40),
    segment_steps=st.integers(1, 9),
)
def test_there_is_room_for_two_rounds_of_any_training(
    workers: ThreadPoolExecutor,
    num_shards: tuple[int, int],
    short: int,
    window_samples: int,
    round_samples: int,
    segment_steps: int,
):
    shard_samples, batch_size = 6, 4
    sizes = [[shard_samples] * (count - 1) + [short] if count else [] for count in num_shards]
    total = sum(map(sum, sizes))
    longest = max(window_samples, shard_samples)
    ring = make_ring(most_in_windows(total, round_samples=round_samples, window_samples=longest), CPU)
    schedule = replace(
        SCHEDULE, batch_size=batch_size, round_samples=round_samples, segment_steps=segment_steps, epochs=3
    )

    def open_all(epoch: int) -> dict[str, SampleStream]:
        return {
            group: SampleStream(
                [lambda size=size: make_samples(np.zeros((size, COLUMNS)), num_dense=DENSE) for size in of_group],
                of_group,
                seed=(epoch, len(group)),
                window_samples=window_samples,
                workers=workers,
            )
            for group, of_group in zip(("hot", "cold"), sizes, strict=True)
        }

    preparer = RoundPreparer(
        schedule, Skipper(RULES["none"]), score=lambda samples: np.zeros(len(samples)), position=Position(), ring=ring
    )
    trained = sum(len(batch) for prepared in preparer.run(open_all) for batch in prepared.batches)
    assert trained == 3 * total  # and bringing them refused none for want of room


def test_windows_that_were_not_brought_and_orders_without_room_are_refused():
    ring = make_ring(20, CPU, most_samples=16, batch_size=4)
    mover = RowMover(TieredRows(num_rows=1, num_hot=1, embedding_dim=1, num_staged=0, optimizer="sgd", device=CPU))
    window = Window([(np.zeros((30, DENSE), np.float32), np.zeros((30, COLUMNS), np.int32), np.zeros(30, np.float32))])
    with pytest.raises(ValueError, match="at most 20 places, found 30"):
        ring.bring([Picks.all_of(window)])
    whole = Batch(dense=window.pieces[0][0], slots=window.pieces[0][1], labels=window.pieces[0][2], is_hot=False)
    with pytest.raises(ValueError, match="at most 16 samples at a time, found 30"):
        ring.lay_out([whole], mover)
    part = Batch(dense=whole.dense[:9], slots=whole.slots[:9], labels=whole.labels[:9], is_hot=False)
    with pytest.raises(ValueError, match="windows that were brought, found one of 9 samples"):
        ring.lay_out([part], mover)
