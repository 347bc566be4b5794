"""Capture of a step as a CUDA graph: beside threads that move rows, for every kind of step, with nothing left over."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
import pytest
import torch
from fake_cuda import CUDA, FakeCuda
from strategies import make_tracker, state_of
from torch import Tensor

from slipstream.embedding.quantized import quantize_linears
from slipstream.embedding.tiers.in_place import InPlace, Runner
from slipstream.embedding.tiers.lookahead import Batch, LookAhead
from slipstream.embedding.tiers.mapped import map_to_device
from slipstream.embedding.tiers.pinned import NUM_SLABS, SLAB_BYTES
from slipstream.embedding.tiers.placement import StagingHalves
from slipstream.embedding.tiers.rows import TieredRows
from slipstream.embedding.tiers.sample_ring import PickedBatch, SampleRing
from slipstream.models.dlrm import DLRM
from slipstream.ops.picks import Picks, Window
from slipstream.training import step as step_module
from slipstream.training.dense_optimizer import DenseOptimizer
from slipstream.training.representations import Representations
from slipstream.training.skipping.criterion import Movement
from slipstream.training.slot_layout import SlotLayout
from slipstream.training.step import FixedShapeStep, TrainStep

BATCH, TABLES, DENSE, DIM, NUM_ROWS, NUM_HOT = 8, 3, 2, 4, 60, 20


def make_step(make: type[TrainStep], device: torch.device, *, kind: str = "adagrad") -> TrainStep:
    rows = TieredRows(
        num_rows=NUM_ROWS,
        num_hot=NUM_HOT,
        embedding_dim=DIM,
        num_staged=200,
        optimizer="rowwise_adagrad" if kind == "adagrad" else "sgd",
        device=device,
    )
    rows.load(torch.arange(NUM_ROWS), torch.randn(NUM_ROWS, DIM, generator=torch.Generator().manual_seed(1)))
    torch.manual_seed(0)
    network = DLRM(embedding_dim=DIM, bottom_mlp=(5, DIM), top_mlp=(6, 1))
    model = network.build(num_dense=DENSE, num_columns=TABLES).to(device)
    layout = SlotLayout({"cat_0": np.arange(NUM_ROWS)}, num_hot=NUM_HOT, table_of_column=[0] * TABLES)
    options = {"num_dense": DENSE, "num_tables": TABLES} if make is FixedShapeStep else {}
    return make(
        model=model,
        rows=rows,
        dense_optimizer=DenseOptimizer(model.parameters(), optimizer=kind, eps=1e-8),  # type: ignore[arg-type]
        eps=1e-8,
        batch_size=BATCH,
        representations=Representations.plain(layout, embedding_dim=DIM, device=device),
        **options,
    )


def make_batch(number: int, *, size: int = BATCH, weighted: bool = False) -> Batch:
    rng = np.random.default_rng(number)
    return Batch(
        dense=rng.random((size, DENSE), np.float32),
        slots=rng.integers(0, NUM_ROWS, (size, TABLES)).astype(np.int32),
        labels=(rng.random(size) < 0.5).astype(np.float32),
        is_hot=False,
        weights=rng.random(size, np.float32) + 0.5 if weighted else None,
    )


def look_ahead(rows: TieredRows) -> LookAhead:
    return LookAhead(rows, StagingHalves(rows), chunk_batches=2, sorts_all=False)


def in_place(rows: TieredRows) -> InPlace:
    host = map_to_device(rows.on_host, rows.device)
    return InPlace(rows, host, batch_size=BATCH, num_columns=TABLES, most_distinct=BATCH * TABLES)


def results_of(step: TrainStep) -> list[Tensor]:
    rows = step.rows
    state = state_of(rows, torch.arange(NUM_ROWS))
    dense = [parameter.detach().cpu() for parameter in step.model.parameters()]
    return [rows.gather(torch.arange(NUM_ROWS)).cpu(), *state, *dense, torch.tensor(step.take_loss_sum())]


# --- beside other threads ------------------------------------------------------------------------------------


def capture_while_rows_move(fake: FakeCuda) -> None:
    """Train until the step is captured; then the look-ahead thread goes on, in the middle of the capture."""
    step, is_capturing = make_step(FixedShapeStep, CUDA), threading.Event()
    lookahead = look_ahead(step.rows)

    def meet() -> None:
        is_capturing.set()
        deadline = threading.Event()
        while not fake.beside_captures and not deadline.wait(0.001):
            pass

    fake.on_capture = meet

    def batches() -> Iterator[Batch]:
        for number in range(12):
            if number == 9:  # the finders are four ahead of the chunk of batches 5 and 6, prepared while batch 3 trains
                assert is_capturing.wait(20)
            yield make_batch(number)

    lookahead.run(batches(), partial(step, lr=0.1))
    lookahead.flush()


def test_a_graph_is_captured_while_the_look_ahead_moves_rows(fake_cuda: FakeCuda):
    capture_while_rows_move(fake_cuda)
    assert fake_cuda.beside_captures
    assert fake_cuda.capture_modes == ["thread_local"]
    assert fake_cuda.refused == fake_cuda.races == []
    assert fake_cuda.pinned_bytes == [SLAB_BYTES] * NUM_SLABS  # all of it before the first batch


def test_a_capture_that_forbade_others_their_calls_would_fail(fake_cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch):
    capture = torch.cuda.graph
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, **options: capture(graph))
    capture_while_rows_move(fake_cuda)
    assert fake_cuda.capture_modes == ["global"]
    assert fake_cuda.refused == fake_cuda.beside_captures != []
    assert all("by look-ahead" in call for call in fake_cuda.refused)


# --- every kind of step --------------------------------------------------------------------------------------


def train_all_kinds(
    make: type[TrainStep],
    device: torch.device,
    *,
    kind: str,
    movement: Movement,
    run_over: Callable[[TieredRows], Runner] = look_ahead,
) -> list[Tensor]:
    """Batches with and without weights, in a window and outside, whole and cut short, in one order."""
    step = make_step(make, device, kind=kind)
    step.tracker = make_tracker(movement, step.rows.buffer[:NUM_HOT])
    lookahead = run_over(step.rows)
    moved = []
    for part in range(4):
        if part % 2:
            step.tracker.open_window()
        whole = [make_batch(10 * part + number, weighted=number % 2 == 0) for number in range(10)]
        cut = [make_batch(10 * part + 9, size=5, weighted=part > 1)]
        for number, pieces in enumerate((whole[:7], cut, whole[7:])):
            lookahead.run(iter(pieces), lambda batch, part=part, number=number: step(batch, 0.1 / (1 + part + number)))
        if part % 2:
            moved.append(torch.from_numpy(step.tracker.close_window()))
    lookahead.flush()
    return [*results_of(step), *moved]


@pytest.mark.parametrize("run_over", [look_ahead, in_place])
@pytest.mark.parametrize(("kind", "movement"), [("sgd", "net"), ("adagrad", "per-label")])
def test_replayed_steps_of_every_kind_equal_plain_ones_on_the_cpu(
    kind: str, movement: Movement, run_over: Callable[[TieredRows], Runner], cuda: torch.device
):
    expected = train_all_kinds(TrainStep, torch.device("cpu"), kind=kind, movement=movement)
    found = train_all_kinds(FixedShapeStep, cuda, kind=kind, movement=movement, run_over=run_over)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_each_kind_of_step_is_captured_once(fake_cuda: FakeCuda):
    train_all_kinds(FixedShapeStep, CUDA, kind="adagrad", movement="per-label")
    assert fake_cuda.capture_modes == ["thread_local"] * 4
    assert fake_cuda.num_replays == 4 * 10 - 4 * step_module._EAGER_STEPS


def test_rows_in_place_take_one_graph_for_each_half_and_no_other_launch(fake_cuda: FakeCuda):
    step = make_step(FixedShapeStep, CUDA)
    in_place(step.rows).run(map(make_batch, range(20)), partial(step, lr=0.1))
    assert fake_cuda.capture_modes == ["thread_local"] * 2
    assert fake_cuda.num_replays == 20 - 2 * step_module._EAGER_STEPS


@pytest.mark.parametrize("weighted", [False, True])
def test_samples_on_the_device_leave_no_launch_but_the_graph_s(weighted: bool, fake_cuda: FakeCuda):
    step = make_step(FixedShapeStep, CUDA)
    runner, launches = in_place(step.rows), []
    batches = [make_batch(number, weighted=weighted) for number in range(20)]
    window = Window([(batch.dense, batch.slots, batch.labels) for batch in batches])
    whole = Picks.all_of(window, None if not weighted else np.concatenate([batch.weights for batch in batches]))
    ring = SampleRing(
        num_samples=len(window),
        most_samples=len(window),
        batch_size=BATCH,
        num_dense=DENSE,
        num_columns=TABLES,
        num_rows=NUM_ROWS,
        num_hot=NUM_HOT,
        device=CUDA,
    )
    runner.keep_samples(ring)
    ring.bring([whole])
    picked = [PickedBatch(whole.take(slice(at, at + BATCH)), is_hot=False) for at in range(0, len(window), BATCH)]
    runner.run(iter(picked), partial(step, lr=0.1), between_chunks=lambda: launches.append(len(fake_cuda.launches)))
    assert fake_cuda.capture_modes == ["thread_local"] * 2
    assert fake_cuda.num_replays == 20 - 2 * step_module._EAGER_STEPS
    # from the eighth batch on there is a graph for either half
    assert len(set(launches[8:])) == 1 and launches[2] > launches[1]

    plain = make_step(TrainStep, torch.device("cpu"))
    lookahead = look_ahead(plain.rows)
    lookahead.run(iter(batches), partial(plain, lr=0.1))
    lookahead.flush()
    runner.flush()
    torch.testing.assert_close(results_of(step), results_of(plain), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("what", ["begin", "end"])
def test_a_graph_whose_streams_do_not_wait_for_each_other_is_noticed(what: str, fake_cuda: FakeCuda):
    step = make_step(FixedShapeStep, CUDA)
    assert isinstance(step, FixedShapeStep)
    runner = in_place(step.rows)
    batches = [make_batch(number) for number in range(20)]
    runner.run(iter(batches[:10]), partial(step, lr=0.1))
    assert fake_cuda.num_replays == 4 and fake_cuda.races == fake_cuda.refused == []
    # events are nodes of a graph: take those of the fork, or of the join, out of the graphs there are
    for variant in step._variants.values():
        nodes = variant.graph.operations
        waits = [node for node in nodes if node.waits]
        assert len(waits) == 2  # one stream forks, and joins
        nodes.remove(waits[0] if what == "begin" else waits[1])
    runner.run(iter(batches[10:]), partial(step, lr=0.1))
    assert fake_cuda.races
    assert bool(fake_cuda.refused) == (what == "end")


def test_steps_outside_a_window_do_nothing_for_the_tracker(fake_cuda: FakeCuda):
    step = make_step(FixedShapeStep, CUDA)
    step.tracker = make_tracker("per-label", step.rows.buffer[:NUM_HOT])
    step.tracker.observe = lambda *args: pytest.fail("observed outside a window")  # type: ignore[method-assign]
    look_ahead(step.rows).run(map(make_batch, range(8)), partial(step, lr=0.1))
    assert fake_cuda.num_replays == 5


# --- nothing left over ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("bits", [0, 8])
@pytest.mark.parametrize("movement", [None, "net", "per-label"])
def test_an_eager_step_leaves_no_autograd_graph(
    weighted: bool, bits: int, movement: Movement | None, monkeypatch: pytest.MonkeyPatch
):
    # what survives belongs to the stream of eager steps, and would bring it into the capture
    step = make_step(FixedShapeStep, torch.device("cpu"))
    if bits:
        quantize_linears(step.model, bits)
    if movement is not None:
        step.tracker = make_tracker(movement, step.rows.buffer[:NUM_HOT])
        step.tracker.open_window()
    seen: list[weakref.ref[Tensor]] = []
    loss_of = step_module.binary_cross_entropy_with_logits

    def watched_loss(logits: Tensor, *args: Tensor, **options: Tensor) -> Tensor:
        loss = loss_of(logits, *args, **options)
        seen.extend([weakref.ref(logits), weakref.ref(loss)])
        return loss

    monkeypatch.setattr(step_module, "binary_cross_entropy_with_logits", watched_loss)
    step.model.register_forward_hook(lambda model, given, out: seen.extend(map(weakref.ref, (*given, out))))
    gc.disable()  # what only the garbage collector could free is left over too
    try:
        look_ahead(step.rows).run((make_batch(number, weighted=weighted) for number in range(3)), partial(step, lr=0.1))
        assert len(seen) == 3 * 5
        survivors = [tensor for ref in seen if (tensor := ref()) is not None and tensor.grad_fn is not None]
    finally:
        gc.enable()
    assert survivors == []
