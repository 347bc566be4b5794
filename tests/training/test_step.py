import copy
import dataclasses
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from strategies import make_tracker
from torch.nn.functional import binary_cross_entropy_with_logits

from slipstream.embedding.duplicates import Distinct, sort_lookups
from slipstream.embedding.rules import OPTIMIZERS
from slipstream.embedding.tiers.lookahead import StagedBatch
from slipstream.embedding.tiers.row_access import StagedAccess
from slipstream.embedding.tiers.rows import TieredRows
from slipstream.models.dlrm import DLRM
from slipstream.schema import Bag
from slipstream.training.dense_optimizer import DenseOptimizer
from slipstream.training.representations import Representations, TableSpec
from slipstream.training.skipping.criterion import Movement
from slipstream.training.slot_layout import SlotLayout
from slipstream.training.step import FixedShapeStep, TrainStep

BATCH, TABLES, DENSE, DIM, ROWS = 8, 3, 2, 4, 20


def make_rows(optimizer: str) -> TieredRows:
    rows = TieredRows(
        num_rows=ROWS, num_hot=ROWS, embedding_dim=DIM, num_staged=0, optimizer=optimizer, device=torch.device("cpu")
    )
    generator = torch.Generator().manual_seed(1)
    rows.load(torch.arange(ROWS), torch.randn(ROWS, DIM, generator=generator))
    return rows


def make_batch(size: int, seed: int, *, weighted: bool, sorted_by_host: bool = False) -> StagedBatch:
    rng = np.random.default_rng(seed)
    positions = rng.integers(0, ROWS, size * TABLES)
    found = sort_lookups(positions)
    parts = (torch.from_numpy(part) for part in (found.unique, found.inverse, found.order, found.starts))
    return StagedBatch(
        dense=torch.from_numpy(rng.random((size, DENSE), np.float32)),
        labels=torch.from_numpy((rng.random(size) < 0.5).astype(np.float32)),
        positions=None if sorted_by_host else torch.from_numpy(positions),
        distinct=Distinct(*parts) if sorted_by_host else None,
        is_hot=True,
        weights=torch.from_numpy(rng.random(size, np.float32)) if weighted else None,
    )


def fp32_tables() -> Representations:
    layout = SlotLayout({"cat_0": np.arange(ROWS)}, num_hot=ROWS, table_of_column=[0] * TABLES)
    return Representations.plain(layout, embedding_dim=DIM, device=torch.device("cpu"))


def make_model() -> torch.nn.Module:
    torch.manual_seed(0)
    return DLRM(embedding_dim=DIM, bottom_mlp=(5, DIM), top_mlp=(6, 1)).build(num_dense=DENSE, num_columns=TABLES)


def make_step(
    make: type[TrainStep],
    model: torch.nn.Module,
    rows: TieredRows,
    *,
    kernels: str,
    representations: Representations | None = None,
) -> TrainStep:
    options = {
        "model": model,
        "rows": rows,
        "dense_optimizer": DenseOptimizer(model.parameters(), optimizer=rows.optimizer, eps=1e-8),
        "representations": representations or fp32_tables(),
        "eps": 1e-8,
        "kernels": kernels,
    }
    if make is FixedShapeStep:
        options |= {"num_dense": DENSE, "num_tables": TABLES}
    return make(batch_size=BATCH, **options)


def test_each_step_goes_by_its_own_learning_rate():
    rows, model = make_rows("sgd"), make_model()
    step = make_step(TrainStep, model, rows, kernels="torch")
    step(make_batch(BATCH, 0, weighted=False), 0.1)
    rows_then, model_then = make_rows("sgd"), copy.deepcopy(model)
    rows_then.buffer.copy_(rows.buffer)
    for each in (step, make_step(TrainStep, model_then, rows_then, kernels="torch")):
        each(make_batch(BATCH, 1, weighted=False), 0.3)
    assert torch.equal(rows.buffer, rows_then.buffer)


@pytest.mark.parametrize("optimizer", OPTIMIZERS.names())
@pytest.mark.parametrize("weighted", [[], range(5), range(2, 5), [1, 3]], ids=["never", "always", "later", "some"])
def test_a_fixed_shape_step_equals_the_plain_one_to_the_bit(optimizer: str, weighted: Sequence[int]) -> None:
    plain_rows, fixed_rows = make_rows(optimizer), make_rows(optimizer)
    plain_model = make_model()
    fixed_model = copy.deepcopy(plain_model)
    plain = TrainStep(
        model=plain_model,
        rows=plain_rows,
        dense_optimizer=DenseOptimizer(plain_model.parameters(), optimizer=optimizer, eps=1e-8),
        representations=fp32_tables(),
        eps=1e-8,
        batch_size=BATCH,
    )
    fixed = FixedShapeStep(
        batch_size=BATCH,
        num_dense=DENSE,
        num_tables=TABLES,
        model=fixed_model,
        rows=fixed_rows,
        dense_optimizer=DenseOptimizer(fixed_model.parameters(), optimizer=optimizer, eps=1e-8),
        representations=fp32_tables(),
        eps=1e-8,
    )
    for seed, size in enumerate([BATCH, BATCH, 5, BATCH, BATCH]):
        batch = make_batch(size, seed, weighted=seed in weighted)
        plain(make_batch(size, seed, weighted=seed in weighted, sorted_by_host=True), 0.1 / (seed + 1))
        fixed(batch, 0.1 / (seed + 1))

    assert torch.equal(plain_rows.buffer[:ROWS], fixed_rows.buffer[:ROWS])
    assert all(torch.equal(a, b) for a, b in zip(plain_model.parameters(), fixed_model.parameters(), strict=True))
    assert plain.take_loss_sum() == fixed.take_loss_sum() != 0.0
    assert plain.take_loss_sum() == 0.0


def test_a_fixed_shape_step_pools_lists_as_the_plain_one_does_to_the_bit() -> None:
    bag = Bag(columns=tuple(range(1, TABLES)), pooling="mean")
    layout = SlotLayout({"cat_0": np.arange(ROWS)}, num_hot=ROWS, table_of_column=[0] * TABLES)
    tables = Representations(
        [TableSpec(name="cat_0", num_rows=ROWS)],
        layout=layout,
        embedding_dim=DIM,
        optimizer="adagrad",
        eps=1e-8,
        seed=0,
        device=torch.device("cpu"),
        bags=[bag],
        padding_rows={"cat_0": 0},
    )
    network = DLRM(embedding_dim=DIM, bottom_mlp=(5, DIM), top_mlp=(6, 1))
    plain_model = network.build(num_dense=DENSE, num_columns=2)
    trained = []
    for make in (TrainStep, FixedShapeStep):
        rows, model = make_rows("adagrad"), copy.deepcopy(plain_model)
        step = make_step(make, model, rows, kernels="torch", representations=tables)
        for seed, size in enumerate([BATCH, 5, BATCH]):
            batch = make_batch(size, seed, weighted=False, sorted_by_host=make is TrainStep)
            is_value = make_batch(size, seed, weighted=False).positions.view(size, TABLES)[:, 1:] != 0  # type: ignore[union-attr]
            step(dataclasses.replace(batch, is_value=is_value), 0.1)
        trained.append([rows.buffer[:ROWS], *model.parameters()])
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*trained, strict=True))


@pytest.mark.parametrize("weight", [0.5, 3.0])
def test_a_sample_of_weight_w_leaves_the_accumulators_of_w_samples(weight: float) -> None:
    batch = make_batch(5, 0, weighted=False, sorted_by_host=True)
    accumulators = []
    for sample_weight in (None, weight):
        rows, model = make_rows("rowwise_adagrad"), make_model()
        step = make_step(TrainStep, model, rows, kernels="torch")
        weights = None if sample_weight is None else torch.full((5,), sample_weight)
        step(dataclasses.replace(batch, weights=weights), 0.0)
        accumulators.append([rows.buffer_state[0][:ROWS], *step.dense_optimizer.state])

    for once, weighted in zip(*accumulators, strict=True):
        torch.testing.assert_close(weighted, weight * once)
        assert once.sum() > 0


def test_samples_of_unequal_weights_leave_their_gradient_by_the_weight_behind_it_in_dense_accumulators() -> None:
    batch, model = make_batch(BATCH, 0, weighted=False, sorted_by_host=True), make_model()
    weights = torch.tensor([1.0, 9.0, 1.0, 2.0, 1.0, 4.0, 1.0, 1.0])
    step = make_step(TrainStep, model, make_rows("rowwise_adagrad"), kernels="torch")
    assert batch.distinct is not None
    rows = step.rows.buffer[batch.distinct.rows][batch.distinct.inverse].view(BATCH, TABLES, DIM)
    losses = binary_cross_entropy_with_logits(model(batch.dense, rows), batch.labels, reduction="none")
    gradients = torch.autograd.grad((weights * losses).mean(), list(model.parameters()))

    step(dataclasses.replace(batch, weights=weights), 0.0)

    behind = (1 + 81 + 1 + 4 + 1 + 16 + 1 + 1) / (1 + 9 + 1 + 2 + 1 + 4 + 1 + 1)  # sum of squares by sum; mean is 2.5
    for accumulator, gradient in zip(step.dense_optimizer.state, gradients, strict=True):
        torch.testing.assert_close(accumulator, gradient.square() / behind)
    assert any(gradient.abs().max() > 1e-3 for gradient in gradients)


def test_weights_of_one_row_in_several_samples_count_by_their_size() -> None:
    slots, weights = np.array([4, 7, 9, 4, 8, 9]), torch.tensor([1.0, 3.0])
    found = sort_lookups(slots)
    distinct = Distinct(*(torch.from_numpy(part) for part in (found.unique, found.inverse, found.order, found.starts)))
    step = make_step(TrainStep, make_model(), make_rows("rowwise_adagrad"), kernels="torch")

    access = StagedAccess(rows=step.rows, distinct=distinct)
    found_weights = step._weigh_rows(weights, access, len(slots))

    assert found_weights is not None
    shared = (1 + 9) / (1 + 3)
    assert dict(zip(found.unique.tolist(), found_weights.tolist(), strict=True)) == {4: shared, 7: 1, 8: 3, 9: shared}


def gradient_of(size: int, batch_size: int | None, repeats: int = 1, *, divisor: int | None = None) -> torch.Tensor:
    """What plain SGD takes from rows and layers for so many samples, each as often as said."""
    batch = make_batch(size, 0, weighted=False)
    repeated = {name: getattr(batch, name).repeat_interleave(repeats, dim=0) for name in ("dense", "labels")}
    assert batch.positions is not None
    positions = batch.positions.view(size, TABLES).repeat_interleave(repeats, dim=0).flatten()
    rows, model = make_rows("sgd"), make_model()
    options = {"representations": fp32_tables(), "eps": 0.0, "batch_size": batch_size}
    optimizer = DenseOptimizer(model.parameters(), optimizer="sgd", eps=0.0)
    step = TrainStep(model=model, rows=rows, dense_optimizer=optimizer, **options)
    step(dataclasses.replace(batch, positions=positions, divisor=divisor, **repeated), 1.0)
    before = make_model().parameters()
    layers = [(one - other).flatten() for one, other in zip(before, model.parameters(), strict=True)]
    return torch.cat([(make_rows("sgd").buffer - rows.buffer).flatten(), *layers]).detach()


def test_a_short_batch_pulls_by_its_samples_and_as_published_as_a_whole_one() -> None:
    short = gradient_of(2, BATCH)
    torch.testing.assert_close(4 * short, gradient_of(2, BATCH, repeats=4))
    as_published = gradient_of(2, None)
    torch.testing.assert_close(as_published, gradient_of(2, None, repeats=4))
    torch.testing.assert_close(as_published, 4 * short)
    torch.testing.assert_close(gradient_of(2, BATCH, divisor=2), as_published)  # a full batch of a smaller size
    assert short.abs().max() > 1e-4


def test_the_reported_loss_of_weighted_samples_is_their_weighted_mean() -> None:
    losses = []
    batch = make_batch(BATCH, 0, weighted=True, sorted_by_host=True)
    assert batch.weights is not None
    for factor in (1.0, 4.0):
        step = make_step(TrainStep, make_model(), make_rows("sgd"), kernels="torch")
        step(dataclasses.replace(batch, weights=batch.weights * factor), 0.1)
        losses.append(step.take_loss_sum())
    assert losses[0] == pytest.approx(losses[1])
    alone = make_step(TrainStep, make_model(), make_rows("sgd"), kernels="torch")
    alone(dataclasses.replace(batch, weights=torch.full((BATCH,), 7.0)), 0.1)
    plain = make_step(TrainStep, make_model(), make_rows("sgd"), kernels="torch")
    plain(dataclasses.replace(batch, weights=None), 0.1)
    assert alone.take_loss_sum() == pytest.approx(plain.take_loss_sum())


@pytest.mark.parametrize("make", [TrainStep, FixedShapeStep])
@pytest.mark.parametrize("movement", ["net", "per-label"])
@pytest.mark.parametrize("weighted", [False, True])
def test_watched_rows_move_as_a_plain_loop_finds(make: type[TrainStep], movement: Movement, weighted: bool) -> None:
    num_watched = ROWS // 2
    rows, model = make_rows("sgd"), make_model()
    step = make_step(make, model, rows, kernels="torch")
    tracker = step.tracker = make_tracker(movement, rows.buffer[:num_watched])
    tracker.open_window()
    before = rows.buffer[:num_watched].clone()
    pulls = np.zeros((2, num_watched, 2))  # sum and count by label and row
    for seed, size in enumerate([BATCH, 5, BATCH]):
        batch = make_batch(size, seed, weighted=weighted)
        assert batch.positions is not None
        positions = batch.positions.view(size, TABLES)
        for sample in range(size):
            looked_up = rows.buffer[positions[sample]].clone().requires_grad_()
            logit = model(batch.dense[sample : sample + 1], looked_up.unsqueeze(0))
            loss = binary_cross_entropy_with_logits(logit, batch.labels[sample : sample + 1])
            gradients = torch.autograd.grad(loss, looked_up)[0]
            weight = 1.0 if batch.weights is None else float(batch.weights[sample])
            for row, gradient in zip(positions[sample].tolist(), gradients, strict=True):
                if row < num_watched:
                    pulls[int(batch.labels[sample]), row] += weight * float(gradient.norm()), weight
        step(batch, 0.1)

    found = tracker.close_window()
    if movement == "net":
        expected = (rows.buffer[:num_watched] - before).abs().amax(dim=1).numpy()
        expected[pulls[..., 1].sum(axis=0) == 0] = np.inf
    else:
        expected = pulls[..., 0] / np.maximum(pulls[..., 1], 1e-30)
        assert (expected > 0).any(axis=1).all()
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-7)


@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are compiled here, not interpreted")
@pytest.mark.parametrize("make", [TrainStep, FixedShapeStep])
@pytest.mark.parametrize("optimizer", [name for name in OPTIMIZERS.names() if OPTIMIZERS.get(name).has_kernel])
@pytest.mark.parametrize("weighted", [False, True])
def test_steps_by_triton_equal_those_by_torch_but_for_rounding(
    optimizer: str, make: type[TrainStep], weighted: bool
) -> None:
    pytest.importorskip("triton", reason="needs triton: pip install triton")
    buffers = []
    for kernels in ("torch", "triton"):
        rows, model = make_rows(optimizer), make_model()
        step = make_step(make, model, rows, kernels=kernels)
        for seed in range(4):
            step(make_batch(BATCH, seed, weighted=weighted), 0.1)
        buffers.append(rows.buffer[:ROWS])

    torch.testing.assert_close(*buffers, rtol=1e-5, atol=1e-6)
    assert not torch.equal(buffers[0], make_rows(optimizer).buffer[:ROWS])


def test_a_captured_graph_equals_the_plain_step_on_the_cpu(cuda: torch.device) -> None:
    compare_captured(cuda, kernels="torch")


def test_a_captured_graph_of_triton_kernels_equals_the_plain_step_on_the_cpu(real_cuda: torch.device) -> None:
    compare_captured(real_cuda, kernels="triton")


def compare_captured(cuda: torch.device, *, kernels: str) -> None:
    results = []
    for make, device in ((TrainStep, torch.device("cpu")), (FixedShapeStep, cuda)):
        rows = TieredRows(
            num_rows=ROWS, num_hot=ROWS, embedding_dim=DIM, num_staged=0, optimizer="rowwise_adagrad", device=device
        )
        rows.load(torch.arange(ROWS), torch.randn(ROWS, DIM, generator=torch.Generator().manual_seed(1)))
        model = make_model().to(device)
        step = make_step(make, model, rows, kernels=kernels if make is FixedShapeStep else "torch")
        tracker = step.tracker = make_tracker("per-label", rows.buffer[:ROWS])
        for seed in range(14):
            batch = make_batch(BATCH, seed, weighted=False)
            moved = {name: getattr(batch, name).to(device) for name in ("dense", "labels", "positions")}
            if seed == 5:  # after the first capture, before the second
                tracker.open_window()
            step(StagedBatch(is_hot=True, **moved), 0.1)
        results.append(torch.cat([rows.buffer[:ROWS].cpu().T, torch.from_numpy(tracker.close_window())]))

    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)
