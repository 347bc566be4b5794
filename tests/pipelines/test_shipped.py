"""The pipelines that are shipped."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from slipstream.cli import app
from slipstream.config import load_pipeline
from slipstream.pipeline import plan_pipeline

PIPELINES = sorted((Path(__file__).parents[2] / "pipelines").glob("*.toml"))


@pytest.mark.parametrize("path", PIPELINES, ids=lambda path: path.stem)
def test_every_shipped_pipeline_loads(path: Path):
    config = load_pipeline(path)
    assert config.name == path.stem
    assert path.read_text(encoding="utf-8").startswith("# "), "it says what it is for"
    assert CliRunner().invoke(app, ["check", path.stem]).exit_code == 0


def test_tiny_is_what_runs_without_an_argument():
    document = json.loads(CliRunner().invoke(app, ["check", "--json"]).stdout)
    assert document["name"] == "tiny"
    assert document["dataset"]["source"] == "synthetic"


def test_tiny_plans_every_stage(tmp_path: Path):
    config = load_pipeline(next(path for path in PIPELINES if path.stem == "tiny"))
    assert all(plan.will_run for plan in plan_pipeline(config, tmp_path))


@pytest.mark.slow
def test_tiny_trains_a_model_that_comes_near_its_teacher(tmp_path: Path):
    result = CliRunner().invoke(app, ["run", "--runs", str(tmp_path), "--json"])
    assert result.exit_code == 0, result.stderr
    stages = json.loads(result.stdout)["stages"]
    teacher, model = (stages[name] for name in ("generate", "train"))
    assert model["test"]["auc"] > 0.72
    assert model["test"]["auc"] < teacher["splits"]["test"]["auc"]
    assert 0.9 < model["test"]["calibration"] < 1.1
