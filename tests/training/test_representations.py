"""Tables on few bits and tables of cores: the same model in every mode, on disk and in a loop written out."""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from strategies import tiny_config
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits
from typer.testing import CliRunner

from slipstream.cli import app
from slipstream.config import load_pipeline
from slipstream.embedding.quantized.grids import RowGrids
from slipstream.embedding.tiers.lookahead import StagedBatch
from slipstream.embedding.tiers.rows import TieredRows
from slipstream.errors import ArtifactError, ConfigError
from slipstream.io.samples import Samples
from slipstream.models.dlrm import DLRM
from slipstream.pipeline import RunResult, plan_pipeline, run_pipeline
from slipstream.stages import evaluate
from slipstream.training import checkpoint
from slipstream.training.dense_optimizer import DenseOptimizer
from slipstream.training.model_file import load_model
from slipstream.training.representations import Representations, TableSpec
from slipstream.training.slot_layout import SlotLayout
from slipstream.training.step import FixedShapeStep, TrainStep

CPU = torch.device("cpu")
MIXED: dict[str, Any] = {
    "representation": "int4",
    "period": 7,
    "quantize_linears": 8,
    "rules": [{"min_rows": 2, "representation": "int8"}, {"min_rows": 470, "representation": "tt", "tt_ranks": [3]}],
    "overrides": {"cat_1": {"representation": "dense"}, "cat_2": {"representation": "int4", "period": 3}},
}
TABLES: dict[str, dict[str, Any]] = {
    "int4": {"representation": "int4", "period": 7},
    "int8": {"representation": "int8", "period": 7},
    "mixed": MIXED,
}


def train(runs: Path, **overrides: Any) -> RunResult:
    return run_pipeline(tiny_config(train__log_every=10, **overrides), runs)


def folder_of(result: RunResult) -> Path:
    return result.stages["train"].artifact.path


def predictions_of(result: RunResult, split: str) -> np.ndarray:
    return np.load(folder_of(result) / f"predictions_{split}.npy", allow_pickle=False)


def predictions_from_disk(folder: Path, result: RunResult, split: str) -> np.ndarray:
    return evaluate.run(folder, segregated=result.stages["segregate"].artifact, split=split)[0]


def assert_same_model(first: RunResult, second: RunResult) -> None:
    ours, theirs = (load_file(folder_of(result) / "model.safetensors") for result in (first, second))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    for split in ("val", "test"):
        assert np.array_equal(predictions_of(first, split), predictions_of(second, split))


# --- every mode gives the same model -------------------------------------------------------------------------


@pytest.mark.parametrize("tables", ["int4", "mixed"])
def test_every_exact_mode_gives_the_same_model_to_the_bit(tiny_runs: Path, tables: str):
    first = train(tiny_runs, train__mode="fae", tables=TABLES[tables])
    for overrides in (
        {"train__mode": "resident"},
        {"train__mode": "baseline"},
        {"train__mode": "cached", "train__cache_ratio": 0.9},
        {"train__mode": "fae", "train__chunk_batches": 50, "train__staging_rows": 900},
    ):
        assert_same_model(first, train(tiny_runs, tables=TABLES[tables], **overrides))


def test_faithful_training_rounds_too(tiny_runs: Path):
    plain = {"train__mode": "fae", "train__faithful": True, "train__chunk_batches": 16}
    result = run_pipeline(tiny_config(tables=TABLES["int4"], **plain), tiny_runs)
    assert np.array_equal(predictions_of(result, "test"), predictions_from_disk(folder_of(result), result, "test"))


@pytest.mark.parametrize("criterion", ["stale", "random", "importance", "negative"])
def test_samples_are_skipped_whatever_tables_are_held_as(tiny_runs: Path, criterion: str):
    result = train(tiny_runs, train__mode="slipstream", skip__criterion=criterion, skip__refresh_steps=15, tables=MIXED)
    counts = result.counts("train")
    assert counts["samples_dropped"] > 0
    assert counts["samples_seen"] + counts["samples_dropped"] == result.counts("preprocess")["samples"]["train"]


class Killed(BaseException):
    """Stands in for kill -9."""


@pytest.mark.parametrize("tables", ["int4", "mixed"])
def test_an_interrupted_training_ends_with_the_same_model(tmp_path: Path, tables: str, monkeypatch: pytest.MonkeyPatch):
    settings = {"train__checkpoint_steps": 9, "train__chunk_batches": 2, "tables": TABLES[tables]}
    whole = train(tmp_path / "whole", **settings)
    original, saves = checkpoint.Checkpointer._save, 0

    def save_then_die(self: checkpoint.Checkpointer, trainer: Any) -> None:
        nonlocal saves
        original(self, trainer)
        self.wait(trainer)
        saves += 1
        if saves in (2, 4):
            raise Killed

    monkeypatch.setattr(checkpoint.Checkpointer, "_save", save_then_die)
    for _ in range(2):
        with pytest.raises(Killed):
            train(tmp_path / "cut", **settings)
    assert_same_model(whole, train(tmp_path / "cut", **settings))


# --- on disk -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tables", [{}, *TABLES.values()], ids=["dense", *TABLES])
def test_a_model_predicts_from_disk_what_its_training_predicted(tiny_runs: Path, tables: dict[str, Any]):
    result = train(tiny_runs, train__mode="fae", tables=tables)
    for split in ("val", "test"):
        np.testing.assert_array_equal(
            predictions_from_disk(folder_of(result), result, split), predictions_of(result, split)
        )


@pytest.mark.parametrize(("representation", "most"), [("int4", 0.14), ("int8", 0.27)])
def test_a_packed_model_is_small(tiny_runs: Path, representation: str, most: float):
    # rows of 32 values, and the smallest layers around them: tables are nearly all of the model
    model = {"model__embedding_dim": 32, "model__bottom_mlp": [32], "model__top_mlp": [1], "train__mode": "resident"}
    sizes = [
        (folder_of(train(tiny_runs, tables=tables, **model)) / "model.safetensors").stat().st_size
        for tables in ({}, {"representation": representation})
    ]
    assert sizes[1] <= most * sizes[0]


def test_packed_tables_hold_integers_and_one_scale(tiny_runs: Path):
    result = train(tiny_runs, train__mode="fae", tables=TABLES["int4"])
    tensors = load_file(folder_of(result) / "model.safetensors")
    for name, num_rows in result.counts("segregate")["tables"].items():
        packed, scale = tensors[f"tables.{name}.packed"], tensors[f"tables.{name}.scale"]
        assert packed.dtype == torch.uint8 and packed.shape == (num_rows, 2)
        assert scale.shape == () and scale > 0
        values = torch.stack([packed & 15, packed >> 4], dim=-1)
        # the scale is exact at the end: the largest weight is on the last level
        assert int(torch.where(values > 7, 16 - values.int(), values.int()).max()) == 7


def test_the_export_rounds_a_trained_model(tiny_runs: Path, tmp_path: Path):
    result = train(tiny_runs, train__mode="fae")
    out = tmp_path / "packed"
    done = CliRunner().invoke(
        app, ["export", "model", str(folder_of(result)), "--quantize", "int4", "--out", str(out), "--json"]
    )
    assert done.exit_code == 0, done.output
    summary = json.loads(done.stdout)
    assert summary["bytes"] == (out / "model.safetensors").stat().st_size < summary["bytes_before"]
    before, after = (load_file(folder / "model.safetensors") for folder in (folder_of(result), out))
    _, tables = load_model(out)
    for at, (name, num_rows) in enumerate(result.counts("segregate")["tables"].items()):
        weight = before[f"tables.{name}"]
        scale = weight.abs().max() / 7
        torch.testing.assert_close(after[f"tables.{name}.scale"], scale)
        rows = torch.zeros(num_rows, 26, dtype=torch.int64)
        rows[:, at] = torch.arange(num_rows)
        expected = torch.clamp(torch.round(weight / scale), -8, 7) * scale
        torch.testing.assert_close(tables.look_up(rows)[:, at], expected)
    assert all(torch.equal(before[name], after[name]) for name in before if name.startswith("dense."))
    predicted = predictions_from_disk(out, result, "test")
    assert not np.array_equal(predicted, predictions_of(result, "test"))
    np.testing.assert_allclose(predicted, predictions_of(result, "test"), atol=0.2)


def test_the_export_leaves_alone_what_is_not_fp32(tiny_runs: Path, tmp_path: Path):
    result = train(tiny_runs, train__mode="fae", tables=MIXED)
    arguments = [str(folder_of(result)), "--quantize", "int4", "--out", str(tmp_path), "--json"]
    done = CliRunner().invoke(app, ["export", "model", *arguments])
    held = json.loads(done.stdout)["representations"]
    assert set(held.values()) == {"int8", "int4", "tt"}
    assert held["cat_1"] == "int4"
    before, after = (load_file(folder / "model.safetensors") for folder in (folder_of(result), tmp_path))
    assert set(before) - set(after) == {"tables.cat_1"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{train}", "--quantize", "int3", "--out", "{out}"], "expected one of int8, int4, found `int3`"),
        (["{segregate}", "--out", "{out}"], "expected a trained model"),
        (["{train}", "--out", "{train}"], "there is a model in"),
        (["{out}", "--out", "{out}"], "expected a trained model"),
    ],
)
def test_an_export_that_cannot_be_is_refused(tiny_runs: Path, tmp_path: Path, arguments: list[str], message: str):
    result = train(tiny_runs, train__mode="fae")
    folders = {name: str(stage.artifact.path) for name, stage in result.stages.items()} | {"out": str(tmp_path)}
    done = CliRunner().invoke(app, ["export", "model", *(word.format(**folders) for word in arguments)])
    assert done.exit_code in (1, 2)
    assert message in done.stderr


def test_a_folder_without_a_whole_model_is_refused(tiny_runs: Path, tmp_path: Path):
    with pytest.raises(ArtifactError, match="expected a trained model"):
        load_model(tmp_path)
    source = folder_of(train(tiny_runs, train__mode="fae"))
    (tmp_path / "model.safetensors").write_bytes((source / "model.safetensors").read_bytes())
    description = json.loads((source / "model.json").read_text())
    (tmp_path / "model.json").write_text(json.dumps(description | {"top_mlp": [9, 1]}))
    with pytest.raises(ArtifactError, match="expected a whole model"):
        load_model(tmp_path)
    del description["representations"]
    (tmp_path / "model.json").write_text(json.dumps(description))
    with pytest.raises(ArtifactError, match="older form"):
        load_model(tmp_path)


# --- one step, written out -----------------------------------------------------------------------------------

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


def make_grids(**options: Any) -> RowGrids:
    return RowGrids(**{"bits": [4], "periods": [3], "table_of_column": [0], "device": CPU} | options)


def test_a_scale_follows_the_largest_weight_seen_every_period():
    grids = make_grids(periods=[6])
    grids.set_abs_max(torch.tensor([0.7]))
    used = []
    for largest in (1.4, 0.1, 2.8, 0.1, 0.1, 5.6, 11.2, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1):
        grids.begin_step()
        used.append(round(float(grids.scale), 6))
        grids.train(torch.tensor([[[largest, -0.1]]]))
    # before steps 1, 2, 4, 6 and 12; what a step looks up counts from the next refresh, and is not forgotten
    assert used == [0.1, 0.2, 0.2, 0.2, 0.4, 0.4, 0.8, 0.8, 0.8, 0.8, 0.8, 0.8, 1.6]


def test_predicting_changes_no_scale():
    grids = make_grids(periods=[1])
    grids.set_abs_max(torch.tensor([0.7]))
    grids.round(torch.full((2, 1, 4), 50.0))
    grids.begin_step()
    grids.begin_step()
    assert float(grids.peak) == pytest.approx(0.7) and float(grids.scale) == pytest.approx(0.1)


def test_the_gradient_passes_straight_through_also_where_values_saturate():
    grids = make_grids()
    grids.set_abs_max(torch.tensor([0.7]))
    rows = torch.tensor([[[0.26, 9.0]], [[-9.0, 0.0]]], requires_grad=True)
    rounded = grids.train(rows)
    torch.testing.assert_close(rounded, torch.tensor([[[0.3, 0.7]], [[-0.8, 0.0]]]))
    gradient = torch.randn(2, 1, 2)
    rounded.backward(gradient)
    assert torch.equal(rows.grad, gradient)


def test_columns_of_one_table_share_its_scale():
    grids = make_grids(bits=[4, 0, 8], periods=[1, 1, 1], table_of_column=[0, 1, 2, 0])
    looked_up = torch.tensor([[[0.5], [0.123], [1.27], [-1.4]]])
    grids.begin_step()
    grids.train(looked_up)
    grids.begin_step()
    torch.testing.assert_close(grids.scale[[0, 2]], torch.tensor([0.2, 0.01]))
    torch.testing.assert_close(grids.round(looked_up), torch.tensor([[[0.4], [0.123], [1.27], [-1.4]]]))


def test_a_scale_is_exact_before_and_after_training():
    step = make_step("sgd")
    assert step.representations is not None and step.representations.grids is not None
    layout, grids = step.representations.layout, step.representations.grids

    def exact(at: int) -> Tensor:
        return step.rows.buffer[torch.from_numpy(layout.slot_maps[f"cat_{at}"]).long()].abs().max() / LEVELS[KINDS[at]]

    for moment in ("before", "after"):
        if moment == "after":
            step.rows.buffer.mul_(0.5)  # weights that shrink are seen once training ends
            for number in range(4):
                step(make_batch(layout, number)[0], 0.1)
            assert grids.scale[0] > 1.5 * exact(0)
            step.set_exact_scales()
        for at in (0, 2, 3):
            torch.testing.assert_close(grids.scale[at], exact(at))


def test_periods_below_one_are_refused():
    with pytest.raises(ValueError, match="at least 1 step"):
        make_grids(periods=[0])


# --- slots ---------------------------------------------------------------------------------------------------


@given(st.data())
def test_renumbering_keeps_rows_apart_and_hot_rows_first(data: st.DataObject):
    sizes = data.draw(st.lists(st.integers(1, 6), min_size=1, max_size=5))
    total = sum(sizes)
    num_hot = data.draw(st.integers(0, total))
    tierless = data.draw(st.sets(st.sampled_from([f"cat_{at}" for at in range(len(sizes))])))
    slots = np.array(data.draw(st.permutations(range(total))), np.int32)
    cuts = np.cumsum([0, *sizes])
    slot_maps = {f"cat_{at}": slots[cuts[at] : cuts[at + 1]] for at in range(len(sizes))}
    layout = SlotLayout(slot_maps, num_hot=num_hot, table_of_column=range(len(sizes)), tierless=tierless)

    new = np.concatenate(list(layout.slot_maps.values()))
    assert sorted(new) == list(range(total))
    tiered = np.concatenate([np.full(size, f"cat_{at}" not in tierless) for at, size in enumerate(sizes)])
    assert np.array_equal(new < layout.num_rows, tiered)
    assert np.array_equal((new < layout.num_hot), tiered & (slots < num_hot))
    for name in tierless:
        assert np.array_equal(layout.slot_maps[name], layout.first_row[name] + np.arange(len(slot_maps[name])))
    rows = np.array([[data.draw(st.integers(0, size - 1)) for size in sizes] for _ in range(3)])
    old = np.stack([slot_maps[f"cat_{at}"][rows[:, at]] for at in range(len(sizes))], axis=1)
    moved = layout.translate(Samples(X_int=np.zeros((3, 1), np.float32), X_cat=old, y=np.zeros(3, np.float32)))
    expected = np.stack([layout.slot_maps[f"cat_{at}"][rows[:, at]] for at in range(len(sizes))], axis=1)
    assert np.array_equal(moved.X_cat, expected)
    counts = np.arange(total) * 10
    assert np.array_equal(layout.counts_by_slot(counts)[new[tiered]], counts[tiered])


# --- tensor-train cores --------------------------------------------------------------------------------------


def test_cores_take_the_place_of_rows(tiny_runs: Path):
    tables = {"rules": [{"min_rows": 470, "representation": "tt", "tt_ranks": [3]}]}
    dense, cores = (train(tiny_runs, train__mode="fae", tables=chosen) for chosen in ({}, tables))
    sizes = dense.counts("segregate")["tables"]
    gone = sum(size for size in sizes.values() if size >= 470)
    assert gone
    before, after = (result.counts("train")["bytes_per_tier"] for result in (dense, cores))
    assert "tt" not in before
    row_bytes = 4 * (4 + 1)
    assert (before["hot"] + before["cold"]) - (after["hot"] + after["cold"]) == gone * row_bytes
    tensors = load_file(folder_of(cores) / "model.safetensors")
    held = [tensor for name, tensor in tensors.items() if ".core_" in name]
    stored = sum(tensor.nbytes for tensor in held)
    # Adagrad keeps as much again for cores, and slots are renumbered
    assert after["tt"] == 2 * stored + 4 * sum(sizes.values())
    assert not any(f"tables.{name}" in tensors for name, size in sizes.items() if size >= 470)


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


def test_the_largest_rule_that_fits_holds_and_overrides_win():
    tables = tiny_config(
        tables={
            "period": 50,
            "rules": [
                {"min_rows": 1000, "representation": "tt", "tt_ranks": [8, 8]},
                {"min_rows": 10, "representation": "int8", "period": 5},
            ],
            "overrides": {"cat_2": {"representation": "int4"}},
        }
    ).tables
    chosen = {(name, size): tables.choice_for(name, size) for name in ("cat_1", "cat_2") for size in (9, 10, 1000)}
    assert [chosen["cat_1", size].representation for size in (9, 10, 1000)] == ["dense", "int8", "tt"]
    assert [chosen["cat_2", size].representation for size in (9, 10, 1000)] == ["int4"] * 3
    assert [chosen["cat_2", size].period for size in (9, 10, 1000)] == [50, 5, 50]
    assert chosen["cat_1", 1000].tt_ranks == (8, 8)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"tables": {"representation": "in4"}}, "tables.representation` must be one of dense, int8, int4, tt"),
        ({"tables": {"rules": [{"representation": "tt"}]}}, "missing key `tables.rules\\[0\\].min_rows`"),
        ({"tables": {"rules": [{"min_rows": 1, "rank": 2}]}}, "unknown key `tables.rules\\[0\\].rank`"),
        ({"tables": {"period": 0}}, "`tables.period` must be at least 1"),
        ({"tables": {"overrides": {"cat_1": {"representation": 4}}}}, "cat_1.representation` must be one of"),
        ({"tables": {"tt_ranks": []}}, "one to three ranks"),
        ({"tables": {"quantize_linears": 3}}, "must be 0, 4 or 8"),
        (
            {"tables": {"representation": "int4"}, "model__embedding_dim": 3, "model__bottom_mlp": [3]},
            "`model.embedding_dim` must make rows of even width for int4 tables",
        ),
        (
            {"tables": {"representation": "tt"}, "train__faithful": True, "train__mode": "fae"},
            "`train.faithful` does not go with tt",
        ),
    ],
)
def test_tables_that_cannot_be_held_so_are_refused(overrides: dict[str, Any], message: str):
    with pytest.raises(ConfigError, match=message):
        tiny_config(**overrides)


def test_an_override_of_no_table_is_refused(tiny_runs: Path):
    with pytest.raises(ConfigError, match="cat_77` names no table"):
        train(tiny_runs, tables={"overrides": {"cat_77": {"representation": "int4"}}})


def test_a_section_that_says_nothing_keeps_what_is_trained(tmp_path: Path):
    def fingerprint(**overrides: Any) -> str:
        return plan_pipeline(tiny_config(**overrides), tmp_path)[-1].key.fingerprint

    assert fingerprint() == fingerprint(tables={"period": 9, "rules": [{"min_rows": 5, "representation": "dense"}]})
    assert fingerprint() != fingerprint(tables={"representation": "int4"})
    assert fingerprint() != fingerprint(tables={"quantize_linears": 8})


def test_rules_are_written_as_arrays_of_tables(tmp_path: Path):
    path = tmp_path / "pipeline.toml"
    path.write_text(
        'name = "x"\n[dataset]\nsource = "synthetic"\n[tables]\nrepresentation = "dense"\n'
        '[[tables.rules]]\nmin_rows = 1_000_000\nrepresentation = "tt"\ntt_ranks = [16, 16]\n'
        '[tables.overrides.cat_2]\nrepresentation = "int4"\n'
    )
    tables = load_pipeline(path, ["tables.overrides.cat_3.representation=int8"]).tables
    assert tables.choice_for("cat_0", 10**6).representation == "tt"
    assert tables.choice_for("cat_2", 10**6).representation == "int4"
    assert tables.choice_for("cat_3", 5).representation == "int8"
