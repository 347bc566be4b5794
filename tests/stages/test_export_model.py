"""A trained model is written elsewhere, rounded or as it is."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from trained import HELD, artifact_of, predictions_from_disk, predictions_of, train
from typer.testing import CliRunner

from slipstream import __version__
from slipstream.cli import app
from slipstream.training.model_file import load_model


def test_the_export_rounds_a_trained_model(tiny_runs: Path, tmp_path: Path):
    result = train(tiny_runs, train__mode="fae")
    out = tmp_path / "packed"
    done = CliRunner().invoke(
        app, ["export", "model", str(artifact_of(result).path), "--quantize", "int4", "--out", str(out), "--json"]
    )
    assert done.exit_code == 0, done.output
    summary = json.loads(done.stdout)
    assert summary["bytes"] == (out / "model.safetensors").stat().st_size < summary["bytes_before"]
    before, after = (load_file(folder / "model.safetensors") for folder in (artifact_of(result).path, out))
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
    result = train(tiny_runs, train__mode="fae", tables=HELD["mixed"])
    arguments = [str(artifact_of(result).path), "--quantize", "int4", "--out", str(tmp_path), "--json"]
    done = CliRunner().invoke(app, ["export", "model", *arguments])
    held = json.loads(done.stdout)["representations"]
    assert set(held.values()) == {"int8", "int4", "int2", "tt"}
    assert held["cat_1"] == "int4"
    before, after = (load_file(folder / "model.safetensors") for folder in (artifact_of(result).path, tmp_path))
    assert set(before) - set(after) == {"tables.cat_1"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{train}", "--quantize", "int3", "--out", "{out}"], "expected one of int8, int4, int2, found `int3`"),
        (["{segregate}", "--out", "{out}"], "expected a trained model"),
        (["{train}", "--out", "{train}"], "there is a model in"),
        (["{out}", "--out", "{out}"], "expected a trained model"),
        (["{train}", "--format", "pmml", "--out", "{out}"], "expected --format folder, "),
        (["{train}", "--format", "onnx", "--quantize", "int8", "--out", "{out}"], "are two steps"),
    ],
)
def test_an_export_that_cannot_be_is_refused(tiny_runs: Path, tmp_path: Path, arguments: list[str], message: str):
    result = train(tiny_runs, train__mode="fae")
    folders = {name: str(stage.artifact.path) for name, stage in result.stages.items()} | {"out": str(tmp_path)}
    done = CliRunner().invoke(app, ["export", "model", *(word.format(**folders) for word in arguments)])
    assert done.exit_code in (1, 2)
    assert message in done.stderr


@pytest.mark.parametrize("options", [[], ["--quantize", "int8"]])
def test_an_export_says_what_was_trained(tiny_runs: Path, tmp_path: Path, options: list[str]):
    result = train(tiny_runs, train__mode="fae")
    done = CliRunner().invoke(app, ["export", "model", str(artifact_of(result).path), *options, "--out", str(tmp_path)])
    assert done.exit_code == 0, done.output
    trained = json.loads((tmp_path / "model.json").read_text())["trained"]
    assert trained["fingerprint"] == artifact_of(result).fingerprint
    assert trained["metrics"]["test"]["auc"] == result.counts("train")["test"]["auc"]
    assert trained["slipstream"] == __version__
    again = tmp_path / "again"  # an exported model has no manifest, and what was known of it goes on
    assert CliRunner().invoke(app, ["export", "model", str(tmp_path), "--out", str(again)]).exit_code == 0
    assert json.loads((again / "model.json").read_text())["trained"] == trained
