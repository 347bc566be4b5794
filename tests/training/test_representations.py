"""How tables are held while they train: rows on few bits and cores, against a loop written out."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits
from trained import artifact_of, train

from slipstream.embedding.tiers.lookahead import StagedBatch
from slipstream.embedding.tiers.rows import TieredRows
from slipstream.errors import ConfigError
from slipstream.models.dlrm import DLRM
from slipstream.training.dense_optimizer import DenseOptimizer
from slipstream.training.representations import Representations, TableSpec
from slipstream.training.slot_layout import SlotLayout
from slipstream.training.step import FixedShapeStep, TrainStep

# --- one step, written out -----------------------------------------------------------------------------------

CPU = torch.device("cpu")
BATCH, DENSE, DIM = 6, 2, 4
ROWS = [5, 9, 1, 7]
LEVELS = {"int8": 127, "int4": 7}
KINDS = ["int4", "dense", "int8", "int4"]
PERIODS = [5, 1, 2, 1]


def make_layout(tierless: set[str] = frozenset()) -> SlotLayout:  # type: ignore[assignment]
    slots = np.random.default_rng(0).permutation(sum(ROWS)).astype(np.int32)
    cuts = np.cumsum([0, *ROWS])
    slot_maps = {f"cat_{at}": slots[cuts[at] : cuts[at + 1]] for at in range(len(ROWS))}
    return SlotLayout(slot_maps, num_hot=9, table_of_column=range(len(ROWS)), tierless=tierless)


def make_step(kind: str, cls: type[TrainStep] = TrainStep, *, device: torch.device = CPU, **options: Any) -> TrainStep:
    layout = make_layout()
    rows = TieredRows(
        num_rows=sum(ROWS), num_hot=sum(ROWS), embedding_dim=DIM, num_staged=0, optimizer=kind, device=device
    )
    rows.load(torch.arange(sum(ROWS)), torch.randn(sum(ROWS), DIM, generator=torch.Generator().manual_seed(1)))
    specs = [
        TableSpec(name=f"cat_{at}", num_rows=ROWS[at], representation=KINDS[at], period=PERIODS[at])
        for at in range(len(ROWS))
    ]
    representations = Representations(
        specs, layout=layout, embedding_dim=DIM, optimizer=kind, eps=1e-8, seed=0, device=device
    )
    representations.set_exact_scales(rows)
    torch.manual_seed(0)
    dlrm = DLRM(embedding_dim=DIM, bottom_mlp=(5, DIM), top_mlp=(6, 1))
    model = dlrm.build(num_dense=DENSE, num_columns=len(ROWS)).to(device)
    optimizer = DenseOptimizer(model.parameters(), optimizer=kind, eps=1e-8)
    options = {"batch_size": BATCH, **options}
    return cls(model=model, rows=rows, dense_optimizer=optimizer, eps=1e-8, representations=representations, **options)


def test_plain_tables_hand_rows_on_as_they_are():
    layout = make_layout()
    rows = TieredRows(num_rows=22, num_hot=9, embedding_dim=DIM, num_staged=4, optimizer="sgd", device=CPU)
    rows.load(torch.arange(22), torch.randn(22, DIM))
    plain = Representations.plain(layout, embedding_dim=DIM, device=CPU)
    looked_up = torch.randn(BATCH, len(ROWS), DIM)
    plain.begin_step(0.1)
    assert plain.train(looked_up, None) is looked_up
    slots = np.arange(2 * len(ROWS)).reshape(2, -1)
    assert torch.equal(plain.look_up(rows, slots), rows.gather(torch.from_numpy(slots.ravel())).view(2, len(ROWS), DIM))
    assert plain.state() == ({}, {})


def make_batch(layout: SlotLayout, seed: int, size: int = BATCH) -> tuple[StagedBatch, np.ndarray]:
    """A batch, and the rows it looks up."""
    rng = np.random.default_rng([7, seed])
    looked_up = np.stack([rng.integers(0, count, size) for count in ROWS], axis=1)
    positions = np.stack([layout.slot_maps[f"cat_{at}"][looked_up[:, at]] for at in range(len(ROWS))], axis=1)
    batch = StagedBatch(
        dense=torch.from_numpy(rng.random((size, DENSE), np.float32)),
        labels=torch.from_numpy((rng.random(size) < 0.5).astype(np.float32)),
        positions=torch.from_numpy(positions.ravel()),
        is_hot=True,
    )
    return batch, looked_up


def loop_rounded(weight: Tensor, scale: float, levels: int) -> Tensor:
    """A table on its grid, number by number."""
    out = torch.empty_like(weight)
    for index, value in np.ndenumerate(weight.numpy()):
        level = np.rint(np.float32(value) / np.float32(scale))
        out[index] = float(np.float32(min(max(level, -levels - 1), levels)) * np.float32(scale))
    return out


@pytest.mark.parametrize("kind", ["sgd", "rowwise_adagrad"])
def test_steps_equal_a_loop_over_rounded_tables(kind: str):
    step = make_step(kind)
    layout, rows = step.representations.layout, step.rows  # type: ignore[union-attr]
    maps = [torch.from_numpy(layout.slot_maps[f"cat_{at}"]).long() for at in range(len(ROWS))]
    seen = [float(rows.buffer[slots].abs().max()) for slots in maps]
    scales = [seen[at] / LEVELS.get(KINDS[at], 1) for at in range(len(ROWS))]
    state = torch.zeros(sum(ROWS))
    for number in range(9):
        masters = [rows.buffer[slots].clone() for slots in maps]
        model = copy.deepcopy(step.model)
        batch, looked_up = make_batch(layout, number)
        for at in range(len(ROWS)):
            if number and (number % PERIODS[at] == 0 or (number < PERIODS[at] and number in (1, 2, 4))):
                scales[at] = seen[at] / LEVELS.get(KINDS[at], 1)
            used = masters[at][torch.from_numpy(looked_up[:, at])]
            seen[at] = max(seen[at], float(used.abs().max()))
        # straight-through: the gradient of the rounded table is the gradient of the master
        rounded = [
            master.clone() if name == "dense" else loop_rounded(master, scales[at], LEVELS[name])
            for at, (name, master) in enumerate(zip(KINDS, masters, strict=True))
        ]
        tables = [table.requires_grad_() for table in rounded]
        picked = torch.stack([tables[at][torch.from_numpy(looked_up[:, at])] for at in range(len(ROWS))], dim=1)
        loss = binary_cross_entropy_with_logits(model(batch.dense, picked), batch.labels)
        gradients = torch.autograd.grad(loss, tables, allow_unused=True)

        step(batch, 0.1)

        for at, (slots, gradient) in enumerate(zip(maps, gradients, strict=True)):
            assert gradient is not None
            update = gradient
            if kind == "rowwise_adagrad":
                state[slots] += gradient.square().mean(dim=1)
                update = gradient / (state[slots].sqrt() + 1e-8).unsqueeze(1)
            torch.testing.assert_close(rows.buffer[slots], masters[at] - 0.1 * update, rtol=1e-5, atol=1e-6)
            grids = step.representations.grids  # type: ignore[union-attr]
            assert grids is not None
            if KINDS[at] != "dense":
                assert float(grids.scale[at]) == pytest.approx(scales[at], rel=1e-6)
                assert float(grids.peak[at]) == seen[at]


def test_a_fixed_shape_step_rounds_like_the_plain_one():
    plain = make_step("rowwise_adagrad")
    fixed = make_step("rowwise_adagrad", FixedShapeStep, batch_size=BATCH, num_dense=DENSE, num_tables=len(ROWS))
    for number, size in enumerate([BATCH, BATCH, 3, BATCH, BATCH]):
        batch, _ = make_batch(plain.representations.layout, number, size)  # type: ignore[union-attr]
        plain(batch, 0.1)
        fixed(batch, 0.1)
    assert torch.equal(plain.rows.buffer[: sum(ROWS)], fixed.rows.buffer[: sum(ROWS)])
    ours, theirs = plain.representations.state(), fixed.representations.state()  # type: ignore[union-attr]
    assert ours[0] == theirs[0] == {"num_steps": 5}
    assert all(torch.equal(ours[1][name], theirs[1][name]) for name in ours[1])


def test_rounding_is_captured_in_a_cuda_graph(cuda: torch.device):
    results = []
    for cls, device, options in (
        (TrainStep, CPU, {}),
        (FixedShapeStep, cuda, {"batch_size": BATCH, "num_dense": DENSE, "num_tables": len(ROWS)}),
    ):
        step = make_step("sgd", cls, device=device, **options)
        for number in range(12):
            batch = make_batch(step.representations.layout, number)[0]
            assert batch.positions is not None
            there = {name: getattr(batch, name).to(device) for name in ("dense", "labels", "positions")}
            step(dataclasses.replace(batch, **there), 0.1)
        grids = step.representations.grids
        assert grids is not None
        results.append([step.rows.buffer[: sum(ROWS)].cpu(), grids.scale.cpu(), grids.peak.cpu()])
    torch.testing.assert_close(*results)


# --- scales --------------------------------------------------------------------------------------------------


def test_a_scale_is_exact_before_and_after_training():
    step = make_step("sgd")
    assert step.representations is not None and step.representations.grids is not None
    layout, grids = step.representations.layout, step.representations.grids

    def exact(at: int) -> Tensor:
        return step.rows.buffer[torch.from_numpy(layout.slot_maps[f"cat_{at}"]).long()].abs().max() / LEVELS[KINDS[at]]

    def assert_exact() -> None:
        for at in (0, 2, 3):
            torch.testing.assert_close(grids.scale[at], exact(at))

    assert_exact()
    step.rows.buffer.mul_(0.5)  # weights that shrink are seen where the model is served
    for number in range(4):
        step(make_batch(layout, number)[0], 0.1)
    scale, peak = grids.scale.clone(), grids.peak.clone()
    assert scale[0] > 1.5 * exact(0)
    with step.serving():
        assert_exact()
    assert torch.equal(grids.scale, scale) and torch.equal(grids.peak, peak)


# --- tensor-train cores --------------------------------------------------------------------------------------


def test_cores_take_the_place_of_rows(tiny_runs: Path):
    tables = {"rules": [{"min_rows": 300, "representation": "tt", "tt_ranks": [3]}]}
    dense, cores = (train(tiny_runs, train__mode="fae", tables=chosen) for chosen in ({}, tables))
    sizes = dense.counts("segregate")["tables"]
    gone = sum(size for size in sizes.values() if size >= 300)
    assert gone
    before, after = (result.counts("train")["bytes_per_tier"] for result in (dense, cores))
    assert "tt" not in before
    row_bytes = 4 * (4 + 1)
    assert (before["hot"] + before["cold"]) - (after["hot"] + after["cold"]) == gone * row_bytes
    tensors = load_file(artifact_of(cores).path / "model.safetensors")
    held = [tensor for name, tensor in tensors.items() if ".core_" in name]
    stored = sum(tensor.nbytes for tensor in held)
    # Adagrad keeps as much again for cores, and slots are renumbered
    assert after["tt"] == 2 * stored + 4 * sum(sizes.values())
    assert not any(f"tables.{name}" in tensors for name, size in sizes.items() if size >= 300)


def test_cores_learn(tiny_runs: Path):
    tables = {"representation": "tt", "tt_ranks": [2]}
    options = {"train__mode": "fae", "train__device": "cpu", "tables": tables}
    result = train(tiny_runs, train__lr=0.02, **options)
    frozen = train(tiny_runs, train__lr=1e-9, **options)
    assert result.counts("train")["test"]["auc"] > frozen.counts("train")["test"]["auc"] + 0.05
    assert result.counts("train")["bytes_per_tier"]["cold"] == 0


def test_cores_start_alike_and_differ_between_tables(tiny_runs: Path):
    first, second = (make_bags(seed) for seed in (3, 3))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not torch.equal(first[0], first[2])


def make_bags(seed: int) -> list[Tensor]:
    names = {"cat_0", "cat_1"}
    slots = np.arange(16, dtype=np.int32)
    layout = SlotLayout({"cat_0": slots[:8], "cat_1": slots[8:]}, num_hot=0, table_of_column=[0, 1], tierless=names)
    specs = [TableSpec(name=name, num_rows=8, representation="tt", tt_ranks=(2,)) for name in sorted(names)]
    representations = Representations(
        specs, layout=layout, embedding_dim=4, optimizer="sgd", eps=1e-8, seed=seed, device=CPU
    )
    return [core.detach() for bag in representations.bags.values() for core in bag.tt_cores]


def test_a_step_with_cores_cannot_be_captured():
    layout = make_layout({"cat_1"})
    specs = [
        TableSpec(name=f"cat_{at}", num_rows=count, representation="tt" if at == 1 else "dense", tt_ranks=(2,))
        for at, count in enumerate(ROWS)
    ]
    representations = Representations(
        specs, layout=layout, embedding_dim=DIM, optimizer="sgd", eps=1e-8, seed=0, device=CPU
    )
    rows = TieredRows(num_rows=13, num_hot=13, embedding_dim=DIM, num_staged=0, optimizer="sgd", device=CPU)
    model = DLRM(embedding_dim=DIM, bottom_mlp=(DIM,), top_mlp=(1,)).build(num_dense=DENSE, num_columns=len(ROWS))
    with pytest.raises(ValueError, match="cannot be captured"):
        FixedShapeStep(
            batch_size=BATCH,
            num_dense=DENSE,
            num_tables=len(ROWS),
            model=model,
            rows=rows,
            dense_optimizer=DenseOptimizer(model.parameters(), optimizer="sgd", eps=1e-8),
            eps=1e-8,
            representations=representations,
        )


def test_staleness_needs_rows_to_watch(tiny_runs: Path):
    with pytest.raises(ConfigError, match="no table has rows"):
        train(tiny_runs, train__mode="slipstream", tables={"representation": "tt", "tt_ranks": [2]})


# --- the section of the pipeline file ------------------------------------------------------------------------


def test_an_override_of_no_table_is_refused(tiny_runs: Path):
    with pytest.raises(ConfigError, match="cat_77` names no table"):
        train(tiny_runs, tables={"overrides": {"cat_77": {"representation": "int4"}}})
